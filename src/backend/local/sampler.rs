//! From logits to a token.

use std::{cmp::Ordering, collections::BTreeMap};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::guide::{Guide, Stuck};
use crate::{
    backend::{SampleEnd, Sampling},
    item::TokenLogprob,
};

/// The sampler of one response: the same logits and the same seed give the same tokens.
#[derive(Debug)]
pub(super) struct Sampler {
    sampling: Sampling,
    tokens_left: usize,
    sampled: BTreeMap<u32, u32>,
    random: StdRng,
    guide: Option<Guide>,
}

/// A sampled token.
#[derive(Debug, PartialEq)]
pub(super) struct Sampled {
    pub(super) token: u32,
    pub(super) logprob: Option<TokenLogprob>,
    /// Why it is the last one, if it is.
    pub(super) end: Option<SampleEnd>,
}

/// Why no token can be chosen.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SampleError {
    /// The logits are not numbers to choose by: one is NaN, or the largest is infinite.
    #[error("the logits are not finite numbers")]
    BadLogits,
    /// There is none that keeps to the grammar.
    #[error(transparent)]
    Stuck(#[from] Stuck),
}

impl Sampler {
    /// At most `tokens_max` tokens are sampled, and at most what the sampling says. All keep to
    /// the guide.
    pub(super) fn new(sampling: Sampling, tokens_max: usize, guide: Option<Guide>) -> Self {
        Self {
            guide,
            tokens_left: tokens_max.min(sampling.max_tokens as usize),
            random: StdRng::seed_from_u64(sampling.seed.unwrap_or_else(rand::random)),
            sampled: BTreeMap::new(),
            sampling,
        }
    }

    /// Chooses a token. Log probabilities are those of the model, whatever the sampling does to
    /// its logits.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<Sampled, SampleError> {
        let mut adjusted = self.adjusted(logits);
        // After bias and penalties: nothing allows what the grammar forbids.
        if let Some(guide) = &mut self.guide {
            guide.mask(&mut adjusted)?;
        }
        for logits in [logits, &adjusted] {
            if logits.iter().any(|logit| logit.is_nan()) || !max(logits).is_finite() {
                return Err(SampleError::BadLogits);
            }
        }
        let token = match self.sampling.temperature {
            0.0 => argmax(&adjusted),
            temperature => self.draw(candidates(
                &adjusted,
                f64::from(temperature),
                &self.sampling,
            )),
        };
        *self.sampled.entry(token).or_default() += 1;
        self.tokens_left = self.tokens_left.saturating_sub(1);
        let end = if self.sampling.end_tokens.contains(&token) {
            Some(SampleEnd::Stop)
        } else if self.tokens_left == 0 {
            Some(SampleEnd::Length)
        } else {
            None
        };
        if let Some(guide) = self.guide.as_mut().filter(|_| end.is_none()) {
            guide.advance(token)?;
        }
        let top = self.sampling.top_logprobs;
        Ok(Sampled {
            token,
            logprob: top.map(|count| logprob(logits, token, count as usize)),
            end,
        })
    }

    /// The logits with bias and penalties. They count for the likeliest token as well.
    fn adjusted(&self, logits: &[f32]) -> Vec<f32> {
        let Sampling {
            logit_bias,
            presence_penalty,
            frequency_penalty,
            ..
        } = &self.sampling;
        let mut logits = logits.to_vec();
        for (token, bias) in logit_bias.iter() {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        for (token, count) in &self.sampled {
            logits[*token as usize] -= presence_penalty + frequency_penalty * *count as f32;
        }
        logits
    }

    fn draw(&mut self, candidates: Vec<Candidate>) -> u32 {
        let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
        let mut left = self.random.random::<f64>() * total;
        let mut chosen = 0;
        for Candidate { token, weight } in candidates {
            // The last one with any weight is chosen where rounding leaves something over.
            if weight > 0.0 {
                chosen = token;
                left -= weight;
                if left < 0.0 {
                    break;
                }
            }
        }
        chosen
    }
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    /// In proportion to its probability.
    weight: f64,
}

