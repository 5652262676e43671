//! The steps of a run, and when each of them ended.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::forecast::robust::median;
use crate::local::json_lines::{Reading, each};

/// Steps of a plan in which caches are filled and buffers are made.
const FIRST: usize = 2;

/// A line of `log.jsonl`, as far as the report needs it.
#[derive(Deserialize)]
struct Line {
    step: u64,
    #[serde(default)]
    revision: u64,
    #[serde(default)]
    incarnation: u32,
    loss: Option<f64>,
    seconds: Option<f64>,
    predicted_s: Option<f64>,
    #[serde(default)]
    workers: Vec<WorkerLine>,
}

#[derive(Deserialize)]
struct WorkerLine {
    #[serde(default)]
    rank: u32,
    worker: Option<u32>,
    busy_s: Option<f64>,
    predicted_busy_s: Option<f64>,
}

/// A step as it was taken. NaN where nothing was written.
pub struct Step {
    pub step: u64,
    pub revision: u64,
    pub incarnation: u32,
    pub loss: f64,
    pub seconds: f64,
    pub predicted: f64,
    pub loads: Box<[Load]>,
    /// When it ended, since the run began.
    pub end: f64,
    /// It was not taken again later.
    pub counts: bool,
}

impl Step {
    pub fn begin(&self) -> f64 {
        self.end - self.duration()
    }

    /// Nothing where nothing was written.
    fn duration(&self) -> f64 {
        if self.seconds.is_finite() { self.seconds.max(0.0) } else { 0.0 }
    }
}

/// What one worker computed in a step, in seconds.
pub struct Load {
    pub worker: u32,
    pub busy: f32,
    pub predicted: f32,
}

/// All steps, in the order in which they were taken.
#[derive(Default)]
pub struct Log {
    pub steps: Vec<Step>,
    /// Workers by revision and rank.
    seats: BTreeMap<(u64, u32), u32>,
}

impl Log {
    pub fn read(path: &Path) -> (Self, Reading) {
        let mut log = Self::default();
        let reading = each(path, |line: Line| {
            log.take(line);
            Ok(())
        });
        log.forget_repeated();
        (log, reading)
    }

    fn take(&mut self, line: Line) {
        let number = |n: Option<f64>| n.unwrap_or(f64::NAN);
        let loads = line.workers.iter().map(|w| Load {
            worker: w.worker.unwrap_or(w.rank),
            busy: number(w.busy_s) as f32,
            predicted: number(w.predicted_busy_s) as f32,
        });
        let loads = loads.collect();
        for w in &line.workers {
            self.seats.entry((line.revision, w.rank)).or_insert(w.worker.unwrap_or(w.rank));
        }
        self.steps.push(Step {
            step: line.step,
            revision: line.revision,
            incarnation: line.incarnation,
            loss: number(line.loss),
            seconds: number(line.seconds),
            predicted: number(line.predicted_s),
            loads,
            end: 0.0,
            counts: true,
        });
    }

    /// After a rewind steps come again: the last line of a step counts.
    fn forget_repeated(&mut self) {
        let mut next = u64::MAX;
        for step in self.steps.iter_mut().rev() {
            step.counts = step.step < next;
            next = next.min(step.step);
        }
    }

    /// The worker that had this rank; the rank itself when no step tells.
    pub fn worker(&self, revision: u64, rank: u32) -> u32 {
        self.seats.get(&(revision, rank)).copied().unwrap_or(rank)
    }

