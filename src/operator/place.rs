//! How many workers a job gets, and which node each of them runs on.

use std::collections::BTreeMap;
use std::fmt;

use super::inventory::{DOMAINS, Room};
use crate::api::{CPU, Seat, TrainingJobSpec};
use crate::topology::{Device, LOOPBACK, NETWORK, Topology, nominal, product};
use crate::units::Bytes;

/// Memory of a worker whose job does not say.
pub const MEMORY: u64 = 2 << 30;
/// Most workers of a job.
const MAX: u32 = 4096;

/// What a job asks for, of one kind of device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Fewest and most workers.
    pub min: u32,
    pub max: u32,
    /// Copies of the pipeline: the number of workers is a multiple of it.
    pub replicas: u32,
    /// What each worker gets.
    pub device: String,
    pub cores: u32,
    pub memory: u64,
    pub rdma: Option<String>,
}

/// Why a job cannot be placed anywhere, ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// A field cannot be used.
    Spec(String),
    /// The image has no plug-in for the devices.
    NoPlugin(String),
}

impl Need {
    /// What a job asks for: by kind of device, the preferred first. `plugins`: devices that the image can drive.
    ///
    /// # Errors
    /// [`Unfit`] names the field.
    pub fn of(spec: &TrainingJobSpec, plugins: &BTreeMap<String, String>) -> Result<Vec<Self>, Unfit> {
        let replicas = spec.parallelism.replicas.max(1);
        let pinned = spec.pinned();
        if let Some(workers) = pinned.filter(|&w| w > MAX) {
            return Err(Unfit::Spec(format!("spec.parallelism: {workers} workers, the limit is {MAX}")));
        }
        let need = |device: &str, min: u32, max: u32| -> Result<Self, Unfit> {
            Ok(Self {
                min: min.max(replicas).next_multiple_of(replicas),
                max: max / replicas * replicas,
                replicas,
                device: device.to_owned(),
                cores: spec.resources.cores.unwrap_or(1),
                memory: spec.resources.memory_bytes().map_err(Unfit::Spec)?.unwrap_or(MEMORY),
                rdma: spec.resources.rdma.clone(),
            })
        };
        let ranges = &spec.resources.devices;
        let needs: Vec<Self> = match pinned {
            Some(workers) if ranges.is_empty() => vec![need(CPU, workers, workers)?],
            Some(workers) => {
                let holding = ranges.iter().filter(|d| (d.min..=d.max).contains(&workers));
                holding.map(|d| need(&d.name, workers, workers)).collect::<Result<_, _>>()?
            }
            None => ranges.iter().map(|d| need(&d.name, d.min, d.max.min(MAX))).collect::<Result<_, _>>()?,
        };
        if let Some(odd) = needs.iter().find(|n| n.min > n.max) {
            let Self { device, min, replicas, .. } = odd;
            return Err(Unfit::Spec(format!(
                "spec.resources.devices: no multiple of {replicas} replicas lies in the range of {device}; {min} would do"
            )));
        }
        let names: Vec<&str> = needs.iter().map(|n| n.device.as_str()).collect();
        let lacking = format!(
            "spec.resources.devices: the operator's image has no PJRT plug-in for {}, it has one for {}; name one with \
             --image-plugin DEVICE=FILE (image.plugins of the chart)",
            names.join(" or "),
            plugins.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        );
        let able: Vec<Self> = needs.into_iter().filter(|n| plugins.contains_key(&n.device)).collect();
        if able.is_empty() { Err(Unfit::NoPlugin(lacking)) } else { Ok(able) }
    }

    /// The same for just as many workers as a plan has; `None` where that is not what the job asks for.
    pub fn exactly(&self, seats: &[Seat]) -> Option<Self> {
        let n = u32::try_from(seats.len()).ok()?;
        let same = (self.min..=self.max).contains(&n) && seats.iter().all(|s| s.device == self.device);
        (same && n % self.replicas == 0).then(|| Self { min: n, max: n, ..self.clone() })
    }

    /// Workers that fit into a room.
    fn fit(&self, room: &Room) -> i64 {
        let cpu = room.cpu / (i64::from(self.cores) * 1000).max(1);
        let memory = room.memory / i64::try_from(self.memory).unwrap_or(i64::MAX).max(1);
        let extended = self.extended().map(|name| room.devices.get(name).copied().unwrap_or(0)).min();
        cpu.min(memory).min(room.pods).min(extended.unwrap_or(i64::MAX)).max(0)
    }

    /// The same, as far as the job lets them stand together.
    fn slots(&self, spec: &TrainingJobSpec, room: &Room) -> i64 {
        self.fit(room).min(spec.placement.max_per_node.map_or(i64::MAX, i64::from))
    }

