//! What the server tells a client: events, usage, timings, and the errors with their codes.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::item::{CallId, Item, ItemId, LaneName, NamedLogprob, RequestId, ResponseId};

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// An event and what it belongs to. The sequence number is given when it leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    /// The lane; empty for the default lane and for no lane at all.
    pub lane: LaneName,
    /// The response, where there is one.
    pub response_id: Option<ResponseId>,
    /// What the command that caused it carried; empty where it carried nothing.
    pub request_id: RequestId,
    /// The event.
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A response has started.
    Created {
        /// The model that serves it.
        model: Arc<str>,
        /// What it continues.
        previous: Option<ResponseId>,
        /// Milliseconds since 1970.
        created_at_ms: u64,
    },
    /// Input was accepted.
    Appended {
        /// The items, in the order sent.
        item_ids: Vec<ItemId>,
        /// Whether they wait for a boundary of the running sample.
        queued: bool,
        /// Tokens of the new part of the prompt, as far as it could be rendered.
        tokens: u32,
    },
    /// An output item begins.
    OutputItemAdded {
        /// Its position in the output.
        output_index: u32,
        /// The item so far.
        item: Arc<Item>,
    },
    /// More of an output item.
    Delta {
        /// Its position in the output.
        output_index: u32,
        /// What there is more of.
        kind: DeltaKind,
        /// Whole characters.
        delta: String,
        /// Log probabilities of its tokens, where asked for.
        logprobs: Vec<NamedLogprob>,
    },
    /// An output item is whole.
    OutputItemDone {
        /// Its position in the output.
        output_index: u32,
        /// The item.
        item: Arc<Item>,
    },
    /// A monitor found something.
    Verdict(Box<Verdict>),
    /// A response, or a round of a held one, has ended.
    Done(Box<Done>),
    /// A command was refused.
    Error(Box<Error>),
    /// The server will close the stream.
    GoAway {
        /// How long until then.
        time_left: Duration,
        /// Why: a stable code.
        reason: Code,
        /// Whether a new stream can continue the responses of this one.
        resumable: bool,
    },
}

/// Whose text a monitor looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Messages of users, developers and operators, and summaries.
    UserInput,
    /// Outputs of tools.
    ToolOutput,
    /// What a model wrote: messages and calls.
    ModelOutput,
    /// What a model thought.
    Reasoning,
}

/// What is done about a finding. The order is that of strength.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is told.
    Observe,
    /// It is replaced.
    Redact,
    /// The command that brought it is refused; a model's output ends.
    Refuse,
    /// The response ends before it; a command that brought it is refused.
    End,
}

/// What a monitor found in an item, and what was done about it. Never the text itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The rule that found it.
    pub rule: Arc<str>,
    /// The version of the policy that it was found under.
    pub policy: Arc<str>,
    /// Whose text it is.
    pub scope: Scope,
    /// What was done.
    pub action: Action,
    /// The item.
    pub item_id: ItemId,
    /// Where in the item's text, as it was before anything was done to it.
    pub bytes: Range<usize>,
    /// Where in the prompt and its sample, where that is known.
    pub tokens: Option<Range<usize>>,
    /// Some of it was shown before it could be known: more than the policy holds back.
    pub late: bool,
    /// How sure a classifier is, 0 to 1, where it tells.
    pub score: Option<f32>,
}

/// What a delta is more of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaKind {
    /// Text of a message.
    Text,
    /// Text of a reasoning item.
    Reasoning,
    /// Arguments of a function call.
    Arguments,
}

/// How a response, or a round of it, ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// How it stands.
    pub status: Status,
    /// The model that served it last. `None` where none did yet.
    pub model: Option<Arc<str>>,
    /// Why the last sample ended, where it ended by itself.
    pub finish: Option<Finish>,
    /// Calls without an output.
    pub call_ids: Vec<CallId>,
    /// The output items of the whole response; while it waits for input, those since the last
    /// `done`.
    pub output_item_ids: Vec<ItemId>,
    /// What it used so far.
    pub usage: Usage,
    /// How the last prompt came to be.
    pub prompt: PromptReport,
    /// Where the time of the last round went.
    pub timing: Timing,
    /// The output items, where asked for.
    pub output: Vec<Arc<Item>>,
    /// The samples since the last `done` that another one followed at once.
    pub earlier: Vec<SampleReport>,
    /// What it adds to the bill. `None` where a create was cancelled before its turn.
    pub receipt: Option<Receipt>,
}

/// What a response adds to the bill, and what its stream came to with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The id of its usage record.
    pub record_id: Arc<str>,
    /// This response so far.
    pub response: Charged,
    /// All responses of the stream that have ended, and this one.
    pub stream: Charged,
}

/// What was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Charged {
    /// By how many responses.
    pub responses: u64,
    /// Tokens of the prompts.
    pub input_tokens: u64,
    /// Those of them that no earlier prompt of their conversation held.
    pub new_tokens: u64,
    /// Those of them that the engine took from its cache, where it tells.
    pub cached_tokens: u64,
    /// Tokens that were sampled.
    pub output_tokens: u64,
}

impl std::ops::Add for Charged {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            responses: self.responses + other.responses,
            input_tokens: self.input_tokens + other.input_tokens,
            new_tokens: self.new_tokens + other.new_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
            output_tokens: self.output_tokens + other.output_tokens,
        }
    }
}

/// One sample of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleReport {
    /// How its prompt came to be.
    pub prompt: PromptReport,
    /// Where its time went.
    pub timing: Timing,
    /// Tokens that it sampled.
    pub output_tokens: u32,
}

