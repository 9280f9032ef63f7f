//! Keeping up with fast backends: tokens through one stream and through many (B3).
//!
//! - `one`: a single stream whose backend never waits, one token a chunk or all at once;
//! - `paced`: streams whose backends sample at a pace. `cpu_us_per_token` is what the server's process computed;
//!   `added_p99_us` is by how much a token came later than the pace would have it, measured from the earliest.
//!
//! Beside each stands `bare`, messages of the same size over bare streams of tonic at the same pace.

#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot run says so by panicking"
)]

mod support;

use std::time::{Duration, Instant};

use clap::Parser;
use futures::future::join_all;
use hotloop::proto::{connect_request::Command, connect_response::Event};
use serde_json::{Value, json};
use support::{
    client::{Client, connect, create, user},
    echo::flood,
    report::{Plot, Report, cpu_time, percentile, points},
    serve::{Server, serve_if_told},
};
use tokio::task::{JoinError, JoinHandle};
use tonic::transport::Channel;

/// What nearly every token of the backend's answers is.
const TOKEN: &str = " the";
/// About what an event with one token takes on the wire.
const EVENT_BYTES: usize = 60;
const STREAMS_PER_CONNECTION: usize = 50;

#[derive(Parser)]
struct Options {
    /// Tokens through one stream whose backend never waits.
    #[arg(long, default_value_t = 500_000)]
    tokens: usize,
    /// How many streams are paced, and how many tokens a second each samples.
    #[arg(long, value_delimiter = ',', default_values = ["1x4000", "100x100", "1000x20"])]
    paced: Vec<String>,
    /// How long paced streams sample, in seconds.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What came of so many tokens.
struct Came {
    tokens: usize,
    took: Duration,
    cpu: Duration,
    /// How late each came.
    late: Vec<Duration>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn run(options: Options) {
    let mut report = Report::new("throughput");
    let bare = Server::start("echo");
    println!(
        "{:<8} {:<9} {:>7} {:>9} {:>12} {:>10} {:>12}",
        "measure", "path", "streams", "pace", "tokens/s", "cpu µs", "added p99 µs"
    );
    for (path, role) in [("chunks of one", "0/1"), ("one chunk", "0/0")] {
        let server = Server::start(role);
        let came = ours(&server, 1, options.tokens, 0.0).await;
        row(&mut report, "one", path, 1, 0.0, came);
    }
    let came = theirs(&bare, 1, options.tokens, 0.0).await;
    row(&mut report, "one", "bare", 1, 0.0, came);
    for paced in &options.paced {
        let (streams, pace) = paced.split_once('x').unwrap();
        let (streams, pace): (usize, f64) = (streams.parse().unwrap(), pace.parse().unwrap());
        let tokens = (pace * options.seconds) as usize;
        let server = Server::start(&format!("{pace}/1"));
        let came = ours(&server, streams, tokens, pace).await;
        row(&mut report, "paced", "hotloop", streams, pace, came);
        let came = theirs(&bare, streams, tokens, pace).await;
        row(&mut report, "paced", "bare", streams, pace, came);
    }
    report.write();
    let line = |path: &str| {
        let with = [("measure", json!("paced")), ("path", json!(path))];
        let points = points(report.rows(), &with, "streams", "cpu_us_per_token");
        (path.to_owned(), points)
    };
    Plot {
        file: "throughput",
        title: "What the server computes for a token",
        x: "paced streams",
        y: "µs",
        lines: ["hotloop", "bare"].map(line).into(),
    }
    .write();
}

/// How many tokens had come by when.
type Arrivals = Vec<(usize, Instant)>;

/// Streams that run, each in a task that gives the arrivals of its tokens.
struct Run {
    start: Instant,
    cpu: Duration,
    pace: f64,
}

impl Run {
    fn begin(server: &Server, pace: f64) -> Self {
        Self {
            start: Instant::now(),
            cpu: cpu_time(server.id()),
            pace,
        }
    }

