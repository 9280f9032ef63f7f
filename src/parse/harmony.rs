//! gpt-oss: an output is a row of messages, each with a channel and perhaps a recipient.

use super::call::{Call, HEADER_BYTES_MAX, NAME_BYTES_MAX, Progress};
use super::marker::{Marker, Markers};
use super::{GAP_BYTES_MAX, ParserOptions, Sink, leading_whitespace};

/// Where calls of functions are addressed to.
const FUNCTIONS: &str = "functions.";

/// The role of every message that a model writes.
const ASSISTANT: &str = "assistant ";

/// What stands between two messages of one kind, which are one text to the reader.
const PARAGRAPH: &str = "\n\n";

/// The reading of one output.
///
/// ```text
/// Header ─ <|message|> ─┬─ to a tool ──► Call ─ whole ─► AfterCall ─┐
///  ▲  │                 └─ otherwise ──► Body ◄─ text ───────┘      │
///  │  └─ no header ────────────────────► Body                       │
///  │                                      └─ <|end|>, … ─► Between ◄┘
///  └────────── <|start|>, <|channel|> ──────────────────────┘
/// ```
#[derive(Debug)]
pub(super) struct Harmony {
    state: State,
    /// What was handed out last, if no call has come since.
    last: Option<Kind>,
}

#[derive(Debug)]
enum State {
    Header(Header),
    Body {
        kind: Kind,
        /// Whether nothing of this message was handed out yet.
        fresh: bool,
    },
    Call(Box<Call>),
    /// After a call's arguments; the gap is format unless text follows.
    AfterCall {
        gap: String,
    },
    /// After the end of a message.
    Between {
        gap: String,
    },
}

/// What a message is to the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Text,
}

/// The header of a message, up to `<|message|>`.
#[derive(Debug, Default)]
struct Header {
    /// All of it as written, with the whitespace before it.
    raw: String,
    /// The role and what follows it, the prompt's part included; then what follows `<|channel|>`.
    role: String,
    channel: String,
    part: Part,
}

/// The part of a header that is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Part {
    /// After the role that the prompt has written: a recipient, if any text at all.
    Recipient,
    #[default]
    Role,
    Channel,
    /// What `<|constrain|>` says of the content's type; it means nothing here.
    Constraint,
}

impl Harmony {
    pub(super) fn new(options: &ParserOptions) -> Self {
        let state = if options.in_reasoning {
            State::Body {
                kind: Kind::Reasoning,
                fresh: true,
            }
        } else {
            State::Header(Header {
                raw: String::new(),
                role: ASSISTANT.to_owned(),
                channel: String::new(),
                part: Part::Recipient,
            })
        };
        Self { state, last: None }
    }

    pub(super) fn active(&self) -> Markers {
        match self.state {
            State::Header(_) => Markers::of(&[
                Marker::Start,
                Marker::Channel,
                Marker::Constrain,
                Marker::Message,
                Marker::End,
                Marker::Call,
                Marker::Return,
            ]),
            State::Between { .. } => Markers::of(&[
                Marker::Start,
                Marker::Channel,
                Marker::End,
                Marker::Call,
                Marker::Return,
            ]),
            State::Body { .. } | State::AfterCall { .. } => {
                Markers::of(&[Marker::Start, Marker::End, Marker::Call, Marker::Return])
            }
            State::Call(_) => Markers::default(),
        }
    }

    pub(super) fn text(&mut self, text: &str, sink: &mut Sink<'_>) -> usize {
        match &mut self.state {
            State::Header(header) => {
                if header.text(text) {
                    text.len()
                } else {
                    self.give_up(sink);
                    0
                }
            }
            State::Body { kind, fresh } => {
                let (kind, fresh) = (*kind, std::mem::take(fresh));
                self.emit(kind, fresh, text, sink);
                text.len()
            }
            State::Call(call) => {
                let (used, progress) = call.push(text, sink);
                match progress {
                    Progress::More => {}
                    Progress::Ended => self.state = State::AfterCall { gap: String::new() },
                    Progress::Failed => self.give_up(sink),
                }
                used
            }
            State::AfterCall { gap } | State::Between { gap } => {
                let space = leading_whitespace(text);
                gap.push_str(&text[..space]);
                if space < text.len() || gap.len() > GAP_BYTES_MAX {
                    let gap = std::mem::take(gap);
                    self.enter_text(&gap, sink);
                }
                space
            }
        }
    }

    /// Reads a marker; false where it means nothing and is to be read as text.
    pub(super) fn marker(&mut self, marker: Marker, sink: &mut Sink<'_>) -> bool {
        match marker {
            Marker::Start | Marker::Channel => self.open(marker, sink),
            Marker::End | Marker::Call | Marker::Return => {
                self.give_up(sink);
                self.state = State::Between { gap: String::new() };
                true
            }
            Marker::Constrain => {
                if let State::Header(header) = &mut self.state
                    && header.part != Part::Constraint
                {
                    header.next_part(marker, Part::Constraint);
                    return true;
                }
                self.give_up_header(sink);
                false
            }
            Marker::Message => self.message(sink),
            Marker::Think
            | Marker::ThinkEnd
            | Marker::ToolCall
            | Marker::ToolCallEnd
            | Marker::PythonTag
            | Marker::BracketThink
            | Marker::BracketThinkEnd
            | Marker::ToolCalls
            | Marker::CallId
            | Marker::Args => false,
        }
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        self.give_up(sink);
        self.state = State::Body {
            kind: Kind::Text,
            fresh: false,
        };
    }

