//! Makes a network smaller without losing its optimum.
//!
//! Most couplings of a sharded graph say "the same strategy as my neighbour": such an op joins its neighbour, memory
//! and all. What remains is an order of magnitude smaller than the graph.

use std::collections::VecDeque;

use super::dominance;
use super::network::{Network, Part, Variable};
use super::relaxation::least_at;

/// How the strategy of an op follows from another's.
#[derive(Clone, Debug)]
struct Follow {
    op: usize,
    leader: usize,
    /// By strategy of the leader.
    strategy: Vec<u32>,
}

/// A smaller network and the way back.
#[derive(Clone, Debug)]
pub struct Reduced {
    pub network: Network,
    /// What may still be used at each point that can be exceeded.
    pub room: Vec<f64>,
    /// Which point each was at first.
    pub points: Vec<usize>,
    follows: Vec<Follow>,
}

/// No choice is left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Contradiction {
    /// Every strategy of an op is forbidden, by itself or by its neighbours.
    NoStrategy { op: usize },
    /// At a point (as numbered at first) the leanest strategies together use this much more than there is.
    Memory { point: usize, over: f64 },
}

impl Reduced {
    /// `limit`: memory at each point.
    pub fn new(network: Network, limit: Vec<f64>) -> Self {
        Self { network, points: (0..limit.len()).collect(), room: limit, follows: Vec::new() }
    }

    /// Applies all reductions until none is left; values that cost infinity are gone afterwards.
    ///
    /// `stop` ends the work early; the result is valid then, too.
    pub fn reduce(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<(), Contradiction> {
        let (n, n_tables) = (self.network.variables.len(), self.network.tables.len());
        let mut work = Work {
            floor: vec![0.0; self.room.len() + 1],
            reduced: self,
            queue: VecDeque::new(),
            queued: vec![false; n_tables],
            dirty: vec![true; n],
        };
        (0..n).try_for_each(|x| work.drop_impossible(x))?;
        (0..n_tables).for_each(|t| work.enqueue(t));
        work.settle()?;
        loop {
            work.fit_memory()?;
            if !work.dominate(stop)? || stop() {
                break;
            }
        }
        work.fit_memory()?;
        self.take_alone();
        Ok(())
    }

    /// Settles variables without neighbours or memory.
    fn take_alone(&mut self) {
        for v in &mut self.network.variables {
            if v.near.is_empty() && v.parts.is_empty() && v.n_values() > 0 {
                let best = least_at(&v.cost);
                self.network.constant += v.cost[best];
                *v = Variable { strategy: vec![v.strategy[best]], ..Variable::default() };
            }
        }
    }

    /// Strategies of all ops; `value` tells which value a variable of the network takes.
    pub fn expand(&self, value: impl Fn(usize) -> usize) -> Vec<u32> {
        let settled = |v: &Variable| v.n_values() == 0;
        let chosen = self.network.variables.iter().enumerate().map(|(x, v)| match v.strategy[..] {
            [only] if settled(v) => only,
            [] => 0,
            _ => v.strategy[value(x)],
        });
        let mut strategy: Vec<u32> = chosen.collect();
        for f in self.follows.iter().rev() {
            strategy[f.op] = f.strategy[strategy[f.leader] as usize];
        }
        strategy
    }
}

struct Work<'r> {
    reduced: &'r mut Reduced,
    /// What was taken off the parts and not yet off the room, as differences.
    floor: Vec<f64>,
    queue: VecDeque<usize>,
    /// By table.
    queued: Vec<bool>,
    /// Variables whose surroundings changed since values were last compared.
    dirty: Vec<bool>,
}

