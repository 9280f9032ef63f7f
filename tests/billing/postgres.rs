//! Several servers write into one table of a real Postgres.

mod server;

use std::{
    net::TcpListener,
    path::PathBuf,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hotloop::billing::{Counts, Exporter as _, Postgres, Record};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rusqlite::types::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::JoinSet,
};

use super::program::{NEVER, Place, Program, create, until};
use crate::packages::or_note;
use server::{PASSWORD, Server};

/// A node that exports to this database.
fn node(url: &str, name: &str, more: &str) -> Place {
    let place = Place::new(&format!(
        r#"
        [[billing.export]]
        name = "usage"
        kind = "postgres"
        url = "{url}"
        key_variable = "PGPASSWORD"
        source = "{name}"
        rest_ms_min = 10
        rest_ms_max = 100
        {more}
        "#
    ));
    place.variable("PGPASSWORD", PASSWORD)
}

/// All settled records of this journal: each with its columns by name, as texts.
fn journal(path: PathBuf) -> (Vec<String>, Vec<Vec<String>>) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.busy_timeout(NEVER).unwrap();
    let sql = "SELECT * FROM records WHERE settled_at_ms IS NOT NULL ORDER BY id";
    let mut query = connection.prepare(sql).unwrap();
    let columns = query.column_names().map(String::from);
    // A place in the order of this journal says nothing elsewhere.
    let columns: Vec<String> = columns.filter(|column| column != "number").collect();
    let rows = query.query_map([], |row| {
        let texts = columns
            .iter()
            .map(|column| match row.get_unwrap(&**column) {
                Value::Text(text) => text,
                Value::Integer(number) => number.to_string(),
                other => panic!("{other:?}"),
            });
        Ok(texts.collect())
    });
    let rows = rows.unwrap().map(Result::unwrap).collect();
    (columns, rows)
}

impl Server {
    /// All records of this node in the table, in the shape of its journal.
    async fn records(&self, node: &str, columns: &[String]) -> Vec<Vec<String>> {
        let columns = columns.iter().map(|column| match column.as_str() {
            "end" => "ended".to_owned(),
            "reserved_at_ms" | "settled_at_ms" => {
                let column = column.trim_end_matches("_ms");
                format!("(extract(epoch FROM {column}) * 1000)::bigint")
            }
            other => other.to_owned(),
        });
        let columns: Vec<String> = columns.collect();
        let columns = columns.join(", ");
        let sql = format!("SELECT {columns} FROM hotloop_usage WHERE node = '{node}' ORDER BY id");
        self.rows("postgres", &sql).await
    }

    async fn count(&self, database: &str) -> u64 {
        let sql = "SELECT count(*) FROM hotloop_usage";
        self.rows(database, sql).await[0][0].parse().unwrap()
    }

