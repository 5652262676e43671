//! How the time from a bundle to shards grows with the graph: import, plan and cut of a model of any size.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::graph::cut::{cut, op, parameter, zeros};
use crate::graph::export::{dense, to_hlo};
use crate::graph::manifest::{FORMAT, FileSpec, FunctionSpec, GradSpec, ParamSpec, SlotSpec, TensorSpec};
use crate::graph::proto::{Writer, instruction};
use crate::graph::{ArrayShape, CompId, Computation, DType, Graph, GraphError, Manifest, Model, OpId, Shape};
use crate::plan::segment::{Parameters, Segmentation, follow_parameters};
use crate::plan::{Infeasible, Place, Prepared, Problem, ScheduleKind, solve};
use crate::topology::{LOOPBACK, Topology, nominal};

/// Shards the model is planned for.
const SHARDS: usize = 4;
/// Rows of the batch, and of one microbatch.
const ROWS: u64 = 64;
const MICROBATCH: u64 = 16;
const WIDTH: u64 = 64;
/// Ops of one layer, forward and backward.
const OPS_PER_LAYER: usize = 19;

/// What one size took.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Of the gradient function, and of the update.
    pub n_ops: usize,
    pub n_update_ops: usize,
    /// From bytes to verified graphs.
    pub import: Duration,
    pub plan: Duration,
    /// From the plan to a module for every segment of every shard.
    pub cut: Duration,
    pub n_modules: usize,
}

impl Taken {
    pub fn all(&self) -> Duration {
        self.import + self.plan + self.cut
    }
}

