//! One sample while it comes: tokens to text, text to items, items to events, and everything of
//! it kept for the ledger exactly as it was sampled.

mod filter;
mod judged;

use std::sync::Arc;

use super::{Open, ROUND_TAIL_BYTES, RoundEnd};
use crate::{
    event::{Code, DeltaKind, Error, Event, Scope, Verdict},
    item::{
        Body, CallId, Item, ItemId, ItemStatus, NamedLogprob, Part, Role, TokenLogprob, Tool,
        ToolKind,
    },
    ledger::{Cut, Draft, Source, Span},
    model::Model,
    parse::{Parsed, Parser, ParserOptions, Piece},
    request::{OpenCall, ValidItem},
    safety::{Gate, Policy},
    tokenizer::{DetokPiece, Detokenizer, Tokenizer},
};
pub(super) use judged::Mark;
use judged::Unasked;

/// One sample while it comes.
pub(super) struct Round {
    model: Arc<Model>,
    detokenizer: Detokenizer,
    parser: Parser,
    tools: Arc<[Tool]>,
    parallel: bool,
    no_deltas: bool,
    stop: StopTexts,
    /// What was sampled, for the ledger.
    draft: Draft,
    first_byte: usize,
    first_token: usize,
    /// Where each token ends.
    ends: Vec<TokenEnd>,
    item: Option<Building>,
    /// The position that the next item gets.
    index: u32,
    /// Where the tokens of the item in progress begin in the draft.
    item_first: usize,
    /// How many tokens there were when text was last shown.
    shown: usize,
    outputs: Vec<ValidItem>,
    reasoning_tokens: u32,
    logprobs: Vec<NamedLogprob>,
    stage: Stage,
    policy: Option<Arc<Policy>>,
    /// The way of the item in progress to the client, where a policy looks at it.
    gate: Option<Gate>,
    /// A monitor has ended the sample.
    filtered: bool,
    /// What was found in the item in progress.
    verdicts: Vec<Verdict>,
    /// What passed and no classifier was asked about yet.
    unasked: Unasked,
}

/// How far the sample came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// More tokens may come.
    Running,
    /// It was ended from here, so what the parser still holds is not part of it.
    CutShort,
    /// It has ended by itself: what the parser still holds is let go, and nothing cuts it any more.
    Ending,
}

/// Where a token of the draft ends.
#[derive(Clone, Copy)]
struct TokenEnd {
    /// The text up to here is decided.
    byte: usize,
    /// No character is incomplete behind it.
    whole: bool,
}

/// An output item while it comes.
struct Building {
    id: ItemId,
    index: u32,
    kind: Kind,
}

enum Kind {
    Reasoning(String),
    Text(String, Vec<NamedLogprob>),
    Call {
        call_id: CallId,
        name: Arc<str>,
        custom: bool,
    },
}

impl Kind {
    /// What the item is so far; a call's arguments are known when it ends.
    fn body(&self, arguments: &str) -> Body {
        match self {
            Self::Reasoning(content) => Body::Reasoning {
                content: content.as_str().into(),
            },
            Self::Text(text, logprobs) => Body::Message {
                role: Role::Assistant,
                parts: vec![Part::OutputText {
                    text: text.as_str().into(),
                    logprobs: logprobs.as_slice().into(),
                }],
            },
            Self::Call {
                call_id,
                name,
                custom: false,
            } => Body::FunctionCall {
                call_id: call_id.clone(),
                name: name.clone(),
                arguments: arguments.into(),
            },
            Self::Call {
                call_id,
                name,
                custom: true,
            } => Body::CustomToolCall {
                call_id: call_id.clone(),
                name: name.clone(),
                input: custom_input(arguments).unwrap_or_default().into(),
                arguments: arguments.into(),
            },
        }
    }
}

/// The text for a custom tool in the arguments that a model wrote for it.
fn custom_input(arguments: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Arguments {
        input: String,
    }
    let parsed: Arguments = serde_json::from_str(arguments).ok()?;
    Some(parsed.input)
}

