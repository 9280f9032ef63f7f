//! One sample, on as many replicas as it takes.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;
use sha2::{Digest as _, Sha256};

use super::{
    attempt::Attempt,
    fleet::{Fleet, Need, Untried},
    place,
};
use crate::{
    backend::{BackendError, Chunk, Prompt, SampleEnd, Sampling},
    ledger::Draft,
};

/// A sample, as who asks the router for it sees it.
///
/// ```text
///                another samples in its place
///                   ┌──────────┐
///                   ▼          │ it failed        the last chunk, or an error that stands
///               ┌───────┐ ─────┘ ────────────────────────────────────────────▶ ┌─────┐
///    begin ───▶ │running│                                                      │ended│
///               └───────┘ ◀──────────────────┐                                 └─────┘
///                   │                        │ one tells something, or fails
///                   │ nothing in hedge_ms    │
///                   │                    ┌──────┐
///                   └──────────────────▶ │racing│
///                                        └──────┘
/// ```
pub(super) struct Sample {
    state: State,
    rest: Rest,
}

enum State {
    /// One replica samples.
    Running(Attempt),
    /// Two do, and neither has told anything.
    Racing { first: Attempt, hedge: Attempt },
    /// None does, and nothing more comes.
    Ended,
}

/// What can still be tried.
struct Rest {
    fleet: Arc<Fleet>,
    untried: Untried,
    attempts: u32,
    hedges: u32,
    passed: Passed,
}

/// What was passed on, and so what another replica can do.
enum Passed {
    /// Nothing: it can sample the same prompt, which is kept where there is another.
    Nothing(Option<Prompt>),
    /// Tokens: it can go on behind them.
    Tokens {
        prompt: Prompt,
        sampled: Vec<u32>,
        /// One already has.
        continued: bool,
    },
    /// What nobody else can go on from.
    Final,
}

impl Sample {
    /// Begins on the best replica.
    ///
    /// # Errors
    ///
    /// None takes samples now.
    pub(super) fn begin(fleet: &Arc<Fleet>, prompt: Prompt) -> Result<Self, BackendError> {
        let options = &fleet.options;
        let mut untried = fleet.untried(&prompt);
        let Some(flight) = fleet.pick(&mut untried, Need::Sample) else {
            return Err(fleet.all_out());
        };
        let attempts = options.attempts_max.saturating_sub(1);
        let again = attempts > 0 && !untried.is_empty();
        let rest = Rest {
            fleet: fleet.clone(),
            untried,
            attempts,
            hedges: u32::from(again),
            passed: Passed::Nothing(again.then(|| prompt.clone())),
        };
        let hedge_after = options.hedge_after().filter(|_| again);
        let limit = options.first_token_time_max();
        Ok(Self {
            state: State::Running(Attempt::begin(flight, prompt, limit, hedge_after)),
            rest,
        })
    }
}

impl Stream for Sample {
    type Item = Result<Chunk, BackendError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { state, rest } = self.get_mut();
        loop {
            let (attempt, told) = match std::mem::replace(state, State::Ended) {
                State::Ended => return Poll::Ready(None),
                State::Running(mut attempt) => match attempt.poll(cx) {
                    Poll::Ready(told) => (attempt, told),
                    Poll::Pending => {
                        let slow = attempt.poll_slow(cx);
                        match slow.then(|| rest.hedge(&attempt)).flatten() {
                            Some(hedge) => {
                                let first = attempt;
                                *state = State::Racing { first, hedge };
                                continue;
                            }
                            None => {
                                *state = State::Running(attempt);
                                return Poll::Pending;
                            }
                        }
                    }
                },
                State::Racing {
                    mut first,
                    mut hedge,
                } => match race(&mut first, &mut hedge, cx) {
                    Poll::Pending => {
                        *state = State::Racing { first, hedge };
                        return Poll::Pending;
                    }
                    // The other one is dropped. A refusal is final, but for one that was not needed.
                    Poll::Ready((
                        Side::First,
                        told @ (Ok(_) | Err(BackendError::Refused { .. })),
                    )) => (first, told),
                    Poll::Ready((Side::Hedge, told @ Ok(_))) => (hedge, told),
                    Poll::Ready((Side::First, Err(error))) => {
                        first.lost(&error);
                        *state = State::Running(hedge);
                        continue;
                    }
                    Poll::Ready((Side::Hedge, Err(error))) => {
                        hedge.lost(&error);
                        *state = State::Running(first);
                        continue;
                    }
                },
            };
            match told {
                Ok(chunk) => {
                    let chunk = rest.pass_on(&attempt, chunk);
                    if chunk.finish.is_none() {
                        *state = State::Running(attempt);
                    }
                    return Poll::Ready(Some(Ok(chunk)));
                }
                Err(error) => match rest.after(attempt, error) {
                    Next::Attempt(attempt) => *state = State::Running(attempt),
                    Next::Last(last) => return Poll::Ready(Some(last)),
                },
            }
        }
    }
}

/// What comes after a failure.
enum Next {
    /// Another replica samples.
    Attempt(Attempt),
    /// This, and then nothing.
    Last(Result<Chunk, BackendError>),
}

/// Which of two that race.
enum Side {
    First,
    Hedge,
}

/// What the first of the two to tell something tells.
fn race(
    first: &mut Attempt,
    hedge: &mut Attempt,
    cx: &mut Context<'_>,
) -> Poll<(Side, Result<Chunk, BackendError>)> {
    match first.poll(cx) {
        Poll::Ready(told) => Poll::Ready((Side::First, told)),
        Poll::Pending => hedge.poll(cx).map(|told| (Side::Hedge, told)),
    }
}

