//! Asking the planner for answers to what is foreseen.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::api::TrainingJobSpec;
use crate::forecast::Forecast;
use crate::graph::Model;
use crate::local::inputs::Ask;
use crate::plan::estimate::Priced;
use crate::plan::foreseen::{Foreseen, Outlook, View};
use crate::plan::moves::moved;
use crate::plan::{Infeasible, Plan, Prepared};
use crate::profile::Calibration;
use crate::topology::{DeviceId, Topology};
use crate::transition::Candidate;
use crate::units::Seconds;

/// Intervals that predictions are made for.
const INTERVALS: usize = 64;
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
    /// Bytes a second that devices receive while they do, if any of these is foreseen to hold steps up.
    pub links: BTreeMap<DeviceId, (f64, Forecast)>,
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

/// What is foreseen of each link, by what the devices at its ends receive.
///
/// A device has one rate for all that it receives: one link that is slow makes the others look slow from there. So a link
/// has the rate of the end that sees more.
fn pairs(base: &Topology, received: &BTreeMap<DeviceId, (f64, Forecast)>) -> BTreeMap<[DeviceId; 2], Outlook> {
    let mut pairs = BTreeMap::new();
    for (&a, of_a) in received {
        for (&b, of_b) in received.range(a..).skip(1) {
            let more = if of_a.1.average().mean >= of_b.1.average().mean { of_a } else { of_b };
            let (now, forecast) = (more.0, Some(more.1.clone()));
            pairs.insert([a, b], Outlook { now, forecast, one: base.link(a, b).bandwidth.0 });
        }
    }
    pairs
}

/// What the planner found.
pub enum Proposed {
    /// Other plans than the running one; their revisions are still to be given.
    Plans(Vec<(Plan, Candidate)>),
    Infeasible(Infeasible),
}

/// Plans for each [view](Foreseen::views) of what is foreseen, and those that can be had at once, each with its step times and
/// those of the running plan over the horizon.
pub fn propose(q: &Question) -> Proposed {
    let foreseen = q.foreseen();
    let base = q.calibration.correct(q.base.clone());
    let mut pictures: Vec<Topology> = Vec::new();
    for view in foreseen.views() {
        let picture = foreseen.at(&base, view);
        if !pictures.contains(&picture) {
            pictures.push(picture);
        }
    }
    // Other microbatches are other dropout masks: only a person may change them.
    let ask = Ask { n_shards: q.running.shards.len() as u32, microbatch: Some(q.running.microbatch) };
    let mut plans: Vec<Plan> = Vec::new();
    let mut refusal = None;
    for picture in &pictures {
        match ask.solve(&q.spec, &q.model, &q.prepared, picture, Some(&q.running)) {
            Ok(plan) if plan.revision == q.running.revision => {}
            Ok(plan) if plans.iter().any(|p| same(p, &plan)) => {}
            Ok(plan) => plans.push(plan),
            Err(problem) => refusal = Some(problem),
        }
    }
    if let Some(problem) = refusal.filter(|_| plans.is_empty()) {
        return Proposed::Infeasible(problem);
    }
    let mut found: Vec<(Plan, Candidate)> = plans.into_iter().filter_map(|plan| q.candidate(plan, &foreseen)).collect();
    let [present, slowest] = [View::Present, View::Slowest].map(|view| foreseen.at(&base, view));
    for known in &q.known {
        let shape = |p: &Plan| (p.shards.len(), p.n_replicas, p.microbatch);
        let fits = shape(known) == shape(&q.running);
        if fits && !same(known, &q.running) && !found.iter().any(|(p, _)| same(p, known)) {
            found.extend(q.again(known, &ask, [&present, &slowest], &foreseen));
        }
    }
    Proposed::Plans(found)
}

impl Question {
    /// Every device at its speed, and the links between devices that have measured what they receive.
    fn foreseen(&self) -> Foreseen {
        let devices = (0..self.base.devices.len() as u32).map(DeviceId);
        let speed = |d: DeviceId| {
            let forecast = self.forecasts.get(&d).cloned();
            (d, Outlook { now: self.calibration.speed(d), forecast, one: 1.0 })
        };
        Foreseen { now: self.now, speeds: devices.map(speed).collect(), links: pairs(&self.base, &self.links) }
    }

