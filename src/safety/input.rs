//! Whole items: those that are new, and those of a history under another policy.

use std::{collections::HashMap, ops::Range, sync::Arc};

use super::{Monitor as _, Policy, State, VERDICTS_AGAIN_MAX, VERDICTS_MAX, Version, stand_in};
use crate::{
    event::{Action, Code, Error, Scope, Verdict},
    item::{Body, Item, ItemId, Part, Role},
    request::{ValidInput, ValidItem},
};

/// Input that the monitors let through, and what they found. Made by [`clear`] alone.
#[derive(Debug)]
pub struct Cleared {
    items: Vec<ValidItem>,
    verdicts: Vec<Verdict>,
}

impl Cleared {
    /// The items, in the order of the conversation, and what was found in them.
    #[must_use]
    pub fn into_parts(self) -> (Vec<ValidItem>, Vec<Verdict>) {
        (self.items, self.verdicts)
    }
}

/// How a conversation was checked.
#[derive(Debug, Clone, Default)]
pub struct Checked {
    /// The policy that all of its items were checked under. `None`: not all were.
    pub version: Option<Version>,
    /// Its items that were redacted after they had been committed.
    pub masked: Masked,
}

impl Checked {
    /// Whether nothing has to be looked at under this policy.
    #[must_use]
    pub fn holds_under(&self, policy: Option<&Policy>) -> bool {
        policy.is_none_or(|policy| self.version.as_ref() == Some(policy.version()))
    }
}

/// What stands for items that were redacted after they had been committed.
#[derive(Debug, Clone, Default)]
pub struct Masked(Option<Arc<HashMap<ItemId, Arc<Item>>>>);

impl Masked {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// These items as the model may see them.
    #[must_use]
    pub fn apply(&self, batch: &[ValidItem]) -> Vec<ValidItem> {
        batch.iter().map(|new| self.apply_to(new)).collect()
    }

    /// This item as the model may see it.
    #[must_use]
    pub fn apply_to(&self, new: &ValidItem) -> ValidItem {
        let masked = self.0.as_ref().and_then(|it| it.get(&new.item.id));
        ValidItem {
            item: masked.unwrap_or(&new.item).clone(),
            answers: new.answers.clone(),
        }
    }

    fn with(&self, fresh: HashMap<ItemId, Arc<Item>>) -> Self {
        if fresh.is_empty() {
            return self.clone();
        }
        let mut all = self.0.as_deref().cloned().unwrap_or_default();
        all.extend(fresh);
        Self(Some(Arc::new(all)))
    }
}

/// How the items of a command are named in errors: the command, and their ids in the order sent.
#[derive(Debug, Default)]
pub struct Names<'a> {
    /// `create` or `append`.
    pub command: &'static str,
    /// The ids.
    pub ids: &'a [ItemId],
}

impl Names<'_> {
    /// The field that an item's text came in.
    #[must_use]
    pub fn field(&self, item: &Item) -> String {
        let index = self.ids.iter().position(|id| *id == item.id);
        let place = format!("{}.input[{}]", self.command, index.unwrap_or(0));
        format!("{place}.{}", field(&item.body))
    }
}

/// Writes to the log what was found, without the text.
pub fn log(verdict: &Verdict) {
    tracing::info!(
        target: "hotloop::safety",
        rule = &*verdict.rule,
        policy = &*verdict.policy,
        scope = ?verdict.scope,
        action = ?verdict.action,
        item = verdict.item_id.as_str(),
        late = verdict.late,
        "found"
    );
}

/// Shows the new items, and only them, to the monitors. Without a policy there is nothing to do.
///
/// # Errors
///
/// `content_policy_violation`, naming the item's field: then nothing of the input is kept.
pub fn clear(
    input: ValidInput,
    policy: Option<&Policy>,
    names: &Names<'_>,
) -> Result<Cleared, Error> {
    let mut items = input.into_items();
    let mut verdicts = Vec::new();
    let Some(policy) = policy else {
        return Ok(Cleared { items, verdicts });
    };
    for new in &mut items {
        match look(&new.item, policy, &mut verdicts) {
            Look::Passes => {}
            Look::Redacted(item) => new.item = Arc::new(item),
            Look::Refused(rule) => {
                return Err(refused(&rule, policy).at(names.field(&new.item)));
            }
        }
    }
    Ok(Cleared { items, verdicts })
}

