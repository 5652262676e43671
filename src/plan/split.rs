//! Whether splitting ops makes a plan possible or faster.
//!
//! # Source
//! Splits inside ops and cuts between them, chosen together by predicted cost: Alpa (Zheng et al., arXiv 2201.12023). Its
//! search is exact over the layouts of every op; here a few splits that go together are tried, each with a whole search
//! for cuts.

use super::problem::{Infeasible, Problem};
use super::{Granularity, Objective, Plan, solve};
use crate::graph::Model;
use crate::graph::split::candidates;

/// Splits that are tried.
const TRIED: usize = 6;
/// Ops of a model beyond which none is: each try plans anew.
const LARGE: usize = 100_000;
/// A split has to leave less than this share of the cost: it is more to exchange, and more to go wrong.
const GAIN: f64 = 0.95;

/// What [`choose`] has found.
#[derive(Debug)]
pub struct Chosen {
    /// The split model; `None` where nothing is split.
    pub model: Option<Model>,
    pub plan: Plan,
    /// The plan without a split, or why there is none.
    pub without: Result<Plan, Infeasible>,
}

impl Chosen {
    /// Why it is split, for the log; `None` where it is not.
    pub fn why(&self) -> Option<String> {
        let split = &self.model.as_ref()?.split;
        let what: Vec<String> = split.iter().map(ToString::to_string).collect();
        let why = match &self.without {
            Ok(whole) if self.plan.aim.objective == Objective::Memory => {
                let most = |plan: &Plan| plan.shards.iter().map(|s| s.memory).max().unwrap_or_default();
                format!("the fullest worker is predicted to need {} instead of {}", most(&self.plan), most(whole))
            }
            Ok(whole) => {
                format!("a step is predicted to take {} instead of {}", self.plan.step_time, whole.step_time)
            }
            Err(e) => format!("unsplit, {e}"),
        };
        Some(format!("split {}: {why}", what.join(", ")))
    }
}

/// Plans with and without splits, and takes the better: with one where there is no plan otherwise, or where it is better by
/// a twentieth.
///
/// # Errors
/// What [`solve`](solve()) says of the model without splits.
/// # Complexity
/// That of at most seven calls of [`solve`](solve()).
pub fn choose(problem: &Problem<'_>) -> Result<Chosen, Infeasible> {
    let whole = solve(problem, None);
    let mut best: Option<(Model, Plan)> = None;
    for model in split(problem) {
        let Ok(plan) = solve(&Problem { model: &model, ..*problem }, None) else { continue };
        if best.as_ref().is_none_or(|(_, b)| problem.cost(&plan) < problem.cost(b)) {
            best = Some((model, plan));
        }
    }
    match (whole, best) {
        (Ok(whole), Some((_, plan))) if !problem.cost(&plan).is_below(GAIN, problem.cost(&whole)) => {
            Ok(Chosen { model: None, plan: whole.clone(), without: Ok(whole) })
        }
        (without, Some((model, plan))) => Ok(Chosen { model: Some(model), plan, without }),
        (whole, None) => Ok(Chosen { model: None, plan: whole.clone()?, without: whole }),
    }
}

/// The model in splits worth trying: in as many parts as there are shards. None for one that is split or very large, or
/// whose layers are to stay whole.
pub(super) fn split<'a>(problem: &Problem<'a>) -> impl Iterator<Item = Model> + use<'a> {
    let model = problem.model;
    let n_ops = model.grads.iter().map(|g| g.graph.n_ops()).sum::<usize>() + model.update.n_ops();
    let may = model.split.is_empty() && problem.aim.granularity != Granularity::Layer;
    let fits = may && problem.n_shards > 1 && n_ops <= LARGE;
    let found = if fits { candidates(model, problem.n_shards) } else { Vec::new() };
    // The last holds all others.
    let last = found.len().saturating_sub(1);
    let tried = found.into_iter().enumerate().filter(move |(i, _)| *i + 1 < TRIED || *i == last);
    tried.filter_map(|(_, splits)| model.split(&splits).ok())
}
