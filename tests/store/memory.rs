//! Streams over a store in a file, without the program around them.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use hotloop::{
    archive::Archive,
    backend::sim::{Pace, Sim},
    event::{Code, Done, Event, PromptReport, RerenderReason, Usage},
    files::{BuiltIn, Files},
    item::{Body, Item, Part, RequestId, ResponseId, Role, Tenant, Tool, ToolKind},
    model::{Artifacts, Model, Models},
    render::Heads,
    request::{Create, NewItem, Settings},
    session::{Committed, Held, ParkedLimits, Sessions},
    store::{Embedded, Limits, Queue, Record, Store, StoreError},
    stream::{self, Command, Incoming, Outgoing, Shared},
};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::shared::shared;

const DAY: Duration = Duration::from_secs(24 * 3600);

const STREAM: stream::Limits = stream::Limits {
    age_max: DAY,
    go_away: Duration::ZERO,
    lanes_max: 32,
    sampling_max: 16,
    waiting_max: 64,
    held_time_max: DAY,
    send_time_max: DAY,
    events_queued_max: 64,
    commands_queued_max: 64,
};

const LIMITS: Limits = Limits {
    responses_max: 10_000,
    bytes_max: 1 << 30,
    age_max: DAY,
};

/// A model that plays the demonstration as fast as it can.
fn model(name: &str, artifacts: Arc<Artifacts>) -> Arc<Model> {
    let pace = Pace {
        tokens_per_second: 0.0,
        first_token: Duration::ZERO,
    };
    let sim = Sim::new(Sim::demo_rules(), artifacts.clone(), pace).unwrap();
    Arc::new(Model {
        name: name.into(),
        artifacts,
        backend: Arc::new(sim),
        context_length: 1 << 20,
        parameters: 0,
        output_tokens_max: 1 << 15,
        fallback: None,
        replicas: None,
        stand_in: false,
    })
}

fn sim() -> Arc<Model> {
    model(
        "sim",
        Arc::new(Artifacts::load(&Files::BuiltIn(BuiltIn::SimAgent), None).unwrap()),
    )
}

/// The same with a template that takes the reasoning of earlier answers out of the prompt.
fn strips(name: &str) -> Arc<Model> {
    let dir = TempDir::new().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (from, to) in [
        ("models/sim/tokenizer.json", "tokenizer.json"),
        ("models/sim/tokenizer_config.json", "tokenizer_config.json"),
        (
            "tests/templates/chatml_strip_reasoning.jinja",
            "chat_template.jinja",
        ),
    ] {
        std::fs::copy(root.join(from), dir.path().join(to)).unwrap();
    }
    model(
        name,
        Arc::new(Artifacts::load(&Files::from(dir.path()), None).unwrap()),
    )
}

/// A server's state over the file in this directory.
struct Server {
    archive: Arc<Archive>,
    models: Arc<Models>,
    heads: Arc<Heads>,
    responses_held_max: usize,
}

impl Server {
    fn open(dir: &TempDir, models: &[Arc<Model>]) -> Self {
        Self::with(dir, models, 1 << 30, 4096)
    }

    /// One whose memory forgets everything but what a stream has just committed.
    fn forgetful(dir: &TempDir, models: &[Arc<Model>]) -> Self {
        Self::with(dir, models, 0, 1)
    }

    fn with(dir: &TempDir, models: &[Arc<Model>], parked: u64, responses_held_max: usize) -> Self {
        let store = Embedded::open(&file(dir), LIMITS).unwrap();
        let queue = Queue::new(Arc::new(store), 64 << 20).unwrap();
        Self::over(queue, models, parked, responses_held_max)
    }

    fn over(queue: Queue, models: &[Arc<Model>], parked: u64, responses_held_max: usize) -> Self {
        let models = Arc::new(Models::new(models[0].clone(), models[1..].to_vec()));
        let heads = Arc::new(Heads::new(1 << 24));
        let parked = ParkedLimits {
            bytes_max: parked,
            tenant_bytes_max: parked,
            time_max: DAY,
        };
        let sessions = Sessions::new(parked);
        Self {
            archive: Archive::with_store(sessions, queue, models.clone(), heads.clone()),
            models,
            heads,
            responses_held_max,
        }
    }

