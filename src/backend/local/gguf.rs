//! A model from a GGUF file, its numbers kept quantised.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use candle_core::{
    Device, Result, Tensor,
    quantized::{
        GgmlDType, QMatMul, QStorage, QTensor,
        gguf_file::{Content, TensorInfo, Value},
    },
};
use serde_json::json;

use super::{
    LoadError,
    config::{Config, Scaling},
    weights::{of_shape, with_extension},
};

/// What the rotation of long contexts is slowed by, for models that have it so.
const ROTARY_FACTORS: &str = "rope_freqs.weight";

/// An open GGUF file. Tensors are asked for by the names that they have in safetensors.
pub(super) struct Gguf {
    path: PathBuf,
    file: BufReader<File>,
    content: Content,
    device: Device,
    /// The heads of queries and of keys, where the rows of each head stand in the order of
    /// llama.cpp: pairs that are turned together lie together.
    paired: Option<(usize, usize)>,
}

impl Gguf {
    /// The file of the directory, if it has one and no safetensors. It is for `device`.
    pub(super) fn find(
        dir: &Path,
        device: &Device,
    ) -> std::result::Result<Option<Self>, LoadError> {
        let mut found = with_extension(dir, "gguf")?;
        let others = with_extension(dir, "safetensors")?;
        let Some(path) = found.pop().filter(|_| others.is_empty()) else {
            return Ok(None);
        };
        if !found.is_empty() {
            return Err(LoadError::ManyGguf { path: dir.into() });
        }
        let opened = File::open(&path).map_err(candle_core::Error::from);
        let read = opened.and_then(|file| {
            let mut file = BufReader::new(file);
            Ok((Content::read(&mut file)?, file))
        });
        match read {
            Ok((content, file)) => Ok(Some(Self {
                path,
                file,
                content,
                device: device.clone(),
                paired: None,
            })),
            Err(source) => Err(LoadError::Gguf { path, source }),
        }
    }

    /// The model's shape. To be asked for before any tensor.
    pub(super) fn config(&mut self) -> std::result::Result<Config, LoadError> {
        let mut config = Config::from_json(&self.as_config_json())?;
        if self.architecture() == "llama" {
            self.paired = Some((config.heads, config.kv_heads));
        }
        if self.content.tensor_infos.contains_key(ROTARY_FACTORS) {
            let factors = self.take(ROTARY_FACTORS, &[config.head_dim / 2])?;
            let factors = factors.to_vec1().map_err(|source| self.failed(source))?;
            config.rotary.scaling = Scaling::Factors(factors);
        }
        Ok(config)
    }

    /// What a `config.json` would say, so that both are read, and refused, by the same rules.
    fn as_config_json(&self) -> serde_json::Value {
        let of = |key: &str| self.number(&format!("{}.{key}", self.architecture()));
        let tensor = |name: &str| self.content.tensor_infos.get(name);
        let embedding = tensor("token_embd.weight").map(|info| info.shape.dims());
        json!({
            "model_type": self.architecture(),
            "vocab_size": embedding.and_then(<[usize]>::first),
            "hidden_size": of("embedding_length"),
            "intermediate_size": of("feed_forward_length"),
            "num_hidden_layers": of("block_count"),
            "num_attention_heads": of("attention.head_count"),
            "num_key_value_heads": of("attention.head_count_kv"),
            "head_dim": of("attention.key_length"),
            "max_position_embeddings": of("context_length"),
            "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
            "rope_theta": of("rope.freq_base"),
            "rope_scaling": self.text("rope.scaling.type").filter(|kind| *kind != "none").map(|kind| {
                json!({ "type": kind, "factor": of("rope.scaling.factor") })
            }),
            "tie_word_embeddings": tensor("output.weight").is_none(),
            "attention_bias": self.architecture() != "qwen2" && tensor("blk.0.attn_q.bias").is_some(),
        })
    }

