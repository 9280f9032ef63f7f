//! What is made of answers.

use std::time::Duration;

use super::*;

fn said(text: &str) -> Parsed {
    Parsed::Text(text.into())
}

fn called(name: &str, arguments: &str) -> [Parsed; 3] {
    [
        Parsed::CallBegin { name: name.into() },
        Parsed::CallArguments(arguments.into()),
        Parsed::CallEnd {
            arguments: arguments.into(),
        },
    ]
}

#[tokio::test]
async fn text_is_handed_out_as_it_comes() {
    let told = |text: &str| Chunk {
        told: Some(Box::new(Told {
            parsed: vec![said(text)],
            usage: None,
        })),
        ..Chunk::default()
    };
    let mut steps = events([delta(json!({"role": "assistant"})), text("Hel")]);
    steps.push(Step::Hang);
    let fake = Fake::new([Play::Events(steps)]).await;
    let first = backend(&fake, "").sample(chat()).next().await;
    assert_eq!(first, Some(Ok(told("Hel"))));

    // What one read brings is one chunk, the end of the answer too.
    let all = [text("Hel"), text("lo"), finish("stop"), usage()].map(|event| {
        match events([event]).remove(0) {
            Step::Bytes(bytes) => bytes,
            Step::Wait(_) | Step::Close | Step::Hang => unreachable!(),
        }
    });
    let fake = Fake::new([Play::Events(vec![Step::Bytes(all.concat())])]).await;
    let mut whole = last(SampleEnd::Stop, counted(50, 7, 3), Some(40));
    whole.told.as_mut().unwrap().parsed = vec![said("Hel"), said("lo")];
    assert_eq!(sampled(&backend(&fake, ""), chat()).await, [Ok(whole)]);
}

#[tokio::test]
async fn reasoning_is_told_under_each_of_its_names() {
    for name in ["reasoning", "reasoning_content"] {
        let fake = Fake::new([play([
            delta(json!({"content": "", name: "hm"})),
            delta(json!({"content": null, name: "m"})),
            text("so"),
            finish("stop"),
            usage(),
        ])])
        .await;
        assert_eq!(
            answer(&backend(&fake, ""), chat()).await,
            (
                vec![Parsed::Reasoning("hmm".into()), said("so")],
                last(SampleEnd::Stop, counted(50, 7, 3), Some(40))
            )
        );
    }
}

#[tokio::test]
async fn calls_come_whole_in_fragments_and_in_turns() {
    let whole = vec![
        text("a"),
        call(0, "1", "look", "{\"x\": 1}"),
        call(1, "2", "go", "{}"),
    ];
    let fragments = vec![
        text("a"),
        call(0, "1", "look", ""),
        more(0, "{\"x\""),
        more(0, ": 1}"),
        call(1, "2", "go", ""),
    ];
    let in_turns = vec![
        text("a"),
        call(0, "1", "look", ""),
        call(1, "2", "go", "{"),
        more(0, "{\"x\": "),
        more(1, "}"),
        more(0, "1}"),
    ];
    let mut expected = vec![said("a")];
    expected.extend(called("look", "{\"x\": 1}"));
    expected.extend(called("go", "{}"));
    for mut deltas in [whole, fragments, in_turns] {
        deltas.extend([finish("tool_calls"), usage()]);
        let fake = Fake::new([play(deltas)]).await;
        assert_eq!(
            answer(&backend(&fake, ""), chat()).await,
            (
                expected.clone(),
                last(SampleEnd::Stop, counted(50, 7, 3), Some(40))
            )
        );
    }
}

#[tokio::test]
async fn a_call_is_handed_out_before_the_answer_ends() {
    let mut steps = events([call(0, "1", "look", "{}")]);
    steps.push(Step::Hang);
    let fake = Fake::new([Play::Events(steps)]).await;
    let first = backend(&fake, "").sample(chat()).next().await;
    let parsed = first.unwrap().unwrap().told.unwrap().parsed;
    assert_eq!(parsed, called("look", "{}"));
}

