//! How many devices a plan takes: as many as make it best, or a step cheapest.
//!
//! More devices are not always faster: there is more to send, and a pipeline takes longer to fill. What makes a plan good is
//! said by its [`Aim`](super::Aim).

use std::ops::RangeInclusive;

use super::aim::Cost;
use super::problem::{Infeasible, Problem};
use super::{GAIN, Objective, Plan, Prepared};
use crate::topology::{Device, DeviceId, Topology};
use crate::units::Seconds;

/// Numbers of shards up to which all of a range are tried.
const ALL: u32 = 16;

/// Which number of devices is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Wanted {
    /// The one with the best plan; of plans that are about as good, the one on the fewest devices.
    #[default]
    Best,
    /// The one with the lowest price of a step, of those that make at least so many steps a second.
    Cheapest { floor: f64 },
}

/// A plan with so many shards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offer {
    pub n_shards: u32,
    /// What the plan is for.
    pub objective: Objective,
    /// By what it is for.
    pub cost: Cost,
    pub step: Seconds,
    /// Of one step, in units of [`Device::price`](crate::topology::Device::price) times seconds.
    pub price: f64,
}

impl Offer {
    /// # Shapes
    /// `topology`: the devices that the plan names.
    pub fn of(objective: Objective, topology: &Topology, plan: &Plan) -> Self {
        let devices = plan.shards.iter().flat_map(|s| &s.devices);
        let price: f64 = devices.map(|d| topology.devices[d.index()].price).sum();
        Self {
            n_shards: plan.shards.len() as u32,
            objective,
            cost: objective.cost(topology, plan),
            step: plan.step_time,
            price: price * plan.step_time.0,
        }
    }
}

/// The best of what a range of shards offers.
#[derive(Clone, Debug)]
pub struct Counted<T> {
    pub found: T,
    pub wanted: Wanted,
    pub chosen: Offer,
    /// All that were looked at, by their number of shards.
    pub offers: Vec<Offer>,
}

impl<T> Counted<T> {
    /// Why it is this number, for the log; `None` where there was no choice.
    pub fn why(&self) -> Option<String> {
        let n_shards = self.chosen.n_shards;
        let for_room = self.wanted == Wanted::Best && self.chosen.objective == Objective::Memory;
        let value = |o: &Offer| match for_room {
            true => format!("{:.2} % of its memory", 100.0 * o.cost.first()),
            false => o.step.to_string(),
        };
        let what = if for_room { "the fullest worker is predicted to need" } else { "a step is predicted to take" };
        let others = self.offers.iter().filter(|o| o.n_shards != n_shards);
        let others: Vec<String> = others.map(|o| format!("{} with {}", value(o), o.n_shards)).collect();
        let plural = if n_shards == 1 { "" } else { "s" };
        let text = format!("{n_shards} shard{plural}: {what} {}, {}", value(&self.chosen), others.join(", "));
        (!others.is_empty()).then_some(text)
    }
}

/// Plans with every number of shards of a range, on the devices that are best for what is wanted, and takes the best plan.
///
/// `problem.n_shards` does not matter.
///
/// # Errors
/// Those of [`best`].
/// # Complexity
/// That of [`best`], with one call of [`solve`](super::solve()) for each plan, or two where there are several nodes.
pub fn choose(
    prepared: &Prepared,
    problem: &Problem<'_>,
    range: RangeInclusive<u32>,
    wanted: Wanted,
) -> Result<Counted<Plan>, Infeasible> {
    best(range, wanted, |n_shards| {
        let n = n_shards.saturating_mul(problem.n_replicas) as usize;
        let mut found: Option<Plan> = None;
        let mut refusal = None;
        for devices in picks(problem.topology, n, wanted) {
            let topology = problem.topology.of(&devices);
            match prepared.solve(&Problem { topology: &topology, n_shards, ..*problem }, None) {
                Ok(mut plan) => {
                    let all = plan.shards.iter_mut().flat_map(|s| &mut s.devices);
                    all.for_each(|d| *d = DeviceId(devices[d.index()] as u32));
                    if found.as_ref().is_none_or(|known| problem.prefers(&plan, known)) {
                        found = Some(plan);
                    }
                }
                Err(e) => drop(refusal.get_or_insert(e)),
            }
        }
        let refused = || refusal.unwrap_or(Infeasible::Nothing { n_shards, n_replicas: problem.n_replicas });
        let plan = found.ok_or_else(refused)?;
        let offer = Offer::of(problem.aim.objective, problem.topology, &plan);
        Ok((plan, offer))
    })
}

