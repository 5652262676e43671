//! Answers that are known, of the sample models.

use foreshard::graph::{Model, OpId};
use foreshard::plan::block::Blocks;
use foreshard::plan::coordinate::coordinates;
use foreshard::plan::count::{self, Wanted};
use foreshard::plan::explain::explain;
use foreshard::plan::predict::Costs;
use foreshard::plan::segment::{Parameters, Segmentation, follow_parameters};
use foreshard::plan::verify::{Fault, verify};
use foreshard::plan::{
    Aim, Fixed, Granularity, Infeasible, Objective, Pin, Place, Plan, Prepared, Problem, Recompute, ScheduleKind,
    ShardId, To, pinned, repriced, solve,
};
use foreshard::topology::{
    Device, DeviceId, LOOPBACK, Link, Measured, NETWORK, Slowed, Topology, nominal, parse_devices,
};
use foreshard::units::{Bytes, BytesPerSec, Seconds};

use crate::random::{Recipe, model};
use crate::support::load;

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
    let model = load("bundles/char_gpt.bundle");
    let device = |i: usize| Device { speed: 1.0 - 0.1 * i as f64, ..nominal("cpu").unwrap() };
    let topology = Topology::new((0..n).map(device).collect(), LOOPBACK, LOOPBACK);
    let problem = Problem { schedule, aim, ..Problem::new(&model, &topology, n as u32) };
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
    let model = load("bundles/mlp_digits.bundle");
    let topology = Topology::new(vec![nominal("cpu").unwrap(); 2], LOOPBACK, LOOPBACK);
    let problem =
        Problem { microbatch: Some(16), schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, 2) };
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
    let model = load("bundles/char_gpt.bundle");
    let device = Device { memory, ..nominal("cpu").unwrap() };
    let topology = Topology::new(vec![device; 3], LOOPBACK, LOOPBACK);
    let problem = Problem { microbatch: Some(2), schedule: Some(schedule), aim, ..Problem::new(&model, &topology, 3) };
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
    let problem = Problem { schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, 3) };
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
    let model = load("bundles/mlp_digits.bundle");
    let plan = |nodes: [&str; 4]| {
        let devices = nodes.map(|node| Device { node: node.to_owned(), ..nominal("cpu").unwrap() }).to_vec();
        let remote = Link { bandwidth: BytesPerSec(2e7), latency: Seconds(5e-4) };
        let topology = Topology::new(devices, LOOPBACK, remote);
        let problem = Problem { schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, 4) };
        solve(&problem, None).unwrap().step_time
    };
    assert_eq!(plan(["a", "b", "a", "b"]), plan(["a", "a", "b", "b"]));
}

/// One link of three has become slow. A plan for what links have at a mean keeps it in the middle of the pipeline.
#[test]
fn a_link_that_is_slowed_alone_is_planned_around() {
    let model = load("bundles/char_gpt.bundle");
    let topology = |slowed: &[(u32, u32, f64)]| {
        let all = Topology::new(vec![nominal("cpu").unwrap(); 3], LOOPBACK, LOOPBACK);
        let slowed = slowed.iter().map(|&(a, b, share)| Slowed { between: [DeviceId(a), DeviceId(b)], share });
        Topology { slowed: slowed.collect(), ..all }
    };
    let alone = topology(&[(0, 1, 0.02)]);
    let evenly = topology(&[(0, 1, 0.67), (0, 2, 0.67), (1, 2, 0.67)]);
    let problem = |topology| Problem {
        microbatch: Some(4),
        schedule: Some(ScheduleKind::OneFOneB),
        ..Problem::new(&model, topology, 3)
    };
    let (aware, unaware) = (solve(&problem(&alone), None).unwrap(), solve(&problem(&evenly), None).unwrap());
    verify(&model, &alone, &aware).unwrap();
    let found = repriced(&problem(&alone), &unaware).unwrap();
    assert!(aware.step_time.0 < 0.95 * found.step_time.0, "{} and {}", aware.step_time, found.step_time);
    // The plan in force keeps its devices in their order, and sends less over that link.
    let again = solve(&problem(&alone), Some(&unaware)).unwrap();
    assert!(again.step_time < found.step_time, "{} and {}", again.step_time, found.step_time);
}