impl Candidate {
    /// The likelier first; of equals the lower id.
    fn order(&self, other: &Self) -> Ordering {
        let by_weight = other.weight.total_cmp(&self.weight);
        by_weight.then(self.token.cmp(&other.token))
    }
}

/// The tokens that may be drawn: the `top_k` likeliest, and of these the fewest that make up `top_p`.
fn candidates(logits: &[f32], temperature: f64, sampling: &Sampling) -> Vec<Candidate> {
    let max = f64::from(max(logits));
    let mut candidates: Vec<Candidate> = (0..)
        .zip(logits)
        .map(|(token, logit)| Candidate {
            token,
            weight: ((f64::from(*logit) - max) / temperature).exp(),
        })
        .collect();
    let top_k = sampling.top_k as usize;
    if top_k > 0 {
        keep_first(&mut candidates, top_k);
    }
    if sampling.top_p < 1.0 {
        keep_nucleus(&mut candidates, f64::from(sampling.top_p));
    }
    candidates
}

/// Keeps the first `count` in order, in order.
fn keep_first(candidates: &mut Vec<Candidate>, count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, Candidate::order);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(Candidate::order);
}

fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f64) {
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    // All that are lighter than this weigh less than what `top_p` leaves, even together: they
    // are never part of the nucleus, and most of a vocabulary need not be sorted.
    let lightest = total * (1.0 - top_p) / candidates.len() as f64;
    candidates.retain(|candidate| candidate.weight >= lightest);
    candidates.sort_unstable_by(Candidate::order);
    let mut sum = 0.0;
    let before = candidates
        .iter()
        .take_while(|candidate| {
            let needed = sum < top_p * total;
            sum += candidate.weight;
            needed
        })
        .count();
    candidates.truncate(before.max(1));
}

