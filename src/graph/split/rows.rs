//! Ops that work on parts of a microbatch's rows: which ones, and along which axis of every value rows lie.
//!
//! Rows are followed from the batch through the graph, op by op, as parts of params are: a product of activations and a
//! weight keeps them, the gradient of that weight sums over them.

use super::super::ir::{Graph, Op, OpId};
use super::super::model::GradGraph;
use super::super::scope::{OTHER, block_of, means};
use super::even;
use super::recipe::{Cut, Yield, recipe};

/// How ops of one graph work on parts of its rows; by default, all read all rows at once.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    n_params: Option<usize>,
    /// By op: which of the splits it goes by.
    of: Vec<Option<usize>>,
    /// By split, then by op: where rows of the value are cut; `None` for one without rows.
    layouts: Vec<Vec<Option<Cut>>>,
}

impl Rows {
    /// Finds the ops that patterns mean, as far as they can work on parts; what stands in no named scope goes with what it
    /// reads.
    ///
    /// # Shapes
    /// `splits`: patterns, and into how many parts rows go: not more than a microbatch has.
    /// # Complexity
    /// O(splits · ops).
    pub fn new(n_params: usize, variant: &GradGraph, splits: &[(&str, u32)]) -> Self {
        let graph = &variant.graph;
        let layout = |(_, parts): &(&str, u32)| layout(graph, n_params, variant.microbatch, *parts);
        let layouts = splits.iter().map(layout).collect();
        let mut rows = Self { n_params: Some(n_params), of: vec![None; graph.n_ops()], layouts };
        for (id, op) in graph.ops().filter(|(_, op)| &*op.opcode != "parameter") {
            let named = || splits.iter().position(|(pattern, _)| means(pattern, op));
            let split = match (&*op.opcode, op.operands.first()) {
                // Elements stay with their tuple.
                ("get-tuple-element", Some(tuple)) => rows.of[tuple.index()],
                _ => named().or_else(|| rows.follows(graph, op)),
            };
            let works = |split: &usize| recipe(graph, op, &rows.operands(*split, op)).is_some();
            rows.of[id.index()] = split.filter(works);
        }
        rows
    }

    /// How an op's operands are cut where it works on parts of rows; `None` where it does not.
    pub(super) fn cuts(&self, id: OpId, op: &Op) -> Option<Vec<Option<&Cut>>> {
        Some(self.operands((*self.of.get(id.index())?)?, op))
    }

    /// Parameters before the batch, in a graph that has one.
    pub(super) fn n_params(&self) -> Option<usize> {
        self.n_params
    }

    pub(super) fn are_cut(&self, id: OpId) -> bool {
        self.of.get(id.index()).is_some_and(Option::is_some)
    }

    /// Ops that work on parts by this split.
    pub(super) fn of_split(&self, split: usize) -> impl Iterator<Item = OpId> + '_ {
        let ops = self.of.iter().enumerate().filter(move |(_, s)| **s == Some(split));
        ops.map(|(i, _)| OpId(i as u32))
    }

    fn operands(&self, split: usize, op: &Op) -> Vec<Option<&Cut>> {
        op.operands.iter().map(|o| self.layouts[split][o.index()].as_ref()).collect()
    }

    /// The split of all that an op in no scope reads rows of.
    fn follows(&self, graph: &Graph, op: &Op) -> Option<usize> {
        if op.scope().is_some_and(|scope| block_of(scope) != OTHER) {
            return None;
        }
        let has_rows = |o: &&OpId| {
            let own = self.of[o.index()].unwrap_or(0);
            // The batch is everywhere.
            self.layouts.get(own).is_some_and(|l| l[o.index()].is_some()) && &*graph.op(**o).opcode != "parameter"
        };
        let mut read = op.operands.iter().filter(has_rows).map(|o| self.of[o.index()]);
        let first = read.next()??;
        read.all(|split| split == Some(first)).then_some(first)
    }
}

/// By op: how its value would be cut if all ops worked on parts of rows.
fn layout(graph: &Graph, n_params: usize, rows: u64, parts: u32) -> Vec<Option<Cut>> {
    let mut cuts: Vec<Option<Cut>> = vec![None; graph.n_ops()];
    let cut = Cut { axis: 0, bounds: even(rows, parts) };
    for &p in graph.parameters().iter().skip(n_params) {
        // The key is behind the batch.
        let is_key = graph.parameters().last() == Some(&p);
        let has_rows = graph.op(p).shape.as_array().is_some_and(|s| s.dims.first() == Some(&rows));
        cuts[p.index()] = (has_rows && !is_key).then(|| cut.clone());
    }
    for (id, op) in graph.ops() {
        let of_operands: Vec<Option<&Cut>> = op.operands.iter().map(|o| cuts[o.index()].as_ref()).collect();
        if let Some(Yield::Parts(cut)) = recipe(graph, op, &of_operands).map(|recipe| recipe.yields) {
            cuts[id.index()] = Some(cut);
        }
    }
    cuts
}
