//! All solvers against every assignment of small random graphs.

use std::collections::BTreeMap;

use super::clusters::Clusters;
use super::*;
use crate::plan::random::Random;

/// What a random graph may have.
#[derive(Clone, Copy, Debug)]
struct Kind {
    n_ops: usize,
    devices: Devices,
    training: bool,
    colours: bool,
    unsupported: bool,
}

/// Times in quarters, so that sums are exact in whatever order.
fn quarters(random: &mut Random, most: usize) -> f64 {
    random.below(4 * most) as f64 / 4.0
}

fn graph(kind: Kind, random: &mut Random) -> Problem {
    let n = 1 + random.below(kind.n_ops);
    let n_forward = if kind.training { n.div_ceil(2) } else { n };
    let mut ops: Vec<Op> = (0..n)
        .map(|i| Op {
            accelerator: (!kind.unsupported || random.below(8) > 0).then(|| quarters(random, 5)),
            host: quarters(random, 20),
            transfer: quarters(random, 3),
            bytes: random.below(6) as f64,
            colour: (kind.colours && random.below(3) == 0).then(|| random.below(3) as i64),
            backward: i >= n_forward,
        })
        .collect();
    // Backward ops mirror forward ops, or are alone.
    for i in n_forward..n {
        let mate = n - 1 - i;
        if random.below(4) > 0 {
            let colour = *ops[mate].colour.get_or_insert(10 + mate as i64);
            ops[i].colour = Some(colour);
        }
    }
    let mut edges = Vec::new();
    for b in 1..n {
        for _ in 0..random.below(3) {
            edges.push((random.below(b), b));
        }
    }
    Problem::new(ops, edges, kind.devices).unwrap()
}

fn devices_of(devices: Devices) -> Vec<Device> {
    (0..devices.n_accelerators).map(Device::Accelerator).chain((0..devices.n_hosts).map(Device::Host)).collect()
}

/// Load of the busiest device by the definition; `None` when a rule is broken.
fn load(problem: &Problem, device: &[Device]) -> Option<f64> {
    let mut loads: BTreeMap<Device, f64> = BTreeMap::new();
    let mut bytes: BTreeMap<Device, f64> = BTreeMap::new();
    for (op, &d) in problem.ops().iter().zip(device) {
        *loads.entry(d).or_default() += if matches!(d, Device::Host(_)) { op.host } else { op.accelerator? };
        *bytes.entry(d).or_default() += op.bytes;
    }
    for (u, op) in problem.ops().iter().enumerate() {
        let readers = || problem.edges().iter().filter(|e| e.0 == u).map(|e| device[e.1]);
        for (d, sum) in &mut loads {
            let pays = if *d == device[u] { readers().any(|r| r != *d) } else { readers().any(|r| r == *d) };
            if pays && matches!(d, Device::Accelerator(_)) {
                *sum += op.transfer;
            }
        }
    }
    let within = |(d, b): (&Device, &f64)| matches!(d, Device::Host(_)) || *b <= problem.devices().memory;
    bytes.iter().all(within).then(|| loads.values().copied().fold(0.0, f64::max))
}

/// Whether the devices can be put in a line.
fn in_line(problem: &Problem, device: &[Device]) -> bool {
    let ops = problem.ops();
    let forward = |op: usize| {
        ops[op].colour.map_or(!ops[op].backward, |c| ops.iter().any(|o| o.colour == Some(c) && !o.backward))
    };
    let mut arcs: Vec<(Device, Device)> = Vec::new();
    for &(a, b) in problem.edges() {
        match (ops[a].backward, ops[b].backward) {
            (false, false) => arcs.push((device[a], device[b])),
            (true, true) if !(forward(a) && forward(b)) => arcs.push((device[b], device[a])),
            _ => {}
        }
    }
    arcs.retain(|(a, b)| a != b);
    let mut left = devices_of(problem.devices());
    while let Some(i) = left.iter().position(|d| !arcs.iter().any(|(_, b)| b == d)) {
        let first = left.remove(i);
        arcs.retain(|(a, _)| *a != first);
    }
    left.is_empty()
}

