//! Text of a given number of tokens, such as a tool gives back: code, paths and prose.

use hotloop::{
    files::{BuiltIn, Files},
    model::Artifacts,
    tokenizer::Encoded,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

const WORDS: [&str; 48] = [
    "the", "file", "returns", "value", "error", "token", "stream", "buffer", "let", "match", "fn",
    "struct", "self", "state", "request", "response", "ledger", "prompt", "render", "sample", "of",
    "in", "to", "and", "is", "not", "test", "passed", "failed", "line", "src", "main", "config",
    "server", "client", "index", "length", "bytes", "cache", "history", "step", "model", "tool",
    "call", "output", "thread", "lock", "queue",
];
const MARKS: [&str; 12] = [
    ".\n", ";\n", "(", ") ", "::", " = ", ", ", "_", ": ", " {\n    ", "}\n", "/",
];

/// Makes text, the same for the same seed.
pub struct Texts {
    artifacts: Artifacts,
    rng: StdRng,
}

impl Texts {
    pub fn new(seed: u64) -> Self {
        Self {
            artifacts: Artifacts::load(&Files::BuiltIn(BuiltIn::SimAgent), None).unwrap(),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// How many tokens the text has on its own.
    pub fn tokens(&self, text: &str) -> usize {
        let mut encoded = Encoded::default();
        let tokenizer = &self.artifacts.tokenizer;
        tokenizer.encode(text, false, &[], &mut encoded);
        encoded.ids.len()
    }

    /// Text of about so many tokens, within a few in a hundred.
    pub fn of(&mut self, tokens: usize) -> String {
        let mut text = String::new();
        let mut count = 0;
        while count < tokens {
            let mut piece = String::new();
            for _ in 0..(tokens - count).min(64) {
                piece += WORDS.choose(&mut self.rng).unwrap();
                piece += match self.rng.random_range(0..10) {
                    0..6 => " ",
                    _ => MARKS.choose(&mut self.rng).unwrap(),
                };
                if self.rng.random_range(0..12) == 0 {
                    piece += &self.rng.random_range(0..10_000).to_string();
                }
            }
            let here = self.tokens(&piece);
            // The last piece is cut where it has its share.
            let share = ((tokens - count) as f64 / here as f64).min(1.0);
            let cut = piece.floor_char_boundary((piece.len() as f64 * share) as usize);
            text += &piece[..cut.max(1)];
            count += here.min(tokens - count).max(1);
        }
        text
    }
}
