//! One response in progress: a state machine without time or channels.
//!
//! ```text
//!            ┌──────────────── input has come ────────────────┐
//!            ▼                                                │
//!   begin ─ prompt ─ sampling ─ round ends ─┬─ calls open, held ─ awaiting input
//!                                           ├─ calls open, or none ─ finished
//!                                           └─ input came meanwhile ─ prompt
//! ```
//!
//! The response owns what it staged; nothing of it is on the ledger for others before
//! [`Open::commit`], and dropping it leaves no trace.

mod constraint;
mod early;
mod judged;
mod prepared;
mod round;

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use crate::{
    backend::{Chat, ChatMessage, Chunk, Prompt, SampleEnd, Sampling},
    event::{
        Code, Done, Error, Event, Finish, IncompleteReason, PromptReport, RerenderReason,
        SampleReport, Status, Timing, Usage, Verdict,
    },
    item::{Body, Item, ItemId, Part, ResponseId, Role, Tenant},
    ledger::Rope,
    model::{Artifacts, Model},
    parse::Grammar,
    render::{
        self, CachedHead, Entries, Entry, Head, Heads, Past, Resume, Seen, Speaker, Tail, Visible,
    },
    request::{NewItem, OpenCall, Settings, Truncation, ValidItem, validate_append},
    safety::{self, Checked, Cleared, History, Masked, Names, Policy, Recheck},
    session::{Committed, Held, Storing, View},
};

pub use judged::{Before, Began, Piece};
use round::Round;

/// How much of a prompt's end tells whether it has opened the model's reasoning, in bytes.
const ROUND_TAIL_BYTES: usize = 64;

/// About what templates write around a message, in bytes.
const MESSAGE_BYTES: usize = 48;

/// What a response begins with.
pub struct Begin {
    /// Its id.
    pub id: ResponseId,
    /// Whose it is.
    pub tenant: Tenant,
    /// The model.
    pub model: Arc<Model>,
    /// The settings in force.
    pub settings: Arc<Settings>,
    /// What it continues.
    pub parent: Option<Arc<Committed>>,
    /// The date, for a conversation that begins.
    pub today: jiff::civil::Date,
    /// What is new.
    pub input: Cleared,
    /// Calls that are open once the input is in.
    pub open_calls: Vec<OpenCall>,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// What the create carried.
    pub metadata: BTreeMap<String, String>,
    /// Whether `done` repeats the output.
    pub include_output: bool,
    /// Whether it stays open after calls.
    pub hold: bool,
    /// Whether whole items are sent only.
    pub no_deltas: bool,
    /// What its items are checked under. `None`: nothing is checked.
    pub policy: Option<Arc<Policy>>,
    /// How what it continues is checked.
    pub recheck: Recheck,
}

/// A response in progress.
pub struct Open {
    id: ResponseId,
    tenant: Tenant,
    model: Arc<Model>,
    settings: Arc<Settings>,
    head: Arc<Head>,
    parent: Option<Arc<Committed>>,
    created_at_ms: u64,
    metadata: BTreeMap<String, String>,
    include_output: bool,
    then: Then,
    no_deltas: bool,

    /// Admitted input that no prompt holds yet.
    staged: Vec<ValidItem>,
    /// Messages that steer: they follow the outputs of the open calls.
    steering: Vec<ValidItem>,
    open_calls: Vec<OpenCall>,
    /// What the conversation has got in this response: the input of each command and the output
    /// of each sample, in order.
    batches: Vec<Vec<ValidItem>>,
    /// The first of them as messages for engines that read messages, where one was asked.
    chat: Vec<Vec<ChatMessage>>,
    /// All messages of the conversation.
    entries: Entries,
    visible: Visible,
    /// Where the rendering of the last prompt may be gone on with.
    resume: Option<Resume>,
    /// The last prompt and, once its sample has ended, that sample.
    rope: Rope,
    prompt_tokens: usize,
    prompt_entries: usize,
    /// What the sample that follows the last prompt keeps to.
    grammar: Option<Arc<Grammar>>,
    /// Why the next prompt may not extend the last one, where that is known beforehand.
    rerender: Option<RerenderReason>,
    /// What was rendered of early input.
    ahead: Option<Tail>,
    head_tokens: HeadTokens,