impl Rest {
    /// Begins on one more replica, with what is still to be sampled.
    fn attempt(&mut self, need: Need) -> Option<Attempt> {
        if self.attempts == 0 {
            return None;
        }
        let prompt = match &self.passed {
            Passed::Nothing(prompt) => prompt.clone()?,
            Passed::Tokens {
                prompt, sampled, ..
            } => {
                self.fleet.keep_continuing(&mut self.untried);
                behind(prompt, sampled)
            }
            Passed::Final => return None,
        };
        let flight = self.fleet.pick(&mut self.untried, need)?;
        self.attempts -= 1;
        let options = &self.fleet.options;
        let may_hedge = self.hedges > 0 && self.attempts > 0;
        let hedge_after = options.hedge_after().filter(|_| may_hedge);
        let limit = options.first_token_time_max();
        Some(Attempt::begin(flight, prompt, limit, hedge_after))
    }

    /// Begins on a second replica beside a slow one, where another is well and has room.
    fn hedge(&mut self, slow: &Attempt) -> Option<Attempt> {
        self.hedges = self.hedges.checked_sub(1)?;
        let hedge = self.attempt(Need::Hedge)?;
        tracing::info!(
            replica = &**slow.replica(),
            other = &**hedge.replica(),
            "a replica is slow to begin, another samples beside it"
        );
        Some(hedge)
    }

    /// Takes note of a chunk that goes to who asked.
    fn pass_on(&mut self, from: &Attempt, mut chunk: Chunk) -> Chunk {
        match &mut self.passed {
            Passed::Tokens {
                sampled, continued, ..
            } if chunk.told.is_none() => {
                sampled.extend_from_slice(&chunk.tokens);
                if *continued {
                    // Who had the prompt first has told of it.
                    chunk.cached_tokens = None;
                }
            }
            Passed::Nothing(prompt) if chunk.told.is_none() && from.tells_tokens() => {
                let prompt = prompt.take().filter(|prompt| can_go_on(&prompt.sampling));
                self.passed = match prompt {
                    Some(prompt) => Passed::Tokens {
                        prompt,
                        sampled: chunk.tokens.clone(),
                        continued: false,
                    },
                    None => Passed::Final,
                };
            }
            Passed::Nothing(_) | Passed::Tokens { .. } | Passed::Final => {
                self.passed = Passed::Final;
            }
        }
        chunk
    }

    /// Ends an attempt with its error, and finds what comes after it.
    fn after(&mut self, attempt: Attempt, error: BackendError) -> Next {
        let replica = attempt.replica().clone();
        attempt.failed(&error);
        let refused = matches!(error, BackendError::Refused { .. });
        let tokens = match &mut self.passed {
            Passed::Nothing(_) if refused => return Next::Last(Err(error)),
            Passed::Tokens {
                prompt, sampled, ..
            } if let Some(finish) = end_of(&prompt.sampling, sampled) => {
                return Next::Last(Ok(Chunk {
                    finish: Some(finish),
                    ..Chunk::default()
                }));
            }
            Passed::Tokens {
                sampled, continued, ..
            } => {
                *continued = true;
                sampled.len()
            }
            Passed::Nothing(_) | Passed::Final => 0,
        };
        let next = (!refused).then(|| self.attempt(Need::Sample)).flatten();
        let other = next.as_ref().map(|next| &**next.replica());
        tracing::warn!(replica = &*replica, reason = %error, tokens, other, "a replica failed");
        match (next, &self.passed) {
            (Some(next), _) => Next::Attempt(next),
            (None, Passed::Nothing(_)) => Next::Last(Err(self.fleet.begun_nowhere(error))),
            (None, Passed::Tokens { .. } | Passed::Final) => Next::Last(Err(error.in_the_middle())),
        }
    }
}

/// Whether a sample can be ended by another than began it: a grammar begins with its sample, and
/// penalties count the tokens of it.
fn can_go_on(sampling: &Sampling) -> bool {
    sampling.grammar.is_none()
        && sampling.presence_penalty == 0.0
        && sampling.frequency_penalty == 0.0
}

/// The prompt for what is left of a sample. Samplers begin anew with it: one that drew the same
/// numbers again would favour what it drew before, so the seed is another one, always the same
/// for the same tokens.
fn behind(prompt: &Prompt, sampled: &[u32]) -> Prompt {
    let seed = prompt.sampling.seed.map(|seed| {
        let mut hash = Sha256::new_with_prefix(seed.to_le_bytes());
        for id in sampled {
            hash.update(id.to_le_bytes());
        }
        place::first_u64(hash)
    });
    let left = (prompt.sampling.max_tokens as usize).saturating_sub(sampled.len());
    let tokens = prompt.tokens.with_sampled(Draft {
        ids: sampled.to_vec(),
        ..Draft::default()
    });
    Prompt {
        tokens,
        sampling: Sampling {
            max_tokens: left.max(1) as u32,
            seed,
            ..prompt.sampling.clone()
        },
        ..prompt.clone()
    }
}

/// How a sample ended whose replica failed before it said so. `None`: it had not ended.
fn end_of(sampling: &Sampling, sampled: &[u32]) -> Option<SampleEnd> {
    let last = sampled.last();
    if last.is_some_and(|last| sampling.end_tokens.contains(last)) {
        return Some(SampleEnd::Stop);
    }
    (sampled.len() >= sampling.max_tokens as usize).then_some(SampleEnd::Length)
}
