//! One stream: its reader, which takes commands and never waits for a lane, and what goes out.
//!
//! ```text
//!   client ── commands ──▶ reader ── one task a create ──▶ response ── batches ──▶ Outgoing ──▶ client
//!                            └──── append, done, cancel ────▶ ┘
//! ```
//!
//! The reader holds no conversation: it knows which lanes exist, which responses are open, and
//! how to reach them. Every channel is bounded; a slot in the outgoing one is reserved before a
//! backend is asked for more, so a client that does not read slows its own sampling and nothing else.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    archive::Archive,
    billing::Account,
    budget::Wallet,
    event::{Code, Envelope, Error, Event, now_ms},
    item::{LaneName, RequestId, ResponseId},
    lane::{Cancel, Control, Job, Parent, Place, Turn, What},
    model::Models,
    render::Heads,
    request::{Create, NewItem},
    safety::Policies,
    session::Held,
};

/// Longest delta that deltas are merged into, in bytes.
const MERGED_BYTES_MAX: usize = 16 * 1024;

/// How much of the time until connections are cut responses may take: the rest is for their last
/// events to arrive.
const DRAIN_SHARE: f32 = 0.9;

/// What a client sent.
#[derive(Debug)]
pub struct Incoming {
    /// The lane that it named; empty where it named none.
    pub lane: String,
    /// What it calls its command.
    pub request_id: RequestId,
    /// The command, or why it cannot be understood.
    pub command: Result<Command, Error>,
}

/// A decoded command.
#[derive(Debug)]
pub enum Command {
    /// Start a response.
    Create(Box<Create>),
    /// Add input to one.
    Append {
        /// Which.
        response_id: ResponseId,
        /// What.
        input: Vec<NewItem>,
    },
    /// Finalise one as it stands.
    Done {
        /// Which.
        response_id: ResponseId,
    },
    /// Stop one.
    Cancel {
        /// Which.
        target: Target,
    },
}

/// What a cancel stops.
#[derive(Debug)]
pub enum Target {
    /// The response of this id.
    Response(ResponseId),
    /// The response of the create that carried this: it may still wait, and the client not know its id.
    Create(RequestId),
}

/// How long and how much; the defaults and their reasons are in the example configuration.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "documented in the configuration, key by key")]
pub struct Limits {
    pub age_max: Duration,
    pub go_away: Duration,
    pub lanes_max: usize,
    pub sampling_max: usize,
    pub waiting_max: usize,
    pub held_time_max: Duration,
    pub send_time_max: Duration,
    pub events_queued_max: usize,
    pub commands_queued_max: usize,
}

/// What every response of a stream shares.
pub struct Shared {
    /// The models.
    pub models: Arc<Models>,
    /// Rendered heads of all streams.
    pub heads: Arc<Heads>,
    /// What this stream holds.
    pub held: Held,
    /// Where else responses are found.
    pub archive: Arc<Archive>,
    /// What its responses are charged to.
    pub account: Account,
    /// What its responses pay from.
    pub wallet: Wallet,
    /// What items are checked under.
    pub policies: Arc<Policies>,
    /// How long and how much.
    pub limits: Limits,
    /// Where events go.
    pub out: Outbox,
    /// One permit a response that samples.
    pub slots: Arc<Semaphore>,
    /// What ends responses before they are done.
    pub ends: Ends,
}

/// What ends the responses of a stream before they are done.
#[derive(Debug)]
pub struct Ends {
    /// Time is up: what runs ends now.
    pub deadline: CancellationToken,
    /// The client is gone.
    pub gone: CancellationToken,
    /// Either of them.
    pub over: CancellationToken,
}

impl Default for Ends {
    fn default() -> Self {
        let deadline = CancellationToken::new();
        Self {
            gone: CancellationToken::new(),
            over: deadline.child_token(),
            deadline,
        }
    }
}

/// Why a stream ended otherwise than well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    /// The client did not read for too long.
    SlowClient,
    /// A message of the client is over the limit.
    MessageTooLarge,
    /// The client sent what is no message.
    Malformed,
    /// The client's side broke: nobody is left to be told.
    ClientGone,
    /// A task of ours panicked.
    Internal,
}

/// Events of one response, in order.
#[derive(Debug)]
pub struct Batch {
    /// The lane.
    pub lane: LaneName,
    /// The response.
    pub response_id: Option<ResponseId>,
    /// The command that caused them.
    pub request_id: RequestId,
    /// The events.
    pub events: VecDeque<Event>,
}

