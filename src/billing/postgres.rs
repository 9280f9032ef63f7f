//! Records in one table of Postgres, which any number of servers write to.

use std::{error::Error as _, io, time::Duration};

use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::{
    Client, Config,
    config::{Host, SslMode},
    types::{ToSql, Type},
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Exporter, Record,
    export::{OwnRuntime, trusting},
};
use crate::backend::choose_cryptography;

/// What `hotloop_usage_format` says of a table that this program writes.
const FORMAT: i32 = 1;

/// How long a connection may take to be made, and how long a batch, where nothing else is said. A
/// server that hangs holds up its exporter no longer than both.
const TIME_MAX: Duration = Duration::from_secs(15);

const SCHEMA: &str = include_str!("postgres/schema.sql");
const INSERT: &str = include_str!("postgres/insert.sql");

/// Inserts each batch of records in one transaction. The record's id is the key of the table, so that a record that
/// comes again is there once. The table is made where there is none. One connection is kept for
/// as long as it works.
pub struct Postgres {
    /// Ends before the runtime that it lives in.
    link: Option<Link>,
    runtime: OwnRuntime,
    server: Server,
    node: String,
}

/// Where the table is, and how it is reached.
struct Server {
    config: Config,
    tls: MakeRustlsConnect,
    time_max: Duration,
}

/// A connection to a server whose table is of our format.
struct Link {
    client: Client,
    _driver: AbortOnDropHandle<()>,
}

/// Why a URL is of no use.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// Of something else.
    #[error("is no postgres:// address")]
    Scheme,
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Syntax(String),
    /// It leaves open what would then be guessed.
    #[error("names no {0}")]
    Missing(&'static str),
    /// It would stand in a file.
    #[error(
        "holds a password, which comes from the environment alone: key_variable names the variable"
    )]
    Password,
}

impl Postgres {
    /// Writes to the database of this URL, with this password where there is one. `node` names this server.
    ///
    /// # Errors
    ///
    /// [`UrlError`], or there are no roots to verify the server's certificate against.
    pub fn new(url: &str, password: Option<&str>, node: &str) -> io::Result<Self> {
        let mut config = Self::check(url).map_err(io::Error::other)?;
        config.application_name("hotloop");
        if let Some(password) = password {
            config.password(password);
        }
        Ok(Self {
            link: None,
            runtime: OwnRuntime::default(),
            server: Server {
                tls: tls(&config)?,
                config,
                time_max: TIME_MAX,
            },
            node: node.to_owned(),
        })
    }

    /// With another bound on how long a connection may take to be made, and how long a batch.
    #[must_use]
    pub fn within(mut self, time_max: Duration) -> Self {
        self.server.time_max = time_max;
        self
    }

    /// What a URL says.
    ///
    /// # Errors
    ///
    /// [`UrlError`].
    pub fn check(url: &str) -> Result<Config, UrlError> {
        if !(url.starts_with("postgres://") || url.starts_with("postgresql://")) {
            return Err(UrlError::Scheme);
        }
        let config: Config = url
            .parse()
            .map_err(|error| UrlError::Syntax(reason(&error)))?;
        if config.get_password().is_some() {
            return Err(UrlError::Password);
        }
        let named = [
            (config.get_user().is_some(), "user"),
            (!config.get_hosts().is_empty(), "host"),
            (config.get_dbname().is_some(), "database"),
        ];
        match named.into_iter().find(|(is_there, _)| !is_there) {
            Some((_, what)) => Err(UrlError::Missing(what)),
            None => Ok(config),
        }
    }
}

impl Exporter for Postgres {
    fn export(&mut self, records: &[Record]) -> io::Result<()> {
        let records = serde_json::to_string(records)?;
        let (kept, server, node) = (self.link.take(), &self.server, &self.node);
        let exported = self.runtime.get()?.block_on(async {
            let link = match kept {
                Some(link) => link,
                None => server.link().await?,
            };
            let parameters: [(&(dyn ToSql + Sync), Type); 2] =
                [(&records, Type::TEXT), (node, Type::TEXT)];
            let inserted = link.client.query_typed(INSERT, &parameters);
            answered(server.time_max, inserted).await?;
            Ok::<_, io::Error>(link)
        });
        // One on which something failed is not used again.
        self.link = Some(exported?);
        Ok(())
    }
}

impl Server {
    /// Connects, and sees to the table.
    async fn link(&self) -> io::Result<Link> {
        let found = answered(self.time_max, async {
            let (client, connection) = self.config.connect(self.tls.clone()).await?;
            let driver = tokio::spawn(async move {
                // What fails in it fails what is asked of the client.
                let _ = connection.await;
            });
            let link = Link {
                client,
                _driver: AbortOnDropHandle::new(driver),
            };
            // The server too lets go of what takes so long: attempts would pile up behind a lock there.
            let limit = self.time_max.as_millis();
            let prepare = format!("SET statement_timeout = {limit}; {SCHEMA}");
            link.client.batch_execute(&prepare).await?;
            let sql = "SELECT version FROM hotloop_usage_format";
            let found: i32 = link.client.query_one(sql, &[]).await?.try_get(0)?;
            Ok((link, found))
        });
        match found.await? {
            (link, FORMAT) => Ok(link),
            (_, found) => Err(io::Error::other(format!(
                "the table hotloop_usage is of format {found}, and this program writes {FORMAT}"
            ))),
        }
    }
}

/// How the server's certificate is verified: against the roots of the system, and the name of the host.
fn tls(config: &Config) -> io::Result<MakeRustlsConnect> {
    // Over a socket of the file system Postgres speaks no TLS.
    let local = |host: &Host| matches!(host, Host::Unix(_));
    let plain = config.get_ssl_mode() == SslMode::Disable || config.get_hosts().iter().all(local);
    let verifying = match plain {
        // A machine may be without roots where none are needed.
        true => {
            choose_cryptography();
            ClientConfig::builder()
                .with_root_certificates(RootCertStore::empty())
                .with_no_client_auth()
        }
        false => trusting()?,
    };
    Ok(MakeRustlsConnect::new(verifying))
}

async fn answered<T>(
    time_max: Duration,
    asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> io::Result<T> {
    match tokio::time::timeout(time_max, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(io::Error::other(reason(&error))),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the server does not answer within {time_max:?}"),
        )),
    }
}

/// All that is known of an error; by itself it says only where it happened. What the server says is its
/// message: its details may quote a row.
fn reason(error: &tokio_postgres::Error) -> String {
    if let Some(said) = error.as_db_error() {
        return format!(
            "the server says: {} ({})",
            said.message(),
            said.code().code()
        );
    }
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
