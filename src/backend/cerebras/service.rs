//! The connection to a service: one client with its pool, what the service last said about its
//! limits, and the reading of an answer under its deadlines.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::{
    Body, Client, Response,
    header::{
        ACCEPT, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap,
        HeaderValue,
    },
    redirect::Policy,
};
use tokio::time::{Instant, timeout_at};

use super::{
    ApiKey, BodyForm, CerebrasError, CerebrasOptions, Dialect, PromptForm,
    answer::{Answer, failed},
    failure::{Refusal, refusal},
    sse::SseParser,
    upload,
};
use crate::backend::{BackendError, Chunk, choose_cryptography};

/// How long the connection made in advance may take.
const WARM_TIMEOUT: Duration = Duration::from_secs(1);

/// How often an idle connection shows that it lives, and how long it may take to.
const KEEPALIVE: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long what an answer cost is waited for, behind its end.
const USAGE_WAIT: Duration = Duration::from_secs(2);

/// How much is read behind the end of an answer, and how long, so that the connection can be used again.
const REST_BYTES_MAX: usize = 64 << 10;
const REST_WAIT: Duration = Duration::from_secs(2);

/// The most bytes of one answer.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// The most rate limits that are kept, and the most bytes of each.
const LIMITS_MAX: usize = 16;
const LIMIT_BYTES_MAX: usize = 64;

/// The headers by which a service finds a request in its logs.
const TRACE_HEADERS: [&str; 2] = ["x-request-id", "cf-ray"];

/// What is asked of a service, and what is to be made of its answer.
#[derive(Debug)]
pub(super) struct Request {
    /// The body.
    pub(super) parts: Vec<Bytes>,
    pub(super) answer: Answer,
    /// The most bytes of one event.
    pub(super) event_bytes_max: usize,
}

/// A service, as all samples share it.
#[derive(Debug)]
pub(super) struct Service {
    client: Client,
    url: String,
    gzip: bool,
    first_byte: Duration,
    idle: Duration,
    whole: Duration,
    said: Mutex<LastSaid>,
}

/// What the service last said about itself.
#[derive(Debug, Default)]
struct LastSaid {
    /// It takes nothing before.
    paused_until: Option<Instant>,
    limits: Vec<(String, String)>,
}

