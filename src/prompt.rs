//! What a model saw, told apart by where it came from: for people who look into a prompt, and no
//! part of any loop.
//!
//! What was sampled is on the ledger. For the rest the prompt is rendered once more, with marks
//! around the texts of all items. Where the same prompt comes of that once the marks are taken out,
//! they stood where each text is; a template that looks into the texts is asked with fewer marks.

use std::{ops::Range, sync::Arc, sync::LazyLock};

use memchr::memmem;
use rand::RngExt as _;

use crate::{
    item::{Body, Item, Part, Role},
    ledger::{Slice, Source, Span},
    render::{self, Entries, Head, Seen},
    request::{Settings, ValidItem},
    session::{Committed, View},
    tokenizer::Tokenizer,
};

/// Where each run of tokens of the prompt and its sample came from: in order, without gaps. A token
/// that spans the edge of a text belongs to it. `view` is how the response was rendered.
#[must_use]
pub fn spans(response: &Committed, view: &View) -> Vec<Span> {
    let places = places(response, view);
    let mut runs = Runs::default();
    let tokenizer = &view.artifacts.tokenizer;
    let mut before = None;
    for slice in response.rope.slices() {
        if slice.sampled {
            for span in slice.spans {
                runs.push(span.tokens.end.min(end(&slice)), &span.source);
            }
        } else {
            let tokens = token_bytes(tokenizer, &slice, before);
            for (place, source) in &places {
                let first = tokens.partition_point(|token| token.end <= place.start);
                let last = tokens.partition_point(|token| token.start < place.end);
                if first < last {
                    runs.push(slice.first_token + first, &Source::Template);
                    runs.push(slice.first_token + last, source);
                }
            }
        }
        runs.push(end(&slice), &Source::Template);
        before = slice.ids.last().copied();
    }
    runs.0
}

fn end(slice: &Slice<'_>) -> usize {
    slice.first_token + slice.ids.len()
}

/// Runs of tokens, each beginning where the one before ends.
#[derive(Default)]
struct Runs(Vec<Span>);

impl Runs {
    /// The tokens up to `end` that are in no run yet came from here.
    fn push(&mut self, end: usize, source: &Source) {
        let start = self.0.last().map_or(0, |span| span.tokens.end);
        match self.0.last_mut() {
            Some(last) if last.source == *source => last.tokens.end = end.max(start),
            Some(_) | None if start < end => self.0.push(Span {
                tokens: start..end,
                source: source.clone(),
            }),
            Some(_) | None => {}
        }
    }
}

/// Which bytes of the prompt each token of the slice stands for. Exact where a token reads as it
/// was written; normalised text is put right again at the next added token.
fn token_bytes(tokenizer: &Tokenizer, slice: &Slice<'_>, before: Option<u32>) -> Vec<Range<usize>> {
    let mut cuts = slice.cuts.iter().peekable();
    let mut at = slice.first_byte;
    let last = slice.first_byte + slice.text.len();
    // White space behind some added tokens belongs to them.
    let swallow = |at: usize, id: u32| {
        let behind = slice.text.get(at - slice.first_byte..).unwrap_or_default();
        let swallowed = behind.len() - behind.trim_start().len();
        at + if tokenizer.swallows_after(id) {
            swallowed
        } else {
            0
        }
    };
    if let Some(before) = before {
        at = swallow(at, before);
    }
    let mut tokens = Vec::with_capacity(slice.ids.len());
    for (index, id) in slice.ids.iter().enumerate() {
        if let Some(cut) = cuts.next_if(|cut| cut.token == slice.first_token + index) {
            at = cut.byte;
        }
        let start = at.min(last);
        let bytes = tokenizer.bytes_of(*id);
        let here = &slice.text.as_bytes()[start - slice.first_byte..];
        // Some vocabularies put a space before a word that is none in the text.
        let read = match bytes.strip_prefix(b" ") {
            Some(word) if !here.starts_with(bytes) && here.starts_with(word) => word,
            Some(_) | None => bytes,
        };
        at = swallow((start + read.len()).min(last), *id);
        tokens.push(start..at);
    }
    tokens
}

/// Where the texts of items and instructions stand in the prompt, in order.
fn places(response: &Committed, view: &View) -> Vec<(Range<usize>, Source)> {
    let prompt: String = response
        .rope
        .slices()
        .iter()
        .map(|slice| slice.text)
        .collect();
    let ways = [
        (Around::All, true),
        (Around::Trimmed, true),
        (Around::All, false),
        (Around::Trimmed, false),
    ];
    ways.into_iter()
        .find_map(|(around, arguments)| {
            Marks::new(around, arguments).places(response, view, &prompt)
        })
        .unwrap_or_default()
}

/// What of a text the marks stand around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Around {
    All,
    /// All but white space at its ends, for templates that take that off.
    Trimmed,
}

