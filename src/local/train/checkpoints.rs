//! Checkpoints of a run: ordered between steps, written by workers, made visible by a thread of its own.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Fault, Training};
use crate::api;
use crate::local::inputs::Inputs;
use crate::runtime::checkpoint::{CheckpointError, Draft, Keep, Milestone, ShardEntry, prune};
use crate::telemetry::chain;

/// So many times as long as a step may take before it hangs, a checkpoint may: disks are slow now and then.
const PATIENCE: u32 = 5;

/// What is under way, and what is there.
pub struct Checkpoints {
    every: u64,
    keep: Keep,
    directory: PathBuf,
    /// Workers write into it, since then.
    draft: Option<(Draft, Milestone, Instant)>,
    /// A thread makes it visible and removes old ones.
    closing: Option<Receiver<(Milestone, Result<PathBuf, CheckpointError>)>>,
    /// (step, path) of the newest.
    newest: Option<(u64, PathBuf)>,
    /// The one at the end has been ordered.
    tried_last: bool,
}

impl Checkpoints {
    pub fn new(inputs: &Inputs, directory: PathBuf) -> Self {
        let api::Checkpoint { every_steps, keep_last, keep_every, .. } = inputs.job.spec.checkpoint;
        let keep = Keep { last: keep_last, every: keep_every };
        let newest = inputs.checkpoint.as_ref().map(|c| (c.index().step, c.path().to_owned()));
        Self { every: every_steps, keep, directory, draft: None, closing: None, newest, tried_last: false }
    }

    /// Nothing is being written.
    pub fn is_idle(&self) -> bool {
        self.draft.is_none() && self.closing.is_none()
    }

    /// Where a run goes back to: (step, path), or the beginning.
    pub fn newest(&self) -> Option<(u64, PathBuf)> {
        self.newest.clone()
    }

    /// What workers were writing is worth nothing any more.
    pub fn forget_draft(&mut self) {
        self.draft = None;
    }
}

impl Training<'_> {
    pub(super) fn checkpoint_if_due(&mut self) -> Result<(), Fault> {
        let every = self.checkpoints.every;
        if every > 0 && self.fed.is_multiple_of(every) && self.fed < self.steps { self.save(self.fed) } else { Ok(()) }
    }

    /// Whether what a later run goes on from is on disk, or cannot be.
    pub(super) fn is_saved(&self) -> bool {
        let there = self.checkpoints.newest.as_ref().is_some_and(|(step, _)| *step == self.reported);
        let nothing = self.checkpoints.every == 0 || self.reported == self.first;
        self.checkpoints.is_idle() && (nothing || there || self.checkpoints.tried_last)
    }

    /// After the last step: one thing towards [`Self::is_saved`].
    pub(super) fn last_checkpoint(&mut self) -> Result<(), Fault> {
        self.settle_checkpoint()?;
        if self.is_saved() {
            return Ok(());
        }
        if self.checkpoints.is_idle() {
            // A failure to write is reported; it is not tried again.
            self.checkpoints.tried_last = true;
            return self.save(self.reported);
        }
        match self.session.poll(super::TICK)? {
            Some(notice) => self.take(notice),
            None => Ok(self.check_workers()?),
        }
    }

    /// Orders a checkpoint before `step`, the step that is fed next.
    pub(super) fn save(&mut self, step: u64) -> Result<(), Fault> {
        if !self.checkpoints.is_idle() {
            self.event("checkpoint skipped", json!({"why": "the one before is still being written"}));
            return Ok(());
        }
        let Some(position) = self.batches.position(step) else { return Ok(()) };
        let (revision, microbatch) = self.session.plan_before(step).map_or((0, 0), |p| (p.revision, p.microbatch));
        let seed = self.inputs.job.spec.seed.into();
        let milestone = Milestone { step, of: self.inputs.steps, position, seed, revision, microbatch };
        match Draft::begin(&self.checkpoints.directory) {
            Ok(draft) => {
                if self.session.save(step, &|shard| draft.shard(shard)) {
                    self.checkpoints.draft = Some((draft, milestone, Instant::now()));
                }
                Ok(())
            }
            Err(e) => self.checkpoint_failed(step, &chain(&e)),
        }
    }

    pub(super) fn checkpoint_written(&mut self, step: u64, entries: Vec<Value>, seconds: f64) -> Result<(), Fault> {
        let Some((draft, milestone, _)) = self.checkpoints.draft.take_if(|(_, m, _)| m.step == step) else {
            return Ok(());
        };
        let entries: Result<Vec<ShardEntry>, _> = entries.into_iter().map(serde_json::from_value).collect();
        let entries = match entries {
            Ok(entries) => entries,
            Err(e) => return self.checkpoint_failed(step, &format!("a worker's entry is malformed: {e}")),
        };
        self.event("checkpoint written", json!({"at": step, "worker_seconds": seconds}));
        let (model, keep) = (self.inputs.model.clone(), self.checkpoints.keep);
        let directory = self.checkpoints.directory.clone();
        let (done, closing) = channel();
        let close = move || {
            let committed = draft.commit(&model, &milestone, &entries);
            let pruned = committed.and_then(|path| prune(&directory, &keep, &model.origin).map(|_| path));
            let _ = done.send((milestone, pruned));
        };
        let spawned = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(close);
        spawned.map_err(|e| anyhow::anyhow!("cannot start a thread: {e}"))?;
        self.checkpoints.closing = Some(closing);
        Ok(())
    }

    /// Takes note of a checkpoint that has become visible, and gives up one that nobody gets on with: others may come.
    pub(super) fn settle_checkpoint(&mut self) -> Result<(), Fault> {
        let limit = Duration::from_secs(self.inputs.job.spec.failure_policy.hang_seconds.into()) * PATIENCE;
        if let Some((_, milestone, _)) = self.checkpoints.draft.take_if(|(_, _, since)| since.elapsed() > limit) {
            self.session.give_up_save();
            let why = format!("workers have not written it within {} s; is the disk slow or full?", limit.as_secs());
            return self.checkpoint_failed(milestone.step, &why);
        }
        let Some(closing) = &self.checkpoints.closing else { return Ok(()) };
        let (milestone, closed) = match closing.try_recv() {
            Ok(closed) => closed,
            Err(TryRecvError::Empty) => return Ok(()),
            Err(TryRecvError::Disconnected) => {
                self.checkpoints.closing = None;
                return Ok(());
            }
        };
        self.checkpoints.closing = None;
        match closed {
            Ok(path) => {
                self.record.counts.checkpoints += 1;
                self.batches.forget_before(milestone.step);
                self.event("checkpoint", json!({"at": milestone.step, "path": path.display().to_string()}));
                self.checkpoints.newest = Some((milestone.step, path));
                Ok(())
            }
            Err(e) => self.checkpoint_failed(milestone.step, &chain(&e)),
        }
    }

    /// Training is worth more than one checkpoint: it goes on, and says so.
    pub(super) fn checkpoint_failed(&mut self, step: u64, why: &str) -> Result<(), Fault> {
        self.checkpoints.draft = None;
        self.progress.say(&format!("no checkpoint at step {step}: {why}; training goes on"));
        self.event("checkpoint failed", json!({"at": step, "why": why}));
        Ok(())
    }
}