impl Service {
    pub(super) fn new(
        options: &CerebrasOptions,
        key: Option<ApiKey>,
    ) -> Result<Self, CerebrasError> {
        choose_cryptography();
        let base = options.base()?;
        let mut client = Client::builder()
            .user_agent(concat!("hotloop/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers(options, key)?)
            .redirect(Policy::none())
            .connect_timeout(Duration::from_millis(options.connect_ms))
            .pool_idle_timeout(Duration::from_secs(options.pool_idle_secs))
            .tcp_nodelay(true)
            .tcp_keepalive(KEEPALIVE)
            .http2_keep_alive_interval(KEEPALIVE)
            .http2_keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .http2_keep_alive_while_idle(true);
        if options.http2_prior_knowledge {
            client = client.http2_prior_knowledge();
        }
        if base.starts_with("http:") {
            // Nothing is encrypted, so no certificates of the system are needed.
            client = client.tls_certs_only(std::iter::empty());
        }
        let path = match options.prompt {
            PromptForm::Chat => "chat/completions",
            PromptForm::Tokens => "completions",
        };
        let client = client.build().map_err(CerebrasError::Client)?;
        if options.warm && options.dialect == Dialect::Cerebras {
            warm(&client, &base);
        }
        Ok(Self {
            client,
            url: format!("{base}/v1/{path}"),
            gzip: options.gzip,
            first_byte: Duration::from_millis(options.first_byte_ms),
            idle: Duration::from_millis(options.idle_ms),
            whole: Duration::from_secs(options.sample_secs_max),
            said: Mutex::default(),
        })
    }

    /// Whether it has not asked to be left alone.
    pub(super) fn is_healthy(&self) -> bool {
        let until = self.said.lock().paused_until;
        until.is_none_or(|until| Instant::now() >= until)
    }

    pub(super) fn limits(&self) -> Vec<(String, String)> {
        self.said.lock().limits.clone()
    }

    /// Sends the request, and waits for the answer to begin.
    pub(super) async fn ask(self: Arc<Self>, request: Request) -> Result<Reading, BackendError> {
        let begin = Instant::now();
        let first_byte = begin + self.first_byte;
        let response = match timeout_at(first_byte, self.send(&request.parts)).await {
            Ok(sent) => sent?,
            Err(_) => return Err(unavailable("no answer came in time")),
        };
        let status = response.status();
        self.note(&response);
        if status.is_success() {
            return Ok(Reading {
                response,
                parser: SseParser::new(request.event_bytes_max),
                answer: request.answer,
                until: first_byte,
                whole: begin + self.whole,
                idle: self.idle,
                bytes: 0,
                broken: None,
            });
        }
        let Refusal { error, pause } = refusal(response).await;
        if let Some(pause) = pause {
            let limits = self.limits();
            tracing::warn!(
                status = status.as_u16(),
                ?pause,
                ?limits,
                "the service pauses"
            );
            self.said.lock().paused_until = Some(Instant::now() + pause);
        }
        Err(error)
    }

    /// Sends the request. Once more, where the connection was closed under it: a service may end one
    /// that was idle in the very moment in which it is used.
    async fn send(&self, parts: &[Bytes]) -> Result<Response, BackendError> {
        let mut again = true;
        loop {
            let mut request = self.client.post(&self.url);
            let parts = parts.to_vec();
            request = if self.gzip {
                let body = Body::wrap_stream(upload::gzip(parts));
                request.header(CONTENT_ENCODING, "gzip").body(body)
            } else {
                let bytes: usize = parts.iter().map(Bytes::len).sum();
                let body = Body::wrap_stream(upload::plain(parts));
                request.header(CONTENT_LENGTH, bytes).body(body)
            };
            let error = match request.send().await {
                Ok(response) => return Ok(response),
                Err(error) => error.without_url(),
            };
            let why = &error as &dyn Error;
            if error.is_timeout() || error.is_connect() {
                tracing::warn!(error = why, "no connection to the service can be made");
                return Err(unavailable("no connection can be made"));
            }
            tracing::debug!(error = why, again, "the request was not answered");
            if !again {
                return Err(unavailable("the connection broke before an answer"));
            }
            again = false;
        }
    }

    /// Keeps what the service says about its limits.
    fn note(&self, response: &Response) {
        let headers = response.headers();
        let text = |value: &HeaderValue| value.to_str().map_or_else(|_| String::new(), cut);
        let limits: Vec<(String, String)> = headers
            .iter()
            .filter(|(name, _)| name.as_str().starts_with("x-ratelimit-"))
            .map(|(name, value)| (cut(name.as_str()), text(value)))
            .take(LIMITS_MAX)
            .collect();
        let [request, ray] = TRACE_HEADERS.map(|name| headers.get(name).map(text));
        let status = response.status().as_u16();
        let version = response.version();
        tracing::debug!(
            status,
            ?version,
            request,
            ray,
            ?limits,
            "the service answers"
        );
        if !limits.is_empty() {
            self.said.lock().limits = limits;
        }
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(LIMIT_BYTES_MAX)].to_owned()
}

/// Has a connection made, so that the first request need not.
fn warm(client: &Client, base: &str) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        return;
    };
    let request = client.get(format!("{base}/v1/tcp_warming"));
    runtime.spawn(async move {
        if let Err(error) = request.timeout(WARM_TIMEOUT).send().await {
            let error = error.without_url();
            tracing::debug!(error = &error as &dyn Error, "no connection in advance");
        }
    });
}

fn headers(options: &CerebrasOptions, key: Option<ApiKey>) -> Result<HeaderMap, CerebrasError> {
    let mut headers = options.header_map()?;
    let form = match options.body {
        BodyForm::Json => "application/json",
        BodyForm::Msgpack => "application/vnd.msgpack",
    };
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(form));
    headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
    if options.dialect == Dialect::Cerebras {
        let patch = "x-cerebras-version-patch";
        let default = HeaderValue::from_static("2");
        headers.entry(patch).or_insert(default);
    }
    if let Some(threshold) = options.queue_threshold_ms {
        headers.insert("queue_threshold", threshold.into());
    }
    if let Some(ApiKey(bearer)) = key {
        headers.insert(AUTHORIZATION, bearer);
    }
    Ok(headers)
}

