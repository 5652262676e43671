//! Messages between nodes, which share the sender's and the receiver's NIC.
//!
//! Within a node every message travels as if it were alone. Between nodes those under way at one time divide what a NIC
//! sends, and what it receives, evenly: TCP's flows do about that when their round trips are alike. Sending and receiving do
//! not disturb each other. Replicas are taken to do the same things at the same time.
//!
//! # Source
//! Fluid flows with an even share of their narrowest link, as SimGrid models them (Casanova et al., JPDC 2014), without
//! giving what one flow cannot use to others.

use std::collections::BTreeMap;

use super::{ShardId, ShardPlan};
use crate::topology::{DeviceId, Topology};
use crate::units::{Bytes, BytesPerSec, Seconds};

/// How one message travels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Travel {
    /// Alone on its way.
    pub time: Seconds,
    /// What it shares with others; `None` within a node.
    pub shared: Option<Shared>,
}

impl From<Seconds> for Travel {
    fn from(time: Seconds) -> Self {
        Self { time, shared: None }
    }
}

/// A message's part of two NICs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shared {
    pub bytes: Bytes,
    /// Of the link.
    pub bandwidth: BytesPerSec,
    /// Position of the node that sends and of the one that receives, and what their NICs do.
    pub from: (u32, BytesPerSec),
    pub to: (u32, BytesPerSec),
    /// Replicas that send the same between the same nodes at the same time, and itself.
    pub copies: f64,
}

impl Shared {
    /// Time on the way, without latency, where nothing else is under way.
    pub fn alone(&self) -> Seconds {
        self.bytes / BytesPerSec(rate(self, self.copies, self.copies))
    }
}

/// The nodes of some devices, and their NICs.
#[derive(Clone, Debug)]
pub struct Nics {
    /// By device: position of its node; empty where there is one node.
    node: Vec<u32>,
    /// By node.
    bandwidth: Vec<BytesPerSec>,
}

impl Nics {
    /// A node's NIC is what its devices say, the least where they differ; where none says anything it carries what a link
    /// between nodes does.
    ///
    /// # Complexity
    /// O(devices · log nodes).
    pub fn of(topology: &Topology) -> Self {
        let devices = &topology.devices;
        if devices.iter().all(|d| d.node == devices[0].node) {
            return Self { node: Vec::new(), bandwidth: Vec::new() };
        }
        let mut known: BTreeMap<&str, u32> = BTreeMap::new();
        let mut said: Vec<Option<BytesPerSec>> = Vec::new();
        let mut node = Vec::with_capacity(devices.len());
        for device in devices {
            let at = *known.entry(&device.node).or_insert(said.len() as u32);
            if at as usize == said.len() {
                said.push(None);
            }
            let so_far = &mut said[at as usize];
            if let Some(nic) = device.nic.filter(|nic| so_far.is_none_or(|known| nic.0 < known.0)) {
                *so_far = Some(nic);
            }
            node.push(at);
        }
        let bandwidth = said.into_iter().map(|nic| nic.unwrap_or(topology.remote.bandwidth)).collect();
        Self { node, bandwidth }
    }

    /// Position of a device's node.
    pub fn node(&self, device: DeviceId) -> u32 {
        self.node.get(device.index()).copied().unwrap_or(0)
    }

    /// What a node's NIC carries each way, of several nodes.
    pub fn bandwidth(&self, node: u32) -> BytesPerSec {
        self.bandwidth[node as usize]
    }

    /// A message from shard to shard of the first replica.
    pub fn travel(
        &self,
        topology: &Topology,
        shards: &[ShardPlan],
        from: ShardId,
        to: ShardId,
        bytes: Bytes,
    ) -> Travel {
        let (senders, receivers) = (&shards[from.index()].devices, &shards[to.index()].devices);
        let link = topology.link(senders[0], receivers[0]);
        let between = |(a, b): (&DeviceId, &DeviceId)| (self.node(*a), self.node(*b));
        let ends = between((&senders[0], &receivers[0]));
        let shared = (ends.0 != ends.1).then(|| Shared {
            bytes,
            bandwidth: link.bandwidth,
            from: (ends.0, self.bandwidth[ends.0 as usize]),
            to: (ends.1, self.bandwidth[ends.1 as usize]),
            copies: senders.iter().zip(receivers).filter(|pair| between(*pair) == ends).count() as f64,
        });
        Travel { time: shared.map_or(link.time(bytes), |s| link.latency + s.alone()), shared }
    }

    /// Replicas send so many bytes of each shard to the first of them, which sends as many back: the time that the fullest
    /// NIC takes for it.
    pub fn gathered(&self, shards: &[ShardPlan], bytes: &[Bytes]) -> Seconds {
        let mut carried = vec![(0u64, 0u64); self.bandwidth.len()];
        for (shard, &bytes) in shards.iter().zip(bytes) {
            let first = self.node(shard.devices[0]);
            for other in shard.devices[1..].iter().map(|d| self.node(*d)).filter(|other| *other != first) {
                carried[first as usize].0 += bytes.0;
                carried[other as usize].1 += bytes.0;
            }
        }
        // All is gathered before it is sent back; then sender and receiver change places.
        let of = |((gathered, sent), nic): (&(u64, u64), &BytesPerSec)| Bytes(*gathered.max(sent)) / *nic * 2.0;
        carried.iter().zip(&self.bandwidth).map(of).fold(Seconds(0.0), Seconds::max)
    }
}

