//! Whether a plan is right and takes what it says, found out without the planner.
//!
//! Nothing of `solve`, `predict`, `schedule` or `estimate` is used here. The cut of a graph into segments is what workers
//! run, so it is taken as it is and checked op by op; then every value of every microbatch is followed through an
//! event-driven simulation of its own. Which ops a person has pinned is what their words mean, so that too is shared; where
//! these ops are is looked up here.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use super::fixed::meant;
use super::segment::{Parameters, Segment, SegmentError, Segmentation, follow_parameters};
use super::{Place, Plan, ShardId, Task, To};
use crate::cost::{self, OpCost};
use crate::graph::{Graph, Model, OpId};
use crate::topology::{Class, Device, DeviceId, Measured, Topology};
use crate::units::{Bytes, Seconds};

/// What the simulation found.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified {
    pub step: Seconds,
    /// By shard: computing per step.
    pub busy: Vec<Seconds>,
    /// By shard: state, gradients, others' params and residuals, without temporaries.
    pub memory: Vec<Bytes>,
    /// Between shards per step, of one replica.
    pub sent: Bytes,
}

/// What is wrong with a plan.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("{what}: {found}, expected {expected}")]
    Wrong { what: String, found: String, expected: String },
    #[error("{graph} cannot be cut")]
    Cut { graph: String, source: SegmentError },
    #[error("{graph}: {op} ({name}) {why}")]
    Op { graph: String, op: OpId, name: String, why: &'static str },
    #[error("{graph}: {shard} never gets to {task:?}: what it reads does not come")]
    Stuck { graph: String, shard: ShardId, task: Task },
    #[error("shard {shard} needs {needs} at least, the plan says {says} and {device} has {has}")]
    Memory { shard: usize, needs: Bytes, says: Bytes, device: String, has: Bytes },
}

fn wrong(what: &str, found: impl ToString, expected: impl ToString) -> Fault {
    Fault::Wrong { what: what.to_owned(), found: found.to_string(), expected: expected.to_string() }
}

