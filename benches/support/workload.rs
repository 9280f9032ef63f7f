//! What rollouts look like: drawn from the distributions of public traces of coding agents, or read from a trace.

use std::{fs, path::Path};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, LogNormal};
use serde::Deserialize;

/// The shape of a rollout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// Tokens of the task, with what it brings along.
    pub task: usize,
    pub steps: Vec<Step>,
    /// Rollouts that go on from the end of this one, each on its own.
    pub forks: Vec<Vec<Step>>,
}

/// One sample, and what comes back for its calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Tokens that are sampled, the calls among them.
    pub output: usize,
    /// Tokens of each call's output.
    pub fresh: Vec<usize>,
}

/// Kinds of rollouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// Work on a repository: about 30 samples, 12k tokens of context that grow to some 40k.
    Swe,
    /// A long session: 175 steps, 20k tokens that grow to 115k.
    Desk,
    /// 8 steps, 3k tokens that grow to 10k.
    Small,
    /// 30 steps, and four forks of 15.
    Swarm,
}

impl Profile {
    pub fn name(self) -> &'static str {
        match self {
            Self::Swe => "swe",
            Self::Desk => "desk",
            Self::Small => "small",
            Self::Swarm => "swarm",
        }
    }

    /// A rollout of this kind; the same for the same seed.
    pub fn draw(self, seed: u64) -> Rollout {
        let mut rng = StdRng::seed_from_u64(seed);
        let swe = |count: usize, rng: &mut StdRng| (0..count).map(|_| swe_step(rng)).collect();
        match self {
            Self::Swe => {
                let count = log_normal(30.0, 0.5, (1.0, 200.0), &mut rng);
                Rollout {
                    task: 12_300,
                    steps: swe(count, &mut rng),
                    forks: Vec::new(),
                }
            }
            Self::Desk => even(20_000, 115_000, 175),
            Self::Small => even(3_000, 10_000, 8),
            Self::Swarm => Rollout {
                task: 12_300,
                steps: swe(30, &mut rng),
                forks: (0..4).map(|_| swe(15, &mut rng)).collect(),
            },
        }
    }
}

fn swe_step(rng: &mut StdRng) -> Step {
    let fresh = log_normal(400.0, 1.5, (16.0, 30_000.0), rng);
    // 1.2 calls a step.
    let calls = if rng.random_bool(0.2) { 2 } else { 1 };
    Step {
        output: log_normal(200.0, 1.385, (1.0, 8_000.0), rng),
        fresh: vec![fresh.div_ceil(calls); calls],
    }
}

/// Steps that are all alike: of what is added two thirds come from tools.
fn even(from: usize, to: usize, steps: usize) -> Rollout {
    let added = (to - from) / steps;
    let step = Step {
        output: added / 3,
        fresh: vec![added - added / 3],
    };
    Rollout {
        task: from,
        steps: vec![step; steps],
        forks: Vec::new(),
    }
}

fn log_normal(median: f64, sigma: f64, (low, high): (f64, f64), rng: &mut StdRng) -> usize {
    let value: f64 = LogNormal::new(median.ln(), sigma).unwrap().sample(rng);
    value.clamp(low, high) as usize
}

/// A request of a trace in the form of Mooncake's: JSON lines, the prompt as hashes of its blocks.
#[derive(Deserialize)]
struct Request {
    input_length: usize,
    output_length: usize,
    hash_ids: Vec<u64>,
}

/// The rollouts of a trace: a request whose prompt begins with all but the last block of an
/// earlier one's continues that.
pub fn read_trace(path: &Path) -> Vec<Rollout> {
    let text = fs::read_to_string(path).unwrap();
    let requests = text.lines().filter(|line| !line.trim().is_empty());
    let mut open: Vec<(Rollout, Request)> = Vec::new();
    for line in requests {
        let request: Request = serde_json::from_str(line).unwrap();
        let continues = |(_, last): &&mut (Rollout, Request)| {
            let whole = last.hash_ids.len().saturating_sub(1).max(1);
            request.input_length > last.input_length
                && request
                    .hash_ids
                    .starts_with(&last.hash_ids[..whole.min(last.hash_ids.len())])
        };
        let step = Step {
            output: request.output_length,
            fresh: Vec::new(),
        };
        match open.iter_mut().rev().find(continues) {
            Some((rollout, last)) => {
                let grown = request.input_length - last.input_length;
                let fresh = grown.saturating_sub(last.output_length).max(16);
                rollout.steps.last_mut().unwrap().fresh = vec![fresh];
                rollout.steps.push(step);
                *last = request;
            }
            None => {
                let rollout = Rollout {
                    task: request.input_length,
                    steps: vec![step],
                    forks: Vec::new(),
                };
                open.push((rollout, request));
            }
        }
    }
    open.into_iter().map(|(rollout, _)| rollout).collect()
}
