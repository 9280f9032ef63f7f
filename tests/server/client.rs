//! A client of the protocol, as a test needs it: each test reads as one side of a conversation.

#![allow(dead_code, reason = "each test takes the parts that it needs")]

use std::collections::{HashMap, VecDeque};

use hotloop::proto::{
    self, Append, Cancel, ConnectRequest, ConnectResponse, Create, Done, Error, Finish,
    FunctionCall, FunctionCallOutput, FunctionTool, Item, ResponseStatus, Tool,
    connect_request::Command, connect_response::Event, content_part, item,
    models_service_client::ModelsServiceClient, responses_service_client::ResponsesServiceClient,
    tool,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::program::{NEVER, Program};

/// The largest message that the server takes by default.
pub(crate) const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// One connection to a server.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) channel: Channel,
    key: Option<&'static str>,
}

impl Client {
    pub(crate) async fn of(program: &Program) -> Self {
        Self::through(Endpoint::from_shared(program.url()).unwrap()).await
    }

    /// A connection with settings of its own.
    pub(crate) async fn through(endpoint: Endpoint) -> Self {
        let channel = endpoint.tcp_nodelay(true).connect().await.unwrap();
        Self { channel, key: None }
    }

    /// The same with an API key.
    pub(crate) fn with_key(&self, key: &'static str) -> Self {
        Self {
            channel: self.channel.clone(),
            key: Some(key),
        }
    }

