//! Dynamic programs over ranges of parts.

use super::line::Line;
use crate::plan::fixed::Target;
use crate::plan::problem::Problem;
use crate::plan::{Recompute, ScheduleKind};
use crate::topology::{DeviceId, Link};
use crate::units::{Bytes, Seconds};

/// A plan this much slower than the best may win by sending less.
const SLACK: f64 = 1.03;
/// Stages may compute so much longer than even ones, at first.
const LEAST_SLACK: f64 = 1.0 / 16.0;

/// Share of a stage's work that comes on top where it computes its forward half again: the other half is about twice as
/// much.
const AGAIN: f64 = 1.0 / 3.0;

/// Work of a model that has none, in seconds: it is divided by.
const NOTHING: f64 = 1e-12;

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
    /// `order[s]`: position within a replica of the device that runs stage s; with several rounds every device comes up
    /// again. `m`: microbatches of a step.
    pub(super) fn partition(&self, problem: &Problem<'_>, order: &[usize], rule: Rule, m: f64) -> Option<Cut> {
        let n = self.begins.len();
        let n_shards = order.len();
        let work: Vec<&[Seconds]> = order.iter().map(|&d| &self.work[self.kind[d]][..]).collect();
        let memory: Vec<Bytes> = order.iter().map(|&d| problem.topology.devices[d].memory).collect();
        // Time of what crosses each border, by the link there.
        let near = problem.topology.local;
        let link = |w: &[usize]| match rule {
            Rule::Near => near,
            _ => problem.topology.link(DeviceId(w[0] as u32), DeviceId(w[1] as u32)),
        };
        let links: Vec<Link> = order.windows(2).map(link).collect();
        let mut known: Vec<Link> = Vec::new();
        let of: Vec<usize> = links.iter().map(|link| distinct(&mut known, *link)).collect();
        let times = |link: &Link| self.crossing.iter().map(|&bytes| link.time(bytes)).collect();
        let of_link: Vec<Vec<Seconds>> = known.iter().map(times).collect();
        let between: Vec<&[Seconds]> = of.iter().map(|&link| &of_link[link][..]).collect();
        // Work before a stage, at the mean pace of the shards that have it.
        let mut before: Vec<Vec<f64>> = Vec::new();
        if rule == Rule::Fill {
            let mut sum = vec![0.0; n];
            for (s, work) in work.iter().enumerate() {
                before.push(sum.iter().map(|w| w / s.max(1) as f64).collect());
                sum.iter_mut().zip(*work).for_each(|(sum, w)| *sum += w.0);
            }
        }
        // By stage: parts before each border that belong to another shard.
        let targets = self.targets();
        let stranger = |s: usize, target: &Target| match *target {
            Target::Shard(shard) => s % (problem.n_shards as usize).max(1) != shard,
            Target::Device(device) => order[s] != device,
        };
        let strangers: Vec<Vec<usize>> = match targets.is_empty() {
            true => Vec::new(),
            false => (0..n_shards)
                .map(|s| {
                    let parts: Vec<usize> = targets.iter().filter(|t| stranger(s, &t.1)).map(|t| t.0).collect();
                    (0..=n).map(|border| parts.partition_point(|&part| part < border)).collect()
                })
                .collect(),
        };
        let stage = |s: usize, from: usize, to: usize| -> Option<Seconds> {
            if strangers.get(s).is_some_and(|before| before[from] < before[to]) {
                return None;
            }
            let (kept, again) = self.needs(problem, s, from, to);
            let (needs, more) = match problem.aim.recompute {
                Recompute::Never => (kept, 0.0),
                // The last stage turns at once.
                _ if s + 1 == n_shards => (kept, 0.0),
                Recompute::Always => (again, AGAIN),
                Recompute::Auto if kept > memory[s] || rule == Rule::Memory && again < kept => (again, AGAIN),
                Recompute::Auto => (kept, 0.0),
            };
            if rule == Rule::Memory {
                return Some(Seconds(needs.0 as f64 / memory[s].0.max(1) as f64));
            }
            if needs > memory[s] {
                return None;
            }
            let computing = (work[s][to] - work[s][from]) * (1.0 + more);
            let inlet = if from > 0 { between[s - 1][from] } else { Seconds(0.0) };
            let outlet = if to < n { between[s][to] } else { Seconds(0.0) };
            Some(match rule {
                Rule::Overlap => computing.max(inlet).max(outlet),
                Rule::Fill => (computing.max(inlet).max(outlet)) * m + Seconds(before[s][from]) + inlet * s as f64,
                Rule::Sum | Rule::Near | Rule::Memory => computing + inlet + outlet,
            })
        };
        if rule == Rule::Memory {
            let (value, borders) = sweep(&Band::whole(n_shards, n), &stage, &|worst, need, _| worst.max(need))?;
            return Some(Cut { value: value.0, borders });
        }
        // What a stage takes at least beside computing.
        let least = |s: usize| between[s].iter().skip(1).map(|t| t.0).fold(f64::INFINITY, f64::min);
        let transfers: Vec<f64> = match rule {
            Rule::Sum | Rule::Near => {
                let borders: Vec<f64> = (0..n_shards - 1).map(least).collect();
                let inlet = |s: usize| if s > 0 { borders[s - 1] } else { 0.0 };
                (0..n_shards).map(|s| inlet(s) + borders.get(s).copied().unwrap_or(0.0)).collect()
            }
            _ => vec![0.0; n_shards],
        };
        // Stages that compute longer than a limit leaves them need not be looked at; where that leaves none, it rises.
        let runs = if rule == Rule::Fill { m } else { 1.0 };
        let all = |s: usize| work[s][n].0.max(NOTHING);
        let most = (0..n_shards).map(|s| all(s) + transfers[s]).fold(0.0, f64::max);
        let (pace, idle) =
            (0..n_shards).fold((0.0, 0.0), |(pace, idle), s| (pace + 1.0 / all(s), idle + transfers[s] / all(s)));
        let even = (1.0 + idle) / pace;
        let within = |limit: f64| Band::new(&work, &|s| limit - transfers[s]);
        let mut slack = LEAST_SLACK;
        let bottleneck = loop {
            let limit = even * (1.0 + slack);
            let found = within(limit).and_then(|band| sweep(&band, &stage, &|worst, time, _| worst.max(time)));
            match found {
                Some((value, _)) if value.0 <= limit * runs => break value,
                _ if limit < most => slack *= 2.0,
                found => break found?.0,
            }
        };
        let limit = bottleneck.0 * SLACK;
        let affordable = |s: usize, from: usize, to: usize| stage(s, from, to).filter(|t| t.0 <= limit);
        let fewest = sweep(&within(limit / runs)?, &affordable, &|sum, _, border| {
            sum + Seconds(if border > 0 { self.crossing[border].0 as f64 } else { 0.0 })
        })?;
        Some(Cut { value: bottleneck.0, borders: fewest.1 })
    }

    /// Memory of a stage, about, if it keeps what it reads again, and if it computes that again: temporaries and others'
    /// params are not known before it is cut.
    fn needs(&self, problem: &Problem<'_>, s: usize, from: usize, to: usize) -> (Bytes, Bytes) {
        let in_flight = match problem.kind() {
            ScheduleKind::GPipe => u64::MAX,
            _ => u64::from(problem.n_shards).saturating_sub(s as u64).max(1),
        };
        let in_flight = in_flight.min(8);
        let (state, residuals) = (self.state[to] - self.state[from], self.residuals[to] - self.residuals[from]);
        // Half of what crosses comes back.
        let given = Bytes(if from > 0 { self.crossing[from].0 / 2 } else { 0 });
        (state + residuals * in_flight, state + given * in_flight + residuals)
    }
}

