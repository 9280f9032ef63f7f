//! A broker of Kafka that a test plays, over Kafka's protocol, with threads of its own: an exporter blocks.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use bytes::{Bytes, BytesMut};
use kafka_protocol::{
    error::ResponseError,
    messages::{
        ApiKey, ApiVersionsResponse, BrokerId, MetadataResponse, ProduceRequest, ProduceResponse,
        ResponseHeader, SaslAuthenticateRequest, SaslAuthenticateResponse, SaslHandshakeResponse,
        TopicName,
        api_versions_response::ApiVersion,
        metadata_response::{
            MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
        },
        produce_response::{PartitionProduceResponse, TopicProduceResponse},
    },
    protocol::{Decodable as _, Encodable, StrBytes, decode_request_header_from_buffer},
    records::RecordBatchDecoder,
};

/// What the broker does with messages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mood {
    Takes,
    /// Answers with this error for the first partition, and takes what is for the others.
    Refuses(ResponseError),
    /// Takes them, and ends the connection in place of an answer.
    Vanishes,
    /// Takes them and never answers.
    Hangs,
}

/// A message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) partition: i32,
    pub(crate) key: String,
    pub(crate) value: serde_json::Value,
    pub(crate) headers: Vec<(String, String)>,
}

struct State {
    mood: Mood,
    /// With how many partitions.
    topic: Option<(String, i32)>,
    /// The user and the password to ask for.
    login: Option<(String, String)>,
    /// The messages of each request, and the acknowledgements that it asked for.
    requests: Vec<(i16, Vec<Message>)>,
    /// All connections that there were.
    connections: Vec<TcpStream>,
}

pub(crate) struct Broker {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Broker {
    /// With the topic `usage` of three partitions.
    pub(crate) fn start() -> Self {
        Self::on("127.0.0.1:0".parse().unwrap())
    }

    pub(crate) fn on(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State {
            mood: Mood::Takes,
            topic: Some(("usage".to_owned(), 3)),
            login: None,
            requests: Vec::new(),
            connections: Vec::new(),
        }));
        let shared = state.clone();
        thread::spawn(move || {
            for socket in listener.incoming() {
                let state = shared.clone();
                let socket = socket.unwrap();
                let known = socket.try_clone().unwrap();
                state.lock().unwrap().connections.push(known);
                thread::spawn(move || {
                    // A connection that breaks is the client's to notice.
                    let _ = serve(&socket, address, &state);
                    let _ = socket.shutdown(Shutdown::Both);
                });
            }
        });
        Self { address, state }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn mood(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }

    pub(crate) fn topic(&self, topic: Option<(&str, i32)>) {
        self.state.lock().unwrap().topic = topic.map(|(name, count)| (name.to_owned(), count));
    }

    pub(crate) fn asks_for(&self, user: &str, password: &str) {
        self.state.lock().unwrap().login = Some((user.to_owned(), password.to_owned()));
    }

