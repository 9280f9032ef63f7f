//! Records as lines of JSON in a file.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use super::{Exporter, Record, now_ms};

/// Appends a line of JSON for each record. The file is opened for each batch, so that it may be
/// moved away at any time.
#[derive(Debug)]
pub struct Jsonl {
    path: PathBuf,
    rotate_bytes: u64,
}

impl Jsonl {
    /// Appends to this file. One that would become larger than this is moved away first: the time,
    /// in milliseconds since 1970, is put behind its name.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, rotate_bytes: u64) -> Self {
        Self {
            path: path.into(),
            rotate_bytes,
        }
    }

    /// The file, with the place behind its last line.
    fn open(&self, bytes: u64) -> io::Result<(File, u64)> {
        let (file, end) = append_to(&self.path)?;
        if end == 0 || end.saturating_add(bytes) <= self.rotate_bytes {
            return Ok((file, end));
        }
        std::fs::rename(&self.path, self.moved())?;
        append_to(&self.path)
    }

    /// A name that is free.
    fn moved(&self) -> PathBuf {
        let mut time = now_ms();
        loop {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{time}"));
            if !Path::new(&name).exists() {
                return name.into();
            }
            time += 1;
        }
    }
}

impl Exporter for Jsonl {
    fn export(&mut self, records: &[Record]) -> io::Result<()> {
        let mut lines = Vec::new();
        for record in records {
            serde_json::to_writer(&mut lines, record)?;
            lines.push(b'\n');
        }
        let (mut file, end) = self.open(lines.len() as u64)?;
        let written = file.write_all(&lines).and_then(|()| file.sync_data());
        if written.is_err() {
            // Half a batch would be there twice, and half a line be none. Where that fails too, the
            // next batch begins on a line of its own.
            let _ = file.set_len(end);
        }
        written
    }
}

fn append_to(path: &Path) -> io::Result<(File, u64)> {
    let mut options = File::options();
    let mut file = options.create(true).read(true).append(true).open(path)?;
    let end = file.seek(SeekFrom::End(0))?;
    if end == 0 {
        return Ok((file, 0));
    }
    let mut last = [0];
    file.seek(SeekFrom::Start(end - 1))?;
    file.read_exact(&mut last)?;
    // A process that was killed may have left half a line.
    if last == *b"\n" {
        return Ok((file, end));
    }
    file.write_all(b"\n")?;
    Ok((file, end + 1))
}
