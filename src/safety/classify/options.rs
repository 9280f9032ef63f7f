//! What may be set of a classifier.

use std::{ops::RangeInclusive, path::PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::hash_part;

/// The settings of a classifier. In the file: `[[safety.classifier]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierOptions {
    /// Names it in policies and verdicts: 1 to 32 of `a-z 0-9 - _`.
    pub name: String,
    /// What it is.
    pub kind: ClassifierKind,
    /// Where it is: of `moderation` and `guard` the API's base, such as `https://host/v1`; of `grpc` `http://host:port`, or
    /// `https://…` for TLS by the system's roots.
    pub url: String,
    /// What it calls its model. Needed for `guard`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model: String,
    /// Of `guard`: how its model answers.
    #[serde(default)]
    pub format: GuardFormat,
    /// Of `guard`: a file with what its model is told before the conversation, your policy as a rule. Relative to the file
    /// of settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions: Option<PathBuf>,
    /// The environment variable with the key that is sent as `authorization: Bearer …`. Empty: none is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key_variable: String,
    /// Text before the one to judge that is sent with it, in bytes, to 65,536.
    #[serde(default = "default::window_bytes")]
    pub window_bytes: usize,
    /// The longest text that is judged at once, in bytes, 256 to 1,048,576: longer items are judged in pieces.
    #[serde(default = "default::text_bytes_max")]
    pub text_bytes_max: usize,
    /// How much output is judged at once while it is sampled, in bytes, 64 to 65,536.
    #[serde(default = "default::output_bytes")]
    pub output_bytes: usize,
    /// How sure it must be for a finding, 0 to 1, where it tells. 0: what it flags by itself is one.
    #[serde(default)]
    pub score_min: f32,
    /// The categories that count. Empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<String>,
    /// How long an answer may take, all attempts included, in milliseconds, 10 to 60,000.
    #[serde(default = "default::deadline_ms")]
    pub deadline_ms: u64,
    /// How often it is asked, 1 to 10.
    #[serde(default = "default::attempts_max")]
    pub attempts_max: u32,
    /// What happens to a text that it could not judge.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// Failures in a row after which it is left alone for a while, 1 to 1,000.
    #[serde(default = "default::failures_max")]
    pub failures_max: u32,
    /// How long it is left alone the first time, in milliseconds; twice as long with each failure more.
    #[serde(default = "default::open_ms_min")]
    pub open_ms_min: u64,
    /// The longest that it is left alone, in milliseconds.
    #[serde(default = "default::open_ms_max")]
    pub open_ms_max: u64,
    /// Questions at once, 1 to 10,000. More wait, within their deadline.
    #[serde(default = "default::concurrent_max")]
    pub concurrent_max: usize,
    /// Answers that are kept, to 10,000,000.
    #[serde(default = "default::answers_max")]
    pub answers_max: u64,
}

mod default {
    pub(super) fn window_bytes() -> usize {
        2_048
    }
    pub(super) fn text_bytes_max() -> usize {
        16_384
    }
    pub(super) fn output_bytes() -> usize {
        800
    }
    pub(super) fn deadline_ms() -> u64 {
        1_000
    }
    pub(super) fn attempts_max() -> u32 {
        2
    }
    pub(super) fn failures_max() -> u32 {
        5
    }
    pub(super) fn open_ms_min() -> u64 {
        1_000
    }
    pub(super) fn open_ms_max() -> u64 {
        30_000
    }
    pub(super) fn concurrent_max() -> usize {
        64
    }
    pub(super) fn answers_max() -> u64 {
        10_000
    }
}

/// What a classifier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClassifierKind {
    /// The moderation endpoint of OpenAI's API: `POST /moderations`.
    Moderation,
    /// A guard model behind an OpenAI-compatible chat endpoint: `POST /chat/completions`.
    Guard,
    /// A service of `hotloop.safety.v1.ClassifierService`.
    Grpc,
}

/// How a guard model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuardFormat {
    /// As Llama Guard: `safe`, or `unsafe` and a line of categories.
    #[default]
    LlamaGuard,
    /// As Qwen3Guard: lines `Safety: …` and `Categories: …`.
    Qwen3Guard,
    /// A JSON object: `flagged`, and where it is true `categories`.
    Json,
}

/// What happens to a text that a classifier could not judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// It passes, and a verdict says so.
    #[default]
    Open,
    /// It does not, where the policy would act on a finding.
    Closed,
}

impl ClassifierOptions {
    /// Holds every value against its range.
    ///
    /// # Errors
    ///
    /// Which field is wrong, and what it may be.
    pub fn check(&self) -> Result<(), String> {
        let letters = |letter| matches!(letter, 'a'..='z' | '0'..='9' | '-' | '_');
        if self.name.is_empty() || self.name.len() > 32 || !self.name.chars().all(letters) {
            return Err("name is not 1 to 32 of a-z 0-9 - _".to_owned());
        }
        if !self.url.starts_with("http://") && !self.url.starts_with("https://") {
            return Err("url does not begin with http:// or https://".to_owned());
        }
        if self.kind == ClassifierKind::Guard && self.model.is_empty() {
            return Err("model is missing, which a guard needs".to_owned());
        }
        if self.kind != ClassifierKind::Guard && self.instructions.is_some() {
            return Err("instructions are for guard alone".to_owned());
        }
        if !(0.0..=1.0).contains(&self.score_min) {
            return Err("score_min is not from 0 to 1".to_owned());
        }
        let hour = 3_600_000;
        let ranges: [(&str, u64, RangeInclusive<u64>); 10] = [
            ("window_bytes", self.window_bytes as u64, 0..=65_536),
            ("text_bytes_max", self.text_bytes_max as u64, 256..=1 << 20),
            ("output_bytes", self.output_bytes as u64, 64..=65_536),
            ("deadline_ms", self.deadline_ms, 10..=60_000),
            ("attempts_max", self.attempts_max.into(), 1..=10),
            ("failures_max", self.failures_max.into(), 1..=1_000),
            ("open_ms_min", self.open_ms_min, 1..=hour),
            ("open_ms_max", self.open_ms_max, self.open_ms_min..=hour),
            ("concurrent_max", self.concurrent_max as u64, 1..=10_000),
            ("answers_max", self.answers_max, 0..=10_000_000),
        ];
        for (key, value, range) in ranges {
            if !range.contains(&value) {
                let (from, to) = range.into_inner();
                return Err(format!("{key} is not from {from} to {to}"));
            }
        }
        Ok(())
    }

    /// Names all that what it says about a question depends on.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| hash_part(&mut hash, bytes);
        part(b"classifier 1");
        part(&[self.kind as u8, self.format as u8, self.on_failure as u8]);
        part(&self.score_min.to_le_bytes());
        for number in [self.window_bytes, self.text_bytes_max, self.output_bytes] {
            part(&number.to_le_bytes());
        }
        for text in [&self.name, &self.url, &self.model] {
            part(text.as_bytes());
        }
        let instructions = self.instructions.as_ref();
        let path = instructions.map(|path| path.as_os_str().as_encoded_bytes());
        part(path.unwrap_or_default());
        for category in &self.categories {
            part(category.as_bytes());
        }
        hash.finalize().into()
    }
}
