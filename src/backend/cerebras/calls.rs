//! Deltas of text, reasoning and calls, in any order, into what [`Parsed`] promises: a call is
//! whole before anything else comes.
//!
//! Services send the arguments of several calls by index, perhaps in turns. What may not be said
//! yet waits in a queue behind the call that is open. A call ends at the byte that closes its
//! object, and so before the service says that it does.
//!
//! ```text
//!   delta ── queue: [open call] [text] [call] … ── drain ── Parsed
//! ```

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use serde::de::IgnoredAny;

use super::wire::CallDelta;
use crate::parse::Parsed;

/// The most calls of one answer.
const CALLS_MAX: usize = 128;

/// The most bytes that wait, and the most that the arguments of one call have.
const HELD_BYTES_MAX: usize = 8 << 20;

/// How deep arguments may nest.
const DEPTH_MAX: u8 = 126;

/// A limit was passed. For people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooMuch(pub(super) &'static str);

/// Puts an answer in order.
#[derive(Debug)]
pub(super) struct Assembler {
    queue: VecDeque<Said>,
    /// Calls that are over, by index, with their ids.
    over: Vec<(u32, String)>,
    /// Names that may be called.
    tools: Arc<HashSet<String>>,
    /// Calls end when the answer does: behind the first one nothing may be read, and what it cost
    /// is told with the end.
    holds: bool,
    calls: usize,
}

#[derive(Debug)]
enum Said {
    Reasoning(String),
    Text(String),
    Call(Call),
}

#[derive(Debug)]
struct Call {
    index: u32,
    id: String,
    name: String,
    arguments: String,
    /// How much of the arguments was handed out. `None`: the call was not announced.
    shown: Option<usize>,
    scan: Scan,
}

/// How far the arguments are one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scan {
    Before,
    Inside {
        depth: u8,
        string: bool,
        escaped: bool,
    },
    Whole,
    /// They are none, whatever comes.
    Broken,
}

impl Assembler {
    pub(super) fn new(tools: Arc<HashSet<String>>, holds: bool) -> Self {
        Self {
            queue: VecDeque::new(),
            over: Vec::new(),
            tools,
            holds,
            calls: 0,
        }
    }

    pub(super) fn reasoning(&mut self, delta: &str) {
        match self.queue.back_mut() {
            Some(Said::Reasoning(text)) => text.push_str(delta),
            Some(Said::Text(_) | Said::Call(_)) | None if delta.is_empty() => {}
            Some(Said::Text(_) | Said::Call(_)) | None => {
                self.queue.push_back(Said::Reasoning(delta.to_owned()));
            }
        }
    }

    pub(super) fn text(&mut self, delta: &str) {
        match self.queue.back_mut() {
            Some(Said::Text(text)) => text.push_str(delta),
            Some(Said::Reasoning(_) | Said::Call(_)) | None if delta.is_empty() => {}
            Some(Said::Reasoning(_) | Said::Call(_)) | None => {
                self.queue.push_back(Said::Text(delta.to_owned()));
            }
        }
    }

    /// Takes a piece of a call.
    ///
    /// An index that has a call already goes on with it, unless both an id and a name come that
    /// it does not have: there are services that give all their calls one index.
    pub(super) fn call(&mut self, delta: CallDelta) -> Result<(), TooMuch> {
        let index = delta.index.unwrap_or(0);
        let id = delta.id.unwrap_or_default();
        let function = delta.function.unwrap_or_default();
        let name = function.name.unwrap_or_default();
        let arguments = function.arguments.unwrap_or_default();
        let another =
            |known: &str| !id.is_empty() && !known.is_empty() && !name.is_empty() && known != id;
        let open = self.queue.iter_mut().rev().find_map(|said| match said {
            Said::Call(call) if call.index == index => Some(call),
            Said::Call(_) | Said::Reasoning(_) | Said::Text(_) => None,
        });
        let rest = match open {
            Some(call) if !another(&call.id) => {
                if call.id.is_empty() {
                    call.id = id;
                }
                if call.name.is_empty() {
                    call.name = name;
                }
                call.push(&arguments)
            }
            None if let Some((_, known)) = self.over.iter().find(|(over, _)| *over == index)
                && !another(known) =>
            {
                arguments.as_str()
            }
            Some(_) | None => {
                self.calls += 1;
                if self.calls > CALLS_MAX {
                    return Err(TooMuch("there are over 128 calls"));
                }
                let mut call = Call {
                    index,
                    id,
                    name,
                    arguments: String::new(),
                    shown: None,
                    scan: Scan::Before,
                };
                let rest = call.push(&arguments);
                self.queue.push_back(Said::Call(call));
                rest
            }
        };
        // What stands behind the end of a call is text, like in every other format.
        if !rest.trim_ascii().is_empty() {
            self.text(rest);
        }
        Ok(())
    }

