//! The whole server over engines that come and go.

use std::time::Duration;

use hotloop::{
    backend::gpu::DialectChoice,
    files::{BuiltIn, Files},
    model::Artifacts,
    proto::{Create, GetModelRequest, RerenderReason, ResponseStatus, connect_response::Event},
};

use crate::{
    client::{Client, Round, after, user},
    fake::{Act, Asked, Facts, Fake},
    program::{NEVER, Serve, reconfigure},
};

/// The directory of the text side that the simulated model has.
fn text_side() -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/sim");
    path.to_str().unwrap().to_owned()
}

struct Engines {
    artifacts: Artifacts,
}

impl Engines {
    fn new() -> Self {
        let files = Files::BuiltIn(BuiltIn::SimAgent);
        let artifacts = Artifacts::load(&files, None).unwrap();
        Self { artifacts }
    }

    fn facts(&self) -> Facts {
        Facts {
            context_length: 100_000,
            vocab_size: u32::try_from(self.artifacts.tokenizer.vocab_size()).unwrap(),
            end_token: self.artifacts.end_tokens[0],
        }
    }

    /// A model that says words, each by all tokens before it: who goes on with a sample must have
    /// exactly those. Eleven words an answer, however often it is gone on with.
    fn words(&self) -> impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static {
        let words: Vec<u32> = (0..u32::try_from(self.artifacts.tokenizer.vocab_size()).unwrap())
            .filter(|id| {
                let bytes = self.artifacts.tokenizer.bytes_of(*id);
                bytes.len() > 2 && bytes.iter().all(u8::is_ascii_lowercase)
            })
            .collect();
        let end = self.artifacts.end_tokens[0];
        move |asked| {
            let mut ids = asked.ids.clone();
            let mut acts = Vec::new();
            // An answer begins behind the last token that is no word.
            let said = ids.iter().rev().take_while(|id| words.contains(id)).count();
            for _ in said..11 {
                let sum = ids
                    .iter()
                    .fold(7u32, |sum, id| sum.wrapping_mul(31).wrapping_add(*id));
                let next = words[sum as usize % words.len()];
                ids.push(next);
                acts.push(Act::Tokens(vec![next]));
                acts.push(Act::Pause(Duration::from_millis(20)));
            }
            acts.extend([Act::Tokens(vec![end]), Act::End("stop")]);
            acts
        }
    }

    async fn start(&self, dialect: DialectChoice) -> Fake {
        Fake::start(dialect, self.facts(), self.words()).await
    }
}

fn gpu(fake: &Fake) -> String {
    format!("[[model.gpu]]\nurl = \"{}\"\nhealth_ms = 50\n", fake.url())
}

fn model(name: &str, more: &str) -> String {
    format!(
        "[[model]]\nname = \"{name}\"\npath = \"{}\"\n{more}\n",
        text_side()
    )
}

fn ask(model: &str, text: &str) -> Create {
    Create {
        model: Some(model.into()),
        temperature: Some(0.0),
        input: vec![user(text)],
        ..Create::default()
    }
}

fn fingerprint(round: &Round) -> String {
    round.done.prompt.clone().unwrap().fingerprint
}

