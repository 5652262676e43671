//! Orders of work per shard, found by simulation.
use serde::{Deserialize, Serialize};

/// Order of microbatches through the pipeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScheduleKind {
    /// All forward work first, then all backward work.
    GPipe,
    /// One forward, one backward: bounds the residuals in flight by the depth of the pipeline.
    #[default]
    #[serde(rename = "1F1B")]
    OneFOneB,
}
/// Placeholder replaced below.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {}
