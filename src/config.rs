//! The configuration: every setting, its default, and where its value comes from.
//!
//! A flag wins over an environment variable, that over the file, that over the default. The file
//! is read into the typed settings first, so that a misspelt key or a wrong type is refused
//! with its line; variables (`HOTLOOP_SERVER__LISTEN`) and flags (`--set server.listen=…`)
//! are laid over it one at a time and named in their errors; at the end every value is held
//! against its range.
//!
//! No secret has a key here. API keys come from [`crate::auth::KEYS_VARIABLE`] alone.

use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    auth::{self, Gate, GateError, Keys, KeysError},
    backend::{
        DeviceChoice,
        cerebras::{CerebrasOptions, PromptForm},
        gpu::GpuOptions,
        router::RoutingOptions,
    },
    billing::{AtBound, BillingOptions, Durability, Pace, Reserve, Retries, Sasl},
    budget::{BudgetOptions, Price},
    safety::{ClassifierOptions, PolicyOptions},
    stream::Limits,
};
use serde::{Deserialize, Serialize};

mod check;
mod file;

/// Variables with this start and a double underscore are settings.
const VARIABLE_PREFIX: &str = "HOTLOOP_";

/// All settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The port and its connections.
    pub server: Server,
    /// Who may call.
    pub auth: Auth,
    /// One stream.
    pub stream: Stream,
    /// One command.
    pub request: Request,
    /// What is kept in memory between commands and streams.
    pub cache: Cache,
    /// How samples find the engines of a model.
    pub routing: RoutingOptions,
    /// What is kept on disk.
    pub store: Store,
    /// What is recorded of usage.
    pub billing: Billing,
    /// What items are checked for.
    pub safety: Safety,
    /// The log.
    pub log: Log,
    /// The models, never empty, exactly one of them the default. In the file: `[[model]]`.
    #[serde(rename = "model", default)]
    pub models: Vec<Model>,
    /// Other names for them. In the file: `[[alias]]`.
    #[serde(rename = "alias", default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<Alias>,
    /// What may be used. In the file: `[[budget]]`.
    #[serde(rename = "budget", default, skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<BudgetOptions>,
    /// What models cost. In the file: `[[price]]`.
    #[serde(rename = "price", default, skip_serializing_if = "Vec::is_empty")]
    pub prices: Vec<Price>,
    /// The accepted API keys. Only ever from the environment.
    #[serde(skip)]
    pub api_keys: Keys,
    /// The keys for engines. Only ever from the environment.
    #[serde(skip)]
    pub secrets: Secrets,
}

/// Keys for engines, by the environment variable that holds them. They are never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secrets(BTreeMap<String, String>);

impl Secrets {
    /// The key in this variable.
    #[must_use]
    pub fn get(&self, variable: &str) -> Option<&str> {
        self.0.get(variable).map(String::as_str)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The port and its connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address and port to listen on. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// The largest message that a client may send, in bytes.
    pub message_bytes_max: usize,
    /// Open connections. At this number the server accepts no more until one closes.
    pub connections_max: usize,
    /// Open `Connect` and `Create` calls of all connections.
    pub streams_max: usize,
    /// Open calls of one connection, unary ones included. Clients queue what is above it.
    pub streams_per_connection_max: u32,
    /// Unary calls in progress of all connections. What is above it is refused.
    pub unary_calls_max: usize,
    /// How long a unary call may take, in seconds.
    pub unary_secs_max: u64,
    /// How long a new connection may take to say that it speaks HTTP/2, in seconds.
    pub preface_secs_max: u64,
    /// How often a silent connection is asked whether it still lives, in seconds.
    pub keepalive_secs: u64,
    /// How long it may take to answer, in seconds.
    pub keepalive_timeout_secs: u64,
    /// Bytes of a stream that wait for a client that does not read.
    pub send_buffer_bytes_max: usize,
    /// How long calls may go on after the server was told to stop, in seconds.
    pub drain_secs_max: u64,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 50051).into(),
            message_bytes_max: 32 << 20,
            connections_max: 1024,
            streams_max: 10_000,
            streams_per_connection_max: 256,
            unary_calls_max: 256,
            unary_secs_max: 30,
            preface_secs_max: 5,
            keepalive_secs: 20,
            keepalive_timeout_secs: 10,
            send_buffer_bytes_max: 64 << 10,
            drain_secs_max: 30,
        }
    }
}

