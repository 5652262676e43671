//! What is placed, and where it may go.

/// One op of the graph that is placed.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    /// Time on an accelerator; `None` where the op does not run there.
    pub accelerator: Option<f64>,
    /// Time on a host's processor.
    pub host: f64,
    /// Time to carry the op's result between an accelerator and host memory, however many read it there.
    pub transfer: f64,
    /// Memory it takes on an accelerator.
    pub bytes: f64,
    /// Ops with the same label share a device; an op without one goes where it likes.
    pub colour: Option<i64>,
    /// Part of the backward half: its device follows from its colour, and stages need not be convex in it.
    pub backward: bool,
}

/// Accelerators of one kind and hosts of one kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Devices {
    pub n_accelerators: usize,
    pub n_hosts: usize,
    /// Bytes of one accelerator. Hosts have enough.
    pub memory: f64,
}

impl Devices {
    /// More devices than clusters are of no use.
    pub(super) fn at_most(self, n_clusters: usize) -> Self {
        Self { n_accelerators: self.n_accelerators.min(n_clusters), n_hosts: self.n_hosts.min(n_clusters), ..self }
    }
}

/// A checked problem: finite numbers, edges between ops that exist, no cycle.
///
/// # Units
/// All times in one unit, whichever the caller likes; a result is in the same unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    ops: Vec<Op>,
    edges: Vec<(usize, usize)>,
    devices: Devices,
    /// Every op after those it reads.
    order: Vec<usize>,
}

/// Where an op runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    Accelerator(usize),
    Host(usize),
}

/// A problem that makes no sense. Ops and edges are named by their position.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Malformed {
    #[error("op {op}: {field} is {value}; it must be finite and not negative")]
    Number { op: usize, field: &'static str, value: f64 },
    #[error("memory of an accelerator is {value} bytes; it must not be negative")]
    Memory { value: f64 },
    #[error("edge {edge} joins ops {from} and {to}, but there are only {n_ops}")]
    UnknownOp { edge: usize, from: usize, to: usize, n_ops: usize },
    #[error("op {op} depends on its own result by a cycle of edges")]
    Cycle { op: usize },
}

impl Problem {
    /// Checks and sorts.
    ///
    /// # Errors
    /// [`Malformed`], naming the first op, field or edge that is wrong.
    pub fn new(ops: Vec<Op>, mut edges: Vec<(usize, usize)>, devices: Devices) -> Result<Self, Malformed> {
        for (i, op) in ops.iter().enumerate() {
            let fields = [
                ("the time on an accelerator", op.accelerator.unwrap_or(0.0)),
                ("the time on a host", op.host),
                ("the time to transfer the result", op.transfer),
                ("the size", op.bytes),
            ];
            for (field, value) in fields {
                // Sums of 10^6 such numbers are still finite.
                if !(0.0..=f64::MAX / 1e6).contains(&value) {
                    return Err(Malformed::Number { op: i, field, value });
                }
            }
        }
        if devices.memory.is_nan() || devices.memory < 0.0 {
            return Err(Malformed::Memory { value: devices.memory });
        }
        let n_ops = ops.len();
        for (edge, &(from, to)) in edges.iter().enumerate() {
            if from >= n_ops || to >= n_ops {
                return Err(Malformed::UnknownOp { edge, from, to, n_ops });
            }
        }
        edges.sort_unstable();
        edges.dedup();
        let order = topological(n_ops, &edges).map_err(|op| Malformed::Cycle { op })?;
        Ok(Self { ops, edges, devices, order })
    }

    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Sorted, each once.
    pub fn edges(&self) -> &[(usize, usize)] {
        &self.edges
    }

    pub fn devices(&self) -> Devices {
        self.devices
    }

    pub fn order(&self) -> &[usize] {
        &self.order
    }
}

/// Every vertex after its predecessors, smallest first where there is a choice; a vertex on a cycle otherwise.
pub(super) fn topological(n: usize, edges: &[(usize, usize)]) -> Result<Vec<usize>, usize> {
    let successors = adjacency(n, edges.iter().copied());
    let mut waits = vec![0_usize; n];
    edges.iter().for_each(|&(_, to)| waits[to] += 1);
    let mut ready: std::collections::BTreeSet<usize> = (0..n).filter(|&v| waits[v] == 0).collect();
    let mut order = Vec::with_capacity(n);
    while let Some(v) = ready.pop_first() {
        order.push(v);
        for &w in &successors[v] {
            waits[w] -= 1;
            if waits[w] == 0 {
                ready.insert(w);
            }
        }
    }
    if order.len() == n {
        return Ok(order);
    }
    // What never became ready has a predecessor of the same sort: walking back ends on a cycle.
    let predecessors = adjacency(n, edges.iter().map(|&(from, to)| (to, from)));
    let mut v = (0..n).find(|&v| waits[v] > 0).unwrap_or(0);
    for _ in 0..n {
        v = predecessors[v].iter().copied().find(|&u| waits[u] > 0).unwrap_or(v);
    }
    Err(v)
}

/// Neighbours of every vertex, in the order of the edges.
pub(super) fn adjacency(n: usize, edges: impl Iterator<Item = (usize, usize)>) -> Vec<Vec<usize>> {
    let mut out = vec![Vec::new(); n];
    edges.for_each(|(from, to)| out[from].push(to));
    out
}
