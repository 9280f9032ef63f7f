//! What integration tests share: model directories of several families, a backend that plays what
//! it is told, and a client that drives responses without a runtime or a network.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::wildcard_enum_match_arm,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "shared by several tests, none of which uses all of it"
)]

pub mod client;
pub mod families;
pub mod scripted;
pub mod vocab;