fn refused(rule: &str, policy: &Policy) -> Error {
    let version = &**policy.version().as_str();
    tracing::info!(target: "hotloop::safety", rule, policy = version, "refused");
    Error::new(
        Code::ContentPolicyViolation,
        format!(
            "the rule `{rule}` of policy {} refuses it",
            policy.version().as_str()
        ),
    )
}

/// A conversation that may have to be checked again.
pub struct History<'a, 'i> {
    /// How it was checked.
    pub checked: &'a Checked,
    /// Its items, oldest first.
    pub items: &'a mut dyn Iterator<Item = &'i ValidItem>,
}

/// What checking a conversation again gives.
#[derive(Debug, Default)]
pub struct Recheck {
    /// How it is checked now.
    pub checked: Checked,
    /// What was found.
    pub verdicts: Vec<Verdict>,
    /// Whether something in it is redacted now that was not.
    pub masks: bool,
    /// Whether it was not checked under this policy before.
    pub again: bool,
}

/// Checks a history where it was not checked under this policy. Where it was, and without a policy, no
/// item is looked at.
///
/// # Errors
///
/// `content_policy_violation` where it may not be continued under this policy.
pub fn recheck(history: History<'_, '_>, policy: Option<&Policy>) -> Result<Recheck, Error> {
    let mut verdicts = Vec::new();
    let mut masks = HashMap::new();
    let version = policy.map(|policy| policy.version().clone());
    if let Some(policy) = policy
        && !history.checked.holds_under(Some(policy))
    {
        for new in history.items {
            match look(&new.item, policy, &mut verdicts) {
                Look::Passes => {}
                Look::Redacted(item) => {
                    masks.insert(item.id.clone(), Arc::new(item));
                }
                Look::Refused(rule) => {
                    return Err(refused(&rule, policy).at("create.previous_response_id"));
                }
            }
        }
    }
    verdicts.truncate(VERDICTS_AGAIN_MAX);
    Ok(Recheck {
        again: !history.checked.holds_under(policy),
        masks: !masks.is_empty(),
        checked: Checked {
            version,
            masked: history.checked.masked.with(masks),
        },
        verdicts,
    })
}

/// What becomes of a whole item.
enum Look {
    Passes,
    /// With parts of its text replaced.
    Redacted(Item),
    /// By this rule.
    Refused(Arc<str>),
}

/// Looks at a whole item.
fn look(item: &Item, policy: &Policy, verdicts: &mut Vec<Verdict>) -> Look {
    let scope = scope(&item.body);
    let Some(guard) = policy.guard(scope) else {
        return Look::Passes;
    };
    let text = document(&item.body);
    let mut found = Vec::new();
    guard
        .scanner
        .read(&mut State::default(), &text, true, &mut found);
    if found.is_empty() {
        return Look::Passes;
    }
    found.sort_by_key(|it| it.bytes.start);
    let rule_of = |rule: usize| &guard.scanner.rules()[rule].id;
    if let Some(first) = found
        .iter()
        .find(|it| guard.actions[it.rule] >= Action::Refuse)
    {
        return Look::Refused(rule_of(first.rule).clone());
    }
    verdicts.extend(found.iter().take(VERDICTS_MAX).map(|it| Verdict {
        rule: rule_of(it.rule).clone(),
        policy: policy.version().as_str().clone(),
        scope,
        action: guard.actions[it.rule],
        item_id: item.id.clone(),
        bytes: it.bytes.clone(),
        tokens: None,
        late: false,
        score: None,
    }));
    let mut places: Vec<(Range<usize>, &str)> = Vec::new();
    for it in &found {
        if guard.actions[it.rule] < Action::Redact {
            continue;
        }
        match places.last_mut() {
            // What overlaps is one place, under the name of the first.
            Some((last, _)) if it.bytes.start < last.end => last.end = last.end.max(it.bytes.end),
            _ => places.push((it.bytes.clone(), rule_of(it.rule))),
        }
    }
    if places.is_empty() {
        return Look::Passes;
    }
    match redacted(&item.body, &text, &places) {
        Some(body) => Look::Redacted(Item {
            body,
            ..item.clone()
        }),
        // Its arguments would be no JSON any more.
        None => Look::Refused(places[0].1.into()),
    }
}

