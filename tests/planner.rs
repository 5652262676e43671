//! The planner on models nobody wrote: random graphs on random devices.

use std::collections::BTreeSet;

use foreshard::graph::cut::{op, parameter};
use foreshard::graph::proto::{Writer, instruction};
use foreshard::graph::{ArrayShape, DType, GradGraph, Graph, Manifest, Model, OpId, Shape, StateTensor};
use foreshard::plan::block::Blocks;
use foreshard::plan::coordinate::coordinates;
use foreshard::plan::count::{self, Wanted};
use foreshard::plan::explain::{Resource, explain};
use foreshard::plan::predict::{Costs, predict};
use foreshard::plan::schedule::TaskGraph;
use foreshard::plan::segment::{Parameters, Segmentation, follow_parameters};
use foreshard::plan::verify::{Fault, verify};
use foreshard::plan::{
    Aim, BatchEstimate, Granularity, Infeasible, Objective, Place, Plan, Prepared, Priced, Problem, Recompute,
    ScheduleKind, ShardId, graph_picture, pinned, repriced, solve,
};
use foreshard::profile::{Calibration, TensorView, profile};
use foreshard::topology::{Device, LOOPBACK, Link, Measured, NETWORK, Topology, nominal, parse_devices};
use foreshard::units::{Bytes, BytesPerSec, Seconds};
use proptest::prelude::*;
use proptest::sample::Index;

/// Microbatches that the random models are exported with, of batches of 8 rows.
const MICROBATCHES: [u64; 3] = [1, 2, 8];

/// A recipe for a training step; every index picks among what is there when its op is added.
#[derive(Clone, Debug)]
struct Recipe {
    /// Elements of each param.
    params: Vec<u64>,
    /// Opcode, operands and elements of each forward op.
    forward: Vec<(u8, Index, Index, u64)>,
    /// What each backward op reads beside the gradient that comes in, and its elements.
    backward: Vec<(Index, u64)>,
    /// Where along the backward half each param's gradient is made, and what else it reads.
    gradients: Vec<(Index, Index)>,
}

