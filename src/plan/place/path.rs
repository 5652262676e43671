//! A latency that no choice of blocks can beat: along one path, everything waits for everything before.

use super::bits::Bits;
use super::clusters::Clusters;
use super::problem::{Problem, adjacency};
use super::stream::Stream;

/// Clusters whose reachability is worked out; larger graphs get the bound without blocks.
const MOST: usize = 6000;

/// Stretch of a path: clusters and the host time of the path's ops in each.
struct Path {
    clusters: Vec<usize>,
    host: Vec<f64>,
}

/// A lower bound on the latency of the problem, whose stream this is.
///
/// A path is cut into stretches by the blocks it runs through: a block is convex, so it holds one stretch of the path, and
/// with it all that lies between the ends of the stretch. It holds nothing that comes before the op ahead of the stretch
/// or after the op behind it, so tensors from there are transferred. The cheapest way to cut the path, with at most as
/// many blocks as accelerators and no block above their memory, is found by dynamic programming.
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
    let after = adjacency(n, stream.edges.iter().copied());
    let before = adjacency(n, stream.edges.iter().map(|&(a, b)| (b, a)));
    let closure = |near: &[Vec<usize>], order: &mut dyn Iterator<Item = usize>| {
        let mut out = vec![Bits::new(n); n];
        for v in order {
            let mut set = Bits::new(n);
            set.set(v);
            near[v].iter().for_each(|&w| set.merge(&out[w]));
            out[v] = set;
        }
        out
    };
    let downstream = closure(&after, &mut (0..n).rev());
    let upstream = closure(&before, &mut (0..n));
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
        match along(&path, &stream.clusters, &downstream, &upstream, devices.n_accelerators, devices.memory, stop) {
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

/// The fastest way along one path; `None` when `stop` says so.
fn along(
    path: &Path,
    clusters: &Clusters,
    downstream: &[Bits],
    upstream: &[Bits],
    n_accelerators: usize,
    memory: f64,
    stop: &mut dyn FnMut() -> bool,
) -> Option<f64> {
    let n = path.clusters.len();
    let k = n_accelerators.min(n);
    let nothing = Bits::new(clusters.len());
    // By end and number of blocks.
    let mut time = vec![vec![f64::INFINITY; k + 1]; n + 1];
    time[0] = vec![0.0; k + 1];
    for first in 0..n {
        if stop() {
            return None;
        }
        for a in 0..=k {
            let host = time[first][a] + path.host[first];
            time[first + 1][a] = time[first + 1][a].min(host);
        }
        let ahead = if first == 0 { &nothing } else { &upstream[path.clusters[first - 1]] };
        for last in first..n {
            let inside = downstream[path.clusters[first]].common(&upstream[path.clusters[last]]);
            let sum = |values: &[f64]| inside.iter().map(|v| values[v]).sum::<f64>();
            let (compute, bytes) = (sum(&clusters.accelerator), sum(&clusters.bytes));
            if compute.is_infinite() || bytes > memory {
                break;
            }
            let behind = if last + 1 == n { &nothing } else { &downstream[path.clusters[last + 1]] };
            let crosses = |pins: &[usize]| {
                pins.iter().any(|&p| inside.has(p)) && pins.iter().any(|&p| ahead.has(p) || behind.has(p))
            };
            let transfers: f64 = clusters.nets.iter().filter(|(_, pins)| crosses(pins)).map(|(cost, _)| cost).sum();
            for a in 0..k {
                let block = time[first][a] + compute + transfers;
                time[last + 1][a + 1] = time[last + 1][a + 1].min(block);
            }
        }
    }
    time[n].iter().copied().min_by(f64::total_cmp)
}
