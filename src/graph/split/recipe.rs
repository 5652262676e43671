//! How one op is done in parts, by what is known of its operands.

use std::ops::Range;
use std::rc::Rc;

use super::super::ir::{CompId, Graph, Op};
use super::super::passes::{is_elementwise, is_zero};
use super::super::proto::{Fields, all_numbers, find, instruction};
use super::super::shape::{ArrayShape, Shape};

/// A tensor in parts along one axis.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    pub axis: usize,
    /// Where parts begin, and the size of the axis: ascending, at least three, the first is 0.
    pub bounds: Rc<[u64]>,
}

impl Cut {
    pub fn n_parts(&self) -> usize {
        self.bounds.len() - 1
    }
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.bounds.windows(2).map(|w| w[0]..w[1])
    }
    /// The same parts along another axis.
    fn along(&self, axis: usize) -> Self {
        Self { axis, bounds: self.bounds.clone() }
    }
}

/// An op in parts: part `i` reads part `i` of every operand that is cut, and all of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// By operand; `None` for one that every part reads whole.
    pub operands: Vec<Option<Cut>>,
    pub yields: Yield,
}

/// What the parts of an op are of its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Yield {
    /// Its parts.
    Parts(Cut),
    /// Terms that this elementwise op combines.
    Terms(String),
}

/// How an op can be done in parts, where some of its operands come in parts; `None` where they have to be joined first.
///
/// # Shapes
/// `cuts`: one for each operand.
pub fn recipe(graph: &Graph, op: &Op, cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let first = cuts.iter().flatten().next()?;
    if &*op.opcode == "get-tuple-element" {
        return Some(Recipe { operands: vec![Some((*first).clone())], yields: Yield::Parts((*first).clone()) });
    }
    // Elements of what is reduced together have one shape but for their type.
    let out = match &op.shape {
        Shape::Tuple(elements) if &*op.opcode == "reduce" => elements.first()?.as_array()?,
        shape => shape.as_array()?,
    };
    let shapes: Vec<&ArrayShape> = op.operands.iter().map(|&o| graph.op(o).shape.as_array()).collect::<Option<_>>()?;
    let dimensions = || all_numbers(&op.attributes, instruction::DIMENSIONS);
    // For ops whose first operand is the one that matters.
    let alone = |axis: Option<usize>| -> Option<Recipe> {
        let cut = cuts[0]?;
        let operands = std::iter::once(Some(cut.clone())).chain(cuts[1..].iter().map(|_| None)).collect();
        Some(Recipe { operands, yields: Yield::Parts(cut.along(axis?)) })
    };
    let found = match &*op.opcode {
        "dot" => dot(op, &shapes, cuts),
        "convolution" => convolution(op, &shapes, cuts),
        "gather" => gather(op, &shapes, cuts),
        "scatter" => scatter(graph, op, &shapes, cuts),
        "reduce" => reduce(graph, op, cuts),
        "transpose" => {
            let axis = cuts[0]?.axis as u64;
            alone(dimensions().iter().position(|&d| d == axis))
        }
        "broadcast" => alone(dimensions().get(cuts[0]?.axis).map(|&d| d as usize)),
        "reshape" => {
            let cut = cuts[0]?;
            let (axis, bounds) = reshaped(&shapes[0].dims, &out.dims, cut)?;
            let yields = Yield::Parts(Cut { axis, bounds });
            Some(Recipe { operands: vec![Some(cut.clone())], yields })
        }
        "concatenate" if dimensions() != [first.axis as u64] => {
            let operands = cuts.iter().map(|_| Some((*first).clone())).collect();
            Some(Recipe { operands, yields: Yield::Parts((*first).clone()) })
        }
        "slice" => {
            let cut = cuts[0]?;
            let whole = slice_ranges(op).get(cut.axis) == Some(&(0, shapes[0].dims[cut.axis], 1));
            alone(whole.then_some(cut.axis))
        }
        "pad" => {
            let cut = cuts[0]?;
            alone((!is_padded(op, cut.axis)).then_some(cut.axis))
        }
        "reverse" if !dimensions().contains(&(first.axis as u64)) => alone(Some(first.axis)),
        // Pooling and its derivative, along axes that are not pooled.
        "reduce-window" | "select-and-scatter" if !is_windowed(op, first.axis) => {
            let (init, arrays) = shapes.split_last()?;
            let operands = arrays.iter().map(|_| Some((*first).clone())).chain([None]).collect();
            let yields = Yield::Parts((*first).clone());
            init.dims.is_empty().then_some(Recipe { operands, yields })
        }
        opcode if is_elementwise(opcode) => {
            // Scalars apply to every element (`clamp`, `select`).
            let needs = |shape: &&ArrayShape| (shape.dims == out.dims).then(|| (*first).clone());
            let fit = shapes.iter().all(|s| s.dims == out.dims || s.dims.is_empty());
            let operands = shapes.iter().map(needs).collect();
            fit.then(|| Recipe { operands, yields: Yield::Parts((*first).clone()) })
        }
        _ => None,
    };
    // Axes come from attributes, which nobody has compared with shapes.
    let is_of = |cut: &Cut, shape: &ArrayShape| shape.dims.get(cut.axis) == cut.bounds.last();
    found.filter(|recipe| {
        let operands = recipe.operands.iter().zip(&shapes).all(|(cut, s)| cut.as_ref().is_none_or(|c| is_of(c, s)));
        operands && if let Yield::Parts(cut) = &recipe.yields { is_of(cut, out) } else { true }
    })
}

