//! Latency of one sample: accelerators run one convex block of ops each, hosts run the rest.

use super::loads::{Loads, Shape};
use super::problem::{Devices, Problem};
use super::stream::Stream;

/// A problem prepared for many evaluations.
#[derive(Clone, Debug)]
pub struct Timeline {
    pub stream: Stream,
    /// Those that can be of use.
    pub n_accelerators: usize,
    pub memory: f64,
    host: Vec<f64>,
    /// Readers of every op.
    begins: Vec<u32>,
    readers: Vec<u32>,
    n_read: Vec<u32>,
}

/// Scratch space of an evaluation.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    waits: Vec<u32>,
    ready: Vec<f64>,
    block_waits: Vec<u32>,
    block_ready: Vec<f64>,
    queue: Vec<u32>,
    members: Vec<Vec<u32>>,
}

impl Timeline {
    pub fn new(problem: &Problem, stream: Stream) -> Self {
        let ops = problem.ops();
        let n = ops.len();
        let (mut begins, mut readers) = (vec![0; n + 1], Vec::new());
        let mut n_read = vec![0; n];
        for &(from, to) in problem.edges() {
            begins[from + 1] += 1;
            readers.push(to as u32);
            n_read[to] += 1;
        }
        (0..n).for_each(|i| begins[i + 1] += begins[i]);
        let devices = problem.devices();
        Self {
            n_accelerators: devices.n_accelerators.min(stream.clusters.len()),
            memory: devices.memory,
            host: ops.iter().map(|op| op.host).collect(),
            stream,
            begins,
            readers,
            n_read,
        }
    }

    /// Accelerators, then one device for all hosts together: there are as many as run at once.
    pub fn shape(&self) -> Shape {
        let devices = Devices { n_accelerators: self.n_accelerators, n_hosts: 1, memory: self.memory };
        Shape::new(&self.stream.clusters, devices)
    }

    /// When the last op ends; `None` when blocks wait for each other in a circle.
    ///
    /// A block begins when all its inputs are there, and its results are there when all of it is done.
    pub fn latency(&self, loads: &Loads<'_>, scratch: &mut Scratch) -> Option<f64> {
        let k = self.n_accelerators;
        let block = |op: usize| loads.device(self.stream.of[op]);
        scratch.waits.clone_from(&self.n_read);
        scratch.ready.clear();
        scratch.ready.resize(self.host.len(), 0.0);
        scratch.block_waits.clear();
        scratch.block_waits.resize(k, 0);
        scratch.block_ready.clear();
        scratch.block_ready.resize(k, 0.0);
        scratch.members.resize(k, Vec::new());
        scratch.members.iter_mut().for_each(Vec::clear);
        scratch.queue.clear();
        let n = self.host.len();
        for op in 0..n {
            let d = block(op);
            if d == k {
                if self.n_read[op] == 0 {
                    scratch.queue.push(op as u32);
                }
            } else {
                scratch.members[d].push(op as u32);
            }
            for &w in &self.readers[self.begins[op] as usize..self.begins[op + 1] as usize] {
                let e = block(w as usize);
                if e < k && e != d {
                    scratch.block_waits[e] += 1;
                }
            }
        }
        let mut left = n;
        for d in 0..k {
            if scratch.block_waits[d] == 0 && !scratch.members[d].is_empty() {
                scratch.queue.push((n + d) as u32);
            }
        }
        let mut end = 0.0_f64;
        let mut at = 0;
        while let Some(&item) = scratch.queue.get(at) {
            at += 1;
            let item = item as usize;
            let (d, time) = if item < n {
                (k, scratch.ready[item] + self.host[item])
            } else {
                (item - n, scratch.block_ready[item - n] + loads.load(item - n))
            };
            end = end.max(time);
            let one = [item as u32];
            let members = if item < n { &one[..] } else { &scratch.members[d][..] };
            left -= members.len();
            for &op in members {
                let op = op as usize;
                for &w in &self.readers[self.begins[op] as usize..self.begins[op + 1] as usize] {
                    let w = w as usize;
                    let e = loads.device(self.stream.of[w]);
                    if e == k {
                        scratch.ready[w] = scratch.ready[w].max(time);
                        scratch.waits[w] -= 1;
                        if scratch.waits[w] == 0 {
                            scratch.queue.push(w as u32);
                        }
                    } else if e != d {
                        scratch.block_ready[e] = scratch.block_ready[e].max(time);
                        scratch.block_waits[e] -= 1;
                        if scratch.block_waits[e] == 0 {
                            scratch.queue.push((n + e) as u32);
                        }
                    }
                }
            }
        }
        (left == 0).then_some(end)
    }
}
