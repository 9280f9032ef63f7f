//! What a model's name stands for: its text side, read from a Hugging Face directory or built in,
//! and the backend that samples from it.

use std::{borrow::Cow, collections::BTreeMap, path::PathBuf, sync::Arc};

use parking_lot::RwLock;
use serde::Deserialize;

use crate::{
    backend::{Backend, router::Router},
    files::Files,
    parse::{Family, Markers, ParserOptions},
    request::Abilities,
    template::{Appends, SpecialTokens, Template, TemplateError},
    tokenizer::{Tokenizer, TokenizerError},
};

/// The text side of a model: what is needed to render for it and to read its output. Shared by
/// all names that are served from the same directory.
pub struct Artifacts {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Items to text.
    pub template: Template,
    /// How it writes calls and reasoning.
    pub family: Family,
    /// What its output is read with, before a response adds its tools.
    pub parsing: ParserOptions,
    /// Tokens that end its answer.
    pub end_tokens: Arc<[u32]>,
    /// The longest prompt and sample together, where its configuration tells.
    pub context_length: Option<u32>,
    /// How it is sampled where a client does not say.
    pub sampling: SamplingDefaults,
    /// Which appends its template keeps the past for, as a probe found out.
    pub appends: Appends,
    /// Names tokenizer, template and family.
    pub fingerprint: [u8; 32],
}

/// How a model is sampled where a client does not say: what its generation_config.json asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// 0 to 2; 0 where `do_sample` is false, 1 where nothing is said.
    pub temperature: f32,
    /// Over 0, at most 1; 1 where nothing is said.
    pub top_p: f32,
    /// 0, all tokens, where nothing is said.
    pub top_k: u32,
}

/// Why a model directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactsError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} cannot be understood: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// There is nothing to turn text into tokens with.
    #[error("{0} has no tokenizer.json")]
    NoTokenizer(Files),
    /// There is no template to render with.
    #[error(
        "{0} has no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json"
    )]
    NoTemplate(Files),
    /// The tokenizer cannot be used.
    #[error("tokenizer.json: {0}")]
    Tokenizer(#[from] TokenizerError),
    /// The template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A default of sampling is out of its range.
    #[error("generation_config.json: {key} is not {range}")]
    Sampling {
        /// The key.
        key: &'static str,
        /// What it may be.
        range: &'static str,
    },
    /// Nothing would ever end an answer.
    #[error(
        "{0} names no end token in generation_config.json, config.json or tokenizer_config.json"
    )]
    NoEndToken(Files),
}

/// One id or several, as `eos_token_id` has it.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// The part of config.json and generation_config.json that the text side reads.
#[derive(Deserialize, Default)]
struct Facts {
    eos_token_id: Option<OneOrMany>,
    max_position_embeddings: Option<u32>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
}

impl Facts {
    fn sampling(&self) -> Result<SamplingDefaults, ArtifactsError> {
        let temperature = match self.do_sample {
            Some(false) => 0.0,
            Some(true) | None => self.temperature.unwrap_or(1.0),
        };
        let top_p = self.top_p.unwrap_or(1.0);
        let refuse = |key, range| Err(ArtifactsError::Sampling { key, range });
        if !(0.0..=2.0).contains(&temperature) {
            return refuse("temperature", "from 0 to 2");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return refuse("top_p", "over 0 and at most 1");
        }
        Ok(SamplingDefaults {
            temperature,
            top_p,
            top_k: self.top_k.unwrap_or(0),
        })
    }
}

impl Artifacts {
    /// Reads tokenizer.json, the chat template and the configuration files.
    ///
    /// # Errors
    ///
    /// What is missing, or cannot be used, and in which file.
    pub fn load(files: &Files, family: Option<Family>) -> Result<Self, ArtifactsError> {
        let tokenizer = read(files, "tokenizer.json")?
            .ok_or_else(|| ArtifactsError::NoTokenizer(files.clone()))?;
        let parts = Parts {
            files,
            tokenizer: &tokenizer,
            template: read(files, "chat_template.jinja")?
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
            tokenizer_config: read(files, "tokenizer_config.json")?,
            facts: [
                json(files, "generation_config.json")?,
                json(files, "config.json")?,
            ],
        };
        Self::assemble(parts, family)
    }

