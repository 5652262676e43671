//! What people have fixed of a plan: ops that run on a certain shard or device, and ops that stay on one shard.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::coordinate::{Coordinates, ancestors};
use super::problem::{Infeasible, Problem};
use super::{Place, Plan};
use crate::graph::error::closest;
use crate::graph::scope::{OTHER, block_of, means};
use crate::graph::split::fits;
use crate::graph::{GradGraph, Model, OpId};

/// Where some ops go, whatever that costs.
///
/// Ops are named by patterns, in which `*` stands for any text. A pattern means the ops of the forward half that have this
/// HLO name, path (as `foreshard graph` shows it) or named scope, and params of this name. What computes a derivative goes
/// with what it is the derivative of, a gradient and an optimizer slot with their param. Small ops that every shard computes
/// for itself are nowhere, and so never in the wrong place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fixed {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<Pin>,
    /// Sets of patterns: all that they mean stays on one shard.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub together: Vec<Vec<String>>,
}

/// Ops, and where they run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    pub ops: String,
    #[serde(flatten)]
    pub to: To,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum To {
    /// The shard at this position.
    Shard(u32),
    /// The shard of this device, by its name.
    Device(String),
}

/// A pin or a set, with the ops that it means.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    /// As it is named where it cannot be.
    name: String,
    pub target: Option<Target>,
    /// By variant.
    ops: Vec<Vec<OpId>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Shard(usize),
    /// Its position within a replica.
    Device(usize),
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            To::Shard(shard) => write!(f, "pin of {:?} to shard {shard}", self.ops),
            To::Device(device) => write!(f, "pin of {:?} to device {device}", self.ops),
        }
    }
}

impl std::str::FromStr for Pin {
    type Err = String;

    /// Reads `OPS:SHARD` or `OPS:DEVICE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.rsplit_once(':').filter(|(ops, to)| !ops.is_empty() && !to.is_empty());
        let (ops, to) = parts.ok_or_else(|| format!("{text:?} is not OPS:SHARD or OPS:DEVICE, as in block3:1"))?;
        let to = to.parse().map_or_else(|_| To::Device(to.to_owned()), To::Shard);
        Ok(Self { ops: ops.to_owned(), to })
    }
}

/// The ops of a graph that a pattern means: see [`Fixed`].
pub(super) fn meant(pattern: &str, model: &Model, variant: &GradGraph) -> Vec<OpId> {
    let graph = &variant.graph;
    let forward = ancestors(graph, &graph.outputs()[..model.n_scalars()]);
    let mut param = vec![None; graph.n_ops()];
    graph.parameters()[..model.n_params].iter().enumerate().for_each(|(p, op)| param[op.index()] = Some(p));
    let is_meant = |id: &OpId| {
        let op = graph.op(*id);
        if let Some(p) = param[id.index()] {
            return fits(pattern, &model.state[p].name);
        }
        forward[id.index()] && &*op.opcode != "parameter" && means(pattern, op)
    };
    graph.ops().map(|(id, _)| id).filter(is_meant).collect()
}

impl Fixed {
    /// Nothing is.
    pub fn none() -> &'static Self {
        static NONE: Fixed = Fixed { pins: Vec::new(), together: Vec::new() };
        &NONE
    }

    pub fn is_none(&self) -> bool {
        self == Self::none()
    }

    /// What is wished, in the order in which it is said.
    ///
    /// # Errors
    /// [`Infeasible::Fixed`] for a pattern without ops, a shard or a device that is not there.
    /// # Complexity
    /// O(patterns · ops).
    pub(super) fn wishes(&self, problem: &Problem<'_>, variants: &[&GradGraph]) -> Result<Vec<Wish>, Infeasible> {
        let model = problem.model;
        let ops = |name: &str, patterns: &[String]| {
            let mut all: Vec<Vec<OpId>> = vec![Vec::new(); variants.len()];
            for pattern in patterns {
                let found: Vec<Vec<OpId>> = variants.iter().map(|v| meant(pattern, model, v)).collect();
                if found.iter().all(Vec::is_empty) {
                    return Err(cannot(
                        name,
                        format!("the model has no op or param {pattern:?}{}", known(pattern, problem, variants)),
                    ));
                }
                all.iter_mut().zip(found).for_each(|(all, found)| all.extend(found));
            }
            Ok(all)
        };
        let mut wishes = Vec::with_capacity(self.pins.len() + self.together.len());
        for pin in &self.pins {
            let name = pin.to_string();
            let target = target(pin, problem).map_err(|why| cannot(&name, why))?;
            let ops = ops(&name, std::slice::from_ref(&pin.ops))?;
            wishes.push(Wish { name, target: Some(target), ops });
        }
        for set in &self.together {
            let name = format!("{set:?} on one shard");
            let ops = ops(&name, set)?;
            wishes.push(Wish { name, target: None, ops });
        }
        Ok(wishes)
    }

    /// Whether a plan has everything where it is wished.
    ///
    /// # Errors
    /// [`Infeasible::Fixed`] with the first wish that is not met.
    pub(super) fn check(&self, problem: &Problem<'_>, plan: &Plan) -> Result<(), Infeasible> {
        if self.is_none() {
            return Ok(());
        }
        let variants: Vec<&GradGraph> = plan.grads.keys().filter_map(|v| problem.model.variant(v)).collect();
        self.wishes(problem, &variants)?.iter().try_for_each(|wish| wish.check(&variants, plan))
    }
}