/// Which devices may be worth taking where not all are wanted, each in the order they are listed: the best ones, and the best
/// of as few nodes as possible.
fn picks(topology: &Topology, n: usize, wanted: Wanted) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..topology.devices.len()).collect();
    if n >= all.len() {
        return vec![all];
    }
    let worth = |d: &Device| {
        let speed = (d.flops * d.speed).0;
        if wanted == Wanted::Best { speed } else { speed / d.price.max(f64::MIN_POSITIVE) }
    };
    let worth: Vec<f64> = topology.devices.iter().map(worth).collect();
    let mut by_worth = all.clone();
    by_worth.sort_by(|&a, &b| worth[b].total_cmp(&worth[a]));
    let node = |d: usize| topology.devices[d].node.as_str();
    // What a node's best devices are worth together.
    let of_node = |d: usize| by_worth.iter().filter(|&&o| node(o) == node(d)).take(n).map(|&o| worth[o]).sum::<f64>();
    let of_nodes: Vec<f64> = all.iter().map(|&d| of_node(d)).collect();
    let mut together = by_worth.clone();
    together.sort_by(|&a, &b| of_nodes[b].total_cmp(&of_nodes[a]).then_with(|| node(a).cmp(node(b))));
    let mut picks: Vec<Vec<usize>> = [by_worth, together].into_iter().map(|order| order[..n].to_vec()).collect();
    picks.iter_mut().for_each(|pick| pick.sort_unstable());
    picks.dedup();
    picks
}

/// Takes the number of shards that is wanted. `of`: a plan with so many shards, and what it offers.
///
/// # Errors
/// [`Infeasible::Floor`] where no plan makes as many steps as are asked for; what the largest number of shards meets where
/// none of them has a plan.
/// # Complexity
/// That of one plan for each number, up to 16; with more of them of about twice the logarithm.
pub fn best<T>(
    range: RangeInclusive<u32>,
    wanted: Wanted,
    mut of: impl FnMut(u32) -> Result<(T, Offer), Infeasible>,
) -> Result<Counted<T>, Infeasible> {
    let mut found: Vec<(Offer, T)> = Vec::new();
    let mut refusal = None;
    let mut ask = |n: u32, found: &mut Vec<(Offer, T)>| match of(n) {
        Ok((plan, offer)) => found.push((offer, plan)),
        Err(e) => drop(refusal.get_or_insert(e)),
    };
    let mut asked = numbers(&range);
    // The largest first: what it refuses is what is said.
    asked.iter().rev().for_each(|&n| ask(n, &mut found));
    // Between numbers far apart: those next to the best, nearer and nearer.
    while let Some(at) = chosen(&found, wanted).and_then(|i| asked.binary_search(&found[i].0.n_shards).ok()) {
        let between = |a: Option<&u32>, b: Option<&u32>| Some((*a? + *b?) / 2);
        let below = at.checked_sub(1).and_then(|below| between(asked.get(below), asked.get(at)));
        let above = between(asked.get(at), asked.get(at + 1));
        let new: Vec<u32> = [below, above].into_iter().flatten().filter(|n| asked.binary_search(n).is_err()).collect();
        if new.is_empty() {
            break;
        }
        for n in new {
            ask(n, &mut found);
            let place = asked.partition_point(|&known| known < n);
            asked.insert(place, n);
        }
    }
    found.sort_by_key(|(offer, _)| offer.n_shards);
    let offers: Vec<Offer> = found.iter().map(|(offer, _)| *offer).collect();
    if let Some(i) = chosen(&found, wanted) {
        let (chosen, found) = found.swap_remove(i);
        return Ok(Counted { found, wanted, chosen, offers });
    }
    let fastest = offers.iter().min_by(|a, b| a.step.0.total_cmp(&b.step.0));
    Err(match (fastest, wanted) {
        (Some(&Offer { n_shards, step, .. }), Wanted::Cheapest { floor }) => {
            Infeasible::Floor { floor, n_shards, step }
        }
        _ => refusal.unwrap_or(Infeasible::Nothing { n_shards: *range.end(), n_replicas: 1 }),
    })
}

