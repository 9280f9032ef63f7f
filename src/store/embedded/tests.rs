use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

use redb::{StorageBackend, backends::InMemoryBackend};
use tempfile::TempDir;

use super::*;
use crate::store::{Unreadable, tests::record};

const ROOMY: Limits = Limits {
    responses_max: 1000,
    bytes_max: 1 << 20,
    age_max: Duration::from_secs(3600),
};

fn path(dir: &TempDir) -> std::path::PathBuf {
    dir.path().join("store")
}

fn open(dir: &TempDir, limits: Limits) -> Embedded {
    Embedded::open(&path(dir), limits).unwrap()
}

/// A conversation: each response continues the one before it. It was continued this many seconds ago.
fn chain(tenant: &str, ids: &[&str], secs_ago: u64) -> Vec<Arc<Record>> {
    let parents = std::iter::once(None).chain(ids.iter().map(|id| Some(*id)));
    let records = ids.iter().zip(parents).map(|(id, parent)| {
        let mut record = record(tenant, id, parent, ids[0]);
        record.created_at_ms = now_ms() - 1000 * secs_ago;
        Arc::new(record)
    });
    records.collect()
}

/// Which of these the tenant has.
fn has(store: &Embedded, tenant: &str, ids: &str) -> String {
    let found = ids.split(' ').filter(|id| {
        let record = store.get(&tenant.into(), &(*id).into()).unwrap();
        record.is_some_and(|record| record.id.as_str() == *id)
    });
    found.collect::<Vec<_>>().join(" ")
}

fn totals(store: &Embedded) -> (u64, u64) {
    let totals = store.change(|tables| Ok((tables.fact("responses")?, tables.fact("bytes")?)));
    totals.unwrap()
}

#[test]
fn a_file_that_is_opened_again_has_what_was_put() {
    let dir = TempDir::new().unwrap();
    let records = chain("acme", &["a", "b"], 0);
    let store = open(&dir, ROOMY);
    store.put(&records).unwrap();
    // The same once more is nothing new.
    store.put(&records).unwrap();
    drop(store);
    let store = open(&dir, ROOMY);
    for record in &records {
        let found = store.get(&record.tenant, &record.id).unwrap();
        assert_eq!(found.as_ref(), Some(&**record));
    }
    assert_eq!(totals(&store).0, 2);
    assert_eq!(has(&store, "other", "a b"), "");
}

#[cfg(unix)]
#[test]
fn the_file_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = TempDir::new().unwrap();
    let _store = open(&dir, ROOMY);
    let mode = std::fs::metadata(path(&dir)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn one_process_uses_a_file_at_a_time() {
    let dir = TempDir::new().unwrap();
    let _store = open(&dir, ROOMY);
    let error = Embedded::open(&path(&dir), ROOMY)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(
        error,
        "the medium failed: Database already open. Cannot acquire lock."
    );
}

#[test]
fn a_response_without_its_parent_is_left_out() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, ROOMY);
    store.put(&chain("acme", &["a", "b", "c"], 0)[1..]).unwrap();
    assert_eq!(
        (has(&store, "acme", "a b c").as_str(), totals(&store)),
        ("", (0, 0))
    );
}

#[test]
fn what_is_deleted_is_gone_and_what_continued_it_is_not() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, ROOMY);
    store.put(&chain("acme", &["a", "b", "c"], 0)).unwrap();
    store.put(&chain("other", &["a"], 0)).unwrap();
    let delete = |id: &str| store.delete(&"acme".into(), &id.into()).unwrap();
    assert_eq!((delete("b"), delete("b")), (true, false));
    assert_eq!(has(&store, "acme", "a b c"), "a c");
    assert_eq!((delete("a"), delete("c")), (true, true));
    assert_eq!(has(&store, "other", "a"), "a");
    assert_eq!(totals(&store).0, 1);
    assert!(store.delete(&"other".into(), &"a".into()).unwrap());
    assert_eq!(totals(&store), (0, 0));
}

#[test]
fn the_conversation_that_was_silent_for_longest_goes_first_and_as_a_whole() {
    let dir = TempDir::new().unwrap();
    let limits = Limits {
        responses_max: 5,
        ..ROOMY
    };
    let store = open(&dir, limits);
    store.put(&chain("acme", &["old", "old2"], 100)).unwrap();
    store.put(&chain("other", &["older"], 200)).unwrap();
    store.put(&chain("acme", &["new", "new2"], 50)).unwrap();
    assert_eq!(
        has(&store, "acme", "old old2 new new2"),
        "old old2 new new2"
    );

    // It is continued, and so another one is the oldest.
    let more = chain("acme", &["old", "old2", "old3"], 10);
    store.put(&more).unwrap();
    assert_eq!(has(&store, "other", "older"), "");
    assert_eq!(
        has(&store, "acme", "old old2 old3 new new2"),
        "old old2 old3 new new2"
    );

    store.put(&chain("acme", &["newest"], 0)).unwrap();
    assert_eq!(
        has(&store, "acme", "old old2 old3 new new2 newest"),
        "old old2 old3 newest"
    );
    assert_eq!(totals(&store).0, 4);
}

