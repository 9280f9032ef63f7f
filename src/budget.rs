//! Budgets: how much a tenant, a key or a stream may use.
//!
//! A budget is one line of the configuration. Each tenant, key or stream that it is for has a [`Ledger`] of its own
//! under it, and a response pays from all ledgers that are for it at once. What it may need is reserved before it is
//! used: the prompt's tokens before a sample is dispatched, and the answer's in slices while it is sampled, so that
//! samples that run at once cannot spend the same tokens twice and one that asks for much does not lock the others
//! out. What a sample did not use of its last slice is given back.
//!
//! ```text
//!   stream ── Wallet ── begin ──▶ Purse ── sample ─ output … output ─ calls ─ settle ──▶ (the next sample)
//!               (whose it is)       └──────────────── Spent: the response ends ─────────────┘
//! ```
//!
//! Windows of time begin at multiples of their length since 1970, so that all servers and restarts agree on them. What was
//! used in the windows that run is restored at the start from the journal of usage ([`Budgets::restore`]), and kept
//! where budgets are read anew while the process runs ([`Budgets::replace`]).

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    sync::{Arc, Weak},
};

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::billing::Tally;

/// Tokens of an answer that are reserved at once.
const SLICE_TOKENS: u64 = 256;

/// Billionths in the currency that prices are in. A price with three decimals for a million tokens is a whole
/// number of them for one, so that short answers of cheap models are not rounded away.
const NANOS: f64 = 1e9;

/// A price for a million tokens is a thousand times as many billionths for one.
const NANOS_A_TOKEN: f64 = 1e3;

/// A budget as it stands in the file. A limit that is 0 is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetOptions {
    /// Names it in errors.
    pub name: String,
    /// Who has one of their own under it.
    pub per: Per,
    /// The tenants that it is for; empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<String>,
    /// The models that it is for, as they served; empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// The time after which it is full again, in seconds. 0: never, while the process, or the stream, lives.
    #[serde(default)]
    pub window_secs: u64,
    /// Tokens of prompts.
    #[serde(default)]
    pub input_tokens_max: u64,
    /// Tokens of answers.
    #[serde(default)]
    pub output_tokens_max: u64,
    /// Calls of tools that models made.
    #[serde(default)]
    pub calls_max: u64,
    /// Seconds that samples took.
    #[serde(default)]
    pub sample_secs_max: u64,
    /// Money, by the prices of the models, in the currency that those are in.
    #[serde(default)]
    pub cost_max: f64,
}

/// Who has a budget of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Per {
    /// Each tenant.
    Tenant,
    /// Each API key.
    Key,
    /// Each stream.
    Stream,
}

/// What a model costs, for a million tokens, in any currency.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// The model.
    pub model: String,
    /// A million tokens of prompts.
    pub input: f64,
    /// A million of them that came from the engine's cache. Absent: as the others.
    pub cached: Option<f64>,
    /// A million tokens of answers.
    pub output: f64,
}

impl BudgetOptions {
    /// Whether every value is in its range, and it limits anything.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), String> {
        const YEAR_SECS: u64 = 366 * 24 * 3600;
        if self.name.is_empty() || self.name.len() > 64 {
            return Err("name is not 1 to 64 bytes".to_owned());
        }
        if self.window_secs > YEAR_SECS {
            return Err(format!("window_secs is over {YEAR_SECS}"));
        }
        if !(0.0..=1e9).contains(&self.cost_max) {
            return Err("cost_max is not from 0 to 1e9".to_owned());
        }
        if self.limits() == Amounts::default() {
            return Err("it limits nothing".to_owned());
        }
        Ok(())
    }

    fn limits(&self) -> Amounts {
        Amounts {
            input: self.input_tokens_max,
            output: self.output_tokens_max,
            calls: self.calls_max,
            millis: self.sample_secs_max.saturating_mul(1000),
            // A positive number that rounds to nothing is still a limit.
            nanos: (self.cost_max * NANOS).ceil() as u64,
        }
    }
}

