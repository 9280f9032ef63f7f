//! Commands and settings, from the wire.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    LogitBias, RequestLimits, Result,
    items::{ID_BYTES_MAX, items, json_object, name, tools},
};
use crate::{
    event::Error,
    item::{RequestId, ResponseId},
    proto as pb,
    request::{Create, Effort, Settings, TextFormat, ToolChoice, Truncation},
    stream::{Command, Incoming, Target},
};

const REQUEST_ID_BYTES_MAX: usize = 128;
const STOP_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 128;
const LOGIT_BIAS_MAX: usize = 1024;
const TOP_LOGPROBS_MAX: u32 = 20;
const METADATA_MAX: usize = 16;
const METADATA_KEY_CHARS_MAX: usize = 64;
const METADATA_VALUE_CHARS_MAX: usize = 512;
const LABEL_CHARS_MAX: usize = 256;

/// A command as it came.
#[must_use]
pub fn incoming(request: pb::ConnectRequest, limits: &RequestLimits) -> Incoming {
    use pb::connect_request::Command as Wire;
    let (request_id, checked) = request_id(request.request_id);
    let command = checked.and_then(|()| match request.command {
        None => Err(Error::invalid(
            "command",
            "no command is set: create, append, done or cancel",
        )),
        Some(Wire::Create(body)) => {
            create(body, limits).map(|create| Command::Create(Box::new(create)))
        }
        Some(Wire::Append(body)) => {
            if body.input.is_empty() {
                return Err(Error::invalid(
                    "append.input",
                    "at least one item is needed",
                ));
            }
            Ok(Command::Append {
                response_id: response_id(body.response_id, "append.response_id")?,
                input: items(body.input, "append", limits)?,
            })
        }
        Some(Wire::Done(body)) => Ok(Command::Done {
            response_id: response_id(body.response_id, "done.response_id")?,
        }),
        Some(Wire::Cancel(body)) => Ok(Command::Cancel {
            target: cancel_target(body)?,
        }),
    });
    Incoming {
        lane: request.lane,
        request_id,
        command,
    }
}

/// The request of the one-shot twin, as the one command of a stream.
#[must_use]
pub fn incoming_create(request: pb::CreateRequest, limits: &RequestLimits) -> Incoming {
    let (request_id, checked) = request_id(request.request_id);
    let command = checked.and_then(|()| {
        let body = request
            .create
            .ok_or_else(|| Error::invalid("create", "no create is set"))?;
        if body.hold {
            return Err(Error::invalid(
                "create.hold",
                "only a stream can append, so only there a response is held",
            ));
        }
        create(body, limits).map(|create| Command::Create(Box::new(create)))
    });
    Incoming {
        lane: String::new(),
        request_id,
        command,
    }
}

fn request_id(text: String) -> (RequestId, Result<()>) {
    if text.len() <= REQUEST_ID_BYTES_MAX {
        return (text.into(), Ok(()));
    }
    // Shown as far as it is allowed to be, so that the error can be told from others.
    let end = text.floor_char_boundary(REQUEST_ID_BYTES_MAX);
    let why = format!(
        "{} bytes are over the limit of {REQUEST_ID_BYTES_MAX}",
        text.len()
    );
    (text[..end].into(), Err(Error::invalid("request_id", why)))
}

/// Ids that cannot be ours are refused before they are repeated in an answer.
fn response_id(id: String, param: &str) -> Result<ResponseId> {
    if id.is_empty() {
        return Err(Error::invalid(param, "it names no response"));
    }
    if id.len() <= ID_BYTES_MAX {
        return Ok(id.into());
    }
    let why = format!("{} bytes are over the limit of {ID_BYTES_MAX}", id.len());
    Err(Error::invalid(param, why))
}

fn cancel_target(body: pb::Cancel) -> Result<Target> {
    if body.create_request_id.is_empty() {
        return response_id(body.response_id, "cancel.response_id").map(Target::Response);
    }
    if !body.response_id.is_empty() {
        return Err(Error::invalid(
            "cancel.create_request_id",
            "either it or response_id is set",
        ));
    }
    let (create, checked) = request_id(body.create_request_id);
    checked.map_err(|error| error.at("cancel.create_request_id"))?;
    Ok(Target::Create(create))
}

