//! The first planner: dynamic programming over a cost-ordered coarsening, then a search around its borders.
//!
//! Coordinates ([`super::coordinate`]) turn the graph into a line. The line is coarsened into parts of equal work, each
//! border put where the fewest bytes cross. Contiguous ranges of parts are given to shards so that the slowest shard is
//! as fast as possible, then, among plans within a few percent of that, the fewest bytes travel. Borders are then moved
//! as long as the simulated step gets faster.

use std::collections::BTreeMap;

use super::coordinate::{Coordinates, coordinates};
use super::predict::{Costs, Prediction, predict};
use super::problem::{Infeasible, Problem};
use super::{Assignment, Place, Plan, ShardId, ShardPlan};
use crate::graph::{GradGraph, Graph, Model, OpId};
use crate::topology::{Device, DeviceId, Topology, kinds};
use crate::units::{Bytes, Seconds};

/// Most parts the line is coarsened into.
const PARTS: usize = 384;
/// A plan this much slower than the best may win by sending less.
const SLACK: f64 = 1.03;
/// Ops that all tries of the search look at together: each try cuts the whole model. Small models are searched to the
/// end, of large ones the time stays in proportion to their size.
const SEARCHED: usize = 1_500_000;
/// With fewer tries than this a model is large: then a plan in force is where the next one begins.
const FEW_TRIES: usize = 32;
/// The plan in force stays unless another is this much faster.
const GAIN: f64 = 0.99;

/// Finds a plan.
///
/// `previous` is kept when it solves the same problem nearly as well: the same problem asked twice gives the same
/// assignment. Of a large model it is also where the search begins, and ends once borders are found anew.
///
/// # Errors
/// [`Infeasible`], with the limit met and the way out.
/// # Complexity
/// O(ops · log ops + parts² · shards) for each microbatch size, plus the search: O(ops) for each border moved, with a
/// bound on their product.
/// # Source
/// Linear partition by dynamic programming, as in PipeDream (Narayanan et al., SOSP 2019).
pub fn solve(problem: &Problem<'_>, previous: Option<&Plan>) -> Result<Plan, Infeasible> {
    problem.check_devices()?;
    let (n_shards, n_devices) = (problem.n_shards, problem.topology.devices.len());
    let costs = Costs::of(problem.model);
    let usable = problem.microbatches()?;
    let fits = |previous: &&Plan| {
        previous.model == problem.model.fingerprint
            && previous.shards.len() == n_shards as usize
            && previous.n_replicas == problem.n_replicas
            && previous.schedule == problem.schedule
            && problem.microbatch.is_none_or(|m| m == previous.microbatch)
            && previous.shards.iter().flat_map(|s| &s.devices).all(|d| d.index() < n_devices)
    };
    let kept = previous.filter(fits).and_then(|previous| repredict(problem, previous, &costs));
    let mut best: Option<Plan> = None;
    let mut refusal = None;
    for (microbatch, variants) in &usable {
        let n_ops = variants.iter().map(|v| v.graph.n_ops()).sum::<usize>() + problem.model.update.n_ops();
        // Of a large model only the borders are moved: devices keep their order, microbatches their size.
        let near = kept.as_ref().filter(|_| SEARCHED / n_ops.max(1) < FEW_TRIES);
        if near.is_some_and(|kept| kept.microbatch != *microbatch) {
            continue;
        }
        let order = near.and_then(order_within_replica);
        let found =
            Line::new(problem, variants, &costs).and_then(|line| line.solve(problem, *microbatch, variants, order));
        match found {
            Ok(plan) if best.as_ref().is_none_or(|b| plan.step_time.0 < b.step_time.0) => best = Some(plan),
            Ok(_) => {}
            Err(e) => refusal = Some(e),
        }
    }
    match (best, kept) {
        (Some(plan), Some(kept)) if plan.step_time.0 < GAIN * kept.step_time.0 => {
            Ok(Plan { revision: kept.revision + 1, ..plan })
        }
        (_, Some(kept)) => Ok(kept),
        (Some(plan), None) => Ok(Plan { revision: previous.map_or(0, |p| p.revision + 1), ..plan }),
        (None, None) => Err(refusal.unwrap_or(Infeasible::TooFewOps { n_shards, n_parts: 0 })),
    }
}

