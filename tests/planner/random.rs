//! Random models and random devices.

use foreshard::graph::cut::{op, parameter};
use foreshard::graph::proto::{Writer, instruction};
use foreshard::graph::{
    ArrayShape, DType, GradGraph, Graph, Lane, Manifest, Model, Op, OpId, Shape, Split, StateTensor,
};
use foreshard::plan::ScheduleKind;
use foreshard::topology::{DeviceId, LOOPBACK, NETWORK, Slowed, Topology, nominal};
use foreshard::units::{Bytes, BytesPerSec};
use proptest::prelude::*;
use proptest::sample::Index;

/// Microbatches that the random models are exported with, of batches of 8 rows.
pub const MICROBATCHES: [u64; 3] = [1, 2, 8];

/// A recipe for a training step; every index picks among what is there when its op is added.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Elements of each param.
    pub params: Vec<u64>,
    /// Opcode, operands and elements of each forward op.
    pub forward: Vec<(u8, Index, Index, u64)>,
    /// What each backward op reads beside the gradient that comes in, and its elements.
    pub backward: Vec<(Index, u64)>,
    /// Where along the backward half each param's gradient is made, and what else it reads.
    pub gradients: Vec<(Index, Index)>,
}

pub fn recipe() -> impl Strategy<Value = Recipe> {
    let elements = || prop_oneof![1u64..64, 1000u64..200_000];
    (
        prop::collection::vec(elements(), 1..8),
        prop::collection::vec((any::<u8>(), any::<Index>(), any::<Index>(), elements()), 1..40),
        prop::collection::vec((any::<Index>(), elements()), 1..40),
        prop::collection::vec((any::<Index>(), any::<Index>()), 8),
    )
        .prop_map(|(params, forward, backward, gradients)| Recipe { params, forward, backward, gradients })
}

fn vector(n: u64) -> Shape {
    ArrayShape::new(DType::Float32, vec![n]).into()
}

/// The gradient function for microbatches of `rows` rows: activations grow with them.
fn grad(recipe: &Recipe, rows: u64) -> Graph {
    let mut graph = Graph::new("grad");
    let mut values: Vec<OpId> = Vec::new();
    let params: Vec<OpId> = recipe.params.iter().map(|&n| graph.push_parameter(parameter("w", vector(n)))).collect();
    values.extend(&params);
    values.push(graph.push_parameter(parameter("x", vector(rows * 4))));
    graph.push_parameter(parameter("key", ArrayShape::new(DType::Uint32, vec![2]).into()));
    let made = |name: &str, n: u64, operands: Vec<OpId>| op(name, name, vector(n), operands, Vec::new());
    for &(kind, ref a, ref b, n) in &recipe.forward {
        let (a, b, n) = (*a.get(&values), *b.get(&values), n * rows);
        match kind % 8 {
            0 => values.push(graph.push(made("constant", n, Vec::new()))),
            1 | 2 => values.push(graph.push(made("tanh", n, vec![a]))),
            // A value that cannot travel, and its elements.
            3 => {
                let pair = Shape::Tuple(vec![vector(n), vector(1)]);
                let sorted = graph.push(op("sort", "sort", pair, vec![a, b], Vec::new()));
                for (index, n) in [(0, n), (1, 1)] {
                    let mut attributes = Writer::default();
                    attributes.number(instruction::TUPLE_INDEX, index);
                    let element = op("element", "get-tuple-element", vector(n), vec![sorted], attributes.0);
                    values.push(graph.push(element));
                }
            }
            4 => values.push(graph.push(made("dot", n, vec![a, b]))),
            _ => values.push(graph.push(made("add", n, vec![a, b]))),
        }
    }
    let last = *values.last().expect("the batch at least");
    let loss = graph.push(made("reduce", 1, vec![last]));
    let mut gradient = graph.push(made("negate", 1, vec![loss]));
    let mut incoming = vec![gradient];
    for (residual, n) in &recipe.backward {
        gradient = graph.push(made("multiply", n * rows, vec![gradient, *residual.get(&values)]));
        incoming.push(gradient);
    }
    let mut outputs = vec![loss];
    for (&n, (at, residual)) in recipe.params.iter().zip(&recipe.gradients) {
        outputs.push(graph.push(made("dot", n, vec![*at.get(&incoming), *residual.get(&values)])));
    }
    graph.set_outputs(outputs);
    graph
}

/// Gradient descent with momentum, and a count of steps that every shard keeps.
fn update(params: &[u64]) -> Graph {
    let mut graph = Graph::new("update");
    let mut next = |name: &str, n: u64| graph.push_parameter(parameter(name, vector(n)));
    let weights: Vec<OpId> = params.iter().map(|&n| next("w", n)).collect();
    let momenta: Vec<OpId> = params.iter().map(|&n| next("m", n)).collect();
    let count = next("count", 1);
    let gradients: Vec<OpId> = params.iter().map(|&n| next("g", n)).collect();
    let microbatches = next("n", 1);
    let mut outputs = Vec::new();
    let mut moved = Vec::new();
    for (i, &n) in params.iter().enumerate() {
        let momentum = graph.push(op("m", "add", vector(n), vec![momenta[i], gradients[i]], Vec::new()));
        outputs.push(graph.push(op("w", "subtract", vector(n), vec![weights[i], momentum], Vec::new())));
        moved.push(momentum);
    }
    outputs.extend(moved);
    outputs.push(graph.push(op("count", "add", vector(1), vec![count, microbatches], Vec::new())));
    graph.set_outputs(outputs);
    graph
}

