//! From items to the exact tokens that a model sees, encoding only what is new.
//!
//! The conversation is rendered through the model's own template: on from where the last rendering
//! of it may be gone on with (`template::Place`), and otherwise from the start, which assumes nothing about the
//! template. The text is compared with the one that the ledger holds; every token up to the last
//! place where text may be cut is kept, samples exactly as they were sampled, and only what
//! follows is encoded. A template that rewrites the past is thereby right, it only costs more, and
//! the report says so.
//!
//! Text of clients and of models never becomes a control token: literals of added tokens in it
//! are marked before the template runs, and encoded as ordinary text.

use std::{borrow::Cow, sync::Arc};

use rpds::VectorSync;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

mod chat;

pub use chat::messages;

use crate::{
    event::{Code, Error},
    item::{Body, CUSTOM_PARAMETERS, CallId, Item, Part, Role, Tenant, ToolKind},
    ledger::{Cut, Draft, Rope, common_prefix, first_difference},
    model::Artifacts,
    request::{Effort, Settings, ValidItem},
    template::{
        Call, KwargValue, Message, Messages, Place, RenderInput, TemplateError, ToolDef, ToolsValue,
    },
    tokenizer::{Encoded, Guard},
};

/// What stands around the messages: instructions, tools, and the settings that templates read.
/// Built once for settings that render alike, and shared by all responses under them.
pub struct Head {
    system: Option<Message>,
    tools: Option<ToolsValue>,
    kwargs: Vec<(&'static str, KwargValue)>,
    /// The date that the template sees, frozen where the conversation began.
    date: jiff::civil::Date,
}

impl Head {
    /// The head for these settings, in a conversation that began on this date.
    ///
    /// # Errors
    ///
    /// `invalid_request` where the parameters of a tool are no JSON.
    pub fn new(
        settings: &Settings,
        artifacts: &Artifacts,
        date: jiff::civil::Date,
    ) -> Result<Self, Error> {
        let guard = artifacts.tokenizer.guard();
        let marked: Vec<_> = settings
            .tools()
            .iter()
            .map(|tool| {
                let parameters = match &tool.kind {
                    ToolKind::Function { parameters, .. } => guard.mark_json(parameters),
                    ToolKind::Custom => CUSTOM_PARAMETERS.into(),
                };
                let description = tool.description.as_ref().map(|text| guard.mark(text));
                (&*tool.name, description, parameters)
            })
            .collect();
        let definitions: Vec<ToolDef<'_>> = marked
            .iter()
            .map(|(name, description, parameters)| ToolDef {
                name,
                description: description.as_deref(),
                parameters,
            })
            .collect();
        let tools = match definitions.as_slice() {
            [] => None,
            definitions => Some(ToolsValue::new(definitions).map_err(refused)?),
        };
        let mut kwargs = Vec::new();
        if let Some(effort) = settings.reasoning_effort {
            kwargs.push(("enable_thinking", KwargValue::Flag(effort != Effort::None)));
            kwargs.push(("reasoning_effort", KwargValue::Text(effort.as_str().into())));
        }
        Ok(Self {
            system: settings
                .instructions
                .as_ref()
                .map(|text| Message::text("system", with_marks(guard, text))),
            tools,
            kwargs,
            date,
        })
    }

    /// The date that the conversation began on.
    #[must_use]
    pub fn date(&self) -> jiff::civil::Date {
        self.date
    }
}

/// All messages of a conversation, in order. A clone costs nothing and shares them, so that each
/// response can hold the whole conversation up to it.
pub type Entries = VectorSync<Entry>;

/// A message in the order of the conversation, with what truncation needs to know of it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The message.
    pub message: Message,
    /// Who speaks.
    pub speaker: Speaker,
    /// How many items it was made of.
    pub items: u32,
    /// Bytes of text in it, to judge how much of the prompt it takes.
    pub bytes: usize,
}

