//! A grammar in the language that llguidance reads, in this process and in engines that use it.

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use serde_json::{Value, json};

use super::Ungrammatical;
use crate::{parse::Grammar, tokenizer::TokenId};

/// The most bytes that one schema may have, as it was sent.
pub(super) const SCHEMA_BYTES_MAX: usize = 256 << 10;

/// The most values in one schema, keys not counted. The compiler recurses over properties.
pub(super) const SCHEMA_VALUES_MAX: usize = 2_000;

/// The most bytes of whitespace between two tokens of JSON: a model that has nothing to say must
/// not write spaces for ever.
const JSON_SPACE_BYTES_MAX: usize = 64;

/// A grammar as text.
pub(super) struct Lark {
    /// The grammar.
    pub(super) text: String,
    /// The schemas in it.
    #[cfg(feature = "local")]
    pub(super) schemas: Vec<Arc<str>>,
}

impl Lark {
    /// Writes the grammar for a vocabulary that has these control tokens, by content, and in which
    /// these tokens end an answer.
    pub(super) fn new(
        grammar: &Grammar,
        control: &dyn Fn(&str) -> Option<TokenId>,
        end_tokens: &[TokenId],
    ) -> Result<Self, Ungrammatical> {
        let mut writer = Writer {
            control,
            end_tokens,
            rules: String::new(),
            count: 0,
            schemas: HashMap::new(),
        };
        let start = writer.expression(grammar)?;
        Ok(Self {
            text: format!("start: {start}\n{}", writer.rules),
            #[cfg(feature = "local")]
            schemas: writer.schemas.into_keys().collect(),
        })
    }

    /// The grammar of this schema alone.
    #[cfg(feature = "local")]
    pub(super) fn of_schema(schema: &Arc<str>) -> Result<String, Ungrammatical> {
        Ok(format!("start: %json {}", spaced(schema)?))
    }
}

/// The schema with our own rule for whitespace, and without any that it brings.
fn spaced(schema: &Arc<str>) -> Result<Value, Ungrammatical> {
    let refuse = |reason: &str| Ungrammatical {
        schema: Some(schema.clone()),
        reason: reason.to_owned(),
    };
    if schema.len() > SCHEMA_BYTES_MAX {
        return Err(refuse(&format!(
            "it has more than {SCHEMA_BYTES_MAX} bytes"
        )));
    }
    let mut value: Value = serde_json::from_str(schema).map_err(|_| refuse("it is not JSON"))?;
    if count(&value) > SCHEMA_VALUES_MAX {
        return Err(refuse(&format!(
            "it has more than {SCHEMA_VALUES_MAX} values"
        )));
    }
    let Some(object) = value.as_object_mut() else {
        return Err(refuse("it is not a JSON object"));
    };
    let space = format!("[ \\n\\r\\t]{{1,{JSON_SPACE_BYTES_MAX}}}");
    object.insert("x-guidance".into(), json!({"whitespace_pattern": space}));
    Ok(value)
}

/// How many values there are in it. JSON that was read nests at most 128 deep.
fn count(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 1,
        Value::Array(values) => 1 + values.iter().map(count).sum::<usize>(),
        Value::Object(members) => 1 + members.values().map(count).sum::<usize>(),
    }
}

struct Writer<'a> {
    control: &'a dyn Fn(&str) -> Option<TokenId>,
    end_tokens: &'a [TokenId],
    rules: String,
    count: usize,
    /// The rule of each schema.
    schemas: HashMap<Arc<str>, String>,
}

impl Writer<'_> {
    fn expression(&mut self, grammar: &Grammar) -> Result<String, Ungrammatical> {
        Ok(match grammar {
            Grammar::Text(text) => Value::from(text.as_str()).to_string(),
            Grammar::Token(content) => self.token(content)?,
            Grammar::Json(schema) => match self.schemas.get(schema) {
                Some(rule) => rule.clone(),
                None => {
                    let rule = self.rule("json", "", &format!("%json {}", spaced(schema)?));
                    self.schemas.insert(schema.clone(), rule.clone());
                    rule
                }
            },
            Grammar::Free => self.rule("FREE", "", "/(?s:.*)/"),
            Grammar::Until(text) => {
                let suffix = format!("[suffix={}]", Value::from(*text));
                self.rule("until", &suffix, "/(?s:.*)/")
            }
            Grammar::Without(text) => {
                let text = regex::escape(text).replace('/', "\\/");
                let body = format!("/(?s:.*)/ & ~/(?s:.*{text}.*)/");
                self.rule("WITHOUT", "", &body)
            }
            Grammar::Prose(not_first) => {
                let not_first = regex::escape(not_first);
                let body = format!("/[ \\t\\r\\n]*([^ \\t\\r\\n{not_first}](?s:.*))?/");
                self.rule("PROSE", "", &body)
            }
            Grammar::Each(parts) if parts.is_empty() => "\"\"".to_owned(),
            Grammar::Each(parts) => self.joined(parts, " ")?,
            Grammar::Either(options) => self.joined(options, " | ")?,
            Grammar::Repeat { of, min, max } => {
                let of = self.expression(of)?;
                match (min, max) {
                    (min, None) => format!("({of}){{{min},}}"),
                    (_, Some(0)) => "\"\"".to_owned(),
                    (min, Some(max)) => format!("({of}){{{min},{max}}}"),
                }
            }
        })
    }

    fn joined(&mut self, parts: &[Grammar], by: &str) -> Result<String, Ungrammatical> {
        let parts = parts.iter().map(|part| self.expression(part));
        let parts: Vec<String> = parts.collect::<Result<_, _>>()?;
        Ok(format!("({})", parts.join(by)))
    }

    fn rule(&mut self, name: &str, attributes: &str, body: &str) -> String {
        let separator = if name.chars().all(char::is_uppercase) {
            "_N"
        } else {
            "_"
        };
        let name = format!("{name}{separator}{}", self.count);
        self.count += 1;
        // Writing to a string cannot fail.
        let _ = writeln!(self.rules, "{name}{attributes}: {body}");
        name
    }

    fn token(&self, content: &str) -> Result<String, Ungrammatical> {
        let refuse = |why: &str| Ungrammatical {
            schema: None,
            reason: format!("the marker {content} {why}"),
        };
        let id = (self.control)(content);
        let id = id.ok_or_else(|| refuse("is no token of the vocabulary"))?;
        if self.end_tokens.contains(&id) {
            return Err(refuse("ends an answer"));
        }
        Ok(format!("<[{id}]>"))
    }
}
