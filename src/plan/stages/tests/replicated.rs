use proptest::prelude::*;

use super::super::dag::{Chains, Dag, InvalidDag};
use super::super::ideals::{Ideals, border};
use super::super::replicated::{BadProblem, Costs, Network, Pipeline, solve};

fn diamond() -> Dag {
    Dag::new(4, &[(0, 1), (0, 2), (1, 3), (2, 3), (2, 3)]).unwrap()
}

#[test]
fn cycles_and_unknown_nodes_are_refused() {
    assert_eq!(Dag::new(2, &[(0, 2)]), Err(InvalidDag::OutOfRange { from: 0, to: 2, n_nodes: 2 }));
    let looped = Dag::new(4, &[(0, 1), (1, 2), (2, 1), (2, 3)]).unwrap_err();
    assert!(matches!(looped, InvalidDag::Cycle { node: 1 | 2 }), "{looped}");
    assert_eq!(Dag::new(1, &[(0, 0)]), Err(InvalidDag::Cycle { node: 0 }));
}

#[test]
fn ideals_are_all_sets_closed_under_what_comes_before() {
    let ideals = Ideals::all(&diamond(), 100).unwrap();
    let sets: Vec<u64> = (0..ideals.len()).map(|i| ideals.set(i)[0]).collect();
    assert_eq!(sets, [0b0000, 0b0001, 0b0011, 0b0101, 0b0111, 0b1111]);
    assert_eq!(ideals.smaller(4), [2, 3]);
    assert!(Ideals::all(&diamond(), 5).is_none());
    let few = Ideals::best(&diamond(), &|set| border(&diamond(), set, &[1.0, 9.0, 1.0, 1.0]), 1);
    let sets: Vec<u64> = (0..few.len()).map(|i| few.set(i)[0]).collect();
    assert_eq!((sets, few.complete), (vec![0b0000, 0b0001, 0b0101, 0b0111, 0b1111], false));
}

#[test]
fn chains_are_joined_up_to_where_paths_part_or_meet() {
    let dag = Dag::new(7, &[(0, 1), (1, 2), (1, 3), (3, 4), (2, 5), (4, 5), (5, 6)]).unwrap();
    let chains = Chains::of(&dag);
    assert_eq!(chains.nodes, [vec![0, 1], vec![2], vec![3, 4], vec![5, 6]]);
    assert_eq!(chains.dag, Dag::new(4, &[(0, 1), (0, 2), (1, 3), (2, 3)]).unwrap());
    assert_eq!(chains.sum(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), [3.0, 3.0, 9.0, 13.0]);
}

/// Seconds of a pipeline, from the definition.
fn seconds(dag: &Dag, costs: &Costs<'_>, network: &Network, stages: &[(Vec<usize>, Vec<usize>)]) -> f64 {
    let spread = |devices: &[usize]| {
        let mut counts = vec![0usize; network.n_machines];
        devices.iter().for_each(|d| counts[d / network.per_machine] += 1);
        counts
    };
    let even = |counts: &[usize]| counts.iter().filter(|&&c| c > 0).all(|&c| c == *counts.iter().max().unwrap());
    let mut worst: f64 = 0.0;
    let mut done = vec![false; dag.n_nodes()];
    for (i, (nodes, devices)) in stages.iter().enumerate() {
        let sum = |of: &[f64]| nodes.iter().map(|&v| of[v]).sum::<f64>();
        let (compute, params, m) = (sum(costs.compute), sum(costs.params), devices.len() as f64);
        let counts = spread(devices);
        let machines = counts.iter().filter(|&&c| c > 0).count() as f64;
        let ring = |m: f64, bandwidth: f64| 4.0 * (m - 1.0) * params / (m * bandwidth);
        let per = m / machines;
        let time = if machines == 1.0 {
            (compute + ring(m, network.within)) / m
        } else {
            let slow = (compute + ring(m, network.between)) / m;
            let inside = (compute + ring(per, network.within)) / per;
            let both = (inside + ring(machines, network.between) / per) / machines;
            if even(&counts) { slow.min(both) } else { slow }
        };
        worst = worst.max(time);
        for &v in nodes {
            assert!(!done[v] && dag.before(v).iter().all(|&u| done[u as usize] || nodes.contains(&(u as usize))));
        }
        nodes.iter().for_each(|&v| done[v] = true);
        if let Some((_, next)) = stages.get(i + 1) {
            let needed = |v: &usize| done[*v] && dag.after(*v).iter().any(|&u| !done[u as usize]);
            let bytes: f64 = (0..dag.n_nodes()).filter(needed).map(|v| costs.output[v]).sum();
            let (here, there) = (spread(devices), spread(next));
            let same = here.iter().zip(&there).all(|(a, b)| (*a > 0) == (*b > 0)) && even(&here) && even(&there);
            let near = same || network.n_machines == 1;
            let bandwidth = if near { network.within } else { network.between };
            worst = worst.max(2.0 * bytes / (bandwidth * devices.len().min(next.len()) as f64));
        }
    }
    assert!(done.iter().all(|&d| d));
    worst
}