/// A product in parts of one operand: along a batch axis both are cut, along one that is contracted too and the parts are
/// terms of a sum, along another one the second operand is read whole.
fn dot(op: &Op, shapes: &[&ArrayShape], cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let numbers = find(&op.attributes, instruction::DOT)?.bytes("dot").ok()?;
    let contracted = [1, 2].map(|n| all_numbers(numbers, n));
    let batch = [3, 4].map(|n| all_numbers(numbers, n));
    let by = |side: usize| -> Option<Recipe> {
        let (cut, other) = (cuts[side]?, 1 - side);
        let at = |axes: &[u64]| axes.iter().position(|&d| d as usize == cut.axis);
        let (theirs, yields) = if let Some(i) = at(&contracted[side]) {
            (Some(cut.along(contracted[other][i] as usize)), Yield::Terms("add".to_owned()))
        } else if let Some(i) = at(&batch[side]) {
            (Some(cut.along(batch[other][i] as usize)), Yield::Parts(cut.along(i)))
        } else {
            let is_free = |s: usize, d: u64| !contracted[s].contains(&d) && !batch[s].contains(&d);
            let before = (0..cut.axis as u64).filter(|&d| is_free(side, d)).count();
            let of_left =
                if side == 0 { 0 } else { (0..shapes[0].dims.len() as u64).filter(|&d| is_free(0, d)).count() };
            (None, Yield::Parts(cut.along(batch[0].len() + of_left + before)))
        };
        let mut operands = vec![Some(cut.clone()), theirs];
        operands.swap(0, side);
        Some(Recipe { operands, yields })
    };
    cheaper([by(0), by(1)], shapes, cuts)
}

/// Where two operands do not go together, the smaller one changes.
fn cheaper(recipes: [Option<Recipe>; 2], shapes: &[&ArrayShape], cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let cost = |recipe: &Recipe| -> u64 {
        let changes = |i: &usize| cuts[*i].is_some() && cuts[*i] != recipe.operands[*i].as_ref();
        (0..2).filter(changes).map(|i| shapes[i].bytes().0).sum()
    };
    recipes.into_iter().flatten().min_by_key(cost)
}

