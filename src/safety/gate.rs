//! Output on its way to the client: what may still become a match waits, everything else passes at once.
//!
//! Where a rule is only observed nothing waits for it. Where it redacts or ends, the text waits from the
//! place on where a match may have begun, and never more than the policy's `hold_bytes_max`: what is
//! over that is let go, and the verdict on it says that it came late.

use std::{ops::Range, sync::Arc};

use super::{Finding, Monitor as _, Policy, State, VERDICTS_MAX, policy::Guard, stand_in};
use crate::event::{Action, Scope};

/// The way of one output item.
#[derive(Debug)]
pub struct Gate {
    policy: Arc<Policy>,
    scope: Scope,
    state: State,
    /// The item's text as the model wrote it.
    text: String,
    /// How much of that has passed or was replaced.
    gone: usize,
    /// What was replaced last.
    replaced: Range<usize>,
    /// What is to be replaced, in order, and has not come up yet.
    places: Vec<(Range<usize>, Arc<str>)>,
    /// The item's text as it passed.
    passed: String,
    redacted: bool,
    told: usize,
}

/// What a piece of text gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// What passes now.
    pub text: String,
    /// What was found, as far as it is told.
    pub found: Vec<Found>,
    /// The output ends: of the item's text, as the model wrote it, only so much stays.
    pub ends_at: Option<usize>,
}

/// Something that was found in output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The rule.
    pub rule: Arc<str>,
    /// What is done about it.
    pub action: Action,
    /// Where in the item's text, as the model wrote it.
    pub bytes: Range<usize>,
    /// Whether some of it had passed.
    pub late: bool,
}

impl Gate {
    /// For an item of this scope. `None` where the policy does not look there.
    #[must_use]
    pub fn new(policy: &Arc<Policy>, scope: Scope) -> Option<Self> {
        policy.guard(scope)?;
        Some(Self {
            policy: policy.clone(),
            scope,
            state: State::default(),
            text: String::new(),
            gone: 0,
            replaced: 0..0,
            places: Vec::new(),
            passed: String::new(),
            redacted: false,
            told: 0,
        })
    }

    /// Whose text it is.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// The policy.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The item's text so far, as the model wrote it.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The item's text so far, as it passed.
    #[must_use]
    pub fn passed(&self) -> &str {
        &self.passed
    }

    /// Whether the two differ.
    #[must_use]
    pub fn redacted(&self) -> bool {
        self.redacted
    }

    /// Whether text waits.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.gone < self.text.len()
    }

    /// Takes more of the item. With `last` the item ends with it.
    pub fn push(&mut self, delta: &str, last: bool) -> Passed {
        let policy = self.policy.clone();
        let mut out = Passed::default();
        let Some(guard) = policy.guard(self.scope) else {
            return out;
        };
        // Letter by letter, so that what passes does not depend on the pieces either.
        for (at, letter) in delta.char_indices() {
            self.take(guard, &delta[at..at + letter.len_utf8()], false, &mut out);
            if out.ends_at.is_some() {
                break;
            }
        }
        if last && out.ends_at.is_none() {
            self.take(guard, "", true, &mut out);
        }
        self.passed.push_str(&out.text);
        out
    }

    fn take(&mut self, guard: &Guard, letter: &str, last: bool, out: &mut Passed) {
        self.text.push_str(letter);
        let mut fresh = Vec::new();
        guard
            .scanner
            .read(&mut self.state, letter, last, &mut fresh);
        for finding in fresh {
            self.judge(guard, finding, out);
        }
        let waits = |rule: usize| guard.actions[rule] >= Action::Redact;
        let open = self.state.open_from(waits);
        let limit = match out.ends_at {
            Some(at) => at.min(open),
            None => {
                // What is over the bound is let go.
                let over = self.text.len().saturating_sub(self.policy.hold_bytes_max());
                open.max(self.text.ceil_char_boundary(over))
            }
        };
        self.let_go(limit, &mut out.text);
        out.ends_at = out.ends_at.map(|_| limit);
    }

    fn judge(&mut self, guard: &Guard, finding: Finding, out: &mut Passed) {
        let Finding { rule, bytes } = finding;
        // Nothing counts behind the end.
        if out.ends_at.is_some_and(|at| bytes.start >= at) {
            return;
        }
        let action = match guard.actions[rule] {
            Action::Refuse => Action::End,
            action @ (Action::Observe | Action::Redact | Action::End) => action,
        };
        let rule = guard.scanner.rules()[rule].id.clone();
        let shown = bytes.start < self.gone
            && (bytes.start < self.replaced.start || self.replaced.end < self.gone);
        match action {
            Action::Observe => {}
            Action::Redact => {
                let at = self
                    .places
                    .partition_point(|(other, _)| other.start <= bytes.start);
                self.places.insert(at, (bytes.clone(), rule.clone()));
            }
            Action::Refuse | Action::End => out.ends_at = Some(bytes.start),
        }
        if self.told < VERDICTS_MAX {
            self.told += 1;
            out.found.push(Found {
                rule,
                action,
                late: shown && action != Action::Observe,
                bytes,
            });
        }
    }

    /// Lets text go up to here, with what is to be replaced in it replaced.
    fn let_go(&mut self, limit: usize, out: &mut String) {
        let due = self
            .places
            .partition_point(|(place, _)| place.start < limit);
        for (place, rule) in self.places.drain(..due) {
            if place.end <= self.gone {
                continue;
            }
            // What lies over the end of the one before is one place with it.
            if place.start >= self.replaced.end {
                out.push_str(&self.text[self.gone..place.start.max(self.gone)]);
                out.push_str(&stand_in(&rule));
            }
            self.redacted = true;
            self.gone = place.end;
            self.replaced = place;
        }
        if self.gone < limit {
            out.push_str(&self.text[self.gone..limit]);
            self.gone = limit;
        }
    }
}

#[cfg(test)]
mod tests;
