//! The ledger: a prompt's text and tokens, append-only, in segments that conversations share.
//!
//! A [`Rope`] is a mark on a tree of immutable segments: a pointer to the segment it ends in, and
//! how far into it. Cloning a rope, and so forking a conversation, is the clone of a pointer;
//! extending one costs what is appended; cutting one back is a walk over the segments behind the cut.
//!
//! ```text
//!   root ── rendered ── sampled ── rendered ── sampled      ← one conversation
//!                          └─────── rendered ── sampled     ← its fork
//! ```
//!
//! A *rendered* segment holds text that the template produced and what the tokenizer made of it;
//! a *sampled* one holds the tokens of a sample exactly as they were sampled, never encoded again.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::item::ItemId;
pub use crate::tokenizer::Cut;

/// How far apart the hash of a segment's tokens is kept.
const HASH_TOKENS: usize = 4096;

/// Where a run of tokens came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// The template.
    Template,
    /// The instructions.
    Instructions,
    /// The text of an item that was sent.
    Input(ItemId),
    /// A sample.
    Sampled(ItemId),
}

/// A run of tokens from one source. Positions count from the start of the prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The tokens.
    pub tokens: Range<usize>,
    /// Where they came from.
    pub source: Source,
}

/// What is appended to a rope: text with its tokens. Positions count from the start of the prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    /// The text.
    pub text: String,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Where it may be cut, in order.
    pub cuts: Vec<Cut>,
    /// Where literals of added tokens begin that are only text, in order. Empty for samples.
    pub untrusted: Vec<usize>,
    /// Where its tokens came from, in order, without gaps.
    pub spans: Vec<Span>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rendered,
    Sampled,
}

#[derive(Debug)]
struct Segment {
    parent: Rope,
    kind: Kind,
    text: Box<str>,
    ids: Box<[u32]>,
    cuts: Box<[Cut]>,
    untrusted: Box<[usize]>,
    spans: Box<[Span]>,
    /// Tokens that stand as they were sampled, up to the start of this segment.
    sampled_before: usize,
    /// The hash of all tokens up to this segment, and of those with it.
    hash_before: Sha256,
    hash_after: Sha256,
    /// The hash at each [`HASH_TOKENS`] of it, so that a rope which ends inside of a long segment is hashed from nearby.
    hashes: Box<[Sha256]>,
    /// Its ids as they were last written for an engine, in the first form that was asked for: as a
    /// rule a conversation stays with one kind of engine.
    encoded: OnceLock<Box<(IdForm, Bytes)>>,
}

/// How token ids are written for an engine. In each form the ids of a prompt are those of its
/// parts, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdForm {
    /// Protobuf varints, as a packed field has them.
    Varint,
    /// Decimal numbers, a comma before each.
    Decimal,
    /// MessagePack's shortest integers, as an array has them.
    MessagePack,
}

impl IdForm {
    fn encode(self, ids: &[u32]) -> Bytes {
        let mut bytes = Vec::with_capacity(ids.len() * 3);
        for id in ids {
            match self {
                Self::Varint => {
                    let mut rest = *id;
                    while rest >= 0x80 {
                        bytes.push(rest as u8 | 0x80);
                        rest >>= 7;
                    }
                    bytes.push(rest as u8);
                }
                Self::Decimal => {
                    bytes.push(b',');
                    bytes.extend_from_slice(id.to_string().as_bytes());
                }
                Self::MessagePack => match *id {
                    id @ 0..0x80 => bytes.push(id as u8),
                    id @ 0x80..0x100 => bytes.extend([0xcc, id as u8]),
                    id @ 0x100..0x1_0000 => {
                        bytes.push(0xcd);
                        bytes.extend_from_slice(&(id as u16).to_be_bytes());
                    }
                    id => {
                        bytes.push(0xce);
                        bytes.extend_from_slice(&id.to_be_bytes());
                    }
                },
            }
        }
        bytes.into()
    }
}

