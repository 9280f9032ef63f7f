//! One stream to a server: opening it, sending on it, reading from it.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::{AgentError, ApiKey, DEFAULT_SERVER};
use crate::proto::{
    ConnectRequest, ConnectResponse, ListModelsRequest, Model, connect_request::Command,
    models_service_client::ModelsServiceClient, responses_service_client::ResponsesServiceClient,
};

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// From the call to its headers. A server that takes longer is as good as gone.
const HEADERS_TIME_MAX: Duration = Duration::from_secs(10);
const CLOSE_TIME_MAX: Duration = Duration::from_millis(500);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIME_MAX: Duration = Duration::from_secs(10);
/// Windows that let a large output through in one go. The connection's must never be the adaptive
/// one: with it, a stalled reader of many small deltas can lose the whole connection.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// The server's own limit of one message.
const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// Commands that wait for the network. More than the calls of any sane sample.
const COMMANDS_WAITING_MAX: usize = 128;

/// Where streams are opened.
pub(super) struct Door {
    endpoint: Endpoint,
    server: String,
    /// Whether somebody named the server, and so expects one there.
    named: bool,
    authorization: Option<MetadataValue<Ascii>>,
}

impl Door {
    /// Checks the address and the key; connects to nothing yet.
    pub(super) fn new(server: Option<&str>, key: Option<&ApiKey>) -> Result<Self, AgentError> {
        let address = server.unwrap_or(DEFAULT_SERVER);
        let endpoint = Endpoint::from_shared(address.to_owned())
            .map_err(|_| AgentError::Server("it cannot be parsed"))?;
        match endpoint.uri().scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(AgentError::Server(
                    "TLS is not built in; go through a local proxy that ends it",
                ));
            }
            Some(_) | None => return Err(AgentError::Server("it should begin with http://")),
        }
        let authorization = match key {
            Some(ApiKey(key)) => {
                let mut value = MetadataValue::try_from(format!("Bearer {key}"))
                    .map_err(|_| AgentError::ApiKey)?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        Ok(Self {
            endpoint: endpoint
                .connect_timeout(CONNECT_TIME_MAX)
                .tcp_nodelay(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIME_MAX)
                .keep_alive_while_idle(true),
            server: address.to_owned(),
            named: server.is_some(),
            authorization,
        })
    }

    /// What to tell a person when the very first connection fails.
    pub(super) fn unreachable(&self, cause: &Status) -> AgentError {
        if self.named {
            AgentError::Unreachable {
                server: self.server.clone(),
                cause: cause.message().to_owned(),
            }
        } else {
            AgentError::NoServer
        }
    }

    /// A new connection: the server answers at the address, or it does not.
    pub(super) async fn connect(&self) -> Result<Channel, Status> {
        self.endpoint.connect().await.map_err(|error| {
            // The outer text only says that it is a transport error; the reason is the innermost.
            let mut cause: &dyn std::error::Error = &error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            Status::unavailable(cause.to_string())
        })
    }

    /// What the server says of the model of this name, or of its default. `None` where it says
    /// nothing: the stream will tell what is wrong.
    pub(super) async fn model(&self, channel: Channel, name: Option<&str>) -> Option<Model> {
        let mut request = Request::new(ListModelsRequest {});
        self.authorize(&mut request);
        let mut client = ModelsServiceClient::new(channel);
        let answer = tokio::time::timeout(HEADERS_TIME_MAX, client.list_models(request)).await;
        let models = answer.ok()?.ok()?.into_inner().models;
        models.into_iter().find(|model| match name {
            Some(name) => model.name == name,
            None => model.is_default,
        })
    }

    fn authorize<T>(&self, request: &mut Request<T>) {
        if let Some(authorization) = &self.authorization {
            let value = authorization.clone();
            request.metadata_mut().insert("authorization", value);
        }
    }

    /// A new stream on `channel`. The call itself is made by [`Link::next`], while commands are
    /// already sent: no server can make us wait for headers that it only sends once it has read
    /// something.
    pub(super) fn stream(&self, channel: Channel) -> Link {
        let (commands, outgoing) = mpsc::channel(COMMANDS_WAITING_MAX);
        let mut request = Request::new(ReceiverStream::new(outgoing));
        self.authorize(&mut request);
        let mut client = ResponsesServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let opening = async move {
            let answer = tokio::time::timeout(HEADERS_TIME_MAX, client.connect(request))
                .await
                .map_err(|_| Status::unavailable("the server sends no headers"))??;
            Ok(answer.into_inner())
        };
        Link {
            commands,
            events: Events::Opening(Box::pin(opening)),
        }
    }
}

/// An open stream.
pub(super) struct Link {
    commands: mpsc::Sender<ConnectRequest>,
    events: Events,
}

/// What comes from the server.
enum Events {
    /// The call is made, and its headers have not come.
    Opening(BoxFuture<'static, Result<Streaming<ConnectResponse>, Status>>),
    /// Messages come.
    Open(Box<Streaming<ConnectResponse>>),
}

impl Link {
    /// Sends a command. A stream that is gone is not told here: [`Link::next`] tells how it ended.
    pub(super) async fn send(&self, request_id: String, command: Command) {
        let request = ConnectRequest {
            lane: String::new(),
            request_id,
            command: Some(command),
        };
        // The receiver lives as long as the call, whose end `next` reports with its status.
        let _ = self.commands.send(request).await;
    }

    /// The next message, or how the stream ended: with a status, or `None` for a clean end.
    /// May be dropped at any time without losing a message.
    pub(super) async fn next(&mut self) -> Result<ConnectResponse, Option<Status>> {
        if let Events::Opening(opening) = &mut self.events {
            self.events = Events::Open(Box::new(opening.await.map_err(Some)?));
        }
        match &mut self.events {
            Events::Open(events) => events.message().await.map_err(Some)?.ok_or(None),
            Events::Opening(_) => Err(None),
        }
    }

    /// Ends the stream in good order: half-close, then the server's OK, which is not awaited long.
    pub(super) async fn close(self) {
        let Self { commands, events } = self;
        drop(commands);
        let Events::Open(mut events) = events else {
            return;
        };
        let rest = async { while let Ok(Some(_)) = events.message().await {} };
        // Whether the server was quick enough changes nothing for a rollout that is over.
        let _ = tokio::time::timeout(CLOSE_TIME_MAX, rest).await;
    }
}
