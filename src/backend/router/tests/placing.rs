//! Which replica takes a sample.

use std::sync::atomic::Ordering;

use futures::StreamExt as _;

use super::*;
use crate::{backend::Ungrammatical, parse::Grammar};
use fake::{Ending, Play};

#[tokio::test]
async fn a_conversation_stays_and_conversations_spread() {
    let (router, fakes) = fleet(["a", "b", "c"], RoutingOptions::default());
    for n in 0..60 {
        let prompt = prompt("tenant", &format!("conversation {n}"));
        let before = asked(&fakes);
        for _ in 0..3 {
            hear(router.sample(prompt.clone())).await;
        }
        let after = asked(&fakes);
        let new = std::array::from_fn::<_, 3, _>(|at| after[at] - before[at]);
        assert!(new.contains(&3), "{new:?}");
    }
    assert!(asked(&fakes).iter().all(|asked| *asked > 30));
    // The same affinity of another tenant is another conversation.
    let orders = ["one", "two", "three", "four"].map(|tenant| {
        let prompt = prompt(tenant, "conversation");
        order(&router, &prompt)
    });
    assert!(orders.iter().any(|order| *order != orders[0]));
}

#[tokio::test]
async fn over_its_share_the_next_one_takes_it_and_then_it_comes_back() {
    let (router, fakes) = fleet(["a", "b", "c"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b", "c"]);
    let hold = || {
        fakes.iter().for_each(|fake| fake.ends(Ending::Hangs(1)));
        router.sample(home_a.clone())
    };
    // One may have 1 of the first 2 (1.25 × 2 / 3), 2 of the first 4 (1.25 × 4 / 3).
    let mut held = vec![hold()];
    assert_eq!(in_flight(&router), [1, 0, 0]);
    held.push(hold());
    assert_eq!(in_flight(&router), [1, 1, 0]);
    held.push(hold());
    held.push(hold());
    assert_eq!(in_flight(&router), [2, 2, 0]);
    for _ in 4..30 {
        held.push(hold());
    }
    // 13 of 30: the last one has what is left.
    assert_eq!(in_flight(&router), [13, 13, 4]);
    held.clear();
    assert_eq!(in_flight(&router), [0, 0, 0]);
    let _held = hold();
    assert_eq!(in_flight(&router), [1, 0, 0]);
}

#[tokio::test]
async fn samples_of_others_on_an_engine_count_and_ours_count_once() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    *fakes[0].load.lock() = Some(5);
    *fakes[1].load.lock() = Some(4);
    // It may have 7 of 10 (1.25 × 10 / 2), and 9 of 14.
    hear(router.sample(home_a.clone())).await;
    assert_eq!((asked(&fakes), router.load()), ([1, 0], Some(9)));
    *fakes[0].load.lock() = Some(9);
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [1, 1]);
    // Ours are among those that the engine tells of: it has 3, and may have 4 of 6.
    *fakes[0].load.lock() = None;
    let held = [(); 3].map(|()| {
        fakes[0].ends(Ending::Hangs(1));
        router.sample(home_a.clone())
    });
    let before = asked(&fakes);
    *fakes[0].load.lock() = Some(3);
    *fakes[1].load.lock() = Some(2);
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [before[0] + 1, before[1]]);
    drop(held);
    assert_eq!(router.load(), Some(5));
}

#[tokio::test]
async fn a_heavier_one_may_have_more() {
    let fakes = [(); 2].map(|()| Arc::new(Fake::default()));
    let replica = |name: &str, at: usize, weight| Replica {
        name: name.into(),
        backend: fakes[at].clone(),
        weight,
    };
    let router = Router::new(
        replica("a", 0, 3),
        vec![replica("b", 1, 1)],
        RoutingOptions::default(),
    );
    let home_b = prefers(&router, &["b", "a"]);
    let mut held = Vec::new();
    for _ in 0..40 {
        fakes.iter().for_each(|fake| fake.ends(Ending::Hangs(1)));
        held.push(router.sample(home_b.clone()));
    }
    // A quarter of 40, and a quarter more.
    assert_eq!(in_flight(&router), [27, 13]);
}

#[tokio::test]
async fn one_that_is_ill_is_tried_last_and_still_tried() {
    let (router, fakes) = fleet(["a", "b", "c"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b", "c"]);
    let ill = |at: usize, ill: bool| fakes[at].healthy.store(!ill, Ordering::SeqCst);
    ill(0, true);
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [0, 1, 0]);
    assert_eq!(order(&router, &home_a), ["b", "c", "a"]);
    ill(1, true);
    ill(2, true);
    assert!(!router.healthy());
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!(asked(&fakes), [1, 1, 0]);
    ill(0, false);
    assert!(router.healthy());
}

#[tokio::test]
async fn a_dropped_sample_is_cancelled_and_counts_no_longer() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_a = prefers(&router, &["a", "b"]);
    for ending in [Ending::Hangs(0), Ending::Hangs(2), Ending::Whole] {
        fakes[0].play(Play::of(ending).after_ms(1));
        let mut chunks = router.sample(home_a.clone());
        let wait = tokio::time::timeout(Duration::from_millis(50), chunks.next());
        _ = wait.await;
        assert_eq!((fakes[0].live(), in_flight(&router)), (1, vec![1, 0]));
        drop(chunks);
        assert_eq!((fakes[0].live(), in_flight(&router)), (0, vec![0, 0]));
    }
    // One that has ended counts no longer, though it is still held.
    let mut chunks = router.sample(home_a.clone());
    while let Some(Ok(_)) = chunks.next().await {}
    assert_eq!((fakes[0].live(), in_flight(&router)), (0, vec![0, 0]));
}

#[tokio::test]
async fn it_prefills_where_it_would_sample() {
    let (router, fakes) = fleet(["a", "b"], RoutingOptions::default());
    let home_b = prefers(&router, &["b", "a"]);
    router.prefill(home_b.clone()).await.unwrap();
    let prefills = || fakes.each_ref().map(|fake| fake.prefills());
    assert_eq!(prefills(), [0, 1]);
    fakes[1].healthy.store(false, Ordering::SeqCst);
    router.prefill(home_b).await.unwrap();
    assert_eq!((prefills(), in_flight(&router)), ([1, 1], vec![0, 0]));
}

#[tokio::test]
async fn it_can_do_what_each_of_them_can() {
    let fakes = [(); 2].map(|()| Arc::new(Fake::default()));
    let router = || router_of(["a", "b"].iter().zip(&fakes), RoutingOptions::default());
    let both = fakes[0].capabilities();
    assert_eq!(router().capabilities(), both);
    {
        let mut second = fakes[1].capabilities.lock();
        second.kind = "other";
        second.logprobs = false;
        second.reads_messages = true;
    }
    let mixed = Capabilities {
        kind: "router",
        logprobs: false,
        reads_messages: true,
        ..both
    };
    assert_eq!(router().capabilities(), mixed);
}

#[tokio::test]
async fn each_that_takes_tokens_must_keep_to_a_grammar() {
    let fakes = [(); 2].map(|()| Arc::new(Fake::default()));
    let check = || {
        let router = router_of(["a", "b"].iter().zip(&fakes), RoutingOptions::default());
        router.check(&"tenant".into(), &Arc::new(Grammar::Free))
    };
    assert_eq!(check(), Ok(()));
    fakes[1].keeps_to_grammars.store(false, Ordering::SeqCst);
    let no = Ungrammatical {
        schema: None,
        reason: "no".to_owned(),
    };
    assert_eq!(check(), Err(no));
    fakes[1].capabilities.lock().reads_messages = true;
    assert_eq!(check(), Ok(()));
}