impl Segment {
    /// The part of the segment between two places in it, on its own.
    fn piece(&self, from: Boundary, to: Boundary) -> Piece {
        let bytes = from.byte - self.parent.bytes..to.byte - self.parent.bytes;
        let tokens = from.token - self.parent.tokens..to.token - self.parent.tokens;
        let cuts = self.cuts.iter().copied();
        let untrusted = self.untrusted.iter().copied();
        let spans = self
            .spans
            .iter()
            .filter(|span| span.tokens.start < to.token && span.tokens.end >= from.token);
        Piece {
            sampled: self.kind == Kind::Sampled,
            draft: Draft {
                text: self.text[bytes].to_owned(),
                ids: self.ids[tokens].to_vec(),
                cuts: cuts
                    .filter(|cut| cut.byte >= from.byte && cut.byte + cut.len <= to.byte)
                    .collect(),
                untrusted: untrusted
                    .filter(|at| (from.byte..to.byte).contains(at))
                    .collect(),
                spans: spans
                    .map(|span| Span {
                        tokens: span.tokens.start.max(from.token)..span.tokens.end.min(to.token),
                        source: span.source.clone(),
                    })
                    .collect(),
            },
        }
    }
}

impl Drop for Segment {
    /// Frees a long chain in a loop: one call a segment would overflow the stack.
    fn drop(&mut self) {
        let mut next = self.parent.segment.take();
        while let Some(segment) = next {
            next = match Arc::try_unwrap(segment) {
                Ok(mut owned) => owned.parent.segment.take(),
                Err(_) => None,
            };
        }
    }
}

/// A mark on the ledger: everything up to it, text and tokens. A clone is the clone of a pointer.
#[derive(Debug, Clone, Default)]
pub struct Rope {
    segment: Option<Arc<Segment>>,
    bytes: usize,
    tokens: usize,
}

/// A part of a rope that lies in one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice<'a> {
    /// Where it begins, in bytes.
    pub first_byte: usize,
    /// Where it begins, in tokens.
    pub first_token: usize,
    /// The text.
    pub text: &'a str,
    /// The tokens.
    pub ids: &'a [u32],
    /// Whether it was sampled.
    pub sampled: bool,
    /// Where it may be cut; positions count from the start of the prompt.
    pub cuts: &'a [Cut],
    /// Positions of literals that are only text.
    pub untrusted: &'a [usize],
    /// Where the tokens came from; the last span may reach past the slice.
    pub spans: &'a [Span],
}

impl Rope {
    /// How many bytes of text it holds.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// How many tokens it holds.
    #[must_use]
    pub fn len_tokens(&self) -> usize {
        self.tokens
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens == 0 && self.bytes == 0
    }

    /// This rope with rendered text behind it. Costs what the draft holds.
    #[must_use]
    pub fn with_rendered(&self, draft: Draft) -> Self {
        self.with(Kind::Rendered, draft)
    }

    /// This rope with a sample behind it, its tokens kept as they are. Costs what the draft holds.
    #[must_use]
    pub fn with_sampled(&self, draft: Draft) -> Self {
        debug_assert!(draft.untrusted.is_empty());
        self.with(Kind::Sampled, draft)
    }

    fn with(&self, kind: Kind, draft: Draft) -> Self {
        if draft.text.is_empty() && draft.ids.is_empty() {
            return self.clone();
        }
        let hash_before = self.hash();
        let mut hash_after = hash_before.clone();
        let mut hashes = Vec::new();
        for ids in draft.ids.chunks(HASH_TOKENS) {
            hash_ids(&mut hash_after, ids);
            if ids.len() == HASH_TOKENS {
                hashes.push(hash_after.clone());
            }
        }
        Self {
            bytes: self.bytes + draft.text.len(),
            tokens: self.tokens + draft.ids.len(),
            segment: Some(Arc::new(Segment {
                parent: self.clone(),
                kind,
                text: draft.text.into(),
                ids: draft.ids.into(),
                cuts: draft.cuts.into(),
                untrusted: draft.untrusted.into(),
                spans: draft.spans.into(),
                sampled_before: self.sampled_tokens(),
                hash_before,
                hash_after,
                hashes: hashes.into(),
                encoded: OnceLock::new(),
            })),
        }
    }