/// The factor by which gradients are clipped went from shard to shard in the shape of every gradient, and the updates of
/// all params with it to the shard that had made it.
/// A planner that takes every message for alone cuts where more crosses than the NICs carry.
#[test]
fn messages_that_share_a_nic_count_together() {
    let model = load("bundles/char_gpt.bundle");
    let topology = |link: f64, nic: f64| {
        let device =
            |node: &str| Device { node: node.to_owned(), nic: Some(BytesPerSec(nic)), ..nominal("cpu").unwrap() };
        let remote = Link { bandwidth: BytesPerSec(link), ..NETWORK };
        Topology::new(["a", "a", "b", "b"].map(device).to_vec(), LOOPBACK, remote)
    };
    for link in [2e7, 5e7] {
        let (shared, alone) = (topology(link, link), topology(link, 1e15));
        let problem = |topology| Problem {
            microbatch: Some(2),
            schedule: Some(ScheduleKind::Interleaved),
            ..Problem::new(&model, topology, 4)
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
    let model = load("bundles/char_gpt.bundle");
    let topology = Topology::new(vec![nominal("cpu").unwrap(); 2], LOOPBACK, LOOPBACK);
    let problem =
        Problem { microbatch: Some(4), schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, 2) };
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
    let model = load("bundles/mlp_digits.bundle");
    let good = parse_devices("cpu,cpu:node=b").unwrap();
    let check = |change: &dyn Fn(&mut Topology), says: &str| {
        let mut topology = good.clone();
        change(&mut topology);
        let problem = Problem { schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, 2) };
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
    for (share, says) in [(0.0, "0"), (f64::NAN, "NaN"), (1.5, "1.5, expected a positive number, at most 1")] {
        let slowed = Slowed { between: [DeviceId(1), DeviceId(0)], share };
        check(&|t| t.slowed = vec![slowed], &format!("links between devices cpu1 and cpu0: share is {says}"));
    }
}

/// What is left above the bound is mostly that a pipeline fills and drains.
#[test]
fn the_planner_chooses_a_schedule_that_fills_sooner() {
    let model = load("bundles/char_gpt.bundle");
    let topology = parse_devices("4xcpu").unwrap();
    let plan = |schedule| {
        let problem = Problem { microbatch: Some(4), schedule, ..Problem::new(&model, &topology, 4) };
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
    let model = load("bundles/char_gpt.bundle");
    let topology = parse_devices("2xcpu").unwrap();
    let schedule = Some(ScheduleKind::ZeroBubble);
    let problem = Problem { microbatch: Some(4), schedule, ..Problem::new(&model, &topology, 2) };
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
    let model = load("bundles/char_gpt.bundle");
    let prepared = Prepared::new(&model);
    let topology = parse_devices("2xcpu:speed=0.1,cpu,cpu:speed=0.05,cpu:price=3").unwrap();
    let problem =
        Problem { microbatch: Some(4), schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, 1) };
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
    let topology = Topology::new(vec![nominal("cpu").unwrap()], LOOPBACK, LOOPBACK);
    let many = u32::MAX;
    let problem =
        Problem { n_replicas: many, schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, many) };
    let e = solve(&problem, None).unwrap_err().to_string();
    assert!(e.contains("need 18446744065119617025 devices, there are 1"), "{e}");
}

/// What is fixed, planned for on equal CPUs.
fn fixed(n_shards: u32, pins: &[&str], together: &[&[&str]], previous: Option<&Plan>) -> Result<Plan, Infeasible> {
    let model = load("bundles/char_gpt.bundle");
    let topology = parse_devices(&format!("{n_shards}xcpu")).unwrap();
    let set = |set: &&[&str]| set.iter().map(|ops| (*ops).to_owned()).collect();
    let pins: Vec<Pin> = pins.iter().map(|pin| pin.parse().unwrap()).collect();
    let fixed = Fixed { pins, together: together.iter().map(set).collect() };
    let problem = Problem {
        microbatch: Some(4),
        schedule: Some(ScheduleKind::OneFOneB),
        fixed: &fixed,
        ..Problem::new(&model, &topology, n_shards)
    };
    let plan = solve(&problem, previous)?;
    verify(&model, &topology, &plan).unwrap();
    assert_eq!(plan.fixed, fixed);
    let again = solve(&problem, Some(&plan)).unwrap();
    verify(&model, &topology, &again).unwrap();
    assert!(again.step_time <= plan.step_time);
    Ok(plan)
}

