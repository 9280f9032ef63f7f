//! Where a response is found: in memory, else in the store, where there is one. Responses become
//! records of the store behind the loop's back, and records become responses again.

use std::{
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    event::{IncompleteReason, Status},
    item::{Item, ResponseId, Tenant},
    model::{Artifacts, Models},
    render::{self, Entries, Head, Heads},
    request::{Settings, ValidItem},
    safety::Checked,
    session::{Committed, Sessions, Storing, View},
    store::{Batch, Missed, Queue, Record, StoreError},
};

/// A conversation that is longer is not read from the store.
const CHAIN_RESPONSES_MAX: usize = 100_000;
const CHAIN_BYTES_MAX: usize = 1 << 30;

/// Conversations that are read from the store at once.
const READS_MAX: usize = 16;

/// All responses that can be found: those in memory, and those in the store.
pub struct Archive {
    sessions: Arc<Sessions>,
    tier: Option<Tier>,
}

/// The store, and what a record becomes a response again with.
struct Tier {
    queue: Queue,
    models: Arc<Models>,
    heads: Arc<Heads>,
    /// One for each read at a time; which one goes by the id, so that nothing is read twice at once.
    reads: [tokio::sync::Mutex<()>; READS_MAX],
    /// How many responses were deleted, so that a read sees that it may hold one of them.
    deletions: AtomicU64,
}

/// Why records do not become responses again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Unusable {
    /// The store has not kept what it continues.
    #[error("what it continues is not in the store any more")]
    Orphan,
    #[error("its conversation has more than {CHAIN_RESPONSES_MAX} responses")]
    Long,
    #[error("its conversation has more than {CHAIN_BYTES_MAX} bytes")]
    Large,
    /// Its tokens are not those that were sampled from.
    #[error("its tokens are not what they were")]
    Tokens,
}

impl Archive {
    /// What is in memory alone.
    #[must_use]
    pub fn new(sessions: Arc<Sessions>) -> Arc<Self> {
        Arc::new(Self {
            sessions,
            tier: None,
        })
    }

    /// The same with a store behind it, and the models and heads that its records were made with.
    #[must_use]
    pub fn with_store(
        sessions: Arc<Sessions>,
        queue: Queue,
        models: Arc<Models>,
        heads: Arc<Heads>,
    ) -> Arc<Self> {
        let tier = Tier {
            queue,
            models,
            heads,
            reads: Default::default(),
            deletions: AtomicU64::new(0),
        };
        Arc::new(Self {
            sessions,
            tier: Some(tier),
        })
    }

    /// What is in memory.
    #[must_use]
    pub fn sessions(&self) -> &Arc<Sessions> {
        &self.sessions
    }

    /// Whether responses may be found that are not in memory.
    #[must_use]
    pub fn has_store(&self) -> bool {
        self.tier.is_some()
    }

    /// The response of this id, of this tenant: one that is held in memory, else from the store,
    /// and the responses before it with it. From there on they are parked like others.
    ///
    /// # Errors
    ///
    /// The store failed. What it holds and cannot be read is not found, and logged.
    pub async fn load(
        self: &Arc<Self>,
        tenant: &Tenant,
        id: &ResponseId,
    ) -> Result<Option<Arc<Committed>>, StoreError> {
        if let Some(found) = self.sessions.find(tenant, id) {
            return Ok(Some(found));
        }
        let Some(tier) = &self.tier else {
            return Ok(None);
        };
        // Of many that want the same, one reads it.
        let _reading = tier.reading(id).lock().await;
        let (archive, tenant, id) = (self.clone(), tenant.clone(), id.clone());
        let read = tokio::task::spawn_blocking(move || archive.read(&tenant, &id)).await;
        // A panic was logged where it happened.
        read.unwrap_or(Ok(None))
    }

    /// Gives a response to the store, where it goes there. Waits only while the store's queue is
    /// full.
    pub async fn keep(&self, response: &Committed) {
        if let Some(tier) = &self.tier {
            tier.keep(response).await;
        }
    }

    /// Waits until the store has everything that it was given.
    pub async fn flush(&self) {
        if let Some(tier) = &self.tier {
            tier.queue.flush().await;
        }
    }

    /// Forgets a response, also in the store. Those that continue it keep what they share with it
    /// while they are in memory. Says whether there was one.
    ///
    /// # Errors
    ///
    /// The store takes no commands now; in memory it is forgotten.
    pub async fn delete(&self, tenant: &Tenant, id: &ResponseId) -> Result<bool, Missed> {
        let found = self.sessions.find(tenant, id);
        if let Some(found) = &found {
            // From here on nobody gives it to the store.
            found.storing.give(|| {});
        }
        let stored = match &self.tier {
            None => false,
            Some(tier) => {
                tier.deletions.fetch_add(1, Ordering::SeqCst);
                self.sessions.forget(tenant, id);
                tier.queue.delete(tenant, id).await?
            }
        };
        self.sessions.forget(tenant, id);
        Ok(stored || found.is_some())
    }
}

