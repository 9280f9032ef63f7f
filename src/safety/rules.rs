//! The file of rules, as TOML. `docs/safety.md` documents it with an example.

use std::{collections::HashSet, path::Path, sync::Arc};

use aho_corasick::MatchKind as LiteralMatchKind;
use regex_automata::{
    MatchKind,
    dfa::{Automaton as _, StartKind, dense},
    nfa::thompson,
    util::syntax,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::rule::{Checksum, Filter, Matcher, Rule};
use crate::event::Scope;

/// The rules that are built in.
const DEFAULT: &str = include_str!("../../rules/default.toml");

/// The version of the format.
const VERSION: u32 = 1;

/// Bytes of one rule's automaton, and of what making it may take.
const AUTOMATON_BYTES_MAX: usize = 4 << 20;
const RULES_MAX: usize = 1_000;
const LITERALS_MAX: usize = 10_000;
const LITERAL_BYTES_MAX: usize = 256;
const ID_BYTES_MAX: usize = 64;
const MATCH_BYTES_MAX: usize = 64 << 10;
/// What a rule that does not say gets as its `match_bytes_max`.
const MATCH_BYTES: usize = 512;

/// Rules, in the order of their file.
#[derive(Debug, Default)]
pub struct Rules(Vec<Arc<Rule>>);

/// Why rules cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file cannot be read.
    #[error("cannot read the rules: {0}")]
    Read(#[from] std::io::Error),
    /// It is not what it should be.
    #[error("{0}")]
    Format(Box<toml::de::Error>),
    /// It is of another version.
    #[error("version is {0}, and this program reads {VERSION}")]
    Version(u32),
    /// There are too many.
    #[error("there are more than {RULES_MAX} rules")]
    TooMany,
    /// One of them cannot be used.
    #[error("rule `{id}`: {reason}")]
    Rule {
        /// Which.
        id: String,
        /// Why not.
        reason: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    #[serde(default)]
    allow: Allow,
    #[serde(default, rename = "rule")]
    rules: Vec<Source>,
}

/// A rule as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    id: String,
    #[serde(default)]
    description: String,
    regex: Option<String>,
    #[serde(default)]
    literals: Vec<String>,
    #[serde(default = "yes")]
    ignore_case: bool,
    #[serde(default = "yes")]
    whole_words: bool,
    #[serde(default)]
    keywords: Vec<String>,
    #[serde(default)]
    entropy_min: f64,
    checksum: Option<Checksum>,
    #[serde(default = "all_scopes")]
    scopes: Vec<Scope>,
    #[serde(default = "match_bytes")]
    match_bytes_max: usize,
    #[serde(default)]
    allow: Allow,
}

/// What is let through.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Allow {
    #[serde(default)]
    regexes: Vec<String>,
    #[serde(default)]
    literals: Vec<String>,
}

fn yes() -> bool {
    true
}

fn match_bytes() -> usize {
    MATCH_BYTES
}

fn all_scopes() -> Vec<Scope> {
    vec![
        Scope::UserInput,
        Scope::ToolOutput,
        Scope::ModelOutput,
        Scope::Reasoning,
    ]
}

impl Rules {
    /// Those that are built in.
    ///
    /// # Errors
    ///
    /// Never, as a test shows.
    pub fn built_in() -> Result<Self, RulesError> {
        Self::parse(DEFAULT)
    }

    /// Those of a file.
    ///
    /// # Errors
    ///
    /// What is wrong, and with which rule.
    pub fn read(path: &Path) -> Result<Self, RulesError> {
        Self::parse(&std::fs::read_to_string(path)?)
    }

