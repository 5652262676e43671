//! The one pass between import and planning: a symbolic run of the module.
//!
//! Every op is evaluated in order. Most yield themselves; calls are entered, tuples taken apart, scalar index
//! arithmetic computed, counted loops with real work in them unrolled, and tensors written row by row kept as rows
//! ([`Stack`]), so that reading one row back is that row and not a slice of everything.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use super::super::cut::{Computations, cut, op, parameter};
use super::super::error::GraphError;
use super::super::ir::{CompId, Graph, Op, OpId};
use super::super::proto::{Fields, Writer, all_numbers, find, instruction, without};
use super::super::shape::{ArrayShape, Shape};
use super::literal::{Scalar, fold};
use super::stack::{Stack, is_elementwise, row_shape};

/// How far loops are unrolled.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Loops of more iterations stay one op: recurrences over time, not over layers. So do tensors of more rows.
    pub trips: u64,
    /// Ops of the whole graph.
    pub ops: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { trips: 256, ops: 2_000_000 }
    }
}

/// Work allowed for each op of [`Limits::ops`]: an op of a real model costs about ten.
const WORK_PER_OP: usize = 32;
/// Longest scope of an op.
const MAX_SCOPE: usize = 512;
/// Bytes of names and attributes that count as one unit of work.
const BYTES_PER_WORK: usize = 32;

/// A graph without calls, counted loops and dead ops.
#[derive(Clone, Debug)]
pub struct Normalised {
    pub graph: Graph,
    /// By split parameter of the source: nothing reads it but row by row.
    pub row_wise: BTreeMap<usize, bool>,
    /// By output of the source: it is known row by row.
    pub stacked: Vec<bool>,
    /// Trip counts of the loops that were unrolled.
    pub trips: BTreeSet<u64>,
}

/// Runs `graph` symbolically.
///
/// # Shapes
/// `split`: by parameter and by output of `graph`, whether it is taken apart along its leading axis: each becomes as
/// many parameters or outputs of leading size one as it has rows, at its place.
/// # Errors
/// [`GraphError::Pass`] when the graph would grow beyond `limits.ops`, or takes far more steps than a graph of that size
/// needs (calls that call each other twice, over and over).
/// # Panics
/// On a graph that [`verify`](super::super::verify::verify) refuses.
/// # Complexity
/// O(ops of the result · log ops).
pub fn normalise(
    graph: &Graph,
    limits: Limits,
    split_parameters: &[bool],
    split_outputs: &[bool],
) -> Result<Normalised, GraphError> {
    let mut run = Run {
        computations: Computations { from: graph, map: BTreeMap::new() },
        from: graph,
        to: Graph::new(graph.name.clone()),
        limits,
        work: limits.ops.saturating_mul(WORK_PER_OP),
        stacks: Vec::new(),
        scalars: BTreeMap::new(),
        trips: BTreeSet::new(),
        heavy: BTreeMap::new(),
        scope: None,
        callers: String::new(),
        root: graph.ops().find_map(|(_, op)| op.scope()?.split('/').next()).unwrap_or_default().to_owned(),
        not_row_wise: BTreeSet::new(),
    };
    let mut args = Vec::with_capacity(graph.parameters().len());
    for (i, &p) in graph.parameters().iter().enumerate() {
        args.push(run.parameter(i, graph.op(p), split_parameters.get(i) == Some(&true)));
    }
    let mut values: Vec<Value> = Vec::with_capacity(graph.n_ops());
    let mut next_parameter: BTreeMap<OpId, usize> = BTreeMap::new();
    for (i, &p) in graph.parameters().iter().enumerate() {
        next_parameter.insert(p, i);
    }
    for (id, op) in graph.ops() {
        let value = match next_parameter.get(&id) {
            Some(&i) => args[i].clone(),
            None => {
                let operands = op.operands.iter().map(|o| values[o.index()].clone()).collect();
                run.eval(op, operands, 0)?
            }
        };
        values.push(value);
    }
    let mut outputs = Vec::new();
    let mut stacked = Vec::new();
    for (i, o) in graph.outputs().iter().enumerate() {
        let value = values[o.index()].clone();
        let full = match &value {
            Value::Stack(s) => run.stacks[*s].is_full(),
            _ => false,
        };
        stacked.push(full);
        if split_outputs.get(i) == Some(&true) {
            let shape = graph.op(*o).shape.as_array().expect("results are arrays").clone();
            for row in 0..shape.dims[0] {
                outputs.push(run.row(&value, &shape, row)?);
            }
        } else if let (true, Value::Stack(s)) = (full, &value) {
            // Handed out whole: that is not a reader.
            let before = run.not_row_wise.clone();
            let whole = run.whole(*s)?;
            run.not_row_wise = before;
            outputs.push(whole);
        } else {
            outputs.push(run.op(&value)?);
        }
    }
    let row_wise = (0..graph.parameters().len())
        .filter(|&i| split_parameters.get(i) == Some(&true))
        .map(|i| (i, !run.not_row_wise.contains(&i)))
        .collect();
    let (trips, mut full) = (run.trips, run.to);
    full.set_outputs(outputs);
    Ok(Normalised { graph: without_dead_ops(&full), row_wise, stacked, trips })
}

