//! Models that run in the program: the one that is built in, and one of another family, of random
//! weights, that the test writes into a directory.

use std::{fs, path::Path};

use hotloop::proto::{
    self, OutputText, ResponseStatus, connect_response::Event, content_part, item,
};

use crate::{
    client::{Client, Round, after, say, user},
    program::{Program, Serve},
    tiny_llama::{Family, TinyLlama},
    vocab,
};

pub(crate) const TEMPLATE: &str = include_str!("../templates/chatml_tools.jinja");

pub(crate) fn tokenizer() -> &'static [u8] {
    vocab::qwen()
}

/// Writes a model directory.
fn write(dir: &Path) {
    let tokens = hotloop::tokenizer::Tokenizer::from_json(tokenizer()).unwrap();
    let model = TinyLlama {
        eos_token_ids: vec![tokens.token_id("<|im_end|>").unwrap()],
        ..TinyLlama::new(Family::Qwen3, tokens.vocab_size())
    };
    model.write(dir);
    fs::write(dir.join("tokenizer.json"), tokenizer()).unwrap();
    fs::write(dir.join("chat_template.jinja"), TEMPLATE).unwrap();
}

async fn start() -> (Program, Client, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("tiny");
    fs::create_dir(&model).unwrap();
    write(&model);
    let program = Serve::with_config("").model(&model).start().await;
    let client = Client::of(&program).await;
    (program, client, dir)
}

/// At most 16 tokens, always the likeliest.
fn ask(text: &str) -> proto::Create {
    proto::Create {
        tools: Vec::new(),
        max_output_tokens: Some(16),
        temperature: Some(0.0),
        ..say(text)
    }
}

fn tool(name: &str, parameters: &str) -> proto::Tool {
    proto::Tool {
        tool: Some(proto::tool::Tool::Function(proto::FunctionTool {
            name: name.into(),
            parameters: parameters.into(),
            ..Default::default()
        })),
    }
}

/// A server that was told of no model, and a task for the one that it has.
#[tokio::test]
async fn the_built_in_model_calls_a_tool_and_tells_its_output() {
    let program = Serve::with_config("").start().await;
    let client = Client::of(&program).await;
    let request = client.ask(proto::GetModelRequest {
        name: "tiny-agent".into(),
    });
    let answer = client.models().get_model(request).await.unwrap();
    let model = answer.into_inner().model.unwrap();
    assert_eq!(
        (model.is_default, &*model.backend, model.context_length),
        (true, "local", 2048)
    );
    assert!((1_000_000..5_000_000).contains(&model.parameters));
    assert!(model.appends_tool_outputs && model.appends_user_messages);

    let path = r#"{"type":"object","properties":{"path":{"type":"string"},"first_line":{"type":"integer"},"lines":{"type":"integer"}},"required":["path"]}"#;
    let pattern =
        r#"{"type":"object","properties":{"pattern":{"type":"string"}},"required":["pattern"]}"#;
    let mut talk = client.stream().await;
    talk.create(proto::Create {
        input: vec![user("What does plan.md say?")],
        tools: vec![tool("search", pattern), tool("read_file", path)],
        hold: true,
        ..proto::Create::default()
    })
    .await;
    let asked = talk.round().await;
    assert_eq!(asked.done.status(), ResponseStatus::AwaitingInput);
    let [call] = &asked.calls[..] else {
        panic!("{asked:?}")
    };
    assert_eq!(call.name, "read_file");
    assert!(call.arguments.contains("\"plan.md\""), "{call:?}");
    let output = proto::FunctionCallOutput {
        call_id: call.call_id.clone(),
        output: "# Garden\n\nPlant the tulips in spring, and water them.\n".into(),
    };
    let output = proto::Item {
        item: Some(item::Item::FunctionCallOutput(output)),
        ..Default::default()
    };
    talk.append(&asked.response_id, vec![output]).await;
    let told = talk.round().await;
    assert_eq!(told.done.status(), ResponseStatus::Completed);
    assert_eq!(
        told.text,
        "plan.md begins: # Garden\n\nPlant the tulips in spring, and water them."
    );
    // Only the output was new.
    let prompt = told.done.prompt.unwrap();
    assert!(
        prompt.extends_previous && prompt.encoded_tokens < 40,
        "{prompt:?}"
    );
    talk.close().await;
}

