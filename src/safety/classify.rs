//! Classifiers: models and services that judge texts, and are asked over a network.
//!
//! A classifier is asked about what is new, with a bounded window of what stands before it. An answer depends on nothing
//! else, so it is kept by exactly that, and the same question is not asked twice. What it cannot say within its deadline
//! is its failure, of which the policy of each classifier says whether the text passes.

mod grpc;
mod guard;
mod http;
mod moderation;
mod options;

use std::{fmt, ops::Range, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use moka::sync::Cache;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    backend::breaker::{Breaker, Outcome, Permit},
    event::Scope,
    item::Tenant,
};

pub use grpc::{Service, proto};
pub use guard::Guard;
pub use moderation::Moderation;
pub use options::{ClassifierKind, ClassifierOptions, GuardFormat, OnFailure};

/// Findings of one answer that are read.
const FINDINGS_MAX: usize = 100;

/// The longest name of a category, in bytes.
const CATEGORY_BYTES_MAX: usize = 64;

/// How long before a question is asked again; then twice as long with each.
const RETRY_REST: Duration = Duration::from_millis(25);

/// What cannot be said about a text.
const UNAVAILABLE: &str = "unavailable";

/// Asks one service.
pub trait Classify: fmt::Debug + Send + Sync + 'static {
    /// Has a text judged. It may be asked again after an error.
    ///
    /// # Errors
    ///
    /// What kept it from being judged.
    ///
    /// # Cancellation
    ///
    /// Safe: dropping it gives the question up.
    fn classify(&self, question: Arc<Question>) -> BoxFuture<'_, Result<Vec<Label>, Unjudged>>;
}

/// A text to judge, and what stands before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Whose conversation it is.
    pub tenant: Tenant,
    /// The model that it is with.
    pub model: Arc<str>,
    /// What stands before the text, oldest first.
    pub context: Vec<Passage>,
    /// The text.
    pub passage: Passage,
}

/// A part of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    /// Whose text it is.
    pub scope: Scope,
    /// The text.
    pub text: Arc<str>,
}

/// Something that a classifier says of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Label {
    /// What it found.
    pub category: Arc<str>,
    /// How sure it is, 0 to 1. `None`: it is.
    pub score: Option<f32>,
    /// Where, in bytes of the text. `None`: all of it.
    pub bytes: Option<Range<usize>>,
}

/// Why a text was not judged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unjudged {
    /// It could not be reached, or is asked too much. Asking again may help.
    #[error("{0}")]
    Failed(String),
    /// It does not take the question, or its answer cannot be read. Asking again does not help.
    #[error("{0}")]
    Refused(String),
}

/// A classifier as policies use it.
#[derive(Debug)]
pub struct Classifier {
    options: ClassifierOptions,
    service: Box<dyn Classify>,
    /// Names everything that an answer depends on but the question.
    fingerprint: [u8; 32],
    breaker: Mutex<Breaker>,
    asking: Semaphore,
    answers: Cache<[u8; 32], Arc<[Label]>>,
}

impl Classifier {
    /// A classifier with these settings that asks this service.
    #[must_use]
    pub fn new(options: ClassifierOptions, service: Box<dyn Classify>) -> Self {
        let fingerprint = options.fingerprint();
        let pauses =
            Duration::from_millis(options.open_ms_min)..=Duration::from_millis(options.open_ms_max);
        Self {
            fingerprint,
            breaker: Mutex::new(Breaker::new(options.failures_max, pauses)),
            asking: Semaphore::new(options.concurrent_max),
            answers: Cache::new(options.answers_max),
            service,
            options,
        }
    }

    /// The service that these settings name, asked with this key.
    ///
    /// # Errors
    ///
    /// Why it cannot be asked: the key of the settings that is wrong, and how.
    pub fn connect(options: ClassifierOptions, key: Option<&str>) -> Result<Self, String> {
        let service: Box<dyn Classify> = match options.kind {
            ClassifierKind::Moderation => Box::new(Moderation::new(&options, key)?),
            ClassifierKind::Guard => Box::new(Guard::new(&options, key)?),
            ClassifierKind::Grpc => Box::new(Service::new(&options, key)?),
        };
        Ok(Self::new(options, service))
    }

    /// Its settings.
    #[must_use]
    pub fn options(&self) -> &ClassifierOptions {
        &self.options
    }

    pub(super) fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// The id of what it says, as verdicts name it.
    pub(super) fn rule(&self, category: &str) -> Arc<str> {
        format!("{}.{category}", self.options.name).into()
    }

    /// The same where it could not be asked.
    pub(super) fn unavailable(&self) -> Arc<str> {
        self.rule(UNAVAILABLE)
    }

