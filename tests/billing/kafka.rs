//! Records reach Kafka, whatever its brokers do: a broker that the test plays, and a real one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command},
    time::{Duration, Instant},
};

use hotloop::billing::{Counts, Exporter as _, Kafka, KafkaOptions, Login, Record, Sasl};
use kafka_protocol::error::ResponseError;

use super::{
    broker::{Broker, Message, Mood},
    program::{NEVER, Place, create, until},
};

fn options(address: SocketAddr) -> KafkaOptions {
    KafkaOptions {
        brokers: vec![address.to_string()],
        topic: "usage".to_owned(),
        tls: false,
        login: None,
        batch_time_max: NEVER,
    }
}

fn record(id: &str, tenant: &str) -> Record {
    Record {
        id: id.into(),
        response: "resp_1".into(),
        tenant: tenant.into(),
        key: "ci".into(),
        session: "sess_1".into(),
        model_asked: "".into(),
        model_served: "tiny".into(),
        backend: "sim".into(),
        counts: Counts {
            output_tokens: 7,
            ..Counts::default()
        },
        stream_ms: 12,
        end: "completed".into(),
        reason: "".into(),
        finish: "stop".into(),
        price_book_version: "v7".into(),
        reserved_at_ms: 1,
        settled_at_ms: Some(2),
    }
}

/// The message that a record becomes.
fn message(partition: i32, record: &Record) -> Message {
    Message {
        partition,
        key: record.tenant.to_string(),
        value: serde_json::to_value(record).unwrap(),
        headers: vec![
            ("id".to_owned(), record.id.to_string()),
            ("type".to_owned(), "hotloop.usage.record.v1".to_owned()),
        ],
    }
}

/// For all in-sync replicas.
const ALL: i16 = -1;

#[test]
fn records_lie_in_order_in_the_partition_of_their_tenant() {
    let broker = Broker::start();
    let mut sink = Kafka::new(options(broker.address())).unwrap();
    let tenants = ["acme", "bolt", "acme", "crux", "acme"];
    let records: Vec<Record> = tenants
        .iter()
        .enumerate()
        .map(|(n, tenant)| record(&format!("rec_{n}"), tenant))
        .collect();
    sink.export(&records).unwrap();

    let mut requests = broker.requests();
    requests.sort_by_key(|(_, messages)| messages[0].partition);
    let message = |partition, n: usize| message(partition, &records[n]);
    assert_eq!(
        requests,
        [
            (ALL, [0, 2, 3, 4].map(|n| message(0, n)).into()),
            (ALL, vec![message(1, 1)]),
        ]
    );
}

#[test]
fn a_batch_is_taken_when_every_message_is_acknowledged() {
    let broker = Broker::start();
    let one = [record("rec_1", "acme")];
    let sent = [(ALL, vec![message(0, &one[0])])];
    let refused = Mood::Refuses(ResponseError::NotEnoughReplicas);
    let limit = Duration::from_secs(2);
    let moods = [
        (refused, "a broker answers NotEnoughReplicas"),
        (Mood::Vanishes, "Request error: "),
        (Mood::Hangs, "batch_secs_max: it took longer than 2 s"),
    ];
    for (mood, expected) in moods {
        let mut sink = Kafka::new(KafkaOptions {
            batch_time_max: if matches!(mood, Mood::Hangs) {
                limit
            } else {
                NEVER
            },
            ..options(broker.address())
        })
        .unwrap();
        broker.mood(mood);
        let error = sink.export(&one).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{mood:?}: {error}");
        assert_eq!(broker.requests(), sent, "{mood:?}");

        broker.mood(Mood::Takes);
        sink.export(&one).unwrap();
        assert_eq!(broker.requests(), sent, "{mood:?}");
    }
}

#[test]
fn a_partition_that_fails_fails_the_batch() {
    let broker = Broker::start();
    let mut sink = Kafka::new(options(broker.address())).unwrap();
    let two = [record("rec_1", "bolt"), record("rec_2", "acme")];
    broker.mood(Mood::Refuses(ResponseError::NotEnoughReplicas));
    let error = sink.export(&two).unwrap_err().to_string();
    assert_eq!(error, "a broker answers NotEnoughReplicas");
    sink.export(&two[..1]).unwrap();
}

#[test]
fn a_connection_that_was_closed_is_made_anew_without_a_word() {
    let broker = Broker::start();
    let mut sink = Kafka::new(options(broker.address())).unwrap();
    let one = [record("rec_1", "acme")];
    sink.export(&one).unwrap();
    broker.close();
    sink.export(&one).unwrap();
    let sent = (ALL, vec![message(0, &one[0])]);
    assert_eq!(broker.requests(), [sent.clone(), sent]);
}

