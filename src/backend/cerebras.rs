//! `cerebras`: models behind an OpenAI-compatible API over HTTP, made for those that answer with
//! thousands of tokens a second. Cerebras' own service first; others by their settings.
//!
//! Two ways lead there. As **messages** (`prompt = "chat"`): the service renders, constrains and
//! reads by itself, and tells text, reasoning and calls. As **tokens** (`prompt = "tokens"`): it is
//! handed the exact ids of the ledger, and gives back the ids that it sampled.
//!
//! What was sent before is not written again: a request is made of the bytes that the
//! conversation keeps ([`ChatMessage`](super::ChatMessage), [`Rope::encoded`](crate::ledger::Rope::encoded)).
//!
//! ```text
//!   prompt ─ body (written) ─ upload ─▶ service ─▶ sse ─ answer (wire, calls) ─ chunks
//!                                          └─ failure
//! ```
//!
//! A sample is one request; dropping its stream ends it. What goes wrong before the first byte of an
//! answer leaves the prompt to others (`Unavailable`), later the sample is broken (`Failed`).

mod answer;
mod body;
mod calls;
mod failure;
mod options;
mod service;
mod sse;
mod upload;
mod wire;
mod written;

use std::{collections::HashSet, fmt, sync::Arc};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use reqwest::header::HeaderValue;
use tracing::Instrument as _;

use super::{Backend, BackendError, Capabilities, Chunk, Chunks, Prompt};
use answer::Answer;
use calls::Assembler;
use service::{Next, Reading, Request, Service};
use written::Written;

pub use options::{
    BodyForm, CerebrasOptions, Dialect, MaxTokensKey, PromptForm, ReasoningKey, TopK,
};

/// The most bytes of one event of an answer.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// The most bytes of a token id in JSON, with the comma.
const ID_BYTES_MAX: usize = 11;

/// Why a backend could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CerebrasError {
    /// A setting is out of its range.
    #[error("{field}: {reason}")]
    Option {
        /// The field of [`CerebrasOptions`].
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The key is empty, or no text that a header can hold.
    #[error("the key is empty or has characters that no key has")]
    Key,
    /// The HTTP client could not be made: as a rule the system has no certificates.
    #[error("the HTTP client cannot be made")]
    Client(#[source] reqwest::Error),
}

/// A key for a service. It is never shown.
#[derive(Clone)]
pub struct ApiKey(HeaderValue);

impl ApiKey {
    /// The key as the environment has it; white space around it is dropped.
    ///
    /// # Errors
    ///
    /// [`CerebrasError::Key`], which does not say what it is.
    pub fn new(key: &str) -> Result<Self, CerebrasError> {
        let key = key.trim();
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(CerebrasError::Key);
        }
        let bearer = format!("Bearer {key}").parse::<HeaderValue>();
        let mut bearer = bearer.map_err(|_| CerebrasError::Key)?;
        bearer.set_sensitive(true);
        Ok(Self(bearer))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey")
    }
}

/// A model behind an OpenAI-compatible API.
#[derive(Debug)]
pub struct Cerebras {
    options: CerebrasOptions,
    service: Arc<Service>,
    written: Written,
}

impl Cerebras {
    /// A backend for this model. In a tokio runtime, a connection to Cerebras' service is made at once.
    ///
    /// # Errors
    ///
    /// [`CerebrasError`]: a setting is out of its range, or there are no certificates to trust.
    pub fn new(options: CerebrasOptions, key: Option<ApiKey>) -> Result<Self, CerebrasError> {
        options.check()?;
        if key.is_some() && !options.is_private() {
            tracing::warn!("the key goes over a connection that is not encrypted");
        }
        Ok(Self {
            service: Arc::new(Service::new(&options, key)?),
            written: Written::new(),
            options,
        })
    }

    /// What the service last said about its limits: its headers `x-ratelimit-*`, at most 16.
    #[must_use]
    pub fn rate_limits(&self) -> Vec<(String, String)> {
        self.service.limits()
    }

    /// vLLM repeats the ids of the prompt in its first event.
    fn event_bytes_max(&self, prompt: &Prompt) -> usize {
        match (self.options.prompt, self.options.dialect) {
            (PromptForm::Tokens, Dialect::Vllm) => {
                EVENT_BYTES_MAX + prompt.tokens.len_tokens() * ID_BYTES_MAX
            }
            (PromptForm::Chat, _) | (_, Dialect::Cerebras | Dialect::OpenAi) => EVENT_BYTES_MAX,
        }
    }

    fn answer(&self, prompt: &Prompt) -> Answer {
        match (self.options.prompt, &prompt.chat) {
            (PromptForm::Chat, Some(chat)) => {
                let callable = chat.settings.callable();
                let tools: HashSet<String> = callable.map(|tool| tool.name.to_string()).collect();
                let one_call = chat.settings.parallel_tool_calls == Some(false);
                Answer::of_messages(Assembler::new(Arc::new(tools), one_call))
            }
            (PromptForm::Chat, None) | (PromptForm::Tokens, _) => {
                let sampling = &prompt.sampling;
                Answer::of_tokens(sampling.max_tokens, sampling.end_tokens.clone())
            }
        }
    }
}

impl Backend for Cerebras {
    fn capabilities(&self) -> Capabilities {
        let chat = self.options.prompt == PromptForm::Chat;
        Capabilities {
            kind: "cerebras",
            keeps_cache: true,
            prefill: false,
            constrained_sampling: chat,
            logprobs: false,
            reads_items: false,
            reads_messages: chat,
            sampling: true,
        }
    }

    fn healthy(&self) -> bool {
        self.service.is_healthy()
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        let span = tracing::debug_span!("service", response = %prompt.response_id);
        let parts = match body::parts(&self.options, &self.written, &prompt) {
            Ok(parts) => parts,
            Err(error) => return stream::iter([Err(error)]).boxed(),
        };
        let request = Request {
            parts,
            answer: self.answer(&prompt),
            event_bytes_max: self.event_bytes_max(&prompt),
        };
        let asking = self.service.clone().ask(request).boxed();
        stream::unfold(Sample::Asking(asking), move |sample| {
            sample.next().instrument(span.clone())
        })
        .boxed()
    }

    fn prefill(&self, _: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        std::future::ready(Ok(())).boxed()
    }
}

/// A sample, from its request to its last chunk.
enum Sample {
    Asking(BoxFuture<'static, Result<Reading, BackendError>>),
    Reading(Box<Reading>),
    Over,
}

impl Sample {
    async fn next(self) -> Option<(Result<Chunk, BackendError>, Self)> {
        let reading = match self {
            Self::Asking(asking) => asking.await.map(Box::new),
            Self::Reading(reading) => Ok(reading),
            Self::Over => return None,
        };
        let next = match reading {
            Ok(reading) => reading.next().await,
            Err(error) => Err(error),
        };
        Some(match next {
            Ok(Next::More(chunk, reading)) => (Ok(chunk), Self::Reading(reading)),
            Ok(Next::Last(chunk)) => (Ok(chunk), Self::Over),
            Err(error) => (Err(error), Self::Over),
        })
    }
}
