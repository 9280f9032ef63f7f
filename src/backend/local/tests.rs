//! The engine as others see it: prompts in, chunks out.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use futures::executor::block_on;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tempfile::TempDir;

use super::{kv::KvLayout, *};
use crate::{
    backend::{Chunk, SampleEnd, Sampling},
    item::{ResponseId, TokenLogprob},
    ledger::{Draft, Rope},
};

#[path = "../../../tests/support/tiny_llama.rs"]
pub(super) mod tiny_llama;

use tiny_llama::{FAMILIES, Family, TinyLlama, safetensors};

const VOCAB: u32 = 60;
const BLOCK_TOKENS: usize = 8;

/// The whole of an answer.
#[derive(Debug, PartialEq)]
pub(super) struct Whole {
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    cached: u32,
    finish: SampleEnd,
}

pub(super) fn read(chunks: Chunks) -> Result<Whole, BackendError> {
    let chunks: Vec<Result<Chunk, BackendError>> = block_on(chunks.collect());
    let chunks = chunks.into_iter().collect::<Result<Vec<_>, _>>()?;
    let (last, before) = chunks.split_last().unwrap();
    assert!(before.iter().all(|chunk| chunk.finish.is_none()));
    assert!(
        chunks[1..]
            .iter()
            .all(|chunk| chunk.cached_tokens.is_none())
    );
    Ok(Whole {
        tokens: chunks
            .iter()
            .flat_map(|chunk| chunk.tokens.clone())
            .collect(),
        logprobs: chunks
            .iter()
            .flat_map(|chunk| chunk.logprobs.clone())
            .collect(),
        cached: chunks[0].cached_tokens.unwrap(),
        finish: last.finish.unwrap(),
    })
}

pub(super) fn prompt_of(affinity: &str, tokens: &Rope, sampling: Sampling) -> Prompt {
    Prompt {
        response_id: ResponseId::default(),
        tenant: "one".into(),
        affinity: affinity.into(),
        tokens: tokens.clone(),
        recent: Vec::new(),
        chat: None,
        sampling,
    }
}

pub(super) fn rope(from: &Rope, ids: impl IntoIterator<Item = u32>) -> Rope {
    from.with_rendered(Draft {
        ids: ids.into_iter().collect(),
        ..Draft::default()
    })
}

/// What the tests compute on: the accelerator that they were built for, where there is one.
pub(super) fn device() -> Device {
    DeviceChoice::Auto.open().unwrap()
}

/// The model in a directory, and the layout of its keys and values in blocks of so many tokens.
pub(super) fn load(dir: &Path, block_tokens: usize) -> (Model, KvLayout) {
    let (config, weights) = Weights::open(&dir.into(), &device()).unwrap();
    let layout = config.kv_layout(block_tokens, weights.dtype());
    (Model::new(&config, weights, &device()).unwrap(), layout)
}

fn model(family: Family) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    TinyLlama::new(family, VOCAB as usize).write(dir.path());
    dir
}

fn options() -> LocalOptions {
    LocalOptions {
        block_tokens: Some(BLOCK_TOKENS),
        prefill_tokens_max: Some(16),
        ..LocalOptions::new("tiny".into())
    }
}

fn sample(local: &Local, affinity: &str, tokens: &Rope, sampling: Sampling) -> Whole {
    read(local.sample(prompt_of(affinity, tokens, sampling))).unwrap()
}

fn failure(local: &Local, tokens: &Rope) -> String {
    let chunks = local.sample(prompt_of("a", tokens, Sampling::greedy(5)));
    read(chunks).unwrap_err().to_string()
}

/// Where the two likeliest tokens lie further apart, no rounding changes which one is taken: that
/// is less than a tenth of this, as `model.rs` measures, whatever shares a pass and into whatever
/// pieces a prompt is cut.
const APART: f32 = 1e-4;

/// The likeliest tokens, with what tells that no rounding could have chosen others.
fn likeliest(max_tokens: u32) -> Sampling {
    Sampling {
        top_logprobs: Some(2),
        ..Sampling::greedy(max_tokens)
    }
}

/// How many tokens, from the first on, no rounding could have changed.
fn certain(answer: &Whole) -> usize {
    let apart = |token: &&TokenLogprob| token.top[0].1 - token.top[1].1 > APART;
    answer.logprobs.iter().take_while(apart).count()
}

fn some_tokens(random: &mut StdRng, count_max: usize) -> Vec<u32> {
    let count = random.random_range(1..=count_max);
    (0..count).map(|_| random.random_range(0..VOCAB)).collect()
}

