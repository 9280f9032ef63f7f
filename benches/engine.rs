//! The time to the first token by the step of a rollout, through a real engine: over hotloop, which keeps the
//! conversation and sends tokens, and statelessly to the chat endpoint of the very same engine, which is sent, parses,
//! renders and tokenises the whole conversation each time. The two take turns, step by step, so that what else the machine
//! does hits both. Each step adds little to a history that has grown by much since the one before, so that the engine's own work is small
//! beside what is around it. A third path sends the very tokens straight to the engine: what a step takes longer than that is what lies around the
//! engine. Each has the engine's prefix cache to itself, since the others' shares of it are salted.
//!
//! `tests/vllm/ttft.sh` starts a vLLM and runs it. Alone it needs an engine:
//!
//!   cargo bench --bench engine -- --write-model DIR          a model of random weights with a long context
//!   cargo bench --bench engine -- --model DIR --grpc HOST:PORT --http HOST:PORT
//!
//! Prints a table, and writes it to `target/bench/engine.json`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot run says so by panicking"
)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use clap::Parser;
use futures::StreamExt as _;
use hotloop::{
    proto::{
        ConnectRequest, Create, GetPromptRequest, Item, connect_request, connect_response::Event,
        item, responses_service_client::ResponsesServiceClient,
    },
    tokenizer::Tokenizer,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use vllm_proto::{generate_request, inference_client::InferenceClient};

mod support;
#[path = "../tests/support/tiny_llama.rs"]
mod tiny_llama;

use support::{
    report::{Plot, Report, percentile, points, row},
    text::Texts,
};
use tiny_llama::{Family, Size, TinyLlama};

/// So small that the engine's own work hides as little as can be of what is around it.
const SIZE: Size = Size {
    hidden: 64,
    inner: 64,
    layers: 1,
    heads: 2,
    kv_heads: 1,
};

#[derive(Parser)]
struct Options {
    /// Writes a model of random weights into this directory, and ends.
    #[arg(long)]
    write_model: Option<PathBuf>,
    /// The model's directory.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Where the engine listens for gRPC.
    #[arg(long)]
    grpc: Option<String>,
    /// Where the same engine listens for HTTP.
    #[arg(long)]
    http: Option<String>,
    /// Steps of a rollout.
    #[arg(long, default_value_t = 30)]
    steps: usize,
    /// Tokens that the history grows by before each step, by a sample that is not timed.
    #[arg(long, default_value_t = 850)]
    bulk_tokens: usize,
    /// New tokens of each step.
    #[arg(long, default_value_t = 50)]
    new_tokens: usize,
    /// Rollouts of each kind.
    #[arg(long, default_value_t = 5)]
    rollouts: u64,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    if let Some(directory) = &options.write_model {
        return write_model(directory);
    }
    let (Some(model), Some(grpc), Some(http)) = (&options.model, &options.grpc, &options.http)
    else {
        println!("engine: left out, since no engine was given; tests/vllm/ttft.sh starts one");
        return;
    };
    // The client of HTTP wants one, although nothing is encrypted.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(run(&options, model, grpc, http));
}

/// A tokenizer and template of the usual kind, with weights of no meaning and a long context.
fn write_model(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    let text_side = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/sim");
    for file in ["tokenizer.json", "chat_template.jinja"] {
        fs::copy(text_side.join(file), directory.join(file)).unwrap();
    }
    let config = fs::read_to_string(text_side.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["model_max_length"] = CONTEXT_TOKENS.into();
    fs::write(directory.join("tokenizer_config.json"), config.to_string()).unwrap();
    let tokens = tokenizer(directory);
    TinyLlama {
        size: SIZE,
        context_length: CONTEXT_TOKENS,
        eos_token_ids: vec![tokens.token_id("<|im_end|>").unwrap()],
        ..TinyLlama::new(Family::Llama, tokens.vocab_size())
    }
    .write(directory);
}

const CONTEXT_TOKENS: usize = 65_536;

fn tokenizer(model: &Path) -> Tokenizer {
    Tokenizer::from_json(&fs::read(model.join("tokenizer.json")).unwrap()).unwrap()
}

/// Which conversation takes its step.
enum Way {
    Hotloop,
    Stateless,
}

/// Before each step, as an agent has it while its tool runs: an engine that has just worked answers sooner.
const PAUSE: Duration = Duration::from_millis(30);

/// How many tokens an answer has. All of them are the same word, by a bias.
const ANSWER_TOKENS: u32 = 8;

async fn run(options: &Options, model: &Path, grpc: &str, http: &str) {
    let tokens = tokenizer(model);
    let ids = 0..u32::try_from(tokens.vocab_size()).unwrap();
    let word = ids
        .clone()
        .find(|id| tokens.bytes_of(*id) == b"e")
        .expect("the vocabulary has no word for the answers");
    let server = Hotloop::start(model, grpc);
    let mut report = Report::new("engine");
    let mut taken: Vec<(&str, usize, Taken)> = Vec::new();
    // The first one of each warms up.
    for rollout in 0..=options.rollouts {
        let mut texts = Texts::new(rollout);
        let mut held = Held::open(&server.address, word).await;
        let mut sent = Stateless::new(http, model, word);
        let mut bare = Bare::new(grpc, word).await;
        let texts: Vec<[String; 2]> = (0..options.steps)
            .map(|_| {
                [options.bulk_tokens, options.new_tokens]
                    .map(|count| text_of(&tokens, &mut texts, count))
            })
            .collect();
        for (step, [bulk, text]) in texts.iter().enumerate() {
            if options.bulk_tokens > 0 {
                held.step(bulk).await;
                sent.step(bulk).await;
                bare.step(held.prompt().await, rollout).await;
            }
            let (mut ours, mut theirs) = (None, None);
            // Neither always comes first.
            let order = match (rollout as usize + step) % 2 {
                0 => [Way::Hotloop, Way::Stateless],
                _ => [Way::Stateless, Way::Hotloop],
            };
            for path in order {
                tokio::time::sleep(PAUSE).await;
                match path {
                    Way::Hotloop => ours = Some(held.step(text).await),
                    Way::Stateless => theirs = Some(sent.step(text).await),
                }
            }
            let prompt = held.prompt().await;
            tokio::time::sleep(PAUSE).await;
            let alone = bare.step(prompt, rollout).await;
            if rollout > 0 {
                let paths = [
                    ("hotloop", ours),
                    ("stateless", theirs),
                    ("bare", Some(alone)),
                ];
                let paths = paths.map(|(path, taken)| (path, step, taken.unwrap()));
                taken.extend(paths);
            }
        }
        eprintln!("engine: rollout {rollout} of {}", options.rollouts);
    }
    println!("time to the first token, p50 of {}, ms", options.rollouts);
    println!("step  tokens  cached  the engine alone  over hotloop     added  stateless     added");
    for step in 0..options.steps {
        let mut p50 = Vec::new();
        for path in ["bare", "hotloop", "stateless"] {
            let here = taken
                .iter()
                .filter(|(name, at, _)| (*name, *at) == (path, step));
            let here: Vec<Taken> = here.map(|(.., taken)| *taken).collect();
            let mut times: Vec<Duration> = here.iter().map(|it| it.first_token).collect();
            p50.push(percentile(&mut times, 50).as_secs_f64() * 1e3);
            report.push(row(
                json!({
                    "path": path, "step": step + 1, "tokens": here[0].tokens,
                    "cached_tokens": here[0].cached,
                }),
                &mut times,
            ));
        }
        let rows = report.rows();
        let ours = &rows[rows.len() - 2];
        println!(
            "{:>4}  {:>6}  {:>6}  {:>16.1}  {:>12.1}  {:>8.1}  {:>9.1}  {:>8.1}",
            step + 1,
            ours["tokens"],
            ours["cached_tokens"],
            p50[0],
            p50[1],
            p50[1] - p50[0],
            p50[2],
            p50[2] - p50[0],
        );
    }
    println!("\nadded to the engine alone, p50 of all steps of a tenth of the rollout, ms");
    println!("steps     over hotloop  stateless");
    let tenth = options.steps.div_ceil(10);
    for first in (0..options.steps).step_by(tenth) {
        let last = (first + tenth).min(options.steps);
        let added = |path: &str| {
            let of = |name: &str| -> Vec<f64> {
                let here = taken
                    .iter()
                    .filter(|(it, step, _)| *it == name && (first..last).contains(step));
                here.map(|(.., taken)| taken.first_token.as_secs_f64() * 1e3)
                    .collect()
            };
            // Step by step: what the machine does else is the same for both.
            let pairs = of(path).into_iter().zip(of("bare"));
            let mut added: Vec<f64> = pairs.map(|(with, alone)| with - alone).collect();
            added.sort_by(f64::total_cmp);
            added[added.len() / 2]
        };
        let (ours, theirs) = (added("hotloop"), added("stateless"));
        println!("{:>2} to {last:>2}  {ours:>12.1}  {theirs:>9.1}", first + 1);
        for (path, added) in [("hotloop", ours), ("stateless", theirs)] {
            report.push(json!({
                "path": path, "first_step": first + 1, "last_step": last,
                "added_p50_us": (added * 1e3).round(),
            }));
        }
    }
    let rows = report.rows();
    let line = |path: &str| points(rows, &[("path", path.into())], "step", "p50_us");
    Plot {
        file: "engine",
        title: "Time to the first token through vLLM",
        x: "step",
        y: "µs",
        lines: vec![
            ("over hotloop".to_owned(), line("hotloop")),
            (
                "stateless, to vLLM's chat endpoint".to_owned(),
                line("stateless"),
            ),
        ],
    }
    .write();
    report.write();
}

/// A text of about so many tokens of this vocabulary.
fn text_of(tokens: &Tokenizer, texts: &mut Texts, count: usize) -> String {
    let mut text = String::new();
    loop {
        text += &texts.of(20);
        text.push('\n');
        let mut encoded = hotloop::tokenizer::Encoded::default();
        tokens.encode(&text, false, &[], &mut encoded);
        if encoded.ids.len() >= count {
            return text;
        }
    }
}

/// What a step took.
#[derive(Clone, Copy)]
struct Taken {
    first_token: Duration,
    /// Of the prompt.
    tokens: u64,
    cached: u64,
}

/// The program, over the engine.
struct Hotloop {
    child: Child,
    address: String,
    _config: tempfile::NamedTempFile,
}

impl Drop for Hotloop {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

impl Hotloop {
    fn start(model: &Path, grpc: &str) -> Self {
        let config = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        let path = model.canonicalize().unwrap();
        let text = format!(
            "[[model]]\nname = \"m\"\npath = {:?}\n[[model.gpu]]\nurl = \"http://{grpc}\"\n",
            path.to_str().unwrap()
        );
        fs::write(config.path(), text).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_hotloop"))
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(config.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines
            .by_ref()
            .map(Result::unwrap)
            .find_map(|line| Some(line.strip_prefix("hotloop serves gRPC on ")?.to_owned()))
            .expect("hotloop did not start");
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            child,
            address,
            _config: config,
        }
    }
}

/// A conversation that hotloop keeps.
struct Held {
    client: ResponsesServiceClient<tonic::transport::Channel>,
    commands: mpsc::Sender<ConnectRequest>,
    events: tonic::Streaming<hotloop::proto::ConnectResponse>,
    previous: Option<String>,
    word: u32,
}

impl Held {
    async fn open(address: &str, word: u32) -> Self {
        let mut client = ResponsesServiceClient::new(
            tonic::transport::Endpoint::from_shared(format!("http://{address}"))
                .unwrap()
                .connect()
                .await
                .unwrap(),
        );
        let (commands, outgoing) = mpsc::channel(4);
        let events = client.connect(ReceiverStream::new(outgoing)).await.unwrap();
        Self {
            client,
            commands,
            events: events.into_inner(),
            previous: None,
            word,
        }
    }

    /// The tokens of the last prompt.
    async fn prompt(&mut self) -> Vec<u32> {
        let mut ids = Vec::new();
        loop {
            let request = GetPromptRequest {
                response_id: self.previous.clone().unwrap(),
                first_token: u32::try_from(ids.len()).unwrap(),
                ..Default::default()
            };
            let got = self.client.get_prompt(request).await.unwrap().into_inner();
            ids.extend(got.token_ids);
            if ids.len() == got.total_tokens as usize {
                return ids;
            }
        }
    }

    async fn step(&mut self, text: &str) -> Taken {
        let input = vec![Item {
            item: Some(item::Item::UserText(text.to_owned())),
            ..Item::default()
        }];
        let create = match self.previous.take() {
            Some(previous) => Create {
                previous_response_id: previous,
                input,
                ..Create::default()
            },
            None => Create {
                input,
                temperature: Some(0.0),
                max_output_tokens: Some(ANSWER_TOKENS),
                logit_bias: [(self.word, 100.0)].into(),
                ..Create::default()
            },
        };
        let begun = Instant::now();
        let command = Some(connect_request::Command::Create(create));
        let request = ConnectRequest {
            command,
            ..ConnectRequest::default()
        };
        self.commands.send(request).await.unwrap();
        let mut first_token = None;
        loop {
            let event = self.events.message().await.unwrap().unwrap();
            match event.event {
                Some(Event::OutputTextDelta(_)) => {
                    first_token.get_or_insert_with(|| begun.elapsed());
                }
                Some(Event::Done(done)) => {
                    self.previous = Some(event.response_id);
                    let usage = done.usage.unwrap();
                    return Taken {
                        first_token: first_token.unwrap_or_else(|| panic!("{done:?}")),
                        tokens: usage.input_tokens.into(),
                        cached: usage.cached_tokens.into(),
                    };
                }
                Some(Event::Error(error)) => panic!("{error:?}"),
                _ => {}
            }
        }
    }
}

/// The tokens alone, as the engine takes them.
struct Bare {
    client: InferenceClient<tonic::transport::Channel>,
    word: u32,
}

impl Bare {
    async fn new(grpc: &str, word: u32) -> Self {
        let engine = tonic::transport::Endpoint::from_shared(format!("http://{grpc}")).unwrap();
        Self {
            client: InferenceClient::new(engine.connect().await.unwrap()),
            word,
        }
    }

    async fn step(&mut self, ids: Vec<u32>, rollout: u64) -> Taken {
        let tokens = ids.len() as u64;
        let request = vllm_proto::GenerateRequest {
            request_id: format!("bare-{rollout}-{tokens}"),
            prompt: Some(generate_request::Prompt::TokenIds(vllm_proto::TokenIds {
                ids,
            })),
            temperature: Some(0.0),
            decoding: Some(vllm_proto::DecodingParameters {
                logit_bias: [(self.word, 100.0)].into(),
                ..Default::default()
            }),
            stopping: Some(vllm_proto::StoppingCriteria {
                max_new_tokens: ANSWER_TOKENS,
                ..Default::default()
            }),
            response: Some(vllm_proto::ResponseOptions {
                output_text: Some(false),
                output_token_ids: true,
                ..Default::default()
            }),
            kv: Some(vllm_proto::KvCacheParameters {
                cache_salt: format!("bare-{rollout}"),
                ..Default::default()
            }),
            ..Default::default()
        };
        let begun = Instant::now();
        let mut answer = self
            .client
            .generate_stream(request)
            .await
            .unwrap()
            .into_inner();
        let (mut first_token, mut cached) = (None, 0);
        while let Some(message) = answer.message().await.unwrap() {
            let Some(output) = message.outputs else {
                continue;
            };
            if !output.token_ids.is_empty() {
                first_token.get_or_insert_with(|| begun.elapsed());
            }
            if let Some(finish) = output.finish_info {
                cached = finish.num_cached_tokens.unwrap_or(0).into();
            }
        }
        Taken {
            first_token: first_token.expect("it said nothing"),
            tokens,
            cached,
        }
    }
}

/// A conversation that is sent whole each time.
struct Stateless {
    client: reqwest::Client,
    url: String,
    model: String,
    messages: Vec<Value>,
    word: u32,
}

impl Stateless {
    fn new(http: &str, model: &Path, word: u32) -> Self {
        Self {
            client: reqwest::Client::new(),
            url: format!("http://{http}/v1/chat/completions"),
            model: model.to_str().unwrap().to_owned(),
            messages: Vec::new(),
            word,
        }
    }

    async fn step(&mut self, text: &str) -> Taken {
        self.messages.push(json!({"role": "user", "content": text}));
        let begun = Instant::now();
        let body = json!({
            "model": self.model, "messages": self.messages, "stream": true, "temperature": 0,
            "max_tokens": ANSWER_TOKENS, "logit_bias": {self.word.to_string(): 100},
            "stream_options": {"include_usage": true},
        });
        let request = self
            .client
            .post(&self.url)
            .header("content-type", "application/json")
            .body(body.to_string());
        let answer = request.send().await.unwrap();
        let ok = answer.status().is_success();
        let mut bytes = answer.bytes_stream();
        let (mut rest, mut said, mut tokens) = (String::new(), String::new(), 0);
        let mut first_token = None;
        while let Some(chunk) = bytes.next().await {
            rest += std::str::from_utf8(&chunk.unwrap()).unwrap();
            while let Some((line, behind)) = rest.split_once('\n') {
                if let Some(data) = line.strip_prefix("data: ")
                    && let Ok(event) = serde_json::from_str::<Value>(data)
                {
                    let content = event["choices"][0]["delta"]["content"].as_str();
                    if let Some(content) = content.filter(|content| !content.is_empty()) {
                        first_token.get_or_insert_with(|| begun.elapsed());
                        said += content;
                    }
                    tokens = event["usage"]["prompt_tokens"].as_u64().unwrap_or(tokens);
                }
                rest = behind.to_owned();
            }
        }
        assert!(ok, "{rest}");
        self.messages
            .push(json!({"role": "assistant", "content": said}));
        Taken {
            first_token: first_token.expect("it said nothing"),
            tokens,
            cached: 0,
        }
    }
}
