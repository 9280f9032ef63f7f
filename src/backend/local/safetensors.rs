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

use super::{
    LoadError,
    weights::{of_shape, with_extension},
};
use crate::files::Files;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The largest header that is read, as the format says.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Where the tensors stand, by name. Each is read when it is taken, so that no more than one is
/// in memory besides those that the model already has.
pub(super) struct Safetensors {
    tensors: HashMap<String, Entry>,
    device: Device,
    dtype: DType,
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
    data: Data,
}

/// The bytes of a file.
enum Data {
    File(File),
    BuiltIn(&'static [u8]),
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
    pub(super) fn open(files: &Files, device: &Device) -> Result<Self, LoadError> {
        let mut tensors = HashMap::new();
        for shard in shards(files)? {
            let (first, views) = shard.data.header().map_err(|source| LoadError::Weights {
                path: shard.path.clone(),
                source,
            })?;
            let shard = Arc::new(shard);
            let entries = views
                .into_iter()
                .map(|(name, view)| (name, Entry::new(&shard, first, view)));
            tensors.extend(entries);
        }
        // A CPU computes in 32-bit floats; an accelerator in those that most of the model is in.
        let own = tensors
            .get("model.embed_tokens.weight")
            .and_then(Entry::dtype);
        let dtype = own.filter(|_| !device.is_cpu()).unwrap_or(DType::F32);
        Ok(Self {
            tensors,
            device: device.clone(),
            dtype,
        })
    }

    /// What its tensors are taken as.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// How many numbers all tensors hold.
    pub(super) fn parameters(&self) -> u64 {
        let floats = |entry: &Entry| entry.shape.iter().map(|size| *size as u64).product::<u64>();
        self.tensors.values().map(floats).sum()
    }

    /// What all tensors take.
    pub(super) fn bytes(&self) -> u64 {
        self.dtype.size_in_bytes() as u64 * self.parameters()
    }

    /// The tensor, as [`Safetensors::dtype`].
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let entry = self.tensors.remove(name);
        let entry = of_shape(entry, |entry| &entry.shape, name, shape)?;
        let Some(dtype) = entry.dtype() else {
            return Err(LoadError::TensorDtype {
                name: name.to_owned(),
                dtype: entry.dtype.to_lowercase(),
            });
        };
        let bytes = entry
            .read(dtype.size_in_bytes())
            .map_err(|source| LoadError::Weights {
                path: entry.file.path.clone(),
                source,
            })?;
        Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)
            .and_then(|tensor| tensor.to_dtype(self.dtype)?.to_device(&self.device))
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

    fn dtype(&self) -> Option<DType> {
        match &*self.dtype {
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }

    fn read(&self, size_bytes: usize) -> io::Result<Vec<u8>> {
        if self.len_bytes != size_bytes * self.shape.iter().product::<usize>() {
            return Err(invalid("a tensor's size is not that of its shape"));
        }
        let mut bytes = vec![0; self.len_bytes];
        self.file.data.read(self.first_byte, &mut bytes)?;
        Ok(bytes)
    }
}

impl Data {
    /// Fills `bytes` from this place of the file on.
    fn read(&self, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => {
                let mut file = file;
                file.seek(SeekFrom::Start(first))?;
                file.read_exact(bytes)
            }
            Self::BuiltIn(all) => {
                let mut rest = all.get(first as usize..).unwrap_or_default();
                rest.read_exact(bytes)
            }
        }
    }

    fn len(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::BuiltIn(all) => Ok(all.len() as u64),
        }
    }

    /// Where the data begins, and what the file says of its tensors.
    fn header(&self) -> io::Result<(u64, Vec<(String, View)>)> {
        let len_file = self.len()?;
        let mut len = [0; 8];
        self.read(0, &mut len)?;
        let len = u64::from_le_bytes(len);
        if len > HEADER_BYTES_MAX.min(len_file) {
            return Err(invalid("its header is longer than it may be"));
        }
        let mut text = vec![0; len as usize];
        self.read(8, &mut text)?;
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
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// The files that hold the model.
fn shards(files: &Files) -> Result<Vec<Shard>, LoadError> {
    match files {
        Files::Directory(dir) => paths(dir)?
            .into_iter()
            .map(|path| match File::open(&path) {
                Ok(file) => Ok(Shard {
                    path,
                    data: Data::File(file),
                }),
                Err(source) => Err(LoadError::Read { path, source }),
            })
            .collect(),
        Files::BuiltIn(model) => {
            let path = files.path(SINGLE);
            match model.bytes(SINGLE) {
                Some(bytes) => Ok(vec![Shard {
                    path,
                    data: Data::BuiltIn(bytes),
                }]),
                None => Err(LoadError::NoWeights { path }),
            }
        }
    }
}

/// The one with the usual name, those that the index names, or all that are there.
fn paths(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let single = dir.join(SINGLE);
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = dir.join(INDEX);
    if index.is_file() {
        return indexed(dir, index);
    }
    let files = with_extension(dir, "safetensors")?;
    match files.is_empty() {
        true => Err(LoadError::NoWeights { path: dir.into() }),
        false => Ok(files),
    }
}

fn indexed(dir: &Path, path: PathBuf) -> Result<Vec<PathBuf>, LoadError> {
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