/// When the last op ends, by the definition; `None` for circles and what does not fit.
fn latency(problem: &Problem, device: &[Device]) -> Option<f64> {
    load(problem, device)?;
    let n = problem.ops().len();
    let mut end = vec![None; n];
    let mut left = n;
    while left > 0 {
        let before = left;
        for v in (0..n).filter(|&v| end[v].is_none()).collect::<Vec<_>>() {
            let block: Vec<usize> = match device[v] {
                Device::Host(_) => vec![v],
                d => (0..n).filter(|&u| device[u] == d).collect(),
            };
            let inputs: Vec<usize> =
                problem.edges().iter().filter(|(a, b)| block.contains(b) && !block.contains(a)).map(|e| e.0).collect();
            if inputs.iter().any(|&u| end[u].is_none()) {
                continue;
            }
            let start = inputs.iter().filter_map(|&u| end[u]).fold(0.0, f64::max);
            let time = match device[v] {
                Device::Host(_) => problem.ops()[v].host,
                d => {
                    let alone: Vec<Device> = device.iter().map(|&x| if x == d { x } else { Device::Host(0) }).collect();
                    let on = |op: &Op| op.accelerator.unwrap_or(0.0);
                    let compute: f64 = block.iter().map(|&u| on(&problem.ops()[u])).sum();
                    let crosses =
                        |u: usize| problem.edges().iter().any(|&(a, b)| a == u && (alone[a] == d) != (alone[b] == d));
                    compute + (0..n).filter(|&u| crosses(u)).map(|u| problem.ops()[u].transfer).sum::<f64>()
                }
            };
            block.iter().for_each(|&u| end[u] = Some(start + time));
            left = end.iter().filter(|e| e.is_none()).count();
            break;
        }
        if left == before {
            return None;
        }
    }
    Some(end.into_iter().flatten().fold(0.0, f64::max))
}

/// The least cost over all assignments that keep colours together.
fn least(problem: &Problem, devices: &[Device], cost: &dyn Fn(&[Device]) -> Option<f64>) -> Option<f64> {
    let (clusters, of) = Clusters::of_problem(problem);
    let n = clusters.len() as u32;
    (0..devices.len().pow(n))
        .filter_map(|code| {
            let device: Vec<Device> =
                of.iter().map(|&c| devices[code / devices.len().pow(c as u32) % devices.len()]).collect();
            cost(&device)
        })
        .min_by(f64::total_cmp)
}

/// Says stop after so many questions.
fn after(n: usize) -> impl FnMut() -> bool {
    let mut asked = 0;
    move || {
        asked += 1;
        asked > n
    }
}

fn kinds() -> impl Iterator<Item = Kind> {
    let devices = [(2, 1, 8.0), (3, 0, 1e9), (2, 0, 9.0), (1, 2, 6.0), (2, 1, 1e9)];
    (0..40).map(move |i| {
        let (n_accelerators, n_hosts, memory) = devices[i % devices.len()];
        Kind {
            n_ops: 7,
            devices: Devices { n_accelerators, n_hosts, memory },
            training: i % 2 == 1,
            colours: i % 4 < 2,
            unsupported: n_hosts > 0 && i % 3 == 0,
        }
    })
}

#[test]
fn contiguous_stages_are_the_best_of_all() {
    let mut random = Random::new(1);
    for kind in kinds().flat_map(|k| [k; 8]) {
        let problem = graph(kind, &mut random);
        let best =
            least(&problem, &devices_of(kind.devices), &|d| in_line(&problem, d).then(|| load(&problem, d)).flatten());
        match contiguous::contiguous(&problem, &mut || false) {
            Ok(found) => {
                assert_eq!(load(&problem, &found.device), best, "{problem:?}\n{found:?}");
                assert!(in_line(&problem, &found.device), "{problem:?}\n{found:?}");
                assert!((found.cost - found.bound).abs() < 1e-9 && Some(found.cost) == best);
            }
            Err(e) => assert_eq!(best, None, "{e} {problem:?}"),
        }
    }
}

#[test]
fn free_placements_are_the_best_of_all_and_never_below_the_bound() {
    let mut random = Random::new(2);
    for kind in kinds().flat_map(|k| [k; 3]) {
        let problem = graph(kind, &mut random);
        let best = least(&problem, &devices_of(kind.devices), &|d| load(&problem, d));
        match free::free(&problem, &[], &mut after(400)) {
            Ok(found) => {
                let best = best.expect("feasible");
                assert_eq!(load(&problem, &found.device), Some(best), "{problem:?}\n{found:?}");
                assert!(found.bound <= best * (1.0 + 1e-9), "{problem:?}\n{found:?}");
            }
            Err(e) => assert_eq!(best, None, "{e} {problem:?}"),
        }
    }
}

#[test]
fn bounds_on_the_load_are_below_the_best_of_all() {
    let mut random = Random::new(3);
    let mut tight = 0;
    for kind in kinds().flat_map(|k| [k; 8]) {
        let problem = graph(kind, &mut random);
        let (clusters, _) = Clusters::of_problem(&problem);
        let Some(best) = least(&problem, &devices_of(kind.devices), &|d| load(&problem, d)) else { continue };
        for incumbent in [best, 1.1 * best, 3.0 * best] {
            let mut bound = bound::Bound::new(&clusters, kind.devices);
            bound.raise(incumbent, &[], u64::MAX, &mut || false);
            assert!(bound.value <= best * (1.0 + 1e-9), "{} {best} {problem:?}", bound.value);
            tight += usize::from(bound.value >= best);
        }
    }
    assert!(tight > 100, "of 960 bounds, {tight} are the optimum");
}

