//! A model's tensors, from its safetensors.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    safetensors::{Load as _, SliceSafetensors},
};
use serde::Deserialize;

use super::LoadError;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Tensors by name, as the files have them. Taking one converts it, so that the whole model is
/// not held twice in full size.
pub(super) struct Weights {
    tensors: HashMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    pub(super) fn read(dir: &Path) -> Result<Self, LoadError> {
        let mut tensors = HashMap::new();
        for path in files(dir)? {
            let bytes = read_file(&path)?;
            match read_tensors(&bytes) {
                Ok(shard) => tensors.extend(shard),
                Err(source) => return Err(LoadError::Weights { path, source }),
            }
        }
        Ok(Self { tensors })
    }

    /// The tensor in 32-bit floats.
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let Some(tensor) = self.tensors.remove(name) else {
            return Err(LoadError::MissingTensor {
                name: name.to_owned(),
                shape: shape.to_vec(),
            });
        };
        if tensor.dims() != shape {
            return Err(LoadError::TensorShape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: tensor.dims().to_vec(),
            });
        }
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(LoadError::TensorDtype {
                name: name.to_owned(),
                dtype: tensor.dtype().as_str(),
            });
        }
        tensor
            .to_dtype(DType::F32)
            .map_err(|source| LoadError::Convert {
                name: name.to_owned(),
                source,
            })
    }
}

/// The files that hold the model: the one with the usual name, those that the index names, or
/// all that are there.
fn files(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let single = dir.join(SINGLE);
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = dir.join(INDEX);
    if index.is_file() {
        return shards(dir, index);
    }
    let entries = std::fs::read_dir(dir).map_err(|source| LoadError::Read {
        path: dir.into(),
        source,
    })?;
    let files: BTreeSet<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .collect();
    if files.is_empty() {
        return Err(LoadError::NoWeights { path: dir.into() });
    }
    Ok(files.into_iter().collect())
}

fn shards(dir: &Path, path: PathBuf) -> Result<Vec<PathBuf>, LoadError> {
    let bytes = read_file(&path)?;
    let index: Index = match serde_json::from_slice(&bytes) {
        Ok(index) => index,
        Err(source) => return Err(LoadError::Json { path, source }),
    };
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    names
        .into_iter()
        .map(|file| {
            // An index must not lead out of its directory.
            if Path::new(&file).file_name() == Some(file.as_ref()) {
                Ok(dir.join(file))
            } else {
                Err(LoadError::ShardName { file })
            }
        })
        .collect()
}

fn read_file(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|source| LoadError::Read {
        path: path.into(),
        source,
    })
}

fn read_tensors(bytes: &[u8]) -> candle_core::Result<Vec<(String, Tensor)>> {
    let file = SliceSafetensors::new(bytes)?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        tensors.push((name, view.load(&Device::Cpu)?));
    }
    Ok(tensors)
}
