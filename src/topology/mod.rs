//! Devices and the links between them.
//!
//! `topology` knows nothing of models, plans or Kubernetes.

mod measured;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, BytesPerSec, FlopsPerSec, Seconds};

pub use measured::{Class, Measured};

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
    /// How far the figures above are off, where that has been measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// What its node sends to other nodes at one time, all devices together, and as much receives; that of the link between
    /// nodes when absent. Where devices of a node differ the least counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<BytesPerSec>,
    /// Of a second, in any unit that all devices share: money, or watts.
    #[serde(default = "usual", skip_serializing_if = "is_usual")]
    pub price: f64,
}

fn usual() -> f64 {
    1.0
}

fn is_usual(price: &f64) -> bool {
    *price == usual()
}

/// What a device does at speed 1, before anything is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    pub flops: FlopsPerSec,
    pub bandwidth: BytesPerSec,
    pub overhead: Seconds,
}

impl Device {
    pub fn rates(&self) -> Rates {
        Rates { flops: self.flops, bandwidth: self.bandwidth, overhead: self.overhead }
    }

    /// Whether two devices differ in name, node with its NIC, and price at most: what one takes the other takes too.
    pub fn alike(&self, other: &Self) -> bool {
        let Self { kind, flops, bandwidth, overhead, memory, speed, measured, name: _, node: _, nic: _, price: _ } =
            self;
        *kind == other.kind
            && (*flops, *bandwidth, *overhead) == (other.flops, other.bandwidth, other.overhead)
            && (*memory, *speed, *measured) == (other.memory, other.speed, other.measured)
    }
}

/// One device of every kind, and the position of each device's kind among them.
///
/// # Complexity
/// O(devices · kinds).
pub fn kinds<'a>(devices: impl IntoIterator<Item = &'a Device>) -> (Vec<&'a Device>, Vec<usize>) {
    let (mut kinds, mut of): (Vec<&Device>, Vec<usize>) = (Vec::new(), Vec::new());
    for device in devices {
        let kind = kinds.iter().position(|k| k.alike(device)).unwrap_or(kinds.len());
        if kind == kinds.len() {
            kinds.push(device);
        }
        of.push(kind);
    }
    (kinds, of)
}

/// A path between two devices. Messages between nodes share NICs as well ([`Device::nic`]).
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

/// A link that carries less than others of its sort, both ways: a forecast or an observation says so.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slowed {
    pub between: [DeviceId; 2],
    /// Of the bandwidth, at most 1.
    pub share: f64,
}

/// Devices and every link between two of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    pub devices: Vec<Device>,
    /// Link between devices of one node.
    pub local: Link,
    /// Link between nodes.
    pub remote: Link,
    /// Exceptions from both.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slowed: Vec<Slowed>,
}

impl Topology {
    /// Devices whose links are as good as their nodes have them.
    pub fn new(devices: Vec<Device>, local: Link, remote: Link) -> Self {
        Self { devices, local, remote, slowed: Vec::new() }
    }

    /// Some of the devices, by position, in this order; one that is named twice has the same links twice.
    pub fn of(&self, picked: &[usize]) -> Self {
        let at = |device: DeviceId| {
            let at = picked.iter().enumerate().filter(move |(_, d)| **d == device.index());
            at.map(|(i, _)| DeviceId(i as u32))
        };
        let slowed = self.slowed.iter().flat_map(|s| {
            let [a, b] = s.between;
            at(a).flat_map(move |a| at(b).map(move |b| Slowed { between: [a, b], ..*s }))
        });
        let devices = picked.iter().map(|&d| self.devices[d].clone()).collect();
        Self { devices, local: self.local, remote: self.remote, slowed: slowed.collect() }
    }