    /// A plan that has run before, with its tasks in the order that takes least over the horizon: of those for these
    /// pictures. Executables know no order, and one for fast devices makes slow ones wait for each other.
    fn again(
        &self,
        known: &Plan,
        ask: &Ask,
        pictures: [&Topology; 2],
        foreseen: &Foreseen,
    ) -> Option<(Plan, Candidate)> {
        let mut found: Vec<(Plan, Candidate)> = Vec::new();
        for picture in pictures {
            // What was predicted of it then was for other speeds.
            let plan = ask.repriced(&self.spec, &self.model, &self.prepared, picture, known);
            let new = plan.filter(|plan| found.iter().all(|(other, _)| other.orders != plan.orders));
            found.extend(new.and_then(|plan| self.candidate(plan, foreseen)));
        }
        let total = |(_, c): &(Plan, Candidate)| c.step_times.iter().map(|t| t.0).sum::<f64>();
        found.into_iter().min_by(|a, b| total(a).total_cmp(&total(b)))
    }

    /// A plan with what is predicted of it; `None` for one that cannot be priced.
    fn candidate(&self, plan: Plan, foreseen: &Foreseen) -> Option<(Plan, Candidate)> {
        let priced = self.prepared.priced(&self.model, &self.base, &plan).ok()?;
        let variant = trained(&plan, &self.variant);
        let interval = self.forecasts.values().map(|f| f.interval).next().unwrap_or(Seconds(1.0));
        let horizon = self.forecasts.values().map(Forecast::horizon).min().unwrap_or(1).clamp(1, INTERVALS);
        let speed = |after: Seconds| move |d: DeviceId| foreseen.speed(d, after);
        let (mut running, mut step_times) = (Vec::new(), Vec::new());
        // Both plans on the links of an interval, kept as long as these are the same.
        let mut links = self.base.clone();
        let mut on = (self.priced.clone(), priced.clone());
        for i in 0..horizon {
            let after = interval * i as f64;
            let at = foreseen.links_at(&self.base, after);
            if at != links {
                let of = |priced: &Priced, plan: &Plan| priced.on_links(&self.model, &at, plan);
                on = (of(&self.priced, &self.running), of(&priced, &plan));
                links = at;
            }
            running.push(on.0.estimate(&self.variant, &self.calibration, &speed(after), None)?.step);
            step_times.push(on.1.estimate(&variant, &self.calibration, &speed(after), None)?.step);
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
        let least = foreseen.links_at(&self.base, Seconds(0.0)).slowed.iter().map(|s| s.share).fold(1.0, f64::min);
        let memory = (0..plan.n_replicas).flat_map(|_| plan.shards.iter().map(|s| s.memory)).collect();
        let candidate = Candidate {
            revision: 0,
            made: self.now,
            interval,
            running,
            step_times,
            memory,
            bytes_to_move: moved,
            pause: Preparing::cost(LEAST_PAUSE + moved / (self.base.local.bandwidth * least), prepare),
            prepare,
        };
        Some((plan, candidate))
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearse::{APART, Rehearsals, Rehearsed};
    use super::*;

    use crate::plan::solve::even_topology;
    use crate::topology::{LOOPBACK, nominal};
    use crate::transition::{Observed, Running, Settings, Snapshot, weigh};

    /// A model in two shards on equal devices, and a question about it.
    fn question(forecasts: BTreeMap<DeviceId, Forecast>) -> Question {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/char_gpt.bundle");
        let model = Arc::new(Model::import(&mut |file| std::fs::read(directory.join(file))).unwrap());
        let spec: TrainingJobSpec =
            serde_yaml::from_str("{bundle: a, data: {uri: b}, steps: 1, parallelism: {shards: 2, microbatch: 2}}")
                .unwrap();
        let base = even_topology(2, &nominal("cpu").unwrap(), LOOPBACK);
        let prepared = Arc::new(Prepared::new(&model));
        let ask = Ask { n_shards: 2, microbatch: Some(2) };
        let running = ask.solve(&spec, &model, &prepared, &base, None).unwrap();
        Question {
            spec,
            priced: Priced::new(&model, &base, &running).unwrap(),
            variant: running.grads.keys().next().unwrap().clone(),
            model,
            prepared,
            base,
            calibration: Calibration::default(),
            running,
            forecasts,
            now: Seconds(0.0),
            links: BTreeMap::new(),
            known: Vec::new(),
            preparing: Preparing::default(),
        }
    }

    /// What is expected, and nearly always this share of it at least.
    fn forecast(sure: f64, mean: &[f64]) -> Forecast {
        let highest = mean.iter().copied().fold(0.0, f64::max);
        let lower = mean.iter().map(|m| m * sure).collect();
        Forecast::of(Seconds(0.0), Seconds(10.0), [lower, mean.to_vec(), vec![highest; mean.len()]])
    }

    fn plans(q: &Question) -> Vec<(Plan, Candidate)> {
        match propose(q) {
            Proposed::Plans(plans) => plans,
            Proposed::Infeasible(e) => panic!("{e}"),
        }
    }

    /// The candidate to move to, as the loop decides.
    fn chosen(plans: &[(Plan, Candidate)]) -> usize {
        let numbered = |(i, (_, c)): (usize, &(Plan, Candidate))| Candidate { revision: i as u64, ..c.clone() };
        let candidates: Vec<Candidate> = plans.iter().enumerate().map(numbered).collect();
        let running = Running {
            revision: 0,
            since_step: 0,
            since: Seconds(0.0),
            predicted: candidates[0].running[0],
            observed: Observed::default(),
            forecast: None,
        };
        let snapshot = Snapshot {
            step: 100,
            time: Seconds(0.0),
            steps_left: None,
            settings: Settings { horizon: Seconds(640.0), cooldown: Seconds(640.0), ..Settings::default() },
            running,
            workers: Vec::new(),
            proposal: None,
            moves: Vec::new(),
            in_flight: None,
            considered: None,
            approved: None,
        };
        let (best, weighed) = weigh(&snapshot, &candidates.iter().collect::<Vec<_>>()).unwrap();
        assert!(weighed.balance.net() > Seconds(0.0), "{}", weighed.balance);
        best.revision as usize
    }

    /// A neighbour that comes and goes: most of the time it leaves 0.4 of a core, sometimes all or nearly nothing. The mean is
    /// a speed that the core never has; what it is sure to have nearly always is nearer to the plan that takes least.
    #[test]
    fn the_cautious_plan_is_chosen_where_the_mean_is_one_that_never_comes() {
        let mean: Vec<f64> = (0..64).map(|i| [1.0, 0.4, 1.0, 0.4, 0.4, 0.1, 0.4, 0.4][i % 8]).collect();
        let with = |sure: f64| {
            let speeds = [(DeviceId(0), forecast(sure, &mean)), (DeviceId(1), forecast(1.0, &[1.0; 64]))];
            plans(&question(speeds.into()))
        };
        let total = |c: &Candidate| c.step_times.iter().zip(&c.running).map(|(a, b)| *a / *b).sum::<f64>();
        let (without, offered) = (with(0.95), with(0.76));
        assert_eq!(offered.len(), without.len() + 1, "one more plan is offered");
        let (best, plain) = (&offered[chosen(&offered)], &without[chosen(&without)]);
        assert!(same(&best.0, &offered.last().unwrap().0), "another than the cautious one is chosen");
        assert!(total(&best.1) < 0.98 * total(&plain.1), "{} and {}", total(&best.1), total(&plain.1));
    }

    /// Tasks ordered for two fast devices make a slow one hold the other up.
    #[test]
    fn a_plan_that_has_run_is_offered_in_an_order_for_what_is_foreseen() {
        let mean: Vec<f64> = (0..64).map(|i| if i % 16 < 8 { 1.0 } else { 0.3 }).collect();
        let mut q = question([(DeviceId(0), forecast(1.0, &[1.0; 64])), (DeviceId(1), forecast(1.0, &mean))].into());
        let ask = Ask { n_shards: 2, microbatch: Some(q.running.microbatch) };
        let slow = Foreseen { speeds: [(DeviceId(1), Outlook::steady(0.3))].into(), ..Foreseen::default() };
        let slow = slow.at(&q.base, View::Present);
        let known = ask.solve(&q.spec, &q.model, &q.prepared, &slow, None).unwrap();
        let foreseen = q.foreseen();
        let in_order_for = |picture: &Topology| {
            let plan = ask.repriced(&q.spec, &q.model, &q.prepared, picture, &known).unwrap();
            q.candidate(plan, &foreseen).unwrap()
        };
        let total = |c: &Candidate| c.step_times.iter().map(|t| t.0).sum::<f64>();
        let (fast, slow) = (in_order_for(&q.base), in_order_for(&slow));
        assert!(total(&slow.1) < 0.98 * total(&fast.1), "{} and {}", total(&slow.1), total(&fast.1));
        q.known = vec![Plan { orders: fast.0.orders, ..known }];
        let offered = plans(&q);
        let again = offered.iter().find(|(plan, _)| same(plan, &q.known[0])).unwrap();
        assert_eq!(total(&again.1), total(&slow.1));
    }

    /// The plan for a device of half the speed.
    fn for_slow(q: &Question, device: usize) -> Plan {
        let mut base = q.base.clone();
        base.devices[device].speed = 0.5;
        let ask = Ask { n_shards: 2, microbatch: Some(2) };
        ask.solve(&q.spec, &q.model, &q.prepared, &base, None).unwrap()
    }

    /// A device that becomes slow while a plan is compiled for later is seen before the next one is.
    #[test]
    fn between_two_rehearsals_steps_are_seen() {
        let q = question(BTreeMap::new());
        let mut rehearsals = Rehearsals::waiting(vec![q.running.clone(), for_slow(&q, 0), for_slow(&q, 1)]);
        for device in 0..2 {
            for _ in 0..APART {
                assert!(rehearsals.due(&q.running).is_none(), "too little has been seen");
                rehearsals.step();
            }
            assert!(rehearsals.due(&q.running).is_some_and(|plan| same(&plan, &for_slow(&q, device))));
            assert!(rehearsals.due(&q.running).is_none(), "one is under way");
            rehearsals.over(None);
        }
    }

    /// A rehearsal goes on after a while, until all is compiled or it comes no further.
    #[test]
    fn a_rehearsal_is_taken_up_again() {
        let q = question(BTreeMap::new());
        for (spells, known) in [(&[3, 1, 0][..], true), (&[3, 3][..], false)] {
            let mut rehearsals = Rehearsals::waiting(vec![for_slow(&q, 1)]);
            for &left in spells {
                (0..APART).for_each(|_| rehearsals.step());
                let plan = rehearsals.due(&q.running).unwrap();
                rehearsals.over(Some(Rehearsed { plan, prepared: Seconds(5.0), compiled: 2, left }));
            }
            (0..APART).for_each(|_| rehearsals.step());
            assert!(rehearsals.due(&q.running).is_none());
            assert_eq!(!rehearsals.known().is_empty(), known);
        }

        // The job has moved to the plan that was half done: nothing is asked of the next for that.
        let mut rehearsals = Rehearsals::waiting(vec![for_slow(&q, 0), for_slow(&q, 1)]);
        let mut running = q.running.clone();
        for left in [1, 7, 0] {
            (0..APART).for_each(|_| rehearsals.step());
            let plan = rehearsals.due(&running).unwrap();
            if left == 1 {
                running = plan.clone();
            }
            rehearsals.over(Some(Rehearsed { plan, prepared: Seconds(5.0), compiled: 2, left }));
        }
        assert!(rehearsals.known().iter().any(|known| same(known, &for_slow(&q, 1))));
    }

    #[test]
    fn the_way_back_to_the_first_plan_is_short() {
        let mut q = question(BTreeMap::new());
        let to = for_slow(&q, 1);
        let mut rehearsals = Rehearsals::default();
        rehearsals.moved(q.running.clone(), to.clone());
        q.known = rehearsals.known().to_vec();
        q.priced = Priced::new(&q.model, &q.base, &to).unwrap();
        let first = std::mem::replace(&mut q.running, to);
        let offered = plans(&q);
        let (_, back) = offered.iter().find(|(plan, _)| same(plan, &first)).unwrap();
        assert_eq!(back.prepare, q.preparing.warm);
    }

    #[test]
    fn nothing_is_offered_where_all_stays_as_it_is() {
        let steady = || forecast(0.95, &[1.0; 64]);
        let mut q = question([(DeviceId(0), steady()), (DeviceId(1), steady())].into());
        assert!(plans(&q).is_empty());
        // Links that do as well as they are said to.
        let received = || (2e9, forecast(1.0, &[2e9; 16]));
        q.links = [(DeviceId(0), received()), (DeviceId(1), received())].into();
        assert!(plans(&q).is_empty());
    }

    #[test]
    fn a_link_has_the_rate_of_the_end_that_sees_more() {
        let base = even_topology(3, &nominal("cpu").unwrap(), LOOPBACK);
        // The first two share a slow link; the second gets half of what it gets from the third.
        let rates = [1e8, 3e8, 1e9].map(|rate| (rate, forecast(1.0, &[rate; 4])));
        let received = (0..3).map(DeviceId).zip(rates).collect();
        let foreseen = Foreseen { links: pairs(&base, &received), ..Foreseen::default() };
        let slowed = foreseen.links_at(&base, Seconds(0.0)).slowed;
        let [first] = &slowed[..] else { panic!("{slowed:?}") };
        assert_eq!((first.between, first.share), ([DeviceId(0), DeviceId(1)], 0.3));
    }

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
