//! What no plan is faster than, wherever it puts which op.
//!
//! Three limits of a step, each of which holds for every assignment of ops, contiguous or not, and for every order of
//! tasks: devices are busy with all work together; an op runs for all microbatches on one device, after all that it
//! needs and before all that needs it; and params are updated once the last gradient is there.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::predict::Costs;
use super::problem::{Infeasible, Problem};
use crate::cost::OpCost;
use crate::graph::{GradGraph, Graph, Model, OpId};
use crate::topology::{Class, Device, Measured, kinds};
use crate::units::{Bytes, Seconds};

/// Rounds in which prices of devices are corrected, where devices differ in more than their speed.
const ROUNDS: usize = 24;
/// More families of devices than this are taken for one, as good as the best in every regard.
const FEW_FAMILIES: usize = 16;

/// Lower bounds of a step with microbatches of one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Rows of a microbatch.
    pub microbatch: u64,
    /// All work, spread over all devices without a gap.
    pub work: Seconds,
    /// The longest path of one microbatch through an op, and that op for all other microbatches.
    pub path: Seconds,
    /// The op that this path leads through.
    pub op: Option<OpId>,
    /// Update of all params, and the exchange of gradients between replicas, spread over all devices.
    pub update: Seconds,
}

impl Bound {
    /// Of the whole step.
    pub fn step(&self) -> Seconds {
        self.work.max(self.path) + self.update
    }
}

/// What the bound needs of a model, whatever the devices: for callers that ask for one problem after the other.
#[derive(Clone, Debug)]
pub struct Work {
    /// By variant.
    grads: BTreeMap<String, OfGraph>,
    update: OfGraph,
}

/// The work of one graph.
#[derive(Clone, Debug)]
struct OfGraph {
    /// Ops that run in every plan.
    counted: Vec<bool>,
    /// Every cost once: a model has many layers that are alike.
    costs: Vec<OpCost>,
    /// Position in `costs` of each op's.
    of: Vec<u32>,
    /// How many of the counted ops have each cost.
    n_counted: Vec<f64>,
    /// With several microbatches every result is added to a sum: what that costs, and how often.
    sums: Vec<(OpCost, f64)>,
}

impl Work {
    /// # Complexity
    /// O(ops · log costs that differ + operands).
    pub fn of(model: &Model, known: &Costs) -> Self {
        let of_variant = |v: &GradGraph| {
            let costs = known.grads.get(&v.name)?;
            Some((v.name.clone(), OfGraph::new(&v.graph, counted(&v.graph, model.n_params), costs)))
        };
        let grads = model.grads.iter().filter_map(of_variant).collect();
        Self { grads, update: OfGraph::new(&model.update, counted(&model.update, 0), &known.update) }
    }
}

impl OfGraph {
    fn new(graph: &Graph, counted: Vec<bool>, of_ops: &[OpCost]) -> Self {
        let mut position: BTreeMap<(u64, Bytes, bool, Class), u32> = BTreeMap::new();
        let (mut costs, mut n_counted) = (Vec::new(), Vec::new());
        let mut of = Vec::with_capacity(of_ops.len());
        for (cost, counted) in of_ops.iter().zip(&counted) {
            let key = (cost.flops.0.to_bits(), cost.bytes, cost.launches, cost.class);
            let at = *position.entry(key).or_insert(costs.len() as u32);
            if at as usize == costs.len() {
                costs.push(*cost);
                n_counted.push(0.0);
            }
            n_counted[at as usize] += f64::from(u8::from(*counted));
            of.push(at);
        }
        let mut sums: BTreeMap<Bytes, f64> = BTreeMap::new();
        for &result in graph.outputs() {
            // Two are read, one is written.
            *sums.entry(graph.op(result).shape.bytes() * 3).or_default() += 1.0;
        }
        let sum = |bytes| OpCost { bytes, launches: true, class: Class::Memory, ..OpCost::default() };
        let sums = sums.into_iter().map(|(bytes, n)| (sum(bytes), n)).collect();
        Self { counted, costs, of, n_counted, sums }
    }

    fn counted(&self) -> impl Iterator<Item = (OpCost, f64)> {
        self.costs.iter().copied().zip(self.n_counted.iter().copied()).filter(|(_, n)| *n > 0.0)
    }
}

