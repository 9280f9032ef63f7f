//! Text to tokens and back, exactly, piece by piece; the only module that knows `tokenizers`.
//!
//! A prompt mixes text of two origins: the template's, whose `<|im_end|>` is one token, and the
//! client's, whose `<|im_end|>` is eleven characters. And a prompt grows, so that only its new end
//! should be encoded. Both need the one step that decides where added tokens stand in our own
//! hands: [`Tokenizer::encode`] looks for them itself, leaves out those that begin where a client
//! wrote them, notes where the text may be cut, and has the crate's normaliser, pre-tokeniser and
//! model do the rest on each piece between. Without untrusted text the result is the crate's own
//! `encode`; a vocabulary for which a built-in corpus shows otherwise is refused when loaded.

mod detok;
mod fast;
mod guard;
mod probe;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aho_corasick::{AhoCorasick, Input, MatchKind};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::tokenizer::normalizer::Range as HfRange;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizedString, PreTokenizer, Token, Tokenizer as HfTokenizer,
};

pub use detok::{DetokPiece, Detokenizer, Pieces};
pub use guard::Guard;

/// A token's number in its vocabulary.
pub type TokenId = u32;

/// Ids above this make no vocabulary that a model could have an output for.
const VOCAB_SIZE_MAX: usize = 1 << 24;

/// Stands before a piece that does not begin the prompt, so that the crate sees it in mid-text.
const MID_TEXT: &str = "\u{0}";

/// Why a `tokenizer.json` cannot be served exactly.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// It is not a tokenizer.
    #[error("it cannot be understood: {reason}")]
    Malformed {
        /// What the parser said.
        reason: String,
    },
    /// It shortens what it encodes.
    #[error("truncation is set: tokens of a long prompt would be lost")]
    Truncation,
    /// It lengthens what it encodes.
    #[error("padding is set: prompts would contain tokens that nobody wrote")]
    Padding,
    /// It encodes the same text differently each time.
    #[error("the model draws its segmentation at random (dropout or sampling)")]
    Random,
    /// An added token depends on the characters around it.
    #[error(
        "added token {content:?} is matched as a single word only, which depends on its neighbours"
    )]
    SingleWord {
        /// The token.
        content: String,
    },
    /// An added token has another id in the file than the crate gives it.
    #[error("added token {content:?} is declared with id {declared} but gets id {given}")]
    Misnumbered {
        /// The token.
        content: String,
        /// Its id in the file.
        declared: TokenId,
        /// Its id once loaded.
        given: TokenId,
    },
    /// No kind of model that language models use.
    #[error("a {kind} model is not supported, only BPE and Unigram are")]
    Model {
        /// The model's kind.
        kind: &'static str,
    },
    /// The model fails on characters that it does not know.
    #[error("the model can neither encode nor replace an unknown character")]
    Unknown,
    /// The byte table cannot express this decoder.
    #[error("decoder {kind} is not supported, only ByteLevel and the SentencePiece kinds are")]
    Decoder {
        /// The decoder, or what is wrong with it.
        kind: String,
    },
    /// Ids or contents beyond all measure.
    #[error("the vocabulary is too large")]
    TooLarge,
    /// Encoding piece by piece is not what the crate makes of the whole text.
    #[error("probe text {text} encodes differently piece by piece than as a whole")]
    ProbeEncode {
        /// The number of the text in the built-in corpus.
        text: usize,
    },
    /// The byte table is not what the crate's decoder says.
    #[error("probe sequence {sequence} decodes differently by table than by the decoder")]
    ProbeDecode {
        /// The number of the sequence.
        sequence: usize,
    },
    /// A client could write this token even as untrusted text.
    #[error("added token {content:?} appears even where its text is not trusted")]
    Forgeable {
        /// The token.
        content: String,
    },
}

/// A place before which text may be cut: the added token that begins here is the first of the
/// second half, and the halves encode on their own to what the whole encodes to.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize,
)]
pub struct Cut {
    /// Where the token's content begins, in bytes from the start of the encoded text.
    pub byte: usize,
    /// How many tokens the encoded text has before it.
    pub token: usize,
    /// The length of the token's content in bytes. A text that shares less with this one than all
    /// of it might not contain the token.
    pub len: usize,
}

