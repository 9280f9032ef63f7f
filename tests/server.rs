//! The real program over loopback: each test starts a server of its own and talks to it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a conversation that cannot go on should panic"
)]

#[path = "server/client.rs"]
mod client;
#[path = "server/program.rs"]
mod program;
#[path = "support/tiny_llama.rs"]
mod tiny_llama;
#[path = "support/vocab.rs"]
mod vocab;
#[path = "server/wire.rs"]
mod wire;

#[path = "server/budgets.rs"]
mod budgets;
#[path = "server/calls.rs"]
mod calls;
#[path = "server/command_line.rs"]
mod command_line;
#[path = "server/conversations.rs"]
mod conversations;
#[path = "server/end.rs"]
mod end;
#[path = "server/local.rs"]
mod local;
#[path = "server/misuse.rs"]
mod misuse;
