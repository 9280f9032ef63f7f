//! The server is told to stop.

use std::time::{Duration, Instant};

use hotloop::proto::{IncompleteReason, ResponseStatus, Retry, connect_response::Event};
use tokio::time::timeout;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    client::{Client, Talk, hold, on, say},
    program::{NEVER, Program, Serve},
};

async fn start(drain_secs: u64) -> (Program, Client) {
    let serve = Serve::new().set(&format!("server.drain_secs_max={drain_secs}"));
    let program = serve.start().await;
    let client = Client::of(&program).await;
    (program, client)
}

impl Talk {
    /// The server says that it goes, and that everything can be continued elsewhere.
    async fn is_told(&mut self, lane: &str) {
        let is_go_away = |event: &Event| matches!(event, Event::GoAway(_));
        let messages = self.until(lane, is_go_away).await;
        let Some(Event::GoAway(go_away)) = messages.last().unwrap().event.clone() else {
            unreachable!()
        };
        assert_eq!((&*go_away.reason, go_away.resumable), ("draining", true));
        assert!(go_away.time_left_ms > 0, "{go_away:?}");
    }

    /// Nothing more comes, and the stream ends well, though nobody has closed our side.
    async fn is_over(&mut self) {
        let (rest, ended) = self.rest().await;
        assert_eq!(rest, []);
        ended.unwrap();
    }
}

#[tokio::test]
async fn what_runs_ends_well_and_then_so_does_the_server() {
    let (mut program, client) = start(30).await;
    let mut idle = client.stream().await;
    idle.answer(say("echo nothing more")).await;
    let mut runs = client.stream().await;
    runs.create(on("paced", say("slow 80"))).await;
    runs.until("", |event| matches!(event, Event::OutputTextDelta(_)))
        .await;
    let mut held = client.stream().await;
    held.create(hold("rollout 3")).await;
    let mut round = held.round().await;
    let mut health = HealthClient::new(client.channel.clone())
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    let seen = health.message().await.unwrap().unwrap();
    assert_eq!(seen.status(), ServingStatus::Serving);

    let told = Instant::now();
    program.signal("TERM").await;
    let seen = timeout(NEVER, health.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(seen.status(), ServingStatus::NotServing);
    idle.is_told("").await;
    idle.is_over().await;
    // A held response is not cut short: its tools may still answer, and the model goes on.
    held.is_told("").await;
    let sent = held.create_on("", say("echo late")).await;
    let refusal = held.refusal(&sent).await;
    assert_eq!((&*refusal.code, refusal.retry()), ("draining", Retry::Safe));
    while !round.calls.is_empty() {
        held.append(&round.response_id, round.outputs()).await;
        round = held.round().await;
    }
    assert_eq!(round.text, "finished 3 steps");
    held.is_over().await;
    let messages = runs
        .until("", |event| matches!(event, Event::Done(_)))
        .await;
    let Some(Event::Done(done)) = &messages.last().unwrap().event else {
        unreachable!()
    };
    assert_eq!(done.status(), ResponseStatus::Completed);
    runs.is_over().await;
    assert!(program.ends().await.success());
    // As soon as everything had ended, long before its time was over.
    assert!(
        told.elapsed() < Duration::from_secs(15),
        "{:?}",
        told.elapsed()
    );
    let late = client.try_stream().await.err().unwrap();
    assert_eq!(late.code(), Code::Unavailable);
}

#[tokio::test]
async fn what_does_not_end_in_time_is_kept_as_it_stands() {
    let (mut program, client) = start(2).await;
    let mut runs = client.stream().await;
    runs.create(on("paced", say("slow 5000"))).await;
    runs.until("", |event| matches!(event, Event::OutputTextDelta(_)))
        .await;
    let mut held = client.stream().await;
    held.create(hold("rollout 3")).await;
    held.round().await;

    let told = Instant::now();
    program.signal("INT").await;
    for talk in [&mut runs, &mut held] {
        talk.is_told("").await;
        let messages = talk
            .until("", |event| matches!(event, Event::Done(_)))
            .await;
        let Some(Event::Done(done)) = &messages.last().unwrap().event else {
            unreachable!()
        };
        assert_eq!(done.status(), ResponseStatus::Incomplete);
        assert_eq!(done.incomplete_reason(), IncompleteReason::Interrupted);
        talk.is_over().await;
    }
    assert!(program.ends().await.success());
    let took = told.elapsed();
    assert!(
        took > Duration::from_secs(1) && took < Duration::from_secs(6),
        "{took:?}"
    );
}

#[tokio::test]
async fn a_second_signal_stops_at_once() {
    let (mut program, client) = start(3600).await;
    let mut runs = client.stream().await;
    runs.create(on("paced", say("slow 5000"))).await;
    runs.until("", |event| matches!(event, Event::OutputTextDelta(_)))
        .await;
    program.signal("TERM").await;
    runs.is_told("").await;
    program.signal("TERM").await;
    assert!(program.ends().await.success());
    assert!(runs.rest().await.1.is_err());
}
