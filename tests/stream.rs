//! Whole streams over channels, on a paused clock: each test is a conversation between a scripted
//! client and a scripted backend, and compares what the client reads line by line.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a script that cannot go on should panic; what a test crate has is its own"
)]

#[path = "support/shared.rs"]
mod shared;
#[path = "support/transcript.rs"]
mod transcript;

#[path = "stream/answers.rs"]
mod answers;
#[path = "stream/classifiers.rs"]
mod classifiers;
#[path = "stream/ends.rs"]
mod ends;
#[path = "stream/lanes.rs"]
mod lanes;
#[path = "stream/loops.rs"]
mod loops;
#[path = "stream/refusals.rs"]
mod refusals;
#[path = "stream/safety.rs"]
mod safety;