/// What [`Tokenizer::encode`] appends to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<TokenId>,
    /// Where the text may be cut, ascending. Each call counts from its own text's start and from
    /// its own first token, whatever stood here before.
    pub cuts: Vec<Cut>,
}

/// A token that stands beside the model's own vocabulary and is looked for before the model runs.
#[derive(Debug)]
struct AddedToken {
    id: TokenId,
    content: Box<str>,
    /// What is looked for: the content, normalised if the token is.
    pattern: Box<str>,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
    /// Not to be written by clients: see [`AddedToken::is_control`].
    control: bool,
    cut: bool,
}

impl AddedToken {
    /// A run of spaces, a single letter or a byte that some vocabularies add is text like any
    /// other, and a model that knows it should meet it in a client's text too, unless it is called
    /// special. `bytes` are what the token reads as.
    fn is_control(bytes: &[u8], special: bool) -> bool {
        let is_markup = |text: &str| text.chars().nth(1).is_some() && !text.trim().is_empty();
        special || std::str::from_utf8(bytes).is_ok_and(is_markup)
    }
}

/// One of the two sets of added tokens, in the order of the automaton's patterns.
#[derive(Debug)]
struct Scan {
    literals: AhoCorasick,
    /// Pattern number to index in [`Tokenizer::added`].
    tokens: Vec<usize>,
}

/// A vocabulary that encodes and decodes exactly; immutable and shared.
pub struct Tokenizer {
    hf: HfTokenizer,
    /// Encodes what it can instead.
    fast: Option<fast::Fast>,
    /// By ascending id.
    added: Vec<AddedToken>,
    by_content: HashMap<Box<str>, TokenId>,
    /// Looked for in the text as it is.
    raw: Option<Scan>,
    /// Looked for in normalised text, between those of the first.
    normalised: Option<Scan>,
    guard: Guard,
    table: Arc<detok::Table>,
    fingerprint: [u8; 32],
    json_bytes: usize,
    encoded_tokens: AtomicU64,
}

