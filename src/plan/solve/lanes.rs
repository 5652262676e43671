//! Lanes: the ops that work on one part of what is split, and nothing but that part.
//!
//! A split model can be cut across as well as along: part `i` of every split op on one shard, whatever stands between
//! split ops wherever the line puts it. That is tensor parallelism; the line alone knows pipelines.

use crate::graph::{Graph, Lane, Model};
use crate::plan::{Place, ShardId};

/// Where a lane goes: lanes are shared out evenly, and neighbours stay together.
pub(super) fn shard(lane: Lane, n_shards: usize) -> ShardId {
    ShardId((u64::from(lane.index) * n_shards as u64 / u64::from(lane.of.max(1))) as u32)
}

/// The lane of a state tensor.
pub(super) fn of_state(model: &Model, tensor: usize) -> Option<Lane> {
    // A slot that stays whole follows the first part of its param.
    let own = model.state[tensor].part.as_ref();
    let part = own.or_else(|| model.state[model.state[tensor].param?].part.as_ref())?;
    Some(Lane { index: part.index, of: part.of })
}

/// Lanes by op.
pub(super) fn of_ops(graph: &Graph) -> Vec<Option<Lane>> {
    graph.ops().map(|(_, op)| op.lane).collect()
}

/// Whether these owners put every part on the shard of its lane.
pub(super) fn is_wide(model: &Model, owners: &[Place], n_shards: usize) -> bool {
    let mut any = false;
    let fits = (0..model.n_params).all(|p| match of_state(model, p) {
        Some(lane) => {
            any = true;
            owners.get(p) == Some(&Place::Shard(shard(lane, n_shards)))
        }
        None => true,
    });
    any && fits && n_shards > 1
}

#[cfg(test)]
mod tests {
    use crate::graph::{Model, Split};
    use crate::plan::solve::even_topology;
    use crate::plan::verify::verify;
    use crate::plan::{Place, Problem, ScheduleKind, ShardId, solve};
    use crate::topology::{LOOPBACK, nominal};
    use crate::units::Bytes;

    /// With one microbatch a pipeline is idle on all shards but one. Parts of products run on two at once.
    #[test]
    fn lanes_run_at_the_same_time() {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/char_gpt.bundle");
        let whole = Model::import(&mut |file| std::fs::read(directory.join(file))).unwrap();
        let split = |name: &str, axis| Split { tensor: format!("blocks.*.{name}"), axis, parts: 2 };
        let columns = ["mlp.up", "attn.wq", "attn.wk", "attn.wv"].map(|name| split(name, 1));
        let rows = ["mlp.up_bias", "mlp.down", "attn.wo"].map(|name| split(name, 0));
        let model = whole.split(&[&columns[..], &rows[..]].concat()).unwrap();
        let topology = even_topology(2, &nominal("cpu").unwrap(), LOOPBACK);
        let plan = |model: &Model| {
            let problem = Problem {
                microbatch: Some(16),
                schedule: Some(ScheduleKind::OneFOneB),
                ..Problem::new(model, &topology, 2)
            };
            let plan = solve(&problem, None).unwrap();
            verify(model, &topology, &plan).unwrap();
            plan
        };
        let (line, lanes) = (plan(&whole), plan(&model));
        assert!(lanes.step_time.0 < 0.85 * line.step_time.0, "{} and {}", lanes.step_time, line.step_time);
        // State is shared out with the lanes. Activations need not be: more segments keep more between them.
        let bytes = |shard: u32| -> Bytes {
            let here = |i: &usize| lanes.owners[*i] == Place::Shard(ShardId(shard));
            (0..model.state.len()).filter(here).map(|i| model.state[i].shape.bytes()).sum()
        };
        let (first, second) = (bytes(0), bytes(1));
        assert!(first + second < second * 3 && first + second < first * 3, "{first} and {second}");
        for (i, tensor) in model.state.iter().enumerate() {
            if let Some(part) = &tensor.part {
                assert_eq!(lanes.owners[i], Place::Shard(ShardId(part.index)), "{}", tensor.name);
            }
        }
    }
}
