//! `cerebras` against a service that records and plays: requests as whole values, answers as
//! whole lists of chunks.

#[path = "cerebras/answers.rs"]
mod answers;
#[path = "cerebras/conversation.rs"]
mod conversation;
#[path = "cerebras/failures.rs"]
mod failures;
#[path = "cerebras/fake.rs"]
pub(crate) mod fake;
#[path = "cerebras/real.rs"]
mod real;
#[path = "cerebras/requests.rs"]
mod requests;

use std::sync::Arc;

use futures::StreamExt as _;
use hotloop::{
    backend::{
        Backend as _, BackendError, Chat, ChatMessage, Chunk, Prompt, SampleEnd, Sampling,
        TokensCounted, Told,
        cerebras::{ApiKey, Cerebras, CerebrasOptions, PromptForm},
    },
    item::{Tool, ToolKind},
    ledger::{Draft, Rope},
    parse::Parsed,
    request::Settings,
};
use serde_json::{Value, json};

use fake::{Fake, Play, Step};

const KEY: &str = "csk-very-secret";

/// A backend for this service, made by these lines of a file.
fn backend(fake: &Fake, toml: &str) -> Cerebras {
    let warm = if toml.contains("warm") {
        ""
    } else {
        "warm = false"
    };
    let toml = format!("url = \"{}\"\nmodel = \"m\"\n{warm}\n{toml}", fake.url);
    let options: CerebrasOptions = toml::from_str(&toml).unwrap();
    Cerebras::new(options, Some(ApiKey::new(KEY).unwrap())).unwrap()
}

fn tools() -> Arc<[Tool]> {
    let tool = |name: &str| Tool {
        name: name.into(),
        description: None,
        kind: ToolKind::Function {
            parameters: r#"{"type":"object"}"#.into(),
            strict: false,
        },
    };
    [tool("look"), tool("go")].into()
}

/// One message of a user, and two tools.
fn chat() -> Prompt {
    let settings = Settings {
        tools: Some(tools()),
        ..Settings::default()
    };
    let message = ChatMessage {
        object: r#"{"role":"user","content":"hi""#.into(),
        reasoning: None,
    };
    Prompt {
        response_id: "resp_1".into(),
        tenant: "tenant".into(),
        affinity: "resp_1".into(),
        tokens: rope(&[1, 2, 300, 70_000]),
        recent: Vec::new(),
        chat: Some(Chat {
            settings: Arc::new(settings),
            messages: vec![message],
        }),
        sampling: Sampling {
            end_tokens: [9].into(),
            ..Sampling::greedy(100)
        },
    }
}

/// The same as tokens.
fn tokens() -> Prompt {
    Prompt {
        chat: None,
        ..chat()
    }
}

fn rope(ids: &[u32]) -> Rope {
    Rope::default().with_rendered(Draft {
        text: "x".into(),
        ids: ids.to_vec(),
        ..Draft::default()
    })
}

/// All that comes of a prompt.
async fn sampled(backend: &Cerebras, prompt: Prompt) -> Vec<Result<Chunk, BackendError>> {
    backend.sample(prompt).collect().await
}

/// What a prompt's chunks say together: what was parsed, with what belongs together joined, and
/// the last chunk without it.
async fn answer(backend: &Cerebras, prompt: Prompt) -> (Vec<Parsed>, Chunk) {
    let chunks: Vec<Chunk> = sampled(backend, prompt)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let (last, others) = chunks.split_last().unwrap();
    assert!(others.iter().all(|chunk| chunk.finish.is_none()
        && chunk.cached_tokens.is_none()
        && chunk.told.as_ref().is_none_or(|told| told.usage.is_none())));
    let mut parsed: Vec<Parsed> = Vec::new();
    for next in chunks
        .iter()
        .flat_map(|chunk| &chunk.told)
        .flat_map(|told| &told.parsed)
    {
        match (parsed.last_mut(), next) {
            (Some(Parsed::Text(text)), Parsed::Text(more))
            | (Some(Parsed::Reasoning(text)), Parsed::Reasoning(more))
            | (Some(Parsed::CallArguments(text)), Parsed::CallArguments(more)) => {
                text.push_str(more);
            }
            _ => parsed.push(next.clone()),
        }
    }
    let mut last = last.clone();
    if let Some(told) = &mut last.told {
        told.parsed.clear();
    }
    (parsed, last)
}

/// The error that a prompt comes to, and how many chunks came before.
async fn error(backend: &Cerebras, prompt: Prompt) -> (usize, BackendError) {
    let mut all = sampled(backend, prompt).await;
    let last = all.pop().unwrap().unwrap_err();
    assert!(all.iter().all(Result::is_ok));
    (all.len(), last)
}

/// A last chunk with what was counted.
fn last(finish: SampleEnd, usage: Option<TokensCounted>, cached_tokens: Option<u32>) -> Chunk {
    Chunk {
        cached_tokens,
        told: Some(Box::new(Told {
            parsed: Vec::new(),
            usage,
        })),
        finish: Some(finish),
        ..Chunk::default()
    }
}

const fn counted(input: u32, output: u32, reasoning: u32) -> Option<TokensCounted> {
    Some(TokensCounted {
        input,
        output,
        reasoning,
    })
}

/// Each of these as an event in a frame of its own.
fn events(all: impl IntoIterator<Item = Value>) -> Vec<Step> {
    let event = |value: Value| Step::Bytes(format!("data: {value}\n\n").into_bytes());
    all.into_iter().map(event).collect()
}

/// These, and the end of the stream.
fn play(all: impl IntoIterator<Item = Value>) -> Play {
    let mut steps = events(all);
    steps.push(done());
    Play::Events(steps)
}

fn done() -> Step {
    Step::Bytes(b"data: [DONE]\n\n".to_vec())
}

fn delta(delta: Value) -> Value {
    json!({"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]})
}

fn text(text: &str) -> Value {
    delta(json!({"content": text}))
}

fn call(index: u32, id: &str, name: &str, arguments: &str) -> Value {
    let function = json!({"name": name, "arguments": arguments});
    let call = json!({"index": index, "id": id, "type": "function", "function": function});
    delta(json!({"tool_calls": [call]}))
}

fn more(index: u32, arguments: &str) -> Value {
    let call = json!({"index": index, "function": {"arguments": arguments}});
    delta(json!({"tool_calls": [call]}))
}

fn finish(reason: &str) -> Value {
    json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
}

fn usage() -> Value {
    json!({"choices": [], "usage": {
        "prompt_tokens": 50, "completion_tokens": 7, "total_tokens": 57,
        "prompt_tokens_details": {"cached_tokens": 40},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }})
}
