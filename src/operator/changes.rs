//! What a revision of a plan does otherwise than the one before: pure.

use crate::api::{PartitionPlan, Seat};
use crate::wire::report::PlanReport;

/// Most changes that are told one by one.
const MOST: usize = 32;

/// In words. `cut`: how the graph is cut from now on, where that is known already.
pub fn changes(before: &PartitionPlan, seats: &[Seat], cut: Option<&PlanReport>) -> Vec<String> {
    let mut all = Vec::new();
    let old = &before.spec.shards;
    if old.len() != seats.len() {
        all.push(format!("{} workers instead of {}", seats.len(), old.len()));
    }
    for seat in seats {
        let Some(was) = old.iter().find(|o| o.worker == seat.worker) else { continue };
        let worker = seat.worker;
        if was.node != seat.node {
            all.push(format!("worker {worker} on node {} instead of {}", seat.node, was.node));
        }
        if was.device != seat.device || was.product != seat.product {
            let name = |s: &Seat| s.product.clone().unwrap_or_else(|| s.device.clone());
            all.push(format!("worker {worker} on {} instead of {}", name(seat), name(was)));
        }
    }
    let known = before.status.as_ref().and_then(|status| status.predicted.as_ref());
    if let (Some(cut), Some(was)) = (cut, known) {
        if cut.microbatch != was.microbatch {
            all.push(format!("microbatches of {} rows instead of {}", cut.microbatch, was.microbatch));
        }
        for (shard, was) in cut.shards.iter().zip(&was.shards) {
            let i = was.shard;
            if shard.workers != was.workers {
                all.push(format!("shard {i} on workers {:?} instead of {:?}", shard.workers, was.workers));
            }
            if shard.ops != was.ops {
                all.push(format!("shard {i} of {} ops instead of {}", shard.ops, was.ops));
            }
        }
    }
    let more = all.len().saturating_sub(MOST);
    if more > 0 {
        all.truncate(MOST);
        all.push(format!("and {more} more"));
    }
    all.iter().map(|change| change.chars().take(512).collect()).collect()
}
