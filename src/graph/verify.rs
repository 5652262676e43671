//! Checks that stand between a module and the plug-in, which aborts on some of what is malformed.
//!
//! What is checked: operand counts, shapes as far as they follow from operands and attributes, bounds of slices and of
//! dimension numbers, signatures of called computations. Opcodes not listed here are left to the plug-in, which refuses
//! what it does not know with an error.

use super::error::GraphError;
use super::ir::{CompId, Graph, Op};
use super::passes::is_elementwise;
use super::proto::{Fields, all_numbers, find, instruction};
use super::shape::{ArrayShape, DType, Shape};

/// Checks a graph and every computation it calls.
///
/// # Errors
/// [`GraphError::Op`] names the computation, the op and what does not fit.
/// # Complexity
/// O(ops + operands).
pub fn verify(graph: &Graph) -> Result<(), GraphError> {
    let check = |computation: &str, op: &Op, operands: &[&Op]| {
        check_op(graph, op, operands).map_err(|problem| GraphError::Op {
            computation: computation.to_owned(),
            op: op.name.clone(),
            opcode: op.opcode.to_string(),
            problem,
        })
    };
    for c in graph.computations() {
        if c.root.index() >= c.ops.len() {
            let problem = format!("its root {} does not exist", c.root);
            return Err(GraphError::Computation { computation: c.name.clone(), problem });
        }
        for (i, op) in c.ops.iter().enumerate() {
            if op.operands.iter().any(|o| o.index() >= i) {
                let (computation, op, opcode) = (c.name.clone(), op.name.clone(), op.opcode.to_string());
                let problem = "an operand does not stand before it".to_owned();
                return Err(GraphError::Op { computation, op, opcode, problem });
            }
            let operands: Vec<&Op> = op.operands.iter().map(|o| &c.ops[o.index()]).collect();
            check(&c.name, op, &operands)?;
        }
    }
    for (_, op) in graph.ops() {
        let operands: Vec<&Op> = op.operands.iter().map(|&o| graph.op(o)).collect();
        check("the entry", op, &operands)?;
    }
    Ok(())
}