impl Work<'_> {
    fn enqueue(&mut self, table: usize) {
        if self.queued.len() <= table {
            self.queued.resize(table + 1, false);
        }
        if !std::mem::replace(&mut self.queued[table], true) {
            self.queue.push_back(table);
        }
        for x in self.reduced.network.tables[table].ends {
            self.dirty[x] = true;
        }
    }

    fn enqueue_around(&mut self, x: usize) {
        self.dirty[x] = true;
        let tables: Vec<usize> = self.reduced.network.variables[x].near.values().copied().collect();
        tables.into_iter().for_each(|t| self.enqueue(t));
    }

    /// Removes values that are forbidden by themselves.
    fn drop_impossible(&mut self, x: usize) -> Result<(), Contradiction> {
        let cost = &self.reduced.network.variables[x].cost;
        if cost.is_empty() {
            return Ok(());
        }
        let kept: Vec<usize> = (0..cost.len()).filter(|&a| cost[a] < f64::INFINITY).collect();
        self.keep(x, &kept)
    }

    fn keep(&mut self, x: usize, kept: &[usize]) -> Result<(), Contradiction> {
        if kept.is_empty() {
            return Err(Contradiction::NoStrategy { op: x });
        }
        if kept.len() < self.reduced.network.n_values(x) {
            self.reduced.network.keep(x, kept);
            self.enqueue_around(x);
        }
        Ok(())
    }

    /// Rules that look at one table.
    fn settle(&mut self) -> Result<(), Contradiction> {
        while let Some(table) = self.queue.pop_front() {
            self.queued[table] = false;
            let t = &self.reduced.network.tables[table];
            if t.cost.is_empty() {
                continue;
            }
            let [x, y] = t.ends;
            let width = self.reduced.network.n_values(y);
            let mut rows = vec![0usize; self.reduced.network.n_values(x)];
            let mut columns = vec![0usize; width];
            for (i, &c) in t.cost.iter().enumerate() {
                if c < f64::INFINITY {
                    rows[i / width] += 1;
                    columns[i % width] += 1;
                }
            }
            let some = |counts: &[usize]| -> Vec<usize> { (0..counts.len()).filter(|&i| counts[i] > 0).collect() };
            let (kept_rows, kept_columns) = (some(&rows), some(&columns));
            if kept_rows.len() < rows.len() || kept_columns.len() < columns.len() {
                self.keep(x, &kept_rows)?;
                self.keep(y, &kept_columns)?;
                self.enqueue(table);
                continue;
            }
            if let Some((left, right)) = separate(&t.cost, width) {
                self.reduced.network.take(table, x);
                for (end, cost) in [(x, left), (y, right)] {
                    for (have, more) in self.reduced.network.variables[end].cost.iter_mut().zip(cost) {
                        *have += more;
                    }
                    self.dirty[end] = true;
                }
                continue;
            }
            let follows_y = columns.iter().all(|&c| c == 1);
            let follows_x = rows.iter().all(|&c| c == 1);
            let size = |x: usize| {
                let v = &self.reduced.network.variables[x];
                v.near.len() * 8 + v.parts.len()
            };
            match (follows_y, follows_x) {
                (true, true) if size(x) > size(y) => self.join(y, x, table),
                (true, _) if follows_y => self.join(x, y, table),
                (_, true) => self.join(y, x, table),
                _ => {}
            }
        }
        Ok(())
    }

    /// Lets `x` follow `y`: its value is a function of that of `y`.
    fn join(&mut self, x: usize, y: usize, table: usize) {
        let network = &mut self.reduced.network;
        let (n_x, n_y) = (network.n_values(x), network.n_values(y));
        let rows = network.take(table, y);
        let follow: Vec<usize> = rows.chunks(n_x).map(|r| r.iter().position(|c| c.is_finite()).unwrap_or(0)).collect();
        let mut old = std::mem::take(&mut network.variables[x]);
        let leader = &mut network.variables[y];
        let n_strategies = leader.strategy.iter().max().map_or(0, |&s| s as usize + 1);
        let mut strategy = vec![u32::MAX; n_strategies];
        for b in 0..n_y {
            leader.cost[b] += old.cost[follow[b]] + rows[b * n_x + follow[b]];
            strategy[leader.strategy[b] as usize] = old.strategy[follow[b]];
        }
        for part in old.parts.drain(..) {
            let usage = follow.iter().map(|&a| part.usage[a]).collect();
            leader.parts.push(Part { usage, ..part });
        }
        let near: Vec<(usize, usize)> = std::mem::take(&mut old.near).into_iter().collect();
        network.variables[x] = old;
        for (z, table) in near {
            let network = &mut self.reduced.network;
            let n_z = network.n_values(z);
            let rows = network.rows(table, x);
            network.tables[table].cost = Vec::new();
            network.variables[z].near.remove(&x);
            let rows = follow.iter().flat_map(|&a| &rows[a * n_z..][..n_z]).copied().collect();
            let table = network.add(y, z, rows);
            self.enqueue(table);
        }
        self.reduced.network.variables[x] = Default::default();
        self.reduced.follows.push(Follow { op: x, leader: y, strategy });
        self.dirty[y] = true;
        self.enqueue_around(y);
    }

    /// Removes values that some point has no room for, and points that cannot be exceeded.
    fn fit_memory(&mut self) -> Result<(), Contradiction> {
        loop {
            for v in &mut self.reduced.network.variables {
                v.tidy(&mut self.floor);
            }
            let mut sum = 0.0;
            for (room, floor) in self.reduced.room.iter_mut().zip(&mut self.floor) {
                sum += std::mem::take(floor);
                *room -= sum;
            }
            self.floor.fill(0.0);
            if let Some(at) = self.reduced.room.iter().position(|&r| r < 0.0) {
                return Err(Contradiction::Memory { point: self.reduced.points[at], over: -self.reduced.room[at] });
            }
            let mut most = vec![0.0; self.reduced.room.len() + 1];
            for part in self.reduced.network.variables.iter().flat_map(|v| &v.parts) {
                let u = part.usage.iter().copied().fold(0.0, f64::max);
                most[part.from] += u;
                most[part.to] -= u;
            }
            let mut sum = 0.0;
            let needed: Vec<bool> = self
                .reduced
                .room
                .iter()
                .zip(&most)
                .map(|(room, m)| {
                    sum += m;
                    sum > *room
                })
                .collect();
            self.forget_points(&needed);
            let mut changed = false;
            let least = RangeMinimum::new(&self.reduced.room);
            for x in 0..self.reduced.network.variables.len() {
                let v = &self.reduced.network.variables[x];
                let mut fits = vec![true; v.n_values()];
                for part in &v.parts {
                    let room = least.of(part.from, part.to);
                    for (f, u) in fits.iter_mut().zip(&part.usage) {
                        *f &= *u <= room;
                    }
                }
                if fits.iter().any(|f| !f) {
                    let kept: Vec<usize> = (0..fits.len()).filter(|&a| fits[a]).collect();
                    self.keep(x, &kept)?;
                    changed = true;
                }
            }
            if !changed {
                return Ok(());
            }
            self.settle()?;
        }
    }

    fn forget_points(&mut self, needed: &[bool]) {
        if needed.iter().all(|n| *n) {
            return;
        }
        let mut new = Vec::with_capacity(needed.len() + 1);
        let mut n = 0;
        for &kept in needed {
            new.push(n);
            n += usize::from(kept);
        }
        new.push(n);
        let mut keep = needed.iter();
        self.reduced.room.retain(|_| *keep.next().unwrap_or(&false));
        let mut keep = needed.iter();
        self.reduced.points.retain(|_| *keep.next().unwrap_or(&false));
        self.floor = vec![0.0; n + 1];
        for v in &mut self.reduced.network.variables {
            for part in &mut v.parts {
                (part.from, part.to) = (new[part.from], new[part.to]);
            }
            v.parts.retain(|p| p.from < p.to);
        }
    }

    /// Removes values and pairs for which there is a substitute; tells whether any were.
    fn dominate(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<bool, Contradiction> {
        let mut any = false;
        for x in 0..self.dirty.len() {
            if !std::mem::take(&mut self.dirty[x]) || self.reduced.network.n_values(x) < 2 {
                continue;
            }
            if stop() {
                break;
            }
            let found = dominance::of(&self.reduced.network, x);
            for (table, rows) in found.tables {
                self.reduced.network.set_rows(table, x, rows);
                self.enqueue(table);
                any = true;
            }
            if found.kept.len() < self.reduced.network.n_values(x) {
                self.keep(x, &found.kept)?;
                any = true;
            }
        }
        self.settle()?;
        Ok(any)
    }
}

