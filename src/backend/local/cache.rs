//! The sequences whose keys and values are kept, and which of them a prompt continues.

use std::{collections::VecDeque, sync::Arc};

use crate::{item::Tenant, ledger::Rope};

use super::kv::{Kv, Pool};

/// The most sequences that are kept. Their number bounds what finding one costs.
const SEQUENCES_MAX: usize = 1024;

/// A prompt is compared with the sequences of other conversations when at least this part of it
/// is new: what that costs is then small beside the work on what is new.
const NEW_PART: usize = 16;

/// Whose a sequence is. Nothing of it is shared with another tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) tenant: Tenant,
    pub(super) affinity: Arc<str>,
}

/// Keys and values of a sequence, and what tells whether a prompt begins like it.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) owner: Owner,
    /// The prompt that it began with. What `kv` holds beyond was sampled; while the prompt is
    /// being computed, `kv` holds less.
    pub(super) prompt: Rope,
    pub(super) kv: Kv,
}

impl Sequence {
    /// How many leading tokens the prompt shares with what is held. Costs what is new since the
    /// two prompts parted.
    fn common_with(&self, prompt: &Rope) -> usize {
        let common = prompt.common_tokens(&self.prompt);
        if common < self.prompt.len_tokens() || self.kv.len() <= common {
            return common.min(self.kv.len());
        }
        common + self.kv.common_from(common, &prompt.tokens_from(common))
    }
}

/// What of a prompt need not be computed.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) kv: Kv,
    /// The kept sequence that the prompt continues to its end: once the prompt's own sequence is
    /// kept, this one holds nothing that the other does not.
    pub(super) continues: Option<u64>,
}

/// The sequences that are kept, within a budget of bytes. The budget counts all keys and values,
/// also those of running samples; only kept ones are given up for it.
#[derive(Debug)]
pub(super) struct Cache {
    pool: Pool,
    bytes_max: usize,
    /// The least recently used first.
    kept: VecDeque<(u64, Sequence)>,
    next_id: u64,
}

impl Cache {
    pub(super) fn new(pool: Pool, bytes_max: usize) -> Self {
        Self {
            pool,
            bytes_max,
            kept: VecDeque::new(),
            next_id: 0,
        }
    }

    /// The longest beginning of the prompt, of at most `len_max` tokens, that a kept or a running
    /// sequence of the tenant holds. Shares its blocks, and leaves it as it is.
    pub(super) fn find<'a>(
        &'a mut self,
        owner: &Owner,
        prompt: &Rope,
        len_max: usize,
        running: impl Iterator<Item = &'a Sequence> + Clone,
    ) -> Found {
        let kept = self.kept.iter().rev();
        let all = running
            .map(|sequence| (None, sequence))
            .chain(kept.map(|(id, sequence)| (Some(*id), sequence)))
            .filter(|(_, sequence)| sequence.owner.tenant == owner.tenant);

        // The most recently used come first: most often the first one is it, and of the others
        // those that are too short to be better are not looked at.
        let mut best = Best::default();
        for (id, sequence) in all.clone() {
            if sequence.owner.affinity == owner.affinity && best.may_be_beaten_by(sequence, len_max)
            {
                best.try_with(id, sequence, sequence.common_with(prompt));
            }
        }
        let new = prompt.len_tokens() - best.common.min(prompt.len_tokens());
        if new > prompt.len_tokens() / NEW_PART {
            let tokens = prompt.tokens_from(0);
            for (id, sequence) in all {
                if sequence.owner.affinity != owner.affinity
                    && best.may_be_beaten_by(sequence, len_max)
                {
                    best.try_with(id, sequence, sequence.kv.common_from(0, &tokens));
                }
            }
        }

        let Some((id, sequence)) = best.sequence else {
            return Found {
                kv: self.pool.empty(),
                continues: None,
            };
        };
        let kv = sequence.kv.prefix(best.common.min(len_max));
        let continues = id.filter(|_| best.common == sequence.kv.len());
        if let Some(id) = id {
            self.touch(id);
        }
        Found { kv, continues }
    }

    /// Keeps a sequence, in place of the one that it continues.
    pub(super) fn keep(&mut self, sequence: Sequence, continues: Option<u64>) {
        if sequence.kv.len() == 0 {
            return;
        }
        let len = sequence.kv.len();
        self.kept
            .retain(|(id, old)| Some(*id) != continues || old.kv.len() > len);
        self.kept.push_back((self.next_id, sequence));
        self.next_id += 1;
        while self.kept.len() > SEQUENCES_MAX {
            self.kept.pop_front();
        }
        self.shrink();
    }

    /// Gives up the ends of the least recently used sequences until the budget is met.
    pub(super) fn shrink(&mut self) {
        while self.pool.used_bytes() > self.bytes_max
            && let Some((_, oldest)) = self.kept.front_mut()
        {
            oldest.kv.drop_last_block();
            if oldest.kv.len() == 0 {
                self.kept.pop_front();
            }
        }
    }

    fn touch(&mut self, id: u64) {
        if let Some(at) = self.kept.iter().position(|(held, _)| *held == id)
            && let Some(entry) = self.kept.remove(at)
        {
            self.kept.push_back(entry);
        }
    }
}

