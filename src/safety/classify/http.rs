//! How classifiers are asked over HTTP.

use std::{error::Error as _, time::Duration};

use reqwest::{Client, StatusCode, header, redirect};
use serde::{Serialize, de::DeserializeOwned};

use super::{ClassifierOptions, Unjudged};
use crate::backend::choose_cryptography;

/// How long a connection may take.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// The most bytes of an answer.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// One address that JSON is posted to.
#[derive(Debug)]
pub(super) struct Endpoint {
    client: Client,
    url: String,
}

impl Endpoint {
    /// This path below the classifier's URL.
    pub(super) fn new(
        options: &ClassifierOptions,
        path: &str,
        key: Option<&str>,
    ) -> Result<Self, String> {
        choose_cryptography();
        let mut headers = header::HeaderMap::new();
        if let Some(key) = key {
            let value = header::HeaderValue::from_str(&format!("Bearer {key}"));
            let mut value =
                value.map_err(|_| format!("{}: the key cannot be sent", options.key_variable))?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        let mut client = Client::builder()
            .user_agent(concat!("hotloop/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIME_MAX)
            .tcp_nodelay(true);
        if options.url.starts_with("http:") {
            // Nothing is encrypted, so no certificates of the system are needed.
            client = client.tls_certs_only(std::iter::empty());
        }
        let url = format!("{}/{path}", options.url.trim_end_matches('/'));
        url.parse::<reqwest::Url>()
            .map_err(|error| format!("url: {error}"))?;
        let client = client.build().map_err(|error| format!("url: {error}"))?;
        Ok(Self { client, url })
    }

    /// Posts this, and reads the answer.
    pub(super) async fn post<A: DeserializeOwned>(
        &self,
        question: &impl Serialize,
    ) -> Result<A, Unjudged> {
        let body = serde_json::to_vec(question).map_err(|it| Unjudged::Refused(it.to_string()))?;
        let request = self.client.post(&self.url);
        let request = request.header(header::CONTENT_TYPE, "application/json");
        let mut answer = request.body(body).send().await.map_err(failed)?;
        let status = answer.status();
        if !status.is_success() {
            let why = format!("it answers {status}");
            return Err(match passes(status) {
                true => Unjudged::Failed(why),
                false => Unjudged::Refused(why),
            });
        }
        let mut text = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(failed)? {
            if text.len() + piece.len() > ANSWER_BYTES_MAX {
                let why = format!("its answer is over {ANSWER_BYTES_MAX} bytes");
                return Err(Unjudged::Refused(why));
            }
            text.extend_from_slice(&piece);
        }
        serde_json::from_slice(&text).map_err(|_| {
            Unjudged::Refused("its answer is not that of the API that it is to speak".to_owned())
        })
    }
}

/// Whether asking again may help.
fn passes(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT
        )
}

fn failed(error: reqwest::Error) -> Unjudged {
    let error = error.without_url();
    // The error itself says little more than that there was one.
    let source = error.source().map(|source| format!(": {source}"));
    Unjudged::Failed(format!("{error}{}", source.unwrap_or_default()))
}