impl Price {
    /// Whether every price can be one.
    ///
    /// # Errors
    ///
    /// The first that cannot.
    pub fn check(&self) -> Result<(), String> {
        let prices = [
            ("input", Some(self.input)),
            ("cached", self.cached),
            ("output", Some(self.output)),
        ];
        for (name, price) in prices {
            if price.is_some_and(|price| !(0.0..=1e9).contains(&price)) {
                return Err(format!("{name} is not from 0 to 1e9"));
            }
        }
        Ok(())
    }

    /// What so much costs, in billionths.
    fn of(&self, input: u64, cached: u64, output: u64) -> u64 {
        let cached = cached.min(input);
        let fresh = (input - cached) as f64 * self.input;
        let kept = cached as f64 * self.cached.unwrap_or(self.input);
        ((fresh + kept + output as f64 * self.output) * NANOS_A_TOKEN).round() as u64
    }
}

/// Amounts of what budgets limit; as limits, 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Amounts {
    input: u64,
    output: u64,
    calls: u64,
    millis: u64,
    nanos: u64,
}

impl Amounts {
    fn add(&mut self, more: Self) {
        self.each(more, u64::saturating_add);
    }

    fn subtract(&mut self, less: Self) {
        self.each(less, u64::saturating_sub);
    }

    fn each(&mut self, other: Self, change: fn(u64, u64) -> u64) {
        self.input = change(self.input, other.input);
        self.output = change(self.output, other.output);
        self.calls = change(self.calls, other.calls);
        self.millis = change(self.millis, other.millis);
        self.nanos = change(self.nanos, other.nanos);
    }

    /// What is over these limits once so much more is used.
    fn over(&self, more: Self, limits: Self) -> Option<Kind> {
        let checks = [
            (Kind::Input, limits.input, self.input, more.input),
            (Kind::Output, limits.output, self.output, more.output),
            (Kind::Calls, limits.calls, self.calls, more.calls),
            (Kind::Time, limits.millis, self.millis, more.millis),
            (Kind::Cost, limits.nanos, self.nanos, more.nanos),
        ];
        let over = checks.into_iter().find(|(_, limit, used, more)| {
            *limit > 0 && *more > 0 && used.saturating_add(*more) > *limit
        });
        over.map(|(kind, ..)| kind)
    }
}

/// What a budget limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Tokens of prompts.
    Input,
    /// Tokens of answers.
    Output,
    /// Calls.
    Calls,
    /// The time of samples.
    Time,
    /// Money.
    Cost,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input tokens",
            Self::Output => "output tokens",
            Self::Calls => "calls",
            Self::Time => "time of samples",
            Self::Cost => "cost",
        })
    }
}

/// A budget has no more of something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the budget `{name}` is spent: {kind}")]
pub struct Spent {
    /// Its name.
    pub name: Arc<str>,
    /// Of what.
    pub kind: Kind,
    /// Milliseconds until it is full again, where it ever is.
    pub full_in_ms: Option<u64>,
}

/// What one tenant, key or stream has used of one budget in one window, reservations included.
#[derive(Debug, Default)]
struct Ledger {
    window: u64,
    used: Amounts,
}

impl Ledger {
    /// What was used in the window that runs. A clock that is set back by a little does not fill a budget again; one that
    /// had been further ahead than that does not keep it empty.
    fn in_window(&mut self, window: u64) -> &mut Amounts {
        if window > self.window || self.window - window > 1 {
            *self = Self {
                window,
                used: Amounts::default(),
            };
        }
        &mut self.used
    }
}

/// The ledgers of those that have one of their own under a budget, but for streams, which hold theirs themselves. There
/// are as many as the server has tenants or keys.
#[derive(Debug, Default)]
struct Ledgers(Mutex<HashMap<Arc<str>, Arc<Mutex<Ledger>>>>);