/// The shard that owns a param.
fn owner(model: &Model, plan: &Plan, param: &str) -> u32 {
    let at = model.state.iter().position(|p| p.name == param).unwrap();
    let Place::Shard(shard) = plan.owners[at] else { panic!("{param} is everywhere") };
    shard.0
}

#[test]
fn ops_run_where_they_are_pinned() {
    let model = load("bundles/char_gpt.bundle");
    let free = fixed(2, &[], &[], None).unwrap();
    let up = "blocks.1.mlp.up";
    assert_eq!(owner(&model, &free, up), 0);
    // By the scope of its ops, by its name, by a pattern; a plan in force that has it elsewhere does not stay.
    for pin in ["block1:1", "blocks.1.mlp.up:1", "blocks.1.*:1", "block1:cpu1"] {
        let plan = fixed(2, &[pin], &[], Some(&free)).unwrap();
        let devices = &plan.shards[owner(&model, &plan, up) as usize].devices;
        assert_eq!(devices, &[DeviceId(1)], "{pin}");
        let topology = parse_devices("2xcpu").unwrap();
        // The verifier looks for itself.
        let mut other = plan.clone();
        let elsewhere = 1 - owner(&model, &plan, up);
        other.fixed.pins[0].to = To::Shard(elsewhere);
        let fault = verify(&model, &topology, &other).unwrap_err().to_string();
        assert!(fault.starts_with("pin of") && fault.contains(&format!("to shard {elsewhere}")), "{fault}");
    }
    // The first device comes last, though the devices are alike.
    let plan = fixed(2, &["block3:cpu0"], &[], None).unwrap();
    assert_eq!(plan.shards[owner(&model, &plan, "blocks.3.mlp.up") as usize].devices, [DeviceId(0)]);
    let plan = fixed(2, &["block3:cpu0", "block0:cpu1"], &[], None).unwrap();
    assert_eq!((plan.shards[0].devices[0], plan.shards[1].devices[0]), (DeviceId(1), DeviceId(0)));
}

#[test]
fn ops_stay_together_where_a_cut_would_be() {
    let model = load("bundles/char_gpt.bundle");
    let free = fixed(2, &[], &[], None).unwrap();
    let cut = (0..3).find(|i| {
        let owners = [format!("blocks.{i}.attn.wq"), format!("blocks.{}.mlp.down", i + 1)];
        owner(&model, &free, &owners[0]) != owner(&model, &free, &owners[1])
    });
    let (a, b) = (format!("block{}", cut.unwrap()), format!("block{}", cut.unwrap() + 1));
    let plan = fixed(2, &[], &[&[&a, &b]], Some(&free)).unwrap();
    for i in [cut.unwrap(), cut.unwrap() + 1] {
        let all =
            ["attn.wq", "attn.wo", "mlp.up", "mlp.down"].map(|p| owner(&model, &plan, &format!("blocks.{i}.{p}")));
        assert_eq!(all, [all[0]; 4]);
        assert_eq!(all[0], owner(&model, &plan, &format!("blocks.{}.mlp.up", cut.unwrap())));
    }
    assert!(plan.step_time > free.step_time, "{} and {}", plan.step_time, free.step_time);
}

#[test]
fn a_pin_that_cannot_be_is_named() {
    let says = |n_shards, pins: &[&str], together: &[&[&str]], expected: &[&str]| {
        let refusal = fixed(n_shards, pins, together, None).unwrap_err();
        assert!(matches!(refusal, Infeasible::Fixed { .. }), "{refusal:?}");
        let text = refusal.to_string();
        assert!(expected.iter().all(|part| text.contains(part)), "{text}");
    };
    says(2, &["block0:1", "block3:0"], &[], &["pin of \"block3\" to shard 0 cannot be", "follow each other"]);
    says(2, &["block0:cpu0", "block1:cpu1", "block3:cpu0"], &[], &["pin of \"block3\" to device cpu0"]);
    says(2, &["block0:7"], &[], &["pin of \"block0\" to shard 7", "2 shards, 0 to 1"]);
    says(2, &["block0:cpu9"], &[], &["to device cpu9", "none of the 2 devices"]);
    says(2, &["blocc3:1"], &[], &["no op or param \"blocc3\"; did you mean \"block3\"?"]);
    says(2, &[], &[&["*"]], &["[\"*\"] on one shard cannot be", "fewer parts of the model, 1, than shards, 2"]);
    assert!("block3".parse::<Pin>().unwrap_err().contains("OPS:SHARD"));
}