/// An answer while it is read. Dropping it ends the request.
#[derive(Debug)]
pub(super) struct Reading {
    response: Response,
    parser: SseParser,
    answer: Answer,
    /// More must have come by then.
    until: Instant,
    whole: Instant,
    idle: Duration,
    bytes: u64,
    /// Why nothing comes behind the chunk that was handed out.
    broken: Option<BackendError>,
}

/// How an answer goes on.
#[derive(Debug)]
pub(super) enum Next {
    More(Chunk, Box<Reading>),
    Last(Chunk),
}

impl Reading {
    /// The next chunk: all that one read brought.
    pub(super) async fn next(mut self: Box<Self>) -> Result<Next, BackendError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        loop {
            let mut chunk = Chunk::default();
            let parsed = self.parse(&mut chunk);
            if parsed.is_ok() && self.answer.is_over() {
                self.answer.finish(&mut chunk);
                if !self.answer.is_cut() {
                    tokio::spawn(rest(self.response));
                }
                return Ok(Next::Last(chunk));
            }
            let empty = chunk.tokens.is_empty() && chunk.told.is_none();
            match parsed {
                Err(error) if empty => return Err(error),
                Err(error) => self.broken = Some(error),
                Ok(()) if empty => {
                    self.read().await?;
                    continue;
                }
                Ok(()) => {}
            }
            return Ok(Next::More(chunk, self));
        }
    }

    fn parse(&mut self, chunk: &mut Chunk) -> Result<(), BackendError> {
        while !self.answer.is_over() {
            let event = self.parser.next();
            let event = event.map_err(|error| failed(format!("the answer is broken: {error}")))?;
            let Some(event) = event else {
                break;
            };
            self.answer.event(&event, chunk)?;
        }
        Ok(())
    }

    /// Reads more. Behind the end of the answer whatever goes wrong is its end.
    async fn read(&mut self) -> Result<(), BackendError> {
        if self.answer.is_ending() {
            self.until = self.until.min(Instant::now() + USAGE_WAIT);
        }
        let begun = self.bytes > 0;
        let read = timeout_at(self.until.min(self.whole), self.response.chunk()).await;
        match read {
            Ok(Ok(Some(bytes))) => {
                self.bytes += bytes.len() as u64;
                if self.bytes > ANSWER_BYTES_MAX {
                    return Err(failed("the answer is over 256 MiB"));
                }
                self.parser.push(&bytes);
                if !self.answer.is_ending() {
                    self.until = Instant::now() + self.idle;
                }
                Ok(())
            }
            Ok(Ok(None)) => self.answer.close(),
            Ok(Err(_)) | Err(_) if self.answer.is_ending() => self.answer.close(),
            Ok(Err(error)) => {
                let error = error.without_url();
                tracing::debug!(error = &error as &dyn Error, "the answer broke");
                let reason = "the connection broke in the answer";
                Err(if begun {
                    failed(reason)
                } else {
                    unavailable(reason)
                })
            }
            Err(_) if !begun => Err(unavailable("no answer came in time")),
            Err(_) if Instant::now() >= self.whole => Err(failed("the answer takes too long")),
            Err(_) => Err(failed("the answer stopped coming")),
        }
    }
}

/// Reads what stands behind the end of an answer, so that the connection can be used again.
async fn rest(mut response: Response) {
    let read = async {
        let mut bytes = 0;
        while let Ok(Some(more)) = response.chunk().await {
            bytes += more.len();
            if bytes > REST_BYTES_MAX {
                break;
            }
        }
    };
    // An answer that does not end takes its connection with it.
    let _ = tokio::time::timeout(REST_WAIT, read).await;
}

fn unavailable(reason: &str) -> BackendError {
    BackendError::Unavailable {
        reason: reason.into(),
        retry_after: None,
    }
}
