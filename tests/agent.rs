//! The agent against a scripted server: each test plays the server's side of a conversation over
//! loopback, and reads as its transcript.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a script that cannot go on should panic"
)]

use std::{fs, future::Future, path::Path, pin::Pin, time::Duration};

use clap::Parser as _;
use hotloop::{
    agent::{AgentError, ApiKey, Args, Outcome, Screen, Summary, exit_code, run_on},
    proto::{
        self, Append, Appended, Create, Created, Done, Error, FunctionCall, FunctionCallOutput,
        GoAway, IncompleteReason, Item, Message, OutputItemDone, OutputText, OutputTextDelta,
        PromptReport, ReasoningTextDelta, ResponseStatus, Retry, Timing, Usage,
        connect_request::Command,
        connect_response::Event,
        content_part, item,
        responses_service_server::{ResponsesService, ResponsesServiceServer},
    },
};
use regex::Regex;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// No conversation here takes a second, unless somebody waits for what never comes.
const TEST_TIME_MAX: Duration = Duration::from_secs(20);

// The server's side.

/// A server whose streams are handed to the test as they are opened.
struct Scripted {
    url: String,
    streams: mpsc::Receiver<Peer>,
}

impl Scripted {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (opened, streams) = mpsc::channel(8);
        let service = ResponsesServiceServer::new(Service { opened });
        tokio::spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Self { url, streams }
    }

    async fn stream(&mut self) -> Peer {
        self.streams.recv().await.unwrap()
    }
}

struct Service {
    opened: mpsc::Sender<Peer>,
}

type Events = Pin<Box<dyn Stream<Item = Result<proto::ConnectResponse, Status>> + Send>>;

#[tonic::async_trait]
impl ResponsesService for Service {
    type ConnectStream = Events;
    type CreateStream = Events;

    async fn connect(
        &self,
        request: Request<Streaming<proto::ConnectRequest>>,
    ) -> Result<Response<Events>, Status> {
        let authorization = request
            .metadata()
            .get("authorization")
            .map(|value| value.to_str().unwrap().to_owned());
        if authorization.as_deref() == Some("Bearer wrong") {
            return Err(Status::unauthenticated("this key is not known"));
        }
        let (events, outgoing) = mpsc::channel(32);
        let peer = Peer {
            authorization,
            commands: request.into_inner(),
            events,
            request_id: String::new(),
            response_id: String::new(),
            sequence_number: 0,
        };
        assert!(self.opened.send(peer).await.is_ok());
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }

    async fn create(&self, _: Request<proto::CreateRequest>) -> Result<Response<Events>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_response(
        &self,
        _: Request<proto::GetResponseRequest>,
    ) -> Result<Response<proto::GetResponseResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_response(
        &self,
        _: Request<proto::DeleteResponseRequest>,
    ) -> Result<Response<proto::DeleteResponseResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_input_items(
        &self,
        _: Request<proto::ListInputItemsRequest>,
    ) -> Result<Response<proto::ListInputItemsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_prompt(
        &self,
        _: Request<proto::GetPromptRequest>,
    ) -> Result<Response<proto::GetPromptResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// The server's end of one stream.
struct Peer {
    authorization: Option<String>,
    commands: Streaming<proto::ConnectRequest>,
    events: mpsc::Sender<Result<proto::ConnectResponse, Status>>,
    /// Of the command that was read last.
    request_id: String,
    response_id: String,
    sequence_number: u64,
}

impl Peer {
    async fn command(&mut self) -> Command {
        let request = self.commands.message().await.unwrap().unwrap();
        assert_eq!(request.lane, "");
        self.request_id = request.request_id;
        request.command.unwrap()
    }

    async fn create(&mut self) -> Create {
        match self.command().await {
            Command::Create(create) => create,
            other => panic!("not a create: {other:?}"),
        }
    }

    async fn append(&mut self) -> Append {
        match self.command().await {
            Command::Append(append) => append,
            other => panic!("not an append: {other:?}"),
        }
    }

    /// The client has closed its side, or gone.
    async fn ends(&mut self) {
        if let Ok(Some(request)) = self.commands.message().await {
            panic!("one more command: {request:?}");
        }
    }

