//! What no placement can beat, contiguous or not.

use super::clusters::Clusters;
use super::flow::Network;
use super::heavy::{Volume, overloaded};
use super::problem::Devices;

/// A bound this close to the load of a placement, relatively, is not raised any further.
const CLOSE: f64 = 5e-4;

/// A lower bound on the largest load, which rises with the effort.
///
/// Never below what computing alone takes ([`computing`]). Above that, a limit is refuted when some clusters that cannot be
/// apart within it are too heavy together (the cheapest set that holds one cluster and not another is a minimum cut,
/// whatever else is on the device), or when accelerators are overloaded however heavy clusters are spread
/// ([`super::heavy`]).
pub struct Bound<'a> {
    clusters: &'a Clusters,
    devices: Devices,
    network: Network,
    /// No placement has a smaller load.
    pub value: f64,
}

/// The largest load at least, from computing alone: accelerators busy all the time, hosts with what suits them best, and
/// the pieces indivisible.
pub fn computing(clusters: &Clusters, devices: Devices) -> f64 {
    let n = clusters.len();
    let items: Vec<(f64, f64)> = (0..n).map(|v| (clusters.accelerator[v], clusters.host[v])).collect();
    let mut high = items.iter().map(|&(a, h)| if a.is_finite() { a } else { h }).sum::<f64>();
    if overfull(&items, devices, high) {
        // Only hosts, or nothing at all.
        high = items.iter().map(|&(_, h)| h).sum();
        if overfull(&items, devices, high) {
            return f64::INFINITY;
        }
    }
    let mut low = 0.0;
    for _ in 0..60 {
        let limit = 0.5 * (low + high);
        if overfull(&items, devices, limit) { low = limit } else { high = limit }
    }
    low
}

/// Whether items with these times, on an accelerator and on a host, cannot all be done within `limit`.
///
/// # Source
/// Dual feasible functions: where f maps sizes to sizes such that items that fill one bin at most still do, items that
/// are too many after f are too many (Fekete, Schepers, "New classes of fast lower bounds for bin packing problems",
/// Mathematical Programming 2001). A host takes what f makes most of, in fractions.
fn overfull(items: &[(f64, f64)], devices: Devices, limit: f64) -> bool {
    const PARTS: usize = 32;
    if limit <= 0.0 {
        return items.iter().any(|&(a, h)| a.min(if devices.n_hosts > 0 { h } else { a }) > 0.0);
    }
    let room = devices.n_hosts as f64 * limit;
    // Rounding refutes nothing.
    let above = limit * (1.0 + 1e-9);
    let on_accelerator = |a: f64| devices.n_accelerators > 0 && a <= above;
    let eligible = |host: f64| devices.n_hosts > 0 && host <= above;
    let bound: f64 = items.iter().filter(|(a, _)| !on_accelerator(*a)).map(|(_, h)| h).sum();
    if bound > room * (1.0 + 1e-9) || items.iter().any(|&(a, h)| !on_accelerator(a) && !eligible(h)) {
        return true;
    }
    let too_many = |f: &dyn Fn(f64) -> f64| {
        let mut sizes: Vec<(f64, f64)> =
            items.iter().filter(|(a, _)| on_accelerator(*a)).map(|&(a, h)| (f(a / limit), h)).collect();
        let mut left = sizes.iter().map(|(size, _)| size).sum::<f64>() - devices.n_accelerators as f64;
        sizes.retain(|&(size, host)| size > 0.0 && eligible(host));
        sizes.sort_by(|x, y| (y.0 / y.1).total_cmp(&(x.0 / x.1)));
        let mut time = (room - bound).max(0.0);
        for (size, host) in sizes {
            let share = if host > time { time / host } else { 1.0 };
            left -= share * size;
            time -= share * host;
            if time <= 0.0 {
                break;
            }
        }
        left > 1e-9 * devices.n_accelerators.max(1) as f64
    };
    too_many(&|x| x)
        || (1..=PARTS).any(|parts| {
            let parts = parts as f64;
            too_many(&|x| {
                // Sizes a little above a fraction are taken for it: rounding.
                let scaled = x * (parts + 1.0);
                let whole = scaled.floor();
                if scaled - whole <= 1e-9 { x.min(whole / parts) } else { whole / parts }
            })
        })
}

/// The most accelerator time that hosts take over within `limit`.
fn relief(items: &[(f64, f64)], devices: Devices, limit: f64) -> f64 {
    let mut room = devices.n_hosts as f64 * limit;
    let mut useful: Vec<(f64, f64)> = Vec::new();
    for &(accelerator, host) in items {
        if accelerator.is_infinite() {
            room -= host;
        } else if host <= limit * (1.0 + 1e-9) && accelerator > 0.0 {
            useful.push((accelerator, host));
        }
    }
    useful.sort_by(|x, y| (y.0 / y.1).total_cmp(&(x.0 / x.1)));
    let mut sum = 0.0;
    for (accelerator, host) in useful {
        let share = if host > room { (room / host).max(0.0) } else { 1.0 };
        sum += share * accelerator;
        room -= share * host;
    }
    sum
}

impl<'a> Bound<'a> {
    pub fn new(clusters: &'a Clusters, devices: Devices) -> Self {
        Self { clusters, devices, network: Network::new(clusters), value: computing(clusters, devices) }
    }

