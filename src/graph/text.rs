//! A graph as text: one line per op, for people and for `diff`.

use std::fmt::Write;

use super::ir::{Graph, OpId};

/// `%name = f32[2,3] add(%a, %b)  scope`, entry parameters and results marked.
pub fn render(graph: &Graph) -> String {
    let mut out = format!("graph {}: {} ops\n", graph.name, graph.n_ops());
    let name = |id: OpId| format!("%{}", id.0);
    for (id, op) in graph.ops() {
        let operands: Vec<String> = op.operands.iter().map(|&o| name(o)).collect();
        let called: Vec<&str> = op.called.iter().map(|&c| graph.computation(c).name.as_str()).collect();
        // Parameters stand in ascending order.
        let number = graph.parameters().binary_search(&id).ok().map(|n| n.to_string());
        let arguments = number.unwrap_or_else(|| operands.join(", "));
        let _ = write!(out, "{} = {} {}({arguments})", name(id), op.shape, op.opcode);
        if !called.is_empty() {
            let _ = write!(out, " calls {}", called.join(", "));
        }
        let _ = writeln!(out, "{}", op.scope().map_or(String::new(), |s| format!("  # {s}")));
    }
    let outputs: Vec<String> = graph.outputs().iter().map(|&o| name(o)).collect();
    let _ = writeln!(out, "yields ({})", outputs.join(", "));
    out
}