    async fn say(&mut self, event: Event) {
        self.sequence_number += 1;
        let message = proto::ConnectResponse {
            lane: String::new(),
            response_id: self.response_id.clone(),
            request_id: self.request_id.clone(),
            sequence_number: self.sequence_number,
            event: Some(event),
        };
        self.events.send(Ok(message)).await.unwrap();
    }

    async fn created(&mut self, response_id: &str) {
        self.response_id = response_id.to_owned();
        self.say(Event::Created(Created::default())).await;
    }

    async fn appended(&mut self) {
        self.say(Event::Appended(Appended::default())).await;
    }

    async fn item(&mut self, item: Item) {
        let item = Some(item);
        self.say(Event::OutputItemDone(Box::new(OutputItemDone {
            output_index: 0,
            item,
        })))
        .await;
    }

    async fn text(&mut self, text: &str) {
        let delta = text.to_owned();
        self.say(Event::OutputTextDelta(OutputTextDelta {
            delta,
            ..OutputTextDelta::default()
        }))
        .await;
        self.item(message(text)).await;
    }

    async fn awaits(&mut self, samples: u32, call_ids: &[&str]) {
        let call_ids = call_ids.iter().map(|id| (*id).to_owned()).collect();
        self.say(Event::Done(Box::new(Done {
            call_ids,
            ..done(ResponseStatus::AwaitingInput, samples)
        })))
        .await;
    }

    async fn completes(&mut self, samples: u32) {
        self.say(Event::Done(Box::new(done(
            ResponseStatus::Completed,
            samples,
        ))))
        .await;
    }

    async fn refuses(&mut self, code: &str, retry: Retry) {
        let response_id = std::mem::take(&mut self.response_id);
        self.say(Event::Error(Box::new(error(code, retry)))).await;
        self.response_id = response_id;
    }

