//! `gpu`: engines that are reached over gRPC and take tokens in and give tokens out.
//!
//! Three interfaces are spoken, and which one an engine offers is found out by asking:
//!
//! | dialect | interface | engine |
//! |---|---|---|
//! | `vllm` | `vllm.Inference`, `vllm.Control` | vLLM's own gRPC server, with `--grpc-port` beside its Rust front end |
//! | `engine` | `vllm.grpc.engine.VllmEngine` | `vllm serve --grpc` |
//! | `sglang` | `sglang.grpc.scheduler.SglangScheduler` | SGLang with `--grpc-mode` |
//!
//! No engine can be appended to over its wire: each sample sends the whole prompt, and the engine's prefix cache
//! finds what it has of it. What is sent was encoded when it was new, and costs a copy from then on (`wire`).
//!
//! What the engine says about its model is held against the directory that prompts are rendered with. An engine
//! that cannot be reached when the server starts is asked again until it can.

mod engine;
mod link;
mod sample;
mod sglang;
mod vllm;
mod wire;

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, future::BoxFuture};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tonic::{Code, Status};

use super::{Backend, BackendError, Capabilities, Chunks, Prompt, Ungrammatical, lark::Lark};
use crate::{item::Tenant, model::Artifacts, parse::Grammar};
use link::Link;
use wire::Outgoing;

/// The messages and services of the two interfaces that no crate has, for those too who play an engine.
pub mod proto {
    #![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]

    /// `vllm.grpc.engine`.
    pub mod engine {
        tonic::include_proto!("vllm.grpc.engine");
    }
    /// `sglang.grpc.scheduler`.
    pub mod sglang {
        tonic::include_proto!("sglang.grpc.scheduler");
    }
}

/// How long an engine may take to say what it is, or how.
const ASK_TIME_MAX: Duration = Duration::from_secs(5);

/// The settings of one engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuOptions {
    /// Where the engine listens: `http://host:port`, or `https://…` for TLS by the system's roots.
    pub url: String,
    /// Which interface it offers.
    #[serde(default)]
    pub dialect: DialectChoice,
    /// What it calls the model. Empty: what it says by itself.
    #[serde(default)]
    pub model: String,
    /// Its share of the conversations, beside those of the others, 1 to 1,000.
    #[serde(default = "default::weight")]
    pub weight: u32,
    /// Connections to it, 1 to 64. One carries some hundred samples at once before it limits them.
    #[serde(default = "default::connections")]
    pub connections: usize,
    /// How it constrains sampling.
    #[serde(default)]
    pub constrained: Constrained,
    /// Whether prompts are sampled for one token ahead of time, so that the engine's prefix cache has them: for
    /// warm-ups, and for outputs that come early.
    #[serde(default = "default::prefill")]
    pub prefill: bool,
    /// How long a connection may take, in milliseconds, 1 to 60,000.
    #[serde(default = "default::connect_ms_max")]
    pub connect_ms_max: u64,
    /// How often it is asked how it is, in milliseconds, 50 to 600,000.
    #[serde(default = "default::health_ms")]
    pub health_ms: u64,
    /// How long the first answer to a prompt may take, its wait in the engine's queue included, in seconds, 1 to 3,600.
    #[serde(default = "default::first_token_secs_max")]
    pub first_token_secs_max: u64,
    /// How long the next one may take, in seconds, 1 to 3,600.
    #[serde(default = "default::token_secs_max")]
    pub token_secs_max: u64,
    /// The environment variable with the key that is sent as `authorization: Bearer …`. Empty: none is.
    #[serde(default)]
    pub key_variable: String,
}

mod default {
    pub(super) fn weight() -> u32 {
        1
    }
    pub(super) fn connections() -> usize {
        4
    }
    pub(super) fn prefill() -> bool {
        true
    }
    pub(super) fn connect_ms_max() -> u64 {
        2_000
    }
    pub(super) fn health_ms() -> u64 {
        2_000
    }
    pub(super) fn first_token_secs_max() -> u64 {
        300
    }
    pub(super) fn token_secs_max() -> u64 {
        60
    }
}

