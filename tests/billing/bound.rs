//! The disk is stuck: what runs is recorded, `done` waits for nothing, and what is above the bound
//! is not sampled.

use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::program::{Place, create};

/// Keeps everybody else from writing to the journal.
struct Stuck(Connection);

impl Stuck {
    fn new(place: &Place) -> Self {
        let connection = Connection::open(place.path("journal")).unwrap();
        connection.busy_timeout(super::program::NEVER).unwrap();
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        Self(connection)
    }

    fn release(self) {
        self.0.execute_batch("ROLLBACK").unwrap();
    }
}

#[tokio::test]
async fn what_is_above_the_bound_is_shed() {
    let place = Place::new("backlog_records_max = 3\nat_bound = \"shed\"");
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    let stuck = Stuck::new(&place);
    let since = Instant::now();
    for _ in 0..3 {
        talk.create(create("words 5")).await;
        talk.done().await;
    }
    for _ in 0..2 {
        talk.create(create("words 5")).await;
        let error = talk.error().await;
        assert_eq!(error.code, "rate_limit_exceeded");
        assert_eq!((error.retry, error.retry_after_ms), (1, 1000));
    }
    assert!(
        since.elapsed() < Duration::from_secs(5),
        "{:?}",
        since.elapsed()
    );
    assert_eq!(place.rows().len(), 0);
    stuck.release();

    // Nothing of what was told is lost, and there is room again.
    place.settled(3).await;
    talk.create(create("words 5")).await;
    talk.done().await;
    let rows = place.settled(4).await;
    assert_eq!(rows.len(), 4);
    assert!(rows.iter().all(|row| row.end == "completed"), "{rows:?}");
}

#[tokio::test]
async fn what_is_above_the_bound_is_blocked() {
    let place = Place::new("backlog_records_max = 2\nat_bound = \"block\"\nblock_secs_max = 2");
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    let stuck = Stuck::new(&place);
    for _ in 0..2 {
        talk.create(create("words 5")).await;
        talk.done().await;
    }
    let since = Instant::now();
    talk.create(create("words 5")).await;
    assert_eq!(talk.error().await.code, "rate_limit_exceeded");
    assert!(
        since.elapsed() >= Duration::from_secs(2),
        "{:?}",
        since.elapsed()
    );

    // One for which room comes in time goes on.
    talk.create(create("words 5")).await;
    stuck.release();
    talk.done().await;
    let rows = place.settled(3).await;
    assert_eq!(rows.len(), 3);
    assert!(rows.iter().all(|row| row.end == "completed"), "{rows:?}");
}
