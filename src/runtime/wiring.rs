//! Wiring: how a plan's graphs are cut, and every channel on which tensors travel between its workers.
//!
//! Derived from (model, plan) alone: every worker and the parent compute the same wiring for themselves, so a frame
//! needs no more than a channel number. Rank = replica · n_shards + shard.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{ArrayShape, Graph, Model};
use crate::plan::segment::{Parameters, SegmentError, Segmentation, follow_parameters};
use crate::plan::{Place, Plan, ShardId};

/// Position in [`Wiring::channels`].
pub type ChannelId = u32;

/// One tensor's way from a shard to another, or between replicas of one shard.
#[derive(Clone, Debug, PartialEq)]
pub struct Channel {
    pub scope: Scope,
    pub from: ShardId,
    pub to: ShardId,
    pub shape: ArrayShape,
}

/// Between which replicas a channel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Between two shards of every replica; `n_slots` messages per step (one per microbatch, or one).
    Replica { n_slots: u32 },
    /// From every other replica to replica 0; the microbatch field names the sender's replica.
    Gather,
    /// From replica 0 to every other one.
    Scatter,
}

/// A graph cut by an assignment.
#[derive(Clone, Debug)]
pub struct Cut {
    pub segmentation: Segmentation,
    /// By message: channel of each of its values.
    pub channels: Vec<Vec<ChannelId>>,
}

/// A param that a shard reads and another owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Index in `Model::state`.
    pub state: usize,
    pub owner: ShardId,
    pub reader: ShardId,
    pub channel: ChannelId,
}

/// A worker's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    pub replica: u32,
    pub shard: ShardId,
}

#[derive(Clone, Debug)]
pub struct Wiring {
    pub n_shards: u32,
    pub n_replicas: u32,
    pub channels: Vec<Channel>,
    /// By variant.
    pub grads: BTreeMap<String, Cut>,
    pub update: Cut,
    pub mirrors: Vec<Mirror>,
    /// By param: channels that take its gradient to replica 0 and back. Empty with one replica.
    pub averages: Vec<(ChannelId, ChannelId)>,
}

impl Wiring {
    pub fn new(model: &Model, plan: &Plan) -> Result<Self, SegmentError> {
        let n_shards = plan.shards.len();
        let mut channels = Vec::new();
        let mut grads = BTreeMap::new();
        let mut mirrored = BTreeSet::new();
        for grad in model.grads.iter().filter(|g| plan.grads.contains_key(&g.name)) {
            let assignment = &plan.grads[&grad.name];
            if assignment.0.len() != grad.graph.n_ops() || plan.owners.len() != model.state.len() {
                return Err(SegmentError::WrongGraph {
                    graph: grad.graph.name.clone(),
                    expected: grad.graph.n_ops(),
                    found: assignment.0.len(),
                });
            }
            let segmentation = plan.cut(model, &grad.graph, assignment)?;
            for (op, reader) in segmentation.mirrors(&grad.graph, assignment) {
                let param = grad.graph.parameters().iter().position(|&p| p == op).expect("mirrors are parameters");
                mirrored.insert((param, reader));
            }
            let slots = plan.n_microbatches;
            grads.insert(grad.name.clone(), Cut::new(&grad.graph, segmentation, slots, &mut channels));
        }
        let update = {
            let mut places = plan.owners.clone();
            places.extend_from_slice(&plan.owners[..model.n_params]);
            places.push(Place::Everywhere);
            let assignment = follow_parameters(&model.update, &places);
            let segmentation = Segmentation::new(&model.update, &assignment, &plan.owners, n_shards, Parameters::Sent)?;
            Cut::new(&model.update, segmentation, 1, &mut channels)
        };
        let owner = |state: usize| match plan.owners[state] {
            Place::Shard(s) => s,
            Place::Everywhere => ShardId(0),
        };
        let mut add = |scope, from, to, shape: &ArrayShape| {
            channels.push(Channel { scope, from, to, shape: shape.clone() });
            channels.len() as ChannelId - 1
        };
        let mirrors = mirrored
            .into_iter()
            .map(|(state, reader)| {
                let shape = &model.state[state].shape;
                let channel = add(Scope::Replica { n_slots: 1 }, owner(state), reader, shape);
                Mirror { state, owner: owner(state), reader, channel }
            })
            .collect();
        let mut averages = Vec::new();
        if plan.n_replicas > 1 {
            for param in 0..model.n_params {
                let shape = gradient_shape(model, param);
                let shard = owner(param);
                averages.push((add(Scope::Gather, shard, shard, &shape), add(Scope::Scatter, shard, shard, &shape)));
            }
        }
        Ok(Self { n_shards: n_shards as u32, n_replicas: plan.n_replicas, channels, grads, update, mirrors, averages })
    }

