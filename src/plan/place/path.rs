//! A latency that no choice of blocks can beat: along one path, everything waits for everything before.

use super::bits::Bits;
use super::clusters::Clusters;
use super::flow::Network;
use super::problem::{Devices, Problem, adjacency};
use super::stream::Stream;

/// Clusters whose reachability is worked out; larger graphs get the bound without blocks.
const MOST: usize = 6000;

/// Clusters along a path of ops, and the host time of the path's ops in each.
struct Path {
    clusters: Vec<usize>,
    host: Vec<f64>,
}

/// A lower bound on the latency of the problem, whose stream this is.
///
/// A path is cut into stretches by the blocks it runs through: a block is convex, so it holds one stretch of the path, and
/// with it all that lies between the ends of the stretch. It holds nothing that comes before the op ahead of the stretch
/// or after the op behind it, so tensors from there are transferred. The cheapest way to cut the path, with at most as
/// many blocks as accelerators and no block above their memory, is found by dynamic programming. What is neither inside
/// nor outside for sure is put where it costs least: a minimum cut.
pub fn bound(problem: &Problem, stream: &Stream, stop: &mut dyn FnMut() -> bool) -> f64 {
    let n = stream.clusters.len();
    let ops = problem.ops();
    let devices = problem.devices();
    let fastest = |op: usize| match ops[op].accelerator {
        Some(a) if devices.n_accelerators > 0 => a.min(ops[op].host),
        _ => ops[op].host,
    };
    let mut bound = longest(problem, &fastest).0;
    if n > MOST {
        return bound;
    }
    let reach = Reach::new(stream);
    let mut network = Network::new(&stream.clusters);
    let weights: [&dyn Fn(usize) -> f64; 4] =
        [&|op| ops[op].host, &|op| ops[op].transfer, &|op| ops[op].bytes, &|_| 1.0];
    for weight in weights {
        let (_, ops_on_path) = longest(problem, weight);
        let mut path = Path { clusters: Vec::new(), host: Vec::new() };
        for op in ops_on_path {
            let c = stream.of[op];
            match path.host.last_mut().filter(|_| path.clusters.last() == Some(&c)) {
                Some(host) => *host += ops[op].host,
                None => {
                    path.clusters.push(c);
                    path.host.push(ops[op].host);
                }
            }
        }
        match along(&path, &reach, &mut network, devices, stop) {
            Some(b) => bound = bound.max(b),
            None => break,
        }
    }
    bound
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

pub static ROUNDS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
pub static FLOWS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
/// One stretch of the path in one block.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    first: usize,
    last: usize,
    /// What the block takes at least.
    time: f64,
    /// Whether that is the cheapest set with these clusters, or only what is sure.
    exact: bool,
}

/// The fastest way along one path; `None` when `stop` says so.
fn along(
    path: &Path,
    stream: &Reach<'_>,
    network: &mut Network,
    devices: Devices,
    stop: &mut dyn FnMut() -> bool,
) -> Option<f64> {
    let n = path.clusters.len();
    let k = devices.n_accelerators.min(n);
    let clusters = stream.clusters;
    let mut stretches: Vec<Vec<Stretch>> = vec![Vec::new(); n];
    for first in 0..n {
        if stop() {
            return None;
        }
        for last in first..n {
            let (inside, outside) = stream.sides(path, first, last);
            let sum = |values: &[f64]| inside.iter().map(|v| values[v]).sum::<f64>();
            let compute = sum(&clusters.accelerator);
            if compute.is_infinite() || sum(&clusters.bytes) > devices.memory {
                break;
            }
            let crosses = |pins: &[usize]| pins.iter().any(|&p| inside.has(p)) && pins.iter().any(|&p| outside.has(p));
            let transfers: f64 = clusters.nets.iter().filter(|(_, pins)| crosses(pins)).map(|(cost, _)| cost).sum();
            stretches[last].push(Stretch { first, last, time: compute + transfers, exact: false });
        }
    }
    // The cheapest set around a stretch is a minimum cut. It is worked out for the stretches of the best way only, until
    // the best way has no other.
    loop {
        let (time, way) = best_way(path, &stretches, k); ROUNDS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut settled = true;
        for &(last, i) in &way {
            let stretch = &mut stretches[last][i];
            if stretch.exact {
                continue;
            }
            if stop() {
                return Some(time);
            }
            let (inside, outside) = stream.sides(path, stretch.first, stretch.last);
            let (inside, outside): (Vec<usize>, Vec<usize>) = (inside.iter().collect(), outside.iter().collect());
            stretch.time = stretch.time.max(network.cheapest(&inside, &outside, f64::MAX).load);
            stretch.exact = true; FLOWS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            settled = false;
        }
        if settled {
            return Some(time);
        }
    }
}

/// The fastest way through stretches and hosts with at most `k` blocks, and its stretches: last cluster and position.
fn best_way(path: &Path, stretches: &[Vec<Stretch>], k: usize) -> (f64, Vec<(usize, usize)>) {
    let n = path.clusters.len();
    // By end and number of blocks; the stretch that ends there, if it is not a host.
    let mut time = vec![vec![(f64::INFINITY, None); k + 1]; n + 1];
    time[0] = vec![(0.0, None); k + 1];
    for end in 0..n {
        for a in 0..=k {
            let mut best = (time[end][a].0 + path.host[end], None);
            for (i, stretch) in stretches[end].iter().enumerate().filter(|_| a > 0) {
                let through = time[stretch.first][a - 1].0 + stretch.time;
                if through < best.0 {
                    best = (through, Some(i));
                }
            }
            time[end + 1][a] = best;
        }
    }
    let mut way = Vec::new();
    let (mut at, mut a) = (n, k);
    while at > 0 {
        match time[at][a].1 {
            None => at -= 1,
            Some(i) => {
                way.push((at - 1, i));
                at = stretches[at - 1][i].first;
                a -= 1;
            }
        }
    }
    (time[n][k].0, way)
}

/// Who comes before and after whom.
struct Reach<'a> {
    clusters: &'a Clusters,
    /// Every cluster with all before it, and with all after it.
    upstream: Vec<Bits>,
    downstream: Vec<Bits>,
}

impl<'a> Reach<'a> {
    fn new(stream: &'a Stream) -> Self {
        let n = stream.clusters.len();
        let mut upstream: Vec<Bits> = (0..n).map(|v| Bits::of(n, v)).collect();
        let mut downstream = upstream.clone();
        // Edges are sorted and go to larger numbers.
        let mut edges = stream.edges.clone();
        for &(a, b) in edges.iter().rev() {
            let (head, tail) = downstream.split_at_mut(b);
            head[a].merge(&tail[0]);
        }
        edges.sort_unstable_by_key(|&(a, b)| (b, a));
        for &(a, b) in &edges {
            let (head, tail) = upstream.split_at_mut(b);
            tail[0].merge(&head[a]);
        }
        Self { clusters: &stream.clusters, upstream, downstream }
    }

    /// Clusters that a block with this stretch and no more of the path holds for sure, and those it does not hold.
    fn sides(&self, path: &Path, first: usize, last: usize) -> (Bits, Bits) {
        let inside = self.downstream[path.clusters[first]].common(&self.upstream[path.clusters[last]]);
        let mut outside = Bits::new(self.clusters.len());
        if first > 0 {
            outside.merge(&self.upstream[path.clusters[first - 1]]);
        }
        if let Some(&next) = path.clusters.get(last + 1) {
            outside.merge(&self.downstream[next]);
        }
        (inside, outside)
    }
}
