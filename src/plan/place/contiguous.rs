//! Stages of a pipeline: every device holds a convex part of the forward half, and the devices are in one line.

use std::collections::BTreeSet;

use super::bound::computing;
use super::lattice::Lattice;
use super::problem::{Device, Devices, Problem, adjacency};
use super::stages::{Chain, Effort, Unfinished, best_chain};
use super::stream::Stream;
use super::{Infeasible, Placement};
use crate::plan::random::Random;

/// First effort for all downsets; each further one is four times as large.
const WHOLE: Effort = Effort { n_downsets: 1 << 17, n_steps: 1 << 28 };
/// Downsets kept at most: a few hundred bytes each.
const MOST: usize = 1 << 21;
/// Effort for a part of the downsets, around what was found.
const PART: Effort = Effort { n_downsets: 20_000, n_steps: 1 << 26 };
/// First limit above the bound; each further one is twice as far.
const FIRST: f64 = 0.005;

/// Finds the best stages.
///
/// The optimum where the graph's downsets are few enough, which is so for networks whose branches are short: limits close
/// to the bound are tried first, because the closer the limit, the fewer downsets leave room on both sides. Otherwise the
/// best that was found until `stop`, with the largest limit that was refuted: stages around those found are improved with
/// downsets near a random order of the graph.
///
/// # Errors
/// [`Infeasible`].
pub fn contiguous(problem: &Problem, stop: &mut dyn FnMut() -> bool) -> Result<Placement, Infeasible> {
    let devices = problem.devices();
    Infeasible::check(problem)?;
    let stream = Stream::new(problem).folded();
    let n = stream.clusters.len();
    let devices = devices.at_most(n);
    let least = computing(&stream.clusters, devices);
    let mut search = Search {
        stream: &stream,
        devices,
        computing: least,
        refuted: 0.0,
        bound: least,
        best: None,
        random: Random::new(n as u64),
        width: 4,
    };
    // A line has few downsets, and gives the search for all of them an end.
    let line = search.order();
    let _ = search.climb(&line, 1, &mut PART.clone(), stop);
    let whole: Vec<usize> = (0..n).collect();
    let mut effort = WHOLE;
    let searched = loop {
        match search.climb(&whole, n, &mut effort.clone(), stop) {
            Ok(()) => break true,
            Err(Unfinished::Stopped) => break false,
            Err(Unfinished::TooMany) => search.improve(effort.n_steps, stop),
        }
        effort.n_steps = effort.n_steps.saturating_mul(4);
        effort.n_downsets = (4 * effort.n_downsets).min(MOST);
    };
    let Some(chain) = search.best else {
        let Devices { n_accelerators, memory, .. } = problem.devices();
        return Err(match searched {
            true => Infeasible::NoStages { n_accelerators, memory },
            false => Infeasible::NotFound { n_accelerators, memory },
        });
    };
    let mut used = (0, 0);
    let of_stage: Vec<Device> = chain
        .accelerated
        .iter()
        .map(|&accelerated| {
            let count = if accelerated { &mut used.0 } else { &mut used.1 };
            *count += 1;
            if accelerated { Device::Accelerator(*count - 1) } else { Device::Host(*count - 1) }
        })
        .collect();
    let device = stream.of.iter().map(|&c| of_stage[chain.stage[c]]).collect();
    Ok(Placement { device, cost: chain.load, bound: search.bound.min(chain.load) })
}

struct Search<'a> {
    stream: &'a Stream,
    devices: Devices,
    /// What computing takes at least.
    computing: f64,
    /// The largest limit that all downsets were searched for in vain.
    refuted: f64,
    bound: f64,
    /// Stages of the stream's clusters.
    best: Option<Chain>,
    random: Random,
    /// How far downsets of a part may be from a prefix of its order.
    width: usize,
}