/// Which interface an engine offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DialectChoice {
    /// The first of them that it answers.
    #[default]
    Auto,
    /// `vllm.Inference`.
    Vllm,
    /// `vllm.grpc.engine.VllmEngine`.
    Engine,
    /// `sglang.grpc.scheduler.SglangScheduler`.
    Sglang,
}

/// How an engine constrains sampling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Constrained {
    /// Not at all.
    None,
    /// Answers of JSON alone, by its schema: JSON formats without tools, of a model that does not reason.
    #[default]
    Json,
    /// Everything, by grammars in the language of llguidance: vLLM with `--structured-outputs-config.backend guidance`.
    Lark,
}

impl GpuOptions {
    /// The settings of the engine at this place, all others as they are by default.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            dialect: DialectChoice::default(),
            model: String::new(),
            weight: default::weight(),
            connections: default::connections(),
            constrained: Constrained::default(),
            prefill: default::prefill(),
            connect_ms_max: default::connect_ms_max(),
            health_ms: default::health_ms(),
            first_token_secs_max: default::first_token_secs_max(),
            token_secs_max: default::token_secs_max(),
            key_variable: String::new(),
        }
    }

    /// Holds every value against its range.
    ///
    /// # Errors
    ///
    /// The first one that is outside, by its name.
    pub fn check(&self) -> Result<(), String> {
        let ranges = [
            ("weight", self.weight.into(), 1..=1_000),
            ("connections", self.connections as u64, 1..=64),
            ("connect_ms_max", self.connect_ms_max, 1..=60_000),
            ("health_ms", self.health_ms, 50..=600_000),
            ("first_token_secs_max", self.first_token_secs_max, 1..=3_600),
            ("token_secs_max", self.token_secs_max, 1..=3_600),
        ];
        for (name, value, range) in ranges {
            if !range.contains(&value) {
                let (first, last) = range.into_inner();
                return Err(format!(
                    "{name} is {value}, but must be from {first} to {last}"
                ));
            }
        }
        if !(self.url.starts_with("http://") || self.url.starts_with("https://")) {
            return Err("url is no http:// or https:// address".to_owned());
        }
        if self.dialect == DialectChoice::Sglang && self.constrained == Constrained::Lark {
            return Err("constrained = \"lark\" is not for dialect = \"sglang\"".to_owned());
        }
        Ok(())
    }
}

/// Why an engine cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// The address is none.
    #[error("`{url}` is no address of an engine")]
    Url {
        /// The address.
        url: String,
    },
    /// The key cannot be sent.
    #[error("the key in {variable} has characters that no header takes")]
    Key {
        /// The environment variable.
        variable: String,
    },
    /// It could not be asked what it is.
    #[error("the engine at {url} cannot be reached: {reason}")]
    Unreachable {
        /// Its address.
        url: String,
        /// For people.
        reason: String,
    },
    /// It is not what prompts are made for.
    #[error("the engine at {url} does not fit the model's directory: {reason}")]
    Unfit {
        /// Its address.
        url: String,
        /// For people.
        reason: String,
    },
}

/// What an engine says about itself and its model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    /// What it calls the model.
    model: String,
    /// Its version, or its kind.
    version: String,
    /// The longest prompt and sample together, in tokens.
    pub(crate) context_length: Option<u32>,
    /// How many tokens it knows, those included that only pad.
    vocab_size: Option<u32>,
    /// Tokens at which it ends by itself.
    end_tokens: Vec<u32>,
    /// Tokens of a block of its cache: less is never found again.
    block_tokens: Option<u32>,
    /// Whether prompts may be tokens.
    takes_tokens: bool,
}

/// How an engine is.
struct Probe {
    healthy: bool,
    /// Samples that run or wait.
    load: Option<u32>,
}

/// What a request for a sample holds beside the prompt.
struct Started<'a> {
    /// Names the sample to the engine.
    id: &'a str,
    /// What the engine calls the model.
    model: &'a str,
    /// Keeps the tenants' shares of its cache apart.
    salt: &'a str,
    /// Names the conversation.
    session: &'a str,
    /// What the answer keeps to.
    constraint: Option<&'a Constraint>,
}

/// What an answer keeps to, in the engine's language.
enum Constraint {
    /// This schema, as JSON text.
    Json(Arc<str>),
    /// This grammar.
    Lark(String),
}

