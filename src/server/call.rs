//! Calls: what every one of them goes through before and after its handler.
//!
//! In this order: a request id, a span, the method and content type, a place among the calls of
//! its kind, the handler with a panic caught and, for unary calls, a limit of time. The key is
//! asked for behind this, by [`crate::auth::AuthLayer`] on the routes.

use std::{
    convert::Infallible,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use tonic::{Code, Status, body::Body, service::Routes};

use tower::ServiceExt as _;
use tracing::{Instrument as _, field::Empty};

use super::Drain;
use crate::{
    config,
    status::{refusal, retry_later, unreadable},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_CHARACTERS_MAX: usize = 128;
const RPC_CHARACTERS_MAX: usize = 128;

/// What a client that was turned away for want of room should wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Our calls that live as long as their client likes. They take their place in their handler, and
/// it is held until the stream ends.
const STREAMS: [&str; 2] = [
    "/hotloop.v1.ResponsesService/Connect",
    "/hotloop.v1.ResponsesService/Create",
];

/// What a call needs from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A place among the unary calls, and a limit of time.
    Unary,
    /// A limit of time only: a busy server is not a sick one.
    Probe,
    /// Nothing: the handler sees to it.
    Stream,
    /// A stream that would never end by itself: health being watched, reflection. A place among
    /// the watches, and an end when the server drains.
    Watch,
}

impl Kind {
    fn of(path: &str) -> Self {
        if STREAMS.contains(&path) {
            Self::Stream
        } else if path == "/grpc.health.v1.Health/Watch" || path.starts_with("/grpc.reflection.") {
            Self::Watch
        } else if path.starts_with("/grpc.health.v1.Health/") {
            Self::Probe
        } else {
            Self::Unary
        }
    }
}

/// Answers calls. Cheap to clone.
#[derive(Clone)]
pub(super) struct Calls(Arc<Shared>);

struct Shared {
    routes: Routes,
    unary: Arc<Semaphore>,
    unary_time: Duration,
    /// As many as connections: a client watches once a connection.
    watches: Arc<Semaphore>,
    drain: Drain,
}

impl Calls {
    pub(super) fn new(routes: Routes, options: &config::Server, drain: Drain) -> Self {
        Self(Arc::new(Shared {
            routes: routes.prepare(),
            unary: Arc::new(Semaphore::new(options.unary_calls_max)),
            unary_time: Duration::from_secs(options.unary_secs_max),
            watches: Arc::new(Semaphore::new(options.connections_max)),
            drain,
        }))
    }

    /// Answers a call, whatever happens to it.
    pub(super) async fn answer(
        &self,
        mut request: Request<Incoming>,
        peer: SocketAddr,
    ) -> Response<Answer> {
        let began = Instant::now();
        let id = request_id(request.headers());
        request.headers_mut().insert(REQUEST_ID, id.clone());
        let span = tracing::info_span!(
            "call",
            rpc = rpc(request.uri().path()),
            request_id = id.to_str().unwrap_or_default(),
            %peer,
            tenant = Empty,
            key = Empty,
        );
        let mut response = async {
            let response = self.admit(request).await;
            tracing::debug!(
                http = response.status().as_u16(),
                // Absent where a stream goes on: its status comes at its end.
                grpc = response.headers().get("grpc-status").and_then(|code| code.to_str().ok()),
                elapsed = ?began.elapsed(),
                "answered"
            );
            response
        }
        .instrument(span)
        .await;
        response.headers_mut().insert(REQUEST_ID, id);
        response
    }

    async fn admit(&self, request: Request<Incoming>) -> Response<Answer> {
        // tonic looks at neither, and would run a call for a browser's GET.
        if request.method() != Method::POST {
            let mut response = bare(StatusCode::METHOD_NOT_ALLOWED);
            let post = HeaderValue::from_static("POST");
            response.headers_mut().insert(header::ALLOW, post);
            return response;
        }
        if !is_grpc(request.headers()) {
            return bare(StatusCode::UNSUPPORTED_MEDIA_TYPE);
        }
        let shared = &*self.0;
        match Kind::of(request.uri().path()) {
            Kind::Stream => self.handle(request).await.map(Answer::new),
            Kind::Probe => self.handle_in_time(request).await.map(Answer::new),
            Kind::Unary => match Arc::clone(&shared.unary).try_acquire_owned() {
                Ok(_place) => self.handle_in_time(request).await.map(Answer::new),
                Err(_full) => refuse(&busy("unary calls")),
            },
            Kind::Watch => match Arc::clone(&shared.watches).try_acquire_owned() {
                Ok(place) => {
                    let watch = Watch {
                        draining: Box::pin(shared.drain.draining()),
                        _place: place,
                    };
                    let response = self.handle(request).await;
                    response.map(|body| Answer {
                        watch: Some(watch),
                        ..Answer::new(body)
                    })
                }
                Err(_full) => refuse(&busy("watches")),
            },
        }
    }

    async fn handle_in_time(&self, request: Request<Incoming>) -> Response<Body> {
        let time = self.0.unary_time;
        let handled = timeout(time, self.handle(request)).await;
        handled.unwrap_or_else(|_| {
            let text = format!("the call took longer than {} s", time.as_secs());
            refusal(Code::DeadlineExceeded, "UNARY_TIME_LIMIT", &text).into_http()
        })
    }

    async fn handle(&self, request: Request<Incoming>) -> Response<Body> {
        let handler = self.0.routes.clone().oneshot(request);
        match AssertUnwindSafe(handler).catch_unwind().await {
            Ok(handled) => in_our_words(handled.unwrap_or_else(|never: Infallible| match never {})),
            Err(_panic) => broken().into_http(),
        }
    }
}

/// The client's request id where it can be logged and sent back, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let fits = |id: &&HeaderValue| {
        (1..=REQUEST_ID_CHARACTERS_MAX).contains(&id.len())
            && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    match headers.get(REQUEST_ID).filter(fits) {
        Some(id) => id.clone(),
        None => {
            let id = uuid::Uuid::now_v7().simple().to_string();
            HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("none"))
        }
    }
}