#[test]
fn three_heavy_ops_meet_on_one_of_two_accelerators() {
    let op = Op { accelerator: Some(2.0), host: 100.0, transfer: 1.0, bytes: 0.0, colour: None, backward: false };
    let devices = Devices { n_accelerators: 2, n_hosts: 1, memory: 1.0 };
    let problem = Problem::new(vec![op; 3], vec![(0, 1), (1, 2)], devices).unwrap();
    let (clusters, _) = Clusters::of_problem(&problem);
    let mut bound = bound::Bound::new(&clusters, devices);
    assert!(bound.value < 4.1, "whichever two share, they compute for 4");
    bound.raise(5.0, &[], u64::MAX, &mut || false);
    assert_eq!(bound.value, 5.0, "and carry the tensor to or from the third");
}

#[test]
fn blocks_are_the_best_of_all_and_never_below_the_bound() {
    let mut random = Random::new(4);
    let (mut tight, mut n) = (0, 0);
    for kind in kinds().filter(|k| !k.training).flat_map(|k| [k; 4]) {
        let kind = Kind { devices: Devices { n_hosts: 1, ..kind.devices }, ..kind };
        let problem = graph(kind, &mut random);
        let best = least(&problem, &devices_of(kind.devices), &|d| latency(&problem, d)).expect("hosts take all");
        let found = blocks::latency(&problem, &mut after(300)).expect("hosts take all");
        // A colour that is on hosts may have others between its ops; the search keeps these together.
        let split = latency(&problem, &found.device).expect("fits");
        assert!((split - found.cost).abs() < 1e-9, "{problem:?}\n{found:?}");
        assert!(found.bound <= best * (1.0 + 1e-9), "{best} {problem:?}\n{found:?}");
        if !kind.colours {
            assert!((found.cost - best).abs() < 1e-9, "{best} {problem:?}\n{found:?}");
        }
        tight += usize::from(found.bound >= best * (1.0 - 1e-9));
        n += 1;
    }
    assert!(2 * tight > n, "{tight} of {n} bounds are the optimum");
}

#[test]
fn a_seed_is_never_made_worse() {
    let mut random = Random::new(5);
    let devices = Devices { n_accelerators: 3, n_hosts: 1, memory: 60.0 };
    let kind = Kind { n_ops: 60, devices, training: true, colours: true, unsupported: false };
    for _ in 0..5 {
        let problem = graph(kind, &mut random);
        let Ok(stages) = contiguous::contiguous(&problem, &mut after(2)) else { continue };
        let found = free::free(&problem, &[&stages.device], &mut || true).expect("the seed fits");
        assert!(found.cost <= stages.cost + 1e-9);
        assert!((load(&problem, &found.device).expect("fits") - found.cost).abs() < 1e-9);
    }
}

#[test]
fn the_same_problem_has_the_same_placement() {
    let mut random = Random::new(6);
    let devices = Devices { n_accelerators: 4, n_hosts: 1, memory: 200.0 };
    let problem = graph(Kind { n_ops: 80, devices, training: false, colours: false, unsupported: true }, &mut random);
    let solve = || {
        (
            contiguous::contiguous(&problem, &mut after(20)),
            free::free(&problem, &[], &mut after(500)),
            blocks::latency(&problem, &mut after(100)),
        )
    };
    assert_eq!(solve(), solve());
}

#[test]
fn nothing_costs_nothing() {
    let devices = Devices { n_accelerators: 0, n_hosts: 0, memory: 0.0 };
    let problem = Problem::new(Vec::new(), Vec::new(), devices).unwrap();
    let nothing = Placement { device: Vec::new(), cost: 0.0, bound: 0.0 };
    assert_eq!(contiguous::contiguous(&problem, &mut || false), Ok(nothing.clone()));
    assert_eq!(free::free(&problem, &[], &mut || false), Ok(nothing.clone()));
    assert_eq!(blocks::latency(&problem, &mut || false), Ok(nothing));
}

