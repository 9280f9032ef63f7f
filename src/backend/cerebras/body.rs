//! Requests as lists of parts: what is new is written, what is old is taken as it is kept.
//!
//! A message of the conversation was written when it came, and so were the ids on the ledger.
//! Instructions and tools are written once for as long as a conversation keeps them (`Written`). So a request costs a
//! few pointers for each old message, and the sending of its bytes.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{
    BodyForm, CerebrasOptions, Dialect, MaxTokensKey, PromptForm, ReasoningKey, TopK,
    written::{Written, response_format},
};
use crate::{
    backend::{BackendError, Chat, Prompt, conversation_name, tenant_name},
    ledger::IdForm,
    request::{Settings, ToolChoice},
};

/// The most stop texts that the API takes. The others are looked for here.
const STOPS_MAX: usize = 4;

/// How a message of a developer begins.
const DEVELOPER: &[u8] = b"{\"role\":\"developer\"";

/// The body of the request for this prompt.
pub(super) fn parts(
    options: &CerebrasOptions,
    written: &Written,
    prompt: &Prompt,
) -> Result<Vec<Bytes>, BackendError> {
    let parts = match (options.prompt, &prompt.chat) {
        (PromptForm::Chat, Some(chat)) => chat_parts(options, written, prompt, chat)?,
        (PromptForm::Chat, None) => return Err(refused("it has no messages")),
        (PromptForm::Tokens, _) => {
            let fields = completion_fields(options, prompt)?;
            match options.body {
                BodyForm::Json => json_tokens(&fields, prompt.tokens.encoded(IdForm::Decimal)),
                BodyForm::Msgpack => {
                    let ids = prompt.tokens.encoded(IdForm::MessagePack);
                    msgpack_tokens(&fields, prompt.tokens.len_tokens(), ids)?
                }
            }
        }
    };
    let bytes: usize = parts.iter().map(Bytes::len).sum();
    if bytes > options.request_bytes_max {
        return Err(refused(format!(
            "the request has {bytes} bytes, and request_bytes_max is {}",
            options.request_bytes_max
        )));
    }
    Ok(parts)
}

fn chat_parts(
    options: &CerebrasOptions,
    written: &Written,
    prompt: &Prompt,
    chat: &Chat,
) -> Result<Vec<Bytes>, BackendError> {
    let settings = &chat.settings;
    let mut parts = Vec::with_capacity(8 + chat.messages.len() * 4);
    parts.push(open_object(&chat_fields(options, prompt, settings)?));
    if let Some(format) = &settings.text
        && let Some(format) = response_format(format)?
    {
        parts.push(Bytes::from_static(b",\"response_format\":"));
        parts.push(format);
    }
    if !settings.tools().is_empty() {
        parts.push(Bytes::from_static(b",\"tools\":"));
        parts.push(written.tools(settings)?);
    }
    parts.push(Bytes::from_static(b",\"messages\":["));
    let mut between = Bytes::new();
    if let Some(instructions) = &settings.instructions {
        parts.push(written.instructions(instructions));
        between = Bytes::from_static(b",");
    }
    let reasoning_key = match options.reasoning_key {
        ReasoningKey::Reasoning => Some(Bytes::from_static(b",\"reasoning\":")),
        ReasoningKey::ReasoningContent => Some(Bytes::from_static(b",\"reasoning_content\":")),
        ReasoningKey::None => None,
    };
    for message in &chat.messages {
        parts.push(between);
        match message.object.strip_prefix(DEVELOPER) {
            Some(_) if !options.developer_role => {
                parts.push(Bytes::from_static(b"{\"role\":\"system\""));
                parts.push(message.object.slice(DEVELOPER.len()..));
            }
            Some(_) | None => parts.push(message.object.clone()),
        }
        if let (Some(key), Some(reasoning)) = (&reasoning_key, &message.reasoning) {
            parts.push(key.clone());
            parts.push(reasoning.clone());
        }
        between = Bytes::from_static(b"},");
    }
    let end: &[u8] = if chat.messages.is_empty() {
        b"]}"
    } else {
        b"}]}"
    };
    parts.push(Bytes::from_static(end));
    Ok(parts)
}

