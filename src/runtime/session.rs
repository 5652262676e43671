//! The driving side: launches a plan on workers, feeds batches, collects reports and weights.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::graph::Model;
use crate::plan::Plan;
use crate::wire::Batch;
pub use crate::wire::control::Span;

/// What went wrong on the way to or inside a worker.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("{0}")]
    Failed(String),
}

/// Everything the workers must know to run a plan.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Directory of the bundle; every worker reads it for itself.
    pub bundle: PathBuf,
    pub model: Arc<Model>,
    pub plan: Plan,
    pub seed: u64,
    /// Steps of the whole job.
    pub steps: u64,
    /// Start weights (safetensors, by the manifest's names) instead of `init`'s params.
    pub weights: Option<PathBuf>,
    /// Report spans of the first so many steps.
    pub traced_steps: u64,
}

/// A listening socket for workers that are about to start.
pub struct Rendezvous {
    _private: (),
}

impl Rendezvous {
    /// Listens on loopback, on a free port. Rank of worker = replica * n_shards + shard.
    pub fn bind(_n_workers: u32) -> Result<Self, RuntimeError> {
        unimplemented!()
    }
    /// Where workers dial: `foreshard worker --connect ADDRESS --rank RANK`, token in the environment.
    pub fn address(&self) -> SocketAddr {
        unimplemented!()
    }
    /// Secret that a worker must present.
    pub fn token(&self) -> &str {
        unimplemented!()
    }
    /// Waits for all workers, hands out the plan, and returns when every one has compiled its segments. `alive` is
    /// called while waiting; its error ends the wait (a child has died). `progress(ready, of)` counts executables.
    pub fn start(
        self,
        _launch: Launch,
        _alive: &mut dyn FnMut() -> Result<(), RuntimeError>,
        _progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Session, RuntimeError> {
        unimplemented!()
    }
}

/// Workers in training.
pub struct Session {
    _private: (),
}

impl Session {
    /// Sends one step's batch and returns at once; at most two steps may be ahead of the reports.
    pub fn feed(&mut self, _step: u64, _variant: &str, _batch: &Batch) -> Result<(), RuntimeError> {
        unimplemented!()
    }
    /// The next step that all shards have finished, or `None` after `timeout`.
    pub fn report(&mut self, _timeout: Duration) -> Result<Option<StepReport>, RuntimeError> {
        unimplemented!()
    }
    /// Collects the params of all owners into one safetensors file (written beside, then renamed) and ends the
    /// workers.
    pub fn finish(self, _weights: &Path) -> Result<(), RuntimeError> {
        unimplemented!()
    }
}

/// One step, as measured by the workers.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    pub step: u64,
    pub revision: u64,
    /// Mean over the step's microbatches and replicas.
    pub loss: f32,
    /// In the manifest's order, means like the loss.
    pub metrics: Vec<f32>,
    /// Wall time from this step's first work to its last.
    pub seconds: f64,
    /// By rank.
    pub workers: Vec<WorkerReport>,
}

/// One worker's part of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerReport {
    pub rank: u32,
    /// Executing segments.
    pub busy_s: f64,
    /// Waiting for tensors of others.
    pub wait_s: f64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Highest resident memory of the process so far.
    pub peak_rss: u64,
    pub spans: Vec<Span>,
}
