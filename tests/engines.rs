//! Backends that are reached over a network, each against a server that plays its engine.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a conversation that cannot go on should panic"
)]

#[path = "server/client.rs"]
mod client;
#[path = "engines/fake.rs"]
mod fake;
#[path = "server/program.rs"]
mod program;
#[path = "support/shared.rs"]
mod shared;
#[path = "engines/tape.rs"]
mod tape;

#[path = "engines/cerebras.rs"]
mod cerebras;
#[path = "engines/classifiers.rs"]
mod classifiers;
#[path = "engines/gpu.rs"]
mod gpu;
#[cfg(feature = "local")]
#[path = "engines/server.rs"]
mod server;
#[cfg(feature = "local")]
#[path = "engines/vllm.rs"]
mod vllm;
