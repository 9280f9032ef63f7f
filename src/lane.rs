//! A lane runs its responses one after the other: the driver of one response, from its turn on
//! the lane to its end. All waiting is here; what happens is in `response`.

mod begin;
mod ending;
mod judged;
mod rounds;
mod turn;
mod withheld;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures::{StreamExt as _, future::BoxFuture};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::Instant,
};

use crate::{
    backend::{BackendError, Chunks, Prompt},
    billing::{Counts, Full, Meter, Served, Settlement},
    budget::{Purse, Sampled, Spent},
    event::{
        Code, Error, Event, IncompleteReason, SampleReport, Status, Timing, Usage, Verdict, now_ms,
    },
    item::{ItemId, LaneName, RequestId, ResponseId},
    model::{Model, Models},
    request::{Create, NewItem, Past, Settings},
    response::{Before, Begin, End, Next, Open, Piece, RoundEnd},
    safety::{self, Checked, Cleared, GateAt, History, Inquiry, Judgement, Names, Policy, Recheck},
    session::Committed,
    stream::{Batch, Gone, Shared, not_found, not_open},
};

pub use turn::{Cancel, Turn};

use judged::{Unadmitted, admissible};
use rounds::{Broken, receive};
use withheld::{About, Answer, Judged, Told, Withheld};

/// Input of at least this many bytes is rendered on the blocking pool: encoding it takes longer
/// than other tasks should wait.
const BLOCKING_BYTES_MIN: usize = 64 * 1024;

/// How many models may take over from one another.
const FALLBACKS_MAX: usize = 8;

/// When a client may ask again for a response that could not be recorded.
const RECORD_RETRY: Duration = Duration::from_secs(1);

/// How many samples a `done` tells of beside the last one.
const EARLIER_SAMPLES_MAX: usize = 1024;

/// A command for a response that is open.
#[derive(Debug)]
pub struct Control {
    /// What to do.
    pub what: What,
    /// What the client calls the command.
    pub request_id: RequestId,
    /// When it was read.
    pub read_at: Instant,
}

/// What to do with an open response.
#[derive(Debug)]
pub enum What {
    /// Add input.
    Append(Vec<NewItem>),
    /// The client has nothing more.
    Done,
}

/// What a response continues.
pub enum Parent {
    /// A response that has ended, pinned.
    Committed(Arc<Committed>),
    /// One that ran when the create was read; it must have ended when its turn comes.
    Running(ResponseId),
    /// One that was not in memory when the create was read: the store has it, or nobody.
    Stored(ResponseId),
}

/// Where a create stands when it is read.
pub enum Place {
    /// It can sample at once, in this slot.
    Slot(OwnedSemaphorePermit),
    /// It waits for its turn or for a slot, in this place among those that wait.
    Waiting(OwnedSemaphorePermit),
}

/// A create on its way.
pub struct Job {
    /// The response's id.
    pub id: ResponseId,
    /// Its lane.
    pub lane: LaneName,
    /// What the client calls the create.
    pub request_id: RequestId,
    /// What it asks for.
    pub create: Create,
    /// What it continues.
    pub parent: Option<Parent>,
    /// When it was read.
    pub read_at: Instant,
    /// The same as a date: milliseconds since 1970.
    pub created_at_ms: u64,
    /// Commands for the response.
    pub controls: mpsc::Receiver<Control>,
    /// The request to stop it.
    pub cancel: Arc<Cancel>,
    /// Where it stands.
    pub place: Place,
    /// The turn before it on the lane.
    pub before: Turn,
    /// Its own turn.
    pub turn: Turn,
}

/// Runs one response to its end. Whatever happens, its turn ends then, and not before that of the
/// one before it.
pub async fn run(job: Job, shared: Arc<Shared>) {
    let _end_turn = job.turn.end_with();
    Box::pin(drive(job, &shared)).await;
}