    fn stream(&self, tenant: &str) -> Client {
        let archive = self.archive.clone();
        let (shared, events) = shared(self.models.clone(), archive, tenant, STREAM);
        let (commands, inbound) = mpsc::channel(8);
        let held = Held::new(
            self.archive.sessions().clone(),
            tenant.into(),
            self.responses_held_max,
        );
        let shared = Arc::new(Shared {
            heads: self.heads.clone(),
            held,
            ..shared
        });
        let inbound = tokio_stream::wrappers::ReceiverStream::new(inbound);
        let run = stream::run(inbound, shared, std::future::pending());
        Client {
            commands,
            events,
            run: tokio::spawn(run),
        }
    }

    async fn load(&self, tenant: &str, id: &ResponseId) -> Option<Arc<Committed>> {
        self.archive.load(&tenant.into(), id).await.unwrap()
    }

    /// Ends as a process does that is told to stop.
    async fn end(self) {
        self.archive.flush().await;
        let archive = Arc::into_inner(self.archive);
        drop(archive.expect("every stream has ended"));
    }
}

fn file(dir: &TempDir) -> std::path::PathBuf {
    dir.path().join("responses")
}

struct Client {
    commands: mpsc::Sender<Incoming>,
    events: Outgoing,
    run: tokio::task::JoinHandle<()>,
}

impl Client {
    async fn command(&self, lane: &str, command: Command) {
        let incoming = Incoming {
            lane: lane.to_owned(),
            request_id: RequestId::from(""),
            command: Ok(command),
        };
        self.commands.send(incoming).await.unwrap();
    }

    async fn send(&self, lane: &str, create: Create) {
        self.command(lane, Command::Create(Box::new(create))).await;
    }

    /// How the next response ends, or why it is refused.
    async fn ended(&mut self) -> Result<(ResponseId, Done), Code> {
        loop {
            let (_, envelope) = self.events.next().await.unwrap().unwrap();
            match envelope.event {
                Event::Done(done) => return Ok((envelope.response_id.unwrap(), *done)),
                Event::Error(error) => return Err(error.code),
                _ => {}
            }
        }
    }

    async fn create(&mut self, create: Create) -> Result<(ResponseId, Done), Code> {
        self.send("", create).await;
        self.ended().await
    }

    /// Says something, from nothing or behind this response.
    async fn say(&mut self, previous: Option<&ResponseId>, text: &str) -> (ResponseId, Done) {
        self.create(say(previous, text)).await.unwrap()
    }

    async fn end(self) {
        drop(self.commands);
        drop(self.events);
        self.run.await.unwrap();
    }
}

fn message(text: &str) -> NewItem {
    NewItem::Item(Item::new(Body::Message {
        role: Role::User,
        parts: vec![Part::InputText(text.into())],
    }))
}

fn say(previous: Option<&ResponseId>, text: &str) -> Create {
    Create {
        previous: previous.cloned(),
        input: vec![message(text)],
        ..Create::default()
    }
}

fn output(call_id: &hotloop::item::CallId, text: &str) -> NewItem {
    NewItem::Item(Item::new(Body::FunctionCallOutput {
        call_id: call_id.clone(),
        output: text.into(),
    }))
}

fn answer(previous: &ResponseId, done: &Done, text: &str) -> Create {
    let outputs = done.call_ids.iter().enumerate();
    Create {
        previous: Some(previous.clone()),
        input: outputs
            .map(|(n, call_id)| output(call_id, &format!("{text} {n}")))
            .collect(),
        ..Create::default()
    }
}

fn with_step(create: Create) -> Create {
    let step = Tool {
        name: "step".into(),
        description: Some("Does a step – <|im_start|> is only text here.".into()),
        kind: ToolKind::Function {
            parameters: r#"{"type":"object","properties":{"n":{"type":"integer"}}}"#.into(),
            strict: false,
        },
    };
    Create {
        settings: Settings {
            instructions: Some("Be exact. 精确。".into()),
            tools: Some([step].into()),
            temperature: Some(0.5),
            ..create.settings
        },
        metadata: [("who".to_owned(), "a test".to_owned())].into(),
        ..create
    }
}

