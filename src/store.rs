//! The response store: responses that outlive the memory of the process, each as what it adds to
//! the one that it continues.
//!
//! ```text
//!   lane ── commit ── Queue ── one writer, many records a transaction ──▶ Store (a file)
//!                       └──────────────── get ◀─────────────────────────────┘
//! ```
//!
//! A [`Store`] is a medium; [`Queue`] stands before it and keeps it out of the loop's way: a
//! response is handed to it after its commit and written behind the loop's back, so that `done`
//! waits for no disk. What waits to be written is found like what is written. The queue is bounded
//! by bytes; where it is full, the response that comes next waits for room, for a bounded time, and
//! with it its lane: the disk slows the loop before memory runs out. Where the medium fails, the
//! writer tries again until it works; a response that finds no room meanwhile is logged and counted, and
//! is handed over again with the next response of its conversation.

mod embedded;
mod encoding;
mod queue;

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    event::{Finish, IncompleteReason, PromptReport, Usage},
    item::{ItemId, ResponseId, Tenant},
    ledger::Growth,
    render::Visible,
    request::{OpenCall, Settings, ValidItem},
};

pub use embedded::{Embedded, Limits};
pub use encoding::Unreadable;
pub use queue::{Missed, Place, Queue};

/// A medium that keeps records. All of it blocks.
pub trait Store: Send + Sync + 'static {
    /// Keeps these records, all of them or none; when it returns, they are safe. A record whose
    /// parent is neither kept nor among those before it could never be read again and is left out, as
    /// is one that is kept already.
    ///
    /// # Errors
    ///
    /// The medium failed; nothing was kept, or it is not known.
    fn put(&self, records: &[Arc<Record>]) -> Result<(), StoreError>;

    /// The record of this id, of this tenant.
    ///
    /// # Errors
    ///
    /// The medium failed, or holds something there that this program cannot read.
    fn get(&self, tenant: &Tenant, id: &ResponseId) -> Result<Option<Record>, StoreError>;

    /// Forgets a record. Says whether there was one.
    ///
    /// # Errors
    ///
    /// The medium failed.
    fn delete(&self, tenant: &Tenant, id: &ResponseId) -> Result<bool, StoreError>;

    /// Lets go of what has been kept for too long.
    ///
    /// # Errors
    ///
    /// The medium failed.
    fn sweep(&self) -> Result<(), StoreError>;
}

/// Why a store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The medium failed.
    #[error("the medium failed: {0}")]
    Medium(Box<dyn std::error::Error + Send + Sync>),
    /// The file was written by another version of this program.
    #[error("the file is of format {found}, and this program reads {expected}")]
    Format {
        /// The file's.
        found: u64,
        /// Ours.
        expected: u64,
    },
    /// A record cannot be read.
    #[error("a record cannot be read: {0}")]
    Unreadable(#[from] Unreadable),
}

/// A response on its own: everything that is needed to continue it exactly, as what it adds to its
/// parent. The order of the fields is the format: see [`Unreadable`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: ResponseId,
    /// Whose it is.
    pub tenant: Tenant,
    /// What it continues.
    pub parent: Option<ResponseId>,
    /// The first response of its conversation.
    pub root: ResponseId,
    /// The name of the model that served it.
    pub model: Arc<str>,
    /// The fingerprint of the text side that it was rendered with.
    pub artifacts: [u8; 32],
    /// The settings that it sets over its parent's.
    pub settings: Settings,
    /// The settings of its parent that it resets.
    pub reset: Vec<String>,
    /// The date that the conversation began on.
    #[serde(with = "encoding::date")]
    pub date: jiff::civil::Date,
    /// Names conversations that share a prefix, to the engines.
    pub affinity: Arc<str>,
    /// What the conversation got in it, in order.
    pub batches: Vec<Batch>,
    /// Messages that steered too late to be sampled after.
    pub pending: Vec<ValidItem>,
    /// What the model still sees of the conversation.
    pub visible: Visible,
    /// What its rope adds to its parent's. The fingerprint of the whole is in `prompt`.
    pub growth: Growth,
    /// How many tokens of the rope are the prompt.
    pub prompt_tokens: usize,
    /// How many messages the conversation had when the prompt was made.
    pub prompt_entries: usize,
    /// Calls without an output.
    pub open_calls: Vec<OpenCall>,
    /// Why it ended early; `None` where it did not.
    pub incomplete: Option<IncompleteReason>,
    /// Why its last sample ended.
    pub finish: Option<Finish>,
    /// What it used.
    pub usage: Usage,
    /// How its last prompt came to be.
    pub prompt: PromptReport,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// What the create carried.
    pub metadata: BTreeMap<String, String>,
}

/// The input of one command, or the output of one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// Whether it was sampled.
    pub sampled: bool,
    /// The items.
    pub items: Vec<ValidItem>,
}

impl Record {
    /// The ids of its output items, in order.
    pub fn output_ids(&self) -> impl Iterator<Item = &ItemId> {
        let sampled = self.batches.iter().filter(|batch| batch.sampled);
        sampled.flat_map(|batch| batch.items.iter().map(|new| &new.item.id))
    }

    /// What it takes in memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let items = self.batches.iter().flat_map(|batch| &batch.items);
        let texts = items.chain(&self.pending).map(|new| new.item.text_bytes());
        size_of::<Self>() + texts.sum::<usize>() + self.growth.bytes()
    }
}

#[cfg(test)]
mod tests;
