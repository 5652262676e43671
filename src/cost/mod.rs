//! What ops cost: floating point operations and bytes moved, and the time they take on a device.
//!
//! Analytic, from shapes alone. XLA fuses chains of elementwise ops: a value that only elementwise ops read is taken to
//! stay in registers. `cost` knows nothing of plans and measures nothing; where a device has been measured, its factors
//! correct what is computed here.

use crate::graph::passes;
use crate::graph::proto::{all_numbers, find, instruction};
use crate::graph::{CompId, Graph, Op, OpId};
use crate::profile::Terms;
use crate::topology::{Class, Device, Measured, Rates};
use crate::units::{Bytes, Flops, Seconds};

/// Work of one op.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OpCost {
    pub flops: Flops,
    /// Read from and written to memory.
    pub bytes: Bytes,
    /// Starts a kernel of its own: pays the device's overhead.
    pub launches: bool,
    pub class: Class,
}

impl OpCost {
    /// Time on a device: arithmetic or memory, whichever is slower; corrected where the device has been measured.
    pub fn time(&self, device: &Device) -> Seconds {
        self.terms(device).time(&device.measured.unwrap_or(Measured::NOMINAL))
    }

    /// Nominal time on a device at its speed, by what bounds it.
    pub fn terms(&self, device: &Device) -> Terms {
        self.at_full_speed(&device.rates()) / device.speed
    }

    /// Nominal time on a device at speed 1.
    pub fn at_full_speed(&self, rates: &Rates) -> Terms {
        let work = (self.flops / rates.flops).max(self.bytes / rates.bandwidth);
        Terms::new(self.class, work, if self.launches { rates.overhead } else { Seconds(0.0) })
    }
}

/// Cost of every op of a graph. Index: [`OpId`].
///
/// # Complexity
/// O(ops + operands).
pub fn of_graph(graph: &Graph) -> Vec<OpCost> {
    graph.ops().map(|(id, op)| of_op(graph, id, op)).collect()
}

fn of_op(graph: &Graph, id: OpId, op: &Op) -> OpCost {
    if is_free(&op.opcode) {
        return OpCost::default();
    }
    let operand = |i: usize| op.operands.get(i).map(|&o| graph.op(o));
    let flops = flops(op, &|i| operand(i)) + Flops(called_flops(graph, op));
    let fused = is_fused(graph, id);
    let read: Bytes = op
        .operands
        .iter()
        .filter(|&&o| !is_fused(graph, o) && !matches!(&*graph.op(o).opcode, "constant" | "iota"))
        .map(|&o| read_bytes(op, graph.op(o)))
        .sum();
    let written = if fused { Bytes(0) } else { written_bytes(graph, op) };
    OpCost { flops, bytes: read + written, launches: !fused, class: class(&op.opcode) }
}

fn class(opcode: &str) -> Class {
    match opcode {
        "dot" | "ragged-dot" | "convolution" => Class::Product,
        "gather" | "scatter" | "sort" | "while" | "conditional" | "custom-call" | "call" | "rng-bit-generator"
        | "fft" | "cholesky" | "triangular-solve" | "select-and-scatter" | "reduce-window" => Class::Other,
        _ => Class::Memory,
    }
}

/// Slicing ops touch what they yield, not what they are given.
fn read_bytes(op: &Op, operand: &Op) -> Bytes {
    let whole = operand.shape.bytes();
    match &*op.opcode {
        "slice" | "dynamic-slice" | "gather" => whole.min(op.shape.bytes()),
        "dynamic-update-slice" | "scatter" if operand.shape == op.shape => Bytes(0),
        _ => whole,
    }
}

fn written_bytes(graph: &Graph, op: &Op) -> Bytes {
    match &*op.opcode {
        "dynamic-update-slice" => op.operands.get(1).map_or(Bytes(0), |&u| graph.op(u).shape.bytes()),
        _ => op.shape.bytes(),
    }
}

/// Ops that move nothing: names for values that are there.
fn is_free(opcode: &str) -> bool {
    matches!(
        opcode,
        "parameter"
            | "constant"
            | "get-tuple-element"
            | "tuple"
            | "bitcast"
            | "reshape"
            | "iota"
            | "after-all"
            | "opt-barrier"
    )
}