/// An earlier plan under today's devices; `None` when it no longer fits.
fn repredict(problem: &Problem<'_>, previous: &Plan, costs: &Costs) -> Option<Plan> {
    let (grads, owners) = (previous.grads.clone(), previous.owners.clone());
    let plan = finish(problem, previous.microbatch, grads, owners, &order_of(previous), costs)?;
    let plan = Plan { revision: previous.revision, ..plan };
    check_memory(problem, &plan).ok().map(|()| plan)
}

/// Position within a replica of the device that runs each shard; `None` where a replica is no run of devices.
fn order_within_replica(plan: &Plan) -> Option<Vec<usize>> {
    let order: Vec<usize> = plan.shards.iter().filter_map(|s| Some(s.devices.first()?.index())).collect();
    let mut sorted = order.clone();
    sorted.sort_unstable();
    sorted.into_iter().eq(0..plan.shards.len()).then_some(order)
}

fn order_of(plan: &Plan) -> Vec<Vec<DeviceId>> {
    plan.shards.iter().map(|s| s.devices.clone()).collect()
}

/// The model as a line of parts.
pub(super) struct Line<'a> {
    costs: &'a Costs,
    /// By variant.
    pub coordinates: Vec<Coordinates>,
    /// The largest variant: it shapes the line.
    main: usize,
    /// Coordinates where parts begin; the first is 0.
    begins: Vec<u32>,
    /// Work before each border (begins, then the end), for each kind of device in the topology.
    work: Vec<Vec<Seconds>>,
    /// Kind of each device.
    kind: Vec<usize>,
    /// Bytes that cross each border, for one microbatch.
    crossing: Vec<Bytes>,
    /// Params, slots and gradients before each border.
    state: Vec<Bytes>,
    /// Residuals of one microbatch before each border.
    residuals: Vec<Bytes>,
}

impl<'a> Line<'a> {
    pub(super) fn new(problem: &Problem<'_>, variants: &[&GradGraph], known: &'a Costs) -> Result<Self, Infeasible> {
        let model = problem.model;
        let all: Vec<Coordinates> = variants
            .iter()
            .map(|v| coordinates(&v.graph, model.n_params, model.n_scalars(), &known.grads[&v.name]))
            .collect();
        // The largest variant shapes the line; the others follow its borders by fraction of their own work.
        let main = main_variant(variants);
        let (coordinates, costs) = (&all[main], &known.grads[&variants[main].name]);
        let graph = &variants[main].graph;
        let n = coordinates.n as usize;
        let reference = &problem.topology.devices[0];
        let mut work = vec![0.0; n];
        for (id, _) in graph.ops() {
            if let Some(at) = coordinates.of[id.index()] {
                work[at as usize] += costs[id.index()].time(reference).0;
            }
        }
        let crossing = crossing(graph, coordinates);
        let begins = coarsen(&work, &crossing, problem.n_shards as usize);
        if begins.len() < problem.n_shards as usize {
            return Err(Infeasible::TooFewOps { n_shards: problem.n_shards, n_parts: begins.len() });
        }
        let at_borders = |by_coordinate: &[f64]| {
            let mut sums = Vec::with_capacity(begins.len() + 1);
            let (mut sum, mut next) = (0.0, 0);
            for (i, w) in by_coordinate.iter().enumerate() {
                if begins.get(next) == Some(&(i as u32)) {
                    sums.push(sum);
                    next += 1;
                }
                sum += w;
            }
            sums.push(sum);
            sums
        };
        let (devices, kind) = kinds(&problem.topology.devices);
        let work = devices
            .into_iter()
            .map(|device| {
                let mut by_coordinate = vec![0.0; n];
                for (id, _) in graph.ops() {
                    if let Some(at) = coordinates.of[id.index()] {
                        by_coordinate[at as usize] += costs[id.index()].time(device).0;
                    }
                }
                at_borders(&by_coordinate).into_iter().map(Seconds).collect()
            })
            .collect();
        let (mut state, mut residuals) = (vec![0.0; n], vec![0.0; n]);
        let param_at = |p: usize| coordinates.of[graph.parameters()[p].index()].unwrap_or(0) as usize;
        for (i, tensor) in model.state.iter().enumerate() {
            match tensor.param {
                _ if i < model.n_params => state[param_at(i)] += 2.0 * tensor.shape.bytes().0 as f64,
                Some(p) => state[param_at(p)] += tensor.shape.bytes().0 as f64,
                None => {}
            }
        }
        for (id, op) in graph.ops() {
            let Some(at) = coordinates.of[id.index()].filter(|_| coordinates.forward[id.index()]) else { continue };
            let kept = graph.users(id).iter().any(|u| !coordinates.forward[u.index()]);
            if kept && &*op.opcode != "parameter" {
                residuals[at as usize] += op.shape.bytes().0 as f64;
            }
        }
        let bytes = |v: Vec<f64>| v.into_iter().map(|b| Bytes(b as u64)).collect();
        let (state, residuals) = (bytes(at_borders(&state)), bytes(at_borders(&residuals)));
        let crossing = begins.iter().map(|&b| crossing[b as usize]).collect();
        Ok(Self { costs: known, coordinates: all, main, begins, work, kind, crossing, state, residuals })
    }

