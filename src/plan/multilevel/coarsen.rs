//! Fewer, heavier vertices: pairs joined by heavy edges become one.

use super::graph::Weighted;
use crate::plan::random::Random;

const ALONE: u32 = u32::MAX;

/// Contracts a matching; no pair weighs more than `cap`. Answers the smaller graph and its vertex for every vertex.
///
/// An edge is rated by its weight over the weights of both ends, so that vertices stay of like weight (expansion*2 of
/// Holtgrewe, Sanders and Schulz, IPDPS 2010). Where stars leave many vertices without a partner, those that share
/// their best neighbour are paired, as in METIS 5 (two-hop).
///
/// # Complexity
/// O(n + m).
pub(super) fn coarsen(graph: &Weighted, cap: i64, random: &mut Random) -> (Weighted, Vec<u32>) {
    let n = graph.n_vertices();
    let mut order: Vec<u32> = (0..n as u32).collect();
    random.shuffle(&mut order);
    // Vertices with few neighbours choose first: they have the least choice.
    order = by_degree(graph, &order);
    let lightness: Vec<f64> = (0..n as u32).map(|v| 1.0 / graph.vertex_weight(v).max(1) as f64).collect();
    let may_join = |a: u32, b: u32| graph.vertex_weight(a) + graph.vertex_weight(b) <= cap;
    let mut mate = vec![ALONE; n];
    let mut n_alone = 0;
    for &v in &order {
        if mate[v as usize] != ALONE {
            continue;
        }
        let mut best = (-1.0, v);
        for (u, w) in graph.neighbours(v) {
            let rating = w as f64 * lightness[u as usize];
            if rating > best.0 && mate[u as usize] == ALONE && may_join(v, u) {
                best = (rating, u);
            }
        }
        let u = best.1;
        (mate[v as usize], mate[u as usize]) = (u, v);
        n_alone += usize::from(u == v);
    }
    if n_alone * 10 > n {
        two_hop(graph, &order, &may_join, &lightness, &mut mate);
    }
    contract(graph, &mate)
}

/// Counting sort, stable.
fn by_degree(graph: &Weighted, order: &[u32]) -> Vec<u32> {
    const MOST: usize = 64;
    let key = |v: u32| graph.degree(v).min(MOST);
    let mut starts = [0usize; MOST + 2];
    for &v in order {
        starts[key(v) + 1] += 1;
    }
    for d in 0..=MOST {
        starts[d + 1] += starts[d];
    }
    let mut sorted = vec![0; order.len()];
    for &v in order {
        sorted[starts[key(v)]] = v;
        starts[key(v)] += 1;
    }
    sorted
}

/// Pairs vertices that were left alone with others that have the same best neighbour, or none at all.
fn two_hop(graph: &Weighted, order: &[u32], may_join: &dyn Fn(u32, u32) -> bool, lightness: &[f64], mate: &mut [u32]) {
    let n = graph.n_vertices();
    // By best neighbour; the last place is for vertices without neighbours.
    let mut waiting = vec![ALONE; n + 1];
    for &v in order {
        if mate[v as usize] != v {
            continue;
        }
        let mut best = (-1.0, n);
        for (u, w) in graph.neighbours(v) {
            let rating = w as f64 * lightness[u as usize];
            if rating > best.0 {
                best = (rating, u as usize);
            }
        }
        let other = waiting[best.1];
        if other != ALONE && may_join(v, other) {
            (mate[v as usize], mate[other as usize]) = (other, v);
            waiting[best.1] = ALONE;
        } else {
            waiting[best.1] = v;
        }
    }
}

fn contract(graph: &Weighted, mate: &[u32]) -> (Weighted, Vec<u32>) {
    let n = graph.n_vertices();
    let mut map = vec![0; n];
    let mut pairs: Vec<[u32; 2]> = Vec::with_capacity(n * 2 / 3);
    for v in 0..n as u32 {
        let u = mate[v as usize];
        if v <= u {
            (map[v as usize], map[u as usize]) = (pairs.len() as u32, pairs.len() as u32);
            pairs.push([v, u]);
        }
    }
    let n_coarse = pairs.len();
    let mut starts = Vec::with_capacity(n_coarse + 1);
    let mut vertex = Vec::with_capacity(n_coarse);
    let mut to: Vec<u32> = Vec::with_capacity(graph.n_edges() * 3 / 2);
    let mut edge: Vec<i64> = Vec::with_capacity(graph.n_edges() * 3 / 2);
    // Where the edge to a coarse vertex stands, if at or after the row's start.
    let mut place = vec![usize::MAX; n_coarse];
    starts.push(0);
    for (c, &[a, b]) in pairs.iter().enumerate() {
        let begin = to.len();
        let members: &[u32] = if a == b { &[a] } else { &[a, b] };
        vertex.push(members.iter().map(|&v| graph.vertex_weight(v)).sum());
        for &v in members {
            for (u, w) in graph.neighbours(v) {
                let d = map[u as usize];
                if d as usize == c {
                    continue;
                }
                let at = place[d as usize];
                if at >= begin && at < to.len() {
                    edge[at] += w;
                } else {
                    place[d as usize] = to.len();
                    to.push(d);
                    edge.push(w);
                }
            }
        }
        starts.push(to.len());
    }
    (Weighted::trusted(starts, to, edge, vertex), map)
}