    /// The rope up to this boundary, which [`Rope::boundary`] gave.
    #[must_use]
    pub fn truncated(&self, to: Boundary) -> Self {
        let mut rope = self;
        // Text may have no tokens, such as white space that an added token takes: both count.
        while let Some(segment) = &rope.segment
            && to.token <= segment.parent.tokens
            && to.byte <= segment.parent.bytes
        {
            rope = &segment.parent;
        }
        Self {
            segment: rope.segment.clone(),
            bytes: to.byte,
            tokens: to.token,
        }
    }

    /// The last place at or before `byte` where the text may be cut so that what stands before
    /// keeps its tokens: the end of a sample, or the start of an added token that ends by `byte`
    /// and is not the first of a sample.
    #[must_use]
    pub fn boundary(&self, byte: usize) -> Boundary {
        let mut rope = self;
        while let Some(segment) = &rope.segment {
            if segment.kind == Kind::Sampled && rope.bytes <= byte {
                return Boundary {
                    byte: rope.bytes,
                    token: rope.tokens,
                };
            }
            let limit = byte.min(rope.bytes);
            let cuts = segment
                .cuts
                .partition_point(|cut| cut.byte + cut.len <= limit);
            // A sample that goes with its first token leaves no boundary behind: the text before it
            // was encoded for what followed, which may now be text that spells the same token.
            let first = match segment.kind {
                Kind::Rendered => segment.parent.tokens,
                Kind::Sampled => segment.parent.tokens + 1,
            };
            if let Some(cut) = segment.cuts[..cuts].last()
                && cut.token >= first
            {
                return Boundary {
                    byte: cut.byte,
                    token: cut.token,
                };
            }
            rope = &segment.parent;
        }
        Boundary::START
    }

    /// How many leading bytes this rope has in common with a prompt that has the same first
    /// `from` bytes, and then `text`, with the same trust: `untrusted` are the positions in the
    /// prompt of literals that are only text. Inside samples trust is not compared, since their
    /// tokens stand as sampled. Costs what the rope holds behind `from`: it is the check that a
    /// new rendering keeps the past.
    #[must_use]
    pub fn common_bytes(&self, from: usize, text: &str, untrusted: &[usize]) -> usize {
        let text = text.as_bytes();
        for slice in self.slices_from(from) {
            let first = slice.first_byte.max(from);
            let here = &text[(first - from).min(text.len())..];
            let old = &slice.text.as_bytes()[first - slice.first_byte..];
            let same = common_prefix(old, here);
            let trusted = if slice.sampled {
                usize::MAX
            } else {
                first_difference(slice.untrusted, untrusted, first..first + same)
            };
            let common = (first + same).min(trusted);
            if common < first + old.len() {
                return common;
            }
        }
        self.bytes
    }

    /// The text between two bytes of it, with the positions of literals in there that are only text.
    /// Costs what lies behind the first one.
    #[must_use]
    pub fn text_between(&self, from: usize, to: usize) -> (String, Vec<usize>) {
        let mut text = String::new();
        let mut untrusted = Vec::new();
        for slice in self.slices_from(from) {
            let within =
                |byte: usize| byte.clamp(slice.first_byte, slice.first_byte + slice.text.len());
            let bytes = within(from) - slice.first_byte..within(to) - slice.first_byte;
            text.push_str(&slice.text[bytes]);
            untrusted.extend(slice.untrusted.iter().filter(|at| (from..to).contains(at)));
        }
        (text, untrusted)
    }

