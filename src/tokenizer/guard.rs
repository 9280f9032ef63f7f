//! Finds control tokens that a client has typed, before a template mixes its text with our own.
//!
//! `<|im_end|>` in a user's message is eleven characters, in a template it is one token that ends
//! the message. Once both are rendered into one prompt nobody can tell them apart, so the guard
//! marks the user's text before rendering and finds the marks again afterwards.

use std::borrow::Cow;
use std::sync::LazyLock;

use aho_corasick::AhoCorasick;
use memchr::memmem;
use rand::RngExt;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::tokenizer::normalizer::Range;
use tokenizers::{NormalizedString, Normalizer};

use super::{AddedToken, TokenizerError};

/// How many digits follow the nonce's first: 41 of nine kinds each are 129 bits.
const NONCE_RANDOM_DIGITS: usize = 41;

/// Stands behind the first character of every literal that a client wrote.
///
/// It is made of digits, so that filters such as `upper`, `title` or `tojson` pass it on as it is,
/// and its first digit occurs nowhere else in it, so that it cannot overlap itself.
/// Whoever knows it could forge a literal: it never leaves this module but inside a render.
static NONCE: LazyLock<String> = LazyLock::new(|| {
    let mut rng = rand::rng();
    let mut nonce = String::with_capacity(NONCE_RANDOM_DIGITS + 1);
    nonce.push('7');
    for _ in 0..NONCE_RANDOM_DIGITS {
        nonce.push(['0', '1', '2', '3', '4', '5', '6', '8', '9'][rng.random_range(0..9)]);
    }
    nonce
});

/// Marks what a client wrote, so that none of it becomes a control token.
///
/// Added tokens of white space only, or of one character, are not guarded unless the vocabulary
/// calls them special: some models have them for indentation or for single letters, and they
/// control nothing.
#[derive(Debug)]
pub struct Guard {
    literals: AhoCorasick,
    /// The literals in byte order, to find those that begin at the end of a text.
    sorted: Vec<Box<str>>,
    literal_bytes_max: usize,
    /// For tokens that are looked for in normalised text.
    normalised: Option<Normalised>,
}

#[derive(Debug)]
struct Normalised {
    normalizer: NormalizerWrapper,
    literals: AhoCorasick,
}

impl Guard {
    /// Builds the automata over the contents of all control tokens.
    pub(super) fn new(
        added: &[AddedToken],
        normalizer: Option<&NormalizerWrapper>,
    ) -> Result<Self, TokenizerError> {
        let control = || added.iter().filter(|token| token.control);
        let mut sorted: Vec<Box<str>> = control().map(|token| token.content.clone()).collect();
        sorted.sort_unstable();
        let in_normalised: Vec<&str> = control()
            .filter(|token| token.normalized)
            .map(|token| &*token.pattern)
            .collect();
        let normalised = match normalizer {
            Some(normalizer) if !in_normalised.is_empty() => Some(Normalised {
                normalizer: normalizer.clone(),
                literals: AhoCorasick::new(in_normalised).map_err(|_| TokenizerError::TooLarge)?,
            }),
            _ => None,
        };
        Ok(Self {
            literals: AhoCorasick::new(sorted.iter().map(|literal| literal.as_bytes()))
                .map_err(|_| TokenizerError::TooLarge)?,
            literal_bytes_max: sorted
                .iter()
                .map(|literal| literal.len())
                .max()
                .unwrap_or(0),
            sorted,
            normalised,
        })
    }

