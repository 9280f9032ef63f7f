//! The thread that runs the model, for all samples at once.
//!
//! ```text
//!   submit ─→ waiting ─→ prefilling ─→ decoding ─→ kept in the cache
//!     │ refused  │            │            │              ↑
//!     ▼          ▼ dropped    └── dropped ─┴──────────────┘
//!   unavailable  nothing
//! ```
//!
//! A round is one forward pass: every decoding sample whose reader keeps up brings its last token
//! and gets another, and behind them come pieces of prompts, together of a bounded length. The thread rests when there is nothing that it can do; whatever may give it
//! something to do rings its [`Bell`]: a new sample, a chunk that was read, a dropped stream.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    task::{Context, Poll, ready},
    thread::{self, Thread},
};

use futures::{Stream, stream};
use tokio::sync::mpsc;

use crate::{
    backend::{BackendError, Chunk, Chunks, Prompt, SampleEnd},
    ledger::Rope,
};

use super::{
    cache::{Cache, Found, Owner, Sequence},
    guide::Guide,
    model::{Model, Piece},
    sampler::{Sampled, Sampler},
};

/// How far a sample may be ahead of its reader, in chunks.
const CHUNKS_MAX: usize = 16;

/// Why nothing can be sampled any more.
const STOPPED: &str = "the engine has stopped";

/// What the engine takes on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) context_length: usize,
    pub(super) jobs_max: usize,
    pub(super) accepted_max: usize,
    pub(super) prefill_tokens_max: usize,
}

/// What is done with a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Sample from it.
    Sample,
    /// Only keep its keys and values. Answered with one chunk without tokens.
    Prefill,
}

/// The engine's handle. The thread ends when the handle is dropped and all samples have ended.
#[derive(Debug)]
pub(super) struct Engine {
    jobs: SyncSender<Job>,
    // After `jobs`, so that its last ring comes when no more jobs can.
    bell: Bell,
    accepted: Arc<AtomicUsize>,
    accepted_max: usize,
    works: Arc<AtomicBool>,
}

/// Whose sequence the prompt makes.
fn owner(prompt: &Prompt) -> Owner {
    Owner {
        tenant: prompt.tenant.clone(),
        affinity: Arc::clone(&prompt.affinity),
    }
}

impl Engine {
    pub(super) fn start(model: Model, cache: Cache, limits: Limits) -> std::io::Result<Self> {
        let (jobs, incoming) = sync_channel(limits.accepted_max);
        let works = Arc::new(AtomicBool::new(true));
        let flag = Arc::clone(&works);
        let thread = thread::Builder::new()
            .name("local-engine".into())
            .spawn(move || {
                let _pool = thread_pool(model.threads());
                let mut worker = Worker::new(model, cache, limits, incoming);
                if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    tracing::error!("the local engine broke");
                }
                flag.store(false, Ordering::Release);
            })?;
        Ok(Self {
            jobs,
            bell: Bell(thread.thread().clone()),
            accepted: Arc::default(),
            accepted_max: limits.accepted_max,
            works,
        })
    }

    /// Whether the thread works.
    pub(super) fn works(&self) -> bool {
        self.works.load(Ordering::Acquire)
    }

    /// Hands a prompt to the thread. Dropping the answer ends the work on it.
    pub(super) fn submit(&self, prompt: Prompt, work: Work, guide: Option<Guide>) -> Chunks {
        match self.accept(prompt, work, guide) {
            Ok(answer) => Box::pin(answer),
            Err(reason) => {
                let error = BackendError::Unavailable {
                    reason,
                    retry_after: None,
                };
                Box::pin(stream::iter([Err(error)]))
            }
        }
    }

    fn accept(&self, prompt: Prompt, work: Work, guide: Option<Guide>) -> Result<Answer, String> {
        if !self.works() {
            return Err(STOPPED.into());
        }
        let Some(seat) = Seat::take(&self.accepted, self.accepted_max) else {
            return Err(format!("{} samples are under way", self.accepted_max));
        };
        let (chunks, receiver) = mpsc::channel(CHUNKS_MAX);
        let job = Job {
            prompt,
            work,
            guide,
            chunks,
            seat,
        };
        // There is a place for each seat, so that this fails only when the thread is gone.
        if self.jobs.try_send(job).is_err() {
            return Err(STOPPED.into());
        }
        self.bell.ring();
        Ok(Answer::Open {
            receiver,
            bell: self.bell.clone(),
            works: Arc::clone(&self.works),
        })
    }
}

