//! Whether splitting ops makes a plan possible or faster.
//!
//! # Source
//! Splits inside ops and cuts between them, chosen together by predicted cost: Alpa (Zheng et al., arXiv 2201.12023). Its
//! search is exact over the layouts of every op; here a few splits that go together are tried, each with a whole search
//! for cuts.

use std::collections::BTreeMap;

use super::problem::{Infeasible, Problem};
use super::{Granularity, Objective, Plan, solve};
use crate::cost;
use crate::graph::scope::{OTHER, block_of};
use crate::graph::split::{MAX_PARTS, candidates};
use crate::graph::{GradGraph, Model, Split};
use crate::topology::Device;
use crate::units::{Bytes, Seconds};

/// Splits of params that are tried.
const TRIED: usize = 6;
/// Parts of rows that are tried for each shard: devices that are not equally fast want lanes that can be shared out by speed.
const LANES: u32 = 3;
/// Ops of a model beyond which none is: each try plans anew.
const LARGE: usize = 100_000;
/// A split has to leave less than this share of the cost: it is more to exchange, and more to go wrong.
pub const GAIN: f64 = 0.95;

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
/// That of at most ten calls of [`solve`](solve()).
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

/// The model in splits worth trying: first of params, in as many parts as there are shards, then of rows. None for one that is
/// split or very large, or whose layers are to stay whole.
pub(super) fn split<'a>(problem: &Problem<'a>) -> impl Iterator<Item = Model> + use<'a> {
    let model = problem.model;
    let n_ops = model.grads.iter().map(|g| g.graph.n_ops()).sum::<usize>() + model.update.n_ops();
    let may = model.split.is_empty() && problem.aim.granularity != Granularity::Layer;
    let fits = may && problem.n_shards > 1 && n_ops <= LARGE;
    let found = if fits { candidates(model, problem.n_shards) } else { Vec::new() };
    // The last holds all others.
    let last = found.len().saturating_sub(1);
    let tried = found.into_iter().enumerate().filter(move |(i, _)| *i + 1 < TRIED || *i == last).map(|(_, s)| s);
    let of_rows = if fits { rows(problem) } else { Vec::new() };
    tried.chain(of_rows).filter_map(|splits| model.split(&splits).ok())
}

/// A layer, as far as lanes of it would gain anything.
#[derive(Default)]
struct Layer {
    /// One microbatch, on one device.
    work: Seconds,
    /// Of its params.
    bytes: Bytes,
}

/// Which layers to replicate: all of them; those whose work takes longer than to exchange their gradients; the one with
/// most work.
///
/// # Source
/// Krizhevsky, arXiv 1404.5997: convolutions have most of the work and few of the params.
fn rows(problem: &Problem<'_>) -> Vec<Vec<Split>> {
    let model = problem.model;
    let asked = |g: &&GradGraph| problem.microbatch.is_none_or(|asked| asked == g.microbatch);
    let Some(variant) = model.grads.iter().filter(asked).max_by_key(|g| g.microbatch) else { return Vec::new() };
    let graph = &variant.graph;
    let devices = &problem.topology.devices[..(problem.n_shards as usize).min(problem.topology.devices.len())];
    let Some(device) = devices.first() else { return Vec::new() };
    let mut layers: BTreeMap<String, Layer> = BTreeMap::new();
    let mut param = vec![false; graph.n_ops()];
    graph.parameters()[..model.n_params].iter().for_each(|p| param[p.index()] = true);
    for ((_, op), cost) in graph.ops().zip(cost::of_graph(graph)) {
        let Some(layer) = op.scope().map(block_of).filter(|block| block != OTHER) else { continue };
        let layer = layers.entry(layer).or_default();
        layer.work += cost.time(device);
        for o in &op.operands {
            // Counted where it is read first.
            if std::mem::take(&mut param[o.index()]) {
                layer.bytes += graph.op(*o).shape.bytes();
            }
        }
    }
    let Some(parts) = parts(devices, variant.microbatch) else { return Vec::new() };
    let of = |ops: &str| Split::Rows { ops: ops.to_owned(), parts };
    let saved = 1.0 - 1.0 / devices.len() as f64;
    let is_near = devices.iter().all(|d| d.node == device.node);
    let link = if is_near { problem.topology.local } else { problem.topology.remote };
    let pays = |layer: &Layer| layer.work * saved > link.time(layer.bytes);
    let light: Vec<Split> = layers.iter().filter(|(_, l)| pays(l)).map(|(name, _)| of(name)).collect();
    let heaviest = layers.iter().max_by(|a, b| a.1.work.0.total_cmp(&b.1.work.0)).map(|(name, _)| vec![of(name)]);
    let mut found = vec![vec![of("*")]];
    let some = Some(light).filter(|l| !l.is_empty() && l.len() < layers.len());
    for splits in some.into_iter().chain(heaviest) {
        if !found.contains(&splits) {
            found.push(splits);
        }
    }
    found
}

/// Into how many parts rows go, so that devices of these speeds get parts that take about as long; `None` where there are too
/// few rows.
fn parts(devices: &[Device], rows: u64) -> Option<u32> {
    let n = devices.len() as u32;
    let speed = |d: &Device| (d.flops * d.speed).0.max(f64::MIN_POSITIVE);
    let all: f64 = devices.iter().map(speed).sum();
    // How much longer than its share the slowest takes, if each part goes to who is done with it first.
    let longest = |parts: u32| {
        let mut busy = vec![0.0; devices.len()];
        for _ in 0..parts {
            let done = |i: usize| busy[i] + 1.0 / speed(&devices[i]);
            let next = (0..devices.len()).min_by(|&a, &b| done(a).total_cmp(&done(b)))?;
            busy[next] += 1.0 / speed(&devices[next]);
        }
        Some(busy.into_iter().fold(0.0, f64::max) * all / f64::from(parts))
    };
    let most = n.saturating_mul(LANES).min(MAX_PARTS).min(u32::try_from(rows).unwrap_or(u32::MAX));
    // More parts are more ops: a few per cent are not worth them.
    let mut best: Option<(f64, u32)> = None;
    for parts in n.max(2)..=most {
        let Some(longest) = longest(parts) else { continue };
        if best.is_none_or(|(known, _)| longest < GAIN * known) {
            best = Some((longest, parts));
        }
    }
    best.map(|(_, parts)| parts)
}
