//! Devices and the links between them.
//!
//! `topology` knows nothing of models, plans or Kubernetes.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, BytesPerSec, FlopsPerSec, Seconds};

/// Position of a device in its [`Topology`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceId(pub u32);

impl DeviceId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dev{}", self.0)
    }
}

/// One accelerator, or a group of CPU cores that one worker owns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    pub name: String,
    /// `cpu`, `nvidia.com/gpu`, `google.com/tpu`; ops are priced per kind.
    pub kind: String,
    /// Where the device sits: devices of one node share its NICs.
    pub node: String,
    /// Arithmetic it sustains in large matrix products.
    pub flops: FlopsPerSec,
    /// Bandwidth of its memory.
    pub bandwidth: BytesPerSec,
    /// Fixed cost of starting one op.
    pub overhead: Seconds,
    /// What a shard may use.
    pub memory: Bytes,
    /// 1.0 is nominal; a forecast or an observation lowers it.
    pub speed: f64,
}

/// A path between two devices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    pub bandwidth: BytesPerSec,
    pub latency: Seconds,
}

impl Link {
    /// Time one message takes.
    pub fn time(&self, bytes: Bytes) -> Seconds {
        self.latency + bytes / self.bandwidth
    }
}

/// Devices and every link between two of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    pub devices: Vec<Device>,
    /// Link between devices of one node.
    pub local: Link,
    /// Link between nodes.
    pub remote: Link,
}

impl Topology {
    pub fn link(&self, a: DeviceId, b: DeviceId) -> Link {
        if self.devices[a.index()].node == self.devices[b.index()].node { self.local } else { self.remote }
    }
}