/// What an op of the source yields.
#[derive(Clone, Debug)]
enum Value {
    Op(OpId),
    Scalar(Scalar),
    Tuple(Rc<[Value]>),
    /// Position in `Run::stacks`.
    Stack(usize),
}

/// What a computation is given, as far as it is known.
#[derive(Clone, Copy)]
enum Given<'a> {
    /// One tuple: a loop's state.
    Elements(&'a [Option<Scalar>]),
    Arguments(&'a [Option<Scalar>]),
}

struct Run<'a> {
    from: &'a Graph,
    to: Graph,
    computations: Computations<'a>,
    limits: Limits,
    /// What is left of the work allowed.
    work: usize,
    stacks: Vec<Stack>,
    scalars: BTreeMap<(super::super::shape::DType, i64), OpId>,
    trips: BTreeSet<u64>,
    /// Whether a computation holds real work.
    heavy: BTreeMap<CompId, bool>,
    /// Iteration of the innermost unrolled loop, for op names.
    scope: Option<u64>,
    /// Scope of the calls entered.
    callers: String,
    /// Where scopes begin that are whole: the exporter's outermost function, such as `jit(grad)`.
    root: String,
    /// Split parameters that something wanted as a whole.
    not_row_wise: BTreeSet<usize>,
}

fn failed(problem: String) -> GraphError {
    GraphError::Pass { pass: "normalise", problem }
}

