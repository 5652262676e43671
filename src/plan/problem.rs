//! What is asked of the planner, and why it may say no.

use serde::{Deserialize, Serialize};

use super::aim::Cost;
use super::{Aim, Fixed, GAIN, Plan, ScheduleKind};
use crate::graph::{GradGraph, Model, Split};
use crate::topology::{Measured, Topology};
use crate::units::{Bytes, Seconds};

/// Every microbatch of a step is scheduled by itself.
const MAX_MICROBATCHES: u64 = 1 << 16;

/// A model, devices, and the shape of the plan that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    pub model: &'a Model,
    /// Replica `r` of shard `s` gets one of devices `r · n_shards ..`.
    pub topology: &'a Topology,
    pub n_shards: u32,
    pub n_replicas: u32,
    /// Rows of a microbatch; the fastest one that fits when absent.
    pub microbatch: Option<u64>,
    /// The one whose plan is best when absent.
    pub schedule: Option<ScheduleKind>,
    pub aim: Aim,
    pub fixed: &'a Fixed,
}

impl<'a> Problem<'a> {
    /// One copy of the model over the first so many devices; all else is left to the planner.
    pub fn new(model: &'a Model, topology: &'a Topology, n_shards: u32) -> Self {
        let (n_replicas, microbatch, schedule) = (1, None, None);
        let (aim, fixed) = (Aim::default(), Fixed::none());
        Self { model, topology, n_shards, n_replicas, microbatch, schedule, aim, fixed }
    }
}

/// A problem without a plan: which limit it meets, and the way out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Infeasible {
    #[error("a plan needs at least one shard and one replica, found {n_shards} and {n_replicas}")]
    Nothing { n_shards: u32, n_replicas: u32 },
    #[error(
        "{n_shards} shards in {n_replicas} replicas need {} devices, there are {n_devices}; ask for fewer shards or name more devices",
        u64::from(*n_shards) * u64::from(*n_replicas)
    )]
    TooFewDevices { n_shards: u32, n_replicas: u32, n_devices: usize },
    #[error("device {device}: {field} is {found}, expected {expected}; measure it again or leave the device out")]
    Device { device: String, field: String, found: String, expected: String },
    #[error(
        "links {which}: {field} is {found}, expected {expected}; give all devices one node or links that can be used"
    )]
    Link { which: String, field: String, found: String, expected: String },
    #[error("the model can be cut into at most {n_parts} parts, {n_shards} shards were asked for")]
    TooFewOps { n_shards: u32, n_parts: usize },
    #[error(
        "the model has {n_layers} layers (named scopes, as foreshard graph lists them), {n_shards} shards of whole ones were asked for; take at most {n_layers} shards, or spec.partition.granularity: sublayer"
    )]
    TooFewLayers { n_shards: u32, n_layers: usize },
    #[error(
        "no microbatch of {} rows in {n_replicas} replicas: {} {known:?} rows, the global batch has {batch_size}; export the bundle with the size you need",
        asked.map_or("any number of".to_owned(), |m| m.to_string()),
        match parts {
            None => "the bundle has microbatches of".to_owned(),
            Some(parts) => format!("the bundle has microbatches that can be split into {parts} parts of"),
        }
    )]
    NoMicrobatch {
        asked: Option<u64>,
        n_replicas: u32,
        known: Vec<u64>,
        batch_size: u64,
        /// Into so many parts rows are split: smaller microbatches are left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parts: Option<u32>,
    },
    #[error(
        "{found} microbatches per step and replica, the limit is {MAX_MICROBATCHES}; export the bundle with larger microbatches"
    )]
    TooManyMicrobatches { found: u64 },
    #[error(
        "no plan makes {floor} steps a second: the fastest, with {n_shards} shards, makes {:.3}; ask for fewer or name more devices",
        1.0 / step.0
    )]
    Floor { floor: f64, n_shards: u32, step: Seconds },
    #[error(
        "the plan that was found does not hold: {why}; this is an error of Foreshard, please report it with the bundle's manifest and the devices"
    )]
    Unsound { why: String },
    #[error("{wish} cannot be: {why}; change that, or leave it to the planner")]
    Fixed { wish: String, why: String },
    #[error("{n_cuts} cuts make {} shards, {n_shards} were asked for", n_cuts + 1)]
    CutCount { n_cuts: usize, n_shards: u32 },
    #[error("no block {name:?} to cut at; the model has {known:?}{hint}")]
    NoSuchBlock { name: String, known: Vec<String>, hint: String },
    #[error("a cut at {name:?} leaves nothing before it; name blocks in the order of the model, each once: {known:?}")]
    CutOrder { name: String, known: Vec<String> },
    #[error(
        "{what} needs {needs}, the largest device, {device}, has {has}; give one worker {needs} or more{}",
        or_split(split)
    )]
    Indivisible {
        what: String,
        needs: Bytes,
        device: String,
        has: Bytes,
        /// With this split the same number of shards fits.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        split: Vec<Split>,
    },
    #[error(
        "shard {shard} needs {needs}, device {device} has {has}; {}{}{}",
        way_out(*enough, *shards),
        or_split(split),
        if *recompute { ", or let it compute forward values again: spec.partition.recompute: auto" } else { "" }
    )]
    Memory {
        shard: u32,
        n_shards: u32,
        needs: Bytes,
        device: String,
        has: Bytes,
        /// With so much on every device the same number of shards fits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        enough: Option<Bytes>,
        /// So many shards fit on devices like the largest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shards: Option<u32>,
        /// With this split the same number of shards fits.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        split: Vec<Split>,
        /// It was asked for that no shard computes again, and the same number of shards that may do so fits.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        recompute: bool,
    },
}