/// Whichever of two engines has the conversation is killed while it samples, at many places: the
/// client sees a whole answer, with the tokens that one engine alone gives.
#[tokio::test]
async fn a_killed_engine_is_not_seen() {
    let engines = Engines::new();
    let alone = engines.start(DialectChoice::Vllm).await;
    let mut pair = vec![
        engines.start(DialectChoice::Engine).await,
        engines.start(DialectChoice::Sglang).await,
    ];
    let config = model("alone", &format!("default = true\n{}", gpu(&alone)))
        + &model("pair", &pair.iter().map(gpu).collect::<String>());
    let program = Serve::with_config(&config).start().await;
    let client = Client::of(&program).await;
    let mut rollouts = Vec::new();
    for name in ["alone", "pair"] {
        let mut talk = client.stream().await;
        let mut said: Vec<Round> = Vec::new();
        for step in 0..4 {
            let text = format!("question {step}");
            let create = match said.last() {
                None => ask(name, &text),
                Some(before) => after(&before.response_id, vec![user(&text)]),
            };
            talk.create(create).await;
            let mut messages = Vec::new();
            if (name, step) == ("pair", 2) {
                let is_text = |event: &Event| matches!(event, Event::OutputTextDelta(_));
                for _ in 0..3 {
                    messages.extend(talk.until("", is_text).await);
                }
                let serving = pair
                    .iter()
                    .position(|fake| !fake.asked().is_empty())
                    .unwrap();
                drop(pair.remove(serving));
            }
            messages.extend(
                talk.until("", |event| matches!(event, Event::Done(_)))
                    .await,
            );
            said.push(Round::of(messages));
        }
        talk.close().await;
        rollouts.push(said);
    }
    for (step, (alone, pair)) in rollouts[0].iter().zip(&rollouts[1]).enumerate() {
        assert_eq!(pair.done.status(), ResponseStatus::Completed, "step {step}");
        assert_eq!(pair.text, alone.text, "step {step}");
        assert_eq!(fingerprint(pair), fingerprint(alone), "step {step}");
        let tokens = |round: &Round| round.done.usage.unwrap().output_tokens;
        assert_eq!((tokens(pair), tokens(alone)), (12, 12), "step {step}");
        assert!(step == 0 || pair.done.prompt.clone().unwrap().extends_previous);
    }
    // The other one went on from the third word, and then had the conversation.
    assert_eq!(pair[0].asked().len(), 2);
    // Whoever asks is told of both.
    let told = async {
        loop {
            let request = client.ask(GetModelRequest {
                name: "pair".into(),
            });
            let model = client
                .models()
                .get_model(request)
                .await
                .unwrap()
                .into_inner();
            let replicas = model.model.unwrap().replicas;
            let well = replicas.iter().filter(|replica| replica.healthy).count();
            if (replicas.len(), well) == (2, 1) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(NEVER, told)
        .await
        .expect("the dead one is never told of");
}

/// Where nothing samples from a model its fallback does: rendered anew only where its tokenizer is
/// another, and `done` says which model it was and whether.
#[tokio::test]
async fn a_fallback_takes_over_and_done_says_so() {
    let engines = Engines::new();
    let first = Fake::start(DialectChoice::Engine, engines.facts(), |_| {
        vec![Act::Fail(tonic::Status::unavailable("full"))]
    })
    .await;
    let second = engines.start(DialectChoice::Engine).await;
    let config = model(
        "busy",
        &format!("default = true\nfallback = \"same\"\n{}", gpu(&first)),
    ) + &model("same", &gpu(&second))
        + &model(
            "gone",
            "context_length = 4096\nfallback = \"other\"\n[[model.gpu]]\nurl = \"http://127.0.0.1:1\"\n",
        )
        + "[[model]]\nname = \"other\"\n";
    let program = Serve::with_config(&config).start().await;
    let client = Client::of(&program).await;
    let mut talk = client.stream().await;

    // It is there, and refuses at the last moment.
    let round = talk.answer(ask("busy", "hello")).await;
    assert_eq!(round.done.model, "same");
    let Some(Event::Created(created)) = &round.messages[0].event else {
        panic!("{round:?}")
    };
    assert_eq!(created.model, "busy");
    let prompt = round.done.prompt.clone().unwrap();
    assert_eq!(prompt.rerender_reason(), RerenderReason::Unspecified);
    let usage = round.done.usage.unwrap();
    assert_eq!((usage.samples, usage.input_tokens), (1, prompt.tokens));
    // The conversation goes on, and nothing of it is encoded again.
    let next = talk
        .answer(after(&round.response_id, vec![user("and now?")]))
        .await;
    assert_eq!(next.done.model, "same");
    assert!(next.done.prompt.clone().unwrap().extends_previous);

    // The conversation moves to a model of which nothing is left, and from there to its fallback,
    // which has another tokenizer.
    let create = Create {
        model: Some("gone".into()),
        max_output_tokens: Some(8),
        ..after(&next.response_id, vec![user("What is this?")])
    };
    talk.create(create).await;
    let round = talk.round().await;
    assert_eq!(round.done.model, "other");
    let prompt = round.done.prompt.clone().unwrap();
    assert_eq!(prompt.rerender_reason(), RerenderReason::Model);
    assert!(prompt.dropped_tokens > 0 && round.done.usage.unwrap().output_tokens > 0);
    talk.close().await;
}

/// The same where the last moment comes with another tokenizer: what was rendered is rendered anew.
#[tokio::test]
async fn a_fallback_with_another_tokenizer_takes_over_at_the_last_moment() {
    let engines = Engines::new();
    let full = Fake::start(DialectChoice::Vllm, engines.facts(), |_| {
        vec![Act::Fail(tonic::Status::unavailable("full"))]
    })
    .await;
    let config = model(
        "busy",
        &format!("default = true\nfallback = \"other\"\n{}", gpu(&full)),
    ) + "[[model]]\nname = \"other\"\n";
    let program = Serve::with_config(&config).start().await;
    let client = Client::of(&program).await;
    let mut talk = client.stream().await;
    let short = |create: Create| Create {
        max_output_tokens: Some(8),
        ..create
    };
    talk.create(short(ask("busy", "hello"))).await;
    let moved = talk.round().await;
    assert_eq!(moved.done.model, "other");
    let prompt = moved.done.prompt.clone().unwrap();
    assert_eq!(prompt.rerender_reason(), RerenderReason::Model);
    talk.create(short(ask("other", "hello"))).await;
    let straight = talk.round().await;
    assert_eq!(fingerprint(&moved), fingerprint(&straight));
    let counted = |round: &Round| {
        let usage = round.done.usage.unwrap();
        (usage.input_tokens, usage.output_tokens, usage.samples)
    };
    assert_eq!(counted(&moved), counted(&straight));
    talk.close().await;
}

/// A warm-up has the engine's cache filled with what the first sample will need.
#[tokio::test]
async fn a_warm_up_reaches_the_engine() {
    let engines = Engines::new();
    let engine = engines.start(DialectChoice::Vllm).await;
    let config = model("m", &gpu(&engine));
    let program = Serve::with_config(&config).start().await;
    let client = Client::of(&program).await;
    let mut talk = client.stream().await;
    let warm = Create {
        generate: Some(false),
        instructions: Some("You are brief, and say only what was asked for. ".repeat(8)),
        ..ask("m", "hello")
    };
    talk.create(warm).await;
    let prepared = talk.round().await;
    let next = talk
        .answer(after(&prepared.response_id, vec![user("and?")]))
        .await;
    let asked = engine.asked();
    assert_eq!(asked.len(), 2);
    let [warm, real] = [&asked[0], &asked[1]];
    assert_eq!(warm.max_tokens, 1);
    assert!(real.ids.len() > warm.ids.len() && real.max_tokens > 1);
    // The prefix is the same but for the place where the answer would have begun.
    let same = warm
        .ids
        .iter()
        .zip(&real.ids)
        .take_while(|(a, b)| a == b)
        .count();
    assert!(
        same > 64 && same + 8 >= warm.ids.len(),
        "{same} of {}",
        warm.ids.len()
    );
    assert_eq!(next.done.usage.unwrap().samples, 1);
    talk.close().await;
}

/// A name that stands for several models keeps a conversation where it began, and a SIGHUP changes
/// what there is without ending anything.
#[tokio::test]
async fn names_stand_for_models_and_models_change_while_it_runs() {
    let engines = Engines::new();
    let (one, two) = (
        engines.start(DialectChoice::Vllm).await,
        engines.start(DialectChoice::Engine).await,
    );
    let alias = "[[alias]]\nname = \"agent\"\nto = [{ model = \"one\" }, { model = \"two\" }]\n";
    let config =
        model("one", &format!("default = true\n{}", gpu(&one))) + &model("two", &gpu(&two)) + alias;
    let program = Serve::with_config(&config).start().await;
    let client = Client::of(&program).await;
    let mut talk = client.stream().await;
    let mut seen = Vec::new();
    for _ in 0..12 {
        let first = talk.answer(ask("agent", "hello")).await;
        let next = talk
            .answer(after(&first.response_id, vec![user("more")]))
            .await;
        assert_eq!(next.done.model, first.done.model);
        seen.push(first);
    }
    let of = |name: &str| seen.iter().find(|round| round.done.model == name).unwrap();
    let (on_one, on_two) = (of("one"), of("two"));

    // `two` is taken out; who was on it goes on with what the name still stands for.
    let fewer = model("one", &format!("default = true\n{}", gpu(&one)))
        + "[[alias]]\nname = \"agent\"\nto = [{ model = \"one\" }]\n";
    reconfigure(&program, &fewer).await;
    program.says(&["the models were read anew"]).await;
    for before in [on_one, on_two] {
        let next = talk
            .answer(after(&before.response_id, vec![user("again")]))
            .await;
        assert_eq!(next.done.model, "one");
        assert!(next.done.prompt.clone().unwrap().extends_previous);
    }
    // What is wrong changes nothing.
    reconfigure(&program, "[[model]]\nname = \"x\"\nspeed = 1\n").await;
    program.says(&["models stay as they are"]).await;
    talk.answer(ask("agent", "hello")).await;
    talk.close().await;
}