/// The path as far as it may be logged: a client can put anything there.
fn rpc(path: &str) -> &str {
    let fits = path.len() <= RPC_CHARACTERS_MAX
        && path
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"/._".contains(&byte));
    if fits { path } else { "unknown" }
}

/// Whether the content type is that of gRPC over HTTP/2, and not of its relative for browsers.
fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// An answer to what is no gRPC.
fn bare(status: StatusCode) -> Response<Answer> {
    let mut response = Response::new(Answer::new(Body::empty()));
    *response.status_mut() = status;
    response
}

fn refuse(status: &Status) -> Response<Answer> {
    status.clone().into_http().map(Answer::new)
}

fn busy(what: &str) -> Status {
    let text = format!("the server has no room for more {what}");
    retry_later(Code::ResourceExhausted, "SERVER_BUSY", &text, RETRY_AFTER)
}

/// What a client is told of a panic.
fn broken() -> Status {
    refusal(
        Code::Internal,
        "HANDLER_FAILED",
        "the server failed in this call",
    )
}

/// The answer, or ours in place of tonic's where it could not read the request.
fn in_our_words(response: Response<Body>) -> Response<Body> {
    let headers = response.headers();
    let Some(code) = headers.get(Status::GRPC_STATUS) else {
        return response;
    };
    let has_details = headers.contains_key(Status::GRPC_STATUS_DETAILS);
    match unreadable(Code::from_bytes(code.as_bytes()), has_details) {
        Some(end) => Status::from(end).into_http(),
        None => response,
    }
}

/// The body of an answer. A panic in it becomes a status, where hyper would only reset the call.
pub(super) struct Answer {
    body: Body,
    watch: Option<Watch>,
    /// Tells the connection that the call is open.
    _open: Option<Arc<()>>,
}

/// What ends a stream that would not end by itself.
struct Watch {
    draining: Pin<Box<dyn Future<Output = Instant> + Send>>,
    _place: OwnedSemaphorePermit,
}

impl Answer {
    fn new(body: Body) -> Self {
        Self {
            body,
            watch: None,
            _open: None,
        }
    }

    /// The same, counted among the calls of its connection while it lives.
    pub(super) fn counted(self, open: Arc<()>) -> Self {
        Self {
            _open: Some(open),
            ..self
        }
    }

    /// Ends the body with this status.
    fn end(&mut self, status: &Status) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        *self = Self::new(Body::empty());
        let mut trailers = HeaderMap::new();
        let added = status.add_header(&mut trailers);
        Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))))
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let body = &mut self.body;
        let polled = AssertUnwindSafe(|| Pin::new(body).poll_frame(cx));
        match std::panic::catch_unwind(polled) {
            Ok(Poll::Ready(frame)) => return Poll::Ready(frame),
            Ok(Poll::Pending) => {}
            Err(_panic) => return self.end(&broken()),
        }
        // Only with nothing left to send: a watch of our health sees that we stop serving first.
        let Some(watch) = &mut self.watch else {
            return Poll::Pending;
        };
        match watch.draining.as_mut().poll(cx) {
            Poll::Ready(_deadline) => {
                self.end(&refusal(Code::Unavailable, "DRAINING", "the server stops"))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn our_streams_are_those_of_the_protos() {
        let files = FileDescriptorSet::decode(crate::proto::DESCRIPTORS)
            .unwrap()
            .file;
        let mut streams = Vec::new();
        for file in &files {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    if method.client_streaming() || method.server_streaming() {
                        streams.push(path);
                    } else {
                        assert_eq!(Kind::of(&path), Kind::Unary, "{path}");
                    }
                }
            }
        }
        assert_eq!(streams, STREAMS);
    }

    #[test]
    fn a_call_is_told_by_its_path() {
        for (path, kind) in [
            (STREAMS[0], Kind::Stream),
            ("/grpc.health.v1.Health/Watch", Kind::Watch),
            ("/grpc.health.v1.Health/Check", Kind::Probe),
            (
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                Kind::Watch,
            ),
            (
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                Kind::Watch,
            ),
            ("/no.Such/Call", Kind::Unary),
            ("/", Kind::Unary),
        ] {
            assert_eq!(Kind::of(path), kind, "{path}");
        }
    }

    #[test]
    fn only_what_looks_like_a_method_is_logged() {
        assert_eq!(rpc(STREAMS[0]), STREAMS[0]);
        assert_eq!(rpc("/secret%20plan"), "unknown");
        assert_eq!(rpc(&"/a".repeat(100)), "unknown");
    }
}
