//! The forward pass: tokens and the keys and values before them to logits.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{
    Linear, Module as _,
    ops::{rms_norm, softmax_last_dim},
    rotary_emb::rope_thd,
};

use super::{
    LoadError,
    config::{Config, Rotary, Scaling},
    kv::Kv,
    weights::Weights,
};

/// The most attention scores that are computed at once: 64 MiB.
const SCORES_MAX: usize = 16 << 20;

/// A model's weights, in 32-bit floats, and how to compute with them.
pub(super) struct Model {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    output: Linear,
    shape: Shape,
    /// How far one position turns each pair of a head's dimensions.
    turns: Vec<f32>,
    scores_max: usize,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

struct Layer {
    attention_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    qk_norm: Option<(Norm, Norm)>,
    attention_output: Linear,
    mlp_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Norm {
    weight: Tensor,
    eps: f32,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.weight, self.eps)
    }
}

/// Takes what the layers need out of the weights.
struct Loader<'a> {
    config: &'a Config,
    weights: Weights,
}

impl Loader<'_> {
    fn norm(&mut self, name: &str, size: usize) -> std::result::Result<Norm, LoadError> {
        Ok(Norm {
            weight: self.weights.take(&format!("{name}.weight"), &[size])?,
            eps: self.config.rms_norm_eps as f32,
        })
    }

    fn linear(
        &mut self,
        name: &str,
        (from, to): (usize, usize),
        bias: bool,
    ) -> std::result::Result<Linear, LoadError> {
        let weight = self.weights.take(&format!("{name}.weight"), &[to, from])?;
        let bias = match bias {
            true => Some(self.weights.take(&format!("{name}.bias"), &[to])?),
            false => None,
        };
        Ok(Linear::new(weight, bias))
    }

    fn layer(&mut self, index: usize) -> std::result::Result<Layer, LoadError> {
        let Config {
            hidden_size: hidden,
            intermediate_size: inner,
            head_dim,
            qkv_bias,
            output_bias,
            mlp_bias,
            ..
        } = *self.config;
        let q_size = self.config.heads * head_dim;
        let kv_size = self.config.kv_heads * head_dim;
        let at = |part: &str| format!("model.layers.{index}.{part}");
        let qk_norm = match self.config.qk_norm {
            true => Some((
                self.norm(&at("self_attn.q_norm"), head_dim)?,
                self.norm(&at("self_attn.k_norm"), head_dim)?,
            )),
            false => None,
        };
        Ok(Layer {
            attention_norm: self.norm(&at("input_layernorm"), hidden)?,
            q: self.linear(&at("self_attn.q_proj"), (hidden, q_size), qkv_bias)?,
            k: self.linear(&at("self_attn.k_proj"), (hidden, kv_size), qkv_bias)?,
            v: self.linear(&at("self_attn.v_proj"), (hidden, kv_size), qkv_bias)?,
            qk_norm,
            attention_output: self.linear(
                &at("self_attn.o_proj"),
                (q_size, hidden),
                output_bias,
            )?,
            mlp_norm: self.norm(&at("post_attention_layernorm"), hidden)?,
            gate: self.linear(&at("mlp.gate_proj"), (hidden, inner), mlp_bias)?,
            up: self.linear(&at("mlp.up_proj"), (hidden, inner), mlp_bias)?,
            down: self.linear(&at("mlp.down_proj"), (inner, hidden), mlp_bias)?,
        })
    }
}

