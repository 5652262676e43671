//! Why nothing fits, and the nearest change that makes it fit.

use super::prepared::Prepared;
use super::search::Search;
use crate::graph::{GradGraph, Graph, Model, Op, OpId, Split};
use crate::plan::memory::Memory;
use crate::plan::predict::{Costs, predict};
use crate::plan::problem::{Infeasible, Problem};
use crate::plan::split::split;
use crate::plan::{Aim, Objective, Plan, Recompute};
use crate::topology::{Class, Device, Topology};
use crate::units::Bytes;

/// More memory than there is.
const ANY: Bytes = Bytes(u64::MAX / 2);
/// Numbers of shards that are tried, each a quarter larger than the one before.
const TRIES: usize = 8;

/// Finds out what would help where memory was too little; other reasons stay as they are.
///
/// # Complexity
/// That of at most nine cuts for each microbatch size, without a search, and of as many for each of a few splits.
pub(super) fn refuse(problem: &Problem<'_>, prepared: &Prepared, refusal: Infeasible) -> Infeasible {
    let Some(largest) = problem.topology.devices.iter().max_by_key(|d| d.memory) else { return refusal };
    let Infeasible::Memory { shard, n_shards, needs, device, has, .. } = refusal else { return refusal };
    if let Some((what, needs)) = indivisible(problem, prepared.costs()).filter(|(_, needs)| *needs > largest.memory) {
        let (split, device) = (split_that_fits(problem, largest), largest.name.clone());
        return Infeasible::Indivisible { what, needs, device, has: largest.memory, split };
    }
    // Where there is no room to spare, nothing is set aside.
    let least = |plan: Plan| -> Option<Bytes> {
        let device = Device { memory: Bytes(0), ..largest.clone() };
        let n_devices = plan.shards.iter().map(|s| s.devices.len()).sum();
        let topology = Topology { devices: vec![device; n_devices], ..problem.topology.clone() };
        predict(problem.model, &topology, &plan, prepared.costs()).ok()?.memory.iter().map(Memory::total).max()
    };
    let enough = roomiest(problem, prepared, n_shards, &Device { memory: ANY, ..largest.clone() }).and_then(least);
    let mut more = n_shards;
    let shards = (0..TRIES).find_map(|_| {
        more += (more / 4).max(1);
        roomiest(problem, prepared, more, largest).map(|_| more)
    });
    let split = split_that_fits(problem, largest);
    let aim = Aim { recompute: Recompute::Auto, ..problem.aim };
    let recompute = problem.aim.recompute == Recompute::Never
        && roomiest(&Problem { aim, ..*problem }, prepared, n_shards, largest).is_some();
    Infeasible::Memory { shard, n_shards, needs, device, has, enough, shards, split, recompute }
}

/// The first split with which as many shards fit on devices like this one; empty where none does.
fn split_that_fits(problem: &Problem<'_>, device: &Device) -> Vec<Split> {
    let fits = |model: &Model| {
        roomiest(&Problem { model, ..*problem }, &Prepared::new(model), problem.n_shards, device).is_some()
    };
    split(problem).find(fits).map(|model| model.split).unwrap_or_default()
}

/// The plan that needs least memory on so many equal devices, of all microbatch sizes; `None` where none fits.
fn roomiest(problem: &Problem<'_>, prepared: &Prepared, n_shards: u32, device: &Device) -> Option<Plan> {
    let n = (n_shards as usize).checked_mul(problem.n_replicas as usize)?;
    let topology = Topology { devices: vec![device.clone(); n], ..problem.topology.clone() };
    let aim = Aim { objective: Objective::Memory, ..problem.aim };
    let problem = Problem { topology: &topology, n_shards, aim, ..*problem };
    let of_size = |(microbatch, variants): (u64, Vec<&GradGraph>)| {
        let line = prepared.line(&problem, microbatch, &variants).ok()?;
        Search { problem: &problem, line: &line, microbatch, variants: &variants, go_on: &|| true }.roomiest()
    };
    let found = problem.microbatches().ok()?.into_iter().filter_map(of_size);
    found.min_by_key(|plan| plan.shards.iter().map(|s| s.memory).max())
}

/// What has to be on one device at one time, and is largest: a param with its gradient and slots, or a matrix product with
/// what it reads and writes, in microbatches of the smallest size.
fn indivisible(problem: &Problem<'_>, costs: &Costs) -> Option<(String, Bytes)> {
    let model = problem.model;
    let with_param = |p: usize| {
        let slots = model.state.iter().filter(|t| t.param == Some(p)).map(|t| t.shape.bytes());
        let slots: Bytes = slots.sum();
        let param = model.state[p].shape.bytes();
        (format!("param {} with its gradient and slots", model.state[p].name), param * 2 + slots)
    };
    let (_, variants) = problem.microbatches().ok()?.into_iter().next()?;
    let with_op = |graph: &Graph, id: OpId, op: &Op| {
        let mut read = op.operands.clone();
        read.sort_unstable();
        read.dedup();
        let read: Bytes = read.iter().map(|&o| graph.op(o).shape.bytes()).sum();
        (format!("op {} ({})", op.name, op.scope().unwrap_or(&op.opcode)), read + graph.op(id).shape.bytes())
    };
    let of_graph = |variant: &&GradGraph| -> Option<(String, Bytes)> {
        let (graph, costs) = (&variant.graph, costs.grads.get(&variant.name)?);
        let products = graph.ops().filter(|(id, _)| costs[id.index()].class == Class::Product);
        products.map(|(id, op)| with_op(graph, id, op)).max_by_key(|(_, bytes)| *bytes)
    };
    let all = variants.iter().filter_map(of_graph).chain((0..model.n_params).map(with_param));
    all.max_by_key(|(_, bytes)| *bytes)
}