/// Checks a plan and simulates a step of it.
///
/// # Errors
/// The first [`Fault`].
/// # Complexity
/// O(ops · log ops + microbatches · values · log).
pub fn verify(model: &Model, topology: &Topology, plan: &Plan) -> Result<Verified, Fault> {
    let n = plan.shards.len();
    check_shape(model, topology, plan)?;
    check_fixed(model, topology, plan)?;
    // A shard is as fast as its slowest replica, in each segment.
    let devices: Vec<Vec<&Device>> =
        plan.shards.iter().map(|s| s.devices.iter().map(|d| &topology.devices[d.index()]).collect()).collect();
    let mut out =
        Verified { step: Seconds(0.0), busy: vec![Seconds(0.0); n], memory: vec![Bytes(0); n], sent: Bytes(0) };
    let mut copies: BTreeSet<(OpId, ShardId)> = BTreeSet::new();
    let mut sent = vec![Bytes(0); n];
    for (variant, assignment) in &plan.grads {
        let grad = model.variant(variant).ok_or_else(|| wrong("grads", variant, "a variant of the model"))?;
        let graph = &grad.graph;
        let results = plan.grad_results(model, graph, assignment);
        let cut = plan.cut(model, graph, assignment).map_err(|source| Fault::Cut { graph: variant.clone(), source })?;
        check_cut(variant, graph, &cut, &|op| assignment.place(op), &results)?;
        check_again(variant, plan, graph, &cut)?;
        let costs = cost::of_graph(graph);
        let sums = plan.n_microbatches > 1;
        let durations: Vec<f64> =
            cut.segments.iter().map(|s| duration(graph, s, &costs, &devices[s.shard.index()], sums)).collect();
        let orders = plan.orders.get(variant).map_or(&[][..], Vec::as_slice);
        let way = |a: ShardId, b: ShardId| Way::between(topology, plan, a, b);
        let end = Simulation::new(variant, graph, &cut, orders, &durations, &way).run(plan.n_microbatches)?;
        out.step = out.step.max(Seconds(end));
        let mut of_variant = vec![Bytes(0); n];
        for message in &cut.messages {
            let bytes: Bytes = message.values.iter().map(|&v| graph.op(v).shape.bytes()).sum();
            of_variant[cut.segments[message.from].shard.index()] += bytes * u64::from(plan.n_microbatches);
        }
        for s in 0..n {
            let shard = ShardId(s as u32);
            let mine = cut.segments.iter().zip(&durations).filter(|(segment, _)| segment.shard == shard);
            let busy: f64 = mine.map(|(_, d)| d * f64::from(plan.n_microbatches)).sum();
            out.busy[s] = out.busy[s].max(Seconds(busy));
            out.memory[s] = out.memory[s].max(residuals(graph, &cut, &orders[s]));
            sent[s] = sent[s].max(of_variant[s]);
        }
        for segment in &cut.segments {
            for &v in segment.inputs.iter().filter(|&&v| is_parameter(graph, v)) {
                if matches!(assignment.place(v), Place::Shard(owner) if owner != segment.shard) {
                    copies.insert((v, segment.shard));
                }
            }
        }
    }
    let parameters = plan.grads.keys().next().and_then(|v| model.variant(v)).map(|g| g.graph.parameters().to_vec());
    for (op, reader) in copies {
        let param = parameters.as_ref().and_then(|p| p.iter().position(|&q| q == op));
        let Some((param, bytes)) = param.map(|p| (p, model.state[p].shape.bytes())) else { continue };
        out.memory[reader.index()] += bytes;
        if let Place::Shard(owner) = plan.owners[param] {
            sent[owner.index()] += bytes;
        }
    }
    for (i, tensor) in model.state.iter().enumerate() {
        // A gradient is summed in single precision at least.
        let gradient =
            if i < model.n_params { tensor.shape.n_elements() * tensor.shape.dtype.size().max(4) } else { 0 };
        for (s, memory) in out.memory.iter_mut().enumerate() {
            match plan.owners[i] {
                Place::Shard(owner) if owner.index() != s => {}
                _ => *memory += tensor.shape.bytes() + Bytes(gradient),
            }
        }
    }
    out.step = out.step + update(model, plan, &devices, &mut out.busy, &mut sent)? + averaging(model, topology, plan);
    out.sent = sent.into_iter().sum();
    for (s, shard) in plan.shards.iter().enumerate() {
        for d in shard.devices.iter().map(|d| &topology.devices[d.index()]) {
            if out.memory[s] > shard.memory || shard.memory > d.memory {
                let (needs, device) = (out.memory[s], d.name.clone());
                return Err(Fault::Memory { shard: s, needs, says: shard.memory, device, has: d.memory });
            }
        }
    }
    Ok(out)
}

fn check_shape(model: &Model, topology: &Topology, plan: &Plan) -> Result<(), Fault> {
    if plan.model != model.fingerprint {
        return Err(wrong("model", &plan.model, &model.fingerprint));
    }
    let rows = plan.microbatch * u64::from(plan.n_microbatches) * u64::from(plan.n_replicas);
    if rows != model.manifest.batch_size || rows == 0 {
        return Err(wrong("rows of a step", rows, model.manifest.batch_size));
    }
    let mut taken = BTreeSet::new();
    for d in plan.shards.iter().flat_map(|s| &s.devices) {
        if d.index() >= topology.devices.len() || !taken.insert(*d) {
            return Err(wrong("device", d.0, "one that is there and has no other shard"));
        }
    }
    let expected = plan.shards.len() * plan.n_replicas as usize;
    if taken.len() != expected || plan.shards.iter().any(|s| s.devices.len() != plan.n_replicas as usize) {
        return Err(wrong("devices", taken.len(), expected));
    }
    if plan.owners.len() != model.state.len() {
        return Err(wrong("owners", plan.owners.len(), model.state.len()));
    }
    for (i, tensor) in model.state.iter().enumerate() {
        let expected = tensor.param.map(|p| plan.owners[p]);
        if expected.is_some_and(|e| i >= model.n_params && e != plan.owners[i]) {
            return Err(wrong("owner of a slot", format!("{:?}", plan.owners[i]), "that of its param"));
        }
    }
    Ok(())
}