impl Ledgers {
    fn of(&self, owner: &Arc<str>) -> Arc<Mutex<Ledger>> {
        self.0.lock().entry(owner.clone()).or_default().clone()
    }
}

#[derive(Debug)]
struct Budget {
    options: BudgetOptions,
    name: Arc<str>,
    limits: Amounts,
    ledgers: Arc<Ledgers>,
}

impl Budget {
    fn window_ms(&self) -> u64 {
        self.options.window_secs * 1000
    }

    /// The window that runs.
    fn window(&self, now_ms: u64) -> u64 {
        now_ms.checked_div(self.window_ms()).unwrap_or(0)
    }

    fn is_for(&self, tenant: &str, model: &str) -> bool {
        let holds = |names: &[String], name| names.is_empty() || names.iter().any(|it| it == name);
        holds(&self.options.tenants, tenant) && holds(&self.options.models, model)
    }

    /// Whether what was used of this one was used of the other, too.
    fn continues(&self, other: &BudgetOptions) -> bool {
        let of = |it: &BudgetOptions| (it.name.clone(), it.per, it.window_secs);
        of(&self.options) == of(other)
    }

    fn spent(&self, kind: Kind, now_ms: u64) -> Spent {
        let window = self.window_ms();
        Spent {
            name: self.name.clone(),
            kind,
            full_in_ms: (window > 0).then(|| window - now_ms % window),
        }
    }
}

/// The budgets and prices that are in force together.
#[derive(Debug, Default)]
struct Book {
    budgets: Vec<Arc<Budget>>,
    prices: HashMap<String, Arc<Price>>,
}

impl Book {
    /// What was used under the book before stays used.
    fn new(budgets: &[BudgetOptions], prices: &[Price], before: &Self) -> Self {
        let budget = |options: &BudgetOptions| {
            let kept = before.budgets.iter().find(|it| it.continues(options));
            Arc::new(Budget {
                name: options.name.as_str().into(),
                limits: options.limits(),
                options: options.clone(),
                ledgers: kept.map_or_else(Arc::default, |it| it.ledgers.clone()),
            })
        };
        let price = |price: &Price| (price.model.clone(), Arc::new(price.clone()));
        Self {
            budgets: budgets.iter().map(budget).collect(),
            prices: prices.iter().map(price).collect(),
        }
    }
}

/// All budgets, and what was used of them.
#[derive(Debug, Default)]
pub struct Budgets {
    book: RwLock<Arc<Book>>,
}

impl Budgets {
    /// These budgets, with nothing used of them.
    #[must_use]
    pub fn new(budgets: &[BudgetOptions], prices: &[Price]) -> Self {
        let book = Book::new(budgets, prices, &Book::default());
        Self {
            book: RwLock::new(Arc::new(book)),
        }
    }

    /// From now on these. What was used under a budget's name, of the same `per` and window, stays used; what was begun
    /// goes on under those that it began with.
    pub fn replace(&self, budgets: &[BudgetOptions], prices: &[Price]) {
        let mut book = self.book.write();
        let fresh = Book::new(budgets, prices, &book);
        *book = Arc::new(fresh);
    }

    /// Charges what a process before this one used in the windows that run now. `read` tells what was used since a time
    /// in milliseconds since 1970; for budgets that are never full again that is 0. What streams used went with them.
    ///
    /// # Errors
    ///
    /// That of `read`.
    pub fn restore<E>(
        &self,
        now_ms: u64,
        read: impl Fn(u64) -> Result<Vec<Tally>, E>,
    ) -> Result<(), E> {
        let book = self.book.read().clone();
        let mut known: HashMap<u64, Vec<Tally>> = HashMap::new();
        for budget in &book.budgets {
            if budget.options.per == Per::Stream {
                continue;
            }
            let window = budget.window(now_ms);
            let since = window * budget.window_ms();
            let tallies = match known.entry(since) {
                Entry::Occupied(found) => found.into_mut(),
                Entry::Vacant(place) => place.insert(read(since)?),
            };
            for tally in tallies
                .iter()
                .filter(|it| budget.is_for(&it.tenant, &it.model))
            {
                let owners = Owners::new(&tally.tenant, &tally.key);
                if let Some(owner) = owners.of(budget.options.per) {
                    let ledger = budget.ledgers.of(owner);
                    ledger.lock().in_window(window).add(used(tally));
                }
            }
        }
        Ok(())
    }

