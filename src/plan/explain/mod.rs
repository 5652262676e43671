//! Why a plan takes as long as it does, what would make it faster, and what else was possible.
//!
//! Every answer comes from planning again: with other devices, with other links, with another choice.

mod shares;
mod text;

use serde::{Deserialize, Serialize};

use super::bound::{self, Bound};
use super::memory::Memory;
use super::predict::predict;
use super::problem::{Infeasible, Problem};
use super::{Plan, Prepared, Recompute, ScheduleKind, ShardPlan};
use crate::graph::{Model, Split};
use crate::topology::Topology;
use crate::units::{Bytes, Seconds};

pub use shares::{Share, Shares, Unexplained};

/// Memory that is added to each device to see what more would bring.
const MORE_MEMORY: Bytes = Bytes(10 << 30);
/// A change that gains less than this share of a step gains nothing.
const LEAST_GAIN: f64 = 0.01;

/// A plan, explained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub model: String,
    /// By shard: its devices.
    pub devices: Vec<String>,
    pub n_microbatches: u32,
    pub microbatch: u64,
    /// What of the bundle is split first.
    pub split: Vec<Split>,
    /// By the figures of these devices; what the plan file says may come from others.
    pub shares: Shares,
    pub bound: Bound,
    /// The op behind the bound's path.
    pub bound_op: Option<String>,
    /// By shard.
    pub memory: Vec<Room>,
    /// By shard: what it computes again, and what it would need if it did not; `None` where it keeps all.
    #[serde(default)]
    pub recompute: Vec<Option<Spared>>,
    /// What planning again for these devices finds; the plan's own step where that is no better.
    pub again: Seconds,
    /// What would gain most if it were gone; `None` where neither memory nor links cost anything.
    pub binds: Option<Binding>,
    /// The fastest plan of another kind.
    pub next: Option<Alternative>,
    /// What more of something would bring.
    pub more: Vec<More>,
}

/// Memory of a shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Room {
    pub needs: Bytes,
    pub has: Bytes,
    pub parts: Memory,
}

/// What computing forward values again takes and spares.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spared {
    /// Computing per step that would not be.
    pub time: Seconds,
    /// What the shard would need at least.
    pub needs_otherwise: Bytes,
}

/// A constraint, by the step that the planner finds without it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Binding {
    pub constraint: Constraint,
    pub step_without: Seconds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Constraint {
    Memory,
    Links,
}

/// Another choice than the plan's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Alternative {
    pub choice: Choice,
    pub step: Seconds,
    /// Seconds that it has more than the plan, of a mean device: these add up to the difference of the steps.
    pub more: Share,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Choice {
    /// The same kind of plan with other cuts or devices.
    OtherCuts,
    /// Rows of a microbatch.
    Microbatch(u64),
    Schedule(ScheduleKind),
    Shards(u32),
    /// No shard computes forward values again.
    KeepAll,
}

/// What the planner finds with more of something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct More {
    pub of: Resource,
    /// The predicted step, or why there is no plan.
    pub found: Result<Seconds, Infeasible>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Resource {
    /// One more device, for each replica, like the one of the slowest shard.
    Device { like: String },
    /// Twice the bandwidth of every link.
    Bandwidth,
    /// So much more on each device.
    Memory { more: Bytes },
}

/// An explanation where there is no room for tables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Short {
    /// What limits the step.
    pub limit: String,
    /// Which constraint binds.
    pub binds: String,
    /// The next best plan, and where it loses.
    pub next: String,
    /// What more of something would bring.
    pub more: Vec<String>,
}

/// Explains a plan on devices.
///
/// # Errors
/// [`Unexplained`].
/// # Complexity
/// That of at most fifteen calls of [`solve`](super::solve()).
pub fn explain(model: &Model, topology: &Topology, plan: &Plan) -> Result<Explanation, Unexplained> {
    explained(&Prepared::new(model), model, topology, plan)
}

