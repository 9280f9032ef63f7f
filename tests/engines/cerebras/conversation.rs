//! A loop of an agent over the backend: what a client reads, and what the service is asked.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use hotloop::{
    archive::Archive,
    files::{BuiltIn, Files},
    model::{Artifacts, Model, Models},
    proto::{
        self, ConnectRequest, Create, Done, FinishReason, FunctionCallOutput, FunctionTool,
        IncompleteReason, Item, ResponseStatus, connect_request::Command, connect_response::Event,
        item,
    },
    safety::{Choice, Policies, PolicyOptions, Rules, Scopes},
    session::{ParkedLimits, Sessions},
    stream::{self, Outgoing, Shared},
    wire,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::*;
use crate::shared::{LIMITS, REQUEST_LIMITS, shared};

struct Stream {
    commands: mpsc::Sender<ConnectRequest>,
    outgoing: Outgoing,
}

impl Stream {
    fn open(backend: Cerebras, policies: Policies) -> Self {
        let artifacts = Artifacts::load(&Files::BuiltIn(BuiltIn::SimAgent), None).unwrap();
        let model = Model {
            name: "model".into(),
            backend: Arc::new(backend),
            artifacts: Arc::new(artifacts),
            context_length: 10_000,
            parameters: 0,
            output_tokens_max: 1_000,
            fallback: None,
            replicas: None,
            stand_in: false,
        };
        let sessions = Sessions::new(ParkedLimits {
            bytes_max: 1 << 20,
            tenant_bytes_max: 1 << 20,
            time_max: Duration::from_secs(600),
        });
        let models = Arc::new(Models::new(Arc::new(model), Vec::new()));
        let (shared, outgoing) = shared(models, Archive::new(sessions), "tenant", LIMITS);
        let shared = Arc::new(Shared {
            policies: Arc::new(policies),
            ..shared
        });
        let (commands, inbound) = mpsc::channel(64);
        let inbound =
            ReceiverStream::new(inbound).map(move |sent| wire::incoming(sent, &REQUEST_LIMITS));
        tokio::spawn(stream::run(inbound, shared, std::future::pending()));
        Self { commands, outgoing }
    }

    /// Creates a response; gives its id, and how it ended.
    async fn create(&mut self, create: Create) -> (String, Done) {
        let request = ConnectRequest {
            command: Some(Command::Create(create)),
            ..ConnectRequest::default()
        };
        self.commands.try_send(request).unwrap();
        loop {
            let next = tokio::time::timeout(Duration::from_secs(10), self.outgoing.next());
            let (sequence, envelope) = next.await.unwrap().unwrap().unwrap();
            let message = wire::response(sequence, envelope);
            match message.event.unwrap() {
                Event::Done(done) => return (message.response_id, *done),
                Event::Error(error) => panic!("{error:?}"),
                _ => {}
            }
        }
    }
}

fn item(item: item::Item) -> Item {
    Item {
        item: Some(item),
        ..Item::default()
    }
}

#[tokio::test]
async fn each_step_sends_what_was_and_what_is_new() {
    let fake = Fake::new([
        play([
            delta(json!({"reasoning": "hm"})),
            text("I look."),
            call(0, "theirs", "look", "{\"x\": 1}"),
            finish("tool_calls"),
            usage(),
        ]),
        play([text("Found."), finish("stop"), usage()]),
    ])
    .await;
    let mut stream = Stream::open(backend(&fake, ""), Policies::default());
    let tool = FunctionTool {
        name: "look".into(),
        parameters: r#"{"type":"object","properties":{}}"#.into(),
        ..FunctionTool::default()
    };
    let tool = proto::Tool {
        tool: Some(proto::tool::Tool::Function(tool)),
    };
    let (first, done) = stream
        .create(Create {
            input: vec![item(item::Item::UserText("Where?".into()))],
            instructions: Some("Be brief.".into()),
            tools: vec![tool],
            include: vec!["output".into()],
            ..Create::default()
        })
        .await;
    assert_eq!(done.status(), ResponseStatus::Completed);
    assert_eq!(done.finish_reason(), FinishReason::ToolCalls);
    assert_eq!(done.output.len(), 3);
    let used = done.usage.unwrap();
    assert_eq!(
        (
            used.input_tokens,
            used.cached_tokens,
            used.output_tokens,
            used.reasoning_tokens
        ),
        (50, 40, 7, 3)
    );
    let [call_id] = done.call_ids.try_into().unwrap();
    let output = FunctionCallOutput {
        call_id: call_id.clone(),
        output: "there".into(),
    };
    let (_, done) = stream
        .create(Create {
            previous_response_id: first,
            input: vec![item(item::Item::FunctionCallOutput(output))],
            ..Create::default()
        })
        .await;
    assert_eq!(done.status(), ResponseStatus::Completed);
    assert_eq!(done.finish_reason(), FinishReason::Stop);

    let [one, two] = fake.asked().try_into().ok().unwrap();
    let mut messages = vec![
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "Where?"}),
    ];
    assert_eq!(one.body["messages"], Value::from(messages.clone()));
    let function = json!({"name": "look", "arguments": "{\"x\": 1}"});
    messages.push(json!({
        "role": "assistant", "content": "I look.",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        "reasoning": "hm",
    }));
    messages.push(json!({"role": "tool", "tool_call_id": call_id, "content": "there"}));
    assert_eq!(two.body["messages"], Value::from(messages));
    for same in ["tools", "prompt_cache_key", "model", "clear_thinking"] {
        assert_eq!(one.body[same], two.body[same], "{same}");
    }
}