fn check_op(graph: &Graph, op: &Op, operands: &[&Op]) -> Result<(), String> {
    let count = |n: usize| match operands.len() {
        found if found == n => Ok(()),
        found => Err(format!("it has {found} operands, expected {n}")),
    };
    let dimensions = || all_numbers(&op.attributes, instruction::DIMENSIONS);
    match &*op.opcode {
        "parameter" | "constant" | "iota" => count(0),
        "tuple" => match &op.shape {
            Shape::Tuple(elements) if elements.iter().eq(operands.iter().map(|o| &o.shape)) => Ok(()),
            shape => Err(format!("its shape {shape} is not that of its {} operands", operands.len())),
        },
        "get-tuple-element" => {
            count(1)?;
            let index = all_numbers(&op.attributes, instruction::TUPLE_INDEX).pop().unwrap_or(0) as usize;
            match &operands[0].shape {
                Shape::Tuple(elements) if elements.get(index) == Some(&op.shape) => Ok(()),
                shape => Err(format!("element {index} of {shape} is not {}", op.shape)),
            }
        }
        "select" => {
            count(3)?;
            let (which, out) = (array(operands[0])?, array(op)?);
            let fits = which.dtype == DType::Bool
                && (which.dims.is_empty() || which.dims == out.dims)
                && operands[1..].iter().all(|o| o.shape == op.shape);
            fits.then_some(()).ok_or_else(|| format!("cannot select {} by {which}", op.shape))
        }
        "clamp" => count(3),
        "compare" => {
            count(2)?;
            let (a, b, out) = (array(operands[0])?, array(operands[1])?, array(op)?);
            let fits = a == b && out.dims == a.dims && out.dtype == DType::Bool;
            fits.then_some(()).ok_or_else(|| format!("cannot compare {a} with {b} as {out}"))
        }
        "convert" | "bitcast-convert" => count(1),
        "reshape" => {
            count(1)?;
            let (from, to) = (array(operands[0])?, array(op)?);
            let fits = from.dtype == to.dtype && from.n_elements() == to.n_elements();
            fits.then_some(()).ok_or_else(|| format!("{from} cannot become {to}"))
        }
        "broadcast" => {
            count(1)?;
            let (from, to, dims) = (array(operands[0])?, array(op)?, dimensions());
            let fits = dims.len() == from.dims.len()
                && dims.iter().zip(&from.dims).all(|(&d, n)| to.dims.get(d as usize) == Some(n));
            fits.then_some(()).ok_or_else(|| format!("{from} does not broadcast to {to} along {dims:?}"))
        }
        "transpose" => {
            count(1)?;
            let (from, to, dims) = (array(operands[0])?, array(op)?, dimensions());
            let mut sorted = dims.clone();
            sorted.sort_unstable();
            let fits = sorted.iter().copied().eq(0..from.dims.len() as u64)
                && dims.iter().zip(&to.dims).all(|(&d, n)| from.dims.get(d as usize) == Some(n))
                && to.dims.len() == dims.len();
            fits.then_some(()).ok_or_else(|| format!("{from} transposed by {dims:?} is not {to}"))
        }
        "concatenate" => concatenate(op, operands, &dimensions()),
        "slice" => slice(op, operands),
        "dynamic-slice" => {
            let from = array(operands.first().ok_or("it has no operands")?)?;
            count(1 + from.dims.len())?;
            inside(array(op)?, from)
        }
        "dynamic-update-slice" => {
            let from = array(operands.first().ok_or("it has no operands")?)?;
            count(2 + from.dims.len())?;
            inside(array(operands[1])?, from)?;
            (array(op)? == from).then_some(()).ok_or_else(|| format!("it yields {}, not {from}", op.shape))
        }
        "dot" => dot(op, operands),
        "reduce" => reduce(graph, op, operands, &dimensions()),
        "while" => {
            count(1)?;
            let [_, _] = op.called[..] else {
                return Err(format!("it calls {} computations, expected 2", op.called.len()));
            };
            op.called.iter().try_for_each(|&c| signature(graph, c, &[&operands[0].shape]))?;
            let goes_on = Shape::from(ArrayShape::scalar(DType::Bool));
            let yielded: Vec<&Shape> = op.called.iter().map(|&c| result(graph, c)).collect();
            let fits =
                op.shape == operands[0].shape && (yielded == [&op.shape, &goes_on] || yielded == [&goes_on, &op.shape]);
            fits.then_some(()).ok_or_else(|| {
                format!("it yields {}, given {}; it calls what yields {yielded:?}", op.shape, operands[0].shape)
            })
        }
        "call" => {
            let [callee] = op.called[..] else {
                return Err(format!("it calls {} computations, expected 1", op.called.len()));
            };
            signature(graph, callee, &operands.iter().map(|o| &o.shape).collect::<Vec<_>>())?;
            let yielded = result(graph, callee);
            (*yielded == op.shape).then_some(()).ok_or_else(|| format!("it yields {}, the callee {yielded}", op.shape))
        }
        opcode if is_elementwise(opcode) => {
            let out = array(op)?;
            if operands.is_empty() || operands.len() > 2 {
                return Err(format!("it has {} operands, expected 1 or 2", operands.len()));
            }
            for o in operands {
                let shape = array(o)?;
                if shape.dims != out.dims {
                    return Err(format!("operand {} is {shape}, the result {out}", o.name));
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn array(op: &Op) -> Result<&ArrayShape, String> {
    op.shape.as_array().ok_or_else(|| format!("{} is {}, expected an array", op.name, op.shape))
}

fn inside(part: &ArrayShape, whole: &ArrayShape) -> Result<(), String> {
    let fits = part.dims.len() == whole.dims.len() && part.dims.iter().zip(&whole.dims).all(|(p, w)| p <= w);
    fits.then_some(()).ok_or_else(|| format!("{part} does not lie inside {whole}"))
}

fn concatenate(op: &Op, operands: &[&Op], dimensions: &[u64]) -> Result<(), String> {
    let (out, &[axis]) = (array(op)?, dimensions) else {
        return Err(format!("dimensions {dimensions:?}, expected one"));
    };
    let axis = axis as usize;
    let mut sum = 0u64;
    for o in operands {
        let part = array(o)?;
        let alike = part.dims.len() == out.dims.len()
            && part.dims.iter().zip(&out.dims).enumerate().all(|(i, (p, n))| i == axis || p == n);
        if !alike || axis >= part.dims.len() {
            return Err(format!("part {part} does not fit {out} along axis {axis}"));
        }
        sum = sum.saturating_add(part.dims[axis]);
    }
    (out.dims.get(axis) == Some(&sum))
        .then_some(())
        .ok_or_else(|| format!("parts of {sum} rows along axis {axis} are not {out}"))
}

fn slice(op: &Op, operands: &[&Op]) -> Result<(), String> {
    let [operand] = operands else { return Err(format!("it has {} operands, expected 1", operands.len())) };
    let (from, to) = (array(operand)?, array(op)?);
    let mut ranges = Vec::new();
    for (number, value, _) in Fields::new(&op.attributes, "attributes").flatten() {
        if number == instruction::SLICE_DIMENSIONS {
            let range = value.bytes("slice dimensions").map_err(|e| e.to_string())?;
            let field = |n, default| all_numbers(range, n).pop().unwrap_or(default);
            ranges.push((field(1, 0), field(2, 0), field(3, 1)));
        }
    }
    let fits = ranges.len() == from.dims.len()
        && to.dims.len() == from.dims.len()
        && ranges.iter().zip(from.dims.iter().zip(&to.dims)).all(|(&(start, limit, stride), (&n, &m))| {
            start <= limit && limit <= n && stride > 0 && (limit - start).div_ceil(stride) == m
        });
    fits.then_some(()).ok_or_else(|| format!("slices {ranges:?} of {from} are not {to}"))
}

fn dot(op: &Op, operands: &[&Op]) -> Result<(), String> {
    if operands.len() != 2 {
        return Err(format!("it has {} operands, expected 2", operands.len()));
    }
    let (a, b, out) = (array(operands[0])?, array(operands[1])?, array(op)?);
    let numbers = find(&op.attributes, instruction::DOT).and_then(|v| v.bytes("dot").ok()).unwrap_or_default();
    let [left, right, left_batch, right_batch] = [1, 2, 3, 4].map(|n| all_numbers(numbers, n));
    let size = |shape: &ArrayShape, d: &u64| shape.dims.get(*d as usize).copied();
    let pairs = |l: &[u64], r: &[u64]| {
        l.len() == r.len() && l.iter().zip(r).all(|(l, r)| size(a, l).is_some() && size(a, l) == size(b, r))
    };
    if !pairs(&left, &right) || !pairs(&left_batch, &right_batch) {
        return Err(format!(
            "{a} and {b} do not contract along {left:?} and {right:?}, batched along {left_batch:?} and {right_batch:?}"
        ));
    }
    let free = |shape: &ArrayShape, used: [&[u64]; 2]| -> Vec<u64> {
        let is_free = |d: &usize| !used.iter().any(|u| u.contains(&(*d as u64)));
        (0..shape.dims.len()).filter(is_free).map(|d| shape.dims[d]).collect()
    };
    let batch: Vec<u64> = left_batch.iter().filter_map(|d| size(a, d)).collect();
    let expected = [batch, free(a, [&left, &left_batch]), free(b, [&right, &right_batch])].concat();
    (out.dims == expected)
        .then_some(())
        .ok_or_else(|| format!("the product has dimensions {expected:?}, the result is {out}"))
}

fn reduce(graph: &Graph, op: &Op, operands: &[&Op], dimensions: &[u64]) -> Result<(), String> {
    if operands.is_empty() || !operands.len().is_multiple_of(2) || op.called.len() != 1 {
        return Err(format!("it has {} operands and {} reducers", operands.len(), op.called.len()));
    }
    let from = array(operands[0])?;
    if dimensions.iter().any(|&d| d as usize >= from.dims.len()) {
        return Err(format!("it reduces {from} along {dimensions:?}"));
    }
    let kept: Vec<u64> =
        (0..from.dims.len()).filter(|d| !dimensions.contains(&(*d as u64))).map(|d| from.dims[d]).collect();
    let outputs: Vec<&Shape> = match &op.shape {
        Shape::Tuple(elements) => elements.iter().collect(),
        shape => vec![shape],
    };
    let fits = outputs.iter().all(|s| s.as_array().is_some_and(|a| a.dims == kept));
    if !fits {
        return Err(format!("{from} reduced along {dimensions:?} is not {}", op.shape));
    }
    let n_parameters = graph.computation(op.called[0]).ops.iter().filter(|o| &*o.opcode == "parameter").count();
    (n_parameters == operands.len())
        .then_some(())
        .ok_or_else(|| format!("its reducer takes {n_parameters} values, expected {}", operands.len()))
}

/// What a computation yields.
fn result(graph: &Graph, callee: CompId) -> &Shape {
    let callee = graph.computation(callee);
    &callee.ops[callee.root.index()].shape
}

/// Whether a computation takes these arguments.
fn signature(graph: &Graph, callee: CompId, arguments: &[&Shape]) -> Result<(), String> {
    let callee = graph.computation(callee);
    let mut parameters: Vec<(u64, &Shape)> = callee
        .ops
        .iter()
        .filter(|o| &*o.opcode == "parameter")
        .map(|o| (all_numbers(&o.attributes, instruction::PARAMETER_NUMBER).pop().unwrap_or(0), &o.shape))
        .collect();
    parameters.sort_by_key(|(n, _)| *n);
    let fits = parameters.len() == arguments.len() && parameters.iter().zip(arguments).all(|((_, p), a)| p == a);
    fits.then_some(()).ok_or_else(|| format!("it calls {} with {arguments:?}", callee.name))
}
