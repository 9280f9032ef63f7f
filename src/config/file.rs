//! The file of settings: how it is read, and how an error in it is found again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Config, ConfigError, DeviceChoice, Engine};

pub(super) const TOKENS_PER_SECOND: f64 = 200.0;
pub(super) const FIRST_TOKEN_MS: u64 = 50;

const NAME_CHARACTERS_MAX: usize = 128;

/// Reads the settings of this file, over the defaults.
pub(super) fn read(path: &Path) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.into(),
        source,
    })?;
    let mut config: Config = toml::from_str(&text).map_err(|error| {
        let place = error.span().map_or(0, |span| span.start);
        ConfigError::File {
            path: path.into(),
            line: 1 + text
                .bytes()
                .take(place)
                .filter(|&byte| byte == b'\n')
                .count(),
            key: key_at(&text, place),
            // The message alone: the whole error shows the line, and what somebody put under a
            // key that does not exist may be a secret.
            reason: error.message().into(),
        }
    })?;
    let directory = path.parent().unwrap_or(Path::new(""));
    for model in &mut config.models {
        model.engine.resolve(directory);
    }
    if let Some(path) = &mut config.store.path {
        *path = directory.join(&*path);
    }
    Ok(config)
}

/// A path, or an empty text where there is none, so that every key stands in the file.
pub(super) mod path_or_empty {
    use std::path::PathBuf;

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(in crate::config) fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        path.clone().unwrap_or_default().serialize(to)
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        let path = PathBuf::deserialize(from)?;
        Ok(Some(path).filter(|path| !path.as_os_str().is_empty()))
    }
}

impl Engine {
    /// Makes paths relative to this directory. An absolute path stays as it is.
    fn resolve(&mut self, directory: &Path) {
        match self {
            Self::Sim { path, rules, .. } => {
                for path in path.iter_mut().chain(rules) {
                    *path = directory.join(&*path);
                }
            }
            Self::Local { path, .. } => {
                if let Some(path) = path {
                    *path = directory.join(&*path);
                }
            }
        }
    }
}

/// The key that stands, or whose value stands, at this byte of the file. Empty where none does or
/// the text is no TOML.
fn key_at(text: &str, place: usize) -> String {
    let mut path = String::new();
    if let Ok(table) = DeTable::parse(text) {
        descend(table.get_ref(), place, &mut path);
    }
    path
}

fn descend(table: &DeTable<'_>, place: usize, path: &mut String) {
    // A table's own span is its header only, so its entries are looked at too.
    for (key, value) in table {
        let length = path.len();
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(key.get_ref());
        if key.span().contains(&place) || holds(value, place, path) {
            return;
        }
        path.truncate(length);
    }
}

/// Whether the value holds this byte; if so, the path is the way to it.
fn holds(value: &Spanned<DeValue<'_>>, place: usize, path: &mut String) -> bool {
    let length = path.len();
    match value.get_ref() {
        DeValue::Table(table) => descend(table, place, path),
        DeValue::Array(entries) => {
            for (index, entry) in entries.iter().enumerate() {
                path.push_str(&format!("[{index}]"));
                if holds(entry, place, path) {
                    return true;
                }
                path.truncate(length);
            }
        }
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_) => {}
    }
    path.len() > length || value.span().contains(&place)
}

/// A `[[model]]` as it stands in the file: the keys of every backend in one table.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Model {
    name: String,
    #[serde(default)]
    default: bool,
    backend: Backend,
    path: Option<PathBuf>,
    family: Option<String>,
    context_length: Option<u32>,
    rules: Option<PathBuf>,
    tokens_per_second: Option<f64>,
    first_token_ms: Option<u64>,
    cache_bytes_max: Option<u64>,
    device: Option<DeviceChoice>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Backend {
    Sim,
    Local,
}

impl TryFrom<Model> for super::Model {
    type Error = String;

    fn try_from(model: Model) -> Result<Self, String> {
        let name = &model.name;
        let fits = (1..=NAME_CHARACTERS_MAX).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_.:/-".contains(&byte));
        if !fits {
            return Err(format!(
                "the name is not 1 to {NAME_CHARACTERS_MAX} characters of letters, digits, _ . : / -"
            ));
        }
        if model.context_length.is_some_and(|tokens| tokens < 256) {
            return Err("context_length is under 256 tokens".into());
        }
        let engine = match model.backend {
            Backend::Sim => model.sim()?,
            Backend::Local => model.local()?,
        };
        Ok(Self {
            name: model.name,
            default: model.default,
            family: model.family,
            context_length: model.context_length,
            engine,
        })
    }
}

impl Model {
    fn sim(&self) -> Result<Engine, String> {
        for (key, given) in [
            ("cache_bytes_max", self.cache_bytes_max.is_some()),
            ("device", self.device.is_some()),
        ] {
            if given {
                return Err(format!("{key} is only for backend = \"local\""));
            }
        }
        let tokens_per_second = self.tokens_per_second.unwrap_or(TOKENS_PER_SECOND);
        if !(0.0..=1e6).contains(&tokens_per_second) {
            return Err("tokens_per_second is not from 0 to 1000000".into());
        }
        let first_token_ms = self.first_token_ms.unwrap_or(FIRST_TOKEN_MS);
        if first_token_ms > 600_000 {
            return Err("first_token_ms is over 600000".into());
        }
        Ok(Engine::Sim {
            path: self.path.clone(),
            rules: self.rules.clone(),
            tokens_per_second,
            first_token_ms,
        })
    }

    fn local(&self) -> Result<Engine, String> {
        for (key, given) in [
            ("rules", self.rules.is_some()),
            ("tokens_per_second", self.tokens_per_second.is_some()),
            ("first_token_ms", self.first_token_ms.is_some()),
        ] {
            if given {
                return Err(format!("{key} is only for backend = \"sim\""));
            }
        }
        Ok(Engine::Local {
            path: self.path.clone(),
            cache_bytes_max: self.cache_bytes_max,
            device: self.device.unwrap_or_default(),
        })
    }
}

impl From<super::Model> for Model {
    fn from(model: super::Model) -> Self {
        let blank = Self {
            name: model.name,
            default: model.default,
            backend: Backend::Local,
            path: None,
            family: model.family,
            context_length: model.context_length,
            rules: None,
            tokens_per_second: None,
            first_token_ms: None,
            cache_bytes_max: None,
            device: None,
        };
        match model.engine {
            Engine::Sim {
                path,
                rules,
                tokens_per_second,
                first_token_ms,
            } => Self {
                backend: Backend::Sim,
                path,
                rules,
                tokens_per_second: Some(tokens_per_second),
                first_token_ms: Some(first_token_ms),
                ..blank
            },
            Engine::Local {
                path,
                cache_bytes_max,
                device,
            } => Self {
                path,
                cache_bytes_max,
                device: Some(device),
                ..blank
            },
        }
    }
}
