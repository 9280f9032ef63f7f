//! What happens when a replica fails behind its first token.

use proptest::prelude::*;

use super::*;
use crate::{ledger::fingerprint, parse::Grammar};
use fake::{Ending, Play};

/// Prompts whose samples end in both ways, of all lengths.
fn prompts() -> Vec<Prompt> {
    let prompts: Vec<Prompt> = (0..60)
        .map(|n| prompt("tenant", &format!("conversation {n}")))
        .collect();
    let stops = prompts
        .iter()
        .filter(|prompt| reference(prompt).1 == SampleEnd::Stop);
    assert!((10..50).contains(&stops.count()));
    prompts
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_dies_anywhere_changes_nothing() {
    for whole in prompts() {
        let (tokens, _) = reference(&whole);
        for at in 1..=tokens.len() {
            for (chunk, cached_first) in [(1, false), (3, true)] {
                let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
                let order = order(&router, &whole);
                let (first, second) = match order[0].as_str() {
                    "a" => (&fakes[0], &fakes[1]),
                    _ => (&fakes[1], &fakes[0]),
                };
                first.play(Play {
                    chunk,
                    cached_first,
                    ..Play::of(Ending::Fails(at, failed("killed")))
                });
                let heard = hear(router.sample(whole.clone())).await;
                assert_eq!(heard, Heard::whole(&whole));
                assert_eq!(in_flight(&router), [0, 0]);
                let rest = second.prompts();
                if at == tokens.len() {
                    assert_eq!(rest.len(), 0, "nothing is left to sample");
                    continue;
                }
                let mut all = whole.tokens.tokens_from(0);
                all.extend(&tokens[..at]);
                assert_eq!(rest[0].tokens.fingerprint(), fingerprint(&all));
                assert_eq!(rest[0].tokens.sampled_tokens(), at);
                assert_eq!(rest[0].sampling.max_tokens, 12 - at as u32);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn it_goes_on_for_as_long_as_there_are_replicas_and_attempts() {
    let (router, fakes) = fleet(["a", "b", "c", "d"], RoutingOptions::default());
    let names = ["a", "b", "c", "d"];
    let long = prefers(&router, &names);
    fakes[0].ends(Ending::Fails(2, failed("one")));
    fakes[1].ends(Ending::Fails(3, unavailable(Some(50))));
    assert_eq!(hear(router.sample(long.clone())).await, Heard::whole(&long));
    let prompts = fakes.each_ref().map(|fake| fake.prompts());
    assert_eq!(asked(&fakes), [1, 1, 1, 0]);
    assert_eq!(prompts[2][0].sampling.max_tokens, 12 - 5);
    // Each has its own seed, and the same tokens have the same one.
    let seeds = [&prompts[0][0], &prompts[1][0], &prompts[2][0]].map(|it| it.sampling.seed);
    assert_eq!(seeds[0], Some(42));
    assert!(seeds[1] != seeds[0] && seeds[2] != seeds[0] && seeds[1] != seeds[2]);

    sleep_ms(50).await;
    for (fake, reason) in fakes.iter().zip(["one", "two", "three"]) {
        fake.ends(Ending::Fails(2, failed(reason)));
    }
    let heard = hear(router.sample(long.clone())).await;
    assert_eq!(heard.end, Err(failed("three")));
    assert_eq!(heard.tokens, reference(&long).0[..6]);
    assert_eq!(asked(&fakes), [2, 2, 2, 0]);
    assert_eq!(fakes[1].prompts()[1].sampling.seed, seeds[1]);
}

#[tokio::test(start_paused = true)]
async fn where_all_others_are_out_the_error_says_that_it_broke() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let long = prefers(&router, &["a", "b"]);
    for error in [unavailable(Some(20)), unavailable(None), refused()] {
        fakes[0].ends(Ending::Fails(2, failed("killed")));
        fakes[1].fails(error);
        let heard = hear(router.sample(long.clone())).await;
        assert_eq!(heard.tokens, reference(&long).0[..2]);
        assert!(
            matches!(heard.end, Err(BackendError::Failed { .. })),
            "{heard:?}"
        );
        sleep_ms(20).await;
        // So that the next one begins with a clean slate.
        hear(router.sample(long.clone())).await;
    }
    // One that refuses the rest ends it, though there is another.
    let (router, fakes) = fleet(["a", "b", "c"], RoutingOptions::default());
    let long = prefers(&router, &["a", "b", "c"]);
    fakes[0].ends(Ending::Fails(2, failed("killed")));
    fakes[1].fails(refused());
    let heard = hear(router.sample(long)).await;
    assert_eq!(heard.end, Err(failed("too long")));
    assert_eq!(asked(&fakes), [1, 1, 0]);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_continued_exactly_fails() {
    type Change = fn(&mut Prompt, &[Arc<Fake>; 2]);
    let changes: [(&str, Change); 6] = [
        ("a grammar", |prompt, _| {
            prompt.sampling.grammar = Some(Arc::new(Grammar::Free));
        }),
        ("a penalty", |prompt, _| {
            prompt.sampling.presence_penalty = 0.1
        }),
        ("another", |prompt, _| {
            prompt.sampling.frequency_penalty = -0.1
        }),
        ("the first reads messages", |_, fakes| {
            fakes[0].capabilities.lock().reads_messages = true;
        }),
        ("the second reads messages", |_, fakes| {
            fakes[1].capabilities.lock().reads_messages = true;
        }),
        ("the second reads items", |_, fakes| {
            fakes[1].capabilities.lock().reads_items = true;
        }),
    ];
    for (what, change) in changes {
        let fakes = [(); 2].map(|()| Arc::new(Fake::default()));
        let mut long = {
            let router = router_of(["a", "b"].iter().zip(&fakes), RoutingOptions::default());
            prefers(&router, &["a", "b"])
        };
        change(&mut long, &fakes);
        let router = router_of(["a", "b"].iter().zip(&fakes), RoutingOptions::default());
        fakes[0].ends(Ending::Fails(2, failed("killed")));
        let heard = hear(router.sample(long.clone())).await;
        assert_eq!(heard.end, Err(failed("killed")), "{what}");
        assert_eq!(asked(&fakes), [1, 0], "{what}");
        // Before the first token it makes no difference.
        fakes[0].fails(failed("killed"));
        let heard = hear(router.sample(long.clone())).await;
        assert_eq!(heard.end, Heard::whole(&long).end, "{what}");
        assert_eq!(asked(&fakes), [2, 1], "{what}");
    }
}

/// How a sample goes, of at most 12 tokens.
fn plays() -> impl Strategy<Value = (usize, u64, usize, bool, u8)> {
    (0..12usize, 0..60u64, 1..4usize, any::<bool>(), 0..8u8)
}

fn play_of((at, after, chunk, cached_first, kind): (usize, u64, usize, bool, u8)) -> Play {
    let ending = match kind {
        0 | 1 => Ending::Fails(at, failed("killed")),
        2 => Ending::Fails(at, unavailable(None)),
        3 => Ending::Fails(at, unavailable(Some(30))),
        4 => Ending::Fails(0, refused()),
        5 => Ending::Stops(at),
        6 => Ending::Hangs(0),
        _ => Ending::Whole,
    };
    Play {
        chunk,
        cached_first,
        ..Play::of(ending).after_ms(after)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Whatever fails, what comes is the sample that was to come, or its beginning; what it cost is
    /// told once; and in the end nothing is in flight.
    #[test]
    fn failures_change_nothing_but_where_it_ends(
        samples in prop::collection::vec((0..40usize, prop::collection::vec(plays(), 0..4), 0..30usize), 1..12),
        hedge_ms in prop_oneof![Just(0), Just(20u64)],
        attempts_max in 1..4u32,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let options = RoutingOptions {
                attempts_max,
                hedge_ms,
                first_token_ms_max: 50,
                ..RoutingOptions::default()
            };
            let (router, fakes) = fleet(["a", "b", "c"], options);
            for (conversation, plays, dropped_at) in samples {
                let prompt = prompt("tenant", &format!("conversation {conversation}"));
                let whole = Heard::whole(&prompt);
                for (play, fake) in plays.into_iter().zip(fakes.iter().cycle()) {
                    // A play that no sample takes is left for the next one.
                    fake.play(play_of(play));
                }
                if dropped_at < 10 {
                    let mut chunks = router.sample(prompt).take(dropped_at);
                    while chunks.next().await.is_some() {}
                    continue;
                }
                let heard = hear(router.sample(prompt)).await;
                prop_assert!(whole.tokens.starts_with(&heard.tokens));
                prop_assert!(heard.cached.len() <= 1);
                if heard.end.is_ok() {
                    prop_assert_eq!(heard, whole);
                }
                sleep_ms(40).await;
            }
            prop_assert_eq!(in_flight(&router), [0, 0, 0]);
            prop_assert_eq!(fakes.each_ref().map(|fake| fake.live()), [0, 0, 0]);
            Ok(())
        })?;
    }
}
