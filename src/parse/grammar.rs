//! What a model may write: the output format of a family as a grammar, for engines that constrain
//! sampling.
//!
//! A [`Grammar`] is a structure and no text in some engine's language, so that each engine can say
//! it in its own. It allows one way of writing where the parser reads several: the way of
//! [`Family::format`]. Whatever it allows, the parser reads as what it is meant to be. In free text
//! no call can be opened but by the marker that the grammar has for it.

use std::sync::Arc;

use serde_json::Value;

use super::marker::Marker;
use super::{Family, ParserOptions};

/// What may be written, without the token that ends the turn.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// This text.
    Text(String),
    /// The added token of this content.
    Token(&'static str),
    /// JSON that keeps to this schema, which is JSON text.
    Json(Arc<str>),
    /// Any text. No added token is part of it.
    Free,
    /// Any text up to the first place where this one stands, that place included.
    Until(&'static str),
    /// Any text in which this one stands nowhere.
    Without(&'static str),
    /// Any text that does not begin with one of these characters, whitespace before it aside.
    Prose(&'static str),
    /// One after the other.
    Each(Vec<Grammar>),
    /// One of them.
    Either(Vec<Grammar>),
    /// At least `min` of it, one after the other, and at most `max` where there is a limit.
    Repeat {
        /// What is repeated.
        of: Box<Grammar>,
        /// How often at least.
        min: u32,
        /// How often at most.
        max: Option<u32>,
    },
}

/// What is asked of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// The schema that the text keeps to, as JSON text; `None`: it is free.
    pub json: Option<Arc<str>>,
    /// The calls, where any tool may be called.
    pub calls: Option<Calls>,
}

/// What is asked of calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calls {
    /// The tools that may be called, at least one: the name, and the schema of the arguments as JSON text.
    pub tools: Vec<(Arc<str>, Arc<str>)>,
    /// Whether there must be one.
    pub required: bool,
    /// Whether there may be several.
    pub parallel: bool,
}

/// Why a family cannot keep to what is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoGrammar {
    /// Its calls, if it writes any, are not known.
    #[error("the output format of this model has no calls")]
    NoCalls,
    /// Its text could be taken for a call.
    #[error("the output format of this model cannot tell JSON from a call")]
    JsonBesideCalls,
    /// Its markers are not added tokens, and it cannot be read without.
    #[error("the markers of this model's output format are no tokens of its vocabulary")]
    NoMarkers,
}

impl Family {
    /// What an answer may be that keeps to `demand`, where the output is read with `parsing`. Calls
    /// that need not be made are left out where the family has none.
    ///
    /// # Errors
    ///
    /// [`NoGrammar`], where the family cannot keep to it.
    pub fn grammar(self, parsing: &ParserOptions, demand: &Demand) -> Result<Grammar, NoGrammar> {
        let writer = Writer { parsing, demand };
        match self {
            Self::Hermes => writer.tagged(Marker::Think, Marker::ThinkEnd, Writer::hermes),
            Self::Llama3 => writer.tagged(Marker::Think, Marker::ThinkEnd, Writer::llama3),
            Self::Plain => writer.tagged(Marker::Think, Marker::ThinkEnd, Writer::plain),
            Self::Mistral => writer.tagged(
                Marker::BracketThink,
                Marker::BracketThinkEnd,
                Writer::mistral,
            ),
            Self::Harmony => writer.harmony(),
        }
    }
}

/// How many newlines belong to the end of reasoning.
const NEWLINES_AFTER_REASONING: u32 = 2;

struct Writer<'a> {
    parsing: &'a ParserOptions,
    demand: &'a Demand,
}