/// The best pipeline on consecutive devices, by trying all chains of ideals.
fn brute_force(dag: &Dag, costs: &Costs<'_>, network: &Network) -> f64 {
    fn go(
        dag: &Dag,
        costs: &Costs<'_>,
        network: &Network,
        ideals: &Ideals,
        at: (usize, usize),
        stages: &mut Vec<(Vec<usize>, Vec<usize>)>,
    ) -> f64 {
        let (ideal, used) = at;
        if ideal == ideals.len() - 1 {
            return seconds(dag, costs, network, stages);
        }
        let n = network.n_machines * network.per_machine;
        let mut best = f64::INFINITY;
        for next in ideal + 1..ideals.len() {
            if ideals.set(ideal)[0] & !ideals.set(next)[0] != 0 {
                continue;
            }
            let nodes =
                (0..dag.n_nodes()).filter(|&v| ideals.has(next, v) && !ideals.has(ideal, v)).collect::<Vec<_>>();
            for first in used..n {
                // Idle devices are of use up to the next machine only.
                if first > used && first % network.per_machine != 0 {
                    continue;
                }
                for m in 1..=n - first {
                    stages.push((nodes.clone(), (first..first + m).collect()));
                    best = best.min(go(dag, costs, network, ideals, (next, first + m), stages));
                    stages.pop();
                }
            }
        }
        best
    }
    go(dag, costs, network, &Ideals::all(dag, 1000).unwrap(), (0, 0), &mut Vec::new())
}

fn value(pipeline: &Pipeline, dag: &Dag, costs: &Costs<'_>, network: &Network) -> f64 {
    let stages: Vec<_> = pipeline.stages.iter().map(|s| (s.nodes.clone(), s.devices.clone())).collect();
    let mut devices: Vec<usize> = stages.iter().flat_map(|s| s.1.clone()).collect();
    devices.sort_unstable();
    assert!(
        devices.windows(2).all(|w| w[0] < w[1])
            && devices.iter().all(|&d| d < network.n_machines * network.per_machine)
    );
    assert!(stages.iter().all(|s| !s.0.is_empty() && !s.1.is_empty()));
    seconds(dag, costs, network, &stages)
}

#[derive(Clone, Debug)]
struct Case {
    dag: Dag,
    compute: Vec<f64>,
    params: Vec<f64>,
    output: Vec<f64>,
}

impl Case {
    fn costs(&self) -> Costs<'_> {
        Costs { compute: &self.compute, params: &self.params, output: &self.output }
    }
}

