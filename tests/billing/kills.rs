//! `kill -9` at any instant: what was written is on exactly one record.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hotloop::proto::{
    self as pb, connect_response::Event, responses_service_client::ResponsesServiceClient,
};
use rand::RngExt as _;
use tonic::transport::Channel;

use super::{
    program::{Place, Row, create, paced, rows, until},
    sinks::exported,
};

/// Of each of the two ways to reserve.
const KILLS: usize = 20;

/// Rollouts that run at once.
const ROLLOUTS: usize = 3;

/// How long before a kill a response must have begun to be in the journal, with much room for a
/// machine that is busy: a reservation is written at once.
const WRITTEN_AFTER: Duration = Duration::from_secs(1);

const CONFIG: &str = r#"
    checkpoint_tokens = 8
    checkpoint_ms = 20
    [[billing.export]]
    name = "usage"
    kind = "jsonl"
    path = "usage.jsonl"
"#;

/// What a client knows of a response.
#[derive(Debug, Clone)]
struct Seen {
    created: Instant,
    /// How many words it was asked for: a token each, and a few around them.
    words: u64,
    done: Option<u64>,
}

type Book = Arc<Mutex<BTreeMap<String, Seen>>>;

/// Goes on creating until the server is gone.
async fn rollout(mut client: ResponsesServiceClient<Channel>, book: Book, number: usize) {
    let mut previous = String::new();
    loop {
        let words = rand::rng().random_range(1..120);
        let text = format!("words {words}");
        let ask = match number {
            0 => create(&text),
            _ => paced(&text),
        };
        let request = pb::CreateRequest {
            create: Some(pb::Create {
                previous_response_id: previous.clone(),
                ..ask
            }),
            ..pb::CreateRequest::default()
        };
        let Ok(call) = client.create(request).await else {
            return;
        };
        let mut events = call.into_inner();
        while let Ok(Some(response)) = events.message().await {
            let mut book = book.lock().unwrap();
            match response.event.unwrap() {
                Event::Created(_) => {
                    let seen = Seen {
                        created: Instant::now(),
                        words,
                        done: None,
                    };
                    book.insert(response.response_id, seen);
                }
                Event::Done(done) => {
                    let seen = book.get_mut(&response.response_id).unwrap();
                    seen.done = Some(done.usage.unwrap().output_tokens.into());
                    previous = response.response_id;
                }
                Event::Error(error) => panic!("{error:?}"),
                _ => {}
            }
        }
        // A conversation would outgrow its context.
        if rand::rng().random_range(0..10) == 0 {
            previous.clear();
        }
    }
}

/// The journal as it is on the disk, read without touching it.
fn on_disk(place: &Place) -> BTreeMap<String, Row> {
    let copy = tempfile::tempdir().unwrap();
    for name in ["journal", "journal-wal"] {
        if place.path(name).exists() {
            std::fs::copy(place.path(name), copy.path().join(name)).unwrap();
        }
    }
    by_response(rows(&copy.path().join("journal")))
}

fn by_response(rows: Vec<Row>) -> BTreeMap<String, Row> {
    let count = rows.len();
    let map: BTreeMap<_, _> = rows
        .into_iter()
        .map(|row| (row.response.clone(), row))
        .collect();
    assert_eq!(map.len(), count, "a response has two records");
    map
}

#[derive(Debug, Default)]
struct Tally {
    /// Records that the kills left open, and the tokens that were written of them.
    open: usize,
    checkpointed: u64,
    /// Responses that began in the last moment before a kill, and have no record.
    unwritten: usize,
    /// Responses whose `done` the client had, which the journal has as interrupted.
    cut: usize,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_before_a_kill_is_on_exactly_one_record() {
    kills("behind").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_reserved_first_every_response_that_was_seen_has_a_record() {
    let tally = kills("first").await;
    assert_eq!(tally.unwritten, 0);
}

async fn kills(reserve: &str) -> Tally {
    let place = Place::new(&format!("reserve = \"{reserve}\"\n{CONFIG}"));
    let mut tally = Tally::default();
    let mut all: BTreeMap<String, Seen> = BTreeMap::new();
    let mut program = place.start().await;
    let since = Instant::now();
    for _ in 0..KILLS {
        let book = Book::default();
        let rollouts: Vec<_> = (0..ROLLOUTS)
            .map(|number| tokio::spawn(rollout(program.client.clone(), book.clone(), number)))
            .collect();
        let instant = rand::rng().random_range(1_000..500_000);
        tokio::time::sleep(Duration::from_micros(instant)).await;
        program.kill();
        let killed = Instant::now();
        for rollout in rollouts {
            rollout.await.unwrap();
        }
        let seen = std::mem::take(&mut *book.lock().unwrap());
        let before = on_disk(&place);
        program = place.start().await;
        let after = by_response(place.rows());
        assert_eq!(after.len(), before.len());
        for (response, was) in &before {
            let is = &after[response];
            if was.settled {
                assert_eq!(is, was);
                continue;
            }
            tally.open += 1;
            tally.checkpointed += was.output;
            let expected = Row {
                end: "interrupted".to_owned(),
                settled: true,
                ..was.clone()
            };
            assert_eq!(*is, expected);
        }
        for (response, seen) in &seen {
            let Some(row) = after.get(response) else {
                assert!(killed - seen.created < WRITTEN_AFTER, "{seen:?}");
                tally.unwritten += 1;
                continue;
            };
            // Never more than was sampled, and all of it where it was settled.
            assert!(row.output <= seen.words + 8, "{row:?} of {seen:?}");
            match (&*row.end, seen.done) {
                ("completed", Some(done)) => assert_eq!(row.output, done),
                ("completed", None) => {}
                ("interrupted", done) => tally.cut += usize::from(done.is_some()),
                (_, _) => panic!("{row:?} of {seen:?}"),
            }
        }
        all.extend(seen);
    }
    let took = since.elapsed();
    program.stop().await;

    let rows = place.rows();
    let ids: BTreeSet<String> = rows.iter().map(|row| row.id.clone()).collect();
    assert_eq!(ids.len(), rows.len());
    let missing = all
        .keys()
        .filter(|id| !rows.iter().any(|row| row.response == **id));
    assert_eq!(missing.count(), tally.unwritten);
    let interrupted = rows.iter().filter(|row| row.end == "interrupted");
    let tokens: u64 = interrupted.clone().map(|row| row.output).sum();
    assert_eq!(
        (interrupted.count(), tokens),
        (tally.open, tally.checkpointed)
    );
    assert!(tally.open > KILLS / 2, "the kills hit nothing: {tally:?}");

    // And the sink has every one of them.
    let sink = place.path("usage.jsonl");
    until(|| exported(&sink).0 == ids).await;
    println!(
        "reserved {reserve}: kills {KILLS}, records {}, tokens {}; left open by the kills {} with {} tokens; \
         responses seen {}, of these begun just before a kill and not written {}, \
         done just before a kill and settled as interrupted {}; lines exported {}; {:.1} s",
        rows.len(),
        rows.iter().map(|row| row.output).sum::<u64>(),
        tally.open,
        tally.checkpointed,
        all.len(),
        tally.unwritten,
        tally.cut,
        exported(&sink).1,
        took.as_secs_f32(),
    );
    tally
}
