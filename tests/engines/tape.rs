//! What went between hotloop and a real engine, kept and played again.
//!
//! Calls are kept as they are on the wire, so that what is played is what the engine sent, to the byte. A call is found
//! again by its path and its message, the names of the sample and of the conversation aside, which differ from run to run.

use std::{
    convert::Infallible,
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use hotloop::backend::gpu::proto::engine;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Request, Response,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// The engine is gone: so is the connection to the proxy.
type Broken = Box<dyn std::error::Error + Send + Sync>;

/// One call.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Exchange {
    path: String,
    /// The request's message, without names, in hexadecimal digits.
    request: String,
    /// The messages of the answer, framed, as far as they were read.
    answer: Vec<String>,
    /// The status in the trailers. `None`: it was not waited for.
    status: Option<(String, String)>,
}

/// Calls, in the order in which they began.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tape(Arc<Mutex<Vec<Exchange>>>);

impl Tape {
    pub(crate) fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        Self(Arc::new(Mutex::new(serde_json::from_str(&text).unwrap())))
    }

    pub(crate) fn write(&self, path: &Path) {
        let mut text = String::from("[\n");
        let exchanges = self.0.lock().unwrap();
        // One call a line, and of those that were made again and again with one answer only the first.
        let mut lines: Vec<String> = Vec::new();
        for exchange in exchanges.iter() {
            let line = serde_json::to_string(exchange).unwrap();
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
        text += &lines.join(",\n");
        text += "\n]\n";
        fs::write(path, text).unwrap();
    }

    /// Whether a sample was asked for.
    pub(crate) fn has_samples(&self) -> bool {
        let exchanges = self.0.lock().unwrap();
        exchanges.iter().any(|it| it.path.contains("/Generate"))
    }

    /// A proxy in front of an engine that keeps what passes on this tape.
    pub(crate) async fn record(&self, engine: SocketAddr) -> SocketAddr {
        let tape = self.clone();
        serve(move |request| {
            let tape = tape.clone();
            async move { tape.pass_on(engine, request).await }
        })
        .await
    }

    /// A server that answers as this tape has it.
    pub(crate) async fn play(&self) -> SocketAddr {
        let tape = self.clone();
        serve(move |request| {
            let tape = tape.clone();
            async move { Ok(tape.answer(request).await) }
        })
        .await
    }

    async fn pass_on(
        self,
        engine: SocketAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Broken> {
        let path = request.uri().path().to_owned();
        let (parts, body) = request.into_parts();
        let message = body.collect().await?.to_bytes();
        let index = {
            let mut exchanges = self.0.lock().unwrap();
            exchanges.push(Exchange {
                request: nameless(&path, &message),
                path,
                answer: Vec::new(),
                status: None,
            });
            exchanges.len() - 1
        };
        let socket = TokioIo::new(TcpStream::connect(engine).await?);
        let (mut client, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), socket).await?;
        tokio::spawn(connection);
        let body = http_body_util::Full::new(message);
        let answer = client.send_request(Request::from_parts(parts, body)).await;
        let (parts, body) = answer?.into_parts();
        if let Some(status) = status(&parts.headers) {
            self.0.lock().unwrap()[index].status = Some(status);
        }
        let frames = body.into_data_stream_with_trailers();
        let tape = self.clone();
        let kept = frames.map(move |frame| {
            let mut exchanges = tape.0.lock().unwrap();
            if let Some(data) = frame.data_ref() {
                exchanges[index].answer.push(hex(data));
            }
            if let Some(trailers) = frame.trailers_ref() {
                exchanges[index].status = status(trailers);
            }
            Ok::<_, Infallible>(frame)
        });
        let body = BodyExt::boxed_unsync(StreamBody::new(kept));
        Ok(Response::from_parts(parts, body))
    }

    async fn answer(self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let message = request.into_body().collect().await.unwrap().to_bytes();
        let wanted = nameless(&path, &message);
        let exchange = {
            let mut exchanges = self.0.lock().unwrap();
            let same = |it: &Exchange| it.path == path && it.request == wanted;
            let alike = exchanges.iter().filter(|it| same(it)).count();
            let found = exchanges.iter().position(same);
            // Each is played once; the last of several alike is played from then on.
            match (found, alike) {
                (None, _) => None,
                (Some(index), 1) => Some(exchanges[index].clone()),
                (Some(index), _) => Some(exchanges.remove(index)),
            }
        };
        let headers = Response::builder().header("content-type", "application/grpc");
        let Some(exchange) = exchange else {
            let unknown = match path.ends_with("/Abort") {
                // Whoever is slower or faster than on the tape may stop something else.
                true => (
                    vec![Frame::data(Bytes::from_static(&[0; 5]))],
                    ("0", String::new()),
                ),
                false => (
                    Vec::new(),
                    ("12", format!("the tape has no such call: {path}")),
                ),
            };
            let (mut frames, (code, text)) = unknown;
            frames.push(Frame::trailers(trailers(code, &text)));
            let frames = stream::iter(frames.into_iter().map(Ok));
            return headers
                .body(BodyExt::boxed_unsync(StreamBody::new(frames)))
                .unwrap();
        };
        let mut frames: Vec<Frame<Bytes>> = exchange
            .answer
            .iter()
            .map(|message| Frame::data(unhex(message).into()))
            .collect();
        let ended = exchange.status.is_some();
        if let Some((code, text)) = &exchange.status {
            frames.push(Frame::trailers(trailers(code, text)));
        }
        let frames = stream::iter(frames.into_iter().map(Ok));
        let frames = match ended {
            true => frames.boxed(),
            false => frames.chain(stream::pending()).boxed(),
        };
        headers
            .body(BodyExt::boxed_unsync(StreamBody::new(frames)))
            .unwrap()
    }
}

