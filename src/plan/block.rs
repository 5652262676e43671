//! Blocks: what people call the parts of their model, from left to right.

use std::collections::BTreeMap;

use super::coordinate::Coordinates;
use crate::graph::Graph;
use crate::graph::scope::{OTHER, block_of};

/// The blocks of one grad graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// In the order of the forward half. A name that comes again is told apart by a number: `linear`, `linear 2`.
    pub names: Vec<String>,
    /// Position in `names` of every coordinate; ascending.
    pub of: Vec<usize>,
}

impl Blocks {
    /// Finds the runs of ops under one named scope; ops without one belong to the block before them.
    ///
    /// A model without named scopes has no block.
    pub fn new(graph: &Graph, line: &Coordinates) -> Self {
        let mut scopes: Vec<Option<String>> = vec![None; line.n as usize];
        for (id, op) in graph.ops() {
            if let (Some(at), true) = (line.of[id.index()], line.forward[id.index()] && &*op.opcode != "parameter") {
                scopes[at as usize] = op.scope().map(block_of).filter(|b| b != OTHER);
            }
        }
        let mut blocks = Self { names: Vec::new(), of: Vec::with_capacity(scopes.len()) };
        let mut runs: BTreeMap<String, usize> = BTreeMap::new();
        let mut last = None;
        for scope in scopes {
            if let Some(scope) = scope.filter(|s| last.as_ref() != Some(s)) {
                let run = runs.entry(scope.clone()).or_default();
                *run += 1;
                blocks.names.push(if *run == 1 { scope.clone() } else { format!("{scope} {run}") });
                last = Some(scope);
            }
            // What stands before the first block is part of it.
            blocks.of.push(blocks.names.len().saturating_sub(1));
        }
        blocks
    }

    /// The coordinate at which a block begins.
    pub fn begin(&self, name: &str) -> Option<u32> {
        let block = self.names.iter().position(|n| n == name)?;
        Some(self.of.partition_point(|&b| b < block) as u32)
    }
}
