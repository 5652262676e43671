//! From a graph of whole tensors to one of parts: layouts are carried forward, op by op.

use std::collections::BTreeMap;
use std::ops::Range;

use super::super::cut::{Computations, cut, op, parameter};
use super::super::error::GraphError;
use super::super::ir::{Graph, Lane, Op, OpId};
use super::super::passes::{Limits, without_dead_ops};
use super::super::proto::{Fields, Writer, all_numbers, instruction, without};
use super::super::shape::{ArrayShape, Shape};
use super::recipe::{Cut, Recipe, Yield, gathered_axis, recipe, slice_ranges};
use super::rows::Rows;

/// Rewrites a graph whose parameters and results come in parts.
///
/// Parts are carried as far as they go. An op that cannot work on them reads the joined tensor, which is made once; a
/// part of something whole is a slice of it. The ops of one part stand together where nothing between them needs another
/// part, so that a cut of the line can fall between two parts.
///
/// # Shapes
/// `inputs` and `outputs`: by parameter and by output of `graph`, how it is cut: each becomes as many parameters or
/// outputs as it has parts, at its place. `rows`: which ops work on parts of rows beside that, which nothing outside sees.
/// # Errors
/// [`GraphError::Pass`] when the graph would have too many ops.
/// # Panics
/// On a graph that [`verify`](super::super::verify::verify) refuses, and on cuts that are not those of its tensors.
/// # Complexity
/// O(ops · parts · log ops).
pub fn rewrite(
    graph: &Graph,
    inputs: &[Option<Cut>],
    outputs: &[Option<Cut>],
    rows: &Rows,
) -> Result<Graph, GraphError> {
    let mut run = Rewrite {
        from: graph,
        rows,
        to: Graph::new(graph.name.clone()),
        computations: Computations { from: graph, map: BTreeMap::new() },
        values: Vec::with_capacity(graph.n_ops()),
        joined: BTreeMap::new(),
        sliced: BTreeMap::new(),
        batch: None,
    };
    let given: Vec<Value> = graph.parameters().iter().zip(inputs).map(|(&p, cut)| run.parameter(p, cut)).collect();
    if let Some(Value::Whole(first)) = rows.n_params().and_then(|n| given.get(n)) {
        run.batch = Some(*first);
    }
    let number: BTreeMap<OpId, usize> = graph.parameters().iter().enumerate().map(|(i, &p)| (p, i)).collect();
    for (id, op) in graph.ops() {
        let value = match number.get(&id) {
            Some(&i) => given[i].clone(),
            None => run.op(id, op),
        };
        run.values.push(value);
        let (most, n) = (Limits::default().ops, run.to.n_ops());
        if n > most {
            let problem = format!("the graph grows beyond {most} ops; ask for fewer parts");
            return Err(GraphError::Pass { pass: "split", problem });
        }
    }
    let mut results = Vec::new();
    for (&o, cut) in graph.outputs().iter().zip(outputs) {
        match cut {
            None => results.push(run.whole(o)),
            Some(cut) => results.extend(run.parts(o, cut)),
        }
    }
    let order = run.order();
    run.to.set_outputs(results);
    let parameters = run.to.parameters();
    Ok(without_dead_ops(&cut(&run.to, &graph.name, &order, parameters, run.to.outputs())))
}

/// What an op of the source has become.
#[derive(Clone, Debug)]
enum Value {
    Whole(OpId),
    Parts(Cut, Vec<OpId>),
}

struct Rewrite<'a> {
    from: &'a Graph,
    rows: &'a Rows,
    to: Graph,
    computations: Computations<'a>,
    /// By op of the source, as far as it has come.
    values: Vec<Value>,
    /// The whole of ops that came out in parts.
    joined: BTreeMap<OpId, OpId>,
    /// Slices, by operand, axis, range and part.
    sliced: BTreeMap<(OpId, usize, [u64; 2], Lane), OpId>,
    /// The first parameter of the batch, which every shard has.
    batch: Option<OpId>,
}

