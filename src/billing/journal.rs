//! The journal: usage records in a file of SQLite.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, Transaction, params};

use super::{Change, Counts, Durability, Medium, MediumError, Record, Tally, unique};

/// What `PRAGMA user_version` says of a file that this program reads.
const FORMAT: i64 = FORMATS.len() as i64;

/// How long a statement waits for the lock of somebody who reads the file by hand.
const BUSY_TIME_MAX: Duration = Duration::from_millis(500);

/// What makes each format of the one before it: a new file goes through all of them, an older one through those
/// that it lacks.
const FORMATS: [&str; 2] = [FIRST, CALLS_TIME_COST];

const FIRST: &str = "
    CREATE TABLE journal (id TEXT NOT NULL);
    CREATE TABLE records (
        id TEXT PRIMARY KEY,
        response TEXT NOT NULL,
        tenant TEXT NOT NULL,
        key TEXT NOT NULL,
        session TEXT NOT NULL,
        model_asked TEXT NOT NULL,
        model_served TEXT NOT NULL,
        backend TEXT NOT NULL,
        input_tokens INTEGER NOT NULL,
        new_tokens INTEGER NOT NULL,
        reused_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        reasoning_tokens INTEGER NOT NULL,
        delivered_tokens INTEGER NOT NULL,
        samples INTEGER NOT NULL,
        hosted_calls INTEGER NOT NULL,
        stream_ms INTEGER NOT NULL,
        end TEXT NOT NULL,
        reason TEXT NOT NULL,
        finish TEXT NOT NULL,
        price_book_version TEXT NOT NULL,
        reserved_at_ms INTEGER NOT NULL,
        settled_at_ms INTEGER,
        number INTEGER UNIQUE
    ) WITHOUT ROWID;
    CREATE INDEX unsettled ON records (id) WHERE settled_at_ms IS NULL;
    CREATE TABLE sinks (name TEXT PRIMARY KEY, upto INTEGER NOT NULL);
    CREATE TABLE dead_letters (
        sink TEXT NOT NULL,
        number INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        error TEXT NOT NULL,
        at_ms INTEGER NOT NULL,
        PRIMARY KEY (sink, number)
    ) WITHOUT ROWID;
";

/// What budgets count beyond tokens, and an index in which all that they count stands in the order of those who used it:
/// it is summed up without a look at the records, and without sorting.
const CALLS_TIME_COST: &str = "
    ALTER TABLE records ADD COLUMN calls INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE records ADD COLUMN sample_ms INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE records ADD COLUMN cost_nanos INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX settled ON records (
        tenant, key, model_served, settled_at_ms, input_tokens, output_tokens, calls, sample_ms, cost_nanos
    ) WHERE settled_at_ms IS NOT NULL;
";

const COLUMNS: &str = "id, response, tenant, key, session, model_asked, model_served, backend, \
    input_tokens, new_tokens, reused_tokens, cached_tokens, output_tokens, reasoning_tokens, \
    delivered_tokens, samples, hosted_calls, calls, sample_ms, cost_nanos, stream_ms, end, reason, finish, price_book_version, \
    reserved_at_ms, settled_at_ms, number";

/// A record that is settled is never changed: what is written twice is there once.
const UPSERT: &str = "
    ON CONFLICT (id) DO UPDATE SET
        model_served = excluded.model_served,
        backend = excluded.backend,
        input_tokens = excluded.input_tokens,
        new_tokens = excluded.new_tokens,
        reused_tokens = excluded.reused_tokens,
        cached_tokens = excluded.cached_tokens,
        output_tokens = excluded.output_tokens,
        reasoning_tokens = excluded.reasoning_tokens,
        delivered_tokens = excluded.delivered_tokens,
        samples = excluded.samples,
        hosted_calls = excluded.hosted_calls,
        calls = excluded.calls,
        sample_ms = excluded.sample_ms,
        cost_nanos = excluded.cost_nanos,
        stream_ms = excluded.stream_ms,
        end = excluded.end,
        reason = excluded.reason,
        finish = excluded.finish,
        settled_at_ms = excluded.settled_at_ms,
        number = excluded.number
    WHERE records.settled_at_ms IS NULL";

/// Why a journal cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// It is not a journal, or of no use.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The operating system refused something.
    #[error(transparent)]
    System(#[from] std::io::Error),
}

