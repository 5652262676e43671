//! The planner: a line, a dynamic program over its parts, then a search around the borders.
//!
//! Coordinates ([`super::coordinate`]) turn the graph into a line. The line is coarsened into parts of equal work, each
//! border put where the fewest bytes cross. Contiguous ranges of parts are given to shards by dynamic programs that look
//! at the step in different ways; borders of the best are then moved as long as the simulated plan gets better: faster, or
//! roomier where that is the aim. Where a cut does not fit, shards that are too full keep less and compute more.

mod again;
mod lanes;
mod line;
mod orders;
mod outline;
mod partition;
mod prepared;
mod refuse;
mod search;

use std::collections::BTreeMap;

use super::bound::bound;
use super::moves::moving;
use super::predict::Prediction;
use super::problem::{Infeasible, Problem};
use super::{Assignment, Place, Plan, ShardPlan};
use crate::topology::{Device, DeviceId, Link, Topology};
use crate::units::{Bytes, Seconds};

pub(super) use lanes::Spread;
pub(super) use orders::device_orders;
pub use prepared::Prepared;
use search::Search;

/// Ops that all tries of the search look at together: each try cuts the whole model. Small models are searched to the
/// end, of large ones the time stays in proportion to their size.
const SEARCHED: usize = 2_500_000;
/// With fewer tries than this a model is large: few rules are tried, and of a plan in force only what they say.
const FEW_TRIES: usize = 32;

/// Finds a plan.
///
/// `previous` is kept when it solves the same problem nearly as well: the same problem asked twice gives the same
/// assignment. A plan near to it comes before one that is hardly better and moves more; the devices keep their order, the
/// pipeline its schedule and microbatches their size.
///
/// Who asks again and again for one model keeps it [`Prepared`].
///
/// # Errors
/// [`Infeasible`], with the limit met and the way out.
/// # Complexity
/// O(ops · log ops + parts² · shards) for each microbatch size, plus the search: O(ops) for each border moved, with a
/// bound on their product.
/// # Source
/// Linear partition by dynamic programming, as in PipeDream (Narayanan et al., SOSP 2019).
pub fn solve(problem: &Problem<'_>, previous: Option<&Plan>) -> Result<Plan, Infeasible> {
    Prepared::new(problem.model).solve(problem, previous)
}

/// An earlier plan as it would do on the devices of `problem`; `None` when it does not fit them.
pub fn repriced(problem: &Problem<'_>, earlier: &Plan) -> Option<Plan> {
    Prepared::new(problem.model).repriced(problem, earlier)
}

impl Prepared {
    /// What [`solve`](solve()) finds, sooner.
    ///
    /// With `previous` and devices that have changed in nothing but speed and measured figures, that is O(ops) with a small
    /// factor, and what each cut that is tried takes.
    pub fn solve(&self, problem: &Problem<'_>, previous: Option<&Plan>) -> Result<Plan, Infeasible> {
        self.solve_while(problem, previous, &|| true)
    }

