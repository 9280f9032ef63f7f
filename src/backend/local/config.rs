//! The model's shape, from `config.json`.

use std::io;

use candle_core::DType;
use serde_json::Value;

use super::{LoadError, kv::KvLayout};
use crate::files::Files;

/// Which architecture it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Qwen2,
    Qwen3,
}

/// The model's shape.
#[derive(Debug, Clone)]
pub(super) struct Config {
    pub(super) family: Family,
    pub(super) vocab_size: u32,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) context_length: u32,
    pub(super) rms_norm_eps: f64,
    pub(super) rotary: Rotary,
    /// The output layer is the embedding.
    pub(super) tied: bool,
    pub(super) qkv_bias: bool,
    pub(super) output_bias: bool,
    pub(super) mlp_bias: bool,
    /// Queries and keys are normalised, head by head.
    pub(super) qk_norm: bool,
}

/// How positions turn queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rotary {
    pub(super) theta: f64,
    pub(super) scaling: Scaling,
}

/// How the turning is slowed for contexts longer than the first training's.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scaling {
    None,
    /// All positions divided by the factor.
    Linear {
        factor: f64,
    },
    /// Each pair's turn divided by its own factor.
    Factors(Vec<f32>),
    /// Slow turns divided by the factor, fast ones left, a ramp between the two.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: f64,
    },
}

impl Config {
    pub(super) fn read(files: &Files) -> Result<Self, LoadError> {
        let path = files.path("config.json");
        let missing = || io::Error::new(io::ErrorKind::NotFound, "No such file");
        let found = files.read("config.json");
        let text = match found.and_then(|found| found.ok_or_else(missing)) {
            Ok(text) => text,
            Err(source) => return Err(LoadError::Read { path, source }),
        };
        match serde_json::from_slice::<Value>(&text) {
            Ok(value) => Self::from_json(&value),
            Err(source) => Err(LoadError::Json { path, source }),
        }
    }

    pub(super) fn from_json(value: &Value) -> Result<Self, LoadError> {
        let keys = Keys {
            value,
            within: None,
        };
        let family = family(&keys)?;
        refuse_unsupported(&keys)?;

        let hidden_size = keys.count("hidden_size")?;
        let heads = keys.count("num_attention_heads")?;
        let kv_heads = keys.optional_count("num_key_value_heads")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.wrong("num_key_value_heads", "does not divide num_attention_heads"));
        }
        let head_dim = match (keys.optional_count("head_dim")?, family) {
            (Some(head_dim), _) => head_dim,
            // What the architecture has where its configuration says nothing.
            (None, Family::Qwen3) => 128,
            (None, Family::Llama | Family::Qwen2) => {
                if !hidden_size.is_multiple_of(heads) {
                    return Err(keys.wrong("hidden_size", "is no multiple of num_attention_heads"));
                }
                hidden_size / heads
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(keys.wrong("head_dim", "is odd"));
        }
        let attention_bias = keys.flag("attention_bias")?;
        let (qkv_bias, output_bias) = match family {
            Family::Llama | Family::Qwen3 => (attention_bias, attention_bias),
            Family::Qwen2 => (true, false),
        };
        Ok(Self {
            family,
            vocab_size: keys.small_count("vocab_size")?,
            hidden_size,
            intermediate_size: keys.count("intermediate_size")?,
            layers: keys.count("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            context_length: keys.small_count("max_position_embeddings")?,
            rms_norm_eps: keys.number("rms_norm_eps")?,
            rotary: rotary(&keys)?,
            tied: keys.flag("tie_word_embeddings")?,
            qkv_bias,
            output_bias,
            mlp_bias: family == Family::Llama && keys.flag("mlp_bias")?,
            qk_norm: family == Family::Qwen3,
        })
    }

    /// How many numbers the matrices of a layer hold.
    pub(super) fn layer_size(&self) -> usize {
        let attention = 2 * (self.heads + self.kv_heads) * self.head_dim;
        self.hidden_size * (attention + 3 * self.intermediate_size)
    }

    pub(super) fn kv_layout(&self, block_tokens: usize, dtype: DType) -> KvLayout {
        KvLayout {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            block_tokens,
            dtype,
        }
    }
}

