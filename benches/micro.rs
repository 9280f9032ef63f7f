//! The parts of a step on their own.
//!
//! Rendering and encoding a tool's output of 200 tokens onto 100,000, by encoder and by whether the template goes on; and
//! tokens to text and items, by token. What the safety stage takes: of text, and of a step by the length of its history.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros write functions without comments; a benchmark that cannot run says so by panicking"
)]

mod support;

use std::{hint::black_box, sync::Arc, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hotloop::{
    event::Scope,
    files::{BuiltIn, Files},
    item::{Body, Item, Part, Role},
    ledger::{Draft, Rope},
    model::Artifacts,
    parse::{ParserOptions, Piece},
    render::{Entries, Head, Past, Resume, Seen, Visible, entries, render},
    request::{NewItem, Settings, ValidItem, validate_append},
    safety::{
        Checked, Choice, Gate, History, Monitor as _, Names, Policies, PolicyOptions, Rules,
        Scanner, Scopes, State, clear, recheck,
    },
    tokenizer::{DetokPiece, Encoded},
};
use support::text::Texts;

const HISTORY_TOKENS: usize = 100_000;
const NEW_TOKENS: usize = 200;

/// A conversation that stands on the ledger, and one message more.
struct Conversation {
    artifacts: Artifacts,
    head: Arc<Head>,
    rope: Rope,
    resume: Option<Resume>,
    all: Entries,
}

impl Conversation {
    fn new(artifacts: Artifacts) -> Self {
        let mut texts = Texts::new(1);
        let settings = Settings::default();
        let head =
            Arc::new(Head::new(&settings, &artifacts, jiff::civil::date(2026, 11, 1)).unwrap());
        let mut all = Entries::new_sync();
        for _ in 0..HISTORY_TOKENS / (2 * NEW_TOKENS) {
            for role in [Role::User, Role::Assistant] {
                let text = texts.of(NEW_TOKENS);
                all.extend(entries(&[message(role, text)], &artifacts));
            }
        }
        let past = Past {
            rope: &Rope::default(),
            resume: None,
        };
        let seen = Seen::new(&all, Visible::default());
        let rendered = render(&artifacts, &head, seen, true, past, None).unwrap();
        all.extend(entries(
            &[message(Role::User, texts.of(NEW_TOKENS))],
            &artifacts,
        ));
        Self {
            artifacts,
            head,
            rope: rendered.rope,
            resume: rendered.resume,
            all,
        }
    }

    fn step(&self, resume: Option<&Resume>) -> usize {
        let past = Past {
            rope: &self.rope,
            resume,
        };
        let seen = Seen::new(&self.all, Visible::default());
        let rendered = render(&self.artifacts, &self.head, seen, true, past, None).unwrap();
        rendered.encoded_tokens
    }
}

fn message(role: Role, text: String) -> ValidItem {
    let part = match role {
        Role::Assistant => Part::Refusal(text.into()),
        Role::System | Role::Developer | Role::User => Part::InputText(text.into()),
    };
    ValidItem {
        item: Arc::new(Item::new(Body::Message {
            role,
            parts: vec![part],
        })),
        answers: None,
    }
}

fn artifacts() -> Artifacts {
    Artifacts::load(&Files::BuiltIn(BuiltIn::SimAgent), None).unwrap()
}

fn rendering(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("200 tokens onto 100k");
    let fast = Conversation::new(artifacts());
    assert!(fast.resume.is_some());
    group.bench_function("goes on, fast encoder", |bencher| {
        bencher.iter(|| black_box(fast.step(fast.resume.as_ref())))
    });
    group.bench_function("from the start, fast encoder", |bencher| {
        bencher.iter(|| black_box(fast.step(None)))
    });
    let mut slow = artifacts();
    slow.tokenizer = slow.tokenizer.without_fast_encoder();
    let slow = Conversation::new(slow);
    group.bench_function("goes on, first encoder", |bencher| {
        bencher.iter(|| black_box(slow.step(slow.resume.as_ref())))
    });
    group.finish();
}

fn encoding(criterion: &mut Criterion) {
    let mut texts = Texts::new(2);
    let text = texts.of(10_000);
    let mut group = criterion.benchmark_group("encoding 10,000 tokens");
    group.throughput(Throughput::Elements(10_000));
    for (name, artifacts) in [
        ("fast encoder", artifacts()),
        (
            "first encoder",
            Artifacts {
                tokenizer: artifacts().tokenizer.without_fast_encoder(),
                ..artifacts()
            },
        ),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut encoded = Encoded::default();
                artifacts
                    .tokenizer
                    .encode(black_box(&text), false, &[], &mut encoded);
                encoded.ids.len()
            });
        });
    }
    group.finish();
}

