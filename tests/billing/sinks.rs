//! A sink that cannot be written for a whole run gets everything from the next one.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{HeaderMap, Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use super::program::{Place, create, until};

const EXPORT: &str = r#"
    [[billing.export]]
    name = "usage"
    kind = "jsonl"
    path = "absent/usage.jsonl"
    attempts_max = 2
    rest_ms_min = 10
"#;

/// The ids in this file, and how many lines it has.
pub(crate) fn exported(path: &Path) -> (BTreeSet<String>, usize) {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = text.lines().filter_map(|line| {
        let record: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(record["id"].as_str()?.to_owned())
    });
    let ids: Vec<String> = whole.collect();
    (ids.iter().cloned().collect(), ids.len())
}

#[tokio::test]
async fn a_sink_that_is_down_for_the_whole_run_loses_nothing() {
    let place = Place::new(EXPORT);
    let sink = place.path("absent/usage.jsonl");
    // One run that is stopped and one that is killed.
    for run in 1..3 {
        let mut program = place.start().await;
        let mut talk = program.talk().await;
        for _ in 0..30 {
            talk.create(create("words 3")).await;
            talk.done().await;
        }
        place.settled(run * 30).await;
        drop(talk);
        match run {
            1 => program.stop().await,
            _ => program.kill(),
        }
        assert!(!sink.exists());
    }

    std::fs::create_dir(place.path("absent")).unwrap();
    let program = place.start().await;
    until(|| exported(&sink).0.len() == 60).await;
    program.stop().await;
    let ids: BTreeSet<String> = place.rows().into_iter().map(|row| row.id).collect();
    let (found, lines) = exported(&sink);
    assert_eq!(found, ids);
    println!(
        "a sink that was down for two runs: {} records, {lines} lines",
        ids.len()
    );

    // What it has does not come again.
    let program = place.start().await;
    program.stop().await;
    assert_eq!(exported(&sink).1, lines);
}

/// What a sink of CloudEvents was sent: the headers of each request, and its events.
type Requests = Arc<Mutex<Vec<(HeaderMap, Vec<serde_json::Value>)>>>;

/// A sink that refuses so many requests before it takes any.
async fn sink(refused: usize) -> (SocketAddr, Requests) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Requests::default();
    let kept = requests.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let kept = kept.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let kept = kept.clone();
                async move {
                    let (parts, body) = request.into_parts();
                    let body = body.collect().await?.to_bytes();
                    let events = serde_json::from_slice(&body).unwrap();
                    let mut kept = kept.lock().unwrap();
                    kept.push((parts.headers, events));
                    let status = if kept.len() <= refused { 503 } else { 202 };
                    let answer = Response::builder().status(status);
                    Ok::<_, hyper::Error>(answer.body(Empty::<Bytes>::new()).unwrap())
                }
            });
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            tokio::spawn(async move {
                let _ = server.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    (address, requests)
}

#[tokio::test]
async fn cloud_events_are_posted_until_they_are_taken() {
    let (address, requests) = sink(2).await;
    let place = Place::new(&format!(
        r#"
        [[billing.export]]
        name = "events"
        kind = "cloudevents"
        url = "http://{address}/usage"
        source = "eu-1"
        rest_ms_min = 10
        "#
    ));
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    for _ in 0..10 {
        talk.create(create("words 3")).await;
        talk.done().await;
    }
    drop(talk);
    place.settled(10).await;
    let taken = || -> BTreeSet<String> {
        let requests = requests.lock().unwrap();
        let events = requests.iter().skip(2).flat_map(|(_, events)| events);
        events
            .map(|event| event["id"].as_str().unwrap().to_owned())
            .collect()
    };
    until(|| taken().len() == 10).await;
    program.stop().await;
    let rows = place.rows();
    let ids: BTreeSet<String> = rows.iter().map(|row| row.id.clone()).collect();
    assert_eq!(taken(), ids);
    let requests = requests.lock().unwrap();
    let (headers, events) = requests.last().unwrap();
    assert_eq!(
        headers["content-type"],
        "application/cloudevents-batch+json"
    );
    let event = &events[0];
    assert_eq!(
        (&event["specversion"], &event["source"], &event["type"]),
        (
            &"1.0".into(),
            &"eu-1".into(),
            &"hotloop.usage.record.v1".into()
        )
    );
    assert_eq!(event["id"], event["data"]["id"]);
    assert_eq!(event["subject"], event["data"]["response"]);
    assert!(event["time"].as_str().unwrap().ends_with('Z'));
    assert!(event["data"]["output_tokens"].as_u64().unwrap() > 0);
}
