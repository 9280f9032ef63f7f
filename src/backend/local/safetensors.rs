//! The tensors of safetensors files.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::LoadError;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The largest header that is read, as the format says.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Where the tensors stand, by name. Each is read when it is taken, so that no more than one is
/// in memory besides those that the model already has.
pub(super) struct Safetensors {
    tensors: HashMap<String, Entry>,
    device: Device,
}

/// A tensor that was not read yet.
struct Entry {
    file: Arc<Shard>,
    dtype: String,
    shape: Vec<usize>,
    first_byte: u64,
    len_bytes: usize,
}

struct Shard {
    path: PathBuf,
    file: File,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// What a header says of a tensor.
#[derive(Deserialize)]
struct View {
    dtype: String,
    shape: Vec<usize>,
    /// Counted from the end of the header.
    data_offsets: [u64; 2],
}

impl Safetensors {
    /// Reads what the files say of their tensors, and none of these yet. They are for `device`.
    pub(super) fn open(dir: &Path, device: &Device) -> Result<Self, LoadError> {
        let mut tensors = HashMap::new();
        for path in files(dir)? {
            let shard = File::open(&path).and_then(|mut file| {
                let entries = header(&mut file)?;
                Ok((file, entries))
            });
            match shard {
                Ok((file, (data, entries))) => {
                    let file = Arc::new(Shard { path, file });
                    tensors.extend(
                        entries
                            .into_iter()
                            .map(|(name, view)| (name, Entry::new(&file, data, view))),
                    );
                }
                Err(source) => return Err(LoadError::Weights { path, source }),
            }
        }
        Ok(Self {
            tensors,
            device: device.clone(),
        })
    }

    /// What all tensors take in 32-bit floats.
    pub(super) fn bytes(&self) -> u64 {
        let floats = |entry: &Entry| entry.shape.iter().map(|size| *size as u64).product::<u64>();
        size_of::<f32>() as u64 * self.tensors.values().map(floats).sum::<u64>()
    }

    /// The tensor in 32-bit floats.
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let Some(entry) = self.tensors.remove(name) else {
            return Err(LoadError::MissingTensor {
                name: name.to_owned(),
                shape: shape.to_vec(),
            });
        };
        if entry.shape != shape {
            return Err(LoadError::TensorShape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: entry.shape,
            });
        }
        let dtype = match &*entry.dtype {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            other => {
                return Err(LoadError::TensorDtype {
                    name: name.to_owned(),
                    dtype: other.to_lowercase(),
                });
            }
        };
        let bytes = entry
            .read(dtype.size_in_bytes())
            .map_err(|source| LoadError::Weights {
                path: entry.file.path.clone(),
                source,
            })?;
        Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)
            .and_then(|tensor| tensor.to_dtype(DType::F32)?.to_device(&self.device))
            .map_err(|source| LoadError::Convert {
                name: name.to_owned(),
                source,
            })
    }
}

impl Entry {
    fn new(file: &Arc<Shard>, data: u64, view: View) -> Self {
        let [first, end] = view.data_offsets;
        Self {
            file: Arc::clone(file),
            dtype: view.dtype,
            shape: view.shape,
            first_byte: data + first,
            len_bytes: (end - first) as usize,
        }
    }

    fn read(&self, size_bytes: usize) -> io::Result<Vec<u8>> {
        if self.len_bytes != size_bytes * self.shape.iter().product::<usize>() {
            return Err(invalid("a tensor's size is not that of its shape"));
        }
        let mut file = &self.file.file;
        let mut bytes = vec![0; self.len_bytes];
        file.seek(SeekFrom::Start(self.first_byte))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Where the data begins, and what the file says of its tensors.
fn header(file: &mut File) -> io::Result<(u64, Vec<(String, View)>)> {
    let len_file = file.metadata()?.len();
    let mut len = [0; 8];
    file.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    if len > HEADER_BYTES_MAX.min(len_file) {
        return Err(invalid("its header is longer than it may be"));
    }
    let mut text = vec![0; len as usize];
    file.read_exact(&mut text)?;
    let header: HashMap<String, Value> = serde_json::from_slice(&text)?;
    let data = 8 + len;
    let mut views = Vec::new();
    for (name, view) in header {
        if name == "__metadata__" {
            continue;
        }
        let view: View = serde_json::from_value(view)?;
        let [first, end] = view.data_offsets;
        if first > end || end > len_file - data {
            return Err(invalid("a tensor reaches beyond its end"));
        }
        views.push((name, view));
    }
    Ok((data, views))
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
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
    let bytes = std::fs::read(&path).map_err(|source| LoadError::Read {
        path: path.clone(),
        source,
    })?;
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