/// Who may call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// When an API key is asked for.
    pub mode: auth::Mode,
}

impl Default for Auth {
    fn default() -> Self {
        Self {
            mode: auth::Mode::Auto,
        }
    }
}

/// One stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stream {
    /// How long a stream may live, in seconds.
    pub age_secs_max: u64,
    /// How long before its end a stream is told of it by `go_away`, in seconds.
    pub go_away_secs: u64,
    /// Named lanes.
    pub lanes_max: usize,
    /// Responses that sample at once.
    pub sampling_max: usize,
    /// Creates that wait for their turn.
    pub waiting_max: usize,
    /// How long a held response waits for the outputs of its calls, in seconds.
    pub held_secs_max: u64,
    /// How long a message may wait for a client that does not read, in seconds.
    pub send_secs_max: u64,
    /// Events that wait to be sent.
    pub events_queued_max: usize,
    /// Commands of one lane that wait to be looked at.
    pub commands_queued_max: usize,
    /// Ended responses that stay ready to be continued.
    pub responses_held_max: usize,
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            age_secs_max: 3600,
            go_away_secs: 30,
            lanes_max: 32,
            sampling_max: 16,
            waiting_max: 64,
            held_secs_max: 600,
            send_secs_max: 30,
            events_queued_max: 64,
            commands_queued_max: 64,
            responses_held_max: 4096,
        }
    }
}

impl Stream {
    /// As a stream takes them.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            age_max: Duration::from_secs(self.age_secs_max),
            go_away: Duration::from_secs(self.go_away_secs),
            lanes_max: self.lanes_max,
            sampling_max: self.sampling_max,
            waiting_max: self.waiting_max,
            held_time_max: Duration::from_secs(self.held_secs_max),
            send_time_max: Duration::from_secs(self.send_secs_max),
            events_queued_max: self.events_queued_max,
            commands_queued_max: self.commands_queued_max,
        }
    }
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    /// Input items of one command.
    pub items_max: usize,
    /// Tools of one conversation.
    pub tools_max: usize,
    /// Bytes of text of one item.
    pub item_bytes_max: usize,
    /// Tokens that one response samples, whatever the client asks for.
    pub output_tokens_max: u32,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            items_max: 4096,
            tools_max: 512,
            item_bytes_max: 16 << 20,
            output_tokens_max: 32_768,
        }
    }
}

/// What is kept in memory between commands and streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cache {
    /// Bytes of conversations whose stream has ended.
    pub parked_bytes_max: u64,
    /// How long they are kept, in seconds.
    pub parked_secs_max: u64,
    /// How much of that room one tenant may fill, in percent.
    pub parked_share_per_tenant_percent: u8,
    /// Bytes of the key-value caches of all local models together.
    pub models_bytes_max: u64,
    /// Bytes of rendered heads: instructions and tools that many conversations begin with.
    pub heads_bytes_max: u64,
    /// Bytes of tokenizers and templates, for names that share a directory.
    pub artifacts_bytes_max: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            parked_bytes_max: 1 << 30,
            parked_secs_max: 600,
            parked_share_per_tenant_percent: 50,
            models_bytes_max: 4 << 30,
            heads_bytes_max: 256 << 20,
            artifacts_bytes_max: 1 << 30,
        }
    }
}

/// What is kept on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Store {
    /// The file, relative to the file of settings. `None`, and empty in the file: there is no store.
    #[serde(with = "file::path_or_empty")]
    pub path: Option<PathBuf>,
    /// Responses in it.
    pub responses_max: u64,
    /// Bytes of the responses in it.
    pub bytes_max: u64,
    /// How long after its last response a conversation is kept, in seconds.
    pub age_secs_max: u64,
    /// Bytes of responses that wait to be written.
    pub write_queue_bytes_max: usize,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            path: None,
            responses_max: 1_000_000,
            bytes_max: 16 << 30,
            age_secs_max: 30 * 24 * 3600,
            write_queue_bytes_max: 256 << 20,
        }
    }
}

