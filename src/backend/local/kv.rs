//! Keys and values of a sequence of tokens, in blocks that sequences share.
//!
//! A clone shares all blocks. Only the end of a sequence is ever written, and only in a block
//! that no other sequence holds: a shared one is copied first. So a fork leaves what it came
//! from as it was, and what two sequences share is in memory once.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{DType, Device, Result, Tensor};

/// What a token takes, and how tokens are grouped.
#[derive(Debug, Clone, Copy)]
pub(super) struct KvLayout {
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) block_tokens: usize,
    pub(super) dtype: DType,
}

impl KvLayout {
    fn block_bytes(&self) -> usize {
        let floats = 2 * self.layers * self.kv_heads * self.head_dim * self.block_tokens;
        floats * self.dtype.size_in_bytes()
    }
}

/// Where blocks come from. It knows how many bytes all of them take.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    layout: KvLayout,
    device: Device,
    used: Arc<AtomicUsize>,
}

impl Pool {
    /// Blocks in the memory of `device`.
    pub(super) fn new(layout: KvLayout, device: &Device) -> Self {
        Self {
            layout,
            device: device.clone(),
            used: Arc::default(),
        }
    }

    /// Keys and values of no tokens.
    pub(super) fn empty(&self) -> Kv {
        Kv {
            pool: self.clone(),
            blocks: Vec::new(),
            tokens: Vec::new(),
        }
    }

    pub(super) fn block_bytes(&self) -> usize {
        self.layout.block_bytes()
    }

