//! What prompts are by definition: the whole text by the template, and the whole of its tokens anew,
//! except for what was sampled.

use std::sync::Arc;

use hotloop::{
    item::{Body, Item, Role, ToolKind},
    request::{Effort, Settings},
    template::{Call, KwargValue, Message, RenderInput, TemplateError, ToolDef, ToolsValue},
    tokenizer::Encoded,
};
use sha2::{Digest as _, Sha256};

use crate::support::{client::DATE, families::Family};

/// What a sample left in the text, as far as the text still has it.
#[derive(Debug, Clone)]
pub struct Pin {
    pub start: usize,
    pub text: String,
    pub ids: Vec<u32>,
}

/// A prompt, by definition instead of by increments.
#[derive(Debug, Clone, Default)]
pub struct Reference {
    pub text: String,
    pub untrusted: Vec<usize>,
    pub pins: Vec<Pin>,
}

impl Reference {
    /// The next prompt has this text. Samples stay where it still has their text; one that it has
    /// only the beginning of stays up to the last added token that it has.
    pub fn render(&mut self, family: &Family, text: String, untrusted: Vec<usize>) {
        let common = self
            .text
            .bytes()
            .zip(text.bytes())
            .take_while(|(a, b)| a == b)
            .count();
        let in_pin = |at: usize| {
            self.pins
                .iter()
                .any(|pin| (pin.start..pin.start + pin.text.len()).contains(&at))
        };
        let trust = self
            .untrusted
            .iter()
            .filter(|at| !untrusted.contains(at))
            .chain(untrusted.iter().filter(|at| !self.untrusted.contains(at)))
            .filter(|at| !in_pin(**at))
            .min();
        let common = trust.map_or(common, |at| common.min(*at));
        self.pins.retain_mut(|pin| {
            let room = common.saturating_sub(pin.start);
            if pin.text.len() > room {
                let kept = (1..pin.ids.len()).rev().find(|at| {
                    let before = lossy(family, &pin.ids[..*at]).len();
                    let tokenizer = &family.artifacts.tokenizer;
                    tokenizer.is_cut(pin.ids[*at])
                        && before + tokenizer.bytes_of(pin.ids[*at]).len() <= room
                });
                pin.ids.truncate(kept.unwrap_or(0));
                pin.text = lossy(family, &pin.ids);
            }
            !pin.ids.is_empty()
        });
        self.text = text;
        self.untrusted = untrusted;
    }

    pub fn sample(&mut self, family: &Family, ids: &[u32]) {
        if !ids.is_empty() {
            let pin = Pin {
                start: self.text.len(),
                text: lossy(family, ids),
                ids: ids.to_vec(),
            };
            self.text.push_str(&pin.text);
            self.pins.push(pin);
        }
    }

    pub fn ends_sampled(&self) -> bool {
        let last = self.pins.last();
        last.is_some_and(|pin| pin.start + pin.text.len() == self.text.len())
    }

    /// All tokens: samples as they are, everything between them encoded as a whole.
    pub fn tokens(&self, family: &Family) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut at = 0;
        for pin in &self.pins {
            self.stretch(family, at..pin.start, &mut ids);
            ids.extend_from_slice(&pin.ids);
            at = pin.start + pin.text.len();
        }
        self.stretch(family, at..self.text.len(), &mut ids);
        ids
    }

    fn stretch(&self, family: &Family, range: std::ops::Range<usize>, ids: &mut Vec<u32>) {
        let text = &self.text[range.clone()];
        // A token that takes the white space behind it takes it from what follows a sample, too.
        let last = ids.last().and_then(|id| family.added.get(id));
        let swallows = last.is_some_and(|it| it.rstrip);
        let skip = if swallows {
            text.len() - text.trim_start().len()
        } else {
            0
        };
        let at = range.start + skip;
        let untrusted: Vec<usize> = self
            .untrusted
            .iter()
            .filter(|it| (at..range.end).contains(it))
            .map(|it| it - at)
            .collect();
        let mut encoded = Encoded::default();
        let tokenizer = &family.artifacts.tokenizer;
        tokenizer.encode(&text[skip..], at == 0, &untrusted, &mut encoded);
        ids.extend(encoded.ids);
    }

    /// The crate's own tokens of the whole text, where no text spells an added token and every
    /// sample is what the crate makes of its place.
    pub fn whole(&self, family: &Family) -> Option<Vec<u32>> {
        if !self.untrusted.is_empty() {
            return None;
        }
        let whole = family.theirs.encode(self.text.as_str(), false).unwrap();
        let (ids, offsets) = (whole.get_ids(), whole.get_offsets());
        let canonical = self.pins.iter().all(|pin| {
            let first = offsets.partition_point(|(start, _)| *start < pin.start);
            let end = first + pin.ids.len();
            ids.get(first..end) == Some(&pin.ids)
                && offsets[first].0 == pin.start
                && offsets
                    .get(end)
                    .is_none_or(|(start, _)| *start >= pin.start + pin.text.len())
        });
        canonical.then(|| ids.to_vec())
    }
}

pub fn lossy(family: &Family, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|id| family.artifacts.tokenizer.bytes_of(*id))
        .copied()
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The conversation in batches: the input of a command or the output of a sample.
pub type Batches = Vec<Vec<Arc<Item>>>;