impl Writer<'_> {
    fn is_token(&self, marker: Marker) -> bool {
        self.parsing.markers_added.contains(marker)
    }

    fn marker(&self, marker: Marker) -> Grammar {
        if self.is_token(marker) {
            Grammar::Token(marker.text())
        } else {
            text(marker.text())
        }
    }

    /// Free text up to the marker, and the marker.
    fn free_up_to(&self, marker: Marker) -> Grammar {
        if self.is_token(marker) {
            Grammar::Each(vec![Grammar::Free, Grammar::Token(marker.text())])
        } else {
            Grammar::Until(marker.text())
        }
    }

    /// Free text without the marker.
    fn free_without(&self, marker: Marker) -> Grammar {
        if self.is_token(marker) {
            Grammar::Free
        } else {
            Grammar::Without(marker.text())
        }
    }

    /// An answer with reasoning before it, where the model may reason.
    fn tagged(
        &self,
        begin: Marker,
        end: Marker,
        answer: impl FnOnce(&Self) -> Result<Grammar, NoGrammar>,
    ) -> Result<Grammar, NoGrammar> {
        let answer = answer(self)?;
        if !self.parsing.reasoning {
            return Ok(answer);
        }
        let newlines = Grammar::Repeat {
            of: Box::new(text("\n")),
            min: 0,
            max: Some(NEWLINES_AFTER_REASONING),
        };
        let rest = Grammar::Each(vec![self.free_up_to(end), newlines]);
        let reasoning = if self.parsing.in_reasoning {
            rest
        } else {
            optional(Grammar::Each(vec![self.marker(begin), rest]))
        };
        Ok(Grammar::Each(vec![reasoning, answer]))
    }

    fn hermes(&self) -> Result<Grammar, NoGrammar> {
        let Some(calls) = &self.demand.calls else {
            return Ok(self.text());
        };
        let rest = Grammar::Each(vec![
            text("\n"),
            objects(calls, "arguments"),
            text("\n"),
            self.marker(Marker::ToolCallEnd),
        ]);
        self.marked(Marker::ToolCall, "\n", rest, calls)
    }

    fn mistral(&self) -> Result<Grammar, NoGrammar> {
        let Some(calls) = &self.demand.calls else {
            return Ok(self.text());
        };
        if self.is_token(Marker::Args) {
            let rest = each_tool(calls, |name, schema| {
                vec![
                    text(name),
                    Grammar::Token(Marker::Args.text()),
                    Grammar::Json(schema),
                ]
            });
            return self.marked(Marker::ToolCalls, "", rest, calls);
        }
        // One marker for all calls, which makes one array of them.
        let array = row(objects(calls, "arguments"), ", ", calls.parallel);
        let rest = Grammar::Each(vec![text("["), array, text("]")]);
        let once = Calls {
            parallel: false,
            ..calls.clone()
        };
        self.marked(Marker::ToolCalls, "", rest, &once)
    }

    /// Calls that each begin with a marker, in or instead of text.
    fn marked(
        &self,
        opener: Marker,
        between: &str,
        rest: Grammar,
        calls: &Calls,
    ) -> Result<Grammar, NoGrammar> {
        let json = match &self.demand.json {
            // A string in it could spell the marker.
            Some(_) if !self.is_token(opener) => return Err(NoGrammar::JsonBesideCalls),
            json => json.clone().map(Grammar::Json),
        };
        if json.is_none() && !calls.required {
            let in_text = Grammar::Repeat {
                of: Box::new(Grammar::Each(vec![self.free_up_to(opener), rest])),
                min: 0,
                max: (!calls.parallel).then_some(1),
            };
            return Ok(Grammar::Each(vec![in_text, self.free_without(opener)]));
        }
        let call = Grammar::Each(vec![self.marker(opener), rest]);
        let row = row(call, between, calls.parallel);
        Ok(match json {
            Some(json) if !calls.required => Grammar::Either(vec![json, row]),
            Some(_) | None => row,
        })
    }

    fn llama3(&self) -> Result<Grammar, NoGrammar> {
        let Some(calls) = &self.demand.calls else {
            return Ok(self.text());
        };
        let row = row(objects(calls, "parameters"), "; ", calls.parallel);
        if calls.required {
            return Ok(row);
        }
        if self.demand.json.is_some() {
            return Err(NoGrammar::JsonBesideCalls);
        }
        // A call is one where the answer begins with it, and there alone.
        let not_first = if self.is_token(Marker::PythonTag) {
            "{"
        } else {
            "{<"
        };
        Ok(Grammar::Either(vec![Grammar::Prose(not_first), row]))
    }

    fn plain(&self) -> Result<Grammar, NoGrammar> {
        match &self.demand.calls {
            Some(_) => Err(NoGrammar::NoCalls),
            None => Ok(self.text()),
        }
    }

    fn harmony(&self) -> Result<Grammar, NoGrammar> {
        let needed = [
            Marker::Start,
            Marker::Channel,
            Marker::Constrain,
            Marker::Message,
            Marker::End,
        ];
        if !needed.into_iter().all(|marker| self.is_token(marker)) {
            return Err(NoGrammar::NoMarkers);
        }
        let token = |marker: Marker| Grammar::Token(marker.text());
        let message = |channel: &str, content: Grammar| {
            Grammar::Each(vec![
                token(Marker::Channel),
                text(channel),
                token(Marker::Message),
                content,
            ])
        };
        let next = || [token(Marker::End), token(Marker::Start), text("assistant")];
        let ended = |message: Grammar| Grammar::Each([message].into_iter().chain(next()).collect());

        let free = self.demand.json.is_none();
        let calls = self.demand.calls.as_ref();
        let required = calls.is_some_and(|calls| calls.required);
        let mut before = vec![ended(message("analysis", Grammar::Free))];
        if free && !required {
            before.push(ended(message("commentary", Grammar::Free)));
        }
        let mut last = Vec::new();
        if !required {
            last.push(message("final", self.text()));
        }
        if let Some(calls) = calls {
            last.push(each_tool(calls, |name, schema| {
                vec![
                    token(Marker::Channel),
                    text(&format!("commentary to=functions.{name} ")),
                    token(Marker::Constrain),
                    text("json"),
                    token(Marker::Message),
                    Grammar::Json(schema),
                ]
            }));
        }
        let mut all = Vec::new();
        if self.parsing.in_reasoning {
            all.push(ended(Grammar::Free));
        }
        all.push(Grammar::Repeat {
            of: Box::new(Grammar::Either(before)),
            min: 0,
            max: None,
        });
        all.push(Grammar::Either(last));
        Ok(Grammar::Each(all))
    }

    /// The text of an answer in which there are no calls.
    fn text(&self) -> Grammar {
        match &self.demand.json {
            Some(schema) => Grammar::Json(schema.clone()),
            None => Grammar::Free,
        }
    }
}

