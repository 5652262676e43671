//! Segments: what one shard runs between two exchanges.
//!
//! `level(op)` is the maximum over operands of `level(operand)`, plus one where the operand lives on another shard.
//! Where an op of one part of what is split reads what other shards read too, it rises as well: those need not wait for
//! this part. Ops with the same (shard, level) form a segment. A path that leaves a segment for another shard comes back at a
//! higher level, so segments are convex and their graph is acyclic by construction; a pipeline's forward and
//! backward halves appear without being told apart by hand.
//!
//! A zero-bubble schedule wants more: what other shards wait for goes first, what only sums up gradients of params fills
//! gaps. Levels are doubled for it: an even one for the former, the odd one behind it for the latter.
//!
//! A shard may keep little for its backward half: segments behind the loss then have copies of the forward ops whose values
//! they read, and are given what the forward segment of these was given ([`super::again`]).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::again::Again;
use super::{Assignment, Place, ShardId};
use crate::graph::{Graph, Op, OpId};
use crate::units::Bytes;

/// Ops of one shard that run as one executable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub shard: ShardId,
    pub level: u32,
    /// Ascending; ops placed everywhere are cloned into every segment that reads them. Never entry parameters.
    pub ops: Vec<OpId>,
    /// Those of `ops` that an earlier segment of this shard runs, too; ascending.
    pub again: Vec<OpId>,
    /// Values from outside: entry parameters and values of other segments, ascending.
    pub inputs: Vec<OpId>,
    /// Values that other segments read, ascending. An input may stand here too: it is passed through.
    pub outputs: Vec<OpId>,
    /// Graph outputs (positions) that this segment yields. Their op is in `ops` or `inputs`.
    pub results: Vec<usize>,
}

/// Tensors that travel together: everything one segment sends to one other shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Position of the sending segment.
    pub from: usize,
    pub to: ShardId,
    /// Ascending.
    pub values: Vec<OpId>,
}

/// A graph cut into segments, with what travels between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// By (level, shard): a valid order of execution.
    pub segments: Vec<Segment>,
    /// By (from, to).
    pub messages: Vec<Message>,
}

/// A position in a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Task {
    pub segment: u32,
    pub microbatch: u32,
}

/// How shards go through a graph of gradients.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ways<'a> {
    /// Matrix products that no other shard waits for are segments of their own.
    pub apart: bool,
    /// By shard: what the backward half reads of the forward half is computed again. Shards beyond its end keep it.
    pub again: &'a [bool],
}

/// How entry parameters reach shards that do not hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameters {
    /// A copy is there before the graph starts (grad graphs: params change once per step).
    Mirrored,
    /// They travel like any other value (update graph).
    Sent,
}

/// An assignment that cannot be cut into segments: a bug in the planner or a plan made for another graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    #[error("the plan places {found} ops, the graph {graph} has {expected}; plan again for this bundle")]
    WrongGraph { graph: String, expected: usize, found: usize },
    #[error("{op} ({name}) is placed everywhere but reads {operand}, which only {shard} holds")]
    NotEverywhere { op: OpId, name: String, operand: OpId, shard: ShardId },
    #[error("{op} ({name}) is placed on {shard}, but the plan has {n_shards} shards")]
    NoSuchShard { op: OpId, name: String, shard: ShardId, n_shards: usize },
    #[error("{op} ({name}) yields {shape}, which cannot travel between shards; place it with its users")]
    NotAnArray { op: OpId, name: String, shape: String },
}

impl Segmentation {
    /// Cuts `graph` by `assignment`.
    ///
    /// # Shapes
    /// `assignment`: one place per op; an entry parameter placed everywhere is known to all shards (batch, key).
    /// `results`: where each graph output must end up.
    ///
    /// # Complexity
    /// O(ops + operands + segments · everywhere-ops).
    pub fn new(
        graph: &Graph,
        assignment: &Assignment,
        results: &[Place],
        n_shards: usize,
        parameters: Parameters,
    ) -> Result<Self, SegmentError> {
        Self::cut(graph, assignment, results, n_shards, parameters, Ways::default())
    }

