//! A client as an agent is one: it creates, takes calls, and sends their outputs.

use std::time::{Duration, Instant};

use hotloop::proto::{
    ConnectRequest, ConnectResponse, Create, Done, FunctionCall, FunctionCallOutput, FunctionTool,
    Item, ResponseStatus, Tool, connect_request::Command, connect_response::Event, item,
    responses_service_client::ResponsesServiceClient, tool,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

/// One open stream.
pub struct Client {
    out: mpsc::Sender<ConnectRequest>,
    events: Streaming<ConnectResponse>,
}

/// What a command led to, up to the end of the sample.
pub struct Step {
    pub response_id: String,
    pub call_ids: Vec<String>,
    /// From the command to the first event of the output.
    pub first: Duration,
    /// And to the end.
    pub whole: Duration,
    pub done: Done,
    /// The items of the output.
    pub output: Vec<Item>,
}

impl Client {
    pub async fn open(channel: Channel) -> Self {
        let (out, outgoing) = mpsc::channel(64);
        let mut client = ResponsesServiceClient::new(channel)
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20);
        let answer = client.connect(ReceiverStream::new(outgoing)).await;
        Self {
            out,
            events: answer.unwrap().into_inner(),
        }
    }

    /// Sends the command, and takes events until the response ends or waits for outputs.
    pub async fn step(&mut self, command: Command) -> Step {
        let start = Instant::now();
        self.send(command).await;
        let mut first = None;
        let mut output = Vec::new();
        loop {
            let response = self.events.message().await.unwrap().unwrap();
            match response.event.unwrap() {
                Event::Created(_)
                | Event::Appended(_)
                | Event::GoAway(_)
                | Event::SafetyVerdict(_) => {}
                Event::Error(error) => panic!("{error:?}"),
                Event::Done(done) => {
                    assert!(
                        matches!(
                            done.status(),
                            ResponseStatus::Completed | ResponseStatus::AwaitingInput
                        ),
                        "{done:?}"
                    );
                    return Step {
                        response_id: response.response_id,
                        call_ids: done.call_ids.clone(),
                        first: first.unwrap_or_else(|| start.elapsed()),
                        whole: start.elapsed(),
                        done: *done,
                        output,
                    };
                }
                Event::OutputItemAdded(_)
                | Event::OutputTextDelta(_)
                | Event::ReasoningTextDelta(_)
                | Event::FunctionCallArgumentsDelta(_) => {
                    first.get_or_insert_with(|| start.elapsed());
                }
                Event::OutputItemDone(done) => {
                    first.get_or_insert_with(|| start.elapsed());
                    output.extend(done.item);
                }
            }
        }
    }

    /// The next event; nothing where the stream has ended.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.message().await.unwrap()?.event
    }

    pub async fn send(&self, command: Command) {
        let request = ConnectRequest {
            lane: String::new(),
            request_id: String::new(),
            command: Some(command),
        };
        self.out.send(request).await.unwrap();
    }
}

pub async fn connect(url: &str) -> Channel {
    let endpoint = Channel::from_shared(url.to_owned()).unwrap();
    endpoint
        .tcp_nodelay(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(64 << 20)
        .connect()
        .await
        .unwrap()
}

pub fn user(text: String) -> Item {
    of(item::Item::UserText(text))
}

pub fn call(call_id: &str) -> Item {
    of(item::Item::FunctionCall(FunctionCall {
        call_id: call_id.to_owned(),
        name: "tool_1".to_owned(),
        arguments: r#"{"text": "the"}"#.to_owned(),
    }))
}

pub fn output(call_id: &str, output: String) -> Item {
    of(item::Item::FunctionCallOutput(FunctionCallOutput {
        call_id: call_id.to_owned(),
        output,
    }))
}

fn of(item: item::Item) -> Item {
    Item {
        item: Some(item),
        ..Item::default()
    }
}

/// Ten tools, as an agent for code has them.
pub fn tools() -> Vec<Tool> {
    let parameters = r#"{"type": "object", "properties": {"path": {"type": "string", "description": "A file, relative to the working directory."}, "text": {"type": "string", "description": "What to look for, or to write."}, "first_line": {"type": "integer", "description": "Where to begin; 1 where it is left out."}, "recursive": {"type": "boolean"}}, "required": ["path"], "additionalProperties": false}"#;
    (0..10)
        .map(|number| Tool {
            tool: Some(tool::Tool::Function(FunctionTool {
                name: format!("tool_{number}"),
                description:
                    "Does one thing with the files of a directory, and says what it found there."
                        .to_owned(),
                parameters: parameters.to_owned(),
                strict: false,
            })),
        })
        .collect()
}

/// A create that continues a response with this input.
pub fn create(previous: Option<&str>, input: Vec<Item>, output_tokens: u64) -> Create {
    Create {
        previous_response_id: previous.unwrap_or_default().to_owned(),
        input,
        tools: if previous.is_none() {
            tools()
        } else {
            Vec::new()
        },
        // What the backend takes for the length of its answer.
        seed: Some(output_tokens),
        ..Create::default()
    }
}
