//! The server under measurement: the program's own services in a process of its own, with a backend that answers as
//! fast as it is told to.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use hotloop::{
    archive::Archive,
    auth::AuthLayer,
    backend::{
        Backend, BackendError, Capabilities, Chunk, Chunks, Prompt, SampleEnd,
        router::{Replica, Router},
    },
    billing::{
        AtBound, Biller, Billing, BillingOptions, Change, Durability, Journal, Logged, Medium,
        MediumError, Reserve,
    },
    config::Config,
    drain::Drain,
    files::{BuiltIn, Files},
    model::{Artifacts, Model, Models},
    proto::{
        models_service_server::ModelsServiceServer,
        responses_service_server::ResponsesServiceServer,
    },
    render::Heads,
    server::health_and_reflection,
    service::{Parts, Services},
    session::{ParkedLimits, Sessions},
    tokenizer::Encoded,
    wire::RequestLimits,
};
use tokio::{net::TcpListener, time::Instant};

use super::workload::Step;

/// What tells this program to be a server, and which.
const ROLE: &str = "HOTLOOP_BENCH_SERVER";

/// How many records may wait at a server that is told to be `full`.
pub const BACKLOG_OF_THE_FULL: usize = 200;

/// The name of the encoder that is always right, and slow.
pub const HUGGING_FACE: &str = "huggingface";

/// A server in a process of its own; it ends with this handle.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
}

impl Server {
    /// Starts this very program again, as a server of this kind: `echo`, or the backend's tokens a second, and behind
    /// slashes the tokens of a chunk at most, the encoder, and how usage is kept.
    pub fn start(role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, role)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim().parse().unwrap();
        Self { child, address }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for ending in ["", "-wal", "-shm", ".lock"] {
            // It may have kept none.
            let _ = std::fs::remove_file(journal_path(self.id(), ending));
        }
    }
}

/// In the process that is to be a server, serves and never returns.
pub fn serve_if_told() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("{}", listener.local_addr().unwrap());
        std::io::stdout().flush().unwrap();
        if role == "echo" {
            super::echo::serve(listener).await;
        } else {
            let mut parts = role.split('/');
            let mut part = || parts.next().unwrap_or("0");
            let (pace, chunk) = (part().parse().unwrap(), part().parse().unwrap());
            let tokenizer = part().to_owned();
            serve(listener, pace, chunk, &tokenizer, biller(part())).await;
        }
    });
    std::process::exit(0);
}

/// A journal that takes its time, or that cannot be written: `None`.
struct Slow(Journal, Option<Duration>);

impl Medium for Slow {
    fn commit(&mut self, changes: &[Change]) -> Result<(), MediumError> {
        std::thread::sleep(self.1.ok_or_else(|| MediumError("down".into()))?);
        self.0.commit(changes)
    }
}

/// What keeps usage: `log`, `journal`, `first`, `down`, `full`, or the milliseconds of a transaction.
fn biller(told: &str) -> Arc<dyn Biller> {
    let mut options = Config::default().billing.options();
    let time = match told {
        "log" | "0" => return Arc::new(Logged::new("".into())),
        "journal" => Some(Duration::ZERO),
        "first" => {
            options.reserve = Reserve::First;
            Some(Duration::ZERO)
        }
        "down" => None,
        "full" => {
            options.at_bound = AtBound::Shed;
            options.backlog_records_max = BACKLOG_OF_THE_FULL;
            None
        }
        time => Some(Duration::from_millis(time.parse().unwrap())),
    };
    Arc::new(journal(time, options))
}

/// A file of the journal of this process.
fn journal_path(process: u32, ending: &str) -> std::path::PathBuf {
    super::report::out().join(format!("usage-{process}{ending}"))
}

/// A journal on the disk that the program was built on. Whoever started this process removes it.
fn journal(time: Option<Duration>, options: BillingOptions) -> Billing {
    let path = journal_path(std::process::id(), "");
    let journal = Journal::open(&path, Durability::Normal, 0).unwrap();
    let id = journal.id().clone();
    Billing::new(Slow(journal, time), id, options, Vec::new()).unwrap()
}

