//! Tiny models with random weights, as Hugging Face model directories.
//!
//! What they say makes no sense, but it is always the same for the same seed, and they
//! are small enough for debug builds, if not asked to be larger.

#![allow(dead_code, reason = "each test takes the parts that it needs")]

use std::{fmt::Write as _, fs, path::Path};

/// Which architecture a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// With `llama3` scaling of its positions, and an output layer of its own.
    Llama,
    /// With biases on queries, keys and values, its embedding as output layer, and its
    /// configuration in the newer way of writing.
    Qwen2,
    /// With norms on queries and keys, and heads larger than their share of the hidden size.
    Qwen3,
}

/// All families.
pub(crate) const FAMILIES: [Family; 3] = [Family::Llama, Family::Qwen2, Family::Qwen3];

/// How large a model is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
}

/// Small enough for debug builds.
const TINY: Size = Size {
    hidden: 64,
    inner: 96,
    layers: 2,
    heads: 4,
    kv_heads: 2,
};

/// A tiny model.
#[derive(Debug, Clone)]
pub(crate) struct TinyLlama {
    /// Its architecture.
    pub(crate) family: Family,
    /// How large it is.
    pub(crate) size: Size,
    /// How many token ids it knows.
    pub(crate) vocab_size: usize,
    /// What its weights are made from.
    pub(crate) seed: u64,
    /// The most tokens that it takes.
    pub(crate) context_length: usize,
    /// The tokens that end a sample, for `generation_config.json`.
    pub(crate) eos_token_ids: Vec<u32>,
}

/// A named tensor: its shape and its values.
pub(crate) type NamedTensor = (String, Vec<usize>, Vec<f32>);

impl TinyLlama {
    /// A model with a context of 4,096 tokens whose last token ends a sample.
    pub(crate) fn new(family: Family, vocab_size: usize) -> Self {
        Self {
            family,
            size: TINY,
            vocab_size,
            seed: 1,
            context_length: 4096,
            eos_token_ids: vec![vocab_size as u32 - 1],
        }
    }

    /// Writes `config.json`, `generation_config.json` and `model.safetensors`. The directory
    /// must be there.
    pub(crate) fn write(&self, dir: &Path) {
        fs::write(dir.join("config.json"), self.config()).unwrap();
        let generation = format!("{{\"eos_token_id\": {:?}}}\n", self.eos_token_ids);
        fs::write(dir.join("generation_config.json"), generation).unwrap();
        let weights = safetensors(&self.tensors());
        fs::write(dir.join("model.safetensors"), weights).unwrap();
    }

    /// The text of its `config.json`.
    pub(crate) fn config(&self) -> String {
        let own = match self.family {
            Family::Llama => {
                r#""architectures": ["LlamaForCausalLM"], "model_type": "llama",
  "tie_word_embeddings": false, "rope_theta": 500000.0,
  "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}"#
            }
            Family::Qwen2 => {
                r#""architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
  "tie_word_embeddings": true, "use_sliding_window": false,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}"#
            }
            Family::Qwen3 => {
                r#""architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
  "tie_word_embeddings": false, "use_sliding_window": false, "attention_bias": false,
  "rope_theta": 1000000.0, "rope_scaling": null"#
            }
        };
        let Self {
            vocab_size,
            context_length,
            size:
                Size {
                    hidden,
                    inner,
                    layers,
                    heads,
                    kv_heads,
                },
            ..
        } = self;
        let head_dim = self.head_dim();
        format!(
            r#"{{
  {own},
  "vocab_size": {vocab_size}, "hidden_size": {hidden}, "intermediate_size": {inner},
  "num_hidden_layers": {layers}, "num_attention_heads": {heads},
  "num_key_value_heads": {kv_heads}, "head_dim": {head_dim},
  "max_position_embeddings": {context_length}, "rms_norm_eps": 1e-05,
  "hidden_act": "silu", "torch_dtype": "float32"
}}
"#
        )
    }

    /// Its tensors. The same for the same family, size of vocabulary and seed.
    pub(crate) fn tensors(&self) -> Vec<NamedTensor> {
        let Size {
            hidden,
            inner,
            layers,
            heads,
            kv_heads,
        } = self.size;
        let mut random = Random(self.seed);
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], centre: f32, spread: f32| {
            let count = shape.iter().product();
            let values = (0..count)
                .map(|_| centre + spread * random.next())
                .collect();
            tensors.push((name, shape.to_vec(), values));
        };
        // Wide enough for logits that lie well apart.
        let spread = |from: usize| 2.5 / (from as f32).sqrt();
        let (q_size, kv_size) = (heads * self.head_dim(), kv_heads * self.head_dim());
        let embedding = [self.vocab_size, hidden];
        add("model.embed_tokens.weight".into(), &embedding, 0.0, 0.5);
        for layer in 0..layers {
            let at = |part: &str| format!("model.layers.{layer}.{part}");
            for (part, to, from) in [
                ("self_attn.q_proj", q_size, hidden),
                ("self_attn.k_proj", kv_size, hidden),
                ("self_attn.v_proj", kv_size, hidden),
                ("self_attn.o_proj", hidden, q_size),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ] {
                add(at(part) + ".weight", &[to, from], 0.0, spread(from));
            }
            for part in ["input_layernorm", "post_attention_layernorm"] {
                add(at(part) + ".weight", &[hidden], 1.0, 0.3);
            }
            match self.family {
                Family::Llama => {}
                Family::Qwen2 => {
                    for (part, size) in [("q", q_size), ("k", kv_size), ("v", kv_size)] {
                        add(
                            at(&format!("self_attn.{part}_proj.bias")),
                            &[size],
                            0.0,
                            0.5,
                        );
                    }
                }
                Family::Qwen3 => {
                    for part in ["q_norm", "k_norm"] {
                        let name = at(&format!("self_attn.{part}.weight"));
                        add(name, &[self.head_dim()], 1.0, 0.3);
                    }
                }
            }
        }
        add("model.norm.weight".into(), &[hidden], 1.0, 0.3);
        match self.family {
            Family::Llama | Family::Qwen3 => {
                add("lm_head.weight".into(), &embedding, 0.0, spread(hidden));
            }
            Family::Qwen2 => {}
        }
        tensors
    }

    fn head_dim(&self) -> usize {
        match self.family {
            Family::Llama | Family::Qwen2 => self.size.hidden / self.size.heads,
            Family::Qwen3 => 24,
        }
    }
}

/// The bytes of a safetensors file.
pub(crate) fn safetensors(tensors: &[NamedTensor]) -> Vec<u8> {
    let mut header = String::from("{");
    let mut data = Vec::new();
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        if start > 0 {
            header.push(',');
        }
        let end = data.len();
        write!(
            header,
            r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        )
        .unwrap();
    }
    header.push('}');
    // The data begins on a multiple of eight.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    /// From -1 to 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
