//! The gate between validated input and the model, and between the model and the client.
//!
//! **A document** is the text of one item: a message's parts one behind the other, the output of a tool,
//! a thought, the arguments of a call. Each is looked at by itself, from its first byte to its last, so
//! what was found in an item never depends on the items around it, and never has to be found again: the
//! history of a conversation is not read, however long it is. An item that streams is read in pieces, and
//! the scanner's state is carried from piece to piece ([`Monitor`]).
//!
//! **What was checked under which policy** is kept with a committed response ([`Checked`]). A
//! continuation under the same version checks what is new; under another one the items of the
//! history are checked once more, and the new version is kept. Forks share both.
//!
//! Input that passes is [`Cleared`], and only what is cleared is rendered. Output passes through a
//! [`Gate`] for each item on its way from the parser to the client.
//!
//! **Classifiers** judge what rules cannot. They are asked over a network ([`Classifier`]), about what is new with a bounded
//! window before it ([`Inquiry`]); the driver withholds what waits for them.

mod classify;
mod gate;
mod input;
mod inquiry;
mod monitor;
mod policy;
mod rule;
mod rules;
mod scan;

pub use classify::{
    Classifier, ClassifierKind, ClassifierOptions, Classify, Guard, GuardFormat, Label, Moderation,
    OnFailure, Passage, Question, Service, Unjudged, proto,
};
pub use gate::{Found, Gate, Passed};
pub use input::{Checked, Cleared, History, Masked, Names, Recheck, clear, log, recheck};
pub use inquiry::{Asking, Document, Inquiry, Judgement, judge, passages, split};
pub use monitor::{Finding, Monitor};
pub use policy::{Choice, GateAt, Policies, Policy, PolicyError, PolicyOptions, Scopes, Version};
pub use rule::{Checksum, Rule};
pub use rules::{Rules, RulesError};
pub use scan::{Scanner, State};

/// Verdicts on one item that are told. What is found beyond that is acted on.
const VERDICTS_MAX: usize = 100;

/// Verdicts on a history that are told.
const VERDICTS_AGAIN_MAX: usize = 1_000;

/// What stands in the place of what was redacted.
fn stand_in(rule: &str) -> String {
    format!("[redacted:{rule}]")
}