#[test]
fn a_sink_waits_for_its_brokers_and_its_topic() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    let address = address.unwrap();
    let mut sink = Kafka::new(options(address)).unwrap();
    let one = [record("rec_1", "acme")];
    let error = sink.export(&one).unwrap_err().to_string();
    assert!(error.contains("Connection refused"), "{error}");

    let broker = Broker::on(address);
    for topic in [None, Some(("other", 3)), Some(("usage", 0))] {
        broker.topic(topic);
        let error = sink.export(&one).unwrap_err().to_string();
        assert_eq!(error, "the brokers show no topic `usage`");
    }
    broker.topic(Some(("usage", 1)));
    sink.export(&one).unwrap();
    assert_eq!(broker.requests(), [(ALL, vec![message(0, &one[0])])]);
}

#[test]
fn a_password_is_shown_and_never_told() {
    let broker = Broker::start();
    broker.asks_for("hotloop", "open sesame");
    let login = |password: &str| KafkaOptions {
        login: Some(Login {
            sasl: Sasl::Plain,
            user: "hotloop".to_owned(),
            password: password.to_owned(),
        }),
        ..options(broker.address())
    };
    let one = [record("rec_1", "acme")];
    let wrong = Kafka::new(login("open barley")).unwrap().export(&one);
    let error = wrong.unwrap_err().to_string();
    assert!(error.contains("SaslAuthenticationFailed"), "{error}");
    assert!(!error.contains("barley"), "{error}");
    let nobody = Kafka::new(options(broker.address())).unwrap().export(&one);
    assert!(nobody.is_err());
    assert_eq!(broker.requests(), []);

    let mut right = Kafka::new(login("open sesame")).unwrap();
    right.export(&one).unwrap();
    assert_eq!(broker.requests(), [(ALL, vec![message(0, &one[0])])]);
}

/// The ids of these messages, and how often each came.
fn ids(messages: impl Iterator<Item = Message>) -> BTreeMap<String, usize> {
    let mut ids = BTreeMap::new();
    for message in messages {
        let id = message.value["id"].as_str().unwrap();
        *ids.entry(id.to_owned()).or_default() += 1;
    }
    ids
}

/// The errors of what is kept aside for this sink.
fn dead(place: &Place, sink: &str) -> Vec<String> {
    let connection = rusqlite::Connection::open(place.path("journal")).unwrap();
    connection.busy_timeout(NEVER).unwrap();
    let sql = "SELECT error FROM dead_letters WHERE sink = ?1";
    let mut query = connection.prepare(sql).unwrap();
    let errors = query.query_map([sink], |row| row.get(0));
    errors.unwrap().map(Result::unwrap).collect()
}

#[tokio::test]
async fn what_brokers_do_not_take_is_kept_aside_and_comes_once_they_do() {
    let broker = Broker::start();
    broker.topic(Some(("usage", 1)));
    broker.mood(Mood::Refuses(ResponseError::NotEnoughReplicas));
    let address = broker.address();
    let place = Place::new(&format!(
        r#"
        [[billing.export]]
        name = "kafka"
        kind = "kafka"
        brokers = ["{address}"]
        topic = "usage"
        attempts_max = 2
        rest_ms_min = 10
        "#
    ));
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    for _ in 0..10 {
        talk.create(create("words 3")).await;
        talk.done().await;
    }
    place.settled(10).await;
    until(|| dead(&place, "kafka").len() == 10).await;
    let expected = vec!["a broker answers NotEnoughReplicas"; 10];
    assert_eq!(dead(&place, "kafka"), expected);
    // Each was asked about twice.
    let refused = ids(broker.requests().into_iter().flat_map(|(_, it)| it));
    let twice = place.rows().into_iter().map(|row| (row.id, 2));
    assert_eq!(refused, twice.collect());

    broker.mood(Mood::Takes);
    talk.create(create("words 3")).await;
    talk.done().await;
    until(|| dead(&place, "kafka").is_empty()).await;
    drop(talk);
    program.stop().await;
    let taken = ids(broker.requests().into_iter().flat_map(|(_, it)| it));
    let once = place.rows().into_iter().map(|row| (row.id, 1));
    assert_eq!(taken, once.collect());
    assert_eq!(taken.len(), 11);
}

/// A real broker, as tests/kafka/run.sh prepared it. It is killed when this is dropped.
struct Real(Child);