/// What people have fixed is so, in every variant. Ops that all shards compute are nowhere.
fn check_fixed(model: &Model, topology: &Topology, plan: &Plan) -> Result<(), Fault> {
    // Shard of every op that a pattern means, with its name.
    let places = |pattern: &str| {
        let mut places: Vec<(usize, String)> = Vec::new();
        for (name, assignment) in &plan.grads {
            let Some(variant) = model.variant(name) else { continue };
            for op in meant(pattern, model, variant) {
                if let Place::Shard(shard) = assignment.place(op) {
                    places.push((shard.index(), format!("{} of {name}", variant.graph.op(op).name)));
                }
            }
        }
        places
    };
    for pin in &plan.fixed.pins {
        for (shard, op) in places(&pin.ops) {
            let devices = plan.shards.get(shard).map_or(&[][..], |s| &s.devices);
            let is_there = match &pin.to {
                To::Shard(wished) => shard == *wished as usize,
                // Each replica has a device for the shard, one of which may be meant.
                To::Device(name) => devices.iter().any(|d| topology.devices[d.index()].name == *name),
            };
            if !is_there {
                return Err(wrong(&format!("{pin}: {op}"), format!("on shard {shard}"), "as pinned"));
            }
        }
    }
    for set in &plan.fixed.together {
        let all: Vec<(usize, String)> = set.iter().flat_map(|pattern| places(pattern)).collect();
        if let Some(((first, _), (other, op))) = all.first().zip(all.iter().find(|(shard, _)| *shard != all[0].0)) {
            return Err(wrong(
                &format!("{set:?} on one shard: {op}"),
                format!("on shard {other}"),
                format!("shard {first}"),
            ));
        }
    }
    Ok(())
}

fn is_parameter(graph: &Graph, op: OpId) -> bool {
    &*graph.op(op).opcode == "parameter"
}

/// Every placed op runs once, where it was placed; every segment reads only what it has or is sent by one before it; every
/// result is made where it belongs.
fn check_cut(
    name: &str,
    graph: &Graph,
    cut: &Segmentation,
    place: &dyn Fn(OpId) -> Place,
    results: &[Place],
) -> Result<(), Fault> {
    let fault = |op: OpId, why| Fault::Op { graph: name.to_owned(), op, name: graph.op(op).name.clone(), why };
    let mut home: BTreeMap<OpId, usize> = BTreeMap::new();
    // What each shard has been given so far: segments stand in an order of execution.
    let mut here: BTreeSet<(ShardId, OpId)> = BTreeSet::new();
    for (i, segment) in cut.segments.iter().enumerate() {
        let mut made: BTreeSet<OpId> = segment.inputs.iter().copied().collect();
        for &v in &segment.inputs {
            if !is_parameter(graph, v) && !here.contains(&(segment.shard, v)) {
                return Err(fault(v, "is read by a segment that nobody has sent it to"));
            }
        }
        for &op in &segment.ops {
            match place(op) {
                Place::Shard(s) if s != segment.shard => return Err(fault(op, "runs where it was not placed")),
                // It has to have run before: segments stand in an order of execution.
                Place::Shard(_) if segment.again.binary_search(&op).is_ok() => match home.contains_key(&op) {
                    true => {}
                    false => return Err(fault(op, "runs again before it has run")),
                },
                Place::Shard(_) if home.insert(op, i).is_some() => return Err(fault(op, "runs twice")),
                _ => {}
            }
            if !graph.op(op).operands.iter().all(|o| made.contains(o)) {
                return Err(fault(op, "reads what its segment does not have"));
            }
            made.insert(op);
        }
        for &v in segment.outputs.iter().chain(segment.results.iter().map(|&r| &graph.outputs()[r])) {
            if !made.contains(&v) {
                return Err(fault(v, "is yielded by a segment that does not have it"));
            }
        }
        here.extend(segment.outputs.iter().map(|&v| (segment.shard, v)));
        for message in cut.messages.iter().filter(|m| m.from == i) {
            if let Some(&v) = message.values.iter().find(|v| !segment.outputs.contains(v)) {
                return Err(fault(v, "is sent by a segment that does not yield it"));
            }
            here.extend(message.values.iter().map(|&v| (message.to, v)));
        }
    }
    for (id, _) in graph.ops() {
        if matches!(place(id), Place::Shard(_)) && !is_parameter(graph, id) && !home.contains_key(&id) {
            return Err(fault(id, "does not run"));
        }
    }
    for (position, result) in results.iter().enumerate() {
        let yields = |s: &&Segment| s.results.contains(&position);
        let found: Vec<ShardId> = cut.segments.iter().filter(yields).map(|s| s.shard).collect();
        let right = match result {
            Place::Shard(s) => found == [*s],
            Place::Everywhere => !found.is_empty(),
        };
        if !right {
            return Err(fault(graph.outputs()[position], "is a result that is not made where it belongs"));
        }
    }
    Ok(())
}