    /// # Complexity
    /// O(links that are slowed).
    pub fn link(&self, a: DeviceId, b: DeviceId) -> Link {
        let near = self.devices[a.index()].node == self.devices[b.index()].node;
        let link = if near { self.local } else { self.remote };
        let these = self.slowed.iter().filter(|s| s.between == [a, b] || s.between == [b, a]);
        let share = these.map(|s| s.share).fold(1.0, f64::min);
        Link { bandwidth: link.bandwidth * share, ..link }
    }
}

/// Nominal figures of a kind of device, used until something has been measured.
pub fn nominal(kind: &str) -> Option<Device> {
    let gib = 1u64 << 30;
    let (name, flops, bandwidth, overhead, memory) = match kind {
        // One core of a recent server, as XLA's CPU plug-in uses it.
        "cpu" => ("cpu", 3e10, 8e9, 2e-6, 4 * gib),
        // NVIDIA H100 SXM data sheet: dense TF32 with tensor cores at about half its peak, HBM3.
        "gpu" | "nvidia.com/gpu" => ("nvidia.com/gpu", 2.5e14, 3.3e12, 5e-6, 80 * gib),
        // Google Cloud TPU v5e data sheet: bf16 at about half its peak.
        "tpu" | "google.com/tpu" => ("google.com/tpu", 1e14, 8.2e11, 5e-6, 16 * gib),
        _ => return None,
    };
    Some(Device {
        name: name.rsplit('/').next().unwrap_or(name).to_owned(),
        kind: name.to_owned(),
        node: "local".to_owned(),
        flops: FlopsPerSec(flops),
        bandwidth: BytesPerSec(bandwidth),
        overhead: Seconds(overhead),
        memory: Bytes(memory),
        speed: 1.0,
        measured: None,
        nic: None,
        price: usual(),
    })
}

/// A nominal device with the figures of its product, as labels of nodes name it; as it was where the product is unknown.
pub fn product(device: Device, product: Option<&str>) -> Device {
    let gib = 1u64 << 30;
    let Some(product) = product else { return device };
    // Data sheets of NVIDIA: dense TF32 with tensor cores (T4: FP32) at about half its peak. Of Google Cloud: bf16.
    const GPU: &str = "nvidia.com/gpu";
    const TPU: &str = "google.com/tpu";
    let known = [
        (GPU, "H200", 2.5e14, 4.8e12, 141),
        (GPU, "H100", 2.5e14, 3.3e12, 80),
        (GPU, "A100", 7.8e13, 1.9e12, if product.contains("40GB") { 40 } else { 80 }),
        (GPU, "L40S", 9e13, 8.6e11, 48),
        (GPU, "L4", 3e13, 3e11, 24),
        (GPU, "T4", 4e12, 3e11, 16),
        (TPU, "v5p", 2.3e14, 2.7e12, 95),
        (TPU, "v6e", 4.6e14, 1.6e12, 32),
        (TPU, "v5-lite", 1e14, 8.2e11, 16),
    ];
    let kind = format!("{}/{product}", device.kind);
    match known.into_iter().find(|(of, name, ..)| *of == device.kind && product.contains(name)) {
        Some((_, _, flops, bandwidth, memory)) => Device {
            kind,
            flops: FlopsPerSec(flops),
            bandwidth: BytesPerSec(bandwidth),
            memory: Bytes(memory * gib),
            ..device
        },
        None => Device { kind, ..device },
    }
}

/// Loopback TCP between two processes, checksummed.
pub const LOOPBACK: Link = Link { bandwidth: BytesPerSec(1e9), latency: Seconds(60e-6) };
/// A 25 Gbit/s network.
pub const NETWORK: Link = Link { bandwidth: BytesPerSec(2.5e9), latency: Seconds(50e-6) };

