//! Grammars at work: which token may come next.
//!
//! The crate `llguidance` walks a tree of all tokens of the vocabulary along a grammar and tells,
//! token by token, which may follow. A grammar is compiled when a response asks for it, which
//! refuses what cannot be kept to before anything is sampled, and kept for the next one of the
//! same tenant.

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
};
use serde_json::{Value, json};

use super::LoadError;
use crate::{
    backend::Ungrammatical,
    item::Tenant,
    parse::Grammar,
    tokenizer::{TokenId, Tokenizer},
};

/// How many compiled grammars are kept.
const COMPILED_MAX: u64 = 64;

/// The most bytes that one schema may have, as it was sent.
const SCHEMA_BYTES_MAX: usize = 256 << 10;

/// The most values in one schema, keys not counted. The compiler recurses over properties.
const SCHEMA_VALUES_MAX: usize = 2_000;

/// The most symbols of a compiled grammar.
const GRAMMAR_SYMBOLS_MAX: usize = 100_000;

/// The most states that the lexer of one sample may come to, about 2 KB each.
const LEXER_STATES_MAX: usize = 50_000;

/// The most bytes of whitespace between two tokens of JSON: a model that has nothing to say must
/// not write spaces for ever.
const JSON_SPACE_BYTES_MAX: usize = 64;

/// The longest token that the tree of tokens holds, in bytes. A longer one is never allowed.
const TOKEN_BYTES_MAX: usize = 1000;

/// The most bytes of the compiler's explanation that are told.
const REASON_BYTES_MAX: usize = 300;

/// The vocabulary of one model, and the grammars over it.
pub(super) struct Guides {
    factory: ParserFactory,
    /// The ids of the control tokens, by content.
    control: HashMap<Box<str>, TokenId>,
    end_tokens: Arc<[TokenId]>,
    compiled: moka::sync::Cache<(Tenant, Arc<Grammar>), Arc<Matcher>>,
}

impl std::fmt::Debug for Guides {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guides").finish_non_exhaustive()
    }
}

impl Guides {
    /// Builds the tree of tokens.
    pub(super) fn new(
        tokenizer: &Tokenizer,
        end_tokens: &Arc<[TokenId]>,
    ) -> Result<Self, LoadError> {
        let vocabulary = |reason: String| LoadError::Vocabulary { reason };
        let size = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let end_tokens: Arc<[TokenId]> =
            end_tokens.iter().copied().filter(|id| *id < size).collect();
        let Some(first_end) = end_tokens.first() else {
            return Err(vocabulary("no token of it ends an answer".into()));
        };
        let mut control = HashMap::new();
        let words: Vec<Vec<u8>> = (0..size)
            .map(|id| {
                let bytes = tokenizer.bytes_of(id);
                if tokenizer.is_control(id) || end_tokens.contains(&id) {
                    if let Some(content) = tokenizer.added(id) {
                        control.insert(content.into(), id);
                    }
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
                } else if bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER)
                    || bytes.len() > TOKEN_BYTES_MAX
                {
                    // That byte is in no text, and stands for what is no text in the tree.
                    Vec::new()
                } else {
                    bytes.to_vec()
                }
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(size, *first_end), &words);
        let trie = trie.with_eos_tokens(&end_tokens);
        // The model chooses how to cut a text into tokens: nothing is forced but the text.
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&env).map_err(|error| vocabulary(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_grammar_size: GRAMMAR_SYMBOLS_MAX,
            max_lexer_states: LEXER_STATES_MAX,
            // It would put what was sampled into the message.
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self {
            factory,
            control,
            end_tokens,
            compiled: moka::sync::Cache::new(COMPILED_MAX),
        })
    }

    /// Whether samples can keep to the grammar. Compiles it where it is not kept.
    pub(super) fn check(
        &self,
        tenant: &Tenant,
        grammar: &Arc<Grammar>,
    ) -> Result<(), Ungrammatical> {
        self.get(tenant, grammar).map(|_| ())
    }

