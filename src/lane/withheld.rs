//! Events that wait for what classifiers say.
//!
//! ```text
//!   events ──▶ tail ── a piece is asked about ──▶ segment ─ … ─ segment ── its verdict is in ──▶ client
//!                                                (newest)       (oldest)
//! ```
//!
//! A segment holds the events that leave when one verdict is in. They leave in order, so the oldest verdict is waited for.
//! What waits is bounded by the driver, which samples no more while it is [`Withheld::full`].

use std::{collections::VecDeque, sync::Arc};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, join_all},
};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    event::{Event, Verdict},
    item::RequestId,
    response::{Before, Began},
    safety::{self, Inquiry, Judgement, Policy, judge, split},
};

/// Events of one command, with how many tokens had been sampled by then.
pub(super) struct Told {
    pub(super) request_id: RequestId,
    pub(super) events: Vec<Event>,
    pub(super) sampled: u64,
}

/// What a verdict is waited for about.
pub(super) enum About {
    /// Input: where it does not pass, the response does not exist.
    Input,
    /// Input of appends that is presumed to pass: where it does not, the response stands as before them.
    Presumed(Box<Before>),
    /// Output from there on: where it does not pass, the sample ends there.
    Output(Began),
}

/// What is said of something, when it is known. The questions are given up with the last that waits.
pub(super) type Answer = Shared<BoxFuture<'static, Arc<Judgement>>>;

struct Segment {
    verdict: Answer,
    about: About,
    told: Vec<Told>,
    bytes: usize,
}

/// The events that wait, and the verdicts that are only told.
#[derive(Default)]
pub(super) struct Withheld {
    segments: VecDeque<Segment>,
    /// Output that no classifier was asked about yet.
    tail: Vec<Told>,
    tail_bytes: usize,
    observing: JoinSet<Vec<Verdict>>,
}

/// What the oldest verdict was about, what it says, and what waited for it.
pub(super) struct Judged {
    pub(super) about: About,
    pub(super) judgement: Arc<Judgement>,
    pub(super) told: Vec<Told>,
}

/// What is said of all of these together.
pub(super) fn all(verdicts: Vec<Answer>) -> Answer {
    let all = join_all(verdicts).map(|verdicts| {
        let refusal = verdicts.iter().find_map(|it| it.refusal.clone());
        let verdicts = verdicts.iter().flat_map(|it| it.verdicts.clone());
        Arc::new(Judgement {
            verdicts: verdicts.collect(),
            refusal,
        })
    });
    all.boxed().shared()
}

impl Withheld {
    /// Asks. What is only observed is told when it is known, or, where the response has ended by then, logged alone.
    pub(super) fn ask(&mut self, inquiries: Vec<Inquiry>, policy: &Policy) -> Option<Answer> {
        let (waited_for, observed) = split(inquiries);
        if !observed.is_empty() {
            let judged = judge(observed, policy.version().clone());
            self.observing.spawn(async {
                let verdicts = judged.await.verdicts;
                verdicts.iter().for_each(safety::log);
                verdicts
            });
        }
        (!waited_for.is_empty()).then(|| {
            let judged = tokio::spawn(judge(waited_for, policy.version().clone()));
            let judged = AbortOnDropHandle::new(judged);
            // A task that broke is a fault of ours, and lets nothing pass.
            let judged = judged.map(|it| Arc::new(it.unwrap_or_else(|_| Judgement::failed())));
            judged.boxed().shared()
        })
    }

    /// What is observed and known by now.
    pub(super) fn observed(&mut self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        while let Some(known) = self.observing.try_join_next() {
            verdicts.extend(known.unwrap_or_default());
        }
        verdicts
    }

    /// Whether nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.segments.is_empty() && self.tail.is_empty()
    }

    /// Whether as much waits as may.
    pub(super) fn full(&self, bytes_max: usize) -> bool {
        let waiting: usize = self.segments.iter().map(|it| it.bytes).sum();
        waiting + self.tail_bytes >= bytes_max && !self.segments.is_empty()
    }

    /// What comes now waits, for what is asked next where it is `unasked`, else for the newest verdict.
    pub(super) fn push(&mut self, told: Told, unasked: bool) {
        let bytes: usize = told.events.iter().map(text_bytes).sum();
        match self.segments.back_mut() {
            Some(last) if !unasked && self.tail.is_empty() => {
                last.told.push(told);
                last.bytes += bytes;
            }
            Some(_) | None => {
                self.tail.push(told);
                self.tail_bytes += bytes;
            }
        }
    }

    /// All that came since waits for this verdict.
    pub(super) fn wait_for(&mut self, verdict: Answer, about: About) {
        self.segments.push_back(Segment {
            verdict,
            about,
            told: std::mem::take(&mut self.tail),
            bytes: std::mem::take(&mut self.tail_bytes),
        });
    }

    /// Nothing is asked about what came since: it waits for the newest verdict, or, returned, for none.
    pub(super) fn let_go(&mut self) -> Vec<Told> {
        let told = std::mem::take(&mut self.tail);
        let bytes = std::mem::take(&mut self.tail_bytes);
        match self.segments.back_mut() {
            Some(last) => {
                last.told.extend(told);
                last.bytes += bytes;
                Vec::new()
            }
            None => told,
        }
    }

    /// The oldest verdict. Never where none is waited for.
    ///
    /// # Cancellation
    ///
    /// Safe: it is waited for again.
    pub(super) async fn judged(&mut self) -> Judged {
        let Some(oldest) = self.segments.front_mut() else {
            return std::future::pending().await;
        };
        let judgement = (&mut oldest.verdict).await;
        match self.segments.pop_front() {
            Some(Segment { about, told, .. }) => Judged {
                about,
                judgement,
                told,
            },
            None => std::future::pending().await,
        }
    }

    /// How the response stood before input that is presumed to pass. Nothing is waited for any more then.
    pub(super) fn presumed(&mut self) -> Option<Box<Before>> {
        match self.segments.front()?.about {
            About::Presumed(_) => {}
            About::Input | About::Output(_) => return None,
        }
        match self.give_up() {
            Some(About::Presumed(before)) => Some(before),
            Some(About::Input | About::Output(_)) | None => None,
        }
    }

    /// The oldest thing that a verdict is waited for about; nothing is waited for any more, and what waited is dropped.
    pub(super) fn give_up(&mut self) -> Option<About> {
        let oldest = self.segments.pop_front();
        self.segments.clear();
        self.tail.clear();
        self.tail_bytes = 0;
        oldest.map(|it| it.about)
    }
}

impl Drop for Withheld {
    fn drop(&mut self) {
        // What is observed late still stands in the log.
        self.observing.detach_all();
    }
}

/// What of an event is text of a model.
fn text_bytes(event: &Event) -> usize {
    match event {
        Event::Delta { delta, .. } => delta.len(),
        Event::OutputItemDone { item, .. } => item.text_bytes(),
        Event::Created { .. }
        | Event::Appended { .. }
        | Event::OutputItemAdded { .. }
        | Event::Verdict(_)
        | Event::Done(_)
        | Event::Error(_)
        | Event::GoAway { .. } => 0,
    }
}
