//! Lanes: the ops that work on one part of what is split, and nothing but that part.
//!
//! A split model can be cut across as well as along. Neighbouring shards may share a stage: of its part of the line, each
//! has some lanes, and whatever stands between split ops goes where the line puts it. One stage of all shards is tensor or
//! data parallelism, as params or rows are split; several are a pipeline with replicas of its stages. The line alone knows
//! pipelines.

use std::ops::Range;

use crate::graph::{Graph, Lane, Model};

/// How shards share out lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::plan) struct Spread {
    /// By border between two shards: the first lane of the one behind it, where both share a stage; `None` where one stage
    /// ends and the next begins.
    pub seams: Vec<Option<u32>>,
    /// Lanes of what is split into most parts; others are laid over these.
    n_lanes: u32,
}

impl Spread {
    /// Every shard is a stage.
    pub fn along(n_shards: usize) -> Self {
        Self { seams: vec![None; n_shards.saturating_sub(1)], n_lanes: 1 }
    }

    /// Stages of neighbouring shards, which share out their lanes by speed.
    ///
    /// # Shapes
    /// `speeds`: by shard, positive. `ends`: by border, whether a stage ends there.
    /// # Complexity
    /// O(lanes · shards).
    pub fn new(ends: &[bool], speeds: &[f64], n_lanes: u32) -> Self {
        let mut seams = vec![None; ends.len()];
        let spread = Self { seams: ends.iter().map(|end| (!end).then_some(0)).collect(), n_lanes };
        let mut first = 0;
        while first < speeds.len() {
            let stage = spread.stage(first);
            // Each lane to the shard that is done with it first, which is as even as it can be.
            let mut n = vec![0u32; stage.len()];
            for _ in 0..n_lanes {
                let time = |i: usize| f64::from(n[i] + 1) / speeds[stage.start + i];
                let next = (0..n.len()).min_by(|&a, &b| time(a).total_cmp(&time(b)));
                next.into_iter().for_each(|i| n[i] += 1);
            }
            let mut begin = 0;
            for (i, n) in n.iter().enumerate().take(stage.len() - 1) {
                begin += n;
                seams[stage.start + i] = Some(begin);
            }
            first = stage.end;
        }
        Self { seams, n_lanes }
    }

    /// One with these seams.
    pub fn with(seams: Vec<Option<u32>>, n_lanes: u32) -> Self {
        Self { seams, n_lanes }
    }

    pub fn is_along(&self) -> bool {
        self.seams.iter().all(Option::is_none)
    }

    /// Whether all shards share one stage.
    pub fn is_across(&self) -> bool {
        self.seams.iter().all(Option::is_some)
    }

    /// Shards of the stage that a shard is in.
    pub fn stage(&self, shard: usize) -> Range<usize> {
        let first = self.seams[..shard].iter().rposition(Option::is_none).map_or(0, |end| end + 1);
        let last = self.seams[shard..].iter().position(Option::is_none).map_or(self.seams.len(), |end| shard + end);
        first..last + 1
    }

    /// The shard of a lane, by the shard that the line puts it on.
    pub fn shard(&self, on_line: usize, lane: Lane) -> usize {
        let stage = self.stage(on_line);
        let at = u64::from(lane.index) * u64::from(self.n_lanes) / u64::from(lane.of.max(1));
        let seams = &self.seams[stage.start..stage.end - 1];
        stage.start + seams.partition_point(|first| u64::from(first.unwrap_or(0)) <= at)
    }

    /// Whether lanes are in order, and all there.
    pub fn is_valid(&self) -> bool {
        let in_order = |w: &[Option<u32>]| !matches!((w[0], w[1]), (Some(a), Some(b)) if a > b);
        self.seams.windows(2).all(in_order) && self.seams.iter().flatten().all(|&first| first <= self.n_lanes)
    }
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

#[cfg(test)]
mod tests {
    use super::Spread;
    use crate::graph::{Lane, Model, Split};
    use crate::plan::solve::even_topology;
    use crate::plan::verify::verify;
    use crate::plan::{Place, Problem, ScheduleKind, ShardId, solve};
    use crate::topology::{LOOPBACK, nominal};
    use crate::units::Bytes;

    #[test]
    fn lanes_are_shared_out_by_speed_within_stages() {
        let lane = |index, of| Lane { index, of };
        let across = Spread::new(&[false, false], &[2.0, 1.0, 1.0], 8);
        assert_eq!(across.seams, [Some(4), Some(6)]);
        assert!(across.is_across() && across.is_valid());
        // Two parts are laid over eight lanes.
        let of_two: Vec<usize> = (0..2).map(|i| across.shard(2, lane(i, 2))).collect();
        assert_eq!(of_two, [0, 1]);
        let stages = Spread::new(&[true, false, true], &[1.0; 4], 4);
        assert_eq!(stages.seams, [None, Some(2), None]);
        assert_eq!((0..4).map(|s| stages.stage(s)).collect::<Vec<_>>(), [0..1, 1..3, 1..3, 3..4]);
        let on_line = |shard| (0..4).map(|i| stages.shard(shard, lane(i, 4))).collect::<Vec<_>>();
        assert_eq!((on_line(0), on_line(2), on_line(3)), (vec![0; 4], vec![1, 1, 2, 2], vec![3; 4]));
        // More shards than lanes: some have none.
        assert_eq!(Spread::new(&[false, false], &[1.0; 3], 2).seams, [Some(1), Some(2)]);
        assert!(!Spread::with(vec![Some(2), Some(1)], 4).is_valid() && !Spread::with(vec![Some(5)], 4).is_valid());
    }

    /// With one microbatch a pipeline is idle on all shards but one. Parts of products run on two at once.
    #[test]
    fn lanes_run_at_the_same_time() {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/char_gpt.bundle");
        let whole = Model::import(&mut |file| std::fs::read(directory.join(file))).unwrap();
        let split = |name: &str, axis| Split::Params { tensor: format!("blocks.*.{name}"), axis, parts: 2 };
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
