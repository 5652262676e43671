//! What nodes have left for shards.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::units::quantity;

/// A node and what is free on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Room {
    pub node: String,
    pub labels: BTreeMap<String, String>,
    /// Thousandths of a core.
    pub cpu: i64,
    /// Bytes.
    pub memory: i64,
    pub pods: i64,
    /// Why nothing may be put there, if so.
    pub closed: Option<String>,
}

/// Something that takes room on a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    pub node: String,
    pub cpu: i64,
    pub memory: i64,
}

/// All nodes, by name, less what is taken.
pub fn rooms<'a>(nodes: impl IntoIterator<Item = &'a Node>, taken: impl IntoIterator<Item = Taken>) -> Vec<Room> {
    let mut rooms: BTreeMap<String, Room> = nodes.into_iter().filter_map(room).map(|r| (r.node.clone(), r)).collect();
    for Taken { node, cpu, memory } in taken {
        if let Some(room) = rooms.get_mut(&node) {
            room.cpu = room.cpu.saturating_sub(cpu);
            room.memory = room.memory.saturating_sub(memory);
            room.pods = room.pods.saturating_sub(1);
        }
    }
    rooms.into_values().collect()
}

fn room(node: &Node) -> Option<Room> {
    let name = node.metadata.name.clone()?;
    let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
    let of = |resource: &str| allocatable.and_then(|a| a.get(resource));
    Some(Room {
        cpu: of("cpu").map_or(0, milli),
        memory: of("memory").map_or(0, whole),
        pods: of("pods").map_or(0, whole),
        closed: closed(node),
        labels: node.metadata.labels.clone().unwrap_or_default(),
        node: name,
    })
}

/// Why a node takes no shards.
fn closed(node: &Node) -> Option<String> {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    let ready = conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    if !ready {
        return Some("is not ready".to_owned());
    }
    let spec = node.spec.as_ref()?;
    if spec.unschedulable == Some(true) {
        return Some("is cordoned".to_owned());
    }
    let taints = spec.taints.as_ref().into_iter().flatten();
    let repels = taints.into_iter().find(|t| t.effect == "NoSchedule" || t.effect == "NoExecute");
    repels.map(|t| format!("has the taint {}", t.key))
}

/// What a pod takes of the node it runs on; nothing before it has one and after it has ended.
pub fn taken(pod: &Pod) -> Option<Taken> {
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref());
    let phase = status.and_then(|s| s.phase.as_deref()).unwrap_or_default();
    if phase == "Succeeded" || phase == "Failed" {
        return None;
    }
    let node = spec.node_name.clone().or_else(|| pinned(pod))?;
    let request = |c: &Container, resource: &str, scale: fn(&Quantity) -> i64| {
        let requests = c.resources.as_ref().and_then(|r| r.requests.as_ref());
        requests.and_then(|r| r.get(resource)).map_or(0, scale)
    };
    // Sidecars run beside everything, other init containers one at a time before it.
    let sum = |resource: &str, scale: fn(&Quantity) -> i64| {
        let inits = spec.init_containers.as_ref().into_iter().flatten();
        let (sidecars, inits): (Vec<_>, Vec<_>) = inits.partition(|c| c.restart_policy.as_deref() == Some("Always"));
        let of_all = |sum: i64, c: &Container| sum.saturating_add(request(c, resource, scale));
        let beside = sidecars.into_iter().fold(0, of_all);
        let main = spec.containers.iter().fold(0, of_all);
        let before = inits.iter().map(|c| request(c, resource, scale)).max().unwrap_or(0);
        let overhead = spec.overhead.as_ref().and_then(|o| o.get(resource)).map_or(0, scale);
        beside.saturating_add(main.max(before)).saturating_add(overhead)
    };
    Some(Taken { node, cpu: sum("cpu", milli), memory: sum("memory", whole) })
}

/// The node that a pod's required affinity names.
pub fn pinned(pod: &Pod) -> Option<String> {
    let affinity = pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let fields = required.node_selector_terms.first()?.match_fields.as_ref()?;
    fields.iter().find(|f| f.key == "metadata.name")?.values.as_ref()?.first().cloned()
}

/// What the API server should not hold counts as nothing.
fn milli(of: &Quantity) -> i64 {
    (quantity(&of.0).unwrap_or(0.0) * 1000.0).round() as i64
}

fn whole(of: &Quantity) -> i64 {
    quantity(&of.0).unwrap_or(0.0) as i64
}
