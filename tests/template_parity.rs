//! Every template of this repository, over conversations rendered by Jinja2 as `transformers` sets it up
//! (`template_parity/make_reference.py`): the same text, or the same refusal.

#![expect(clippy::unwrap_used, reason = "a broken reference file fails the test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use hotloop::template::{
    Call, KwargValue, Message, RenderInput, SpecialTokens, Template, TemplateError, ToolDef,
    ToolsValue,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Row {
    messages: Vec<MessageRow>,
    tools: Option<Vec<ToolRow>>,
    add_generation_prompt: bool,
    now: String,
    kwargs: BTreeMap<String, serde_json::Value>,
    expected: BTreeMap<String, Expected>,
}

#[derive(Deserialize)]
struct MessageRow {
    role: String,
    content: Option<String>,
    reasoning: Option<String>,
    #[serde(default)]
    calls: Vec<CallRow>,
    call_id: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct CallRow {
    id: String,
    name: String,
    arguments: String,
}

#[derive(Deserialize)]
struct ToolRow {
    name: String,
    description: Option<String>,
    parameters: String,
}

#[derive(Deserialize, PartialEq, Debug)]
#[serde(rename_all = "snake_case")]
enum Expected {
    Text(String),
    Refused(String),
    Failed(bool),
}

impl MessageRow {
    fn message(&self) -> Message {
        let content = self.content.as_deref();
        match self.role.as_str() {
            "assistant" => {
                let calls: Vec<Call<'_>> = self
                    .calls
                    .iter()
                    .map(|call| Call {
                        id: &call.id,
                        name: &call.name,
                        arguments: call.arguments.as_str().into(),
                    })
                    .collect();
                Message::assistant(self.reasoning.as_deref(), content, &calls)
            }
            "tool" => Message::tool_output(
                self.call_id.as_deref().unwrap(),
                self.name.as_deref().unwrap(),
                content.unwrap(),
            ),
            role => Message::text(role, content.unwrap()),
        }
    }
}

fn render(template: &Template, row: &Row) -> Expected {
    let messages: Vec<Message> = row.messages.iter().map(MessageRow::message).collect();
    let tools = row.tools.as_ref().map(|tools| {
        let tools: Vec<ToolDef<'_>> = tools
            .iter()
            .map(|tool| ToolDef {
                name: &tool.name,
                description: tool.description.as_deref(),
                parameters: &tool.parameters,
            })
            .collect();
        ToolsValue::new(&tools).unwrap()
    });
    let kwargs: Vec<(&str, KwargValue)> = row
        .kwargs
        .iter()
        .map(|(name, value)| match value.as_bool() {
            Some(flag) => (name.as_str(), KwargValue::Flag(flag)),
            None => (
                name.as_str(),
                KwargValue::Text(value.as_str().unwrap().to_owned()),
            ),
        })
        .collect();
    let rendered = template.render(&RenderInput {
        messages: Arc::new(messages),
        tools: tools.as_ref(),
        add_generation_prompt: row.add_generation_prompt,
        now: row.now.parse().unwrap(),
        kwargs: &kwargs,
    });
    match rendered {
        Ok(text) => Expected::Text(text),
        Err(TemplateError::Refused(message)) => Expected::Refused(message),
        Err(_) => Expected::Failed(true),
    }
}

#[test]
fn every_render_is_what_jinja2_makes_of_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let reference =
        std::fs::read_to_string(root.join("tests/template_parity/reference.jsonl")).unwrap();
    let specials = SpecialTokens {
        bos: Some("<s>".into()),
        eos: Some("</s>".into()),
        ..SpecialTokens::default()
    };
    let mut templates: BTreeMap<String, Template> = BTreeMap::new();
    let mut compared = 0;
    for (number, line) in reference.lines().enumerate() {
        let row: Row = serde_json::from_str(line).unwrap();
        for (name, expected) in &row.expected {
            let template = templates.entry(name.clone()).or_insert_with(|| {
                let path = match name.as_str() {
                    "sim" => root.join("models/sim/chat_template.jinja"),
                    name => root.join(format!("tests/templates/{name}.jinja")),
                };
                Template::new(&std::fs::read_to_string(path).unwrap(), specials.clone()).unwrap()
            });
            assert_eq!(
                &render(template, &row),
                expected,
                "template {name}, line {}",
                number + 1
            );
            compared += 1;
        }
    }
    assert_eq!(
        (templates.len(), compared),
        (7, 7 * 150),
        "the reference is whole"
    );
}
