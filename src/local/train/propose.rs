//! Asking the planner for answers to what is foreseen.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::api::TrainingJobSpec;
use crate::forecast::Forecast;
use crate::graph::Model;
use crate::local::inputs::Ask;
use crate::plan::estimate::Priced;
use crate::plan::moves::moved;
use crate::plan::{Infeasible, Plan, Prepared};
use crate::profile::Calibration;
use crate::topology::{DeviceId, Topology};
use crate::transition::Candidate;
use crate::units::{BytesPerSec, Seconds};

/// Intervals that predictions are made for.
const INTERVALS: usize = 64;
/// So many of them are the near future.
const NEAR: usize = 4;
/// A cutover takes that long, however little moves.
const LEAST_PAUSE: Seconds = Seconds(10e-3);

/// All that a plan is looked for by.
pub struct Question {
    pub spec: TrainingJobSpec,
    pub model: Arc<Model>,
    pub prepared: Arc<Prepared>,
    /// Devices without anything measured.
    pub base: Topology,
    pub calibration: Calibration,
    pub running: Plan,
    pub priced: Priced,
    pub forecasts: BTreeMap<DeviceId, Forecast>,
    /// The variant that is trained.
    pub variant: String,
    pub now: Seconds,
    /// Of the slowest link, if it is foreseen to hold steps up.
    pub bandwidth: Option<BytesPerSec>,
    /// Plans whose executables are on disk.
    pub known: Vec<Plan>,
    pub preparing: Preparing,
}

/// What preparing a plan takes: the last of each kind.
#[derive(Clone, Copy, Debug)]
pub struct Preparing {
    /// To compile one module on a device of full speed.
    module: Seconds,
    /// With executables on disk.
    warm: Seconds,
}

impl Default for Preparing {
    /// Of a small model on cores that train: its modules are compiled in 3 to 4 s each, and loaded in one or two together.
    fn default() -> Self {
        Self { module: Seconds(3.5), warm: Seconds(1.5) }
    }
}

impl Preparing {
    /// `compiled`: executables that were not on disk, on all workers, which compile side by side; `speeds`: of their devices.
    pub fn took(&mut self, prepare: Seconds, compiled: u32, speeds: impl Iterator<Item = f64>) {
        let (n, slowest) = speeds.fold((0, 1.0), |(n, slowest), speed| (n + 1, speed.min(slowest)));
        match compiled.div_ceil(n.max(1)) {
            0 => self.warm = prepare,
            each => self.module = prepare * slowest / f64::from(each),
        }
    }

    /// With everything to be compiled: so many modules on devices of these speeds.
    fn cold(&self, workers: impl Iterator<Item = (usize, f64)>) -> Seconds {
        let each = workers.map(|(modules, speed)| self.module * (modules as f64 / speed.max(1e-3)));
        each.fold(self.warm, Seconds::max)
    }

    /// What a move costs whose preparation takes so long: the pause, and what steps lose beside the compiler.
    pub fn cost(pause: Seconds, prepare: Seconds) -> Seconds {
        const LOST: f64 = 0.2;
        pause + prepare * LOST
    }
}

/// Whether two plans are the same but for their numbers.
pub fn same(a: &Plan, b: &Plan) -> bool {
    let devices = |p: &Plan| -> Vec<Vec<DeviceId>> { p.shards.iter().map(|s| s.devices.clone()).collect() };
    let (cuts, others) = ((&a.grads, &a.owners, a.recomputes()), (&b.grads, &b.owners, b.recomputes()));
    cuts == others && devices(a) == devices(b)
}

/// The variant that a plan trains: this one where it has it.
pub fn trained(plan: &Plan, variant: &str) -> String {
    let same = plan.grads.keys().find(|v| *v == variant);
    same.or_else(|| plan.grads.keys().next()).cloned().unwrap_or_default()
}

/// What the planner found.
pub enum Proposed {
    /// Other plans than the running one; their revisions are still to be given.
    Plans(Vec<(Plan, Candidate)>),
    Infeasible(Infeasible),
}

