//! Blocks with a short latency: one convex set of ops for each accelerator, the hosts run the rest.

use super::loads::{Loads, Shape};
use super::path;
use super::problem::{Device, Problem, adjacency};
use super::reach::Reach;
use super::serial::serial;
use super::stream::Stream;
use super::timeline::{Scratch, Timeline};
use super::{Infeasible, NEAR, Placement};
use crate::plan::random::Random;

/// Temperatures, as [`super::anneal::Heat`] has them.
const COLD: f64 = 1e-4;
const WARM: f64 = 2e-3;
/// The hottest start over [`WARM`].
const RANGE: f64 = 500.0;
/// Moves between looks at the caller's `stop`.
const STRIDE: usize = 256;
/// Latency, in multiples of itself, for exceeding an accelerator's memory once over.
const PRICE: f64 = 4.0;

/// Finds blocks for the shortest latency of one sample.
///
/// There are as many hosts as run at once, whatever the problem says. An accelerator runs one block: it begins when all
/// inputs of the block are there, and its results are there when all of it is done.
///
/// Begins with the best blocks in a row, and anneals from there until `stop` or until the bound is reached.
///
/// # Errors
/// [`Infeasible`] never, as hosts take everything; the type is that of the other solvers.
pub fn latency(problem: &Problem, stop: &mut dyn FnMut() -> bool) -> Result<Placement, Infeasible> {
    let timeline = Timeline::new(problem, Stream::new(problem));
    let stream = &timeline.stream;
    let reach = Reach::new(stream);
    let shape = timeline.shape();
    let mut walk = Walk::new(&timeline, &shape, reach.as_ref());
    for beside in [false, true] {
        if let Some(device) = serial(&timeline, beside, stop) {
            walk.start(&device);
        }
    }
    let bound = path::bound(problem, stream, reach.as_ref(), walk.best.0, stop);
    let mut random = Random::new(stream.clusters.len() as u64);
    while walk.best.0 > bound * (1.0 + NEAR) && !stop() {
        walk.anneal(&mut random, stop);
    }
    let (cost, device) = walk.best;
    let k = timeline.n_accelerators;
    let place = |d: u32| if (d as usize) < k { Device::Accelerator(d as usize) } else { Device::Host(0) };
    Ok(Placement { device: stream.of.iter().map(|&c| place(device[c])).collect(), cost, bound })
}

/// An assignment that changes move by move, and the best met so far.
struct Walk<'a> {
    timeline: &'a Timeline,
    shape: &'a Shape,
    reach: Option<&'a Reach>,
    /// Neighbours upstream and downstream.
    near: [Vec<Vec<usize>>; 2],
    loads: Loads<'a>,
    energy: f64,
    scratch: Scratch,
    /// Clusters of the present move with the devices they come from.
    moving: Vec<(usize, u32)>,
    seen: Vec<u32>,
    stamp: u32,
    best: (f64, Vec<u32>),
}

impl<'a> Walk<'a> {
    /// All on hosts.
    fn new(timeline: &'a Timeline, shape: &'a Shape, reach: Option<&'a Reach>) -> Self {
        let n = timeline.stream.clusters.len();
        let edges = &timeline.stream.edges;
        let hosts = vec![timeline.n_accelerators as u32; n];
        let mut walk = Self {
            timeline,
            shape,
            reach,
            near: [adjacency(n, edges.iter().map(|&(a, b)| (b, a))), adjacency(n, edges.iter().copied())],
            loads: Loads::new(shape, &hosts),
            energy: 0.0,
            scratch: Scratch::default(),
            moving: Vec::new(),
            seen: vec![0; n],
            stamp: 0,
            best: (f64::INFINITY, hosts.clone()),
        };
        walk.start(&hosts);
        walk
    }

    /// Goes to an assignment.
    fn start(&mut self, device: &[u32]) {
        self.loads = Loads::new(self.shape, device);
        self.energy = self.evaluate();
        self.note();
    }

    /// Latency, more where memory is exceeded, infinite where blocks wait for each other.
    fn evaluate(&mut self) -> f64 {
        let excess = |d: usize| (self.loads.bytes(d) - self.shape.memory).max(0.0) / self.shape.memory.max(1.0);
        let excess: f64 = (0..self.timeline.n_accelerators).map(excess).sum();
        match self.timeline.latency(&self.loads, &mut self.scratch) {
            Some(latency) => latency * (1.0 + PRICE * excess),
            None => f64::INFINITY,
        }
    }

