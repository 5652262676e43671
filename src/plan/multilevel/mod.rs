//! Splits an undirected graph into blocks of like weight so that the edges between blocks weigh little.
//!
//! Multilevel: the graph is made smaller by contracting heavy edges (`coarsen`), the small graph is split (`initial`), and
//! the blocks are improved on every level back to the full graph: by local search (`refine`), then by minimum cuts around
//! the borders (`flow`).

mod blocks;
mod coarsen;
mod cycle;
mod flow;
mod graph;
mod initial;
mod network;
mod queue;
mod refine;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

pub use graph::{InvalidGraph, Weighted};

/// What is wanted of a partition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    pub n_blocks: usize,
    /// How much heavier than even a block may be: 0.03 allows 3 %.
    pub imbalance: f64,
    /// The same seed gives the same partition.
    pub seed: u64,
}

/// A wish that no partition fulfils.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Unsplittable {
    #[error("n_blocks is 0; ask for at least one block")]
    NoBlocks,
    #[error("{n_blocks} blocks of {n_vertices} vertices would leave some empty; ask for at most {n_vertices}")]
    TooFewVertices { n_blocks: usize, n_vertices: usize },
    #[error("imbalance {imbalance} is no share; use 0.03 for 3 %")]
    Imbalance { imbalance: f64 },
}

/// Every vertex has a block, and no block is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Block of each vertex.
    pub of: Vec<u32>,
    /// Weight of the edges between blocks.
    pub cut: i64,
    /// Weight of the heaviest block; above [`Wanted::limit`] only where vertices are too heavy to be packed better.
    pub heaviest: i64,
}

impl Wanted {
    /// Most weight of a block: the imbalance asked for, but never below what an even split of whole units takes.
    pub fn limit(&self, graph: &Weighted) -> i64 {
        let total = graph.total_weight();
        let n_blocks = self.n_blocks.max(1) as i64;
        // A little more, so that rounding does not turn 1.03 * 100 into 102.
        let allowed = total as f64 / n_blocks as f64 * (1.0 + self.imbalance) * (1.0 + 1e-12);
        (allowed as i64).min(total).max(total / n_blocks + i64::from(total % n_blocks != 0))
    }
}

/// Finds blocks within the limit of weight, with a small cut.
///
/// # Shapes
/// n vertices, m edges. Result: n blocks below `n_blocks`.
/// # Errors
/// [`Unsplittable`] when there are no blocks, fewer vertices than blocks, or the imbalance is negative or no number.
/// # Complexity
/// Near linear in n + m: searches stop after a number of steps in proportion to the edges. O(n + m) space.
/// # Source
/// The scheme of METIS (Karypis and Kumar, SISC 1998), with the refinement of KaFFPa (Sanders and Schulz, ESA 2011) and
/// KaHyPar (Gottesbüren, Hamann and Wagner, ESA 2019).
pub fn partition(graph: &Weighted, wanted: &Wanted) -> Result<Partition, Unsplittable> {
    let &Wanted { n_blocks, imbalance, .. } = wanted;
    let n_vertices = graph.n_vertices();
    if n_blocks == 0 {
        return Err(Unsplittable::NoBlocks);
    }
    if n_blocks > n_vertices {
        return Err(Unsplittable::TooFewVertices { n_blocks, n_vertices });
    }
    if !(imbalance >= 0.0 && imbalance.is_finite()) {
        return Err(Unsplittable::Imbalance { imbalance });
    }
    let limit = wanted.limit(graph);
    let of = if n_blocks == 1 { vec![0; n_vertices] } else { without_isolated(graph, n_blocks, limit, wanted.seed) };
    let mut weight = vec![0; n_blocks];
    for (v, &b) in of.iter().enumerate() {
        weight[b as usize] += graph.vertex_weight(v as u32);
    }
    let heaviest = weight.into_iter().max().unwrap_or(0);
    Ok(Partition { cut: graph.cut(&of), of, heaviest })
}

/// Vertices without edges would only take up room: the others are split first, then these fill the lightest blocks.
fn without_isolated(graph: &Weighted, n_blocks: usize, limit: i64, seed: u64) -> Vec<u32> {
    let total = graph.total_weight();
    // Light enough that the lightest block always has room.
    let fills = |v: &u32| {
        let weight = graph.vertex_weight(*v);
        graph.degree(*v) == 0 && (total - weight) / n_blocks as i64 + weight <= limit
    };
    let (mut isolated, rest): (Vec<u32>, Vec<u32>) = (0..graph.n_vertices() as u32).partition(fills);
    if isolated.is_empty() {
        return cycle::split(graph, n_blocks, limit, seed);
    }
    let part = graph.induced(&rest, &mut vec![u32::MAX; graph.n_vertices()]);
    let split = cycle::split(&part, n_blocks, limit, seed);
    let mut of = vec![0; graph.n_vertices()];
    // Weight, vertices, block.
    let mut blocks: Vec<(i64, usize, u32)> = (0..n_blocks as u32).map(|b| (0, 0, b)).collect();
    for (&v, &b) in rest.iter().zip(&split) {
        of[v as usize] = b;
        blocks[b as usize].0 += graph.vertex_weight(v);
        blocks[b as usize].1 += 1;
    }
    isolated.sort_by_key(|&v| Reverse(graph.vertex_weight(v)));
    // Empty blocks first: there may be fewer other vertices than blocks.
    let key = |(weight, n, b): (i64, usize, u32)| Reverse((n > 0, weight, n, b));
    let mut lightest: BinaryHeap<_> = blocks.into_iter().map(key).collect();
    for &v in &isolated {
        let Some(Reverse((_, weight, n, b))) = lightest.pop() else { break };
        of[v as usize] = b;
        lightest.push(key((weight + graph.vertex_weight(v), n + 1, b)));
    }
    of
}

#[cfg(test)]
mod tests;
