//! Finds cheap choices that fit, by re-deciding many variables at once.
//!
//! All moves end in the same way: every variable that allows it is decided exactly by elimination, memory paid for at
//! prices that follow the load. Moves differ in where that begins: at the best choice, with some values of it changed,
//! or with some of its hubs (variables that never allow it) decided anew by the relaxation.

use super::elimination::Eliminator;
use super::field::{Field, sums};
use super::relaxation::{Dive, Relaxation};
use super::state::{State, fits};
use crate::plan::random::Random;

/// Largest tables of successive decisions about everything.
const CAPS: [u64; 6] = [3_000, 300, 30_000, 3_000, 300, 100_000];
/// Largest tables of decisions in a ball.
const BALL_CAPS: [u64; 3] = [1_000, 10_000, 100_000];
/// Variables that would make tables larger than this are hubs.
const HUB_CAP: u64 = 30_000;
/// Work before the kind of move changes, in readings of the whole field.
const SLOT: u64 = 12;
/// Least and largest noise, in what a typical variable contributes to the gap.
const NOISE: (f64, f64) = (0.1, 200.0);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// From the best choice, with or without noise on the costs.
    Along,
    /// From the best choice with a few values changed and held for a while.
    Kick,
    /// From hubs decided anew.
    Dive,
    /// A ball of variables only.
    Near,
}

/// A search over a field whose forbidden pairs have a finite price.
pub struct Search<'f> {
    field: &'f Field,
    relaxation: &'f Relaxation<'f>,
    /// How much more than the bound each value costs at least.
    excess: &'f [f64],
    /// Of memory; these follow the load, those of the relaxation stay.
    prices: Vec<f64>,
    /// Where the present move is.
    walk: Vec<usize>,
    /// The cheapest choice that fits. It may still contain forbidden pairs.
    best: Option<State>,
    eliminator: Eliminator,
    random: Random,
    everything: Vec<usize>,
    hubs: Vec<usize>,
    /// What a typical variable contributes to the gap.
    grain: f64,
    /// Grows while nothing fits.
    urgency: f64,
    work: u64,
}

impl<'f> Search<'f> {
    /// `excess`: of the relaxation, by value; `gap`: what the best choice may cost above the bound.
    pub fn new(
        field: &'f Field,
        relaxation: &'f Relaxation<'f>,
        excess: &'f [f64],
        gap: f64,
        mut random: Random,
    ) -> Self {
        let everything: Vec<usize> = (0..field.n()).collect();
        let mut eliminator = Eliminator::new(field.n());
        let order = eliminator.order(field, &everything, HUB_CAP, &mut random);
        let mut hub = vec![true; field.n()];
        order.variables.iter().for_each(|&x| hub[x] = false);
        Self {
            prices: relaxation.prices().to_vec(),
            walk: vec![0; field.n()],
            best: None,
            eliminator,
            hubs: everything.iter().copied().filter(|&x| hub[x]).collect(),
            everything,
            random,
            grain: gap / field.n().max(1) as f64,
            urgency: 1.0,
            work: 0,
            field,
            relaxation,
            excess,
        }
    }

    pub fn best(&self) -> Option<&State> {
        self.best.as_ref()
    }

    pub fn into_random(self) -> Random {
        self.random
    }

    /// Tries some beginnings: the one given, which need not fit, and what the relaxation proposes.
    pub fn begin(&mut self, known: Option<Vec<usize>>, stop: &mut dyn FnMut() -> bool) {
        let mut beginnings: Vec<Vec<usize>> = known.into_iter().chain([self.relaxation.choice()]).collect();
        for share in [0.1, 0.05] {
            let dive = Dive { decided: &[], open: &self.hubs, share, noise: 0.0 };
            beginnings.push(self.relaxation.dive(self.field, dive, &mut self.random));
            if stop() {
                break;
            }
        }
        for walk in beginnings {
            self.walk = walk;
            self.consider_walk();
            self.descend(&[], 6, 0.0, stop);
        }
    }

    /// Moves until about `work` table entries were read.
    pub fn run(&mut self, work: u64, stop: &mut dyn FnMut() -> bool) {
        let end = self.work + work;
        let mut slots = [(Move::Along, 1), (Move::Kick, 1), (Move::Dive, 1), (Move::Near, 1)];
        while self.work < end && !stop() {
            let before = self.cost();
            for (kind, size) in &mut slots {
                let before = self.cost();
                self.slot(*kind, *size, stop);
                // What has paid gets more.
                *size = if self.cost() < before { 2 } else { 1 };
            }
            if self.cost() == before && self.best.is_some() && !stop() {
                self.afresh(stop);
            }
        }
    }

