//! A split op is real: whatever is split, wherever its parts are, a model computes and learns the same.

mod support;

use std::path::Path;

use foreshard::device::{Arg, Device};
use foreshard::graph::export::to_hlo;
use foreshard::graph::region::copy_overlap;
use foreshard::graph::{ArrayShape, DType, Graph, Model, Region, Split};

fn load(bundle: &str) -> Model {
    let directory = Path::new("bundles").join(format!("{bundle}.bundle"));
    Model::import(&mut |file| std::fs::read(directory.join(file))).unwrap()
}

/// Numbers that are the same in every run: floats of both signs below 0.1, of one sign for slots (a second moment has
/// none); small integers.
fn made_up(shape: &ArrayShape, seed: u64, signed: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(shape.bytes().0 as usize);
    for i in 0..shape.n_elements() {
        // Knuth's constants; high bits are the random ones.
        let random = (i + seed * 7919).wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407) >> 40;
        let real = (random as f32 / (1u64 << 24) as f32 - if signed { 0.5 } else { 0.0 }) * 0.2;
        match shape.dtype {
            DType::Float32 => out.extend(real.to_le_bytes()),
            DType::Bfloat16 => out.extend(((real.to_bits() >> 16) as u16).to_le_bytes()),
            DType::Int32 | DType::Uint32 => out.extend(((random % 10) as u32).to_le_bytes()),
            other => panic!("no bundle has {other:?}"),
        }
    }
    out
}

fn values(shape: &ArrayShape, data: &[u8]) -> Vec<f32> {
    match shape.dtype {
        DType::Float32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        DType::Bfloat16 => {
            data.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect()
        }
        _ => data.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()) as f32).collect(),
    }
}

fn shapes(graph: &Graph, ops: &[foreshard::graph::OpId]) -> Vec<ArrayShape> {
    ops.iter().map(|&o| graph.op(o).shape.as_array().unwrap().clone()).collect()
}

fn execute(graph: &Graph, inputs: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let device = support::cpu();
    let executable = device.compile(&graph.name, &to_hlo(graph, &[]), &[]).unwrap();
    let parameters = shapes(graph, graph.parameters());
    let buffers: Vec<_> = parameters.iter().zip(inputs).map(|(s, data)| device.upload(s, data).unwrap()).collect();
    let results = device.execute(&executable, buffers.iter().map(Arg::Keep).collect()).unwrap();
    let download = |(shape, buffer): (&ArrayShape, _)| {
        let mut out = vec![0; shape.bytes().0 as usize];
        device.download(buffer, &mut out).unwrap();
        out
    };
    shapes(graph, graph.outputs()).iter().zip(&results).map(download).collect()
}

/// Pieces of the split model's state tensors, from those of the whole model; `whole` has one for each.
fn in_parts(model: &Model, split: &Model, n: usize, whole: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let piece = |tensor: &foreshard::graph::StateTensor| {
        let into = tensor.region(&model.manifest);
        let holds = |(_, t): &(usize, &foreshard::graph::StateTensor)| {
            t.tensor == tensor.tensor && t.region(&model.manifest).overlap(&into).is_some()
        };
        let (from, source) = model.state.iter().enumerate().find(holds).unwrap();
        let of: Region = source.region(&model.manifest);
        // Gradients may have other types than their params.
        let size = whole[from].len() as u64 / source.shape.n_elements();
        let mut data = vec![0; (tensor.shape.n_elements() * size) as usize];
        copy_overlap(&whole[from], &of, &mut data, &into, size as usize);
        data
    };
    split.state[..n].iter().map(piece).collect()
}

fn same(what: &str, shapes: &[ArrayShape], expected: &[Vec<u8>], found: &[Vec<u8>], tolerance: f32) {
    assert_eq!((shapes.len(), expected.len()), (found.len(), found.len()), "{what}");
    for (i, (shape, (a, b))) in shapes.iter().zip(expected.iter().zip(found)).enumerate() {
        let (a, b) = (values(shape, a), values(shape, b));
        let most = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let apart = a
            .iter()
            .zip(&b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) });
        assert!(most.is_finite() && apart <= tolerance * most, "{what}: output {i} ({shape}): {apart:e} of {most:e}");
    }
}