pub fn model(recipe: &Recipe) -> Model {
    let file = r#"{"hlo": {"file": "f", "sha256": "00"}}"#;
    let params: Vec<String> = (0..recipe.params.len())
        .map(|i| {
            format!(
                r#"{{"name": "w{i}", "dtype": "float32", "shape": [{}], "grad_dtype": "float32"}}"#,
                recipe.params[i]
            )
        })
        .collect();
    let variants = MICROBATCHES.map(|m| {
        format!(r#"{{"name": "mb{m}", "microbatch": {m}, "shapes": {{"x": [{m}, 4]}}, "hlo": {{"file": "f", "sha256": "00"}}}}"#)
    });
    let manifest = format!(
        r#"{{"format": "foreshard.bundle/1", "name": "random", "batch_size": 8, "slots": [], "metrics": [], "params": [{}],
             "batch": [{{"name": "x", "dtype": "float32", "shape": [8, 4]}}], "grad": [{}], "init": {file}, "update": {file}}}"#,
        params.join(", "),
        variants.join(", ")
    );
    let manifest = Manifest::parse(manifest.as_bytes()).unwrap();
    let n = recipe.params.len();
    // Params, their momenta, the count of steps.
    let sizes = recipe.params.iter().chain(&recipe.params).chain([&1]);
    let piece = |(i, &elements): (usize, &u64)| {
        let shape = ArrayShape::new(DType::Float32, vec![elements]);
        let param = (n..2 * n).contains(&i).then(|| i - n);
        StateTensor { name: format!("s{i}"), tensor: i, rows: None, part: None, shape, param }
    };
    let state = sizes.enumerate().map(piece).collect();
    let grads = MICROBATCHES
        .iter()
        .zip(&manifest.grad)
        .map(|(&microbatch, spec)| GradGraph {
            name: spec.name.clone(),
            microbatch,
            batch: manifest.microbatch_tensors(spec),
            graph: grad(recipe, microbatch),
        })
        .collect();
    Model {
        state,
        n_params: n,
        init: Graph::new("init"),
        grads,
        update: update(&recipe.params),
        fingerprint: "random".to_owned(),
        origin: "random".to_owned(),
        split: Vec::new(),
        manifest,
    }
}

/// The model with some of its ops on parts of something, whatever that is: where they may go is all that counts.
pub fn in_lanes(mut model: Model, lanes: &[Index], of: u32) -> Model {
    for grad in &mut model.grads {
        let mut graph = Graph::new("grad");
        for (id, op) in grad.graph.ops() {
            let lane = lanes[id.index() % lanes.len()].index(2 * of as usize) as u32;
            let is_parameter = &*op.opcode == "parameter";
            let lane = (lane < of && !is_parameter).then_some(Lane { index: lane, of });
            let op = Op { lane, ..op.clone() };
            if is_parameter {
                graph.push_parameter(op)
            } else {
                graph.push(op)
            };
        }
        graph.set_outputs(grad.graph.outputs().to_vec());
        grad.graph = graph;
    }
    model.split = vec![Split::Rows { ops: "*".to_owned(), parts: of }];
    model
}

/// Devices of any speed, some with little memory, on up to two nodes, some links slowed.
pub fn devices() -> impl Strategy<Value = Topology> {
    let device = (
        1u32..100,
        1u32..100,
        prop_oneof![Just(1u64 << 40), (24 << 20) + 100_000u64..(24 << 20) + 40_000_000],
        any::<bool>(),
        prop_oneof![3 => Just(None), 1 => (1e6..1e10).prop_map(Some)],
    );
    let slowed = prop::collection::vec((0u32..7, 0u32..7, 1e-3..=1.0), 0..4);
    (prop::collection::vec(device, 1..7), slowed).prop_map(|(all, slowed)| Topology {
        devices: all
            .into_iter()
            .enumerate()
            .map(|(i, (flops, speed, memory, far, nic))| {
                let mut device = nominal("cpu").unwrap();
                device.name = format!("cpu{i}");
                device.node = if far { "far" } else { "near" }.to_owned();
                device.flops = device.flops * f64::from(flops) * 0.1;
                device.speed = f64::from(speed) / 100.0;
                device.memory = Bytes(memory);
                device.nic = nic.map(BytesPerSec);
                device
            })
            .collect(),
        local: LOOPBACK,
        remote: NETWORK,
        slowed: slowed.into_iter().map(|(a, b, share)| Slowed { between: [DeviceId(a), DeviceId(b)], share }).collect(),
    })
}

/// Any schedule, or the planner's choice.
pub fn schedules() -> impl Strategy<Value = Option<ScheduleKind>> {
    prop_oneof![3 => prop::sample::select(&ScheduleKind::ALL[..]).prop_map(Some), 1 => Just(None)]
}
