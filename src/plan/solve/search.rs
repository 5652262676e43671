//! Which cut of the line, on which devices in which order.

use super::lanes::Spread;
use super::line::Line;
use super::orders::{alike, device_orders};
use super::partition::Rule;
use super::{FEW_TRIES, SEARCHED};
use crate::graph::GradGraph;
use crate::plan::aim::Cost;
use crate::plan::problem::{Infeasible, Problem};
use crate::plan::{Objective, Plan, ScheduleKind};

/// Shards of a pipeline that is cut with regard to how it fills: in longer ones that is all that would count.
const SHORT: u32 = 32;
/// Share of the tries that planning again takes.
const AGAIN: usize = 10;
/// Ranges of the model on each shard that are tried for an interleaved schedule.
const ROUNDS: [usize; 3] = [2, 3, 4];
/// Borders up to which all ways to put shards together to stages are tried.
const MANY: usize = 3;
/// Parts that a border jumps over at first.
const WIDE: usize = 16;

/// A cut, on devices in an order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Start {
    pub borders: Vec<usize>,
    /// Position within a replica of the device that runs each shard. Where there are more ranges than shards, they come up
    /// again in turn.
    pub order: Vec<usize>,
    /// That it is best by; `None` for one from an earlier plan.
    pub rule: Option<Rule>,
    /// Which shards share a stage: of such a stage only what is in no lane is cut.
    pub spread: Spread,
}

impl Start {
    /// Whether every shard has something, as far as borders tell: lanes are something.
    pub fn is_valid(&self, n_parts: usize) -> bool {
        let ends = || [0].into_iter().chain(self.borders.iter().copied()).chain([n_parts]);
        // In turns there are more ranges than shards, and no lanes.
        let is_shared = |range: usize| !self.spread.is_along() && self.spread.stage(range).len() > 1;
        let mut ranges = ends().zip(ends().skip(1)).enumerate();
        ranges.all(|(i, (a, b))| a < b || a == b && is_shared(i)) && self.spread.is_valid()
    }

    /// How it shares out lanes, roughly: not, all over, or by stages.
    fn width(&self) -> u8 {
        match (self.spread.is_along(), self.spread.is_across()) {
            (true, _) => 0,
            (_, true) => 1,
            _ => 2,
        }
    }

    /// Ranges on each shard.
    fn rounds(&self) -> usize {
        (self.borders.len() + 1) / self.order.len().max(1)
    }
}

/// The search on one line.
pub(super) struct Search<'a> {
    pub problem: &'a Problem<'a>,
    pub line: &'a Line<'a>,
    pub microbatch: u64,
    pub variants: &'a [&'a GradGraph],
    /// Asked once there is a plan.
    pub go_on: &'a dyn Fn() -> bool,
}