    async fn loses(self) {
        let status = Status::unavailable("the cable was pulled");
        self.events.send(Err(status)).await.unwrap();
    }
}

fn error(code: &str, retry: Retry) -> Error {
    Error {
        code: code.to_owned(),
        message: "as the script says".to_owned(),
        param: String::new(),
        retry: retry.into(),
        retry_after_ms: 1,
    }
}

/// A `done` after so many samples of the response: each took 100 tokens and gave 10.
fn done(status: ResponseStatus, samples: u32) -> Done {
    Done {
        status: status.into(),
        usage: Some(Usage {
            input_tokens: 100 * samples,
            output_tokens: 10 * samples,
            total_tokens: 110 * samples,
            samples,
            ..Usage::default()
        }),
        prompt: Some(PromptReport {
            reused_tokens: 1_060,
            encoded_tokens: 40,
            ..PromptReport::default()
        }),
        timing: Some(Timing {
            started_us: 10,
            validated_us: 20,
            checked_us: 30,
            rendered_us: 130,
            dispatched_us: 150,
            first_token_us: 500,
            last_token_us: 900,
            done_us: 1_000,
        }),
        ..Done::default()
    }
}

fn user(text: &str) -> Item {
    Item {
        item: Some(item::Item::UserText(text.to_owned())),
        ..Item::default()
    }
}

fn message(text: &str) -> Item {
    let text = OutputText {
        text: text.to_owned(),
        logprobs: Vec::new(),
    };
    let part = proto::ContentPart {
        part: Some(content_part::Part::OutputText(text)),
    };
    Item {
        id: "msg_1".to_owned(),
        item: Some(item::Item::Message(Message {
            role: proto::Role::Assistant.into(),
            content: vec![part],
        })),
        ..Item::default()
    }
}

fn call(call_id: &str, name: &str, arguments: &str) -> Item {
    Item {
        id: format!("fc_{call_id}"),
        item: Some(item::Item::FunctionCall(FunctionCall {
            call_id: call_id.to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        })),
        ..Item::default()
    }
}

fn reads(call_id: &str, file: &str) -> Item {
    call(call_id, "read_file", &format!(r#"{{"path":"{file}"}}"#))
}

fn output(call_id: &str, output: &str) -> Item {
    Item {
        item: Some(item::Item::FunctionCallOutput(FunctionCallOutput {
            call_id: call_id.to_owned(),
            output: output.to_owned(),
        })),
        ..Item::default()
    }
}

// The agent's side.

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn args(url: &str, dir: &Path, more: &[&str]) -> Args {
    let dir = dir.to_str().unwrap();
    let line = ["agent", "--server", url, "--dir", dir, "the task"];
    let mut args = Cli::try_parse_from(line.iter().chain(more)).unwrap().args;
    args.api_key = Some(ApiKey::new("right".to_owned()));
    args
}

fn dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "alpha\n").unwrap();
    fs::write(dir.path().join("b"), "beta\n").unwrap();
    dir
}

type Ended = (Result<Summary, AgentError>, String);

/// Runs the agent beside the script of the server, and gives what it printed.
async fn play(args: Args, script: impl Future<Output = ()>) -> Ended {
    play_until(args, std::future::pending(), script).await
}

async fn play_until(
    args: Args,
    interrupt: impl Future<Output = ()>,
    script: impl Future<Output = ()>,
) -> Ended {
    let mut out = Vec::new();
    let both = async {
        tokio::join!(
            run_on(args, Screen::new(&mut out, false), interrupt),
            script
        )
    };
    let (ended, ()) = tokio::time::timeout(TEST_TIME_MAX, both).await.unwrap();
    (ended, String::from_utf8(out).unwrap())
}

/// A text without what differs from run to run: how long tools took and where the time went.
fn timeless(text: &str) -> String {
    let took = Regex::new(r"(?m)^(> .*)  [0-9.]+ (?:µs|ms|s), ").unwrap();
    let wall = Regex::new(r"(tool calls?), [0-9.]+ (?:µs|ms|s)").unwrap();
    let share = Regex::new(r"[0-9.]+ %").unwrap();
    let text = took.replace_all(text, "$1  T, ");
    let text = wall.replace_all(&text, "$1, T");
    share.replace_all(&text, "P %").into_owned()
}

const WATERFALL: &str = "\x20 started         10 µs  ▏
  validated       10 µs  ▏
  checked         10 µs  █
  rendered       100 µs   ████
  dispatched      20 µs       █
  first token    350 µs        ██████████████
  last token     400 µs                      ████████████████
  done           100 µs                                      ████
  tokens      1,060 reused + 40 encoded, 10 sampled
";

#[tokio::test]
async fn held_runs_calls_in_parallel_and_appends_early() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(
        &server.url,
        dir.path(),
        &["--model", "m", "--instructions", "be brief"],
    );
    let script = async {
        let mut peer = server.stream().await;
        assert_eq!(peer.authorization.as_deref(), Some("Bearer right"));
        let create = peer.create().await;
        assert_eq!(create.input, [user("the task")]);
        assert_eq!(create.model.as_deref(), Some("m"));
        assert_eq!(create.instructions.as_deref(), Some("be brief"));
        assert_eq!(create.tools.len(), 3);
        assert!(create.hold);
        peer.created("resp_1").await;
        let delta = "I look.".to_owned();
        peer.say(Event::ReasoningTextDelta(ReasoningTextDelta {
            output_index: 0,
            delta,
        }))
        .await;
        peer.item(reads("c1", "a")).await;
        // The model still samples, and the first output is there.
        let first = Append {
            response_id: "resp_1".to_owned(),
            input: vec![output("c1", "alpha\n")],
        };
        assert_eq!(peer.append().await, first);
        peer.appended().await;
        peer.item(reads("c2", "b")).await;
        peer.item(reads("c3", "none")).await;
        peer.awaits(1, &["c2", "c3"]).await;
        let mut outputs = Vec::new();
        for _ in 0..2 {
            outputs.extend(peer.append().await.input);
            peer.appended().await;
        }
        outputs.sort_by_key(|item| format!("{item:?}"));
        let missing = "error: No such file or directory (os error 2)";
        assert_eq!(outputs, [output("c2", "beta\n"), output("c3", missing)]);
        peer.text("Two files.").await;
        peer.completes(2).await;
        peer.ends().await;
    };
    let (ended, text) = play(args, script).await;
    let summary = ended.as_ref().unwrap();
    assert_eq!(summary.outcome, Outcome::Completed);
    assert_eq!((summary.steps, summary.tool_calls), (2, 3));
    assert_eq!(exit_code(&ended), 0);

