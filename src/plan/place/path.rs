//! A latency that no choice of blocks can beat: along one path, everything waits for everything before.

use std::collections::BTreeMap;

use super::bits::Bits;
use super::clusters::Clusters;
use super::flow::Network;
use super::problem::{Devices, Problem, adjacency};
use super::reach::Reach;
use super::stream::Stream;

/// Clusters along a path of ops, and the host time of the path's ops in each.
struct Path {
    clusters: Vec<usize>,
    host: Vec<f64>,
}

/// A lower bound on the latency of the problem, whose stream this is.
///
/// A path is cut into stretches by the blocks it runs through: a block is convex, so it holds one stretch of the path, and
/// with it all that lies between the ends of the stretch. It holds nothing that comes before the op ahead of the stretch
/// or after the op behind it. What is neither inside nor outside for sure is put where it costs least: a minimum cut. The
/// cheapest way to cut the path, with at most as many blocks as accelerators and none above their memory, is found by
/// dynamic programming.
///
/// `reach` is that of the stream, if it is known. Further paths are tried until the bound reaches `enough`, a latency
/// that can be had.
pub fn bound(
    problem: &Problem,
    stream: &Stream,
    reach: Option<&Reach>,
    enough: f64,
    stop: &mut dyn FnMut() -> bool,
) -> f64 {
    let ops = problem.ops();
    let devices = problem.devices();
    let fastest = |op: usize| match ops[op].accelerator {
        Some(a) if devices.n_accelerators > 0 => a.min(ops[op].host),
        _ => ops[op].host,
    };
    let mut bound = longest(problem, &fastest).0;
    let Some(reach) = reach else { return bound };
    let weights: [&dyn Fn(usize) -> f64; 4] =
        [&|op| ops[op].host, &|op| ops[op].transfer, &|op| ops[op].bytes, &|_| 1.0];
    for weight in weights {
        if bound >= enough * (1.0 - 1e-9) {
            return enough;
        }
        let mut path = Path { clusters: Vec::new(), host: Vec::new() };
        for op in longest(problem, weight).1 {
            let c = stream.of[op];
            match path.host.last_mut().filter(|_| path.clusters.last() == Some(&c)) {
                Some(host) => *host += ops[op].host,
                None => {
                    path.clusters.push(c);
                    path.host.push(ops[op].host);
                }
            }
        }
        match path.fastest(&stream.clusters, reach, devices, stop) {
            Some(b) => bound = bound.max(b),
            None => break,
        }
    }
    bound.min(enough)
}

/// The heaviest path of ops, from its first to its last.
fn longest(problem: &Problem, weight: &dyn Fn(usize) -> f64) -> (f64, Vec<usize>) {
    let n = problem.ops().len();
    let before = adjacency(n, problem.edges().iter().map(|&(a, b)| (b, a)));
    let mut length = vec![0.0; n];
    let mut from = vec![usize::MAX; n];
    let mut end = None;
    for &v in problem.order() {
        for &u in &before[v] {
            if from[v] == usize::MAX || length[u] > length[from[v]] {
                from[v] = u;
            }
        }
        length[v] = weight(v) + if from[v] == usize::MAX { 0.0 } else { length[from[v]] };
        if end.is_none_or(|e: usize| length[v] > length[e]) {
            end = Some(v);
        }
    }
    let mut path = Vec::new();
    let mut at = end;
    while let Some(v) = at {
        path.push(v);
        at = Some(from[v]).filter(|&u| u != usize::MAX);
    }
    path.reverse();
    (end.map_or(0.0, |e| length[e]), path)
}

impl Path {
    /// The fastest way along; `None` when `stop` says so.
    fn fastest(
        &self,
        clusters: &Clusters,
        reach: &Reach,
        devices: Devices,
        stop: &mut dyn FnMut() -> bool,
    ) -> Option<f64> {
        let n = self.clusters.len();
        let k = devices.n_accelerators.min(n);
        // By end and number of blocks at most.
        let mut time = vec![vec![f64::INFINITY; k + 1]; n + 1];
        time[0].fill(0.0);
        for first in 0..n {
            let (before, after) = time.split_at_mut(first + 1);
            for (after, before) in after[0].iter_mut().zip(&before[first]) {
                *after = after.min(before + self.host[first]);
            }
            for last in first..n {
                if stop() {
                    return None;
                }
                let Some(block) = self.cheapest(clusters, reach, first, last, devices.memory) else { break };
                for a in 0..k {
                    time[last + 1][a + 1] = time[last + 1][a + 1].min(time[first][a] + block);
                }
            }
        }
        Some(time[n][k])
    }

    /// What a block takes that holds this stretch and no more of the path; `None` when it does not fit.
    fn cheapest(&self, clusters: &Clusters, reach: &Reach, first: usize, last: usize, memory: f64) -> Option<f64> {
        let inside = reach.between(self.clusters[first], self.clusters[last]);
        let (mut compute, mut bytes) = (0.0, 0.0);
        for v in inside.iter() {
            compute += clusters.accelerator[v];
            bytes += clusters.bytes[v];
        }
        if compute.is_infinite() || bytes > memory {
            return None;
        }
        let mut outside = Bits::new(clusters.len());
        if first > 0 {
            outside.merge(reach.upstream(self.clusters[first - 1]));
        }
        if let Some(&next) = self.clusters.get(last + 1) {
            outside.merge(reach.downstream(next));
        }
        // What is neither is on either side, with 0 for the inside and 1 for the outside.
        let mut number: BTreeMap<usize, usize> = BTreeMap::new();
        let mut rest = Clusters::new(2);
        let mut sum = compute;
        for (cost, pins) in &clusters.nets {
            let (mut holds, mut lacks) = (false, false);
            for &p in pins {
                holds |= inside.has(p);
                lacks |= outside.has(p);
            }
            if holds && lacks {
                sum += cost;
                continue;
            }
            let free = |p: &&usize| !inside.has(**p) && !outside.has(**p);
            if !pins.iter().any(|p| free(&p)) {
                continue;
            }
            let mut small: Vec<usize> = pins
                .iter()
                .filter(free)
                .map(|&p| *number.entry(p).or_insert_with(|| rest.push(clusters.accelerator[p])))
                .collect();
            small.extend(holds.then_some(0));
            small.extend(lacks.then_some(1));
            if small.len() > 1 {
                rest.nets.push((*cost, small));
            }
        }
        if !number.is_empty() {
            sum += Network::new(&rest).cheapest(&[0], &[1], f64::MAX).load;
        }
        Some(sum)
    }
}
