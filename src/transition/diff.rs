//! What changes from one plan to another.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::graph::StateTensor;
use crate::plan::{Place, Plan, ScheduleKind, ShardId};
use crate::topology::DeviceId;
use crate::units::Bytes;

/// The difference between two plans of one model: what has to travel before the second can run.
///
/// A shard is where its devices are. A tensor travels when a device of its new owner did not hold it before; two plans that
/// only number their shards otherwise move nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanDiff {
    pub from: u64,
    pub to: u64,
    /// State tensors of which at least one device gets a copy, in the model's order.
    pub moved: Vec<MovedTensor>,
    /// All copies together, by (from, to).
    pub traffic: Vec<Traffic>,
    /// Shards of the new plan without a device of the old one.
    pub added: Vec<ShardId>,
    /// Shards of the old plan without a device of the new one.
    pub removed: Vec<ShardId>,
    pub n_shards: Change<usize>,
    pub n_replicas: Change<u32>,
    /// Rows of one.
    pub microbatch: Change<u64>,
    pub n_microbatches: Change<u32>,
    pub schedule: Change<ScheduleKind>,
    /// Ops of the grad graphs that run elsewhere, or that did not run before.
    pub n_ops_moved: usize,
    /// The order of tasks differs.
    pub reordered: bool,
}

/// A state tensor that travels.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct MovedTensor {
    /// Index in [`crate::graph::Model::state`].
    pub tensor: usize,
    pub name: String,
    /// One copy.
    pub bytes: Bytes,
    pub n_copies: u32,
    pub from: Place,
    pub to: Place,
}

/// What one shard sends to another: the first of the old plan, the second of the new one.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub from: ShardId,
    pub to: ShardId,
    pub bytes: Bytes,
}

/// A quantity before and after.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<T> {
    pub from: T,
    pub to: T,
}

impl<T: PartialEq> Change<T> {
    pub fn is_none(&self) -> bool {
        self.from == self.to
    }
}

/// Plans that cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiffError {
    #[error("revision {from} is a plan for model {from_model}, revision {to} for model {to_model}")]
    Models { from: u64, from_model: String, to: u64, to_model: String },
    #[error("revision {revision} places {found} state tensors, the model has {expected}")]
    Owners { revision: u64, found: usize, expected: usize },
    #[error("revision {revision} gives {shard} to tensor {tensor}, it has {n_shards} shards")]
    Owner { revision: u64, shard: ShardId, tensor: String, n_shards: usize },
}

impl PlanDiff {
    /// Compares two plans of the model with these state tensors.
    ///
    /// # Complexity
    /// O(tensors · devices + ops).
    pub fn new(state: &[StateTensor], from: &Plan, to: &Plan) -> Result<Self, DiffError> {
        if from.model != to.model {
            return Err(DiffError::Models {
                from: from.revision,
                from_model: from.model.clone(),
                to: to.revision,
                to_model: to.model.clone(),
            });
        }
        check(state, from)?;
        check(state, to)?;
        let mut traffic: BTreeMap<(ShardId, ShardId), Bytes> = BTreeMap::new();
        let mut moved = Vec::new();
        for (tensor, described) in state.iter().enumerate() {
            let (before, after) = (from.owners[tensor], to.owners[tensor]);
            let held: BTreeSet<DeviceId> = holders(from, before).map(|h| h.1).collect();
            // Any shard can send what every shard has.
            let sender = match before {
                Place::Shard(shard) => shard,
                Place::Everywhere => ShardId(0),
            };
            let bytes = described.shape.bytes();
            let mut n_copies = 0;
            for (receiver, _) in holders(to, after).filter(|(_, device)| !held.contains(device)) {
                *traffic.entry((sender, receiver)).or_default() += bytes;
                n_copies += 1;
            }
            if n_copies > 0 {
                let name = described.name.clone();
                moved.push(MovedTensor { tensor, name, bytes, n_copies, from: before, to: after });
            }
        }
        Ok(Self {
            from: from.revision,
            to: to.revision,
            moved,
            traffic: traffic.into_iter().map(|((from, to), bytes)| Traffic { from, to, bytes }).collect(),
            added: strangers(to, from),
            removed: strangers(from, to),
            n_shards: Change { from: from.shards.len(), to: to.shards.len() },
            n_replicas: Change { from: from.n_replicas, to: to.n_replicas },
            microbatch: Change { from: from.microbatch, to: to.microbatch },
            n_microbatches: Change { from: from.n_microbatches, to: to.n_microbatches },
            schedule: Change { from: from.schedule, to: to.schedule },
            n_ops_moved: n_ops_moved(from, to),
            reordered: from.orders != to.orders,
        })
    }

