//! The classifiers' part of a response: what they are asked about, and the way back where they end a sample.

use std::sync::Arc;

use super::{Open, RoundEnd, early::Waiting};
use crate::{
    event::{Error, Event, PromptReport, RerenderReason},
    item::Item,
    ledger::Rope,
    parse::Grammar,
    render::{Entries, Resume, Visible},
    request::{NewItem, ValidItem, validate_append},
    safety::{self, Asking, Document, Inquiry, Names, Passage, Policy},
    session::Held,
};

use super::round::Mark;

/// The field of what was said before.
const PAST: &str = "create.previous_response_id";

/// Output that is to be judged.
pub struct Piece {
    /// What is asked about it.
    pub inquiries: Vec<Inquiry>,
    /// Where it began.
    pub began: Began,
}

/// Where a piece of output began: a sample can be taken back to there.
pub struct Began(Mark);

/// How a response stood before input that was only presumed to pass.
pub struct Before {
    waiting: Waiting,
    batches: usize,
    chat: usize,
    input: usize,
    entries: Entries,
    visible: Visible,
    resume: Option<Resume>,
    rope: Rope,
    prompt_tokens: usize,
    prompt_entries: usize,
    grammar: Option<Arc<Grammar>>,
    rerender: Option<RerenderReason>,
    report: PromptReport,
}

impl Open {
    /// How it stands, while nothing is sampled: what is appended and sampled from here on can be taken back.
    #[must_use]
    pub fn before(&self) -> Before {
        Before {
            waiting: Waiting {
                staged: self.staged.clone(),
                steering: self.steering.clone(),
                open_calls: self.open_calls.clone(),
            },
            batches: self.batches.len(),
            chat: self.chat.len(),
            input: self.input.len(),
            entries: self.entries.clone(),
            visible: self.visible,
            resume: self.resume.clone(),
            rope: self.rope.clone(),
            prompt_tokens: self.prompt_tokens,
            prompt_entries: self.prompt_entries,
            grammar: self.grammar.clone(),
            rerender: self.rerender,
            report: self.report,
        }
    }

    /// It stands as it did. What was sampled is charged all the same.
    pub fn take_back(&mut self, before: Before) {
        let mut waiting = before.waiting;
        self.swap(&mut waiting);
        self.batches.truncate(before.batches);
        self.chat.truncate(before.chat);
        self.input.truncate(before.input);
        self.entries = before.entries;
        self.visible = before.visible;
        self.resume = before.resume;
        self.rope = before.rope;
        self.prompt_tokens = before.prompt_tokens;
        self.prompt_entries = before.prompt_entries;
        self.grammar = before.grammar;
        self.rerender = before.rerender;
        self.report = before.report;
        self.ahead = None;
        self.afforded = None;
        self.round = None;
        self.verdicts.clear();
    }

    /// Who asks classifiers about it. `None`: its policy asks none.
    fn asking(&self) -> Option<Asking> {
        let policy = self.policy.clone().filter(|it| it.has_classifiers())?;
        Some(Asking {
            policy,
            tenant: self.tenant.clone(),
            model: self.model.name.clone(),
        })
    }

    /// The policy that its items are checked under.
    #[must_use]
    pub fn policy(&self) -> Option<&Policy> {
        self.policy.as_deref()
    }

    /// The end of the conversation as classifiers are shown it.
    fn passages(&self, asking: &Asking, documents: &[Document]) -> Vec<Passage> {
        let past = self.parent.iter().flat_map(|parent| parent.chain());
        let past = past.flat_map(|node| node.batches.iter().rev());
        let batches = self.batches.iter().rev().chain(past);
        let outputs = self
            .round
            .iter()
            .flat_map(|round| round.outputs().iter().rev());
        let items = outputs.chain(batches.flat_map(|batch| batch.iter().rev()));
        let items = items.filter(|it| documents.iter().all(|other| other.item_id != it.item.id));
        let items: Box<dyn Iterator<Item = ValidItem>> = match self.checked.masked.is_empty() {
            true => Box::new(items.cloned()),
            false => Box::new(items.map(|it| self.checked.masked.apply_to(it))),
        };
        safety::passages(items.map(|it| it.item), asking.policy.window_bytes())
    }

