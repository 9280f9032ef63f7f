//! A model's output, piece by piece, into reasoning, text and calls.
//!
//! A [`Parser`] is fed what the tokenizer makes of the sampled tokens, in [`Piece`]s, and hands out [`Parsed`] events
//! as early as they are certain. What it hands out, with adjacent deltas of one kind joined, does not depend on where
//! the text was cut. Nothing is lost: what is not reasoning, text or the arguments of a call is a marker of the
//! family, the JSON around a call's arguments, or whitespace of which the family says below that it is format.
//!
//! A marker that is an added token of the tokenizer is found as [`Piece::Special`] only, so that text which merely
//! spells it, such as a quotation from a user, cannot open a call. Another is found in the text.
//!
//! | family | reasoning | calls | format, hence not in the text |
//! |---|---|---|---|
//! | hermes | `<think>\n…\n</think>\n\n` | `\n<tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>`, repeated | one newline before the first `<tool_call>`, all whitespace between calls and after the last |
//! | llama3 | as hermes | `{"name": "f", "parameters": {…}}`, only where the answer begins with it or with `<\|python_tag\|>`; more of them after `;` or whitespace | whitespace before the first call, whitespace and `;` after one |
//! | mistral | `[THINK]…[/THINK]` | `[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]` or `[TOOL_CALLS]f[ARGS]{…}`, repeated | whitespace between calls and after the last |
//! | harmony | the channel `analysis` | a message `to=functions.f` | message headers, whitespace between messages and around arguments |
//! | plain | as hermes | none | |
//!
//! A block of reasoning is looked for only where the answer begins, whitespace before it is format, and of the
//! newlines shown at most that many are taken away. It ends at its end marker alone: a call inside it is reasoning.
//! Whitespace that would be format is text after all where an ordinary character or the end follows, except after a
//! call. The keys `arguments` and `parameters` mean the same in both JSON forms, and `name` may come after them.
//!
//! # Calls that are none
//!
//! A call is announced by `CallBegin` once its name is known and is that of a tool; before that, what turns out to
//! be no call is text. A call that was announced ends either in `CallEnd`, at the byte that makes it whole, or in
//! `CallBroken`, at the byte that can be in no call or at the end of the output. What follows either is read as text
//! again.
//!
//! # Limits
//!
//! What is held back is bounded: runs of whitespace by 256 bytes, a name by 64 bytes, what surrounds a call's
//! arguments by 4 KiB, arguments that come before their name by 1 MiB. What is longer is text. Arguments nest
//! at most 126 deep. The work is linear in the output, and nothing recurses over it.

mod call;
mod format;
mod grammar;
mod harmony;
mod json;
mod marker;
mod tagged;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rand::distr::{Alphanumeric, SampleString};

use harmony::Harmony;
use marker::{Lexeme, Lexer, Marker};
use tagged::{Dialect, Tagged};

pub use grammar::{Calls, Demand, Grammar, NoGrammar};
pub use marker::Markers;

/// The most whitespace that is held back because it may be format, in bytes.
const GAP_BYTES_MAX: usize = 256;

/// How much text is read at once, in bytes. It bounds what is looked at twice where a call begins or ends.
const SLICE_BYTES: usize = 1 << 10;

/// One piece of detokenised output, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// The text of an added token (`<tool_call>`, `<|im_end|>`), whole.
    Special(&'a str),
    /// Ordinary text, cut anywhere between characters.
    Text(&'a str),
}

/// What a parser found, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// More reasoning; never empty.
    Reasoning(String),
    /// More text; never empty.
    Text(String),
    /// A call begins. Its arguments follow, then `CallEnd` or `CallBroken`, with nothing else in between.
    CallBegin {
        /// The name of the tool.
        name: String,
    },
    /// More of the arguments; never empty.
    CallArguments(String),
    /// The call is whole: the arguments are one JSON object.
    CallEnd {
        /// The arguments, byte for byte as the model wrote them: all `CallArguments` since `CallBegin`.
        arguments: String,
    },
    /// The call that began is malformed, and to be shown as text.
    CallBroken {
        /// All that was taken for the call, as the model wrote it, with the markers and whitespace before it.
        raw: String,
    },
}

