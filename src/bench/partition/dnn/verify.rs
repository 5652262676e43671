//! Checks a placement against the file itself: shares nothing with the reader or the solvers but the names of devices.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::plan::place::Device;

/// What a placement costs by the rules of the format.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// Load of the busiest device.
    pub max_load: f64,
    /// Whether devices can be put in a line such that no edge of the forward half goes back.
    pub contiguous: bool,
    /// Latency with one block for each accelerator; `None` when blocks wait for each other, or for training.
    pub latency: Option<f64>,
}

/// A placement that the rules forbid.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Wrong {
    #[error("the file has no {0}")]
    File(&'static str),
    #[error("node {0} has no device")]
    Missing(i64),
    #[error("node {0} is placed and is not in the file")]
    Unknown(i64),
    #[error("node {0} is on {1:?}, which does not exist")]
    NoSuchDevice(i64, Device),
    #[error("node {0} is on an accelerator, where it does not run")]
    Unsupported(i64),
    #[error("nodes {0} and {1} have one colour and are on different devices")]
    Apart(i64, i64),
    #[error("accelerator {0} holds {1} bytes and has {2}")]
    Memory(usize, f64, f64),
}

/// Whether hosts are as many as the file says, or as many as one likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosts {
    Counted,
    Unlimited,
}

struct Graph {
    /// Time on the device where a node is.
    time: BTreeMap<i64, f64>,
    edges: Vec<(i64, i64)>,
    cost: BTreeMap<i64, f64>,
    backward: BTreeSet<i64>,
}

fn number(value: &Value, key: &'static str) -> Result<f64, Wrong> {
    match &value[key] {
        Value::Bool(b) => Ok(f64::from(u8::from(*b))),
        other => other.as_f64().ok_or(Wrong::File(key)),
    }
}

fn list<'a>(value: &'a Value, key: &'static str) -> Result<&'a Vec<Value>, Wrong> {
    value[key].as_array().ok_or(Wrong::File(key))
}

fn id(value: &Value, key: &'static str) -> Result<i64, Wrong> {
    value[key].as_i64().ok_or(Wrong::File(key))
}

/// Checks every rule and counts everything anew.
///
/// # Errors
/// [`Wrong`], for the first rule that is broken.
pub fn verify(text: &str, placed: &[(i64, Device)], hosts: Hosts) -> Result<Checked, Wrong> {
    let file: Value = serde_json::from_str(text).map_err(|_| Wrong::File("JSON"))?;
    let device: BTreeMap<i64, Device> = placed.iter().copied().collect();
    let n_accelerators = number(&file, "maxFPGAs")? as usize;
    let n_hosts = number(&file, "maxCPUs")? as usize;
    let memory = number(&file, "maxSizePerFPGA")?;
    let mut graph =
        Graph { time: BTreeMap::new(), edges: Vec::new(), cost: BTreeMap::new(), backward: BTreeSet::new() };
    let mut bytes = vec![0.0; n_accelerators];
    let mut of_colour: BTreeMap<i64, i64> = BTreeMap::new();
    for node in list(&file, "nodes")? {
        let v = id(node, "id")?;
        let place = *device.get(&v).ok_or(Wrong::Missing(v))?;
        let time = match place {
            Device::Accelerator(d) => {
                let held = bytes.get_mut(d).ok_or(Wrong::NoSuchDevice(v, place))?;
                *held += node["size"].as_f64().unwrap_or(0.0);
                if number(node, "supportedOnFpga")? == 0.0 {
                    return Err(Wrong::Unsupported(v));
                }
                number(node, "fpgaLatency")?
            }
            Device::Host(d) if d >= n_hosts && hosts == Hosts::Counted => return Err(Wrong::NoSuchDevice(v, place)),
            Device::Host(_) => number(node, "cpuLatency")?,
        };
        graph.time.insert(v, time);
        if number(node, "isBackwardNode").is_ok_and(|b| b != 0.0) {
            graph.backward.insert(v);
        }
        if let Some(colour) = node["colorClass"].as_i64() {
            let first = *of_colour.entry(colour).or_insert(v);
            if device[&first] != place {
                return Err(Wrong::Apart(first, v));
            }
        }
    }
    if let Some(unknown) = device.keys().find(|v| !graph.time.contains_key(v)) {
        return Err(Wrong::Unknown(*unknown));
    }
    if let Some(d) = (0..n_accelerators).find(|&d| bytes[d] > memory) {
        return Err(Wrong::Memory(d, bytes[d], memory));
    }
    for edge in list(&file, "edges")? {
        let (from, to) = (id(edge, "sourceId")?, id(edge, "destId")?);
        if let Some(missing) = [from, to].into_iter().find(|v| !graph.time.contains_key(v)) {
            return Err(Wrong::Missing(missing));
        }
        graph.edges.push((from, to));
        graph.cost.insert(from, number(edge, "cost")?);
    }
    let loads = graph.loads(&device);
    Ok(Checked {
        max_load: loads.values().copied().fold(0.0, f64::max),
        contiguous: graph.contiguous(&device),
        latency: if graph.backward.is_empty() { graph.latency(&device, &loads) } else { None },
    })
}