/// Everything about a response that matters to whoever continues it.
fn portrait(response: &Committed) -> String {
    let Committed {
        id,
        tenant,
        root,
        parent,
        model,
        settings,
        date,
        affinity,
        batches,
        chat: _,
        input,
        output,
        view,
        pending,
        rope,
        prompt_tokens,
        prompt_entries,
        open_calls,
        status,
        finish,
        usage,
        prompt,
        created_at_ms,
        metadata,
        storing: _,
        // What comes from the store is checked anew.
        checked: _,
    } = response;
    let view = view.as_ref().unwrap();
    let entries: Vec<_> = view
        .entries
        .iter()
        .map(|entry| (entry.speaker, entry.items))
        .collect();
    let boundaries: Vec<_> = (0..=rope.len_bytes())
        .map(|byte| rope.boundary(byte))
        .collect();
    let slices = rope.slices();
    let parent = parent.as_ref().map(|parent| &parent.id);
    format!(
        "{:#?}",
        (
            (id, tenant, root, parent, model, settings, date, affinity),
            (batches, input, output, pending, open_calls),
            (entries, view.entries.len(), view.visible, view.head.date()),
            (
                slices,
                boundaries,
                prompt_tokens,
                prompt_entries,
                rope.fingerprint()
            ),
            (rope.sampled_tokens(), status, finish, usage, prompt),
            (created_at_ms, metadata),
        )
    )
}

/// Conversations of many kinds: responses whose calls are open, and the ends of other branches.
async fn talk(client: &mut Client) -> (Vec<ResponseId>, Vec<ResponseId>) {
    let mut ends = Vec::new();
    // Calls, one and several at a time, and their outputs; text that looks like control tokens.
    let rollout = with_step(say(None, "rollout 3"));
    let (mut last, mut done) = client.create(rollout).await.unwrap();
    while !done.call_ids.is_empty() {
        let next = answer(&last, &done, "done <|im_end|> – erledigt ✓");
        (last, done) = client.create(next).await.unwrap();
    }
    let (open, calls) = client.say(Some(&last), "parallel 3").await;
    let outputs = answer(&open, &calls, "fünf");
    ends.push(client.create(outputs).await.unwrap().0);
    // Other branches of the same: other settings, settings that are taken back, and nothing new at all.
    let changed = Create {
        settings: Settings {
            instructions: Some("Be brief.".into()),
            stop: Some(["word3".into()].into()),
            ..Settings::default()
        },
        reset: vec!["tools".to_owned(), "temperature".to_owned()],
        ..say(Some(&last), "slow 9")
    };
    ends.push(client.create(changed).await.unwrap().0);
    let nothing = Create {
        previous: Some(last.clone()),
        prepare_only: true,
        ..Create::default()
    };
    ends.push(client.create(nothing).await.unwrap().0);
    // A summary in place of everything before it.
    let summary = NewItem::Item(Item::new(Body::Compaction {
        summary: "There were three steps.".into(),
    }));
    let compacted = Create {
        input: vec![summary, message("echo from here on")],
        ..say(Some(&last), "")
    };
    ends.push(client.create(compacted).await.unwrap().0);
    // A held response that is finalised before its call is answered, with a message that came too late.
    let held = Create {
        hold: true,
        ..with_step(say(None, "rollout 2"))
    };
    let (held, _) = client.create(held).await.unwrap();
    let late = Command::Append {
        response_id: held.clone(),
        input: vec![message("and be quick")],
    };
    client.command("", late).await;
    let response_id = held.clone();
    client.command("", Command::Done { response_id }).await;
    client.ended().await.unwrap();
    // Reasoning, cut off by a limit, and the same kept whole.
    let (thought, _) = client.say(None, "think 日本語のテキスト 🦀 é").await;
    let short = Create {
        settings: Settings {
            max_output_tokens: Some(3),
            ..Settings::default()
        },
        ..say(Some(&thought), "think about much more than that")
    };
    let (short, _) = client.create(short).await.unwrap();
    ends.push(short.clone());
    ends.push(client.say(Some(&short), "echo and on").await.0);
    ends.push(client.say(Some(&thought), "think again").await.0);
    (vec![open, held], ends)
}

/// Continues each of these: how the prompts came to be, their fingerprints included.
async fn go_on(server: &Server, ends: &[ResponseId]) -> Vec<(PromptReport, Usage)> {
    let mut client = server.stream("acme");
    let mut reports = Vec::new();
    for end in ends {
        let (_, done) = client.say(Some(end), "echo more").await;
        reports.push((done.prompt, done.usage));
    }
    client.end().await;
    reports
}

