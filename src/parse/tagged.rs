//! The families that put tags into running text: hermes, llama3, mistral and plain.

use super::call::{Call, NAME_BYTES_MAX, Progress};
use super::marker::{Marker, Markers};
use super::{GAP_BYTES_MAX, ParserOptions, Sink, leading_whitespace};

/// Which of these families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Hermes,
    Llama3,
    Mistral,
    Plain,
}

/// The reading of one output.
#[derive(Debug)]
pub(super) struct Tagged {
    dialect: Dialect,
    /// Whether there is any tool to call.
    calls: bool,
    state: State,
}

/// ```text
///          ┌────────────────────────── not a call ◄──────────────────────────┐
///          ▼                                                                 │
/// Start ─► Text ─ opener ─► Call ────────────────────────────────────────────┤ hermes, llama3
///   │ ▲      ▲    opener ─► Opened ─ "[" ─► Call ◄─ "," ─ AfterItem ─────────┤ mistral's array
///   ▼ │      │                 └─ name ─► Name ─ [CALL_ID] ─► Id ─ [ARGS] ─► Call ┘ mistral's names
/// Reasoning  └──────── text ── AfterCall ◄─ whole ─ Call
///   └─► Reasoned
/// ```
///
/// Strings named `gap` hold whitespace of which it is open whether it is format; strings named `raw` hold
/// everything since the call may have begun, the gap before it included.
#[derive(Debug)]
enum State {
    /// Nothing but whitespace so far.
    Start {
        gap: String,
        /// Whether reasoning may begin.
        think: bool,
    },
    Reasoning {
        /// Whether a newline now would belong to the opening marker.
        opened: bool,
        /// Whether a newline is held back, which may belong to the closing marker.
        newline: bool,
    },
    /// Reasoning has ended, with so many newlines to come that belong to its closing marker.
    Reasoned {
        newlines: u8,
    },
    Text {
        /// Whether a newline is held back, which may belong to the next call.
        newline: bool,
    },
    /// After `[TOOL_CALLS]`.
    Opened {
        raw: String,
    },
    /// In the name after `[TOOL_CALLS]`, which began at `from` in `raw`.
    Name {
        raw: String,
        from: usize,
    },
    /// In the id between a name and `[ARGS]`.
    Id {
        raw: String,
        from: usize,
        name: String,
    },
    Call {
        call: Box<Call>,
        place: Place,
    },
    /// After a call in an array.
    AfterItem {
        gap: String,
    },
    AfterCall {
        gap: String,
        closer: Closer,
    },
}

/// Where a call stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Alone,
    /// In mistral's array.
    Item,
}

/// What may follow a call once before the next, beside whitespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closer {
    /// `</tool_call>`.
    Tag,
    /// `;`.
    Semicolon,
    Nothing,
}

impl Tagged {
    pub(super) fn new(dialect: Dialect, options: &ParserOptions) -> Self {
        let state = if options.reasoning && options.in_reasoning {
            State::Reasoning {
                opened: false,
                newline: false,
            }
        } else {
            State::Start {
                gap: String::new(),
                think: options.reasoning,
            }
        };
        Self {
            dialect,
            calls: !options.tools.is_empty(),
            state,
        }
    }

    pub(super) fn active(&self) -> Markers {
        let (think, think_end) = self.think();
        match &self.state {
            State::Start { think: true, .. } => self.openers().chain([think]).collect(),
            State::Start { think: false, .. } => self.openers().collect(),
            State::Reasoning { .. } => Markers::of(&[think_end]),
            State::Text { .. } => match self.dialect {
                Dialect::Hermes | Dialect::Mistral => self.openers().collect(),
                Dialect::Llama3 | Dialect::Plain => Markers::default(),
            },
            State::Name { .. } | State::Id { .. } => {
                Markers::of(&[Marker::ToolCalls, Marker::CallId, Marker::Args])
            }
            State::AfterItem { .. } => Markers::of(&[Marker::ToolCalls]),
            State::AfterCall { .. } => self.openers().chain(self.tag()).collect(),
            State::Reasoned { .. } | State::Opened { .. } | State::Call { .. } => {
                Markers::default()
            }
        }
    }

    pub(super) fn text(&mut self, text: &str, sink: &mut Sink<'_>) -> usize {
        match &mut self.state {
            State::Start { gap, .. }
            | State::Opened { raw: gap }
            | State::AfterItem { gap }
            | State::AfterCall { gap, .. } => {
                let space = leading_whitespace(text);
                gap.push_str(&text[..space]);
                if gap.len() > GAP_BYTES_MAX {
                    let gap = std::mem::take(gap);
                    self.enter_text(&gap, sink);
                    space
                } else if let Some(next) = text[space..].chars().next() {
                    space + self.after_gap(next, sink)
                } else {
                    space
                }
            }
            State::Reasoning { opened, newline } => {
                if framed(self.dialect) {
                    let first = usize::from(*opened && text.starts_with('\n'));
                    *opened = false;
                    hold_newline(newline, &text[first..], |delta| sink.reasoning(delta));
                } else {
                    sink.reasoning(text);
                }
                text.len()
            }
            State::Reasoned { newlines } => {
                let newline = *newlines > 0 && text.starts_with('\n');
                if newline {
                    *newlines -= 1;
                } else {
                    self.state = start();
                }
                usize::from(newline)
            }
            State::Text { newline } => {
                if self.dialect == Dialect::Hermes && self.calls {
                    hold_newline(newline, text, |delta| sink.text(delta));
                } else {
                    sink.text(text);
                }
                text.len()
            }
            State::Name { raw, from } | State::Id { raw, from, .. } => {
                raw.push_str(text);
                if raw.len() - *from > NAME_BYTES_MAX {
                    self.give_up(sink);
                }
                text.len()
            }
            State::Call { call, place } => {
                let place = *place;
                let (used, progress) = call.push(text, sink);
                match progress {
                    Progress::More => {}
                    Progress::Ended => self.state = self.after_call(place),
                    Progress::Failed => self.give_up(sink),
                }
                used
            }
        }
    }

