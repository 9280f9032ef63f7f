//! Streams over channels, without a network: a scripted client, a scripted backend, and the
//! transcript between them. Every message that a client gets is written as one line, whole but for
//! clocks and the prompt's report, with ids numbered as they appear (`r1`, `c1`, `msg1`); whatever
//! the test expects of it, a checker holds it against what the protocol promises of every stream.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use hotloop::{
    archive::Archive,
    backend::{Backend, BackendError, Capabilities, Chunk, Chunks, Prompt, SampleEnd},
    budget::Budgets,
    files::{BuiltIn, Files},
    item::{ResponseId, Tenant, TokenLogprob},
    model::{Artifacts, Catalog, Model, Models},
    proto::{
        self, Append, Cancel, ConnectRequest, ConnectResponse, Create, Disposition, Done, Finish,
        FinishReason, FunctionCallOutput, FunctionTool, IncompleteReason, Item, ItemStatus,
        ResponseStatus, Retry, Role, SafetyAction, SafetyRange, SafetyVerdict,
        connect_request::Command, connect_response::Event, content_part, item,
    },
    render::Heads,
    safety::Policies,
    session::{Committed, Held, ParkedLimits, Sessions},
    stream::{self, Limits, Outgoing, Shared, StreamEnd},
    tokenizer::Encoded,
    wire,
};
use regex::{Captures, Regex};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;

use crate::shared::{LIMITS, REQUEST_LIMITS, shared};

/// The clock is paused: this passes at once, when nothing else can happen any more.
const NEVER: Duration = Duration::from_millis(100);

// The server.

/// What streams share: a model whose backend the test plays, and what is held.
pub struct House {
    pub limits: Limits,
    pub responses_held_max: usize,
    pub sessions: Arc<Sessions>,
    models: Arc<Models>,
    heads: Arc<Heads>,
    pub policies: Arc<Policies>,
    pub budgets: Arc<Budgets>,
    model: Arc<Model>,
    samples: mpsc::UnboundedReceiver<Sample>,
    prefills: mpsc::UnboundedReceiver<Prefill>,
}

/// The kind of house.
pub struct Plan {
    pub context_length: u32,
    pub prefill: bool,
    pub parked: ParkedLimits,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            context_length: 10_000,
            prefill: false,
            parked: ParkedLimits {
                bytes_max: 1 << 20,
                tenant_bytes_max: 1 << 20,
                time_max: Duration::from_secs(600),
            },
        }
    }
}

impl House {
    pub fn new() -> Self {
        Self::built(Plan::default())
    }

    pub fn built(plan: Plan) -> Self {
        let artifacts =
            Arc::new(Artifacts::load(&Files::BuiltIn(BuiltIn::SimAgent), None).unwrap());
        let (sampled, samples) = mpsc::unbounded_channel();
        let (prefilled, prefills) = mpsc::unbounded_channel();
        let model = Arc::new(Model {
            name: "sim".into(),
            backend: Arc::new(Scripted {
                artifacts: artifacts.clone(),
                prefill: plan.prefill,
                samples: sampled,
                prefills: prefilled,
            }),
            artifacts,
            context_length: plan.context_length,
            parameters: 0,
            output_tokens_max: 1_000,
            fallback: None,
            replicas: None,
            stand_in: false,
        });
        Self {
            limits: LIMITS,
            responses_held_max: 1_000,
            sessions: Sessions::new(plan.parked),
            models: Arc::new(Models::new(model.clone(), Vec::new())),
            heads: Arc::new(Heads::new(1 << 20)),
            policies: Arc::default(),
            budgets: Arc::default(),
            model,
            samples,
            prefills,
        }
    }

    /// From now on `sim` hands over to `other`, which the test plays too.
    pub fn falls_back(&self) {
        let model = |name: &str, fallback: Option<&str>| {
            Arc::new(Model {
                name: name.into(),
                backend: self.model.backend.clone(),
                artifacts: self.model.artifacts.clone(),
                fallback: fallback.map(Into::into),
                replicas: None,
                ..*self.model
            })
        };
        let others = vec![model("other", None)];
        let catalog = Catalog::new(model("sim", Some("other")), others, BTreeMap::new());
        self.models.replace(catalog);
    }