impl Graph {
    fn loads(&self, device: &BTreeMap<i64, Device>) -> BTreeMap<Device, f64> {
        let mut loads: BTreeMap<Device, f64> = BTreeMap::new();
        for (v, time) in &self.time {
            *loads.entry(device[v]).or_default() += time;
        }
        // Who pays for the output of whom, once each.
        let mut pays: BTreeSet<(i64, Device)> = BTreeSet::new();
        for &(from, to) in &self.edges {
            if device[&from] != device[&to] {
                pays.extend([(from, device[&from]), (from, device[&to])]);
            }
        }
        for (from, d) in pays {
            if matches!(d, Device::Accelerator(_)) {
                *loads.entry(d).or_default() += self.cost[&from];
            }
        }
        loads
    }

    fn contiguous(&self, device: &BTreeMap<i64, Device>) -> bool {
        let forward = |v: &i64| !self.backward.contains(v);
        let edges = self.edges.iter().filter(|(a, b)| forward(a) && forward(b));
        let arcs: BTreeSet<(Device, Device)> =
            edges.map(|(a, b)| (device[a], device[b])).filter(|(a, b)| a != b).collect();
        let items = device.values().copied().collect();
        sorted(items, &arcs).is_some()
    }

    /// Nodes on hosts run alone, those on an accelerator as one block.
    fn latency(&self, device: &BTreeMap<i64, Device>, loads: &BTreeMap<Device, f64>) -> Option<f64> {
        let item = |v: i64| match device[&v] {
            Device::Host(_) => (v, None),
            block => (i64::MIN, Some(block)),
        };
        let arcs: BTreeSet<_> = self.edges.iter().map(|&(a, b)| (item(a), item(b))).filter(|(a, b)| a != b).collect();
        let order = sorted(self.time.keys().map(|&v| item(v)).collect(), &arcs)?;
        let mut before: BTreeMap<_, Vec<_>> = BTreeMap::new();
        arcs.iter().for_each(|&(a, b)| before.entry(b).or_default().push(a));
        let mut end: BTreeMap<(i64, Option<Device>), f64> = BTreeMap::new();
        for at in order {
            let start = before.get(&at).into_iter().flatten().map(|a| end[a]).fold(0.0, f64::max);
            end.insert(at, start + at.1.map_or_else(|| self.time[&at.0], |block| loads[&block]));
        }
        Some(end.into_values().fold(0.0, f64::max))
    }
}

/// Items with every arc going ahead; `None` where arcs go in a circle.
fn sorted<T: Copy + Ord>(items: BTreeSet<T>, arcs: &BTreeSet<(T, T)>) -> Option<Vec<T>> {
    let mut waits: BTreeMap<T, usize> = items.iter().map(|&i| (i, 0)).collect();
    for (_, b) in arcs {
        *waits.entry(*b).or_default() += 1;
    }
    let mut after: BTreeMap<T, Vec<T>> = BTreeMap::new();
    arcs.iter().for_each(|&(a, b)| after.entry(a).or_default().push(b));
    let mut ready: Vec<T> = waits.iter().filter(|(_, n)| **n == 0).map(|(i, _)| *i).collect();
    let mut order = Vec::new();
    while let Some(i) = ready.pop() {
        order.push(i);
        for next in after.get(&i).into_iter().flatten() {
            if let Some(n) = waits.get_mut(next) {
                *n -= 1;
                if *n == 0 {
                    ready.push(*next);
                }
            }
        }
    }
    (order.len() == items.len()).then_some(order)
}
