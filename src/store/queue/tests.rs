use std::{collections::BTreeSet, sync::mpsc};

use futures::FutureExt as _;

use super::*;
use crate::store::tests::record;

/// Long enough that reaching it is a failure.
const NEVER: Duration = Duration::from_secs(10);

/// A store in memory whose writes wait to be let through, one each time, to succeed or to fail.
struct Scripted {
    kept: Mutex<BTreeSet<String>>,
    /// What each write was, as it begins.
    begun: Mutex<mpsc::Sender<String>>,
    outcomes: Mutex<mpsc::Receiver<Result<(), &'static str>>>,
}

/// The test's side.
struct Script {
    begun: mpsc::Receiver<String>,
    outcomes: mpsc::Sender<Result<(), &'static str>>,
    store: Arc<Scripted>,
}

fn scripted(bytes_max: usize) -> (Queue, Script) {
    let (begun, begun_seen) = mpsc::channel();
    let (outcomes, outcomes_taken) = mpsc::channel();
    let store = Arc::new(Scripted {
        kept: Mutex::default(),
        begun: Mutex::new(begun),
        outcomes: Mutex::new(outcomes_taken),
    });
    let script = Script {
        begun: begun_seen,
        outcomes,
        store: store.clone(),
    };
    (Queue::new(store, bytes_max).unwrap(), script)
}

impl Script {
    /// The write that begins next.
    fn begun(&self) -> String {
        self.begun.recv_timeout(NEVER).unwrap()
    }

    fn succeed(&self) {
        self.outcomes.send(Ok(())).unwrap();
    }

    fn fail(&self) {
        self.outcomes.send(Err("played")).unwrap();
    }
}

impl Scripted {
    fn write(&self, what: String) -> Result<(), StoreError> {
        let _ = self.begun.lock().send(what);
        // A test that has ended lets everything through.
        let outcome = self.outcomes.lock().recv().unwrap_or(Ok(()));
        outcome.map_err(|why| StoreError::Medium(why.into()))
    }
}

impl Store for Scripted {
    fn put(&self, records: &[Arc<Record>]) -> Result<(), StoreError> {
        let ids: Vec<&str> = records.iter().map(|record| record.id.as_str()).collect();
        self.write(format!("put {}", ids.join(" ")))?;
        self.kept.lock().extend(ids.into_iter().map(str::to_owned));
        Ok(())
    }

    fn get(&self, _: &Tenant, id: &ResponseId) -> Result<Option<Record>, StoreError> {
        let kept = self.kept.lock().contains(id.as_str());
        Ok(kept.then(|| record("acme", id.as_str(), None, id.as_str())))
    }

    fn delete(&self, _: &Tenant, id: &ResponseId) -> Result<bool, StoreError> {
        self.write(format!("delete {id}"))?;
        Ok(self.kept.lock().remove(id.as_str()))
    }

