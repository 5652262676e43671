//! Calibration: what step reports say of devices.
//!
//! Six causes make a step slower or faster than predicted, and each goes somewhere else:
//!
//! - **The model is wrong** (constant from the start): a class of op takes longer than nominal. Factors per class are
//!   fitted ([`Measured`]); plans for other cuts use them.
//! - **A worker does more than execute** (also constant): arguments and results go in and out, steps are reported and
//!   ordered. Seconds per run and per step, [`Calibration::overhead`], and what the parent takes to answer.
//! - **Messages take longer than the figures of their link**: threads wake up, cores are busy. Seconds for each,
//!   [`Calibration::lateness`], by what steps take that wait for them.
//! - **The step is more than all that**: one factor for the whole step, [`Calibration::stretch`]; the nearer to 1, the
//!   better the model.
//! - **The device has changed** (all its segments at once, compared with themselves, or with themselves on a device of
//!   the same kind when they are new to it): [`Calibration::speed`]. Predictions take part only in the first steps of
//!   segments that are new everywhere, so a wrong model is no slow device.
//! - **Noise**: medians everywhere.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::fit::{Equation, Prior, fit, median, weighted_median};
use super::level::Level;
use super::terms::{N, Terms, Timed};
use crate::topology::{DeviceId, Measured, Topology};
use crate::units::Seconds;

/// Steps whose median is the speed.
const WINDOW: usize = 9;
/// Doubt in nominal figures: a factor of two is nothing unusual.
const NOMINAL: f64 = 0.7;
/// Doubt in figures of other devices of the same kind.
const KIND: f64 = 0.2;
/// Share of a worker's step that a prediction may be off for free.
const SLACK: f64 = 0.02;
/// Segments remembered per worker: those of a few plans.
const SEGMENTS: usize = 512;
/// Share of a step that has to be known for the speed of all of it to be told.
const COMPARED: f64 = 0.25;
/// Share of the busiest worker's computing that a worker has to do for its speed to be told: what of a few tenths of a
/// millisecond is waiting for caches, threads and the clock is the same on a core that others want and on a free one.
const EVIDENCE: f64 = 0.05;
/// Share of the way back to the first speed that an unseen one goes in a step. By the median over [`WINDOW`] steps that is
/// a hundredth or so.
const FORGOTTEN: f64 = 0.05;
/// Logarithm of the factor by which what is said of segments never seen may be wrong.
const UNSURE: f64 = 0.12;
/// Below, a step does not wait for messages.
const A_MESSAGE: f64 = 0.5;
/// What a message takes by nominal figures, about. It may be early by half of that, and lateness is learned in shares of it
/// at first.
const LATENESS: Seconds = Seconds(50e-6);
/// Median absolute deviation to standard deviation of a normal distribution.
const MAD: f64 = 1.4826;

/// One worker's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    pub device: DeviceId,
    /// Devices of one kind share what is learned; see [`crate::topology::Device::kind`].
    pub kind: &'a str,
    /// In the order of `seconds`.
    pub segments: &'a [Timed],
    /// By segment, all its runs together.
    pub seconds: &'a [f32],
    /// Neither executing nor waiting.
    pub other: Seconds,
    /// From the end of the step before to the beginning of this one, without waiting for the order to take it; `None` for
    /// a first step.
    pub turn: Option<Seconds>,
}

/// Reports that cannot be what was measured.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CalibrationError {
    #[error(
        "{device:?} reports {found} segments, the plan gives it {expected}; leave out steps that end under another plan"
    )]
    Segments { device: DeviceId, expected: usize, found: usize },
    #[error("{device:?} reports {found} s for segment {segment}; a duration is finite and not negative")]
    Seconds { device: DeviceId, segment: usize, found: f32 },
}

/// What one report said, before it was learned from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    pub device: DeviceId,
    /// Busy time by the figures and the speed of before.
    pub predicted: Seconds,
    pub measured: Seconds,
    /// Speed in this step alone; `None` while there is nothing to compare with. The series to forecast.
    pub speed: Option<f64>,
}