/// Plans for the present, for the near future, for the slowest moment foreseen and for the mean of what is foreseen, and
/// those that can be had at once, each with its step times and those of the running plan over the horizon.
pub fn propose(q: &Question) -> Proposed {
    let base = q.base();
    let now = |d: DeviceId| q.calibration.speed(d);
    let foreseen = |d: DeviceId, of: &dyn Fn(&Forecast) -> f64| q.forecasts.get(&d).map_or(now(d), of);
    let near = |d: DeviceId| (0..NEAR).map(|i| q.expected(d, i)).sum::<f64>() / NEAR as f64;
    let futures: [Vec<f64>; 4] = [
        q.each(&now),
        q.each(&near),
        q.each(&|d| foreseen(d, &|f| f.min().band.mean)),
        q.each(&|d| foreseen(d, &|f| f.average().mean)),
    ];
    let at = |speeds: &[f64]| {
        let mut topology = q.calibration.correct(base.clone());
        for (device, speed) in topology.devices.iter_mut().zip(speeds) {
            device.speed *= speed;
        }
        topology
    };
    // Other microbatches are other dropout masks: only a person may change them.
    let ask = Ask { n_shards: q.running.shards.len() as u32, microbatch: Some(q.running.microbatch) };
    let mut plans: Vec<Plan> = Vec::new();
    let mut refusal = None;
    for (i, speeds) in futures.iter().enumerate() {
        if futures[..i].contains(speeds) {
            continue;
        }
        match ask.solve(&q.spec, &q.model, &q.prepared, &at(speeds), Some(&q.running)) {
            Ok(plan) if plan.revision == q.running.revision => {}
            Ok(plan) if plans.iter().any(|p| same(p, &plan)) => {}
            Ok(plan) => plans.push(plan),
            Err(problem) => refusal = Some(problem),
        }
    }
    if let Some(problem) = refusal.filter(|_| plans.is_empty()) {
        return Proposed::Infeasible(problem);
    }
    let today = at(&futures[0]);
    for known in &q.known {
        let shape = |p: &Plan| (p.shards.len(), p.n_replicas, p.microbatch);
        let fits = shape(known) == shape(&q.running);
        if fits && !same(known, &q.running) && !plans.iter().any(|p| same(p, known)) {
            // What was predicted of it then was for other speeds.
            plans.extend(ask.repriced(&q.spec, &q.model, &q.prepared, &today, known));
        }
    }
    // Both sides are priced alike.
    let running = match q.bandwidth {
        Some(_) => q.prepared.priced(&q.model, &base, &q.running).ok(),
        None => Some(q.priced.clone()),
    };
    let Some(running) = running else { return Proposed::Plans(Vec::new()) };
    Proposed::Plans(plans.into_iter().filter_map(|plan| q.candidate(plan, &running, &base)).collect())
}

impl Question {
    fn each(&self, of: &dyn Fn(DeviceId) -> f64) -> Vec<f64> {
        (0..self.base.devices.len() as u32).map(|d| of(DeviceId(d)).max(1e-3)).collect()
    }

    /// Speed of a device in an interval from now.
    fn expected(&self, device: DeviceId, ahead: usize) -> f64 {
        let now = self.calibration.speed(device);
        self.forecasts.get(&device).map_or(now, |f| f.expect(self.now, now, ahead))
    }

    /// The devices, with links as they are foreseen.
    fn base(&self) -> Topology {
        let mut base = self.base.clone();
        if let Some(foreseen) = self.bandwidth {
            for link in [&mut base.local, &mut base.remote] {
                link.bandwidth = link.bandwidth.min(foreseen);
            }
        }
        base
    }

    /// A plan with what is predicted of it; `None` for one that cannot be priced.
    fn candidate(&self, plan: Plan, running: &Priced, base: &Topology) -> Option<(Plan, Candidate)> {
        let before = running;
        let priced = self.prepared.priced(&self.model, base, &plan).ok()?;
        let variant = trained(&plan, &self.variant);
        let interval = self.forecasts.values().map(|f| f.interval).next().unwrap_or(Seconds(1.0));
        let horizon = self.forecasts.values().map(Forecast::horizon).min().unwrap_or(1).clamp(1, INTERVALS);
        let speed = |i: usize| move |d: DeviceId| self.expected(d, i).max(1e-3);
        let (mut running, mut step_times) = (Vec::new(), Vec::new());
        for i in 0..horizon {
            running.push(before.estimate(&self.variant, &self.calibration, &speed(i), None)?.step);
            step_times.push(priced.estimate(&variant, &self.calibration, &speed(i), None)?.step);
        }
        let moved = moved(&self.model, &self.running, &plan);
        let workers = priced
            .seats()
            .enumerate()
            .map(|(rank, (device, _))| (priced.segments(&variant, rank).len(), self.calibration.speed(device)));
        let prepare = match self.known.iter().any(|k| same(k, &plan)) {
            true => self.preparing.warm,
            false => self.preparing.cold(workers),
        };
        let memory = (0..plan.n_replicas).flat_map(|_| plan.shards.iter().map(|s| s.memory)).collect();
        let candidate = Candidate {
            revision: 0,
            made: self.now,
            interval,
            running,
            step_times,
            memory,
            bytes_to_move: moved,
            pause: Preparing::cost(LEAST_PAUSE + moved / base.local.bandwidth, prepare),
            prepare,
        };
        Some((plan, candidate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_compiling_takes_counts_modules_and_the_speed_of_the_core() {
        let mut preparing = Preparing::default();
        preparing.took(Seconds(1.0), 0, [1.0, 1.0].into_iter());
        // One module on each of two workers, the slower one at half its speed.
        preparing.took(Seconds(4.0), 2, [1.0, 0.5].into_iter());
        assert_eq!((preparing.warm, preparing.module), (Seconds(1.0), Seconds(2.0)));
        assert_eq!(preparing.cold([(5, 1.0), (4, 0.4)].into_iter()), Seconds(20.0));
        assert_eq!(preparing.cold([(0, 0.0)].into_iter()), Seconds(1.0), "nothing to compile");
    }
}
