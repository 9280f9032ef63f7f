//! What stands between the loop and a store: a bounded queue and its one writer.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::{Record, Store, StoreError};
use crate::item::{ResponseId, Tenant};

/// How long a response waits for room in a queue that is full.
const ROOM_TIME_MAX: Duration = Duration::from_secs(5);
/// Records of one transaction at most: a crash loses none that was written, so larger ones only
/// delay the first.
const GROUP_MAX: usize = 256;
/// How long the writer rests before it tries again what failed: from, doubling, at most.
const REST_MIN: Duration = Duration::from_millis(100);
const REST_MAX: Duration = Duration::from_secs(10);
/// How often an idle writer lets go of what is too old.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// The queue of a store. Dropping it writes what is left and waits for that.
pub struct Queue {
    behind: Arc<Behind>,
    writer: Option<JoinHandle<()>>,
}

/// Room for records that are about to be queued; it is free again once they are written.
#[derive(Debug, Clone)]
pub struct Place {
    _room: Arc<OwnedSemaphorePermit>,
}

/// There was no room in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missed;

/// What the queue and its writer share.
struct Behind {
    store: Arc<dyn Store>,
    /// One permit a KiB.
    room: Arc<Semaphore>,
    room_kib: u32,
    waiting: Mutex<Waiting>,
    work: Condvar,
    /// The number of the last job that is done.
    done: watch::Sender<u64>,
    /// The last attempt to write failed.
    failing: AtomicBool,
    missed: AtomicU64,
}

type Key = (Tenant, ResponseId);

/// Jobs in order, and how things will stand after them.
#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    /// For each id in them, the number of the last job for it and the record that it leaves.
    after: HashMap<Key, (u64, Option<Arc<Record>>)>,
    last: u64,
    /// Nothing more will come: what fails now fails for good.
    closed: bool,
    /// The writer has ended: nothing more is written.
    ended: bool,
}

struct Job {
    number: u64,
    what: What,
    _place: Place,
}

enum What {
    Put(Arc<Record>),
    Delete(Key, oneshot::Sender<bool>),
}

impl Queue {
    /// A queue before this store, which holds at most this many bytes, about.
    ///
    /// # Errors
    ///
    /// There can be no thread for the writer.
    pub fn new(store: Arc<dyn Store>, bytes_max: usize) -> std::io::Result<Self> {
        let room = (bytes_max / 1024).clamp(1, Semaphore::MAX_PERMITS);
        let behind = Arc::new(Behind {
            store,
            room: Arc::new(Semaphore::new(room)),
            room_kib: u32::try_from(room).unwrap_or(u32::MAX),
            waiting: Mutex::default(),
            work: Condvar::new(),
            done: watch::Sender::new(0),
            failing: AtomicBool::new(false),
            missed: AtomicU64::new(0),
        });
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn({
                let behind = behind.clone();
                move || behind.write()
            })?;
        Ok(Self {
            behind,
            writer: Some(writer),
        })
    }

    /// Room for records of about this many bytes. Waits only where the queue is full, and not
    /// while the store fails: the disk slows the loop, but a broken one does not stop it.
    ///
    /// # Errors
    ///
    /// There is none, and none came in time. It is counted and logged.
    ///
    /// # Cancellation
    ///
    /// Safe: no room is lost.
    pub async fn place(&self, bytes: usize) -> Result<Place, Missed> {
        self.room(bytes).await.ok_or_else(|| {
            let missed_total = self.behind.missed.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::error!(
                missed_total,
                "no room in the store's queue: the response is in memory only"
            );
            Missed
        })
    }

    async fn room(&self, bytes: usize) -> Option<Place> {
        let behind = &self.behind;
        // What is larger than the whole queue passes through it alone.
        let kib = u32::try_from(bytes / 1024 + 1).unwrap_or(u32::MAX);
        let kib = kib.min(behind.room_kib);
        let place = match behind.room.clone().try_acquire_many_owned(kib) {
            Ok(place) => Some(place),
            Err(_) if behind.failing.load(Ordering::Relaxed) => None,
            Err(_) => {
                let room = behind.room.clone().acquire_many_owned(kib);
                let waited = tokio::time::timeout(ROOM_TIME_MAX, room).await;
                waited.ok().and_then(Result::ok)
            }
        };
        place.map(|room| Place {
            _room: Arc::new(room),
        })
    }

    /// Queues a record. It must come after that of its parent.
    pub fn put(&self, record: Record, place: Place) {
        let record = Arc::new(record);
        let key = (record.tenant.clone(), record.id.clone());
        let after = Some(record.clone());
        self.behind.queue(key, after, What::Put(record), place);
    }

    /// The record of this id, of this tenant. Blocks.
    ///
    /// # Errors
    ///
    /// As [`Store::get`].
    pub fn get(&self, tenant: &Tenant, id: &ResponseId) -> Result<Option<Arc<Record>>, StoreError> {
        let key = (tenant.clone(), id.clone());
        let waiting = self.behind.waiting.lock().after.get(&key).cloned();
        // What waits no longer is in the store by now, since it leaves here after it was written.
        match waiting {
            Some((_, record)) => Ok(record),
            None => Ok(self.behind.store.get(tenant, id)?.map(Arc::new)),
        }
    }

    /// Forgets a record, queued or stored, and waits until it is gone. Says whether there was one.
    ///
    /// # Errors
    ///
    /// There is no room to queue even that, or the server stops and the store fails.
    pub async fn delete(&self, tenant: &Tenant, id: &ResponseId) -> Result<bool, Missed> {
        let place = self.room(0).await.ok_or(Missed)?;
        let (sender, deleted) = oneshot::channel();
        let key = (tenant.clone(), id.clone());
        let what = What::Delete(key.clone(), sender);
        self.behind.queue(key, None, what, place);
        deleted.await.map_err(|_| Missed)
    }

