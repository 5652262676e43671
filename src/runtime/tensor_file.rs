//! Safetensors files: what start weights, trained weights, shard files of checkpoints and exports share.
//!
//! # Source
//! The safetensors format: 8 bytes header length, a JSON header, then the tensors, dense and little-endian.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::graph::{ArrayShape, DType};

/// Longest header read.
const MAX_HEADER: u64 = 100 << 20;

/// How a tensor stands in a file. Safetensors has no `complex128`: it is stored as pairs of `float64`.
pub fn stored(dtype: DType, dims: &[u64]) -> (Dtype, Vec<usize>) {
    let dims = dims.iter().map(|&d| d as usize);
    match dtype.to_safetensors() {
        Some(dtype) => (dtype, dims.collect()),
        None => (Dtype::F64, dims.chain([2]).collect()),
    }
}

/// Where everything lies in a file that is about to be written.
pub struct Layout {
    /// Start of the file: the header's length and the header.
    pub head: Vec<u8>,
    /// Where each tensor begins in the file, in the order given.
    pub begins: Vec<u64>,
    /// Positions of the tensors given, in the order of the file.
    pub order: Vec<usize>,
    /// Length of the whole file.
    pub bytes: u64,
}

impl Layout {
    /// Lays out tensors of (name, type, shape). Names must be unique. Types of large elements come first, so that
    /// every tensor is aligned for readers that map the file.
    pub fn new(tensors: &[(String, DType, Vec<u64>)]) -> io::Result<Self> {
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(tensors[i].1.size()), i));
        let mut begins = vec![0; tensors.len()];
        let mut infos = Vec::with_capacity(tensors.len());
        let mut end = 0u64;
        for &i in &order {
            let (name, dtype, dims) = &tensors[i];
            begins[i] = end;
            let bytes = ArrayShape::new(*dtype, dims.clone()).bytes().0;
            end = end.checked_add(bytes).ok_or_else(|| io::Error::other("longer than any file"))?;
            let (dtype, shape) = stored(*dtype, dims);
            infos.push((name.clone(), TensorInfo { dtype, shape, data_offsets: (begins[i] as usize, end as usize) }));
        }
        let header = Metadata::new(None, infos).map_err(io::Error::other)?;
        let mut json = serde_json::to_vec(&header).expect("a header is plain data");
        json.resize(json.len().next_multiple_of(8), b' ');
        let head = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
        let data_at = head.len() as u64;
        for begin in &mut begins {
            *begin += data_at;
        }
        Ok(Self { begins, order, bytes: data_at + end, head })
    }
}

/// The header of a file.
pub struct Header {
    tensors: Metadata,
    data_at: u64,
    /// Length of the whole file.
    pub bytes: u64,
}

impl Header {
    /// Reads a header; the error says what is wrong with the file.
    pub fn read(file: &File) -> Result<Self, String> {
        let bytes = file.metadata().map_err(|e| e.to_string())?.len();
        let mut length = [0u8; 8];
        file.read_exact_at(&mut length, 0).map_err(|e| format!("not a safetensors file: {e}"))?;
        let length = u64::from_le_bytes(length);
        if length > bytes.saturating_sub(8).min(MAX_HEADER) {
            return Err(format!("not a safetensors file: a header of {length} bytes in a file of {bytes}"));
        }
        let mut json = vec![0; length as usize];
        file.read_exact_at(&mut json, 8).map_err(|e| e.to_string())?;
        let tensors = serde_json::from_slice(&json).map_err(|e| format!("its header is malformed: {e}"))?;
        Ok(Self { tensors, data_at: 8 + length, bytes })
    }

    /// Where a tensor begins in the file; `None` when there is no such tensor, an error when it is another one.
    pub fn find(&self, name: &str, dtype: DType, dims: &[u64]) -> Result<Option<u64>, String> {
        let Some(info) = self.tensors.info(name) else { return Ok(None) };
        let (expected, shape) = stored(dtype, dims);
        if info.dtype != expected || info.shape != shape {
            let (found, at) = (info.dtype, &info.shape);
            return Err(format!("tensor {name:?} is {found:?}{at:?}, the model wants {dtype:?}{dims:?}"));
        }
        if info.data_offsets.1 as u64 > self.bytes - self.data_at {
            return Err(format!("is cut short: tensor {name:?} ends behind its {} bytes", self.bytes));
        }
        Ok(Some(self.data_at + info.data_offsets.0 as u64))
    }
}

/// A file in the making: invisible under its name until it is finished.
pub struct TensorFile {
    path: PathBuf,
    file: tempfile::NamedTempFile,
}

impl TensorFile {
    pub fn create(path: &Path, layout: &Layout) -> io::Result<Self> {
        let mut file = tempfile::Builder::new()
            .prefix(".weights-")
            .permissions(std::fs::Permissions::from_mode(0o644))
            .tempfile_in(parent(path))?;
        file.write_all(&layout.head)?;
        file.as_file().set_len(layout.bytes)?;
        Ok(Self { path: path.to_owned(), file })
    }

    pub fn put(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        self.file.as_file().write_all_at(data, at)
    }

    /// Writes bytes that belong into ranges of a tensor, which begins at `begin`.
    pub fn put_runs(
        &mut self,
        begin: u64,
        runs: impl Iterator<Item = std::ops::Range<u64>>,
        mut data: &[u8],
    ) -> io::Result<()> {
        for run in runs {
            let (now, later) = data
                .split_at_checked((run.end - run.start) as usize)
                .ok_or_else(|| io::Error::other("fewer bytes than the piece has"))?;
            self.put(begin + run.start, now)?;
            data = later;
        }
        Ok(())
    }

    /// Gives the file its name.
    pub fn finish(self) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(&self.path).map_err(|e| e.error)?;
        sync_directory(parent(&self.path))
    }
}

/// The directory a path lies in.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes new, renamed and removed entries of a directory outlast a power cut.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
