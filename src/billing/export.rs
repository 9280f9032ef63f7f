//! What brings settled records to where they are wanted: in order, again until it works, and kept
//! aside where it does not.

use std::{sync::Arc, time::Duration};

use rustls::ClientConfig;
use rustls_platform_verifier::ConfigVerifierExt as _;
use tokio::runtime::{self, Runtime};

use super::{
    Change, Record,
    journal::Reading,
    now_ms,
    queue::{Behind, Ended},
};

use crate::backend::choose_cryptography;

/// Records that are handed over at once, at most.
const BATCH_MAX: usize = 256;

/// How often a journal that cannot be read is asked again, and an idle one is looked into.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// A sink of records. It may be given one again that it has taken: the id says so.
pub trait Exporter: Send + 'static {
    /// Takes these records; when it returns, they are safe there. Blocks.
    ///
    /// # Errors
    ///
    /// It did not take them, or not all; it is given all of them again.
    fn export(&mut self, records: &[Record]) -> std::io::Result<()>;
}

/// A sink as it is configured.
pub struct Export {
    /// Its name in the journal.
    pub name: Arc<str>,
    /// The sink.
    pub exporter: Box<dyn Exporter>,
    /// What happens when it fails.
    pub retries: Retries,
}

/// How often a sink is asked again before what it does not take is kept aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// How often it is asked in all.
    pub attempts_max: u32,
    /// How long before the second time; then twice as long with each.
    pub rest_min: Duration,
    /// The longest rest.
    pub rest_max: Duration,
}

/// A runtime of an exporter's own thread, made there when it is first asked for: one may not end
/// where tasks run.
#[derive(Debug, Default)]
pub(super) struct OwnRuntime(Option<Runtime>);

impl OwnRuntime {
    /// The runtime.
    pub(super) fn get(&mut self) -> std::io::Result<&Runtime> {
        let runtime = match self.0.take() {
            Some(runtime) => runtime,
            None => runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
        };
        Ok(self.0.insert(runtime))
    }
}

/// Encryption that trusts what the system trusts.
pub(super) fn trusting() -> std::io::Result<ClientConfig> {
    choose_cryptography();
    ClientConfig::with_platform_verifier().map_err(std::io::Error::other)
}

/// What became of a batch.
enum Outcome {
    Taken,
    Refused(String),
    /// The server stops: the next start goes on here.
    Closing,
}

/// Why an exporter ends or rests.
enum Stop {
    Unreadable(rusqlite::Error),
    Ended,
    Closing,
}

impl From<rusqlite::Error> for Stop {
    fn from(error: rusqlite::Error) -> Self {
        Self::Unreadable(error)
    }
}

impl From<Ended> for Stop {
    fn from(_: Ended) -> Self {
        Self::Ended
    }
}

/// The life of an exporter.
pub(super) fn run(export: Export, reading: &Reading, behind: &Behind) {
    let mut courier = Courier {
        export,
        reading,
        behind,
        failed: true,
    };
    loop {
        match courier.deliver() {
            Ok(()) | Err(Stop::Closing | Stop::Ended) => return,
            Err(Stop::Unreadable(error)) => {
                tracing::error!(%error, "the journal cannot be read for an exporter");
                if !behind.wait(None, LOOK_EVERY) {
                    return;
                }
            }
        }
    }
}

/// Brings records to one sink.
struct Courier<'a> {
    export: Export,
    reading: &'a Reading,
    behind: &'a Behind,
    /// The sink may have failed before: what was kept aside is worth a try once it works.
    failed: bool,
}

impl Courier<'_> {
    /// Brings what is there, and what comes, until the server stops.
    fn deliver(&mut self) -> Result<(), Stop> {
        let sink = self.export.name.clone();
        let mut cursor = self.reading.cursor(&sink)?;
        self.redeliver()?;
        loop {
            // Before it looks, so that what is written meanwhile wakes it.
            let written = self.behind.written();
            let batch = self.reading.after(cursor, BATCH_MAX)?;
            let Some((last, _)) = batch.last() else {
                if !self.behind.wait(Some(written), LOOK_EVERY) {
                    return self.last_call(cursor);
                }
                continue;
            };
            cursor = *last;
            let (numbers, records): (Vec<u64>, Vec<Record>) = batch.into_iter().unzip();
            match self.hand_over(&records) {
                Outcome::Taken => {
                    self.behind.write(Change::Exported {
                        sink: sink.clone(),
                        upto: cursor,
                    })?;
                    self.redeliver()?;
                }
                Outcome::Refused(error) => {
                    let buried = numbers.len();
                    tracing::error!(sink = &*sink, buried, error, "usage records are kept aside");
                    self.failed = true;
                    self.behind.write(Change::Buried {
                        sink: sink.clone(),
                        numbers,
                        attempts: self.export.retries.attempts_max,
                        error,
                        at_ms: now_ms(),
                    })?;
                }
                Outcome::Closing => return Err(Stop::Closing),
            }
        }
    }

    /// The server stops: what is there is tried once more.
    fn last_call(&mut self, mut cursor: u64) -> Result<(), Stop> {
        let sink = self.export.name.clone();
        loop {
            let batch = self.reading.after(cursor, BATCH_MAX)?;
            let Some((last, _)) = batch.last() else {
                return Ok(());
            };
            cursor = *last;
            let records: Vec<Record> = batch.into_iter().map(|it| it.1).collect();
            if self.export.exporter.export(&records).is_err() {
                return Err(Stop::Closing);
            }
            let sink = sink.clone();
            self.behind.write(Change::Exported { sink, upto: cursor })?;
        }
    }

    /// Tries once what was kept aside, where the sink may work again.
    fn redeliver(&mut self) -> Result<(), Stop> {
        if !std::mem::replace(&mut self.failed, false) {
            return Ok(());
        }
        let sink = self.export.name.clone();
        let mut from = 0;
        loop {
            let batch = self.reading.dead(&sink, from, BATCH_MAX)?;
            let (numbers, records): (Vec<u64>, Vec<Record>) = batch.into_iter().unzip();
            let Some(last) = numbers.last() else {
                return Ok(());
            };
            from = *last;
            if let Err(error) = self.export.exporter.export(&records) {
                tracing::warn!(sink = &*sink, %error, "what was kept aside is not taken yet");
                self.failed = true;
                return Ok(());
            }
            let revived = numbers.len();
            let sink = sink.clone();
            self.behind.write(Change::Revived { sink, numbers })?;
            tracing::info!(revived, "usage records that were kept aside are exported");
        }
    }

    /// Hands records over, again until they are taken or it was tried often enough.
    fn hand_over(&mut self, records: &[Record]) -> Outcome {
        let retries = self.export.retries;
        let mut rest = retries.rest_min;
        let mut attempt = 1;
        loop {
            let error = match self.export.exporter.export(records) {
                Ok(()) => return Outcome::Taken,
                Err(error) => error,
            };
            tracing::warn!(sink = &*self.export.name, attempt, %error, "an export failed");
            if attempt >= retries.attempts_max {
                return Outcome::Refused(error.to_string());
            }
            if !self.behind.wait(None, rest) {
                return Outcome::Closing;
            }
            attempt += 1;
            rest = (2 * rest).min(retries.rest_max);
        }
    }
}

#[cfg(test)]
mod tests;
