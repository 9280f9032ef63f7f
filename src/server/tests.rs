use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::FutureExt as _;
use h2::{RecvStream, client::SendRequest};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Frame;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tonic::{Code, Status, body::Body, server::NamedService, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus as Seen, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tonic_types::StatusExt as _;
use tower::Service;

use super::*;
use crate::{
    auth::{Keys, Mode},
    config,
};

const UNARY: &str = "/hotloop.v1.ResponsesService/GetResponse";
const UNARY_HANGS: &str = "/hotloop.v1.ResponsesService/GetPrompt";
const UNARY_PANICS: &str = "/hotloop.v1.ResponsesService/DeleteResponse";
const STREAM_HANGS: &str = "/hotloop.v1.ResponsesService/Connect";
const STREAM_PANICS: &str = "/hotloop.v1.ResponsesService/Create";

/// Long enough that reaching it is a failure.
///
/// The clock is real in here: a paused one jumps while bytes are on their way through a socket.
const NEVER: Duration = Duration::from_secs(10);

/// Our service, played: each of its methods does one thing.
#[derive(Clone)]
struct Played;

impl NamedService for Played {
    const NAME: &'static str = "hotloop.v1.ResponsesService";
}

impl Service<Request<Body>> for Played {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        async move {
            let body = match path.as_str() {
                UNARY => return Ok(Status::ok("").into_http()),
                UNARY_HANGS => std::future::pending().await,
                UNARY_PANICS => panic!("played"),
                STREAM_HANGS => Body::new(Stuck),
                STREAM_PANICS => Body::new(Breaking),
                _ => return Ok(Status::unimplemented("").into_http()),
            };
            Ok(Response::new(body))
        }
        .boxed()
    }
}

/// A body of which nothing ever comes.
struct Stuck;

impl hyper::body::Body for Stuck {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Pending
    }
}

/// A body that panics.
struct Breaking;

impl hyper::body::Body for Breaking {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        panic!("played")
    }
}

/// A server on a free port.
struct Served {
    address: SocketAddr,
    drain: Drain,
    health: Health,
    ended: JoinHandle<io::Result<()>>,
}

async fn serve_with(options: config::Server) -> Served {
    serve_routes(options, |routes| routes).await
}

async fn serve_routes(options: config::Server, around: impl FnOnce(Routes) -> Routes) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (health, routes) = health_and_reflection().await.unwrap();
    let routes = around(routes.add_service(Played));
    let drain = Drain::new(Duration::from_secs(options.drain_secs_max));
    let ended = tokio::spawn({
        let drain = drain.clone();
        async move { serve(listener, routes, &options, drain).await }
    });
    Served {
        address,
        drain,
        health,
        ended,
    }
}

impl Served {
    async fn connect(&self) -> Connected {
        let socket = TcpStream::connect(self.address).await.unwrap();
        let (calls, connection) = h2::client::handshake(socket).await.unwrap();
        Connected {
            calls,
            ended: tokio::spawn(connection),
        }
    }

    async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.connect().await.unwrap()
    }

    async fn end(self) {
        timeout(NEVER, self.ended).await.unwrap().unwrap().unwrap();
    }
}

/// A client that speaks HTTP/2 itself.
struct Connected {
    calls: SendRequest<Bytes>,
    ended: JoinHandle<Result<(), h2::Error>>,
}

impl Connected {
    async fn send(&mut self, request: http::request::Builder) -> Response<RecvStream> {
        let request = request.body(()).unwrap();
        timeout(NEVER, self.pending(request).await)
            .await
            .unwrap()
            .unwrap()
    }

    async fn pending(&mut self, request: Request<()>) -> h2::client::ResponseFuture {
        let mut calls = self.calls.clone().ready().await.unwrap();
        calls.send_request(request, true).unwrap().0
    }

    async fn call(&mut self, path: &str) -> Response<RecvStream> {
        self.send(grpc(path)).await
    }
}

