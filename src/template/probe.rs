//! What can be found out about a template by trying it: in which form it takes calls, whether what follows a turn
//! changes the text of that turn, and whether a rendering that goes on gives what one from the start does.

use std::sync::Arc;

use jiff::civil::{DateTime, date};

use super::{
    CALL_FORMS, Call, CallForm, Message, Place, RenderInput, Template, TemplateError, ToolDef,
    ToolsValue,
};

/// Which appends a template is stable under: the text up to the end of what the model wrote last stays as it was.
///
/// The mark that ends a turn is not looked at: some templates write another one when nothing follows (gpt-oss), or an
/// end of sequence (Phi), but that costs a token, not a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appends {
    /// A tool's output after the call. False means that every step of an agent's loop prefills its last turn again.
    pub tool_outputs: bool,
    /// A user message after an answer. False, for instance, where the template drops the reasoning of earlier turns.
    pub user_messages: bool,
}

const ARGUMENTS: &str = r#"{"probe": "zq7x"}"#;
/// The part of the arguments that every template prints, whatever its format.
const ARGUMENT: &str = "zq7x";
const REASONING: &str = "zq8x reasons";
const ANSWER: &str = "zq9x answers";

const NOW: DateTime = date(2024, 7, 26).at(12, 0, 0, 0);

/// The first form in which the template prints a call's arguments, or else the commonest.
///
/// The order matters: templates that take mappings and text alike (Gemma 4) write the model's own format only from a
/// mapping, and where that format is JSON a mapping prints as it was sampled too.
pub(super) fn call_form(template: &Template) -> CallForm {
    let conversation = [user(), turn(None, None, 1), output()];
    let tools = tools();
    let input = input(&conversation, tools.as_ref(), true);
    let prints = |form: &CallForm| {
        template
            .render_as(*form, &input)
            .is_ok_and(|text| text.contains(ARGUMENT))
    };
    CALL_FORMS.into_iter().find(prints).unwrap_or(CALL_FORMS[0])
}

/// Tries both kinds of append on every conversation of [`histories`].
pub(super) fn appends(template: &Template) -> Appends {
    let tools = tools();
    let mut tool_outputs = Verdict::default();
    let mut user_messages = Verdict::default();
    for history in histories() {
        for tools in [None, tools.as_ref()] {
            // A template that writes reasoning is judged by turns that have some: its model reasons in every turn.
            let judge = |content: Option<&str>, calls: usize, appended: &[Message]| {
                let turn = |reasoning| turn(reasoning, content, calls);
                is_stable(template, tools, &history, &turn(Some(REASONING)), appended)
                    .or_else(|| is_stable(template, tools, &history, &turn(None), appended))
            };
            for (content, calls) in [(None, 1), (Some(ANSWER), 1), (None, 2)] {
                tool_outputs.add(judge(content, calls, &vec![output(); calls]));
            }
            user_messages.add(judge(Some(ANSWER), 0, &[user()]));
        }
    }
    Appends {
        tool_outputs: tool_outputs.is_stable(),
        user_messages: user_messages.is_stable(),
    }
}

/// Whether renderings that go on give what those from the start do, as conversations grow message by message. It
/// follows from how the template was rewritten; a slip in that must not reach a prompt.
pub(super) fn resumes(template: &Template) -> bool {
    let tools = tools();
    histories().into_iter().all(|history| {
        let appended = [
            turn(Some(REASONING), Some(ANSWER), 2),
            output(),
            output(),
            user(),
            turn(None, Some(ANSWER), 0),
        ];
        let whole = [history, appended.to_vec()].concat();
        [None, tools.as_ref()].into_iter().all(|tools| {
            let mut growing = Growing::default();
            (1..=whole.len()).all(|len| {
                let input = input(&whole[..len], tools, true);
                growing.render(template, &input).ok() == template.render(&input).ok()
            })
        })
    })
}

/// A conversation that is rendered as it grows, each time on from the last rendering.
#[derive(Default)]
pub(super) struct Growing {
    place: Option<Place>,
    /// The text up to that place.
    before: String,
}