    /// Hands out what is certain.
    pub(super) fn drain(&mut self, out: &mut Vec<Parsed>) -> Result<(), TooMuch> {
        while let Some(said) = self.queue.pop_front() {
            match said {
                Said::Reasoning(text) => out.push(Parsed::Reasoning(text)),
                Said::Text(text) => out.push(Parsed::Text(text)),
                Said::Call(mut call) => {
                    let known = self.tools.contains(&call.name);
                    if known {
                        call.show(out);
                    }
                    if call.scan != Scan::Whole || call.name.is_empty() || self.holds {
                        self.queue.push_front(Said::Call(call));
                        break;
                    }
                    self.over.retain(|(index, _)| *index != call.index);
                    self.over.push((call.index, call.id.clone()));
                    call.end(known, out);
                }
            }
        }
        let held = self.queue.iter().map(|said| match said {
            Said::Reasoning(text) | Said::Text(text) => text.len(),
            Said::Call(call) => call.arguments.len(),
        });
        if held.sum::<usize>() > HELD_BYTES_MAX {
            return Err(TooMuch("over 8 MiB of it cannot be told yet"));
        }
        Ok(())
    }

    /// The answer is over. `whole`: the model ended it, so that a call which is not closed is
    /// malformed. Else it was cut off, and such a call comes to nothing.
    pub(super) fn finish(&mut self, whole: bool, out: &mut Vec<Parsed>) {
        for said in self.queue.drain(..) {
            match said {
                Said::Reasoning(text) => out.push(Parsed::Reasoning(text)),
                Said::Text(text) => out.push(Parsed::Text(text)),
                Said::Call(mut call) => {
                    let known = self.tools.contains(&call.name);
                    if whole && call.arguments.is_empty() {
                        // Services write no arguments as none.
                        call.push("{}");
                    }
                    if known {
                        call.show(out);
                    }
                    if !whole && call.scan != Scan::Whole {
                        break;
                    }
                    call.end(known, out);
                }
            }
        }
    }
}

impl Call {
    /// Takes more of the arguments; gives what stands behind their end.
    fn push<'a>(&mut self, delta: &'a str) -> &'a str {
        let delta = match self.scan {
            // Whitespace around arguments is format.
            Scan::Before => delta.trim_ascii_start(),
            Scan::Inside { .. } | Scan::Whole | Scan::Broken => delta,
        };
        let taken = self.scan.push(delta.as_bytes());
        self.arguments.push_str(&delta[..taken]);
        &delta[taken..]
    }

    fn show(&mut self, out: &mut Vec<Parsed>) {
        let shown = self.shown.unwrap_or_else(|| {
            out.push(Parsed::CallBegin {
                name: self.name.clone(),
            });
            0
        });
        if shown < self.arguments.len() {
            out.push(Parsed::CallArguments(self.arguments[shown..].to_owned()));
        }
        self.shown = Some(self.arguments.len());
    }

    fn end(self, known: bool, out: &mut Vec<Parsed>) {
        let is_json = || serde_json::from_str::<IgnoredAny>(&self.arguments).is_ok();
        match known {
            true if self.scan == Scan::Whole && is_json() => out.push(Parsed::CallEnd {
                arguments: self.arguments,
            }),
            true => out.push(Parsed::CallBroken {
                raw: self.arguments,
            }),
            // No tool has the name: what the model wrote is text.
            false => out.push(Parsed::Text(format!("{}{}", self.name, self.arguments))),
        }
    }
}

impl Scan {
    /// Reads on; gives how many bytes belong to the object.
    fn push(&mut self, bytes: &[u8]) -> usize {
        for (at, byte) in bytes.iter().enumerate() {
            *self = match (*self, byte) {
                (Self::Whole, _) => return at,
                (Self::Broken, _) => return bytes.len(),
                (Self::Before, b'{') => Self::Inside {
                    depth: 1,
                    string: false,
                    escaped: false,
                },
                (Self::Before, _) => Self::Broken,
                (
                    Self::Inside {
                        depth,
                        string,
                        escaped,
                    },
                    byte,
                ) => inside(depth, string, escaped, *byte),
            };
        }
        bytes.len()
    }
}

fn inside(depth: u8, string: bool, escaped: bool, byte: u8) -> Scan {
    let at = |depth, string, escaped| Scan::Inside {
        depth,
        string,
        escaped,
    };
    match (string, byte) {
        (true, _) if escaped => at(depth, true, false),
        (true, b'\\') => at(depth, true, true),
        (true, b'"') => at(depth, false, false),
        (true, _) => at(depth, true, false),
        (false, b'"') => at(depth, true, false),
        (false, b'{' | b'[') if depth == DEPTH_MAX => Scan::Broken,
        (false, b'{' | b'[') => at(depth + 1, false, false),
        (false, b'}' | b']') if depth == 1 => Scan::Whole,
        (false, b'}' | b']') => at(depth - 1, false, false),
        (false, _) => at(depth, false, false),
    }
}

#[cfg(test)]
mod tests;