fn grpc(path: &str) -> http::request::Builder {
    Request::builder()
        .method(Method::POST)
        .uri(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
}

/// The gRPC status in these headers: its code and reason.
fn status(headers: &HeaderMap) -> (Code, String) {
    let status = Status::from_header_map(headers).unwrap();
    let info = status.get_details_error_info();
    (status.code(), info.map_or(String::new(), |it| it.reason))
}

#[tokio::test]
async fn a_silent_connection_is_closed() {
    let served = serve_with(config::Server {
        preface_secs_max: 1,
        ..config::Server::default()
    })
    .await;
    let began = Instant::now();
    let mut socket = TcpStream::connect(served.address).await.unwrap();
    // All but the last byte of the preface is as good as nothing.
    socket
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r")
        .await
        .unwrap();
    let read = timeout(NEVER, socket.read_u8()).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn who_does_not_speak_http2_is_closed_at_once() {
    let served = serve_with(config::Server::default()).await;
    let mut socket = TcpStream::connect(served.address).await.unwrap();
    socket
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    // What it sent after its first words is unread, so the close may come as a reset.
    let read = timeout(NEVER, socket.read_u8()).await.unwrap();
    let kind = read.unwrap_err().kind();
    assert!(
        [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset].contains(&kind),
        "{kind}"
    );
}

#[tokio::test]
async fn a_drain_ends_with_an_idle_connection_open() {
    let served = serve_with(config::Server::default()).await;
    let mut client = served.connect().await;
    assert_eq!(status(client.call(UNARY).await.headers()).0, Code::Ok);
    served.drain.begin();
    let address = served.address;
    served.end().await;
    // It was told, not cut: a clean GOAWAY is no error.
    timeout(NEVER, client.ended)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let refused = TcpStream::connect(address).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn a_drain_does_not_wait_for_a_connection_that_said_nothing() {
    let served = serve_with(config::Server::default()).await;
    let _silent = TcpStream::connect(served.address).await.unwrap();
    // The loop accepts in order: once this one is served, the silent one is in.
    assert_eq!(
        served.connect().await.call(UNARY).await.status(),
        StatusCode::OK
    );
    served.drain.begin();
    served.end().await;
}

#[tokio::test]
async fn a_stream_that_does_not_end_is_cut_at_the_deadline() {
    let served = serve_with(config::Server {
        drain_secs_max: 1,
        ..config::Server::default()
    })
    .await;
    let mut client = served.connect().await;
    let mut body = client.call(STREAM_HANGS).await.into_body();
    let began = Instant::now();
    served.drain.begin();
    assert!(timeout(NEVER, body.data()).await.unwrap().unwrap().is_err());
    assert!(began.elapsed() >= Duration::from_secs(1));
    served.end().await;
}

#[tokio::test]
async fn stopping_cuts_at_once() {
    let served = serve_with(config::Server::default()).await;
    let mut client = served.connect().await;
    let mut body = client.call(STREAM_HANGS).await.into_body();
    served.drain.begin();
    served.drain.stop();
    assert!(timeout(NEVER, body.data()).await.unwrap().unwrap().is_err());
    served.end().await;
}

#[tokio::test]
async fn a_connection_over_the_limit_waits_for_a_seat() {
    let served = serve_with(config::Server {
        connections_max: 1,
        ..config::Server::default()
    })
    .await;
    let mut first = served.connect().await;
    assert_eq!(first.call(UNARY).await.status(), StatusCode::OK);

    let mut second = served.connect().await;
    let mut waiting = second.pending(grpc(UNARY).body(()).unwrap()).await;
    assert_eq!(first.call(UNARY).await.status(), StatusCode::OK);
    assert!((&mut waiting).now_or_never().is_none());

    first.ended.abort();
    let answer = timeout(NEVER, waiting).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
}

#[tokio::test]
async fn what_is_no_grpc_is_refused() {
    let served = serve_with(config::Server::default()).await;
    let mut client = served.connect().await;
    let with = |kind: &str| {
        let request = Request::builder().method(Method::POST);
        request
            .uri(format!("http://localhost{UNARY}"))
            .header("content-type", kind)
    };
    for kind in [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc;x=y",
    ] {
        assert_eq!(
            client.send(with(kind)).await.status(),
            StatusCode::OK,
            "{kind}"
        );
    }
    for kind in [
        "application/json",
        "application/grpc-web",
        "application/grpcs",
        "",
    ] {
        let refused = client.send(with(kind)).await;
        assert_eq!(
            refused.status(),
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "{kind}"
        );
        assert!(refused.headers().contains_key("x-request-id"));
    }
    let get = client.send(grpc(UNARY).method(Method::GET)).await;
    assert_eq!(get.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(get.headers()["allow"], "POST");
}

#[tokio::test]
async fn headers_that_are_too_large_are_refused() {
    let served = serve_with(config::Server::default()).await;
    let mut client = served.connect().await;
    let large = "x".repeat(20 << 10);
    let refused = client.send(grpc(UNARY).header("x-large", &large)).await;
    assert_eq!(
        refused.status(),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    );
    assert_eq!(client.call(UNARY).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_request_id_comes_back_and_is_made_where_there_is_none() {
    let served = serve_with(config::Server::default()).await;
    let mut client = served.connect().await;
    let given = grpc(UNARY).header("x-request-id", "abc-1");
    assert_eq!(client.send(given).await.headers()["x-request-id"], "abc-1");

    let mut made = Vec::new();
    for odd in [
        grpc(UNARY),
        grpc(UNARY),
        grpc(UNARY).header("x-request-id", "a b"),
    ] {
        let answer = client.send(odd).await;
        let id = answer.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .to_owned();
        assert_eq!(id.len(), 32, "{id}");
        assert!(!made.contains(&id));
        made.push(id);
    }
    let long = grpc(UNARY).header("x-request-id", "x".repeat(129));
    assert_eq!(client.send(long).await.headers()["x-request-id"].len(), 32);
}

#[tokio::test]
async fn unary_calls_have_a_limit_of_time_and_streams_have_none() {
    let served = serve_with(config::Server {
        unary_secs_max: 1,
        ..config::Server::default()
    })
    .await;
    let mut client = served.connect().await;
    let mut body = client.call(STREAM_HANGS).await.into_body();
    let began = Instant::now();
    let late = client.call(UNARY_HANGS).await;
    assert_eq!(
        status(late.headers()),
        (Code::DeadlineExceeded, "UNARY_TIME_LIMIT".into())
    );
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert!(body.data().now_or_never().is_none());
}

#[tokio::test]
async fn a_unary_call_too_many_is_refused_and_may_come_again() {
    let served = serve_with(config::Server {
        unary_calls_max: 1,
        ..config::Server::default()
    })
    .await;
    let mut client = served.connect().await;
    let hanging = client.pending(grpc(UNARY_HANGS).body(()).unwrap()).await;
    let refused = client.call(UNARY).await;
    assert_eq!(
        status(refused.headers()),
        (Code::ResourceExhausted, "SERVER_BUSY".into())
    );
    let retry = Status::from_header_map(refused.headers()).unwrap();
    let delay = retry.get_details_retry_info().unwrap().retry_delay;
    assert_eq!(delay, Some(Duration::from_secs(1)));

    // Neither streams nor health wait for unary calls.
    assert!(
        !client
            .call(STREAM_HANGS)
            .await
            .headers()
            .contains_key("grpc-status")
    );
    let mut health = HealthClient::new(served.channel().await);
    health.check(HealthCheckRequest::default()).await.unwrap();

    // The place is free again once the call is cancelled.
    drop(hanging);
    let freed = async { while status(client.call(UNARY).await.headers()).0 != Code::Ok {} };
    timeout(NEVER, freed).await.unwrap();
}

#[tokio::test]
async fn a_panic_is_an_internal_error_of_its_call_alone() {
    let served = serve_with(config::Server::default()).await;
    let mut client = served.connect().await;
    let failed = (Code::Internal, "HANDLER_FAILED".into());
    assert_eq!(status(client.call(UNARY_PANICS).await.headers()), failed);

    let mut body = client.call(STREAM_PANICS).await.into_body();
    assert!(body.data().await.is_none());
    assert_eq!(status(&body.trailers().await.unwrap().unwrap()), failed);
    assert_eq!(status(client.call(UNARY).await.headers()).0, Code::Ok);
}

#[tokio::test]
async fn a_client_is_told_how_many_calls_it_may_open() {
    let served = serve_with(config::Server {
        streams_per_connection_max: 7,
        ..config::Server::default()
    })
    .await;
    let mut client = served.connect().await;
    client.call(UNARY).await;
    assert_eq!(client.calls.current_max_send_streams(), 7);
}

#[tokio::test]
async fn a_watch_of_health_sees_the_drain_and_does_not_hold_it_up() {
    let served = serve_with(config::Server::default()).await;
    let mut health = HealthClient::new(served.channel().await);
    for service in [
        "",
        "hotloop.v1.ResponsesService",
        "hotloop.v1.ModelsService",
    ] {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), Seen::Serving, "{service}");
    }
    let watch = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut watch = watch.into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        Seen::Serving
    );

    served.health.stop_serving().await;
    served.drain.begin();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        Seen::NotServing
    );
    let end = watch.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    assert_eq!(end.get_details_error_info().unwrap().reason, "DRAINING");
    served.end().await;
}

#[tokio::test]
async fn reflection_lists_our_services_and_knows_the_details_of_errors() {
    let served = serve_with(config::Server::default()).await;
    let mut reflection = ServerReflectionClient::new(served.channel().await);
    let ask = |request| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(request),
    };
    let asked = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol(
            "google.rpc.ErrorInfo".into(),
        )),
    ];
    let answers = reflection
        .server_reflection_info(futures::stream::iter(asked))
        .await;
    let mut answers = answers.unwrap().into_inner();

    let listed = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = listed else {
        panic!("{listed:?}")
    };
    let mut names: Vec<_> = list.service.into_iter().map(|it| it.name).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "hotloop.v1.ModelsService",
            "hotloop.v1.ResponsesService",
        ]
    );
    let found = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::FileDescriptorResponse(file)) = found else {
        panic!("{found:?}")
    };
    assert!(!file.file_descriptor_proto.is_empty());
}