/// Position of a link among those that are known: behind the last one when it is new.
fn distinct(known: &mut Vec<Link>, link: Link) -> usize {
    let at = known.iter().position(|k| *k == link).unwrap_or(known.len());
    if at == known.len() {
        known.push(link);
    }
    at
}

/// Where the stages of a cut can end, if each of them has to be short.
struct Band {
    /// By number of stages: the least and the last number of parts that they can have together, and of which all others
    /// can have the rest.
    ends: Vec<(usize, usize)>,
    /// By stage, then its end from the first possible one on: where it can begin at the earliest.
    first: Vec<Vec<usize>>,
}

impl Band {
    /// Stages of any length, none of them empty.
    fn whole(n_shards: usize, n: usize) -> Self {
        let ends: Vec<(usize, usize)> =
            (0..=n_shards).map(|s| if s == 0 { (0, 0) } else { (s, n - (n_shards - s)) }).collect();
        let first = (0..n_shards).map(|s| vec![s; ends[s + 1].1 + 1 - ends[s + 1].0]).collect();
        Self { ends, first }
    }

    /// Stages that compute no longer than their limit. `work`: by stage, before each border. `None` where such stages do not
    /// cover all parts.
    fn new(work: &[&[Seconds]], limit: &dyn Fn(usize) -> f64) -> Option<Self> {
        let (n_shards, n) = (work.len(), work[0].len() - 1);
        let fits = |s: usize, from: usize, to: usize| work[s][to].0 - work[s][from].0 <= limit(s);
        let mut ends = vec![(0, 0); n_shards + 1];
        for s in 0..n_shards {
            let from = ends[s].1;
            let longest = work[s][from + 1..].partition_point(|w| w.0 - work[s][from].0 <= limit(s));
            ends[s + 1].1 = (from + longest).min(n - (n_shards - s - 1));
        }
        if ends[n_shards].1 < n {
            return None;
        }
        ends[n_shards].0 = n;
        for s in (1..n_shards).rev() {
            let to = ends[s + 1].0;
            ends[s].0 = work[s][..to].partition_point(|w| work[s][to].0 - w.0 > limit(s)).max(s);
        }
        let of = |s: usize| {
            // It rises with the end.
            let mut first = ends[s].0;
            let to_first = |to: usize| {
                while first < to && !fits(s, first, to) {
                    first += 1;
                }
                first
            };
            (ends[s + 1].0..=ends[s + 1].1).map(to_first).collect()
        };
        let first = (0..n_shards).map(of).collect();
        Some(Self { ends, first })
    }
}

