//! What holds for random models on random devices.

use std::collections::BTreeSet;

use foreshard::graph::{Graph, OpId};
use foreshard::plan::explain::{Resource, explain};
use foreshard::plan::predict::{Costs, predict};
use foreshard::plan::schedule::TaskGraph;
use foreshard::plan::segment::Segmentation;
use foreshard::plan::verify::verify;
use foreshard::plan::{
    Aim, BatchEstimate, Fixed, Infeasible, Objective, Pin, Place, Plan, Prepared, Priced, Problem, Recompute,
    ScheduleKind, ShardId, To, graph_picture, repriced, solve,
};
use foreshard::profile::{Calibration, TensorView, profile};
use foreshard::topology::{Device, DeviceId, Measured, Slowed, Topology};
use foreshard::units::{Bytes, BytesPerSec, Seconds};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::random::{MICROBATCHES, devices, in_lanes, model, recipe, schedules};

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

/// No number of messages fills it.
const WIDE: BytesPerSec = BytesPerSec(1e15);

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
    // Links may change without everything being priced anew; memory is that of the orders on the links before.
    let mut even = problem.topology.clone();
    even.slowed.clear();
    let elsewhere = Priced::new(problem.model, &even, plan).unwrap().on_links(problem.model, problem.topology, plan);
    for (name, estimate) in plan.grads.keys().zip(&estimates) {
        let found = elsewhere.estimate(name, &nothing_measured, &|_| 1.0, None).unwrap();
        prop_assert_eq!((found.step, found.messages), (estimate.step, estimate.messages));
    }
    let step = estimates.iter().map(|e| e.step.0).fold(0.0, f64::max);
    // Planned is a step alone; among others it begins while others end.
    let busiest = plan.shards.iter().map(|s| s.busy.0).fold(0.0, f64::max);
    // Where NICs are shared, a message may have half the rate that it has in a step alone: two steps are under way at once.
    let nodes: BTreeSet<&str> = problem.topology.devices.iter().map(|d| d.node.as_str()).collect();
    let shares = nodes.len() > 1 && problem.topology.devices.iter().any(|d| d.nic != Some(WIDE));
    let longest = plan.step_time.0 * if shares { 2.0 } else { 1.0 };
    prop_assert!(step <= longest * (1.0 + 1e-9), "{step} {}", plan.step_time.0);
    if shares {
        let mut wide = problem.topology.clone();
        wide.devices.iter_mut().for_each(|d| d.nic = Some(WIDE));
        let problem = Problem { topology: &wide, ..*problem };
        batches_take_what_was_planned(&problem, &repriced(&problem, plan).unwrap())?;
    }
    prop_assert!(step >= busiest * (1.0 - 1e-9), "{step} {busiest}");
    for estimate in &estimates {
        prop_assert_eq!(estimate.step, estimate.explained);
        prop_assert!(estimate.messages >= 0.0 && (plan.shards.len() > 1 || estimate.messages == 0.0));
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
    slower.slowed.push(Slowed { between: [DeviceId(0), DeviceId(1)], share: 0.3 });
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
        let problem = Problem { n_replicas, microbatch, schedule, aim, ..Problem::new(&model, &topology, n_shards) };
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
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Shards share stages in all ways that the search comes to.
    #[test]
    fn lanes_of_any_model_get_a_sound_plan(
        recipe in recipe(),
        lanes in prop::collection::vec(any::<Index>(), 7..31),
        of in 2u32..6,
        topology in devices(),
        n_shards in 2u32..6,
        schedule in schedules(),
        roomy: bool,
    ) {
        let model = in_lanes(model(&recipe), &lanes, of);
        let objective = if roomy { Objective::Memory } else { Objective::Throughput };
        let aim = Aim { objective, ..Aim::default() };
        let problem = Problem { schedule, aim, ..Problem::new(&model, &topology, n_shards) };
        if let Ok(plan) = solve(&problem, None) {
            sound(&problem, &plan)?;
            verified(&problem, &plan)?;
            let again = solve(&problem, Some(&plan)).unwrap();
            prop_assert!(again == plan || problem.cost(&again) < problem.cost(&plan), "{:?} was left for {:?}", plan, again);
            knowing_the_model_changes_nothing(&problem, &plan)?;
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
        let problem = Problem { microbatch: Some(microbatch), schedule, ..Problem::new(&model, &topology, 2) };
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
        let problem = Problem { schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, n_shards) };
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// What is pinned to where it would be anyway can be there, and whatever else is fixed is so or is named.
    #[test]
    fn what_is_fixed_is_so_or_is_named(
        recipe in recipe(),
        topology in devices(),
        n_shards in 1u32..4,
        anywhere in (prop::sample::select(&["tanh", "dot", "add", "s0", "s1", "s*"][..]), 0u32..3),
        together in prop::sample::subsequence(&["tanh", "dot", "add", "s0", "s1"][..], 0..3),
    ) {
        let model = model(&recipe);
        let mut topology = topology;
        topology.devices.iter_mut().for_each(|d| d.memory = Bytes(1 << 40));
        let schedule = Some(ScheduleKind::OneFOneB);
        let free = Problem { microbatch: Some(2), schedule, ..Problem::new(&model, &topology, n_shards) };
        let Ok(plan) = solve(&free, None) else { return Ok(()) };
        let owners = plan.owners[..model.n_params].iter().zip(&model.state).filter_map(|(owner, param)| match owner {
            Place::Shard(shard) => Some(Pin { ops: param.name.clone(), to: To::Shard(shard.0) }),
            Place::Everywhere => None,
        });
        let as_it_is = Fixed { pins: owners.collect(), together: Vec::new() };
        let problem = Problem { fixed: &as_it_is, ..free };
        match solve(&problem, None) {
            Ok(plan) => verified(&problem, &plan)?,
            Err(e) => prop_assert!(!matches!(e, Infeasible::Fixed { .. }), "{e}"),
        }
        let kept = solve(&problem, Some(&plan)).unwrap();
        prop_assert!(kept.step_time <= plan.step_time, "{} and {}", kept.step_time, plan.step_time);
        let pins = vec![Pin { ops: anywhere.0.to_owned(), to: To::Shard(anywhere.1) }];
        let together = vec![together.into_iter().map(str::to_owned).collect()];
        let fixed = Fixed { pins, together };
        let problem = Problem { fixed: &fixed, ..free };
        match solve(&problem, None) {
            Ok(plan) => {
                sound(&problem, &plan)?;
                verified(&problem, &plan)?;
            }
            Err(e) => prop_assert!(matches!(e, Infeasible::Fixed { .. } | Infeasible::TooFewOps { .. }), "{e}"),
        }
    }
}