#[test]
fn what_cannot_be_placed_is_refused_with_the_reason() {
    let op = |accelerator, bytes| Op { accelerator, host: 1.0, transfer: 0.0, bytes, colour: None, backward: false };
    let devices = |n_accelerators, n_hosts| Devices { n_accelerators, n_hosts, memory: 4.0 };
    let cases = [
        (vec![op(Some(1.0), 0.0)], devices(0, 0), Infeasible::NoDevice),
        (vec![op(Some(1.0), 0.0), op(None, 0.0)], devices(2, 0), Infeasible::NeedsHost { op: 1 }),
        (vec![op(Some(1.0), 5.0)], devices(2, 0), Infeasible::TooLarge { op: 0, bytes: 5.0, memory: 4.0 }),
        (
            vec![op(Some(1.0), 3.0); 3],
            devices(2, 0),
            Infeasible::TooMuch { bytes: 9.0, n_accelerators: 2, memory: 4.0 },
        ),
    ];
    for (ops, devices, expected) in cases {
        let problem = Problem::new(ops, Vec::new(), devices).unwrap();
        assert_eq!(contiguous::contiguous(&problem, &mut || false), Err(expected.clone()));
        assert_eq!(free::free(&problem, &[], &mut || false), Err(expected));
    }
    // Each of these fills more than half of a device.
    let problem = Problem::new(vec![op(Some(1.0), 2.5); 3], Vec::new(), devices(2, 0)).unwrap();
    let (n_accelerators, memory) = (2, 4.0);
    let exact = contiguous::contiguous(&problem, &mut || false);
    assert_eq!(exact, Err(Infeasible::NoStages { n_accelerators, memory }));
    let stopped = contiguous::contiguous(&problem, &mut || true);
    assert!(matches!(stopped, Err(Infeasible::NoStages { .. } | Infeasible::NotFound { .. })));
    assert_eq!(free::free(&problem, &[], &mut after(50)), Err(Infeasible::NotFound { n_accelerators, memory }));
}

#[test]
fn a_colour_too_large_for_a_device_is_refused_by_the_size_of_all_of_it() {
    let op = Op { accelerator: Some(1.0), host: 1.0, transfer: 0.0, bytes: 3.0, colour: Some(5), backward: false };
    let devices = Devices { n_accelerators: 4, n_hosts: 0, memory: 4.0 };
    let problem = Problem::new(vec![op; 2], Vec::new(), devices).unwrap();
    let expected = Infeasible::TooLarge { op: 0, bytes: 6.0, memory: 4.0 };
    assert_eq!(contiguous::contiguous(&problem, &mut || false), Err(expected));
}

#[test]
fn more_devices_than_ops_are_no_trouble() {
    let op = Op { accelerator: Some(2.0), host: 9.0, transfer: 0.5, bytes: 1.0, colour: None, backward: false };
    let devices = Devices { n_accelerators: 1_000_000_000, n_hosts: 1_000_000_000, memory: f64::INFINITY };
    let problem = Problem::new(vec![op; 3], vec![(0, 1)], devices).unwrap();
    assert_eq!(contiguous::contiguous(&problem, &mut || false).unwrap().cost, 2.5);
    assert_eq!(free::free(&problem, &[], &mut after(50)).unwrap().cost, 2.5);
    assert_eq!(blocks::latency(&problem, &mut after(50)).unwrap().cost, 4.0);
}

#[test]
fn malformed_problems_name_what_is_wrong() {
    let good = Op { accelerator: Some(1.0), host: 1.0, transfer: 1.0, bytes: 1.0, colour: None, backward: false };
    let devices = Devices { n_accelerators: 1, n_hosts: 1, memory: 1.0 };
    let bad = |op: Op| Problem::new(vec![good.clone(), op], Vec::new(), devices).unwrap_err();
    for value in [-1.0, f64::INFINITY, f64::MAX] {
        for (op, field) in [
            (Op { accelerator: Some(value), ..good.clone() }, "the time on an accelerator"),
            (Op { host: value, ..good.clone() }, "the time on a host"),
            (Op { transfer: value, ..good.clone() }, "the time to transfer the result"),
            (Op { bytes: value, ..good.clone() }, "the size"),
        ] {
            assert_eq!(bad(op), Malformed::Number { op: 1, field, value });
        }
    }
    assert!(matches!(bad(Op { host: f64::NAN, ..good.clone() }), Malformed::Number { op: 1, .. }));
    let edges = |edges: &[(usize, usize)]| Problem::new(vec![good.clone(); 4], edges.to_vec(), devices).map(|_| ());
    assert_eq!(edges(&[(0, 4)]), Err(Malformed::UnknownOp { edge: 0, from: 0, to: 4, n_ops: 4 }));
    assert_eq!(edges(&[(0, 1), (3, 3)]), Err(Malformed::Cycle { op: 3 }));
    assert!(matches!(edges(&[(0, 1), (1, 2), (2, 1), (2, 3)]), Err(Malformed::Cycle { op: 1 | 2 })));
    let memory = Devices { memory: f64::NAN, ..devices };
    assert!(matches!(Problem::new(vec![good], Vec::new(), memory), Err(Malformed::Memory { .. })));
}
