//! Survival: workers that died or hang are replaced, and everyone goes back to the last checkpoint.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Departing, Fault, Problem, Training, seats};
use crate::runtime::RuntimeError;
use crate::topology::DeviceId;
use crate::wire::control::WorkerId;

/// How long workers may take to let go of what they were doing; a compiler cannot be interrupted.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// How long an answer to "are you there" may take.
const ANSWER: Duration = Duration::from_secs(2);

impl Training<'_> {
    /// Brings the job back to its last checkpoint, in a new incarnation.
    ///
    /// # Errors
    /// The fault itself, when the job has been restarted as often as its policy allows, or when it cannot be helped by
    /// a restart.
    pub(super) fn recover(&mut self, fault: RuntimeError) -> Result<(), Problem> {
        let mut fault = self.workers.explain(fault);
        if matches!(fault, RuntimeError::Departed { .. }) {
            self.record.counts.departures += 1;
        }
        loop {
            let counts = &mut self.record.counts;
            // That a node is emptied is no failure of the job.
            let allowed = self.inputs.job.spec.failure_policy.max_restarts.saturating_add(counts.departures);
            if !is_survivable(&fault) || counts.restarts >= allowed {
                return Err(Problem::Failed(match counts.restarts {
                    0 => fault.into(),
                    n => anyhow::Error::from(fault).context(format!("the job failed after {n} restarts")),
                }));
            }
            counts.restarts += 1;
            self.progress.restarts(counts.restarts);
            match self.restart(&fault) {
                Ok(()) => return Ok(()),
                Err(Fault::Problem(problem)) => return Err(problem),
                Err(Fault::Runtime(next)) => fault = self.workers.explain(next),
            }
        }
    }

    fn restart(&mut self, fault: &RuntimeError) -> Result<(), Fault> {
        let began = Instant::now();
        self.call_off_recut(&format!("a worker was lost: {fault}"));
        self.checkpoints.forget_draft();
        self.departing = Departing::default();
        let mut lost: BTreeSet<WorkerId> = self.workers.dead().into_iter().chain(self.session.lost()).collect();
        if let RuntimeError::WorkerFailed { rank, .. }
        | RuntimeError::Hung { rank, .. }
        | RuntimeError::Departed { rank } = fault
        {
            lost.insert(*rank);
        }
        let plan = self.record.plan.clone();
        let wanted = seats(&plan);
        // Those that were to join a plan that is no more.
        lost.extend(self.workers.all().into_iter().filter(|w| !wanted.contains(w)));
        let mut replaced = BTreeSet::new();
        while !lost.is_empty() || replaced.is_empty() {
            lost.extend(self.session.leaving());
            for &worker in &lost {
                self.workers.kill(worker);
                self.session.lose(worker);
            }
            replaced.append(&mut lost);
            lost = self.session.reset(PATIENCE).into_iter().collect();
            lost.extend(self.session.lost());
            lost.extend(self.session.leaving());
            if lost.is_empty() {
                break;
            }
        }
        let newest = self.checkpoints.newest();
        let (step, checkpoint) = match newest {
            Some((step, path)) => (step, Some(path)),
            None => (0, None),
        };
        self.progress.say(&format!("{fault}; going back from step {} to step {step}", self.reported));
        self.launch(plan, step, checkpoint)?;
        let position = match self.batches.position(step) {
            Some(position) => position,
            None => return Err(anyhow::anyhow!("the data position of step {step} is not known any more").into()),
        };
        self.profiles.clear();
        self.batches.rewind(self.inputs, step, position)?;
        let lost_steps = self.reported - step;
        (self.fed, self.reported) = (step, step);
        if self.tolerated > 0 {
            // The user wants to stop: the checkpoint is as far as this run comes.
            self.steps = step;
        }
        let kept = (step - self.first) as usize;
        self.record.losses.truncate(kept);
        self.record.times.truncate(kept);
        if let Some(adapt) = &mut self.adapt {
            adapt.replaced(replaced.iter().map(|&w| DeviceId(w)));
        }
        self.event(
            "restart",
            json!({
                "why": fault.to_string(), "from": step, "lost_steps": lost_steps,
                "replaced": replaced.iter().collect::<Vec<_>>(), "seconds_lost": began.elapsed().as_secs_f64(),
                "incarnation": self.session.incarnation(),
            }),
        );
        (self.last_report, self.last_sign) = (Instant::now(), Instant::now());
        Ok(())
    }

    /// Finds a worker that keeps everyone waiting, once no step has ended for long.
    pub(super) fn look_for_hangs(&mut self) -> Result<(), Fault> {
        let limit = Duration::from_secs(self.inputs.job.spec.failure_policy.hang_seconds.into());
        if self.last_sign.elapsed() < limit {
            return Ok(());
        }
        self.last_sign = Instant::now();
        let seconds = limit.as_secs();
        match self.session.hung(ANSWER).first() {
            Some(&rank) => Err(RuntimeError::Hung { rank, seconds }.into()),
            None => Err(RuntimeError::AllWait { seconds }.into()),
        }
    }
}

/// Whether another try may go better.
fn is_survivable(fault: &RuntimeError) -> bool {
    matches!(
        fault,
        RuntimeError::WorkerLost { .. }
            | RuntimeError::WorkerFailed { .. }
            | RuntimeError::Departed { .. }
            | RuntimeError::NoShow { .. }
            | RuntimeError::Hung { .. }
            | RuntimeError::AllWait { .. }
            | RuntimeError::Link { .. }
            | RuntimeError::Protocol { .. }
    )
}
