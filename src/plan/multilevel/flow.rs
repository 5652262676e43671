//! Better borders between two blocks by minimum cuts.

use super::blocks::Blocks;
use super::network::{NONE, Network};
use crate::plan::random::Random;

/// A corridor is this many vertices deep on each side. Every level of the hierarchy improves on the one below, so a
/// shallow one is enough.
const DEEPEST: i32 = 2;

/// Scratch space for minimum cuts around borders.
///
/// Between two blocks a corridor of vertices around the border is free, the rest of each block is one terminal. A
/// maximum flow gives a cut; while the cut leaves one side too heavy, vertices just beyond the lighter side become
/// terminals too, and the flow is continued, until the sides fit or the cut is no better than the border was.
///
/// # Source
/// FlowCutter (Hamann and Strasser, JEA 2018), for refinement as in Gottesbüren, Hamann and Wagner, ESA 2019.
pub(super) struct Corridors {
    /// Node of a graph vertex in the network.
    node: Vec<u32>,
    vertices: Vec<u32>,
    /// Distance from the border, positive in the first block, negative in the second. As `vertices`.
    depth: Vec<i32>,
    network: Network,
    budget: usize,
}

impl Corridors {
    /// `budget`: arcs that may be looked at, about.
    pub fn new(n_vertices: usize, budget: usize) -> Self {
        let (vertices, depth, network) = (Vec::new(), Vec::new(), Network::default());
        Self { node: vec![NONE; n_vertices], vertices, depth, network, budget }
    }

    /// Improves the borders of all pairs of blocks, and again, up to `rounds` times, those of blocks that changed.
    pub fn improve(&mut self, blocks: &mut Blocks<'_>, rounds: usize, random: &mut Random) {
        let mut active = vec![true; blocks.limit.len()];
        for _ in 0..rounds {
            let mut pairs = borders(blocks, &active);
            random.shuffle(&mut pairs);
            active.fill(false);
            for (pair, seeds) in pairs {
                if self.network.work > self.budget {
                    return;
                }
                if self.improve_pair(blocks, pair, &seeds) {
                    active[pair[0] as usize] = true;
                    active[pair[1] as usize] = true;
                }
            }
            if !active.contains(&true) {
                return;
            }
        }
    }

    fn improve_pair(&mut self, blocks: &mut Blocks<'_>, pair: [u32; 2], seeds: &[u32]) -> bool {
        self.vertices.clear();
        self.depth.clear();
        let inside = [0, 1].map(|side| self.grow(blocks, pair, side, seeds));
        let cut = self.connect(blocks, pair);
        let better = self.separate(blocks, pair, inside, cut);
        if let Some(side) = better {
            for (i, &v) in self.vertices.iter().enumerate() {
                let to = if self.network.is_reached(side, i as u32 + 2) { pair[side] } else { pair[1 - side] };
                if blocks.of[v as usize] != to {
                    blocks.put(v, to);
                }
            }
        }
        for &v in &self.vertices {
            self.node[v as usize] = NONE;
        }
        better.is_some()
    }

    /// Adds the vertices of one block that are nearest to the border with the other; answers their weight.
    fn grow(&mut self, blocks: &Blocks<'_>, pair: [u32; 2], side: usize, seeds: &[u32]) -> i64 {
        let (own, other) = (pair[side], pair[1 - side]);
        let sign = [1, -1][side];
        let begin = self.vertices.len();
        let cap = blocks.weight[own as usize] / 5 * 2;
        let mut weight = 0;
        let mut next = begin;
        let mut add = |corridors: &mut Self, v: u32, depth: i32| {
            let w = blocks.graph.vertex_weight(v);
            if weight + w <= cap && corridors.node[v as usize] == NONE {
                weight += w;
                corridors.node[v as usize] = corridors.vertices.len() as u32 + 2;
                corridors.vertices.push(v);
                corridors.depth.push(depth);
            }
        };
        for &v in seeds {
            if blocks.of[v as usize] == own && blocks.near(v).iter().any(|n| n.0 == other) {
                add(self, v, sign);
            }
        }
        while next < self.vertices.len() && self.depth[next].abs() < DEEPEST {
            let (v, depth) = (self.vertices[next], self.depth[next] + sign);
            next += 1;
            for (u, _) in blocks.graph.neighbours(v) {
                if blocks.of[u as usize] == own {
                    add(self, u, depth);
                }
            }
        }
        // One vertex stays outside, so that no block can lose its last.
        if self.vertices.len() - begin >= blocks.size[own as usize] as usize
            && let Some(v) = self.vertices.pop()
        {
            self.depth.pop();
            self.node[v as usize] = NONE;
            weight -= blocks.graph.vertex_weight(v);
        }
        weight
    }

