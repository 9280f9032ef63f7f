//! Clients that behave badly, while somebody else runs a rollout and notices nothing.

use std::time::Duration;

use hotloop::proto::{self, ConnectRequest, ConnectResponse, PromptSpan, connect_response::Event};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, Request, transport::Endpoint};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt as _;

use crate::{
    client::{Client, held_rollout, hold, on, say, user, witness},
    program::{NEVER, Program, Serve},
    wire::Wire,
};

/// A client that has no room: what it does not read soon stops the server from sending.
async fn narrow(program: &Program) -> Client {
    let endpoint = Endpoint::from_shared(program.url()).unwrap();
    Client::through(endpoint.initial_stream_window_size(4096)).await
}

#[tokio::test]
async fn one_that_vanishes_without_a_word_is_found_out() {
    let program = Serve::new()
        .set("server.keepalive_secs=1")
        .set("server.keepalive_timeout_secs=1")
        .start()
        .await;
    let (wire, client) = Wire::to(&program).await;
    let mut talk = client.stream().await;
    talk.create(on("paced", say("slow 5000"))).await;
    let is_delta = |event: &Event| matches!(event, Event::OutputTextDelta(_));
    let id = talk.until("", is_delta).await[0].response_id.clone();
    wire.fall_silent();
    witness(&program).await;
    program.says(&[&id, "usage", "incomplete"]).await;
    assert_eq!(program.said(&[&id, "usage"]).len(), 1);
}

#[tokio::test]
async fn one_that_does_not_read_slows_only_itself() {
    let program = Serve::new().set("stream.send_secs_max=1").start().await;
    witness(&program).await;
    let before = program.resident_mib();
    let client = narrow(&program).await;
    let mut talk = client.stream().await;
    for lane in 0..16 {
        talk.create_on(&lane.to_string(), say("slow 4000")).await;
    }
    witness(&program).await;
    // Not read for too long: the stream is over, but nothing is lost that was sent, and the client
    // is told when it reads on.
    program.says(&["stream broken", "SlowClient"]).await;
    witness(&program).await;
    let grown = program.resident_mib().saturating_sub(before);
    assert!(grown < 150, "{grown} MiB");
    let (messages, ended) = talk.rest().await;
    let status = ended.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "CLIENT_DOES_NOT_READ");
    assert!(
        messages
            .iter()
            .any(|message| matches!(message.event, Some(Event::Created(_))))
    );
}

#[tokio::test]
async fn one_that_floods_commands_waits_alone() {
    let program = Serve::new().set("stream.send_secs_max=1").start().await;
    witness(&program).await;
    let before = program.resident_mib();
    let mut talk = narrow(&program).await.stream().await;
    let commands = talk.commands.clone();
    let flood = tokio::spawn(async move {
        let mut sent = 0_u64;
        // What cannot be understood, what is refused, and what runs.
        loop {
            let command = match sent % 3 {
                0 => None,
                1 => Some(proto::connect_request::Command::Append(proto::Append {
                    response_id: "resp_unknown".into(),
                    input: vec![user("echo x")],
                })),
                _ => Some(proto::connect_request::Command::Create(say("echo x"))),
            };
            let request = ConnectRequest {
                lane: format!("lane-{}", sent % 100),
                command,
                ..Default::default()
            };
            if commands.send(request).await.is_err() {
                return;
            }
            sent += 1;
        }
    });
    witness(&program).await;
    program.says(&["stream broken", "SlowClient"]).await;
    let grown = program.resident_mib().saturating_sub(before);
    assert!(grown < 150, "{grown} MiB");
    flood.abort();
    let (messages, ended) = talk.rest().await;
    assert_eq!(ended.unwrap_err().code(), Code::ResourceExhausted);
    let refused = messages.iter().filter_map(|message| match &message.event {
        Some(Event::Error(error)) => Some(error.code.as_str()),
        _ => None,
    });
    let mut codes: Vec<&str> = refused.collect();
    codes.sort_unstable();
    codes.dedup();
    assert!(
        codes.contains(&"invalid_request") && codes.contains(&"response_not_open"),
        "{codes:?}"
    );
}

