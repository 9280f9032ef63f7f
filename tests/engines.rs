//! Backends for engines, each against a server that plays its engine over the network.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a conversation that cannot go on should panic"
)]

#[path = "engines/cerebras.rs"]
mod cerebras;
