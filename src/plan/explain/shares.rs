//! Where the time of a step goes: by shard, and along the chain of work that nothing can shorten without changing the plan.

use serde::{Deserialize, Serialize};

use crate::graph::Model;
use crate::plan::predict::{Costs, average_time, devices, timed, update_busy};
use crate::plan::schedule::{ScheduleError, Slot, TaskGraph};
use crate::plan::segment::SegmentError;
use crate::plan::{Plan, Task};
use crate::topology::Topology;
use crate::units::Seconds;

/// A plan that cannot be followed through a step: it was made for another model, or its orders cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Unexplained {
    #[error("variant {variant} of the plan cannot be cut")]
    Cut { variant: String, source: SegmentError },
    #[error("the orders of variant {variant} cannot run")]
    Orders { variant: String, source: ScheduleError },
    #[error("the update cannot be cut")]
    Update(#[source] SegmentError),
    #[error("the plan has no variant that the model knows; plan again for this bundle")]
    Empty,
}

/// One shard's part of a step; the four add up to the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Share {
    pub computing: Seconds,
    pub updating: Seconds,
    /// Idle while what it needs is on its way.
    pub receiving: Seconds,
    /// Idle while others compute: the pipeline fills, drains, or waits for its slowest shard.
    pub waiting: Seconds,
}

/// A step, taken apart. All times are of the slowest variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shares {
    pub step: Seconds,
    pub variant: String,
    pub shards: Vec<Share>,
    /// The longest chain of work, by shard: what each computes on it.
    pub chain: Vec<Seconds>,
    /// On that chain: tensors on their way.
    pub transfers: Seconds,
    /// Update and exchange of gradients, which follow.
    pub update: Seconds,
    pub averaging: Seconds,
}

impl Shares {
    /// Takes a step of a plan apart, in the order that the plan says.
    ///
    /// # Errors
    /// [`Unexplained`] for a plan that does not fit the model.
    /// # Complexity
    /// O(ops · log ops + tasks).
    pub fn of(model: &Model, topology: &Topology, plan: &Plan, known: &Costs) -> Result<Self, Unexplained> {
        let n = plan.shards.len();
        let mut slowest: Option<(Seconds, String, Vec<Vec<Slot>>, TaskGraph)> = None;
        for variant in plan.grads.keys() {
            let cut = timed(model, topology, plan, known, variant);
            let cut = cut.map_err(|source| Unexplained::Cut { variant: variant.clone(), source })?;
            let Some(cut) = cut else { continue };
            let orders = plan.orders.get(variant).cloned().unwrap_or_default();
            let lanes = cut.tasks.replay(&orders, plan.n_microbatches);
            let lanes = lanes.map_err(|source| Unexplained::Orders { variant: variant.clone(), source })?;
            let end = lanes.iter().flatten().map(|slot| slot.end).fold(Seconds(0.0), Seconds::max);
            if slowest.as_ref().is_none_or(|s| end.0 > s.0.0) {
                slowest = Some((end, variant.clone(), lanes, cut.tasks));
            }
        }
        let (end, variant, lanes, tasks) = slowest.ok_or(Unexplained::Empty)?;
        let updating =
            update_busy(model, plan, &devices(topology, plan), &known.update).map_err(Unexplained::Update)?;
        let update = updating.iter().copied().fold(Seconds(0.0), Seconds::max);
        let averaging = average_time(model, plan, topology);
        let step = end + update + averaging;
        let mut shards: Vec<Share> = lanes.iter().map(|lane| idle(lane)).collect();
        for (share, updating) in shards.iter_mut().zip(updating) {
            share.updating = updating;
            // Exchanges of gradients are waited for by all.
            share.receiving += averaging;
            share.waiting = Seconds(0.0).max(step - share.computing - share.updating - share.receiving);
        }
        let (chain, transfers) = chain(&tasks, &lanes, n);
        Ok(Self { step, variant, shards, chain, transfers, update, averaging })
    }

    /// The shard that the step waits for most: its part of the longest chain is the largest.
    pub fn slowest(&self) -> usize {
        let longest =
            (0..self.chain.len()).max_by(|&a, &b| self.chain[a].0.total_cmp(&self.chain[b].0).then(b.cmp(&a)));
        longest.unwrap_or(0)
    }

    /// Mean over shards: how much of the step a device computes, updates, receives and waits.
    pub fn mean(&self) -> Share {
        let n = self.shards.len().max(1) as f64;
        let sum = |of: fn(&Share) -> Seconds| self.shards.iter().map(of).sum::<Seconds>() / n;
        Share {
            computing: sum(|s| s.computing),
            updating: sum(|s| s.updating),
            receiving: sum(|s| s.receiving),
            waiting: sum(|s| s.waiting),
        }
    }
}

/// Computing, and what of the gaps is the time of what comes last on its way.
fn idle(lane: &[Slot]) -> Share {
    let mut share = Share::default();
    let mut before = Seconds(0.0);
    for slot in lane {
        share.computing += slot.end - slot.start;
        let gap = slot.start - before;
        if gap.0 > 0.0 {
            share.receiving += slot.last.map_or(Seconds(0.0), |(_, travel)| travel.min(gap));
        }
        before = slot.end;
    }
    share
}

/// Back from the task that ends last, always to what it waited for: computing by shard, and transfers.
fn chain(tasks: &TaskGraph, lanes: &[Vec<Slot>], n: usize) -> (Vec<Seconds>, Seconds) {
    let (mut computing, mut transfers) = (vec![Seconds(0.0); n], Seconds(0.0));
    let all = lanes.iter().enumerate().flat_map(|(s, lane)| (0..lane.len()).map(move |i| (s, i)));
    let Some((mut shard, mut at)) = all.max_by(|a, b| lanes[a.0][a.1].end.0.total_cmp(&lanes[b.0][b.1].end.0)) else {
        return (computing, transfers);
    };
    loop {
        let slot = &lanes[shard][at];
        computing[shard] += slot.end - slot.start;
        let before = at.checked_sub(1).map(|i| lanes[shard][i].end);
        // A task begins when the one before it ends, or when the last of what it needs is there.
        if before.is_some_and(|end| end >= slot.start) {
            at -= 1;
            continue;
        }
        let Some((segment, travel)) = slot.last else { return (computing, transfers) };
        transfers += travel;
        let need = Task { segment, microbatch: slot.task.microbatch };
        shard = tasks.shard_of(segment as usize).index();
        at = lanes[shard].iter().position(|s| s.task == need).unwrap_or(0);
    }
}
