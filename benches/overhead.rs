//! What a step costs outside of the backend, by the length of the history (B1).
//!
//! From the moment a command leaves the client to the first event of the output, with a backend that answers at once,
//! in two processes over loopback. Each step adds a tool's output of 400 tokens to a conversation of calls and outputs
//! under ten tools. The paths take turns, step by step:
//!
//! - `limit`: the same bytes over a bare stream of tonic, there and back;
//! - `chained`: a create that continues the last response;
//! - `held`: an append to a response that is held;
//! - `stateless`: a new conversation each time, with the whole history in its create.
//!
//! `server_cpu_us` is what the server's process computed for a step in all, up to its end.

#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot run says so by panicking"
)]

mod support;

use std::time::Duration;

use clap::Parser;
use hotloop::proto::{Append, ConnectRequest, Item, connect_request::Command};
use prost::Message as _;
use serde_json::{Value, json};
use support::{
    client::{Client, call, connect, create, output, user},
    echo::EchoStream,
    report::{Plot, Report, cpu_time, points, row},
    serve::{HUGGING_FACE, Server, serve_if_told},
    text::Texts,
};

const TOOL_OUTPUT_TOKENS: usize = 400;
const OUTPUT_TOKENS: u64 = 40;
/// Tokens that a step of the history takes besides the tool's output.
const STEP_FRAME_TOKENS: usize = 60;
const WARM_UP_STEPS: usize = 10;

#[derive(Parser)]
struct Options {
    /// Tokens of history, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 100_000, 300_000, 1_000_000])]
    history: Vec<usize>,
    /// Which of the paths to take, separated by commas.
    #[arg(long, value_delimiter = ',', default_values = ["limit", "chained", "held", "stateless"])]
    path: Vec<String>,
    /// Encoders, separated by commas: `fast`, or `huggingface` for the first one alone.
    #[arg(long, value_delimiter = ',', default_values = ["fast", HUGGING_FACE])]
    tokenizer: Vec<String>,
    /// Steps of each path at each length.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// The longest history that is sent whole in each step.
    #[arg(long, default_value_t = 300_000)]
    stateless_max: usize,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Times of a path, and what the server did for it.
#[derive(Default)]
struct Path {
    first: Vec<Duration>,
    cpu: Duration,
    encoded: Vec<u32>,
    prompt: u32,
    /// The server's own clock: since the command, up to when each stage was over.
    stages: [Vec<u32>; STAGES.len()],
}

/// Of a step, as `done.timing` tells them.
const STAGES: [&str; 8] = [
    "started",
    "validated",
    "checked",
    "rendered",
    "dispatched",
    "first_token",
    "last_token",
    "done",
];

#[tokio::main(flavor = "current_thread")]
async fn run(options: Options) {
    let echo = Server::start("echo");
    let mut report = Report::new("overhead");
    println!(
        "{:<11} {:>9}  {:<10} {:>9} {:>9} {:>9} {:>9} {:>8}",
        "tokenizer", "history", "path", "p50 µs", "p90 µs", "p99 µs", "cpu µs", "encoded"
    );
    for tokenizer in &options.tokenizer {
        let server = Server::start(&format!("0/0/{tokenizer}"));
        for history in &options.history {
            for mut row in measure(*history, &options, &server, &echo).await {
                row["tokenizer"] = json!(tokenizer);
                println!(
                    "{tokenizer:<11} {history:>9}  {:<10} {:>9} {:>9} {:>9} {:>9} {:>8}",
                    row["path"].as_str().unwrap(),
                    row["p50_us"],
                    row["p90_us"],
                    row["p99_us"],
                    row["server_cpu_us"],
                    row["tokens_encoded"],
                );
                report.push(row);
            }
        }
        verdict(&report, tokenizer);
    }
    report.write();
    let line = |path: &str, tokenizer: &str| {
        let with = [("path", json!(path)), ("tokenizer", json!(tokenizer))];
        points(report.rows(), &with, "history_tokens", "p50_us")
    };
    let mut lines = Vec::new();
    for tokenizer in &options.tokenizer {
        for path in ["stateless", "chained", "held"] {
            lines.push((format!("{path}, {tokenizer}"), line(path, tokenizer)));
        }
    }
    lines.push((
        "a bare stream".to_owned(),
        line("limit", &options.tokenizer[0]),
    ));
    Plot {
        file: "overhead",
        title: "A step outside of the backend, p50",
        x: "tokens of history",
        y: "µs",
        lines,
    }
    .write();
}

async fn measure(history: usize, options: &Options, server: &Server, echo: &Server) -> Vec<Value> {
    let mut texts = Texts::new(history as u64);
    let channel = connect(&server.url()).await;
    let mut limit = EchoStream::open(&echo.url()).await;
    let mut chained = Client::open(channel.clone()).await;
    let mut held = Client::open(channel.clone()).await;
    let mut stateless = Client::open(channel).await;

    let takes = |path: &str| options.path.iter().any(|it| it == path);
    let past = past(history, &mut texts);
    let begin = create(None, past.clone(), OUTPUT_TOKENS);
    let mut chain = chained.step(Command::Create(begin.clone())).await;
    let hold = hotloop::proto::Create {
        hold: true,
        ..begin
    };
    let mut hold = held.step(Command::Create(hold)).await;

    let mut paths: [(&str, Path); 4] =
        ["limit", "chained", "held", "stateless"].map(|name| (name, Path::default()));
    let whole_steps = match history {
        _ if history > options.stateless_max || !takes("stateless") => 0,
        // A whole history takes long to encode.
        _ => (3_000_000 / history).clamp(5, options.steps),
    };
    for step in 0..options.steps + WARM_UP_STEPS {
        let measured = step >= WARM_UP_STEPS;
        let text = texts.of(TOOL_OUTPUT_TOKENS);
        let input = vec![output(&chain.call_ids[0], text.clone())];
        let command = Command::Create(create(Some(&chain.response_id), input, OUTPUT_TOKENS));

        if takes("limit") {
            let command = Some(command.clone());
            let message = ConnectRequest {
                command,
                ..ConnectRequest::default()
            };
            let before = cpu_time(echo.id());
            let took = limit.round(message.encode_to_vec().into()).await;
            if measured {
                paths[0].1.first.push(took);
                paths[0].1.cpu += cpu_time(echo.id()) - before;
            }
        }

        if takes("chained") {
            let before = cpu_time(server.id());
            chain = chained.step(command).await;
            if measured {
                paths[1].1.add(&chain, cpu_time(server.id()) - before);
            }
        }

        if takes("held") {
            let append = Append {
                response_id: hold.response_id.clone(),
                input: vec![output(&hold.call_ids[0], text.clone())],
            };
            let before = cpu_time(server.id());
            hold = held.step(Command::Append(append)).await;
            if measured {
                paths[2].1.add(&hold, cpu_time(server.id()) - before);
            }
        }

        if measured && step - WARM_UP_STEPS < whole_steps {
            let mut input = past.clone();
            input.extend([call("call_last"), output("call_last", text)]);
            let command = Command::Create(create(None, input, OUTPUT_TOKENS));
            let before = cpu_time(server.id());
            let whole = stateless.step(command).await;
            paths[3].1.add(&whole, cpu_time(server.id()) - before);
        }
    }
    let rows = paths.into_iter().filter(|(_, path)| !path.first.is_empty());
    rows.map(|(name, path)| path.row(name, history)).collect()
}

impl Path {
    fn add(&mut self, step: &support::client::Step, cpu: Duration) {
        self.first.push(step.first);
        self.cpu += cpu;
        let prompt = step.done.prompt.as_ref().unwrap();
        self.encoded.push(prompt.encoded_tokens);
        self.prompt = prompt.tokens;
        let timing = step.done.timing.unwrap();
        let at = [
            timing.started_us,
            timing.validated_us,
            timing.checked_us,
            timing.rendered_us,
            timing.dispatched_us,
            timing.first_token_us,
            timing.last_token_us,
            timing.done_us,
        ];
        for (stage, at) in self.stages.iter_mut().zip(at) {
            stage.push(at);
        }
    }

