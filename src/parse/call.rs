//! One call while it is being written.

use super::json::{Event, Scanner};
use super::{Parsed, Sink};

/// The longest name of a tool that is recognised, in bytes as written.
pub(super) const NAME_BYTES_MAX: usize = 64;

/// The most bytes that a call may have beside its arguments.
pub(super) const HEADER_BYTES_MAX: usize = 4 << 10;

/// The most bytes of arguments that are held back because the model writes them before the name. A call whose
/// arguments come first and are longer is text.
pub(super) const ARGUMENTS_HELD_BYTES_MAX: usize = 1 << 20;

/// A call from its opening marker on.
///
/// ```text
/// object:  {"name": "f" ─CallBegin─ , "arguments": {…} ─CallArguments…─ } ─CallEnd─
///          {"arguments": {…}, "name": "f" ─CallBegin, CallArguments─ } ─CallEnd─
/// bare:    ─CallBegin─ {…} ─CallArguments…, CallEnd─
/// ```
#[derive(Debug)]
pub(super) struct Call {
    /// Everything of the call as it was written, with the opening marker and the whitespace before it.
    raw: String,
    scanner: Scanner,
    shape: Shape,
    /// Whether `CallBegin` was handed out.
    begun: bool,
    arguments: Arguments,
    /// How many bytes of the object are not arguments.
    header_bytes: usize,
}

/// What the JSON object is.
#[derive(Debug)]
enum Shape {
    /// The arguments themselves; the name came before.
    Bare,
    /// An object with the members `name` and `arguments`, in any order.
    Object(Member),
}

/// The member that is being read, of the object's own.
#[derive(Debug, Clone, Copy)]
enum Member {
    /// Between members, or in the name of one; a string that is being read began here in `raw`.
    Unknown {
        from: usize,
    },
    /// The name, whose string began here in `raw`.
    Name {
        from: usize,
    },
    Arguments,
    /// One that means nothing here, such as `id`.
    Other,
}

/// Where the arguments are in `raw`, and up to where they were handed out.
#[derive(Debug, Clone, Copy)]
enum Arguments {
    Ahead,
    Open { from: usize, sent: usize },
    Whole { from: usize, sent: usize, to: usize },
}

/// How far a call has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It goes on.
    More,
    /// It is whole, and `CallEnd` was handed out.
    Ended,
    /// It is none: [`Call::fail`] it.
    Failed,
}

impl Call {
    /// A call that is an object with a name and arguments. `raw` is what came before the object.
    pub(super) fn object(raw: String) -> Self {
        Self::new(raw, Shape::Object(Member::Unknown { from: 0 }))
    }

    /// A call that was announced and whose object is the arguments. `raw` is what came before the object.
    pub(super) fn bare(raw: String) -> Self {
        Self {
            begun: true,
            ..Self::new(raw, Shape::Bare)
        }
    }

    fn new(raw: String, shape: Shape) -> Self {
        Self {
            raw,
            scanner: Scanner::new(),
            shape,
            begun: false,
            arguments: Arguments::Ahead,
            header_bytes: 0,
        }
    }

    /// Whether the next byte is inside a string.
    pub(super) fn in_string(&self) -> bool {
        self.scanner.in_string()
    }

