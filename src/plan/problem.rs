//! What is asked of the planner, and why it may say no.

use serde::{Deserialize, Serialize};

use super::aim::Cost;
use super::{Aim, Plan, ScheduleKind};
use crate::graph::{GradGraph, Model, Split};
use crate::topology::Topology;
use crate::units::Bytes;

/// Every microbatch of a step is scheduled by itself.
const MAX_MICROBATCHES: u64 = 1 << 16;

/// A model, devices, and the shape of the plan that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    pub model: &'a Model,
    /// Replica `r` of shard `s` gets one of devices `r · n_shards ..`.
    pub topology: &'a Topology,
    pub n_shards: u32,
    pub n_replicas: u32,
    /// Rows of a microbatch; the fastest one that fits when absent.
    pub microbatch: Option<u64>,
    pub schedule: ScheduleKind,
    pub aim: Aim,
}

/// A problem without a plan: which limit it meets, and the way out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Infeasible {
    #[error("a plan needs at least one shard and one replica, found {n_shards} and {n_replicas}")]
    Nothing { n_shards: u32, n_replicas: u32 },
    #[error(
        "{n_shards} shards in {n_replicas} replicas need {} devices, there are {n_devices}; ask for fewer shards or name more devices",
        u64::from(*n_shards) * u64::from(*n_replicas)
    )]
    TooFewDevices { n_shards: u32, n_replicas: u32, n_devices: usize },
    #[error("the model can be cut into at most {n_parts} parts, {n_shards} shards were asked for")]
    TooFewOps { n_shards: u32, n_parts: usize },
    #[error(
        "the model has {n_layers} layers (named scopes, as foreshard graph lists them), {n_shards} shards of whole ones were asked for; take at most {n_layers} shards, or spec.partition.granularity: sublayer"
    )]
    TooFewLayers { n_shards: u32, n_layers: usize },
    #[error(
        "no microbatch of {} rows in {n_replicas} replicas: the bundle has microbatches of {known:?} rows, the global batch has {batch_size}; export the bundle with the size you need",
        asked.map_or("any number of".to_owned(), |m| m.to_string())
    )]
    NoMicrobatch { asked: Option<u64>, n_replicas: u32, known: Vec<u64>, batch_size: u64 },
    #[error(
        "{found} microbatches per step and replica, the limit is {MAX_MICROBATCHES}; export the bundle with larger microbatches"
    )]
    TooManyMicrobatches { found: u64 },
    #[error("{n_cuts} cuts make {} shards, {n_shards} were asked for", n_cuts + 1)]
    CutCount { n_cuts: usize, n_shards: u32 },
    #[error("no block {name:?} to cut at; the model has {known:?}{hint}")]
    NoSuchBlock { name: String, known: Vec<String>, hint: String },
    #[error("a cut at {name:?} leaves nothing before it; name blocks in the order of the model, each once: {known:?}")]
    CutOrder { name: String, known: Vec<String> },
    #[error(
        "{what} needs {needs}, the largest device, {device}, has {has}; give one worker {needs} or more{}",
        or_split(split)
    )]
    Indivisible {
        what: String,
        needs: Bytes,
        device: String,
        has: Bytes,
        /// With this split the same number of shards fits.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        split: Vec<Split>,
    },
    #[error("shard {shard} needs {needs}, device {device} has {has}; {}{}", way_out(*enough, *shards), or_split(split))]
    Memory {
        shard: u32,
        n_shards: u32,
        needs: Bytes,
        device: String,
        has: Bytes,
        /// With so much on every device the same number of shards fits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        enough: Option<Bytes>,
        /// So many shards fit on devices like the largest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shards: Option<u32>,
        /// With this split the same number of shards fits.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        split: Vec<Split>,
    },
    #[error(
        "the plan that was found does not hold ({fault}): a fault of the planner; please report it with the bundle and the devices"
    )]
    Refuted { fault: String },
}

fn or_split(split: &[Split]) -> String {
    if split.is_empty() {
        return String::new();
    }
    let splits: Vec<String> = split.iter().map(ToString::to_string).collect();
    format!(", or split it: spec.partition.split: [{}]", splits.join(", "))
}

fn way_out(enough: Option<Bytes>, shards: Option<u32>) -> String {
    match (enough, shards) {
        (Some(enough), Some(n)) => format!("give every worker {enough}, or take {n} shards"),
        (Some(enough), None) => format!("give every worker {enough}: more shards alone do not help"),
        (None, Some(n)) => format!("take {n} shards"),
        (None, None) => "try a smaller microbatch or the 1F1B schedule".to_owned(),
    }
}

impl<'a> Problem<'a> {
    /// Whether there is a device for every shard of every replica.
    pub fn check_devices(&self) -> Result<(), Infeasible> {
        let &Self { n_shards, n_replicas, .. } = self;
        if n_shards == 0 || n_replicas == 0 {
            return Err(Infeasible::Nothing { n_shards, n_replicas });
        }
        let n_devices = self.topology.devices.len();
        match (n_shards as usize).saturating_mul(n_replicas as usize) > n_devices {
            true => Err(Infeasible::TooFewDevices { n_shards, n_replicas, n_devices }),
            false => Ok(()),
        }
    }

    /// What a plan for it costs.
    pub fn cost(&self, plan: &Plan) -> Cost {
        self.aim.objective.cost(self.topology, plan)
    }

    /// Microbatch sizes the plan may use, with their variants: those that give every replica whole microbatches.
    pub fn microbatches(&self) -> Result<Vec<(u64, Vec<&'a GradGraph>)>, Infeasible> {
        let batch_size = self.model.manifest.batch_size;
        let mut known: Vec<u64> = self.model.grads.iter().map(|g| g.microbatch).collect();
        known.sort_unstable();
        known.dedup();
        let mut usable: Vec<_> = known
            .iter()
            .copied()
            .filter(|&m| self.microbatch.is_none_or(|asked| asked == m))
            .filter(|&m| batch_size.is_multiple_of(m.saturating_mul(self.n_replicas.into())))
            .map(|m| (m, self.model.grads.iter().filter(|g| g.microbatch == m).collect()))
            .collect();
        if usable.is_empty() {
            let (asked, n_replicas) = (self.microbatch, self.n_replicas);
            return Err(Infeasible::NoMicrobatch { asked, n_replicas, known, batch_size });
        }
        let per_replica = |m: u64| batch_size / m / u64::from(self.n_replicas);
        let fewest = usable.last().map_or(0, |(m, _)| per_replica(*m));
        usable.retain(|(m, _)| per_replica(*m) <= MAX_MICROBATCHES);
        if usable.is_empty() {
            return Err(Infeasible::TooManyMicrobatches { found: fewest });
        }
        Ok(usable)
    }
}
