//! Rollouts through vLLM, held against the same model in this process.
//!
//! What vLLM said once was kept (`tape.rs`) and is played in every run of the tests. `tests/vllm/run.sh` starts a real
//! one and runs the same against it.

use std::path::{Path, PathBuf};

use hotloop::proto::{
    self, Create, FunctionCallOutput, FunctionTool, Item, ResponseStatus, TextFormat, Tool,
    connect_response::Event, item, text_format, tool,
};

use crate::{
    client::{Client, Round, after, user},
    program::{Program, Serve},
    tape::Tape,
};

/// A dialect that vLLM speaks.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Dialect {
    Vllm,
    Engine,
}

impl Dialect {
    fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Engine => "engine",
        }
    }

    fn tape(self) -> PathBuf {
        let tapes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/engines/tapes");
        tapes.join(format!("{}.json", self.name()))
    }

    /// Where the real one listens.
    fn real(self) -> Option<std::net::SocketAddr> {
        let variable = match self {
            Self::Vllm => "HOTLOOP_TEST_VLLM",
            Self::Engine => "HOTLOOP_TEST_ENGINE",
        };
        Some(std::env::var(variable).ok()?.parse().unwrap())
    }
}

/// A server with the built-in model twice: in the engine at this place, and in its own process.
async fn serve(engine: std::net::SocketAddr) -> Program {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-agent");
    let path = model.to_str().unwrap();
    let config = format!(
        r#"
        [[model]]
        name = "engine"
        default = true
        path = "{path}"
        [[model.gpu]]
        url = "http://{engine}"
        constrained = "lark"
        # Prefills would come at other times than on the tape.
        prefill = false
        [[model]]
        name = "local"
        path = "{path}"
        "#
    );
    Serve::with_config(&config).start().await
}

fn function(name: &str, parameters: &str, strict: bool) -> Tool {
    Tool {
        tool: Some(tool::Tool::Function(FunctionTool {
            name: name.into(),
            parameters: parameters.into(),
            strict,
            ..Default::default()
        })),
    }
}

fn tools(strict: bool) -> Vec<Tool> {
    let path = r#"{"type":"object","properties":{"path":{"type":"string"},"first_line":{"type":"integer"},"lines":{"type":"integer"}},"required":["path"],"additionalProperties":false}"#;
    let pattern = r#"{"type":"object","properties":{"pattern":{"type":"string"}},"required":["pattern"],"additionalProperties":false}"#;
    vec![
        function("list_files", pattern, strict),
        function("read_file", path, strict),
        function("search", pattern, strict),
    ]
}

/// Instructions that fill a block of the engine's cache with what all steps begin with.
const INSTRUCTIONS: &str = "You help with files. Read a file before you tell what it says, search where you do not \
    know where something stands, and tell what a tool said in its own words. Do not guess what a file says.";

/// A rollout of this many steps: questions, each with a call and its output. The next step is sent
/// whatever the model said, so that both models are asked the same.
async fn rollout(client: &Client, model: &str, steps: usize) -> Vec<Round> {
    let mut talk = client.stream().await;
    let mut rounds: Vec<Round> = Vec::new();
    for step in 0..steps {
        let input = match rounds.last() {
            Some(before) if !before.calls.is_empty() => {
                let output = |call: &proto::FunctionCall| Item {
                    item: Some(item::Item::FunctionCallOutput(FunctionCallOutput {
                        call_id: call.call_id.clone(),
                        output: format!("line {step}\n"),
                    })),
                    ..Default::default()
                };
                before.calls.iter().map(output).collect()
            }
            _ => vec![user(&format!("What does file{step}.md say?"))],
        };
        let create = match rounds.last() {
            None => Create {
                model: Some(model.into()),
                instructions: Some(INSTRUCTIONS.into()),
                tools: tools(false),
                temperature: Some(0.0),
                max_output_tokens: Some(48),
                top_logprobs: Some(2),
                input,
                ..Create::default()
            },
            Some(before) => after(&before.response_id, input),
        };
        talk.create(create).await;
        rounds.push(talk.round().await);
    }
    talk.close().await;
    rounds
}