/// What a worker does beside executing, at its first speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Overhead {
    /// For every run of an executable.
    pub task: Seconds,
    /// Between two steps.
    pub step: Seconds,
}

/// How fast a device is relative to its first steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// 0.5: everything takes twice as long. 1 before anything is known.
    pub value: f64,
    /// Robust standard deviation of single steps.
    pub spread: f64,
    /// Steps behind it, at most the window's.
    pub samples: u32,
}

/// A worker in the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerSummary {
    pub device: DeviceId,
    pub measured: Measured,
    pub speed: Speed,
    /// Median relative error of segments, weighted by their time: what was predicted before each of the last steps.
    pub error: f64,
    /// The same by nominal figures at nominal speed.
    pub nominal_error: f64,
}

/// What has been learned of every device.
#[derive(Clone, Debug, Default)]
pub struct Calibration {
    workers: BTreeMap<DeviceId, Worker>,
    kinds: BTreeMap<String, Measured>,
    stretch: Option<Stretch>,
    answer: Option<Level>,
    /// By so much above what levels are relative to.
    lateness: Option<Level>,
    /// Devices of the last step.
    reported: Vec<DeviceId>,
}

/// What a plan's steps take beyond what their segments explain.
#[derive(Clone, Debug)]
struct Stretch {
    revision: u64,
    level: Level,
    /// Until there is a level: that of the plan before.
    first_guess: f64,
}

impl Stretch {
    fn value(&self) -> f64 {
        self.level.seconds().unwrap_or(self.first_guess)
    }
}

#[derive(Clone, Debug)]
struct Worker {
    kind: String,
    segments: BTreeMap<Key, Level>,
    /// By step, the last few.
    speeds: VecDeque<f64>,
    errors: VecDeque<f64>,
    nominal_errors: VecDeque<f64>,
    /// Busy seconds per step.
    step: f64,
    measured: Measured,
    task_overhead: Level,
    step_overhead: Level,
    /// Segments of the last step, with their runs.
    running: Vec<(Key, f64)>,
    /// How many times what the factors say these segments take.
    off: f64,
}

/// A segment is known by its terms and its position among equal ones: what a recut leaves alone keeps its history.
type Key = ([u64; N], u32);

impl Calibration {
    /// Starts from what earlier jobs have learned, by kind of device.
    pub fn starting_from(kinds: BTreeMap<String, Measured>) -> Self {
        Self { kinds, ..Self::default() }
    }

    /// What is known of kinds of devices.
    pub fn kinds(&self) -> &BTreeMap<String, Measured> {
        &self.kinds
    }

