//! The time to the first token by the step of a rollout, through a real engine: over hotloop, which keeps the
//! conversation and sends tokens, and statelessly to the chat endpoint of the very same engine, which is sent, parses,
//! renders and tokenises the whole conversation each time. The two take turns, step by step, so that what else the machine
//! does hits both. Each has the engine's prefix cache to itself, since hotloop's share of it is salted.
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
        ConnectRequest, Create, Item, connect_request, connect_response::Event, item,
        responses_service_client::ResponsesServiceClient,
    },
    tokenizer::Tokenizer,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

mod support;
#[path = "../tests/support/tiny_llama.rs"]
mod tiny_llama;

use support::{
    report::{Plot, Report, percentile, points},
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
    /// New tokens of each step.
    #[arg(long, default_value_t = 900)]
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

/// The tokenizer and template of the built-in model, with weights of no meaning and a long context.
fn write_model(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    let text_side = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-agent");
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
    let (mut over_hotloop, mut stateless) = (Vec::new(), Vec::new());
    // The first one of each warms up.
    for rollout in 0..=options.rollouts {
        let mut texts = Texts::new(rollout);
        let mut held = Held::open(&server.address, word).await;
        let mut sent = Stateless::new(http, model, word);
        for step in 0..options.steps {
            let text = text_of(&tokens, &mut texts, options.new_tokens);
            let ours = held.step(&text).await;
            let theirs = sent.step(&text).await;
            if rollout > 0 {
                over_hotloop.push((step, ours));
                stateless.push((step, theirs));
            }
        }
        eprintln!("engine: rollout {rollout} of {}", options.rollouts);
    }
    println!("step  new and past tokens  over hotloop p50  cached  stateless p50  ratio");
    for step in 0..options.steps {
        let of = |all: &[(usize, Taken)]| -> Vec<Taken> {
            let here = all.iter().filter(|(at, _)| *at == step);
            here.map(|(_, taken)| *taken).collect()
        };
        let (ours, theirs) = (of(&over_hotloop), of(&stateless));
        let mut rows = Vec::new();
        for (path, taken) in [("hotloop", &ours), ("stateless", &theirs)] {
            let mut times: Vec<Duration> = taken.iter().map(|it| it.first_token).collect();
            let micros =
                |percent, times: &mut Vec<Duration>| percentile(times, percent).as_secs_f64() * 1e6;
            rows.push(json!({
                "path": path, "step": step + 1, "tokens": taken[0].tokens,
                "cached_tokens": taken[0].cached, "n": times.len(),
                "p50_us": micros(50, &mut times), "p90_us": micros(90, &mut times),
            }));
        }
        let p50 = |row: &Value| row["p50_us"].as_f64().unwrap() / 1e3;
        let (here, there) = (p50(&rows[0]), p50(&rows[1]));
        println!(
            "{:>4}  {:>19}  {here:>13.1} ms  {:>6}  {there:>10.1} ms  {:>5.2}",
            step + 1,
            ours[0].tokens,
            ours[0].cached,
            there / here
        );
        rows.into_iter().for_each(|row| report.push(row));
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
        text += &texts.of(40);
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
            commands,
            events: events.into_inner(),
            previous: None,
            word,
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