/// The bound of a problem: that of the microbatch size whose own is least.
///
/// # Errors
/// What [`Problem::microbatches`] refuses.
/// # Complexity
/// O(microbatch sizes · (costs that differ · families + ops + operands)), with at most 16 families of devices.
/// # Source
/// Work: the dual of fractional scheduling on unrelated machines (Lenstra, Shmoys and Tardos, 1990), in which every
/// device has a price. Path: heads and tails, as in job-shop scheduling (Carlier, 1982).
pub fn bound(problem: &Problem<'_>, work: &Work) -> Result<Bound, Infeasible> {
    let of_size = |(microbatch, variants): (u64, Vec<&GradGraph>)| of_size(problem, work, microbatch, &variants);
    let all = problem.microbatches()?.into_iter().map(of_size);
    let least = all.min_by(|a, b| a.step().0.total_cmp(&b.step().0));
    Ok(least.expect("a problem has a microbatch size, or it is refused"))
}

/// The bound for microbatches of one size.
fn of_size(problem: &Problem<'_>, work: &Work, microbatch: u64, variants: &[&GradGraph]) -> Bound {
    let model = problem.model;
    let pool = Pool::new(problem);
    let per_replica = model.manifest.batch_size / microbatch.max(1) / u64::from(problem.n_replicas.max(1));
    let m = per_replica as f64;
    let update = update(problem, &work.update, &pool);
    let mut out = Bound { microbatch, work: Seconds(0.0), path: Seconds(0.0), op: None, update };
    for variant in variants {
        let Some(of) = work.grads.get(&variant.name) else { continue };
        let sums = of.sums.iter().copied().filter(|_| per_replica > 1);
        // Every device starts one executable at least.
        let start = Seconds(pool.fastest(&OpCost { launches: true, ..OpCost::default() }));
        out.work = out.work.max((pool.least(of.counted().chain(sums)) * f64::from(problem.n_replicas) + start) * m);
        let (path, op) = path(&variant.graph, of, &pool, m);
        if path.0 > out.path.0 {
            (out.path, out.op) = (path, op);
        }
    }
    out
}

/// Devices of a problem, by family: those that differ in their speed alone. A plan may take any `n` of them.
struct Pool {
    /// One of each family, at speed 1.
    families: Vec<Device>,
    /// By family: the speeds of its devices.
    speeds: Vec<Vec<f64>>,
    /// Devices of a plan.
    n: usize,
}

impl Pool {
    fn new(problem: &Problem<'_>) -> Self {
        let all = &problem.topology.devices;
        let at_full_speed: Vec<Device> = all.iter().map(|d| Device { speed: 1.0, ..d.clone() }).collect();
        let (families, of) = kinds(&at_full_speed);
        let mut families: Vec<Device> = families.into_iter().cloned().collect();
        let mut speeds = vec![Vec::new(); families.len()];
        of.iter().zip(all).for_each(|(&family, d)| speeds[family].push(d.speed));
        if families.len() > FEW_FAMILIES {
            (families, speeds) = (vec![best(&families)], vec![speeds.concat()]);
        }
        let n = (problem.n_shards as usize).saturating_mul(problem.n_replicas as usize);
        Self { families, speeds, n: n.clamp(1, all.len().max(1)) }
    }

    /// Time on the device that is fastest for it.
    fn fastest(&self, cost: &OpCost) -> f64 {
        let of = |(family, speeds): (&Device, &Vec<f64>)| {
            cost.time(family).0 / speeds.iter().copied().fold(f64::MIN_POSITIVE, f64::max)
        };
        self.families.iter().zip(&self.speeds).map(of).fold(f64::INFINITY, f64::min)
    }

    /// Time that the busiest of `n` devices has at least.
    ///
    /// Whatever prices λ the devices have, the busiest has Σ λ·load when prices sum to 1, and each op costs at least its
    /// cheapest λ·time. Prices are scaled so that those of the dearest `n` devices sum to 1: then it holds for any `n`.
    /// Within a family prices go with speeds, so that an op costs the same on each.
    ///
    /// `work`: costs, and how many ops have each.
    fn least(&self, work: impl Iterator<Item = (OpCost, f64)>) -> Seconds {
        let n_families = self.families.len();
        let times: Vec<f64> = work
            .flat_map(|(cost, n)| self.families.iter().map(move |d| n * cost.time(d).0).collect::<Vec<_>>())
            .collect();
        let mut prices: Vec<f64> = (0..n_families)
            .map(|f| 1.0 / times.iter().skip(f).step_by(n_families).sum::<f64>().max(f64::MIN_POSITIVE))
            .collect();
        let mut best = 0.0f64;
        for round in 0..if n_families > 1 { ROUNDS } else { 1 } {
            let scale = self.dearest(&prices);
            if !(scale > 0.0 && scale.is_finite()) {
                break;
            }
            prices.iter_mut().for_each(|p| *p /= scale);
            let (mut value, mut loads) = (0.0, vec![0.0; n_families]);
            for of_cost in times.chunks_exact(n_families) {
                let costs = of_cost.iter().zip(&prices).map(|(time, price)| time * price).enumerate();
                let Some((f, cheapest)) = costs.min_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
                value += cheapest;
                loads[f] += of_cost[f];
            }
            best = best.max(value);
            // A family with more to do than the bound becomes dearer, by less and less.
            let step = 0.5 / (1.0 + round as f64);
            for ((price, load), speeds) in prices.iter_mut().zip(&loads).zip(&self.speeds) {
                let load = load / speeds.iter().sum::<f64>();
                *price *= (step * (load / value.max(f64::MIN_POSITIVE) - 1.0).clamp(-1.0, 1.0)).exp();
            }
        }
        Seconds(best)
    }

