//! What a well-behaved client does on a stream.

use hotloop::proto::{
    ConnectResponse, Create, IncompleteReason, OnDisconnect, ResponseStatus, Retry,
    connect_response::Event, item,
};

use crate::{
    client::{
        Client, Round, Talk, after, chained_rollout, held_rollout, hold, on, output, say, user,
    },
    program::{Program, Serve},
    wire::Wire,
};

const STEPS: usize = 24;

async fn start() -> (Program, Client) {
    let program = Serve::new().start().await;
    let client = Client::of(&program).await;
    (program, client)
}

/// Whether each step added only what was new, and found the tokens of the past as they were.
fn check_rollout(rounds: &[Round]) {
    let steps: Vec<String> = rounds
        .iter()
        .flat_map(|round| &round.calls)
        .map(|call| call.arguments.clone())
        .collect();
    let expected: Vec<String> = (0..STEPS).map(|n| format!(r#"{{"n": {n}}}"#)).collect();
    assert_eq!(steps, expected);
    assert_eq!(rounds[STEPS].text, format!("finished {STEPS} steps"));
    let mut sampled = 0;
    for pair in rounds.windows(2) {
        let [earlier, later] = pair else {
            unreachable!()
        };
        let (was, is) = (
            earlier.done.prompt.clone().unwrap(),
            later.done.prompt.clone().unwrap(),
        );
        assert!(is.extends_previous, "{is:?}");
        assert_eq!(is.dropped_tokens, 0);
        assert!(is.reused_tokens > was.tokens, "{is:?} after {was:?}");
        // The time goes by the tokens that are new, never by those of the history.
        assert!(is.encoded_tokens < 60, "{is:?}");
        assert!(is.sampled_tokens > sampled, "{is:?}");
        sampled = is.sampled_tokens;
    }
}

#[tokio::test]
async fn a_held_rollout_is_one_response() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    let rounds = held_rollout(&mut talk, STEPS).await;
    check_rollout(&rounds);
    for round in &rounds {
        assert_eq!(round.response_id, rounds[0].response_id);
    }
    let (last, held) = rounds.split_last().unwrap();
    for round in held {
        assert_eq!(round.done.status(), ResponseStatus::AwaitingInput);
        assert_eq!(round.done.call_ids, [round.calls[0].call_id.clone()]);
    }
    assert_eq!(last.done.status(), ResponseStatus::Completed);
    assert_eq!(last.done.usage.unwrap().samples as usize, STEPS + 1);
    assert_eq!(last.done.output_item_ids.len(), STEPS + 1);
    talk.close().await;
}

#[tokio::test]
async fn a_chained_rollout_is_a_response_a_step() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    let rounds = chained_rollout(&mut talk, STEPS).await;
    check_rollout(&rounds);
    for pair in rounds.windows(2) {
        let [earlier, later] = pair else {
            unreachable!()
        };
        assert!(later.response_id != earlier.response_id);
        let Some(Event::Created(created)) = &later.messages[0].event else {
            panic!("not created: {:?}", later.messages[0]);
        };
        assert_eq!(created.previous_response_id, earlier.response_id);
        assert_eq!(later.done.usage.unwrap().samples, 1);
    }
    talk.close().await;
}

#[tokio::test]
async fn both_styles_show_the_model_the_same_tokens() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    // Call ids are made by the server and no part of this prompt, so outputs without them are the same.
    let same = |round: &Round| -> Vec<_> {
        let mut calls = round.calls.clone();
        let outputs = calls.iter_mut().map(|call| {
            let call_id = std::mem::replace(&mut call.call_id, "any".into());
            let mut item = output(call);
            if let Some(item::Item::FunctionCallOutput(output)) = &mut item.item {
                output.call_id = call_id;
            }
            item
        });
        outputs.collect()
    };
    let chained = talk.answer(say("parallel 3")).await;
    let next = after(&chained.response_id, same(&chained));
    let chained = talk.answer(next).await;
    talk.create(hold("parallel 3")).await;
    let held = talk.round().await;
    talk.append(&held.response_id, same(&held)).await;
    let held = talk.round().await;
    assert_eq!(
        held.text,
        "collected: output of any,output of any,output of any"
    );
    assert_eq!(
        held.done.prompt.unwrap().fingerprint,
        chained.done.prompt.unwrap().fingerprint
    );
    talk.close().await;
}