impl Search<'_> {
    /// The best plan that cuts this line.
    pub fn run(&self) -> Result<Plan, Infeasible> {
        let tries = self.tries();
        let small = tries >= FEW_TRIES;
        let mut found = Found { search: self, tried: Vec::new(), plans: Vec::new(), refusal: None };
        let orders = device_orders(self.problem, &self.line.targets());
        let devices = &self.problem.topology.devices;
        let mixed = devices.iter().any(|d| d.node != devices[0].node);
        let rounds = self.rounds();
        for (order, &rounds) in orders.iter().flat_map(|order| rounds.iter().map(move |r| (order, r))) {
            found.cut(order, Rule::Sum, rounds);
            if mixed {
                found.cut(order, Rule::Near, rounds);
            }
        }
        // The order that does best by these is kept for the others, where there are many or the model is large.
        let first = found.best().map(|(_, start)| start.order.clone());
        let chosen = match first {
            Some(first) if !small || self.problem.n_shards > 4 => vec![first],
            _ => orders,
        };
        let swapped = chosen.first().and_then(|order| self.line.swapped(self.problem, order, self.n_microbatches()));
        for (order, &rounds) in chosen.iter().chain(&swapped).flat_map(|order| rounds.iter().map(move |r| (order, r))) {
            if self.problem.n_shards <= SHORT && rounds == 1 {
                found.cut(order, Rule::Fill, rounds);
            }
            if small {
                found.cut(order, Rule::Overlap, rounds);
            }
        }
        if let (true, Some(order)) = (self.line.has_lanes(), chosen.first()) {
            self.across(order).into_iter().for_each(|start| found.evaluate(start));
            // Stages end where the best pipeline has a border: as many shards as are between two have that much work.
            let along = found.plans.iter().filter(|(_, start)| start.width() == 0 && start.rounds() == 1);
            let best = along.min_by(|a, b| self.cost(&a.0).total_cmp(&self.cost(&b.0)));
            let borders = best.map(|(_, start)| (start.order.clone(), start.borders.clone()));
            let stages = borders.map(|(order, borders)| self.stages(&order, &borders));
            stages.into_iter().flatten().for_each(|start| found.evaluate(start));
        }
        if found.plans.is_empty() || self.is_for_memory() {
            chosen.iter().for_each(|order| found.cut(order, Rule::Memory, 1));
        }
        // What looks best at first may be the top of a lower hill: the best by each rule is climbed from.
        let mut starts: Vec<(Plan, Start)> = Vec::new();
        found.plans.sort_by(|a, b| self.cost(&a.0).total_cmp(&self.cost(&b.0)));
        for (plan, start) in found.plans {
            let kind = |s: &Start| (s.rule, s.width(), s.rounds());
            let known = starts.iter().any(|(_, s)| kind(s) == kind(&start));
            if starts.is_empty() || small && !known {
                starts.push((plan, start));
            }
        }
        let each = tries / starts.len().max(1);
        let climbed = starts.into_iter().map(|(plan, start)| self.climb(plan, start, WIDE, each));
        let best = climbed.min_by(|a, b| self.cost(a).total_cmp(&self.cost(b)));
        best.ok_or_else(|| {
            found
                .refusal
                .unwrap_or(Infeasible::TooFewOps { n_shards: self.problem.n_shards, n_parts: self.line.begins.len() })
        })
    }

    /// A plan for devices that have changed, on the same ones in the same order: close to the one in force, which cuts the
    /// line at `start`, or by the rules if that is clearly better. Takes a tenth of the tries of [`Self::run`].
    pub fn again(&self, kept: &Plan, start: Start) -> Plan {
        let mut found = Found { search: self, tried: vec![start.clone()], plans: Vec::new(), refusal: None };
        let small = self.tries() >= FEW_TRIES;
        let rounds = start.rounds();
        found.cut(&start.order, Rule::Sum, rounds);
        if self.is_for_memory() {
            found.cut(&start.order, Rule::Memory, rounds);
        }
        if small && self.problem.n_shards <= SHORT {
            if rounds == 1 {
                found.cut(&start.order, Rule::Fill, rounds);
            }
            found.cut(&start.order, Rule::Overlap, rounds);
        }
        // Where they are too few to move each border once, what the rules say is taken as it is.
        let tries = Some((self.tries() / AGAIN).saturating_sub(found.tried.len()));
        let tries = tries.filter(|&tries| small && tries + 1 >= self.problem.n_shards as usize).unwrap_or(0);
        // Where a rule finds something clearly better, what is near to the plan in force has little to hope for.
        let far = found.best().cloned().filter(|(far, _)| self.problem.prefers(far, kept));
        let of_near = if far.is_some() { tries / 4 } else { tries };
        let near = self.climb(kept.clone(), start, 1, of_near);
        match far.map(|(plan, start)| self.climb(plan, start, WIDE, tries - of_near)) {
            Some(far) if self.problem.prefers(&far, &near) => far,
            _ => near,
        }
    }

    /// Cuts across: what is in no lane on the first shards, shared out evenly among all, or something in between.
    fn across(&self, order: &[usize]) -> Vec<Start> {
        let (n_parts, n_shards) = (self.line.begins.len(), self.problem.n_shards as usize);
        let spread = self.spread(order, &vec![false; n_shards - 1]);
        let of = |eighths: usize| {
            let even = (1..n_shards).map(|i| n_parts * i / n_shards);
            // From even shares to all of it on the first shard.
            let borders = even.map(|even| even + (n_parts - even) * eighths / 8).collect();
            Start { borders, order: order.to_vec(), rule: None, spread: spread.clone() }
        };
        (0..=8).map(of).collect()
    }

    /// Pipelines whose stages have several shards each: all ways to share out few shards, some for many. What is in no lane
    /// is shared out within its stage, or all on its first shard.
    fn stages(&self, order: &[usize], borders: &[usize]) -> Vec<Start> {
        let n_borders = borders.len();
        let all: Vec<Vec<bool>> = match n_borders {
            // One stage, and stages of one shard, are tried anyway.
            0..=MANY => (1..(1usize << n_borders) - 1)
                .map(|bits| (0..n_borders).map(|i| bits >> i & 1 == 1).collect())
                .collect(),
            _ => {
                let every = |n: usize| (1..=n_borders).map(|i| i.is_multiple_of(n)).collect();
                let [half, third] = [2, 3].map(|n: usize| (n_borders + 1).div_ceil(n));
                [2, 3, 4, third, half].map(every).into()
            }
        };
        let mut starts = Vec::new();
        for ends in all {
            let spread = self.spread(order, &ends);
            let within = Start { borders: borders.to_vec(), order: order.to_vec(), rule: None, spread };
            let mut first = within.clone();
            for i in (0..n_borders).rev().filter(|&i| !ends[i]) {
                first.borders[i] = first.borders.get(i + 1).copied().unwrap_or(self.line.begins.len());
            }
            starts.extend([within, first]);
        }
        starts
    }

    /// Lanes shared out by the speed of devices. `ends`: by border, whether a stage ends there.
    fn spread(&self, order: &[usize], ends: &[bool]) -> Spread {
        let all = |kind: usize| self.line.work[kind].last().map_or(1.0, |w| w.0).max(f64::MIN_POSITIVE);
        let speeds: Vec<f64> = order.iter().map(|&device| 1.0 / all(self.line.kind[device])).collect();
        Spread::new(ends, &speeds, self.line.outline.n_lanes)
    }

    /// The plan that needs least memory on its fullest shard, of those that are tried for it.
    pub fn roomiest(&self) -> Option<Plan> {
        let order: Vec<usize> = (0..self.problem.n_shards as usize).collect();
        let cut = self.line.partition(self.problem, &order, Rule::Memory, 1.0);
        let spread = Spread::along(order.len());
        let along = cut.map(|cut| Start { borders: cut.borders, order: order.clone(), rule: None, spread });
        let across = if self.line.has_lanes() { self.across(&order) } else { Vec::new() };
        let plans = along.into_iter().chain(across).filter_map(|start| self.plan(&start).ok());
        plans.min_by_key(|plan| plan.shards.iter().map(|s| s.memory).max())
    }

    fn tries(&self) -> usize {
        let n_ops = self.variants.iter().map(|v| v.graph.n_ops()).sum::<usize>() + self.problem.model.update.n_ops();
        SEARCHED / n_ops.max(1)
    }

    /// Numbers of ranges on each shard that are tried.
    fn rounds(&self) -> Vec<usize> {
        let n_shards = self.problem.n_shards as usize;
        if self.problem.kind() != ScheduleKind::Interleaved || n_shards < 2 {
            return vec![1];
        }
        let n_parts = self.line.begins.len();
        let found: Vec<usize> = ROUNDS.into_iter().filter(|rounds| rounds * n_shards <= n_parts).collect();
        // Too few parts for turns: one range on each is what is left of them.
        if found.is_empty() { vec![1] } else { found }
    }

    fn n_microbatches(&self) -> f64 {
        let of_replica = self.problem.model.manifest.batch_size / self.microbatch.max(1);
        (of_replica / u64::from(self.problem.n_replicas.max(1))) as f64
    }

    pub fn plan(&self, start: &Start) -> Result<Plan, Infeasible> {
        let cuts = self.line.cuts(&start.borders);
        self.line.plan(self.problem, self.microbatch, self.variants, &cuts, &start.order, &start.spread)
    }

    fn cost(&self, plan: &Plan) -> Cost {
        self.problem.cost(plan)
    }

    fn is_for_memory(&self) -> bool {
        self.problem.aim.objective == Objective::Memory
    }

    /// Moves borders, and swaps neighbours that differ, while the simulated plan gets better.
    fn climb(&self, mut best: Plan, mut at: Start, widest: usize, mut tries: usize) -> Plan {
        let n_parts = self.line.begins.len();
        let mut stride = (n_parts / (4 * (at.borders.len() + 1))).clamp(1, widest);
        let mut better = |tried: Start, best: &mut Plan, at: &mut Start| -> Option<bool> {
            if !tried.is_valid(n_parts) {
                return Some(false);
            }
            tries = tries.checked_sub(1).filter(|_| (self.go_on)())?;
            match self.plan(&tried) {
                Ok(plan) if self.cost(&plan).is_below(0.999, self.cost(best)) => {
                    (*best, *at) = (plan, tried);
                    Some(true)
                }
                _ => Some(false),
            }
        };
        let devices = &self.problem.topology.devices;
        let n = at.borders.len();
        loop {
            let mut moved = false;
            // One border, then two neighbours together: a stage of the right size in the wrong place.
            for width in 1..=2.min(n) {
                if width > 1 && moved {
                    break;
                }
                for i in 0..=n - width {
                    for up in [true, false] {
                        let mut tried = at.clone();
                        for border in &mut tried.borders[i..i + width] {
                            *border = if up { *border + stride } else { border.wrapping_sub(stride) };
                        }
                        match better(tried, &mut best, &mut at) {
                            Some(yes) => moved |= yes,
                            None => return best,
                        }
                    }
                }
            }
            // One lane from a shard to its neighbour.
            for i in 0..at.spread.seams.len() {
                for up in [true, false] {
                    let mut tried = at.clone();
                    let Some(first) = &mut tried.spread.seams[i] else { continue };
                    *first = if up { *first + 1 } else { first.wrapping_sub(1) };
                    match better(tried, &mut best, &mut at) {
                        Some(yes) => moved |= yes,
                        None => return best,
                    }
                }
            }
            if !moved && stride == 1 {
                for i in 0..at.order.len() - 1 {
                    let (a, b) = (&devices[at.order[i]], &devices[at.order[i + 1]]);
                    if alike(a, b) && a.node == b.node && self.problem.topology.slowed.is_empty() {
                        continue;
                    }
                    let mut tried = at.clone();
                    tried.order.swap(i, i + 1);
                    match better(tried, &mut best, &mut at) {
                        Some(yes) => moved |= yes,
                        None => return best,
                    }
                }
                if !moved {
                    return best;
                }
            } else if !moved {
                stride /= 2;
            }
        }
    }
}