/// Only shards of which the plan says so run ops again, and what they run twice yields the same twice.
fn check_again(name: &str, plan: &Plan, graph: &Graph, cut: &Segmentation) -> Result<(), Fault> {
    let mut does = vec![false; plan.shards.len()];
    for segment in &cut.segments {
        does[segment.shard.index()] |= !segment.again.is_empty();
        let once = |op: &&OpId| matches!(&*graph.op(**op).opcode, "rng" | "rng-get-and-update-state" | "custom-call");
        if let Some(&op) = segment.again.iter().find(once) {
            let why = "runs again, and may yield something else";
            return Err(Fault::Op { graph: name.to_owned(), op, name: graph.op(op).name.clone(), why });
        }
    }
    for (s, (shard, does)) in plan.shards.iter().zip(does).enumerate() {
        if does && !shard.recompute {
            return Err(wrong(&format!("{name}: shards[{s}].recompute"), false, true));
        }
    }
    Ok(())
}

fn duration(graph: &Graph, segment: &Segment, costs: &[OpCost], devices: &[&Device], sums: bool) -> f64 {
    devices.iter().map(|device| duration_on(graph, segment, costs, device, sums)).fold(0.0, f64::max)
}

/// One run of a segment: its ops; one more start; what it hands on unchanged is copied, what it sums is read twice and
/// written once.
fn duration_on(graph: &Graph, segment: &Segment, costs: &[OpCost], device: &Device, sums: bool) -> f64 {
    let factors = device.measured.unwrap_or(Measured::NOMINAL);
    let time = |flops: f64, bytes: u64, class: Class, launches: bool| {
        let work = (flops / device.flops.0).max(bytes as f64 / device.bandwidth.0) * factors.of(class);
        let start = if launches { device.overhead.0 * factors.launch } else { 0.0 };
        (work + start) / device.speed
    };
    let moved = |v: OpId, times: u64| time(0.0, graph.op(v).shape.bytes().0 * times, Class::Memory, true);
    let ops: f64 =
        segment.ops.iter().map(|o| &costs[o.index()]).map(|c| time(c.flops.0, c.bytes.0, c.class, c.launches)).sum();
    let handed: f64 = segment.outputs.iter().filter(|v| segment.inputs.contains(v)).map(|&v| moved(v, 2)).sum();
    let yielded: f64 = segment
        .results
        .iter()
        .map(|&r| graph.outputs()[r])
        .map(|v| match sums {
            true => moved(v, 3),
            false if segment.inputs.contains(&v) => moved(v, 2),
            false => 0.0,
        })
        .sum();
    ops + handed + yielded + time(0.0, 0, Class::Memory, true)
}

fn travel(topology: &Topology, a: DeviceId, b: DeviceId, bytes: u64) -> f64 {
    let (one, other) = (&topology.devices[a.index()], &topology.devices[b.index()]);
    let link = if one.node == other.node { topology.local } else { topology.remote };
    link.latency.0 + bytes as f64 / (link.bandwidth.0 * left(topology, a, b))
}