    /// A client of this tenant opens a stream.
    pub fn talk(&self, tenant: &str) -> Talk {
        let archive = Archive::new(self.sessions.clone());
        let (shared, outgoing) = shared(self.models.clone(), archive, tenant, self.limits);
        let held = self.responses_held_max;
        let shared = Arc::new(Shared {
            heads: self.heads.clone(),
            held: Held::new(self.sessions.clone(), tenant.into(), held),
            wallet: self.budgets.wallet(tenant, "key"),
            policies: self.policies.clone(),
            ..shared
        });
        let slots = shared.slots.clone();
        let (commands, inbound) = mpsc::channel(4_096);
        let inbound =
            ReceiverStream::new(inbound).map(move |sent| wire::incoming(sent, &REQUEST_LIMITS));
        let (drain, drained) = oneshot::channel::<Instant>();
        let draining = drained.then(|cut| async move {
            match cut {
                Ok(cut) => cut,
                Err(_) => std::future::pending().await,
            }
        });
        Talk {
            commands: Some(commands),
            outgoing: Some(outgoing),
            drain: Some(drain),
            run: tokio::spawn(stream::run(inbound, shared, draining)),
            slots,
            names: Names::default(),
            checker: Checker::default(),
        }
    }

    /// What the backend is asked to sample next.
    pub async fn sample(&mut self) -> Sample {
        let next = timeout(NEVER, self.samples.recv()).await;
        next.expect("the backend is asked for nothing").unwrap()
    }

    /// What the backend is asked to prefill next.
    pub async fn prefill(&mut self) -> Prefill {
        let next = timeout(NEVER, self.prefills.recv()).await;
        next.expect("no prefill is asked for").unwrap()
    }

    /// The backend is asked for nothing more, now that all is still.
    pub async fn idle(&mut self) {
        still().await;
        assert!(
            self.samples.try_recv().is_err(),
            "one more sample is asked for"
        );
    }

    /// A response of this tenant, if it is held.
    pub fn find(&self, tenant: &str, id: &str) -> Option<Arc<Committed>> {
        self.sessions
            .find(&Tenant::from(tenant), &ResponseId::from(id))
    }
}

/// Passes when everything that can happen without the passing of time has happened.
pub async fn still() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

// The backend.

struct Scripted {
    artifacts: Arc<Artifacts>,
    prefill: bool,
    samples: mpsc::UnboundedSender<Sample>,
    prefills: mpsc::UnboundedSender<Prefill>,
}

impl Backend for Scripted {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: "script",
            keeps_cache: false,
            prefill: self.prefill,
            constrained_sampling: false,
            logprobs: true,
            reads_items: false,
            reads_messages: false,
            sampling: true,
        }
    }

    fn healthy(&self) -> bool {
        true
    }

    fn sample(&self, prompt: Prompt) -> Chunks {
        let (chunks, receiver) = mpsc::unbounded_channel();
        let taken = Arc::new(AtomicUsize::new(0));
        let _ = self.samples.send(Sample {
            artifacts: self.artifacts.clone(),
            prompt,
            chunks,
            taken: taken.clone(),
        });
        futures::stream::unfold((receiver, taken), |(mut receiver, taken)| async move {
            let next = receiver.recv().await?;
            taken.fetch_add(1, Ordering::Relaxed);
            Some((next, (receiver, taken)))
        })
        .boxed()
    }

    fn prefill(&self, prompt: Prompt) -> BoxFuture<'static, Result<(), BackendError>> {
        let (done, end) = oneshot::channel();
        let _ = self.prefills.send(Prefill {
            artifacts: self.artifacts.clone(),
            prompt,
            done,
        });
        end.map(|end| end.unwrap_or(Ok(()))).boxed()
    }
}

/// A sample that the test plays.
pub struct Sample {
    artifacts: Arc<Artifacts>,
    pub prompt: Prompt,
    chunks: mpsc::UnboundedSender<Result<Chunk, BackendError>>,
    taken: Arc<AtomicUsize>,
}

impl Sample {
    fn chunk(&self, text: &str, finish: Option<SampleEnd>) {
        let mut encoded = Encoded::default();
        let tokenizer = &self.artifacts.tokenizer;
        tokenizer.encode(text, false, &[], &mut encoded);
        let mut tokens = encoded.ids;
        if finish == Some(SampleEnd::Stop) {
            tokens.push(self.prompt.sampling.end_tokens[0]);
        }
        let logprobs = match self.prompt.sampling.top_logprobs {
            None => Vec::new(),
            Some(_) => tokens
                .iter()
                .map(|token| TokenLogprob {
                    token: *token,
                    logprob: -0.5,
                    top: Vec::new(),
                })
                .collect(),
        };
        let chunk = Chunk {
            tokens,
            logprobs,
            finish,
            ..Chunk::default()
        };
        let _ = self.chunks.send(Ok(chunk));
    }