#[derive(Default)]
struct Best<'a> {
    common: usize,
    sequence: Option<(Option<u64>, &'a Sequence)>,
}

impl<'a> Best<'a> {
    fn may_be_beaten_by(&self, sequence: &Sequence, len_max: usize) -> bool {
        self.common < len_max && self.common < sequence.kv.len()
    }

    fn try_with(&mut self, id: Option<u64>, sequence: &'a Sequence, common: usize) {
        if common > self.common {
            *self = Self {
                common,
                sequence: Some((id, sequence)),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::*;
    use crate::{
        backend::local::{kv::KvLayout, tests::device},
        ledger::Draft,
    };

    const LAYOUT: KvLayout = KvLayout {
        layers: 1,
        kv_heads: 1,
        head_dim: 2,
        block_tokens: 4,
        dtype: DType::F32,
    };

    fn rope(from: &Rope, ids: impl IntoIterator<Item = u32>) -> Rope {
        from.with_rendered(Draft {
            ids: ids.into_iter().collect(),
            ..Draft::default()
        })
    }

    fn sequence(pool: &Pool, affinity: &str, prompt: &Rope, sampled: &[u32]) -> Sequence {
        let mut kv = pool.empty();
        let mut tokens = prompt.tokens_from(0);
        tokens.extend(sampled);
        kv.make_room(tokens.len()).unwrap();
        let zeros = Tensor::zeros((1, tokens.len(), 2), DType::F32, &device()).unwrap();
        kv.write(0, &zeros, &zeros).unwrap();
        kv.commit(&tokens);
        Sequence {
            owner: owner(affinity),
            prompt: prompt.clone(),
            kv,
        }
    }

    fn owner(affinity: &str) -> Owner {
        Owner {
            tenant: "one".into(),
            affinity: affinity.into(),
        }
    }

    fn found(cache: &mut Cache, affinity: &str, prompt: &Rope) -> usize {
        let len_max = prompt.len_tokens() - 1;
        cache
            .find(&owner(affinity), prompt, len_max, std::iter::empty())
            .kv
            .len()
    }

    #[test]
    fn a_prompt_finds_the_longest_beginning_whoever_holds_it() {
        let pool = Pool::new(LAYOUT, &device());
        let mut cache = Cache::new(pool.clone(), usize::MAX);
        let root = Rope::default();
        let system = rope(&root, 0..20);
        let first = rope(&system, [100, 101]);
        cache.keep(sequence(&pool, "a", &first, &[102, 103]), None);
        cache.keep(sequence(&pool, "b", &rope(&root, [0, 1, 7]), &[]), None);

        // It continues what was sampled, and parts within it.
        assert_eq!(found(&mut cache, "a", &rope(&first, [102, 103, 9])), 24);
        assert_eq!(found(&mut cache, "a", &rope(&first, [102, 9, 9])), 23);
        // The last token is always computed.
        assert_eq!(found(&mut cache, "a", &first), 21);
        // A fork before the prompt's end, and the same tokens on a ledger of their own.
        assert_eq!(found(&mut cache, "a", &rope(&system, [9])), 20);
        assert_eq!(found(&mut cache, "a", &rope(&root, 0..19)), 18);
        // Another conversation's sequence is better than the little that its own has.
        assert_eq!(found(&mut cache, "b", &rope(&root, 0..30)), 20);
        assert_eq!(found(&mut cache, "new", &rope(&root, 0..30)), 20);
        assert_eq!(found(&mut cache, "new", &rope(&root, [5, 6])), 0);
        // Another tenant finds nothing, and so learns nothing.
        let other = Owner {
            tenant: "two".into(),
            affinity: "a".into(),
        };
        let kv = cache.find(&other, &first, 21, std::iter::empty()).kv;
        assert_eq!(kv.len(), 0);
    }

    #[test]
    fn a_running_sequence_is_found_as_far_as_it_is() {
        let pool = Pool::new(LAYOUT, &device());
        let mut cache = Cache::new(pool.clone(), usize::MAX);
        let prompt = rope(&Rope::default(), 0..20);
        let mut running = sequence(&pool, "a", &prompt, &[]);
        running.kv = running.kv.prefix(11);
        for affinity in ["a", "b"] {
            let found = cache.find(&owner(affinity), &prompt, 19, [&running].into_iter());
            assert_eq!((found.kv.len(), found.continues), (11, None));
        }
    }

    #[test]
    fn a_continuation_takes_the_place_of_what_it_continues() {
        let pool = Pool::new(LAYOUT, &device());
        let mut cache = Cache::new(pool.clone(), usize::MAX);
        let mut prompt = rope(&Rope::default(), 0..8);
        cache.keep(sequence(&pool, "a", &prompt, &[]), None);
        for step in 0..3 {
            prompt = rope(&prompt, [50 + step]);
            let found = cache.find(
                &owner("a"),
                &prompt,
                prompt.len_tokens(),
                std::iter::empty(),
            );
            cache.keep(sequence(&pool, "a", &prompt, &[]), found.continues);
            assert_eq!(cache.kept.len(), 1);
        }
        // A fork continues nothing to its end.
        let fork = rope(&Rope::default(), 0..5);
        let found = cache.find(&owner("a"), &fork, 5, std::iter::empty());
        assert_eq!((found.kv.len(), found.continues), (5, None));
    }

    #[test]
    fn the_budget_takes_from_the_least_recently_used() {
        let pool = Pool::new(LAYOUT, &device());
        let mut cache = Cache::new(pool.clone(), 6 * pool.block_bytes());
        let prompts: Vec<Rope> = (0..3)
            .map(|kind| rope(&Rope::default(), kind * 100..kind * 100 + 12))
            .collect();
        cache.keep(sequence(&pool, "0", &prompts[0], &[]), None);
        cache.keep(sequence(&pool, "1", &prompts[1], &[]), None);
        assert_eq!(pool.used_bytes(), 6 * pool.block_bytes());
        assert_eq!(found(&mut cache, "0", &prompts[0]), 11);
        cache.keep(sequence(&pool, "2", &prompts[2], &[]), None);
        assert_eq!(pool.used_bytes(), 6 * pool.block_bytes());
        assert_eq!(found(&mut cache, "1", &prompts[1]), 0);
        assert_eq!(found(&mut cache, "0", &prompts[0]), 11);
        assert_eq!(found(&mut cache, "2", &prompts[2]), 11);

        // What runs counts, and is not taken from.
        let running = sequence(&pool, "3", &rope(&Rope::default(), 900..908), &[]);
        cache.shrink();
        assert_eq!(pool.used_bytes(), 6 * pool.block_bytes());
        assert_eq!(found(&mut cache, "0", &prompts[0]), 4);
        assert_eq!(running.kv.len(), 8);
    }
}
