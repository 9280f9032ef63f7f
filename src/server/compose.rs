//! From a configuration to services: the one place that names stores, journals and sinks.

use std::{
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use tonic::service::Routes;

use super::{Current, Drain, ServeError};
use crate::{
    archive::Archive,
    billing::{
        Biller, Billing, CloudEvents, Export, Journal, Jsonl, Kafka, KafkaOptions, Logged, Login,
        OpenError, Postgres,
    },
    budget::Budgets,
    config::{self, Config, ExportKind, Secrets},
    event::now_ms,
    proto::{
        models_service_server::ModelsServiceServer,
        responses_service_server::ResponsesServiceServer,
    },
    render::Heads,
    safety::{Classifier, Policies, Rules},
    service::{Parts, Services},
    session::{ParkedLimits, Sessions},
    store::{self, Embedded, Queue},
    wire::RequestLimits,
};

/// Makes caches and services over what is in force.
pub(super) fn services(
    config: &Config,
    current: Current,
    drain: &Drain,
) -> Result<Services, ServeError> {
    let stream = &config.stream;
    let cache = &config.cache;
    let parked = ParkedLimits {
        bytes_max: cache.parked_bytes_max,
        tenant_bytes_max: cache.parked_bytes_max / 100
            * u64::from(cache.parked_share_per_tenant_percent),
        time_max: Duration::from_secs(cache.parked_secs_max),
    };
    let Current {
        models,
        policies,
        budgets,
    } = current;
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
    let biller = biller(&config.billing, &config.secrets)?;
    // Behind the biller, which has settled what the last process left open.
    restore(&budgets, config.billing.path.as_deref())?;
    Ok(Services::new(Parts {
        models,
        heads,
        archive,
        biller,
        budgets,
        policies,
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

/// What items are checked under. Rules and classifiers that no policy uses are not read or asked. To be called in a
/// runtime.
pub(super) fn policies(config: &Config) -> Result<Policies, ServeError> {
    let refuse = |reason: String| ServeError::Safety { reason };
    let safety = &config.safety;
    let rules = match &safety.rules {
        _ if safety.policies.is_empty() => return Ok(Policies::default()),
        None => Rules::built_in(),
        Some(path) => Rules::read(path),
    };
    let rules = rules.map_err(|error| match &safety.rules {
        Some(path) => refuse(format!("rules {}: {error}", path.display())),
        None => refuse(format!("rules: {error}")),
    })?;
    let classifiers = safety
        .classifiers
        .iter()
        .enumerate()
        .map(|(index, options)| {
            let key = config.secrets.get(&options.key_variable);
            let classifier = Classifier::connect(options.clone(), key);
            let classifier =
                classifier.map_err(|it| refuse(format!("classifier[{index}].{it}")))?;
            Ok(Arc::new(classifier))
        });
    let classifiers = classifiers.collect::<Result<_, ServeError>>()?;
    Policies::new(rules, classifiers, safety.policies.clone())
        .map_err(|error| refuse(error.to_string()))
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

/// Opens the journal of usage, where there is to be one.
fn biller(options: &config::Billing, secrets: &Secrets) -> Result<Arc<dyn Biller>, ServeError> {
    let Some(path) = &options.path else {
        let version = options.price_book_version.as_str().into();
        return Ok(Arc::new(Logged::new(version)));
    };
    let failed = |reason: String| ServeError::Billing {
        path: path.clone(),
        reason,
    };
    let exports = options.export.iter().map(|it| {
        Ok(Export {
            name: it.name.as_str().into(),
            retries: it.retries(),
            exporter: match it.kind {
                ExportKind::Jsonl => Box::new(Jsonl::new(&it.path, it.rotate_bytes)),
                ExportKind::CloudEvents => {
                    let key = secrets.get(&it.key_variable);
                    let sink = CloudEvents::new(&it.url, key, &it.source);
                    Box::new(sink.map_err(|error| failed(error.to_string()))?)
                }
                ExportKind::Postgres => {
                    let password = secrets.get(&it.key_variable);
                    let sink = Postgres::new(&it.url, password, &it.source);
                    Box::new(sink.map_err(|error| failed(error.to_string()))?)
                }
                ExportKind::Kafka => {
                    let sink = Kafka::new(kafka(it, secrets));
                    Box::new(sink.map_err(|error| failed(error.to_string()))?)
                }
            },
        })
    });
    let exports = exports.collect::<Result<_, ServeError>>()?;
    let opened = Billing::open(path, options.durability, options.options(), exports);
    let billing = opened.map_err(|error: OpenError| failed(error.to_string()))?;
    Ok(Arc::new(billing))
}

/// How a sink of Kafka is reached.
fn kafka(export: &config::BillingExport, secrets: &Secrets) -> KafkaOptions {
    let password = secrets.get(&export.key_variable);
    KafkaOptions {
        brokers: export.brokers.clone(),
        topic: export.topic.clone(),
        tls: export.tls,
        login: password.map(|password| Login {
            sasl: export.sasl,
            user: export.user.clone(),
            password: password.to_owned(),
        }),
        batch_time_max: Duration::from_secs(export.batch_secs_max),
    }
}

/// Charges budgets with what the journal knows of the windows that run.
fn restore(budgets: &Budgets, journal: Option<&Path>) -> Result<(), ServeError> {
    let Some(path) = journal else {
        return Ok(());
    };
    let restored = budgets.restore(now_ms(), |since| Journal::used_since(path, since));
    restored.map_err(|error| ServeError::Billing {
        path: path.to_owned(),
        reason: error.to_string(),
    })
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
