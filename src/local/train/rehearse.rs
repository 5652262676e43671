//! Plans that may be wanted one day, compiled while nothing else is to be done: compiling is what takes long in a move,
//! and a core that has become busy is the worst place for it.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, TryRecvError};

use super::background;
use super::propose::same;
use crate::local::inputs::{Ask, Inputs};
use crate::plan::Plan;
use crate::topology::Topology;
use crate::units::Seconds;

/// Speeds of a device that are prepared for, the others being as fast as ever: the most telling first.
const SPEEDS: [f64; 4] = [0.5, 0.75, 0.6, 0.87];
/// Plans that are prepared for at most, and those that are remembered.
const MOST: usize = 8;
const MOST_KNOWN: usize = 16;
/// So long workers compile for later in one go.
pub const SPELL: Seconds = Seconds(4.0);
/// Steps to be seen before each, and before it goes on. Steps beside a compiler say nothing about devices: one that has become
/// slow meanwhile would not be seen if rehearsals followed each other at once, and on a device that has, they take long.
pub const APART: u32 = 10;

/// What is compiled, and what will be.
///
/// Rehearsed plans are made from nominal figures: they come out the same in every run, whose executables then lie on disk.
#[derive(Default)]
pub struct Rehearsals {
    state: State,
    /// Workers of the plans looked for.
    n_workers: usize,
    /// Modules that the one being prepared lacked before.
    under_way: Option<u32>,
    /// Steps seen since the last one.
    seen: u32,
    /// Plans whose executables are on disk, the latest last.
    known: Vec<Plan>,
}

/// What has come of preparing a plan for later.
pub struct Rehearsed {
    pub plan: Plan,
    pub prepared: Seconds,
    /// Modules, on all workers, and those that it did not come to.
    pub compiled: u32,
    pub left: u32,
}

#[derive(Default)]
enum State {
    #[default]
    Fresh,
    Solving(Receiver<Vec<Plan>>),
    /// With the modules that each still lacks, as far as that is known.
    Waiting(VecDeque<(Plan, u32)>),
}

fn waiting(plans: Vec<Plan>) -> State {
    State::Waiting(plans.into_iter().map(|plan| (plan, u32::MAX)).collect())
}

impl Rehearsals {
    pub fn known(&self) -> &[Plan] {
        &self.known
    }

    /// This plan has been prepared.
    pub fn add(&mut self, plan: Plan) {
        self.known.retain(|k| !same(k, &plan));
        self.known.push(plan);
        if self.known.len() > MOST_KNOWN {
            self.known.remove(0);
        }
    }

    /// The job has moved. The way back is as short as the way here, also to the first plan, which nobody rehearses.
    pub fn moved(&mut self, from: Plan, to: Plan) {
        self.add(from);
        self.add(to);
    }

    /// The one under way is over, or goes on another time; `None` when it was called off.
    pub fn over(&mut self, rehearsed: Option<Rehearsed>) {
        let before = self.under_way.take();
        self.seen = 0;
        match (rehearsed, &mut self.state) {
            (Some(Rehearsed { plan, left: 0, .. }), _) => self.add(plan),
            // Without room for executables it would come no further, ever.
            (Some(r), State::Waiting(plans)) if before.is_some_and(|before| r.left < before) => {
                plans.push_front((r.plan, r.left));
            }
            _ => {}
        }
    }

    /// A step was taken with nothing beside it.
    pub fn step(&mut self) {
        self.seen = self.seen.saturating_add(1);
    }

    /// The next plan to prepare, if there is one and it is time for it.
    pub fn next(&mut self, inputs: &Inputs, running: &Plan, base: &Topology) -> anyhow::Result<Option<Plan>> {
        let n_workers = running.shards.len() * running.n_replicas as usize;
        if self.n_workers != n_workers {
            (self.state, self.n_workers) = (State::Fresh, n_workers);
        }
        match &mut self.state {
            State::Fresh => {
                let (spec, model) = (inputs.job.spec.clone(), inputs.model.clone());
                let (prepared, running, base) = (inputs.prepared.clone(), running.clone(), base.clone());
                self.state = State::Solving(background("rehearse", move || {
                    let ask = Ask { n_shards: running.shards.len() as u32, microbatch: Some(running.microbatch) };
                    let slow = SPEEDS.iter().flat_map(|s| (0..base.devices.len()).map(move |d| (d, s))).take(MOST);
                    let solve = |(device, speed): (usize, &f64)| {
                        let mut topology = base.clone();
                        topology.devices[device].speed *= speed;
                        ask.solve(&spec, &model, &prepared, &topology, Some(&running)).ok()
                    };
                    slow.filter_map(solve).collect()
                })?);
            }
            State::Solving(plans) => match plans.try_recv() {
                Ok(plans) => self.state = waiting(plans),
                Err(TryRecvError::Disconnected) => self.state = State::Waiting(VecDeque::new()),
                Err(TryRecvError::Empty) => {}
            },
            State::Waiting(_) => return Ok(self.due(running)),
        }
        Ok(None)
    }

    /// The next of the plans that wait, if it is time for one.
    pub fn due(&mut self, running: &Plan) -> Option<Plan> {
        let State::Waiting(plans) = &mut self.state else { return None };
        if self.under_way.is_some() || self.seen < APART {
            return None;
        }
        while let Some((plan, left)) = plans.pop_front() {
            if !same(&plan, running) && !self.known.iter().any(|k| same(k, &plan)) {
                self.under_way = Some(left);
                return Some(plan);
            }
        }
        None
    }

    #[cfg(test)]
    pub fn waiting(plans: Vec<Plan>) -> Self {
        Self { state: waiting(plans), ..Self::default() }
    }
}
