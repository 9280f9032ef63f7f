//! `local`: a model that runs in this process, on the CPU or, where the program was built for one,
//! on an accelerator.
//!
//! It reads a Hugging Face model directory (Llama, Qwen2, Qwen3), or one with a GGUF file in place
//! of its safetensors, and computes in 32-bit floats, with quantised weights where the file has them.
//! One thread runs the model for all samples at once, a token each in one forward pass, and prompts
//! in pieces beside them, so that a long prompt does not stall the others. The keys and values of every
//! conversation stay in memory, in blocks that forks share, so that a prompt costs what is new in it.
//!
//! A seed gives the same tokens again, up to rounding: into which pieces a prompt was cut changes
//! the last bits of its logits, and so, where two tokens are almost equally likely, which is taken.
//!
//! ```text
//!   config, weights ── model ─┐
//!   kv (blocks) ── cache ─────┼── engine (one thread) ── chunks
//!         guide ── sampler ───┘
//! ```

mod cache;
mod config;
mod device;
mod engine;
mod gguf;
mod guide;
mod kv;
mod model;
mod safetensors;
mod sampler;
mod weights;

#[cfg(test)]
mod tests;

use std::{path::PathBuf, sync::Arc};

use futures::{StreamExt as _, future::BoxFuture, stream};

use super::{Backend, BackendError, Capabilities, Chunks, DeviceChoice, Prompt, Ungrammatical};
use crate::{
    files::Files,
    item::Tenant,
    parse::Grammar,
    tokenizer::{TokenId, Tokenizer},
};

use cache::Cache;
use engine::{Engine, Limits, Work};
use guide::Guides;
use kv::Pool;
use model::Model;
use weights::Weights;

/// Tells candle, by the environment, how many threads there are. It asks before every product,
/// and where `RAYON_NUM_THREADS` is not set it reads `/proc/cpuinfo` each time: for a small model
/// that takes several times as long as the product. What is set stays.
///
/// # Safety
///
/// No other thread may use the environment meanwhile: to be called first in `main`.
#[allow(
    unsafe_code,
    reason = "candle can be told in no other way, and main has no threads yet"
)]
pub unsafe fn set_thread_count() {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: the caller sees to it.
        unsafe { std::env::set_var(VARIABLE, threads.to_string()) };
    }
}

/// How a local model is run.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// The model's name, for logs.
    pub name: Arc<str>,
    /// What it computes on.
    pub device: DeviceChoice,
    /// How many bytes of keys and values are kept, those of running samples included. Running
    /// samples are never stopped for it: they alone may take more.
    pub cache_bytes_max: usize,
    /// The most tokens of a prompt and its answer. `None`: what the model was made for, which
    /// is also the most that may be asked for.
    pub context_length: Option<u32>,
    /// How many samples take turns. Those whose reader is behind do not count.
    pub jobs_max: usize,
    /// How many samples are accepted: in turn, waiting for one, or waiting for their reader.
    /// More are refused as unavailable.
    pub accepted_max: usize,
    /// The most tokens of a prompt that are computed before running samples get their next turn.
    /// `None`: 256 on a CPU, 2,048 on an accelerator.
    pub prefill_tokens_max: Option<usize>,
    /// How many tokens a block of the cache holds. Memory is taken in blocks, and what two forks
    /// share ends with one. `None`: 128 on a CPU, 1,024 on an accelerator, which computes many
    /// small products no faster than few large ones.
    pub block_tokens: Option<usize>,
}

impl LocalOptions {
    /// The defaults: an accelerator if there is one, 4 GiB of cache, the model's own context, 8 samples in turn of 64 accepted.
    #[must_use]
    pub fn new(name: Arc<str>) -> Self {
        Self {
            name,
            device: DeviceChoice::default(),
            cache_bytes_max: 4 << 30,
            context_length: None,
            jobs_max: 8,
            accepted_max: 64,
            prefill_tokens_max: None,
            block_tokens: None,
        }
    }