#[tokio::test]
async fn it_says_the_same_again_and_keeps_its_cache() {
    let (_program, client, _dir) = start().await;
    let request = client.ask(proto::GetModelRequest {
        name: "tiny".into(),
    });
    let model = client
        .models()
        .get_model(request)
        .await
        .unwrap()
        .into_inner()
        .model
        .unwrap();
    assert_eq!((&*model.backend, &*model.family), ("local", "hermes"));
    assert!(model.is_default && model.keeps_cache && model.logprobs && model.constrained_sampling);

    let mut talk = client.stream().await;
    let question = "Tell me a long story about bees, ants, wasps and all the others. ".repeat(8);
    let mut answers = Vec::new();
    for _ in 0..2 {
        talk.create(ask(&question)).await;
        let round = talk.round().await;
        let usage = round.done.usage.unwrap();
        assert!(usage.output_tokens <= 16, "{usage:?}");
        if usage.output_tokens == 16 {
            assert_eq!(round.done.status(), ResponseStatus::Incomplete);
        }
        answers.push(round);
    }
    assert_eq!(answers[0].text, answers[1].text);
    let fingerprint = |round: &Round| round.done.prompt.clone().unwrap().fingerprint;
    assert_eq!(fingerprint(&answers[0]), fingerprint(&answers[1]));

    // The settings are inherited, and the conversation's keys and values are still there.
    talk.create(after(&answers[0].response_id, vec![user("And then?")]))
        .await;
    let next = talk.round().await;
    let (usage, prompt) = (next.done.usage.unwrap(), next.done.prompt.unwrap());
    assert!(usage.cached_tokens > 0, "{usage:?}");
    assert!(
        prompt.extends_previous && prompt.reused_tokens > prompt.encoded_tokens,
        "{prompt:?}"
    );
    talk.close().await;
}

#[tokio::test]
async fn it_tells_how_likely_its_tokens_were() {
    let (_program, client, _dir) = start().await;
    let mut talk = client.stream().await;
    let create = proto::Create {
        top_logprobs: Some(3),
        ..ask("hello")
    };
    talk.create(create).await;
    let round = talk.round().await;
    let mut whole: Vec<OutputText> = Vec::new();
    let mut in_deltas = Vec::new();
    for message in &round.messages {
        match message.event.clone().unwrap() {
            Event::OutputTextDelta(delta) => in_deltas.extend(delta.logprobs),
            Event::OutputItemDone(done) => {
                if let Some(item::Item::Message(message)) = done.item.unwrap().item {
                    whole.extend(
                        message
                            .content
                            .into_iter()
                            .filter_map(|part| match part.part {
                                Some(content_part::Part::OutputText(text)) => Some(text),
                                _ => None,
                            }),
                    );
                }
            }
            _ => {}
        }
    }
    let logprobs: Vec<_> = whole.into_iter().flat_map(|text| text.logprobs).collect();
    assert!(!logprobs.is_empty(), "{round:?}");
    assert_eq!(logprobs, in_deltas);
    for token in &logprobs {
        assert_eq!(token.top.len(), 3, "{token:?}");
        // The likeliest is taken, and the likeliest come first.
        assert_eq!(
            (token.token_id, token.logprob),
            (token.top[0].token_id, token.top[0].logprob)
        );
        assert!(
            token.top.is_sorted_by(|a, b| a.logprob >= b.logprob),
            "{token:?}"
        );
        assert!(token.logprob <= 0.0);
    }
    talk.close().await;
}

/// Any tokens, but few: the model is as likely to say anything.
fn random(seed: u64) -> proto::Create {
    proto::Create {
        max_output_tokens: Some(400),
        temperature: Some(1.0),
        seed: Some(seed),
        ..say("hello")
    }
}

fn json_schema(schema: &str) -> Option<proto::TextFormat> {
    let schema = proto::JsonSchema {
        name: "answer".into(),
        schema: schema.into(),
        strict: true,
    };
    Some(proto::TextFormat {
        format: Some(proto::text_format::Format::JsonSchema(schema)),
    })
}

