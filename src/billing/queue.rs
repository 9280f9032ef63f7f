//! What stands between the loop and the journal: a bounded queue and its one writer.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{
    AtBound, Biller, BillingOptions, Durability, Full, Journal, Meter, OpenError, Record,
    Reservation, Reserve,
    export::{self, Export},
    journal::Reading,
    meter::Entry,
    now_ms, record_id,
};

/// Records of one transaction at most: a crash loses none that was written, so larger ones only
/// delay the first.
const GROUP_MAX: usize = 512;
/// How long the writer lets records gather before it writes them, where nobody waits for them. On a busy server that is what keeps it
/// from taking the processor's time away from the loop; a response that ends by then is written once.
const GATHER: Duration = Duration::from_millis(10);
/// How long the writer rests before it tries again what failed: from, doubling, at most.
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_secs(2);
/// How long a change of an exporter may take to be written once the server stops.
const NOTE_TIME_MAX: Duration = Duration::from_secs(1);
/// How often what has been kept for too long is let go of.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// A medium that keeps records. It blocks, and one thread writes to it.
pub trait Medium: Send + 'static {
    /// Makes these changes in this order, all of them or none; when it returns, they are safe. A
    /// record that is settled stays as it is, however often it comes again.
    ///
    /// # Errors
    ///
    /// The medium failed; nothing was changed, or it is not known.
    fn commit(&mut self, changes: &[Change]) -> Result<(), MediumError>;
}

/// Why a medium cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("the medium failed: {0}")]
pub struct MediumError(pub Box<dyn std::error::Error + Send + Sync>);

/// What is written. Sinks are named as they are configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A record as it stands now.
    Record(Box<Record>),
    /// A sink has everything up to this place in the order of settling.
    Exported {
        /// The sink.
        sink: Arc<str>,
        /// The place.
        upto: u64,
    },
    /// A sink took these places not, however often it was asked: they are kept aside for it.
    Buried {
        /// The sink.
        sink: Arc<str>,
        /// The places, in order.
        numbers: Vec<u64>,
        /// How often it was asked.
        attempts: u32,
        /// What it said last.
        error: String,
        /// Milliseconds since 1970.
        at_ms: u64,
    },
    /// A sink has taken these after all.
    Revived {
        /// The sink.
        sink: Arc<str>,
        /// The places.
        numbers: Vec<u64>,
    },
    /// Let go of records that were settled before this and that all of these sinks have.
    Sweep {
        /// Milliseconds since 1970.
        before_ms: u64,
        /// The sinks.
        sinks: Vec<Arc<str>>,
    },
}

/// Usage records on their way to a journal. Dropping it writes what is left and waits for that.
pub struct Billing {
    behind: Arc<Behind>,
    journal_id: Arc<str>,
    options: BillingOptions,
    writer: Option<JoinHandle<()>>,
    exporters: Vec<JoinHandle<()>>,
}

/// What meters, the writer and exporters share.
pub(super) struct Behind {
    room: Arc<Semaphore>,
    waiting: Mutex<Waiting>,
    work: Condvar,
    /// Somebody waits for what is queued.
    hurry: Condvar,
    /// How many of the entries that were ever queued are written.
    done: watch::Sender<u64>,
    news: Mutex<News>,
    told: Condvar,
}

#[derive(Default)]
struct Waiting {
    entries: VecDeque<Arc<Entry>>,
    notes: Vec<Note>,
    /// How many entries were ever queued.
    queued: u64,
    /// Up to this many somebody waits for.
    wanted: u64,
    /// How many were taken to be written.
    taken: u64,
    /// Nothing more will come: what fails now fails for good.
    closed: bool,
    /// The writer has ended: nothing more is written.
    ended: bool,
}

/// A change that an exporter waits for.
struct Note {
    change: Change,
    _done: mpsc::Sender<()>,
}

/// What exporters wait for.
#[derive(Default)]
struct News {
    /// Rises with each transaction.
    written: u64,
    /// They are to end.
    closing: bool,
}

/// The writer has ended: nothing can be written any more.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended;

