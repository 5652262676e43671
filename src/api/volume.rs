//! Where a job's files come from on a cluster.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One place files come from; exactly one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "[has(self.configMap), has(self.persistentVolumeClaim), has(self.image)].exists_one(x, x)",
    "message": "a volume has exactly one of configMap, persistentVolumeClaim and image"
}]))]
pub struct Volume {
    /// Name of its directory.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMap>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<Claim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
}

/// For what is smaller than 1 MiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConfigMap {
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Keys cannot hold a `/`: which key lies where. Every key under its own name when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["key"]))]
    pub items: Vec<Item>,
}

/// A key of a config map, and where it lies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Item {
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
    #[schemars(length(min = 1, max = 1024))]
    pub path: String,
}

/// A volume of the job's namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Claim {
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}

/// An OCI image or artifact, mounted read-only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Image {
    #[schemars(length(min = 1, max = 1024))]
    pub reference: String,
}