    /// How many leading tokens two ropes share. Costs what lies behind their common segment.
    #[must_use]
    pub fn common_tokens(&self, other: &Self) -> usize {
        let (mut left, mut right) = (self, other);
        // Walk the one that ends later up, until both end in the same segment.
        let shared = loop {
            match (&left.segment, &right.segment) {
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) => break left.tokens.min(right.tokens),
                (None, _) | (_, None) => break 0,
                (Some(a), Some(b)) => {
                    if a.parent.tokens >= b.parent.tokens {
                        left = &a.parent;
                    } else {
                        right = &b.parent;
                    }
                }
            }
        };
        let left = self.tokens_from(shared);
        let right = other.tokens_from(shared);
        shared + left.iter().zip(&right).take_while(|(a, b)| a == b).count()
    }

    /// What this rope adds to another one. Costs what it returns, and a walk over the segments of
    /// the other that lie behind the part that both share.
    #[must_use]
    pub fn growth(&self, base: &Self) -> Growth {
        let (mut left, mut right) = (self, base);
        let mut pieces = Vec::new();
        let kept = loop {
            match (&left.segment, &right.segment) {
                (None, _) => break Boundary::START,
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) => {
                    // Text may have no tokens: both count.
                    if left.tokens <= right.tokens && left.bytes <= right.bytes {
                        break left.end();
                    }
                    pieces.push(a.piece(right.end(), left.end()));
                    break right.end();
                }
                (Some(a), Some(b)) if a.parent.tokens < b.parent.tokens => right = &b.parent,
                (Some(a), Some(_) | None) => {
                    pieces.push(a.piece(a.parent.end(), left.end()));
                    left = &a.parent;
                }
            }
        };
        pieces.reverse();
        Growth { kept, pieces }
    }

    /// This rope with what [`Rope::growth`] found, token for token and segment for segment.
    /// `None` where it was found over another rope than this, as far as that can be seen: compare
    /// fingerprints.
    #[must_use]
    pub fn grown(&self, growth: &Growth) -> Option<Self> {
        let kept = growth.kept;
        if kept.byte > self.bytes || kept.token > self.tokens {
            return None;
        }
        let mut rope = self.truncated(kept);
        let fits = match &rope.segment {
            None => kept == Boundary::START,
            Some(segment) => {
                let byte = kept.byte.checked_sub(segment.parent.bytes)?;
                let token = kept.token.checked_sub(segment.parent.tokens)?;
                segment.text.is_char_boundary(byte) && token <= segment.ids.len()
            }
        };
        for piece in &growth.pieces {
            let kind = if piece.sampled {
                Kind::Sampled
            } else {
                Kind::Rendered
            };
            rope = rope.with(kind, piece.draft.clone());
        }
        fits.then_some(rope)
    }

    fn end(&self) -> Boundary {
        Boundary {
            byte: self.bytes,
            token: self.tokens,
        }
    }

    /// The tokens from this position on. Costs what it returns.
    #[must_use]
    pub fn tokens_from(&self, first: usize) -> Vec<u32> {
        let mut parts = Vec::new();
        let mut rope = self;
        while let Some(segment) = &rope.segment
            && rope.tokens > first
        {
            let start = segment.parent.tokens;
            parts.push(&segment.ids[first.saturating_sub(start)..rope.tokens - start]);
            rope = &segment.parent;
        }
        parts.reverse();
        parts.concat()
    }

    /// The parts of the rope in order, from the first token on. Linear in the number of segments.
    #[must_use]
    pub fn slices(&self) -> Vec<Slice<'_>> {
        self.slices_from(0)
    }

    /// Of the parts of the rope, in order, those that reach behind this byte.
    fn slices_from(&self, byte: usize) -> Vec<Slice<'_>> {
        let mut slices = Vec::new();
        let mut rope = self;
        while let Some(segment) = &rope.segment
            && (byte == 0 || rope.bytes > byte)
        {
            let parent = &segment.parent;
            let spans = segment
                .spans
                .partition_point(|span| span.tokens.start < rope.tokens);
            let untrusted = segment.untrusted.partition_point(|at| *at < rope.bytes);
            let cuts = segment.cuts.partition_point(|cut| cut.token < rope.tokens);
            slices.push(Slice {
                first_byte: parent.bytes,
                first_token: parent.tokens,
                text: &segment.text[..rope.bytes - parent.bytes],
                ids: &segment.ids[..rope.tokens - parent.tokens],
                sampled: segment.kind == Kind::Sampled,
                cuts: &segment.cuts[..cuts],
                untrusted: &segment.untrusted[..untrusted],
                spans: &segment.spans[..spans],
            });
            rope = parent;
        }
        slices.reverse();
        slices
    }

    /// All ids in this form, in parts. What was written once is kept on the ledger, so that only ids
    /// that are new are written again: of the others it costs a pointer a segment.
    #[must_use]
    pub fn encoded(&self, form: IdForm) -> Vec<Bytes> {
        let mut parts = Vec::new();
        let mut rope = self;
        while let Some(segment) = &rope.segment {
            let ids = &segment.ids[..rope.tokens - segment.parent.tokens];
            let kept = segment
                .encoded
                .get_or_init(|| Box::new((form, form.encode(&segment.ids))));
            parts.push(match &**kept {
                (kept, bytes) if *kept == form && ids.len() == segment.ids.len() => bytes.clone(),
                _ => form.encode(ids),
            });
            rope = &segment.parent;
        }
        parts.reverse();
        parts
    }

    /// The last token, where it stands as it was sampled.
    #[must_use]
    pub fn last_sampled(&self) -> Option<u32> {
        let segment = self.segment.as_ref()?;
        let ids = &segment.ids[..self.tokens - segment.parent.tokens];
        match segment.kind {
            Kind::Sampled => ids.last().copied(),
            Kind::Rendered => None,
        }
    }

    /// Tokens in it that stand as they were sampled.
    #[must_use]
    pub fn sampled_tokens(&self) -> usize {
        self.segment.as_ref().map_or(0, |segment| {
            let here = match segment.kind {
                Kind::Rendered => 0,
                Kind::Sampled => self.tokens - segment.parent.tokens,
            };
            segment.sampled_before + here
        })
    }

    /// The last bytes of the text, at least `len` of them where there are that many, from a
    /// character boundary on.
    #[must_use]
    pub fn tail(&self, len: usize) -> String {
        let from = self.bytes.saturating_sub(len);
        let mut parts = Vec::new();
        let mut rope = self;
        while let Some(segment) = &rope.segment
            && rope.bytes > from
        {
            let start = segment.parent.bytes;
            let at = segment.text.floor_char_boundary(from.saturating_sub(start));
            parts.push(&segment.text[at..rope.bytes - start]);
            rope = &segment.parent;
        }
        parts.reverse();
        parts.concat()
    }

    /// Names the exact tokens: the first 16 bytes of SHA-256 over all ids, each as four bytes,
    /// little-endian. The same tokens have the same fingerprint, however they were cut into segments.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 16] {
        shorten(self.hash())
    }

    fn hash(&self) -> Sha256 {
        let Some(segment) = &self.segment else {
            return Sha256::new();
        };
        let len = self.tokens - segment.parent.tokens;
        if len == segment.ids.len() {
            return segment.hash_after.clone();
        }
        let known = len / HASH_TOKENS;
        let last = known.checked_sub(1).and_then(|at| segment.hashes.get(at));
        let mut hash = last.unwrap_or(&segment.hash_before).clone();
        hash_ids(&mut hash, &segment.ids[known * HASH_TOKENS..len]);
        hash
    }

    /// What it takes in memory beyond the segments that it shares with another rope. Costs what
    /// lies behind their common segment.
    #[must_use]
    pub fn bytes_beyond(&self, other: &Self) -> usize {
        let (mut own, mut other) = (self, other);
        let mut bytes = 0;
        while let Some(segment) = &own.segment {
            match &other.segment {
                Some(theirs) if Arc::ptr_eq(segment, theirs) => break,
                Some(theirs) if theirs.parent.tokens > segment.parent.tokens => {
                    other = &theirs.parent;
                }
                Some(_) | None => {
                    bytes += segment.bytes();
                    own = &segment.parent;
                }
            }
        }
        bytes
    }
}