    input: Vec<Arc<Item>>,
    output: Vec<Arc<Item>>,
    /// How many output items there were when the client was last told how the response stands.
    output_told: usize,
    /// The position that the next output item gets.
    output_index: u32,
    usage: Usage,
    /// Calls that its samples made, answered or not.
    calls_made: u64,
    /// Tokens of its prompts that were there before: on the ledger, or in the cache of heads.
    reused_tokens: u64,
    /// Tokens that were sampled before the sample in progress, or the last one.
    sampled_before: u32,
    report: PromptReport,
    finish: Option<Finish>,
    /// Tokens that budgets leave for the next sample.
    afforded: Option<u32>,
    round: Option<Round>,
    policy: Option<Arc<Policy>>,
    checked: Checked,
    /// What was found in input and was not told yet.
    verdicts: Vec<Verdict>,
    /// No classifier was asked about the past under this policy.
    past_unasked: bool,
}

/// What becomes of a response when a sample has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It goes on where input has come, and waits for the outputs of open calls.
    Hold,
    /// It goes on where input has come, and ends with open calls.
    GoOn,
    /// It ends as it stands.
    End,
}

fn too_long(tokens: usize, limit: usize) -> Error {
    Error::new(
        Code::ContextLengthExceeded,
        format!(
            "the prompt has {tokens} tokens, {} more than leave room to sample in the model's {limit}",
            tokens - limit + 1
        ),
    )
}

/// The head's part in the report of a new conversation's first prompt.
#[derive(Clone, Copy)]
enum HeadTokens {
    Cached,
    Encoded(usize),
    /// The first prompt under another model: so many tokens were there under the one before, and so
    /// many were encoded for the head.
    OtherModel {
        dropped: usize,
        encoded: usize,
    },
    /// Not the first prompt of a new conversation.
    Past,
}

/// What comes after a round, or after input to a held response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// All input for the next sample is there.
    Sample,
    /// Outputs of calls are missing, and the response is held for them.
    Await,
    /// The response ends with this status.
    Finish(End),
}

/// How a response ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Well.
    Completed,
    /// Early.
    Incomplete(IncompleteReason),
}

impl From<End> for Status {
    fn from(end: End) -> Self {
        match end {
            End::Completed => Self::Completed,
            End::Incomplete(reason) => Self::Incomplete(reason),
        }
    }
}

/// Why a sample is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoundEnd {
    /// The model ended it, a stop text appeared, or enough calls were made.
    Stop,
    /// A limit of tokens was reached.
    Length,
    /// An item is whole and input waits for just that.
    Boundary,
    /// The engine's own monitor ended it.
    Filtered,
    /// A budget is spent.
    Spent,
    /// The client or the server went away.
    Interrupted,
}

/// All messages of a conversation for this text side: of what is continued, and behind it.
fn all_entries(
    parent: Option<&Committed>,
    behind: &[Vec<ValidItem>],
    (artifacts, masked): (&Artifacts, &Masked),
) -> Entries {
    let nodes: Vec<&Committed> = parent.into_iter().flat_map(Committed::chain).collect();
    let past = nodes.iter().rev().flat_map(|node| &node.batches);
    past.chain(behind)
        .flat_map(|batch| render::entries(&masked.apply(batch), artifacts))
        .collect()
}

impl Open {
    /// A response with its first prompt: everything but the sampling.
    ///
    /// # Errors
    ///
    /// `context_length_exceeded`, or `invalid_request` where the template refuses.
    pub fn begin(begin: Begin, heads: &Heads, prepare_only: bool) -> Result<Self, Error> {
        let artifacts = &begin.model.artifacts;
        let parent = begin.parent.as_deref();
        let head = match parent.map(|parent| (parent, parent.view_under(artifacts))) {
            Some((parent, Some(view))) if begin.settings.renders_like(&parent.settings) => {
                // Its tokens are on the parent's rope.
                let cached = CachedHead {
                    head: view.head.clone(),
                    rope: Rope::default(),
                };
                (cached, true)
            }
            Some(_) | None => {
                let date = parent.map_or(begin.today, |parent| parent.date);
                heads.get(&begin.tenant, artifacts, &begin.settings, date)?
            }
        };
        let mut open = Self::new(begin, head);
        open.prepare(!prepare_only)?;
        Ok(open)
    }

