//! The breaker of what is asked over a network, a replica or a classifier: leaves it alone for a while after it has
//! failed often enough.

use std::{ops::RangeInclusive, time::Duration};

use tokio::time::Instant;

use super::BackendError;

/// The longest that a replica is believed which says when it is to be asked again.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// Whether a replica is given samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Yes.
    Closed,
    /// Not now: it has failed too often.
    Open,
    /// One, to see whether it is well again.
    HalfOpen,
}

/// The breaker of a replica.
///
/// ```text
///             failures_max failures in a row
///   ┌──────┐ ──────────────────────────────▶ ┌──────┐
///   │closed│                                 │ open │ ◀───────────────┐
///   └──────┘                                 └──────┘                 │
///       ▲                                        │ the pause is over  │ it fails: a pause
///       │ its first chunk comes                  │ and a sample comes │ twice as long
///       │               ┌─────────┐              │                    │
///       └────────────── │half-open│ ◀────────────┘                    │
///                       └─────────┘ ──────────────────────────────────┘
/// ```
///
/// Half-open one sample is on trial. If it is dropped before it has told anything, the next one is.
/// A trial closes the breaker with its first chunk, since a sample may take minutes, but only a
/// sample that went well forgives the failures before: until then a single one opens it again.
/// What began before the breaker opened changes nothing when it ends after.
///
/// Beside that, a replica that says when it is to be asked again is left alone until then, and has
/// not failed.
#[derive(Debug)]
pub(crate) struct Breaker {
    state: State,
    /// In a row, those of trials included.
    failures: u32,
    /// It takes nothing until then, and said so.
    away_until: Option<Instant>,
    failures_max: u32,
    pause_min: Duration,
    pause_max: Duration,
}

#[derive(Debug)]
enum State {
    Closed,
    /// Until then; after it, for as long as nobody asked.
    Open {
        until: Instant,
    },
    /// A sample is on trial.
    HalfOpen,
}

/// The leave to sample once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permit {
    /// The breaker is closed.
    Ordinary,
    /// The sample on trial.
    Trial,
}

/// How a sample went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It told something, and was ended by the replica or by who asked.
    Worked,
    /// The replica failed.
    Failed,
    /// The replica is to be asked again after this time.
    Away(Duration),
    /// It ended before it could be known.
    Unknown,
}

impl Outcome {
    /// Of a sample that ended with this error.
    pub(crate) fn of(error: &BackendError) -> Self {
        match error {
            BackendError::Failed { .. }
            | BackendError::Unavailable {
                retry_after: None, ..
            } => Self::Failed,
            BackendError::Unavailable {
                retry_after: Some(after),
                ..
            } => Self::Away(*after),
            // It is the prompt that is at fault.
            BackendError::Refused { .. } => Self::Unknown,
        }
    }
}

/// What became of a breaker, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// It has opened.
    Opened {
        /// For so long.
        pause: Duration,
    },
    /// It has closed.
    Closed,
}

impl Breaker {
    /// A closed one, which opens after so many failures in a row, for so long: at first the shortest pause.
    pub(crate) fn new(failures_max: u32, pauses: RangeInclusive<Duration>) -> Self {
        Self {
            state: State::Closed,
            failures: 0,
            away_until: None,
            failures_max,
            pause_min: *pauses.start(),
            pause_max: *pauses.end(),
        }
    }

    pub(crate) fn state(&self, now: Instant) -> BreakerState {
        match self.state {
            State::Closed => BreakerState::Closed,
            State::Open { until } if now < until => BreakerState::Open,
            State::Open { .. } | State::HalfOpen => BreakerState::HalfOpen,
        }
    }

    /// Failures in a row.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// When it gives a permit again: now, later, or, `None`, when the trial is over.
    pub(crate) fn admits_at(&self, now: Instant) -> Option<Instant> {
        let open_until = match self.state {
            State::Closed => now,
            State::Open { until } => until.max(now),
            State::HalfOpen => return None,
        };
        Some(open_until.max(self.away_until.unwrap_or(now)))
    }

    /// Leave to sample, where it can be given.
    pub(crate) fn admit(&mut self, now: Instant) -> Option<Permit> {
        if self.admits_at(now)? > now {
            return None;
        }
        Some(match self.state {
            State::Closed => Permit::Ordinary,
            State::Open { .. } | State::HalfOpen => {
                self.state = State::HalfOpen;
                Permit::Trial
            }
        })
    }

