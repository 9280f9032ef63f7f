//! What is refused, and that nothing of it is kept: after each refusal the stream goes on.

use std::time::Duration;

use hotloop::{
    backend::BackendError,
    proto::{
        Create, FunctionCall, Item, TextFormat, ToolChoice, ToolChoiceMode,
        connect_request::Command, item, text_format::Format, tool_choice::Choice,
    },
};

use crate::transcript::{
    House, Plan, Talk, after, call, held, new, output, tool, user, with_tools,
};

fn open() -> (House, Talk) {
    let house = House::new();
    let talk = house.talk("acme");
    (house, talk)
}

/// A stream whose first response, `r1`, has completed.
async fn answered(house: &mut House) -> Talk {
    let mut talk = house.talk("acme");
    talk.create("q", new([user("Hi")]));
    house.sample().await.says("Hello.");
    talk.ends("q").await;
    talk
}

#[tokio::test(start_paused = true)]
async fn fields_out_of_range_are_named() {
    let mut house = House::new();
    let mut talk = answered(&mut house).await;
    let base = || after("r1", [user("And?")]);
    let mode = |mode: ToolChoiceMode| {
        Some(ToolChoice {
            choice: Some(Choice::Mode(mode.into())),
        })
    };
    let item = |item| Item {
        item: Some(item),
        ..Item::default()
    };
    #[rustfmt::skip]
    let wrong: Vec<(&str, Create)> = vec![
        ("create.temperature", Create { temperature: Some(2.1), ..base() }),
        ("create.temperature", Create { temperature: Some(f32::NAN), ..base() }),
        ("create.top_p", Create { top_p: Some(0.0), ..base() }),
        ("create.top_p", Create { top_p: Some(1.5), ..base() }),
        ("create.presence_penalty", Create { presence_penalty: Some(-2.5), ..base() }),
        ("create.frequency_penalty", Create { frequency_penalty: Some(f32::INFINITY), ..base() }),
        ("create.max_output_tokens", Create { max_output_tokens: Some(0), ..base() }),
        ("create.max_output_tokens", Create { max_output_tokens: Some(1_001), ..base() }),
        ("create.top_logprobs", Create { top_logprobs: Some(21), ..base() }),
        ("create.logit_bias", Create { logit_bias: [(1, 101.0)].into(), ..base() }),
        ("create.logit_bias", Create { logit_bias: [(u32::MAX, 1.0)].into(), ..base() }),
        ("create.stop", Create { stop: vec!["a".to_owned(); 5], ..base() }),
        ("create.stop[1]", Create { stop: vec!["a".to_owned(), String::new()], ..base() }),
        ("create.stop[0]", Create { stop: vec!["a".repeat(129)], ..base() }),
        ("create.include[0]", Create { include: vec!["input".to_owned()], ..base() }),
        ("create.reset[0]", Create { reset: vec!["hold".to_owned()], ..base() }),
        ("create.service_tier", Create { service_tier: Some("flex".to_owned()), ..base() }),
        ("create.reasoning_effort", Create { reasoning_effort: 99, ..base() }),
        ("create.truncation", Create { truncation: 99, ..base() }),
        ("create.on_disconnect", Create { on_disconnect: 99, ..base() }),
        ("create.traceparent", Create { traceparent: "00-1-2-3".to_owned(), ..base() }),
        ("create.metadata", Create { metadata: (0..17).map(|n| (n.to_string(), String::new())).collect(), ..base() }),
        ("create.metadata", Create { metadata: [("k".repeat(65), String::new())].into(), ..base() }),
        ("create.prompt_cache_key", Create { prompt_cache_key: Some("k".repeat(257)), ..base() }),
        ("create.safety_identifier", Create { safety_identifier: Some("k".repeat(257)), ..base() }),
        ("create.model", Create { model: Some("m".repeat(257)), ..base() }),
        ("create.instructions", Create { instructions: Some("i".repeat((1 << 20) + 1)), ..base() }),
        ("create.previous_response_id", after(&"r".repeat(65), [user("Hi")])),
        ("create.tools[0].function.name", Create { tools: vec![tool("no spaces")], ..base() }),
        ("create.tools[1]", Create { tools: vec![tool("a"), tool("a")], ..base() }),
        ("create.tools", Create { tools: (0..513).map(|n| tool(&n.to_string())).collect(), ..base() }),
        ("create.tool_choice", Create { tool_choice: mode(ToolChoiceMode::Required), ..base() }),
        ("create.tool_choice.function", Create { tool_choice: Some(ToolChoice { choice: Some(Choice::Function("f".repeat(65))) }), ..base() }),
        ("create.text", Create { text: Some(TextFormat { format: Some(Format::JsonObject(Default::default())) }), ..base() }),
        ("create.input", new([])),
        ("create.input", new(vec![user("a"); 4_097])),
        ("create.input[0]", new([Item::default()])),
        ("create.input[0]", new([user(&"a".repeat((1 << 20) + 1))])),
        ("create.input[0].id", new([Item { id: "a b".to_owned(), ..user("Hi") }])),
        ("create.input[0].item_reference.id", new([crate::transcript::reference(&"a".repeat(65))])),
        ("create.input[0].message.content", new([item(item::Item::Message(Default::default()))])),
        ("create.input[0].function_call.arguments", new([item(item::Item::FunctionCall(FunctionCall {
            call_id: "a".to_owned(),
            name: "step".to_owned(),
            arguments: "[1]".to_owned(),
        }))])),
        ("create.input[0].function_call_output.call_id", new([output("", "ok")])),
    ];
    for (param, create) in wrong {
        talk.create("wrong", create);
        let line = talk.line().await;
        assert!(
            line.starts_with(&format!("wrong error invalid_request at {param}, never: ")),
            "{param}: {line}"
        );
        assert!(line.len() < 700, "a long answer: {}", line.len());
    }
    talk.still_works(&mut house, "r1").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn commands_that_mean_nothing() {
    let mut house = House::new();
    let mut talk = answered(&mut house).await;
    let empty = hotloop::proto::ConnectRequest::default();
    talk.send_raw(empty);
    talk.reads("error invalid_request at command, never: no command is set: create, append, done or cancel").await;
    talk.append("a", "r1", vec![]);
    talk.reads("a error invalid_request at append.input, never: at least one item is needed")
        .await;
    talk.append("b", "r1", vec![user("Hi")]);
    talk.reads("b r1 error response_not_open at append.response_id, never: the response `r1` neither runs nor is held").await;
    talk.done("c", "r1");
    talk.reads("c r1 error response_not_open at done.response_id, never: the response `r1` neither runs nor is held").await;
    talk.cancel("d", "r1");
    talk.reads("d r1 error response_not_open at cancel.response_id, never: the response `r1` neither runs nor is held").await;
    talk.done("e", &"r".repeat(1 << 20));
    talk.reads("e error invalid_request at done.response_id, never: 1048576 bytes are over the limit of 64").await;
    let long = "x".repeat(200);
    talk.send("", &long, Command::Create(new([user("Hi")])));
    talk.reads(&format!(
        "{} error invalid_request at request_id, never: 200 bytes are over the limit of 128",
        "x".repeat(128)
    ))
    .await;
    talk.send(
        "",
        "f",
        Command::Cancel(hotloop::proto::Cancel {
            response_id: "a".to_owned(),
            create_request_id: "b".to_owned(),
        }),
    );
    talk.reads("f error invalid_request at cancel.create_request_id, never: either it or response_id is set").await;
    talk.still_works(&mut house, "r1").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_not_there() {
    let mut house = House::new();
    let mut talk = answered(&mut house).await;
    talk.create("a", after("resp_unknown", [user("Hi")]));
    talk.reads("a error previous_response_not_found at create.previous_response_id, resend_full: no response `resp_unknown` is held").await;
    let create = after("r1", [user("Hi")]);
    talk.create(
        "b",
        Create {
            model: Some("gpt".to_owned()),
            ..create
        },
    );
    talk.reads("b error model_not_found at create.model, never: no model has the name `gpt`")
        .await;
    talk.still_works(&mut house, "r1").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_context_that_is_too_long_is_refused_by_how_much() {
    let mut house = House::built(Plan {
        context_length: 100,
        ..Plan::default()
    });
    let mut talk = answered(&mut house).await;
    talk.create("long", after("r1", [user(&"word ".repeat(100))]));
    let line = talk.line().await;
    let message = line
        .strip_prefix("long error context_length_exceeded at create.input, never: the prompt has ")
        .expect(&line);
    let numbers: Vec<usize> = message
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|n| n.parse().ok())
        .collect();
    assert!(
        matches!(numbers[..], [tokens, over, 100] if tokens - over == 99),
        "{line}"
    );
    talk.still_works(&mut house, "r1").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn outputs_and_calls_that_do_not_match() {
    let (mut house, mut talk) = open();
    talk.create("q", with_tools(new([user("Go")])));
    let calls = [call(1), call(2)].join("\n");
    house.sample().await.says(&calls);
    talk.ends("q").await;
    talk.create("a", after("r1", [output("c1", "ok")]));
    talk.reads(
        "a error missing_tool_output at create.input, never: no output has come for call c2",
    )
    .await;
    talk.create("b", after("r1", [output("c1", "ok"), output("nope", "ok")]));
    talk.reads("b error no_such_call at create.input[1].function_call_output.call_id, never: no open function_call has the call_id `nope`").await;
    talk.create(
        "c",
        after(
            "r1",
            [output("c1", "ok"), output("c1", "ok"), output("c2", "ok")],
        ),
    );
    talk.reads("c error no_such_call at create.input[1].function_call_output.call_id, never: no open function_call has the call_id `c1`").await;
    talk.create("d", after("r1", [output("c1", "ok"), output("c2", "ok")]));
    house.sample().await.says("Done.");
    talk.ends("d").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_wrong_append_closes_no_call() {
    let (mut house, mut talk) = open();
    talk.create("q", held(with_tools(new([user("Go")]))));
    house.sample().await.says(&call(1));
    talk.ends("q").await;
    talk.append("a", "r1", vec![output("c1", "ok"), output("nope", "ok")]);
    talk.reads("a r1 error no_such_call at append.input[1].function_call_output.call_id, never: no open function_call has the call_id `nope`").await;
    talk.append("b", "r1", vec![output("c1", "ok")]);
    house.sample().await.says("Done.");
    talk.ends("q").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_takes_nothing_and_one_that_breaks() {
    let mut house = House::new();
    let mut talk = answered(&mut house).await;
    talk.create("a", after("r1", [user("And?")]));
    house.sample().await.fails(BackendError::Unavailable {
        reason: "full".to_owned(),
        retry_after: Some(Duration::from_secs(2)),
    });
    talk.reads(
        "
        a r2 created sim after r1
        a r2 done failed (backend_unavailable, safe in 2000 ms: the backend is not available: full) items [] sampled 0 in 1
        ",
    )
    .await;
    let broken = || BackendError::Failed {
        reason: "out of memory".to_owned(),
    };
    talk.create("b", after("r1", [user("And?")]));
    house.sample().await.fails(broken());
    talk.reads(
        "
        b r3 created sim after r1
        b r3 done failed (backend_error, safe: the backend failed: out of memory) items [] sampled 0 in 1
        ",
    )
    .await;
    talk.create("c", after("r1", [user("And?")]));
    let sample = house.sample().await;
    sample.writes("Well");
    sample.fails(broken());
    talk.reads(
        r#"
        c r4 created sim after r1
        c r4 added 0: msg2 Assistant "" …
        c r4 text 0: "Well"
        c r4 item 0: msg2 Assistant "Well" INCOMPLETE
        c r4 done failed (backend_error, safe: the backend failed: out of memory) items [msg2] sampled 2 in 1
        "#,
    )
    .await;
    // What was handed out is kept: the client may go on from it, or from the parent as before.
    talk.create("c2", after("r4", [user("Go on")]));
    house.sample().await.says("Yes");
    talk.reads(
        r#"
        c2 r5 created sim after r4
        c2 r5 added 0: msg3 Assistant "" …
        c2 r5 text 0: "Yes"
        c2 r5 item 0: msg3 Assistant "Yes"
        c2 r5 done completed stop items [msg3] sampled 3 in 1
        "#,
    )
    .await;
    talk.create("d", after("r1", [user("And?")]));
    house.sample().await.babbles();
    talk.reads(
        "
        d r6 created sim after r1
        d r6 done failed (backend_error, safe: the backend sampled token 4294967295, which the vocabulary does not have) items [] sampled 1 in 1
        ",
    )
    .await;
    talk.create("e", after("r1", [user("And?")]));
    drop(house.sample().await);
    talk.reads(
        "
        e r7 created sim after r1
        e r7 done failed (backend_error, safe: the backend ended the sample without saying why) items [] sampled 0 in 1
        ",
    )
    .await;
    talk.create("f", after("r6", [user("So?")]));
    talk.reads("f error previous_response_not_found at create.previous_response_id, resend_full: no response `r6` is held").await;
    talk.still_works(&mut house, "r1").await;
    talk.bye().await;
}
