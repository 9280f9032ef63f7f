//! Items and tools, from the wire.

use std::sync::Arc;

use super::{RequestLimits, Result};
use crate::{
    event::Error,
    item::{Body, Item, ItemId, ItemStatus, Part, Role, Tool, ToolKind},
    proto as pb,
    request::NewItem,
};

pub(super) const ID_BYTES_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 64;
const PARTS_MAX: usize = 1024;

pub(super) fn tools(tools: Vec<pb::Tool>, limits: &RequestLimits) -> Result<Option<Arc<[Tool]>>> {
    use pb::tool::Tool as Wire;
    if tools.len() > limits.tools_max {
        return Err(Error::invalid(
            "create.tools",
            format!(
                "{} tools are over the limit of {}",
                tools.len(),
                limits.tools_max
            ),
        ));
    }
    let mut decoded: Vec<Tool> = Vec::with_capacity(tools.len());
    for (index, tool) in tools.into_iter().enumerate() {
        let at = |field: &str| format!("create.tools[{index}]{field}");
        let some = |text: String| (!text.is_empty()).then(|| Arc::from(text));
        let tool = match tool.tool {
            None => {
                return Err(Error::invalid(
                    at(""),
                    "no kind of tool is set: function or custom",
                ));
            }
            Some(Wire::Function(function)) => {
                name(&function.name, &at(".function.name"))?;
                let parameters = if function.parameters.is_empty() {
                    r#"{"type": "object", "properties": {}}"#.to_owned()
                } else {
                    function.parameters
                };
                json_object(&parameters, &at(".function.parameters"))?;
                Tool {
                    name: function.name.into(),
                    description: some(function.description),
                    kind: ToolKind::Function {
                        parameters: parameters.into(),
                        strict: function.strict,
                    },
                }
            }
            Some(Wire::Custom(custom)) => {
                name(&custom.name, &at(".custom.name"))?;
                Tool {
                    name: custom.name.into(),
                    description: some(custom.description),
                    kind: ToolKind::Custom,
                }
            }
        };
        if decoded.iter().any(|other| other.name == tool.name) {
            return Err(Error::invalid(
                at(""),
                format!("the name `{}` is taken by a tool before it", tool.name),
            ));
        }
        decoded.push(tool);
    }
    Ok((!decoded.is_empty()).then(|| decoded.into()))
}

pub(super) fn name(name: &str, param: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::invalid(
        param,
        format!("a name has 1 to {NAME_BYTES_MAX} characters of [A-Za-z0-9_-]"),
    ))
}

pub(super) fn json_object(text: &str, param: &str) -> Result<()> {
    match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::invalid(
            param,
            format!(
                "it is not the JSON text of an object: line {}, column {}",
                error.line(),
                error.column()
            ),
        )),
    }
}

pub(super) fn items(
    items: Vec<pb::Item>,
    command: &str,
    limits: &RequestLimits,
) -> Result<Vec<NewItem>> {
    if items.len() > limits.items_max {
        return Err(Error::invalid(
            format!("{command}.input"),
            format!(
                "{} items are over the limit of {}",
                items.len(),
                limits.items_max
            ),
        ));
    }
    items
        .into_iter()
        .enumerate()
        .map(|(index, wire)| {
            let at = format!("{command}.input[{index}]");
            let new = item(wire, &at)?;
            if let NewItem::Item(item) = &new
                && item.text_bytes() > limits.item_bytes_max
            {
                return Err(Error::invalid(
                    at,
                    format!(
                        "{} bytes are over the limit of {} an item",
                        item.text_bytes(),
                        limits.item_bytes_max
                    ),
                ));
            }
            Ok(new)
        })
        .collect()
}

