//! What a plan will do: orders, times, memory and traffic, from the cost model alone.

use std::collections::BTreeMap;

use super::estimate::{segment_terms, update_cut};
use super::memory::{self, Memory};
use super::schedule::TaskGraph;
use super::segment::{Parameters, Segment, SegmentError, Segmentation};
use super::{Place, Plan, ShardId, ShardPlan, Task};
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
    pub memory: Vec<Memory>,
    /// Per step and replica.
    pub sent: Vec<Bytes>,
    pub step_time: Seconds,
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
    let devices = devices(topology, plan);
    let m = plan.n_microbatches;
    let mut out = Prediction {
        orders: BTreeMap::new(),
        busy: vec![Seconds(0.0); n_shards],
        memory: devices.iter().map(|d| Memory::of_process(d[0])).collect(),
        sent: vec![Bytes(0); n_shards],
        step_time: Seconds(0.0),
    };
    let mut mirrored: BTreeMap<(usize, ShardId), Bytes> = BTreeMap::new();
    for (variant, assignment) in &plan.grads {
        let Some(Timed { graph, cut, durations, tasks }) = timed(model, topology, plan, known, variant)? else {
            continue;
        };
        for (op, reader) in cut.mirrors(graph, assignment) {
            // Parameters stand in ascending order.
            if let Ok(param) = graph.parameters().binary_search(&op) {
                mirrored.insert((param, reader), graph.op(op).shape.bytes());
            }
        }
        let schedule = tasks.schedule(plan.schedule, m);
        let (mut busy, mut sent) = (vec![Seconds(0.0); n_shards], vec![Bytes(0); n_shards]);
        for (segment, duration) in cut.segments.iter().zip(&durations) {
            busy[segment.shard.index()] += *duration * f64::from(m);
        }
        for (i, message) in cut.messages.iter().enumerate() {
            sent[cut.segments[message.from].shard.index()] += cut.bytes(graph, i) * u64::from(m);
        }
        out.step_time = out.step_time.max(schedule.makespan);
        for s in 0..n_shards {
            out.busy[s] = out.busy[s].max(busy[s]);
            out.sent[s] = out.sent[s].max(sent[s]);
            out.memory[s].add_variant(graph, &cut, ShardId(s as u32), &schedule.orders[s]);
        }
        out.orders.insert(variant.clone(), schedule.orders);
    }
    memory::add_state(model, plan, &mut out.memory);
    for ((param, reader), bytes) in mirrored {
        out.memory[reader.index()].copies += bytes;
        if let Place::Shard(owner) = plan.owners[param] {
            out.sent[owner.index()] += bytes;
        }
    }
    let update = update_time(model, plan, &devices, &known.update, &mut out)?;
    let averaging = average_time(model, plan, topology);
    out.step_time = out.step_time + update + averaging;
    for (memory, devices) in out.memory.iter_mut().zip(&devices) {
        memory.add_free(devices);
    }
    Ok(out)
}

/// The devices of every shard, one of each kind: a shard is as fast as its slowest replica, in each segment.
pub(super) fn devices<'a>(topology: &'a Topology, plan: &Plan) -> Vec<Vec<&'a Device>> {
    let of = |shard: &ShardPlan| kinds(shard.devices.iter().map(|d| &topology.devices[d.index()])).0;
    plan.shards.iter().map(of).collect()
}

/// One variant of a plan, cut and timed.
pub(super) struct Timed<'a> {
    pub graph: &'a Graph,
    pub cut: Segmentation,
    /// Of one run of each segment.
    pub durations: Vec<Seconds>,
    pub tasks: TaskGraph,
}

/// Cuts and times one variant; `None` for one that the model does not have.
pub(super) fn timed<'a>(
    model: &'a Model,
    topology: &Topology,
    plan: &Plan,
    known: &Costs,
    variant: &str,
) -> Result<Option<Timed<'a>>, SegmentError> {
    let (Some(grad), Some(costs)) = (model.variant(variant), known.grads.get(variant)) else { return Ok(None) };
    let Some(assignment) = plan.grads.get(variant) else { return Ok(None) };
    let (graph, n_shards) = (&grad.graph, plan.shards.len());
    let results = plan.grad_results(model, graph, assignment);
    let cut = Segmentation::new(graph, assignment, &results, n_shards, Parameters::Mirrored)?;
    let devices = devices(topology, plan);
    let sums = plan.n_microbatches > 1;
    let durations: Vec<Seconds> =
        cut.segments.iter().map(|s| time(graph, s, costs, &devices[s.shard.index()], sums)).collect();
    let device = |s: ShardId| plan.shards[s.index()].devices[0];
    let tasks = TaskGraph::new(graph, &cut, n_shards, &durations, |i, message| {
        topology.link(device(cut.segments[message.from].shard), device(message.to)).time(cut.bytes(graph, i))
    });
    Ok(Some(Timed { graph, cut, durations, tasks }))
}

fn time(graph: &Graph, segment: &Segment, costs: &[OpCost], devices: &[&Device], sums: bool) -> Seconds {
    let on = |device: &&Device| {
        segment_terms(graph, segment, costs, device, sums).time(&device.measured.unwrap_or_default())
    };
    devices.iter().map(on).fold(Seconds(0.0), Seconds::max)
}

/// Time of the update: as long as the shard with the most to update; what it exchanges counts as sent.
fn update_time(
    model: &Model,
    plan: &Plan,
    devices: &[Vec<&Device>],
    costs: &[OpCost],
    out: &mut Prediction,
) -> Result<Seconds, SegmentError> {
    let graph = &model.update;
    let cut = update_cut(model, plan)?;
    for (i, message) in cut.messages.iter().enumerate() {
        out.sent[cut.segments[message.from].shard.index()] += cut.bytes(graph, i);
    }
    memory::add_update(graph, &cut, &mut out.memory);
    let busy = busy_updating(graph, &cut, devices, costs);
    for (sum, update) in out.busy.iter_mut().zip(&busy) {
        *sum += *update;
    }
    Ok(busy.into_iter().fold(Seconds(0.0), Seconds::max))
}

/// Time that each shard takes to update its params.
pub(super) fn update_busy(
    model: &Model,
    plan: &Plan,
    devices: &[Vec<&Device>],
    costs: &[OpCost],
) -> Result<Vec<Seconds>, SegmentError> {
    Ok(busy_updating(&model.update, &update_cut(model, plan)?, devices, costs))
}

fn busy_updating(graph: &Graph, cut: &Segmentation, devices: &[Vec<&Device>], costs: &[OpCost]) -> Vec<Seconds> {
    let mut busy = vec![Seconds(0.0); devices.len()];
    for segment in &cut.segments {
        busy[segment.shard.index()] += time(graph, segment, costs, &devices[segment.shard.index()], false);
    }
    busy
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
