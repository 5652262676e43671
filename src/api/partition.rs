//! `PartitionPlan`: one revision of where a job's shards run, and what was predicted and seen of it.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One revision of a job's plan: which node runs each shard, and why. Made by the operator.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "foreshard.dev",
    version = "v1alpha1",
    kind = "PartitionPlan",
    namespaced,
    shortname = "pp",
    category = "foreshard",
    status = "PartitionPlanStatus",
    printcolumn = r#"{"name":"Job","type":"string","jsonPath":".spec.job"}"#,
    printcolumn = r#"{"name":"Revision","type":"integer","jsonPath":".spec.revision"}"#,
    printcolumn = r#"{"name":"Nodes","type":"string","jsonPath":".spec.nodes"}"#,
    printcolumn = r#"{"name":"Predicted","type":"string","jsonPath":".status.predicted.step"}"#,
    printcolumn = r#"{"name":"Observed","type":"string","jsonPath":".status.observed.step"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".spec.reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("a plan does not change; another revision takes its place"))]
#[serde(rename_all = "camelCase")]
pub struct PartitionPlanSpec {
    /// Name of the TrainingJob.
    #[schemars(length(min = 1, max = 253))]
    pub job: String,
    #[schemars(range(min = 1))]
    pub revision: u64,
    /// Why this plan, instead of the one before.
    #[schemars(length(max = 1024))]
    pub reason: String,
    /// What is other than in the revision before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 512)))]
    pub changes: Vec<String>,
    /// Of everything the plan was made from: equal inputs give equal plans.
    #[schemars(length(max = 64))]
    pub inputs: String,
    /// All nodes of the plan.
    #[schemars(length(min = 1, max = 4096), inner(length(max = 253)))]
    pub nodes: Vec<String>,
    /// By worker: its pod is named `JOB-WORKER`.
    #[schemars(length(min = 1, max = 4096), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["worker"]))]
    pub shards: Vec<Seat>,
}

/// Where one worker runs, and what it may use there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Seat {
    pub worker: u32,
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// `cpu`, or the extended resource of an accelerator.
    #[schemars(length(min = 1, max = 253))]
    pub device: String,
    /// What the node says its devices are, such as `NVIDIA-H100-80GB-HBM3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub product: Option<String>,
    #[schemars(range(min = 1))]
    pub cores: u32,
    /// Bytes of the node's memory.
    #[schemars(range(min = 1))]
    pub memory: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PartitionPlanStatus {
    /// How the graph was cut over these devices, and what that should cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Predicted>,
    /// What steps cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<Observed>,
    /// Why steps take as long as they do, what else was possible and what would help: all predicted, by planning again.
    /// Comes a while after the plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Explanation>,
}

/// `foreshard explain`, in short.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// What limits the step.
    #[schemars(length(max = 1024))]
    pub limit: String,
    /// Which constraint binds.
    #[schemars(length(max = 1024))]
    pub binds: String,
    /// The next best plan, and where it loses.
    #[schemars(length(max = 1024))]
    pub next: String,
    /// What one more device, more bandwidth and more memory would bring.
    #[serde(default)]
    #[schemars(length(max = 8), inner(length(max = 1024)))]
    pub more: Vec<String>,
}

impl Explanation {
    /// Texts are cut off at what the schema takes.
    pub fn new(limit: &str, binds: &str, next: &str, more: &[String]) -> Self {
        let cut = |text: &str| text.chars().take(1024).collect();
        Self {
            limit: cut(limit),
            binds: cut(binds),
            next: cut(next),
            more: more.iter().take(8).map(|m| cut(m)).collect(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Predicted {
    /// The head's own number of this cut.
    pub cut: u64,
    /// Time of one step.
    pub step: String,
    /// No plan on these devices can be faster.
    pub bound: String,
    pub microbatch: u64,
    pub microbatches: u32,
    /// Crossing between shards per step.
    pub bytes_cut: u64,
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub shards: Vec<PredictedShard>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PredictedShard {
    pub shard: u32,
    /// Workers that run it, one for each replica.
    #[schemars(length(max = 4096))]
    pub workers: Vec<u32>,
    /// Ops of the gradient graph that only this shard computes.
    pub ops: u64,
    /// Computing time per step.
    pub busy: String,
    /// Peak, in bytes.
    pub memory: u64,
    /// Bytes sent to other shards per step.
    pub sent: u64,
    /// It computes forward values again for the backward half instead of keeping them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub recompute: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Observed {
    pub step: String,
    /// By rank: share of a step in which the worker computes.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub busy: Vec<String>,
}