fn item(wire: pb::Item, at: &str) -> Result<NewItem> {
    use pb::item::Item as Wire;
    let body = match wire.item {
        None => return Err(Error::invalid(at, "no kind of item is set")),
        Some(Wire::ItemReference(reference)) if is_id(&reference.id) => {
            return Ok(NewItem::Reference(reference.id.into()));
        }
        Some(Wire::ItemReference(_)) => {
            return Err(not_an_id(format!("{at}.item_reference.id")));
        }
        Some(Wire::UserText(text)) => Body::Message {
            role: Role::User,
            parts: vec![Part::InputText(text.into())],
        },
        Some(Wire::Message(message)) => message_body(message, at)?,
        Some(Wire::FunctionCall(call)) => {
            name(&call.name, &format!("{at}.function_call.name"))?;
            json_object(&call.arguments, &format!("{at}.function_call.arguments"))?;
            Body::FunctionCall {
                call_id: call_id(&call.call_id, at, "function_call")?,
                name: call.name.into(),
                arguments: call.arguments.into(),
            }
        }
        Some(Wire::FunctionCallOutput(output)) => Body::FunctionCallOutput {
            call_id: call_id(&output.call_id, at, "function_call_output")?,
            output: output.output.into(),
        },
        Some(Wire::Reasoning(reasoning)) => Body::Reasoning {
            content: reasoning.content.into(),
        },
        Some(Wire::CustomToolCall(call)) => {
            name(&call.name, &format!("{at}.custom_tool_call.name"))?;
            let arguments = serde_json::json!({ "input": call.input }).to_string();
            Body::CustomToolCall {
                call_id: call_id(&call.call_id, at, "custom_tool_call")?,
                name: call.name.into(),
                input: call.input.into(),
                arguments: arguments.into(),
            }
        }
        Some(Wire::CustomToolCallOutput(output)) => Body::CustomToolCallOutput {
            call_id: call_id(&output.call_id, at, "custom_tool_call_output")?,
            output: output.output.into(),
        },
        Some(Wire::Compaction(compaction)) => Body::Compaction {
            summary: compaction.summary.into(),
        },
    };
    let id = if wire.id.is_empty() {
        ItemId::new(&body)
    } else if is_id(&wire.id) {
        wire.id.into()
    } else {
        return Err(not_an_id(format!("{at}.id")));
    };
    Ok(NewItem::Item(Item {
        id,
        status: ItemStatus::Completed,
        body,
    }))
}

fn not_an_id(param: String) -> Error {
    let why = format!("an id has at most {ID_BYTES_MAX} characters of [A-Za-z0-9_-]");
    Error::invalid(param, why)
}

fn is_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    text.len() <= ID_BYTES_MAX && text.bytes().all(allowed)
}

fn call_id(id: &str, at: &str, kind: &str) -> Result<crate::item::CallId> {
    if !id.is_empty() && is_id(id) {
        return Ok(id.into());
    }
    Err(Error::invalid(
        format!("{at}.{kind}.call_id"),
        format!("a call id has 1 to {ID_BYTES_MAX} characters of [A-Za-z0-9_-]"),
    ))
}

fn message_body(message: pb::Message, at: &str) -> Result<Body> {
    use pb::content_part::Part as Wire;
    let role = match pb::Role::try_from(message.role) {
        Err(_) => {
            return Err(Error::invalid(
                format!("{at}.message.role"),
                "the role is not known",
            ));
        }
        Ok(pb::Role::Unspecified | pb::Role::User) => Role::User,
        Ok(pb::Role::System) => Role::System,
        Ok(pb::Role::Developer) => Role::Developer,
        Ok(pb::Role::Assistant) => Role::Assistant,
    };
    if message.content.is_empty() || message.content.len() > PARTS_MAX {
        return Err(Error::invalid(
            format!("{at}.message.content"),
            format!("a message has 1 to {PARTS_MAX} parts"),
        ));
    }
    let part = |(index, wire): (usize, pb::ContentPart)| {
        let at = |field: &str| format!("{at}.message.content[{index}]{field}");
        let wrong = |field: &str| {
            let who = if role == Role::Assistant {
                "an assistant's"
            } else {
                "this role's"
            };
            Err(Error::invalid(
                at(field),
                format!("{who} message cannot hold such a part"),
            ))
        };
        match (wire.part, role) {
            (None, _) => Err(Error::invalid(at(""), "no kind of part is set")),
            (Some(Wire::InputText(text)), Role::System | Role::Developer | Role::User) => {
                Ok(Part::InputText(text.into()))
            }
            (Some(Wire::OutputText(text)), Role::Assistant) => Ok(Part::OutputText {
                text: text.text.into(),
                logprobs: Arc::new([]),
            }),
            (Some(Wire::Refusal(text)), Role::Assistant) => Ok(Part::Refusal(text.into())),
            (Some(Wire::InputText(_)), Role::Assistant) => wrong(".input_text"),
            (Some(Wire::OutputText(_)), _) => wrong(".output_text"),
            (Some(Wire::Refusal(_)), _) => wrong(".refusal"),
            (Some(Wire::InputImage(_)), _) => Err(Error::invalid(
                at(".input_image"),
                "this model takes only text",
            )),
        }
    };
    let parts = message
        .content
        .into_iter()
        .enumerate()
        .map(part)
        .collect::<Result<_>>()?;
    Ok(Body::Message { role, parts })
}