    /// Samples this text; special tokens are written as what they are.
    pub fn writes(&self, text: &str) -> &Self {
        self.chunk(text, None);
        self
    }

    /// The same, and ends the answer.
    pub fn says(&self, text: &str) {
        self.chunk(text, Some(SampleEnd::Stop));
    }

    /// The same, and is at the limit of tokens.
    pub fn is_cut_at(&self, text: &str) {
        self.chunk(text, Some(SampleEnd::Length));
    }

    pub fn fails(&self, error: BackendError) {
        let _ = self.chunks.send(Err(error));
    }

    /// A token that no vocabulary has.
    pub fn babbles(&self) {
        let _ = self.chunks.send(Ok(Chunk {
            tokens: vec![u32::MAX],
            ..Chunk::default()
        }));
    }

    /// How many chunks were taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// The sample was cancelled, as an engine learns it.
    pub async fn is_dropped(&self) {
        let dropped = timeout(NEVER, self.chunks.closed()).await;
        dropped.expect("the sample is not dropped");
    }

    pub fn goes_on(&self) -> bool {
        !self.chunks.is_closed()
    }

    /// The text of the prompt.
    pub fn text(&self) -> String {
        text_of(&self.artifacts, &self.prompt)
    }
}

/// A prefill that the test plays. Dropping it ends it well.
pub struct Prefill {
    artifacts: Arc<Artifacts>,
    pub prompt: Prompt,
    pub done: oneshot::Sender<Result<(), BackendError>>,
}

impl Prefill {
    /// The text of the prompt.
    pub fn text(&self) -> String {
        text_of(&self.artifacts, &self.prompt)
    }
}

fn text_of(artifacts: &Artifacts, prompt: &Prompt) -> String {
    let bytes: Vec<u8> = prompt
        .tokens
        .tokens_from(0)
        .iter()
        .flat_map(|id| artifacts.tokenizer.bytes_of(*id).to_vec())
        .collect();
    String::from_utf8(bytes).unwrap()
}

// The client.

/// A client's stream.
pub struct Talk {
    commands: Option<mpsc::Sender<ConnectRequest>>,
    outgoing: Option<Outgoing>,
    drain: Option<oneshot::Sender<Instant>>,
    run: JoinHandle<()>,
    slots: Arc<Semaphore>,
    names: Names,
    checker: Checker,
}

impl Talk {
    pub fn create(&mut self, request_id: &str, create: Create) {
        self.create_on("", request_id, create);
    }

    pub fn create_on(&mut self, lane: &str, request_id: &str, mut create: Create) {
        create.previous_response_id = self.names.real(&create.previous_response_id);
        self.resolve(&mut create.input);
        self.checker.creates.insert(request_id.to_owned(), true);
        self.send(lane, request_id, Command::Create(create));
    }

    pub fn append(&mut self, request_id: &str, response: &str, mut input: Vec<Item>) {
        self.resolve(&mut input);
        let response_id = self.names.real(response);
        self.checker.answers_due.insert(request_id.to_owned());
        let append = Append { response_id, input };
        self.send("", request_id, Command::Append(append));
    }

    pub fn done(&mut self, request_id: &str, response: &str) {
        let response_id = self.names.real(response);
        self.send("", request_id, Command::Done(Finish { response_id }));
    }

    pub fn cancel(&mut self, request_id: &str, response: &str) {
        let cancel = Cancel {
            response_id: self.names.real(response),
            create_request_id: String::new(),
        };
        self.send("", request_id, Command::Cancel(cancel));
    }

    pub fn cancel_create(&mut self, request_id: &str, create: &str) {
        let cancel = Cancel {
            response_id: String::new(),
            create_request_id: create.to_owned(),
        };
        self.checker
            .cancels
            .insert(request_id.to_owned(), create.to_owned());
        self.send("", request_id, Command::Cancel(cancel));
    }

    pub fn send(&self, lane: &str, request_id: &str, command: Command) {
        let request = ConnectRequest {
            lane: lane.to_owned(),
            request_id: request_id.to_owned(),
            command: Some(command),
        };
        self.send_raw(request);
    }