/// A model that cannot be measured: a bug of this file or of the planner.
#[derive(Debug, thiserror::Error)]
pub enum GrowthError {
    #[error(transparent)]
    Import(#[from] GraphError),
    #[error(transparent)]
    Plan(#[from] Infeasible),
    #[error("the plan cannot be cut: {0}")]
    Cut(#[from] crate::plan::segment::SegmentError),
}

/// Measures a residual network of about `n_ops` ops, trained by Adam with clipping.
pub fn measure(n_ops: usize) -> Result<Taken, GrowthError> {
    let bundle = bundle((n_ops / OPS_PER_LAYER).max(SHARDS));
    let began = Instant::now();
    let model = import(&bundle)?;
    let import = began.elapsed();

    let device = nominal("cpu").expect("CPUs are known");
    let topology = Topology::new(vec![device; SHARDS], LOOPBACK, LOOPBACK);
    let problem = Problem { schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, SHARDS as u32) };
    let began = Instant::now();
    let plan = solve(&problem, None)?;
    let planned = began.elapsed();

    let began = Instant::now();
    let mut n_modules = 0;
    let mut write = |graph: &Graph, segmentation: &Segmentation| {
        for segment in &segmentation.segments {
            let results = segment.results.iter().map(|&r| graph.outputs()[r]);
            let outputs: Vec<OpId> = segment.outputs.iter().copied().chain(results).collect();
            n_modules +=
                usize::from(!to_hlo(&cut(graph, "s", &segment.ops, &segment.inputs, &outputs), &[]).is_empty());
        }
    };
    for (variant, assignment) in &plan.grads {
        let graph = &model.variant(variant).expect("planned").graph;
        write(graph, &plan.cut(&model, graph, assignment)?);
    }
    let gradients = plan.owners[..model.n_params].iter().copied();
    let places: Vec<Place> = plan.owners.iter().copied().chain(gradients).chain([Place::Everywhere]).collect();
    let assignment = follow_parameters(&model.update, &places);
    write(&model.update, &Segmentation::new(&model.update, &assignment, &plan.owners, SHARDS, Parameters::Sent)?);
    let n_update_ops = model.update.n_ops();
    let n_ops = model.grads[0].graph.n_ops();
    Ok(Taken { n_ops, n_update_ops, import, plan: planned, cut: began.elapsed(), n_modules })
}

/// What a plan took, and another one after a device had become slow.
#[derive(Clone, Debug)]
pub struct Replanned {
    pub n_ops: usize,
    pub n_devices: usize,
    /// From the model alone.
    pub plan: Duration,
    /// Cutting that plan once it is in force, as a job does when it begins to run one.
    pub hold: Duration,
    /// With that plan in force and one device at half speed, by a planner that knows the model, as a job's does.
    pub again: Duration,
    /// Step of that plan over the step of one that is made for the same devices from the beginning.
    pub against_cold: f64,
}

/// Plans the same network for devices of three kinds, one shard on each, and again when one of them runs at half speed.
pub fn replan(n_ops: usize, n_devices: usize) -> Result<Replanned, GrowthError> {
    let bundle = bundle((n_ops / OPS_PER_LAYER).max(n_devices));
    let model = import(&bundle)?;
    let devices = (0..n_devices).map(|i| {
        let mut device = nominal("cpu").expect("CPUs are known");
        device.speed = [1.0, 0.7, 0.4][3 * i / n_devices];
        device
    });
    let topology = Topology::new(devices.collect(), LOOPBACK, LOOPBACK);
    let mut slower = topology.clone();
    slower.devices[n_devices / 2].speed /= 2.0;
    let problem = |topology| Problem {
        schedule: Some(ScheduleKind::OneFOneB),
        ..Problem::new(&model, topology, n_devices as u32)
    };
    let began = Instant::now();
    let prepared = Prepared::new(&model);
    let plan = prepared.solve(&problem(&topology), None)?;
    let planned = began.elapsed();
    let began = Instant::now();
    prepared.hold(&model, &topology, &plan);
    let hold = began.elapsed();
    let began = Instant::now();
    let changed = prepared.solve(&problem(&slower), Some(&plan))?;
    let again = began.elapsed();
    let against_cold = changed.step_time / solve(&problem(&slower), None)?.step_time;
    let n_ops = model.grads[0].graph.n_ops();
    Ok(Replanned { n_ops, n_devices, plan: planned, hold, again, against_cold })
}

fn import(bundle: &BTreeMap<String, Vec<u8>>) -> Result<Model, GraphError> {
    let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
    Model::import(&mut |file| bundle.get(file).cloned().ok_or_else(missing))
}

fn f32s(dims: &[u64]) -> ArrayShape {
    ArrayShape::new(DType::Float32, dims)
}

/// Files of a bundle, by path.
fn bundle(n_layers: usize) -> BTreeMap<String, Vec<u8>> {
    let shapes: Vec<(String, ArrayShape)> = (0..n_layers)
        .flat_map(|i| [(format!("layer{i}.b"), f32s(&[WIDTH])), (format!("layer{i}.w"), f32s(&[WIDTH, WIDTH]))])
        .collect();
    let slot = |moment: &str, (name, shape): &(String, ArrayShape)| SlotSpec {
        name: format!("{moment}.{name}"),
        dtype: shape.dtype,
        shape: shape.dims.clone(),
        param: Some(name.clone()),
    };
    let slots: Vec<SlotSpec> = ["m", "v"].iter().flat_map(|m| shapes.iter().map(|s| slot(m, s))).collect();
    let state: Vec<ArrayShape> =
        shapes.iter().map(|(_, s)| s.clone()).chain(slots.iter().map(|s| f32s(&s.shape))).collect();
    let mut init = zeros("init", &state);
    init.push_parameter(parameter("key", ArrayShape::new(DType::Uint32, vec![2]).into()));
    let modules = [
        ("init.hlo.pb", to_hlo(&init, &[])),
        ("grad.hlo.pb", to_hlo(&grad(n_layers), &[])),
        ("update.hlo.pb", to_hlo(&update(&shapes), &[])),
    ];
    let file = |i: usize| {
        let (name, bytes): &(&str, Vec<u8>) = &modules[i];
        let sha256 = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        FileSpec { file: (*name).to_owned(), sha256 }
    };
    let function = |i| FunctionSpec { hlo: file(i), stablehlo: None };
    let batch = |rows| vec![rows, WIDTH];
    let param = |(name, shape): &(String, ArrayShape)| ParamSpec {
        name: name.clone(),
        dtype: shape.dtype,
        shape: shape.dims.clone(),
        grad_dtype: shape.dtype,
    };
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        name: "growth".to_owned(),
        batch_size: ROWS,
        params: shapes.iter().map(param).collect(),
        slots,
        batch: vec![TensorSpec { name: "x".to_owned(), dtype: DType::Float32, shape: batch(ROWS) }],
        metrics: Vec::new(),
        init: function(0),
        grad: vec![GradSpec {
            name: "mb".to_owned(),
            microbatch: MICROBATCH,
            shapes: BTreeMap::from([("x".to_owned(), batch(MICROBATCH))]),
            hlo: file(1),
            stablehlo: None,
        }],
        update: function(2),
        weights: None,
        provenance: BTreeMap::new(),
    };
    let json = serde_json::to_vec(&manifest).expect("a manifest is plain data");
    modules.into_iter().map(|(n, b)| (n.to_owned(), b)).chain([("manifest.json".to_owned(), json)]).collect()
}

/// A graph in the making, with the ops that models are made of.
struct Builder {
    graph: Graph,
    add: CompId,
    scope: String,
}

impl Builder {
    fn new(name: &str) -> Self {
        let mut graph = Graph::new(name);
        let scalar: Shape = f32s(&[]).into();
        let argument = |n: u64| {
            let mut attributes = Writer::default();
            attributes.number(instruction::PARAMETER_NUMBER, n);
            op("a", "parameter", scalar.clone(), Vec::new(), attributes.0)
        };
        let sum = op("sum", "add", scalar.clone(), vec![OpId(0), OpId(1)], Vec::new());
        let ops = vec![argument(0), argument(1), sum];
        let add = graph.push_computation(Computation { name: "add".to_owned(), ops, root: OpId(2) });
        Self { graph, add, scope: String::new() }
    }