    /// Cuts a graph of gradients, whose first output is the loss.
    ///
    /// # Source
    /// Backward work in two halves, gradients of inputs before those of params: Zero Bubble (Qi et al., ICLR 2024). Forward
    /// work done again: Chen et al., *Training deep nets with sublinear memory cost*, arXiv 1604.06174.
    pub fn of_gradients(
        graph: &Graph,
        assignment: &Assignment,
        results: &[Place],
        n_shards: usize,
        ways: Ways<'_>,
    ) -> Result<Self, SegmentError> {
        Self::cut(graph, assignment, results, n_shards, Parameters::Mirrored, ways)
    }

    fn cut(
        graph: &Graph,
        assignment: &Assignment,
        results: &[Place],
        n_shards: usize,
        parameters: Parameters,
        ways: Ways<'_>,
    ) -> Result<Self, SegmentError> {
        check(graph, assignment, n_shards)?;
        // Ops are large and lie anywhere: this is asked for every operand.
        let mut is_parameter = vec![false; graph.n_ops()];
        graph.ops().for_each(|(id, op)| is_parameter[id.index()] = &*op.opcode == "parameter");
        let mut levels = levels(graph, assignment, parameters, &is_parameter);
        sink(graph, assignment, &mut levels, parameters, &is_parameter);
        if ways.apart {
            set_apart(graph, assignment, results, &mut levels, &is_parameter);
        }
        let again = ways.again.contains(&true).then(|| Again::new(graph, assignment, &levels, ways.again)).flatten();
        let seen = vec![0; graph.n_ops()];
        let parts = BTreeMap::new();
        Builder { graph, assignment, levels, parameters, is_parameter, again, parts, seen }.build(results, n_shards)
    }

    /// Segments of one shard, in order of level.
    pub fn of_shard(&self, shard: ShardId) -> impl Iterator<Item = (usize, &Segment)> {
        self.segments.iter().enumerate().filter(move |(_, s)| s.shard == shard)
    }

    /// For every segment: the segments it needs, and the message that brings their values where they are on
    /// another shard.
    pub fn dependencies(&self, graph: &Graph) -> Vec<Vec<Dependency>> {
        // A value may be passed through a segment of its own shard only: its producer is the first that yields it.
        let mut producer: Vec<Option<usize>> = vec![None; graph.n_ops()];
        for (i, s) in self.segments.iter().enumerate() {
            for &v in &s.outputs {
                producer[v.index()].get_or_insert(i);
            }
        }
        let message_of: BTreeMap<(usize, ShardId), usize> =
            self.messages.iter().enumerate().map(|(i, m)| ((m.from, m.to), i)).collect();
        self.segments
            .iter()
            .enumerate()
            .map(|(i, s)| {
                let mut needed: BTreeSet<usize> = BTreeSet::new();
                for v in &s.inputs {
                    match producer[v.index()] {
                        Some(p) if p != i && (!is_parameter(graph, *v) || self.segments[p].shard != s.shard) => {
                            needed.insert(p);
                        }
                        _ => {}
                    }
                }
                needed
                    .into_iter()
                    .map(|p| Dependency {
                        segment: p,
                        message: (self.segments[p].shard != s.shard).then(|| message_of[&(p, s.shard)]),
                    })
                    .collect()
            })
            .collect()
    }

    /// Size of one message.
    pub fn bytes(&self, graph: &Graph, message: usize) -> Bytes {
        self.messages[message].values.iter().map(|&v| graph.op(v).shape.bytes()).sum()
    }

    /// Entry parameters placed on another shard than the one that reads them, ascending: (parameter, reader).
    pub fn mirrors(&self, graph: &Graph, assignment: &Assignment) -> Vec<(OpId, ShardId)> {
        let mut out = BTreeSet::new();
        for s in &self.segments {
            for &v in &s.inputs {
                if matches!(assignment.place(v), Place::Shard(o) if o != s.shard) && is_parameter(graph, v) {
                    out.insert((v, s.shard));
                }
            }
        }
        out.into_iter().collect()
    }
}

/// One segment's need of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dependency {
    pub segment: usize,
    /// Position in [`Segmentation::messages`]; `None` when both are on one shard.
    pub message: Option<usize>,
}

