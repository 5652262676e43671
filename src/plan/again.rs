//! What a backward segment computes again: forward values of its shard, from what their own segment was given.
//!
//! A value of the forward half that the backward half reads is kept for as long as its microbatch is in flight, once for
//! each microbatch. Computed again it is there while the backward segment runs, once. What a forward segment was given is
//! kept in any case, or has arrived, and it makes the same values of it: random numbers come from a key that is given, too.
//! Nothing is made again from what another segment made again, so that each op runs at most once more for every segment that
//! reads its segment's values.

use std::collections::BTreeSet;

use super::segment::Key;
use super::{Assignment, Place};
use crate::graph::{Graph, Op, OpId};

/// The values that may be computed again.
pub(super) struct Again<'a> {
    graph: &'a Graph,
    assignment: &'a Assignment,
    /// By shard: whether it does.
    shards: &'a [bool],
    /// Level of the loss: segments below it are the forward half, those above it the backward half.
    turn: u32,
    /// By op: running it twice yields the same twice.
    repeatable: Vec<bool>,
}

impl<'a> Again<'a> {
    /// `None` for a graph without outputs. `levels`: by op.
    pub fn new(graph: &'a Graph, assignment: &'a Assignment, levels: &[u32], shards: &'a [bool]) -> Option<Self> {
        let turn = levels[graph.outputs().first()?.index()];
        Some(Self { graph, assignment, shards, turn, repeatable: repeatable(graph) })
    }

    /// What the segment runs that earlier ones ran, ascending. `reads`: values that its own ops read from outside.
    pub fn of(&self, (level, shard): Key, reads: &[OpId], levels: &[u32]) -> Vec<OpId> {
        if level <= self.turn || self.shards.get(shard.index()) != Some(&true) {
            return Vec::new();
        }
        let may = |v: OpId| {
            self.assignment.place(v) == Place::Shard(shard)
                && levels[v.index()] < self.turn
                && self.repeatable[v.index()]
        };
        let mut queue: Vec<OpId> = reads.iter().copied().filter(|&v| may(v)).collect();
        let mut found = BTreeSet::new();
        while let Some(v) = queue.pop() {
            if found.insert(v) {
                let same = |o: &OpId| levels[o.index()] == levels[v.index()] && may(*o);
                queue.extend(self.graph.op(v).operands.iter().copied().filter(same));
            }
        }
        found.into_iter().collect()
    }
}

/// By op: whether it may run twice. Elements stay with their tuple.
fn repeatable(graph: &Graph) -> Vec<bool> {
    let mut may = vec![false; graph.n_ops()];
    for (id, op) in graph.ops() {
        let whole = |o: &OpId| graph.op(*o).shape.as_array().is_some() || may[o.index()];
        may[id.index()] = &*op.opcode != "parameter" && is_pure(graph, op) && op.operands.iter().all(whole);
    }
    may
}

/// Whether an op's results depend on its operands alone, and it does nothing else.
fn is_pure(graph: &Graph, op: &Op) -> bool {
    let known = !matches!(
        &*op.opcode,
        "rng" | "rng-get-and-update-state" | "custom-call" | "infeed" | "outfeed" | "send" | "recv"
    );
    known && op.called.iter().all(|&c| graph.computation(c).ops.iter().all(|op| is_pure(graph, op)))
}
