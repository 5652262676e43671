//! What a plan will do: orders, times, memory and traffic, from the cost model alone.

use std::collections::BTreeMap;

use super::estimate::{segment_terms, update_cut};
use super::memory::{self, Memory, Residuals};
use super::schedule::TaskGraph;
use super::segment::{Dependency, Segment, SegmentError, Segmentation};
use super::traffic::Nics;
use super::{Place, Plan, ShardId, ShardPlan, Task};
use crate::cost::{self, OpCost};
use crate::graph::{Graph, Model};
use crate::profile::Terms;
use crate::topology::{Device, Rates, Topology, kinds};
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
    /// Whether it computes something again.
    pub recompute: Vec<bool>,
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
    Ok(Cuts::new(model, topology, plan, known, None)?.predict(model, topology, plan, known))
}

/// All graphs of a plan, cut: what a prediction needs of them, however fast devices and links are.
#[derive(Clone, Debug)]
pub(super) struct Cuts {
    /// By variant, without those that the model does not have.
    variants: Vec<(String, Cut, Flow)>,
    update: Cut,
    /// Params on other shards than their owners': param, reader, size.
    mirrored: Vec<(usize, ShardId, Bytes)>,
}

impl Cuts {
    /// Cuts the model. `like`: another plan's cuts of it, with which these may have segments in common.
    ///
    /// # Complexity
    /// O(ops · log ops).
    pub(super) fn new(
        model: &Model,
        topology: &Topology,
        plan: &Plan,
        known: &Costs,
        like: Option<&Self>,
    ) -> Result<Self, SegmentError> {
        let mut mirrored: BTreeMap<(usize, ShardId), Bytes> = BTreeMap::new();
        let mut variants = Vec::with_capacity(plan.grads.len());
        for (variant, assignment) in &plan.grads {
            let like = like.and_then(|like| Some(&like.variants.iter().find(|(name, ..)| name == variant)?.1));
            let Some((graph, cut)) = Cut::of_variant(model, topology, plan, known, variant, like)? else { continue };
            for (op, reader) in cut.segmentation.mirrors(graph, assignment) {
                // Parameters stand in ascending order.
                if let Ok(param) = graph.parameters().binary_search(&op) {
                    mirrored.insert((param, reader), graph.op(op).shape.bytes());
                }
            }
            let flow = Flow::new(graph, &cut.segmentation, plan.shards.len());
            variants.push((variant.clone(), cut, flow));
        }
        let (update, devices) = (update_cut(model, plan)?, devices(topology, plan));
        let like = like.map(|like| &like.update);
        let update = Cut::new(&model.update, update, &devices, &known.update, false, like);
        let mirrored = mirrored.into_iter().map(|((param, reader), bytes)| (param, reader, bytes)).collect();
        Ok(Self { variants, update, mirrored })
    }

    /// Simulates one step of the plan that these are the cuts of, by the fastest orders that devices have the memory for.
    pub(super) fn predict(&self, model: &Model, topology: &Topology, plan: &Plan, known: &Costs) -> Prediction {
        let n_shards = plan.shards.len();
        let devices = devices(topology, plan);
        let m = plan.n_microbatches;
        let mut out = Prediction {
            orders: BTreeMap::new(),
            busy: vec![Seconds(0.0); n_shards],
            memory: devices.iter().map(|d| Memory::of_process(d[0])).collect(),
            sent: vec![Bytes(0); n_shards],
            recompute: vec![false; n_shards],
            step_time: Seconds(0.0),
        };
        memory::add_state(model, plan, &mut out.memory);
        for &(_, reader, bytes) in &self.mirrored {
            out.memory[reader.index()].copies += bytes;
        }
        let alone = out.memory.clone();
        for (variant, cut, flow) in &self.variants {
            let (Some(grad), Some(costs)) = (model.variant(variant), known.grads.get(variant)) else { continue };
            let durations = cut.durations(&grad.graph, &devices, costs);
            let residuals = |orders: &[Vec<Task>]| -> Vec<Bytes> {
                let of_shard = |(i, order): (usize, &Vec<Task>)| flow.residuals.peak(ShardId(i as u32), order);
                orders.iter().enumerate().map(of_shard).collect()
            };
            let mut schedules = cut.tasks(flow, topology, plan, &durations).schedules(plan.schedule, m);
            let mut schedule = schedules.pop().expect("there is always one");
            let mut kept = residuals(&schedule.orders);
            while let Some(tighter) = schedules.pop() {
                let mut memory = alone.clone();
                for (i, memory) in memory.iter_mut().enumerate() {
                    memory.add_variant(kept[i], cut.temporaries[i]);
                }
                memory::add_update(&self.update.temporaries, &mut memory);
                memory.iter_mut().zip(&devices).for_each(|(memory, devices)| memory.add_heap(devices));
                let fits =
                    |(memory, devices): (&Memory, &Vec<&Device>)| devices.iter().all(|d| memory.total() <= d.memory);
                if memory.iter().zip(&devices).all(fits) {
                    break;
                }
                schedule = tighter;
                kept = residuals(&schedule.orders);
            }
            for (busy, of_run) in out.busy.iter_mut().zip(cut.busy(&durations, n_shards)) {
                *busy = busy.max(of_run * f64::from(m));
            }
            for (sent, of_run) in out.sent.iter_mut().zip(cut.sent(n_shards)) {
                *sent = (*sent).max(of_run * u64::from(m));
            }
            for segment in cut.segmentation.segments.iter().filter(|s| !s.again.is_empty()) {
                out.recompute[segment.shard.index()] = true;
            }
            out.step_time = out.step_time.max(schedule.makespan);
            for (i, memory) in out.memory.iter_mut().enumerate() {
                memory.add_variant(kept[i], cut.temporaries[i]);
            }
            out.orders.insert(variant.clone(), schedule.orders);
        }
        for &(param, _, bytes) in &self.mirrored {
            if let Place::Shard(owner) = plan.owners[param] {
                out.sent[owner.index()] += bytes;
            }
        }
        // The update takes as long as the shard with the most to update; what it exchanges counts as sent.
        for (sent, of_update) in out.sent.iter_mut().zip(self.update.sent(n_shards)) {
            *sent += of_update;
        }
        memory::add_update(&self.update.temporaries, &mut out.memory);
        let durations = self.update.durations(&model.update, &devices, &known.update);
        let updating = self.update.busy(&durations, n_shards);
        for (busy, updating) in out.busy.iter_mut().zip(&updating) {
            *busy += *updating;
        }
        let update = updating.into_iter().fold(Seconds(0.0), Seconds::max);
        let averaging = average_time(model, plan, topology);
        out.step_time = out.step_time + update + averaging;
        for (memory, devices) in out.memory.iter_mut().zip(&devices) {
            memory.add_heap(devices);
        }
        out
    }
}

