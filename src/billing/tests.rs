use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use tempfile::TempDir;

use super::{journal::Reading, *};
use crate::event::{Finish, IncompleteReason, Status, Usage};

/// Long enough that reaching it is a failure, also on a busy machine.
pub(super) const NEVER: Duration = Duration::from_secs(30);

pub(super) fn options() -> BillingOptions {
    BillingOptions {
        backlog_records_max: 100,
        at_bound: AtBound::Shed,
        block_time_max: Duration::from_secs(5),
        reserve: Reserve::Behind,
        pace: Pace {
            tokens: 10,
            time: NEVER,
        },
        retention: Duration::from_secs(3600),
        price_book_version: "v7".into(),
    }
}

pub(super) fn counts(output_tokens: u32) -> Counts {
    let usage = Usage {
        input_tokens: 100,
        cached_tokens: 30,
        output_tokens,
        reasoning_tokens: 1,
        samples: 1,
    };
    Counts {
        calls: 2,
        sample_ms: 40,
        cost_nanos: 7_000,
        ..Counts::new(usage, 60, output_tokens.into())
    }
}

pub(super) fn completed() -> Settlement {
    Settlement::new(&Status::Completed, Some(Finish::Stop)).unwrap()
}

pub(super) async fn begin(account: &Account, response: &str) -> Result<Meter, Full> {
    let served = Served {
        model: "tiny".into(),
        backend: "sim".into(),
    };
    account.begin(response.into(), "asked".into(), served).await
}

pub(super) fn account(billing: &Arc<Billing>) -> Account {
    Account::new(billing.clone(), "acme".into(), "key".into())
}

/// All records of the file, as `response end output`, in the order of settling.
pub(super) fn settled(path: &Path) -> Vec<String> {
    let records = Reading::open(path).unwrap().after(0, 1000).unwrap();
    let line =
        |(_, it): (u64, Record)| format!("{} {} {}", it.response, it.end, it.counts.output_tokens);
    records.into_iter().map(line).collect()
}

/// A medium in memory that fails when it is told to.
#[derive(Clone, Default)]
struct Memory {
    changes: Arc<Mutex<Vec<Change>>>,
    broken: Arc<AtomicBool>,
}

impl Memory {
    fn records(&self) -> Vec<Record> {
        let changes = self.changes.lock();
        let records = changes.iter().filter_map(|change| match change {
            Change::Record(record) => Some((**record).clone()),
            Change::Exported { .. }
            | Change::Buried { .. }
            | Change::Revived { .. }
            | Change::Sweep { .. } => None,
        });
        records.collect()
    }
}

impl Medium for Memory {
    fn commit(&mut self, changes: &[Change]) -> Result<(), MediumError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(MediumError("told to fail".into()));
        }
        self.changes.lock().extend_from_slice(changes);
        Ok(())
    }
}

fn over(memory: &Memory, options: BillingOptions) -> Arc<Billing> {
    Arc::new(Billing::new(memory.clone(), "here".into(), options, Vec::new()).unwrap())
}

#[test]
fn an_id_is_that_of_a_response_in_a_journal() {
    let id = |journal: &str, response: &str| record_id(journal, &response.into());
    assert_eq!(&*id("a", "b"), "rec_1c78e427ab411985616a9718d719e86d");
    assert_eq!(id("a", "b"), id("a", "b"));
    assert_ne!(id("a", "b"), id("a", "c"));
    assert_ne!(id("a", "b"), id("b", "b"));
    assert_ne!(id("ab", "c"), id("a", "bc"));
}

#[test]
fn a_settlement_says_how_it_ended() {
    let of = |status, finish| {
        let settlement = Settlement::new(&status, finish)?;
        Some((settlement.end, settlement.reason, settlement.finish))
    };
    assert_eq!(of(Status::AwaitingInput, Some(Finish::ToolCalls)), None);
    let incomplete = Status::Incomplete(IncompleteReason::MaxOutputTokens);
    let expected = ("incomplete", "max_output_tokens", "length");
    assert_eq!(of(incomplete, Some(Finish::Length)), Some(expected));
    let error = crate::event::Error::new(crate::event::Code::BackendError, "it broke");
    let expected = ("failed", "backend_error", "");
    assert_eq!(of(Status::Failed(error), None), Some(expected));
}

