//! The loop: the model samples, its tools run, their outputs go back, until it is done.
//!
//! ```text
//!           create                done (awaiting_input, or completed with calls)
//!  begin ───────────▶ Sampling ───────────────────────────────────────▶ Collecting
//!    ▲                 │    ▲   held: the last append; chained: a create      │
//!    │                 │    └─────────────────────────────────────────────────┤
//!    │ refused, lost,  │ done (completed …)                 moving, or enough  │ `done` sent
//!    │ moved           ▼                                    steps (held)       ▼
//!    └───────────── the end ◀──────── Cancelling ◀── interrupt          Finishing
//! ```
//!
//! In the held style outputs are appended as soon as they exist, also while the model still
//! samples. In the chained style they wait for `done` and go out in one create. Both keep the
//! whole history, so that a server that has lost it can be given it again:
//!
//! | what happens | what follows |
//! |---|---|
//! | refused, `retry: safe` | the same command again after `retry_after`, a bounded number of times |
//! | refused, `retry: resend_full` | the history as a new conversation |
//! | the stream is lost | a new one: the first time with `previous_response_id`, then with the history |
//! | `go_away` | the round ends, then a new stream with `previous_response_id` |

mod recovery;

use std::{future::Future, io::Write, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::Semaphore,
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tonic::{Status, transport::Channel};

use super::{
    AgentError, OUTPUT_BYTES_MIN, Outcome, Style, Summary, Times, Tokens,
    link::{Door, Link},
    screen::{self, Screen},
    tools::{Answer, Toolbox},
};
use crate::proto::{
    Append, Cancel, ConnectResponse, Create, CustomToolCallOutput, Done, Error, Finish,
    FunctionCallOutput, IncompleteReason, Item, ItemStatus, ResponseStatus, SampleReport, Usage,
    connect_request::Command, connect_response::Event, item,
};

/// Tools that run at once; the others wait.
const TOOLS_AT_ONCE_MAX: usize = 8;
/// How long a cancelled response may take to say so.
const CANCEL_TIME_MAX: Duration = Duration::from_secs(5);

const INSTRUCTIONS: &str = "You are a careful agent that works on the files of one directory. \
    You reach them only through your tools, and every path is relative to that directory. \
    Look at what is there before you change anything. When the task is done, say in a few \
    sentences what you found or did, without calling a tool.";

/// What to do, and how.
pub(super) struct Plan {
    pub(super) task: String,
    pub(super) model: Option<String>,
    pub(super) instructions: Option<String>,
    pub(super) style: Style,
    pub(super) steps_max: u32,
    /// Whether a person has said how long outputs may be.
    pub(super) output_bytes_told: bool,
}

/// One rollout, from the task to the answer.
pub(super) struct Rollout<W> {
    plan: Plan,
    door: Door,
    toolbox: Toolbox,
    screen: Screen<W>,

    phase: Phase,
    link: Option<Link>,
    /// The server has said that it will close the stream: it can continue our responses elsewhere, or not.
    leaving: Option<Resumable>,
    /// The create that is due, once every tool has ended.
    due: Option<Start>,
    /// Nothing is sent before this time.
    wait_until: Option<Instant>,
    /// The last create, and the id it went out with.
    last: (String, Create),
    /// The response in progress.
    open: Option<Open>,
    /// The ended response that the next create continues.
    parent: Option<String>,

    /// Everything before this round.
    history: Vec<Item>,
    round: Round,
    /// Outputs that wait to be sent, and appends that the server has not accepted yet.
    unsent: Vec<Item>,
    unaccepted: Vec<(String, Item)>,
    running: JoinSet<Ran>,
    slots: Arc<Semaphore>,

    requests: u32,
    retries: u32,
    losses: u32,
    steps: u32,
    tool_calls: u32,
    tokens: Tokens,
    times: Times,
    began: Instant,
}

/// What the rollout waits for. See the diagram of the module.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// The model samples, or is about to.
    Sampling,
    /// The sample has ended, and its calls do not all have their outputs.
    Collecting { since: Instant },
    /// The held response was finalised; its `done` decides nothing any more.
    Finishing(Then),
    /// The rollout was interrupted.
    Cancelling { sent: bool, until: Instant },
}

