//! A client of the sync core: creates, rounds and commits, without a runtime or a network.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _};
use hotloop::{
    backend::Chunk,
    event::{Done, Error, Event, Status, Timing},
    item::{Body, Item, Part, ResponseId, Role, Tenant},
    ledger::Rope,
    model::Model,
    render::Heads,
    request::{Create, NewItem, Past, Settings},
    response::{Begin, Open},
    safety,
    session::{Committed, Held, ParkedLimits, Sessions},
};

/// The date on which all conversations begin.
pub const DATE: jiff::civil::Date = jiff::civil::date(2026, 11, 3);

/// One stream of one tenant, and what the process holds for it.
pub struct Client {
    pub held: Held,
    pub heads: Arc<Heads>,
}

/// A create, as a test writes it.
#[derive(Default)]
pub struct Ask {
    pub input: Vec<NewItem>,
    pub settings: Settings,
    pub reset: Vec<String>,
    pub hold: bool,
    pub prepare_only: bool,
}

impl Default for Client {
    fn default() -> Self {
        let sessions = Sessions::new(ParkedLimits {
            bytes_max: 1 << 20,
            tenant_bytes_max: 1 << 20,
            time_max: Duration::from_secs(60),
        });
        Self {
            held: Held::new(sessions, Tenant::from("tenant"), 100_000),
            heads: Arc::new(Heads::new(1 << 24)),
        }
    }
}

impl Client {
    /// Another stream of the same tenant at the same server.
    pub fn another(&self) -> Self {
        Self {
            heads: self.heads.clone(),
            ..Self::default()
        }
    }

    /// Validates and renders a create, as a lane does when its turn has come.
    pub fn create(
        &self,
        model: &Arc<Model>,
        parent: Option<&Arc<Committed>>,
        ask: Ask,
    ) -> Result<Open, Error> {
        let settings = Arc::new(match parent {
            None => ask.settings,
            Some(parent) => ask.settings.inherit(&parent.settings, &ask.reset),
        });
        let past = Past {
            open_calls: parent.map_or(&[], |parent| &parent.open_calls),
            exists: parent.is_some(),
            find_item: &|id| self.held.find_item(id),
        };
        let valid = Create::validate(
            ask.input,
            settings,
            ask.prepare_only,
            &past,
            &model.abilities(),
        )?;
        let begin = Begin {
            policy: None,
            recheck: safety::Recheck::default(),
            id: ResponseId::new(),
            tenant: self.held.tenant().clone(),
            model: model.clone(),
            settings: valid.settings,
            parent: parent.cloned(),
            today: DATE,
            input: safety::clear(valid.input, None, &safety::Names::default())?,
            open_calls: valid.open_calls,
            created_at_ms: 0,
            metadata: BTreeMap::new(),
            include_output: false,
            hold: ask.hold,
            no_deltas: false,
        };
        Open::begin(begin, &self.heads, ask.prepare_only)
    }
}

/// The answer of the model's backend to the prompt that the response begins a round with.
pub fn answer(open: &mut Open) -> Vec<Chunk> {
    let prompt = open.begin_round();
    let mut stream = open.model().backend.sample(prompt);
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.next().now_or_never().expect("it is all there") {
        chunks.push(chunk.expect("an answer is queued"));
    }
    chunks
}

/// The last report of a response.
pub fn done(open: &Open) -> Done {
    match open.done(Status::Completed, Timing::default(), Vec::new()) {
        Event::Done(done) => *done,
        other => panic!("{other:?} is no done"),
    }
}

/// The text of a rope.
pub fn text_of(rope: &Rope) -> String {
    rope.slices().iter().map(|slice| slice.text).collect()
}

/// A message.
pub fn message(role: Role, text: &str) -> Item {
    Item::new(Body::Message {
        role,
        parts: vec![Part::InputText(text.into())],
    })
}

/// The output of a call.
pub fn output(call_id: &str, text: &str) -> Item {
    Item::new(Body::FunctionCallOutput {
        call_id: call_id.into(),
        output: text.into(),
    })
}