/// Makes this thread the first of a pool. The kernels share their work among the pool of the
/// thread that calls them; called from a thread of no pool, each would wait until one of another
/// pool has woken, for a small model several times as long as it computes.
fn thread_pool(threads: usize) -> Option<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("local-engine-{index}"))
        .use_current_thread()
        .build();
    pool.inspect_err(|error| tracing::warn!(%error, "the local engine has no threads of its own"))
        .ok()
}

/// Wakes the thread, also when it is dropped.
#[derive(Debug, Clone)]
struct Bell(Thread);

impl Bell {
    fn ring(&self) {
        self.0.unpark();
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.ring();
    }
}

/// A sample's place among those that are accepted.
#[derive(Debug)]
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(taken: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        taken
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                (count < max).then_some(count + 1)
            })
            .ok()?;
        Some(Self(Arc::clone(taken)))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The reader's end of a sample.
#[derive(Debug)]
enum Answer {
    Open {
        receiver: mpsc::Receiver<Result<Chunk, BackendError>>,
        // After `receiver`, so that the thread is woken when it can see that nobody reads.
        bell: Bell,
        works: Arc<AtomicBool>,
    },
    Ended,
}

impl Stream for Answer {
    type Item = Result<Chunk, BackendError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self::Open {
            receiver,
            bell,
            works,
        } = &mut *self
        else {
            return Poll::Ready(None);
        };
        let item = ready!(receiver.poll_recv(cx)).unwrap_or_else(|| {
            // Every job is ended by a last chunk or an error: the thread broke. Who sees this
            // sees the engine stopped, even while the thread is still unwinding.
            works.store(false, Ordering::Release);
            Err(BackendError::Failed {
                reason: STOPPED.into(),
            })
        });
        bell.ring();
        if !matches!(&item, Ok(Chunk { finish: None, .. })) {
            *self = Self::Ended;
        }
        Poll::Ready(Some(item))
    }
}

/// A prompt that was accepted.
struct Job {
    prompt: Prompt,
    work: Work,
    /// What its sample keeps to.
    guide: Option<Guide>,
    chunks: mpsc::Sender<Result<Chunk, BackendError>>,
    seat: Seat,
}

impl Job {
    fn dropped(&self) -> bool {
        self.chunks.is_closed()
    }

    /// Its reader is so far behind that there is no room for another chunk.
    fn paused(&self) -> bool {
        self.chunks.capacity() == 0
    }

    /// Sends without waiting. There is room, since no step is taken for a paused job; and
    /// whether anyone still reads is looked at before the next step.
    fn send(&self, chunk: Chunk) {
        drop(self.chunks.try_send(Ok(chunk)));
    }

    /// Sends what ends the sample. Its seat is free before: who reads the end may take it.
    fn end(self, last: Result<Chunk, BackendError>) {
        drop(self.seat);
        drop(self.chunks.try_send(last));
    }

    fn fail(self, reason: String) {
        self.end(Err(BackendError::Failed { reason }));
    }
}

/// A job with its turn, its keys and values.
struct Running {
    job: Job,
    sequence: Sequence,
    continues: Option<u64>,
}

/// A job whose prompt is being computed.
struct Prefilling {
    running: Running,
    /// How many tokens of the prompt came from the cache.
    cached: usize,
    /// The tokens of the prompt that are still to be computed.
    rest: VecDeque<u32>,
}

/// A job that samples.
struct Decoding {
    running: Running,
    sampler: Box<Sampler>,
    /// The last sampled token, which is not yet in the sequence.
    last: u32,
}

/// What a job brings to a forward pass.
struct Step {
    running: Running,
    tokens: Vec<u32>,
    then: Then,
}

/// What becomes of a job when its tokens are computed.
enum Then {
    /// Its next token is sampled. `cached` tells of a prompt that ends with this pass.
    Sample {
        sampler: Box<Sampler>,
        cached: Option<usize>,
    },
    /// The rest of its prompt is for the next passes.
    Prefill { cached: usize, rest: VecDeque<u32> },
    /// Its prompt is held, and that is all that was asked for.
    End { cached: usize },
}

/// The thread's state.
struct Worker {
    model: Model,
    cache: Cache,
    limits: Limits,
    incoming: Receiver<Job>,
    /// Bounded by the seats.
    waiting: VecDeque<Job>,
    prefilling: VecDeque<Prefilling>,
    decoding: VecDeque<Decoding>,
}

