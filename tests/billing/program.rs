//! The program over a journal in a directory, and a client of it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command as Process, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use hotloop::proto::{
    self as pb, connect_request::Command, connect_response::Event,
    responses_service_client::ResponsesServiceClient,
};
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, transport::Channel};

/// Long enough that reaching it is a failure, also on a busy machine.
pub(crate) const NEVER: Duration = Duration::from_secs(40);

const MODELS: &str = r#"
    [[model]]
    name = "fast"
    default = true
    [model.sim]
    rules = "rules.toml"
    tokens_per_second = 0
    first_token_ms = 0
    [[model]]
    name = "paced"
    [model.sim]
    rules = "rules.toml"
    tokens_per_second = 500
    first_token_ms = 0
"#;

const RULES: &str = r#"
    [[rule]]
    user = '^hang'
    [[rule.step]]
    text = "this is all that ever comes"
    fail = "hang"
    [[rule]]
    user = '^break'
    [[rule.step]]
    text = "this is all before it breaks"
    fail = "error"
    [[rule]]
    user = '^call'
    tools = ["step"]
    [[rule.step]]
    calls = '[{"name": "step", "arguments": {"n": 1}}]'
    [[rule.step]]
    text = "finished"
    [[rule]]
    user = '^words (\d+)'
    [[rule.step]]
    text = "{% for n in range(captures[1]|int) %} word{% endfor %}"
"#;

/// A directory with a journal, and the settings of the program over it.
pub(crate) struct Place {
    dir: TempDir,
    environment: Vec<(&'static str, String)>,
}

/// The program. It is killed when this is dropped.
pub(crate) struct Program {
    child: Child,
    log: mpsc::Receiver<String>,
    pub(crate) client: ResponsesServiceClient<Channel>,
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A record as the journal has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) response: String,
    pub(crate) end: String,
    pub(crate) reason: String,
    pub(crate) finish: String,
    pub(crate) input: u64,
    pub(crate) new: u64,
    pub(crate) reused: u64,
    pub(crate) output: u64,
    pub(crate) delivered: u64,
    pub(crate) samples: u64,
    pub(crate) settled: bool,
}

impl Place {
    /// With these lines in the section `[billing]`, and what else follows it.
    pub(crate) fn new(billing: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("rules.toml"), RULES).unwrap();
        let config = format!(
            "[server]\ndrain_secs_max = 1\n[billing]\npath = \"journal\"\n{billing}\n{MODELS}"
        );
        fs::write(dir.path().join("hotloop.toml"), config).unwrap();
        Self {
            dir,
            environment: Vec::new(),
        }
    }

    /// With this variable in the program's environment.
    pub(crate) fn variable(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) async fn start(&self) -> Program {
        let mut child = Process::new(env!("CARGO_BIN_EXE_hotloop"))
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(self.path("hotloop.toml"))
            .envs(self.environment.iter().cloned())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                // Whoever reads may be gone.
                let _ = sender.send(line.unwrap());
            }
        });
        let serves = "hotloop serves gRPC on ";
        let address = loop {
            let line = lines.recv_timeout(NEVER).expect("it serves");
            if let Some(address) = line.strip_prefix(serves) {
                break address.to_owned();
            }
        };
        let channel = Channel::from_shared(format!("http://{address}")).unwrap();
        Program {
            child,
            log: lines,
            client: ResponsesServiceClient::new(channel.connect().await.unwrap()),
        }
    }

    /// All records, in the order in which they began.
    pub(crate) fn rows(&self) -> Vec<Row> {
        rows(&self.path("journal"))
    }

    /// All records, once there are so many that are settled.
    pub(crate) async fn settled(&self, count: usize) -> Vec<Row> {
        until(|| self.rows().iter().filter(|row| row.settled).count() >= count).await;
        self.rows()
    }
}

