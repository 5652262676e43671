//! What a batch will take under a plan: its segments, priced once, by what has been measured since.
//!
//! [`super::predict()`] prices plans that do not run yet; here is the one that does. Both price a segment alike.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::memory::Memory;
use super::predict::{Costs, average_time, predict};
use super::schedule::{Between, TaskGraph};
use super::segment::{Message, Parameters, Segment, SegmentError, Segmentation, follow_parameters};
use super::traffic::Nics;
use super::{Place, Plan, ShardId, Task};
use crate::cost::OpCost;
use crate::graph::{DType, Graph, Model, OpId};
use crate::profile::{BatchProfile, Calibration, Observed, Terms, Timed};
use crate::topology::{Class, DeviceId, Rates, Topology};
use crate::units::{Bytes, Seconds};

/// By so much all messages are made later, to see how many a step waits for.
const LATE: Seconds = Seconds(1e-6);

/// The segments of a plan with their analytic terms.
#[derive(Clone, Debug)]
pub struct Priced {
    /// By rank: replica · n_shards + shard.
    seats: Vec<Seat>,
    n_shards: usize,
    n_microbatches: u32,
    variants: BTreeMap<String, Variant>,
    /// Exchange of gradients between replicas.
    averaging: Seconds,
    /// Updates exchange values.
    together: bool,
}

#[derive(Clone, Debug)]
struct Seat {
    device: DeviceId,
    kind: String,
    update: Vec<Terms>,
}

#[derive(Clone, Debug)]
struct Variant {
    tasks: TaskGraph,
    /// From shard to shard, by message.
    messages: Vec<(ShardId, ShardId, Bytes)>,
    /// Shard of each segment, in the order of the segmentation.
    shards: Vec<ShardId>,
    /// By rank, then segment of its shard.
    terms: Vec<Vec<Terms>>,
    orders: Vec<Vec<Task>>,
    /// By shard, without the batch itself.
    memory: Vec<Bytes>,
    /// By shard and batch tensor: whether it is read there.
    reads: Vec<Vec<bool>>,
    /// By batch tensor: type and shape of a row.
    rows: Vec<(DType, Vec<u64>)>,
}

/// What one step on one batch will take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchEstimate {
    pub variant: String,
    /// From the end of the step before to its own end.
    pub step: Seconds,
    /// The part of it that work, transfers and waiting explain, without [`Calibration::stretch`].
    pub explained: Seconds,
    /// Messages that the step waits for, one after the other: by so many delays it takes longer when all are delayed.
    pub messages: f64,
    /// Of each message, beyond what its link's figures say.
    pub late: Seconds,
    /// By rank.
    pub workers: Vec<WorkerEstimate>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerEstimate {
    pub device: DeviceId,
    /// Executing segments.
    pub busy: Seconds,
    /// Peak: what the plan needs for this variant, and the rows that this worker reads.
    pub memory: Bytes,
}

impl Priced {
    /// Prices the segments of a plan.
    ///
    /// # Units
    /// Nominal times at the speed that `topology` gives each device. For [`Calibration`] that is the speed before any
    /// forecast; figures measured already do not matter.
    /// # Errors
    /// [`SegmentError`] for a plan made for another model.
    /// # Complexity
    /// O(variants · ops · log ops), once per plan.
    pub fn new(model: &Model, topology: &Topology, plan: &Plan) -> Result<Self, SegmentError> {
        Self::by(&Costs::of(model), model, topology, plan)
    }

