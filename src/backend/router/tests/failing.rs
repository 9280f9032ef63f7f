//! What happens when a replica fails before its first token.

use super::*;
use fake::{Ending, Play};

#[tokio::test(start_paused = true)]
async fn the_next_one_is_tried() {
    let (router, fakes) = fleet(["a", "b", "c"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b", "c"]);
    fakes[0].fails(failed("lost"));
    fakes[1].fails(unavailable(None));
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!(asked(&fakes), [1, 1, 1]);
    // A stream that just ends is a failure, too.
    fakes[0].ends(Ending::Stops(0));
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!(asked(&fakes), [2, 2, 1]);
    let failures: Vec<u32> = router.replicas().iter().map(|it| it.failures).collect();
    assert_eq!(
        (failures, in_flight(&router)),
        (vec![2, 0, 0], vec![0, 0, 0])
    );
}

#[tokio::test(start_paused = true)]
async fn attempts_are_bounded() {
    let options = RoutingOptions {
        attempts_max: 2,
        ..RoutingOptions::default()
    };
    let (router, fakes) = fleet(["a", "b", "c"], options);
    let home_a = prefers(&router, &["a", "b", "c"]);
    fakes[0].fails(failed("one"));
    fakes[1].fails(failed("two"));
    let heard = hear(router.sample(home_a)).await;
    assert_eq!(heard.end, Err(failed("two")));
    assert_eq!(asked(&fakes), [1, 1, 0]);

    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    fakes[0].fails(failed("one"));
    fakes[1].fails(failed("two"));
    let heard = hear(router.sample(home_a)).await;
    assert_eq!(heard.end, Err(failed("two")));
    assert_eq!(asked(&fakes), [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_nobodys_failure_and_is_tried_nowhere_else() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    for _ in 0..5 {
        fakes[0].fails(refused());
        let heard = hear(router.sample(home_a.clone())).await;
        assert_eq!(heard.end, Err(refused()));
    }
    assert_eq!(asked(&fakes), [5, 0]);
    assert_eq!(router.replicas()[0].failures, 0);
}

/// The breaker, from outside: a single replica that fails, is left alone, tried, and taken back.
#[tokio::test(start_paused = true)]
async fn one_that_fails_in_a_row_is_left_alone_and_tried_again() {
    let (router, fakes) = fleet(["a"], RoutingOptions::default());
    let prompt = prompt("tenant", "conversation");
    let one = async |ending: Option<Ending>| {
        if let Some(ending) = ending {
            fakes[0].ends(ending);
        }
        hear(router.sample(prompt.clone())).await.end
    };
    let dies = || Some(Ending::Fails(0, failed("dead")));
    for _ in 0..3 {
        assert_eq!(breakers(&router), [BreakerState::Closed]);
        assert_eq!(one(dies()).await, Err(failed("dead")));
    }
    assert_eq!(
        (breakers(&router), router.healthy()),
        (vec![BreakerState::Open], false)
    );
    let BackendError::Unavailable {
        retry_after: Some(retry_after),
        ..
    } = one(None).await.unwrap_err()
    else {
        panic!("it is left alone")
    };
    assert_eq!(router.replicas()[0].out_for, Some(retry_after));
    // Half a second, and up to half of that.
    assert!(
        (500..=750).contains(&retry_after.as_millis()),
        "{retry_after:?}"
    );
    assert_eq!(asked(&fakes), [3]);

    tokio::time::sleep(retry_after).await;
    assert_eq!(
        (breakers(&router), router.healthy()),
        (vec![BreakerState::HalfOpen], true)
    );
    // One on trial, and no other.
    fakes[0].ends(Ending::Hangs(0));
    let trial = router.sample(prompt.clone());
    assert_eq!(asked(&fakes), [4]);
    let told = one(None).await.unwrap_err();
    assert!(
        matches!(told, BackendError::Unavailable { retry_after: Some(after), .. } if after.as_millis() == 500)
    );
    drop(trial);
    assert_eq!(one(dies()).await, Err(failed("dead")));
    assert_eq!(
        (breakers(&router), asked(&fakes)),
        (vec![BreakerState::Open], [5])
    );
    let out_for = router.replicas()[0].out_for.unwrap();
    assert!(
        (1_000..=1_500).contains(&out_for.as_millis()),
        "{out_for:?}"
    );

    tokio::time::sleep(out_for).await;
    assert_eq!(one(None).await, Heard::whole(&prompt).end);
    assert_eq!(breakers(&router), [BreakerState::Closed]);
    assert_eq!(router.replicas()[0].failures, 0);
}

#[tokio::test(start_paused = true)]
async fn failures_behind_the_first_token_count_as_well() {
    let (router, fakes) = fleet(["a"], RoutingOptions::default());
    let prompt = prompt("tenant", "conversation");
    for _ in 0..3 {
        fakes[0].ends(Ending::Fails(2, failed("dead")));
        let heard = hear(router.sample(prompt.clone())).await;
        assert_eq!(heard.end, Err(failed("dead")));
    }
    assert_eq!(breakers(&router), [BreakerState::Open]);
    // One token of the trial is enough to take it back, and one failure to leave it alone again.
    sleep_ms(750).await;
    fakes[0].ends(Ending::Fails(2, failed("dead")));
    let mut chunks = router.sample(prompt.clone());
    assert_eq!(breakers(&router), [BreakerState::HalfOpen]);
    chunks.next().await.unwrap().unwrap();
    assert_eq!(breakers(&router), [BreakerState::Closed]);
    hear(chunks).await;
    assert_eq!(breakers(&router), [BreakerState::Open]);
    // A client that ends a sample of its own accord says nothing against the replica.
    sleep_ms(1_500).await;
    router.sample(prompt.clone()).next().await.unwrap().unwrap();
    assert_eq!(router.replicas()[0].failures, 0);
}

#[tokio::test(start_paused = true)]
async fn a_trial_that_fails_costs_its_sample_nothing() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    for _ in 0..3 {
        fakes[0].fails(failed("dead"));
        hear(router.sample(home_a.clone())).await;
    }
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [3, 4]);
    sleep_ms(750).await;
    fakes[0].fails(failed("dead"));
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!(asked(&fakes), [4, 5]);
    sleep_ms(1_500).await;
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [5, 5]);
}

#[tokio::test(start_paused = true)]
async fn one_that_says_when_is_asked_again_then() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    fakes[0].fails(unavailable(Some(2_000)));
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    sleep_ms(1_999).await;
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [1, 2]);
    sleep_ms(1).await;
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [2, 2]);
    assert_eq!(router.replicas()[0].failures, 0);
}