fn case(most: usize) -> impl Strategy<Value = Case> {
    (2..=most).prop_flat_map(|n| {
        let edges = prop::collection::vec((0..n, 0..n), n..2 * n);
        let values = || prop::collection::vec((0u32..10).prop_map(f64::from), n);
        (edges, values(), values(), values()).prop_map(move |(edges, compute, params, output)| {
            let edges: Vec<_> = edges.into_iter().filter(|(a, b)| a != b).map(|(a, b)| (a.min(b), a.max(b))).collect();
            Case { dag: Dag::new(n, &edges).unwrap(), compute, params, output }
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flat_pipelines_equal_brute_force(case in case(6), n in 1usize..5, bandwidth in 1u32..20) {
        let network = Network { n_machines: 1, per_machine: n, within: f64::from(bandwidth), between: 0.0 };
        let found = solve(&case.dag, &case.costs(), &network, 1000).unwrap();
        let best = brute_force(&case.dag, &case.costs(), &network);
        prop_assert!(found.optimal && (found.seconds - best).abs() <= 1e-9 * best, "{} against {best}", found.seconds);
        prop_assert!((value(&found, &case.dag, &case.costs(), &network) - best).abs() <= 1e-9 * best);
    }

    #[test]
    fn pipelines_over_machines_are_at_least_as_good_as_brute_force(case in case(5), slow in 1u32..5) {
        let network = Network { n_machines: 2, per_machine: 2, within: 10.0, between: f64::from(slow) };
        let found = solve(&case.dag, &case.costs(), &network, 1000).unwrap();
        // The search also knows stages that take turns on each machine.
        let best = brute_force(&case.dag, &case.costs(), &network);
        prop_assert!(found.seconds <= best * (1.0 + 1e-9), "{} against {best}", found.seconds);
        let again = value(&found, &case.dag, &case.costs(), &network);
        prop_assert!((found.seconds - again).abs() <= 1e-9 * again, "{} is {again}", found.seconds);
    }

    #[test]
    fn beyond_the_budget_pipelines_stay_valid(case in case(40), budget in 1usize..400) {
        let network = Network { n_machines: 2, per_machine: 3, within: 10.0, between: 2.0 };
        let found = solve(&case.dag, &case.costs(), &network, budget).unwrap();
        let again = value(&found, &case.dag, &case.costs(), &network);
        prop_assert!((found.seconds - again).abs() <= 1e-9 * again, "{} is {again}", found.seconds);
        prop_assert!(found.seconds <= case.compute.iter().sum::<f64>());
        prop_assert_eq!(solve(&case.dag, &case.costs(), &network, budget).unwrap(), found);
    }
}

#[test]
fn a_wide_border_stays_inside_machines() {
    // Two heavy halves with a wide border: each machine runs both, and only small gradients go between machines.
    let dag = Dag::new(2, &[(0, 1)]).unwrap();
    let costs = Costs { compute: &[8.0, 8.0], params: &[1.0, 1.0], output: &[20.0, 1.0] };
    let network = Network { n_machines: 2, per_machine: 2, within: 20.0, between: 1.0 };
    let found = solve(&dag, &costs, &network, 100).unwrap();
    assert_eq!(found.stages.len(), 2, "{found:?}");
    assert_eq!((&found.stages[0].devices[..], &found.stages[1].devices[..]), (&[0, 2][..], &[1, 3][..]));
}

#[test]
fn numbers_that_are_none_are_refused() {
    let dag = Dag::new(1, &[]).unwrap();
    let good = Costs { compute: &[1.0], params: &[1.0], output: &[1.0] };
    let flat = Network { n_machines: 1, per_machine: 2, within: 1.0, between: f64::NAN };
    assert!(solve(&dag, &good, &flat, 10).is_ok());
    let refused = |costs: Costs<'_>, network: Network| solve(&dag, &costs, &network, 10).unwrap_err();
    assert!(matches!(refused(good, Network { per_machine: 0, ..flat }), BadProblem::NoDevices { .. }));
    assert!(matches!(
        refused(good, Network { per_machine: usize::MAX, n_machines: 2, ..flat }),
        BadProblem::TooManyDevices { .. }
    ));
    assert!(matches!(refused(good, Network { within: 0.0, ..flat }), BadProblem::Bandwidth { .. }));
    assert!(matches!(refused(good, Network { n_machines: 2, ..flat }), BadProblem::Bandwidth { .. }));
    let nan = refused(Costs { params: &[f64::NAN], ..good }, flat);
    assert!(matches!(nan, BadProblem::Cost { field: "params", node: 0, .. }), "{nan}");
    assert!(matches!(refused(Costs { output: &[-1.0], ..good }, flat), BadProblem::Cost { field: "output", .. }));
    assert!(matches!(refused(Costs { compute: &[], ..good }, flat), BadProblem::Length { field: "compute", .. }));
    let empty = Costs { compute: &[], params: &[], output: &[] };
    assert_eq!(solve(&Dag::new(0, &[]).unwrap(), &empty, &flat, 10), Err(BadProblem::NoNodes));
}
