//! In which order the devices of a replica stand along the line.

use super::line::Line;
use super::partition::Rule;
use crate::plan::fixed::Target;
use crate::plan::problem::Problem;
use crate::topology::Device;

/// Devices whose measured figures differ by no more than this share are taken for equals: it is less than they vary by.
const ALIKE: f64 = 0.03;
/// Up to so many devices all orders are looked at.
const FEW: usize = 4;
/// Up to so many devices orders are improved by swapping two.
const SWAPPED: usize = 24;
/// Stages that all swaps together may look at.
const LOOKED_AT: usize = 4_000_000;

/// Orders of a replica's devices worth trying. `targets`: parts that have a certain shard or device, in the order of the
/// line.
pub(in crate::plan) fn device_orders(problem: &Problem<'_>, targets: &[(usize, Target)]) -> Vec<Vec<usize>> {
    let n = problem.n_shards as usize;
    let devices: &[Device] = &problem.topology.devices[..n];
    let identity: Vec<usize> = (0..n).collect();
    let one_place = problem.topology.slowed.is_empty()
        && (problem.topology.local == problem.topology.remote || devices.iter().all(|d| d.node == devices[0].node));
    // Devices that are wanted, in the order in which they have to stand.
    let mut wanted: Vec<usize> = Vec::new();
    for (_, target) in targets {
        if let Target::Device(device) = target
            && !wanted.contains(device)
        {
            wanted.push(*device);
        }
    }
    if wanted.is_empty() && one_place && devices.iter().all(|d| alike(d, &devices[0])) {
        return vec![identity];
    }
    if n <= FEW {
        return permutations(n);
    }
    let speed = |d: usize| (devices[d].flops * devices[d].speed).0;
    let mut by_speed = identity.clone();
    by_speed.sort_by(|&a, &b| speed(b).total_cmp(&speed(a)));
    let reversed: Vec<usize> = by_speed.iter().rev().copied().collect();
    let mut orders = vec![identity, by_speed, reversed];
    if !one_place {
        // Neighbours on one node, where links are short.
        for order in orders.clone() {
            let first = |node: &str| order.iter().position(|&d| devices[d].node == node);
            let mut together = order.clone();
            together.sort_by_key(|&d| first(&devices[d].node));
            orders.push(together);
        }
    }
    // Those that are wanted take each other's places.
    for order in &mut orders {
        let places: Vec<usize> = (0..n).filter(|&i| wanted.contains(&order[i])).collect();
        places.into_iter().zip(&wanted).for_each(|(place, &device)| order[place] = device);
    }
    let mut seen: Vec<Vec<usize>> = Vec::new();
    orders.retain(|order| {
        let new = !seen.contains(order);
        seen.push(order.clone());
        new
    });
    orders
}

impl Line<'_> {
    /// Swaps devices in an order as long as the best cut for it gets better by the rule; `None` where nothing does.
    pub(super) fn swapped(&self, problem: &Problem<'_>, order: &[usize], m: f64) -> Option<Vec<usize>> {
        let n = order.len();
        let devices = &problem.topology.devices;
        if n <= FEW || n > SWAPPED {
            return None;
        }
        let mut tries = LOOKED_AT / (self.begins.len() * self.begins.len()).max(1);
        let value = |order: &[usize]| self.partition(problem, order, Rule::Fill, m).map(|cut| cut.value);
        let (mut best, mut order) = (value(order)?, order.to_vec());
        let first = best;
        loop {
            let before = best;
            for i in 0..n {
                for j in i + 1..n {
                    let (a, b) = (&devices[order[i]], &devices[order[j]]);
                    if alike(a, b) && a.node == b.node && problem.topology.slowed.is_empty() {
                        continue;
                    }
                    let Some(left) = tries.checked_sub(1) else { return (best < first).then_some(order) };
                    tries = left;
                    order.swap(i, j);
                    match value(&order).filter(|v| *v < 0.999 * best) {
                        Some(v) => best = v,
                        None => order.swap(i, j),
                    }
                }
            }
            if best == before {
                return (best < first).then_some(order);
            }
        }
    }
}

/// Whether two devices are so near to each other that changing them gains nothing.
pub(super) fn alike(a: &Device, b: &Device) -> bool {
    let near = |a: f64, b: f64| (a - b).abs() <= ALIKE * a.abs().max(b.abs());
    let (m, n) = (a.measured.unwrap_or_default(), b.measured.unwrap_or_default());
    a.kind == b.kind
        && a.memory == b.memory
        && near((a.flops * a.speed).0 / m.product, (b.flops * b.speed).0 / n.product)
        && near(a.bandwidth.0 * a.speed / m.memory, b.bandwidth.0 * b.speed / n.memory)
}

fn permutations(n: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for _ in 0..n {
        all = all
            .into_iter()
            .flat_map(|p: Vec<usize>| {
                (0..n).filter(|i| !p.contains(i)).map(|i| [p.clone(), vec![i]].concat()).collect::<Vec<_>>()
            })
            .collect();
    }
    all
}