    /// The messages of each request that there was since this was last asked, and the acknowledgements it asked for.
    pub(crate) fn requests(&self) -> Vec<(i16, Vec<Message>)> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// Ends all connections.
    pub(crate) fn close(&self) {
        for connection in self.state.lock().unwrap().connections.drain(..) {
            // It may have ended.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

/// Answers what comes over a connection.
fn serve(mut socket: &TcpStream, address: SocketAddr, state: &Mutex<State>) -> io::Result<()> {
    let mut known = state.lock().unwrap().login.is_none();
    loop {
        let mut length = [0; 4];
        socket.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        socket.read_exact(&mut frame)?;
        let mut frame = Bytes::from(frame);
        let header = decode_request_header_from_buffer(&mut frame).unwrap();
        let key = ApiKey::try_from(header.request_api_key).unwrap();
        let version = header.request_api_version;
        let mut answer = BytesMut::new();
        ResponseHeader::default()
            .with_correlation_id(header.correlation_id)
            .encode(&mut answer, key.response_header_version(version))
            .unwrap();
        let mut put = |body: BytesMut| answer.extend_from_slice(&body);
        match key {
            ApiKey::ApiVersions => put(encoded(&versions(), version)),
            ApiKey::SaslHandshake => put(encoded(&mechanisms(), version)),
            ApiKey::SaslAuthenticate => {
                let request = SaslAuthenticateRequest::decode(&mut frame, version).unwrap();
                let verdict = authenticated(&request, &state.lock().unwrap());
                known = verdict.error_code == 0;
                put(encoded(&verdict, version));
            }
            // A real one ends the connection, too.
            _ if !known => return Ok(()),
            ApiKey::Metadata => {
                put(encoded(&metadata(address, &state.lock().unwrap()), version));
            }
            ApiKey::Produce => {
                let request = ProduceRequest::decode(&mut frame, version).unwrap();
                match take(&request, &mut state.lock().unwrap()) {
                    Some(response) => put(encoded(&response, version)),
                    None => return Ok(()),
                }
            }
            other => panic!("nobody asked for {other:?}"),
        }
        if matches!(state.lock().unwrap().mood, Mood::Hangs) && key == ApiKey::Produce {
            continue;
        }
        socket.write_all(&(answer.len() as u32).to_be_bytes())?;
        socket.write_all(&answer)?;
    }
}

fn encoded(body: &impl Encodable, version: i16) -> BytesMut {
    let mut bytes = BytesMut::new();
    body.encode(&mut bytes, version).unwrap();
    bytes
}

fn versions() -> ApiVersionsResponse {
    let ranges = [
        (ApiKey::Produce, 3, 7),
        (ApiKey::Metadata, 1, 4),
        (ApiKey::ApiVersions, 0, 3),
        (ApiKey::SaslHandshake, 1, 1),
        (ApiKey::SaslAuthenticate, 0, 1),
    ];
    let ranges = ranges.map(|(key, least, most)| {
        ApiVersion::default()
            .with_api_key(key as i16)
            .with_min_version(least)
            .with_max_version(most)
    });
    ApiVersionsResponse::default().with_api_keys(ranges.into())
}

fn mechanisms() -> SaslHandshakeResponse {
    SaslHandshakeResponse::default().with_mechanisms(vec!["PLAIN".into()])
}

fn authenticated(request: &SaslAuthenticateRequest, state: &State) -> SaslAuthenticateResponse {
    let (user, password) = state.login.as_ref().unwrap();
    let right = request.auth_bytes == format!("\0{user}\0{password}");
    let code = match right {
        true => 0,
        false => ResponseError::SaslAuthenticationFailed.code(),
    };
    SaslAuthenticateResponse::default().with_error_code(code)
}

/// All topics, whatever was asked for: there is one at most.
fn metadata(address: SocketAddr, state: &State) -> MetadataResponse {
    let broker = MetadataResponseBroker::default()
        .with_node_id(BrokerId(1))
        .with_host(StrBytes::from_string(address.ip().to_string()))
        .with_port(address.port().into());
    let topics = state.topic.iter().map(|(name, count)| {
        let partition = |index| {
            MetadataResponsePartition::default()
                .with_partition_index(index)
                .with_leader_id(BrokerId(1))
        };
        MetadataResponseTopic::default()
            .with_name(Some(TopicName(StrBytes::from_string(name.clone()))))
            .with_partitions((0..*count).map(partition).collect())
    });
    MetadataResponse::default()
        .with_brokers(vec![broker])
        .with_controller_id(BrokerId(1))
        .with_topics(topics.collect())
}

/// Takes messages; `None`: the connection ends.
fn take(request: &ProduceRequest, state: &mut State) -> Option<ProduceResponse> {
    let mut messages = Vec::new();
    let mut topics = Vec::new();
    let code = match state.mood {
        Mood::Refuses(error) => error.code(),
        Mood::Takes | Mood::Vanishes | Mood::Hangs => 0,
    };
    for topic in &request.topic_data {
        let mut partitions = Vec::new();
        for data in &topic.partition_data {
            let mut records = data.records.clone().unwrap();
            let set = RecordBatchDecoder::decode(&mut records).unwrap();
            messages.extend(set.records.into_iter().map(|record| {
                Message {
                    partition: data.index,
                    key: text(&record.key.unwrap()),
                    value: serde_json::from_slice(&record.value.unwrap()).unwrap(),
                    headers: record
                        .headers
                        .iter()
                        .map(|(name, value)| (name.to_string(), text(value.as_ref().unwrap())))
                        .collect(),
                }
            }));
            let response = PartitionProduceResponse::default().with_index(data.index);
            partitions.push(match data.index {
                0 => response.with_error_code(code),
                _ => response,
            });
        }
        let response = TopicProduceResponse::default().with_name(topic.name.clone());
        topics.push(response.with_partition_responses(partitions));
    }
    state.requests.push((request.acks, messages));
    match state.mood {
        Mood::Vanishes => None,
        Mood::Takes | Mood::Refuses(_) | Mood::Hangs => {
            Some(ProduceResponse::default().with_responses(topics))
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
