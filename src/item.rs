//! Items, tools and the ids by which everything is named: plain data, no behaviour.
//!
//! What derives serde here, in `event`, `request`, `render` and `ledger` is stored: the order of
//! its fields and variants is the format of [`crate::store`], and a test there notices a change.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// Declares an id: a short string that is cheap to clone.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id! {
    /// Names a response: `resp_` and 32 hexadecimal digits.
    ResponseId
}
id! {
    /// Names an item: a prefix for its kind and 32 hexadecimal digits, or what the client chose.
    ItemId
}
id! {
    /// Names a call of a tool; its output repeats it.
    CallId
}
id! {
    /// Names a lane of a stream; empty for the default lane.
    LaneName
}
id! {
    /// What a client calls its command; empty where it gave none.
    RequestId
}
id! {
    /// Whose a response is. No tenant sees another's ids.
    Tenant
}

fn unique(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::now_v7().simple())
}

impl ResponseId {
    /// A new id, unique over all servers, sortable by time.
    #[must_use]
    pub fn new() -> Self {
        unique("resp").into()
    }
}

impl Default for ResponseId {
    fn default() -> Self {
        Self::new()
    }
}

impl ItemId {
    /// A new id for an item of this kind.
    #[must_use]
    pub fn new(body: &Body) -> Self {
        unique(match body {
            Body::Message { .. } => "msg",
            Body::FunctionCall { .. } => "fc",
            Body::FunctionCallOutput { .. } => "fco",
            Body::Reasoning { .. } => "rs",
            Body::CustomToolCall { .. } => "ctc",
            Body::CustomToolCallOutput { .. } => "cto",
            Body::Compaction { .. } => "cmp",
        })
        .into()
    }
}

/// One item of a conversation. Immutable once it is on the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// Its id.
    pub id: ItemId,
    /// How far it came.
    pub status: ItemStatus,
    /// What it is.
    pub body: Body,
}

impl Item {
    /// A whole item with a new id.
    #[must_use]
    pub fn new(body: Body) -> Self {
        Self {
            id: ItemId::new(&body),
            status: ItemStatus::Completed,
            body,
        }
    }

    /// The call that this item makes: its id and the tool's name.
    #[must_use]
    pub fn call(&self) -> Option<(&CallId, &Arc<str>)> {
        match &self.body {
            Body::FunctionCall { call_id, name, .. }
            | Body::CustomToolCall { call_id, name, .. } => Some((call_id, name)),
            Body::Message { .. }
            | Body::FunctionCallOutput { .. }
            | Body::Reasoning { .. }
            | Body::CustomToolCallOutput { .. }
            | Body::Compaction { .. } => None,
        }
    }

    /// The call that this item answers.
    #[must_use]
    pub fn answers(&self) -> Option<&CallId> {
        match &self.body {
            Body::FunctionCallOutput { call_id, .. }
            | Body::CustomToolCallOutput { call_id, .. } => Some(call_id),
            Body::Message { .. }
            | Body::FunctionCall { .. }
            | Body::Reasoning { .. }
            | Body::CustomToolCall { .. }
            | Body::Compaction { .. } => None,
        }
    }

    /// Bytes of text in it, for limits and weighed caches.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        match &self.body {
            Body::Message { parts, .. } => parts.iter().map(|part| part.text().len()).sum(),
            Body::FunctionCall { arguments, .. } => arguments.len(),
            Body::FunctionCallOutput { output, .. } | Body::CustomToolCallOutput { output, .. } => {
                output.len()
            }
            Body::Reasoning { content } => content.len(),
            Body::CustomToolCall { input, .. } => input.len(),
            Body::Compaction { summary } => summary.len(),
        }
    }
}

/// How far an item came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ItemStatus {
    /// It is being sampled.
    InProgress,
    /// It is whole.
    Completed,
    /// The response ended before it was whole.
    Incomplete,
}

/// What an item is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Body {
    /// Text of one speaker.
    Message {
        /// Who speaks.
        role: Role,
        /// The text, in parts that are joined without a separator.
        parts: Vec<Part>,
    },
    /// The model's call of a function.
    FunctionCall {
        /// Names the call.
        call_id: CallId,
        /// The function.
        name: Arc<str>,
        /// JSON text, byte for byte as it was written.
        arguments: Arc<str>,
    },
    /// The result of a function call.
    FunctionCallOutput {
        /// The call that it answers.
        call_id: CallId,
        /// The result.
        output: Arc<str>,
    },
    /// What the model thought.
    Reasoning {
        /// The text.
        content: Arc<str>,
    },
    /// The model's call of a custom tool.
    CustomToolCall {
        /// Names the call.
        call_id: CallId,
        /// The tool.
        name: Arc<str>,
        /// The text for the tool.
        input: Arc<str>,
        /// The arguments as the model wrote them: a JSON object with the one key `input`.
        arguments: Arc<str>,
    },
    /// The result of a custom tool call.
    CustomToolCallOutput {
        /// The call that it answers.
        call_id: CallId,
        /// The result.
        output: Arc<str>,
    },
    /// A summary in place of everything before it.
    Compaction {
        /// The summary.
        summary: Arc<str>,
    },
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The operator.
    System,
    /// The developer.
    Developer,
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Part {
    /// What a client wrote.
    InputText(Arc<str>),
    /// What a model wrote.
    OutputText {
        /// The text.
        text: Arc<str>,
        /// Log probabilities of its tokens, where they were asked for.
        logprobs: Arc<[NamedLogprob]>,
    },
    /// What a model wrote to refuse.
    Refusal(Arc<str>),
}

impl Part {
    /// The text of the part.
    #[must_use]
    pub fn text(&self) -> &Arc<str> {
        match self {
            Self::InputText(text) | Self::OutputText { text, .. } | Self::Refusal(text) => text,
        }
    }

    /// The text of all these parts, joined. That of a single one is shared.
    #[must_use]
    pub fn joined(parts: &[Self]) -> Arc<str> {
        match parts {
            [part] => part.text().clone(),
            parts => {
                let texts = parts.iter().map(|part| &**part.text());
                texts.collect::<String>().into()
            }
        }
    }
}

/// The log probability of a sampled token, as an engine tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The sampled token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens in its place, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// The log probability of a sampled token, with the texts of the tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NamedLogprob {
    /// The sampled token.
    pub token: u32,
    /// Its text; bytes that are no whole character read U+FFFD.
    pub text: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens in its place, likeliest first.
    pub top: Vec<(u32, String, f32)>,
}

/// A tool that the model may call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name, unique among the tools of a conversation.
    pub name: Arc<str>,
    /// What it does.
    pub description: Option<Arc<str>>,
    /// What it takes.
    pub kind: ToolKind,
}

/// The schema by which templates and services, which know only functions, are told of a custom tool.
pub(crate) const CUSTOM_PARAMETERS: &str =
    r#"{"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}"#;

/// What a tool takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToolKind {
    /// JSON arguments.
    Function {
        /// JSON Schema as JSON text of an object.
        parameters: Arc<str>,
        /// Whether sampling keeps to the schema.
        strict: bool,
    },
    /// Free text.
    Custom,
}
