//! From a configuration to models: the one place that names backends.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use super::ServeError;
use crate::{
    backend::{
        Backend,
        cerebras::{ApiKey, Cerebras, CerebrasOptions},
        gpu::{Gpu, GpuError, GpuOptions},
        router::{Replica, Router, RoutingOptions},
        sim::{Pace, Sim},
    },
    config::{self, Config},
    files::{BuiltIn, Files},
    model::{Artifacts, ArtifactsCache, Catalog, Model, Split},
    parse::Family,
};

/// The context of a simulated model that is not told another.
const SIM_CONTEXT_LENGTH: u32 = 1 << 20;

/// The context of a model that is rendered elsewhere and is not told another.
const CHAT_CONTEXT_LENGTH: u32 = 131_072;

/// Loads models, and keeps what it has loaded for as long as its settings stay the same.
pub(super) struct Loader {
    artifacts: ArtifactsCache,
    loaded: Vec<Loaded>,
}

struct Loaded {
    settings: config::Model,
    cache_bytes: u64,
    output_tokens_max: u32,
    routing: RoutingOptions,
    model: Arc<Model>,
}

impl Loader {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            artifacts: ArtifactsCache::new(config.cache.artifacts_bytes_max),
            loaded: Vec::new(),
        }
    }

    /// The models that the configuration names. Those whose settings are the same as when this was
    /// last asked are the very same; nothing changes where one cannot be loaded.
    pub(super) async fn load(&mut self, config: &Config) -> Result<Catalog, ServeError> {
        let mut loaded = Vec::new();
        for settings in &config.models {
            let cache_bytes = config.unclaimed_cache_bytes();
            let output_tokens_max = config.request.output_tokens_max;
            let kept = self.loaded.iter().find(|it| {
                it.settings == *settings
                    && (it.cache_bytes == cache_bytes || settings.local.is_none())
                    && it.output_tokens_max == output_tokens_max
                    && it.routing == config.routing
            });
            let model = match kept {
                Some(kept) => kept.model.clone(),
                None => {
                    let model = load(config, settings, &self.artifacts).await;
                    Arc::new(model.map_err(|reason| ServeError::Model {
                        name: settings.name.clone(),
                        reason,
                    })?)
                }
            };
            loaded.push(Loaded {
                settings: settings.clone(),
                cache_bytes,
                output_tokens_max,
                routing: config.routing.clone(),
                model,
            });
        }
        let (default, others): (Vec<_>, Vec<_>) = loaded.iter().partition(|it| it.settings.default);
        let default = default.first().ok_or_else(|| ServeError::Model {
            name: String::new(),
            reason: "none is the default".to_owned(),
        })?;
        let split = |alias: &config::Alias| -> Split {
            let targets = alias.to.iter();
            targets
                .map(|target| (target.model.as_str().into(), target.weight))
                .collect()
        };
        let aliases: BTreeMap<Arc<str>, Split> = config
            .aliases
            .iter()
            .map(|alias| (alias.name.as_str().into(), split(alias)))
            .collect();
        let others = others.iter().map(|it| it.model.clone()).collect();
        let catalog = Catalog::new(default.model.clone(), others, aliases);
        self.loaded = loaded;
        Ok(catalog)
    }
}

