use proptest::prelude::*;

use super::blocks::Blocks;
use super::network::Network;
use super::*;
use crate::plan::random::Random;

/// A graph from a list of edges; those named again add up, loops are left out.
fn graph(vertex: Vec<i64>, edges: &[(usize, usize, i64)]) -> Weighted {
    let n = vertex.len();
    let mut weight = vec![0; n * n];
    for &(a, b, w) in edges {
        if a != b {
            weight[a * n + b] += w;
            weight[b * n + a] += w;
        }
    }
    let (mut starts, mut to, mut edge) = (vec![0], Vec::new(), Vec::new());
    for v in 0..n {
        for u in 0..n {
            if weight[v * n + u] > 0 {
                to.push(u as u32);
                edge.push(weight[v * n + u]);
            }
        }
        starts.push(to.len());
    }
    Weighted::new(starts, to, edge, vertex).unwrap()
}

fn grid(width: usize, height: usize) -> Weighted {
    let at = |x: usize, y: usize| x * height + y;
    let mut edges = Vec::new();
    for x in 0..width {
        for y in 0..height {
            if x + 1 < width {
                edges.push((at(x, y), at(x + 1, y), 1));
            }
            if y + 1 < height {
                edges.push((at(x, y), at(x, y + 1), 1));
            }
        }
    }
    graph(vec![1; width * height], &edges)
}

fn wanted(n_blocks: usize, seed: u64) -> Wanted {
    Wanted { n_blocks, imbalance: 0.03, seed }
}

/// Smallest cut over all assignments within the limit and without empty blocks.
fn brute_force(graph: &Weighted, n_blocks: usize, limit: i64) -> Option<i64> {
    let n = graph.n_vertices();
    (0..n_blocks.pow(n as u32))
        .filter_map(|mut code| {
            let mut of = vec![0u32; n];
            let mut weight = vec![(0, 0); n_blocks];
            for (v, b) in of.iter_mut().enumerate() {
                *b = (code % n_blocks) as u32;
                code /= n_blocks;
                weight[*b as usize].0 += graph.vertex_weight(v as u32);
                weight[*b as usize].1 += 1;
            }
            weight.iter().all(|&(w, n)| w <= limit && n > 0).then(|| graph.cut(&of))
        })
        .min()
}

fn small_graph(random: &mut Random, n: usize, heaviest: usize) -> Weighted {
    let vertex = (0..n).map(|_| 1 + random.below(heaviest) as i64).collect();
    let edges: Vec<_> = (0..2 * n).map(|_| (random.below(n), random.below(n), 1 + random.below(9) as i64)).collect();
    graph(vertex, &edges)
}

#[test]
fn small_graphs_are_split_as_well_as_by_brute_force() {
    let mut random = Random::new(7);
    for n_blocks in [2, 3] {
        let (mut ours, mut best) = (0, 0);
        for _ in 0..60 {
            let graph = small_graph(&mut random, 9, 1);
            let wanted = wanted(n_blocks, random.bits());
            let optimum = brute_force(&graph, n_blocks, wanted.limit(&graph)).unwrap();
            let found = partition(&graph, &wanted).unwrap();
            assert!(found.cut >= optimum && found.heaviest <= wanted.limit(&graph));
            ours += found.cut;
            best += optimum;
        }
        assert!(ours as f64 <= 1.02 * best as f64, "{n_blocks} blocks: {ours} against {best}");
    }
}

#[test]
fn heavy_vertices_are_packed_within_the_limit_where_that_is_possible() {
    let mut random = Random::new(3);
    let (mut possible, mut missed) = (0, 0);
    for _ in 0..60 {
        let graph = small_graph(&mut random, 10, 30);
        let wanted = Wanted { imbalance: 0.1, ..wanted(2, 1) };
        if brute_force(&graph, 2, wanted.limit(&graph)).is_some() {
            possible += 1;
            missed += usize::from(partition(&graph, &wanted).unwrap().heaviest > wanted.limit(&graph));
        }
    }
    assert!(possible > 40 && missed * 20 <= possible, "{missed} of {possible}");
}

#[test]
fn grids_are_cut_straight() {
    assert_eq!(partition(&grid(24, 24), &wanted(2, 1)).unwrap().cut, 24);
    assert_eq!(partition(&grid(24, 24), &wanted(4, 1)).unwrap().cut, 48);
}

#[test]
fn cliques_on_a_string_are_cut_at_the_string() {
    let clique = |c: usize| (0..12).flat_map(move |a| (0..a).map(move |b| (12 * c + a, 12 * c + b, 5)));
    let mut edges: Vec<_> = (0..6).flat_map(clique).collect();
    edges.extend((0..5).map(|c| (12 * c, 12 * (c + 1) + 7, 1)));
    let found = partition(&graph(vec![1; 72], &edges), &wanted(6, 1)).unwrap();
    assert_eq!(found.cut, 5);
}