    /// The sample has told something: if it was on trial, it is so no longer.
    pub(crate) fn answered(&mut self, permit: &mut Permit) -> Option<Change> {
        match permit {
            Permit::Ordinary => None,
            Permit::Trial => {
                *permit = Permit::Ordinary;
                self.state = State::Closed;
                Some(Change::Closed)
            }
        }
    }

    /// The sample is over. `jitter`, from 0 to 1, lengthens a pause by up to a half, so that not
    /// all servers ask a replica again at once.
    pub(crate) fn settle(
        &mut self,
        permit: Permit,
        outcome: Outcome,
        now: Instant,
        jitter: f64,
    ) -> Option<Change> {
        if let Outcome::Away(after) = outcome {
            let until = now + after.min(AWAY_MAX);
            self.away_until = self.away_until.max(Some(until));
        }
        match (&self.state, permit, outcome) {
            (State::Closed, Permit::Ordinary, Outcome::Worked) => {
                self.failures = 0;
                None
            }
            (State::Closed, Permit::Ordinary, Outcome::Failed)
            | (State::HalfOpen, Permit::Trial, Outcome::Failed) => {
                self.failures = self.failures.saturating_add(1);
                (self.failures >= self.failures_max).then(|| {
                    let pause = self.pause(jitter);
                    self.state = State::Open { until: now + pause };
                    Change::Opened { pause }
                })
            }
            (State::HalfOpen, Permit::Trial, Outcome::Worked) => {
                self.failures = 0;
                self.state = State::Closed;
                Some(Change::Closed)
            }
            (State::HalfOpen, Permit::Trial, Outcome::Away(_) | Outcome::Unknown) => {
                self.state = State::Open { until: now };
                None
            }
            (State::Closed, Permit::Ordinary, Outcome::Away(_) | Outcome::Unknown) => None,
            // It began before the breaker opened.
            (State::Open { .. } | State::HalfOpen, Permit::Ordinary, _) => None,
            // Only the trial itself ends the state that it is on trial in.
            (State::Closed | State::Open { .. }, Permit::Trial, _) => None,
        }
    }

