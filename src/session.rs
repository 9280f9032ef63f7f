//! What a server holds between responses: committed responses, each a mark on the shared ledger,
//! found by their ids while their stream lives and for a while after it. What outlives that is in
//! `archive`.
//!
//! Committed state never changes, so holding a response costs what is new in it, forking one
//! costs a pointer, and a lookup needs no lock that is kept.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use parking_lot::Mutex;

use crate::{
    backend::ChatMessage,
    event::{Finish, PromptReport, Status, Usage},
    item::{Item, ItemId, ResponseId, Tenant},
    ledger::Rope,
    model::Artifacts,
    render::{self, Entries, Head, Resume, Visible},
    request::{OpenCall, Settings, ValidItem},
    safety::Checked,
};

/// A response that has ended and can be continued: a mark on the ledger. Never changes.
pub struct Committed {
    /// Its id.
    pub id: ResponseId,
    /// Whose it is.
    pub tenant: Tenant,
    /// The first response of its conversation.
    pub root: ResponseId,
    /// What it continues.
    pub parent: Option<Arc<Committed>>,
    /// The name of the model that served it.
    pub model: Arc<str>,
    /// The settings in force.
    pub settings: Arc<Settings>,
    /// The date that the conversation began on.
    pub date: jiff::civil::Date,
    /// Names conversations that share a prefix, to the engines.
    pub affinity: Arc<str>,
    /// What the conversation got in it: the input of each command and the output of each sample.
    pub batches: Vec<Vec<ValidItem>>,
    /// The same as messages for engines that read messages, once one was asked.
    pub chat: OnceLock<Vec<ChatMessage>>,
    /// Its input items, in the order of the conversation.
    pub input: Vec<Arc<Item>>,
    /// Its output items, in order.
    pub output: Vec<Arc<Item>>,
    /// How it was rendered. `None` where it comes from the store and no model has that text side
    /// any more: continued, the conversation is rendered anew.
    pub view: Option<View>,
    /// Messages that steered too late to be sampled after: they follow the outputs of the open calls.
    pub pending: Vec<ValidItem>,
    /// The prompt of the last sample and what was sampled.
    pub rope: Rope,
    /// How many tokens of the rope are the prompt.
    pub prompt_tokens: usize,
    /// How many messages the conversation had when the prompt was made.
    pub prompt_entries: usize,
    /// Calls without an output.
    pub open_calls: Vec<OpenCall>,
    /// How it ended.
    pub status: Status,
    /// Why its last sample ended.
    pub finish: Option<Finish>,
    /// What it used.
    pub usage: Usage,
    /// How its last prompt came to be.
    pub prompt: PromptReport,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// What the create carried.
    pub metadata: BTreeMap<String, String>,
    /// How it stands with the store.
    pub storing: Storing,
    /// How its conversation was checked. What comes from the store is checked anew.
    pub checked: Checked,
}

/// A conversation as the messages of one text side.
pub struct View {
    /// The text side.
    pub artifacts: Arc<Artifacts>,
    /// The head that the settings render to.
    pub head: Arc<Head>,
    /// All messages of the conversation.
    pub entries: Entries,
    /// What the model still sees of the conversation.
    pub visible: Visible,
    /// Where the rendering of its last prompt may be gone on with.
    pub resume: Option<Resume>,
}

/// Whether a response goes to the store.
#[derive(Debug)]
pub enum Storing {
    /// It was asked not to, or one before it was: without that one it could not be continued.
    Never,
    /// It does; whether its record is on its way or there.
    Wanted(Mutex<bool>),
}

impl Storing {
    /// For a response under these settings.
    #[must_use]
    pub fn new(settings: &Settings, parent: Option<&Committed>) -> Self {
        let parent = parent.is_none_or(|parent| matches!(parent.storing, Self::Wanted(_)));
        if settings.store.unwrap_or(true) && parent {
            Self::Wanted(Mutex::new(false))
        } else {
            Self::Never
        }
    }

    /// Whether its record is still to be made.
    #[must_use]
    pub fn is_due(&self) -> bool {
        match self {
            Self::Never => false,
            Self::Wanted(given) => !*given.lock(),
        }
    }

    /// Does this where the record is still to be made, once. Whoever asks meanwhile waits.
    pub fn give(&self, record: impl FnOnce()) {
        if let Self::Wanted(given) = self {
            let mut given = given.lock();
            if !*given {
                record();
                *given = true;
            }
        }
    }
}

impl Committed {
    /// How it was rendered, where that was with this text side.
    #[must_use]
    pub fn view_under(&self, artifacts: &Artifacts) -> Option<&View> {
        let view = self.view.as_ref();
        view.filter(|view| view.artifacts.fingerprint == artifacts.fingerprint)
    }

    /// What the conversation got in it, as messages for engines that read messages.
    pub fn chat(&self) -> &[ChatMessage] {
        self.chat.get_or_init(|| {
            let batches = self.batches.iter();
            batches.flat_map(|batch| render::messages(batch)).collect()
        })
    }

