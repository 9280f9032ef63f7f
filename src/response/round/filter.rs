//! The monitors' part of a sample: what passes of an item on its way to the client, and where the sample ends
//! for what was found.

use std::borrow::Cow;

use super::{Building, Kind, Round, custom_input};
use crate::{
    event::{DeltaKind, Event, Verdict},
    safety::{self, Found},
};

impl Round {
    /// The arguments of a whole call, as they pass. What does not end as the arguments of a call ends
    /// the sample.
    pub(super) fn pass_call(
        &mut self,
        arguments: &str,
        custom: bool,
        index: u32,
        events: &mut Vec<Event>,
    ) -> String {
        if self.gate.is_none() {
            return arguments.to_owned();
        }
        let input = custom.then(|| custom_input(arguments)).flatten();
        let document = input.as_deref().unwrap_or(arguments);
        let read = self.gate.as_ref().map_or(0, |gate| gate.text().len());
        let rest = document.get(read..).unwrap_or_default().to_owned();
        let last = self.pass(rest.into(), true);
        let Some(gate) = self.gate.as_ref().filter(|_| !self.filtered) else {
            return String::new();
        };
        let passed = match gate.redacted() {
            false => arguments.to_owned(),
            true if custom => serde_json::json!({ "input": gate.passed() }).to_string(),
            true => gate.passed().to_owned(),
        };
        let whole = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&passed);
        if gate.redacted() && whole.is_err() {
            self.filter(0);
        } else if !custom {
            self.delta(index, DeltaKind::Arguments, &last, Vec::new(), events);
        }
        passed
    }

    /// More of the item in progress, on its way to the client.
    pub(super) fn pass<'a>(&mut self, delta: Cow<'a, str>, last: bool) -> Cow<'a, str> {
        let Some(gate) = &mut self.gate else {
            return delta;
        };
        if self.filtered {
            return "".into();
        }
        let passed = gate.push(&delta, last);
        let verdicts: Vec<Verdict> = passed
            .found
            .into_iter()
            .filter_map(|found| self.verdict(found))
            .collect();
        self.verdicts.extend(verdicts);
        if let Some(at) = passed.ends_at {
            self.filter(at);
        }
        passed.text.into()
    }

    /// A monitor ends the sample: only so much of the item's text stays, and of the tokens those that lie
    /// wholly in it. Of a call nothing does.
    fn filter(&mut self, at: usize) {
        self.filtered = true;
        self.logprobs.clear();
        let of_text = self.item.as_ref().is_some_and(|item| match item.kind {
            Kind::Text(..) | Kind::Reasoning(_) => true,
            Kind::Call { .. } => false,
        });
        let place = self.gate.as_ref().filter(|_| of_text).and_then(|gate| {
            let rest = gate.text().get(at..)?;
            self.place(rest, at)
        });
        let tokens = match place {
            Some(place) => self.ends.partition_point(|end| end.byte <= place),
            None => self.item_first.min(self.ends.len()),
        };
        self.keep(tokens);
    }

    /// Where a piece of the item's text stands in what was sampled.
    fn place(&self, text: &str, at: usize) -> Option<usize> {
        // The token that ended the item before may have begun this one.
        let before = self.item_first.checked_sub(2);
        let before = before.and_then(|last| self.ends.get(last));
        let from = before.map_or(0, |end| end.byte) + at;
        let rest = self.draft.text.as_bytes().get(from..)?;
        Some(from + memchr::memmem::find(rest, text.as_bytes())?)
    }

    fn verdict(&self, found: Found) -> Option<Verdict> {
        let gate = self.gate.as_ref()?;
        let item = self.item.as_ref()?;
        let text = gate.text().get(found.bytes.clone())?;
        let place = self.place(text, found.bytes.start);
        let tokens = place.filter(|_| !self.ends.is_empty()).map(|place| {
            let last = place + text.len();
            let start = self.ends.partition_point(|end| end.byte <= place);
            let end = self.ends.partition_point(|end| end.byte < last) + 1;
            self.first_token + start..self.first_token + end.min(self.ends.len())
        });
        Some(Verdict {
            rule: found.rule,
            policy: gate.policy().version().as_str().clone(),
            scope: gate.scope(),
            action: found.action,
            item_id: item.id.clone(),
            bytes: found.bytes,
            tokens,
            late: found.late,
            score: None,
        })
    }

    /// Nothing more of the item in progress comes: what was held back of it passes, or does not.
    pub(super) fn let_go(&mut self, events: &mut Vec<Event>) {
        let index = match &self.item {
            Some(Building {
                index,
                kind: Kind::Text(..) | Kind::Reasoning(_),
                ..
            }) if self.gate.is_some() && !self.filtered => *index,
            Some(_) | None => return,
        };
        let delta = self.pass("".into(), true);
        if let Some(Building {
            kind: Kind::Reasoning(content),
            ..
        }) = &mut self.item
        {
            let start = content.len();
            content.push_str(&delta);
            self.passes(start, &delta);
            self.delta(index, DeltaKind::Reasoning, &delta, Vec::new(), events);
        } else {
            self.show(&delta, events);
        }
    }

    /// Tells what was found in the item that has just ended.
    pub(super) fn tell(&mut self, events: &mut Vec<Event>) {
        self.gate = None;
        let verdicts = self.verdicts.drain(..);
        events.extend(verdicts.map(|it| {
            safety::log(&it);
            Event::Verdict(Box::new(it))
        }));
    }
}