    pub fn send_raw(&self, request: ConnectRequest) {
        self.commands.as_ref().unwrap().try_send(request).unwrap();
    }

    /// An append that the test sends by itself is to be answered.
    pub fn expects_answer(&mut self, request_id: &str) {
        self.checker.answers_due.insert(request_id.to_owned());
    }

    fn resolve(&self, input: &mut [Item]) {
        for item in input {
            match &mut item.item {
                Some(item::Item::FunctionCallOutput(output)) => {
                    output.call_id = self.names.real(&output.call_id);
                }
                Some(item::Item::CustomToolCallOutput(output)) => {
                    output.call_id = self.names.real(&output.call_id);
                }
                Some(item::Item::ItemReference(reference)) => {
                    reference.id = self.names.real(&reference.id);
                }
                _ => {}
            }
        }
    }

    /// The next message, as it came.
    pub async fn message(&mut self) -> Option<Result<ConnectResponse, StreamEnd>> {
        let outgoing = self.outgoing.as_mut().unwrap();
        let next = timeout(NEVER, outgoing.next()).await;
        let next = next.expect("nothing more comes")?;
        Some(next.map(|(sequence, envelope)| {
            let message = wire::response(sequence, envelope);
            self.checker.check(&message);
            message
        }))
    }

    /// The next message as a line.
    pub async fn line(&mut self) -> String {
        match self.message().await {
            Some(Ok(message)) => self.names.shorten(&line(&message)),
            Some(Err(end)) => format!("{end:?}"),
            None => "the end".to_owned(),
        }
    }

    /// Reads as many messages as there are lines, and compares them.
    pub async fn reads(&mut self, expected: &str) {
        let expected: Vec<&str> = expected.trim().lines().map(str::trim).collect();
        let mut read = Vec::new();
        for _ in &expected {
            let outgoing = self.outgoing.as_mut().unwrap();
            match timeout(NEVER, outgoing.next()).await {
                Err(_) => {
                    read.push("nothing more".to_owned());
                    break;
                }
                Ok(None) => read.push("the end".to_owned()),
                Ok(Some(Err(end))) => read.push(format!("{end:?}")),
                Ok(Some(Ok((sequence, envelope)))) => {
                    let message = wire::response(sequence, envelope);
                    self.checker.check(&message);
                    read.push(self.names.shorten(line(&message).trim_end()));
                }
            }
        }
        let (read, expected) = (read.join("\n"), expected.join("\n"));
        assert!(
            read == expected,
            "\n--- read ---\n{read}\n--- expected ---\n{expected}\n"
        );
    }

    /// Reads up to the `done` or the `error` of this command, and tells it.
    pub async fn ends(&mut self, request_id: &str) -> String {
        loop {
            let line = self.line().await;
            let words: Vec<&str> = line.split(' ').collect();
            assert!(
                !line.starts_with("the end"),
                "the stream ended before {request_id} did"
            );
            if words.contains(&request_id) && (words.contains(&"done") || words.contains(&"error"))
            {
                return line;
            }
        }
    }

    /// Nothing comes, now that all is still.
    pub async fn silent(&mut self) {
        still().await;
        let next = self.outgoing.as_mut().unwrap().next().now_or_never();
        if let Some(next) = next {
            panic!("one more message: {next:?}");
        }
    }

    /// A response continues another and answers: the stream still works.
    pub async fn still_works(&mut self, house: &mut House, previous: &str) {
        let request_id = format!("works{}", self.checker.sequence);
        self.create_on(
            "works",
            &request_id,
            after(previous, [user("still there?")]),
        );
        house.sample().await.says("yes");
        let end = self.ends(&request_id).await;
        assert!(end.contains(" done completed stop "), "{end}");
    }

    /// The real id behind a short one.
    pub fn id(&self, short: &str) -> String {
        self.names.real(short)
    }

    /// Takes over an id from another stream.
    pub fn knows(&mut self, id: &str) -> String {
        self.names.shorten(id)
    }

    /// Slots to sample in that are free.
    pub fn slots_free(&self) -> usize {
        self.slots.available_permits()
    }

    /// The server drains, and cuts connections after this time.
    pub fn drain(&mut self, cut: Duration) {
        self.drain
            .take()
            .unwrap()
            .send(Instant::now() + cut)
            .unwrap();
    }

    /// Closes the client's side.
    pub fn closes(&mut self) {
        self.commands = None;
    }

