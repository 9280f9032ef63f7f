//! Random conversations, each prompt of which is held against its reference.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use hotloop::{
    backend::SampleEnd,
    event::{Event, RerenderReason},
    item::{Body, Item, ItemStatus, Role, Tool, ToolKind},
    ledger::{Rope, Source},
    model::Model,
    parse::{Answer as Words, FormattedPiece},
    request::{Effort, NewItem, Settings},
    response::{End, Next, Open, RoundEnd},
    session::Committed,
    template::TemplateError,
};
use proptest::{prelude::*, sample::Index};

use crate::{
    reference::{
        Batches, Names, Reference, fingerprint, full_text, harmless, lossy, messages, same_tokens,
    },
    support::{
        client::{Ask, Client, answer, done, message, output, text_of},
        families::Family,
        scripted::Scripted,
    },
};

#[derive(Debug, Clone)]
pub struct Step {
    parent: Index,
    latest: bool,
    messages: Vec<(u8, String)>,
    change: Option<Change>,
    prepare_only: bool,
    hold: bool,
    answers: Vec<Answer>,
    outputs: Vec<String>,
    seed: u64,
}

#[derive(Debug, Clone)]
pub struct Change {
    tools: Option<u8>,
    instructions: Option<String>,
    effort: Option<u8>,
    stop: Option<bool>,
    parallel: Option<bool>,
}

#[derive(Debug, Clone)]
pub struct Answer {
    reasoning: Option<String>,
    text: String,
    calls: Vec<(u8, u8)>,
    canonical: bool,
    /// An added token in the middle of the text.
    stray: bool,
    /// Where a limit of tokens cuts it off.
    cut_at: Option<Index>,
    early: bool,
    steer: Option<String>,
}

const FRAGMENTS: [&str; 44] = [
    "hello",
    "The file",
    " ",
    "\n",
    "\n\n",
    "\r\n",
    "\u{a0}",
    "e\u{301}",
    "é",
    "👍🏽",
    "👨‍👩‍👧",
    "",
    "日本語",
    "42",
    "Paris is nice.",
    "END",
    "  two",
    "\t",
    "{\"a\": [1, 2]}",
    "\u{fffd}",
    "\u{0}",
    "ﬁ",
    "مرحبا",
    "a",
    "<|im_end|>",
    "<|im_",
    "<|im_start|>system\n",
    "[INST]",
    "[/INST",
    "<tool_call>",
    "</tool_call>",
    "</think>",
    "<think>",
    "<|eot_id|>",
    "<|end|>",
    "<|channel|>",
    "<",
    "|>",
    "</s>",
    "<s>",
    "[TOOL_CALLS]",
    "<|im_start|",
    "<tool_response>",
    "<|return|>",
];

const ARGUMENTS: [&str; 7] = [
    "{}",
    r#"{"city": "Paris"}"#,
    r#"{"path":"src/main.rs",  "lines":[1,2,{"deep":null}], "x": 1.50e3}"#,
    r#"{"text": "<|im_end|>\n</tool_call> \"quoted\""}"#,
    "{\"text\": \"\\u003c|im_end|>\", \"ünï\": \"e\u{301} 👍\"}",
    "{\n  \"pretty\": true\n}",
    r#"{"text": "[INST] <|eot_id|><|call|></s>"}"#,
];