#[tokio::test]
async fn a_record_is_reserved_checkpointed_and_settled_once() {
    let memory = Memory::default();
    let billing = over(&memory, options());
    let account = account(&billing);

    let mut meter = begin(&account, "resp_1").await.unwrap();
    billing.flush().await;
    // Less than the pace asks for is written by nobody.
    meter.checkpoint(counts(9));
    billing.flush().await;
    meter.checkpoint(counts(10));
    billing.flush().await;
    let receipt = meter.receipt(counts(11));
    let last = meter.settle(completed(), counts(12));
    billing.flush().await;

    let outputs: Vec<_> = memory
        .records()
        .iter()
        .map(|it| (it.end.to_string(), it.counts.output_tokens))
        .collect();
    let expected = [("", 0), ("", 10), ("completed", 12)].map(|(end, n)| (end.to_owned(), n));
    assert_eq!(outputs, expected);
    assert_eq!(
        (receipt.response.output_tokens, last.stream.responses),
        (11, 1)
    );
    assert_eq!(last.response, counts(12).charged());

    // The stream's total runs on.
    let meter = begin(&account, "resp_2").await.unwrap();
    assert_eq!(meter.receipt(counts(1)).stream.responses, 2);
    let receipt = meter.settle(completed(), Counts::default());
    assert_eq!(receipt.stream.output_tokens, 12);
    assert_eq!(receipt.stream.new_tokens, 40);

    billing.flush().await;
    let record = memory.records().pop().unwrap();
    assert_eq!(&*record.id, &*record_id("here", &"resp_2".into()));
    assert_eq!(record.id, receipt.record_id);
    // Zero is a value.
    assert_eq!(record.counts, Counts::default());
    let json = serde_json::to_value(&record).unwrap();
    assert_eq!(json["output_tokens"], 0);
    assert_eq!(json["tenant"], "acme");
    assert_eq!(json["price_book_version"], "v7");
}

#[tokio::test]
async fn a_meter_that_is_dropped_settles_what_was_counted() {
    let memory = Memory::default();
    let billing = over(&memory, options());
    let mut meter = begin(&account(&billing), "resp_1").await.unwrap();
    meter.checkpoint(counts(3));
    drop(meter);
    billing.flush().await;
    let record = memory.records().pop().unwrap();
    assert_eq!(
        (&*record.end, record.counts.output_tokens),
        ("abandoned", 3)
    );
    assert!(record.settled_at_ms.is_some());
}

#[tokio::test]
async fn at_the_bound_a_create_is_shed_or_waits() {
    let memory = Memory::default();
    let two = |at_bound| BillingOptions {
        backlog_records_max: 2,
        at_bound,
        ..options()
    };
    for at_bound in [AtBound::Shed, AtBound::Block] {
        let billing = over(&memory, two(at_bound));
        let account = account(&billing);
        let first = begin(&account, "resp_1").await.unwrap();
        let second = begin(&account, "resp_2").await.unwrap();
        billing.flush().await;
        memory.broken.store(true, Ordering::Relaxed);
        // Settled is not yet written.
        first.settle(completed(), counts(1));
        let refused = match at_bound {
            AtBound::Shed => begin(&account, "resp_3").await,
            AtBound::Block => {
                tokio::time::pause();
                let refused = begin(&account, "resp_3").await;
                tokio::time::resume();
                refused
            }
        };
        assert_eq!(refused.err(), Some(Full), "{at_bound:?}");
        memory.broken.store(false, Ordering::Relaxed);
        billing.flush().await;
        let third = begin(&account, "resp_3").await;
        drop((second, third.unwrap()));
        billing.flush().await;
        let ends = memory.records();
        let ends: Vec<_> = ends
            .iter()
            .filter(|it| it.settled_at_ms.is_some())
            .collect();
        assert_eq!(ends.len(), 3, "{at_bound:?}");
        memory.changes.lock().clear();
    }
}