impl Round {
    pub(super) fn new(open: &Open) -> Self {
        let model = open.model.clone();
        let artifacts = &model.artifacts;
        let settings = &open.settings;
        let tools = settings.tools.clone().unwrap_or_default();
        let callable = settings.callable().map(|tool| tool.name.to_string());
        let callable = callable.collect();
        let tokenizer = &artifacts.tokenizer;
        let parser = artifacts.family.parser(ParserOptions {
            in_reasoning: artifacts
                .family
                .reasoning_opened(&open.rope.tail(ROUND_TAIL_BYTES)),
            tools: Arc::new(callable),
            ..artifacts.parsing.clone()
        });
        let mut round = Self {
            detokenizer: tokenizer.detokenizer(),
            parser,
            tools,
            parallel: settings.parallel_tool_calls.unwrap_or(true),
            no_deltas: open.no_deltas,
            stop: StopTexts {
                texts: settings.stop.clone().unwrap_or_default(),
                held: String::new(),
            },
            draft: Draft::default(),
            first_byte: open.rope.len_bytes(),
            first_token: open.rope.len_tokens(),
            ends: Vec::new(),
            item: None,
            index: open.output_index,
            item_first: 0,
            shown: 0,
            outputs: Vec::new(),
            reasoning_tokens: 0,
            logprobs: Vec::new(),
            stage: Stage::Running,
            policy: open.policy.clone(),
            gate: None,
            filtered: false,
            verdicts: Vec::new(),
            unasked: Unasked::default(),
            model,
        };
        round.is_told(open.open_calls.len());
        round
    }

    /// The items that are whole.
    pub(super) fn outputs(&self) -> &[ValidItem] {
        &self.outputs
    }

    /// The sample, and its items.
    pub(super) fn into_parts(self) -> (Draft, Vec<ValidItem>, u32) {
        (self.draft, self.outputs, self.index)
    }

    /// What was sampled up to here, to render behind it.
    pub(super) fn so_far(&self) -> Draft {
        Draft {
            text: self.draft.text.clone(),
            ids: self.draft.ids.clone(),
            cuts: self.draft.cuts.clone(),
            ..Draft::default()
        }
    }

    pub(super) fn take_reasoning_tokens(&mut self) -> u32 {
        std::mem::take(&mut self.reasoning_tokens)
    }

