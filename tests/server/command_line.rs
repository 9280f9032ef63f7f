//! The program as somebody at a terminal meets it.

use std::{fs, path::Path, process::Output};

use tokio::net::{TcpListener, TcpSocket};

use crate::program::{Serve, hotloop, run};

/// Its exit code and what it said on standard error, before any port was opened.
fn refused(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("serves gRPC"), "{text}");
    (output.status.code().unwrap(), text)
}

#[tokio::test]
async fn a_wrong_configuration_is_named_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hotloop.toml");
    let path = file.to_str().unwrap();
    for (text, said) in [
        (
            "[server]\n\nlsten = \"127.0.0.1:0\"\n",
            ":3: server.lsten: ",
        ),
        ("[stream]\nlanes_max = \"many\"\n", ":2: stream.lanes_max: "),
        (
            "[[model]]\nname = \"x\"\nbackend = \"gpt\"\n",
            ":3: model[0].backend: ",
        ),
        ("[server\n", ":1: "),
    ] {
        fs::write(&file, text).unwrap();
        for command in ["serve", "check-config"] {
            let (code, text) = refused(&run(hotloop(&[command, "--config", path])).await);
            assert_eq!(code, 2, "{text}");
            assert!(text.contains(&format!("{path}{said}")), "{text}");
        }
    }
    for (arguments, said) in [
        (
            &["serve", "--set", "server.lsten=x"][..],
            "there is no setting server.lsten",
        ),
        (
            &["serve", "--set", "stream.lanes_max=0"],
            "stream.lanes_max is 0, but must be from 1",
        ),
        (
            &["serve", "--listen", "0.0.0.0:0"],
            "set HOTLOOP_API_KEYS=tenant:key",
        ),
        (
            &["serve", "--config", "/nowhere.toml"],
            "cannot read /nowhere.toml: No such file",
        ),
    ] {
        let (code, text) = refused(&run(hotloop(arguments)).await);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(said), "{text}");
    }
}

#[tokio::test]
async fn a_model_that_cannot_be_served_is_named_before_the_port_opens() {
    let (code, text) = refused(&run(hotloop(&["serve", "--model", "/nowhere"])).await);
    assert_eq!(code, 2);
    assert!(
        text.contains("--model: cannot find /nowhere: No such file"),
        "{text}"
    );

    // A directory is filled file by file, and at each step what it lacks is named.
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("mine");
    fs::create_dir(&model).unwrap();
    let (tokenizer, template) = (crate::local::tokenizer(), crate::local::TEMPLATE.as_bytes());
    for (file, bytes, said) in [
        ("README.md", &b"A model."[..], "mine has no tokenizer.json"),
        (
            "tokenizer.json",
            b"{",
            "tokenizer.json: it cannot be understood: EOF",
        ),
        ("tokenizer.json", tokenizer, "mine has no chat template"),
        (
            "chat_template.jinja",
            b"\n{% for %}",
            "the chat template has a syntax error in line 2",
        ),
        (
            "chat_template.jinja",
            template,
            "mine/config.json: No such file",
        ),
        (
            "config.json",
            b"{",
            "mine/config.json cannot be understood: EOF",
        ),
        (
            "config.json",
            br#"{"model_type": "mamba"}"#,
            "\"mamba\" is not supported",
        ),
    ] {
        fs::write(model.join(file), bytes).unwrap();
        let mut command = hotloop(&["serve", "--listen", "127.0.0.1:0", "--model"]);
        command.arg(&model);
        let (code, text) = refused(&run(command).await);
        assert_eq!(code, 1, "{text}");
        assert!(text.starts_with("hotloop: model `mine`: "), "{text}");
        assert!(text.contains(said), "{said} is not in {text}");
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, text) = refused(&run(hotloop(&["serve", "--listen", &address])).await);
    assert_eq!(code, 1);
    assert!(
        text.contains(&format!(
            "cannot listen on {address}: Address already in use"
        )),
        "{text}"
    );
}

/// A folder with something to find.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bees.md"), "All about bees\nThey hum.\n").unwrap();
    fs::write(dir.path().join("ants.md"), "All about ants\n").unwrap();
    dir
}

async fn agent(server: &str, dir: &Path, arguments: &[&str]) -> Output {
    let mut command = hotloop(&["agent", "--server", server, "--dir"]);
    command
        .arg(dir)
        .args(arguments)
        .arg("What is in this folder?");
    run(command).await
}

#[tokio::test]
async fn the_agent_looks_at_a_folder_in_both_styles() {
    let program = Serve::new().start().await;
    let dir = folder();
    for style in [&[][..], &["--style", "held"], &["--style", "chained"]] {
        let output = agent(&program.url(), dir.path(), style).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{output:?}");
        for said in [
            "> list_dir",
            r#"> read_file {"path": "ants.md""#,
            "- bees.md (25 bytes) begins: All about bees",
            "  rendered ",
            "  first token ",
            "█",
            " reused + ",
            "done: 3 steps, 3 tool calls",
        ] {
            assert!(text.contains(said), "{said} is not in\n{text}");
        }
        // Nobody watches: no colours.
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}

#[tokio::test]
async fn the_agent_says_why_it_cannot_go_on() {
    let dir = folder();
    let program = Serve::new().keys("ada:0123456789abcdef").start().await;
    let output = agent(&program.url(), dir.path(), &[]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("API key"), "{text}");

    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let output = agent(&address, dir.path(), &[]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains(&format!("no server answers at {address}")),
        "{text}"
    );

    // Bound and not listened on, so that nobody else serves there meanwhile.
    let default = TcpSocket::new_v4().unwrap();
    if let Err(error) = default.bind("127.0.0.1:50051".parse().unwrap()) {
        eprintln!("a part is skipped, since port 50051 is in use: {error}");
        return;
    }
    let output = run(hotloop(&["agent", "What is here?"])).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("start one with: hotloop serve"), "{text}");
}