    /// Steps that count.
    pub fn counted(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|s| s.counts)
    }

    /// Steps that a plan has taken, and their median duration; its first ones are not like the others.
    pub fn under(&self, revision: u64) -> (usize, Option<f64>) {
        let all: Vec<f64> = self.steps.iter().filter(|s| s.revision == revision).map(|s| s.seconds).collect();
        let settled: Vec<f64> = all.iter().copied().skip(FIRST).filter(|s| s.is_finite()).collect();
        (all.len(), (!settled.is_empty()).then(|| median(&settled)))
    }

    pub fn end(&self) -> f64 {
        self.steps.last().map_or(0.0, |s| s.end)
    }

    /// Dates every step. The log holds durations, which overlap; `moments` are (steps finished, time), oldest first, and
    /// `restarts` when an incarnation began. Between two of them the durations are stretched to fit.
    pub fn date(&mut self, moments: &[(u64, f64)], restarts: &[(u32, f64)]) {
        let mut known: Vec<(usize, f64)> = Vec::new();
        let mut by_step: Vec<(u64, usize)> = self.steps.iter().enumerate().map(|(i, s)| (s.step, i)).collect();
        by_step.sort_unstable();
        let mut at = 0;
        for &(finished, time) in moments {
            // Steps come again: the number alone does not tell which one is meant.
            let since = restarts.iter().filter(|r| r.1 <= time).map(|r| r.0).max();
            let until = restarts.iter().filter(|r| r.1 > time).map(|r| r.0).min();
            let alive = |s: &Step| since.is_none_or(|i| s.incarnation >= i) && until.is_none_or(|i| s.incarnation < i);
            let Some(step) = finished.checked_sub(1) else { continue };
            let same = &by_step[by_step.partition_point(|s| *s < (step, at))..];
            let found = same.iter().take_while(|s| s.0 == step).find(|s| alive(&self.steps[s.1]));
            if let Some(&(_, i)) = found {
                at = i;
                known.push((i, time));
            }
        }
        for &(incarnation, time) in restarts {
            if let Some(first) = self.steps.iter().position(|s| s.incarnation == incarnation) {
                known.push((first, time + self.steps[first].duration()));
            }
        }
        known.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        known.dedup_by_key(|k| k.0);
        let mut latest = f64::NEG_INFINITY;
        known.retain(|&(_, time)| {
            let later = time.is_finite() && time > latest;
            latest = if later { time } else { latest };
            later
        });
        let incarnations: Vec<u32> = self.steps.iter().map(|s| s.incarnation).collect();
        let mut sums = vec![0.0];
        self.steps.iter().for_each(|s| sums.push(sums[sums.len() - 1] + s.duration()));
        let mut before: Option<(usize, f64)> = None;
        let mut ahead = known.iter().copied().peekable();
        for (i, step) in self.steps.iter_mut().enumerate() {
            while ahead.peek().is_some_and(|&(at, _)| at < i) {
                before = ahead.next();
            }
            let sum = |i: usize| sums[i + 1];
            // A restart takes time that no step took.
            let together = |k: &(usize, f64)| incarnations[k.0] == step.incarnation;
            step.end = match (before.filter(together), ahead.peek().copied().filter(together)) {
                (None, None) => sum(i),
                (None, Some((at, time))) => (time - (sum(at) - sum(i))).max(0.0),
                (Some((at, time)), None) => time + sum(i) - sum(at),
                (Some((a, from)), Some((b, to))) => {
                    let all = sum(b) - sum(a);
                    let share = if all > 0.0 { (sum(i) - sum(a)) / all } else { 1.0 };
                    from + share * (to - from)
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of (step, incarnation), each of which takes a second.
    fn log(steps: &[(u64, u32)]) -> Log {
        let mut log = Log::default();
        for &(step, incarnation) in steps {
            let line = format!("{{\"step\": {step}, \"incarnation\": {incarnation}, \"seconds\": 1}}");
            log.take(serde_json::from_str(&line).unwrap());
        }
        log.forget_repeated();
        log
    }

    fn ends(log: &Log) -> Vec<f64> {
        log.steps.iter().map(|s| s.end).collect()
    }

    #[test]
    fn the_last_line_of_a_step_counts() {
        let log = log(&[(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (3, 1)]);
        let counted: Vec<(u64, u32)> = log.counted().map(|s| (s.step, s.incarnation)).collect();
        assert_eq!(counted, [(0, 0), (1, 1), (2, 1), (3, 1)]);
    }

    #[test]
    fn steps_are_dated_by_the_moments_that_are_known() {
        let mut log = log(&[(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]);
        log.date(&[], &[]);
        assert_eq!(ends(&log), [1.0, 2.0, 3.0, 4.0, 5.0]);
        log.date(&[(2, 10.0), (4, 20.0)], &[]);
        assert_eq!(ends(&log), [9.0, 10.0, 15.0, 20.0, 21.0]);
        // Nonsense is no moment.
        log.date(&[(2, 10.0), (3, f64::NAN), (3, 4.0), (99, 1.0), (4, 20.0)], &[]);
        assert_eq!(ends(&log), [9.0, 10.0, 15.0, 20.0, 21.0]);
    }

    #[test]
    fn a_restart_is_not_spread_over_steps() {
        let mut log = log(&[(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]);
        log.date(&[(1, 5.0), (3, 62.0)], &[(1, 60.0)]);
        assert_eq!(ends(&log), [5.0, 6.0, 7.0, 61.0, 62.0]);
    }
}