/// Another process has the journal. Two that settle each other's records would lose usage.
#[derive(Debug, thiserror::Error)]
#[error("another process uses it, as its lock {} says", lock.display())]
pub struct Busy {
    /// The file that is locked.
    pub lock: PathBuf,
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be read or written.
    #[error("{0}")]
    Database(#[from] rusqlite::Error),
    /// The file was written by another version of this program.
    #[error("the file is of format {found}, and this program reads {FORMAT}")]
    Format {
        /// The file's.
        found: i64,
    },
}

impl From<rusqlite::Error> for MediumError {
    fn from(error: rusqlite::Error) -> Self {
        Self(Box::new(error))
    }
}

/// The file, and the right to write it.
pub struct Journal {
    connection: Connection,
    id: Arc<str>,
    /// The place in the order of settling that the next settled record gets.
    next: i64,
    /// Held for as long as the file is written.
    _lock: File,
}

impl Journal {
    /// Opens the journal in this file, or makes one. Records that a process before this one left
    /// reserved are settled as `interrupted`, with what was last written of them.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(path: &Path, sync: Durability, at_ms: u64) -> Result<Self, OpenError> {
        let lock = lock(path)?;
        let mut connection = connect(path, OpenFlags::default())?;
        restrict(path)?;
        connection
            .pragma_update(None, "journal_mode", "WAL")
            .map_err(JournalError::from)?;
        let synchronous = match sync {
            Durability::Normal => "NORMAL",
            Durability::Full => "FULL",
        };
        connection
            .pragma_update(None, "synchronous", synchronous)
            .map_err(JournalError::from)?;
        let id = identity(&mut connection)?;
        let next = next_number(&connection).map_err(JournalError::from)?;
        let mut journal = Self {
            connection,
            id,
            next,
            _lock: lock,
        };
        let interrupted = journal.interrupt(at_ms).map_err(JournalError::from)?;
        if interrupted > 0 {
            tracing::warn!(
                interrupted,
                "usage records were left open and are settled now"
            );
        }
        Ok(journal)
    }

    /// Names this journal among all there are.
    #[must_use]
    pub fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// What was settled since this time according to the journal in this file, together for each API key and model. What a
    /// process before this one left open is among it once the journal was opened.
    ///
    /// # Errors
    ///
    /// [`JournalError`].
    pub fn used_since(path: &Path, at_ms: u64) -> Result<Vec<Tally>, JournalError> {
        Ok(Reading::open(path)?.used_since(at_ms)?)
    }

    /// Settles what nobody will settle any more.
    fn interrupt(&mut self, at_ms: u64) -> rusqlite::Result<usize> {
        let transaction = self.connection.transaction()?;
        let open: Vec<String> = transaction
            .prepare(
                "SELECT id FROM records WHERE settled_at_ms IS NULL ORDER BY reserved_at_ms, id",
            )?
            .query_map([], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        {
            let mut settle = transaction.prepare(
                "UPDATE records SET end = 'interrupted', settled_at_ms = ?2, number = ?3 WHERE id = ?1",
            )?;
            for (number, id) in (self.next..).zip(&open) {
                settle.execute(params![id, signed(at_ms), number])?;
            }
        }
        transaction.commit()?;
        self.next += i64::try_from(open.len()).unwrap_or(0);
        Ok(open.len())
    }
}

impl Medium for Journal {
    fn commit(&mut self, changes: &[Change]) -> Result<(), MediumError> {
        let transaction = self.connection.transaction()?;
        let mut next = self.next;
        {
            let sql = format!(
                "INSERT INTO records ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, \
                 ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24, ?25, ?26, ?27, ?28) {UPSERT}"
            );
            let mut put = transaction.prepare(&sql)?;
            for change in changes {
                match change {
                    Change::Record(record) => {
                        let number = record.settled_at_ms.map(|_| next);
                        insert(&mut put, record, number)?;
                        next += i64::from(number.is_some());
                    }
                    Change::Exported { sink, upto } => advance(&transaction, sink, *upto)?,
                    Change::Buried {
                        sink,
                        numbers,
                        attempts,
                        error,
                        at_ms,
                    } => {
                        let mut bury = transaction.prepare(
                            "INSERT OR REPLACE INTO dead_letters VALUES (?1, ?2, ?3, ?4, ?5)",
                        )?;
                        for number in numbers {
                            let number = signed(*number);
                            bury.execute(params![sink, number, attempts, error, signed(*at_ms)])?;
                        }
                        advance(&transaction, sink, numbers.last().copied().unwrap_or(0))?;
                    }
                    Change::Revived { sink, numbers } => {
                        let mut revive = transaction
                            .prepare("DELETE FROM dead_letters WHERE sink = ?1 AND number = ?2")?;
                        for number in numbers {
                            revive.execute(params![sink, signed(*number)])?;
                        }
                    }
                    Change::Sweep { before_ms, sinks } => sweep(&transaction, *before_ms, sinks)?,
                }
            }
        }
        transaction.commit()?;
        self.next = next;
        Ok(())
    }
}

/// The same file for those who only read it.
pub(super) struct Reading(Connection);

impl Reading {
    /// Opens a journal that is open for writing.
    pub(super) fn open(path: &Path) -> Result<Self, JournalError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Ok(Self(connect(path, flags)?))
    }

