use proptest::prelude::*;

use super::super::choice::{Cost, best, bounds};
use super::super::sharded::{Pipeline, Problem, Refusal, Stage, Way, solve};

/// Every way to choose one of each.
fn all_choices(sizes: &[usize]) -> Vec<Vec<usize>> {
    let extend = |all: Vec<Vec<usize>>, &n: &usize| {
        all.into_iter().flat_map(|c| (0..n).map(move |i| [&c[..], &[i]].concat())).collect()
    };
    sizes.iter().fold(vec![Vec::new()], extend)
}

fn items() -> impl Strategy<Value = Vec<Vec<Cost>>> {
    let cost = (0u32..20, 0u32..20).prop_map(|(t, m)| Cost { time: f64::from(t), memory: f64::from(m) });
    prop::collection::vec(prop::collection::vec(cost, 1..4), 1..7)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn choices_equal_brute_force_and_lie_between_the_bounds(items in items(), capacity in 0u32..80) {
        let capacity = f64::from(capacity);
        let total = |chosen: &[usize], value: &dyn Fn(&Cost) -> f64| -> f64 {
            items.iter().zip(chosen).map(|(item, &c)| value(&item[c])).sum()
        };
        let sizes: Vec<usize> = items.iter().map(Vec::len).collect();
        let fitting = all_choices(&sizes).into_iter().filter(|c| total(c, &|x| x.memory) <= capacity);
        let least = fitting.map(|c| total(&c, &|x| x.time)).fold(f64::INFINITY, f64::min);
        let range = bounds(&items, capacity);
        prop_assert!(range.low <= least + 1e-9 && least <= range.high, "{range:?} {least}");
        match best(&items, capacity, 1000) {
            None => prop_assert_eq!(least, f64::INFINITY),
            Some((chosen, exact)) => {
                prop_assert!(exact && total(&chosen, &|x| x.memory) <= capacity);
                prop_assert_eq!(total(&chosen, &|x| x.time), least);
            }
        }
        if let Some((chosen, _)) = best(&items, capacity, 1) {
            prop_assert!(total(&chosen, &|x| x.memory) <= capacity);
        }
    }
}

#[test]
fn many_alike_choices_are_no_trouble() {
    // 60 layers, 30 of them must recompute: which ones is a matter of the last digits.
    let layer = |i: usize| {
        let more = 1.0 + 1e-3 * ((i * 37) % 60) as f64;
        vec![Cost { time: 10.0, memory: 10.0 }, Cost { time: 10.0 + more, memory: 1.0 }]
    };
    let layers: Vec<Vec<Cost>> = (0..60).map(layer).collect();
    let (chosen, exact) = best(&layers, 331.5, 1000).unwrap();
    let extra: f64 = layers.iter().zip(&chosen).map(|(l, &c)| l[c].time - 10.0).sum();
    let cheapest: f64 = (0..30).map(|i| 1.0 + 1e-3 * f64::from(i)).sum();
    assert!(exact && (extra - cheapest).abs() < 1e-9, "{extra} against {cheapest}");
}

/// Seconds per sample, from the definition; `None` where memory, devices or replicas do not suffice.
fn seconds(problem: &Problem, stages: &[Stage]) -> Option<f64> {
    let mut stage_of = vec![usize::MAX; problem.nodes.len()];
    for (s, stage) in stages.iter().enumerate() {
        stage.nodes.iter().for_each(|&v| stage_of[v] = s);
    }
    let devices: usize = stages.iter().map(|s| s.data * s.tensor).sum();
    let mut replicas: usize = stages.iter().map(|s| s.data).sum();
    if devices > problem.n_devices || replicas > problem.n_microbatches {
        return None;
    }
    let mut worst: f64 = 0.0;
    for (s, stage) in stages.iter().enumerate() {
        let d = stage.data as f64;
        let in_flight = replicas.div_ceil(stage.data) as f64;
        replicas -= stage.data;
        let (mut time, mut bytes, mut params, mut memory) = (0.0, 0.0, 0.0, 0.0);
        for (&v, &w) in stage.nodes.iter().zip(&stage.ways) {
            let way = &problem.nodes[v].iter().find(|n| n.0 == stage.tensor)?.1[w];
            time += way.time;
            params += way.params;
            memory += way.memory_each * in_flight + way.memory_fixed;
            let into: Vec<_> = problem.edges.iter().filter(|e| e.1 == v).collect();
            let out: Vec<_> = problem.edges.iter().filter(|e| e.0 == v).collect();
            bytes +=
                into.iter().zip(&way.sync_in).filter(|(e, _)| stage_of[e.0] != s).map(|(e, x)| e.2 + x).sum::<f64>();
            bytes +=
                out.iter().zip(&way.sync_out).filter(|(e, _)| stage_of[e.1] != s).map(|(e, x)| e.2 + x).sum::<f64>();
        }
        if memory > problem.memory {
            return None;
        }
        let sync = 4.0 * (d - 1.0) * params / (d * problem.n_microbatches as f64 * problem.bandwidth);
        worst = worst.max((2.0 * bytes / problem.bandwidth + time) / d + sync);
    }
    Some(worst)
}

