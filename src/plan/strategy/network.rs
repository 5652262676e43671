//! Choices that are left to make: variables with few values, tables between pairs of them, memory over time.
//!
//! Costs are doubles: whole numbers are exact up to 2^53, and infinity says "forbidden" and absorbs every sum.

use std::collections::BTreeMap;

/// What a pair of variables costs together.
#[derive(Clone, Debug)]
pub struct Table {
    pub ends: [usize; 2],
    /// Row-major: value of `ends[0]`, then value of `ends[1]`.
    pub cost: Vec<f64>,
}

/// Memory that a variable holds during some points, by value.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub from: usize,
    pub to: usize,
    pub usage: Vec<f64>,
}

/// A variable takes one of its values; a value stands for a strategy of the op the variable began as.
#[derive(Clone, Debug, Default)]
pub struct Variable {
    /// By value; no values once the variable is settled.
    pub cost: Vec<f64>,
    pub strategy: Vec<u32>,
    pub parts: Vec<Part>,
    /// Neighbour to table.
    pub near: BTreeMap<usize, usize>,
}

impl Variable {
    pub fn n_values(&self) -> usize {
        self.cost.len()
    }

    /// Makes the parts disjoint and ascending, joins equal neighbours, and takes off what every value needs.
    ///
    /// `floor` receives what was taken off, as differences: add at `from`, subtract at `to`.
    pub fn tidy(&mut self, floor: &mut [f64]) {
        let n = self.n_values();
        if n == 0 {
            return;
        }
        let mut cuts: Vec<usize> = self.parts.iter().flat_map(|p| [p.from, p.to]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let mut change = vec![0.0; cuts.len() * n];
        for part in &self.parts {
            let at = |t| cuts.binary_search(&t).expect("a cut of a part") * n;
            let (from, to) = (at(part.from), at(part.to));
            for (a, u) in part.usage.iter().enumerate() {
                change[from + a] += u;
                change[to + a] -= u;
            }
        }
        let mut tidy: Vec<Part> = Vec::with_capacity(self.parts.len());
        let mut usage = vec![0.0; n];
        for (i, &from) in cuts.iter().enumerate() {
            for (u, c) in usage.iter_mut().zip(&change[i * n..]) {
                *u += c;
            }
            let Some(&to) = cuts.get(i + 1) else { break };
            let least = usage.iter().copied().fold(f64::INFINITY, f64::min);
            floor[from] += least;
            floor[to] -= least;
            let above: Vec<f64> = usage.iter().map(|u| u - least).collect();
            match tidy.last_mut() {
                Some(last) if last.to == from && last.usage == above => last.to = to,
                _ if above.iter().all(|&u| u == 0.0) => {}
                _ => tidy.push(Part { from, to, usage: above }),
            }
        }
        self.parts = tidy;
    }
}

#[derive(Clone, Debug, Default)]
pub struct Network {
    pub variables: Vec<Variable>,
    /// Without cost once the table is gone.
    pub tables: Vec<Table>,
    /// Cost of what is settled.
    pub constant: f64,
}

impl Network {
    pub fn n_values(&self, x: usize) -> usize {
        self.variables[x].n_values()
    }

    /// A table with the values of `x` as rows.
    pub fn rows(&self, table: usize, x: usize) -> Vec<f64> {
        let t = &self.tables[table];
        if t.ends[0] == x { t.cost.clone() } else { transpose(&t.cost, self.n_values(t.ends[0])) }
    }

    /// Replaces a table by one with the values of `x` as rows.
    pub fn set_rows(&mut self, table: usize, x: usize, rows: Vec<f64>) {
        let n = self.n_values(x);
        let t = &mut self.tables[table];
        t.cost = if t.ends[0] == x { rows } else { transpose(&rows, n) };
    }

    /// The other end of a table.
    pub fn other(&self, table: usize, x: usize) -> usize {
        let [a, b] = self.tables[table].ends;
        if a == x { b } else { a }
    }

    /// Adds a table (rows: values of `x`) to what the pair has; tells which table it is in.
    pub fn add(&mut self, x: usize, y: usize, rows: Vec<f64>) -> usize {
        if let Some(&table) = self.variables[x].near.get(&y) {
            let rows = if self.tables[table].ends[0] == x { rows } else { transpose(&rows, self.n_values(x)) };
            for (have, more) in self.tables[table].cost.iter_mut().zip(rows) {
                *have += more;
            }
            return table;
        }
        let table = self.tables.len();
        self.tables.push(Table { ends: [x, y], cost: rows });
        self.variables[x].near.insert(y, table);
        self.variables[y].near.insert(x, table);
        table
    }

    /// Takes a table out; the result has the values of `x` as rows.
    pub fn take(&mut self, table: usize, x: usize) -> Vec<f64> {
        let rows = self.rows(table, x);
        let y = self.other(table, x);
        self.tables[table].cost = Vec::new();
        self.variables[x].near.remove(&y);
        self.variables[y].near.remove(&x);
        rows
    }

    /// Leaves `x` only the values in `kept`.
    pub fn keep(&mut self, x: usize, kept: &[usize]) {
        for table in self.variables[x].near.values() {
            let t = &mut self.tables[*table];
            let n = self.variables[x].cost.len();
            let width = t.cost.len() / n;
            t.cost = if t.ends[0] == x {
                kept.iter().flat_map(|&a| &t.cost[a * width..][..width]).copied().collect()
            } else {
                (0..width).flat_map(|b| kept.iter().map(move |&a| (a, b))).map(|(a, b)| t.cost[b * n + a]).collect()
            };
        }
        let v = &mut self.variables[x];
        v.cost = kept.iter().map(|&a| v.cost[a]).collect();
        v.strategy = kept.iter().map(|&a| v.strategy[a]).collect();
        for part in &mut v.parts {
            part.usage = kept.iter().map(|&a| part.usage[a]).collect();
        }
    }
}

/// Row-major with `n_rows` rows to column-major.
fn transpose(cost: &[f64], n_rows: usize) -> Vec<f64> {
    let width = cost.len() / n_rows.max(1);
    (0..width).flat_map(|b| (0..n_rows).map(move |a| cost[a * width + b])).collect()
}