#[tokio::test]
async fn where_it_is_reserved_first_a_create_waits_until_it_is_written() {
    let memory = Memory::default();
    let first = BillingOptions {
        reserve: Reserve::First,
        ..options()
    };
    let billing = over(&memory, first);
    let account = account(&billing);
    let meter = begin(&account, "resp_1").await.unwrap();
    assert_eq!(memory.records().len(), 1);
    memory.broken.store(true, Ordering::Relaxed);
    tokio::time::pause();
    assert_eq!(begin(&account, "resp_2").await.err(), Some(Full));
    tokio::time::resume();
    memory.broken.store(false, Ordering::Relaxed);
    meter.settle(completed(), counts(1));
    billing.flush().await;
    let records = memory.records();
    let mut ends: Vec<_> = records.iter().map(|it| it.end.to_string()).collect();
    ends.retain(|end| !end.is_empty());
    ends.sort_unstable();
    assert_eq!(ends, ["completed", "refused"]);
}

#[tokio::test]
async fn a_blocked_create_goes_on_when_there_is_room() {
    let memory = Memory::default();
    let one = BillingOptions {
        backlog_records_max: 1,
        at_bound: AtBound::Block,
        block_time_max: NEVER,
        ..options()
    };
    let billing = over(&memory, one);
    let account = account(&billing);
    let first = begin(&account, "resp_1").await.unwrap();
    let (second, _) = tokio::join!(begin(&account, "resp_2"), async {
        tokio::task::yield_now().await;
        first.settle(completed(), counts(1))
    });
    second.unwrap();
}

#[tokio::test]
async fn what_a_process_left_open_is_settled_by_the_next() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let billing = Billing::open(&path, Durability::Full, options(), Vec::new()).unwrap();
    let billing = Arc::new(billing);
    let account = account(&billing);
    let mut open = begin(&account, "resp_open").await.unwrap();
    open.checkpoint(counts(20));
    open.checkpoint(counts(21));
    let whole = begin(&account, "resp_whole").await.unwrap();
    let receipt = whole.settle(completed(), counts(5));
    billing.flush().await;

    let busy = Billing::open(&path, Durability::Normal, options(), Vec::new());
    let busy = busy.err().unwrap().to_string();
    assert!(busy.starts_with("another process uses it"), "{busy}");

    // As a kill leaves it: the files as they are now, under another name.
    let killed = dir.path().join("killed");
    std::fs::copy(&path, &killed).unwrap();
    std::fs::copy(
        dir.path().join("journal-wal"),
        dir.path().join("killed-wal"),
    )
    .unwrap();
    for _ in 0..2 {
        drop(Journal::open(&killed, Durability::Normal, 7).unwrap());
        let expected = ["resp_whole completed 5", "resp_open interrupted 20"];
        assert_eq!(settled(&killed), expected);
    }
    let records = Reading::open(&killed).unwrap().after(0, 10).unwrap();
    assert_eq!(records[0].1.id, receipt.record_id);
    assert_eq!((records[1].0, records[1].1.settled_at_ms), (2, Some(7)));
    drop(open);
}

#[test]
fn a_settled_record_stays_as_it_is() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let mut journal = Journal::open(&path, Durability::Normal, 0).unwrap();
    let record = record("resp_1", 5, Some(10));
    let put = |record: &Record| Change::Record(Box::new(record.clone()));
    journal.commit(&[put(&record)]).unwrap();
    let other = Record {
        counts: counts(9),
        ..record.clone()
    };
    let again = Record {
        settled_at_ms: None,
        end: "".into(),
        ..record.clone()
    };
    journal.commit(&[put(&other), put(&again)]).unwrap();
    let reading = Reading::open(&path).unwrap();
    assert_eq!(reading.after(0, 10).unwrap(), [(1, record)]);
}

/// A record of this response with so many tokens.
pub(super) fn record(response: &str, output: u32, settled_at_ms: Option<u64>) -> Record {
    Record {
        id: record_id("journal", &response.into()),
        response: response.into(),
        tenant: "acme".into(),
        key: "key".into(),
        session: "sess".into(),
        model_asked: "".into(),
        model_served: "tiny".into(),
        backend: "sim".into(),
        counts: counts(output),
        stream_ms: 3,
        end: "completed".into(),
        reason: "".into(),
        finish: "stop".into(),
        price_book_version: "".into(),
        reserved_at_ms: 1,
        settled_at_ms,
    }
}

