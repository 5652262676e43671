//! A plan as a table, for the terminal.

use std::fmt::Write;

use super::{Place, Plan, ShardId};
use crate::graph::Model;
use crate::topology::Topology;
use crate::units::Seconds;

/// One line per shard, then the totals.
pub fn render(plan: &Plan, model: &Model, topology: &Topology) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} · plan {} · {} shards × {} replicas · {} microbatches of {} rows · {}",
        model.manifest.name,
        plan.revision,
        plan.shards.len(),
        plan.n_replicas,
        plan.n_microbatches,
        plan.microbatch,
        plan.schedule
    );
    let _ = writeln!(
        out,
        "{:<6} {:<16} {:>6} {:>7} {:>10} {:>10} {:>10}  load",
        "shard", "device", "ops", "params", "busy", "memory", "sent"
    );
    let most = plan.shards.iter().map(|s| s.busy).fold(Seconds(0.0), Seconds::max);
    for (i, shard) in plan.shards.iter().enumerate() {
        let here = Place::Shard(ShardId(i as u32));
        let n_ops = plan.grads.values().map(|a| a.0.iter().filter(|p| **p == here).count()).max().unwrap_or(0);
        let n_params = plan.owners[..model.n_params].iter().filter(|o| **o == here).count();
        let devices: Vec<&str> = shard.devices.iter().map(|d| topology.devices[d.index()].name.as_str()).collect();
        let filled = (shard.busy / most * 20.0).round() as usize;
        let _ = writeln!(
            out,
            "{i:<6} {:<16} {n_ops:>6} {n_params:>7} {:>10} {:>10} {:>10}  {}{}",
            devices.join("+"),
            shard.busy.to_string(),
            shard.memory.to_string(),
            shard.sent.to_string(),
            "█".repeat(filled),
            "░".repeat(20usize.saturating_sub(filled)),
        );
    }
    if let Some(shards) = computing_again(plan) {
        let _ = writeln!(out, "{shards} computes forward values again for its backward half instead of keeping them");
    }
    let _ = writeln!(
        out,
        "step {} · bound {} ({:.2}×) · {} cross between shards per step",
        plan.step_time,
        plan.bound,
        plan.step_time / plan.bound,
        plan.bytes_cut
    );
    out
}

/// The shards that compute forward values again, as in `shard 0` or `each of shards 0, 2`; `None` where none does.
pub(super) fn computing_again(plan: &Plan) -> Option<String> {
    let does = plan.shards.iter().enumerate().filter(|(_, s)| s.recompute);
    let shards: Vec<String> = does.map(|(i, _)| i.to_string()).collect();
    match &shards[..] {
        [] => None,
        [one] => Some(format!("shard {one}")),
        _ => Some(format!("each of shards {}", shards.join(", "))),
    }
}
