//! What a plan will do: orders, times, memory and traffic, from the cost model alone.

use std::collections::BTreeMap;

use super::estimate::{segment_terms, update_cut};
use super::schedule::TaskGraph;
use super::segment::{Parameters, Segment, SegmentError, Segmentation};
use super::{Place, Plan, ShardId, Task};
use crate::cost::{self, OpCost};
use crate::graph::{Graph, Model};
use crate::topology::{Device, Topology, kinds};
use crate::units::{Bytes, Seconds};

/// Predictions for a plan; by shard where there are several.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    pub orders: BTreeMap<String, Vec<Vec<Task>>>,
    /// Per step, without waiting; of the slowest variant.
    pub busy: Vec<Seconds>,
    pub memory: Vec<Bytes>,
    /// Per step and replica.
    pub sent: Vec<Bytes>,
    pub step_time: Seconds,
    /// All work spread evenly over all devices, without any traffic: nothing is faster.
    pub bound: Seconds,
}

/// What every op of a model costs: for callers that predict one plan after the other.
#[derive(Clone, Debug)]
pub struct Costs {
    /// By variant.
    pub grads: BTreeMap<String, Vec<OpCost>>,
    pub update: Vec<OpCost>,
}

impl Costs {
    pub fn of(model: &Model) -> Self {
        let grads = model.grads.iter().map(|g| (g.name.clone(), cost::of_graph(&g.graph))).collect();
        Self { grads, update: cost::of_graph(&model.update) }
    }
}

/// Simulates one step of `plan`.
///
/// # Units
/// Times are those of the slowest replica; a step of several variants takes the slowest one's time.
/// # Complexity
/// O(ops · log ops + tasks).
pub fn predict(model: &Model, topology: &Topology, plan: &Plan, known: &Costs) -> Result<Prediction, SegmentError> {
    let n_shards = plan.shards.len();
    // A shard is as fast as its slowest replica.
    let device = |s: usize| -> &Device {
        let of = plan.shards[s].devices.iter().map(|d| &topology.devices[d.index()]);
        of.min_by(|a, b| (a.flops * a.speed).0.total_cmp(&(b.flops * b.speed).0)).expect("a shard has a device")
    };
    let devices: Vec<&Device> = (0..n_shards).map(device).collect();
    let link = |a: ShardId, b: ShardId| {
        let id = |s: ShardId| plan.shards[s.index()].devices[0];
        topology.link(id(a), id(b))
    };
    let (of_each_kind, _) = kinds(devices.iter().copied());
    let m = plan.n_microbatches;
    let mut out = Prediction {
        orders: BTreeMap::new(),
        busy: vec![Seconds(0.0); n_shards],
        memory: vec![Bytes(0); n_shards],
        sent: vec![Bytes(0); n_shards],
        step_time: Seconds(0.0),
        bound: Seconds(0.0),
    };
    let mut mirrored: BTreeMap<(usize, ShardId), Bytes> = BTreeMap::new();
    for (variant, assignment) in &plan.grads {
        let (Some(grad), Some(costs)) = (model.variant(variant), known.grads.get(variant)) else { continue };
        let graph = &grad.graph;
        let results = plan.grad_results(model, graph, assignment);
        let cut = Segmentation::new(graph, assignment, &results, n_shards, Parameters::Mirrored)?;
        for (op, reader) in cut.mirrors(graph, assignment) {
            // Parameters stand in ascending order.
            if let Ok(param) = graph.parameters().binary_search(&op) {
                mirrored.insert((param, reader), graph.op(op).shape.bytes());
            }
        }
        let sums = m > 1;
        let durations: Vec<Seconds> =
            cut.segments.iter().map(|s| time(graph, s, costs, devices[s.shard.index()], sums)).collect();
        let bytes: Vec<Bytes> = (0..cut.messages.len()).map(|i| cut.bytes(graph, i)).collect();
        let tasks = TaskGraph::new(graph, &cut, n_shards, &durations, |i, message| {
            link(cut.segments[message.from].shard, message.to).time(bytes[i])
        });
        let schedule = tasks.schedule(plan.schedule, m);
        let (mut busy, mut sent) = (vec![Seconds(0.0); n_shards], vec![Bytes(0); n_shards]);
        for (segment, duration) in cut.segments.iter().zip(&durations) {
            busy[segment.shard.index()] += *duration * f64::from(m);
        }
        for (message, bytes) in cut.messages.iter().zip(&bytes) {
            sent[cut.segments[message.from].shard.index()] += *bytes * u64::from(m);
        }
        let placed: Seconds = graph
            .ops()
            .filter(|(id, _)| assignment.place(*id) != Place::Everywhere)
            .map(|(id, _)| {
                of_each_kind.iter().map(|d| costs[id.index()].time(d)).fold(Seconds(f64::INFINITY), Seconds::min)
            })
            .sum();
        out.bound = out.bound.max(placed * f64::from(m) / n_shards as f64);
        out.step_time = out.step_time.max(schedule.makespan);
        for s in 0..n_shards {
            out.busy[s] = out.busy[s].max(busy[s]);
            out.sent[s] = out.sent[s].max(sent[s]);
            let residuals = residual_peak(graph, &cut, &schedule.orders[s]);
            let transient = cut.of_shard(ShardId(s as u32)).map(|(_, seg)| transient(graph, &seg.ops)).max();
            out.memory[s] = out.memory[s].max(residuals + transient.unwrap_or_default());
        }
        out.orders.insert(variant.clone(), schedule.orders);
    }
    add_state(model, plan, &mirrored, &mut out);
    let update = update_time(model, plan, &devices, &known.update, &mut out)?;
    let averaging = average_time(model, plan, topology);
    out.step_time = out.step_time + update + averaging;
    Ok(out)
}