/// Who speaks in a message, as far as truncation cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// A user, an operator or a developer: the prompt may begin here.
    Client,
    /// The model: the prompt may be cut before it, behind a message of the client.
    Model,
    /// A tool: never without the call before it.
    Tool,
    /// Nobody: a summary that stands in place of everything before it.
    Summary,
}

/// What a model sees of a conversation whose oldest messages have left the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Visible {
    /// The first message that is seen.
    pub from: usize,
    /// An earlier message that still stands before it: the last one of the client, where the
    /// visible ones would begin with the model's.
    pub pinned: Option<usize>,
    /// How many items are no longer seen.
    pub hidden_items: u32,
}

impl Visible {
    /// The messages from `from` on, with the pinned one before them.
    #[must_use]
    pub fn new(all: &Entries, from: usize, pinned: Option<usize>) -> Self {
        let hidden: u32 = all.iter().take(from).map(|entry| entry.items).sum();
        let pinned_items = pinned
            .and_then(|at| all.get(at))
            .map_or(0, |entry| entry.items);
        Self {
            from,
            pinned,
            hidden_items: hidden - pinned_items,
        }
    }

    /// The messages from the last summary on; all of them where there is none.
    #[must_use]
    pub fn from_summary(all: &Entries) -> Self {
        let summary = all
            .iter()
            .rposition(|entry| entry.speaker == Speaker::Summary);
        Self::new(all, summary.unwrap_or(0), None)
    }
}

/// The messages that a model sees: of a conversation what is visible, and more behind it.
#[derive(Debug, Clone)]
pub struct Seen {
    all: Entries,
    visible: Visible,
    more: Vec<Message>,
}

impl Seen {
    /// What is visible of the conversation. Costs nothing that grows with it.
    #[must_use]
    pub fn new(all: &Entries, visible: Visible) -> Self {
        Self {
            all: all.clone(),
            visible,
            more: Vec::new(),
        }
    }

    /// Puts messages behind it that are not part of the conversation yet.
    pub fn add(&mut self, entries: Vec<Entry>) {
        self.more
            .extend(entries.into_iter().map(|entry| entry.message));
    }
}

/// What a template renders: the instructions before all that is seen.
#[derive(Debug)]
struct Script {
    system: Option<Message>,
    seen: Seen,
}

impl Script {
    fn leading(&self) -> impl Iterator<Item = &Message> {
        let Seen { all, visible, .. } = &self.seen;
        let pinned = visible.pinned.and_then(|at| all.get(at));
        let pinned = pinned.map(|entry| &entry.message);
        self.system.iter().chain(pinned)
    }
}

impl Messages for Script {
    fn len(&self) -> usize {
        let Seen { all, visible, more } = &self.seen;
        self.leading().count() + all.len().saturating_sub(visible.from) + more.len()
    }

    fn get(&self, at: usize) -> Option<Message> {
        let Some(behind) = at.checked_sub(self.leading().count()) else {
            return self.leading().nth(at).cloned();
        };
        let Seen { all, visible, more } = &self.seen;
        match all.get(visible.from + behind) {
            Some(entry) => Some(entry.message.clone()),
            None => {
                let at = (visible.from + behind).checked_sub(all.len())?;
                more.as_slice().get(at).cloned()
            }
        }
    }
}

/// What one message says: of the assistant, reasoning, text and calls in a row.
pub(crate) struct Said {
    /// Who says it.
    pub(crate) by: By,
    /// How many items it was made of.
    items: u32,
    /// Bytes of text in them.
    bytes: usize,
}

/// Who says something, and what.
pub(crate) enum By {
    /// A user, an operator or a developer.
    Client(Role, Arc<str>),
    /// The model.
    Model(Answer),
    /// A tool.
    Tool {
        call_id: CallId,
        name: Arc<str>,
        output: Arc<str>,
    },
    /// Nobody: what stands in place of everything before it.
    Summary(Arc<str>),
}

/// A message of the assistant.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) reasoning: Option<String>,
    pub(crate) text: Option<Arc<str>>,
    calls: Vec<Arc<Item>>,
}

