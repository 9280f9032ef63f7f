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
//!                (its ledgers)      └──────────────── Spent: the response ends ─────────────┘
//! ```
//!
//! Windows of time begin at multiples of their length since 1970, so that all servers and restarts agree on them. What was
//! used is known to the process: a new one begins anew.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Tokens of an answer that are reserved at once.
const SLICE_TOKENS: u64 = 256;

/// A millionth of the currency that prices are in.
const MICRO: f64 = 1e6;

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
        if !(0.0..=1e12).contains(&self.cost_max) {
            return Err("cost_max is not from 0 to 1e12".to_owned());
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
            micros: (self.cost_max * MICRO).ceil() as u64,
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

    /// What so much costs, in millionths: a price for a million tokens is one of millionths for a token.
    fn of(&self, input: u64, cached: u64, output: u64) -> u64 {
        let cached = cached.min(input);
        let fresh = (input - cached) as f64 * self.input;
        let kept = cached as f64 * self.cached.unwrap_or(self.input);
        (fresh + kept + output as f64 * self.output).round() as u64
    }
}

/// Amounts of what budgets limit; as limits, 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Amounts {
    input: u64,
    output: u64,
    calls: u64,
    millis: u64,
    micros: u64,
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

/// What one tenant, key or stream has used of one budget in the window that runs, reservations
/// included.
#[derive(Debug, Default)]
struct Ledger {
    window: u64,
    used: Amounts,
}

#[derive(Debug)]
struct Budget {
    options: BudgetOptions,
    name: Arc<str>,
    limits: Amounts,
}

impl Budget {
    fn window_ms(&self) -> u64 {
        self.options.window_secs * 1000
    }