/// What has been found so far.
struct Found<'a> {
    search: &'a Search<'a>,
    tried: Vec<Start>,
    plans: Vec<(Plan, Start)>,
    refusal: Option<Infeasible>,
}

impl Found<'_> {
    fn best(&self) -> Option<&(Plan, Start)> {
        self.plans.iter().min_by(|a, b| self.search.cost(&a.0).total_cmp(&self.search.cost(&b.0)))
    }

    /// Takes the cut that is best by a rule, with so many ranges on each shard.
    fn cut(&mut self, order: &[usize], rule: Rule, rounds: usize) {
        let Search { line, problem, .. } = self.search;
        if !self.plans.is_empty() && !(self.search.go_on)() {
            return;
        }
        let stages = order.repeat(rounds);
        let Some(cut) = line.partition(problem, &stages, rule, self.search.n_microbatches()) else { return };
        let spread = Spread::along(order.len());
        let start = Start { borders: cut.borders, order: order.to_vec(), rule: Some(rule), spread };
        self.evaluate(start.clone());
        if line.has_lanes() && rounds == 1 {
            let spread = self.search.spread(order, &vec![false; order.len() - 1]);
            self.evaluate(Start { spread, ..start });
        }
    }

    fn evaluate(&mut self, start: Start) {
        let same = |s: &Start| (&s.borders, &s.order, &s.spread) == (&start.borders, &start.order, &start.spread);
        if self.tried.iter().any(same) {
            return;
        }
        if !self.plans.is_empty() && !(self.search.go_on)() {
            return;
        }
        match self.search.plan(&start) {
            Ok(plan) => self.plans.push((plan, start.clone())),
            // That one way leaves a shard without ops says nothing of the others.
            Err(Infeasible::TooFewOps { .. }) if self.refusal.is_some() => {}
            Err(e) => self.refusal = Some(e),
        }
        self.tried.push(start);
    }
}