    fn architecture(&self) -> &str {
        match self.content.metadata.get("general.architecture") {
            Some(Value::String(name)) => name,
            Some(_) | None => "",
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        let key = format!("{}.{key}", self.architecture());
        let text = self.content.metadata.get(&key)?.to_string();
        text.ok().map(String::as_str)
    }

    fn number(&self, key: &str) -> Option<serde_json::Value> {
        let value = self.content.metadata.get(key)?;
        let float = value.to_f32().map(f64::from).or_else(|_| value.to_f64());
        match value.to_u64() {
            Ok(count) => Some(json!(count)),
            Err(_) => float.ok().map(|number| json!(number)),
        }
    }

    /// What all tensors take as they are, or as 32-bit floats where they are smaller floats.
    pub(super) fn bytes(&self) -> u64 {
        let of = |info: &TensorInfo| {
            let dtype = info.ggml_dtype;
            let blocks = info.shape.elem_count() / dtype.block_size();
            let bytes = match matches!(dtype, GgmlDType::F16 | GgmlDType::BF16) {
                true => size_of::<f32>(),
                false => dtype.type_size(),
            };
            (blocks * bytes) as u64
        };
        self.content.tensor_infos.values().map(of).sum()
    }

    /// How many numbers all tensors hold.
    pub(super) fn parameters(&self) -> u64 {
        let infos = self.content.tensor_infos.values();
        infos.map(|info| info.shape.elem_count() as u64).sum()
    }

    /// The tensor in 32-bit floats.
    pub(super) fn take(
        &mut self,
        name: &str,
        shape: &[usize],
    ) -> std::result::Result<Tensor, LoadError> {
        let tensor = self.read(name, shape)?;
        let device = self.device.clone();
        tensor
            .dequantize(&device)
            .map_err(|source| self.failed(source))
    }

    /// The matrix, quantised as it is.
    pub(super) fn matrix(
        &mut self,
        name: &str,
        shape: &[usize],
    ) -> std::result::Result<QMatMul, LoadError> {
        let tensor = self.read(name, shape)?;
        QMatMul::from_qtensor(tensor).map_err(|source| self.failed(source))
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> std::result::Result<QTensor, LoadError> {
        let own = own_name(name);
        let info = self.content.tensor_infos.get(&own);
        let info = of_shape(info, |info| info.shape.dims(), &own, shape)?;
        let heads = self.paired.and_then(|(heads, kv_heads)| match name {
            _ if name.contains("q_proj") => Some(heads),
            _ if name.contains("k_proj") => Some(kv_heads),
            _ => None,
        });
        let data = self.content.tensor_data_offset;
        let tensor = info
            .read(&mut self.file, data, &self.device)
            .and_then(|tensor| match heads {
                Some(heads) => halves(&tensor, heads, &self.device),
                None => Ok(tensor),
            });
        tensor.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: candle_core::Error) -> LoadError {
        LoadError::Gguf {
            path: self.path.clone(),
            source,
        }
    }
}

/// Puts the rows of each head, where those lie together that are turned together, into the order
/// of Hugging Face: the first half is turned with the second. A row is a whole number of blocks,
/// so that this moves bytes and changes none.
fn halves(tensor: &QTensor, heads: usize, device: &Device) -> Result<QTensor> {
    let shape = tensor.shape().clone();
    let rows = shape.dims()[0];
    let (head_dim, data) = (rows / heads, tensor.data()?);
    let row_bytes = data.len() / rows;
    let mut moved = Vec::with_capacity(data.len());
    for row in 0..rows {
        let (head, at) = (row / head_dim, row % head_dim);
        let (half, pair) = (at / (head_dim / 2), at % (head_dim / 2));
        let from = (head * head_dim + 2 * pair + half) * row_bytes;
        moved.extend_from_slice(&data[from..from + row_bytes]);
    }
    QTensor::new(
        QStorage::from_data(moved.into(), device, tensor.dtype())?,
        shape,
    )
}

/// The name of a tensor in GGUF files, from that in safetensors.
fn own_name(name: &str) -> String {
    const PARTS: [(&str, &str); 14] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let name = name.replace("model.layers.", "blk.");
    PARTS
        .into_iter()
        .find(|(theirs, _)| name.contains(theirs))
        .map_or_else(|| name.clone(), |(theirs, own)| name.replace(theirs, own))
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file;

    use super::*;
    use crate::backend::local::{
        kv::Pool,
        model::Piece,
        tests::{
            device, load,
            tiny_llama::{FAMILIES, Family, TinyLlama},
        },
        weights::Weights,
    };

    /// Writes the model as the converter of llama.cpp does, its matrices in this type.
    fn write(tiny: &TinyLlama, dtype: GgmlDType, path: &Path) {
        let (arch, theta) = match tiny.family {
            Family::Llama => ("llama", 500_000.0),
            Family::Qwen2 => ("qwen2", 1_000_000.0),
            Family::Qwen3 => ("qwen3", 1_000_000.0),
        };
        let size = tiny.size;
        let mut tensors = Vec::new();
        let mut head_dim = 0;
        for (name, shape, values) in tiny.tensors() {
            let mut tensor = Tensor::from_vec(values, shape.clone(), &Device::Cpu).unwrap();
            let heads = match () {
                () if name.contains("q_proj") => Some(size.heads),
                () if name.contains("k_proj") => Some(size.kv_heads),
                () => None,
            };
            if let Some(heads) = heads {
                head_dim = shape[0] / heads;
                if tiny.family == Family::Llama {
                    let by_half = tensor.reshape((heads, 2, head_dim / 2, ())).unwrap();
                    let by_pair = by_half.transpose(1, 2).unwrap().contiguous().unwrap();
                    tensor = by_pair.reshape(shape.as_slice()).unwrap();
                }
            }
            let dtype = if shape.len() == 1 {
                GgmlDType::F32
            } else {
                dtype
            };
            let tensor = QTensor::quantize(&tensor, dtype).unwrap();
            tensors.push((own_name(&name), tensor));
        }
        if tiny.family == Family::Llama {
            // The `llama3` scaling of the tiny models, pair by pair.
            let factors: Vec<f32> = (0..head_dim / 2)
                .map(|pair| {
                    let turn = f64::powf(theta, -2.0 * pair as f64 / head_dim as f64);
                    let length = std::f64::consts::TAU / turn;
                    let smooth = ((64.0 / length - 1.0) / 3.0).clamp(0.0, 1.0);
                    (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32
                })
                .collect();
            let factors = Tensor::new(factors, &Device::Cpu).unwrap();
            let factors = QTensor::quantize(&factors, GgmlDType::F32).unwrap();
            tensors.push((ROTARY_FACTORS.to_owned(), factors));
        }
        let count = |count: usize| Value::U32(count as u32);
        let metadata = [
            ("block_count", count(size.layers)),
            ("embedding_length", count(size.hidden)),
            ("feed_forward_length", count(size.inner)),
            ("attention.head_count", count(size.heads)),
            ("attention.head_count_kv", count(size.kv_heads)),
            ("attention.key_length", count(head_dim)),
            ("context_length", count(tiny.context_length)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("rope.freq_base", Value::F32(theta as f32)),
        ];
        let mut metadata: Vec<(String, Value)> = metadata
            .into_iter()
            .map(|(key, value)| (format!("{arch}.{key}"), value))
            .collect();
        metadata.push(("general.architecture".into(), Value::String(arch.into())));
        let metadata: Vec<_> = metadata
            .iter()
            .map(|(key, value)| (key.as_str(), value))
            .collect();
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
            .collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    fn logits(dir: &Path) -> Vec<f32> {
        let (model, layout) = load(dir, 8);
        let mut kv = Pool::new(layout, &device()).empty();
        let tokens: Vec<u32> = (0..60).map(|at| (at * at + 7 * at + 3) % 64).collect();
        let mut pieces = [Piece {
            kv: &mut kv,
            tokens: &tokens,
        }];
        let rows = model.advance(&mut pieces).unwrap();
        model.logits(&rows).unwrap().remove(0)
    }

    #[test]
    fn a_gguf_file_gives_the_logits_of_the_safetensors() {
        for family in FAMILIES {
            let tiny = TinyLlama::new(family, 64);
            let dir = tempfile::tempdir().unwrap();
            tiny.write(dir.path());
            let expected = logits(dir.path());
            // Of logits of up to 5.6. What floats of 16 bits and quantised numbers lose is in
            // the file, not in the engine.
            for (dtype, tolerance) in [
                (GgmlDType::F32, 1e-4),
                (GgmlDType::F16, 0.01),
                (GgmlDType::Q8_0, 0.5),
            ] {
                let dir = tempfile::tempdir().unwrap();
                write(&tiny, dtype, &dir.path().join("tiny.gguf"));
                for (found, expected) in logits(dir.path()).iter().zip(&expected) {
                    let apart = (found - expected).abs();
                    assert!(
                        apart < tolerance,
                        "{family:?} {dtype:?}: {found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = || match Weights::open(&dir.path().into(), &Device::Cpu) {
            Ok(_) => panic!("opens"),
            Err(error) => error,
        };
        std::fs::write(dir.path().join("a.gguf"), "cut").unwrap();
        assert!(matches!(error(), LoadError::Gguf { .. }));
        std::fs::write(dir.path().join("b.gguf"), "cut").unwrap();
        assert!(matches!(error(), LoadError::ManyGguf { .. }));
        // Where there are safetensors, they are the model.
        std::fs::write(dir.path().join("c.safetensors"), "").unwrap();
        assert!(matches!(error(), LoadError::Read { .. }));
    }
}