    /// Those of a text.
    ///
    /// # Errors
    ///
    /// What is wrong, and with which rule.
    pub fn parse(text: &str) -> Result<Self, RulesError> {
        let file: File = toml::from_str(text).map_err(|it| RulesError::Format(Box::new(it)))?;
        if file.version != VERSION {
            return Err(RulesError::Version(file.version));
        }
        if file.rules.len() > RULES_MAX {
            return Err(RulesError::TooMany);
        }
        let mut ids = HashSet::new();
        let mut rules = Vec::with_capacity(file.rules.len());
        for mut source in file.rules {
            source.allow.regexes.extend(file.allow.regexes.clone());
            source.allow.literals.extend(file.allow.literals.clone());
            let made = match ids.insert(source.id.clone()) {
                true => rule(&source),
                false => Err("the id is that of one before it".to_owned()),
            };
            let made = made.map_err(|reason| RulesError::Rule {
                id: source.id.chars().take(ID_BYTES_MAX).collect(),
                reason,
            })?;
            rules.push(Arc::new(made));
        }
        Ok(Self(rules))
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> &[Arc<Rule>] {
        &self.0
    }
}

fn rule(source: &Source) -> Result<Rule, String> {
    let id_fits =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    if !(1..=ID_BYTES_MAX).contains(&source.id.len()) || !source.id.bytes().all(id_fits) {
        return Err(format!(
            "the id is not 1 to {ID_BYTES_MAX} characters of a-z 0-9 . - _"
        ));
    }
    if source.scopes.is_empty() {
        return Err("scopes is empty".to_owned());
    }
    if !(1..=MATCH_BYTES_MAX).contains(&source.match_bytes_max) {
        return Err(format!(
            "match_bytes_max is not from 1 to {MATCH_BYTES_MAX}"
        ));
    }
    if !(0.0..=8.0).contains(&source.entropy_min) {
        return Err("entropy_min is not from 0 to 8".to_owned());
    }
    let matcher = match (&source.regex, source.literals.as_slice()) {
        (Some(regex), []) => Matcher::Regex(Box::new(automaton(regex)?)),
        (None, literals @ [_, ..]) => literal_matcher(literals, source)?,
        (Some(_), [_, ..]) | (None, []) => {
            return Err("it needs one of regex and literals".to_owned());
        }
    };
    let text = serde_json::to_vec(source).map_err(|error| error.to_string())?;
    Ok(Rule {
        id: source.id.as_str().into(),
        scopes: source.scopes.clone(),
        fingerprint: Sha256::digest(&text).into(),
        matcher,
        filter: filter(source)?,
        match_bytes_max: source.match_bytes_max,
    })
}

/// The automaton of a pattern, which finds all ends of matches that begin where it is started.
fn automaton(pattern: &str) -> Result<dense::DFA<Vec<u32>>, String> {
    let config = dense::Config::new()
        .start_kind(StartKind::Anchored)
        .match_kind(MatchKind::All)
        .accelerate(false)
        .dfa_size_limit(Some(AUTOMATON_BYTES_MAX))
        .determinize_size_limit(Some(AUTOMATON_BYTES_MAX));
    let nfa = thompson::Config::new()
        .utf8(false)
        .nfa_size_limit(Some(AUTOMATON_BYTES_MAX));
    let dfa = dense::Builder::new()
        .configure(config)
        .thompson(nfa)
        .syntax(syntax::Config::new().unicode(false).utf8(false))
        .build(pattern)
        .map_err(|error| {
            let mut reason = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                reason = format!("{reason}: {error}");
                cause = error.source();
            }
            format!("regex: {reason}")
        })?;
    let empty = regex_automata::Input::new("").anchored(regex_automata::Anchored::Yes);
    match dfa.try_search_fwd(&empty) {
        Ok(None) => Ok(dfa),
        Ok(Some(_)) => Err("regex: it matches the empty text".to_owned()),
        Err(error) => Err(format!("regex: {error}")),
    }
}

fn literal_matcher(literals: &[String], source: &Source) -> Result<Matcher, String> {
    if literals.len() > LITERALS_MAX {
        return Err(format!("there are more than {LITERALS_MAX} literals"));
    }
    let fits = |text: &String| (1..=LITERAL_BYTES_MAX).contains(&text.len());
    if !literals.iter().all(fits) {
        return Err(format!(
            "a literal is not of 1 to {LITERAL_BYTES_MAX} bytes"
        ));
    }
    // Anchored, the automaton is the trie of the literals.
    let noncontiguous = aho_corasick::nfa::noncontiguous::Builder::new()
        .match_kind(LiteralMatchKind::Standard)
        .ascii_case_insensitive(source.ignore_case)
        .build(literals)
        .map_err(|error| format!("literals: {error}"))?;
    let automaton = aho_corasick::nfa::contiguous::Builder::new()
        .ascii_case_insensitive(source.ignore_case)
        .build_from_noncontiguous(&noncontiguous)
        .map_err(|error| format!("literals: {error}"))?;
    Ok(Matcher::Literals {
        automaton: Box::new(automaton),
        whole_words: source.whole_words,
    })
}

fn filter(source: &Source) -> Result<Filter, String> {
    let lower = |words: &[String]| -> Vec<String> {
        let words = words.iter();
        words.map(|word| word.to_ascii_lowercase()).collect()
    };
    let secret = match &source.regex {
        Some(regex) if regex.contains("(?P<secret>") => Some(
            regex::bytes::RegexBuilder::new(regex)
                .unicode(false)
                .size_limit(AUTOMATON_BYTES_MAX)
                .build()
                .map_err(|error| format!("regex: {error}"))?,
        ),
        Some(_) | None => None,
    };
    let allow = regex::bytes::RegexSetBuilder::new(&source.allow.regexes)
        .unicode(false)
        .size_limit(AUTOMATON_BYTES_MAX)
        .build()
        .map_err(|error| format!("allow.regexes: {error}"))?;
    if source.keywords.iter().any(String::is_empty)
        || source.allow.literals.iter().any(String::is_empty)
    {
        return Err("a keyword or an allowed literal is empty".to_owned());
    }
    Ok(Filter {
        keywords: lower(&source.keywords),
        secret,
        entropy_min: source.entropy_min,
        checksum: source.checksum,
        allow: (!allow.is_empty()).then_some(allow),
        allow_literals: lower(&source.allow.literals),
    })
}
