//! What has to change hands between two plans.

use super::{Place, Plan};
use crate::graph::Model;
use crate::topology::DeviceId;
use crate::units::Bytes;

/// State that some device gets with `after` and did not have with `before`, and the gradients that go with it.
pub fn moved(model: &Model, before: &Plan, after: &Plan) -> Bytes {
    let devices = |plan: &Plan, owner: Place| -> Vec<DeviceId> {
        match owner {
            Place::Shard(s) => plan.shards[s.index()].devices.clone(),
            Place::Everywhere => Vec::new(),
        }
    };
    let of = |i: usize| {
        let (old, new) = (devices(before, before.owners[i]), devices(after, after.owners[i]));
        let n = new.iter().filter(|d| !old.contains(d)).count() as u64;
        let parts = if i < model.n_params { 2 } else { 1 };
        model.state[i].shape.bytes() * (n * parts)
    };
    (0..model.state.len()).map(of).sum()
}
