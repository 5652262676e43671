//! [`Graph`] to `HloModuleProto` bytes.

use std::collections::{BTreeMap, BTreeSet};

use super::ir::{CompId, Graph, Op, OpId};
use super::proto::{Writer, computation, instruction, module, without};
use super::shape::{ArrayShape, Shape};

/// Output `output` may take the memory of parameter `parameter`, which must be donated on execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    pub output: usize,
    pub parameter: usize,
}

/// Writes a module whose root is the tuple of the graph's outputs (also when there is only one). Parameters and
/// outputs are dense and row-major.
///
/// The same graph gives the same bytes. Only computations in use are written.
pub fn to_hlo(graph: &Graph, aliases: &[Alias]) -> Vec<u8> {
    let name = identifier(&graph.name);
    let mut out = Exporter { graph, names: BTreeMap::new(), next_id: 1, module: Writer::default() };
    let entry_name = out.unique("main");
    let mut ids = BTreeMap::new();
    for callee in used(graph) {
        let id = out.computation(callee, &ids);
        ids.insert(callee, id);
    }
    let entry_id = out.entry(&entry_name, &ids);

    let program = program_shape(
        graph.parameters().iter().map(|&p| dense(&graph.op(p).shape)),
        &result_shape(graph),
        graph.parameters().iter().map(|&p| graph.op(p).name.as_str()),
    );
    let mut w = Writer::default();
    w.bytes(module::NAME, name.as_bytes());
    w.bytes(module::ENTRY_NAME, entry_name.as_bytes());
    w.fields(&out.module.0);
    w.bytes(module::HOST_PROGRAM_SHAPE, &program);
    w.number(module::ID, 1);
    w.number(module::ENTRY_ID, entry_id);
    if !aliases.is_empty() {
        let mut entries = Writer::default();
        for alias in aliases {
            let mut e = Writer::default();
            e.numbers(1, [alias.output as u64]);
            e.number(2, alias.parameter as u64);
            const MAY_ALIAS: u64 = 1;
            e.number(4, MAY_ALIAS);
            entries.bytes(1, &e.0);
        }
        w.bytes(module::INPUT_OUTPUT_ALIAS, &entries.0);
    }
    w.0
}

/// Computations that the entry calls, directly or not; callees before callers.
fn used(graph: &Graph) -> BTreeSet<CompId> {
    let mut used = BTreeSet::new();
    let mut queue: Vec<CompId> = graph.ops().flat_map(|(_, op)| op.called.iter().copied()).collect();
    while let Some(c) = queue.pop() {
        if used.insert(c) {
            queue.extend(graph.computation(c).ops.iter().flat_map(|op| op.called.iter().copied()));
        }
    }
    used
}

struct Exporter<'a> {
    graph: &'a Graph,
    /// Names taken, with the last number put behind each to make others unique.
    names: BTreeMap<String, u64>,
    /// Ids are unique over the whole module, computations and ops alike.
    next_id: u64,
    module: Writer,
}

