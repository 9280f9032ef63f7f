//! Prompts that grow step by step are, text and tokens, what a render from scratch gives.
//!
//! Random conversations run through the product's own path, from create to commit, and are held
//! after every prompt against a reference that is computed here from the items alone.

#![allow(
    unreachable_pub,
    clippy::wildcard_enum_match_arm,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what is missing or unforeseen fails the test"
)]

#[path = "render/reference.rs"]
mod reference;
#[path = "render/rollout.rs"]
mod rollout;
#[path = "render/scenarios.rs"]
mod scenarios;
mod support;

use std::sync::atomic::Ordering;

use proptest::{
    prelude::*,
    test_runner::{TestRng, TestRunner},
};
use rollout::{Prompts, Rollout, step};
use support::families::family;

/// Runs random conversations of a family.
fn rollouts(name: &str) {
    let cases = std::env::var("HOTLOOP_RENDER_CASES").ok();
    let config = ProptestConfig {
        cases: cases.as_ref().and_then(|it| it.parse().ok()).unwrap_or(150),
        failure_persistence: None,
        max_shrink_iters: 3_000,
        ..ProptestConfig::default()
    };
    let family = family(name);
    let prompts = Prompts::default();
    let steps = prop::collection::vec(step(), 1..7);
    // The same conversations every time, unless more of them are asked for.
    let mut runner = if cases.is_none() {
        let rng = TestRng::deterministic_rng(config.rng_algorithm);
        TestRunner::new_with_rng(config, rng)
    } else {
        TestRunner::new(config)
    };
    let run = runner.run(&steps, |steps| {
        Rollout::new(family, &prompts).run(&steps);
        Ok(())
    });
    run.unwrap_or_else(|error| panic!("{error}"));
    // The conversations reach what they are meant to reach.
    let [all, whole, extend] =
        [&prompts.all, &prompts.whole, &prompts.extend].map(|count| count.load(Ordering::Relaxed));
    assert!(
        whole * 10 > all,
        "{whole} of {all} prompts were held against the crate"
    );
    assert!(
        extend * 100 > all,
        "{extend} of {all} prompts extend the ones before"
    );
}

macro_rules! rollouts {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            rollouts(stringify!($name));
        }
    )*};
}

rollouts!(chatml_tools chatml_strip_reasoning llama3 mistral harmony phi_like);