    fn check(&self) -> Result<(), LoadError> {
        let counts = [
            ("jobs_max", Some(self.jobs_max)),
            ("accepted_max", Some(self.accepted_max)),
            ("prefill_tokens_max", self.prefill_tokens_max),
            ("block_tokens", self.block_tokens),
        ];
        match counts.into_iter().find(|(_, count)| *count == Some(0)) {
            Some((option, _)) => Err(LoadError::ZeroOption { option }),
            None => Ok(()),
        }
    }
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// An option that counts something is zero.
    #[error("option {option} must be at least 1")]
    ZeroOption {
        /// The field of [`LocalOptions`].
        option: &'static str,
    },
    /// More context was asked for than the model was made for, or none.
    #[error("a context of {asked} tokens was asked for, the model takes 1 to {max}")]
    ContextLength {
        /// In tokens.
        asked: u32,
        /// In tokens, from the model's configuration.
        max: u32,
    },
    /// The path is not a directory.
    #[error("{} is not a directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{} is not valid", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A key of `config.json` is missing or makes no sense.
    #[error("config.json: {key} {problem}")]
    Config {
        /// The key, dotted where it is nested.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A key of `config.json` asks for something this engine does not do.
    #[error("config.json: {key} {value} is not supported")]
    Unsupported {
        /// The key, dotted where it is nested.
        key: String,
        /// Its value.
        value: String,
    },
    /// The directory has no safetensors.
    #[error("{} holds no safetensors", path.display())]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// The index names a file that is not a plain file name.
    #[error("model.safetensors.index.json: {file:?} is not a file name")]
    ShardName {
        /// What stands there.
        file: String,
    },
    /// A weights file is broken.
    #[error("{} holds no valid safetensors", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The device that was asked for cannot be had.
    #[error("the device {device} cannot be used")]
    Device {
        /// What was asked for.
        device: &'static str,
        /// Why not.
        #[source]
        source: candle_core::Error,
    },
    /// The weights are larger than the memory that is free.
    #[error("the weights take {needed} bytes of memory, {available} are available")]
    Memory {
        /// In bytes, as they are computed with.
        needed: u64,
        /// In bytes, before anything was read.
        available: u64,
    },
    /// A tensor is missing.
    #[error("the weights lack tensor {name} of shape {shape:?}")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape that it should have.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor {name} has shape {found:?}, the configuration says {expected:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// The shape that it should have.
        expected: Vec<usize>,
        /// The shape that it has.
        found: Vec<usize>,
    },
    /// A tensor is of a type that this engine does not compute with.
    #[error("tensor {name} is of type {dtype}, which is not one of f32, f16, bf16")]
    TensorDtype {
        /// Its name.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor could not be made into 32-bit floats.
    #[error("tensor {name} cannot be converted")]
    Convert {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: candle_core::Error,
    },
    /// The directory has no safetensors, and it does not say which GGUF file to take.
    #[error("{} holds more than one GGUF file", path.display())]
    ManyGguf {
        /// The directory.
        path: PathBuf,
    },
    /// A GGUF file is broken, or of a kind that cannot be computed with.
    #[error("{} cannot be used as GGUF", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: candle_core::Error,
    },
    /// The vocabulary cannot be used for constrained sampling.
    #[error("the vocabulary cannot be constrained: {reason}")]
    Vocabulary {
        /// Why.
        reason: String,
    },
    /// The engine's thread could not be started.
    #[error("the engine's thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// A model that runs in this process. Dropping it lets the samples that it accepted end.
#[derive(Debug)]
pub struct Local {
    engine: Engine,
    /// What constrains samples, where the vocabulary is known.
    guides: Option<Guides>,
    vocab_size: u32,
    context_length: u32,
    parameters: u64,
}

impl Local {
    /// Reads the model and starts the engine's thread. Takes as long as reading the weights
    /// does, and about four bytes of memory a parameter; on an accelerator as many as the file has.
    /// Whether there are so many is looked at before.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]: what is missing in the directory or is not supported, by name.
    pub fn load(files: impl Into<Files>, options: LocalOptions) -> Result<Self, LoadError> {
        options.check()?;
        let files = files.into();
        if let Files::Directory(path) = &files
            && !path.is_dir()
        {
            return Err(LoadError::NotADirectory { path: path.clone() });
        }
        let device = options.device.open()?;
        let (config, weights) = Weights::open(&files, &device)?;
        let context_length = options.context_length.unwrap_or(config.context_length);
        if !(1..=config.context_length).contains(&context_length) {
            return Err(LoadError::ContextLength {
                asked: context_length,
                max: config.context_length,
            });
        }
        weights.fit(device::available_bytes(&device))?;
        let parameters = weights.parameters();
        let dtype = weights.dtype();
        let (prefill_tokens_max, block_tokens) = match device.is_cpu() {
            true => (256, 128),
            false => (2048, 1024),
        };
        let block_tokens = options.block_tokens.unwrap_or(block_tokens);
        let pool = Pool::new(config.kv_layout(block_tokens, dtype), &device);
        let model = Model::new(&config, weights, &device)?;
        tracing::info!(
            model = &*options.name,
            device = device::name(&device),
            family = ?config.family,
            layers = config.layers,
            vocab_size = config.vocab_size,
            context_length,
            dtype = dtype.as_str(),
            block_bytes = pool.block_bytes(),
            "model loaded"
        );
        let engine = Engine::start(
            model,
            Cache::new(pool, options.cache_bytes_max),
            Limits {
                context_length: context_length as usize,
                jobs_max: options.jobs_max,
                accepted_max: options.accepted_max,
                prefill_tokens_max: options.prefill_tokens_max.unwrap_or(prefill_tokens_max),
            },
        )
        .map_err(LoadError::Thread)?;
        Ok(Self {
            engine,
            guides: None,
            vocab_size: config.vocab_size,
            context_length,
            parameters,
        })
    }