fn or_split(split: &[Split]) -> String {
    if split.is_empty() {
        return String::new();
    }
    let splits: Vec<String> = split.iter().map(ToString::to_string).collect();
    format!(", or split it: spec.partition.split: [{}]", splits.join(", "))
}

fn way_out(enough: Option<Bytes>, shards: Option<u32>) -> String {
    match (enough, shards) {
        (Some(enough), Some(n)) => format!("give every worker {enough}, or take {n} shards"),
        (Some(enough), None) => format!("give every worker {enough}: more shards alone do not help"),
        (None, Some(n)) => format!("take {n} shards"),
        (None, None) => "try a smaller microbatch or the 1F1B schedule".to_owned(),
    }
}

/// Figures of devices and links: times made of these are numbers.
const LEAST: f64 = 1e-30;
const MOST: f64 = 1e30;

/// Whether a figure can be true; if not, what it is and what was expected.
fn figure(value: f64, positive: bool) -> Result<(), (String, String)> {
    let good = if positive { (LEAST..=MOST).contains(&value) } else { (0.0..=MOST).contains(&value) };
    let expected = if positive { "a positive number, 1e-30 to 1e30" } else { "a number, at least 0 and at most 1e30" };
    if good { Ok(()) } else { Err((value.to_string(), expected.to_owned())) }
}

fn check_figures(topology: &Topology) -> Result<(), Infeasible> {
    for d in &topology.devices {
        let Measured { product, memory, other, launch } = d.measured.unwrap_or_default();
        let figures = [
            ("flops", d.flops.0, true),
            ("bandwidth", d.bandwidth.0, true),
            ("overhead", d.overhead.0, false),
            ("speed", d.speed, true),
            ("price", d.price, false),
            ("measured.product", product, false),
            ("measured.memory", memory, false),
            ("measured.other", other, false),
            ("measured.launch", launch, false),
            ("nic", d.nic.map_or(MOST, |nic| nic.0), true),
        ];
        for (field, value, positive) in figures {
            figure(value, positive).map_err(|(found, expected)| Infeasible::Device {
                device: d.name.clone(),
                field: field.to_owned(),
                found,
                expected,
            })?;
        }
    }
    // Links that join nothing may be anything.
    let mut nodes: Vec<&str> = topology.devices.iter().map(|d| d.node.as_str()).collect();
    nodes.sort_unstable();
    let together = nodes.windows(2).any(|w| w[0] == w[1]);
    nodes.dedup();
    let links = [("within a node", topology.local, together), ("between nodes", topology.remote, nodes.len() > 1)];
    for (which, link, _) in links.into_iter().filter(|(_, _, used)| *used) {
        for (field, value, positive) in [("bandwidth", link.bandwidth.0, true), ("latency", link.latency.0, false)] {
            figure(value, positive).map_err(|(found, expected)| Infeasible::Link {
                which: which.to_owned(),
                field: field.to_owned(),
                found,
                expected,
            })?;
        }
    }
    for slowed in &topology.slowed {
        let [a, b] = slowed.between.map(|d| topology.devices.get(d.index()));
        let Some((a, b)) = a.zip(b) else { continue };
        if !(LEAST..=1.0).contains(&slowed.share) {
            return Err(Infeasible::Link {
                which: format!("between devices {} and {}", a.name, b.name),
                field: "share".to_owned(),
                found: slowed.share.to_string(),
                expected: "a positive number, at most 1".to_owned(),
            });
        }
    }
    Ok(())
}

