//! What samples: the seam between a conversation and an engine.
//!
//! A [`Backend`] is handed a [`Prompt`], exact tokens on the shared ledger, and answers with a
//! stream of [`Chunk`]s. Dropping the stream cancels the sample. The router is a backend made of
//! backends; `sim` plays scripts; `local` runs a model in this process; `gpu` reaches engines over gRPC, `cerebras`
//! services over HTTP.

pub mod cerebras;
pub mod gpu;
pub mod router;
pub mod sim;

pub(crate) mod breaker;
mod lark;

#[cfg(feature = "local")]
pub mod local;

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, future::BoxFuture};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    item::{Item, ResponseId, Tenant, TokenLogprob},
    ledger::Rope,
    parse::{Grammar, Parsed},
    request::Settings,
};

/// Chooses what TLS is computed with, for every client that is made from here on.
pub(crate) fn choose_cryptography() {
    // Whoever was first has chosen: that is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The answer to a prompt: chunks until the sample ends. Dropping it cancels the sample.
pub type Chunks = Pin<Box<dyn Stream<Item = Result<Chunk, BackendError>> + Send>>;

/// Something that samples.
pub trait Backend: Send + Sync + 'static {
    /// What this backend can do. The same for its whole life.
    fn capabilities(&self) -> Capabilities;

    /// Whether it can take a prompt now.
    fn healthy(&self) -> bool;

    /// How many samples its engine runs or has waiting, those of others included, where it tells.
    fn load(&self) -> Option<u32> {
        None
    }

    /// Whether samples of this tenant can keep to this grammar. Asked before a prompt is sampled
    /// with it, and again for each prompt that has it: the second time must cost little.
    ///
    /// # Errors
    ///
    /// [`Ungrammatical`] says what of it cannot be kept to. A backend that finds out only when it
    /// samples does not say.
    fn check(&self, _tenant: &Tenant, _grammar: &Arc<Grammar>) -> Result<(), Ungrammatical> {
        Ok(())
    }

    /// Samples from the prompt.
    ///
    /// # Cancellation
    ///
    /// Dropping the stream stops the engine's work for it as soon as the engine can.
    fn sample(&self, prompt: Prompt) -> Chunks;

    /// Makes the backend's cache hold the prompt, without sampling. Backends without a cache of
    /// their own do nothing. Best effort: an error is for the log, the sample that follows works without.
    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>>;
}

/// What a backend can do. What it cannot is refused before a prompt is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The kind of backend, for people: `sim`, `local`, `gpu`, `cerebras`.
    pub kind: &'static str,
    /// Keeps a conversation's cache between samples.
    pub keeps_cache: bool,
    /// Can prefill without sampling.
    pub prefill: bool,
    /// Can constrain sampling: strict tools, required calls, JSON formats.
    pub constrained_sampling: bool,
    /// Can tell log probabilities.
    pub logprobs: bool,
    /// Reads the items behind the tokens.
    pub reads_items: bool,
    /// Reads the conversation as messages, and renders it by itself.
    pub reads_messages: bool,
    /// Honours temperature, top-p, top-k, seed, penalties and logit bias.
    pub sampling: bool,
}

/// What is sampled from. Cheap to clone: it shares the ledger.
#[derive(Clone)]
pub struct Prompt {
    /// The response that samples, for logs and for the engine's own ids.
    pub response_id: ResponseId,
    /// Whose conversation it is. What an engine keeps of it helps no other tenant: neither its
    /// answers nor their timing may tell one tenant what another has asked.
    pub tenant: Tenant,
    /// Conversations with the same affinity share a prefix; an engine may keep a cache by it.
    pub affinity: Arc<str>,
    /// The exact tokens.
    pub tokens: Rope,
    /// The items since the last message of the user, that message included, newest last. Only
    /// for backends that read items; empty for others.
    pub recent: Vec<Arc<Item>>,
    /// The same conversation as messages. Only for backends that read messages.
    pub chat: Option<Chat>,
    /// How to sample.
    pub sampling: Sampling,
}

/// A conversation for an engine that renders by itself.
#[derive(Debug, Clone)]
pub struct Chat {
    /// What is asked for: instructions, tools, and what else such an engine is to be told.
    pub settings: Arc<Settings>,
    /// What the model sees of the conversation, oldest first, without the instructions.
    pub messages: Vec<ChatMessage>,
}

/// A message as JSON in the form of OpenAI's chat completions, which so many services speak. Made
/// once for each message and kept with the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// The object, without the brace that closes it.
    pub object: Bytes,
    /// The reasoning before an answer, as a JSON string. Services differ in the key that it has.
    pub reasoning: Option<Bytes>,
}

