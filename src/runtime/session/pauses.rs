//! What lies between steps, by each worker's own clock: clocks of several machines need not agree.

use std::collections::BTreeMap;

use super::{Answer, StepReport};
use crate::wire::control::{StepDone, WorkerId};

/// Waiting for an order that was there takes less, in seconds.
const WAITED: f64 = 20e-6;

/// When the last steps ended.
#[derive(Debug, Default)]
pub struct Pauses {
    /// By worker and step, in microseconds.
    ended: BTreeMap<WorkerId, BTreeMap<u64, u64>>,
}

impl Pauses {
    /// Adds to the report of a step what lay between it and those before.
    pub fn add(&mut self, report: &mut StepReport, done: &BTreeMap<WorkerId, StepDone>) {
        let step = report.step;
        let mut answers = Vec::with_capacity(report.workers.len());
        for worker in &mut report.workers {
            let Some(done) = done.get(&worker.worker) else { continue };
            let ended = self.ended.entry(worker.worker).or_default();
            *ended = ended.split_off(&step.saturating_sub(2));
            let since = |ago: u64| {
                let end = ended.get(&step.checked_sub(ago)?)?;
                Some(done.start_us.checked_sub(*end)? as f64 / 1e6)
            };
            worker.turn_s = since(1).map(|s| (s - done.idle_s).max(0.0));
            answers.push(since(2).map(|seconds| Answer { seconds, waited: done.idle_s > WAITED }));
            ended.insert(step, done.end_us);
        }
        let answers: Option<Vec<Answer>> = answers.into_iter().collect();
        // It is where the step before the last ended last that everybody waits for.
        let shorter = |a: Answer, b: Answer| Answer { seconds: a.seconds.min(b.seconds), waited: a.waited && b.waited };
        report.answer = answers.and_then(|answers| answers.into_iter().reduce(shorter));
    }

    /// Steps are taken again.
    pub fn clear(&mut self) {
        self.ended.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::WorkerReport;

    /// Adds a step of two workers: when it began and ended there, and how long each waited for the order.
    fn add(pauses: &mut Pauses, step: u64, times: [(u64, u64, f64); 2]) -> StepReport {
        let of = |(start_us, end_us, idle_s)| StepDone { step, start_us, end_us, idle_s, ..StepDone::default() };
        let done: BTreeMap<WorkerId, StepDone> = (0..).zip(times.map(of)).collect();
        let workers = (0..2).map(|worker| WorkerReport { worker, ..WorkerReport::default() }).collect();
        let mut report = StepReport { step, workers, ..StepReport::default() };
        pauses.add(&mut report, &done);
        report
    }

    #[test]
    fn pauses_are_told_from_waiting_for_orders() {
        let mut pauses = Pauses::default();
        let turns = |report: &StepReport| report.workers.iter().map(|w| w.turn_s).collect::<Vec<_>>();
        // Worker 1's clock is ahead by a second.
        let first = add(&mut pauses, 5, [(1_000, 2_000, 0.0), (1_001_000, 1_001_500, 0.0)]);
        assert_eq!((turns(&first), first.answer), (vec![None, None], None));
        let second = add(&mut pauses, 6, [(2_100, 3_000, 0.0), (1_001_700, 1_002_900, 0.0)]);
        assert_eq!((turns(&second), second.answer), (vec![Some(1e-4), Some(2e-4)], None));
        // Both waited for the order; it came 1.5 ms after the end of step 5.
        let third = add(&mut pauses, 7, [(3_500, 4_000, 4e-4), (1_003_500, 1_004_000, 5e-4)]);
        let found: Vec<f64> = turns(&third).into_iter().flatten().collect();
        assert!((found[0] - 1e-4).abs() < 1e-9 && (found[1] - 1e-4).abs() < 1e-9, "{found:?}");
        assert_eq!(third.answer, Some(Answer { seconds: 1.5e-3, waited: true }));
        // One did not: the order was there.
        let fourth = add(&mut pauses, 8, [(4_100, 5_000, 1e-6), (1_004_900, 1_005_000, 5e-4)]);
        assert_eq!(fourth.answer, Some(Answer { seconds: 1.1e-3, waited: false }));
        // A step is missing: a clock was set back, or others were taken meanwhile.
        let later = add(&mut pauses, 10, [(9_000, 9_500, 0.0), (900_000, 901_000, 0.0)]);
        assert_eq!((turns(&later), later.answer), (vec![None, None], None));
        pauses.clear();
        assert_eq!(turns(&add(&mut pauses, 11, [(9_600, 9_900, 0.0), (1_009_600, 1_009_900, 0.0)])), vec![None, None]);
    }
}
