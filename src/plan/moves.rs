//! What has to change hands between two plans, and how long that takes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::traffic::Nics;
use super::{Place, Plan};
use crate::graph::Model;
use crate::topology::{DeviceId, Topology};
use crate::units::{Bytes, Seconds};

/// The cost of going from one plan to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moving {
    /// State that some device gets and did not have, and the gradients that go with it.
    pub bytes: Bytes,
    /// Until all of it is there, if nothing else is on the way: that of the device, or the NIC, with most to send or to
    /// receive. Training goes on meanwhile.
    pub seconds: Seconds,
}

/// State that some device gets with `after` and did not have with `before`, and the gradients that go with it.
pub fn moved(model: &Model, before: &Plan, after: &Plan) -> Bytes {
    moves(model, before, after, &|_, _| false).into_values().sum()
}

/// What [`moved`] counts, with the time it takes on these devices. All of a device's state comes from a holder on its own
/// node where there is one.
///
/// `None` for plans that name devices which are not there, or were made for another model.
pub fn moving(model: &Model, topology: &Topology, before: &Plan, after: &Plan) -> Option<Moving> {
    let known = |plan: &Plan| {
        let devices = plan.shards.iter().flat_map(|s| &s.devices);
        plan.owners.len() == model.state.len() && devices.into_iter().all(|d| d.index() < topology.devices.len())
    };
    if !known(before) || !known(after) || before.model != after.model {
        return None;
    }
    let nics = Nics::of(topology);
    let node = |d: DeviceId| nics.node(d);
    let moves = moves(model, before, after, &|a, b| node(a) == node(b));
    // By device: what it sends, and what it receives; by node, what leaves it and what comes to it.
    let mut of_device: BTreeMap<(DeviceId, bool), Seconds> = BTreeMap::new();
    let mut of_node: BTreeMap<(u32, bool), Bytes> = BTreeMap::new();
    for (&(from, to), &bytes) in &moves {
        let time = topology.link(from, to).time(bytes);
        for (device, sends) in [(from, true), (to, false)] {
            *of_device.entry((device, sends)).or_default() += time;
            if node(from) != node(to) {
                *of_node.entry((node(device), sends)).or_default() += bytes;
            }
        }
    }
    let nics = of_node.into_iter().map(|((node, _), bytes)| bytes / nics.bandwidth(node));
    let seconds = of_device.into_values().chain(nics).fold(Seconds(0.0), Seconds::max);
    Some(Moving { bytes: moves.into_values().sum(), seconds })
}

/// Bytes from device to device. `near`: whether one is a better source for the other.
fn moves(
    model: &Model,
    before: &Plan,
    after: &Plan,
    near: &dyn Fn(DeviceId, DeviceId) -> bool,
) -> BTreeMap<(DeviceId, DeviceId), Bytes> {
    fn devices(plan: &Plan, owner: Place) -> &[DeviceId] {
        match owner {
            Place::Shard(s) => &plan.shards[s.index()].devices,
            Place::Everywhere => &[],
        }
    }
    let mut moves: BTreeMap<(DeviceId, DeviceId), Bytes> = BTreeMap::new();
    for (i, tensor) in model.state.iter().enumerate() {
        let (old, new) = (devices(before, before.owners[i]), devices(after, after.owners[i]));
        let bytes = tensor.shape.bytes() * if i < model.n_params { 2 } else { 1 };
        for &to in new.iter().filter(|d| !old.contains(d)) {
            let from = old.iter().find(|&&from| near(from, to)).or(old.first());
            if let Some(&from) = from {
                *moves.entry((from, to)).or_default() += bytes;
            }
        }
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::solve::even_topology;
    use crate::plan::{Problem, ScheduleKind, solve};
    use crate::topology::{LOOPBACK, nominal};
    use crate::units::BytesPerSec;

    #[test]
    fn a_plan_says_what_it_takes_to_come_to_it() {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/mlp_digits.bundle");
        let model = Model::import(&mut |file| std::fs::read(directory.join(file))).unwrap();
        let mut topology = even_topology(2, &nominal("cpu").unwrap(), LOOPBACK);
        topology.remote.bandwidth = BytesPerSec(1e8);
        topology.devices[1].node = "other".to_owned();
        let plan_on = |topology: &Topology, previous: Option<&Plan>| {
            let problem = Problem {
                microbatch: Some(16),
                schedule: Some(ScheduleKind::OneFOneB),
                ..Problem::new(&model, topology, 2)
            };
            solve(&problem, previous).unwrap()
        };
        let plan = plan_on(&topology, None);
        assert_eq!(plan.moving, None);
        assert_eq!(plan_on(&topology, Some(&plan)).moving, None, "it stays");
        // All changes places: each way takes the slow link at the same time.
        let turned = Plan { shards: plan.shards.iter().rev().cloned().collect(), ..plan.clone() };
        let found = moving(&model, &topology, &plan, &turned).unwrap();
        assert_eq!(found.bytes, moved(&model, &plan, &turned));
        let (most, latency) = (found.bytes.0 as f64 / 1e8, LOOPBACK.latency.0);
        assert!(found.seconds.0 > most / 2.0 && found.seconds.0 <= most + latency, "{found:?}");
        // A NIC that carries a tenth of the link.
        topology.devices[0].nic = Some(BytesPerSec(1e7));
        let slower = moving(&model, &topology, &plan, &turned).unwrap();
        assert!(slower.seconds.0 > 4.0 * found.seconds.0, "{slower:?}");
        // A plan made from another one says it.
        let mut slow = topology.clone();
        slow.devices[0].speed = 0.05;
        let moved_to = plan_on(&slow, Some(&plan));
        assert_ne!(moved_to.owners, plan.owners);
        assert_eq!(moved_to.moving, moving(&model, &slow, &plan, &moved_to));
        assert!(moved_to.moving.unwrap().bytes > Bytes(0));
    }
}
