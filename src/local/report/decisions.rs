//! What the loop beside the steps saw, foresaw and decided.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use super::log::Log;
use crate::forecast::Forecast;
use crate::local::json_lines::{Reading, each_line};
use crate::transition::{Decision, Move, Record, Worker};

/// Rows of a table: the first and the last of so many are kept.
const MAX_ROWS: usize = 300;
/// Forecasts of one device that are kept, evenly over the run.
const MAX_FORECASTS: usize = 48;

/// The decision became another one.
pub struct Change {
    pub step: u64,
    pub time: f64,
    pub decision: Decision,
    /// So many decisions in a row.
    pub times: u64,
}

/// What is measured and forecast beside speeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quantity {
    StepTime,
    Cpu,
    Memory,
    Link,
}

/// A quantity over time, and what was expected of it.
#[derive(Default)]
pub struct Series {
    pub values: Vec<(f64, f64)>,
    pub forecasts: Vec<Forecast>,
    pub latest: Option<Forecast>,
    n_forecasts: u64,
    stride: u64,
}

impl Series {
    fn take(&mut self, forecast: &Forecast) {
        if self.latest.as_ref().is_some_and(|l| l.start == forecast.start) {
            self.latest = Some(forecast.clone());
            return;
        }
        self.latest = Some(forecast.clone());
        self.stride = self.stride.max(1);
        if self.n_forecasts.is_multiple_of(self.stride) {
            self.forecasts.push(forecast.clone());
        }
        self.n_forecasts += 1;
        if self.forecasts.len() > MAX_FORECASTS {
            let mut i = 0;
            self.forecasts.retain(|_| {
                i += 1;
                i % 2 == 1
            });
            self.stride *= 2;
        }
    }

    fn saw(&mut self, time: f64, value: f64, forecast: Option<&Forecast>) {
        if self.values.last().is_none_or(|v| v.0 <= time) {
            self.values.push((time, value));
        }
        if let Some(forecast) = forecast {
            self.take(forecast);
        }
    }

    /// Of the values that a forecast was made for, how many there are and the share within the interval.
    pub fn held(&self) -> Option<(usize, f64)> {
        let (mut n, mut inside) = (0usize, 0usize);
        for f in &self.forecasts {
            let from = self.values.partition_point(|s| s.0 < f.start.0);
            for &(time, value) in &self.values[from..] {
                let step = ((time - f.start.0) / f.interval.0) as usize;
                if step >= f.horizon() {
                    break;
                }
                n += 1;
                let band = f.at(step);
                inside += usize::from((band.lower..=band.upper).contains(&value));
            }
        }
        (n > 0).then(|| (n, inside as f64 / n as f64))
    }
}

/// A digest of `decisions.jsonl`.
#[derive(Default)]
pub struct Decisions {
    pub n: u64,
    pub first: Vec<Change>,
    pub last: VecDeque<Change>,
    /// Between `first` and `last`.
    pub left_out: u64,
    /// (steps finished, time)
    pub moments: Vec<(u64, f64)>,
    /// Speeds, by worker.
    pub devices: BTreeMap<u32, Series>,
    /// All else, by worker; step times stand with worker 0.
    pub others: BTreeMap<(Quantity, u32), Series>,
    /// As they are known at the end.
    pub moves: Vec<Move>,
}

impl Decisions {
    pub fn read(path: &Path, log: &Log) -> (Self, Reading) {
        let mut all = Self::default();
        let reading = each_line(path, |line| {
            all.take(Record::parse(line).map_err(|e| e.to_string())?, log);
            Ok(())
        });
        (all, reading)
    }

    fn take(&mut self, record: Record, log: &Log) {
        let Record { snapshot, decision, .. } = record;
        let (step, time) = (snapshot.step, snapshot.time.0);
        self.n += 1;
        self.moments.push((step, time));
        for worker in &snapshot.workers {
            let device = log.worker(snapshot.running.revision, worker.rank);
            self.devices.entry(device).or_default().saw(time, worker.speed, worker.speed_forecast.as_ref());
            let Worker { memory, cpu, link, .. } = worker;
            let used = cpu.now.is_some().then_some(memory.used.0 as f64);
            for (quantity, now, forecast) in [
                (Quantity::Cpu, cpu.now, &cpu.forecast),
                (Quantity::Memory, used, &memory.forecast),
                (Quantity::Link, link.bandwidth.now, &link.bandwidth.forecast),
            ] {
                if let Some(now) = now {
                    self.others.entry((quantity, device)).or_default().saw(time, now, forecast.as_ref());
                }
            }
        }
        if let Some(now) = snapshot.running.observed.now() {
            let steps = self.others.entry((Quantity::StepTime, 0)).or_default();
            steps.saw(time, now, snapshot.running.forecast.as_ref());
        }
        self.moves = snapshot.moves;
        match self.last.back_mut().or(self.first.last_mut()) {
            Some(before) if before.decision.label() == decision.label() => before.times += 1,
            _ => self.push(Change { step, time, decision, times: 1 }),
        }
    }

    fn push(&mut self, change: Change) {
        if self.first.len() < MAX_ROWS / 2 {
            return self.first.push(change);
        }
        self.last.push_back(change);
        if self.last.len() > MAX_ROWS / 2 {
            self.last.pop_front();
            self.left_out += 1;
        }
    }
}
