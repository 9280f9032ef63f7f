//! What a rendering depended on, so that the next one can begin where the conversation has grown.
//!
//! A template that [`loops`](super::loops) has rewritten tells the trace when a loop over the conversation begins, and
//! when each of its rounds does. The trace sees which messages are looked at, and notes a round as *open* where
//! it asked what may be otherwise once more messages stand behind: how many there are, whether this is the last one,
//! or one that was not there. All rounds before the first open one print the same when messages are added, provided
//! that the loop is entered with the same variables, and that what was printed before it is the same: both are compared.
//! So the next rendering runs the template up to the loop, goes on with the first open round, and leaves out those between.

use std::fmt;
use std::io;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use parking_lot::Mutex;

use super::{CallForm, Messages, Record, Rendered};

/// Room for what a step usually adds behind the head.
const STEP_BYTES: usize = 16 * 1024;

/// How much of a list or a mapping is kept to be compared.
const KEPT_ITEMS_MAX: usize = 64;
const KEPT_DEPTH_MAX: usize = 8;

/// Where a later rendering of the same conversation may go on: a `place` for
/// [`Template::render_on`](super::Template::render_on).
#[derive(Clone, Debug)]
pub struct Place {
    /// The loop.
    id: usize,
    /// The message that its first round is for.
    start: usize,
    /// The round to go on with.
    round: usize,
    /// What was printed before the loop.
    head: Arc<str>,
    /// The variables at its beginning.
    variables: Arc<Kept>,
    /// The state of namespaces at the beginning of the round.
    carried: Arc<[Value]>,
}

/// A rendering while it runs.
pub(super) struct Trace {
    messages: Arc<dyn Messages>,
    form: CallForm,
    state: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    text: Vec<u8>,
    /// Where to go on, if all is as it was.
    place: Option<Place>,
    followed: Option<Followed>,
    /// Loops over the conversation besides the one that is followed.
    others: Vec<Other>,
}

/// The loop that is followed: the first one over the conversation.
struct Followed {
    id: usize,
    start: usize,
    items: Items,
    variables: Option<Arc<Kept>>,
    /// The text before it.
    head: Arc<str>,
    /// The first round that is run; of this and each after it, where its text begins and the state before it.
    first: usize,
    rounds: Vec<(usize, Arc<[Value]>)>,
    open: Option<usize>,
}

struct Other {
    id: usize,
    items: Items,
    next: usize,
}

impl Trace {
    pub(super) fn new(
        messages: Arc<dyn Messages>,
        form: CallForm,
        place: Option<Place>,
    ) -> Arc<Self> {
        let head = place.as_ref().map_or(0, |place| place.head.len());
        Arc::new(Self {
            messages,
            form,
            state: Mutex::new(Progress {
                text: Vec::with_capacity(head + STEP_BYTES),
                place,
                ..Progress::default()
            }),
        })
    }

    /// The conversation, as the template gets it.
    pub(super) fn conversation(self: &Arc<Self>) -> Value {
        Value::from_object(View {
            trace: Arc::clone(self),
            start: 0,
        })
    }

    /// What the template prints to.
    pub(super) fn sheet(self: &Arc<Self>) -> Sheet {
        Sheet(Arc::clone(self))
    }

    /// What was printed, without the rounds that were left out, and where to go on next time. To be asked for after a
    /// failure too: it takes apart what holds itself.
    pub(super) fn finish(&self) -> Rendered {
        let progress = std::mem::take(&mut *self.state.lock());
        // The template and its values are texts, so that this changes nothing.
        let mut text = String::from_utf8(progress.text)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        let Some(followed) = progress.followed else {
            return Rendered::whole(text);
        };
        // The last round is always run again: nothing tells where the text of the one after it would begin.
        let round = followed
            .open
            .unwrap_or(usize::MAX)
            .min(followed.items.len().saturating_sub(1));
        let place = round
            .checked_sub(followed.first)
            .and_then(|at| followed.rounds.get(at));
        let resumed = followed.first > 0;
        let left_out = if resumed { followed.head.len() } else { 0 };
        text.drain(..left_out);
        let Some(((at, carried), variables)) = place.zip(followed.variables) else {
            return Rendered {
                resumed,
                ..Rendered::whole(text)
            };
        };
        let tail = text.split_off(at - left_out);
        Rendered {
            parts: [text, tail],
            resumed,
            next: Some(Place {
                id: followed.id,
                start: followed.start,
                round,
                head: followed.head,
                variables,
                carried: Arc::clone(carried),
            }),
        }
    }

    fn message(&self, at: usize) -> Option<Value> {
        self.messages
            .get(at)
            .map(|message| message.value(self.form))
    }