    fn assemble(parts: Parts<'_>, family: Option<Family>) -> Result<Self, ArtifactsError> {
        let tokenizer = Tokenizer::from_json(parts.tokenizer)?;
        let config: serde_json::Value = match &parts.tokenizer_config {
            Some(bytes) => {
                serde_json::from_slice(bytes).map_err(|source| ArtifactsError::Parse {
                    path: parts.files.path("tokenizer_config.json"),
                    source,
                })?
            }
            None => serde_json::Value::Null,
        };
        let specials = SpecialTokens::from_config(&config);
        let source = parts
            .template
            .or_else(|| crate::template::source_in_config(&config).map(str::to_owned))
            .ok_or_else(|| ArtifactsError::NoTemplate(parts.files.clone()))?;
        let template = Template::new(&source, specials)?;
        let is_added = |content: &str| tokenizer.token_id(content).is_some();
        let family = family.unwrap_or_else(|| Family::detect(&source, &is_added));
        let end_tokens = end_tokens(&tokenizer, &config, &parts.facts);
        if end_tokens.is_empty() {
            return Err(ArtifactsError::NoEndToken(parts.files.clone()));
        }
        let context_length = parts
            .facts
            .iter()
            .find_map(|facts| facts.max_position_embeddings);
        let [generation, _] = &parts.facts;
        let sampling = generation.sampling()?;
        let appends = template.probe();
        let reasoning = ["reasoning_content", "<think>", "[THINK]"]
            .iter()
            .any(|sign| source.contains(sign));
        let end_contents = end_tokens
            .iter()
            .filter_map(|id| tokenizer.added(*id))
            .map(str::to_owned)
            .collect();
        let parsing = ParserOptions {
            reasoning,
            in_reasoning: false,
            tools: Arc::default(),
            markers_added: Markers::added(&is_added),
            end_tokens: Arc::new(end_contents),
        };
        let fingerprint = {
            use sha2::Digest as _;
            let mut hash = sha2::Sha256::new();
            hash.update(tokenizer.fingerprint());
            hash.update(template.fingerprint());
            hash.update(family.as_str());
            hash.finalize().into()
        };
        Ok(Self {
            tokenizer,
            template,
            family,
            parsing,
            end_tokens: end_tokens.into(),
            context_length,
            sampling,
            appends,
            fingerprint,
        })
    }

    /// What it takes in memory, about, for a weighed cache.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.tokenizer.size_bytes() + self.template.size_bytes()
    }
}

/// What a model is assembled from.
struct Parts<'a> {
    files: &'a Files,
    tokenizer: &'a [u8],
    template: Option<String>,
    tokenizer_config: Option<Cow<'static, [u8]>>,
    /// Of generation_config.json and of config.json.
    facts: [Facts; 2],
}

fn read(files: &Files, name: &str) -> Result<Option<Cow<'static, [u8]>>, ArtifactsError> {
    files.read(name).map_err(|source| ArtifactsError::Read {
        path: files.path(name),
        source,
    })
}

fn json(files: &Files, name: &str) -> Result<Facts, ArtifactsError> {
    match read(files, name)? {
        None => Ok(Facts::default()),
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|source| ArtifactsError::Parse {
            path: files.path(name),
            source,
        }),
    }
}

