//! Control messages between the parent of a job and its workers: JSON in frames of kind `Control`.
//!
//! ```text
//! worker                        parent
//!   Hello            ->
//!                    <-         Launch        the plan, and where the peers listen
//!   Progress ...     ->                       executables compiled
//!   Ready            ->
//!                    <-         Step          then the step's batch frames; at most a few steps ahead
//!   Report           ->
//!                    <-         Finish
//!   state frames     ->
//!   Done             ->
//! ```
//! `Failed` may come from a worker at any time and ends the job. Between two workers the dialling one sends `Peer`
//! and tensors follow in both directions.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::plan::Plan;

/// Longest control message before the peer has shown its token.
pub const MAX_HELLO: u64 = 64 << 10;
/// Longest control message: a plan names every op.
pub const MAX_CONTROL: u64 = 256 << 20;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToParent {
    Hello { rank: u32, token: String, pid: u32, listen: SocketAddr },
    Progress { compiled: u32, of: u32 },
    Ready(ReadyReport),
    Report(StepDone),
    Done,
    Failed { message: String, class: FailureClass },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToWorker {
    Launch(Box<Launch>),
    Step { step: u64, variant: String },
    Finish,
}

/// First message between two workers, from the one that dials.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    pub rank: u32,
    pub token: String,
}

/// Everything a worker must know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    pub bundle: PathBuf,
    pub plan: Plan,
    pub seed: u64,
    pub incarnation: u32,
    /// Start weights (safetensors by the manifest's names) instead of `init`'s params.
    pub weights: Option<PathBuf>,
    /// Report spans of the first so many steps.
    pub traced_steps: u64,
    /// Where each rank listens.
    pub peers: Vec<SocketAddr>,
}

/// What failed: tells the parent whose story to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// Something in this worker.
    Own,
    /// A connection to another worker broke: that one probably has the cause.
    Peer,
}

/// Memory of a prepared worker, by what the compiler reports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadyReport {
    /// Params, slots and copies of others' params.
    pub state_bytes: u64,
    /// Sums of gradients.
    pub gradient_bytes: u64,
    /// Residuals of the microbatches in flight.
    pub residual_bytes: u64,
    /// Largest need of one executable for temporaries.
    pub temporary_bytes: u64,
    /// Resident memory of the process when all is compiled, before it made any tensor.
    pub baseline_rss: u64,
}

/// One worker's part of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepDone {
    pub step: u64,
    /// Sums over this replica's microbatches: (output of the grad graph, value). Loss is output 0.
    pub scalars: Vec<(u32, f32)>,
    pub start_us: u64,
    pub end_us: u64,
    pub busy_s: f64,
    pub wait_s: f64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub peak_rss: u64,
    pub spans: Vec<Span>,
}

/// Work on a worker's timeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// `compute`, `send`, `receive`, `update`.
    pub kind: String,
    pub name: String,
    pub microbatch: Option<u32>,
    /// Microseconds since the Unix epoch.
    pub start_us: u64,
    pub duration_us: u64,
}
