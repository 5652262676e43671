//! Params as safetensors: start weights read piece by piece, trained ones written as they come in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::RuntimeError;
use super::tensor_file::{Header, Layout, TensorFile};
use crate::graph::{DType, Graph, Manifest, Model};

/// A safetensors file with a model's params, and perhaps some of its slots.
pub struct StartWeights {
    path: PathBuf,
    file: File,
    /// Index in `Model::state` to where the manifest's tensor begins in the file.
    tensors: BTreeMap<usize, u64>,
}

impl StartWeights {
    /// Opens a file and checks that it holds every param, and every slot whose start depends on the params (a master
    /// copy of them): made from another start, it would undo the weights in the first step.
    pub fn open(path: &Path, model: &Model) -> Result<Self, RuntimeError> {
        let wrong = |message: String| RuntimeError::Weights { path: path.to_owned(), message };
        let file = File::open(path).map_err(|e| wrong(e.to_string()))?;
        let header = Header::read(&file).map_err(wrong)?;
        let random = depends_on_key(&model.init);
        let mut tensors = BTreeMap::new();
        for (i, tensor) in model.state.iter().enumerate() {
            let (name, dtype, dims) = described(&model.manifest, tensor.tensor);
            match header.find(name, dtype, dims).map_err(wrong)? {
                Some(begin) => drop(tensors.insert(i, begin)),
                None if i < model.n_params => {
                    return Err(wrong(format!("has no tensor {name:?}, a param of this model")));
                }
                None if random[i] => {
                    return Err(wrong(format!(
                        "has no tensor {name:?}, a slot that starts from the params; export it too"
                    )));
                }
                None => {}
            }
        }
        Ok(Self { path: path.to_owned(), file, tensors })
    }

    /// State tensors the file holds, as indices in `Model::state`.
    pub fn tensors(&self) -> BTreeSet<usize> {
        self.tensors.keys().copied().collect()
    }

    /// Bytes of one state tensor: a whole one or a piece of one.
    pub fn piece(&mut self, model: &Model, state: usize) -> Result<Vec<u8>, RuntimeError> {
        let tensor = &model.state[state];
        let mut data = vec![0; tensor.shape.bytes().0 as usize];
        let mut rest = &mut data[..];
        for run in tensor.byte_runs(&model.manifest) {
            let (now, later) = rest.split_at_mut((run.end - run.start) as usize);
            let read = self.file.read_exact_at(now, self.tensors[&state] + run.start);
            read.map_err(|e| RuntimeError::Weights { path: self.path.clone(), message: e.to_string() })?;
            rest = later;
        }
        Ok(data)
    }
}

/// Name, type and shape of a tensor of the manifest, params first.
pub fn described(manifest: &Manifest, tensor: usize) -> (&str, DType, &[u64]) {
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
    file: TensorFile,
    /// Where the manifest's params begin.
    begins: Vec<u64>,
    missing: BTreeSet<usize>,
}

impl<'a> WeightsFile<'a> {
    pub fn create(path: &Path, model: &'a Model) -> Result<Self, RuntimeError> {
        let failed = |source| RuntimeError::Write { path: path.to_owned(), source };
        let params: Vec<_> = model.manifest.params.iter().map(|p| (p.name.clone(), p.dtype, p.shape.clone())).collect();
        let layout = Layout::new(&params).map_err(failed)?;
        let file = TensorFile::create(path, &layout).map_err(failed)?;
        Ok(Self { model, path: path.to_owned(), file, begins: layout.begins, missing: (0..model.n_params).collect() })
    }

    /// Writes one param or piece of one; `data` has its size.
    pub fn put(&mut self, param: usize, data: &[u8]) -> Result<(), RuntimeError> {
        let tensor = &self.model.state[param];
        self.missing.remove(&param);
        self.file
            .put_runs(self.begins[tensor.tensor], tensor.byte_runs(&self.model.manifest), data)
            .map_err(|source| RuntimeError::Write { path: self.path.clone(), source })
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<(), RuntimeError> {
        let failed = |source| RuntimeError::Write { path: self.path.clone(), source };
        if let Some(&param) = self.missing.first() {
            let name = &self.model.state[param].name;
            return Err(failed(std::io::Error::other(format!("no worker has sent param {name:?}"))));
        }
        self.file.finish().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(bundle: &str) -> Model {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles").join(bundle);
        Model::import(&mut |file| std::fs::read(directory.join(file))).unwrap()
    }

    /// Bytes that tell one piece from another.
    fn bytes(model: &Model, state: usize) -> Vec<u8> {
        (0..model.state[state].shape.bytes().0).map(|i| (i * 7 + state as u64) as u8).collect()
    }

    fn write(path: &Path, model: &Model) {
        let mut file = WeightsFile::create(path, model).unwrap();
        for i in (0..model.n_params).rev() {
            assert!(!path.exists());
            file.put(i, &bytes(model, i)).unwrap();
        }
        file.finish().unwrap();
    }

    #[test]
    fn trained_weights_are_start_weights() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights.safetensors");
        let model = load("mlp_digits.bundle");
        write(&path, &model);
        let mut start = StartWeights::open(&path, &model).unwrap();
        assert_eq!(start.tensors(), (0..model.n_params).collect());
        for i in 0..model.n_params {
            assert_eq!(start.piece(&model, i).unwrap(), bytes(&model, i));
        }
    }

    /// Stacked params are written and read layer by layer; master copies of params must come with them.
    #[test]
    fn master_copies_are_part_of_start_weights() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights.safetensors");
        let mut model = load("scan_gpt.bundle");
        assert!(model.state.iter().any(|t| t.rows.is_some()));
        write(&path, &model);
        let e = StartWeights::open(&path, &model).err().unwrap().to_string();
        assert!(e.contains("\"opt.master.embed\", a slot that starts from the params"), "{e}");
        model.state.truncate(model.n_params);
        let mut start = StartWeights::open(&path, &model).unwrap();
        for i in 0..model.n_params {
            assert_eq!(start.piece(&model, i).unwrap(), bytes(&model, i));
        }
    }
}
