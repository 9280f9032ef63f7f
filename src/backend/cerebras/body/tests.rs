use std::sync::Arc;

use super::*;
use crate::{
    backend::{ChatMessage, Sampling},
    item::{Tool, ToolKind},
    ledger::{Draft, Rope},
    request::{Effort, TextFormat},
};

fn options() -> CerebrasOptions {
    CerebrasOptions {
        model: "m".into(),
        ..CerebrasOptions::default()
    }
}

fn message(object: &str, reasoning: Option<&str>) -> ChatMessage {
    ChatMessage {
        object: object.to_owned().into(),
        reasoning: reasoning.map(|text| text.to_owned().into()),
    }
}

fn rope(parts: &[&[u32]]) -> Rope {
    parts.iter().fold(Rope::default(), |rope, ids| {
        rope.with_rendered(Draft {
            text: "x".into(),
            ids: ids.to_vec(),
            ..Draft::default()
        })
    })
}

fn prompt(settings: Settings, messages: Vec<ChatMessage>) -> Prompt {
    Prompt {
        response_id: "resp_1".into(),
        tenant: "tenant".into(),
        affinity: "resp_0".into(),
        tokens: rope(&[&[1, 2], &[], &[300, 70_000]]),
        recent: Vec::new(),
        chat: Some(Chat {
            settings: Arc::new(settings),
            messages,
        }),
        sampling: Sampling::greedy(100),
    }
}

fn tool(name: &str, kind: ToolKind) -> Tool {
    Tool {
        name: name.into(),
        description: None,
        kind,
    }
}

fn tools() -> Arc<[Tool]> {
    let parameters = r#"{"type":"object","properties":{}}"#.into();
    let strict = ToolKind::Function {
        parameters,
        strict: true,
    };
    [
        Tool {
            description: Some("runs".into()),
            ..tool("run", strict)
        },
        tool("write", ToolKind::Custom),
    ]
    .into()
}

fn value(parts: &[Bytes]) -> Value {
    serde_json::from_slice(&parts.concat()).unwrap()
}

#[test]
fn history_is_sent_from_the_bytes_that_are_kept() {
    let messages = vec![
        message(r#"{"role":"user","content":"hi""#, None),
        message(r#"{"role":"assistant","content":"ho""#, Some("\"hm\"")),
    ];
    let written = Written::new();
    let settings = Settings {
        instructions: Some("be brief".into()),
        tools: Some(tools()),
        ..Settings::default()
    };
    let prompt = prompt(settings, messages.clone());
    let first = parts(&options(), &written, &prompt).unwrap();
    let second = parts(&options(), &written, &prompt).unwrap();
    let has = |parts: &[Bytes], bytes: &Bytes| {
        let found = parts.iter().filter(|part| part.as_ptr() == bytes.as_ptr());
        found.count() == 1
    };
    for message in &messages {
        assert!(has(&first, &message.object) && has(&second, &message.object));
    }
    assert!(has(&first, messages[1].reasoning.as_ref().unwrap()));
    // Of the second request only its fields are new.
    let new = second.iter().filter(|part| !has(&first, part));
    let new: Vec<&Bytes> = new.filter(|part| part.len() > 30).collect();
    assert_eq!(new, [&first[0]]);
    assert_eq!(
        value(&first)["messages"],
        json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho", "reasoning": "hm"},
        ])
    );
}

#[test]
fn ids_are_sent_from_the_bytes_that_are_kept() {
    let options = CerebrasOptions {
        prompt: PromptForm::Tokens,
        ..options()
    };
    let prompt = prompt(Settings::default(), Vec::new());
    let kept = prompt.tokens.encoded(IdForm::Decimal);
    let parts = parts(&options, &Written::new(), &prompt).unwrap();
    assert_eq!(parts[2].as_ptr(), kept[0][1..].as_ptr());
    assert_eq!(parts[3].as_ptr(), kept[2].as_ptr());
    assert_eq!(
        value(&parts),
        json!({
            "model": "m", "stream": true, "stream_options": {"include_usage": true},
            "max_tokens": 100, "temperature": 0.0, "return_raw_tokens": true,
            "prompt": [1, 2, 300, 70_000],
        })
    );
}

