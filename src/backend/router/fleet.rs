//! The replicas, what is in flight on each, and which of them takes the next sample.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    Replica, ReplicaStatus, RoutingOptions,
    place::{self, Key, Spread},
};
use crate::backend::{
    Backend, BackendError, Capabilities, Prompt,
    breaker::{Breaker, BreakerState, Change, Outcome, Permit},
};

/// The replicas, never none.
pub(super) struct Fleet {
    members: Box<[Member]>,
    pub(super) options: RoutingOptions,
}

/// A replica with what is known of it.
pub(super) struct Member {
    pub(super) name: Arc<str>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) capabilities: Capabilities,
    weight: u32,
    key: Key,
    in_flight: AtomicU32,
    breaker: Mutex<Breaker>,
}

/// The replicas that a sample may still be tried on, in the order that its conversation prefers.
pub(super) struct Untried(Vec<usize>);

impl Untried {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a replica is looked for to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Sample: where nothing better is, one that is full or seems ill will do.
    Sample,
    /// Sample beside another: only one that is well and has room.
    Hedge,
}

/// How a replica stands to one more sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is well, its breaker is closed, and it has room.
    Roomy,
    /// The same, but for a breaker that asks for a trial.
    OnTrial,
    /// It has more than its share.
    Full,
    /// It says that it is ill, which may be wrong.
    Ill,
    /// Its breaker gives no permit.
    Out,
}

impl Member {
    fn new(replica: Replica, options: &RoutingOptions) -> Self {
        Self {
            capabilities: replica.backend.capabilities(),
            weight: replica.weight.max(1),
            key: Key::of(&[&replica.name]),
            in_flight: AtomicU32::new(0),
            breaker: Mutex::new(Breaker::new(options.failures_max, options.pauses())),
            name: replica.name,
            backend: replica.backend,
        }
    }

    /// Samples on it, those that others have given it included, where it tells of them.
    fn load(&self) -> u64 {
        let told = self.backend.load().unwrap_or(0);
        told.max(self.in_flight.load(Ordering::Relaxed)).into()
    }

    /// Whether it can go on with the tokens that another one has sampled.
    pub(super) fn continues(&self) -> bool {
        !self.capabilities.reads_messages && !self.capabilities.reads_items
    }

    fn status(&self, now: Instant) -> ReplicaStatus {
        let healthy = self.backend.healthy();
        let breaker = self.breaker.lock();
        let admits_at = breaker.admits_at(now);
        ReplicaStatus {
            name: self.name.clone(),
            kind: self.capabilities.kind,
            healthy,
            breaker: breaker.state(now),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            failures: breaker.failures(),
            out_for: admits_at
                .map(|at| at - now)
                .filter(|out_for| !out_for.is_zero()),
        }
    }
}

impl Fleet {
    pub(super) fn new(replicas: impl Iterator<Item = Replica>, options: RoutingOptions) -> Self {
        Self {
            members: replicas
                .map(|replica| Member::new(replica, &options))
                .collect(),
            options,
        }
    }

    pub(super) fn members(&self) -> &[Member] {
        &self.members
    }

    pub(super) fn statuses(&self) -> Vec<ReplicaStatus> {
        let now = Instant::now();
        let members = self.members.iter();
        members.map(|member| member.status(now)).collect()
    }

    /// Whether some replica is well and not left alone.
    pub(super) fn healthy(&self) -> bool {
        let now = Instant::now();
        self.members.iter().any(|member| {
            member.backend.healthy() && member.breaker.lock().state(now) != BreakerState::Open
        })
    }

    /// All replicas, as the conversation of this prompt prefers them.
    pub(super) fn untried(&self, prompt: &Prompt) -> Untried {
        if self.members.len() == 1 {
            return Untried(vec![0]);
        }
        let conversation = Key::of(&[prompt.tenant.as_str(), &prompt.affinity]);
        let replicas = self.members.iter();
        let replicas = replicas.map(|member| (member.key, member.weight));
        Untried(place::order(conversation, replicas).collect())
    }

    /// Leaves only those that can go on with the tokens that another one has sampled.
    pub(super) fn keep_continuing(&self, untried: &mut Untried) {
        untried.0.retain(|index| self.members[*index].continues());
    }

    /// The replica where a sample would go now.
    pub(super) fn first(&self, untried: &Untried) -> Option<&Member> {
        let now = Instant::now();
        let candidates = self.candidates(untried, Need::Sample, now);
        candidates.first().map(|index| &self.members[*index])
    }

    /// Takes the best replica of these, and counts a sample on it. `None`: none gives leave.
    pub(super) fn pick(self: &Arc<Self>, untried: &mut Untried, need: Need) -> Option<Flight> {
        let now = Instant::now();
        let (index, permit) = self
            .candidates(untried, need, now)
            .into_iter()
            // Another sample may have become the trial since they were looked at.
            .find_map(|index| Some((index, self.members[index].breaker.lock().admit(now)?)))?;
        untried.0.retain(|other| *other != index);
        self.members[index]
            .in_flight
            .fetch_add(1, Ordering::Relaxed);
        Some(Flight {
            fleet: self.clone(),
            index,
            permit,
            outcome: Outcome::Unknown,
        })
    }