/// Every token that some file names as an end, and those that end an answer in the families.
fn end_tokens(tokenizer: &Tokenizer, config: &serde_json::Value, facts: &[Facts]) -> Vec<u32> {
    const ENDS: [&str; 5] = [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|return|>",
        "<|call|>",
    ];
    let eos = &config["eos_token"];
    let named = eos.as_str().or_else(|| eos["content"].as_str());
    let mut ids: Vec<u32> = facts
        .iter()
        .filter_map(|facts| facts.eos_token_id.as_ref())
        .flat_map(|ids| match ids {
            OneOrMany::One(id) => std::slice::from_ref(id),
            OneOrMany::Many(ids) => ids,
        })
        .copied()
        .collect();
    ids.extend(
        named
            .into_iter()
            .chain(ENDS)
            .filter_map(|content| tokenizer.token_id(content)),
    );
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Text sides that were read before: names that share a directory share one. Bounded by bytes.
pub struct ArtifactsCache {
    cache: moka::sync::Cache<(Files, Option<Family>), Arc<Artifacts>>,
}

impl ArtifactsCache {
    /// An empty cache that holds at most this many bytes.
    #[must_use]
    pub fn new(bytes_max: u64) -> Self {
        Self {
            cache: moka::sync::Cache::builder()
                // In units of a KiB, since a weight is a u32.
                .max_capacity(bytes_max / 1024)
                .weigher(|_, artifacts: &Arc<Artifacts>| {
                    u32::try_from(artifacts.size_bytes() / 1024 + 1).unwrap_or(u32::MAX)
                })
                .build(),
        }
    }

    /// The text side of these files, read as this family or as what it seems to be.
    ///
    /// # Errors
    ///
    /// As [`Artifacts::load`].
    pub fn get(
        &self,
        files: &Files,
        family: Option<Family>,
    ) -> Result<Arc<Artifacts>, Arc<ArtifactsError>> {
        let key = (files.clone(), family);
        self.cache
            .try_get_with(key, || Artifacts::load(files, family).map(Arc::new))
    }
}

/// A model as it is served: a name, a text side, and a backend.
pub struct Model {
    /// The name by which a create asks for it.
    pub name: Arc<str>,
    /// Its text side.
    pub artifacts: Arc<Artifacts>,
    /// What samples.
    pub backend: Arc<dyn Backend>,
    /// The same, where it routes between several.
    pub replicas: Option<Arc<Router>>,
    /// The longest prompt and sample together, in tokens.
    pub context_length: u32,
    /// How many parameters it has; 0 where that is not known, or it has none.
    pub parameters: u64,
    /// The most tokens that one response samples.
    pub output_tokens_max: u32,
    /// The name of the model that takes over where nothing samples from this one.
    pub fallback: Option<Arc<str>>,
    /// Its text side is that of another model, whose tokens stand for its own: the backend renders by
    /// itself, and no directory was given.
    pub stand_in: bool,
}

/// How many times its context a conversation may seem to have where tokens are counted by those of
/// another model, whose vocabulary may be much smaller. What is too long the backend says itself.
const STAND_IN_SLACK: u32 = 2;

impl Model {
    /// The most tokens of a prompt and its sample, as they are counted here.
    #[must_use]
    pub fn tokens_max(&self) -> u32 {
        match self.stand_in {
            true => self.context_length.saturating_mul(STAND_IN_SLACK),
            false => self.context_length,
        }
    }

    /// What can be asked of it.
    #[must_use]
    pub fn abilities(&self) -> Abilities {
        let template = &self.artifacts.template;
        let backend = self.backend.capabilities();
        Abilities {
            // What renders by itself knows both, or refuses.
            tools: backend.reads_messages || template.mentions("tools"),
            reasoning_effort: backend.reads_messages
                || template.mentions("enable_thinking")
                || template.mentions("reasoning_effort"),
            backend,
            vocab_size: u32::try_from(self.artifacts.tokenizer.vocab_size()).unwrap_or(u32::MAX),
            output_tokens_max: self.output_tokens_max,
        }
    }
}

/// All models, by name, and the other names for them. They change only as a whole.
pub struct Models {
    current: RwLock<Arc<Catalog>>,
}

/// The models at one time.
pub struct Catalog {
    by_name: BTreeMap<Arc<str>, Arc<Model>>,
    aliases: BTreeMap<Arc<str>, Split>,
    default: Arc<Model>,
}

/// The models that a name stands for, each with its share of the conversations.
pub type Split = Vec<(Arc<str>, u32)>;

impl Catalog {
    /// These models; the default is the one that a create without a model gets.
    #[must_use]
    pub fn new(
        default: Arc<Model>,
        others: Vec<Arc<Model>>,
        aliases: BTreeMap<Arc<str>, Split>,
    ) -> Self {
        let by_name = others
            .into_iter()
            .chain([default.clone()])
            .map(|model| (model.name.clone(), model))
            .collect();
        Self {
            by_name,
            aliases,
            default,
        }
    }

    /// The model of this name, or the default where none is asked for. Where the name stands for
    /// several, it is the one that served the conversation before, and for a new one what `key` draws.
    fn get(&self, name: Option<&str>, before: Option<&str>, key: &str) -> Option<&Arc<Model>> {
        let Some(name) = name else {
            return Some(&self.default);
        };
        let Some(split) = self.aliases.get(name) else {
            return self.by_name.get(name);
        };
        let same = split.iter().find(|(model, _)| Some(&**model) == before);
        let (model, _) = same.or_else(|| draw(split, key))?;
        self.by_name.get(model)
    }
}

/// One of them, by its share: the same for the same key.
fn draw<'a>(split: &'a Split, key: &str) -> Option<&'a (Arc<str>, u32)> {
    use sha2::Digest as _;
    let hash: [u8; 32] = sha2::Sha256::digest(key).into();
    let all: u64 = split.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash[..8]);
    let mut at = u64::from_le_bytes(bytes).checked_rem(all)?;
    split.iter().find(|(_, weight)| {
        let here = at < u64::from(*weight);
        at = at.saturating_sub(u64::from(*weight));
        here
    })
}