async fn portraits(server: &Server, id: &ResponseId) -> Vec<String> {
    let response = server.load("acme", id).await.unwrap();
    response.chain().map(portrait).collect()
}

#[tokio::test]
async fn a_restart_gives_every_conversation_back_as_it_was() {
    for (model, rewrites) in [(sim(), false), (strips("strips"), true)] {
        let models = [model];
        let dir = TempDir::new().unwrap();
        let server = Server::open(&dir, &models);
        let mut client = server.stream("acme");
        let (open, ends) = talk(&mut client).await;
        let mut before = Vec::new();
        for id in ends.iter().chain(&open) {
            before.push(portraits(&server, id).await);
        }
        client.end().await;
        let held = server.load("acme", &open[1]).await.unwrap();
        assert_eq!((held.pending.len(), held.open_calls.len()), (1, 1));
        drop(held);
        let expected = go_on(&server, &ends).await;
        let rewritten = |(report, _): &(PromptReport, Usage)| report.dropped_tokens > 0;
        assert_eq!(expected.iter().any(rewritten), rewrites);
        server.end().await;

        let server = Server::open(&dir, &models);
        for (id, before) in ends.iter().chain(&open).zip(before) {
            assert!(server.load("other", id).await.is_none());
            assert_eq!(portraits(&server, id).await, before);
        }
        assert_eq!(go_on(&server, &ends).await, expected);
        // What was read once is in memory: both ends of a fork share what is before it.
        let [one, two] = [&ends[1], &ends[2]].map(|id| server.load("acme", id));
        let (one, two) = (one.await.unwrap(), two.await.unwrap());
        assert!(Arc::ptr_eq(
            one.parent.as_ref().unwrap(),
            two.parent.as_ref().unwrap()
        ));
        drop((one, two));
        server.end().await;
    }
}

#[tokio::test]
async fn a_server_that_forgets_at_once_goes_on_all_the_same() {
    let models = [sim()];
    let dir = TempDir::new().unwrap();
    let server = Server::open(&dir, &models);
    let mut client = server.stream("acme");
    let (_, ends) = talk(&mut client).await;
    client.end().await;
    let expected = go_on(&server, &ends).await;
    drop(server);

    let dir = TempDir::new().unwrap();
    let server = Server::forgetful(&dir, &models);
    let mut client = server.stream("acme");
    // Nothing waits for the file here: what is not written yet is found too.
    let (_, ends) = talk(&mut client).await;
    client.end().await;
    let go_on = go_on(&server, &ends).await;
    let fingerprints = |reports: &[(PromptReport, Usage)]| -> Vec<[u8; 16]> {
        reports
            .iter()
            .map(|(report, _)| report.fingerprint)
            .collect()
    };
    // The call ids of the rollout differ, but no template shows them.
    assert_eq!(fingerprints(&go_on), fingerprints(&expected));
    server.end().await;
}

#[tokio::test]
async fn store_false_leaves_no_trace_and_nothing_that_continues_it_does() {
    let dir = TempDir::new().unwrap();
    let models = [sim()];
    let server = Server::open(&dir, &models);
    let mut client = server.stream("acme");
    let store = |store, create: Create| Create {
        settings: Settings {
            store: Some(store),
            ..create.settings
        },
        metadata: [("secret".to_owned(), "in the metadata".to_owned())].into(),
        ..create
    };
    let (stored, _) = client.say(None, "echo WRITTEN-DOWN").await;
    let secret = store(false, say(Some(&stored), "echo SECRET-ONE"));
    let (secret, _) = client.create(secret).await.unwrap();
    let (inherits, _) = client.say(Some(&secret), "echo SECRET-TWO").await;
    let wants = store(true, say(Some(&inherits), "echo SECRET-THREE"));
    let (wants, _) = client.create(wants).await.unwrap();
    let root = store(false, say(None, "echo SECRET-FOUR"));
    let (root, _) = client.create(root).await.unwrap();
    client.end().await;
    server.end().await;

    let bytes = std::fs::read(file(&dir)).unwrap();
    let holds = |text: &str| memchr::memmem::find(&bytes, text.as_bytes()).is_some();
    assert!(holds("WRITTEN-DOWN") && holds(stored.as_str()));
    for id in [&secret, &inherits, &wants, &root] {
        assert!(!holds(id.as_str()));
    }
    assert!(!holds("SECRET") && !holds("in the metadata"));

    let server = Server::open(&dir, &models);
    let mut client = server.stream("acme");
    for id in [&secret, &inherits, &wants, &root] {
        let refused = client.create(say(Some(id), "echo more")).await;
        assert_eq!(refused.err(), Some(Code::PreviousResponseNotFound));
    }
    // The parent is as it was.
    client.say(Some(&stored), "echo more").await;
    client.end().await;
    server.end().await;
}