async fn load(
    config: &Config,
    model: &config::Model,
    cache: &ArtifactsCache,
) -> Result<Model, String> {
    let family: Option<Family> = model
        .family
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(|error: crate::parse::UnknownFamily| error.to_string())?;
    let files = files(model)?;
    let artifacts = cache
        .get(&files, family)
        .map_err(|error| error.to_string())?;
    let samplers = samplers(config, model, &files, &artifacts).await?;
    let own = samplers.iter().map(|it| it.context_length).min();
    let own = own.ok_or("nothing samples from it")?;
    let context_length = match model.context_length {
        Some(asked) if asked > own => {
            return Err(format!(
                "context_length {asked} is over the model's own {own}"
            ));
        }
        asked => asked.unwrap_or(own),
    };
    for engine in samplers.iter().filter_map(|it| it.engine.as_ref()) {
        engine.watch(context_length);
    }
    let appends = artifacts.appends;
    if !appends.tool_outputs {
        tracing::warn!(
            model = model.name,
            "the template renders the past anew when outputs of calls are added: every step prefills its last answer again"
        );
    }
    let parameters = samplers.iter().map(|it| it.parameters).max().unwrap_or(0);
    let mut replicas = samplers.into_iter().map(|it| Replica {
        name: it.name.into(),
        backend: it.backend,
        weight: it.weight,
    });
    let first = replicas.next().ok_or("nothing samples from it")?;
    let others = replicas.collect();
    let router = Arc::new(Router::new(first, others, config.routing.clone()));
    Ok(Model {
        name: model.name.as_str().into(),
        replicas: Some(router.clone()),
        backend: router,
        context_length,
        parameters,
        output_tokens_max: config.request.output_tokens_max,
        fallback: model.fallback.as_deref().map(Into::into),
        stand_in: model.path.is_none() && !model.cerebras.is_empty() && !model.takes_tokens(),
        artifacts,
    })
}

/// Where the model's files are.
fn files(model: &config::Model) -> Result<Files, String> {
    match &model.path {
        Some(path) => Ok(Files::from(path.as_path())),
        None if model.local.is_none() => Ok(Files::BuiltIn(BuiltIn::SimAgent)),
        #[cfg(feature = "local")]
        None => Ok(Files::BuiltIn(BuiltIn::TinyAgent)),
        #[cfg(not(feature = "local"))]
        None => Err(WITHOUT_LOCAL.to_owned()),
    }
}

/// Something that samples from a model.
struct Sampler {
    /// Tells it from the others.
    name: String,
    /// Its share of the conversations, beside those of the others.
    weight: u32,
    backend: Arc<dyn Backend>,
    /// Where it is an engine that has to be asked how it is.
    engine: Option<Arc<Gpu>>,
    /// The longest prompt and sample that it takes together, in tokens.
    context_length: u32,
    /// 0 where that is not known, or it has none.
    parameters: u64,
}

/// All that the settings name.
async fn samplers(
    config: &Config,
    model: &config::Model,
    files: &Files,
    artifacts: &Arc<Artifacts>,
) -> Result<Vec<Sampler>, String> {
    let mut all = Vec::new();
    for options in &model.gpu {
        all.push(gpu(config, model, options, artifacts).await?);
    }
    for options in &model.cerebras {
        all.push(cerebras(config, model, options, artifacts)?);
    }
    if let Some(settings) = &model.local {
        let bytes = settings.cache_bytes_max;
        let bytes = bytes.unwrap_or_else(|| config.unclaimed_cache_bytes());
        all.push(local(model, settings, files, bytes, artifacts).await?);
    }
    if let Some(settings) = &model.sim {
        all.push(sim(settings, artifacts)?);
    }
    Ok(all)
}

/// A service. What it counts is its own affair where it renders by itself: then the context that it is
/// said to have is held against an estimate.
fn cerebras(
    config: &Config,
    model: &config::Model,
    options: &CerebrasOptions,
    artifacts: &Artifacts,
) -> Result<Sampler, String> {
    let key = config.secrets.get(&options.key_variable).map(ApiKey::new);
    let key = key.transpose().map_err(|error| error.to_string())?;
    let service = Cerebras::new(options.clone(), key).map_err(|error| error.to_string())?;
    let own = artifacts.context_length.filter(|_| model.path.is_some());
    let context_length = own.or(model.context_length).unwrap_or(CHAT_CONTEXT_LENGTH);
    Ok(Sampler {
        name: format!("{} {}", options.url, options.model),
        weight: options.weight,
        backend: Arc::new(service),
        engine: None,
        context_length,
        parameters: 0,
    })
}

