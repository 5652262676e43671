//! A maximum flow between two sets of terminals that may grow.

pub(super) const NONE: u32 = u32::MAX;
const ROOT: u32 = u32::MAX - 1;
const FREE: u8 = 2;

/// Which terminal: 0 the source, 1 the sink.
pub(super) type End = usize;

#[derive(Clone, Copy, Debug)]
struct Arc {
    head: u32,
    /// The same edge seen from its head.
    back: u32,
    /// What still fits through.
    left: i64,
}

/// An undirected network; node 0 is the source, node 1 the sink.
///
/// Both ends grow a tree of residual arcs. Where the trees meet, flow is sent and what hung on full arcs is adopted by
/// other parents or let go. In the end a tree holds exactly what its end reaches.
///
/// # Source
/// Boykov and Kolmogorov, "An experimental comparison of min-cut/max-flow algorithms", PAMI 2004. Short paths between
/// wide fronts, as in corridors, are what it is good at.
#[derive(Default)]
pub(super) struct Network {
    edges: Vec<(u32, u32, i64)>,
    starts: Vec<u32>,
    arcs: Vec<Arc>,
    weight: Vec<i64>,
    pub flow: i64,
    /// 0 and 1: reached from that end; or free.
    tree: Vec<u8>,
    /// Arc to the parent.
    parent: Vec<u32>,
    /// Distance to the root when last looked up, and when that was.
    distance: Vec<u32>,
    seen: Vec<u32>,
    time: u32,
    active: std::collections::VecDeque<u32>,
    is_active: Vec<bool>,
    orphans: Vec<u32>,
    pub reached_weight: [i64; 2],
    /// Nodes beyond full arcs, when they were met.
    candidates: [Vec<u32>; 2],
    /// Arcs looked at, over all uses.
    pub work: usize,
}

impl Network {
    pub fn clear(&mut self) {
        self.edges.clear();
        self.weight.clear();
        self.weight.extend([0, 0]);
    }

    pub fn add_node(&mut self, weight: i64) {
        self.weight.push(weight);
    }

    /// An edge of the same capacity both ways.
    pub fn add_edge(&mut self, a: u32, b: u32, capacity: i64) {
        self.edges.push((a, b, capacity));
    }

    /// To be called once all edges are there.
    pub fn begin(&mut self) {
        let n = self.weight.len();
        self.starts.clear();
        self.starts.resize(n + 1, 0);
        for &(a, b, _) in &self.edges {
            self.starts[a as usize + 1] += 1;
            self.starts[b as usize + 1] += 1;
        }
        for v in 0..n {
            self.starts[v + 1] += self.starts[v];
        }
        self.arcs.clear();
        self.arcs.resize(2 * self.edges.len(), Arc { head: 0, back: 0, left: 0 });
        // Filled from the back, so that in the end each start is a start.
        for &(a, b, left) in self.edges.iter().rev() {
            self.starts[a as usize + 1] -= 1;
            self.starts[b as usize + 1] -= 1;
            let (at, back) = (self.starts[a as usize + 1], self.starts[b as usize + 1]);
            self.arcs[at as usize] = Arc { head: b, back, left };
            self.arcs[back as usize] = Arc { head: a, back: at, left };
        }
        self.starts.remove(0);
        self.starts.push(2 * self.edges.len() as u32);
        self.work += 2 * self.edges.len();
        self.flow = 0;
        self.time = 0;
        self.active.clear();
        self.orphans.clear();
        fill(&mut self.tree, n, FREE);
        fill(&mut self.parent, n, NONE);
        fill(&mut self.distance, n, 0);
        fill(&mut self.seen, n, 0);
        fill(&mut self.is_active, n, false);
        self.reached_weight = [0, 0];
        for end in 0..2 {
            self.candidates[end].clear();
            self.join(end as u32, end, ROOT);
        }
    }

    pub fn is_reached(&self, end: End, v: u32) -> bool {
        self.tree[v as usize] as usize == end
    }

