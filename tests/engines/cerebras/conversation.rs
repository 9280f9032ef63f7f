//! A loop of an agent over the backend: what a client reads, and what the service is asked.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use hotloop::{
    archive::Archive,
    billing::Account,
    files::{BuiltIn, Files},
    item::Tenant,
    model::{Artifacts, Model, Models},
    proto::{
        self, ConnectRequest, Create, Done, FinishReason, FunctionCallOutput, FunctionTool, Item,
        ResponseStatus, connect_request::Command, connect_response::Event, item,
    },
    render::Heads,
    session::{Held, ParkedLimits, Sessions},
    stream::{self, Limits, Outgoing, Shared},
    wire::{self, RequestLimits},
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::*;

struct Stream {
    commands: mpsc::Sender<ConnectRequest>,
    outgoing: Outgoing,
}

impl Stream {
    fn open(backend: Cerebras) -> Self {
        let limits = Limits {
            age_max: Duration::from_secs(3_600),
            go_away: Duration::from_secs(30),
            lanes_max: 32,
            sampling_max: 16,
            waiting_max: 64,
            held_time_max: Duration::from_secs(600),
            send_time_max: Duration::from_secs(30),
            events_queued_max: 64,
            commands_queued_max: 64,
        };
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
        let (out, outgoing) = stream::outgoing(&limits);
        let shared = Arc::new(Shared {
            models: Arc::new(Models::new(Arc::new(model), Vec::new())),
            heads: Arc::new(Heads::new(1 << 20)),
            held: Held::new(sessions.clone(), Tenant::from("tenant"), 1_000),
            archive: Archive::new(sessions),
            wallet: hotloop::budget::Wallet::default(),
            account: Account::logged(Tenant::from("tenant")),
            policies: Arc::default(),
            limits,
            out,
            slots: Arc::new(Semaphore::new(limits.sampling_max)),
            ends: stream::Ends::default(),
        });
        let request_limits = RequestLimits {
            items_max: 4_096,
            tools_max: 512,
            item_bytes_max: 1 << 20,
        };
        let (commands, inbound) = mpsc::channel(64);
        let inbound =
            ReceiverStream::new(inbound).map(move |sent| wire::incoming(sent, &request_limits));
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
    let mut stream = Stream::open(backend(&fake, ""));
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