/// Share of its bandwidth that a link has now: the least that is said of it.
fn left(topology: &Topology, a: DeviceId, b: DeviceId) -> f64 {
    let mut left = 1.0;
    for slowed in &topology.slowed {
        let [from, to] = slowed.between;
        if (from == a && to == b || from == b && to == a) && slowed.share < left {
            left = slowed.share;
        }
    }
    left
}

/// From shard to shard of the first replica. Pairs of replicas on the same nodes do the same at the same time.
struct Way {
    latency: f64,
    bandwidth: f64,
    /// Where it leaves a node: name of the node that sends and of the one that receives, and what their NICs carry.
    nics: Option<[(String, f64); 2]>,
    copies: f64,
}

impl Way {
    fn between(topology: &Topology, plan: &Plan, a: ShardId, b: ShardId) -> Self {
        let node = |d: DeviceId| topology.devices[d.index()].node.as_str();
        let (senders, receivers) = (&plan.shards[a.index()].devices, &plan.shards[b.index()].devices);
        let (from, to) = (node(senders[0]), node(receivers[0]));
        let link = if from == to { topology.local } else { topology.remote };
        let same = senders.iter().zip(receivers).filter(|(a, b)| (node(**a), node(**b)) == (from, to));
        let nics = (from != to).then(|| [from, to].map(|node| (node.to_owned(), nic(topology, node))));
        let bandwidth = link.bandwidth.0 * left(topology, senders[0], receivers[0]);
        Self { latency: link.latency.0, bandwidth, nics, copies: same.count() as f64 }
    }
}

/// What a node's NIC carries: the least that its devices say, else what a link does.
fn nic(topology: &Topology, node: &str) -> f64 {
    let said = topology.devices.iter().filter(|d| d.node == node).filter_map(|d| d.nic);
    said.map(|nic| nic.0).reduce(f64::min).unwrap_or(topology.remote.bandwidth.0)
}

/// A message on its way out of a node.
struct Sent {
    message: usize,
    microbatch: u32,
    way: Way,
    left: f64,
}

/// Bytes a second of each message, when a NIC's flows have even shares of it.
fn rates(sent: &[Sent]) -> Vec<f64> {
    let mut load: BTreeMap<(&str, usize), f64> = BTreeMap::new();
    for s in sent {
        for (end, (node, _)) in s.way.nics.iter().flatten().enumerate() {
            *load.entry((node, end)).or_default() += s.way.copies;
        }
    }
    let rate = |s: &Sent| {
        let ends = s.way.nics.iter().flatten().enumerate();
        ends.map(|(end, (node, nic))| nic / load[&(node.as_str(), end)]).fold(s.way.bandwidth, f64::min)
    };
    sent.iter().map(rate).collect()
}

/// What is about to happen; the earliest is the greatest.
struct Event {
    at: f64,
    shard: ShardId,
    microbatch: u32,
    what: What,
}

enum What {
    Ended(usize),
    /// Values of a message.
    Arrived(usize),
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at)
    }
}

struct Simulation<'a> {
    name: &'a str,
    graph: &'a Graph,
    cut: &'a Segmentation,
    orders: &'a [Vec<Task>],
    durations: &'a [f64],
    way: &'a dyn Fn(ShardId, ShardId) -> Way,
    /// Between nodes.
    sent: Vec<Sent>,
    /// By shard: tasks begun, and whether one is running.
    begun: Vec<usize>,
    running: Vec<bool>,
    /// Values by shard and microbatch.
    here: BTreeSet<(ShardId, u32, OpId)>,
    events: BinaryHeap<Event>,
}

impl<'a> Simulation<'a> {
    fn new(
        name: &'a str,
        graph: &'a Graph,
        cut: &'a Segmentation,
        orders: &'a [Vec<Task>],
        durations: &'a [f64],
        way: &'a dyn Fn(ShardId, ShardId) -> Way,
    ) -> Self {
        let n = orders.len();
        let (begun, running) = (vec![0; n], vec![false; n]);
        Self {
            name,
            graph,
            cut,
            orders,
            durations,
            way,
            sent: Vec::new(),
            begun,
            running,
            here: BTreeSet::new(),
            events: BinaryHeap::new(),
        }
    }

