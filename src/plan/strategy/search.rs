//! Finds cheap choices that fit, by re-deciding many variables at once.
//!
//! Two kinds of moves, both exact by elimination: all variables but those that would make the tables too large, and
//! balls around a variable. Memory is paid for meanwhile. What such a move proposes falls apart into groups of variables
//! that touch nowhere: each group that saves cost and fits is taken over by itself.

use super::elimination::{Eliminator, Order};
use super::field::Field;
use super::random::Random;

/// Moves over everything before prices and values return to the best.
const EPOCH: usize = 24;
/// Largest tables of moves over everything.
const CAPS: [u64; 4] = [300, 3_000, 30_000, 100_000];
/// Largest tables of moves in a ball.
const BALL_CAPS: [u64; 3] = [1_000, 10_000, 100_000];

/// A choice for every variable, with what follows from it.
#[derive(Clone, Debug)]
pub struct State {
    pub values: Vec<usize>,
    pub cost: f64,
    pub load: Vec<f64>,
}

/// Variables that change together.
struct Group {
    members: Vec<usize>,
    cost: f64,
    /// Added memory from each point on until the next entry.
    steps: Vec<(usize, f64)>,
}

/// A search over a field whose forbidden pairs have a finite price.
pub struct Search<'f> {
    field: &'f Field,
    /// Of memory, from the relaxation.
    anchor: Vec<f64>,
    prices: Vec<f64>,
    /// Where the moves over everything are.
    walk: Vec<usize>,
    /// The cheapest choice that fits. It may still contain forbidden pairs.
    best: Option<State>,
    eliminator: Eliminator,
    random: Random,
    everything: Vec<usize>,
    n_moves: usize,
    /// What a typical variable may lose; scale of the noise.
    grain: f64,
    /// Variables that belong to the group that is being found.
    touched: Vec<bool>,
}

impl<'f> Search<'f> {
    /// `start`: a first choice, which need not fit; `grain`: the gap to the bound over the number of variables.
    pub fn new(field: &'f Field, prices: &[f64], start: Vec<usize>, grain: f64, random: Random) -> Self {
        let mut search = Self {
            anchor: prices.to_vec(),
            prices: prices.to_vec(),
            best: None,
            eliminator: Eliminator::new(field.n()),
            random,
            everything: (0..field.n()).collect(),
            n_moves: 0,
            grain,
            touched: vec![false; field.n()],
            walk: start,
            field,
        };
        search.consider_walk();
        search
    }

    pub fn best(&self) -> Option<&State> {
        self.best.as_ref()
    }

    pub fn into_random(self) -> Random {
        self.random
    }

    /// Moves until about `work` table entries were filled.
    pub fn run(&mut self, work: u64, stop: &mut dyn FnMut() -> bool) {
        let mut done = 0;
        while done < work && !stop() {
            let everywhere = self.everywhere();
            done += everywhere;
            let mut nearby = 0;
            while self.best.is_some() && nearby < everywhere && !stop() {
                nearby += self.nearby();
            }
            done += nearby;
        }
    }

    /// Re-decides all variables that allow it.
    fn everywhere(&mut self) -> u64 {
        let at = self.n_moves % EPOCH;
        if at == 0 && let Some(best) = &self.best {
            self.walk.clone_from(&best.values);
            self.prices.clone_from(&self.anchor);
        }
        let mut cost = self.field.priced(&self.prices);
        if self.n_moves / EPOCH % 2 == 1 {
            let strength = self.grain * f64::exp2(12.0 * self.random.unit() - 4.0);
            self.add_noise(&mut cost, strength);
        }
        let cap = CAPS[self.n_moves % CAPS.len()];
        let order = self.eliminator.order(self.field, &self.everything, cap, &mut self.random);
        self.eliminator.minimise(self.field, &cost, &order, &mut self.walk);
        self.n_moves += 1;
        let load = self.consider_walk();
        self.move_prices(&load, 1.0 / (1.0 + at as f64 / 4.0));
        order.work + self.field.tables.len() as u64 / 8
    }