/// Random rollouts that fork, with input that comes early and several samples at a time: with
/// whatever the cache holds, and however little that is, the answers are those of an engine that
/// computes every prompt anew and alone, as far as rounding allows to say so.
#[test]
fn the_cache_changes_no_answer() {
    const STEPS: usize = 16;
    for family in FAMILIES {
        let dir = model(family);
        let load = |cache_bytes_max| {
            let options = LocalOptions {
                cache_bytes_max,
                ..options()
            };
            Local::load(dir.path(), options).unwrap()
        };
        let (_, layout) = self::load(dir.path(), BLOCK_TOKENS);
        let block = Pool::new(layout, &device()).block_bytes();
        let cold = load(0);
        for blocks in [12, 1000] {
            let warm = load(blocks * block);
            let mut random = StdRng::seed_from_u64(blocks as u64);
            let mut conversations = vec![Rope::default()];
            let (mut cached, mut prompted, mut longest, mut compared) = (0, 0, 0, 0);
            for _ in 0..STEPS {
                let newest = conversations.len() - 1;
                let mut early = Vec::new();
                let mut answers = Vec::new();
                for _ in 0..2 {
                    // Mostly the newest, so that rollouts become long.
                    let from = match random.random_bool(0.7) {
                        true => newest,
                        false => random.random_range(0..=newest),
                    };
                    let affinity = ["a", "b"][random.random_range(0..2)];
                    let appended = rope(&conversations[from], some_tokens(&mut random, 15));
                    let prefill = warm.prefill(prompt_of(affinity, &appended, Sampling::greedy(1)));
                    match random.random_bool(0.5) {
                        true => assert_eq!(block_on(prefill), Ok(())),
                        // Still under way when the sample comes.
                        false => early.push(prefill),
                    }
                    let whole = rope(&appended, some_tokens(&mut random, 15));
                    let prompt = prompt_of(affinity, &whole, likeliest(8));
                    answers.push((prompt.clone(), warm.sample(prompt)));
                }
                for (prompt, answer) in answers {
                    let answer = read(answer).unwrap();
                    let anew = read(cold.sample(prompt.clone())).unwrap();
                    let certain = certain(&anew);
                    assert_eq!(answer.tokens[..certain], anew.tokens[..certain]);
                    assert_eq!(anew.cached, 0);
                    compared += certain;
                    cached += answer.cached as usize;
                    prompted += prompt.tokens.len_tokens();
                    longest = longest.max(prompt.tokens.len_tokens());
                    conversations.push(prompt.tokens.with_sampled(Draft {
                        ids: answer.tokens,
                        ..Draft::default()
                    }));
                }
                for prefill in early {
                    assert_eq!(block_on(prefill), Ok(()));
                }
            }
            assert!(cached > 0 && cached < prompted);
            // Two answers a step of eight tokens each, and next to no ties.
            assert!(compared * 10 >= STEPS * 2 * 8 * 9, "{compared}");
            // The small budget does not hold the longest rollout, let alone its forks.
            assert!(longest > 12 * BLOCK_TOKENS, "{longest}");
        }
    }
}

/// Whichever samples are under way at once, and however far each of them is, every one gets the
/// tokens that it gets alone, as far as rounding allows to say so.
#[test]
fn company_changes_no_answer() {
    for family in FAMILIES {
        let dir = model(family);
        let options = LocalOptions {
            cache_bytes_max: 0,
            ..options()
        };
        let local = Local::load(dir.path(), options).unwrap();
        let mut random = StdRng::seed_from_u64(1);
        let prompts: Vec<Prompt> = (0..8)
            .map(|_| {
                let tokens = rope(&Rope::default(), some_tokens(&mut random, 60));
                prompt_of("a", &tokens, likeliest(random.random_range(1..20)))
            })
            .collect();
        let alone: Vec<Whole> = prompts
            .iter()
            .map(|prompt| read(local.sample(prompt.clone())).unwrap())
            .collect();
        let all: usize = alone.iter().map(|answer| answer.tokens.len()).sum();
        assert!(alone.iter().map(certain).sum::<usize>() * 10 >= all * 9);
        for _ in 0..8 {
            let together: Vec<(usize, Chunks)> = (0..random.random_range(2..=8))
                .map(|_| random.random_range(0..prompts.len()))
                .map(|which| (which, local.sample(prompts[which].clone())))
                .collect();
            for (which, answer) in together {
                let certain = certain(&alone[which]);
                let tokens = read(answer).unwrap().tokens;
                assert_eq!(tokens[..certain], alone[which].tokens[..certain]);
            }
        }
    }
}

