//! The `gpu` backend against engines of all dialects.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use hotloop::{
    backend::{
        Backend as _, BackendError, Chunk, Prompt, SampleEnd, Sampling,
        gpu::{Constrained, DialectChoice, Gpu, GpuError, GpuOptions},
    },
    files::{BuiltIn, Files},
    item::{ResponseId, TokenLogprob},
    ledger::{Draft, Rope},
    model::Artifacts,
    parse::Grammar,
};
use tokio::{net::TcpListener, time::timeout};
use tonic::Status;

use crate::fake::{Act, Asked, CACHED, DIALECTS, Facts, Fake};

/// Long enough that reaching it is a failure, also on a busy machine.
const NEVER: Duration = Duration::from_secs(30);

fn artifacts() -> Arc<Artifacts> {
    let files = Files::BuiltIn(BuiltIn::SimAgent);
    Arc::new(Artifacts::load(&files, None).unwrap())
}

/// What an engine says that has the model of these files.
fn facts(artifacts: &Artifacts) -> Facts {
    Facts {
        context_length: 4096,
        vocab_size: u32::try_from(artifacts.tokenizer.vocab_size()).unwrap() + 64,
        end_token: artifacts.end_tokens[0],
    }
}

fn options(fake: &Fake) -> GpuOptions {
    GpuOptions {
        health_ms: 50,
        ..GpuOptions::new(fake.url())
    }
}

/// The engine, asked what it is.
async fn connect(options: GpuOptions) -> Gpu {
    let gpu = Gpu::new(options, None, artifacts()).unwrap();
    assert_eq!(gpu.connect().await, Ok(Some(4096)));
    gpu
}

async fn started(
    dialect: DialectChoice,
    script: impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static,
) -> (Fake, Gpu) {
    let fake = Fake::start(dialect, facts(&artifacts()), script).await;
    let gpu = connect(options(&fake)).await;
    (fake, gpu)
}

/// A prompt of several segments, some of them sampled.
fn prompt(ids: &[u32], sampling: Sampling) -> Prompt {
    let mut tokens = Rope::default();
    for (index, part) in ids.chunks(3).enumerate() {
        let draft = Draft {
            ids: part.to_vec(),
            ..Draft::default()
        };
        tokens = match index % 2 {
            0 => tokens.with_rendered(draft),
            _ => tokens.with_sampled(draft),
        };
    }
    Prompt {
        response_id: ResponseId::from("resp_1"),
        tenant: "acme".into(),
        affinity: "root".into(),
        tokens,
        recent: Vec::new(),
        chat: None,
        sampling,
    }
}

fn short(sampling: Sampling) -> Prompt {
    prompt(&[1, 2, 3, 300, 70_000, 4, 5], sampling)
}

/// All chunks of a sample, or the error that it ends with.
async fn all(gpu: &Gpu, prompt: Prompt) -> Result<Vec<Chunk>, BackendError> {
    let chunks = gpu.sample(prompt).collect::<Vec<_>>();
    let chunks = timeout(NEVER, chunks).await.expect("the sample never ends");
    chunks.into_iter().collect()
}

fn tokens(chunks: &[Chunk]) -> Vec<u32> {
    chunks
        .iter()
        .flat_map(|chunk| chunk.tokens.clone())
        .collect()
}

fn says(tokens: &[u32], end: &'static str) -> Vec<Act> {
    let tokens = tokens.iter().map(|id| Act::Tokens(vec![*id]));
    tokens.chain([Act::End(end)]).collect()
}

