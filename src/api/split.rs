//! What a job asks to be split.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::graph;
use crate::graph::split::MAX_PARTS;

/// Params that are split along one axis, or ops by the rows of a microbatch: either `tensor` and `axis`, or `ops`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Split {
    /// Name of a param, as `foreshard graph` lists them; `*` stands for any characters, as in `blocks.*.mlp.up`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub tensor: Option<String>,
    /// Axis of the tensor, from 0: 1 for the columns of a matrix, 0 for its rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 15))]
    pub axis: Option<u32>,
    /// A named scope of the model, as the columns of `foreshard graph --picture` have it, or an op by its name or path; `*`
    /// stands for any characters, as in `block*`, and alone for the whole model. What computes a derivative goes with what it
    /// is the derivative of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub ops: Option<String>,
    /// As equal as they can be. Parts of rows: not more than a microbatch has; as many as there are shards, or more where these
    /// are not equally fast.
    #[schemars(range(min = 2, max = 64))]
    pub parts: u32,
}

impl From<&Split> for graph::Split {
    fn from(split: &Split) -> Self {
        match split.clone() {
            Split { ops: Some(ops), parts, .. } => Self::Rows { ops, parts },
            // One of both is there: a manifest without is refused when it is read.
            Split { tensor, axis, parts, .. } => {
                Self::Params { tensor: tensor.unwrap_or_default(), axis: axis.unwrap_or_default() as usize, parts }
            }
        }
    }
}

/// Whether each says what is split and into how many parts, and none twice.
pub(super) fn check(splits: &[Split]) -> Result<(), String> {
    for (i, Split { tensor, axis, ops, parts }) in splits.iter().enumerate() {
        if !(2..=MAX_PARTS).contains(parts) {
            return Err(format!("spec.partition.split[{i}].parts: {parts}, must be 2 to {MAX_PARTS}"));
        }
        let (field, name) = match (tensor, axis, ops) {
            (Some(tensor), Some(_), None) => ("tensor", tensor),
            (None, None, Some(ops)) => ("ops", ops),
            _ => return Err(format!("spec.partition.split[{i}]: give either tensor and axis, or ops")),
        };
        let same = |s: &Split| (&s.tensor, &s.ops) == (tensor, ops);
        if name.is_empty() || splits[..i].iter().any(same) {
            return Err(format!("spec.partition.split[{i}].{field}: {name:?} is empty or there twice"));
        }
    }
    Ok(())
}