    /// `order`: devices by shard, where only the borders are to be found.
    fn solve(
        &self,
        problem: &Problem<'_>,
        microbatch: u64,
        variants: &[&GradGraph],
        order: Option<Vec<usize>>,
    ) -> Result<Plan, Infeasible> {
        let search = order.is_none();
        let mut best: Option<(Plan, Vec<usize>, Vec<usize>)> = None;
        let mut refusal = None;
        for order in order.map_or_else(|| device_orders(problem), |order| vec![order]) {
            let Some(borders) = self.partition(problem, &order) else { continue };
            match self.plan(problem, microbatch, variants, &self.cuts(&borders), &order) {
                Ok(plan) => {
                    if best.as_ref().is_none_or(|(b, ..)| plan.step_time.0 < b.step_time.0) {
                        best = Some((plan, borders, order));
                    }
                }
                Err(e) => refusal = Some(e),
            }
        }
        let Some((plan, borders, order)) = best else {
            return Err(refusal.unwrap_or_else(|| self.too_large(problem)));
        };
        Ok(if search { self.search(problem, microbatch, variants, plan, borders, &order) } else { plan })
    }

    /// Moves borders while the simulated step gets faster.
    fn search(
        &self,
        problem: &Problem<'_>,
        microbatch: u64,
        variants: &[&GradGraph],
        mut best: Plan,
        mut borders: Vec<usize>,
        order: &[usize],
    ) -> Plan {
        let n_ops = variants.iter().map(|v| v.graph.n_ops()).sum::<usize>() + problem.model.update.n_ops();
        let mut tries = SEARCHED / n_ops.max(1);
        let mut stride = (self.begins.len() / (4 * problem.n_shards as usize)).clamp(1, 16);
        loop {
            let mut moved = false;
            for i in 0..borders.len() {
                for up in [true, false] {
                    let low = if i == 0 { 0 } else { borders[i - 1] };
                    let high = borders.get(i + 1).copied().unwrap_or(self.begins.len());
                    let to = if up { borders[i] + stride } else { borders[i].wrapping_sub(stride) };
                    if to <= low || to >= high {
                        continue;
                    }
                    let Some(left) = tries.checked_sub(1) else { return best };
                    tries = left;
                    let mut tried = borders.clone();
                    tried[i] = to;
                    if let Ok(plan) = self.plan(problem, microbatch, variants, &self.cuts(&tried), order)
                        && plan.step_time.0 < 0.999 * best.step_time.0
                    {
                        (best, borders, moved) = (plan, tried, true);
                    }
                }
            }
            if !moved && stride == 1 {
                return best;
            }
            if !moved {
                stride /= 2;
            }
        }
    }