impl Model {
    pub(super) fn new(config: &Config, weights: Weights) -> std::result::Result<Self, LoadError> {
        let mut loader = Loader { config, weights };
        let vocab = config.vocab_size as usize;
        let embedding = loader
            .weights
            .take("model.embed_tokens.weight", &[vocab, config.hidden_size])?;
        let output = match config.tied {
            true => Linear::new(embedding.clone(), None),
            false => loader.linear("lm_head", (config.hidden_size, vocab), false)?,
        };
        let layers = (0..config.layers)
            .map(|index| loader.layer(index))
            .collect::<std::result::Result<_, _>>()?;
        Ok(Self {
            embedding,
            layers,
            norm: loader.norm("model.norm", config.hidden_size)?,
            output,
            shape: Shape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
            },
            turns: turns(&config.rotary, config.head_dim),
            scores_max: SCORES_MAX,
        })
    }

    /// How many token ids it knows.
    pub(super) fn vocab_size(&self) -> usize {
        self.output.weight().dims()[0]
    }

    /// Computes the tokens behind those that `kv` holds, and appends them to it. Returns what
    /// [`Model::logits`] takes. On an error `kv` is as it was.
    pub(super) fn advance(&self, kv: &mut Kv, tokens: &[u32]) -> Result<Tensor> {
        let positions = kv.len()..kv.len() + tokens.len();
        let angles = self.angles(positions)?;
        kv.make_room(tokens.len())?;
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let attended =
                self.attention(index, &layer.attention_norm.forward(&x)?, kv, &angles)?;
            x = (x + attended)?;
            let normed = layer.mlp_norm.forward(&x)?;
            let gated = (layer.gate.forward(&normed)?.silu()? * layer.up.forward(&normed)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        kv.commit(tokens);
        Ok(x)
    }

    /// The logits for the token behind the last one of an [`Model::advance`].
    pub(super) fn logits(&self, advanced: &Tensor) -> Result<Vec<f32>> {
        let last = advanced.narrow(0, advanced.dim(0)? - 1, 1)?;
        let normed = self.norm.forward(&last.contiguous()?)?;
        self.output.forward(&normed)?.flatten_all()?.to_vec1()
    }

    fn attention(&self, index: usize, x: &Tensor, kv: &Kv, angles: &Angles) -> Result<Tensor> {
        let layer = &self.layers[index];
        let Shape {
            heads,
            kv_heads,
            head_dim,
        } = self.shape;
        let count = x.dim(0)?;
        let mut q = layer.q.forward(x)?.reshape((count, heads, head_dim))?;
        let mut k = layer.k.forward(x)?.reshape((count, kv_heads, head_dim))?;
        let v = layer.v.forward(x)?.reshape((count, kv_heads, head_dim))?;
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            q = q_norm.forward(&q)?;
            k = k_norm.forward(&k)?;
        }
        // Scaling the queries scales the scores, and is less work.
        let q = (angles.turn(&q)? * (1.0 / (head_dim as f64).sqrt()))?;
        let k = angles.turn(&k)?;
        kv.write(index, &k.transpose(0, 1)?, &v.transpose(0, 1)?)?;
        let q = q.transpose(0, 1)?;

        let rows_max = (self.scores_max / (heads * (kv.len() + count))).max(1);
        let mut parts = Vec::new();
        for first in (0..count).step_by(rows_max) {
            let rows = rows_max.min(count - first);
            let seen = kv.layer(index, kv.len() + first + rows)?;
            parts.push(self.attend(&q.narrow(1, first, rows)?, &seen)?);
        }
        layer.attention_output.forward(&joined(parts, 0)?)
    }

    /// What the rows of `q`, of shape `[heads, rows, head_dim]`, take from the values that they
    /// see: the last row sees all of them, each row before it one less.
    fn attend(&self, q: &Tensor, seen: &[(Tensor, Tensor)]) -> Result<Tensor> {
        let Shape {
            heads,
            kv_heads,
            head_dim,
        } = self.shape;
        let rows = q.dim(1)?;
        // The queries that share a key head are neighbours: one product a key head for all of them.
        let grouped = (kv_heads, heads / kv_heads * rows, head_dim);
        let q = q.contiguous()?.reshape(grouped)?;
        let scores = seen
            .iter()
            .map(|(k, _)| q.matmul(&k.t()?))
            .collect::<Result<Vec<_>>>()?;
        let mut scores = joined(scores, 2)?;
        if rows > 1 {
            let all = scores.dim(2)?;
            let by_head = scores.reshape((heads, rows, all))?;
            scores = by_head
                .broadcast_add(&mask(rows, all)?)?
                .reshape(scores.shape())?;
        }
        let weights = softmax_last_dim(&scores)?;
        let mut sum = Tensor::zeros(grouped, DType::F32, &Device::Cpu)?;
        let mut at = 0;
        for (_, v) in seen {
            let held = v.dim(1)?;
            sum = (sum + weights.narrow(2, at, held)?.matmul(v)?)?;
            at += held;
        }
        sum.reshape((heads, rows, head_dim))?
            .transpose(0, 1)?
            .reshape((rows, heads * head_dim))
    }

    /// The angles by which queries and keys at these positions are turned. Computed in 32-bit
    /// floats, as the models were trained.
    fn angles(&self, positions: std::ops::Range<usize>) -> Result<Angles> {
        let shape = (positions.len(), self.turns.len());
        let angles: Vec<f32> = positions
            .flat_map(|position| self.turns.iter().map(move |turn| position as f32 * turn))
            .collect();
        let tensor = |function: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().copied().map(function).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        Ok(Angles {
            cos: tensor(f32::cos)?,
            sin: tensor(f32::sin)?,
        })
    }
}

struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Angles {
    /// Turns the heads of `x`, of shape `[count, heads, head_dim]`: a dimension of the first half
    /// with the one in its place in the second half.
    fn turn(&self, x: &Tensor) -> Result<Tensor> {
        rope_thd(&x.unsqueeze(0)?, &self.cos, &self.sin)?.squeeze(0)
    }
}