    /// How long it stays open after the last failure.
    fn pause(&self, jitter: f64) -> Duration {
        let doublings = self.failures.saturating_sub(self.failures_max).min(31);
        let pause = self.pause_min.saturating_mul(1 << doublings);
        let pause = pause.min(self.pause_max);
        (pause + pause.mul_f64(jitter / 2.0)).min(self.pause_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker() -> Breaker {
        Breaker::new(3, Duration::from_millis(500)..=Duration::from_secs(3))
    }

    /// Where it stands some milliseconds after the start, and what happens there.
    struct Transcript {
        breaker: Breaker,
        start: Instant,
    }

    impl Transcript {
        fn new() -> Self {
            Self {
                breaker: breaker(),
                start: Instant::now(),
            }
        }

        fn at(&self, millis: u64) -> Instant {
            self.start + Duration::from_millis(millis)
        }

        fn admit(&mut self, millis: u64) -> Option<Permit> {
            self.breaker.admit(self.at(millis))
        }

        fn settle(&mut self, millis: u64, permit: Permit, outcome: Outcome) -> String {
            let now = self.at(millis);
            let change = self.breaker.settle(permit, outcome, now, 0.0);
            let state = self.breaker.state(now);
            match change {
                Some(change) => format!("{change:?}, {state:?}, {}", self.breaker.failures()),
                None => format!("{state:?}, {}", self.breaker.failures()),
            }
        }

        fn state(&self, millis: u64) -> BreakerState {
            self.breaker.state(self.at(millis))
        }
    }

    use Permit::{Ordinary, Trial};

    #[test]
    fn it_opens_tries_and_closes() {
        let mut it = Transcript::new();
        for (millis, expected) in [(0, "Closed, 1"), (1, "Closed, 2")] {
            assert_eq!(it.admit(millis), Some(Ordinary));
            assert_eq!(it.settle(millis, Ordinary, Outcome::Failed), expected);
        }
        assert_eq!(
            it.settle(2, Ordinary, Outcome::Failed),
            "Opened { pause: 500ms }, Open, 3"
        );
        // What began before changes nothing.
        assert_eq!(it.settle(3, Ordinary, Outcome::Failed), "Open, 3");
        assert_eq!(it.settle(4, Ordinary, Outcome::Worked), "Open, 3");
        assert_eq!(it.admit(501), None);
        assert_eq!(it.breaker.admits_at(it.at(501)), Some(it.at(502)));
        assert_eq!(it.state(502), BreakerState::HalfOpen);

        // One trial at a time.
        assert_eq!(it.admit(502), Some(Trial));
        assert_eq!(
            (it.admit(503), it.breaker.admits_at(it.at(503))),
            (None, None)
        );
        assert_eq!(it.settle(600, Ordinary, Outcome::Worked), "HalfOpen, 3");
        assert_eq!(
            it.settle(600, Trial, Outcome::Failed),
            "Opened { pause: 1s }, Open, 4"
        );
        assert_eq!(it.admit(1_599), None);
        assert_eq!(it.admit(1_600), Some(Trial));
        // Dropped early: the next one is on trial at once.
        assert_eq!(it.settle(1_700, Trial, Outcome::Unknown), "HalfOpen, 4");
        assert_eq!(it.admit(1_700), Some(Trial));
        assert_eq!(
            it.settle(1_700, Trial, Outcome::Failed),
            "Opened { pause: 2s }, Open, 5"
        );
        assert_eq!(it.admit(3_700), Some(Trial));
        assert_eq!(
            it.settle(3_700, Trial, Outcome::Failed),
            "Opened { pause: 3s }, Open, 6"
        );
        assert_eq!(it.admit(6_700), Some(Trial));
        assert_eq!(
            it.settle(6_700, Trial, Outcome::Worked),
            "Closed, Closed, 0"
        );
        assert_eq!(it.admit(6_700), Some(Ordinary));
    }

    #[test]
    fn a_trial_closes_it_with_its_first_chunk_and_one_failure_opens_it_again() {
        let mut it = Transcript::new();
        for _ in 0..3 {
            it.settle(0, Ordinary, Outcome::Failed);
        }
        let mut permit = it.admit(500).unwrap();
        assert_eq!(it.breaker.answered(&mut permit), Some(Change::Closed));
        assert_eq!((permit, it.admit(500)), (Ordinary, Some(Ordinary)));
        assert_eq!(
            it.settle(600, permit, Outcome::Failed),
            "Opened { pause: 1s }, Open, 4"
        );
        let mut permit = it.admit(1_600).unwrap();
        assert_eq!(it.breaker.answered(&mut permit), Some(Change::Closed));
        assert_eq!(it.breaker.answered(&mut permit), None);
        assert_eq!(it.settle(1_700, permit, Outcome::Worked), "Closed, 0");
        assert_eq!(it.settle(1_700, Ordinary, Outcome::Failed), "Closed, 1");
    }

    #[test]
    fn a_success_forgives_the_failures_before_it() {
        let mut it = Transcript::new();
        it.settle(0, Ordinary, Outcome::Failed);
        it.settle(0, Ordinary, Outcome::Failed);
        assert_eq!(it.settle(0, Ordinary, Outcome::Unknown), "Closed, 2");
        assert_eq!(it.settle(0, Ordinary, Outcome::Worked), "Closed, 0");
    }

    #[test]
    fn a_replica_that_says_when_is_left_alone_until_then() {
        let mut it = Transcript::new();
        let away = |secs| Outcome::Away(Duration::from_secs(secs));
        assert_eq!(it.settle(0, Ordinary, away(2)), "Closed, 0");
        // A shorter time told later does not shorten it.
        assert_eq!(it.settle(0, Ordinary, away(1)), "Closed, 0");
        assert_eq!(it.admit(1_999), None);
        assert_eq!(it.admit(2_000), Some(Ordinary));
        assert_eq!(it.settle(2_000, Ordinary, away(3_600)), "Closed, 0");
        assert_eq!(it.breaker.admits_at(it.at(2_000)), Some(it.at(62_000)));

        for _ in 0..3 {
            it.settle(62_000, Ordinary, Outcome::Failed);
        }
        assert_eq!(it.admit(62_500), Some(Trial));
        assert_eq!(it.settle(62_500, Trial, away(1)), "HalfOpen, 3");
        assert_eq!((it.admit(63_499), it.admit(63_500)), (None, Some(Trial)));
    }

    #[test]
    fn jitter_lengthens_a_pause_by_up_to_a_half_and_not_over_the_longest() {
        let mut breaker = breaker();
        breaker.failures = 3;
        let millis = [0.0, 0.5, 1.0].map(|jitter| breaker.pause(jitter).as_millis());
        assert_eq!(millis, [500, 625, 750]);
        breaker.failures = 5;
        assert_eq!(breaker.pause(1.0).as_millis(), 3_000);
        breaker.failures = u32::MAX;
        assert_eq!(breaker.pause(0.3).as_millis(), 3_000);
    }
}