/// Runs all three functions, whole and split, on the same numbers.
///
/// A split changes the order of sums: one rounding of float32 is 6e-8 of a term. `tolerance` is a share of the largest
/// value of each result.
fn computes_the_same(model: &Model, splits: &[Split], tolerance: f32) {
    let split = model.split(splits).unwrap();
    let what = |f: &str| format!("{} {f} with {splits:?}", model.manifest.name);
    let key = vec![7u8, 0, 0, 0, 9, 0, 0, 0];
    let state: Vec<Vec<u8>> =
        model.state.iter().enumerate().map(|(i, t)| made_up(&t.shape, i as u64, i < model.n_params)).collect();
    let parts = in_parts(model, &split, split.state.len(), &state);
    let of_params = |state: &[Vec<u8>], n: usize| state[..n].to_vec();

    let expected = in_parts(model, &split, split.state.len(), &execute(&model.init, &[key.clone()]));
    let found = execute(&split.init, &[key.clone()]);
    same(&what("init"), &shapes(&split.init, split.init.outputs()), &expected, &found, 1e-6);

    let (grad, split_grad) = (&model.grads[0], &split.grads[0]);
    let batch = grad.batch.iter().enumerate().map(|(i, t)| made_up(&t.array(), 100 + i as u64, false));
    let others: Vec<Vec<u8>> = batch.chain([key]).collect();
    let expected = execute(&grad.graph, &[of_params(&state, model.n_params), others.clone()].concat());
    let found = execute(&split_grad.graph, &[of_params(&parts, split.n_params), others].concat());
    let (scalars, gradients) = expected.split_at(model.n_scalars());
    let expected = [scalars, &in_parts(model, &split, split.n_params, gradients)[..]].concat();
    same(&what("grad"), &shapes(&split_grad.graph, split_grad.graph.outputs()), &expected, &found, tolerance);

    let count = 2f32.to_le_bytes().to_vec();
    let expected = execute(&model.update, &[state.clone(), gradients.to_vec(), vec![count.clone()]].concat());
    let expected = in_parts(model, &split, split.state.len(), &expected);
    let gradients = in_parts(model, &split, split.n_params, gradients);
    let found = execute(&split.update, &[parts, gradients, vec![count]].concat());
    same(&what("update"), &shapes(&split.update, split.update.outputs()), &expected, &found, tolerance.min(1e-3));
}

fn split(tensor: &str, axis: usize, parts: u32) -> Split {
    Split { tensor: tensor.to_owned(), axis, parts }
}

/// Columns, rows and heads of the sample GPT.
fn of_transformer(parts: u32) -> Vec<Split> {
    let columns = ["mlp.up", "attn.wq", "attn.wk", "attn.wv"].map(|n| split(&format!("blocks.*.{n}"), 1, parts));
    let rows = ["mlp.up_bias", "mlp.down", "attn.wo"].map(|n| split(&format!("blocks.*.{n}"), 0, parts));
    columns.into_iter().chain(rows).collect()
}

#[test]
fn a_gpt_in_columns_rows_and_heads_computes_the_same() {
    computes_the_same(&load("char_gpt"), &of_transformer(2), 1e-4);
}

/// Every param along every axis, some at a time: also where nothing fits together and parts are joined again.
#[test]
fn any_split_computes_the_same() {
    for (bundle, turns, tolerance) in
        [("mlp_digits", 3, 1e-4), ("convnet_digits", 2, 1e-4), ("torch_mlp", 3, 1e-4), ("scan_gpt", 1, 5e-2)]
    {
        let model = load(bundle);
        for turn in 0..turns {
            let mut splits = Vec::new();
            for (i, param) in model.manifest.params.iter().enumerate() {
                let first = usize::from(model.state.iter().any(|t| t.tensor == i && t.rows.is_some()));
                let axes: Vec<usize> = (first..param.shape.len()).filter(|&a| param.shape[a] > 2).collect();
                if !axes.is_empty() && (i + turn) % 3 != 0 {
                    let axis = axes[(i + turn) % axes.len()];
                    splits.push(split(&param.name, axis, 2 + (i + turn) as u32 % 2));
                }
            }
            assert!(!splits.is_empty(), "{bundle}");
            computes_the_same(&model, &splits, tolerance);
        }
    }
}
