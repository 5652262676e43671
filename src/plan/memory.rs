//! Memory of a shard, by what it is for.
//!
//! Beyond what the worker's process has when its executables are ready and nothing has run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::segment::{Segment, Segmentation};
use super::{Place, Plan, ShardId, Task};
use crate::graph::{Graph, Model, OpId};
use crate::topology::Device;
use crate::units::Bytes;

/// What the first executions touch and keep, whatever they execute: pages of the plug-in, of its threads and of links
/// (9 to 12 MiB where there are next to no tensors, mlp_digits; 17 with convolutions, convnet_digits; XLA's CPU plug-in
/// 0.81, x86-64 Linux).
const FIRST_RUN_CPU: Bytes = Bytes(24 << 20);
/// Pages of the heap that are shared with something alive. With the first run's it was 19 to 46 MiB beyond what is alive in
/// char_gpt, when free memory is given back before every segment.
const HOLES_CPU: Bytes = Bytes(24 << 20);
/// Free memory that a worker keeps, so that it need not ask the system for it in every step.
const LEAST_FREE_CPU: Bytes = Bytes(32 << 20);
/// Holes and free memory come from tensors: where these are small, both are at most so many times what is alive. At the
/// worst it is as many times as sizes differ by factors of two, in an allocator that takes the first hole (Robson, The
/// Computer Journal 1977); seen are 0 to 1.3 times in char_gpt.
const HOLES_PER_BYTE: u64 = 2;

/// The most a shard needs at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// Params and slots.
    pub state: Bytes,
    /// Sums of gradients.
    pub gradients: Bytes,
    /// Params of other shards.
    pub copies: Bytes,
    /// Values between segments, of all microbatches in flight.
    pub residuals: Bytes,
    /// Values inside segments. The allocator hands a segment's freed memory to values that live longer, and takes new
    /// memory for the next segment, whose temporaries are of other sizes: each segment's count.
    pub temporaries: Bytes,
    /// Of the plug-in, once.
    pub first_run: Bytes,
    /// Of the heap, held by values that are alive.
    #[serde(default)]
    pub holes: Bytes,
    /// Of the heap, between values; as far as the device has room. A worker gives back what is more.
    pub free: Bytes,
}

impl Memory {
    /// What the first execution takes on a device, whatever it executes. Other kinds than CPUs have not been measured.
    pub(super) fn of_process(device: &Device) -> Self {
        let first_run = if device.kind == "cpu" { FIRST_RUN_CPU } else { Bytes(0) };
        Self { first_run, ..Self::default() }
    }

    /// With free memory, which there may be less of where the device is small.
    pub fn total(&self) -> Bytes {
        self.needs() + self.free
    }

    fn needs(&self) -> Bytes {
        self.tensors() + self.first_run + self.holes
    }

    fn tensors(&self) -> Bytes {
        self.state + self.gradients + self.copies + self.residuals + self.temporaries
    }

    /// Adds what tensors take in a heap beyond their bytes; free memory as far as these devices have room.
    pub(super) fn add_heap(&mut self, devices: &[&Device]) {
        if devices.iter().all(|d| d.kind != "cpu") {
            return;
        }
        let held = self.tensors() * HOLES_PER_BYTE;
        self.holes = HOLES_CPU.min(held);
        let room = devices.iter().map(|d| d.memory - self.needs()).min().unwrap_or_default();
        self.free = (self.residuals + self.temporaries + LEAST_FREE_CPU.min(held)).min(room);
    }

    /// Of several variants one runs at a time: the one that needs most counts.
    pub(super) fn add_variant(&mut self, residuals: Bytes, temporaries: Bytes) {
        if residuals + temporaries > self.residuals + self.temporaries {
            (self.residuals, self.temporaries) = (residuals, temporaries);
        }
    }
}

/// Params and slots where they are owned, with the sums of their gradients.
pub(super) fn add_state(model: &Model, plan: &Plan, memory: &mut [Memory]) {
    for (i, tensor) in model.state.iter().enumerate() {
        let bytes = tensor.shape.bytes();
        match plan.owners[i] {
            Place::Shard(s) => {
                memory[s.index()].state += bytes;
                if i < model.n_params {
                    // In at least single precision.
                    let size = tensor.shape.dtype.size().max(4);
                    memory[s.index()].gradients += Bytes(tensor.shape.n_elements() * size);
                }
            }
            Place::Everywhere => memory.iter_mut().for_each(|m| m.state += bytes),
        }
    }
}

/// The update runs when the gradients' values are gone; it may need more than they did.
pub(super) fn add_update(temporaries: &[Bytes], memory: &mut [Memory]) {
    for (memory, &needs) in memory.iter_mut().zip(temporaries) {
        memory.temporaries = memory.temporaries.max(needs - memory.residuals);
    }
}

/// Values that shards keep between their segments, whatever the order of these.
#[derive(Clone, Debug)]
pub(super) struct Residuals {
    /// By segment.
    of: Vec<Vec<Residual>>,
    /// By shard: values, and segments.
    sizes: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, Debug)]
struct Residual {
    /// Number of the value among those of its shard.
    number: u32,
    bytes: Bytes,
    /// Segments of the shard that read it.
    n_readers: u32,
    /// The segment is one of them.
    read: bool,
}