impl Billing {
    /// Usage records in the journal of this file, and from there to these sinks.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(
        path: &Path,
        sync: Durability,
        options: BillingOptions,
        exports: Vec<Export>,
    ) -> Result<Self, OpenError> {
        let journal = Journal::open(path, sync, now_ms())?;
        let readings = exports.iter().map(|_| Reading::open(path));
        let readings = readings.collect::<Result<Vec<_>, _>>()?;
        let id = journal.id().clone();
        let sinks = exports.iter().map(|it| it.name.clone()).collect();
        let mut billing = Self::new(journal, id, options, sinks)?;
        for (export, reading) in exports.into_iter().zip(readings) {
            let behind = billing.behind.clone();
            let thread = std::thread::Builder::new()
                .name("usage-exporter".to_owned())
                .spawn(move || export::run(export, &reading, &behind))?;
            billing.exporters.push(thread);
        }
        Ok(billing)
    }

    /// Usage records in this medium, which has this id.
    ///
    /// # Errors
    ///
    /// There can be no thread for the writer.
    pub fn new(
        medium: impl Medium,
        journal_id: Arc<str>,
        options: BillingOptions,
        sinks: Vec<Arc<str>>,
    ) -> std::io::Result<Self> {
        let room = options.backlog_records_max.clamp(1, Semaphore::MAX_PERMITS);
        let behind = Arc::new(Behind {
            room: Arc::new(Semaphore::new(room)),
            waiting: Mutex::default(),
            work: Condvar::new(),
            hurry: Condvar::new(),
            done: watch::Sender::new(0),
            news: Mutex::default(),
            told: Condvar::new(),
        });
        let writer = std::thread::Builder::new()
            .name("usage-writer".to_owned())
            .spawn({
                let behind = behind.clone();
                let retention = options.retention;
                move || Writer::new(medium, retention, sinks).run(&behind)
            })?;
        Ok(Self {
            behind,
            journal_id,
            options,
            writer: Some(writer),
            exporters: Vec::new(),
        })
    }

    async fn room(&self) -> Result<OwnedSemaphorePermit, Full> {
        let room = self.behind.room.clone();
        match (room.clone().try_acquire_owned(), self.options.at_bound) {
            (Ok(room), AtBound::Block | AtBound::Shed) => Ok(room),
            (Err(_), AtBound::Shed) => Err(Full),
            (Err(_), AtBound::Block) => {
                let wait = self.options.block_time_max;
                let waited = tokio::time::timeout(wait, room.acquire_owned()).await;
                waited.ok().and_then(Result::ok).ok_or(Full)
            }
        }
    }
}

impl Biller for Billing {
    fn begin(&self, reservation: Reservation) -> BoxFuture<'_, Result<Meter, Full>> {
        Box::pin(async move {
            let room = self.room().await?;
            let id = record_id(&self.journal_id, &reservation.response);
            let version = self.options.price_book_version.clone();
            let to = (self.behind.clone(), self.options.pace, room);
            let meter = Meter::written(id, reservation, version, to);
            match self.options.reserve {
                Reserve::Behind => {}
                Reserve::First => {
                    let written = tokio::time::timeout(self.options.block_time_max, self.flush());
                    if written.await.is_err() || self.behind.waiting.lock().ended {
                        return Err(Full);
                    }
                }
            }
            Ok(meter)
        })
    }

    fn flush(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let queued = {
                let mut waiting = self.behind.waiting.lock();
                waiting.wanted = waiting.queued;
                waiting.queued
            };
            self.behind.hurry.notify_all();
            let mut done = self.behind.done.subscribe();
            // The sender lives as long as the queue.
            let _ = done.wait_for(|done| *done >= queued).await;
        })
    }
}