    /// What is asked about what it begins with: the input of its create, whose items have these names, and the
    /// conversation before it where that was never asked about under this policy.
    #[must_use]
    pub fn inquiries(&mut self, names: &Names<'_>) -> Vec<Inquiry> {
        let again = std::mem::take(&mut self.past_unasked);
        let Some(asking) = self.asking() else {
            return Vec::new();
        };
        let new = self.batches.iter().chain([&self.staged, &self.steering]);
        let new = new.flatten().map(|it| {
            let field = match names.ids.contains(&it.item.id) {
                true => names.field(&it.item),
                // Of the past too: a message that steered too late.
                false => PAST.to_owned(),
            };
            Document::whole(&self.checked.masked.apply_to(it).item, field)
        });
        let mut documents: Vec<Document> = new.collect();
        if !again {
            documents.retain(|it| it.field != PAST);
            let before = self.passages(&asking, &documents);
            return asking.about(before, documents);
        }
        let past: Vec<_> = self.parent.iter().flat_map(|it| it.chain()).collect();
        let past = past.iter().rev().flat_map(|node| &node.batches).flatten();
        let past = past.map(|it| {
            let item = self.checked.masked.apply_to(it).item;
            Document::whole(&item, PAST.to_owned())
        });
        asking.about(Vec::new(), past.chain(documents).collect())
    }

    /// What is asked about all of it, where another policy has come to hold.
    #[must_use]
    pub fn inquiries_again(&mut self) -> Vec<Inquiry> {
        match self.past_unasked {
            true => self.inquiries(&Names::default()),
            false => Vec::new(),
        }
    }

    /// What is asked about input of an `append`, before it is taken.
    ///
    /// # Errors
    ///
    /// As [`Open::append`], as far as it can be known now.
    pub fn inquiries_about(&self, input: &[NewItem], held: &Held) -> Result<Vec<Inquiry>, Error> {
        let Some(asking) = self.asking() else {
            return Ok(Vec::new());
        };
        let ids: Vec<_> = input.iter().map(|new| new.id().clone()).collect();
        let names = Names {
            command: "append",
            ids: &ids,
        };
        let mut calls = self.open_calls.clone();
        let valid = validate_append(input.to_vec(), &mut calls, &|id| held.find_item(id))?;
        let (items, _) = safety::clear(valid, self.policy.as_deref(), &names)?.into_parts();
        let whole = |item: &Item| Document::whole(item, names.field(item));
        let documents: Vec<Document> = items.iter().map(|it| whole(&it.item)).collect();
        let before = self.passages(&asking, &documents);
        Ok(asking.about(before, documents))
    }

    /// Whether output has passed that a classifier may keep back.
    #[must_use]
    pub fn withholds(&self) -> bool {
        self.round.as_ref().is_some_and(|round| round.withholds())
    }

    /// Output that is to be judged now: enough of it, or, with `all`, what there is.
    pub fn piece(&mut self, all: bool) -> Option<Piece> {
        if !all && !self.round.as_ref()?.asks() {
            return None;
        }
        let asking = self.asking()?;
        let round = self.round.as_mut()?;
        let (documents, mark) = round.take_unasked(self.open_calls.len());
        if documents.is_empty() {
            return None;
        }
        let own = documents.first().and_then(|first| round.before(first));
        let mut before = self.passages(&asking, &documents);
        before.extend(own);
        Some(Piece {
            inquiries: asking.about(before, documents),
            began: Began(mark),
        })
    }

    /// All output up to here has been told, and is not taken back.
    pub fn output_told(&mut self) {
        if let Some(round) = &mut self.round {
            round.is_told(self.open_calls.len());
        }
    }

    /// The sample ends like this: of it there is what there was when this piece began.
    pub fn roll_back(
        &mut self,
        Began(mark): Began,
        end: RoundEnd,
        events: &mut Vec<Event>,
    ) -> RoundEnd {
        self.open_calls.truncate(mark.open_calls);
        if let Some(round) = &mut self.round {
            round.roll_back(mark);
        }
        self.close_round(end, events)
    }
}
