//! A coordinate for every op: where along the model it belongs.
//!
//! A training step is cut along its forward half: ops that the loss or a metric needs, numbered in the order of the
//! module. A backward op takes the coordinate of the forward op whose derivative it belongs to: the latest one, not
//! after the gradient that comes in, that reads the same residual or param. Cutting at a coordinate then keeps a
//! layer's forward, backward and weight-gradient ops together.

use crate::cost::OpCost;
use crate::graph::{Graph, OpId, Shape};

/// Values up to this size are computed wherever they are needed, when nothing they depend on is placed.
const EVERYWHERE: u64 = 64 << 10;

/// Coordinates of one grad graph.
#[derive(Clone, Debug)]
pub struct Coordinates {
    /// By op; `None` for ops computed everywhere.
    pub of: Vec<Option<u32>>,
    /// Coordinates are below this.
    pub n: u32,
    /// By op: part of the forward half.
    pub forward: Vec<bool>,
}

/// Assigns coordinates.
///
/// # Shapes
/// `n_params`: leading entry parameters that are placed; the others (batch, key) are known everywhere. `n_scalars`:
/// leading outputs that make up the forward half.
/// # Complexity
/// O(ops + operands · log users).
pub fn coordinates(graph: &Graph, n_params: usize, n_scalars: usize, costs: &[OpCost]) -> Coordinates {
    let everywhere = everywhere(graph, n_params, costs);
    let forward = ancestors(graph, &graph.outputs()[..n_scalars]);
    let mut of: Vec<Option<u32>> = vec![None; graph.n_ops()];
    let mut n = 0;
    for (id, op) in graph.ops() {
        let i = id.index();
        if everywhere[i] || !forward[i] || is_parameter(op) {
            continue;
        }
        // Elements stay with their tuple.
        of[i] = match (&*op.opcode, op.operands.first()) {
            ("get-tuple-element", Some(tuple)) => of[tuple.index()],
            _ => None,
        };
        if of[i].is_none() {
            of[i] = Some(n);
            n += 1;
        }
    }
    let n = n.max(1);
    // By value: coordinates of its forward readers, ascending.
    let readers: Vec<Vec<u32>> = graph
        .ops()
        .map(|(id, _)| {
            // Everyone reads what is everywhere: that tells nothing.
            if everywhere[id.index()] {
                return Vec::new();
            }
            let users = graph.users(id).iter().filter(|u| forward[u.index()]);
            let mut at: Vec<u32> = users.filter_map(|u| of[u.index()]).collect();
            at.sort_unstable();
            at
        })
        .collect();
    for (id, op) in graph.ops() {
        if everywhere[id.index()] || forward[id.index()] || is_parameter(op) {
            continue;
        }
        let tuple = matches!(&*op.opcode, "get-tuple-element").then(|| of[op.operands[0].index()]).flatten();
        of[id.index()] = tuple.or_else(|| backward(graph, op, &of, &forward, &readers, n));
    }
    // What only transforms params or forward values goes where it is first used; params go to their first reader.
    for (id, op) in graph.ops().rev() {
        let i = id.index();
        if of[i].is_none() && !everywhere[i] {
            let users = graph.users(id).iter().filter(|u| forward[u.index()] || !forward[i]);
            of[i] = users.filter_map(|u| of[u.index()]).min();
            if of[i].is_none() {
                of[i] = graph.users(id).iter().filter_map(|u| of[u.index()]).min();
            }
            if let (None, false) = (of[i], is_parameter(op)) {
                of[i] = op.operands.iter().filter_map(|o| of[o.index()]).min().or(Some(0));
            }
        }
    }
    for (i, at) in of.iter_mut().enumerate() {
        if !everywhere[i] {
            at.get_or_insert(0);
        }
    }
    Coordinates { of, n, forward }
}

fn is_parameter(op: &crate::graph::Op) -> bool {
    &*op.opcode == "parameter"
}

/// Coordinate of a backward op from what it reads; `None` when it reads nothing with one.
fn backward(
    graph: &Graph,
    op: &crate::graph::Op,
    of: &[Option<u32>],
    forward: &[bool],
    readers: &[Vec<u32>],
    n: u32,
) -> Option<u32> {
    let is_gradient = |o: &OpId| !forward[o.index()] && !is_parameter(graph.op(*o)) && of[o.index()].is_some();
    let incoming = op.operands.iter().filter(|o| is_gradient(o)).filter_map(|o| of[o.index()]).min();
    let limit = incoming.unwrap_or(n);
    let read = op
        .operands
        .iter()
        .filter(|o| !is_gradient(o))
        .filter_map(|o| {
            let readers = &readers[o.index()];
            let below = readers.partition_point(|&r| r <= limit);
            match below {
                0 => of[o.index()].filter(|_| !is_parameter(graph.op(*o))),
                k => Some(readers[k - 1]),
            }
        })
        .max();
    match (incoming, read) {
        (Some(incoming), Some(read)) => Some(read.min(incoming)),
        (incoming, read) => read.or(incoming),
    }
}

/// Ops whose value every shard computes for itself: nothing they read is placed, and they are cheap.
fn everywhere(graph: &Graph, n_params: usize, costs: &[OpCost]) -> Vec<bool> {
    let mut everywhere = vec![false; graph.n_ops()];
    for (i, &p) in graph.parameters().iter().enumerate() {
        everywhere[p.index()] = i >= n_params;
    }
    for (id, op) in graph.ops() {
        if is_parameter(op) || !op.operands.iter().all(|o| everywhere[o.index()]) {
            continue;
        }
        let trivial = matches!(&*op.opcode, "constant" | "iota" | "broadcast");
        let small = op.shape.bytes().0 <= EVERYWHERE && costs[id.index()].bytes.0 <= 4 * EVERYWHERE;
        everywhere[id.index()] = (trivial || small) && !matches!(op.shape, Shape::Token);
    }
    everywhere
}

/// By op: whether one of these needs it, or is it.
pub(super) fn ancestors(graph: &Graph, of: &[OpId]) -> Vec<bool> {
    let mut found = vec![false; graph.n_ops()];
    of.iter().for_each(|o| found[o.index()] = true);
    for (id, op) in graph.ops().rev() {
        if found[id.index()] {
            op.operands.iter().for_each(|o| found[o.index()] = true);
        }
    }
    found
}