fn create(body: pb::Create, limits: &RequestLimits) -> Result<Create> {
    let include_output = match body.include.iter().position(|part| part != "output") {
        None => !body.include.is_empty(),
        Some(index) => {
            return Err(Error::invalid(
                format!("create.include[{index}]"),
                "only \"output\" can be included",
            ));
        }
    };
    if let Some(index) = body
        .reset
        .iter()
        .position(|name| !Settings::NAMES.contains(&name.as_str()))
    {
        return Err(Error::invalid(
            format!("create.reset[{index}]"),
            format!(
                "it names no setting; settings are {}",
                Settings::NAMES.join(", ")
            ),
        ));
    }
    let previous = (!body.previous_response_id.is_empty())
        .then(|| {
            response_id(
                body.previous_response_id.clone(),
                "create.previous_response_id",
            )
        })
        .transpose()?;
    let metadata = metadata(&body.metadata)?;
    let input = items(body.input.clone(), "create", limits)?;
    Ok(Create {
        previous,
        input,
        metadata,
        include_output,
        hold: body.hold,
        prepare_only: !body.generate.unwrap_or(true),
        no_deltas: !body.deltas.unwrap_or(true),
        continue_on_disconnect: match pb::OnDisconnect::try_from(body.on_disconnect) {
            Ok(pb::OnDisconnect::Unspecified | pb::OnDisconnect::Stop) => false,
            Ok(pb::OnDisconnect::Continue) => true,
            Err(_) => return Err(unknown("create.on_disconnect")),
        },
        traceparent: traceparent(&body.traceparent)?,
        reset: body.reset.clone(),
        settings: settings(body, limits)?,
    })
}

fn metadata(pairs: &std::collections::HashMap<String, String>) -> Result<BTreeMap<String, String>> {
    if pairs.len() > METADATA_MAX {
        let why = format!("{} pairs are over the limit of {METADATA_MAX}", pairs.len());
        return Err(Error::invalid("create.metadata", why));
    }
    for (key, value) in pairs {
        if key.chars().count() > METADATA_KEY_CHARS_MAX
            || value.chars().count() > METADATA_VALUE_CHARS_MAX
        {
            return Err(Error::invalid(
                "create.metadata",
                format!(
                    "keys have at most {METADATA_KEY_CHARS_MAX} and values at most {METADATA_VALUE_CHARS_MAX} characters"
                ),
            ));
        }
    }
    Ok(pairs.clone().into_iter().collect())
}

fn unknown(param: &str) -> Error {
    Error::invalid(param, "the value is not known")
}

/// Checks the form `00-<32 hex>-<16 hex>-<2 hex>` of W3C Trace Context. What later versions add
/// behind it is left out.
fn traceparent(text: &str) -> Result<String> {
    const LEN: usize = 55;
    let hex = |part: &str, len| {
        part.len() == len
            && part
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase())
    };
    let parts: Vec<&str> = text.split('-').collect();
    let valid = match parts[..] {
        [version, trace, span, flags, ref later @ ..] => {
            hex(version, 2)
                && hex(trace, 32)
                && hex(span, 16)
                && hex(flags, 2)
                && version != "ff"
                && (version != "00" || later.is_empty())
        }
        _ => text.is_empty(),
    };
    if valid {
        return Ok(text[..text.len().min(LEN)].to_owned());
    }
    Err(Error::invalid(
        "create.traceparent",
        "it is not in the form of W3C Trace Context",
    ))
}