/// How models write reasoning and calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// ChatML and Qwen: `<tool_call>` around JSON.
    Hermes,
    /// Llama 3: bare JSON.
    Llama3,
    /// Mistral: `[TOOL_CALLS]`.
    Mistral,
    /// gpt-oss: channels.
    Harmony,
    /// Text and `<think>`; no calls.
    Plain,
}

/// What a parser has to know about a response.
#[derive(Debug, Clone)]
pub struct ParserOptions {
    /// Whether markers of reasoning are looked for. Harmony always has its channels.
    pub reasoning: bool,
    /// Whether the prompt has opened the reasoning, see [`Family::reasoning_opened`], so that the output begins inside
    /// it. Only with `reasoning`, or in harmony.
    pub in_reasoning: bool,
    /// The names that may be called. A call of another is text, as is every call where this is empty.
    pub tools: Arc<HashSet<String>>,
    /// Which markers are added tokens. These are recognised as [`Piece::Special`] only, others in text only.
    pub markers_added: Markers,
    /// The added tokens at which the engine stops, such as `<|im_end|>`. One of them is dropped where it is the last
    /// piece, and text elsewhere. Markers of the family need not be named.
    pub end_tokens: Arc<HashSet<String>>,
}

/// What a model has to say in one turn.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// The reasoning; empty is written as none.
    pub reasoning: Option<String>,
    /// The text; may be empty.
    pub text: String,
    /// The calls, each a name and its arguments as JSON text.
    pub calls: Vec<(String, String)>,
}

/// A segment of what a model would write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormattedPiece {
    /// An added token.
    Special(String),
    /// Ordinary text.
    Text(String),
}

/// The name names no family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a family of output formats: expected hermes, llama3, mistral, harmony or plain")]
pub struct UnknownFamily;

impl Family {
    /// All families.
    pub const ALL: [Self; 5] = [
        Self::Hermes,
        Self::Llama3,
        Self::Mistral,
        Self::Harmony,
        Self::Plain,
    ];

    /// The family of a model, by the text of its chat template and the added tokens of its tokenizer. A model that
    /// writes calls in a form of its own (XML inside `<tool_call>`, say) is plain: its calls are text.
    pub fn detect(template: &str, is_added: &dyn Fn(&str) -> bool) -> Self {
        let names = |text: &str| template.contains(text);
        let channels = [Marker::Channel, Marker::Message].map(Marker::text);
        if channels.into_iter().all(names) || channels.into_iter().all(is_added) {
            // A harmony model is unreadable without its parser, even where a plainer template was put in.
            Self::Harmony
        } else if names(Marker::ToolCalls.text()) {
            Self::Mistral
        } else if names(Marker::ToolCall.text()) && !names("<function=") && !names("<arg_key>") {
            Self::Hermes
        } else if names("<|start_header_id|>") && names("\"parameters\"") {
            Self::Llama3
        } else {
            Self::Plain
        }
    }

