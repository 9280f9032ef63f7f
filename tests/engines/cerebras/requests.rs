//! What is sent, and over which connections.

use hyper::Version;

use super::*;

fn finished() -> Play {
    play([text("a"), finish("stop"), usage()])
}

fn chat_request(key: &Value) -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    json!({
        "model": "m", "stream": true, "stream_options": {"include_usage": true},
        "max_completion_tokens": 100, "reasoning_format": "parsed", "clear_thinking": false,
        "prompt_cache_key": key, "tools": [tool("look"), tool("go")],
        "messages": [{"role": "user", "content": "hi"}],
    })
}

#[tokio::test]
async fn a_prompt_of_messages_is_one_request() {
    let fake = Fake::new([finished()]).await;
    let backend = backend(&fake, "queue_threshold_ms = 500\n[headers]\nx-team = \"a\"");
    answer(&backend, chat()).await;
    let [asked] = fake.asked().try_into().ok().unwrap();
    assert_eq!(
        (&*asked.method, &*asked.path),
        ("POST", "/v1/chat/completions")
    );
    assert_eq!(asked.version, Version::HTTP_11);
    for (name, value) in [
        ("authorization", "Bearer csk-very-secret"),
        ("content-type", "application/json"),
        ("accept", "text/event-stream"),
        ("x-cerebras-version-patch", "2"),
        ("queue_threshold", "500"),
        ("x-team", "a"),
        ("content-encoding", ""),
        ("transfer-encoding", ""),
    ] {
        assert_eq!(asked.header(name), value, "{name}");
    }
    let length: usize = asked.header("content-length").parse().unwrap();
    assert_eq!(length, asked.body.to_string().len());
    let key = &asked.body["prompt_cache_key"];
    assert_eq!(key.as_str().unwrap().len(), 32);
    assert_eq!(asked.body, chat_request(key));
}

#[tokio::test]
async fn a_long_conversation_arrives_whole_compressed_or_not() {
    let mut prompt = chat();
    let messages = (0..20_000).map(|n| ChatMessage {
        object: format!(r#"{{"role":"assistant","content":"message {n}""#).into(),
        reasoning: Some(format!("\"thought {n}\"").into()),
    });
    prompt.chat.as_mut().unwrap().messages = messages.collect();
    let expected: Vec<Value> = (0..20_000)
        .map(|n| {
            json!({"role": "assistant", "content": format!("message {n}"),
                "reasoning": format!("thought {n}")})
        })
        .collect();
    for (toml, encoding) in [
        ("", ""),
        ("gzip = true", "gzip"),
        ("http2_prior_knowledge = true", ""),
        ("http2_prior_knowledge = true\ngzip = true", "gzip"),
    ] {
        let fake = Fake::new([finished()]).await;
        answer(&backend(&fake, toml), prompt.clone()).await;
        let [asked] = fake.asked().try_into().ok().unwrap();
        assert_eq!(asked.header("content-encoding"), encoding);
        assert!(asked.body["messages"] == Value::from(expected.clone()));
    }
}

#[tokio::test]
async fn a_prompt_of_tokens_is_the_same_in_each_form() {
    for form in ["json", "msgpack"] {
        for gzip in [false, true] {
            let tokens_event = json!({"choices": [{"index": 0, "tokens": [5, 9]}]});
            let fake = Fake::new([play([tokens_event, finish("stop")])]).await;
            let toml = format!("prompt = \"tokens\"\nbody = \"{form}\"\ngzip = {gzip}");
            sampled(&backend(&fake, &toml), tokens()).await;
            let [asked] = fake.asked().try_into().ok().unwrap();
            assert_eq!(asked.path, "/v1/completions");
            assert_eq!(
                asked.header("content-encoding"),
                if gzip { "gzip" } else { "" }
            );
            assert_eq!(
                asked.body,
                json!({
                    "model": "m", "stream": true, "stream_options": {"include_usage": true},
                    "max_tokens": 100, "temperature": 0.0, "return_raw_tokens": true,
                    "prompt": [1, 2, 300, 70_000],
                }),
                "{form}, gzip {gzip}"
            );
        }
    }
}

#[tokio::test]
async fn connections_are_made_in_advance_and_used_again() {
    let plays = [finished(), finished(), finished()];
    let fake = Fake::new(plays).await;
    let backend = backend(&fake, "warm = true");
    // Until the connection made in advance is free for others.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    for _ in 0..3 {
        answer(&backend, chat()).await;
        // The rest of the answer is read in the background.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let paths: Vec<String> = fake.asked().into_iter().map(|it| it.path).collect();
    let samples = ["/v1/chat/completions"; 3];
    assert_eq!(paths, [&["/v1/tcp_warming"], &samples[..]].concat());
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn samples_share_one_connection_of_http2() {
    let fake = Fake::new((0..8).map(|_| finished())).await;
    let backend = backend(&fake, "http2_prior_knowledge = true");
    answer(&backend, chat()).await;
    let samples = (0..7).map(|_| answer(&backend, chat()));
    let answers = futures::future::join_all(samples).await;
    assert_eq!(answers.len(), 7);
    assert!(fake.asked().iter().all(|it| it.version == Version::HTTP_2));
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn dropping_a_sample_ends_its_request() {
    for toml in ["", "http2_prior_knowledge = true"] {
        let mut steps = events([text("a")]);
        steps.push(Step::Hang);
        let fake = Fake::new([Play::Events(steps)]).await;
        let mut chunks = backend(&fake, toml).sample(chat());
        assert!(chunks.next().await.unwrap().is_ok());
        drop(chunks);
        fake.answer_dropped().await;
    }
}

#[tokio::test]
async fn other_services_are_told_nothing_of_cerebras() {
    let fake = Fake::new([finished()]).await;
    let toml = "dialect = \"openai\"\ncache_key = false\nmax_tokens_key = \"max_tokens\"\n\
                [extra]\ntop_a = 0.5\n";
    answer(&backend(&fake, toml), chat()).await;
    let [asked] = fake.asked().try_into().ok().unwrap();
    assert_eq!(asked.header("x-cerebras-version-patch"), "");
    let mut expected = chat_request(&Value::Null);
    let fields = expected.as_object_mut().unwrap();
    for own in [
        "reasoning_format",
        "clear_thinking",
        "prompt_cache_key",
        "max_completion_tokens",
    ] {
        fields.remove(own);
    }
    fields.insert("max_tokens".into(), json!(100));
    fields.insert("top_a".into(), json!(0.5));
    assert_eq!(asked.body, expected);
}

#[tokio::test]
async fn what_it_can_is_told() {
    let fake = Fake::new([]).await;
    let chat = backend(&fake, "").capabilities();
    assert_eq!(
        (chat.kind, chat.keeps_cache, chat.prefill),
        ("cerebras", true, false)
    );
    assert!(chat.reads_messages && chat.constrained_sampling && chat.sampling);
    assert!(!chat.logprobs && !chat.reads_items);
    let tokens = backend(&fake, "prompt = \"tokens\"").capabilities();
    assert!(!tokens.reads_messages && !tokens.constrained_sampling && tokens.sampling);
}