impl Drop for Billing {
    fn drop(&mut self) {
        // First those that still want something written.
        self.behind.news.lock().closing = true;
        self.behind.told.notify_all();
        for exporter in self.exporters.drain(..) {
            // A panic was logged where it happened.
            let _ = exporter.join();
        }
        self.behind.waiting.lock().closed = true;
        self.behind.work.notify_all();
        self.behind.hurry.notify_all();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Behind {
    /// Queues an entry that does not wait yet. It has its room already.
    pub(super) fn queue(&self, entry: Arc<Entry>) {
        let mut waiting = self.waiting.lock();
        if waiting.ended {
            tracing::error!("the writer of usage records has ended: nothing is written any more");
            return;
        }
        waiting.queued += 1;
        waiting.entries.push_back(entry);
        drop(waiting);
        self.work.notify_all();
    }

    /// Has a change written, and waits for it.
    pub(super) fn write(&self, change: Change) -> Result<(), Ended> {
        let (sender, written) = mpsc::channel();
        let mut waiting = self.waiting.lock();
        if waiting.ended {
            return Err(Ended);
        }
        waiting.notes.push(Note {
            change,
            _done: sender,
        });
        drop(waiting);
        self.work.notify_all();
        // Nothing is ever sent: the sender is dropped with the note, written or not.
        while let Err(mpsc::RecvTimeoutError::Timeout) = written.recv_timeout(NOTE_TIME_MAX) {
            // Whoever closes waits for the one that waits here.
            if self.news.lock().closing {
                return Err(Ended);
            }
        }
        match self.waiting.lock().ended {
            true => Err(Ended),
            false => Ok(()),
        }
    }

    /// How many transactions were written.
    pub(super) fn written(&self) -> u64 {
        self.news.lock().written
    }

    /// Waits until more is written than that, for so long at most. Whether to go on.
    pub(super) fn wait(&self, seen: Option<u64>, time: Duration) -> bool {
        let until = Instant::now() + time;
        let mut news = self.news.lock();
        while !news.closing && seen.is_none_or(|seen| news.written == seen) {
            if self.told.wait_until(&mut news, until).timed_out() {
                break;
            }
        }
        !news.closing
    }

    /// What waits, once there is some or it is time to sweep. `None` once it is closed and empty.
    fn next(&self, sweep_at: Instant) -> Option<(Vec<Arc<Entry>>, Vec<Note>)> {
        let mut waiting = self.waiting.lock();
        while waiting.entries.is_empty() && waiting.notes.is_empty() {
            if waiting.closed {
                return None;
            }
            if self.work.wait_until(&mut waiting, sweep_at).timed_out() {
                break;
            }
        }
        let until = Instant::now() + GATHER;
        while !waiting.closed && waiting.wanted <= waiting.taken {
            if self.hurry.wait_until(&mut waiting, until).timed_out() {
                break;
            }
        }
        let count = waiting.entries.len().min(GROUP_MAX);
        waiting.taken += count as u64;
        let entries = waiting.entries.drain(..count).collect();
        Some((entries, std::mem::take(&mut waiting.notes)))
    }

    /// Waits before something is tried again. Whether to try.
    fn rest(&self, time: Duration) -> bool {
        let mut waiting = self.waiting.lock();
        // New entries wake it too; it still does not try more often than it should.
        let until = Instant::now() + time;
        while !waiting.closed && !self.work.wait_until(&mut waiting, until).timed_out() {}
        !waiting.closed
    }
}

/// The one that writes.
struct Writer<M> {
    medium: M,
    retention: Duration,
    sinks: Vec<Arc<str>>,
    sweep_at: Instant,
}

impl<M: Medium> Writer<M> {
    fn new(medium: M, retention: Duration, sinks: Vec<Arc<str>>) -> Self {
        Self {
            medium,
            retention,
            sinks,
            sweep_at: Instant::now(),
        }
    }

    fn run(mut self, behind: &Behind) {
        let _end = End(behind);
        while let Some((entries, notes)) = behind.next(self.sweep_at) {
            let records = entries.iter().map(|entry| Box::new(entry.take()));
            let mut changes: Vec<Change> = records.map(Change::Record).collect();
            changes.extend(notes.iter().map(|note| note.change.clone()));
            if Instant::now() >= self.sweep_at {
                self.sweep_at = Instant::now() + SWEEP_EVERY;
                let retention = u64::try_from(self.retention.as_millis()).unwrap_or(u64::MAX);
                changes.push(Change::Sweep {
                    before_ms: now_ms().saturating_sub(retention),
                    sinks: self.sinks.clone(),
                });
            }
            if !self.until_it_works(&changes, behind) {
                let lost = entries.len();
                tracing::error!(lost, "the journal failed until the end: usage is lost");
            }
            let count = entries.len() as u64;
            // Their room is free from here on, where they are settled.
            drop(entries);
            behind.done.send_modify(|done| *done += count);
            behind.news.lock().written += 1;
            behind.told.notify_all();
            drop(notes);
        }
    }

    /// Commits until that succeeds, or until the queue is closed: then the process ends, and what
    /// fails now fails for good.
    fn until_it_works(&mut self, changes: &[Change], behind: &Behind) -> bool {
        let mut rest = REST_MIN;
        loop {
            match self.medium.commit(changes) {
                Ok(()) => return true,
                Err(error) => {
                    tracing::error!(%error, "the journal cannot be written, trying again");
                }
            }
            if !behind.rest(rest) {
                // Once more: it may have been the other end of a race, such as a reader's lock.
                return self.medium.commit(changes).is_ok();
            }
            rest = (2 * rest).min(REST_MAX);
        }
    }
}

/// A writer that has ended, even by a panic, writes nothing more: nothing may be sampled any more.
struct End<'a>(&'a Behind);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.room.close();
        let mut waiting = self.0.waiting.lock();
        waiting.ended = true;
        let (entries, notes) = (
            std::mem::take(&mut waiting.entries),
            std::mem::take(&mut waiting.notes),
        );
        let queued = waiting.queued;
        drop(waiting);
        drop((entries, notes));
        self.0.done.send_replace(queued);
    }
}
