//! From a configuration to models and services: the one place that names backends and stores.

use std::{
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use tonic::service::Routes;

use super::{Drain, ServeError};
use crate::{
    archive::Archive,
    backend::{
        Backend, DeviceChoice,
        router::{Replica, Router, RoutingOptions},
        sim::{Pace, Sim},
    },
    config::{self, Config, Engine},
    files::{BuiltIn, Files},
    model::{Artifacts, ArtifactsCache, Model, Models},
    parse::Family,
    proto::{
        models_service_server::ModelsServiceServer,
        responses_service_server::ResponsesServiceServer,
    },
    render::Heads,
    service::{Parts, Services},
    session::{ParkedLimits, Sessions},
    store::{self, Embedded, Queue},
    wire::RequestLimits,
};

/// The context of a simulated model that is not told another.
const SIM_CONTEXT_LENGTH: u32 = 1 << 20;

/// Makes models, caches and services.
pub(super) fn services(config: &Config, drain: &Drain) -> Result<Services, ServeError> {
    let stream = &config.stream;
    let cache = &config.cache;
    let parked = ParkedLimits {
        bytes_max: cache.parked_bytes_max,
        tenant_bytes_max: cache.parked_bytes_max / 100
            * u64::from(cache.parked_share_per_tenant_percent),
        time_max: Duration::from_secs(cache.parked_secs_max),
    };
    let models = Arc::new(models(config)?);
    let heads = Arc::new(Heads::new(cache.heads_bytes_max));
    let sessions = Sessions::new(parked);
    tokio::spawn(expire(Arc::downgrade(&sessions)));
    let archive = match &config.store.path {
        None => Archive::new(sessions),
        Some(path) => {
            let queue = store(path, &config.store).map_err(|reason| ServeError::Store {
                path: path.clone(),
                reason,
            })?;
            Archive::with_store(sessions, queue, models.clone(), heads.clone())
        }
    };
    Ok(Services::new(Parts {
        models,
        heads,
        archive,
        limits: stream.limits(),
        request_limits: RequestLimits {
            items_max: config.request.items_max,
            tools_max: config.request.tools_max,
            item_bytes_max: config.request.item_bytes_max,
        },
        responses_held_max: stream.responses_held_max,
        streams_max: config.server.streams_max,
        drain: drain.clone(),
    }))
}

/// Opens the store in this file, with its queue before it.
fn store(path: &Path, options: &config::Store) -> Result<Queue, String> {
    let limits = store::Limits {
        responses_max: options.responses_max,
        bytes_max: options.bytes_max,
        age_max: Duration::from_secs(options.age_secs_max),
    };
    let store = Embedded::open(path, limits).map_err(|error| error.to_string())?;
    Queue::new(Arc::new(store), options.write_queue_bytes_max).map_err(|error| error.to_string())
}

/// How often what is parked for too long is looked for.
const PARKED_MAINTENANCE: Duration = Duration::from_secs(5);

/// Lets go of what has been parked for too long, for as long as somebody holds the sessions.
async fn expire(sessions: Weak<Sessions>) {
    let mut ticks = tokio::time::interval(PARKED_MAINTENANCE);
    loop {
        ticks.tick().await;
        let Some(sessions) = sessions.upgrade() else {
            return;
        };
        sessions.expire();
    }
}

/// Adds the services to those of every gRPC server.
pub(super) fn mount(routes: Routes, services: Services, message_bytes_max: usize) -> Routes {
    let responses =
        ResponsesServiceServer::new(services.clone()).max_decoding_message_size(message_bytes_max);
    routes
        .add_service(responses)
        .add_service(ModelsServiceServer::new(services))
}

/// Loads every model that the configuration names.
fn models(config: &Config) -> Result<Models, ServeError> {
    let artifacts = ArtifactsCache::new(config.cache.artifacts_bytes_max);
    let default = config.default_model().ok_or_else(|| ServeError::Model {
        name: String::new(),
        reason: "none is the default".to_owned(),
    })?;
    let load = |model: &config::Model| {
        let loaded = load(config, model, &artifacts);
        loaded.map(Arc::new).map_err(|reason| ServeError::Model {
            name: model.name.clone(),
            reason,
        })
    };
    let others = config
        .models
        .iter()
        .filter(|model| model.name != default.name)
        .map(load)
        .collect::<Result<_, _>>()?;
    Ok(Models::new(load(default)?, others))
}

fn load(config: &Config, model: &config::Model, cache: &ArtifactsCache) -> Result<Model, String> {
    let family: Option<Family> = model
        .family
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(|error: crate::parse::UnknownFamily| error.to_string())?;
    let files = files(&model.engine)?;
    let artifacts = cache
        .get(&files, family)
        .map_err(|error| error.to_string())?;
    let Sampler {
        backend,
        context_length,
        parameters,
    } = sampler(config, model, &files, &artifacts)?;
    let appends = artifacts.appends;
    if !appends.tool_outputs {
        tracing::warn!(
            model = model.name,
            "the template renders the past anew when outputs of calls are added: every step prefills its last answer again"
        );
    }
    let only = Replica {
        name: model.name.as_str().into(),
        backend,
        weight: 1,
    };
    Ok(Model {
        name: model.name.as_str().into(),
        backend: Arc::new(Router::new(only, Vec::new(), RoutingOptions::default())),
        context_length,
        parameters,
        output_tokens_max: config.request.output_tokens_max,
        artifacts,
    })
}

/// Where the model's files are.
fn files(engine: &Engine) -> Result<Files, String> {
    match engine {
        Engine::Sim {
            path: Some(path), ..
        }
        | Engine::Local {
            path: Some(path), ..
        } => Ok(Files::from(path.as_path())),
        Engine::Sim { path: None, .. } => Ok(Files::BuiltIn(BuiltIn::SimAgent)),
        #[cfg(feature = "local")]
        Engine::Local { path: None, .. } => Ok(Files::BuiltIn(BuiltIn::TinyAgent)),
        #[cfg(not(feature = "local"))]
        Engine::Local { path: None, .. } => Err(WITHOUT_LOCAL.to_owned()),
    }
}

/// What samples from a model.
struct Sampler {
    backend: Arc<dyn Backend>,
    /// The longest prompt and sample that it takes together, in tokens.
    context_length: u32,
    /// 0 where it has none.
    parameters: u64,
}

fn sampler(
    config: &Config,
    model: &config::Model,
    files: &Files,
    artifacts: &Arc<Artifacts>,
) -> Result<Sampler, String> {
    match &model.engine {
        Engine::Sim {
            rules,
            tokens_per_second,
            first_token_ms,
            ..
        } => {
            let pace = Pace {
                tokens_per_second: *tokens_per_second,
                first_token: Duration::from_millis(*first_token_ms),
            };
            let sim = match rules {
                Some(path) => Sim::from_file(path, artifacts.clone(), pace),
                None => Sim::new(Sim::demo_rules(), artifacts.clone(), pace),
            };
            let own = artifacts.context_length.unwrap_or(SIM_CONTEXT_LENGTH);
            let context_length = within(model.context_length, own)?;
            Ok(Sampler {
                backend: Arc::new(sim.map_err(|error| error.to_string())?),
                context_length,
                parameters: 0,
            })
        }
        Engine::Local {
            cache_bytes_max,
            device,
            ..
        } => local(
            model,
            files,
            cache_bytes_max.unwrap_or_else(|| config.unclaimed_cache_bytes()),
            *device,
            artifacts,
        ),
    }
}

/// The context that was asked for, at most the model's own.
fn within(asked: Option<u32>, own: u32) -> Result<u32, String> {
    match asked {
        Some(asked) if asked > own => Err(format!(
            "context_length {asked} is over the model's own {own}"
        )),
        Some(asked) => Ok(asked),
        None => Ok(own),
    }
}

#[cfg(feature = "local")]
fn local(
    model: &config::Model,
    files: &Files,
    cache_bytes_max: u64,
    device: DeviceChoice,
    artifacts: &Artifacts,
) -> Result<Sampler, String> {
    use crate::backend::local::{Local, LocalOptions};

    let name: Arc<str> = model.name.as_str().into();
    let options = LocalOptions {
        device,
        cache_bytes_max: usize::try_from(cache_bytes_max).unwrap_or(usize::MAX),
        context_length: model.context_length,
        ..LocalOptions::new(name)
    };
    let local = Local::load(files.clone(), options)
        .and_then(|local| local.constrained(&artifacts.tokenizer, &artifacts.end_tokens))
        .map_err(|error| with_causes(&error))?;
    let tokens = artifacts.tokenizer.vocab_size();
    if tokens > local.vocab_size() as usize {
        return Err(format!(
            "the tokenizer has {tokens} tokens, more than the model's {}",
            local.vocab_size()
        ));
    }
    Ok(Sampler {
        context_length: local.context_length(),
        parameters: local.parameters(),
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
fn local(
    _: &config::Model,
    _: &Files,
    _: u64,
    _: DeviceChoice,
    _: &Artifacts,
) -> Result<Sampler, String> {
    Err(WITHOUT_LOCAL.to_owned())
}

#[cfg(not(feature = "local"))]
const WITHOUT_LOCAL: &str = "this program was built without the feature `local`";
