//! The router: a backend made of backends that sample the same model with the same tokenizer.
//!
//! A conversation stays with the replica that holds its cache (by rendezvous hashing over their
//! names), unless that one has more than its share of the samples in flight, is ill,
//! or is left alone after failures. Nothing is kept of a conversation: where it belongs is computed.
//!
//! A replica that fails before its first token is passed over for the next one. One that fails
//! later is as well, where the rest can be sampled behind the tokens that were passed on: greedy
//! samples have the same tokens as if nothing had happened, others the same distribution; a
//! sample with a seed goes on with a seed made of it and of the tokens so far. It cannot be done
//! for engines that read messages or items, under a grammar, or with penalties; such a sample fails.
//!
//! Reading order: `options`, `place` (where), `breaker` (when not), `fleet` (which now), `attempt`
//! (on one), `sample` (until its end).

mod attempt;
mod fleet;
mod options;
mod place;
mod sample;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};

use super::{Backend, BackendError, Capabilities, Chunks, Prompt, Ungrammatical};
use crate::{item::Tenant, parse::Grammar};
use fleet::Fleet;
use sample::Sample;

pub use super::breaker::BreakerState;
pub use options::RoutingOptions;

/// One of the backends of a router.
pub struct Replica {
    /// Names it, for people and for the choice of conversations: one that keeps its name keeps
    /// them. Different for each replica of a router.
    pub name: Arc<str>,
    /// What samples.
    pub backend: Arc<dyn Backend>,
    /// How much it can take, compared with the others; at least 1.
    pub weight: u32,
}

/// How a replica stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Its name.
    pub name: Arc<str>,
    /// The kind of backend.
    pub kind: &'static str,
    /// What it says of itself.
    pub healthy: bool,
    /// Whether it is given samples after its failures.
    pub breaker: BreakerState,
    /// Samples that this router has on it.
    pub in_flight: u32,
    /// Failures in a row.
    pub failures: u32,
    /// How long it is given none, where that is known: after failures, or since it asked for it.
    pub out_for: Option<Duration>,
}

/// Backends that sample the same model. See the module.
pub struct Router {
    fleet: Arc<Fleet>,
    capabilities: Capabilities,
}

impl Router {
    /// A router over these. What it can do is what each of them can.
    #[must_use]
    pub fn new(first: Replica, others: Vec<Replica>, options: RoutingOptions) -> Self {
        let capabilities = others
            .iter()
            .map(|replica| replica.backend.capabilities())
            .fold(first.backend.capabilities(), |all, one| Capabilities {
                kind: if all.kind == one.kind {
                    all.kind
                } else {
                    "router"
                },
                keeps_cache: all.keeps_cache && one.keeps_cache,
                prefill: all.prefill && one.prefill,
                constrained_sampling: all.constrained_sampling && one.constrained_sampling,
                logprobs: all.logprobs && one.logprobs,
                sampling: all.sampling && one.sampling,
                // If one reads them, they are given.
                reads_items: all.reads_items || one.reads_items,
                reads_messages: all.reads_messages || one.reads_messages,
            });
        let replicas = std::iter::once(first).chain(others);
        Self {
            fleet: Arc::new(Fleet::new(replicas, options)),
            capabilities,
        }
    }

    /// How each replica stands, in the order in which they were given.
    #[must_use]
    pub fn replicas(&self) -> Vec<ReplicaStatus> {
        self.fleet.statuses()
    }
}

impl Backend for Router {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn healthy(&self) -> bool {
        self.fleet.healthy()
    }

    fn load(&self) -> Option<u32> {
        let loads = self.fleet.members().iter();
        loads
            .filter_map(|member| member.backend.load())
            .reduce(u32::saturating_add)
    }

    /// Each of them must be able to, since any may be the one that samples. Those that read
    /// messages make their own constraint of the settings.
    fn check(&self, tenant: &Tenant, grammar: &Arc<Grammar>) -> Result<(), Ungrammatical> {
        let mut bound = self
            .fleet
            .members()
            .iter()
            .filter(|member| !member.capabilities.reads_messages);
        bound.try_for_each(|member| member.backend.check(tenant, grammar))
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        match Sample::begin(&self.fleet, prompt) {
            Ok(sample) => Box::pin(sample),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        let untried = self.fleet.untried(&prompt);
        match self.fleet.first(&untried) {
            Some(member) => member.backend.prefill(prompt),
            // The sample that follows says so.
            None => std::future::ready(Ok(())).boxed(),
        }
    }
}
