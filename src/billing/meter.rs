//! The meter of one response: counts while it samples, and the one settlement at its end.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::{Counts, Pace, Record, Reservation, Served, Settlement, now_ms, queue::Behind};
use crate::event::{Charged, Receipt};

/// The meter of one response. Dropping it settles the record as `abandoned`, with what was counted.
pub struct Meter {
    entry: Arc<Entry>,
    writing: Option<Writing>,
    totals: Arc<Mutex<Charged>>,
    counts: Counts,
    /// How the record is settled where nobody does. `None` once it is.
    otherwise: Option<Settlement>,
}

/// Where a meter writes to, and when next.
struct Writing {
    behind: Arc<Behind>,
    pace: Pace,
    next_tokens: u64,
    next_at: Instant,
}

/// A record that is not written yet as it will stay. It holds its room until then.
pub(super) struct Entry {
    id: Arc<str>,
    reservation: Reservation,
    price_book_version: Arc<str>,
    began: Instant,
    state: Mutex<State>,
    _room: Option<OwnedSemaphorePermit>,
}

struct State {
    served: Served,
    counts: Counts,
    settled: Option<Settled>,
    /// It waits to be written.
    queued: bool,
}

/// How it ended, and when: as a date, and how long after it began.
struct Settled {
    settlement: Settlement,
    at_ms: u64,
    stream_ms: u64,
}

impl Entry {
    /// How long ago it began.
    fn age_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The record as it stands now. What changes later must be queued again.
    pub(super) fn take(&self) -> Record {
        let mut state = self.state.lock();
        state.queued = false;
        let reserved = &self.reservation;
        let settled = state.settled.as_ref();
        let text = |of: fn(&Settlement) -> &'static str| {
            settled.map_or("", |it| of(&it.settlement)).into()
        };
        Record {
            id: self.id.clone(),
            response: reserved.response.as_str().into(),
            tenant: reserved.tenant.as_str().into(),
            key: reserved.key.clone(),
            session: reserved.session.clone(),
            model_asked: reserved.model_asked.clone(),
            model_served: state.served.model.clone(),
            backend: state.served.backend.clone(),
            counts: state.counts,
            stream_ms: settled.map_or_else(|| self.age_ms(), |it| it.stream_ms),
            end: text(|it| it.end),
            reason: text(|it| it.reason),
            finish: text(|it| it.finish),
            price_book_version: self.price_book_version.clone(),
            reserved_at_ms: reserved.reserved_at_ms,
            settled_at_ms: settled.map(|it| it.at_ms),
        }
    }
}

impl Meter {
    /// One that writes nothing but the log.
    pub(super) fn logged(id: Arc<str>, reservation: Reservation, version: Arc<str>) -> Self {
        Self::new(id, reservation, version, None)
    }

    /// One that is written, from now on, with the room for it.
    pub(super) fn written(
        id: Arc<str>,
        reservation: Reservation,
        version: Arc<str>,
        to: (Arc<Behind>, Pace, OwnedSemaphorePermit),
    ) -> Self {
        let (behind, pace, room) = to;
        let mut meter = Self::new(id, reservation, version, Some(room));
        meter.writing = Some(Writing {
            behind,
            pace,
            next_tokens: pace.tokens,
            next_at: Instant::now() + pace.time,
        });
        meter.write(|_| {});
        meter
    }

    fn new(
        id: Arc<str>,
        reservation: Reservation,
        price_book_version: Arc<str>,
        room: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let state = State {
            served: reservation.served.clone(),
            counts: Counts::default(),
            settled: None,
            queued: false,
        };
        Self {
            entry: Arc::new(Entry {
                id,
                reservation,
                price_book_version,
                began: Instant::now(),
                state: Mutex::new(state),
                _room: room,
            }),
            writing: None,
            totals: Arc::default(),
            counts: Counts::default(),
            otherwise: Some(Settlement::REFUSED),
        }
    }

    /// The response is dispatched; what it settles is added to these totals.
    pub(super) fn on(mut self, totals: Arc<Mutex<Charged>>) -> Self {
        self.totals = totals;
        self.otherwise = Some(Settlement::ABANDONED);
        self
    }

    /// Another model serves it from here on.
    pub fn serve(&mut self, served: Served) {
        self.entry.state.lock().served = served;
    }

    /// What was counted so far. Costs a comparison, but once in a while, when it is written: behind
    /// the loop's back.
    pub fn checkpoint(&mut self, counts: Counts) {
        self.counts = counts;
        let Some(writing) = &mut self.writing else {
            return;
        };
        let due = counts.output_tokens >= writing.next_tokens || Instant::now() >= writing.next_at;
        if due {
            writing.next_tokens = counts.output_tokens.saturating_add(writing.pace.tokens);
            writing.next_at = Instant::now() + writing.pace.time;
            self.write(|state| state.counts = counts);
        }
    }

    /// What a client is told while the response goes on.
    #[must_use]
    pub fn receipt(&self, counts: Counts) -> Receipt {
        let response = counts.charged();
        Receipt {
            record_id: self.entry.id.clone(),
            response,
            stream: *self.totals.lock() + response,
        }
    }

    /// Settles the record: in memory when this returns, on the disk soon after.
    pub fn settle(mut self, settlement: Settlement, counts: Counts) -> Receipt {
        self.close(settlement, counts)
    }

    fn close(&mut self, settlement: Settlement, counts: Counts) -> Receipt {
        self.otherwise = None;
        log(&settlement, &counts);
        let settled = Settled {
            settlement,
            at_ms: now_ms(),
            stream_ms: self.entry.age_ms(),
        };
        self.write(|state| {
            state.counts = counts;
            state.settled = Some(settled);
        });
        let response = counts.charged();
        let mut totals = self.totals.lock();
        *totals = *totals + response;
        Receipt {
            record_id: self.entry.id.clone(),
            response,
            stream: *totals,
        }
    }

    /// Changes the record, and queues it where it is not queued yet.
    fn write(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.entry.state.lock();
        change(&mut state);
        let Some(writing) = &self.writing else {
            return;
        };
        if !std::mem::replace(&mut state.queued, true) {
            drop(state);
            writing.behind.queue(self.entry.clone());
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(settlement) = self.otherwise.take() {
            self.close(settlement, self.counts);
        }
    }
}

fn log(settlement: &Settlement, counts: &Counts) {
    tracing::info!(
        target: "hotloop::usage",
        end = settlement.end,
        input_tokens = counts.input_tokens,
        cached_tokens = counts.cached_tokens,
        output_tokens = counts.output_tokens,
        samples = counts.samples,
        "usage"
    );
}