    fn input(&mut self, name: &str, shape: &ArrayShape) -> OpId {
        self.graph.push_parameter(parameter(name, shape.clone().into()))
    }

    fn push(&mut self, opcode: &str, dims: &[u64], operands: &[OpId], attributes: Writer) -> OpId {
        const OP_NAME: u32 = 2;
        let mut metadata = Writer::default();
        metadata.bytes(OP_NAME, format!("{}/{opcode}", self.scope).as_bytes());
        let mut all = attributes;
        all.bytes(instruction::METADATA, &metadata.0);
        let mut op = op(opcode, opcode, f32s(dims).into(), operands.to_vec(), all.0);
        if opcode == "reduce" {
            op.called.push(self.add);
        }
        self.graph.push(op)
    }

    fn map(&mut self, opcode: &str, operands: &[OpId]) -> OpId {
        let dims = self.graph.op(operands[0]).shape.as_array().expect("only arrays").dims.clone();
        self.push(opcode, &dims, operands, Writer::default())
    }

    fn along(&mut self, opcode: &str, dims: &[u64], operands: &[OpId], axes: &[u64]) -> OpId {
        let mut attributes = Writer::default();
        attributes.numbers(instruction::DIMENSIONS, axes.iter().copied());
        self.push(opcode, dims, operands, attributes)
    }

    fn constant(&mut self, value: f32) -> OpId {
        const F32S: u32 = 8;
        let mut literal = Writer::default();
        literal.bytes(1, &dense(&f32s(&[]).into()));
        literal.bytes(F32S, &value.to_le_bytes());
        let mut attributes = Writer::default();
        attributes.bytes(instruction::LITERAL, &literal.0);
        self.push("constant", &[], &[], attributes)
    }

    /// A number in the shape of a tensor.
    fn spread(&mut self, number: OpId, dims: &[u64]) -> OpId {
        self.along("broadcast", dims, &[number], &[])
    }

