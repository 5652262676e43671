//! What a job may use, and how much of it each worker gets.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::quantity;

/// Devices of the job, and what each of its workers gets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.memory) || (isQuantity(self.memory) && !quantity(self.memory).isLessThan(quantity('1Mi')))",
    "message": "memory is a quantity of at least 1Mi, such as 4Gi or 512Mi"
}]))]
pub struct Resources {
    /// CPU cores of each worker. When absent: an even share of the machine, on a cluster 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub cores: Option<u32>,
    /// Memory of each worker, such as `4Gi`. When absent: an even share of the machine, on a cluster 2Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32))]
    pub memory: Option<String>,
    /// Devices the job may use, one to a worker: of the first kind that has room for its min, as many as are free up to
    /// its max. When absent: CPUs, as many as parallelism.shards says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub devices: Vec<Devices>,
    /// On a cluster: extended resource of RDMA network devices, such as `rdma/hca_shared_devices_a`; each worker gets one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 3, max = 253), regex(pattern = EXTENDED))]
    pub rdma: Option<String>,
}

/// How many devices of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.min <= self.max",
    "message": "min is more than max; a range goes from the least to the most devices"
}]))]
pub struct Devices {
    /// `cpu`, or the extended resource of an accelerator, such as `nvidia.com/gpu` or `google.com/tpu`.
    #[schemars(length(min = 3, max = 253), regex(pattern = DEVICE))]
    pub name: String,
    /// The job waits until so many are free.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 4096))]
    pub min: u32,
    #[schemars(range(min = 1, max = 4096))]
    pub max: u32,
}

/// Names of extended resources.
const EXTENDED: &str = r"^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$";
const DEVICE: &str = r"^(cpu|[a-z0-9][-a-z0-9.]*/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)$";
/// Name of the CPU among devices.
pub const CPU: &str = "cpu";

fn one() -> u32 {
    1
}

impl Resources {
    /// `memory` in bytes.
    pub fn memory_bytes(&self) -> Result<Option<u64>, String> {
        let Some(text) = &self.memory else { return Ok(None) };
        match quantity(text) {
            Some(n) if n >= 1.0 => Ok(Some(n as u64)),
            _ => Err(format!("spec.resources.memory: {text:?} is not a quantity; write one like 4Gi or 512Mi")),
        }
    }

    /// What no schema tells, for `workers` of them where that number is pinned, and for copies of the pipeline.
    pub fn check(&self, pinned: Option<u32>, replicas: u32) -> Result<(), String> {
        self.memory_bytes()?;
        for (i, Devices { name, min, max }) in self.devices.iter().enumerate() {
            let field = format!("spec.resources.devices[{i}]");
            if *min == 0 || min > max {
                return Err(format!("{field}: from {min} to {max} of {name}; min is at least 1 and at most max"));
            }
            if pinned.is_none() && *max < replicas {
                return Err(format!("{field}.max: {max} of {name}, {replicas} replicas need at least one each"));
            }
        }
        match pinned {
            Some(n) if !self.devices.is_empty() && !self.devices.iter().any(|d| (d.min..=d.max).contains(&n)) => Err(
                format!("spec.parallelism: {n} workers lie in no range of spec.resources.devices; leave shards out"),
            ),
            _ => Ok(()),
        }
    }

    /// Fewest shards that the first range allows.
    pub fn least_shards(&self, replicas: u32) -> u32 {
        self.devices.first().map_or(1, |d| d.min.div_ceil(replicas.max(1)))
    }

    /// Shards where so many devices are free: as many as the first range allows; 1 without a range.
    pub fn shards(&self, free: usize, replicas: u32) -> u32 {
        let Some(Devices { min, max, .. }) = self.devices.first() else { return 1 };
        let free = u32::try_from(free).unwrap_or(u32::MAX);
        (free.clamp(*min, *max.max(min)) / replicas.max(1)).max(1)
    }
}