#[test]
fn each_step_computes_what_is_new() {
    let dir = model(Family::Llama);
    let local = Local::load(dir.path(), options()).unwrap();
    let mut conversation = rope(&Rope::default(), 0..20);
    let mut held = 0;
    for _ in 0..4 {
        let answer = sample(&local, "a", &conversation, Sampling::greedy(5));
        assert_eq!(answer.cached, held);
        // All but the last sampled token.
        held = conversation.len_tokens() as u32 + 4;
        let sampled = conversation.with_sampled(Draft {
            ids: answer.tokens,
            ..Draft::default()
        });
        conversation = rope(&sampled, [1, 2, 3]);
    }
    // Again, and a fork from the middle: their own past is still there.
    assert_eq!(
        sample(&local, "a", &conversation, Sampling::greedy(1)).cached,
        held
    );
    let fork = rope(&rope(&Rope::default(), 0..20), [50, 51]);
    assert_eq!(sample(&local, "a", &fork, Sampling::greedy(1)).cached, 20);
}

#[test]
fn a_prefill_leaves_the_last_token_to_compute() {
    let dir = model(Family::Qwen2);
    let local = Local::load(dir.path(), options()).unwrap();
    let tokens = rope(&Rope::default(), 0..40);
    for _ in 0..2 {
        let prefilled = local.prefill(prompt_of("a", &tokens, Sampling::greedy(5)));
        assert_eq!(block_on(prefilled), Ok(()));
    }
    assert_eq!(sample(&local, "a", &tokens, Sampling::greedy(1)).cached, 39);
    let more = rope(&tokens, [1]);
    assert_eq!(sample(&local, "b", &more, Sampling::greedy(1)).cached, 40);
}

#[test]
fn seeds_reproduce_whatever_else_is_sampled() {
    let dir = model(Family::Qwen3);
    let local = Local::load(dir.path(), options()).unwrap();
    let tokens = rope(&Rope::default(), 0..10);
    let seeded = |seed| Sampling {
        temperature: 1.5,
        seed: Some(seed),
        ..Sampling::greedy(12)
    };
    let alone = sample(&local, "a", &tokens, seeded(1)).tokens;
    let together = [1, 2, 1].map(|seed| local.sample(prompt_of("a", &tokens, seeded(seed))));
    let [first, other, again] = together.map(|chunks| read(chunks).unwrap().tokens);
    assert_eq!((&first, &again), (&alone, &alone));
    assert_ne!(other, alone);
}

#[test]
fn a_sample_ends_with_its_end_token() {
    let dir = model(Family::Llama);
    let local = Local::load(dir.path(), options()).unwrap();
    let tokens = rope(&Rope::default(), 0..10);
    let free = sample(&local, "a", &tokens, Sampling::greedy(8));
    assert_eq!((free.tokens.len(), free.finish), (8, SampleEnd::Length));
    let end = free.tokens[3];
    let first = free.tokens.iter().position(|token| *token == end).unwrap();
    let stopping = Sampling {
        end_tokens: [end].into(),
        top_logprobs: Some(3),
        ..Sampling::greedy(8)
    };
    let stopped = sample(&local, "a", &tokens, stopping);
    assert_eq!(stopped.tokens, free.tokens[..=first]);
    assert_eq!(stopped.finish, SampleEnd::Stop);
    let likeliest: Vec<u32> = stopped
        .logprobs
        .iter()
        .map(|token| token.top[0].0)
        .collect();
    assert_eq!(likeliest, stopped.tokens);
    assert!(stopped.logprobs.iter().all(|token| token.top.len() == 3));
}

#[test]
fn a_reader_that_does_not_read_stalls_nobody() {
    let dir = model(Family::Llama);
    let options = LocalOptions {
        jobs_max: 1,
        ..options()
    };
    let local = Local::load(dir.path(), options).unwrap();
    let tokens = rope(&Rope::default(), 0..10);
    let unread = local.sample(prompt_of("a", &tokens, Sampling::greedy(60)));
    let other = sample(&local, "a", &tokens, Sampling::greedy(60));
    let dropped = local.sample(prompt_of("a", &tokens, Sampling::greedy(4000)));
    drop(dropped);
    assert_eq!(other.tokens.len(), 60);
    // Reading wakes the engine, and nothing is lost.
    assert_eq!(read(unread).unwrap().tokens, other.tokens);
    // What was accepted ends although the engine is dropped.
    let unread = local.sample(prompt_of("a", &tokens, Sampling::greedy(60)));
    drop(local);
    assert_eq!(read(unread).unwrap().tokens, other.tokens);
}