    /// The connection is lost. Passes when the server is done with the stream.
    pub async fn vanishes(mut self) {
        self.commands = None;
        self.outgoing = None;
        timeout(NEVER, &mut self.run)
            .await
            .expect("the stream goes on")
            .unwrap();
    }

    /// The connection is lost; the stream may go on. What is given ends with it.
    pub fn loses_its_connection(self) -> JoinHandle<()> {
        self.run
    }

    /// How many commands the server has not read.
    pub fn unread(&self) -> usize {
        let commands = self.commands.as_ref().unwrap();
        commands.max_capacity() - commands.capacity()
    }

    /// Closes the client's side, reads what still comes, and holds the whole stream against what
    /// the protocol promises.
    pub async fn bye(mut self) {
        self.closes();
        while let Some(message) = self.message().await {
            message.unwrap();
        }
        timeout(NEVER, &mut self.run)
            .await
            .expect("the stream goes on")
            .unwrap();
        self.checker.end();
    }
}

/// Short names for ids, in the order of their appearance.
#[derive(Default)]
struct Names {
    short: HashMap<String, String>,
    real: HashMap<String, String>,
    counts: HashMap<String, usize>,
}

impl Names {
    fn shorten(&mut self, text: &str) -> String {
        let pattern = ID.get_or_init(|| {
            Regex::new(r"\b(resp|call|msg|fc|fco|rs|ctc|cto|cmp)_([0-9A-Za-z]{24,32})\b").unwrap()
        });
        pattern
            .replace_all(text, |found: &Captures<'_>| {
                if let Some(short) = self.short.get(&found[0]) {
                    return short.clone();
                }
                let prefix = match &found[1] {
                    "resp" => "r",
                    "call" => "c",
                    other => other,
                };
                let count = self.counts.entry(prefix.to_owned()).or_default();
                *count += 1;
                let short = format!("{prefix}{count}");
                self.short.insert(found[0].to_owned(), short.clone());
                self.real.insert(short.clone(), found[0].to_owned());
                short
            })
            .into_owned()
    }

    fn real(&self, short: &str) -> String {
        let real = self.real.get(short);
        real.map_or_else(|| short.to_owned(), String::clone)
    }
}

static ID: std::sync::OnceLock<Regex> = std::sync::OnceLock::new();

// What clients send.

/// A new conversation.
pub fn new(input: impl Into<Vec<Item>>) -> Create {
    Create {
        input: input.into(),
        ..Create::default()
    }
}

/// A continuation.
pub fn after(previous: &str, input: impl Into<Vec<Item>>) -> Create {
    Create {
        previous_response_id: previous.to_owned(),
        ..new(input)
    }
}

pub fn held(create: Create) -> Create {
    Create {
        hold: true,
        ..create
    }
}

/// With a tool `step`, which the model may call.
pub fn with_tools(create: Create) -> Create {
    Create {
        tools: vec![tool("step")],
        ..create
    }
}

pub fn tool(name: &str) -> proto::Tool {
    proto::Tool {
        tool: Some(proto::tool::Tool::Function(FunctionTool {
            name: name.to_owned(),
            ..FunctionTool::default()
        })),
    }
}

fn of(item: item::Item) -> Item {
    Item {
        item: Some(item),
        ..Item::default()
    }
}

pub fn user(text: &str) -> Item {
    of(item::Item::UserText(text.to_owned()))
}

pub fn system(text: &str) -> Item {
    let part = content_part::Part::InputText(text.to_owned());
    of(item::Item::Message(proto::Message {
        role: Role::System.into(),
        content: vec![proto::ContentPart { part: Some(part) }],
    }))
}

pub fn output(call_id: &str, output: &str) -> Item {
    of(item::Item::FunctionCallOutput(FunctionCallOutput {
        call_id: call_id.to_owned(),
        output: output.to_owned(),
    }))
}

pub fn custom_output(call_id: &str, output: &str) -> Item {
    of(item::Item::CustomToolCallOutput(
        proto::CustomToolCallOutput {
            call_id: call_id.to_owned(),
            output: output.to_owned(),
        },
    ))
}

pub fn reference(id: &str) -> Item {
    let id = id.to_owned();
    of(item::Item::ItemReference(proto::ItemReference { id }))
}

/// What a model writes to call `step`.
pub fn call(n: u32) -> String {
    format!("<tool_call>\n{{\"name\": \"step\", \"arguments\": {{\"n\": {n}}}}}\n</tool_call>")
}