async fn serve(
    listener: TcpListener,
    tokens_per_second: f64,
    chunk: usize,
    tokenizer: &str,
    biller: Arc<dyn Biller>,
) {
    let config = Config::default();
    let mut artifacts = Artifacts::load(&Files::BuiltIn(BuiltIn::SimAgent), None).unwrap();
    if tokenizer == HUGGING_FACE {
        artifacts.tokenizer = artifacts.tokenizer.without_fast_encoder();
    }
    let artifacts = Arc::new(artifacts);
    let model = Arc::new(Model {
        name: "bench".into(),
        backend: Arc::new(Router::new(
            // As every model has one.
            Replica {
                name: "bench".into(),
                backend: Arc::new(Answering::new(&artifacts, tokens_per_second, chunk)),
                weight: 1,
            },
            Vec::new(),
            config.routing.clone(),
        )),
        artifacts,
        context_length: 1 << 24,
        parameters: 0,
        output_tokens_max: 1 << 20,
        fallback: None,
        replicas: None,
        stand_in: false,
    });
    let drain = Drain::new(Duration::from_secs(1));
    let sessions = Sessions::new(ParkedLimits {
        bytes_max: 1 << 20,
        tenant_bytes_max: 1 << 20,
        time_max: Duration::from_secs(1),
    });
    let services = Services::new(Parts {
        models: Arc::new(Models::new(model, Vec::new())),
        heads: Arc::new(Heads::new(config.cache.heads_bytes_max)),
        archive: Archive::new(sessions),
        budgets: Arc::default(),
        biller,
        policies: Arc::default(),
        limits: config.stream.limits(),
        request_limits: RequestLimits {
            items_max: 1 << 20,
            tools_max: config.request.tools_max,
            item_bytes_max: config.request.item_bytes_max,
        },
        responses_held_max: 1 << 20,
        streams_max: 1 << 20,
        drain: drain.clone(),
    });
    let (_health, routes) = health_and_reflection().await.unwrap();
    let responses = ResponsesServiceServer::new(services.clone());
    let routes = routes
        .add_service(responses.max_decoding_message_size(64 << 20))
        .add_service(ModelsServiceServer::new(services));
    let gate = AuthLayer::new(config.gate().unwrap());
    let routes = routes.into_axum_router().layer(gate).into();
    hotloop::server::serve(listener, routes, &config.server, drain)
        .await
        .unwrap();
}

/// A backend that answers with calls. How many tokens each answer to an affinity has says a [`plan`], or else the seed
/// of the sample.
pub struct Answering {
    before: Vec<u32>,
    filler: u32,
    behind: Vec<u32>,
    between: Vec<u32>,
    end: Vec<u32>,
    /// 0: as fast as they are taken.
    tokens_per_second: f64,
    /// Tokens of a chunk at most; 0: all that are there.
    chunk: usize,
    /// How many answers each plan has given.
    given: Mutex<HashMap<Arc<str>, u32>>,
}

/// How many of so many tokens are due each time that some are: those of the pace, and what has become due by then; all
/// at once for a pace of 0.
pub fn paced(count: usize, per_second: f64) -> impl futures::Stream<Item = usize> + Send + 'static {
    let start = Instant::now();
    stream::unfold(0, move |sent| async move {
        if sent == count {
            return None;
        }
        if per_second == 0.0 {
            return Some((count - sent, count));
        }
        tokio::time::sleep_until(start + Duration::from_secs_f64((sent + 1) as f64 / per_second))
            .await;
        let due = (start.elapsed().as_secs_f64() * per_second) as usize;
        let end = due.clamp(sent + 1, count);
        Some((end - sent, end))
    })
}

