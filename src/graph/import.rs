//! `HloModuleProto` bytes to [`Graph`].

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use super::error::GraphError;
use super::ir::{CompId, Computation, Graph, Op, OpId};
use super::proto::{Fields, computation, instruction, module};
use super::shape::{ArrayShape, DType, Shape};

/// Deepest nesting of tuple shapes and of calls.
const MAX_DEPTH: usize = 64;
/// Most axes of a tensor.
const MAX_RANK: usize = 64;

/// Reads an unoptimised HLO module; bytes it does not know are kept with their op.
///
/// The entry computation becomes the graph; its root tuple becomes [`Graph::outputs`]. Layouts of the entry and
/// module-level settings (schedules, aliases, sharding of the entry) are not kept: they belong to the uncut module.
///
/// # Errors
/// [`GraphError::Malformed`], [`GraphError::Op`], [`GraphError::Computation`]; never a panic.
/// # Complexity
/// O(bytes · log ops).
pub fn from_hlo(bytes: &[u8]) -> Result<Graph, GraphError> {
    let mut name = String::new();
    let mut entry_name = String::new();
    let mut entry_id = None;
    let mut raw = Vec::new();
    for field in Fields::new(bytes, "module") {
        let (number, value, _) = field?;
        match number {
            module::NAME => name = value.text("module name")?.to_owned(),
            module::ENTRY_NAME => entry_name = value.text("entry name")?.to_owned(),
            module::ENTRY_ID => entry_id = Some(value.number("entry id")?),
            module::COMPUTATIONS => raw.push(RawComputation::read(value.bytes("computation")?)?),
            _ => {}
        }
    }
    let mut by_id = BTreeMap::new();
    for (i, c) in raw.iter().enumerate() {
        if by_id.insert(c.id, i).is_some() {
            return Err(c.problem(format!("id {} is taken twice", c.id)));
        }
    }
    let entry = match entry_id {
        Some(id) => by_id.get(&id).copied(),
        None => raw.iter().position(|c| c.name == entry_name),
    };
    let entry = entry.ok_or_else(|| GraphError::Malformed {
        what: "module",
        problem: format!("it has {} computations, none of which is its entry", raw.len()),
    })?;
    let mut graph = Graph::new(name);
    let mut importer =
        Importer { raw: &raw, by_id: &by_id, done: BTreeMap::new(), open: vec![false; raw.len()], graph: &mut graph };
    importer.entry(entry)?;
    Ok(graph)
}

struct RawComputation<'a> {
    name: String,
    id: u64,
    root: u64,
    ops: Vec<RawOp<'a>>,
}

struct RawOp<'a> {
    id: u64,
    name: &'a str,
    opcode: &'a str,
    shape: Shape,
    shape_raw: &'a [u8],
    operands: Vec<u64>,
    called: Vec<u64>,
    predecessors: Vec<u64>,
    parameter: Option<u64>,
    attributes: Vec<u8>,
}

impl<'a> RawComputation<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, GraphError> {
        let mut c = Self { name: String::new(), id: 0, root: 0, ops: Vec::new() };
        for field in Fields::new(bytes, "computation") {
            let (number, value, _) = field?;
            match number {
                computation::NAME => c.name = value.text("computation name")?.to_owned(),
                computation::INSTRUCTIONS => c.ops.push(RawOp::read(value.bytes("instruction")?)?),
                computation::ID => c.id = value.number("computation id")?,
                computation::ROOT_ID => c.root = value.number("root id")?,
                _ => {}
            }
        }
        Ok(c)
    }

    fn problem(&self, problem: String) -> GraphError {
        GraphError::Computation { computation: self.name.clone(), problem }
    }

    fn op_problem(&self, op: &RawOp<'_>, problem: String) -> GraphError {
        let computation = self.name.clone();
        GraphError::Op { computation, op: op.name.to_owned(), opcode: op.opcode.to_owned(), problem }
    }

    /// Positions of the ops such that operands and control predecessors stand first; as imported where that is so.
    fn order(&self) -> Result<Vec<usize>, GraphError> {
        let mut at = BTreeMap::new();
        for (i, op) in self.ops.iter().enumerate() {
            if at.insert(low(op.id), i).is_some() {
                return Err(self.op_problem(op, format!("id {} is taken twice", op.id)));
            }
        }
        let mut missing = vec![0u32; self.ops.len()];
        let mut users: Vec<Vec<usize>> = vec![Vec::new(); self.ops.len()];
        for (i, op) in self.ops.iter().enumerate() {
            for id in op.operands.iter().chain(&op.predecessors) {
                let Some(&from) = at.get(&low(*id)) else {
                    return Err(self.op_problem(op, format!("operand {id} does not exist")));
                };
                users[from].push(i);
                missing[i] += 1;
            }
        }
        let mut ready: BinaryHeap<Reverse<usize>> =
            (0..self.ops.len()).filter(|&i| missing[i] == 0).map(Reverse).collect();
        let mut order = Vec::with_capacity(self.ops.len());
        while let Some(Reverse(i)) = ready.pop() {
            order.push(i);
            for &u in &users[i] {
                missing[u] -= 1;
                if missing[u] == 0 {
                    ready.push(Reverse(u));
                }
            }
        }
        if order.len() < self.ops.len() {
            let stuck = missing.iter().position(|&m| m > 0).unwrap_or(0);
            return Err(self.op_problem(&self.ops[stuck], "it depends on its own result".to_owned()));
        }
        Ok(order)
    }
}