fn sim(settings: &config::Sim, artifacts: &Arc<Artifacts>) -> Result<Sampler, String> {
    let pace = Pace {
        tokens_per_second: settings.tokens_per_second,
        first_token: Duration::from_millis(settings.first_token_ms),
    };
    let rules = settings.rules.as_deref();
    let sim = match rules {
        Some(path) => Sim::from_file(path, artifacts.clone(), pace),
        None => Sim::new(Sim::demo_rules(), artifacts.clone(), pace),
    };
    Ok(Sampler {
        name: "sim".to_owned(),
        weight: 1,
        backend: Arc::new(sim.map_err(|error| match rules.map(Path::display) {
            Some(path) => format!("{path}: {error}"),
            None => error.to_string(),
        })?),
        engine: None,
        context_length: artifacts.context_length.unwrap_or(SIM_CONTEXT_LENGTH),
        parameters: 0,
    })
}

/// An engine. One that cannot be reached yet is no reason not to start: others may be there.
async fn gpu(
    config: &Config,
    model: &config::Model,
    options: &GpuOptions,
    artifacts: &Arc<Artifacts>,
) -> Result<Sampler, String> {
    let key = config.secrets.get(&options.key_variable);
    let gpu = Gpu::new(options.clone(), key, artifacts.clone());
    let gpu = Arc::new(gpu.map_err(|error| error.to_string())?);
    let told = match gpu.connect().await {
        Ok(told) => told,
        Err(error @ GpuError::Unreachable { .. }) => {
            tracing::warn!("{error}; it is asked again until it can be");
            None
        }
        Err(error) => return Err(error.to_string()),
    };
    let own = told.into_iter().chain(artifacts.context_length).min();
    let context_length = own.or(model.context_length);
    Ok(Sampler {
        name: options.url.clone(),
        weight: options.weight,
        backend: gpu.clone(),
        engine: Some(gpu),
        context_length: context_length
            .ok_or("neither its files nor the engine tell its context_length")?,
        parameters: 0,
    })
}

#[cfg(feature = "local")]
async fn local(
    model: &config::Model,
    settings: &config::Local,
    files: &Files,
    cache_bytes_max: u64,
    artifacts: &Arc<Artifacts>,
) -> Result<Sampler, String> {
    use crate::backend::local::{Local, LocalOptions};

    let name: Arc<str> = model.name.as_str().into();
    let options = LocalOptions {
        device: settings.device,
        cache_bytes_max: usize::try_from(cache_bytes_max).unwrap_or(usize::MAX),
        context_length: model.context_length,
        ..LocalOptions::new(name)
    };
    let (files, text) = (files.clone(), artifacts.clone());
    // Seconds of work for a large one.
    let loading = tokio::task::spawn_blocking(move || {
        Local::load(files, options)
            .and_then(|local| local.constrained(&text.tokenizer, &text.end_tokens))
            .map_err(|error| with_causes(&error))
    });
    let local = loading.await.map_err(|error| error.to_string())??;
    let tokens = artifacts.tokenizer.vocab_size();
    if tokens > local.vocab_size() as usize {
        return Err(format!(
            "the tokenizer has {tokens} tokens, more than the model's {}",
            local.vocab_size()
        ));
    }
    Ok(Sampler {
        name: "local".to_owned(),
        weight: 1,
        context_length: local.context_length(),
        parameters: local.parameters(),
        engine: None,
        backend: Arc::new(local),
    })
}

/// An error with everything that lies behind it.
#[cfg(feature = "local")]
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(not(feature = "local"))]
async fn local(
    _: &config::Model,
    _: &config::Local,
    _: &Files,
    _: u64,
    _: &Arc<Artifacts>,
) -> Result<Sampler, String> {
    Err(WITHOUT_LOCAL.to_owned())
}

#[cfg(not(feature = "local"))]
const WITHOUT_LOCAL: &str = "this program was built without the feature `local`";
