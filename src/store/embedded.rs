//! The store in one file beside the server.
//!
//! Every commit is durable before it returns, and a file that was left by a crash opens as it was
//! after the last one. A conversation is kept or let go as a whole, since its later responses
//! are nothing without the earlier ones: the one that has gone longest without a new response goes first.

use std::{path::Path, sync::Arc, time::Duration};

use parking_lot::RwLock;
use redb::{
    Builder, Database, DatabaseError, MultimapTable, MultimapTableDefinition,
    ReadableDatabase as _, ReadableTable as _, Table, TableDefinition, TableError,
    WriteTransaction,
};

use super::{Record, Store, StoreError, encoding};
use crate::{
    event::now_ms,
    item::{ResponseId, Tenant},
};

/// The layout of the tables below.
const FORMAT: u64 = 1;

/// Pages of the file that are kept in memory.
const CACHE_BYTES: usize = 64 << 20;

/// By tenant and id: the root of the conversation, and the record.
const RESPONSES: TableDefinition<'_, (&str, &str), (&str, &[u8])> =
    TableDefinition::new("responses");
/// By tenant and root: when it was last continued, in milliseconds since 1970, its responses and their bytes.
const CONVERSATIONS: TableDefinition<'_, (&str, &str), (u64, u64, u64)> =
    TableDefinition::new("conversations");
/// By tenant and root: the ids of the responses.
const MEMBERS: MultimapTableDefinition<'_, (&str, &str), &str> =
    MultimapTableDefinition::new("members");
/// By the time of the last continuation: tenant and root.
const BY_TIME: TableDefinition<'_, (u64, &str, &str), ()> = TableDefinition::new("by_time");
/// What is true of the whole file.
const FACTS: TableDefinition<'_, &str, u64> = TableDefinition::new("facts");

/// How much is kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Responses in all.
    pub responses_max: u64,
    /// Bytes of their records in all. The file takes more: indexes, and room that it uses again.
    pub bytes_max: u64,
    /// How long after its last response a conversation is kept.
    pub age_max: Duration,
}

type Opener = Box<dyn Fn() -> Result<Database, DatabaseError> + Send + Sync>;

/// The store in one file.
pub struct Embedded {
    open: Opener,
    /// `None` while the file cannot be opened again after it failed.
    database: RwLock<Option<Database>>,
    limits: Limits,
}

impl Embedded {
    /// Opens this file, or makes it: readable by its owner alone, since it holds what users write.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, is in use by another process, or is of another format.
    pub fn open(path: &Path, limits: Limits) -> Result<Self, StoreError> {
        let path = path.to_owned();
        let open = move || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            options.open(&path).map_err(redb::StorageError::from)?;
            Builder::new().set_cache_size(CACHE_BYTES).create(&path)
        };
        Self::with(Box::new(open), limits)
    }

    fn with(open: Opener, limits: Limits) -> Result<Self, StoreError> {
        let database = open().map_err(medium)?;
        prepare(&database)?;
        let store = Self {
            open,
            database: RwLock::new(Some(database)),
            limits,
        };
        store.sweep()?;
        Ok(store)
    }

    /// One transaction, made durable.
    fn change<T>(
        &self,
        work: impl FnOnce(&mut Tables<'_>) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let changed = match &*self.database.read() {
            Some(database) => transaction(database, work),
            None => Err(redb::Error::DatabaseClosed),
        };
        changed.map_err(|error| {
            // After a failure of its file a database refuses everything until it is opened again.
            self.reopen();
            medium(error)
        })
    }

    fn reopen(&self) {
        let mut database = self.database.write();
        // Closed first: the file is locked while it is open.
        *database = None;
        match (self.open)() {
            Ok(again) => *database = Some(again),
            Err(error) => tracing::error!(%error, "the store cannot be opened again"),
        }
    }
}