    /// A response that has its input and no prompt yet. With the head comes whether the cache had it.
    fn new(begin: Begin, (cached, head_hit): (CachedHead, bool)) -> Self {
        let Begin {
            id,
            tenant,
            model,
            settings,
            parent,
            today: _,
            input,
            open_calls,
            created_at_ms,
            metadata,
            include_output,
            hold,
            no_deltas,
            policy,
            recheck,
        } = begin;
        let artifacts = &model.artifacts;
        let mut entries = Entries::new_sync();
        let mut resume = None;
        let mut visible = Visible::default();
        let mut rope = cached.rope.clone();
        let mut rerender = None;
        let mut head_tokens = HeadTokens::Past;
        let before = parent
            .as_deref()
            .map(|parent| (parent, parent.view_under(artifacts)));
        match before {
            None if head_hit => head_tokens = HeadTokens::Cached,
            None => head_tokens = HeadTokens::Encoded(cached.rope.len_tokens()),
            Some((parent, Some(view))) => {
                rope = parent.rope.clone();
                visible = view.visible;
                if recheck.masks {
                    rerender = Some(RerenderReason::Settings);
                    let text_side = (&**artifacts, &recheck.checked.masked);
                    entries = all_entries(Some(parent), &[], text_side);
                } else {
                    entries = view.entries.clone();
                    resume = view.resume.clone();
                }
                if !settings.renders_like(&parent.settings) {
                    rerender = Some(RerenderReason::Settings);
                }
            }
            Some((parent, None)) => {
                // Another tokenizer has other literals to mark and other tokens: the messages are
                // made anew. Their positions may differ: it sees all of them, and truncates anew.
                rerender = Some(RerenderReason::Model);
                entries = all_entries(Some(parent), &[], (artifacts, &recheck.checked.masked));
                head_tokens = HeadTokens::OtherModel {
                    dropped: parent.rope.len_tokens(),
                    encoded: if head_hit { 0 } else { rope.len_tokens() },
                };
                // It may have room for more: it sees all that no summary stands for, and truncates anew.
                visible = Visible::from_summary(&entries);
            }
        }
        let (mut staged, found) = input.into_parts();
        let verdicts = [recheck.verdicts, found].concat();
        let mut steering = Vec::new();
        if let Some(parent) = &parent {
            // Messages that steered too late stand right behind the outputs that they waited for.
            let outputs = staged
                .iter()
                .take_while(|new| new.answers.is_some())
                .count();
            staged.splice(outputs..outputs, parent.pending.iter().cloned());
            if parent
                .open_calls
                .iter()
                .any(|call| open_calls.contains(call))
            {
                // Calls of the past are still open, which only a warm-up may leave so: messages wait on.
                (steering, staged) = staged
                    .into_iter()
                    .partition(|new| matches!(new.item.body, Body::Message { .. }));
            }
        }
        Self {
            id,
            tenant,
            head: cached.head,
            settings,
            created_at_ms,
            metadata,
            include_output,
            then: if hold { Then::Hold } else { Then::GoOn },
            no_deltas,
            staged,
            steering,
            open_calls,
            batches: Vec::new(),
            chat: Vec::new(),
            entries,
            visible,
            resume,
            rope,
            prompt_tokens: 0,
            prompt_entries: 0,
            grammar: None,
            rerender,
            ahead: None,
            head_tokens,
            input: Vec::new(),
            output: Vec::new(),
            output_told: 0,
            output_index: 0,
            usage: Usage::default(),
            calls_made: 0,
            reused_tokens: 0,
            sampled_before: 0,
            report: PromptReport::default(),
            finish: None,
            afforded: None,
            round: None,
            policy,
            past_unasked: recheck.again && parent.is_some(),
            checked: recheck.checked,
            verdicts,
            parent,
            model,
        }
    }