async fn drive(job: Job, shared: &Shared) {
    let Job {
        id,
        lane,
        request_id,
        create,
        parent,
        read_at,
        created_at_ms,
        controls,
        cancel,
        place,
        before,
        turn,
    } = job;
    let (slot, waiting) = match place {
        Place::Slot(slot) => (Some(slot), None),
        Place::Waiting(waiting) => (None, Some(waiting)),
    };
    let mut driver = Driver {
        shared,
        id,
        lane,
        request_id,
        stops: Stops { shared, cancel },
        stays: create.continue_on_disconnect,
        deaf: false,
        controls: Some(controls),
        slot,
        clock: Clock::new(read_at),
        earlier: Vec::new(),
        meter: None,
        purse: Purse::default(),
        sampled_tokens: 0,
        delivered_tokens: 0,
        withheld: Withheld::default(),
        unadmitted: VecDeque::new(),
        presumed: 0,
        found: Vec::new(),
        told: false,
    };
    match driver.wait(&before, parent).await {
        Ok(parent) => {
            drop(waiting);
            driver.serve(create, parent, created_at_ms).await;
        }
        Err(unbegun) => {
            turn.give_up(&before);
            driver.unbegun(unbegun).await;
        }
    }
    driver.close().await;
}

/// Why a response did not begin.
enum Unbegun {
    Refused(Box<Error>),
    Stopped(Stop),
}

impl From<Error> for Unbegun {
    fn from(error: Error) -> Self {
        Self::Refused(Box::new(error))
    }
}

impl From<Stop> for Unbegun {
    fn from(stop: Stop) -> Self {
        Self::Stopped(stop)
    }
}

/// Why a response stops from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The client asked for it.
    Cancelled,
    /// Time is up.
    Interrupted,
    /// The client is gone.
    Gone,
}

/// What may stop a response.
#[derive(Clone)]
struct Stops<'a> {
    shared: &'a Shared,
    cancel: Arc<Cancel>,
}

impl Stops<'_> {
    /// Fires when the response must stop.
    async fn stopped(&self) -> Stop {
        self.cancel.fired().await;
        if self.cancel.asked_by().is_some() {
            Stop::Cancelled
        } else if self.shared.ends.deadline.is_cancelled() {
            Stop::Interrupted
        } else {
            Stop::Gone
        }
    }
}

/// The clock of a round: when its command was read, and when each stage ended.
struct Clock {
    read_at: Instant,
    timing: Timing,
}

impl Clock {
    fn new(read_at: Instant) -> Self {
        Self {
            read_at,
            timing: Timing::default(),
        }
    }

    fn mark(&mut self, stage: impl FnOnce(&mut Timing) -> &mut Duration) {
        // At least one microsecond, since zero says that a stage was not reached.
        let passed = self.read_at.elapsed().max(Duration::from_micros(1));
        *stage(&mut self.timing) = passed;
    }
}

/// What drives a response: where its events go, and what may stop it.
struct Driver<'a> {
    shared: &'a Shared,
    id: ResponseId,
    lane: LaneName,
    request_id: RequestId,
    stops: Stops<'a>,
    /// Goes on when the client vanishes.
    stays: bool,
    /// The client has vanished: events go nowhere.
    deaf: bool,
    /// `None` once the client can send nothing more.
    controls: Option<mpsc::Receiver<Control>>,
    slot: Option<OwnedSemaphorePermit>,
    clock: Clock,
    /// Samples that went on by themselves since the last `done`.
    earlier: Vec<SampleReport>,
    /// Of the response, from its dispatch to its end.
    meter: Option<Meter>,
    /// What the response pays from.
    purse: Purse,
    /// Sampled tokens, as far as their events were made.
    sampled_tokens: u64,
    /// Those of them whose events were handed to a client that was there.
    delivered_tokens: u64,
    /// What waits for classifiers.
    withheld: Withheld,
    /// Commands that wait for them.
    unadmitted: VecDeque<Unadmitted>,
    /// So many of them are sampled for as if they had passed.
    presumed: usize,
    /// What they said of input before anything was told.
    found: Vec<Event>,
    /// Something of the response was told.
    told: bool,
}

/// A create that there is no room to record.
fn unrecorded(full: &Full) -> Error {
    Error {
        retry_after: Some(RECORD_RETRY),
        ..Error::new(Code::RateLimitExceeded, full.to_string())
    }
}

/// A create that no budget has anything left for.
fn quota(spent: &Spent) -> Error {
    Error {
        retry_after: spent.full_in_ms.map(Duration::from_millis),
        ..Error::new(Code::InsufficientQuota, spent.to_string())
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What serves the response now.
fn served(open: &Open) -> Served {
    let model = open.model();
    Served {
        model: model.name.clone(),
        backend: model.backend.capabilities().kind.into(),
    }
}