/// What follows a response that was finalised early.
#[derive(Debug, Clone, Copy)]
enum Then {
    /// It goes on, on another stream.
    Move,
    /// There have been enough steps.
    Stop,
}

/// Whether another stream can continue the responses of this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Resumable(bool);

/// How the next create comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// As the last one: nothing of it was kept.
    Again,
    /// With the outputs that the server does not have, on the parent.
    Continue,
    /// With the whole history, as a new conversation.
    Whole,
}

/// A response in progress.
struct Open {
    id: String,
    /// Whether an output item of it is whole: then its calls may have run already, and it is
    /// continued rather than tried again.
    has_items: bool,
    /// What it had used at the last `done`.
    used: Usage,
}

/// What the model made in one sample.
#[derive(Default)]
struct Round {
    items: Vec<Item>,
    /// Its calls, in order, with their outputs as far as they exist.
    calls: Vec<(String, Option<Item>)>,
}

/// A tool call to run.
struct Call {
    id: String,
    name: String,
    arguments: String,
    kind: CallKind,
}

/// Which kind of output a call takes.
#[derive(Debug, Clone, Copy)]
enum CallKind {
    Function,
    Custom,
}

/// A tool call that has run.
struct Ran {
    call: Call,
    answer: Answer,
    took: Duration,
}

/// One thing that the loop reacts to.
enum Happened {
    Interrupted,
    Message(ConnectResponse),
    StreamEnded(Option<Status>),
    ToolEnded(Result<Ran, JoinError>),
    TimeUp,
}

impl<W: Write> Rollout<W> {
    pub(super) fn new(plan: Plan, door: Door, toolbox: Toolbox, screen: Screen<W>) -> Self {
        let task = Item {
            item: Some(item::Item::UserText(plan.task.clone())),
            ..Item::default()
        };
        Self {
            plan,
            door,
            toolbox,
            screen,
            phase: Phase::Sampling,
            link: None,
            leaving: None,
            due: Some(Start::Whole),
            wait_until: None,
            last: (String::new(), Create::default()),
            open: None,
            parent: None,
            history: vec![task],
            round: Round::default(),
            unsent: Vec::new(),
            unaccepted: Vec::new(),
            running: JoinSet::new(),
            slots: Arc::new(Semaphore::new(TOOLS_AT_ONCE_MAX)),
            requests: 0,
            retries: 0,
            losses: 0,
            steps: 0,
            tool_calls: 0,
            tokens: Tokens::default(),
            times: Times::default(),
            began: Instant::now(),
        }
    }