    /// The model that serves it.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Calls without an output.
    #[must_use]
    pub fn open_calls(&self) -> &[OpenCall] {
        &self.open_calls
    }

    /// Whether something of it was handed out whole.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// What was found in input since this was last asked.
    pub fn take_verdicts(&mut self) -> impl Iterator<Item = Event> {
        let verdicts = std::mem::take(&mut self.verdicts).into_iter();
        verdicts.map(|it| {
            safety::log(&it);
            Event::Verdict(Box::new(it))
        })
    }

    /// What it used so far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Calls that its samples made so far, answered or not.
    #[must_use]
    pub fn calls_made(&self) -> u64 {
        self.calls_made
    }

    /// Tokens of its prompts that were there before.
    #[must_use]
    pub fn reused_tokens(&self) -> u64 {
        self.reused_tokens
    }

    /// Nobody can answer calls any more: it no longer stays open after them.
    pub fn release(&mut self) {
        if self.then == Then::Hold {
            self.then = Then::GoOn;
        }
    }

    /// The client wants its end: at once, or with the sample that runs. Input that has come is kept.
    pub fn end_as_it_stands(&mut self) {
        self.then = Then::End;
    }

    /// Another model takes over, where nothing was sampled for the prompt that was prepared last. With
    /// the same text side the prompt stays as it is; with another one it is rendered anew.
    ///
    /// # Errors
    ///
    /// What the other model cannot do of what is asked for, `content_policy_violation` under its policy,
    /// or `context_length_exceeded`. Then nothing more can be done with the response but to end it.
    pub fn hand_over(
        &mut self,
        (model, policy): (Arc<Model>, Option<Arc<Policy>>),
        heads: &Heads,
    ) -> Result<(), Error> {
        self.settings.check(&model.abilities())?;
        let masks = self.check_under(policy)?;
        self.unbegin_round();
        let same = self.model.artifacts.fingerprint == model.artifacts.fingerprint;
        self.model = model;
        if same && !masks {
            let (tokens, limit) = (self.prompt_tokens, self.model.tokens_max() as usize);
            if tokens >= limit {
                return Err(too_long(tokens, limit));
            }
            return self.constrain();
        }
        let artifacts = self.model.artifacts.clone();
        let (settings, date) = (self.settings.clone(), self.head.date());
        let (cached, hit) = heads.get(&self.tenant, &artifacts, &settings, date)?;
        self.head_tokens = HeadTokens::OtherModel {
            dropped: self.rope.len_tokens(),
            encoded: if hit { 0 } else { cached.rope.len_tokens() },
        };
        self.head = cached.head;
        self.rope = cached.rope;
        let text_side = (&*artifacts, &self.checked.masked);
        self.entries = all_entries(self.parent.as_deref(), &self.batches, text_side);
        self.visible = Visible::from_summary(&self.entries);
        self.resume = None;
        self.ahead = None;
        self.rerender = Some(RerenderReason::Model);
        self.prepare(true)
    }

    /// The sample was not begun after all: it is not counted.
    pub fn unbegin_round(&mut self) {
        if self.round.take().is_some() {
            self.usage.samples -= 1;
            self.usage.input_tokens -= self.report.tokens;
            self.reused_tokens -= self.report.had_before();
        }
    }

    /// From here on this policy holds. Says whether something is redacted now that was not.
    fn check_under(&mut self, policy: Option<Arc<Policy>>) -> Result<bool, Error> {
        let recheck = {
            let nodes: Vec<&Committed> = self.parent.iter().flat_map(|it| it.chain()).collect();
            let past = nodes.iter().rev().flat_map(|node| &node.batches);
            // Items that wait for a prompt were checked when they came, and are again.
            let waiting = [&self.staged, &self.steering];
            let mut items = past.chain(&self.batches).chain(waiting).flatten();
            let history = History {
                checked: &self.checked,
                items: &mut items,
            };
            safety::recheck(history, policy.as_deref())?
        };
        self.staged = recheck.checked.masked.apply(&self.staged);
        self.steering = recheck.checked.masked.apply(&self.steering);
        self.checked = recheck.checked;
        self.verdicts.extend(recheck.verdicts);
        self.past_unasked = recheck.again;
        self.policy = policy;
        Ok(recheck.masks)
    }

