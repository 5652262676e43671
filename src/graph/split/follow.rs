//! Which params are best split together: those whose parts meet.
//!
//! A product in columns gives activations in parts; the next product wants its rows in the same parts, the bias between
//! them too, and the other two of queries, keys and values their heads. One split is followed through the forward half,
//! and wherever an op reads something whole that it could use in parts, the params that this comes from are split as well.

use std::collections::{BTreeMap, BTreeSet};

use super::super::ir::{Graph, OpId};
use super::super::model::{GradGraph, Model};
use super::super::passes::is_elementwise;
use super::super::proto::{all_numbers, find, instruction};
use super::recipe::{Cut, Yield, gathered_axis, recipe, reshaped};
use super::{MAX_SPLITS, Split, fits};

/// How far back a wish is followed: from a head to its projection it is five ops.
const DEPTH: usize = 16;
/// Rounds in which params join; each one adds some.
const ROUNDS: usize = 8;
/// Params that splits are tried from: the largest of their kind.
const SEEDS: usize = 6;

/// Splits worth trying, the ones of most bytes first; the last is all of them together where they get along.
///
/// # Complexity
/// O(ops) for each of a few params and axes.
pub fn candidates(model: &Model, parts: u32) -> Vec<Vec<Split>> {
    let Some(grad) = model.grads.first() else { return Vec::new() };
    let params = &model.manifest.params;
    // One param of each kind: layers have the same names but for numbers.
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for (i, param) in params.iter().enumerate().filter(|(_, p)| p.shape.len() > 1) {
        kinds.entry(pattern(model, &param.name)).or_insert(i);
    }
    let bytes = |split: &Split| -> u64 {
        let named = params.iter().filter(|p| fits(split.pattern(), &p.name));
        named.map(|p| p.shape.iter().product::<u64>() * p.dtype.size()).sum()
    };
    let mut seeds: Vec<usize> = kinds.into_values().collect();
    seeds.sort_by_key(|&i| (std::cmp::Reverse(params[i].shape.iter().product::<u64>()), i));
    let mut found: Vec<Vec<Split>> = Vec::new();
    for param in seeds.into_iter().take(SEEDS) {
        // Columns first: what comes after them is rows.
        for axis in (0..params[param].shape.len()).rev() {
            let splits = together(model, grad, param, axis, parts);
            if !splits.is_empty() && !found.contains(&splits) && model.cuts(&splits).is_ok() {
                found.push(splits);
            }
        }
    }
    found.sort_by_key(|splits| std::cmp::Reverse(splits.iter().map(bytes).sum::<u64>()));
    let mut all: Vec<Split> = Vec::new();
    for splits in &found {
        let both: Vec<Split> = all.iter().chain(splits).cloned().collect();
        if splits.len() > 1 && model.cuts(&both).is_ok() {
            all = both;
        }
    }
    if !all.is_empty() && !found.contains(&all) {
        found.push(all);
    }
    found
}

/// A split and those that go with it, sorted; empty where it cannot be.
fn together(model: &Model, grad: &GradGraph, param: usize, axis: usize, parts: u32) -> Vec<Split> {
    let graph = &grad.graph;
    let forward = forward(graph, model.n_scalars());
    let Some(state) = model.state[..model.n_params].iter().position(|t| t.tensor == param) else { return Vec::new() };
    let n = model.state[state].shape.dims[axis];
    // Equal parts: others may have to be parts of heads.
    if !n.is_multiple_of(u64::from(parts)) || model.state[state].rows.is_some() && axis == 0 {
        return Vec::new();
    }
    let bounds = (0..=u64::from(parts)).map(|i| n / u64::from(parts) * i).collect();
    let mut known: BTreeMap<usize, Cut> = BTreeMap::from([(state, Cut { axis, bounds })]);
    for _ in 0..ROUNDS {
        let before = known.len();
        let mut cuts: Vec<Option<Cut>> = vec![None; graph.n_ops()];
        for (&p, cut) in &known {
            cuts[graph.parameters()[p].index()] = Some(cut.clone());
        }
        for (id, op) in graph.ops().filter(|(id, _)| forward[id.index()]) {
            let of_operands: Vec<Option<&Cut>> = op.operands.iter().map(|o| cuts[o.index()].as_ref()).collect();
            let Some(recipe) = recipe(graph, op, &of_operands) else { continue };
            for (&o, wish) in op.operands.iter().zip(&recipe.operands) {
                if let (Some(wish), None) = (wish, &cuts[o.index()]) {
                    wished(model, graph, o, wish.clone(), &mut known, DEPTH);
                }
            }
            if let Yield::Parts(cut) = recipe.yields {
                cuts[id.index()] = Some(cut);
            }
        }
        if known.len() == before {
            break;
        }
    }
    let mut splits: BTreeSet<(String, usize)> = BTreeSet::new();
    for (&p, cut) in &known {
        splits.insert((pattern(model, &model.manifest.params[model.state[p].tensor].name), cut.axis));
    }
    if splits.len() > MAX_SPLITS {
        return Vec::new();
    }
    splits.into_iter().map(|(tensor, axis)| Split::Params { tensor, axis, parts }).collect()
}

