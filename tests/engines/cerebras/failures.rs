//! What goes wrong, and whose it is then.

use std::time::Duration;

use super::*;

fn unavailable(reason: &str, retry_after_ms: Option<u64>) -> BackendError {
    BackendError::Unavailable {
        reason: reason.into(),
        retry_after: retry_after_ms.map(Duration::from_millis),
    }
}

fn refused(reason: &str) -> BackendError {
    BackendError::Refused {
        reason: reason.into(),
    }
}

fn failed(reason: &str) -> BackendError {
    BackendError::Failed {
        reason: reason.into(),
    }
}

#[tokio::test]
async fn too_much_is_told_with_the_time_to_wait() {
    let limits = [
        ("retry-after-ms", "800"),
        ("x-ratelimit-remaining-tokens-minute", "0"),
        ("x-ratelimit-reset-tokens-minute", "12.5"),
        ("x-request-id", "r"),
    ];
    let body = r#"{"message": "SECRET", "type": "too_many_requests_error",
        "param": "quota", "code": "request_quota_exceeded"}"#;
    let fake = Fake::new([Play::Status(429, limits.to_vec(), body)]).await;
    let backend = backend(&fake, "");
    assert!(backend.healthy());
    let reason = "status 429, too_many_requests_error, request_quota_exceeded, quota";
    assert_eq!(
        error(&backend, chat()).await,
        (0, unavailable(reason, Some(800)))
    );
    assert!(!backend.healthy());
    let limit = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(
        backend.rate_limits(),
        [
            limit("x-ratelimit-remaining-tokens-minute", "0"),
            limit("x-ratelimit-reset-tokens-minute", "12.5"),
        ]
    );
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(backend.healthy());
}

#[tokio::test]
async fn each_status_is_told_in_words_of_the_service_alone() {
    let body = r#"{"error": {"message": "you said SECRET", "type": "invalid_request_error",
        "param": "messages[0].content", "code": "SECRET is not allowed"}}"#;
    let words = "invalid_request_error, unnamed, messages[0].content";
    for status in [400, 404, 413, 422] {
        let fake = Fake::new([Play::Status(status, vec![], body)]).await;
        let reason = format!("status {status}, {words}");
        assert_eq!(
            error(&backend(&fake, ""), chat()).await,
            (0, refused(&reason))
        );
    }
    for status in [408, 500, 502, 503, 504] {
        let headers = vec![("retry-after", "2")];
        let fake = Fake::new([Play::Status(status, headers, "<html>SECRET</html>")]).await;
        let backend = backend(&fake, "");
        let reason = format!("status {status}");
        assert_eq!(
            error(&backend, chat()).await,
            (0, unavailable(&reason, Some(2_000)))
        );
        assert!(backend.healthy());
    }
}

#[tokio::test]
async fn a_refused_key_is_never_shown() {
    for status in [401, 402, 403] {
        let fake = Fake::new([Play::Status(status, vec![], "csk-very-secret")]).await;
        let backend = backend(&fake, "");
        let (_, error) = error(&backend, chat()).await;
        assert_eq!(error, unavailable("the service refuses the key", None));
        assert!(!backend.healthy());
        assert!(!format!("{backend:?}").contains("very-secret"));
    }
    let key = ApiKey::new(KEY).unwrap();
    assert_eq!(format!("{key:?}"), "ApiKey");
    for bad in ["", "  ", "a\nb", "schlüssel"] {
        let error = ApiKey::new(bad).unwrap_err().to_string();
        assert_eq!(error, "the key is empty or has characters that no key has");
    }
}

#[tokio::test]
async fn an_error_in_the_answer_breaks_it() {
    let error_event = json!({"error": {"message": "you said SECRET", "type": "server_error",
        "param": null, "code": null}, "status_code": 500});
    let fake = Fake::new([play([text("a"), error_event])]).await;
    let (chunks, broken) = error(&backend(&fake, ""), chat()).await;
    assert_eq!(
        (chunks, broken),
        (1, failed("the service broke off: status 500, server_error"))
    );
    let named = b"event: error\ndata: {\"message\": \"you said SECRET\"}\n\n".to_vec();
    for event in [
        named,
        b"data: {\"error\": \"you said SECRET\"}\n\n".to_vec(),
        b"data: {\"object\": \"error\", \"message\": \"SECRET\"}\n\n".to_vec(),
    ] {
        let fake = Fake::new([Play::Events(vec![Step::Bytes(event)])]).await;
        let broken = error(&backend(&fake, ""), chat()).await;
        assert_eq!(broken, (0, failed("the service broke off")));
    }
}

#[tokio::test]
async fn an_answer_without_its_end_is_broken() {
    let without_reason = failed("the answer ended without a reason");
    for steps in [
        events([text("a")]),
        [events([text("a")]), vec![done()]]
            .into_iter()
            .flatten()
            .collect(),
    ] {
        let fake = Fake::new([Play::Events(steps)]).await;
        let broken = error(&backend(&fake, ""), chat()).await;
        assert_eq!(broken, (1, without_reason.clone()));
    }
    let mut steps = events([text("a")]);
    steps.push(Step::Close);
    let fake = Fake::new([Play::Events(steps)]).await;
    assert_eq!(
        error(&backend(&fake, ""), chat()).await,
        (1, failed("the connection broke in the answer"))
    );
    let fake = Fake::new([play([text("a"), finish("tired")])]).await;
    assert_eq!(
        error(&backend(&fake, ""), chat()).await,
        (1, failed("the answer ended for the reason tired"))
    );
}