    /// Re-decides a ball around some variable.
    fn nearby(&mut self) -> u64 {
        let Some(best) = &self.best else { return 0 };
        let mut values = best.values.clone();
        let size = (f64::exp2(3.0 + 5.0 * self.random.unit()) as usize).min(self.field.n());
        let ball = self.ball(size);
        let factor = f64::exp2(2.0 * self.random.unit() - 1.0);
        let prices: Vec<f64> = self.anchor.iter().map(|p| p * factor).collect();
        let mut cost = self.field.priced(&prices);
        if self.random.below(2) == 0 {
            let strength = self.grain * f64::exp2(12.0 * self.random.unit() - 4.0);
            self.add_noise(&mut cost, strength);
        }
        let cap = BALL_CAPS[self.random.below(BALL_CAPS.len())];
        let order: Order = self.eliminator.order(self.field, &ball, cap, &mut self.random);
        self.eliminator.minimise(self.field, &cost, &order, &mut values);
        let changed: Vec<usize> = order.variables.iter().copied().filter(|&x| values[x] != best_value(&self.best, x)).collect();
        self.merge(&values, &changed);
        order.work + (self.field.cost.len() + self.field.room.len()) as u64
    }

    fn add_noise(&mut self, cost: &mut [f64], strength: f64) {
        for c in cost {
            *c -= strength * (1.0 - self.random.unit()).ln();
        }
    }

    /// Variables around a random one, nearest first, along some of the tables of each.
    fn ball(&mut self, size: usize) -> Vec<usize> {
        let n = self.field.n();
        let first = self.random.below(n);
        let mut ball = vec![first];
        self.touched[first] = true;
        let mut next = 0;
        while ball.len() < size && next < ball.len() {
            let sides = self.field.sides(ball[next]);
            next += 1;
            if sides.is_empty() {
                continue;
            }
            let (some, from) = (1 + self.random.below(6), self.random.below(sides.len()));
            for i in 0..some.min(sides.len()) {
                let y = sides[(from + i) % sides.len()].other;
                if !std::mem::replace(&mut self.touched[y], true) {
                    ball.push(y);
                }
            }
        }
        for &x in &ball {
            self.touched[x] = false;
        }
        ball
    }

    /// Prices follow the walk: up where it uses too much, down where it leaves room.
    fn move_prices(&mut self, load: &[f64], pace: f64) {
        let over = || load.iter().zip(&self.field.room).map(|(l, r)| l - r);
        let counts = |o: f64, p: f64| if p > 0.0 || o > 0.0 { o * o } else { 0.0 };
        let norm: f64 = over().zip(&self.prices).map(|(o, &p)| counts(o, p)).sum();
        if norm > 0.0 {
            // Without anything that fits yet, the scale is that of the whole cost.
            let scale = self.best.as_ref().map_or(1.0, |_| 0.2);
            let step = pace * scale * self.grain * (self.field.n() as f64) / norm;
            let over: Vec<f64> = over().collect();
            for (price, o) in self.prices.iter_mut().zip(over) {
                *price = (*price + step * if o > 0.0 { o } else { 0.3 * o }).max(0.0);
            }
        }
    }

    /// Takes over what is good about the walk; its load.
    fn consider_walk(&mut self) -> Vec<f64> {
        let load = self.field.load_of(&self.walk);
        let fits = load.iter().zip(&self.field.room).all(|(l, r)| l <= r);
        let cost = self.field.cost_of(&self.walk);
        match &self.best {
            Some(best) if !(fits && cost < best.cost) => {
                let values = std::mem::take(&mut self.walk);
                let changed: Vec<usize> =
                    (0..self.field.n()).filter(|&x| values[x] != best_value(&self.best, x)).collect();
                self.merge(&values, &changed);
                self.walk = values;
            }
            _ if fits => self.best = Some(State { values: self.walk.clone(), cost, load: load.clone() }),
            _ => {}
        }
        load
    }