    /// Reads `text` up to the end of the call or the byte that makes it none, and says how many bytes that were.
    /// The offending byte is not used.
    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) -> (usize, Progress) {
        let base = self.raw.len();
        self.raw.push_str(text);
        for (index, byte) in text.bytes().enumerate() {
            let progress = self.byte(base + index, byte, sink);
            if progress == Progress::More {
                continue;
            }
            let used = match progress {
                Progress::Ended => index + 1,
                // Only an ASCII byte or the first of a character can offend, so this is a character boundary.
                Progress::More | Progress::Failed => index,
            };
            self.raw.truncate(base + used);
            self.send(sink);
            if progress == Progress::Ended
                && let Arguments::Whole { from, to, .. } = self.arguments
            {
                sink.push(Parsed::CallEnd {
                    arguments: self.raw[from..to].to_owned(),
                });
            }
            return (used, progress);
        }
        self.send(sink);
        (text.len(), Progress::More)
    }

    /// Gives the call up. A call that was announced is handed out as broken; the text of another is returned.
    pub(super) fn fail(self, sink: &mut Sink<'_>) -> Option<String> {
        if self.begun {
            sink.push(Parsed::CallBroken { raw: self.raw });
            None
        } else {
            Some(self.raw)
        }
    }

    /// Reads the byte that is at `at` in `raw`.
    fn byte(&mut self, at: usize, byte: u8, sink: &mut Sink<'_>) -> Progress {
        let Ok(event) = self.scanner.push(byte) else {
            return Progress::Failed;
        };
        let progress = match self.shape {
            Shape::Bare => self.bare_event(event, at),
            Shape::Object(member) => self.object_event(member, event, at, sink),
        };
        if progress == Progress::More && self.over_limit(at) {
            return Progress::Failed;
        }
        progress
    }

    fn bare_event(&mut self, event: Event, at: usize) -> Progress {
        match (event, self.scanner.depth()) {
            (Event::Open, 1) => self.open_arguments(at),
            (Event::Close, 0) => {
                self.close_arguments(at);
                return Progress::Ended;
            }
            _ => {}
        }
        Progress::More
    }

    fn object_event(
        &mut self,
        member: Member,
        event: Event,
        at: usize,
        sink: &mut Sink<'_>,
    ) -> Progress {
        let next = match (event, self.scanner.depth(), member) {
            (Event::KeyBegin, 1, _) => Some(Member::Unknown { from: at }),
            (Event::KeyEnd, 1, Member::Unknown { from }) => self.member(from + 1, at),
            (Event::StringBegin, 1, Member::Name { .. }) => Some(Member::Name { from: at }),
            (Event::StringEnd, 1, Member::Name { from }) => {
                self.begin(from, at, sink).then_some(Member::Other)
            }
            (Event::Scalar, 1, Member::Name { .. })
            | (Event::Open, 2, Member::Name { .. })
            | (Event::StringBegin | Event::Scalar, 1, Member::Arguments) => None,
            (Event::Open, 2, Member::Arguments) => (self.raw.as_bytes()[at] == b'{').then(|| {
                self.open_arguments(at);
                Member::Arguments
            }),
            (Event::Close, 1, Member::Arguments) => {
                self.close_arguments(at);
                Some(Member::Other)
            }
            (Event::Close, 0, _) => {
                return if self.begun && matches!(self.arguments, Arguments::Whole { .. }) {
                    Progress::Ended
                } else {
                    Progress::Failed
                };
            }
            _ => Some(member),
        };
        let Some(next) = next else {
            return Progress::Failed;
        };
        self.shape = Shape::Object(next);
        Progress::More
    }

    /// What the member is whose name is written between `from` and `to`. Before the call is announced only what
    /// calls are known to have is let through, so that an answer that merely is JSON is not held back for long.
    fn member(&self, from: usize, to: usize) -> Option<Member> {
        match &self.raw[from..to] {
            "name" => (!self.begun).then_some(Member::Name { from: to }),
            "arguments" | "parameters" => {
                matches!(self.arguments, Arguments::Ahead).then_some(Member::Arguments)
            }
            "id" | "type" => Some(Member::Other),
            _ => self.begun.then_some(Member::Other),
        }
    }

    /// Announces the call whose name is the string written from `from` to `to`, if there is such a tool.
    fn begin(&mut self, from: usize, to: usize, sink: &mut Sink<'_>) -> bool {
        let Ok(name) = serde_json::from_str::<String>(&self.raw[from..=to]) else {
            return false;
        };
        self.begun = sink.begin(&name);
        self.begun
    }

    fn open_arguments(&mut self, at: usize) {
        self.arguments = Arguments::Open { from: at, sent: at };
    }

    fn close_arguments(&mut self, at: usize) {
        if let Arguments::Open { from, sent } = self.arguments {
            self.arguments = Arguments::Whole {
                from,
                sent,
                to: at + 1,
            };
        }
    }

    /// Whether the call, read up to `at`, is longer than a call may be.
    fn over_limit(&mut self, at: usize) -> bool {
        if let Arguments::Open { from, .. } = self.arguments {
            return !self.begun && at - from >= ARGUMENTS_HELD_BYTES_MAX;
        }
        self.header_bytes += 1;
        let name_too_long = match self.shape {
            Shape::Object(Member::Name { from }) => {
                self.scanner.in_string() && at - from > NAME_BYTES_MAX
            }
            Shape::Object(Member::Unknown { .. } | Member::Arguments | Member::Other)
            | Shape::Bare => false,
        };
        self.header_bytes > HEADER_BYTES_MAX || name_too_long
    }

    /// Hands out the arguments that have come and were not handed out.
    fn send(&mut self, sink: &mut Sink<'_>) {
        if !self.begun {
            return;
        }
        match &mut self.arguments {
            Arguments::Ahead => {}
            Arguments::Open { sent, .. } => {
                sink.arguments(&self.raw[*sent..]);
                *sent = self.raw.len();
            }
            Arguments::Whole { sent, to, .. } => {
                sink.arguments(&self.raw[*sent..*to]);
                *sent = *to;
            }
        }
    }
}
