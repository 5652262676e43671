//! What is wanted of a plan: where it may cut, and what makes it good.

use serde::{Deserialize, Serialize};

use super::Plan;
use crate::topology::Topology;

/// What a plan is made for. It stays with the plan: what replaces it is made for the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aim {
    pub granularity: Granularity,
    pub objective: Objective,
    #[serde(default)]
    pub recompute: Recompute,
}

impl Aim {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a model may be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// Where [blocks](super::block) begin: each stays whole.
    Layer,
    /// Between any two ops.
    #[default]
    Sublayer,
}

/// What makes one plan better than another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Steps are short. Every step has the same samples: that is most samples per second, too.
    #[default]
    Throughput,
    /// The fullest device has room to spare; among plans that are equal in this, steps are short.
    Memory,
}

/// Whether shards may compute forward values again for the backward half instead of keeping them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Those that have too little memory otherwise; where the objective is memory, those that are fullest otherwise.
    #[default]
    Auto,
    Never,
    /// All that have something to compute again.
    Always,
}

/// How far a plan is from what is wanted: less is better.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Cost {
    /// Seconds of a step, or the largest share of a device's memory that is needed.
    first: f64,
    /// Seconds of a step: it decides where the first does not.
    step: f64,
}

impl Objective {
    /// # Shapes
    /// `topology`: the devices that the plan names.
    pub fn cost(self, topology: &Topology, plan: &Plan) -> Cost {
        let step = plan.step_time.0;
        let share = |s: &super::ShardPlan| {
            let has = s.devices.iter().map(|d| topology.devices[d.index()].memory.0).min().unwrap_or(0);
            s.memory.0 as f64 / has.max(1) as f64
        };
        let first = match self {
            Self::Throughput => step,
            Self::Memory => plan.shards.iter().map(share).fold(0.0, f64::max),
        };
        Cost { first, step }
    }
}

impl Cost {
    /// That of a plan which only has to be fast.
    #[cfg(test)]
    pub(super) fn of_step(step: f64) -> Self {
        Self { first: step, step }
    }

    /// Seconds of a step, or the largest share of a device's memory that is needed.
    pub(super) fn first(self) -> f64 {
        self.first
    }

    /// Whether it is below this share of another.
    pub fn is_below(self, share: f64, of: Self) -> bool {
        self.first < share * of.first || self.first <= of.first && self.step < share * of.step
    }

    pub fn total_cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.first.total_cmp(&other.first).then(self.step.total_cmp(&other.step))
    }
}