/// What is recorded of usage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Billing {
    /// The journal, relative to the file of settings. `None`, and empty in the file: usage is told in
    /// the log alone.
    #[serde(with = "file::path_or_empty")]
    pub path: Option<PathBuf>,
    /// When a transaction of the journal counts as written.
    pub durability: Durability,
    /// Records that are begun and not yet written as settled.
    pub backlog_records_max: usize,
    /// What happens to a create at that number.
    pub at_bound: AtBound,
    /// How long it waits, for room with `block`, and for its reservation, in seconds.
    pub block_secs_max: u64,
    /// Whether it waits until its reservation is written.
    pub reserve: Reserve,
    /// After how many sampled tokens of a response its counts are written,
    pub checkpoint_tokens: u64,
    /// and after how many milliseconds at the latest.
    pub checkpoint_ms: u64,
    /// How long a record is kept that is settled and exported, in seconds.
    pub retention_secs: u64,
    /// Names the prices that are in force; stands in every record.
    pub price_book_version: String,
    /// Where records go from the journal. In the file: `[[billing.export]]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub export: Vec<BillingExport>,
}

impl Default for Billing {
    fn default() -> Self {
        Self {
            path: None,
            durability: Durability::Normal,
            backlog_records_max: 65_536,
            at_bound: AtBound::Block,
            block_secs_max: 5,
            reserve: Reserve::Behind,
            checkpoint_tokens: 64,
            checkpoint_ms: 250,
            retention_secs: 30 * 24 * 3600,
            price_book_version: String::new(),
            export: Vec::new(),
        }
    }
}

impl Billing {
    /// As the biller takes them.
    #[must_use]
    pub fn options(&self) -> BillingOptions {
        BillingOptions {
            backlog_records_max: self.backlog_records_max,
            at_bound: self.at_bound,
            block_time_max: Duration::from_secs(self.block_secs_max),
            reserve: self.reserve,
            pace: Pace {
                tokens: self.checkpoint_tokens,
                time: Duration::from_millis(self.checkpoint_ms),
            },
            retention: Duration::from_secs(self.retention_secs),
            price_book_version: self.price_book_version.as_str().into(),
        }
    }
}

/// A sink of usage records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BillingExport {
    /// Its name in the journal, by which it is known what it has.
    pub name: String,
    /// What it is.
    pub kind: ExportKind,
    /// Of `jsonl`: the file, relative to the file of settings.
    #[serde(default, skip_serializing_if = "no_path")]
    pub path: PathBuf,
    /// Of `cloudevents`: where records are posted to. Of `postgres`: the database, without a password.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub url: String,
    /// Of `cloudevents`: the environment variable with the key that is sent as `authorization: Bearer …`.
    /// Empty: none is. Of `postgres`: the one with the password.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key_variable: String,
    /// Of `cloudevents` and `postgres`: names this server in the events, or in the column `node`.
    #[serde(default = "source")]
    pub source: String,
    /// How large the file may become before another one is begun.
    #[serde(default = "rotate_bytes")]
    pub rotate_bytes: u64,
    /// How often it is asked to take records before they are kept aside.
    #[serde(default = "attempts_max")]
    pub attempts_max: u32,
    /// How long before the second time, in milliseconds; then twice as long with each.
    #[serde(default = "rest_ms_min")]
    pub rest_ms_min: u64,
    /// The longest rest, in milliseconds.
    #[serde(default = "rest_ms_max")]
    pub rest_ms_max: u64,
    /// Of `kafka`: brokers that are asked first, as `host:port`. They tell of the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub brokers: Vec<String>,
    /// Of `kafka`: the topic. It has to be there.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub topic: String,
    /// Of `kafka`: whether connections are encrypted.
    #[serde(default)]
    pub tls: bool,
    /// Of `kafka`: who we are to the brokers, with the password in `key_variable`. Empty: nobody asks.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Of `kafka`: how the brokers are shown that we know the password.
    #[serde(default)]
    pub sasl: Sasl,
    /// Of `kafka`: how long a batch may take, in seconds.
    #[serde(default = "batch_secs_max")]
    pub batch_secs_max: u64,
}

/// What a sink of usage records is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportKind {
    /// A file, with a line of JSON for each record.
    Jsonl,
    /// CloudEvents over HTTP.
    CloudEvents,
    /// A table of Postgres.
    Postgres,
    /// A topic of Kafka.
    Kafka,
}

impl BillingExport {
    /// How often it is asked.
    #[must_use]
    pub fn retries(&self) -> Retries {
        Retries {
            attempts_max: self.attempts_max,
            rest_min: Duration::from_millis(self.rest_ms_min),
            rest_max: Duration::from_millis(self.rest_ms_max),
        }
    }
}

