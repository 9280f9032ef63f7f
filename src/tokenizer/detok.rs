//! From tokens back to text: one flat table of bytes, and a state of at most three held bytes.

use std::sync::{Arc, LazyLock};

use tokenizers::Tokenizer as HfTokenizer;

use super::{AddedToken, TokenId, TokenizerError};

/// The bytes of every token, end to end.
#[derive(Debug)]
pub(super) struct Table {
    blob: Vec<u8>,
    /// `offsets[id]..offsets[id + 1]` is the token's place in `blob`; one entry more than tokens.
    offsets: Vec<u32>,
    /// Which tokens leave the stream as [`DetokPiece::Special`].
    control: Vec<bool>,
}

impl Table {
    /// Lays out the bytes of `size` tokens.
    pub(super) fn build(
        hf: &HfTokenizer,
        spelling: &Spelling,
        added: &[AddedToken],
        size: usize,
    ) -> Result<Self, TokenizerError> {
        let mut table = Self {
            blob: Vec::with_capacity(size * 8),
            offsets: Vec::with_capacity(size + 1),
            control: vec![false; size],
        };
        table.offsets.push(0);
        let mut added = added.iter().peekable();
        for id in 0..size as TokenId {
            if let Some(token) = added.next_if(|token| token.id == id) {
                table.control[id as usize] = token.control;
                if token.control {
                    table.blob.extend_from_slice(token.content.as_bytes());
                } else {
                    table.blob.extend(spelling.bytes_of_added(&token.content));
                }
            } else if let Some(token) = hf.id_to_token(id) {
                spelling.append_bytes(&token, &mut table.blob);
            }
            let end = u32::try_from(table.blob.len()).map_err(|_| TokenizerError::TooLarge)?;
            table.offsets.push(end);
        }
        Ok(table)
    }

    /// The token's bytes; nothing for an id without a token.
    pub(super) fn bytes_of(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        match (self.offsets.get(id), self.offsets.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.blob[start as usize..end as usize],
            _ => &[],
        }
    }

    pub(super) fn is_control(&self, id: TokenId) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.control.len()
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.blob.capacity() + 4 * self.offsets.capacity() + self.control.capacity()
    }
}

/// How a vocabulary writes bytes as token strings, read off the tokenizer's decoder.
pub(super) enum Spelling {
    /// GPT-2's alphabet: one printable character for each byte.
    ByteLevel,
    /// SentencePiece: text as it is, with stand-ins for the space and perhaps `<0xE6>` for bytes.
    Pieces {
        /// (stand-in, what it stands for), applied in order within a token.
        replacements: Vec<(String, String)>,
        byte_fallback: bool,
    },
}

impl Spelling {
    pub(super) fn of(hf: &HfTokenizer) -> Result<Self, TokenizerError> {
        let refused = |kind: &str| TokenizerError::Decoder {
            kind: kind.to_owned(),
        };
        let decoder = hf.get_decoder().ok_or_else(|| refused("none"))?;
        let json = serde_json::to_value(decoder).map_err(|_| refused("unreadable"))?;
        let mut steps = Vec::new();
        flatten(&json, &mut steps);

        let mut byte_level = false;
        let mut byte_fallback = false;
        let mut fused = false;
        let mut replacements = Vec::new();
        for step in steps {
            let kind = step["type"].as_str().unwrap_or("unnamed");
            match kind {
                "ByteLevel" => byte_level = true,
                "ByteFallback" => byte_fallback = true,
                "Fuse" => fused = true,
                // Before `Fuse` a replacement sees one token at a time, as the table does.
                "Replace" if !fused => {
                    let from = step["pattern"]["String"].as_str();
                    let to = step["content"].as_str();
                    let pair = from
                        .zip(to)
                        .ok_or_else(|| refused("Replace with a regex"))?;
                    replacements.push((pair.0.to_owned(), pair.1.to_owned()));
                }
                "Metaspace" if !fused => {
                    let from = step["replacement"].as_str();
                    let from = from.ok_or_else(|| refused("Metaspace without a replacement"))?;
                    replacements.push((from.to_owned(), " ".to_owned()));
                }
                // After `Fuse` it takes spaces off the start of the whole text; ours is never that.
                "Strip" if fused && step["stop"] == 0 => {}
                other => return Err(refused(other)),
            }
        }
        match (byte_level, byte_fallback || !replacements.is_empty()) {
            (true, false) => Ok(Self::ByteLevel),
            (true, true) => Err(refused("ByteLevel mixed with others")),
            (false, _) => Ok(Self::Pieces {
                replacements,
                byte_fallback,
            }),
        }
    }

