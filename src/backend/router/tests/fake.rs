//! An engine whose next token is a function of all tokens before it, and which breaks where a test
//! says.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;

use crate::{
    backend::{
        Backend, BackendError, Capabilities, Chunk, Chunks, Prompt, SampleEnd, Told, Ungrammatical,
    },
    item::{Tenant, TokenLogprob},
    parse::Grammar,
};

/// The token that ends a sample.
pub(super) const END: u32 = 3;

/// How one sample goes.
#[derive(Debug, Clone)]
pub(super) struct Play {
    /// How long the first token takes.
    pub(super) after: Duration,
    /// Tokens of a chunk.
    pub(super) chunk: usize,
    /// Tells what it has cached before its first token comes, rather than with it.
    pub(super) cached_first: bool,
    pub(super) ending: Ending,
}

#[derive(Debug, Clone)]
pub(super) enum Ending {
    /// It is sampled to its end.
    Whole,
    /// It fails behind so many tokens, or behind all of them where there are fewer.
    Fails(usize, BackendError),
    /// It ends behind so many tokens without saying why.
    Stops(usize),
    /// Nothing comes behind so many tokens.
    Hangs(usize),
}

impl Play {
    pub(super) fn of(ending: Ending) -> Self {
        Self {
            after: Duration::ZERO,
            chunk: 1,
            cached_first: false,
            ending,
        }
    }

    pub(super) fn after_ms(self, millis: u64) -> Self {
        Self {
            after: Duration::from_millis(millis),
            ..self
        }
    }
}

pub(super) struct Fake {
    pub(super) capabilities: Mutex<Capabilities>,
    pub(super) healthy: AtomicBool,
    pub(super) load: Mutex<Option<u32>>,
    pub(super) keeps_to_grammars: AtomicBool,
    plays: Mutex<VecDeque<Play>>,
    prompts: Mutex<Vec<Prompt>>,
    prefills: Mutex<Vec<Prompt>>,
    live: Arc<AtomicU32>,
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            capabilities: Mutex::new(Capabilities {
                kind: "fake",
                keeps_cache: true,
                prefill: true,
                constrained_sampling: true,
                logprobs: true,
                reads_items: false,
                reads_messages: false,
                sampling: true,
            }),
            healthy: AtomicBool::new(true),
            load: Mutex::default(),
            keeps_to_grammars: AtomicBool::new(true),
            plays: Mutex::default(),
            prompts: Mutex::default(),
            prefills: Mutex::default(),
            live: Arc::default(),
        }
    }
}

impl Fake {
    /// How the next sample goes that nothing was said of; without that it is whole.
    pub(super) fn play(&self, play: Play) {
        self.plays.lock().push_back(play);
    }

    pub(super) fn ends(&self, ending: Ending) {
        self.play(Play::of(ending));
    }

    /// The next sample fails before its first token.
    pub(super) fn fails(&self, error: BackendError) {
        self.ends(Ending::Fails(0, error));
    }

    pub(super) fn prompts(&self) -> Vec<Prompt> {
        self.prompts.lock().clone()
    }

    pub(super) fn prefills(&self) -> usize {
        self.prefills.lock().len()
    }

    /// Samples that were neither ended nor dropped.
    pub(super) fn live(&self) -> u32 {
        self.live.load(Ordering::SeqCst)
    }
}

/// The token behind these.
fn next(tokens: &[u32]) -> u32 {
    let hash = tokens
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, token| {
            (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3)
        });
    (hash >> 20) as u32 % 24
}

/// The whole sample.
pub(super) fn reference(prompt: &Prompt) -> (Vec<u32>, SampleEnd) {
    let mut all = prompt.tokens.tokens_from(0);
    let before = all.len();
    loop {
        let token = next(&all);
        all.push(token);
        let sampled = &all[before..];
        if prompt.sampling.end_tokens.contains(&token) {
            return (sampled.to_vec(), SampleEnd::Stop);
        }
        if sampled.len() == prompt.sampling.max_tokens as usize {
            return (sampled.to_vec(), SampleEnd::Length);
        }
    }
}

