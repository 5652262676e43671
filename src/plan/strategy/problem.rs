//! What is asked: ops with strategies, couplings between them, a limit.

use std::ops::Range;

use super::network::{Network, Part, Variable};

/// A cost that means "never", and all above it: no choice may pay it.
pub const FORBIDDEN: i64 = 1_000_000_000_000_000_000;

/// Whole numbers up to this are exact as doubles.
const EXACT: f64 = (1u64 << 53) as f64;

/// An op with its strategies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// By strategy.
    pub cost: Vec<i64>,
    /// Memory held while live, by strategy.
    pub usage: Vec<i64>,
    /// Moments at which the memory is held.
    pub live: Range<i64>,
}

/// What the strategies of two ops cost together, such as resharding the tensor between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coupling {
    pub ops: [usize; 2],
    /// Row-major: strategy of `ops[0]`, then strategy of `ops[1]`.
    pub cost: Vec<i64>,
}

/// Ops, couplings, and the most memory at any moment.
///
/// Several couplings of the same ops add up; one of an op with itself adds to its own cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub ops: Vec<Op>,
    pub couplings: Vec<Coupling>,
    pub limit: i64,
}

/// A problem that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("op {op} has no strategies")]
    NoStrategies { op: usize },
    #[error("op {op} has {n_costs} costs and {n_usages} usages; there must be one of each for every strategy")]
    Ragged { op: usize, n_costs: usize, n_usages: usize },
    #[error("op {op} uses {usage} with strategy {strategy}; memory cannot be negative")]
    NegativeUsage { op: usize, strategy: usize, usage: i64 },
    #[error("op {op} is live from {} to {}; an interval starts at 0 or later and does not end before it starts", live.start, live.end)]
    Interval { op: usize, live: Range<i64> },
    #[error("coupling {coupling} names op {op}, there are {n_ops} ops")]
    NoSuchOp { coupling: usize, op: usize, n_ops: usize },
    #[error("coupling {coupling} has {n_costs} costs, its ops have {expected} pairs of strategies")]
    RaggedCoupling { coupling: usize, n_costs: usize, expected: usize },
    #[error("the limit is {limit}; memory cannot be negative")]
    NegativeLimit { limit: i64 },
}

impl Problem {
    /// Checks everything that [`super::solve`] relies on.
    pub fn check(&self) -> Result<(), Malformed> {
        for (op, o) in self.ops.iter().enumerate() {
            let (n_costs, n_usages) = (o.cost.len(), o.usage.len());
            if n_costs != n_usages {
                return Err(Malformed::Ragged { op, n_costs, n_usages });
            }
            if n_costs == 0 {
                return Err(Malformed::NoStrategies { op });
            }
            if let Some((strategy, &usage)) = o.usage.iter().enumerate().find(|(_, u)| **u < 0) {
                return Err(Malformed::NegativeUsage { op, strategy, usage });
            }
            if o.live.start < 0 || o.live.end < o.live.start {
                return Err(Malformed::Interval { op, live: o.live.clone() });
            }
        }
        for (coupling, c) in self.couplings.iter().enumerate() {
            if let Some(&op) = c.ops.iter().find(|&&op| op >= self.ops.len()) {
                return Err(Malformed::NoSuchOp { coupling, op, n_ops: self.ops.len() });
            }
            let expected = c.ops.map(|op| self.ops[op].cost.len()).iter().product();
            if c.cost.len() != expected {
                return Err(Malformed::RaggedCoupling { coupling, n_costs: c.cost.len(), expected });
            }
        }
        if self.limit < 0 {
            return Err(Malformed::NegativeLimit { limit: self.limit });
        }
        Ok(())
    }

    /// The problem as a network over the points of [`peaks`], these moments, and the limit.
    pub(super) fn network(&self) -> (Network, Vec<i64>, f64) {
        let peaks = peaks(&self.ops);
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
            if x == y {
                let own = &mut network.variables[x].cost;
                let n = own.len();
                own.iter_mut().enumerate().for_each(|(a, o)| *o += cost(c.cost[a * n + a]));
            } else {
                network.add(x, y, c.cost.iter().map(|&c| cost(c)).collect());
            }
        }
        let most: f64 = self.ops.iter().map(|o| o.usage.iter().copied().max().unwrap_or(0) as f64).sum();
        // Where sums are not exact, the limit keeps off by more than they can be wrong.
        let limit = if most < EXACT { self.limit as f64 } else { self.limit as f64 * (1.0 - 1e-11) };
        (network, peaks, limit)
    }
}

fn cost(c: i64) -> f64 {
    if c >= FORBIDDEN { f64::INFINITY } else { c as f64 }
}

/// Moments at which memory can be highest: the last start before each end. What is live at any other moment is live at
/// one of these, too.
fn peaks(ops: &[Op]) -> Vec<i64> {
    let live = ops.iter().filter(|o| !o.live.is_empty() && o.usage.iter().any(|&u| u > 0)).map(|o| &o.live);
    // At the same moment ends come first: intervals are half-open.
    let mut moments: Vec<(i64, bool)> = live.flat_map(|l| [(l.start, true), (l.end, false)]).collect();
    moments.sort_unstable();
    moments.windows(2).filter(|w| w[0].1 && !w[1].1).map(|w| w[0].0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(live: Range<i64>) -> Op {
        Op { cost: vec![0], usage: vec![1], live }
    }

    #[test]
    fn memory_peaks_at_the_last_start_before_an_end() {
        // 0..3 and 1..2 overlap at 1; 3..5 begins as 0..3 ends; nothing is live at 6; empty intervals count for nothing.
        let ops = [op(0..3), op(1..2), op(3..5), op(6..6)];
        assert_eq!(peaks(&ops), [1, 3]);
    }

    #[test]
    fn nonsense_is_named() {
        let good = Problem {
            ops: vec![Op { cost: vec![1, 2], usage: vec![0, 3], live: 0..2 }, op(0..1)],
            couplings: vec![Coupling { ops: [0, 1], cost: vec![0, 1] }],
            limit: 9,
        };
        assert_eq!(good.check(), Ok(()));
        let bad = |change: fn(&mut Problem)| {
            let mut problem = good.clone();
            change(&mut problem);
            problem.check().unwrap_err()
        };
        assert_eq!(bad(|p| p.ops[1].cost = vec![]), Malformed::Ragged { op: 1, n_costs: 0, n_usages: 1 });
        assert_eq!(
            bad(|p| p.ops[1] = Op { cost: vec![], usage: vec![], live: 0..1 }),
            Malformed::NoStrategies { op: 1 }
        );
        assert_eq!(bad(|p| p.ops[0].usage[1] = -3), Malformed::NegativeUsage { op: 0, strategy: 1, usage: -3 });
        assert_eq!(bad(|p| p.ops[0].live = -1..2), Malformed::Interval { op: 0, live: -1..2 });
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = bad(|p| p.ops[0].live = 5..2);
        assert_eq!(
            reversed.to_string(),
            "op 0 is live from 5 to 2; an interval starts at 0 or later and does not end before it starts"
        );
        assert_eq!(bad(|p| p.couplings[0].ops[1] = 2), Malformed::NoSuchOp { coupling: 0, op: 2, n_ops: 2 });
        assert_eq!(
            bad(|p| p.couplings[0].cost.push(0)),
            Malformed::RaggedCoupling { coupling: 0, n_costs: 3, expected: 2 }
        );
        assert_eq!(bad(|p| p.limit = -1), Malformed::NegativeLimit { limit: -1 });
    }
}