/// A convolution in parts of its batch or of its output channels, with the other operand whole; or of its input channels,
/// which are summed up. Its derivatives are convolutions too, with other names for the same axes.
fn convolution(op: &Op, shapes: &[&ArrayShape], cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let groups = [instruction::FEATURE_GROUPS, instruction::BATCH_GROUPS];
    if groups.iter().any(|&n| all_numbers(&op.attributes, n).iter().any(|&n| n > 1)) {
        return None;
    }
    let numbers = find(&op.attributes, instruction::CONVOLUTION)?.bytes("convolution").ok()?;
    let [kernel_in, kernel_out, batch, channel, out_batch, out_channel] =
        [3, 4, 7, 8, 9, 10].map(|n| all_numbers(numbers, n).pop().unwrap_or(0) as usize);
    let (free, summed, yielded) = ([batch, kernel_out], [channel, kernel_in], [out_batch, out_channel]);
    let by = |side: usize| -> Option<Recipe> {
        let (cut, other) = (cuts[side]?, 1 - side);
        let (theirs, yields) = match cut.axis {
            axis if axis == free[side] => (None, Yield::Parts(cut.along(yielded[side]))),
            axis if axis == summed[side] => (Some(cut.along(summed[other])), Yield::Terms("add".to_owned())),
            // Windows overlap.
            _ => return None,
        };
        let mut operands = vec![Some(cut.clone()), theirs];
        operands.swap(0, side);
        Some(Recipe { operands, yields })
    };
    cheaper([by(0), by(1)], shapes, cuts)
}

/// Axes of a gather or scatter: of the whole tensor, those that windows span, in order; of what is gathered or scattered, the
/// axes of the windows. `numbers`: the op's dimension numbers.
fn windows(numbers: &[u8], rank: usize) -> (Vec<usize>, Vec<usize>) {
    let [windows, inserted, indexed, batch] = [1, 2, 3, 5].map(|n| all_numbers(numbers, n));
    let spans = |d: &usize| {
        let d = *d as u64;
        !inserted.contains(&d) && !batch.contains(&d)
    };
    // An indexed axis that windows span begins somewhere else in each.
    let axes = (0..rank).filter(spans).map(|d| if indexed.contains(&(d as u64)) { usize::MAX } else { d }).collect();
    (axes, windows.into_iter().map(|d| d as usize).collect())
}

/// Rows of a table, as of an embedding: in parts of its columns, or of the indices.
fn gather(op: &Op, shapes: &[&ArrayShape], cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let numbers = find(&op.attributes, instruction::GATHER)?.bytes("gather").ok()?;
    let sizes = all_numbers(&op.attributes, instruction::GATHER_SLICE_SIZES);
    let (axes, yielded) = windows(numbers, shapes[0].dims.len());
    let by_column = || -> Option<Recipe> {
        let cut = cuts[0]?;
        let at = axes.iter().position(|&a| a == cut.axis)?;
        let whole = sizes.get(cut.axis) == shapes[0].dims.get(cut.axis);
        let yields = Yield::Parts(cut.along(*yielded.get(at)?));
        whole.then(|| Recipe { operands: vec![Some(cut.clone()), None], yields })
    };
    let rank = op.shape.as_array()?.dims.len();
    let by_index = || -> Option<Recipe> {
        let cut = cuts[1]?;
        if batch_axes(numbers).iter().any(|(_, of_indices)| *of_indices == cut.axis) {
            return None;
        }
        let axis = indexed_axis(numbers, &yielded, rank, cut.axis)?;
        Some(Recipe { operands: vec![None, Some(cut.clone())], yields: Yield::Parts(cut.along(axis)) })
    };
    let by_batch = || -> Option<Recipe> {
        let (cut, table, indices) = of_batch(numbers, cuts[0], cuts[1])?;
        let axis = indexed_axis(numbers, &yielded, rank, indices)?;
        let operands = vec![Some(cut.along(table)), Some(cut.along(indices))];
        Some(Recipe { operands, yields: Yield::Parts(cut.along(axis)) })
    };
    by_batch().or_else(|| cheaper([by_column(), by_index()], shapes, cuts))
}

/// Axes along which a gather or scatter looks each row up in a table of its own: of the table, and of the indices.
fn batch_axes(numbers: &[u8]) -> Vec<(usize, usize)> {
    let [of_table, of_indices] = [5, 6].map(|n| all_numbers(numbers, n));
    of_table.into_iter().zip(of_indices).map(|(t, i)| (t as usize, i as usize)).collect()
}

