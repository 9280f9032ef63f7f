//! The connections to one engine.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, ClientTlsConfig, Endpoint},
};

use super::{GpuError, GpuOptions};

/// Windows for answers of many samples at once: of one sample, and of the connection.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// How often a silent connection is asked whether it still lives, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections to one engine, made when they are needed and again when they break.
pub(super) struct Link {
    channels: Vec<Channel>,
    next: AtomicUsize,
    authorization: Option<MetadataValue<Ascii>>,
}

impl Link {
    /// Connections as the options say. To be called in a runtime.
    pub(super) fn new(options: &GpuOptions, key: Option<&str>) -> Result<Self, GpuError> {
        let url = || GpuError::Url {
            url: options.url.clone(),
        };
        let endpoint = Endpoint::from_shared(options.url.clone()).map_err(|_| url())?;
        let mut endpoint = endpoint
            .connect_timeout(Duration::from_millis(options.connect_ms_max))
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        if endpoint.uri().scheme_str() == Some("https") {
            let tls = ClientTlsConfig::new().with_native_roots();
            endpoint = endpoint.tls_config(tls).map_err(|_| url())?;
        }
        let authorization = key.map(|key| {
            let mut value: MetadataValue<Ascii> =
                format!("Bearer {key}").parse().map_err(|_| GpuError::Key {
                    variable: options.key_variable.clone(),
                })?;
            value.set_sensitive(true);
            Ok(value)
        });
        Ok(Self {
            channels: (0..options.connections)
                .map(|_| endpoint.connect_lazy())
                .collect(),
            next: AtomicUsize::new(0),
            authorization: authorization.transpose()?,
        })
    }

    /// One of the connections, each in its turn.
    pub(super) fn channel(&self) -> Channel {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.channels[turn % self.channels.len()].clone()
    }

    /// A request with this message.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(value) = &self.authorization {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", value.clone());
        }
        request
    }
}