    fn shut(&self, spec: &TrainingJobSpec, room: &Room) -> Option<String> {
        room.shut(&spec.placement.tolerations, &self.device)
    }

    /// Extended resources, one of each to a worker.
    fn extended(&self) -> impl Iterator<Item = &String> {
        Some(&self.device).filter(|d| *d != CPU).into_iter().chain(&self.rdma)
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { min, cores, memory, .. } = self;
        write!(f, "{min} workers of {cores} cores and {}", Bytes(*memory))?;
        self.extended().try_for_each(|name| write!(f, " and one {name}"))?;
        write!(f, " each")
    }
}

/// Why no plan can be made, and what would change that.
#[derive(Clone, Debug, PartialEq)]
pub struct NoRoom {
    need: Need,
    fit: i64,
    /// Nodes that may be used and the workers that fit there now.
    open: usize,
    /// The open node with most free devices or cores: (name, thousandths of a core, bytes, devices).
    best: Option<(String, i64, i64, Option<i64>)>,
    /// A node that may not be used, and why.
    closed: Option<(String, String)>,
    /// Nodes could be used, but none has such devices.
    lacking: bool,
    max_per_node: Option<u32>,
    /// Other kinds of devices that there is no room on either.
    others: Vec<String>,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: there is room for {}", self.need, self.fit)?;
        match (&self.best, &self.closed) {
            (Some((node, cpu, memory, devices)), _) => {
                let memory = Bytes((*memory).max(0) as u64);
                write!(f, " on {} nodes; most is free on {node}: {} cores and {memory}", self.open, *cpu as f64 / 1e3)?;
                devices.map_or(Ok(()), |n| write!(f, " and {n} {}", self.need.device))?;
            }
            (None, Some((node, why))) => write!(f, "; node {node} {why}")?,
            (None, None) if self.lacking => write!(f, "; no node has {}", self.need.device)?,
            (None, None) => write!(f, "; no node has the labels of spec.placement.nodeSelector")?,
        }
        if let Some(max) = self.max_per_node {
            write!(f, "; spec.placement.maxPerNode is {max}")?;
        }
        if !self.others.is_empty() {
            write!(f, "; nor is there room on {}", self.others.join(" or "))?;
        }
        write!(f, ". The job starts as soon as there is room; smaller spec.resources or fewer shards need less")
    }
}

/// A node for every worker, on the first kind of device that has room for the least number, as many as are free up to
/// the most. Workers in `kept` stay where they are.
///
/// # Errors
/// [`NoRoom`] says how much of the preferred kind is missing.
pub fn place(spec: &TrainingJobSpec, needs: &[Need], rooms: &[Room], kept: &[Seat]) -> Result<Vec<Seat>, Box<NoRoom>> {
    let mut missing: Option<Box<NoRoom>> = None;
    for need in needs {
        match place_one(spec, need, rooms, kept) {
            Ok(seats) => return Ok(seats),
            Err(no_room) => match &mut missing {
                None => missing = Some(no_room),
                Some(first) => first.others.push(need.device.clone()),
            },
        }
    }
    Err(missing.expect("a job asks for some kind of device"))
}

/// Whether there is room for just these seats, and the job still asks for such.
pub fn stands(spec: &TrainingJobSpec, needs: &[Need], rooms: &[Room], seats: &[Seat]) -> bool {
    let Some(need) = needs.iter().find_map(|n| n.exactly(seats)) else { return false };
    let here = |r: &Room| seats.iter().filter(|s| s.node == r.node).count() as i64;
    let open = rooms.iter().filter(|r| spec.placement.selects(&r.labels) && need.shut(spec, r).is_none());
    let found: i64 = open.filter(|r| here(r) <= need.slots(spec, r)).map(here).sum();
    found == seats.len() as i64 && seats.iter().all(|s| s.cores == need.cores && s.memory == need.memory)
}

