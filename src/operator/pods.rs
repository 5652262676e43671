//! What a job and its devices add to pods that are otherwise the same for all.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};

use super::render::{Site, TRAINER, WORKER, own_name};
use crate::api::{CPU, PartitionPlanSpec, Seat, TrainingJob};
use crate::units::Bytes;

/// Labels of Kueue, on a job and on its pods.
const QUEUE: &str = "kueue.x-k8s.io/queue-name";
const PRIORITY: &str = "kueue.x-k8s.io/priority-class";
/// Labels of its pods alone.
const MANAGED: &str = "kueue.x-k8s.io/managed";
const GROUP: &str = "kueue.x-k8s.io/pod-group-name";
/// Annotations of its pods.
const TOTAL: &str = "kueue.x-k8s.io/pod-group-total-count";
const ROLE: &str = "kueue.x-k8s.io/role-hash";
const PARENT: &str = "kueue.x-k8s.io/pod-suspending-parent";
/// Where it says `false`, a pod that has ended is not replaced: the group ends with its last one.
pub const RETRIABLE: &str = "kueue.x-k8s.io/retriable-in-group";
/// The gate by which Kueue holds pods back.
const KUEUES_GATE: &str = "kueue.x-k8s.io/admission";

/// The queue that a pod waits in, and the group that Kueue lets in as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Queued {
    pub queue: String,
    pub group: String,
}

impl Queued {
    /// For the first pods of a gang that is to wait in a queue. One that begins anew with another plan, or after the job was
    /// suspended, is another group: it may have another size, and Kueue's record of the one before goes some time after
    /// its pods.
    pub fn first(job: &TrainingJob, plan: &PartitionPlanSpec) -> Option<Self> {
        let queue = job.metadata.labels.as_ref()?.get(QUEUE)?.clone();
        // The value of a label, which has 63 characters at most.
        let own = own_name(job);
        let own = own.get(own.len().saturating_sub(45)..).unwrap_or(&own).trim_start_matches('-');
        Some(Self { queue, group: format!("{own}-{}-{}", plan.revision, job.metadata.generation.unwrap_or_default()) })
    }

    /// As a pod has it.
    pub fn of(pod: &Pod) -> Option<Self> {
        Some(Self { queue: pod.labels().get(QUEUE)?.clone(), group: pod.labels().get(GROUP)?.clone() })
    }

    /// Makes a pod one of the group, as Kueue's own integrations do with pods that a controller replaces: Kueue then puts no
    /// finalizer on them, for which a pod would have to be replaced under another name. All workers are of one role,
    /// whatever nodes they are pinned to: a group has eight roles at most, and who takes the place of a worker has its role.
    pub fn join(&self, pod: &mut Value, job: &TrainingJob, total: usize) {
        let metadata = &mut pod["metadata"];
        let role = if metadata["labels"][WORKER] == "0" { "head" } else { "worker" };
        for (key, value) in [(QUEUE, self.queue.as_str()), (GROUP, &self.group), (MANAGED, "true")] {
            metadata["labels"][key] = json!(value);
        }
        if let Some(priority) = job.metadata.labels.as_ref().and_then(|l| l.get(PRIORITY)) {
            metadata["labels"][PRIORITY] = json!(priority);
        }
        for (key, value) in [(TOTAL, total.to_string().as_str()), (ROLE, role), (PARENT, "foreshard.dev/trainingjob")] {
            metadata["annotations"][key] = json!(value);
        }
        // By these Kueue chooses a flavor whose nodes the operator has chosen from as well.
        if !job.spec.placement.node_selector.is_empty() {
            pod["spec"]["nodeSelector"] = json!(job.spec.placement.node_selector);
        }
    }
}

/// What a pod waits for that the gate of somebody else holds back.
pub fn held(name: &str, gate: &str, queued: Option<&Queued>, seats: &[Seat]) -> String {
    let Some((Queued { queue, group }, seat)) = queued.filter(|_| gate == KUEUES_GATE).zip(seats.first()) else {
        return format!("pod {name} is held back by the scheduling gate {gate}; whoever set it has to take it away");
    };
    let Seat { cores, memory, device, .. } = seat;
    let more = if device == CPU { String::new() } else { format!(" and one {device}") };
    let n = seats.len();
    format!(
        "Kueue holds the pods back until queue {queue} has quota for {n} workers of {cores} cores and {}{more} each; \
         kubectl describe workload {group} says what is missing",
        Bytes(*memory)
    )
}

impl Site {
    /// The plug-in of a kind of device, or that of the CPU where none is known.
    pub fn plugin(&self, device: &str) -> &str {
        self.plugins.get(device).or_else(|| self.plugins.get(CPU)).map_or("", String::as_str)
    }
}

/// Adds to the pod of a seat, whose container `runtime` uses the device, what its job says of pods.
pub fn complete(pod: &mut Value, runtime: &str, job: &TrainingJob, seat: &Seat) {
    let wanted = &job.spec.pods;
    let metadata = &mut pod["metadata"];
    for (key, value) in &wanted.labels {
        metadata["labels"][key] = json!(value);
    }
    for (key, value) in &wanted.annotations {
        metadata["annotations"][key] = json!(value);
    }
    let spec = &mut pod["spec"];
    let names = [
        ("priorityClassName", &wanted.priority_class_name),
        ("runtimeClassName", &wanted.runtime_class_name),
        ("schedulerName", &wanted.scheduler_name),
    ];
    for (field, name) in names {
        if let Some(name) = name {
            spec[field] = json!(name);
        }
    }
    if !wanted.image_pull_secrets.is_empty() {
        spec["imagePullSecrets"] = wanted.image_pull_secrets.iter().map(|name| json!({"name": name})).collect();
    }
    let mut tolerations: Vec<Value> = job.spec.placement.tolerations.iter().map(|t| json!(t)).collect();
    let device = Some(&seat.device).filter(|d| *d != CPU);
    tolerations.extend(device.map(|d| json!({"key": d, "operator": "Exists"})));
    if !tolerations.is_empty() {
        spec["tolerations"] = json!(tolerations);
    }
    // Extended resources are counted by limits, and requests are the same.
    let extended: Vec<&String> = device.into_iter().chain(&job.spec.resources.rdma).collect();
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            let computes = container["name"] == runtime;
            let leads = container["name"] == TRAINER;
            if let Some(env) = container["env"].as_array_mut().filter(|_| computes || leads) {
                env.extend(wanted.env.iter().map(|(name, value)| json!({"name": name, "value": value})));
            }
            for name in extended.iter().filter(|_| computes) {
                container["resources"]["limits"][name.as_str()] = json!("1");
                container["resources"]["requests"][name.as_str()] = json!("1");
            }
        }
    }
}
