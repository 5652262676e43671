//! The loop beside the steps: observe, forecast, ask the planner, decide, and write down what was seen and decided.
//!
//! Forecasts and plans are made on threads of their own; the training loop only hands out what was measured and takes
//! in what has come of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, TryRecvError};

use anyhow::Context;

use super::background;
use super::propose::{Preparing, Proposed, Question, propose, same, trained};
use super::rehearse::{Rehearsals, Rehearsed};
use super::watch::{Watch, What};
use crate::forecast::Forecast;
use crate::local::inputs::Inputs;
use crate::local::workers::Used;
use crate::plan::estimate::{BatchEstimate, Priced};
use crate::plan::{Plan, ShardId};
use crate::profile::{BatchProfile, Calibration, CalibrationError, Report};
use crate::runtime::StepReport;
use crate::topology::{self, DeviceId, Topology};
use crate::transition::{
    Candidate, Considered, Decision, LINK_LIMIT, Ledger, Link, Measured, Memory, Mode, Move, Proposal, Record, Running,
    Settings, Snapshot, Tracker, Wait, Worker, decide,
};
use crate::units::{Bytes, BytesPerSec, Seconds};

/// Steps of a plan before anything is decided about it: calibration needs a few.
const SETTLED: u64 = 20;

/// Horizons that a job has to last for it to compile plans that it may never need.
const LONG: f64 = 4.0;

/// What the loop knows beside the steps.
pub struct Adapt {
    settings: Settings,
    record: BufWriter<File>,
    calibration: Calibration,
    /// Devices of the running plan, without anything measured.
    base: Topology,
    running: Plan,
    priced: Priced,
    since: (u64, Seconds),
    /// Step and computing times that were predicted for the running plan, once there was something to predict from.
    predicted: Option<(Seconds, Vec<Seconds>)>,
    step_times: Tracker,
    /// By rank.
    busy: Vec<Tracker>,
    /// Bytes received in the last step, by rank.
    received: Vec<Bytes>,
    watch: Watch,
    solving: Option<Receiver<Proposed>>,
    proposal: Option<Proposal>,
    /// Plans by revision, as far as they may still be adopted.
    plans: BTreeMap<u64, Plan>,
    considered: Option<Considered>,
    moves: Vec<Move>,
    left: Option<Left>,
    under_way: Option<UnderWay>,
    approved: Option<u64>,
    /// The plan that waits for approval, and why.
    recommended: Option<(u64, String)>,
    /// Until when the move under way was said to pay.
    promised: Option<Seconds>,
    preparing: Preparing,
    rehearsals: Rehearsals,
    next_decision: Seconds,
    label: &'static str,
    variant: String,
}

/// The plan before the running one, and whether leaving it pays.
struct Left {
    priced: Priced,
    /// That it trained.
    variant: String,
    /// How many times longer its steps took than segments and transfers explain.
    stretch: f64,
    ledger: Ledger,
}

/// What training loses beside the preparation of a move.
struct UnderWay {
    /// A step before it.
    usual: f64,
    lost: f64,
}

/// What the training loop has to do.
pub enum Advice {
    Nothing,
    /// Something a person would want to hear.
    Say(String),
    /// Move to this plan; the text says why.
    Adopt(Box<Plan>, String),
    /// Have this plan compiled, and go on as before.
    Rehearse(Box<Plan>),
}

/// Lets the planner know the plan in force before it is asked about it.
fn hold(inputs: &Inputs, base: &Topology, plan: &Plan) -> anyhow::Result<()> {
    let (model, prepared) = (inputs.model.clone(), inputs.prepared.clone());
    let (base, plan) = (base.clone(), plan.clone());
    background("plan", move || prepared.hold(&model, &base, &plan)).map(|_| ())
}

impl Adapt {
    pub fn new(inputs: &Inputs, plan: &Plan, base: Topology, record: &Path) -> anyhow::Result<Self> {
        let priced = inputs.prepared.priced(&inputs.model, &base, plan).context("cannot price the plan")?;
        hold(inputs, &base, plan)?;
        let file = File::create(record).with_context(|| format!("cannot write {}", record.display()))?;
        Ok(Self {
            settings: inputs.job.spec.adaptation.clone().into(),
            record: BufWriter::new(file),
            calibration: Calibration::starting_from(inputs.known.clone()),
            base,
            running: plan.clone(),
            priced,
            since: (0, Seconds(0.0)),
            predicted: None,
            step_times: Tracker::default(),
            busy: vec![Tracker::default(); plan.shards.len() * plan.n_replicas as usize],
            received: Vec::new(),
            watch: Watch::default(),
            solving: None,
            proposal: None,
            plans: BTreeMap::new(),
            considered: None,
            moves: Vec::new(),
            left: None,
            under_way: None,
            approved: None,
            recommended: None,
            promised: None,
            preparing: Preparing::default(),
            rehearsals: Rehearsals::default(),
            next_decision: Seconds(0.0),
            label: "keep/steady",
            variant: String::new(),
        })
    }