/// The messages that the batches make, with their texts passed through `mark`.
pub fn messages(
    batches: &[Vec<Arc<Item>>],
    names: &Names,
    mark: &dyn Fn(&str) -> String,
) -> Vec<Message> {
    #[derive(Default)]
    struct Turn<'a> {
        reasoning: Option<String>,
        text: Option<String>,
        calls: Vec<(&'a str, &'a str, String)>,
    }
    fn flush(turn: &mut Turn<'_>, out: &mut Vec<Message>) {
        let Turn {
            reasoning,
            text,
            calls,
        } = std::mem::take(turn);
        if reasoning.is_none() && text.is_none() && calls.is_empty() {
            return;
        }
        let calls: Vec<Call<'_>> = calls
            .iter()
            .map(|(id, name, arguments)| Call {
                id,
                name,
                arguments: arguments.as_str().into(),
            })
            .collect();
        out.push(Message::assistant(
            reasoning.as_deref(),
            text.as_deref(),
            &calls,
        ));
    }
    let mut out = Vec::new();
    for batch in batches {
        let mut turn = Turn::default();
        for item in batch {
            let begun = turn.text.is_some() || !turn.calls.is_empty();
            match &item.body {
                Body::Reasoning { content } => {
                    if begun {
                        flush(&mut turn, &mut out);
                    }
                    let so_far = turn.reasoning.take().unwrap_or_default();
                    turn.reasoning = Some(so_far + &mark(content));
                }
                Body::Message {
                    role: Role::Assistant,
                    parts,
                } => {
                    if begun {
                        flush(&mut turn, &mut out);
                    }
                    let text: String = parts.iter().map(|part| &**part.text()).collect();
                    turn.text = Some(mark(&text));
                }
                Body::FunctionCall {
                    call_id,
                    name,
                    arguments,
                } => {
                    turn.calls.push((call_id.as_str(), name, mark(arguments)));
                }
                Body::Message { role, parts } => {
                    flush(&mut turn, &mut out);
                    let text: String = parts.iter().map(|part| &**part.text()).collect();
                    let role = match role {
                        Role::System => "system",
                        Role::Developer => names.developer,
                        Role::User | Role::Assistant => "user",
                    };
                    out.push(Message::text(role, mark(&text)));
                }
                Body::FunctionCallOutput { call_id, output } => {
                    flush(&mut turn, &mut out);
                    let name = names.calls.iter().find(|(id, _)| id == call_id.as_str());
                    let name = name.map_or("", |(_, name)| name);
                    out.push(Message::tool_output(call_id.as_str(), name, mark(output)));
                }
                Body::Compaction { summary } => {
                    flush(&mut turn, &mut out);
                    out.push(Message::text("user", mark(summary)));
                }
                Body::CustomToolCall { .. } | Body::CustomToolCallOutput { .. } => unreachable!(),
            }
        }
        flush(&mut turn, &mut out);
    }
    out
}

/// What items alone do not tell.
#[derive(Debug, Clone)]
pub struct Names {
    /// What the template calls a developer.
    pub developer: &'static str,
    pub calls: Vec<(String, String)>,
}

/// The whole prompt by the template.
pub fn full_text(
    family: &Family,
    settings: &Settings,
    messages: Vec<Message>,
    generation_prompt: bool,
    mark: &dyn Fn(&str) -> String,
) -> Result<String, TemplateError> {
    let instructions = settings.instructions.iter();
    let messages: Vec<Message> = instructions
        .map(|text| Message::text("system", mark(text)))
        .chain(messages)
        .collect();
    let texts: Vec<(String, Option<String>, String)> = settings
        .tools()
        .iter()
        .map(|tool| {
            let ToolKind::Function { parameters, .. } = &tool.kind else {
                unreachable!("only functions here")
            };
            // In a template a schema's strings stand without these escapes.
            let parameters = parameters.replace("\\u003c", "<");
            let description = tool.description.as_deref().map(mark);
            (tool.name.to_string(), description, mark(&parameters))
        })
        .collect();
    let tools: Vec<ToolDef<'_>> = texts
        .iter()
        .map(|(name, description, parameters)| ToolDef {
            name,
            description: description.as_deref(),
            parameters,
        })
        .collect();
    let tools = (!tools.is_empty()).then(|| ToolsValue::new(&tools).unwrap());
    let mut kwargs = Vec::new();
    if let Some(effort) = settings.reasoning_effort {
        kwargs.push(("enable_thinking", KwargValue::Flag(effort != Effort::None)));
        kwargs.push(("reasoning_effort", KwargValue::Text(effort.as_str().into())));
    }
    family.artifacts.template.render(&RenderInput {
        messages: Arc::new(messages),
        tools: tools.as_ref(),
        add_generation_prompt: generation_prompt,
        now: DATE.at(0, 0, 0, 0),
        kwargs: &kwargs,
    })
}

/// Text of the same length, line for line, in which nothing can be read as an added token.
pub fn harmless(text: &str) -> String {
    let mut text = text.replace("\\u003c", "\\u0078");
    for literal in [
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ] {
        let inner = &literal[1..literal.len() - 1];
        text = text.replace(literal, &format!("x{inner}y"));
    }
    text.replace('<', "x").replace('>', "y").replace('|', "z")
}
/// Fails where the two differ, showing the place only.
pub fn same_tokens(family: &Family, found: &[u32], wanted: &[u32], what: &str) {
    if found == wanted {
        return;
    }
    let at = found.iter().zip(wanted).take_while(|(a, b)| a == b).count();
    let around = |ids: &[u32]| {
        let range = at.saturating_sub(8)..(at + 12).min(ids.len());
        let texts = ids[range].iter().map(|id| lossy(family, &[*id]));
        texts.collect::<Vec<_>>()
    };
    panic!(
        "{what}: token {at} of {} and {}\n found: {:?}\nwanted: {:?}",
        found.len(),
        wanted.len(),
        around(found),
        around(wanted)
    );
}

pub fn fingerprint(ids: &[u32]) -> [u8; 16] {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Sha256::digest(bytes)[..16].try_into().unwrap()
}