impl Tokenizer {
    /// Loads a `tokenizer.json` and checks on a built-in corpus that it is served exactly.
    ///
    /// # Errors
    ///
    /// Every property that would make pieces encode differently from the whole, or text decode
    /// differently by table than by the declared decoder, has its own [`TokenizerError`].
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let hf = HfTokenizer::from_bytes(json).map_err(|error| TokenizerError::Malformed {
            reason: error.to_string(),
        })?;
        refuse_inexact(&hf)?;
        let spelling = detok::Spelling::of(&hf)?;
        let added = added_tokens(&hf, &spelling, json)?;
        let vocab_size = hf
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        if vocab_size > VOCAB_SIZE_MAX {
            return Err(TokenizerError::TooLarge);
        }
        let mut tokenizer = Self {
            by_content: added
                .iter()
                .map(|token| (token.content.clone(), token.id))
                .collect(),
            raw: Scan::new(&added, false)?,
            normalised: Scan::new(&added, true)?,
            guard: Guard::new(&added, normalizer(&hf))?,
            table: Arc::new(detok::Table::build(&hf, &spelling, &added, vocab_size)?),
            fingerprint: Sha256::digest(json).into(),
            json_bytes: json.len(),
            encoded_tokens: AtomicU64::new(0),
            added,
            hf,
            fast: None,
        };
        probe::check(&tokenizer)?;
        tokenizer.fast = tokenizer.load_fast(json);
        tokenizer.encoded_tokens.store(0, Ordering::Relaxed);
        Ok(tokenizer)
    }

    /// The faster encoder, where it gives the same tokens.
    fn load_fast(&self, json: &[u8]) -> Option<fast::Fast> {
        if self.normalised.is_some() {
            // These are looked for between normalising and all else, which it does in one go.
            return None;
        }
        let found = fast::Fast::new(json).and_then(|fast| {
            let agrees = fast::agrees(self, &fast, &probe::texts(&self.added));
            agrees
                .then_some(fast)
                .ok_or_else(|| "it gives other tokens".to_owned())
        });
        if let Err(reason) = &found {
            tracing::info!(%reason, "the fast encoder is not used for this vocabulary");
        }
        found.ok()
    }

    /// Encodes with the first encoder only, which is slower: for comparison.
    pub fn without_fast_encoder(mut self) -> Self {
        self.fast = None;
        self
    }

    /// Whether the fast encoder is used.
    pub fn has_fast_encoder(&self) -> bool {
        self.fast.is_some()
    }

    /// Appends the tokens of `text` to `out`, without those that a post-processor would add.
    ///
    /// `at_start`: the text stands at the beginning of the prompt, where some vocabularies add a
    /// space. `untrusted`: ascending byte offsets at which a literal begins that must not become
    /// an added token, as [`Guard::unmark`] finds them.
    ///
    /// # What is guaranteed
    ///
    /// With nothing untrusted the tokens are those of the crate's own `encode`. For each cut `c`,
    /// encoding `text[..c.byte]` and, not at the start, `text[c.byte..]` gives the same tokens.
    /// No text makes the model itself spell a control token, trusted or not.
    pub fn encode(&self, text: &str, at_start: bool, untrusted: &[usize], out: &mut Encoded) {
        let first = out.ids.len();
        let mut done = 0;
        for (found, token) in Scan::matches(self.raw.as_ref(), text, |found| {
            untrusted.binary_search(&found.start).is_ok()
        }) {
            let token = &self.added[token];
            let swallowed = swallow(text, &found, token);
            if done < swallowed.start {
                let piece = Piece {
                    text: &text[done..swallowed.start],
                    offset: done,
                    at_start: at_start && done == 0,
                };
                self.encode_piece(piece, untrusted, &mut out.ids);
            }
            if token.cut {
                out.cuts.push(Cut {
                    byte: found.start,
                    token: out.ids.len() - first,
                    len: found.len(),
                });
            }
            out.ids.push(token.id);
            done = swallowed.end;
        }
        if done < text.len() {
            let piece = Piece {
                text: &text[done..],
                offset: done,
                at_start: at_start && done == 0,
            };
            self.encode_piece(piece, untrusted, &mut out.ids);
        }
        let count = (out.ids.len() - first) as u64;
        self.encoded_tokens.fetch_add(count, Ordering::Relaxed);
    }

    /// The id of the added token with exactly this content.
    pub fn token_id(&self, content: &str) -> Option<TokenId> {
        self.by_content.get(content).copied()
    }

    /// The content of an added token; nothing for the model's own tokens.
    pub fn added(&self, id: TokenId) -> Option<&str> {
        self.added_token(id).map(|token| &*token.content)
    }

    /// Whether the vocabulary calls this added token special: not meant for readers.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.added_token(id).is_some_and(|token| token.special)
    }

    /// Whether this token stands for itself and not for its text, so that no text can spell it.
    pub fn is_control(&self, id: TokenId) -> bool {
        self.table.is_control(id)
    }

    /// Whether text may be cut before this token wherever it is matched.
    pub fn is_cut(&self, id: TokenId) -> bool {
        self.added_token(id).is_some_and(|token| token.cut)
    }

    /// Whether the white space that stands behind this added token belongs to it, and so has no
    /// tokens of its own.
    pub fn swallows_after(&self, id: TokenId) -> bool {
        self.added_token(id).is_some_and(|token| token.rstrip)
    }

    /// The bytes that a token adds to a text; none for an id without a token.
    pub fn bytes_of(&self, id: TokenId) -> &[u8] {
        self.table.bytes_of(id)
    }

    /// One more than the highest id. Ids below it may be unused.
    pub fn vocab_size(&self) -> usize {
        self.table.vocab_size()
    }

    /// SHA-256 of the `tokenizer.json`.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// How many tokens [`Tokenizer::encode`] has produced since loading.
    pub fn encoded_tokens(&self) -> u64 {
        self.encoded_tokens.load(Ordering::Relaxed)
    }

    /// Roughly how much memory it takes, for a cache that weighs its entries.
    pub fn size_bytes(&self) -> usize {
        // The crate keeps every token string twice and the merges once, in hash maps.
        let scans = [&self.raw, &self.normalised].into_iter().flatten();
        4 * self.json_bytes
            + self.table.size_bytes()
            + self.guard.size_bytes()
            + scans
                .map(|scan| scan.literals.memory_usage())
                .sum::<usize>()
    }

    /// The state with which one stream of tokens becomes text.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.table))
    }

    /// What marks the control tokens in a client's text.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    fn added_token(&self, id: TokenId) -> Option<&AddedToken> {
        let index = self
            .added
            .binary_search_by_key(&id, |token| token.id)
            .ok()?;
        Some(&self.added[index])
    }

    /// Encodes what lies between two added tokens.
    ///
    /// No vocabulary is known that passes the checks at load and then fails on a text. Should one,
    /// the piece is halved until the characters that it fails on are alone, and these are left
    /// out: that is at least always the same answer, and leaves every cut valid.
    fn encode_piece(&self, piece: Piece<'_>, untrusted: &[usize], ids: &mut Vec<TokenId>) {
        if let Some(fast) = &self.fast
            && fast.encode(piece.text, &self.table, ids).is_some()
        {
            return;
        }
        let before = ids.len();
        if self.try_piece(piece, untrusted, ids).is_ok() {
            return;
        }
        ids.truncate(before);
        let first = piece.text.ceil_char_boundary(1);
        let middle = piece
            .text
            .floor_char_boundary(piece.text.len() / 2)
            .max(first);
        if middle == piece.text.len() {
            tracing::error!("a character could not be encoded and was left out");
            return;
        }
        let (left, right) = piece.text.split_at(middle);
        self.encode_piece(
            Piece {
                text: left,
                ..piece
            },
            untrusted,
            ids,
        );
        let right = Piece {
            text: right,
            offset: piece.offset + middle,
            at_start: false,
        };
        self.encode_piece(right, untrusted, ids);
    }

    /// Normaliser, second set of added tokens, pre-tokeniser, model: the crate's own order.
    fn try_piece(
        &self,
        piece: Piece<'_>,
        untrusted: &[usize],
        ids: &mut Vec<TokenId>,
    ) -> tokenizers::Result<()> {
        let lead = if piece.at_start { "" } else { MID_TEXT };
        let mut string = PreTokenizedString::from(format!("{lead}{}", piece.text));
        string.split(|_, whole| {
            let text = slice(&whole, lead.len()..whole.len())?;
            let lead = slice(&whole, 0..lead.len())?;
            // A part that already has its tokens, here none, is left alone by all that follows.
            Ok([(lead, Some(Vec::new())), (text, None)])
        })?;
        string.split(|_, mut text| {
            if let Some(normalizer) = normalizer(&self.hf) {
                // The crate goes on with what a failed normaliser leaves, and so must we.
                let _ = normalizer.normalize(&mut text);
            }
            // From the crate's offsets, which count the lead, to those in the whole text.
            let shift = |offset: usize| offset + piece.offset - lead.len();
            self.split_normalised(&text, |found| {
                let start = shift(text.offsets_original().0 + found.start);
                let end = shift(text.offsets_original().0 + found.end);
                let next = untrusted.partition_point(|&offset| offset < start);
                untrusted.get(next).is_some_and(|&offset| offset < end)
            })
        })?;
        if let Some(pre_tokenizer) = self.hf.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut string)?;
        }
        for (word, _, tokens) in string.get_splits(OffsetReferential::Normalized, OffsetType::None)
        {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => self.encode_word(word, ids)?,
            }
        }
        Ok(())
    }

    /// Parts normalised text at the added tokens of the second set. `refused` is asked with the
    /// place of a match in the text before it was normalised.
    fn split_normalised(
        &self,
        text: &NormalizedString,
        refused: impl Fn(&Range<usize>) -> bool,
    ) -> tokenizers::Result<Vec<(NormalizedString, Option<Vec<Token>>)>> {
        let mut parts = Vec::new();
        let mut done = 0;
        for (found, token) in Scan::matches(self.normalised.as_ref(), text.get(), |found| {
            text.convert_offsets(HfRange::Normalized(found.clone()))
                .is_none_or(|original| refused(&original))
        }) {
            let token = &self.added[token];
            let swallowed = swallow(text.get(), &found, token);
            if done < swallowed.start {
                parts.push((slice(text, done..swallowed.start)?, None));
            }
            done = swallowed.end;
            let tokens = vec![Token::new(token.id, String::new(), (0, 0))];
            parts.push((slice(text, swallowed)?, Some(tokens)));
        }
        if done < text.len() {
            parts.push((slice(text, done..text.len())?, None));
        }
        Ok(parts)
    }

    /// Has the model encode one word, and does not let it spell a control token.
    ///
    /// All trusted control tokens are found before the model runs. If it makes one of its own,
    /// because its merges or pieces happen to contain the literal, then from text that a client
    /// wrote or that only normalising turned into the literal. Such a literal is parted behind its
    /// first character, and the parts are encoded on their own.
    fn encode_word(&self, word: &str, ids: &mut Vec<TokenId>) -> tokenizers::Result<()> {
        let mut parts = vec![word];
        while let Some(part) = parts.pop() {
            let tokens = self.hf.get_model().tokenize(part)?;
            let breaks: Vec<usize> = tokens
                .iter()
                .filter_map(|token| self.break_in(part, token))
                .collect();
            if breaks.is_empty() {
                ids.extend(tokens.iter().map(|token| token.id));
                continue;
            }
            let mut end = part.len();
            for at in breaks.into_iter().rev() {
                parts.push(&part[at..end]);
                end = at;
            }
            parts.push(&part[..end]);
        }
        Ok(())
    }

    /// Where to part `word` if `token` is a control token whose literal stands in it. An unknown
    /// character's token or a byte's may be an added one as well, but is not spelt like it.
    fn break_in(&self, word: &str, token: &Token) -> Option<usize> {
        if !self.table.is_control(token.id) {
            return None;
        }
        let literal = word.get(token.offsets.0..token.offsets.1)?;
        if self.added(token.id) != Some(literal) {
            return None;
        }
        let at = literal.chars().next()?.len_utf8();
        (at < literal.len()).then_some(token.offsets.0 + at)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("added", &self.added.len())
            .finish_non_exhaustive()
    }
}

