//! What jobs have learned of the ops of their bundles, kept for later jobs of the same bundle: pure.
//!
//! The operator knows no bundle: it hands the head all profiles of the namespace, and the head, which knows the digest of
//! its bundle, takes the one that fits.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::api::{Costs, ModelProfile, ModelProfileSpec, TrainingJob};
use crate::wire::report::JobReport;

/// Most profiles that a head is given: a config map holds 1 MiB.
const MOST: usize = 256;

/// The profile that should be, where it is another than it is now. Kinds of devices that this job does not use stay, and
/// so do factors that have changed by less than a tenth: nothing is written for noise.
pub fn learned(job: &TrainingJob, report: &JobReport, known: &[ModelProfile]) -> Option<ModelProfileSpec> {
    let learned = report.learned.as_ref().filter(|l| !l.kinds.is_empty() && l.bundle.len() == 64)?;
    let before = known.iter().find(|p| p.spec.bundle == learned.bundle).map(|p| &p.spec);
    let old = before.into_iter().flat_map(|spec| &spec.devices).map(|c| (c.kind.clone(), c.clone()));
    let mut devices: BTreeMap<String, Costs> = old.collect();
    let mut is_news = false;
    for (kind, factors) in &learned.kinds {
        let costs = Costs::new(kind, factors);
        if devices.get(kind).is_none_or(|c| !c.is_near(&costs)) {
            devices.insert(kind.clone(), costs);
            is_news = true;
        }
    }
    let job = job.metadata.name.clone().unwrap_or_default();
    is_news.then(|| ModelProfileSpec { bundle: learned.bundle.clone(), job, devices: devices.into_values().collect() })
}

/// What a profile looks like to the API server. It is owned by no job.
pub fn object(namespace: &str, spec: &ModelProfileSpec) -> Value {
    let name = format!("bundle-{}", spec.bundle.get(..16).unwrap_or(&spec.bundle));
    json!({
        "apiVersion": "foreshard.dev/v1alpha1", "kind": "ModelProfile",
        "metadata": {
            "name": name, "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "foreshard-operator"},
        },
        "spec": spec,
    })
}

/// Puts profiles into the config map of a job: by bundle, factors by kind of device.
pub fn offer(config: &mut Value, profiles: &[ModelProfile]) {
    let all: BTreeMap<&str, _> = profiles.iter().take(MOST).map(|p| (p.spec.bundle.as_str(), p.spec.kinds())).collect();
    config["data"]["profiles.json"] = json!(serde_json::to_string(&all).expect("numbers are plain data"));
}
