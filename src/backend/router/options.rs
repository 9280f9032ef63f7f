//! What may be set of a router.

use std::{fmt, ops::RangeInclusive, time::Duration};

use serde::{Deserialize, Serialize};

/// How samples are spread over replicas, and what happens when one breaks. In the file:
/// `[routing]`, for all models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoutingOptions {
    /// How far over its share of all samples in flight a replica may be before conversations whose
    /// cache it holds go elsewhere: 1.25 is a quarter. Default 1.25, from 1 to 10.
    pub load_factor: f64,
    /// Replicas that one sample is tried on, hedges and continuations included. Default 3, from 1 to 16.
    pub attempts_max: u32,
    /// Failures in a row after which a replica is left alone for a while. Default 3, from 1 to 1,000.
    pub failures_max: u32,
    /// How long it is left alone the first time, in milliseconds; twice as long with each failure
    /// more. Default 500, from 1 to 3,600,000.
    pub open_ms_min: u64,
    /// The longest that it is left alone, in milliseconds. Default 30,000, from `open_ms_min` to 3,600,000.
    pub open_ms_max: u64,
    /// How long a replica may take to its first token before a second one is given the same prompt,
    /// in milliseconds; the first to answer is taken. Default 0: no second one. To 600,000, and
    /// under `first_token_ms_max` where that is set.
    pub hedge_ms: u64,
    /// How long a replica may take to its first token before it counts as failed, in milliseconds.
    /// Default 0: as long as it likes. To 3,600,000.
    pub first_token_ms_max: u64,
}

impl Default for RoutingOptions {
    fn default() -> Self {
        Self {
            load_factor: 1.25,
            attempts_max: 3,
            failures_max: 3,
            open_ms_min: 500,
            open_ms_max: 30_000,
            hedge_ms: 0,
            first_token_ms_max: 0,
        }
    }
}

const HOUR_MS: u64 = 3_600_000;
const HEDGE_MS_MAX: u64 = 600_000;

impl RoutingOptions {
    /// How long a replica is left alone.
    pub(super) fn pauses(&self) -> RangeInclusive<Duration> {
        Duration::from_millis(self.open_ms_min)..=Duration::from_millis(self.open_ms_max)
    }

    /// Holds every value against its range, and those that depend on each other together.
    ///
    /// # Errors
    ///
    /// Which field is wrong, and what it may be.
    pub fn check(&self) -> Result<(), String> {
        within("load_factor", self.load_factor, 1.0..=10.0)?;
        within("attempts_max", self.attempts_max, 1..=16)?;
        within("failures_max", self.failures_max, 1..=1_000)?;
        within("open_ms_min", self.open_ms_min, 1..=HOUR_MS)?;
        within("open_ms_max", self.open_ms_max, self.open_ms_min..=HOUR_MS)?;
        within("hedge_ms", self.hedge_ms, 0..=HEDGE_MS_MAX)?;
        within("first_token_ms_max", self.first_token_ms_max, 0..=HOUR_MS)?;
        if self.first_token_ms_max != 0 && self.hedge_ms >= self.first_token_ms_max {
            return Err(format!(
                "hedge_ms is {}, and must be under first_token_ms_max, {}",
                self.hedge_ms, self.first_token_ms_max
            ));
        }
        Ok(())
    }

    /// `None`: there are no second ones.
    pub(super) fn hedge_after(&self) -> Option<Duration> {
        unless_zero(self.hedge_ms)
    }

    /// `None`: there is no limit.
    pub(super) fn first_token_time_max(&self) -> Option<Duration> {
        unless_zero(self.first_token_ms_max)
    }
}

fn unless_zero(millis: u64) -> Option<Duration> {
    (millis != 0).then(|| Duration::from_millis(millis))
}

fn within<T: PartialOrd + fmt::Display>(
    field: &str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), String> {
    if range.contains(&value) {
        return Ok(());
    }
    let (start, end) = (range.start(), range.end());
    Err(format!(
        "{field} is {value}, and may be from {start} to {end}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_held_against_its_range() {
        let check = |file: &str| {
            let options: RoutingOptions = toml::from_str(file).unwrap();
            options.check().err()
        };
        let wrong = |file: &str| check(file).unwrap();
        assert_eq!(check(""), None);
        assert_eq!(check("load_factor = 2\nhedge_ms = 40"), None);
        assert_eq!(
            wrong("load_factor = 0.5"),
            "load_factor is 0.5, and may be from 1 to 10"
        );
        assert_eq!(
            wrong("load_factor = nan"),
            "load_factor is NaN, and may be from 1 to 10"
        );
        assert_eq!(
            wrong("attempts_max = 0"),
            "attempts_max is 0, and may be from 1 to 16"
        );
        assert_eq!(
            wrong("failures_max = 0"),
            "failures_max is 0, and may be from 1 to 1000"
        );
        assert_eq!(
            wrong("open_ms_min = 0"),
            "open_ms_min is 0, and may be from 1 to 3600000"
        );
        assert_eq!(
            wrong("open_ms_min = 20\nopen_ms_max = 10"),
            "open_ms_max is 10, and may be from 20 to 3600000"
        );
        assert_eq!(
            wrong("hedge_ms = 600001"),
            "hedge_ms is 600001, and may be from 0 to 600000"
        );
        assert_eq!(
            wrong("first_token_ms_max = 3600001"),
            "first_token_ms_max is 3600001, and may be from 0 to 3600000"
        );
        assert_eq!(
            wrong("hedge_ms = 50\nfirst_token_ms_max = 50"),
            "hedge_ms is 50, and must be under first_token_ms_max, 50"
        );
        assert!(toml::from_str::<RoutingOptions>("hedge = 1").is_err());
    }
}
