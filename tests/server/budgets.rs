//! Budgets of a server: refused before, ended gracefully in the middle, shared and kept apart as they say.

use std::time::{Duration, Instant};

use hotloop::proto::{IncompleteReason, ResponseStatus};

use crate::{
    client::{Client, Round, Talk, after, held_rollout, hold, on, say, user},
    program::{MODELS, Program, Serve},
};

const KEYS: &str = "acme:0123456789abcdef,zen:fedcba9876543210";
const ACME: &str = "0123456789abcdef";
const ZEN: &str = "fedcba9876543210";

async fn serve(budgets: &str) -> (Program, Client) {
    let program = Serve::with_config(&format!("{MODELS}{budgets}")).keys(KEYS);
    let program = program.start().await;
    let client = Client::of(&program).await;
    (program, client)
}

fn output_tokens(round: &Round) -> u32 {
    round.done.usage.unwrap().output_tokens
}

fn is_spent(round: &Round) -> bool {
    round.done.status() == ResponseStatus::Incomplete
        && round.done.incomplete_reason() == IncompleteReason::Budget
}

const LONG: &str =
    "echo one two three four five six seven eight nine ten eleven twelve thirteen fourteen";

#[tokio::test]
async fn a_tenant_spends_its_tokens_on_any_stream_and_no_other_does() {
    let (_program, client) = serve(
        r#"
        [[budget]]
        name = "acme tokens"
        tenants = ["acme"]
        per = "tenant"
        output_tokens_max = 50
        "#,
    )
    .await;
    let mut sampled = 0;
    let mut last = None;
    // A stream each: the budget is the tenant's.
    for _ in 0..10 {
        let mut talk = client.with_key(ACME).stream().await;
        talk.create(say(LONG)).await;
        let round = talk.round().await;
        sampled += output_tokens(&round);
        if is_spent(&round) {
            last = Some(round);
            break;
        }
        assert_eq!(round.done.status(), ResponseStatus::Completed);
        talk.close().await;
    }
    let last = last.expect("the budget is never spent");
    assert_eq!(sampled, 50, "to the token");
    assert!(!last.text.is_empty(), "what was sampled is kept");

    let mut talk = client.with_key(ACME).stream().await;
    let request = talk.create(say("echo more")).await;
    let error = talk.refusal(&request).await;
    assert_eq!(
        (&*error.code, &*error.message),
        (
            "insufficient_quota",
            "the budget `acme tokens` is spent: output tokens"
        )
    );
    // The stream goes on, and others do not notice.
    let request = talk
        .create(after(&last.response_id, vec![user("echo on")]))
        .await;
    assert_eq!(talk.refusal(&request).await.code, "insufficient_quota");
    talk.close().await;
    let mut talk = client.with_key(ZEN).stream().await;
    for _ in 0..5 {
        talk.answer(say(LONG)).await;
    }
    talk.close().await;
}