    /// Whether input waits for the end of an item, so that the sample ends there.
    fn steered(&self) -> bool {
        self.then != Then::End && !self.steering.is_empty() && self.open_calls.is_empty()
    }

    /// Takes a chunk of the sample, and adds the events that it gives. `Some` when the sample is over.
    ///
    /// # Errors
    ///
    /// `backend_error` when the chunk holds a token that the vocabulary does not know.
    pub fn chunk(
        &mut self,
        chunk: Chunk,
        events: &mut Vec<Event>,
    ) -> Result<Option<RoundEnd>, Error> {
        let Some(mut round) = self.round.take() else {
            return Ok(Some(RoundEnd::Stop));
        };
        self.usage.cached_tokens += chunk.cached_tokens.unwrap_or(0);
        let mut logprobs = chunk.logprobs.into_iter();
        let mut end = None;
        for id in chunk.tokens {
            self.usage.output_tokens += 1;
            end = round.token(id, logprobs.next(), self, events)?;
            if end.is_some() {
                break;
            }
        }
        if let Some(told) = chunk.told {
            if let Some(counted) = told.usage {
                // The engine's own rendering counts, not ours.
                self.usage.input_tokens += counted.input;
                self.usage.input_tokens -= self.report.tokens.min(self.usage.input_tokens);
                self.usage.output_tokens += counted.output;
                self.usage.reasoning_tokens += counted.reasoning;
            }
            for parsed in told.parsed {
                if end.is_none() {
                    end = round.told(parsed, self, events);
                }
            }
        }
        self.usage.reasoning_tokens += round.take_reasoning_tokens();
        self.round = Some(round);
        Ok(end.or_else(|| {
            chunk.finish.map(|finish| match finish {
                SampleEnd::Stop => RoundEnd::Stop,
                SampleEnd::Length => RoundEnd::Length,
                SampleEnd::ContentFilter => RoundEnd::Filtered,
            })
        }))
    }

    /// No more of the sample comes: what is held back of it is let go, the item in progress is closed. Says
    /// how it ended after all.
    pub fn close_round(&mut self, end: RoundEnd, events: &mut Vec<Event>) -> RoundEnd {
        let Some(mut round) = self.round.take() else {
            return end;
        };
        let end = round.finish(end, self, events);
        self.round = Some(round);
        end
    }

    /// Ends the sample: its tokens go behind the prompt exactly as they were sampled, its items
    /// behind the conversation.
    pub fn end_round(&mut self, end: RoundEnd, events: &mut Vec<Event>) -> Next {
        let end = self.close_round(end, events);
        let Some(round) = self.round.take() else {
            return Next::Finish(End::Completed);
        };
        let (draft, outputs, output_index) = round.into_parts();
        self.afforded = None;
        self.output_index = output_index;
        self.rope = self.rope.with_sampled(draft);
        let called = outputs.iter().any(|new| new.item.call().is_some());
        if !outputs.is_empty() {
            self.output
                .extend(outputs.iter().map(|new| new.item.clone()));
            self.admit(outputs);
        }
        self.finish = match end {
            RoundEnd::Stop | RoundEnd::Boundary if called => Some(Finish::ToolCalls),
            RoundEnd::Stop | RoundEnd::Boundary => Some(Finish::Stop),
            RoundEnd::Length => Some(Finish::Length),
            RoundEnd::Filtered => Some(Finish::ContentFilter),
            RoundEnd::Spent | RoundEnd::Interrupted => None,
        };
        match end {
            RoundEnd::Length => Next::Finish(End::Incomplete(IncompleteReason::MaxOutputTokens)),
            RoundEnd::Filtered => Next::Finish(End::Incomplete(IncompleteReason::ContentFilter)),
            RoundEnd::Spent => Next::Finish(End::Incomplete(IncompleteReason::Budget)),
            RoundEnd::Interrupted => Next::Finish(End::Incomplete(IncompleteReason::Interrupted)),
            RoundEnd::Stop | RoundEnd::Boundary => self.next(),
        }
    }