impl Answer {
    /// Its calls: the id, the name of the tool, and the arguments as they were sampled.
    pub(crate) fn calls(&self) -> impl Iterator<Item = (&CallId, &Arc<str>, &Arc<str>)> {
        self.calls.iter().filter_map(|item| match &item.body {
            Body::FunctionCall {
                call_id,
                name,
                arguments,
            }
            | Body::CustomToolCall {
                call_id,
                name,
                arguments,
                ..
            } => Some((call_id, name, arguments)),
            Body::Message { .. }
            | Body::FunctionCallOutput { .. }
            | Body::Reasoning { .. }
            | Body::CustomToolCallOutput { .. }
            | Body::Compaction { .. } => None,
        })
    }
}

/// What the messages say that items make which belong together, the input of one command or the
/// output of one sample: reasoning, text and calls in a row become one message of the assistant.
pub(crate) fn said(items: &[ValidItem]) -> Vec<Said> {
    let mut all = Vec::new();
    let mut open = Open::default();
    for new in items {
        let item = &*new.item;
        let one = |by| Said {
            by,
            items: 1,
            bytes: item.text_bytes(),
        };
        match &item.body {
            Body::Reasoning { content } => {
                if open.answer.text.is_some() || !open.answer.calls.is_empty() {
                    open.flush(&mut all);
                }
                open.answer
                    .reasoning
                    .get_or_insert_default()
                    .push_str(content);
                open.add(item);
            }
            Body::Message {
                role: Role::Assistant,
                parts,
            } => {
                if open.answer.text.is_some() || !open.answer.calls.is_empty() {
                    open.flush(&mut all);
                }
                open.answer.text = Some(Part::joined(parts));
                open.add(item);
            }
            Body::FunctionCall { .. } | Body::CustomToolCall { .. } => {
                open.answer.calls.push(new.item.clone());
                open.add(item);
            }
            Body::Message { role, parts } => {
                open.flush(&mut all);
                all.push(one(By::Client(*role, Part::joined(parts))));
            }
            Body::FunctionCallOutput { call_id, output }
            | Body::CustomToolCallOutput { call_id, output } => {
                open.flush(&mut all);
                all.push(one(By::Tool {
                    call_id: call_id.clone(),
                    name: new.answers.clone().unwrap_or_default(),
                    output: output.clone(),
                }));
            }
            Body::Compaction { summary } => {
                open.flush(&mut all);
                all.push(one(By::Summary(summary.clone())));
            }
        }
    }
    open.flush(&mut all);
    all
}

/// A message of the assistant while its items are gathered.
#[derive(Default)]
struct Open {
    answer: Answer,
    items: u32,
    bytes: usize,
}

impl Open {
    fn add(&mut self, item: &Item) {
        self.items += 1;
        self.bytes += item.text_bytes();
    }

    fn flush(&mut self, all: &mut Vec<Said>) {
        if self.items > 0 {
            let open = std::mem::take(self);
            all.push(Said {
                by: By::Model(open.answer),
                items: open.items,
                bytes: open.bytes,
            });
        }
    }
}

/// Turns items that belong together, the input of one command or the output of one sample, into
/// messages for the template.
#[must_use]
pub fn entries(items: &[ValidItem], artifacts: &Artifacts) -> Vec<Entry> {
    let guard = artifacts.tokenizer.guard();
    let all = said(items).into_iter();
    all.map(|said| {
        let (speaker, message) = match said.by {
            By::Client(role, text) => {
                let role = match role {
                    Role::Developer if artifacts.template.source().contains("developer") => {
                        "developer"
                    }
                    Role::System | Role::Developer => "system",
                    Role::User | Role::Assistant => "user",
                };
                let message = Message::text(role, with_marks(guard, &text));
                (Speaker::Client, message)
            }
            By::Model(answer) => (Speaker::Model, assistant(guard, answer)),
            By::Tool {
                call_id,
                name,
                output,
            } => {
                let output = with_marks(guard, &output);
                let message = Message::tool_output(call_id.as_str(), &name, output);
                (Speaker::Tool, message)
            }
            By::Summary(text) => {
                let message = Message::text("user", with_marks(guard, &text));
                (Speaker::Summary, message)
            }
        };
        Entry {
            message,
            speaker,
            items: said.items,
            bytes: said.bytes,
        }
    })
    .collect()
}

