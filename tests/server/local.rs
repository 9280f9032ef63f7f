//! A model that runs in the program: tiny, of random weights, and served like any other.

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
        ..TinyLlama::new(Family::Llama, tokens.vocab_size())
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
    assert!(model.is_default && model.keeps_cache && model.logprobs && !model.constrained_sampling);

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

#[tokio::test]
async fn what_it_cannot_do_is_refused_by_field() {
    let (_program, client, _dir) = start().await;
    let mut talk = client.stream().await;
    let mut strict = say("hello");
    let Some(proto::tool::Tool::Function(function)) = &mut strict.tools[0].tool else {
        unreachable!()
    };
    function.strict = true;
    let required = proto::ToolChoice {
        choice: Some(proto::tool_choice::Choice::Mode(
            proto::ToolChoiceMode::Required.into(),
        )),
    };
    let json = proto::TextFormat {
        format: Some(proto::text_format::Format::JsonObject(proto::JsonObject {})),
    };
    for (create, param) in [
        (strict, "create.tools[0].function.strict"),
        (
            proto::Create {
                tool_choice: Some(required),
                ..say("hello")
            },
            "create.tool_choice",
        ),
        (
            proto::Create {
                text: Some(json),
                ..say("hello")
            },
            "create.text",
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
    talk.close().await;
}