    // The two calls of the same moment may end in either order.
    let (c2, c3) = (
        "> read_file {\"path\":\"b\"}  T, 5 B\n",
        "> read_file {\"path\":\"none\"}  T, 45 B  error\n",
    );
    let text = timeless(&text);
    let calls = text.replace(c2, "").replace(c3, "");
    assert_eq!(text.len(), calls.len() + c2.len() + c3.len());
    assert_eq!(
        calls,
        format!(
            "\
I look.
> read_file {{\"path\":\"a\"}}  T, 6 B
step 1  1.0 ms from received to done
{WATERFALL}\
Two files.
step 2  1.0 ms from received to done
{WATERFALL}\
done: 2 steps, 3 tool calls, T
  tokens   200 input (0 cached by the engine), 20 output (0 reasoning)
  prompts  2,120 tokens reused, 80 encoded
  time     model P %, tools P %, hotloop P %, wire and client P %
"
        )
    );
}

#[tokio::test]
async fn held_goes_on_when_every_output_came_before_the_done() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.append().await;
        peer.appended().await;
        peer.awaits(1, &[]).await;
        peer.item(reads("c2", "b")).await;
        peer.awaits(2, &["c2"]).await;
        assert_eq!(peer.append().await.input, [output("c2", "beta\n")]);
        peer.appended().await;
        peer.completes(3).await;
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(ended.unwrap().steps, 3);
}

#[tokio::test]
async fn held_needs_no_done_between_samples() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.append().await;
        peer.appended().await;
        peer.text("One file.").await;
        peer.completes(2).await;
        peer.ends().await;
    };
    let (ended, _) = play(args, script).await;
    let summary = ended.unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Completed, 2));
}

#[tokio::test]
async fn chained_collects_the_outputs_into_the_next_create() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &["--style", "chained"]);
    let script = async {
        let mut peer = server.stream().await;
        let create = peer.create().await;
        assert!(!create.hold);
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.item(reads("c2", "b")).await;
        peer.completes(1).await;
        let next = peer.create().await;
        let mut outputs = next.input.clone();
        outputs.sort_by_key(|item| format!("{item:?}"));
        assert_eq!(outputs, [output("c1", "alpha\n"), output("c2", "beta\n")]);
        // What is inherited is not sent again.
        let expected = Create {
            previous_response_id: "resp_1".to_owned(),
            input: next.input.clone(),
            ..Create::default()
        };
        assert_eq!(next, expected);
        peer.created("resp_2").await;
        peer.text("Done.").await;
        peer.completes(1).await;
    };
    let (ended, _) = play(args, script).await;
    let summary = ended.unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Completed, 2));
    assert_eq!(summary.tokens.input, 200);
}

#[tokio::test]
async fn a_call_that_was_broken_off_is_none() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        let mut broken = call("c1", "read_file", r#"{"path": "#);
        broken.set_status(proto::ItemStatus::Incomplete);
        peer.item(broken).await;
        peer.text("I meant to read.").await;
        peer.completes(1).await;
    };
    let (ended, _) = play(args, script).await;
    let summary = ended.unwrap();
    assert_eq!(
        (summary.outcome, summary.tool_calls),
        (Outcome::Completed, 0)
    );
}

#[tokio::test]
async fn what_is_safe_to_send_again_is_sent_again() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        let create = peer.create().await;
        peer.refuses("rate_limit_exceeded", Retry::Safe).await;
        assert_eq!(peer.create().await, create);
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.awaits(1, &["c1"]).await;
        let append = peer.append().await;
        peer.refuses("backend_unavailable", Retry::Safe).await;
        assert_eq!(peer.append().await, append);
        peer.appended().await;
        peer.completes(2).await;
    };
    let (ended, text) = play(args, script).await;
    assert_eq!(ended.unwrap().outcome, Outcome::Completed);
    assert!(text.starts_with("! rate_limit_exceeded: as the script says; trying again\n"));
}

#[tokio::test]
async fn retries_are_bounded() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        for _ in 0..6 {
            peer.create().await;
            peer.refuses("queue_full", Retry::Safe).await;
        }
        peer.ends().await;
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(
        ended.as_ref().unwrap_err().to_string(),
        "queue_full: as the script says"
    );
    assert_eq!(exit_code(&ended), 1);
}

#[tokio::test]
async fn what_would_fail_again_ends_the_rollout() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.refuses("model_not_found", Retry::Never).await;
        peer.ends().await;
    };
    let (ended, _) = play(args, script).await;
    assert!(matches!(ended, Err(AgentError::Refused { code, .. }) if code == "model_not_found"));
}