    /// Decides what the whitespace was that is held back, by the character after it; says how many bytes of that
    /// were used.
    fn after_gap(&mut self, next: char, sink: &mut Sink<'_>) -> usize {
        match (&mut self.state, next) {
            (State::Start { gap, .. } | State::AfterCall { gap, .. }, '{')
                if self.dialect == Dialect::Llama3 && self.calls =>
            {
                let raw = std::mem::take(gap);
                self.open_call(raw, Place::Alone);
                0
            }
            (
                State::AfterCall {
                    gap,
                    closer: closer @ Closer::Semicolon,
                },
                ';',
            ) => {
                *closer = Closer::Nothing;
                gap.push(';');
                1
            }
            (State::Opened { raw: gap }, '[') | (State::AfterItem { gap }, ',') => {
                let mut raw = std::mem::take(gap);
                raw.push(next);
                self.open_call(raw, Place::Item);
                1
            }
            (State::AfterItem { .. }, ']') => {
                self.state = self.after_call(Place::Alone);
                1
            }
            (State::Opened { raw }, _) => {
                let raw = std::mem::take(raw);
                self.state = State::Name {
                    from: raw.len(),
                    raw,
                };
                0
            }
            (
                State::Start { gap, .. } | State::AfterItem { gap } | State::AfterCall { gap, .. },
                _,
            ) => {
                let gap = std::mem::take(gap);
                self.enter_text(&gap, sink);
                0
            }
            (
                State::Reasoning { .. }
                | State::Reasoned { .. }
                | State::Text { .. }
                | State::Name { .. }
                | State::Id { .. }
                | State::Call { .. },
                _,
            ) => unreachable!("only the states above have a gap"),
        }
    }

    /// Reads a marker; false where it means nothing and is to be read as text.
    pub(super) fn marker(&mut self, marker: Marker, sink: &mut Sink<'_>) -> bool {
        if self.openers().any(|opener| opener == marker) {
            return self.opener(marker, sink);
        }
        let (think, think_end) = self.think();
        match &mut self.state {
            State::Start { think: true, .. } if marker == think => {
                self.state = State::Reasoning {
                    opened: true,
                    newline: false,
                };
                true
            }
            State::Reasoning { .. } if marker == think_end => {
                self.state = State::Reasoned {
                    newlines: if framed(self.dialect) { 2 } else { 0 },
                };
                true
            }
            State::AfterCall {
                gap,
                closer: closer @ Closer::Tag,
            } if marker == Marker::ToolCallEnd => {
                gap.clear();
                *closer = Closer::Nothing;
                true
            }
            State::Name { raw, from } if matches!(marker, Marker::Args | Marker::CallId) => {
                let name = raw[*from..].to_owned();
                raw.push_str(marker.text());
                let raw = std::mem::take(raw);
                self.named(marker, raw, name, sink);
                true
            }
            State::Id { raw, name, .. } if marker == Marker::Args => {
                raw.push_str(marker.text());
                let (raw, name) = (std::mem::take(raw), std::mem::take(name));
                self.named(marker, raw, name, sink);
                true
            }
            State::Call { call, .. } if !call.in_string() => {
                // No JSON goes on with a marker, though `[` alone might.
                self.give_up(sink);
                false
            }
            State::Start { .. }
            | State::Reasoning { .. }
            | State::Reasoned { .. }
            | State::Text { .. }
            | State::Opened { .. }
            | State::Name { .. }
            | State::Id { .. }
            | State::Call { .. }
            | State::AfterItem { .. }
            | State::AfterCall { .. } => false,
        }
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        if let State::Reasoning { newline: true, .. } = self.state {
            sink.reasoning("\n");
        }
        self.give_up(sink);
        if let State::Text { newline: true } = self.state {
            sink.text("\n");
        }
        self.state = State::Text { newline: false };
    }

