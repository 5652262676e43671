//! What is asked: ops with strategies, couplings between them, a limit.

use std::ops::Range;

use super::network::{Network, Part, Table, Variable};

/// A cost that means "never": no choice may pay it.
pub const FORBIDDEN: i64 = 1_000_000_000_000_000_000;

/// An op with its strategies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// By strategy.
    pub cost: Vec<i64>,
    /// Memory held while live, by strategy.
    pub usage: Vec<i64>,
    /// Moments during which the memory is held.
    pub live: Range<i64>,
}

/// What the strategies of two ops cost together, such as resharding the tensor between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coupling {
    pub ops: [usize; 2],
    /// Row-major: strategy of `ops[0]`, then strategy of `ops[1]`.
    pub cost: Vec<i64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub ops: Vec<Op>,
    pub couplings: Vec<Coupling>,
    /// Most memory at any moment.
    pub limit: i64,
}

fn cost(c: i64) -> f64 {
    if c >= FORBIDDEN { f64::INFINITY } else { c as f64 }
}

/// Moments at which memory can be highest: the last start before each end. Everything live at another moment is live
/// at one of these, too.
pub fn peaks(problem: &Problem) -> Vec<i64> {
    let live = || problem.ops.iter().filter(|o| !o.live.is_empty() && o.usage.iter().any(|&u| u != 0)).map(|o| &o.live);
    let mut moments: Vec<(i64, bool)> = live().flat_map(|l| [(l.start, true), (l.end, false)]).collect();
    // At the same moment ends come first: intervals are half-open.
    moments.sort_unstable();
    moments.windows(2).filter(|w| w[0].1 && !w[1].1).map(|w| w[0].0).collect()
}

impl Problem {
    /// The problem as a network over the points of [`peaks`], and the limit at each point.
    pub fn network(&self) -> (Network, Vec<f64>) {
        let peaks = peaks(self);
        let at = |t: i64| peaks.partition_point(|&p| p < t);
        let mut network = Network::default();
        for op in &self.ops {
            let (from, to) = (at(op.live.start), at(op.live.end));
            let usage = op.usage.iter().map(|&u| u as f64).collect();
            network.variables.push(Variable {
                cost: op.cost.iter().map(|&c| cost(c)).collect(),
                strategy: (0..op.cost.len() as u32).collect(),
                parts: if from < to { vec![Part { from, to, usage }] } else { Vec::new() },
                near: Default::default(),
            });
        }
        for c in &self.couplings {
            let [x, y] = c.ops;
            network.add(x, y, c.cost.iter().map(|&c| cost(c)).collect());
        }
        let _ = Table { ends: [0, 0], cost: Vec::new() };
        (network, vec![self.limit as f64; peaks.len()])
    }
}
