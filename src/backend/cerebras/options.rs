//! The settings of one such backend as they stand in the file, and their ranges.

use std::{collections::BTreeMap, ops::RangeInclusive};

use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CerebrasError;

/// Settings of one service. Those that no service but Cerebras' own knows are not sent to others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CerebrasOptions {
    /// Where the service is, without `/v1`, which may stand there all the same. `http` or `https`.
    pub url: String,
    /// What the service calls the model; 1 to 256 bytes.
    pub model: String,
    /// The environment variable that holds the key; empty: no key is sent.
    pub key_variable: String,
    /// Its share of the conversations, beside those of the others: 1 to 1,000.
    pub weight: u32,
    /// What the service takes beyond OpenAI's API.
    pub dialect: Dialect,
    /// What is sent: messages, which the service renders, or the exact tokens.
    pub prompt: PromptForm,
    /// How a request is written. `msgpack` is for `prompt = "tokens"` only.
    pub body: BodyForm,
    /// Whether requests are compressed.
    pub gzip: bool,
    /// Whether to speak HTTP/2 without asking. For `https` it is negotiated without this.
    pub http2_prior_knowledge: bool,
    /// The key under which messages of the model have their reasoning.
    pub reasoning_key: ReasoningKey,
    /// Whether the service knows the role `developer`; else such messages have the role `system`.
    pub developer_role: bool,
    /// What Cerebras is to do with reasoning: `parsed`, `hidden` and others; empty: not sent. At
    /// most 32 letters.
    pub reasoning_format: String,
    /// Whether Cerebras is told to keep earlier reasoning (`clear_thinking` is false). Models that
    /// do not know the field refuse it.
    pub keep_thinking: bool,
    /// What the most tokens of an answer are called in chat completions.
    pub max_tokens_key: MaxTokensKey,
    /// What is done with top-k, which OpenAI's API does not have.
    pub top_k: TopK,
    /// Whether conversations are told apart by `prompt_cache_key`, in chat completions.
    pub cache_key: bool,
    /// Whether a connection is made before the first request; only of Cerebras' own service.
    pub warm: bool,
    /// How long a connection may take, in milliseconds: 1 to 120,000.
    pub connect_ms: u64,
    /// How long the first byte of an answer may take from the request on, in milliseconds: 1 to 3,600,000.
    pub first_byte_ms: u64,
    /// How long an answer may pause, in milliseconds: 1 to 3,600,000.
    pub idle_ms: u64,
    /// How long a whole answer may take, in seconds: 1 to 86,400.
    pub sample_secs_max: u64,
    /// How long an unused connection is kept, in seconds: 1 to 3,600.
    pub pool_idle_secs: u64,
    /// The largest request before compression, in bytes: 1,024 to 1,073,741,824.
    pub request_bytes_max: usize,
    /// Refuse requests that would wait longer than this, in milliseconds: 1 to 600,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_threshold_ms: Option<u64>,
    /// The service's tier for all requests; 1 to 32 letters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_tier: Option<String>,
    /// More headers, at most 32, of at most 1,024 bytes each. No secrets: they stand in a file.
    pub headers: BTreeMap<String, String>,
    /// More fields of each request, at most 64 and 65,536 bytes of JSON.
    pub extra: Map<String, Value>,
}

/// What a service takes beyond OpenAI's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// Cerebras' own: `clear_thinking`, `reasoning_format`, `return_raw_tokens`, warming.
    #[default]
    Cerebras,
    /// Nothing. No tokens can be had.
    OpenAi,
    /// vLLM's server: `return_token_ids`, `stop_token_ids`, and `cache_salt`, by which tenants have
    /// caches of their own.
    Vllm,
}

impl Dialect {
    /// The fields that it has beyond OpenAI's.
    fn own_fields(self) -> &'static [&'static str] {
        match self {
            Self::Cerebras => &["clear_thinking", "reasoning_format", "return_raw_tokens"],
            Self::OpenAi => &[],
            Self::Vllm => &["cache_salt", "return_token_ids", "stop_token_ids"],
        }
    }
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptForm {
    /// Messages, to `/v1/chat/completions`.
    #[default]
    Chat,
    /// Tokens, to `/v1/completions`; tokens come back.
    Tokens,
}

/// How a request is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BodyForm {
    /// JSON.
    #[default]
    Json,
    /// MessagePack.
    Msgpack,
}