#[test]
fn what_is_old_leaves_once_every_sink_has_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let mut journal = Journal::open(&path, Durability::Normal, 0).unwrap();
    for (response, at_ms) in [("a", 10), ("b", 11), ("c", 12), ("d", 13), ("e", 99)] {
        let record = record(response, 1, Some(at_ms));
        journal.commit(&[Change::Record(Box::new(record))]).unwrap();
    }
    let sweep = |sinks: &[&str]| Change::Sweep {
        before_ms: 50,
        sinks: sinks.iter().map(|&name| name.into()).collect(),
    };
    let exported = |sink: &str, upto| Change::Exported {
        sink: sink.into(),
        upto,
    };
    let left = || {
        let records = Reading::open(&path).unwrap().after(0, 10).unwrap();
        records.iter().map(|it| &*it.1.response).collect::<String>()
    };
    journal
        .commit(&[exported("x", 2), sweep(&["x", "y"])])
        .unwrap();
    assert_eq!(left(), "abcde");
    let buried = Change::Buried {
        sink: "y".into(),
        numbers: vec![2],
        attempts: 3,
        error: "down".to_owned(),
        at_ms: 20,
    };
    journal.commit(&[buried, sweep(&["x", "y"])]).unwrap();
    assert_eq!(left(), "bcde");
    let revived = Change::Revived {
        sink: "y".into(),
        numbers: vec![2],
    };
    journal
        .commit(&[
            revived,
            exported("x", 5),
            exported("y", 5),
            sweep(&["x", "y"]),
        ])
        .unwrap();
    assert_eq!(left(), "e");
    // The order goes on, also where nothing is left that says so.
    drop(journal);
    let mut journal = Journal::open(&path, Durability::Normal, 0).unwrap();
    journal
        .commit(&[Change::Record(Box::new(record("f", 1, Some(100))))])
        .unwrap();
    let last = Reading::open(&path).unwrap().after(5, 10).unwrap();
    assert_eq!((last.len(), last[0].0), (1, 6));
}

#[test]
fn a_file_that_is_no_journal_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    std::fs::write(&path, "something else, and long enough to be looked at").unwrap();
    let error = Journal::open(&path, Durability::Normal, 0).err().unwrap();
    assert_eq!(error.to_string(), "file is not a database");
    let path = dir.path().join("other");
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.execute_batch("CREATE TABLE x (y)").unwrap();
    let error = Journal::open(&path, Durability::Normal, 0).err().unwrap();
    let expected = "the file is of format 0, and this program reads 2";
    assert_eq!(error.to_string(), expected);
}

/// A journal as the first format had it, with a record that is settled and one that is open.
const OF_FORMAT_1: &str = "
    CREATE TABLE journal (id TEXT NOT NULL);
    INSERT INTO journal VALUES ('journal_1');
    CREATE TABLE records (id TEXT PRIMARY KEY, response TEXT NOT NULL, tenant TEXT NOT NULL, key TEXT NOT NULL,
        session TEXT NOT NULL, model_asked TEXT NOT NULL, model_served TEXT NOT NULL, backend TEXT NOT NULL,
        input_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL, reused_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL,
        delivered_tokens INTEGER NOT NULL, samples INTEGER NOT NULL, hosted_calls INTEGER NOT NULL,
        stream_ms INTEGER NOT NULL, end TEXT NOT NULL, reason TEXT NOT NULL, finish TEXT NOT NULL,
        price_book_version TEXT NOT NULL, reserved_at_ms INTEGER NOT NULL, settled_at_ms INTEGER,
        number INTEGER UNIQUE) WITHOUT ROWID;
    CREATE INDEX unsettled ON records (id) WHERE settled_at_ms IS NULL;
    CREATE TABLE sinks (name TEXT PRIMARY KEY, upto INTEGER NOT NULL);
    CREATE TABLE dead_letters (sink TEXT NOT NULL, number INTEGER NOT NULL, attempts INTEGER NOT NULL,
        error TEXT NOT NULL, at_ms INTEGER NOT NULL, PRIMARY KEY (sink, number)) WITHOUT ROWID;
    INSERT INTO records VALUES ('rec_a', 'resp_a', 'acme', 'key', 'sess', '', 'tiny', 'sim',
        100, 40, 60, 30, 5, 1, 5, 1, 0, 3, 'completed', '', 'stop', '', 1, 10, 1);
    INSERT INTO records VALUES ('rec_b', 'resp_b', 'acme', 'key', 'sess', '', 'tiny', 'sim',
        100, 40, 60, 30, 7, 1, 7, 1, 0, 3, '', '', '', '', 2, NULL, NULL);
    PRAGMA user_version = 1;