impl Wish {
    /// Where its ops stand on the line of a variant: the first and the last coordinate. `None` where all of them are
    /// computed everywhere.
    pub fn range(&self, variant: usize, line: &Coordinates) -> Option<(u32, u32)> {
        let mut at = self.ops[variant].iter().filter_map(|op| line.of[op.index()]);
        let first = at.next()?;
        Some(at.fold((first, first), |(least, most), at| (least.min(at), most.max(at))))
    }

    /// `variants`: those it was made for.
    pub fn check(&self, variants: &[&GradGraph], plan: &Plan) -> Result<(), Infeasible> {
        let mut on = None;
        for (variant, ops) in variants.iter().zip(&self.ops) {
            let Some(assignment) = plan.grads.get(&variant.name) else { continue };
            for shard in ops.iter().filter_map(|op| match assignment.place(*op) {
                Place::Shard(shard) => Some(shard.index()),
                Place::Everywhere => None,
            }) {
                let first = *on.get_or_insert(shard);
                if first != shard {
                    return Err(
                        self.cannot(format!("a part of it would be on shard {first} and a part on shard {shard}"))
                    );
                }
            }
        }
        let n = plan.shards.len().max(1);
        let is_there = |shard: usize| match self.target {
            None => true,
            Some(Target::Shard(wished)) => wished == shard,
            Some(Target::Device(device)) => plan.shards[shard].devices.first().is_some_and(|d| d.index() % n == device),
        };
        match on.filter(|shard| !is_there(*shard)) {
            Some(shard) => Err(self.cannot(format!("it would be on shard {shard}"))),
            None => Ok(()),
        }
    }

    pub fn cannot(&self, why: String) -> Infeasible {
        cannot(&self.name, why)
    }
}

fn cannot(wish: &str, why: String) -> Infeasible {
    Infeasible::Fixed { wish: wish.to_owned(), why }
}

fn target(pin: &Pin, problem: &Problem<'_>) -> Result<Target, String> {
    let n = problem.n_shards;
    match &pin.to {
        To::Shard(shard) if *shard < n => Ok(Target::Shard(*shard as usize)),
        To::Shard(_) => Err(format!("there are {n} shards, 0 to {}", n.saturating_sub(1))),
        To::Device(name) => {
            let used = (n as usize).saturating_mul(problem.n_replicas as usize);
            let devices = &problem.topology.devices[..used.min(problem.topology.devices.len())];
            match devices.iter().position(|d| d.name == *name) {
                Some(at) => Ok(Target::Device(at % n.max(1) as usize)),
                None => {
                    let hint = closest(name, devices.iter().map(|d| d.name.as_str()));
                    Err(format!("none of the {used} devices that are used has this name{hint}"))
                }
            }
        }
    }
}

/// What a pattern may have meant: the scopes and params of the model.
fn known(pattern: &str, problem: &Problem<'_>, variants: &[&GradGraph]) -> String {
    let params = problem.model.state[..problem.model.n_params].iter().map(|p| p.name.clone());
    let scopes = variants.iter().flat_map(|v| v.graph.ops()).filter_map(|(_, op)| op.scope().map(block_of));
    let names: BTreeSet<String> = params.chain(scopes).filter(|name| name != OTHER).collect();
    closest(pattern, names.iter().map(String::as_str))
}
