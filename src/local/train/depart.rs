//! Departures: a worker that has been told to go is let go between two steps, with nothing lost.
//!
//! # Expected flow
//! The worker says so and stays for a moment. No step is fed until those in flight are done and a checkpoint is on disk;
//! then the worker is given up, and everyone goes on from there as soon as another takes its place.

use serde_json::json;

use super::{Fault, Training};
use crate::runtime::RuntimeError;
use crate::wire::control::WorkerId;

/// A worker that is to go.
pub struct Departing {
    worker: WorkerId,
    /// The checkpoint before it has been ordered.
    saving: bool,
}

impl Training<'_> {
    pub(super) fn told_to_go(&mut self, worker: WorkerId) {
        // A run that is stopping writes its last checkpoint anyway.
        if self.tolerated == 0 && self.departing.is_none() {
            self.progress.say(&format!("worker {worker} has been told to go: finishing the steps in flight"));
            self.event("departure", json!({"worker": worker}));
            self.departing = Some(Departing { worker, saving: false });
        }
    }

    /// Whether steps have to wait for a departure.
    ///
    /// # Errors
    /// The loss of the worker, as soon as nothing is lost with it.
    pub(super) fn depart(&mut self) -> Result<bool, Fault> {
        let Some(Departing { worker, saving }) = self.departing.as_mut().filter(|_| self.tolerated == 0) else {
            return Ok(false);
        };
        if self.reported < self.fed || !self.checkpoints.is_idle() {
            return Ok(true);
        }
        let rank = *worker;
        if !std::mem::replace(saving, true) && !self.is_saved() {
            self.save(self.fed)?;
            return Ok(true);
        }
        Err(RuntimeError::Departed { rank }.into())
    }
}
