//! Batches for the training loop, which may have to go back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Context;

use super::inputs::Inputs;
use crate::profile::{Ahead, BatchProfile, Window};
use crate::trainer::{DataError, Reader, profiled};
use crate::wire::{Batch, Position};

/// Bytes of batches kept for a source that cannot be read again.
const MAX_KEPT: usize = 256 << 20;

/// The batches of a job, step by step.
pub struct Batches {
    receiver: Receiver<Result<Batch, DataError>>,
    /// Traits of the batches in `receiver`.
    window: Arc<Mutex<Window>>,
    /// Batches to be given out before what the receiver yields.
    again: VecDeque<Batch>,
    /// A feeder's batches since the last checkpoint: it has no position to go back to.
    kept: Option<VecDeque<(u64, Batch)>>,
    kept_bytes: usize,
    /// Where the batch of a step begins.
    positions: BTreeMap<u64, Position>,
    /// Batches of a pass over the data, where that is known.
    pub per_pass: Option<u64>,
}

/// What there is instead of a batch.
pub enum Missing {
    /// Nothing yet.
    Patience,
    /// A feeder has no more.
    Ended,
    Damaged(DataError),
}

impl Batches {
    /// Reads from `position` on, where the batch of `step` begins. Batches have the shapes of one microbatch size's
    /// variants: all sizes have the same.
    pub fn open(inputs: &Inputs, step: u64, position: Position) -> anyhow::Result<Self> {
        let kept = inputs.job.spec.data.socket.is_some().then(VecDeque::new);
        let positions = BTreeMap::from([(step, position)]);
        let (receiver, window, per_pass) = read(inputs, position)?;
        Ok(Self { receiver, window, again: VecDeque::new(), kept, kept_bytes: 0, positions, per_pass })
    }

    /// The batch of `step` with its traits; steps are asked for one after the other.
    pub fn next(&mut self, step: u64, patience: Duration) -> Result<(Batch, Option<BatchProfile>), Missing> {
        let (batch, profile) = match self.again.pop_front() {
            Some(batch) => (batch, None),
            None => match self.receiver.recv_timeout(patience) {
                Ok(batch) => (batch.map_err(Missing::Damaged)?, lock(&self.window).pop()),
                Err(RecvTimeoutError::Timeout) => return Err(Missing::Patience),
                Err(RecvTimeoutError::Disconnected) => return Err(Missing::Ended),
            },
        };
        self.positions.insert(step + 1, batch.position);
        if let Some(kept) = &mut self.kept {
            self.kept_bytes += size(&batch);
            kept.push_back((step, batch.clone()));
            while self.kept_bytes > MAX_KEPT
                && let Some((_, old)) = kept.pop_front()
            {
                self.kept_bytes -= size(&old);
            }
        }
        Ok((batch, profile))
    }

    /// The batches that wait.
    pub fn ahead(&self) -> Ahead {
        lock(&self.window).ahead()
    }

    /// Where the batch of a step begins that has been reached and not been forgotten.
    pub fn position(&self, step: u64) -> Option<Position> {
        self.positions.get(&step).copied()
    }

    /// Nobody will go back before `step`.
    pub fn forget_before(&mut self, step: u64) {
        self.positions = self.positions.split_off(&step);
        if let Some(kept) = &mut self.kept {
            while kept.front().is_some_and(|(s, _)| *s < step) {
                self.kept_bytes -= kept.pop_front().map_or(0, |(_, old)| size(&old));
            }
        }
    }

    /// Goes back to `step`, whose batch begins at `position`.
    pub fn rewind(&mut self, inputs: &Inputs, step: u64, position: Position) -> anyhow::Result<()> {
        let Some(kept) = &mut self.kept else {
            *self = Self::open(inputs, step, position)?;
            return Ok(());
        };
        let again: VecDeque<Batch> = kept.iter().filter(|(s, _)| *s >= step).map(|(_, b)| b.clone()).collect();
        let reached = self.positions.keys().next_back().copied().unwrap_or(step);
        anyhow::ensure!(
            again.len() as u64 == reached.saturating_sub(step),
            "the feeder's batches since step {step} are more than {} MiB and cannot be trained on again; \
             write checkpoints more often (spec.checkpoint.everySteps)",
            MAX_KEPT >> 20
        );
        let earlier = std::mem::take(&mut self.again);
        self.again = again.into_iter().chain(earlier).collect();
        kept.retain(|(s, _)| *s < step);
        self.kept_bytes = kept.iter().map(|(_, b)| size(b)).sum();
        drop(self.positions.split_off(&(step + 1)));
        Ok(())
    }
}

fn size(batch: &Batch) -> usize {
    batch.tensors.iter().map(|t| t.data.len()).sum()
}

fn lock(window: &Mutex<Window>) -> MutexGuard<'_, Window> {
    window.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

type Waiting = (Receiver<Result<Batch, DataError>>, Arc<Mutex<Window>>, Option<u64>);

/// Reads and profiles on a thread of its own: waiting for data must hide neither Ctrl-C nor a dead worker.
fn read(inputs: &Inputs, position: Position) -> anyhow::Result<Waiting> {
    let (data, seed) = (&inputs.job.spec.data, inputs.job.spec.seed.into());
    let reader = Reader::open(data, &inputs.model.manifest, inputs.plan.microbatch, seed, position, &inputs.storage)?;
    let n_batches = reader.n_batches;
    let (queue, batches) = sync_channel(data.read_ahead.max(1) as usize);
    let window = Arc::new(Mutex::new(Window::default()));
    let (model, seen) = (inputs.model.clone(), window.clone());
    let pump = move || {
        for batch in reader {
            if let Ok(batch) = &batch {
                // What is wrong with a batch is said when it is fed.
                let profile = profiled(&model.manifest, batch)
                    .unwrap_or_else(|_| BatchProfile { variant: batch.variant.clone(), ..BatchProfile::default() });
                lock(&seen).push(profile);
            }
            if queue.send(batch).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("batches".to_owned()).spawn(pump).context("cannot start a thread")?;
    Ok((batches, window, n_batches))
}