#[tokio::test]
async fn a_server_that_has_lost_the_state_gets_the_whole_history() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &["--style", "chained"]);
    let script = async {
        let mut peer = server.stream().await;
        let first = peer.create().await;
        peer.created("resp_1").await;
        peer.text("I look.").await;
        peer.item(reads("c1", "a")).await;
        peer.completes(1).await;
        peer.create().await;
        peer.refuses("previous_response_not_found", Retry::ResendFull)
            .await;
        let history = vec![
            user("the task"),
            message("I look."),
            reads("c1", "a"),
            output("c1", "alpha\n"),
        ];
        assert_eq!(
            peer.create().await,
            Create {
                input: history,
                ..first
            }
        );
        peer.created("resp_2").await;
        peer.completes(1).await;
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(ended.unwrap().steps, 2);
}

#[tokio::test]
async fn a_failed_response_whose_tools_ran_is_not_sampled_again() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &["--style", "chained"]);
    let script = async {
        let mut peer = server.stream().await;
        let first = peer.create().await;
        let failed = || Done {
            error: Some(error("backend_error", Retry::Safe)),
            ..done(ResponseStatus::Failed, 0)
        };
        peer.created("resp_1").await;
        peer.say(Event::Done(Box::new(failed()))).await;
        // Nothing of it was seen: the same again.
        assert_eq!(peer.create().await, first);
        peer.created("resp_2").await;
        peer.item(reads("c1", "a")).await;
        peer.say(Event::Done(Box::new(failed()))).await;
        let history = vec![user("the task"), reads("c1", "a"), output("c1", "alpha\n")];
        assert_eq!(
            peer.create().await,
            Create {
                input: history,
                ..first
            }
        );
        peer.created("resp_3").await;
        peer.completes(1).await;
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(ended.unwrap().tool_calls, 1);
}

#[tokio::test]
async fn a_lost_stream_is_continued_by_id_and_then_from_the_history() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        let first = peer.create().await;
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.awaits(1, &["c1"]).await;
        // The output is on its way when the stream breaks: nobody has accepted it.
        peer.append().await;
        peer.loses().await;

        let mut peer = server.stream().await;
        let resumed = Create {
            previous_response_id: "resp_1".to_owned(),
            input: vec![output("c1", "alpha\n")],
            hold: true,
            ..Create::default()
        };
        assert_eq!(peer.create().await, resumed);
        peer.created("resp_2").await;
        peer.item(reads("c2", "b")).await;
        peer.loses().await;

        let mut peer = server.stream().await;
        let history = vec![
            user("the task"),
            reads("c1", "a"),
            output("c1", "alpha\n"),
            reads("c2", "b"),
            output("c2", "beta\n"),
        ];
        assert_eq!(
            peer.create().await,
            Create {
                input: history,
                ..first
            }
        );
        peer.created("resp_3").await;
        peer.completes(1).await;
    };
    let (ended, text) = play(args, script).await;
    assert_eq!(ended.unwrap().outcome, Outcome::Completed);
    assert_eq!(
        text.matches("! the stream was lost (the cable was pulled)\n")
            .count(),
        2
    );
}

#[tokio::test]
async fn a_third_loss_in_a_row_ends_the_rollout() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        for _ in 0..3 {
            let mut peer = server.stream().await;
            peer.create().await;
            peer.loses().await;
        }
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(
        ended.unwrap_err().to_string(),
        "the stream was lost 3 times in a row: the cable was pulled"
    );
}

#[tokio::test]
async fn a_disagreement_after_a_loss_is_settled_by_the_history() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.awaits(1, &["c1"]).await;
        peer.append().await;
        peer.loses().await;

        let mut peer = server.stream().await;
        assert_eq!(peer.create().await.previous_response_id, "resp_1");
        // The output had arrived after all.
        peer.refuses("no_such_call", Retry::Never).await;
        let create = peer.create().await;
        assert_eq!(create.previous_response_id, "");
        assert_eq!(create.input.len(), 3);
        peer.created("resp_2").await;
        peer.completes(1).await;
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(ended.unwrap().outcome, Outcome::Completed);
}

