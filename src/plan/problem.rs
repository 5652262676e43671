//! What is asked of the planner, and why it may say no.

use serde::{Deserialize, Serialize};

use super::ScheduleKind;
use crate::graph::{GradGraph, Model};
use crate::topology::Topology;
use crate::units::Bytes;

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
}

/// A problem without a plan: which limit it meets, and the way out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Infeasible {
    #[error("a plan needs at least one shard and one replica, found {n_shards} and {n_replicas}")]
    Nothing { n_shards: u32, n_replicas: u32 },
    #[error(
        "{n_shards} shards in {n_replicas} replicas need {} devices, there are {n_devices}; ask for fewer shards or name more devices",
        n_shards * n_replicas
    )]
    TooFewDevices { n_shards: u32, n_replicas: u32, n_devices: usize },
    #[error("the model can be cut into at most {n_parts} parts, {n_shards} shards were asked for")]
    TooFewOps { n_shards: u32, n_parts: usize },
    #[error(
        "no microbatch of {} rows in {n_replicas} replicas: the bundle has microbatches of {known:?} rows, the global batch has {batch_size}; export the bundle with the size you need",
        asked.map_or("any number of".to_owned(), |m| m.to_string())
    )]
    NoMicrobatch { asked: Option<u64>, n_replicas: u32, known: Vec<u64>, batch_size: u64 },
    #[error(
        "shard {shard} needs {needs}, device {device} has {has}; try {} shards, a smaller microbatch or the 1F1B schedule",
        n_shards + 1
    )]
    Memory { shard: u32, n_shards: u32, needs: Bytes, device: String, has: Bytes },
}

impl<'a> Problem<'a> {
    /// Microbatch sizes the plan may use, with their variants: those that give every replica whole microbatches.
    pub fn microbatches(&self) -> Result<Vec<(u64, Vec<&'a GradGraph>)>, Infeasible> {
        let batch_size = self.model.manifest.batch_size;
        let mut known: Vec<u64> = self.model.grads.iter().map(|g| g.microbatch).collect();
        known.sort_unstable();
        known.dedup();
        let usable: Vec<_> = known
            .iter()
            .copied()
            .filter(|&m| self.microbatch.is_none_or(|asked| asked == m))
            .filter(|&m| batch_size.is_multiple_of(m * u64::from(self.n_replicas)))
            .map(|m| (m, self.model.grads.iter().filter(|g| g.microbatch == m).collect()))
            .collect();
        if usable.is_empty() {
            let (asked, n_replicas) = (self.microbatch, self.n_replicas);
            return Err(Infeasible::NoMicrobatch { asked, n_replicas, known, batch_size });
        }
        Ok(usable)
    }
}