    /// What a step will take, by what is known now.
    pub fn estimate(&self, variant: &str, batch: Option<&BatchProfile>) -> Option<BatchEstimate> {
        self.priced.estimate(variant, &self.calibration, &|d| self.calibration.speed(d), batch)
    }

    /// Devices as they are, by what has been measured.
    pub fn at_present(&self, base: Topology) -> Topology {
        let mut topology = self.calibration.correct(base);
        for (i, device) in topology.devices.iter_mut().enumerate() {
            device.speed *= self.calibration.speed(DeviceId(i as u32)).max(1e-3);
        }
        topology
    }

    /// What has been learned of kinds of devices.
    pub fn kinds(&self) -> &BTreeMap<String, topology::Measured> {
        self.calibration.kinds()
    }

    /// Takes in a step that began and ended under the running plan. `seconds`: from one report to the next.
    ///
    /// # Errors
    /// A report that does not fit the plan: speeds have not been learned from it.
    pub fn observe(&mut self, report: &StepReport, seconds: f64, now: Seconds) -> Result<(), CalibrationError> {
        let (duration, variant) = (Seconds(seconds), report.variant.as_str());
        variant.clone_into(&mut self.variant);
        let segments: Vec<_> = (0..report.workers.len()).map(|rank| self.priced.segments(variant, rank)).collect();
        let kinds: Vec<(DeviceId, String)> = self.priced.seats().map(|(d, k)| (d, k.to_owned())).collect();
        let reports: Vec<Report<'_>> = report
            .workers
            .iter()
            .zip(&segments)
            .zip(&kinds)
            .map(|((w, segments), (device, kind))| Report {
                device: *device,
                kind,
                segments,
                seconds: &w.segments_s,
                other: Seconds(w.other_s),
                turn: w.turn_s.map(Seconds),
            })
            .collect();
        let learned = self.calibration.observe(&reports);
        for seen in learned.iter().flatten() {
            if let Some(speed) = seen.speed {
                self.watch.push(What::Speed(seen.device), now, duration, speed, &self.settings);
            }
        }
        self.watch.push(What::StepTime, now, duration, seconds, &self.settings);
        self.received = report.workers.iter().map(|w| Bytes(w.received_bytes)).collect();
        for (w, (device, _)) in report.workers.iter().zip(&kinds).filter(|(w, _)| w.received_s > 0.0) {
            let bandwidth = w.received_bytes as f64 / w.received_s;
            self.watch.push(What::Link(*device), now, duration, bandwidth, &self.settings);
        }
        if let Some(answer) = report.answer {
            self.calibration.observe_answer(Seconds(answer.seconds), answer.waited);
        }
        let seen = learned.as_deref().unwrap_or_default();
        self.priced.learn(&mut self.calibration, variant, report.revision, seen, duration);
        self.step_times.push(duration, seconds);
        self.rehearsals.step();
        for (tracker, worker) in self.busy.iter_mut().zip(&report.workers) {
            tracker.push(duration, worker.busy_s);
        }
        if let Some(UnderWay { usual, lost }) = &mut self.under_way {
            *lost += seconds - *usual;
        }
        if let Some(left) = &mut self.left {
            let calibration = &self.calibration;
            let before = left.priced.estimate(&left.variant, calibration, &|d| calibration.speed(d), None);
            if let Some(before) = before {
                left.ledger.note(now, before.step * (left.stretch / calibration.stretch()), duration);
            }
            if let Some(last) = self.moves.last_mut().filter(|m| m.pause.measured.is_some()) {
                last.gain.measured = left.ledger.gain();
            }
        }
        if self.predicted.is_none() && report.step >= self.since.0 + SETTLED {
            self.predicted = self.estimate(variant, None).map(|e| (e.step, e.workers.iter().map(|w| w.busy).collect()));
        }
        learned.map(|_| ())
    }

    /// Takes in what the process of a device has used in the `duration` before `now`.
    pub fn used(&mut self, device: DeviceId, now: Seconds, duration: Seconds, used: &Used) {
        self.watch.push(What::Cpu(device), now, duration, used.cpu / duration, &self.settings);
        self.watch.push(What::Memory(device), now, duration, used.memory.0 as f64, &self.settings);
    }