/// A sample that counts until it is dropped.
struct Live(Arc<AtomicU32>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Backend for Fake {
    fn capabilities(&self) -> Capabilities {
        *self.capabilities.lock()
    }

    fn healthy(&self) -> bool {
        self.healthy.load(Ordering::SeqCst)
    }

    fn load(&self) -> Option<u32> {
        *self.load.lock()
    }

    fn check(&self, _tenant: &Tenant, _grammar: &Arc<Grammar>) -> Result<(), Ungrammatical> {
        match self.keeps_to_grammars.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(Ungrammatical {
                schema: None,
                reason: "no".to_owned(),
            }),
        }
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        let play = self.plays.lock().pop_front();
        let play = play.unwrap_or(Play::of(Ending::Whole));
        let (tokens, finish) = reference(&prompt);
        let reads_messages = self.capabilities().reads_messages;
        let told = match &play.ending {
            Ending::Whole => tokens.len(),
            Ending::Fails(at, _) | Ending::Stops(at) | Ending::Hangs(at) => (*at).min(tokens.len()),
        };
        let cached = prompt.tokens.len_tokens() as u32;
        let mut chunks: Vec<Result<Chunk, BackendError>> = tokens[..told]
            .chunks(play.chunk)
            .map(|tokens| Ok(chunk_of(tokens, reads_messages, &prompt)))
            .collect();
        if play.cached_first {
            chunks.insert(0, Ok(Chunk::default()));
        }
        if let Some(Ok(first)) = chunks.first_mut() {
            first.cached_tokens = Some(cached);
        }
        let mut hangs = false;
        match play.ending {
            Ending::Whole => {
                if let Some(Ok(last)) = chunks.last_mut() {
                    last.finish = Some(finish);
                }
            }
            Ending::Fails(_, error) => chunks.push(Err(error)),
            Ending::Stops(_) => {}
            Ending::Hangs(_) => hangs = true,
        }
        self.prompts.lock().push(prompt);
        self.live.fetch_add(1, Ordering::SeqCst);
        let live = Live(self.live.clone());
        let after = play.after;
        let chunks = async move {
            if !after.is_zero() {
                tokio::time::sleep(after).await;
            }
            stream::iter(chunks)
        };
        let silence = stream::pending().take(if hangs { 1 } else { 0 });
        chunks
            .into_stream()
            .flatten()
            .chain(silence)
            .inspect(move |_| _ = &live)
            .boxed()
    }

    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        self.prefills.lock().push(prompt);
        std::future::ready(Ok(())).boxed()
    }
}

fn chunk_of(tokens: &[u32], reads_messages: bool, prompt: &Prompt) -> Chunk {
    if reads_messages {
        return Chunk {
            told: Some(Box::new(Told::default())),
            ..Chunk::default()
        };
    }
    let logprobs = prompt.sampling.top_logprobs.map(|_| {
        let logprob = |token: &u32| TokenLogprob {
            token: *token,
            logprob: 0.0,
            top: Vec::new(),
        };
        tokens.iter().map(logprob).collect()
    });
    Chunk {
        tokens: tokens.to_vec(),
        logprobs: logprobs.unwrap_or_default(),
        ..Chunk::default()
    }
}

/// What came of a sample.
#[derive(Debug, PartialEq)]
pub(super) struct Heard {
    pub(super) tokens: Vec<u32>,
    /// Each time that cached tokens were told.
    pub(super) cached: Vec<u32>,
    pub(super) end: Result<SampleEnd, BackendError>,
}

impl Heard {
    /// A sample of this prompt to which nothing happened.
    pub(super) fn whole(prompt: &Prompt) -> Self {
        let (tokens, finish) = reference(prompt);
        Self {
            tokens,
            cached: vec![prompt.tokens.len_tokens() as u32],
            end: Ok(finish),
        }
    }
}

/// Listens to a sample until its end, which must come and be the last.
pub(super) async fn hear(mut chunks: Chunks) -> Heard {
    let mut tokens = Vec::new();
    let mut cached = Vec::new();
    loop {
        let chunk = chunks.next().await.expect("a sample says how it ends");
        let end = match chunk {
            Ok(chunk) => {
                tokens.extend(chunk.tokens);
                cached.extend(chunk.cached_tokens);
                chunk.finish.map(Ok)
            }
            Err(error) => Some(Err(error)),
        };
        if let Some(end) = end {
            assert!(
                chunks.next().await.is_none(),
                "nothing comes behind the end"
            );
            return Heard {
                tokens,
                cached,
                end,
            };
        }
    }
}