#[test]
fn too_many_samples_are_refused() {
    let dir = model(Family::Llama);
    let options = LocalOptions {
        accepted_max: 2,
        ..options()
    };
    let local = Local::load(dir.path(), options).unwrap();
    let prompt = prompt_of("a", &rope(&Rope::default(), 0..10), Sampling::greedy(60));
    let mut unread = [0, 1].map(|_| local.sample(prompt.clone()));
    let refused = read(local.sample(prompt.clone())).unwrap_err();
    assert_eq!(
        refused,
        BackendError::Unavailable {
            reason: "2 samples are under way".into(),
            retry_after: None,
        }
    );
    assert!(local.healthy());
    // Who has read one to its end can begin another.
    let first = std::mem::replace(&mut unread[0], Box::pin(futures::stream::empty()));
    assert!(read(first).is_ok());
    assert!(read(local.sample(prompt.clone())).is_ok());
    // Who drops one leaves its place as soon as the engine sees it, which is woken for that.
    let taken = local.sample(prompt.clone());
    drop(unread);
    while let Err(error) = read(local.sample(prompt.clone())) {
        assert!(matches!(error, BackendError::Unavailable { .. }));
        std::thread::yield_now();
    }
    drop(taken);
}

#[test]
fn the_context_is_a_limit() {
    let dir = model(Family::Qwen2);
    let options = LocalOptions {
        context_length: Some(32),
        ..options()
    };
    let local = Local::load(dir.path(), options).unwrap();
    assert_eq!((local.vocab_size(), local.context_length()), (VOCAB, 32));
    let of = |count| rope(&Rope::default(), 0..count);
    let full = sample(&local, "a", &of(30), Sampling::greedy(50));
    assert_eq!((full.tokens.len(), full.finish), (2, SampleEnd::Length));
    assert_eq!(
        sample(&local, "a", &of(31), Sampling::greedy(50))
            .tokens
            .len(),
        1
    );
    assert_eq!(
        failure(&local, &of(32)),
        "the backend failed: the prompt has 32 tokens, the context of the model is 32"
    );
    assert_eq!(
        failure(&local, &rope(&of(3), [VOCAB])),
        "the backend failed: token 60 is not in the vocabulary of 60 tokens"
    );
    assert_eq!(
        failure(&local, &Rope::default()),
        "the backend failed: the prompt is empty"
    );
}