impl Run<'_> {
    fn parameter(&mut self, number: usize, source: &Op, split: bool) -> Value {
        let shape = source.shape.as_array().cloned();
        match shape {
            Some(shape) if split && shape.dims.first().is_some_and(|&n| n > 0) => {
                let rows = (0..shape.dims[0])
                    .map(|r| {
                        let name = format!("{}.row{r}", source.name);
                        Some(self.to.push_parameter(parameter(&name, row_shape(&shape).into())))
                    })
                    .collect();
                let stack = Stack { shape, rows, base: None, whole: None, parameter: Some(number) };
                self.stack(stack)
            }
            _ => {
                let mut copied = parameter(&source.name, source.shape.clone());
                copied.attributes = without(&source.attributes, instruction::PARAMETER_NUMBER).into();
                Value::Op(self.to.push_parameter(copied))
            }
        }
    }

    fn stack(&mut self, stack: Stack) -> Value {
        self.stacks.push(stack);
        Value::Stack(self.stacks.len() - 1)
    }

    /// Counts work; a module can be small and ask for any amount of it.
    fn spend(&mut self, n: usize, bytes: usize) -> Result<(), GraphError> {
        let left = self.work.checked_sub(n.saturating_add(bytes / BYTES_PER_WORK));
        self.work = left.ok_or_else(|| {
            let most = self.limits.ops.saturating_mul(WORK_PER_OP);
            failed(format!("it takes more than {most} steps; calls or loops repeat the same work over and over"))
        })?;
        Ok(())
    }

    fn push(&mut self, mut op: Op) -> Result<OpId, GraphError> {
        if self.to.n_ops() >= self.limits.ops {
            return Err(failed(format!("the graph grows beyond {} ops when its loops are unrolled", self.limits.ops)));
        }
        if let Some(iteration) = self.scope {
            op.name = format!("{}.i{iteration}", op.name);
        }
        self.spend(1, op.name.len())?;
        Ok(self.to.push(op))
    }

    /// The value as one op of the new graph.
    fn op(&mut self, value: &Value) -> Result<OpId, GraphError> {
        match value {
            Value::Op(id) => Ok(*id),
            Value::Scalar(s) => {
                if let Some(&known) = self.scalars.get(&(s.dtype, s.value)) {
                    return Ok(known);
                }
                let id = self.to.push(s.to_constant());
                self.scalars.insert((s.dtype, s.value), id);
                Ok(id)
            }
            Value::Tuple(elements) => {
                let operands = elements.iter().map(|e| self.op(e)).collect::<Result<Vec<_>, _>>()?;
                let shape = Shape::Tuple(operands.iter().map(|&o| self.to.op(o).shape.clone()).collect());
                self.push(op("tuple", "tuple", shape, operands, Vec::new()))
            }
            Value::Stack(s) => self.whole(*s),
        }
    }

    /// A stack as one tensor.
    fn whole(&mut self, at: usize) -> Result<OpId, GraphError> {
        let stack = self.stacks[at].clone();
        if let Some(parameter) = stack.parameter {
            self.not_row_wise.insert(parameter);
        }
        if let Some(whole) = stack.whole {
            return Ok(whole);
        }
        let whole = match stack.full_rows() {
            Some(rows) if rows.len() == 1 => rows[0],
            Some(rows) => {
                let mut attributes = Writer::default();
                attributes.numbers(instruction::DIMENSIONS, [0]);
                self.push(op("rows", "concatenate", stack.shape.clone().into(), rows, attributes.0))?
            }
            None => {
                let mut whole = stack.base.expect("a stack with missing rows has a base");
                for (i, row) in stack.rows.iter().enumerate() {
                    let Some(row) = row else { continue };
                    let mut operands = vec![whole, *row];
                    let index = super::super::shape::DType::Int32;
                    for axis in 0..stack.shape.dims.len() {
                        let start = if axis == 0 { i as i64 } else { 0 };
                        operands.push(self.op(&Value::Scalar(Scalar::new(index, start)))?);
                    }
                    let shape = stack.shape.clone().into();
                    whole = self.push(op("rows", "dynamic-update-slice", shape, operands, Vec::new()))?;
                }
                whole
            }
        };
        self.stacks[at].whole = Some(whole);
        Ok(whole)
    }

    /// Row `row` of a value, with its leading axis.
    fn row(&mut self, value: &Value, shape: &ArrayShape, row: u64) -> Result<OpId, GraphError> {
        let whole = match value {
            Value::Stack(s) => {
                let stack = &self.stacks[*s];
                match (stack.rows[row as usize], stack.base) {
                    (Some(known), _) => return Ok(known),
                    (None, Some(base)) => base,
                    (None, None) => self.whole(*s)?,
                }
            }
            other => self.op(other)?,
        };
        let starts: Vec<u64> = (0..shape.dims.len()).map(|a| if a == 0 { row } else { 0 }).collect();
        self.slice(whole, &starts, &row_shape(shape))
    }

    fn slice(&mut self, operand: OpId, starts: &[u64], shape: &ArrayShape) -> Result<OpId, GraphError> {
        // A row of a broadcast scalar is a broadcast scalar.
        let source = self.to.op(operand).clone();
        if &*source.opcode == "broadcast" && all_numbers(&source.attributes, instruction::DIMENSIONS).is_empty() {
            return self.push(op("row", "broadcast", shape.clone().into(), source.operands, Vec::new()));
        }
        let mut attributes = Writer::default();
        for (&start, &size) in starts.iter().zip(&shape.dims) {
            let mut dimension = Writer::default();
            dimension.number(1, start);
            dimension.number(2, start + size);
            dimension.number(3, 1);
            attributes.bytes(instruction::SLICE_DIMENSIONS, &dimension.0);
        }
        self.push(op("row", "slice", shape.clone().into(), vec![operand], attributes.0))
    }

    fn eval(&mut self, source: &Op, operands: Vec<Value>, depth: usize) -> Result<Value, GraphError> {
        self.spend(1 + operands.len(), source.attributes.len())?;
        let value = match &*source.opcode {
            "tuple" => Some(Value::Tuple(operands.as_slice().into())),
            "get-tuple-element" => match &operands[..] {
                [Value::Tuple(elements)] => {
                    let index = all_numbers(&source.attributes, instruction::TUPLE_INDEX).pop().unwrap_or(0);
                    let element = elements.get(index as usize).cloned();
                    Some(element.ok_or_else(|| {
                        failed(format!("{} takes element {index} of a tuple of {}", source.name, elements.len()))
                    })?)
                }
                _ => None,
            },
            "call" if source.called.len() == 1 => Some(self.call(source, operands.clone(), depth)?),
            "while" if source.called.len() == 2 => self.unroll(source, &operands, depth)?,
            "constant" => Scalar::of_constant(source).map(Value::Scalar),
            "dynamic-slice" => self.dynamic_slice(source, &operands)?,
            "dynamic-update-slice" => self.dynamic_update_slice(source, &operands)?,
            "slice" => self.static_slice(source, &operands)?,
            "reduce" => self.reduce_rows(source, &operands)?,
            opcode if is_elementwise(opcode) => match scalars(&operands).and_then(|s| fold(source, &s)) {
                Some(folded) => Some(Value::Scalar(folded)),
                None => self.elementwise_rows(source, &operands)?,
            },
            _ => None,
        };
        if let Some(value) = value {
            return Ok(value);
        }
        let operands = operands.iter().map(|v| self.op(v)).collect::<Result<Vec<_>, _>>()?;
        let called = source.called.iter().map(|&c| self.computations.copy(c, &mut self.to)).collect();
        let attributes = self.scoped(&source.attributes);
        self.spend(0, attributes.len())?;
        let copied = Op { operands, called, attributes, ..source.clone() };
        Ok(Value::Op(self.push(copied)?))
    }

    /// The attributes, with the whole scope of the op: a computation's ops are named from its caller on, and an
    /// unrolled loop's carry their iteration, as in `while/body[3]/mul`.
    fn scoped(&self, attributes: &Arc<[u8]>) -> Arc<[u8]> {
        const OP_NAME: u32 = 2;
        let metadata = find(attributes, instruction::METADATA).and_then(|m| m.bytes("metadata").ok());
        let name = metadata.and_then(|m| find(m, OP_NAME)).and_then(|n| n.text("op name").ok());
        let (Some(metadata), Some(name)) = (metadata, name) else { return attributes.clone() };
        let Some(renamed) = self.rename(name) else { return attributes.clone() };
        let mut named = Writer(without(metadata, OP_NAME));
        named.bytes(OP_NAME, renamed.as_bytes());
        let mut out = Writer(without(attributes, instruction::METADATA));
        out.bytes(instruction::METADATA, &named.0);
        out.0.into()
    }

    /// The scope of an op called `name` here; `None` where it stays.
    fn rename(&self, name: &str) -> Option<String> {
        let relative = !self.callers.is_empty() && name.split('/').next() != Some(&self.root);
        let whole = if relative { format!("{}/{name}", self.callers) } else { name.to_owned() };
        let at = whole.find("while/body").map(|i| i + "while/body".len());
        match (self.scope, at.filter(|&at| !whole[at..].starts_with('['))) {
            (Some(iteration), Some(at)) => Some(format!("{}[{iteration}]{}", &whole[..at], &whole[at..])),
            _ => relative.then_some(whole),
        }
    }

    /// Enters the callee of an op: what is called there is named from here on.
    fn call(&mut self, source: &Op, args: Vec<Value>, depth: usize) -> Result<Value, GraphError> {
        let name = source.scope().unwrap_or_default();
        let inner = self.rename(name).unwrap_or_else(|| name.to_owned());
        // Calls may nest, and names with them, but no name is of use at any length.
        let inner = if inner.len() > MAX_SCOPE || inner.is_empty() { self.callers.clone() } else { inner };
        let outer = std::mem::replace(&mut self.callers, inner);
        let result = self.enter(source.called[0], args, depth + 1);
        self.callers = outer;
        result
    }

    /// Evaluates a computation with these arguments.
    fn enter(&mut self, computation: CompId, args: Vec<Value>, depth: usize) -> Result<Value, GraphError> {
        const MAX_DEPTH: usize = 128;
        if depth > MAX_DEPTH {
            return Err(failed(format!("calls nest deeper than {MAX_DEPTH}")));
        }
        let from = self.from;
        let body = from.computation(computation);
        let mut values: Vec<Value> = Vec::with_capacity(body.ops.len());
        for op in &body.ops {
            let value = if &*op.opcode == "parameter" {
                let number = all_numbers(&op.attributes, instruction::PARAMETER_NUMBER).pop().unwrap_or(0) as usize;
                let arg = args.get(number).cloned();
                arg.ok_or_else(|| failed(format!("{} has no argument {number}", body.name)))?
            } else {
                let operands = op.operands.iter().map(|o| values[o.index()].clone()).collect();
                self.eval(op, operands, depth)?
            };
            values.push(value);
        }
        Ok(values.swap_remove(body.root.index()))
    }

    /// Runs a counted loop that holds real work; `None` leaves it as one op.
    fn unroll(&mut self, source: &Op, operands: &[Value], depth: usize) -> Result<Option<Value>, GraphError> {
        let ([Value::Tuple(_)], &[first, second]) = (operands, &source.called[..]) else { return Ok(None) };
        // Called computations stand in the order body, condition; tell them apart by their result.
        let is_condition = |c: CompId| {
            let c = self.from.computation(c);
            matches!(&c.ops[c.root.index()].shape, Shape::Array(a) if a.dims.is_empty() && a.dtype == super::super::shape::DType::Bool)
        };
        let (body, condition) = if is_condition(first) { (second, first) } else { (first, second) };
        if !self.is_heavy(body) {
            return Ok(None);
        }
        let Some(trips) = self.trips(body, condition, &operands[0])? else { return Ok(None) };
        let mut state = operands[0].clone();
        self.trips.insert(trips);
        let outer = self.scope;
        for iteration in 0..trips {
            self.scope = Some(outer.unwrap_or(0) * trips + iteration);
            state = self.enter(body, vec![state], depth + 1)?;
        }
        self.scope = outer;
        Ok(Some(state))
    }

    /// Whether unrolling a computation gives the planner something to spread.
    fn is_heavy(&mut self, computation: CompId) -> bool {
        if let Some(&known) = self.heavy.get(&computation) {
            return known;
        }
        let from = self.from;
        let ops = &from.computation(computation).ops;
        let heavy = ops.iter().any(|op| matches!(&*op.opcode, "dot" | "convolution" | "ragged-dot"))
            || ops.iter().flat_map(|op| &op.called).any(|&c| self.is_heavy(c));
        self.heavy.insert(computation, heavy);
        heavy
    }

    /// How often a loop runs, when its counter is known and the count is within limits.
    fn trips(&mut self, body: CompId, condition: CompId, state: &Value) -> Result<Option<u64>, GraphError> {
        let Value::Tuple(elements) = state else { return Ok(None) };
        let mut known: Vec<Option<Scalar>> =
            elements.iter().map(|e| if let Value::Scalar(s) = e { Some(*s) } else { None }).collect();
        let root = |c: CompId| (&self.from.computation(c).ops, self.from.computation(c).root.index());
        let (_, goes_on) = root(condition);
        let (ops, result) = root(body);
        for trips in 0..=self.limits.trips {
            match self.arithmetic(condition, Given::Elements(&known))?[goes_on] {
                None => return Ok(None),
                Some(Scalar { value: 0, .. }) => return Ok(Some(trips)),
                Some(_) => {}
            }
            if &*ops[result].opcode != "tuple" {
                return Ok(None);
            }
            let values = self.arithmetic(body, Given::Elements(&known))?;
            let next = ops[result].operands.iter().map(|o| values[o.index()]);
            known = known.iter().zip(next).map(|(k, next)| k.and(next)).collect();
        }
        Ok(None)
    }

    /// Values of a computation's ops, as far as they are integer arithmetic on known scalars.
    fn arithmetic(&mut self, computation: CompId, given: Given<'_>) -> Result<Vec<Option<Scalar>>, GraphError> {
        let from = self.from;
        let ops = &from.computation(computation).ops;
        let mut values: Vec<Option<Scalar>> = Vec::with_capacity(ops.len());
        for op in ops {
            self.spend(1 + op.operands.len(), op.attributes.len())?;
            let number = |field| all_numbers(&op.attributes, field).pop().unwrap_or(0) as usize;
            let is_element = || op.operands.first().is_some_and(|o| &*ops[o.index()].opcode == "parameter");
            let value = match (&*op.opcode, given, &op.called[..]) {
                ("constant", ..) => Scalar::of_constant(op),
                ("parameter", Given::Arguments(known), _) => {
                    known.get(number(instruction::PARAMETER_NUMBER)).copied().flatten()
                }
                ("get-tuple-element", Given::Elements(known), _) if is_element() => {
                    known.get(number(instruction::TUPLE_INDEX)).copied().flatten()
                }
                // A small scalar function, such as the clamp that `jax.numpy` puts around an index.
                ("call", _, &[callee]) => {
                    let known: Vec<Option<Scalar>> = op.operands.iter().map(|o| values[o.index()]).collect();
                    self.arithmetic(callee, Given::Arguments(&known))?[from.computation(callee).root.index()]
                }
                _ => {
                    let operands: Option<Vec<Scalar>> = op.operands.iter().map(|o| values[o.index()]).collect();
                    operands.and_then(|known| fold(op, &known))
                }
            };
            values.push(value);
        }
        Ok(values)
    }

    fn dynamic_slice(&mut self, source: &Op, operands: &[Value]) -> Result<Option<Value>, GraphError> {
        let (Some(shape), Some(starts)) = (source.shape.as_array().cloned(), scalars(&operands[1..])) else {
            return Ok(None);
        };
        let Some(full) = self.array_shape(&operands[0]) else { return Ok(None) };
        if starts.len() != full.dims.len() || shape.dims.len() != full.dims.len() {
            return Ok(None);
        }
        // Starts are clamped so that the slice lies inside.
        let starts: Vec<u64> = starts
            .iter()
            .zip(full.dims.iter().zip(&shape.dims))
            .map(|(s, (&n, &size))| (s.value.max(0) as u64).min(n.saturating_sub(size)))
            .collect();
        self.constant_slice(&operands[0], &full, &starts, &shape).map(Some)
    }

    fn static_slice(&mut self, source: &Op, operands: &[Value]) -> Result<Option<Value>, GraphError> {
        let [Value::Stack(_)] = operands else { return Ok(None) };
        let (Some(shape), Some(full)) = (source.shape.as_array().cloned(), self.array_shape(&operands[0])) else {
            return Ok(None);
        };
        let mut starts = Vec::new();
        for field in Fields::new(&source.attributes, "attributes") {
            let (number, value, _) = field?;
            if number == instruction::SLICE_DIMENSIONS {
                let dimension = value.bytes("slice dimensions")?;
                if all_numbers(dimension, 3).pop().unwrap_or(1) > 1 {
                    return Ok(None);
                }
                starts.push(all_numbers(dimension, 1).pop().unwrap_or(0));
            }
        }
        if starts.len() != full.dims.len() || shape.dims.len() != full.dims.len() {
            return Ok(None);
        }
        self.constant_slice(&operands[0], &full, &starts, &shape).map(Some)
    }

    fn constant_slice(
        &mut self,
        operand: &Value,
        full: &ArrayShape,
        starts: &[u64],
        shape: &ArrayShape,
    ) -> Result<Value, GraphError> {
        if shape == full {
            return Ok(operand.clone());
        }
        if *shape == row_shape(full) && starts[1..].iter().all(|&s| s == 0) {
            return Ok(Value::Op(self.row(operand, full, starts[0])?));
        }
        let operand = self.op(operand)?;
        Ok(Value::Op(self.slice(operand, starts, shape)?))
    }

    fn dynamic_update_slice(&mut self, source: &Op, operands: &[Value]) -> Result<Option<Value>, GraphError> {
        let (Some(full), Some(starts)) = (source.shape.as_array().cloned(), scalars(&operands[2..])) else {
            return Ok(None);
        };
        let Some(update) = self.array_shape(&operands[1]) else { return Ok(None) };
        let is_row = full.dims.first().is_some_and(|&n| n > 1 && n <= self.limits.trips)
            && update == row_shape(&full)
            && starts.len() == full.dims.len()
            && starts[1..].iter().all(|s| s.value <= 0);
        if !is_row {
            return Ok(None);
        }
        let row = (starts[0].value.max(0) as u64).min(full.dims[0] - 1) as usize;
        let mut stack = match &operands[0] {
            Value::Stack(s) => Stack { whole: None, parameter: None, ..self.stacks[*s].clone() },
            other => {
                let base = self.op(other)?;
                let rows = vec![None; full.dims[0] as usize];
                Stack { shape: full, rows, base: Some(base), whole: None, parameter: None }
            }
        };
        stack.rows[row] = Some(self.op(&operands[1])?);
        Ok(Some(self.stack(stack)))
    }

    /// An elementwise op on full stacks works row by row.
    fn elementwise_rows(&mut self, source: &Op, operands: &[Value]) -> Result<Option<Value>, GraphError> {
        let Some(shape) = source.shape.as_array().cloned() else { return Ok(None) };
        let any_full = operands.iter().any(|v| matches!(v, Value::Stack(s) if self.stacks[*s].is_full()));
        if !any_full || shape.dims.is_empty() {
            return Ok(None);
        }
        // Operands of another shape are scalars that apply to every row (`clamp`, `select`).
        for value in operands {
            match self.array_shape(value) {
                Some(s) if s.dims == shape.dims || s.dims.is_empty() => {}
                _ => return Ok(None),
            }
        }
        let mut rows = Vec::with_capacity(shape.dims[0] as usize);
        for r in 0..shape.dims[0] {
            let mut of_row = Vec::with_capacity(operands.len());
            for value in operands {
                let whole = self.array_shape(value).expect("checked above");
                of_row.push(if whole.dims.is_empty() { self.op(value)? } else { self.row(value, &whole, r)? });
            }
            let name = format!("{}.row{r}", source.name);
            let shape = row_shape(&shape).into();
            let row = Op { name, shape, operands: of_row, shape_raw: None, ..source.clone() };
            rows.push(Some(self.push(row)?));
        }
        let stack = Stack { shape, rows, base: None, whole: None, parameter: None };
        Ok(Some(self.stack(stack)))
    }

    /// A reduction of a full stack reduces the rows, then, over the leading axis, combines what they give.
    fn reduce_rows(&mut self, source: &Op, operands: &[Value]) -> Result<Option<Value>, GraphError> {
        let [Value::Stack(s), init] = operands else { return Ok(None) };
        let stack = self.stacks[*s].clone();
        let (Some(rows), Some(shape), &[reducer]) =
            (stack.full_rows(), source.shape.as_array().cloned(), &source.called[..])
        else {
            return Ok(None);
        };
        let axes = all_numbers(&source.attributes, instruction::DIMENSIONS);
        let reducer_op = {
            let c = self.from.computation(reducer);
            let root = &c.ops[c.root.index()];
            let of_parameters = root.operands.iter().all(|o| &*c.ops[o.index()].opcode == "parameter");
            (of_parameters && c.ops.len() == 3).then(|| root.opcode.clone())
        };
        let init = self.op(init)?;
        let combines = match reducer_op.as_deref() {
            Some("add") => is_zero(self.to.op(init)),
            Some("maximum" | "minimum" | "and" | "or") => true,
            _ => false,
        };
        let over_rows = axes.contains(&0);
        if over_rows && !combines {
            return Ok(None);
        }
        let called = vec![self.computations.copy(reducer, &mut self.to)];
        let part_shape = if over_rows { shape.clone() } else { row_shape(&shape) };
        let mut parts = Vec::with_capacity(rows.len());
        for (r, row) in rows.into_iter().enumerate() {
            let name = format!("{}.row{r}", source.name);
            let operands = vec![row, init];
            let shape = part_shape.clone().into();
            let part = Op { name, shape, operands, called: called.clone(), shape_raw: None, ..source.clone() };
            parts.push(self.push(part)?);
        }
        if !over_rows {
            let rows = parts.into_iter().map(Some).collect();
            let stack = Stack { shape, rows, base: None, whole: None, parameter: None };
            return Ok(Some(self.stack(stack)));
        }
        let opcode = reducer_op.expect("it combines");
        let mut sum = parts[0];
        for &part in &parts[1..] {
            sum = self.push(op("combined", &opcode, shape.clone().into(), vec![sum, part], Vec::new()))?;
        }
        Ok(Some(Value::Op(sum)))
    }

    fn array_shape(&self, value: &Value) -> Option<ArrayShape> {
        match value {
            Value::Op(id) => self.to.op(*id).shape.as_array().cloned(),
            Value::Scalar(s) => Some(ArrayShape::scalar(s.dtype)),
            Value::Stack(s) => Some(self.stacks[*s].shape.clone()),
            Value::Tuple(_) => None,
        }
    }
}