/// A cut of such an axis, and the axis of the table and of the indices that it is.
fn of_batch<'a>(numbers: &[u8], table: Option<&'a Cut>, indices: Option<&'a Cut>) -> Option<(&'a Cut, usize, usize)> {
    batch_axes(numbers).into_iter().find_map(|(t, i)| {
        let cut = table.filter(|c| c.axis == t).or_else(|| indices.filter(|c| c.axis == i))?;
        Some((cut, t, i))
    })
}

/// The axis that this axis of the indices is of what is gathered or scattered. `windows`: those that are of no index.
fn indexed_axis(numbers: &[u8], windows: &[usize], rank: usize, axis: usize) -> Option<usize> {
    let vector = all_numbers(numbers, 4).pop().unwrap_or(0) as usize;
    let at = (0..axis).filter(|&d| d != vector).count();
    (0..rank).filter(|d| !windows.contains(d)).nth(at).filter(|_| axis != vector)
}

/// What is added to rows of a table, in parts of its columns; or of the rows that are added, whose sums are summed up.
fn scatter(graph: &Graph, op: &Op, shapes: &[&ArrayShape], cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let [table, _, updates] = shapes else { return None };
    let numbers = find(&op.attributes, instruction::SCATTER)?.bytes("scatter").ok()?;
    let (axes, theirs) = windows(numbers, table.dims.len());
    let by_column = || -> Option<Recipe> {
        let of_table = cuts[0].map(|cut| (cut, axes.iter().position(|&a| a == cut.axis)));
        let of_updates = cuts[2].map(|cut| (cut, theirs.iter().position(|&a| a == cut.axis)));
        let (cut, at) = [of_table, of_updates].into_iter().flatten().find_map(|(cut, at)| Some((cut, at?)))?;
        let (axis, their) = (*axes.get(at)?, *theirs.get(at)?);
        let whole = table.dims.get(axis).is_some_and(|n| updates.dims.get(their) == Some(n));
        let operands = vec![Some(cut.along(axis)), None, Some(cut.along(their))];
        whole.then(|| Recipe { operands, yields: Yield::Parts(cut.along(axis)) })
    };
    let of_updates = |axis: usize| indexed_axis(numbers, &theirs, updates.dims.len(), axis);
    let by_batch = || -> Option<Recipe> {
        let (cut, table, indices) = of_batch(numbers, cuts[0], cuts[1])?;
        let operands = [table, indices, of_updates(indices)?].map(|axis| Some(cut.along(axis))).to_vec();
        Some(Recipe { operands, yields: Yield::Parts(cut.along(table)) })
    };
    let by_index = || -> Option<Recipe> {
        let cut = cuts[1]?;
        let own = batch_axes(numbers).iter().any(|(_, of_indices)| *of_indices == cut.axis);
        let adds = op.called.first().is_some_and(|&c| combines(graph, c) == Some("add"));
        let table = graph.op(op.operands[0]);
        let is_zeros = is_zero(table) || &*table.opcode == "broadcast" && is_zero(graph.op(table.operands[0]));
        let operands = vec![None, Some(cut.clone()), Some(cut.along(of_updates(cut.axis)?))];
        (adds && is_zeros && !own).then(|| Recipe { operands, yields: Yield::Terms("add".to_owned()) })
    };
    by_batch().or_else(by_column).or_else(by_index)
}

/// The axis of a gathered tensor that this axis of the result spans; `None` for one of indices.
pub fn gathered_axis(op: &Op, rank: usize, axis: usize) -> Option<usize> {
    let numbers = find(&op.attributes, instruction::GATHER)?.bytes("gather").ok()?;
    let (axes, yielded) = windows(numbers, rank);
    axes.get(yielded.iter().position(|&y| y == axis)?).copied().filter(|&axis| axis < rank)
}

fn reduce(graph: &Graph, op: &Op, cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let &[reducer] = &op.called[..] else { return None };
    // What is reduced, and as many initial values.
    let (n, cut) = (op.operands.len() / 2, *cuts[..cuts.len() / 2].iter().flatten().next()?);
    let axes = all_numbers(&op.attributes, instruction::DIMENSIONS);
    let operands = (0..2 * n).map(|i| (i < n).then(|| cut.clone())).collect();
    if !axes.contains(&(cut.axis as u64)) {
        let before = axes.iter().filter(|&&d| (d as usize) < cut.axis).count();
        return Some(Recipe { operands, yields: Yield::Parts(cut.along(cut.axis - before)) });
    }
    let opcode = combines(graph, reducer).filter(|_| n == 1)?;
    // Every part begins with the initial value.
    (opcode != "add" || is_zero(graph.op(op.operands[1])))
        .then(|| Recipe { operands, yields: Yield::Terms(opcode.to_owned()) })
}