    /// Learns from one step of all workers.
    ///
    /// # Units
    /// Terms are nominal at the speed the topology gives a device before any forecast.
    /// # Errors
    /// [`CalibrationError`]; then nothing has been learned.
    /// # Complexity
    /// O(segments remembered) for each worker, and as much again for each kind of device.
    pub fn observe(&mut self, reports: &[Report<'_>]) -> Result<Vec<Observed>, CalibrationError> {
        for report in reports {
            check(report)?;
        }
        let busiest = reports.iter().map(computed).fold(0.0, f64::max);
        let mut observed = Vec::with_capacity(reports.len());
        for report in reports {
            let known = self.workers.remove(&report.device);
            let mut worker = known.unwrap_or_else(|| Worker::new(report.kind, self.kinds.get(report.kind)));
            let mine = worker.measured;
            let elsewhere = |key: &Key| self.elsewhere(report.kind, key, Some(&mine));
            let shows = computed(report) >= EVIDENCE * busiest;
            observed.push(worker.observe(report, shows, &elsewhere));
            self.workers.insert(report.device, worker);
        }
        self.reported = reports.iter().map(|r| r.device).collect();
        self.refit();
        Ok(observed)
    }

    /// What a segment that is known from another device of a kind takes on one with these factors, or on one of which
    /// nothing is known: a cut that moves takes segments along, and how fast a device is shall not be forgotten over it.
    fn elsewhere(&self, kind: &str, key: &Key, mine: Option<&Measured>) -> Option<f64> {
        let of = |worker: &Worker| {
            let level = worker.segments.get(key).filter(|l| l.is_established())?.seconds()?;
            let differ = mine.map_or(1.0, |mine| terms(key).time(mine) / terms(key).time(&worker.measured));
            Some(level * differ)
        };
        self.workers.values().filter(|w| w.kind == kind).find_map(of)
    }

    /// Learns how a whole step relates to what [`crate::plan::Priced::estimate`] could explain of it, at the speeds seen
    /// then. Where the step waits for `messages`, one after the other, the rest is theirs; what is left is the stretch.
    ///
    /// Slowly, once established: a step that takes longer all of a sudden is a surprise, not a habit. A new revision
    /// begins with the factor of the one before. Values that are no durations teach nothing.
    pub fn observe_step(&mut self, revision: u64, explained: Seconds, messages: f64, measured: Seconds) {
        let known = |device| self.workers.get(device).is_some_and(|w| w.task_overhead.is_established());
        if !self.reported.iter().all(known) {
            // What is not explained yet may be the segments'.
            return;
        }
        let before = self.lateness();
        let late = before + (measured - explained) / messages;
        if messages >= A_MESSAGE && late.0.is_finite() {
            let late = (LATENESS + late).max(LATENESS / 2.0);
            self.lateness.get_or_insert_with(Level::mean).take(late.0, 1.0);
        }
        let explained = explained + (self.lateness() - before) * messages;
        let before = self.stretch();
        if self.stretch.as_ref().is_none_or(|s| s.revision != revision) {
            self.stretch = Some(Stretch { revision, level: Level::mean(), first_guess: before });
        }
        let ratio = measured / explained;
        if let Some(stretch) = self.stretch.as_mut().filter(|_| ratio.is_finite() && ratio > 0.0) {
            stretch.level.take(ratio, 1.0);
        }
    }

    /// What a message takes beyond what its link's figures say: threads that wake up, cores that are busy.
    pub fn lateness(&self) -> Seconds {
        Seconds(self.lateness.as_ref().and_then(Level::seconds).map_or(0.0, |l| l - LATENESS.0))
    }

    /// Learns what the parent takes from the end of a step until workers can begin the one after the next: so long where
    /// they `waited` for it, else at most so long.
    pub fn observe_answer(&mut self, seconds: Seconds, waited: bool) {
        if !seconds.0.is_finite() || seconds.0 < 0.0 {
            return;
        }
        if waited {
            self.answer.get_or_insert_with(Level::new).take(seconds.0, 1.0);
        } else if let Some(level) = &mut self.answer {
            level.take(level.seconds().unwrap_or(0.0).min(seconds.0), 1.0);
        }
    }

    /// What the parent takes from the end of a step until workers can begin the one after the next; nothing where nobody
    /// ever waited for it.
    pub fn answer(&self) -> Seconds {
        Seconds(self.answer.as_ref().and_then(Level::seconds).unwrap_or(0.0))
    }

    /// What one run of each of a worker's executables takes at its first speed, in the order of its reports: what has
    /// been measured of it here or on a device of the kind, else what the factors say, as far off as they are for what
    /// runs here.
    ///
    /// # Complexity
    /// O(segments · log segments remembered), for unknown ones times the devices of the kind.
    pub fn times(&self, device: DeviceId, kind: &str, segments: &[Timed]) -> Vec<Seconds> {
        let measured = self.measured(device, kind);
        let worker = self.workers.get(&device);
        let mut same = Same::default();
        let time = |timed: &Timed| {
            let key = same.key(timed);
            let own = worker.and_then(|w| w.segments.get(&key)?.seconds());
            let level = own.or_else(|| self.elsewhere(kind, &key, worker.map(|w| &w.measured)));
            level.map_or_else(|| timed.terms.time(&measured) * worker.map_or(1.0, |w| w.off), Seconds)
        };
        segments.iter().map(time).collect()
    }

    /// What a device does beside executing: its own, else that of another one of its kind.
    pub fn overhead(&self, device: DeviceId, kind: &str) -> Overhead {
        let own = self.workers.get(&device).and_then(Worker::overhead);
        let elsewhere = || self.workers.values().filter(|w| w.kind == kind).find_map(Worker::overhead);
        own.or_else(elsewhere).unwrap_or_default()
    }

    /// How many times longer a step takes than its segments and transfers explain; 1 when nothing is known.
    pub fn stretch(&self) -> f64 {
        self.stretch.as_ref().map_or(1.0, Stretch::value)
    }

    /// How fast a device is relative to its baseline; 1 when nothing is known.
    pub fn speed(&self, device: DeviceId) -> f64 {
        self.speed_of(device).value
    }

    /// The speed with its evidence.
    pub fn speed_of(&self, device: DeviceId) -> Speed {
        self.workers.get(&device).map_or(Speed { value: 1.0, spread: 0.0, samples: 0 }, Worker::speed)
    }

    /// Factors of a device: its own, else those of its kind, else nominal.
    pub fn measured(&self, device: DeviceId, kind: &str) -> Measured {
        let own = self.workers.get(&device).map(|w| w.measured);
        own.or_else(|| self.kinds.get(kind).copied()).unwrap_or_default()
    }

    /// The devices with corrected figures. Speeds are left to the caller: planning wants the forecast ones.
    pub fn correct(&self, mut topology: Topology) -> Topology {
        for (i, device) in topology.devices.iter_mut().enumerate() {
            let known = self.workers.contains_key(&DeviceId(i as u32)) || self.kinds.contains_key(&device.kind);
            device.measured = known.then(|| self.measured(DeviceId(i as u32), &device.kind));
        }
        topology
    }

    /// Another process or other cores serve as this device from now on: its baseline is gone, its factors remain as
    /// a first guess.
    pub fn replaced(&mut self, device: DeviceId) {
        if let Some(worker) = self.workers.get_mut(&device) {
            *worker = Worker { measured: worker.measured, ..Worker::new(&worker.kind, None) };
        }
    }

    /// For the log and for deciding how far to trust predictions.
    pub fn summary(&self) -> Vec<WorkerSummary> {
        let middle = |v: &VecDeque<f64>| median(v.iter().copied()).unwrap_or(0.0);
        let summary = |(&device, w): (&DeviceId, &Worker)| WorkerSummary {
            device,
            measured: w.measured,
            speed: w.speed(),
            error: middle(&w.errors),
            nominal_error: middle(&w.nominal_errors),
        };
        self.workers.iter().map(summary).collect()
    }

    /// First what devices of a kind have in common, then each device near it.
    fn refit(&mut self) {
        let mut by_kind: BTreeMap<&str, Vec<Equation>> = BTreeMap::new();
        for worker in self.workers.values() {
            by_kind.entry(&worker.kind).or_default().extend(worker.equations());
        }
        let nominal = Prior { mean: Measured::NOMINAL, spread: NOMINAL };
        for (kind, equations) in by_kind {
            if !equations.is_empty() {
                self.kinds.insert(kind.to_owned(), fit(&equations, &nominal));
            }
        }
        for worker in self.workers.values_mut() {
            let equations: Vec<Equation> = worker.equations().collect();
            if let (false, Some(&mean)) = (equations.is_empty(), self.kinds.get(&worker.kind)) {
                worker.measured = fit(&equations, &Prior { mean, spread: KIND });
            }
            worker.off = worker.off();
        }
    }
}

/// The speed by each segment against itself; `None` where too little of the step can be compared.
fn compared(runs: &[(Key, Run)], level: &dyn Fn(&Key) -> Option<f64>) -> Option<f64> {
    let known = runs.iter().filter_map(|(key, run)| Some((level(key)?, run)));
    let mut ratios: Vec<(f64, f64)> = known.map(|(level, run)| (level / run.seconds, level * run.runs)).collect();
    let seconds = |(ratio, weight): &(f64, f64)| weight / ratio;
    let all: f64 = runs.iter().map(|(_, run)| run.seconds * run.runs).sum();
    let enough = ratios.iter().map(seconds).sum::<f64>() >= COMPARED * all;
    if enough { weighted_median(&mut ratios) } else { None }
}

/// Seconds that a worker computed in a step.
fn computed(report: &Report<'_>) -> f64 {
    report.seconds.iter().map(|s| f64::from(*s)).sum()
}

fn check(report: &Report<'_>) -> Result<(), CalibrationError> {
    let (device, expected, found) = (report.device, report.segments.len(), report.seconds.len());
    if expected != found {
        return Err(CalibrationError::Segments { device, expected, found });
    }
    match report.seconds.iter().position(|s| !s.is_finite() || *s < 0.0) {
        Some(segment) => Err(CalibrationError::Seconds { device, segment, found: report.seconds[segment] }),
        None => Ok(()),
    }
}

impl Worker {
    fn new(kind: &str, measured: Option<&Measured>) -> Self {
        Self {
            kind: kind.to_owned(),
            segments: BTreeMap::new(),
            speeds: VecDeque::with_capacity(WINDOW),
            errors: VecDeque::with_capacity(WINDOW),
            nominal_errors: VecDeque::with_capacity(WINDOW),
            step: 0.0,
            measured: measured.copied().unwrap_or_default(),
            task_overhead: Level::new(),
            step_overhead: Level::new(),
            running: Vec::new(),
            off: 1.0,
        }
    }