    fn note(&mut self) {
        if self.energy < self.best.0 * (1.0 - 1e-12) && self.loads.fits() {
            self.best = (self.energy, self.loads.assignment().to_vec());
        }
    }

    /// One run from a random temperature down, mostly from the best assignment.
    fn anneal(&mut self, random: &mut Random, stop: &mut dyn FnMut() -> bool) {
        if self.seen.is_empty() {
            return;
        }
        if random.below(8) > 0 || !self.energy.is_finite() {
            let device = self.best.1.clone();
            self.start(&device);
        }
        let mut temperature = WARM * RANGE.powf(random.unit());
        let n_moves = (2e3 * 8.0_f64.powf(random.unit())) as usize;
        let cooling = (COLD / temperature).powf(1.0 / n_moves as f64);
        for step in 0..n_moves {
            temperature *= cooling;
            if step % STRIDE == 0 {
                self.loads.recount();
                if stop() {
                    return;
                }
            }
            let Some(to) = self.draw(random) else { continue };
            for i in 0..self.moving.len() {
                self.put(self.moving[i].0, to);
            }
            let after = self.evaluate();
            let rise = (after / self.energy - 1.0) / temperature;
            if rise <= 0.0 || rise < 20.0 && random.unit() < (-rise).exp() {
                self.energy = after;
                self.note();
            } else {
                for i in 0..self.moving.len() {
                    let (v, from) = self.moving[i];
                    self.put(v, from);
                }
            }
        }
    }

    fn put(&mut self, cluster: usize, to: u32) {
        let change = self.loads.change(cluster, to as usize);
        self.loads.apply(cluster, to as usize, change);
    }

    /// Chooses clusters and the device they are to go to; `None` when nothing would change or it cannot be.
    fn draw(&mut self, random: &mut Random) -> Option<u32> {
        let host = self.timeline.n_accelerators as u32;
        let v = random.below(self.seen.len());
        self.moving.clear();
        let to = match self.reach {
            Some(reach) if random.below(3) == 0 => self.region(v, host, reach, random),
            _ => self.corner(v, host, random),
        };
        self.moving.retain(|&(_, from)| from != to);
        let runs = |&(u, _): &(usize, u32)| to == host || self.shape.time(u, to as usize).is_finite();
        (!self.moving.is_empty() && self.moving.iter().all(runs)).then_some(to)
    }

    /// All that lies between two clusters, to the host, to the device of either, or to a free one.
    fn region(&mut self, v: usize, host: u32, reach: &Reach, random: &mut Random) -> u32 {
        let mut w = v;
        for _ in 0..1 << random.below(7) {
            let next = &self.near[1][w];
            if next.is_empty() {
                break;
            }
            w = next[random.below(next.len())];
        }
        let loads = &self.loads;
        self.moving.extend(reach.between(v, w).iter().map(|u| (u, loads.device(u) as u32)));
        match random.below(4) {
            0 => host,
            1 => loads.device(v) as u32,
            2 => loads.device(w) as u32,
            _ => (0..host).find(|&d| loads.n_clusters(d as usize) == 0).unwrap_or(host),
        }
    }

    /// A cluster, alone or with all upstream or downstream of it on its device, to a device on that side or another.
    fn corner(&mut self, v: usize, host: u32, random: &mut Random) -> u32 {
        let near = &self.near[random.below(2)];
        let from = self.loads.device(v) as u32;
        let to = match random.below(16) {
            0 => host,
            1 => random.below(host as usize + 1) as u32,
            _ if near[v].is_empty() => host,
            _ => self.loads.device(near[v][random.below(near[v].len())]) as u32,
        };
        if to == from {
            return to;
        }
        self.moving.push((v, from));
        if random.below(3) == 0 {
            return to;
        }
        self.stamp += 1;
        self.seen[v] = self.stamp;
        let mut at = 0;
        while at < self.moving.len() {
            for &u in &near[self.moving[at].0] {
                if self.seen[u] != self.stamp && self.loads.device(u) as u32 == from {
                    self.seen[u] = self.stamp;
                    self.moving.push((u, from));
                }
            }
            at += 1;
        }
        to
    }
}