/// What [`explain`] says, sooner: by a planner that knows the model.
///
/// # Errors
/// [`Unexplained`].
pub fn explained(
    prepared: &Prepared,
    model: &Model,
    topology: &Topology,
    plan: &Plan,
) -> Result<Explanation, Unexplained> {
    let known = prepared.costs();
    let n_shards = plan.shards.len() as u32;
    let problem = Problem {
        n_replicas: plan.n_replicas,
        schedule: Some(plan.schedule),
        aim: plan.aim,
        fixed: &plan.fixed,
        ..Problem::new(model, topology, n_shards)
    };
    let shares = Shares::of(model, topology, plan, known)?;
    let known_bound = bound::bound(&problem, prepared.work()).map_err(|_| Unexplained::Empty)?;
    let devices = |s: &ShardPlan| {
        s.devices.iter().map(|d| topology.devices[d.index()].name.as_str()).collect::<Vec<_>>().join("+")
    };
    let bound_op = known_bound.op.and_then(|op| {
        let of_size = model.grads.iter().find(|g| g.microbatch == known_bound.microbatch);
        Some(of_size?.graph.op(op).name.clone())
    });
    let predicted = predict(model, topology, plan, known).map_err(Unexplained::Update)?;
    let recompute = spared(model, topology, plan, prepared, &predicted.busy)?;
    let memory = rooms(topology, plan, predicted.memory);
    let slowest = plan.shards[shares.slowest()].devices[0];
    let again = prepared.solve(&problem, None).map_or(shares.step, |found| found.step_time.min(shares.step));
    let freed = |constraint: Constraint| {
        let topology = without(topology, constraint);
        let found = prepared.solve(&Problem { topology: &topology, ..problem }, None).ok()?;
        Some(Binding { constraint, step_without: found.step_time })
    };
    let gains = |b: &Binding| b.step_without.0 < (1.0 - LEAST_GAIN) * again.0;
    let binds = [Constraint::Memory, Constraint::Links].into_iter().filter_map(freed).filter(gains);
    let binds = binds.min_by(|a, b| a.step_without.0.total_cmp(&b.step_without.0));
    let mut more = Vec::new();
    let mut ask = |of: Resource, problem: Problem<'_>| {
        let found = prepared.solve(&problem, None).map(|plan| plan.step_time);
        more.push(More { of, found });
    };
    let larger = with_devices_like(topology, slowest.index(), n_shards as usize, plan.n_replicas as usize);
    let like = topology.devices[slowest.index()].name.clone();
    ask(Resource::Device { like }, Problem { topology: &larger, n_shards: n_shards + 1, ..problem });
    let faster = with_wider_links(topology, 2.0);
    ask(Resource::Bandwidth, Problem { topology: &faster, ..problem });
    let mut roomier = topology.clone();
    roomier.devices.iter_mut().for_each(|d| d.memory += MORE_MEMORY);
    ask(Resource::Memory { more: MORE_MEMORY }, Problem { topology: &roomier, ..problem });
    let next = next_best(&problem, plan, &shares, prepared);
    Ok(Explanation {
        model: model.manifest.name.clone(),
        devices: plan.shards.iter().map(devices).collect(),
        n_microbatches: plan.n_microbatches,
        microbatch: plan.microbatch,
        split: plan.split.clone(),
        shares,
        bound: known_bound,
        bound_op,
        memory,
        recompute,
        again,
        binds,
        next,
        more,
    })
}

fn rooms(topology: &Topology, plan: &Plan, memory: Vec<Memory>) -> Vec<Room> {
    let has = |d: &crate::topology::DeviceId| topology.devices[d.index()].memory;
    let room = |(parts, shard): (Memory, &ShardPlan)| Room {
        needs: parts.total(),
        has: shard.devices.iter().map(has).min().unwrap_or_default(),
        parts,
    };
    memory.into_iter().zip(&plan.shards).map(room).collect()
}