fn text(text: &str) -> Grammar {
    Grammar::Text(text.to_owned())
}

fn optional(of: Grammar) -> Grammar {
    Grammar::Repeat {
        of: Box::new(of),
        min: 0,
        max: Some(1),
    }
}

/// One of it or, where several may be, a row with this text between two.
fn row(of: Grammar, between: &str, several: bool) -> Grammar {
    if !several {
        return of;
    }
    let next = if between.is_empty() {
        of.clone()
    } else {
        Grammar::Each(vec![text(between), of.clone()])
    };
    let more = Grammar::Repeat {
        of: Box::new(next),
        min: 0,
        max: None,
    };
    Grammar::Each(vec![of, more])
}

/// A call of one of the tools as one JSON object.
fn objects(calls: &Calls, key: &str) -> Grammar {
    each_tool(calls, |name, schema| {
        let name = Value::from(name);
        vec![
            text(&format!(r#"{{"name": {name}, "{key}": "#)),
            Grammar::Json(schema),
            text("}"),
        ]
    })
}

fn each_tool(calls: &Calls, write: impl Fn(&str, Arc<str>) -> Vec<Grammar>) -> Grammar {
    let tools = calls.tools.iter();
    Grammar::Either(
        tools
            .map(|(name, schema)| Grammar::Each(write(name, schema.clone())))
            .collect(),
    )
}