    /// Borders (positions in `begins`) between shards; `None` when no range fits its device.
    ///
    /// `order[s]`: position within a replica of the device that runs shard s.
    fn partition(&self, problem: &Problem<'_>, order: &[usize]) -> Option<Vec<usize>> {
        let n = self.begins.len();
        let n_shards = problem.n_shards as usize;
        let link = problem.topology.local;
        let in_flight = |s: usize| match problem.schedule {
            super::ScheduleKind::OneFOneB => (n_shards - s) as u64,
            super::ScheduleKind::GPipe => u64::MAX,
        };
        let work = |s: usize| &self.work[self.kind[order[s]]];
        let stage = |s: usize, from: usize, to: usize| -> Option<Seconds> {
            let device = &problem.topology.devices[order[s]];
            let residuals = (self.residuals[to] - self.residuals[from]) * in_flight(s).min(8);
            if self.state[to] - self.state[from] + residuals > device.memory {
                return None;
            }
            let computing = work(s)[to] - work(s)[from];
            let inlet = if from > 0 { link.time(self.crossing[from]) } else { Seconds(0.0) };
            let outlet = if to < n { link.time(self.crossing[to]) } else { Seconds(0.0) };
            Some(computing + inlet + outlet)
        };
        // Stages that compute longer than a limit need not be looked at; where that leaves none, the limit rises.
        let most = (0..n_shards).map(|s| work(s)[n].0).fold(0.0, f64::max);
        let mut limit = 2.0 / (0..n_shards).map(|s| 1.0 / work(s)[n].0.max(f64::MIN_POSITIVE)).sum::<f64>();
        let bottleneck = loop {
            let first = |s: usize, to: usize| work(s)[..to].partition_point(|w| work(s)[to].0 - w.0 > limit);
            let found = self.sweep(n_shards, &first, &stage, &|worst, time, _| worst.max(time));
            match found {
                Some((value, _)) if value.0 <= limit => break value,
                _ if limit < most => limit *= 2.0,
                found => break found?.0,
            }
        };
        let limit = bottleneck.0 * SLACK;
        let first = |s: usize, to: usize| work(s)[..to].partition_point(|w| work(s)[to].0 - w.0 > limit);
        let within = |s: usize, from: usize, to: usize| stage(s, from, to).filter(|t| t.0 <= limit);
        let fewest = self.sweep(n_shards, &first, &within, &|sum, _, border| {
            sum + Seconds(if border > 0 { self.crossing[border].0 as f64 } else { 0.0 })
        })?;
        Some(fewest.1)
    }

    /// The dynamic program: best value over the first parts with the first shards. `first`: where a stage of a shard
    /// that ends at a border can begin at the earliest.
    fn sweep(
        &self,
        n_shards: usize,
        first: &dyn Fn(usize, usize) -> usize,
        stage: &dyn Fn(usize, usize, usize) -> Option<Seconds>,
        combine: &dyn Fn(Seconds, Seconds, usize) -> Seconds,
    ) -> Option<(Seconds, Vec<usize>)> {
        let n = self.begins.len();
        let mut best: Vec<Vec<Option<(Seconds, usize)>>> = vec![vec![None; n + 1]; n_shards + 1];
        best[0][0] = Some((Seconds(0.0), 0));
        for s in 0..n_shards {
            for to in s + 1..=n - (n_shards - s - 1) {
                for from in first(s, to).max(s)..to {
                    let Some((so_far, _)) = best[s][from] else { continue };
                    let Some(time) = stage(s, from, to) else { continue };
                    let value = combine(so_far, time, from);
                    if best[s + 1][to].is_none_or(|(b, _)| value.0 < b.0) {
                        best[s + 1][to] = Some((value, from));
                    }
                }
            }
        }
        let (value, _) = best[n_shards][n]?;
        let mut borders = Vec::with_capacity(n_shards - 1);
        let mut to = n;
        for s in (1..=n_shards).rev() {
            to = best[s][to]?.1;
            if s > 1 {
                borders.push(to);
            }
        }
        borders.reverse();
        Some((value, borders))
    }

