//! Departures: workers that have been told to go are let go between two steps, with nothing lost.
//!
//! # Expected flow
//! A worker says so and stays for a moment. No step is fed until those in flight are done and a checkpoint is on disk;
//! then it is given up, and with it everyone else who has been told meanwhile. The others go on from there as soon as
//! those are replaced.

use std::collections::BTreeSet;

use serde_json::json;

use super::{Fault, Training, seats};
use crate::runtime::RuntimeError;
use crate::wire::control::WorkerId;

/// Workers of the running plan that are to go.
#[derive(Default)]
pub struct Departing {
    /// What has been said of them.
    told: BTreeSet<WorkerId>,
    /// The checkpoint before they go has been ordered.
    saving: bool,
}

impl Training<'_> {
    /// Whether steps have to wait for a departure.
    ///
    /// # Errors
    /// The loss of a worker, as soon as nothing is lost with it.
    pub(super) fn depart(&mut self) -> Result<bool, Fault> {
        // A run that is stopping writes its last checkpoint anyway.
        if self.tolerated > 0 || self.session.leaving().is_empty() {
            return Ok(false);
        }
        let needed = seats(&self.record.plan);
        let leaving: BTreeSet<WorkerId> =
            self.session.leaving().iter().copied().filter(|w| needed.contains(w)).collect();
        let Some(&rank) = leaving.first() else { return Ok(false) };
        for &worker in leaving.iter().filter(|w| self.departing.told.insert(**w)).collect::<Vec<_>>() {
            self.progress.say(&format!("worker {worker} has been told to go: finishing the steps in flight"));
            self.event("departure", json!({"worker": worker}));
        }
        if self.reported < self.fed || !self.checkpoints.is_idle() {
            return Ok(true);
        }
        if !std::mem::replace(&mut self.departing.saving, true) && !self.is_saved() {
            self.save(self.fed)?;
            return Ok(true);
        }
        Err(RuntimeError::Departed { rank }.into())
    }
}
