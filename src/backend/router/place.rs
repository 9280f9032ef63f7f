//! Where a conversation belongs: pure arithmetic over names, weights and counts.
//!
//! Weighted rendezvous hashing (Thaler and Ravishankar 1998; the weights as in the IETF's draft
//! "Weighted HRW and its applications"): each pair of conversation and replica has a score that
//! depends on nothing else, and the replica with the highest has the conversation. One that comes
//! or goes moves only its own conversations. The hash is SHA-256 of names and a fixed mixing
//! function behind it, so that all servers, in all versions, agree.

use sha2::{Digest as _, Sha256};

/// A conversation, or a replica, as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    /// Of these texts, one after the other; where one ends counts.
    pub(super) fn of(texts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for text in texts {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        Self(first_u64(hash))
    }
}

/// The first eight bytes of a hash, little-endian.
pub(super) fn first_u64(hash: Sha256) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.finalize()[..8]);
    u64::from_le_bytes(bytes)
}

/// The replicas, by position, in the order in which a conversation prefers them. Each is its key
/// and its weight.
pub(super) fn order(
    conversation: Key,
    replicas: impl Iterator<Item = (Key, u32)>,
) -> impl Iterator<Item = usize> {
    let mut scores: Vec<(f64, usize)> = replicas
        .enumerate()
        .map(|(index, (replica, weight))| (score(conversation, replica, weight), index))
        .collect();
    scores.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    scores.into_iter().map(|(_, index)| index)
}

/// The highest of these wins with a probability in proportion to its weight.
fn score(conversation: Key, replica: Key, weight: u32) -> f64 {
    /// One over the count of values that a float tells apart between 0 and 1.
    const STEP: f64 = 1.0 / (1u64 << 53) as f64;
    let bits = mix(conversation.0 ^ mix(replica.0)) >> 11;
    // Between 0 and 1, and neither of them.
    let uniform = (bits as f64 + 0.5) * STEP;
    f64::from(weight) / -uniform.ln()
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014): each bit of its input changes half of
/// its output.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The samples that are in flight on replicas, and how they may be spread: consistent hashing with
/// bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Spread {
    /// In flight on all that are usable.
    pub(super) in_flight: u64,
    /// The weights of those together.
    pub(super) weights: u64,
}

impl Spread {
    /// How many of the samples, with one more, a replica of this weight may have.
    pub(super) fn bound(self, load_factor: f64, weight: u32) -> u64 {
        let share = f64::from(weight) / self.weights.max(1) as f64;
        (load_factor * (self.in_flight + 1) as f64 * share).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: u32 = 10_000;

    fn replica(name: &str, weight: u32) -> (Key, u32) {
        (Key::of(&[name]), weight)
    }

    fn home(key: u32, replicas: &[(Key, u32)]) -> usize {
        let conversation = Key::of(&["tenant", &key.to_string()]);
        order(conversation, replicas.iter().copied())
            .next()
            .unwrap()
    }

    /// How many of the conversations are at home with each replica.
    fn shares(replicas: &[(Key, u32)]) -> Vec<u32> {
        let mut shares = vec![0; replicas.len()];
        for key in 0..KEYS {
            shares[home(key, replicas)] += 1;
        }
        shares
    }

    #[test]
    fn the_order_is_the_same_in_all_versions() {
        let replicas = ["a", "b", "c", "d"].map(|name| replica(name, 1));
        let orders = ["one", "two", "three"].map(|affinity| {
            let conversation = Key::of(&["tenant", affinity]);
            order(conversation, replicas.into_iter()).collect::<Vec<_>>()
        });
        // As another program computes them.
        assert_eq!(orders, [[1, 3, 0, 2], [0, 2, 3, 1], [1, 0, 3, 2]]);
        assert_ne!(Key::of(&["ab", "c"]), Key::of(&["a", "bc"]));
    }

    #[test]
    fn weights_are_kept() {
        let replicas = [replica("a", 1), replica("b", 2), replica("c", 5)];
        for (share, weight) in shares(&replicas).into_iter().zip([1, 2, 5]) {
            let fair = KEYS * weight / 8;
            assert!(share.abs_diff(fair) < fair / 20, "{share} of {fair}");
        }
        let many: Vec<_> = (0..20).map(|n| replica(&format!("r{n}"), 1)).collect();
        for share in shares(&many) {
            assert!(share.abs_diff(KEYS / 20) < KEYS / 200, "{share}");
        }
    }

    #[test]
    fn one_that_comes_or_goes_moves_only_its_own_share() {
        let four: Vec<_> = ["a", "b", "c", "d"].map(|name| replica(name, 1)).into();
        // Where it stands in the list does not matter.
        let mut five = four.clone();
        five.insert(1, replica("e", 1));
        let mut moved = 0_u32;
        for key in 0..KEYS {
            let (before, after) = (four[home(key, &four)], five[home(key, &five)]);
            if before != after {
                assert_eq!(after, five[1]);
                moved += 1;
            }
        }
        assert!(moved.abs_diff(KEYS / 5) < KEYS / 100, "{moved}");
    }

    #[test]
    fn a_heavier_one_takes_and_never_gives() {
        let before = [replica("a", 1), replica("b", 1)];
        let after = [replica("a", 3), replica("b", 1)];
        for key in 0..KEYS {
            assert!(home(key, &before) == 1 || home(key, &after) == 0);
        }
    }

    #[test]
    fn the_bound_is_the_share_of_all_samples_and_somewhat_more() {
        let spread = |in_flight, weights| Spread { in_flight, weights };
        assert_eq!(spread(0, 2).bound(1.25, 1), 1);
        assert_eq!(spread(7, 2).bound(1.25, 1), 5);
        assert_eq!(spread(7, 4).bound(1.25, 3), 8);
        assert_eq!(spread(9, 1).bound(1.0, 1), 10);
        // There is room somewhere, whatever the spread.
        for in_flight in 0..100 {
            let all = spread(in_flight, 6);
            let room: u64 = [1, 2, 3].map(|weight| all.bound(1.0, weight)).iter().sum();
            assert!(room > in_flight);
        }
    }
}