fn assistant(guard: &Guard, answer: Answer) -> Message {
    let calls: Vec<Call<'_>> = answer
        .calls()
        .map(|(call_id, name, arguments)| Call {
            id: call_id.as_str(),
            name,
            arguments: sharing(arguments, guard.mark_json(arguments)),
        })
        .collect();
    let text = answer.text.as_ref().map(|text| with_marks(guard, text));
    let reasoning = answer.reasoning.as_deref();
    let reasoning = reasoning.map(|text| with_marks(guard, &text.into()));
    Message::assistant(reasoning, text, &calls)
}

/// The text with marks for the template, or, where nothing in it needs any, the very same.
fn with_marks(guard: &Guard, text: &Arc<str>) -> Arc<str> {
    sharing(text, guard.mark(text))
}

/// What marking made of the text, or the very same where that is it.
fn sharing(text: &Arc<str>, marked: Cow<'_, str>) -> Arc<str> {
    match marked {
        Cow::Borrowed(_) => text.clone(),
        Cow::Owned(text) => text.into(),
    }
}

/// A conversation as text from a byte on, with the places in the whole where literals of added
/// tokens are only text.
struct Text {
    first_byte: usize,
    text: String,
    untrusted: Vec<usize>,
    resume: Option<Resume>,
}

/// Where the next rendering of a conversation may go on.
#[derive(Clone)]
pub struct Resume {
    place: Place,
    /// Where that is in the text.
    byte: usize,
    /// What else it was rendered with.
    head: Arc<Head>,
    visible: Visible,
    generation_prompt: bool,
}

/// What the ledger holds of a conversation.
#[derive(Clone, Copy)]
pub struct Past<'a> {
    /// The prompt and sample before. It may hold anything, even another conversation: what it
    /// shares with the new rendering is kept.
    pub rope: &'a Rope,
    /// Where the rendering of that prompt may be gone on with, while the conversation has only
    /// grown since.
    pub resume: Option<&'a Resume>,
}

/// A prompt that was made from the one before it.
pub struct Rendered {
    /// Text and tokens.
    pub rope: Rope,
    /// Tokens that the tokenizer produced for it.
    pub encoded_tokens: usize,
    /// The part that was encoded, for a later rendering to take over.
    pub tail: Tail,
    /// Where the next rendering may go on.
    pub resume: Option<Resume>,
}

/// The newest part of a rendering with its tokens.
pub struct Tail {
    text: String,
    at_start: bool,
    untrusted: Vec<usize>,
    encoded: Encoded,
}

