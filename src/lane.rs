//! A lane runs its responses one after the other: the driver of one response, from its turn on
//! the lane to its end. All waiting is here; what happens is in `response`.

mod ending;
mod judged;
mod withheld;

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::{StreamExt as _, future::BoxFuture};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

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

use judged::{Unadmitted, admissible};
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

/// A response's time on its lane, at first still to end. The next one waits for its end.
#[derive(Debug, Clone, Default)]
pub struct Turn(Arc<Ending>);

#[derive(Debug, Default)]
struct Ending {
    over: CancellationToken,
    /// The turn to wait for instead, where this one was given up before it came.
    instead: OnceLock<Turn>,
}

impl Turn {
    /// The turn of nobody: already over.
    #[must_use]
    pub fn over() -> Self {
        let turn = Self::default();
        turn.0.over.cancel();
        turn
    }

    /// Whether the next one need not wait.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.latest().0.over.is_cancelled()
    }

    /// Waits for the end.
    async fn ended(&self) {
        let mut turn = self.latest();
        turn.0.over.cancelled().await;
        while let Some(before) = turn.0.instead.get() {
            turn = before.clone();
            turn.0.over.cancelled().await;
        }
    }

    /// Gives the turn up before it came: whoever waits for it waits for the one before it. Nothing
    /// of it is kept, so creates that are cancelled while they wait do not pile up.
    fn give_up(&self, before: &Self) {
        let _ = self.0.instead.set(before.latest());
        self.0.over.cancel();
    }

    /// The turn that stands for this one now.
    fn latest(&self) -> Self {
        let mut turn = self.clone();
        while let Some(before) = turn.0.instead.get() {
            turn = before.clone();
        }
        turn
    }
}

/// What stops a response: a request, with who asked, or what ends with it on its stream.
#[derive(Debug)]
pub struct Cancel {
    token: CancellationToken,
    request_id: OnceLock<RequestId>,
}

impl Cancel {
    /// Stops also when `token` does, of which this is a child: so that a response looks at one place.
    #[must_use]
    pub fn with(token: &CancellationToken) -> Self {
        Self {
            token: token.child_token(),
            request_id: OnceLock::new(),
        }
    }

    /// Asks for the stop. The first one to ask is answered.
    pub fn request(&self, request_id: RequestId) {
        let _ = self.request_id.set(request_id);
        self.token.cancel();
    }
}

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
    let _end_turn = job.turn.0.over.clone().drop_guard();
    Box::pin(drive(job, &shared)).await;
}