impl Worker {
    fn new(model: Model, cache: Cache, limits: Limits, incoming: Receiver<Job>) -> Self {
        Self {
            model,
            cache,
            limits,
            incoming,
            waiting: VecDeque::new(),
            prefilling: VecDeque::new(),
            decoding: VecDeque::new(),
        }
    }

    fn run(&mut self) {
        loop {
            let more_may_come = self.receive();
            let progressed = self.round();
            let idle =
                self.waiting.is_empty() && self.prefilling.is_empty() && self.decoding.is_empty();
            if idle && !more_may_come {
                return;
            }
            if !progressed {
                thread::park();
            }
        }
    }

    /// Takes in what was submitted. Whether more can be.
    fn receive(&mut self) -> bool {
        loop {
            match self.incoming.try_recv() {
                Ok(job) => self.waiting.push_back(job),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// One forward pass for all jobs that can be in it. Whether there was anything to do.
    fn round(&mut self) -> bool {
        let ended = self.end_dropped();
        let admitted = self.admit();
        let mut steps = self.decode();
        // Those that sample come first, so that their logits are those of the first rows.
        let (last, more): (Vec<Step>, Vec<Step>) = self
            .prefill()
            .into_iter()
            .partition(|step| matches!(step.then, Then::Sample { .. }));
        steps.extend(last.into_iter().chain(more));
        let stepped = !steps.is_empty();
        self.pass(steps);
        self.cache.shrink();
        ended || admitted || stepped
    }

    /// Ends the jobs that nobody waits for. What was computed for them is kept.
    fn end_dropped(&mut self) -> bool {
        let waiting = self.waiting.len();
        self.waiting.retain(|job| !job.dropped());
        let mut ended: Vec<Running> = Vec::new();
        for _ in 0..self.prefilling.len() {
            match self.prefilling.pop_front() {
                Some(job) if job.running.job.dropped() => ended.push(job.running),
                Some(job) => self.prefilling.push_back(job),
                None => break,
            }
        }
        for _ in 0..self.decoding.len() {
            match self.decoding.pop_front() {
                Some(job) if job.running.job.dropped() => ended.push(job.running),
                Some(job) => self.decoding.push_back(job),
                None => break,
            }
        }
        let any = waiting > self.waiting.len() || !ended.is_empty();
        for running in ended {
            drop(self.keep(running));
        }
        any
    }

    /// Gives waiting jobs a turn. A job that pauses gives its turn up; when it goes on, there may
    /// be more jobs in turn than `jobs_max` for a while.
    fn admit(&mut self) -> bool {
        let paused = |decoding: &&Decoding| decoding.running.job.paused();
        let mut admitted = false;
        loop {
            let in_turn = self.prefilling.len() + self.decoding.len()
                - self.decoding.iter().filter(paused).count();
            if in_turn >= self.limits.jobs_max {
                return admitted;
            }
            let Some(job) = self.waiting.pop_front() else {
                return admitted;
            };
            admitted = true;
            self.begin(job);
        }
    }

    fn begin(&mut self, job: Job) {
        let len = job.prompt.tokens.len_tokens();
        // Sampling needs the logits behind the last token, so that at least this one is computed.
        let (cached_max, room) = match job.work {
            Work::Sample => (len.saturating_sub(1), 1),
            Work::Prefill => (len, 0),
        };
        if len == 0 {
            return job.fail("the prompt is empty".into());
        }
        let context = self.limits.context_length;
        if len + room > context {
            return job.fail(format!(
                "the prompt has {len} tokens, the context of the model is {context}"
            ));
        }
        let Found { kv, continues } = self.find(&job.prompt, cached_max);
        let rest = job.prompt.tokens.tokens_from(kv.len());
        let vocab = self.model.vocab_size();
        if let Some(token) = rest.iter().find(|token| **token as usize >= vocab) {
            return job.fail(format!(
                "token {token} is not in the vocabulary of {vocab} tokens"
            ));
        }
        self.prefilling.push_back(Prefilling {
            cached: kv.len(),
            rest: rest.into(),
            running: Running {
                sequence: Sequence {
                    owner: owner(&job.prompt),
                    prompt: job.prompt.tokens.clone(),
                    kv,
                },
                job,
                continues,
            },
        });
    }

    fn find(&mut self, prompt: &Prompt, len_max: usize) -> Found {
        let prefilling = self.prefilling.iter().map(|job| &job.running.sequence);
        let decoding = self.decoding.iter().map(|job| &job.running.sequence);
        let running = prefilling.chain(decoding);
        let tokens: &Rope = &prompt.tokens;
        self.cache.find(&owner(prompt), tokens, len_max, running)
    }

    /// Takes the jobs that sample out of their queue, but for those whose reader is behind.
    fn decode(&mut self) -> Vec<Step> {
        let (paused, ready): (VecDeque<Decoding>, VecDeque<Decoding>) =
            std::mem::take(&mut self.decoding)
                .into_iter()
                .partition(|decoding| decoding.running.job.paused());
        self.decoding = paused;
        let step = |decoding: Decoding| Step {
            running: decoding.running,
            tokens: vec![decoding.last],
            then: Then::Sample {
                sampler: decoding.sampler,
                cached: None,
            },
        };
        ready.into_iter().map(step).collect()
    }

    /// Takes pieces of prompts, in turn, as many as a pass may have.
    fn prefill(&mut self) -> Vec<Step> {
        let mut room = self.limits.prefill_tokens_max;
        let mut steps = Vec::new();
        while room > 0
            && let Some(prefilling) = self.prefilling.pop_front()
        {
            let Prefilling {
                mut running,
                cached,
                mut rest,
            } = prefilling;
            let count = rest.len().min(room);
            room -= count;
            let tokens: Vec<u32> = rest.drain(..count).collect();
            let then = match running.job.work {
                _ if !rest.is_empty() => Then::Prefill { cached, rest },
                Work::Prefill => Then::End { cached },
                Work::Sample => {
                    let sampling = running.job.prompt.sampling.clone();
                    let held = running.sequence.kv.len() + count;
                    let room = self.limits.context_length - held;
                    let sampler = Sampler::new(sampling, room, running.job.guide.take());
                    Then::Sample {
                        sampler: Box::new(sampler),
                        cached: Some(cached),
                    }
                }
            };
            steps.push(Step {
                running,
                tokens,
                then,
            });
        }
        steps
    }

    /// Computes the tokens of all steps at once, and does what comes then. Those that sample
    /// come first.
    fn pass(&mut self, mut steps: Vec<Step>) {
        let logits = match self.compute(&mut steps) {
            Ok(logits) => logits,
            Err(error) => return self.failed(steps, &error),
        };
        let mut logits = logits.into_iter();
        for step in steps {
            let running = step.running;
            match step.then {
                Then::Sample { sampler, cached } => match logits.next() {
                    Some(logits) => self.sample(running, sampler, &logits, cached),
                    None => running.job.fail("there are no logits".into()),
                },
                Then::Prefill { cached, rest } => self.prefilling.push_back(Prefilling {
                    running,
                    cached,
                    rest,
                }),
                Then::End { cached } => self.prefilled(running, cached),
            }
        }
    }

    /// What fails together is tried alone: a job fails only by its own doing.
    fn failed(&mut self, steps: Vec<Step>, error: &candle_core::Error) {
        let alone = steps.len() == 1;
        for step in steps {
            match alone {
                true => step.running.job.fail(error.to_string()),
                false => self.pass(vec![step]),
            }
        }
    }

    /// The logits of the steps that sample.
    fn compute(&self, steps: &mut [Step]) -> candle_core::Result<Vec<Vec<f32>>> {
        let samples = |step: &&Step| matches!(step.then, Then::Sample { .. });
        let sampling = steps.iter().filter(samples).count();
        let mut pieces: Vec<Piece<'_>> = steps
            .iter_mut()
            // A prompt may have come from the cache to its end, if nothing is to be sampled.
            .filter(|step| !step.tokens.is_empty())
            .map(|step| Piece {
                kv: &mut step.running.sequence.kv,
                tokens: &step.tokens,
            })
            .collect();
        if pieces.is_empty() {
            return Ok(Vec::new());
        }
        let rows = self.model.advance(&mut pieces)?;
        match sampling {
            0 => Ok(Vec::new()),
            _ => self.model.logits(&rows.narrow(0, 0, sampling)?),
        }
    }

    fn prefilled(&mut self, running: Running, cached: usize) {
        let last = Chunk {
            cached_tokens: Some(cached as u32),
            // No token was to be sampled, and none was.
            finish: Some(SampleEnd::Length),
            ..Chunk::default()
        };
        self.keep(running).end(Ok(last));
    }

    /// Samples the next token. A job that fails leaves nothing in the cache, since what is wrong
    /// may be in its keys and values.
    fn sample(
        &mut self,
        running: Running,
        mut sampler: Box<Sampler>,
        logits: &[f32],
        cached: Option<usize>,
    ) {
        let Sampled {
            token,
            logprob,
            end,
        } = match sampler.sample(logits) {
            Ok(sampled) => sampled,
            Err(error) => return running.job.fail(error.to_string()),
        };
        let chunk = Chunk {
            tokens: vec![token],
            logprobs: logprob.into_iter().collect(),
            cached_tokens: cached.map(|count| count as u32),
            finish: end,
            ..Chunk::default()
        };
        if end.is_some() {
            return self.keep(running).end(Ok(chunk));
        }
        running.job.send(chunk);
        self.decoding.push_back(Decoding {
            running,
            sampler,
            last: token,
        });
    }

    /// Keeps what was computed for a job.
    fn keep(&mut self, running: Running) -> Job {
        self.cache.keep(running.sequence, running.continues);
        running.job
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use futures::{FutureExt as _, StreamExt as _};

    use super::*;
    use crate::backend::{
        Sampling,
        local::{
            kv::{KvLayout, Pool},
            tests::{
                device, load, prompt_of, read, rope,
                tiny_llama::{Family, TinyLlama},
            },
        },
    };

    const LIMITS: Limits = Limits {
        context_length: 512,
        jobs_max: 4,
        accepted_max: 8,
        prefill_tokens_max: 8,
    };

    fn model() -> (Model, KvLayout) {
        let dir = tempfile::tempdir().unwrap();
        TinyLlama::new(Family::Qwen3, 50).write(dir.path());
        load(dir.path(), 8)
    }

    /// A worker that takes its rounds when the test says so.
    struct Stage {
        worker: Worker,
        jobs: SyncSender<Job>,
        accepted: Arc<AtomicUsize>,
    }

    type Reader = mpsc::Receiver<Result<Chunk, BackendError>>;

    impl Stage {
        fn new(limits: Limits) -> Self {
            let (model, layout) = model();
            let cache = Cache::new(Pool::new(layout, &device()), usize::MAX);
            let (jobs, incoming) = sync_channel(limits.accepted_max);
            Self {
                worker: Worker::new(model, cache, limits, incoming),
                jobs,
                accepted: Arc::default(),
            }
        }

        fn submit(&self, prompt: Prompt) -> Reader {
            let (chunks, reader) = mpsc::channel(CHUNKS_MAX);
            let job = Job {
                prompt,
                work: Work::Sample,
                guide: None,
                chunks,
                seat: Seat::take(&self.accepted, 99).unwrap(),
            };
            self.jobs.try_send(job).unwrap_or_else(|_| panic!("full"));
            reader
        }

        fn round(&mut self) -> bool {
            self.worker.receive();
            self.worker.round()
        }
    }

    fn prompt(ids: std::ops::Range<u32>, max_tokens: u32) -> Prompt {
        prompt_of(
            "a",
            &rope(&Rope::default(), ids),
            Sampling::greedy(max_tokens),
        )
    }

    #[test]
    fn a_long_prompt_does_not_stall_others() {
        let mut stage = Stage::new(LIMITS);
        let mut sampling = stage.submit(prompt(0..5, 100));
        stage.round();
        assert!(sampling.try_recv().is_ok());
        let mut long = stage.submit(prompt(5..45, 100));
        let mut short = stage.submit(prompt(45..50, 100));
        for round in 0..6 {
            assert!(stage.round());
            // One token a round, while the prompts take their pieces in turn.
            assert!(sampling.try_recv().is_ok());
            assert!(sampling.try_recv().is_err());
            assert_eq!(short.try_recv().is_ok(), round >= 1, "{round}");
            assert_eq!(long.try_recv().is_ok(), round >= 5, "{round}");
        }
    }

    #[test]
    fn dropping_the_reader_ends_the_job_and_keeps_what_was_computed() {
        let mut stage = Stage::new(LIMITS);
        let one = prompt(0..10, 100);
        let mut reader = stage.submit(one.clone());
        let mut tokens = Vec::new();
        while tokens.len() < 5 {
            stage.round();
            tokens.extend(
                reader
                    .try_recv()
                    .into_iter()
                    .flat_map(|chunk| chunk.unwrap().tokens),
            );
        }
        let waiting = stage.submit(prompt(20..30, 100));
        drop((reader, waiting));
        assert_eq!(stage.accepted.load(Ordering::Relaxed), 2);
        assert!(stage.round());
        assert_eq!(stage.accepted.load(Ordering::Relaxed), 0);
        assert!(!stage.round());

        // The last of the five was sampled, but not computed.
        let more = rope(&one.tokens, tokens.into_iter().chain([1, 2]));
        let mut reader = stage.submit(prompt_of("a", &more, Sampling::greedy(1)));
        stage.round();
        let chunk = reader.try_recv().unwrap().unwrap();
        assert_eq!(chunk.cached_tokens, Some(14));
        assert_eq!(chunk.finish, Some(SampleEnd::Length));
    }

    #[test]
    fn a_job_whose_reader_is_behind_gives_up_its_turn() {
        let mut stage = Stage::new(Limits {
            jobs_max: 1,
            ..LIMITS
        });
        let mut slow = stage.submit(prompt(0..5, 20));
        let mut other = stage.submit(prompt(10..15, 20));
        for _ in 0..CHUNKS_MAX {
            assert!(stage.round());
            assert!(other.try_recv().is_err());
        }
        let mut tokens = 0;
        while tokens < 20 {
            assert!(stage.round());
            tokens += other
                .try_recv()
                .map_or(0, |chunk| chunk.unwrap().tokens.len());
        }
        assert!(!stage.round());
        assert_eq!(slow.len(), CHUNKS_MAX);
        assert!(slow.try_recv().is_ok());
        assert!(stage.round());
        assert!(!stage.round());
        assert_eq!(slow.len(), CHUNKS_MAX);
    }

    #[test]
    fn jobs_that_run_share_what_they_have_in_common() {
        let mut stage = Stage::new(LIMITS);
        let _first = stage.submit(prompt(0..30, 100));
        stage.round();
        stage.round();
        let mut second = stage.submit(prompt(0..40, 1));
        let chunk = loop {
            stage.round();
            if let Ok(chunk) = second.try_recv() {
                break chunk.unwrap();
            }
        };
        assert_eq!(chunk.cached_tokens, Some(16));
    }

    /// Whether this thread's bell was rung since it last rested.
    fn rung() -> bool {
        let start = Instant::now();
        thread::park_timeout(Duration::from_secs(20));
        start.elapsed() < Duration::from_secs(10)
    }

    #[test]
    fn reading_and_dropping_wake_the_engine() {
        let (chunks, receiver) = mpsc::channel(CHUNKS_MAX);
        let mut answer = Answer::Open {
            receiver,
            bell: Bell(thread::current()),
            works: Arc::default(),
        };
        chunks.try_send(Ok(Chunk::default())).unwrap();
        assert!(matches!(answer.next().now_or_never(), Some(Some(Ok(_)))));
        assert!(rung());
        drop(answer);
        assert!(rung());
        assert!(chunks.is_closed());
    }

    #[test]
    fn the_worker_ends_when_no_more_can_come_and_all_is_done() {
        let mut stage = Stage::new(LIMITS);
        let mut readers = [
            stage.submit(prompt(0..5, 9)),
            stage.submit(prompt(0..50, 3)),
        ];
        let Stage { worker, jobs, .. } = &mut stage;
        drop(std::mem::replace(jobs, sync_channel(1).0));
        worker.run();
        let [first, second] = &mut readers;
        assert_eq!((first.len(), second.len()), (9, 3));
    }

    #[test]
    fn when_the_thread_breaks_all_samples_fail_and_no_more_are_taken() {
        // A cache for fewer layers than the model has.
        let (model, layout) = model();
        let cache = Cache::new(
            Pool::new(
                KvLayout {
                    layers: 1,
                    ..layout
                },
                &device(),
            ),
            usize::MAX,
        );
        let engine = Engine::start(model, cache, LIMITS).unwrap();
        assert!(engine.works());
        let answers = [0, 1].map(|_| engine.submit(prompt(0..5, 9), Work::Sample, None));
        for answer in answers {
            assert!(read(answer).is_err());
        }
        assert!(!engine.works());
        let refused = read(engine.submit(prompt(0..5, 9), Work::Sample, None));
        assert_eq!(
            refused.unwrap_err(),
            BackendError::Unavailable {
                reason: STOPPED.into(),
                retry_after: None,
            }
        );
    }
}