    /// Reads `<|start|>`, which begins a header anywhere, or `<|channel|>`, which does where one is due.
    fn open(&mut self, marker: Marker, sink: &mut Sink<'_>) -> bool {
        let channel = marker == Marker::Channel;
        let gap = match &mut self.state {
            State::Header(header)
                if channel && matches!(header.part, Part::Recipient | Part::Role) =>
            {
                header.next_part(marker, Part::Channel);
                return true;
            }
            State::Between { gap } => std::mem::take(gap),
            State::Header(_) | State::Body { .. } | State::Call(_) | State::AfterCall { .. } => {
                self.give_up_header(sink);
                if channel {
                    return false;
                }
                self.give_up_call(sink);
                String::new()
            }
        };
        let mut header = Header {
            raw: gap,
            // A message without `<|start|>` goes on as the same author's.
            role: if channel { ASSISTANT } else { "" }.to_owned(),
            channel: String::new(),
            part: Part::Role,
        };
        let part = if channel { Part::Channel } else { Part::Role };
        header.next_part(marker, part);
        self.state = State::Header(header);
        true
    }

    /// Reads `<|message|>`, which ends a header.
    fn message(&mut self, sink: &mut Sink<'_>) -> bool {
        let State::Header(header) = &mut self.state else {
            return false;
        };
        let mut header = std::mem::take(header);
        header.raw.push_str(Marker::Message.text());
        match header.purpose() {
            Purpose::Shown(kind) => self.state = State::Body { kind, fresh: true },
            Purpose::Call(name) if sink.begin(name) => {
                self.last = None;
                self.state = State::Call(Box::new(Call::bare(header.raw)));
            }
            Purpose::Call(_) | Purpose::Unknown => self.enter_text(&header.raw, sink),
        }
        true
    }

    /// Hands out a header or call that is open as text.
    fn give_up(&mut self, sink: &mut Sink<'_>) {
        self.give_up_header(sink);
        self.give_up_call(sink);
    }

    fn give_up_header(&mut self, sink: &mut Sink<'_>) {
        if let State::Header(header) = &mut self.state {
            let raw = std::mem::take(&mut header.raw);
            self.enter_text(&raw, sink);
        }
    }

    fn give_up_call(&mut self, sink: &mut Sink<'_>) {
        let body = State::Body {
            kind: Kind::Text,
            fresh: false,
        };
        match std::mem::replace(&mut self.state, body) {
            State::Call(call) => {
                // Bare calls were announced, so there is no text to return.
                call.fail(sink);
            }
            state @ (State::Header(_)
            | State::Body { .. }
            | State::AfterCall { .. }
            | State::Between { .. }) => self.state = state,
        }
    }

    /// Goes on in text that belongs to no message, beginning with `raw`.
    fn enter_text(&mut self, raw: &str, sink: &mut Sink<'_>) {
        self.state = State::Body {
            kind: Kind::Text,
            fresh: raw.is_empty(),
        };
        if !raw.is_empty() {
            self.emit(Kind::Text, true, raw, sink);
        }
    }

    fn emit(&mut self, kind: Kind, fresh: bool, delta: &str, sink: &mut Sink<'_>) {
        let joint = if fresh && self.last == Some(kind) {
            PARAGRAPH
        } else {
            ""
        };
        self.last = Some(kind);
        match kind {
            Kind::Reasoning => {
                sink.reasoning(joint);
                sink.reasoning(delta);
            }
            Kind::Text => {
                sink.text(joint);
                sink.text(delta);
            }
        }
    }
}

/// What a message is for.
enum Purpose<'a> {
    Shown(Kind),
    Call(&'a str),
    Unknown,
}

impl Header {
    /// Reads text; false, and nothing is used, where this is no header.
    fn text(&mut self, text: &str) -> bool {
        if self.raw.len() + text.len() > HEADER_BYTES_MAX {
            return false;
        }
        match self.part {
            Part::Recipient => {
                let written = self.role.len();
                self.role.push_str(if written == ASSISTANT.len() {
                    text.trim_start()
                } else {
                    text
                });
                let recipient = &self.role[ASSISTANT.len()..];
                if !recipient.starts_with("to=") && !"to=".starts_with(recipient) {
                    // A model that writes no headers is not held back until its header would be too long.
                    return false;
                }
            }
            Part::Role => self.role.push_str(text),
            Part::Channel => self.channel.push_str(text),
            Part::Constraint => {}
        }
        self.raw.push_str(text);
        true
    }

    fn next_part(&mut self, marker: Marker, part: Part) {
        self.raw.push_str(marker.text());
        self.part = part;
    }

    fn purpose(&self) -> Purpose<'_> {
        let mut words = self.role.split_whitespace();
        if words.next() != Some("assistant") {
            return Purpose::Unknown;
        }
        let recipient = words
            .chain(self.channel.split_whitespace())
            .find_map(|word| word.strip_prefix("to="));
        match (recipient, self.channel.split_whitespace().next()) {
            (Some(recipient), _) => match recipient.strip_prefix(FUNCTIONS) {
                Some(name) if name.len() <= NAME_BYTES_MAX => Purpose::Call(name),
                Some(_) | None => Purpose::Unknown,
            },
            (None, Some("analysis")) => Purpose::Shown(Kind::Reasoning),
            (None, Some("commentary" | "final") | None) => Purpose::Shown(Kind::Text),
            (None, Some(_)) => Purpose::Unknown,
        }
    }
}