/// Ids may have 64 bits; the low half tells the ops of a computation apart.
fn low(id: u64) -> u32 {
    id as u32
}

impl<'a> RawOp<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, GraphError> {
        let mut op = Self {
            id: 0,
            name: "",
            opcode: "",
            shape: Shape::Tuple(Vec::new()),
            shape_raw: &[],
            operands: Vec::new(),
            called: Vec::new(),
            predecessors: Vec::new(),
            parameter: None,
            attributes: Vec::new(),
        };
        for field in Fields::new(bytes, "instruction") {
            let (number, value, raw) = field?;
            match number {
                instruction::NAME => op.name = value.text("instruction name")?,
                instruction::OPCODE => op.opcode = value.text("opcode")?,
                instruction::SHAPE => {
                    op.shape_raw = value.bytes("shape")?;
                    op.shape = read_shape(op.shape_raw, 0)?;
                }
                instruction::ID => op.id = value.number("instruction id")?,
                instruction::OPERANDS => value.numbers("operand ids", &mut op.operands)?,
                instruction::CALLED => value.numbers("called computations", &mut op.called)?,
                instruction::CONTROL_PREDECESSORS => value.numbers("control predecessors", &mut op.predecessors)?,
                _ => {
                    if number == instruction::PARAMETER_NUMBER {
                        op.parameter = Some(value.number("parameter number")?);
                    }
                    op.attributes.extend_from_slice(raw);
                }
            }
        }
        if op.opcode.is_empty() {
            let problem = format!("{:?} has no opcode", op.name);
            return Err(GraphError::Malformed { what: "instruction", problem });
        }
        Ok(op)
    }

    fn is_parameter(&self) -> bool {
        self.opcode == "parameter"
    }
}

/// Reads a `ShapeProto`.
pub fn read_shape(bytes: &[u8], depth: usize) -> Result<Shape, GraphError> {
    const WHAT: &str = "shape";
    const TUPLE: u64 = 13;
    const TOKEN: u64 = 17;
    let malformed = |problem: String| GraphError::Malformed { what: WHAT, problem };
    if depth > MAX_DEPTH {
        return Err(malformed(format!("tuples nested deeper than {MAX_DEPTH}")));
    }
    let mut kind = 0;
    let mut dims = Vec::new();
    let mut elements = Vec::new();
    let mut dynamic = Vec::new();
    for field in Fields::new(bytes, WHAT) {
        let (number, value, _) = field?;
        match number {
            2 => kind = value.number("element type")?,
            3 => value.numbers("dimensions", &mut dims)?,
            4 => elements.push(read_shape(value.bytes("tuple shape")?, depth + 1)?),
            6 => value.numbers("dynamic dimensions", &mut dynamic)?,
            _ => {}
        }
    }
    if dynamic.iter().any(|&d| d != 0) {
        return Err(malformed("a dimension is dynamic; export with static shapes".to_owned()));
    }
    if dims.len() > MAX_RANK {
        return Err(malformed(format!("{} axes, the limit is {MAX_RANK}", dims.len())));
    }
    if let Some(d) = dims.iter().find(|&&d| d > i64::MAX as u64) {
        return Err(malformed(format!("dimension {} is negative", *d as i64)));
    }
    Ok(match kind {
        TUPLE => Shape::Tuple(elements),
        TOKEN => Shape::Token,
        kind => match DType::from_hlo(kind) {
            Some(dtype) => {
                let shape = ArrayShape::new(dtype, dims);
                if shape.bytes().0 > i64::MAX as u64 {
                    return Err(malformed(format!("{shape} is larger than any memory")));
                }
                Shape::Array(shape)
            }
            None => Shape::Other { hlo_type: kind, dims },
        },
    })
}