fn is_parameter(graph: &Graph, op: OpId) -> bool {
    &*graph.op(op).opcode == "parameter"
}

fn check(graph: &Graph, assignment: &Assignment, n_shards: usize) -> Result<(), SegmentError> {
    if assignment.0.len() != graph.n_ops() {
        return Err(SegmentError::WrongGraph {
            graph: graph.name.clone(),
            expected: graph.n_ops(),
            found: assignment.0.len(),
        });
    }
    for (id, op) in graph.ops() {
        match assignment.place(id) {
            Place::Shard(shard) if shard.index() >= n_shards => {
                return Err(SegmentError::NoSuchShard { op: id, name: op.name.clone(), shard, n_shards });
            }
            Place::Everywhere => {
                for &o in &op.operands {
                    if let Place::Shard(shard) = assignment.place(o) {
                        return Err(SegmentError::NotEverywhere { op: id, name: op.name.clone(), operand: o, shard });
                    }
                }
            }
            Place::Shard(_) => {}
        }
    }
    Ok(())
}

/// Earliest level of every op; 0 for ops placed everywhere.
fn levels(graph: &Graph, assignment: &Assignment, parameters: Parameters, is_parameter: &[bool]) -> Vec<u32> {
    let mut level = vec![0u32; graph.n_ops()];
    // What other shards wait for is sent before this shard goes on with its own part of a split op: parts run at the same
    // time.
    let enters = |op: &Op, o: OpId, from: ShardId| {
        if op.lane.is_none() || graph.op(o).lane.is_some() {
            return false;
        }
        let elsewhere = |u: &OpId| matches!(assignment.place(*u), Place::Shard(s) if s != from);
        let is_sent = |o: &OpId| graph.users(*o).iter().any(elsewhere);
        // Who reads one part of a value has others that are sent.
        is_sent(&o) || &*graph.op(o).opcode == "slice" && graph.users(graph.op(o).operands[0]).iter().any(is_sent)
    };
    for (id, op) in graph.ops() {
        let Place::Shard(shard) = assignment.place(id) else { continue };
        for &o in &op.operands {
            let Place::Shard(from) = assignment.place(o) else { continue };
            let later = from != shard || enters(op, o, from);
            // Copies of params are there from the beginning.
            if later && parameters == Parameters::Mirrored && is_parameter[o.index()] {
                continue;
            }
            level[id.index()] = level[id.index()].max(level[o.index()] + u32::from(later));
        }
    }
    level
}

/// Moves ops to the level of their first reader where that keeps fewer bytes alive in between: a transposed
/// weight that only the backward half reads need not be a residual of the forward half.
fn sink(graph: &Graph, assignment: &Assignment, level: &mut [u32], parameters: Parameters, is_parameter: &[bool]) {
    let mut is_output = vec![false; graph.n_ops()];
    for &o in graph.outputs() {
        is_output[o.index()] = true;
    }
    // Latest level at which a shard-local reader keeps the value alive anyway.
    let last_use = |level: &[u32], v: OpId, shard: ShardId| {
        graph
            .users(v)
            .iter()
            .filter(|&&u| assignment.place(u) == Place::Shard(shard))
            .map(|u| level[u.index()])
            .max()
            .unwrap_or(0)
    };
    for (id, op) in graph.ops().rev() {
        let Place::Shard(shard) = assignment.place(id) else { continue };
        // Without a reader it stays.
        let target = graph.users(id).iter().map(|u| level[u.index()]).min().unwrap_or(0);
        if target <= level[id.index()] || is_output[id.index()] || is_parameter[id.index()] {
            continue;
        }
        if !graph.users(id).iter().all(|&u| assignment.place(u) == Place::Shard(shard)) {
            continue;
        }
        // Operands that would now have to live until `target`.
        let mut kept: Vec<OpId> = op.operands.clone();
        kept.sort();
        kept.dedup();
        let extra: Bytes = kept
            .iter()
            .filter(|&&o| match assignment.place(o) {
                Place::Everywhere => false,
                Place::Shard(_) if is_parameter[o.index()] && parameters == Parameters::Mirrored => false,
                Place::Shard(from) => from != shard || last_use(level, o, shard) < target,
            })
            .map(|&o| graph.op(o).shape.bytes())
            .sum();
        if extra <= op.shape.bytes() && (extra < op.shape.bytes() || extra == Bytes(0)) {
            level[id.index()] = target;
        }
    }
}