impl Residuals {
    pub(super) fn new(graph: &Graph, cut: &Segmentation, n_shards: usize) -> Self {
        let is_parameter = |v: OpId| &*graph.op(v).opcode == "parameter";
        let mut segments = vec![Vec::new(); n_shards];
        cut.segments.iter().enumerate().for_each(|(i, s)| segments[s.shard.index()].push(i));
        let mut of = vec![Vec::new(); cut.segments.len()];
        let mut sizes = Vec::with_capacity(n_shards);
        // Of the shard that is looked at.
        let mut number = vec![NOWHERE; graph.n_ops()];
        for segments in segments {
            let mut n_readers: Vec<u32> = Vec::new();
            let mut values: Vec<OpId> = Vec::new();
            let inputs = segments.iter().flat_map(|&i| &cut.segments[i].inputs);
            for &v in inputs.filter(|v| !is_parameter(**v)) {
                if number[v.index()] == NOWHERE {
                    number[v.index()] = values.len() as u32;
                    values.push(v);
                    n_readers.push(0);
                }
                n_readers[number[v.index()] as usize] += 1;
            }
            for &i in &segments {
                let segment = &cut.segments[i];
                // A value that is passed through is an input and an output.
                let made = segment.outputs.iter().filter(|v| segment.inputs.binary_search(v).is_err());
                let all = segment.inputs.iter().map(|v| (v, true)).chain(made.map(|v| (v, false)));
                let known = all.filter(|(v, _)| number[v.index()] != NOWHERE);
                let residual = |(v, read): (&OpId, bool)| {
                    let number = number[v.index()];
                    let bytes = graph.op(*v).shape.bytes();
                    Residual { number, bytes, n_readers: n_readers[number as usize], read }
                };
                of[i] = known.map(residual).collect();
            }
            sizes.push((values.len(), segments.len()));
            values.iter().for_each(|v| number[v.index()] = NOWHERE);
        }
        Self { of, sizes }
    }

    /// Most bytes alive at one time, by the order of one shard's tasks.
    pub(super) fn peak(&self, shard: ShardId, order: &[Task]) -> Bytes {
        let (n_values, n_segments) = self.sizes[shard.index()];
        // Of each microbatch that is under way: readers that are still to come, by value; segments that are still to run.
        let mut under_way: BTreeMap<u32, (Vec<Option<u32>>, usize)> = BTreeMap::new();
        let (mut now, mut peak) = (Bytes(0), Bytes(0));
        for task in order {
            let fresh = || (vec![None; n_values], n_segments);
            let (readers, to_run) = under_way.entry(task.microbatch).or_insert_with(fresh);
            let residuals = &self.of[task.segment as usize];
            for r in residuals {
                readers[r.number as usize].get_or_insert_with(|| {
                    now += r.bytes;
                    r.n_readers
                });
            }
            peak = peak.max(now);
            for r in residuals.iter().filter(|r| r.read) {
                if let Some(left) = &mut readers[r.number as usize] {
                    *left -= 1;
                    if *left == 0 {
                        now = now - r.bytes;
                    }
                }
            }
            *to_run = to_run.saturating_sub(1);
            if *to_run == 0 {
                under_way.remove(&task.microbatch);
            }
        }
        peak
    }
}

/// By segment: values inside it. `known`: that of a segment, if it is.
pub(super) fn inside(graph: &Graph, cut: &Segmentation, known: &dyn Fn(usize) -> Option<Bytes>) -> Vec<Bytes> {
    let mut position = vec![NOWHERE; graph.n_ops()];
    let of =
        |(i, segment): (usize, &Segment)| known(i).unwrap_or_else(|| transient(graph, &segment.ops, &mut position));
    cut.segments.iter().enumerate().map(of).collect()
}

/// Not among the values that are looked at.
const NOWHERE: u32 = u32::MAX;

/// Most bytes alive at once inside a segment (`ops` ascending), if every op wrote its result; fusion makes it less.
///
/// `position`: room for each op of the graph, [`NOWHERE`] before and after.
fn transient(graph: &Graph, ops: &[OpId], position: &mut [u32]) -> Bytes {
    // By position in `ops`: the last reader, and what is freed after it.
    let mut last = vec![None; ops.len()];
    for (i, &op) in ops.iter().enumerate() {
        position[op.index()] = i as u32;
        for o in &graph.op(op).operands {
            if let Some(last) = last.get_mut(position[o.index()] as usize) {
                *last = Some(i);
            }
        }
    }
    ops.iter().for_each(|op| position[op.index()] = NOWHERE);
    let mut freed = vec![Bytes(0); ops.len()];
    let (mut now, mut peak) = (Bytes(0), Bytes(0));
    for (i, &id) in ops.iter().enumerate() {
        let op = graph.op(id);
        let free = matches!(
            &*op.opcode,
            "constant" | "iota" | "broadcast" | "tuple" | "get-tuple-element" | "reshape" | "bitcast"
        );
        if let (false, Some(end)) = (free, last[i]) {
            now += op.shape.bytes();
            freed[end] += op.shape.bytes();
        }
        peak = peak.max(now);
        now = now - freed[i];
    }
    peak
}