";

#[test]
fn a_journal_of_the_first_format_is_brought_up() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.execute_batch(OF_FORMAT_1).unwrap();
    drop(connection);
    for _ in 0..2 {
        let mut journal = Journal::open(&path, Durability::Normal, 20).unwrap();
        assert_eq!(&**journal.id(), "journal_1");
        let new = Change::Record(Box::new(record("resp_c", 9, Some(30))));
        journal.commit(&[new]).unwrap();
    }
    let records = Reading::open(&path).unwrap().after(0, 10).unwrap();
    let seen: Vec<_> = records
        .iter()
        .map(|(_, it)| {
            let Counts {
                output_tokens,
                calls,
                sample_ms,
                cost_nanos,
                ..
            } = it.counts;
            (
                &*it.response,
                &*it.end,
                [output_tokens, calls, sample_ms, cost_nanos],
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("resp_a", "completed", [5, 0, 0, 0]),
            ("resp_b", "interrupted", [7, 0, 0, 0]),
            ("resp_c", "completed", [9, 2, 40, 7_000]),
        ]
    );
}

#[test]
fn a_journal_of_a_later_format_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    drop(Journal::open(&path, Durability::Normal, 0).unwrap());
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 3).unwrap();
    let error = Journal::open(&path, Durability::Normal, 0).err().unwrap();
    let expected = "the file is of format 3, and this program reads 2";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn what_was_used_since_a_time_is_summed_up_for_each_key_and_model() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("journal");
    let mut journal = Journal::open(&path, Durability::Normal, 0).unwrap();
    let put = |response: &str, key: &str, settled_at_ms| {
        let record = Record {
            key: key.into(),
            ..record(response, 5, settled_at_ms)
        };
        Change::Record(Box::new(record))
    };
    let dear = Record {
        counts: Counts {
            cost_nanos: u64::MAX,
            ..counts(1)
        },
        tenant: "zen".into(),
        ..record("f", 1, Some(12))
    };
    let also_dear = Record {
        id: "g".into(),
        ..dear.clone()
    };
    let changes = [
        put("a", "key", Some(9)),
        put("b", "key", Some(10)),
        put("c", "key", Some(11)),
        put("d", "other", Some(11)),
        put("e", "key", None),
        Change::Record(Box::new(dear)),
        Change::Record(Box::new(also_dear)),
    ];
    journal.commit(&changes).unwrap();
    let tally = |key: &str, times: u64| Tally {
        tenant: "acme".into(),
        key: key.into(),
        model: "tiny".into(),
        input_tokens: 100 * times,
        output_tokens: 5 * times,
        calls: 2 * times,
        sample_ms: 40 * times,
        cost_nanos: 7_000 * times,
    };
    let zen = Tally {
        tenant: "zen".into(),
        output_tokens: 2,
        // As much as the file can say.
        cost_nanos: i64::MAX as u64,
        ..tally("key", 2)
    };
    let used = |since| Journal::used_since(&path, since).unwrap();
    assert_eq!(used(10), [tally("key", 2), tally("other", 1), zen.clone()]);
    // The next process settles what was open.
    drop(journal);
    drop(Journal::open(&path, Durability::Normal, 50).unwrap());
    assert_eq!(used(10), [tally("key", 3), tally("other", 1), zen]);
    assert_eq!(used(50), [tally("key", 1)]);
    assert_eq!(used(51), []);
}