fn recipe() -> impl Strategy<Value = Recipe> {
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

fn model(recipe: &Recipe) -> Model {
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

/// Devices of any speed, some with little memory, on up to two nodes.
fn devices() -> impl Strategy<Value = Topology> {
    let device = (
        1u32..100,
        1u32..100,
        prop_oneof![Just(1u64 << 40), (24 << 20) + 100_000u64..(24 << 20) + 40_000_000],
        any::<bool>(),
        prop_oneof![3 => Just(None), 1 => (1e6..1e10).prop_map(Some)],
    );
    prop::collection::vec(device, 1..7).prop_map(|all| Topology {
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
    })
}

/// Any schedule, or the planner's choice.
fn schedules() -> impl Strategy<Value = Option<ScheduleKind>> {
    prop_oneof![3 => prop::sample::select(&ScheduleKind::ALL[..]).prop_map(Some), 1 => Just(None)]
}

/// A plan can be cut, ordered and run within the memory there is.
fn sound(problem: &Problem<'_>, plan: &Plan) -> Result<(), TestCaseError> {
    let n_shards = problem.n_shards as usize;
    prop_assert_eq!(plan.shards.len(), n_shards);
    let mut taken: Vec<_> = plan.shards.iter().flat_map(|s| &s.devices).collect();
    taken.sort();
    taken.dedup();
    prop_assert_eq!(taken.len(), n_shards * problem.n_replicas as usize, "a device has two shards");
    for (i, shard) in plan.shards.iter().enumerate() {
        prop_assert!(shard.busy > Seconds(0.0), "shard {} is empty", i);
        for d in &shard.devices {
            prop_assert!(shard.memory <= problem.topology.devices[d.index()].memory, "shard {} does not fit", i);
        }
    }
    prop_assert!(plan.step_time.0 >= plan.bound.0 * 0.999_999, "{} is below the bound {}", plan.step_time, plan.bound);
    prop_assert_eq!(plan.owners.len(), problem.model.state.len());
    for (variant, assignment) in &plan.grads {
        let graph = &problem.model.variant(variant).unwrap().graph;
        let cut = plan.cut(problem.model, graph, assignment).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let of = convex(graph, &cut, |id| assignment.place(id))?;
        for (i, _) in plan.shards.iter().enumerate() {
            let here = Place::Shard(ShardId(i as u32));
            let placed = graph.ops().filter(|(id, o)| assignment.place(*id) == here && &*o.opcode != "parameter");
            prop_assert!(placed.count() > 0 || of.is_empty(), "shard {} has no op", i);
        }
        let durations = vec![Seconds(1.0); cut.segments.len()];
        let tasks = TaskGraph::new(graph, &cut, n_shards, &durations, |_, _| Seconds(0.1));
        tasks.replay(&plan.orders[variant], plan.n_microbatches).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
    Ok(())
}

/// Segments form a graph without cycles, in which no path leaves a segment and comes back.
///
/// Returns the segment of every op that has one.
fn convex(
    graph: &Graph,
    cut: &Segmentation,
    place: impl Fn(OpId) -> Place,
) -> Result<Vec<Option<usize>>, TestCaseError> {
    let mut of: Vec<Option<usize>> = vec![None; graph.n_ops()];
    for (i, segment) in cut.segments.iter().enumerate() {
        let own = |id: &&OpId| place(**id) != Place::Everywhere && !segment.again.contains(id);
        for &id in segment.ops.iter().filter(own) {
            prop_assert_eq!(place(id), Place::Shard(segment.shard));
            prop_assert_eq!(of[id.index()].replace(i), None, "{} is in two segments", id);
        }
    }
    // Segments stand in an order of execution, so a path can only go forward: once out, never back.
    for (id, op) in graph.ops() {
        let (Place::Shard(_), true) = (place(id), &*op.opcode != "parameter") else { continue };
        let here = of[id.index()];
        prop_assert!(here.is_some(), "{} is in no segment", id);
        for o in &op.operands {
            prop_assert!(of[o.index()] <= here, "{} reads {} of a later segment", id, o);
        }
    }
    Ok(of)
}

/// What uses nothing of the search and the prediction finds the plan sound, and the same step.
fn verified(problem: &Problem<'_>, plan: &Plan) -> Result<(), TestCaseError> {
    let found = verify(problem.model, problem.topology, plan).map_err(|e| TestCaseError::fail(e.to_string()))?;
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.max(b);
    prop_assert!(near(found.step.0, plan.step_time.0), "{} simulated, {} planned", found.step, plan.step_time);
    for (i, shard) in plan.shards.iter().enumerate() {
        prop_assert!(near(found.busy[i].0, shard.busy.0), "shard {}: {} and {}", i, found.busy[i], shard.busy);
    }
    prop_assert_eq!(found.sent, plan.bytes_cut);
    Ok(())
}

/// Before anything is measured, the batches of a plan are predicted to take what the plan was chosen for.
fn batches_take_what_was_planned(problem: &Problem<'_>, plan: &Plan) -> Result<(), TestCaseError> {
    if plan.n_replicas > 1 {
        // A plan is priced by the slowest replica of each shard, a batch by each replica as a whole.
        return Ok(());
    }
    let priced = Priced::new(problem.model, problem.topology, plan).unwrap();
    let nothing_measured = Calibration::default();
    let of_variant = |v: &String| priced.estimate(v, &nothing_measured, &|_| 1.0, None).unwrap();
    let estimates: Vec<BatchEstimate> = plan.grads.keys().map(of_variant).collect();
    let step = estimates.iter().map(|e| e.step.0).fold(0.0, f64::max);
    // Planned is a step alone; among others it begins while others end.
    let busiest = plan.shards.iter().map(|s| s.busy.0).fold(0.0, f64::max);
    // Where NICs are shared, a message may have half the rate that it has in a step alone: two steps are under way at once.
    let nodes: BTreeSet<&str> = problem.topology.devices.iter().map(|d| d.node.as_str()).collect();
    let longest = plan.step_time.0 * if nodes.len() > 1 { 2.0 } else { 1.0 };
    prop_assert!(step <= longest * (1.0 + 1e-9), "{step} {}", plan.step_time.0);
    prop_assert!(step >= busiest * (1.0 - 1e-9), "{step} {busiest}");
    for estimate in &estimates {
        prop_assert_eq!(estimate.step, estimate.explained);
        prop_assert!(estimate.messages >= -1e-6 && (plan.shards.len() > 1 || estimate.messages == 0.0));
    }
    for (i, shard) in plan.shards.iter().enumerate() {
        let busy = estimates.iter().map(|e| e.workers[i].busy.0).fold(0.0, f64::max);
        prop_assert!((busy / shard.busy.0 - 1.0).abs() < 1e-9, "shard {i}: {busy} {}", shard.busy.0);
        let memory = estimates.iter().map(|e| e.workers[i].memory).max();
        prop_assert_eq!(memory, Some(shard.memory));
        let timed = priced.segments(&estimates[0].variant, i);
        let sum: f64 = timed.iter().map(|t| t.time(&Measured::NOMINAL).0).sum();
        prop_assert!((sum / estimates[0].workers[i].busy.0 - 1.0).abs() < 1e-9);
    }
    // The batch itself lies on every shard that reads it.
    let shape = problem.model.manifest.batch[0].array();
    let data = vec![1; shape.bytes().0 as usize];
    let batch = profile("any", &[TensorView { name: "x", shape: &shape, data: &data, padded: false }]).unwrap();
    let variant = priced.variant_of(&batch).unwrap();
    let [with, without] =
        [Some(&batch), None].map(|b| priced.estimate(variant, &nothing_measured, &|_| 1.0, b).unwrap());
    prop_assert_eq!(with.step, without.step);
    let more: Vec<u64> = with.workers.iter().zip(&without.workers).map(|(a, b)| (a.memory - b.memory).0).collect();
    prop_assert!(more.iter().all(|&m| m == 0 || m == shape.bytes().0), "{more:?}");
    Ok(())
}

/// A planner that has seen the model and the plan in force says what a new one says, of other speeds and other devices.
fn knowing_the_model_changes_nothing(problem: &Problem<'_>, plan: &Plan) -> Result<(), TestCaseError> {
    let prepared = Prepared::new(problem.model);
    prepared.hold(problem.model, problem.topology, plan);
    let (mut slower, mut other) = (problem.topology.clone(), problem.topology.clone());
    slower.devices[0].speed *= 0.5;
    slower.local.bandwidth = slower.local.bandwidth * 0.5;
    other.devices[0].flops = other.devices[0].flops * 0.3;
    for topology in [&slower, &other, problem.topology] {
        let problem = Problem { topology, ..*problem };
        prop_assert_eq!(prepared.repriced(&problem, plan), repriced(&problem, plan));
        prop_assert_eq!(prepared.solve(&problem, Some(plan)), solve(&problem, Some(plan)));
        prop_assert_eq!(prepared.solve(&problem, None), solve(&problem, None));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_model_on_any_devices_gets_a_sound_plan_or_a_reason(
        recipe in recipe(),
        topology in devices(),
        n_shards in 1u32..5,
        n_replicas in 1u32..3,
        microbatch in prop_oneof![Just(None), prop::sample::select(&MICROBATCHES[..]).prop_map(Some)],
        schedule in schedules(),
        roomy: bool,
        recompute in prop::sample::select(&[Recompute::Auto, Recompute::Never, Recompute::Always][..]),
    ) {
        let model = model(&recipe);
        let objective = if roomy { Objective::Memory } else { Objective::Throughput };
        let aim = Aim { objective, recompute, ..Aim::default() };
        let problem = Problem { model: &model, topology: &topology, n_shards, n_replicas, microbatch, schedule, aim };
        match solve(&problem, None) {
            Ok(plan) => {
                let picture = graph_picture::svg(&model, &model.grads[0], &topology.devices[0]);
                prop_assert!(!picture.contains("NaN") && !picture.contains("inf\""), "{}", picture);
                sound(&problem, &plan)?;
                verified(&problem, &plan)?;
                batches_take_what_was_planned(&problem, &plan)?;
                prop_assert_eq!(&solve(&problem, None).unwrap(), &plan, "the same question, another answer");
                // It looks on from there, and may find a better one.
                let again = solve(&problem, Some(&plan)).unwrap();
                let is_better = problem.cost(&again) < problem.cost(&plan);
                prop_assert!(again == plan || is_better, "{:?} was left for {:?}", plan, again);
                knowing_the_model_changes_nothing(&problem, &plan)?;
            }
            Err(Infeasible::Indivisible { needs, has, .. }) => prop_assert!(needs > has),
            Err(Infeasible::Memory { needs, has, enough, shards, .. }) => {
                prop_assert!(needs > has);
                let largest = topology.devices.iter().max_by_key(|d| d.memory).unwrap();
                let fits = |n: u32, memory: Bytes| {
                    let device = Device { memory, ..largest.clone() };
                    let topology = Topology { devices: vec![device; (n * n_replicas) as usize], ..topology.clone() };
                    solve(&Problem { topology: &topology, n_shards: n, ..problem }, None).is_ok()
                };
                prop_assert!(enough.is_none_or(|enough| fits(n_shards, enough)), "{:?} is not enough", enough);
                prop_assert!(shards.is_none_or(|n| fits(n, largest.memory)), "{:?} shards do not fit", shards);
            }
            Err(Infeasible::TooFewDevices { n_devices, .. }) => {
                prop_assert!(n_shards as usize * n_replicas as usize > n_devices);
            }
            Err(Infeasible::TooFewOps { .. }) => prop_assert!(n_shards > 1, "one shard is no cut"),
            Err(Infeasible::NoMicrobatch { .. }) => prop_assert!(microbatch == Some(8) && n_replicas == 2),
            Err(e) => return Err(TestCaseError::fail(e.to_string())),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Every way to put the ops and params of a small model on two devices takes at least the bound.
    #[test]
    fn no_assignment_at_all_beats_the_bound(
        recipe in recipe(),
        topology in devices(),
        microbatch in prop::sample::select(&MICROBATCHES[..]),
    ) {
        let mut recipe = recipe;
        recipe.params.truncate(2);
        recipe.forward.truncate(3);
        recipe.backward.truncate(2);
        let mut topology = topology;
        topology.devices.iter_mut().for_each(|d| d.memory = Bytes(1 << 40));
        let model = model(&recipe);
        let schedule = Some(ScheduleKind::OneFOneB);
        let problem =
            Problem { model: &model, topology: &topology, n_shards: 2, n_replicas: 1, microbatch: Some(microbatch), schedule, aim: Aim::default() };
        let Ok(plan) = solve(&problem, None) else { return Ok(()) };
        let costs = Costs::of(&model);
        let (variant, assignment) = plan.grads.first_key_value().unwrap();
        let placed: Vec<usize> =
            (0..assignment.0.len()).filter(|&i| assignment.0[i] != Place::Everywhere).collect();
        if placed.len() > 11 {
            return Ok(());
        }
        let mut n_tried = 0;
        for bits in 0u32..1 << placed.len() {
            let mut tried = plan.clone();
            let places = &mut tried.grads.get_mut(variant).unwrap().0;
            for (bit, &op) in placed.iter().enumerate() {
                places[op] = Place::Shard(ShardId(bits >> bit & 1));
            }
            for (i, tensor) in model.state.iter().enumerate() {
                if let Some(p) = tensor.param.or((i < model.n_params).then_some(i)) {
                    tried.owners[i] = tried.grads[variant].0[model.grads[0].graph.parameters()[p].index()];
                }
            }
            // Values that cannot travel rule some out.
            if let Ok(predicted) = predict(&model, &topology, &tried, &costs) {
                n_tried += 1;
                let (step, bound) = (predicted.step_time, plan.bound);
                prop_assert!(step.0 >= bound.0 * (1.0 - 1e-9), "{} is below the bound {}", step, bound);
            }
        }
        prop_assert!(n_tried > 0);
    }

    #[test]
    fn what_is_explained_adds_up(recipe in recipe(), topology in devices(), n_shards in 1u32..4) {
        let model = model(&recipe);
        let (microbatch, schedule) = (None, Some(ScheduleKind::OneFOneB));
        let problem = Problem { model: &model, topology: &topology, n_shards, n_replicas: 1, microbatch, schedule, aim: Aim::default() };
        let Ok(plan) = solve(&problem, None) else { return Ok(()) };
        let said = explain(&model, &topology, &plan).unwrap();
        let step = said.shares.step.0;
        prop_assert!((step / plan.step_time.0 - 1.0).abs() < 1e-9);
        for share in &said.shares.shards {
            let sum = share.computing + share.updating + share.receiving + share.waiting;
            prop_assert!((sum.0 / step - 1.0).abs() < 1e-9, "{} of {}", sum, step);
        }
        let chain = said.shares.chain.iter().map(|s| s.0).sum::<f64>() + said.shares.transfers.0;
        let chain = chain + said.shares.update.0 + said.shares.averaging.0;
        prop_assert!((chain / step - 1.0).abs() < 1e-9, "the longest chain has {} of {}", chain, step);
        if let Some(next) = &said.next {
            let m = &next.more;
            let more = (m.computing + m.updating + m.receiving + m.waiting).0;
            prop_assert!((more - (next.step.0 - step)).abs() < 1e-9 * step.max(next.step.0));
        }
        let text = said.to_string();
        prop_assert!(!text.contains("NaN") && !text.contains("inf"), "{}", text);
        let device_first = matches!(said.more[0].of, Resource::Device { .. });
        prop_assert!(device_first);
    }
}

fn bundle(name: &str) -> Model {
    let path = std::path::Path::new("bundles").join(name);
    Model::import(&mut |file| std::fs::read(path.join(file))).unwrap()
}

/// A GPT of six layers on devices of which none is like the others: the even cut lies inside a layer.
fn uneven(n: usize, aim: Aim, previous: Option<&Plan>) -> (Model, Topology, Result<Plan, Infeasible>) {
    scheduled(n, aim, Some(ScheduleKind::OneFOneB), previous)
}

fn scheduled(
    n: usize,
    aim: Aim,
    schedule: Option<ScheduleKind>,
    previous: Option<&Plan>,
) -> (Model, Topology, Result<Plan, Infeasible>) {
    let model = bundle("char_gpt.bundle");
    let device = |i: usize| Device { speed: 1.0 - 0.1 * i as f64, ..nominal("cpu").unwrap() };
    let topology = Topology { devices: (0..n).map(device).collect(), local: LOOPBACK, remote: LOOPBACK };
    let (n_shards, n_replicas, microbatch) = (n as u32, 1, None);
    let problem = Problem { model: &model, topology: &topology, n_shards, n_replicas, microbatch, schedule, aim };
    let plan = solve(&problem, previous);
    (model, topology, plan)
}

/// Blocks of the model that lie on more than one shard.
fn torn(model: &Model, plan: &Plan) -> Vec<String> {
    let costs = Costs::of(model);
    let mut torn = Vec::new();
    for (variant, places) in &plan.grads {
        let graph = &model.variant(variant).unwrap().graph;
        let line = coordinates(graph, model.n_params, model.n_scalars(), &costs.grads[variant]);
        let blocks = Blocks::new(graph, &line);
        let mut shards = vec![Vec::new(); blocks.names.len()];
        for (i, at) in line.of.iter().enumerate() {
            if let (Some(at), Place::Shard(shard)) = (at, places.0[i]) {
                shards[blocks.of[*at as usize]].push(shard);
            }
        }
        shards.iter_mut().for_each(|s| (s.sort_unstable(), s.dedup()).1);
        let names = blocks.names.iter().zip(&shards).filter(|(_, shards)| shards.len() > 1);
        torn.extend(names.map(|(name, _)| format!("{variant}: {name}")));
    }
    torn
}

#[test]
fn layers_stay_whole_where_that_is_asked_for() {
    let layer = Aim { granularity: Granularity::Layer, ..Aim::default() };
    for n in 2..=6 {
        let (model, topology, plan) = uneven(n, layer, None);
        let plan = plan.unwrap();
        verify(&model, &topology, &plan).unwrap();
        assert_eq!(torn(&model, &plan), [""; 0], "{n} shards");
        let (.., again) = uneven(n, layer, Some(&plan));
        assert_eq!(again.unwrap(), plan, "what is in force stays");
        let (.., free) = uneven(n, Aim::default(), None);
        let free = free.unwrap();
        assert!(free.step_time <= plan.step_time, "{n} shards: {} and {}", free.step_time, plan.step_time);
        if n == 3 {
            assert_ne!(torn(&model, &free), [""; 0], "{n} shards");
            // A plan with torn layers does not stay.
            assert_eq!(uneven(n, layer, Some(&free)).2.unwrap().grads, plan.grads);
        }
    }
    let e = uneven(7, layer, None).2.unwrap_err();
    assert_eq!(e, Infeasible::TooFewLayers { n_shards: 7, n_layers: 6 });
    assert!(e.to_string().contains("take at most 6 shards, or spec.partition.granularity: sublayer"), "{e}");
}

/// Where a plan may cut and how its pipeline fills are asked for one by one.
#[test]
fn layers_stay_whole_and_room_is_spared_by_every_schedule() {
    for objective in [Objective::Throughput, Objective::Memory] {
        let aim = Aim { granularity: Granularity::Layer, objective, ..Aim::default() };
        for schedule in ScheduleKind::ALL.map(Some).into_iter().chain([None]) {
            let (model, topology, plan) = scheduled(3, aim, schedule, None);
            let plan = plan.unwrap();
            verify(&model, &topology, &plan).unwrap();
            assert_eq!(torn(&model, &plan), [""; 0], "{schedule:?}");
            assert!(schedule.is_none_or(|s| s == plan.schedule) && plan.aim == aim, "{schedule:?}: {}", plan.schedule);
            let (.., again) = scheduled(3, aim, schedule, Some(&plan));
            assert_eq!(again.unwrap(), plan, "what is in force stays: {schedule:?}");
        }
    }
}

#[test]
fn room_to_spare_is_worth_time_where_that_is_asked_for() {
    for granularity in [Granularity::Sublayer, Granularity::Layer] {
        let [fast, roomy] = [Objective::Throughput, Objective::Memory].map(|objective| {
            let aim = Aim { granularity, objective, ..Aim::default() };
            let (model, topology, plan) = uneven(3, aim, None);
            let plan = plan.unwrap();
            verify(&model, &topology, &plan).unwrap();
            assert_eq!(uneven(3, aim, Some(&plan)).2.unwrap(), plan, "what is in force stays");
            plan
        });
        let most = |plan: &Plan| plan.shards.iter().map(|s| s.memory).max().unwrap();
        assert!(most(&roomy).0 as f64 <= 0.85 * most(&fast).0 as f64, "{} and {}", most(&roomy), most(&fast));
        assert!(fast.step_time < roomy.step_time, "{} and {}", fast.step_time, roomy.step_time);
    }
}

#[test]
fn the_verifier_finds_what_was_tampered_with() {
    let model = bundle("mlp_digits.bundle");
    let topology = Topology { devices: vec![nominal("cpu").unwrap(); 2], local: LOOPBACK, remote: LOOPBACK };
    let (microbatch, schedule) = (Some(16), Some(ScheduleKind::OneFOneB));
    let problem = Problem {
        model: &model,
        topology: &topology,
        n_shards: 2,
        n_replicas: 1,
        microbatch,
        schedule,
        aim: Aim::default(),
    };
    let plan = solve(&problem, None).unwrap();
    let variant = plan.grads.keys().next().unwrap().clone();
    let fault = |change: &dyn Fn(&mut Plan)| {
        let mut changed = plan.clone();
        change(&mut changed);
        verify(&model, &topology, &changed).unwrap_err()
    };
    let lost = fault(&|p| p.orders.get_mut(&variant).unwrap()[1].truncate(1));
    assert!(matches!(lost, Fault::Wrong { .. }), "{lost}");
    let reversed = fault(&|p| p.orders.get_mut(&variant).unwrap()[0].reverse());
    assert!(matches!(reversed, Fault::Stuck { .. }), "{reversed}");
    let shared = fault(&|p| p.shards[1].devices = p.shards[0].devices.clone());
    assert!(matches!(shared, Fault::Wrong { .. }), "{shared}");
    let understated = fault(&|p| p.shards[0].memory = Bytes(1000));
    assert!(matches!(understated, Fault::Memory { .. }), "{understated}");
}

/// A GPT on three equal devices, in eight microbatches.
fn gpt_on_three(schedule: ScheduleKind, memory: Bytes, aim: Aim) -> (Model, Topology, Result<Plan, Infeasible>) {
    let model = bundle("char_gpt.bundle");
    let device = Device { memory, ..nominal("cpu").unwrap() };
    let topology = Topology { devices: vec![device; 3], local: LOOPBACK, remote: LOOPBACK };
    let (n_shards, n_replicas, microbatch, schedule) = (3, 1, Some(2), Some(schedule));
    let problem = Problem { model: &model, topology: &topology, n_shards, n_replicas, microbatch, schedule, aim };
    let plan = solve(&problem, None);
    (model, topology, plan)
}

#[test]
fn computes_again_what_does_not_fit_and_nothing_where_all_fits() {
    let with = |recompute| Aim { recompute, ..Aim::default() };
    let roomy = Bytes(4 << 30);
    for schedule in ScheduleKind::ALL {
        let (model, topology, kept) = gpt_on_three(schedule, roomy, Aim::default());
        let kept = kept.unwrap();
        assert_eq!(kept.recomputes(), [false; 3], "{schedule}");
        // All that can: the last shard turns at once and has nothing to keep, unless it has several ranges of the model.
        let (_, _, again) = gpt_on_three(schedule, roomy, with(Recompute::Always));
        let again = again.unwrap();
        verify(&model, &topology, &again).unwrap();
        assert_eq!(again.recomputes()[..2], [true; 2], "{schedule}");
        let most = |plan: &Plan| plan.shards.iter().map(|s| s.memory).max().unwrap();
        assert!(most(&again) < most(&kept), "{schedule}: {} and {}", most(&again), most(&kept));
        assert!(again.step_time > kept.step_time, "{schedule}: {} and {}", again.step_time, kept.step_time);
        // The same cut: only what is kept, and for how long, differs.
        let mut same = kept.clone();
        same.shards[0].recompute = true;
        let variant = kept.grads.keys().next().unwrap();
        let graph = &model.variant(variant).unwrap().graph;
        let cut = same.cut(&model, graph, &same.grads[variant]).unwrap();
        for segment in cut.segments.iter().filter(|s| !s.again.is_empty()) {
            assert_eq!(segment.shard, ShardId(0), "{schedule}");
            let once = |op: &OpId| &*graph.op(*op).opcode == "parameter";
            assert!(!segment.again.iter().any(once), "{schedule}");
        }
    }
    // As little memory as nothing fits into that keeps all.
    let kind = ScheduleKind::GPipe;
    let (_, _, refused) = gpt_on_three(kind, Bytes(1 << 20), with(Recompute::Never));
    let Err(Infeasible::Memory { enough: Some(enough), .. }) = refused else { panic!("{refused:?}") };
    let tight = Bytes(enough.0 * 4 / 5);
    let (_, _, refused) = gpt_on_three(kind, tight, with(Recompute::Never));
    let refused = refused.unwrap_err();
    assert!(refused.to_string().contains("spec.partition.recompute: auto"), "{refused}");
    let (model, topology, plan) = gpt_on_three(kind, tight, Aim::default());
    let plan = plan.unwrap();
    verify(&model, &topology, &plan).unwrap();
    assert!(plan.shards.iter().any(|s| s.recompute), "{plan:?}");
    let explained = explain(&model, &topology, &plan).unwrap().to_string();
    assert!(
        explained.contains("What is computed again, instead of being kept\n  shard 0: forward values"),
        "{explained}"
    );
    // Where room is what counts, those that are fullest otherwise do it.
    let aim = Aim { objective: Objective::Memory, ..Aim::default() };
    let never = Aim { recompute: Recompute::Never, ..aim };
    let [auto, never] = [aim, never].map(|aim| gpt_on_three(kind, roomy, aim).2.unwrap());
    let most = |plan: &Plan| plan.shards.iter().map(|s| s.memory).max().unwrap();
    assert!(most(&auto).0 * 5 < most(&never).0 * 4, "{} and {}", most(&auto), most(&never));
}

/// Who has less time says when to stop: there is a plan in any case, and a better one later.
#[test]
fn a_search_that_is_stopped_has_the_best_until_then() {
    let (model, topology, expected) = uneven(3, Aim::default(), None);
    let prepared = Prepared::new(&model);
    let (n_shards, n_replicas, microbatch, schedule) = (3, 1, None, Some(ScheduleKind::OneFOneB));
    let aim = Aim::default();
    let problem = Problem { model: &model, topology: &topology, n_shards, n_replicas, microbatch, schedule, aim };
    let asked = |most: u32| {
        let asked = std::cell::Cell::new(0);
        let go_on = || {
            asked.set(asked.get() + 1);
            asked.get() <= most
        };
        let plan = prepared.solve_while(&problem, None, &go_on).unwrap();
        verify(&model, &topology, &plan).unwrap();
        assert!(plan.bound > Seconds(0.0) && plan.step_time >= plan.bound);
        (plan, asked.get())
    };
    let (first, n_first) = asked(0);
    let (all, n_all) = asked(u32::MAX);
    let (some, n_some) = asked(n_all / 2);
    assert!(n_first < n_some && n_some <= n_all, "{n_first}, {n_some} and {n_all} times");
    assert!(first.step_time >= some.step_time && some.step_time >= all.step_time);
    assert!(first.step_time > all.step_time, "{} and {}", first.step_time, all.step_time);
    assert_eq!(Ok(all), expected);
}

#[test]
fn the_verifier_finds_who_computes_again_without_being_told() {
    let (model, topology, plan) =
        gpt_on_three(ScheduleKind::GPipe, Bytes(4 << 30), Aim { recompute: Recompute::Always, ..Aim::default() });
    let mut plan = plan.unwrap();
    verify(&model, &topology, &plan).unwrap();
    // What it keeps after all does not fit into what it said.
    plan.shards[0].memory = verify(&model, &topology, &plan).unwrap().memory[0];
    verify(&model, &topology, &plan).unwrap();
    plan.shards[0].recompute = false;
    let fault = verify(&model, &topology, &plan).unwrap_err();
    assert!(matches!(fault, Fault::Memory { shard: 0, .. }), "{fault}");
}

/// Where two nodes are joined by a slow link, the line went back and forth between them if their devices were listed so.
#[test]
fn devices_of_a_node_stand_together_where_links_are_slow() {
    let model = bundle("mlp_digits.bundle");
    let plan = |nodes: [&str; 4]| {
        let devices = nodes.map(|node| Device { node: node.to_owned(), ..nominal("cpu").unwrap() }).to_vec();
        let remote = Link { bandwidth: BytesPerSec(2e7), latency: Seconds(5e-4) };
        let topology = Topology { devices, local: LOOPBACK, remote };
        let (microbatch, schedule) = (None, Some(ScheduleKind::OneFOneB));
        let problem = Problem {
            model: &model,
            topology: &topology,
            n_shards: 4,
            n_replicas: 1,
            microbatch,
            schedule,
            aim: Aim::default(),
        };
        solve(&problem, None).unwrap().step_time
    };
    assert_eq!(plan(["a", "b", "a", "b"]), plan(["a", "a", "b", "b"]));
}

/// The factor by which gradients are clipped went from shard to shard in the shape of every gradient, and the updates of
/// all params with it to the shard that had made it.
/// A planner that takes every message for alone cuts where more crosses than the NICs carry.
#[test]
fn messages_that_share_a_nic_count_together() {
    let model = bundle("char_gpt.bundle");
    let topology = |link: f64, nic: f64| {
        let device =
            |node: &str| Device { node: node.to_owned(), nic: Some(BytesPerSec(nic)), ..nominal("cpu").unwrap() };
        let remote = Link { bandwidth: BytesPerSec(link), ..NETWORK };
        Topology { devices: ["a", "a", "b", "b"].map(device).to_vec(), local: LOOPBACK, remote }
    };
    for link in [2e7, 5e7] {
        let (shared, alone) = (topology(link, link), topology(link, 1e15));
        let problem = |topology| Problem {
            model: &model,
            topology,
            n_shards: 4,
            n_replicas: 1,
            microbatch: Some(2),
            schedule: Some(ScheduleKind::Interleaved),
            aim: Aim::default(),
        };
        let (aware, unaware) = (solve(&problem(&shared), None).unwrap(), solve(&problem(&alone), None).unwrap());
        for (topology, plan) in [(&shared, &aware), (&alone, &unaware)] {
            verify(&model, topology, plan).unwrap();
        }
        let found = repriced(&problem(&shared), &unaware).unwrap();
        assert!(found.step_time.0 > 1.05 * unaware.step_time.0, "{} and {}", found.step_time, unaware.step_time);
        assert!(aware.step_time.0 < 0.97 * found.step_time.0, "{} and {}", aware.step_time, found.step_time);
    }
}

#[test]
fn shards_exchange_only_numbers_to_update_their_params() {
    let model = bundle("char_gpt.bundle");
    let topology = Topology { devices: vec![nominal("cpu").unwrap(); 2], local: LOOPBACK, remote: LOOPBACK };
    let (microbatch, schedule) = (Some(4), Some(ScheduleKind::OneFOneB));
    let problem = Problem {
        model: &model,
        topology: &topology,
        n_shards: 2,
        n_replicas: 1,
        microbatch,
        schedule,
        aim: Aim::default(),
    };
    let plan = solve(&problem, None).unwrap();
    let gradients = plan.owners[..model.n_params].iter().copied();
    let places: Vec<Place> = plan.owners.iter().copied().chain(gradients).chain([Place::Everywhere]).collect();
    let assignment = follow_parameters(&model.update, &places);
    let cut = Segmentation::new(&model.update, &assignment, &plan.owners, 2, Parameters::Sent).unwrap();
    let sent: Bytes = (0..cut.messages.len()).map(|i| cut.bytes(&model.update, i)).sum();
    assert!(
        sent > Bytes(0) && sent < Bytes(1024),
        "{sent} sent between two shards to update {} params",
        model.n_params
    );
    let n_ops = |shard| cut.of_shard(ShardId(shard)).map(|(_, s)| s.ops.len()).sum::<usize>();
    assert!(n_ops(0).abs_diff(n_ops(1)) < n_ops(0).max(n_ops(1)) / 2, "{} and {} ops", n_ops(0), n_ops(1));
}

/// Figures that no device or link has, from a file or from another program.
#[test]
fn devices_and_links_that_cannot_be_are_a_reason() {
    let model = bundle("mlp_digits.bundle");
    let good = parse_devices("cpu,cpu:node=b").unwrap();
    let check = |change: &dyn Fn(&mut Topology), says: &str| {
        let mut topology = good.clone();
        change(&mut topology);
        let (microbatch, schedule) = (None, Some(ScheduleKind::OneFOneB));
        let aim = Aim::default();
        let problem =
            Problem { model: &model, topology: &topology, n_shards: 2, n_replicas: 1, microbatch, schedule, aim };
        let e = solve(&problem, None).unwrap_err().to_string();
        assert!(e.starts_with(says), "{e}");
        assert!(pinned(&problem, &["layer1".to_owned()]).is_err());
    };
    check(&|t| t.devices[1].speed = f64::NAN, "device cpu1: speed is NaN, expected a positive number");
    check(&|t| t.devices[0].speed = 0.0, "device cpu0: speed is 0");
    check(&|t| t.devices[0].flops.0 = -1.0, "device cpu0: flops is -1");
    check(&|t| t.devices[0].bandwidth.0 = f64::INFINITY, "device cpu0: bandwidth is inf");
    check(&|t| t.devices[0].overhead.0 = -1.0, "device cpu0: overhead is -1, expected a number, at least 0");
    let slow = Measured { product: f64::NAN, ..Measured::NOMINAL };
    check(&|t| t.devices[0].measured = Some(slow), "device cpu0: measured.product is NaN");
    // One node cannot be reached from the other.
    check(&|t| t.remote.bandwidth.0 = 0.0, "links between nodes: bandwidth is 0, expected a positive number");
    check(&|t| t.remote.latency.0 = f64::INFINITY, "links between nodes: latency is inf");
}

/// What is left above the bound is mostly that a pipeline fills and drains.
#[test]
fn the_planner_chooses_a_schedule_that_fills_sooner() {
    let model = bundle("char_gpt.bundle");
    let topology = parse_devices("4xcpu").unwrap();
    let plan = |schedule| {
        let microbatch = Some(4);
        let aim = Aim::default();
        let problem =
            Problem { model: &model, topology: &topology, n_shards: 4, n_replicas: 1, microbatch, schedule, aim };
        let plan = solve(&problem, None).unwrap();
        verify(&model, &topology, &plan).unwrap();
        // In force, it stays, and so does its schedule where none is asked for.
        let again = solve(&Problem { schedule: None, ..problem }, Some(&plan)).unwrap();
        assert_eq!(again.schedule, plan.schedule);
        assert!(again.step_time <= plan.step_time);
        plan
    };
    let plain = plan(Some(ScheduleKind::OneFOneB)).step_time.0;
    let zero_bubble = plan(Some(ScheduleKind::ZeroBubble)).step_time.0;
    let interleaved = plan(Some(ScheduleKind::Interleaved));
    assert!(zero_bubble < plain, "{zero_bubble} and {plain}");
    let chosen = plan(None);
    assert!(chosen.step_time.0 <= 1.01 * zero_bubble.min(interleaved.step_time.0).min(plain), "{}", chosen.step_time);
}

/// A plan was valued by the cut of another schedule, with the same places: as the one in force had been cut, or as was asked
/// for now.
#[test]
fn a_plan_is_valued_by_its_own_schedule() {
    let model = bundle("char_gpt.bundle");
    let topology = parse_devices("2xcpu").unwrap();
    let (microbatch, schedule, aim) = (Some(4), Some(ScheduleKind::ZeroBubble), Aim::default());
    let problem = Problem { model: &model, topology: &topology, n_shards: 2, n_replicas: 1, microbatch, schedule, aim };
    let zero_bubble = solve(&problem, None).unwrap();
    let plain = Plan { schedule: ScheduleKind::OneFOneB, ..zero_bubble.clone() };
    let prepared = Prepared::new(&model);
    prepared.hold(&model, &topology, &zero_bubble);
    for schedule in [Some(ScheduleKind::ZeroBubble), Some(ScheduleKind::OneFOneB), None] {
        let problem = Problem { schedule, ..problem };
        let [known, other] = [&zero_bubble, &plain].map(|plan| prepared.repriced(&problem, plan).unwrap());
        assert_eq!(known.step_time, zero_bubble.step_time, "{schedule:?}");
        assert_eq!((known.schedule, other.schedule), (ScheduleKind::ZeroBubble, ScheduleKind::OneFOneB));
        assert!(other.step_time > known.step_time, "{schedule:?}: {} and {}", other.step_time, known.step_time);
        assert_eq!(Some(other), repriced(&problem, &plain), "{schedule:?}");
    }
}

#[test]
fn takes_as_many_devices_as_gain_something_and_the_best_of_them() {
    let model = bundle("char_gpt.bundle");
    let prepared = Prepared::new(&model);
    let topology = parse_devices("2xcpu:speed=0.1,cpu,cpu:speed=0.05,cpu:price=3").unwrap();
    let (microbatch, schedule) = (Some(4), Some(ScheduleKind::OneFOneB));
    let aim = Aim::default();
    let problem = Problem { model: &model, topology: &topology, n_shards: 1, n_replicas: 1, microbatch, schedule, aim };
    let choose = |range, wanted| count::choose(&prepared, &problem, range, wanted);
    let devices = |plan: &Plan| {
        let mut all: Vec<u32> = plan.shards.iter().flat_map(|s| &s.devices).map(|d| d.0).collect();
        all.sort_unstable();
        all
    };
    let two = choose(2..=2, Wanted::Best).unwrap();
    assert_eq!((devices(&two.found), two.why()), (vec![2, 4], None));
    verify(&model, &topology, &two.found).unwrap();
    // Slow ones gain little beside what they cost in messages and in filling the pipeline.
    let fastest = choose(1..=5, Wanted::Best).unwrap();
    assert_eq!(fastest.offers.len(), 5);
    let least = fastest.offers.iter().map(|o| o.step.0).fold(f64::INFINITY, f64::min);
    assert!(fastest.chosen.step.0 <= least / 0.99 && fastest.chosen.n_shards >= 2, "{fastest:?}");
    assert!(fastest.why().unwrap().contains(" with 1"), "{:?}", fastest.why());
    // One device at the usual price is cheapest, where it is fast enough; the other fast one costs three times as much.
    let cheapest = choose(1..=5, Wanted::Cheapest { floor: 0.0 }).unwrap();
    assert_eq!(devices(&cheapest.found), [2]);
    assert!((cheapest.chosen.price - cheapest.chosen.step.0).abs() < 1e-12);
    let floor = 1.2 / cheapest.chosen.step.0;
    let enough = choose(1..=5, Wanted::Cheapest { floor }).unwrap();
    assert!(enough.chosen.step.0 * floor <= 1.0 && enough.chosen.price > cheapest.chosen.price, "{enough:?}");
    let refused = choose(1..=5, Wanted::Cheapest { floor: 1e6 }).unwrap_err();
    assert!(matches!(refused, Infeasible::Floor { .. }), "{refused}");
}

#[test]
fn numbers_beyond_all_devices_are_a_reason_not_an_overflow() {
    let (forward, backward, gradients) = (Vec::new(), Vec::new(), Vec::new());
    let model = model(&Recipe { params: vec![1], forward, backward, gradients });
    let topology = Topology { devices: vec![nominal("cpu").unwrap()], local: LOOPBACK, remote: LOOPBACK };
    let many = u32::MAX;
    let (microbatch, schedule) = (None, Some(ScheduleKind::OneFOneB));
    let problem = Problem {
        model: &model,
        topology: &topology,
        n_shards: many,
        n_replicas: many,
        microbatch,
        schedule,
        aim: Aim::default(),
    };
    let e = solve(&problem, None).unwrap_err().to_string();
    assert!(e.contains("need 18446744065119617025 devices, there are 1"), "{e}");
}