async fn drive(job: Job, shared: &Shared) {
    let Job {
        id,
        lane,
        request_id,
        mut create,
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
    let parent = match driver.wait(&before, parent).await {
        Ok(Ok(parent)) => parent,
        Ok(Err(error)) => {
            turn.give_up(&before);
            driver.refuse(error).await;
            return driver.close().await;
        }
        Err(stop) => {
            turn.give_up(&before);
            driver.stopped_early(stop).await;
            return driver.close().await;
        }
    };
    drop(waiting);
    driver.clock.mark(|timing| &mut timing.started);
    let previous = create.previous.clone();
    let prepare_only = create.prepare_only;
    let asked = create.settings.model.clone().unwrap_or_default();
    let begun = driver.begin(&mut create, parent, created_at_ms).await;
    let mut open = match begun {
        Ok(open) => open,
        Err(error) => {
            driver.refuse(error).await;
            return driver.close().await;
        }
    };
    // Nothing waits for a warm-up, so it waits for all that is said.
    let waits = prepare_only
        || open
            .policy()
            .is_some_and(|it| it.gate() == GateAt::Sampling);
    if waits {
        match driver.input_judged().await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                driver.refuse(error).await;
                return driver.close().await;
            }
            Err(stop) => {
                driver.stopped_early(stop).await;
                return driver.close().await;
            }
        }
    }
    driver.purse = driver.shared.wallet.begin(&open.model().name);
    if !prepare_only && let Err(spent) = driver.afford(&mut open) {
        driver.refuse(quota(&spent)).await;
        return driver.close().await;
    }
    match driver.reserve(&open, asked).await {
        Ok(Ok(meter)) => driver.meter = Some(meter),
        Ok(Err(Full)) => {
            driver.purse.abandon();
            let error = Error::new(Code::RateLimitExceeded, Full.to_string());
            let retry_after = Some(RECORD_RETRY);
            driver
                .refuse(Error {
                    retry_after,
                    ..error
                })
                .await;
            return driver.close().await;
        }
        Err(stop) => {
            driver.purse.abandon();
            driver.stopped_early(stop).await;
            return driver.close().await;
        }
    }
    tracing::Span::current().record("model", &*open.model().name);
    let created = Event::Created {
        model: open.model().name.clone(),
        previous,
        created_at_ms,
    };
    let found = open.take_verdicts().chain(driver.found());
    let events = std::iter::once(created).chain(found).collect();
    driver.send(events).await;
    if prepare_only {
        match driver.warm_up(&open).await {
            Some(Stop::Cancelled) => driver.cancelled(&open).await,
            // What was prepared stays prepared.
            None | Some(Stop::Interrupted | Stop::Gone) => {
                driver.finish(open, End::Completed, Vec::new()).await;
            }
        }
    } else {
        driver.rounds(open).await;
    }
    driver.close().await;
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
        self.cancel.token.cancelled().await;
        if self.cancel.request_id.get().is_some() {
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

impl Driver<'_> {
    /// Waits for what is continued and for the turn. What the store must be asked for is read
    /// while the lane may still be busy, and is refused as soon as that is known.
    async fn wait(
        &mut self,
        before: &Turn,
        parent: Option<Parent>,
    ) -> Result<Result<Option<Arc<Committed>>, Error>, Stop> {
        let parent = match parent {
            Some(Parent::Stored(id)) => match self.load(&id).await? {
                Ok(found) => Some(Parent::Committed(found)),
                Err(error) => return Ok(Err(error)),
            },
            Some(Parent::Committed(_) | Parent::Running(_)) | None => parent,
        };
        self.turn(before).await?;
        Ok(match parent {
            None => Ok(None),
            Some(Parent::Committed(found)) => Ok(Some(found)),
            // It has ended by now, and may have left memory since.
            Some(Parent::Running(id) | Parent::Stored(id)) => self.load(&id).await?.map(Some),
        })
    }

    /// The response to continue.
    async fn load(&self, id: &ResponseId) -> Result<Result<Arc<Committed>, Error>, Stop> {
        let Shared { archive, held, .. } = self.shared;
        tokio::select! {
            biased;
            stop = self.stops.stopped() => Err(stop),
            found = archive.load(held.tenant(), id) => Ok(match found {
                Ok(found) => found.ok_or_else(|| not_found(id)),
                // Whoever continues a response can send the whole conversation instead.
                Err(error) => {
                    tracing::error!(%error, "the store cannot be read");
                    Err(not_found(id))
                }
            }),
        }
    }

    /// Waits for the turn on the lane and for a slot to sample in.
    async fn turn(&mut self, before: &Turn) -> Result<(), Stop> {
        tokio::select! {
            biased;
            stop = self.stops.stopped() => return Err(stop),
            () = before.ended() => {}
        }
        if self.slot.is_none() {
            self.slot = tokio::select! {
                biased;
                stop = self.stops.stopped() => return Err(stop),
                slot = self.shared.slots.clone().acquire_owned() => slot.ok(),
            };
        }
        Ok(())
    }

    /// Validates, checks and renders the input.
    async fn begin(
        &mut self,
        create: &mut Create,
        parent: Option<Arc<Committed>>,
        created_at_ms: u64,
    ) -> Result<Open, Error> {
        let inherited = parent.as_ref().map(|parent| parent.settings.clone());
        let own = std::mem::take(&mut create.settings);
        let head_bytes = own.head_bytes();
        let settings = match &inherited {
            Some(parent) if own == Settings::default() && create.reset.is_empty() => parent.clone(),
            Some(parent) => Arc::new(own.inherit(parent, &create.reset)),
            None => Arc::new(own),
        };
        let model = self
            .shared
            .models
            .get(
                settings.model.as_deref(),
                parent.as_ref().map(|parent| &*parent.model),
                self.id.as_str(),
            )
            .ok_or_else(|| {
                let name = settings.model.as_deref().unwrap_or_default();
                Error::new(
                    Code::ModelNotFound,
                    format!("no model has the name `{name}`"),
                )
                .at("create.model")
            })?;
        let model = well(model, &self.shared.models);
        let input = std::mem::take(&mut create.input);
        let input_bytes = input.iter().map(|new| match new {
            NewItem::Item(item) => item.text_bytes(),
            NewItem::Reference(_) => 0,
        });
        let text_bytes = head_bytes + input_bytes.sum::<usize>();
        let policy = self.policy(&model);
        let ids: Vec<ItemId> = match &policy {
            Some(_) => input.iter().map(|new| new.id().clone()).collect(),
            None => Vec::new(),
        };
        let valid = {
            let past = Past {
                open_calls: parent.as_ref().map_or(&[], |parent| &parent.open_calls),
                exists: parent.is_some(),
                find_item: &|id| self.shared.held.find_item(id),
            };
            Create::validate(
                input,
                settings,
                create.prepare_only,
                &past,
                &model.abilities(),
            )?
        };
        self.clock.mark(|timing| &mut timing.validated);
        let (past, under) = (parent.clone(), policy.clone());
        let known = past
            .as_ref()
            .is_none_or(|past| past.checked.holds_under(under.as_deref()));
        let sent = ids.clone();
        let check = move || -> Result<(Cleared, Recheck), Error> {
            let names = Names {
                command: "create",
                ids: &sent,
            };
            let cleared = safety::clear(valid.input, under.as_deref(), &names)?;
            Ok((cleared, recheck(past.as_deref(), under.as_deref())?))
        };
        let (cleared, recheck) = match &policy {
            Some(_) if !known || text_bytes >= BLOCKING_BYTES_MIN => {
                let checked = tokio::task::spawn_blocking(check).await;
                checked.unwrap_or_else(|_| Err(Error::new(Code::BackendError, "checking failed")))
            }
            Some(_) | None => check(),
        }?;
        self.clock.mark(|timing| &mut timing.checked);

        let begin = Begin {
            id: self.id.clone(),
            tenant: self.shared.held.tenant().clone(),
            model,
            settings: valid.settings,
            parent,
            today: today(),
            input: cleared,
            open_calls: valid.open_calls,
            created_at_ms,
            metadata: std::mem::take(&mut create.metadata),
            include_output: create.include_output,
            hold: create.hold,
            no_deltas: create.no_deltas,
            policy,
            recheck,
        };
        let heads = self.shared.heads.clone();
        let prepare_only = create.prepare_only;
        let mut open = if text_bytes < BLOCKING_BYTES_MIN {
            Open::begin(begin, &heads, prepare_only)
        } else {
            let prepare = move || Open::begin(begin, &heads, prepare_only);
            let prepared = tokio::task::spawn_blocking(prepare).await;
            prepared.unwrap_or_else(|_| Err(Error::new(Code::BackendError, "rendering failed")))
        }?;
        self.clock.mark(|timing| &mut timing.rendered);
        let names = Names {
            command: "create",
            ids: &ids,
        };
        let inquiries = open.inquiries(&names);
        self.ask_about_input(inquiries, &open);
        Ok(open)
    }

    /// What items are checked under where this model samples.
    fn policy(&self, model: &Model) -> Option<Arc<Policy>> {
        let Shared { policies, held, .. } = self.shared;
        policies.get(&model.name, held.tenant())
    }

    /// Samples, and samples again for as long as there is input for it.
    /// The first sample is afforded already.
    async fn rounds(&mut self, mut open: Open) {
        let (conclusion, events) = loop {
            let mut events = Vec::new();
            let ready = match self.sample(&mut open, &mut events).await {
                Ok(Went::Nowhere) => continue,
                Ok(Went::To(Next::Finish(end))) => break (Conclusion::Finish(end), events),
                Ok(Went::To(Next::Sample)) => {
                    self.goes_on(&open, events).await;
                    Ok(Ready::Input)
                }
                Ok(Went::To(Next::Await)) => {
                    self.awaits(&mut open, events).await;
                    self.awaiting(&mut open).await
                }
                Ok(Went::Back) => self.awaiting(&mut open).await,
                Err(conclusion) => break (conclusion, events),
            };
            let prepared = match ready {
                Ok(Ready::Prompt) => Ok(()),
                Ok(Ready::Input) => self.prepare(&mut open),
                Err(conclusion) => Err(conclusion),
            };
            if let Err(conclusion) = prepared {
                break (conclusion, Vec::new());
            }
        };
        match conclusion {
            Conclusion::Finish(end) => self.finish(open, end, events).await,
            Conclusion::Failed(error) => self.failed(open, error, events).await,
            Conclusion::Refused(error) => self.refused(open, error).await,
            Conclusion::Cancelled => self.cancelled(&open).await,
        }
    }

    /// One sample, and what comes after it. Its last events are left in `events`.
    async fn sample(
        &mut self,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<Went, Conclusion> {
        let begun = Instant::now();
        let before = (open.usage(), open.calls_made());
        let ended = self.round(open, events).await;
        if matches!(ended, Err(Broken::Unbegun(_))) {
            if let Some(before) = self.withheld.presumed() {
                // Another model takes over for what has passed.
                self.purse.abandon();
                open.unbegin_round();
                self.unpresume(open, *before);
                return Ok(Went::Back);
            }
            if self.hand_over(open) {
                return self.handed_over(open, events).await;
            }
        }
        self.settle_sample(open, begun, before);
        let mut ended = self.settle(ended, open, events).await;
        if let Ok(end @ (RoundEnd::Stop | RoundEnd::Boundary)) = ended
            && !self.unadmitted.is_empty()
        {
            let end = open.close_round(end, events);
            self.tell(open, std::mem::take(events), None).await;
            let admitted = self.all_admitted(open).await;
            ended = admitted.map_or_else(Stop::into_round, |()| Ok(end));
        }
        match ended {
            Ok(end) => Ok(Went::To(open.end_round(end, events))),
            Err(broken) => self.broken(broken, open),
        }
    }

    /// Another model has taken over: it samples, if that is afforded.
    async fn handed_over(
        &mut self,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<Went, Conclusion> {
        self.clock.mark(|timing| &mut timing.rendered);
        let verdicts = open.take_verdicts().collect();
        self.send(verdicts).await;
        if self.afford(open).is_ok() {
            return Ok(Went::Nowhere);
        }
        match self.settle(Ok(RoundEnd::Spent), open, events).await {
            Err(broken @ (Broken::Cancelled | Broken::Refused(_) | Broken::Presumed(_))) => {
                self.broken(broken, open)
            }
            Ok(_) | Err(Broken::Failed(_) | Broken::Unbegun(_)) => {
                let end = End::Incomplete(IncompleteReason::Budget);
                Err(Conclusion::Finish(end))
            }
        }
    }

    /// What comes after a sample that came to no end.
    fn broken(&mut self, broken: Broken, open: &mut Open) -> Result<Went, Conclusion> {
        match broken {
            Broken::Cancelled => Err(Conclusion::Cancelled),
            Broken::Failed(error) | Broken::Unbegun(error) => Err(Conclusion::Failed(error)),
            Broken::Refused(error) => Err(Conclusion::Refused(error)),
            Broken::Presumed(before) => {
                self.unpresume(open, *before);
                Ok(Went::Back)
            }
        }
    }

    /// Input came while it sampled: the next sample follows at once.
    async fn goes_on(&mut self, open: &Open, events: Vec<Event>) {
        self.delivers(open);
        self.send(events).await;
        if self.earlier.len() == EARLIER_SAMPLES_MAX {
            self.earlier.remove(0);
        }
        self.earlier.push(open.sample_report(self.clock.timing));
        self.clock = Clock::new(Instant::now());
    }

    /// The outputs of its calls are awaited, and the client is told.
    async fn awaits(&mut self, open: &mut Open, mut events: Vec<Event>) {
        self.slot = None;
        self.delivers(open);
        let mut done = self.done(open, Status::AwaitingInput);
        self.charge(self.counts(open), &mut done);
        events.extend(self.found());
        events.push(done);
        open.told();
        self.send(events).await;
    }

    /// The prompt of the next sample, which is afforded then.
    fn prepare(&mut self, open: &mut Open) -> Result<(), Conclusion> {
        match open.prepare(true) {
            Ok(()) if self.afford(open).is_err() => Err(Conclusion::Finish(End::Incomplete(
                IncompleteReason::Budget,
            ))),
            Ok(()) => {
                self.clock.mark(|timing| &mut timing.rendered);
                Ok(())
            }
            // What was sampled and sent is kept: it can be continued once it fits.
            Err(error) if error.code == Code::ContextLengthExceeded => {
                let end = End::Incomplete(IncompleteReason::MaxOutputTokens);
                Err(Conclusion::Finish(end))
            }
            Err(error) => Err(Conclusion::Failed(error)),
        }
    }

    /// The model that is to take over from this one takes over, if there is one and it can. Where not,
    /// the response fails as it would have without.
    fn hand_over(&mut self, open: &mut Open) -> bool {
        let model = open.model().clone();
        let fallback = model.fallback.as_deref();
        let Some(next) = fallback.and_then(|name| self.shared.models.named(name)) else {
            return false;
        };
        tracing::warn!(
            from = &*model.name,
            to = &*next.name,
            "another model takes over"
        );
        tracing::Span::current().record("model", &*next.name);
        // The other one may have other budgets.
        let purse = self.shared.wallet.begin(&next.name);
        let policy = self.policy(&next);
        match open.hand_over((next, policy), &self.shared.heads) {
            Ok(()) => {
                self.purse.hand_over(purse);
                if let Some(meter) = &mut self.meter {
                    meter.serve(served(open));
                }
                let inquiries = open.inquiries_again();
                self.ask_about_input(inquiries, open);
                true
            }
            Err(error) => {
                tracing::warn!(code = error.code.as_str(), "it cannot");
                false
            }
        }
    }

    /// One sample. Its last events are left in `events`.
    async fn round(
        &mut self,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<RoundEnd, Broken> {
        let shared = self.shared;
        let backend = open.model().backend.clone();
        let begun = Instant::now();
        let prompt = open.begin_round();
        let mut chunks: Chunks = backend.sample(prompt);
        self.clock.mark(|timing| &mut timing.dispatched);
        // Waited for all the while, once.
        let stops = self.stops.clone();
        let mut stopped = std::pin::pin!(stops.stopped());
        let time_left = self.purse.time_left_ms(now_ms());
        let mut time_over = std::pin::pin!(sleep_for(time_left));
        let mut first = true;
        let hold_bytes_max = open.policy().map_or(0, Policy::hold_bytes_max);
        loop {
            // Room for the events comes first: a client that does not read is not sampled for.
            let mut permit = shared.out.try_reserve();
            while permit.is_none() && !self.deaf {
                tokio::select! {
                    biased;
                    stop = &mut stopped => return stop.into_round(),
                    control = receive(&mut self.controls) => self.control(control, open).await,
                    room = shared.out.reserve() => match room {
                        Ok(room) => permit = Some(room),
                        Err(Gone) if self.stays => self.deaf = true,
                        Err(Gone) => return Ok(RoundEnd::Interrupted),
                    },
                }
            }
            let chunk = loop {
                tokio::select! {
                    biased;
                    stop = &mut stopped => return stop.into_round(),
                    () = &mut time_over => return Ok(RoundEnd::Spent),
                    control = receive(&mut self.controls) => self.control(control, open).await,
                    judged = self.withheld.judged() => {
                        if let Some(end) = self.take(judged, open, events).await? {
                            return Ok(end);
                        }
                    }
                    judgement = admissible(&mut self.unadmitted), if self.presumed == 0 => {
                        self.admit(judgement, open).await;
                    }
                    chunk = chunks.next(), if !self.withheld.full(hold_bytes_max) => break chunk,
                }
            };
            let chunk = match chunk {
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => {
                    let elsewhere = !matches!(error, BackendError::Refused { .. });
                    let broken = match first && elsewhere {
                        true => Broken::Unbegun,
                        false => Broken::Failed,
                    };
                    return Err(broken(from_backend(error)));
                }
                None => {
                    let why = "the backend ended the sample without saying why";
                    return Err(Broken::Failed(Error::new(Code::BackendError, why)));
                }
            };
            if first && (!chunk.tokens.is_empty() || chunk.told.is_some()) {
                first = false;
                self.clock.mark(|timing| &mut timing.first_token);
            }
            let sampled = open.usage().output_tokens;
            let end = open.chunk(chunk, events);
            self.sampled_tokens = open.usage().output_tokens.into();
            let sampled = open.usage().output_tokens - sampled;
            let free = self.purse.is_free();
            let spent = !free && {
                let took_ms = millis(begun.elapsed());
                let paid = self.purse.output(sampled.into(), took_ms, now_ms());
                paid.is_err()
            };
            let counts = self.counts(open);
            if let Some(meter) = &mut self.meter {
                meter.checkpoint(counts);
            }
            let end = match end.map_err(Broken::Failed)? {
                // The limit of tokens was the budget's, if it has no more.
                None | Some(RoundEnd::Length) if spent => Some(RoundEnd::Spent),
                end => end,
            };
            if let Some(end) = end {
                self.clock.mark(|timing| &mut timing.last_token);
                return Ok(end);
            }
            self.tell(open, std::mem::take(events), permit).await;
            self.ask_about_output(open, false).await;
        }
    }

    /// Holds the response for the outputs of its calls, then waits for a slot to sample in.
    /// Commands are taken all the while.
    async fn awaiting(&mut self, open: &mut Open) -> Result<Ready, Conclusion> {
        let interrupted = End::Incomplete(IncompleteReason::Interrupted);
        let until = Instant::now() + self.shared.limits.held_time_max;
        let mut slot = std::pin::pin!(self.shared.slots.clone().acquire_owned());
        let mut prefill = None;
        loop {
            let next = open.next();
            if let Next::Finish(end) = next
                && self.unadmitted.is_empty()
            {
                return Err(Conclusion::Finish(end));
            }
            tokio::select! {
                biased;
                stop = self.stops.stopped() => return Err(match stop {
                    Stop::Cancelled => Conclusion::Cancelled,
                    Stop::Interrupted | Stop::Gone => Conclusion::Finish(interrupted),
                }),
                control = receive(&mut self.controls) => {
                    match &control {
                        Some(control) => self.clock = Clock::new(control.read_at),
                        // Nobody can answer the calls any more.
                        None if next == Next::Await && self.shared.ends.gone.is_cancelled() => {
                            return Err(Conclusion::Finish(interrupted));
                        }
                        None => {}
                    }
                    self.control(control, open).await;
                    if self.presume(open) {
                        return Ok(Ready::Prompt);
                    }
                    self.clock.mark(|timing| &mut timing.checked);
                    if self.unadmitted.is_empty() {
                        prefill = prefill_ahead(open);
                    }
                }
                judgement = admissible(&mut self.unadmitted) => {
                    self.admit(judgement, open).await;
                    self.clock.mark(|timing| &mut timing.checked);
                    prefill = prefill_ahead(open);
                }
                slot = &mut slot, if next == Next::Sample => {
                    self.slot = slot.ok();
                    self.clock.mark(|timing| &mut timing.started);
                    return Ok(Ready::Input);
                }
                () = prefilled(&mut prefill) => {}
                () = tokio::time::sleep_until(until), if next == Next::Await => {
                    return Err(Conclusion::Finish(interrupted));
                }
            }
        }
    }

    /// Lets the backend prepare its cache, for no longer than the response lives.
    async fn warm_up(&self, open: &Open) -> Option<Stop> {
        let mut prefill = prefill_of(open, open.prompt());
        prefill.as_ref()?;
        tokio::select! {
            biased;
            stop = self.stops.stopped() => Some(stop),
            () = prefilled(&mut prefill) => None,
        }
    }
}

/// How what is continued is checked under this policy. Its items are only looked at where it was
/// checked under another one.
fn recheck(parent: Option<&Committed>, policy: Option<&Policy>) -> Result<Recheck, Error> {
    let Some(parent) = parent else {
        let history = History {
            checked: &Checked::default(),
            items: &mut std::iter::empty(),
        };
        return safety::recheck(history, policy);
    };
    let nodes: Vec<&Committed> = match parent.checked.holds_under(policy) {
        true => Vec::new(),
        false => parent.chain().collect(),
    };
    let batches = nodes.iter().rev().flat_map(|node| &node.batches);
    let history = History {
        checked: &parent.checked,
        items: &mut batches.flatten(),
    };
    safety::recheck(history, policy)
}

/// The model, or where nothing that samples from it is well, the first of those that take over from
/// it that is.
fn well(model: Arc<Model>, models: &Models) -> Arc<Model> {
    let fallback = |model: &Arc<Model>| {
        let name = model.fallback.as_deref()?;
        models.named(name)
    };
    // The configuration has no circles, but may change in between.
    let chain = std::iter::successors(Some(model.clone()), fallback).take(FALLBACKS_MAX);
    let mut well = chain.filter(|model| model.backend.healthy());
    well.next().unwrap_or(model)
}

/// What came of a sample.
enum Went {
    /// It has ended, and this comes next.
    To(Next),
    /// Nothing was sampled: another model has taken over, and is ready.
    Nowhere,
    /// Its input was taken back, and the response awaits it.
    Back,
}

/// What is there for the next sample.
enum Ready {
    /// Its input.
    Input,
    /// Its prompt, which is afforded.
    Prompt,
}

/// How a response ends.
enum Conclusion {
    Finish(End),
    Failed(Error),
    Refused(Error),
    Cancelled,
}

/// Why a sample came to no end.
enum Broken {
    Cancelled,
    Failed(Error),
    /// The same before anything was sampled: another model may take over.
    Unbegun(Error),
    /// Input does not pass.
    Refused(Error),
    /// Input that was presumed to pass does not.
    Presumed(Box<Before>),
}

impl Stop {
    fn into_round(self) -> Result<RoundEnd, Broken> {
        match self {
            Self::Cancelled => Err(Broken::Cancelled),
            Self::Interrupted | Self::Gone => Ok(RoundEnd::Interrupted),
        }
    }
}

/// The next command, or `None` once none can come; then it is not asked again.
async fn receive(controls: &mut Option<mpsc::Receiver<Control>>) -> Option<Control> {
    match controls {
        Some(controls) => controls.recv().await,
        None => std::future::pending().await,
    }
}

/// The work of a backend that prepares its cache. Dropping it stops that work.
type Prefill = BoxFuture<'static, Result<(), BackendError>>;

/// Starts to prepare the backend's cache for the prompt, where the backend can.
fn prefill_of(open: &Open, prompt: Prompt) -> Option<Prefill> {
    let backend = &open.model().backend;
    let prefills = backend.capabilities().prefill;
    prefills.then(|| backend.prefill(prompt))
}

/// Starts to prepare it for input that came early, while other input is awaited.
fn prefill_ahead(open: &Open) -> Option<Prefill> {
    let awaits = open.next() == Next::Await;
    let prompt = awaits.then(|| open.prompt_ahead()).flatten()?;
    prefill_of(open, prompt)
}

/// The end of the work, once. Never where there is none.
async fn prefilled(prefill: &mut Option<Prefill>) {
    let Some(work) = prefill else {
        return std::future::pending().await;
    };
    if let Err(error) = work.await {
        tracing::info!(%error, "the prompt could not be prefilled");
    }
    *prefill = None;
}

fn from_backend(error: BackendError) -> Error {
    let message = error.to_string();
    match error {
        BackendError::Unavailable { retry_after, .. } => Error {
            retry_after,
            ..Error::new(Code::BackendUnavailable, message)
        },
        BackendError::Refused { .. } => Error::new(Code::InvalidRequest, message),
        BackendError::Failed { .. } => Error::new(Code::BackendError, message),
    }
}

/// A create that no budget has anything left for.
fn quota(spent: &Spent) -> Error {
    Error {
        retry_after: spent.full_in_ms.map(Duration::from_millis),
        ..Error::new(Code::InsufficientQuota, spent.to_string())
    }
}

/// Never where there is no limit.
async fn sleep_for(millis: Option<u64>) {
    match millis {
        Some(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
        None => std::future::pending().await,
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

fn today() -> jiff::civil::Date {
    jiff::Timestamp::now()
        .to_zoned(jiff::tz::TimeZone::UTC)
        .date()
}
