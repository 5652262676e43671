//! Cutting a part of a graph out as a graph of its own.

use super::ir::{Graph, OpId};

/// The graph of `ops` (ascending), with one parameter for each of `inputs` and one output for each of `outputs`.
///
/// An entry parameter of `graph` may stand in `inputs` like any other op. Every operand of an op in `ops` must be
/// in `ops` or `inputs`; every output must be too.
pub fn cut(_graph: &Graph, _name: &str, _ops: &[OpId], _inputs: &[OpId], _outputs: &[OpId]) -> Graph {
    unimplemented!()
}
