//! Model directories as they are published, one for each test template, loaded once a process.

use std::{collections::HashMap, fs, path::Path, sync::Arc, sync::OnceLock};

use aho_corasick::{AhoCorasick, MatchKind};
use hotloop::model::{Artifacts, Model};
use serde_json::json;

use super::{scripted::Scripted, vocab};

/// A model's text side with what a test has to know about its template.
pub struct Family {
    /// The template's name.
    pub name: &'static str,
    /// What was loaded from the directory.
    pub artifacts: Arc<Artifacts>,
    /// The same vocabulary as the crate serves it.
    pub theirs: tokenizers::Tokenizer,
    /// Its added tokens.
    pub added: HashMap<u32, tokenizers::AddedToken>,
    /// Finds their literals.
    pub literals: AhoCorasick,
    /// The source of the template.
    pub template: &'static str,
    /// What can be said in it.
    pub can: Can,
}

/// What a family's template takes.
#[derive(Debug, Clone, Copy)]
pub struct Can {
    /// System or developer messages behind the first message.
    pub late_system: bool,
    /// Several messages of users in a row, and steering.
    pub rows_of_users: bool,
    /// Calls in one answer at most.
    pub calls_max: usize,
    /// Text beside calls.
    pub text_with_calls: bool,
    /// Reasoning.
    pub reasoning: bool,
    /// A setting of the reasoning.
    pub effort: bool,
    /// Everything before an append stays, whatever is appended.
    pub stable: bool,
    /// The token that ends an answer without and with calls.
    pub ends: [&'static str; 2],
}

/// A name, a template, a vocabulary, and what can be said in it.
type Files = (&'static str, &'static str, fn() -> &'static [u8], Can);

const CHATML: Can = Can {
    late_system: false,
    rows_of_users: true,
    calls_max: 3,
    text_with_calls: true,
    reasoning: true,
    effort: false,
    stable: true,
    ends: ["<|im_end|>"; 2],
};

static FAMILIES: [Files; 6] = [
    (
        "chatml_tools",
        include_str!("../templates/chatml_tools.jinja"),
        vocab::qwen,
        CHATML,
    ),
    (
        "chatml_strip_reasoning",
        include_str!("../templates/chatml_strip_reasoning.jinja"),
        vocab::qwen,
        Can {
            late_system: true,
            effort: true,
            stable: false,
            ..CHATML
        },
    ),
    (
        "llama3",
        include_str!("../templates/llama3.jinja"),
        vocab::llama3,
        Can {
            late_system: true,
            calls_max: 1,
            text_with_calls: false,
            reasoning: false,
            stable: false,
            ends: ["<|eot_id|>"; 2],
            ..CHATML
        },
    ),
    (
        "mistral",
        include_str!("../templates/mistral.jinja"),
        vocab::mistral,
        Can {
            rows_of_users: false,
            text_with_calls: false,
            reasoning: false,
            stable: false,
            ends: ["</s>"; 2],
            ..CHATML
        },
    ),
    (
        "harmony",
        include_str!("../templates/harmony.jinja"),
        vocab::harmony,
        Can {
            late_system: true,
            calls_max: 1,
            effort: true,
            stable: false,
            ends: ["<|return|>", "<|call|>"],
            ..CHATML
        },
    ),
    (
        "phi_like",
        include_str!("../templates/phi_like.jinja"),
        vocab::phi3,
        Can {
            late_system: true,
            calls_max: 0,
            reasoning: false,
            stable: false,
            ends: ["<|end|>"; 2],
            ..CHATML
        },
    ),
];

/// The family of this name.
pub fn family(name: &str) -> &'static Family {
    static LOADED: [OnceLock<Family>; FAMILIES.len()] = [const { OnceLock::new() }; FAMILIES.len()];
    let at = position(name);
    LOADED[at].get_or_init(|| Family::load(at))
}

/// The family of this name, loaded for the caller alone: nobody else moves its counters.
pub fn fresh(name: &str) -> Family {
    Family::load(position(name))
}

fn position(name: &str) -> usize {
    let found = FAMILIES.iter().position(|family| family.0 == name);
    found.unwrap_or_else(|| panic!("no family is called {name}"))
}

/// Writes a model directory.
pub fn write(directory: &Path, template: &str, tokenizer: &[u8], can: &Can) {
    let theirs = tokenizers::Tokenizer::from_bytes(tokenizer).expect("a tokenizer");
    let ends: Vec<u32> = can
        .ends
        .iter()
        .filter_map(|end| theirs.token_to_id(end))
        .collect();
    let named = |names: [&'static str; 3]| {
        let found = names
            .into_iter()
            .find(|it| theirs.token_to_id(it).is_some());
        found.map(|content| json!({"content": content}))
    };
    let config = json!({
        "bos_token": named(["<s>", "<|begin_of_text|>", "<|startoftext|>"]),
        "eos_token": named(["</s>", "<|end_of_text|>", "<|endoftext|>"]),
    });
    let put = |name: &str, bytes: &[u8]| fs::write(directory.join(name), bytes).expect(name);
    put("tokenizer.json", tokenizer);
    put("chat_template.jinja", template.as_bytes());
    put("tokenizer_config.json", config.to_string().as_bytes());
    let generation = json!({"eos_token_id": ends}).to_string();
    put("generation_config.json", generation.as_bytes());
}

impl Family {
    fn load(at: usize) -> Self {
        let (name, template, vocabulary, can) = FAMILIES[at];
        let directory = tempfile::tempdir().expect("a directory for the model");
        write(directory.path(), template, vocabulary(), &can);
        let theirs = tokenizers::Tokenizer::from_bytes(vocabulary()).expect(name);
        let added = theirs.get_added_tokens_decoder();
        let literals = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(added.values().map(|token| token.content.as_str()));
        Self {
            name,
            artifacts: Arc::new(Artifacts::load(&directory.path().into(), None).expect(name)),
            added: added.into_iter().collect(),
            literals: literals.expect(name),
            theirs,
            template,
            can,
        }
    }

    /// A model of this family with a backend of its own.
    pub fn model(&self, context_length: u32) -> (Arc<Model>, Arc<Scripted>) {
        let backend = Arc::new(Scripted::default());
        let model = Model {
            name: self.name.into(),
            artifacts: self.artifacts.clone(),
            backend: backend.clone(),
            context_length,
            parameters: 0,
            output_tokens_max: 100_000,
            fallback: None,
            replicas: None,
            stand_in: false,
        };
        (Arc::new(model), backend)
    }

    /// Tokens of text without any added token among them, as a model would spell it out.
    pub fn spell(&self, text: &str) -> Vec<u32> {
        let mut encoded = hotloop::tokenizer::Encoded::default();
        let everywhere: Vec<usize> = (0..text.len()).collect();
        let tokenizer = &self.artifacts.tokenizer;
        tokenizer.encode(text, false, &everywhere, &mut encoded);
        encoded.ids
    }

    /// The token that ends an answer.
    pub fn end(&self, with_calls: bool) -> u32 {
        let content = self.can.ends[usize::from(with_calls)];
        self.artifacts.tokenizer.token_id(content).expect(content)
    }
}