    /// Takes one token. `Some` when the sample ends with it, whatever the backend says.
    pub(super) fn token(
        &mut self,
        id: u32,
        logprob: Option<TokenLogprob>,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<Option<RoundEnd>, Error> {
        let model = self.model.clone();
        let tokenizer = &model.artifacts.tokenizer;
        if id as usize >= tokenizer.vocab_size() {
            return Err(Error::new(
                Code::BackendError,
                format!("the backend sampled token {id}, which the vocabulary does not have"),
            ));
        }
        self.logprobs
            .extend(logprob.map(|logprob| named(logprob, tokenizer)));
        let mut parsed = Vec::new();
        for piece in self.detokenizer.push(id) {
            match piece {
                DetokPiece::Special(text) => {
                    if tokenizer.is_cut(id) {
                        self.draft.cuts.push(Cut {
                            byte: self.first_byte + self.draft.text.len(),
                            token: self.first_token + self.draft.ids.len(),
                            len: text.len(),
                        });
                    }
                    self.draft.text.push_str(text);
                    self.parser.push(Piece::Special(text), &mut parsed);
                }
                DetokPiece::Text(text) => {
                    self.draft.text.push_str(text);
                    self.parser.push(Piece::Text(text), &mut parsed);
                }
            }
        }
        self.draft.ids.push(id);
        self.ends.push(TokenEnd {
            byte: self.draft.text.len(),
            whole: self.detokenizer.is_whole(),
        });
        for found in parsed {
            if let Some(end) = self.apply(found, open, events) {
                self.stage = Stage::CutShort;
                return Ok(Some(end));
            }
        }
        if matches!(
            &self.item,
            Some(Building {
                kind: Kind::Reasoning(_),
                ..
            })
        ) {
            self.reasoning_tokens += 1;
        }
        Ok(None)
    }

    /// Takes what an engine has read by itself. `Some` when the sample ends with it.
    pub(super) fn told(
        &mut self,
        parsed: Parsed,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Option<RoundEnd> {
        let end = self.apply(parsed, open, events);
        if end.is_some() {
            self.stage = Stage::CutShort;
        }
        end
    }

    /// Ends the sample: what is held back is let go, the item in progress is closed. Says how it ended
    /// after all: a monitor may find something in what was held back.
    pub(super) fn finish(
        &mut self,
        end: RoundEnd,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> RoundEnd {
        let status = match end {
            RoundEnd::Stop | RoundEnd::Boundary => ItemStatus::Completed,
            RoundEnd::Length | RoundEnd::Filtered | RoundEnd::Spent | RoundEnd::Interrupted => {
                ItemStatus::Incomplete
            }
        };
        if self.stage == Stage::Running {
            self.stage = Stage::Ending;
            let mut parsed = Vec::new();
            let held = self.detokenizer.clone().finish();
            if !held.is_empty() {
                self.draft.text.push_str(held);
                self.parser.push(Piece::Text(held), &mut parsed);
                if let Some(last) = self.ends.last_mut() {
                    *last = TokenEnd {
                        byte: self.draft.text.len(),
                        whole: true,
                    };
                }
            }
            self.parser.finish(&mut parsed);
            for found in parsed {
                match (found, status) {
                    // A call that was cut off is no call, and not a text that the model meant either.
                    (Parsed::CallBroken { .. }, ItemStatus::Incomplete) => {
                        self.close(ItemStatus::Incomplete, events);
                    }
                    (found, _) => {
                        if self.apply(found, open, events).is_some() {
                            break;
                        }
                    }
                }
            }
            self.release_stop(events);
        }
        self.close(status, events);
        let end = if self.filtered {
            RoundEnd::Filtered
        } else {
            end
        };
        if self.outputs.is_empty() && end == RoundEnd::Stop {
            // The model had nothing to say: that, too, is an answer.
            self.open(Kind::Text(String::new(), Vec::new()), events);
            self.close(status, events);
        }
        if let Some(last) = self.draft.spans.last_mut() {
            last.tokens.end = self.first_token + self.draft.ids.len();
        }
        end
    }

    fn apply(
        &mut self,
        found: Parsed,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Option<RoundEnd> {
        let end = self.read(found, open, events);
        if self.filtered {
            Some(RoundEnd::Filtered)
        } else {
            end
        }
    }

    fn read(
        &mut self,
        found: Parsed,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Option<RoundEnd> {
        match found {
            Parsed::Reasoning(delta) => {
                if !matches!(
                    &self.item,
                    Some(Building {
                        kind: Kind::Reasoning(_),
                        ..
                    })
                ) {
                    self.release_stop(events);
                    if let Some(end) = self.boundary(open, events) {
                        return Some(end);
                    }
                    self.open(Kind::Reasoning(String::new()), events);
                }
                self.reasoning(&delta, events);
                None
            }
            Parsed::Text(delta) => {
                let continues = matches!(
                    &self.item,
                    Some(Building {
                        kind: Kind::Text(..),
                        ..
                    })
                );
                if !continues && let Some(end) = self.boundary(open, events) {
                    return Some(end);
                }
                let (visible, stopped) = self.stop.push(&delta);
                if !visible.is_empty() {
                    self.text(&visible, events);
                }
                let stopped = stopped.filter(|_| !self.filtered)?;
                // Only tokens that lie wholly before the stop text stay as they were sampled.
                let at = self.draft.text.rfind(&*stopped).unwrap_or(0);
                self.keep(self.ends.partition_point(|end| end.byte <= at));
                Some(RoundEnd::Stop)
            }
            Parsed::CallBegin { name } => {
                self.release_stop(events);
                if let Some(end) = self.boundary(open, events) {
                    return Some(end);
                }
                let custom = self
                    .tools
                    .iter()
                    .any(|tool| *tool.name == *name && tool.kind == ToolKind::Custom);
                let call_id = self.model.artifacts.family.call_id().into();
                let name = name.into();
                self.open(
                    Kind::Call {
                        call_id,
                        name,
                        custom,
                    },
                    events,
                );
                None
            }
            Parsed::CallArguments(delta) => {
                if let Some(Building {
                    index,
                    kind: Kind::Call { custom: false, .. },
                    ..
                }) = &self.item
                {
                    let index = *index;
                    let delta = self.pass(delta.into(), false);
                    self.delta(index, DeltaKind::Arguments, &delta, Vec::new(), events);
                }
                None
            }
            Parsed::CallEnd { arguments } => self.call(&arguments, open, events),
            Parsed::CallBroken { raw } => {
                self.abandon(events);
                self.text(&raw, events);
                None
            }
        }
    }

    /// A call is whole: it is handed out now, while later items may still come.
    fn call(
        &mut self,
        arguments: &str,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Option<RoundEnd> {
        let building = self.item.take()?;
        let Kind::Call { custom, .. } = &building.kind else {
            self.item = Some(building);
            return None;
        };
        if *custom && custom_input(arguments).is_none() {
            self.item = Some(building);
            self.abandon(events);
            self.text(arguments, events);
            return None;
        }
        let (custom, index) = (*custom, building.index);
        self.item = Some(building);
        let arguments = &*self.pass_call(arguments, custom, index, events);
        if self.filtered {
            self.abandon(events);
            return None;
        }
        match custom.then(|| custom_input(arguments)).flatten() {
            Some(input) => self.passes(0, &input),
            None => self.passes(0, arguments),
        }
        let building = self.item.take()?;
        let Kind::Call { call_id, name, .. } = &building.kind else {
            return None;
        };
        open.calls_made += 1;
        open.open_calls.push(OpenCall {
            call_id: call_id.clone(),
            name: name.clone(),
            custom,
        });
        let body = building.kind.body(arguments);
        self.emit(
            building.id,
            building.index,
            body,
            ItemStatus::Completed,
            events,
        );
        (!self.parallel).then_some(RoundEnd::Stop)
    }

    /// No stop text comes of what was held back for one.
    fn release_stop(&mut self, events: &mut Vec<Event>) {
        let held = std::mem::take(&mut self.stop.held);
        if !held.is_empty() {
            self.text(&held, events);
        }
    }

    /// The item in progress is whole. Where input waits for just that, the sample ends before
    /// what began the next item.
    fn boundary(&mut self, open: &Open, events: &mut Vec<Event>) -> Option<RoundEnd> {
        let closed = self.item.as_ref().map(|item| match item.kind {
            // What stands behind the last of a text opens the next item.
            Kind::Text(..) => self.shown,
            // The markers that close reasoning are part of it.
            Kind::Reasoning(_) | Kind::Call { .. } => self.ends.len(),
        });
        self.close(ItemStatus::Completed, events);
        if self.filtered {
            return Some(RoundEnd::Filtered);
        }
        let tokens = closed.filter(|_| open.steered() && self.stage == Stage::Running)?;
        self.keep(tokens.min(self.ends.len().saturating_sub(1)));
        Some(RoundEnd::Boundary)
    }

    fn open(&mut self, kind: Kind, events: &mut Vec<Event>) {
        let body = kind.body("");
        let id = ItemId::new(&body);
        let index = self.index;
        self.index += 1;
        events.push(Event::OutputItemAdded {
            output_index: index,
            item: Arc::new(Item {
                id: id.clone(),
                status: ItemStatus::InProgress,
                body,
            }),
        });
        let scope = match kind {
            Kind::Reasoning(_) => Scope::Reasoning,
            Kind::Text(..) | Kind::Call { .. } => Scope::ModelOutput,
        };
        let policy = self.policy.as_ref();
        self.gate = policy.and_then(|policy| Gate::new(policy, scope));
        self.item = Some(Building { id, index, kind });
    }

    fn reasoning(&mut self, delta: &str, events: &mut Vec<Event>) {
        self.logprobs.clear();
        let delta = &*self.pass(delta.into(), false);
        let Some(Building {
            index,
            kind: Kind::Reasoning(content),
            ..
        }) = &mut self.item
        else {
            return;
        };
        let start = content.len();
        content.push_str(delta);
        let index = *index;
        self.passes(start, delta);
        self.delta(index, DeltaKind::Reasoning, delta, Vec::new(), events);
    }

    fn text(&mut self, delta: &str, events: &mut Vec<Event>) {
        if self.filtered {
            return;
        }
        if !matches!(
            &self.item,
            Some(Building {
                kind: Kind::Text(..),
                ..
            })
        ) {
            self.close(ItemStatus::Completed, events);
            self.open(Kind::Text(String::new(), Vec::new()), events);
        }
        self.shown = self.draft.ids.len();
        let delta = self.pass(delta.into(), false);
        self.show(&delta, events);
    }

    /// Text that has passed.
    fn show(&mut self, delta: &str, events: &mut Vec<Event>) {
        // They spell the text: those of what is held back wait with it, those of an item in which
        // something was replaced are not told any more.
        let fresh = match &self.gate {
            Some(gate) if gate.redacted() => {
                self.logprobs.clear();
                Vec::new()
            }
            Some(gate) if gate.holds() => Vec::new(),
            Some(_) | None => std::mem::take(&mut self.logprobs),
        };
        let Some(Building {
            index,
            kind: Kind::Text(text, logprobs),
            ..
        }) = &mut self.item
        else {
            return;
        };
        let start = text.len();
        text.push_str(delta);
        logprobs.extend(fresh.iter().cloned());
        let index = *index;
        self.passes(start, delta);
        self.delta(index, DeltaKind::Text, delta, fresh, events);
    }

    fn delta(
        &self,
        index: u32,
        what: DeltaKind,
        text: &str,
        fresh: Vec<NamedLogprob>,
        events: &mut Vec<Event>,
    ) {
        if self.no_deltas || text.is_empty() {
            return;
        }
        if let Some(Event::Delta {
            output_index,
            kind,
            delta,
            logprobs,
        }) = events.last_mut()
            && (*output_index, *kind) == (index, what)
        {
            delta.push_str(text);
            logprobs.extend(fresh);
            return;
        }
        events.push(Event::Delta {
            output_index: index,
            kind: what,
            delta: text.to_owned(),
            logprobs: fresh,
        });
    }

    /// Closes the item in progress; a call in progress is not whole and so no item.
    fn close(&mut self, status: ItemStatus, events: &mut Vec<Event>) {
        self.let_go(events);
        let status = if self.filtered {
            ItemStatus::Incomplete
        } else {
            status
        };
        if matches!(
            &self.item,
            Some(Building {
                kind: Kind::Call { .. },
                ..
            })
        ) {
            self.abandon(events);
        } else if let Some(building) = self.item.take() {
            let body = building.kind.body("");
            self.emit(building.id, building.index, body, status, events);
        }
    }

    /// Tells the client that a call it was told of comes to nothing.
    fn abandon(&mut self, events: &mut Vec<Event>) {
        if let Some(Building { id, index, kind }) = self.item.take() {
            let item = Arc::new(Item {
                id,
                status: ItemStatus::Incomplete,
                body: kind.body(""),
            });
            events.push(Event::OutputItemDone {
                output_index: index,
                item,
            });
            self.tell(events);
        }
    }

    fn emit(
        &mut self,
        id: ItemId,
        index: u32,
        body: Body,
        status: ItemStatus,
        events: &mut Vec<Event>,
    ) {
        let item = Arc::new(Item { id, status, body });
        let end = self.draft.ids.len();
        // A stop text may have taken back more than this item.
        let first = self.item_first.min(end);
        self.draft.spans.push(Span {
            tokens: self.first_token + first..self.first_token + end,
            source: Source::Sampled(item.id.clone()),
        });
        self.item_first = end;
        self.outputs.push(ValidItem {
            item: item.clone(),
            answers: None,
        });
        events.push(Event::OutputItemDone {
            output_index: index,
            item,
        });
        self.tell(events);
    }

    /// Keeps only the first tokens of the sample, and of those no part of a character: what was
    /// shown for it stands in the text, where it is encoded like any other.
    fn keep(&mut self, tokens: usize) {
        let whole = self.ends[..tokens].iter().rposition(|end| end.whole);
        let tokens = whole.map_or(0, |last| last + 1);
        let bytes = whole.map_or(0, |last| self.ends[last].byte);
        self.draft.ids.truncate(tokens);
        self.ends.truncate(tokens);
        self.draft.text.truncate(bytes);
        let end = self.first_token + tokens;
        self.draft.cuts.retain(|cut| cut.token < end);
        for span in &mut self.draft.spans {
            span.tokens.end = span.tokens.end.min(end);
            span.tokens.start = span.tokens.start.min(end);
        }
    }
}

fn named(logprob: TokenLogprob, tokenizer: &Tokenizer) -> NamedLogprob {
    let text = |id| String::from_utf8_lossy(tokenizer.bytes_of(id)).into_owned();
    NamedLogprob {
        token: logprob.token,
        text: text(logprob.token),
        logprob: logprob.logprob,
        top: logprob
            .top
            .into_iter()
            .map(|(id, value)| (id, text(id), value))
            .collect(),
    }
}

/// Looks for stop texts in what a client would see, and holds back what may become one.
struct StopTexts {
    texts: Arc<[Arc<str>]>,
    held: String,
}

impl StopTexts {
    /// What can be shown, and the stop text that appeared behind it.
    fn push(&mut self, delta: &str) -> (String, Option<Arc<str>>) {
        if self.texts.is_empty() {
            return (delta.to_owned(), None);
        }
        self.held.push_str(delta);
        let found = self
            .texts
            .iter()
            .filter_map(|text| Some((self.held.find(&**text)?, text.clone())))
            .min_by_key(|(at, _)| *at);
        if let Some((at, text)) = found {
            let mut held = std::mem::take(&mut self.held);
            held.truncate(at);
            return (held, Some(text));
        }
        let keep = self
            .texts
            .iter()
            .map(|text| longest_overlap(&self.held, text))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }
}

/// How many of the last bytes of `text` are the first of `stop`.
fn longest_overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .rev()
        .find(|at| text.ends_with(&stop[..*at]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_text_is_found_across_deltas_and_only_what_may_become_one_is_held() {
        let mut stop = StopTexts {
            texts: Arc::new(["END".into(), "né".into()]),
            held: String::new(),
        };
        assert_eq!(stop.push("one E"), ("one ".to_owned(), None));
        assert_eq!(stop.push("Nd n"), ("ENd ".to_owned(), None));
        assert_eq!(stop.push("o EN"), ("no ".to_owned(), None));
        assert_eq!(stop.push("D more"), (String::new(), Some("END".into())));
    }
}