    /// The best plan that is found while the caller says to go on, with the bound that tells how far off it can be.
    ///
    /// It is asked between cuts that are tried. At least one plan is looked for in any case: where the first cuts fit no
    /// device that takes as long as it takes. To be told always to go on is [`Self::solve`]; who stops by a clock gets plans
    /// that depend on it.
    pub fn solve_while(
        &self,
        problem: &Problem<'_>,
        previous: Option<&Plan>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Plan, Infeasible> {
        let plan = self.search(problem, previous, go_on)?;
        let moving = previous.and_then(|p| moving(problem.model, problem.topology, p, &plan));
        Ok(Plan { moving: moving.filter(|m| m.bytes > Bytes(0)), ..plan })
    }

    fn search(
        &self,
        problem: &Problem<'_>,
        previous: Option<&Plan>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Plan, Infeasible> {
        if !self.is_of(problem.model) {
            return Self::new(problem.model).search(problem, previous, go_on);
        }
        problem.check_devices()?;
        if problem.schedule.is_none() {
            // A plan in force keeps its schedule, as long as it fits.
            let same = previous.filter(|p| p.shards.len() == problem.n_shards as usize).map(|p| p.schedule);
            let kept = same.map(|same| self.search(&Problem { schedule: Some(same), ..*problem }, previous, go_on));
            return match kept {
                Some(Ok(plan)) => Ok(plan),
                _ => problem.with_each_schedule(go_on, |problem| self.search(problem, previous, go_on)),
            };
        }
        let (n_shards, n_devices) = (problem.n_shards, problem.topology.devices.len());
        let usable = problem.microbatches()?;
        let fits = |previous: &&Plan| {
            previous.model == problem.model.fingerprint
                && previous.shards.len() == n_shards as usize
                && previous.n_replicas == problem.n_replicas
                && problem.kind() == previous.schedule
                && previous.aim == problem.aim
                && problem.microbatch.is_none_or(|m| m == previous.microbatch)
                && previous.shards.iter().flat_map(|s| &s.devices).all(|d| d.index() < n_devices)
        };
        let kept = previous.filter(fits).and_then(|previous| {
            self.hold(problem.model, problem.topology, previous);
            self.reprice(problem, previous)
        });
        let mut best: Option<Plan> = None;
        let mut refusal = None;
        for (microbatch, variants) in &usable {
            // Microbatches keep their size: others are other dropout masks.
            if kept.as_ref().is_some_and(|kept| kept.microbatch != *microbatch) {
                continue;
            }
            if best.is_some() && !go_on() {
                break;
            }
            let line = match self.line(problem, *microbatch, variants) {
                Ok(line) => line,
                Err(e) => {
                    refusal = Some(e);
                    continue;
                }
            };
            let search = Search { problem, line: &line, microbatch: *microbatch, variants, go_on };
            if let Some(kept) = &kept
                && let Some(start) = line.start_of(kept, variants)
            {
                best = Some(search.again(kept, start));
                continue;
            }
            match search.run() {
                Ok(plan) if best.as_ref().is_none_or(|b| problem.cost(&plan) < problem.cost(b)) => best = Some(plan),
                Ok(_) => {}
                Err(e) => refusal = Some(e),
            }
        }
        let plan = match (best, kept) {
            (Some(plan), Some(kept)) if problem.prefers(&plan, &kept) => {
                Plan { revision: kept.revision.saturating_add(1), ..plan }
            }
            (_, Some(kept)) => kept,
            (Some(plan), None) => Plan { revision: previous.map_or(0, |p| p.revision.saturating_add(1)), ..plan },
            (None, None) => {
                let refusal = refusal.unwrap_or(Infeasible::TooFewOps { n_shards, n_parts: 0 });
                return Err(refuse::refuse(problem, self, refusal));
            }
        };
        Ok(Plan { bound: bound(problem, self.work())?.step(), ..plan })
    }

    /// What [`repriced`] says, sooner.
    pub fn repriced(&self, problem: &Problem<'_>, earlier: &Plan) -> Option<Plan> {
        if !self.is_of(problem.model) {
            return repriced(problem, earlier);
        }
        let plan = self.reprice(problem, earlier)?;
        Some(Plan { bound: bound(problem, self.work()).ok()?.step(), ..plan })
    }

    fn reprice(&self, problem: &Problem<'_>, earlier: &Plan) -> Option<Plan> {
        // It keeps its schedule, whatever is asked for: that is part of the plan.
        let problem = &Problem { schedule: Some(earlier.schedule), ..*problem };
        let (grads, owners) = (earlier.grads.clone(), earlier.owners.clone());
        let predict = |plan: &Plan| self.predict(problem, plan);
        let shards = blank(&order_of(earlier), &earlier.recomputes());
        let plan = finish(problem, earlier.microbatch, grads, owners, shards, predict)?;
        let plan = Plan { revision: earlier.revision, ..plan };
        check_memory(problem, &plan).ok()?;
        problem.fixed.check(problem, &plan).ok().map(|()| plan)
    }
}

fn order_of(plan: &Plan) -> Vec<Vec<DeviceId>> {
    plan.shards.iter().map(|s| s.devices.clone()).collect()
}

/// Shards before anything is predicted of them.
fn blank(devices: &[Vec<DeviceId>], recomputes: &[bool]) -> Vec<ShardPlan> {
    let of = |(devices, &recompute): (&Vec<DeviceId>, &bool)| ShardPlan {
        devices: devices.clone(),
        busy: Seconds(0.0),
        memory: Bytes(0),
        sent: Bytes(0),
        recompute,
    };
    devices.iter().zip(recomputes).map(of).collect()
}

/// A plan from its assignments: orders and predictions. `None` when a shard would be empty.
fn finish(
    problem: &Problem<'_>,
    microbatch: u64,
    grads: BTreeMap<String, Assignment>,
    owners: Vec<Place>,
    shards: Vec<ShardPlan>,
    predict: impl FnOnce(&Plan) -> Option<Prediction>,
) -> Option<Plan> {
    let per_replica = problem.model.manifest.batch_size / microbatch / u64::from(problem.n_replicas);
    let mut plan = Plan {
        revision: 0,
        model: problem.model.fingerprint.clone(),
        split: problem.model.split.clone(),
        microbatch,
        shards,
        n_replicas: problem.n_replicas,
        n_microbatches: u32::try_from(per_replica).ok()?,
        grads,
        owners,
        schedule: problem.kind(),
        aim: problem.aim,
        fixed: problem.fixed.clone(),
        orders: BTreeMap::new(),
        step_time: Seconds(0.0),
        bound: Seconds(0.0),
        bytes_cut: Bytes(0),
        moving: None,
    };
    let Prediction { orders, busy, memory, sent, recompute, step_time } = predict(&plan)?;
    // A shard without work of its own is no shard.
    if busy.iter().any(|b| b.0 <= 0.0) {
        return None;
    }
    for (i, shard) in plan.shards.iter_mut().enumerate() {
        (shard.busy, shard.memory, shard.sent) = (busy[i], memory[i].total(), sent[i]);
        shard.recompute = recompute[i];
    }
    (plan.orders, plan.step_time) = (orders, step_time);
    plan.bytes_cut = sent.into_iter().sum();
    Some(plan)
}

fn check_memory(problem: &Problem<'_>, plan: &Plan) -> Result<(), Infeasible> {
    for (i, shard) in plan.shards.iter().enumerate() {
        for d in &shard.devices {
            let device = &problem.topology.devices[d.index()];
            if shard.memory > device.memory {
                let n_shards = problem.n_shards;
                let (device, has) = (device.name.clone(), device.memory);
                let (shard, needs) = (i as u32, shard.memory);
                let (enough, shards, split, recompute) = (None, None, Vec::new(), false);
                return Err(Infeasible::Memory {
                    shard,
                    n_shards,
                    needs,
                    device,
                    has,
                    enough,
                    shards,
                    split,
                    recompute,
                });
            }
        }
    }
    Ok(())
}

/// A topology of equal devices on one node, for tests and quick questions.
pub fn even_topology(n: usize, device: &Device, link: Link) -> Topology {
    let devices = (0..n).map(|i| Device { name: format!("{}{i}", device.name), ..device.clone() }).collect();
    Topology::new(devices, link, link)
}
