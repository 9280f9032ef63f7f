//! Records as messages in a topic of Kafka.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    sync::Arc,
    time::Duration,
};

use futures::future::try_join_all;
use rskafka::{
    BackoffConfig, BackoffError,
    chrono::DateTime,
    client::{
        Client, ClientBuilder, Credentials, SaslConfig,
        error::Error,
        partition::{Compression, PartitionClient, UnknownTopicHandling},
    },
    record::Record as Message,
};
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    Exporter, Record,
    cloudevents::TYPE,
    export::{OwnRuntime, trusting},
    now_ms,
};

/// How a topic is reached.
pub struct KafkaOptions {
    /// Brokers that are asked first, as `host:port`. They tell of the others.
    pub brokers: Vec<String>,
    /// The topic. It has to be there.
    pub topic: String,
    /// Whether connections are encrypted. Trusted is what the system trusts.
    pub tls: bool,
    /// Who we are to the brokers. `None`: nobody asks.
    pub login: Option<Login>,
    /// How long a batch may take.
    pub batch_time_max: Duration,
}

/// Who we are to the brokers.
pub struct Login {
    /// How it is shown.
    pub sasl: Sasl,
    /// The user.
    pub user: String,
    /// What proves it.
    pub password: String,
}

/// How brokers are shown that we know a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Sasl {
    /// They are told.
    #[serde(rename = "plain")]
    Plain,
    /// By a proof that does not tell it, over SHA-256.
    #[serde(rename = "scram-sha-256")]
    ScramSha256,
    /// The same over SHA-512.
    #[default]
    #[serde(rename = "scram-sha-512")]
    ScramSha512,
}

/// Sends each batch of records as messages. A message's key is the tenant, so that the records of one lie in one
/// partition, in order; its value is the record as JSON; its headers are the record's `id`, by which whoever takes it
/// knows one that comes again, and the `type`. A batch is taken when all in-sync replicas have all of it.
pub struct Kafka {
    runtime: OwnRuntime,
    route: Route,
    batch_time_max: Duration,
}

impl Kafka {
    /// A sink that connects when it has something to send.
    ///
    /// # Errors
    ///
    /// There is nothing that the system trusts.
    pub fn new(options: KafkaOptions) -> io::Result<Self> {
        let tls = options.tls.then(trusting).transpose()?;
        Ok(Self {
            runtime: OwnRuntime::default(),
            batch_time_max: options.batch_time_max,
            route: Route {
                brokers: options.brokers,
                name: options.topic,
                tls: tls.map(Arc::new),
                login: options.login.map(Login::into_sasl),
                topic: None,
            },
        })
    }
}

impl Exporter for Kafka {
    fn export(&mut self, records: &[Record]) -> io::Result<()> {
        let limit = self.batch_time_max;
        // Its timer is made in the runtime.
        let sent = async { timeout(limit, self.route.send(records)).await };
        self.runtime.get()?.block_on(sent).unwrap_or_else(|_| {
            let secs = limit.as_secs_f32();
            let error = format!("batch_secs_max: it took longer than {secs} s");
            Err(io::Error::new(io::ErrorKind::TimedOut, error))
        })
    }
}

impl Login {
    fn into_sasl(self) -> SaslConfig {
        let credentials = Credentials::new(self.user, self.password);
        match self.sasl {
            Sasl::Plain => SaslConfig::Plain(credentials),
            Sasl::ScramSha256 => SaslConfig::ScramSha256(credentials),
            Sasl::ScramSha512 => SaslConfig::ScramSha512(credentials),
        }
    }
}

/// The way to a topic, and the topic once it is found.
struct Route {
    brokers: Vec<String>,
    name: String,
    tls: Option<Arc<ClientConfig>>,
    login: Option<SaslConfig>,
    /// `None` after a failure: leaders may have changed, and partitions been added.
    topic: Option<Topic>,
}