/// Row and column costs that add up to the table, where there are such.
fn separate(cost: &[f64], width: usize) -> Option<(Vec<f64>, Vec<f64>)> {
    let first = cost[0];
    if first == f64::INFINITY {
        return None;
    }
    let holds = |(i, c): (usize, &f64)| *c == cost[i / width * width] + (cost[i % width] - first);
    if !cost.iter().enumerate().all(holds) || cost[..width].iter().any(|c| c.is_infinite()) {
        return None;
    }
    let left: Vec<f64> = cost.iter().step_by(width).copied().collect();
    if left.iter().any(|c| c.is_infinite()) {
        return None;
    }
    Some((left, cost[..width].iter().map(|c| c - first).collect()))
}

/// Least of any range in constant time.
struct RangeMinimum {
    /// By level: least of the 2^level values from here.
    levels: Vec<Vec<f64>>,
}

impl RangeMinimum {
    fn new(values: &[f64]) -> Self {
        let mut levels = vec![values.to_vec()];
        let mut half = 1;
        while 2 * half <= values.len() {
            let last = &levels[levels.len() - 1];
            let next = (0..=values.len() - 2 * half).map(|i| last[i].min(last[i + half])).collect();
            levels.push(next);
            half *= 2;
        }
        Self { levels }
    }

    /// Least in `from..to`; infinity of nothing.
    fn of(&self, from: usize, to: usize) -> f64 {
        if from >= to {
            return f64::INFINITY;
        }
        let level = (to - from).ilog2() as usize;
        self.levels[level][from].min(self.levels[level][to - (1 << level)])
    }
}
