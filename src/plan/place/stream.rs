//! The forward half as a graph of clusters without cycles: what a pipeline's stages may be cut from.

use std::collections::BTreeSet;

use petgraph::algo::kosaraju_scc;
use petgraph::graph::DiGraph;

use super::clusters::Clusters;
use super::problem::Problem;

/// Clusters in an order that goes downstream, with what each must come after.
#[derive(Clone, Debug)]
pub struct Stream {
    pub clusters: Clusters,
    /// Cluster of every op of the problem.
    pub of: Vec<usize>,
    /// Edges between clusters, from smaller to larger numbers.
    pub edges: Vec<(usize, usize)>,
}

impl Stream {
    /// Contracts a problem until every convex set of the result is one a stage may hold.
    ///
    /// 1. Ops of one colour are one cluster; edges between forward ops order clusters.
    /// 2. A cluster without forward ops is ordered as the mirror image of its backward edges.
    /// 3. Clusters on a cycle are one: no convex set holds only some of them.
    ///
    /// # Source
    /// Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020), whose
    /// released program does the same in the same order.
    pub fn new(problem: &Problem) -> Self {
        let (clusters, of) = Clusters::of_problem(problem);
        let ops = problem.ops();
        let mut forward = vec![false; clusters.len()];
        ops.iter().zip(&of).for_each(|(op, &c)| forward[c] |= !op.backward);
        let mut edges = BTreeSet::new();
        for &(from, to) in problem.edges() {
            let (a, b) = (of[from], of[to]);
            match (ops[from].backward, ops[to].backward) {
                (false, false) if a != b => drop(edges.insert((a, b))),
                (true, true) if a != b && !(forward[a] && forward[b]) => drop(edges.insert((b, a))),
                _ => {}
            }
        }
        let edges = edges.into_iter().collect();
        Self { clusters, of, edges }.fused(&[])
    }

    /// Lets a cluster without work that hangs on one other go where that goes.
    ///
    /// This costs nothing and keeps the number of downsets small. With memory so scarce that a place for such a cluster
    /// matters, better stages are missed.
    pub fn folded(mut self) -> Self {
        loop {
            let leaves = self.leaves();
            if leaves.is_empty() {
                return self;
            }
            self = self.fused(&leaves);
        }
    }

    /// The same with cluster `order[i]` as number `i`; `order` goes downstream.
    pub fn reordered(&self, order: &[usize]) -> Self {
        let mut position = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, &v)| position[v] = i);
        self.renamed(&position, order.len())
    }

    /// Makes every pair one cluster, and everything on a cycle too.
    fn fused(&self, pairs: &[(usize, usize)]) -> Self {
        let n_old = self.clusters.len();
        let mut graph = DiGraph::<(), ()>::with_capacity(n_old, self.edges.len() + 2 * pairs.len());
        let vertices: Vec<_> = (0..n_old).map(|_| graph.add_node(())).collect();
        let both = pairs.iter().flat_map(|&(a, b)| [(a, b), (b, a)]);
        for (a, b) in self.edges.iter().copied().chain(both) {
            graph.add_edge(vertices[a], vertices[b], ());
        }
        // Upstream components come last.
        let components = kosaraju_scc(&graph);
        let n = components.len();
        let mut map = vec![0; n_old];
        for (i, component) in components.iter().rev().enumerate() {
            component.iter().for_each(|v| map[v.index()] = i);
        }
        self.renamed(&map, n)
    }

    fn renamed(&self, map: &[usize], n: usize) -> Self {
        let edges: BTreeSet<(usize, usize)> =
            self.edges.iter().map(|&(a, b)| (map[a], map[b])).filter(|(a, b)| a != b).collect();
        Self {
            clusters: self.clusters.merged(map, n),
            of: self.of.iter().map(|&c| map[c]).collect(),
            edges: edges.into_iter().collect(),
        }
    }

    /// Clusters that may go where their only neighbour goes, each with that neighbour.
    fn leaves(&self) -> Vec<(usize, usize)> {
        let clusters = &self.clusters;
        let n = clusters.len();
        let negligible = 1e-9 * clusters.host.iter().sum::<f64>();
        let mut neighbours = vec![BTreeSet::new(); n];
        for &(a, b) in &self.edges {
            neighbours[a].insert(b);
            neighbours[b].insert(a);
        }
        let nets_of = clusters.nets_of();
        let only = |v: usize| {
            let &u = neighbours[v].first().filter(|_| neighbours[v].len() == 1)?;
            let idle = clusters.host[v] <= negligible && clusters.accelerator[v] <= negligible;
            let follows = nets_of[v].iter().all(|&net| clusters.nets[net].1.binary_search(&u).is_ok());
            (idle && follows).then_some((v, u))
        };
        (0..n).filter_map(only).collect()
    }
}