/// All pipelines: nodes to stages in order, degrees and ways of each.
fn brute_force(problem: &Problem) -> Option<f64> {
    fn go(problem: &Problem, left: &[usize], stages: &mut Vec<Stage>) -> Option<f64> {
        if left.is_empty() {
            return seconds(problem, stages);
        }
        let mut best: Option<f64> = None;
        for mask in 1..1usize << left.len() {
            let (nodes, rest): (Vec<usize>, Vec<usize>) =
                (0..left.len()).map(|i| (i, left[i])).fold((Vec::new(), Vec::new()), |(mut a, mut b), (i, v)| {
                    if mask >> i & 1 == 1 {
                        a.push(v)
                    } else {
                        b.push(v)
                    }
                    (a, b)
                });
            if problem.edges.iter().any(|e| rest.contains(&e.0) && nodes.contains(&e.1)) {
                continue;
            }
            for data in (1..=problem.n_devices).filter(|&d| problem.n_microbatches.is_multiple_of(d)) {
                for tensor in 1..=problem.n_devices / data {
                    let sizes: Option<Vec<usize>> = nodes
                        .iter()
                        .map(|&v| problem.nodes[v].iter().find(|n| n.0 == tensor).map(|n| n.1.len()))
                        .collect();
                    for ways in all_choices(&sizes.unwrap_or(vec![0])) {
                        stages.push(Stage { nodes: nodes.clone(), data, tensor, ways });
                        best = [best, go(problem, &rest, stages)].into_iter().flatten().reduce(f64::min);
                        stages.pop();
                    }
                }
            }
        }
        best
    }
    go(problem, &(0..problem.nodes.len()).collect::<Vec<_>>(), &mut Vec::new())
}

fn value(problem: &Problem, found: &Pipeline) -> Option<f64> {
    let mut all: Vec<usize> = found.stages.iter().flat_map(|s| s.nodes.clone()).collect();
    all.sort_unstable();
    assert_eq!(all, (0..problem.nodes.len()).collect::<Vec<_>>());
    assert!(found.stages.iter().all(|s| problem.n_microbatches.is_multiple_of(s.data)));
    for (i, stage) in found.stages.iter().enumerate() {
        let later: Vec<usize> = found.stages[i + 1..].iter().flat_map(|s| s.nodes.clone()).collect();
        assert!(!problem.edges.iter().any(|e| later.contains(&e.0) && stage.nodes.contains(&e.1)));
    }
    seconds(problem, &found.stages)
}

/// `alike`: ways of a node differ in time and memory only.
fn problem(most: usize, alike: bool) -> impl Strategy<Value = Problem> {
    let number = |most: u32| (0..most).prop_map(f64::from);
    let shape = (1..=most).prop_flat_map(|n| (Just(n), prop::collection::btree_set((0..n, 0..n), 0..=2 * n)));
    (shape, 1usize..5, prop::sample::select(vec![2usize, 4, 6]), 20u32..120, 1u32..20).prop_flat_map(
        move |((n, pairs), n_devices, n_microbatches, memory, bandwidth)| {
            let pairs: Vec<(usize, usize)> = pairs.into_iter().filter(|(a, b)| a < b).collect();
            let into = |v: usize| pairs.iter().filter(|e| e.1 == v).count();
            let out = |v: usize| pairs.iter().filter(|e| e.0 == v).count();
            let way = |v: usize| {
                let syncs = |n| prop::collection::vec(number(4), n);
                (number(20), number(20), number(20), number(20), syncs(into(v)), syncs(out(v))).prop_map(
                    |(time, params, memory_each, memory_fixed, sync_in, sync_out)| Way {
                        time,
                        params,
                        memory_each,
                        memory_fixed,
                        sync_in,
                        sync_out,
                    },
                )
            };
            let degree = move |ways: Vec<Way>| {
                let first = ways[0].clone();
                let as_first = |w: Way| Way {
                    params: first.params,
                    sync_in: first.sync_in.clone(),
                    sync_out: first.sync_out.clone(),
                    ..w
                };
                if alike { ways.into_iter().map(as_first).collect() } else { ways }
            };
            let nodes: Vec<_> = (0..n)
                .map(|v| {
                    let ways = || prop::collection::vec(way(v), 1..3).prop_map(degree);
                    (ways(), prop::option::of(ways())).prop_map(|(one, two)| {
                        let mut degrees = vec![(1, one)];
                        degrees.extend(two.map(|w| (2, w)));
                        degrees
                    })
                })
                .collect();
            let edges = prop::collection::vec(number(10), pairs.len());
            (nodes, edges).prop_map(move |(nodes, bytes)| Problem {
                nodes,
                edges: pairs.iter().zip(bytes).map(|(&(a, b), c)| (a, b, c)).collect(),
                n_devices,
                memory: f64::from(memory),
                bandwidth: f64::from(bandwidth),
                n_microbatches,
            })
        },
    )
}