/// What is set beside messages and tools. A setting that the client left open is left open.
fn chat_fields(
    options: &CerebrasOptions,
    prompt: &Prompt,
    settings: &Settings,
) -> Result<Map<String, Value>, BackendError> {
    let mut fields = common_fields(options);
    let mut set = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(key.to_owned(), value);
        }
    };
    let max_tokens = match options.max_tokens_key {
        MaxTokensKey::MaxCompletionTokens => "max_completion_tokens",
        MaxTokensKey::MaxTokens => "max_tokens",
    };
    set(max_tokens, Some(prompt.sampling.max_tokens.into()));
    let effort = settings.reasoning_effort;
    set("reasoning_effort", effort.map(|it| it.as_str().into()));
    set("temperature", settings.temperature.map(number));
    set("top_p", settings.top_p.map(number));
    let top_k = settings.top_k.unwrap_or(0);
    set("top_k", checked_top_k(options, top_k)?);
    set("seed", settings.seed.map(seed));
    let stop = settings.stop.as_deref().unwrap_or_default();
    let stop = &stop[..stop.len().min(STOPS_MAX)];
    set("stop", (!stop.is_empty()).then(|| json!(stop)));
    set("presence_penalty", settings.presence_penalty.map(number));
    set("frequency_penalty", settings.frequency_penalty.map(number));
    let bias = settings.logit_bias.as_deref().unwrap_or_default();
    set("logit_bias", logit_bias(bias));
    if !settings.tools().is_empty() {
        set(
            "tool_choice",
            settings.tool_choice.as_ref().map(tool_choice),
        );
        let parallel = settings.parallel_tool_calls;
        set("parallel_tool_calls", parallel.map(Value::from));
    }
    match options.dialect {
        Dialect::Cerebras => {
            let format = &options.reasoning_format;
            let format = (!format.is_empty()).then(|| json!(format));
            set("reasoning_format", format);
            let clear = options.keep_thinking.then_some(Value::Bool(false));
            set("clear_thinking", clear);
        }
        Dialect::Vllm => set("cache_salt", Some(tenant_name(prompt).into())),
        Dialect::OpenAi => {}
    }
    let key = options.cache_key && options.dialect != Dialect::Vllm;
    set(
        "prompt_cache_key",
        key.then(|| conversation_name(prompt).into()),
    );
    fields.extend(options.extra.clone());
    Ok(fields)
}

/// What stands beside the tokens. The prompt says exactly how to sample, whoever chose it.
fn completion_fields(
    options: &CerebrasOptions,
    prompt: &Prompt,
) -> Result<Map<String, Value>, BackendError> {
    let sampling = &prompt.sampling;
    let mut fields = common_fields(options);
    let mut set = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(key.to_owned(), value);
        }
    };
    let penalty = |value: f32| (value != 0.0).then(|| number(value));
    set("max_tokens", Some(sampling.max_tokens.into()));
    set("temperature", Some(number(sampling.temperature)));
    let samples = sampling.temperature > 0.0;
    set("top_p", samples.then(|| number(sampling.top_p)));
    set("top_k", checked_top_k(options, sampling.top_k)?);
    set("seed", sampling.seed.filter(|_| samples).map(seed));
    set("presence_penalty", penalty(sampling.presence_penalty));
    set("frequency_penalty", penalty(sampling.frequency_penalty));
    set("logit_bias", logit_bias(&sampling.logit_bias));
    match options.dialect {
        Dialect::Vllm => {
            set("return_token_ids", Some(true.into()));
            set("stop_token_ids", Some(json!(*sampling.end_tokens)));
            set("cache_salt", Some(tenant_name(prompt).into()));
        }
        Dialect::Cerebras | Dialect::OpenAi => set("return_raw_tokens", Some(true.into())),
    }
    fields.extend(options.extra.clone());
    Ok(fields)
}