    /// The round that runs asks what more messages may change.
    fn leave_open(&self) {
        if let Some(followed) = &mut self.state.lock().followed
            && let Some(round) = followed.rounds.len().checked_sub(1)
        {
            followed.open.get_or_insert(followed.first + round);
        }
    }

    /// A loop over the conversation begins: what it goes over.
    fn begin(&self, id: usize, over: &Value, variables: &Value) -> Result<Value, Error> {
        // Before the lock: looking at values may ask the conversation, which takes it too.
        let variables = Kept::new(variables, KEPT_DEPTH_MAX);
        let items = match over.downcast_object::<View>() {
            Some(view) => Items::View(view),
            None => Items::List(over.try_iter()?.collect()),
        };
        let mut progress = self.state.lock();
        if let Items::View(view) = &items
            && progress.followed.is_none()
        {
            let place = progress.place.take().filter(|place| {
                (place.id, place.start) == (id, view.start)
                    && place.round < view.len()
                    && variables.as_ref() == Some(&*place.variables)
                    && place.head.as_bytes() == progress.text
            });
            let first = place.as_ref().map_or(0, |place| place.round);
            // What is as it was is kept once.
            let (head, variables) = match &place {
                Some(place) => (Arc::clone(&place.head), Some(Arc::clone(&place.variables))),
                None => (
                    String::from_utf8_lossy(&progress.text).into(),
                    variables.map(Arc::new),
                ),
            };
            progress.followed = Some(Followed {
                id,
                start: view.start,
                items: items.clone(),
                variables,
                head,
                first,
                rounds: Vec::new(),
                open: None,
            });
            progress.place = place;
            drop(progress);
            return Ok(items.from(first));
        }
        progress.others.push(Other {
            id,
            items: items.clone(),
            next: 0,
        });
        drop(progress);
        Ok(items.from(0))
    }

    /// A round of it begins: what stands in for its `loop`.
    fn enter(&self, id: usize, carried: &Value) -> Result<Value, Error> {
        let carried: Arc<[Value]> = carried.try_iter()?.collect();
        // Only what stands for itself can be carried over to another rendering.
        let free =
            |value: &Value| Kept::new(value, KEPT_DEPTH_MAX).is_some_and(|kept| kept.is_free());
        let all_free = carried.iter().all(free);
        let mut progress = self.state.lock();
        let progress = &mut *progress;
        if let Some(followed) = progress
            .followed
            .as_mut()
            .filter(|followed| followed.id == id)
        {
            // What the first round begins with was kept, if it is not the first of all.
            let place = progress.place.take();
            let resumed = place.is_some();
            let carried = place.map_or(carried, |place| place.carried);
            if !resumed && !all_free {
                followed.variables = None;
            }
            followed
                .rounds
                .push((progress.text.len(), Arc::clone(&carried)));
            return Ok(Value::from_object(Round {
                items: followed.items.clone(),
                at: followed.first + followed.rounds.len() - 1,
                resumed,
                carried,
            }));
        }
        let Some(other) = progress.others.iter_mut().find(|other| other.id == id) else {
            return Err(Error::from(ErrorKind::InvalidOperation));
        };
        other.next += 1;
        Ok(Value::from_object(Round {
            items: other.items.clone(),
            at: other.next - 1,
            resumed: false,
            carried,
        }))
    }

    fn from(self: &Arc<Self>, over: &Value, start: usize) -> Result<Value, Error> {
        if let Some(view) = over.downcast_object_ref::<View>() {
            return Ok(Value::from_object(View {
                trace: Arc::clone(self),
                start: view.start + start,
            }));
        }
        Ok(match over.as_str() {
            Some(text) => text.chars().skip(start).collect::<String>().into(),
            None => over.try_iter()?.skip(start).collect::<Vec<_>>().into(),
        })
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("trace")
    }
}