    /// Waits until the table has so many records.
    async fn has(&self, count: u64) {
        let since = Instant::now();
        // The table is made with the first ones.
        let made = "SELECT to_regclass('hotloop_usage') IS NOT NULL";
        while self.rows("postgres", made).await != [["t"]] || self.count("postgres").await < count {
            assert!(since.elapsed() < NEVER, "it never has {count}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the table has every settled record of this node's journal, and nothing else of it.
    async fn has_all_of(&self, name: &str, place: &Place) -> usize {
        let (columns, expected) = journal(place.path("journal"));
        let since = Instant::now();
        loop {
            let found = self.records(name, &columns).await;
            if found == expected {
                return found.len();
            }
            let wrong = found.iter().find(|row| !expected.contains(row));
            assert_eq!(wrong, None);
            assert!(
                since.elapsed() < NEVER,
                "{} of {}",
                found.len(),
                expected.len()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Has responses made on two streams until it is told to end, and says how many there were.
async fn rollouts(program: &mut Program, end: &Arc<AtomicBool>) -> JoinSet<usize> {
    let mut running = JoinSet::new();
    for _ in 0..2 {
        let (mut talk, end) = (program.talk().await, end.clone());
        running.spawn(async move {
            let mut count = 0;
            while !end.load(Ordering::Relaxed) {
                talk.create(create("words 3")).await;
                talk.done().await;
                count += 1;
            }
            count
        });
    }
    running
}

#[tokio::test]
async fn what_two_nodes_write_is_there_once_although_the_server_died_in_between() {
    let Some(mut server) = Server::new().await else {
        return;
    };
    let url = server.url("postgres");
    // One keeps records aside meanwhile, the other goes on asking.
    let nodes = [
        ("eu-1", node(&url, "eu-1", "attempts_max = 2")),
        ("eu-2", node(&url, "eu-2", "attempts_max = 1000")),
    ];
    let (mut first, mut second) = tokio::join!(nodes[0].1.start(), nodes[1].1.start());
    let end = Arc::new(AtomicBool::new(false));
    let running = [
        rollouts(&mut first, &end).await,
        rollouts(&mut second, &end).await,
    ];
    server.has(40).await;
    server.stop();
    for (_, place) in &nodes {
        place.settled(place.rows().len() + 40).await;
    }
    let aside = "SELECT count(*) FROM dead_letters";
    let aside = |place: &Place| -> i64 {
        let connection = rusqlite::Connection::open(place.path("journal")).unwrap();
        connection.query_row(aside, [], |row| row.get(0)).unwrap()
    };
    until(|| aside(&nodes[0].1) > 0).await;
    server.start().await;
    let before = server.count("postgres").await;
    server.has(before + 200).await;
    end.store(true, Ordering::Relaxed);
    let mut all = 0;
    for ((name, place), rollouts) in nodes.iter().zip(running) {
        let count = rollouts.join_all().await.into_iter().sum();
        place.settled(count).await;
        assert_eq!(server.has_all_of(name, place).await, count);
        println!("{name}: {count} records");
        all += count;
    }
    assert_eq!(server.count("postgres").await, all as u64);
    // Nothing is kept aside any more, and to stop changes nothing.
    until(|| aside(&nodes[0].1) == 0).await;
    first.stop().await;
    second.stop().await;
    assert_eq!(server.count("postgres").await, all as u64);
}

#[tokio::test]
async fn a_run_without_the_server_is_made_up_for_by_the_next_one() {
    let Some(mut server) = Server::new().await else {
        return;
    };
    server.stop();
    let place = node(&server.url("postgres"), "eu-1", "attempts_max = 2");
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    for _ in 0..30 {
        talk.create(create("words 3")).await;
        talk.done().await;
    }
    drop(talk);
    place.settled(30).await;
    program.stop().await;

    server.start().await;
    let program = place.start().await;
    server.has(30).await;
    program.stop().await;
    assert_eq!(server.has_all_of("eu-1", &place).await, 30);
}

/// A record of this number.
fn record(number: u64) -> Record {
    let text = |what: &str| format!("{what} {number}").into();
    Record {
        id: text("rec"),
        response: text("resp"),
        tenant: text("tenant"),
        key: text("key"),
        session: text("sess"),
        model_asked: "".into(),
        model_served: "it's \"fast\" \\ ü".into(),
        backend: "sim".into(),
        counts: Counts {
            input_tokens: i64::MAX as u64,
            output_tokens: number,
            ..Counts::default()
        },
        stream_ms: 7,
        end: "completed".into(),
        reason: "".into(),
        finish: "stop".into(),
        price_book_version: "2026-11".into(),
        reserved_at_ms: 1_764_151_200_123,
        settled_at_ms: Some(1_764_151_200_130),
    }
}

/// What an exporter says of these records, on a thread of its own as always.
async fn export(mut sink: Postgres, records: Vec<Record>) -> (Postgres, Result<(), String>) {
    let exported = tokio::task::spawn_blocking(move || {
        let result = sink.export(&records);
        (sink, result.map_err(|error| error.to_string()))
    });
    exported.await.unwrap()
}

fn sink(url: &str, node: &str) -> Postgres {
    Postgres::new(url, Some(PASSWORD), node).unwrap()
}

/// Drops an exporter where it lived.
async fn end(sink: Postgres) {
    tokio::task::spawn_blocking(move || drop(sink))
        .await
        .unwrap();
}

#[tokio::test]
async fn records_that_come_again_are_there_once() {
    let Some(server) = Server::new().await else {
        return;
    };
    let url = server.url("postgres");
    let (first, exported) = export(sink(&url, "eu-1"), vec![record(1), record(2)]).await;
    assert_eq!(exported, Ok(()));
    // As where the answer was lost: all of them come again, on another connection, and more.
    let again = vec![record(2), record(1), record(3), record(3)];
    let (second, exported) = export(sink(&url, "eu-1"), again).await;
    assert_eq!(exported, Ok(()));
    // Another connection has done nothing to this one.
    let (first, exported) = export(first, vec![record(3), record(4)]).await;
    assert_eq!(exported, Ok(()));
    end(first).await;
    end(second).await;
    let sql = "SELECT id, output_tokens FROM hotloop_usage ORDER BY id";
    let expected = [
        ["rec 1", "1"],
        ["rec 2", "2"],
        ["rec 3", "3"],
        ["rec 4", "4"],
    ];
    assert_eq!(server.rows("postgres", sql).await, expected);
    let sql = "SET timezone TO 'Asia/Tokyo'; SELECT node, input_tokens, model_asked, model_served, ended, \
               reserved_at, settled_at FROM hotloop_usage WHERE id = 'rec 1'";
    let expected = [[
        "eu-1",
        "9223372036854775807",
        "",
        "it's \"fast\" \\ ü",
        "completed",
        "2025-11-26 19:00:00.123+09",
        "2025-11-26 19:00:00.13+09",
    ]];
    assert_eq!(server.rows("postgres", sql).await, expected);
}

/// A way to the server on which, once that is said, answers are lost, and with the first of them the connection.
async fn lossy(server: &Server, lose: Arc<AtomicBool>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let socket = server.path(".s.PGSQL.5432");
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let server = UnixStream::connect(&socket).await.unwrap();
            let lose = lose.clone();
            tokio::spawn(async move {
                let (mut asked, mut told) = client.into_split();
                let (mut answers, mut asking) = server.into_split();
                let asks = tokio::io::copy(&mut asked, &mut asking);
                let answers = async {
                    let mut bytes = [0; 4096];
                    loop {
                        let count = answers.read(&mut bytes).await.unwrap();
                        if count == 0 || lose.swap(false, Ordering::Relaxed) {
                            return;
                        }
                        told.write_all(&bytes[..count]).await.unwrap();
                    }
                };
                tokio::select! {
                    _ = asks => {}
                    () = answers => {}
                }
            });
        }
    });
    format!("postgres://postgres@{address}/postgres")
}

#[tokio::test]
async fn a_batch_whose_answer_was_lost_is_there_once() {
    let Some(server) = Server::new().await else {
        return;
    };
    let lose = Arc::new(AtomicBool::new(false));
    let sink = sink(&lossy(&server, lose.clone()).await, "eu-1");
    let (sink, exported) = export(sink, vec![record(1)]).await;
    assert_eq!(exported, Ok(()));
    lose.store(true, Ordering::Relaxed);
    let (sink, exported) = export(sink, vec![record(2), record(3)]).await;
    assert_eq!(exported, Err("connection closed".to_owned()));
    // It was committed all the same.
    server.has(3).await;
    let (sink, exported) = export(sink, vec![record(2), record(3)]).await;
    assert_eq!(exported, Ok(()));
    end(sink).await;
    let sql = "SELECT id FROM hotloop_usage ORDER BY id";
    let expected = [["rec 1"], ["rec 2"], ["rec 3"]];
    assert_eq!(server.rows("postgres", sql).await, expected);
}

/// What the page shows may be pasted.
#[tokio::test]
async fn the_statements_of_the_page_work() {
    let Some(server) = Server::new().await else {
        return;
    };
    let (sink, exported) = export(sink(&server.url("postgres"), "eu-1"), vec![record(1)]).await;
    assert_eq!(exported, Ok(()));
    end(sink).await;
    server.rows("postgres", "CREATE ROLE usage").await;
    let page = include_str!("../../docs/billing.md");
    let statements: Vec<&str> = page
        .split("```sql\n")
        .skip(1)
        .flat_map(|block| block.split_once("```").unwrap().0.split_terminator(";\n"))
        .collect();
    assert_eq!(statements.len(), 5);
    for statement in statements {
        server.rows("postgres", statement).await;
    }
}

#[tokio::test]
async fn servers_that_start_at_once_make_one_table() {
    const SERVERS: u64 = 8;
    let Some(server) = Server::new().await else {
        return;
    };
    for round in 0..4 {
        let database = format!("round_{round}");
        let sql = format!("CREATE DATABASE {database}");
        server.rows("postgres", &sql).await;
        let url = server.url(&database);
        let start = Arc::new(Barrier::new(SERVERS as usize));
        let servers = (0..SERVERS).map(|number| {
            let (url, start) = (url.clone(), start.clone());
            tokio::task::spawn_blocking(move || {
                let mut sink = sink(&url, "eu-1");
                start.wait();
                sink.export(&[record(number)]).map_err(|it| it.to_string())
            })
        });
        for exported in servers.collect::<Vec<_>>() {
            assert_eq!(exported.await.unwrap(), Ok(()));
        }
        assert_eq!(server.count(&database).await, SERVERS);
        let sql = "SELECT version FROM hotloop_usage_format";
        assert_eq!(server.rows(&database, sql).await, [["1"]]);
    }
}

/// What the exporter says of a record.
async fn refusal(url: &str, password: &str) -> String {
    let sink = Postgres::new(url, Some(password), "eu-1").unwrap();
    let (sink, exported) = export(sink, vec![record(1)]).await;
    end(sink).await;
    exported.unwrap_err()
}

#[tokio::test]
async fn a_server_whose_role_may_not_make_the_table_needs_it_made() {
    let Some(server) = Server::new().await else {
        return;
    };
    // Before version 15 everybody might.
    let sql =
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC; CREATE ROLE writer LOGIN PASSWORD 'tr0ub4dor'";
    server.rows("postgres", sql).await;
    let url = server.url("postgres").replace("postgres@", "writer@");
    assert_eq!(
        refusal(&url, "tr0ub4dor").await,
        "the server says: permission denied for schema public (42501)"
    );
    let by_hand = include_str!("../../src/billing/postgres/schema.sql");
    server.rows("postgres", by_hand).await;
    assert_eq!(
        refusal(&url, "tr0ub4dor").await,
        "the server says: permission denied for table hotloop_usage_format (42501)"
    );
    let sql = "GRANT SELECT ON hotloop_usage_format TO writer; \
               GRANT SELECT, INSERT ON hotloop_usage TO writer";
    server.rows("postgres", sql).await;
    let sink = Postgres::new(&url, Some("tr0ub4dor"), "eu-1").unwrap();
    let (sink, exported) = export(sink, vec![record(1)]).await;
    assert_eq!(exported, Ok(()));
    end(sink).await;
    assert_eq!(server.count("postgres").await, 1);
}

#[tokio::test]
async fn a_table_of_another_format_is_refused() {
    let Some(server) = Server::new().await else {
        return;
    };
    let sql = "CREATE TABLE hotloop_usage_format (version integer NOT NULL); \
               INSERT INTO hotloop_usage_format VALUES (2)";
    server.rows("postgres", sql).await;
    let url = server.url("postgres");
    assert_eq!(
        refusal(&url, PASSWORD).await,
        "the table hotloop_usage is of format 2, and this program writes 1"
    );
    // One that somebody made is nothing to guess about.
    let sql = "DROP TABLE hotloop_usage_format; CREATE TABLE hotloop_usage (id text)";
    server.rows("postgres", sql).await;
    assert_eq!(
        refusal(&url, PASSWORD).await,
        "the server says: relation \"hotloop_usage\" already exists (42P07)"
    );
}

/// Has a response made by a node whose export fails for this reason, and gives what it logged until then.
async fn fails(place: &Place, reason: &str) -> Vec<String> {
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    talk.create(create("words 3")).await;
    talk.done().await;
    let lines = program.logs("an export failed");
    let (_, error) = lines.last().unwrap().split_once(" error=").unwrap();
    assert_eq!(error, reason);
    lines
}

#[tokio::test]
async fn a_wrong_password_and_an_absent_database_are_named_in_the_log() {
    let Some(server) = Server::new().await else {
        return;
    };
    let wrong = node(&server.url("postgres"), "eu-1", "").variable("PGPASSWORD", "wrong battery");
    let absent = node(&server.url("absent"), "eu-1", "");
    let expected = [
        (
            wrong,
            "the server says: password authentication failed for user \"postgres\" (28P01)",
        ),
        (
            absent,
            "the server says: database \"absent\" does not exist (3D000)",
        ),
    ];
    for (place, reason) in expected {
        let lines = fails(&place, reason).await;
        let told = |line: &&String| line.contains("battery") || line.contains(PASSWORD);
        assert_eq!(lines.iter().find(told), None);
    }
}

#[tokio::test]
async fn a_server_that_hangs_holds_nobody_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let brief = Duration::from_millis(200);
    let silent = sink(&format!("postgres://postgres@{address}/postgres"), "eu-1");
    let (silent, exported) = export(silent.within(brief), vec![record(1)]).await;
    let expected = "the server does not answer within 200ms".to_owned();
    assert_eq!(exported, Err(expected));
    end(silent).await;

    let Some(server) = Server::new().await else {
        return;
    };
    let patient = sink(&server.url("postgres"), "eu-1").within(Duration::from_secs(1));
    let (patient, exported) = export(patient, vec![record(1)]).await;
    assert_eq!(exported, Ok(()));
    // Somebody holds the table.
    let holder = server.connect("postgres").await.unwrap();
    let lock = "BEGIN; LOCK TABLE hotloop_usage IN ACCESS EXCLUSIVE MODE";
    holder.batch_execute(lock).await.unwrap();
    let (patient, exported) = export(patient, vec![record(2)]).await;
    let reason = exported.unwrap_err();
    // Both ends give up after that time, and either may be the first.
    assert!(
        [
            "the server does not answer within 1s",
            "the server says: canceling statement due to statement timeout (57014)"
        ]
        .contains(&&*reason),
        "{reason}"
    );
    // Nothing is left there that waits on.
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    let since = Instant::now();
    while server.rows("postgres", waiting).await != [["0"]] {
        assert!(since.elapsed() < NEVER, "it waits on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    holder.batch_execute("COMMIT").await.unwrap();
    let (patient, exported) = export(patient, vec![record(2)]).await;
    assert_eq!(exported, Ok(()));
    end(patient).await;
    assert_eq!(server.count("postgres").await, 2);
}

#[tokio::test]
async fn a_certificate_is_verified() {
    let Some(mut server) = Server::new().await else {
        return;
    };
    let tls = match server.rows("postgres", "SHOW ssl_library").await == [[""]] {
        true => Err("this server was built without it".to_owned()),
        false => Ok(()),
    };
    let Some(()) = or_note(&tls, "TLS to Postgres", "HOTLOOP_REQUIRE_POSTGRES") else {
        return;
    };
    let mut authority = CertificateParams::new([]).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["localhost".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &authority).unwrap();
    server.write("server.crt", &certificate.pem());
    server.write("server.key", &key.serialize_pem());
    std::fs::write(server.path("roots.pem"), authority.pem()).unwrap();
    // A port that nobody has; it is free again when the server takes it.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    let port = port.unwrap().port();
    let file = |name| server.path(name).display().to_string();
    let settings = [
        "listen_addresses=127.0.0.1".to_owned(),
        "ssl=on".to_owned(),
        format!("ssl_cert_file={}", file("server.crt")),
        format!("ssl_key_file={}", file("server.key")),
    ];
    let roots = file("roots.pem");
    let hba = "local all all scram-sha-256\nhostssl all all all scram-sha-256\n";
    server.write("data/pg_hba.conf", hba);
    server.stop();
    server.arguments = settings
        .into_iter()
        .flat_map(|it| ["-c".to_owned(), it])
        .collect();
    server.port = port;
    server.start().await;

    let refused = [
        (
            "localhost",
            "sslmode=require",
            None,
            "error performing TLS handshake: invalid peer certificate: UnknownIssuer",
        ),
        (
            "127.0.0.1",
            "sslmode=prefer",
            Some(&roots),
            "error performing TLS handshake: invalid peer certificate: certificate not valid for name \
             \"127.0.0.1\"; certificate is only valid for DnsName(\"localhost\")",
        ),
        (
            "localhost",
            "sslmode=disable",
            Some(&roots),
            "the server says: no pg_hba.conf entry for host \"127.0.0.1\", user \"postgres\", database \
             \"postgres\", no encryption (28000)",
        ),
    ];
    for (host, mode, roots, reason) in refused {
        let url = format!("postgres://postgres@{host}:{port}/postgres?{mode}");
        let mut place = node(&url, "eu-1", "");
        if let Some(roots) = roots {
            place = place.variable("SSL_CERT_FILE", roots);
        }
        fails(&place, reason).await;
    }
    let url = format!("postgres://postgres@localhost:{port}/postgres?sslmode=require");
    let place = node(&url, "eu-1", "").variable("SSL_CERT_FILE", &roots);
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    talk.create(create("words 3")).await;
    talk.done().await;
    server.has(1).await;
    assert_eq!(server.has_all_of("eu-1", &place).await, 1);
}
