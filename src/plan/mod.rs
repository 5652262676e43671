//! Problem in, plan out: which shard runs each op, in which order, at what predicted cost.
//!
//! `plan` knows nothing of pods, processes, clocks or files.

mod again;
pub mod aim;
pub mod block;
pub mod bound;
pub mod check;
pub mod coordinate;
pub mod count;
pub mod estimate;
pub mod explain;
pub mod fixed;
pub mod foreseen;
pub mod graph_picture;
pub mod memory;
pub mod moves;
pub mod multilevel;
pub mod picture;
pub mod pin;
pub mod place;
pub mod predict;
pub mod problem;
pub mod random;
pub mod schedule;
pub mod segment;
pub mod solve;
pub mod split;
pub mod stages;
pub mod strategy;
pub mod table;
mod traffic;
pub mod verify;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::graph::{Graph, Model, OpId, Split};
use crate::topology::DeviceId;
use crate::units::{Bytes, Seconds};

pub use aim::{Aim, Granularity, Objective, Recompute};
pub use estimate::{BatchEstimate, Priced};
pub use fixed::{Fixed, Pin, To};
pub use moves::Moving;
pub use pin::pinned;
pub use problem::{Infeasible, Problem};
pub use schedule::{Schedule, ScheduleKind};
pub use segment::Task;
use segment::{SegmentError, Segmentation, Ways};
pub use solve::{Prepared, repriced, solve};
pub use traffic::Travel;

/// Position of a shard in its plan.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardId(pub u32);

impl ShardId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
impl fmt::Debug for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard{}", self.0)
    }
}
impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where an op runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    Shard(ShardId),
    /// Cheap and without inputs that only one shard holds (constants, iota, index arithmetic, the key): every
    /// shard that reads the value computes it.
    Everywhere,
}

/// Which shard runs every op of one graph. Index: [`OpId`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Assignment(pub Vec<Place>);

impl Assignment {
    pub fn place(&self, op: OpId) -> Place {
        self.0[op.index()]
    }
}

/// One shard of a plan, with what the planner predicts for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardPlan {
    /// The device of every replica of this shard; all shards have the same number of replicas.
    pub devices: Vec<DeviceId>,
    /// Computing time per step, without waiting.
    pub busy: Seconds,
    /// Peak memory: state, gradients, residuals in flight, temporaries.
    pub memory: Bytes,
    /// Sent to other shards per step.
    pub sent: Bytes,
    /// Its backward segments compute again what they read of the forward half: of that only what came in is kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub recompute: bool,
}

/// A whole assignment with its predictions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub revision: u64,
    /// Fingerprint of the model the assignments index.
    pub model: String,
    /// What of the bundle is split first; the assignments index the split model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub split: Vec<Split>,
    /// Rows of one microbatch: the plan runs the variants of this size.
    pub microbatch: u64,
    pub shards: Vec<ShardPlan>,
    /// Replicas of the whole pipeline.
    pub n_replicas: u32,
    /// Microbatches each replica runs per step.
    pub n_microbatches: u32,
    /// Places of the ops of every grad graph of this microbatch size, by variant name.
    pub grads: BTreeMap<String, Assignment>,
    /// Owner of every state tensor: a slot goes with its param, a shared slot is everywhere. Param ops of the grad
    /// graphs are placed on the owner.
    pub owners: Vec<Place>,
    pub schedule: ScheduleKind,
    #[serde(default, skip_serializing_if = "Aim::is_default")]
    pub aim: Aim,
    /// What people have said of places; what replaces the plan heeds it too.
    #[serde(default, skip_serializing_if = "Fixed::is_none")]
    pub fixed: Fixed,
    /// Order of work by variant and shard; `segment` indexes the variant's [`segment::Segmentation`].
    pub orders: BTreeMap<String, Vec<Vec<Task>>>,
    /// Predicted time of one step.
    pub step_time: Seconds,
    /// No plan on these devices can be faster.
    pub bound: Seconds,
    /// Crossing between shards per step.
    pub bytes_cut: Bytes,
    /// From the plan that was in force when it was made; `None` where there was none, or nothing changes hands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<Moving>,
}

/// What moves more or is less plain has to gain more: a plan stays unless another costs less than this share of it.
const GAIN: f64 = 0.99;

impl Plan {
    /// A grad graph of this plan, cut into what its shards run.
    ///
    /// # Errors
    /// [`SegmentError`] for a graph that the plan was not made for.
    pub fn cut(&self, model: &Model, graph: &Graph, assignment: &Assignment) -> Result<Segmentation, SegmentError> {
        let results = self.grad_results(model, graph, assignment);
        let again = self.recomputes();
        let ways = Ways { apart: self.schedule.sets_apart(), again: &again };
        Segmentation::of_gradients(graph, assignment, &results, self.shards.len(), ways)
    }

    /// By shard: whether it computes forward values again.
    pub fn recomputes(&self) -> Vec<bool> {
        self.shards.iter().map(|s| s.recompute).collect()
    }

    /// Where each output of a grad graph ends up: loss and metrics where they are computed, gradients on the owners of
    /// their params.
    pub fn grad_results(&self, model: &Model, graph: &Graph, assignment: &Assignment) -> Vec<Place> {
        let n_scalars = graph.outputs().len() - model.n_params;
        let scalars = graph.outputs()[..n_scalars].iter().map(|&o| match assignment.place(o) {
            Place::Everywhere => Place::Shard(ShardId(0)),
            place => place,
        });
        scalars.chain(self.owners[..model.n_params].iter().copied()).collect()
    }
}