    /// Raises the bound: to the incumbent where nothing is better, otherwise by bisection.
    ///
    /// `incumbent` is the load of `sets`, the clusters on each accelerator of some placement. `effort` is in looks at arcs
    /// of networks; what is left of it is returned: nothing when more might have helped.
    pub fn raise(
        &mut self,
        incumbent: f64,
        sets: &[Vec<bool>],
        mut effort: u64,
        stop: &mut dyn FnMut() -> bool,
    ) -> u64 {
        if !incumbent.is_finite() || self.clusters.is_empty() || self.value >= incumbent {
            return effort;
        }
        // Rounding of sums must not refute the incumbent's own load.
        if self.refutes(incumbent * (1.0 - 1e-8), sets, &mut effort, stop) {
            self.value = incumbent;
        }
        let mut high = incumbent;
        while high - self.value > CLOSE * high && effort > 0 && !stop() {
            let limit = 0.5 * (self.value + high);
            if self.refutes(limit, sets, &mut effort, stop) { self.value = limit } else { high = limit }
        }
        effort
    }

    /// Whether no placement has all loads within `limit`. False when not shown, or when `stop` says so.
    fn refutes(&self, limit: f64, sets: &[Vec<bool>], effort: &mut u64, stop: &mut dyn FnMut() -> bool) -> bool {
        let mut network = self.network.clone();
        network.left = *effort;
        let refuted = self.searched(limit, sets, &mut network, stop);
        *effort = network.left;
        refuted
    }

    fn searched(&self, limit: f64, sets: &[Vec<bool>], network: &mut Network, stop: &mut dyn FnMut() -> bool) -> bool {
        let n = self.clusters.len();
        let within = limit * (1.0 + 1e-10);
        let mut group: Vec<usize> = (0..n).collect();
        let mut host = self.clusters.host.clone();
        let mut witnesses: Vec<Vec<bool>> = sets.iter().filter(|w| self.load(w) <= limit).cloned().collect();
        let on_host = |time: f64| self.devices.n_hosts > 0 && time <= within;
        let mut nets: Vec<&(f64, Vec<usize>)> = self.clusters.nets.iter().collect();
        nets.sort_by(|a, b| b.0.total_cmp(&a.0));
        loop {
            let mut joined = false;
            for (_, pins) in &nets {
                for &p in &pins[1..] {
                    let (u, v) = (group[pins[0]], group[p]);
                    if u == v {
                        continue;
                    }
                    if network.left == 0 || stop() {
                        return false;
                    }
                    let (hu, hv) = (on_host(host[u]), on_host(host[v]));
                    if hu && hv && self.devices.n_hosts > 1 {
                        continue;
                    }
                    let mut alone = |a: usize, b: usize| {
                        if witnesses.iter().any(|w| w[a] && !w[b]) {
                            return true;
                        }
                        if self.devices.n_accelerators == 0 {
                            return false;
                        }
                        let found = network.cheapest(&[a], &[b], within);
                        let exists = found.load <= within;
                        if exists {
                            witnesses.push(found.members);
                        }
                        exists
                    };
                    let apart = if hu && hv {
                        alone(u, v) || alone(v, u)
                    } else {
                        let first = alone(u, v);
                        if first && hv { true } else { (first || hu) && alone(v, u) }
                    };
                    if !apart {
                        network.join(u, v);
                        let (keep, gone) = (u.min(v), u.max(v));
                        host[keep] += host[gone];
                        group.iter_mut().filter(|g| **g == gone).for_each(|g| *g = keep);
                        witnesses.retain(|w| w[u] == w[v]);
                        joined = true;
                    }
                }
            }
            if !joined {
                break;
            }
        }
        let groups: Vec<usize> = (0..n).filter(|&v| group[v] == v).collect();
        let too_heavy = |&v: &usize| {
            !on_host(host[v])
                && !witnesses.iter().any(|w| w[v])
                && (self.devices.n_accelerators == 0 || network.cheapest(&[v], &[], within).load > within)
        };
        groups.iter().any(too_heavy) || {
            let mut accelerator = vec![0.0; n];
            (0..n).for_each(|v| accelerator[group[v]] += self.clusters.accelerator[v]);
            let items: Vec<(f64, f64)> = groups.iter().map(|&g| (accelerator[g], host[g])).collect();
            overfull(&items, self.devices, limit) || {
                let mut heavy: Vec<usize> = groups.into_iter().filter(|&g| !on_host(host[g])).collect();
                heavy.sort_by(|&a, &b| accelerator[b].total_cmp(&accelerator[a]));
                let volume = Volume {
                    n_accelerators: self.devices.n_accelerators,
                    limit: within,
                    total: items.iter().map(|i| i.0).filter(|a| a.is_finite()).sum(),
                    relief: relief(&items, self.devices, limit),
                };
                overloaded(network, &heavy, &volume, stop)
            }
        }
    }

    fn load(&self, set: &[bool]) -> f64 {
        let clusters = self.clusters;
        let time: f64 = (0..set.len()).filter(|&v| set[v]).map(|v| clusters.accelerator[v]).sum();
        let cut = |pins: &[usize]| pins.iter().any(|&p| set[p]) && !pins.iter().all(|&p| set[p]);
        time + clusters.nets.iter().filter(|(_, pins)| cut(pins)).map(|(cost, _)| cost).sum::<f64>()
    }
}