#[tokio::test]
async fn behind_its_end_an_answer_cannot_break() {
    for step in [Step::Close, Step::Bytes(Vec::new())] {
        let mut steps = events([text("a"), finish("stop")]);
        steps.push(step);
        let fake = Fake::new([Play::Events(steps)]).await;
        let (_, end) = answer(&backend(&fake, ""), chat()).await;
        assert_eq!(end, last(SampleEnd::Stop, None, None));
    }
}

#[tokio::test]
async fn what_is_no_chunk_breaks_the_answer() {
    let malformed = failed("the answer has an event that is not the JSON of a completion's chunk");
    for data in ["{\"choices\":", "17", "{\"choices\": [{\"delta\": 5}]}"] {
        let mut steps = events([text("a")]);
        steps.push(Step::Bytes(format!("data: {data}\n\n").into_bytes()));
        let fake = Fake::new([Play::Events(steps)]).await;
        let broken = error(&backend(&fake, ""), chat()).await;
        assert_eq!(broken, (1, malformed.clone()), "{data}");
    }
    let mut steps = events([text("a")]);
    steps.push(Step::Bytes(b"data: ".to_vec()));
    steps.extend((0..40).map(|_| Step::Bytes(vec![b'x'; 32 << 10])));
    let fake = Fake::new([Play::Events(steps)]).await;
    assert_eq!(
        error(&backend(&fake, ""), chat()).await,
        (
            1,
            failed("the answer is broken: an event is over 1048576 bytes")
        )
    );
    let second = json!({"choices": [{"index": 1, "delta": {"content": "b"}}]});
    let fake = Fake::new([play([second])]).await;
    assert_eq!(
        error(&backend(&fake, ""), chat()).await,
        (0, failed("the answer has a choice that was not asked for"))
    );
}

#[tokio::test]
async fn a_service_that_gives_no_tokens_is_found_out() {
    let event = json!({"choices": [{"index": 0, "text": "hello"}]});
    let fake = Fake::new([play([event])]).await;
    assert_eq!(
        error(&backend(&fake, "prompt = \"tokens\""), tokens()).await,
        (0, failed("the service tells text and no tokens"))
    );
}

#[tokio::test]
async fn who_does_not_answer_is_not_available() {
    let fake = Fake::new([Play::Silence]).await;
    let late = unavailable("no answer came in time", None);
    let quick = backend(&fake, "first_byte_ms = 100");
    assert_eq!(error(&quick, chat()).await, (0, late.clone()));

    let fake = Fake::new([Play::Events(vec![Step::Hang])]).await;
    let quick = backend(&fake, "first_byte_ms = 100");
    assert_eq!(error(&quick, chat()).await, (0, late));

    // A socket that is bound, and closed again, is one that nobody listens on.
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let fake = Fake::new([]).await;
    let url = format!("http://{}", socket.local_addr().unwrap());
    drop(socket);
    let options = CerebrasOptions {
        url,
        model: "m".into(),
        warm: false,
        ..CerebrasOptions::default()
    };
    assert_eq!(
        error(&Cerebras::new(options, None).unwrap(), chat()).await,
        (0, unavailable("no connection can be made", None))
    );
    assert_eq!(fake.connections(), 0);
}

#[tokio::test]
async fn an_answer_that_stops_coming_is_broken() {
    let mut steps = events([text("a")]);
    steps.push(Step::Hang);
    let fake = Fake::new([Play::Events(steps)]).await;
    assert_eq!(
        error(&backend(&fake, "idle_ms = 100"), chat()).await,
        (1, failed("the answer stopped coming"))
    );
    let drip = || Step::Bytes(b": still there\n\n".to_vec());
    let wait = || Step::Wait(Duration::from_millis(100));
    let steps = (0..40).flat_map(|_| [drip(), wait()]).collect();
    let fake = Fake::new([Play::Events(steps)]).await;
    assert_eq!(
        error(&backend(&fake, "sample_secs_max = 1"), chat()).await,
        (0, failed("the answer takes too long"))
    );
}

#[tokio::test]
async fn a_connection_that_is_closed_under_a_request_is_tried_once_more() {
    let fine = play([text("a"), finish("stop")]);
    let fake = Fake::new([Play::Close, fine]).await;
    let (_, end) = answer(&backend(&fake, ""), chat()).await;
    assert_eq!(end.finish, Some(SampleEnd::Stop));
    assert_eq!(fake.connections(), 2);

    let fake = Fake::new([Play::Close, Play::Close]).await;
    assert_eq!(
        error(&backend(&fake, ""), chat()).await,
        (
            0,
            unavailable("the connection broke before an answer", None)
        )
    );
}

#[tokio::test]
async fn what_the_service_does_not_take_is_refused_before_it_is_asked() {
    let fake = Fake::new([]).await;
    let mut prompt = tokens();
    prompt.sampling.top_k = 20;
    assert_eq!(
        error(&backend(&fake, "prompt = \"tokens\""), prompt).await,
        (0, refused("the service does not take top_k"))
    );
    assert!(fake.asked().is_empty());
}
