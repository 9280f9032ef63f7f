//! The classifiers' part of a sample: what passed and is to be judged, and the way back to where it was judged last.

use super::{Building, Kind, NamedLogprob, Round, Stage};
use crate::{
    event::Scope,
    item::{Body, CallId, ItemId, Part},
    safety::{Document, Passage},
};

/// What passed since classifiers were last asked.
#[derive(Default)]
pub(super) struct Unasked {
    /// By item, in order.
    texts: Vec<Text>,
    bytes: usize,
    /// How many tokens were sampled before it.
    tokens: usize,
    /// Where it begins.
    mark: Mark,
}

struct Text {
    item_id: ItemId,
    scope: Scope,
    /// Where in the item's text it begins.
    start: usize,
    text: String,
}

/// How far a sample was, so that it can be taken back to there.
#[derive(Debug, Clone, Default)]
pub(in crate::response) struct Mark {
    tokens: usize,
    outputs: usize,
    spans: usize,
    pub(in crate::response) open_calls: usize,
    index: u32,
    item_first: usize,
    item: Option<Shell>,
}

/// An item in progress, by how much of it there was.
#[derive(Debug, Clone)]
struct Shell {
    id: ItemId,
    index: u32,
    kind: ShellKind,
}

#[derive(Debug, Clone)]
enum ShellKind {
    Reasoning {
        bytes: usize,
    },
    Text {
        bytes: usize,
        logprobs: usize,
    },
    Call {
        call_id: CallId,
        name: std::sync::Arc<str>,
        custom: bool,
    },
}

impl Round {
    /// More of the item in progress has passed: `delta`, which begins there in its text.
    pub(super) fn passes(&mut self, start: usize, delta: &str) {
        let (Some(policy), Some(item)) = (&self.policy, &self.item) else {
            return;
        };
        let scope = match item.kind {
            Kind::Reasoning(_) => Scope::Reasoning,
            Kind::Text(..) | Kind::Call { .. } => Scope::ModelOutput,
        };
        if delta.is_empty() || !policy.asks(scope) {
            return;
        }
        let Unasked { texts, bytes, .. } = &mut self.unasked;
        *bytes += delta.len();
        match texts.last_mut() {
            Some(last) if last.item_id == item.id => last.text.push_str(delta),
            Some(_) | None => texts.push(Text {
                item_id: item.id.clone(),
                scope,
                start,
                text: delta.to_owned(),
            }),
        }
    }

    /// Whether something waits to be judged that may be kept back.
    pub(in crate::response) fn withholds(&self) -> bool {
        let policy = self.policy.as_ref();
        let mut texts = self.unasked.texts.iter();
        policy.is_some_and(|policy| texts.any(|it| policy.withholds(it.scope)))
    }

    /// Whether enough waits to be judged: as much as is judged at once, or up to the end of an item.
    pub(in crate::response) fn asks(&self) -> bool {
        let Unasked { texts, bytes, .. } = &self.unasked;
        let enough = self.policy.as_ref().and_then(|it| it.output_bytes());
        !texts.is_empty() && (self.item.is_none() || enough.is_some_and(|enough| *bytes >= enough))
    }

    /// What waits to be judged, and where it began. From here on all is new. `open_calls` are those that
    /// are open now.
    pub(in crate::response) fn take_unasked(&mut self, open_calls: usize) -> (Vec<Document>, Mark) {
        let texts = std::mem::take(&mut self.unasked.texts);
        self.unasked.bytes = 0;
        let sampled = self.draft.ids.len();
        let sampled = std::mem::replace(&mut self.unasked.tokens, sampled)..sampled;
        // An engine that tells items tells no tokens.
        let tokens = (!sampled.is_empty())
            .then(|| self.first_token + sampled.start..self.first_token + sampled.end);
        let documents = texts.into_iter().map(|it| Document {
            item_id: it.item_id,
            scope: it.scope,
            start: it.start,
            text: it.text.into(),
            field: String::new(),
            tokens: tokens.clone(),
        });
        let mark = self.mark(open_calls);
        let began = std::mem::replace(&mut self.unasked.mark, mark);
        (documents.collect(), began)
    }

