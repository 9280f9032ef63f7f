//! What a held stream costs in memory (B4).
//!
//! Resident memory of the server's process for each idle stream, on shared connections, with nothing and with a history
//! behind it; for each token of history beyond its text; and over a long rollout on one stream. The control is a bare
//! bidirectional stream of tonic.

#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot run says so by panicking"
)]

mod support;

use std::{fs, time::Duration};

use clap::Parser;
use hotloop::proto::connect_request::Command;
use serde_json::json;
use support::{
    client::{Client, Step, connect, create, output, user},
    echo::EchoStream,
    report::{Plot, Report, points},
    serve::{Server, serve_if_told},
    text::Texts,
};

const STREAMS_PER_CONNECTION: usize = 200;
const OUTPUT_TOKENS: u64 = 40;

#[derive(Parser)]
struct Options {
    /// Idle streams.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 5_000])]
    streams: Vec<usize>,
    /// Streams with a history, and its tokens.
    #[arg(long, default_value_t = 100)]
    loaded: usize,
    #[arg(long, default_value_t = 10_000)]
    history: usize,
    /// Steps of the long rollout, of some 180 tokens each.
    #[arg(long, default_value_t = 1_100)]
    steps: usize,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn run(options: Options) {
    let mut report = Report::new("memory");
    for streams in &options.streams {
        let server = Server::start("0");
        // The first stream pays for what all share.
        let warm = Client::open(connect(&server.url()).await).await;
        let before = resident(server.id()).await;
        let mut open = Vec::new();
        for stream in 0..*streams {
            if stream % STREAMS_PER_CONNECTION == 0 {
                open.push((connect(&server.url()).await, Vec::new()));
            }
            let (channel, clients) = open.last_mut().unwrap();
            let client = Client::open(channel.clone()).await;
            clients.push(client);
        }
        let bytes = (resident(server.id()).await - before) / *streams as f64;
        println!("{streams} idle streams: {bytes:.0} bytes each (at most 12288)");
        report.push(json!({ "path": "hotloop", "streams": streams, "history_tokens": 0, "rss_bytes_per_stream": bytes.round() }));
        drop((warm, open));

        let echo = Server::start("echo");
        let warm = EchoStream::open(&echo.url()).await;
        let before = resident(echo.id()).await;
        let mut open = Vec::new();
        let mut channel = None;
        for stream in 0..*streams {
            if stream % STREAMS_PER_CONNECTION == 0 {
                channel = Some(connect(&echo.url()).await);
            }
            open.push(EchoStream::over(channel.clone().unwrap()).await);
        }
        let bytes = (resident(echo.id()).await - before) / *streams as f64;
        println!("{streams} bare streams: {bytes:.0} bytes each");
        report.push(json!({ "path": "bare", "streams": streams, "history_tokens": 0, "rss_bytes_per_stream": bytes.round() }));
        drop((warm, open));
    }

    let server = Server::start("0");
    let mut texts = Texts::new(1);
    let channel = connect(&server.url()).await;
    let mut first = Client::open(channel.clone()).await;
    begin(&mut first, "Hello.".to_owned()).await;
    let before = resident(server.id()).await;
    let mut clients = Vec::new();
    let (mut bytes, mut tokens) = (0, 0);
    for _ in 0..options.loaded {
        let text = texts.of(options.history);
        bytes += text.len();
        let mut client = Client::open(channel.clone()).await;
        let step = begin(&mut client, text).await;
        tokens += step.done.prompt.unwrap().tokens as usize;
        clients.push(client);
    }
    let grown = resident(server.id()).await - before;
    let each = grown / options.loaded as f64;
    let per_token = (grown - bytes as f64) / tokens as f64;
    println!(
        "{} streams with {} tokens each: {each:.0} bytes each, {per_token:.1} a token beyond its text (at most 12)",
        options.loaded, options.history
    );
    report.push(json!({
        "path": "hotloop", "streams": options.loaded, "history_tokens": options.history,
        "rss_bytes_per_stream": each.round(), "bytes_per_token": (per_token * 10.0).round() / 10.0,
    }));
    drop(clients);

    let server = Server::start("0");
    let mut client = Client::open(connect(&server.url()).await).await;
    let mut last = begin(&mut client, "Begin.".to_owned()).await;
    let before = resident(server.id()).await;
    let mut bytes = 0;
    for _ in 0..options.steps {
        let text = texts.of(140);
        bytes += text.len();
        let input = vec![output(&last.call_ids[0], text)];
        last = client
            .step(Command::Create(create(
                Some(&last.response_id),
                input,
                OUTPUT_TOKENS,
            )))
            .await;
    }
    let grown = resident(server.id()).await - before;
    let tokens = f64::from(last.done.prompt.as_ref().unwrap().tokens);
    let per_token = (grown - bytes as f64) / tokens;
    let step = grown / options.steps as f64;
    println!(
        "{} steps to {tokens} tokens: {step:.0} bytes a step, {per_token:.1} a token beyond the outputs' text",
        options.steps
    );
    report.push(json!({
        "path": "hotloop", "streams": 1, "steps": options.steps, "history_tokens": tokens,
        "rss_bytes_per_stream": grown.round(), "bytes_per_token": (per_token * 10.0).round() / 10.0,
    }));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let later = resident(server.id()).await - before;
    println!("3 s later without new input: {:+.0} bytes", later - grown);
    report.push(
        json!({ "path": "hotloop", "measure": "idle", "grown_bytes": (later - grown).round() }),
    );
    report.write();
    let line = |path: &str| {
        let with = [("path", json!(path)), ("history_tokens", json!(0))];
        let points = points(report.rows(), &with, "streams", "rss_bytes_per_stream");
        (path.to_owned(), points)
    };
    Plot {
        file: "memory",
        title: "Memory of an idle stream",
        x: "streams",
        y: "bytes",
        lines: ["hotloop", "bare"].map(line).into(),
    }
    .write();
}

/// Begins a conversation with this message.
async fn begin(client: &mut Client, text: String) -> Step {
    let input = vec![user(text)];
    client
        .step(Command::Create(create(None, input, OUTPUT_TOKENS)))
        .await
}

/// Resident memory of a process in bytes, once nothing moves any more.
async fn resident(process: u32) -> f64 {
    let read = || {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        line.split_whitespace()
            .next()
            .unwrap()
            .parse::<f64>()
            .unwrap()
            * 1024.0
    };
    let mut last = read();
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = read();
        if (now - last).abs() < 64.0 * 1024.0 {
            return now;
        }
        last = now;
    }
}

fn main() {
    serve_if_told();
    run(Options::parse());
}