impl Route {
    async fn send(&mut self, records: &[Record]) -> io::Result<()> {
        if let Some(mut topic) = self.topic.take() {
            match topic.put(records).await {
                Ok(()) => {
                    self.topic = Some(topic);
                    return Ok(());
                }
                // Brokers close connections that were idle: that is worth a new one, not yet a failure.
                Err(error) => tracing::debug!(%error, "connections to the brokers are made anew"),
            }
        }
        let mut topic = self.find().await?;
        topic.put(records).await?;
        self.topic = Some(topic);
        Ok(())
    }

    /// Connects, and looks for the topic among all that we may see, since to ask for it by name may create it.
    async fn find(&self) -> io::Result<Topic> {
        let mut builder = ClientBuilder::new(self.brokers.clone())
            .client_id("hotloop")
            // It is the exporter's work to try again.
            .backoff_config(BackoffConfig {
                deadline: Some(Duration::ZERO),
                ..BackoffConfig::default()
            });
        if let Some(tls) = &self.tls {
            builder = builder.tls_config(tls.clone());
        }
        if let Some(login) = &self.login {
            builder = builder.sasl_config(login.clone());
        }
        let client = builder.build().await.map_err(failed)?;
        let mut topics = client.list_topics().await.map_err(failed)?.into_iter();
        let found = topics.find(|topic| topic.name == self.name);
        let count = found.map_or(0, |topic| topic.partitions.len());
        match i32::try_from(count) {
            Ok(partitions) if partitions > 0 => Ok(Topic {
                client,
                name: self.name.clone(),
                partitions,
                leaders: BTreeMap::new(),
            }),
            _ => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the brokers show no topic `{}`", self.name),
            )),
        }
    }
}

/// A topic that was found.
struct Topic {
    client: Client,
    name: String,
    /// How many it has.
    partitions: i32,
    /// Connections to the leaders of those that were written to.
    leaders: BTreeMap<i32, PartitionClient>,
}

impl Topic {
    /// Puts records into the partitions of their tenants; when it returns, all in-sync replicas have them.
    async fn put(&mut self, records: &[Record]) -> io::Result<()> {
        let mut batches: BTreeMap<i32, Vec<Message>> = BTreeMap::new();
        for record in records {
            let partition = partition(&record.tenant, self.partitions);
            batches.entry(partition).or_default().push(message(record)?);
        }
        for partition in batches.keys() {
            if let Entry::Vacant(vacant) = self.leaders.entry(*partition) {
                let unknown = UnknownTopicHandling::Error;
                let leader = self
                    .client
                    .partition_client(&self.name, *partition, unknown);
                vacant.insert(leader.await.map_err(failed)?);
            }
        }
        let puts = batches.into_iter().map(|(partition, batch)| {
            // The crate asks for the acknowledgement of all in-sync replicas.
            self.leaders[&partition].produce(batch, Compression::NoCompression)
        });
        try_join_all(puts).await.map_err(failed)?;
        Ok(())
    }
}

/// The partition that Kafka's own clients choose for a key, so that a topic keyed by tenant can be joined with others
/// that are.
fn partition(key: &str, partitions: i32) -> i32 {
    let hash = murmur2::murmur2(key.as_bytes(), murmur2::KAFKA_SEED);
    (hash & 0x7fff_ffff) as i32 % partitions
}

fn message(record: &Record) -> io::Result<Message> {
    let headers = [("id", &*record.id), ("type", TYPE)];
    Ok(Message {
        key: Some(record.tenant.as_bytes().to_vec()),
        value: Some(serde_json::to_vec(record)?),
        headers: headers
            .map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()))
            .into(),
        // When it is sent: a topic drops by this what is old, also a record that could not be sent for long.
        timestamp: i64::try_from(now_ms())
            .ok()
            .and_then(DateTime::from_timestamp_millis)
            .unwrap_or_default(),
    })
}

/// What went wrong, without the words of a client that gave up trying.
fn failed(error: Error) -> io::Error {
    if let Error::RetryFailed(BackoffError::DeadlineExceded { source, .. }) = error {
        return match source.downcast::<Error>() {
            Ok(error) => failed(*error),
            Err(other) => io::Error::other(other),
        };
    }
    if let Error::ServerError { protocol_error, .. } = error {
        return io::Error::other(format!("a broker answers {protocol_error}"));
    }
    io::Error::other(error)
}

#[cfg(test)]
mod tests;