/// How a response stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    /// It waits for the outputs of its calls.
    AwaitingInput,
    /// It has ended well.
    Completed,
    /// It has ended early and can be continued from.
    Incomplete(IncompleteReason),
    /// It broke; its parent is as it was.
    Failed(Error),
    /// It was cancelled; its parent is as it was.
    Cancelled,
}

/// Why a response ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IncompleteReason {
    /// A limit of tokens was reached.
    MaxOutputTokens,
    /// A monitor ended it.
    ContentFilter,
    /// The client vanished, a hold lasted too long, or the server stopped.
    Interrupted,
    /// A budget is spent.
    Budget,
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finish {
    /// The model ended its answer, or a stop text appeared.
    Stop,
    /// The model ended with calls.
    ToolCalls,
    /// A limit of tokens was reached.
    Length,
    /// A monitor ended it.
    ContentFilter,
}

/// Tokens of a response, all its samples together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompts.
    pub input_tokens: u32,
    /// Those that the engine took from its cache, where it tells.
    pub cached_tokens: u32,
    /// Tokens that were sampled.
    pub output_tokens: u32,
    /// Those that were reasoning.
    pub reasoning_tokens: u32,
    /// How many samples it took.
    pub samples: u32,
}

/// How a prompt came to be. The fields are documented in the proto's `PromptReport`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "documented in the proto, field by field")]
pub struct PromptReport {
    pub tokens: u32,
    pub reused_tokens: u32,
    pub encoded_tokens: u32,
    pub dropped_tokens: u32,
    pub sampled_tokens: u32,
    pub extends_previous: bool,
    pub rerender: Option<RerenderReason>,
    pub truncated_items: u32,
    pub fingerprint: [u8; 16],
    pub head_tokens_cached: u32,
}

impl PromptReport {
    /// Tokens of the prompt that were there before: on the ledger, or in the cache of heads.
    #[must_use]
    pub fn had_before(&self) -> u64 {
        u64::from(self.reused_tokens) + u64::from(self.head_tokens_cached)
    }
}

/// Why a prompt is no extension of the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RerenderReason {
    /// The template renders the past differently now.
    Template,
    /// Settings that are part of the prompt changed.
    Settings,
    /// Another model.
    Model,
    /// Items left the prompt.
    Truncation,
}

/// When each stage of a round ended, after its command was read. Zero: not reached. The stages
/// are documented in the proto's `Timing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "documented in the proto, field by field")]
pub struct Timing {
    pub started: Duration,
    pub validated: Duration,
    pub checked: Duration,
    pub rendered: Duration,
    pub dispatched: Duration,
    pub first_token: Duration,
    pub last_token: Duration,
    pub done: Duration,
}

/// Why a command was refused or a response broke.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct Error {
    /// What went wrong, in one stable word.
    pub code: Code,
    /// For people: what was wrong, and which limit applies. No user content.
    pub message: String,
    /// The field that was wrong; empty where no field was.
    pub param: String,
    /// How long to wait before trying again, where known.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// An error that names no field.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: String::new(),
            retry_after: None,
        }
    }

    /// The request was wrong at this field.
    #[must_use]
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: param.into(),
            ..Self::new(Code::InvalidRequest, message)
        }
    }

    /// The same error, naming this field.
    #[must_use]
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.param = param.into();
        self
    }
}

/// Declares the codes together with their names on the wire.
macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $retry:ident;)*) => {
        /// What went wrong, in one stable word.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// The code as it stands on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What a client may do about it.
            #[must_use]
            pub fn retry(self) -> Retry {
                match self { $(Self::$name => Retry::$retry,)* }
            }
        }
    };
}

codes! {
    /// A field is missing, out of range, or not possible with this model.
    InvalidRequest = "invalid_request", Never;
    /// The response to continue is not held any more, or never was.
    PreviousResponseNotFound = "previous_response_not_found", ResendFull;
    /// No model has this name.
    ModelNotFound = "model_not_found", Never;
    /// The prompt is longer than the model's context.
    ContextLengthExceeded = "context_length_exceeded", Never;
    /// An output names a call that is not open.
    NoSuchCall = "no_such_call", Never;
    /// A call has no output, and the model would sample again.
    MissingToolOutput = "missing_tool_output", Never;
    /// The response does not run and is not held.
    ResponseNotOpen = "response_not_open", Never;
    /// The lane's name is not allowed, or not that of the response.
    InvalidLane = "invalid_lane", Never;
    /// The stream has as many named lanes as it may have.
    LaneLimitReached = "lane_limit_reached", Never;
    /// Too many commands wait.
    QueueFull = "queue_full", Safe;
    /// A monitor refused the input.
    ContentPolicyViolation = "content_policy_violation", Never;
    /// Too many requests.
    RateLimitExceeded = "rate_limit_exceeded", Safe;
    /// A budget is spent.
    InsufficientQuota = "insufficient_quota", Never;
    /// No backend takes the prompt now.
    BackendUnavailable = "backend_unavailable", Safe;
    /// The backend broke.
    BackendError = "backend_error", Safe;
    /// The stream has reached its age.
    StreamAgeLimitReached = "stream_age_limit_reached", Safe;
    /// The server stops.
    Draining = "draining", Safe;
}

/// What a client may do after an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Nothing happened: send it again.
    Safe,
    /// The state is gone: send the whole context.
    ResendFull,
    /// It would fail again.
    Never,
}
