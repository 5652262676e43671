//! A whole bundle in memory: manifest, state and the three graphs, ready for planning and cutting.

use std::ops::Range;

use super::error::GraphError;
use super::ir::Graph;
use super::manifest::{Manifest, TensorSpec};
use super::shape::ArrayShape;

/// One tensor of the training state that has exactly one owner: a param, an optimizer slot, or the slice of a
/// stacked one that belongs to one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct StateTensor {
    /// Unique: the manifest's name, with `[3]` behind it for the fourth slice of a stacked tensor.
    pub name: String,
    /// Index in `manifest.params`, or `manifest.params.len()` + index in `manifest.slots`.
    pub tensor: usize,
    /// Slices of the leading axis this piece holds; `None` for the whole tensor. A piece keeps the leading axis.
    pub rows: Option<Range<u64>>,
    pub shape: ArrayShape,
    /// For a slot: index in [`Model::state`] of the param it follows; `None` for params and for shared slots,
    /// which every shard keeps.
    pub param: Option<usize>,
}

impl StateTensor {
    /// Where this piece lies inside the manifest's tensor.
    pub fn byte_range(&self, manifest: &Manifest) -> Range<u64> {
        let _ = manifest;
        let rows = self.rows.clone().unwrap_or(0..1);
        let n = (rows.end - rows.start).max(1);
        let per_row = self.shape.bytes().0 / n;
        rows.start * per_row..rows.start * per_row + self.shape.bytes().0
    }
}

/// The gradient function of one microbatch shape.
#[derive(Clone, Debug)]
pub struct GradGraph {
    pub name: String,
    /// Rows of one microbatch.
    pub microbatch: u64,
    /// Batch tensors of one microbatch, in the manifest's order.
    pub batch: Vec<TensorSpec>,
    /// Parameters: params, batch, key `u32[2]`. Outputs: loss, metrics, one gradient per param.
    pub graph: Graph,
}

/// A model, imported, normalised and verified.
#[derive(Clone, Debug)]
pub struct Model {
    pub manifest: Manifest,
    /// Params first, then slots. "Params" and "slots" in the graphs below mean these pieces, in this order.
    pub state: Vec<StateTensor>,
    pub n_params: usize,
    /// Parameters: key `u32[2]`. Outputs: one per state tensor.
    pub init: Graph,
    pub grads: Vec<GradGraph>,
    /// Parameters: state, one summed gradient per param, number of microbatches `f32[]`. Outputs: state.
    pub update: Graph,
}

impl Model {
    /// Reads a bundle. `fetch` returns the bytes of a file by its path inside the bundle.
    pub fn import(_fetch: &mut dyn FnMut(&str) -> std::io::Result<Vec<u8>>) -> Result<Self, GraphError> {
        unimplemented!()
    }

    /// Position of the variant called `name`.
    pub fn variant(&self, name: &str) -> Option<&GradGraph> {
        self.grads.iter().find(|g| g.name == name)
    }
}