    fn dot(&mut self, rows: u64, columns: u64, a: OpId, b: OpId) -> OpId {
        let mut numbers = Writer::default();
        numbers.numbers(1, [1]);
        numbers.numbers(2, [0]);
        let mut attributes = Writer::default();
        attributes.bytes(instruction::DOT, &numbers.0);
        self.push("dot", &[rows, columns], &[a, b], attributes)
    }
}

/// Layers `x + tanh(x w + b)` and their derivatives.
fn grad(n_layers: usize) -> Graph {
    let mut g = Builder::new("grad");
    let (rows, square) = ([MICROBATCH, WIDTH], [WIDTH, WIDTH]);
    let params: Vec<(OpId, OpId)> =
        (0..n_layers).map(|_| (g.input("b", &f32s(&[WIDTH])), g.input("w", &f32s(&square)))).collect();
    let mut x = g.input("x", &f32s(&rows));
    g.input("key", &ArrayShape::new(DType::Uint32, vec![2]));
    let mut kept = Vec::with_capacity(n_layers);
    for (i, &(b, w)) in params.iter().enumerate() {
        g.scope = format!("jit(grad)/jvp(layer{i})");
        let h = g.dot(MICROBATCH, WIDTH, x, w);
        let b = g.along("broadcast", &rows, &[b], &[1]);
        let a = g.map("add", &[h, b]);
        let t = g.map("tanh", &[a]);
        kept.push((x, t));
        x = g.map("add", &[x, t]);
    }
    g.scope = "jit(grad)/jvp(head)".to_owned();
    let zero = g.constant(0.0);
    let squares = g.map("multiply", &[x, x]);
    let loss = g.along("reduce", &[], &[squares, zero], &[0, 1]);
    let mut gradient = x;
    let mut gradients = Vec::with_capacity(n_layers);
    for (i, (&(_, w), &(x, t))) in params.iter().zip(&kept).enumerate().rev() {
        g.scope = format!("jit(grad)/transpose(jvp(layer{i}))");
        let squares = g.map("multiply", &[t, t]);
        let one = g.constant(1.0);
        let ones = g.spread(one, &rows);
        let slope = g.map("subtract", &[ones, squares]);
        let inner = g.map("multiply", &[gradient, slope]);
        let zero = g.constant(0.0);
        let b = g.along("reduce", &[WIDTH], &[inner, zero], &[0]);
        let turned = g.along("transpose", &square, &[w], &[1, 0]);
        let before = g.dot(MICROBATCH, WIDTH, inner, turned);
        let turned = g.along("transpose", &[WIDTH, MICROBATCH], &[x], &[1, 0]);
        gradients.push([b, g.dot(WIDTH, WIDTH, turned, inner)]);
        gradient = g.map("add", &[gradient, before]);
    }
    gradients.reverse();
    g.graph.set_outputs([loss].into_iter().chain(gradients.into_iter().flatten()).collect());
    g.graph
}

/// Clipping by the global norm, then Adam without bias correction.
fn update(shapes: &[(String, ArrayShape)]) -> Graph {
    let mut g = Builder::new("update");
    g.scope = "jit(update)".to_owned();
    let inputs = |g: &mut Builder| -> Vec<OpId> { shapes.iter().map(|(n, s)| g.input(n, s)).collect() };
    let (w, m, v, gradients) = (inputs(&mut g), inputs(&mut g), inputs(&mut g), inputs(&mut g));
    g.input("n", &f32s(&[]));
    let zero = g.constant(0.0);
    let mut norm = zero;
    for (gradient, (_, shape)) in gradients.iter().zip(shapes) {
        let squares = g.map("multiply", &[*gradient, *gradient]);
        let axes: Vec<u64> = (0..shape.dims.len() as u64).collect();
        let sum = g.along("reduce", &[], &[squares, zero], &axes);
        norm = g.map("add", &[norm, sum]);
    }
    let clip = g.map("rsqrt", &[norm]);
    let [keep, rate] = [0.9, 1e-3].map(|value| g.constant(value));
    let mut outputs = [Vec::new(), Vec::new(), Vec::new()];
    for (i, (_, shape)) in shapes.iter().enumerate() {
        let dims = &shape.dims;
        let factor = g.spread(clip, dims);
        let gradient = g.map("multiply", &[gradients[i], factor]);
        let keep = g.spread(keep, dims);
        let old = g.map("multiply", &[m[i], keep]);
        let m = g.map("add", &[old, gradient]);
        let squares = g.map("multiply", &[gradient, gradient]);
        let old = g.map("multiply", &[v[i], keep]);
        let v = g.map("add", &[old, squares]);
        let root = g.map("rsqrt", &[v]);
        let rate = g.spread(rate, dims);
        let direction = g.map("multiply", &[m, root]);
        let change = g.map("multiply", &[direction, rate]);
        for (list, op) in outputs.iter_mut().zip([g.map("subtract", &[w[i], change]), m, v]) {
            list.push(op);
        }
    }
    g.graph.set_outputs(outputs.concat());
    g.graph
}

/// One line per size, then the largest against the first.
pub fn table(all: &[Taken]) -> String {
    let mut out = format!(
        "{:>8} {:>10} {:>9} {:>10} {:>10} {:>10} {:>10} {:>9} {:>14}\n",
        "ops", "in update", "modules", "import s", "plan s", "cut s", "all s", "us / op", "against linear"
    );
    let per_op = |t: &Taken| t.all().as_secs_f64() / t.n_ops as f64;
    for taken in all {
        out += &format!(
            "{:>8} {:>10} {:>9} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>9.1} {:>14.2}\n",
            taken.n_ops,
            taken.n_update_ops,
            taken.n_modules,
            taken.import.as_secs_f64(),
            taken.plan.as_secs_f64(),
            taken.cut.as_secs_f64(),
            taken.all().as_secs_f64(),
            1e6 * per_op(taken),
            per_op(taken) / per_op(&all[0])
        );
    }
    if let [first, .., last] = all {
        let (more, longer) =
            (last.n_ops as f64 / first.n_ops as f64, last.all().as_secs_f64() / first.all().as_secs_f64());
        out += &format!(
            "{} ops take {:.3} s; {more:.1} times as many take {longer:.1} times as long\n",
            first.n_ops,
            first.all().as_secs_f64()
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_devices_of_several_kinds_are_planned_and_planned_again() {
        let planned = replan(600, 12).unwrap();
        assert_eq!(planned.n_devices, 12);
        assert!(planned.n_ops.abs_diff(600) < 100, "{planned:?}");
    }

    #[test]
    fn a_model_of_any_size_is_imported_planned_and_cut() {
        // Of four layers a shard may have no param, and then it has nothing to update.
        for (n_ops, least) in [(1, 2 * SHARDS), (2000, 3 * SHARDS - 1)] {
            let taken = measure(n_ops).unwrap();
            assert!(taken.n_ops.abs_diff(n_ops) < 100, "{taken:?}");
            // Forward and backward on each shard but the last, and the update before and after the norm is known.
            assert!(taken.n_modules >= least, "{taken:?}");
        }
    }
}
