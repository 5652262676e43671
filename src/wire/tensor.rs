//! Tensors in host memory.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::graph::ArrayShape;

/// Dense row-major values, little-endian.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    pub shape: ArrayShape,
    /// Exactly `shape.bytes()` long.
    pub data: Bytes,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({})", self.shape)
    }
}

/// Where a data source stands: all that is needed to go on from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Samples taken from the current pass.
    pub sample: u64,
}

/// One global batch: what one step trains on.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Position *after* this batch.
    pub position: Position,
    /// The manifest's gradient variant that takes these shapes.
    pub variant: String,
    /// In the manifest's order; the leading axis is the manifest's batch size.
    pub tensors: Vec<Tensor>,
}