#[tokio::test]
async fn what_nobody_has_is_not_found_at_once_and_of_no_other_tenant() {
    let dir = TempDir::new().unwrap();
    let models = [sim()];
    let server = Server::forgetful(&dir, &models);
    let mut client = server.stream("acme");
    let (mine, _) = client.say(None, "echo mine").await;
    client.end().await;
    let mut other = server.stream("other");
    for id in [&mine, &ResponseId::from("resp_no"), &ResponseId::from("")] {
        let refused = other.create(say(Some(id), "echo more")).await;
        assert_eq!(refused.err(), Some(Code::PreviousResponseNotFound));
    }
    // The lane is busy for good, and the answer comes all the same.
    other.send("", say(None, "hang")).await;
    let nothing = ResponseId::from("resp_no");
    let refused = other.create(say(Some(&nothing), "echo more")).await;
    assert_eq!(refused.err(), Some(Code::PreviousResponseNotFound));
    other.end().await;
    server.end().await;
}

#[tokio::test]
async fn another_text_side_renders_the_conversation_anew() {
    let dir = TempDir::new().unwrap();
    let server = Server::open(&dir, &[model("m", sim().artifacts.clone())]);
    let mut client = server.stream("acme");
    let (thought, _) = client.say(None, "think of something").await;
    let (last, _) = client.say(Some(&thought), "echo é").await;
    let named = Create {
        settings: Settings {
            model: Some("m".into()),
            ..Settings::default()
        },
        ..say(None, "echo named")
    };
    let (named, _) = client.create(named).await.unwrap();
    client.end().await;
    server.end().await;

    // What a server under the new text side makes of the same conversation.
    let elsewhere = TempDir::new().unwrap();
    let server = Server::open(&elsewhere, &[strips("new")]);
    let mut client = server.stream("acme");
    let (thought, _) = client.say(None, "think of something").await;
    let (again, _) = client.say(Some(&thought), "echo é").await;
    let (_, expected) = client.say(Some(&again), "echo more").await;
    client.end().await;
    server.end().await;

    let server = Server::open(&dir, &[strips("new")]);
    assert!(server.load("acme", &last).await.unwrap().view.is_none());
    let mut client = server.stream("acme");
    let (next, done) = client.say(Some(&last), "echo more").await;
    assert_eq!(done.prompt.rerender, Some(RerenderReason::Model));
    assert_eq!(done.prompt.tokens, expected.prompt.tokens);
    let refused = client.create(say(Some(&named), "echo more")).await;
    assert_eq!(refused.err(), Some(Code::ModelNotFound));
    client.end().await;
    // Its past has no view, and no portrait.
    let before = portrait(&server.load("acme", &next).await.unwrap());
    server.end().await;

    // From there on it is stored as it was rendered then.
    let server = Server::open(&dir, &[strips("new")]);
    let after = portrait(&server.load("acme", &next).await.unwrap());
    assert_eq!(after, before);
    let reports = go_on(&server, &[next]).await;
    assert_eq!(reports[0].0.rerender, None);
    server.end().await;
}

