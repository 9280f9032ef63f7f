//! What a user feels: how long whole rollouts take (B2).
//!
//! Each rollout is played by four lanes, one after the other, against a backend that samples at a given pace and tools
//! that take a given time:
//!
//! - `ideal`: the backend and the tools alone, in one process;
//! - `held`: one response, to which outputs are appended;
//! - `chained`: a create for each step, which continues the last one;
//! - `stateless`: a create for each step with the whole conversation, as a stateless API has it.

#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot run says so by panicking"
)]

mod support;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Parser;
use futures::StreamExt as _;
use hotloop::{
    backend::{Backend as _, Prompt, Sampling},
    files::{BuiltIn, Files},
    item::ResponseId,
    ledger::Rope,
    model::Artifacts,
    proto::{Append, Create, Finish, Item, connect_request::Command},
};
use serde_json::{Value, json};
use support::{
    client::{Client, connect, create, output, user},
    report::{Plot, Report, percentile, points, row},
    serve::{Answering, Server, plan, serve_if_told},
    text::Texts,
    workload::{Profile, Rollout, Step, read_trace},
};

const LANES: [&str; 4] = ["ideal", "held", "chained", "stateless"];

#[derive(Parser)]
struct Options {
    /// Kinds of rollouts, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["swe", "small"])]
    profile: Vec<Profile>,
    /// Tokens a second that the backend samples.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000.0, 4_000.0])]
    pace: Vec<f64>,
    /// Milliseconds that tools take.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 100])]
    tools: Vec<u64>,
    /// How many rollouts of each kind.
    #[arg(long, default_value_t = 1)]
    rollouts: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The encoder of the server: `fast`, or `huggingface`.
    #[arg(long, default_value = "fast")]
    tokenizer: String,
    /// Plays the rollouts of this file instead: JSON lines in the form of Mooncake's traces.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A rollout with all its text, made before the clock runs.
struct Script {
    task: String,
    trunk: Leg,
    /// Each goes on from the end of the trunk.
    forks: Vec<Leg>,
}

/// Steps in a row.
struct Leg {
    steps: Vec<Step>,
    outputs: Vec<Vec<String>>,
}

impl Script {
    fn new(rollout: &Rollout, texts: &mut Texts) -> Self {
        Self {
            task: texts.of(rollout.task),
            trunk: Leg::new(&rollout.steps, texts),
            forks: rollout
                .forks
                .iter()
                .map(|steps| Leg::new(steps, texts))
                .collect(),
        }
    }