/// Doubles levels. Where a segment has products that nothing sent to another shard needs, all that is not needed for it goes to the
/// odd level.
fn set_apart(graph: &Graph, assignment: &Assignment, results: &[Place], level: &mut [u32], is_parameter: &[bool]) {
    let home = |id: OpId| match assignment.place(id) {
        Place::Shard(s) if !is_parameter[id.index()] => Some((level[id.index()], s)),
        _ => None,
    };
    let mut waited = vec![false; graph.n_ops()];
    for (&op, &place) in graph.outputs().iter().zip(results) {
        // A result wanted elsewhere is sent.
        waited[op.index()] |= home(op).is_some_and(|(_, s)| place != Place::Shard(s));
    }
    for (id, op) in graph.ops().rev() {
        let Some(here) = home(id) else { continue };
        let sent = |u: &OpId| matches!(assignment.place(*u), Place::Shard(s) if s != here.1);
        waited[id.index()] |= graph.users(id).iter().any(sent);
        if waited[id.index()] {
            let beside = op.operands.iter().filter(|o| home(**o) == Some(here));
            beside.for_each(|o| waited[o.index()] = true);
        }
    }
    // By segment: has something that is waited for, has a product that is not, and may be taken apart.
    let mut kinds: BTreeMap<Key, [bool; 3]> = BTreeMap::new();
    for (id, op) in graph.ops() {
        let Some(here) = home(id) else { continue };
        // Elements stay with their tuple.
        if &*op.opcode == "get-tuple-element" && home(op.operands[0]) == Some(here) {
            waited[id.index()] |= waited[op.operands[0].index()];
        }
        let [first, late, parts] = kinds.entry(here).or_insert([false, false, true]);
        match waited[id.index()] {
            true => *first = true,
            false => {
                *late |= matches!(&*op.opcode, "dot" | "convolution");
                // Only arrays pass between segments.
                let arrays = |o: &OpId| !waited[o.index()] || graph.op(*o).shape.as_array().is_some();
                *parts &= op.operands.iter().filter(|o| home(**o) == Some(here)).all(arrays);
            }
        }
    }
    let late: Vec<bool> = graph
        .ops()
        .map(|(id, _)| !waited[id.index()] && home(id).is_some_and(|here| kinds[&here] == [true; 3]))
        .collect();
    level.iter_mut().zip(late).for_each(|(level, late)| *level = 2 * *level + u32::from(late));
}

/// Level and shard of a segment.
pub(super) type Key = (u32, ShardId);

/// A segment in the making.
#[derive(Default)]
struct Part {
    /// Placed here; ascending.
    ops: Vec<OpId>,
    /// Placed everywhere, and read here; ascending.
    clones: Vec<OpId>,
    /// Placed in an earlier part, and run here once more; ascending.
    again: Vec<OpId>,
    /// Ascending.
    inputs: Vec<OpId>,
    outputs: Vec<OpId>,
    /// Ascending.
    results: Vec<usize>,
}

struct Builder<'a> {
    graph: &'a Graph,
    assignment: &'a Assignment,
    levels: Vec<u32>,
    parameters: Parameters,
    /// By op.
    is_parameter: Vec<bool>,
    again: Option<Again<'a>>,
    parts: BTreeMap<Key, Part>,
    /// By op: the last part that looked at it, counted from 1.
    seen: Vec<u32>,
}