/// Bytes a second, where so many flows leave the sender and reach the receiver.
fn rate(shared: &Shared, leaving: f64, reaching: f64) -> f64 {
    shared.bandwidth.0.min(shared.from.1.0 / leaving).min(shared.to.1.0 / reaching)
}

/// Messages under way between nodes.
#[derive(Debug, Default)]
pub(super) struct Traffic<T> {
    under_way: Vec<Flow<T>>,
    /// By node: flows that leave it, and that reach it.
    load: Vec<(f64, f64)>,
    /// Up to when the flows have been followed.
    now: f64,
}

#[derive(Debug)]
struct Flow<T> {
    what: T,
    shared: Shared,
    began: f64,
    /// Bytes.
    left: f64,
    /// If nothing else begins or ends.
    ends: f64,
}

impl<T> Traffic<T> {
    /// A message is sent.
    pub fn begin(&mut self, now: f64, what: T, shared: Shared) {
        self.follow(now);
        let most = shared.from.0.max(shared.to.0) as usize;
        if self.load.len() <= most {
            self.load.resize(most + 1, (0.0, 0.0));
        }
        self.load[shared.from.0 as usize].0 += shared.copies;
        self.load[shared.to.0 as usize].1 += shared.copies;
        self.under_way.push(Flow { what, shared, began: now, left: shared.bytes.0 as f64, ends: now });
        self.foresee();
    }

    /// When the next message will be through; infinity where none is under way.
    pub fn next(&self) -> f64 {
        self.under_way.iter().map(|flow| flow.ends).fold(f64::INFINITY, f64::min)
    }

    /// The message that is through at [`Self::next`], and since when it was under way.
    pub fn end(&mut self) -> Option<(T, f64)> {
        let now = self.next();
        let at = self.under_way.iter().position(|flow| flow.ends == now)?;
        self.follow(now);
        let Flow { what, shared, began, .. } = self.under_way.remove(at);
        self.load[shared.from.0 as usize].0 -= shared.copies;
        self.load[shared.to.0 as usize].1 -= shared.copies;
        self.foresee();
        Some((what, began))
    }

    fn follow(&mut self, now: f64) {
        let passed = now - self.now;
        for flow in &mut self.under_way {
            let rest = (flow.ends - self.now).max(f64::MIN_POSITIVE);
            flow.left = if flow.ends <= now { 0.0 } else { flow.left * (1.0 - passed / rest) };
        }
        self.now = now;
    }

    fn foresee(&mut self) {
        for flow in &mut self.under_way {
            let (leaving, reaching) =
                (self.load[flow.shared.from.0 as usize].0, self.load[flow.shared.to.0 as usize].1);
            flow.ends = self.now + flow.left / rate(&flow.shared, leaving, reaching);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(from: u32, to: u32, bytes: u64) -> Shared {
        let nic = |node| (node, BytesPerSec(10.0));
        Shared { bytes: Bytes(bytes), bandwidth: BytesPerSec(8.0), from: nic(from), to: nic(to), copies: 1.0 }
    }

    /// When each of some messages is through, by name.
    fn through(sent: &[(f64, &'static str, Shared)]) -> Vec<(&'static str, f64)> {
        let (mut traffic, mut found) = (Traffic { under_way: Vec::new(), load: Vec::new(), now: 0.0 }, Vec::new());
        let mut take = |traffic: &mut Traffic<&'static str>, until: f64| {
            while traffic.next() <= until && traffic.next().is_finite() {
                let now = traffic.next();
                found.push((traffic.end().unwrap().0, now));
            }
        };
        for (at, name, shared) in sent {
            take(&mut traffic, *at);
            traffic.begin(*at, name, *shared);
        }
        take(&mut traffic, f64::INFINITY);
        found
    }

    #[test]
    fn messages_divide_what_a_nic_sends_and_what_it_receives() {
        let near = |found: Vec<(&'static str, f64)>, expected: &[(&str, f64)]| {
            let same = found.iter().zip(expected).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-9);
            assert!(same && found.len() == expected.len(), "{found:?}, expected {expected:?}");
        };
        // Alone the link is the limit; two from one node have half its NIC each.
        near(through(&[(0.0, "a", flow(0, 1, 80))]), &[("a", 10.0)]);
        near(through(&[(0.0, "a", flow(0, 1, 50)), (0.0, "b", flow(0, 2, 50))]), &[("a", 10.0), ("b", 10.0)]);
        // Likewise two to one node; those that share neither end do not disturb each other, nor do both ways.
        near(through(&[(0.0, "a", flow(0, 2, 50)), (0.0, "b", flow(1, 2, 50))]), &[("a", 10.0), ("b", 10.0)]);
        near(through(&[(0.0, "a", flow(0, 1, 80)), (0.0, "b", flow(1, 0, 80))]), &[("a", 10.0), ("b", 10.0)]);
        // The second begins when the first is half through: that takes twice as long for the rest.
        near(through(&[(0.0, "a", flow(0, 1, 80)), (5.0, "b", flow(0, 1, 80))]), &[("a", 13.0), ("b", 18.0)]);
    }
}
