//! Which shards compute forward values again instead of keeping them.

use crate::plan::problem::Problem;
use crate::plan::{Objective, Plan, Recompute, ShardPlan};
use crate::units::Bytes;

/// Who computes again may order its tasks otherwise, and with that others: so often what does not fit is looked for.
const ROUNDS: usize = 3;

/// The plan of one cut, with the shards that compute again chosen by what the problem is after. `with`: the plan where those
/// do that are marked; `None` where it is none.
///
/// # Complexity
/// One prediction where all shards have room, at most four where not, three where memory is what the plan is for.
pub(super) fn choose(problem: &Problem<'_>, with: &dyn Fn(&[bool]) -> Option<Plan>) -> Option<Plan> {
    let n = problem.n_shards as usize;
    let (none, all) = (vec![false; n], vec![true; n]);
    match (problem.aim.recompute, problem.aim.objective) {
        (Recompute::Never, _) => with(&none),
        (Recompute::Always, _) => with(&all),
        (Recompute::Auto, Objective::Memory) => {
            let (kept, again) = (with(&none)?, with(&all)?);
            Some(least(problem, kept, &again, with))
        }
        (Recompute::Auto, Objective::Throughput) => {
            let mut plan = with(&none)?;
            let mut marked = none;
            for _ in 0..ROUNDS {
                let new = |(shard, marked): (&ShardPlan, &bool)| !marked && shard.memory > room(problem, shard);
                let new: Vec<bool> = plan.shards.iter().zip(&marked).map(new).collect();
                if !new.contains(&true) {
                    break;
                }
                marked.iter_mut().zip(new).for_each(|(marked, new)| *marked |= new);
                plan = with(&marked)?;
            }
            Some(plan)
        }
    }
}

/// The plan whose fullest shard has most room, where no shard computes again that need not for that.
fn least(problem: &Problem<'_>, kept: Plan, again: &Plan, with: &dyn Fn(&[bool]) -> Option<Plan>) -> Plan {
    let share = |shard: &ShardPlan| shard.memory.0 as f64 / room(problem, shard).0.max(1) as f64;
    let of = |plan: &Plan| plan.shards.iter().map(share).collect::<Vec<f64>>();
    let shares: Vec<(f64, f64)> = of(&kept).into_iter().zip(of(again)).collect();
    let least = shares.iter().map(|(kept, again)| kept.min(*again)).fold(0.0, f64::max);
    let marked: Vec<bool> = shares.iter().map(|(kept, again)| *kept > least && again < kept).collect();
    let found = if marked.contains(&true) { with(&marked) } else { None };
    match found {
        Some(found) if problem.cost(&found) < problem.cost(&kept) => found,
        _ => kept,
    }
}

/// Memory of a shard's smallest device.
fn room(problem: &Problem<'_>, shard: &ShardPlan) -> Bytes {
    let has = shard.devices.iter().map(|d| problem.topology.devices[d.index()].memory);
    has.min().unwrap_or_default()
}
