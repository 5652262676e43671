//! The graph of ops: what every other room reads.
//!
//! A [`Graph`] is one flat entry computation. Ops stand in topological order (operands before users), so an
//! [`OpId`] is both a name and a position. The root tuple of the HLO module is not an op: its elements are
//! [`Graph::outputs`].

use std::fmt;
use std::sync::Arc;

use super::proto::{find, instruction};
use super::shape::Shape;

/// Position of an op in its graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct OpId(pub u32);

impl OpId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
impl fmt::Debug for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "op{}", self.0)
    }
}
impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Index of a called computation in [`Graph::computations`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CompId(pub u32);

/// Part `index` of `of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane {
    pub index: u32,
    pub of: u32,
}

/// One op of the model graph.
#[derive(Clone, Debug)]
pub struct Op {
    /// HLO instruction name: unique in its graph, not empty.
    pub name: String,
    /// HLO opcode as the proto spells it: `add`, `dot`, `get-tuple-element`.
    pub opcode: Arc<str>,
    pub shape: Shape,
    pub operands: Vec<OpId>,
    /// Computations this op calls (`reduce`, `while`, `sort`, ...).
    pub called: Vec<CompId>,
    /// The rest of the `HloInstructionProto`: every field but name, opcode, shape, id, operand ids, called
    /// computation ids and control predecessors, byte for byte as imported.
    pub attributes: Arc<[u8]>,
    /// The imported `ShapeProto`, layout and all; `None` once a pass has changed the shape.
    pub shape_raw: Option<Arc<[u8]>>,
    /// For an op that works on one part of what is split, and on nothing of the other parts: which part.
    pub lane: Option<Lane>,
}

impl Op {
    /// The exporter's path to this op, such as `jit(grad)/transpose(jvp(block3))/dot_general`.
    pub fn scope(&self) -> Option<&str> {
        const OP_NAME: u32 = 2;
        let metadata = find(&self.attributes, instruction::METADATA)?.bytes("metadata").ok()?;
        find(metadata, OP_NAME)?.text("op name").ok()
    }
}

/// A computation that ops of the entry call: kept as imported, opaque to planning.
#[derive(Clone, Debug)]
pub struct Computation {
    pub name: String,
    /// Its ops, operands before users; the last is not necessarily the root.
    pub ops: Vec<Op>,
    pub root: OpId,
}

/// A model graph: one entry computation and what it calls.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub name: String,
    ops: Vec<Op>,
    users: Vec<Vec<OpId>>,
    parameters: Vec<OpId>,
    outputs: Vec<OpId>,
    /// Callees before callers.
    computations: Vec<Computation>,
}

impl Graph {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    pub fn n_ops(&self) -> usize {
        self.ops.len()
    }
    /// All ops, operands before users.
    pub fn ops(&self) -> impl ExactSizeIterator<Item = (OpId, &Op)> + DoubleEndedIterator {
        self.ops.iter().enumerate().map(|(i, op)| (OpId(i as u32), op))
    }
    pub fn op(&self, id: OpId) -> &Op {
        &self.ops[id.index()]
    }
    /// Ops that read this op's value, each once, ascending.
    pub fn users(&self, id: OpId) -> &[OpId] {
        &self.users[id.index()]
    }
    /// Entry parameters, by parameter number.
    pub fn parameters(&self) -> &[OpId] {
        &self.parameters
    }
    /// Entry results in order; one op may stand several times.
    pub fn outputs(&self) -> &[OpId] {
        &self.outputs
    }
    pub fn computations(&self) -> &[Computation] {
        &self.computations
    }
    pub fn computation(&self, id: CompId) -> &Computation {
        &self.computations[id.0 as usize]
    }

    /// Appends an op. Its operands must stand before it.
    ///
    /// # Panics
    /// When an operand does not exist yet: that is a bug in the pass that builds the graph.
    pub fn push(&mut self, op: Op) -> OpId {
        let id = OpId(self.ops.len() as u32);
        for &o in &op.operands {
            assert!(o < id, "operand {o} of {} does not stand before it", op.name);
            let users = &mut self.users[o.index()];
            if users.last() != Some(&id) {
                users.push(id);
            }
        }
        self.ops.push(op);
        self.users.push(Vec::new());
        id
    }
    /// Appends an entry parameter; its number is the count of parameters before it.
    pub fn push_parameter(&mut self, op: Op) -> OpId {
        let id = self.push(op);
        self.parameters.push(id);
        id
    }
    pub fn push_computation(&mut self, c: Computation) -> CompId {
        self.computations.push(c);
        CompId(self.computations.len() as u32 - 1)
    }
    pub fn set_outputs(&mut self, outputs: Vec<OpId>) {
        self.outputs = outputs;
    }
}
