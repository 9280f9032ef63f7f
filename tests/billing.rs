//! Usage records, from the stream to the journal and on to the sinks: over every way out of a
//! response, at the bound of the backlog, and over the death of the program.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::wildcard_enum_match_arm,
    reason = "a server that cannot be talked to should panic"
)]

#[path = "support/packages.rs"]
mod packages;

mod billing {
    mod bound;
    mod broker;
    mod kafka;
    mod kills;
    mod postgres;
    mod program;
    mod sinks;
    mod ways_out;
}