// What the server sends, as lines.

fn line(message: &ConnectResponse) -> String {
    let lane = match message.lane.as_str() {
        "" => String::new(),
        lane => format!("[{lane}] "),
    };
    let response = match message.response_id.as_str() {
        "" => String::new(),
        id => format!("{id} "),
    };
    let event = event_line(message.event.as_ref().unwrap());
    let request = match message.request_id.as_str() {
        "" => String::new(),
        id => format!("{id} "),
    };
    format!("{lane}{request}{response}{event}")
}

fn event_line(event: &Event) -> String {
    match event {
        Event::Created(created) => {
            let after = match created.previous_response_id.as_str() {
                "" => String::new(),
                id => format!(" after {id}"),
            };
            format!("created {}{after}", created.model)
        }
        Event::Appended(appended) => {
            let when = match appended.disposition() {
                Disposition::Unspecified => "?",
                Disposition::Applied => "applied",
                Disposition::Queued => "queued",
            };
            let ids = appended.item_ids.join(" ");
            format!("appended [{ids}] {when} {}", appended.tokens)
        }
        Event::OutputItemAdded(added) => {
            let item = item_line(added.item.as_ref().unwrap());
            format!("added {}: {item}", added.output_index)
        }
        Event::OutputTextDelta(delta) => {
            let logprobs = match delta.logprobs.len() {
                0 => String::new(),
                n => format!(" with {n} logprobs"),
            };
            format!("text {}: {:?}{logprobs}", delta.output_index, delta.delta)
        }
        Event::ReasoningTextDelta(delta) => {
            format!("thought {}: {:?}", delta.output_index, delta.delta)
        }
        Event::FunctionCallArgumentsDelta(delta) => {
            format!("arguments {}: {}", delta.output_index, delta.delta)
        }
        Event::OutputItemDone(done) => {
            let item = item_line(done.item.as_ref().unwrap());
            format!("item {}: {item}", done.output_index)
        }
        Event::SafetyVerdict(verdict) => verdict_line(verdict),
        Event::Done(done) => done_line(done),
        Event::Error(error) => format!("error {}", error_line(error)),
        Event::GoAway(go_away) => {
            assert!(go_away.resumable);
            format!("go_away {} in {} ms", go_away.reason, go_away.time_left_ms)
        }
    }
}

fn item_line(item: &Item) -> String {
    let status = match item.status() {
        ItemStatus::Unspecified => " (sent)",
        ItemStatus::InProgress => " …",
        ItemStatus::Completed => "",
        ItemStatus::Incomplete => " INCOMPLETE",
    };
    let body = match item.item.as_ref().unwrap() {
        item::Item::Message(message) => {
            let text = message_text(message);
            format!("{:?} {text:?}", message.role())
        }
        item::Item::Reasoning(reasoning) => format!("thinks {:?}", reasoning.content),
        item::Item::FunctionCall(call) => {
            format!("{} {}({})", call.call_id, call.name, call.arguments)
        }
        item::Item::CustomToolCall(call) => {
            let input = call.input.escape_debug();
            format!("{} {}<{input}>", call.call_id, call.name)
        }
        other => format!("{other:?}"),
    };
    format!("{} {body}{status}", item.id)
}

fn message_text(message: &proto::Message) -> String {
    message
        .content
        .iter()
        .map(|part| match part.part.as_ref().unwrap() {
            content_part::Part::OutputText(text) => text.text.as_str(),
            other => panic!("no part of a model: {other:?}"),
        })
        .collect()
}