/// An interface that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Vllm,
    Engine,
    Sglang,
}

impl Dialect {
    /// In the order in which engines are asked for them.
    const ALL: [Self; 3] = [Self::Vllm, Self::Engine, Self::Sglang];

    fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Engine => "engine",
            Self::Sglang => "sglang",
        }
    }

    fn generate(self) -> &'static str {
        match self {
            Self::Vllm => vllm::GENERATE,
            Self::Engine => engine::GENERATE,
            Self::Sglang => sglang::GENERATE,
        }
    }

    async fn facts(self, link: &Link) -> Result<Facts, Status> {
        match self {
            Self::Vllm => vllm::facts(link).await,
            Self::Engine => engine::facts(link).await,
            Self::Sglang => sglang::facts(link).await,
        }
    }

    async fn probe(self, link: &Link) -> Result<Probe, Status> {
        match self {
            Self::Vllm => vllm::probe(link).await,
            Self::Engine => engine::probe(link).await,
            Self::Sglang => sglang::probe(link).await,
        }
    }

    async fn abort(self, link: &Link, id: String) -> Result<(), Status> {
        match self {
            Self::Vllm => vllm::abort(link, id).await,
            Self::Engine => engine::abort(link, id).await,
            Self::Sglang => sglang::abort(link, id).await,
        }
    }

    fn request(self, prompt: &Prompt, started: &Started<'_>) -> Result<Outgoing, BackendError> {
        match self {
            Self::Vllm => Ok(vllm::request(prompt, started)),
            Self::Engine => Ok(engine::request(prompt, started)),
            Self::Sglang => sglang::request(prompt, started),
        }
    }
}

/// An engine that was asked what it is.
#[derive(Debug, Clone)]
struct Known {
    dialect: Dialect,
    model: String,
    block_tokens: u32,
}

/// How it stands with an engine.
///
/// ```text
/// unreached ──asked──▶ known { healthy } ⇄ known { unhealthy }
///     │  ▲                                   │ answers again: asked anew, since
///     ▼  └───────────────────────────────────┘ it may have started with another model
///   unfit
/// ```
enum State {
    /// It has not been reached yet, or was lost.
    Unreached,
    /// It is not what prompts are made for.
    Unfit(String),
    /// It can be used.
    Known {
        known: Arc<Known>,
        healthy: bool,
        load: Option<u32>,
    },
}

/// An engine. See the module.
pub struct Gpu {
    inner: Arc<Inner>,
}

struct Inner {
    options: GpuOptions,
    link: Link,
    artifacts: Arc<Artifacts>,
    /// The longest prompt and sample together that it will be given, in tokens.
    context_length: AtomicU64,
    state: RwLock<State>,
    samples: AtomicU64,
}

impl Gpu {
    /// An engine for prompts that are made with these files. To be called in a runtime; nothing is
    /// sent yet.
    ///
    /// # Errors
    ///
    /// [`GpuError::Url`] or [`GpuError::Key`].
    pub fn new(
        options: GpuOptions,
        key: Option<&str>,
        artifacts: Arc<Artifacts>,
    ) -> Result<Self, GpuError> {
        Ok(Self {
            inner: Arc::new(Inner {
                link: Link::new(&options, key)?,
                options,
                artifacts,
                context_length: AtomicU64::new(0),
                state: RwLock::new(State::Unreached),
                samples: AtomicU64::new(0),
            }),
        })
    }

    /// Asks the engine what it is, and holds it against the model's files. The longest prompt and
    /// sample that it takes, where it tells.
    ///
    /// # Errors
    ///
    /// [`GpuError::Unreachable`], after which it may be used once it can be reached, or
    /// [`GpuError::Unfit`].
    pub async fn connect(&self) -> Result<Option<u32>, GpuError> {
        self.inner.connect().await
    }

    /// From now on it is asked how it is, for as long as it is held; and it will be given prompts
    /// and samples of so many tokens together.
    pub fn watch(&self, context_length: u32) {
        let inner = &self.inner;
        inner
            .context_length
            .store(context_length.into(), Ordering::Relaxed);
        tokio::spawn(watch(Arc::downgrade(inner), inner.options.health_ms));
    }
}

