//! Usage: one record for every response, on every way out, however it ended.
//!
//! ```text
//!   lane ── begin ──▶ Meter ── checkpoint, settle ──▶ queue ── one writer, many records a transaction ──▶ Journal (a file)
//!             ▲                                         │                                                    │
//!             └──── room for the record, until it is written                            Exporter ◀── settled, in order
//! ```
//!
//! A record has two phases. It is reserved when the response is dispatched, before anything is
//! sampled, and settled once, when it has ended. In between the counts are checkpointed, so that
//! a process that is killed loses only what was sampled since: the next start settles what
//! it finds reserved. A [`Meter`] that is dropped settles itself, so no way out is without a record.
//!
//! All of it is written behind the loop's back by one thread. What a record needs is reserved with
//! it: a create for which there is no room waits or is refused ([`AtBound`]), and a settlement
//! always has room. So no token is sampled that could not be recorded, and `done` waits for no disk.

mod cloudevents;
mod export;
mod journal;
mod jsonl;
mod kafka;
mod meter;
mod postgres;
mod queue;
mod record;

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    event::{Charged, now_ms},
    item::{ResponseId, Tenant},
};

pub use cloudevents::CloudEvents;
pub use export::{Export, Exporter, Retries};
pub use journal::{Busy, Journal, JournalError, OpenError};
pub use jsonl::Jsonl;
pub use kafka::{Kafka, KafkaOptions, Login, Sasl};
pub use meter::Meter;
pub use postgres::{Postgres, UrlError};
pub use queue::{Billing, Change, Medium, MediumError};
pub use record::{Counts, Record, Reservation, Served, Settlement, Tally, record_id};

/// Keeps the usage of responses.
pub trait Biller: Send + Sync + 'static {
    /// Begins the record of a response that is about to be dispatched.
    ///
    /// # Errors
    ///
    /// [`Full`]: it could not be recorded now, and so must not be sampled.
    ///
    /// # Cancellation
    ///
    /// Safe: nothing was begun.
    fn begin(&self, reservation: Reservation) -> BoxFuture<'_, Result<Meter, Full>>;

    /// Waits until everything that was settled before is safe.
    ///
    /// # Cancellation
    ///
    /// Safe: nothing is lost.
    fn flush(&self) -> BoxFuture<'_, ()>;
}

/// There is no room for another record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many usage records wait to be written")]
pub struct Full;

/// What happens to a create when as many records wait as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AtBound {
    /// It waits for room, for a bounded time.
    #[default]
    Block,
    /// It is refused at once.
    Shed,
}

/// When a transaction of the journal counts as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// When the operating system has it: it survives the end of the process, and a power failure
    /// may take the last transactions.
    #[default]
    Normal,
    /// When the disk has it.
    Full,
}

/// Whether a response waits for its reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reserve {
    /// No: it is written behind the loop's back. A process that is killed may leave a response of which a
    /// client has seen the first events, and which has no record.
    #[default]
    Behind,
    /// Yes: it is dispatched, and a client hears of it, once its reservation is written.
    First,
}

/// How much waits, and how often it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BillingOptions {
    /// Records that are begun and not yet written as settled.
    pub backlog_records_max: usize,
    /// What happens at that number.
    pub at_bound: AtBound,
    /// How long a create waits for room, or for its reservation.
    pub block_time_max: Duration,
    /// Whether it waits for its reservation.
    pub reserve: Reserve,
    /// When the counts of a response that samples are written.
    pub pace: Pace,
    /// How long a record is kept that is settled and exported.
    pub retention: Duration,
    /// Goes into every record.
    pub price_book_version: Arc<str>,
}

/// When the counts of a response that samples are written: whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// After so many sampled tokens.
    pub tokens: u64,
    /// After so much time.
    pub time: Duration,
}

/// Keeps nothing: usage is told in the log alone.
#[derive(Debug)]
pub struct Logged {
    instance: String,
    price_book_version: Arc<str>,
}

impl Logged {
    /// A biller that only logs.
    #[must_use]
    pub fn new(price_book_version: Arc<str>) -> Self {
        Self {
            instance: unique("log"),
            price_book_version,
        }
    }
}

impl Biller for Logged {
    fn begin(&self, reservation: Reservation) -> BoxFuture<'_, Result<Meter, Full>> {
        let id = record_id(&self.instance, &reservation.response);
        let version = self.price_book_version.clone();
        Box::pin(std::future::ready(Ok(Meter::logged(
            id,
            reservation,
            version,
        ))))
    }

    fn flush(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// The bill of one stream.
#[derive(Clone)]
pub struct Account {
    biller: Arc<dyn Biller>,
    tenant: Tenant,
    key: Arc<str>,
    session: Arc<str>,
    totals: Arc<Mutex<Charged>>,
}

impl Account {
    /// The bill of a stream that begins.
    #[must_use]
    pub fn new(biller: Arc<dyn Biller>, tenant: Tenant, key: Arc<str>) -> Self {
        Self {
            biller,
            tenant,
            key,
            session: unique("sess").into(),
            totals: Arc::default(),
        }
    }

    /// The bill of a stream of which nothing is kept.
    #[must_use]
    pub fn logged(tenant: Tenant) -> Self {
        Self::new(Arc::new(Logged::new("".into())), tenant, "local".into())
    }

    /// Begins the record of a response.
    ///
    /// # Errors
    ///
    /// As [`Biller::begin`].
    ///
    /// # Cancellation
    ///
    /// Safe: nothing was begun.
    pub async fn begin(
        &self,
        response: ResponseId,
        model_asked: Arc<str>,
        served: Served,
    ) -> Result<Meter, Full> {
        let reservation = Reservation {
            response,
            tenant: self.tenant.clone(),
            key: self.key.clone(),
            session: self.session.clone(),
            model_asked,
            served,
            reserved_at_ms: now_ms(),
        };
        let meter = self.biller.begin(reservation).await?;
        Ok(meter.on(self.totals.clone()))
    }
}

fn unique(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::now_v7().simple())
}

#[cfg(test)]
mod tests;