fn no_path(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

fn source() -> String {
    "hotloop".to_owned()
}

fn rotate_bytes() -> u64 {
    64 << 20
}

fn attempts_max() -> u32 {
    8
}

fn rest_ms_min() -> u64 {
    100
}

fn rest_ms_max() -> u64 {
    10_000
}

fn batch_secs_max() -> u64 {
    30
}

/// What items are checked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Safety {
    /// The file of rules, relative to the file of settings. `None`, and empty in the file: those that
    /// are built in.
    #[serde(with = "file::path_or_empty")]
    pub rules: Option<PathBuf>,
    /// Which rules look where, and what is done. None: nothing is checked. In the file:
    /// `[[safety.policy]]`.
    #[serde(rename = "policy", skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<PolicyOptions>,
    /// What is asked over a network. In the file: `[[safety.classifier]]`.
    #[serde(rename = "classifier", skip_serializing_if = "Vec::is_empty")]
    pub classifiers: Vec<ClassifierOptions>,
}

/// The log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What is logged: a level, or directives such as `info,hotloop::stream=debug`.
    pub filter: String,
    /// How lines are written.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            filter: "info".into(),
            format: LogFormat::Text,
        }
    }
}

/// How lines of the log are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A model that clients may name, and what samples from it. All that do sample the same model: they
/// take the same tokens. A model for which none is named runs in this process. Paths are relative to
/// the file that they stand in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What clients call it.
    pub name: String,
    /// Whether it serves creates that name no model.
    #[serde(default)]
    pub default: bool,
    /// The directory of its tokenizer, template and, for `local`, weights. `None`: a built-in one.
    pub path: Option<PathBuf>,
    /// The family of its template and output format, where it is not to be found out.
    pub family: Option<String>,
    /// Tokens of its context, where it is to be less than the model's own.
    pub context_length: Option<u32>,
    /// The model that takes over where nothing samples from this one.
    pub fallback: Option<String>,
    /// Runs the model in this process.
    pub local: Option<Local>,
    /// Answers by rules, with a real tokenizer and template.
    pub sim: Option<Sim>,
    /// Engines that are reached over gRPC.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpu: Vec<GpuOptions>,
    /// Services that are reached over HTTP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cerebras: Vec<CerebrasOptions>,
}

/// A model in this process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Local {
    /// Bytes of its key-value cache. `None`: what `cache.models_bytes_max` leaves.
    pub cache_bytes_max: Option<u64>,
    /// What it computes on.
    pub device: DeviceChoice,
}

/// A simulated model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sim {
    /// The rules. `None`: the built-in demonstration.
    pub rules: Option<PathBuf>,
    /// How fast it seems to sample, at most 1,000,000. 0: as fast as it can.
    pub tokens_per_second: f64,
    /// How long it seems to think before the first token, in milliseconds, at most 600,000.
    pub first_token_ms: u64,
}

impl Default for Sim {
    fn default() -> Self {
        Self {
            rules: None,
            tokens_per_second: 200.0,
            first_token_ms: 50,
        }
    }
}

/// Another name, for one model or for several that share what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alias {
    /// What clients call it.
    pub name: String,
    /// What it stands for.
    pub to: Vec<Target>,
}

/// One of the models that a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The model.
    pub model: String,
    /// Its share of the conversations, beside those of the others; 1 to 1,000,000.
    #[serde(default = "one")]
    pub weight: u32,
}

fn one() -> u32 {
    1
}