#[test]
fn messagepack_says_the_same_as_json() {
    let mut options = CerebrasOptions {
        prompt: PromptForm::Tokens,
        dialect: Dialect::Vllm,
        top_k: TopK::Send,
        ..options()
    };
    options.extra.insert("min_p".into(), json!(0.25));
    let mut prompt = prompt(Settings::default(), Vec::new());
    prompt.sampling = Sampling {
        temperature: 0.7,
        top_p: 0.9,
        top_k: 20,
        seed: Some(u64::MAX),
        presence_penalty: -0.5,
        logit_bias: [(7, 1.5)].into(),
        end_tokens: [5, 6].into(),
        ..prompt.sampling
    };
    let written = Written::new();
    let as_json = value(&parts(&options, &written, &prompt).unwrap());
    options.body = BodyForm::Msgpack;
    let packed = parts(&options, &written, &prompt).unwrap();
    let kept = prompt.tokens.encoded(IdForm::MessagePack);
    // The ledger keeps one form; this one is written anew, and is that of JSON all the same.
    assert_eq!(packed[1..].concat(), kept.concat());
    let unpacked: Value = rmp_serde::from_slice(&packed.concat()).unwrap();
    assert_eq!(unpacked, as_json);
    let salt = unpacked["cache_salt"].as_str().unwrap();
    assert_eq!(salt.len(), 32);
    assert_eq!(
        unpacked,
        json!({
            "model": "m", "stream": true, "stream_options": {"include_usage": true},
            "max_tokens": 100, "temperature": 0.7, "top_p": 0.9, "top_k": 20,
            "seed": i64::MAX, "presence_penalty": -0.5, "logit_bias": {"7": 1.5},
            "return_token_ids": true, "stop_token_ids": [5, 6], "cache_salt": salt,
            "min_p": 0.25, "prompt": [1, 2, 300, 70_000],
        })
    );
}

#[test]
fn an_empty_prompt_is_an_empty_array() {
    let mut options = CerebrasOptions {
        prompt: PromptForm::Tokens,
        ..options()
    };
    let mut prompt = prompt(Settings::default(), Vec::new());
    prompt.tokens = Rope::default();
    let json = value(&parts(&options, &Written::new(), &prompt).unwrap());
    assert_eq!(json["prompt"], json!([]));
    options.body = BodyForm::Msgpack;
    let packed = parts(&options, &Written::new(), &prompt).unwrap().concat();
    assert_eq!(rmp_serde::from_slice::<Value>(&packed).unwrap(), json);
}

#[test]
fn each_setting_is_sent_that_the_client_made() {
    let settings = Settings {
        tools: Some(tools()),
        tool_choice: Some(ToolChoice::Function("run".into())),
        parallel_tool_calls: Some(false),
        text: Some(TextFormat::JsonSchema {
            name: "out".into(),
            schema: r#"{"type":"object"}"#.into(),
            strict: true,
        }),
        reasoning_effort: Some(Effort::Low),
        temperature: Some(0.7),
        top_p: Some(0.9),
        top_k: Some(0),
        seed: Some(7),
        stop: Some(["a", "b", "c", "d", "e"].map(Arc::from).into()),
        presence_penalty: Some(0.1),
        frequency_penalty: Some(-0.1),
        logit_bias: Some([(5, -100.0)].into()),
        ..Settings::default()
    };
    let mut options = options();
    options.service_tier = Some("flex".into());
    options.extra.insert("user".into(), json!("team"));
    let prompt = prompt(settings, Vec::new());
    let sent = value(&parts(&options, &Written::new(), &prompt).unwrap());
    let key = sent["prompt_cache_key"].clone();
    assert_eq!(
        sent,
        json!({
            "model": "m", "stream": true, "stream_options": {"include_usage": true},
            "service_tier": "flex", "max_completion_tokens": 100, "reasoning_effort": "low",
            "temperature": 0.7, "top_p": 0.9, "seed": 7, "stop": ["a", "b", "c", "d"],
            "presence_penalty": 0.1, "frequency_penalty": -0.1, "logit_bias": {"5": -100.0},
            "tool_choice": {"type": "function", "function": {"name": "run"}},
            "parallel_tool_calls": false, "reasoning_format": "parsed", "clear_thinking": false,
            "prompt_cache_key": key, "user": "team",
            "response_format": {"type": "json_schema", "json_schema":
                {"name": "out", "schema": {"type": "object"}, "strict": true}},
            "tools": [
                {"type": "function", "function": {"name": "run", "description": "runs",
                    "parameters": {"type": "object", "properties": {}}, "strict": true}},
                {"type": "function", "function": {"name": "write", "parameters":
                    {"type": "object", "properties": {"input": {"type": "string"}},
                        "required": ["input"]}}},
            ],
            "messages": [],
        })
    );
}

