//! A lower bound by prices: for memory at each point, and for what neighbours promise each other.
//!
//! Memory limits are paid for instead of kept (Lagrangian relaxation); what is left is bounded by messages between
//! neighbours, passed along the variables up and down so that the bound never falls.
//!
//! # Source
//! Sequential tree-reweighted message passing (Kolmogorov, PAMI 2006); prices by a subgradient method with a target
//! above the best bound.

use super::field::Field;
use crate::plan::random::Random;

/// Sweeps before prices move.
const WARM_UP: usize = 20;
/// Sweeps without progress before the target comes closer.
const PATIENCE: usize = 25;
/// How fast the usage that prices follow is renewed.
const RENEWAL: f64 = 0.2;
/// Spread of the values a variable counts as using, in targets: a value this much worse counts 1/e.
const SOFTNESS: f64 = 0.01;

#[derive(Clone)]
pub struct Relaxation<'f> {
    field: &'f Field,
    /// Of memory, by point.
    prices: Vec<f64>,
    messages: Vec<f64>,
    /// By value, with memory paid for.
    cost: Vec<f64>,
    /// By variable: part of its cost that a chain through it carries.
    weight: Vec<f64>,
    /// By value of all variables: how much worse than the best, in the latest sweep.
    excess: Vec<f64>,
    best: Best,
    /// How far above the best bound the target is; `None` before the first sweeps.
    level: Option<f64>,
    /// Usage beyond the room, averaged.
    over: Vec<f64>,
}

/// What [`Relaxation::dive`] is to decide.
pub struct Dive<'a> {
    /// Variables that are not asked, with their values.
    pub decided: &'a [(usize, usize)],
    pub open: &'a [usize],
    /// Of the open variables, how many are decided at a time.
    pub share: f64,
    /// Added to the costs, on average.
    pub noise: f64,
}

#[derive(Clone)]
struct Best {
    bound: f64,
    prices: Vec<f64>,
    messages: Vec<f64>,
}

impl<'f> Relaxation<'f> {
    /// `level`: where an earlier relaxation of nearly the same field stopped.
    pub fn new(field: &'f Field, prices: Vec<f64>, level: Option<f64>) -> Self {
        let weight = (0..field.n()).map(|x| {
            let up = field.sides(x).iter().filter(|s| s.other > x).count();
            1.0 / up.max(field.sides(x).len() - up).max(1) as f64
        });
        let messages = vec![0.0; field.n_messages];
        Self {
            cost: field.priced(&prices),
            weight: weight.collect(),
            excess: vec![0.0; field.cost.len()],
            best: Best { bound: f64::NEG_INFINITY, prices: prices.clone(), messages: messages.clone() },
            over: vec![0.0; prices.len()],
            field,
            prices,
            messages,
            level,
        }
    }

    pub fn level(&self) -> Option<f64> {
        self.level
    }

    pub fn prices(&self) -> &[f64] {
        &self.best.prices
    }

    /// Numbers that one sweep reads.
    pub fn work(&self) -> u64 {
        let tables = (0..self.field.n()).flat_map(|x| self.field.sides(x).iter().map(move |s| (x, s.other)));
        let entries: usize = tables.map(|(x, y)| self.field.n_values(x) * self.field.n_values(y)).sum();
        (entries + self.field.cost.len() + self.field.room.len()) as u64
    }

    /// Raises the bound by some sweeps, or fewer once the target is within `enough`.
    pub fn ascend(&mut self, n_sweeps: usize, enough: f64, stop: &mut dyn FnMut() -> bool) {
        let mut stale = 0;
        let mut mark = self.best.bound;
        for sweep in 0..n_sweeps {
            let bound = self.sweep();
            if bound > self.best.bound {
                self.best.bound = bound;
                self.best.prices.copy_from_slice(&self.prices);
                self.best.messages.copy_from_slice(&self.messages);
            }
            if stop() {
                break;
            }
            if sweep < WARM_UP {
                mark = self.best.bound;
                continue;
            }
            let level = *self.level.get_or_insert(0.05 * self.best.bound.abs().max(1.0));
            if level < enough {
                break;
            }
            stale += 1;
            if self.best.bound > mark + 0.1 * level {
                (mark, stale) = (self.best.bound, 0);
            } else if stale >= PATIENCE {
                (mark, stale) = (self.best.bound, 0);
                self.level = Some(0.6 * level);
                self.return_to_best();
            }
            self.move_prices(bound);
        }
        self.return_to_best();
    }

    fn return_to_best(&mut self) {
        self.prices.copy_from_slice(&self.best.prices);
        self.messages.copy_from_slice(&self.best.messages);
        self.cost = self.field.priced(&self.prices);
    }

    /// A step along the usage beyond the room, as long as would reach the target if the bound were straight.
    fn move_prices(&mut self, bound: f64) {
        let level = self.level.unwrap_or(0.0);
        let softness = (SOFTNESS * level).max(f64::MIN_POSITIVE);
        let share: Vec<f64> = self.excess.iter().map(|e| (-e / softness).exp()).collect();
        let field = self.field;
        let load = field.load_by(|x, usage| {
            let share = &share[field.first[x]..field.first[x + 1]];
            usage.iter().zip(share).map(|(u, s)| u * s).sum::<f64>() / share.iter().sum::<f64>()
        });
        let mut norm = 0.0;
        for (t, over) in self.over.iter_mut().enumerate() {
            *over += RENEWAL * (load[t] - field.room[t] - *over);
            if self.prices[t] > 0.0 || *over > 0.0 {
                norm += *over * *over;
            }
        }
        if norm > 0.0 {
            let step = 0.5 * (self.best.bound + level - bound).min(2.0 * level) / norm;
            for (price, over) in self.prices.iter_mut().zip(&self.over) {
                *price = (*price + step * over).max(0.0);
            }
            self.cost = field.priced(&self.prices);
        }
    }