impl Model {
    /// A model of this name, with nothing that samples from it yet.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            default: false,
            path: None,
            family: None,
            context_length: None,
            fallback: None,
            local: None,
            sim: None,
            gpu: Vec::new(),
            cerebras: Vec::new(),
        }
    }

    /// The environment variables that hold the keys of its engines.
    fn key_variables(&self) -> Vec<String> {
        let gpu = self.gpu.iter().map(|it| &it.key_variable);
        let cerebras = self.cerebras.iter().map(|it| &it.key_variable);
        let all = gpu.chain(cerebras);
        all.filter(|name| !name.is_empty()).cloned().collect()
    }

    /// Whether something that samples from it takes tokens, so that they must be the model's own.
    pub(crate) fn takes_tokens(&self) -> bool {
        let tokens = |it: &CerebrasOptions| it.prompt == PromptForm::Tokens;
        !self.gpu.is_empty() || self.local.is_some() || self.cerebras.iter().any(tokens)
    }

    /// What samples from it, for people.
    #[must_use]
    pub fn kinds(&self) -> String {
        let named = [
            ("local", usize::from(self.local.is_some())),
            ("sim", usize::from(self.sim.is_some())),
            ("gpu", self.gpu.len()),
            ("cerebras", self.cerebras.len()),
        ];
        let named = named.into_iter().filter(|(_, count)| *count > 0);
        let named = named.map(|(kind, count)| match count {
            1 => kind.to_owned(),
            count => format!("{count} x {kind}"),
        });
        named.collect::<Vec<_>>().join(", ")
    }

    /// Bytes of its key-value cache, where it has one and they are set.
    pub(crate) fn cache_bytes_max(&self) -> Option<u64> {
        self.local.as_ref()?.cache_bytes_max
    }

    /// The models of a server that was told of none: the tiny one that is built in, and the
    /// simulated one.
    fn built_in() -> Vec<Self> {
        let mut models = Vec::new();
        if cfg!(feature = "local") {
            models.push(Self {
                local: Some(Local::default()),
                ..Self::new("tiny-agent")
            });
        }
        models.push(Self {
            sim: Some(Sim::default()),
            ..Self::new("sim-agent")
        });
        models[0].default = true;
        models
    }

    /// The local model in this directory, named after it.
    fn in_directory(path: &Path) -> Result<Self, ConfigError> {
        let refuse = |reason: String| ConfigError::Given {
            origin: "--model".into(),
            reason,
        };
        // `--model .` is named after the directory that it stands for.
        let whole = path
            .canonicalize()
            .map_err(|error| refuse(format!("cannot find {}: {error}", path.display())))?;
        let name = whole
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| refuse(format!("{} has no name to go by", path.display())))?;
        Ok(Self {
            default: true,
            path: Some(path.into()),
            local: Some(Local::default()),
            ..Self::new(name)
        })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            server: Server::default(),
            auth: Auth::default(),
            stream: Stream::default(),
            request: Request::default(),
            cache: Cache::default(),
            routing: RoutingOptions::default(),
            store: Store::default(),
            billing: Billing::default(),
            safety: Safety::default(),
            log: Log::default(),
            models: Model::built_in(),
            aliases: Vec::new(),
            budgets: Vec::new(),
            prices: Vec::new(),
            api_keys: Keys::default(),
            secrets: Secrets::default(),
        }
    }
}