    fn row(&self, v: u32) -> std::ops::Range<u32> {
        self.starts[v as usize]..self.starts[v as usize + 1]
    }

    /// What fits through an arc, seen along the flow: trees of the sink are followed backwards.
    fn left(&self, end: End, arc: u32) -> i64 {
        let arc = &self.arcs[arc as usize];
        if end == 0 { arc.left } else { self.arcs[arc.back as usize].left }
    }

    fn join(&mut self, v: u32, end: End, parent: u32) {
        self.tree[v as usize] = end as u8;
        self.parent[v as usize] = parent;
        self.reached_weight[end] += self.weight[v as usize];
        self.activate(v);
    }

    fn activate(&mut self, v: u32) {
        if !std::mem::replace(&mut self.is_active[v as usize], true) {
            self.active.push_back(v);
        }
    }

    /// Makes the flow maximal, or at least `enough`; false when `budget` runs out.
    pub fn fill(&mut self, enough: i64, budget: usize) -> bool {
        while let Some(&v) = self.active.front() {
            if self.flow >= enough || self.work > budget {
                return self.flow >= enough;
            }
            match self.meet(v) {
                Some((arc, end)) => {
                    self.send(arc, end);
                    self.time += 1;
                    while let Some(orphan) = self.orphans.pop() {
                        self.adopt(orphan);
                    }
                }
                None => {
                    self.active.pop_front();
                    self.is_active[v as usize] = false;
                }
            }
        }
        true
    }

    /// Grows a tree from a node; answers an arc to the other tree, if one is met.
    fn meet(&mut self, v: u32) -> Option<(u32, End)> {
        if self.tree[v as usize] == FREE {
            return None;
        }
        let end = self.tree[v as usize] as usize;
        self.work += self.row(v).len();
        for arc in self.row(v) {
            let u = self.arcs[arc as usize].head;
            let theirs = self.tree[u as usize];
            if theirs as usize == end {
                continue;
            }
            if self.left(end, arc) == 0 {
                self.candidates[end].push(u);
            } else if theirs == FREE {
                self.join(u, end, self.arcs[arc as usize].back);
                self.distance[u as usize] = self.distance[v as usize] + 1;
                self.seen[u as usize] = self.seen[v as usize];
            } else {
                return Some((arc, end));
            }
        }
        None
    }

    /// Sends flow along both trees and over the arc where they meet.
    fn send(&mut self, arc: u32, end: End) {
        // As seen from the source.
        let bridge = if end == 0 { arc } else { self.arcs[arc as usize].back };
        let from = self.arcs[self.arcs[bridge as usize].back as usize].head;
        let to = self.arcs[bridge as usize].head;
        let mut most = self.arcs[bridge as usize].left;
        for (end, start) in [(0, from), (1, to)] {
            let mut v = start;
            while self.parent[v as usize] != ROOT {
                let up = self.parent[v as usize];
                most = most.min(self.left(1 - end, up));
                v = self.arcs[up as usize].head;
            }
        }
        self.push(bridge, most);
        for (end, start) in [(0, from), (1, to)] {
            let mut v = start;
            while self.parent[v as usize] != ROOT {
                let up = self.parent[v as usize];
                let along = if end == 0 { self.arcs[up as usize].back } else { up };
                self.push(along, most);
                if self.arcs[along as usize].left == 0 {
                    self.parent[v as usize] = NONE;
                    self.orphans.push(v);
                }
                v = self.arcs[up as usize].head;
                self.work += 2;
            }
        }
        self.flow += most;
    }

    fn push(&mut self, arc: u32, amount: i64) {
        self.arcs[arc as usize].left -= amount;
        let back = self.arcs[arc as usize].back;
        self.arcs[back as usize].left += amount;
    }

