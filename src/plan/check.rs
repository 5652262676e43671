//! Whether a plan from outside fits a model: everything that later stages take for granted.

use std::collections::BTreeSet;

use super::schedule::{ScheduleError, TaskGraph};
use super::segment::SegmentError;
use super::{Place, Plan};
use crate::graph::Model;
use crate::units::Seconds;

/// What does not fit.
#[derive(Debug, thiserror::Error)]
pub enum Misfit {
    #[error("it was made for a model with fingerprint {found}, this one has {expected}")]
    OtherModel { found: String, expected: String },
    #[error("{field}: {found}, expected {expected}")]
    Field { field: String, found: String, expected: String },
    #[error("{field} names shard {found}, the plan has {n_shards}")]
    NoSuchShard { field: String, found: u32, n_shards: usize },
    #[error("shard {shard} runs no op and owns no param; give it some or leave it out")]
    EmptyShard { shard: usize },
    #[error("variant {variant} cannot be cut")]
    Segment { variant: String, source: SegmentError },
    #[error("orders of variant {variant}")]
    Schedule { variant: String, source: ScheduleError },
}

/// Checks a plan against the model it is to run.
///
/// # Errors
/// The first [`Misfit`]: field, value and what was expected.
/// # Complexity
/// O(ops · log ops + tasks).
pub fn check(plan: &Plan, model: &Model) -> Result<(), Misfit> {
    let wrong =
        |field: &str, found: String, expected: String| Misfit::Field { field: field.to_owned(), found, expected };
    if plan.model != model.fingerprint {
        return Err(Misfit::OtherModel { found: plan.model.clone(), expected: model.fingerprint.clone() });
    }
    let n_shards = plan.shards.len();
    if n_shards == 0 || plan.n_replicas == 0 || plan.n_microbatches == 0 {
        let found = format!("{n_shards}, {}, {}", plan.n_replicas, plan.n_microbatches);
        return Err(wrong("shards, n_replicas, n_microbatches", found, "at least 1 each".to_owned()));
    }
    let mut taken = BTreeSet::new();
    for (i, shard) in plan.shards.iter().enumerate() {
        if let Some(twice) = shard.devices.iter().find(|d| !taken.insert(**d)) {
            let found = format!("device {} again", twice.0);
            return Err(wrong(&format!("shards[{i}].devices"), found, "each device once".to_owned()));
        }
        if shard.devices.len() != plan.n_replicas as usize {
            let expected = format!("{}, one for each replica", plan.n_replicas);
            return Err(wrong(&format!("shards[{i}].devices"), shard.devices.len().to_string(), expected));
        }
    }
    let rows = plan.microbatch.saturating_mul(u64::from(plan.n_microbatches) * u64::from(plan.n_replicas));
    if rows != model.manifest.batch_size {
        let found = format!("{} × {} × {}", plan.microbatch, plan.n_microbatches, plan.n_replicas);
        let expected = format!("a product of {}, the rows of a batch", model.manifest.batch_size);
        return Err(wrong("microbatch × n_microbatches × n_replicas", found, expected));
    }
    if plan.owners.len() != model.state.len() {
        return Err(wrong("owners", plan.owners.len().to_string(), model.state.len().to_string()));
    }
    for (i, owner) in plan.owners.iter().enumerate() {
        in_range(&format!("owners[{i}]"), *owner, n_shards)?;
        if *owner == Place::Everywhere && i < model.n_params {
            return Err(wrong(
                &format!("owners[{i}]"),
                "everywhere".to_owned(),
                "a shard: params have one owner".to_owned(),
            ));
        }
    }
    let expected: Vec<&str> =
        model.grads.iter().filter(|g| g.microbatch == plan.microbatch).map(|g| g.name.as_str()).collect();
    let mut names: Vec<&str> = plan.grads.keys().map(String::as_str).collect();
    names.sort_unstable();
    let mut sorted = expected.clone();
    sorted.sort_unstable();
    if names != sorted || expected.is_empty() {
        return Err(wrong("grads", format!("{names:?}"), format!("{sorted:?}, the variants of this microbatch size")));
    }
    let mut used = vec![false; n_shards];
    for (name, assignment) in &plan.grads {
        let graph = &model.variant(name).expect("compared above").graph;
        if assignment.0.len() != graph.n_ops() {
            let found = format!("{} ops", assignment.0.len());
            return Err(wrong(&format!("grads.{name}"), found, format!("{} ops", graph.n_ops())));
        }
        for (i, &place) in assignment.0.iter().enumerate() {
            in_range(&format!("grads.{name}[{i}]"), place, n_shards)?;
            if let Place::Shard(s) = place {
                used[s.index()] = true;
            }
        }
        let failed = |source| Misfit::Segment { variant: name.clone(), source };
        let cut = plan.cut(model, graph, assignment).map_err(failed)?;
        let orders = plan.orders.get(name).cloned().unwrap_or_default();
        let unit = vec![Seconds(1.0); cut.segments.len()];
        let tasks = TaskGraph::new(graph, &cut, n_shards, &unit, |_, _| Seconds(0.0));
        let bad = |source| Misfit::Schedule { variant: name.clone(), source };
        tasks.replay(&orders, plan.n_microbatches).map_err(bad)?;
    }
    match used.iter().position(|u| !u) {
        Some(shard) => Err(Misfit::EmptyShard { shard }),
        None => Ok(()),
    }
}

fn in_range(field: &str, place: Place, n_shards: usize) -> Result<(), Misfit> {
    match place {
        Place::Shard(s) if s.index() >= n_shards => {
            Err(Misfit::NoSuchShard { field: field.to_owned(), found: s.0, n_shards })
        }
        _ => Ok(()),
    }
}