    /// What comes next, when nothing is sampled.
    #[must_use]
    pub fn next(&self) -> Next {
        let input = !self.staged.is_empty() || !self.steering.is_empty();
        match (self.then, self.open_calls.is_empty()) {
            (Then::Hold | Then::GoOn, true) if input => {
                if self.max_tokens() == 0 {
                    return Next::Finish(End::Incomplete(IncompleteReason::MaxOutputTokens));
                }
                Next::Sample
            }
            (Then::Hold, false) => Next::Await,
            (Then::Hold | Then::GoOn, _) | (Then::End, _) => Next::Finish(End::Completed),
        }
    }

    /// How the last prompt came to be, with the fingerprint of it and its sample.
    #[must_use]
    pub fn report(&self) -> PromptReport {
        PromptReport {
            fingerprint: self.rope.fingerprint(),
            ..self.report
        }
    }

    /// The sample that has just ended, which took this long.
    #[must_use]
    pub fn sample_report(&self, timing: Timing) -> SampleReport {
        SampleReport {
            prompt: self.report(),
            timing,
            output_tokens: self.usage.output_tokens - self.sampled_before,
        }
    }

    /// How the response stands, to be told to the client.
    #[must_use]
    pub fn done(&self, status: Status, timing: Timing, earlier: Vec<SampleReport>) -> Event {
        // While it waits it tells only what is new: a held loop costs the same in each round.
        let first = match status {
            Status::AwaitingInput => self.output_told,
            Status::Completed | Status::Incomplete(_) | Status::Failed(_) | Status::Cancelled => 0,
        };
        let output = &self.output[first..];
        let done = Done {
            status,
            model: Some(self.model.name.clone()),
            finish: self.finish,
            call_ids: self
                .open_calls
                .iter()
                .map(|call| call.call_id.clone())
                .collect(),
            output_item_ids: output.iter().map(|item| item.id.clone()).collect(),
            usage: self.usage,
            prompt: self.report(),
            timing,
            earlier,
            output: if self.include_output {
                output.to_vec()
            } else {
                Vec::new()
            },
            receipt: None,
        };
        Event::Done(Box::new(done))
    }

    /// The client has been told how it stands: a later `done` while it waits tells what is new.
    pub fn told(&mut self) {
        self.output_told = self.output.len();
    }

    /// Ends the response and puts it on the ledger.
    pub fn commit(mut self, status: Status, held: &Held) -> Arc<Committed> {
        // Input that came too late for a sample is kept: outputs behind their calls, messages for later.
        let mut late = std::mem::take(&mut self.staged);
        let mut pending = std::mem::take(&mut self.steering);
        if self.open_calls.is_empty() {
            late.append(&mut pending);
        }
        self.admit_input(late);
        let affinity = self.affinity();
        let prompt = self.report();
        let parent = self.parent.as_deref();
        held.commit(Committed {
            tenant: self.tenant,
            root: parent.map_or_else(|| self.id.clone(), |parent| parent.root.clone()),
            storing: Storing::new(&self.settings, parent),
            affinity,
            input: self.input,
            prompt,
            id: self.id,
            parent: self.parent,
            model: self.model.name.clone(),
            settings: self.settings,
            date: self.head.date(),
            output: self.output,
            batches: self.batches,
            chat: OnceLock::new(),
            view: Some(View {
                artifacts: self.model.artifacts.clone(),
                head: self.head,
                entries: self.entries,
                visible: self.visible,
                resume: self.resume,
            }),
            pending,
            rope: self.rope,
            prompt_tokens: self.prompt_tokens,
            prompt_entries: self.prompt_entries,
            open_calls: self.open_calls,
            status,
            finish: self.finish,
            usage: self.usage,
            created_at_ms: self.created_at_ms,
            metadata: self.metadata,
            checked: self.checked,
        })
    }
}
