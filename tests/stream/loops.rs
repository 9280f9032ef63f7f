//! Loops: calls and their outputs, held or chained, and what a client may say meanwhile.

use std::time::Duration;

use hotloop::budget::{BudgetOptions, Per};

use crate::transcript::{
    House, Plan, Talk, after, call, held, new, output, still, system, user, with_tools,
};

fn open() -> (House, Talk) {
    let house = House::new();
    let talk = house.talk("acme");
    (house, talk)
}

/// A held response whose first sample has called `step` this many times, and waits.
async fn awaiting(house: &mut House, talk: &mut Talk, calls: u32) {
    talk.create("q", held(with_tools(new([user("Go")]))));
    let calls: Vec<String> = (1..=calls).map(call).collect();
    house.sample().await.says(&calls.join("\n"));
    let end = talk.ends("q").await;
    assert!(end.starts_with("q r1 done awaiting tool_calls"), "{end}");
}

#[tokio::test(start_paused = true)]
async fn a_held_loop() {
    let (mut house, mut talk) = open();
    talk.create("q", held(with_tools(new([user("Go")]))));
    house.sample().await.says(&call(1));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 1}
        q r1 item 0: fc1 c1 step({"n": 1})
        q r1 done awaiting tool_calls open [c1] items [fc1] sampled 21 in 1
        "#,
    )
    .await;
    house.idle().await;
    talk.append("out", "r1", vec![output("c1", "ok")]);
    let sample = house.sample().await;
    talk.reads("out r1 appended [fco1] applied 15").await;
    assert!(sample.text().ends_with(&format!(
        "assistant\n{}<|im_end|>\n<|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        call(1)
    )));
    sample.says("Done.");
    talk.reads(
        r#"
        q r1 added 1: msg1 Assistant "" …
        q r1 text 1: "Done."
        q r1 item 1: msg1 Assistant "Done."
        q r1 done completed stop items [fc1 msg1] sampled 24 in 2
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_chained_loop_has_the_prompt_of_a_held_one() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    house.sample().await.says(&call(1));
    talk.ends("q").await;
    talk.create("q2", after("r1", [output("c1", "ok")]));
    let chained = house.sample().await;
    chained.says("Done.");
    talk.reads(
        r#"
        q2 r2 created sim after r1
        q2 r2 added 0: msg1 Assistant "" …
        q2 r2 text 0: "Done."
        q2 r2 item 0: msg1 Assistant "Done."
        q2 r2 done completed stop items [msg1] sampled 3 in 1
        "#,
    )
    .await;
    talk.bye().await;

    let mut talk = house.talk("acme");
    awaiting(&mut house, &mut talk, 1).await;
    talk.append("out", "r1", vec![output("c1", "ok")]);
    let held = house.sample().await;
    assert_eq!(
        held.prompt.tokens.tokens_from(0),
        chained.prompt.tokens.tokens_from(0)
    );
    held.says("Done.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn early_outputs_in_any_order_and_sampling_resumes_when_all_are_there() {
    let (mut house, mut talk) = open();
    talk.create("q", held(with_tools(new([user("Go")]))));
    let sample = house.sample().await;
    sample.writes(&format!("{}\n{}", call(1), call(2)));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 1}
        q r1 item 0: fc1 c1 step({"n": 1})
        q r1 added 1: fc2 c2 step() …
        q r1 arguments 1: {"n": 2}
        q r1 item 1: fc2 c2 step({"n": 2})
        "#,
    )
    .await;
    talk.append("late", "r1", vec![output("c2", "two")]);
    talk.reads("late r1 appended [fco1] queued 16").await;
    sample.says(&format!("\n{}", call(3)));
    talk.reads(
        r#"
        q r1 added 2: fc3 c3 step() …
        q r1 arguments 2: {"n": 3}
        q r1 item 2: fc3 c3 step({"n": 3})
        q r1 done awaiting tool_calls open [c1 c3] items [fc1 fc2 fc3] sampled 63 in 1
        "#,
    )
    .await;
    talk.append("more", "r1", vec![output("c3", "three")]);
    talk.reads("more r1 appended [fco2] applied 22").await;
    house.idle().await;
    talk.append("last", "r1", vec![output("c1", "one")]);
    talk.reads("last r1 appended [fco3] applied 28").await;
    // In the order of the calls: the template gives outputs no ids.
    let sample = house.sample().await;
    let responses = ["one", "two", "three"]
        .map(|text| format!("\n<tool_response>\n{text}\n</tool_response>"))
        .concat();
    assert!(
        sample.text().ends_with(&format!(
            "<|im_end|>\n<|im_start|>user{responses}<|im_end|>\n<|im_start|>assistant\n"
        )),
        "{}",
        sample.text()
    );
    sample.says("Done.");
    let end = talk.ends("q").await;
    assert!(
        end.starts_with("q r1 done completed stop items [fc1 fc2 fc3 msg1]"),
        "{end}"
    );
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn with_all_outputs_early_the_response_never_waits() {
    let (mut house, mut talk) = open();
    talk.create("q", held(with_tools(new([user("Go")]))));
    let sample = house.sample().await;
    sample.writes(&call(1));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 1}
        q r1 item 0: fc1 c1 step({"n": 1})
        "#,
    )
    .await;
    talk.append("out", "r1", vec![output("c1", "ok")]);
    talk.reads("out r1 appended [fco1] queued 16").await;
    sample.says("");
    house.sample().await.says("Done.");
    talk.reads(
        r#"
        q r1 added 1: msg1 Assistant "" …
        q r1 text 1: "Done."
        q r1 item 1: msg1 Assistant "Done."
        q r1 done completed stop items [fc1 msg1] sampled 24 in 2
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_appended_is_named_in_the_order_sent() {
    let (mut house, mut talk) = open();
    awaiting(&mut house, &mut talk, 2).await;
    let input = vec![user("Hurry"), output("c2", "two"), output("c1", "one")];
    talk.append("a", "r1", input);
    talk.reads("a r1 appended [msg1 fco1 fco2] applied 29")
        .await;
    let sample = house.sample().await;
    let text = sample.text();
    let at = |what: &str| text.rfind(what).unwrap();
    assert!(at("one") < at("two") && at("two") < at("Hurry"), "{text}");
    sample.says("Yes.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn steering_takes_effect_after_the_current_item() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    let sample = house.sample().await;
    sample.writes("<think>\nhm");
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: rs1 thinks "" …
        q r1 thought 0: "hm"
        "#,
    )
    .await;
    talk.append("steer", "r1", vec![user("Stop thinking")]);
    talk.reads("steer r1 appended [msg1] queued 12").await;
    sample.writes(" hm\n</think>\n\nSo").writes(" be it");
    let second = house.sample().await;
    sample.is_dropped().await;
    assert!(
        second.text().ends_with("<|im_start|>assistant\n<think>\nhm hm\n</think>\n\n<|im_end|>\n<|im_start|>user\nStop thinking<|im_end|>\n<|im_start|>assistant\n"),
        "{}",
        second.text()
    );
    second.says("Fine.");
    talk.reads(
        r#"
        q r1 thought 0: " hm"
        q r1 item 0: rs1 thinks "hm hm"
        q r1 added 1: msg2 Assistant "" …
        q r1 text 1: "Fine."
        q r1 item 1: msg2 Assistant "Fine."
        q r1 done completed stop items [rs1 msg2] sampled 14 in 2
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn steering_with_open_calls_waits_for_their_outputs() {
    let (mut house, mut talk) = open();
    talk.create("q", held(with_tools(new([user("Go")]))));
    let sample = house.sample().await;
    sample.writes(&call(1));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 1}
        q r1 item 0: fc1 c1 step({"n": 1})
        "#,
    )
    .await;
    talk.append("steer", "r1", vec![user("Hurry")]);
    talk.reads("steer r1 appended [msg1] queued 14").await;
    sample.says(&format!("\n{}", call(2)));
    talk.reads(
        r#"
        q r1 added 1: fc2 c2 step() …
        q r1 arguments 1: {"n": 2}
        q r1 item 1: fc2 c2 step({"n": 2})
        q r1 done awaiting tool_calls open [c1 c2] items [fc1 fc2] sampled 42 in 1
        "#,
    )
    .await;
    talk.append("out", "r1", vec![output("c1", "one"), output("c2", "two")]);
    let sample = house.sample().await;
    assert!(
        sample.text().ends_with("two\n</tool_response><|im_end|>\n<|im_start|>user\nHurry<|im_end|>\n<|im_start|>assistant\n"),
        "{}",
        sample.text()
    );
    sample.says("Yes.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn steering_that_comes_too_late_stands_behind_the_outputs_of_the_next_create() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    let sample = house.sample().await;
    sample.writes(&call(1));
    still().await;
    talk.reads("q r1 created sim").await;
    talk.append("steer", "r1", vec![user("Hurry")]);
    still().await;
    sample.says("");
    let end = talk.ends("q").await;
    assert!(
        end.starts_with("q r1 done completed tool_calls open [c1]"),
        "{end}"
    );
    talk.create("q2", after("r1", [output("c1", "ok"), user("Now")]));
    let sample = house.sample().await;
    assert!(
        sample.text().ends_with("ok\n</tool_response><|im_end|>\n<|im_start|>user\nHurry<|im_end|>\n<|im_start|>user\nNow<|im_end|>\n<|im_start|>assistant\n"),
        "{}",
        sample.text()
    );
    sample.says("Yes.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn done_finalises_what_is_held() {
    let (mut house, mut talk) = open();
    awaiting(&mut house, &mut talk, 1).await;
    talk.done("enough", "r1");
    talk.reads("q r1 done completed tool_calls open [c1] items [fc1] sampled 21 in 1")
        .await;
    talk.create("q2", after("r1", [output("c1", "ok")]));
    house.sample().await.says("Done.");
    talk.ends("q2").await;
    talk.append("late", "r1", vec![user("So?")]);
    talk.reads("late r1 error response_not_open at append.response_id, never: the response `r1` neither runs nor is held").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn done_while_sampling_ends_with_the_sample_and_keeps_what_was_appended() {
    let (mut house, mut talk) = open();
    talk.create("q", held(with_tools(new([user("Go")]))));
    let sample = house.sample().await;
    sample.writes(&call(1));
    still().await;
    talk.reads("q r1 created sim").await;
    talk.reads(
        r#"
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 1}
        q r1 item 0: fc1 c1 step({"n": 1})
        "#,
    )
    .await;
    talk.append("out", "r1", vec![output("c1", "ok")]);
    talk.done("enough", "r1");
    talk.reads("out r1 appended [fco1] queued 16").await;
    talk.silent().await;
    sample.says("");
    talk.reads("q r1 done completed tool_calls items [fc1] sampled 21 in 1")
        .await;
    house.idle().await;
    talk.create("q2", after("r1", []));
    let sample = house.sample().await;
    assert!(
        sample
            .text()
            .ends_with("ok\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    );
    sample.says("Done.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_sampling_nothing_is_kept() {
    let (mut house, mut talk) = open();
    talk.create("q", new([user("Hi")]));
    house.sample().await.says("Hello.");
    talk.ends("q").await;
    talk.create("q2", after("r1", [user("And?")]));
    let sample = house.sample().await;
    sample.writes("Well");
    talk.reads(
        r#"
        q2 r2 created sim after r1
        q2 r2 added 0: msg2 Assistant "" …
        q2 r2 text 0: "Well"
        "#,
    )
    .await;
    talk.cancel("stop", "r2");
    talk.reads("stop r2 done cancelled items [] sampled 2 in 1")
        .await;
    sample.is_dropped().await;
    talk.create("q3", after("r2", [user("Hm?")]));
    talk.reads("q3 error previous_response_not_found at create.previous_response_id, resend_full: no response `r2` is held").await;
    talk.cancel("again", "r2");
    talk.reads("again r2 error response_not_open at cancel.response_id, never: the response `r2` neither runs nor is held").await;
    talk.still_works(&mut house, "r1").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_awaiting() {
    let (mut house, mut talk) = open();
    awaiting(&mut house, &mut talk, 1).await;
    talk.cancel("stop", "r1");
    talk.reads("stop r1 done cancelled tool_calls open [c1] items [fc1] sampled 21 in 1")
        .await;
    talk.append("late", "r1", vec![output("c1", "ok")]);
    talk.reads("late r1 error response_not_open at append.response_id, never: the response `r1` neither runs nor is held").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_lasts_too_long_ends_and_can_be_continued() {
    let (mut house, mut talk) = open();
    awaiting(&mut house, &mut talk, 2).await;
    talk.append("one", "r1", vec![output("c1", "ok")]);
    talk.reads("one r1 appended [fco1] applied 15").await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    talk.reads(
        "q r1 done incomplete (interrupted) tool_calls open [c2] items [fc1 fc2] sampled 42 in 1",
    )
    .await;
    talk.create("q2", after("r1", [output("c2", "ok2")]));
    let sample = house.sample().await;
    let text = sample.text();
    assert!(text.ends_with("<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>user\n<tool_response>\nok2\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
        || text.ends_with("<tool_response>\nok\n</tool_response>\n<tool_response>\nok2\n</tool_response><|im_end|>\n<|im_start|>assistant\n"), "{text}");
    sample.says("Done.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn idle_held_responses_occupy_no_slot() {
    let mut house = House::new();
    house.limits.sampling_max = 1;
    let mut talk = house.talk("acme");
    awaiting(&mut house, &mut talk, 1).await;
    assert_eq!(talk.slots_free(), 1);
    talk.create_on("b", "b", new([user("Hi")]));
    let other = house.sample().await;
    assert_eq!(talk.slots_free(), 0);
    // Its outputs are there, but it has to wait for a slot, in which it still takes commands.
    talk.append("out", "r1", vec![output("c1", "ok")]);
    talk.append("steer", "r1", vec![user("Hurry")]);
    talk.reads(
        "
        [b] b r2 created sim
        out r1 appended [fco1] applied 15
        steer r1 appended [msg1] applied 23
        ",
    )
    .await;
    house.idle().await;
    other.says("Hi.");
    talk.ends("b").await;
    let sample = house.sample().await;
    assert!(
        sample
            .text()
            .ends_with("<|im_start|>user\nHurry<|im_end|>\n<|im_start|>assistant\n")
    );
    sample.says("Done.");
    talk.ends("q").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn early_outputs_are_prefilled_and_a_slow_prefill_keeps_nothing_waiting() {
    let mut house = House::built(Plan {
        prefill: true,
        ..Plan::default()
    });
    let mut talk = house.talk("acme");
    awaiting(&mut house, &mut talk, 2).await;
    talk.append("one", "r1", vec![output("c1", "one")]);
    let prefill = house.prefill().await;
    assert!(prefill.text().contains("<tool_response>\none\n"));
    talk.append("two", "r1", vec![output("c2", "two")]);
    house.sample().await.says("Done.");
    assert!(prefill.done.is_closed());
    let end = talk.ends("q").await;
    assert!(end.starts_with("q r1 done completed stop"), "{end}");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn an_append_that_can_never_fit_is_refused_and_leaves_nothing() {
    let mut house = House::built(Plan {
        context_length: 200,
        ..Plan::default()
    });
    let mut talk = house.talk("acme");
    awaiting(&mut house, &mut talk, 1).await;
    talk.append("long", "r1", vec![output("c1", &"word ".repeat(200))]);
    let refused = talk.line().await;
    assert!(
        refused.starts_with(
            "long r1 error context_length_exceeded at append.input, never: the prompt has "
        ),
        "{refused}"
    );
    assert!(
        refused.contains(" more than leave room to sample in the model's 200"),
        "{refused}"
    );
    talk.append("short", "r1", vec![output("c1", "ok")]);
    let sample = house.sample().await;
    assert!(!sample.text().contains("word"));
    sample.writes("So");
    still().await;
    // The same while it samples.
    talk.append("steer", "r1", vec![user(&"word ".repeat(200))]);
    still().await;
    sample.says(" done.");
    let mut read = Vec::new();
    while !read
        .last()
        .is_some_and(|line: &String| line.starts_with("q r1 done"))
    {
        read.push(talk.line().await);
    }
    assert!(
        read.iter()
            .any(|line| line.starts_with("steer r1 error context_length_exceeded at append.input")),
        "{read:#?}"
    );
    assert!(read.last().unwrap().contains("completed stop"), "{read:#?}");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn an_append_that_the_template_refuses_leaves_nothing() {
    let (mut house, mut talk) = open();
    awaiting(&mut house, &mut talk, 2).await;
    let input = vec![output("c1", "ok"), system("Be quick.")];
    talk.append("wrong", "r1", input);
    let refused = talk.line().await;
    assert!(refused.starts_with("wrong r1 error invalid_request at append.input, never: the model's template refuses this conversation"), "{refused}");
    talk.append(
        "right",
        "r1",
        vec![output("c1", "one"), output("c2", "two")],
    );
    talk.reads("right r1 appended [fco1 fco2] applied 21").await;
    let sample = house.sample().await;
    sample.writes("So");
    still().await;
    talk.reads(
        r#"
        q r1 added 2: msg1 Assistant "" …
        q r1 text 2: "So"
        "#,
    )
    .await;
    talk.append("wrong2", "r1", vec![system("Be quick.")]);
    let refused = talk.line().await;
    assert!(
        refused.starts_with("wrong2 r1 error invalid_request at append.input"),
        "{refused}"
    );
    sample.says(".");
    let end = talk.ends("q").await;
    assert!(end.starts_with("q r1 done completed stop"), "{end}");
    talk.bye().await;
}

/// A budget of calls counts those that were made, also where they are answered before the sample has ended.
#[tokio::test(start_paused = true)]
async fn a_call_counts_however_early_it_is_answered() {
    let mut house = House::new();
    let calls = BudgetOptions {
        name: "calls".into(),
        per: Per::Tenant,
        tenants: Vec::new(),
        models: Vec::new(),
        window_secs: 0,
        input_tokens_max: 0,
        output_tokens_max: 0,
        calls_max: 2,
        sample_secs_max: 0,
        cost_max: 0.0,
    };
    house.budgets.replace(&[calls], &[]);
    let mut talk = house.talk("acme");
    talk.create("q", held(with_tools(new([user("Go")]))));
    let sample = house.sample().await;
    sample.writes(&format!("{}\n{}", call(1), call(2)));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 1}
        q r1 item 0: fc1 c1 step({"n": 1})
        q r1 added 1: fc2 c2 step() …
        q r1 arguments 1: {"n": 2}
        q r1 item 1: fc2 c2 step({"n": 2})
        "#,
    )
    .await;
    let outputs = vec![output("c1", "one"), output("c2", "two")];
    talk.append("out", "r1", outputs);
    talk.reads("out r1 appended [fco1 fco2] queued 22").await;
    sample.says("");
    // Two were made: the next sample is not begun.
    assert!(talk.ends("q").await.contains("done incomplete (budget)"));
    house.idle().await;
    talk.create("next", new([user("More")]));
    talk.reads("next error insufficient_quota, never: the budget `calls` is spent: calls")
        .await;
    talk.bye().await;
}
