//! Cutting a part of a graph out as a graph of its own, and small graphs made from nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ir::{CompId, Computation, Graph, Op, OpId};
use super::proto::{Writer, instruction};
use super::shape::{ArrayShape, Shape};

/// The graph of `ops` (ascending), with one parameter for each of `inputs` and one output for each of `outputs`.
///
/// An entry parameter of `graph` may stand in `inputs` like any other op. Every operand of an op in `ops` must be
/// in `ops` or `inputs`; every output must be too. The same op may stand in `outputs` several times.
///
/// # Panics
/// When an operand or output is in neither: a bug in what chose the ops.
/// # Complexity
/// O(ops + operands), times log ops.
pub fn cut(graph: &Graph, name: &str, ops: &[OpId], inputs: &[OpId], outputs: &[OpId]) -> Graph {
    let mut part = Graph::new(name);
    let mut place: BTreeMap<OpId, OpId> = BTreeMap::new();
    for &input in inputs {
        let op = graph.op(input);
        let parameter = Op { lane: op.lane, ..parameter(&op.name, op.shape.clone()) };
        place.insert(input, part.push_parameter(parameter));
    }
    let mut computations = Computations { from: graph, map: BTreeMap::new() };
    for &id in ops {
        if place.contains_key(&id) {
            continue;
        }
        let op = graph.op(id);
        let operands = op.operands.iter().map(|o| place[o]).collect();
        let called = op.called.iter().map(|&c| computations.copy(c, &mut part)).collect();
        place.insert(id, part.push(Op { operands, called, ..op.clone() }));
    }
    part.set_outputs(outputs.iter().map(|o| place[o]).collect());
    part
}

/// Copies called computations from one graph to another, each once.
pub struct Computations<'a> {
    pub from: &'a Graph,
    pub map: BTreeMap<CompId, CompId>,
}

impl Computations<'_> {
    pub fn copy(&mut self, id: CompId, to: &mut Graph) -> CompId {
        if let Some(&known) = self.map.get(&id) {
            return known;
        }
        let source = self.from.computation(id);
        let ops = source
            .ops
            .iter()
            .map(|op| Op { called: op.called.iter().map(|&c| self.copy(c, to)).collect(), ..op.clone() })
            .collect();
        let copied = to.push_computation(Computation { name: source.name.clone(), ops, root: source.root });
        self.map.insert(id, copied);
        copied
    }
}

/// Replaces each of the given outputs by its sum with a new entry parameter: `sum + value`, one parameter per output,
/// in this order, behind those that are there.
pub fn accumulate(graph: &mut Graph, outputs: &[usize]) {
    let mut results = graph.outputs().to_vec();
    let sums: Vec<OpId> = outputs
        .iter()
        .map(|&o| {
            let shape = graph.op(results[o]).shape.clone();
            graph.push_parameter(parameter("sum", shape))
        })
        .collect();
    for (&o, sum) in outputs.iter().zip(sums) {
        let shape = graph.op(sum).shape.clone();
        results[o] = graph.push(op("add", "add", shape, vec![sum, results[o]], Vec::new()));
    }
    graph.set_outputs(results);
}

/// A graph without parameters that yields zeros.
pub fn zeros(name: &str, shapes: &[ArrayShape]) -> Graph {
    let mut graph = Graph::new(name);
    let outputs = shapes
        .iter()
        .map(|shape| {
            let scalar = ArrayShape::scalar(shape.dtype);
            let mut literal = Writer::default();
            literal.bytes(instruction::LITERAL, &zero_literal(&scalar));
            let zero = graph.push(op("zero", "constant", scalar.into(), Vec::new(), literal.0));
            graph.push(op("zeros", "broadcast", shape.clone().into(), vec![zero], Vec::new()))
        })
        .collect();
    graph.set_outputs(outputs);
    graph
}

/// An entry parameter; its number is given by its place among the parameters.
pub fn parameter(name: &str, shape: Shape) -> Op {
    op(name, "parameter", shape, Vec::new(), Vec::new())
}

/// An op made by a pass.
pub fn op(name: &str, opcode: &str, shape: Shape, operands: Vec<OpId>, attributes: Vec<u8>) -> Op {
    Op {
        name: name.to_owned(),
        opcode: Arc::from(opcode),
        shape,
        operands,
        called: Vec::new(),
        attributes: Arc::from(attributes),
        shape_raw: None,
        lane: None,
    }
}

/// `LiteralProto` of a scalar zero.
fn zero_literal(scalar: &ArrayShape) -> Vec<u8> {
    use super::shape::DType::*;
    let mut w = Writer::default();
    w.bytes(1, &super::export::dense(&scalar.clone().into()));
    let size = scalar.dtype.size() as usize;
    match scalar.dtype {
        Bool => w.numbers(2, [0]),
        Uint8 => w.bytes(3, &[0]),
        Int32 => w.numbers(4, [0]),
        Int64 => w.numbers(5, [0]),
        Uint32 => w.numbers(6, [0]),
        Uint64 => w.numbers(7, [0]),
        Float32 => w.bytes(8, &vec![0; size]),
        Float64 => w.bytes(9, &vec![0; size]),
        Float16 => w.bytes(11, &vec![0; size]),
        // Complex numbers are repeated floats: real and imaginary part.
        Complex64 => w.bytes(12, &vec![0; size]),
        Bfloat16 => w.bytes(13, &vec![0; size]),
        Int8 => w.bytes(15, &[0]),
        Uint16 => w.bytes(16, &vec![0; size]),
        Int16 => w.bytes(17, &vec![0; size]),
        Complex128 => w.bytes(18, &vec![0; size]),
        Float8E5m2 => w.bytes(19, &[0]),
        Float8E4m3fn => w.bytes(20, &[0]),
    }
    w.0
}
