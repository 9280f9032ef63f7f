//! What classifiers are asked, and what their answers come to.

use std::{ops::Range, sync::Arc};

use futures::{StreamExt as _, stream};

use super::{
    Classifier, OnFailure, Passage, Policy, Question, Unjudged, VERDICTS_AGAIN_MAX, VERDICTS_MAX,
    Version,
    input::{document, scope},
};
use crate::{
    event::{Action, Code, Error, Scope, Verdict},
    item::{Item, ItemId, Tenant},
};

/// Who asks.
#[derive(Debug, Clone)]
pub struct Asking {
    /// The policy that it is asked under.
    pub policy: Arc<Policy>,
    /// Whose conversation it is.
    pub tenant: Tenant,
    /// The model that it is with.
    pub model: Arc<str>,
}

/// A text to ask about: an item's, or a piece of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The item.
    pub item_id: ItemId,
    /// Whose text it is.
    pub scope: Scope,
    /// Where in the item's text it begins, in bytes.
    pub start: usize,
    /// The text.
    pub text: Arc<str>,
    /// The field that it came in; empty for output.
    pub field: String,
    /// Of output, where it stands in the prompt and its sample.
    pub tokens: Option<Range<usize>>,
}

impl Document {
    /// The whole text of an item that came in this field.
    #[must_use]
    pub fn whole(item: &Item, field: String) -> Self {
        Self {
            item_id: item.id.clone(),
            scope: scope(&item.body),
            start: 0,
            text: document(&item.body),
            field,
            tokens: None,
        }
    }
}

/// One question to one classifier, and what is done about its answer.
#[derive(Debug)]
pub struct Inquiry {
    classifier: Arc<Classifier>,
    action: Action,
    item_id: ItemId,
    field: String,
    /// Of the item's text.
    bytes: Range<usize>,
    tokens: Option<Range<usize>>,
    question: Question,
}

impl Inquiry {
    /// Whether something may have to wait for the answer.
    #[must_use]
    pub fn withholds(&self) -> bool {
        self.action >= Action::Refuse
    }
}

/// Those that something waits for, and those that are only told.
#[must_use]
pub fn split(inquiries: Vec<Inquiry>) -> (Vec<Inquiry>, Vec<Inquiry>) {
    inquiries.into_iter().partition(Inquiry::withholds)
}

/// The last passages of a conversation, oldest first, with at most so many bytes. `newest_first` are its items.
pub fn passages(newest_first: impl Iterator<Item = Arc<Item>>, bytes_max: usize) -> Vec<Passage> {
    let mut passages = Vec::new();
    let mut bytes = 0;
    for item in newest_first {
        if bytes >= bytes_max {
            break;
        }
        let text = document(&item.body);
        bytes += text.len();
        passages.push(Passage {
            scope: scope(&item.body),
            text,
        });
    }
    passages.reverse();
    passages
}

impl Asking {
    /// What is asked about these documents, which stand in this order behind `before`.
    #[must_use]
    pub fn about(&self, mut before: Vec<Passage>, documents: Vec<Document>) -> Vec<Inquiry> {
        let mut inquiries = Vec::new();
        for document in documents {
            let Document { scope, text, .. } = &document;
            for asked in self.policy.asked(*scope) {
                let action = match asked.action {
                    // There is no command to refuse.
                    Action::Refuse if document.field.is_empty() => Action::End,
                    action @ (Action::Observe | Action::Redact | Action::Refuse | Action::End) => {
                        action
                    }
                };
                let options = asked.classifier.options();
                for bytes in pieces(text, options.text_bytes_max) {
                    // What stands before a piece in its own text is nearest.
                    let own = bytes.start.saturating_sub(options.window_bytes);
                    let own = Passage {
                        scope: *scope,
                        text: text[text.floor_char_boundary(own)..bytes.start].into(),
                    };
                    let passages = before.iter().chain([&own]);
                    let at = document.start;
                    inquiries.push(Inquiry {
                        classifier: asked.classifier.clone(),
                        action,
                        item_id: document.item_id.clone(),
                        field: document.field.clone(),
                        bytes: at + bytes.start..at + bytes.end,
                        tokens: document.tokens.clone(),
                        question: Question {
                            tenant: self.tenant.clone(),
                            model: self.model.clone(),
                            context: window(passages, options.window_bytes),
                            passage: Passage {
                                scope: *scope,
                                text: text[bytes].into(),
                            },
                        },
                    });
                }
            }
            before.push(Passage {
                scope: *scope,
                text: text.clone(),
            });
        }
        inquiries
    }
}