/// Whose text an item holds.
pub(super) fn scope(body: &Body) -> Scope {
    match body {
        Body::Message {
            role: Role::Assistant,
            ..
        }
        | Body::FunctionCall { .. }
        | Body::CustomToolCall { .. } => Scope::ModelOutput,
        Body::Message {
            role: Role::System | Role::Developer | Role::User,
            ..
        }
        | Body::Compaction { .. } => Scope::UserInput,
        Body::FunctionCallOutput { .. } | Body::CustomToolCallOutput { .. } => Scope::ToolOutput,
        Body::Reasoning { .. } => Scope::Reasoning,
    }
}

/// The text of an item.
pub(super) fn document(body: &Body) -> Arc<str> {
    match body {
        Body::Message { parts, .. } => Part::joined(parts),
        Body::FunctionCall { arguments, .. } => arguments.clone(),
        Body::CustomToolCall { input, .. } => input.clone(),
        Body::FunctionCallOutput { output, .. } | Body::CustomToolCallOutput { output, .. } => {
            output.clone()
        }
        Body::Reasoning { content } => content.clone(),
        Body::Compaction { summary } => summary.clone(),
    }
}

/// The field that holds it.
fn field(body: &Body) -> &'static str {
    match body {
        Body::Message { .. } => "message.content",
        Body::FunctionCall { .. } => "function_call.arguments",
        Body::CustomToolCall { .. } => "custom_tool_call.input",
        Body::FunctionCallOutput { .. } => "function_call_output.output",
        Body::CustomToolCallOutput { .. } => "custom_tool_call_output.output",
        Body::Reasoning { .. } => "reasoning.content",
        Body::Compaction { .. } => "compaction.summary",
    }
}

/// The part `within` of a text, with what stands in these places of the whole replaced. What begins in
/// an earlier part is only taken out.
fn replaced(text: &str, within: Range<usize>, places: &[(Range<usize>, &str)]) -> String {
    let mut out = String::with_capacity(within.len());
    let mut at = within.start;
    for (place, rule) in places {
        if place.end <= within.start || place.start >= within.end {
            continue;
        }
        if place.start >= within.start {
            out.push_str(&text[at..place.start]);
            out.push_str(&stand_in(rule));
        }
        at = place.end.min(within.end);
    }
    out.push_str(&text[at..within.end]);
    out
}

/// The same item with what stands in these places replaced. `None` where it cannot be.
fn redacted(body: &Body, text: &str, places: &[(Range<usize>, &str)]) -> Option<Body> {
    let whole = || -> Arc<str> { replaced(text, 0..text.len(), places).into() };
    let mut body = body.clone();
    match &mut body {
        Body::Message { parts, .. } => {
            let mut start = 0;
            for part in parts {
                let within = start..start + part.text().len();
                start = within.end;
                let fresh = replaced(text, within, places);
                if fresh == **part.text() {
                    continue;
                }
                *part = match part {
                    Part::InputText(_) => Part::InputText(fresh.into()),
                    // Log probabilities spell the text.
                    Part::OutputText { .. } => Part::OutputText {
                        text: fresh.into(),
                        logprobs: [].into(),
                    },
                    Part::Refusal(_) => Part::Refusal(fresh.into()),
                };
            }
        }
        Body::FunctionCall { arguments, .. } => {
            let fresh = whole();
            serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&fresh).ok()?;
            *arguments = fresh;
        }
        Body::CustomToolCall {
            input, arguments, ..
        } => {
            *input = whole();
            *arguments = serde_json::json!({ "input": &**input }).to_string().into();
        }
        Body::FunctionCallOutput { output, .. } | Body::CustomToolCallOutput { output, .. } => {
            *output = whole();
        }
        Body::Reasoning { content } => *content = whole(),
        Body::Compaction { summary } => *summary = whole(),
    }
    Some(body)
}