/// What tells the backend how long each sample of a rollout is, and how many calls it has: a bias for a token with the
/// number of each step, since that reaches a backend as it is. It is negative for two calls.
pub fn plan(steps: &[Step]) -> HashMap<u32, f32> {
    let step = |(at, step): (usize, &Step)| {
        let sign = if step.fresh.len() > 1 { -1.0 } else { 1.0 };
        (at as u32, sign * step.output as f32 / TOKENS_A_BIAS)
    };
    steps.iter().enumerate().map(step).collect()
}

/// Biases are at most 100.
const TOKENS_A_BIAS: f32 = 100.0;

impl Answering {
    pub fn new(artifacts: &Artifacts, tokens_per_second: f64, chunk: usize) -> Self {
        let encode = |text: &str| {
            let mut encoded = Encoded::default();
            artifacts.tokenizer.encode(text, false, &[], &mut encoded);
            encoded.ids
        };
        let filler = encode(" the");
        Self {
            before: encode(
                r#"<tool_call>
{"name": "tool_1", "arguments": {"text": ""#,
            ),
            filler: filler[filler.len() - 1],
            behind: encode("\"}}\n"),
            between: encode("</tool_call>\n"),
            end: encode("</tool_call><|im_end|>"),
            tokens_per_second,
            chunk,
            given: Mutex::default(),
        }
    }

    /// An answer of so many tokens, or of as few as these calls take.
    fn answer(&self, tokens: usize, calls: usize) -> Vec<u32> {
        let frame = self.before.len() + self.behind.len() + self.between.len();
        let filler = (tokens / calls).saturating_sub(frame).max(1);
        let mut answer = Vec::new();
        for call in 0..calls {
            answer.extend_from_slice(&self.before);
            answer.extend(std::iter::repeat_n(self.filler, filler));
            answer.extend_from_slice(&self.behind);
            let last = call + 1 == calls;
            answer.extend_from_slice(if last { &self.end } else { &self.between });
        }
        answer
    }

    /// How many tokens and calls the answer to this prompt has.
    fn length(&self, prompt: &Prompt) -> (usize, usize) {
        let plan = &prompt.sampling.logit_bias;
        if plan.is_empty() {
            return (usize::try_from(prompt.sampling.seed.unwrap()).unwrap(), 1);
        }
        let mut given = self.given.lock().unwrap();
        let step = given.entry(prompt.affinity.clone()).or_default();
        let (_, bias) = plan.iter().find(|(at, _)| *at == *step).unwrap();
        *step += 1;
        let tokens = (bias.abs() * TOKENS_A_BIAS).round() as usize;
        (tokens, if *bias < 0.0 { 2 } else { 1 })
    }
}

impl Backend for Answering {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: "bench",
            keeps_cache: true,
            prefill: false,
            constrained_sampling: false,
            logprobs: false,
            reads_items: false,
            reads_messages: false,
            sampling: true,
        }
    }

    fn healthy(&self) -> bool {
        true
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        let (tokens, calls) = self.length(&prompt);
        let tokens = self.answer(tokens, calls);
        let end_token = tokens[tokens.len() - 1];
        let chunk = match self.chunk {
            0 => tokens.len(),
            chunk => chunk,
        };
        paced(tokens.len(), self.tokens_per_second)
            .scan(0, move |sent, due| {
                let tokens = tokens[*sent..*sent + due].to_vec();
                *sent += due;
                futures::future::ready(Some(tokens))
            })
            .flat_map(move |tokens| {
                let chunks = tokens.chunks(chunk).map(<[u32]>::to_vec);
                stream::iter(chunks.collect::<Vec<_>>())
            })
            .map(move |tokens| {
                let end = tokens.last() == Some(&end_token);
                Ok(Chunk {
                    finish: end.then_some(SampleEnd::Stop),
                    tokens,
                    ..Chunk::default()
                })
            })
            .boxed()
    }

    fn prefill(&self, _: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        async { Ok(()) }.boxed()
    }
}