fn fingerprint(round: &Round) -> String {
    round.done.prompt.clone().unwrap().fingerprint
}

/// The log probabilities of the tokens of its text.
fn logprobs(round: &Round) -> Vec<(u32, f32)> {
    let deltas = round
        .messages
        .iter()
        .filter_map(|message| match &message.event {
            Some(Event::OutputTextDelta(delta)) => Some(&delta.logprobs),
            _ => None,
        });
    deltas
        .flatten()
        .map(|it| (it.token_id, it.logprob))
        .collect()
}

/// Greedy decoding gives the same tokens in the engine as in this process, at every step, and the
/// engine has the past in its cache from the second step on.
async fn a_rollout_is_the_same(client: &Client, steps: usize) {
    let (engine, local) = (
        rollout(client, "engine", steps).await,
        rollout(client, "local", steps).await,
    );
    let mut cached = Vec::new();
    for (step, (engine, local)) in engine.iter().zip(&local).enumerate() {
        assert_eq!(engine.done.status(), local.done.status(), "step {step}");
        assert_eq!(
            (&engine.text, engine.calls.len()),
            (&local.text, local.calls.len())
        );
        assert_eq!(fingerprint(engine), fingerprint(local), "step {step}");
        let (theirs, ours) = (logprobs(engine), logprobs(local));
        assert_eq!(theirs.len(), ours.len(), "step {step}");
        for (theirs, ours) in theirs.iter().zip(&ours) {
            assert!(
                theirs.0 == ours.0 && (theirs.1 - ours.1).abs() < 1e-3,
                "{theirs:?} {ours:?}"
            );
        }
        let prompt = engine.done.prompt.clone().unwrap();
        assert!(step == 0 || prompt.extends_previous);
        cached.push(engine.done.usage.unwrap().cached_tokens);
    }
    println!("cached tokens by step: {cached:?}");
    assert!(cached[1..].iter().all(|tokens| *tokens > 0), "{cached:?}");
    assert!(
        cached.windows(2).skip(1).all(|pair| pair[0] <= pair[1]),
        "{cached:?}"
    );
    assert!(cached.last() > cached.get(1), "{cached:?}");
}

/// A prompt that fills most of the context is taken, and one that is longer is refused here.
async fn long_prompts_are_taken(client: &Client) {
    let mut talk = client.stream().await;
    let ask = |words: usize| Create {
        temperature: Some(0.0),
        max_output_tokens: Some(8),
        input: vec![user(&"tea ".repeat(words))],
        ..Create::default()
    };
    talk.create(ask(600)).await;
    let round = talk.round().await;
    let tokens = round.done.prompt.clone().unwrap().tokens;
    assert!((1_500..2_048).contains(&tokens), "{tokens}");
    assert!(round.done.usage.unwrap().output_tokens > 0);
    let request = talk.create(ask(1_000)).await;
    let error = talk.refusal(&request).await;
    assert_eq!(error.code, "context_length_exceeded");
    talk.close().await;
}

/// What is cancelled stops, and what is asked next is answered.
async fn a_cancelled_sample_stops(client: &Client) {
    let mut talk = client.stream().await;
    talk.create(Create {
        temperature: Some(0.0),
        // It has much to say, since it may not end.
        logit_bias: [(1021, -100.0)].into(),
        max_output_tokens: Some(1_500),
        input: vec![user("Tell me a story.")],
        ..Create::default()
    })
    .await;
    let begun = talk
        .until("", |event| matches!(event, Event::OutputTextDelta(_)))
        .await;
    talk.cancel(&begun[0].response_id).await;
    let rest = talk
        .until("", |event| matches!(event, Event::Done(_)))
        .await;
    let Some(Event::Done(done)) = &rest.last().unwrap().event else {
        panic!("{rest:?}")
    };
    assert_eq!(done.status(), ResponseStatus::Cancelled);
    assert!(done.usage.unwrap().output_tokens < 1_500);
    talk.create(Create {
        temperature: Some(0.0),
        max_output_tokens: Some(4),
        input: vec![user("And now?")],
        ..Create::default()
    })
    .await;
    assert!(talk.round().await.done.usage.unwrap().output_tokens > 0);
    talk.close().await;
}