/// The text in pieces of at most so many bytes. One without letters is none.
fn pieces(text: &str, bytes_max: usize) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < text.len() {
        let end = text.floor_char_boundary(start.saturating_add(bytes_max));
        pieces.push(start..end);
        start = end;
    }
    pieces.retain(|bytes| !text[bytes.clone()].trim().is_empty());
    pieces
}

/// The last bytes of these passages.
fn window<'a>(
    passages: impl DoubleEndedIterator<Item = &'a Passage>,
    bytes_max: usize,
) -> Vec<Passage> {
    let mut window = Vec::new();
    let mut left = bytes_max;
    for Passage { scope, text } in passages.rev() {
        let from = text.ceil_char_boundary(text.len().saturating_sub(left));
        let kept = &text[from..];
        left -= kept.len();
        if !kept.is_empty() {
            window.push(Passage {
                scope: *scope,
                text: match from {
                    0 => text.clone(),
                    _ => kept.into(),
                },
            });
        }
        if left == 0 {
            break;
        }
    }
    window.reverse();
    window
}

/// What answers come to.
#[derive(Debug, Default)]
pub struct Judgement {
    /// What was found, and what could not be judged.
    pub verdicts: Vec<Verdict>,
    /// Why it does not pass, with the field.
    pub refusal: Option<Error>,
}

/// Questions of one conversation that are asked at once. A long history that is asked about again waits for itself, so that
/// its last questions are not late before they are asked.
const ASKED_AT_ONCE: usize = 16;

/// Asks all of these, and waits for all answers.
///
/// # Cancellation
///
/// Safe: the questions are given up.
pub async fn judge(inquiries: Vec<Inquiry>, version: Version) -> Judgement {
    let asked = inquiries.into_iter().map(|inquiry| async {
        let labels = inquiry.classifier.judge(inquiry.question.clone()).await;
        (inquiry, labels)
    });
    let mut answers = stream::iter(asked).buffered(ASKED_AT_ONCE);
    let mut judgement = Judgement::default();
    while let Some((inquiry, labels)) = answers.next().await {
        judgement.take(&inquiry, labels, &version);
    }
    judgement.verdicts.truncate(VERDICTS_AGAIN_MAX);
    judgement
}

impl Judgement {
    /// The asking itself broke.
    #[must_use]
    pub fn failed() -> Self {
        Self {
            verdicts: Vec::new(),
            refusal: Some(Error::new(Code::BackendError, "judging failed")),
        }
    }

    fn take(
        &mut self,
        inquiry: &Inquiry,
        labels: Result<Arc<[super::Label]>, Unjudged>,
        version: &Version,
    ) {
        let verdict = |rule, action, bytes: Option<Range<usize>>, score| Verdict {
            rule,
            policy: version.as_str().clone(),
            scope: inquiry.question.passage.scope,
            action,
            item_id: inquiry.item_id.clone(),
            bytes: bytes.map_or(inquiry.bytes.clone(), |bytes| {
                inquiry.bytes.start + bytes.start..inquiry.bytes.start + bytes.end
            }),
            tokens: inquiry.tokens.clone(),
            late: false,
            score,
        };
        let classifier = &inquiry.classifier;
        match labels {
            Ok(labels) => {
                let Some(first) = labels.first() else {
                    return;
                };
                let rule = classifier.rule(&first.category);
                self.verdicts
                    .extend(labels.iter().take(VERDICTS_MAX).map(|label| {
                        let rule = classifier.rule(&label.category);
                        verdict(rule, inquiry.action, label.bytes.clone(), label.score)
                    }));
                if inquiry.withholds() {
                    let why = format!(
                        "the classifier's `{rule}` of policy {} refuses it",
                        version.as_str()
                    );
                    self.refuse(Error::new(Code::ContentPolicyViolation, why), inquiry);
                }
            }
            Err(why) => {
                let closed = classifier.options().on_failure == OnFailure::Closed;
                let action = match closed {
                    true => inquiry.action,
                    false => Action::Observe,
                };
                self.verdicts
                    .push(verdict(classifier.unavailable(), action, None, None));
                if closed && inquiry.withholds() {
                    let name = &classifier.options().name;
                    let why = format!("the classifier `{name}` could not judge it: {why}");
                    self.refuse(Error::new(Code::BackendUnavailable, why), inquiry);
                }
            }
        }
    }

    /// The first reason counts; that something is not allowed before that it could not be judged.
    fn refuse(&mut self, error: Error, inquiry: &Inquiry) {
        let stronger = |known: &Error| {
            known.code == Code::BackendUnavailable && error.code == Code::ContentPolicyViolation
        };
        if self.refusal.as_ref().is_none_or(stronger) {
            self.refusal = Some(error.at(inquiry.field.clone()));
        }
    }
}