fn joined(mut parts: Vec<Tensor>, dim: usize) -> Result<Tensor> {
    match parts.len() {
        1 => Ok(parts.swap_remove(0)),
        _ => Tensor::cat(&parts, dim),
    }
}

/// Minus infinity where a row would see a token behind its own.
fn mask(rows: usize, all: usize) -> Result<Tensor> {
    let values: Vec<f32> = (0..rows)
        .flat_map(|row| {
            (0..all).map(move |at| match at <= all - rows + row {
                true => 0.0,
                false => f32::NEG_INFINITY,
            })
        })
        .collect();
    Tensor::from_vec(values, (rows, all), &Device::Cpu)
}

fn turns(rotary: &Rotary, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|pair| {
            let turn = rotary.theta.powf(-2.0 * pair as f64 / head_dim as f64);
            scaled(turn, &rotary.scaling) as f32
        })
        .collect()
}

fn scaled(turn: f64, scaling: &Scaling) -> f64 {
    match *scaling {
        Scaling::None => turn,
        Scaling::Linear { factor } => turn / factor,
        Scaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            // How often it turns round within the first training's context.
            let rounds = original_context * turn / std::f64::consts::TAU;
            let kept = (rounds - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let kept = kept.clamp(0.0, 1.0);
            turn * (kept + (1.0 - kept) / factor)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::PathBuf};

    use serde::Deserialize;

    use super::*;
    use crate::backend::local::{
        kv::Pool,
        tests::tiny_llama::{FAMILIES, Family, TinyLlama},
    };

    const VOCAB: usize = 64;

    fn load(family: Family) -> (Model, Pool) {
        let dir = tempfile::tempdir().unwrap();
        TinyLlama::new(family, VOCAB).write(dir.path());
        let config = Config::read(dir.path()).unwrap();
        let model = Model::new(&config, Weights::read(dir.path()).unwrap()).unwrap();
        (model, Pool::new(config.kv_layout(8)))
    }

    fn tokens(count: u32) -> Vec<u32> {
        (0..count)
            .map(|at| (at * at + 7 * at + 3) % VOCAB as u32)
            .collect()
    }

    fn assert_near(left: &[f32], right: &[f32], what: &str) {
        assert_eq!(left.len(), right.len());
        for (left, right) in left.iter().zip(right) {
            assert!((left - right).abs() < 1e-4, "{what}: {left} and {right}");
        }
    }

    #[test]
    fn pieces_give_what_the_whole_gives() {
        for family in FAMILIES {
            let (mut model, pool) = load(family);
            let tokens = tokens(75);
            let mut kv = pool.empty();
            let whole = model
                .logits(&model.advance(&mut kv, &tokens).unwrap())
                .unwrap();

            // In pieces that end within blocks, with attention a few rows at a time.
            model.scores_max = 4 * 75 * 3;
            let mut kv = pool.empty();
            let mut rest = &tokens[..];
            for count in [1, 20, 7, 1, 46] {
                let (piece, after) = rest.split_at(count);
                let advanced = model.advance(&mut kv, piece).unwrap();
                rest = after;
                if rest.is_empty() {
                    let pieces = model.logits(&advanced).unwrap();
                    assert_near(&pieces, &whole, &format!("{family:?}"));
                }
            }
            assert_eq!(kv.len(), 75);
        }
    }

    /// What transformers computes with the same weights; `reference.py` wrote it.
    #[derive(Deserialize)]
    struct Reference {
        tokens: Vec<u32>,
        /// By family, then by position.
        logits: HashMap<String, HashMap<usize, Vec<f32>>>,
    }

    #[test]
    fn logits_are_those_of_transformers() {
        let reference: Reference = serde_json::from_str(include_str!("reference.json")).unwrap();
        for family in FAMILIES {
            let (model, pool) = load(family);
            let by_position = &reference.logits[&format!("{family:?}")];
            assert!(!by_position.is_empty());
            for (position, expected) in by_position {
                let mut kv = pool.empty();
                let advanced = model
                    .advance(&mut kv, &reference.tokens[..=*position])
                    .unwrap();
                let logits = model.logits(&advanced).unwrap();
                assert_near(&logits, expected, &format!("{family:?} at {position}"));
            }
        }
    }

    /// Writes the models that `reference.py` reads, into the folder that the environment names.
    #[test]
    #[ignore = "only for a new reference"]
    fn write_reference_models() {
        let root = PathBuf::from(std::env::var_os("TINY_LLAMA_DIR").unwrap());
        for family in FAMILIES {
            let dir = root.join(format!("{family:?}"));
            std::fs::create_dir_all(&dir).unwrap();
            TinyLlama::new(family, VOCAB).write(&dir);
        }
    }
}
