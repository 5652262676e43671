//! Down to a small graph and back up.

use super::blocks::Blocks;
use super::coarsen::coarsen;
use super::flow::Corridors;
use super::graph::Weighted;
use super::initial::recursive;
use super::refine::Search;
use crate::plan::random::Random;

/// Several first partitions are tried on a graph of about this many vertices per block, and at least `START`.
const START_PER_BLOCK: usize = 30;
const START: usize = 1000;
/// Each try begins on a graph of about this many vertices per block, and at least `COARSEST`.
const COARSEST_PER_BLOCK: usize = 20;
const COARSEST: usize = 100;
/// Most tries. Fewer where the small graph still has many edges.
const TRIES: f64 = 8.0;
/// Edges that may be spent on tries however small the graph is.
const CHEAP: usize = 30_000;
/// Edges looked at by local search and by minimum cuts on one level, per edge end of the level.
const SEARCH_WORK: f64 = 2.0;
const FLOW_WORK: f64 = 6.0;

/// Blocks of every vertex. There are at least two blocks; some stay empty where there are fewer vertices.
pub(super) fn split(graph: &Weighted, n_blocks: usize, limit: i64, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    let levels = Levels::down(graph, n_blocks, (n_blocks * START_PER_BLOCK).max(START), &mut random);
    let small = levels.coarsest(graph);
    // All tries together cost less than the way back up.
    let affordable = (graph.n_edges() as f64 * 0.6).max(CHEAP as f64) * levels.thrift;
    let more_blocks = (n_blocks as f64).log2().max(3.0) / 3.0;
    let n_tries = (affordable / more_blocks / small.n_edges().max(1) as f64).clamp(1.0, TRIES) as usize;
    let mut best: Option<((i64, i64), Vec<u32>)> = None;
    for _ in 0..n_tries {
        let lower = Levels::down(small, n_blocks, (n_blocks * COARSEST_PER_BLOCK).max(COARSEST), &mut random);
        let of = recursive(lower.coarsest(small), n_blocks, limit, &mut random);
        let of = lower.up(small, of, n_blocks, limit, &mut random);
        let blocks = Blocks::new(small, of, vec![limit; n_blocks]);
        let key = (blocks.excess(), blocks.cut());
        if best.as_ref().is_none_or(|(b, _)| key < *b) {
            best = Some((key, blocks.of));
        }
    }
    let of = best.map_or_else(Vec::new, |(_, of)| of);
    if levels.steps.is_empty() { of } else { levels.up(graph, of, n_blocks, limit, &mut random) }
}

/// Ever smaller graphs.
struct Levels {
    /// Each smaller graph, with its vertex for every vertex of the graph before.
    steps: Vec<(Weighted, Vec<u32>)>,
    /// Below 1 where contraction leaves many edges, as in power-law graphs: work per level is cut back, so that all
    /// levels together cost as much as on a mesh, where each has about half the edges.
    thrift: f64,
}

impl Levels {
    /// Contracts until about `enough` vertices are left, or contraction no longer helps.
    fn down(graph: &Weighted, n_blocks: usize, enough: usize, random: &mut Random) -> Self {
        let coarsest = (n_blocks * COARSEST_PER_BLOCK).max(COARSEST) as i64;
        let cap = (graph.total_weight() / coarsest).saturating_mul(3) / 2;
        let mut steps: Vec<(Weighted, Vec<u32>)> = Vec::new();
        let mut n_edges = graph.n_edges();
        loop {
            let current = steps.last().map_or(graph, |s| &s.0);
            if current.n_vertices() <= enough {
                break;
            }
            let (coarse, map) = coarsen(current, cap.max(1), random);
            if coarse.n_vertices() * 20 > current.n_vertices() * 19 {
                break;
            }
            n_edges += coarse.n_edges();
            steps.push((coarse, map));
        }
        let thrift = (2.2 * graph.n_edges() as f64 / n_edges.max(1) as f64).min(1.0);
        Self { steps, thrift }
    }

    fn coarsest<'g>(&'g self, graph: &'g Weighted) -> &'g Weighted {
        self.steps.last().map_or(graph, |s| &s.0)
    }

    /// From blocks of the smallest graph to blocks of the full graph, improved on every level.
    fn up(&self, graph: &Weighted, of: Vec<u32>, n_blocks: usize, limit: i64, random: &mut Random) -> Vec<u32> {
        let mut of = improve(self.coarsest(graph), of, n_blocks, limit, self.thrift, random);
        for i in (0..self.steps.len()).rev() {
            let finer = if i == 0 { graph } else { &self.steps[i - 1].0 };
            of = self.steps[i].1.iter().map(|&c| of[c as usize]).collect();
            of = improve(finer, of, n_blocks, limit, self.thrift, random);
        }
        of
    }
}

fn improve(graph: &Weighted, of: Vec<u32>, n_blocks: usize, limit: i64, thrift: f64, random: &mut Random) -> Vec<u32> {
    let mut blocks = Blocks::new(graph, of, vec![limit; n_blocks]);
    let ends = 2.0 * graph.n_edges() as f64 * thrift;
    let mut search = Search::new(&blocks);
    search.rebalance(&mut blocks);
    for _ in 0..4 {
        if search.along_border(&mut blocks, 150, random) == 0 {
            break;
        }
    }
    search.multi_try(&mut blocks, 15, 2_000 + (SEARCH_WORK * ends) as usize, random);
    Corridors::new(graph.n_vertices(), 10_000 + (FLOW_WORK * ends) as usize).improve(&mut blocks, 3, random);
    blocks.of
}