    /// The state with which one sample keeps to the grammar.
    pub(super) fn guide(
        &self,
        tenant: &Tenant,
        grammar: &Arc<Grammar>,
    ) -> Result<Guide, Ungrammatical> {
        // What the lexer learns on the way is the sample's own: it would grow for as long as the
        // grammar is kept.
        let matcher = self.get(tenant, grammar)?.deep_clone();
        Ok(Guide(Box::new(matcher)))
    }

    fn get(&self, tenant: &Tenant, grammar: &Arc<Grammar>) -> Result<Arc<Matcher>, Ungrammatical> {
        let key = (tenant.clone(), grammar.clone());
        self.compiled
            .try_get_with(key, || self.compile(grammar).map(Arc::new))
            .map_err(|error| (*error).clone())
    }

    fn compile(&self, grammar: &Grammar) -> Result<Matcher, Ungrammatical> {
        let mut lark = Lark {
            guides: self,
            rules: String::new(),
            count: 0,
            schemas: HashMap::new(),
        };
        let start = lark.expression(grammar)?;
        let text = format!("start: {start}\n{}", lark.rules);
        let schemas: Vec<Arc<str>> = lark.schemas.into_keys().collect();
        self.parser(text).map_err(|reason| {
            // Which of several schemas it was is not told: each is tried alone.
            let alone = schemas.into_iter().find_map(|schema| {
                let text = format!("start: %json {}", spaced(&schema).ok()?);
                let reason = self.parser(text).err()?;
                Some(Ungrammatical {
                    schema: Some(schema),
                    reason,
                })
            });
            alone.unwrap_or(Ungrammatical {
                schema: None,
                reason,
            })
        })
    }

    fn parser(&self, lark: String) -> Result<Matcher, String> {
        let parser = self.factory.create_parser(TopLevelGrammar::from_lark(lark));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            None => Ok(matcher),
            Some(error) => Err(reason(&error)),
        }
    }
}

/// The gist of what the compiler says, without the place in a text that nobody has seen.
fn reason(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    let gist = ["failed to compile JSON schema: ", "): "]
        .into_iter()
        .find_map(|lead| line.split_once(lead))
        .map_or(line, |(_, gist)| gist);
    let detail = error.lines().find_map(|line| line.strip_prefix("error: "));
    let gist = match detail {
        Some(detail) => format!("{gist} {detail}"),
        None => gist.to_owned(),
    };
    gist[..gist.floor_char_boundary(REASON_BYTES_MAX)].to_owned()
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

/// Writes a grammar in the language that the crate reads.
struct Lark<'a> {
    guides: &'a Guides,
    rules: String,
    count: usize,
    /// The rule of each schema.
    schemas: HashMap<Arc<str>, String>,
}

impl Lark<'_> {
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
        let id = self.guides.control.get(content);
        let id = id.ok_or_else(|| refuse("is no token of the vocabulary"))?;
        if self.guides.end_tokens.contains(id) {
            return Err(refuse("ends an answer"));
        }
        Ok(format!("<[{id}]>"))
    }
}

/// One sample on its way through a grammar.
pub(super) struct Guide(Box<Matcher>);

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").finish_non_exhaustive()
    }
}

/// The grammar came to an end that is none: no token may follow, or it has become too complex.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the sample cannot keep to its constraint: {0}")]
pub(super) struct Stuck(String);

impl Guide {
    /// Takes the chance from all tokens that may not come next. An end token may where the grammar
    /// is complete.
    pub(super) fn mask(&mut self, logits: &mut [f32]) -> Result<(), Stuck> {
        let allowed = self.0.compute_mask_or_eos().map_err(stuck)?;
        keep(&allowed, logits);
        Ok(())
    }

    /// Goes on by a token that was allowed and ends nothing.
    pub(super) fn advance(&mut self, token: TokenId) -> Result<(), Stuck> {
        self.0.consume_token(token).map_err(stuck)
    }
}

fn stuck(error: impl std::fmt::Display) -> Stuck {
    Stuck(reason(&error.to_string()))
}

/// Takes the chance from all tokens that are not in the set, those included that only pad the
/// model's vocabulary.
fn keep(allowed: &SimpleVob, logits: &mut [f32]) {
    for (id, logit) in logits.iter_mut().enumerate() {
        if id >= allowed.len() || !allowed.get(id) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests;