#[tokio::test]
async fn what_is_deleted_is_gone_for_good_and_what_continues_it_lives_on_in_memory() {
    let dir = TempDir::new().unwrap();
    let models = [sim()];
    let server = Server::open(&dir, &models);
    let acme = Tenant::from("acme");
    let mut client = server.stream("acme");
    let (first, _) = client.say(None, "echo one").await;
    let (second, _) = client.say(Some(&first), "echo two").await;
    let (third, _) = client.say(Some(&second), "echo three").await;
    let other = Tenant::from("other");
    assert_eq!(server.archive.delete(&other, &second).await, Ok(false));
    assert_eq!(server.archive.delete(&acme, &second).await, Ok(true));
    assert_eq!(server.archive.delete(&acme, &second).await, Ok(false));
    let refused = client.create(say(Some(&second), "echo more")).await;
    assert_eq!(refused.err(), Some(Code::PreviousResponseNotFound));
    let (fourth, _) = client.say(Some(&third), "echo four").await;
    client.end().await;
    server.end().await;

    let server = Server::open(&dir, &models);
    for id in [&second, &third, &fourth] {
        assert!(server.load("acme", id).await.is_none());
    }
    assert!(server.load("acme", &first).await.is_some());
    // Also what is in no memory can be deleted.
    assert_eq!(server.archive.delete(&acme, &first).await, Ok(true));
    assert!(server.load("acme", &first).await.is_none());
    server.end().await;
}

#[tokio::test]
async fn many_that_continue_the_same_read_it_once() {
    let dir = TempDir::new().unwrap();
    let models = [sim()];
    let server = Server::open(&dir, &models);
    let mut client = server.stream("acme");
    let (mut last, _) = client.say(None, "echo 0").await;
    for n in 1..20 {
        last = client.say(Some(&last), &format!("echo {n}")).await.0;
    }
    client.end().await;
    server.end().await;

    let server = Server::open(&dir, &models);
    let mut client = server.stream("acme");
    for lane in 0..8 {
        let lane = lane.to_string();
        client.send(&lane, say(Some(&last), "echo more")).await;
    }
    let mut parents = Vec::new();
    for _ in 0..8 {
        let (id, done) = client.ended().await.unwrap();
        assert!(done.prompt.extends_previous);
        let response = server.load("acme", &id).await.unwrap();
        parents.push(Arc::as_ptr(response.parent.as_ref().unwrap()));
    }
    parents.dedup();
    assert_eq!(parents.len(), 1);
    client.end().await;
    server.end().await;
}

/// A file on a disk that may be full.
struct Disk {
    file: Embedded,
    full: AtomicBool,
    refused: mpsc::UnboundedSender<()>,
}

impl Store for Disk {
    fn put(&self, records: &[Arc<Record>]) -> Result<(), StoreError> {
        if self.full.load(Ordering::Relaxed) {
            let _ = self.refused.send(());
            return Err(StoreError::Medium("played".into()));
        }
        self.file.put(records)
    }

    fn get(&self, tenant: &Tenant, id: &ResponseId) -> Result<Option<Record>, StoreError> {
        self.file.get(tenant, id)
    }

    fn delete(&self, tenant: &Tenant, id: &ResponseId) -> Result<bool, StoreError> {
        self.file.delete(tenant, id)
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.file.sweep()
    }
}

#[tokio::test]
async fn what_found_no_room_is_stored_with_what_continues_it() {
    let dir = TempDir::new().unwrap();
    let models = [sim()];
    let (refused, mut refusals) = mpsc::unbounded_channel();
    let disk = Arc::new(Disk {
        file: Embedded::open(&file(&dir), LIMITS).unwrap(),
        full: AtomicBool::new(true),
        refused,
    });
    // Room for one response.
    let queue = Queue::new(disk.clone(), 1024).unwrap();
    let server = Server::over(queue, &models, 1 << 30, 4096);
    let mut client = server.stream("acme");
    let (first, _) = client.say(None, "echo one").await;
    // The second attempt: the first has failed, and that is known.
    refusals.recv().await.unwrap();
    refusals.recv().await.unwrap();
    let (second, _) = client.say(Some(&first), "echo two").await;
    let (third, _) = client.say(Some(&second), "echo three").await;

    disk.full.store(false, Ordering::Relaxed);
    server.archive.flush().await;
    assert!(disk.get(&"acme".into(), &first).unwrap().is_some());
    assert!(disk.get(&"acme".into(), &second).unwrap().is_none());
    let (fourth, _) = client.say(Some(&third), "echo four").await;
    let before = portraits(&server, &fourth).await;
    client.end().await;
    server.end().await;
    drop(disk);

    let server = Server::open(&dir, &models);
    assert_eq!(portraits(&server, &fourth).await, before);
    server.end().await;
}
