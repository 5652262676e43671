//! What is known of a model before any question: for callers that plan again and again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::line::Line;
use super::outline::Outline;
use crate::graph::{GradGraph, Model};
use crate::plan::bound::Work;
use crate::plan::estimate::Priced;
use crate::plan::predict::{Costs, Cuts, Prediction, predict};
use crate::plan::problem::{Infeasible, Problem};
use crate::plan::segment::SegmentError;
use crate::plan::{Assignment, Place, Plan, ScheduleKind};
use crate::topology::{DeviceId, Topology};

/// A model as the planner knows it, whatever the devices: what each op costs, where it stands along the line, and how the
/// plan in force cuts it.
///
/// # Guarantees
/// Every answer is the one that a fresh value gives; of another model too, though not sooner.
#[derive(Debug)]
pub struct Prepared {
    fingerprint: String,
    costs: Costs,
    work: Work,
    /// By rows of a microbatch; made when first asked for.
    outlines: BTreeMap<u64, OnceLock<Outline>>,
    /// Of the last previous plan.
    in_force: Mutex<Option<Arc<InForce>>>,
}

/// A plan, cut.
#[derive(Debug)]
struct InForce {
    grads: BTreeMap<String, Assignment>,
    owners: Vec<Place>,
    devices: Vec<Vec<DeviceId>>,
    n_microbatches: u32,
    /// It decides how graphs are cut.
    schedule: ScheduleKind,
    /// By shard, as that does.
    recomputes: Vec<bool>,
    cuts: Arc<Cuts>,
}

impl InForce {
    fn is_of(&self, plan: &Plan) -> bool {
        (self.n_microbatches, self.schedule) == (plan.n_microbatches, plan.schedule)
            && self.devices.iter().eq(plan.shards.iter().map(|s| &s.devices))
            && self.recomputes == plan.recomputes()
            && self.owners == plan.owners
            && self.grads == plan.grads
    }
}

impl Prepared {
    /// # Complexity
    /// O(ops · log ops).
    pub fn new(model: &Model) -> Self {
        let costs = Costs::of(model);
        Self {
            fingerprint: model.fingerprint.clone(),
            work: Work::of(model, &costs),
            costs,
            outlines: model.grads.iter().map(|g| (g.microbatch, OnceLock::new())).collect(),
            in_force: Mutex::default(),
        }
    }

    /// Cuts a plan that has come into force, unless it is the last one that was: planning again begins with it.
    ///
    /// # Complexity
    /// O(ops · log ops).
    pub fn hold(&self, model: &Model, topology: &Topology, plan: &Plan) {
        let mut in_force = self.in_force.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_of(model) || in_force.as_ref().is_some_and(|known| known.is_of(plan)) {
            return;
        }
        // A plan that cannot be cut is none to begin with.
        let Ok(cuts) = Cuts::new(model, topology, plan, &self.costs, None) else { return };
        *in_force = Some(Arc::new(InForce {
            grads: plan.grads.clone(),
            owners: plan.owners.clone(),
            devices: plan.shards.iter().map(|s| s.devices.clone()).collect(),
            n_microbatches: plan.n_microbatches,
            schedule: plan.schedule,
            recomputes: plan.recomputes(),
            cuts: Arc::new(cuts),
        }));
    }

    /// What [`Priced::new`] makes, sooner.
    ///
    /// # Errors
    /// [`SegmentError`] for a plan made for another model.
    pub fn priced(&self, model: &Model, topology: &Topology, plan: &Plan) -> Result<Priced, SegmentError> {
        match self.is_of(model) {
            true => Priced::by(&self.costs, model, topology, plan),
            false => Priced::new(model, topology, plan),
        }
    }

    pub(in crate::plan) fn is_of(&self, model: &Model) -> bool {
        self.fingerprint == model.fingerprint
    }

    pub(in crate::plan) fn costs(&self) -> &Costs {
        &self.costs
    }

    pub(in crate::plan) fn work(&self) -> &Work {
        &self.work
    }

    /// The model as a line for these devices. `variants`: those of the microbatch size.
    pub(in crate::plan) fn line(
        &self,
        problem: &Problem<'_>,
        microbatch: u64,
        variants: &[&GradGraph],
    ) -> Result<Line<'_>, Infeasible> {
        let outline = self.outlines[&microbatch].get_or_init(|| Outline::new(problem.model, variants, &self.costs));
        let in_force = self.in_force().map(|known| known.cuts.clone());
        Line::new(problem, variants, outline, &self.costs, in_force)
    }

    fn in_force(&self) -> Option<Arc<InForce>> {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Simulates one step; `None` for a plan of another model.
    pub(super) fn predict(&self, problem: &Problem<'_>, plan: &Plan) -> Option<Prediction> {
        match self.in_force().filter(|known| known.is_of(plan)) {
            Some(known) => Some(known.cuts.predict(problem.model, problem.topology, plan, &self.costs)),
            None => predict(problem.model, problem.topology, plan, &self.costs).ok(),
        }
    }
}
