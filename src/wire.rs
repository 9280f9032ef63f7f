//! Between the messages on the wire and our own vocabulary. Decoding refuses what is out of range
//! by itself, naming the field; nothing here knows the past.

mod commands;
mod events;
mod items;

use std::sync::Arc;

use crate::event::Error;

pub use commands::{incoming, incoming_create};
pub use events::{hex, item_message, prompt_report, response, status, usage};

/// Limits on the size of a request.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "documented in the configuration, key by key")]
pub struct RequestLimits {
    pub items_max: usize,
    pub tools_max: usize,
    pub item_bytes_max: usize,
}

type Result<T> = std::result::Result<T, Error>;

/// What is added to logits, by token id.
type LogitBias = Arc<[(u32, f32)]>;
