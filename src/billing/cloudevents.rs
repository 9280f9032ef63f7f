//! Records as CloudEvents over HTTP.

use std::{io, time::Duration};

use serde::Serialize;

use super::{Exporter, Record, export::OwnRuntime};
use crate::backend::choose_cryptography;

/// The type of the events.
pub(super) const TYPE: &str = "hotloop.usage.record.v1";

/// How long one request may take.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);

/// Posts each batch of records as a batch of CloudEvents 1.0 in JSON
/// (`application/cloudevents-batch+json`). The event's id is the record's, so whoever takes it knows one that
/// comes again. Any 2xx says that all were taken.
#[derive(Debug)]
pub struct CloudEvents {
    client: reqwest::Client,
    runtime: OwnRuntime,
    url: String,
    key: Option<String>,
    source: String,
}

#[derive(Serialize)]
struct CloudEvent<'a> {
    specversion: &'static str,
    id: &'a str,
    source: &'a str,
    r#type: &'static str,
    subject: &'a str,
    time: String,
    datacontenttype: &'static str,
    data: &'a Record,
}

impl CloudEvents {
    /// Posts to this address, with this key as a bearer where there is one. `source` names this server.
    ///
    /// # Errors
    ///
    /// There can be no client for it.
    pub fn new(url: &str, key: Option<&str>, source: &str) -> io::Result<Self> {
        choose_cryptography();
        let client = reqwest::Client::builder()
            .timeout(REQUEST_TIME_MAX)
            .redirect(reqwest::redirect::Policy::none());
        Ok(Self {
            client: client.build().map_err(io::Error::other)?,
            runtime: OwnRuntime::default(),
            url: url.to_owned(),
            key: key.map(str::to_owned),
            source: source.to_owned(),
        })
    }
}

impl Exporter for CloudEvents {
    fn export(&mut self, records: &[Record]) -> io::Result<()> {
        let event = |record| event(record, &self.source);
        let events: Vec<CloudEvent<'_>> = records.iter().map(event).collect();
        let mut request = self
            .client
            .post(&self.url)
            .header("content-type", "application/cloudevents-batch+json")
            .body(serde_json::to_vec(&events)?);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        // Its timers are made in the runtime.
        let answer = self.runtime.get()?.block_on(async { request.send().await });
        let status = answer
            .map_err(|error| io::Error::other(error.without_url()))?
            .status();
        match status.is_success() {
            true => Ok(()),
            false => Err(io::Error::other(format!("it answers {status}"))),
        }
    }
}

fn event<'a>(record: &'a Record, source: &'a str) -> CloudEvent<'a> {
    let settled = record.settled_at_ms.unwrap_or(record.reserved_at_ms);
    let time = i64::try_from(settled)
        .ok()
        .map(jiff::Timestamp::from_millisecond);
    CloudEvent {
        specversion: "1.0",
        id: &record.id,
        source,
        r#type: TYPE,
        subject: &record.response,
        // RFC 3339, as the specification asks for.
        time: time.and_then(Result::ok).unwrap_or_default().to_string(),
        datacontenttype: "application/json",
        data: record,
    }
}
