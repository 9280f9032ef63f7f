//! A service over real sockets: it records what it is asked, and plays what it is told.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io::Read as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Request, Response, Version,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::Value;
use tokio::{net::TcpListener, sync::Notify};

/// What one request gets.
pub enum Play {
    /// A stream of events.
    Events(Vec<Step>),
    /// This status, with these headers and body.
    Status(u16, Vec<(&'static str, &'static str)>, &'static str),
    /// Nothing, and the connection stays open.
    Silence,
    /// The connection is closed.
    Close,
}

/// A piece of an answer.
pub enum Step {
    /// These bytes, in one frame.
    Bytes(Vec<u8>),
    /// A pause.
    Wait(Duration),
    /// The connection is closed.
    Close,
    /// Nothing more, and the connection stays open.
    Hang,
}

/// What was asked.
pub struct Asked {
    pub method: String,
    pub path: String,
    pub version: Version,
    pub headers: HeaderMap,
    /// The body, out of JSON or MessagePack, and decompressed; null where there is none.
    pub body: Value,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

#[derive(Default)]
struct State {
    plays: Mutex<VecDeque<Play>>,
    asked: Mutex<Vec<Asked>>,
    connections: AtomicUsize,
    dropped: Notify,
}

/// The service.
pub struct Fake {
    pub url: String,
    state: Arc<State>,
}

impl Fake {
    /// A service that plays these, one a request; warming is answered by itself.
    pub async fn new(plays: impl IntoIterator<Item = Play>) -> Self {
        let state = Arc::new(State {
            plays: Mutex::new(plays.into_iter().collect()),
            ..State::default()
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::Relaxed);
                let state = shared.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let builder = auto::Builder::new(TokioExecutor::new());
                    // Errors are those that the script asks for.
                    let _ = builder
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        Self { url, state }
    }

    /// What was asked so far, oldest first.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.asked.lock().unwrap())
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Waits until an answer was dropped before its end.
    pub async fn answer_dropped(&self) {
        let dropped = self.state.dropped.notified();
        tokio::time::timeout(Duration::from_secs(5), dropped)
            .await
            .expect("the answer is still asked for");
    }
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Body>, std::io::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?;
    let asked = Asked {
        method: parts.method.to_string(),
        path: parts.uri.path().to_owned(),
        version: parts.version,
        body: decoded(&parts.headers, &body.to_bytes()),
        headers: parts.headers,
    };
    let warming = asked.path == "/v1/tcp_warming";
    state.asked.lock().unwrap().push(asked);
    if warming {
        return Ok(whole(Response::builder().status(200), ""));
    }
    let play = state.plays.lock().unwrap().pop_front();
    match play.expect("nothing is to be asked any more") {
        Play::Events(steps) => {
            let watch = Watch {
                state,
                ended: false,
            };
            let frames = stream::unfold((steps.into_iter(), watch), next_frame);
            let response = Response::builder().header("content-type", "text/event-stream");
            let body = StreamBody::new(frames.boxed());
            Ok(response.body(body.boxed_unsync()).unwrap())
        }
        Play::Status(status, headers, body) => {
            let response = Response::builder().status(status);
            let response = headers
                .into_iter()
                .fold(response, |response, (name, value)| {
                    response.header(name, value)
                });
            Ok(whole(response, body))
        }
        Play::Silence => std::future::pending().await,
        Play::Close => Err(std::io::Error::other("closed")),
    }
}

fn whole(response: hyper::http::response::Builder, body: &'static str) -> Response<Body> {
    let body = http_body_util::Full::new(Bytes::from_static(body.as_bytes()));
    let body = body.map_err(|never: Infallible| match never {});
    response.body(body.boxed_unsync()).unwrap()
}

fn decoded(headers: &HeaderMap, body: &[u8]) -> Value {
    let mut plain = body.to_vec();
    if headers
        .get("content-encoding")
        .is_some_and(|it| it == "gzip")
    {
        plain.clear();
        let mut decoder = flate2::read::GzDecoder::new(body);
        decoder.read_to_end(&mut plain).unwrap();
    }
    match headers.get("content-type").map(|it| it.to_str().unwrap()) {
        _ if plain.is_empty() => Value::Null,
        Some("application/vnd.msgpack") => rmp_serde::from_slice(&plain).unwrap(),
        _ => serde_json::from_slice(&plain).unwrap(),
    }
}

/// Tells when an answer is dropped that was not played to its end.
struct Watch {
    state: Arc<State>,
    ended: bool,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.ended {
            self.state.dropped.notify_one();
        }
    }
}

type Frames = (std::vec::IntoIter<Step>, Watch);

async fn next_frame(
    (mut steps, mut watch): Frames,
) -> Option<(Result<Frame<Bytes>, std::io::Error>, Frames)> {
    loop {
        match steps.next() {
            Some(Step::Bytes(bytes)) => {
                return Some((Ok(Frame::data(bytes.into())), (steps, watch)));
            }
            Some(Step::Wait(pause)) => tokio::time::sleep(pause).await,
            Some(Step::Hang) => std::future::pending().await,
            Some(Step::Close) => {
                // What was sent before is to arrive first.
                tokio::time::sleep(Duration::from_millis(20)).await;
                watch.ended = true;
                return Some((Err(std::io::Error::other("closed")), (steps, watch)));
            }
            None => {
                watch.ended = true;
                return None;
            }
        }
    }
}