    /// The name, as in configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama3 => "llama3",
            Self::Mistral => "mistral",
            Self::Harmony => "harmony",
            Self::Plain => "plain",
        }
    }

    /// A parser of one output.
    pub fn parser(self, options: ParserOptions) -> Parser {
        let machine = match self {
            Self::Hermes => Machine::Tagged(Tagged::new(Dialect::Hermes, &options)),
            Self::Llama3 => Machine::Tagged(Tagged::new(Dialect::Llama3, &options)),
            Self::Mistral => Machine::Tagged(Tagged::new(Dialect::Mistral, &options)),
            Self::Plain => Machine::Tagged(Tagged::new(Dialect::Plain, &options)),
            Self::Harmony => Machine::Harmony(Harmony::new(&options)),
        };
        Parser {
            machine,
            lexer: Lexer::default(),
            specials: self.markers().and(options.markers_added),
            added: options.markers_added,
            tools: options.tools,
            end_tokens: options.end_tokens,
            ending: None,
        }
    }

    /// What a model of this family would write for `answer`: a parser makes the same answer of it, provided that the
    /// text does not spell markers that are no added tokens. Markers that `is_added` become special pieces.
    ///
    /// The token that ends the turn is left out; it is the engine's to add. In harmony that is also the marker which
    /// ends the last message, `<|call|>` or `<|return|>`. Where a family has no place for a part of the answer, the
    /// part is left out, as its templates do: text beside calls in llama3, calls in plain.
    pub fn format(self, answer: &Answer, is_added: &dyn Fn(&str) -> bool) -> Vec<FormattedPiece> {
        format::format(self, answer, is_added)
    }

    /// A new id for a call, in the form that the family's templates accept: 9 letters and digits for mistral, `call_`
    /// and 24 of them for others.
    pub fn call_id(self) -> String {
        let random = |length| Alphanumeric.sample_string(&mut rand::rng(), length);
        match self {
            Self::Mistral => random(9),
            Self::Hermes | Self::Llama3 | Self::Harmony | Self::Plain => {
                format!("call_{}", random(24))
            }
        }
    }

    /// Whether the prompt, of which this is the end, has opened the reasoning for the model.
    pub fn reasoning_opened(self, prompt_tail: &str) -> bool {
        let tail = prompt_tail.trim_end();
        match self {
            Self::Hermes | Self::Llama3 | Self::Plain => tail.ends_with(Marker::Think.text()),
            Self::Mistral => tail.ends_with(Marker::BracketThink.text()),
            Self::Harmony => tail.ends_with("<|channel|>analysis<|message|>"),
        }
    }

    /// The markers that mean something in this family.
    fn markers(self) -> Markers {
        match self {
            Self::Hermes => Markers::of(&[
                Marker::Think,
                Marker::ThinkEnd,
                Marker::ToolCall,
                Marker::ToolCallEnd,
            ]),
            Self::Llama3 => Markers::of(&[Marker::Think, Marker::ThinkEnd, Marker::PythonTag]),
            Self::Mistral => Markers::of(&[
                Marker::BracketThink,
                Marker::BracketThinkEnd,
                Marker::ToolCalls,
                Marker::CallId,
                Marker::Args,
            ]),
            Self::Harmony => Markers::of(&[
                Marker::Start,
                Marker::Channel,
                Marker::Constrain,
                Marker::Message,
                Marker::End,
                Marker::Call,
                Marker::Return,
            ]),
            Self::Plain => Markers::of(&[Marker::Think, Marker::ThinkEnd]),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Family {
    type Err = UnknownFamily;

    fn from_str(name: &str) -> Result<Self, UnknownFamily> {
        Self::ALL
            .into_iter()
            .find(|family| family.as_str() == name)
            .ok_or(UnknownFamily)
    }
}

/// The reading of one output. Made by [`Family::parser`], fed by [`Parser::push`], ended by [`Parser::finish`].
#[derive(Debug)]
pub struct Parser {
    machine: Machine,
    lexer: Lexer,
    /// The markers of the family that are added tokens.
    specials: Markers,
    added: Markers,
    tools: Arc<HashSet<String>>,
    end_tokens: Arc<HashSet<String>>,
    /// A token that ends the turn if nothing follows it.
    ending: Option<String>,
}

#[derive(Debug)]
enum Machine {
    Tagged(Tagged),
    Harmony(Harmony),
}

impl Parser {
    /// Reads the next piece and appends what is certain now. Never more than one event of one kind in a row is
    /// appended, and events that were in `out` before are left as they are.
    pub fn push(&mut self, piece: Piece<'_>, out: &mut Vec<Parsed>) {
        if matches!(piece, Piece::Text("") | Piece::Special("")) {
            return;
        }
        let mut sink = Sink::new(out, &self.tools);
        if let Some(token) = self.ending.take() {
            self.machine.verbatim(&token, &mut sink);
        }
        match piece {
            Piece::Text(text) => {
                self.machine
                    .lex(&mut self.lexer, self.added, text, &mut sink);
            }
            Piece::Special(token) => {
                let held = self.lexer.release();
                self.machine.verbatim(&held, &mut sink);
                if let Some(marker) = self.specials.find(token) {
                    self.machine.marker(marker, &mut sink);
                } else if self.end_tokens.contains(token) {
                    self.ending = Some(token.to_owned());
                } else {
                    self.machine.verbatim(token, &mut sink);
                }
            }
        }
    }

    /// Ends the output: hands out what was held back, and an unfinished call as broken or text. What is pushed after
    /// that is text.
    pub fn finish(&mut self, out: &mut Vec<Parsed>) {
        let mut sink = Sink::new(out, &self.tools);
        self.ending = None;
        let held = self.lexer.release();
        self.machine.verbatim(&held, &mut sink);
        self.machine.finish(&mut sink);
    }
}

/// Both machines answer to the same events. What is held back as a possible marker stays readable as text in every
/// state that text can lead to: the markers active there are a part of those active before.
impl Machine {
    /// Reads text with the markers in it that are not in `added`.
    fn lex(&mut self, lexer: &mut Lexer, added: Markers, text: &str, sink: &mut Sink<'_>) {
        let mut rest = text;
        while !rest.is_empty() {
            let mut slice = &rest[..rest.floor_char_boundary(SLICE_BYTES)];
            rest = &rest[slice.len()..];
            while !slice.is_empty() {
                let (lexeme, mut used) = lexer.next(self.active().without(added), slice);
                match lexeme {
                    Lexeme::Text(run) => used = self.text(run, sink),
                    Lexeme::Released(run) => self.verbatim(&run, sink),
                    Lexeme::Marker(marker) => self.marker(marker, sink),
                    Lexeme::Held => {}
                }
                slice = &slice[used..];
            }
        }
    }

    /// The markers that mean something in this state.
    fn active(&self) -> Markers {
        match self {
            Self::Tagged(machine) => machine.active(),
            Self::Harmony(machine) => machine.active(),
        }
    }

    /// Reads the beginning of some text in which there is no active marker, and says how many bytes that was; where it
    /// was none, the state has changed.
    fn text(&mut self, text: &str, sink: &mut Sink<'_>) -> usize {
        match self {
            Self::Tagged(machine) => machine.text(text, sink),
            Self::Harmony(machine) => machine.text(text, sink),
        }
    }

    /// Reads text in which no markers are to be found.
    fn verbatim(&mut self, text: &str, sink: &mut Sink<'_>) {
        let mut rest = text;
        while !rest.is_empty() {
            rest = &rest[self.text(rest, sink)..];
        }
    }

    fn marker(&mut self, marker: Marker, sink: &mut Sink<'_>) {
        let taken = match self {
            Self::Tagged(machine) => machine.marker(marker, sink),
            Self::Harmony(machine) => machine.marker(marker, sink),
        };
        if !taken {
            self.verbatim(marker.text(), sink);
        }
    }

    fn finish(&mut self, sink: &mut Sink<'_>) {
        match self {
            Self::Tagged(machine) => machine.finish(sink),
            Self::Harmony(machine) => machine.finish(sink),
        }
    }
}

/// Where one push puts its events; joins adjacent deltas.
struct Sink<'a> {
    out: &'a mut Vec<Parsed>,
    /// How many events were there before this push; they are left as they are.
    before: usize,
    tools: &'a HashSet<String>,
}

impl<'a> Sink<'a> {
    fn new(out: &'a mut Vec<Parsed>, tools: &'a HashSet<String>) -> Self {
        Self {
            before: out.len(),
            out,
            tools,
        }
    }

    fn push(&mut self, event: Parsed) {
        self.out.push(event);
    }

    fn text(&mut self, delta: &str) {
        if let Some(Parsed::Text(text)) = self.out[self.before..].last_mut() {
            text.push_str(delta);
        } else if !delta.is_empty() {
            self.push(Parsed::Text(delta.to_owned()));
        }
    }

    fn reasoning(&mut self, delta: &str) {
        if let Some(Parsed::Reasoning(text)) = self.out[self.before..].last_mut() {
            text.push_str(delta);
        } else if !delta.is_empty() {
            self.push(Parsed::Reasoning(delta.to_owned()));
        }
    }

    fn arguments(&mut self, delta: &str) {
        if let Some(Parsed::CallArguments(text)) = self.out[self.before..].last_mut() {
            text.push_str(delta);
        } else if !delta.is_empty() {
            self.push(Parsed::CallArguments(delta.to_owned()));
        }
    }

    /// Announces a call if there is a tool of that name.
    fn begin(&mut self, name: &str) -> bool {
        let known = self.tools.contains(name);
        if known {
            self.push(Parsed::CallBegin {
                name: name.to_owned(),
            });
        }
        known
    }
}

/// How many bytes of whitespace the text begins with.
fn leading_whitespace(text: &str) -> usize {
    text.bytes()
        .take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'))
        .count()
}