async fn serve<F, A>(answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Result<Response<Body>, Broken>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let answer = answer.clone();
            let service = service_fn(answer);
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(socket), service));
        }
    });
    address
}

/// Frames of a body until it ends or breaks.
trait Frames {
    fn into_data_stream_with_trailers(self) -> futures::stream::BoxStream<'static, Frame<Bytes>>;
}

impl Frames for Incoming {
    fn into_data_stream_with_trailers(self) -> futures::stream::BoxStream<'static, Frame<Bytes>> {
        stream::unfold(self, |mut body| async move {
            let frame = body.frame().await?.ok()?;
            Some((frame, body))
        })
        .boxed()
    }
}

fn status(headers: &HeaderMap) -> Option<(String, String)> {
    let text = |name: &str| {
        let value = headers.get(name)?;
        Some(value.to_str().unwrap_or_default().to_owned())
    };
    Some((
        text("grpc-status")?,
        text("grpc-message").unwrap_or_default(),
    ))
}

fn trailers(code: &str, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.parse().unwrap());
    if !message.is_empty() {
        trailers.insert("grpc-message", message.parse().unwrap());
    }
    trailers
}

/// A request's message without what differs from run to run: names, and the order of a map.
fn nameless(path: &str, framed: &[u8]) -> String {
    let message = framed.get(5..).unwrap_or_default();
    let mut biases: Vec<String> = Vec::new();
    let message = if path.ends_with("/GenerateStream") {
        let mut request = vllm_proto::GenerateRequest::decode(message).unwrap();
        request.request_id.clear();
        request.session_id = None;
        request.kv = None;
        let bias = std::mem::take(&mut request.decoding.as_mut().unwrap().logit_bias);
        biases.extend(bias.iter().map(|(id, value)| format!(" {id}:{value}")));
        request.encode_to_vec()
    } else if path.ends_with("/Generate") {
        let mut request = engine::GenerateRequest::decode(message).unwrap();
        request.request_id.clear();
        let bias = std::mem::take(&mut request.sampling_params.as_mut().unwrap().logit_bias);
        biases.extend(bias.iter().map(|(id, value)| format!(" {id}:{value}")));
        request.encode_to_vec()
    } else if path.ends_with("/Abort") {
        Vec::new()
    } else {
        message.to_vec()
    };
    biases.sort_unstable();
    hex(&message) + &biases.concat()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = (0..text.len()).step_by(2);
    digits
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}