impl Exporter<'_> {
    fn unique(&mut self, name: &str) -> String {
        let base = identifier(name);
        let mut unique = base.clone();
        if let Some(&last) = self.names.get(&base) {
            let mut n = last;
            while self.names.contains_key(&unique) {
                n += 1;
                unique = format!("{base}.{n}");
            }
            self.names.insert(base, n);
        }
        self.names.insert(unique.clone(), 0);
        unique
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    fn computation(&mut self, c: CompId, known: &BTreeMap<CompId, u64>) -> u64 {
        let source = self.graph.computation(c);
        let name = self.unique(&source.name);
        let mut body = Writer::default();
        body.bytes(computation::NAME, name.as_bytes());
        let ids: Vec<u64> = source.ops.iter().map(|_| self.id()).collect();
        for (op, &id) in source.ops.iter().zip(&ids) {
            let operands = op.operands.iter().map(|o| ids[o.index()]);
            let bytes = self.instruction(op, id, operands, known, &op.attributes, None);
            body.bytes(computation::INSTRUCTIONS, &bytes);
        }
        let parameters = source.ops.iter().filter(|o| &*o.opcode == "parameter");
        let mut numbered: Vec<(u64, &Op)> = parameters
            .map(|o| (super::proto::all_numbers(&o.attributes, instruction::PARAMETER_NUMBER).pop().unwrap_or(0), o))
            .collect();
        numbered.sort_by_key(|(n, _)| *n);
        let result = shape_bytes(&source.ops[source.root.index()]);
        let shapes = numbered.iter().map(|(_, o)| shape_bytes(o));
        let program = program_shape(shapes, &result, numbered.iter().map(|(_, o)| o.name.as_str()));
        body.bytes(computation::PROGRAM_SHAPE, &program);
        let id = self.id();
        body.number(computation::ID, id);
        body.number(computation::ROOT_ID, ids[source.root.index()]);
        self.module.bytes(module::COMPUTATIONS, &body.0);
        id
    }

    fn entry(&mut self, name: &str, known: &BTreeMap<CompId, u64>) -> u64 {
        let graph = self.graph;
        let mut body = Writer::default();
        body.bytes(computation::NAME, name.as_bytes());
        let number: BTreeMap<OpId, u64> = graph.parameters().iter().enumerate().map(|(i, &p)| (p, i as u64)).collect();
        let ids: Vec<u64> = (0..graph.n_ops()).map(|_| self.id()).collect();
        for (id, op) in graph.ops() {
            let operands = op.operands.iter().map(|o| ids[o.index()]);
            let bytes = match number.get(&id) {
                None => self.instruction(op, ids[id.index()], operands, known, &op.attributes, None),
                Some(&n) => {
                    let mut attributes = Writer(without(&op.attributes, instruction::PARAMETER_NUMBER));
                    attributes.number(instruction::PARAMETER_NUMBER, n);
                    let shape = dense(&op.shape);
                    self.instruction(op, ids[id.index()], operands, known, &attributes.0, Some(&shape))
                }
            };
            body.bytes(computation::INSTRUCTIONS, &bytes);
        }
        let root_id = self.id();
        let root_name = self.unique("results");
        let result = result_shape(graph);
        let mut root = Writer::default();
        root.bytes(instruction::NAME, root_name.as_bytes());
        root.bytes(instruction::OPCODE, b"tuple");
        root.bytes(instruction::SHAPE, &result);
        root.number(instruction::ID, root_id);
        root.numbers(instruction::OPERANDS, graph.outputs().iter().map(|o| ids[o.index()]));
        body.bytes(computation::INSTRUCTIONS, &root.0);
        let parameters = graph.parameters().iter();
        let program = program_shape(
            parameters.clone().map(|&p| dense(&graph.op(p).shape)),
            &result,
            parameters.map(|&p| graph.op(p).name.as_str()),
        );
        body.bytes(computation::PROGRAM_SHAPE, &program);
        let id = self.id();
        body.number(computation::ID, id);
        body.number(computation::ROOT_ID, root_id);
        self.module.bytes(module::COMPUTATIONS, &body.0);
        id
    }

    fn instruction(
        &mut self,
        op: &Op,
        id: u64,
        operands: impl Iterator<Item = u64>,
        known: &BTreeMap<CompId, u64>,
        attributes: &[u8],
        shape: Option<&[u8]>,
    ) -> Vec<u8> {
        let name = self.unique(&op.name);
        let mut w = Writer::default();
        w.bytes(instruction::NAME, name.as_bytes());
        w.bytes(instruction::OPCODE, op.opcode.as_bytes());
        match shape {
            Some(shape) => w.bytes(instruction::SHAPE, shape),
            None => w.bytes(instruction::SHAPE, &shape_bytes(op)),
        }
        w.fields(attributes);
        w.number(instruction::ID, id);
        w.numbers(instruction::OPERANDS, operands);
        w.numbers(instruction::CALLED, op.called.iter().map(|c| known[c]));
        w.0
    }
}

/// A name that HLO accepts: letters, digits, `_`, `-`, `.`; not empty, not starting with a digit.
fn identifier(name: &str) -> String {
    let mut clean: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "_-.".contains(c) { c } else { '_' }).collect();
    if !clean.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        clean.insert(0, '_');
    }
    clean
}

fn shape_bytes(op: &Op) -> Vec<u8> {
    op.shape_raw.as_ref().map_or_else(|| dense(&op.shape), |raw| raw.to_vec())
}

fn result_shape(graph: &Graph) -> Vec<u8> {
    dense(&Shape::Tuple(graph.outputs().iter().map(|&o| graph.op(o).shape.clone()).collect()))
}

/// `ShapeProto` with row-major layouts.
pub fn dense(shape: &Shape) -> Vec<u8> {
    let mut w = Writer::default();
    match shape {
        Shape::Array(ArrayShape { dtype, dims }) => {
            w.number(2, dtype.to_hlo());
            w.numbers(3, dims.iter().copied());
            dense_layout(&mut w, dims.len());
        }
        Shape::Tuple(elements) => {
            w.number(2, 13);
            elements.iter().for_each(|e| w.bytes(4, &dense(e)));
        }
        Shape::Token => w.number(2, 17),
        Shape::Other { hlo_type, dims } => {
            w.number(2, *hlo_type);
            w.numbers(3, dims.iter().copied());
            dense_layout(&mut w, dims.len());
        }
    }
    w.0
}

fn dense_layout(w: &mut Writer, rank: usize) {
    let mut layout = Writer::default();
    layout.numbers(1, (0..rank as u64).rev());
    w.numbers(6, std::iter::repeat_n(0, rank));
    w.bytes(5, &layout.0);
}

fn program_shape<'a>(
    parameters: impl Iterator<Item = Vec<u8>>,
    result: &[u8],
    names: impl Iterator<Item = &'a str>,
) -> Vec<u8> {
    let mut w = Writer::default();
    parameters.for_each(|p| w.bytes(1, &p));
    w.bytes(2, result);
    names.for_each(|n| w.bytes(3, identifier(n).as_bytes()));
    w.0
}