/// Text between two added tokens.
#[derive(Debug, Clone, Copy)]
struct Piece<'t> {
    text: &'t str,
    /// Where it begins in the whole text.
    offset: usize,
    /// Whether it begins the prompt.
    at_start: bool,
}

impl Scan {
    /// The added tokens that are looked for after (`normalized`) or before normalising.
    fn new(added: &[AddedToken], normalized: bool) -> Result<Option<Self>, TokenizerError> {
        let tokens: Vec<usize> = (0..added.len())
            .filter(|&index| added[index].normalized == normalized)
            .collect();
        if tokens.is_empty() {
            return Ok(None);
        }
        let literals = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|&index| added[index].pattern.as_bytes()))
            .map_err(|_| TokenizerError::TooLarge)?;
        Ok(Some(Self { literals, tokens }))
    }

    /// All matches in `text` from left to right, the longest at each place, as (range, index of
    /// the token). After a match that is `refused` the search goes on at its second byte.
    fn matches<'t>(
        scan: Option<&'t Self>,
        text: &'t str,
        refused: impl Fn(&Range<usize>) -> bool,
    ) -> impl Iterator<Item = (Range<usize>, usize)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let scan = scan?;
            loop {
                let found = scan.literals.find(Input::new(text).range(at..))?;
                if refused(&found.range()) {
                    at = found.start() + 1;
                    continue;
                }
                at = found.end();
                return Some((found.range(), scan.tokens[found.pattern().as_usize()]));
            }
        })
    }
}