    pub(super) fn by(known: &Costs, model: &Model, topology: &Topology, plan: &Plan) -> Result<Self, SegmentError> {
        let n_shards = plan.shards.len();
        let ranks = || (0..plan.n_replicas as usize).flat_map(|r| (0..n_shards).map(move |s| (r, s)));
        let device = |(r, s): (usize, usize)| plan.shards[s].devices[r];
        let update = update_cut(model, plan)?;
        let of_shard = |cut: &Segmentation, graph: &Graph, costs: &[OpCost], sums: bool, rank: (usize, usize)| {
            let device = &topology.devices[device(rank).index()];
            let mine = cut.of_shard(ShardId(rank.1 as u32));
            let terms = |segment| segment_terms(graph, segment, costs, &device.rates(), sums) / device.speed;
            mine.map(|(_, segment)| terms(segment)).collect::<Vec<_>>()
        };
        let seats = ranks()
            .map(|rank| Seat {
                device: device(rank),
                kind: topology.devices[device(rank).index()].kind.clone(),
                update: of_shard(&update, &model.update, &known.update, false, rank),
            })
            .collect();
        let sums = plan.n_microbatches > 1;
        let nics = Nics::of(topology);
        let mut variants = BTreeMap::new();
        for (name, assignment) in &plan.grads {
            let Some(grad) = model.variant(name) else { continue };
            let graph = &grad.graph;
            let cut = plan.cut(model, graph, assignment)?;
            let costs = &known.grads[name];
            let sent = |(i, m): (usize, &Message)| (cut.segments[m.from].shard, m.to, cut.bytes(graph, i));
            let messages: Vec<(ShardId, ShardId, Bytes)> = cut.messages.iter().enumerate().map(sent).collect();
            let tasks = TaskGraph::new(graph, &cut, n_shards, &vec![Seconds(0.0); cut.segments.len()], |i, _| {
                let (from, to, bytes) = messages[i];
                nics.travel(topology, &plan.shards, from, to, bytes)
            });
            // Memory depends on the variant: a plan that runs no other.
            let grads = BTreeMap::from([(name.clone(), assignment.clone())]);
            let memory = predict(model, topology, &Plan { grads, ..plan.clone() }, known)?.memory;
            let memory = memory.iter().map(Memory::total).collect();
            let inputs = &graph.parameters()[model.n_params..];
            let reads = (0..n_shards as u32)
                .map(|s| {
                    let reads = |input| cut.of_shard(ShardId(s)).any(|(_, segment)| segment.inputs.contains(input));
                    inputs[..grad.batch.len()].iter().map(reads).collect()
                })
                .collect();
            let variant = Variant {
                tasks,
                messages,
                shards: cut.segments.iter().map(|s| s.shard).collect(),
                terms: ranks().map(|rank| of_shard(&cut, graph, costs, sums, rank)).collect(),
                orders: plan.orders.get(name).cloned().unwrap_or_default(),
                memory,
                reads,
                rows: grad.batch.iter().map(|t| (t.dtype, t.shape[1..].to_vec())).collect(),
            };
            variants.insert(name.clone(), variant);
        }
        let averaging = average_time(model, plan, topology);
        let together = !update.messages.is_empty();
        Ok(Self { seats, n_shards, n_microbatches: plan.n_microbatches, variants, averaging, together })
    }

    /// The same plan where links carry more or less. `model`, `plan`: those it was made of. Memory stays what it was.
    ///
    /// # Complexity
    /// O(messages).
    pub fn on_links(&self, model: &Model, topology: &Topology, plan: &Plan) -> Self {
        let nics = Nics::of(topology);
        let mut priced = self.clone();
        for variant in priced.variants.values_mut() {
            variant.tasks = variant.tasks.with_travel(|i| {
                let (from, to, bytes) = variant.messages[i];
                nics.travel(topology, &plan.shards, from, to, bytes)
            });
        }
        priced.averaging = average_time(model, plan, topology);
        priced
    }

    /// Device and kind of every worker, by rank.
    pub fn seats(&self) -> impl Iterator<Item = (DeviceId, &str)> {
        self.seats.iter().map(|s| (s.device, s.kind.as_str()))
    }

    /// A worker's executables in the order of its step reports: gradients, then update. Empty for a variant or a rank
    /// that the plan does not have.
    pub fn segments(&self, variant: &str, rank: usize) -> Vec<Timed> {
        let (Some(of), Some(seat)) = (self.variants.get(variant), self.seats.get(rank)) else { return Vec::new() };
        let grads = of.terms[rank].iter().map(|&terms| Timed { terms, runs: self.n_microbatches });
        grads.chain(seat.update.iter().map(|&terms| Timed { terms, runs: 1 })).collect()
    }

    /// The plan's variant for a batch: that of the batch's rows, whatever its microbatch size.
    pub fn variant_of(&self, batch: &BatchProfile) -> Option<&str> {
        let fits = |v: &Variant| {
            let found = batch.tensors.iter().map(|t| (t.dtype, t.dims.get(1..).unwrap_or_default()));
            v.rows.iter().map(|(dtype, row)| (*dtype, row.as_slice())).eq(found)
        };
        self.variants.iter().find(|(_, v)| fits(v)).map(|(name, _)| name.as_str())
    }

