//! Makes a graph narrow: nodes are joined, the lightest first, until few prefixes are left.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use super::dag::Dag;
use super::ideals::Ideals;

/// Prefixes of the graph that split no group of joined nodes, no more than `most`; `None` where joining does not help.
///
/// A node is joined with its only predecessor or its only successor, so no cycle can arise. Among these pairs the one
/// with the least `size` together goes first: what is left apart is what matters.
///
/// # Complexity
/// O(edges · log edges), and O(most · n) for each of about 10 · log n attempts.
pub fn narrow(dag: &Dag, size: &[f64], most: usize) -> Option<Ideals> {
    let mut groups = Groups::new(dag, size);
    let mut heap: BinaryHeap<Reverse<Pair>> = BinaryHeap::new();
    for v in 0..dag.n_nodes() {
        groups.offer(v, &mut heap);
    }
    let mut next = groups.n_alive;
    while let Some(Reverse(pair)) = heap.pop() {
        let (from, to) = (pair.from, pair.to);
        if !groups.can_join(from, to) || groups.size[from] + groups.size[to] != pair.size {
            continue;
        }
        groups.join(from, to);
        groups.offer(from, &mut heap);
        let around: Vec<usize> = groups.before[from].iter().chain(&groups.after[from]).copied().collect();
        around.into_iter().for_each(|v| groups.offer(v, &mut heap));
        if groups.n_alive < next {
            if let Some(found) = groups.ideals(dag, most) {
                return Some(found);
            }
            next = groups.n_alive - groups.n_alive / 16;
        }
    }
    groups.ideals(dag, most)
}

/// An edge between groups, ordered by the size of both.
#[derive(Clone, Copy, PartialEq)]
struct Pair {
    size: f64,
    from: usize,
    to: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.size.total_cmp(&other.size).then((self.from, self.to).cmp(&(other.from, other.to)))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Groups are named by one of their nodes; the others are gone.
struct Groups {
    members: Vec<Vec<usize>>,
    before: Vec<BTreeSet<usize>>,
    after: Vec<BTreeSet<usize>>,
    size: Vec<f64>,
    n_alive: usize,
}

impl Groups {
    fn new(dag: &Dag, size: &[f64]) -> Self {
        let n = dag.n_nodes();
        Self {
            members: (0..n).map(|v| vec![v]).collect(),
            before: (0..n).map(|v| dag.before(v).iter().map(|&u| u as usize).collect()).collect(),
            after: (0..n).map(|v| dag.after(v).iter().map(|&u| u as usize).collect()).collect(),
            size: size.to_vec(),
            n_alive: n,
        }
    }

    fn can_join(&self, from: usize, to: usize) -> bool {
        self.after[from].contains(&to) && (self.before[to].len() == 1 || self.after[from].len() == 1)
    }

    /// Puts what a group can be joined with on the heap.
    fn offer(&self, v: usize, heap: &mut BinaryHeap<Reverse<Pair>>) {
        let pairs = self.before[v].iter().map(|&u| (u, v)).chain(self.after[v].iter().map(|&u| (v, u)));
        for (from, to) in pairs.filter(|&(from, to)| self.can_join(from, to)) {
            heap.push(Reverse(Pair { size: self.size[from] + self.size[to], from, to }));
        }
    }

    fn join(&mut self, from: usize, to: usize) {
        let members = std::mem::take(&mut self.members[to]);
        self.members[from].extend(members);
        self.size[from] += self.size[to];
        for u in std::mem::take(&mut self.before[to]) {
            self.after[u].remove(&to);
            if u != from {
                self.after[u].insert(from);
                self.before[from].insert(u);
            }
        }
        for u in std::mem::take(&mut self.after[to]) {
            self.before[u].remove(&to);
            self.before[u].insert(from);
            self.after[from].insert(u);
        }
        self.n_alive -= 1;
    }

    /// All ideals of the groups, as ideals of the graph.
    fn ideals(&self, dag: &Dag, most: usize) -> Option<Ideals> {
        let alive: Vec<usize> = (0..self.members.len()).filter(|&v| !self.members[v].is_empty()).collect();
        let number: BTreeMap<usize, usize> = alive.iter().enumerate().map(|(i, &v)| (v, i)).collect();
        let edges: Vec<(usize, usize)> =
            alive.iter().flat_map(|v| self.after[*v].iter().map(|u| (number[v], number[u]))).collect();
        // Joining makes no cycles.
        let coarse = Ideals::all(&Dag::new(alive.len(), &edges).ok()?, most)?;
        let n_words = dag.n_nodes().div_ceil(64).max(1);
        let set = |i: usize| {
            let mut set = vec![0u64; n_words];
            for (_, &v) in alive.iter().enumerate().filter(|&(g, _)| coarse.has(i, g)) {
                self.members[v].iter().for_each(|&m| set[m / 64] |= 1 << (m % 64));
            }
            set
        };
        Some(Ideals::of(dag, (0..coarse.len()).map(set).collect()))
    }
}