    /// One turn of the loop: takes in what threads have found, and decides. `in_flight`: the revision on its way in;
    /// `revision`: yields numbers for new plans.
    pub fn turn(
        &mut self,
        inputs: &Inputs,
        step: u64,
        steps_left: u64,
        now: Seconds,
        in_flight: Option<u64>,
        revision: &mut dyn FnMut() -> u64,
    ) -> anyhow::Result<Advice> {
        if self.settings.mode == Mode::Off || self.predicted.is_none() {
            return Ok(Advice::Nothing);
        }
        // An answer of the planner is not kept waiting.
        let answered = self.take_proposal(revision);
        if now < self.next_decision && !answered {
            return Ok(Advice::Nothing);
        }
        self.next_decision = now + self.settings.interval;
        self.watch.turn(now, self.step_times.observed().now(), &self.settings)?;
        let step_time = self.step_times.observed().now().unwrap_or(0.0);
        let snapshot = self.snapshot(step, steps_left, now, in_flight);
        let decision = decide(&snapshot);
        match &decision {
            Decision::Wait { reason: Wait::Approval { revision, .. }, .. } => {
                self.recommended = Some((*revision, decision.to_string()));
            }
            // The planner is asked again and again: what it says next counts.
            Decision::Wait { reason: Wait::Unsolved, .. } => {}
            _ => self.recommended = None,
        }
        let mut advice = Advice::Nothing;
        if decision.label() != self.label {
            self.label = decision.label();
            if !matches!(
                decision,
                Decision::Keep { .. } | Decision::Wait { reason: Wait::Unsolved | Wait::InFlight { .. }, .. }
            ) {
                advice = Advice::Say(decision.to_string());
            }
        }
        match &decision {
            Decision::Wait { reason: Wait::Unsolved, .. } if self.solving.is_none() => self.ask(inputs, now)?,
            Decision::Adopt { revision, balance, .. } => {
                if let Some((plan, candidate)) = self.chosen(*revision) {
                    self.moves.push(Move {
                        revision: *revision,
                        step,
                        time: now,
                        pause: Measured { expected: candidate.pause, measured: None },
                        prepare: Measured { expected: candidate.prepare, measured: None },
                        gain: Measured { expected: balance.share, measured: None },
                    });
                    advice = Advice::Adopt(Box::new(plan), decision.to_string());
                    (self.proposal, self.approved, self.promised) = (None, None, Some(balance.end));
                    self.under_way = self.step_times.observed().now().map(|usual| UnderWay { usual, lost: 0.0 });
                    self.plans.clear();
                }
            }
            // Nothing else is to be done: a good moment to compile for what may come.
            Decision::Keep { .. }
                if self.is_quiet() && steps_left as f64 * step_time > self.settings.horizon.0 * LONG =>
            {
                if let Some(plan) = self.rehearsals.next(inputs, &self.running, &self.base)? {
                    advice = Advice::Rehearse(Box::new(Plan { revision: revision(), ..plan }));
                }
            }
            _ => {}
        }
        if let Some(settled) = snapshot.settled(&decision) {
            (self.considered, self.proposal) = (Some(settled), None);
        }
        self.write(&Record::new(snapshot, decision))?;
        Ok(advice)
    }

    fn write(&mut self, record: &Record) -> anyhow::Result<()> {
        writeln!(self.record, "{}", record.to_line()?)?;
        self.record.flush().context("cannot write decisions.jsonl; is the disk full?")
    }

    fn chosen(&mut self, revision: u64) -> Option<(Plan, Candidate)> {
        let Some(Proposal::Plans(candidates)) = &self.proposal else { return None };
        let candidate = candidates.iter().find(|c| c.revision == revision)?.clone();
        Some((self.plans.get(&revision)?.clone(), candidate))
    }

    /// Whether no device has much else to do than to train.
    fn is_quiet(&self) -> bool {
        const QUIET: f64 = 0.85;
        self.priced.seats().all(|(d, _)| self.calibration.speed(d) > QUIET)
    }

    /// What is foreseen of what each device receives, if that is to hold steps up anywhere.
    fn links(&self) -> BTreeMap<DeviceId, (f64, Forecast)> {
        let Some((step, _)) = &self.predicted else { return BTreeMap::new() };
        let devices = || self.priced.seats().map(|(device, _)| device);
        let of = |device: DeviceId| {
            let seen = self.watch.watched(What::Link(device));
            seen.now.zip(seen.forecast).map(|seen| (device, seen))
        };
        let all: BTreeMap<DeviceId, (f64, Forecast)> = devices().filter_map(of).collect();
        let slow = |(rank, device): (usize, DeviceId)| {
            let rate = all.get(&device).map(|(_, f)| BytesPerSec(f.min().band.mean.max(1.0)));
            let takes = self.received.get(rank).zip(rate).map(|(bytes, rate)| *bytes / rate);
            takes.is_some_and(|takes| takes > *step * LINK_LIMIT)
        };
        if devices().enumerate().any(slow) { all } else { BTreeMap::new() }
    }