/// Asks the engine how it is, again and again.
async fn watch(engine: Weak<Inner>, health_ms: u64) {
    let mut ticks = tokio::time::interval(Duration::from_millis(health_ms));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(inner) = engine.upgrade() else {
            return;
        };
        inner.look_after().await;
    }
}

impl Inner {
    async fn connect(&self) -> Result<Option<u32>, GpuError> {
        let url = || self.options.url.clone();
        let (dialect, facts) = self.ask().await.map_err(|status| GpuError::Unreachable {
            url: url(),
            reason: format!("{:?}: {}", status.code(), status.message()),
        })?;
        if let Err(reason) = self.fits(&facts) {
            *self.state.write() = State::Unfit(reason.clone());
            return Err(GpuError::Unfit { url: url(), reason });
        }
        tracing::info!(
            url = self.options.url,
            dialect = dialect.name(),
            model = facts.model,
            version = facts.version,
            context_length = facts.context_length,
            "an engine answers"
        );
        let known = Arc::new(Known {
            dialect,
            block_tokens: facts.block_tokens.unwrap_or(1),
            model: if self.options.model.is_empty() {
                facts.model
            } else {
                self.options.model.clone()
            },
        });
        self.probe(known).await;
        Ok(facts.context_length)
    }

    /// Asks a known engine how it is.
    async fn probe(&self, known: Arc<Known>) {
        let probe = in_time(known.dialect.probe(&self.link)).await;
        let (healthy, load) = match &probe {
            Ok(probe) => (probe.healthy, probe.load),
            Err(_) => (false, None),
        };
        let was_healthy = !matches!(*self.state.read(), State::Known { healthy: false, .. });
        if was_healthy && !healthy {
            let why = probe.err().map(|status| status.code());
            tracing::warn!(url = self.options.url, ?why, "an engine is not well");
        }
        *self.state.write() = State::Known {
            known,
            healthy,
            load,
        };
    }

    /// What it is, in the first dialect that it speaks.
    async fn ask(&self) -> Result<(Dialect, Facts), Status> {
        let dialects: &[Dialect] = match self.options.dialect {
            DialectChoice::Auto => &Dialect::ALL,
            DialectChoice::Vllm => &[Dialect::Vllm],
            DialectChoice::Engine => &[Dialect::Engine],
            DialectChoice::Sglang => &[Dialect::Sglang],
        };
        let mut last = Status::unimplemented("it speaks none of the dialects");
        for dialect in dialects {
            match in_time(dialect.facts(&self.link)).await {
                Ok(facts) => return Ok((*dialect, facts)),
                Err(status) if status.code() == Code::Unimplemented => last = status,
                Err(status) => return Err(status),
            }
        }
        Err(last)
    }

    /// Whether prompts that are made with our files are prompts of this model.
    fn fits(&self, facts: &Facts) -> Result<(), String> {
        if !facts.takes_tokens {
            return Err("it takes no tokens".to_owned());
        }
        let tokens = self.artifacts.tokenizer.vocab_size();
        if let Some(known) = facts.vocab_size
            && tokens > known as usize
        {
            return Err(format!(
                "the tokenizer has {tokens} tokens, and the engine's model {known}"
            ));
        }
        let ends = &self.artifacts.end_tokens;
        if let Some(id) = facts.end_tokens.iter().find(|id| !ends.contains(id)) {
            return Err(format!(
                "the engine ends answers with token {id}, which the directory does not name as an end"
            ));
        }
        let promised = self.context_length.load(Ordering::Relaxed);
        if let Some(own) = facts.context_length
            && promised > own.into()
        {
            return Err(format!(
                "its context of {own} tokens is less than the {promised} that this server was started with"
            ));
        }
        Ok(())
    }

    /// Brings what is known of it up to date.
    async fn look_after(&self) {
        let known = match &*self.state.read() {
            State::Known {
                known,
                healthy: true,
                ..
            } => Some(known.clone()),
            State::Known { healthy: false, .. } | State::Unreached | State::Unfit(_) => None,
        };
        let Some(known) = known else {
            match self.connect().await {
                Ok(_) if self.is_healthy() => {
                    tracing::info!(url = self.options.url, "an engine is well again")
                }
                Ok(_) => {}
                Err(GpuError::Unfit { url, reason }) => {
                    tracing::error!(url, reason, "an engine does not fit the model's directory");
                }
                Err(error) => tracing::debug!(%error, "an engine is still away"),
            }
            return;
        };
        self.probe(known).await;
    }