    /// What of an item passed before a piece of it that begins there.
    pub(in crate::response) fn before(&self, piece: &Document) -> Option<Passage> {
        let text = self.text_of(&piece.item_id).0.get(..piece.start)?;
        Some(Passage {
            scope: piece.scope,
            text: text.into(),
        })
    }

    /// All up to here has been told: nothing of it is taken back any more.
    pub(in crate::response) fn is_told(&mut self, open_calls: usize) {
        if self
            .policy
            .as_ref()
            .is_some_and(|it| it.output_bytes().is_some())
        {
            self.unasked.mark = self.mark(open_calls);
        }
    }

    fn mark(&self, open_calls: usize) -> Mark {
        let shell = |item: &Building| Shell {
            id: item.id.clone(),
            index: item.index,
            kind: match &item.kind {
                Kind::Reasoning(text) => ShellKind::Reasoning { bytes: text.len() },
                Kind::Text(text, logprobs) => ShellKind::Text {
                    bytes: text.len(),
                    logprobs: logprobs.len(),
                },
                Kind::Call {
                    call_id,
                    name,
                    custom,
                } => ShellKind::Call {
                    call_id: call_id.clone(),
                    name: name.clone(),
                    custom: *custom,
                },
            },
        };
        let sampled = self.draft.ids.len();
        Mark {
            tokens: match &self.item {
                // Of what is held back for a stop text or a rule nothing was shown.
                Some(Building {
                    kind: Kind::Text(..),
                    ..
                }) => self.shown.min(sampled),
                Some(_) | None => sampled,
            },
            outputs: self.outputs.len(),
            spans: self.draft.spans.len(),
            open_calls,
            index: self.index,
            item_first: self.item_first,
            item: self.item.as_ref().map(shell),
        }
    }

    /// Of the sample there is what there was at this mark, and no more comes.
    pub(in crate::response) fn roll_back(&mut self, mark: Mark) {
        let item = mark.item.map(|shell| self.rebuilt(shell));
        self.outputs.truncate(mark.outputs);
        self.draft.spans.truncate(mark.spans);
        self.index = mark.index;
        self.item_first = mark.item_first;
        self.item = item;
        self.keep(mark.tokens.min(self.draft.ids.len()));
        self.stage = Stage::CutShort;
        self.filtered = false;
        self.gate = None;
        self.unasked = Unasked::default();
        self.stop.held.clear();
        self.logprobs.clear();
        self.verdicts.clear();
    }

    /// The item in progress as it was. It may have ended since.
    fn rebuilt(&self, shell: Shell) -> Building {
        let (text, logprobs) = self.text_of(&shell.id);
        let kind = match shell.kind {
            ShellKind::Reasoning { bytes } => {
                Kind::Reasoning(text[..bytes.min(text.len())].to_owned())
            }
            ShellKind::Text {
                bytes,
                logprobs: count,
            } => Kind::Text(
                text[..bytes.min(text.len())].to_owned(),
                logprobs[..count.min(logprobs.len())].to_vec(),
            ),
            ShellKind::Call {
                call_id,
                name,
                custom,
            } => Kind::Call {
                call_id,
                name,
                custom,
            },
        };
        Building {
            id: shell.id,
            index: shell.index,
            kind,
        }
    }

    /// What an item of this sample has come to by now.
    fn text_of(&self, id: &ItemId) -> (&str, &[NamedLogprob]) {
        if let Some(item) = self.item.as_ref().filter(|item| item.id == *id) {
            return match &item.kind {
                Kind::Reasoning(text) => (text, &[]),
                Kind::Text(text, logprobs) => (text, logprobs),
                Kind::Call { .. } => ("", &[]),
            };
        }
        let ended = self.outputs.iter().find(|it| it.item.id == *id);
        match ended.map(|it| &it.item.body) {
            Some(Body::Reasoning { content }) => (content, &[]),
            Some(Body::Message { parts, .. }) => match &parts[..] {
                [Part::OutputText { text, logprobs }] => (text, logprobs),
                _ => ("", &[]),
            },
            Some(
                Body::FunctionCall { .. }
                | Body::CustomToolCall { .. }
                | Body::FunctionCallOutput { .. }
                | Body::CustomToolCallOutput { .. }
                | Body::Compaction { .. },
            )
            | None => ("", &[]),
        }
    }
}
