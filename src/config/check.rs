//! What the settings may be, each by itself and together.

use std::ops::RangeInclusive;

use tracing_subscriber::EnvFilter;

use super::{Config, ConfigError, Model};

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
        self.check_models()?;
        self.gate()?;
        Ok(())
    }

    fn check_models(&self) -> Result<(), ConfigError> {
        let conflict = |reason| Err(ConfigError::Conflict { reason });
        for (index, model) in self.models.iter().enumerate() {
            let earlier = self.models.iter().take(index);
            if earlier.into_iter().any(|other| other.name == model.name) {
                return conflict(format!("two models have the name {}", model.name));
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

    /// Every number, and what it may be. Upper ends are what the code was thought through for, so
    /// that a slip of the keyboard does not become a server that promises what no machine holds.
    #[rustfmt::skip]
    pub(super) fn ranges(&self) -> Vec<(&'static str, u64, RangeInclusive<u64>)> {
        const DAY_SECS: u64 = 24 * 3600;
        const GIB: u64 = 1 << 30;
        let Self { server, stream, request, cache, store, auth: _, log: _, models: _, api_keys: _ } = self;
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
        ]
    }
}