/// The messages of a lane up to the one whose response has ended for good.
async fn run_on(talk: &mut Talk, lane: &str) -> (Round, Vec<u64>) {
    let mut numbers = Vec::new();
    loop {
        let round = talk.round_on(lane).await;
        numbers.extend(round.messages.iter().map(|message| message.sequence_number));
        if round.done.status() != ResponseStatus::AwaitingInput {
            return (round, numbers);
        }
        talk.append(&round.response_id, round.outputs()).await;
    }
}

#[tokio::test]
async fn lanes_run_at_once() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    // Sampled for about a second, while the other lane runs a whole rollout.
    talk.create_on("slow", on("paced", say("slow 60"))).await;
    talk.create_on("quick", hold("rollout 20")).await;
    let (quick, mut quick_numbers) = run_on(&mut talk, "quick").await;
    assert_eq!(quick.text, "finished 20 steps");
    let (slow, slow_numbers) = run_on(&mut talk, "slow").await;
    assert!(slow.text.ends_with("word59 "), "{}", slow.text);
    assert!(quick_numbers.last() < slow_numbers.last());
    assert!(slow_numbers[0] < quick_numbers[quick_numbers.len() - 1]);
    // One cursor serves both.
    quick_numbers.extend(slow_numbers);
    quick_numbers.sort_unstable();
    let all: Vec<u64> = (1..=quick_numbers.len() as u64).collect();
    assert_eq!(quick_numbers, all);
    talk.close().await;
}

#[tokio::test]
async fn any_response_can_be_forked() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    let root = talk.answer(say("echo root")).await;
    let left = talk
        .answer(after(&root.response_id, vec![user("echo left")]))
        .await;
    let right = talk
        .answer(after(&root.response_id, vec![user("echo right")]))
        .await;
    // Long after the root was continued, and on another lane.
    let create = after(&root.response_id, vec![user("echo third")]);
    talk.create_on("other", create).await;
    let third = talk.round_on("other").await;
    let deeper = talk
        .answer(after(&left.response_id, vec![user("echo deeper")]))
        .await;
    let texts = [&left, &right, &third, &deeper].map(|round| round.text.as_str());
    assert_eq!(texts, ["left", "right", "third", "deeper"]);
    let tokens = |round: &Round| round.done.prompt.clone().unwrap();
    assert_eq!(tokens(&left).reused_tokens, tokens(&right).reused_tokens);
    assert!(tokens(&left).reused_tokens > tokens(&root).tokens);
    talk.close().await;
}

#[tokio::test]
async fn a_cancelled_response_leaves_nothing_but_its_charge() {
    let (program, client) = start().await;
    let mut talk = client.stream().await;
    talk.create(on("paced", say("slow 5000"))).await;
    let is_delta = |event: &Event| matches!(event, Event::OutputTextDelta(_));
    let messages = talk.until("", is_delta).await;
    let id = messages[0].response_id.clone();
    let cancel = talk.cancel(&id).await;
    let ended = talk.round().await;
    assert_eq!(ended.done.status(), ResponseStatus::Cancelled);
    let last = ended.messages.last().unwrap();
    assert_eq!((&last.response_id, &last.request_id), (&id, &cancel));
    let tokens = ended.done.usage.unwrap().output_tokens;
    assert!(tokens > 0 && tokens < 5000, "{tokens}");

    let sent = talk.create(after(&id, vec![user("echo lost")])).await;
    let refusal = talk.refusal(&sent).await;
    assert_eq!(refusal.code, "previous_response_not_found");
    assert_eq!(refusal.retry(), Retry::ResendFull);
    let sent = talk.cancel(&id).await;
    assert_eq!(talk.refusal(&sent).await.code, "response_not_open");
    assert_eq!(
        client.get_response(&id).await.unwrap_err().code(),
        tonic::Code::NotFound
    );
    program
        .says(&[
            &id,
            "usage",
            "cancelled",
            &format!("output_tokens={tokens} "),
        ])
        .await;
    assert_eq!(talk.answer(say("echo alive")).await.text, "alive");
    talk.close().await;
}