impl Segment {
    fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.text.len()
            + size_of_val(&*self.ids)
            + size_of_val(&*self.cuts)
            + size_of_val(&*self.untrusted)
            + size_of_val(&*self.spans)
            + size_of_val(&*self.hashes)
            + self.encoded.get().map_or(0, |kept| kept.1.len())
    }
}

/// A place where a rope may be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boundary {
    /// In bytes.
    pub byte: usize,
    /// In tokens.
    pub token: usize,
}

impl Boundary {
    /// Before everything.
    const START: Self = Self { byte: 0, token: 0 };
}

/// What one rope adds to another: enough to make the one from the other again, and no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// How much of the other it keeps.
    pub kept: Boundary,
    /// What stands behind that, in order.
    pub pieces: Vec<Piece>,
}

/// A segment on its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Whether it was sampled.
    pub sampled: bool,
    /// Text and tokens. Positions count from the start of the prompt.
    pub draft: Draft,
}

impl Growth {
    /// What it takes in memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let drafts = self.pieces.iter().map(|piece| &piece.draft);
        drafts
            .map(|draft| {
                draft.text.len()
                    + size_of_val(&*draft.ids)
                    + size_of_val(&*draft.cuts)
                    + size_of_val(&*draft.untrusted)
                    + size_of_val(&*draft.spans)
            })
            .sum()
    }
}