/// A model this small writes white space between two parts of JSON for as long as it may. It may not.
fn no_white_space() -> std::collections::HashMap<u32, f32> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-agent");
    let vocabulary = std::fs::read(model.join("tokenizer.json")).unwrap();
    let tokenizer = hotloop::tokenizer::Tokenizer::from_json(&vocabulary).unwrap();
    let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap();
    ids.filter(|id| tokenizer.bytes_of(*id).iter().all(u8::is_ascii_whitespace))
        .map(|id| (id, -100.0))
        .collect()
}

/// Schemas and strict tools hold, whatever the model would say by itself.
async fn constraints_hold(client: &Client) {
    let mut talk = client.stream().await;
    let schema = r#"{"type":"object","properties":{"name":{"type":"string","maxLength":8},"count":{"type":"integer","minimum":0,"maximum":9}},"required":["name","count"],"additionalProperties":false}"#;
    talk.create(Create {
        temperature: Some(0.0),
        max_output_tokens: Some(100),
        logit_bias: no_white_space(),
        text: Some(TextFormat {
            format: Some(text_format::Format::JsonSchema(proto::JsonSchema {
                name: "fruit".into(),
                schema: schema.into(),
                strict: true,
            })),
        }),
        input: vec![user("How many apples?")],
        ..Create::default()
    })
    .await;
    let round = talk.round().await;
    let value: serde_json::Value = serde_json::from_str(&round.text).unwrap();
    assert!(value["name"].is_string() && (0..10).contains(&value["count"].as_i64().unwrap()));

    talk.create(Create {
        temperature: Some(0.0),
        max_output_tokens: Some(100),
        logit_bias: no_white_space(),
        tools: tools(true),
        tool_choice: Some(proto::ToolChoice {
            choice: Some(proto::tool_choice::Choice::Mode(
                proto::ToolChoiceMode::Required.into(),
            )),
        }),
        input: vec![user("hello")],
        ..Create::default()
    })
    .await;
    let round = talk.round().await;
    assert!(!round.calls.is_empty(), "{round:?}");
    for call in &round.calls {
        let arguments: serde_json::Value = serde_json::from_str(&call.arguments).unwrap();
        let required = if call.name == "read_file" {
            "path"
        } else {
            "pattern"
        };
        assert!(arguments[required].is_string(), "{call:?}");
    }
    talk.close().await;
}

/// Everything, in an order that a tape can be played in.
async fn all(engine: std::net::SocketAddr, steps: usize) {
    let program = serve(engine).await;
    let client = Client::of(&program).await;
    a_rollout_is_the_same(&client, steps).await;
    long_prompts_are_taken(&client).await;
    a_cancelled_sample_stops(&client).await;
    constraints_hold(&client).await;
}

/// How many steps a rollout on tape has.
const STEPS_ON_TAPE: usize = 8;

#[tokio::test]
async fn vllm_as_it_answered_once() {
    let tape = Tape::read(&Dialect::Vllm.tape());
    all(tape.play().await, STEPS_ON_TAPE).await;
}

#[tokio::test]
async fn the_engine_as_it_answered_once() {
    let tape = Tape::read(&Dialect::Engine.tape());
    all(tape.play().await, STEPS_ON_TAPE).await;
}

