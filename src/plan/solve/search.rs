//! Which cut of the line, on which devices in which order.

use super::line::Line;
use super::orders::{alike, device_orders};
use super::partition::Rule;
use super::{FEW_TRIES, SEARCHED, faster};
use crate::graph::GradGraph;
use crate::plan::Plan;
use crate::plan::problem::{Infeasible, Problem};

/// Shards of a pipeline that is cut with regard to how it fills: in longer ones that is all that would count.
const SHORT: u32 = 32;
/// Parts that a border jumps over at first.
const WIDE: usize = 16;

/// A cut, on devices in an order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Start {
    pub borders: Vec<usize>,
    /// Position within a replica of the device that runs each shard.
    pub order: Vec<usize>,
    /// That it is best by; `None` for one from an earlier plan.
    pub rule: Option<Rule>,
}

/// The search on one line.
pub(super) struct Search<'a> {
    pub problem: &'a Problem<'a>,
    pub line: &'a Line<'a>,
    pub microbatch: u64,
    pub variants: &'a [&'a GradGraph],
}

impl Search<'_> {
    /// The best plan that cuts this line.
    pub fn run(&self) -> Result<Plan, Infeasible> {
        let tries = self.tries();
        let small = tries >= FEW_TRIES;
        let mut found = Found { search: self, tried: Vec::new(), plans: Vec::new(), refusal: None };
        let orders = device_orders(self.problem);
        let devices = &self.problem.topology.devices;
        let mixed = devices.iter().any(|d| d.node != devices[0].node);
        for order in &orders {
            found.cut(order, Rule::Sum);
            if mixed {
                found.cut(order, Rule::Near);
            }
        }
        // The order that does best by these is kept for the others, where there are many or the model is large.
        let first = found.best().map(|(_, start)| start.order.clone());
        let chosen = match first {
            Some(first) if !small || self.problem.n_shards > 4 => vec![first],
            _ => orders,
        };
        let swapped = chosen.first().and_then(|order| self.line.swapped(self.problem, order, self.n_microbatches()));
        for order in chosen.iter().chain(&swapped) {
            if self.problem.n_shards <= SHORT {
                found.cut(order, Rule::Fill);
            }
            if small {
                found.cut(order, Rule::Overlap);
            }
        }
        if found.plans.is_empty() {
            chosen.iter().for_each(|order| found.cut(order, Rule::Memory));
        }
        // What looks best at first may be the top of a lower hill: the best by each rule is climbed from.
        let mut starts: Vec<(Plan, Start)> = Vec::new();
        found.plans.sort_by(|a, b| a.0.step_time.0.total_cmp(&b.0.step_time.0));
        for (plan, start) in found.plans {
            let known = starts.iter().any(|(_, s)| s.rule == start.rule);
            if starts.is_empty() || small && !known {
                starts.push((plan, start));
            }
        }
        let each = tries / starts.len().max(1);
        let climbed = starts.into_iter().map(|(plan, start)| self.climb(plan, start, WIDE, each));
        let best = climbed.min_by(|a, b| a.step_time.0.total_cmp(&b.step_time.0));
        best.ok_or_else(|| {
            found
                .refusal
                .unwrap_or(Infeasible::TooFewOps { n_shards: self.problem.n_shards, n_parts: self.line.begins.len() })
        })
    }

    /// A plan for devices that have changed, on the same ones in the same order: close to a cut that is in force, or by
    /// the rules if that is clearly faster. Takes a tenth of the tries of [`Self::run`].
    pub fn again(&self, start: &Start) -> Option<Plan> {
        let mut found = Found { search: self, tried: Vec::new(), plans: Vec::new(), refusal: None };
        found.evaluate(start.clone());
        let near = found.plans.pop();
        let small = self.tries() >= FEW_TRIES;
        let rules = [(Rule::Sum, true), (Rule::Fill, small && self.problem.n_shards <= SHORT), (Rule::Overlap, small)];
        for (rule, _) in rules.into_iter().filter(|(_, asked)| *asked) {
            found.cut(&start.order, rule);
        }
        let far = found.best().cloned();
        // Of a large model as it is.
        let tries = if small { (self.tries() / 10).saturating_sub(found.tried.len()) / 2 } else { 0 };
        let near = near.map(|(plan, start)| self.climb(plan, start, 1, tries));
        let far = far.map(|(plan, start)| self.climb(plan, start, WIDE, tries));
        match (far, near) {
            (Some(far), Some(near)) => Some(if faster(&far, &near) { far } else { near }),
            (far, near) => far.or(near),
        }
    }

    fn tries(&self) -> usize {
        let n_ops = self.variants.iter().map(|v| v.graph.n_ops()).sum::<usize>() + self.problem.model.update.n_ops();
        SEARCHED / n_ops.max(1)
    }

    fn n_microbatches(&self) -> f64 {
        let of_replica = self.problem.model.manifest.batch_size / self.microbatch.max(1);
        (of_replica / u64::from(self.problem.n_replicas.max(1))) as f64
    }

    pub fn plan(&self, start: &Start) -> Result<Plan, Infeasible> {
        let cuts = self.line.cuts(&start.borders);
        self.line.plan(self.problem, self.microbatch, self.variants, &cuts, &start.order)
    }

    /// Moves borders, and swaps neighbours that differ, while the simulated step gets faster.
    fn climb(&self, mut best: Plan, mut at: Start, widest: usize, mut tries: usize) -> Plan {
        let n_parts = self.line.begins.len();
        let mut stride = (n_parts / (4 * self.problem.n_shards as usize)).clamp(1, widest);
        let mut better = |tried: Start, best: &mut Plan, at: &mut Start| -> Option<bool> {
            let ends = |i: usize| match i {
                0 => 0,
                i => tried.borders.get(i - 1).copied().unwrap_or(n_parts),
            };
            if (0..=tried.borders.len()).any(|i| ends(i) >= ends(i + 1)) {
                return Some(false);
            }
            tries = tries.checked_sub(1)?;
            match self.plan(&tried) {
                Ok(plan) if plan.step_time.0 < 0.999 * best.step_time.0 => {
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
            if !moved && stride == 1 {
                for i in 0..n {
                    let (a, b) = (&devices[at.order[i]], &devices[at.order[i + 1]]);
                    if alike(a, b) && a.node == b.node {
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
        self.plans.iter().min_by(|a, b| a.0.step_time.0.total_cmp(&b.0.step_time.0))
    }

    /// Takes the cut that is best by a rule.
    fn cut(&mut self, order: &[usize], rule: Rule) {
        let Search { line, problem, .. } = self.search;
        let Some(cut) = line.partition(problem, order, rule, self.search.n_microbatches()) else { return };
        self.evaluate(Start { borders: cut.borders, order: order.to_vec(), rule: Some(rule) });
    }

    fn evaluate(&mut self, start: Start) {
        if self.tried.iter().any(|s| s.borders == start.borders && s.order == start.order) {
            return;
        }
        match self.search.plan(&start) {
            Ok(plan) => self.plans.push((plan, start.clone())),
            Err(e) => self.refusal = Some(e),
        }
        self.tried.push(start);
    }
}