    /// Reads the marker that opens calls.
    fn opener(&mut self, marker: Marker, sink: &mut Sink<'_>) -> bool {
        let mut raw = match &mut self.state {
            State::Reasoning { .. } => return false,
            State::Call { call, .. } if call.in_string() => return false,
            State::Text { .. } if self.dialect == Dialect::Llama3 => return false,
            State::AfterItem { gap } | State::AfterCall { gap, .. } => std::mem::take(gap),
            State::Start { gap, .. } if self.dialect == Dialect::Llama3 => std::mem::take(gap),
            State::Text { newline } => held(newline),
            State::Reasoned { .. } => String::new(),
            State::Start { .. }
            | State::Opened { .. }
            | State::Name { .. }
            | State::Id { .. }
            | State::Call { .. } => {
                // What was open is text, and may end in the newline that belongs to this marker.
                self.give_up(sink);
                if let State::Text { newline } = &mut self.state
                    && self.dialect != Dialect::Llama3
                {
                    held(newline)
                } else {
                    return false;
                }
            }
        };
        raw.push_str(marker.text());
        if self.dialect == Dialect::Mistral {
            self.state = State::Opened { raw };
        } else {
            self.open_call(raw, Place::Alone);
        }
        true
    }

    /// Goes on after a name of mistral's, at `[CALL_ID]` or `[ARGS]`.
    fn named(&mut self, marker: Marker, raw: String, name: String, sink: &mut Sink<'_>) {
        if marker == Marker::CallId {
            self.state = State::Id {
                from: raw.len(),
                raw,
                name,
            };
        } else if sink.begin(&name) {
            self.state = State::Call {
                call: Box::new(Call::bare(raw)),
                place: Place::Alone,
            };
        } else {
            self.enter_text(&raw, sink);
        }
    }

    fn open_call(&mut self, raw: String, place: Place) {
        self.state = State::Call {
            call: Box::new(Call::object(raw)),
            place,
        };
    }

    fn after_call(&self, place: Place) -> State {
        let gap = String::new();
        match (place, self.dialect) {
            (Place::Item, _) => State::AfterItem { gap },
            (Place::Alone, Dialect::Hermes) => State::AfterCall {
                gap,
                closer: Closer::Tag,
            },
            (Place::Alone, Dialect::Llama3) => State::AfterCall {
                gap,
                closer: Closer::Semicolon,
            },
            (Place::Alone, Dialect::Mistral | Dialect::Plain) => State::AfterCall {
                gap,
                closer: Closer::Nothing,
            },
        }
    }

    /// Hands out what is held back before or in a call as text, and goes on in the text. After a call that is whole,
    /// what is held back is format.
    fn give_up(&mut self, sink: &mut Sink<'_>) {
        match std::mem::replace(&mut self.state, State::Text { newline: false }) {
            State::Start { gap: raw, .. }
            | State::Opened { raw }
            | State::Name { raw, .. }
            | State::Id { raw, .. } => self.enter_text(&raw, sink),
            State::Call { call, .. } => {
                if let Some(raw) = call.fail(sink) {
                    self.enter_text(&raw, sink);
                }
            }
            State::Text { newline } => self.state = State::Text { newline },
            State::Reasoning { .. }
            | State::Reasoned { .. }
            | State::AfterItem { .. }
            | State::AfterCall { .. } => {}
        }
    }

    fn enter_text(&mut self, raw: &str, sink: &mut Sink<'_>) {
        self.state = State::Text { newline: false };
        if !raw.is_empty() {
            self.text(raw, sink);
        }
    }

    /// The markers around reasoning.
    fn think(&self) -> (Marker, Marker) {
        match self.dialect {
            Dialect::Hermes | Dialect::Llama3 | Dialect::Plain => (Marker::Think, Marker::ThinkEnd),
            Dialect::Mistral => (Marker::BracketThink, Marker::BracketThinkEnd),
        }
    }

    /// The marker that opens calls, if there is one and any tool to call.
    fn openers(&self) -> impl Iterator<Item = Marker> + use<> {
        let opener = match self.dialect {
            Dialect::Hermes => Some(Marker::ToolCall),
            Dialect::Llama3 => Some(Marker::PythonTag),
            Dialect::Mistral => Some(Marker::ToolCalls),
            Dialect::Plain => None,
        };
        opener.filter(|_| self.calls).into_iter()
    }

    /// The marker that closes a call.
    fn tag(&self) -> Option<Marker> {
        (self.dialect == Dialect::Hermes).then_some(Marker::ToolCallEnd)
    }
}

/// Whether newlines around reasoning belong to its markers.
fn framed(dialect: Dialect) -> bool {
    match dialect {
        Dialect::Hermes | Dialect::Llama3 | Dialect::Plain => true,
        Dialect::Mistral => false,
    }
}

/// The state after reasoning.
fn start() -> State {
    State::Start {
        gap: String::new(),
        think: false,
    }
}

/// Hands out what was held back and `text`, except for a newline at its end, which is held back instead.
fn hold_newline(newline: &mut bool, text: &str, mut emit: impl FnMut(&str)) {
    if text.is_empty() {
        return;
    }
    if *newline {
        emit("\n");
    }
    let rest = text.strip_suffix('\n');
    *newline = rest.is_some();
    emit(rest.unwrap_or(text));
}

/// Takes the newline that is held back.
fn held(newline: &mut bool) -> String {
    if std::mem::take(newline) {
        "\n".to_owned()
    } else {
        String::new()
    }
}