/// From tokens to text, and from text to items: a call with long arguments.
fn answering(criterion: &mut Criterion) {
    let artifacts = artifacts();
    let mut texts = Texts::new(3);
    let text = serde_json::to_string(&texts.of(2_000)).unwrap();
    let answer = format!(
        "I look.\n<tool_call>\n{{\"name\": \"look\", \"arguments\": {{\"text\": {text}}}}}\n</tool_call><|im_end|>"
    );
    let mut encoded = Encoded::default();
    artifacts
        .tokenizer
        .encode(&answer, false, &[], &mut encoded);
    let mut group = criterion.benchmark_group("an answer of 2,000 tokens");
    group.throughput(Throughput::Elements(encoded.ids.len() as u64));
    group.bench_function("to text", |bencher| {
        bencher.iter(|| {
            let mut detokenizer = artifacts.tokenizer.detokenizer();
            let mut bytes = 0;
            for id in &encoded.ids {
                for piece in detokenizer.push(*id) {
                    bytes += match piece {
                        DetokPiece::Text(text) | DetokPiece::Special(text) => text.len(),
                    };
                }
            }
            bytes
        });
    });
    group.bench_function("to text and items", |bencher| {
        bencher.iter(|| {
            let mut detokenizer = artifacts.tokenizer.detokenizer();
            let mut parser = artifacts.family.parser(ParserOptions {
                tools: Arc::new(["look".to_owned()].into()),
                ..artifacts.parsing.clone()
            });
            let mut found = Vec::new();
            for id in &encoded.ids {
                for piece in detokenizer.push(*id) {
                    parser.push(
                        match piece {
                            DetokPiece::Text(text) => Piece::Text(text),
                            DetokPiece::Special(text) => Piece::Special(text),
                        },
                        &mut found,
                    );
                }
            }
            parser.finish(&mut found);
            found.len()
        });
    });
    group.finish();
}

/// What a fork and a commit are on the ledger: a mark, and two segments behind it.
fn ledger(criterion: &mut Criterion) {
    let draft = |tokens: u32| Draft {
        text: "four".repeat(tokens as usize),
        ids: (0..tokens).collect(),
        ..Draft::default()
    };
    let mut rope = Rope::default();
    for _ in 0..HISTORY_TOKENS / (2 * NEW_TOKENS) {
        rope = rope.with_rendered(draft(200)).with_sampled(draft(200));
    }
    let mut group = criterion.benchmark_group("a ledger of 100k");
    group.bench_function("fork", |bencher| bencher.iter(|| black_box(&rope).clone()));
    group.bench_function("200 tokens rendered, 40 sampled", |bencher| {
        bencher.iter_batched(
            || (draft(200), draft(40)),
            |(rendered, sampled)| rope.with_rendered(rendered).with_sampled(sampled),
            criterion::BatchSize::SmallInput,
        );
    });
    group.finish();
}

/// The built-in rules over text, and the stage of a step: what is new in it, behind histories of which
/// nothing is looked at.
fn safety(criterion: &mut Criterion) {
    let observed = Scopes {
        model_output: Choice::Redact,
        ..Scopes::default()
    };
    let options = PolicyOptions {
        scopes: observed,
        ..PolicyOptions::default()
    };
    let policies = Policies::new(Rules::built_in().unwrap(), Vec::new(), vec![options]).unwrap();
    let policy = policies.get("model", &"tenant".into()).unwrap();
    let mut texts = Texts::new(4);
    let text = texts.of(10_000);
    let scanner = Scanner::new(Rules::built_in().unwrap().all().to_vec());
    let mut group = criterion.benchmark_group("safety, by byte");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("a whole item", |bencher| {
        bencher.iter(|| {
            let mut found = Vec::new();
            scanner.read(&mut State::default(), black_box(&text), true, &mut found);
            found.len()
        });
    });
    group.bench_function("an item in pieces of 16 bytes", |bencher| {
        bencher.iter(|| {
            let (mut state, mut found) = (State::default(), Vec::new());
            for piece in black_box(&text).as_bytes().chunks(16) {
                let piece = str::from_utf8(piece).unwrap();
                scanner.read(&mut state, piece, false, &mut found);
            }
            found.len()
        });
    });
    group.bench_function("output, held back", |bencher| {
        bencher.iter(|| {
            let mut gate = Gate::new(&policy, Scope::ModelOutput).unwrap();
            let pieces = black_box(&text).as_bytes().chunks(4);
            let passed = pieces.map(|it| gate.push(str::from_utf8(it).unwrap(), false));
            passed.map(|it| it.text.len()).sum::<usize>()
        });
    });
    group.finish();

    let mut group = criterion.benchmark_group("safety, a step of 200 tokens");
    for tokens in [1_000, HISTORY_TOKENS] {
        let items: Vec<ValidItem> = (0..tokens / NEW_TOKENS)
            .map(|_| message(Role::User, texts.of(NEW_TOKENS)))
            .collect();
        let first = recheck(
            History {
                checked: &Checked::default(),
                items: &mut items.iter(),
            },
            Some(&policy),
        );
        let checked = first.unwrap().checked;
        let new = NewItem::Item(Item::clone(
            &message(Role::User, text[..800].to_owned()).item,
        ));
        let ids = [new.id().clone()];
        let names = Names {
            command: "append",
            ids: &ids,
        };
        group.bench_function(format!("behind {tokens}"), |bencher| {
            bencher.iter_batched(
                || validate_append(vec![new.clone()], &mut Vec::new(), &|_| None).unwrap(),
                |valid| {
                    let history = History {
                        checked: &checked,
                        items: &mut items.iter(),
                    };
                    let again = recheck(history, Some(&policy)).unwrap();
                    (again, clear(valid, Some(&policy), &names).unwrap())
                },
                criterion::BatchSize::SmallInput,
            );
        });
        group.bench_function(format!("behind {tokens}, the policy changed"), |bencher| {
            bencher.iter(|| {
                let history = History {
                    checked: &Checked::default(),
                    items: &mut items.iter(),
                };
                recheck(history, Some(&policy)).unwrap()
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    // All benchmarks together are to take a quarter of an hour.
    config = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = rendering, encoding, answering, ledger, safety
}
criterion_main!(benches);