#[test]
fn bytes_and_age_are_limits_too() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, ROOMY);
    store.put(&chain("acme", &["a", "a2"], 60)).unwrap();
    let bytes = totals(&store).1;
    store.put(&chain("acme", &["b"], 30)).unwrap();
    drop(store);
    let limits = |bytes_max, secs| Limits {
        bytes_max,
        age_max: Duration::from_secs(secs),
        ..ROOMY
    };
    assert_eq!(
        has(&open(&dir, limits(2 * bytes, 90)), "acme", "a a2 b"),
        "a a2 b"
    );
    assert_eq!(has(&open(&dir, limits(bytes, 90)), "acme", "a a2 b"), "b");

    let store = open(&dir, limits(1 << 20, 20));
    assert_eq!(
        (has(&store, "acme", "b").as_str(), totals(&store)),
        ("", (0, 0))
    );
    // One that is over the limit by itself is not kept.
    let store = {
        drop(store);
        open(&dir, limits(bytes - 1, 90))
    };
    store.put(&chain("acme", &["a", "a2"], 0)).unwrap();
    assert_eq!(totals(&store), (0, 0));
}

#[test]
fn a_damaged_record_is_told_from_one_that_is_not_there() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, ROOMY);
    store.put(&chain("acme", &["a"], 0)).unwrap();
    let rewrite = |change: fn(&mut Vec<u8>)| {
        let changed = store.change(|tables| {
            let key = ("acme", "a");
            let mut bytes = tables
                .responses
                .get(key)?
                .map(|it| it.value().1.to_vec())
                .unwrap_or_default();
            change(&mut bytes);
            tables.responses.insert(key, ("a", bytes.as_slice()))?;
            Ok(())
        });
        changed.unwrap();
        store.get(&"acme".into(), &"a".into()).unwrap_err()
    };
    let damaged = rewrite(|bytes| bytes[20] ^= 4);
    assert!(
        matches!(damaged, StoreError::Unreadable(Unreadable::Damaged)),
        "{damaged}"
    );
    let old = rewrite(|bytes| bytes[0] = 0);
    assert!(
        matches!(
            old,
            StoreError::Unreadable(Unreadable::Version { found: 0 })
        ),
        "{old}"
    );
    // It can still be deleted.
    assert!(store.delete(&"acme".into(), &"a".into()).unwrap());
}

#[test]
fn a_file_of_another_format_is_refused_as_such() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, ROOMY);
    store
        .change(|tables| Ok(tables.facts.insert("format", 7).map(drop)?))
        .unwrap();
    drop(store);
    let error = Embedded::open(&path(&dir), ROOMY)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(error, "the file is of format 7, and this program reads 1");
}

#[test]
fn a_file_that_is_no_store_is_refused_and_left_alone() {
    let dir = TempDir::new().unwrap();
    std::fs::write(path(&dir), "something of somebody's").unwrap();
    let error = Embedded::open(&path(&dir), ROOMY)
        .err()
        .unwrap()
        .to_string();
    assert!(error.starts_with("the medium failed: "), "{error}");
    assert_eq!(
        std::fs::read(path(&dir)).unwrap(),
        b"something of somebody's"
    );
}

/// A file in memory that can be told to fail, and that outlives the database on it.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Played>);

#[derive(Debug, Default)]
struct Played {
    bytes: InMemoryBackend,
    full: AtomicBool,
    opened: Mutex<u32>,
}

impl Disk {
    fn check(&self) -> std::io::Result<()> {
        if self.0.full.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> std::io::Result<u64> {
        self.0.bytes.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.0.bytes.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.check()?;
        self.0.bytes.set_len(len)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.check()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.check()?;
        self.0.bytes.write(offset, data)
    }
}

#[test]
fn a_disk_that_was_full_is_used_again_when_it_has_room() {
    let disk = Disk::default();
    let opener = {
        let disk = disk.clone();
        move || {
            *disk.0.opened.lock().unwrap() += 1;
            Builder::new().create_with_backend(disk.clone())
        }
    };
    let store = Embedded::with(Box::new(opener), ROOMY).unwrap();
    store.put(&chain("acme", &["a"], 0)).unwrap();

    disk.0.full.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        let error = store.put(&chain("acme", &["a", "b"], 0)).unwrap_err();
        assert!(matches!(error, StoreError::Medium(_)), "{error}");
    }

    disk.0.full.store(false, Ordering::Relaxed);
    // The first attempt finds it closed and opens it.
    let again = || store.put(&chain("acme", &["a", "b"], 0));
    again().or_else(|_| again()).unwrap();
    assert_eq!(has(&store, "acme", "a b"), "a b");
    assert!(*disk.0.opened.lock().unwrap() > 1);
}