impl<'a> Problem<'a> {
    /// Whether there is a device for every shard of every replica, and what is known of devices and links can be true.
    pub fn check_devices(&self) -> Result<(), Infeasible> {
        let &Self { n_shards, n_replicas, .. } = self;
        if n_shards == 0 || n_replicas == 0 {
            return Err(Infeasible::Nothing { n_shards, n_replicas });
        }
        let n_devices = self.topology.devices.len();
        match (n_shards as usize).saturating_mul(n_replicas as usize) > n_devices {
            true => Err(Infeasible::TooFewDevices { n_shards, n_replicas, n_devices }),
            false => check_figures(self.topology),
        }
    }

    /// What a plan for it costs.
    pub fn cost(&self, plan: &Plan) -> Cost {
        self.aim.objective.cost(self.topology, plan)
    }

    /// Whether a plan is enough better than one that is plainer, or nearer to the plan in force.
    pub(super) fn prefers(&self, plan: &Plan, than: &Plan) -> bool {
        self.cost(plan).is_below(GAIN, self.cost(than))
    }

    /// The schedule of its plans; where none is asked for, the plain one.
    pub fn kind(&self) -> ScheduleKind {
        self.schedule.unwrap_or_default()
    }

    /// The best plan by `solve`, which takes problems with a schedule: of the schedules that may be used, the one with the
    /// best plan. One that is hardly better is not worth more messages or memory.
    pub(super) fn with_each_schedule<F>(&self, go_on: &dyn Fn() -> bool, solve: F) -> Result<Plan, Infeasible>
    where
        F: Fn(&Self) -> Result<Plan, Infeasible>,
    {
        let of = |schedule| solve(&Self { schedule: Some(schedule), ..*self });
        let mut best = of(self.kind());
        // One shard has no pipeline.
        if self.schedule.is_some() || self.n_shards < 2 {
            return best;
        }
        for schedule in ScheduleKind::ALL.into_iter().filter(|s| *s != self.kind()) {
            if best.is_ok() && !go_on() {
                break;
            }
            match (&best, of(schedule)) {
                (Ok(known), Ok(found)) if !self.prefers(&found, known) => {}
                (_, Ok(found)) => best = Ok(found),
                (_, Err(_)) => {}
            }
        }
        best
    }

    /// Microbatch sizes the plan may use, with their variants: those that give every replica whole microbatches.
    pub fn microbatches(&self) -> Result<Vec<(u64, Vec<&'a GradGraph>)>, Infeasible> {
        let batch_size = self.model.manifest.batch_size;
        let mut known: Vec<u64> = self.model.grads.iter().map(|g| g.microbatch).collect();
        known.sort_unstable();
        known.dedup();
        let mut usable: Vec<_> = known
            .iter()
            .copied()
            .filter(|&m| self.microbatch.is_none_or(|asked| asked == m))
            .filter(|&m| batch_size.is_multiple_of(m.saturating_mul(self.n_replicas.into())))
            .map(|m| (m, self.model.grads.iter().filter(|g| g.microbatch == m).collect()))
            .collect();
        if usable.is_empty() {
            let (asked, n_replicas) = (self.microbatch, self.n_replicas);
            let of_rows = self.model.split.iter().filter(|s| matches!(s, Split::Rows { .. }));
            let parts = of_rows.map(Split::parts).max();
            return Err(Infeasible::NoMicrobatch { asked, n_replicas, known, batch_size, parts });
        }
        let per_replica = |m: u64| batch_size / m / u64::from(self.n_replicas);
        let fewest = usable.last().map_or(0, |(m, _)| per_replica(*m));
        usable.retain(|(m, _)| per_replica(*m) <= MAX_MICROBATCHES);
        if usable.is_empty() {
            return Err(Infeasible::TooManyMicrobatches { found: fewest });
        }
        Ok(usable)
    }
}