    /// What a stream of this tenant and key pays from.
    #[must_use]
    pub fn wallet(self: &Arc<Self>, tenant: &str, key: &str) -> Wallet {
        Wallet {
            budgets: self.clone(),
            owners: Owners::new(tenant, key),
            own: Mutex::default(),
        }
    }
}

fn used(tally: &Tally) -> Amounts {
    Amounts {
        input: tally.input_tokens,
        output: tally.output_tokens,
        calls: tally.calls,
        millis: tally.sample_ms,
        nanos: tally.cost_nanos,
    }
}

/// Whose ledgers stand under which names.
#[derive(Debug, Default)]
struct Owners {
    tenant: Arc<str>,
    /// A key belongs to one tenant, but two tenants may call theirs the same.
    key: Arc<str>,
}

impl Owners {
    fn new(tenant: &str, key: &str) -> Self {
        Self {
            tenant: tenant.into(),
            key: format!("{tenant}/{key}").into(),
        }
    }

    fn of(&self, per: Per) -> Option<&Arc<str>> {
        match per {
            Per::Tenant => Some(&self.tenant),
            Per::Key => Some(&self.key),
            Per::Stream => None,
        }
    }
}

/// A stream's own ledger under a budget, which is known by where those of others stand.
type Own = (Weak<Ledgers>, Arc<Mutex<Ledger>>);

/// What the responses of one stream pay from.
#[derive(Debug, Default)]
pub struct Wallet {
    budgets: Arc<Budgets>,
    owners: Owners,
    /// What this stream used of the budgets that streams have of their own, for as long as there are those.
    own: Mutex<Vec<Own>>,
}

impl Wallet {
    /// What a response pays from that this model serves: by the budgets and prices of now.
    #[must_use]
    pub fn begin(&self, model: &str) -> Purse {
        let book = self.budgets.book.read().clone();
        let budgets = book.budgets.iter();
        let lines = budgets.filter(|budget| budget.is_for(&self.owners.tenant, model));
        let lines = lines.map(|budget| Line {
            ledger: self.ledger(budget),
            budget: budget.clone(),
            prompt_in: 0,
            slice_in: 0,
        });
        let lines = lines.collect();
        Purse::new(lines, book.prices.get(model).cloned())
    }

    fn ledger(&self, budget: &Budget) -> Arc<Mutex<Ledger>> {
        if let Some(owner) = self.owners.of(budget.options.per) {
            return budget.ledgers.of(owner);
        }
        let mut own = self.own.lock();
        own.retain(|(ledgers, _)| ledgers.strong_count() > 0);
        let found = own
            .iter()
            .find(|(ledgers, _)| ledgers.as_ptr() == Arc::as_ptr(&budget.ledgers));
        match found {
            Some((_, ledger)) => ledger.clone(),
            None => {
                let ledger: Arc<Mutex<Ledger>> = Arc::default();
                own.push((Arc::downgrade(&budget.ledgers), ledger.clone()));
                ledger
            }
        }
    }
}

#[derive(Debug)]
struct Line {
    budget: Arc<Budget>,
    ledger: Arc<Mutex<Ledger>>,
    /// The windows in which the prompt and the last slice were reserved: what is given back of them goes there, or nowhere.
    prompt_in: u64,
    slice_in: u64,
}

impl Line {
    fn used(&self, now_ms: u64) -> Amounts {
        *self.ledger.lock().in_window(self.budget.window(now_ms))
    }