    /// The same model, whose samples can keep to a grammar: it is told the texts of its tokens,
    /// and which of them end an answer.
    ///
    /// # Errors
    ///
    /// [`LoadError::Vocabulary`].
    pub fn constrained(
        self,
        tokenizer: &Tokenizer,
        end_tokens: &Arc<[TokenId]>,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            guides: Some(Guides::new(tokenizer, end_tokens)?),
            ..self
        })
    }

    /// How many token ids the model knows: every token of a prompt is below.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// How many numbers its weights are.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// The most tokens of a prompt and its answer. A sample that comes to it ends as if
    /// `max_tokens` were reached.
    #[must_use]
    pub fn context_length(&self) -> u32 {
        self.context_length
    }
}

impl Backend for Local {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: "local",
            keeps_cache: true,
            prefill: true,
            constrained_sampling: self.guides.is_some(),
            logprobs: true,
            reads_items: false,
            reads_messages: false,
            sampling: true,
        }
    }

    /// Whether the engine's thread works. Having too much to do is not ill health: a sample is
    /// then refused as unavailable.
    fn healthy(&self) -> bool {
        self.engine.works()
    }

    fn check(&self, tenant: &Tenant, grammar: &Arc<Grammar>) -> Result<(), Ungrammatical> {
        match &self.guides {
            Some(guides) => guides.check(tenant, grammar),
            None => Err(Ungrammatical {
                schema: None,
                reason: "the vocabulary is not known".into(),
            }),
        }
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        let guide = match (&self.guides, &prompt.sampling.grammar) {
            (_, None) => Ok(None),
            (Some(guides), Some(grammar)) => guides.guide(&prompt.tenant, grammar).map(Some),
            (None, Some(grammar)) => self.check(&prompt.tenant, grammar).map(|()| None),
        };
        match guide {
            Ok(guide) => self.engine.submit(prompt, Work::Sample, guide),
            Err(error) => {
                let reason = error.to_string();
                Box::pin(stream::iter([Err(BackendError::Failed { reason })]))
            }
        }
    }

    /// Starts at once, and stops when the future is dropped; what was computed by then is kept.
    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        let mut done = self.engine.submit(prompt, Work::Prefill, None);
        Box::pin(async move {
            while let Some(chunk) = done.next().await {
                chunk?;
            }
            Ok(())
        })
    }
}
