//! How one op is done in parts, by what is known of its operands.

use std::ops::Range;
use std::rc::Rc;

use super::super::ir::{Graph, Op};
use super::super::passes::{is_elementwise, is_zero};
use super::super::proto::{Fields, all_numbers, find, instruction};
use super::super::shape::ArrayShape;

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
    let out = op.shape.as_array()?;
    let shapes: Vec<&ArrayShape> = op.operands.iter().map(|&o| graph.op(o).shape.as_array()).collect::<Option<_>>()?;
    let first = cuts.iter().flatten().next()?;
    let dimensions = || all_numbers(&op.attributes, instruction::DIMENSIONS);
    // For ops whose first operand is the one that matters.
    let alone = |axis: Option<usize>| -> Option<Recipe> {
        let cut = cuts[0]?;
        let operands = std::iter::once(Some(cut.clone())).chain(cuts[1..].iter().map(|_| None)).collect();
        Some(Recipe { operands, yields: Yield::Parts(cut.along(axis?)) })
    };
    match &*op.opcode {
        "dot" => dot(op, &shapes, cuts),
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
        opcode if is_elementwise(opcode) => {
            // Scalars apply to every element (`clamp`, `select`).
            let needs = |shape: &&ArrayShape| (shape.dims == out.dims).then(|| (*first).clone());
            let fit = shapes.iter().all(|s| s.dims == out.dims || s.dims.is_empty());
            let operands = shapes.iter().map(needs).collect();
            fit.then(|| Recipe { operands, yields: Yield::Parts((*first).clone()) })
        }
        _ => None,
    }
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
    // Where the two do not go together, the smaller operand changes.
    let cost = |recipe: &Recipe| -> u64 {
        let changes = |i: &usize| cuts[*i].is_some() && cuts[*i] != recipe.operands[*i].as_ref();
        (0..2).filter(changes).map(|i| shapes[i].bytes().0).sum()
    };
    [by(0), by(1)].into_iter().flatten().min_by_key(cost)
}

fn reduce(graph: &Graph, op: &Op, cuts: &[Option<&Cut>]) -> Option<Recipe> {
    let (&[_, init], &[reducer], cut) = (&op.operands[..], &op.called[..], cuts[0]?) else { return None };
    let axes = all_numbers(&op.attributes, instruction::DIMENSIONS);
    let operands = vec![Some(cut.clone()), None];
    if !axes.contains(&(cut.axis as u64)) {
        let before = axes.iter().filter(|&&d| (d as usize) < cut.axis).count();
        return Some(Recipe { operands, yields: Yield::Parts(cut.along(cut.axis - before)) });
    }
    let reducer = graph.computation(reducer);
    let root = &reducer.ops[reducer.root.index()];
    let of_parameters = root.operands.iter().all(|o| &*reducer.ops[o.index()].opcode == "parameter");
    // Every part begins with the initial value.
    let combines = match &*root.opcode {
        "add" => is_zero(graph.op(init)),
        "maximum" | "minimum" | "and" | "or" => true,
        _ => false,
    };
    (of_parameters && reducer.ops.len() == 3 && combines)
        .then(|| Recipe { operands, yields: Yield::Terms(root.opcode.to_string()) })
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

/// Whether a `pad` adds or removes anything along an axis.
fn is_padded(op: &Op, axis: usize) -> bool {
    const DIMENSION: u32 = 1;
    let config = find(&op.attributes, instruction::PADDING).and_then(|c| c.bytes("padding").ok()).unwrap_or_default();
    let mut dimensions = Fields::new(config, "padding").flatten().filter(|(n, _, _)| *n == DIMENSION);
    let at = dimensions.nth(axis).and_then(|(_, value, _)| value.bytes("padding dimension").ok());
    // Low, high and interior.
    at.is_none_or(|dimension| (1..=3).any(|n| all_numbers(dimension, n).iter().any(|&n| n != 0)))
}