    /// What an added token reads as where it is text like any other. Byte-level vocabularies write
    /// these as they are; pieces stand in for spaces and bytes here, too.
    pub(super) fn bytes_of_added(&self, content: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => content.as_bytes().to_vec(),
            Self::Pieces { .. } => {
                let mut bytes = Vec::new();
                self.append_bytes(content, &mut bytes);
                bytes
            }
        }
    }

    fn append_bytes(&self, token: &str, blob: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = blob.len();
                for character in token.chars() {
                    let Some(&byte) = BYTE_OF.get(character as usize).and_then(Option::as_ref)
                    else {
                        // One foreign character and the whole token stands for itself.
                        blob.truncate(start);
                        blob.extend_from_slice(token.as_bytes());
                        return;
                    };
                    blob.push(byte);
                }
            }
            Self::Pieces {
                replacements,
                byte_fallback,
            } => {
                if *byte_fallback && let Some(byte) = byte_token(token) {
                    blob.push(byte);
                    return;
                }
                let mut text = token.to_owned();
                for (from, to) in replacements {
                    text = text.replace(from, to);
                }
                blob.extend_from_slice(text.as_bytes());
            }
        }
    }
}

fn flatten<'a>(decoder: &'a serde_json::Value, steps: &mut Vec<&'a serde_json::Value>) {
    match (decoder["type"].as_str(), decoder["decoders"].as_array()) {
        (Some("Sequence"), Some(inner)) => inner.iter().for_each(|step| flatten(step, steps)),
        _ => steps.push(decoder),
    }
}

/// The byte that a token such as `<0xE6>` stands for.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// GPT-2's alphabet, from character to byte. Bytes that print stand for themselves, the others are
/// numbered upwards from U+0100 in their own order.
static BYTE_OF: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=255_u8 {
        let prints = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let character = if prints { usize::from(byte) } else { next };
        next += usize::from(!prints);
        table[character] = Some(byte);
    }
    table
});

/// Whether `content` would be read as bytes by the byte-level decoder although it is not ASCII.
pub(super) fn reads_as_bytes(content: &str) -> bool {
    !content.is_ascii()
        && content
            .chars()
            .all(|character| matches!(BYTE_OF.get(character as usize), Some(Some(_))))
}

/// A piece of what a model writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetokPiece<'a> {
    /// Text that has become valid UTF-8; never empty.
    Text(&'a str),
    /// One whole added token, by its content. Whether readers may see it is not decided here:
    /// [`Tokenizer::is_special`](super::Tokenizer::is_special) tells control from markup.
    /// Added tokens of white space or of one character arrive as text.
    Special(&'a str),
}

/// What one token adds, in order: at most some text, then at most one added token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces<'a> {
    text: &'a str,
    special: Option<&'a str>,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = DetokPiece<'a>;

    fn next(&mut self) -> Option<DetokPiece<'a>> {
        if !self.text.is_empty() {
            return Some(DetokPiece::Text(std::mem::take(&mut self.text)));
        }
        self.special.take().map(DetokPiece::Special)
    }
}

/// The state of one stream of tokens on its way to text.
///
/// All text that comes out, end to end, is `String::from_utf8_lossy` of all bytes that went in.
/// At most three bytes are held back, those of a character that is not complete yet. A
/// SentencePiece vocabulary keeps the space that begins the first word: a response continues a
/// prompt, it does not begin a text.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    table: Arc<Table>,
    /// The bytes of an incomplete character.
    held: Vec<u8>,
    /// What the last push made valid.
    text: String,
}

impl Detokenizer {
    pub(super) fn new(table: Arc<Table>) -> Self {
        Self {
            table,
            held: Vec::new(),
            text: String::new(),
        }
    }

    /// Takes the next token. An added token ends a character that was incomplete before it, which
    /// then reads U+FFFD. An id without a token adds nothing.
    pub fn push(&mut self, id: TokenId) -> Pieces<'_> {
        self.text.clear();
        let bytes = self.table.bytes_of(id);
        if self.table.is_control(id) {
            if !self.held.is_empty() {
                self.held.clear();
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
            return Pieces {
                text: &self.text,
                special: std::str::from_utf8(bytes).ok(),
            };
        }
        if self.held.is_empty() {
            let tail = append_valid(bytes, &mut self.text);
            self.held.extend_from_slice(tail);
        } else {
            self.held.extend_from_slice(bytes);
            let tail = append_valid(&self.held, &mut self.text).len();
            self.held.drain(..self.held.len() - tail);
        }
        Pieces {
            text: &self.text,
            special: None,
        }
    }

    /// Whether no character is incomplete.
    pub fn is_whole(&self) -> bool {
        self.held.is_empty()
    }

    /// Ends the stream: U+FFFD where a character remained incomplete, nothing otherwise.
    pub fn finish(self) -> &'static str {
        if self.held.is_empty() { "" } else { "\u{FFFD}" }
    }
}

/// Appends to `text` what is decided about `bytes`, and returns the incomplete character at their
/// end. Each sequence that can never become valid reads U+FFFD.
fn append_valid<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    loop {
        let error = match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        text.push_str(std::str::from_utf8(valid).unwrap_or_default());
        let Some(invalid) = error.error_len() else {
            return rest;
        };
        text.push(char::REPLACEMENT_CHARACTER);
        bytes = &rest[invalid..];
    }
}