    fn len(&self) -> usize {
        self.trunk.steps.len() + self.forks.iter().map(|leg| leg.steps.len()).sum::<usize>()
    }
}

impl Leg {
    fn new(steps: &[Step], texts: &mut Texts) -> Self {
        let mut outputs = |step: &Step| step.fresh.iter().map(|tokens| texts.of(*tokens)).collect();
        Self {
            outputs: steps.iter().map(&mut outputs).collect(),
            steps: steps.to_vec(),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(options: Options) {
    let mut report = Report::new("rollout");
    let mut kinds: Vec<(String, Vec<Rollout>)> = Vec::new();
    match &options.trace {
        Some(path) => kinds.push(("trace".to_owned(), read_trace(path))),
        None => {
            for profile in &options.profile {
                let seeds = options.seed..options.seed + options.rollouts;
                kinds.push((
                    profile.name().to_owned(),
                    seeds.map(|seed| profile.draw(seed)).collect(),
                ));
            }
        }
    }
    let artifacts = Artifacts::load(&Files::BuiltIn(BuiltIn::SimAgent), None).unwrap();
    for pace in &options.pace {
        let server = Server::start(&format!("{pace}/0/{}", options.tokenizer));
        let backend = Answering::new(&artifacts, *pace, 0);
        for (kind, rollouts) in &kinds {
            let mut texts = Texts::new(options.seed);
            let scripts: Vec<Script> = rollouts
                .iter()
                .map(|it| Script::new(it, &mut texts))
                .collect();
            for tool_ms in &options.tools {
                let mut times: [Vec<Duration>; LANES.len()] = Default::default();
                let mut steps = 0;
                for (number, script) in scripts.iter().enumerate() {
                    steps += script.len();
                    for (lane, times) in LANES.iter().zip(&mut times) {
                        let name = format!("{kind}-{number}-{lane}-{tool_ms}");
                        let player = Player {
                            script,
                            name,
                            tool: Duration::from_millis(*tool_ms),
                            url: server.url(),
                        };
                        times.push(match *lane {
                            "ideal" => player.ideal(&backend).await,
                            lane => player.play(lane).await,
                        });
                    }
                }
                rows(kind, *pace, *tool_ms, steps, times, &mut report);
            }
        }
    }
    report.write();
    let (kind, tools) = (&kinds[0].0, options.tools[0]);
    let line = |lane: &&str| {
        let with = [
            ("profile", json!(kind)),
            ("tool_ms", json!(tools)),
            ("path", json!(lane)),
        ];
        let points = points(
            report.rows(),
            &with,
            "tokens_per_second",
            "step_ms_beyond_ideal",
        );
        ((*lane).to_owned(), points)
    };
    Plot {
        file: "rollout",
        title: &format!(
            "A step of rollouts `{kind}` beyond the backend, tools that take {tools} ms"
        ),
        x: "tokens a second of the backend",
        y: "ms a step more",
        lines: LANES[1..].iter().map(line).collect(),
    }
    .write();
}

/// Adds a row for each lane, and prints what each takes beyond the ideal one.
fn rows(
    kind: &str,
    pace: f64,
    tool_ms: u64,
    steps: usize,
    times: [Vec<Duration>; LANES.len()],
    report: &mut Report,
) {
    let total = |times: &[Duration]| times.iter().sum::<Duration>().as_secs_f64();
    let ideal = total(&times[0]);
    println!("\n{kind}, {pace} tokens/s, tools {tool_ms} ms, {steps} steps");
    for (lane, mut times) in LANES.iter().zip(times) {
        let all = total(&times);
        let beyond = (all / ideal - 1.0) * 100.0;
        let step_ms = (all - ideal) * 1e3 / steps as f64;
        println!(
            "  {lane:<10} {:>9.1} ms  {beyond:>+7.2} %  {step_ms:>7.2} ms a step more",
            all * 1e3
        );
        let wall = percentile(&mut times, 50).as_secs_f64() * 1e3;
        let parameters: Value = json!({
            "profile": kind,
            "tokens_per_second": pace,
            "tool_ms": tool_ms,
            "path": lane,
            "steps": steps,
            "wall_ms": (wall * 10.0).round() / 10.0,
            "total_ms": (all * 1e4).round() / 10.0,
            "beyond_ideal_percent": (beyond * 100.0).round() / 100.0,
            "step_ms_beyond_ideal": (step_ms * 100.0).round() / 100.0,
        });
        report.push(row(parameters, &mut times));
    }
}

struct Player<'a> {
    script: &'a Script,
    name: String,
    tool: Duration,
    url: String,
}

/// Where a lane stands: how the last sample ended, and, for a lane that sends it, all that was said.
struct Stand {
    last: support::client::Step,
    history: Vec<Item>,
}

impl Player<'_> {
    /// What the calls of a step give back, once the tools have run.
    async fn tools(&self, leg: &Leg, step: usize, call_ids: &[String]) -> Vec<Item> {
        if !self.tool.is_zero() {
            tokio::time::sleep(self.tool).await;
        }
        let outputs = call_ids.iter().zip(&leg.outputs[step]);
        outputs
            .map(|(call_id, text)| output(call_id, text.clone()))
            .collect()
    }

    /// The trunk, and then each fork from its end.
    async fn play(&self, lane: &str) -> Duration {
        let mut client = Client::open(connect(&self.url).await).await;
        let Script { task, trunk, forks } = self.script;
        let start = Instant::now();
        let begin = vec![user(task.clone())];
        let end = self
            .leg(lane, &mut client, trunk, "trunk", None, begin)
            .await;
        // What is held cannot be continued by others, and keeps its lane.
        let finish = async |client: &mut Client, end: &Stand| {
            if lane == "held" {
                let response_id = end.last.response_id.clone();
                client.step(Command::Done(Finish { response_id })).await;
            }
        };
        if !forks.is_empty() {
            finish(&mut client, &end).await;
        }
        for (number, fork) in forks.iter().enumerate() {
            let input = self
                .tools(trunk, trunk.steps.len() - 1, &end.last.call_ids)
                .await;
            let fork = self
                .leg(
                    lane,
                    &mut client,
                    fork,
                    &number.to_string(),
                    Some(&end),
                    input,
                )
                .await;
            finish(&mut client, &fork).await;
        }
        start.elapsed()
    }

    /// Steps in a row, the first one with this input.
    async fn leg(
        &self,
        lane: &str,
        client: &mut Client,
        leg: &Leg,
        name: &str,
        from: Option<&Stand>,
        mut input: Vec<Item>,
    ) -> Stand {
        let key = format!("{}-{name}", self.name);
        let mut previous = from.map(|from| from.last.response_id.clone());
        let mut history = from.map_or_else(Vec::new, |from| from.history.clone());
        for step in 0.. {
            let command = if lane == "held" && step > 0 {
                let response_id = previous.clone().unwrap();
                Command::Append(Append { response_id, input })
            } else {
                let (previous, input) = if lane == "stateless" {
                    history.extend(input);
                    (None, history.clone())
                } else {
                    (previous.as_deref(), input)
                };
                Command::Create(Create {
                    prompt_cache_key: Some(key.clone()),
                    logit_bias: plan(&leg.steps),
                    hold: lane == "held",
                    ..create(previous, input, 1)
                })
            };
            let last = client.step(command).await;
            if lane == "stateless" {
                // As its own output it would be known; to a stateless service it is text from outside.
                let output = last.output.iter().cloned();
                history.extend(output.map(|item| Item {
                    id: String::new(),
                    ..item
                }));
            }
            if step + 1 == leg.steps.len() {
                return Stand { last, history };
            }
            input = self.tools(leg, step, &last.call_ids).await;
            previous = Some(last.response_id);
        }
        unreachable!("a leg has steps")
    }

    /// The backend and the tools alone.
    async fn ideal(&self, backend: &Answering) -> Duration {
        let Script { trunk, forks, .. } = self.script;
        let start = Instant::now();
        for (name, leg) in std::iter::once(trunk).chain(forks).enumerate() {
            let key = format!("{}-{name}", self.name);
            let mut plan: Vec<(u32, f32)> = plan(&leg.steps).into_iter().collect();
            plan.sort_by_key(|(at, _)| *at);
            for step in 0..leg.steps.len() {
                let mut answer = backend.sample(prompt(&key, &plan));
                while answer.next().await.is_some() {}
                if step + 1 < leg.steps.len() {
                    self.tools(leg, step, &[]).await;
                }
            }
        }
        for _ in forks {
            self.tools(trunk, 0, &[]).await;
        }
        start.elapsed()
    }
}

fn prompt(affinity: &str, plan: &[(u32, f32)]) -> Prompt {
    Prompt {
        response_id: ResponseId::default(),
        tenant: "bench".into(),
        affinity: affinity.into(),
        tokens: Rope::default(),
        recent: Vec::new(),
        chat: None,
        sampling: Sampling {
            logit_bias: plan.into(),
            ..Sampling::greedy(u32::MAX)
        },
    }
}

fn main() {
    serve_if_told();
    run(Options::parse());
}
