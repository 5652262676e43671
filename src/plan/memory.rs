//! Memory of a shard, by what it is for.
//!
//! Beyond what the worker's process has when its executables are ready and nothing has run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::segment::Segmentation;
use super::{Place, Plan, ShardId, Task};
use crate::graph::{Graph, Model, OpId};
use crate::topology::Device;
use crate::units::Bytes;

/// What the first executions touch and keep, beside tensors: pages of the plug-in and of its threads (9.6 MiB where there
/// are next to no tensors, mlp_digits), and pages of the heap that are shared with something alive (19 to 46 MiB beyond
/// what is alive in char_gpt, when free memory is given back before every segment; XLA's CPU plug-in 0.81, x86-64 Linux).
const FIRST_RUN_CPU: Bytes = Bytes(48 << 20);
/// Free memory that a worker keeps, so that it need not ask the system for it in every step.
const LEAST_FREE_CPU: Bytes = Bytes(32 << 20);

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
        let Self { state, gradients, copies, residuals, temporaries, first_run, free: _ } = *self;
        state + gradients + copies + residuals + temporaries + first_run
    }

    /// Sets aside free memory, as far as these devices have room.
    pub(super) fn add_free(&mut self, devices: &[&Device]) {
        if devices.iter().all(|d| d.kind != "cpu") {
            return;
        }
        let room = devices.iter().map(|d| d.memory - self.needs()).min().unwrap_or_default();
        self.free = (self.residuals + self.temporaries + LEAST_FREE_CPU).min(room);
    }

    /// Of several variants one runs at a time: the one that needs most counts.
    pub(super) fn add_variant(&mut self, graph: &Graph, cut: &Segmentation, shard: ShardId, order: &[Task]) {
        let residuals = residual_peak(graph, cut, order);
        let temporaries = cut.of_shard(shard).map(|(_, segment)| transient(graph, &segment.ops)).sum();
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
pub(super) fn add_update(graph: &Graph, cut: &Segmentation, memory: &mut [Memory]) {
    for (s, memory) in memory.iter_mut().enumerate() {
        let of_shard = cut.of_shard(ShardId(s as u32)).map(|(_, segment)| transient(graph, &segment.ops));
        let needs: Bytes = of_shard.sum();
        memory.temporaries = memory.temporaries.max(needs - memory.residuals);
    }
}

/// Most bytes a shard keeps between its segments, by its order.
fn residual_peak(graph: &Graph, cut: &Segmentation, order: &[Task]) -> Bytes {
    let Some(first) = order.first() else { return Bytes(0) };
    let shard = cut.segments[first.segment as usize].shard;
    let mut n_readers: BTreeMap<OpId, u32> = BTreeMap::new();
    for (_, segment) in cut.of_shard(shard) {
        for &v in &segment.inputs {
            *n_readers.entry(v).or_default() += 1;
        }
    }
    let is_parameter = |v| &*graph.op(v).opcode == "parameter";
    let mut alive: BTreeMap<(u32, OpId), u32> = BTreeMap::new();
    let (mut now, mut peak) = (Bytes(0), Bytes(0));
    for task in order {
        let segment = &cut.segments[task.segment as usize];
        for &v in segment.inputs.iter().chain(&segment.outputs) {
            let readers = n_readers.get(&v).copied().unwrap_or(0);
            if readers > 0 && !is_parameter(v) && !alive.contains_key(&(task.microbatch, v)) {
                alive.insert((task.microbatch, v), readers);
                now += graph.op(v).shape.bytes();
            }
        }
        peak = peak.max(now);
        for &v in &segment.inputs {
            if let Some(left) = alive.get_mut(&(task.microbatch, v)) {
                *left -= 1;
                if *left == 0 {
                    now = now - graph.op(v).shape.bytes();
                }
            }
        }
    }
    peak
}

/// Most bytes alive at once inside a segment (`ops` ascending), if every op wrote its result; fusion makes it less.
fn transient(graph: &Graph, ops: &[OpId]) -> Bytes {
    // By position in `ops`: the last reader, and what is freed after it.
    let mut last = vec![None; ops.len()];
    for (i, &op) in ops.iter().enumerate() {
        for o in &graph.op(op).operands {
            if let Ok(at) = ops.binary_search(o) {
                last[at] = Some(i);
            }
        }
    }
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
