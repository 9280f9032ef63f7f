//! The composition: a configuration becomes models, services, a port, and an orderly end.

mod accept;
mod call;
mod compose;
mod models;

use std::{fmt::Write as _, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use prost::Message as _;
use prost_types::FileDescriptorSet;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    agent::DEFAULT_SERVER,
    auth::{AuthLayer, Gate},
    budget::Budgets,
    config::{Config, ConfigError, LogFormat, Model},
    drain::Drain,
    model::Models,
    proto::DESCRIPTORS,
    safety::Policies,
};

pub use accept::serve;

/// Serves until the process is told to stop by SIGINT or SIGTERM, and lets streams finish. A second
/// signal stops at once. At SIGHUP models, aliases, policies, budgets and prices are taken from what `again` reads.
///
/// # Errors
///
/// What kept the server from starting, or a listener that broke while it served.
pub async fn run(
    config: Config,
    again: impl Fn() -> Result<Config, ConfigError> + Send + 'static,
) -> Result<(), ServeError> {
    let gate = config.gate().map_err(ServeError::Gate)?;
    // Before the port opens, so that no signal falls between.
    let signals = Signals::new().map_err(ServeError::Signals)?;
    let hangups = signal(SignalKind::hangup()).map_err(ServeError::Signals)?;
    let drain = Drain::new(Duration::from_secs(config.server.drain_secs_max));

    let (health, routes) = health_and_reflection().await?;
    let mut loader = models::Loader::new(&config);
    let current = Current {
        models: Arc::new(loader.load(&config).await?.into()),
        policies: Arc::new(compose::policies(&config)?),
        budgets: Arc::new(Budgets::new(&config.budgets, &config.prices)),
    };
    let services = compose::services(&config, current.clone(), &drain)?;
    let routes = compose::mount(routes, services.clone(), config.server.message_bytes_max);
    let routes = behind(&gate, routes);

    let listen = config.server.listen;
    let bound = TcpListener::bind(listen).await;
    let listener = bound.map_err(|source| ServeError::Bind { listen, source })?;
    let address = listener.local_addr().map_err(ServeError::Listener)?;
    announce(&config, address, gate.asks_for_keys());
    warn_of_few_descriptors(config.server.connections_max);

    let stopping = tokio::spawn(signals.drain(health, drain.clone()));
    let reloading = tokio::spawn(reload(hangups, loader, current, again));
    let served = serve(listener, routes, &config.server, drain).await;
    stopping.abort();
    reloading.abort();
    services.finish().await;
    served.map_err(ServeError::Listener)
}

/// Puts the gate in front of every route, unknown ones too: without a key nobody learns what there is.
fn behind(gate: &Gate, routes: Routes) -> Routes {
    let layer = AuthLayer::new(gate.clone());
    routes.into_axum_router().layer(layer).into()
}

