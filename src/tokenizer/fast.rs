//! A second encoder, many times faster, for vocabularies for which it gives the same tokens.
//!
//! It is the next major version of `tokenizers`, a release candidate, and so never trusted: when a vocabulary is loaded
//! it encodes the probe texts and as many random ones beside the first encoder. A single difference, or a vocabulary
//! that it does not read, and every piece goes to the first encoder as before. It sees only pieces between added
//! tokens, and where it spells a control token from one, that piece goes to the first encoder too.

use serde_json::Value;
use tokenizers_fast::pipeline::{EncodeOptions, PipelineToken, PipelineTokenizer};

use super::{Piece, TokenId, Tokenizer, detok::Table, probe::SplitMix};

/// Of a longer run of white space, or of anything else, the regular expressions of the first encoder may give up, which
/// shows in its tokens.
const RUN_BYTES_MAX: usize = 10_000;

/// Random texts that it is tried on.
const RANDOM_TEXTS: usize = 600;
/// Where their characters are from: ASCII, Latin, Greek to Arabic, Indic, marks, CJK, Hangul, emoji.
const RANGES: [(u32, u32); 9] = [
    (0x20, 0x7E),
    (0x20, 0x7E),
    (0x09, 0x0D),
    (0xA0, 0x24F),
    (0x370, 0x6FF),
    (0x900, 0xDFF),
    (0x2000, 0x206F),
    (0x4E00, 0x9FFF),
    (0x1F300, 0x1FAFF),
];

pub(super) struct Fast {
    pipeline: PipelineTokenizer,
    options: EncodeOptions,
}

impl Fast {
    /// Reads the vocabulary without its added tokens. The error is for the log.
    pub(super) fn new(json: &[u8]) -> Result<Self, String> {
        let mut value: Value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("added_tokens".to_owned(), Value::Array(Vec::new()));
            for unused in ["post_processor", "truncation", "padding"] {
                fields.insert(unused.to_owned(), Value::Null);
            }
        }
        tokenizers_fast::canonicalize_value(&mut value).map_err(|error| error.to_string())?;
        let text = value.to_string();
        let pipeline = tokenizers_fast::from_json(&text).map_err(|error| error.to_string())?;
        Ok(Self {
            pipeline,
            options: EncodeOptions {
                add_special_tokens: false,
                ..EncodeOptions::default()
            },
        })
    }

    /// Appends the tokens of a piece. `None` where it fails, or spells a control token; then nothing was appended.
    pub(super) fn encode(&self, piece: &str, table: &Table, ids: &mut Vec<TokenId>) -> Option<()> {
        if !piece.chars().all(is_settled) || longest_run(piece) > RUN_BYTES_MAX {
            return None;
        }
        let mut tokens: Vec<PipelineToken> = Vec::with_capacity(piece.len() / 3);
        let encoded = self.pipeline.encode_into(piece, &self.options, &mut tokens);
        encoded.ok()?;
        if tokens.iter().any(|token| table.is_control(token.id())) {
            return None;
        }
        ids.extend(tokens.iter().map(|token| token.id()));
        Some(())
    }
}

/// Whether all versions of Unicode say the same of the character. The two encoders know different ones, so that marks
/// of scripts that are new to one of them stand in another order for the other, and letters are none.
fn is_settled(char: char) -> bool {
    matches!(char, '\0'..='\u{2FF}' | '\u{2010}'..='\u{2027}')
}

/// The length of the longest run of white space, or of what is none.
fn longest_run(text: &str) -> usize {
    let (mut longest, mut start, mut is_space) = (0, 0, false);
    for (at, char) in text.char_indices() {
        if char.is_whitespace() != is_space {
            longest = longest.max(at - start);
            (start, is_space) = (at, !is_space);
        }
    }
    longest.max(text.len() - start)
}

/// Whether it gives, for pieces of all sorts, what the first encoder gives.
pub(super) fn agrees(tokenizer: &Tokenizer, fast: &Fast, texts: &[String]) -> bool {
    let mut random = SplitMix(0x6661_7374);
    let mut texts = texts.to_vec();
    for _ in 0..RANDOM_TEXTS {
        let length = 1 + random.next() % 60;
        let mut text = String::new();
        let mut range = RANGES[0];
        for _ in 0..length {
            if random.next().is_multiple_of(5) {
                range = RANGES[(random.next() % RANGES.len() as u64) as usize];
            }
            let (first, last) = range;
            let offset = random.next() % u64::from(last - first + 1);
            text.extend(char::from_u32(first + offset as u32));
        }
        texts.push(text);
    }
    let agrees = |text: &str, at_start| {
        let piece = Piece {
            text,
            offset: 0,
            at_start,
        };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        // What it leaves to the first encoder is right by itself.
        fast.encode(text, &tokenizer.table, &mut theirs).is_none()
            || tokenizer.try_piece(piece, &[], &mut ours).is_ok() && ours == theirs
    };
    // Words in all company, and what a cut may leave behind.
    let parts = texts.iter().flat_map(|text| text.split_inclusive('\n'));
    let mut parts = parts.chain(texts.iter().map(String::as_str));
    parts.all(|text| agrees(text, true) && agrees(text, false))
}