#[tokio::test]
async fn before_the_server_closes_the_stream_a_held_response_moves() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        peer.say(Event::GoAway(GoAway {
            time_left_ms: 30_000,
            reason: "draining".to_owned(),
            resumable: true,
        }))
        .await;
        peer.item(reads("c1", "a")).await;
        peer.awaits(1, &["c1"]).await;
        match peer.command().await {
            Command::Done(finish) => assert_eq!(finish.response_id, "resp_1"),
            other => panic!("not a finish: {other:?}"),
        }
        peer.completes(1).await;
        peer.ends().await;
        drop(peer);

        let mut peer = server.stream().await;
        let create = peer.create().await;
        assert_eq!(create.previous_response_id, "resp_1");
        assert_eq!(create.input, [output("c1", "alpha\n")]);
        peer.created("resp_2").await;
        peer.completes(1).await;
    };
    let (ended, text) = play(args, script).await;
    assert_eq!(ended.unwrap().steps, 2);
    assert!(
        text.starts_with("! the server will close the stream in 30.0 s (draining)\n"),
        "{text}"
    );
}

#[tokio::test]
async fn before_the_server_closes_the_stream_a_chain_moves() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &["--style", "chained"]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.say(Event::GoAway(GoAway {
            resumable: false,
            ..GoAway::default()
        }))
        .await;
        peer.completes(1).await;
        peer.ends().await;
        drop(peer);

        let mut peer = server.stream().await;
        let create = peer.create().await;
        assert_eq!(create.previous_response_id, "");
        assert_eq!(create.input.len(), 3);
        peer.created("resp_2").await;
        peer.completes(1).await;
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(ended.unwrap().outcome, Outcome::Completed);
}

#[tokio::test]
async fn an_interruption_cancels_and_tells_what_was_used() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &["--allow", "run"]);
    let (press, pressed) = oneshot::channel();
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        // A command that would take longer than the test does not keep the agent.
        peer.item(call("c1", "run_command", r#"{"command":"sleep 600"}"#))
            .await;
        peer.item(reads("c2", "a")).await;
        assert_eq!(peer.append().await.input, [output("c2", "alpha\n")]);
        peer.appended().await;
        peer.awaits(1, &["c1"]).await;
        press.send(()).unwrap();
        match peer.command().await {
            Command::Cancel(cancel) => assert_eq!(cancel.response_id, "resp_1"),
            other => panic!("not a cancel: {other:?}"),
        }
        peer.say(Event::Done(Box::new(done(ResponseStatus::Cancelled, 1))))
            .await;
        peer.ends().await;
    };
    let interrupt = async { pressed.await.unwrap() };
    let (ended, text) = play_until(args, interrupt, script).await;
    let summary = ended.as_ref().unwrap();
    assert_eq!(summary.outcome, Outcome::Interrupted);
    assert_eq!((summary.tokens.input, summary.tokens.output), (100, 10));
    assert_eq!(exit_code(&ended), 130);
    assert!(
        text.contains("interrupted: 1 step, 1 tool call, "),
        "{text}"
    );
}

#[tokio::test]
async fn an_interruption_before_the_response_has_an_id_waits_for_it() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let (press, pressed) = oneshot::channel();
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        press.send(()).unwrap();
        tokio::task::yield_now().await;
        peer.created("resp_1").await;
        assert!(matches!(peer.command().await, Command::Cancel(_)));
        peer.say(Event::Done(Box::new(done(ResponseStatus::Cancelled, 0))))
            .await;
    };
    let interrupt = async { pressed.await.unwrap() };
    let (ended, _) = play_until(args, interrupt, script).await;
    assert_eq!(ended.unwrap().outcome, Outcome::Interrupted);
}

#[tokio::test]
async fn the_limit_of_steps_holds_in_both_styles() {
    let dir = dir();
    for style in ["held", "chained"] {
        let mut server = Scripted::start().await;
        let args = args(
            &server.url,
            dir.path(),
            &["--steps-max", "2", "--style", style],
        );
        let script = async {
            let mut peer = server.stream().await;
            peer.create().await;
            peer.created("resp_1").await;
            peer.item(reads("c1", "a")).await;
            if style == "held" {
                peer.append().await;
                peer.appended().await;
                peer.awaits(1, &[]).await;
                peer.item(reads("c2", "b")).await;
                peer.awaits(2, &["c2"]).await;
                // The output would start a third sample.
                assert!(matches!(peer.command().await, Command::Done(_)));
                peer.completes(2).await;
            } else {
                peer.completes(1).await;
                peer.create().await;
                peer.created("resp_2").await;
                peer.item(reads("c2", "b")).await;
                peer.completes(1).await;
            }
            peer.ends().await;
        };
        let (ended, _) = play(args, script).await;
        let summary = ended.as_ref().unwrap();
        assert_eq!(
            (summary.outcome, summary.steps),
            (Outcome::StepsMax, 2),
            "{style}"
        );
        assert_eq!(exit_code(&ended), 1);
    }
}