#[test]
fn the_key_of_a_cache_tells_neither_ids_nor_tenants() {
    let prompt = prompt(Settings::default(), Vec::new());
    let key = conversation_name(&prompt);
    assert!(!key.contains("resp"));
    let mut other = prompt.clone();
    other.tenant = "tenant2".into();
    assert_ne!(conversation_name(&other), key);
    assert_ne!(tenant_name(&other), tenant_name(&prompt));
    other = prompt.clone();
    other.response_id = "resp_2".into();
    assert_eq!(conversation_name(&other), key);
}

#[test]
fn other_services_get_what_they_know() {
    let options = CerebrasOptions {
        dialect: Dialect::OpenAi,
        max_tokens_key: MaxTokensKey::MaxTokens,
        reasoning_key: ReasoningKey::None,
        cache_key: false,
        developer_role: false,
        top_k: TopK::Send,
        ..options()
    };
    let settings = Settings {
        top_k: Some(4),
        ..Settings::default()
    };
    let messages = vec![
        message(r#"{"role":"developer","content":"hi""#, None),
        message(r#"{"role":"assistant","content":"ho""#, Some("\"hm\"")),
    ];
    let mut prompt = prompt(settings, messages);
    let sent = value(&parts(&options, &Written::new(), &prompt).unwrap());
    assert_eq!(
        sent,
        json!({
            "model": "m", "stream": true, "stream_options": {"include_usage": true},
            "max_tokens": 100, "top_k": 4, "messages": [
                {"role": "system", "content": "hi"},
                {"role": "assistant", "content": "ho"},
            ],
        })
    );
    let refuses = CerebrasOptions {
        top_k: TopK::Refuse,
        ..options
    };
    assert_eq!(
        parts(&refuses, &Written::new(), &prompt),
        Err(refused("the service does not take top_k"))
    );
    prompt.chat = None;
    assert_eq!(
        parts(&refuses, &Written::new(), &prompt),
        Err(refused("it has no messages"))
    );
}

#[test]
fn of_allowed_tools_only_those_are_told() {
    let settings = |tool_choice| Settings {
        tools: Some(tools()),
        tool_choice: Some(tool_choice),
        ..Settings::default()
    };
    let sent = |tool_choice| {
        let prompt = prompt(settings(tool_choice), Vec::new());
        let sent = value(&parts(&options(), &Written::new(), &prompt).unwrap());
        let names = sent["tools"].as_array().unwrap().iter();
        let names: Vec<Value> = names.map(|tool| tool["function"]["name"].clone()).collect();
        (names, sent["tool_choice"].clone())
    };
    let allowed = |required| ToolChoice::Allowed {
        required,
        names: vec!["write".into()],
    };
    assert_eq!(
        sent(allowed(true)),
        (vec![json!("write")], json!("required"))
    );
    assert_eq!(sent(allowed(false)), (vec![json!("write")], json!("auto")));
    let all = vec![json!("run"), json!("write")];
    assert_eq!(sent(ToolChoice::None), (all, json!("none")));
}

#[test]
fn a_request_over_its_limit_is_refused() {
    let options = CerebrasOptions {
        request_bytes_max: 1_024,
        ..options()
    };
    let long = format!("{{\"role\":\"user\",\"content\":\"{}\"", "x".repeat(1_024));
    let prompt = prompt(Settings::default(), vec![message(&long, None)]);
    let refused = parts(&options, &Written::new(), &prompt);
    assert!(matches!(refused, Err(BackendError::Refused { .. })));
}