    /// When the last task ends.
    fn run(mut self, n_microbatches: u32) -> Result<f64, Fault> {
        let n_tasks: usize = self.orders.iter().map(Vec::len).sum();
        let expected = self.cut.segments.len() * n_microbatches as usize;
        if n_tasks != expected {
            return Err(wrong("tasks", n_tasks, expected));
        }
        let mut seen = BTreeSet::new();
        for (shard, task) in self.orders.iter().enumerate().flat_map(|(s, o)| o.iter().map(move |t| (s, t))) {
            let known = self.cut.segments.get(task.segment as usize).is_some_and(|s| s.shard.index() == shard);
            if !known || task.microbatch >= n_microbatches || !seen.insert(*task) {
                return Err(wrong("task", format!("{task:?}"), "each segment of the shard once per microbatch"));
            }
        }
        let (mut end, mut now) = (0.0f64, 0.0);
        (0..self.orders.len()).for_each(|s| self.begin(ShardId(s as u32), 0.0));
        loop {
            let next = self.events.peek().map(|event| event.at);
            let rates = rates(&self.sent);
            let through = self.sent.iter().zip(&rates).map(|(sent, rate)| now + sent.left / rate);
            let first = through.enumerate().min_by(|a, b| a.1.total_cmp(&b.1));
            let until = first.filter(|(_, at)| next.is_none_or(|next| *at <= next));
            let Some(at) = until.map(|(_, at)| at).or(next) else { break };
            for (sent, rate) in self.sent.iter_mut().zip(&rates) {
                sent.left = (sent.left - rate * (at - now)).max(0.0);
            }
            now = at;
            if let Some((i, _)) = until {
                let Sent { message, microbatch, way, .. } = self.sent.remove(i);
                let (at, shard) = (now + way.latency, self.cut.messages[message].to);
                self.events.push(Event { at, shard, microbatch, what: What::Arrived(message) });
                continue;
            }
            let Some(Event { at, shard, microbatch, what }) = self.events.pop() else { break };
            match what {
                What::Ended(segment) => {
                    end = end.max(at);
                    self.running[shard.index()] = false;
                    let outputs = &self.cut.segments[segment].outputs;
                    self.here.extend(outputs.iter().map(|&v| (shard, microbatch, v)));
                    for (i, message) in self.cut.messages.iter().enumerate().filter(|(_, m)| m.from == segment) {
                        let bytes: Bytes = message.values.iter().map(|&v| self.graph.op(v).shape.bytes()).sum();
                        let (way, left) = ((self.way)(shard, message.to), bytes.0 as f64);
                        if way.nics.is_some() {
                            self.sent.push(Sent { message: i, microbatch, way, left });
                            continue;
                        }
                        let at = at + way.latency + left / way.bandwidth;
                        self.events.push(Event { at, shard: message.to, microbatch, what: What::Arrived(i) });
                    }
                }
                What::Arrived(message) => {
                    let values = &self.cut.messages[message].values;
                    self.here.extend(values.iter().map(|&v| (shard, microbatch, v)));
                }
            }
            self.begin(shard, at);
        }
        let stuck = self.orders.iter().enumerate().find_map(|(s, o)| Some((s, *o.get(self.begun[s])?)));
        match stuck {
            Some((s, task)) => Err(Fault::Stuck { graph: self.name.to_owned(), shard: ShardId(s as u32), task }),
            None => Ok(end),
        }
    }

    fn begin(&mut self, shard: ShardId, now: f64) {
        let s = shard.index();
        let Some(&task) = self.orders[s].get(self.begun[s]).filter(|_| !self.running[s]) else { return };
        let segment = &self.cut.segments[task.segment as usize];
        let mut needed = segment.inputs.iter().filter(|&&v| !is_parameter(self.graph, v));
        if needed.all(|&v| self.here.contains(&(shard, task.microbatch, v))) {
            (self.begun[s], self.running[s]) = (self.begun[s] + 1, true);
            let at = now + self.durations[task.segment as usize];
            let what = What::Ended(task.segment as usize);
            self.events.push(Event { at, shard, microbatch: task.microbatch, what });
        }
    }
}

