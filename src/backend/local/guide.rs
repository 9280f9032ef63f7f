//! Grammars at work: which token may come next.
//!
//! The crate `llguidance` walks a tree of all tokens of the vocabulary along a grammar and tells,
//! token by token, which may follow. A grammar is compiled when a response asks for it, which
//! refuses what cannot be kept to before anything is sampled, and kept for the next one of the
//! same tenant.

use std::{collections::HashMap, sync::Arc};

use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
};

use super::LoadError;
use crate::{
    backend::{Ungrammatical, lark::Lark},
    item::Tenant,
    parse::Grammar,
    tokenizer::{TokenId, Tokenizer},
};

/// How many compiled grammars are kept.
const COMPILED_MAX: u64 = 64;

/// The most symbols of a compiled grammar.
const GRAMMAR_SYMBOLS_MAX: usize = 100_000;

/// The most states that the lexer of one sample may come to, about 2 KB each.
const LEXER_STATES_MAX: usize = 50_000;

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
        let control = |content: &str| self.control.get(content).copied();
        let Lark { text, schemas } = Lark::new(grammar, &control, &self.end_tokens)?;
        self.parser(text).map_err(|reason| {
            // Which of several schemas it was is not told: each is tried alone.
            let alone = schemas.into_iter().find_map(|schema| {
                let reason = self.parser(Lark::of_schema(&schema).ok()?).err()?;
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