impl Object for Trace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        name: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        let number = |value: &Value| {
            value
                .as_usize()
                .ok_or_else(|| Error::from(ErrorKind::InvalidOperation))
        };
        match (name, args) {
            ("items", [id, over, variables]) => self.begin(number(id)?, over, variables),
            ("enter", [id, carried]) => self.enter(number(id)?, carried),
            ("from", [over, start]) => self.from(over, number(start)?),
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// Takes what a template prints.
pub(super) struct Sheet(Arc<Trace>);

impl io::Write for Sheet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.state.lock().text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The conversation from a message on, as a list that notices what is asked of it.
struct View {
    trace: Arc<Trace>,
    start: usize,
}

impl View {
    fn len(&self) -> usize {
        self.trace.messages.len().saturating_sub(self.start)
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages =
            (self.start..self.trace.messages.len()).filter_map(|at| self.trace.message(at));
        self.trace.leave_open();
        f.debug_list().entries(messages).finish()
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let message = self.trace.message(self.start.checked_add(key.as_usize()?)?);
        if message.is_none() {
            self.trace.leave_open();
        }
        message
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.trace.leave_open();
        Enumerator::Seq(self.len())
    }
}

/// What a loop goes over.
#[derive(Clone, Debug)]
enum Items {
    View(Arc<View>),
    List(Arc<[Value]>),
}

impl Items {
    fn get(&self, at: usize) -> Option<Value> {
        match self {
            Self::View(view) => view.trace.message(view.start + at),
            Self::List(list) => list.get(at).cloned(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::View(view) => view.len(),
            Self::List(list) => list.len(),
        }
    }

    /// Those from a round on.
    fn from(self, first: usize) -> Value {
        Value::make_iterable(move || {
            let items = self.clone();
            (first..items.len()).map_while(move |at| items.get(at))
        })
    }

    fn leave_open(&self) {
        if let Self::View(view) = self {
            view.trace.leave_open();
        }
    }
}

/// What a template finds under `loop`.
#[derive(Debug)]
struct Round {
    items: Items,
    at: usize,
    resumed: bool,
    carried: Arc<[Value]>,
}

impl Object for Round {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        let rest = || {
            self.items.leave_open();
            self.items.len().saturating_sub(self.at)
        };
        Some(match key {
            "index" => (self.at + 1).into(),
            "index0" => self.at.into(),
            "first" => (self.at == 0).into(),
            // The one behind it stays there.
            "last" => (self.at + 1 >= self.items.len() && rest() <= 1).into(),
            "length" => (self.at + rest()).into(),
            "revindex" => rest().into(),
            "revindex0" => rest().saturating_sub(1).into(),
            "previtem" => return self.items.get(self.at.checked_sub(1)?),
            "nextitem" => {
                let next = self.items.get(self.at + 1);
                if next.is_none() {
                    self.items.leave_open();
                }
                return next;
            }
            "resumed" => self.resumed.into(),
            "carried" => self.carried.to_vec().into(),
            _ => return None,
        })
    }
}

/// A value, kept so that it can be told whether another one is the same.
#[derive(Clone, Debug, PartialEq)]
enum Kept {
    /// With whether it is a whole number: 1 and 1.0 are equal, and print differently.
    Scalar(ValueKind, bool, Value),
    /// The conversation from a message on.
    View(usize),
    /// A message, by where it is: the same one stays there as long as it is kept.
    Record(Pinned),
    List(Vec<Kept>),
    Mapping(Vec<(Kept, Kept)>),
}

#[derive(Clone, Debug)]
struct Pinned(Arc<Record>);

impl PartialEq for Pinned {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Kept {
    /// `None` for what is too large, or cannot be compared.
    fn new(value: &Value, depth: usize) -> Option<Self> {
        let depth = depth.checked_sub(1)?;
        if let Some(view) = value.downcast_object_ref::<View>() {
            return Some(Self::View(view.start));
        }
        if let Some(record) = value.downcast_object::<Record>() {
            return Some(Self::Record(Pinned(record)));
        }
        let few = value.len().is_some_and(|len| len <= KEPT_ITEMS_MAX);
        let kind = value.kind();
        let scalars = [
            ValueKind::Undefined,
            ValueKind::None,
            ValueKind::Bool,
            ValueKind::Number,
            ValueKind::String,
            ValueKind::Bytes,
        ];
        if scalars.contains(&kind) {
            Some(Self::Scalar(kind, value.is_integer(), value.clone()))
        } else if kind == ValueKind::Seq && few {
            let items = value.try_iter().ok()?.map(|item| Self::new(&item, depth));
            items.collect::<Option<_>>().map(Self::List)
        } else if kind == ValueKind::Map && few {
            let entries = value.try_iter().ok()?.map(|key| {
                let entry = value.get_item(&key).ok()?;
                Some((Self::new(&key, depth)?, Self::new(&entry, depth)?))
            });
            entries.collect::<Option<_>>().map(Self::Mapping)
        } else {
            None
        }
    }

    /// Whether it holds neither a part of the rendering, such as the conversation, nor a namespace.
    fn is_free(&self) -> bool {
        match self {
            Self::Scalar(..) | Self::Record(_) => true,
            Self::List(items) => items.iter().all(Self::is_free),
            Self::View(_) | Self::Mapping(_) => false,
        }
    }
}
