//! Cost growth of planning: a synthetic chain of matrix products with its backward half, 5,000 to 100,000 ops.

use std::time::Instant;

use foreshard::cost;
use foreshard::graph::cut::{op, parameter};
use foreshard::graph::{ArrayShape, DType, Graph, OpId, Shape};
use foreshard::plan::coordinate::coordinates;
use foreshard::plan::segment::{Parameters, Segmentation};
use foreshard::plan::{Assignment, Place, ShardId};

/// `layers` of `tanh(x)` and a product with the layer's own weights (elementwise stand-ins), then their derivatives.
fn chain(layers: usize) -> (Graph, usize) {
    let mut graph = Graph::new("chain");
    let shape: Shape = ArrayShape::new(DType::Float32, vec![64, 64]).into();
    let weights: Vec<OpId> = (0..layers).map(|_| graph.push_parameter(parameter("w", shape.clone()))).collect();
    let mut push =
        |opcode: &str, operands: Vec<OpId>| graph.push(op(opcode, opcode, shape.clone(), operands, Vec::new()));
    let mut x = weights[0];
    let mut residuals = Vec::new();
    for &w in &weights {
        let h = push("multiply", vec![x, w]);
        x = push("tanh", vec![h]);
        residuals.push((h, w));
    }
    let loss = x;
    let mut gradient = push("negate", vec![x]);
    let mut gradients = Vec::new();
    for &(h, w) in residuals.iter().rev() {
        gradient = push("multiply", vec![gradient, h]);
        gradients.push(push("multiply", vec![gradient, h]));
        gradient = push("multiply", vec![gradient, w]);
    }
    gradients.reverse();
    graph.set_outputs([vec![loss], gradients].concat());
    (graph, layers)
}

fn main() {
    println!("  {:>8} {:>12} {:>12} {:>12} {:>14}", "ops", "cost", "coordinates", "cut", "all / op");
    for n_ops in [5_000, 10_000, 20_000, 50_000, 100_000] {
        let (graph, n_params) = chain(n_ops / 6);
        let began = Instant::now();
        let costs = cost::of_graph(&graph);
        let costed = began.elapsed();
        let line = coordinates(&graph, n_params, 1, &costs);
        let placed = began.elapsed();
        let shard = |at: u32| ShardId(at * 4 / line.n.max(1));
        let places: Vec<Place> =
            line.of.iter().map(|at| at.map_or(Place::Everywhere, |at| Place::Shard(shard(at)))).collect();
        let results: Vec<Place> = graph.outputs().iter().map(|o| places[o.index()]).collect();
        let cut =
            Segmentation::new(&graph, &Assignment(places), &results, 4, Parameters::Mirrored).expect("a chain cuts");
        let all = began.elapsed();
        println!(
            "  {:>8} {:>12.1?} {:>12.1?} {:>12.1?} {:>11.2} us  {} segments",
            graph.n_ops(),
            costed,
            placed - costed,
            all - placed,
            all.as_secs_f64() * 1e6 / graph.n_ops() as f64,
            cut.segments.len()
        );
    }
}