#[tokio::test]
async fn each_dialect_gets_the_very_prompt_and_what_is_asked() {
    for dialect in DIALECTS {
        let (fake, gpu) = started(dialect, |_| says(&[9], "stop")).await;
        let seed = match dialect {
            DialectChoice::Sglang => None,
            _ => Some(7),
        };
        let sampling = Sampling {
            max_tokens: 33,
            end_tokens: Arc::new([10, 11]),
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            seed,
            presence_penalty: 0.25,
            frequency_penalty: -0.5,
            logit_bias: Arc::new([(3, 1.5), (70_000, -100.0)]),
            top_logprobs: Some(2),
            ..Sampling::greedy(33)
        };
        all(&gpu, short(sampling.clone())).await.unwrap();
        all(&gpu, short(Sampling::greedy(5))).await.unwrap();
        let asked = fake.asked();
        let names = asked[0].names.clone();
        let expected = Asked {
            id: "resp_1-0".into(),
            ids: vec![1, 2, 3, 300, 70_000, 4, 5],
            temperature: 0.5,
            top_p: 0.9,
            top_k: Some(40),
            seed,
            penalties: (0.25, -0.5),
            bias: vec![(3, 1.5), (70_000, -100.0)],
            max_tokens: 33,
            end_tokens: vec![10, 11],
            logprobs: Some(2),
            constraint: None,
            names: names.clone(),
        };
        let plain = Asked {
            id: "resp_1-1".into(),
            temperature: 0.0,
            top_p: 1.0,
            top_k: None,
            seed: None,
            penalties: (0.0, 0.0),
            bias: Vec::new(),
            max_tokens: 5,
            end_tokens: Vec::new(),
            logprobs: None,
            ..expected.clone()
        };
        assert_eq!(asked, [expected, plain], "{dialect:?}");
        assert_eq!(names.is_some(), dialect == DialectChoice::Vllm);
    }
}