    /// Builds the network; answers the weight of the border as it is, as far as it can change.
    fn connect(&mut self, blocks: &Blocks<'_>, pair: [u32; 2]) -> i64 {
        self.network.clear();
        for &v in &self.vertices {
            self.network.add_node(blocks.graph.vertex_weight(v));
        }
        let mut border = 0;
        for (i, &v) in self.vertices.iter().enumerate() {
            let (at, own) = (i as u32 + 2, blocks.of[v as usize]);
            let mut outside = [0, 0];
            for (u, w) in blocks.graph.neighbours(v) {
                let (node, block) = (self.node[u as usize], blocks.of[u as usize]);
                if node == NONE {
                    let Some(side) = pair.iter().position(|&b| b == block) else { continue };
                    outside[side] += w;
                } else if node < at {
                    self.network.add_edge(at, node, w);
                } else {
                    continue;
                }
                border += if block == own { 0 } else { w };
            }
            for (end, &w) in outside.iter().enumerate() {
                if w > 0 {
                    self.network.add_edge(end as u32, at, w);
                }
            }
        }
        self.network.begin();
        border
    }

    /// Finds a cut below `cut` that leaves both sides within their limits; answers from which end it is taken.
    fn separate(&mut self, blocks: &Blocks<'_>, pair: [u32; 2], inside: [i64; 2], cut: i64) -> Option<usize> {
        let (weight, limit) = (pair.map(|b| blocks.weight[b as usize]), pair.map(|b| blocks.limit[b as usize]));
        let total = weight[0] + weight[1];
        let depth = &self.depth;
        // Deep in one's own block first.
        let worth = |end: usize| move |v: u32| [1, -1][end] * depth[v as usize - 2];
        let network = &mut self.network;
        if !network.fill(cut, self.budget) {
            return None;
        }
        let (mut gained, mut pierced) = (0, 0);
        while network.flow < cut {
            let mine = [0, 1].map(|s| weight[s] - inside[s] + network.reached_weight[s]);
            let fits = |s: &usize| mine[*s] <= limit[*s] && total - mine[*s] <= limit[1 - s];
            let lopsided = |s: &usize| (2 * mine[*s] - total).abs();
            if let Some(side) = (0..2).filter(fits).min_by_key(lopsided) {
                return Some(side);
            }
            let lighter = usize::from(mine[1] < mine[0]);
            // Half of what is missing at once, going by what piercing has gained so far.
            let missing = (total - mine[lighter] - limit[1 - lighter]).max(0);
            let n = ((missing as f64 / 2.0 * pierced as f64 / (gained as f64).max(1.0)) as usize).max(1);
            let before = network.reached_weight[lighter];
            let more = [lighter, 1 - lighter].into_iter().any(|end| !network.pierce(end, n, &worth(end)).is_empty());
            if !more || !network.fill(cut, self.budget) {
                return None;
            }
            gained += network.reached_weight[lighter] - before;
            pierced += n;
        }
        None
    }
}

/// Pairs of blocks with a common border, at least one of them active, with the vertices along it.
fn borders(blocks: &Blocks<'_>, active: &[bool]) -> Vec<([u32; 2], Vec<u32>)> {
    let mut along: Vec<([u32; 2], u32)> = Vec::new();
    for v in 0..blocks.of.len() as u32 {
        let a = blocks.of[v as usize];
        for &(b, _) in blocks.near(v) {
            if active[a as usize] || active[b as usize] {
                along.push(([a.min(b), a.max(b)], v));
            }
        }
    }
    along.sort_unstable();
    along.chunk_by(|x, y| x.0 == y.0).map(|c| (c[0].0, c.iter().map(|x| x.1).collect())).collect()
}