    /// Up to where a sink has everything.
    pub(super) fn cursor(&self, sink: &str) -> rusqlite::Result<u64> {
        let sql = "SELECT upto FROM sinks WHERE name = ?1";
        let found = self.0.query_row(sql, [sink], |row| row.get(0)).optional()?;
        Ok(unsigned(found.unwrap_or(0)))
    }

    fn used_since(&self, at_ms: u64) -> rusqlite::Result<Vec<Tally>> {
        // Sums of floating point, since one of integers fails where it does not fit.
        let sum = |column| format!("CAST(total({column}) AS INTEGER) AS {column}");
        let sums = [
            "input_tokens",
            "output_tokens",
            "calls",
            "sample_ms",
            "cost_nanos",
        ]
        .map(sum)
        .join(", ");
        let sql = format!(
            "SELECT tenant, key, model_served, {sums} FROM records INDEXED BY settled \
             WHERE settled_at_ms >= ?1 GROUP BY tenant, key, model_served"
        );
        let mut query = self.0.prepare(&sql)?;
        let tallies = query.query_map([signed(at_ms)], |row| {
            let count = |column: &str| row.get(column).map(unsigned);
            Ok(Tally {
                tenant: row.get("tenant")?,
                key: row.get("key")?,
                model: row.get("model_served")?,
                input_tokens: count("input_tokens")?,
                output_tokens: count("output_tokens")?,
                calls: count("calls")?,
                sample_ms: count("sample_ms")?,
                cost_nanos: count("cost_nanos")?,
            })
        })?;
        tallies.collect()
    }

    /// Settled records behind this place, in order.
    pub(super) fn after(&self, number: u64, most: usize) -> rusqlite::Result<Vec<(u64, Record)>> {
        let sql =
            format!("SELECT {COLUMNS} FROM records WHERE number > ?1 ORDER BY number LIMIT ?2");
        let mut query = self.0.prepare(&sql)?;
        let most = signed(most as u64);
        query
            .query_map(params![signed(number), most], numbered)?
            .collect()
    }

    /// Records that are kept aside for a sink, from behind this place on.
    pub(super) fn dead(
        &self,
        sink: &str,
        number: u64,
        most: usize,
    ) -> rusqlite::Result<Vec<(u64, Record)>> {
        let sql = format!(
            "SELECT {COLUMNS} FROM records WHERE number IN (SELECT number FROM dead_letters \
             WHERE sink = ?1 AND number > ?2 ORDER BY number LIMIT ?3) ORDER BY number"
        );
        let mut query = self.0.prepare(&sql)?;
        let most = signed(most as u64);
        query
            .query_map(params![sink, signed(number), most], numbered)?
            .collect()
    }
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, JournalError> {
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIME_MAX)?;
    Ok(connection)
}

