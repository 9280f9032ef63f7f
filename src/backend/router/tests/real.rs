//! Going on elsewhere, with a model that computes.

use futures::stream;

use super::*;
use crate::{
    backend::{
        Chunk,
        local::{Local, LocalOptions},
    },
    files::{BuiltIn, Files},
};

/// A replica that dies behind so many tokens of each sample.
struct Dying {
    local: Arc<Local>,
    after: usize,
}

impl Backend for Dying {
    fn capabilities(&self) -> Capabilities {
        self.local.capabilities()
    }

    fn healthy(&self) -> bool {
        true
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        let mut left = self.after;
        let told = self.local.sample(prompt).map(move |chunk| {
            let mut chunk = chunk?;
            chunk.tokens.truncate(left);
            chunk.logprobs.truncate(left);
            chunk.finish = None;
            left -= chunk.tokens.len();
            Ok(chunk)
        });
        // Behind its last token nothing more is asked of the model.
        let after = self.after;
        let told = told.scan(0, move |sum, chunk: Result<Chunk, BackendError>| {
            let before = *sum;
            *sum += chunk.as_ref().map_or(0, |chunk| chunk.tokens.len());
            std::future::ready((before < after).then_some(chunk))
        });
        told.chain(stream::iter([Err(failed("killed"))])).boxed()
    }

    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        self.local.prefill(prompt)
    }
}

/// Tokens with their log probabilities, and the end.
type Read = (Vec<u32>, Vec<(u32, f32)>, Result<SampleEnd, BackendError>);

async fn read(mut chunks: Chunks) -> Read {
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    loop {
        match chunks.next().await.unwrap() {
            Err(error) => return (tokens, logprobs, Err(error)),
            Ok(chunk) => {
                tokens.extend(&chunk.tokens);
                logprobs.extend(chunk.logprobs.into_iter().map(|it| (it.token, it.logprob)));
                if let Some(finish) = chunk.finish {
                    return (tokens, logprobs, Ok(finish));
                }
            }
        }
    }
}

/// Wherever a replica is killed, a greedy sample has the tokens that it would have had.
#[tokio::test]
async fn a_killed_replica_of_a_model_changes_nothing() {
    const TOKENS: usize = 10;
    let load = || {
        let options = LocalOptions::new("tiny".into());
        Arc::new(Local::load(Files::BuiltIn(BuiltIn::TinyAgent), options).unwrap())
    };
    let [first, second] = [load(), load()];
    let prompt = Prompt {
        sampling: Sampling {
            top_logprobs: Some(1),
            ..Sampling::greedy(TOKENS as u32)
        },
        ..prompt("tenant", "Call a tool")
    };
    let whole = read(first.sample(prompt.clone())).await;
    assert_eq!((whole.0.len(), &whole.2), (TOKENS, &Ok(SampleEnd::Length)));
    for after in 1..=TOKENS {
        let dying = Arc::new(Dying {
            local: first.clone(),
            after,
        });
        let replica = |name: &str, backend| Replica {
            name: name.into(),
            backend,
            weight: 1,
        };
        // Each of them is asked first once.
        for names in [["a", "b"], ["b", "a"]] {
            let router = Router::new(
                replica(names[0], dying.clone()),
                vec![replica(names[1], second.clone())],
                RoutingOptions::default(),
            );
            let (tokens, logprobs, end) = read(router.sample(prompt.clone())).await;
            assert_eq!((tokens, end), (whole.0.clone(), whole.2.clone()), "{after}");
            for (left, right) in logprobs.iter().zip(&whole.1) {
                assert!(left.0 == right.0 && (left.1 - right.1).abs() < 1e-3);
            }
            assert_eq!(logprobs.len(), TOKENS);
            let dying_was_first = order(&router, &prompt)[0] == names[0];
            assert_eq!(router.replicas()[0].failures, u32::from(dying_was_first));
        }
    }
}
