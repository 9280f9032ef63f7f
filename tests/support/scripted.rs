//! A backend that samples what a test has queued.

use std::{collections::VecDeque, sync::Mutex};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use hotloop::backend::{Backend, BackendError, Capabilities, Chunk, Chunks, Prompt, SampleEnd};

/// Plays queued answers, one a sample, and keeps the prompts that it was given.
#[derive(Default)]
pub struct Scripted {
    answers: Mutex<VecDeque<Vec<Chunk>>>,
    prompts: Mutex<Vec<Prompt>>,
}

impl Scripted {
    /// Queues the next answer: tokens in chunks of these sizes, the last size repeated, and how it ends.
    pub fn queue(&self, tokens: &[u32], sizes: &[usize], finish: SampleEnd) {
        let mut chunks = Vec::new();
        let mut rest = tokens;
        let mut sizes = sizes.iter().copied();
        let mut size = 1;
        while !rest.is_empty() {
            size = sizes.next().unwrap_or(size).clamp(1, rest.len());
            let (now, later) = rest.split_at(size);
            chunks.push(Chunk {
                tokens: now.to_vec(),
                ..Chunk::default()
            });
            rest = later;
        }
        match chunks.last_mut() {
            Some(last) => last.finish = Some(finish),
            None => chunks.push(Chunk {
                finish: Some(finish),
                ..Chunk::default()
            }),
        }
        self.answers.lock().unwrap().push_back(chunks);
    }

    /// The prompts so far, oldest first.
    pub fn prompts(&self) -> Vec<Prompt> {
        self.prompts.lock().unwrap().clone()
    }
}

impl Backend for Scripted {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: "scripted",
            keeps_cache: true,
            prefill: true,
            constrained_sampling: true,
            logprobs: true,
            reads_items: false,
            reads_messages: false,
            sampling: true,
        }
    }

    fn healthy(&self) -> bool {
        true
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        self.prompts.lock().unwrap().push(prompt);
        let answer = self.answers.lock().unwrap().pop_front();
        let answer = answer.ok_or_else(|| BackendError::Failed {
            reason: "nothing is queued".to_owned(),
        });
        match answer {
            Ok(chunks) => futures::stream::iter(chunks.into_iter().map(Ok)).boxed(),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        self.prompts.lock().unwrap().push(prompt);
        std::future::ready(Ok(())).boxed()
    }
}