    /// This response and those before it, newest first.
    pub fn chain(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |node| node.parent.as_deref())
    }

    /// What it holds in memory beyond what its parent holds, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let items = self.input.iter().chain(&self.output);
        // A message holds the text of its item once more, as the template's value.
        let parent = self.parent.as_ref().map(|parent| &parent.rope);
        size_of::<Self>()
            + self.rope.bytes_beyond(parent.unwrap_or(&Rope::default()))
            + items
                .map(|item| size_of::<Item>() + 2 * item.text_bytes() + 256)
                .sum::<usize>()
            + self.chat.get().map_or(0, |messages| {
                let messages = messages.iter();
                let text = |it: &ChatMessage| it.reasoning.as_ref().map_or(0, bytes::Bytes::len);
                let bytes = messages.map(|it| it.object.len() + text(it) + size_of_val(it));
                bytes.sum::<usize>()
            })
    }
}

impl Drop for Committed {
    /// Frees a long conversation in a loop: one call a response would overflow the stack.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(parent) = next {
            next = Arc::into_inner(parent).and_then(|mut owned| owned.parent.take());
        }
    }
}

/// How much is kept of streams that have ended.
#[derive(Debug, Clone, Copy)]
pub struct ParkedLimits {
    /// Bytes in all.
    pub bytes_max: u64,
    /// Bytes a tenant.
    pub tenant_bytes_max: u64,
    /// How long.
    pub time_max: Duration,
}

/// All responses that the server holds.
pub struct Sessions {
    live: DashMap<ResponseId, Arc<Committed>>,
    parked: Parked,
    items: DashMap<(Tenant, ItemId), Weak<Item>>,
    items_swept: AtomicUsize,
}

impl Sessions {
    /// An empty holder with these limits for what outlives its stream.
    #[must_use]
    pub fn new(limits: ParkedLimits) -> Arc<Self> {
        Arc::new(Self {
            live: DashMap::new(),
            parked: Parked::new(limits),
            items: DashMap::new(),
            items_swept: AtomicUsize::new(1024),
        })
    }

    /// The response of this id, of this tenant: from the streams that live, else from what is parked.
    #[must_use]
    pub fn find(&self, tenant: &Tenant, id: &ResponseId) -> Option<Arc<Committed>> {
        let live = self.live.get(id).map(|found| found.clone());
        live.or_else(|| self.parked.find(id))
            .filter(|found| found.tenant == *tenant)
    }

    /// The item of this id, of this tenant, while some response that is held contains it.
    #[must_use]
    pub fn find_item(&self, tenant: &Tenant, id: &ItemId) -> Option<Arc<Item>> {
        let key = (tenant.clone(), id.clone());
        self.items.get(&key)?.upgrade()
    }

    /// Lets go of what has been parked for too long. To be called now and then: nothing else looks.
    pub fn expire(&self) {
        self.parked.bundles.run_pending_tasks();
    }

    /// Lets go of a response, if it is this tenant's. Those that continue it keep what they share
    /// with it.
    pub fn forget(&self, tenant: &Tenant, id: &ResponseId) {
        if self.find(tenant, id).is_some() {
            self.live.remove(id);
            self.parked.forget(id);
        }
    }

    fn insert(&self, response: Arc<Committed>) {
        self.name_items(&response);
        self.live.insert(response.id.clone(), response);
    }

    /// Parks responses that no stream holds, so that they and their items are found.
    pub fn park(&self, tenant: &Tenant, responses: Vec<Arc<Committed>>) {
        for response in &responses {
            self.name_items(response);
        }
        self.parked.park(tenant, responses);
    }

    /// Lets the items of a response be found by their ids.
    fn name_items(&self, response: &Committed) {
        for item in response.input.iter().chain(&response.output) {
            let key = (response.tenant.clone(), item.id.clone());
            self.items.insert(key, Arc::downgrade(item));
        }
        self.sweep();
    }

    /// Drops the names of items that are gone, whenever their number has doubled.
    fn sweep(&self) {
        let len = self.items.len();
        if len > self.items_swept.load(Ordering::Relaxed) {
            self.items.retain(|_, item| item.strong_count() > 0);
            let next = (2 * self.items.len()).max(1024);
            self.items_swept.store(next, Ordering::Relaxed);
        }
    }
}

/// What one stream holds. Shared by its reader and its responses; when the last of them is gone,
/// what it held is parked.
pub struct Held {
    sessions: Arc<Sessions>,
    tenant: Tenant,
    responses_max: usize,
    ids: Mutex<VecDeque<ResponseId>>,
}

impl Held {
    /// An empty hold for a stream of this tenant. The oldest response leaves when there are more
    /// than `responses_max`.
    #[must_use]
    pub fn new(sessions: Arc<Sessions>, tenant: Tenant, responses_max: usize) -> Self {
        Self {
            sessions,
            tenant,
            responses_max,
            ids: Mutex::new(VecDeque::new()),
        }
    }

    /// Whose stream it is.
    #[must_use]
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// The response of this id, held by this stream or another of the tenant, or parked.
    #[must_use]
    pub fn find(&self, id: &ResponseId) -> Option<Arc<Committed>> {
        self.sessions.find(&self.tenant, id)
    }