    /// Takes these amounts, all or none of them, in the window that is given back.
    fn take(&self, amounts: Amounts, now_ms: u64) -> Result<u64, Spent> {
        let mut ledger = self.ledger.lock();
        let used = ledger.in_window(self.budget.window(now_ms));
        match used.over(amounts, self.budget.limits) {
            None => {
                used.add(amounts);
                Ok(ledger.window)
            }
            Some(kind) => {
                let spent = self.budget.spent(kind, now_ms);
                let never = Amounts::default().over(amounts, self.budget.limits);
                Err(Spent {
                    // What is over the whole of it does not fit when it is full, either.
                    full_in_ms: spent.full_in_ms.filter(|_| never.is_none()),
                    ..spent
                })
            }
        }
    }

    /// Takes what was used already, whatever is left.
    fn charge(&self, amounts: Amounts, now_ms: u64) {
        let mut ledger = self.ledger.lock();
        ledger.in_window(self.budget.window(now_ms)).add(amounts);
    }

    /// Gives back what was reserved in this window and not used. One that is over keeps nothing.
    fn give_back(&self, amounts: Amounts, window: u64) {
        let mut ledger = self.ledger.lock();
        if ledger.window == window {
            ledger.used.subtract(amounts);
        }
    }

    /// How many tokens of answers there are left at this price. `None`: as many as one likes.
    fn output_left(&self, price: Option<&Price>, now_ms: u64) -> Option<u64> {
        let limits = self.budget.limits;
        let used = self.used(now_ms);
        let tokens = (limits.output > 0).then(|| limits.output.saturating_sub(used.output));
        let price = price.filter(|price| limits.nanos > 0 && price.output > 0.0);
        let paid = price.map(|price| {
            let nanos = limits.nanos.saturating_sub(used.nanos);
            (nanos as f64 / (price.output * NANOS_A_TOKEN)) as u64
        });
        tokens.into_iter().chain(paid).min()
    }
}

/// What a sample came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sampled {
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// Calls that it made.
    pub calls: u64,
    /// Tokens of its prompt, as they were counted in the end.
    pub input_tokens: u64,
    /// Those of them that came from the engine's cache.
    pub cached_tokens: u64,
    /// Tokens of its answer.
    pub output_tokens: u64,
}

/// What one response pays from. What it has reserved and not used goes back when it is dropped.
#[derive(Debug, Default)]
pub struct Purse {
    lines: Vec<Line>,
    price: Option<Arc<Price>>,
    /// Tokens of the answer that are reserved and not yet sampled.
    slice: u64,
    /// Of the sample that runs: tokens of its prompt, tokens of its answer, and the time that it has paid for.
    input: u64,
    output: u64,
    paid_ms: u64,
    /// What samples took that have ended, and what they cost.
    ended_ms: u64,
    ended_nanos: u64,
}

impl Purse {
    fn new(lines: Vec<Line>, price: Option<Arc<Price>>) -> Self {
        let mut purse = Self::default();
        (purse.lines, purse.price) = (lines, price);
        purse
    }