impl Tier {
    /// The place of those that read this response now.
    fn reading(&self, id: &ResponseId) -> &tokio::sync::Mutex<()> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(id);
        &self.reads[(hash % READS_MAX as u64) as usize]
    }

    /// Queues a response, behind those before it that found no room when they were committed.
    async fn keep(&self, response: &Committed) {
        let due = response.chain().take_while(|node| node.storing.is_due());
        let due: Vec<&Committed> = due.collect();
        if due.is_empty() {
            return;
        }
        let bytes = due.iter().map(|node| node.bytes()).sum();
        // Missed: it was logged, and the next response of the conversation tries again.
        let Ok(place) = self.queue.place(bytes).await else {
            return;
        };
        for node in due.into_iter().rev() {
            // While it is queued nobody queues what continues it.
            node.storing.give(|| {
                if let Some(record) = record(node) {
                    self.queue.put(record, place.clone());
                }
            });
        }
    }

    /// A record as the response that it was made of. Costs what the record holds.
    fn restore(
        &self,
        record: &Record,
        parent: Option<Arc<Committed>>,
    ) -> Result<Committed, Unusable> {
        let settings = match &parent {
            Some(parent) if record.settings == Settings::default() && record.reset.is_empty() => {
                parent.settings.clone()
            }
            Some(parent) => {
                let own = record.settings.clone();
                Arc::new(own.inherit(&parent.settings, &record.reset))
            }
            None => Arc::new(record.settings.clone()),
        };
        let base = parent.as_ref().map(|parent| parent.rope.clone());
        let rope = base.unwrap_or_default().grown(&record.growth);
        let rope = rope.filter(|rope| rope.fingerprint() == record.prompt.fingerprint);
        let rope = rope.ok_or(Unusable::Tokens)?;
        let view = self.view(record, &settings, parent.as_deref());
        let items = |sampled: bool| -> Vec<Arc<Item>> {
            let batches = record.batches.iter().filter(|it| it.sampled == sampled);
            let items = batches.flat_map(|batch| &batch.items);
            items.map(|new| new.item.clone()).collect()
        };
        Ok(Committed {
            id: record.id.clone(),
            tenant: record.tenant.clone(),
            root: record.root.clone(),
            model: record.model.clone(),
            settings,
            date: record.date,
            affinity: record.affinity.clone(),
            input: items(false),
            output: items(true),
            batches: record.batches.iter().map(|it| it.items.clone()).collect(),
            chat: std::sync::OnceLock::new(),
            view,
            pending: record.pending.clone(),
            rope,
            prompt_tokens: record.prompt_tokens,
            prompt_entries: record.prompt_entries,
            open_calls: record.open_calls.clone(),
            status: record
                .incomplete
                .map_or(Status::Completed, Status::Incomplete),
            finish: record.finish,
            usage: record.usage,
            prompt: record.prompt,
            created_at_ms: record.created_at_ms,
            metadata: record.metadata.clone(),
            storing: Storing::Wanted(parking_lot::Mutex::new(true)),
            checked: Checked::default(),
            parent,
        })
    }

    /// How the response was rendered, where a model still has the text side for it.
    fn view(
        &self,
        record: &Record,
        settings: &Settings,
        parent: Option<&Committed>,
    ) -> Option<View> {
        let mut models = self.models.all().into_iter();
        let model = models.find(|model| model.artifacts.fingerprint == record.artifacts)?;
        let artifacts = model.artifacts.clone();
        let before = parent.map(|parent| (parent, parent.view_under(&artifacts)));
        let head = match before {
            Some((parent, Some(view))) if settings.renders_like(&parent.settings) => {
                view.head.clone()
            }
            Some(_) | None => self.head(record, settings, &artifacts)?,
        };
        let own = record.batches.iter().map(|batch| batch.items.as_slice());
        let mut entries = match before {
            Some((parent, None)) => {
                let nodes: Vec<&Committed> = parent.chain().collect();
                let past = nodes.iter().rev().flat_map(|node| &node.batches);
                past.flat_map(|batch| render::entries(batch, &artifacts))
                    .collect()
            }
            Some((_, Some(view))) => view.entries.clone(),
            None => Entries::new_sync(),
        };
        entries.extend(own.flat_map(|batch| render::entries(batch, &artifacts)));
        let visible = record.visible;
        // Only another release could have made other messages of the same items.
        let fits =
            visible.from <= entries.len() && visible.pinned.is_none_or(|at| at < visible.from);
        fits.then_some(View {
            artifacts,
            head,
            entries,
            visible,
            resume: None,
        })
    }

    fn head(
        &self,
        record: &Record,
        settings: &Settings,
        artifacts: &Artifacts,
    ) -> Option<Arc<Head>> {
        let head = self
            .heads
            .get(&record.tenant, artifacts, settings, record.date);
        head.ok().map(|(cached, _)| cached.head)
    }
}