fn place_one(spec: &TrainingJobSpec, need: &Need, rooms: &[Room], kept: &[Seat]) -> Result<Vec<Seat>, Box<NoRoom>> {
    let placement = &spec.placement;
    let selected = |r: &&Room| placement.selects(&r.labels);
    let shut = |r: &Room| need.shut(spec, r);
    let open: Vec<&Room> = rooms.iter().filter(selected).filter(|r| shut(r).is_none()).collect();
    let on = |node: &str| kept.iter().filter(|s| s.node == node).count() as i64;
    let most = |r: &Room| placement.max_per_node.map_or(i64::MAX, i64::from).saturating_sub(on(&r.node)).max(0);
    let slots = |r: &Room| need.slots(spec, r).min(most(r));
    let mut free: Vec<(i64, &Room)> = open.iter().map(|r| (slots(r), *r)).filter(|(n, _)| *n > 0).collect();
    free.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.node.cmp(&b.1.node)));
    let fit = total(&free);
    let whole = u32::try_from(fit.saturating_add(kept.len() as i64)).unwrap_or(u32::MAX).min(need.max);
    let workers = whole / need.replicas * need.replicas;
    if workers < need.min {
        // Nodes without such devices are not short of them.
        let holds = |r: &&Room| need.device == CPU || r.devices.contains_key(&need.device);
        let devices = |r: &Room| (need.device != CPU).then(|| r.devices.get(&need.device).copied().unwrap_or(0));
        let lacking = rooms.iter().any(|r| selected(&r)) && !rooms.iter().filter(selected).any(|r| holds(&r));
        let open: Vec<&Room> = open.into_iter().filter(holds).collect();
        let best = open.iter().max_by_key(|r| (devices(r), r.cpu, std::cmp::Reverse(&r.node)));
        return Err(Box::new(NoRoom {
            need: need.clone(),
            fit,
            open: open.len(),
            best: best.map(|r| (r.node.clone(), r.cpu, r.memory, devices(r))),
            closed: rooms.iter().filter(selected).filter(holds).find_map(|r| Some((r.node.clone(), shut(r)?))),
            lacking,
            max_per_node: placement.max_per_node,
            others: Vec::new(),
        }));
    }
    let wanted: Vec<u32> = (0..workers).filter(|w| kept.iter().all(|s| s.worker != *w)).collect();
    let mut seats = kept.to_vec();
    seats.extend(fill(need, &wanted, near(free, wanted.len() as i64, kept, rooms)));
    seats.sort_by_key(|s| s.worker);
    Ok(seats)
}

fn total(free: &[(i64, &Room)]) -> i64 {
    free.iter().fold(0, |sum: i64, (n, _)| sum.saturating_add(*n))
}

/// The rooms of the nearest neighbourhood that has enough of them: that of the seats kept, or else the smallest.
fn near<'a>(free: Vec<(i64, &'a Room)>, wanted: i64, kept: &[Seat], rooms: &[Room]) -> Vec<(i64, &'a Room)> {
    for label in DOMAINS {
        let home = kept.iter().find_map(|s| rooms.iter().find(|r| r.node == s.node)?.labels.get(label));
        let mut domains: BTreeMap<&str, Vec<(i64, &Room)>> = BTreeMap::new();
        for (n, room) in &free {
            if let Some(domain) = room.labels.get(label).filter(|d| home.is_none_or(|h| h == *d)) {
                domains.entry(domain).or_default().push((*n, room));
            }
        }
        let enough = domains.into_values().filter(|rooms| total(rooms) >= wanted);
        if let Some(rooms) = enough.min_by_key(|rooms| total(rooms)) {
            return rooms;
        }
    }
    free
}

/// As few nodes as possible. The smallest node that takes all that is left is better than the largest: it leaves the
/// others whole. `free` begins with the largest, and has enough.
fn fill(need: &Need, wanted: &[u32], mut free: Vec<(i64, &Room)>) -> Vec<Seat> {
    let mut seats = Vec::new();
    let mut left = wanted;
    while !left.is_empty() && !free.is_empty() {
        let enough = free.iter().map(|(n, _)| *n).filter(|n| *n >= left.len() as i64).min();
        let at = enough.and_then(|smallest| free.iter().position(|(n, _)| *n == smallest));
        let (n, room) = free.remove(at.unwrap_or(0));
        let (here, rest) = left.split_at((n.max(0) as usize).min(left.len()));
        seats.extend(here.iter().map(|&worker| Seat {
            worker,
            node: room.node.clone(),
            device: need.device.clone(),
            product: room.product(&need.device).map(str::to_owned),
            cores: need.cores,
            memory: need.memory,
        }));
        left = rest;
    }
    seats
}

/// The devices of a plan's seats, as the planner prices them: worker N is device N.
pub fn topology(seats: &[Seat]) -> Topology {
    let device = |s: &Seat| {
        let name = format!("{}/{}", s.node, s.worker);
        let cpu = nominal(CPU).expect("CPUs are known");
        let (cores, memory) = (f64::from(s.cores), Bytes(s.memory));
        match nominal(&s.device).filter(|_| s.device != CPU) {
            Some(known) => Device { name, node: s.node.clone(), ..product(known, s.product.as_deref()) },
            None => Device {
                name,
                node: s.node.clone(),
                flops: cpu.flops * cores,
                bandwidth: cpu.bandwidth * cores,
                memory,
                ..cpu
            },
        }
    };
    Topology::new(seats.iter().map(device).collect(), LOOPBACK, NETWORK)
}