fn settings(body: pb::Create, limits: &RequestLimits) -> Result<Settings> {
    let reasoning_effort = match body.reasoning_effort() {
        pb::ReasoningEffort::Unspecified if body.reasoning_effort != 0 => {
            return Err(unknown("create.reasoning_effort"));
        }
        pb::ReasoningEffort::Unspecified => None,
        pb::ReasoningEffort::None => Some(Effort::None),
        pb::ReasoningEffort::Minimal => Some(Effort::Minimal),
        pb::ReasoningEffort::Low => Some(Effort::Low),
        pb::ReasoningEffort::Medium => Some(Effort::Medium),
        pb::ReasoningEffort::High => Some(Effort::High),
    };
    let truncation = match pb::Truncation::try_from(body.truncation) {
        Ok(pb::Truncation::Unspecified) => None,
        Ok(pb::Truncation::Disabled) => Some(Truncation::Disabled),
        Ok(pb::Truncation::Auto) => Some(Truncation::Auto),
        Err(_) => return Err(unknown("create.truncation")),
    };
    if body.max_output_tokens == Some(0) {
        return Err(Error::invalid(
            "create.max_output_tokens",
            "0 is below 1; to prepare only, set generate to false",
        ));
    }
    if body.top_logprobs.is_some_and(|n| n > TOP_LOGPROBS_MAX) {
        return Err(Error::invalid(
            "create.top_logprobs",
            format!("it is over {TOP_LOGPROBS_MAX}"),
        ));
    }
    if let Some(tier) = &body.service_tier
        && !["auto", "default"].contains(&tier.as_str())
    {
        return Err(Error::invalid(
            "create.service_tier",
            "only `auto` and `default` are offered",
        ));
    }
    Ok(Settings {
        model: label(body.model, "model")?,
        instructions: within(body.instructions, "instructions", limits.item_bytes_max)?,
        tools: tools(body.tools, limits)?,
        tool_choice: body.tool_choice.map(tool_choice).transpose()?,
        parallel_tool_calls: body.parallel_tool_calls,
        text: body.text.map(text_format).transpose()?,
        reasoning_effort,
        max_output_tokens: body.max_output_tokens,
        temperature: range(body.temperature, "temperature", 0.0..=2.0)?,
        top_p: match range(body.top_p, "top_p", 0.0..=1.0)? {
            Some(0.0) => return Err(Error::invalid("create.top_p", "0 is not over 0")),
            top_p => top_p,
        },
        top_k: body.top_k,
        seed: body.seed,
        stop: stop(body.stop)?,
        presence_penalty: range(body.presence_penalty, "presence_penalty", -2.0..=2.0)?,
        frequency_penalty: range(body.frequency_penalty, "frequency_penalty", -2.0..=2.0)?,
        logit_bias: logit_bias(&body.logit_bias)?,
        top_logprobs: body.top_logprobs,
        store: body.store,
        truncation,
        prompt_cache_key: label(body.prompt_cache_key, "prompt_cache_key")?,
        safety_identifier: label(body.safety_identifier, "safety_identifier")?,
        service_tier: body.service_tier.map(Arc::from),
    })
}

fn range(
    value: Option<f32>,
    field: &str,
    range: std::ops::RangeInclusive<f32>,
) -> Result<Option<f32>> {
    match value {
        Some(value) if !range.contains(&value) => Err(Error::invalid(
            format!("create.{field}"),
            format!("{value} is not within {} to {}", range.start(), range.end()),
        )),
        value => Ok(value),
    }
}

fn within(text: Option<String>, field: &str, bytes_max: usize) -> Result<Option<Arc<str>>> {
    match text {
        Some(text) if text.len() > bytes_max => Err(Error::invalid(
            format!("create.{field}"),
            format!("{} bytes are over the limit of {bytes_max}", text.len()),
        )),
        text => Ok(text.map(Arc::from)),
    }
}

fn label(text: Option<String>, field: &str) -> Result<Option<Arc<str>>> {
    match text {
        Some(text) if text.chars().count() > LABEL_CHARS_MAX => Err(Error::invalid(
            format!("create.{field}"),
            format!("it has more than {LABEL_CHARS_MAX} characters"),
        )),
        text => Ok(text.map(Arc::from)),
    }
}