/// All values, when they are known scalars.
fn scalars(values: &[Value]) -> Option<Vec<Scalar>> {
    values.iter().map(|v| if let Value::Scalar(s) = v { Some(*s) } else { None }).collect()
}

/// Whether a constant scalar is zero: its literal has no byte set but those of its shape.
pub fn is_zero(constant: &Op) -> bool {
    let literal = find(&constant.attributes, instruction::LITERAL).and_then(|l| l.bytes("literal").ok());
    let Some(literal) = literal.filter(|_| &*constant.opcode == "constant") else { return false };
    Fields::new(literal, "literal").flatten().filter(|(n, _, _)| *n != 1).all(|(_, value, _)| match value {
        super::super::proto::Value::Bytes(b) => b.iter().all(|&b| b == 0),
        super::super::proto::Value::Varint(n) => n == 0,
        super::super::proto::Value::Fixed32(n) => n == 0,
        super::super::proto::Value::Fixed64(n) => n == 0,
    })
}

/// The graph of what its outputs need; all parameters stay.
pub fn without_dead_ops(graph: &Graph) -> Graph {
    let mut alive = vec![false; graph.n_ops()];
    for o in graph.outputs() {
        alive[o.index()] = true;
    }
    for (id, op) in graph.ops().rev() {
        if alive[id.index()] || has_side_effect(op) {
            alive[id.index()] = true;
            for o in &op.operands {
                alive[o.index()] = true;
            }
        }
    }
    let ops: Vec<OpId> = graph.ops().map(|(id, _)| id).filter(|id| alive[id.index()]).collect();
    cut(graph, &graph.name, &ops, graph.parameters(), graph.outputs())
}

fn has_side_effect(op: &Op) -> bool {
    matches!(&*op.opcode, "infeed" | "outfeed" | "send" | "recv" | "send-done" | "recv-done")
        || find(&op.attributes, instruction::CUSTOM_CALL_HAS_SIDE_EFFECT)
            .is_some_and(|v| v.number("flag").is_ok_and(|n| n != 0))
}
