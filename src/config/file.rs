//! The file of settings: how it is read, and how an error in it is found again.

use std::path::Path;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Config, ConfigError};

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
        let rules = model.sim.iter_mut().filter_map(|sim| sim.rules.as_mut());
        // An absolute path stays as it is.
        for path in rules.chain(&mut model.path) {
            *path = directory.join(&*path);
        }
    }
    let exports = config.billing.export.iter_mut().map(|it| &mut it.path);
    let exports = exports.filter(|path| !path.as_os_str().is_empty());
    let kept = config.store.path.iter_mut().chain(&mut config.billing.path);
    let rules = config.safety.rules.iter_mut();
    let classifiers = config.safety.classifiers.iter_mut();
    let instructions = classifiers.filter_map(|it| it.instructions.as_mut());
    for path in kept.chain(exports).chain(rules).chain(instructions) {
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