struct Importer<'a, 'b> {
    raw: &'b [RawComputation<'a>],
    by_id: &'b BTreeMap<u64, usize>,
    /// Raw position to computation of the graph.
    done: BTreeMap<usize, CompId>,
    /// On the way down: finds a computation that calls itself.
    open: Vec<bool>,
    graph: &'b mut Graph,
}

impl Importer<'_, '_> {
    fn called(&mut self, at: usize, op: &RawOp<'_>, depth: usize) -> Result<Vec<CompId>, GraphError> {
        let raw = self.raw;
        op.called
            .iter()
            .map(|id| {
                let Some(&callee) = self.by_id.get(id) else {
                    return Err(raw[at].op_problem(op, format!("it calls computation {id}, which does not exist")));
                };
                self.computation(callee, depth + 1)
            })
            .collect()
    }

    fn op(&mut self, at: usize, raw: &RawOp<'_>, place: &BTreeMap<u32, OpId>, depth: usize) -> Result<Op, GraphError> {
        Ok(Op {
            name: if raw.name.is_empty() { format!("op.{}", raw.id) } else { raw.name.to_owned() },
            opcode: Arc::from(raw.opcode),
            shape: raw.shape.clone(),
            operands: raw.operands.iter().map(|id| place[&low(*id)]).collect(),
            called: self.called(at, raw, depth)?,
            attributes: Arc::from(raw.attributes.as_slice()),
            shape_raw: Some(Arc::from(raw.shape_raw)),
            lane: None,
        })
    }

    fn computation(&mut self, at: usize, depth: usize) -> Result<CompId, GraphError> {
        if let Some(&known) = self.done.get(&at) {
            return Ok(known);
        }
        let raw = &self.raw[at];
        if self.open[at] || depth > MAX_DEPTH {
            return Err(raw.problem(format!("it calls itself, or calls nest deeper than {MAX_DEPTH}")));
        }
        self.open[at] = true;
        let mut place = BTreeMap::new();
        let mut ops = Vec::with_capacity(raw.ops.len());
        for i in raw.order()? {
            let op = &raw.ops[i];
            let built = self.op(at, op, &place, depth)?;
            place.insert(low(op.id), OpId(ops.len() as u32));
            ops.push(built);
        }
        let Some(&root) = place.get(&low(raw.root)) else {
            return Err(raw.problem(format!("its root {} does not exist", raw.root)));
        };
        self.open[at] = false;
        let id = self.graph.push_computation(Computation { name: raw.name.clone(), ops, root });
        self.done.insert(at, id);
        Ok(id)
    }

    fn entry(&mut self, at: usize) -> Result<(), GraphError> {
        let raw = &self.raw[at];
        self.open[at] = true;
        let mut parameters: Vec<&RawOp<'_>> = raw.ops.iter().filter(|o| o.is_parameter()).collect();
        parameters.sort_by_key(|o| o.parameter.unwrap_or(0));
        let mut place = BTreeMap::new();
        for (i, op) in parameters.iter().enumerate() {
            if op.parameter.unwrap_or(0) != i as u64 {
                return Err(raw.op_problem(op, format!("it is parameter {:?}, expected {i}", op.parameter)));
            }
            if op.shape.as_array().is_none() {
                return Err(raw.op_problem(op, format!("a parameter of shape {}; pass arrays one by one", op.shape)));
            }
            if !op.operands.is_empty() {
                return Err(raw.op_problem(op, "a parameter with operands".to_owned()));
            }
            let built = self.op(at, op, &place, 0)?;
            place.insert(low(op.id), self.graph.push_parameter(built));
        }
        let order = raw.order()?;
        let root = raw.ops.iter().find(|o| low(o.id) == low(raw.root));
        let Some(root) = root else { return Err(raw.problem(format!("its root {} does not exist", raw.root))) };
        let root_is_tuple = root.opcode == "tuple";
        for i in order {
            let op = &raw.ops[i];
            let is_used = || raw.ops.iter().any(|o| o.operands.iter().any(|id| low(*id) == low(op.id)));
            let dissolved = root_is_tuple && std::ptr::eq(op, root) && !is_used();
            if op.is_parameter() || dissolved {
                continue;
            }
            let built = self.op(at, op, &place, 0)?;
            place.insert(low(op.id), self.graph.push(built));
        }
        let results: Vec<u64> = if root_is_tuple { root.operands.clone() } else { vec![root.id] };
        let outputs: Vec<OpId> = results.iter().map(|id| place[&low(*id)]).collect();
        for &o in &outputs {
            let op = self.graph.op(o);
            if op.shape.as_array().is_none() {
                let problem = format!("a result of shape {}; return arrays one by one", op.shape);
                return Err(raw.op_problem(root, problem));
            }
        }
        self.graph.set_outputs(outputs);
        Ok(())
    }
}
