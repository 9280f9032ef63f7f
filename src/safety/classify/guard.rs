//! Guard models behind an OpenAI-compatible chat endpoint. They are shown the conversation, and say in a few words what they
//! make of its last message: that of the user, or that of the model.

use std::{fs, sync::Arc};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::{ClassifierOptions, Classify, GuardFormat, Label, Question, Unjudged, http::Endpoint};
use crate::event::Scope;

/// Tokens that a guard may answer with: some think first.
const ANSWER_TOKENS_MAX: u32 = 2_048;

/// The longest instructions, in bytes.
const INSTRUCTIONS_BYTES_MAX: u64 = 1 << 20;

/// What stands for the user's message where the window does not reach back to it: templates of guards begin with one.
const EARLIER: &str = "(earlier messages are not shown)";

/// Posts conversations to `/chat/completions`.
#[derive(Debug)]
pub struct Guard {
    endpoint: Endpoint,
    model: String,
    format: GuardFormat,
    instructions: Option<String>,
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Vec<Message>,
    temperature: f32,
    max_tokens: u32,
    stream: bool,
}

#[derive(Serialize, Debug, PartialEq, Eq)]
struct Message {
    role: &'static str,
    content: String,
}

#[derive(Deserialize)]
struct Answer {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    message: Said,
}

#[derive(Deserialize)]
struct Said {
    content: Option<String>,
}

impl Guard {
    /// The guard that these settings name.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL, the key or the instructions.
    pub fn new(options: &ClassifierOptions, key: Option<&str>) -> Result<Self, String> {
        let instructions = options.instructions.as_ref().map(|path| {
            let wrong = |error: std::io::Error| format!("instructions {}: {error}", path.display());
            if fs::metadata(path).map_err(wrong)?.len() > INSTRUCTIONS_BYTES_MAX {
                let limit = INSTRUCTIONS_BYTES_MAX;
                return Err(format!(
                    "instructions {}: over {limit} bytes",
                    path.display()
                ));
            }
            fs::read_to_string(path).map_err(wrong)
        });
        Ok(Self {
            endpoint: Endpoint::new(options, "chat/completions", key)?,
            model: options.model.clone(),
            format: options.format,
            instructions: instructions.transpose()?,
        })
    }

    /// The conversation as the guard is shown it: users and models take turns, a user is first.
    fn messages(&self, question: &Question) -> Vec<Message> {
        let mut messages: Vec<Message> = Vec::new();
        for passage in question.context.iter().chain([&question.passage]) {
            let role = match passage.scope {
                Scope::UserInput | Scope::ToolOutput => "user",
                Scope::ModelOutput | Scope::Reasoning => "assistant",
            };
            match messages.last_mut() {
                Some(last) if last.role == role => {
                    last.content.push_str("\n\n");
                    last.content.push_str(&passage.text);
                }
                None if role == "assistant" => {
                    messages.extend([message("user", EARLIER), message(role, &passage.text)])
                }
                Some(_) | None => messages.push(message(role, &passage.text)),
            }
        }
        if let Some(instructions) = &self.instructions {
            messages.insert(0, message("system", instructions));
        }
        messages
    }
}

fn message(role: &'static str, content: &str) -> Message {
    let content = content.to_owned();
    Message { role, content }
}

impl Classify for Guard {
    fn classify(&self, question: Arc<Question>) -> BoxFuture<'_, Result<Vec<Label>, Unjudged>> {
        Box::pin(async move {
            let body = Body {
                model: &self.model,
                messages: self.messages(&question),
                temperature: 0.0,
                max_tokens: ANSWER_TOKENS_MAX,
                stream: false,
            };
            let Answer { choices } = self.endpoint.post(&body).await?;
            let said = choices.into_iter().next().and_then(|it| it.message.content);
            let labels = said.and_then(|said| read(self.format, &said));
            let unread = || "its model did not answer in the format that is configured".to_owned();
            labels.ok_or_else(|| Unjudged::Refused(unread()))
        })
    }
}

/// What the guard said. `None`: it is not in this format.
fn read(format: GuardFormat, said: &str) -> Option<Vec<Label>> {
    match format {
        GuardFormat::LlamaGuard => {
            let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
            match lines.next()? {
                "safe" => Some(Vec::new()),
                "unsafe" => Some(labels(lines.next().unwrap_or_default(), None)),
                _ => None,
            }
        }
        GuardFormat::Qwen3Guard => {
            let line = |name: &str| {
                let mut lines = said
                    .lines()
                    .filter_map(|line| line.trim().strip_prefix(name));
                lines.next().map(str::trim)
            };
            let categories = line("Categories:").unwrap_or_default();
            match line("Safety:")? {
                "Safe" => Some(Vec::new()),
                "Controversial" => Some(labels(categories, Some(0.5))),
                "Unsafe" => Some(labels(categories, Some(1.0))),
                _ => None,
            }
        }
        GuardFormat::Json => {
            #[derive(Deserialize)]
            struct Object {
                flagged: bool,
                #[serde(default)]
                categories: Vec<String>,
                score: Option<f32>,
            }
            // Some put a fence around it.
            let object = said.get(said.find('{')?..=said.rfind('}')?)?;
            let Object {
                flagged,
                categories,
                score,
            } = serde_json::from_str(object).ok()?;
            Some(match flagged {
                true => labels(&categories.join(","), score),
                false => Vec::new(),
            })
        }
    }
}

/// A finding for each of these categories; one without a name where none is told.
fn labels(categories: &str, score: Option<f32>) -> Vec<Label> {
    let label = |category: &str| Label {
        category: category.into(),
        score,
        bytes: None,
    };
    let named = categories.split(',').map(str::trim);
    let named = named.filter(|it| !it.is_empty() && *it != "None");
    let labels: Vec<Label> = named.map(label).collect();
    match labels.is_empty() {
        true => vec![label("unsafe")],
        false => labels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(format: GuardFormat, said: &str) -> Option<String> {
        let labels = read(format, said)?;
        let label = |label: &Label| match label.score {
            Some(score) => format!("{} {score}", label.category),
            None => label.category.to_string(),
        };
        Some(labels.iter().map(label).collect::<Vec<_>>().join(", "))
    }

    #[test]
    fn what_guards_say_is_read_and_what_they_do_not_say_is_no_pass() {
        use GuardFormat::{Json, LlamaGuard, Qwen3Guard};
        let read = [
            (LlamaGuard, "\n\nsafe", Some("")),
            (LlamaGuard, "\n\nunsafe\nS1,S10", Some("S1, S10")),
            (LlamaGuard, "unsafe", Some("unsafe")),
            (LlamaGuard, "I cannot help with that", None),
            (LlamaGuard, "", None),
            (Qwen3Guard, "Safety: Safe\nCategories: None", Some("")),
            (
                Qwen3Guard,
                "Safety: Unsafe\nCategories: Violent, PII",
                Some("Violent 1, PII 1"),
            ),
            (
                Qwen3Guard,
                "Safety: Controversial\nCategories: None\nRefusal: No",
                Some("unsafe 0.5"),
            ),
            (Qwen3Guard, "unsafe", None),
            (Json, "```json\n{\"flagged\": false}\n```", Some("")),
            (
                Json,
                "{\"flagged\": true, \"categories\": [\"spam\"], \"score\": 0.75}",
                Some("spam 0.75"),
            ),
            (Json, "{\"flagged\": \"yes\"}", None),
            (Json, "}{", None),
        ];
        for (format, said, expected) in read {
            assert_eq!(says(format, said).as_deref(), expected, "{said}");
        }
    }
}