fn time(graph: &Graph, segment: &Segment, costs: &[OpCost], device: &Device, sums: bool) -> Seconds {
    segment_terms(graph, segment, costs, device, sums).time(&device.measured.unwrap_or_default())
}

/// Params, slots, gradient sums and copies of others' params.
fn add_state(model: &Model, plan: &Plan, mirrored: &BTreeMap<(usize, ShardId), Bytes>, out: &mut Prediction) {
    for (i, tensor) in model.state.iter().enumerate() {
        let bytes = tensor.shape.bytes();
        // A param's gradient is kept beside it, in at least single precision.
        let gradient = if i < model.n_params {
            Bytes(tensor.shape.n_elements() * tensor.shape.dtype.size().max(4))
        } else {
            Bytes(0)
        };
        match plan.owners[i] {
            Place::Shard(s) => out.memory[s.index()] += bytes + gradient,
            Place::Everywhere => out.memory.iter_mut().for_each(|m| *m += bytes),
        }
    }
    for (&(param, reader), &bytes) in mirrored {
        out.memory[reader.index()] += bytes;
        if let Place::Shard(owner) = plan.owners[param] {
            out.sent[owner.index()] += bytes;
        }
    }
}

/// Time of the update: as long as the shard with the most to update, plus its exchanges.
fn update_time(
    model: &Model,
    plan: &Plan,
    devices: &[&Device],
    costs: &[OpCost],
    out: &mut Prediction,
) -> Result<Seconds, SegmentError> {
    let graph = &model.update;
    let cut = update_cut(model, plan)?;
    let mut busy = vec![Seconds(0.0); devices.len()];
    for segment in &cut.segments {
        busy[segment.shard.index()] += time(graph, segment, costs, devices[segment.shard.index()], false);
    }
    for (i, message) in cut.messages.iter().enumerate() {
        out.sent[cut.segments[message.from].shard.index()] += cut.bytes(graph, i);
    }
    for (sum, update) in out.busy.iter_mut().zip(&busy) {
        *sum += *update;
    }
    Ok(busy.into_iter().fold(Seconds(0.0), Seconds::max))
}

/// Gradients go to replica 0 and back.
pub(super) fn average_time(model: &Model, plan: &Plan, topology: &Topology) -> Seconds {
    let others = u64::from(plan.n_replicas) - 1;
    let of_shard = |s: usize| {
        let owned = (0..model.n_params).filter(|&p| plan.owners[p] == Place::Shard(ShardId(s as u32)));
        let bytes: Bytes = owned.map(|p| model.state[p].shape.bytes()).sum();
        let devices = &plan.shards[s].devices;
        let link = devices.get(1).map(|&d| topology.link(devices[0], d));
        link.map_or(Seconds(0.0), |l| l.time(bytes * (2 * others)))
    };
    (0..plan.shards.len()).map(of_shard).fold(Seconds(0.0), Seconds::max)
}

/// Most bytes a shard keeps between its segments, by its order.
fn residual_peak(graph: &Graph, cut: &Segmentation, order: &[Task]) -> Bytes {
    let Some(first) = order.first() else { return Bytes(0) };
    let shard = cut.segments[first.segment as usize].shard;
    let mut n_readers: BTreeMap<crate::graph::OpId, u32> = BTreeMap::new();
    for (_, segment) in cut.of_shard(shard) {
        for &v in &segment.inputs {
            *n_readers.entry(v).or_default() += 1;
        }
    }
    let is_parameter = |v| &*graph.op(v).opcode == "parameter";
    let mut alive: BTreeMap<(u32, crate::graph::OpId), u32> = BTreeMap::new();
    let (mut now, mut peak) = (Bytes(0), Bytes(0));
    for task in order {
        let segment = &cut.segments[task.segment as usize];
        for &v in segment.inputs.iter().chain(&segment.outputs) {
            let readers = n_readers.get(&v).copied().unwrap_or(0);
            if readers > 0 && !is_parameter(v) && !alive.contains_key(&(task.microbatch, v)) {
                alive.insert((task.microbatch, v), readers);
                now += graph.op(v).shape.bytes();
            }
        }
        peak = peak.max(now);
        for &v in &segment.inputs {
            if let Some(left) = alive.get_mut(&(task.microbatch, v)) {
                *left -= 1;
                if *left == 0 {
                    now = now - graph.op(v).shape.bytes();
                }
            }
        }
    }
    peak
}

/// Most bytes alive at once inside a segment (`ops` ascending), if every op wrote its result; fusion makes it less.
fn transient(graph: &Graph, ops: &[crate::graph::OpId]) -> Bytes {
    // By position in `ops`: the last reader, and what is freed after it.
    let mut last = vec![None; ops.len()];
    for (i, &op) in ops.iter().enumerate() {
        for o in &graph.op(op).operands {
            if let Ok(at) = ops.binary_search(o) {
                last[at] = Some(i);
            }
        }
    }
    let mut freed = vec![Bytes(0); ops.len()];
    let (mut now, mut peak) = (Bytes(0), Bytes(0));
    for (i, &id) in ops.iter().enumerate() {
        let op = graph.op(id);
        let free = matches!(
            &*op.opcode,
            "constant" | "iota" | "broadcast" | "tuple" | "get-tuple-element" | "reshape" | "bitcast"
        );
        if let (false, Some(end)) = (free, last[i]) {
            now += op.shape.bytes();
            freed[end] += op.shape.bytes();
        }
        peak = peak.max(now);
        now = now - freed[i];
    }
    peak
}
