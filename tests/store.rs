//! The response store, from the stream to the file and back: conversations that are continued after
//! memory has lost them, in one process and over the death of the program.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a conversation that cannot go on should panic"
)]

#[path = "support/shared.rs"]
mod shared;

mod store {
    mod memory;
    mod program;
}