    /// No partition fits: says by how much, for an even split.
    fn too_large(&self, problem: &Problem<'_>) -> Infeasible {
        let device = &problem.topology.devices[0];
        let largest = problem.topology.devices.iter().max_by_key(|d| d.memory).unwrap_or(device);
        let total = self.state.last().copied().unwrap_or_default() + self.residuals.last().copied().unwrap_or_default();
        let needs = Bytes(total.0 / u64::from(problem.n_shards));
        let (device, has) = (largest.name.clone(), largest.memory);
        Infeasible::Memory { shard: 0, n_shards: problem.n_shards, needs: needs.max(has + Bytes(1)), device, has }
    }

    /// Coordinates at which shards begin, by variant; those of other variants than the main one by fraction.
    fn cuts(&self, borders: &[usize]) -> Vec<Vec<u32>> {
        let n_main = f64::from(self.coordinates[self.main].n);
        let of = |line: &Coordinates| {
            let scale = f64::from(line.n) / n_main;
            borders.iter().map(|&b| (f64::from(self.begins[b]) * scale).round() as u32).collect()
        };
        self.coordinates.iter().map(of).collect()
    }

    /// The plan whose shards begin at `cuts`, by variant.
    pub(super) fn plan(
        &self,
        problem: &Problem<'_>,
        microbatch: u64,
        variants: &[&GradGraph],
        cuts: &[Vec<u32>],
        order: &[usize],
    ) -> Result<Plan, Infeasible> {
        let main = self.main;
        // Owners by the main variant; the others use the same owners.
        let model = problem.model;
        let shard_of = |cuts: &[u32], at: u32| ShardId(cuts.partition_point(|&c| c <= at) as u32);
        let main_graph = &variants[main].graph;
        let param_owner = |p: usize| {
            shard_of(&cuts[main], self.coordinates[main].of[main_graph.parameters()[p].index()].unwrap_or(0))
        };
        let owners: Vec<Place> = (0..model.state.len())
            .map(|i| match model.state[i].param {
                _ if i < model.n_params => Place::Shard(param_owner(i)),
                Some(p) => Place::Shard(param_owner(p)),
                None => Place::Everywhere,
            })
            .collect();
        let mut grads = BTreeMap::new();
        for ((variant, coordinates), cuts) in variants.iter().zip(&self.coordinates).zip(cuts) {
            let mut places: Vec<Place> = coordinates
                .of
                .iter()
                .map(|at| at.map_or(Place::Everywhere, |at| Place::Shard(shard_of(cuts, at))))
                .collect();
            settle(model, &variant.graph, &owners, &mut places);
            grads.insert(variant.name.clone(), Assignment(places));
        }
        let n = problem.n_shards as usize;
        let devices: Vec<Vec<DeviceId>> = (0..n)
            .map(|s| (0..problem.n_replicas as usize).map(|r| DeviceId((r * n + order[s]) as u32)).collect())
            .collect();
        let plan = finish(problem, microbatch, grads, owners, &devices, self.costs)
            .ok_or(Infeasible::TooFewOps { n_shards: problem.n_shards, n_parts: self.begins.len() })?;
        check_memory(problem, &plan)?;
        Ok(plan)
    }
}