impl Growing {
    /// The whole text, of which the template rendered what it could not leave out.
    pub(super) fn render(
        &mut self,
        template: &Template,
        input: &RenderInput<'_>,
    ) -> Result<String, TemplateError> {
        let rendered = template.render_on(input, self.place.as_ref())?;
        let [middle, end] = rendered.parts;
        if !rendered.resumed {
            self.before.clear();
        }
        self.before += &middle;
        self.place = rendered.next;
        Ok(format!("{}{end}", self.before))
    }
}

/// How the cases of one kind of append went. A case that the template refuses says nothing.
#[derive(Default)]
struct Verdict {
    kept: usize,
    changed: usize,
}

impl Verdict {
    fn add(&mut self, stable: Option<bool>) {
        match stable {
            Some(true) => self.kept += 1,
            Some(false) => self.changed += 1,
            None => {}
        }
    }

    fn is_stable(&self) -> bool {
        self.kept > 0 && self.changed == 0
    }
}

/// Whether the prompt that `turn` was sampled from, and `turn` itself as far as the model wrote it, stand unchanged at
/// the start of the text once `appended` follows. `None` when the template refuses one of the conversations, or does
/// not write the turn's reasoning.
fn is_stable(
    template: &Template,
    tools: Option<&ToolsValue>,
    history: &[Message],
    turn: &Message,
    appended: &[Message],
) -> Option<bool> {
    let reasons = turn
        .value(CALL_FORMS[0])
        .get_attr("reasoning_content")
        .is_ok_and(|text| !text.is_undefined());
    let mut messages = history.to_vec();
    let prompt = template.render(&input(&messages, tools, true)).ok()?;
    messages.push(turn.clone());
    let answered = template.render(&input(&messages, tools, false)).ok()?;
    messages.extend_from_slice(appended);
    let next = template.render(&input(&messages, tools, true)).ok()?;
    // Earlier turns of the history hold the same words; only those after the prompt are this turn's.
    let start = prompt.len().min(answered.len());
    let tail = answered.get(start..).unwrap_or_default();
    if reasons && !tail.contains(REASONING) {
        return None;
    }
    let end = [REASONING, ANSWER, ARGUMENT]
        .iter()
        .filter_map(|text| Some(tail.rfind(text)? + text.len()))
        .max();
    let Some(end) = end else {
        return Some(false);
    };
    Some(answered.starts_with(&prompt) && next.starts_with(&answered[..start + end]))
}

/// Conversations that a turn of the assistant can follow.
fn histories() -> Vec<Vec<Message>> {
    let system = || Message::text("system", "Be brief.");
    let answer = || Message::assistant(None, Some("An earlier answer."), &[]);
    vec![
        vec![user()],
        vec![system(), user()],
        vec![user(), answer(), user()],
        vec![system(), user(), turn(None, None, 1), output()],
        vec![user(), turn(Some("An earlier thought."), None, 1), output()],
        vec![
            user(),
            turn(None, None, 1),
            output(),
            answer(),
            user(),
            turn(None, None, 1),
            output(),
        ],
    ]
}

fn user() -> Message {
    Message::text("user", "What now?")
}

fn turn(reasoning: Option<&str>, content: Option<&str>, calls: usize) -> Message {
    // Nine letters or digits, as Mistral demands.
    Message::assistant(
        reasoning,
        content,
        &vec![
            Call {
                id: "abcdefghi",
                name: "look",
                arguments: ARGUMENTS.into(),
            };
            calls
        ],
    )
}

fn output() -> Message {
    Message::tool_output("abcdefghi", "look", "An output.")
}

fn tools() -> Option<ToolsValue> {
    let parameters =
        r#"{"type": "object", "properties": {"probe": {"type": "string"}}, "required": ["probe"]}"#;
    ToolsValue::new(&[ToolDef {
        name: "look",
        description: Some("Looks."),
        parameters,
    }])
    .ok()
}

fn input<'a>(
    messages: &[Message],
    tools: Option<&'a ToolsValue>,
    add_generation_prompt: bool,
) -> RenderInput<'a> {
    RenderInput {
        messages: Arc::new(messages.to_vec()),
        tools,
        add_generation_prompt,
        now: NOW,
        kwargs: &[],
    }
}