/// Renders a conversation onto what the ledger holds of it.
///
/// `ahead` is a rendering that was made while the model still sampled; what it encoded is not
/// encoded again.
///
/// # Errors
///
/// `invalid_request` where the template refuses the conversation.
pub fn render(
    artifacts: &Artifacts,
    head: &Arc<Head>,
    seen: Seen,
    generation_prompt: bool,
    past: Past<'_>,
    ahead: Option<&Tail>,
) -> Result<Rendered, Error> {
    let previous = past.rope;
    let Text {
        mut first_byte,
        mut text,
        mut untrusted,
        resume,
    } = to_text(
        artifacts,
        head,
        seen.clone(),
        generation_prompt,
        past.resume,
    )?;
    debug_assert!(
        first_byte == 0
            || to_text(artifacts, head, seen, generation_prompt, None)
                .is_ok_and(|whole| whole.text == previous.text_between(0, first_byte).0 + &text),
        "a rendering that goes on gives what one from the start does"
    );
    let common = previous.common_bytes(first_byte, &text, &untrusted);
    let boundary = previous.boundary(common);
    let kept = previous.truncated(boundary);
    if boundary.byte < first_byte {
        let (before, marks) = previous.text_between(boundary.byte, first_byte);
        text.insert_str(0, &before);
        untrusted.splice(0..0, marks);
        first_byte = boundary.byte;
    }
    let new = &text[boundary.byte - first_byte..];
    // An added token takes the white space behind it also where it was sampled.
    let swallows = kept
        .last_sampled()
        .is_some_and(|id| artifacts.tokenizer.swallows_after(id));
    let at = if swallows {
        first_byte + text.len() - new.trim_start().len()
    } else {
        boundary.byte
    };
    let untrusted = &untrusted[untrusted.partition_point(|p| *p < at)..];
    let mut tail = Tail {
        text: text[at - first_byte..].to_owned(),
        at_start: at == 0,
        untrusted: untrusted.iter().map(|p| p - at).collect(),
        encoded: Encoded::default(),
    };
    tail.encoded = tail.encode(artifacts, ahead);
    let encoded = &tail.encoded;
    let rope = kept.with_rendered(Draft {
        text: new.to_owned(),
        ids: encoded.ids.clone(),
        cuts: moved(&encoded.cuts, Cut::default(), at, boundary.token).collect(),
        untrusted: untrusted.to_vec(),
        spans: Vec::new(),
    });
    Ok(Rendered {
        rope,
        encoded_tokens: encoded.ids.len(),
        tail,
        resume,
    })
}

/// The text of a conversation, as it would be rendered from nothing.
///
/// # Errors
///
/// As [`render`].
pub fn text(
    artifacts: &Artifacts,
    head: &Arc<Head>,
    seen: Seen,
    generation_prompt: bool,
) -> Result<String, Error> {
    to_text(artifacts, head, seen, generation_prompt, None).map(|Text { text, .. }| text)
}

fn to_text(
    artifacts: &Artifacts,
    head: &Arc<Head>,
    seen: Seen,
    generation_prompt: bool,
    resume: Option<&Resume>,
) -> Result<Text, Error> {
    let visible = seen.visible;
    let script = Script {
        system: head.system.clone(),
        seen,
    };
    let input = RenderInput {
        messages: Arc::new(script),
        tools: head.tools.as_ref(),
        add_generation_prompt: generation_prompt,
        now: head.date.at(0, 0, 0, 0),
        kwargs: &head.kwargs,
    };
    let resume = resume.filter(|resume| {
        Arc::ptr_eq(&resume.head, head)
            && resume.visible == visible
            && resume.generation_prompt == generation_prompt
    });
    let template = &artifacts.template;
    let rendered = template
        .render_on(&input, resume.map(|resume| &resume.place))
        .map_err(refused)?;
    let guard = artifacts.tokenizer.guard();
    let [before, behind] = rendered.parts;
    let (mut text, mut untrusted) = guard.unmark(before);
    let first_byte = resume
        .filter(|_| rendered.resumed)
        .map_or(0, |resume| resume.byte);
    for mark in &mut untrusted {
        *mark += first_byte;
    }
    let byte = first_byte + text.len();
    let (behind, marks) = guard.unmark(behind);
    text.push_str(&behind);
    untrusted.extend(marks.into_iter().map(|mark| mark + byte));
    Ok(Text {
        first_byte,
        text,
        untrusted,
        resume: rendered.next.map(|place| Resume {
            place,
            byte,
            head: Arc::clone(head),
            visible,
            generation_prompt,
        }),
    })
}

fn refused(error: TemplateError) -> Error {
    Error::new(
        Code::InvalidRequest,
        format!("the model's template refuses this conversation: {error}"),
    )
    .at("create.input")
}

