//! The controls of all others: bare streams of tonic, of which one sends back the bytes it gets, and one sends
//! messages at a pace.

use std::{
    convert::Infallible,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::BoxStream};
use http::{Request, Response};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{NamedService, StreamingService},
    transport::{Channel, Server, server::TcpIncoming},
};
use tower::Service;

use super::{client::connect, serve::paced};

const ECHO: &str = "/bench.Bare/Echo";
/// Sends as many messages as the request says, of the size and at the pace that it says.
const FLOOD: &str = "/bench.Bare/Flood";

/// Messages as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Both of them.
#[derive(Clone)]
struct Bare;

impl NamedService for Bare {
    const NAME: &'static str = "bench.Bare";
}

struct Echo;

struct Flood;

impl StreamingService<Bytes> for Flood {
    type Response = Bytes;
    type ResponseStream = BoxStream<'static, Result<Bytes, Status>>;
    type Future = BoxFuture<'static, Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Bytes>>) -> Self::Future {
        async {
            let mut asked = request.into_inner().message().await?.unwrap_or_default();
            let (count, size) = (asked.get_u32() as usize, asked.get_u32() as usize);
            let message = Bytes::from(vec![b'x'; size]);
            let due = paced(count, asked.get_f64()).flat_map(move |tokens| {
                futures::stream::iter(std::iter::repeat_n(Ok(message.clone()), tokens))
            });
            Ok(tonic::Response::new(due.boxed()))
        }
        .boxed()
    }
}

impl StreamingService<Bytes> for Echo {
    type Response = Bytes;
    type ResponseStream = Streaming<Bytes>;
    type Future = BoxFuture<'static, Result<tonic::Response<Streaming<Bytes>>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Bytes>>) -> Self::Future {
        async { Ok(tonic::Response::new(request.into_inner())) }.boxed()
    }
}

impl Service<Request<Body>> for Bare {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut grpc = tonic::server::Grpc::new(Raw).max_decoding_message_size(64 << 20);
        async move {
            Ok(match request.uri().path() {
                ECHO => grpc.streaming(Echo, request).await,
                _ => grpc.streaming(Flood, request).await,
            })
        }
        .boxed()
    }
}

pub async fn serve(listener: TcpListener) {
    // The builder's own setting counts only where it binds the address itself.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(64 << 20)
        .add_service(Bare)
        .serve_with_incoming(incoming)
        .await
        .unwrap();
}

/// An open stream to it.
pub struct EchoStream {
    out: mpsc::Sender<Bytes>,
    events: Streaming<Bytes>,
}

impl EchoStream {
    pub async fn open(url: &str) -> Self {
        Self::over(connect(url).await).await
    }

    pub async fn over(channel: Channel) -> Self {
        let (out, outgoing) = mpsc::channel(64);
        Self {
            out,
            events: call(channel, ECHO, outgoing).await,
        }
    }

    /// How long the bytes take there and back.
    pub async fn round(&mut self, bytes: Bytes) -> Duration {
        let start = std::time::Instant::now();
        self.out.send(bytes).await.unwrap();
        self.events.message().await.unwrap().unwrap();
        start.elapsed()
    }
}

/// Messages of this size, so many a second; 0: as fast as they are taken.
pub async fn flood(channel: Channel, count: usize, size: usize, pace: f64) -> Streaming<Bytes> {
    let (out, outgoing) = mpsc::channel(1);
    let mut asked = BytesMut::new();
    asked.put_u32(u32::try_from(count).unwrap());
    asked.put_u32(u32::try_from(size).unwrap());
    asked.put_f64(pace);
    out.send(asked.freeze()).await.unwrap();
    call(channel, FLOOD, outgoing).await
}

async fn call(channel: Channel, path: &str, outgoing: mpsc::Receiver<Bytes>) -> Streaming<Bytes> {
    let mut client = tonic::client::Grpc::new(channel).max_decoding_message_size(64 << 20);
    client.ready().await.unwrap();
    let request = tonic::Request::new(ReceiverStream::new(outgoing));
    let answer = client.streaming(request, path.parse().unwrap(), Raw).await;
    answer.unwrap().into_inner()
}