#[tokio::test]
async fn an_incomplete_answer_is_told_apart() {
    let dir = dir();
    for (reason, outcome) in [
        (IncompleteReason::MaxOutputTokens, Outcome::CutShort),
        (IncompleteReason::ContentFilter, Outcome::Filtered),
    ] {
        let mut server = Scripted::start().await;
        let args = args(&server.url, dir.path(), &[]);
        let script = async {
            let mut peer = server.stream().await;
            peer.create().await;
            peer.created("resp_1").await;
            peer.say(Event::Done(Box::new(Done {
                incomplete_reason: reason.into(),
                ..done(ResponseStatus::Incomplete, 1)
            })))
            .await;
        };
        let (ended, _) = play(args, script).await;
        assert_eq!(ended.unwrap().outcome, outcome);
    }
}

#[tokio::test]
async fn a_held_response_that_waited_too_long_is_continued() {
    let dir = dir();
    let mut server = Scripted::start().await;
    let args = args(&server.url, dir.path(), &[]);
    let script = async {
        let mut peer = server.stream().await;
        peer.create().await;
        peer.created("resp_1").await;
        peer.item(reads("c1", "a")).await;
        peer.awaits(1, &["c1"]).await;
        // The append crosses the end of the response on the wire.
        peer.append().await;
        let append_id = peer.request_id.clone();
        peer.say(Event::Done(Box::new(Done {
            incomplete_reason: IncompleteReason::Interrupted.into(),
            ..done(ResponseStatus::Incomplete, 1)
        })))
        .await;
        peer.request_id = append_id;
        peer.refuses("response_not_open", Retry::Never).await;
        let create = peer.create().await;
        assert_eq!(create.previous_response_id, "resp_1");
        assert_eq!(create.input, [output("c1", "alpha\n")]);
        peer.created("resp_2").await;
        peer.completes(1).await;
    };
    let (ended, _) = play(args, script).await;
    assert_eq!(ended.unwrap().outcome, Outcome::Completed);
}

#[tokio::test]
async fn a_key_that_is_not_known_is_not_tried_again() {
    let dir = dir();
    let server = Scripted::start().await;
    let mut args = args(&server.url, dir.path(), &[]);
    args.api_key = Some(ApiKey::new("wrong".to_owned()));
    assert!(!format!("{args:?}").contains("wrong"));
    let (ended, _) = play(args, async {}).await;
    assert!(matches!(
        ended,
        Err(AgentError::Closed { message, .. }) if message == "this key is not known"
    ));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_so() {
    let dir = dir();
    // A port that was just free. Nobody takes it between these two lines and the connection but
    // another program by chance, so the test first sees that it is closed.
    let address = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    assert!(TcpStream::connect(address).await.is_err());
    let url = format!("http://{address}");
    let (ended, _) = play(args(&url, dir.path(), &[]), async {}).await;
    let text = ended.as_ref().unwrap_err().to_string();
    assert!(
        text.starts_with(&format!("no server answers at {url}: ")),
        "{text}"
    );
    assert_eq!(exit_code(&ended), 1);
    assert!(AgentError::NoServer.to_string().contains("hotloop serve"));
}

#[tokio::test]
async fn wrong_usage_has_its_own_exit_status() {
    let dir = dir();
    let url = "http://127.0.0.1:1";
    let mut wrong = vec![
        args("https://127.0.0.1:1", dir.path(), &[]),
        args("127.0.0.1:1", dir.path(), &[]),
        args(url, &dir.path().join("none"), &[]),
        args(url, &dir.path().join("a"), &[]),
    ];
    let mut blank = args(url, dir.path(), &[]);
    blank.task = " ".to_owned();
    wrong.push(blank);
    for args in wrong {
        let (ended, _) = play(args, async {}).await;
        assert_eq!(exit_code(&ended), 2, "{ended:?}");
    }
}
