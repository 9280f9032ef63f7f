//! The files of a model: a Hugging Face directory, or one that is built into the program.

use std::{
    borrow::Cow,
    fmt, fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

/// Where the files of a model are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Files {
    /// In this directory.
    Directory(PathBuf),
    /// In the program.
    BuiltIn(BuiltIn),
}

/// A model that is built into the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BuiltIn {
    /// The text side of the simulated model. It has no weights.
    SimAgent,
    /// The tiny model that was trained for this program; its card is `models/tiny-agent/README.md`.
    #[cfg(feature = "local")]
    TinyAgent,
}

/// Files of a directory of `models/`, by name.
macro_rules! built_in {
    ($directory:literal, $($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!("../models/", $directory, "/", $name)))),+]
    };
}

impl BuiltIn {
    /// The bytes of a file, or `None` where there is none of that name.
    #[must_use]
    pub fn bytes(self, name: &str) -> Option<&'static [u8]> {
        let mut files = self.files().iter();
        let found = files.find(|(file, _)| *file == name);
        found.map(|(_, bytes)| *bytes)
    }

    fn files(self) -> &'static [(&'static str, &'static [u8])] {
        match self {
            Self::SimAgent => built_in!(
                "sim",
                "chat_template.jinja",
                "tokenizer.json",
                "tokenizer_config.json",
            ),
            #[cfg(feature = "local")]
            Self::TinyAgent => built_in!(
                "tiny-agent",
                "chat_template.jinja",
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
            ),
        }
    }
}

impl From<&Path> for Files {
    fn from(directory: &Path) -> Self {
        Self::Directory(directory.to_path_buf())
    }
}

impl Files {
    /// The bytes of a file, or `None` where there is none of that name.
    ///
    /// # Errors
    ///
    /// That of the file system.
    pub fn read(&self, name: &str) -> io::Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Directory(directory) => match fs::read(directory.join(name)) {
                Ok(bytes) => Ok(Some(bytes.into())),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
            Self::BuiltIn(model) => Ok(model.bytes(name).map(Cow::Borrowed)),
        }
    }

    /// What a file is called where people read of it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Directory(directory) => directory.join(name),
            Self::BuiltIn(_) => PathBuf::from(format!("{self}: {name}")),
        }
    }
}

impl fmt::Display for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(directory) => directory.display().fmt(f),
            Self::BuiltIn(BuiltIn::SimAgent) => f.write_str("the built-in sim-agent"),
            #[cfg(feature = "local")]
            Self::BuiltIn(BuiltIn::TinyAgent) => f.write_str("the built-in tiny-agent"),
        }
    }
}