    pub(crate) fn responses(&self) -> ResponsesServiceClient<Channel> {
        ResponsesServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(crate) fn models(&self) -> ModelsServiceClient<Channel> {
        ModelsServiceClient::new(self.channel.clone())
    }

    /// A request with the key.
    pub(crate) fn ask<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(key) = self.key {
            let value = format!("Bearer {key}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        request
    }

    pub(crate) async fn stream(&self) -> Talk {
        self.try_stream().await.unwrap()
    }

    pub(crate) async fn try_stream(&self) -> Result<Talk, Status> {
        let (commands, outgoing) = mpsc::channel(16);
        let request = self.ask(ReceiverStream::new(outgoing));
        let events = timeout(NEVER, self.responses().connect(request)).await;
        Ok(Talk {
            commands,
            events: events.expect("the stream never opens")?.into_inner(),
            sequence_number: 0,
            commands_sent: 0,
            waiting: HashMap::new(),
        })
    }

    pub(crate) async fn get_response(&self, id: &str) -> Result<proto::Response, Status> {
        let request = self.ask(proto::GetResponseRequest {
            response_id: id.to_owned(),
        });
        let got = self.responses().get_response(request).await?;
        Ok(got.into_inner().response.unwrap())
    }
}

/// One stream.
pub(crate) struct Talk {
    pub(crate) commands: mpsc::Sender<ConnectRequest>,
    pub(crate) events: Streaming<ConnectResponse>,
    sequence_number: u64,
    commands_sent: u32,
    waiting: HashMap<String, VecDeque<ConnectResponse>>,
}

impl Talk {
    /// Sends a command; the answer is its request id.
    pub(crate) async fn send(&mut self, lane: &str, command: Command) -> String {
        self.commands_sent += 1;
        let request_id = format!("q{}", self.commands_sent);
        let request = ConnectRequest {
            lane: lane.to_owned(),
            request_id: request_id.clone(),
            command: Some(command),
        };
        self.commands.send(request).await.unwrap();
        request_id
    }

    pub(crate) async fn create(&mut self, create: Create) -> String {
        self.create_on("", create).await
    }

    pub(crate) async fn create_on(&mut self, lane: &str, create: Create) -> String {
        self.send(lane, Command::Create(create)).await
    }

    pub(crate) async fn append(&mut self, response_id: &str, input: Vec<Item>) -> String {
        let response_id = response_id.to_owned();
        self.send("", Command::Append(Append { response_id, input }))
            .await
    }

    pub(crate) async fn finish(&mut self, response_id: &str) -> String {
        let response_id = response_id.to_owned();
        self.send("", Command::Done(Finish { response_id })).await
    }

    pub(crate) async fn cancel(&mut self, response_id: &str) -> String {
        let cancel = Cancel {
            response_id: response_id.to_owned(),
            ..Cancel::default()
        };
        self.send("", Command::Cancel(cancel)).await
    }

    /// The next message, whatever its lane. `None`: the stream has ended well.
    pub(crate) async fn receive(&mut self) -> Result<Option<ConnectResponse>, Status> {
        let next = timeout(NEVER, self.events.message()).await;
        let message = next.expect("nothing ever comes")?;
        if let Some(message) = &message {
            self.sequence_number += 1;
            assert_eq!(message.sequence_number, self.sequence_number);
        }
        Ok(message)
    }

    /// The next message of this lane; those of others wait for their reader.
    pub(crate) async fn next_on(&mut self, lane: &str) -> ConnectResponse {
        loop {
            if let Some(message) = self.waiting.get_mut(lane).and_then(VecDeque::pop_front) {
                return message;
            }
            let message = self.receive().await.unwrap().expect("the stream has ended");
            let lane = message.lane.clone();
            self.waiting.entry(lane).or_default().push_back(message);
        }
    }

    pub(crate) async fn next(&mut self) -> ConnectResponse {
        self.next_on("").await
    }

    /// Everything up to the first event that is looked for, which is the last.
    pub(crate) async fn until(
        &mut self,
        lane: &str,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Vec<ConnectResponse> {
        let mut messages = Vec::new();
        loop {
            let message = self.next_on(lane).await;
            let event = message.event.clone().unwrap();
            messages.push(message);
            if wanted(&event) {
                return messages;
            }
            if let Event::Error(error) = event {
                panic!("refused: {error:?}");
            }
        }
    }

    /// One round of a response, to its `done`.
    pub(crate) async fn round(&mut self) -> Round {
        self.round_on("").await
    }

    pub(crate) async fn round_on(&mut self, lane: &str) -> Round {
        let is_done = |event: &Event| matches!(event, Event::Done(_));
        Round::of(self.until(lane, is_done).await)
    }

    /// A whole response that ends well.
    pub(crate) async fn answer(&mut self, create: Create) -> Round {
        self.create(create).await;
        let round = self.round().await;
        assert_eq!(
            round.done.status(),
            ResponseStatus::Completed,
            "{:?}",
            round.done
        );
        round
    }

    /// The refusal of a command.
    pub(crate) async fn refusal(&mut self, request_id: &str) -> Error {
        let message = self.next().await;
        assert_eq!(message.request_id, request_id);
        match message.event {
            Some(Event::Error(error)) => *error,
            other => panic!("not refused: {other:?}"),
        }
    }

    /// What is left to come, and how the stream ends.
    pub(crate) async fn rest(&mut self) -> (Vec<ConnectResponse>, Result<(), Status>) {
        let mut messages = Vec::new();
        loop {
            match self.receive().await {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => return (messages, Ok(())),
                Err(status) => return (messages, Err(status)),
            }
        }
    }

    /// Closes our side: the server says nothing that nobody awaits, and ends the stream well.
    pub(crate) async fn close(mut self) {
        let waiting: usize = self.waiting.values().map(VecDeque::len).sum();
        assert_eq!(waiting, 0, "messages that nobody read");
        // Dropping the sender closes our side.
        (self.commands, _) = mpsc::channel(1);
        let (rest, ended) = self.rest().await;
        assert_eq!(rest, []);
        ended.unwrap();
    }
}

/// What came of one round.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) messages: Vec<ConnectResponse>,
    pub(crate) response_id: String,
    pub(crate) done: Done,
    /// The text of the items that came whole.
    pub(crate) text: String,
    /// The calls, likewise.
    pub(crate) calls: Vec<FunctionCall>,
}

impl Round {
    pub(crate) fn of(messages: Vec<ConnectResponse>) -> Self {
        let last = messages.last().unwrap();
        let Some(Event::Done(done)) = last.event.clone() else {
            panic!("no done at the end: {last:?}");
        };
        let response_id = last.response_id.clone();
        let mut deltas = String::new();
        let (mut text, mut calls) = (String::new(), Vec::new());
        for message in &messages {
            match &message.event {
                Some(Event::OutputTextDelta(delta)) => deltas += &delta.delta,
                Some(Event::OutputItemDone(whole)) => match whole.item.clone().unwrap().item {
                    Some(item::Item::Message(message)) => text += &text_of(&message),
                    Some(item::Item::FunctionCall(call)) => calls.push(call),
                    _ => {}
                },
                _ => {}
            }
        }
        let is_whole = matches!(messages[0].event, Some(Event::Created(_))) && !text.is_empty();
        if is_whole && !deltas.is_empty() {
            assert_eq!(deltas, text);
        }
        Self {
            messages,
            response_id,
            done: *done,
            text,
            calls,
        }
    }

    /// The outputs of its calls.
    pub(crate) fn outputs(&self) -> Vec<Item> {
        self.calls.iter().map(output).collect()
    }
}

pub(crate) fn text_of(message: &proto::Message) -> String {
    let part = |part: &proto::ContentPart| match &part.part {
        Some(content_part::Part::OutputText(text)) => text.text.clone(),
        Some(content_part::Part::InputText(text) | content_part::Part::Refusal(text)) => {
            text.clone()
        }
        Some(content_part::Part::InputImage(_)) | None => String::new(),
    };
    message.content.iter().map(part).collect()
}

/// A new conversation with the tool that the rules of the simulated model call.
pub(crate) fn say(text: &str) -> Create {
    let parameters = r#"{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}"#;
    let step = FunctionTool {
        name: "step".into(),
        description: "Takes one step.".into(),
        parameters: parameters.into(),
        strict: false,
    };
    Create {
        input: vec![user(text)],
        tools: vec![Tool {
            tool: Some(tool::Tool::Function(step)),
        }],
        ..Create::default()
    }
}

/// The same, held.
pub(crate) fn hold(text: &str) -> Create {
    Create {
        hold: true,
        ..say(text)
    }
}

/// With another model.
pub(crate) fn on(model: &str, create: Create) -> Create {
    Create {
        model: Some(model.into()),
        ..create
    }
}

/// The continuation of a response.
pub(crate) fn after(response_id: &str, input: Vec<Item>) -> Create {
    Create {
        previous_response_id: response_id.to_owned(),
        input,
        ..Create::default()
    }
}

pub(crate) fn user(text: &str) -> Item {
    Item {
        item: Some(item::Item::UserText(text.into())),
        ..Item::default()
    }
}

pub(crate) fn output(call: &FunctionCall) -> Item {
    let output = FunctionCallOutput {
        call_id: call.call_id.clone(),
        output: format!("output of {}", call.call_id),
    };
    Item {
        item: Some(item::Item::FunctionCallOutput(output)),
        ..Item::default()
    }
}

/// Runs a whole held rollout: one response, a round each step.
pub(crate) async fn held_rollout(talk: &mut Talk, steps: usize) -> Vec<Round> {
    talk.create(hold(&format!("rollout {steps}"))).await;
    let mut rounds = vec![talk.round().await];
    while rounds[rounds.len() - 1].done.status() == ResponseStatus::AwaitingInput {
        let last = &rounds[rounds.len() - 1];
        talk.append(&last.response_id, last.outputs()).await;
        rounds.push(talk.round().await);
    }
    rounds
}

/// Runs a whole chained rollout: a response each step.
pub(crate) async fn chained_rollout(talk: &mut Talk, steps: usize) -> Vec<Round> {
    let mut rounds = vec![talk.answer(say(&format!("rollout {steps}"))).await];
    while !rounds[rounds.len() - 1].calls.is_empty() {
        let last = &rounds[rounds.len() - 1];
        let next = after(&last.response_id, last.outputs());
        rounds.push(talk.answer(next).await);
    }
    rounds
}

/// Somebody else, who must not notice anything: a rollout on a connection of its own.
pub(crate) async fn witness(program: &Program) {
    let mut talk = Client::of(program).await.stream().await;
    let rounds = held_rollout(&mut talk, 20).await;
    assert_eq!(rounds[rounds.len() - 1].text, "finished 20 steps");
    talk.close().await;
}
