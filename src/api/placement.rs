//! Where workers may go, and what their pods look like to others.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::GROUP;

/// Where shards may go.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Placement {
    /// Labels a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub node_selector: BTreeMap<String, String>,
    /// Most shards on one node; as many as fit when absent, for links within a node are the fastest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max_per_node: Option<u32>,
    /// Taints that do not keep the job away. Those named after its own devices, as GPU nodes have them, never do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tolerations: Vec<Toleration>,
}

impl Placement {
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.node_selector.iter().all(|(k, v)| labels.get(k) == Some(v))
    }
}

/// As in a pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.operator) && self.operator == 'Exists' ? !has(self.value) : has(self.key)",
    "message": "a toleration has a key, or the operator Exists, which takes no value"
}]))]
pub struct Toleration {
    /// All taints when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<Operator>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// All effects when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<Effect>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Operator {
    Exists,
    Equal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Effect {
    NoSchedule,
    PreferNoSchedule,
    NoExecute,
}

impl Toleration {
    /// Whether a taint keeps nobody away who has this.
    pub fn tolerates(&self, key: &str, value: &str, effect: &str) -> bool {
        let name = |e: Effect| match e {
            Effect::NoSchedule => "NoSchedule",
            Effect::PreferNoSchedule => "PreferNoSchedule",
            Effect::NoExecute => "NoExecute",
        };
        self.effect.is_none_or(|e| name(e) == effect)
            && self.key.as_ref().is_none_or(|k| k == key)
            && (self.operator == Some(Operator::Exists) || self.value.as_deref().unwrap_or_default() == value)
    }
}

/// On a cluster: what is added to every pod of the job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pods {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub scheduler_name: Option<String>,
    /// Environment variables of head and workers, such as NCCL_SOCKET_IFNAME.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub env: BTreeMap<String, String>,
    /// Secrets with which nodes fetch images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(min = 1, max = 253)))]
    pub image_pull_secrets: Vec<String>,
}

impl Pods {
    /// What the API server would refuse in pods, or what would hide them from us.
    pub fn check(&self) -> Result<(), String> {
        for (field, map) in [("labels", &self.labels), ("annotations", &self.annotations)] {
            for (key, value) in map {
                let (prefix, name) = key.split_once('/').map_or((None, key.as_str()), |(p, n)| (Some(p), n));
                if prefix.is_some_and(|p| [GROUP, "app.kubernetes.io", "kueue.x-k8s.io"].contains(&p)) {
                    return Err(format!("spec.pods.{field}: {key} is set by the operator; leave it out"));
                }
                if !word(name) || prefix.is_some_and(|p| p.is_empty() || p.len() > 253 || p.contains('/')) {
                    return Err(format!(
                        "spec.pods.{field}: {key:?} is no key; write one like team or example.com/team"
                    ));
                }
                if field == "labels" && !value.is_empty() && !word(value) {
                    return Err(format!(
                        "spec.pods.labels: {key}: {value:?} has more than 63 letters, digits, '-', '_' and '.', or ends in a sign"
                    ));
                }
            }
        }
        for name in self.env.keys() {
            if OURS.contains(&name.as_str()) || name.starts_with("FORESHARD_") {
                return Err(format!("spec.pods.env: {name} is set by the operator; leave it out"));
            }
            let is_word = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            if !is_word || name.bytes().next().is_none_or(|b| b.is_ascii_digit()) {
                return Err(format!("spec.pods.env: {name:?} is no name of a variable; write one like NCCL_DEBUG"));
            }
        }
        Ok(())
    }
}

/// Variables that every container of ours has: without the flags, the same ops would give other bits.
const OURS: [&str; 2] = ["POD_IP", "XLA_FLAGS"];

/// Names and values of labels.
fn word(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let ends = text.bytes().next().into_iter().chain(text.bytes().last());
    (1..=63).contains(&text.len()) && text.bytes().all(inner) && ends.into_iter().all(|b| b.is_ascii_alphanumeric())
}
