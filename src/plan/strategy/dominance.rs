//! Values and pairs of values that another can stand in for, whatever the neighbours do.
//!
//! Value `b` of a variable is not needed when some `a` uses no more memory at any point and costs no more whatever the
//! neighbours choose. Given a neighbour's value, the same holds for a pair. Known as dead-end elimination (Desmet et
//! al., Nature 1992; Goldstein, Biophysical Journal 1994), here with memory.

use super::network::{Network, Part};

/// What is not needed at one variable.
pub struct Found {
    /// Values to keep.
    pub kept: Vec<usize>,
    /// Tables with more pairs forbidden; the variable's values are the rows.
    pub tables: Vec<(usize, Vec<f64>)>,
}

/// A table around the variable.
struct Side {
    table: usize,
    /// Rows: values of the variable, each with 0 as its least.
    rows: Vec<f64>,
    width: usize,
    /// By value: what was taken off its row, where the row is least, and its highest finite cost.
    least: Vec<f64>,
    at: Vec<usize>,
    most: Vec<f64>,
    changed: bool,
}

/// Value `a` may stand in for value `b`.
struct Pair {
    a: usize,
    b: usize,
    /// By side: how much more `a` costs than `b` at worst.
    excess: Vec<f64>,
    /// Sum of the finite ones and the difference of the values' own costs.
    sum: f64,
    n_infinite: usize,
}

impl Side {
    fn new(table: usize, mut rows: Vec<f64>, width: usize) -> Self {
        let n = rows.len() / width;
        let (mut least, mut at, mut most) = (vec![0.0; n], vec![0; n], vec![0.0; n]);
        for (a, row) in rows.chunks_mut(width).enumerate() {
            let low = row.iter().copied().fold(f64::INFINITY, f64::min);
            if low.is_finite() {
                row.iter_mut().for_each(|c| *c -= low);
                least[a] = low;
            }
            at[a] = row.iter().position(|c| *c == 0.0).unwrap_or(0);
            most[a] = row.iter().copied().filter(|c| c.is_finite()).fold(0.0, f64::max);
        }
        Self { table, rows, width, least, at, most, changed: false }
    }

    fn row(&self, a: usize) -> &[f64] {
        &self.rows[a * self.width..][..self.width]
    }

    /// At least 0, because rows begin at 0 and `b` can be had there.
    fn excess(&self, a: usize, b: usize) -> f64 {
        let pairs = self.row(a).iter().zip(self.row(b)).filter(|(_, b)| b.is_finite());
        pairs.map(|(a, b)| a - b).fold(0.0, f64::max)
    }

    fn original(&self) -> Vec<f64> {
        self.rows.chunks(self.width).zip(&self.least).flat_map(|(row, low)| row.iter().map(move |c| c + low)).collect()
    }
}

/// Looks for what is not needed at `x`.
///
/// # Complexity
/// O(n² · neighbours) for n values, plus O(sum of the neighbours' values) for each pair that is not told apart by the
/// neighbours' best values.
pub fn of(network: &Network, x: usize) -> Found {
    let v = &network.variables[x];
    let n = v.n_values();
    let mut sides: Vec<Side> =
        v.near.iter().map(|(&y, &table)| Side::new(table, network.rows(table, x), network.n_values(y))).collect();
    let own: Vec<f64> = (0..n).map(|a| v.cost[a] + sides.iter().map(|s| s.least[a]).sum::<f64>()).collect();
    let mut gone = vec![false; n];
    let mut pairs = Vec::new();
    for b in 0..n {
        for a in (0..n).filter(|&a| a != b) {
            if gone[a] || gone[b] || !may_replace(&sides, own[a] - own[b], a, b) || !leaner(&v.parts, a, b) {
                continue;
            }
            let pair = Pair::new(&sides, own[a] - own[b], a, b);
            gone[b] = pair.n_infinite == 0 && pair.sum <= 0.0;
            if pair.n_infinite < 2 {
                pairs.push(pair);
            }
        }
    }
    pairs.retain(|p| !gone[p.a] && !gone[p.b]);
    for s in 0..sides.len() {
        forbid(&mut sides, s, &mut pairs, n);
    }
    let changed = sides.iter().filter(|s| s.changed);
    Found { kept: (0..n).filter(|&a| !gone[a]).collect(), tables: changed.map(|s| (s.table, s.original())).collect() }
}

/// Quick look: false only when `a` cannot replace `b`, not even beside some value of one neighbour.
fn may_replace(sides: &[Side], difference: f64, a: usize, b: usize) -> bool {
    let (mut sum, mut gain, mut infinite) = (difference, 0.0, None);
    for (s, side) in sides.iter().enumerate() {
        let e = side.row(a)[side.at[b]];
        if e.is_finite() {
            sum += e;
            gain = f64::max(gain, side.most[b] + e);
        } else if infinite.replace(s).is_some() {
            return false;
        }
    }
    sum <= infinite.map_or(gain, |s| sides[s].most[b])
}

fn leaner(parts: &[Part], a: usize, b: usize) -> bool {
    parts.iter().all(|p| p.usage[a] <= p.usage[b])
}

impl Pair {
    fn new(sides: &[Side], difference: f64, a: usize, b: usize) -> Self {
        let mut pair = Self { a, b, excess: Vec::with_capacity(sides.len()), sum: difference, n_infinite: 0 };
        for side in sides {
            let e = side.excess(a, b);
            pair.excess.push(e);
            pair.add(e);
        }
        pair
    }

    fn add(&mut self, excess: f64) {
        if excess.is_finite() {
            self.sum += excess;
        } else {
            self.n_infinite += 1;
        }
    }

    /// The excess at side `s` has changed.
    fn refresh(&mut self, sides: &[Side], s: usize) {
        self.excess[s] = sides[s].excess(self.a, self.b);
        self.n_infinite = self.excess.iter().filter(|e| e.is_infinite()).count();
    }
}

/// Forbids pairs of a value of `x` and a value of the neighbour at side `s`, where another value of `x` does as well.
fn forbid(sides: &mut [Side], s: usize, pairs: &mut [Pair], n: usize) {
    let mut touched = vec![false; n];
    for p in pairs.iter() {
        let e = p.excess[s];
        if p.n_infinite > usize::from(e.is_infinite()) {
            continue;
        }
        let others = if e.is_finite() { p.sum - e } else { p.sum };
        let side = &mut sides[s];
        for c in 0..side.width {
            let (ours, theirs) = (side.rows[p.a * side.width + c], side.rows[p.b * side.width + c]);
            if ours.is_finite() && theirs.is_finite() && others + (ours - theirs) <= 0.0 {
                side.rows[p.b * side.width + c] = f64::INFINITY;
                touched[p.b] = true;
            }
        }
    }
    if touched.contains(&true) {
        sides[s].changed = true;
        for p in pairs.iter_mut().filter(|p| touched[p.a] || touched[p.b]) {
            let old = p.excess[s];
            p.refresh(sides, s);
            p.sum += finite(p.excess[s]) - finite(old);
        }
    }
}

fn finite(e: f64) -> f64 {
    if e.is_finite() { e } else { 0.0 }
}
