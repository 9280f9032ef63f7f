use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use tempfile::TempDir;

use super::*;
use crate::billing::{
    Biller as _, Billing, Durability, Journal, Jsonl,
    tests::{NEVER, account, begin, completed, counts, options, record, settled},
};

/// A sink in memory that fails when it is told to.
#[derive(Clone, Default)]
struct Shelf {
    taken: Arc<Mutex<Vec<String>>>,
    asked: Arc<Mutex<u32>>,
    down: Arc<AtomicBool>,
}

impl Exporter for Shelf {
    fn export(&mut self, records: &[Record]) -> std::io::Result<()> {
        *self.asked.lock() += 1;
        if self.down.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("down"));
        }
        let responses = records.iter().map(|it| it.response.to_string());
        self.taken.lock().extend(responses);
        Ok(())
    }
}

fn exporting(path: &Path, shelf: &Shelf) -> Arc<Billing> {
    let export = Export {
        name: "shelf".into(),
        exporter: Box::new(shelf.clone()),
        retries: Retries {
            attempts_max: 3,
            rest_min: Duration::from_millis(1),
            rest_max: Duration::from_millis(2),
        },
    };
    let billing = Billing::open(path, Durability::Normal, options(), vec![export]);
    Arc::new(billing.unwrap())
}

async fn until(what: impl Fn() -> bool) {
    let waited = tokio::time::timeout(NEVER, async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap();
}

#[tokio::test]
async fn a_sink_that_fails_gets_everything_once_it_works() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let shelf = Shelf::default();
    shelf.down.store(true, Ordering::Relaxed);
    let billing = exporting(&path, &shelf);
    let dead = || {
        Reading::open(&path)
            .unwrap()
            .dead("shelf", 0, 10)
            .unwrap()
            .len()
    };
    let account = account(&billing);
    let settle = async |response: &str| {
        let meter = begin(&account, response).await.unwrap();
        meter.settle(completed(), counts(1));
        billing.flush().await;
    };
    settle("resp_1").await;
    until(|| dead() == 1).await;
    assert_eq!(*shelf.asked.lock(), 3);
    settle("resp_2").await;
    until(|| dead() == 2).await;

    shelf.down.store(false, Ordering::Relaxed);
    settle("resp_3").await;
    until(|| shelf.taken.lock().len() == 3).await;
    until(|| dead() == 0).await;
    assert_eq!(*shelf.taken.lock(), ["resp_3", "resp_1", "resp_2"]);
    assert_eq!(Reading::open(&path).unwrap().cursor("shelf").unwrap(), 3);
}

#[tokio::test]
async fn a_sink_that_was_down_all_the_while_gets_everything_from_the_next_start() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let shelf = Shelf::default();
    shelf.down.store(true, Ordering::Relaxed);
    let billing = exporting(&path, &shelf);
    let all: Vec<String> = (0..20).map(|n| format!("resp_{n}")).collect();
    {
        let account = account(&billing);
        for response in &all {
            let meter = begin(&account, response).await.unwrap();
            meter.settle(completed(), counts(1));
        }
    }
    drop(billing);
    assert_eq!(*shelf.taken.lock(), Vec::<String>::new());

    shelf.down.store(false, Ordering::Relaxed);
    let billing = exporting(&path, &shelf);
    until(|| shelf.taken.lock().len() >= all.len()).await;
    drop(billing);
    let mut taken = shelf.taken.lock().clone();
    taken.sort_unstable();
    let mut all = all;
    all.sort_unstable();
    assert_eq!(taken, all);
}

#[tokio::test]
async fn a_journal_that_is_stuck_keeps_nobody_from_ending() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let shelf = Shelf::default();
    let billing = exporting(&path, &shelf);
    let meter = begin(&account(&billing), "resp_1").await.unwrap();
    meter.settle(completed(), counts(1));
    billing.flush().await;
    let stuck = rusqlite::Connection::open(&path).unwrap();
    stuck.busy_timeout(NEVER).unwrap();
    stuck.execute_batch("BEGIN IMMEDIATE").unwrap();
    let since = std::time::Instant::now();
    tokio::task::spawn_blocking(move || drop(billing))
        .await
        .unwrap();
    assert!(since.elapsed() < NEVER / 2, "{:?}", since.elapsed());
    stuck.execute_batch("ROLLBACK").unwrap();
    // Nothing was lost by that: it was settled before.
    drop(Journal::open(&path, Durability::Normal, 0).unwrap());
    assert_eq!(settled(&path), ["resp_1 completed 1"]);
}

#[test]
fn a_file_of_lines_is_moved_away_when_it_is_full() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("usage.jsonl");
    let one = [record("resp_1", 1, Some(2))];
    let line = serde_json::to_string(&one[0]).unwrap() + "\n";
    let mut sink = Jsonl::new(&path, 2 * line.len() as u64);
    for _ in 0..5 {
        sink.export(&one).unwrap();
    }
    let mut files: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    files.sort_unstable();
    assert_eq!(files, [line.clone(), line.repeat(2), line.repeat(2)]);

    // Half a line of a process that was killed stays alone.
    std::fs::write(&path, "{\"half").unwrap();
    sink.export(&one).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, format!("{{\"half\n{line}"));
}