impl Search<'_> {
    /// Raises the limit until there are stages within it, or until it reaches what is known.
    ///
    /// Only downsets that differ from a prefix of `order` by less than `width` clusters are considered; with all of them,
    /// the bound rises too.
    fn climb(
        &mut self,
        order: &[usize],
        width: usize,
        effort: &mut Effort,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<(), Unfinished> {
        let n = order.len();
        let stream = self.stream.reordered(order);
        let edges = banded(&stream.edges, n, width);
        let lattice = Lattice::new(&stream.clusters, &edges);
        let total = lattice.total();
        // All on one device, however that is done, with all tensors transferred.
        let last = 2.0 * (total.accelerator + total.host + lattice.transfers()) + f64::MIN_POSITIVE;
        let lowest = self.computing.max(1e-9 * last);
        let mut gap = FIRST;
        while width >= n && lowest * (1.0 + gap) <= self.refuted {
            gap *= 2.0;
        }
        loop {
            let known = self.best.as_ref().map_or(last, |chain| chain.load);
            let limit = (lowest * (1.0 + gap)).min(known);
            let found = best_chain(&lattice, self.devices, limit, effort, stop)?;
            let all = width >= n;
            if let Some(chain) = found {
                let mut stage = vec![0; n];
                order.iter().zip(chain.stage).for_each(|(&v, s)| stage[v] = s);
                if all {
                    self.bound = chain.load;
                }
                self.best = Some(Chain { stage, ..chain });
                return Ok(());
            }
            if all {
                self.refuted = limit;
                self.bound = self.bound.max(limit);
            }
            if limit >= known {
                return Ok(());
            }
            gap *= 2.0;
        }
    }

    /// Improves the stages with more and more downsets around random orders.
    fn improve(&mut self, n_steps: u64, stop: &mut dyn FnMut() -> bool) {
        let mut left = n_steps;
        let mut idle = 0;
        while left > 0 && !stop() {
            let before = self.best.as_ref().map(|chain| chain.load);
            let order = self.order();
            let mut effort = Effort { n_steps: PART.n_steps.min(left), ..PART };
            let budget = effort.n_steps;
            let result = self.climb(&order, self.width, &mut effort, stop);
            left -= (budget - effort.n_steps).max(1);
            match result {
                Err(Unfinished::Stopped) => return,
                Err(Unfinished::TooMany) => self.width = (self.width / 2).max(1),
                Ok(()) if before.is_none() || self.best.as_ref().map(|chain| chain.load) < before => idle = 0,
                Ok(()) => idle += 1,
            }
            if idle > 8 {
                (self.width, idle) = (2 * self.width, 0);
            }
        }
    }

    /// A random order that goes downstream, and from stage to stage of what was found.
    fn order(&mut self) -> Vec<usize> {
        let n = self.stream.clusters.len();
        let after = adjacency(n, self.stream.edges.iter().copied());
        let mut waits = vec![0; n];
        self.stream.edges.iter().for_each(|&(_, b)| waits[b] += 1);
        let stage = |v: usize| self.best.as_ref().map_or(0, |chain| chain.stage[v]);
        // Depth first keeps branches together, which suits transfers.
        let deep = self.random.below(2) == 0;
        let mut clock = u64::MAX / 2;
        let mut ready = BTreeSet::new();
        let mut key = |random: &mut Random| {
            clock -= 1;
            if deep { clock } else { random.bits() }
        };
        for v in (0..n).filter(|&v| waits[v] == 0) {
            ready.insert((stage(v), key(&mut self.random), v));
        }
        let mut order = Vec::with_capacity(n);
        while let Some((_, _, v)) = ready.pop_first() {
            order.push(v);
            let mut next = after[v].clone();
            self.random.shuffle(&mut next);
            for w in next {
                waits[w] -= 1;
                if waits[w] == 0 {
                    ready.insert((stage(w), key(&mut self.random), w));
                }
            }
        }
        order
    }
}

/// Edges, and those that keep a downset within `width` of a prefix.
pub(super) fn banded(edges: &[(usize, usize)], n: usize, width: usize) -> Vec<(usize, usize)> {
    let mut edges = edges.to_vec();
    edges.extend((width.max(1)..n).map(|i| (i - width.max(1), i)));
    edges.sort_unstable();
    edges.dedup();
    edges
}