/// Puts params and the ops that make their gradients on the owner, and elements with their tuples.
fn settle(model: &Model, graph: &Graph, owners: &[Place], places: &mut [Place]) {
    for (p, &op) in graph.parameters()[..model.n_params].iter().enumerate() {
        places[op.index()] = owners[p];
    }
    let n_scalars = graph.outputs().len() - model.n_params;
    for (p, &op) in graph.outputs()[n_scalars..].iter().enumerate() {
        let array_op = !matches!(&*graph.op(op).opcode, "parameter" | "get-tuple-element");
        if array_op && places[op.index()] != Place::Everywhere && graph.users(op).is_empty() {
            places[op.index()] = owners[p];
        }
    }
    for (id, op) in graph.ops() {
        if &*op.opcode == "get-tuple-element" {
            places[id.index()] = places[op.operands[0].index()];
        }
    }
    // Values that cannot travel stay where they are made.
    for (id, op) in graph.ops() {
        for &o in &op.operands {
            let stuck = graph.op(o).shape.as_array().is_none() && places[o.index()] != Place::Everywhere;
            if stuck && !matches!(&*op.opcode, "get-tuple-element") {
                places[id.index()] = places[o.index()];
            }
        }
    }
}

/// A plan from its assignments: orders and predictions. `None` when a shard would be empty.
fn finish(
    problem: &Problem<'_>,
    microbatch: u64,
    grads: BTreeMap<String, Assignment>,
    owners: Vec<Place>,
    devices: &[Vec<DeviceId>],
    costs: &Costs,
) -> Option<Plan> {
    let per_replica = problem.model.manifest.batch_size / microbatch / u64::from(problem.n_replicas);
    let mut plan = Plan {
        revision: 0,
        model: problem.model.fingerprint.clone(),
        microbatch,
        shards: devices
            .iter()
            .map(|d| ShardPlan { devices: d.clone(), busy: Seconds(0.0), memory: Bytes(0), sent: Bytes(0) })
            .collect(),
        n_replicas: problem.n_replicas,
        n_microbatches: u32::try_from(per_replica).ok()?,
        grads,
        owners,
        schedule: problem.schedule,
        orders: BTreeMap::new(),
        step_time: Seconds(0.0),
        bound: Seconds(0.0),
        bytes_cut: Bytes(0),
    };
    let Prediction { orders, busy, memory, sent, step_time, bound } =
        predict(problem.model, problem.topology, &plan, costs).ok()?;
    // A shard without work of its own is no shard.
    if busy.iter().any(|b| b.0 <= 0.0) {
        return None;
    }
    for (i, shard) in plan.shards.iter_mut().enumerate() {
        (shard.busy, shard.memory, shard.sent) = (busy[i], memory[i], sent[i]);
    }
    (plan.orders, plan.step_time, plan.bound) = (orders, step_time, bound);
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
                return Err(Infeasible::Memory { shard: i as u32, n_shards, needs: shard.memory, device, has });
            }
        }
    }
    Ok(())
}

fn main_variant(variants: &[&GradGraph]) -> usize {
    let size = |v: &GradGraph| v.batch.iter().map(|b| b.array().n_elements()).sum::<u64>();
    (0..variants.len()).max_by_key(|&i| (size(variants[i]), std::cmp::Reverse(i))).unwrap_or(0)
}

/// Bytes that cross each coordinate, forward and backward, for one microbatch.
fn crossing(graph: &Graph, coordinates: &Coordinates) -> Vec<Bytes> {
    let mut difference = vec![0i64; coordinates.n as usize + 1];
    for (id, op) in graph.ops() {
        let Some(at) = coordinates.of[id.index()] else { continue };
        let users = || graph.users(id).iter().filter_map(|u| coordinates.of[u.index()]);
        let bytes = i64::try_from(op.shape.bytes().0).unwrap_or(i64::MAX / 4);
        // A param crosses once per step at most, not per microbatch; it counts for little.
        let bytes = if &*op.opcode == "parameter" { bytes / 8 } else { bytes };
        let (first, last) = (users().min().unwrap_or(at), users().max().unwrap_or(at));
        if last > at {
            difference[at as usize + 1] += bytes;
            difference[last as usize + 1] -= bytes;
        }
        if first < at {
            difference[first as usize + 1] += bytes;
            difference[at as usize + 1] -= bytes;
        }
    }
    let mut sum = 0;
    difference
        .into_iter()
        .map(|d| {
            sum += d;
            Bytes(sum.max(0) as u64)
        })
        .collect()
}

