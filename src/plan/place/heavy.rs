//! Where heavy clusters go decides what light ones can still do: a bound from every way to spread the heavy ones.

use super::flow::Network;

/// Heavy clusters considered at most: all their subsets are.
const MOST: usize = 16;
/// Sets of heavy clusters that one accelerator may hold, at most.
const SETS: usize = 500;
/// Steps towards the best rate for one set.
const RATES: usize = 6;
/// A rate at which nets hardly count.
const HIGH: f64 = 1e3;

/// What there is to be done within a limit.
#[derive(Clone, Copy, Debug)]
pub struct Volume {
    pub n_accelerators: usize,
    pub limit: f64,
    /// Accelerator time of all clusters that run on accelerators.
    pub total: f64,
    /// Most of it that hosts can take over within the limit.
    pub relief: f64,
}

/// Whether there is no way to spread clusters `heavy`, which no host can take within the limit, such that accelerators
/// have room for all the work. False when not shown, or when `stop` says so.
///
/// An accelerator that holds the set X of heavy clusters and no other heavy one carries at least a minimum cut that parts
/// X from the others. Thus there is a most that it can compute within the limit, and the sum over all accelerators must
/// reach the total for at least one partition of the heavy clusters.
///
/// `heavy` begins with the heaviest; as many of them are used as there is effort for.
///
/// # Complexity
/// A few minimum cuts for every set that one accelerator can hold; then O(2^h · sets · accelerators) additions for h heavy
/// clusters.
pub fn overloaded(network: &mut Network, heavy: &[usize], volume: &Volume, stop: &mut dyn FnMut() -> bool) -> bool {
    let Some((n, sets)) = held(network, heavy, volume.limit, stop) else { return false };
    let heavy = &heavy[..n];
    let mut most = Vec::with_capacity(sets.len());
    for &set in &sets {
        if network.left == 0 || stop() {
            return false;
        }
        let (inside, outside): (Vec<usize>, Vec<usize>) = (0..n).partition(|&i| set >> i & 1 == 1);
        let of = |list: Vec<usize>| list.into_iter().map(|i| heavy[i]).collect::<Vec<_>>();
        most.push((set, computes(network, &of(inside), &of(outside), volume.limit)));
    }
    let spread = spread(n, &most, volume.n_accelerators);
    spread + volume.relief < volume.total * (1.0 - 1e-9)
}

/// Sets of the first so many heavy clusters that one accelerator can hold, as bits; the number is the largest affordable.
///
/// What cannot be held stays so when more is added.
fn held(
    network: &mut Network,
    heavy: &[usize],
    limit: f64,
    stop: &mut dyn FnMut() -> bool,
) -> Option<(usize, Vec<u32>)> {
    network.rate(-1.0);
    let mut sets = vec![0_u32];
    for n in 0..heavy.len().min(MOST) {
        let before = sets.len();
        for i in 0..before {
            let set = sets[i] | 1 << n;
            // Without one of the others it must be held too.
            let parts_held =
                (0..n).filter(|&j| set >> j & 1 == 1).all(|j| sets.binary_search(&(set & !(1 << j))).is_ok());
            if !parts_held {
                continue;
            }
            if network.left == 0 || stop() {
                return None;
            }
            let inside: Vec<usize> = (0..=n).filter(|&j| set >> j & 1 == 1).map(|j| heavy[j]).collect();
            if network.cheapest(&inside, &[], limit).load <= limit {
                sets.push(set);
            }
        }
        if sets.len() > SETS {
            sets.truncate(before);
            return Some((n, sets));
        }
    }
    Some((heavy.len().min(MOST), sets))
}

/// The most accelerator time of clusters that one accelerator can hold within the limit, with all of `inside` and none of
/// `outside`; negative infinity when there are none.
///
/// For clusters S of accelerator time a(S) whose nets cost c(S), and for a rate r above -1, let C be the least of
/// c(S) - r a(S) over all S: a minimum cut. From a(S) + c(S) <= limit follows a(S) <= (limit - C) / (1 + r). The best r is
/// found like an edge of a hull: between an S that is within the limit and one that is not.
fn computes(network: &mut Network, inside: &[usize], outside: &[usize], limit: f64) -> f64 {
    let mut at = |rate: f64| {
        network.rate(rate);
        let found = network.cheapest(inside, outside, f64::MAX);
        let (time, cost) = network.sums(&found.members);
        (found.load - network.offset, time, cost)
    };
    let (least, mut time, mut cost) = at(-1.0);
    if least > limit * (1.0 + 1e-9) {
        return f64::NEG_INFINITY;
    }
    let (least, mut more, mut dear) = at(HIGH);
    let mut most = (limit - least) / (1.0 + HIGH);
    if more + dear <= limit {
        return most;
    }
    for _ in 0..RATES {
        let rate = (dear - cost) / (more - time);
        if !(rate > -1.0 && rate.is_finite()) {
            break;
        }
        let (least, a, c) = at(rate);
        most = most.min((limit - least) / (1.0 + rate));
        if least >= cost - rate * time - 1e-9 * limit {
            break;
        }
        if a + c <= limit { (time, cost) = (a, c) } else { (more, dear) = (a, c) }
    }
    most
}

/// The largest sum of what accelerators compute, over partitions of `n` heavy clusters; negative infinity without one.
fn spread(n: usize, most: &[(u32, f64)], n_accelerators: usize) -> f64 {
    let idle = most.iter().find(|m| m.0 == 0).map_or(0.0, |m| m.1.max(0.0));
    let all = (1_u32 << n) - 1;
    let mut sum = vec![f64::NEG_INFINITY; 1 << n];
    sum[0] = 0.0;
    let mut best = f64::NEG_INFINITY;
    for used in 0..=n_accelerators.min(n) {
        best = best.max(sum[all as usize] + (n_accelerators - used) as f64 * idle);
        let mut next = vec![f64::NEG_INFINITY; 1 << n];
        for (taken, &so_far) in sum.iter().enumerate().filter(|(_, s)| **s > f64::NEG_INFINITY) {
            let taken = taken as u32;
            let first = (!taken).trailing_zeros();
            for &(set, time) in most.iter().filter(|m| m.0 & taken == 0 && m.0 >> first & 1 == 1) {
                let slot = &mut next[(taken | set) as usize];
                *slot = slot.max(so_far + time);
            }
        }
        sum = next;
    }
    best
}