    fn slot(&mut self, kind: Move, size: u64, stop: &mut dyn FnMut() -> bool) {
        let end = self.work + (SLOT * size * self.field.tables.len() as u64).max(100_000);
        while self.work < end && !stop() {
            self.make(kind, stop);
        }
    }

    /// Begins again as if nothing were known, and then brings both together.
    fn afresh(&mut self, stop: &mut dyn FnMut() -> bool) {
        let known = self.best.take();
        let (share, noise) = (self.random.scale(0.03, 0.3), self.noise());
        let dive = Dive { decided: &[], open: &self.hubs, share, noise };
        self.walk = self.relaxation.dive(self.field, dive, &mut self.random);
        self.descend(&[], 16, 0.0, stop);
        loop {
            let before = self.cost();
            self.slot(Move::Near, 1, stop);
            self.slot(Move::Along, 1, stop);
            let gained = before - self.cost();
            if stop() || gained.is_nan() || gained < 0.01 * self.grain * self.field.n() as f64 {
                break;
            }
        }
        let (Some(mut known), Some(mut found)) = (known.clone(), self.best.take()) else {
            self.best = known;
            return;
        };
        if found.cost < known.cost {
            std::mem::swap(&mut known, &mut found);
        }
        known.improve(self.field, &found.values, &self.everything, &mut self.random);
        self.best = Some(known);
    }

    fn cost(&self) -> f64 {
        self.best.as_ref().map_or(f64::INFINITY, |b| b.cost)
    }

    fn make(&mut self, kind: Move, stop: &mut dyn FnMut() -> bool) {
        let Some(best) = &self.best else {
            // Nothing fits yet: go on from where the last move ended.
            let noise = self.noise();
            self.urgency *= 1.5;
            return self.descend(&[], 12, noise, stop);
        };
        match kind {
            Move::Near => self.near(),
            Move::Along => {
                self.walk.clone_from(&best.values);
                let noise = self.noise();
                self.descend(&[], 16, noise, stop);
            }
            Move::Kick => {
                self.walk.clone_from(&best.values);
                let held = self.kick();
                self.descend(&held, 6, 0.0, stop);
            }
            Move::Dive => {
                self.dive();
                self.descend(&[], 3, 0.0, stop);
            }
        }
    }

    /// None half of the time.
    fn noise(&mut self) -> f64 {
        if self.random.below(2) == 0 { 0.0 } else { self.grain * self.random.scale(NOISE.0, NOISE.1) }
    }

    /// Decides everything some times over; `held` keep their values until the last two times.
    fn descend(&mut self, held: &[usize], n_times: usize, noise: f64, stop: &mut dyn FnMut() -> bool) {
        self.prices.copy_from_slice(self.relaxation.prices());
        let free: Vec<usize> = self.everything.iter().copied().filter(|x| !held.contains(x)).collect();
        let pace = self.random.scale(0.05, 0.5);
        for i in 0..n_times {
            let mut cost = self.field.priced(&self.prices);
            if noise > 0.0 {
                cost.iter_mut().for_each(|c| *c += self.random.exponential(noise));
            }
            let block = if i + 2 < n_times { &free } else { &self.everything };
            let order = self.eliminator.order(self.field, block, CAPS[i % CAPS.len()], &mut self.random);
            self.eliminator.minimise(self.field, &cost, &order, &mut self.walk);
            self.work += order.work + self.field.tables.len() as u64 / 4;
            let load = self.consider_walk();
            if stop() {
                return;
            }
            self.move_prices(&load, pace / (1.0 + i as f64 / 4.0));
        }
    }

    /// Changes a few values of the walk, mostly where the relaxation says that they cost; those changed.
    fn kick(&mut self) -> Vec<usize> {
        let field = self.field;
        let excess = |x: usize, a: usize| self.excess[field.first[x] + a];
        let before: Vec<f64> = {
            let weights: Vec<f64> = self.walk.iter().enumerate().map(|(x, &a)| excess(x, a)).collect();
            sums(&weights)
        };
        let total = before[field.n()];
        let mut changed = Vec::new();
        for _ in 0..1 + self.random.below(3) {
            let x = match self.random.below(4) {
                0 if !self.hubs.is_empty() => self.hubs[self.random.below(self.hubs.len())],
                _ if total > 0.0 && total.is_finite() => {
                    let at = self.random.unit() * total;
                    before.partition_point(|&b| b <= at) - 1
                }
                _ => self.random.below(field.n()),
            };
            let x = x.min(field.n() - 1);
            // The less a value costs, the likelier.
            let mut weights: Vec<f64> =
                (0..field.n_values(x)).map(|a| 1.0 / (1.0 + excess(x, a) / self.grain)).collect();
            weights[self.walk[x]] = 0.0;
            let before = sums(&weights);
            let at = self.random.unit() * before[weights.len()];
            self.walk[x] = (before.partition_point(|&b| b <= at) - 1).min(weights.len() - 1);
            changed.push(x);
        }
        changed
    }