#[tokio::test]
async fn where_one_call_is_allowed_its_end_comes_with_what_it_cost() {
    let fake = Fake::new([play([
        call(0, "1", "look", "{}"),
        finish("tool_calls"),
        usage(),
    ])])
    .await;
    let mut prompt = chat();
    let chat = prompt.chat.as_mut().unwrap();
    chat.settings = Arc::new(Settings {
        parallel_tool_calls: Some(false),
        ..(*chat.settings).clone()
    });
    let mut chunks = sampled(&backend(&fake, ""), prompt).await;
    let last = chunks.pop().unwrap().unwrap();
    let told = last.told.unwrap();
    assert_eq!(told.usage, counted(50, 7, 3));
    assert_eq!(told.parsed.last(), Some(&called("look", "{}")[2]));
}

#[tokio::test]
async fn usage_and_times_may_stand_anywhere() {
    let with = |mut event: Value, others: &[&Value]| {
        for other in others {
            let other = other.as_object().unwrap().clone();
            let fields = other.into_iter().filter(|(key, _)| key != "choices");
            event.as_object_mut().unwrap().extend(fields);
        }
        event
    };
    let times = json!({"time_info": {"queue_time": 0.1, "prompt_time": 0.2, "created": 3}});
    let early = json!({"choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 1}});
    let full = last(SampleEnd::Length, counted(50, 7, 3), Some(40));
    let bare = last(SampleEnd::Length, None, None);
    for (deltas, end) in [
        (
            vec![text("a"), with(finish("length"), &[&usage(), &times])],
            &full,
        ),
        (
            vec![text("a"), finish("length"), usage(), times.clone()],
            &full,
        ),
        (
            vec![
                text("a"),
                finish("length"),
                json!({"usage": usage()["usage"]}),
            ],
            &full,
        ),
        (
            vec![early.clone(), text("a"), finish("length"), usage()],
            &full,
        ),
        (
            vec![times, with(text("a"), &[&usage()]), finish("length")],
            &full,
        ),
        (vec![text("a"), finish("length")], &bare),
    ] {
        for ends in [true, false] {
            let mut steps = events(deltas.clone());
            steps.extend(ends.then(done));
            let fake = Fake::new([Play::Events(steps)]).await;
            assert_eq!(
                answer(&backend(&fake, ""), chat()).await,
                (vec![said("a")], end.clone()),
                "{deltas:?}"
            );
        }
    }
}

#[tokio::test]
async fn each_reason_to_end_is_told() {
    for (reason, end) in [
        ("stop", SampleEnd::Stop),
        ("tool_calls", SampleEnd::Stop),
        ("length", SampleEnd::Length),
        ("content_filter", SampleEnd::ContentFilter),
    ] {
        let fake = Fake::new([play([finish(reason)])]).await;
        let (parsed, chunk) = answer(&backend(&fake, ""), chat()).await;
        assert_eq!((parsed, chunk), (vec![], last(end, None, None)));
    }
}

#[tokio::test]
async fn an_answer_byte_by_byte_is_the_same() {
    let all: String = [text("é: "), text("{\"x\"}"), finish("stop"), usage()]
        .iter()
        .map(|event| format!(": comment\r\ndata: {event}\r\n\r\n"))
        .collect();
    let bytes = all.into_bytes().into_iter();
    let fake = Fake::new([Play::Events(
        bytes.map(|byte| Step::Bytes(vec![byte])).collect(),
    )])
    .await;
    assert_eq!(
        answer(&backend(&fake, ""), chat()).await,
        (
            vec![said("é: {\"x\"}")],
            last(SampleEnd::Stop, counted(50, 7, 3), Some(40))
        )
    );
}

#[tokio::test]
async fn a_slow_drip_is_waited_for() {
    let mut steps = Vec::new();
    for event in "abcdefgh"
        .chars()
        .map(|it| text(&it.to_string()))
        .chain([finish("stop")])
    {
        steps.push(Step::Wait(Duration::from_millis(100)));
        steps.extend(events([event]));
    }
    let fake = Fake::new([Play::Events(steps)]).await;
    let backend = backend(&fake, "first_byte_ms = 700\nidle_ms = 700");
    let (parsed, _) = answer(&backend, chat()).await;
    assert_eq!(parsed, [said("abcdefgh")]);
}

/// The tokens of an answer, and its last chunk without them.
async fn sampled_tokens(fake: &Fake, toml: &str) -> (Vec<u32>, Chunk) {
    let backend = backend(fake, &format!("prompt = \"tokens\"\n{toml}"));
    let chunks = sampled(&backend, tokens()).await;
    let chunks: Vec<Chunk> = chunks.into_iter().map(Result::unwrap).collect();
    let ids = chunks.iter().flat_map(|chunk| chunk.tokens.clone());
    let last = Chunk {
        tokens: Vec::new(),
        ..chunks.last().unwrap().clone()
    };
    (ids.collect(), last)
}

#[tokio::test]
async fn tokens_come_as_they_were_sampled() {
    let end = Chunk {
        cached_tokens: Some(40),
        finish: Some(SampleEnd::Stop),
        ..Chunk::default()
    };
    let tokens = |name: &str, ids: Value, reason: Value| json!({"choices": [{"index": 0, "text": "", name: ids, "finish_reason": reason}]});
    for (name, toml) in [("tokens", ""), ("token_ids", "dialect = \"vllm\"")] {
        let fake = Fake::new([play([
            tokens(name, json!([5, 6]), Value::Null),
            tokens(name, json!([7, 9]), json!("stop")),
            usage(),
        ])])
        .await;
        assert_eq!(
            sampled_tokens(&fake, toml).await,
            (vec![5, 6, 7, 9], end.clone())
        );
    }
    let in_delta = delta(json!({"tokens": [5]}));
    let fake = Fake::new([play([in_delta, finish("stop"), usage()])]).await;
    assert_eq!(sampled_tokens(&fake, "").await, (vec![5], end));
}

#[tokio::test]
async fn no_token_comes_behind_an_end_token_or_the_most_that_were_asked_for() {
    let tokens = |ids: Vec<u32>| json!({"choices": [{"index": 0, "tokens": ids}]});
    let end = |finish| Chunk {
        finish: Some(finish),
        ..Chunk::default()
    };
    let fake = Fake::new([play([tokens(vec![5, 9, 5]), tokens(vec![5])])]).await;
    assert_eq!(
        sampled_tokens(&fake, "").await,
        (vec![5, 9], end(SampleEnd::Stop))
    );
    let fake = Fake::new([play([tokens(vec![5; 99]), tokens(vec![6; 99])])]).await;
    let (ids, last) = sampled_tokens(&fake, "").await;
    assert_eq!((ids.len(), last), (100, end(SampleEnd::Length)));

    // The service that goes on is stopped, and one that says no more is not waited for.
    let mut steps = events([tokens(vec![9]), tokens(vec![5])]);
    steps.push(Step::Hang);
    let fake = Fake::new([Play::Events(steps)]).await;
    let ended = (vec![9], end(SampleEnd::Stop));
    assert_eq!(sampled_tokens(&fake, "").await, ended);
    fake.answer_dropped().await;
    let mut steps = events([tokens(vec![9])]);
    steps.push(Step::Hang);
    let fake = Fake::new([Play::Events(steps)]).await;
    assert_eq!(sampled_tokens(&fake, "").await, ended);
}

#[tokio::test]
async fn a_long_prompt_that_comes_back_with_the_first_event_is_no_long_event() {
    let ids = vec![100_000; 200_000];
    let first = json!({"choices": [{"index": 0, "token_ids": [], "prompt_token_ids": ids}]});
    assert!(first.to_string().len() > 1 << 20);
    let second = json!({"choices": [{"index": 0, "token_ids": [5], "finish_reason": "length"}]});
    let fake = Fake::new([play([first, second])]).await;
    let backend = backend(&fake, "prompt = \"tokens\"\ndialect = \"vllm\"");
    let prompt = Prompt {
        tokens: rope(&ids),
        ..tokens()
    };
    let chunks = sampled(&backend, prompt).await;
    let ids = chunks.into_iter().flat_map(|chunk| chunk.unwrap().tokens);
    assert_eq!(ids.collect::<Vec<u32>>(), [5]);
}
