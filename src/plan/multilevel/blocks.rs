//! Blocks of a graph, with what every vertex has to do with each.

use super::graph::Weighted;

/// Blocks, their weights, and for every vertex the weight of its edges to each block it touches.
#[derive(Clone, Debug)]
pub(super) struct Blocks<'g> {
    pub graph: &'g Weighted,
    pub of: Vec<u32>,
    pub weight: Vec<i64>,
    /// Vertices of each block; a last one is never taken away.
    pub size: Vec<u32>,
    /// Most weight of each block.
    pub limit: Vec<i64>,
    /// Weight of edges to the own block.
    inside: Vec<i64>,
    /// Other blocks vertex v touches: `near[starts[v]..]`, the first `n_near[v]` of them.
    starts: Vec<usize>,
    near: Vec<(u32, i64)>,
    n_near: Vec<u32>,
}

impl<'g> Blocks<'g> {
    pub fn new(graph: &'g Weighted, of: Vec<u32>, limit: Vec<i64>) -> Self {
        let n = graph.n_vertices();
        let (mut weight, mut size) = (vec![0; limit.len()], vec![0; limit.len()]);
        for (v, &b) in of.iter().enumerate() {
            weight[b as usize] += graph.vertex_weight(v as u32);
            size[b as usize] += 1;
        }
        let mut starts = Vec::with_capacity(n + 1);
        let mut end = 0;
        for v in 0..n as u32 {
            starts.push(end);
            end += graph.degree(v).min(limit.len() - 1);
        }
        starts.push(end);
        let mut blocks = Self {
            graph,
            of,
            weight,
            size,
            limit,
            inside: vec![0; n],
            starts,
            near: vec![(0, 0); end],
            n_near: vec![0; n],
        };
        for v in 0..n as u32 {
            let own = blocks.of[v as usize];
            for (u, w) in graph.neighbours(v) {
                let b = blocks.of[u as usize];
                if b == own {
                    blocks.inside[v as usize] += w;
                } else {
                    blocks.add(v, b, w);
                }
            }
        }
        blocks
    }

    pub fn n_blocks(&self) -> u32 {
        self.limit.len() as u32
    }

    /// Other blocks a vertex touches, with the weight of its edges there.
    pub fn near(&self, v: u32) -> &[(u32, i64)] {
        let start = self.starts[v as usize];
        &self.near[start..start + self.n_near[v as usize] as usize]
    }

    pub fn inside(&self, v: u32) -> i64 {
        self.inside[v as usize]
    }

    pub fn at_border(&self, v: u32) -> bool {
        self.n_near[v as usize] > 0
    }

    pub fn room(&self, b: u32) -> i64 {
        self.limit[b as usize] - self.weight[b as usize]
    }

    /// Weight above the limits, in all.
    pub fn excess(&self) -> i64 {
        self.weight.iter().zip(&self.limit).map(|(w, l)| (w - l).max(0)).sum()
    }

    pub fn cut(&self) -> i64 {
        let outside = |v: u32| self.near(v).iter().map(|n| n.1).sum::<i64>();
        (0..self.of.len() as u32).map(outside).sum::<i64>() / 2
    }

    fn add(&mut self, v: u32, b: u32, w: i64) {
        let start = self.starts[v as usize];
        let n = self.n_near[v as usize] as usize;
        if let Some(entry) = self.near[start..start + n].iter_mut().find(|e| e.0 == b) {
            entry.1 += w;
        } else {
            self.near[start + n] = (b, w);
            self.n_near[v as usize] += 1;
        }
    }

    /// Edges of positive weight only: what is down to 0 is not touched any more.
    fn subtract(&mut self, v: u32, b: u32, w: i64) {
        let start = self.starts[v as usize];
        let n = self.n_near[v as usize] as usize;
        let row = &mut self.near[start..start + n];
        if let Some(i) = row.iter().position(|e| e.0 == b) {
            row[i].1 -= w;
            if row[i].1 == 0 {
                row[i] = row[n - 1];
                self.n_near[v as usize] -= 1;
            }
        }
    }

    /// Moves a vertex.
    ///
    /// # Complexity
    /// O(degree · blocks its neighbours touch).
    pub fn put(&mut self, v: u32, to: u32) {
        let from = std::mem::replace(&mut self.of[v as usize], to);
        let w = self.graph.vertex_weight(v);
        self.weight[from as usize] -= w;
        self.size[from as usize] -= 1;
        self.weight[to as usize] += w;
        self.size[to as usize] += 1;
        let inside = self.inside[v as usize];
        let joined = self.near(v).iter().find(|n| n.0 == to).map_or(0, |n| n.1);
        self.subtract(v, to, joined);
        if inside > 0 {
            self.add(v, from, inside);
        }
        self.inside[v as usize] = joined;
        let graph = self.graph;
        for (u, w) in graph.neighbours(v) {
            let own = self.of[u as usize];
            if own == from {
                self.inside[u as usize] -= w;
            } else {
                self.subtract(u, from, w);
            }
            if own == to {
                self.inside[u as usize] += w;
            } else {
                self.add(u, to, w);
            }
        }
    }

    /// The best block for a vertex to move to, with the cut saved: one with room first, of equals the lighter.
    pub fn best_move(&self, v: u32) -> Option<(i64, u32)> {
        if self.size[self.of[v as usize] as usize] <= 1 {
            return None;
        }
        let weight = self.graph.vertex_weight(v);
        let key = |&(b, w): &(u32, i64)| {
            let room = self.room(b);
            (weight <= room, w, room)
        };
        let best = self.near(v).iter().max_by_key(|n| key(n))?;
        Some((best.1 - self.inside[v as usize], best.0))
    }

    pub fn fits(&self, v: u32, b: u32) -> bool {
        self.graph.vertex_weight(v) <= self.room(b)
    }
}