pub fn tools(set: u8) -> Arc<[Tool]> {
    let pool = [
        (
            "get_weather",
            Some("Tells the weather."),
            r#"{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}"#,
        ),
        (
            "read_file",
            None,
            r#"{"type":"object","properties":{"path":{"type":"string","description":"no <|im_end|> here"},"range":{"type":"object","properties":{"first":{"type":"integer","default":1},"kinds":{"type":"array","items":{"enum":["a","b"]}}}}}}"#,
        ),
        (
            "run",
            Some("Runs it. <|im_start|>system\n[INST]"),
            r#"{"type": "object", "properties": {"command": {"type": "string", "description": "\u003c|im_end|>\u003c|eot_id|>\u003c|end|>\u003c/s>"}}}"#,
        ),
        (
            "noop",
            Some("é 👍\n"),
            r#"{"type": "object", "properties": {}}"#,
        ),
    ];
    let all = pool.into_iter().enumerate();
    all.filter(|(index, _)| set >> index & 1 == 1)
        .map(|(_, (name, description, parameters))| Tool {
            name: name.into(),
            description: description.map(Arc::from),
            kind: ToolKind::Function {
                parameters: parameters.into(),
                strict: false,
            },
        })
        .collect()
}

fn text() -> impl Strategy<Value = String> {
    let plain = prop::sample::select(&FRAGMENTS[..24]);
    let any = prop::sample::select(&FRAGMENTS[..]);
    prop_oneof![
        3 => prop::collection::vec(plain, 0..4).prop_map(|parts| parts.concat()),
        1 => prop::collection::vec(any, 0..4).prop_map(|parts| parts.concat()),
    ]
}

fn sampled_answer() -> impl Strategy<Value = Answer> {
    let words = (
        prop::option::weighted(0.4, text()),
        text(),
        prop::collection::vec((any::<u8>(), any::<u8>()), 0..3),
    );
    let ways = (
        prop::bool::weighted(0.6),
        prop::bool::weighted(0.1),
        prop::option::weighted(0.15, any::<Index>()),
        prop::bool::weighted(0.3),
        prop::option::weighted(0.1, text()),
    );
    (words, ways).prop_map(|(words, ways)| Answer {
        reasoning: words.0,
        text: words.1,
        calls: words.2,
        canonical: ways.0,
        stray: ways.1,
        cut_at: ways.2,
        early: ways.3,
        steer: ways.4,
    })
}

pub fn step() -> impl Strategy<Value = Step> {
    let change = (
        prop::option::of(0u8..16),
        prop::option::of(text()),
        prop::option::of(0u8..5),
        prop::option::of(any::<bool>()),
        prop::option::of(any::<bool>()),
    )
        .prop_map(|(tools, instructions, effort, stop, parallel)| Change {
            tools,
            instructions,
            effort,
            stop,
            parallel,
        });
    let what = (
        prop::collection::vec((any::<u8>(), text()), 0..3),
        prop::option::weighted(0.15, change),
        prop::bool::weighted(0.1),
        any::<bool>(),
    );
    let then = (
        prop::collection::vec(sampled_answer(), 1..4),
        prop::collection::vec(text(), 1..4),
        any::<u64>(),
    );
    (any::<Index>(), prop::bool::weighted(0.8), what, then).prop_map(
        |(parent, latest, what, then)| Step {
            parent,
            latest,
            messages: what.0,
            change: what.1,
            prepare_only: what.2,
            hold: what.3,
            answers: then.0,
            outputs: then.1,
            seed: then.2,
        },
    )
}

/// Numbers that look random.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }
}

/// A committed response, with the reference of its prompt and sample.
struct Node {
    committed: Arc<Committed>,
    batches: Batches,
    pending: Vec<Arc<Item>>,
    reference: Reference,
    names: Names,
    ids: Vec<u32>,
    regular: bool,
}

pub struct Rollout<'a> {
    family: &'a Family,
    client: Client,
    model: Arc<Model>,
    backend: Arc<Scripted>,
    nodes: Vec<Node>,
    prompts: &'a Prompts,
}

/// How many prompts there were, and how many of them say what.
#[derive(Default)]
pub struct Prompts {
    pub all: AtomicUsize,
    /// Held against the crate's own encoding of the whole text, too.
    pub whole: AtomicUsize,
    /// Extensions of the ones before them.
    pub extend: AtomicUsize,
}

