//! What the settings ask of an answer, as the grammar that its sample keeps to.

use std::sync::Arc;

use crate::{
    backend::Ungrammatical,
    event::Error,
    item::{Tool, ToolKind},
    model::Artifacts,
    parse::{Calls, Demand, Grammar, NoGrammar, ParserOptions},
    request::{Settings, TextFormat},
};

/// The field that asks for a format of the text.
const TEXT: &str = "create.text";

/// The schema of any JSON object, which the arguments of every call are.
const ANY_OBJECT: &str = r#"{"type": "object"}"#;

/// The schema of any JSON.
const ANY_JSON: &str = "{}";

/// The schema of the arguments in which a model writes the text for a custom tool.
const CUSTOM_ARGUMENTS: &str = r#"{"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": false}"#;

/// The grammar that the settings ask for, behind a prompt with this end; `None`: they leave the
/// answer free.
///
/// # Errors
///
/// `invalid_request` where the model's output format cannot keep to it, naming the field.
pub(super) fn grammar(
    settings: &Settings,
    artifacts: &Artifacts,
    prompt_tail: &str,
) -> Result<Option<Grammar>, Error> {
    let json = match &settings.text {
        None | Some(TextFormat::Plain) => None,
        Some(TextFormat::JsonObject) => Some(ANY_OBJECT.into()),
        Some(TextFormat::JsonSchema { strict: false, .. }) => Some(ANY_JSON.into()),
        Some(TextFormat::JsonSchema { schema, .. }) => Some(schema.clone()),
    };
    let strict = settings.callable().any(is_strict);
    if json.is_none() && !strict && !settings.requires_call() {
        return Ok(None);
    }
    let calls = Calls {
        tools: settings.callable().map(arguments).collect(),
        required: settings.requires_call(),
        parallel: settings.parallel_tool_calls.unwrap_or(true),
    };
    let mut demand = Demand {
        json,
        calls: (!calls.tools.is_empty()).then_some(calls),
    };
    let family = artifacts.family;
    let parsing = ParserOptions {
        in_reasoning: family.reasoning_opened(prompt_tail),
        ..artifacts.parsing.clone()
    };
    let mut grammar = family.grammar(&parsing, &demand);
    if grammar == Err(NoGrammar::NoCalls) && !strict && !settings.requires_call() {
        // No call is asked for, and none will be.
        demand.calls = None;
        grammar = family.grammar(&parsing, &demand);
    }
    grammar.map(Some).map_err(|error| {
        let field = match error {
            NoGrammar::NoCalls | NoGrammar::NoMarkers => calls_field(settings),
            NoGrammar::JsonBesideCalls => TEXT.to_owned(),
        };
        Error::invalid(field, error.to_string())
    })
}

/// The error where a backend cannot keep to the grammar of these settings.
pub(super) fn refused(settings: &Settings, error: &Ungrammatical) -> Error {
    let of_text = match (&settings.text, &error.schema) {
        (Some(TextFormat::JsonSchema { schema, .. }), Some(other)) => schema == other,
        (
            None | Some(TextFormat::Plain | TextFormat::JsonObject | TextFormat::JsonSchema { .. }),
            _,
        ) => false,
    };
    let of_tool = settings.tools().iter().position(|tool| match &tool.kind {
        ToolKind::Function { parameters, strict } => {
            *strict && Some(parameters) == error.schema.as_ref()
        }
        ToolKind::Custom => false,
    });
    let field = match of_tool {
        _ if of_text => "create.text.json_schema.schema".to_owned(),
        Some(index) => format!("create.tools[{index}].function.parameters"),
        None => calls_field(settings),
    };
    Error::invalid(field, error.to_string())
}

/// The field that asks for something of calls; that of the text where none does.
fn calls_field(settings: &Settings) -> String {
    let strict = settings
        .tools()
        .iter()
        .position(|tool| is_strict(tool) && settings.may_call(tool));
    match strict {
        Some(index) => format!("create.tools[{index}].function.strict"),
        None if settings.requires_call() => "create.tool_choice".to_owned(),
        None => TEXT.to_owned(),
    }
}

fn is_strict(tool: &Tool) -> bool {
    match tool.kind {
        ToolKind::Function { strict, .. } => strict,
        ToolKind::Custom => false,
    }
}

/// The tool's name, and the schema that the arguments of its calls keep to.
fn arguments(tool: &Tool) -> (Arc<str>, Arc<str>) {
    let schema = match &tool.kind {
        ToolKind::Function {
            parameters,
            strict: true,
        } => parameters.clone(),
        ToolKind::Function { strict: false, .. } => ANY_OBJECT.into(),
        ToolKind::Custom => CUSTOM_ARGUMENTS.into(),
    };
    (tool.name.clone(), schema)
}
