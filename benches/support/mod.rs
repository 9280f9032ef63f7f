//! What the benchmarks share: where results go, the server that they measure in a process of its own, its client, and
//! what rollouts look like.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "shared by several benchmarks, none of which uses all of it; one that cannot run says so by panicking"
)]

pub mod client;
pub mod echo;
pub mod report;
pub mod serve;
pub mod text;
pub mod workload;