    /// Sum of the highest prices of `n` devices.
    fn dearest(&self, prices: &[f64]) -> f64 {
        let of = |(price, speeds): (&f64, &Vec<f64>)| speeds.iter().map(|s| price * s).collect::<Vec<_>>();
        let mut all: Vec<f64> = prices.iter().zip(&self.speeds).flat_map(of).collect();
        all.sort_by(|a, b| b.total_cmp(a));
        all.iter().take(self.n).sum()
    }
}

/// A device as good as any of these in every regard.
fn best(all: &[Device]) -> Device {
    let mut out = all[0].clone();
    for d in all {
        let (a, b) = (out.measured.unwrap_or_default(), d.measured.unwrap_or_default());
        out.flops = out.flops.max(d.flops);
        out.bandwidth = out.bandwidth.max(d.bandwidth);
        out.overhead = out.overhead.min(d.overhead);
        out.measured = Some(Measured {
            product: a.product.min(b.product),
            memory: a.memory.min(b.memory),
            other: a.other.min(b.other),
            launch: a.launch.min(b.launch),
        });
    }
    out
}

/// Ops that run in every plan: what a result needs, and what reads a param and so has a shard of its own.
fn counted(graph: &Graph, n_params: usize) -> Vec<bool> {
    let mut counted = vec![false; graph.n_ops()];
    graph.outputs().iter().for_each(|o| counted[o.index()] = true);
    for (id, op) in graph.ops().rev() {
        if counted[id.index()] {
            op.operands.iter().for_each(|o| counted[o.index()] = true);
        }
    }
    let mut placed = vec![false; graph.n_ops()];
    graph.parameters().iter().take(n_params).for_each(|p| placed[p.index()] = true);
    for (id, op) in graph.ops() {
        placed[id.index()] |= op.operands.iter().any(|o| placed[o.index()]);
        counted[id.index()] |= placed[id.index()];
    }
    counted
}

/// The longest of all paths of one microbatch, of which one op runs for all `m`.
fn path(graph: &Graph, work: &OfGraph, pool: &Pool, m: f64) -> (Seconds, Option<OpId>) {
    let of_cost: Vec<f64> = work.costs.iter().map(|c| pool.fastest(c)).collect();
    let time: Vec<f64> = work.of.iter().map(|&at| of_cost[at as usize]).collect();
    let counted = &work.counted;
    let mut head = vec![0.0f64; graph.n_ops()];
    for (id, op) in graph.ops() {
        head[id.index()] = op.operands.iter().map(|o| head[o.index()] + time[o.index()]).fold(0.0, f64::max);
    }
    let mut tail = vec![0.0f64; graph.n_ops()];
    for (id, op) in graph.ops().rev().filter(|(id, _)| counted[id.index()]) {
        let behind = tail[id.index()] + time[id.index()];
        op.operands.iter().for_each(|o| tail[o.index()] = tail[o.index()].max(behind));
    }
    let all = graph.ops().map(|(id, _)| id).filter(|id| counted[id.index()]);
    let length = |id: &OpId| head[id.index()] + m * time[id.index()] + tail[id.index()];
    let longest = all.max_by(|a, b| length(a).total_cmp(&length(b)).then(b.cmp(a)));
    (Seconds(longest.as_ref().map_or(0.0, length)), longest)
}

/// Of the work of the update, and of what replicas send each other.
fn update(problem: &Problem<'_>, work: &OfGraph, pool: &Pool) -> Seconds {
    let model = problem.model;
    let computing = pool.least(work.counted()) * f64::from(problem.n_replicas);
    let params: Bytes = model.state[..model.n_params].iter().map(|p| p.shape.bytes()).sum();
    let others = u64::from(problem.n_replicas.max(1)) - 1;
    let fastest = problem.topology.local.bandwidth.max(problem.topology.remote.bandwidth);
    // Every shard of replica 0 exchanges what it owns; the busiest has its share at least.
    computing + (params * (2 * others)) / fastest / f64::from(problem.n_shards.max(1))
}
