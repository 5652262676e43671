//! What a choice of strategies costs and whether it fits, straight from the file and in 128 bits.
//!
//! Shares no code with the solver.

use std::collections::BTreeMap;

use super::format::Instance;

/// Costs from here on mean "forbidden".
const FORBIDDEN: i64 = 1_000_000_000_000_000_000;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    #[error("{n_chosen} strategies for {n_nodes} nodes")]
    Length { n_chosen: usize, n_nodes: usize },
    #[error("node {node} has no strategy {strategy}")]
    NoSuchStrategy { node: usize, strategy: u32 },
    #[error("node {node} takes a forbidden strategy")]
    ForbiddenNode { node: usize },
    #[error("edge {edge} takes a forbidden pair")]
    ForbiddenEdge { edge: usize },
    #[error("at moment {moment} it uses {usage}, the limit is {limit}")]
    Usage { moment: i64, usage: i128, limit: i64 },
}

/// The sum of the costs of a choice that fits.
pub fn cost(instance: &Instance, strategies: &[u32]) -> Result<i128, Wrong> {
    let nodes = &instance.nodes;
    if strategies.len() != nodes.costs.len() {
        return Err(Wrong::Length { n_chosen: strategies.len(), n_nodes: nodes.costs.len() });
    }
    let mut sum = 0i128;
    let mut change: BTreeMap<i64, i128> = BTreeMap::new();
    for (node, &strategy) in strategies.iter().enumerate() {
        let s = strategy as usize;
        let (Some(&cost), Some(&usage)) = (nodes.costs[node].get(s), nodes.usages[node].get(s)) else {
            return Err(Wrong::NoSuchStrategy { node, strategy });
        };
        if cost >= FORBIDDEN {
            return Err(Wrong::ForbiddenNode { node });
        }
        sum += i128::from(cost);
        let [from, to] = nodes.intervals[node];
        if from < to {
            *change.entry(from).or_default() += i128::from(usage);
            *change.entry(to).or_default() -= i128::from(usage);
        }
    }
    for (edge, (&[i, j], costs)) in instance.edges.nodes.iter().zip(&instance.edges.costs).enumerate() {
        let width = nodes.costs[j].len();
        let cost = costs[strategies[i] as usize * width + strategies[j] as usize];
        if cost >= FORBIDDEN {
            return Err(Wrong::ForbiddenEdge { edge });
        }
        sum += i128::from(cost);
    }
    let mut usage = 0;
    for (moment, more) in change {
        usage += more;
        if usage > i128::from(instance.usage_limit) {
            return Err(Wrong::Usage { moment, usage, limit: instance.usage_limit });
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::super::format::{Edges, Nodes};
    use super::*;

    /// Two nodes that touch at moment 5.
    fn instance() -> Instance {
        Instance {
            name: "touching".to_owned(),
            nodes: Nodes {
                intervals: vec![[0, 5], [5, 9]],
                costs: vec![vec![1, FORBIDDEN], vec![10, 20]],
                usages: vec![vec![8, 0], vec![7, 9]],
            },
            edges: Edges { nodes: vec![[1, 0]], costs: vec![vec![100, 300, FORBIDDEN, 400]] },
            usage_limit: 8,
        }
    }

    #[test]
    fn an_interval_does_not_hold_its_end() {
        assert_eq!(cost(&instance(), &[0, 0]), Ok(111));
        let mut overlapping = instance();
        overlapping.nodes.intervals[0][1] = 6;
        assert_eq!(cost(&overlapping, &[0, 0]), Err(Wrong::Usage { moment: 5, usage: 15, limit: 8 }));
    }

    #[test]
    fn everything_wrong_is_noticed() {
        let check = |strategies: &[u32], expected| assert_eq!(cost(&instance(), strategies), Err(expected));
        check(&[0], Wrong::Length { n_chosen: 1, n_nodes: 2 });
        check(&[0, 2], Wrong::NoSuchStrategy { node: 1, strategy: 2 });
        check(&[1, 0], Wrong::ForbiddenNode { node: 0 });
        check(&[0, 1], Wrong::ForbiddenEdge { edge: 0 });
        let mut larger = instance();
        larger.edges.costs[0][2] = 0;
        assert_eq!(cost(&larger, &[0, 1]), Err(Wrong::Usage { moment: 5, usage: 9, limit: 8 }));
    }

    #[test]
    fn sums_go_beyond_64_bits() {
        let n = 40;
        let large = FORBIDDEN - 1;
        let instance = Instance {
            name: String::new(),
            nodes: Nodes { intervals: vec![[0, 1]; n], costs: vec![vec![large]; n], usages: vec![vec![large]; n] },
            edges: Edges { nodes: vec![], costs: vec![] },
            usage_limit: i64::MAX,
        };
        let usage = i128::from(large) * n as i128;
        assert_eq!(cost(&instance, &vec![0; n]), Err(Wrong::Usage { moment: 0, usage, limit: i64::MAX }));
        let free = Instance { nodes: Nodes { intervals: vec![[0, 0]; n], ..instance.nodes }, ..instance };
        assert_eq!(cost(&free, &vec![0; n]), Ok(usage));
    }
}