    /// What all blocks take, each counted once however many sequences share it.
    pub(super) fn used_bytes(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn block(&self) -> Result<Block> {
        let layout = &self.layout;
        let shape = (layout.kv_heads, layout.block_tokens, layout.head_dim);
        let zeros = || Tensor::zeros(shape, layout.dtype, &self.device);
        let layers = (0..layout.layers)
            .map(|_| Ok((zeros()?, zeros()?)))
            .collect::<Result<_>>()?;
        self.used.fetch_add(layout.block_bytes(), Ordering::Relaxed);
        Ok(Block {
            layers,
            pool: self.clone(),
        })
    }
}

/// Keys and values of `block_tokens` positions, one pair a layer, each of shape
/// `[kv_heads, block_tokens, head_dim]`.
#[derive(Debug)]
struct Block {
    layers: Vec<(Tensor, Tensor)>,
    pool: Pool,
}

impl Drop for Block {
    fn drop(&mut self) {
        let bytes = self.pool.block_bytes();
        self.pool.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Block {
    /// A block of its own with the first `len` positions of this one.
    fn copied(&self, len: usize) -> Result<Self> {
        let copy = self.pool.block()?;
        for ((from_k, from_v), (to_k, to_v)) in self.layers.iter().zip(&copy.layers) {
            to_k.slice_set(&from_k.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
            to_v.slice_set(&from_v.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
        }
        Ok(copy)
    }
}

/// Keys and values of a sequence of tokens. A clone shares them.
///
/// Appending goes layer by layer: [`Kv::make_room`], then [`Kv::write`] for each layer, which
/// can be read at once, then [`Kv::commit`]. What is not committed is as if never written.
#[derive(Debug, Clone)]
pub(super) struct Kv {
    pool: Pool,
    blocks: Vec<Arc<Block>>,
    tokens: Vec<u32>,
}

impl Kv {
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// How many of `tokens` stand here from position `first` on.
    pub(super) fn common_from(&self, first: usize, tokens: &[u32]) -> usize {
        let held = self.tokens.get(first..).unwrap_or_default();
        held.iter()
            .zip(tokens)
            .take_while(|(held, token)| held == token)
            .count()
    }

    /// The first `len` tokens of this. Shares all blocks, and copies four bytes a token.
    pub(super) fn prefix(&self, len: usize) -> Self {
        let len = len.min(self.len());
        Self {
            pool: self.pool.clone(),
            blocks: self.blocks[..self.blocks_of(len)].to_vec(),
            tokens: self.tokens[..len].to_vec(),
        }
    }

    /// Gives up the last block.
    pub(super) fn drop_last_block(&mut self) {
        let kept = self.blocks_of(self.len()).saturating_sub(1);
        self.blocks.truncate(kept);
        self.tokens.truncate(kept * self.pool.layout.block_tokens);
    }

    /// Makes the places behind the last token writable, for `count` tokens.
    pub(super) fn make_room(&mut self, count: usize) -> Result<()> {
        let len = self.len();
        self.blocks.truncate(self.blocks_of(len));
        let in_last = len % self.pool.layout.block_tokens;
        if in_last > 0
            && let Some(last) = self.blocks.last_mut()
            && Arc::get_mut(last).is_none()
        {
            *last = Arc::new(last.copied(in_last)?);
        }
        while self.blocks.len() < self.blocks_of(len + count) {
            self.blocks.push(Arc::new(self.pool.block()?));
        }
        Ok(())
    }

    /// Writes a layer's keys and values behind the last token, of shape
    /// `[kv_heads, count, head_dim]`. There must be room.
    pub(super) fn write(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let size = self.pool.layout.block_tokens;
        let count = k.dim(1)?;
        let mut done = 0;
        while done < count {
            let at = self.len() + done;
            let part = (size - at % size).min(count - done);
            let (to_k, to_v) = &self.blocks[at / size].layers[layer];
            to_k.slice_set(&k.narrow(1, done, part)?.contiguous()?, 1, at % size)?;
            to_v.slice_set(&v.narrow(1, done, part)?.contiguous()?, 1, at % size)?;
            done += part;
        }
        Ok(())
    }

    /// A layer's keys and values of the first `len` places, block by block, those that were
    /// written and not committed included.
    pub(super) fn layer(&self, layer: usize, len: usize) -> Result<Vec<(Tensor, Tensor)>> {
        let size = self.pool.layout.block_tokens;
        self.blocks[..self.blocks_of(len)]
            .iter()
            .enumerate()
            .map(|(index, block)| {
                let held = (len - index * size).min(size);
                let (k, v) = &block.layers[layer];
                Ok((k.narrow(1, 0, held)?, v.narrow(1, 0, held)?))
            })
            .collect()
    }

    /// The tokens whose keys and values were written in all layers are part of the sequence.
    pub(super) fn commit(&mut self, tokens: &[u32]) {
        debug_assert!(self.blocks_of(self.len() + tokens.len()) <= self.blocks.len());
        self.tokens.extend_from_slice(tokens);
    }

    fn blocks_of(&self, len: usize) -> usize {
        len.div_ceil(self.pool.layout.block_tokens)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::local::tests::device;

    const LAYOUT: KvLayout = KvLayout {
        layers: 2,
        kv_heads: 2,
        head_dim: 2,
        block_tokens: 4,
        dtype: DType::F32,
    };

    /// Every position holds its token's number, so that what is read tells what was written.
    fn append(kv: &mut Kv, tokens: &[u32]) {
        kv.make_room(tokens.len()).unwrap();
        // A GPU takes no tensor of nothing.
        let layers = if tokens.is_empty() { 0 } else { LAYOUT.layers };
        for layer in 0..layers {
            let values = Tensor::new(tokens, &device()).unwrap();
            let values = values.to_dtype(DType::F32).unwrap();
            let k = values
                .reshape((1, tokens.len(), 1))
                .and_then(|k| k.broadcast_as((LAYOUT.kv_heads, tokens.len(), LAYOUT.head_dim)))
                .unwrap();
            let v = (&k + layer as f64).unwrap();
            kv.write(layer, &k, &v).unwrap();
        }
        kv.commit(tokens);
    }

    fn read(kv: &Kv, layer: usize) -> Vec<f32> {
        let mut tokens = Vec::new();
        for (k, v) in kv.layer(layer, kv.len()).unwrap() {
            let k: Vec<Vec<Vec<f32>>> = k.to_vec3().unwrap();
            let v: Vec<Vec<Vec<f32>>> = v.to_vec3().unwrap();
            for position in 0..k[0].len() {
                let value = k[0][position][0];
                for head in 0..LAYOUT.kv_heads {
                    assert_eq!(k[head][position], [value; 2]);
                    assert_eq!(v[head][position], [value + layer as f32; 2]);
                }
                tokens.push(value);
            }
        }
        tokens
    }

    proptest! {
        /// Any sequence of appends, forks and cuts reads as plain vectors would, and all memory
        /// is given back.
        #[test]
        fn sequences_are_independent(
            steps in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, 0usize..9, any::<bool>()), 1..25),
        ) {
            let pool = Pool::new(LAYOUT, &device());
            let mut sequences = vec![(pool.empty(), Vec::<u32>::new())];
            let mut next = 0;
            for (which, keep, count, in_place) in steps {
                let which = which.index(sequences.len());
                let (kv, model) = &sequences[which];
                let keep = if in_place { model.len() } else { keep };
                let mut kv = kv.prefix(keep);
                let mut model = model[..keep.min(model.len())].to_vec();
                if in_place {
                    sequences.remove(which);
                }
                let fresh: Vec<u32> = (next..next + count as u32).collect();
                next += 100;
                append(&mut kv, &fresh);
                model.extend(fresh);
                sequences.push((kv, model));
            }
            for (kv, model) in &sequences {
                prop_assert_eq!(kv.common_from(0, model), model.len());
                for layer in 0..LAYOUT.layers {
                    let expected: Vec<f32> = model.iter().map(|token| *token as f32).collect();
                    prop_assert_eq!(read(kv, layer), expected);
                }
            }
            drop(sequences);
            prop_assert_eq!(pool.used_bytes(), 0);
        }
    }

    #[test]
    fn a_fork_takes_memory_only_for_what_is_its_own() {
        let pool = Pool::new(LAYOUT, &device());
        let block = pool.block_bytes();
        let mut one = pool.empty();
        append(&mut one, &[1, 2, 3, 4, 5]);
        assert_eq!(pool.used_bytes(), 2 * block);
        let mut two = one.clone();
        assert_eq!(pool.used_bytes(), 2 * block);
        append(&mut two, &[6]);
        assert_eq!(pool.used_bytes(), 3 * block);
        append(&mut one, &[7]);
        assert_eq!(pool.used_bytes(), 3 * block);
        assert_eq!(read(&one, 1), [1., 2., 3., 4., 5., 7.]);
        assert_eq!(read(&two, 1), [1., 2., 3., 4., 5., 6.]);
    }

    #[test]
    fn what_is_not_committed_is_not_there() {
        let pool = Pool::new(LAYOUT, &device());
        let mut kv = pool.empty();
        append(&mut kv, &[1, 2]);
        kv.make_room(9).unwrap();
        append(&mut kv, &[3]);
        assert_eq!(read(&kv, 0), [1., 2., 3.]);
        assert_eq!(pool.used_bytes(), pool.block_bytes());
    }

    #[test]
    fn the_last_block_goes_first() {
        let pool = Pool::new(LAYOUT, &device());
        let mut kv = pool.empty();
        append(&mut kv, &[1, 2, 3, 4, 5]);
        kv.drop_last_block();
        assert_eq!(read(&kv, 0), [1., 2., 3., 4.]);
        kv.drop_last_block();
        kv.drop_last_block();
        assert_eq!((kv.len(), pool.used_bytes()), (0, 0));
    }
}