fn done_line(done: &Done) -> String {
    let status = match done.status() {
        ResponseStatus::Unspecified | ResponseStatus::InProgress => panic!("never sent: {done:?}"),
        ResponseStatus::AwaitingInput => "awaiting".to_owned(),
        ResponseStatus::Completed => "completed".to_owned(),
        ResponseStatus::Failed => format!("failed ({})", error_line(done.error.as_ref().unwrap())),
        ResponseStatus::Cancelled => "cancelled".to_owned(),
        ResponseStatus::Incomplete => match done.incomplete_reason() {
            IncompleteReason::Unspecified => panic!("incomplete without a reason: {done:?}"),
            IncompleteReason::MaxOutputTokens => "incomplete (max_output_tokens)".to_owned(),
            IncompleteReason::ContentFilter => "incomplete (content_filter)".to_owned(),
            IncompleteReason::Interrupted => "incomplete (interrupted)".to_owned(),
            IncompleteReason::Budget => "incomplete (budget)".to_owned(),
        },
    };
    let finish = match done.finish_reason() {
        FinishReason::Unspecified => "",
        FinishReason::Stop => " stop",
        FinishReason::ToolCalls => " tool_calls",
        FinishReason::Length => " length",
        FinishReason::ContentFilter => " content_filter",
    };
    let calls = match done.call_ids.join(" ").as_str() {
        "" => String::new(),
        ids => format!(" open [{ids}]"),
    };
    let output: Vec<String> = done.output.iter().map(item_line).collect();
    let output = match output.join("; ").as_str() {
        "" => String::new(),
        items => format!(" output [{items}]"),
    };
    let usage = done.usage.as_ref().unwrap();
    format!(
        "done {status}{finish}{calls} items [{}] sampled {} in {}{output}",
        done.output_item_ids.join(" "),
        usage.output_tokens,
        usage.samples,
    )
}

fn verdict_line(verdict: &SafetyVerdict) -> String {
    let range = |range: &SafetyRange| format!("{}..{}", range.start, range.end);
    let action = match verdict.action() {
        SafetyAction::Unspecified | SafetyAction::Refuse => panic!("never sent: {verdict:?}"),
        SafetyAction::Observe => "observed",
        SafetyAction::Redact => "redacted",
        SafetyAction::End => "ended",
    };
    let tokens = verdict.tokens.as_ref();
    let tokens = tokens.map(|it| format!(" tokens {}", it.end - it.start));
    let late = if verdict.late { " late" } else { "" };
    assert_eq!(verdict.policy_version.len(), 16);
    format!(
        "{action}{late} {} in {} {}{}{}",
        verdict.rule,
        verdict.item_id,
        range(verdict.bytes.as_ref().unwrap()),
        tokens.unwrap_or_default(),
        verdict
            .score
            .map_or(String::new(), |score| format!(" {score}")),
    )
}

fn error_line(error: &proto::Error) -> String {
    let at = match error.param.as_str() {
        "" => String::new(),
        param => format!(" at {param}"),
    };
    let retry = match error.retry() {
        Retry::Unspecified => panic!("no advice: {error:?}"),
        Retry::Safe => "safe",
        Retry::ResendFull => "resend_full",
        Retry::Never => "never",
    };
    let after = match error.retry_after_ms {
        0 => String::new(),
        ms => format!(" in {ms} ms"),
    };
    format!("{}{at}, {retry}{after}: {}", error.code, error.message)
}

// What is promised of every stream.

/// Holds every message against what the protocol promises, whatever the test is about.
#[derive(Default)]
struct Checker {
    sequence: u64,
    /// Creates by their request id, and whether they still owe a `done` or an `error`.
    creates: HashMap<String, bool>,
    /// Cancels of creates that may wait: request id of the cancel to that of the create.
    cancels: HashMap<String, String>,
    /// Appends that still owe an answer.
    answers_due: HashSet<String>,
    responses: HashMap<String, Watched>,
}

#[derive(Default)]
struct Watched {
    /// What its create carried.
    request_id: String,
    ended: bool,
    awaits: bool,
    /// Output items in their order; a whole one is `None`.
    items: Vec<Option<Text>>,
    whole: Vec<String>,
    /// How many of them the last `done` had told of.
    told: usize,
}

#[derive(Default)]
struct Text {
    id: String,
    deltas: String,
}