    /// Marks every literal of a control token in `text`, which a client wrote; also those that
    /// overlap, and one that the end of `text` cuts off, since another part of the same message
    /// may complete it. The text comes back as it is where there is none, after one pass.
    ///
    /// The result is for the template only. It must not reach a client, a log or a model.
    pub fn mark<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let ends = self.starts(text).into_iter().map(|start| {
            let first = text[start..].chars().next();
            start + first.map_or(0, char::len_utf8)
        });
        insert_nonce(text, ends.collect())
    }

    /// As [`Guard::mark`], for JSON text: marks also the literals that appear only once its strings
    /// are read, because escapes such as `\u003c` spell some of their characters. A template may
    /// print a string of a tool's schema as it reads, whatever way the client wrote it.
    pub fn mark_json<'t>(&self, json: &'t str) -> Cow<'t, str> {
        if !json.contains('\\') {
            return self.mark(json);
        }
        let (read, written) = unescape(json);
        // Where a literal stands as it is, its first character ends at the same place both ways.
        let ends = self.starts(&read).into_iter().map(|start| {
            let character = written.partition_point(|(at, _)| *at <= start);
            written[character - 1].1
        });
        let mut ends: Vec<usize> = ends.collect();
        ends.extend(self.starts(json).into_iter().map(|start| {
            let first = json[start..].chars().next();
            start + first.map_or(0, char::len_utf8)
        }));
        ends.sort_unstable();
        ends.dedup();
        insert_nonce(json, ends)
    }

    /// Where literals begin, ascending.
    fn starts(&self, text: &str) -> Vec<usize> {
        let mut starts: Vec<usize> = self
            .literals
            .find_overlapping_iter(text)
            .map(|found| found.start())
            .collect();
        self.find_cut_off(text, &mut starts);
        if let Some(normalised) = &self.normalised {
            normalised.find(text, &mut starts);
        }
        starts.sort_unstable();
        starts.dedup();
        starts
    }

    /// Takes the marks out of a rendered prompt. Returns it as the model shall read it, and the
    /// byte offsets in it, ascending, at which a client's literal begins: the `untrusted` of
    /// [`Tokenizer::encode`](super::Tokenizer::encode).
    pub fn unmark(&self, rendered: String) -> (String, Vec<usize>) {
        let mut marks = memmem::find_iter(rendered.as_bytes(), NONCE.as_bytes()).peekable();
        if marks.peek().is_none() {
            drop(marks);
            return (rendered, Vec::new());
        }
        let mut text = String::with_capacity(rendered.len());
        let mut untrusted = Vec::new();
        let mut done = 0;
        for mark in marks {
            text.push_str(&rendered[done..mark]);
            done = mark + NONCE.len();
            // A template may have cut the character off that the mark stood behind; whichever
            // stands there now is then the client's as well, or a start too many does no harm.
            let start = text
                .char_indices()
                .next_back()
                .map_or(0, |(start, _)| start);
            if untrusted.last() != Some(&start) {
                untrusted.push(start);
            }
        }
        text.push_str(&rendered[done..]);
        (text, untrusted)
    }

    /// Appends where a beginning of a literal, but not all of it, ends the text.
    fn find_cut_off(&self, text: &str, starts: &mut Vec<usize>) {
        let first = text
            .len()
            .saturating_sub(self.literal_bytes_max.saturating_sub(1));
        for start in (first..text.len()).filter(|&start| text.is_char_boundary(start)) {
            let tail = &text[start..];
            let next = self.sorted.partition_point(|literal| &**literal < tail);
            if self
                .sorted
                .get(next)
                .is_some_and(|literal| literal.starts_with(tail))
            {
                starts.push(start);
            }
        }
    }

    pub(super) fn size_bytes(&self) -> usize {
        let normalised = self.normalised.as_ref();
        self.literals.memory_usage() + normalised.map_or(0, |n| n.literals.memory_usage())
    }
}

/// Puts the nonce in at these places, ascending.
fn insert_nonce(text: &str, places: Vec<usize>) -> Cow<'_, str> {
    if places.is_empty() {
        return Cow::Borrowed(text);
    }
    let mut marked = String::with_capacity(text.len() + places.len() * NONCE.len());
    let mut done = 0;
    for place in places {
        marked.push_str(&text[done..place]);
        marked.push_str(&NONCE);
        done = place;
    }
    marked.push_str(&text[done..]);
    Cow::Owned(marked)
}

/// JSON text with its escapes read, and for each character where it begins there and where it ends
/// in the text as written. What is no escape stays as it is.
fn unescape(json: &str) -> (String, Vec<(usize, usize)>) {
    let mut read = String::with_capacity(json.len());
    let mut written = Vec::with_capacity(json.len());
    let mut at = 0;
    while let Some(first) = json[at..].chars().next() {
        let (character, len) = match first {
            '\\' => escape(&json[at..]).unwrap_or((first, 1)),
            _ => (first, first.len_utf8()),
        };
        at += len;
        written.push((read.len(), at));
        read.push(character);
    }
    (read, written)
}

/// The character that an escape spells, and how long the escape is.
fn escape(text: &str) -> Option<(char, usize)> {
    let simple = match text.as_bytes().get(1)? {
        b'"' => '"',
        b'\\' => '\\',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => {
            let unit = |at: usize| u16::from_str_radix(text.get(at..at + 4)?, 16).ok();
            let high = unit(2)?;
            let low = || {
                text.get(6..8)
                    .filter(|it| *it == "\\u")
                    .and_then(|_| unit(8))
            };
            return match char::from_u32(high.into()) {
                Some(character) => Some((character, 6)),
                None => match char::decode_utf16([high, low()?]).next()? {
                    Ok(character) => Some((character, 12)),
                    Err(_) => None,
                },
            };
        }
        _ => return None,
    };
    Some((simple, 2))
}

impl Normalised {
    /// Appends where text begins that reads as a literal once it is normalised.
    fn find(&self, text: &str, starts: &mut Vec<usize>) {
        let mut normalised = NormalizedString::from(text);
        // The encoder, too, goes on with what a failed normaliser leaves.
        let _ = self.normalizer.normalize(&mut normalised);
        for found in self.literals.find_overlapping_iter(normalised.get()) {
            let original = normalised.convert_offsets(Range::Normalized(found.range()));
            starts.extend(
                original
                    .map(|range| range.start)
                    .filter(|&start| start < text.len() && text.is_char_boundary(start)),
            );
        }
    }
}
