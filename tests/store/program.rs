//! The program itself, killed and stopped and started again over one file.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use hotloop::proto::{
    self as pb, connect_response::Event, responses_service_client::ResponsesServiceClient,
};
use tempfile::TempDir;
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};

/// Long enough that reaching it is a failure, also on a busy machine.
const NEVER: Duration = Duration::from_secs(60);

const KEYS: &str = "acme:0123456789abcdef,other:fedcba9876543210";
const ACME: &str = "Bearer 0123456789abcdef";
const OTHER: &str = "Bearer fedcba9876543210";

/// A file of responses beside the file of settings, and a model that takes no time.
const CONFIG: &str = r#"
    [store]
    path = "responses"
    [log]
    filter = "info,hotloop::store=debug"
    [[model]]
    name = "sim"
    [model.sim]
    tokens_per_second = 0
    first_token_ms = 0
"#;

/// The program over a file in this directory.
struct Program {
    child: Running,
    lines: mpsc::Receiver<String>,
    client: ResponsesServiceClient<Channel>,
}

/// A process that does not outlive the test, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    async fn start(dir: &TempDir) -> Self {
        let config = dir.path().join("hotloop.toml");
        std::fs::write(&config, CONFIG).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_hotloop"))
            .env("HOTLOOP_API_KEYS", KEYS)
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(&config)
            .stderr(Stdio::piped())
            .spawn()
            .map(Running)
            .unwrap();
        let stderr = BufReader::new(child.0.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                // A test that has ended reads no more.
                let _ = sender.send(line.unwrap());
            }
        });
        let serves = "hotloop serves gRPC on ";
        let line = wait_for(&lines, serves);
        let address = line.split(serves).nth(1).unwrap();
        let channel = Channel::from_shared(format!("http://{address}")).unwrap();
        Self {
            client: ResponsesServiceClient::new(channel.connect().await.unwrap()),
            child,
            lines,
        }
    }

    /// Waits until this response is in the file.
    fn stored(&self, id: &str) {
        wait_for(&self.lines, &format!("stored id={id}"));
    }

    /// As a crash ends it.
    fn kill(self) {
        drop(self.child);
    }

    /// As an operator ends it.
    async fn stop(mut self) {
        let pid = self.child.0.id().to_string();
        let told = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(told.unwrap().success());
        // The connection closes in a task of its own, meanwhile.
        drop(self.client);
        let ended = tokio::task::spawn_blocking(move || self.child.0.wait());
        assert!(ended.await.unwrap().unwrap().success());
    }

    /// Runs a response to its end: its id, and how it ended.
    async fn create(&mut self, create: pb::Create) -> (String, pb::Done) {
        let request = pb::CreateRequest {
            create: Some(create),
            ..pb::CreateRequest::default()
        };
        let call = self.client.create(by(ACME, request));
        let mut events = call.await.unwrap().into_inner();
        loop {
            let response = events.message().await.unwrap().unwrap();
            match response.event.unwrap() {
                Event::Done(done) => return (response.response_id, *done),
                Event::Error(error) => panic!("{error:?}"),
                _ => {}
            }
        }
    }
}

fn wait_for(lines: &mpsc::Receiver<String>, text: &str) -> String {
    loop {
        let line = lines.recv_timeout(NEVER).expect("it says so");
        if line.contains(text) {
            return line;
        }
    }
}

fn by<T>(key: &'static str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("authorization", MetadataValue::from_static(key));
    request
}

fn user(text: &str) -> pb::Item {
    pb::Item {
        item: Some(pb::item::Item::UserText(text.to_owned())),
        ..pb::Item::default()
    }
}