/// Numbers that are asked for first, ascending: all of a short range, a quarter apart in a long one.
fn numbers(range: &RangeInclusive<u32>) -> Vec<u32> {
    let (least, most) = (*range.start(), *range.end());
    if most.saturating_sub(least) < ALL {
        return range.clone().collect();
    }
    let mut numbers = vec![least];
    while let Some(&last) = numbers.last().filter(|&&last| last < most) {
        numbers.push(last.saturating_add((last / 4).max(1)).min(most));
    }
    numbers
}

/// Position of the best.
fn chosen<T>(found: &[(Offer, T)], wanted: Wanted) -> Option<usize> {
    let floor = match wanted {
        Wanted::Best => 0.0,
        Wanted::Cheapest { floor } => floor,
    };
    let offers = || found.iter().map(|(o, _)| o).enumerate().filter(|(_, o)| o.step.0 * floor <= 1.0);
    let order = |a: &Offer, b: &Offer| match wanted {
        Wanted::Best => a.cost.total_cmp(&b.cost),
        Wanted::Cheapest { .. } => a.price.total_cmp(&b.price),
    };
    let best = offers().map(|(_, o)| o).min_by(|a, b| order(a, b))?;
    // More devices have to gain more than predictions are good for.
    let near = offers().filter(|(_, o)| match wanted {
        Wanted::Best => !best.cost.is_below(GAIN, o.cost),
        Wanted::Cheapest { .. } => best.price >= GAIN * o.price,
    });
    near.min_by_key(|(_, o)| o.n_shards).map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(n_shards: u32, step: f64) -> Offer {
        let objective = Objective::Throughput;
        Offer { n_shards, objective, cost: Cost::of_step(step), step: Seconds(step), price: f64::from(n_shards) * step }
    }

    fn of(step: impl Fn(u32) -> f64) -> impl FnMut(u32) -> Result<((), Offer), Infeasible> {
        move |n| match step(n) {
            s if s.is_nan() => Err(Infeasible::TooFewOps { n_shards: n, n_parts: 1 }),
            s => Ok(((), offer(n, s))),
        }
    }

    fn n_shards(range: RangeInclusive<u32>, wanted: Wanted, step: impl Fn(u32) -> f64) -> u32 {
        best(range, wanted, of(step)).unwrap().chosen.n_shards
    }

    #[test]
    fn takes_no_more_devices_than_gain_something() {
        let step = |n: u32| 8.0 / f64::from(n) + 0.5 * f64::from(n);
        assert_eq!(n_shards(1..=8, Wanted::Best, step), 4);
        assert_eq!(n_shards(1..=2, Wanted::Best, step), 2);
        assert_eq!(n_shards(5..=8, Wanted::Best, step), 5);
        // The last ones gain less than a hundredth.
        assert_eq!(n_shards(1..=8, Wanted::Best, |n| if n < 3 { 2.0 } else { 1.0 - 1e-4 * f64::from(n) }), 3);
        assert_eq!(n_shards(1..=3, Wanted::Best, |n| if n == 3 { f64::NAN } else { 1.0 }), 1);
    }

    #[test]
    fn finds_the_best_of_a_long_range_without_asking_for_all() {
        for best_of_all in [3u32, 100, 411, 1000] {
            let mut asked = 0;
            let found = best(1..=1000, Wanted::Best, |n| {
                asked += 1;
                Ok(((), offer(n, 1.0 + (f64::from(n) / f64::from(best_of_all)).ln().powi(2))))
            });
            let found = found.unwrap().chosen;
            assert!(found.step.0 < 1.02, "{best_of_all}: {found:?}");
            assert!(asked < 60, "{asked}");
        }
    }

    #[test]
    fn takes_the_cheapest_that_is_fast_enough() {
        let step = |n: u32| 1.0 + 8.0 / f64::from(n);
        // n + 8: the fewest are cheapest.
        assert_eq!(n_shards(1..=8, Wanted::Cheapest { floor: 0.0 }, step), 1);
        assert_eq!(n_shards(1..=8, Wanted::Cheapest { floor: 1.0 / 3.0 }, step), 4);
        let refused = best(1..=8, Wanted::Cheapest { floor: 1.0 }, of(step)).unwrap_err();
        let expected = Infeasible::Floor { floor: 1.0, n_shards: 8, step: Seconds(2.0) };
        assert_eq!(refused, expected);
    }

    #[test]
    fn says_what_the_largest_number_is_refused_for() {
        let refused = best(1..=3, Wanted::Best, of(|_| f64::NAN)).unwrap_err();
        assert_eq!(refused, Infeasible::TooFewOps { n_shards: 3, n_parts: 1 });
    }
}