/// The same against the real ones, with a rollout of 30 steps; their answers are kept where
/// HOTLOOP_TEST_RECORD is set.
#[tokio::test]
#[ignore = "needs a real vLLM: tests/vllm/run.sh"]
async fn vllm_as_it_answers_now() {
    for dialect in [Dialect::Vllm, Dialect::Engine] {
        let Some(engine) = dialect.real() else {
            panic!("no address of the dialect {}", dialect.name());
        };
        println!("dialect {}", dialect.name());
        if std::env::var_os("HOTLOOP_TEST_RECORD").is_some() {
            let tape = Tape::default();
            all(tape.record(engine).await, STEPS_ON_TAPE).await;
            tape.write(&dialect.tape());
        } else {
            all(engine, 30).await;
        }
    }
}

/// Two real engines serve one model, each in its dialect. The one that has the conversation is killed
/// while it samples: the client sees no error, and the tokens that the model in this process gives.
#[tokio::test]
#[ignore = "needs a real vLLM: tests/vllm/run.sh"]
async fn a_real_engine_is_killed() {
    let engines = [Dialect::Vllm, Dialect::Engine];
    let tapes = [Tape::default(), Tape::default()];
    let mut urls = Vec::new();
    for (dialect, tape) in engines.iter().zip(&tapes) {
        let proxy = tape.record(dialect.real().unwrap()).await;
        urls.push(format!("[[model.gpu]]\nurl = \"http://{proxy}\"\n"));
    }
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-agent");
    let path = model.to_str().unwrap();
    let config = format!(
        "[[model]]\nname = \"engines\"\ndefault = true\npath = \"{path}\"\n{}\n\
         [[model]]\nname = \"local\"\npath = \"{path}\"\n",
        urls.concat()
    );
    let program = Serve::with_config(&config).start().await;
    let client = Client::of(&program).await;

    let ask = |model: &str| Create {
        model: Some(model.into()),
        temperature: Some(0.0),
        // It has much to say, since it may not end.
        logit_bias: [(1021, -100.0)].into(),
        max_output_tokens: Some(64),
        ..Create::default()
    };
    let mut rounds = Vec::new();
    for model in ["engines", "local"] {
        let mut talk = client.stream().await;
        let mut said: Vec<Round> = Vec::new();
        for step in 0..8 {
            let input = vec![user(&format!("Tell me story {step}."))];
            let create = match said.last() {
                None => Create {
                    input,
                    ..ask(model)
                },
                Some(before) => after(&before.response_id, input),
            };
            let begun = std::time::Instant::now();
            talk.create(create).await;
            let mut messages = Vec::new();
            if model == "engines" && step == 4 {
                let is_text = |event: &Event| matches!(event, Event::OutputTextDelta(_));
                messages = talk.until("", is_text).await;
                let serving = tapes.iter().position(|tape| tape.has_samples()).unwrap();
                kill(engines[serving]).await;
                println!(
                    "step {step}: killed the engine with the dialect {}",
                    engines[serving].name()
                );
            }
            messages.extend(
                talk.until("", |event| matches!(event, Event::Done(_)))
                    .await,
            );
            let round = Round::of(messages);
            println!("{model} step {step}: {:?}", begun.elapsed());
            said.push(round);
        }
        talk.close().await;
        rounds.push(said);
    }
    let (there, here) = (&rounds[0], &rounds[1]);
    for (there, here) in there.iter().zip(here) {
        assert_eq!(there.text, here.text);
        assert_eq!(fingerprint(there), fingerprint(here));
        assert_eq!(there.done.usage.unwrap().output_tokens, 64);
    }
}

/// Kills the engine and all of its processes, as a machine that loses power would.
async fn kill(dialect: Dialect) {
    let variable = match dialect {
        Dialect::Vllm => "HOTLOOP_TEST_VLLM_PID",
        Dialect::Engine => "HOTLOOP_TEST_ENGINE_PID",
    };
    let group = format!("-{}", std::env::var(variable).unwrap());
    let mut command = tokio::process::Command::new("kill");
    let killed = command.args(["-9", "--", &group]).status().await.unwrap();
    assert!(killed.success());
}