/// Reads devices such as `2xcpu` or `cpu:flops=50G:memory=4Gi,cpu:speed=0.5`.
pub fn parse_devices(text: &str) -> Result<Topology, String> {
    const FIELDS: &str = "flops, bandwidth, memory, speed, price, node, nic";
    const MAX_DEVICES: usize = 65_536;
    let mut devices: Vec<Device> = Vec::new();
    for item in text.split(',') {
        let mut parts = item.trim().split(':');
        let head = parts.next().unwrap_or("");
        let (count, kind) = match head.split_once('x') {
            Some((n, kind)) if n.chars().all(|c| c.is_ascii_digit()) && !n.is_empty() => {
                (n.parse::<usize>().map_err(|_| format!("{n:?} devices are too many"))?, kind)
            }
            _ => (1, head),
        };
        let mut device =
            nominal(kind).ok_or_else(|| format!("{kind:?} is no kind of device; use cpu, gpu or tpu, as in 2xcpu"))?;
        for field in parts {
            let (key, value) =
                field.split_once('=').ok_or_else(|| format!("{field:?} is not KEY=VALUE; keys are {FIELDS}"))?;
            match key {
                "flops" => device.flops = FlopsPerSec(quantity(key, value)?),
                "bandwidth" => device.bandwidth = BytesPerSec(quantity(key, value)?),
                "memory" => device.memory = Bytes(quantity(key, value)? as u64),
                "speed" => device.speed = quantity(key, value)?,
                "price" => device.price = quantity(key, value)?,
                "nic" => device.nic = Some(BytesPerSec(quantity(key, value)?)),
                "node" => device.node = value.to_owned(),
                _ => return Err(format!("{key:?} is not a field of a device; fields are {FIELDS}")),
            }
        }
        if count == 0 || devices.len() + count > MAX_DEVICES {
            return Err(format!("{count} devices of {kind}: give between 1 and {MAX_DEVICES} in all"));
        }
        for _ in 0..count {
            let name = format!("{}{}", device.name, devices.len());
            devices.push(Device { name, ..device.clone() });
        }
    }
    Ok(Topology::new(devices, LOOPBACK, NETWORK))
}

/// A positive number, as [`units::quantity`](crate::units::quantity) reads it.
fn quantity(key: &str, text: &str) -> Result<f64, String> {
    let positive = crate::units::quantity(text).filter(|n| *n > 0.0);
    positive.ok_or_else(|| format!("{key}={text}: not a positive number such as 50G or 4Gi"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_devices_as_people_write_them() {
        let topology = parse_devices("2xcpu:memory=4Gi,cpu:speed=0.5:node=b:nic=1G").unwrap();
        let names: Vec<&str> = topology.devices.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names, ["cpu0", "cpu1", "cpu2"]);
        assert_eq!(topology.devices[0].memory, Bytes(4 << 30));
        assert_eq!(topology.devices[2].speed, 0.5);
        assert_eq!([0, 2].map(|d| topology.devices[d].nic), [None, Some(BytesPerSec(1e9))]);
        assert_eq!(topology.link(DeviceId(0), DeviceId(2)), topology.remote);
    }

    #[test]
    fn a_slowed_link_is_slow_both_ways_and_no_other_is() {
        let mut topology = parse_devices("3xcpu").unwrap();
        topology.slowed = vec![Slowed { between: [DeviceId(0), DeviceId(1)], share: 0.25 }];
        let share = |t: &Topology, a: u32, b: u32| t.link(DeviceId(a), DeviceId(b)).bandwidth.0 / t.local.bandwidth.0;
        assert_eq!([share(&topology, 0, 1), share(&topology, 1, 0), share(&topology, 1, 2)], [0.25, 0.25, 1.0]);
        let picked = topology.of(&[2, 1, 0]);
        assert_eq!([share(&picked, 1, 2), share(&picked, 0, 1), share(&picked, 0, 2)], [0.25, 1.0, 1.0]);
    }

    #[test]
    fn says_what_is_wrong_with_a_device() {
        for (text, says) in [
            ("3xabacus", "\"abacus\" is no kind of device"),
            ("cpu:speed=0", "speed=0: not a positive number"),
            ("cpu:colour=red", "fields are flops"),
            ("0xcpu", "0 devices"),
            ("99999999999999999999xcpu", "too many"),
        ] {
            let e = parse_devices(text).unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }
}