/// How to sample. All values are in range.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// The most tokens to sample, at least 1.
    pub max_tokens: u32,
    /// Tokens that end the sample; the one that did is the last token of the answer.
    pub end_tokens: Arc<[u32]>,
    /// 0 to 2; 0 takes the likeliest token.
    pub temperature: f32,
    /// Over 0, at most 1.
    pub top_p: f32,
    /// 0 takes all tokens.
    pub top_k: u32,
    /// Seed of the sampler; `None`: any.
    pub seed: Option<u64>,
    /// -2 to 2, over the tokens sampled in this response.
    pub presence_penalty: f32,
    /// -2 to 2, over the tokens sampled in this response.
    pub frequency_penalty: f32,
    /// What is added to the logits of these tokens, by token id.
    pub logit_bias: Arc<[(u32, f32)]>,
    /// How many of the likeliest tokens to tell; `None`: no log probabilities.
    pub top_logprobs: Option<u32>,
    /// What the answer keeps to, whatever the other settings are; an end token comes where it is
    /// complete. `None`: it is free. Only for backends that can constrain sampling.
    pub grammar: Option<Arc<Grammar>>,
    /// Names of the tools that may be called. Only `sim` looks at them: an engine sees the prompt.
    pub tools: Arc<[Arc<str>]>,
}

impl Sampling {
    /// Always the likeliest token, at most so many of them, and nothing else asked for.
    #[must_use]
    pub fn greedy(max_tokens: u32) -> Self {
        Self {
            max_tokens,
            end_tokens: Arc::default(),
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Arc::default(),
            top_logprobs: None,
            grammar: None,
            tools: Arc::default(),
        }
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chunk {
    /// Sampled tokens, in order, the end token included. May be empty.
    pub tokens: Vec<u32>,
    /// One entry a token where log probabilities were asked for, else empty.
    pub logprobs: Vec<TokenLogprob>,
    /// Tokens of the prompt that came from the engine's cache, where it tells; in one of the chunks.
    pub cached_tokens: Option<u32>,
    /// What stands in place of tokens where the backend reads messages.
    pub told: Option<Box<Told>>,
    /// Why the sample ended; only in the last chunk.
    pub finish: Option<SampleEnd>,
}

/// A piece of an answer that the engine has read by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Told {
    /// What the model said.
    pub parsed: Vec<Parsed>,
    /// What the engine counted; in one of the chunks.
    pub usage: Option<TokensCounted>,
}

/// The tokens of a sample as the engine counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TokensCounted {
    /// Tokens of the prompt.
    pub input: u32,
    /// Tokens that were sampled, reasoning included.
    pub output: u32,
    /// Those that were reasoning.
    pub reasoning: u32,
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleEnd {
    /// An end token was sampled.
    Stop,
    /// `max_tokens` were sampled.
    Length,
    /// The engine's own monitor ended it.
    ContentFilter,
}

/// A name that says nothing of what it is made of: the same for the same, in 32 hexadecimal digits. What
/// engines are told of tenants and conversations.
fn opaque(what: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    hash.update(what);
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let hash: [u8; 32] = hash.finalize().into();
    hash[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The name of a prompt's tenant for engines: it keeps the tenants' shares of a cache apart.
fn tenant_name(prompt: &Prompt) -> String {
    opaque("tenant", &[prompt.tenant.as_str()])
}

/// The name of a prompt's conversation for engines.
fn conversation_name(prompt: &Prompt) -> String {
    opaque("conversation", &[prompt.tenant.as_str(), &prompt.affinity])
}

/// What a model in this process computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The accelerator that the program was built for, if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first NVIDIA GPU. For programs built with the feature `cuda`.
    Cuda,
    /// The first Apple GPU. For programs built with the feature `metal`.
    Metal,
}

/// Why samples cannot keep to a grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the constraint cannot be kept to: {reason}")]
pub struct Ungrammatical {
    /// The schema that is at fault, where it is one.
    pub schema: Option<Arc<str>>,
    /// For people.
    pub reason: String,
}

/// Why a backend could not sample, or not to the end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// It takes no prompt now: nothing was sampled.
    #[error("the backend is not available: {reason}")]
    Unavailable {
        /// For people.
        reason: String,
        /// When it may be, where known.
        retry_after: Option<Duration>,
    },
    /// It does not take this prompt, and would not another time: nothing was sampled.
    #[error("the backend refuses the prompt: {reason}")]
    Refused {
        /// For people.
        reason: String,
    },
    /// It broke, perhaps after some tokens.
    #[error("the backend failed: {reason}")]
    Failed {
        /// For people.
        reason: String,
    },
}

impl BackendError {
    /// The same error in the middle of a sample: something of it was seen.
    #[must_use]
    fn in_the_middle(self) -> Self {
        match self {
            Self::Unavailable { reason, .. }
            | Self::Refused { reason }
            | Self::Failed { reason } => Self::Failed { reason },
        }
    }
}