    /// Finds another parent for a node, or lets it go.
    fn adopt(&mut self, v: u32) {
        // Pierced in the meantime.
        if self.parent[v as usize] != NONE {
            return;
        }
        let end = self.tree[v as usize] as usize;
        let mut best = (u32::MAX, NONE);
        self.work += self.row(v).len();
        for arc in self.row(v) {
            let u = self.arcs[arc as usize].head;
            if self.tree[u as usize] as usize != end || self.left(1 - end, arc) == 0 {
                continue;
            }
            if let Some(distance) = self.distance_to_root(u)
                && distance < best.0
            {
                best = (distance, arc);
            }
        }
        if best.1 != NONE {
            self.parent[v as usize] = best.1;
            self.distance[v as usize] = best.0 + 1;
            self.seen[v as usize] = self.time;
            return;
        }
        self.tree[v as usize] = FREE;
        self.reached_weight[end] -= self.weight[v as usize];
        self.candidates[end].push(v);
        self.let_go(v, end);
    }

    /// Neighbours in the tree that a node has left: children are orphans, others may grow back to it.
    fn let_go(&mut self, v: u32, end: End) {
        for arc in self.row(v) {
            let u = self.arcs[arc as usize].head;
            if self.tree[u as usize] as usize != end {
                continue;
            }
            if self.left(1 - end, arc) > 0 {
                self.activate(u);
            }
            let up = self.parent[u as usize];
            if up != NONE && up != ROOT && self.arcs[up as usize].head == v {
                self.parent[u as usize] = NONE;
                self.orphans.push(u);
            }
        }
    }

    /// Distance to the root, if the node is still connected to one.
    fn distance_to_root(&mut self, from: u32) -> Option<u32> {
        let mut v = from;
        let mut steps = 0;
        let distance = loop {
            if self.seen[v as usize] == self.time && self.time > 0 {
                break steps + self.distance[v as usize];
            }
            match self.parent[v as usize] {
                NONE => return None,
                ROOT => {
                    self.seen[v as usize] = self.time;
                    self.distance[v as usize] = 0;
                    break steps;
                }
                up => v = self.arcs[up as usize].head,
            }
            steps += 1;
            self.work += 1;
        };
        let (mut v, mut left) = (from, distance);
        while self.seen[v as usize] != self.time {
            self.seen[v as usize] = self.time;
            self.distance[v as usize] = left;
            left -= 1;
            let up = self.parent[v as usize];
            v = self.arcs[up as usize].head;
        }
        Some(distance)
    }

    /// Makes up to `n` more nodes terminals of one end: those just beyond its reach with the highest `worth`, first
    /// among those that need no more flow. Answers which; to be followed by [`Network::fill`].
    pub fn pierce(&mut self, end: End, n: usize, worth: &dyn Fn(u32) -> i32) -> Vec<u32> {
        let mut candidates = std::mem::take(&mut self.candidates[end]);
        candidates.sort_unstable();
        candidates.dedup();
        candidates.retain(|&v| {
            let other_root = self.tree[v as usize] as usize == 1 - end && self.parent[v as usize] == ROOT;
            self.tree[v as usize] as usize != end && !other_root
        });
        candidates.sort_by_key(|&v| (self.tree[v as usize] != FREE, -worth(v)));
        let mut chosen = Vec::new();
        for &v in &candidates {
            if self.row(v).any(|arc| self.tree[self.arcs[arc as usize].head as usize] as usize == end) {
                chosen.push(v);
                if chosen.len() == n {
                    break;
                }
            }
        }
        let needs_flow = |net: &Self, v: u32| net.tree[v as usize] != FREE;
        let first = chosen.first().is_some_and(|&v| needs_flow(self, v));
        chosen.retain(|&v| needs_flow(self, v) == first);
        self.candidates[end] = candidates;
        self.time += 1;
        for &v in &chosen {
            if self.tree[v as usize] != FREE {
                self.reached_weight[1 - end] -= self.weight[v as usize];
                self.tree[v as usize] = FREE;
                self.let_go(v, 1 - end);
            }
            self.join(v, end, ROOT);
            self.distance[v as usize] = 0;
        }
        while let Some(orphan) = self.orphans.pop() {
            self.adopt(orphan);
        }
        chosen
    }
}

fn fill<T: Clone>(list: &mut Vec<T>, n: usize, value: T) {
    list.clear();
    list.resize(n, value);
}