impl Rewrite<'_> {
    fn push(&mut self, op: Op, lane: Option<Lane>) -> OpId {
        self.to.push(Op { lane, ..op })
    }

    fn parameter(&mut self, id: OpId, cut: &Option<Cut>) -> Value {
        let source = self.from.op(id);
        let attributes = without(&source.attributes, instruction::PARAMETER_NUMBER);
        let (Some(cut), Some(shape)) = (cut, source.shape.as_array()) else {
            let copied = Op { attributes: attributes.into(), ..parameter(&source.name, source.shape.clone()) };
            return Value::Whole(self.to.push_parameter(copied));
        };
        let of = |(i, range): (usize, Range<u64>)| {
            let shape = with_size(shape, cut.axis, range.end - range.start);
            let lane = Some(Lane { index: i as u32, of: cut.n_parts() as u32 });
            let part = parameter(&format!("{}.part{i}", source.name), shape.into());
            self.to.push_parameter(Op { lane, ..part })
        };
        Value::Parts(cut.clone(), cut.ranges().enumerate().map(of).collect())
    }

    fn op(&mut self, id: OpId, source: &Op) -> Value {
        // Parts of rows are for those that work on them, the others join them.
        let of_params = || source.operands.iter().map(|o| self.cut_of(*o).filter(|_| !self.rows.are_cut(*o))).collect();
        let cuts: Vec<Option<&Cut>> = self.rows.cuts(id, source).unwrap_or_else(of_params);
        match recipe(self.from, source, &cuts) {
            Some(recipe) => self.in_parts(source, &recipe),
            None => {
                let operands = source.operands.iter().map(|&o| self.whole(o)).collect();
                let called = source.called.iter().map(|&c| self.computations.copy(c, &mut self.to)).collect();
                Value::Whole(self.push(Op { operands, called, ..source.clone() }, None))
            }
        }
    }

    fn cut_of(&self, id: OpId) -> Option<&Cut> {
        match &self.values[id.index()] {
            Value::Parts(cut, _) => Some(cut),
            Value::Whole(_) => None,
        }
    }

    fn in_parts(&mut self, source: &Op, recipe: &Recipe) -> Value {
        let operands: Vec<Vec<OpId>> = source
            .operands
            .iter()
            .zip(&recipe.operands)
            .map(|(&o, cut)| match cut {
                Some(cut) => self.parts(o, cut),
                None => vec![self.whole(o)],
            })
            .collect();
        let called: Vec<_> = source.called.iter().map(|&c| self.computations.copy(c, &mut self.to)).collect();
        let n = operands.iter().map(Vec::len).max().unwrap_or(0);
        let mut made = Vec::with_capacity(n);
        for i in 0..n {
            // An operand that is not cut is the same for every part.
            let operands = operands.iter().map(|parts| parts[i.min(parts.len() - 1)]).collect();
            let (shape, attributes) = match &recipe.yields {
                Yield::Parts(cut) => {
                    let size = cut.bounds[i + 1] - cut.bounds[i];
                    (in_size(&source.shape, cut.axis, size), resized(self.from, source, cut.axis, size))
                }
                Yield::Terms(_) => (source.shape.clone(), source.attributes.clone()),
            };
            let name = format!("{}.part{i}", source.name);
            let part =
                Op { name, shape, operands, attributes, called: called.clone(), shape_raw: None, ..source.clone() };
            made.push(self.push(part, Some(Lane { index: i as u32, of: n as u32 })));
        }
        match &recipe.yields {
            Yield::Parts(cut) => Value::Parts(cut.clone(), made),
            Yield::Terms(opcode) => {
                // Neighbours first: terms that one shard makes are one when they leave it.
                let name = format!("{}.sum", source.name);
                while made.len() > 1 {
                    let combine = |pair: &[OpId]| match *pair {
                        [a, b] => {
                            let sum = op(&name, opcode, source.shape.clone(), vec![a, b], scope(source));
                            self.push(sum, None)
                        }
                        _ => pair[0],
                    };
                    made = made.chunks(2).map(combine).collect();
                }
                Value::Whole(made[0])
            }
        }
    }

    /// An op of the source as one op.
    fn whole(&mut self, id: OpId) -> OpId {
        let (cut, parts) = match &self.values[id.index()] {
            Value::Whole(whole) => return *whole,
            Value::Parts(cut, parts) => (cut.axis, parts.clone()),
        };
        if let Some(&joined) = self.joined.get(&id) {
            return joined;
        }
        let source = self.from.op(id);
        let joined = match &source.shape {
            Shape::Tuple(elements) => {
                let join = |(i, element): (usize, &Shape)| {
                    let parts = parts.iter().map(|&part| self.element(part, i)).collect();
                    self.join(source, element, parts, cut)
                };
                let elements = elements.iter().enumerate().map(join).collect();
                let name = format!("{}.whole", source.name);
                self.push(op(&name, "tuple", source.shape.clone(), elements, scope(source)), None)
            }
            shape => self.join(source, shape, parts, cut),
        };
        self.joined.insert(id, joined);
        joined
    }

    fn join(&mut self, source: &Op, shape: &Shape, parts: Vec<OpId>, axis: usize) -> OpId {
        let mut attributes = Writer(scope(source));
        attributes.numbers(instruction::DIMENSIONS, [axis as u64]);
        let joined = op(&format!("{}.whole", source.name), "concatenate", shape.clone(), parts, attributes.0);
        self.push(joined, None)
    }

    /// An element of a new tuple.
    fn element(&mut self, tuple: OpId, index: usize) -> OpId {
        let source = self.to.op(tuple);
        let shape = match &source.shape {
            Shape::Tuple(elements) => elements[index].clone(),
            shape => shape.clone(),
        };
        let mut attributes = Writer(scope(source));
        attributes.number(instruction::TUPLE_INDEX, index as u64);
        let (name, lane) = (format!("{}.{index}", source.name), source.lane);
        self.push(op(&name, "get-tuple-element", shape, vec![tuple], attributes.0), lane)
    }

    /// An op of the source in these parts.
    fn parts(&mut self, id: OpId, cut: &Cut) -> Vec<OpId> {
        if let Value::Parts(known, parts) = &self.values[id.index()]
            && known == cut
        {
            return parts.clone();
        }
        let whole = self.whole(id);
        let of = cut.n_parts() as u32;
        let part = |(i, range): (usize, Range<u64>)| self.slice(whole, cut.axis, range, Lane { index: i as u32, of });
        cut.ranges().enumerate().map(part).collect()
    }

    /// A range of a new op, for a lane. What is the same everywhere along the axis is made smaller instead, by whoever has the
    /// lane; of other values a part travels, not the whole.
    fn slice(&mut self, whole: OpId, axis: usize, range: Range<u64>, lane: Lane) -> OpId {
        let key = (whole, axis, [range.start, range.end], lane);
        if let Some(&known) = self.sliced.get(&key) {
            return known;
        }
        let (from, to) = (range.start, range.end);
        let source = self.to.op(whole).clone();
        let shape = source.shape.as_array().expect("what has a cut is an array");
        let dimensions = || all_numbers(&source.attributes, instruction::DIMENSIONS);
        let part = with_size(shape, axis, to - from);
        let name = format!("{}.{from}-{to}", source.name);
        let smaller = |operands: Vec<OpId>| Op {
            name: name.clone(),
            shape: part.clone().into(),
            operands,
            shape_raw: None,
            ..source.clone()
        };
        let is_batch = self.batch.is_some_and(|first| whole >= first) && &*source.opcode == "parameter";
        let (made, is_made) = match &*source.opcode {
            "broadcast" => {
                let along = dimensions().iter().position(|&d| d as usize == axis);
                let operand = match along {
                    Some(along) => self.slice(source.operands[0], along, range, lane),
                    None => source.operands[0],
                };
                (smaller(vec![operand]), true)
            }
            // The only dimension of an iota is the one it counts along.
            "iota" if dimensions() != [axis as u64] => (smaller(Vec::new()), true),
            _ => {
                let mut attributes = Writer(scope(&source));
                let ranges = shape.dims.iter().enumerate().map(|(i, &n)| if i == axis { (from, to) } else { (0, n) });
                ranges.for_each(|(from, to)| slice_dimension(&mut attributes, from, to));
                (op(&name, "slice", part.clone().into(), vec![whole], attributes.0), is_batch)
            }
        };
        let made = self.push(made, is_made.then_some(lane));
        self.sliced.insert(key, made);
        made
    }

    /// All new ops in an order in which the ops of one part stand together. An op of no part that reads what parts have
    /// made since the last such op ends a run; inside a run come ops of no part, then those of the first part, and so on.
    fn order(&self) -> Vec<OpId> {
        let mut order: Vec<OpId> = Vec::with_capacity(self.to.n_ops());
        let mut run: Vec<OpId> = Vec::new();
        // Where the run at hand began: ops from here on that belong to a part are in it.
        let mut begin = 0;
        let flush = |run: &mut Vec<OpId>, order: &mut Vec<OpId>| {
            // Stable, so operands stay before their users: a part reads itself and what belongs to none.
            run.sort_by_key(|id| self.to.op(*id).lane.map_or(0, |lane| lane.index + 1));
            order.append(run);
        };
        for (id, op) in self.to.ops() {
            let reads = |o: &OpId| o.index() >= begin && self.to.op(*o).lane.is_some();
            if op.lane.is_none() && op.operands.iter().any(reads) {
                flush(&mut run, &mut order);
                begin = id.index();
            }
            run.push(id);
        }
        flush(&mut run, &mut order);
        order
    }
}

