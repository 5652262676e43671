//! Params as safetensors: start weights read piece by piece, trained ones written as they come in.
//!
//! # Source
//! The safetensors format: 8 bytes header length, a JSON header, then the tensors, dense and little-endian.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

use super::RuntimeError;
use crate::graph::{DType, Graph, Manifest, Model};

/// Longest header read.
const MAX_HEADER: u64 = 100 << 20;

/// A safetensors file with a model's params, and perhaps some of its slots.
pub struct StartWeights {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_at: u64,
    /// Indices in `Model::state`.
    tensors: BTreeSet<usize>,
}

impl StartWeights {
    /// Opens a file and checks that it holds every param, and every slot whose start depends on the params (a master
    /// copy of them): made from another start, it would undo the weights in the first step.
    pub fn open(path: &Path, model: &Model) -> Result<Self, RuntimeError> {
        let wrong = |message: String| RuntimeError::Weights { path: path.to_owned(), message };
        let mut file = File::open(path).map_err(|e| wrong(e.to_string()))?;
        let size = file.metadata().map_err(|e| wrong(e.to_string()))?.len();
        let mut length = [0u8; 8];
        file.read_exact(&mut length).map_err(|e| wrong(format!("not a safetensors file: {e}")))?;
        let length = u64::from_le_bytes(length);
        if length > size.saturating_sub(8).min(MAX_HEADER) {
            return Err(wrong(format!("not a safetensors file: a header of {length} bytes in a file of {size}")));
        }
        let mut json = vec![0; length as usize];
        file.read_exact(&mut json).map_err(|e| wrong(e.to_string()))?;
        let header: Metadata =
            serde_json::from_slice(&json).map_err(|e| wrong(format!("its header is malformed: {e}")))?;
        let data_at = 8 + length;
        let random = depends_on_key(&model.init);
        let mut tensors = BTreeSet::new();
        for (i, tensor) in model.state.iter().enumerate() {
            let (name, dtype, dims) = described(&model.manifest, tensor.tensor);
            let Some(info) = header.info(name) else {
                if i < model.n_params {
                    return Err(wrong(format!("has no tensor {name:?}, a param of this model")));
                }
                if random[i] {
                    return Err(wrong(format!(
                        "has no tensor {name:?}, a slot that starts from the params; export it too"
                    )));
                }
                continue;
            };
            let shape: Vec<u64> = info.shape.iter().map(|&d| d as u64).collect();
            if shape != *dims || Some(info.dtype) != dtype.to_safetensors() {
                let (found, at) = (info.dtype, &info.shape);
                return Err(wrong(format!("tensor {name:?} is {found:?}{at:?}, the model wants {dtype:?}{dims:?}")));
            }
            if info.data_offsets.1 as u64 > size - data_at {
                return Err(wrong(format!("is cut short: tensor {name:?} ends behind its {size} bytes")));
            }
            tensors.insert(i);
        }
        Ok(Self { path: path.to_owned(), file, header, data_at, tensors })
    }

    /// State tensors the file holds, as indices in `Model::state`.
    pub fn tensors(&self) -> BTreeSet<usize> {
        self.tensors.clone()
    }

    /// Bytes of one state tensor: a whole one or a piece of one.
    pub fn piece(&mut self, model: &Model, state: usize) -> Result<Vec<u8>, RuntimeError> {
        let tensor = &model.state[state];
        let (name, ..) = described(&model.manifest, tensor.tensor);
        let info = self.header.info(name).expect("checked on opening");
        let range = tensor.byte_range(&model.manifest);
        let mut data = vec![0; (range.end - range.start) as usize];
        let at = self.data_at + info.data_offsets.0 as u64 + range.start;
        let read = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.read_exact(&mut data));
        read.map_err(|e| RuntimeError::Weights { path: self.path.clone(), message: e.to_string() })?;
        Ok(data)
    }
}

/// Name, type and shape of a tensor of the manifest, params first.
fn described(manifest: &Manifest, tensor: usize) -> (&str, DType, &Vec<u64>) {
    match manifest.params.get(tensor) {
        Some(p) => (&p.name, p.dtype, &p.shape),
        None => {
            let s = &manifest.slots[tensor - manifest.params.len()];
            (&s.name, s.dtype, &s.shape)
        }
    }
}

/// By output: whether its value depends on a parameter.
fn depends_on_key(init: &Graph) -> Vec<bool> {
    let mut depends = vec![false; init.n_ops()];
    for (id, op) in init.ops() {
        depends[id.index()] = init.parameters().contains(&id) || op.operands.iter().any(|o| depends[o.index()]);
    }
    init.outputs().iter().map(|o| depends[o.index()]).collect()
}

/// A file in the making: invisible under its name until every param is in it.
pub struct WeightsFile<'a> {
    model: &'a Model,
    path: PathBuf,
    file: tempfile::NamedTempFile,
    /// Where the manifest's params begin.
    offsets: Vec<u64>,
    missing: BTreeSet<usize>,
}

impl<'a> WeightsFile<'a> {
    pub fn create(path: &Path, model: &'a Model) -> Result<Self, RuntimeError> {
        let failed = |source| RuntimeError::Write { path: path.to_owned(), source };
        let params = &model.manifest.params;
        let mut infos = Vec::with_capacity(params.len());
        let mut offsets = Vec::with_capacity(params.len());
        let mut end = 0u64;
        for param in params {
            let bytes = crate::graph::ArrayShape::new(param.dtype, param.shape.clone()).bytes().0;
            let Some(dtype) = param.dtype.to_safetensors() else {
                let source = std::io::Error::other(format!("safetensors has no type for {:?}", param.dtype));
                return Err(failed(source));
            };
            offsets.push(end);
            let shape = param.shape.iter().map(|&d| d as usize).collect();
            let data_offsets = (end as usize, (end + bytes) as usize);
            infos.push((param.name.clone(), TensorInfo { dtype, shape, data_offsets }));
            end += bytes;
        }
        let header = Metadata::new(None, infos).map_err(|e| failed(std::io::Error::other(e)))?;
        let mut json = serde_json::to_vec(&header).expect("a header is plain data");
        json.resize(json.len().next_multiple_of(8), b' ');
        let directory = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new()
            .prefix(".weights-")
            .permissions(std::fs::Permissions::from_mode(0o644))
            .tempfile_in(directory)
            .map_err(failed)?;
        let written = file
            .write_all(&(json.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(&json))
            .and_then(|()| file.as_file().set_len(8 + json.len() as u64 + end));
        written.map_err(failed)?;
        for offset in &mut offsets {
            *offset += 8 + json.len() as u64;
        }
        Ok(Self { model, path: path.to_owned(), file, offsets, missing: (0..model.n_params).collect() })
    }

    /// Writes one param or piece of one.
    pub fn put(&mut self, param: usize, data: &[u8]) -> Result<(), RuntimeError> {
        let tensor = &self.model.state[param];
        let range = tensor.byte_range(&self.model.manifest);
        self.missing.remove(&param);
        self.file
            .as_file()
            .write_all_at(data, self.offsets[tensor.tensor] + range.start)
            .map_err(|source| RuntimeError::Write { path: self.path.clone(), source })
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<(), RuntimeError> {
        let failed = |source| RuntimeError::Write { path: self.path.clone(), source };
        if let Some(&param) = self.missing.first() {
            let name = &self.model.state[param].name;
            return Err(failed(std::io::Error::other(format!("no worker has sent param {name:?}"))));
        }
        self.file.as_file().sync_all().map_err(failed)?;
        self.file.persist(&self.path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}