    /// All copies together.
    pub fn bytes(&self) -> Bytes {
        self.traffic.iter().map(|t| t.bytes).sum()
    }

    /// Whether the second plan is the first one, by another number.
    pub fn is_empty(&self) -> bool {
        let Self { moved, added, removed, n_ops_moved, reordered, .. } = self;
        let same_shape = self.n_shards.is_none() && self.n_replicas.is_none() && self.schedule.is_none();
        let same_batch = self.microbatch.is_none() && self.n_microbatches.is_none();
        let nothing_moves = moved.is_empty() && added.is_empty() && removed.is_empty() && *n_ops_moved == 0;
        same_shape && same_batch && nothing_moves && !reordered
    }
}

fn check(state: &[StateTensor], plan: &Plan) -> Result<(), DiffError> {
    let (revision, n_shards) = (plan.revision, plan.shards.len());
    if plan.owners.len() != state.len() {
        return Err(DiffError::Owners { revision, found: plan.owners.len(), expected: state.len() });
    }
    for (owner, tensor) in plan.owners.iter().zip(state) {
        if let Place::Shard(shard) = *owner
            && shard.index() >= n_shards
        {
            return Err(DiffError::Owner { revision, shard, tensor: tensor.name.clone(), n_shards });
        }
    }
    Ok(())
}

/// Shards and devices that hold a tensor with this owner.
fn holders(plan: &Plan, owner: Place) -> impl Iterator<Item = (ShardId, DeviceId)> {
    let holds = move |shard: usize| match owner {
        Place::Shard(owner) => owner.index() == shard,
        Place::Everywhere => true,
    };
    let shards = plan.shards.iter().enumerate().filter(move |(i, _)| holds(*i));
    shards.flat_map(|(i, shard)| shard.devices.iter().map(move |&device| (ShardId(i as u32), device)))
}

/// Shards of `plan` without a device of `other`.
fn strangers(plan: &Plan, other: &Plan) -> Vec<ShardId> {
    let known: BTreeSet<DeviceId> = other.shards.iter().flat_map(|s| s.devices.iter().copied()).collect();
    let is_strange = |shard: usize| plan.shards[shard].devices.iter().all(|d| !known.contains(d));
    (0..plan.shards.len()).filter(|&i| is_strange(i)).map(|i| ShardId(i as u32)).collect()
}

fn n_ops_moved(from: &Plan, to: &Plan) -> usize {
    let devices = |plan: &Plan, place: Place| match place {
        Place::Shard(shard) => plan.shards.get(shard.index()).map(|s| s.devices.clone()),
        Place::Everywhere => None,
    };
    let of_variant = |(name, after): (&String, &crate::plan::Assignment)| match from.grads.get(name) {
        Some(before) if before.0.len() == after.0.len() => {
            before.0.iter().zip(&after.0).filter(|&(&b, &a)| devices(from, b) != devices(to, a)).count()
        }
        _ => after.0.len(),
    };
    to.grads.iter().map(of_variant).sum()
}

impl fmt::Debug for MovedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, bytes, n_copies, from, to, .. } = self;
        let place = |place: &Place| match place {
            Place::Shard(shard) => shard.to_string(),
            Place::Everywhere => "everywhere".to_owned(),
        };
        write!(f, "{name} {} -> {}: {n_copies} x {bytes}", place(from), place(to))
    }
}

impl fmt::Debug for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}: {}", self.from, self.to, self.bytes)
    }
}