/// Why the server did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A model cannot be served.
    #[error("model `{name}`: {reason}")]
    Model {
        /// Its name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The response store cannot be used.
    #[error("store.path {}: {reason}", path.display())]
    Store {
        /// Its file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The journal of usage cannot be used.
    #[error("billing.path {}: {reason}", path.display())]
    Billing {
        /// Its file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The policies cannot be used.
    #[error("safety.{reason}")]
    Safety {
        /// Why not.
        reason: String,
    },
    /// The API keys do not go with the address.
    #[error(transparent)]
    Gate(crate::auth::GateError),
    /// The process cannot be told to stop.
    #[error("cannot wait for signals: {0}")]
    Signals(io::Error),
    /// The address is taken, or not ours.
    #[error("cannot listen on {listen}: {source}")]
    Bind {
        /// Where it would have listened.
        listen: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The listening socket broke.
    #[error("the listener broke: {0}")]
    Listener(io::Error),
    /// The descriptors that were compiled in do not fit together.
    #[error("cannot offer reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// The health of the server and of each of its services.
#[derive(Debug, Clone)]
pub struct Health {
    reporter: HealthReporter,
    services: Vec<String>,
}

impl Health {
    /// Says of every service that it takes no more calls.
    pub async fn stop_serving(&self) {
        self.report(ServingStatus::NotServing).await;
    }

    async fn report(&self, status: ServingStatus) {
        for service in &self.services {
            self.reporter.set_service_status(service, status).await;
        }
    }
}

/// The routes that every gRPC server has, and the handle of its health, which is SERVING for every
/// service of our protos and for the server as a whole.
///
/// # Errors
///
/// The compiled descriptors cannot be read.
pub async fn health_and_reflection() -> Result<(Health, Routes), tonic_reflection::server::Error> {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let health = Health {
        reporter,
        // The empty name is the server as a whole.
        services: [String::new()].into_iter().chain(own_services()?).collect(),
    };
    health.report(ServingStatus::Serving).await;
    let reflection = || {
        [
            DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            // For clients that show the details of a status.
            tonic_types::pb::FILE_DESCRIPTOR_SET,
        ]
        .into_iter()
        .fold(
            tonic_reflection::server::Builder::configure(),
            tonic_reflection::server::Builder::register_encoded_file_descriptor_set,
        )
    };
    let routes = Routes::new(health_service)
        .add_service(reflection().build_v1()?)
        // grpcui and Postman still ask for the older one.
        .add_service(reflection().build_v1alpha()?);
    Ok((health, routes))
}

/// The full names of the services of our protos.
fn own_services() -> Result<Vec<String>, tonic_reflection::server::Error> {
    let files = FileDescriptorSet::decode(DESCRIPTORS)?.file;
    let names = files.iter().flat_map(|file| {
        let service =
            |it: &prost_types::ServiceDescriptorProto| format!("{}.{}", file.package(), it.name());
        file.service.iter().map(service)
    });
    Ok(names.collect())
}

/// The signals that stop the server.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }

    /// At the first signal: health says so first, then streams and connections are told to end. At
    /// the second: the end.
    async fn drain(mut self, health: Health, drain: Drain) {
        let signal = self.next().await;
        tracing::info!(signal, "told to stop");
        health.stop_serving().await;
        drain.begin();
        let signal = self.next().await;
        tracing::warn!(signal, "told to stop at once");
        drain.stop();
    }
}

/// What is in force, and replaced at SIGHUP.
#[derive(Clone)]
struct Current {
    models: Arc<Models>,
    policies: Arc<Policies>,
    budgets: Arc<Budgets>,
}

/// Reads the models, policies and budgets anew at each signal. Where something is wrong with them, they stay
/// as they are.
async fn reload(
    mut hangups: Signal,
    mut loader: models::Loader,
    current: Current,
    again: impl Fn() -> Result<Config, ConfigError>,
) {
    while hangups.recv().await.is_some() {
        let config = match again() {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(%error, "the configuration was read anew and is wrong: models stay as they are");
                continue;
            }
        };
        let fresh = match compose::policies(&config) {
            Ok(fresh) => fresh,
            Err(error) => {
                tracing::error!(%error, "the policies are wrong: they and the models stay as they are");
                continue;
            }
        };
        match loader.load(&config).await {
            Ok(catalog) => {
                current.models.replace(catalog);
                current.policies.replace(fresh);
                current.budgets.replace(&config.budgets, &config.prices);
                let names: Vec<&str> = config.models.iter().map(|it| it.name.as_str()).collect();
                tracing::info!(models = ?names, "the models were read anew");
            }
            Err(error) => {
                tracing::error!(%error, "a model cannot be loaded: models stay as they are");
            }
        }
    }
}

/// Says where the server is and how to talk to it.
fn announce(config: &Config, address: SocketAddr, asks_for_keys: bool) {
    match config.log.format {
        LogFormat::Text => eprint!("{}", welcome(&config.models, address, asks_for_keys)),
        LogFormat::Json => {
            let models: Vec<&str> = config.models.iter().map(|it| it.name.as_str()).collect();
            tracing::info!(%address, ?models, asks_for_keys, "serving");
        }
    }
    if !asks_for_keys && !address.ip().is_loopback() {
        tracing::warn!("everybody who reaches the port may use it: auth.mode is off");
    }
}

fn welcome(models: &[Model], address: SocketAddr, asks_for_keys: bool) -> String {
    let mut text = format!("\nhotloop serves gRPC on {address}\n\n  models\n");
    for model in models {
        let default = if model.default { " (default)" } else { "" };
        let kind = model.kinds();
        // Writing to a string does not fail.
        let _ = writeln!(text, "    {}: {kind}{default}", model.name);
    }
    // Whoever listens everywhere is reached on loopback too.
    let reach = if address.ip().is_unspecified() {
        format!("localhost:{}", address.port())
    } else {
        address.to_string()
    };
    let key = if asks_for_keys {
        "-H \"authorization: Bearer $HOTLOOP_API_KEY\" "
    } else {
        ""
    };
    let server = match format!("http://{reach}") {
        default if default == DEFAULT_SERVER => String::new(),
        other => format!("--server {other} "),
    };
    let create = r#"{"create":{"input":[{"user_text":"hello"}]}}"#;
    let _ = writeln!(
        text,
        "\n  try\n    hotloop agent {server}\"What is in this folder?\"\n    grpcurl -plaintext {key}-d '{create}' {reach} hotloop.v1.ResponsesService/Connect\n"
    );
    text
}

/// Warns where the process may not open as many sockets as it may have connections. Only Linux
/// tells without a system call.
fn warn_of_few_descriptors(connections_max: usize) {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    if let Some(files) = open_files_max(&limits)
        && files < connections_max.saturating_add(DESCRIPTORS_KEPT)
    {
        tracing::warn!(
            files,
            connections_max,
            "fewer open files are allowed than server.connections_max needs: raise ulimit -n"
        );
    }
}

/// File descriptors for everything that is no connection.
const DESCRIPTORS_KEPT: usize = 64;

/// The soft limit; `None` where there is none.
fn open_files_max(limits: &str) -> Option<usize> {
    let line = limits
        .lines()
        .find_map(|it| it.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests;
