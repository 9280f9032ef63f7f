//! Lanes: what runs at once, what waits, and for what.

use crate::transcript::{House, Talk, after, call, held, new, output, user, with_tools};

fn open() -> (House, Talk) {
    let house = House::new();
    let talk = house.talk("acme");
    (house, talk)
}

#[tokio::test(start_paused = true)]
async fn lanes_run_at_once_and_creates_within_a_lane_in_order() {
    let (mut house, mut talk) = open();
    talk.create_on("a", "a1", new([user("one")]));
    talk.create_on("a", "a2", new([user("two")]));
    talk.create_on("b", "b1", new([user("three")]));
    let (a1, b1) = (house.sample().await, house.sample().await);
    house.idle().await;
    assert!(a1.text().contains("one") && b1.text().contains("three"));
    b1.says("B");
    talk.reads(
        r#"
        [a] a1 r1 created sim
        [b] b1 r2 created sim
        [b] b1 r2 added 0: msg1 Assistant "" …
        [b] b1 r2 text 0: "B"
        [b] b1 r2 item 0: msg1 Assistant "B"
        [b] b1 r2 done completed stop items [msg1] sampled 2 in 1
        "#,
    )
    .await;
    talk.silent().await;
    a1.says("A");
    let a2 = house.sample().await;
    assert!(a2.text().contains("two"));
    a2.says("C");
    talk.reads(
        r#"
        [a] a1 r1 added 0: msg2 Assistant "" …
        [a] a1 r1 text 0: "A"
        [a] a1 r1 item 0: msg2 Assistant "A"
        [a] a1 r1 done completed stop items [msg2] sampled 2 in 1
        [a] a2 r3 created sim
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_create_may_name_what_still_runs_on_its_lane_but_not_on_another() {
    let (mut house, mut talk) = open();
    talk.create_on("a", "a1", new([user("one")]));
    let first = house.sample().await;
    talk.reads("[a] a1 r1 created sim").await;
    talk.create_on("a", "a2", after("r1", [user("two")]));
    talk.create_on("b", "b1", after("r1", [user("three")]));
    talk.reads("[b] b1 error previous_response_not_found at create.previous_response_id, resend_full: no response `r1` is held").await;
    first.says("A");
    let second = house.sample().await;
    assert!(
        second
            .text()
            .contains("one<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\ntwo")
    );
    second.says("B");
    talk.ends("a2").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_pipelined_create_is_refused_when_what_it_names_comes_to_nothing() {
    let (mut house, mut talk) = open();
    talk.create("q", new([user("one")]));
    let first = house.sample().await;
    talk.reads("q r1 created sim").await;
    talk.create("q2", after("r1", [user("two")]));
    talk.cancel("stop", "r1");
    first.is_dropped().await;
    talk.reads(
        "
        stop r1 done cancelled items [] sampled 0 in 1
        q2 error previous_response_not_found at create.previous_response_id, resend_full: no response `r1` is held
        ",
    )
    .await;
    talk.create("q3", new([user("three")]));
    house.sample().await.says("C");
    talk.ends("q3").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn any_response_is_forked_on_any_lane() {
    let (mut house, mut talk) = open();
    talk.create("q1", new([user("one")]));
    house.sample().await.says("A");
    talk.ends("q1").await;
    talk.create("q2", after("r1", [user("two")]));
    house.sample().await.says("B");
    talk.ends("q2").await;
    // Not the latest one, twice, on two lanes at once.
    talk.create_on("x", "x", after("r1", [user("left")]));
    talk.create_on("y", "y", after("r1", [user("right")]));
    let (left, right) = (house.sample().await, house.sample().await);
    let past = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n";
    for (sample, text) in [(&left, "left"), (&right, "right")] {
        let new = format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(sample.text(), format!("{past}{new}"));
    }
    left.says("L");
    right.says("R");
    talk.ends("x").await;
    talk.ends("y").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_create_that_waits_is_cancelled_at_once_and_the_next_one_still_waits() {
    let (mut house, mut talk) = open();
    talk.create("first", new([user("one")]));
    talk.create("second", new([user("two")]));
    talk.create("third", new([user("three")]));
    let first = house.sample().await;
    talk.reads("first r1 created sim").await;
    talk.cancel_create("stop", "second");
    talk.reads("stop r2 done cancelled items [] sampled 0 in 0")
        .await;
    house.idle().await;
    first.says("A");
    let third = house.sample().await;
    assert!(third.text().contains("three"));
    third.says("C");
    talk.ends("third").await;
    talk.cancel_create("late", "second");
    talk.reads("late error response_not_open at cancel.create_request_id, never: no response of a create `second` waits, runs or is held").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn creates_that_were_cancelled_while_they_waited_free_their_place() {
    let mut house = House::new();
    house.limits.waiting_max = 1;
    let mut talk = house.talk("acme");
    talk.create("first", new([user("one")]));
    let first = house.sample().await;
    talk.reads("first r1 created sim").await;
    for round in 0..1_000 {
        talk.create("next", new([user("two")]));
        talk.cancel_create("stop", "next");
        let line = talk.line().await;
        assert_eq!(
            line,
            format!("stop r{} done cancelled items [] sampled 0 in 0", round + 2)
        );
    }
    talk.create("last", new([user("three")]));
    house.idle().await;
    first.says("A");
    house.sample().await.says("C");
    talk.ends("last").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn sixteen_sample_at_once_sixty_four_wait_and_the_next_is_refused() {
    let (mut house, mut talk) = open();
    // All in one burst: those that can sample at once do not count as waiting.
    for n in 0..80 {
        talk.create_on(
            &format!("lane{}", n % 32),
            &format!("q{n}"),
            new([user("Hi")]),
        );
    }
    talk.create("over", new([user("Hi")]));
    let mut samples = Vec::new();
    for _ in 0..16 {
        samples.push(house.sample().await);
    }
    house.idle().await;
    let mut line = talk.line().await;
    while line.contains("created") {
        line = talk.line().await;
    }
    assert_eq!(
        line,
        "over error queue_full, safe: at most 64 creates wait on a stream"
    );
    for ended in 0..80 {
        samples.remove(0).says("A");
        while !talk.line().await.contains(" done completed ") {}
        if ended < 64 {
            samples.push(house.sample().await);
        }
    }
    talk.create("more", new([user("Hi")]));
    house.sample().await.says("C");
    talk.ends("more").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_has_so_many_named_lanes_and_the_default_one_besides() {
    let (mut house, mut talk) = open();
    for n in 0..32 {
        talk.create_on(&format!("lane{n}"), &format!("q{n}"), new([user("Hi")]));
        house.sample().await.says("A");
        talk.ends(&format!("q{n}")).await;
    }
    talk.create_on("one.more", "over", new([user("Hi")]));
    talk.reads("[one.more] over error lane_limit_reached at lane, never: a stream has at most 32 named lanes").await;
    for lane in ["", "lane7"] {
        let again = format!("again{lane}");
        talk.create_on(lane, &again, new([user("Hi")]));
        house.sample().await.says("C");
        talk.ends(&again).await;
    }
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_may_not_be_is_refused_and_named_no_longer_than_it_may_be() {
    let (mut house, mut talk) = open();
    talk.create_on("a b", "space", new([user("Hi")]));
    talk.reads("[a b] space error invalid_lane at lane, never: a lane's name has at most 256 characters of [A-Za-z0-9_.-]").await;
    talk.create_on(&"é".repeat(10_000), "long", new([user("Hi")]));
    let shown = "é".repeat(128);
    talk.reads(&format!("[{shown}] long error invalid_lane at lane, never: a lane's name has at most 256 characters of [A-Za-z0-9_.-]")).await;
    talk.create_on(&"a".repeat(256), "q", held(with_tools(new([user("Hi")]))));
    house.sample().await.says(&call(1));
    talk.ends("q").await;
    // A command may name the lane of its response, and no other.
    let append = |talk: &Talk, lane: &str| {
        let command = hotloop::proto::Append {
            response_id: talk.id("r1"),
            input: vec![output(&talk.id("c1"), "ok")],
        };
        let command = hotloop::proto::connect_request::Command::Append(command);
        talk.send(lane, "out", command);
    };
    append(&talk, "other");
    let line = talk.line().await;
    assert!(
        line.starts_with(
            "[other] out r1 error invalid_lane at lane, never: the response runs on lane `aaaa"
        ),
        "{line}"
    );
    talk.expects_answer("out");
    append(&talk, &"a".repeat(256));
    house.sample().await.says("Done.");
    let line = talk.line().await;
    assert!(
        line.ends_with("out r1 appended [fco1] applied 15"),
        "{line}"
    );
    talk.bye().await;
}