/// The key of reasoning in messages that are sent. In answers each is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningKey {
    /// `reasoning`: Cerebras, vLLM, Groq.
    #[default]
    Reasoning,
    /// `reasoning_content`: Fireworks, older vLLM.
    ReasoningContent,
    /// Earlier reasoning is not sent.
    None,
}

/// What the most tokens of an answer are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensKey {
    /// `max_completion_tokens`.
    #[default]
    MaxCompletionTokens,
    /// `max_tokens`, for services that know only the older name.
    MaxTokens,
}

/// What is done with top-k.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TopK {
    /// A prompt that has it is refused.
    #[default]
    Refuse,
    /// It is sent as `top_k`.
    Send,
    /// It is left out: sampling is from more tokens than was asked for.
    Ignore,
}

impl Default for CerebrasOptions {
    fn default() -> Self {
        Self {
            url: "https://api.cerebras.ai".into(),
            model: String::new(),
            key_variable: "CEREBRAS_API_KEY".into(),
            weight: 1,
            dialect: Dialect::default(),
            prompt: PromptForm::default(),
            body: BodyForm::default(),
            gzip: false,
            http2_prior_knowledge: false,
            reasoning_key: ReasoningKey::default(),
            developer_role: true,
            reasoning_format: "parsed".into(),
            keep_thinking: true,
            max_tokens_key: MaxTokensKey::default(),
            top_k: TopK::default(),
            cache_key: true,
            warm: true,
            connect_ms: 10_000,
            first_byte_ms: 120_000,
            idle_ms: 60_000,
            sample_secs_max: 3_600,
            pool_idle_secs: 90,
            request_bytes_max: 64 << 20,
            queue_threshold_ms: None,
            service_tier: None,
            headers: BTreeMap::new(),
            extra: Map::new(),
        }
    }
}

const MODEL_BYTES_MAX: usize = 256;
const WORD_LETTERS_MAX: usize = 32;
const HEADERS_MAX: usize = 32;
const HEADER_BYTES_MAX: usize = 1_024;
const EXTRA_FIELDS_MAX: usize = 64;
const EXTRA_BYTES_MAX: usize = 65_536;

/// Fields of a request that have their own settings, or come from the conversation.
const OWN_FIELDS: [&str; 22] = [
    "frequency_penalty",
    "logit_bias",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "n",
    "parallel_tool_calls",
    "presence_penalty",
    "prompt",
    "prompt_cache_key",
    "reasoning_effort",
    "response_format",
    "seed",
    "service_tier",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_p",
];

/// Headers that hold secrets, or that belong to the connection or to one request.
const OWN_HEADERS: [&str; 15] = [
    "accept",
    "accept-encoding",
    "api-key",
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "host",
    "proxy-authorization",
    "queue_threshold",
    "transfer-encoding",
    "upgrade",
    "x-api-key",
];

impl CerebrasOptions {
    /// Whether each setting is in its range.
    ///
    /// # Errors
    ///
    /// [`CerebrasError::Option`] names the first that is not.
    pub fn check(&self) -> Result<(), CerebrasError> {
        self.base()?;
        let model_ok = (1..=MODEL_BYTES_MAX).contains(&self.model.len());
        ensure(model_ok, "model", || {
            format!("has {} bytes, not 1 to {MODEL_BYTES_MAX}", self.model.len())
        })?;
        let variable = self.key_variable.bytes();
        let variable_ok = variable.len() <= 128 && variable.clone().all(is_word);
        ensure(variable_ok, "key_variable", || {
            "is no name of an environment variable of at most 128 bytes".into()
        })?;
        within("weight", self.weight.into(), 1..=1_000)?;
        within("connect_ms", self.connect_ms, 1..=120_000)?;
        within("first_byte_ms", self.first_byte_ms, 1..=3_600_000)?;
        within("idle_ms", self.idle_ms, 1..=3_600_000)?;
        within("sample_secs_max", self.sample_secs_max, 1..=86_400)?;
        within("pool_idle_secs", self.pool_idle_secs, 1..=3_600)?;
        let bytes = self.request_bytes_max as u64;
        within("request_bytes_max", bytes, 1_024..=1 << 30)?;
        if let Some(threshold) = self.queue_threshold_ms {
            within("queue_threshold_ms", threshold, 1..=600_000)?;
        }
        if let Some(tier) = &self.service_tier {
            ensure(!tier.is_empty(), "service_tier", || "is empty".into())?;
            word("service_tier", tier)?;
        }
        word("reasoning_format", &self.reasoning_format)?;
        self.check_tokens()?;
        self.check_extra()?;
        self.header_map().map(drop)
    }