#[tokio::test]
async fn a_spent_response_is_continued_when_the_window_is_over() {
    let (_program, client) = serve(
        r#"
        [[budget]]
        name = "burst"
        per = "key"
        window_secs = 2
        output_tokens_max = 8
        "#,
    )
    .await;
    let mut talk = client.with_key(ACME).stream().await;
    let mut cut = None;
    while cut.is_none() {
        talk.create(say(LONG)).await;
        let round = talk.round().await;
        // A window may end in the middle of it.
        cut = is_spent(&round).then_some(round);
    }
    let cut = cut.unwrap();
    // Refused until then, and told how long.
    loop {
        let request = talk
            .create(after(&cut.response_id, vec![user("echo on")]))
            .await;
        let message = talk.next().await;
        assert_eq!(message.request_id, request);
        match message.event.unwrap() {
            hotloop::proto::connect_response::Event::Error(error) => {
                assert_eq!(error.code, "insufficient_quota");
                assert!((1..=2000).contains(&error.retry_after_ms), "{error:?}");
                tokio::time::sleep(Duration::from_millis(error.retry_after_ms.into())).await;
            }
            hotloop::proto::connect_response::Event::Created(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(talk.round().await.text, "on");
    talk.close().await;
}

#[tokio::test]
async fn calls_and_input_of_a_stream_are_its_own_and_a_held_loop_ends_gracefully() {
    let (_program, client) = serve(
        r#"
        [[budget]]
        name = "loop"
        per = "stream"
        calls_max = 3
        "#,
    )
    .await;
    let client = client.with_key(ACME);
    let mut talk = client.stream().await;
    let rounds = held_rollout(&mut talk, 10).await;
    assert_eq!(rounds.len(), 4);
    assert!(is_spent(&rounds[3]) && output_tokens(&rounds[3]) == output_tokens(&rounds[2]));
    let request = talk.create(say("echo x")).await;
    assert_eq!(
        talk.refusal(&request).await.message,
        "the budget `loop` is spent: calls"
    );
    talk.close().await;
    // Another stream has one of its own.
    let mut talk = client.stream().await;
    talk.create(hold("rollout 2")).await;
    assert_eq!(
        talk.round().await.done.status(),
        ResponseStatus::AwaitingInput
    );
}

#[tokio::test]
async fn time_and_money_end_a_sample_in_the_middle() {
    let (_program, client) = serve(
        r#"
        [[price]]
        model = "fast"
        input = 0
        output = 100
        [[budget]]
        name = "second"
        models = ["paced"]
        per = "key"
        sample_secs_max = 1
        [[budget]]
        name = "money"
        models = ["fast"]
        per = "tenant"
        cost_max = 0.001
        "#,
    )
    .await;
    let mut talk = client.with_key(ACME).stream().await;
    let begun = Instant::now();
    talk.create(on("paced", say(&format!("echo {}", "long ".repeat(400)))))
        .await;
    let round = talk.round().await;
    assert!(is_spent(&round), "{:?}", round.done);
    let tokens = output_tokens(&round);
    assert!(
        (20..400).contains(&tokens),
        "{tokens} in {:?}",
        begun.elapsed()
    );
    let request = talk.create(on("paced", say("echo x"))).await;
    let message = talk.refusal(&request).await.message;
    assert_eq!(message, "the budget `second` is spent: time of samples");

    // A thousandth of the currency is ten tokens at a hundred for a million.
    talk.create(say(LONG)).await;
    let round = talk.round().await;
    assert!(
        is_spent(&round) && output_tokens(&round) == 10,
        "{:?}",
        round.done
    );
    let request = talk.create(say("echo x")).await;
    let message = talk.refusal(&request).await.message;
    assert_eq!(message, "the budget `money` is spent: cost");
    talk.close().await;
}

/// Many samples at once are given no token twice.
#[tokio::test]
async fn samples_at_once_share_a_budget() {
    let (_program, client) = serve(
        r#"
        [[budget]]
        name = "all"
        per = "tenant"
        output_tokens_max = 10000
        "#,
    )
    .await;
    let text = format!("echo {}", "word ".repeat(1000));
    let mut talks = Vec::new();
    for _ in 0..12 {
        let mut talk = client.with_key(ACME).stream().await;
        talk.create(say(&text)).await;
        talks.push(talk);
    }
    let mut sampled = 0;
    let mut ended = [0; 3];
    for talk in &mut talks {
        let message = talk.next().await;
        match message.event.unwrap() {
            hotloop::proto::connect_response::Event::Error(error) => {
                assert_eq!(error.code, "insufficient_quota");
                ended[0] += 1;
            }
            _ => {
                let round = talk.round().await;
                sampled += output_tokens(&round);
                ended[1 + usize::from(is_spent(&round))] += 1;
            }
        }
    }
    // What one gave back another may have missed, and a chunk that has come counts whole.
    let bounds = 10_000 - 12 * 256..=10_000 + 12 * 31;
    assert!(bounds.contains(&sampled), "{sampled}, {ended:?}");
    assert!(ended[2] + ended[0] > 0, "{ended:?}");
}

async fn quota(talk: &mut Talk) -> String {
    let request = talk.create(say("echo x")).await;
    let error = talk.refusal(&request).await;
    assert_eq!(error.code, "insufficient_quota");
    error.message
}

/// What was used is in the journal, and the next process counts it.
#[tokio::test]
async fn what_was_used_is_used_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let config = format!(
        r#"
        [billing]
        path = "{}/journal"
        {MODELS}
        [[price]]
        model = "fast"
        input = 0
        output = 100
        [[budget]]
        name = "ever"
        per = "tenant"
        output_tokens_max = 20
        [[budget]]
        name = "own"
        per = "stream"
        output_tokens_max = 20
        [[budget]]
        name = "year"
        per = "key"
        window_secs = 2592000
        tenants = ["zen"]
        cost_max = 0.0015
        "#,
        dir.path().display()
    );
    let start = async || {
        let program = Serve::with_config(&config).keys(KEYS).start().await;
        let client = Client::of(&program).await;
        (program, client)
    };
    let (mut program, client) = start().await;
    for (key, output) in [(ACME, 20), (ZEN, 15)] {
        let mut talk = client.with_key(key).stream().await;
        let mut sampled = 0;
        while sampled < output {
            talk.create(say(LONG)).await;
            sampled += output_tokens(&talk.round().await);
        }
        assert_eq!(sampled, output);
        talk.close().await;
    }
    program.signal("TERM").await;
    assert!(program.ends().await.success());

    let (_program, client) = start().await;
    let mut talk = client.with_key(ACME).stream().await;
    assert_eq!(
        quota(&mut talk).await,
        "the budget `ever` is spent: output tokens"
    );
    talk.close().await;
    let mut talk = client.with_key(ZEN).stream().await;
    assert_eq!(quota(&mut talk).await, "the budget `year` is spent: cost");
    talk.close().await;
}

/// Limits and prices change with a SIGHUP; what was used does not, and what is wrong changes nothing.
#[tokio::test]
async fn limits_change_while_it_runs_and_what_was_used_stays_used() {
    let budget = |max: u32| {
        format!(
            "{MODELS}\n[[budget]]\nname = \"all\"\nper = \"tenant\"\noutput_tokens_max = {max}\n"
        )
    };
    let program = Serve::with_config(&budget(10)).keys(KEYS).start().await;
    let client = Client::of(&program).await;
    let mut talk = client.with_key(ACME).stream().await;
    talk.create(say(LONG)).await;
    let cut = talk.round().await;
    assert!(is_spent(&cut) && output_tokens(&cut) == 10);
    let spent = "the budget `all` is spent: output tokens";
    assert_eq!(quota(&mut talk).await, spent);

    // On the stream that is open, too.
    reconfigure(&program, &budget(16)).await;
    program.says(&["the models were read anew"]).await;
    talk.create(after(&cut.response_id, vec![user(LONG)])).await;
    let round = talk.round().await;
    assert!(
        is_spent(&round) && output_tokens(&round) == 6,
        "{:?}",
        round.done
    );

    let wrong = budget(1000).replace(
        "per = \"tenant\"",
        "per = \"tenant\"\nmodels = [\"absent\"]",
    );
    reconfigure(&program, &wrong).await;
    program
        .says(&["models stay as they are", "no model has the name absent"])
        .await;
    assert_eq!(quota(&mut talk).await, spent);
    talk.close().await;
}

/// Writes another configuration and has it read.
async fn reconfigure(program: &Program, config: &str) {
    std::fs::write(program.config(), config).unwrap();
    program.signal("HUP").await;
}