/// The file's name with this behind it.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn lock(path: &Path) -> Result<File, OpenError> {
    let place = beside(path, ".lock");
    let mut options = File::options();
    let file = options
        .create(true)
        .truncate(false)
        .write(true)
        .open(&place)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Busy { lock: place }.into()),
        Err(std::fs::TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Who used what is nobody's business but the owner's. SQLite gives its other files the same rights.
fn restrict(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
}

/// The id of the journal, which is made where there is none yet.
fn identity(connection: &mut Connection) -> Result<Arc<str>, JournalError> {
    let transaction = connection.transaction()?;
    let tables = "SELECT count(*) FROM sqlite_schema";
    let tables: i64 = transaction.query_row(tables, [], |row| row.get(0))?;
    let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = usize::try_from(found).ok();
    let missing = known.and_then(|found| FORMATS.get(found..));
    let missing = match (tables, found, missing) {
        // Something that is no journal, or of a later version.
        (1.., 0, _) | (_, _, None) => return Err(JournalError::Format { found }),
        (_, _, Some(missing)) => missing,
    };
    for step in missing {
        transaction.execute_batch(step)?;
    }
    if found == 0 {
        transaction.execute("INSERT INTO journal VALUES (?1)", [unique("journal")])?;
    }
    if found < FORMAT {
        transaction.pragma_update(None, "user_version", FORMAT)?;
    }
    let id: String = transaction.query_row("SELECT id FROM journal", [], |row| row.get(0))?;
    transaction.commit()?;
    Ok(id.into())
}

/// Records leave, so the sinks too know how far the order has come.
fn next_number(connection: &Connection) -> rusqlite::Result<i64> {
    let sql = "SELECT 1 + max(ifnull((SELECT max(number) FROM records), 0), \
               ifnull((SELECT max(upto) FROM sinks), 0))";
    connection.query_row(sql, [], |row| row.get(0))
}

fn advance(transaction: &Transaction<'_>, sink: &str, upto: u64) -> rusqlite::Result<()> {
    let sql =
        "INSERT INTO sinks VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET upto = excluded.upto";
    transaction
        .execute(sql, params![sink, signed(upto)])
        .map(drop)
}

/// A record stays while a sink has yet to get it. The last one stays too: the order goes on behind it.
fn sweep(
    transaction: &Transaction<'_>,
    before_ms: u64,
    sinks: &[Arc<str>],
) -> rusqlite::Result<()> {
    let mut upto = i64::MAX;
    for sink in sinks {
        let sql = "SELECT upto FROM sinks WHERE name = ?1";
        let found: Option<i64> = transaction
            .query_row(sql, [sink], |row| row.get(0))
            .optional()?;
        upto = upto.min(found.unwrap_or(0));
    }
    let sql = "DELETE FROM records WHERE settled_at_ms < ?1 AND number <= ?2 \
               AND number NOT IN (SELECT number FROM dead_letters) \
               AND number < (SELECT max(number) FROM records)";
    let gone = transaction.execute(sql, params![signed(before_ms), upto])?;
    if gone > 0 {
        tracing::info!(gone, "usage records were kept long enough");
    }
    Ok(())
}

fn insert(
    put: &mut rusqlite::Statement<'_>,
    record: &Record,
    number: Option<i64>,
) -> rusqlite::Result<()> {
    let counts = &record.counts;
    put.execute(params![
        record.id,
        record.response,
        record.tenant,
        record.key,
        record.session,
        record.model_asked,
        record.model_served,
        record.backend,
        signed(counts.input_tokens),
        signed(counts.new_tokens),
        signed(counts.reused_tokens),
        signed(counts.cached_tokens),
        signed(counts.output_tokens),
        signed(counts.reasoning_tokens),
        signed(counts.delivered_tokens),
        signed(counts.samples),
        signed(counts.hosted_calls),
        signed(counts.calls),
        signed(counts.sample_ms),
        signed(counts.cost_nanos),
        signed(record.stream_ms),
        record.end,
        record.reason,
        record.finish,
        record.price_book_version,
        signed(record.reserved_at_ms),
        record.settled_at_ms.map(signed),
        number,
    ])
    .map(drop)
}

fn numbered(row: &Row<'_>) -> rusqlite::Result<(u64, Record)> {
    let count = |column: &str| row.get(column).map(unsigned);
    let record = Record {
        id: row.get("id")?,
        response: row.get("response")?,
        tenant: row.get("tenant")?,
        key: row.get("key")?,
        session: row.get("session")?,
        model_asked: row.get("model_asked")?,
        model_served: row.get("model_served")?,
        backend: row.get("backend")?,
        counts: Counts {
            input_tokens: count("input_tokens")?,
            new_tokens: count("new_tokens")?,
            reused_tokens: count("reused_tokens")?,
            cached_tokens: count("cached_tokens")?,
            output_tokens: count("output_tokens")?,
            reasoning_tokens: count("reasoning_tokens")?,
            delivered_tokens: count("delivered_tokens")?,
            samples: count("samples")?,
            hosted_calls: count("hosted_calls")?,
            calls: count("calls")?,
            sample_ms: count("sample_ms")?,
            cost_nanos: count("cost_nanos")?,
        },
        stream_ms: count("stream_ms")?,
        end: row.get("end")?,
        reason: row.get("reason")?,
        finish: row.get("finish")?,
        price_book_version: row.get("price_book_version")?,
        reserved_at_ms: count("reserved_at_ms")?,
        settled_at_ms: row.get::<_, Option<i64>>("settled_at_ms")?.map(unsigned),
    };
    Ok((count("number")?, record))
}

/// SQLite's integers have a sign. What does not fit is no count that ever was.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