    /// Runs to the end, or until `interrupt` resolves and the response in progress is cancelled.
    pub(super) async fn run(
        mut self,
        mut interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Summary, AgentError> {
        let mut interrupted = false;
        let outcome = loop {
            // Connecting takes its time, and nothing has to be cancelled before it is done.
            let ended = tokio::select! {
                biased;
                ended = self.send_what_is_due() => ended?,
                () = &mut interrupt, if !interrupted => Some(Outcome::Interrupted),
            };
            if let Some(outcome) = ended {
                break outcome;
            }
            let alarm = self.alarm();
            let happened = tokio::select! {
                biased;
                () = &mut interrupt, if !interrupted => Happened::Interrupted,
                message = next(&mut self.link) => match message {
                    Ok(message) => Happened::Message(message),
                    Err(status) => Happened::StreamEnded(status),
                },
                Some(ran) = self.running.join_next() => Happened::ToolEnded(ran),
                () = sleep_until(alarm.unwrap_or(self.began)), if alarm.is_some() => Happened::TimeUp,
            };
            let ended = match happened {
                Happened::Interrupted => {
                    interrupted = true;
                    self.on_interrupt().await
                }
                Happened::Message(message) => self.on_message(message).await?,
                Happened::StreamEnded(status) => self.on_stream_ended(status)?,
                Happened::ToolEnded(Ok(ran)) => {
                    self.on_tool_ended(ran)?;
                    None
                }
                Happened::ToolEnded(Err(_)) => return Err(AgentError::Tool),
                Happened::TimeUp => match self.phase {
                    Phase::Cancelling { .. } => Some(Outcome::Interrupted),
                    Phase::Sampling | Phase::Collecting { .. } | Phase::Finishing(_) => {
                        self.wait_until = None;
                        None
                    }
                },
            };
            if let Some(outcome) = ended {
                break outcome;
            }
        };
        // What still runs is of no use to anybody now; a command dies with its task.
        self.running.shutdown().await;
        if let Some(link) = self.link.take() {
            link.close().await;
        }
        self.times.wall = self.began.elapsed();
        let summary = Summary {
            outcome,
            steps: self.steps,
            tool_calls: self.tool_calls,
            tokens: self.tokens,
            times: self.times,
        };
        self.screen.summary(&summary)?;
        Ok(summary)
    }

    fn alarm(&self) -> Option<Instant> {
        match self.phase {
            Phase::Cancelling { until, .. } => Some(until),
            Phase::Sampling | Phase::Collecting { .. } | Phase::Finishing(_) => self.wait_until,
        }
    }

    /// Sends whatever can be sent in this state. Called after everything that happens, so that no
    /// event has to know what becomes possible through it.
    ///
    /// # Cancellation
    ///
    /// Dropped only to end the rollout: what it was sending is lost then.
    async fn send_what_is_due(&mut self) -> Result<Option<Outcome>, AgentError> {
        let collecting = match self.phase {
            Phase::Sampling => false,
            Phase::Collecting { .. } => true,
            Phase::Finishing(_) | Phase::Cancelling { .. } => return Ok(None),
        };
        if self.wait_until.is_some() {
            return Ok(None);
        }
        if collecting && self.steps >= self.plan.steps_max {
            return match &self.open {
                Some(open) => {
                    let response_id = open.id.clone();
                    self.phase = Phase::Finishing(Then::Stop);
                    self.send(Command::Done(Finish { response_id })).await;
                    Ok(None)
                }
                None => Ok(Some(Outcome::StepsMax)),
            };
        }
        if collecting && self.open.is_none() && self.due.is_none() {
            self.due = Some(Start::Continue);
        }
        if let Some(start) = self.due {
            // Every call needs its output before the model samples again.
            if self.running.is_empty() {
                self.due = None;
                self.begin(start).await?;
            }
            return Ok(None);
        }
        match self.plan.style {
            Style::Chained => {}
            Style::Held => self.append_or_move(collecting).await,
        }
        Ok(None)
    }

    /// Sends the outputs that are there to the held response, or finalises it where the stream
    /// will be closed.
    async fn append_or_move(&mut self, collecting: bool) {
        let Some(open) = &self.open else { return };
        let response_id = open.id.clone();
        // The output of the last call starts the next sample, which must not be one too many.
        let may_go_on = collecting || self.steps + 1 < self.plan.steps_max;
        if self.leaving.is_none() && may_go_on {
            for item in std::mem::take(&mut self.unsent) {
                let command = Command::Append(Append {
                    response_id: response_id.clone(),
                    input: vec![item.clone()],
                });
                let request_id = self.send(command).await;
                self.unaccepted.push((request_id, item));
            }
        }
        if !collecting {
            return;
        }
        if self.running.is_empty() && self.unsent.is_empty() {
            self.settle();
            self.sample();
        } else if self.leaving.is_some() {
            // An output is missing, so the response cannot go on before it is finalised.
            self.phase = Phase::Finishing(Then::Move);
            self.send(Command::Done(Finish { response_id })).await;
        }
    }

    /// Sends a create, on a new stream where there is none or the old one will be closed.
    async fn begin(&mut self, start: Start) -> Result<(), AgentError> {
        let start = match self.leaving {
            Some(Resumable(false)) => Start::Whole,
            Some(Resumable(true)) | None => start,
        };
        let create = match start {
            Start::Again => self.last.1.clone(),
            Start::Continue => self.continuation(),
            Start::Whole => self.whole(),
        };
        if self.leaving.take().is_some() {
            self.screen.note("moving to a new stream")?;
            if let Some(link) = self.link.take() {
                link.close().await;
            }
        }
        self.sample();
        // Kept before anything can fail, so that it can be sent again.
        self.last = (String::new(), create.clone());
        if self.link.is_none() {
            match self.door.connect().await {
                Ok(channel) => {
                    if self.requests == 0 {
                        self.meet_the_model(channel.clone()).await?;
                    }
                    self.link = Some(self.door.stream(channel));
                }
                // Nobody was ever there: that is for the person to mend.
                Err(status) if self.steps == 0 && self.losses == 0 => {
                    return Err(self.door.unreachable(&status));
                }
                Err(status) => return self.lose(&status),
            }
        }
        self.last.0 = self.send(Command::Create(create)).await;
        Ok(())
    }

    /// Says who answers, and fits the outputs of the tools to its context: a quarter of it for one
    /// output, or less, at two bytes a token.
    async fn meet_the_model(&mut self, channel: Channel) -> Result<(), AgentError> {
        let name = self.plan.model.as_deref();
        if let Some(model) = self.door.model(channel, name).await {
            self.screen.model(&model)?;
            if !self.plan.output_bytes_told {
                let bytes_max = (model.context_length / 2).max(OUTPUT_BYTES_MIN);
                self.toolbox.shorten_outputs(bytes_max as usize);
            }
        }
        Ok(())
    }

    /// The create that brings the server the outputs it does not have. Settings are inherited.
    fn continuation(&mut self) -> Create {
        self.settle();
        let unaccepted = std::mem::take(&mut self.unaccepted);
        let mut input: Vec<Item> = unaccepted.into_iter().map(|(_, item)| item).collect();
        input.append(&mut self.unsent);
        Create {
            previous_response_id: self.parent.clone().unwrap_or_default(),
            input,
            hold: self.plan.style == Style::Held,
            ..Create::default()
        }
    }

    /// The create that a server needs which knows nothing.
    fn whole(&mut self) -> Create {
        self.settle();
        // All outputs are in the history now.
        self.unaccepted.clear();
        self.unsent.clear();
        Create {
            input: self.history.clone(),
            model: self.plan.model.clone(),
            instructions: Some(
                self.plan
                    .instructions
                    .clone()
                    .unwrap_or_else(|| INSTRUCTIONS.to_owned()),
            ),
            tools: self.toolbox.definitions(),
            hold: self.plan.style == Style::Held,
            ..Create::default()
        }
    }

    async fn on_interrupt(&mut self) -> Option<Outcome> {
        let waits = self.wait_until.is_some() || self.due.is_some();
        let in_flight = match self.phase {
            Phase::Sampling => !waits,
            Phase::Collecting { .. } => self.open.is_some(),
            Phase::Finishing(_) | Phase::Cancelling { .. } => true,
        };
        if !in_flight || self.link.is_none() {
            return Some(Outcome::Interrupted);
        }
        // Nobody waits for the tools any more; a command dies with its task.
        self.running.shutdown().await;
        let until = Instant::now() + CANCEL_TIME_MAX;
        self.phase = Phase::Cancelling { sent: false, until };
        self.cancel().await;
        None
    }

    /// Cancels the response, once its id is known.
    async fn cancel(&mut self) {
        if let Phase::Cancelling { sent: false, until } = self.phase
            && let Some(open) = &self.open
        {
            let response_id = open.id.clone();
            self.phase = Phase::Cancelling { sent: true, until };
            self.send(Command::Cancel(Cancel {
                response_id,
                ..Cancel::default()
            }))
            .await;
        }
    }

    async fn on_message(
        &mut self,
        message: ConnectResponse,
    ) -> Result<Option<Outcome>, AgentError> {
        let ConnectResponse {
            response_id,
            request_id,
            event,
            ..
        } = message;
        let ours = self
            .open
            .as_ref()
            .is_some_and(|open| open.id == response_id);
        match event {
            Some(Event::Created(_)) => {
                if request_id == self.last.0 {
                    self.open = Some(Open {
                        id: response_id,
                        has_items: false,
                        used: Usage::default(),
                    });
                    self.cancel().await;
                }
            }
            Some(Event::Appended(_)) => self.unaccepted.retain(|(id, _)| *id != request_id),
            Some(Event::OutputTextDelta(delta)) if ours => self.screen.answer(&delta.delta)?,
            Some(Event::ReasoningTextDelta(delta)) if ours => {
                self.screen.reasoning(&delta.delta)?;
            }
            Some(Event::OutputItemDone(done)) if ours => {
                self.on_item(done.item.unwrap_or_default());
            }
            Some(Event::Done(done)) if ours => return self.on_done(*done),
            Some(Event::Error(error)) => return self.on_error(&request_id, *error),
            Some(Event::SafetyVerdict(verdict)) if ours => {
                let rule = &verdict.rule;
                self.screen
                    .note(&format!("the server's rule {rule} has found something"))?;
            }
            Some(Event::GoAway(go_away)) => {
                self.screen.note(&format!(
                    "the server will close the stream in {:.1} s ({})",
                    f64::from(go_away.time_left_ms) / 1e3,
                    go_away.reason
                ))?;
                self.leaving = Some(Resumable(go_away.resumable));
            }
            // The start of an item and a call's arguments on their way are nothing to act on; the
            // rest is of a response that is over, or of a server newer than this client.
            Some(
                Event::OutputItemAdded(_)
                | Event::FunctionCallArgumentsDelta(_)
                | Event::OutputTextDelta(_)
                | Event::ReasoningTextDelta(_)
                | Event::OutputItemDone(_)
                | Event::SafetyVerdict(_)
                | Event::Done(_),
            )
            | None => {}
        }
        Ok(None)
    }

    /// An output item is whole: a call starts to run at once.
    fn on_item(&mut self, item: Item) {
        let call = match &item.item {
            Some(item::Item::FunctionCall(call)) => Some(Call {
                id: call.call_id.clone(),
                name: call.name.clone(),
                arguments: call.arguments.clone(),
                kind: CallKind::Function,
            }),
            Some(item::Item::CustomToolCall(call)) => Some(Call {
                id: call.call_id.clone(),
                name: call.name.clone(),
                arguments: call.input.clone(),
                kind: CallKind::Custom,
            }),
            Some(
                item::Item::Message(_)
                | item::Item::FunctionCallOutput(_)
                | item::Item::Reasoning(_)
                | item::Item::CustomToolCallOutput(_)
                | item::Item::ItemReference(_)
                | item::Item::Compaction(_)
                | item::Item::UserText(_),
            )
            | None => None,
        };
        // What began like a call and is none: what was written of it comes as text.
        if call.is_some() && item.status() == ItemStatus::Incomplete {
            return;
        }
        self.round.items.push(item);
        if let Some(open) = &mut self.open {
            open.has_items = true;
        }
        // A call of a response that was told to end is nobody's any more.
        let (Some(call), Phase::Sampling) = (call, self.phase) else {
            return;
        };
        self.round.calls.push((call.id.clone(), None));
        let toolbox = self.toolbox.clone();
        let slots = Arc::clone(&self.slots);
        self.running.spawn(async move {
            // The semaphore is never closed, so there is no other way out of the wait.
            let _slot = slots.acquire_owned().await;
            let began = Instant::now();
            let answer = toolbox.call(&call.name, &call.arguments).await;
            Ran {
                call,
                answer,
                took: began.elapsed(),
            }
        });
    }

    fn on_tool_ended(&mut self, ran: Ran) -> Result<(), AgentError> {
        let Ran { call, answer, took } = ran;
        self.screen.call(screen::Call {
            name: &call.name,
            arguments: &call.arguments,
            took,
            output_bytes: answer.text.len(),
            failed: answer.failed,
        })?;
        self.tool_calls += 1;
        let (call_id, output) = (call.id, answer.text);
        let item = Item {
            item: Some(match call.kind {
                CallKind::Function => item::Item::FunctionCallOutput(FunctionCallOutput {
                    call_id: call_id.clone(),
                    output,
                }),
                CallKind::Custom => item::Item::CustomToolCallOutput(CustomToolCallOutput {
                    call_id: call_id.clone(),
                    output,
                }),
            }),
            ..Item::default()
        };
        let slot = self.round.calls.iter_mut().find(|(id, _)| *id == call_id);
        if let Some((_, output)) = slot {
            *output = Some(item.clone());
        }
        self.unsent.push(item);
        Ok(())
    }

    fn on_done(&mut self, done: Done) -> Result<Option<Outcome>, AgentError> {
        let status = done.status();
        if matches!(
            status,
            ResponseStatus::AwaitingInput | ResponseStatus::Completed
        ) {
            self.retries = 0;
            self.losses = 0;
        }
        self.account(&done)?;
        let calls = &self.round.calls;
        let known = |open: &String| calls.iter().any(|(id, _)| id == open);
        if status == ResponseStatus::AwaitingInput && !done.call_ids.iter().all(known) {
            return Err(AgentError::Protocol(
                "it waits for a call that it never sent",
            ));
        }
        // Not whether it called: a held response may have all outputs already and have gone on.
        let unanswered = !self.running.is_empty() || !self.unsent.is_empty();
        match (self.phase, status) {
            (Phase::Cancelling { .. }, _) => Ok(Some(Outcome::Interrupted)),
            (_, ResponseStatus::Unspecified) => Err(AgentError::Protocol("a done has no status")),
            (_, ResponseStatus::Cancelled) => {
                Err(AgentError::Protocol("it cancelled a response by itself"))
            }
            (_, ResponseStatus::Failed) => self.on_failed(done),
            // A `done` that was already on its way when the response was finalised: the
            // next one ends it.
            (Phase::Finishing(_), ResponseStatus::AwaitingInput | ResponseStatus::InProgress) => {
                Ok(None)
            }
            (Phase::Finishing(Then::Stop), _) => {
                self.close_response();
                Ok(Some(Outcome::StepsMax))
            }
            (Phase::Finishing(Then::Move), _) => {
                self.close_response();
                self.collect();
                self.due = Some(Start::Continue);
                Ok(None)
            }
            (
                Phase::Sampling | Phase::Collecting { .. },
                ResponseStatus::AwaitingInput | ResponseStatus::InProgress,
            ) => {
                self.collect();
                Ok(None)
            }
            (Phase::Sampling | Phase::Collecting { .. }, ResponseStatus::Completed) => {
                self.close_response();
                if !unanswered {
                    return Ok(Some(Outcome::Completed));
                }
                self.collect();
                Ok(None)
            }
            (Phase::Sampling | Phase::Collecting { .. }, ResponseStatus::Incomplete) => {
                self.close_response();
                match done.incomplete_reason() {
                    IncompleteReason::ContentFilter => Ok(Some(Outcome::Filtered)),
                    IncompleteReason::MaxOutputTokens | IncompleteReason::Budget => {
                        Ok(Some(Outcome::CutShort))
                    }
                    // A tool took longer than the server holds a response, or the server stops.
                    IncompleteReason::Interrupted | IncompleteReason::Unspecified => {
                        self.retry_later(&Error {
                            code: "interrupted".to_owned(),
                            message: "the server ended the response early".to_owned(),
                            ..Error::default()
                        })?;
                        self.collect();
                        self.due = Some(Start::Continue);
                        Ok(None)
                    }
                }
            }
        }
    }

    /// The model samples from here on: what went before was waiting for tools.
    fn sample(&mut self) {
        if let Phase::Collecting { since } = self.phase {
            self.times.tools += since.elapsed();
        }
        self.phase = Phase::Sampling;
    }

    /// The sample is over: outputs are collected, and what they need is sent when it is due.
    fn collect(&mut self) {
        if !matches!(self.phase, Phase::Collecting { .. }) {
            self.phase = Phase::Collecting {
                since: Instant::now(),
            };
        }
    }

    /// The response in progress has ended, and can be continued.
    fn close_response(&mut self) {
        if let Some(open) = self.open.take() {
            self.parent = Some(open.id);
        }
    }

    /// Moves the round into the history: items in the order of the output, then the outputs of
    /// the calls in the order of the calls.
    fn settle(&mut self) {
        let Round { items, calls } = std::mem::take(&mut self.round);
        self.history.extend(items);
        self.history
            .extend(calls.into_iter().filter_map(|(_, output)| output));
    }

    /// Adds up what a round used, and shows it.
    fn account(&mut self, done: &Done) -> Result<(), AgentError> {
        let usage = done.usage.unwrap_or_default();
        // The usage is that of the whole response so far.
        let before = match &mut self.open {
            Some(open) => std::mem::replace(&mut open.used, usage),
            None => Usage::default(),
        };
        let new = |now: u32, before: u32| now.saturating_sub(before);
        let samples = new(usage.samples, before.samples);
        let sampled = new(usage.output_tokens, before.output_tokens);
        self.tokens.input += u64::from(new(usage.input_tokens, before.input_tokens));
        self.tokens.cached += u64::from(new(usage.cached_tokens, before.cached_tokens));
        self.tokens.output += u64::from(sampled);
        self.tokens.reasoning += u64::from(new(usage.reasoning_tokens, before.reasoning_tokens));
        if samples == 0 {
            // A response that was finalised, cancelled or failed before it sampled.
            return Ok(());
        }
        let earlier: u32 = done.earlier_samples.iter().map(|it| it.output_tokens).sum();
        let last = SampleReport {
            prompt: done.prompt.clone(),
            timing: done.timing,
            output_tokens: sampled.saturating_sub(earlier),
        };
        // Only so many earlier samples are told of.
        let told = 1 + done.earlier_samples.len();
        let untold = samples.saturating_sub(u32::try_from(told).unwrap_or(u32::MAX));
        self.steps += untold;
        for sample in done.earlier_samples.iter().chain([&last]) {
            self.steps += 1;
            self.account_sample(sample)?;
        }
        Ok(())
    }

    fn account_sample(&mut self, sample: &SampleReport) -> Result<(), AgentError> {
        let prompt = sample.prompt.clone().unwrap_or_default();
        let timing = sample.timing.unwrap_or_default();
        self.tokens.reused += u64::from(prompt.reused_tokens);
        self.tokens.encoded += u64::from(prompt.encoded_tokens);
        let model_us = timing.last_token_us.saturating_sub(timing.dispatched_us);
        let whole_us = timing.done_us.max(timing.last_token_us);
        self.times.model += Duration::from_micros(model_us.into());
        self.times.hotloop += Duration::from_micros(whole_us.saturating_sub(model_us).into());
        self.screen.round(screen::Round {
            step: self.steps,
            timing: &timing,
            prompt: &prompt,
            sampled: sample.output_tokens,
        })?;
        Ok(())
    }

    /// Sends a command on the open stream, and tells the id it went out with.
    async fn send(&mut self, command: Command) -> String {
        let request_id = self.request_id();
        if let Some(link) = &self.link {
            link.send(request_id.clone(), command).await;
        }
        request_id
    }

    fn request_id(&mut self) -> String {
        self.requests += 1;
        format!("r{}", self.requests)
    }
}

/// The next message of the stream, where there is one.
async fn next(link: &mut Option<Link>) -> Result<ConnectResponse, Option<Status>> {
    match link {
        Some(link) => link.next().await,
        None => std::future::pending().await,
    }
}