/// The sending side of a stream.
#[derive(Clone)]
pub struct Outbox {
    sender: mpsc::Sender<Batch>,
    send_time_max: Duration,
    end: Arc<OnceLock<StreamEnd>>,
    /// Fires when the stream ends for a reason of ours.
    broken: CancellationToken,
}

/// The client is gone or does not read: nothing can be sent any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

impl Outbox {
    /// Waits for room for one batch.
    ///
    /// # Errors
    ///
    /// [`Gone`] when the client is, or when it has not read for too long, which ends the stream.
    ///
    /// # Cancellation
    ///
    /// Safe: no room is lost.
    pub async fn reserve(&self) -> Result<mpsc::Permit<'_, Batch>, Gone> {
        if self.broken.is_cancelled() {
            return Err(Gone);
        }
        match tokio::time::timeout(self.send_time_max, self.sender.reserve()).await {
            Ok(permit) => permit.map_err(|_| Gone),
            Err(_) => {
                self.fail(StreamEnd::SlowClient);
                Err(Gone)
            }
        }
    }

    /// Room for one batch, where there is some now.
    #[must_use]
    pub fn try_reserve(&self) -> Option<mpsc::Permit<'_, Batch>> {
        self.sender.try_reserve().ok()
    }

    /// Sends a batch when there is room.
    ///
    /// # Errors
    ///
    /// As [`Outbox::reserve`].
    pub async fn send(&self, batch: Batch) -> Result<(), Gone> {
        self.reserve().await?.send(batch);
        Ok(())
    }

    /// Ends the stream with this reason.
    pub fn fail(&self, end: StreamEnd) {
        // The first reason is the one that is told.
        if self.end.set(end).is_ok() {
            tracing::info!(reason = ?end, "stream broken");
        }
        self.broken.cancel();
    }
}

/// The receiving side: what the client gets, with sequence numbers, in one stream.
///
/// The first delta leaves at once; what has queued behind it is merged into one message, so that
/// whoever is behind catches up with fewer and larger messages.
pub struct Outgoing {
    receiver: mpsc::Receiver<Batch>,
    current: Option<Batch>,
    sequence: u64,
    end: Arc<OnceLock<StreamEnd>>,
    ended: bool,
}

/// A channel for the events of a stream.
#[must_use]
pub fn outgoing(limits: &Limits) -> (Outbox, Outgoing) {
    let (sender, receiver) = mpsc::channel(limits.events_queued_max);
    let end = Arc::new(OnceLock::new());
    let outbox = Outbox {
        sender,
        send_time_max: limits.send_time_max,
        end: end.clone(),
        broken: CancellationToken::new(),
    };
    let outgoing = Outgoing {
        receiver,
        current: None,
        sequence: 0,
        end,
        ended: false,
    };
    (outbox, outgoing)
}

impl Outgoing {
    /// The next event that is there, from the current batch or the next one.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Envelope>> {
        loop {
            if let Some(batch) = &mut self.current
                && let Some(event) = batch.events.pop_front()
            {
                return Poll::Ready(Some(Envelope {
                    lane: batch.lane.clone(),
                    response_id: batch.response_id.clone(),
                    request_id: batch.request_id.clone(),
                    event,
                }));
            }
            match self.receiver.poll_recv(cx) {
                Poll::Ready(Some(batch)) => self.current = Some(batch),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Adds to a delta what has queued right behind it for the same item.
    fn merge(&mut self, envelope: &mut Envelope, cx: &mut Context<'_>) {
        let Event::Delta {
            output_index,
            kind,
            delta,
            logprobs,
        } = &mut envelope.event
        else {
            return;
        };
        while delta.len() < MERGED_BYTES_MAX {
            if self
                .current
                .as_ref()
                .is_none_or(|batch| batch.events.is_empty())
            {
                match self.receiver.poll_recv(cx) {
                    Poll::Ready(Some(batch)) => self.current = Some(batch),
                    Poll::Ready(None) | Poll::Pending => return,
                }
            }
            let Some(batch) = &mut self.current else {
                return;
            };
            let same = batch.response_id == envelope.response_id
                && matches!(
                    batch.events.front(),
                    Some(Event::Delta { output_index: i, kind: k, .. }) if i == output_index && k == kind
                );
            if !same {
                return;
            }
            if let Some(Event::Delta {
                delta: more,
                logprobs: more_logprobs,
                ..
            }) = batch.events.pop_front()
            {
                delta.push_str(&more);
                logprobs.extend(more_logprobs);
            }
        }
    }
}

impl Stream for Outgoing {
    type Item = Result<(u64, Envelope), StreamEnd>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match self.poll_event(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(mut envelope)) => {
                self.merge(&mut envelope, cx);
                self.sequence += 1;
                Poll::Ready(Some(Ok((self.sequence, envelope))))
            }
            Poll::Ready(None) => {
                self.ended = true;
                Poll::Ready(self.end.get().map(|end| Err(*end)))
            }
        }
    }
}