/// What passes between the segments of a graph.
#[derive(Clone, Debug)]
struct Flow {
    dependencies: Vec<Vec<Dependency>>,
    residuals: Residuals,
}

impl Flow {
    fn new(graph: &Graph, cut: &Segmentation, n_shards: usize) -> Self {
        Self { dependencies: cut.dependencies(graph), residuals: Residuals::new(graph, cut, n_shards) }
    }
}

/// One graph, cut.
#[derive(Clone, Debug)]
struct Cut {
    segmentation: Segmentation,
    /// Size of each message.
    messages: Vec<Bytes>,
    /// By segment: values inside it.
    inside: Vec<Bytes>,
    /// By shard: values inside its segments.
    temporaries: Vec<Bytes>,
    /// By segment: what it takes at speed 1, for each of its shard's devices that differ in their rates.
    terms: Vec<Vec<(Rates, Terms)>>,
    /// With several microbatches.
    sums: bool,
}

impl Cut {
    /// `like`: a cut of the same graph, with the same costs.
    fn new(
        graph: &Graph,
        segmentation: Segmentation,
        devices: &[Vec<&Device>],
        costs: &[OpCost],
        sums: bool,
        like: Option<&Self>,
    ) -> Self {
        // Most of a model is where it was when a border moves: what is known of a segment need not be counted again.
        let same: Vec<Option<usize>> = segmentation.segments.iter().map(|s| like?.position(s)).collect();
        let known_terms = like.filter(|like| like.sums == sums).map(|like| &like.terms);
        let terms = |(segment, same): (&Segment, &Option<usize>)| {
            let known = same.and_then(|i| known_terms?.get(i)).map_or(&[][..], Vec::as_slice);
            let mut of: Vec<(Rates, Terms)> = Vec::with_capacity(1);
            for rates in devices[segment.shard.index()].iter().map(|d| d.rates()) {
                if of.iter().all(|(known, _)| *known != rates) {
                    let terms = known.iter().find(|(of, _)| *of == rates).map(|(_, terms)| *terms);
                    of.push((rates, terms.unwrap_or_else(|| segment_terms(graph, segment, costs, &rates, sums))));
                }
            }
            of
        };
        let known = |i: usize| Some(like?.inside[same[i]?]);
        let inside = memory::inside(graph, &segmentation, &known);
        let mut temporaries = vec![Bytes(0); devices.len()];
        for (segment, inside) in segmentation.segments.iter().zip(&inside) {
            temporaries[segment.shard.index()] += *inside;
        }
        Self {
            messages: (0..segmentation.messages.len()).map(|i| segmentation.bytes(graph, i)).collect(),
            terms: segmentation.segments.iter().zip(&same).map(terms).collect(),
            inside,
            temporaries,
            segmentation,
            sums,
        }
    }

