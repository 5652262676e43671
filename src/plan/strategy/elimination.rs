//! Exact choices for many variables at once, the others given.
//!
//! Variables are eliminated one by one: each leaves a table that tells its best cost for every choice of its
//! neighbours. Which are eliminated is decided by the size of these tables; a variable that would make them too large
//! keeps its value.
//!
//! # Source
//! Non-serial dynamic programming (Bertelè and Brioschi, 1972), with cutset conditioning (Dechter, 1990).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::field::Field;
use super::relaxation::least_at;
use crate::plan::random::Random;

/// Variables in the order in which they are eliminated.
#[derive(Clone, Debug, Default)]
pub struct Order {
    pub variables: Vec<usize>,
    /// Table entries to be filled.
    pub work: u64,
}

const OUTSIDE: usize = usize::MAX;

/// Room to work in, reused.
#[derive(Debug, Default)]
pub struct Eliminator {
    /// By variable.
    inside: Vec<bool>,
    near: Vec<Vec<usize>>,
    stamp: Vec<u32>,
    position: Vec<usize>,
}

/// What an eliminated variable left behind: a table over its neighbours, the first to go as the fastest index.
#[derive(Debug)]
struct Left {
    /// Descending by position; without the variable that the table waits for, which is the fastest index.
    others: Vec<usize>,
    cost: Vec<f64>,
}

impl Eliminator {
    pub fn new(n: usize) -> Self {
        Self { inside: vec![false; n], near: vec![Vec::new(); n], stamp: vec![0; n], position: vec![OUTSIDE; n] }
    }

    /// An order for the variables of `block`, smallest tables first.
    ///
    /// No table (with the eliminated variable) is larger than `cap` entries: where all would be, one variable is left
    /// out and keeps its value, mostly one with many neighbours.
    pub fn order(&mut self, field: &Field, block: &[usize], cap: u64, random: &mut Random) -> Order {
        for &x in block {
            self.inside[x] = true;
        }
        let mut heap = BinaryHeap::with_capacity(2 * block.len());
        for &x in block {
            self.near[x].clear();
            let sides = field.sides(x).iter().map(|s| s.other);
            self.near[x].extend(sides.filter(|&y| self.inside[y]));
        }
        for &x in block {
            heap.push((Reverse(self.size(field, x)), random.bits() as u32, x, self.stamp[x]));
        }
        let mut order = Order::default();
        // Where a variable to leave out is looked for; shrinks with the block.
        let mut open: Vec<usize> = block.to_vec();
        while let Some((Reverse(size), tie, x, stamp)) = heap.pop() {
            if !self.inside[x] || self.stamp[x] != stamp {
                continue;
            }
            let gone = if size <= cap {
                order.variables.push(x);
                order.work += size;
                x
            } else {
                open.retain(|&y| self.inside[y]);
                let left_out = self.left_out(field, x, &open, random);
                if left_out != x {
                    heap.push((Reverse(size), tie, x, stamp));
                }
                left_out
            };
            self.inside[gone] = false;
            let around = std::mem::take(&mut self.near[gone]);
            for &y in &around {
                self.near[y].retain(|&z| z != gone);
                if size <= cap {
                    let missing: Vec<usize> =
                        around.iter().copied().filter(|&z| z != y && !self.near[y].contains(&z)).collect();
                    self.near[y].extend(missing);
                }
                self.stamp[y] = self.stamp[y].wrapping_add(1);
                heap.push((Reverse(self.size(field, y)), random.bits() as u32, y, self.stamp[y]));
            }
        }
        order
    }

    /// Entries of the table that eliminating `x` fills.
    fn size(&self, field: &Field, x: usize) -> u64 {
        self.near[x].iter().fold(field.n_values(x) as u64, |s, &y| s.saturating_mul(field.n_values(y) as u64))
    }

    fn left_out(&self, field: &Field, x: usize, open: &[usize], random: &mut Random) -> usize {
        match random.below(4) {
            0 => x,
            1 => open[random.below(open.len())],
            _ => {
                let weight = |x: usize| self.near[x].len() as f64 * (field.n_values(x) as f64).ln();
                let weighed = open.iter().map(|&x| (x, weight(x) * (0.7 + random.unit())));
                weighed.max_by(|a, b| a.1.total_cmp(&b.1)).map_or(x, |(x, _)| x)
            }
        }
    }