#[tokio::test]
async fn a_held_response_can_be_finished_as_it_stands() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    talk.create(hold("rollout 3")).await;
    let held = talk.round().await;
    talk.finish(&held.response_id).await;
    let ended = talk.round().await;
    assert_eq!(ended.done.status(), ResponseStatus::Completed);
    assert_eq!(ended.done.call_ids, [held.calls[0].call_id.clone()]);
    let sent = talk.append(&held.response_id, held.outputs()).await;
    assert_eq!(talk.refusal(&sent).await.code, "response_not_open");
    let next = talk.answer(after(&held.response_id, held.outputs())).await;
    assert_eq!(next.calls[0].arguments, r#"{"n": 1}"#);
    talk.close().await;
}

#[tokio::test]
async fn an_output_may_come_while_the_model_still_samples() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    talk.create(on("paced", hold("parallel 4"))).await;
    let mut early = Vec::new();
    let answer = loop {
        let message = talk.next().await;
        match message.event.unwrap() {
            Event::OutputItemDone(whole) => {
                if let Some(item::Item::FunctionCall(call)) = whole.item.unwrap().item {
                    talk.append(&message.response_id, vec![output(&call)]).await;
                    early.push(call.call_id);
                }
            }
            Event::Done(done) if done.status() == ResponseStatus::Completed => break done,
            Event::Done(done) => assert_eq!(done.status(), ResponseStatus::AwaitingInput),
            Event::Error(error) => panic!("refused: {error:?}"),
            _ => {}
        }
    };
    assert_eq!(early.len(), 4);
    assert_eq!(answer.usage.unwrap().samples, 2);
    talk.close().await;
}

#[tokio::test]
async fn a_message_steers_while_the_model_samples() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    talk.create(on("paced", say("slow 30"))).await;
    let is_delta = |event: &Event| matches!(event, Event::OutputTextDelta(_));
    let mut messages = talk.until("", is_delta).await;
    let id = messages[0].response_id.clone();
    talk.append(&id, vec![user("echo steered")]).await;
    let is_done = |event: &Event| matches!(event, Event::Done(_));
    messages.extend(talk.until("", is_done).await);
    let round = Round::of(messages);
    assert!(round.text.starts_with("word0 "), "{}", round.text);
    assert!(round.text.ends_with("word29 steered"), "{}", round.text);
    assert_eq!(round.done.usage.unwrap().samples, 2);
    talk.close().await;
}