fn family(keys: &Keys<'_>) -> Result<Family, LoadError> {
    let found = match keys.find("architectures") {
        Some(list) => list.get(0).unwrap_or(list),
        None => keys.need("model_type")?,
    };
    match found.as_str() {
        // Mistral is Llama with a window, and is refused where it has one.
        Some("LlamaForCausalLM" | "llama" | "MistralForCausalLM" | "mistral") => Ok(Family::Llama),
        Some("Qwen2ForCausalLM" | "qwen2") => Ok(Family::Qwen2),
        Some("Qwen3ForCausalLM" | "qwen3") => Ok(Family::Qwen3),
        Some(_) | None => Err(keys.unsupported("architectures", found)),
    }
}

/// Refuses what would silently give other numbers.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), LoadError> {
    if let Some(quantization) = keys.find("quantization_config") {
        let method = quantization.get("quant_method").unwrap_or(quantization);
        return Err(keys.unsupported("quantization_config", method));
    }
    if let Some(activation) = keys.find("hidden_act")
        && activation != "silu"
    {
        return Err(keys.unsupported("hidden_act", activation));
    }
    if keys.flag("use_sliding_window")? {
        return Err(keys.unsupported("use_sliding_window", &Value::Bool(true)));
    }
    // To Mistral no key at all means a window as well; elsewhere the flag above decides.
    const MISTRAL_WINDOW: u64 = 4096;
    if keys
        .find("model_type")
        .is_some_and(|kind| kind == "mistral")
    {
        let window = match keys.value.get("sliding_window") {
            Some(window) => window.clone(),
            None => MISTRAL_WINDOW.into(),
        };
        let context = u64::from(keys.small_count("max_position_embeddings")?);
        if window.as_u64().is_some_and(|window| window < context) {
            return Err(keys.unsupported("sliding_window", &window));
        }
    }
    Ok(())
}

/// Reads both ways of writing it: `rope_parameters`, and `rope_theta` with `rope_scaling`.
fn rotary(keys: &Keys<'_>) -> Result<Rotary, LoadError> {
    const THETA: f64 = 10_000.0;
    let (within, nested) = match (keys.find("rope_parameters"), keys.find("rope_scaling")) {
        (Some(nested), _) => ("rope_parameters", nested),
        (None, Some(nested)) => ("rope_scaling", nested),
        (None, None) => ("rope_parameters", &Value::Null),
    };
    let nested = Keys {
        value: nested,
        within: Some(within),
    };
    let theta = match nested.optional_number("rope_theta")? {
        Some(theta) => theta,
        None => keys.optional_number("rope_theta")?.unwrap_or(THETA),
    };
    let kind = nested.find("rope_type").or_else(|| nested.find("type"));
    let scaling = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
        None | Some("default") => Scaling::None,
        Some("linear") => Scaling::Linear {
            factor: nested.number("factor")?,
        },
        Some("llama3") => {
            let low_freq_factor = nested.number("low_freq_factor")?;
            let high_freq_factor = nested.number("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(nested.wrong("high_freq_factor", "is not over low_freq_factor"));
            }
            Scaling::Llama3 {
                factor: nested.number("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_context: nested.number("original_max_position_embeddings")?,
            }
        }
        Some(_) => {
            return Err(nested.unsupported("rope_type", kind.unwrap_or(&Value::Null)));
        }
    };
    Ok(Rotary { theta, scaling })
}

/// Reads keys of an object and names them where they are wrong. Null is absent.
struct Keys<'a> {
    value: &'a Value,
    within: Option<&'static str>,
}

impl<'a> Keys<'a> {
    fn find(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    fn need(&self, key: &str) -> Result<&'a Value, LoadError> {
        self.find(key).ok_or_else(|| self.wrong(key, "is missing"))
    }

    fn small_count(&self, key: &str) -> Result<u32, LoadError> {
        let value = self.need(key)?.as_u64();
        match value.and_then(|count| u32::try_from(count).ok()) {
            Some(count @ 1..) => Ok(count),
            Some(0) | None => Err(self.wrong(key, "is not a number from 1 to 4294967295")),
        }
    }

    fn count(&self, key: &str) -> Result<usize, LoadError> {
        self.small_count(key).map(|count| count as usize)
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.find(key).map(|_| self.count(key)).transpose()
    }

    fn number(&self, key: &str) -> Result<f64, LoadError> {
        match self.need(key)?.as_f64() {
            Some(number) if number > 0.0 => Ok(number),
            Some(_) | None => Err(self.wrong(key, "is not a number over 0")),
        }
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.find(key).map(|_| self.number(key)).transpose()
    }