/// A response as a record. `None` for one that was made of a record.
fn record(response: &Committed) -> Option<Record> {
    let view = response.view.as_ref()?;
    let parent = response.parent.as_deref();
    let (settings, reset) = match parent {
        Some(parent) if Arc::ptr_eq(&response.settings, &parent.settings) => Default::default(),
        Some(parent) => response.settings.changes(&parent.settings),
        None => (Settings::clone(&response.settings), Vec::new()),
    };
    let base = parent.map(|parent| parent.rope.clone()).unwrap_or_default();
    Some(Record {
        id: response.id.clone(),
        tenant: response.tenant.clone(),
        parent: parent.map(|parent| parent.id.clone()),
        root: response.root.clone(),
        model: response.model.clone(),
        artifacts: view.artifacts.fingerprint,
        settings,
        reset,
        date: response.date,
        affinity: response.affinity.clone(),
        batches: batches(response),
        pending: response.pending.clone(),
        visible: view.visible,
        growth: response.rope.growth(&base),
        prompt_tokens: response.prompt_tokens,
        prompt_entries: response.prompt_entries,
        open_calls: response.open_calls.clone(),
        incomplete: incomplete(&response.status),
        finish: response.finish,
        usage: response.usage,
        prompt: response.prompt,
        created_at_ms: response.created_at_ms,
        metadata: response.metadata.clone(),
    })
}

/// The batches, with which of them were sampled: those that the output was made of, in order.
fn batches(response: &Committed) -> Vec<Batch> {
    let mut output = response.output.iter().peekable();
    let batch = |items: &Vec<ValidItem>| {
        let mut sampled = false;
        for new in items {
            sampled |= output
                .next_if(|next| Arc::ptr_eq(next, &new.item))
                .is_some();
        }
        Batch {
            sampled,
            items: items.clone(),
        }
    };
    response.batches.iter().map(batch).collect()
}

fn incomplete(status: &Status) -> Option<IncompleteReason> {
    match status {
        Status::Completed => None,
        Status::Incomplete(reason) => Some(*reason),
        // It is continued like one that was interrupted: why it broke was told when it did.
        Status::Failed(_) => Some(IncompleteReason::Interrupted),
        // Never committed.
        Status::AwaitingInput | Status::Cancelled => Some(IncompleteReason::Interrupted),
    }
}

impl Archive {
    /// Reads a response from the store, with those before it up to one that is in memory. Blocks.
    fn read(&self, tenant: &Tenant, id: &ResponseId) -> Result<Option<Arc<Committed>>, StoreError> {
        if let Some(found) = self.sessions.find(tenant, id) {
            // Another one has just read it.
            return Ok(Some(found));
        }
        let Some(tier) = &self.tier else {
            return Ok(None);
        };
        let deletions = tier.deletions.load(Ordering::SeqCst);
        let rebuilt = match self.chain(tier, tenant, id) {
            Err(Unread::Failed(StoreError::Unreadable(why))) => {
                tracing::error!(%id, %why, "a stored response cannot be read");
                return Ok(None);
            }
            Err(Unread::Failed(error)) => return Err(error),
            Err(Unread::Absent) => return Ok(None),
            Err(Unread::Unusable(why)) => {
                tracing::warn!(%id, %why, "a stored response cannot be continued");
                return Ok(None);
            }
            Ok(rebuilt) => rebuilt,
        };
        let found = rebuilt.last().cloned();
        self.sessions.park(tenant, rebuilt.clone());
        if tier.deletions.load(Ordering::SeqCst) != deletions {
            // One of them may have been deleted after it was read.
            for response in &rebuilt {
                self.sessions.forget(tenant, &response.id);
            }
        }
        Ok(found)
    }

    /// The responses that are not in memory, oldest first.
    fn chain(
        &self,
        tier: &Tier,
        tenant: &Tenant,
        id: &ResponseId,
    ) -> Result<Vec<Arc<Committed>>, Unread> {
        let mut records: Vec<Arc<Record>> = Vec::new();
        let mut bytes = 0;
        let mut next = id.clone();
        let mut parent = loop {
            let Some(record) = tier.queue.get(tenant, &next).map_err(Unread::Failed)? else {
                return Err(match records.is_empty() {
                    true => Unread::Absent,
                    false => Unread::Unusable(Unusable::Orphan),
                });
            };
            bytes += record.bytes();
            let parent = record.parent.clone();
            records.push(record);
            if records.len() > CHAIN_RESPONSES_MAX {
                return Err(Unread::Unusable(Unusable::Long));
            }
            if bytes > CHAIN_BYTES_MAX {
                return Err(Unread::Unusable(Unusable::Large));
            }
            match parent {
                None => break None,
                Some(parent) => match self.sessions.find(tenant, &parent) {
                    Some(held) => break Some(held),
                    None => next = parent,
                },
            }
        };
        let mut rebuilt = Vec::with_capacity(records.len());
        for record in records.into_iter().rev() {
            let response = tier.restore(&record, parent).map_err(Unread::Unusable)?;
            let response = Arc::new(response);
            rebuilt.push(response.clone());
            parent = Some(response);
        }
        Ok(rebuilt)
    }
}

/// Why a chain cannot be had.
enum Unread {
    Absent,
    Failed(StoreError),
    Unusable(Unusable),
}
