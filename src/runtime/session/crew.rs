//! Who runs a plan, and what changes hands between two of them.

use std::collections::BTreeMap;

use crate::graph::{GradGraph, Model};
use crate::plan::segment::SegmentError;
use crate::plan::{Place, Plan};
use crate::runtime::wiring::{Rank, Wiring};
use crate::wire::Batch;
use crate::wire::control::{Move, WorkerId};

/// A plan with a worker on every seat.
#[derive(Debug)]
pub struct Crew {
    pub plan: Plan,
    pub wiring: Wiring,
    /// By rank; rank = replica · n_shards + shard.
    pub seats: Vec<WorkerId>,
}

impl Crew {
    pub fn new(model: &Model, plan: Plan, seats: Vec<WorkerId>) -> Result<Self, SegmentError> {
        let wiring = Wiring::new(model, &plan)?;
        debug_assert_eq!(seats.len(), wiring.n_ranks() as usize);
        Ok(Self { plan, wiring, seats })
    }

    pub fn rank_of(&self, worker: WorkerId) -> Option<Rank> {
        self.seats.iter().position(|&w| w == worker).map(|rank| self.wiring.rank(rank as u32))
    }

    /// Whether a worker holds a state tensor under this plan.
    fn holds(&self, worker: WorkerId, state: usize) -> bool {
        let owner = self.plan.owners[state];
        self.rank_of(worker).is_some_and(|rank| owner == Place::Everywhere || owner == Place::Shard(rank.shard))
    }

    /// Microbatches summed in a step.
    pub fn summed(&self) -> u32 {
        self.plan.n_microbatches * self.plan.n_replicas
    }

    /// The plan's variant for the shape of a batch: that of the batch's rows, whatever its microbatch size.
    pub fn variant<'m>(&self, model: &'m Model, batch: &Batch) -> Option<&'m GradGraph> {
        model.grads.iter().filter(|g| self.plan.grads.contains_key(&g.name)).find(|g| {
            g.batch.len() == batch.tensors.len()
                && g.batch.iter().zip(&batch.tensors).all(|(spec, tensor)| {
                    spec.dtype == tensor.shape.dtype && spec.shape.get(1..) == tensor.shape.dims.get(1..)
                })
        })
    }

    /// The state that workers of `next` do not hold yet, each from one that does: the replica it sits in, if possible.
    pub fn moves(&self, next: &Crew) -> Vec<Move> {
        let mut moves = Vec::new();
        for state in 0..self.plan.owners.len() {
            let mut holders: BTreeMap<u32, WorkerId> = BTreeMap::new();
            for &worker in self.seats.iter().filter(|&&w| self.holds(w, state)) {
                let replica = self.rank_of(worker).map_or(0, |r| r.replica);
                holders.entry(replica).or_insert(worker);
            }
            for &to in next.seats.iter().filter(|&&w| next.holds(w, state) && !self.holds(w, state)) {
                let replica = next.rank_of(to).map_or(0, |r| r.replica);
                let from = holders.get(&replica).or_else(|| holders.values().next());
                if let Some(&from) = from {
                    moves.push(Move { state: state as u32, from, to });
                }
            }
        }
        moves
    }
}
