//! One answer at a time: the order of events, what the settings change, and what can be continued.

use hotloop::proto::{
    self, Create, CustomTool, ToolChoice, ToolChoiceMode, Truncation, tool_choice::Choice,
};

use crate::transcript::{
    House, Plan, after, call, custom_output, held, new, output, reference, still, system, tool,
    user, with_tools,
};

#[tokio::test(start_paused = true)]
async fn a_plain_answer() {
    let (mut house, mut talk) = open();
    talk.create("q", new([user("Hi")]));
    let sample = house.sample().await;
    talk.reads("q r1 created sim").await;
    sample.writes("Hello.");
    talk.reads(
        r#"
        q r1 added 0: msg1 Assistant "" …
        q r1 text 0: "Hello."
        "#,
    )
    .await;
    sample.says(" Bye.");
    talk.reads(
        r#"
        q r1 text 0: " Bye."
        q r1 item 0: msg1 Assistant "Hello. Bye."
        q r1 done completed stop items [msg1] sampled 9 in 1
        "#,
    )
    .await;
    assert_eq!(
        sample.text(),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn reasoning_then_text_then_a_call() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    let sample = house.sample().await;
    sample.writes("<think>\nhm\n</think>\n\n");
    sample.writes("I step.");
    sample.says(&format!("\n{}", call(1)));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: rs1 thinks "" …
        q r1 thought 0: "hm"
        q r1 item 0: rs1 thinks "hm"
        q r1 added 1: msg1 Assistant "" …
        q r1 text 1: "I step."
        q r1 item 1: msg1 Assistant "I step."
        q r1 added 2: fc1 c1 step() …
        q r1 arguments 2: {"n": 1}
        q r1 item 2: fc1 c1 step({"n": 1})
        q r1 done completed tool_calls open [c1] items [rs1 msg1 fc1] sampled 32 in 1
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_call_is_handed_out_while_later_items_are_sampled() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
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
    talk.silent().await;
    sample.says(&format!("\n{}", call(2)));
    talk.reads(
        r#"
        q r1 added 1: fc2 c2 step() …
        q r1 arguments 1: {"n": 2}
        q r1 item 1: fc2 c2 step({"n": 2})
        q r1 done completed tool_calls open [c1 c2] items [fc1 fc2] sampled 42 in 1
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn without_parallel_calls_the_sample_ends_behind_the_first() {
    let (mut house, mut talk) = open();
    let create = with_tools(new([user("Go")]));
    talk.create(
        "q",
        Create {
            parallel_tool_calls: Some(false),
            ..create
        },
    );
    let sample = house.sample().await;
    sample.writes(&format!("{}\n{}", call(1), call(2)));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 1}
        q r1 item 0: fc1 c1 step({"n": 1})
        q r1 done completed tool_calls open [c1] items [fc1] sampled 19 in 1
        "#,
    )
    .await;
    sample.is_dropped().await;
    talk.create("q2", after("r1", [output("c1", "ok")]));
    let sample = house.sample().await;
    assert!(sample.text().ends_with(&format!(
        "<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        call(1)
    )), "{}", sample.text());
    sample.says("Done.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn with_tool_choice_none_a_call_is_text_and_the_tools_stay_in_the_prompt() {
    let (mut house, mut talk) = open();
    let mode = ToolChoiceMode::None.into();
    let create = Create {
        tool_choice: Some(ToolChoice {
            choice: Some(Choice::Mode(mode)),
        }),
        deltas: Some(false),
        ..with_tools(new([user("Go")]))
    };
    talk.create("q", create);
    let sample = house.sample().await;
    assert!(sample.text().contains(r#""name": "step""#));
    sample.says(&call(1));
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: msg1 Assistant "" …
        q r1 item 0: msg1 Assistant "<tool_call>\n{\"name\": \"step\", \"arguments\": {\"n\": 1}}\n</tool_call>"
        q r1 done completed stop items [msg1] sampled 21 in 1
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_text_ends_the_sample_and_is_not_part_of_the_output() {
    let (mut house, mut talk) = open();
    let create = Create {
        stop: vec!["END".to_owned()],
        ..new([user("Go")])
    };
    talk.create("q", create);
    let sample = house.sample().await;
    sample.writes("one E").writes("ND two");
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: msg1 Assistant "" …
        q r1 text 0: "one "
        q r1 item 0: msg1 Assistant "one "
        q r1 done completed stop items [msg1] sampled 4 in 1
        "#,
    )
    .await;
    sample.is_dropped().await;
    talk.create("q2", after("r1", [user("And?")]));
    let sample = house.sample().await;
    assert!(sample.text().ends_with(
        "<|im_start|>assistant\none <|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    ));
    sample.says("Two.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_call_that_turns_out_to_be_none_is_closed_and_becomes_text() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    let sample = house.sample().await;
    sample.says("<tool_call>\n{\"name\": \"step\", \"arguments\": {\"n\": oops}}\n</tool_call>");
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: fc1 c1 step() …
        q r1 arguments 0: {"n": 
        q r1 item 0: fc1 c1 step() INCOMPLETE
        q r1 added 1: msg1 Assistant "" …
        q r1 text 1: "<tool_call>\n{\"name\": \"step\", \"arguments\": {\"n\": oops}}\n</tool_call>"
        q r1 item 1: msg1 Assistant "<tool_call>\n{\"name\": \"step\", \"arguments\": {\"n\": oops}}\n</tool_call>"
        q r1 done completed stop items [msg1] sampled 22 in 1
        "#,
    )
    .await;
    talk.still_works(&mut house, "r1").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_custom_tool_gets_text_and_its_output_is_of_its_own_kind() {
    let (mut house, mut talk) = open();
    let custom = proto::Tool {
        tool: Some(proto::tool::Tool::Custom(CustomTool {
            name: "patch".to_owned(),
            description: "Patches.".to_owned(),
        })),
    };
    let create = Create {
        tools: vec![custom],
        deltas: Some(false),
        include: vec!["output".to_owned()],
        ..new([user("Go")])
    };
    talk.create("q", create);
    let sample = house.sample().await;
    sample.says(
        "<tool_call>\n{\"name\": \"patch\", \"arguments\": {\"input\": \"a\\nb\"}}\n</tool_call>",
    );
    talk.reads(
        r"
        q r1 created sim
        q r1 added 0: ctc1 c1 patch<> …
        q r1 item 0: ctc1 c1 patch<a\nb>
        q r1 done completed tool_calls open [c1] items [ctc1] sampled 24 in 1 output [ctc1 c1 patch<a\nb>]
        ",
    )
    .await;
    talk.create("wrong", after("r1", [output("c1", "ok")]));
    talk.reads("wrong error no_such_call at create.input[0].function_call_output.call_id, never: no open function_call has the call_id `c1`").await;
    talk.create("right", after("r1", [custom_output("c1", "ok")]));
    house.sample().await.says("Done.");
    let end = talk.ends("right").await;
    assert!(end.contains("done completed stop"), "{end}");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn an_item_that_the_server_holds_is_sent_by_its_id() {
    let (mut house, mut talk) = open();
    talk.create("q", new([user("Hi")]));
    house.sample().await.says("A poem.");
    talk.ends("q").await;
    talk.create("q2", new([reference("msg1"), user("Shorter.")]));
    let sample = house.sample().await;
    assert!(
        sample
            .text()
            .starts_with("<|im_start|>assistant\nA poem.<|im_end|>\n")
    );
    sample.says("P.");
    talk.ends("q2").await;
    talk.create("q3", new([reference("msg_unknown")]));
    talk.reads("q3 error invalid_request at create.input[0].item_reference.id, never: no item `msg_unknown` is held").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn log_probabilities_come_with_the_text() {
    let (mut house, mut talk) = open();
    let create = Create {
        top_logprobs: Some(0),
        ..new([user("Hi")])
    };
    talk.create("q", create);
    house.sample().await.says("Yes");
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: msg1 Assistant "" …
        q r1 text 0: "Yes" with 2 logprobs
        q r1 item 0: msg1 Assistant "Yes"
        q r1 done completed stop items [msg1] sampled 3 in 1
        "#,
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_at_its_limit_is_incomplete_and_can_be_continued() {
    let (mut house, mut talk) = open();
    let create = Create {
        max_output_tokens: Some(7),
        ..with_tools(new([user("Go")]))
    };
    talk.create("q", create);
    let sample = house.sample().await;
    assert_eq!(sample.prompt.sampling.max_tokens, 7);
    sample.writes("One.");
    sample.is_cut_at("\n<tool_call>\n{\"name\": \"step\", \"arguments\": {\"n");
    talk.reads(
        r#"
        q r1 created sim
        q r1 added 0: msg1 Assistant "" …
        q r1 text 0: "One."
        q r1 item 0: msg1 Assistant "One."
        q r1 added 1: fc1 c1 step() …
        q r1 arguments 1: {"n
        q r1 item 1: fc1 c1 step() INCOMPLETE
        q r1 done incomplete (max_output_tokens) length items [msg1] sampled 19 in 1
        "#,
    )
    .await;
    talk.create("q2", after("r1", [user("And?")]));
    let sample = house.sample().await;
    assert!(
        sample.text().ends_with(
            "assistant\nOne.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        ),
        "{}",
        sample.text()
    );
    sample.says("Two.");
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_warm_up_prepares_and_its_continuation_samples_with_and_without_input() {
    let mut house = House::built(Plan {
        prefill: true,
        ..Plan::default()
    });
    let mut talk = house.talk("acme");
    let create = Create {
        generate: Some(false),
        instructions: Some("Be brief.".to_owned()),
        ..new([user("Hi")])
    };
    talk.create("warm", create);
    let prefill = house.prefill().await;
    assert_eq!(
        prefill.text(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    );
    talk.reads("warm r1 created sim").await;
    talk.silent().await;
    drop(prefill);
    talk.reads("warm r1 done completed items [] sampled 0 in 0")
        .await;
    talk.create("bare", after("r1", []));
    let bare = house.sample().await;
    assert_eq!(
        bare.text(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    bare.says("Hi.");
    talk.ends("bare").await;
    talk.create("more", after("r1", [user("You?")]));
    let more = house.sample().await;
    assert_eq!(
        more.text(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nYou?<|im_end|>\n<|im_start|>assistant\n"
    );
    more.says("Me.");
    talk.ends("more").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_warm_up_can_be_cancelled() {
    let mut house = House::built(Plan {
        prefill: true,
        ..Plan::default()
    });
    let mut talk = house.talk("acme");
    let create = Create {
        generate: Some(false),
        ..new([user("Hi")])
    };
    talk.create("warm", create);
    let prefill = house.prefill().await;
    talk.reads("warm r1 created sim").await;
    talk.cancel("stop", "r1");
    talk.reads("stop r1 done cancelled items [] sampled 0 in 0")
        .await;
    assert!(prefill.done.is_closed());
    talk.create("q", after("r1", [user("So?")]));
    talk.reads("q error previous_response_not_found at create.previous_response_id, resend_full: no response `r1` is held").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_warm_up_between_calls_and_their_outputs_keeps_messages_behind_the_outputs() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    house.sample().await.says(&call(1));
    talk.ends("q").await;
    let create = Create {
        generate: Some(false),
        ..after("r1", [user("Hurry")])
    };
    talk.create("warm", create);
    talk.ends("warm").await;
    talk.create("q2", after("r2", [output("c1", "ok")]));
    let sample = house.sample().await;
    assert!(
        sample.text().ends_with("<|im_end|>\n<|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>user\nHurry<|im_end|>\n<|im_start|>assistant\n"),
        "{}",
        sample.text()
    );
    sample.says("Yes.");
    talk.ends("q2").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn settings_are_inherited_replaced_and_reset() {
    let (mut house, mut talk) = open();
    let create = Create {
        instructions: Some("Be brief.".to_owned()),
        temperature: Some(0.5),
        top_k: Some(3),
        seed: Some(7),
        ..new([user("Hi")])
    };
    talk.create("q", create);
    let first = house.sample().await;
    first.says("A");
    talk.ends("q").await;
    let create = Create {
        top_k: Some(5),
        reset: vec!["temperature".to_owned(), "instructions".to_owned()],
        ..after("r1", [user("On")])
    };
    talk.create("q2", create);
    let second = house.sample().await;
    second.says("B");
    talk.ends("q2").await;
    let of = |sample: &crate::transcript::Sample| {
        let it = &sample.prompt.sampling;
        (it.temperature, it.top_k, it.seed)
    };
    assert_eq!(
        (of(&first), of(&second)),
        ((0.5, 3, Some(7)), (1.0, 5, Some(7)))
    );
    assert!(first.text().contains("Be brief."));
    assert!(!second.text().contains("Be brief."));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn changed_tools_are_told_and_the_same_ones_change_nothing() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    house.sample().await.says("A");
    talk.ends("q").await;

    talk.create("same", with_tools(after("r1", [user("On")])));
    let sample = house.sample().await;
    sample.says("B");
    let mut report = None;
    while report.is_none() {
        report = done_of(talk.message().await.unwrap().unwrap());
    }
    let report = report.unwrap().prompt.unwrap();
    assert!(report.extends_previous);

    let create = Create {
        tools: vec![tool("leap")],
        ..after("r1", [user("On")])
    };
    talk.create("other", create);
    let sample = house.sample().await;
    assert!(sample.text().contains("leap") && !sample.text().contains(r#""step""#));
    sample.says("C");
    let mut report = None;
    while report.is_none() {
        report = done_of(talk.message().await.unwrap().unwrap());
    }
    let report = report.unwrap().prompt.unwrap();
    assert!(!report.extends_previous);
    assert_eq!(report.rerender_reason(), proto::RerenderReason::Settings);
    talk.bye().await;
}

fn done_of(message: proto::ConnectResponse) -> Option<proto::Done> {
    match message.event {
        Some(proto::connect_response::Event::Done(done)) => Some(*done),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_truncated_conversation_tells_what_left_it() {
    let mut house = House::built(Plan {
        context_length: 120,
        ..Plan::default()
    });
    let mut talk = house.talk("acme");
    let create = Create {
        truncation: Truncation::Auto.into(),
        ..new([user(&"word ".repeat(60))])
    };
    talk.create("q", create);
    house.sample().await.says("A");
    talk.ends("q").await;
    talk.create("q2", after("r1", [user(&"other ".repeat(60))]));
    let sample = house.sample().await;
    assert!(!sample.text().contains("word"), "{}", sample.text());
    sample.says("B");
    talk.ends("q2").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_held_response_without_calls_simply_completes() {
    let (mut house, mut talk) = open();
    talk.create("q", held(new([system("Be kind."), user("Hi")])));
    house.sample().await.says("Hi.");
    let end = talk.ends("q").await;
    assert!(end.starts_with("q r1 done completed stop"), "{end}");
    still().await;
    talk.bye().await;
}

fn open() -> (House, crate::transcript::Talk) {
    let house = House::new();
    let talk = house.talk("acme");
    (house, talk)
}
