//! A model along its line, whatever the devices: what stands at which coordinate.

use std::sync::OnceLock;

use super::lanes;
use crate::cost::OpCost;
use crate::graph::{GradGraph, Graph, Lane, Model};
use crate::plan::block::Blocks;
use crate::plan::coordinate::{Coordinates, coordinates};
use crate::plan::predict::Costs;
use crate::profile::Terms;
use crate::topology::Rates;
use crate::units::Bytes;

/// The variants of one microbatch size. Vectors without another word are by coordinate of the main variant.
#[derive(Clone, Debug)]
pub(crate) struct Outline {
    /// By variant.
    pub coordinates: Vec<Coordinates>,
    /// The largest variant: it shapes the line.
    pub(super) main: usize,
    /// Bytes that cross before it, for one microbatch.
    pub(super) crossing: Vec<Bytes>,
    /// Bytes of params, slots and gradients.
    pub(super) state: Vec<f64>,
    /// Bytes of one microbatch's residuals.
    pub(super) residuals: Vec<f64>,
    /// Lanes of ops, by variant; empty where nothing is split.
    pub(super) lanes: Vec<Vec<Option<Lane>>>,
    /// Of what is split into most parts.
    pub(super) n_lanes: u32,
    layers: OnceLock<Vec<Vec<u32>>>,
}

impl Outline {
    /// # Complexity
    /// O(ops + operands · log users).
    pub fn new(model: &Model, variants: &[&GradGraph], known: &Costs) -> Self {
        let all: Vec<Coordinates> = variants
            .iter()
            .map(|v| coordinates(&v.graph, model.n_params, model.n_scalars(), &known.grads[&v.name]))
            .collect();
        // The largest variant shapes the line; the others follow its borders by fraction of their own work.
        let main = main_variant(variants);
        let (coordinates, graph) = (&all[main], &variants[main].graph);
        let n = coordinates.n as usize;
        let (mut state, mut residuals) = (vec![0.0; n], vec![0.0; n]);
        let param_at = |p: usize| coordinates.of[graph.parameters()[p].index()].unwrap_or(0) as usize;
        for (i, tensor) in model.state.iter().enumerate() {
            match tensor.param {
                _ if i < model.n_params => state[param_at(i)] += 2.0 * tensor.shape.bytes().0 as f64,
                Some(p) => state[param_at(p)] += tensor.shape.bytes().0 as f64,
                None => {}
            }
        }
        for (id, op) in graph.ops() {
            let Some(at) = coordinates.of[id.index()].filter(|_| coordinates.forward[id.index()]) else { continue };
            let kept = graph.users(id).iter().any(|u| !coordinates.forward[u.index()]);
            if kept && &*op.opcode != "parameter" {
                residuals[at as usize] += op.shape.bytes().0 as f64;
            }
        }
        let crossing = crossing(graph, coordinates);
        let lanes = match model.split.is_empty() {
            true => Vec::new(),
            false => variants.iter().map(|v| lanes::of_ops(&v.graph)).collect(),
        };
        let n_lanes = lanes.iter().flatten().flatten().map(|lane: &Lane| lane.of).max().unwrap_or(1);
        Self { coordinates: all, main, crossing, state, residuals, lanes, n_lanes, layers: OnceLock::new() }
    }

    /// Coordinates at which layers begin, by variant: those [blocks](Blocks) that all variants have in the same order. What
    /// stands between two of them belongs to the first. A model without blocks is one layer.
    pub(super) fn layers(&self, variants: &[&GradGraph]) -> &[Vec<u32>] {
        self.layers.get_or_init(|| {
            let blocks = variants.iter().zip(&self.coordinates).map(|(v, line)| Blocks::new(&v.graph, line));
            let blocks: Vec<Blocks> = blocks.collect();
            let mut begins = vec![vec![0]; blocks.len()];
            for name in &blocks[self.main].names {
                let Some(at) = blocks.iter().map(|b| b.begin(name)).collect::<Option<Vec<u32>>>() else { continue };
                if begins.iter().zip(&at).all(|(begins, at)| begins.last().is_some_and(|last| last < at)) {
                    begins.iter_mut().zip(at).for_each(|(begins, at)| begins.push(at));
                }
            }
            begins
        })
    }

    /// Work at each coordinate on a device at speed 1. `known`: costs of the main variant's ops.
    pub(super) fn work(&self, known: &[OpCost], rates: &Rates) -> Vec<Terms> {
        let coordinates = &self.coordinates[self.main];
        let mut work = vec![Terms::default(); coordinates.n as usize];
        for (at, cost) in coordinates.of.iter().zip(known) {
            if let Some(at) = at {
                work[*at as usize] += cost.at_full_speed(rates);
            }
        }
        work
    }
}

fn main_variant(variants: &[&GradGraph]) -> usize {
    let size = |v: &GradGraph| v.batch.iter().map(|b| b.array().n_elements()).sum::<u64>();
    (0..variants.len()).max_by_key(|&i| (size(variants[i]), std::cmp::Reverse(i))).unwrap_or(0)
}

/// Bytes that cross each coordinate, forward and backward, for one microbatch.
fn crossing(graph: &Graph, coordinates: &Coordinates) -> Vec<Bytes> {
    let mut difference = vec![0i64; coordinates.n as usize + 1];
    for (id, op) in graph.ops() {
        let Some(at) = coordinates.of[id.index()] else { continue };
        let users = || graph.users(id).iter().filter_map(|u| coordinates.of[u.index()]);
        let bytes = i64::try_from(op.shape.bytes().0).unwrap_or(i64::MAX / 4);
        // A param crosses once per step at most, not per microbatch; it counts for little.
        let bytes = if &*op.opcode == "parameter" { bytes / 8 } else { bytes };
        let (first, last) = (users().min().unwrap_or(at), users().max().unwrap_or(at));
        if last > at {
            difference[at as usize + 1] += bytes;
            difference[last as usize + 1] -= bytes;
        }
        if first < at {
            difference[first as usize + 1] += bytes;
            difference[at as usize + 1] -= bytes;
        }
    }
    let mut sum = 0;
    difference
        .into_iter()
        .map(|d| {
            sum += d;
            Bytes(sum.max(0) as u64)
        })
        .collect()
}