#[test]
fn a_star_and_vertices_without_edges_are_balanced() {
    let star: Vec<_> = (1..200).map(|v| (0, v, 1)).collect();
    let star = graph(vec![1; 300], &star);
    let found = partition(&star, &wanted(4, 1)).unwrap();
    assert!(found.heaviest <= wanted(4, 1).limit(&star));
    // The hub's block takes 77 of its 199 leaves.
    assert!(found.cut <= 199 - 76, "{}", found.cut);
    let loose = graph(vec![1; 50], &[]);
    let found = partition(&loose, &wanted(8, 1)).unwrap();
    assert_eq!((found.cut, found.heaviest), (0, 7));
}

#[test]
fn a_full_block_gives_up_leaves_inside_it_for_better_vertices() {
    // A clique with a leaf on every member: all the leaves belong in the other block.
    let mut edges: Vec<_> = (0..40).flat_map(|a| (0..a).map(move |b| (a, b, 1))).collect();
    edges.extend((0..40).map(|v| (v, 40 + v, 1)));
    let graph = graph(vec![1; 80], &edges);
    let found = partition(&graph, &wanted(2, 1)).unwrap();
    assert!(found.cut <= 40, "{}", found.cut);
}

#[test]
fn huge_weights_and_any_imbalance_do_not_overflow() {
    let huge = i64::MAX / 64;
    let edges: Vec<_> = (1..12).map(|v| (v - 1, v, huge / 100)).collect();
    let line = graph(vec![huge; 12], &edges);
    for imbalance in [0.0, 1e300] {
        let found = partition(&line, &Wanted { imbalance, ..wanted(5, 1) }).unwrap();
        assert!(found.heaviest >= 3 * huge && found.cut >= 4 * (huge / 100), "{found:?}");
    }
}

#[test]
fn wishes_without_a_partition_are_refused() {
    let line = graph(vec![1; 3], &[(0, 1, 1), (1, 2, 1)]);
    assert_eq!(partition(&line, &wanted(0, 1)), Err(Unsplittable::NoBlocks));
    let refused = partition(&line, &wanted(4, 1));
    assert_eq!(refused, Err(Unsplittable::TooFewVertices { n_blocks: 4, n_vertices: 3 }));
    for imbalance in [-0.1, f64::NAN, f64::INFINITY] {
        let refused = partition(&line, &Wanted { imbalance, ..wanted(2, 1) });
        assert!(matches!(refused, Err(Unsplittable::Imbalance { .. })), "{refused:?}");
    }
    assert_eq!(partition(&line, &wanted(3, 1)).unwrap().cut, 2);
    assert_eq!(partition(&line, &wanted(1, 1)).unwrap().cut, 0);
}

#[test]
fn rows_that_are_no_graph_are_refused() {
    use InvalidGraph as E;
    let make = |starts: &[usize], to: &[u32], edge: &[i64], vertex: &[i64]| {
        Weighted::new(starts.to_vec(), to.to_vec(), edge.to_vec(), vertex.to_vec()).unwrap_err()
    };
    assert!(matches!(make(&[0, 1], &[1], &[1], &[1, 1]), E::Lengths { .. }));
    assert!(matches!(make(&[0, 2, 1], &[1], &[1], &[1, 1]), E::Lengths { .. }));
    assert!(matches!(make(&[0, 1, 2], &[2, 0], &[1, 1], &[1, 1]), E::OutOfRange { vertex: 0, neighbour: 2, .. }));
    assert!(matches!(make(&[0, 1, 2], &[0, 0], &[1, 1], &[1, 1]), E::SelfLoop { vertex: 0 }));
    assert!(matches!(make(&[0, 1, 2], &[1, 0], &[1, 2], &[1, 1]), E::Asymmetric { vertex: 0, neighbour: 1 }));
    assert!(matches!(make(&[0, 1, 1], &[1], &[1], &[1, 1]), E::Asymmetric { vertex: 0, neighbour: 1 }));
    assert!(matches!(make(&[0, 1, 2], &[1, 0], &[0, 0], &[1, 1]), E::Weight { weight: 0, .. }));
    assert!(matches!(make(&[0, 1, 2], &[1, 0], &[1, 1], &[1, -1]), E::Weight { vertex: 1, weight: -1 }));
    assert_eq!(make(&[0, 1, 2], &[1, 0], &[i64::MAX, i64::MAX], &[1, 1]), E::TooHeavy);
    assert_eq!(make(&[0, 0, 0], &[], &[], &[i64::MAX, i64::MAX]), E::TooHeavy);
}