#[tokio::test]
async fn an_engine_learns_no_names_and_shares_no_cache_between_tenants() {
    let (fake, gpu) = started(DialectChoice::Vllm, |_| says(&[9], "stop")).await;
    for (tenant, affinity) in [("acme", "root"), ("acme", "other"), ("zen", "root")] {
        let prompt = Prompt {
            tenant: tenant.into(),
            affinity: affinity.into(),
            ..short(Sampling::greedy(5))
        };
        all(&gpu, prompt).await.unwrap();
    }
    let names: Vec<_> = fake
        .asked()
        .into_iter()
        .map(|it| it.names.unwrap())
        .collect();
    let (salts, sessions): (Vec<_>, Vec<_>) = names.into_iter().unzip();
    assert!(salts[0] == salts[1] && salts[0] != salts[2]);
    assert!(sessions[0] != sessions[1] && sessions[0] != sessions[2]);
    for name in salts.iter().chain(&sessions) {
        assert!(name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}

#[tokio::test]
async fn tokens_ends_cached_tokens_and_log_probabilities_are_taken_over() {
    for dialect in DIALECTS {
        let (_fake, gpu) = started(dialect, |asked| match asked.logprobs {
            None => vec![
                Act::Tokens(vec![7]),
                Act::Pause(Duration::from_millis(50)),
                Act::Tokens(vec![8, 9]),
                Act::End("length"),
            ],
            Some(_) => vec![
                // With the sampled one engines tell one more than was asked for.
                Act::Likely(5, -2.5, vec![(5, -2.5), (6, -0.5), (7, -1.0)]),
                Act::Likely(6, -0.25, vec![(6, -0.25), (5, -3.0)]),
                Act::End("stop"),
            ],
        })
        .await;
        let chunks = all(&gpu, short(Sampling::greedy(3))).await.unwrap();
        assert_eq!(tokens(&chunks), [7, 8, 9], "{dialect:?}");
        assert_eq!(chunks.last().unwrap().finish, Some(SampleEnd::Length));
        let cached: u32 = chunks.iter().filter_map(|chunk| chunk.cached_tokens).sum();
        assert_eq!(cached, CACHED, "{dialect:?}");

        let sampling = Sampling {
            top_logprobs: Some(2),
            ..Sampling::greedy(2)
        };
        let chunks = all(&gpu, short(sampling)).await.unwrap();
        let told: Vec<_> = chunks.iter().flat_map(|it| it.logprobs.clone()).collect();
        let logprob = |token, logprob, top: &[(u32, f32)]| TokenLogprob {
            token,
            logprob,
            top: top.to_vec(),
        };
        let expected = [
            logprob(5, -2.5, &[(6, -0.5), (7, -1.0)]),
            logprob(6, -0.25, &[(6, -0.25), (5, -3.0)]),
        ];
        assert_eq!(told, expected, "{dialect:?}");
        assert_eq!(chunks.last().unwrap().finish, Some(SampleEnd::Stop));
    }
}

#[tokio::test]
async fn a_sample_that_nobody_wants_any_more_is_aborted() {
    for dialect in DIALECTS {
        let (fake, gpu) = started(dialect, |asked| match asked.max_tokens {
            1 => says(&[1], "length"),
            _ => vec![Act::Tokens(vec![1]), Act::Hang],
        })
        .await;
        // One that has ended is not.
        all(&gpu, short(Sampling::greedy(1))).await.unwrap();
        let mut chunks = gpu.sample(short(Sampling::greedy(9)));
        while chunks.next().await.unwrap().unwrap().tokens.is_empty() {}
        drop(chunks);
        until(|| !fake.aborted().is_empty()).await;
        assert_eq!(fake.aborted(), ["resp_1-1"], "{dialect:?}");
    }
}

async fn until(done: impl Fn() -> bool) {
    let waited = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(NEVER, waited).await.expect("it never happens");
}

#[tokio::test]
async fn what_an_engine_says_no_to_is_told_apart() {
    for dialect in DIALECTS {
        let (fake, gpu) = started(dialect, |asked| {
            let status = match asked.max_tokens {
                1 => Status::invalid_argument("the prompt is too long"),
                2 => Status::unavailable("draining"),
                3 => Status::resource_exhausted("queue"),
                _ => Status::internal("cuda"),
            };
            vec![Act::Fail(status)]
        })
        .await;
        let error = |max| {
            let sample = all(&gpu, short(Sampling::greedy(max)));
            async move { sample.await.unwrap_err() }
        };
        let refused = BackendError::Refused {
            reason: "the prompt is too long".into(),
        };
        assert_eq!(error(1).await, refused, "{dialect:?}");
        for (max, code) in [(2, "Unavailable"), (3, "ResourceExhausted")] {
            let unavailable = BackendError::Unavailable {
                reason: format!("the engine answers {code}"),
                retry_after: None,
            };
            assert_eq!(error(max).await, unavailable, "{dialect:?}");
        }
        let failed = BackendError::Failed {
            reason: "the engine answers Internal: cuda".into(),
        };
        assert_eq!(error(4).await, failed, "{dialect:?}");
        drop(fake);
    }
}

#[tokio::test]
async fn a_sample_that_breaks_gives_what_came_before_and_fails() {
    for dialect in DIALECTS {
        for (end, reason) in [
            (
                vec![Act::Fail(Status::unavailable("gone"))],
                "the engine answers Unavailable",
            ),
            (vec![], "the engine ended the sample without saying why"),
            (vec![Act::End("abort")], "the engine aborted the sample"),
            (vec![Act::Hang], "the engine sent nothing for 1 seconds"),
        ] {
            let script = move |_: &Asked| [vec![Act::Tokens(vec![5, 6])], end.clone()].concat();
            let fake = Fake::start(dialect, facts(&artifacts()), script).await;
            let gpu = connect(GpuOptions {
                token_secs_max: 1,
                ..options(&fake)
            })
            .await;
            let mut got = Vec::new();
            let mut chunks = gpu.sample(short(Sampling::greedy(9)));
            let error = loop {
                match timeout(NEVER, chunks.next()).await.unwrap().unwrap() {
                    Ok(chunk) => got.extend(chunk.tokens),
                    Err(error) => break error,
                }
            };
            assert_eq!(got, [5, 6], "{dialect:?}: {reason}");
            let reason = reason.to_owned();
            assert_eq!(error, BackendError::Failed { reason }, "{dialect:?}");
            assert!(chunks.next().await.is_none());
        }
    }
}

#[tokio::test]
async fn an_engine_that_never_begins_is_not_waited_for_for_ever() {
    let fake = Fake::start(DialectChoice::Engine, facts(&artifacts()), |_| {
        vec![Act::Hang]
    })
    .await;
    let gpu = connect(GpuOptions {
        first_token_secs_max: 1,
        ..options(&fake)
    })
    .await;
    let error = all(&gpu, short(Sampling::greedy(9))).await.unwrap_err();
    let reason = "the engine sent nothing for 1 seconds".to_owned();
    assert_eq!(error, BackendError::Failed { reason });
    until(|| fake.aborted() == ["resp_1-0"]).await;
}

/// Something listens, and takes connections, and never says a word.
#[tokio::test]
async fn a_half_open_engine_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gpu = Gpu::new(GpuOptions::new(url.clone()), None, artifacts()).unwrap();
    let error = timeout(NEVER, gpu.connect()).await.unwrap().unwrap_err();
    assert!(matches!(&error, GpuError::Unreachable { .. }), "{error}");
    let error = all(&gpu, short(Sampling::greedy(9))).await.unwrap_err();
    let reason = "the engine has not been reached yet".to_owned();
    let retry_after = None;
    assert_eq!(
        error,
        BackendError::Unavailable {
            reason,
            retry_after
        }
    );
}

/// Answers whose bytes are no messages.
#[tokio::test]
async fn a_malformed_answer_is_an_error() {
    for body in [&b"\0\0\0\0\x05hello"[..], b"\0\0\0\0\xffx", b"<html>"] {
        let fake = Fake::start(DialectChoice::Vllm, facts(&artifacts()), |_| Vec::new()).await;
        let garbled = garbled::start(fake.address(), body).await;
        let gpu = connect(GpuOptions::new(format!("http://{garbled}"))).await;
        let error = all(&gpu, short(Sampling::greedy(9))).await.unwrap_err();
        assert!(matches!(&error, BackendError::Failed { .. }), "{error}");
    }
}

/// A proxy that passes everything on but samples, which it answers with bytes of its own.
mod garbled {
    use std::net::SocketAddr;

    use bytes::Bytes;
    use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
    use hyper::{Request, Response, body::Incoming, service::service_fn};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::net::{TcpListener, TcpStream};

    pub(super) async fn start(engine: SocketAddr, body: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service_fn(move |request| answer(engine, body, request));
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(socket), service));
            }
        });
        address
    }

    async fn answer(
        engine: SocketAddr,
        body: &'static [u8],
        request: Request<Incoming>,
    ) -> Result<Response<BoxBody<Bytes, hyper::Error>>, hyper::Error> {
        if request.uri().path().ends_with("/GenerateStream") {
            let body = Full::new(Bytes::from_static(body));
            let answer = Response::builder().header("content-type", "application/grpc");
            return Ok(answer
                .body(body.map_err(|never| match never {}).boxed())
                .unwrap());
        }
        let socket = TokioIo::new(TcpStream::connect(engine).await.unwrap());
        let (mut client, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), socket).await?;
        tokio::spawn(connection);
        Ok(client.send_request(request).await?.map(|body| body.boxed()))
    }
}

