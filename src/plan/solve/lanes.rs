//! Lanes: the ops that work on one part of what is split, and nothing but that part.
//!
//! A split model can be cut across as well as along: part `i` of every split op on one shard, whatever stands between
//! split ops wherever the line puts it. That is tensor parallelism; the line alone knows pipelines.

use crate::graph::{Graph, Model};
use crate::plan::{Place, ShardId};

/// Part `index` of `of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    pub index: u32,
    pub of: u32,
}

impl Lane {
    /// Where it goes: lanes are shared out evenly, and neighbours stay together.
    pub fn shard(self, n_shards: usize) -> ShardId {
        ShardId((u64::from(self.index) * n_shards as u64 / u64::from(self.of.max(1))) as u32)
    }
}

/// The lane of a state tensor.
pub(super) fn of_state(model: &Model, tensor: usize) -> Option<Lane> {
    // A slot that stays whole follows the first part of its param.
    let own = model.state[tensor].part.as_ref();
    let part = own.or_else(|| model.state[model.state[tensor].param?].part.as_ref())?;
    Some(Lane { index: part.index, of: part.of })
}

/// Lanes by op: that of its operands, where they have one and the same. What reads several lanes joins them.
pub(super) fn of_ops(model: &Model, graph: &Graph) -> Vec<Option<Lane>> {
    let mut lanes: Vec<Option<Lane>> = vec![None; graph.n_ops()];
    for (p, &op) in graph.parameters()[..model.n_params].iter().enumerate() {
        lanes[op.index()] = of_state(model, p);
    }
    for (id, op) in graph.ops() {
        let mut found = op.operands.iter().filter_map(|o| lanes[o.index()]);
        if let Some(first) = found.next() {
            lanes[id.index()] = found.all(|lane| lane == first).then_some(first);
        }
    }
    lanes
}

/// Whether these owners put every part on the shard of its lane.
pub(super) fn is_wide(model: &Model, owners: &[Place], n_shards: usize) -> bool {
    let mut any = false;
    let fits = (0..model.n_params).all(|p| match of_state(model, p) {
        Some(lane) => {
            any = true;
            owners.get(p) == Some(&Place::Shard(lane.shard(n_shards)))
        }
        None => true,
    });
    any && fits && n_shards > 1
}