impl Checker {
    fn check(&mut self, message: &ConnectResponse) {
        self.sequence += 1;
        assert_eq!(message.sequence_number, self.sequence, "{message:?}");
        let event = message.event.as_ref().unwrap();
        if let Event::Error(_) = event {
            self.end_of(&message.request_id);
            return;
        }
        if let Event::GoAway(_) = event {
            assert_eq!((&*message.response_id, &*message.request_id), ("", ""));
            return;
        }
        let id = &message.response_id;
        if let Event::Created(created) = event {
            assert!(created.created_at_ms > 0);
            let watched = Watched {
                request_id: message.request_id.clone(),
                ..Watched::default()
            };
            let before = self.responses.insert(id.clone(), watched);
            assert!(before.is_none(), "created twice: {id}");
            return;
        }
        if let Some(create) = self.cancels.get(&message.request_id)
            && !self.responses.contains_key(id)
        {
            // It was cancelled while it waited, so this is all that comes of it.
            let watched = Watched {
                request_id: create.clone(),
                ..Watched::default()
            };
            self.responses.insert(id.clone(), watched);
        }
        let response = self.responses.get_mut(id).expect("created comes first");
        assert!(!response.ended, "after its end: {message:?}");
        match event {
            Event::Appended(_) => {
                assert!(self.answers_due.remove(&message.request_id));
            }
            Event::OutputItemAdded(added) => {
                assert_eq!(added.output_index as usize, response.items.len());
                let item = added.item.as_ref().unwrap();
                assert_eq!(item.status(), ItemStatus::InProgress);
                response.items.push(Some(Text {
                    id: item.id.clone(),
                    ..Text::default()
                }));
            }
            Event::OutputTextDelta(delta) => response.more(delta.output_index, &delta.delta),
            Event::ReasoningTextDelta(delta) => response.more(delta.output_index, &delta.delta),
            Event::FunctionCallArgumentsDelta(delta) => {
                response.more(delta.output_index, &delta.delta);
            }
            Event::OutputItemDone(done) => response.whole(done),
            Event::SafetyVerdict(_) => {}
            Event::Done(done) => {
                response.done(done);
                if response.ended {
                    let create = response.request_id.clone();
                    self.end_of(&create);
                }
            }
            Event::Created(_) | Event::Error(_) | Event::GoAway(_) => unreachable!(),
        }
    }

    fn end_of(&mut self, request_id: &str) {
        if let Some(due) = self.creates.get_mut(request_id) {
            assert!(*due, "{request_id} ended twice");
            *due = false;
        }
        self.answers_due.remove(request_id);
    }

    /// The stream has ended well: everything that was created has ended, every append is answered.
    fn end(&self) {
        let open: Vec<&String> = self
            .responses
            .iter()
            .filter_map(|(id, response)| (!response.ended).then_some(id))
            .collect();
        assert!(open.is_empty(), "without an end: {open:?}");
        let due: Vec<_> = self.creates.iter().filter(|(_, due)| **due).collect();
        assert!(due.is_empty(), "creates without an end: {due:?}");
        assert!(self.answers_due.is_empty(), "{:?}", self.answers_due);
    }
}

impl Watched {
    fn more(&mut self, index: u32, delta: &str) {
        assert!(!delta.is_empty());
        let item = self.items[index as usize].as_mut();
        item.expect("no deltas after the item")
            .deltas
            .push_str(delta);
    }

    fn whole(&mut self, done: &proto::OutputItemDone) {
        let item = done.item.as_ref().unwrap();
        let text = self.items[done.output_index as usize].take();
        let text = text.expect("an item ends once");
        assert_eq!(text.id, item.id);
        let (content, counts) = match item.item.as_ref().unwrap() {
            item::Item::Message(message) => (message_text(message), true),
            item::Item::Reasoning(reasoning) => (reasoning.content.clone(), true),
            item::Item::FunctionCall(call) => (
                call.arguments.clone(),
                item.status() == ItemStatus::Completed,
            ),
            // Its text is inside of what the model writes, so it has no deltas.
            item::Item::CustomToolCall(_) => {
                (String::new(), item.status() == ItemStatus::Completed)
            }
            other => panic!("no output: {other:?}"),
        };
        let called_off = content.is_empty() && item.status() == ItemStatus::Incomplete;
        assert!(
            text.deltas.is_empty() || called_off || text.deltas == content,
            "the deltas are {:?}, the item is {content:?}",
            text.deltas
        );
        if counts {
            self.whole.push(item.id.clone());
        }
    }

    fn done(&mut self, done: &Done) {
        let status = done.status();
        self.awaits = status == ResponseStatus::AwaitingInput;
        self.ended = !self.awaits;
        if !matches!(status, ResponseStatus::Failed | ResponseStatus::Cancelled) {
            assert!(self.items.iter().all(Option::is_none), "an item has no end");
            let first = if self.awaits { self.told } else { 0 };
            assert_eq!(done.output_item_ids, self.whole[first..]);
            self.told = self.whole.len();
        }
        assert!(!self.awaits || !done.call_ids.is_empty());
        let usage = done.usage.as_ref().unwrap();
        assert_eq!(usage.total_tokens, usage.input_tokens + usage.output_tokens);
        assert!(done.timing.as_ref().unwrap().done_us > 0);
    }
}
