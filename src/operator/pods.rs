//! What a job and its devices add to pods that are otherwise the same for all.

use serde_json::{Value, json};

use super::render::{Site, TRAINER};
use crate::api::{CPU, PartitionPlanSpec, Seat, TrainingJob};

/// Label with the name of a queue, of a job and of its pods.
pub const QUEUE: &str = "kueue.x-k8s.io/queue-name";

impl Site {
    /// The plug-in of a kind of device, or that of the CPU where none is known.
    pub fn plugin(&self, device: &str) -> &str {
        self.plugins.get(device).or_else(|| self.plugins.get(CPU)).map_or("", String::as_str)
    }
}

/// Adds to the pod of a seat, whose container `runtime` uses the device, what its job says of pods.
pub fn complete(pod: &mut Value, runtime: &str, job: &TrainingJob, plan: &PartitionPlanSpec, seat: &Seat) {
    let wanted = &job.spec.pods;
    let metadata = &mut pod["metadata"];
    for (key, value) in &wanted.labels {
        metadata["labels"][key] = json!(value);
    }
    for (key, value) in &wanted.annotations {
        metadata["annotations"][key] = json!(value);
    }
    // Kueue holds pods of a queue back with a gate of its own until there is quota for the whole group.
    if let Some(queue) = job.metadata.labels.as_ref().and_then(|l| l.get(QUEUE)) {
        metadata["labels"][QUEUE] = json!(queue);
        metadata["labels"]["kueue.x-k8s.io/pod-group-name"] = json!(format!("{}-{}", plan.job, plan.revision));
        let total = plan.shards.len().to_string();
        metadata["annotations"]["kueue.x-k8s.io/pod-group-total-count"] = json!(total);
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