/// Names these tokens, as [`Rope::fingerprint`] does.
#[must_use]
pub fn fingerprint(ids: &[u32]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash_ids(&mut hash, ids);
    shorten(hash)
}

fn shorten(hash: Sha256) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&hash.finalize()[..16]);
    short
}

fn hash_ids(hash: &mut Sha256, ids: &[u32]) {
    // In blocks, since the hash is slow on four bytes at a time.
    let mut block = [0u8; 1024];
    for chunk in ids.chunks(block.len() / 4) {
        for (bytes, id) in block.chunks_exact_mut(4).zip(chunk) {
            bytes.copy_from_slice(&id.to_le_bytes());
        }
        hash.update(&block[..chunk.len() * 4]);
    }
}

/// How many bytes both begin with.
pub(crate) fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    const BLOCK: usize = 4096;
    let len = a.len().min(b.len());
    let mut at = 0;
    while at + BLOCK <= len && a[at..at + BLOCK] == b[at..at + BLOCK] {
        at += BLOCK;
    }
    at + a[at..len]
        .iter()
        .zip(&b[at..len])
        .take_while(|(x, y)| x == y)
        .count()
}

/// The first position in the range that is in one of two sorted lists only.
pub(crate) fn first_difference(old: &[usize], new: &[usize], range: Range<usize>) -> usize {
    let within = |list: &[usize]| {
        let from = list.partition_point(|at| *at < range.start);
        let to = list.partition_point(|at| *at < range.end);
        from..to
    };
    let (old, new) = (&old[within(old)], &new[within(new)]);
    for index in 0..old.len().max(new.len()) {
        match (old.get(index), new.get(index)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(a), Some(b)) => return *a.min(b),
            (Some(only), None) | (None, Some(only)) => return *only,
            (None, None) => {}
        }
    }
    usize::MAX
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn draft(rope: &Rope, text: &str) -> Draft {
        // One token a byte; `|` is an added token.
        let cuts = text
            .match_indices('|')
            .map(|(at, _)| Cut {
                byte: rope.len_bytes() + at,
                token: rope.len_tokens() + at,
                len: 1,
            })
            .collect();
        Draft {
            text: text.to_owned(),
            ids: text.bytes().map(u32::from).collect(),
            cuts,
            ..Draft::default()
        }
    }

    fn text_of(rope: &Rope) -> String {
        rope.slices().iter().map(|slice| slice.text).collect()
    }

    #[test]
    fn a_rope_that_ends_inside_of_a_long_segment_has_the_fingerprint_of_its_tokens() {
        let mut ids: Vec<u32> = (7..17).collect();
        let short = Draft {
            text: "s".repeat(ids.len()),
            ids: ids.clone(),
            ..Draft::default()
        };
        let fresh: Vec<u32> = (0..3 * HASH_TOKENS as u32 + 5).collect();
        ids.extend(&fresh);
        let long = Draft {
            text: "l".repeat(fresh.len()),
            ids: fresh,
            ..Draft::default()
        };
        let rope = Rope::default().with_rendered(short).with_sampled(long);
        for at in [9, 10, 11, HASH_TOKENS, 2 * HASH_TOKENS]
            .into_iter()
            .chain([
                HASH_TOKENS + 9,
                HASH_TOKENS + 10,
                HASH_TOKENS + 11,
                3 * HASH_TOKENS + 10,
                ids.len(),
            ])
        {
            let cut = rope.truncated(Boundary {
                byte: at,
                token: at,
            });
            assert_eq!(cut.fingerprint(), fingerprint(&ids[..at]), "{at}");
        }
    }

    #[test]
    fn a_fork_shares_the_past_and_leaves_the_other_alone() {
        let root = Rope::default();
        let base = root.with_rendered(draft(&root, "|user hi|"));
        let one = base.with_sampled(draft(&base, "one|"));
        let two = base.with_sampled(draft(&base, "two|"));
        assert_eq!(text_of(&one), "|user hi|one|");
        assert_eq!(text_of(&two), "|user hi|two|");
        assert_eq!(text_of(&base), "|user hi|");
        assert_eq!(one.common_tokens(&two), base.len_tokens());
        assert_eq!(one.sampled_tokens(), 4);
        let alone = Rope::default();
        assert_eq!(one.bytes_beyond(&two), one.bytes_beyond(&base));
        assert!(one.bytes_beyond(&base) < one.bytes_beyond(&alone));
        assert_eq!(
            one.bytes_beyond(&alone),
            one.bytes_beyond(&base) + base.bytes_beyond(&alone)
        );
        assert_eq!(base.bytes_beyond(&one), 0);
    }

    #[test]
    fn a_sample_ends_in_a_boundary_and_text_only_at_added_tokens() {
        let root = Rope::default();
        let prompt = root.with_rendered(draft(&root, "ab|cd"));
        let sampled = prompt.with_sampled(draft(&prompt, "xyz"));
        let at = |byte| sampled.boundary(byte).byte;
        assert_eq!((at(8), at(7), at(5), at(3), at(2)), (8, 2, 2, 2, 0));
    }

    #[test]
    fn a_sample_that_goes_with_its_first_token_leaves_no_boundary() {
        let root = Rope::default();
        let prompt = root.with_rendered(draft(&root, "ab|cd"));
        let sampled = prompt.with_sampled(draft(&prompt, "|yz|w"));
        let at = |byte| sampled.boundary(byte).byte;
        assert_eq!((at(10), at(9), at(8), at(7)), (10, 8, 2, 2));
    }

    #[test]
    fn text_without_tokens_stays_where_it_is_cut_behind_it() {
        let root = Rope::default();
        let prompt = root.with_sampled(draft(&root, "a|"));
        let rendered = prompt.with_rendered(Draft {
            text: " |b".to_owned(),
            ids: vec![1, 2],
            cuts: vec![Cut {
                byte: 3,
                token: 2,
                len: 1,
            }],
            ..Draft::default()
        });
        let cut = rendered.truncated(rendered.boundary(5));
        assert_eq!((text_of(&cut), cut.len_tokens()), ("a| ".to_owned(), 2));
        assert_eq!(cut.fingerprint(), prompt.fingerprint());
        let again = cut.with_rendered(draft(&cut, "|c"));
        assert_eq!(text_of(&again), "a| |c");
        assert_eq!(again.common_tokens(&rendered), 2);
    }

    #[test]
    fn trust_is_part_of_what_is_compared() {
        let root = Rope::default();
        let trusted = root.with_rendered(draft(&root, "ab|cd"));
        assert_eq!(trusted.common_bytes(0, "ab|cde", &[]), 5);
        assert_eq!(trusted.common_bytes(0, "ab|cde", &[2]), 2);
        let marked = root.with_rendered(Draft {
            untrusted: vec![2],
            ..draft(&root, "ab|cd")
        });
        assert_eq!(marked.common_bytes(0, "ab|cde", &[]), 2);
        assert_eq!(marked.common_bytes(0, "ab|cde", &[2, 9]), 5);
    }

    #[test]
    fn a_long_chain_is_freed_without_recursion() {
        let mut rope = Rope::default();
        for _ in 0..200_000 {
            rope = rope.with_rendered(draft(&rope, "x"));
        }
        assert_eq!(rope.len_tokens(), 200_000);
        drop(rope);
    }

    proptest! {
        /// Any sequence of appends and cuts gives the text, tokens and fingerprint of the plain string.
        #[test]
        fn a_rope_is_the_string_it_stands_for(steps in prop::collection::vec(("[a-c|é]{0,9}", any::<bool>(), 0usize..40), 1..30)) {
            let mut rope = Rope::default();
            let mut model = String::new();
            let mut forks: Vec<(Rope, String)> = Vec::new();
            for (text, sampled, back) in steps {
                let ascii: String = text.chars().map(|c| if c == 'é' { 'e' } else { c }).collect();
                let cut = rope.boundary(rope.len_bytes().saturating_sub(back));
                prop_assert!(cut.byte <= rope.len_bytes());
                forks.push((rope.clone(), model.clone()));
                rope = rope.truncated(cut);
                model.truncate(cut.byte);
                let new = draft(&rope, &ascii);
                rope = if sampled { rope.with_sampled(new) } else { rope.with_rendered(new) };
                model.push_str(&ascii);
                let ids: Vec<u32> = model.bytes().map(u32::from).collect();
                prop_assert_eq!(&text_of(&rope), &model);
                prop_assert_eq!(rope.tokens_from(0), ids.clone());
                let whole = Rope::default().with_rendered(draft(&Rope::default(), &model));
                prop_assert_eq!(rope.fingerprint(), whole.fingerprint());
                prop_assert_eq!(rope.common_bytes(0, &model, &[]), model.len());
                for form in [IdForm::Varint, IdForm::Decimal, IdForm::MessagePack] {
                    prop_assert_eq!(rope.encoded(form).concat(), form.encode(&ids));
                }
                prop_assert_eq!(rope.tokens_from(ids.len() / 2), ids[ids.len() / 2..].to_vec());
            }
            for (fork, model) in &forks {
                // What the rope adds to its past makes it again from that past, and from a copy of it.
                let copy = Rope::default().grown(&fork.growth(&Rope::default())).unwrap();
                prop_assert_eq!(copy.slices(), fork.slices());
                for past in [fork, &copy] {
                    let again = past.grown(&rope.growth(fork)).unwrap();
                    prop_assert_eq!(again.slices(), rope.slices());
                    prop_assert_eq!(again.fingerprint(), rope.fingerprint());
                    for byte in 0..=rope.len_bytes() {
                        prop_assert_eq!(again.boundary(byte), rope.boundary(byte));
                    }
                }
                let back = rope.grown(&fork.growth(&rope)).unwrap();
                prop_assert_eq!(text_of(&back), text_of(fork));
                prop_assert_eq!(back.tokens_from(0), fork.tokens_from(0));
                prop_assert_eq!(&text_of(fork), model);
                let common = fork.tokens_from(0).iter().zip(rope.tokens_from(0)).take_while(|(a, b)| **a == *b).count();
                prop_assert_eq!(fork.common_tokens(&rope), common);
            }
        }
    }
}