    fn row(mut self, name: &str, history: usize) -> Value {
        self.encoded.sort_unstable();
        let encoded = self.encoded.get(self.encoded.len() / 2).copied();
        let stages = STAGES
            .iter()
            .zip(&mut self.stages)
            .filter_map(|(stage, at)| {
                at.sort_unstable();
                Some(((*stage).to_owned(), json!(at.get(at.len() / 2)?)))
            });
        let stages: serde_json::Map<String, Value> = stages.collect();
        let cpu = self.cpu.as_secs_f64() * 1e6 / self.first.len() as f64;
        let parameters = json!({
            "path": name,
            "history_tokens": history,
            "prompt_tokens": self.prompt,
            "tokens_encoded": encoded.unwrap_or(0),
            "server_cpu_us": (cpu * 10.0).round() / 10.0,
            "stages_p50_us": stages,
        });
        row(parameters, &mut self.first)
    }
}

/// A conversation of so many tokens: a task, then calls and their outputs.
fn past(tokens: usize, texts: &mut Texts) -> Vec<Item> {
    let mut items = vec![user(texts.of(200.min(tokens)))];
    let steps = tokens.saturating_sub(200) / (TOOL_OUTPUT_TOKENS + STEP_FRAME_TOKENS);
    for step in 0..steps {
        let call_id = format!("call_{step}");
        items.push(call(&call_id));
        items.push(output(&call_id, texts.of(TOOL_OUTPUT_TOKENS)));
    }
    items
}

/// The figures beside what they should be.
fn verdict(report: &Report, tokenizer: &str) {
    let p50 = |path: &str, history: usize| {
        let mut rows = report
            .rows()
            .iter()
            .filter(|row| row["tokenizer"] == tokenizer);
        let row = rows.find(|row| row["path"] == path && row["history_tokens"] == history)?;
        row["p50_us"].as_f64()
    };
    println!();
    for path in ["chained", "held"] {
        if let (Some(long), Some(short)) = (p50(path, 1_000_000), p50(path, 1_000)) {
            println!("{path}: 1M takes {:.2} x of 1k (at most 1.2)", long / short);
        }
        if let (Some(ours), Some(limit)) = (p50(path, 100_000), p50("limit", 100_000)) {
            println!(
                "{path}: {:.2} x of the bare stream at 100k (at most 3, 2 is the goal)",
                ours / limit
            );
        }
        if let (Some(ours), Some(whole)) = (p50(path, 100_000), p50("stateless", 100_000)) {
            println!(
                "{path}: {:.0} x less than stateless at 100k (at least 50)",
                whole / ours
            );
        }
    }
}

fn main() {
    serve_if_told();
    run(Options::parse());
}