    /// Whether nothing limits it.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.lines.is_empty()
    }

    /// How long the samples of the response took so far, in milliseconds. Where nothing limits it, without the one that runs.
    #[must_use]
    pub fn sample_ms(&self) -> u64 {
        self.ended_ms.saturating_add(self.paid_ms)
    }

    /// What they cost, in billionths of the currency of the prices; likewise.
    #[must_use]
    pub fn cost_nanos(&self) -> u64 {
        let running = self.cost(self.input, 0, self.output);
        self.ended_nanos.saturating_add(running)
    }

    /// Another model serves the response from here on: it pays from there. The sample that was not begun costs nothing.
    pub fn hand_over(&mut self, next: Self) {
        self.abandon();
        let (ended_ms, ended_nanos) = (self.ended_ms, self.ended_nanos);
        *self = next;
        (self.ended_ms, self.ended_nanos) = (ended_ms, ended_nanos);
    }

    fn cost(&self, input: u64, cached: u64, output: u64) -> u64 {
        let price = self.price.as_deref();
        price.map_or(0, |price| price.of(input, cached, output))
    }

    /// Takes these amounts from every ledger, or from none. `place` is where a line keeps the window of it.
    fn take(
        &mut self,
        amounts: Amounts,
        now_ms: u64,
        place: fn(&mut Line) -> &mut u64,
    ) -> Result<(), Spent> {
        for index in 0..self.lines.len() {
            match self.lines[index].take(amounts, now_ms) {
                Ok(window) => *place(&mut self.lines[index]) = window,
                Err(spent) => {
                    for earlier in &mut self.lines[..index] {
                        let window = *place(earlier);
                        earlier.give_back(amounts, window);
                    }
                    return Err(spent);
                }
            }
        }
        Ok(())
    }

    fn charge(&self, amounts: Amounts, now_ms: u64) {
        for line in &self.lines {
            line.charge(amounts, now_ms);
        }
    }

    fn give_back_prompt(&self, amounts: Amounts) {
        for line in &self.lines {
            line.give_back(amounts, line.prompt_in);
        }
    }

    fn give_back_slice(&mut self) {
        let amounts = self.answer(self.slice);
        for line in &self.lines {
            line.give_back(amounts, line.slice_in);
        }
        self.slice = 0;
    }

    /// So many tokens of an answer.
    fn answer(&self, output: u64) -> Amounts {
        Amounts {
            output,
            nanos: self.cost(0, 0, output),
            ..Amounts::default()
        }
    }

    fn output_left(&self, now_ms: u64) -> Option<u64> {
        let price = self.price.as_deref();
        let lines = self.lines.iter();
        lines
            .filter_map(|line| line.output_left(price, now_ms))
            .min()
    }

    /// Whether a ledger has no more time, or no more of these calls, left.
    fn lacks(&self, calls: u64, now_ms: u64) -> Option<Spent> {
        let more = Amounts {
            calls,
            millis: 1,
            ..Amounts::default()
        };
        self.lines.iter().find_map(|line| {
            let kind = line.used(now_ms).over(more, line.budget.limits)?;
            Some(line.budget.spent(kind, now_ms))
        })
    }

    /// Begins a sample whose prompt has so many tokens: how many the answer may have. `None`: no
    /// budget limits that.
    ///
    /// # Errors
    ///
    /// [`Spent`]: it must not be sampled. Then nothing was reserved.
    pub fn sample(&mut self, input_tokens: u64, now_ms: u64) -> Result<Option<u64>, Spent> {
        if self.is_free() {
            return Ok(None);
        }
        // One that has no time or calls left begins nothing.
        if let Some(spent) = self.lacks(1, now_ms) {
            return Err(spent);
        }
        let reserved = Amounts {
            input: input_tokens,
            nanos: self.cost(input_tokens, 0, 0),
            ..Amounts::default()
        };
        self.take(reserved, now_ms, |line| &mut line.prompt_in)?;
        self.input = input_tokens;
        if let Err(spent) = self.refill(now_ms) {
            self.abandon();
            return Err(spent);
        }
        let left = self.output_left(now_ms);
        Ok(left.map(|left| left.saturating_add(self.slice)))
    }

    /// Reserves a slice of the answer, or what is left where that is less, but at least a token.
    fn refill(&mut self, now_ms: u64) -> Result<(), Spent> {
        let left = self.output_left(now_ms).unwrap_or(u64::MAX);
        let wanted = left.clamp(1, SLICE_TOKENS);
        self.take(self.answer(wanted), now_ms, |line| &mut line.slice_in)?;
        self.slice = wanted;
        Ok(())
    }

    /// So many tokens of the answer have come, and the sample has taken so long so far.
    ///
    /// # Errors
    ///
    /// [`Spent`]: no more may be sampled. Those that have come are counted.
    pub fn output(&mut self, tokens: u64, took_ms: u64, now_ms: u64) -> Result<(), Spent> {
        if self.is_free() {
            return Ok(());
        }
        self.output = self.output.saturating_add(tokens);
        if self.pay_time(took_ms, now_ms)
            && let Some(spent) = self.lacks(0, now_ms)
        {
            self.pay_tokens(tokens, now_ms);
            return Err(spent);
        }
        match self.pay_tokens(tokens, now_ms) {
            true => Ok(()),
            false => self.refill(now_ms),
        }
    }

    /// Pays for tokens that were sampled, from the slice first. Whether something is left of that.
    fn pay_tokens(&mut self, tokens: u64, now_ms: u64) -> bool {
        if tokens < self.slice {
            self.slice -= tokens;
            return true;
        }
        let missing = tokens - self.slice;
        self.slice = 0;
        // They were sampled: they count, whatever is left.
        self.charge(self.answer(missing), now_ms);
        false
    }

    /// Pays for the time as it passes, so that samples that run at once do not each have all of it. Whether any has passed.
    fn pay_time(&mut self, took_ms: u64, now_ms: u64) -> bool {
        let millis = took_ms.saturating_sub(self.paid_ms);
        if millis == 0 {
            return false;
        }
        self.paid_ms = took_ms;
        let time = Amounts {
            millis,
            ..Amounts::default()
        };
        self.charge(time, now_ms);
        true
    }

    /// The sample has ended. What was reserved for more goes back.
    pub fn settle_sample(&mut self, sampled: Sampled, now_ms: u64) {
        let Sampled {
            took_ms,
            calls,
            input_tokens,
            cached_tokens,
            output_tokens,
        } = sampled;
        let cost = self.cost(input_tokens, cached_tokens, output_tokens);
        self.ended_ms = self.ended_ms.saturating_add(took_ms.max(self.paid_ms));
        self.ended_nanos = self.ended_nanos.saturating_add(cost);
        if !self.is_free() {
            self.pay_time(took_ms, now_ms);
            let calls = Amounts {
                calls,
                ..Amounts::default()
            };
            // Over the limit, too: they were used.
            self.charge(calls, now_ms);
            self.correct_prompt(input_tokens, cached_tokens, now_ms);
            self.give_back_slice();
        }
        (self.input, self.output, self.paid_ms) = (0, 0, 0);
    }

    /// What the cache saved goes back; and an engine that renders by itself may have counted another prompt.
    fn correct_prompt(&self, input_tokens: u64, cached_tokens: u64, now_ms: u64) {
        let of = |input, nanos| Amounts {
            input,
            nanos,
            ..Amounts::default()
        };
        let reserved = of(self.input, self.cost(self.input, 0, 0));
        let counted = of(input_tokens, self.cost(input_tokens, cached_tokens, 0));
        let (mut more, mut less) = (counted, reserved);
        more.subtract(reserved);
        less.subtract(counted);
        self.charge(more, now_ms);
        self.give_back_prompt(less);
    }

    /// The sample was never begun: all that was reserved for it goes back.
    pub fn abandon(&mut self) {
        self.give_back_prompt(Amounts {
            input: self.input,
            nanos: self.cost(self.input, 0, 0),
            ..Amounts::default()
        });
        self.give_back_slice();
        (self.input, self.output, self.paid_ms) = (0, 0, 0);
    }

    /// How long the sample that begins now may take, in milliseconds. `None`: as long as it likes.
    #[must_use]
    pub fn time_left_ms(&self, now_ms: u64) -> Option<u64> {
        let lines = self.lines.iter();
        let left = lines.filter_map(|line| {
            let limit = line.budget.limits.millis;
            (limit > 0).then(|| limit.saturating_sub(line.used(now_ms).millis))
        });
        left.min()
    }
}

impl Drop for Purse {
    /// A sample that ran gives back the rest of its slice.
    fn drop(&mut self) {
        self.give_back_slice();
    }
}

#[cfg(test)]
mod tests;