    /// Those that could take a sample, best first.
    fn candidates(&self, untried: &Untried, need: Need, now: Instant) -> Vec<usize> {
        if let ([_], Need::Sample) = (&*self.members, need) {
            return untried.0.clone();
        }
        let standings = self.standings(now);
        let rank = |index: &usize| match (need, standings[*index]) {
            (_, Standing::Roomy) | (Need::Sample, Standing::OnTrial) => Some(0),
            (Need::Sample, Standing::Full) => Some(1),
            (Need::Sample, Standing::Ill) => Some(2),
            (Need::Hedge, Standing::OnTrial | Standing::Full | Standing::Ill)
            | (_, Standing::Out) => None,
        };
        let ranked = untried.0.iter();
        let mut ranked: Vec<(u8, usize)> = ranked
            .filter_map(|index| Some((rank(index)?, *index)))
            .collect();
        // Stable: within a rank the conversation's own order stays.
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, index)| index).collect()
    }

    /// How each replica stands. Bounds are shares of what is on those that are well.
    fn standings(&self, now: Instant) -> Vec<Standing> {
        let mut spread = Spread::default();
        let looked_at: Vec<(Standing, u64)> = self
            .members
            .iter()
            .map(|member| {
                let (admits_at, state) = {
                    let breaker = member.breaker.lock();
                    (breaker.admits_at(now), breaker.state(now))
                };
                if admits_at.is_none_or(|at| at > now) {
                    return (Standing::Out, 0);
                }
                if !member.backend.healthy() {
                    return (Standing::Ill, 0);
                }
                let load = member.load();
                spread.in_flight += load;
                spread.weights += u64::from(member.weight);
                match state {
                    BreakerState::Closed => (Standing::Roomy, load),
                    BreakerState::Open | BreakerState::HalfOpen => (Standing::OnTrial, load),
                }
            })
            .collect();
        let members = self.members.iter().zip(looked_at);
        members
            .map(|(member, (standing, load))| match standing {
                Standing::Roomy | Standing::OnTrial
                    if load >= spread.bound(self.options.load_factor, member.weight) =>
                {
                    Standing::Full
                }
                Standing::Roomy
                | Standing::OnTrial
                | Standing::Full
                | Standing::Ill
                | Standing::Out => standing,
            })
            .collect()
    }

    /// When the first replica takes samples again; zero: one does now. While nothing but trials
    /// run, nobody knows, and the shortest pause stands for it.
    fn out_for(&self) -> Duration {
        let now = Instant::now();
        let members = self.members.iter();
        members
            .filter_map(|member| member.breaker.lock().admits_at(now))
            .map(|at| at - now)
            .min()
            .unwrap_or(Duration::from_millis(self.options.open_ms_min))
    }

    /// What a client is told when a sample was begun nowhere, where no replica has said more.
    pub(super) fn all_out(&self) -> BackendError {
        BackendError::Unavailable {
            reason: "no replica takes samples now".to_owned(),
            retry_after: Some(self.out_for()),
        }
    }

    /// What a client is told when a sample was begun nowhere, and this was the last error: where
    /// all are out, also when the first one is back.
    pub(super) fn begun_nowhere(&self, last: BackendError) -> BackendError {
        match last {
            BackendError::Unavailable {
                reason,
                retry_after,
            } => {
                let out_for = self.out_for();
                BackendError::Unavailable {
                    reason,
                    retry_after: (!out_for.is_zero()).then_some(out_for).or(retry_after),
                }
            }
            other @ (BackendError::Refused { .. } | BackendError::Failed { .. }) => other,
        }
    }
}

/// A sample on a replica, from its beginning until it is dropped: then it counts no longer, and
/// the breaker is told how it went.
pub(super) struct Flight {
    fleet: Arc<Fleet>,
    index: usize,
    permit: Permit,
    outcome: Outcome,
}

impl Flight {
    pub(super) fn member(&self) -> &Member {
        &self.fleet.members[self.index]
    }

    /// The replica has told something.
    pub(super) fn answered(&mut self) {
        self.outcome = Outcome::Worked;
        if self.permit == Permit::Trial {
            let member = &self.fleet.members[self.index];
            let change = member.breaker.lock().answered(&mut self.permit);
            member.log(change);
        }
    }

    /// It ended with this error.
    pub(super) fn failed(mut self, error: &BackendError) {
        self.outcome = Outcome::of(error);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let member = self.member();
        member.in_flight.fetch_sub(1, Ordering::Relaxed);
        let change =
            member
                .breaker
                .lock()
                .settle(self.permit, self.outcome, Instant::now(), rand::random());
        member.log(change);
    }
}

impl Member {
    fn log(&self, change: Option<Change>) {
        let replica = &*self.name;
        match change {
            None => {}
            Some(Change::Closed) => tracing::info!(replica, "a replica is taken back"),
            Some(Change::Opened { pause }) => {
                let pause_ms = pause.as_millis() as u64;
                tracing::warn!(replica, pause_ms, "a replica is left alone after failures");
            }
        }
    }
}