/// The shape with this size along an axis, of each element where it is a tuple.
fn in_size(shape: &Shape, axis: usize, size: u64) -> Shape {
    match shape {
        Shape::Array(array) => with_size(array, axis, size).into(),
        Shape::Tuple(elements) => Shape::Tuple(elements.iter().map(|e| in_size(e, axis, size)).collect()),
        other => other.clone(),
    }
}

fn with_size(shape: &ArrayShape, axis: usize, size: u64) -> ArrayShape {
    let mut shape = shape.clone();
    shape.dims[axis] = size;
    shape
}

/// An op's attributes, for a part of it along an axis of its result that has this size.
fn resized(graph: &Graph, source: &Op, axis: usize, size: u64) -> std::sync::Arc<[u8]> {
    if &*source.opcode == "gather" {
        let rank = graph.op(source.operands[0]).shape.as_array().map_or(0, |s| s.dims.len());
        let Some(axis) = gathered_axis(source, rank, axis) else { return source.attributes.clone() };
        let mut sizes = all_numbers(&source.attributes, instruction::GATHER_SLICE_SIZES);
        sizes[axis] = size;
        let mut attributes = Writer(without(&source.attributes, instruction::GATHER_SLICE_SIZES));
        attributes.numbers(instruction::GATHER_SLICE_SIZES, sizes);
        return attributes.0.into();
    }
    if &*source.opcode != "slice" {
        return source.attributes.clone();
    }
    let mut attributes = Writer(without(&source.attributes, instruction::SLICE_DIMENSIONS));
    for (i, (from, to, step)) in slice_ranges(source).into_iter().enumerate() {
        match i == axis {
            true => slice_dimension(&mut attributes, 0, size),
            false => {
                let mut dimension = Writer::default();
                [from, to, step].into_iter().enumerate().for_each(|(i, n)| dimension.number(i as u32 + 1, n));
                attributes.bytes(instruction::SLICE_DIMENSIONS, &dimension.0);
            }
        }
    }
    attributes.0.into()
}

fn slice_dimension(attributes: &mut Writer, from: u64, to: u64) {
    let mut dimension = Writer::default();
    [from, to, 1].into_iter().enumerate().for_each(|(i, n)| dimension.number(i as u32 + 1, n));
    attributes.bytes(instruction::SLICE_DIMENSIONS, &dimension.0);
}

/// Attributes that say where an op comes from, for one that stands beside it.
fn scope(source: &Op) -> Vec<u8> {
    let mut metadata = Writer::default();
    for (number, _, raw) in Fields::new(&source.attributes, "attributes").flatten() {
        if number == instruction::METADATA {
            metadata.fields(raw);
        }
    }
    metadata.0
}
