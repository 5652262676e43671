//! Which node each worker of a job runs on.

use std::fmt;

use super::inventory::Room;
use crate::api::{Seat, TrainingJobSpec};
use crate::topology::{Device, LOOPBACK, NETWORK, Topology, nominal};
use crate::units::Bytes;

/// Memory of a worker whose job does not say.
pub const MEMORY: u64 = 2 << 30;

/// What each worker of a job needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    pub workers: u32,
    pub cores: u32,
    pub memory: u64,
}

impl Need {
    /// # Errors
    /// Names the field that cannot be used.
    pub fn of(spec: &TrainingJobSpec) -> Result<Self, String> {
        let workers = spec.parallelism.shards.saturating_mul(spec.parallelism.replicas);
        const MAX: u32 = 4096;
        if workers > MAX {
            return Err(format!("spec.parallelism: {workers} workers, the limit is {MAX}"));
        }
        let memory = spec.resources.memory_bytes()?.unwrap_or(MEMORY);
        Ok(Self { workers, cores: spec.resources.cores.unwrap_or(1), memory })
    }

    /// Workers that fit into a room.
    fn fit(&self, room: &Room) -> i64 {
        let cpu = room.cpu / (i64::from(self.cores) * 1000).max(1);
        let memory = room.memory / i64::try_from(self.memory).unwrap_or(i64::MAX).max(1);
        cpu.min(memory).min(room.pods).max(0)
    }
}

/// Why no plan can be made, and what would change that.
#[derive(Clone, Debug, PartialEq)]
pub struct NoRoom {
    need: Need,
    fit: i64,
    /// Nodes that may be used and the workers that fit there now.
    open: usize,
    /// The open node with most free cores: (name, thousandths of a core, bytes).
    best: Option<(String, i64, i64)>,
    /// A node that may not be used, and why.
    closed: Option<(String, String)>,
    max_per_node: Option<u32>,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Need { workers, cores, memory } = self.need;
        write!(f, "{workers} workers of {cores} cores and {} each: there is room for {}", Bytes(memory), self.fit)?;
        match (&self.best, &self.closed) {
            (Some((node, cpu, memory)), _) => {
                let memory = Bytes((*memory).max(0) as u64);
                write!(f, " on {} nodes; most is free on {node}: {} cores and {memory}", self.open, *cpu as f64 / 1e3)?;
            }
            (None, Some((node, why))) => write!(f, "; node {node} {why}")?,
            (None, None) => write!(f, "; no node has the labels of spec.placement.nodeSelector")?,
        }
        if let Some(max) = self.max_per_node {
            write!(f, "; spec.placement.maxPerNode is {max}")?;
        }
        write!(f, ". The job starts as soon as there is room; smaller spec.resources or fewer shards need less")
    }
}

/// A node for every worker: as few nodes as possible, neighbours together. Workers in `kept` stay where they are.
///
/// # Errors
/// [`NoRoom`] says how much is missing.
pub fn place(spec: &TrainingJobSpec, need: Need, rooms: &[Room], kept: &[Seat]) -> Result<Vec<Seat>, Box<NoRoom>> {
    let selected = |r: &&Room| spec.placement.node_selector.iter().all(|(k, v)| r.labels.get(k) == Some(v));
    let open: Vec<&Room> = rooms.iter().filter(selected).filter(|r| r.closed.is_none()).collect();
    let on = |node: &str| kept.iter().filter(|s| s.node == node).count() as i64;
    let slots = |r: &Room| {
        let max = spec.placement.max_per_node.map_or(i64::MAX, i64::from);
        need.fit(r).min(max.saturating_sub(on(&r.node)).max(0))
    };
    let mut by_slots: Vec<(i64, &Room)> = open.iter().map(|r| (slots(r), *r)).collect();
    by_slots.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.node.cmp(&b.1.node)));
    let wanted: Vec<u32> = (0..need.workers).filter(|w| kept.iter().all(|s| s.worker != *w)).collect();
    // The smallest node that takes all that is left is better than the largest: it leaves the others whole.
    let mut free = by_slots.clone();
    let mut seats = kept.to_vec();
    let mut left = &wanted[..];
    while !left.is_empty() && !free.is_empty() {
        let enough = free.iter().map(|(n, _)| *n).filter(|n| *n >= left.len() as i64).min();
        let at = enough.and_then(|smallest| free.iter().position(|(n, _)| *n == smallest));
        let (n, room) = free.remove(at.unwrap_or(0));
        let (here, rest) = left.split_at((n.max(0) as usize).min(left.len()));
        seats.extend(here.iter().map(|&worker| Seat {
            worker,
            node: room.node.clone(),
            device: "cpu".to_owned(),
            cores: need.cores,
            memory: need.memory,
        }));
        left = rest;
    }
    if !left.is_empty() {
        let best = open.iter().max_by_key(|r| (r.cpu, std::cmp::Reverse(&r.node)));
        let shut = rooms.iter().filter(selected).find_map(|r| Some((r.node.clone(), r.closed.clone()?)));
        return Err(Box::new(NoRoom {
            need,
            fit: by_slots.iter().fold(0, |sum: i64, (n, _)| sum.saturating_add(*n)),
            open: open.len(),
            best: best.map(|r| (r.node.clone(), r.cpu, r.memory)),
            closed: shut,
            max_per_node: spec.placement.max_per_node,
        }));
    }
    seats.sort_by_key(|s| s.worker);
    Ok(seats)
}

/// The devices of a plan's seats, as the planner prices them: worker N is device N.
pub fn topology(seats: &[Seat]) -> Topology {
    let cpu = nominal("cpu").expect("CPUs are known");
    let device = |s: &Seat| Device {
        name: format!("{}/{}", s.node, s.worker),
        node: s.node.clone(),
        flops: cpu.flops * f64::from(s.cores),
        bandwidth: cpu.bandwidth * f64::from(s.cores),
        memory: Bytes(s.memory),
        ..cpu.clone()
    };
    Topology { devices: seats.iter().map(device).collect(), local: LOOPBACK, remote: NETWORK }
}