/// Policies with these actions for what contains the word.
fn policies(scopes: Scopes) -> Policies {
    let rules = "version = 1\n[[rule]]\nid = \"word\"\nliterals = [\"nightfall\"]\n";
    let options = PolicyOptions {
        scopes,
        ..PolicyOptions::default()
    };
    Policies::new(Rules::parse(rules).unwrap(), Vec::new(), vec![options]).unwrap()
}

fn says(text: &str) -> Create {
    Create {
        input: vec![item(item::Item::UserText(text.into()))],
        include: vec!["output".into()],
        ..Create::default()
    }
}

#[tokio::test]
async fn what_is_redacted_is_so_in_what_the_service_is_asked() {
    let fake = Fake::new([
        play([
            text("As to night"),
            text("fall: no."),
            finish("stop"),
            usage(),
        ]),
        play([text("Fine."), finish("stop"), usage()]),
    ])
    .await;
    let redact = Scopes {
        user_input: Choice::Redact,
        model_output: Choice::Redact,
        ..Scopes::default()
    };
    let mut stream = Stream::open(backend(&fake, ""), policies(redact));
    let (first, done) = stream.create(says("What is nightfall?")).await;
    assert_eq!(done.status(), ResponseStatus::Completed);
    let (_, done) = stream
        .create(Create {
            previous_response_id: first,
            ..says("Sure?")
        })
        .await;
    assert_eq!(done.status(), ResponseStatus::Completed);

    let [one, two] = fake.asked().try_into().ok().unwrap();
    let mut messages = vec![json!({"role": "user", "content": "What is [redacted:word]?"})];
    assert_eq!(one.body["messages"], Value::from(messages.clone()));
    messages.extend([
        json!({"role": "assistant", "content": "As to [redacted:word]: no."}),
        json!({"role": "user", "content": "Sure?"}),
    ]);
    assert_eq!(two.body["messages"], Value::from(messages));
}

#[tokio::test]
async fn what_is_refused_in_an_answer_ends_it_with_content_filter() {
    let fake = Fake::new([
        play([
            text("As to night"),
            text("fall: no."),
            finish("stop"),
            usage(),
        ]),
        play([text("Fine."), finish("stop"), usage()]),
    ])
    .await;
    let refuse = Scopes {
        model_output: Choice::Refuse,
        ..Scopes::default()
    };
    let mut stream = Stream::open(backend(&fake, ""), policies(refuse));
    let (first, done) = stream.create(says("What?")).await;
    assert_eq!(done.status(), ResponseStatus::Incomplete);
    assert_eq!(done.incomplete_reason(), IncompleteReason::ContentFilter);
    assert_eq!(done.finish_reason(), FinishReason::ContentFilter);
    // What was shown before it stays, and goes on.
    let (_, done) = stream
        .create(Create {
            previous_response_id: first,
            ..says("Sure?")
        })
        .await;
    assert_eq!(done.status(), ResponseStatus::Completed);
    let [_, two] = fake.asked().try_into().ok().unwrap();
    let messages = json!([
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "As to "},
        {"role": "user", "content": "Sure?"},
    ]);
    assert_eq!(two.body["messages"], messages);
}
