//! Ends: clients that vanish, do not read or have said all, and servers that close.

use std::time::Duration;

use hotloop::{
    event::Status,
    proto::{Create, OnDisconnect},
    session::ParkedLimits,
};

use crate::transcript::{
    House, Plan, Talk, after, call, held, new, output, still, user, with_tools,
};

fn open() -> (House, Talk) {
    let house = House::new();
    let talk = house.talk("acme");
    (house, talk)
}

#[tokio::test(start_paused = true)]
async fn what_a_client_that_vanishes_had_sampled_is_found_by_its_tenant_alone() {
    let (mut house, mut talk) = open();
    talk.create("q", new([user("Hi")]));
    let sample = house.sample().await;
    sample.writes("Well");
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: msg1 Assistant "" …
        q r1 text 0: "Well"
        "#,
    )
    .await;
    let id = talk.id("r1");
    talk.vanishes().await;
    sample.is_dropped().await;
    let found = house.find("acme", &id).unwrap();
    assert_eq!(
        found.status,
        Status::Incomplete(hotloop::event::IncompleteReason::Interrupted)
    );

    let mut other = house.talk("other");
    other.knows(&id);
    other.create("theirs", after("r1", [user("And?")]));
    other.reads("theirs error previous_response_not_found at create.previous_response_id, resend_full: no response `r1` is held").await;
    other.bye().await;

    let mut back = house.talk("acme");
    back.knows(&id);
    back.create("again", after("r1", [user("Go on")]));
    let sample = house.sample().await;
    assert!(sample.text().ends_with("<|im_start|>assistant\nWell<|im_end|>\n<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\n"));
    sample.says("Yes.");
    back.ends("again").await;
    back.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_response_that_outlives_its_client_is_finished_and_found() {
    let (mut house, mut talk) = open();
    let create = Create {
        on_disconnect: OnDisconnect::Continue.into(),
        ..held(with_tools(new([user("Hi")])))
    };
    talk.create("q", create);
    let sample = house.sample().await;
    sample.writes("Well");
    talk.reads("q r1 created sim").await;
    let id = talk.id("r1");
    let run = talk.loses_its_connection();
    still().await;
    assert!(sample.goes_on());
    sample.says(&format!(" then.\n{}", call(1)));
    run.await.unwrap();
    let found = house.find("acme", &id).unwrap();
    assert_eq!(found.status, Status::Completed);
    assert_eq!(found.output.len(), 2);
    assert_eq!(found.open_calls.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_said_all_gets_the_rest() {
    let (mut house, mut talk) = open();
    talk.create("held", held(with_tools(new([user("Go")]))));
    house.sample().await.says(&call(1));
    talk.ends("held").await;
    talk.create_on("a", "runs", new([user("Hi")]));
    talk.create_on("a", "waits", new([user("Ho")]));
    let runs = house.sample().await;
    talk.reads("[a] runs r2 created sim").await;
    talk.closes();
    talk.reads("held r1 done completed tool_calls open [c1] items [fc1] sampled 21 in 1")
        .await;
    runs.says("A");
    talk.ends("runs").await;
    house.sample().await.says("B");
    let end = talk.ends("waits").await;
    assert!(end.starts_with("[a] waits r3 done completed stop"), "{end}");
    talk.reads("the end").await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_not_sampled_for_and_at_last_cut_off() {
    let mut house = House::new();
    house.limits.events_queued_max = 4;
    let mut slow = house.talk("acme");
    let mut quick = house.talk("acme");
    slow.create("q", new([user("Hi")]));
    let sample = house.sample().await;
    slow.reads("q r1 created sim").await;
    for _ in 0..20 {
        sample.writes("word ");
    }
    still().await;
    // One chunk for each place in the queue, and no more.
    assert_eq!(sample.taken(), 4);
    quick.create("other", new([user("Hi")]));
    house.sample().await.says("Hello.");
    let end = quick.ends("other").await;
    assert!(end.contains("done completed"), "{end}");
    quick.bye().await;

    tokio::time::sleep(Duration::from_secs(29)).await;
    assert!(sample.goes_on());
    tokio::time::sleep(Duration::from_secs(2)).await;
    sample.is_dropped().await;
    slow.reads(
        r#"
        q r1 added 0: msg1 Assistant "" …
        q r1 text 0: "word word word word "
        SlowClient
        the end
        "#,
    )
    .await;
    let found = house.find("acme", &slow.id("r1")).unwrap();
    assert_eq!(
        found.status,
        Status::Incomplete(hotloop::event::IncompleteReason::Interrupted)
    );
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_again_in_time_gets_everything() {
    let mut house = House::new();
    house.limits.events_queued_max = 2;
    let mut talk = house.talk("acme");
    talk.create("q", new([user("Hi")]));
    let sample = house.sample().await;
    for _ in 0..10 {
        sample.writes("ab ");
    }
    sample.says("end");
    still().await;
    assert!(sample.taken() < 10);
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: msg1 Assistant "" …
        "#,
    )
    .await;
    let end = talk.ends("q").await;
    assert!(end.contains("done completed stop items [msg1]"), "{end}");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn deltas_that_queued_are_merged_item_by_item() {
    let (mut house, mut talk) = open();
    talk.create_on("a", "q", new([user("Hi")]));
    let sample = house.sample().await;
    talk.reads("[a] q r1 created sim").await;
    sample
        .writes("<think>\none")
        .writes(" two")
        .writes(" three\n</think>\n\nfour");
    sample.writes(" five").writes(" six");
    still().await;
    talk.reads(
        r#"
        [a] q r1 added 0: rs1 thinks "" …
        [a] q r1 thought 0: "one two three"
        [a] q r1 item 0: rs1 thinks "one two three"
        [a] q r1 added 1: msg1 Assistant "" …
        [a] q r1 text 1: "four five six"
        "#,
    )
    .await;
    sample.says(".");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_bad_commands_waits_outside_while_its_answers_are_not_read() {
    let (mut house, mut talk) = open();
    for n in 0..1_000 {
        talk.done(&format!("bad{n}"), "resp_unknown");
    }
    still().await;
    // As many as the queue of events and that of answers hold, and no more.
    assert_eq!(talk.unread(), 1_000 - 64 - 64);
    for n in 0..1_000 {
        talk.reads(&format!("bad{n} resp_unknown error response_not_open at done.response_id, never: the response `resp_unknown` neither runs nor is held")).await;
    }
    talk.create("q", new([user("Hi")]));
    house.sample().await.says("Hello.");
    talk.ends("q").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_at_its_age_lets_what_runs_finish_and_takes_nothing_new() {
    let (mut house, mut talk) = open();
    tokio::time::sleep(Duration::from_secs(3_569)).await;
    talk.create("q", held(with_tools(new([user("Hi")]))));
    let sample = house.sample().await;
    talk.reads("q r1 created sim").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    talk.reads("go_away stream_age_limit_reached in 30000 ms")
        .await;
    talk.create("new", new([user("Hi")]));
    let line = talk.line().await;
    assert!(line.starts_with("new error draining, safe in "), "{line}");
    sample.says(&call(1));
    talk.ends("q").await;
    talk.append("out", "r1", vec![output("c1", "ok")]);
    house.sample().await.says("Done.");
    let end = talk.ends("q").await;
    assert!(end.contains("done completed stop"), "{end}");
    talk.reads("the end").await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_interrupts_what_does_not_finish_and_answers_what_waits() {
    let (mut house, mut talk) = open();
    talk.create_on("a", "runs", new([user("Hi")]));
    talk.create_on("a", "waits", new([user("Ho")]));
    talk.create_on("b", "held", held(with_tools(new([user("Go")]))));
    let sample = house.sample().await;
    house.sample().await.says(&call(1));
    talk.ends("held").await;
    talk.drain(Duration::from_secs(10));
    talk.reads("go_away draining in 9000 ms").await;
    sample.writes("Well");
    talk.reads(
        r#"
        [a] runs r1 added 0: msg1 Assistant "" …
        [a] runs r1 text 0: "Well"
        "#,
    )
    .await;
    talk.silent().await;
    tokio::time::sleep(Duration::from_secs(9)).await;
    sample.is_dropped().await;
    let mut read = Vec::new();
    while read.last().is_none_or(|line| line != "the end") {
        read.push(talk.line().await);
    }
    read.sort();
    assert_eq!(
        read,
        [
            r#"[a] runs r1 done incomplete (interrupted) items [msg1] sampled 2 in 1"#,
            r#"[a] runs r1 item 0: msg1 Assistant "Well" INCOMPLETE"#,
            "[a] waits error draining, safe: the stream closed before the turn of this create came",
            "[b] held r2 done incomplete (interrupted) tool_calls open [c1] items [fc1] sampled 21 in 1",
            "the end",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_parked_leaves_after_its_time() {
    let mut house = House::built(Plan {
        parked: ParkedLimits {
            bytes_max: 1 << 20,
            tenant_bytes_max: 1 << 20,
            time_max: Duration::ZERO,
        },
        ..Plan::default()
    });
    let id = parked(&mut house, "Hi").await;
    assert!(house.find("acme", &id).is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_parked_leaves_for_what_is_newer_when_a_tenant_has_filled_its_share() {
    let mut house = House::built(Plan {
        parked: ParkedLimits {
            bytes_max: 1 << 20,
            tenant_bytes_max: 80_000,
            time_max: Duration::from_secs(600),
        },
        ..Plan::default()
    });
    let text = "word ".repeat(2_000);
    let first = parked(&mut house, &text).await;
    assert!(house.find("acme", &first).is_some());
    let mut ids = vec![first];
    for _ in 0..4 {
        ids.push(parked(&mut house, &text).await);
    }
    let found: Vec<bool> = ids
        .iter()
        .map(|id| house.find("acme", id).is_some())
        .collect();
    assert_eq!((found[0], found[4]), (false, true), "{found:?}");
    // What is over the share by itself is not kept at all.
    let large = parked(&mut house, &"word ".repeat(9_000)).await;
    assert!(house.find("acme", &large).is_none());
    assert!(house.find("acme", &ids[4]).is_some());
}

/// The id of a response whose stream has ended.
async fn parked(house: &mut House, text: &str) -> String {
    let mut talk = house.talk("acme");
    talk.create("q", new([user(text)]));
    house.sample().await.says("Hello.");
    talk.ends("q").await;
    let id = talk.id("r1");
    talk.bye().await;
    id
}
