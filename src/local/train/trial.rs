//! A split is worth what it is measured to be: before a job trains, some steps are run with it and without it.
//!
//! # Expected flow
//! Of two plans, one of which splits the model, each runs some steps of the job, in turn. Their state is dropped again; the
//! job begins where it would have, with the plan that was faster. The split has to be faster by as much as it had to be
//! predicted to be.
//!
//! # Caveats
//! What is measured of a machine that does other work at the same time is measured with that work.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{AHEAD, SILENCE, TICK, Training, check_interrupts, recover};
use crate::local::batches::Missing;
use crate::plan::Plan;
use crate::plan::split::GAIN;
use crate::runtime::{Notice, RuntimeError};
use crate::units::Seconds;
use crate::wire::Batch;

/// Steps of each plan in each turn, of which the first warm caches and queues up.
const STEPS: u64 = 16;
const WARM: u64 = 4;
/// How often both plans run: work beside one of them may be over in the next turn.
const TURNS: usize = 2;
/// A job is tried out if it has so many times the steps that this takes: a shorter one is over before it pays.
const LONG: u64 = 5;
/// A turn ends after so much time, as long as a step has been measured.
const LONGEST: Duration = Duration::from_secs(30);
/// Batches that steps are tried on, by their size: the job's first.
const BYTES: usize = 64 << 20;

impl Training<'_> {
    /// Measures the plan that splits the model and the one that does not, and lets the job go on with the faster one.
    ///
    /// # Errors
    /// Those of a start. A worker that fails is none of one of the plans.
    pub(super) fn try_out(&mut self) -> Result<(), RuntimeError> {
        let n_steps = self.steps.saturating_sub(self.first);
        if self.inputs.rival.is_none() || n_steps < LONG * STEPS * 2 * TURNS as u64 {
            return Ok(());
        }
        let batches = self.first_batches()?;
        if batches.is_empty() {
            return Ok(());
        }
        self.progress.say("measuring steps with the split and without it");
        let mut best = [f64::INFINITY; 2];
        for _ in 0..TURNS {
            for best in &mut best {
                *best = best.min(self.steps_of(&batches)?);
                self.inputs.change_places();
                self.session.set_model(self.inputs.model.clone());
            }
        }
        let [split, whole] = best;
        let is_split = split < GAIN * whole;
        if !is_split {
            self.inputs.change_places();
            self.session.set_model(self.inputs.model.clone());
        }
        self.inputs.rival = None;
        let what = if is_split { "the split is kept" } else { "the model is not split" };
        self.progress.say(&format!("{what}: a step takes {} with it and {} without", Seconds(split), Seconds(whole)));
        self.event("trial", json!({"split_seconds": split, "whole_seconds": whole, "split": is_split}));
        Ok(())
    }

    /// The first batches of the job, which is as if none had been taken.
    fn first_batches(&mut self) -> Result<Vec<Batch>, RuntimeError> {
        let stopped = |e: anyhow::Error| RuntimeError::Stopped(format!("{e:#}"));
        let mut found: Vec<Batch> = Vec::new();
        let mut bytes = 0;
        while found.len() < STEPS as usize && bytes < BYTES {
            check_interrupts(&self.interrupts, self.tolerated)?;
            match self.batches.next(self.first + found.len() as u64, TICK) {
                Ok((batch, _)) => {
                    bytes += batch.tensors.iter().map(|t| t.data.len()).sum::<usize>();
                    found.push(batch);
                }
                Err(Missing::Patience) => {}
                // It is said where the batch is trained on.
                Err(Missing::Ended | Missing::Damaged(_)) => break,
            }
        }
        let position = self.batches.position(self.first).unwrap_or_default();
        self.batches.rewind(self.inputs, self.first, position).map_err(stopped)?;
        Ok(found)
    }

    /// What a step of the plan takes, on the mean. Nothing runs before or after.
    fn steps_of(&mut self, batches: &[Batch]) -> Result<f64, RuntimeError> {
        let plan = Plan { revision: self.take_revision(), ..self.inputs.plan.clone() };
        let checkpoint = self.inputs.checkpoint.as_ref().map(|c| c.path().to_owned());
        self.launch(plan, self.first, checkpoint)?;
        let (mut fed, mut reported) = (0, 0);
        let began = Instant::now();
        let mut warm = began;
        self.last_sign = began;
        let mut last = STEPS;
        while reported < last {
            while fed < last && fed < reported + AHEAD {
                self.session.feed(self.first + fed, &batches[fed as usize % batches.len()])?;
                fed += 1;
            }
            match self.session.poll(TICK)? {
                Some(Notice::Step(_)) => {
                    reported += 1;
                    self.last_sign = Instant::now();
                    if reported <= WARM {
                        warm = self.last_sign;
                    }
                    if began.elapsed() > LONGEST && reported > WARM {
                        last = last.min(fed);
                    }
                }
                Some(_) => {}
                None => {
                    check_interrupts(&self.interrupts, self.tolerated)?;
                    self.workers.check()?;
                    if self.last_sign.elapsed() > SILENCE {
                        return Err(RuntimeError::AllWait { seconds: SILENCE.as_secs() });
                    }
                }
            }
        }
        let seconds = self.last_sign.duration_since(warm).as_secs_f64() / (reported - WARM) as f64;
        match self.session.reset(recover::PATIENCE).first() {
            None => Ok(seconds),
            Some(&rank) => Err(RuntimeError::Hung { rank, seconds: recover::PATIENCE.as_secs() }),
        }
    }
}
