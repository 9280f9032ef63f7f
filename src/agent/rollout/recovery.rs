//! What a rollout does when something breaks: a command is refused, a response fails, or the
//! stream is lost.
//!
//! Nothing here sends. It decides from where the rollout goes on, and leaves that in the state for
//! the next time that something is due.

use std::{io::Write, time::Duration};

use tokio::time::Instant;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{Open, Phase, Resumable, Rollout, Start};
use crate::{
    agent::{AgentError, Outcome},
    proto::{Done, Error, Retry},
};

/// How often in a row something that was refused is tried again.
const RETRIES_MAX: u32 = 5;
/// How often in a row a stream may be lost: the second loss makes the agent resend everything.
const LOSSES_MAX: u32 = 2;
/// The wait before the first retry where the server names none; it doubles each time.
const RETRY_DELAY: Duration = Duration::from_millis(200);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(60);

impl<W: Write> Rollout<W> {
    /// A response broke. Its parent is as it was, but tools that it called have run: then what
    /// they found is kept, and the whole is sent again.
    pub(super) fn on_failed(&mut self, done: Done) -> Result<Option<Outcome>, AgentError> {
        let error = done.error.unwrap_or_default();
        let has_items = self.open.as_ref().is_some_and(|open| open.has_items);
        self.due = Some(match error.retry() {
            Retry::Never | Retry::Unspecified => return Err(refused(error)),
            // The server kept what it had handed out.
            Retry::Safe if has_items && !done.output_item_ids.is_empty() => {
                self.close_response();
                Start::Continue
            }
            Retry::ResendFull => Start::Whole,
            Retry::Safe if has_items => Start::Whole,
            Retry::Safe => Start::Again,
        });
        self.open = None;
        self.retry_later(&error)?;
        if matches!(self.phase, Phase::Finishing(_)) {
            self.collect();
        }
        Ok(None)
    }

    /// A command was refused, and nothing of it was kept.
    pub(super) fn on_error(
        &mut self,
        request_id: &str,
        error: Error,
    ) -> Result<Option<Outcome>, AgentError> {
        match self.phase {
            // The cancel crossed the end of the response, or the create was refused anyway.
            Phase::Cancelling { .. } => return Ok(Some(Outcome::Interrupted)),
            // The finish crossed the end of the response, whose `done` tells more.
            Phase::Finishing(_) => return Ok(None),
            Phase::Sampling | Phase::Collecting { .. } => {}
        }
        if matches!(error.code.as_str(), "draining" | "stream_age_limit_reached") {
            self.leaving.get_or_insert(Resumable(true));
        }
        let append = self.unaccepted.iter().position(|(id, _)| id == request_id);
        if let Some(index) = append {
            let (_, item) = self.unaccepted.remove(index);
            self.unsent.push(item);
            if self.open.is_none() {
                // The response ended first, and the next create carries the output anyway.
                return Ok(None);
            }
        } else if request_id.is_empty() {
            return Err(refused(error));
        } else if request_id != self.last.0 {
            // An answer to something that a new start has made pointless.
            return Ok(None);
        }
        let resumes = append.is_none() && self.losses + self.retries > 0;
        match error.retry() {
            Retry::Safe if append.is_some() => {
                // The round was over with this output, and is not: the server waits for it.
                if self.round.calls.is_empty() {
                    self.collect();
                }
            }
            Retry::Safe => self.due = Some(Start::Again),
            Retry::ResendFull => self.restart(),
            // After a loss or an interruption the two sides may disagree about what has arrived.
            // The history settles it.
            Retry::Never | Retry::Unspecified
                if resumes && !self.last.1.previous_response_id.is_empty() =>
            {
                self.restart();
            }
            Retry::Never | Retry::Unspecified => return Err(refused(error)),
        }
        self.retry_later(&error)?;
        Ok(None)
    }

    /// The server no longer has the conversation: nothing of it is open, all of it is sent again.
    fn restart(&mut self) {
        self.open = None;
        self.parent = None;
        self.due = Some(Start::Whole);
    }

    /// Puts off everything that is to be sent, at most [`RETRIES_MAX`] times in a row.
    pub(super) fn retry_later(&mut self, error: &Error) -> Result<(), AgentError> {
        if self.retries == RETRIES_MAX {
            return Err(refused(error.clone()));
        }
        let delay = match error.retry_after_ms {
            0 => RETRY_DELAY * 2_u32.pow(self.retries),
            milliseconds => Duration::from_millis(milliseconds.into()),
        };
        self.retries += 1;
        self.wait_until = Some(Instant::now() + delay.min(RETRY_DELAY_MAX));
        let note = format!("{}: {}; trying again", error.code, error.message);
        self.screen.note(&note)?;
        Ok(())
    }

    pub(super) fn on_stream_ended(
        &mut self,
        status: Option<Status>,
    ) -> Result<Option<Outcome>, AgentError> {
        self.link = None;
        if matches!(self.phase, Phase::Cancelling { .. }) {
            return Ok(Some(Outcome::Interrupted));
        }
        let status = status.unwrap_or_else(|| Status::unavailable("the server ended the stream"));
        self.lose(&status)?;
        Ok(None)
    }

    /// The stream is gone, or could not be had. Finds out from where to go on.
    pub(super) fn lose(&mut self, status: &Status) -> Result<(), AgentError> {
        self.link = None;
        if is_final(status.code()) {
            return Err(AgentError::Closed {
                code: status.code().description().to_owned(),
                message: status.message().to_owned(),
            });
        }
        let announced = self.leaving.take();
        if announced.is_none() {
            self.losses += 1;
        }
        if self.losses > LOSSES_MAX {
            return Err(AgentError::Lost {
                losses: self.losses,
                last: status.message().to_owned(),
            });
        }
        self.screen
            .note(&format!("the stream was lost ({})", status.message()))?;
        let open = self.open.take();
        let resumable = announced.is_none_or(|Resumable(resumable)| resumable);
        if self.losses == LOSSES_MAX || !resumable {
            self.restart();
        } else if let Some(Open {
            id,
            has_items: true,
            ..
        }) = open
        {
            self.parent = Some(id);
            self.due = Some(Start::Continue);
            self.collect();
        } else if matches!(self.phase, Phase::Sampling) {
            // Its create may never have arrived, and nothing of it has been seen.
            self.due.get_or_insert(Start::Again);
        }
        // Otherwise nothing was in progress: the next create opens a stream when it is due.
        if matches!(self.phase, Phase::Finishing(_)) {
            self.collect();
        }
        let asked = status
            .get_details_retry_info()
            .and_then(|info| info.retry_delay);
        let delay = asked.unwrap_or(RETRY_DELAY * self.losses.saturating_sub(1));
        self.wait_until = Some(Instant::now() + delay.min(RETRY_DELAY_MAX));
        Ok(())
    }
}

fn refused(error: Error) -> AgentError {
    AgentError::Refused {
        code: error.code,
        message: error.message,
    }
}

/// Whether a stream that ended with this code would end the same way again.
fn is_final(code: Code) -> bool {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => true,
        // A lost connection has many codes: h2 reports it as unknown, internal or cancelled.
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable => false,
    }
}
