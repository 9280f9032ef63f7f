//! The router as who asks it for samples sees it, over engines that play what a test says.

mod continuing;
mod failing;
mod fake;
mod hedging;
mod placing;
#[cfg(feature = "local")]
mod real;

use std::{sync::Arc, time::Duration};

use super::*;
use crate::{
    backend::{SampleEnd, Sampling},
    item::ResponseId,
    ledger::{Draft, Rope},
};
use fake::{Fake, Heard, hear, reference};

/// A router over engines with these names, and the engines.
fn fleet<const N: usize>(names: [&str; N], options: RoutingOptions) -> (Router, [Arc<Fake>; N]) {
    let fakes = names.map(|_| Arc::new(Fake::default()));
    (router_of(names.iter().zip(&fakes), options), fakes)
}

fn router_of<'a>(
    engines: impl Iterator<Item = (&'a &'a str, &'a Arc<Fake>)>,
    options: RoutingOptions,
) -> Router {
    options.check().unwrap();
    let mut replicas: Vec<Replica> = engines
        .map(|(name, fake)| Replica {
            name: (*name).into(),
            backend: fake.clone(),
            weight: 1,
        })
        .collect();
    Router::new(replicas.remove(0), replicas, options)
}

/// A conversation that prefers the engines in the order of these names, and whose next sample has
/// 12 tokens.
fn prefers(router: &Router, names: &[&str]) -> Prompt {
    let prompts = (0..10_000).map(|n| prompt("tenant", &format!("conversation {n}")));
    prompts
        .into_iter()
        .find(|prompt| reference(prompt).0.len() == 12 && order(router, prompt) == names)
        .unwrap()
}

/// The names in the order that this conversation prefers.
fn order(router: &Router, prompt: &Prompt) -> Vec<String> {
    let mut untried = router.fleet.untried(prompt);
    let mut order = Vec::new();
    while let Some(flight) = router.fleet.pick(&mut untried, fleet::Need::Sample) {
        order.push(flight.member().name.to_string());
    }
    order
}

fn prompt(tenant: &str, affinity: &str) -> Prompt {
    Prompt {
        response_id: ResponseId::default(),
        tenant: tenant.into(),
        affinity: affinity.into(),
        tokens: Rope::default().with_rendered(Draft {
            ids: affinity.bytes().map(u32::from).collect(),
            text: affinity.to_owned(),
            ..Draft::default()
        }),
        recent: Vec::new(),
        chat: None,
        sampling: Sampling {
            end_tokens: [fake::END].into(),
            seed: Some(42),
            ..Sampling::greedy(12)
        },
    }
}

fn failed(reason: &str) -> BackendError {
    BackendError::Failed {
        reason: reason.to_owned(),
    }
}

fn unavailable(retry_after_ms: Option<u64>) -> BackendError {
    BackendError::Unavailable {
        reason: "full".to_owned(),
        retry_after: retry_after_ms.map(Duration::from_millis),
    }
}

fn refused() -> BackendError {
    BackendError::Refused {
        reason: "too long".to_owned(),
    }
}

/// How many prompts each of them was given.
fn asked<const N: usize>(fakes: &[Arc<Fake>; N]) -> [usize; N] {
    fakes.each_ref().map(|fake| fake.prompts().len())
}

/// Samples that the router has on each.
fn in_flight(router: &Router) -> Vec<u32> {
    let replicas = router.replicas().into_iter();
    replicas.map(|replica| replica.in_flight).collect()
}

fn breakers(router: &Router) -> Vec<BreakerState> {
    let replicas = router.replicas().into_iter();
    replicas.map(|replica| replica.breaker).collect()
}

async fn sleep_ms(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}