    /// Takes over the groups among the `changed` variables that make the best choice cheaper and still fit.
    fn merge(&mut self, values: &[usize], changed: &[usize]) {
        let groups = self.groups(values, changed);
        let field = self.field;
        let Some(best) = &mut self.best else { return };
        if groups.is_empty() {
            return;
        }
        // From the best choice: the most saving first; what is equal is taken every other time.
        let mut rank: Vec<usize> = (0..groups.len()).collect();
        rank.sort_by(|&a, &b| groups[a].cost.total_cmp(&groups[b].cost));
        let mut grown = best.clone();
        for &g in &rank {
            let group = &groups[g];
            let wanted = group.cost < 0.0 || (group.cost == 0.0 && self.random.below(2) == 0);
            if wanted && group.fits(&grown.load, &field.room) {
                group.apply(&mut grown.load, 1.0);
                grown.cost += group.cost;
                group.members.iter().for_each(|&x| grown.values[x] = values[x]);
            }
        }
        // From the proposal: groups are given back where they cost least per memory at the worst point.
        let total: f64 = groups.iter().map(|g| g.cost).sum();
        if best.cost + total < grown.cost && groups.len() > 1 {
            let mut kept = vec![true; groups.len()];
            let (mut cost, mut load) = (best.cost + total, best.load.clone());
            groups.iter().for_each(|g| g.apply(&mut load, 1.0));
            while cost < grown.cost {
                let over = |t: usize| load[t] - field.room[t];
                let worst = (0..load.len()).max_by(|&s, &t| over(s).total_cmp(&over(t)));
                let Some(worst) = worst.filter(|&t| over(t) > 0.0) else {
                    break;
                };
                let frees = |g: &usize| groups[*g].at(worst);
                let candidates = (0..groups.len()).filter(|g| kept[*g] && frees(g) > 0.0);
                let price = |g: &usize| -groups[*g].cost / frees(g).min(over(worst));
                let Some(back) = candidates.min_by(|a, b| price(a).total_cmp(&price(b))) else { break };
                kept[back] = false;
                cost -= groups[back].cost;
                groups[back].apply(&mut load, -1.0);
            }
            if cost < grown.cost && load.iter().zip(&field.room).all(|(l, r)| l <= r) {
                grown = State { values: best.values.clone(), cost, load };
                let kept = groups.iter().zip(&kept).filter(|(_, kept)| **kept);
                kept.flat_map(|(g, _)| &g.members).for_each(|&x| grown.values[x] = values[x]);
            }
        }
        *best = grown;
    }

    /// Splits a change of the best choice into groups that share no table.
    fn groups(&mut self, values: &[usize], changed: &[usize]) -> Vec<Group> {
        let field = self.field;
        let Some(best) = &self.best else { return Vec::new() };
        let old = &best.values;
        for &x in changed {
            self.touched[x] = true;
        }
        let mut groups = Vec::new();
        for &start in changed {
            if !std::mem::take(&mut self.touched[start]) {
                continue;
            }
            let mut members = vec![start];
            let mut next = 0;
            let (mut cost, mut steps) = (0.0, Vec::new());
            while let Some(&x) = members.get(next) {
                next += 1;
                cost += field.cost[field.first[x] + values[x]] - field.cost[field.first[x] + old[x]];
                for side in field.sides(x) {
                    let y = side.other;
                    // A pair inside is counted from below; outside, values are the old ones.
                    if values[y] == old[y] || x < y {
                        cost += field.pair_cost(side, values[x], values[y]) - field.pair_cost(side, old[x], old[y]);
                    }
                    if std::mem::take(&mut self.touched[y]) {
                        members.push(y);
                    }
                }
                for span in field.spans(x) {
                    let usage = field.usage(x, span);
                    let more = usage[values[x]] - usage[old[x]];
                    if more != 0.0 {
                        steps.extend([(span.from, more), (span.to, -more)]);
                    }
                }
            }
            steps.sort_unstable_by_key(|s| s.0);
            let mut sum = 0.0;
            for s in &mut steps {
                sum += s.1;
                s.1 = sum;
            }
            // Of several entries at one point the last holds.
            steps.reverse();
            steps.dedup_by_key(|s| s.0);
            steps.reverse();
            groups.push(Group { members, cost, steps });
        }
        groups
    }
}

fn best_value(best: &Option<State>, x: usize) -> usize {
    best.as_ref().map_or(usize::MAX, |b| b.values[x])
}

impl Group {
    fn ranges(&self) -> impl Iterator<Item = (usize, usize, f64)> {
        self.steps.windows(2).map(|w| (w[0].0, w[1].0, w[0].1)).filter(|r| r.2 != 0.0)
    }

    /// Whether the memory added is there.
    fn fits(&self, load: &[f64], room: &[f64]) -> bool {
        let added = self.ranges().filter(|r| r.2 > 0.0);
        added.into_iter().all(|(from, to, more)| load[from..to].iter().zip(&room[from..to]).all(|(l, r)| l + more <= *r))
    }

    fn apply(&self, load: &mut [f64], sign: f64) {
        for (from, to, more) in self.ranges() {
            load[from..to].iter_mut().for_each(|l| *l += sign * more);
        }
    }

    /// Memory added at a point.
    fn at(&self, point: usize) -> f64 {
        self.ranges().find(|(from, to, _)| (*from..*to).contains(&point)).map_or(0.0, |r| r.2)
    }
}