impl<T: fmt::Debug + PartialEq> fmt::Debug for Change<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_none() {
            true => write!(f, "{:?}", self.to),
            false => write!(f, "{:?} -> {:?}", self.from, self.to),
        }
    }
}

impl fmt::Display for PlanDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "revision {} -> {}: ", self.from, self.to)?;
        if self.is_empty() {
            return write!(f, "the same plan");
        }
        let (n, bytes) = (self.moved.len(), self.bytes());
        write!(f, "{n} state tensors travel ({bytes}), {} ops run elsewhere", self.n_ops_moved)?;
        for traffic in &self.traffic {
            write!(f, "\n  {traffic:?}")?;
        }
        for (what, shards) in [("added", &self.added), ("removed", &self.removed)] {
            if !shards.is_empty() {
                write!(f, "\n  {what}: {shards:?}")?;
            }
        }
        let mut changed = |what: &str, is_none: bool, change: &dyn fmt::Debug| match is_none {
            true => Ok(()),
            false => write!(f, "\n  {what}: {change:?}"),
        };
        changed("shards", self.n_shards.is_none(), &self.n_shards)?;
        changed("replicas", self.n_replicas.is_none(), &self.n_replicas)?;
        changed("rows of a microbatch", self.microbatch.is_none(), &self.microbatch)?;
        changed("microbatches", self.n_microbatches.is_none(), &self.n_microbatches)?;
        changed("schedule", self.schedule.is_none(), &self.schedule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::shape::{ArrayShape, DType};
    use crate::plan::{Assignment, ShardPlan};
    use crate::units::Seconds;

    const S0: Place = Place::Shard(ShardId(0));
    const S1: Place = Place::Shard(ShardId(1));
    const S2: Place = Place::Shard(ShardId(2));

    /// Tensors of 4, 8, 12, ... bytes.
    fn state(n: usize) -> Vec<StateTensor> {
        let tensor = |i: usize| StateTensor {
            name: format!("w{i}"),
            tensor: i,
            rows: None,
            shape: ArrayShape::new(DType::Float32, vec![i as u64 + 1]),
            param: None,
        };
        (0..n).map(tensor).collect()
    }

    /// `devices`: by shard and replica.
    fn plan(revision: u64, devices: &[&[u32]], owners: &[Place], ops: &[Place]) -> Plan {
        let shard = |devices: &&[u32]| ShardPlan {
            devices: devices.iter().map(|&d| DeviceId(d)).collect(),
            busy: Seconds(1.0),
            memory: Bytes(1),
            sent: Bytes(0),
        };
        Plan {
            revision,
            model: "m".to_owned(),
            microbatch: 4,
            shards: devices.iter().map(shard).collect(),
            n_replicas: devices[0].len() as u32,
            n_microbatches: 2,
            grads: [("a".to_owned(), Assignment(ops.to_vec()))].into(),
            owners: owners.to_vec(),
            schedule: ScheduleKind::OneFOneB,
            orders: BTreeMap::new(),
            step_time: Seconds(1.0),
            bound: Seconds(1.0),
            bytes_cut: Bytes(0),
        }
    }

    fn diff(from: &Plan, to: &Plan) -> PlanDiff {
        PlanDiff::new(&state(from.owners.len()), from, to).unwrap()
    }

    #[test]
    fn only_tensors_with_another_owner_travel() {
        let from = plan(1, &[&[0], &[1]], &[S0, S0, S1, Place::Everywhere], &[S0, S0, S1]);
        let to = plan(2, &[&[0], &[1]], &[S0, S1, S1, Place::Everywhere], &[S0, S1, S1]);
        let diff = diff(&from, &to);
        assert_eq!(format!("{:?}", diff.moved), "[w1 shard0 -> shard1: 1 x 8 B]");
        assert_eq!((diff.bytes(), diff.n_ops_moved), (Bytes(8), 1));
        let text = "revision 1 -> 2: 1 state tensors travel (8 B), 1 ops run elsewhere\n  shard0 -> shard1: 8 B";
        assert_eq!(diff.to_string(), text);
    }

    #[test]
    fn the_same_plan_and_one_with_shards_in_another_order_move_nothing() {
        let from = plan(1, &[&[0], &[1]], &[S0, S1], &[S0, S1]);
        assert!(diff(&from, &Plan { revision: 2, ..from.clone() }).is_empty());
        let to = plan(2, &[&[1], &[0]], &[S1, S0], &[S1, S0]);
        let swapped = diff(&from, &to);
        assert!(swapped.is_empty(), "{swapped:?}");
    }

    #[test]
    fn a_new_shard_gets_what_it_owns_and_what_everybody_has() {
        let from = plan(1, &[&[0], &[1]], &[S0, S1, Place::Everywhere], &[]);
        let to = plan(2, &[&[0], &[1], &[2]], &[S0, S2, Place::Everywhere], &[]);
        let diff = diff(&from, &to);
        assert_eq!((&diff.added[..], diff.removed.len()), (&[ShardId(2)][..], 0));
        assert_eq!(format!("{:?}", diff.traffic), "[shard0 -> shard2: 12 B, shard1 -> shard2: 8 B]");
        assert!(diff.to_string().ends_with("added: [shard2]\n  shards: 2 -> 3"), "{diff}");
        let back = super::PlanDiff::new(&state(3), &to, &from).unwrap();
        assert_eq!(back.removed, [ShardId(2)]);
    }

    #[test]
    fn a_new_replica_gets_a_copy_of_everything() {
        let from = plan(1, &[&[0], &[1]], &[S0, S1], &[]);
        let to = Plan { n_microbatches: 1, ..plan(2, &[&[0, 2], &[1, 3]], &[S0, S1], &[]) };
        let diff = diff(&from, &to);
        assert_eq!(diff.bytes(), Bytes(4 + 8));
        assert_eq!((diff.n_replicas, diff.n_microbatches), (Change { from: 1, to: 2 }, Change { from: 2, to: 1 }));
    }

    #[test]
    fn plans_that_do_not_match_are_refused() {
        let a = plan(1, &[&[0]], &[S0], &[]);
        let other = Plan { model: "n".to_owned(), ..a.clone() };
        assert!(matches!(PlanDiff::new(&state(1), &a, &other), Err(DiffError::Models { .. })));
        assert!(matches!(PlanDiff::new(&state(2), &a, &a), Err(DiffError::Owners { found: 1, expected: 2, .. })));
        let wild = plan(2, &[&[0]], &[S1], &[]);
        let error = PlanDiff::new(&state(1), &a, &wild).unwrap_err();
        assert_eq!(error.to_string(), "revision 2 gives shard1 to tensor w0, it has 1 shards");
    }

    proptest::proptest! {
        /// Brute force: what every device needs and lacks.
        #[test]
        fn traffic_is_what_devices_lack(
            devices in proptest::sample::subsequence((0u32..6).collect::<Vec<_>>(), 4),
            before in proptest::collection::vec(0usize..3, 12),
            after in proptest::collection::vec(0usize..3, 12),
        ) {
            let place = |&i: &usize| [S0, S1, Place::Everywhere][i];
            let owners = |of: &[usize]| of.iter().map(place).collect::<Vec<_>>();
            let from = plan(1, &[&[0, 1], &[2, 3]], &owners(&before), &[]);
            let to = plan(2, &[&devices[..2], &devices[2..]], &owners(&after), &[]);
            let has = |plan: &Plan, device: u32, tensor: usize| plan.shards.iter().enumerate().any(|(s, shard)| {
                let here = plan.owners[tensor] == Place::Everywhere || plan.owners[tensor] == Place::Shard(ShardId(s as u32));
                here && shard.devices.contains(&DeviceId(device))
            });
            let lacking = (0..6u32).flat_map(|d| (0..12).map(move |t| (d, t)));
            let lacking = lacking.filter(|&(d, t)| has(&to, d, t) && !has(&from, d, t));
            let bytes: u64 = lacking.map(|(_, t)| 4 * (t as u64 + 1)).sum();
            proptest::prop_assert_eq!(diff(&from, &to).bytes(), Bytes(bytes));
        }
    }
}
