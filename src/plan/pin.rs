//! Plans whose cuts people have chosen, by the names of their model's blocks.

use super::block::Blocks;
use super::bound::bound;
use super::problem::{Infeasible, Problem};
use super::solve::{Spread, device_orders};
use super::{Plan, Prepared};
use crate::graph::error::closest;

/// The best plan whose second and later shards begin where the blocks of these names do.
///
/// Without names, what [`solve`](super::solve()) finds.
///
/// # Errors
/// [`Infeasible::NoSuchBlock`], [`Infeasible::CutOrder`], and what `solve` refuses.
/// # Complexity
/// That of one simulated step for each microbatch size and order of devices.
pub fn pinned(problem: &Problem<'_>, names: &[String]) -> Result<Plan, Infeasible> {
    Prepared::new(problem.model).pinned(problem, names)
}

impl Prepared {
    /// What [`pinned`] finds, sooner.
    pub fn pinned(&self, problem: &Problem<'_>, names: &[String]) -> Result<Plan, Infeasible> {
        if names.is_empty() {
            return self.solve(problem, None);
        }
        if !self.is_of(problem.model) {
            return pinned(problem, names);
        }
        let n_shards = problem.n_shards;
        if names.len() + 1 != n_shards as usize {
            return Err(Infeasible::CutCount { n_cuts: names.len(), n_shards });
        }
        problem.check_devices()?;
        if problem.schedule.is_none() {
            return problem.with_each_schedule(&|| true, |problem| self.pinned(problem, names));
        }
        let mut best: Option<Plan> = None;
        let mut refusal = None;
        let along = Spread::along(n_shards as usize);
        for (microbatch, variants) in problem.microbatches()? {
            let line = self.line(problem, microbatch, &variants)?;
            let begins = |graph, line| begins(&Blocks::new(graph, line), names);
            let cuts = variants.iter().zip(&line.outline.coordinates).map(|(v, line)| begins(&v.graph, line));
            let cuts = cuts.collect::<Result<Vec<_>, _>>()?;
            for order in device_orders(problem, &line.targets()) {
                match line.plan(problem, microbatch, &variants, &cuts, &order, &along) {
                    Ok(plan) if best.as_ref().is_none_or(|b| problem.cost(&plan) < problem.cost(b)) => {
                        best = Some(plan)
                    }
                    Ok(_) => {}
                    Err(e) => refusal = Some(e),
                }
            }
        }
        let plan = best.ok_or_else(|| refusal.unwrap_or(Infeasible::TooFewOps { n_shards, n_parts: 0 }))?;
        Ok(Plan { bound: bound(problem, self.work())?.step(), ..plan })
    }
}

/// Coordinates at which the blocks begin.
fn begins(blocks: &Blocks, names: &[String]) -> Result<Vec<u32>, Infeasible> {
    let mut begins = Vec::with_capacity(names.len());
    for name in names {
        let known = &blocks.names;
        let begin = blocks.begin(name).ok_or_else(|| Infeasible::NoSuchBlock {
            name: name.clone(),
            hint: closest(name, known.iter().map(String::as_str)),
            known: known.clone(),
        })?;
        // The first shard begins with the first block.
        if begins.last().is_some_and(|&last| begin <= last) || blocks.names.first() == Some(name) {
            return Err(Infeasible::CutOrder { name: name.clone(), known: known.clone() });
        }
        begins.push(begin);
    }
    Ok(begins)
}
