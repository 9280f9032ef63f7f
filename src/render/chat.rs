//! The same messages for engines that render by themselves, as JSON.

use serde::Serialize;

use super::{By, said};
use crate::{backend::ChatMessage, item::Role, request::ValidItem};

/// A message in the form of OpenAI's chat completions, without its reasoning.
#[derive(Serialize)]
#[serde(tag = "role", rename_all = "lowercase")]
enum Message<'a> {
    System {
        content: &'a str,
    },
    Developer {
        content: &'a str,
    },
    User {
        content: &'a str,
    },
    Assistant {
        content: Option<&'a str>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        tool_calls: Vec<Call<'a>>,
    },
    Tool {
        tool_call_id: &'a str,
        content: &'a str,
    },
}

#[derive(Serialize)]
struct Call<'a> {
    id: &'a str,
    r#type: &'static str,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    name: &'a str,
    arguments: &'a str,
}

/// Turns items that belong together into messages, one for each that [`super::entries`] makes of them.
#[must_use]
pub fn messages(items: &[ValidItem]) -> Vec<ChatMessage> {
    let all = said(items).into_iter();
    all.map(|said| match said.by {
        By::Client(role, content) => {
            let content = &*content;
            message(&match role {
                Role::System => Message::System { content },
                Role::Developer => Message::Developer { content },
                Role::User | Role::Assistant => Message::User { content },
            })
        }
        By::Model(answer) => {
            let calls = answer.calls().map(|(id, name, arguments)| Call {
                id: id.as_str(),
                r#type: "function",
                function: Function { name, arguments },
            });
            let message = message(&Message::Assistant {
                content: answer.text.as_deref(),
                tool_calls: calls.collect(),
            });
            let reasoning = answer.reasoning.as_ref();
            ChatMessage {
                reasoning: reasoning.map(|text| json(text).into()),
                ..message
            }
        }
        By::Tool {
            call_id, output, ..
        } => message(&Message::Tool {
            tool_call_id: call_id.as_str(),
            content: &output,
        }),
        By::Summary(content) => message(&Message::User { content: &content }),
    })
    .collect()
}

fn message(message: &Message<'_>) -> ChatMessage {
    let mut object = json(message);
    object.pop();
    ChatMessage {
        object: object.into(),
        reasoning: None,
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // Only values that are no JSON by their type fail, and there are none.
    serde_json::to_vec(value).unwrap_or_default()
}