#[tokio::test]
async fn without_a_key_only_health_answers() {
    let keys = Keys::parse("acme:0123456789abcdef").unwrap();
    let gate = Gate::new(Mode::Required, "127.0.0.1:1".parse().unwrap(), keys).unwrap();
    let served = serve_routes(config::Server::default(), |routes| behind(&gate, routes)).await;
    let mut client = served.connect().await;
    let missing = (Code::Unauthenticated, "API_KEY_MISSING".into());
    let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    for path in [UNARY, STREAM_HANGS, reflection, "/no.Such/Call"] {
        assert_eq!(status(client.call(path).await.headers()), missing, "{path}");
    }
    let with_key = |path| grpc(path).header("authorization", "Bearer 0123456789abcdef");
    let answer = client.send(with_key(UNARY)).await;
    assert_eq!(status(answer.headers()).0, Code::Ok);
    let answer = client.send(with_key("/no.Such/Call")).await;
    assert_eq!(status(answer.headers()).0, Code::Unimplemented);

    let mut health = HealthClient::new(served.channel().await);
    health.check(HealthCheckRequest::default()).await.unwrap();
}

#[tokio::test]
async fn the_first_signal_drains_and_the_second_stops() {
    let signals = Signals::new().unwrap();
    let served = serve_with(config::Server::default()).await;
    let mut client = served.connect().await;
    let mut body = client.call(STREAM_HANGS).await.into_body();
    let mut health = HealthClient::new(served.channel().await);
    let watch = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut watch = watch.into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        Seen::Serving
    );
    tokio::spawn(signals.drain(served.health.clone(), served.drain.clone()));

    send_signal("TERM");
    timeout(NEVER, served.drain.draining()).await.unwrap();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        Seen::NotServing
    );
    assert!(body.data().now_or_never().is_none());

    send_signal("INT");
    timeout(NEVER, served.drain.stopped()).await.unwrap();
    assert!(timeout(NEVER, body.data()).await.unwrap().unwrap().is_err());
    served.end().await;
}