impl Drop for Real {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Real {
    /// Starts it, and waits until it tells of itself.
    fn start(address: &str) -> Self {
        let home = env("HOTLOOP_TEST_KAFKA_HOME");
        let properties = format!("{home}/server.properties");
        let log = File::create(format!("{home}/server.log")).unwrap();
        let real = Self(
            Command::new(KAFKA)
                .args(["kafka.Kafka", &properties])
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap(),
        );
        let since = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(since.elapsed() < NEVER, "the broker does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        real
    }
}

/// Runs a class of Kafka's.
const KAFKA: &str = "tests/kafka/kafka.sh";

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: see tests/kafka/run.sh"))
}

/// What a tool of Kafka's prints.
fn tool(class: &str, address: &str, arguments: &[&str]) -> String {
    let output = Command::new(KAFKA)
        .args([class, "--bootstrap-server", address])
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{text}\n{error}");
    text
}

/// Reads all of a topic with Kafka's own consumer.
fn consumed(address: &str, topic: &str) -> Vec<Message> {
    let ends = tool(
        "org.apache.kafka.tools.GetOffsetShell",
        address,
        &["--topic", topic],
    );
    // A line for each partition: topic:partition:offset.
    let end = |line: &str| line.rsplit(':').next()?.parse::<u64>().ok();
    let all = ends.lines().filter_map(end).sum::<u64>().to_string();
    let shown = ["key", "headers", "partition"].map(|it| format!("print.{it}=true"));
    let mut arguments = vec!["--from-beginning", "--topic", topic];
    arguments.extend(["--max-messages", &all, "--timeout-ms", "30000"]);
    for property in &shown {
        arguments.extend(["--formatter-property", property]);
    }
    let class = "org.apache.kafka.tools.consumer.ConsoleConsumer";
    let lines = tool(class, address, &arguments);
    let message = |line: &str| {
        let parts: Vec<&str> = line.splitn(4, '\t').collect();
        let [partition, headers, key, value] = parts[..] else {
            panic!("{line}");
        };
        let header = |it: &str| {
            let (name, value) = it.split_once(':').unwrap();
            (name.to_owned(), value.to_owned())
        };
        Message {
            partition: partition["Partition:".len()..].parse().unwrap(),
            key: key.to_owned(),
            value: serde_json::from_str(value).unwrap(),
            headers: headers.split(',').map(header).collect(),
        }
    };
    lines.lines().map(message).collect()
}

/// Two ways to the real broker: openly, and with a user over TLS.
fn real_sinks(open: &str, closed: &str) -> String {
    let sink = |topic: &str, more: &str| {
        format!(
            r#"
            [[billing.export]]
            name = "{topic}"
            kind = "kafka"
            topic = "{topic}"
            attempts_max = 3
            rest_ms_min = 50
            {more}
            "#
        )
    };
    let closed = format!(
        r#"
        brokers = ["{closed}"]
        tls = true
        user = "hotloop"
        key_variable = "HOTLOOP_TEST_KAFKA_PASSWORD"
        "#
    );
    let open = format!("brokers = [\"127.0.0.1:1\", \"{open}\"]");
    let [a, b] = SINKS;
    sink(a, &open) + &sink(b, &closed)
}

/// Their names, and those of their topics.
const SINKS: [&str; 2] = ["open", "closed"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a real Kafka: tests/kafka/run.sh"]
async fn a_real_kafka_is_killed_and_started_again() {
    let open = env("HOTLOOP_TEST_KAFKA_OPEN");
    let place = Place::new(&real_sinks(&open, &env("HOTLOOP_TEST_KAFKA_CLOSED")));
    let dead = || SINKS.map(|sink| dead(&place, sink));
    let kept_aside = || dead().map(|errors| errors.len());
    let topics = |arguments: &[&str]| tool("org.apache.kafka.tools.TopicCommand", &open, arguments);
    let broker = Real::start(&open);
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    let mut rollout = async |steps: usize| {
        for _ in 0..steps {
            talk.create(create("words 3")).await;
            talk.done().await;
        }
    };

    // There is no topic, and hotloop makes none, although this broker would.
    rollout(20).await;
    until(|| kept_aside() == [20, 20]).await;
    let expected = SINKS.map(|topic| vec![format!("the brokers show no topic `{topic}`"); 20]);
    assert_eq!(dead(), expected);
    assert_eq!(topics(&["--list"]).trim(), "");
    for topic in SINKS {
        topics(&["--create", "--topic", topic, "--partitions", "3"]);
    }
    rollout(20).await;
    until(|| kept_aside() == [0, 0]).await;

    // It is killed while records come.
    rollout(100).await;
    drop(broker);
    rollout(100).await;
    place.settled(240).await;
    until(|| kept_aside().iter().all(|count| *count >= 100)).await;
    let kept = kept_aside();
    let broker = Real::start(&open);
    rollout(20).await;
    until(|| kept_aside() == [0, 0]).await;
    program.stop().await;

    let rows: BTreeSet<String> = place.rows().into_iter().map(|row| row.id).collect();
    assert_eq!(rows.len(), 260);
    for (topic, kept) in SINKS.into_iter().zip(kept) {
        let messages = consumed(&open, topic);
        let count = messages.len();
        let partitions: BTreeSet<i32> = messages.iter().map(|it| it.partition).collect();
        assert_eq!(partitions.len(), 1, "of one tenant");
        for message in &messages {
            assert_eq!(message.key, message.value["tenant"]);
            let id = message.value["id"].as_str().unwrap().to_owned();
            let kind = "hotloop.usage.record.v1".to_owned();
            let expected = [("id".to_owned(), id), ("type".to_owned(), kind)];
            assert_eq!(message.headers, expected);
        }
        let ids = ids(messages.into_iter());
        assert_eq!(ids.keys().cloned().collect::<BTreeSet<_>>(), rows);
        println!(
            "topic {topic}: records {}, messages {count}, of them again {}; kept aside while the broker was dead {kept}",
            rows.len(),
            count - ids.len(),
        );
    }
    drop(broker);
}