#[tokio::test]
async fn an_engine_that_does_not_fit_is_refused_by_what_does_not() {
    let artifacts = artifacts();
    let right = facts(&artifacts);
    let tokens = artifacts.tokenizer.vocab_size();
    for dialect in [DialectChoice::Engine, DialectChoice::Sglang] {
        for (facts, reason) in [
            (
                Facts {
                    vocab_size: 10,
                    ..right.clone()
                },
                format!("the tokenizer has {tokens} tokens, and the engine's model 10"),
            ),
            (
                Facts {
                    end_token: 3,
                    ..right.clone()
                },
                "the engine ends answers with token 3, which the directory does not name as an end"
                    .to_owned(),
            ),
        ] {
            let fake = Fake::start(dialect, facts, |_| Vec::new()).await;
            let gpu = Gpu::new(options(&fake), None, artifacts.clone()).unwrap();
            let url = fake.url();
            assert_eq!(gpu.connect().await, Err(GpuError::Unfit { url, reason }));
            assert!(!gpu.healthy());
        }
    }
}

#[tokio::test]
async fn an_engine_may_come_late_go_and_come_back_and_must_still_fit() {
    let artifacts = artifacts();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let options = GpuOptions {
        health_ms: 50,
        ..GpuOptions::new(format!("http://{address}"))
    };
    let gpu = Gpu::new(options, None, artifacts.clone()).unwrap();
    assert!(matches!(
        gpu.connect().await,
        Err(GpuError::Unreachable { .. })
    ));
    gpu.watch(4096);
    assert!(!gpu.healthy());

    let start = |dialect, facts| Fake::start_at(dialect, facts, |_| says(&[9], "stop"), address);
    let fake = start(DialectChoice::Engine, facts(&artifacts)).await;
    until(|| gpu.healthy()).await;
    all(&gpu, short(Sampling::greedy(9))).await.unwrap();
    fake.has_load(12);
    until(|| gpu.load() == Some(12)).await;
    fake.is_healthy(false);
    until(|| !gpu.healthy()).await;
    // For as long as it says so, however often it is asked.
    let probes = fake.probes();
    until(|| fake.probes() > probes + 3).await;
    assert!(!gpu.healthy());
    fake.is_healthy(true);
    until(|| gpu.healthy()).await;

    drop(fake);
    until(|| !gpu.healthy()).await;
    // Another kind of engine has taken its place.
    let fake = start(DialectChoice::Vllm, facts(&artifacts)).await;
    until(|| gpu.healthy()).await;
    all(&gpu, short(Sampling::greedy(9))).await.unwrap();
    assert_eq!(fake.asked().len(), 1);

    drop(fake);
    until(|| !gpu.healthy()).await;
    let smaller = Facts {
        context_length: 1024,
        ..facts(&artifacts)
    };
    let fake = start(DialectChoice::Sglang, smaller).await;
    let told = || async {
        let error = all(&gpu, short(Sampling::greedy(9))).await.unwrap_err();
        error.to_string()
    };
    let expected =
        "its context of 1024 tokens is less than the 4096 that this server was started with";
    let waited = async {
        while !told().await.contains(expected) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(NEVER, waited).await.unwrap();
    assert!(!gpu.healthy() && fake.asked().is_empty());
}

#[tokio::test]
async fn a_prefill_samples_one_token_where_a_block_can_be_kept() {
    for dialect in DIALECTS {
        let (fake, gpu) = started(dialect, |_| says(&[9], "length")).await;
        let long: Vec<u32> = (0..40).collect();
        gpu.prefill(prompt(&long, Sampling::greedy(99)))
            .await
            .unwrap();
        let asked = fake.asked();
        assert_eq!((asked[0].ids.clone(), asked[0].max_tokens), (long, 1));
        gpu.prefill(prompt(&[1, 2], Sampling::greedy(9)))
            .await
            .unwrap();
        // SGLang does not tell the size of its blocks.
        let short = usize::from(dialect == DialectChoice::Sglang);
        assert_eq!(fake.asked().len(), 1 + short, "{dialect:?}");
    }
}

#[tokio::test]
async fn constraints_are_said_in_the_language_of_the_engine() {
    let schema: Arc<str> = r#"{"type":"object"}"#.into();
    let json = Arc::new(Grammar::Json(schema.clone()));
    let call = Arc::new(Grammar::Each(vec![
        Grammar::Text("to=".into()),
        Grammar::Json(schema.clone()),
    ]));
    let with = |grammar: &Arc<Grammar>| Sampling {
        grammar: Some(grammar.clone()),
        ..Sampling::greedy(5)
    };
    for dialect in DIALECTS {
        let (fake, gpu) = started(dialect, |_| says(&[9], "stop")).await;
        assert!(gpu.check(&"acme".into(), &json).is_ok());
        let refused = gpu.check(&"acme".into(), &call).unwrap_err();
        assert!(
            refused.reason.contains("an answer of JSON alone"),
            "{refused}"
        );
        all(&gpu, short(with(&json))).await.unwrap();
        let asked = fake.asked().remove(0).constraint;
        assert_eq!(asked, Some(("json", schema.to_string())));

        let gpu = connect(GpuOptions {
            constrained: Constrained::Lark,
            ..options(&fake)
        })
        .await;
        let sampled = all(&gpu, short(with(&call))).await;
        if dialect == DialectChoice::Sglang {
            assert!(matches!(sampled, Err(BackendError::Refused { .. })));
            continue;
        }
        sampled.unwrap();
        let (kind, text) = fake.asked().remove(1).constraint.unwrap();
        assert_eq!(kind, "grammar");
        assert!(
            text.starts_with("start: (\"to=\" json_0)\n") && text.contains("%json"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_key_is_sent_and_never_shown() {
    let (fake, _) = started(DialectChoice::Engine, |_| says(&[9], "stop")).await;
    let gpu = Gpu::new(options(&fake), Some("secret-key"), artifacts()).unwrap();
    gpu.connect().await.unwrap();
    all(&gpu, short(Sampling::greedy(5))).await.unwrap();
    assert_eq!(fake.authorization().as_deref(), Some("Bearer secret-key"));
    let wrong = Gpu::new(options(&fake), Some("two\nlines"), artifacts());
    let error = wrong.err().unwrap().to_string();
    assert!(!error.contains("lines"), "{error}");
}