impl Models {
    /// These models; the default is the one that a create without a model gets.
    #[must_use]
    pub fn new(default: Arc<Model>, others: Vec<Arc<Model>>) -> Self {
        Catalog::new(default, others, BTreeMap::new()).into()
    }

    /// From now on these. What was begun with another goes on with it until its response ends.
    pub fn replace(&self, catalog: Catalog) {
        *self.current.write() = Arc::new(catalog);
    }

    /// The model that a create gets which asks for this name, or for none, in a conversation that
    /// `before` served last. What a new conversation gets of several is drawn by `key`.
    #[must_use]
    pub fn get(&self, name: Option<&str>, before: Option<&str>, key: &str) -> Option<Arc<Model>> {
        self.current.read().get(name, before, key).cloned()
    }

    /// The model of exactly this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Arc<Model>> {
        self.current.read().by_name.get(name).cloned()
    }

    /// All of them, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Model>> {
        self.current.read().by_name.values().cloned().collect()
    }

    /// The other names that may stand for this model.
    #[must_use]
    pub fn aliases_of(&self, name: &str) -> Vec<String> {
        let current = self.current.read();
        let named = |split: &Split| split.iter().any(|(model, _)| &**model == name);
        let aliases = current.aliases.iter().filter(|(_, split)| named(split));
        aliases.map(|(alias, _)| alias.to_string()).collect()
    }

    /// Whether a create without a model gets this one.
    #[must_use]
    pub fn is_default(&self, model: &Model) -> bool {
        self.current.read().default.name == model.name
    }
}

impl From<Catalog> for Models {
    fn from(catalog: Catalog) -> Self {
        Self {
            current: RwLock::new(Arc::new(catalog)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_gives_each_its_share_and_the_same_key_the_same() {
        let split: Split = vec![("a".into(), 9), ("b".into(), 1)];
        let drawn = |key: &str| &*draw(&split, key).unwrap().0;
        let keys = (0..10_000).map(|n| format!("resp_{n}"));
        let b = keys.filter(|key| drawn(key) == "b").count();
        assert!((900..1100).contains(&b), "{b} of 10000");
        assert_eq!(drawn("resp_1"), drawn("resp_1"));
        assert_eq!(draw(&Vec::new(), "x"), None);
    }
}