    fn is_healthy(&self) -> bool {
        matches!(*self.state.read(), State::Known { healthy: true, .. })
    }

    /// What is known of it, where it can be used. One that seems unwell may be tried all the same.
    fn facts(&self) -> Result<Arc<Known>, BackendError> {
        let unavailable = |reason: &str| {
            Err(BackendError::Unavailable {
                reason: reason.to_owned(),
                retry_after: None,
            })
        };
        match &*self.state.read() {
            State::Known { known, .. } => Ok(known.clone()),
            State::Unreached => unavailable("the engine has not been reached yet"),
            State::Unfit(reason) => unavailable(&format!(
                "the engine does not fit the model's directory: {reason}"
            )),
        }
    }

    /// A name for a sample that no other has.
    fn next_id(&self, prompt: &Prompt) -> String {
        let number = self.samples.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}", prompt.response_id.as_str())
    }

    /// What the answer keeps to, in the engine's language.
    fn constraint(&self, prompt: &Prompt) -> Result<Option<Constraint>, BackendError> {
        let Some(grammar) = &prompt.sampling.grammar else {
            return Ok(None);
        };
        let constraint = self.translate(grammar);
        constraint.map(Some).map_err(|error| BackendError::Refused {
            reason: error.to_string(),
        })
    }

    fn translate(&self, grammar: &Grammar) -> Result<Constraint, Ungrammatical> {
        let refuse = |reason: &str| {
            Err(Ungrammatical {
                schema: None,
                reason: reason.to_owned(),
            })
        };
        match (self.options.constrained, grammar) {
            (Constrained::None, _) => refuse("this engine constrains nothing"),
            (Constrained::Json, Grammar::Json(schema)) => Ok(Constraint::Json(schema.clone())),
            (Constrained::Json, _) => refuse(
                "this engine constrains an answer of JSON alone, without calls and reasoning",
            ),
            (Constrained::Lark, grammar) => {
                let tokenizer = &self.artifacts.tokenizer;
                let control = |content: &str| {
                    let id = tokenizer.token_id(content);
                    id.filter(|id| tokenizer.is_control(*id))
                };
                let lark = Lark::new(grammar, &control, &self.artifacts.end_tokens)?;
                Ok(Constraint::Lark(lark.text))
            }
        }
    }
}

async fn in_time<T>(asked: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Err(Status::deadline_exceeded("no answer in time"));
    timeout(ASK_TIME_MAX, asked).await.unwrap_or_else(late)
}

impl Backend for Gpu {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: "gpu",
            keeps_cache: true,
            prefill: self.inner.options.prefill,
            constrained_sampling: self.inner.options.constrained != Constrained::None,
            logprobs: true,
            reads_items: false,
            reads_messages: false,
            sampling: true,
        }
    }

    fn healthy(&self) -> bool {
        self.inner.is_healthy()
    }

    fn load(&self) -> Option<u32> {
        match *self.inner.state.read() {
            State::Known { load, .. } => load,
            State::Unreached | State::Unfit(_) => None,
        }
    }

    /// Whether it can be said in the engine's language. What the engine itself cannot keep to it says when it samples.
    fn check(&self, _: &Tenant, grammar: &Arc<Grammar>) -> Result<(), Ungrammatical> {
        self.inner.translate(grammar).map(|_| ())
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        sample::sample(self.inner.clone(), prompt)
    }

    /// Samples one token, so that the engine's prefix cache has the prompt.
    fn prefill(&self, mut prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        let too_short = self.inner.facts().is_ok_and(|known| {
            // A part of a block is never found again.
            prompt.tokens.len_tokens() < known.block_tokens as usize
        });
        if too_short {
            return Box::pin(std::future::ready(Ok(())));
        }
        prompt.sampling.max_tokens = 1;
        prompt.sampling.top_logprobs = None;
        prompt.sampling.grammar = None;
        let mut chunks = self.sample(prompt);
        Box::pin(async move {
            while let Some(chunk) = chunks.next().await {
                chunk?;
            }
            Ok(())
        })
    }
}