    /// Messages up, then down; the bound.
    fn sweep(&mut self) -> f64 {
        self.pass(true);
        let unused: f64 = self.prices.iter().zip(&self.field.room).map(|(p, r)| p * r).sum();
        self.field.constant - unused + self.pass(false)
    }

    /// How much more than the bound any choice with this value costs, by value of all variables.
    ///
    /// The bound is that of a sweep at the best prices; it is returned, too.
    pub fn excess(&mut self) -> (f64, &[f64]) {
        self.return_to_best();
        let bound = self.sweep();
        if bound > self.best.bound {
            self.best.bound = bound;
            self.best.messages.copy_from_slice(&self.messages);
        }
        // Going up once more, each variable hears from below and from above what the rest costs at least.
        self.pass(true);
        (bound, &self.excess)
    }

    /// What neighbours promise each other where the bound is best.
    pub fn messages(&self) -> &[f64] {
        &self.best.messages
    }

    /// One pass; the sum of what was taken off, which going down is the bound without memory and constant.
    fn pass(&mut self, up: bool) -> f64 {
        let field = self.field;
        let n = field.n();
        let mut taken = 0.0;
        let mut share: Vec<f64> = Vec::new();
        for i in 0..n {
            let x = if up { i } else { n - 1 - i };
            let n_x = field.n_values(x);
            let excess = &mut self.excess[field.first[x]..][..n_x];
            excess.copy_from_slice(&self.cost[field.first[x]..][..n_x]);
            for side in field.sides(x) {
                for (e, m) in excess.iter_mut().zip(&self.messages[side.inward..][..n_x]) {
                    *e += m;
                }
            }
            taken += take_least(excess);
            let weight = self.weight[x];
            for side in field.sides(x).iter().filter(|s| (s.other > x) == up) {
                share.clear();
                let inward = &self.messages[side.inward..][..n_x];
                share.extend(excess.iter().zip(inward).map(|(e, m)| weight * e - m));
                let n_y = field.n_values(side.other);
                let outward = &mut self.messages[side.outward..][..n_y];
                least_sums(&share, &field.tables[side.rows..][..n_x * n_y], outward);
                taken += take_least(outward);
            }
        }
        taken
    }

    /// Decides the open variables in the order of how sure the messages are, passing messages in between, and all
    /// others by the messages then.
    ///
    /// `soft`: the field, with a finite price on what is forbidden.
    pub fn dive(&self, soft: &'f Field, dive: Dive<'_>, random: &mut Random) -> Vec<usize> {
        let mut state = Self { field: soft, ..self.clone() };
        state.return_to_best();
        if dive.noise > 0.0 {
            state.cost.iter_mut().for_each(|c| *c += random.exponential(dive.noise));
        }
        dive.decided.iter().for_each(|&(x, a)| state.decide(x, a));
        let mut open = dive.open.to_vec();
        loop {
            state.pass(true);
            state.pass(false);
            if open.is_empty() {
                return state.choice();
            }
            let mut sure: Vec<(f64, usize, usize)> = open
                .iter()
                .map(|&x| {
                    let excess = &state.excess[soft.first[x]..soft.first[x + 1]];
                    let best = least_at(excess);
                    let others = (0..excess.len()).filter(|&a| a != best).map(|a| excess[a]);
                    (others.fold(f64::INFINITY, f64::min), x, best)
                })
                .collect();
            sure.sort_by(|a, b| b.0.total_cmp(&a.0));
            let n_now = ((open.len() as f64 * dive.share) as usize).max(1 + dive.open.len() / 50);
            let (now, later) = sure.split_at(n_now.min(sure.len()));
            now.iter().for_each(|&(_, x, best)| state.decide(x, best));
            open = later.iter().map(|s| s.1).collect();
        }
    }

    fn decide(&mut self, x: usize, value: usize) {
        let cost = &mut self.cost[self.field.first[x]..self.field.first[x + 1]];
        cost.iter_mut().enumerate().filter(|(a, _)| *a != value).for_each(|(_, c)| *c = f64::INFINITY);
    }

    /// A choice by the messages: each variable, going down, goes by the choices above and the messages from below.
    pub fn choice(&self) -> Vec<usize> {
        let field = self.field;
        let mut value = vec![0; field.n()];
        for x in (0..field.n()).rev() {
            let n_x = field.n_values(x);
            let mut cost = self.cost[field.first[x]..][..n_x].to_vec();
            for side in field.sides(x) {
                let more = if side.other > x {
                    field.beside(x, side, value[side.other])
                } else {
                    &self.messages[side.inward..][..n_x]
                };
                cost.iter_mut().zip(more).for_each(|(c, m)| *c += m);
            }
            value[x] = least_at(&cost);
        }
        value
    }
}

/// Position of the least; the first of equals.
pub fn least_at(cost: &[f64]) -> usize {
    let mut best = 0;
    for (a, c) in cost.iter().enumerate() {
        if *c < cost[best] {
            best = a;
        }
    }
    best
}

/// Takes the least off all and returns it.
fn take_least(cost: &mut [f64]) -> f64 {
    let least = cost.iter().copied().fold(f64::INFINITY, f64::min);
    cost.iter_mut().for_each(|c| *c -= least);
    least
}

/// By column: the least of row cost plus entry.
fn least_sums(row_cost: &[f64], table: &[f64], out: &mut [f64]) {
    out.fill(f64::INFINITY);
    for (&r, row) in row_cost.iter().zip(table.chunks_exact(out.len())) {
        for (o, t) in out.iter_mut().zip(row) {
            let sum = r + t;
            *o = if sum < *o { sum } else { *o };
        }
    }
}