/// Parts of about equal work, each beginning where the fewest bytes cross.
fn coarsen(work: &[f64], crossing: &[Bytes], n_shards: usize) -> Vec<u32> {
    let n_parts = PARTS.max(4 * n_shards);
    if work.len() <= n_parts {
        return (0..work.len() as u32).collect();
    }
    let total: f64 = work.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let mut begins = vec![0u32];
    let mut sum = 0.0;
    let mut best: Option<(Bytes, u32)> = None;
    let mut bucket = 0;
    for (i, w) in work.iter().enumerate() {
        let in_bucket = (sum / total * n_parts as f64) as usize;
        if in_bucket > bucket {
            if let Some((_, at)) = best.take() {
                begins.push(at);
            }
            bucket = in_bucket;
        }
        if i > 0 && best.is_none_or(|(b, _)| crossing[i] < b) {
            best = Some((crossing[i], i as u32));
        }
        sum += w;
    }
    begins.extend(best.map(|(_, at)| at));
    begins.dedup();
    begins
}

/// Devices whose measured figures differ by no more than this share are taken for equals: it is less than they vary by.
const ALIKE: f64 = 0.03;

/// Orders of a replica's devices worth trying.
pub(super) fn device_orders(problem: &Problem<'_>) -> Vec<Vec<usize>> {
    let n = problem.n_shards as usize;
    let devices: &[Device] = &problem.topology.devices[..n];
    let identity: Vec<usize> = (0..n).collect();
    let near = |a: f64, b: f64| (a - b).abs() <= ALIKE * a.abs().max(b.abs());
    let alike = |a: &Device, b: &Device| {
        let (m, n) = (a.measured.unwrap_or_default(), b.measured.unwrap_or_default());
        a.kind == b.kind
            && a.memory == b.memory
            && near((a.flops * a.speed).0 / m.product, (b.flops * b.speed).0 / n.product)
            && near(a.bandwidth.0 * a.speed / m.memory, b.bandwidth.0 * b.speed / n.memory)
    };
    if devices.iter().all(|d| alike(d, &devices[0])) {
        return vec![identity];
    }
    if n <= 4 {
        return permutations(n);
    }
    let mut by_speed = identity.clone();
    by_speed
        .sort_by(|&a, &b| (devices[b].flops * devices[b].speed).0.total_cmp(&(devices[a].flops * devices[a].speed).0));
    let mut reversed = by_speed.clone();
    reversed.reverse();
    vec![identity, by_speed, reversed]
}

fn permutations(n: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for _ in 0..n {
        all = all
            .into_iter()
            .flat_map(|p: Vec<usize>| {
                (0..n).filter(|i| !p.contains(i)).map(|i| [p.clone(), vec![i]].concat()).collect::<Vec<_>>()
            })
            .collect();
    }
    all
}

/// A topology of equal devices on one node, for tests and quick questions.
pub fn even_topology(n: usize, device: &Device, link: crate::topology::Link) -> Topology {
    let devices = (0..n).map(|i| Device { name: format!("{}{i}", device.name), ..device.clone() }).collect();
    Topology { devices, local: link, remote: link }
}

/// Ops of a graph on one shard.
pub fn ops_on(assignment: &Assignment, shard: ShardId) -> impl Iterator<Item = OpId> {
    assignment.0.iter().enumerate().filter(move |(_, p)| **p == Place::Shard(shard)).map(|(i, _)| OpId(i as u32))
}
