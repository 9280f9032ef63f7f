//! A sample on one replica.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Sleep, sleep};

use super::fleet::Flight;
use crate::backend::{BackendError, Chunk, Chunks, Prompt};

/// A sample on one replica. Dropping it cancels it there.
pub(super) struct Attempt {
    /// Before the flight: it counts until it is cancelled.
    chunks: Chunks,
    flight: Flight,
    stage: Stage,
}

type Timer = Pin<Box<Sleep>>;

enum Stage {
    /// It has told nothing.
    Waiting {
        /// What it has told of its cache, which goes with the first chunk.
        cached_tokens: Option<u32>,
        /// When it counts as failed.
        limit: Option<Timer>,
        /// When a second one is begun.
        hedge: Option<Timer>,
    },
    /// It has told something.
    Telling,
}

impl Attempt {
    pub(super) fn begin(
        flight: Flight,
        prompt: Prompt,
        first_token_time_max: Option<Duration>,
        hedge_after: Option<Duration>,
    ) -> Self {
        let timer = |time| Box::pin(sleep(time));
        Self {
            chunks: flight.member().backend.sample(prompt),
            flight,
            stage: Stage::Waiting {
                cached_tokens: None,
                limit: first_token_time_max.map(timer),
                hedge: hedge_after.map(timer),
            },
        }
    }

    pub(super) fn replica(&self) -> &Arc<str> {
        &self.flight.member().name
    }

    /// Whether another replica can go on with the tokens that it tells.
    pub(super) fn tells_tokens(&self) -> bool {
        self.flight.member().continues()
    }

    /// The next chunk that says something, or why there is none: a sample that ends without saying
    /// why has failed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Chunk, BackendError>> {
        loop {
            let Poll::Ready(next) = self.chunks.as_mut().poll_next(cx) else {
                return self.poll_limit(cx).map(Err);
            };
            let mut chunk = match next {
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Err(failed("it ended the sample without saying why"))),
            };
            if let Stage::Waiting { cached_tokens, .. } = &mut self.stage {
                chunk.cached_tokens = chunk.cached_tokens.or(*cached_tokens);
                if chunk.tokens.is_empty() && chunk.told.is_none() && chunk.finish.is_none() {
                    *cached_tokens = chunk.cached_tokens;
                    continue;
                }
                self.stage = Stage::Telling;
                self.flight.answered();
            }
            return Poll::Ready(Ok(chunk));
        }
    }

    fn poll_limit(&mut self, cx: &mut Context<'_>) -> Poll<BackendError> {
        let Stage::Waiting {
            limit: Some(limit), ..
        } = &mut self.stage
        else {
            return Poll::Pending;
        };
        ready!(limit.as_mut().poll(cx));
        Poll::Ready(failed("its first token took too long"))
    }

    /// Whether it has become time for a second one. Says so once.
    pub(super) fn poll_slow(&mut self, cx: &mut Context<'_>) -> bool {
        let Stage::Waiting { hedge, .. } = &mut self.stage else {
            return false;
        };
        hedge
            .take_if(|timer| timer.as_mut().poll(cx).is_ready())
            .is_some()
    }

    /// It ended with this error.
    pub(super) fn failed(self, error: &BackendError) {
        self.flight.failed(error);
    }

    /// It ended with this error, while another samples beside it.
    pub(super) fn lost(self, error: &BackendError) {
        tracing::warn!(
            replica = &**self.replica(),
            reason = %error,
            "a replica failed while another samples beside it"
        );
        self.failed(error);
    }
}

fn failed(reason: &str) -> BackendError {
    BackendError::Failed {
        reason: reason.to_owned(),
    }
}