    /// Asks the planner.
    fn ask(&mut self, inputs: &Inputs, now: Seconds) -> anyhow::Result<()> {
        let question = Question {
            spec: inputs.job.spec.clone(),
            model: inputs.model.clone(),
            prepared: inputs.prepared.clone(),
            base: self.base.clone(),
            calibration: self.calibration.clone(),
            running: self.running.clone(),
            priced: self.priced.clone(),
            forecasts: self.watch.speeds(),
            links: self.links(),
            known: self.rehearsals.known().to_vec(),
            variant: self.variant.clone(),
            now,
            preparing: self.preparing,
        };
        self.solving = Some(background("plan", move || propose(&question))?);
        Ok(())
    }

    /// Whether the planner has answered.
    fn take_proposal(&mut self, revision: &mut dyn FnMut() -> u64) -> bool {
        let Some(solving) = &self.solving else { return false };
        let proposed = match solving.try_recv() {
            Ok(proposed) => proposed,
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => {
                self.solving = None;
                return false;
            }
        };
        self.solving = None;
        self.proposal = Some(match proposed {
            Proposed::Infeasible(problem) => Proposal::Infeasible(problem),
            Proposed::Plans(plans) if plans.is_empty() => Proposal::Same,
            Proposed::Plans(plans) => {
                let known = std::mem::take(&mut self.plans);
                let candidates = plans.into_iter().map(|(plan, candidate)| {
                    // A plan that comes out the same again keeps its number, so that an approval holds.
                    let again = known.iter().find(|(_, k)| same(k, &plan));
                    let number = again.map(|(&r, _)| r).unwrap_or_else(&mut *revision);
                    self.plans.insert(number, Plan { revision: number, ..plan });
                    Candidate { revision: number, ..candidate }
                });
                Proposal::Plans(candidates.collect())
            }
        });
        true
    }

    fn snapshot(&self, step: u64, steps_left: u64, now: Seconds, in_flight: Option<u64>) -> Snapshot {
        let (predicted, predicted_busy) = self.predicted.clone().unwrap_or_default();
        let n_shards = self.running.shards.len();
        let worker = |(rank, device): (usize, DeviceId)| {
            let shard = ShardId((rank % n_shards) as u32);
            let planned = self.running.shards[shard.index()].memory;
            let memory = self.watch.watched(What::Memory(device));
            Worker {
                rank: rank as u32,
                shard,
                predicted_busy: predicted_busy.get(rank).copied().unwrap_or_default(),
                busy: self.busy[rank].observed(),
                speed: self.calibration.speed(device),
                speed_forecast: self.watch.forecast(What::Speed(device)).cloned(),
                memory: Memory {
                    planned,
                    used: memory.now.map_or(planned, |used| Bytes(used as u64)),
                    limit: self.base.devices.get(device.index()).map_or(Bytes(u64::MAX), |d| d.memory),
                    forecast: memory.forecast,
                },
                cpu: self.watch.watched(What::Cpu(device)),
                link: Link {
                    per_step: self.received.get(rank).copied().unwrap_or_default(),
                    bandwidth: self.watch.watched(What::Link(device)),
                },
            }
        };
        Snapshot {
            step,
            time: now,
            steps_left: Some(steps_left),
            settings: self.settings.clone(),
            running: Running {
                revision: self.running.revision,
                since_step: self.since.0,
                since: self.since.1,
                predicted,
                observed: self.step_times.observed(),
                forecast: self.watch.forecast(What::StepTime).cloned(),
            },
            workers: self.priced.seats().map(|(d, _)| d).enumerate().map(worker).collect(),
            proposal: self.proposal.clone(),
            moves: self.moves.clone(),
            in_flight,
            considered: self.considered.clone(),
            approved: self.approved,
        }
    }

    /// The plan that waits for approval, and why.
    pub fn recommended(&self) -> Option<&(u64, String)> {
        self.recommended.as_ref()
    }

