//! What the head of a job says of it: to whoever asks, and as its last words.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::plan::explain::Short;
use crate::topology::Measured;

/// Exit code of a worker that cannot use its device, and will not with the same image on the same node.
pub const NO_DEVICE: u8 = 3;

/// A job as it stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobReport {
    pub state: JobState,
    /// Steps done, those of earlier runs too.
    pub step: u64,
    pub steps: u64,
    /// Of the first step of this run, and of the last one.
    pub first_loss: Option<f64>,
    pub loss: Option<f64>,
    /// Of the last step.
    pub step_seconds: Option<f64>,
    /// Trained per second, and of what: a moving average.
    pub rate: Option<f64>,
    pub unit: String,
    /// Seconds left, at the pace of this run.
    pub eta_seconds: Option<f64>,
    pub restarts: u32,
    pub plan: Option<PlanReport>,
    /// A plan that waits for a person to agree.
    pub recommended: Option<Recommended>,
    /// What steps have taught of the devices.
    pub learned: Option<Learned>,
    /// By rank: share of the last step in which the worker computed.
    pub busy: Vec<f64>,
    /// What was last said, or why the job ended.
    pub message: String,
    /// Where the results of this run lie.
    pub results: String,
}

/// Measured costs of the ops of a bundle.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Digest of the bundle.
    pub bundle: String,
    /// By kind of device.
    pub kinds: BTreeMap<String, Measured>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Workers come and compile.
    #[default]
    Starting,
    Training,
    Done,
    /// Stopped on request; another run goes on from its last checkpoint.
    Interrupted,
    /// The job's input cannot be used: another run would end the same.
    Refused,
    Failed,
}

/// A plan that may be taken over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recommended {
    pub revision: u64,
    pub why: String,
}

/// A plan in force, without its ops.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanReport {
    pub revision: u64,
    /// Why it came into force.
    pub why: String,
    pub step_seconds: f64,
    pub bound_seconds: f64,
    pub microbatch: u64,
    pub microbatches: u32,
    pub bytes_cut: u64,
    pub shards: Vec<ShardReport>,
    /// Comes a while after the plan: other plans are made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Short>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ShardReport {
    /// By replica.
    pub workers: Vec<u32>,
    pub ops: u64,
    pub busy_seconds: f64,
    pub memory: u64,
    pub sent: u64,
    /// It computes forward values again instead of keeping them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub recompute: bool,
}
