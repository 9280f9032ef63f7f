//! What a stream shares, put together without the program around it.

#![allow(dead_code, reason = "each test takes the parts that it needs")]

use std::{sync::Arc, time::Duration};

use hotloop::{
    archive::Archive,
    billing::Account,
    budget::Wallet,
    model::Models,
    render::Heads,
    session::Held,
    stream::{self, Ends, Limits, Outgoing, Shared},
    wire::RequestLimits,
};
use tokio::sync::Semaphore;

/// Limits of a stream that no test reaches by accident.
pub const LIMITS: Limits = Limits {
    age_max: Duration::from_secs(3_600),
    go_away: Duration::from_secs(30),
    lanes_max: 32,
    sampling_max: 16,
    waiting_max: 64,
    held_time_max: Duration::from_secs(600),
    send_time_max: Duration::from_secs(30),
    events_queued_max: 64,
    commands_queued_max: 64,
};

/// The same of a request.
pub const REQUEST_LIMITS: RequestLimits = RequestLimits {
    items_max: 4_096,
    tools_max: 512,
    item_bytes_max: 1 << 20,
};

/// What a stream of this tenant shares, without policies and budgets, and where its events come out.
pub fn shared(
    models: Arc<Models>,
    archive: Arc<Archive>,
    tenant: &str,
    limits: Limits,
) -> (Shared, Outgoing) {
    let (out, outgoing) = stream::outgoing(&limits);
    let shared = Shared {
        models,
        heads: Arc::new(Heads::new(1 << 20)),
        held: Held::new(archive.sessions().clone(), tenant.into(), 1_000),
        archive,
        wallet: Wallet::default(),
        account: Account::logged(tenant.into()),
        policies: Arc::default(),
        limits,
        out,
        slots: Arc::new(Semaphore::new(limits.sampling_max)),
        ends: Ends::default(),
    };
    (shared, outgoing)
}
