//! What the settings may be, each by itself and together.

use std::ops::RangeInclusive;

use tracing_subscriber::EnvFilter;

use crate::{
    backend::cerebras::CerebrasOptions, billing::Postgres, budget::Per, safety::ClassifierOptions,
};

use super::{Alias, BillingExport, Config, ConfigError, ExportKind, Model, Sim};

const NAME_CHARACTERS_MAX: usize = 128;

/// With less no conversation is worth the name.
const CONTEXT_TOKENS_MIN: u32 = 256;

/// The largest share of a model in a split.
const WEIGHT_MAX: u32 = 1_000_000;

/// Brokers that are asked first. They tell of the others.
const BROKERS_MAX: usize = 64;

/// What Kafka allows.
const TOPIC_CHARACTERS_MAX: usize = 249;

impl Config {
    /// Holds every value against its range, and those that depend on each other together.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        for (key, value, range) in self.ranges() {
            if !range.contains(&value) {
                return Err(ConfigError::Range { key, value, range });
            }
        }
        let conflict = |reason| Err(ConfigError::Conflict { reason });
        if self.request.item_bytes_max > self.server.message_bytes_max {
            return conflict("request.item_bytes_max is over server.message_bytes_max".into());
        }
        if self.stream.go_away_secs >= self.stream.age_secs_max {
            return conflict("stream.go_away_secs is not under stream.age_secs_max".into());
        }
        if let Err(error) = EnvFilter::try_new(&self.log.filter) {
            return conflict(format!("log.filter: {error}"));
        }
        if let Err(reason) = self.routing.check() {
            return conflict(format!("routing.{reason}"));
        }
        for (index, export) in self.billing.export.iter().enumerate() {
            if let Err(reason) = self.check_export(index, export) {
                return conflict(format!("billing.export[{index}].{reason}"));
            }
        }
        self.check_models()?;
        self.check_budgets()?;
        for (index, classifier) in self.safety.classifiers.iter().enumerate() {
            if let Err(reason) = self.check_classifier(index, classifier) {
                return conflict(format!("safety.classifier[{index}].{reason}"));
            }
        }
        for (index, policy) in self.safety.policies.iter().enumerate() {
            if let Err(reason) = policy.check() {
                return conflict(format!("safety.policy[{index}].{reason}"));
            }
            let known = |name: &&String| self.models.iter().any(|model| model.name == **name);
            if let Some(name) = policy.models.iter().find(|name| !known(name)) {
                return conflict(format!(
                    "safety.policy[{index}].models: no model has the name {name}"
                ));
            }
        }
        self.gate()?;
        Ok(())
    }

    fn check_classifier(&self, index: usize, classifier: &ClassifierOptions) -> Result<(), String> {
        classifier.check()?;
        let earlier = &self.safety.classifiers[..index];
        if earlier.iter().any(|other| other.name == classifier.name) {
            return Err("name is that of one before it".to_owned());
        }
        self.check_key(&classifier.key_variable)
    }

    /// The environment has the key that is to be in this variable, where one is named.
    fn check_key(&self, variable: &str) -> Result<(), String> {
        match variable.is_empty() || self.secrets.get(variable).is_some() {
            true => Ok(()),
            false => Err(format!("key_variable: the environment has no {variable}")),
        }
    }

    fn check_export(&self, index: usize, export: &BillingExport) -> Result<(), String> {
        const GIB: u64 = 1 << 30;
        let earlier = &self.billing.export[..index];
        if self.billing.path.is_none() {
            return Err("name: there is nothing to export without billing.path".to_owned());
        }
        if !(1..=NAME_CHARACTERS_MAX).contains(&export.name.len()) {
            return Err(format!("name is not 1 to {NAME_CHARACTERS_MAX} bytes"));
        }
        if earlier.iter().any(|other| other.name == export.name) {
            return Err("name is that of one before it".to_owned());
        }
        match export.kind {
            ExportKind::Jsonl if export.path.as_os_str().is_empty() => {
                return Err("path is missing".to_owned());
            }
            ExportKind::CloudEvents
                if !(export.url.starts_with("http://") || export.url.starts_with("https://")) =>
            {
                return Err("url is no http:// or https:// address".to_owned());
            }
            ExportKind::Postgres => {
                let read = Postgres::check(&export.url);
                read.map_err(|error| format!("url {error}"))?;
            }
            ExportKind::Kafka => check_kafka(export)?,
            ExportKind::Jsonl | ExportKind::CloudEvents => {}
        }
        self.check_key(&export.key_variable)?;
        let same = |other: &BillingExport| {
            (&other.path, &other.url) == (&export.path, &export.url)
                && (&other.brokers, &other.topic) == (&export.brokers, &export.topic)
        };
        if earlier.iter().any(same) {
            return Err("path, url or topic is that of one before it".to_owned());
        }
        let ranges = [
            ("rotate_bytes", export.rotate_bytes, 4096..=1024 * GIB),
            ("attempts_max", export.attempts_max.into(), 1..=1000),
            ("rest_ms_min", export.rest_ms_min, 1..=60_000),
            (
                "rest_ms_max",
                export.rest_ms_max,
                export.rest_ms_min..=3_600_000,
            ),
            ("batch_secs_max", export.batch_secs_max, 1..=600),
        ];
        for (key, value, range) in ranges {
            if !range.contains(&value) {
                let (least, most) = (range.start(), range.end());
                return Err(format!(
                    "{key} is {value}, but must be from {least} to {most}"
                ));
            }
        }
        Ok(())
    }

    fn check_models(&self) -> Result<(), ConfigError> {
        let conflict = |reason| Err(ConfigError::Conflict { reason });
        let models = self.models.iter().map(|model| &model.name);
        let names: Vec<&String> = models
            .chain(self.aliases.iter().map(|it| &it.name))
            .collect();
        for (index, name) in names.iter().enumerate() {
            if names[..index].contains(name) {
                return conflict(format!("two models have the name {name}"));
            }
            let fits = (1..=NAME_CHARACTERS_MAX).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"_.:/-".contains(&byte));
            if !fits {
                return conflict(format!(
                    "the name of a model is not 1 to {NAME_CHARACTERS_MAX} characters of letters, digits, _ . : / -"
                ));
            }
        }
        for model in &self.models {
            if let Some(absent) = model
                .key_variables()
                .iter()
                .find(|it| self.secrets.get(it).is_none())
            {
                return conflict(format!(
                    "model `{}`: the environment has no {absent}, which is to hold the key of an engine",
                    model.name
                ));
            }
            if let Err(reason) = self.check_model(model) {
                return conflict(format!("model `{}`: {reason}", model.name));
            }
        }
        for alias in &self.aliases {
            if let Err(reason) = self.check_alias(alias) {
                return conflict(format!("alias `{}`: {reason}", alias.name));
            }
        }
        match self.models.iter().filter(|model| model.default).count() {
            1 => {}
            0 => return conflict("none of the models has default = true".into()),
            _ => return conflict("more than one of the models has default = true".into()),
        }
        let caches: u64 = self.models.iter().filter_map(Model::cache_bytes_max).sum();
        if caches > self.cache.models_bytes_max {
            return conflict(format!(
                "the models' cache_bytes_max add up to {caches}, over cache.models_bytes_max"
            ));
        }
        Ok(())
    }

    fn check_model(&self, model: &Model) -> Result<(), String> {
        if model
            .context_length
            .is_some_and(|tokens| tokens < CONTEXT_TOKENS_MIN)
        {
            return Err(format!(
                "context_length is under {CONTEXT_TOKENS_MIN} tokens"
            ));
        }
        if let Some(Sim {
            rules: _,
            tokens_per_second,
            first_token_ms,
        }) = &model.sim
        {
            if !(0.0..=1e6).contains(tokens_per_second) {
                return Err("sim.tokens_per_second is not from 0 to 1000000".to_owned());
            }
            if *first_token_ms > 600_000 {
                return Err("sim.first_token_ms is over 600000".to_owned());
            }
        }
        for (index, gpu) in model.gpu.iter().enumerate() {
            gpu.check()
                .map_err(|reason| format!("gpu[{index}].{reason}"))?;
            let earlier = &model.gpu[..index];
            if earlier.iter().any(|other| other.url == gpu.url) {
                return Err(format!("gpu[{index}].url is that of one before it"));
            }
        }
        for (index, service) in model.cerebras.iter().enumerate() {
            let place = format!("cerebras[{index}]");
            service
                .check()
                .map_err(|error| format!("{place}.{error}"))?;
            let earlier = &model.cerebras[..index];
            let same =
                |it: &CerebrasOptions| (&it.url, &it.model) == (&service.url, &service.model);
            if earlier.iter().any(same) {
                return Err(format!("{place}: url and model are those of one before it"));
            }
        }
        if model.takes_tokens() && model.local.is_none() && model.path.is_none() {
            return Err("path is missing: the directory of the tokenizer and template".to_owned());
        }
        // Who takes over, and who after that one: each at most once.
        let mut seen = vec![&model.name];
        let mut next = &model.fallback;
        while let Some(name) = next {
            let Some(other) = self.models.iter().find(|other| other.name == *name) else {
                return Err(format!("fallback: no model has the name {name}"));
            };
            if seen.contains(&name) {
                return Err(format!("fallback: it comes back to {name}"));
            }
            seen.push(name);
            next = &other.fallback;
        }
        Ok(())
    }

    fn check_budgets(&self) -> Result<(), ConfigError> {
        let conflict = |reason| Err(ConfigError::Conflict { reason });
        for (index, budget) in self.budgets.iter().enumerate() {
            if let Err(reason) = budget.check() {
                return conflict(format!("budget[{index}]: {reason}"));
            }
            if self.budgets[..index]
                .iter()
                .any(|other| other.name == budget.name)
            {
                return conflict(format!("two budgets have the name {}", budget.name));
            }
            let retention_secs = self.billing.retention_secs;
            if self.billing.path.is_some()
                && budget.per != Per::Stream
                && budget.window_secs > retention_secs
            {
                return conflict(format!(
                    "budget[{index}]: window_secs {} is over billing.retention_secs {retention_secs}: \
                     a restart would not know what was used",
                    budget.window_secs
                ));
            }
            let known = |name: &String| self.models.iter().any(|model| model.name == *name);
            if let Some(unknown) = budget.models.iter().find(|name| !known(name)) {
                return conflict(format!("budget[{index}]: no model has the name {unknown}"));
            }
            if budget.cost_max > 0.0 && self.prices.is_empty() {
                return conflict(format!(
                    "budget[{index}]: cost_max is set, and there is no price"
                ));
            }
        }
        for (index, price) in self.prices.iter().enumerate() {
            if let Err(reason) = price.check() {
                return conflict(format!("price[{index}]: {reason}"));
            }
            if self.prices[..index]
                .iter()
                .any(|other| other.model == price.model)
            {
                return conflict(format!("two prices are for the model {}", price.model));
            }
            if !self.models.iter().any(|model| model.name == price.model) {
                return conflict(format!(
                    "price[{index}]: no model has the name {}",
                    price.model
                ));
            }
        }
        Ok(())
    }

    fn check_alias(&self, alias: &Alias) -> Result<(), String> {
        if alias.to.is_empty() {
            return Err("it stands for nothing".to_owned());
        }
        for (index, target) in alias.to.iter().enumerate() {
            if !self.models.iter().any(|model| model.name == target.model) {
                return Err(format!(
                    "to[{index}]: no model has the name {}",
                    target.model
                ));
            }
            if !(1..=WEIGHT_MAX).contains(&target.weight) {
                return Err(format!("to[{index}].weight is not from 1 to {WEIGHT_MAX}"));
            }
        }
        Ok(())
    }

    /// Every number, and what it may be. Upper ends are what the code was thought through for, so
    /// that a slip of the keyboard does not become a server that promises what no machine holds.
    #[rustfmt::skip]
    pub(super) fn ranges(&self) -> Vec<(&'static str, u64, RangeInclusive<u64>)> {
        const DAY_SECS: u64 = 24 * 3600;
        const GIB: u64 = 1 << 30;
        let Self { server, stream, request, cache, store, billing, routing: _, safety: _, auth: _, log: _, models: _, aliases: _, budgets: _, prices: _, api_keys: _, secrets: _ } = self;
        let count = |number: usize| number as u64;
        vec![
            // Under 64 KiB a create with a few tools would not fit; a message is held in memory
            // whole, and protobuf's own limit is 2 GiB.
            ("server.message_bytes_max", count(server.message_bytes_max), 64 << 10..=GIB),
            ("server.connections_max", count(server.connections_max), 1..=1_000_000),
            ("server.streams_max", count(server.streams_max), 1..=10_000_000),
            ("server.streams_per_connection_max", server.streams_per_connection_max.into(), 1..=100_000),
            ("server.unary_calls_max", count(server.unary_calls_max), 1..=100_000),
            ("server.unary_secs_max", server.unary_secs_max, 1..=3600),
            ("server.preface_secs_max", server.preface_secs_max, 1..=60),
            ("server.keepalive_secs", server.keepalive_secs, 1..=3600),
            ("server.keepalive_timeout_secs", server.keepalive_timeout_secs, 1..=600),
            ("server.send_buffer_bytes_max", count(server.send_buffer_bytes_max), 16 << 10..=64 << 20),
            ("server.drain_secs_max", server.drain_secs_max, 0..=3600),
            ("stream.age_secs_max", stream.age_secs_max, 1..=7 * DAY_SECS),
            ("stream.go_away_secs", stream.go_away_secs, 0..=DAY_SECS),
            ("stream.lanes_max", count(stream.lanes_max), 1..=10_000),
            ("stream.sampling_max", count(stream.sampling_max), 1..=10_000),
            // Every create waits, if only for a moment.
            ("stream.waiting_max", count(stream.waiting_max), 1..=100_000),
            ("stream.held_secs_max", stream.held_secs_max, 1..=DAY_SECS),
            ("stream.send_secs_max", stream.send_secs_max, 1..=3600),
            // A channel of one costs a wake-up a message: a tenth of the throughput.
            ("stream.events_queued_max", count(stream.events_queued_max), 8..=100_000),
            ("stream.commands_queued_max", count(stream.commands_queued_max), 1..=100_000),
            ("stream.responses_held_max", count(stream.responses_held_max), 1..=1_000_000),
            ("request.items_max", count(request.items_max), 1..=1_000_000),
            ("request.tools_max", count(request.tools_max), 1..=100_000),
            ("request.item_bytes_max", count(request.item_bytes_max), 1024..=GIB),
            ("request.output_tokens_max", request.output_tokens_max.into(), 1..=10_000_000),
            ("cache.parked_bytes_max", cache.parked_bytes_max, 0..=4096 * GIB),
            ("cache.parked_secs_max", cache.parked_secs_max, 1..=7 * DAY_SECS),
            ("cache.parked_share_per_tenant_percent", cache.parked_share_per_tenant_percent.into(), 1..=100),
            ("cache.models_bytes_max", cache.models_bytes_max, 1 << 20..=4096 * GIB),
            ("cache.heads_bytes_max", cache.heads_bytes_max, 0..=4096 * GIB),
            ("cache.artifacts_bytes_max", cache.artifacts_bytes_max, 0..=4096 * GIB),
            ("store.responses_max", store.responses_max, 1..=1_000_000_000),
            ("store.bytes_max", store.bytes_max, 1 << 20..=65_536 * GIB),
            ("store.age_secs_max", store.age_secs_max, 1..=3650 * DAY_SECS),
            ("store.write_queue_bytes_max", count(store.write_queue_bytes_max), 1 << 20..=64 * GIB),
            // A record takes about a KiB while it waits.
            ("billing.backlog_records_max", count(billing.backlog_records_max), 1..=10_000_000),
            ("billing.block_secs_max", billing.block_secs_max, 1..=600),
            ("billing.checkpoint_tokens", billing.checkpoint_tokens, 1..=1_000_000),
            ("billing.checkpoint_ms", billing.checkpoint_ms, 1..=60_000),
            ("billing.retention_secs", billing.retention_secs, 0..=3650 * DAY_SECS),
        ]
    }
}

/// What a sink of Kafka takes.
fn check_kafka(export: &BillingExport) -> Result<(), String> {
    if !(1..=BROKERS_MAX).contains(&export.brokers.len()) {
        return Err(format!("brokers are not 1 to {BROKERS_MAX} addresses"));
    }
    for broker in &export.brokers {
        let parts = broker.rsplit_once(':');
        let fits = |(host, port): (&str, &str)| {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
        };
        if !parts.is_some_and(fits) {
            return Err(format!("brokers: `{broker}` is no host:port"));
        }
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=TOPIC_CHARACTERS_MAX).contains(&export.topic.len())
        && export.topic.bytes().all(allowed)
        && ![".", ".."].contains(&&*export.topic);
    if !fits {
        return Err(format!(
            "topic is not 1 to {TOPIC_CHARACTERS_MAX} characters of letters, digits, . _ -"
        ));
    }
    match (export.user.is_empty(), export.key_variable.is_empty()) {
        (true, false) => Err("user is missing: key_variable is for its password".to_owned()),
        (false, true) => Err("key_variable is missing: it names the password of user".to_owned()),
        (true, true) | (false, false) => Ok(()),
    }
}