/// The rollout of an agent: as many steps as asked for, each a create on the one before it. Its
/// last response, and how that one ended.
async fn rollout(program: &mut Program, steps: u32) -> (String, pb::Done) {
    let step = pb::FunctionTool {
        name: "step".to_owned(),
        parameters: r#"{"type":"object","properties":{"n":{"type":"integer"}}}"#.to_owned(),
        ..pb::FunctionTool::default()
    };
    let mut create = pb::Create {
        input: vec![user(&format!("rollout {steps}"))],
        tools: vec![pb::Tool {
            tool: Some(pb::tool::Tool::Function(step)),
        }],
        ..pb::Create::default()
    };
    loop {
        let (id, done) = program.create(create).await;
        if done.call_ids.is_empty() {
            return (id, done);
        }
        let output = |call_id: &String| pb::Item {
            item: Some(pb::item::Item::FunctionCallOutput(pb::FunctionCallOutput {
                call_id: call_id.clone(),
                output: "ok – ✓".to_owned(),
            })),
            ..pb::Item::default()
        };
        create = pb::Create {
            previous_response_id: id,
            input: done.call_ids.iter().map(output).collect(),
            ..pb::Create::default()
        };
    }
}

/// What can be asked about a response.
async fn asked(
    program: &mut Program,
    key: &'static str,
    id: &str,
) -> Result<(pb::Response, pb::GetPromptResponse, Vec<pb::Item>), tonic::Status> {
    let response_id = id.to_owned();
    let request = pb::GetResponseRequest { response_id };
    let response = program.client.get_response(by(key, request)).await?;
    let request = pb::GetPromptRequest {
        response_id: id.to_owned(),
        include_sampled: true,
        ..pb::GetPromptRequest::default()
    };
    let prompt = program.client.get_prompt(by(key, request)).await?;
    let request = pb::ListInputItemsRequest {
        response_id: id.to_owned(),
        ..pb::ListInputItemsRequest::default()
    };
    let input = program.client.list_input_items(by(key, request)).await?;
    let response = response.into_inner().response.unwrap();
    Ok((response, prompt.into_inner(), input.into_inner().items))
}

fn on(id: &str, text: &str) -> pb::Create {
    pb::Create {
        previous_response_id: id.to_owned(),
        input: vec![user(text)],
        ..pb::Create::default()
    }
}

#[tokio::test]
async fn a_killed_server_goes_on_where_it_was() {
    let dir = TempDir::new().unwrap();
    let mut program = Program::start(&dir).await;
    let (last, done) = rollout(&mut program, 5).await;
    let before = asked(&mut program, ACME, &last).await.unwrap();
    let (_, expected) = program.create(on(&last, "echo more")).await;
    program.stored(&last);
    program.kill();

    let mut program = Program::start(&dir).await;
    let refused = asked(&mut program, OTHER, &last).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(asked(&mut program, ACME, &last).await.unwrap(), before);
    let (_, next) = program.create(on(&last, "echo more")).await;
    assert_eq!(next.prompt, expected.prompt);
    let reused = next.prompt.unwrap().reused_tokens;
    assert!(reused >= done.prompt.unwrap().tokens, "{reused}");

    let delete = || pb::DeleteResponseRequest {
        response_id: last.clone(),
    };
    let deleted = program.client.delete_response(by(OTHER, delete())).await;
    assert_eq!(deleted.unwrap_err().code(), Code::NotFound);
    program
        .client
        .delete_response(by(ACME, delete()))
        .await
        .unwrap();
    program.kill();

    let mut program = Program::start(&dir).await;
    let gone = asked(&mut program, ACME, &last).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    program.kill();
}

#[tokio::test]
async fn a_server_that_is_told_to_stop_writes_everything_first() {
    let dir = TempDir::new().unwrap();
    let mut program = Program::start(&dir).await;
    let (last, done) = rollout(&mut program, 20).await;
    program.stop().await;

    let mut program = Program::start(&dir).await;
    let (response, prompt, _) = asked(&mut program, ACME, &last).await.unwrap();
    assert_eq!(prompt.fingerprint, done.prompt.unwrap().fingerprint);
    assert_eq!(response.usage, done.usage);
    program.kill();
}

#[tokio::test]
async fn a_file_that_cannot_be_used_keeps_the_server_from_starting() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("responses");
    std::fs::write(&path, "something else").unwrap();
    let ended = Command::new(env!("CARGO_BIN_EXE_hotloop"))
        .args(["serve", "--listen", "127.0.0.1:0", "--set"])
        .arg(format!("store.path={}", path.display()))
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    let expected = format!(
        "hotloop: store.path {}: the medium failed: ",
        path.display()
    );
    assert!(said.contains(&expected), "{said}");
}
