//! The router: a backend made of backends that serve the same model.
//!
//! A conversation stays with the backend that holds its cache: each pair of affinity and backend
//! has a score, and the healthy backend with the highest is taken (rendezvous hashing), so that
//! one that comes or goes moves only its own conversations. A backend that refuses before its
//! first chunk is passed over for the next; after it, nothing is tried again, since tokens may
//! have been seen.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};

use super::{Backend, BackendError, Capabilities, Chunks, Prompt, Ungrammatical};
use crate::{item::Tenant, parse::Grammar};

/// Backends that serve the same model.
pub struct Router {
    replicas: Vec<Arc<dyn Backend>>,
    capabilities: Capabilities,
}

impl Router {
    /// A router over these. What it can do is what each of them can.
    #[must_use]
    pub fn new(first: Arc<dyn Backend>, others: Vec<Arc<dyn Backend>>) -> Self {
        let capabilities = others.iter().map(|replica| replica.capabilities()).fold(
            first.capabilities(),
            |all, one| Capabilities {
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
            },
        );
        Self {
            replicas: std::iter::once(first).chain(others).collect(),
            capabilities,
        }
    }

    /// The replicas in the order in which this conversation tries them: healthy ones first.
    fn order(&self, affinity: &str) -> Vec<Arc<dyn Backend>> {
        let score = |index: usize| {
            let mut hasher = DefaultHasher::new();
            (affinity, index).hash(&mut hasher);
            hasher.finish()
        };
        let mut order: Vec<usize> = (0..self.replicas.len()).collect();
        order.sort_by_key(|index| (!self.replicas[*index].healthy(), score(*index)));
        order
            .into_iter()
            .map(|index| self.replicas[index].clone())
            .collect()
    }
}

impl Backend for Router {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn healthy(&self) -> bool {
        self.replicas.iter().any(|replica| replica.healthy())
    }

    /// Each of them must be able to, since any may be the one that samples.
    fn check(&self, tenant: &Tenant, grammar: &Arc<Grammar>) -> Result<(), Ungrammatical> {
        let mut replicas = self.replicas.iter();
        replicas.try_for_each(|replica| replica.check(tenant, grammar))
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        if let [only] = self.replicas.as_slice() {
            return only.sample(prompt);
        }
        let order = self.order(&prompt.affinity);
        let first = async move {
            let mut last = None;
            for replica in order {
                let mut chunks = replica.sample(prompt.clone());
                match chunks.next().await {
                    Some(Err(BackendError::Unavailable {
                        reason,
                        retry_after,
                    })) => {
                        tracing::info!(reason, "a replica refused the prompt");
                        last = Some(BackendError::Unavailable {
                            reason,
                            retry_after,
                        });
                    }
                    // From the first chunk on the sample is this replica's.
                    first => return futures::stream::iter(first).chain(chunks).boxed(),
                }
            }
            futures::stream::iter(last.map(Err)).boxed()
        };
        first.into_stream().flatten().boxed()
    }

    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        match self.order(&prompt.affinity).into_iter().next() {
            Some(replica) => replica.prefill(prompt),
            None => std::future::ready(Ok(())).boxed(),
        }
    }
}