    /// Sets the variables of `order` to their best values, the others given.
    ///
    /// `cost`: by value of all variables.
    pub fn minimise(&mut self, field: &Field, cost: &[f64], order: &Order, values: &mut [usize]) {
        for (i, &x) in order.variables.iter().enumerate() {
            self.position[x] = i;
        }
        let mut left: Vec<Vec<Left>> = Vec::with_capacity(order.variables.len());
        left.resize_with(order.variables.len(), Vec::new);
        let mut own = Vec::with_capacity(order.variables.len());
        for (i, &x) in order.variables.iter().enumerate() {
            let n_x = field.n_values(x);
            let mut base = cost[field.first[x]..][..n_x].to_vec();
            let mut terms = Vec::new();
            for side in field.sides(x) {
                let at = self.position[side.other];
                if at == OUTSIDE {
                    add(&mut base, field.beside(x, side, values[side.other]));
                } else if at > i {
                    terms.push(Term { others: vec![side.other], cost: &field.tables[side.columns..] });
                }
            }
            for l in &left[i] {
                if l.others.is_empty() {
                    add(&mut base, &l.cost);
                } else {
                    terms.push(Term { others: l.others.clone(), cost: &l.cost });
                }
            }
            let mut scope: Vec<usize> = terms.iter().flat_map(|t| t.others.iter().copied()).collect();
            scope.sort_unstable_by_key(|&y| Reverse(self.position[y]));
            scope.dedup();
            if let Some((&next, others)) = scope.split_last() {
                let cost = Product::new(field, &scope, &terms, &base).least();
                left[self.position[next]].push(Left { others: others.to_vec(), cost });
            }
            own.push(base);
        }
        for (i, &x) in order.variables.iter().enumerate().rev() {
            let cost = &mut own[i];
            for side in field.sides(x) {
                let at = self.position[side.other];
                if at != OUTSIDE && at > i {
                    add(cost, field.beside(x, side, values[side.other]));
                }
            }
            for l in left[i].iter().filter(|l| !l.others.is_empty()) {
                let at = l.others.iter().fold(0, |at, &y| at * field.n_values(y) + values[y]);
                add(cost, &l.cost[at * field.n_values(x)..]);
            }
            values[x] = least_at(cost);
        }
        for &x in &order.variables {
            self.position[x] = OUTSIDE;
        }
    }
}

fn add(to: &mut [f64], more: &[f64]) {
    for (t, m) in to.iter_mut().zip(more) {
        *t += m;
    }
}

/// A table with the eliminated variable as the fastest index.
struct Term<'a> {
    others: Vec<usize>,
    cost: &'a [f64],
}

/// All choices of the neighbours of one variable.
struct Product<'a> {
    /// Values of each neighbour.
    sizes: Vec<usize>,
    /// By depth: terms whose last neighbour is chosen there.
    complete: Vec<Vec<usize>>,
    terms: &'a [Term<'a>],
    /// By depth, then term: how far one more value goes.
    strides: Vec<usize>,
    /// By depth, then value: sums of the terms that are complete.
    sums: Vec<f64>,
    /// By depth, then term: where the choice so far leads.
    at: Vec<usize>,
    n_x: usize,
}

impl<'a> Product<'a> {
    fn new(field: &Field, scope: &[usize], terms: &'a [Term<'a>], base: &[f64]) -> Self {
        let (n_x, depth) = (base.len(), scope.len());
        let mut complete = vec![Vec::new(); depth];
        let mut strides = vec![0; depth * terms.len()];
        for (t, term) in terms.iter().enumerate() {
            let mut stride = n_x;
            let mut last = 0;
            for &y in term.others.iter().rev() {
                let d = scope.iter().position(|&z| z == y).unwrap_or(0);
                strides[d * terms.len() + t] = stride;
                stride *= field.n_values(y);
                last = last.max(d);
            }
            complete[last].push(t);
        }
        let mut sums = vec![0.0; (depth + 1) * n_x];
        sums[..n_x].copy_from_slice(base);
        let sizes = scope.iter().map(|&y| field.n_values(y)).collect();
        Self { sizes, complete, terms, strides, sums, at: vec![0; (depth + 1) * terms.len()], n_x }
    }

    fn least(mut self) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.sizes.iter().product());
        self.descend(0, &mut out);
        out
    }

    fn descend(&mut self, depth: usize, out: &mut Vec<f64>) {
        let (n_x, n_terms) = (self.n_x, self.terms.len());
        if depth == self.sizes.len() {
            let sums = &self.sums[depth * n_x..];
            out.push(sums.iter().fold(f64::INFINITY, |least, &s| if s < least { s } else { least }));
            return;
        }
        for value in 0..self.sizes[depth] {
            for t in 0..n_terms {
                self.at[(depth + 1) * n_terms + t] =
                    self.at[depth * n_terms + t] + value * self.strides[depth * n_terms + t];
            }
            let (before, after) = self.sums.split_at_mut((depth + 1) * n_x);
            let sums = &mut after[..n_x];
            sums.copy_from_slice(&before[depth * n_x..]);
            for &t in &self.complete[depth] {
                add(sums, &self.terms[t].cost[self.at[(depth + 1) * n_terms + t]..]);
            }
            self.descend(depth + 1, out);
        }
    }
}