    /// `shows`: whether it has done enough for its speed to show. One that has not is forgotten little by little: a plan
    /// leaves a slow worker without work, and it has to be found out that it is slow no more. `elsewhere`: what a segment
    /// takes on devices like this one.
    fn observe(&mut self, report: &Report<'_>, shows: bool, elsewhere: &dyn Fn(&Key) -> Option<f64>) -> Observed {
        let runs = keyed(report);
        let before = self.speed().value;
        let measured = computed(report);
        let predict = |timed: &Timed| timed.time(&self.measured).0 / before;
        let predicted: f64 = report.segments.iter().map(predict).sum();
        let off = |predict: &dyn Fn(&Timed) -> f64| {
            let pairs = report.segments.iter().zip(report.seconds).map(|(t, s)| (predict(t), f64::from(*s)));
            let mut errors: Vec<(f64, f64)> =
                pairs.filter(|(_, s)| *s > 0.0).map(|(p, s)| ((p - s).abs() / s, s)).collect();
            weighted_median(&mut errors)
        };
        let error = off(&predict);
        let nominal_error = off(&|timed| timed.time(&Measured::NOMINAL).0);

        let own = |key: &Key| self.segments.get(key).filter(|l| l.is_established())?.seconds();
        let seen = || {
            compared(&runs, &own)
                .or_else(|| compared(&runs, &|key| own(key).or_else(|| elsewhere(key))))
                .or_else(|| self.modelled(predicted, measured, before))
        };
        let speed = if shows { seen() } else { Some(before + (1.0 - before) * FORGOTTEN) };

        self.segments.values_mut().for_each(Level::age);
        for (key, run) in &runs {
            // What all segments have in common is the device's speed, and teaches nothing about the segment.
            let level = self.segments.entry(*key).or_insert_with(Level::new);
            level.take(run.seconds * speed.unwrap_or(before), run.runs);
        }
        let tasks: f64 = runs.iter().map(|(_, run)| run.runs).sum();
        let at_first = |seconds: Seconds| seconds.0 * speed.unwrap_or(before);
        if tasks > 0.0 {
            self.task_overhead.take(at_first(report.other) / tasks, tasks);
        }
        if let Some(turn) = report.turn {
            self.step_overhead.take(at_first(turn), 1.0);
        }
        self.running = runs.iter().map(|(key, run)| (*key, run.runs)).collect();
        self.forget();
        let warm = self.segments.values().any(|l| l.seconds().is_some());
        if warm {
            self.step = measured * speed.unwrap_or(before);
            push(&mut self.errors, error);
            push(&mut self.nominal_errors, nominal_error);
        }
        push(&mut self.speeds, speed);
        Observed { device: report.device, predicted: Seconds(predicted), measured: Seconds(measured), speed }
    }

