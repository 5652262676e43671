//! Control messages between the parent of a job and its workers: JSON in frames of kind `Control`.
//!
//! ```text
//! worker                        parent
//!   Hello            ->
//!                    <-         Prepare       a plan, this worker's seat in it, and where its peers listen
//!   Progress ...     ->                       executables compiled
//!   Ready            ->                       or Refused: what runs goes on
//!                    <-         Begin          from the seed or a checkpoint
//!   Begun            ->
//!                    <-         Step          then the step's batch frames; at most a few steps ahead
//!   Report           ->
//!                    <-         Finish
//!   state frames     ->
//!   Done             ->
//! ```
//! A cutover is another `Prepare` while steps go on, then `Commit` before the step that ends under the new plan, then
//! `Release` of the old one once all have reported that step; `Abort` instead of `Commit` leaves everything as it was.
//! `Save` writes a worker's part of a checkpoint. After a failure `Reset` takes the survivors back to the state before
//! `Prepare`. A worker that has been told to go says `Leaving`; the parent saves what it holds and lets it go. Between two workers the dialling one sends [`Peer`] and tensors follow in both directions.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::plan::Plan;

/// Longest control message before the peer has shown its token.
pub const MAX_HELLO: u64 = 64 << 10;
/// Longest control message: a plan names every op.
pub const MAX_CONTROL: u64 = 256 << 20;

/// A worker process, whatever plan it serves: ranks are positions in a plan, and change with it.
pub type WorkerId = u32;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToParent {
    Hello {
        worker: WorkerId,
        token: String,
        pid: u32,
        listen: SocketAddr,
    },
    Progress {
        revision: u64,
        compiled: u32,
        of: u32,
    },
    /// The revision can run: compiled, connected.
    Ready {
        revision: u64,
        report: ReadyReport,
    },
    /// The revision cannot be prepared here; what runs goes on.
    Refused {
        revision: u64,
        message: String,
        class: FailureClass,
    },
    /// The state is there.
    Begun {
        revision: u64,
    },
    Report(StepDone),
    /// This worker's part of the checkpoint before `step` lies on disk; `entry` goes into the index.
    Saved {
        step: u64,
        entry: serde_json::Value,
        seconds: f64,
    },
    NotSaved {
        step: u64,
        message: String,
    },
    /// Nothing of earlier incarnations is left.
    Idle {
        incarnation: u32,
    },
    /// Alive; `waiting`: for an order or for a tensor of a peer.
    Pong {
        waiting: bool,
    },
    /// This worker has been told to go: it stays for a moment, so that its state can be saved.
    Leaving,
    Done,
    Failed {
        message: String,
        class: FailureClass,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToWorker {
    Prepare(Box<Prepare>),
    /// Make the state of a prepared revision; the next step is `step`.
    Begin {
        revision: u64,
        step: u64,
        /// Directory of a checkpoint; from the seed and the start weights when absent.
        checkpoint: Option<PathBuf>,
    },
    Step {
        step: u64,
        variant: String,
    },
    /// The gradients of `step` are still the old plan's, its update is the new one's.
    Commit {
        revision: u64,
        step: u64,
    },
    /// Nobody needs the old plan any more.
    Release {
        revision: u64,
    },
    /// Forget a prepared revision.
    Abort {
        revision: u64,
    },
    /// Write what this worker owns now, before `step`, to this file.
    Save {
        step: u64,
        path: PathBuf,
    },
    /// Drop everything and wait for `Prepare`.
    Reset {
        incarnation: u32,
    },
    /// Say `Pong`, whatever else is going on.
    Ping,
    Finish,
}

/// First message between two workers, from the one that dials.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    pub worker: WorkerId,
    pub token: String,
    pub revision: u64,
    pub incarnation: u32,
}

/// Where a worker listens for its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seat {
    pub worker: WorkerId,
    pub address: SocketAddr,
}

/// A state tensor that changes hands at a cutover, with the gradient of the step if it is a param.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Move {
    /// Index in the model's state.
    pub state: u32,
    pub from: WorkerId,
    pub to: WorkerId,
}

/// Everything a worker must know to get ready for a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepare {
    pub bundle: PathBuf,
    pub plan: Plan,
    pub seed: u64,
    pub incarnation: u32,
    /// Start weights (safetensors by the manifest's names) instead of `init`'s params.
    pub weights: Option<PathBuf>,
    /// Report spans of the first so many steps.
    pub traced_steps: u64,
    /// By rank.
    pub seats: Vec<Seat>,
    /// Workers that serve the running plan and not this one.
    pub leaving: Vec<Seat>,
    /// What this worker sends and receives at the cutover.
    pub moves: Vec<Move>,
    /// Microbatches that the running plan sums in a step; 0 when none runs.
    pub summed: u32,
    /// The state will be made from the seed, not taken from a checkpoint or another plan.
    pub fresh: bool,
    /// For later: no module is begun after so many seconds of compiling. `None`: it will run, so all of them are needed.
    pub spell_s: Option<f64>,
}

/// What failed: tells the parent whose story to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// Something in this worker, which ends.
    Own,
    /// A connection to another worker broke: that one probably has the cause. This one waits for `Reset`.
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
    /// The most that was resident before: what compiling or loading took.
    pub compiling_rss: u64,
    /// From the order to being ready.
    pub seconds: f64,
    /// Executables found in the cache on disk.
    pub cached: u32,
    /// Executables compiled anew.
    pub compiled: u32,
    /// Modules that [`Prepare::spell_s`] was too short for: the plan cannot run yet.
    pub left: u32,
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
    /// Waiting for the order to take this step.
    pub idle_s: f64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// What receiving took, from the head of each message to its end.
    pub received_s: f64,
    pub peak_rss: u64,
    pub spans: Vec<Span>,
    /// What each executable took, in the order of this shard's segments: gradients (all microbatches), then update.
    pub segments_s: Vec<f32>,
    /// This step ended under a new plan.
    pub switch: Option<Switched>,
}

/// What a cutover cost a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Switched {
    pub revision: u64,
    /// Received from the owners before.
    pub moved_bytes: u64,
    /// Neither computing nor waiting as usual: from the last gradient to the first update.
    pub pause_s: f64,
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