impl Builder<'_> {
    fn build(mut self, results: &[Place], n_shards: usize) -> Result<Segmentation, SegmentError> {
        self.collect();
        for (position, &place) in results.iter().enumerate() {
            match place {
                Place::Shard(shard) => self.add_result(position, shard),
                Place::Everywhere => (0..n_shards as u32).for_each(|s| self.add_result(position, ShardId(s))),
            }
        }
        let keys: Vec<Key> = self.parts.keys().copied().collect();
        for (i, &key) in keys.iter().enumerate() {
            self.pull_inputs(key, i as u32 + 1)?;
        }
        self.connect(&keys)
    }

    /// Puts every op that is placed into its segment.
    fn collect(&mut self) {
        let mut found: Vec<(Key, Vec<OpId>)> = Vec::new();
        let mut position: BTreeMap<Key, usize> = BTreeMap::new();
        // Neighbours mostly go together.
        let mut last: Option<(Key, usize)> = None;
        for (id, _) in self.graph.ops() {
            let Place::Shard(shard) = self.assignment.place(id) else { continue };
            if self.is_parameter[id.index()] {
                continue;
            }
            let key = (self.levels[id.index()], shard);
            let at = last.filter(|(same, _)| *same == key).map(|(_, at)| at);
            let at = at.unwrap_or_else(|| *position.entry(key).or_insert(found.len()));
            if at == found.len() {
                found.push((key, Vec::new()));
            }
            found[at].1.push(id);
            last = Some((key, at));
        }
        for (key, ops) in found {
            self.parts.entry(key).or_default().ops = ops;
        }
    }

    /// Makes some segment on `shard` yield graph output `position`.
    fn add_result(&mut self, position: usize, shard: ShardId) {
        let op = self.graph.outputs()[position];
        let key = match self.assignment.place(op) {
            Place::Shard(from) if from == shard => (self.levels[op.index()], shard),
            // Passed on from the shard that computes it.
            Place::Shard(_) => (self.levels[op.index()] + 1, shard),
            Place::Everywhere => {
                let first = self.parts.keys().copied().find(|&(_, s)| s == shard);
                first.unwrap_or((0, shard))
            }
        };
        self.parts.entry(key).or_default().results.push(position);
    }

    /// Clones what is placed everywhere, and what is run again, into the segment and lists what must come from outside.
    /// `number`: of the part, from 1.
    fn pull_inputs(&mut self, key: Key, number: u32) -> Result<(), SegmentError> {
        let Some(mut part) = self.parts.remove(&key) else { return Ok(()) };
        let operands = part.ops.iter().flat_map(|&o| self.graph.op(o).operands.iter().copied());
        let mut queue: Vec<OpId> = operands.filter(|&v| !self.is_in(v, key)).collect();
        if let Some(again) = &self.again {
            part.again = again.of(key, &queue, &self.levels);
            for &v in &part.again {
                self.seen[v.index()] = number;
                queue.extend_from_slice(&self.graph.op(v).operands);
            }
        }
        queue.extend(part.results.iter().map(|&p| self.graph.outputs()[p]));
        while let Some(v) = queue.pop() {
            if self.is_in(v, key) || std::mem::replace(&mut self.seen[v.index()], number) == number {
                continue;
            }
            let op = self.graph.op(v);
            if self.assignment.place(v) == Place::Everywhere && !self.is_parameter[v.index()] {
                part.clones.push(v);
                queue.extend(op.operands.iter().copied());
            } else {
                if op.shape.as_array().is_none() {
                    let shape = op.shape.to_string();
                    return Err(SegmentError::NotAnArray { op: v, name: op.name.clone(), shape });
                }
                part.inputs.push(v);
            }
        }
        part.clones.sort_unstable();
        part.inputs.sort_unstable();
        self.parts.insert(key, part);
        Ok(())
    }

    /// Whether an op is placed in this segment.
    fn is_in(&self, v: OpId, (level, shard): Key) -> bool {
        self.assignment.place(v) == Place::Shard(shard)
            && self.levels[v.index()] == level
            && !self.is_parameter[v.index()]
    }

    fn connect(mut self, keys: &[Key]) -> Result<Segmentation, SegmentError> {
        // What every segment must yield to others, and to which shards.
        let mut sent: BTreeMap<(Key, ShardId), Vec<OpId>> = BTreeMap::new();
        let mut yielded: BTreeMap<Key, Vec<OpId>> = BTreeMap::new();
        for &key in keys {
            for &v in &self.parts[&key].inputs {
                let Place::Shard(from) = self.assignment.place(v) else { continue };
                let is_there = from == key.1 || self.parameters == Parameters::Mirrored;
                if is_there && self.is_parameter[v.index()] {
                    continue;
                }
                let source = (self.levels[v.index()], from);
                yielded.entry(source).or_default().push(v);
                if from != key.1 {
                    sent.entry((source, key.1)).or_default().push(v);
                }
            }
        }
        for (source, values) in yielded {
            let values = ascending(values);
            let passed_on: Vec<OpId> = values.iter().copied().filter(|&v| !self.is_in(v, source)).collect();
            let part = self.parts.entry(source).or_default();
            for v in passed_on {
                if part.clones.binary_search(&v).is_err()
                    && let Err(at) = part.inputs.binary_search(&v)
                {
                    part.inputs.insert(at, v);
                }
            }
            part.outputs = values;
        }
        let position: BTreeMap<Key, usize> = self.parts.keys().enumerate().map(|(i, &key)| (key, i)).collect();
        let mut messages: Vec<Message> = sent
            .into_iter()
            .map(|((source, to), values)| Message { from: position[&source], to, values: ascending(values) })
            .collect();
        messages.sort_by_key(|m| (m.from, m.to));
        let segments = self
            .parts
            .into_iter()
            .map(|((level, shard), p)| Segment {
                shard,
                level,
                ops: merged(merged(p.ops, p.clones), p.again.clone()),
                again: p.again,
                inputs: p.inputs,
                outputs: p.outputs,
                results: p.results,
            })
            .collect();
        Ok(Segmentation { segments, messages })
    }
}

