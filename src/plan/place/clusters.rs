//! Ops that share a device as one item, and the tensors between them as hyperedges.

use std::collections::BTreeMap;

use super::problem::Problem;

/// What moves as one, with the tensors that join it.
///
/// A tensor is a *net*: the cluster that makes it and those that read it. Every accelerator that holds some but not all
/// of a net pays its transfer once, whichever side it is on, so a net needs no direction.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Clusters {
    /// Time on an accelerator; infinite where one of the ops does not run there.
    pub accelerator: Vec<f64>,
    pub host: Vec<f64>,
    pub bytes: Vec<f64>,
    /// Transfer time and clusters, sorted, at least two; none free of charge, no two over the same clusters.
    pub nets: Vec<(f64, Vec<usize>)>,
}

impl Clusters {
    /// Clusters without work and nets.
    pub fn new(n: usize) -> Self {
        Self { accelerator: vec![0.0; n], host: vec![0.0; n], bytes: vec![0.0; n], nets: Vec::new() }
    }

    /// Adds a cluster with this time on an accelerator, and returns its number.
    pub fn push(&mut self, accelerator: f64) -> usize {
        self.accelerator.push(accelerator);
        self.host.push(0.0);
        self.bytes.push(0.0);
        self.host.len() - 1
    }

    /// One cluster for each colour, one for each op without; also the cluster of every op.
    pub fn of_problem(problem: &Problem) -> (Self, Vec<usize>) {
        let mut by_colour = BTreeMap::new();
        let mut n = 0;
        let mut fresh = || {
            n += 1;
            n - 1
        };
        let of: Vec<usize> = problem
            .order()
            .iter()
            .map(|&op| match problem.ops()[op].colour {
                Some(colour) => *by_colour.entry(colour).or_insert_with(&mut fresh),
                None => fresh(),
            })
            .collect();
        let mut cluster = vec![0; of.len()];
        problem.order().iter().zip(of).for_each(|(&op, c)| cluster[op] = c);

        let mut out = Self::new(n);
        let mut pins = vec![Vec::new(); cluster.len()];
        for (op, &c) in problem.ops().iter().zip(&cluster) {
            out.accelerator[c] += op.accelerator.unwrap_or(f64::INFINITY);
            out.host[c] += op.host;
            out.bytes[c] += op.bytes;
        }
        for &(from, to) in problem.edges() {
            pins[from].push(cluster[to]);
        }
        let nets = pins.into_iter().enumerate().map(|(op, mut readers)| {
            readers.push(cluster[op]);
            (problem.ops()[op].transfer, readers)
        });
        out.nets = merge(nets);
        (out, cluster)
    }

    pub fn len(&self) -> usize {
        self.host.len()
    }

    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// Clusters of clusters: `of` names the new one of every old one, numbers below `n`.
    pub fn merged(&self, of: &[usize], n: usize) -> Self {
        let sum = |values: &[f64]| {
            let mut out = vec![0.0; n];
            values.iter().zip(of).for_each(|(v, &c)| out[c] += v);
            out
        };
        let nets = self.nets.iter().map(|(cost, pins)| (*cost, pins.iter().map(|&p| of[p]).collect()));
        Self { accelerator: sum(&self.accelerator), host: sum(&self.host), bytes: sum(&self.bytes), nets: merge(nets) }
    }

    /// Nets of every cluster.
    pub fn nets_of(&self) -> Vec<Vec<usize>> {
        let mut out = vec![Vec::new(); self.len()];
        for (net, (_, pins)) in self.nets.iter().enumerate() {
            pins.iter().for_each(|&p| out[p].push(net));
        }
        out
    }
}

/// Nets that can cost something: those over the same clusters are one.
fn merge(nets: impl Iterator<Item = (f64, Vec<usize>)>) -> Vec<(f64, Vec<usize>)> {
    let mut by_pins = BTreeMap::new();
    for (cost, mut pins) in nets {
        pins.sort_unstable();
        pins.dedup();
        if pins.len() > 1 && cost > 0.0 {
            *by_pins.entry(pins).or_insert(0.0) += cost;
        }
    }
    by_pins.into_iter().map(|(pins, cost)| (cost, pins)).collect()
}