/// Begins every mark: digits, which no filter changes. The first occurs nowhere else in it, and
/// nobody can guess the others.
static MARK: LazyLock<String> = LazyLock::new(|| {
    let mut rng = rand::rng();
    let digits = (0..MARK_DIGITS).map(|_| char::from(b'0' + rng.random_range(0..9_u8)));
    std::iter::once('9').chain(digits).collect()
});

/// 36 of nine kinds each are 114 bits.
const MARK_DIGITS: usize = 36;

/// So many digits behind it number the text, and the last one tells its beginning from its end.
const NUMBER_DIGITS: usize = 8;

/// The texts that have marks around them.
struct Marks {
    around: Around,
    /// Whether arguments of calls have, too: a template that looks into them cannot read them then.
    arguments: bool,
    sources: Vec<Source>,
}

impl Marks {
    fn new(around: Around, arguments: bool) -> Self {
        Self {
            around,
            arguments,
            sources: Vec::new(),
        }
    }

    /// Renders the prompt with marks. `None` where another prompt comes of that.
    fn places(
        mut self,
        response: &Committed,
        view: &View,
        prompt: &str,
    ) -> Option<Vec<(Range<usize>, Source)>> {
        let artifacts = &view.artifacts;
        let settings = Settings {
            instructions: response
                .settings
                .instructions
                .as_ref()
                .map(|text| self.mark(text, Source::Instructions)),
            ..(*response.settings).clone()
        };
        let head = Arc::new(Head::new(&settings, artifacts, response.date).ok()?);
        let nodes: Vec<&Committed> = response.chain().collect();
        let batches = nodes.iter().rev().flat_map(|node| &node.batches);
        let entries: Entries = batches
            .flat_map(|batch| {
                let batch = response.checked.masked.apply(batch);
                let batch: Vec<ValidItem> = batch.iter().map(|new| self.item(new)).collect();
                render::entries(&batch, artifacts)
            })
            .take(response.prompt_entries)
            .collect();
        let seen = Seen::new(&entries, view.visible);
        let sampled = response.usage.samples > 0;
        let marked = render::text(artifacts, &head, seen, sampled).ok()?;
        self.read(&marked, prompt)
    }

    /// Takes the marks out again.
    fn read(&self, marked: &str, prompt: &str) -> Option<Vec<(Range<usize>, Source)>> {
        let mut rest = prompt;
        let mut places = Vec::new();
        let mut open = None;
        let mut done = 0;
        for at in memmem::find_iter(marked.as_bytes(), MARK.as_bytes()) {
            rest = rest.strip_prefix(&marked[done..at])?;
            let number = at + MARK.len();
            done = number + NUMBER_DIGITS + 1;
            let index: usize = marked.get(number..done - 1)?.parse().ok()?;
            let here = prompt.len() - rest.len();
            if &marked[done - 1..done] == "0" {
                open = Some((index, here));
            } else if let Some((_, start)) = open.take_if(|(opened, _)| *opened == index) {
                places.push((start..here, self.sources.get(index)?.clone()));
            }
        }
        rest.starts_with(&marked[done..]).then_some(places)
    }

    fn mark(&mut self, text: &str, source: Source) -> Arc<str> {
        let inner = match self.around {
            Around::All => text,
            Around::Trimmed => text.trim(),
        };
        if inner.is_empty() {
            return text.into();
        }
        let start = match self.around {
            Around::All => 0,
            Around::Trimmed => text.len() - text.trim_start().len(),
        };
        let end = start + inner.len();
        let index = self.sources.len();
        self.sources.push(source);
        let mark = MARK.as_str();
        let (before, after) = (&text[..start], &text[end..]);
        format!("{before}{mark}{index:08}0{inner}{mark}{index:08}1{after}").into()
    }

    /// The item with marks around its texts.
    fn item(&mut self, new: &ValidItem) -> ValidItem {
        let item = &*new.item;
        let source = || Source::Input(item.id.clone());
        let mut body = item.body.clone();
        match &mut body {
            Body::Message { role, parts } => {
                let text = self.mark(&Part::joined(parts), source());
                *parts = vec![match role {
                    Role::Assistant => Part::Refusal(text),
                    Role::System | Role::Developer | Role::User => Part::InputText(text),
                }];
            }
            Body::FunctionCall { arguments, .. } | Body::CustomToolCall { arguments, .. } => {
                if self.arguments {
                    *arguments = self.mark(arguments, source());
                }
            }
            Body::FunctionCallOutput { output, .. } | Body::CustomToolCallOutput { output, .. } => {
                *output = self.mark(output, source());
            }
            Body::Reasoning { content } => *content = self.mark(content, source()),
            Body::Compaction { summary } => *summary = self.mark(summary, source()),
        }
        ValidItem {
            item: Arc::new(Item {
                body,
                ..item.clone()
            }),
            answers: new.answers.clone(),
        }
    }
}