    /// The speed in a step whose segments are new: what the factors say of it, where that is another speed than `before`
    /// by more than they may be wrong. A plan often changes because a device does, which by then has changed again.
    fn modelled(&self, predicted: f64, measured: f64, before: f64) -> Option<f64> {
        let ratio = predicted / measured;
        let known = self.segments.values().any(Level::is_established) && ratio.is_finite() && ratio > 0.0;
        (known && ratio.ln().abs() > UNSURE).then_some(ratio * before)
    }

    /// Drops the segments with the least weight where there are too many.
    fn forget(&mut self) {
        let excess = self.segments.len().saturating_sub(SEGMENTS);
        if excess > 0 {
            let mut by_weight: Vec<(f64, Key)> = self.segments.iter().map(|(k, l)| (l.count(), *k)).collect();
            by_weight.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            by_weight[..excess].iter().for_each(|(_, key)| drop(self.segments.remove(key)));
        }
    }

    fn speed(&self) -> Speed {
        let value = median(self.speeds.iter().copied()).unwrap_or(1.0);
        let spread = median(self.speeds.iter().map(|s| (s - value).abs())).unwrap_or(0.0);
        Speed { value, spread: MAD * spread, samples: self.speeds.len() as u32 }
    }

    fn overhead(&self) -> Option<Overhead> {
        let task = self.task_overhead.seconds().map(Seconds)?;
        Some(Overhead { task, step: Seconds(self.step_overhead.seconds().unwrap_or(0.0)) })
    }