fn stop(texts: Vec<String>) -> Result<Option<Arc<[Arc<str>]>>> {
    if texts.len() > STOP_MAX {
        return Err(Error::invalid(
            "create.stop",
            format!("at most {STOP_MAX} texts are allowed"),
        ));
    }
    for (index, text) in texts.iter().enumerate() {
        if text.is_empty() || text.len() > STOP_BYTES_MAX {
            return Err(Error::invalid(
                format!("create.stop[{index}]"),
                format!("a stop text has 1 to {STOP_BYTES_MAX} bytes"),
            ));
        }
    }
    Ok((!texts.is_empty()).then(|| texts.into_iter().map(Arc::from).collect()))
}

fn logit_bias(bias: &std::collections::HashMap<u32, f32>) -> Result<Option<LogitBias>> {
    if bias.len() > LOGIT_BIAS_MAX {
        return Err(Error::invalid(
            "create.logit_bias",
            format!("at most {LOGIT_BIAS_MAX} entries are allowed"),
        ));
    }
    if let Some((id, _)) = bias
        .iter()
        .find(|(_, bias)| !(-100.0..=100.0).contains(*bias))
    {
        return Err(Error::invalid(
            "create.logit_bias",
            format!("that of token {id} is not within -100 to 100"),
        ));
    }
    let mut sorted: Vec<(u32, f32)> = bias.iter().map(|(id, bias)| (*id, *bias)).collect();
    sorted.sort_unstable_by_key(|(id, _)| *id);
    Ok((!sorted.is_empty()).then(|| sorted.into()))
}

fn tool_choice(choice: pb::ToolChoice) -> Result<ToolChoice> {
    use pb::{ToolChoiceMode as Mode, tool_choice::Choice};
    let mode = |mode: i32| {
        Mode::try_from(mode)
            .map_err(|_| Error::invalid("create.tool_choice", "the mode is not known"))
    };
    match choice.choice {
        None => Ok(ToolChoice::Auto),
        Some(Choice::Mode(value)) => Ok(match mode(value)? {
            Mode::Unspecified | Mode::Auto => ToolChoice::Auto,
            Mode::None => ToolChoice::None,
            Mode::Required => ToolChoice::Required,
        }),
        Some(Choice::Function(tool)) => {
            name(&tool, "create.tool_choice.function")?;
            Ok(ToolChoice::Function(tool.into()))
        }
        Some(Choice::Custom(tool)) => {
            name(&tool, "create.tool_choice.custom")?;
            Ok(ToolChoice::Custom(tool.into()))
        }
        Some(Choice::AllowedTools(allowed)) => {
            for (index, tool) in allowed.names.iter().enumerate() {
                name(
                    tool,
                    &format!("create.tool_choice.allowed_tools.names[{index}]"),
                )?;
            }
            if allowed.names.is_empty() {
                return Err(Error::invalid(
                    "create.tool_choice.allowed_tools.names",
                    "at least one name is needed",
                ));
            }
            let required = match mode(allowed.mode)? {
                Mode::Unspecified | Mode::Auto => false,
                Mode::Required => true,
                Mode::None => {
                    return Err(Error::invalid(
                        "create.tool_choice.allowed_tools.mode",
                        "it is auto or required",
                    ));
                }
            };
            Ok(ToolChoice::Allowed {
                required,
                names: allowed.names.into_iter().map(Arc::from).collect(),
            })
        }
    }
}

fn text_format(format: pb::TextFormat) -> Result<TextFormat> {
    use pb::text_format::Format;
    Ok(match format.format {
        None | Some(Format::Plain(_)) => TextFormat::Plain,
        Some(Format::JsonObject(_)) => TextFormat::JsonObject,
        Some(Format::JsonSchema(schema)) => {
            name(&schema.name, "create.text.json_schema.name")?;
            json_object(&schema.schema, "create.text.json_schema.schema")?;
            TextFormat::JsonSchema {
                name: schema.name.into(),
                schema: schema.schema.into(),
                strict: schema.strict,
            }
        }
    })
}
