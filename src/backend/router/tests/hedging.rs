//! A second replica beside one that is slow to begin.

use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::*;
use fake::{Ending, Play};

fn options() -> RoutingOptions {
    RoutingOptions {
        hedge_ms: 50,
        ..RoutingOptions::default()
    }
}

fn slow(millis: u64) -> Play {
    Play::of(Ending::Whole).after_ms(millis)
}

#[tokio::test(start_paused = true)]
async fn the_first_to_answer_is_taken_and_the_other_cancelled() {
    // How long each takes, whom they hear, and when.
    for (a, b, asked_of, at) in [
        (40, 0, [1, 0], 40),
        (60, 20, [1, 1], 60),
        (90, 20, [1, 1], 70),
    ] {
        let (router, fakes) = fleet(["a", "b"], options());
        let home_a = prefers(&router, &["a", "b"]);
        fakes[0].play(slow(a));
        fakes[1].play(slow(b));
        let start = Instant::now();
        let mut chunks = router.sample(home_a.clone());
        chunks.next().await.unwrap().unwrap();
        assert_eq!((start.elapsed().as_millis(), asked(&fakes)), (at, asked_of));
        let live = fakes.each_ref().map(|fake| fake.live());
        assert_eq!(
            (live, live.to_vec()),
            (if at == 70 { [0, 1] } else { [1, 0] }, in_flight(&router))
        );
        drop(chunks);
        assert_eq!(in_flight(&router), [0, 0]);
        // Who is slow has not failed.
        assert!(router.replicas().iter().all(|it| it.failures == 0));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_heard_is_one_sample() {
    for (a, b) in [(0, 0), (60, 0), (60, 20), (500, 0)] {
        let (router, fakes) = fleet(["a", "b"], options());
        let home_a = prefers(&router, &["a", "b"]);
        fakes[0].play(Play {
            cached_first: true,
            ..slow(a)
        });
        fakes[1].play(slow(b));
        assert_eq!(
            hear(router.sample(home_a.clone())).await,
            Heard::whole(&home_a)
        );
        assert_eq!(in_flight(&router), [0, 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn there_is_at_most_one() {
    let (router, fakes) = fleet(["a", "b", "c"], options());
    let home_a = prefers(&router, &["a", "b", "c"]);
    fakes[0].play(slow(10_000));
    fakes[1].play(slow(9_000));
    let start = Instant::now();
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!(
        (start.elapsed().as_millis(), asked(&fakes)),
        (9_050, [1, 1, 0])
    );
    // Nor a second one beside the first, once that is alone.
    fakes[0].play(Play::of(Ending::Fails(0, failed("dead"))).after_ms(60));
    fakes[1].play(slow(500));
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [2, 2, 0]);
    // One that is tried in place of another may have one beside it.
    fakes[0].fails(failed("dead"));
    fakes[1].play(slow(500));
    hear(router.sample(home_a.clone())).await;
    assert_eq!(asked(&fakes), [3, 3, 1]);
}

#[tokio::test(start_paused = true)]
async fn either_may_fail_and_the_other_goes_on() {
    let errors = || [failed("dead"), unavailable(None), unavailable(Some(10))];
    for error in errors().into_iter().chain([refused()]) {
        let (router, fakes) = fleet(["a", "b"], options());
        let home_a = prefers(&router, &["a", "b"]);
        fakes[0].play(slow(200));
        fakes[1].fails(error);
        assert_eq!(
            hear(router.sample(home_a.clone())).await,
            Heard::whole(&home_a)
        );
    }
    for error in errors() {
        let (router, fakes) = fleet(["a", "b"], options());
        let home_a = prefers(&router, &["a", "b"]);
        fakes[0].play(Play::of(Ending::Fails(0, error)).after_ms(100));
        fakes[1].play(slow(200));
        assert_eq!(
            hear(router.sample(home_a.clone())).await,
            Heard::whole(&home_a)
        );
        assert_eq!((asked(&fakes), in_flight(&router)), ([1, 1], vec![0, 0]));
    }
    // Both: the next one is tried.
    let (router, fakes) = fleet(["a", "b", "c"], options());
    let home_a = prefers(&router, &["a", "b", "c"]);
    fakes[0].play(Play::of(Ending::Fails(0, failed("dead"))).after_ms(100));
    fakes[1].play(Play::of(Ending::Fails(0, failed("dead"))).after_ms(100));
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!(asked(&fakes), [1, 1, 1]);
    // The first one refuses: that is final.
    let (router, fakes) = fleet(["a", "b"], options());
    let home_a = prefers(&router, &["a", "b"]);
    fakes[0].play(Play::of(Ending::Fails(0, refused())).after_ms(100));
    fakes[1].play(slow(200));
    assert_eq!(hear(router.sample(home_a)).await.end, Err(refused()));
    assert_eq!(in_flight(&router), [0, 0]);
}

#[tokio::test(start_paused = true)]
async fn one_that_won_and_fails_is_continued_elsewhere() {
    let (router, fakes) = fleet(["a", "b", "c"], options());
    let home_a = prefers(&router, &["a", "b", "c"]);
    fakes[0].play(slow(200));
    fakes[1].ends(Ending::Fails(1, failed("dead")));
    assert_eq!(
        hear(router.sample(home_a.clone())).await,
        Heard::whole(&home_a)
    );
    assert_eq!(asked(&fakes), [1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn only_one_that_is_well_and_has_room_is_given_a_second_one() {
    let slow_one = async |router: &Router, prompt: &Prompt, fakes: &[Arc<Fake>; 2]| {
        let before = asked(fakes);
        fakes[0].play(slow(200));
        assert_eq!(
            hear(router.sample(prompt.clone())).await,
            Heard::whole(prompt)
        );
        let after = asked(fakes);
        [after[0] - before[0], after[1] - before[1]]
    };
    let (router, fakes) = fleet(["a", "b"], options());
    let home_a = prefers(&router, &["a", "b"]);
    let home_b = prefers(&router, &["b", "a"]);
    assert_eq!(slow_one(&router, &home_a, &fakes).await, [1, 1]);
    fakes[1].healthy.store(false, Ordering::SeqCst);
    assert_eq!(slow_one(&router, &home_a, &fakes).await, [1, 0]);
    fakes[1].healthy.store(true, Ordering::SeqCst);
    *fakes[1].load.lock() = Some(5);
    assert_eq!(slow_one(&router, &home_a, &fakes).await, [1, 0]);
    *fakes[1].load.lock() = None;
    for _ in 0..3 {
        fakes[1].fails(failed("dead"));
        hear(router.sample(home_b.clone())).await;
    }
    assert_eq!(breakers(&router)[1], BreakerState::Open);
    assert_eq!(slow_one(&router, &home_a, &fakes).await, [1, 0]);
    sleep_ms(750).await;
    assert_eq!(breakers(&router)[1], BreakerState::HalfOpen);
    assert_eq!(slow_one(&router, &home_a, &fakes).await, [1, 0]);
    hear(router.sample(home_b)).await;
    assert_eq!(slow_one(&router, &home_a, &fakes).await, [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn dropping_it_cancels_both() {
    let (router, fakes) = fleet(["a", "b"], options());
    let home_a = prefers(&router, &["a", "b"]);
    fakes[0].play(slow(1_000));
    fakes[1].play(slow(1_000));
    let mut chunks = router.sample(home_a);
    let wait = tokio::time::timeout(Duration::from_millis(60), chunks.next());
    assert!(wait.await.is_err());
    assert_eq!((in_flight(&router), asked(&fakes)), (vec![1, 1], [1, 1]));
    drop(chunks);
    let live = fakes.each_ref().map(|fake| fake.live());
    assert_eq!((in_flight(&router), live), (vec![0, 0], [0, 0]));
}
