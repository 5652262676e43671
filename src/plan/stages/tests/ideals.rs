use proptest::prelude::*;

use super::super::coarse::narrow;
use super::super::dag::Dag;
use super::super::ideals::Ideals;

fn graph() -> impl Strategy<Value = (Dag, Vec<f64>)> {
    (2usize..14).prop_flat_map(|n| {
        let edges = prop::collection::vec((0..n, 0..n), 0..2 * n);
        let weights = prop::collection::vec((0u32..10).prop_map(f64::from), n);
        (edges, weights).prop_map(move |(edges, weights)| {
            let forward: Vec<(usize, usize)> = edges.into_iter().filter(|(a, b)| a < b).collect();
            (Dag::new(n, &forward).unwrap(), weights)
        })
    })
}

/// Every set holds what its members need, none is there twice, and the first and last are empty and full.
fn are_ideals(dag: &Dag, ideals: &Ideals) -> bool {
    let n = dag.n_nodes();
    let closed = |i: usize| {
        (0..n).filter(|&v| ideals.has(i, v)).all(|v| dag.before(v).iter().all(|&u| ideals.has(i, u as usize)))
    };
    let mut sets: Vec<&[u64]> = (0..ideals.len()).map(|i| ideals.set(i)).collect();
    sets.sort_unstable();
    let distinct = sets.windows(2).all(|w| w[0] != w[1]);
    let size = |i: usize| (0..n).filter(|&v| ideals.has(i, v)).count();
    let sorted = (1..ideals.len()).all(|i| size(i - 1) <= size(i));
    (0..ideals.len()).all(closed) && distinct && sorted && size(0) == 0 && size(ideals.len() - 1) == n
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn joined_nodes_leave_few_ideals_of_the_graph((dag, size) in graph(), most in 2usize..40) {
        if let Some(few) = narrow(&dag, &size, most) {
            prop_assert!(few.len() <= most && are_ideals(&dag, &few), "{few:?}");
        }
        // With room for all of them nothing need be left out.
        let all = Ideals::all(&dag, usize::MAX).unwrap();
        prop_assert!(narrow(&dag, &size, all.len()).is_some());
    }

    #[test]
    fn selections_of_ideals_are_ideals((dag, weight) in graph(), most in 2usize..40, mix in any::<u64>()) {
        let light = Ideals::lightest(&dag, &weight, 3);
        let spread = light.spread(&dag, &weight, &weight, most);
        prop_assert!(spread.len() <= most.max(3) && are_ideals(&dag, &spread), "{spread:?}");
        prop_assert!(are_ideals(&dag, &spread.union(&light, &dag)));
        // Stages of a pipeline: nodes in order, cut in the middle.
        let middle = light.of_size(dag.n_nodes() / 2).start;
        let (first, second): (Vec<usize>, Vec<usize>) = (0..dag.n_nodes()).partition(|&v| light.has(middle, v));
        let around = Ideals::around(&dag, &weight, &[&first, &second], &spread, most, Some(mix));
        prop_assert!(are_ideals(&dag, &around), "{around:?}");
        prop_assert!((0..around.len()).any(|i| around.set(i) == light.set(middle)));
        prop_assert!(around.len() <= spread.len() + most.max(2));
    }
}

#[test]
fn chains_are_joined_from_their_lightest_ends() {
    // Two branches of three between a fork and a join; all but the heaviest nodes can be joined.
    let edges = [(0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (3, 7), (6, 7)];
    let dag = Dag::new(8, &edges).unwrap();
    let all = Ideals::all(&dag, 1000).unwrap();
    assert_eq!(all.len(), 18);
    let few = narrow(&dag, &[1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 1.0, 1.0], 8).unwrap();
    assert!(few.len() <= 8 && (0..few.len()).any(|i| few.has(i, 2) != few.has(i, 5)), "{few:?}");
}