fn max(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The token of the highest logit; of equals the lowest id.
fn argmax(logits: &[f32]) -> u32 {
    let (mut best, mut highest) = (0, f32::NEG_INFINITY);
    for (token, logit) in (0..).zip(logits) {
        if *logit > highest {
            (best, highest) = (token, *logit);
        }
    }
    best
}

fn logprob(logits: &[f32], token: u32, top: usize) -> TokenLogprob {
    let max = f64::from(max(logits));
    let sum: f64 = logits
        .iter()
        .map(|logit| (f64::from(*logit) - max).exp())
        .sum();
    let norm = max + sum.ln();
    let of = |token: u32| (f64::from(logits[token as usize]) - norm) as f32;
    let mut likeliest: Vec<Candidate> = (0..)
        .zip(logits)
        .map(|(token, logit)| Candidate {
            token,
            weight: f64::from(*logit),
        })
        .collect();
    keep_first(&mut likeliest, top);
    TokenLogprob {
        token,
        logprob: of(token),
        top: likeliest
            .iter()
            .map(|candidate| (candidate.token, of(candidate.token)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32) -> Sampling {
        Sampling {
            temperature,
            ..Sampling::greedy(1000)
        }
    }

    fn draws(sampling: &Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let sampling = Sampling {
            max_tokens: u32::MAX,
            ..sampling.clone()
        };
        let mut sampler = Sampler::new(sampling, usize::MAX, None);
        let mut draw = || sampler.sample(logits).unwrap().token;
        (0..count).map(|_| draw()).collect()
    }

    fn distinct(mut tokens: Vec<u32>) -> Vec<u32> {
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn greedy_takes_the_likeliest_and_of_equals_the_lowest() {
        assert_eq!(draws(&sampling(0.0), &[1.0, 3.0, 2.0, 3.0], 2), [1, 1]);
    }

    #[test]
    fn bias_and_penalties_count_also_without_temperature() {
        let biased = Sampling {
            logit_bias: [(0, 3.0), (9999, 100.0)].into(),
            ..sampling(0.0)
        };
        assert_eq!(draws(&biased, &[1.0, 3.0, 2.0], 1), [0]);
        let present = Sampling {
            presence_penalty: 1.5,
            ..sampling(0.0)
        };
        assert_eq!(draws(&present, &[1.0, 3.0, 2.0], 5), [1, 2, 1, 1, 1]);
        let frequent = Sampling {
            frequency_penalty: 0.75,
            ..sampling(0.0)
        };
        assert_eq!(draws(&frequent, &[1.0, 3.0, 2.0], 5), [1, 1, 2, 1, 2]);
    }

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            const COUNT: usize = 20_000;
            let drawn = draws(&sampling(temperature), &logits, COUNT);
            let weights = logits.map(|logit| (logit / temperature).exp());
            let total: f32 = weights.iter().sum();
            for (token, weight) in (0..).zip(weights) {
                let share = drawn.iter().filter(|drawn| **drawn == token).count();
                let share = share as f32 / COUNT as f32;
                assert!((share - weight / total).abs() < 0.015, "{token}: {share}");
            }
        }
    }

    #[test]
    fn top_k_and_top_p_leave_the_likeliest() {
        let logits = [0.4f32, 0.1, 0.2, 0.05, 0.25].map(f32::ln);
        let of = |top_k, top_p| {
            let sampling = Sampling {
                top_k,
                top_p,
                ..sampling(1.0)
            };
            distinct(draws(&sampling, &logits, 2000))
        };
        assert_eq!(of(0, 1.0), [0, 1, 2, 3, 4]);
        assert_eq!(of(2, 1.0), [0, 4]);
        assert_eq!(of(99, 1.0), [0, 1, 2, 3, 4]);
        assert_eq!(of(0, 0.3), [0]);
        assert_eq!(of(0, 0.6), [0, 4]);
        assert_eq!(of(0, 0.84), [0, 2, 4]);
        assert_eq!(of(0, 0.94), [0, 1, 2, 4]);
        // Of the two that are left by top-k, 0.4 is 62 %.
        assert_eq!(of(2, 0.6), [0]);
        assert_eq!(of(2, 0.65), [0, 4]);
    }

    #[test]
    fn seeds_reproduce() {
        let logits: Vec<f32> = (0..50).map(|token| (token % 7) as f32 / 3.0).collect();
        let of = |seed| {
            let sampling = Sampling {
                seed: Some(seed),
                ..sampling(1.0)
            };
            draws(&sampling, &logits, 20)
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn log_probabilities_are_the_models_own() {
        let shares = [0.1f32, 0.5, 0.15, 0.25];
        let logits = shares.map(|share| share.ln() + 3.0);
        let sampling = Sampling {
            top_logprobs: Some(2),
            logit_bias: [(0, 100.0)].into(),
            ..sampling(0.0)
        };
        let sampled = Sampler::new(sampling, 9, None).sample(&logits).unwrap();
        let logprob = sampled.logprob.unwrap();
        let near = |found: f32, share: f32| (found - share.ln()).abs() < 1e-5;
        assert!(logprob.token == 0 && near(logprob.logprob, 0.1));
        let [(1, first), (3, second)] = logprob.top[..] else {
            panic!("{:?}", logprob.top);
        };
        assert!(near(first, 0.5) && near(second, 0.25));
    }

    #[test]
    fn a_sample_ends_at_an_end_token_or_when_its_tokens_are_used_up() {
        let ends = |sampling: Sampling, tokens_max, logits: &[f32]| {
            let mut sampler = Sampler::new(sampling, tokens_max, None);
            [(); 2].map(|()| sampler.sample(logits).unwrap().end)
        };
        let stops = Sampling {
            end_tokens: [7, 1].into(),
            ..Sampling::greedy(1)
        };
        assert_eq!(ends(stops, 9, &[0.0, 1.0])[0], Some(SampleEnd::Stop));
        let length = Some(SampleEnd::Length);
        assert_eq!(ends(Sampling::greedy(2), 9, &[0.0, 1.0]), [None, length]);
        assert_eq!(ends(Sampling::greedy(9), 2, &[0.0, 1.0]), [None, length]);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let sampled = Sampler::new(sampling(1.0), 9, None).sample(&[0.0, bad, 1.0]);
            assert_eq!(sampled, Err(SampleError::BadLogits));
        }
        let never = draws(&sampling(1.0), &[f32::NEG_INFINITY, 0.0], 50);
        assert_eq!(distinct(never), [1]);
    }
}