/// The dynamic program: best value over the first parts with the first shards, and its borders.
fn sweep(
    band: &Band,
    stage: &dyn Fn(usize, usize, usize) -> Option<Seconds>,
    combine: &dyn Fn(Seconds, Seconds, usize) -> Seconds,
) -> Option<(Seconds, Vec<usize>)> {
    let n_shards = band.first.len();
    // By stage and end, from the first possible one on: value and begin.
    let mut best: Vec<Vec<Option<(Seconds, usize)>>> = Vec::with_capacity(n_shards + 1);
    best.push(vec![Some((Seconds(0.0), 0))]);
    for (s, first) in band.first.iter().enumerate() {
        let ((least, last), (to_least, _)) = (band.ends[s], band.ends[s + 1]);
        let mut row = vec![None; first.len()];
        for ((to, &first), entry) in (to_least..).zip(first).zip(&mut row) {
            for from in first..=last.min(to - 1) {
                let Some((so_far, _)) = best[s][from - least] else { continue };
                let Some(time) = stage(s, from, to) else { continue };
                let value = combine(so_far, time, from);
                if entry.is_none_or(|(b, _): (Seconds, usize)| value.0 < b.0) {
                    *entry = Some((value, from));
                }
            }
        }
        best.push(row);
    }
    let (value, _) = best[n_shards].last().copied()??;
    let mut borders = Vec::with_capacity(n_shards - 1);
    let mut to = band.ends[n_shards].1;
    for s in (1..=n_shards).rev() {
        to = best[s][to - band.ends[s].0]?.1;
        if s > 1 {
            borders.push(to);
        }
    }
    borders.reverse();
    Some((value, borders))
}
