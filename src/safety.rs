//! The gate between validated input and the model. Monitors stand here; none is built in yet, so
//! everything validated is cleared. The type keeps the order: only what was cleared is rendered.

use crate::request::{ValidInput, ValidItem};

/// Input that the monitors let through. Made by [`clear`] alone.
#[derive(Debug)]
pub struct Cleared(Vec<ValidItem>);

impl Cleared {
    /// The items, in the order of the conversation.
    #[must_use]
    pub fn into_items(self) -> Vec<ValidItem> {
        self.0
    }
}

/// Shows the new items, and only them, to the monitors.
#[must_use]
pub fn clear(input: ValidInput) -> Cleared {
    Cleared(input.into_items())
}