    /// What a step will take among others of its kind, `None` for a variant that the plan does not have.
    ///
    /// `speed`: of a device relative to its baseline, seen or forecast. The batch adds its own bytes.
    ///
    /// # Complexity
    /// O(replicas · tasks · log tasks).
    pub fn estimate(
        &self,
        variant: &str,
        calibration: &Calibration,
        speed: &dyn Fn(DeviceId) -> f64,
        batch: Option<&BatchProfile>,
    ) -> Option<BatchEstimate> {
        let of = self.variants.get(variant)?;
        let n_replicas = self.seats.len() / self.n_shards;
        let late = calibration.lateness();
        let mut explained = [Seconds(0.0); 2];
        let mut workers = Vec::with_capacity(self.seats.len());
        for replica in 0..n_replicas {
            let mut durations: Vec<Vec<Seconds>> = Vec::with_capacity(self.n_shards);
            let mut between = Vec::with_capacity(self.n_shards);
            let mut reporting = Seconds(0.0);
            for shard in 0..self.n_shards {
                let rank = replica * self.n_shards + shard;
                let seat = &self.seats[rank];
                let speed = speed(seat.device);
                let own = calibration.overhead(seat.device, &seat.kind);
                let times = calibration.times(seat.device, &seat.kind, &self.segments(variant, rank));
                let (grads, update) = times.split_at(of.terms[rank].len());
                let updating: Seconds = update.iter().copied().sum();
                let busy = (grads.iter().copied().sum::<Seconds>() * f64::from(self.n_microbatches) + updating) / speed;
                let read = |(tensor, _): &(usize, &bool)| batch.and_then(|b| b.tensors.get(*tensor)).map(|t| t.bytes);
                let rows: Bytes =
                    of.reads[shard].iter().enumerate().filter(|(_, r)| **r).filter_map(|t| read(&t)).sum();
                let memory = of.memory[shard] + Bytes(rows.0 / n_replicas as u64);
                workers.push(WorkerEstimate { device: seat.device, busy, memory });
                reporting = reporting.max(own.step / speed);
                between.push(self.averaging + (updating + own.task * update.len() as f64 + own.step) / speed);
                durations.push(grads.iter().map(|&grad| (grad + own.task) / speed).collect());
            }
            let mut next = vec![0; self.n_shards];
            let in_order = of.shards.iter().map(|shard| {
                let at = &mut next[shard.index()];
                *at += 1;
                durations[shard.index()][*at - 1]
            });
            let in_order: Vec<Seconds> = in_order.collect();
            // Counted from the end of the work; reporting is part of it.
            let answer = (calibration.answer() - reporting).max(Seconds(0.0));
            let between = Between { shards: &between, together: self.together, answer };
            for (explained, more) in explained.iter_mut().zip([Seconds(0.0), LATE]) {
                let tasks = of.tasks.with_times(in_order.iter().copied(), late + more);
                *explained = explained.max(tasks.period(&of.orders, self.n_microbatches, &between).ok()?);
            }
        }
        let [explained, later] = explained;
        // Where messages share a NIC, one that is later may leave it to another that a step waits for: the step is shorter,
        // and waits for none.
        let (step, messages) = (explained * calibration.stretch(), ((later - explained) / LATE).max(0.0));
        Some(BatchEstimate { variant: variant.to_owned(), step, explained, messages, late, workers })
    }

    /// Learns from a step that took so long how late messages are and what a step takes beside what is explained.
    ///
    /// `seen`: what its reports have taught. The step is explained with the speeds that its workers had in this very step:
    /// with those of late, a core that becomes slow would look like late messages.
    pub fn learn(
        &self,
        calibration: &mut Calibration,
        variant: &str,
        revision: u64,
        seen: &[Observed],
        measured: Seconds,
    ) {
        let own = |device| seen.iter().find(|o| o.device == device)?.speed;
        let speed = |device| own(device).unwrap_or_else(|| calibration.speed(device));
        if let Some(BatchEstimate { explained, messages, .. }) = self.estimate(variant, calibration, &speed, None) {
            calibration.observe_step(revision, explained, messages, measured);
        }
    }
}

/// Nominal terms of one run of a segment at speed 1: its ops, the start of the executable, copies of what is passed through, and,
/// with several microbatches, adding its results to their sums.
pub fn segment_terms(graph: &Graph, segment: &Segment, costs: &[OpCost], rates: &Rates, sums: bool) -> Terms {
    let streamed = |op: OpId, times: u64| {
        let bytes = graph.op(op).shape.bytes() * times;
        OpCost { bytes, launches: true, class: Class::Memory, ..OpCost::default() }.at_full_speed(rates)
    };
    let is_input = |op: &OpId| segment.inputs.binary_search(op).is_ok();
    let copied = segment.outputs.iter().copied().filter(is_input).map(|op| streamed(op, 2));
    let yielded = segment.results.iter().map(|&r| graph.outputs()[r]).map(|op| match (sums, is_input(&op)) {
        (true, _) => streamed(op, 3),
        (false, true) => streamed(op, 2),
        (false, false) => Terms::default(),
    });
    let start = OpCost { launches: true, ..OpCost::default() }.at_full_speed(rates);
    segment.ops.iter().map(|o| costs[o.index()].at_full_speed(rates)).chain(copied).chain(yielded).sum::<Terms>()
        + start
}

/// The update graph, cut by the owners of its state.
pub fn update_cut(model: &Model, plan: &Plan) -> Result<Segmentation, SegmentError> {
    let mut places = plan.owners.clone();
    places.extend_from_slice(&plan.owners[..model.n_params]);
    places.push(Place::Everywhere);
    let assignment = follow_parameters(&model.update, &places);
    Segmentation::new(&model.update, &assignment, &plan.owners, plan.shards.len(), Parameters::Sent)
}