    pub fn n_ranks(&self) -> u32 {
        self.n_shards * self.n_replicas
    }
    pub fn rank(&self, rank: u32) -> Rank {
        Rank { replica: rank / self.n_shards, shard: ShardId(rank % self.n_shards) }
    }
    pub fn number(&self, rank: Rank) -> u32 {
        rank.replica * self.n_shards + rank.shard.0
    }

    /// Whether `from` may send on `channel` to `to`, with `microbatch` in the header.
    pub fn permits(&self, channel: &Channel, from: Rank, to: Rank, microbatch: u32) -> bool {
        let shards = channel.from == from.shard && channel.to == to.shard;
        shards
            && match channel.scope {
                Scope::Replica { n_slots } => from.replica == to.replica && microbatch < n_slots,
                Scope::Gather => from.replica != 0 && to.replica == 0 && microbatch == from.replica,
                Scope::Scatter => from.replica == 0 && to.replica != 0 && microbatch == 0,
            }
    }

    /// Ranks that `me` exchanges tensors with, ascending.
    pub fn peers(&self, me: Rank) -> Vec<u32> {
        let mut peers = BTreeSet::new();
        for c in &self.channels {
            let other = |shard| self.number(Rank { replica: me.replica, shard });
            match c.scope {
                Scope::Replica { .. } if c.from == me.shard => drop(peers.insert(other(c.to))),
                Scope::Replica { .. } if c.to == me.shard => drop(peers.insert(other(c.from))),
                Scope::Gather if c.from == me.shard && me.replica == 0 => {
                    peers.extend((1..self.n_replicas).map(|replica| self.number(Rank { replica, ..me })));
                }
                Scope::Gather if c.from == me.shard => drop(peers.insert(self.number(Rank { replica: 0, ..me }))),
                _ => {}
            }
        }
        peers.into_iter().collect()
    }

    /// Batch tensors (positions in the manifest) that a shard reads in a variant.
    pub fn batch_tensors(&self, model: &Model, variant: &str, shard: ShardId) -> Vec<usize> {
        let (Some(cut), Some(grad)) = (self.grads.get(variant), model.variant(variant)) else { return Vec::new() };
        let parameters = &grad.graph.parameters()[model.n_params..];
        (0..grad.batch.len())
            .filter(|&i| cut.segmentation.of_shard(shard).any(|(_, s)| s.inputs.contains(&parameters[i])))
            .collect()
    }
}

impl Cut {
    fn new(graph: &Graph, segmentation: Segmentation, n_slots: u32, channels: &mut Vec<Channel>) -> Self {
        let of_message = segmentation
            .messages
            .iter()
            .map(|m| {
                let from = segmentation.segments[m.from].shard;
                m.values
                    .iter()
                    .map(|&v| {
                        let shape = graph.op(v).shape.as_array().expect("segments exchange arrays").clone();
                        channels.push(Channel { scope: Scope::Replica { n_slots }, from, to: m.to, shape });
                        channels.len() as ChannelId - 1
                    })
                    .collect()
            })
            .collect();
        Self { segmentation, channels: of_message }
    }
}

/// Shape of a param's gradient: the param's, in the type its sum is kept in.
pub fn gradient_shape(model: &Model, param: usize) -> ArrayShape {
    let graph = &model.grads[0].graph;
    let output = graph.outputs()[graph.outputs().len() - model.n_params + param];
    graph.op(output).shape.as_array().expect("gradients are arrays").clone()
}