/// The op that a computation of two scalars is, if parts may be combined by it in any order.
fn combines(graph: &Graph, computation: CompId) -> Option<&str> {
    let computation = graph.computation(computation);
    let root = computation.ops.get(computation.root.index())?;
    let of_parameters = root.operands.iter().all(|o| &*computation.ops[o.index()].opcode == "parameter");
    let known = matches!(&*root.opcode, "add" | "maximum" | "minimum" | "and" | "or");
    (known && of_parameters && computation.ops.len() == 3).then_some(&*root.opcode)
}

/// Where a cut lies after a reshape: elements before the axis must stay in as many rows, and parts must begin where
/// rows of the new axis do.
pub fn reshaped(from: &[u64], to: &[u64], cut: &Cut) -> Option<(usize, Rc<[u64]>)> {
    let product = |dims: &[u64]| dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let (before, step) = (product(&from[..cut.axis])?, product(&from[cut.axis + 1..])?);
    // Axes of size one have the same number of elements before them; the last such axis holds the elements.
    let axis = (0..to.len()).rfind(|&i| product(&to[..i]) == Some(before))?;
    let inner = product(&to[axis + 1..])?;
    let bound = |&b: &u64| {
        let at = b.checked_mul(step)?;
        at.is_multiple_of(inner.max(1)).then(|| at / inner.max(1))
    };
    let bounds: Rc<[u64]> = cut.bounds.iter().map(bound).collect::<Option<_>>()?;
    (bounds.last() == Some(&to[axis])).then_some((axis, bounds))
}

/// First element, the one behind the last, and the step, by axis of a `slice`.
pub fn slice_ranges(op: &Op) -> Vec<(u64, u64, u64)> {
    let mut ranges = Vec::new();
    for (number, value, _) in Fields::new(&op.attributes, "attributes").flatten() {
        if let (instruction::SLICE_DIMENSIONS, Ok(range)) = (number, value.bytes("slice dimensions")) {
            let field = |n, default| all_numbers(range, n).pop().unwrap_or(default);
            ranges.push((field(1, 0), field(2, 0), field(3, 1)));
        }
    }
    ranges
}

/// Whether an op's windows span more than one element along an axis, or not all of it.
fn is_windowed(op: &Op, axis: usize) -> bool {
    const DIMENSION: u32 = 1;
    let window = find(&op.attributes, instruction::WINDOW).and_then(|w| w.bytes("window").ok()).unwrap_or_default();
    let mut dimensions = Fields::new(window, "window").flatten().filter(|(n, _, _)| *n == DIMENSION);
    let Some(dimension) = dimensions.nth(axis).and_then(|(_, value, _)| value.bytes("window dimension").ok()) else {
        return true;
    };
    let field = |n| all_numbers(dimension, n).pop().unwrap_or(0);
    // Size, stride and dilations of one element; padding on both sides.
    [1, 2, 5, 6].into_iter().any(|n| field(n) > 1) || [3, 4].into_iter().any(|n| field(n) != 0)
}

/// Whether a `pad` adds or removes anything along an axis.
fn is_padded(op: &Op, axis: usize) -> bool {
    const DIMENSION: u32 = 1;
    let config = find(&op.attributes, instruction::PADDING).and_then(|c| c.bytes("padding").ok()).unwrap_or_default();
    let mut dimensions = Fields::new(config, "padding").flatten().filter(|(n, _, _)| *n == DIMENSION);
    let at = dimensions.nth(axis).and_then(|(_, value, _)| value.bytes("padding dimension").ok());
    // Low, high and interior.
    at.is_none_or(|dimension| (1..=3).any(|n| all_numbers(dimension, n).iter().any(|&n| n != 0)))
}