/// An open response, as the reader knows it.
struct Handle {
    lane: LaneName,
    /// What its create carried.
    request_id: RequestId,
    controls: mpsc::Sender<Control>,
    cancel: Arc<Cancel>,
}

impl Handle {
    /// The response, if a command that names this lane may mean it.
    fn on(&self, lane: &LaneName) -> Result<&Self, Error> {
        if lane.as_str().is_empty() || *lane == self.lane {
            return Ok(self);
        }
        let why = format!("the response runs on lane `{}`", self.lane);
        Err(Error::new(Code::InvalidLane, why).at("lane"))
    }
}

/// The reader of a stream.
struct Reader {
    shared: Arc<Shared>,
    lanes: HashMap<LaneName, Turn>,
    open: HashMap<ResponseId, Handle>,
    /// One permit a create that waits.
    waiting: Arc<Semaphore>,
    tasks: JoinSet<()>,
    /// Answers of the reader itself that wait for room.
    answers: VecDeque<Batch>,
    /// When the stream is closed, once that is known.
    closing: Option<Instant>,
}

/// Runs a stream until the client has closed it and everything on it has ended, or until it is
/// gone. Events go to the outbox in `shared`. `draining` ends when the server stops taking work,
/// and tells when connections are cut.
///
/// # Cancellation
///
/// Dropping the future ends all responses of the stream at once, without a commit; let it run.
pub async fn run(
    inbound: impl Stream<Item = Incoming> + Send,
    shared: Arc<Shared>,
    draining: impl Future<Output = Instant> + Send,
) {
    let limits = shared.limits;
    let opened = Instant::now();
    let age = opened + limits.age_max.saturating_sub(limits.go_away);
    let mut reader = Reader {
        waiting: Arc::new(Semaphore::new(limits.waiting_max)),
        shared: shared.clone(),
        lanes: HashMap::new(),
        open: HashMap::new(),
        tasks: JoinSet::new(),
        answers: VecDeque::new(),
        closing: None,
    };
    let mut inbound = std::pin::pin!(inbound);
    let mut draining = std::pin::pin!(draining);
    let mut reading = true;
    loop {
        if reader.tasks.is_empty()
            && reader.answers.is_empty()
            && (!reading || reader.closing.is_some())
        {
            break;
        }
        let closing = reader.closing;
        tokio::select! {
            biased;
            () = shared.out.sender.closed(), if !shared.ends.gone.is_cancelled() => {
                reading = false;
                reader.gone();
            }
            () = shared.out.broken.cancelled(), if !shared.ends.gone.is_cancelled() => {
                reading = false;
                reader.gone();
            }
            Some(ended) = reader.tasks.join_next() => {
                if ended.is_err_and(|error| error.is_panic()) {
                    shared.out.fail(StreamEnd::Internal);
                }
            }
            permit = shared.out.reserve(), if !reader.answers.is_empty() => {
                match (permit, reader.answers.pop_front()) {
                    (Ok(permit), Some(batch)) => permit.send(batch),
                    (Err(Gone), _) | (_, None) => {}
                }
            }
            () = tokio::time::sleep_until(age), if closing.is_none() => {
                reader.go_away(Code::StreamAgeLimitReached, limits.go_away.min(limits.age_max));
            }
            cut = &mut draining, if closing.is_none() => {
                let left = cut.saturating_duration_since(Instant::now());
                reader.go_away(Code::Draining, left.mul_f32(DRAIN_SHARE));
            }
            () = sleep_until(closing), if closing.is_some() && !shared.ends.deadline.is_cancelled() => {
                shared.ends.deadline.cancel();
            }
            // A client that floods commands and does not read what comes of them waits here, alone.
            incoming = inbound.next(), if reading && reader.answers.len() < limits.commands_queued_max => {
                match incoming {
                    Some(incoming) => reader.take(incoming),
                    None => {
                        reading = false;
                        // Nothing more can be appended: held responses end as they stand.
                        reader.open.clear();
                    }
                }
            }
        }
    }
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

impl Reader {
    fn gone(&mut self) {
        self.shared.ends.gone.cancel();
        self.shared.ends.over.cancel();
        self.answers.clear();
        self.open.clear();
    }

    fn go_away(&mut self, reason: Code, time_left: Duration) {
        self.closing = Some(Instant::now() + time_left);
        let event = Event::GoAway {
            time_left,
            reason,
            resumable: true,
        };
        self.answer(LaneName::from(""), None, RequestId::from(""), event);
    }

    fn answer(
        &mut self,
        lane: LaneName,
        response_id: Option<ResponseId>,
        request_id: RequestId,
        event: Event,
    ) {
        self.answers.push_back(Batch {
            lane,
            response_id,
            request_id,
            events: [event].into(),
        });
    }

    fn take(&mut self, incoming: Incoming) {
        let Incoming {
            lane,
            request_id,
            command,
        } = incoming;
        let (lane, checked) = check_lane(lane);
        let response_id = match &command {
            Err(_)
            | Ok(
                Command::Create(_)
                | Command::Cancel {
                    target: Target::Create(_),
                },
            ) => None,
            Ok(
                Command::Append { response_id, .. }
                | Command::Done { response_id }
                | Command::Cancel {
                    target: Target::Response(response_id),
                },
            ) => Some(response_id.clone()),
        };
        let taken = checked.and(command).and_then(|command| match command {
            Command::Create(create) => self.create(&lane, &request_id, *create),
            Command::Append { response_id, input } => {
                let what = What::Append(input);
                self.control(&lane, &response_id, &request_id, what, "append")
            }
            Command::Done { response_id } => {
                self.control(&lane, &response_id, &request_id, What::Done, "done")
            }
            Command::Cancel { target } => {
                let handle = match &target {
                    Target::Response(id) => self.handle(&lane, id, "cancel")?,
                    Target::Create(create) => self.handle_of_create(&lane, create)?,
                };
                handle.cancel.request(request_id.clone());
                Ok(())
            }
        });
        if let Err(error) = taken {
            tracing::debug!(code = error.code.as_str(), "command refused");
            self.answer(lane, response_id, request_id, Event::Error(Box::new(error)));
        }
    }

    fn create(
        &mut self,
        lane: &LaneName,
        request_id: &RequestId,
        create: Create,
    ) -> Result<(), Error> {
        let limits = self.shared.limits;
        if let Some(closing) = self.closing {
            let mut error = Error::new(
                Code::Draining,
                "this stream takes no new responses; open another",
            );
            error.retry_after = Some(closing.saturating_duration_since(Instant::now()));
            return Err(error);
        }
        self.open.retain(|_, handle| !handle.controls.is_closed());
        if !self.lanes.contains_key(lane)
            && !lane.as_str().is_empty()
            && self
                .lanes
                .keys()
                .filter(|lane| !lane.as_str().is_empty())
                .count()
                >= limits.lanes_max
        {
            return Err(Error::new(
                Code::LaneLimitReached,
                format!("a stream has at most {} named lanes", limits.lanes_max),
            )
            .at("lane"));
        }
        let before = self.lanes.get(lane).cloned().unwrap_or_else(Turn::over);
        let place = self.place(&before)?;
        let parent = self.parent(lane, &create)?;
        let id = ResponseId::new();
        let (controls, receiver) = mpsc::channel(limits.commands_queued_max);
        let cancel = Arc::new(Cancel::with(match create.continue_on_disconnect {
            true => &self.shared.ends.deadline,
            false => &self.shared.ends.over,
        }));
        let turn = Turn::default();
        self.lanes.insert(lane.clone(), turn.clone());
        let job = Job {
            id: id.clone(),
            lane: lane.clone(),
            request_id: request_id.clone(),
            create,
            parent,
            read_at: Instant::now(),
            created_at_ms: now_ms(),
            controls: receiver,
            cancel: cancel.clone(),
            place,
            before,
            turn,
        };
        let handle = Handle {
            lane: lane.clone(),
            request_id: request_id.clone(),
            controls,
            cancel,
        };
        self.open.insert(id, handle);
        let span = tracing::info_span!(
            "response",
            id = %job.id,
            lane = %job.lane,
            traceparent = job.create.traceparent,
            model = tracing::field::Empty
        );
        let run = crate::lane::run(job, self.shared.clone());
        self.tasks.spawn(run.instrument(span));
        Ok(())
    }

    /// A slot where it can be had at once, so that only creates which have to wait count as waiting.
    fn place(&self, before: &Turn) -> Result<Place, Error> {
        if before.is_over()
            && let Ok(slot) = self.shared.slots.clone().try_acquire_owned()
        {
            return Ok(Place::Slot(slot));
        }
        let waiting = self.waiting.clone().try_acquire_owned();
        waiting.map(Place::Waiting).map_err(|_| {
            let limit = self.shared.limits.waiting_max;
            Error::new(
                Code::QueueFull,
                format!("at most {limit} creates wait on a stream"),
            )
        })
    }

    /// Pins the response to continue, so that nothing that happens later can take it away.
    fn parent(&self, lane: &LaneName, create: &Create) -> Result<Option<Parent>, Error> {
        let Some(id) = &create.previous else {
            return Ok(None);
        };
        if let Some(committed) = self.shared.held.find(id) {
            return Ok(Some(Parent::Committed(committed)));
        }
        // It may run right now, on this lane ahead of this create. On another one nothing says which
        // of the two comes first.
        match self.open.get(id) {
            Some(handle) if handle.lane == *lane => Ok(Some(Parent::Running(id.clone()))),
            // Asking the store takes time, and the reader has none.
            None if self.shared.archive.has_store() => Ok(Some(Parent::Stored(id.clone()))),
            Some(_) | None => Err(not_found(id)),
        }
    }

    fn handle(&self, lane: &LaneName, id: &ResponseId, command: &str) -> Result<&Handle, Error> {
        let handle = self
            .open
            .get(id)
            .filter(|handle| !handle.controls.is_closed());
        let handle = handle.ok_or_else(|| not_open(id, command))?;
        handle.on(lane)
    }

    /// The response of a create by what that carried; where several carried it, of the newest.
    fn handle_of_create(&self, lane: &LaneName, create: &RequestId) -> Result<&Handle, Error> {
        let open = self
            .open
            .iter()
            .filter(|(_, handle)| handle.request_id == *create && !handle.controls.is_closed());
        let (_, handle) = open.max_by_key(|(id, _)| *id).ok_or_else(|| {
            let why = format!("no response of a create `{create}` waits, runs or is held");
            Error::new(Code::ResponseNotOpen, why).at("cancel.create_request_id")
        })?;
        handle.on(lane)
    }

    fn control(
        &self,
        lane: &LaneName,
        id: &ResponseId,
        request_id: &RequestId,
        what: What,
        command: &str,
    ) -> Result<(), Error> {
        let handle = self.handle(lane, id, command)?;
        let control = Control {
            what,
            request_id: request_id.clone(),
            read_at: Instant::now(),
        };
        handle
            .controls
            .try_send(control)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => Error::new(
                    Code::QueueFull,
                    format!(
                        "at most {} commands wait for a response",
                        self.shared.limits.commands_queued_max
                    ),
                ),
                mpsc::error::TrySendError::Closed(_) => not_open(id, command),
            })
    }
}

/// The response cannot be continued: its state is gone.
#[must_use]
pub fn not_found(id: &ResponseId) -> Error {
    Error::new(
        Code::PreviousResponseNotFound,
        format!("no response `{id}` is held"),
    )
    .at("create.previous_response_id")
}

/// The response takes no commands any more.
#[must_use]
pub fn not_open(id: &ResponseId, command: &str) -> Error {
    Error::new(
        Code::ResponseNotOpen,
        format!("the response `{id}` neither runs nor is held"),
    )
    .at(format!("{command}.response_id"))
}

/// The lane's name as far as it is allowed to be long, and whether it is allowed.
fn check_lane(mut lane: String) -> (LaneName, Result<(), Error>) {
    const LEN_MAX: usize = 256;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if lane.len() <= LEN_MAX && lane.bytes().all(allowed) {
        return (lane.into(), Ok(()));
    }
    let why = format!("a lane's name has at most {LEN_MAX} characters of [A-Za-z0-9_.-]");
    lane.truncate(lane.floor_char_boundary(LEN_MAX));
    (
        lane.into(),
        Err(Error::new(Code::InvalidLane, why).at("lane")),
    )
}