/// By shard: what computing again takes and spares. `busy`: of the plan.
fn spared(
    model: &Model,
    topology: &Topology,
    plan: &Plan,
    prepared: &Prepared,
    busy: &[Seconds],
) -> Result<Vec<Option<Spared>>, Unexplained> {
    if !plan.shards.iter().any(|s| s.recompute) {
        return Ok(vec![None; plan.shards.len()]);
    }
    let mut kept = plan.clone();
    kept.shards.iter_mut().for_each(|s| s.recompute = false);
    // Where there is no room to spare, nothing is set aside, and orders are those that need least.
    let mut full = topology.clone();
    full.devices.iter_mut().for_each(|d| d.memory = Bytes(0));
    let kept = predict(model, &full, &kept, prepared.costs());
    let kept = kept.map_err(Unexplained::Update)?;
    let of = |s: usize| Spared { time: busy[s] - kept.busy[s], needs_otherwise: kept.memory[s].total() };
    Ok(plan.shards.iter().enumerate().map(|(s, shard)| shard.recompute.then(|| of(s))).collect())
}

/// The devices with one constraint taken away.
fn without(topology: &Topology, constraint: Constraint) -> Topology {
    let mut free = topology.clone();
    match constraint {
        Constraint::Memory => free.devices.iter_mut().for_each(|d| d.memory = Bytes(u64::MAX)),
        Constraint::Links => {
            free = with_wider_links(topology, 1e9);
            [&mut free.local, &mut free.remote].into_iter().for_each(|link| link.latency = Seconds(0.0));
        }
    }
    free
}

/// So many times the bandwidth of every link and NIC.
fn with_wider_links(topology: &Topology, times: f64) -> Topology {
    let mut wider = topology.clone();
    [&mut wider.local, &mut wider.remote].into_iter().for_each(|link| link.bandwidth = link.bandwidth * times);
    wider.devices.iter_mut().for_each(|d| d.nic = d.nic.map(|nic| nic * times));
    wider
}

/// One more device behind those of each replica.
fn with_devices_like(topology: &Topology, like: usize, n_shards: usize, n_replicas: usize) -> Topology {
    let mut devices: Vec<usize> = (0..topology.devices.len()).collect();
    for replica in (0..n_replicas).rev() {
        let at = ((replica + 1) * n_shards).min(devices.len());
        devices.insert(at, like);
    }
    topology.of(&devices)
}

/// The fastest plan that differs in one choice.
fn next_best(problem: &Problem<'_>, plan: &Plan, shares: &Shares, prepared: &Prepared) -> Option<Alternative> {
    let sizes = problem.microbatches().unwrap_or_default().into_iter().map(|(size, _)| size);
    let sizes = sizes.filter(|&size| size != plan.microbatch).map(Choice::Microbatch);
    let others = ScheduleKind::ALL.into_iter().filter(|s| *s != plan.schedule).map(Choice::Schedule);
    let fewer = (problem.n_shards > 1).then(|| Choice::Shards(problem.n_shards - 1));
    let kept = plan.shards.iter().any(|s| s.recompute).then_some(Choice::KeepAll);
    let choices = sizes.chain([Choice::OtherCuts]).chain(others).chain(fewer).chain(kept);
    let found = choices.filter_map(|choice| {
        let mut asked = Problem { microbatch: Some(plan.microbatch), ..*problem };
        match choice {
            Choice::OtherCuts => {}
            Choice::Microbatch(size) => asked.microbatch = Some(size),
            Choice::Schedule(schedule) => asked.schedule = Some(schedule),
            Choice::Shards(n) => asked.n_shards = n,
            Choice::KeepAll => asked.aim.recompute = Recompute::Never,
        }
        let found = prepared.solve(&asked, None).ok()?;
        let same = found.grads == plan.grads
            && found.orders == plan.orders
            && found.shards.len() == plan.shards.len()
            && found.recomputes() == plan.recomputes();
        if same {
            return None;
        }
        let other = Shares::of(problem.model, problem.topology, &found, prepared.costs()).ok()?;
        let (a, b) = (other.mean(), shares.mean());
        let more = Share {
            computing: a.computing - b.computing,
            updating: a.updating - b.updating,
            receiving: a.receiving - b.receiving,
            waiting: a.waiting - b.waiting,
        };
        Some(Alternative { choice, step: other.step, more })
    });
    found.min_by(|a, b| a.step.0.total_cmp(&b.step.0))
}