/// The text that a matched token stands for, with the white space that it swallows on its sides.
fn swallow(text: &str, found: &Range<usize>, token: &AddedToken) -> Range<usize> {
    let start = if token.lstrip {
        text[..found.start].trim_end().len()
    } else {
        found.start
    };
    let end = if token.rstrip {
        text.len() - text[found.end..].trim_start().len()
    } else {
        found.end
    };
    start..end
}

fn slice(text: &NormalizedString, range: Range<usize>) -> tokenizers::Result<NormalizedString> {
    text.slice(HfRange::Normalized(range))
        .ok_or_else(|| "not at a character boundary".into())
}

/// Refuses what makes the tokens of a text depend on more than the text before them.
fn refuse_inexact(hf: &HfTokenizer) -> Result<(), TokenizerError> {
    if hf.get_truncation().is_some() {
        return Err(TokenizerError::Truncation);
    }
    if hf.get_padding().is_some() {
        return Err(TokenizerError::Padding);
    }
    match hf.get_model() {
        ModelWrapper::BPE(bpe) if bpe.dropout.is_some_and(|dropout| dropout > 0.0) => {
            Err(TokenizerError::Random)
        }
        ModelWrapper::Unigram(unigram) if unigram.alpha.is_some() => Err(TokenizerError::Random),
        model @ (ModelWrapper::BPE(_) | ModelWrapper::Unigram(_)) => model
            .tokenize("\u{10FFFE}")
            .map(|_| ())
            .map_err(|_| TokenizerError::Unknown),
        ModelWrapper::WordPiece(_) => Err(TokenizerError::Model { kind: "WordPiece" }),
        ModelWrapper::WordLevel(_) => Err(TokenizerError::Model { kind: "WordLevel" }),
    }
}