    fn check_tokens(&self) -> Result<(), CerebrasError> {
        match (self.prompt, self.body, self.dialect) {
            (PromptForm::Chat, BodyForm::Msgpack, _) => fail(
                "body",
                "\"msgpack\" is for prompt = \"tokens\": messages are kept as JSON",
            ),
            (PromptForm::Tokens, _, Dialect::OpenAi) => fail(
                "prompt",
                "\"tokens\" takes a dialect whose answers have tokens: \"cerebras\" or \"vllm\"",
            ),
            (PromptForm::Chat, BodyForm::Json, _)
            | (
                PromptForm::Tokens,
                BodyForm::Json | BodyForm::Msgpack,
                Dialect::Cerebras | Dialect::Vllm,
            ) => Ok(()),
        }
    }

    fn check_extra(&self) -> Result<(), CerebrasError> {
        let own = |key: &str| match key {
            "top_k" => self.top_k != TopK::Ignore,
            key => OWN_FIELDS.contains(&key) || self.dialect.own_fields().contains(&key),
        };
        if let Some(key) = self.extra.keys().find(|key| own(key)) {
            return fail("extra", format!("{key} is set elsewhere"));
        }
        ensure(self.extra.len() <= EXTRA_FIELDS_MAX, "extra", || {
            format!("has over {EXTRA_FIELDS_MAX} fields")
        })?;
        let bytes = serde_json::to_vec(&self.extra).map_or(usize::MAX, |json| json.len());
        ensure(bytes <= EXTRA_BYTES_MAX, "extra", || {
            format!("is over {EXTRA_BYTES_MAX} bytes of JSON")
        })
    }

    /// The headers of each request that the file sets.
    pub(super) fn header_map(&self) -> Result<HeaderMap, CerebrasError> {
        ensure(self.headers.len() <= HEADERS_MAX, "headers", || {
            format!("has over {HEADERS_MAX} entries")
        })?;
        let mut map = HeaderMap::new();
        for (name, value) in &self.headers {
            let short = name.len().max(value.len()) <= HEADER_BYTES_MAX;
            let (Ok(parsed), Ok(value), true) = (
                name.parse::<HeaderName>(),
                value.parse::<HeaderValue>(),
                short,
            ) else {
                return fail("headers", "an entry is no HTTP header, or too long");
            };
            if OWN_HEADERS.contains(&parsed.as_str()) {
                return fail("headers", format!("{parsed} cannot be set"));
            }
            map.insert(parsed, value);
        }
        Ok(map)
    }

    /// The URL of the service, without a slash at its end and without `/v1`.
    pub(super) fn base(&self) -> Result<String, CerebrasError> {
        let url = match Url::parse(&self.url) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => url,
            Ok(_) | Err(_) => return fail("url", "is no http or https URL"),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return fail(
                "url",
                "holds a user or password: secrets are for the environment",
            );
        }
        if url.query().is_some() || url.fragment().is_some() {
            return fail("url", "has a query or a fragment");
        }
        let base = url.as_str().trim_end_matches('/');
        Ok(base.strip_suffix("/v1").unwrap_or(base).to_owned())
    }

    /// Whether the connection is encrypted, or stays on this machine.
    pub(super) fn is_private(&self) -> bool {
        Url::parse(&self.url).is_ok_and(|url| {
            let host = url.host_str().unwrap_or_default();
            let local = ["localhost", "127.0.0.1", "[::1]"].contains(&host);
            url.scheme() == "https" || local
        })
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn word(field: &'static str, text: &str) -> Result<(), CerebrasError> {
    let ok = text.len() <= WORD_LETTERS_MAX && text.bytes().all(is_word);
    ensure(ok, field, || {
        format!("is no word of at most {WORD_LETTERS_MAX} letters")
    })
}

fn within(
    field: &'static str,
    value: u64,
    range: RangeInclusive<u64>,
) -> Result<(), CerebrasError> {
    ensure(range.contains(&value), field, || {
        format!("{value} is not {} to {}", range.start(), range.end())
    })
}

fn ensure(
    ok: bool,
    field: &'static str,
    reason: impl FnOnce() -> String,
) -> Result<(), CerebrasError> {
    if ok { Ok(()) } else { fail(field, reason()) }
}

fn fail<T>(field: &'static str, reason: impl Into<String>) -> Result<T, CerebrasError> {
    Err(CerebrasError::Option {
        field,
        reason: reason.into(),
    })
}

#[cfg(test)]
mod tests;
