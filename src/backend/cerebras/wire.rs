//! What a service writes into its events, as far as it is read. Everything may be missing or null.

use serde::Deserialize;
use serde_json::Value;

use crate::backend::TokensCounted;

/// One event of an answer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Event {
    pub(super) choices: Option<Vec<Choice>>,
    pub(super) usage: Option<Usage>,
    pub(super) time_info: Option<TimeInfo>,
    pub(super) error: Option<Value>,
    pub(super) object: Option<String>,
    pub(super) status_code: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Choice {
    pub(super) index: Option<u32>,
    pub(super) delta: Option<Delta>,
    pub(super) text: Option<String>,
    /// Cerebras' name for the ids.
    pub(super) tokens: Option<Vec<u32>>,
    /// vLLM's name for them.
    pub(super) token_ids: Option<Vec<u32>>,
    pub(super) finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Delta {
    pub(super) content: Option<String>,
    pub(super) refusal: Option<String>,
    pub(super) reasoning: Option<String>,
    pub(super) reasoning_content: Option<String>,
    pub(super) tokens: Option<Vec<u32>>,
    pub(super) tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CallDelta {
    pub(super) index: Option<u32>,
    pub(super) id: Option<String>,
    pub(super) function: Option<FunctionDelta>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct FunctionDelta {
    pub(super) name: Option<String>,
    pub(super) arguments: Option<String>,
}

/// Tokens as the service counts them.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CompletionDetails {
    reasoning_tokens: Option<u64>,
}

impl Usage {
    pub(super) fn counted(&self) -> TokensCounted {
        let details = self.completion_tokens_details.as_ref();
        TokensCounted {
            input: count(self.prompt_tokens).unwrap_or(0),
            output: count(self.completion_tokens).unwrap_or(0),
            reasoning: count(details.and_then(|it| it.reasoning_tokens)).unwrap_or(0),
        }
    }

    pub(super) fn cached(&self) -> Option<u32> {
        let details = self.prompt_tokens_details.as_ref();
        count(details.and_then(|it| it.cached_tokens))
    }
}

fn count(tokens: Option<u64>) -> Option<u32> {
    tokens.map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX))
}

/// Where Cerebras spent the time, in seconds.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TimeInfo {
    pub(super) queue_time: Option<f64>,
    pub(super) prompt_time: Option<f64>,
    pub(super) completion_time: Option<f64>,
    pub(super) total_time: Option<f64>,
}
