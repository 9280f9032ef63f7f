//! `sim`, a simulated engine: it plays scripts at a configured pace instead of running a model.
//!
//! For tests, demonstrations and load: everything around it, rendering, tokens, parsing, billing,
//! is the real thing. A script says what the model would write; it is written in the model's own
//! format and tokenised, so what leaves here looks like a sample. It has nothing to sample, so
//! every sampling setting is honoured by having no effect; `max_output_tokens` and `stop` have
//! theirs.
//!
//! # The rules file
//!
//! TOML. The first rule whose `user` matches the last message of the user is played, one step at
//! each sample since that message; behind the last step the last one is played again.
//!
//! ```toml
//! [[rule]]
//! user = '(?s)^rollout (\d+)'      # a regular expression; absent: any message
//! tools = ["step"]                 # only where these are offered; absent: always
//!
//! [[rule.step]]
//! repeat = "{{ captures[1] }}"     # how often the step is played; absent: once
//! reasoning = "Step {{ n }}."      # absent: none
//! text = ""                        # absent: none
//! calls = '[{"name": "step", "arguments": {"n": {{ n }} }}]'   # absent: none
//!
//! [[rule.step]]
//! text = "Finished: {{ outputs[-1] }}"
//! fail = "error"                   # instead of an end: `error` breaks, `hang` never ends
//! ```
//!
//! The values are templates (Jinja) over `user` (the message), `captures` (of the regular
//! expression, 0 is all of it), `outputs` (of all calls since the message), `latest` (the outputs
//! since the last sample), `round` (how many samples there were since the message), `n` (how
//! often the step was played before) and `tools` (their names). `calls` gives a JSON array.

use std::{path::Path, sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use minijinja::{Environment, context};
use regex::Regex;
use serde::{Deserialize, Deserializer};
use tokio::time::Instant;

use super::{Backend, BackendError, Capabilities, Chunk, Chunks, Prompt, SampleEnd};
use crate::{
    item::{Body, Item, Part, Role},
    model::Artifacts,
    parse::{Answer, FormattedPiece},
    tokenizer::Encoded,
};

/// How fast it seems to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Tokens a second; 0: as fast as they are taken.
    pub tokens_per_second: f64,
    /// From the prompt to the first token.
    pub first_token: Duration,
}

/// The rules, from TOML.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RulesFile {
    #[serde(default, rename = "rule")]
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(default, deserialize_with = "pattern")]
    user: Option<Regex>,
    #[serde(default)]
    tools: Vec<String>,
    #[serde(rename = "step")]
    steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    repeat: Option<String>,
    reasoning: Option<String>,
    text: Option<String>,
    calls: Option<String>,
    fail: Option<Failure>,
}

/// What happens in place of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Failure {
    /// The engine breaks.
    Error,
    /// The engine falls silent.
    Hang,
}

fn pattern<'de, D: Deserializer<'de>>(text: D) -> Result<Option<Regex>, D::Error> {
    let text = String::deserialize(text)?;
    Regex::new(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}

#[derive(Deserialize)]
struct ScriptedCall {
    name: String,
    arguments: Box<serde_json::value::RawValue>,
}

/// Why rules cannot be played.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file cannot be read.
    #[error("cannot read the rules: {0}")]
    Read(#[from] std::io::Error),
    /// The file is not what it should be; the text says where.
    #[error("the rules cannot be understood: {0}")]
    Parse(#[from] toml::de::Error),
    /// A rule has no step to play.
    #[error("rule {0} has no step")]
    NoStep(usize),
    /// A template in it is wrong.
    #[error("a template in rule {rule} is wrong: {source}")]
    Template {
        /// The rule, from 0.
        rule: usize,
        /// What is wrong.
        source: minijinja::Error,
    },
}

/// A simulated engine. See the module.
pub struct Sim {
    script: Arc<Script>,
    pace: Pace,
}

struct Script {
    rules: Vec<Rule>,
    artifacts: Arc<Artifacts>,
}

impl Sim {
    /// An engine that plays these rules.
    ///
    /// # Errors
    ///
    /// What is wrong with the rules, and where.
    pub fn new(rules: &str, artifacts: Arc<Artifacts>, pace: Pace) -> Result<Self, RulesError> {
        let file: RulesFile = toml::from_str(rules)?;
        let environment = environment();
        for (index, rule) in file.rules.iter().enumerate() {
            if rule.steps.is_empty() {
                return Err(RulesError::NoStep(index));
            }
            for step in &rule.steps {
                for text in [&step.repeat, &step.reasoning, &step.text, &step.calls]
                    .into_iter()
                    .flatten()
                {
                    environment
                        .template_from_str(text)
                        .map_err(|source| RulesError::Template {
                            rule: index,
                            source,
                        })?;
                }
            }
        }
        let rules = file.rules;
        Ok(Self {
            script: Arc::new(Script { rules, artifacts }),
            pace,
        })
    }

    /// An engine that plays the rules of a file.
    ///
    /// # Errors
    ///
    /// As [`Sim::new`], and when the file cannot be read.
    pub fn from_file(
        path: &Path,
        artifacts: Arc<Artifacts>,
        pace: Pace,
    ) -> Result<Self, RulesError> {
        Self::new(&std::fs::read_to_string(path)?, artifacts, pace)
    }

    /// The embedded rules: what the demonstration and the README play.
    #[must_use]
    pub fn demo_rules() -> &'static str {
        include_str!("../../models/sim/rules.toml")
    }
}

/// Templates with the methods that Python strings have, as chat templates know them.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment
}