    /// A person agrees to the plan that is recommended: to this one, or whichever it is.
    pub fn approve(&mut self, revision: Option<u64>) -> Result<u64, String> {
        if self.settings.mode != Mode::Recommend {
            return Err("spec.adaptation.mode is not Recommend: moves need no approval".to_owned());
        }
        let (recommended, _) = self.recommended.as_ref().ok_or("no plan is recommended")?;
        match revision {
            Some(revision) if revision != *recommended => {
                Err(format!("revision {recommended} is recommended, not {revision}"))
            }
            _ => {
                (self.approved, self.next_decision) = (Some(*recommended), Seconds(0.0));
                Ok(*recommended)
            }
        }
    }

    /// Another plan is in force, from the step after `step` on.
    pub fn adopted(
        &mut self,
        inputs: &Inputs,
        plan: &Plan,
        base: Topology,
        step: u64,
        now: Seconds,
        (pause, prepare, compiled): (Seconds, Seconds, u32),
    ) -> anyhow::Result<()> {
        let priced = inputs.prepared.priced(&inputs.model, &base, plan).context("cannot price the plan")?;
        hold(inputs, &base, plan)?;
        let until = self.promised.take().unwrap_or(now + self.settings.horizon);
        let left_variant = trained(&self.running, &self.variant);
        let stretch = self.calibration.stretch();
        let explained = self.estimate(&left_variant, None).map(|e| e.step.0 / stretch);
        let seen = self.step_times.observed().now().zip(explained).map(|(seen, explained)| seen / explained);
        self.left = Some(Left {
            priced: std::mem::replace(&mut self.priced, priced),
            variant: left_variant,
            stretch: seen.filter(|s| s.is_finite()).unwrap_or(stretch),
            ledger: Ledger::new(until),
        });
        if self.moves.last().is_none_or(|m| m.revision != plan.revision) {
            // By hand: nothing was expected of it.
            let unknown = |expected| Measured { expected, measured: None };
            let gain = Measured { expected: 0.0, measured: None };
            let (revision, time) = (plan.revision, now);
            self.moves.push(Move { revision, step, time, pause: unknown(pause), prepare: unknown(prepare), gain });
        }
        let beside = self.under_way.take().map(|u| pause + Seconds(u.lost.clamp(0.0, prepare.0)));
        if let Some(last) = self.moves.last_mut() {
            (last.step, last.time) = (step, now);
            let cost = beside.unwrap_or(Preparing::cost(pause, prepare));
            (last.pause.measured, last.prepare.measured) = (Some(cost), Some(prepare));
        }
        self.took(prepare, compiled);
        self.rehearsals.moved(std::mem::replace(&mut self.running, plan.clone()), plan.clone());
        self.base = base;
        self.since = (step, now);
        self.busy = vec![Tracker::default(); plan.shards.len() * plan.n_replicas as usize];
        self.step_times.reset();
        self.watch.forget_steps();
        (self.considered, self.proposal, self.solving) = (None, None, None);
        self.recommended = None;
        self.plans.clear();
        let variant = trained(plan, &self.variant);
        self.predicted = self.estimate(&variant, None).map(|e| (e.step, e.workers.iter().map(|w| w.busy).collect()));
        Ok(())
    }

    /// A plan was prepared for later, or could not be.
    pub fn rehearsed(&mut self, rehearsed: Option<Rehearsed>) {
        if let Some(Rehearsed { prepared, compiled, .. }) = &rehearsed {
            self.took(*prepared, *compiled);
        }
        self.rehearsals.over(rehearsed);
    }

    fn took(&mut self, prepare: Seconds, compiled: u32) {
        let speeds = self.priced.seats().map(|(device, _)| self.calibration.speed(device));
        self.preparing.took(prepare, compiled, speeds);
    }

    /// Whether the move under way is prepared so late that it has to be decided about again. What a person has agreed to
    /// stands.
    pub fn comes_late(&self, revision: u64, prepared: Seconds) -> bool {
        let under_way = self.moves.last().filter(|m| m.revision == revision && m.pause.measured.is_none());
        self.settings.mode == Mode::Auto && under_way.is_some_and(|m| m.comes_late(prepared, &self.settings))
    }

    /// The move that was advised did not come off.
    pub fn called_off(&mut self, revision: u64) {
        if self.moves.last().is_some_and(|m| m.revision == revision && m.pause.measured.is_none()) {
            self.moves.pop();
        }
        self.under_way = None;
    }

    /// Another process serves as these devices.
    pub fn replaced(&mut self, devices: impl Iterator<Item = DeviceId>) {
        for device in devices {
            self.calibration.replaced(device);
            self.watch.forget(device);
        }
        self.step_times.reset();
        self.busy.iter_mut().for_each(Tracker::reset);
    }
}
