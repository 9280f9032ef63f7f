//! The parts of a step on their own.
//!
//! Rendering and encoding a tool's output of 200 tokens onto 100,000, by encoder and by whether the template goes on; and
//! tokens to text and items, by token.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros write functions without comments; a benchmark that cannot run says so by panicking"
)]

mod support;

use std::{hint::black_box, sync::Arc};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hotloop::{
    files::{BuiltIn, Files},
    item::{Body, Item, Part, Role},
    ledger::{Draft, Rope},
    model::Artifacts,
    parse::{ParserOptions, Piece},
    render::{Entries, Head, Past, Resume, Seen, Visible, entries, render},
    request::{Settings, ValidItem},
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

criterion_group!(benches, rendering, encoding, answering, ledger);
criterion_main!(benches);