#[test]
fn a_model_that_computes_no_numbers_fails_the_sample() {
    let dir = model(Family::Llama);
    let mut tensors = TinyLlama::new(Family::Llama, VOCAB as usize).tensors();
    for (name, _, values) in &mut tensors {
        if name == "model.layers.1.mlp.down_proj.weight" {
            values[5] = f32::NAN;
        }
    }
    std::fs::write(dir.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    let local = Local::load(dir.path(), options()).unwrap();
    let error = failure(&local, &rope(&Rope::default(), 0..5));
    assert_eq!(
        error,
        "the backend failed: the logits are not finite numbers"
    );
    assert!(local.healthy());
}

/// On an accelerator a model is computed in the floats that its file has.
#[test]
fn half_floats_change_no_more_than_they_round() {
    let tokens = rope(&Rope::default(), 0..40);
    let sampling = Sampling {
        top_logprobs: Some(3),
        ..Sampling::greedy(1)
    };
    for family in FAMILIES {
        let likeliest = |dtype| {
            let dir = model(family);
            let tensors = converted(family, DType::BF16, dtype);
            save(dir.path(), "model.safetensors", &tensors);
            let local = Local::load(dir.path(), options()).unwrap();
            sample(&local, "a", &tokens, sampling.clone()).logprobs[0].logprob
        };
        let apart = (likeliest(DType::BF16) - likeliest(DType::F32)).abs();
        assert!(apart < 0.1, "{family:?}: {apart}");
    }
}

/// The model's tensors in this type, through it also where they are stored as 32-bit floats.
fn converted(family: Family, through: DType, to: DType) -> Vec<(String, Tensor)> {
    let tensors = TinyLlama::new(family, VOCAB as usize).tensors();
    let convert = |(name, shape, values): tiny_llama::NamedTensor| {
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        let tensor = tensor
            .to_dtype(through)
            .and_then(|tensor| tensor.to_dtype(to));
        (name, tensor.unwrap())
    };
    tensors.into_iter().map(convert).collect()
}

fn save(dir: &Path, file: &str, tensors: &[(String, Tensor)]) {
    let tensors: HashMap<&str, Tensor> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    candle_core::safetensors::save(&tensors, dir.join(file)).unwrap();
}

#[test]
fn half_floats_and_shards_are_read() {
    let tokens = rope(&Rope::default(), 0..10);
    let run = |dir: &Path| {
        let options = LocalOptions {
            device: DeviceChoice::Cpu,
            ..options()
        };
        let local = Local::load(dir, options).unwrap();
        sample(&local, "a", &tokens, Sampling::greedy(10)).tokens
    };
    for half in [DType::F16, DType::BF16] {
        let whole = model(Family::Qwen3);
        save(
            whole.path(),
            "model.safetensors",
            &converted(Family::Qwen3, half, DType::F32),
        );
        let sharded = model(Family::Qwen3);
        let single = sharded.path().join("model.safetensors");
        std::fs::remove_file(single).unwrap();
        let tensors = converted(Family::Qwen3, half, half);
        let (first, second) = tensors.split_at(9);
        save(sharded.path(), "one.safetensors", first);
        save(sharded.path(), "two.safetensors", second);
        let expected = run(whole.path());
        // All files that are there, and those that an index names.
        assert_eq!(run(sharded.path()), expected);
        let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        std::fs::write(sharded.path().join("model.safetensors.index.json"), index).unwrap();
        std::fs::write(sharded.path().join("three.safetensors"), "not read").unwrap();
        assert_eq!(run(sharded.path()), expected);
    }
}

fn load_error(dir: &Path, options: LocalOptions) -> LoadError {
    Local::load(dir, options).expect_err("loads")
}

#[test]
fn what_does_not_load_is_named() {
    let dir = model(Family::Qwen2);
    let path = |file: &str| dir.path().join(file);
    let error = || load_error(dir.path(), options());
    let missing = path("nothing");
    assert!(matches!(
        load_error(&missing, options()),
        LoadError::NotADirectory { path } if path == missing
    ));
    let asked = |context| {
        let options = LocalOptions {
            context_length: Some(context),
            ..options()
        };
        load_error(dir.path(), options).to_string()
    };
    assert_eq!(
        asked(5000),
        "a context of 5000 tokens was asked for, the model takes 1 to 4096"
    );
    assert_eq!(
        asked(0),
        "a context of 0 tokens was asked for, the model takes 1 to 4096"
    );
    let none = LocalOptions {
        jobs_max: 0,
        ..options()
    };
    assert_eq!(
        load_error(dir.path(), none).to_string(),
        "option jobs_max must be at least 1"
    );

    let tiny = TinyLlama::new(Family::Qwen2, VOCAB as usize);
    let write = |tensors: &[tiny_llama::NamedTensor]| {
        std::fs::write(path("model.safetensors"), safetensors(tensors)).unwrap();
    };
    let mut tensors = tiny.tensors();
    let at = tensors
        .iter()
        .position(|(name, ..)| name == "model.layers.1.self_attn.k_proj.bias")
        .unwrap();
    let bias = tensors.remove(at);
    write(&tensors);
    assert_eq!(
        error().to_string(),
        "the weights lack tensor model.layers.1.self_attn.k_proj.bias of shape [32]"
    );
    let (name, _, values) = bias;
    tensors.push((name, vec![4, 8], values));
    write(&tensors);
    assert_eq!(
        error().to_string(),
        "tensor model.layers.1.self_attn.k_proj.bias has shape [4, 8], the configuration says [32]"
    );
    save(
        dir.path(),
        "model.safetensors",
        &converted(Family::Qwen2, DType::U8, DType::U8),
    );
    assert_eq!(
        error().to_string(),
        "tensor model.embed_tokens.weight is of type u8, which is not one of f32, f16, bf16"
    );
    let (_, weights) = Weights::open(&dir.path().into(), &Device::Cpu).unwrap();
    assert!(weights.fit(None).is_ok());
    assert_eq!(
        weights.fit(Some(5)).unwrap_err().to_string(),
        "the weights take 263424 bytes of memory, 5 are available"
    );
    std::fs::write(path("model.safetensors"), "cut").unwrap();
    assert!(
        matches!(error(), LoadError::Weights { path: found, .. } if found == path("model.safetensors"))
    );
    std::fs::remove_file(path("model.safetensors")).unwrap();
    assert!(matches!(error(), LoadError::NoWeights { .. }));
    std::fs::write(
        path("model.safetensors.index.json"),
        r#"{"weight_map": {"a": "../b"}}"#,
    )
    .unwrap();
    assert_eq!(
        error().to_string(),
        "model.safetensors.index.json: \"../b\" is not a file name"
    );
    std::fs::write(path("config.json"), "{").unwrap();
    assert!(matches!(error(), LoadError::Json { .. }));
    std::fs::remove_file(path("config.json")).unwrap();
    assert!(matches!(error(), LoadError::Read { path: found, .. } if found == path("config.json")));
}