#[tokio::test(start_paused = true)]
async fn where_all_are_out_the_soonest_is_told() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    fakes[0].fails(unavailable(Some(5_000)));
    fakes[1].fails(unavailable(Some(90_000)));
    let heard = hear(router.sample(home_a.clone())).await;
    assert_eq!(heard.end, Err(unavailable(Some(5_000))));
    sleep_ms(1_000).await;
    let out = |millis| {
        Err(BackendError::Unavailable {
            reason: "no replica takes samples now".to_owned(),
            retry_after: Some(Duration::from_millis(millis)),
        })
    };
    assert_eq!(hear(router.sample(home_a.clone())).await.end, out(4_000));
    router.prefill(home_a.clone()).await.unwrap();
    assert_eq!(fakes[0].prefills() + fakes[1].prefills(), 0);
    sleep_ms(4_000).await;
    // The first is back: it is what is told, unless it says otherwise.
    fakes[0].fails(unavailable(Some(600_000)));
    let heard = hear(router.sample(home_a.clone())).await;
    assert_eq!(heard.end, Err(unavailable(Some(55_000))));
}

#[tokio::test(start_paused = true)]
async fn one_that_does_not_begin_in_time_has_failed() {
    let options = RoutingOptions {
        first_token_ms_max: 100,
        ..RoutingOptions::default()
    };
    let (router, fakes) = fleet(["a", "b"], options);
    let home_a = prefers(&router, &["a", "b"]);
    let start = tokio::time::Instant::now();
    // What it tells of its cache is no token.
    fakes[0].play(Play {
        cached_first: true,
        ..Play::of(Ending::Hangs(0))
    });
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!((start.elapsed().as_millis(), fakes[0].live()), (100, 0));
    assert_eq!((router.replicas()[0].failures, asked(&fakes)), (1, [1, 1]));
    // Later tokens may take their time.
    fakes[0].play(Play::of(Ending::Hangs(1)).after_ms(99));
    let mut chunks = router.sample(home_a);
    chunks.next().await.unwrap().unwrap();
    let silence = tokio::time::timeout(Duration::from_secs(3_600), chunks.next());
    assert!(silence.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_replica_says_how_it_stands() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    fakes[0].fails(unavailable(Some(2_000)));
    fakes[1].ends(Ending::Hangs(1));
    let mut held = router.sample(home_a);
    held.next().await.unwrap().unwrap();
    let status = |name: &str, in_flight, out_for| ReplicaStatus {
        name: name.into(),
        kind: "fake",
        healthy: true,
        breaker: BreakerState::Closed,
        in_flight,
        failures: 0,
        out_for,
    };
    let a = status("a", 0, Some(Duration::from_secs(2)));
    assert_eq!(router.replicas(), [a, status("b", 1, None)]);
}
