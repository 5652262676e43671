//! What nodes have left for shards.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, Pod, Taint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::api::{CPU, Seat, Toleration, TrainingJobSpec};
use crate::units::quantity;

/// A node and what is free on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Room {
    pub node: String,
    pub labels: BTreeMap<String, String>,
    /// Thousandths of a core.
    pub cpu: i64,
    /// Bytes.
    pub memory: i64,
    pub pods: i64,
    /// Extended resources, by name.
    pub devices: BTreeMap<String, i64>,
    /// What keeps away pods that do not tolerate it.
    pub taints: Vec<Taint>,
    /// Why nothing may be put there, if so.
    pub closed: Option<String>,
}

/// Labels that say what a node's devices are: GPU feature discovery, and GKE's TPUs.
const PRODUCTS: [&str; 2] = ["nvidia.com/gpu.product", "cloud.google.com/gke-tpu-accelerator"];
/// Labels of nodes that are near each other, the nearest first: TPU slices of one shape, a rack, a zone.
pub const DOMAINS: [&str; 3] =
    ["cloud.google.com/gke-tpu-topology", "topology.kubernetes.io/rack", "topology.kubernetes.io/zone"];

/// Something that takes room on a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Taken {
    pub node: String,
    pub cpu: i64,
    pub memory: i64,
    pub devices: BTreeMap<String, i64>,
}

impl Room {
    /// Why a job that tolerates this, and is after such a device, puts nothing there.
    pub fn shut(&self, tolerations: &[Toleration], device: &str) -> Option<String> {
        self.closed.clone().or_else(|| {
            let bars = |t: &&Taint| {
                let value = t.value.as_deref().unwrap_or_default();
                (t.effect == "NoSchedule" || t.effect == "NoExecute")
                    && t.key != device
                    && !tolerations.iter().any(|one| one.tolerates(&t.key, value, &t.effect))
            };
            let taint = self.taints.iter().find(bars)?;
            Some(format!("has the taint {}, which spec.placement.tolerations does not name", taint.key))
        })
    }

    /// What its devices are.
    pub fn product(&self, device: &str) -> Option<&str> {
        let vendor = device.split_once('.').filter(|_| device != CPU)?.0;
        let label = PRODUCTS.iter().find(|label| label.contains(vendor))?;
        self.labels.get(*label).map(String::as_str)
    }

    /// Takes what a worker of a job needs (`sign` -1), or gives it back (1).
    pub fn count(&mut self, spec: &TrainingJobSpec, seat: &Seat, sign: i64) {
        let memory = i64::try_from(seat.memory).unwrap_or(i64::MAX);
        self.cpu = self.cpu.saturating_add(sign * i64::from(seat.cores) * 1000);
        self.memory = self.memory.saturating_add(sign * memory);
        self.pods = self.pods.saturating_add(sign);
        for name in Some(&seat.device).filter(|d| *d != CPU).into_iter().chain(&spec.resources.rdma) {
            let free = self.devices.entry(name.clone()).or_default();
            *free = free.saturating_add(sign);
        }
    }

    fn take(&mut self, taken: &Taken) {
        self.cpu = self.cpu.saturating_sub(taken.cpu);
        self.memory = self.memory.saturating_sub(taken.memory);
        self.pods = self.pods.saturating_sub(1);
        for (name, n) in &taken.devices {
            let free = self.devices.entry(name.clone()).or_default();
            *free = free.saturating_sub(*n);
        }
    }
}

/// All nodes, by name, less what is taken.
pub fn rooms<'a, T: Borrow<Taken>>(
    nodes: impl IntoIterator<Item = &'a Node>,
    taken: impl IntoIterator<Item = T>,
) -> Vec<Room> {
    let mut rooms: BTreeMap<String, Room> = nodes.into_iter().filter_map(room).map(|r| (r.node.clone(), r)).collect();
    for taken in taken {
        if let Some(room) = rooms.get_mut(&taken.borrow().node) {
            room.take(taken.borrow());
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
        devices: allocatable
            .into_iter()
            .flatten()
            .filter(|(resource, _)| resource.contains('/'))
            .map(|(resource, amount)| (resource.clone(), whole(amount)))
            .collect(),
        taints: node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default(),
        closed: closed(node),
        labels: node.metadata.labels.clone().unwrap_or_default(),
        node: name,
    })
}

/// Conditions of a node that takes no pods.
const TROUBLES: [(&str, &str); 4] = [
    ("MemoryPressure", "is short of memory"),
    ("DiskPressure", "is short of disk space"),
    ("PIDPressure", "is short of process ids"),
    ("NetworkUnavailable", "has no network"),
];

/// Why a node takes no shards of any job.
fn closed(node: &Node) -> Option<String> {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    let holds = |kind: &str| conditions.into_iter().flatten().any(|c| c.type_ == kind && c.status == "True");
    if !holds("Ready") {
        return Some("is not ready".to_owned());
    }
    if let Some((_, text)) = TROUBLES.iter().find(|(kind, _)| holds(kind)) {
        return Some((*text).to_owned());
    }
    let cordoned = node.spec.as_ref().is_some_and(|s| s.unschedulable == Some(true));
    cordoned.then(|| "is cordoned".to_owned())
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
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let requests = all.filter_map(|c| c.resources.as_ref()?.requests.as_ref()).flat_map(BTreeMap::keys);
    let devices = requests.filter(|name| name.contains('/')).map(|name| (name.clone(), sum(name, whole))).collect();
    Some(Taken { node, cpu: sum("cpu", milli), memory: sum("memory", whole), devices })
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
