//! The custom resources: what a user writes and what the operator answers, and nothing that runs.

mod feeder;
mod job;
pub mod lint;
mod partition;
mod placement;
mod profile;
mod resources;
mod split;
mod status;
mod stored;
mod volume;

use kube::CustomResourceExt;

pub use feeder::Feeder;
pub use job::{
    CONTROLLER, Checkpoint, Data, FailurePolicy, Format, Granularity, Objective, Parallelism, Partition, Schedule,
    Shuffle, TrainingJob, TrainingJobSpec, check, parse,
};
pub use partition::{
    Explanation, Observed, PartitionPlan, PartitionPlanSpec, PartitionPlanStatus, Predicted, PredictedShard, Seat,
};
pub use placement::{Placement, Pods, Toleration};
pub use profile::{Costs, ModelProfile, ModelProfileSpec};
pub use resources::{CPU, Devices, Resources};
pub use split::Split;
pub use status::{Condition, ConditionStatus, TrainingJobStatus, condition};
pub use stored::{Stored, Unreadable};
pub use volume::{Archive, Claim, ConfigMap, Image, Item, Volume};

/// Label and API group prefix of everything that is ours.
pub const GROUP: &str = "foreshard.dev";

/// The custom resource definitions, by file name.
pub fn crds() -> Vec<(&'static str, String)> {
    let yaml = |crd| quoted(&serde_yaml::to_string(&crd).expect("a CRD is plain data"));
    NAMES.into_iter().zip(definitions().into_iter().map(yaml)).collect()
}

/// Helm and kubectl read YAML 1.1, in which a bare `Off` is no text.
fn quoted(yaml: &str) -> String {
    const WORDS: [&str; 6] = ["y", "n", "yes", "no", "on", "off"];
    let line = |line: &str| match line.split_once("- ") {
        Some((before, word)) if WORDS.contains(&word.to_lowercase().as_str()) => format!("{before}- \"{word}\"\n"),
        _ => format!("{line}\n"),
    };
    yaml.lines().map(line).collect()
}

const NAMES: [&str; 3] = ["trainingjobs", "partitionplans", "modelprofiles"];

/// The same as values, in the order of `NAMES`.
fn definitions() -> [serde_json::Value; NAMES.len()] {
    [TrainingJob::crd(), PartitionPlan::crd(), ModelProfile::crd()].map(|crd| {
        let mut crd = serde_json::to_value(crd).expect("a CRD is plain data");
        drop_unsigned(&mut crd);
        bound(&mut crd["spec"]["versions"][0]["schema"]);
        crd
    })
}

/// Bounds for what has none of its own: the API server prices rules by them, and no object grows without end.
fn bound(schema: &mut serde_json::Value) {
    /// Largest whole number that all readers of JSON agree on.
    const WHOLE: u64 = (1 << 53) - 1;
    let (key, most) = match schema["type"].as_str() {
        Some("string") if schema.get("enum").is_none() => ("maxLength", 4096),
        Some("integer") => ("maximum", WHOLE),
        Some("array") => ("maxItems", 4096),
        Some("object") if schema.get("additionalProperties").is_some() => ("maxProperties", 64),
        _ => ("", 0),
    };
    if let serde_json::Value::Object(map) = schema {
        if !key.is_empty() {
            map.entry(key).or_insert(most.into());
        }
        // A default is a value, not a schema.
        map.iter_mut().filter(|(key, _)| *key != "default").for_each(|(_, inner)| bound(inner));
    }
}

/// Kubernetes knows no formats of unsigned numbers, and warns of them; their minimum says the same.
fn drop_unsigned(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            if map.get("format").and_then(|f| f.as_str()).is_some_and(|f| f.starts_with("uint")) {
                map.remove("format");
            }
            map.values_mut().for_each(drop_unsigned);
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(drop_unsigned),
        _ => {}
    }
}

/// All definitions, as `kubectl apply` takes them.
pub fn crd() -> String {
    crds().into_iter().map(|(_, yaml)| format!("---\n{yaml}")).collect()
}