impl Tail {
    /// Encodes its text, taking over from `ahead` what both begin and end with.
    fn encode(&self, artifacts: &Artifacts, ahead: Option<&Self>) -> Encoded {
        let tokenizer = &artifacts.tokenizer;
        let mut encoded = Encoded::default();
        let Some(ahead) = ahead.filter(|ahead| ahead.at_start == self.at_start) else {
            tokenizer.encode(&self.text, self.at_start, &self.untrusted, &mut encoded);
            return encoded;
        };
        if (&ahead.text, &ahead.untrusted) == (&self.text, &self.untrusted) {
            return ahead.encoded.clone();
        }
        // Text may be cut before an added token that both have: on either side of the middle the
        // halves encode on their own to what the whole encodes to.
        let common = common_prefix(ahead.text.as_bytes(), self.text.as_bytes());
        let common = common.min(first_difference(
            &ahead.untrusted,
            &self.untrusted,
            0..common,
        ));
        let cuts = &ahead.encoded.cuts;
        let before = cuts.partition_point(|cut| cut.byte + cut.len <= common);
        let head = before.checked_sub(1).map_or(Cut::default(), |at| cuts[at]);
        let same = ahead.same_end(self, head.byte);
        let after = cuts.partition_point(|cut| cut.byte + same < ahead.text.len());
        let last = cuts.get(after).copied();
        let middle_end = last.map_or(self.text.len(), |cut| {
            self.text.len() - (ahead.text.len() - cut.byte)
        });

        encoded
            .ids
            .extend_from_slice(&ahead.encoded.ids[..head.token]);
        encoded
            .cuts
            .extend(cuts.iter().filter(|cut| cut.byte < head.byte));
        let mut middle = Encoded::default();
        let untrusted: Vec<usize> = self
            .untrusted
            .iter()
            .filter(|p| (head.byte..middle_end).contains(p))
            .map(|p| p - head.byte)
            .collect();
        tokenizer.encode(
            &self.text[head.byte..middle_end],
            self.at_start && head.byte == 0,
            &untrusted,
            &mut middle,
        );
        encoded
            .cuts
            .extend(moved(&middle.cuts, Cut::default(), head.byte, head.token));
        encoded.ids.append(&mut middle.ids);
        if let Some(last) = last {
            let tokens = encoded.ids.len();
            encoded.cuts.extend(moved(cuts, last, middle_end, tokens));
            encoded
                .ids
                .extend_from_slice(&ahead.encoded.ids[last.token..]);
        }
        encoded
    }

    /// How many bytes this text and the other end with alike, trust included, behind the first
    /// `head` bytes of each.
    fn same_end(&self, other: &Self, head: usize) -> usize {
        let (ours, theirs) = (
            &self.text.as_bytes()[head..],
            &other.text.as_bytes()[head..],
        );
        let pairs = std::iter::zip(ours.iter().rev(), theirs.iter().rev());
        let bytes = pairs.take_while(|(a, b)| a == b).count();
        let from_end = |tail: &Self| -> Vec<usize> {
            let marks = tail.untrusted.iter().rev();
            marks.map(|p| tail.text.len() - p).collect()
        };
        let (ours, theirs) = (from_end(self), from_end(other));
        bytes.min(first_difference(&ours, &theirs, 0..bytes + 1).saturating_sub(1))
    }

    /// How many tokens it holds.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.encoded.ids.len()
    }
}

/// The cuts from `from` on, moved to where that one now stands.
fn moved(cuts: &[Cut], from: Cut, byte: usize, token: usize) -> impl Iterator<Item = Cut> {
    let later = cuts.iter().filter(move |cut| cut.byte >= from.byte);
    later.map(move |cut| Cut {
        byte: cut.byte - from.byte + byte,
        token: cut.token - from.token + token,
        len: cut.len,
    })
}