impl Store for Embedded {
    fn put(&self, records: &[Arc<Record>]) -> Result<(), StoreError> {
        let encoded = records
            .iter()
            .map(|record| Ok((&**record, encoding::encode(record).map_err(medium)?)))
            .collect::<Result<Vec<_>, StoreError>>()?;
        self.change(|tables| {
            for (record, bytes) in &encoded {
                tables.insert(record, bytes)?;
            }
            tables.evict(&self.limits, now_ms())
        })
    }

    fn get(&self, tenant: &Tenant, id: &ResponseId) -> Result<Option<Record>, StoreError> {
        let database = self.database.read();
        let database = database
            .as_ref()
            .ok_or_else(|| medium(redb::Error::DatabaseClosed))?;
        let transaction = database.begin_read().map_err(medium)?;
        let responses = transaction.open_table(RESPONSES).map_err(medium)?;
        let found = responses
            .get((tenant.as_str(), id.as_str()))
            .map_err(medium)?;
        let record = found.map(|found| encoding::decode(found.value().1));
        Ok(record.transpose()?)
    }

    fn delete(&self, tenant: &Tenant, id: &ResponseId) -> Result<bool, StoreError> {
        self.change(|tables| tables.remove(tenant.as_str(), id.as_str()))
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.change(|tables| tables.evict(&self.limits, now_ms()))
    }
}