/// Sends a signal to the tests themselves.
fn send_signal(name: &str) {
    let kill = format!("kill -{name} {}", std::process::id());
    let killed = std::process::Command::new("sh")
        .args(["-c", &kill])
        .status();
    assert!(killed.unwrap().success());
}

#[tokio::test]
async fn an_address_that_is_taken_is_an_error() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = Config::default();
    config.server.listen = taken.local_addr().unwrap();
    let again = || Ok(Config::default());
    let error = run(config, again).await.unwrap_err();
    assert!(matches!(error, ServeError::Bind { .. }), "{error}");
}

#[test]
fn the_welcome_says_where_and_how() {
    let local: SocketAddr = "127.0.0.1:50051".parse().unwrap();
    let mut model = Config::default().models.pop().unwrap();
    model.name = "mine".into();
    model.default = true;
    assert_eq!(
        welcome(&[model], local, false),
        "\nhotloop serves gRPC on 127.0.0.1:50051\n\n  models\n    mine: sim (default)\n\n  \
         try\n    hotloop agent \"What is in this folder?\"\n    grpcurl -plaintext -d '{\"create\":{\"input\":[{\"user_text\":\"hello\"}]}}' \
         127.0.0.1:50051 hotloop.v1.ResponsesService/Connect\n\n"
    );
    let public = welcome(&[], "0.0.0.0:1".parse().unwrap(), true);
    assert!(public.contains("-H \"authorization: Bearer $HOTLOOP_API_KEY\" "));
    assert!(public.contains(" localhost:1 "));
    assert!(public.contains("agent --server http://localhost:1 "));
}

#[test]
fn the_limit_of_open_files_is_read_as_linux_writes_it() {
    let limits = |soft: &str| {
        format!(
            "Limit                     Soft Limit           Hard Limit           Units\n\
             Max processes             127189               127189               processes\n\
             Max open files            {soft:<20} 524288               files\n"
        )
    };
    assert_eq!(open_files_max(&limits("1024")), Some(1024));
    assert_eq!(open_files_max(&limits("unlimited")), None);
    assert_eq!(open_files_max(""), None);
}
