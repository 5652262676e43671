//! `manifest.json` of a bundle: what the graphs' inputs and outputs are called.
//!
//! Calling conventions, in order:
//!
//! | graph | inputs | outputs |
//! |---|---|---|
//! | init | key `uint32[2]` | params, slots |
//! | grad | params, batch (one microbatch), key `uint32[2]` | loss, metrics, gradients (one per param) |
//! | update | params, slots, gradients *summed* over microbatches, their number `float32[]` | params, slots |
//!
//! Loss and metrics are means over the rows of a microbatch; a step reports their mean over its microbatches.
//! The key of microbatch `m` of step `s` is `fold_in(fold_in(PRNGKey(seed), s), m)` (threefry), whatever the plan.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::shape::{ArrayShape, DType};

/// The format this version reads and writes.
pub const FORMAT: &str = "foreshard.bundle/1";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    pub name: String,
    /// Rows of the global batch: the leading axis of every batch tensor.
    pub batch_size: u64,
    pub params: Vec<ParamSpec>,
    pub slots: Vec<SlotSpec>,
    /// Shapes of the global batch.
    pub batch: Vec<TensorSpec>,
    pub metrics: Vec<TensorSpec>,
    pub init: FunctionSpec,
    pub grad: Vec<GradSpec>,
    pub update: FunctionSpec,
    #[serde(default)]
    pub weights: Option<FileSpec>,
    /// Versions of the exporter and of what it ran on; read by people only.
    #[serde(default)]
    pub provenance: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
}

impl TensorSpec {
    pub fn array(&self) -> ArrayShape {
        ArrayShape::new(self.dtype, self.shape.clone())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamSpec {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// Type of the gradient and of its sum: at least `float32`, also for half-width params.
    pub grad_dtype: DType,
}

/// One leaf of the optimizer's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotSpec {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// The param this slot belongs to (a moment, a master copy); absent for shared state such as a step count.
    #[serde(default)]
    pub param: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Path inside the bundle.
    pub file: String,
    /// Lower-case hex.
    pub sha256: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionSpec {
    /// `HloModuleProto`, what Foreshard runs.
    pub hlo: FileSpec,
    /// Portable StableHLO artifact, kept for the day HLO changes.
    #[serde(default)]
    pub stablehlo: Option<FileSpec>,
}

/// The gradient function for one microbatch shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradSpec {
    /// Unique name of the variant, such as `mb2` or `mb2-t64`.
    pub name: String,
    /// Rows of the microbatch; divides the global batch.
    pub microbatch: u64,
    /// Shape of every batch tensor of one microbatch, by name.
    pub shapes: BTreeMap<String, Vec<u64>>,
    pub hlo: FileSpec,
    #[serde(default)]
    pub stablehlo: Option<FileSpec>,
}