    /// The item of this id.
    #[must_use]
    pub fn find_item(&self, id: &ItemId) -> Option<Arc<Item>> {
        self.sessions.find_item(&self.tenant, id)
    }

    /// Commits a response: from now on it can be found and continued.
    pub fn commit(&self, response: Committed) -> Arc<Committed> {
        let response = Arc::new(response);
        self.sessions.insert(response.clone());
        let oldest = {
            let mut ids = self.ids.lock();
            ids.push_back(response.id.clone());
            (ids.len() > self.responses_max).then(|| ids.pop_front())
        };
        if let Some(Some(oldest)) = oldest {
            self.sessions.live.remove(&oldest);
        }
        response
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Sessions { live, parked, .. } = &*self.sessions;
        let ids = self.ids.get_mut();
        let held = ids.iter().filter_map(|id| Some(live.get(id)?.clone()));
        parked.park(&self.tenant, held.collect());
        // Only now, so that a client that reconnects finds each of them here or there at all times.
        for id in ids {
            if live.remove(id).is_none() {
                // It was deleted meanwhile.
                parked.forget(id);
            }
        }
    }
}

/// What a stream held when it ended.
struct Bundle {
    tenant: Tenant,
    responses: HashMap<ResponseId, Arc<Committed>>,
    bytes: u64,
}

/// The bundles of each tenant, oldest first, with their bytes.
type Bundles = HashMap<Tenant, VecDeque<(u64, u64)>>;

/// What outlives its stream, bounded by bytes, a tenant's share of them, and time.
struct Parked {
    limits: ParkedLimits,
    bundles: moka::sync::Cache<u64, Arc<Bundle>>,
    index: Arc<DashMap<ResponseId, u64>>,
    tenants: Arc<Mutex<Bundles>>,
    next: AtomicU64,
}

impl Parked {
    fn new(limits: ParkedLimits) -> Self {
        let index: Arc<DashMap<ResponseId, u64>> = Arc::default();
        let tenants: Arc<Mutex<Bundles>> = Arc::default();
        let (evicted_index, evicted_tenants) = (index.clone(), tenants.clone());
        let bundles = moka::sync::Cache::builder()
            .max_capacity(limits.bytes_max / 1024)
            .time_to_live(limits.time_max)
            // In units of a KiB, since a weight is a u32.
            .weigher(|_, bundle: &Arc<Bundle>| {
                u32::try_from(bundle.bytes / 1024 + 1).unwrap_or(u32::MAX)
            })
            .eviction_listener(move |id, bundle, _| {
                for response in bundle.responses.keys() {
                    evicted_index.remove_if(response, |_, at| at == &*id);
                }
                let mut tenants = evicted_tenants.lock();
                if let Some(list) = tenants.get_mut(&bundle.tenant) {
                    list.retain(|(other, _)| *other != *id);
                    if list.is_empty() {
                        tenants.remove(&bundle.tenant);
                    }
                }
            })
            .build();
        Self {
            limits,
            bundles,
            index,
            tenants,
            next: AtomicU64::new(0),
        }
    }

    fn find(&self, id: &ResponseId) -> Option<Arc<Committed>> {
        let bundle = *self.index.get(id)?;
        self.bundles.get(&bundle)?.responses.get(id).cloned()
    }

    fn forget(&self, id: &ResponseId) {
        self.index.remove(id);
    }

    fn park(&self, tenant: &Tenant, responses: Vec<Arc<Committed>>) {
        if responses.is_empty() {
            return;
        }
        let bytes = held_bytes(&responses);
        if bytes > self.limits.tenant_bytes_max {
            tracing::info!(
                bytes,
                limit = self.limits.tenant_bytes_max,
                "too large to park"
            );
            return;
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let surplus = self.make_room(tenant, id, bytes);
        for oldest in surplus {
            self.bundles.invalidate(&oldest);
        }
        for response in &responses {
            self.index.insert(response.id.clone(), id);
        }
        let responses = responses
            .into_iter()
            .map(|response| (response.id.clone(), response))
            .collect();
        let bundle = Bundle {
            tenant: tenant.clone(),
            responses,
            bytes,
        };
        self.bundles.insert(id, Arc::new(bundle));
    }

    /// Books the bundle, and names the tenant's oldest ones that are over its share with it.
    fn make_room(&self, tenant: &Tenant, id: u64, bytes: u64) -> Vec<u64> {
        let mut tenants = self.tenants.lock();
        let list = tenants.entry(tenant.clone()).or_default();
        list.push_back((id, bytes));
        let mut total: u64 = list.iter().map(|(_, bytes)| bytes).sum();
        let mut surplus = Vec::new();
        for (oldest, bytes) in list.iter() {
            if total <= self.limits.tenant_bytes_max {
                break;
            }
            total -= bytes;
            surplus.push(*oldest);
        }
        surplus
    }
}

/// What these responses keep in memory, the conversations before them included, each counted once.
fn held_bytes(responses: &[Arc<Committed>]) -> u64 {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for response in responses {
        for node in response.chain() {
            if !seen.insert(std::ptr::from_ref(node)) {
                break;
            }
            bytes += node.bytes() as u64;
        }
    }
    bytes
}