#[tokio::test]
async fn one_that_floods_commands_and_reads_gets_an_answer_to_each() {
    const COMMANDS: usize = 3000;
    let program = Serve::new().start().await;
    let client = Client::of(&program).await;
    let mut talk = client.stream().await;
    talk.create_on("held", hold("rollout 2")).await;
    let held = talk.round_on("held").await;
    let commands = talk.commands.clone();
    let flood = tokio::spawn(async move {
        for n in 0..COMMANDS {
            let request = ConnectRequest {
                request_id: format!("flood-{n}"),
                command: Some(proto::connect_request::Command::Create(proto::Create {
                    model: Some("nobody".into()),
                    ..say("echo x")
                })),
                ..Default::default()
            };
            commands.send(request).await.unwrap();
        }
    });
    let witnessed = tokio::spawn(async move {
        witness(&program).await;
        program
    });
    let mut codes = std::collections::BTreeMap::<String, usize>::new();
    for _ in 0..COMMANDS {
        let message = talk.next().await;
        let Some(Event::Error(error)) = message.event else {
            panic!("not refused: {message:?}");
        };
        *codes.entry(error.code).or_default() += 1;
    }
    flood.await.unwrap();
    let known = codes
        .keys()
        .all(|code| ["model_not_found", "queue_full"].contains(&&**code));
    assert!(known, "{codes:?}");
    let _program = witnessed.await.unwrap();
    // The response that was held all the while is as it was.
    talk.append(&held.response_id, held.outputs()).await;
    assert_eq!(talk.round_on("held").await.calls.len(), 1);
}

#[tokio::test]
async fn streams_over_the_limit_are_refused_until_there_is_room() {
    let program = Serve::new().set("server.streams_max=8").start().await;
    let mut other = Client::of(&program).await.stream().await;
    let client = Client::of(&program).await;
    let mut open = Vec::new();
    let status = loop {
        match client.try_stream().await {
            Ok(talk) => open.push(talk),
            Err(status) => break status,
        }
    };
    assert_eq!(open.len(), 7);
    assert_eq!(status.code(), Code::ResourceExhausted);
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "STREAM_LIMIT_REACHED");
    assert!(details.retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    // A call without a stream needs a place for as long as it lasts.
    let request = client.ask(proto::CreateRequest {
        create: Some(say("echo x")),
        ..Default::default()
    });
    let status = client.responses().create(request).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let rounds = held_rollout(&mut other, 20).await;
    assert_eq!(rounds[20].text, "finished 20 steps");
    open.pop().unwrap().close().await;
    let mut talk = client.stream().await;
    assert_eq!(talk.answer(say("echo room")).await.text, "room");
}

/// A message of another type, which on the wire is none of the call's.
fn nonsense() -> PromptSpan {
    PromptSpan {
        first_token: 7,
        source: 7,
        ..PromptSpan::default()
    }
}

#[tokio::test]
async fn one_that_sends_nonsense_is_told_so() {
    let program = Serve::new().start().await;
    let client = Client::of(&program).await;
    let mut raw = tonic::client::Grpc::new(client.channel.clone());
    raw.ready().await.unwrap();
    let codec = ProstCodec::<PromptSpan, ConnectResponse>::default();
    let path = "/hotloop.v1.ResponsesService/Connect".parse().unwrap();
    let mut events = raw
        .streaming(Request::new(tokio_stream::iter([nonsense()])), path, codec)
        .await
        .unwrap()
        .into_inner();
    let streamed = timeout(NEVER, events.message()).await.unwrap().unwrap_err();
    raw.ready().await.unwrap();
    let codec = ProstCodec::<PromptSpan, proto::GetResponseResponse>::default();
    let path = "/hotloop.v1.ResponsesService/GetResponse".parse().unwrap();
    let unary = raw
        .unary(Request::new(nonsense()), path, codec)
        .await
        .unwrap_err();
    for status in [streamed, unary] {
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "MALFORMED_MESSAGE");
    }

    // What is no HTTP/2 is closed, and what never says anything costs a connection for a while.
    let _silent = TcpStream::connect(program.address).await.unwrap();
    let mut stranger = TcpStream::connect(program.address).await.unwrap();
    stranger
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let read = timeout(NEVER, stranger.read_to_end(&mut answer))
        .await
        .unwrap();
    assert!(read.is_err() || answer.is_empty(), "{answer:?}");
    witness(&program).await;
}
