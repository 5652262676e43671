//! A plan on its way in: found, prepared beside the training, committed between two feeds.

use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use anyhow::anyhow;
use serde_json::json;

use super::rehearse::{Rehearsed, SPELL};
use super::{Fault, SILENCE, Training, background, seats};
use crate::local::control::{Asked, Reply, Request};
use crate::local::inputs::Ask;
use crate::plan::verify::verify;
use crate::plan::{Infeasible, Plan, check};
use crate::topology::{DeviceId, Topology};
use crate::units::{Bytes, Seconds};
use crate::wire::control::{ReadyReport, Switched, WorkerId};

/// One move from plan to plan.
pub struct Recut {
    phase: Phase,
    began: Instant,
    /// When a worker last said that it gets on with it.
    last_sign: Instant,
    /// Why it is done, for the record.
    why: String,
    /// Who asked, if somebody did.
    answer: Option<Reply>,
    /// It will be called off when it is ready: only its executables are wanted.
    rehearsal: bool,
}

enum Phase {
    /// A thread looks for a plan.
    Solving(Receiver<Result<Plan, Infeasible>>),
    /// Workers that join are on their way.
    Gathering(Plan),
    Preparing(Plan),
    /// With what that took, and how much had to be compiled.
    Ready(Plan, Seconds, u32),
    /// It takes over in this step.
    Committed {
        plan: Plan,
        step: u64,
        prepared: Seconds,
        compiled: u32,
    },
}

impl Recut {
    fn new(phase: Phase, why: String, answer: Option<Reply>) -> Self {
        let began = Instant::now();
        Self { phase, began, last_sign: began, why, answer, rehearsal: false }
    }

    pub fn is_rehearsal(&self) -> bool {
        self.rehearsal
    }

    /// The plan on its way; 0 while it is being looked for.
    pub fn revision(&self) -> u64 {
        match &self.phase {
            Phase::Solving(_) => 0,
            Phase::Gathering(plan) | Phase::Preparing(plan) | Phase::Ready(plan, ..) => plan.revision,
            Phase::Committed { plan, .. } => plan.revision,
        }
    }

    pub fn heard(&mut self) {
        self.last_sign = Instant::now();
    }
}