    /// How far the factors miss what the segments of the last step have in common.
    fn off(&self) -> f64 {
        let known = self.running.iter().filter_map(|(key, runs)| Some((key, self.segments.get(key)?.seconds()?, runs)));
        let (seconds, said) = known.fold((0.0, 0.0), |(seconds, said), (key, level, runs)| {
            (seconds + level * runs, said + terms(key).time(&self.measured).0 * runs)
        });
        let off = seconds / said;
        if off.is_finite() && off > 0.0 { off } else { 1.0 }
    }

    fn equations(&self) -> impl Iterator<Item = Equation> {
        self.segments.iter().filter_map(|(key, level)| {
            Some(Equation {
                terms: terms(key),
                seconds: level.seconds()?,
                slack: SLACK * self.step / level.runs(),
                count: level.count(),
            })
        })
    }
}

/// One run of a segment, as measured.
struct Run {
    seconds: f64,
    runs: f64,
}

/// Numbers segments of equal terms, in their order.
#[derive(Default)]
struct Same(BTreeMap<[u64; N], u32>);

impl Same {
    fn key(&mut self, timed: &Timed) -> Key {
        let bits = timed.terms.to_array().map(|s| s.0.to_bits());
        let next = self.0.entry(bits).or_default();
        *next += 1;
        (bits, *next - 1)
    }
}

/// The terms of a segment.
fn terms(key: &Key) -> Terms {
    Terms::from_array(key.0.map(|b| Seconds(f64::from_bits(b))))
}

/// What a report says of each segment that ran.
fn keyed(report: &Report<'_>) -> Vec<(Key, Run)> {
    let mut same = Same::default();
    let mut out = Vec::with_capacity(report.segments.len());
    for (timed, &seconds) in report.segments.iter().zip(report.seconds) {
        let key = same.key(timed);
        if seconds > 0.0 && timed.runs > 0 {
            let runs = f64::from(timed.runs);
            out.push((key, Run { seconds: f64::from(seconds) / runs, runs }));
        }
    }
    out
}

fn push(window: &mut VecDeque<f64>, value: Option<f64>) {
    let Some(value) = value else { return };
    if window.len() == WINDOW {
        window.pop_front();
    }
    window.push_back(value);
}

#[cfg(test)]
mod tests;
