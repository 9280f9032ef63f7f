//! A model's tensors, from whichever files it has.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, quantized::QMatMul};

use super::{LoadError, config::Config, gguf::Gguf, safetensors::Safetensors};
use crate::files::Files;

/// The files of a directory that have this extension, by name.
pub(super) fn with_extension(dir: &Path, extension: &str) -> Result<Vec<PathBuf>, LoadError> {
    let entries = std::fs::read_dir(dir).map_err(|source| LoadError::Read {
        path: dir.into(),
        source,
    })?;
    let files: BTreeSet<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|it| it == extension))
        .collect();
    Ok(files.into_iter().collect())
}

/// The tensor of this name, where there is one, and it has this shape.
pub(super) fn of_shape<T>(
    tensor: Option<T>,
    dims: impl Fn(&T) -> &[usize],
    name: &str,
    shape: &[usize],
) -> Result<T, LoadError> {
    let Some(tensor) = tensor else {
        return Err(LoadError::MissingTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
        });
    };
    let found = dims(&tensor);
    if found != shape {
        return Err(LoadError::TensorShape {
            name: name.to_owned(),
            expected: shape.to_vec(),
            found: found.to_vec(),
        });
    }
    Ok(tensor)
}

/// A model's tensors. Asked for by the names that they have in safetensors.
pub(super) enum Weights {
    Safetensors(Safetensors),
    Gguf(Gguf),
}

impl Weights {
    /// The model's shape, and its tensors, of which none is read yet. They are for `device`.
    pub(super) fn open(files: &Files, device: &Device) -> Result<(Config, Self), LoadError> {
        if let Files::Directory(dir) = files
            && let Some(mut gguf) = Gguf::find(dir, device)?
        {
            return Ok((gguf.config()?, Self::Gguf(gguf)));
        }
        let config = Config::read(files)?;
        let tensors = Safetensors::open(files, device)?;
        Ok((config, Self::Safetensors(tensors)))
    }

    /// What the model computes in.
    pub(super) fn dtype(&self) -> DType {
        match self {
            Self::Safetensors(tensors) => tensors.dtype(),
            Self::Gguf(_) => DType::F32,
        }
    }

    /// How many numbers the tensors hold.
    pub(super) fn parameters(&self) -> u64 {
        match self {
            Self::Safetensors(tensors) => tensors.parameters(),
            Self::Gguf(file) => file.parameters(),
        }
    }

    /// Refuses a model that takes more than the memory that could be had now, where that is known.
    pub(super) fn fit(&self, available: Option<u64>) -> Result<(), LoadError> {
        let needed = match self {
            Self::Safetensors(tensors) => tensors.bytes(),
            Self::Gguf(file) => file.bytes(),
        };
        match available {
            Some(available) if available < needed => Err(LoadError::Memory { needed, available }),
            Some(_) | None => Ok(()),
        }
    }

    /// The tensor, as [`Weights::dtype`].
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        match self {
            Self::Safetensors(tensors) => tensors.take(name, shape),
            Self::Gguf(file) => file.take(name, shape),
        }
    }

    /// What rows are multiplied with, quantised where the file has it so.
    pub(super) fn matrix(&mut self, name: &str, shape: &[usize]) -> Result<QMatMul, LoadError> {
        match self {
            Self::Safetensors(tensors) => Ok(QMatMul::Tensor(tensors.take(name, shape)?)),
            Self::Gguf(file) => file.matrix(name, shape),
        }
    }
}