    /// Waits until everything that is queued now is written.
    ///
    /// # Cancellation
    ///
    /// Safe: writing goes on.
    pub async fn flush(&self) {
        let last = self.behind.waiting.lock().last;
        let mut done = self.behind.done.subscribe();
        // The sender lives as long as the queue.
        let _ = done.wait_for(|done| *done >= last).await;
    }

    /// How many responses found no room.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.behind.missed.load(Ordering::Relaxed)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.behind.waiting.lock().closed = true;
        self.behind.work.notify_all();
        if let Some(writer) = self.writer.take() {
            // A panic was logged where it happened.
            let _ = writer.join();
        }
    }
}

impl Behind {
    fn queue(&self, key: Key, after: Option<Arc<Record>>, what: What, place: Place) {
        let mut waiting = self.waiting.lock();
        if waiting.ended {
            // Whoever waits for it is told by what is dropped here.
            tracing::error!("the store's writer has ended: nothing is written any more");
            return;
        }
        waiting.last += 1;
        let number = waiting.last;
        waiting.after.insert(key, (number, after));
        waiting.jobs.push_back(Job {
            number,
            what,
            _place: place,
        });
        drop(waiting);
        self.work.notify_all();
    }

    /// The life of the writer.
    fn write(&self) {
        let _end = End(self);
        while let Some(jobs) = self.next() {
            let written = match jobs.as_slice() {
                [] => {
                    if let Err(error) = self.store.sweep() {
                        tracing::warn!(%error, "the store could not let go of what is old");
                    }
                    continue;
                }
                [
                    Job {
                        what: What::Delete((tenant, id), _),
                        ..
                    },
                ] => self.until_it_works(|| self.store.delete(tenant, id)),
                puts => {
                    let records: Vec<Arc<Record>> = puts
                        .iter()
                        .filter_map(|job| job.record().cloned())
                        .collect();
                    let written = self.until_it_works(|| self.store.put(&records));
                    if written.is_some() {
                        log_stored(&records);
                    }
                    written.map(|()| true)
                }
            };
            self.finish(jobs, written);
        }
    }

    /// The next jobs: puts in a row, or one delete; none when it is time to sweep. `None` when the
    /// queue is closed and empty.
    fn next(&self) -> Option<Vec<Job>> {
        let mut waiting = self.waiting.lock();
        while waiting.jobs.is_empty() {
            if waiting.closed {
                return None;
            }
            if self.work.wait_for(&mut waiting, SWEEP_EVERY).timed_out() {
                return Some(Vec::new());
            }
        }
        let puts = waiting.jobs.iter().take(GROUP_MAX);
        let puts = puts.take_while(|job| job.record().is_some()).count();
        Some(waiting.jobs.drain(..puts.max(1)).collect())
    }

    /// Does it until it succeeds, or until the queue is closed: then the process ends, and what
    /// fails now fails for good.
    fn until_it_works<T>(&self, work: impl Fn() -> Result<T, StoreError>) -> Option<T> {
        let mut rest = REST_MIN;
        loop {
            match work() {
                Ok(done) => {
                    self.failing.store(false, Ordering::Relaxed);
                    return Some(done);
                }
                Err(error) => {
                    self.failing.store(true, Ordering::Relaxed);
                    tracing::error!(%error, "the store cannot be written, trying again");
                }
            }
            let mut waiting = self.waiting.lock();
            if waiting.closed {
                return None;
            }
            // New jobs wake it too; it still does not try more often than it should.
            let until = std::time::Instant::now() + rest;
            while !waiting.closed && !self.work.wait_until(&mut waiting, until).timed_out() {}
            rest = (2 * rest).min(REST_MAX);
        }
    }

    fn finish(&self, jobs: Vec<Job>, written: Option<bool>) {
        let last = jobs.last().map_or(0, |job| job.number);
        if written.is_none() {
            let lost = jobs.len();
            tracing::error!(lost, "the store failed until the end: responses are lost");
        }
        let mut waiting = self.waiting.lock();
        for job in &jobs {
            let key = match &job.what {
                What::Put(record) => (record.tenant.clone(), record.id.clone()),
                What::Delete(key, _) => key.clone(),
            };
            // A later job for it may wait already.
            if waiting
                .after
                .get(&key)
                .is_some_and(|(number, _)| *number == job.number)
            {
                waiting.after.remove(&key);
            }
        }
        drop(waiting);
        for job in jobs {
            if let (What::Delete(_, deleted), Some(existed)) = (job.what, written) {
                // Whoever asked may have gone.
                let _ = deleted.send(existed);
            }
        }
        self.done.send_replace(last);
    }
}

impl Job {
    fn record(&self) -> Option<&Arc<Record>> {
        match &self.what {
            What::Put(record) => Some(record),
            What::Delete(..) => None,
        }
    }
}

fn log_stored(records: &[Arc<Record>]) {
    for record in records {
        tracing::debug!(id = %record.id, "stored");
    }
}

/// A writer that has ended, even by a panic, writes nothing more: nobody need wait for it.
struct End<'a>(&'a Behind);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.failing.store(true, Ordering::Relaxed);
        let mut waiting = self.0.waiting.lock();
        waiting.ended = true;
        waiting.after.clear();
        let (left, last) = (std::mem::take(&mut waiting.jobs), waiting.last);
        drop(waiting);
        drop(left);
        self.0.done.send_replace(last);
    }
}

#[cfg(test)]
mod tests;
