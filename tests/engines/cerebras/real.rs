//! Real services, where the environment names them: Cerebras' own by its key, and a server of vLLM
//! by `HOTLOOP_VLLM_URL` and `HOTLOOP_VLLM_MODEL`.

use std::time::Duration;

use hotloop::backend::cerebras::Dialect;

use super::*;

/// A model that the service has as a rule; another can be named.
const MODEL: &str = "gpt-oss-120b";

fn real(prompt: PromptForm) -> Option<Cerebras> {
    let Ok(key) = std::env::var("CEREBRAS_API_KEY") else {
        eprintln!("not asked: CEREBRAS_API_KEY is not in the environment");
        return None;
    };
    let options = CerebrasOptions {
        model: std::env::var("CEREBRAS_MODEL").unwrap_or_else(|_| MODEL.into()),
        prompt,
        // Not every model knows it.
        keep_thinking: false,
        ..CerebrasOptions::default()
    };
    Some(Cerebras::new(options, Some(ApiKey::new(&key).unwrap())).unwrap())
}

#[tokio::test]
async fn the_real_service_answers_messages() {
    let Some(backend) = real(PromptForm::Chat) else {
        return;
    };
    let mut prompt = chat();
    prompt.sampling.max_tokens = 1_000;
    let asked = tokio::time::timeout(Duration::from_secs(60), answer(&backend, prompt));
    let (parsed, last) = asked.await.unwrap();
    assert!(!parsed.is_empty());
    assert_eq!(last.finish, Some(SampleEnd::Stop));
    assert!(last.told.unwrap().usage.unwrap().output > 0);
}

#[tokio::test]
async fn the_real_service_samples_tokens() {
    let Some(backend) = real(PromptForm::Tokens) else {
        return;
    };
    let mut prompt = tokens();
    // "Hello" in gpt-oss' vocabulary, o200k_harmony.
    prompt.tokens = rope(&[13_225]);
    prompt.sampling.max_tokens = 16;
    let asked = tokio::time::timeout(Duration::from_secs(60), sampled(&backend, prompt));
    let chunks = asked.await.unwrap();
    let tokens = chunks
        .iter()
        .map(|chunk| chunk.as_ref().unwrap().tokens.len());
    assert!((1..=16).contains(&tokens.sum::<usize>()));
}

fn vllm(prompt: PromptForm) -> Option<Cerebras> {
    let variable = |name: &str| std::env::var(name).ok();
    let named = variable("HOTLOOP_VLLM_URL").zip(variable("HOTLOOP_VLLM_MODEL"));
    let Some((url, model)) = named else {
        eprintln!("not asked: HOTLOOP_VLLM_URL or HOTLOOP_VLLM_MODEL is not in the environment");
        return None;
    };
    let options = CerebrasOptions {
        url,
        model,
        dialect: Dialect::Vllm,
        prompt,
        ..CerebrasOptions::default()
    };
    Some(Cerebras::new(options, None).unwrap())
}

#[tokio::test]
async fn a_real_vllm_answers_messages() {
    let Some(backend) = vllm(PromptForm::Chat) else {
        return;
    };
    let mut prompt = chat();
    prompt.chat.as_mut().unwrap().settings = Arc::default();
    prompt.sampling.max_tokens = 8;
    let (parsed, last) = answer(&backend, prompt).await;
    assert_eq!(parsed.len(), 1);
    let output = last.told.unwrap().usage.unwrap().output;
    assert!((1..=8).contains(&output));
}

#[tokio::test]
async fn a_real_vllm_samples_tokens() {
    let Some(backend) = vllm(PromptForm::Tokens) else {
        return;
    };
    let ids = async |end_tokens: &[u32]| {
        let mut prompt = tokens();
        prompt.tokens = rope(&[5, 6, 7, 8, 9]);
        prompt.sampling.max_tokens = 4;
        prompt.sampling.end_tokens = end_tokens.into();
        let chunks = sampled(&backend, prompt).await;
        let chunks: Vec<Chunk> = chunks.into_iter().map(Result::unwrap).collect();
        let ids: Vec<u32> = chunks.iter().flat_map(|it| it.tokens.clone()).collect();
        (ids, chunks.last().unwrap().finish)
    };
    let (free, finish) = ids(&[]).await;
    assert!((1..=4).contains(&free.len()) && finish.is_some());
    let ended = (vec![free[0]], Some(SampleEnd::Stop));
    assert_eq!(ids(&free[..1]).await, ended);
}
