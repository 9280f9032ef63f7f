//! What is kept of a response: plain data, and its id.

use std::sync::Arc;

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::{
    event::{Charged, Code, Finish, IncompleteReason, Status, Usage},
    item::{ResponseId, Tenant},
};

/// What is known of a response when it is dispatched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Which.
    pub response: ResponseId,
    /// Whose.
    pub tenant: Tenant,
    /// The name of the API key, never the key.
    pub key: Arc<str>,
    /// The stream that it ran on.
    pub session: Arc<str>,
    /// The model that the create named; empty where it named none.
    pub model_asked: Arc<str>,
    /// What serves it.
    pub served: Served,
    /// Milliseconds since 1970.
    pub reserved_at_ms: u64,
}

/// What samples a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// The model.
    pub model: Arc<str>,
    /// The kind of backend.
    pub backend: Arc<str>,
}

/// What was counted of a response so far, all its samples together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Tokens of the prompts.
    pub input_tokens: u64,
    /// Those of them that no earlier prompt of the conversation held.
    pub new_tokens: u64,
    /// The others: hotloop had them.
    pub reused_tokens: u64,
    /// Those of all that the engine took from its cache, where it tells.
    pub cached_tokens: u64,
    /// Tokens that were sampled.
    pub output_tokens: u64,
    /// Those that were reasoning.
    pub reasoning_tokens: u64,
    /// Sampled tokens that were handed to a client which was there.
    pub delivered_tokens: u64,
    /// How many samples it took.
    pub samples: u64,
    /// Tools that the server ran.
    pub hosted_calls: u64,
    /// Calls of tools that the model made.
    pub calls: u64,
    /// Milliseconds that samples took.
    pub sample_ms: u64,
    /// What it cost by the prices of the settings, in billionths of their currency.
    pub cost_nanos: u64,
}

impl Counts {
    /// Of the tokens that a response used, with those of its prompts that were there before.
    #[must_use]
    pub fn new(usage: Usage, reused_tokens: u64, delivered_tokens: u64) -> Self {
        let input_tokens = u64::from(usage.input_tokens);
        // An engine that renders by itself may count fewer than there are on the ledger.
        let reused_tokens = reused_tokens.min(input_tokens);
        Self {
            input_tokens,
            new_tokens: input_tokens - reused_tokens,
            reused_tokens,
            cached_tokens: usage.cached_tokens.into(),
            output_tokens: usage.output_tokens.into(),
            reasoning_tokens: usage.reasoning_tokens.into(),
            delivered_tokens,
            samples: usage.samples.into(),
            ..Self::default()
        }
    }

    /// As one response of a receipt.
    #[must_use]
    pub fn charged(&self) -> Charged {
        Charged {
            responses: 1,
            input_tokens: self.input_tokens,
            new_tokens: self.new_tokens,
            cached_tokens: self.cached_tokens,
            output_tokens: self.output_tokens,
        }
    }
}

/// How a response ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settlement {
    /// `completed`, `incomplete`, `failed`, `cancelled`; `interrupted`: the process ended before it
    /// did; or one of those below.
    pub end: &'static str,
    /// Why it is incomplete or failed; else empty.
    pub reason: &'static str,
    /// Why the last sample ended; empty where it did not end by itself.
    pub finish: &'static str,
}

impl Settlement {
    /// It was never dispatched: its reservation was not written in time, or not waited for.
    pub const REFUSED: Self = Self {
        end: "refused",
        reason: "",
        finish: "",
    };

    /// Nobody said how it ended: a fault of ours.
    pub const ABANDONED: Self = Self {
        end: "abandoned",
        reason: "",
        finish: "",
    };

    /// As the client is told. `None` for a response that goes on.
    #[must_use]
    pub fn new(status: &Status, finish: Option<Finish>) -> Option<Self> {
        let (end, reason) = match status {
            Status::AwaitingInput => return None,
            Status::Completed => ("completed", ""),
            Status::Incomplete(reason) => ("incomplete", reason_name(*reason)),
            Status::Failed(error) => ("failed", Code::as_str(error.code)),
            Status::Cancelled => ("cancelled", ""),
        };
        let finish = finish.map_or("", finish_name);
        Some(Self {
            end,
            reason,
            finish,
        })
    }
}

fn reason_name(reason: IncompleteReason) -> &'static str {
    match reason {
        IncompleteReason::MaxOutputTokens => "max_output_tokens",
        IncompleteReason::ContentFilter => "content_filter",
        IncompleteReason::Interrupted => "interrupted",
        IncompleteReason::Budget => "budget",
    }
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::ToolCalls => "tool_calls",
        Finish::Length => "length",
        Finish::ContentFilter => "content_filter",
    }
}

/// The record of a response as it is written. Its JSON is what exporters write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Record {
    /// The same whenever it is written: see [`record_id`].
    pub id: Arc<str>,
    /// The response.
    pub response: Arc<str>,
    /// Whose.
    pub tenant: Arc<str>,
    /// The name of the API key.
    pub key: Arc<str>,
    /// The stream.
    pub session: Arc<str>,
    /// The model that the create named; empty where it named none.
    pub model_asked: Arc<str>,
    /// The model that served it last.
    pub model_served: Arc<str>,
    /// The kind of backend of that model.
    pub backend: Arc<str>,
    /// What was counted.
    #[serde(flatten)]
    pub counts: Counts,
    /// How long it held its stream, in milliseconds.
    pub stream_ms: u64,
    /// How it ended; empty until it is settled.
    pub end: Arc<str>,
    /// Why, where `end` leaves that open.
    pub reason: Arc<str>,
    /// Why its last sample ended.
    pub finish: Arc<str>,
    /// The prices that were in force.
    pub price_book_version: Arc<str>,
    /// When it was dispatched: milliseconds since 1970.
    pub reserved_at_ms: u64,
    /// When it was settled; `None` while it runs.
    pub settled_at_ms: Option<u64>,
}

/// What the settled responses of one API key on one model used together.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "documented where a record has them")]
pub struct Tally {
    pub tenant: String,
    pub key: String,
    pub model: String,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub calls: u64,
    pub sample_ms: u64,
    pub cost_nanos: u64,
}

/// The id of a response's record in this journal: whoever gets a record twice knows it by that.
#[must_use]
pub fn record_id(journal: &str, response: &ResponseId) -> Arc<str> {
    let mut hash = Sha256::new();
    hash.update(b"hotloop usage record 1\0");
    hash.update(journal);
    hash.update(b"\0");
    hash.update(response.as_str());
    let digest = hash.finalize();
    let hex = digest.iter().take(16).map(|byte| format!("{byte:02x}"));
    format!("rec_{}", hex.collect::<String>()).into()
}