/// Finds the params from which a value gets this cut.
fn wished(model: &Model, graph: &Graph, id: OpId, cut: Cut, known: &mut BTreeMap<usize, Cut>, depth: usize) {
    let op = graph.op(id);
    let Some(left) = depth.checked_sub(1) else { return };
    let mut on = |o: OpId, cut: Cut| wished(model, graph, o, cut, known, left);
    let dims = |id: OpId| graph.op(id).shape.as_array().map(|s| s.dims.clone()).unwrap_or_default();
    match &*op.opcode {
        "parameter" => {
            let param = graph.parameters()[..model.n_params].binary_search(&id);
            if let Ok(param) = param
                && !(model.state[param].rows.is_some() && cut.axis == 0)
            {
                known.entry(param).or_insert(cut);
            }
        }
        "transpose" => {
            if let Some(&axis) = all_numbers(&op.attributes, instruction::DIMENSIONS).get(cut.axis) {
                on(op.operands[0], Cut { axis: axis as usize, ..cut });
            }
        }
        "broadcast" => {
            let dimensions = all_numbers(&op.attributes, instruction::DIMENSIONS);
            if let Some(axis) = dimensions.iter().position(|&d| d as usize == cut.axis) {
                on(op.operands[0], Cut { axis, ..cut });
            }
        }
        "reshape" => {
            if let Some((axis, bounds)) = reshaped(&dims(id), &dims(op.operands[0]), &cut) {
                on(op.operands[0], Cut { axis, bounds });
            }
        }
        "dot" => {
            let numbers = find(&op.attributes, instruction::DOT).and_then(|n| n.bytes("dot").ok()).unwrap_or_default();
            let [left, right, left_batch, right_batch] = [1, 2, 3, 4].map(|n| all_numbers(numbers, n));
            if cut.axis < left_batch.len() {
                on(op.operands[0], Cut { axis: left_batch[cut.axis] as usize, ..cut.clone() });
                on(op.operands[1], Cut { axis: right_batch[cut.axis] as usize, ..cut });
                return;
            }
            let free = |o: OpId, used: [&[u64]; 2]| {
                (0..dims(o).len()).filter(|d| !used.iter().any(|u| u.contains(&(*d as u64)))).collect::<Vec<_>>()
            };
            let of_left = free(op.operands[0], [&left, &left_batch]);
            let of_right = free(op.operands[1], [&right, &right_batch]);
            let at = cut.axis - left_batch.len();
            // Columns of a weight, not rows of the batch: those come from everything before.
            if let Some(&axis) = at.checked_sub(of_left.len()).and_then(|at| of_right.get(at)) {
                on(op.operands[1], Cut { axis, ..cut });
            }
        }
        "convolution" => {
            let numbers = find(&op.attributes, instruction::CONVOLUTION).and_then(|n| n.bytes("convolution").ok());
            let [kernel_out, out_channel] =
                [4, 10].map(|n| all_numbers(numbers.unwrap_or_default(), n).pop().unwrap_or(0) as usize);
            if cut.axis == out_channel {
                on(op.operands[1], Cut { axis: kernel_out, ..cut });
            }
        }
        "gather" => {
            let table = op.operands[0];
            if let Some(axis) = gathered_axis(op, dims(table).len(), cut.axis) {
                on(table, Cut { axis, ..cut });
            }
        }
        opcode if is_elementwise(opcode) => {
            let same = op.operands.iter().filter(|&&o| dims(o) == dims(id));
            same.for_each(|&o| on(o, cut.clone()));
        }
        _ => {}
    }
}

/// The ops that the loss and the metrics need.
fn forward(graph: &Graph, n_scalars: usize) -> Vec<bool> {
    let mut needed = vec![false; graph.n_ops()];
    graph.outputs()[..n_scalars].iter().for_each(|o| needed[o.index()] = true);
    for (id, op) in graph.ops().rev() {
        if needed[id.index()] {
            op.operands.iter().for_each(|o| needed[o.index()] = true);
        }
    }
    needed
}

/// The name with `*` for its numbers, where all params that fit it have one shape; else the name.
fn pattern(model: &Model, name: &str) -> String {
    let numbered = |segment: &str| !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit());
    let segments = name.split('.').map(|s| if numbered(s) { "*" } else { s });
    let pattern = segments.collect::<Vec<_>>().join(".");
    let params = &model.manifest.params;
    let shape = params.iter().find(|p| p.name == name).map(|p| &p.shape);
    let alike = params.iter().filter(|p| fits(&pattern, &p.name)).all(|p| Some(&p.shape) == shape);
    if alike { pattern } else { name.to_owned() }
}
