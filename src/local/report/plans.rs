//! The plans of a run in the order in which they were in force.

use std::collections::BTreeSet;
use std::path::Path;

use super::events::Events;
use super::headline::clock;
use super::log::Log;
use super::page::Page;
use super::{Run, why};
use crate::plan::{Plan, ShardPlan};
use crate::units::Seconds;

/// Pictures in a page: the first one and the last ones.
const MAX_PICTURES: usize = 20;

/// A plan that was in force.
pub struct Revision {
    number: u64,
    /// First step, and when.
    since: Option<(u64, f64)>,
    why: String,
    plan: Option<Plan>,
    picture: Option<String>,
}

pub fn read(directory: &Path, log: &Log, events: &Events, faults: &mut Vec<String>) -> Vec<Revision> {
    let mut all: Vec<Revision> = Vec::new();
    let mut known = BTreeSet::new();
    let mut add = |number: u64, since: Option<(u64, f64)>, why: String| {
        if known.insert(number) {
            all.push(Revision { number, since, why, plan: None, picture: None });
        }
    };
    let mut before = None;
    for step in &log.steps {
        if before == Some(step.revision) {
            continue;
        }
        let moved = events.of("cutover").find(|e| e.revision == step.revision);
        let restarted = events.of("restart").find(|e| e.incarnation == Some(step.incarnation));
        let why = match (moved, restarted) {
            (Some(e), _) => e.why.clone().unwrap_or_default(),
            (None, Some(e)) => format!("after a restart: {}", e.why.as_deref().unwrap_or("")),
            _ if before.is_none() => "the plan the run began with".to_owned(),
            _ => String::new(),
        };
        add(step.revision, Some((step.step, moved.map_or(step.begin(), |e| e.seconds))), why);
        before = Some(step.revision);
    }
    for e in events.of("cutover") {
        add(e.revision, Some((e.at.unwrap_or(e.step), e.seconds)), e.why.clone().unwrap_or_default());
    }
    if all.is_empty() && directory.join("plans/plan-1.json").exists() {
        all.push(Revision {
            number: 1,
            since: None,
            why: "no step was finished".to_owned(),
            plan: None,
            picture: None,
        });
    }
    let n = all.len();
    for (_, revision) in all.iter_mut().enumerate().filter(|(i, _)| is_shown(*i, n)) {
        let name = |end: &str| format!("plans/plan-{}.{end}", revision.number);
        let mut text = |name: &str| {
            let text = std::fs::read_to_string(directory.join(name));
            text.map_err(|e| faults.push(format!("{name}: {}", why(&e)))).ok()
        };
        revision.picture = text(&name("svg"));
        if let Some(json) = text(&name("json")) {
            match serde_json::from_str(&json) {
                Ok(plan) => revision.plan = Some(plan),
                Err(e) => faults.push(format!("{}: cannot be read ({e})", name("json"))),
            }
        }
    }
    all
}

fn is_shown(i: usize, n: usize) -> bool {
    i == 0 || n - i < MAX_PICTURES
}

pub fn show(page: &mut Page, run: &Run) {
    page.section("Plans");
    let n = run.revisions.len();
    if n == 0 {
        return page.missing("No plan was in force.");
    }
    for (i, revision) in run.revisions.iter().enumerate() {
        if !is_shown(i, n) {
            if i == 1 {
                page.missing(&format!("{} plans that came next are not shown.", n - MAX_PICTURES));
            }
            continue;
        }
        let since = revision.since.map(|(step, time)| format!(", from step {step} at {}", clock(time)));
        page.heading(&format!("Revision {}{}", revision.number, since.unwrap_or_default()));
        if !revision.why.is_empty() {
            page.text(&format!("Why: {}", revision.why));
        }
        let (n_steps, median) = run.log.under(revision.number);
        if let Some(median) = median {
            let predicted = revision.plan.as_ref().map(|p| format!(", {} was predicted before it ran", p.step_time));
            page.text(&format!(
                "{n_steps} steps, {} each in the median{}.",
                Seconds(median),
                predicted.unwrap_or_default()
            ));
        }
        let description = match &revision.plan {
            Some(p) => {
                let of_shard = |(i, s): (usize, &ShardPlan)| {
                    let again = if s.recompute { ", computes forward values again" } else { "" };
                    format!("shard {i} {} busy{again}", s.busy)
                };
                let shards: Vec<String> = p.shards.iter().enumerate().map(of_shard).collect();
                format!(
                    "{} shards, {} replicas, microbatches of {} rows: step {} predicted; {}",
                    p.shards.len(),
                    p.n_replicas,
                    p.microbatch,
                    p.step_time,
                    shards.join(", ")
                )
            }
            None => format!("the plan of revision {}", revision.number),
        };
        match &revision.picture {
            Some(svg) => page.picture(svg, &description),
            None if revision.plan.is_some() => page.missing(&format!("Its picture is missing. {description}.")),
            None => page.missing("Its files are missing."),
        }
    }
}