/// The head alone, instructions and tools, as far as every conversation under it begins with it.
/// `None` where the template refuses to render without a conversation around it.
#[must_use]
pub fn render_head(artifacts: &Artifacts, head: &Arc<Head>) -> Option<Rope> {
    let with = |text: &str| {
        let mut seen = Seen::new(&Entries::new_sync(), Visible::default());
        seen.more.push(Message::text("user", text));
        to_text(artifacts, head, seen, false, None).ok()
    };
    let (one, two) = (with("0")?, with("1")?);
    let mut encoded = Encoded::default();
    artifacts
        .tokenizer
        .encode(&one.text, true, &one.untrusted, &mut encoded);
    let whole = Rope::default().with_rendered(Draft {
        text: one.text.clone(),
        untrusted: one.untrusted.clone(),
        ..Draft::default()
    });
    let common = whole.common_bytes(0, &two.text, &two.untrusted);
    // Up to the last added token that both share, that token included: a conversation is cut before it.
    let cuts = encoded
        .cuts
        .partition_point(|cut| cut.byte + cut.len <= common);
    let last = *encoded.cuts[..cuts].last()?;
    let (bytes, tokens) = (last.byte + last.len, last.token + 1);
    encoded.cuts.truncate(cuts);
    Some(Rope::default().with_rendered(Draft {
        text: one.text[..bytes].to_owned(),
        ids: encoded.ids[..tokens].to_vec(),
        cuts: encoded.cuts,
        untrusted: one.untrusted.into_iter().filter(|p| *p < bytes).collect(),
        spans: Vec::new(),
    }))
}

/// Heads that were rendered before, for all streams: one with the same model, instructions and
/// tools encodes none of them again. Bounded by bytes; a tenant finds only its own.
pub struct Heads {
    cache: moka::sync::Cache<[u8; 32], CachedHead>,
}

/// A head with its tokens.
#[derive(Clone)]
pub struct CachedHead {
    /// The head.
    pub head: Arc<Head>,
    /// What every prompt under it begins with; empty where the template tells no such thing.
    pub rope: Rope,
}

impl Heads {
    /// An empty cache that holds at most this many bytes.
    #[must_use]
    pub fn new(bytes_max: u64) -> Self {
        Self {
            cache: moka::sync::Cache::builder()
                .max_capacity(bytes_max)
                // The values of instructions and tools take about as much as their rendered text.
                .weigher(|_, cached: &CachedHead| {
                    let bytes = cached.rope.bytes_beyond(&Rope::default())
                        + 2 * cached.rope.len_bytes()
                        + 1024;
                    u32::try_from(bytes).unwrap_or(u32::MAX)
                })
                .build(),
        }
    }

    /// The head for these settings, and whether it was there already.
    ///
    /// # Errors
    ///
    /// As [`Head::new`].
    pub fn get(
        &self,
        tenant: &Tenant,
        artifacts: &Artifacts,
        settings: &Settings,
        date: jiff::civil::Date,
    ) -> Result<(CachedHead, bool), Error> {
        let key = head_key(tenant, artifacts, settings, date);
        if let Some(cached) = self.cache.get(&key) {
            return Ok((cached, true));
        }
        let head = Arc::new(Head::new(settings, artifacts, date)?);
        let rope = render_head(artifacts, &head).unwrap_or_default();
        let cached = CachedHead { head, rope };
        self.cache.insert(key, cached.clone());
        Ok((cached, false))
    }
}

/// Names everything that a head is made of, each part with its length so that no two are confused.
fn head_key(
    tenant: &Tenant,
    artifacts: &Artifacts,
    settings: &Settings,
    date: jiff::civil::Date,
) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(tenant.as_str().as_bytes());
    part(&artifacts.fingerprint);
    part(date.to_string().as_bytes());
    part(
        settings
            .reasoning_effort
            .map_or("", Effort::as_str)
            .as_bytes(),
    );
    for text in settings.instructions.iter() {
        part(text.as_bytes());
    }
    part(b"tools");
    for tool in settings.tools() {
        part(tool.name.as_bytes());
        part(tool.description.as_deref().unwrap_or("\0").as_bytes());
        match &tool.kind {
            ToolKind::Function { parameters, .. } => part(parameters.as_bytes()),
            ToolKind::Custom => part(b"\0custom"),
        }
    }
    hash.finalize().into()
}