fn required() -> Option<proto::ToolChoice> {
    Some(proto::ToolChoice {
        choice: Some(proto::tool_choice::Choice::Mode(
            proto::ToolChoiceMode::Required.into(),
        )),
    })
}

fn strict(name: &str, parameters: &str) -> proto::Tool {
    let mut strict = tool(name, parameters);
    if let Some(proto::tool::Tool::Function(function)) = &mut strict.tool {
        function.strict = true;
    }
    strict
}

/// Thinking has no end of its own in a model that knows nothing.
fn without_thinking(create: proto::Create) -> proto::Create {
    let tokens = hotloop::tokenizer::Tokenizer::from_json(tokenizer()).unwrap();
    let never = |text| (tokens.token_id(text).unwrap(), -100.0);
    proto::Create {
        logit_bias: [never("<think>")].into(),
        ..create
    }
}

const ANSWER: &str = r#"{"type": "object", "properties": {"sure": {"type": "boolean"},
    "names": {"type": "array", "items": {"enum": ["bee", "ant"]}, "maxItems": 3}},
    "required": ["sure", "names"], "additionalProperties": false}"#;

fn is_answer(json: &str) -> bool {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "it is read for its shape")]
    struct Answer {
        sure: bool,
        names: Vec<Name>,
    }
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Name {
        Bee,
        Ant,
    }
    serde_json::from_str::<Answer>(json).is_ok_and(|answer| answer.names.len() <= 3)
}

#[tokio::test]
async fn it_keeps_to_a_schema_in_text_and_in_calls() {
    let (_program, client, _dir) = start().await;
    let mut talk = client.stream().await;
    for seed in 0..3 {
        let in_text = proto::Create {
            tools: Vec::new(),
            text: json_schema(ANSWER),
            ..without_thinking(random(seed))
        };
        talk.create(in_text).await;
        let round = talk.round().await;
        assert_eq!(round.done.status(), ResponseStatus::Completed, "{round:?}");
        assert!(is_answer(&round.text), "{}", round.text);

        // It holds for the next step as well, of which this is a fork each time.
        for _ in 0..2 {
            talk.create(after(&round.response_id, vec![user("again")]))
                .await;
            let again = talk.round().await;
            assert!(is_answer(&again.text), "{}", again.text);
        }

        let in_calls = proto::Create {
            tools: vec![strict("step", ANSWER)],
            tool_choice: required(),
            parallel_tool_calls: Some(false),
            ..without_thinking(random(seed))
        };
        talk.create(in_calls).await;
        let round = talk.round().await;
        assert_eq!(round.done.status(), ResponseStatus::Completed, "{round:?}");
        let [call] = &round.calls[..] else {
            panic!("{round:?}");
        };
        assert_eq!((&*call.name, &*round.text), ("step", ""));
        assert!(is_answer(&call.arguments), "{}", call.arguments);
    }
    talk.close().await;
}

#[tokio::test]
async fn what_it_cannot_do_is_refused_by_field() {
    let (_program, client, _dir) = start().await;
    let mut talk = client.stream().await;
    let bad = r#"{"not": {"type": "string"}}"#;
    for (create, param) in [
        (
            proto::Create {
                tools: vec![strict("fine", ANSWER), strict("bad", bad)],
                ..say("hello")
            },
            "create.tools[1].function.parameters",
        ),
        (
            proto::Create {
                text: json_schema(bad),
                ..say("hello")
            },
            "create.text.json_schema.schema",
        ),
        (
            proto::Create {
                tools: Vec::new(),
                tool_choice: required(),
                ..say("hello")
            },
            "create.tool_choice",
        ),
    ] {
        let sent = talk.create(create).await;
        let refusal = talk.refusal(&sent).await;
        assert_eq!(
            (&*refusal.code, &*refusal.param),
            ("invalid_request", param)
        );
    }
    let sent = talk.create(ask(&"word ".repeat(5000))).await;
    let refusal = talk.refusal(&sent).await;
    assert_eq!(refusal.code, "context_length_exceeded", "{refusal:?}");
    // The stream goes on.
    talk.create(ask("hello")).await;
    assert!(talk.round().await.done.usage.unwrap().output_tokens > 0);
    talk.close().await;
}
