//! A directed graph without cycles.

/// Edges that are no directed acyclic graph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDag {
    #[error("edge {from} -> {to} names a node that is not below {n_nodes}")]
    OutOfRange { from: usize, to: usize, n_nodes: usize },
    #[error("node {node} is on a cycle; a computation cannot depend on itself")]
    Cycle { node: usize },
}

/// Nodes are numbers; edges that are named twice count once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dag {
    before: Vec<Vec<u32>>,
    after: Vec<Vec<u32>>,
}

impl Dag {
    /// # Errors
    /// [`InvalidDag`] for ends out of range and for cycles.
    pub fn new(n_nodes: usize, edges: &[(usize, usize)]) -> Result<Self, InvalidDag> {
        let mut before = vec![Vec::new(); n_nodes];
        let mut after = vec![Vec::new(); n_nodes];
        for &(from, to) in edges {
            if from >= n_nodes || to >= n_nodes {
                return Err(InvalidDag::OutOfRange { from, to, n_nodes });
            }
            before[to].push(from as u32);
            after[from].push(to as u32);
        }
        for list in before.iter_mut().chain(&mut after) {
            list.sort_unstable();
            list.dedup();
        }
        let dag = Self { before, after };
        let mut missing: Vec<usize> = dag.before.iter().map(Vec::len).collect();
        let mut ready: Vec<usize> = (0..n_nodes).filter(|&v| missing[v] == 0).collect();
        let mut n_done = 0;
        while let Some(v) = ready.pop() {
            n_done += 1;
            for &u in &dag.after[v] {
                missing[u as usize] -= 1;
                if missing[u as usize] == 0 {
                    ready.push(u as usize);
                }
            }
        }
        if n_done < n_nodes {
            // Whoever walks backwards among what never became ready comes round a cycle.
            let stuck = |v: usize| missing[v] > 0;
            let mut node = (0..n_nodes).find(|&v| stuck(v)).unwrap_or(0);
            for _ in 0..n_nodes {
                node = dag.before[node].iter().map(|&u| u as usize).find(|&u| stuck(u)).unwrap_or(node);
            }
            return Err(InvalidDag::Cycle { node });
        }
        Ok(dag)
    }

    pub fn n_nodes(&self) -> usize {
        self.before.len()
    }

    pub fn before(&self, v: usize) -> &[u32] {
        &self.before[v]
    }

    pub fn after(&self, v: usize) -> &[u32] {
        &self.after[v]
    }
}

/// A graph with every chain as one node: where a node is the only one after another, which is the only one before it,
/// both are in one chain.
#[derive(Clone, Debug)]
pub struct Chains {
    pub dag: Dag,
    /// Members of each chain in order.
    pub nodes: Vec<Vec<usize>>,
}

impl Chains {
    pub fn of(dag: &Dag) -> Self {
        let next = |v: usize| match dag.after(v) {
            &[u] if dag.before(u as usize).len() == 1 => Some(u as usize),
            _ => None,
        };
        let mut begins = vec![true; dag.n_nodes()];
        for v in 0..dag.n_nodes() {
            if let Some(u) = next(v) {
                begins[u] = false;
            }
        }
        let mut chain = vec![0; dag.n_nodes()];
        let mut nodes: Vec<Vec<usize>> = Vec::new();
        for begin in (0..dag.n_nodes()).filter(|&v| begins[v]) {
            let members: Vec<usize> = std::iter::successors(Some(begin), |&v| next(v)).collect();
            for &v in &members {
                chain[v] = nodes.len();
            }
            nodes.push(members);
        }
        let (mut before, mut after) = (vec![Vec::new(); nodes.len()], vec![Vec::new(); nodes.len()]);
        for v in 0..dag.n_nodes() {
            for &u in dag.after(v) {
                let (from, to) = (chain[v], chain[u as usize]);
                if from != to {
                    after[from].push(to as u32);
                    before[to].push(from as u32);
                }
            }
        }
        for list in before.iter_mut().chain(&mut after) {
            list.sort_unstable();
            list.dedup();
        }
        Self { dag: Dag { before, after }, nodes }
    }

    /// Sum over the members of each chain.
    pub fn sum(&self, values: &[f64]) -> Vec<f64> {
        self.nodes.iter().map(|c| c.iter().map(|&v| values[v]).sum()).collect()
    }
}
