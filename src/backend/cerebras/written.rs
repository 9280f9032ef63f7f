//! Instructions and tools as JSON, written once for as long as conversations have them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use moka::sync::Cache;
use serde::Serialize;
use serde_json::value::RawValue;

use super::body::refused;
use crate::{
    backend::BackendError,
    item::{CUSTOM_PARAMETERS, Tool, ToolKind},
    request::{Settings, TextFormat, ToolChoice},
};

/// The most bytes that are kept of each kind.
const KEPT_BYTES_MAX: u64 = 32 << 20;

/// How long they are kept without being used.
const KEPT_IDLE: Duration = Duration::from_secs(600);

/// What was written. Found by the address of what it was written from, which is kept with it, so
/// that nothing else can have that address: a conversation passes its settings on by pointer.
#[derive(Debug)]
pub(super) struct Written {
    tools: Cache<usize, (Arc<[Tool]>, Bytes)>,
    instructions: Cache<usize, (Arc<str>, Bytes)>,
}

#[derive(Serialize)]
struct ToolJson<'a> {
    r#type: &'static str,
    function: FunctionJson<'a>,
}

#[derive(Serialize)]
struct FunctionJson<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    parameters: &'a RawValue,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    strict: bool,
}

#[derive(Serialize)]
struct SystemJson<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct SchemaFormat<'a> {
    r#type: &'static str,
    json_schema: SchemaJson<'a>,
}

#[derive(Serialize)]
struct SchemaJson<'a> {
    name: &'a str,
    schema: &'a RawValue,
    strict: bool,
}

impl Written {
    pub(super) fn new() -> Self {
        fn cache<T: Clone + Send + Sync + 'static>() -> Cache<usize, (T, Bytes)> {
            Cache::builder()
                .max_capacity(KEPT_BYTES_MAX)
                // What it was written from is about as large.
                .weigher(|_, (_, json): &(T, Bytes)| {
                    u32::try_from(json.len() * 2 + 256).unwrap_or(u32::MAX)
                })
                .time_to_idle(KEPT_IDLE)
                .build()
        }
        Self {
            tools: cache(),
            instructions: cache(),
        }
    }

    /// The tools that the model is to know. Where only some are allowed, it knows only those; where
    /// none or one is, it is told by the choice, so that the others stay in the service's cache.
    pub(super) fn tools(&self, settings: &Settings) -> Result<Bytes, BackendError> {
        let Some(tools) = &settings.tools else {
            return Ok(Bytes::from_static(b"[]"));
        };
        if let Some(ToolChoice::Allowed { .. }) = settings.tool_choice {
            return tools_json(settings.callable());
        }
        let address = tools.as_ptr().addr();
        if let Some((_, json)) = self.tools.get(&address) {
            return Ok(json);
        }
        let json = tools_json(tools.iter())?;
        self.tools.insert(address, (tools.clone(), json.clone()));
        Ok(json)
    }

    /// The first message.
    pub(super) fn instructions(&self, text: &Arc<str>) -> Bytes {
        let address = text.as_ptr().addr();
        let written = self.instructions.get_with(address, || {
            let json = to_json(&SystemJson {
                role: "system",
                content: text,
            });
            (text.clone(), json)
        });
        written.1
    }
}

fn tools_json<'a>(tools: impl Iterator<Item = &'a Tool>) -> Result<Bytes, BackendError> {
    let tools = tools.map(|tool| {
        let (parameters, strict) = match &tool.kind {
            ToolKind::Function { parameters, strict } => (&**parameters, *strict),
            ToolKind::Custom => (CUSTOM_PARAMETERS, false),
        };
        Ok(ToolJson {
            r#type: "function",
            function: FunctionJson {
                name: &tool.name,
                description: tool.description.as_deref(),
                parameters: raw(parameters)?,
                strict,
            },
        })
    });
    let tools: Vec<ToolJson<'_>> = tools.collect::<Result<_, BackendError>>()?;
    Ok(to_json(&tools))
}

/// The format of the text, where it is not plain.
pub(super) fn response_format(format: &TextFormat) -> Result<Option<Bytes>, BackendError> {
    match format {
        TextFormat::Plain => Ok(None),
        TextFormat::JsonObject => Ok(Some(Bytes::from_static(br#"{"type":"json_object"}"#))),
        TextFormat::JsonSchema {
            name,
            schema,
            strict,
        } => Ok(Some(to_json(&SchemaFormat {
            r#type: "json_schema",
            json_schema: SchemaJson {
                name,
                schema: raw(schema)?,
                strict: *strict,
            },
        }))),
    }
}

fn raw(json: &str) -> Result<&RawValue, BackendError> {
    serde_json::from_str(json).map_err(|_| refused("a schema is no JSON"))
}

fn to_json(value: &impl Serialize) -> Bytes {
    // Only values that are no JSON by their type fail, and there are none.
    serde_json::to_vec(value).unwrap_or_default().into()
}