/// A response in progress beside its reference.
struct Run {
    open: Open,
    batches: Batches,
    reference: Reference,
    names: Names,
    generation_prompt: bool,
    /// The prompt and sample before the current prompt; none for a new conversation.
    before: Option<Vec<u32>>,
    /// Whether that ended in a sample.
    sampled: bool,
    settings_changed: bool,
    /// The sample before was one that a template can write again.
    regular: bool,
    settings: Settings,
}

impl Run {
    /// Whether texts may end a sample.
    fn stops(&self) -> bool {
        self.settings
            .stop
            .as_ref()
            .is_some_and(|texts| !texts.is_empty())
    }
}

impl<'a> Rollout<'a> {
    pub fn new(family: &'a Family, prompts: &'a Prompts) -> Self {
        let (model, backend) = family.model(1_000_000);
        Self {
            family,
            client: Client::default(),
            model,
            backend,
            nodes: Vec::new(),
            prompts,
        }
    }

    pub fn run(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(step);
        }
        for node in &self.nodes {
            // Whatever was made of it later, and refused: a response never changes.
            let rope = &node.committed.rope;
            assert_eq!(rope.tokens_from(0), node.ids);
            assert_eq!(text_of(rope), node.reference.text);
            assert_eq!(node.committed.prompt.fingerprint, fingerprint(&node.ids));
        }
    }

    fn step(&mut self, step: &Step) {
        let can = self.family.can;
        let mut dice = Dice(step.seed);
        let parent = match self.nodes.len() {
            0 => None,
            len if step.latest => Some(len - 1),
            // One past the last begins a new conversation.
            len => Some(step.parent.index(len + 1)).filter(|at| *at < len),
        };
        let parent = parent.map(|at| &self.nodes[at]);
        let calls = parent.map_or(Vec::new(), |node| node.committed.open_calls.clone());
        let mut outputs: Vec<Arc<Item>> = calls
            .iter()
            .zip(step.outputs.iter().cycle())
            .map(|(call, text)| Arc::new(output(call.call_id.as_str(), text)))
            .collect();
        shuffle(&mut outputs, &mut dice);
        let mut said = step.messages.as_slice();
        if !can.rows_of_users {
            said = if calls.is_empty() {
                said.get(..1).unwrap_or(&[])
            } else {
                &[]
            };
        }
        let mut messages: Vec<Arc<Item>> = said
            .iter()
            .enumerate()
            .map(|(index, (role, text))| {
                let first = parent.is_none() && index == 0;
                let role = match role % 8 {
                    0 if first || can.late_system => Role::System,
                    1 if first || can.late_system || self.family.name == "chatml_tools" => {
                        Role::Developer
                    }
                    _ => Role::User,
                };
                Arc::new(message(role, text))
            })
            .collect();
        if parent.is_none() && messages.is_empty() {
            messages.push(Arc::new(message(Role::User, "Well?")));
        }
        let settings = self.settings(step, parent.is_none());
        // Sent the other way round than they belong: the server puts outputs first.
        let sent = messages.iter().chain(&outputs);
        let ask = Ask {
            input: sent.map(|item| NewItem::Item((**item).clone())).collect(),
            settings: settings.clone(),
            hold: step.hold,
            prepare_only: step.prepare_only,
            ..Ask::default()
        };
        let in_force = match parent {
            None => settings,
            Some(node) => settings.inherit(&node.committed.settings, &[]),
        };
        let mut batches = parent.map_or(Vec::new(), |node| node.batches.clone());
        let mut names = parent.map_or_else(|| self.names(), |node| node.names.clone());
        names.calls.extend(
            calls
                .iter()
                .map(|call| (call.call_id.to_string(), call.name.to_string())),
        );
        let batch: Vec<Arc<Item>> = outputs
            .iter()
            .chain(parent.iter().flat_map(|node| &node.pending))
            .chain(&messages)
            .cloned()
            .collect();
        if !batch.is_empty() {
            batches.push(in_call_order(batch, &batches));
        }
        let created = self
            .client
            .create(&self.model, parent.map(|node| &node.committed), ask);
        let mut reference = parent.map_or(Reference::default(), |node| node.reference.clone());
        let refused = self
            .render(
                &mut reference,
                &in_force,
                &batches,
                &names,
                !step.prepare_only,
            )
            .is_err();
        let open = match created {
            Ok(open) => open,
            Err(error) => {
                assert!(refused, "{error}");
                return;
            }
        };
        assert!(!refused, "the template refuses what was accepted");
        let mut run = Run {
            open,
            batches,
            reference,
            names,
            generation_prompt: !step.prepare_only,
            before: parent.map(|node| node.ids.clone()),
            sampled: parent.is_some_and(|node| node.reference.ends_sampled()),
            settings_changed: parent
                .is_some_and(|node| !in_force.renders_like(&node.committed.settings)),
            regular: parent.is_none_or(|node| node.regular),
            settings: in_force,
        };
        self.check(&mut run);
        if step.prepare_only {
            let (end, pending) = (End::Completed, Vec::new());
            return self.commit(run, end, pending);
        }
        self.rounds(run, step, &mut dice);
    }

    fn rounds(&mut self, mut run: Run, step: &Step, dice: &mut Dice) {
        let quiet = Answer {
            reasoning: None,
            text: "That is all.".to_owned(),
            calls: Vec::new(),
            canonical: true,
            stray: false,
            cut_at: None,
            early: false,
            steer: None,
        };
        let mut answers = step.answers.iter();
        loop {
            let answer = answers.next().unwrap_or(&quiet);
            let mut outputs = Vec::new();
            let mut steering = Vec::new();
            let mut next = self.round(&mut run, answer, step, dice, (&mut outputs, &mut steering));
            if next == Next::Await {
                let calls = run.open.open_calls().to_vec();
                let mut new: Vec<Arc<Item>> = calls
                    .iter()
                    .zip(step.outputs.iter().cycle())
                    .map(|(call, text)| Arc::new(output(call.call_id.as_str(), text)))
                    .collect();
                run.names.calls.extend(
                    calls
                        .iter()
                        .map(|call| (call.call_id.to_string(), call.name.to_string())),
                );
                shuffle(&mut new, dice);
                for item in new {
                    assert_eq!(run.open.next(), Next::Await);
                    assert!(self.append(&mut run, item.clone()));
                    outputs.push(item);
                }
                next = run.open.next();
            }
            let ahead = match next {
                Next::Finish(end) => {
                    let mut pending = steering;
                    let late: Vec<Arc<Item>> = if run.open.open_calls().is_empty() {
                        outputs
                            .into_iter()
                            .chain(std::mem::take(&mut pending))
                            .collect()
                    } else {
                        outputs
                    };
                    if !late.is_empty() {
                        run.batches.push(in_call_order(late, &run.batches));
                    }
                    return self.commit(run, end, pending);
                }
                Next::Sample => run.open.prompt_ahead(),
                Next::Await => panic!("all outputs are there"),
            };
            let batch = outputs.into_iter().chain(steering).collect();
            run.batches.push(in_call_order(batch, &run.batches));
            run.sampled = run.reference.ends_sampled();
            let refused = self
                .render(
                    &mut run.reference,
                    &run.settings,
                    &run.batches,
                    &run.names,
                    true,
                )
                .is_err();
            match run.open.prepare(true) {
                Ok(()) => assert!(!refused),
                Err(error) => {
                    assert!(refused, "{error}");
                    return;
                }
            }
            let ahead = ahead
                .expect("what can be rendered can be rendered ahead")
                .tokens;
            assert_eq!(
                ahead.tokens_from(0),
                run.open.prompt().tokens.tokens_from(0)
            );
            run.settings_changed = false;
            self.check(&mut run);
        }
    }

    /// One sample, with what the client sends meanwhile.
    fn round(
        &mut self,
        run: &mut Run,
        answer_as: &Answer,
        step: &Step,
        dice: &mut Dice,
        (outputs, steering): (&mut Vec<Arc<Item>>, &mut Vec<Arc<Item>>),
    ) -> Next {
        let can = self.family.can;
        let tools = run.settings.tools().to_vec();
        let mut ids = self.spell(answer_as, &tools, dice);
        let mut finish = SampleEnd::Stop;
        if let Some(cut) = &answer_as.cut_at {
            ids.truncate(cut.index(ids.len()));
            finish = SampleEnd::Length;
        }
        let sizes: Vec<usize> = (0..8).map(|_| 1 + dice.below(6)).collect();
        self.backend.queue(&ids, &sizes, finish);
        let prompt = run.open.prompt().tokens;
        let mut events = Vec::new();
        let mut end = None;
        let mut steer = answer_as.steer.clone().filter(|_| can.rows_of_users);
        for chunk in answer(&mut run.open) {
            assert_eq!(end, None, "a sample has ended");
            end = run.open.chunk(chunk, &mut events).unwrap();
            if end.is_some() {
                break;
            }
            if answer_as.early {
                for call in run.open.open_calls().to_vec() {
                    let text = &step.outputs[dice.below(step.outputs.len())];
                    let item = Arc::new(output(call.call_id.as_str(), text));
                    run.names
                        .calls
                        .push((call.call_id.to_string(), call.name.to_string()));
                    assert!(self.append(run, item.clone()));
                    outputs.push(item);
                }
            }
            if dice.below(3) == 0
                && let Some(text) = steer.take()
            {
                let item = Arc::new(message(Role::User, &text));
                let appended = self.append(run, item.clone());
                // A template that wants its speakers in turn has no place for it behind outputs.
                assert!(appended || !can.rows_of_users);
                if appended {
                    steering.push(item);
                }
            }
        }
        let end = end.expect("the sample has ended");
        let next = run.open.end_round(end, &mut events);
        let items: Vec<Arc<Item>> = events
            .iter()
            .filter_map(|event| match event {
                Event::OutputItemDone { item, .. } => Some(item.clone()),
                _ => None,
            })
            // A call that came to nothing is told, but is none.
            .filter(|item| item.call().is_none() || item.status == ItemStatus::Completed)
            .collect();
        if !items.is_empty() {
            run.batches.push(items);
        }
        let rope = run.open.prompt().tokens;
        let kept = rope.tokens_from(prompt.len_tokens());
        assert!(ids.starts_with(&kept), "tokens stand as they were sampled");
        let may_be_cut = run.stops()
            || run.settings.parallel_tool_calls == Some(false)
            || end == RoundEnd::Boundary;
        assert!(may_be_cut || kept == ids, "all tokens are kept");
        run.reference.sample(self.family, &kept);
        assert_eq!(text_of(&rope), run.reference.text);
        same_tokens(
            self.family,
            &rope.tokens_from(0),
            &run.reference.tokens(self.family),
            "with the sample",
        );
        self.check_spans(&rope, &prompt);
        run.before = Some(rope.tokens_from(0));
        // What was cut off in a call or before any text says less than what was sampled.
        let whole = answer_as.cut_at.is_none()
            || (!ids.is_empty() && answer_as.calls.is_empty() && answer_as.reasoning.is_none());
        run.regular = whole && !answer_as.stray && !run.stops() && end != RoundEnd::Boundary;
        next
    }

    /// Whether the item was taken. What the template could never render is refused.
    fn append(&self, run: &mut Run, item: Arc<Item>) -> bool {
        let input = vec![NewItem::Item((*item).clone())];
        let event = match run.open.append(input, &self.client.held) {
            Ok(event) => event,
            Err(error) => {
                assert_eq!(error.code, hotloop::event::Code::InvalidRequest, "{error}");
                return false;
            }
        };
        let Event::Appended { item_ids, .. } = event else {
            panic!("{event:?} answers no append")
        };
        assert_eq!(item_ids, std::slice::from_ref(&item.id));
        true
    }

    /// The spans of a sample cover it without gaps, in order.
    fn check_spans(&self, rope: &Rope, prompt: &Rope) {
        let slices = rope.slices();
        let Some(last) = slices
            .last()
            .filter(|last| last.first_token >= prompt.len_tokens())
        else {
            return;
        };
        let mut at = last.first_token;
        for span in last.spans {
            assert_eq!(span.tokens.start, at);
            assert!(span.tokens.end >= at);
            at = span.tokens.end;
        }
        assert!(last.spans.is_empty() || at == rope.len_tokens());
    }

    fn commit(&mut self, run: Run, end: End, pending: Vec<Arc<Item>>) {
        let report = done(&run.open).prompt;
        let committed = run.open.commit(end.into(), &self.client.held);
        assert_eq!(committed.prompt, report);
        let ids = committed.rope.tokens_from(0);
        assert_eq!(report.fingerprint, fingerprint(&ids));
        self.check_origins(&committed, &run.batches);
        let pended: Vec<_> = committed.pending.iter().map(|new| &new.item.id).collect();
        assert_eq!(
            pended,
            pending.iter().map(|item| &item.id).collect::<Vec<_>>()
        );
        self.nodes.push(Node {
            committed,
            batches: run.batches,
            pending,
            reference: run.reference,
            names: run.names,
            ids,
            regular: run.regular,
        });
    }

    /// Every token is told where it came from, and what is told is so.
    fn check_origins(&self, committed: &Committed, batches: &Batches) {
        let ids = committed.rope.tokens_from(0);
        let view = committed.view.as_ref().unwrap();
        let spans = hotloop::prompt::spans(committed, view);
        let mut at = 0;
        for span in &spans {
            assert_eq!(span.tokens.start, at, "no gaps");
            assert!(span.tokens.end > at);
            at = span.tokens.end;
        }
        assert_eq!(at, ids.len());
        let slices = committed.rope.slices();
        for span in &spans {
            if let Source::Sampled(_) = span.source {
                let inside = |slice: &hotloop::ledger::Slice<'_>| {
                    slice.sampled
                        && slice.first_token <= span.tokens.start
                        && span.tokens.end <= slice.first_token + slice.ids.len()
                };
                assert!(
                    slices.iter().any(inside),
                    "what is called sampled was sampled"
                );
            }
        }
        let said: Vec<(&Arc<Item>, String)> = batches
            .iter()
            .flatten()
            .filter_map(|item| match &item.body {
                Body::Message {
                    role: Role::User,
                    parts,
                } => Some((item, parts.iter().map(|part| &**part.text()).collect())),
                _ => None,
            })
            .collect();
        let again = |text: &String| said.iter().filter(|(_, other)| other == text).count() > 1;
        if self.family.name == "mistral" && said.iter().any(|(_, text)| again(text)) {
            // This template tells equal messages apart from others.
            return;
        }
        assert!(committed.prompt_entries <= view.entries.len());
        for (item, text) in said {
            let text = text.trim();
            // Normalised text reads differently, and late messages are in no prompt yet.
            let late = committed
                .input
                .last()
                .is_some_and(|last| last.id == item.id);
            if text.is_empty() || text.contains('\u{301}') || late {
                continue;
            }
            let theirs: Vec<&[u32]> = spans
                .iter()
                .filter(|span| span.source == Source::Input(item.id.clone()))
                .map(|span| &ids[span.tokens.clone()])
                .collect();
            let read = lossy(self.family, &theirs.concat());
            assert!(read.contains(text), "{read:?} is not {text:?}");
        }
    }

    fn names(&self) -> Names {
        let knows = self.family.template.contains("developer");
        Names {
            developer: if knows { "developer" } else { "system" },
            calls: Vec::new(),
        }
    }

    fn settings(&self, step: &Step, first: bool) -> Settings {
        const EFFORTS: [Effort; 5] = [
            Effort::None,
            Effort::Minimal,
            Effort::Low,
            Effort::Medium,
            Effort::High,
        ];
        let Some(change) = &step.change else {
            // Mostly tools in which nothing reads like an added token.
            let set = [0, 1, 9, 15][(step.seed % 4) as usize];
            return Settings {
                tools: first.then(|| tools(set)),
                ..Settings::default()
            };
        };
        Settings {
            tools: change.tools.map(tools),
            instructions: change.instructions.as_deref().map(Arc::from),
            reasoning_effort: change
                .effort
                .filter(|_| self.family.can.effort)
                .map(|at| EFFORTS[usize::from(at)]),
            stop: change.stop.map(|set| {
                let texts: &[&str] = if set { &["END", "é", "\n\n"] } else { &[] };
                texts.iter().map(|text| Arc::from(*text)).collect()
            }),
            parallel_tool_calls: change.parallel,
            ..Settings::default()
        }
    }

    /// Renders the reference's next prompt.
    fn render(
        &self,
        reference: &mut Reference,
        settings: &Settings,
        batches: &Batches,
        names: &Names,
        generation_prompt: bool,
    ) -> Result<(), TemplateError> {
        let guard = self.family.artifacts.tokenizer.guard();
        let mark = |text: &str| guard.mark(text).into_owned();
        let marked = full_text(
            self.family,
            settings,
            messages(batches, names, &mark),
            generation_prompt,
            &mark,
        )?;
        let (text, untrusted) = guard.unmark(marked);
        if untrusted.is_empty() {
            let same = |text: &str| text.to_owned();
            let plain = full_text(
                self.family,
                settings,
                messages(batches, names, &same),
                generation_prompt,
                &same,
            );
            assert_eq!(plain.as_ref(), Ok(&text));
        }
        reference.render(self.family, text, untrusted);
        Ok(())
    }

    /// Holds the prompt against its reference, and the report against both.
    fn check(&self, run: &mut Run) {
        let family = self.family;
        let rope = run.open.prompt().tokens;
        assert_eq!(
            text_of(&rope),
            run.reference.text,
            "the text is the template's"
        );
        let ids = rope.tokens_from(0);
        same_tokens(
            family,
            &ids,
            &run.reference.tokens(family),
            "the tokens are those of the text",
        );
        if let Some(whole) = run.reference.whole(family) {
            self.prompts.whole.fetch_add(1, Ordering::Relaxed);
            same_tokens(family, &ids, &whole, "the tokens are the crate's own");
        }
        self.check_controls(run, &rope);
        self.prompts.all.fetch_add(1, Ordering::Relaxed);

        let report = done(&run.open).prompt;
        let pinned: usize = run.reference.pins.iter().map(|pin| pin.ids.len()).sum();
        assert_eq!(report.tokens as usize, ids.len());
        assert_eq!(report.sampled_tokens as usize, pinned);
        assert_eq!(report.fingerprint, fingerprint(&ids));
        let Some(before) = &run.before else {
            assert!(report.extends_previous && report.rerender.is_none());
            assert_eq!((report.reused_tokens, report.dropped_tokens), (0, 0));
            return;
        };
        let same = before.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        assert_eq!(report.reused_tokens as usize, same);
        assert_eq!(report.dropped_tokens as usize, before.len() - same);
        assert_eq!(report.head_tokens_cached, 0);
        assert_eq!(report.extends_previous, same == before.len());
        let extends = usize::from(report.extends_previous);
        self.prompts.extend.fetch_add(extends, Ordering::Relaxed);
        let reason = match (report.extends_previous, run.settings_changed) {
            (true, _) => None,
            (false, true) => Some(RerenderReason::Settings),
            (false, false) => Some(RerenderReason::Template),
        };
        assert_eq!(report.rerender, reason);
        if self.family.can.stable && run.regular && !run.settings_changed {
            assert!(report.extends_previous, "a stable template keeps the past");
        }
        if report.extends_previous && run.sampled && !run.settings_changed {
            assert_eq!(report.encoded_tokens, report.tokens - report.reused_tokens);
        }
    }

    /// Every control token that was not sampled stands where the template wrote it.
    fn check_controls(&self, run: &Run, rope: &Rope) {
        let family = self.family;
        let mark = |text: &str| harmless(text);
        let messages = messages(&run.batches, &run.names, &mark);
        let Ok(text) = full_text(
            family,
            &run.settings,
            messages,
            run.generation_prompt,
            &mark,
        ) else {
            return;
        };
        assert_eq!(text.len(), rope.len_bytes());
        let is_added = |id: &u32| family.added.contains_key(id);
        for slice in rope.slices().iter().filter(|slice| !slice.sampled) {
            let here = &text[slice.first_byte..slice.first_byte + slice.text.len()];
            let wanted = family.literals.find_iter(here).count();
            let found = slice.ids.iter().filter(|id| is_added(id)).count();
            assert_eq!(found, wanted, "{:?}", slice.text);
        }
    }

    /// The tokens of an answer.
    fn spell(&self, answer: &Answer, tools: &[Tool], dice: &mut Dice) -> Vec<u32> {
        let can = self.family.can;
        let tokenizer = &self.family.artifacts.tokenizer;
        let mut words = Words {
            reasoning: answer.reasoning.clone().filter(|_| can.reasoning),
            text: answer.text.clone(),
            calls: Vec::new(),
        };
        if !tools.is_empty() {
            let calls = answer.calls.iter().take(can.calls_max);
            words.calls = calls
                .map(|(tool, arguments)| {
                    let name = tools[usize::from(*tool) % tools.len()].name.to_string();
                    let arguments = ARGUMENTS[usize::from(*arguments) % ARGUMENTS.len()];
                    (name, arguments.to_owned())
                })
                .collect();
        }
        if !words.calls.is_empty() && !can.text_with_calls {
            words.text.clear();
        }
        let is_added = |content: &str| tokenizer.token_id(content).is_some();
        let mut ids = Vec::new();
        for piece in self.family.artifacts.family.format(&words, &is_added) {
            match piece {
                FormattedPiece::Special(content) => ids.push(tokenizer.token_id(&content).unwrap()),
                FormattedPiece::Text(text) if answer.canonical => {
                    ids.extend(self.family.spell(&text))
                }
                FormattedPiece::Text(text) => {
                    let mut rest = text.as_str();
                    while !rest.is_empty() {
                        let at = rest.ceil_char_boundary(1 + dice.below(7));
                        ids.extend(self.family.spell(&rest[..at]));
                        rest = &rest[at..];
                    }
                }
            }
        }
        if answer.stray {
            let mut all: Vec<u32> = self.family.added.keys().copied().collect();
            all.sort_unstable();
            ids.insert(dice.below(ids.len() + 1), all[dice.below(all.len())]);
            // Half a character, too.
            let half = self.family.spell("👍🏽").first().copied();
            ids.splice(0..0, half);
        }
        ids.push(self.family.end(!words.calls.is_empty()));
        ids
    }
}

fn shuffle<T>(list: &mut [T], dice: &mut Dice) {
    for at in (1..list.len()).rev() {
        list.swap(at, dice.below(at + 1));
    }
}

/// Outputs stand in the order of their calls, in whichever order they came.
fn in_call_order(mut batch: Vec<Arc<Item>>, before: &Batches) -> Vec<Arc<Item>> {
    let calls: Vec<_> = before
        .iter()
        .flatten()
        .filter_map(|item| item.call().map(|(id, _)| id))
        .collect();
    let outputs = batch
        .iter()
        .take_while(|item| item.answers().is_some())
        .count();
    batch[..outputs]
        .sort_by_key(|item| calls.iter().rposition(|call| Some(*call) == item.answers()));
    batch
}
