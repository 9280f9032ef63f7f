//! Cerebras' own service, where the environment has a key for it.

use std::time::Duration;

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