    fn is_for(&self, tenant: &str) -> bool {
        let tenants = &self.options.tenants;
        tenants.is_empty() || tenants.iter().any(|it| it == tenant)
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

/// Where a ledger stands: under which budget, and whose it is.
type Place = (usize, Arc<str>);

/// All budgets, and what was used of them.
#[derive(Debug, Default)]
pub struct Budgets {
    budgets: Vec<Arc<Budget>>,
    prices: HashMap<String, Arc<Price>>,
    /// Of tenants and keys. There are as many as the server has keys.
    ledgers: Mutex<HashMap<Place, Arc<Mutex<Ledger>>>>,
}

impl Budgets {
    /// These budgets, with nothing used of them.
    #[must_use]
    pub fn new(budgets: &[BudgetOptions], prices: &[Price]) -> Self {
        let budget = |options: &BudgetOptions| {
            Arc::new(Budget {
                name: options.name.as_str().into(),
                limits: options.limits(),
                options: options.clone(),
            })
        };
        let price = |price: &Price| (price.model.clone(), Arc::new(price.clone()));
        Self {
            budgets: budgets.iter().map(budget).collect(),
            prices: prices.iter().map(price).collect(),
            ledgers: Mutex::default(),
        }
    }

    /// What a stream of this tenant and key pays from.
    #[must_use]
    pub fn wallet(self: &Arc<Self>, tenant: &str, key: &str) -> Wallet {
        let own = self.budgets.iter().enumerate();
        let own = own.filter(|(_, budget)| budget.is_for(tenant));
        let lines = own.map(|(index, budget)| {
            // A key belongs to one tenant, but two tenants may call theirs the same.
            let owner: Option<Arc<str>> = match budget.options.per {
                Per::Tenant => Some(tenant.into()),
                Per::Key => Some(format!("{tenant}/{key}").into()),
                Per::Stream => None,
            };
            let ledger = match owner {
                None => Arc::default(),
                Some(owner) => self
                    .ledgers
                    .lock()
                    .entry((index, owner))
                    .or_default()
                    .clone(),
            };
            (budget.clone(), ledger)
        });
        Wallet {
            lines: lines.collect(),
            budgets: Arc::downgrade(self),
        }
    }
}

/// What the responses of one stream pay from.
#[derive(Debug, Clone, Default)]
pub struct Wallet {
    lines: Vec<(Arc<Budget>, Arc<Mutex<Ledger>>)>,
    budgets: Weak<Budgets>,
}

impl Wallet {
    /// What a response pays from that this model serves.
    #[must_use]
    pub fn begin(&self, model: &str) -> Purse {
        let is_for = |budget: &Budget| {
            let models = &budget.options.models;
            models.is_empty() || models.iter().any(|it| it == model)
        };
        let lines = self.lines.iter().filter(|(budget, _)| is_for(budget));
        let lines = lines.map(|(budget, ledger)| Line {
            budget: budget.clone(),
            ledger: ledger.clone(),
            reserved_in: 0,
        });
        let budgets = self.budgets.upgrade();
        Purse {
            lines: lines.collect(),
            price: budgets.and_then(|it| it.prices.get(model).cloned()),
            slice: 0,
            input: 0,
        }
    }
}

#[derive(Debug)]
struct Line {
    budget: Arc<Budget>,
    ledger: Arc<Mutex<Ledger>>,
    /// The window in which it last reserved: what is given back goes there, or nowhere.
    reserved_in: u64,
}

impl Line {
    /// The window that runs.
    fn window(&self, now_ms: u64) -> u64 {
        now_ms.checked_div(self.budget.window_ms()).unwrap_or(0)
    }

    /// Does this with the ledger of the window that runs.
    fn with<T>(&self, now_ms: u64, work: impl FnOnce(&mut Amounts) -> T) -> T {
        let window = self.window(now_ms);
        let mut ledger = self.ledger.lock();
        if ledger.window != window {
            *ledger = Ledger {
                window,
                used: Amounts::default(),
            };
        }
        work(&mut ledger.used)
    }

    /// Takes these amounts, all or none of them.
    fn take(&mut self, amounts: Amounts, now_ms: u64) -> Result<(), Spent> {
        self.reserved_in = self.window(now_ms);
        let limits = self.budget.limits;
        let over = self.with(now_ms, |used| {
            let checks = [
                (Kind::Input, limits.input, used.input, amounts.input),
                (Kind::Output, limits.output, used.output, amounts.output),
                (Kind::Calls, limits.calls, used.calls, amounts.calls),
                (Kind::Time, limits.millis, used.millis, amounts.millis),
                (Kind::Cost, limits.micros, used.micros, amounts.micros),
            ];
            let over = checks
                .into_iter()
                .find(|(_, limit, used, more)| *limit > 0 && *more > 0 && used + more > *limit);
            if over.is_none() {
                used.input += amounts.input;
                used.output += amounts.output;
                used.calls += amounts.calls;
                used.millis += amounts.millis;
                used.micros += amounts.micros;
            }
            over
        });
        match over {
            None => Ok(()),
            Some((kind, ..)) => Err(self.budget.spent(kind, now_ms)),
        }
    }

    /// Gives back what was reserved and not used. A window that is over keeps nothing.
    fn give_back(&self, amounts: Amounts) {
        let mut ledger = self.ledger.lock();
        if ledger.window == self.reserved_in {
            let used = &mut ledger.used;
            used.input = used.input.saturating_sub(amounts.input);
            used.output = used.output.saturating_sub(amounts.output);
            used.micros = used.micros.saturating_sub(amounts.micros);
        }
    }

    /// How many tokens of answers there are left at this price. `None`: as many as one likes.
    fn output_left(&self, price: Option<&Price>, now_ms: u64) -> Option<u64> {
        let limits = self.budget.limits;
        self.with(now_ms, |used| {
            let tokens = (limits.output > 0).then(|| limits.output.saturating_sub(used.output));
            let cost = price.filter(|price| limits.micros > 0 && price.output > 0.0);
            let cost = cost.map(|price| {
                let micros = limits.micros.saturating_sub(used.micros);
                (micros as f64 / price.output) as u64
            });
            tokens.into_iter().chain(cost).min()
        })
    }
}

/// What one response pays from. What it has reserved and not used goes back when it is dropped.
#[derive(Debug, Default)]
pub struct Purse {
    lines: Vec<Line>,
    price: Option<Arc<Price>>,
    /// Tokens of the answer that are reserved and not yet sampled.
    slice: u64,
    /// Tokens of the prompt of the sample that runs.
    input: u64,
}

impl Purse {
    /// Whether nothing limits it.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.lines.is_empty()
    }

    fn cost(&self, input: u64, cached: u64, output: u64) -> u64 {
        let price = self.price.as_deref();
        price.map_or(0, |price| price.of(input, cached, output))
    }

    /// Takes these amounts from every ledger, or from none.
    fn take(&mut self, amounts: Amounts, now_ms: u64) -> Result<(), Spent> {
        for index in 0..self.lines.len() {
            if let Err(spent) = self.lines[index].take(amounts, now_ms) {
                for earlier in &self.lines[..index] {
                    earlier.give_back(amounts);
                }
                return Err(spent);
            }
        }
        Ok(())
    }

    fn give_back(&self, amounts: Amounts) {
        for line in &self.lines {
            line.give_back(amounts);
        }
    }

    fn output_left(&self, now_ms: u64) -> Option<u64> {
        let price = self.price.as_deref();
        let lines = self.lines.iter();
        lines
            .filter_map(|line| line.output_left(price, now_ms))
            .min()
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
        for line in &self.lines {
            let limits = line.budget.limits;
            let used = line.with(now_ms, |used| *used);
            let over = [
                (Kind::Time, limits.millis, used.millis),
                (Kind::Calls, limits.calls, used.calls),
            ];
            let over = over
                .into_iter()
                .find(|(_, limit, used)| *limit > 0 && used >= limit);
            if let Some((kind, ..)) = over {
                return Err(line.budget.spent(kind, now_ms));
            }
        }
        let reserved = Amounts {
            input: input_tokens,
            micros: self.cost(input_tokens, 0, 0),
            ..Amounts::default()
        };
        self.take(reserved, now_ms)?;
        self.input = input_tokens;
        if let Err(spent) = self.refill(now_ms) {
            self.abandon();
            return Err(spent);
        }
        let left = self.output_left(now_ms);
        Ok(left.map(|left| left + self.slice))
    }

    /// Reserves a slice of the answer, or what is left where that is less, but at least a token.
    fn refill(&mut self, now_ms: u64) -> Result<(), Spent> {
        let left = self.output_left(now_ms).unwrap_or(u64::MAX);
        let wanted = left.clamp(1, SLICE_TOKENS);
        let amounts = Amounts {
            output: wanted,
            micros: self.cost(0, 0, wanted),
            ..Amounts::default()
        };
        self.take(amounts, now_ms)?;
        self.slice += wanted;
        Ok(())
    }

    /// So many tokens of the answer have come.
    ///
    /// # Errors
    ///
    /// [`Spent`]: no more may be sampled. Those that have come are counted.
    pub fn output(&mut self, tokens: u64, now_ms: u64) -> Result<(), Spent> {
        if self.is_free() {
            return Ok(());
        }
        if tokens < self.slice {
            self.slice -= tokens;
            return Ok(());
        }
        let missing = tokens - self.slice;
        self.slice = 0;
        if missing > 0 {
            let amounts = Amounts {
                output: missing,
                micros: self.cost(0, 0, missing),
                ..Amounts::default()
            };
            for line in &self.lines {
                // They were sampled: they count, whatever is left.
                line.with(now_ms, |used| {
                    used.output += amounts.output;
                    used.micros += amounts.micros;
                });
            }
        }
        self.refill(now_ms)
    }

    /// The sample has ended: it took so long and made so many calls, and so many tokens of its prompt
    /// came from the engine's cache. What was reserved for more goes back.
    pub fn settle_sample(&mut self, took_ms: u64, calls: u64, cached_tokens: u64, now_ms: u64) {
        if self.is_free() {
            return;
        }
        for line in &self.lines {
            // Over the limit, too: they were used.
            line.with(now_ms, |used| {
                used.calls += calls;
                used.millis += took_ms;
            });
        }
        // What the cache saved, too.
        let dear = self.cost(self.input, 0, 0);
        let saved = dear.saturating_sub(self.cost(self.input, cached_tokens, 0));
        self.give_back(Amounts {
            output: self.slice,
            micros: saved + self.cost(0, 0, self.slice),
            ..Amounts::default()
        });
        (self.slice, self.input) = (0, 0);
    }

    /// The sample was never begun: all that was reserved for it goes back.
    pub fn abandon(&mut self) {
        self.give_back(Amounts {
            input: self.input,
            output: self.slice,
            micros: self.cost(self.input, 0, self.slice),
            ..Amounts::default()
        });
        (self.slice, self.input) = (0, 0);
    }

    /// How long the sample that begins now may take, in milliseconds. `None`: as long as it likes.
    #[must_use]
    pub fn time_left_ms(&self, now_ms: u64) -> Option<u64> {
        let lines = self.lines.iter();
        let left = lines.filter_map(|line| {
            let limit = line.budget.limits.millis;
            let used = line.with(now_ms, |used| used.millis);
            (limit > 0).then(|| limit.saturating_sub(used))
        });
        left.min()
    }
}

impl Drop for Purse {
    /// A sample that ran gives back the rest of its slice.
    fn drop(&mut self) {
        self.give_back(Amounts {
            output: self.slice,
            micros: self.cost(0, 0, self.slice),
            ..Amounts::default()
        });
    }
}

#[cfg(test)]
mod tests;