/// The added tokens by ascending id, as the crate loaded them.
fn added_tokens(
    hf: &HfTokenizer,
    spelling: &detok::Spelling,
    json: &[u8],
) -> Result<Vec<AddedToken>, TokenizerError> {
    refuse_misnumbered(hf, json)?;
    let mut added = Vec::new();
    for (id, token) in hf.get_added_tokens_decoder() {
        if token.single_word {
            return Err(TokenizerError::SingleWord {
                content: token.content,
            });
        }
        let mut pattern = NormalizedString::from(token.content.as_str());
        if token.normalized
            && let Some(normalizer) = normalizer(hf)
        {
            let normalised = normalizer.normalize(&mut pattern);
            normalised.map_err(|error| TokenizerError::Malformed {
                reason: error.to_string(),
            })?;
        }
        added.push(AddedToken {
            id,
            control: AddedToken::is_control(
                &spelling.bytes_of_added(&token.content),
                token.special,
            ),
            pattern: pattern.get().into(),
            content: token.content.into(),
            lstrip: token.lstrip,
            rstrip: token.rstrip,
            normalized: token.normalized,
            special: token.special,
            cut: false,
        });
    }
    added.sort_unstable_by_key(|token| token.id);
    for index in 0..added.len() {
        added[index].cut = allows_cut(&added[index], &added, normalizer(hf).is_some());
    }
    Ok(added)
}

fn refuse_misnumbered(hf: &HfTokenizer, json: &[u8]) -> Result<(), TokenizerError> {
    #[derive(Deserialize)]
    struct Declared {
        #[serde(default)]
        added_tokens: Vec<DeclaredToken>,
    }
    #[derive(Deserialize)]
    struct DeclaredToken {
        id: TokenId,
        content: String,
    }
    let declared: Declared =
        serde_json::from_slice(json).map_err(|error| TokenizerError::Malformed {
            reason: error.to_string(),
        })?;
    for DeclaredToken { id, content } in declared.added_tokens {
        match hf.token_to_id(&content) {
            Some(given) if given != id => {
                return Err(TokenizerError::Misnumbered {
                    content,
                    declared: id,
                    given,
                });
            }
            // The crate leaves a token without content out.
            Some(_) | None => {}
        }
    }
    Ok(())
}

/// The normaliser, unless it is an empty sequence, which some vocabularies declare for none.
fn normalizer(hf: &HfTokenizer) -> Option<&NormalizerWrapper> {
    hf.get_normalizer().filter(|normalizer| {
        !matches!(normalizer, NormalizerWrapper::Sequence(steps) if steps.as_ref().is_empty())
    })
}

/// Whether the text before `token`, wherever it is matched, encodes the same without it.
///
/// It must be looked for in the text as it is, take nothing of what stands before it, leave white
/// space to a token before it that swallows such, and never compete with a match that begins
/// earlier: no other token that is looked for before it or with it may have it inside, or end with
/// its beginning. A token called normalised is looked for in the text as it is where nothing
/// normalises, but after the others.
fn allows_cut(token: &AddedToken, added: &[AddedToken], normalizes: bool) -> bool {
    let x = &*token.content;
    let alone = || {
        added.iter().all(|other| {
            let y = &*other.content;
            (other.normalized && !token.normalized)
                || y == x
                || y.char_indices()
                    .skip(1)
                    .map(|(start, _)| &y[start..])
                    .all(|suffix| !suffix.starts_with(x) && !x.starts_with(suffix))
        })
    };
    let in_text_as_it_is = !(token.normalized && normalizes);
    in_text_as_it_is && !token.lstrip && !x.starts_with(char::is_whitespace) && alone()
}
