//! The sidecar: a worker that executes one shard, and the session that drives all of them.
//!
//! ```text
//!             parent (session)                 worker (one per seat of a plan)
//!   feed ->   batches, steps      -- tcp -->   feed thread -> mailbox
//!   poll <-   losses, timings     <-- tcp --   executor: the static order of its tasks
//!                                              one sender and one receiver thread per peer <-- tcp --> other workers
//! ```
//! The executor never touches a socket: receivers upload what arrives and put it in the mailbox, senders download
//! what the executor hands them. Another plan is prepared beside the running one ([`prepare`]) and takes over inside a
//! step ([`switch`]). `runtime` knows nothing of manifests of jobs, of data sources or of processes.

pub mod checkpoint;
mod control;
pub mod depart;
mod doors;
mod executor;
pub mod fail;
mod feed;
mod kept;
mod key;
mod link;
mod mailbox;
mod prepare;
pub mod program;
mod save;
pub mod session;
mod switch;
mod tensor_file;
mod weights;
pub mod wiring;
pub mod worker;

use std::path::PathBuf;

use crate::device::DeviceError;
use crate::graph::GraphError;
use crate::plan::schedule::ScheduleError;
use crate::plan::segment::SegmentError;
use crate::tls::TlsError;
use crate::wire::frame::FrameError;

/// What went wrong on the way to or inside a worker.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("cannot cut the model by this plan")]
    Segment(#[from] SegmentError),
    #[error("cannot run the schedule of this plan")]
    Schedule(#[from] ScheduleError),
    #[error("module {module} is malformed; this is a bug in Foreshard, please report it with the bundle")]
    Module { module: String, source: GraphError },
    #[error("{at}")]
    Device { at: String, source: DeviceError },
    #[error("compiling was stopped: {compiled} modules are ready that were not before, {left} are left")]
    Unfinished { compiled: u32, left: u32 },
    /// No other try on this node would go better.
    #[error("cannot use {device}{hint}")]
    NoDevice { device: String, hint: &'static str, source: DeviceError },
    #[error("cannot read the bundle {path}: {message}")]
    Bundle { path: PathBuf, message: String },
    #[error("start weights {path}: {message}")]
    Weights { path: PathBuf, message: String },
    #[error("cannot listen on {address}: {source}; is the port in use?")]
    Listen { address: String, source: std::io::Error },
    #[error("cannot connect to {whom} at {address}: {source}")]
    Connect { whom: String, address: String, source: std::io::Error },
    #[error("connection to {whom}: {source}")]
    Link { whom: String, source: FrameError },
    #[error("connection to {whom}: {message}")]
    Protocol { whom: String, message: String },
    #[error("{0}")]
    Fenced(#[from] Fenced),
    #[error("plan revision {revision} is on its way already; wait until it runs or has been called off")]
    Busy { revision: u64 },
    #[error("worker {rank} failed: {message}")]
    WorkerFailed { rank: u32, message: String },
    #[error("worker {rank} is gone: {message}")]
    WorkerLost { rank: u32, message: String },
    #[error("worker {rank} was told to go")]
    Departed { rank: u32 },
    #[error("worker {rank} did not appear within {seconds} s")]
    NoShow { rank: u32, seconds: u64 },
    #[error("worker {rank} hangs: no step has ended for {seconds} s and it does not wait for anyone")]
    Hung { rank: u32, seconds: u64 },
    #[error("no step has ended for {seconds} s and all workers wait for each other")]
    AllWait { seconds: u64 },
    #[error("variant {found:?} is not in the plan, which has {known}")]
    UnknownVariant { found: String, known: String },
    #[error("batch tensor {name}: found {found}, variant {variant} wants {expected}")]
    BatchShape { name: String, variant: String, found: String, expected: String },
    #[error("{what} is {found}; loss and metrics are reported as float32, float64 or bfloat16 scalars")]
    NotAScalar { what: String, found: String },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// Raised by what the caller watches while it waits (a child process has died).
    #[error("{0}")]
    Stopped(String),
}

/// A frame that does not belong to what is running now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fenced {
    #[error("worker {from} sent a frame of plan revision {found}, this one runs revision {expected}")]
    Revision { from: u32, found: u64, expected: u64 },
    #[error("worker {from} sent a frame of incarnation {found}, this job is at incarnation {expected}")]
    Incarnation { from: u32, found: u32, expected: u32 },
    #[error("worker {from} sent a frame of step {found} while this worker is at step {at}")]
    Step { from: u32, found: u64, at: u64 },
    #[error("worker {from} sent on channel {channel} (microbatch {microbatch}), which the plan does not give it")]
    Channel { from: u32, channel: u32, microbatch: u32 },
    #[error("worker {from} sent {found} bytes on channel {channel}, the plan says {expected}")]
    Size { from: u32, channel: u32, found: u64, expected: u64 },
    #[error("worker {from} sent channel {channel} of step {step}, microbatch {microbatch} twice")]
    Twice { from: u32, channel: u32, step: u64, microbatch: u32 },
}

pub use session::{Notice, Session, StepReport, WorkerReport};