/// What one sample is to be.
struct Play {
    tokens: Vec<u32>,
    end: PlayEnd,
}

enum PlayEnd {
    Finish(SampleEnd),
    Fail(Failure),
}

impl Script {
    /// Writes the answer to a prompt.
    fn play(&self, prompt: &Prompt) -> Result<Play, String> {
        let scene = Scene::of(&prompt.recent);
        let tools: Vec<String> = prompt
            .sampling
            .tools
            .iter()
            .map(ToString::to_string)
            .collect();
        let rule = self.rules.iter().find_map(|rule| {
            let captures = match &rule.user {
                None => vec![scene.user.to_string()],
                Some(user) => user
                    .captures(&scene.user)?
                    .iter()
                    .map(|group| group.map_or("", |group| group.as_str()).to_owned())
                    .collect(),
            };
            let offered = rule.tools.iter().all(|tool| tools.contains(tool));
            offered.then_some((rule, captures))
        });
        let Some((rule, captures)) = rule else {
            return Err("no rule matches the last message of the user".to_owned());
        };
        let environment = environment();
        let values = context! {
            user => scene.user, captures => captures, outputs => scene.outputs,
            latest => scene.latest, round => scene.round, tools => tools,
        };
        let render = |text: &Option<String>, n: usize| -> Result<String, String> {
            let Some(text) = text else {
                return Ok(String::new());
            };
            let values = context! { n => n, ..values.clone() };
            environment
                .render_str(text, values)
                .map_err(|error| format!("a rule cannot be played: {error}"))
        };
        let (step, n) = {
            let mut left = scene.round;
            let mut steps = rule.steps.iter();
            loop {
                let Some(step) = steps.next() else {
                    let last = rule.steps.last().ok_or("a rule has no step")?;
                    break (last, left);
                };
                let times = match &step.repeat {
                    None => 1,
                    repeat => {
                        let times = render(repeat, 0)?;
                        times
                            .trim()
                            .parse()
                            .map_err(|_| "a step's repeat is no number".to_owned())?
                    }
                };
                if left < times {
                    break (step, left);
                }
                left -= times;
            }
        };
        let calls = render(&step.calls, n)?;
        let calls: Vec<ScriptedCall> = if calls.trim().is_empty() {
            Vec::new()
        } else {
            serde_json::from_str(&calls)
                .map_err(|error| format!("a step's calls are no JSON array: {error}"))?
        };
        let reasoning = render(&step.reasoning, n)?;
        let answer = Answer {
            reasoning: (!reasoning.is_empty()).then_some(reasoning),
            text: render(&step.text, n)?,
            calls: calls
                .into_iter()
                .map(|call| (call.name, call.arguments.get().to_owned()))
                .collect(),
        };
        Ok(self.write(&answer, step.fail, prompt))
    }

    fn write(&self, answer: &Answer, fail: Option<Failure>, prompt: &Prompt) -> Play {
        let tokenizer = &self.artifacts.tokenizer;
        let is_added = |content: &str| tokenizer.token_id(content).is_some();
        let mut encoded = Encoded::default();
        let mut ended = false;
        for piece in self.artifacts.family.format(answer, &is_added) {
            match piece {
                FormattedPiece::Special(content) => {
                    if let Some(id) = tokenizer.token_id(&content) {
                        encoded.ids.push(id);
                        ended = prompt.sampling.end_tokens.contains(&id);
                    }
                }
                FormattedPiece::Text(text) => {
                    ended = false;
                    let (text, untrusted) = tokenizer
                        .guard()
                        .unmark(tokenizer.guard().mark(&text).into_owned());
                    tokenizer.encode(&text, false, &untrusted, &mut encoded);
                }
            }
        }
        let mut tokens = encoded.ids;
        if let Some(failure) = fail {
            return Play {
                tokens,
                end: PlayEnd::Fail(failure),
            };
        }
        if !ended {
            tokens.extend(prompt.sampling.end_tokens.first());
        }
        let max = prompt.sampling.max_tokens as usize;
        let end = if tokens.len() > max {
            tokens.truncate(max);
            SampleEnd::Length
        } else {
            SampleEnd::Stop
        };
        Play {
            tokens,
            end: PlayEnd::Finish(end),
        }
    }
}

