//! A network in flat arrays, for the parts that do the heavy work.

use super::reduce::Reduced;

/// A table as one of its ends sees it.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    pub other: usize,
    /// Where its table begins with the own values as rows, and with the own values as columns.
    pub rows: usize,
    pub columns: usize,
    /// Where the messages begin that come from and go to the other end.
    pub inward: usize,
    pub outward: usize,
}

/// Memory of a variable from one point until before another.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub from: usize,
    pub to: usize,
    /// Where its usage by value begins.
    usage: usize,
}

/// What is left of a network: variables that have a choice, numbered anew in the order of their ops.
#[derive(Clone, Debug)]
pub struct Field {
    /// Variable of the network.
    pub origin: Vec<usize>,
    /// Where the values of each variable begin, and the end.
    pub first: Vec<usize>,
    /// By value.
    pub cost: Vec<f64>,
    pub constant: f64,
    /// What may be used at each point.
    pub room: Vec<f64>,
    pub n_messages: usize,
    /// Both orientations of every table; equal tables are stored once.
    pub tables: Vec<f64>,
    sides: Vec<Side>,
    first_side: Vec<usize>,
    spans: Vec<Span>,
    first_span: Vec<usize>,
    usage: Vec<f64>,
}

impl Field {
    pub fn new(reduced: &Reduced) -> Self {
        let network = &reduced.network;
        let origin: Vec<usize> = (0..network.variables.len()).filter(|&x| network.n_values(x) > 0).collect();
        let mut number = vec![usize::MAX; network.variables.len()];
        let mut field = Self {
            first: vec![0],
            cost: Vec::new(),
            constant: network.constant,
            room: reduced.room.clone(),
            n_messages: 0,
            tables: Vec::new(),
            sides: Vec::new(),
            first_side: vec![0],
            spans: Vec::new(),
            first_span: vec![0],
            usage: Vec::new(),
            origin,
        };
        for (i, &x) in field.origin.iter().enumerate() {
            number[x] = i;
            let v = &network.variables[x];
            field.cost.extend_from_slice(&v.cost);
            field.first.push(field.cost.len());
            for part in &v.parts {
                field.spans.push(Span { from: part.from, to: part.to, usage: field.usage.len() });
                field.usage.extend_from_slice(&part.usage);
            }
            field.first_span.push(field.spans.len());
        }
        // Tables in the order in which a pass over the variables reads them.
        let mut stored = std::collections::BTreeMap::new();
        let mut places = vec![[0; 2]; network.tables.len()];
        let mut messages = vec![[0; 2]; network.tables.len()];
        for upward in [true, false] {
            for &x in &field.origin {
                for (&y, &table) in network.variables[x].near.iter().filter(|(y, _)| (**y > x) == upward) {
                    let rows = network.rows(table, x);
                    let bits: Vec<u64> = rows.iter().map(|c| c.to_bits()).collect();
                    places[table][usize::from(upward)] = *stored.entry(bits).or_insert_with(|| {
                        field.tables.extend_from_slice(&rows);
                        field.tables.len() - rows.len()
                    });
                    if upward {
                        messages[table] = [field.n_messages, field.n_messages + network.n_values(x)];
                        field.n_messages += network.n_values(x) + network.n_values(y);
                    }
                }
            }
        }
        for &x in &field.origin {
            for (&y, &table) in &network.variables[x].near {
                let ([down, up], [to_low, to_high]) = (places[table], messages[table]);
                field.sides.push(if y > x {
                    Side { other: number[y], rows: up, columns: down, inward: to_low, outward: to_high }
                } else {
                    Side { other: number[y], rows: down, columns: up, inward: to_high, outward: to_low }
                });
            }
            field.first_side.push(field.sides.len());
        }
        field
    }

    /// The same field with a finite price on what is forbidden.
    pub fn softened(&self, price: f64) -> Self {
        let mut soft = self.clone();
        soft.tables.iter_mut().for_each(|c| *c = c.min(price));
        soft
    }

    pub fn n(&self) -> usize {
        self.origin.len()
    }

    pub fn n_values(&self, x: usize) -> usize {
        self.first[x + 1] - self.first[x]
    }

    pub fn sides(&self, x: usize) -> &[Side] {
        &self.sides[self.first_side[x]..self.first_side[x + 1]]
    }

    pub fn spans(&self, x: usize) -> &[Span] {
        &self.spans[self.first_span[x]..self.first_span[x + 1]]
    }

    /// Memory during a span of `x`, by value.
    pub fn usage(&self, x: usize, span: &Span) -> &[f64] {
        &self.usage[span.usage..][..self.n_values(x)]
    }

    /// Cost of a pair by the values of `x`, when the other end takes `value`.
    pub fn beside(&self, x: usize, side: &Side, value: usize) -> &[f64] {
        let n = self.n_values(x);
        &self.tables[side.columns + value * n..][..n]
    }

    pub fn pair_cost(&self, side: &Side, value: usize, other: usize) -> f64 {
        self.tables[side.rows + value * self.n_values(side.other) + other]
    }

    pub fn cost_of(&self, values: &[usize]) -> f64 {
        let mut cost = self.constant;
        for (x, &a) in values.iter().enumerate() {
            cost += self.cost[self.first[x] + a];
            let above = self.sides(x).iter().filter(|s| s.other > x);
            cost += above.map(|s| self.pair_cost(s, a, values[s.other])).sum::<f64>();
        }
        cost
    }

    /// Memory used at each point.
    pub fn load_of(&self, values: &[usize]) -> Vec<f64> {
        self.load_by(|x, usage| usage[values[x]])
    }

    /// Memory at each point; `used` tells what a variable uses, given its usage by value.
    pub fn load_by(&self, used: impl Fn(usize, &[f64]) -> f64) -> Vec<f64> {
        let mut load = vec![0.0; self.room.len() + 1];
        for x in 0..self.n() {
            for span in self.spans(x) {
                let u = used(x, self.usage(x, span));
                load[span.from] += u;
                load[span.to] -= u;
            }
        }
        let mut sum = 0.0;
        for l in &mut load {
            sum += *l;
            *l = sum;
        }
        load.pop();
        load
    }

    /// Costs by value with memory paid for: `prices` per unit at each point.
    pub fn priced(&self, prices: &[f64]) -> Vec<f64> {
        let before = sums(prices);
        let mut cost = self.cost.clone();
        for x in 0..self.n() {
            self.pay(x, &before, 1.0, &mut cost[self.first[x]..self.first[x + 1]]);
        }
        cost
    }

    /// Adds to the costs of `x` what its memory costs; `before`: [`sums`] of the prices, which `factor` scales.
    pub fn pay(&self, x: usize, before: &[f64], factor: f64, cost: &mut [f64]) {
        for span in self.spans(x) {
            let price = factor * (before[span.to] - before[span.from]);
            if price > 0.0 {
                cost.iter_mut().zip(self.usage(x, span)).for_each(|(c, u)| *c += price * u);
            }
        }
    }
}

/// Sum of what comes before each position, and of all.
pub fn sums(values: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    let mut before = Vec::with_capacity(values.len() + 1);
    before.push(sum);
    before.extend(values.iter().map(|v| {
        sum += v;
        sum
    }));
    before
}