    fn sweep(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

async fn put(queue: &Queue, id: &str) {
    let place = queue.place(0).await.unwrap();
    queue.put(record("acme", id, None, id), place);
}

fn has(queue: &Queue, id: &str) -> bool {
    queue.get(&"acme".into(), &id.into()).unwrap().is_some()
}

#[tokio::test]
async fn what_waits_is_found_and_written_together() {
    let (queue, script) = scripted(1 << 20);
    put(&queue, "a").await;
    assert_eq!(script.begun(), "put a");
    put(&queue, "b").await;
    put(&queue, "c").await;
    assert_eq!(
        [has(&queue, "a"), has(&queue, "c"), has(&queue, "d")],
        [true, true, false]
    );
    assert!(script.store.kept.lock().is_empty());
    assert!(queue.get(&"other".into(), &"a".into()).unwrap().is_none());

    let flushed = queue.flush();
    let mut flushed = std::pin::pin!(flushed);
    assert!(flushed.as_mut().now_or_never().is_none());
    script.succeed();
    assert_eq!(script.begun(), "put b c");
    script.succeed();
    flushed.await;
    assert!(has(&queue, "a") && has(&queue, "c"));
    assert!(queue.behind.waiting.lock().after.is_empty());
}

#[tokio::test]
async fn a_delete_comes_after_what_it_deletes_and_counts_at_once() {
    let (queue, script) = scripted(1 << 20);
    put(&queue, "a").await;
    assert_eq!(script.begun(), "put a");
    let (tenant, id) = ("acme".into(), "a".into());
    let mut deleted = Box::pin(queue.delete(&tenant, &id));
    assert!(deleted.as_mut().now_or_never().is_none());
    assert!(!has(&queue, "a"));
    put(&queue, "b").await;
    script.succeed();
    assert_eq!(script.begun(), "delete a");
    assert!(!has(&queue, "a"));
    script.succeed();
    assert_eq!(deleted.await, Ok(true));
    assert_eq!(script.begun(), "put b");
    script.succeed();
    queue.flush().await;
    assert_eq!(script.store.kept.lock().iter().collect::<Vec<_>>(), ["b"]);
}

#[tokio::test]
async fn a_full_queue_lets_the_next_one_wait_until_there_is_room() {
    let (queue, script) = scripted(1024);
    put(&queue, "a").await;
    assert_eq!(script.begun(), "put a");
    let mut next = Box::pin(queue.place(0));
    assert!(next.as_mut().now_or_never().is_none());
    script.succeed();
    // Larger than the whole queue: it passes alone.
    drop(next.await.unwrap());
    drop(queue.place(1 << 30).await.unwrap());
    assert_eq!(queue.missed(), 0);
}

#[tokio::test]
async fn nobody_waits_longer_than_a_while_for_a_disk_that_is_stuck() {
    let (queue, script) = scripted(1024);
    put(&queue, "a").await;
    assert_eq!(script.begun(), "put a");
    tokio::time::pause();
    let began = tokio::time::Instant::now();
    assert_eq!(queue.place(0).await.err(), Some(Missed));
    assert_eq!(began.elapsed().as_secs(), ROOM_TIME_MAX.as_secs());
    assert_eq!(queue.missed(), 1);
    script.succeed();
}

#[tokio::test]
async fn what_fails_is_tried_again_and_nobody_waits_meanwhile() {
    let (queue, script) = scripted(1024);
    put(&queue, "a").await;
    assert_eq!(script.begun(), "put a");
    script.fail();
    assert_eq!(script.begun(), "put a");
    // It has failed once: whoever comes now is told at once.
    assert_eq!(queue.place(0).now_or_never().unwrap().err(), Some(Missed));
    assert!(has(&queue, "a"));
    script.succeed();
    queue.flush().await;
    assert!(script.store.kept.lock().contains("a"));
    assert!(queue.place(0).now_or_never().unwrap().is_ok());
}

#[tokio::test]
async fn the_end_writes_what_is_left_and_does_not_wait_for_a_disk_that_fails() {
    let (queue, script) = scripted(1 << 20);
    put(&queue, "a").await;
    assert_eq!(script.begun(), "put a");
    put(&queue, "b").await;
    let store = script.store.clone();
    let ended = std::thread::spawn(move || drop(queue));
    script.succeed();
    assert_eq!(script.begun(), "put b");
    script.succeed();
    ended.join().unwrap();
    assert_eq!(store.kept.lock().len(), 2);

    let (queue, script) = scripted(1 << 20);
    put(&queue, "a").await;
    assert_eq!(script.begun(), "put a");
    let (tenant, id) = ("acme".into(), "a".into());
    queue.behind.waiting.lock().closed = true;
    let deleted = queue.delete(&tenant, &id);
    script.fail();
    script.fail();
    // Nobody is told that something is gone that may not be.
    assert_eq!(deleted.await, Err(Missed));
}