fn agrees_with_brute_force(problem: &Problem) -> Result<(), TestCaseError> {
    match (solve(problem, 1000), brute_force(problem)) {
        (Ok(found), Some(best)) => {
            prop_assert!((found.seconds - best).abs() <= 1e-9 * best.max(1.0), "{} against {best}", found.seconds);
            let again = value(problem, &found).expect("fits");
            prop_assert!(found.optimal && (again - best).abs() <= 1e-9 * best.max(1.0), "{again} against {best}");
        }
        (Err(Refusal::Memory { all, .. }), None) => prop_assert!(all),
        (found, best) => prop_assert!(false, "{found:?} against {best:?}"),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pipelines_equal_brute_force(problem in problem(3, false)) {
        agrees_with_brute_force(&problem)?;
    }

    #[test]
    fn pipelines_of_ways_that_differ_in_time_and_memory_equal_brute_force(problem in problem(4, true)) {
        agrees_with_brute_force(&problem)?;
    }

    #[test]
    fn beyond_the_budget_pipelines_stay_valid(problem in problem(12, false), budget in 1usize..60) {
        match solve(&problem, budget) {
            Ok(found) => {
                let again = value(&problem, &found).expect("fits");
                prop_assert!((found.seconds - again).abs() <= 1e-9 * again.max(1.0), "{} is {again}", found.seconds);
                prop_assert_eq!(solve(&problem, budget).unwrap(), found);
            }
            Err(e) => prop_assert!(matches!(e, Refusal::Memory { .. }), "{e}"),
        }
    }
}

#[test]
fn problems_that_make_no_sense_are_refused() {
    let way =
        || Way { time: 1.0, params: 1.0, memory_each: 1.0, memory_fixed: 1.0, sync_in: vec![], sync_out: vec![0.0] };
    let end = Way { sync_in: vec![0.0], sync_out: vec![], ..way() };
    let good = Problem {
        nodes: vec![vec![(1, vec![way()])], vec![(1, vec![end])]],
        edges: vec![(0, 1, 1.0)],
        n_devices: 2,
        memory: 10.0,
        bandwidth: 1.0,
        n_microbatches: 4,
    };
    assert!(solve(&good, 100).is_ok());
    let refused = |change: &dyn Fn(&mut Problem)| {
        let mut problem = good.clone();
        change(&mut problem);
        solve(&problem, 100).unwrap_err()
    };
    assert!(matches!(refused(&|p| p.n_devices = 0), Refusal::Field { field: "n_devices", .. }));
    assert!(matches!(refused(&|p| p.n_devices = usize::MAX), Refusal::TooManyDevices { .. }));
    assert!(matches!(refused(&|p| p.memory = f64::NAN), Refusal::Field { field: "memory", .. }));
    assert!(matches!(refused(&|p| p.bandwidth = -1.0), Refusal::Field { field: "bandwidth", .. }));
    assert!(matches!(refused(&|p| p.n_microbatches = 0), Refusal::Field { field: "n_microbatches", .. }));
    assert!(matches!(refused(&|p| p.edges[0].2 = f64::INFINITY), Refusal::Edge { .. }));
    assert!(matches!(refused(&|p| p.edges[0].1 = 0), Refusal::Graph(_)));
    assert!(matches!(refused(&|p| p.edges[0].1 = 9), Refusal::Graph(_)));
    assert!(matches!(refused(&|p| p.nodes[0].clear()), Refusal::NoWay { node: 0 }));
    assert!(matches!(refused(&|p| p.nodes[0][0].1[0].time = f64::NAN), Refusal::Cost { field: "time", node: 0, .. }));
    assert!(matches!(refused(&|p| p.nodes[1][0].1[0].sync_in.clear()), Refusal::Sync { node: 1, .. }));
    assert!(matches!(refused(&|p| p.memory = 1.5), Refusal::Memory { all: true, .. }));
}
