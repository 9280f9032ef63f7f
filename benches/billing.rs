//! What a step costs while its usage is recorded behind the loop's back, and the disk is slow or down (B5).
//!
//! From the moment a command leaves the client to the first event of the output, and to `done`, as in `overhead`: each step
//! adds a tool's output of 400 tokens and samples 40 from a backend that answers at once. Servers take turns, step by step,
//! each in a process of its own:
//!
//! - `log`: no journal;
//! - `journal`: one on this machine's disk, as it is configured by default;
//! - `first`: the same with `reserve = "first"`;
//! - `10 ms`, `100 ms`, `1000 ms`: a journal that takes as long for each transaction;
//! - `down`: one that cannot be written at all.
//!
//! At the end one that is down gets creates until its backlog is full: how many it took, and how soon it refused the next.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a benchmark that cannot run says so by panicking"
)]

mod support;

use std::time::{Duration, Instant};

use clap::Parser;
use hotloop::proto::{connect_request::Command, connect_response::Event};
use serde_json::{Value, json};
use support::{
    client::{Client, Step, connect, create, output, user},
    report::{Report, percentile, row},
    serve::{BACKLOG_OF_THE_FULL, Server, serve_if_told},
    text::Texts,
};

const TOOL_OUTPUT_TOKENS: usize = 400;
const OUTPUT_TOKENS: u64 = 40;
const WARM_UP_STEPS: usize = 20;

/// The servers: what they are called, and how they are told.
const SERVERS: [(&str, &str); 7] = [
    ("log", "log"),
    ("journal", "journal"),
    ("first", "first"),
    ("10 ms", "10"),
    ("100 ms", "100"),
    ("1000 ms", "1000"),
    ("down", "down"),
];

#[derive(Parser)]
struct Options {
    /// Steps of each server.
    #[arg(long, default_value_t = 600)]
    steps: usize,
    /// How long each rests between its steps, so that those that wait for nothing are measured, in microseconds.
    #[arg(long, default_value_t = 0)]
    rest_us: u64,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A conversation with one of the servers.
struct Path {
    client: Client,
    last: Step,
    first: Vec<Duration>,
    whole: Vec<Duration>,
    _server: Server,
}

impl Path {
    async fn open(told: &str, text: String) -> Self {
        let server = Server::start(&format!("0/0/fast/{told}"));
        let mut client = Client::open(connect(&server.url()).await).await;
        let begin = create(None, vec![user(text)], OUTPUT_TOKENS);
        let last = client.step(Command::Create(begin)).await;
        Self {
            client,
            last,
            first: Vec::new(),
            whole: Vec::new(),
            _server: server,
        }
    }

    async fn step(&mut self, text: String) {
        let input = vec![output(&self.last.call_ids[0], text)];
        let next = create(Some(&self.last.response_id), input, OUTPUT_TOKENS);
        self.last = self.client.step(Command::Create(next)).await;
        self.first.push(self.last.first);
        self.whole.push(self.last.whole);
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(options: Options) {
    let mut texts = Texts::new(1);
    let mut paths = Vec::new();
    for (_, told) in SERVERS {
        paths.push(Path::open(told, texts.of(200)).await);
    }
    for step in 0..options.steps + WARM_UP_STEPS {
        let text = texts.of(TOOL_OUTPUT_TOKENS);
        // Whoever comes first pays for a cold processor: each in turn.
        let count = paths.len();
        for at in 0..count {
            paths[(at + step) % count].step(text.clone()).await;
            tokio::time::sleep(Duration::from_micros(options.rest_us)).await;
        }
        if step + 1 == WARM_UP_STEPS {
            for path in &mut paths {
                path.first.clear();
                path.whole.clear();
            }
        }
    }

    let mut report = Report::new("billing");
    let base = percentile(&mut paths[0].first, 50).as_secs_f64();
    println!(
        "{:<8} {:>9} {:>9} {:>9} {:>9}  {:>8}",
        "journal", "p50 µs", "p90 µs", "p99 µs", "done µs", "to log"
    );
    for ((name, _), mut path) in SERVERS.iter().zip(paths) {
        let first = percentile(&mut path.first, 50).as_secs_f64();
        let done = percentile(&mut path.whole, 50).as_secs_f64() * 1e6;
        let parameters = json!({
            "journal": name,
            "done_p50_us": (done * 10.0).round() / 10.0,
            "p50_to_log": (first / base * 1000.0).round() / 1000.0,
        });
        let row = row(parameters, &mut path.first);
        println!(
            "{name:<8} {:>9} {:>9} {:>9} {:>9}  {:>8}",
            row["p50_us"], row["p90_us"], row["p99_us"], row["done_p50_us"], row["p50_to_log"]
        );
        report.push(row);
    }
    let bound = bound(&mut texts).await;
    println!("{bound}");
    report.push(bound);
    report.write();
}

/// A server whose journal is down takes creates up to its backlog.
async fn bound(texts: &mut Texts) -> Value {
    let mut path = Path::open("full", texts.of(200)).await;
    let mut taken = 1;
    loop {
        let start = Instant::now();
        let text = texts.of(20);
        let next = create(None, vec![user(text)], OUTPUT_TOKENS);
        path.client.send(Command::Create(next)).await;
        let answer = loop {
            match path.client.next().await.unwrap() {
                Event::Done(_) => break None,
                Event::Error(error) => break Some(error.code.clone()),
                _ => {}
            }
        };
        match answer {
            None => taken += 1,
            Some(code) => {
                let took = start.elapsed().as_secs_f64() * 1e6;
                return json!({
                    "journal": "down, shed",
                    "backlog_records_max": BACKLOG_OF_THE_FULL,
                    "taken": taken,
                    "refused_with": code,
                    "refused_after_us": took.round(),
                });
            }
        }
    }
}

fn main() {
    serve_if_told();
    run(Options::parse());
}