impl Training<'_> {
    /// Takes a request from outside.
    pub(super) fn asked(&mut self, Asked { request, answer }: Asked) {
        let (plan, shards, microbatch) = match request {
            Request::Recut { plan, shards, microbatch } => (plan, shards, microbatch),
            Request::Approve { revision } => {
                let nothing = || Err("nothing is recommended".to_owned());
                let approved = self.adapt.as_mut().map_or_else(nothing, |a| a.approve(revision));
                let _ = answer.send(approved.map(|revision| format!("revision {revision} is approved")));
                return;
            }
        };
        let refused = match (&self.recut, self.fed >= self.steps) {
            (Some(recut), _) if !recut.rehearsal => Some("another recut is under way; try again when it is done"),
            (_, true) => Some("the job is about to end"),
            _ => None,
        };
        if let Some(why) = refused {
            let _ = answer.send(Err(why.to_owned()));
            return;
        }
        self.call_off_rehearsal();
        let why = "asked for by hand".to_owned();
        match plan {
            Some(plan) => match self.fits(&plan) {
                Ok(()) => {
                    let plan = Plan { revision: self.take_revision(), ..*plan };
                    self.begin_recut(plan, why, Some(answer));
                }
                Err(why) => drop(answer.send(Err(why))),
            },
            None => {
                let n_shards = shards.unwrap_or(self.record.plan.shards.len() as u32);
                match self.solve(Ask { n_shards, microbatch }) {
                    Ok(plans) => self.recut = Some(Recut::new(Phase::Solving(plans), why, Some(answer))),
                    Err(why) => drop(answer.send(Err(why))),
                }
            }
        }
    }

    /// Has a plan compiled for later.
    pub(super) fn begin_rehearsal(&mut self, plan: Plan) {
        self.event("rehearsing", json!({"plan": plan.revision}));
        let mut recut = Recut::new(Phase::Gathering(plan), "for later".to_owned(), None);
        recut.rehearsal = true;
        self.recut = Some(recut);
    }

    fn call_off_rehearsal(&mut self) {
        if self.recut.take_if(|r| r.rehearsal).is_some() {
            self.end_rehearsal(None);
        }
    }

    fn end_rehearsal(&mut self, rehearsed: Option<Rehearsed>) {
        self.session.abort();
        let facts = match &rehearsed {
            Some(Rehearsed { plan, prepared, compiled, left }) => {
                json!({"plan": plan.revision, "prepare_seconds": prepared.0, "compiled": compiled, "left": left})
            }
            None => json!({"called_off": true}),
        };
        self.event("rehearsal", facts);
        if let Some(adapt) = &mut self.adapt {
            adapt.rehearsed(rehearsed);
        }
    }

    /// Sets out for a plan.
    pub(super) fn begin_recut(&mut self, plan: Plan, why: String, answer: Option<Reply>) {
        self.call_off_rehearsal();
        self.recut = Some(Recut::new(Phase::Gathering(plan.clone()), why, answer));
        self.gather_for(plan);
    }

    /// Whether a plan from outside can run here.
    fn fits(&self, plan: &Plan) -> Result<(), String> {
        check::check(plan, &self.inputs.model).map_err(|e| format!("the plan does not fit this job: {e}"))?;
        let n_replicas = self.inputs.job.spec.parallelism.replicas;
        if plan.n_replicas != n_replicas {
            return Err(format!("the plan has {} replicas, this job has {n_replicas}", plan.n_replicas));
        }
        let n = plan.shards.len() * plan.n_replicas as usize;
        self.inputs.machine.share_cores(n)?;
        if let Some(device) = plan.shards.iter().flat_map(|s| &s.devices).find(|d| d.index() >= n) {
            return Err(format!("the plan puts {n} workers on devices 0 to {}, and names {device:?}", n - 1));
        }
        let verified = verify(&self.inputs.model, &self.topology(plan), plan).map(drop);
        verified.map_err(|fault| format!("the plan does not hold: {:#}", anyhow!(fault)))
    }

    /// Looks for a plan on a thread of its own.
    fn solve(&mut self, ask: Ask) -> Result<Receiver<Result<Plan, Infeasible>>, String> {
        let n = (ask.n_shards * self.inputs.job.spec.parallelism.replicas) as usize;
        let topology = self.inputs.machine.topology(n, &|_| 1.0)?;
        let (spec, model) = (self.inputs.job.spec.clone(), self.inputs.model.clone());
        let prepared = self.inputs.prepared.clone();
        let running = self.record.plan.clone();
        let previous = (running.shards.len() == ask.n_shards as usize && ask.microbatch.is_none()).then_some(running);
        let work = move || ask.solve(&spec, &model, &prepared, &topology, previous.as_ref());
        background("plan", work).map_err(|e| e.to_string())
    }

    /// Devices of a plan's workers.
    pub(super) fn topology(&self, plan: &Plan) -> Topology {
        let n = plan.shards.len() * plan.n_replicas as usize;
        self.inputs.machine.topology(n, &|_| 1.0).expect("workers of a plan in force have cores")
    }

    pub(super) fn cores(&self, plan: &Plan) -> Vec<Vec<usize>> {
        let n = plan.shards.len() * plan.n_replicas as usize;
        self.inputs.machine.share_cores(n).expect("workers of a plan in force have cores")
    }

    /// Goes one phase on, where nothing has to be waited for.
    pub(super) fn pursue_recut(&mut self) -> Result<(), Fault> {
        let Some(recut) = &mut self.recut else { return Ok(()) };
        match &recut.phase {
            Phase::Solving(plans) => match plans.try_recv() {
                Ok(Ok(plan)) => {
                    let plan = Plan { revision: self.next_revision, ..plan };
                    self.next_revision += 1;
                    recut.phase = Phase::Gathering(plan.clone());
                    self.gather_for(plan);
                }
                Ok(Err(e)) => self.call_off_recut(&e.to_string()),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.call_off_recut("the planner ended without an answer"),
            },
            Phase::Gathering(plan) => {
                let seats = seats(plan);
                if seats.iter().all(|&w| self.session.has(w)) {
                    let plan = plan.clone();
                    let spell = recut.rehearsal.then_some(SPELL);
                    match self.session.prepare(plan.clone(), seats, false, spell) {
                        Ok(()) => {
                            recut.heard();
                            recut.phase = Phase::Preparing(plan);
                        }
                        Err(e) => self.call_off_recut(&e.to_string()),
                    }
                } else if recut.began.elapsed().as_secs() > 60 {
                    self.call_off_recut("workers that should join did not appear within 60 s");
                }
            }
            Phase::Preparing(_) if recut.last_sign.elapsed() > SILENCE => {
                self.call_off_recut(&format!("no worker has got on with it for {} s", SILENCE.as_secs()));
            }
            Phase::Preparing(_) | Phase::Ready(..) | Phase::Committed { .. } => {}
        }
        Ok(())
    }

    fn gather_for(&mut self, plan: Plan) {
        let seats = seats(&plan);
        if let Err(e) = self.start_workers(&plan, &seats) {
            self.call_off_recut(&e.to_string());
        }
    }

    /// All workers are ready; what their compilers say about memory must fit.
    pub(super) fn recut_ready(&mut self, reports: &[(WorkerId, ReadyReport)]) -> Result<(), Fault> {
        let Some(Recut { phase, began, rehearsal, .. }) = &mut self.recut else { return Ok(()) };
        let Phase::Preparing(plan) = phase else { return Ok(()) };
        let plan = plan.clone();
        let prepared = Seconds(began.elapsed().as_secs_f64());
        let compiled = reports.iter().map(|(_, r)| r.compiled).sum();
        if *rehearsal {
            let left = reports.iter().map(|(_, r)| r.left).sum();
            self.recut = None;
            self.end_rehearsal(Some(Rehearsed { plan, prepared, compiled, left }));
            return Ok(());
        }
        if self.adapt.as_ref().is_some_and(|a| a.comes_late(plan.revision, prepared)) {
            // It is known from now on: if it still pays, it is back within a moment.
            self.call_off_recut(&format!("revision {} took {prepared} to prepare; it is weighed again", plan.revision));
            if let Some(adapt) = &mut self.adapt {
                adapt.rehearsed(Some(Rehearsed { plan, prepared, compiled, left: 0 }));
            }
            return Ok(());
        }
        *phase = Phase::Ready(plan.clone(), prepared, compiled);
        let topology = self.topology(&plan);
        for (worker, r) in reports {
            let needs = r.state_bytes + r.gradient_bytes + r.residual_bytes + r.temporary_bytes;
            let has = topology.devices[*worker as usize].memory;
            if needs > has.0 {
                self.session.abort();
                let needs = Bytes(needs);
                self.call_off_recut(&format!("worker {worker} would need {needs}, it has {has}"));
                return Ok(());
            }
        }
        self.remember(reports);
        Ok(())
    }

    /// Lets a plan that is ready take over in the step that is about to be fed.
    pub(super) fn commit_recut(&mut self) {
        // A step later there must be one that the new plan runs.
        if self.fed + 1 >= self.steps {
            return;
        }
        let Some(Recut { phase, .. }) = &mut self.recut else { return };
        if let Phase::Ready(plan, prepared, compiled) = phase {
            let step = self.fed;
            *phase = Phase::Committed { plan: plan.clone(), step, prepared: *prepared, compiled: *compiled };
            self.session.commit(step);
        }
    }

    /// The new plan is in force.
    pub(super) fn recut_done(&mut self, step: u64, switched: Switched) -> Result<(), Fault> {
        let Some(recut) = self.recut.take_if(|r| matches!(&r.phase, Phase::Committed { step: at, .. } if *at == step))
        else {
            return Ok(());
        };
        let Phase::Committed { plan, prepared, compiled, .. } = recut.phase else { return Ok(()) };
        let before = self.cores(&self.record.plan);
        let mut repinned = Vec::new();
        for (worker, cores) in self.cores(&plan).iter().enumerate() {
            self.workers.repin(worker as WorkerId, cores);
            if before.get(worker).is_some_and(|b| b != cores) {
                repinned.push(DeviceId(worker as u32));
            }
        }
        let (revision, moved, pause) = (plan.revision, Bytes(switched.moved_bytes), Seconds(switched.pause_s));
        self.record.plan = plan.clone();
        self.record.counts.cutovers += 1;
        self.show(&plan, &recut.why);
        let (now, base) = (self.now(), self.topology(&plan));
        if let Some(adapt) = &mut self.adapt {
            adapt.replaced(repinned.into_iter());
            adapt.adopted(self.inputs, &plan, base, step, now, (pause, prepared, compiled))?;
        }
        let text = format!(
            "revision {revision} runs from step {}: {} shards, {moved} moved, {pause} pause, prepared in {prepared}",
            step + 1,
            plan.shards.len()
        );
        self.progress.say(&text);
        self.event(
            "cutover",
            json!({
                "at": step + 1, "why": recut.why, "moved_bytes": moved.0, "pause_seconds": pause.0,
                "prepare_seconds": prepared.0, "compiled": compiled, "predicted_step_seconds": plan.step_time.0,
            }),
        );
        if let Some(answer) = recut.answer {
            let _ = answer.send(Ok(text));
        }
        Ok(())
    }

    /// What was under way is no more; what runs goes on.
    pub(super) fn call_off_recut(&mut self, why: &str) {
        self.call_off_rehearsal();
        let Some(recut) = self.recut.take() else { return };
        self.session.abort();
        if let Some(adapt) = &mut self.adapt {
            adapt.called_off(recut.revision());
        }
        self.progress.say(&format!("the recut was called off: {why}"));
        self.event("recut called off", json!({"why": why, "reason": recut.why}));
        if let Some(answer) = recut.answer {
            let _ = answer.send(Err(why.to_owned()));
        }
        // Workers that had come for it.
        let kept = seats(&self.record.plan);
        for worker in self.workers.all().into_iter().filter(|w| !kept.contains(w)) {
            self.workers.kill(worker);
            self.session.lose(worker);
        }
    }
}