    /// Has the relaxation decide some hubs anew, the others kept.
    fn dive(&mut self) {
        let Some(best) = &self.best else { return };
        let renewed = self.random.scale(0.03, 1.0);
        let mut open = vec![false; self.field.n()];
        if self.random.below(2) == 0 {
            self.hubs.iter().for_each(|&x| open[x] = self.random.unit() < renewed);
        } else {
            let size = (renewed * self.field.n() as f64) as usize;
            ball(self.field, size.max(10), &mut self.random).into_iter().for_each(|x| open[x] = true);
        }
        let (open, kept): (Vec<usize>, Vec<usize>) = self.hubs.iter().partition(|x| open[**x]);
        let decided: Vec<(usize, usize)> = kept.into_iter().map(|x| (x, best.values[x])).collect();
        let noise = self.noise();
        let dive = Dive { decided: &decided, open: &open, share: 0.1, noise };
        self.walk = self.relaxation.dive(self.field, dive, &mut self.random);
        self.consider_walk();
        self.work += 2 * self.field.tables.len() as u64 * (3 + open.len().min(20) as u64);
    }

    /// Decides a ball of variables.
    fn near(&mut self) {
        let (factor, noise) = (self.random.scale(0.5, 2.0), self.noise());
        let Some(best) = &mut self.best else { return };
        let field = self.field;
        let size = self.random.scale(8.0, 256.0) as usize;
        let ball = ball(field, size, &mut self.random);
        let before = sums(self.relaxation.prices());
        let mut cost = field.cost.clone();
        for &x in &ball {
            let cost = &mut cost[field.first[x]..field.first[x + 1]];
            field.pay(x, &before, factor, cost);
            if noise > 0.0 {
                cost.iter_mut().for_each(|c| *c += self.random.exponential(noise));
            }
        }
        let cap = BALL_CAPS[self.random.below(BALL_CAPS.len())];
        let order = self.eliminator.order(field, &ball, cap, &mut self.random);
        let mut values = best.values.clone();
        self.eliminator.minimise(field, &cost, &order, &mut values);
        best.improve(field, &values, &order.variables, &mut self.random);
        self.work += order.work + (field.cost.len() + field.room.len()) as u64;
    }

    /// Prices follow the walk: up where it uses too much, down where it leaves room.
    fn move_prices(&mut self, load: &[f64], pace: f64) {
        let over: Vec<f64> = load.iter().zip(&self.field.room).map(|(l, r)| l - r).collect();
        let counts = |(o, p): (&f64, &f64)| if *p > 0.0 || *o > 0.0 { o * o } else { 0.0 };
        let norm: f64 = over.iter().zip(&self.prices).map(counts).sum();
        if norm > 0.0 {
            let step = pace * self.urgency * self.grain * self.field.n() as f64 / norm;
            for (price, o) in self.prices.iter_mut().zip(over) {
                *price = (*price + step * if o > 0.0 { o } else { 0.3 * o }).max(0.0);
            }
        }
    }

    /// Takes over what is good about the walk; its load.
    fn consider_walk(&mut self) -> Vec<f64> {
        let load = self.field.load_of(&self.walk);
        let cost = self.field.cost_of(&self.walk);
        let fits = fits(&load, &self.field.room);
        match &mut self.best {
            Some(best) if !fits || cost >= best.cost => {
                best.improve(self.field, &self.walk, &self.everything, &mut self.random);
            }
            _ if fits => {
                self.best = Some(State { values: self.walk.clone(), cost, load: load.clone() });
                self.urgency = 1.0;
            }
            _ => {}
        }
        load
    }
}

/// Variables around one to three random ones, nearest first, along some of the tables of each.
///
/// Several places may exchange memory.
fn ball(field: &Field, size: usize, random: &mut Random) -> Vec<usize> {
    let mut ball: Vec<usize> = Vec::with_capacity(size);
    let mut inside = std::collections::BTreeSet::new();
    let n_places = 1 + random.below(3);
    for place in 1..=n_places {
        let mut next = ball.len();
        let first = random.below(field.n());
        if inside.insert(first) {
            ball.push(first);
        }
        while ball.len() < size * place / n_places && next < ball.len() {
            let sides = field.sides(ball[next]);
            next += 1;
            if sides.is_empty() {
                continue;
            }
            let (some, from) = (1 + random.below(6), random.below(sides.len()));
            for i in 0..some.min(sides.len()) {
                let y = sides[(from + i) % sides.len()].other;
                if inside.insert(y) {
                    ball.push(y);
                }
            }
        }
    }
    ball
}