fn common_fields(options: &CerebrasOptions) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("model".into(), options.model.as_str().into());
    fields.insert("stream".into(), true.into());
    fields.insert("stream_options".into(), json!({"include_usage": true}));
    if let Some(tier) = &options.service_tier {
        fields.insert("service_tier".into(), tier.as_str().into());
    }
    fields
}

fn checked_top_k(options: &CerebrasOptions, top_k: u32) -> Result<Option<Value>, BackendError> {
    match options.top_k {
        TopK::Refuse if top_k > 0 => Err(refused("the service does not take top_k")),
        TopK::Send if top_k > 0 => Ok(Some(top_k.into())),
        TopK::Refuse | TopK::Send | TopK::Ignore => Ok(None),
    }
}

fn tool_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::None => json!("none"),
        ToolChoice::Auto
        | ToolChoice::Allowed {
            required: false, ..
        } => json!("auto"),
        ToolChoice::Required | ToolChoice::Allowed { required: true, .. } => json!("required"),
        ToolChoice::Function(name) | ToolChoice::Custom(name) => {
            json!({"type": "function", "function": {"name": name}})
        }
    }
}

fn logit_bias(bias: &[(u32, f32)]) -> Option<Value> {
    let entries = bias
        .iter()
        .map(|(id, bias)| (id.to_string(), number(*bias)));
    (!bias.is_empty()).then(|| Value::Object(entries.collect()))
}

/// The number as people write it: 0.7 and not 0.699999988.
fn number(value: f32) -> Value {
    value
        .to_string()
        .parse::<f64>()
        .map_or(Value::Null, Value::from)
}

/// Services take seeds of 63 bits.
fn seed(seed: u64) -> Value {
    (seed & i64::MAX as u64).into()
}

/// The fields as a JSON object, without the brace that closes it.
fn open_object(fields: &Map<String, Value>) -> Bytes {
    // Only values that are no JSON by their type fail, and there are none.
    let mut json = serde_json::to_vec(fields).unwrap_or_default();
    json.pop();
    json.into()
}

fn json_tokens(fields: &Map<String, Value>, ids: Vec<Bytes>) -> Vec<Bytes> {
    let mut parts = Vec::with_capacity(ids.len() + 3);
    parts.push(open_object(fields));
    parts.push(Bytes::from_static(b",\"prompt\":["));
    let first = parts.len();
    parts.extend(ids.into_iter().filter(|part| !part.is_empty()));
    if let Some(first) = parts.get_mut(first) {
        // Each id has a comma before it.
        *first = first.slice(1..);
    }
    parts.push(Bytes::from_static(b"]}"));
    parts
}

/// The same as MessagePack: its arrays and maps say their lengths first.
fn msgpack_tokens(
    fields: &Map<String, Value>,
    tokens: usize,
    ids: Vec<Bytes>,
) -> Result<Vec<Bytes>, BackendError> {
    let count = u16::try_from(fields.len() + 1).map_err(|_| refused("it has too many fields"))?;
    let tokens = u32::try_from(tokens).map_err(|_| refused("it has too many tokens"))?;
    let mut head = vec![0xde];
    head.extend(count.to_be_bytes());
    for (key, value) in fields {
        for packed in [rmp_serde::to_vec(key), rmp_serde::to_vec(value)] {
            head.extend(packed.map_err(|_| refused("it cannot be written as msgpack"))?);
        }
    }
    head.extend(rmp_serde::to_vec("prompt").unwrap_or_default());
    head.push(0xdd);
    head.extend(tokens.to_be_bytes());
    let ids = ids.into_iter().filter(|part| !part.is_empty());
    Ok(std::iter::once(head.into()).chain(ids).collect())
}

pub(super) fn refused(reason: impl Into<String>) -> BackendError {
    BackendError::Refused {
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests;
