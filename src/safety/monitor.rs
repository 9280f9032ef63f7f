//! The seam: what looks at a document while it comes.

use std::ops::Range;

/// Looks at one document, in pieces. A document is the text of one item.
///
/// The state that is carried from piece to piece is all that a monitor knows of what it read, and what
/// it finds does not depend on where the text was cut: to check what is new gives what checking the
/// whole gives.
pub trait Monitor {
    /// What is carried. Its default is where every document begins.
    type State: Default;

    /// Reads on from where `state` stands, and adds what is found, each finding once and for good. With
    /// `last` the document ends with this text.
    fn read(&self, state: &mut Self::State, text: &str, last: bool, found: &mut Vec<Finding>);
}

/// Something that was found in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which of the monitor's rules found it.
    pub rule: usize,
    /// Where, in bytes of the document. On characters' boundaries.
    pub bytes: Range<usize>,
}