/// Ops that XLA fuses into their readers.
fn is_elementwise(opcode: &str) -> bool {
    passes::is_elementwise(opcode) || matches!(opcode, "broadcast" | "iota" | "bitcast-convert" | "reshape")
}

/// Whether a value stays in registers: elementwise, and read by elementwise ops or reductions only.
fn is_fused(graph: &Graph, id: OpId) -> bool {
    is_elementwise(&graph.op(id).opcode)
        && !graph.users(id).is_empty()
        && graph.users(id).len() <= 4
        && graph.users(id).iter().all(|&u| {
            let opcode = &graph.op(u).opcode;
            is_elementwise(opcode) || &**opcode == "reduce"
        })
}

fn flops<'a>(op: &Op, operand: &dyn Fn(usize) -> Option<&'a Op>) -> Flops {
    let elements = |o: &Op| o.shape.as_array().map_or(0.0, |a| a.n_elements() as f64);
    let out = elements(op);
    Flops(match &*op.opcode {
        "dot" => 2.0 * out * contracted(op, operand(0)),
        "convolution" => {
            const KERNEL_OUTPUT_FEATURE: u32 = 4;
            let numbers = find(&op.attributes, instruction::CONVOLUTION).and_then(|v| v.bytes("convolution").ok());
            let feature = numbers.map_or(0, |n| all_numbers(n, KERNEL_OUTPUT_FEATURE).pop().unwrap_or(0)) as usize;
            let kernel = operand(1).and_then(|k| k.shape.as_array());
            let per_output =
                kernel.map_or(1.0, |k| k.n_elements() as f64 / k.dims.get(feature).copied().unwrap_or(1).max(1) as f64);
            2.0 * out * per_output
        }
        "exponential"
        | "log"
        | "tanh"
        | "logistic"
        | "power"
        | "sine"
        | "cosine"
        | "erf"
        | "exponential-minus-one"
        | "log-plus-one" => 10.0 * out,
        "divide" | "sqrt" | "rsqrt" => 4.0 * out,
        "reduce" | "reduce-window" | "select-and-scatter" => operand(0).map_or(out, elements),
        "sort" => operand(0).map_or(out, |o| elements(o) * elements(o).max(2.0).log2()),
        opcode if is_elementwise(opcode) && opcode != "broadcast" => out,
        _ => 0.0,
    })
}

/// Elements summed up for each element of a matrix product.
fn contracted(op: &Op, left: Option<&Op>) -> f64 {
    const LEFT_CONTRACTING: u32 = 1;
    let numbers = find(&op.attributes, instruction::DOT).and_then(|v| v.bytes("dot dimensions").ok());
    let (Some(numbers), Some(left)) = (numbers, left.and_then(|l| l.shape.as_array())) else { return 1.0 };
    all_numbers(numbers, LEFT_CONTRACTING)
        .iter()
        .map(|&d| left.dims.get(d as usize).copied().unwrap_or(1) as f64)
        .product()
}

/// Work inside loops that stayed one op: their body's, times the largest constant their condition compares with.
fn called_flops(graph: &Graph, op: &Op) -> f64 {
    if &*op.opcode != "while" {
        return 0.0;
    }
    let body = |c: CompId| {
        graph
            .computation(c)
            .ops
            .iter()
            .map(|o| flops(o, &|i| o.operands.get(i).map(|&x| &graph.computation(c).ops[x.index()])).0)
            .sum::<f64>()
    };
    let trips = |c: CompId| {
        graph
            .computation(c)
            .ops
            .iter()
            .filter(|o| &*o.opcode == "constant")
            .filter_map(|o| {
                let literal = find(&o.attributes, instruction::LITERAL)?.bytes("literal").ok()?;
                const S32S: u32 = 4;
                all_numbers(literal, S32S).into_iter().filter(|&n| n < 1 << 31).max()
            })
            .max()
    };
    let trip = op.called.iter().filter_map(|&c| trips(c)).max().unwrap_or(1).max(1) as f64;
    trip * op.called.iter().map(|&c| body(c)).sum::<f64>()
}