/// The settings of a command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Read settings from this TOML file.
    #[arg(long, value_name = "FILE", env = "HOTLOOP_CONFIG")]
    pub config: Option<PathBuf>,
    /// Listen here: the same as `--set server.listen=ADDRESS`.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Serve the model in this directory, under the directory's name, as the default model.
    #[arg(long, value_name = "DIRECTORY")]
    pub model: Option<PathBuf>,
    /// Set one key of the file, such as `stream.age_secs_max=600`. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl Config {
    /// Puts the configuration together from defaults, file, environment and flags.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, and where it was said.
    pub fn load(
        flags: &Flags,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut config = match &flags.config {
            Some(path) => file::read(path)?,
            None => Self {
                models: Vec::new(),
                ..Self::default()
            },
        };

        let mut api_keys = Keys::default();
        let mut secrets = Secrets::default();
        let sinks = config
            .billing
            .export
            .iter()
            .map(|it| it.key_variable.clone());
        let classifiers = config.safety.classifiers.iter();
        let classifiers = classifiers.map(|it| it.key_variable.clone());
        let wanted: Vec<String> = config
            .models
            .iter()
            .flat_map(Model::key_variables)
            .chain(sinks)
            .chain(classifiers)
            .collect();
        for (variable, value) in environment {
            if wanted.contains(&variable) {
                secrets.0.insert(variable, value);
            } else if variable == auth::KEYS_VARIABLE {
                api_keys = Keys::parse(&value)?;
            } else if let Some(name) = variable.strip_prefix(VARIABLE_PREFIX)
                && let Some((section, key)) = name.split_once("__")
            {
                let key = format!("{section}.{key}").to_ascii_lowercase();
                config = config.with(&key, &value, &variable)?;
            }
        }

        if let Some(listen) = &flags.listen {
            config = config.with("server.listen", listen, "--listen")?;
        }
        for setting in &flags.set {
            let (key, value) = setting.split_once('=').ok_or_else(|| ConfigError::Given {
                origin: format!("--set {setting}"),
                reason: "expected KEY=VALUE".into(),
            })?;
            config = config.with(key.trim(), value.trim(), &format!("--set {key}"))?;
        }

        if let Some(path) = &flags.model {
            for model in &mut config.models {
                model.default = false;
            }
            config.models.push(Model::in_directory(path)?);
        }
        match config.models.as_mut_slice() {
            [] => config.models = Model::built_in(),
            [only] => only.default = true,
            _ => {}
        }

        for model in &mut config.models {
            if model.kinds().is_empty() {
                model.local = Some(Local::default());
            }
        }

        config.api_keys = api_keys;
        config.secrets = secrets;
        config.check()?;
        Ok(config)
    }

    /// The same settings with one of them changed. Which type its text is read as is what the
    /// setting has now; so `"5"` may become a number or a text.
    fn with(self, key: &str, value: &str, origin: &str) -> Result<Self, ConfigError> {
        let refuse = |reason: String| ConfigError::Given {
            origin: origin.into(),
            reason,
        };
        let mut table = toml::Table::try_from(&self).map_err(|error| refuse(error.to_string()))?;
        let place = key
            .split_once('.')
            .and_then(|(section, key)| table.get_mut(section)?.as_table_mut()?.get_mut(key))
            .ok_or_else(|| refuse(format!("there is no setting {key}")))?;
        *place = match place {
            toml::Value::Integer(_) => {
                let digits = value.replace('_', "");
                let number = digits.parse();
                toml::Value::Integer(number.map_err(|_| refuse("expected a whole number".into()))?)
            }
            toml::Value::Float(_) => {
                let number = value.parse();
                toml::Value::Float(number.map_err(|_| refuse("expected a number".into()))?)
            }
            toml::Value::String(_)
            | toml::Value::Boolean(_)
            | toml::Value::Datetime(_)
            | toml::Value::Array(_)
            | toml::Value::Table(_) => toml::Value::String(value.into()),
        };
        table
            .try_into()
            .map_err(|error: toml::de::Error| refuse(error.message().into()))
    }

    /// The gate that these settings ask for.
    ///
    /// # Errors
    ///
    /// Where keys are asked for and there are none.
    pub fn gate(&self) -> Result<Gate, GateError> {
        Gate::new(self.auth.mode, self.server.listen, self.api_keys.clone())
    }

    /// The model that serves creates that name none.
    ///
    /// `None` only in a configuration that did not come from [`Config::load`].
    #[must_use]
    pub fn default_model(&self) -> Option<&Model> {
        self.models.iter().find(|model| model.default)
    }

    /// The share of `cache.models_bytes_max` of each local model that is not told its own.
    #[must_use]
    pub fn unclaimed_cache_bytes(&self) -> u64 {
        let local = self.models.iter().filter(|model| model.local.is_some());
        let (told, open): (Vec<_>, Vec<_>) =
            local.partition(|model| model.cache_bytes_max().is_some());
        let claimed: u64 = told.into_iter().filter_map(Model::cache_bytes_max).sum();
        self.cache.models_bytes_max.saturating_sub(claimed) / (open.len() as u64).max(1)
    }
}

/// What is wrong with a configuration, and where it was said.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file says something that cannot be.
    #[error("{}:{line}: {key}{}{reason}", path.display(), if key.is_empty() { "" } else { ": " })]
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key, such as `server.listen` or `model[1].backend`; empty where the file is no TOML.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A variable or a flag says something that cannot be.
    #[error("{origin}: {reason}")]
    Given {
        /// The variable or flag.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// A number is out of its range.
    #[error("{key} is {value}, but must be from {} to {}", range.start(), range.end())]
    Range {
        /// The key.
        key: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        range: RangeInclusive<u64>,
    },
    /// Two settings do not go together.
    #[error("{reason}")]
    Conflict {
        /// Which, and why.
        reason: String,
    },
    /// The API keys cannot be read.
    #[error("{variable}: {0}", variable = auth::KEYS_VARIABLE)]
    Keys(#[from] KeysError),
    /// The port would be open to everybody, or to nobody.
    #[error(transparent)]
    Gate(#[from] GateError),
}

#[cfg(test)]
mod tests;
