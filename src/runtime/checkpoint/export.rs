//! Whole tensors of the manifest in one safetensors file.

use std::collections::BTreeSet;
use std::path::Path;

use super::CheckpointError;
use super::index::{Kind, TensorEntry};
use super::read::Checkpoint;
use crate::runtime::tensor_file::{Layout, TensorFile};

impl Checkpoint {
    /// Writes the params, and with `slots` the optimizer's state, under the manifest's names: start weights for
    /// another run, or for any reader of safetensors. Written beside `path` and renamed.
    pub fn export(&self, path: &Path, slots: bool) -> Result<(), CheckpointError> {
        let failed = |source| CheckpointError::Write { path: path.to_owned(), source };
        let chosen: Vec<&TensorEntry> =
            self.index().tensors.iter().filter(|t| slots || t.kind == Kind::Param).collect();
        let mut names = BTreeSet::new();
        if let Some(twice) = chosen.iter().find(|t| !names.insert(&t.name)) {
            return Err(CheckpointError::SameName { name: twice.name.clone() });
        }
        let tensors: Vec<_> = chosen.iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone())).collect();
        let layout = Layout::new(&tensors).map_err(failed)?;
        let mut file = TensorFile::create(path, &layout).map_err(failed)?;
        for (tensor, begin) in chosen.into_iter().zip(&layout.begins) {
            let size = tensor.dtype.size();
            for piece in &tensor.pieces {
                let data = self.piece(tensor, piece);
                let data = data.map_err(|fault| CheckpointError::Broken { path: self.path().to_owned(), fault })?;
                let runs = tensor.region(piece).runs(&tensor.shape).map(|r| r.start * size..r.end * size);
                file.put_runs(*begin, runs, &data).map_err(failed)?;
            }
        }
        file.finish().map_err(failed)
    }
}