/// What a script sees of the conversation.
#[derive(Default)]
struct Scene {
    user: Arc<str>,
    outputs: Vec<String>,
    latest: Vec<String>,
    round: usize,
}

impl Scene {
    fn of(recent: &[Arc<Item>]) -> Self {
        let mut scene = Self::default();
        let mut sampled = false;
        for item in recent {
            let by_model = match &item.body {
                Body::Message {
                    role: Role::User,
                    parts,
                } => {
                    scene.user = Part::joined(parts);
                    false
                }
                Body::Message { role, .. } => *role == Role::Assistant,
                Body::FunctionCallOutput { output, .. }
                | Body::CustomToolCallOutput { output, .. } => {
                    if sampled {
                        scene.latest.clear();
                    }
                    scene.outputs.push(output.to_string());
                    scene.latest.push(output.to_string());
                    false
                }
                Body::FunctionCall { .. }
                | Body::CustomToolCall { .. }
                | Body::Reasoning { .. } => true,
                Body::Compaction { .. } => false,
            };
            scene.round += usize::from(by_model && !sampled);
            sampled = by_model;
        }
        scene
    }
}

impl Backend for Sim {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: "sim",
            keeps_cache: false,
            prefill: false,
            constrained_sampling: false,
            logprobs: false,
            reads_items: true,
            reads_messages: false,
            sampling: true,
        }
    }

    fn healthy(&self) -> bool {
        true
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        let play = match self.script.play(&prompt) {
            Ok(play) => play,
            Err(reason) => {
                // It would be the same the next time.
                return stream::once(std::future::ready(Err(BackendError::Refused { reason })))
                    .boxed();
            }
        };
        let performance = Performance {
            play,
            next: 0,
            started: Instant::now(),
            pace: self.pace,
            over: false,
        };
        stream::unfold(performance, |performance| performance.next()).boxed()
    }

    fn prefill(&self, _: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        std::future::ready(Ok(())).boxed()
    }
}

/// A play while it is given.
struct Performance {
    play: Play,
    next: usize,
    started: Instant,
    pace: Pace,
    over: bool,
}

/// Most tokens of a chunk where the pace is as fast as possible.
const CHUNK_TOKENS_MAX: usize = 32;

impl Performance {
    async fn next(mut self) -> Option<(Result<Chunk, BackendError>, Self)> {
        if self.over {
            return None;
        }
        let len = self.play.tokens.len();
        if self.next < len {
            let due = self.due(self.next);
            // A timer ticks in milliseconds: what is due now must not wait for it.
            if due > Instant::now() {
                tokio::time::sleep_until(due).await;
            }
            let now = Instant::now();
            let ready = if self.pace.tokens_per_second > 0.0 {
                (self.next + 1..len)
                    .take_while(|index| self.due(*index) <= now)
                    .count()
                    + 1
            } else {
                CHUNK_TOKENS_MAX.min(len - self.next)
            };
            let tokens = self.play.tokens[self.next..self.next + ready].to_vec();
            self.next += ready;
            let finish = match self.play.end {
                PlayEnd::Finish(end) if self.next == len => Some(end),
                PlayEnd::Finish(_) | PlayEnd::Fail(_) => None,
            };
            self.over = finish.is_some();
            let chunk = Chunk {
                tokens,
                finish,
                ..Chunk::default()
            };
            return Some((Ok(chunk), self));
        }
        match self.play.end {
            PlayEnd::Finish(end) => {
                self.over = true;
                let chunk = Chunk {
                    finish: Some(end),
                    ..Chunk::default()
                };
                Some((Ok(chunk), self))
            }
            PlayEnd::Fail(Failure::Hang) => std::future::pending().await,
            PlayEnd::Fail(Failure::Error) => {
                self.over = true;
                let reason = "the script says so".to_owned();
                Some((Err(BackendError::Failed { reason }), self))
            }
        }
    }

    fn due(&self, index: usize) -> Instant {
        let after = if self.pace.tokens_per_second > 0.0 {
            Duration::from_secs_f64(index as f64 / self.pace.tokens_per_second)
        } else {
            Duration::ZERO
        };
        self.started + self.pace.first_token + after
    }
}