/// All records in this file, in the order in which they began.
pub(crate) fn rows(path: &Path) -> Vec<Row> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
    let connection = Connection::open_with_flags(path, flags).unwrap();
    connection.busy_timeout(NEVER).unwrap();
    let sql = "SELECT * FROM records ORDER BY reserved_at_ms, response";
    let mut query = connection.prepare(sql).unwrap();
    let rows = query.query_map([], |row| {
        let count = |column: &str| row.get::<_, i64>(column).map(|it| it as u64);
        Ok(Row {
            id: row.get("id")?,
            response: row.get("response")?,
            end: row.get("end")?,
            reason: row.get("reason")?,
            finish: row.get("finish")?,
            input: count("input_tokens")?,
            new: count("new_tokens")?,
            reused: count("reused_tokens")?,
            output: count("output_tokens")?,
            delivered: count("delivered_tokens")?,
            samples: count("samples")?,
            settled: row.get::<_, Option<i64>>("settled_at_ms")?.is_some(),
        })
    });
    rows.unwrap().map(Result::unwrap).collect()
}

/// Waits until this is so.
pub(crate) async fn until(what: impl Fn() -> bool) {
    let since = Instant::now();
    while !what() {
        assert!(since.elapsed() < NEVER, "it is never so");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Program {
    /// What it logs next, up to the line with this text.
    pub(crate) fn logs(&self, text: &str) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        while !lines.last().is_some_and(|line| line.contains(text)) {
            lines.push(self.log.recv_timeout(NEVER).expect("a line"));
        }
        lines
    }

    /// As a crash ends it.
    pub(crate) fn kill(self) {
        drop(self);
    }

    /// As an operator ends it.
    pub(crate) async fn stop(mut self) {
        let pid = self.child.id().to_string();
        let told = Process::new("kill").args(["-TERM", &pid]).status();
        assert!(told.unwrap().success());
        let ended = tokio::task::spawn_blocking(move || self.child.wait());
        assert!(ended.await.unwrap().unwrap().success());
    }

    pub(crate) async fn talk(&mut self) -> Talk {
        let (commands, outgoing) = tokio::sync::mpsc::channel(16);
        let request = Request::new(ReceiverStream::new(outgoing));
        let events = self.client.connect(request).await.unwrap();
        Talk {
            commands,
            events: events.into_inner(),
        }
    }
}

/// One stream.
pub(crate) struct Talk {
    commands: tokio::sync::mpsc::Sender<pb::ConnectRequest>,
    events: Streaming<pb::ConnectResponse>,
}

impl Talk {
    pub(crate) async fn send(&mut self, command: Command) {
        let request = pb::ConnectRequest {
            command: Some(command),
            ..pb::ConnectRequest::default()
        };
        self.commands.send(request).await.unwrap();
    }

    pub(crate) async fn create(&mut self, create: pb::Create) {
        self.send(Command::Create(create)).await;
    }

    /// The next event, with the response that it belongs to.
    pub(crate) async fn next(&mut self) -> (String, Event) {
        let next = tokio::time::timeout(NEVER, self.events.message()).await;
        let response = next.expect("an event").unwrap().expect("more");
        (response.response_id, response.event.unwrap())
    }

    /// Skips to the next event of which this makes something.
    pub(crate) async fn skip_to<T>(&mut self, what: impl Fn(Event) -> Option<T>) -> (String, T) {
        loop {
            let (id, event) = self.next().await;
            if let Some(found) = what(event) {
                return (id, found);
            }
        }
    }

    pub(crate) async fn done(&mut self) -> (String, pb::Done) {
        self.skip_to(|event| match event {
            Event::Done(done) => Some(*done),
            Event::Error(error) => panic!("{error:?}"),
            _ => None,
        })
        .await
    }

    pub(crate) async fn delta(&mut self) -> String {
        let delta = self.skip_to(|event| match event {
            Event::OutputTextDelta(_) => Some(()),
            _ => None,
        });
        delta.await.0
    }

    pub(crate) async fn error(&mut self) -> pb::Error {
        let error = self.skip_to(|event| match event {
            Event::Error(error) => Some(error),
            Event::Done(done) => panic!("{done:?}"),
            _ => None,
        });
        *error.await.1
    }
}

pub(crate) fn create(text: &str) -> pb::Create {
    pb::Create {
        input: vec![pb::Item {
            item: Some(pb::item::Item::UserText(text.to_owned())),
            ..pb::Item::default()
        }],
        ..pb::Create::default()
    }
}

pub(crate) fn paced(text: &str) -> pb::Create {
    pb::Create {
        model: Some("paced".to_owned()),
        ..create(text)
    }
}
