//! The Python clients through real grpcio against the real server.
//!
//! What they need is installed once, under target/. Where that cannot be done, for want of
//! `python3` or of a network, they are skipped, and a note on standard error says so; with `CI` or
//! `HOTLOOP_REQUIRE_PYTHON=1` in the environment that is a failure.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    unreachable_pub,
    reason = "what cannot be set up should panic"
)]

#[path = "support/packages.rs"]
mod packages;
#[path = "server/program.rs"]
mod program;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use packages::{finish, installed, or_note};
use program::{Program, Serve, run};

const KEY: &str = "0123456789abcdef";

/// Slow enough that a client can get a word in, fast enough for many samples.
const MODEL: &str = r#"
[[model]]
name = "sim-agent"
[model.sim]
tokens_per_second = 600
first_token_ms = 2
"#;

/// A Python that has what the clients need.
struct Python {
    interpreter: PathBuf,
    /// Where the generated stubs are.
    stubs: PathBuf,
}

impl Python {
    /// `None`: it cannot be had here, and that was said.
    fn find() -> Option<&'static Self> {
        static FOUND: OnceLock<Result<Python, String>> = OnceLock::new();
        let found = FOUND.get_or_init(Self::set_up);
        or_note(found, "the Python client", "HOTLOOP_REQUIRE_PYTHON")
    }

    fn set_up() -> Result<Self, String> {
        let home = installed("python", &clients().join("requirements.txt"))?;
        let interpreter = home.join("bin/python");
        let stubs = home.join("stubs");
        fs::create_dir_all(&stubs).unwrap();
        let protos = ["items", "models", "responses"].map(|it| format!("hotloop/v1/{it}.proto"));
        let generated = finish(
            Command::new(&interpreter)
                .args(["-m", "grpc_tools.protoc", "-I"])
                .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("proto"))
                .arg(format!("--python_out={}", stubs.display()))
                .arg(format!("--grpc_python_out={}", stubs.display()))
                .args(protos),
        );
        // Our protos are to blame, not the machine.
        generated.unwrap_or_else(|reason| panic!("{reason}"));
        Ok(Self { interpreter, stubs })
    }

    /// Runs a script, of the repository's root, against this server, in this directory, and gives what it printed.
    async fn plays(&self, program: &Program, dir: &Path, arguments: &[&str]) -> String {
        let (client, arguments) = arguments.split_first().unwrap();
        let mut command = tokio::process::Command::new(&self.interpreter);
        command
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(client))
            .args(["--server", &program.address.to_string()])
            .args(arguments)
            .current_dir(dir)
            .env_clear()
            .env("PYTHONPATH", &self.stubs)
            .env("HOTLOOP_API_KEY", KEY)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = run(command).await;
        let said = String::from_utf8_lossy(&output.stdout);
        let wrong = String::from_utf8_lossy(&output.stderr);
        let log = program.log();
        assert!(
            output.status.success(),
            "{client}: {}\n{said}\n{wrong}\nthe server:\n{log}",
            output.status
        );
        said.into_owned()
    }
}

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/python")
}

async fn serve() -> Program {
    let keys = format!("ada:{KEY}");
    Serve::with_config(MODEL).keys(&keys).start().await
}

#[tokio::test]
async fn every_part_of_the_protocol_is_as_promised() {
    let Some(python) = Python::find() else { return };
    let program = serve().await;
    let said = python
        .plays(&program, &clients(), &["clients/python/test_stream.py"])
        .await;
    assert!(said.ends_with("all as promised\n"), "{said}");
}

#[tokio::test]
async fn the_agent_loop_runs_in_both_styles() {
    let Some(python) = Python::find() else { return };
    let program = serve().await;
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("README.md"),
        "# All about bees\n\nThey hum.\n",
    )
    .unwrap();
    for style in [&[][..], &["--chained"]] {
        let arguments = [
            &["clients/python/agent_loop.py", "What does README.md say?"],
            style,
        ]
        .concat();
        let said = python.plays(&program, dir.path(), &arguments).await;
        assert!(
            said.contains("README.md begins: # All about bees\n"),
            "{said}"
        );
        assert!(said.contains("RESPONSE_STATUS_COMPLETED"), "{said}");
    }
}

/// A few of the rollouts by which `models/tiny-agent/README.md` measures the built-in model, with
/// enough room that chance alone does not fail it.
#[tokio::test]
#[cfg(feature = "local")]
async fn the_built_in_model_solves_tasks_that_it_has_not_seen() {
    let Some(python) = Python::find() else { return };
    let keys = format!("ada:{KEY}");
    let program = Serve::with_config("").keys(&keys).start().await;
    let evaluate = "models/tiny-agent/recipe/evaluate.py";
    let arguments = [evaluate, "--count", "16", "--at-least", "75"];
    let said = python.plays(&program, &clients(), &arguments).await;
    assert!(said.contains("rollouts right: "), "{said}");
}