    /// What it finds in a text, within its deadline.
    ///
    /// # Errors
    ///
    /// Why it could not be asked.
    ///
    /// # Cancellation
    ///
    /// Safe: the question is given up.
    pub async fn judge(&self, question: Question) -> Result<Arc<[Label]>, Unjudged> {
        let key = self.key(&question);
        if let Some(known) = self.answers.get(&key) {
            return Ok(known);
        }
        let deadline = Instant::now() + Duration::from_millis(self.options.deadline_ms);
        let labels = self.ask(Arc::new(question), deadline).await;
        let labels = labels.inspect_err(|error| {
            let classifier = &*self.options.name;
            tracing::warn!(target: "hotloop::safety", classifier, %error, "a text was not judged");
        })?;
        let labels: Arc<[Label]> = self.keep(labels).into();
        self.answers.insert(key, labels.clone());
        Ok(labels)
    }

    /// Asks, and again while that may help.
    async fn ask(
        &self,
        question: Arc<Question>,
        deadline: Instant,
    ) -> Result<Vec<Label>, Unjudged> {
        let late = |_| {
            let millis = self.options.deadline_ms;
            Unjudged::Failed(format!("it said nothing within {millis} ms"))
        };
        let turn = timeout_at(deadline, self.asking.acquire()).await;
        let _turn = turn.map_err(late)?;
        let mut rest = RETRY_REST;
        let mut attempt = 1;
        loop {
            let trial = Trial::begin(&self.breaker)?;
            let said = timeout_at(deadline, self.service.classify(question.clone())).await;
            let error = match said.unwrap_or_else(|elapsed| Err(late(elapsed))) {
                Ok(labels) => {
                    trial.end(Outcome::Worked);
                    return Ok(labels);
                }
                Err(error) => error,
            };
            trial.end(match error {
                Unjudged::Failed(_) => Outcome::Failed,
                // It works: the question is at fault.
                Unjudged::Refused(_) => Outcome::Worked,
            });
            let again = Instant::now() + rest;
            let may_help = matches!(error, Unjudged::Failed(_)) && again < deadline;
            if attempt == self.options.attempts_max || !may_help {
                return Err(error);
            }
            sleep_until(again).await;
            attempt += 1;
            rest *= 2;
        }
    }

    /// Those that count, with names that verdicts may have.
    fn keep(&self, labels: Vec<Label>) -> Vec<Label> {
        let options = &self.options;
        let sure = |label: &Label| label.score.is_none_or(|score| score >= options.score_min);
        let wanted = |label: &Label| {
            options.categories.is_empty()
                || options.categories.iter().any(|it| **it == *label.category)
        };
        let labels = labels.into_iter().take(FINDINGS_MAX).map(|label| Label {
            category: category(&label.category),
            ..label
        });
        labels.filter(|it| sure(it) && wanted(it)).collect()
    }

    /// Exactly what an answer depends on. Tenants share none.
    fn key(&self, question: &Question) -> [u8; 32] {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| hash_part(&mut hash, bytes);
        part(question.tenant.as_str().as_bytes());
        part(question.model.as_bytes());
        for passage in question.context.iter().chain([&question.passage]) {
            part(&[passage.scope as u8]);
            part(passage.text.as_bytes());
        }
        hash.finalize().into()
    }
}

/// One attempt: the breaker hears of its end, also where it is given up.
struct Trial<'a> {
    breaker: &'a Mutex<Breaker>,
    permit: Permit,
    outcome: Outcome,
}

impl<'a> Trial<'a> {
    fn begin(breaker: &'a Mutex<Breaker>) -> Result<Self, Unjudged> {
        let permit = breaker.lock().admit(Instant::now());
        let permit = permit.ok_or_else(|| {
            Unjudged::Refused("it failed too often, and is left alone for a while".to_owned())
        })?;
        // Who gives it up says nothing about it.
        let outcome = Outcome::Unknown;
        Ok(Self {
            breaker,
            permit,
            outcome,
        })
    }

    fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        let (now, jitter) = (Instant::now(), rand::random());
        self.breaker
            .lock()
            .settle(self.permit, self.outcome, now, jitter);
    }
}

/// Hashes a part so that what stands in it cannot pass for the next one.
fn hash_part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// A category as it stands in verdicts.
fn category(name: &str) -> Arc<str> {
    let letter = |letter: char| match letter {
        'a'..='z' | '0'..='9' | '.' | '-' | '_' | '/' => letter,
        'A'..='Z' => letter.to_ascii_lowercase(),
        _ => '_',
    };
    let name: String = name
        .trim()
        .chars()
        .take(CATEGORY_BYTES_MAX)
        .map(letter)
        .collect();
    match name.is_empty() {
        true => "unnamed".into(),
        false => name.into(),
    }
}