    fn flag(&self, key: &str) -> Result<bool, LoadError> {
        match self.find(key) {
            None => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(key, "is not true or false")),
        }
    }

    fn path(&self, key: &str) -> String {
        match self.within {
            Some(within) => format!("{within}.{key}"),
            None => key.to_owned(),
        }
    }

    fn wrong(&self, key: &str, problem: &'static str) -> LoadError {
        LoadError::Config {
            key: self.path(key),
            problem,
        }
    }

    fn unsupported(&self, key: &str, value: &Value) -> LoadError {
        LoadError::Unsupported {
            key: self.path(key),
            value: value.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        })
    }

    fn with(key: &str, value: Value) -> Result<Config, String> {
        let mut config = llama();
        config[key] = value;
        Config::from_json(&config).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("hidden_size", Value::Null, "hidden_size is missing"),
            (
                "vocab_size",
                json!("many"),
                "vocab_size is not a number from 1 to 4294967295",
            ),
            (
                "num_hidden_layers",
                json!(0),
                "num_hidden_layers is not a number from 1 to 4294967295",
            ),
            (
                "rms_norm_eps",
                json!(-1.0),
                "rms_norm_eps is not a number over 0",
            ),
            (
                "num_key_value_heads",
                json!(3),
                "num_key_value_heads does not divide num_attention_heads",
            ),
            ("head_dim", json!(15), "head_dim is odd"),
            (
                "tie_word_embeddings",
                json!("yes"),
                "tie_word_embeddings is not true or false",
            ),
            (
                "architectures",
                json!(["GPT2LMHeadModel"]),
                "architectures \"GPT2LMHeadModel\" is not supported",
            ),
            (
                "hidden_act",
                json!("gelu"),
                "hidden_act \"gelu\" is not supported",
            ),
            (
                "quantization_config",
                json!({"quant_method": "awq"}),
                "quantization_config \"awq\" is not supported",
            ),
            (
                "use_sliding_window",
                json!(true),
                "use_sliding_window true is not supported",
            ),
            (
                "rope_scaling",
                json!({"type": "yarn"}),
                "rope_scaling.rope_type \"yarn\" is not supported",
            ),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8}),
                "rope_scaling.low_freq_factor is missing",
            ),
        ];
        for (key, value, expected) in cases {
            let error = with(key, value).expect_err(key);
            assert_eq!(error, format!("config.json: {expected}"));
        }
    }

    #[test]
    fn rope_is_read_in_the_old_and_the_new_way() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        let mut old = llama();
        old["rope_theta"] = json!(500_000.0);
        old["rope_scaling"] = scaling.clone();
        let mut new = llama();
        new["rope_parameters"] = scaling;
        new["rope_parameters"]["rope_theta"] = json!(500_000.0);
        let [old, new] = [old, new].map(|config| Config::from_json(&config).unwrap().rotary);
        assert_eq!(old, new);
        assert_eq!(old.theta, 500_000.0);
        assert!(matches!(old.scaling, Scaling::Llama3 { .. }));

        let linear = with("rope_scaling", json!({"type": "linear", "factor": 2})).unwrap();
        assert_eq!(linear.rotary.scaling, Scaling::Linear { factor: 2.0 });
        assert_eq!(
            with("rope_scaling", Value::Null).unwrap().rotary.theta,
            10_000.0
        );
    }

    #[test]
    fn mistral_is_llama_without_a_window() {
        let of = |window: Option<Value>| {
            let mut config = llama();
            config["architectures"] = json!(["MistralForCausalLM"]);
            config["model_type"] = json!("mistral");
            config["max_position_embeddings"] = json!(8192);
            if let Some(window) = window {
                config["sliding_window"] = window;
            }
            let config = Config::from_json(&config).map_err(|error| error.to_string())?;
            Ok::<_, String>((config.family, config.qkv_bias, config.mlp_bias))
        };
        let plain = Ok((Family::Llama, false, false));
        assert_eq!(of(Some(Value::Null)), plain);
        assert_eq!(of(Some(json!(8192))), plain);
        let refused = Err("config.json: sliding_window 4096 is not supported".to_owned());
        assert_eq!(of(Some(json!(4096))), refused);
        assert_eq!(of(None), refused);
    }

    #[test]
    fn families_differ_in_biases_norms_and_head_size() {
        let of = |name: &str| with("architectures", json!([name])).unwrap();
        let shape = |config: Config| {
            (
                config.qkv_bias,
                config.output_bias,
                config.qk_norm,
                config.head_dim,
            )
        };
        assert_eq!(shape(of("LlamaForCausalLM")), (false, false, false, 16));
        assert_eq!(shape(of("Qwen2ForCausalLM")), (true, false, false, 16));
        assert_eq!(shape(of("Qwen3ForCausalLM")), (false, false, true, 128));
    }
}