fn medium(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Medium(Box::new(error))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Makes the tables of a new file, and holds an old one against our format.
fn prepare(database: &Database) -> Result<(), StoreError> {
    // Looked at before any table is opened that may be another one there.
    match format(database).map_err(medium)? {
        None => {
            let made = transaction(database, |tables| {
                tables.facts.insert("format", FORMAT)?;
                Ok(())
            });
            made.map_err(medium)
        }
        Some(FORMAT) => Ok(()),
        Some(found) => Err(StoreError::Format {
            found,
            expected: FORMAT,
        }),
    }
}

/// The format of the file. `None` for a new one.
fn format(database: &Database) -> Result<Option<u64>, redb::Error> {
    match database.begin_read()?.open_table(FACTS) {
        Ok(facts) => Ok(facts.get("format")?.map(|format| format.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn transaction<T>(
    database: &Database,
    work: impl FnOnce(&mut Tables<'_>) -> Result<T, redb::Error>,
) -> Result<T, redb::Error> {
    let mut transaction = database.begin_write()?;
    // Without it, opening a large file after a crash reads all of it.
    transaction.set_quick_repair(true);
    let done = work(&mut Tables::open(&transaction)?)?;
    transaction.commit()?;
    Ok(done)
}

/// All tables, in one transaction.
struct Tables<'t> {
    responses: Table<'t, (&'static str, &'static str), (&'static str, &'static [u8])>,
    conversations: Table<'t, (&'static str, &'static str), (u64, u64, u64)>,
    members: MultimapTable<'t, (&'static str, &'static str), &'static str>,
    by_time: Table<'t, (u64, &'static str, &'static str), ()>,
    facts: Table<'t, &'static str, u64>,
}

impl<'t> Tables<'t> {
    fn open(transaction: &'t WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self {
            responses: transaction.open_table(RESPONSES)?,
            conversations: transaction.open_table(CONVERSATIONS)?,
            members: transaction.open_multimap_table(MEMBERS)?,
            by_time: transaction.open_table(BY_TIME)?,
            facts: transaction.open_table(FACTS)?,
        })
    }

    fn fact(&self, name: &str) -> Result<u64, redb::Error> {
        Ok(self.facts.get(name)?.map_or(0, |value| value.value()))
    }

    fn insert(&mut self, record: &Record, bytes: &[u8]) -> Result<(), redb::Error> {
        let (tenant, id, root) = (
            record.tenant.as_str(),
            record.id.as_str(),
            record.root.as_str(),
        );
        if self.responses.get((tenant, id))?.is_some() {
            // It was written by an attempt that seemed to fail.
            return Ok(());
        }
        if let Some(parent) = &record.parent
            && self.responses.get((tenant, parent.as_str()))?.is_none()
        {
            tracing::info!(%id, %parent, "not stored: what it continues is not in the store any more");
            return Ok(());
        }
        self.responses.insert((tenant, id), (root, bytes))?;
        self.members.insert((tenant, root), id)?;
        self.account(tenant, root, |conversation| {
            conversation.last_ms = conversation.last_ms.max(record.created_at_ms);
            conversation.responses += 1;
            conversation.bytes += bytes.len() as u64;
        })
    }

    /// Forgets one response. Says whether there was one.
    fn remove(&mut self, tenant: &str, id: &str) -> Result<bool, redb::Error> {
        let (root, bytes) = match self.responses.remove((tenant, id))? {
            None => return Ok(false),
            Some(removed) => {
                let (root, bytes) = removed.value();
                (root.to_owned(), bytes.len() as u64)
            }
        };
        self.members.remove((tenant, root.as_str()), id)?;
        self.account(tenant, &root, |conversation| {
            conversation.responses -= 1;
            conversation.bytes -= bytes;
        })?;
        Ok(true)
    }

    /// Changes what is known of a conversation, and of all of them together.
    fn account(
        &mut self,
        tenant: &str,
        root: &str,
        change: impl FnOnce(&mut Conversation),
    ) -> Result<(), redb::Error> {
        let old = match self.conversations.get((tenant, root))? {
            None => Conversation::default(),
            Some(found) => Conversation::from(found.value()),
        };
        let mut new = old;
        change(&mut new);
        if old.responses > 0 {
            self.by_time.remove((old.last_ms, tenant, root))?;
        }
        if new.responses > 0 {
            self.by_time.insert((new.last_ms, tenant, root), ())?;
            let value = (new.last_ms, new.responses, new.bytes);
            self.conversations.insert((tenant, root), value)?;
        } else {
            self.conversations.remove((tenant, root))?;
        }
        for (name, old, new) in [
            ("responses", old.responses, new.responses),
            ("bytes", old.bytes, new.bytes),
        ] {
            let total = self.fact(name)? + new - old;
            self.facts.insert(name, total)?;
        }
        Ok(())
    }

    /// Lets go of conversations, the longest silent first, until all limits are kept.
    fn evict(&mut self, limits: &Limits, now_ms: u64) -> Result<(), redb::Error> {
        let oldest_ms = now_ms.saturating_sub(millis(limits.age_max));
        loop {
            let (last_ms, tenant, root) = match self.by_time.first()? {
                None => return Ok(()),
                Some((oldest, _)) => {
                    let (last_ms, tenant, root) = oldest.value();
                    (last_ms, tenant.to_owned(), root.to_owned())
                }
            };
            let full = self.fact("responses")? > limits.responses_max
                || self.fact("bytes")? > limits.bytes_max;
            if !full && last_ms >= oldest_ms {
                return Ok(());
            }
            self.let_go(&tenant, &root)?;
        }
    }

    fn let_go(&mut self, tenant: &str, root: &str) -> Result<(), redb::Error> {
        let ids = self
            .members
            .remove_all((tenant, root))?
            .map(|id| Ok(id?.value().to_owned()))
            .collect::<Result<Vec<String>, redb::Error>>()?;
        for id in &ids {
            self.responses.remove((tenant, id.as_str()))?;
        }
        tracing::debug!(%root, responses = ids.len(), "a conversation left the store");
        self.account(tenant, root, |conversation| {
            conversation.responses = 0;
            conversation.bytes = 0;
        })
    }
}

/// What is known of a conversation.
#[derive(Debug, Clone, Copy, Default)]
struct Conversation {
    last_ms: u64,
    responses: u64,
    bytes: u64,
}

impl From<(u64, u64, u64)> for Conversation {
    fn from((last_ms, responses, bytes): (u64, u64, u64)) -> Self {
        Self {
            last_ms,
            responses,
            bytes,
        }
    }
}

#[cfg(test)]
mod tests;