/// Most bytes between segments at one time: a value of a microbatch lives from the first task that has it to the last that
/// reads it.
fn residuals(graph: &Graph, cut: &Segmentation, order: &[Task]) -> Bytes {
    let mut lives: BTreeMap<(u32, OpId), (usize, Option<usize>)> = BTreeMap::new();
    for (i, task) in order.iter().enumerate() {
        let segment = &cut.segments[task.segment as usize];
        for &v in segment.outputs.iter().filter(|&&v| !is_parameter(graph, v)) {
            lives.entry((task.microbatch, v)).or_insert((i, None));
        }
        for &v in segment.inputs.iter().filter(|&&v| !is_parameter(graph, v)) {
            lives.entry((task.microbatch, v)).or_insert((i, None)).1 = Some(i);
        }
    }
    let mut change = vec![0i128; order.len() + 1];
    for ((_, v), (first, last)) in lives {
        let Some(last) = last else { continue };
        let bytes = i128::from(graph.op(v).shape.bytes().0);
        change[first] += bytes;
        change[last + 1] -= bytes;
    }
    let (mut now, mut peak) = (0i128, 0i128);
    for c in change {
        now += c;
        peak = peak.max(now);
    }
    Bytes(u64::try_from(peak).unwrap_or(u64::MAX))
}

/// The update takes as long as the shard with the most to do.
fn update(
    model: &Model,
    plan: &Plan,
    devices: &[Vec<&Device>],
    busy: &mut [Seconds],
    sent: &mut [Bytes],
) -> Result<Seconds, Fault> {
    let graph = &model.update;
    // Params and slots, gradients, the number of microbatches.
    let gradients = plan.owners[..model.n_params].iter();
    let places: Vec<Place> = plan.owners.iter().chain(gradients).copied().chain([Place::Everywhere]).collect();
    let assignment = follow_parameters(graph, &places);
    let cut = Segmentation::new(graph, &assignment, &plan.owners, devices.len(), Parameters::Sent)
        .map_err(|source| Fault::Cut { graph: "update".to_owned(), source })?;
    let costs = cost::of_graph(graph);
    let mut updating = vec![0.0; devices.len()];
    for segment in &cut.segments {
        let s = segment.shard.index();
        updating[s] += duration(graph, segment, &costs, &devices[s], false);
    }
    for message in &cut.messages {
        let from = cut.segments[message.from].shard.index();
        sent[from] += message.values.iter().map(|&v| graph.op(v).shape.bytes()).sum();
    }
    for (sum, updating) in busy.iter_mut().zip(&updating) {
        *sum += Seconds(*updating);
    }
    Ok(Seconds(updating.into_iter().fold(0.0, f64::max)))
}

/// Replicas send the gradients of a shard to the first of them, and get them back.
fn averaging(model: &Model, topology: &Topology, plan: &Plan) -> Seconds {
    let mut longest = 0.0f64;
    // By node: bytes that come to it for the first replica, and that others send from it.
    let mut carried: BTreeMap<&str, [f64; 2]> = BTreeMap::new();
    for (s, shard) in plan.shards.iter().enumerate() {
        let [first, second, ..] = shard.devices[..] else { continue };
        let owned = (0..model.n_params).filter(|&p| plan.owners[p] == Place::Shard(ShardId(s as u32)));
        let bytes: u64 = owned.map(|p| model.state[p].shape.bytes().0).sum();
        longest = longest.max(travel(topology, first, second, bytes * 2 * (u64::from(plan.n_replicas) - 1)));
        let node = |d: &DeviceId| topology.devices[d.index()].node.as_str();
        for other in shard.devices[1..].iter().map(node).filter(|other| *other != node(&first)) {
            carried.entry(node(&first)).or_default()[0] += bytes as f64;
            carried.entry(other).or_default()[1] += bytes as f64;
        }
    }
    for (node, [received, sent]) in carried {
        longest = longest.max(2.0 * received.max(sent) / nic(topology, node));
    }
    Seconds(longest)
}