#[tokio::test]
async fn a_new_stream_goes_on_where_a_dropped_one_was() {
    let program = Serve::new().start().await;
    let (wire, client) = Wire::to(&program).await;
    let mut talk = client.stream().await;
    let first = talk.answer(say("rollout 3")).await;
    talk.create(hold("rollout 3")).await;
    let held = talk.round().await;
    wire.cut();

    // What has ended can be found at every moment from here on.
    let client = Client::of(&program).await;
    let mut talk = client.stream().await;
    let second = talk
        .answer(after(&first.response_id, first.outputs()))
        .await;
    assert_eq!(second.calls[0].arguments, r#"{"n": 1}"#);
    let prompt = second.done.prompt.unwrap();
    assert!(
        prompt.extends_previous && prompt.encoded_tokens < 60,
        "{prompt:?}"
    );

    // The held response ends as it stands when its stream is seen to be gone.
    program
        .says(&[&held.response_id, "usage", "incomplete"])
        .await;
    let next = talk.answer(after(&held.response_id, held.outputs())).await;
    assert_eq!(next.calls[0].arguments, r#"{"n": 1}"#);
    let end = client.get_response(&held.response_id).await.unwrap();
    assert_eq!(end.status(), ResponseStatus::Incomplete);
    assert_eq!(end.incomplete_reason(), IncompleteReason::Interrupted);
    assert_eq!(end.call_ids, [held.calls[0].call_id.clone()]);

    let sent = talk
        .create(after("resp_unknown", vec![user("echo x")]))
        .await;
    let refusal = talk.refusal(&sent).await;
    assert_eq!(refusal.code, "previous_response_not_found");
    assert_eq!(refusal.param, "create.previous_response_id");
    assert_eq!(refusal.retry(), Retry::ResendFull);
    talk.close().await;
}

/// The client is gone in the middle of a sample: what was sampled is there, and charged once.
#[tokio::test]
async fn a_response_whose_client_is_gone_keeps_what_was_sampled() {
    let program = Serve::new().start().await;
    let is_delta = |event: &Event| matches!(event, Event::OutputTextDelta(_));
    let mut gone = Vec::new();
    for (on_disconnect, text, end) in [
        (OnDisconnect::Stop, "slow 5000", "incomplete"),
        (OnDisconnect::Continue, "slow 30", "completed"),
    ] {
        let (wire, client) = Wire::to(&program).await;
        let mut talk = client.stream().await;
        let create = Create {
            on_disconnect: on_disconnect.into(),
            ..on("paced", say(text))
        };
        talk.create(create).await;
        let id = talk.until("", is_delta).await[0].response_id.clone();
        wire.cut();
        program.says(&[&id, "usage", end]).await;
        gone.push(id);
    }

    let client = Client::of(&program).await;
    let mut talk = client.stream().await;
    for id in &gone {
        let again = talk.answer(after(id, vec![user("echo back")])).await;
        assert_eq!(again.text, "back");
        let prompt = again.done.prompt.unwrap();
        assert!(
            prompt.extends_previous && prompt.sampled_tokens > 0,
            "{prompt:?}"
        );
        assert_eq!(program.said(&[id, "usage"]).len(), 1);
    }
    let stopped = client.get_response(&gone[0]).await.unwrap();
    assert_eq!(stopped.status(), ResponseStatus::Incomplete);
    assert_eq!(stopped.incomplete_reason(), IncompleteReason::Interrupted);
    let continued = client.get_response(&gone[1]).await.unwrap();
    assert_eq!(continued.status(), ResponseStatus::Completed);
    talk.close().await;
}

#[tokio::test]
async fn tenants_know_nothing_of_each_other() {
    let program = Serve::new()
        .keys("ada:0123456789abcdef,ada:second-key-of-ada,bob:fedcba9876543210")
        .start()
        .await;
    let nobody = Client::of(&program).await;
    let (ada, bob) = (
        nobody.with_key("0123456789abcdef"),
        nobody.with_key("fedcba9876543210"),
    );
    let mut talk = ada.stream().await;
    let secret = talk.answer(say("echo secret")).await;

    let mut other = bob.stream().await;
    let sent = other
        .create(after(&secret.response_id, vec![user("echo x")]))
        .await;
    assert_eq!(
        other.refusal(&sent).await.code,
        "previous_response_not_found"
    );
    let Some(Event::OutputItemDone(whole)) = find(&secret.messages, |event| {
        matches!(event, Event::OutputItemDone(_))
    }) else {
        unreachable!()
    };
    let reference = hotloop::proto::Item {
        item: Some(item::Item::ItemReference(hotloop::proto::ItemReference {
            id: whole.item.unwrap().id,
        })),
        ..Default::default()
    };
    let sent = other
        .create(Create {
            input: vec![reference.clone(), user("echo x")],
            ..Create::default()
        })
        .await;
    assert_eq!(other.refusal(&sent).await.code, "invalid_request");
    let status = bob.get_response(&secret.response_id).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
    other.close().await;

    // Another key of the same tenant opens the same door.
    let mut again = nobody.with_key("second-key-of-ada").stream().await;
    let create = after(&secret.response_id, vec![reference, user("echo mine")]);
    assert_eq!(again.answer(create).await.text, "mine");
    again.close().await;
    talk.close().await;
}

fn find(messages: &[ConnectResponse], wanted: impl Fn(&Event) -> bool) -> Option<Event> {
    let mut events = messages.iter().filter_map(|message| message.event.clone());
    events.find(wanted)
}
