//! The real program, as a process of its own.

#![allow(dead_code, reason = "each test takes the parts that it needs")]

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    sync::watch,
    time::timeout,
};

/// Long enough that reaching it is a failure, also on a busy machine.
pub(crate) const NEVER: Duration = Duration::from_secs(40);

/// Two simulated models: `fast`, the default, samples as fast as it can; `paced` takes its time.
pub(crate) const MODELS: &str = r#"
[[model]]
name = "fast"
default = true
[model.sim]
tokens_per_second = 0
first_token_ms = 0

[[model]]
name = "paced"
[model.sim]
tokens_per_second = 200
first_token_ms = 0
"#;

/// `hotloop` with these arguments, and nothing of our own environment but the path.
pub(crate) fn hotloop(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hotloop"));
    command
        .args(arguments)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Runs a command that ends by itself.
pub(crate) async fn run(mut command: Command) -> Output {
    let ended = timeout(NEVER, command.output()).await;
    ended.expect("the command never ends").unwrap()
}

/// How a server is started.
pub(crate) struct Serve {
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    config: String,
}

impl Serve {
    /// With the models of these tests and defaults for everything else.
    pub(crate) fn new() -> Self {
        Self::with_config(MODELS)
    }

    /// With this configuration file.
    pub(crate) fn with_config(config: &str) -> Self {
        Self {
            arguments: Vec::new(),
            environment: Vec::new(),
            config: config.to_owned(),
        }
    }

    /// With one setting changed.
    pub(crate) fn set(mut self, setting: &str) -> Self {
        self.arguments.extend(["--set".into(), setting.into()]);
        self
    }

    /// With the model in this directory as the default.
    pub(crate) fn model(mut self, dir: &Path) -> Self {
        let dir = dir.to_str().unwrap().to_owned();
        self.arguments.extend(["--model".into(), dir]);
        self
    }

    /// With these API keys.
    pub(crate) fn keys(mut self, keys: &str) -> Self {
        self.environment.push(("HOTLOOP_API_KEYS", keys.into()));
        self
    }

    /// Starts it, and waits until it listens.
    pub(crate) async fn start(self) -> Program {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("hotloop.toml");
        fs::write(&config, &self.config).unwrap();
        let mut command = hotloop(&["serve", "--listen", "127.0.0.1:0", "--config"]);
        command
            .arg(config)
            .args(&self.arguments)
            .envs(self.environment)
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (written, log) = watch::channel(Vec::new());
        tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                written.send_modify(|log: &mut Vec<Arc<str>>| log.push(line.into()));
            }
        });
        let mut program = Program {
            address: ([0, 0, 0, 0], 0).into(),
            child,
            log,
            dir,
        };
        let line = program.says(&["hotloop serves gRPC on "]).await;
        program.address = line.rsplit(' ').next().unwrap().parse().unwrap();
        program
    }
}

/// A server that runs. It is killed when this is dropped.
pub(crate) struct Program {
    pub(crate) address: SocketAddr,
    child: Child,
    log: watch::Receiver<Vec<Arc<str>>>,
    dir: TempDir,
}

impl Program {
    /// A URL for clients.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits for a line of its log that holds all these texts, and gives it back.
    pub(crate) async fn says(&self, texts: &[&str]) -> Arc<str> {
        let mut log = self.log.clone();
        let said = |log: &Vec<Arc<str>>| log.iter().any(|line| holds(line, texts));
        match timeout(NEVER, log.wait_for(said)).await {
            Ok(Ok(log)) => log.iter().find(|line| holds(line, texts)).unwrap().clone(),
            Ok(Err(_)) | Err(_) => panic!("never said {texts:?}, but:\n{}", self.log()),
        }
    }

    /// The lines so far that hold all these texts.
    pub(crate) fn said(&self, texts: &[&str]) -> Vec<Arc<str>> {
        let log = self.log.borrow();
        log.iter()
            .filter(|line| holds(line, texts))
            .cloned()
            .collect()
    }

    /// Its log so far.
    pub(crate) fn log(&self) -> String {
        self.log.borrow().join("\n")
    }

    /// Its file of settings.
    pub(crate) fn config(&self) -> PathBuf {
        self.dir.path().join("hotloop.toml")
    }

    /// Sends a signal, such as `TERM`.
    pub(crate) async fn signal(&self, signal: &str) {
        let id = self.child.id().expect("it has ended").to_string();
        let sent = Command::new("kill").args(["-s", signal, &id]).status();
        assert!(sent.await.unwrap().success());
    }

    /// Waits until it has ended.
    pub(crate) async fn ends(&mut self) -> ExitStatus {
        let ended = timeout(NEVER, self.child.wait()).await;
        ended.expect("it never ends").unwrap()
    }

    /// How much of the memory is its own, in MiB.
    pub(crate) fn resident_mib(&self) -> u64 {
        let id = self.child.id().expect("it has ended");
        let status = fs::read_to_string(PathBuf::from(format!("/proc/{id}/status"))).unwrap();
        let line = status
            .lines()
            .find_map(|it| it.strip_prefix("VmRSS:"))
            .unwrap();
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        kib / 1024
    }
}

/// Writes another configuration and has it read.
pub(crate) async fn reconfigure(program: &Program, config: &str) {
    fs::write(program.config(), config).unwrap();
    program.signal("HUP").await;
}

fn holds(line: &str, texts: &[&str]) -> bool {
    texts.iter().all(|text| line.contains(text))
}
