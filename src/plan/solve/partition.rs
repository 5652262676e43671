//! Dynamic programs over ranges of parts.

use super::line::Line;
use crate::plan::ScheduleKind;
use crate::plan::problem::Problem;
use crate::topology::{DeviceId, Link};
use crate::units::{Bytes, Seconds};

/// A plan this much slower than the best may win by sending less.
const SLACK: f64 = 1.03;

/// What a stage is taken to cost. No rule knows the schedule; the simulation of what they find decides between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Computing and transfers, one after the other.
    Sum,
    /// The same, as if all links were those within a node: where only a few are slow, they hide behind others' work.
    Near,
    /// The longest of computing and transfers: they hide behind each other.
    Overlap,
    /// All microbatches, after the pipeline before the stage has filled and before it drains.
    Fill,
    /// Memory, as a share of what the device has: the roomiest cut, where others do not fit.
    Memory,
}

/// Borders (positions in `begins`) between shards.
pub(super) struct Cut {
    /// Of the costliest stage, by the rule.
    pub value: f64,
    pub borders: Vec<usize>,
}

impl Line<'_> {
    /// The best borders by a rule; `None` when no range fits its device.
    ///
    /// `order[s]`: position within a replica of the device that runs shard s. `m`: microbatches of a step.
    pub(super) fn partition(&self, problem: &Problem<'_>, order: &[usize], rule: Rule, m: f64) -> Option<Cut> {
        let n = self.begins.len();
        let n_shards = problem.n_shards as usize;
        let work = |s: usize| &self.work[self.kind[order[s]]];
        let links: Vec<Link> =
            order.windows(2).map(|w| problem.topology.link(DeviceId(w[0] as u32), DeviceId(w[1] as u32))).collect();
        let near = problem.topology.local;
        let link = |s: usize| links.get(s).copied().filter(|_| rule != Rule::Near).unwrap_or(near);
        // Work before a stage, at the mean pace of the shards that have it.
        let mut before: Vec<Vec<f64>> = Vec::new();
        if rule == Rule::Fill {
            let mut sum = vec![0.0; n];
            for s in 0..n_shards {
                before.push(sum.iter().map(|w| w / s.max(1) as f64).collect());
                sum.iter_mut().zip(work(s)).for_each(|(sum, w)| *sum += w.0);
            }
        }
        let stage = |s: usize, from: usize, to: usize| -> Option<Seconds> {
            let device = &problem.topology.devices[order[s]];
            let needs = self.needs(problem, s, from, to);
            if rule == Rule::Memory {
                return Some(Seconds(needs.0 as f64 / device.memory.0.max(1) as f64));
            }
            if needs > device.memory {
                return None;
            }
            let computing = work(s)[to] - work(s)[from];
            let inlet = if from > 0 { link(s - 1).time(self.crossing[from]) } else { Seconds(0.0) };
            let outlet = if to < n { link(s).time(self.crossing[to]) } else { Seconds(0.0) };
            Some(match rule {
                Rule::Overlap => computing.max(inlet).max(outlet),
                Rule::Fill => (computing.max(inlet).max(outlet)) * m + Seconds(before[s][from]) + inlet * s as f64,
                Rule::Sum | Rule::Near | Rule::Memory => computing + inlet + outlet,
            })
        };
        // Stages that compute longer than a limit need not be looked at; where that leaves none, the limit rises.
        let runs = if rule == Rule::Fill { m } else { 1.0 };
        let most = (0..n_shards).map(|s| work(s)[n].0).fold(0.0, f64::max);
        let even = 1.0 / (0..n_shards).map(|s| 1.0 / work(s)[n].0.max(f64::MIN_POSITIVE)).sum::<f64>();
        let everything = |_: usize, _: usize| 0;
        if rule == Rule::Memory {
            let (value, borders) = self.sweep(n_shards, &everything, &stage, &|worst, need, _| worst.max(need))?;
            return Some(Cut { value: value.0, borders });
        }
        let within = |limit: f64| {
            move |s: usize, to: usize| {
                let work = work(s);
                work[..to].partition_point(|w| work[to].0 - w.0 > limit)
            }
        };
        let mut limit = 2.0 * even;
        let bottleneck = loop {
            let found = self.sweep(n_shards, &within(limit), &stage, &|worst, time, _| worst.max(time));
            match found {
                Some((value, _)) if value.0 <= limit * runs => break value,
                _ if limit < most => limit *= 2.0,
                found => break found?.0,
            }
        };
        let limit = bottleneck.0 * SLACK;
        let affordable = |s: usize, from: usize, to: usize| stage(s, from, to).filter(|t| t.0 <= limit);
        let fewest = self.sweep(n_shards, &within(limit / runs), &affordable, &|sum, _, border| {
            sum + Seconds(if border > 0 { self.crossing[border].0 as f64 } else { 0.0 })
        })?;
        Some(Cut { value: bottleneck.0, borders: fewest.1 })
    }

    /// Memory of a stage, about: temporaries and others' params are not known before it is cut.
    fn needs(&self, problem: &Problem<'_>, s: usize, from: usize, to: usize) -> Bytes {
        let in_flight = match problem.schedule {
            ScheduleKind::OneFOneB => u64::from(problem.n_shards) - s as u64,
            ScheduleKind::GPipe => u64::MAX,
        };
        self.state[to] - self.state[from] + (self.residuals[to] - self.residuals[from]) * in_flight.min(8)
    }

    /// The dynamic program: best value over the first parts with the first shards. `first`: where a stage of a shard
    /// that ends at a border can begin at the earliest.
    fn sweep(
        &self,
        n_shards: usize,
        first: &dyn Fn(usize, usize) -> usize,
        stage: &dyn Fn(usize, usize, usize) -> Option<Seconds>,
        combine: &dyn Fn(Seconds, Seconds, usize) -> Seconds,
    ) -> Option<(Seconds, Vec<usize>)> {
        let n = self.begins.len();
        let mut best: Vec<Vec<Option<(Seconds, usize)>>> = vec![vec![None; n + 1]; n_shards + 1];
        best[0][0] = Some((Seconds(0.0), 0));
        for s in 0..n_shards {
            for to in s + 1..=n - (n_shards - s - 1) {
                for from in first(s, to).max(s)..to {
                    let Some((so_far, _)) = best[s][from] else { continue };
                    let Some(time) = stage(s, from, to) else { continue };
                    let value = combine(so_far, time, from);
                    if best[s + 1][to].is_none_or(|(b, _)| value.0 < b.0) {
                        best[s + 1][to] = Some((value, from));
                    }
                }
            }
        }
        let (value, _) = best[n_shards][n]?;
        let mut borders = Vec::with_capacity(n_shards - 1);
        let mut to = n;
        for s in (1..=n_shards).rev() {
            to = best[s][to]?.1;
            if s > 1 {
                borders.push(to);
            }
        }
        borders.reverse();
        Some((value, borders))
    }
}