#[test]
fn sums_of_moves_equal_a_fresh_count() {
    let mut random = Random::new(11);
    for _ in 0..20 {
        let graph = small_graph(&mut random, 20, 5);
        let of = (0..20).map(|_| random.below(4) as u32).collect();
        let mut blocks = Blocks::new(&graph, of, vec![100; 4]);
        for _ in 0..50 {
            let (v, to) = (random.below(20) as u32, random.below(4) as u32);
            if blocks.of[v as usize] != to {
                blocks.put(v, to);
            }
        }
        let fresh = Blocks::new(&graph, blocks.of.clone(), vec![100; 4]);
        assert_eq!((&blocks.weight, &blocks.size), (&fresh.weight, &fresh.size));
        for v in 0..20 {
            let sorted = |b: &Blocks<'_>| {
                let mut near = b.near(v).to_vec();
                near.sort_unstable();
                near
            };
            assert_eq!((sorted(&blocks), blocks.inside(v)), (sorted(&fresh), fresh.inside(v)));
        }
        assert_eq!(blocks.cut(), graph.cut(&blocks.of));
    }
}

/// Smallest cut between two sets of terminals, by trying all; and the smallest source side that reaches it.
fn least_cut(n: usize, edges: &[(usize, usize, i64)], sources: &[usize], sinks: &[usize]) -> (i64, usize) {
    let side = |code: usize, v: usize| code >> v & 1 == 1;
    (0..1usize << n)
        .filter(|&c| sources.iter().all(|&v| side(c, v)) && sinks.iter().all(|&v| !side(c, v)))
        .map(|c| {
            let cut = edges.iter().filter(|e| side(c, e.0) != side(c, e.1)).map(|e| e.2).sum::<i64>();
            (cut, c.count_ones() as usize)
        })
        .min()
        .unwrap()
}

#[test]
fn flows_equal_least_cuts_also_while_terminals_grow() {
    let mut random = Random::new(5);
    for _ in 0..200 {
        let n = 4 + random.below(6);
        let edges: Vec<_> = (0..2 * n)
            .map(|_| (random.below(n), random.below(n), 1 + random.below(4) as i64))
            .filter(|e| e.0 != e.1)
            .collect();
        let mut network = Network::default();
        network.clear();
        for _ in 2..n {
            network.add_node(1);
        }
        for &(a, b, w) in &edges {
            network.add_edge(a as u32, b as u32, w);
        }
        network.begin();
        let mut terminals = [vec![0], vec![1]];
        loop {
            assert!(network.fill(i64::MAX, usize::MAX));
            let (cut, least) = least_cut(n, &edges, &terminals[0], &terminals[1]);
            let reached = (0..n).filter(|&v| network.is_reached(0, v as u32)).count();
            assert_eq!((network.flow, reached), (cut, least), "{edges:?} {terminals:?}");
            let weight = (2..n).filter(|&v| network.is_reached(0, v as u32)).count();
            assert_eq!(network.reached_weight[0], weight as i64);
            let end = random.below(2);
            let free = (2..n).filter(|v| !terminals.iter().any(|t| t.contains(v)));
            let free: Vec<usize> = free.filter(|&v| !network.is_reached(end, v as u32)).collect();
            if free.is_empty() {
                break;
            }
            let favourite = free[random.below(free.len())] as u32;
            let new = network.pierce(end, 1, &|v| i32::from(v == favourite));
            if new.is_empty() {
                break;
            }
            assert!(new.len() == 1 && free.contains(&(new[0] as usize)));
            terminals[end].push(new[0] as usize);
        }
    }
}

fn any_graph() -> impl Strategy<Value = (Weighted, usize, u64)> {
    (1usize..120).prop_flat_map(|n| {
        let edges = prop::collection::vec((0..n, 0..n, 1i64..50), 0..4 * n);
        (prop::collection::vec(0i64..20, n), edges, 1..n.min(20) + 1, any::<u64>())
            .prop_map(|(vertex, edges, k, seed)| (graph(vertex, &edges), k, seed))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn partitions_are_whole_balanced_and_repeatable((graph, k, seed) in any_graph()) {
        let wanted = wanted(k, seed);
        let found = partition(&graph, &wanted).unwrap();
        let mut weight = vec![0; k];
        let mut size = vec![0; k];
        for (v, &b) in found.of.iter().enumerate() {
            weight[b as usize] += graph.vertex_weight(v as u32);
            size[b as usize] += 1;
        }
        prop_assert!(size.iter().all(|&n| n > 0), "{size:?}");
        prop_assert_eq!(found.heaviest, *weight.iter().max().unwrap());
        // A heaviest block has no vertex that the lightest would carry better.
        let heavy = (0..graph.n_vertices() as u32).map(|v| graph.vertex_weight(v)).max().unwrap();
        let limit = wanted.limit(&graph).max(graph.total_weight() / k as i64 + heavy);
        prop_assert!(found.heaviest <= limit, "{} above {limit}", found.heaviest);
        prop_assert_eq!(partition(&graph, &wanted).unwrap(), found);
    }
}