    async fn end(self, server: &Server, streams: Vec<JoinHandle<Arrivals>>, tokens: usize) -> Came {
        let arrivals = join_all(streams).await;
        let took = self.start.elapsed();
        let late = |arrivals: Result<Arrivals, JoinError>| late(&arrivals.unwrap(), self.pace);
        Came {
            tokens,
            took,
            cpu: cpu_time(server.id()) - self.cpu,
            late: arrivals.into_iter().flat_map(late).collect(),
        }
    }
}

async fn channels(url: &str, streams: usize) -> Vec<Channel> {
    let connections = streams.div_ceil(STREAMS_PER_CONNECTION);
    join_all((0..connections).map(|_| connect(url))).await
}

async fn ours(server: &Server, streams: usize, tokens: usize, pace: f64) -> Came {
    let channels = channels(&server.url(), streams).await;
    let mut clients = Vec::new();
    for stream in 0..streams {
        clients.push(Client::open(channels[stream / STREAMS_PER_CONNECTION].clone()).await);
    }
    let run = Run::begin(server, pace);
    let arrivals = clients.into_iter().map(|mut client| {
        tokio::spawn(async move {
            let create = create(None, vec![user("Go on.".to_owned())], tokens as u64);
            client.send(Command::Create(create)).await;
            let mut tokens = 0;
            let mut arrivals = Vec::new();
            while let Some(event) = client.next().await {
                match event {
                    Event::FunctionCallArgumentsDelta(delta) => {
                        // What stands around the text of the call is other tokens.
                        let more = delta.delta.matches(TOKEN).count();
                        if more > 0 {
                            tokens += more;
                            arrivals.push((tokens, Instant::now()));
                        }
                    }
                    Event::Done(_) => break,
                    Event::Error(error) => panic!("{error:?}"),
                    Event::Created(_)
                    | Event::Appended(_)
                    | Event::GoAway(_)
                    | Event::SafetyVerdict(_)
                    | Event::OutputItemAdded(_)
                    | Event::OutputTextDelta(_)
                    | Event::ReasoningTextDelta(_)
                    | Event::OutputItemDone(_) => {}
                }
            }
            arrivals
        })
    });
    run.end(server, arrivals.collect(), tokens * streams).await
}

async fn theirs(server: &Server, streams: usize, tokens: usize, pace: f64) -> Came {
    let channels = channels(&server.url(), streams).await;
    let mut open = Vec::new();
    let run = Run::begin(server, pace);
    for stream in 0..streams {
        open.push(
            flood(
                channels[stream / STREAMS_PER_CONNECTION].clone(),
                tokens,
                EVENT_BYTES,
                pace,
            )
            .await,
        );
    }
    let arrivals = open.into_iter().map(|mut messages| {
        tokio::spawn(async move {
            let mut arrivals = Vec::new();
            while messages.message().await.unwrap().is_some() {
                arrivals.push((arrivals.len() + 1, Instant::now()));
            }
            arrivals
        })
    });
    run.end(server, arrivals.collect(), tokens * streams).await
}

/// How much later than the pace each token came, where the earliest was in time.
fn late(arrivals: &[(usize, Instant)], pace: f64) -> Vec<Duration> {
    let Some((_, first)) = arrivals.first().filter(|_| pace > 0.0) else {
        return Vec::new();
    };
    let off =
        |(tokens, at): &(usize, Instant)| (*at - *first).as_secs_f64() - *tokens as f64 / pace;
    let earliest = arrivals.iter().map(off).fold(f64::INFINITY, f64::min);
    arrivals
        .iter()
        .map(|it| Duration::from_secs_f64(off(it) - earliest))
        .collect()
}

fn row(report: &mut Report, measure: &str, path: &str, streams: usize, pace: f64, mut came: Came) {
    let cpu = came.cpu.as_secs_f64() * 1e6 / came.tokens as f64;
    let rate = came.tokens as f64 / came.took.as_secs_f64();
    let late = (!came.late.is_empty()).then(|| percentile(&mut came.late, 99).as_secs_f64() * 1e6);
    let late = late.map_or(Value::Null, |late| json!(late.round()));
    println!("{measure:<8} {path:<9} {streams:>7} {pace:>9} {rate:>12.0} {cpu:>10.2} {late:>12}");
    report.push(json!({
        "measure": measure,
        "path": path,
        "streams": streams,
        "pace": pace,
        "tokens_per_second": rate.round(),
        "cpu_us_per_token": (cpu * 100.0).round() / 100.0,
        "added_p99_us": late,
        "n": came.tokens,
    }));
}

fn main() {
    serve_if_told();
    run(Options::parse());
}
