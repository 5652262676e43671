//! The steps of a run, and when each of them ended.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::local::json_lines::{Reading, each};

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

    pub fn end(&self) -> f64 {
        self.steps.last().map_or(0.0, |s| s.end)
    }

    /// Dates every step. The log holds durations, which overlap; `moments` are (steps finished, time), oldest first, and
    /// `restarts` when an incarnation began. Between two of them the durations are stretched to fit.
    pub fn date(&mut self, moments: &[(u64, f64)], restarts: &[(u32, f64)]) {
        let mut known: Vec<(usize, f64)> = Vec::new();
        let mut at = 0;
        for &(finished, time) in moments {
            let found = self.steps[at..].iter().position(|s| s.step + 1 == finished);
            if let Some(ahead) = found {
                at += ahead;
                known.push((at, time));
            }
        }
        for &(incarnation, time) in restarts {
            if let Some(first) = self.steps.iter().position(|s| s.incarnation == incarnation) {
                known.push((first, time + duration(&self.steps[first])));
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
        let mut sums = vec![0.0];
        self.steps.iter().for_each(|s| sums.push(sums[sums.len() - 1] + duration(s)));
        let mut before: Option<(usize, f64)> = None;
        let mut ahead = known.iter().copied().peekable();
        for (i, step) in self.steps.iter_mut().enumerate() {
            while ahead.peek().is_some_and(|&(at, _)| at < i) {
                before = ahead.next();
            }
            let sum = |i: usize| sums[i + 1];
            step.end = match (before, ahead.peek().copied()) {
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

fn duration(step: &Step) -> f64 {
    if step.seconds.is_finite() { step.seconds.max(0.0) } else { 0.0 }
}