/// Each once, in ascending order.
fn ascending(mut values: Vec<OpId>) -> Vec<OpId> {
    values.sort_unstable();
    values.dedup();
    values
}

/// Both in ascending order.
fn merged(mut ops: Vec<OpId>, clones: Vec<OpId>) -> Vec<OpId> {
    if !clones.is_empty() {
        ops.extend(clones);
        ops.sort_unstable();
    }
    ops
}

/// Places the ops of a graph whose parameters are placed: what depends on nothing placed is everywhere, else an op
/// goes where its weightiest operand is, so that only small values travel. Ties go to the lowest shard.
///
/// A value weighs no more than what it is made of: the factor by which gradients are clipped is one number, also when it
/// is spread to the shape of each of them, and it is spread where the gradient is.
///
/// # Shapes
/// `parameters`: one place per entry parameter.
pub fn follow_parameters(graph: &Graph, parameters: &[Place]) -> Assignment {
    let mut places = vec![Place::Everywhere; graph.n_ops()];
    let mut weights: Vec<Bytes> = graph.ops().map(|(_, op)| op.shape.bytes()).collect();
    for (&op, &place) in graph.parameters().iter().zip(parameters) {
        places[op.index()] = place;
    }
    for (id, op) in graph.ops() {
        if is_parameter(graph, id) {
            continue;
        }
        let held = op.operands.iter().filter_map(|o| match places[o.index()] {
            Place::Shard(s) => Some((weights[o.index()], std::cmp::Reverse(s))),
            Place::Everywhere => None,
        });
        let made_of: Bytes = held.clone().map(|(weight, _)| weight).sum();
        if let Some((_, std::cmp::Reverse(shard))) = held.max() {
            places[id.index()] = Place::Shard(shard);
            weights[id.index()] = made_of.min(op.shape.bytes());
        }
    }
    // What weighs less than its size is made where it is read.
    let mut is_output = vec![false; graph.n_ops()];
    graph.outputs().iter().for_each(|o| is_output[o.index()] = true);
    for (id, op) in graph.ops().rev() {
        let light = weights[id.index()] < op.shape.bytes() && !is_parameter(graph, id) && !is_output[id.index()];
        let movable = || op.operands.iter().all(|&o| graph.op(o).shape.as_array().is_some());
        let mut readers = graph.users(id).iter().map(|u| places[u.index()]);
        if let (true, Some(first)) = (light && movable(), readers.next())
            && readers.all(|r| r == first)
        {
            places[id.index()] = first;
        }
    }
    Assignment(places)
}
