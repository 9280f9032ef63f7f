//! Trains the tokenizer of the simulated model: `models/sim/tokenizer.json`.
//!
//! ```text
//! cargo run --example make_sim_tokenizer -- FOLDER
//! ```
//!
//! It reads all Markdown, Rust, protobuf and TOML files below the folder, in the order of their
//! paths, and trains a small byte-level vocabulary in Qwen's style on them. The same files give
//! the same bytes.

#[path = "../tests/support/vocab.rs"]
mod vocab;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use hotloop::tokenizer::Tokenizer;

const OUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/sim/tokenizer.json");
const EXTENSIONS: [&str; 4] = ["md", "rs", "proto", "toml"];
/// All tokens, the nine added ones included.
const VOCAB_SIZE: usize = 4_096;
const ADDED_TOKENS: usize = 9;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("which folder?")?;
    let mut files = Vec::new();
    collect(Path::new(&folder), &mut files)?;
    files.sort();
    let texts = files
        .iter()
        .map(fs::read_to_string)
        .collect::<Result<Vec<_>, _>>()?;
    let mut corpus: Vec<&str> = texts.iter().map(String::as_str).collect();
    corpus.push(vocab::CORPUS);

    let json = vocab::qwen_over(&corpus, VOCAB_SIZE - ADDED_TOKENS);
    let tokenizer = Tokenizer::from_json(&json)?;
    if tokenizer.vocab_size() != VOCAB_SIZE {
        let size = tokenizer.vocab_size();
        return Err(format!("too little text: only {size} of {VOCAB_SIZE} tokens").into());
    }
    fs::write(OUT, &json)?;
    println!("{OUT}: {} bytes from {} files", json.len(), files.len());
    Ok(())
}

/// Finds the files below `folder`; what is built or hidden is not text of ours.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || name == "target" {
            continue;
        }
        if path.is_dir() {
            collect(&path, files)?;
        } else if path
            .extension()
            .is_some_and(|extension| EXTENSIONS.iter().any(|&known| extension == known))
        {
            files.push(path);
        }
    }
    Ok(())
}