    /// Where the same segment stands here.
    fn position(&self, segment: &Segment) -> Option<usize> {
        let segments = &self.segmentation.segments;
        let at = segments.binary_search_by_key(&(segment.level, segment.shard), |s| (s.level, s.shard)).ok()?;
        (segments[at] == *segment).then_some(at)
    }

    /// One variant with its graph; `None` for one that the model does not have.
    fn of_variant<'a>(
        model: &'a Model,
        topology: &Topology,
        plan: &Plan,
        known: &Costs,
        variant: &str,
        like: Option<&Self>,
    ) -> Result<Option<(&'a Graph, Self)>, SegmentError> {
        let (Some(grad), Some(costs)) = (model.variant(variant), known.grads.get(variant)) else { return Ok(None) };
        let Some(assignment) = plan.grads.get(variant) else { return Ok(None) };
        let (graph, devices) = (&grad.graph, devices(topology, plan));
        let cut = plan.cut(model, graph, assignment)?;
        Ok(Some((graph, Self::new(graph, cut, &devices, costs, plan.n_microbatches > 1, like))))
    }

    /// One run of each segment. Devices of other rates than those that it was cut for are priced anew.
    fn durations(&self, graph: &Graph, devices: &[Vec<&Device>], costs: &[OpCost]) -> Vec<Seconds> {
        let of = |(segment, known): (&Segment, &Vec<(Rates, Terms)>)| {
            let on = |device: &&Device| {
                let rates = device.rates();
                let terms = known.iter().find(|(of, _)| *of == rates).map(|(_, terms)| *terms);
                let terms = terms.unwrap_or_else(|| segment_terms(graph, segment, costs, &rates, self.sums));
                terms.time(&device.measured.unwrap_or_default()) / device.speed
            };
            devices[segment.shard.index()].iter().map(on).fold(Seconds(0.0), Seconds::max)
        };
        self.segmentation.segments.iter().zip(&self.terms).map(of).collect()
    }

    fn tasks(&self, flow: &Flow, topology: &Topology, plan: &Plan, durations: &[Seconds]) -> TaskGraph {
        let nics = Nics::of(topology);
        let shard = |segment: usize| self.segmentation.segments[segment].shard;
        TaskGraph::of(&self.segmentation, &flow.dependencies, plan.shards.len(), durations, |i, message| {
            nics.travel(topology, &plan.shards, shard(message.from), message.to, self.messages[i])
        })
    }

    /// By shard: one run of each of its segments.
    fn busy(&self, durations: &[Seconds], n_shards: usize) -> Vec<Seconds> {
        let mut busy = vec![Seconds(0.0); n_shards];
        for (segment, duration) in self.segmentation.segments.iter().zip(durations) {
            busy[segment.shard.index()] += *duration;
        }
        busy
    }

    /// By shard: what one run sends.
    fn sent(&self, n_shards: usize) -> Vec<Bytes> {
        let mut sent = vec![Bytes(0); n_shards];
        for (message, bytes) in self.segmentation.messages.iter().zip(&self.messages) {
            sent[self.segmentation.segments[message.from].shard.index()] += *bytes;
        }
        sent
    }
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
    let Some((graph, cut)) = Cut::of_variant(model, topology, plan, known, variant, None)? else { return Ok(None) };
    let durations = cut.durations(graph, &devices(topology, plan), &known.grads[variant]);
    let tasks = cut.tasks(&Flow::new(graph, &cut.segmentation, plan.shards.len()), topology, plan, &durations);
    Ok(Some(Timed { graph, cut: cut.segmentation, tasks }))
}

/// Time that each shard takes to update its params.
pub(super) fn update_busy(
    model: &Model,
    plan: &Plan,
    devices: &[Vec<&Device>],
    costs: &[OpCost],
) -> Result<Vec<Seconds>, SegmentError> {
    let cut = Cut::new(&model.update, update_cut(model, plan)?, devices, costs, false, None);
    Ok(cut.busy(&cut.durations(&model.update, devices, costs), devices.len()))
}

/// Gradients go to replica 0 and back.
pub(super) fn average_time(model: &Model, plan: &Plan, topology: &Topology) -> Seconds {
    let others = u64::from(plan.n_replicas) - 1;
    let mut owned = vec![Bytes(0); plan.shards.len()];
    for (tensor, owner) in model.state[..model.n_params].iter().zip(&plan.owners) {
        if let Place::Shard(s) = owner {
            owned[s.index()] += tensor.shape.bytes();
        }
    }
    let of_shard = |(shard, bytes): (&ShardPlan, Bytes)| {
        let devices = &shard.devices;
        let link = devices.get(1).map(|&d| topology.link(devices[0], d));
        link.map_or(Seconds(0.0), |l| l.time(bytes * (2 * others)))
    };
    let slowest = plan.shards.iter().zip(owned.iter().copied()).map(of_shard).fold(Seconds(0.0), Seconds::max);
    slowest.max(Nics::of(topology).gathered(&plan.shards, &owned))
}
