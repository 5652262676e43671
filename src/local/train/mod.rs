//! The training loop: feeds steps, takes reports, and lets nothing that goes on beside them hold it up.

mod adapt;
mod checkpoints;
mod depart;
mod propose;
mod recover;
mod recut;
mod rehearse;
mod trial;
mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde_json::{Value, json};

use self::adapt::{Adapt, Advice};
use self::checkpoints::Checkpoints;
use self::depart::Departing;
use self::recut::Recut;
use super::batches::{Batches, Missing};
use super::control::Control;
use super::inputs::Inputs;
use super::progress::Progress;
use super::run::{Ending, Options, Problem, input};
use super::run_dir::{RunDir, Traits};
use super::workers::{Used, Workers};
use crate::device::affinity;
use crate::plan::explain::explained;
use crate::plan::{Plan, picture, table};
use crate::profile::{BatchProfile, Calibration};
use crate::runtime::{Notice, RuntimeError, Session, StepReport};
use crate::telemetry::JobMetrics;
use crate::topology::{DeviceId, Topology};
use crate::units::{Bytes, Seconds};
use crate::wire::control::{FailureClass, ReadyReport, WorkerId};

/// How often the loop looks at signals and workers while it waits.
const TICK: Duration = Duration::from_millis(50);
/// How long preparing a plan may go on without a word: one module may take minutes to compile.
const SILENCE: Duration = Duration::from_secs(900);
/// How often it is looked at what workers use.
const LOOK_EVERY: Seconds = Seconds(1.0);
/// Steps that may be fed before the first is reported.
const AHEAD: u64 = 2;

/// What is known of a run when it ends.
pub struct Record {
    /// From the first step on.
    pub losses: Vec<f32>,
    /// Seconds per step, from one report to the next.
    pub times: Vec<f64>,
    /// Workers of the last plan, and of those before.
    pub workers: BTreeMap<WorkerId, Seen>,
    pub metrics: JobMetrics,
    /// Until the first step could begin.
    pub compiled: Duration,
    /// In force at the end.
    pub plan: Plan,
    pub counts: Counts,
}

/// A worker as its memory was planned and seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub rank: usize,
    pub planned: Bytes,
    pub ready: ReadyReport,
    pub peak_rss: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub cutovers: u32,
    /// Of these, so many because a worker was told to go.
    pub departures: u32,
    pub restarts: u32,
    pub checkpoints: u32,
}

/// A job in training.
pub struct Training<'a> {
    inputs: &'a mut Inputs,
    dir: &'a mut RunDir,
    progress: &'a mut Progress,
    workers: &'a mut Workers,
    session: Session,
    batches: Batches,
    interrupts: Arc<AtomicU32>,
    /// So many requests to stop have been heard.
    tolerated: u32,
    quiet: bool,
    began: Instant,
    /// Revisions are never used twice: connections tell plans apart by them.
    next_revision: u64,
    /// First step of this run.
    first: u64,
    fed: u64,
    reported: u64,
    /// Where the run ends.
    steps: u64,
    last_report: Instant,
    /// Since the last sign that steps go on.
    last_sign: Instant,
    checkpoints: Checkpoints,
    /// The plan on its way in.
    recut: Option<Recut>,
    departing: Departing,
    adapt: Option<Adapt>,
    /// What each worker had used when that was last looked at.
    used: BTreeMap<WorkerId, (Seconds, Used)>,
    /// Traits of the batches under way, by step.
    profiles: BTreeMap<u64, BatchProfile>,
    record: Record,
}

/// What stops the loop, if nobody helps.
enum Fault {
    Problem(Problem),
    /// Workers failed or were lost.
    Runtime(RuntimeError),
}

impl From<RuntimeError> for Fault {
    fn from(e: RuntimeError) -> Self {
        Fault::Runtime(e)
    }
}

impl From<anyhow::Error> for Fault {
    fn from(e: anyhow::Error) -> Self {
        Fault::Problem(Problem::Failed(e))
    }
}

impl<'a> Training<'a> {
    pub fn new(
        inputs: &'a mut Inputs,
        dir: &'a mut RunDir,
        progress: &'a mut Progress,
        workers: &'a mut Workers,
        session: Session,
        batches: Batches,
        options: &Options,
    ) -> Self {
        let ((first, _), steps) = (inputs.start(), inputs.steps);
        let checkpoints = Checkpoints::new(inputs, dir.checkpoints());
        let now = Instant::now();
        let record = Record {
            losses: Vec::new(),
            times: Vec::new(),
            workers: BTreeMap::new(),
            metrics: JobMetrics::default(),
            compiled: Duration::ZERO,
            plan: inputs.plan.clone(),
            counts: Counts::default(),
        };
        Self {
            inputs,
            dir,
            progress,
            workers,
            session,
            batches,
            interrupts: options.interrupts.clone(),
            tolerated: 0,
            quiet: options.quiet,
            began: now,
            next_revision: 1,
            first,
            fed: first,
            reported: first,
            steps,
            last_report: now,
            last_sign: now,
            checkpoints,
            recut: None,
            departing: Departing::default(),
            adapt: None,
            used: BTreeMap::new(),
            profiles: BTreeMap::new(),
            record,
        }
    }

    /// Trains to the end, through whatever can be survived.
    pub fn run(&mut self, control: &Control) -> Result<Ending, Problem> {
        if let Err(fault) = self.start() {
            if self.interrupts.load(Ordering::SeqCst) > 0 {
                return Ok(Ending::Interrupted);
            }
            return Err(Problem::Failed(self.workers.explain(fault).into()));
        }
        self.progress.say(&format!("compiled in {:.1} s, training", self.record.compiled.as_secs_f64()));
        (self.last_report, self.last_sign) = (Instant::now(), Instant::now());
        let mut ending = Ending::Done;
        loop {
            match self.interrupts.load(Ordering::SeqCst) {
                0 => {}
                1 if ending != Ending::Interrupted => {
                    ending = Ending::Interrupted;
                    (self.steps, self.tolerated) = (self.fed, 1);
                    self.progress.say("stopping: finishing the steps in flight, then writing the weights");
                }
                1 => {}
                _ => return Err(Problem::Failed(anyhow!("stopped at once; weights are not written"))),
            }
            let turn =
                if self.reported < self.steps { self.turn(control, &mut ending) } else { self.last_checkpoint() };
            match turn {
                Ok(()) if self.reported >= self.steps && self.is_saved() => return Ok(ending),
                Ok(()) => {}
                Err(Fault::Problem(problem)) => return Err(problem),
                Err(Fault::Runtime(fault)) => self.recover(fault)?,
            }
        }
    }

    /// An error when a worker has died that the plan in force needs.
    fn check_workers(&mut self) -> Result<(), RuntimeError> {
        let needed = seats(&self.record.plan);
        self.workers.check_of(&|w| needed.contains(&w))
    }

    /// Ends the run: collects the weights of a run that has come to its end.
    pub fn finish(self, ended: bool) -> (Record, Result<(), RuntimeError>) {
        let finished =
            if ended && !self.record.losses.is_empty() { self.session.finish(&self.dir.weights()) } else { Ok(()) };
        (self.record, finished)
    }

    /// Starts workers for the first plan and lets it begin.
    fn start(&mut self) -> Result<(), RuntimeError> {
        self.try_out()?;
        let began = Instant::now();
        let plan = Plan { revision: self.take_revision(), ..self.inputs.plan.clone() };
        let checkpoint = self.inputs.checkpoint.as_ref().map(|c| c.path().to_owned());
        self.show(&plan, "the first plan");
        if !self.quiet {
            let topology = self.topology(&plan);
            eprint!("{}", table::render(&plan, &self.inputs.model, &topology));
        }
        let base = self.topology(&plan);
        let record = self.dir.path().join("decisions.jsonl");
        let adapt = Adapt::new(self.inputs, &plan, base, &record);
        self.adapt = Some(adapt.map_err(|e| RuntimeError::Stopped(format!("{e:#}")))?);
        self.launch(plan, self.first, checkpoint)?;
        self.record.compiled = began.elapsed();
        Ok(())
    }

    /// Puts a plan into force where none is: missing workers are started, and the state comes from a checkpoint or from
    /// the seed.
    fn launch(&mut self, plan: Plan, step: u64, checkpoint: Option<PathBuf>) -> Result<(), RuntimeError> {
        let seats = seats(&plan);
        self.start_workers(&plan, &seats)?;
        let (workers, interrupts, tolerated) = (&mut *self.workers, &self.interrupts, self.tolerated);
        self.session.gather(&seats, &mut || {
            check_interrupts(interrupts, tolerated)?;
            workers.check()
        })?;
        self.session.prepare(plan.clone(), seats, checkpoint.is_none(), None)?;
        self.wait_for(|n| matches!(n, Notice::Ready(_)))?;
        self.session.begin(step, checkpoint.as_deref());
        self.wait_for(|n| matches!(n, Notice::Begun))?;
        self.record.plan = plan;
        Ok(())
    }

    /// Takes notices until one is as wanted. Nothing trains meanwhile.
    fn wait_for(&mut self, wanted: impl Fn(&Notice) -> bool) -> Result<(), RuntimeError> {
        self.last_sign = Instant::now();
        loop {
            match self.session.poll(TICK)? {
                None => {
                    check_interrupts(&self.interrupts, self.tolerated)?;
                    self.workers.check()?;
                    if self.last_sign.elapsed() > SILENCE {
                        return Err(RuntimeError::AllWait { seconds: SILENCE.as_secs() });
                    }
                }
                Some(Notice::Progress { compiled, of }) => {
                    self.last_sign = Instant::now();
                    self.progress.compiling(compiled, of);
                }
                Some(Notice::Refused { worker, message, class: FailureClass::Own }) => {
                    return Err(RuntimeError::WorkerFailed { rank: worker, message });
                }
                Some(Notice::Refused { worker, message, class: FailureClass::Peer }) => {
                    return Err(RuntimeError::WorkerLost { rank: worker, message });
                }
                Some(notice) => {
                    if let Notice::Ready(reports) = &notice {
                        self.remember(reports);
                    }
                    if wanted(&notice) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Starts the processes of workers that have none.
    fn start_workers(&mut self, plan: &Plan, seats: &[WorkerId]) -> Result<(), RuntimeError> {
        let cores = self.cores(plan);
        for &worker in seats {
            if !self.session.has(worker) {
                let started = self.workers.start(worker, &cores[worker as usize]);
                started.map_err(|e| RuntimeError::Stopped(format!("{e:#}")))?;
            }
        }
        Ok(())
    }

    /// One thing: a batch fed, or a notice taken.
    fn turn(&mut self, control: &Control, ending: &mut Ending) -> Result<(), Fault> {
        while let Some(asked) = control.next() {
            self.asked(asked);
        }
        self.pursue_recut()?;
        self.adapt()?;
        self.settle_checkpoint()?;
        let halted = self.depart()?;
        // With steps under way, their reports come first.
        if !halted && self.fed < self.steps && self.fed < self.reported + AHEAD {
            let patience = if self.fed == self.reported { TICK } else { Duration::ZERO };
            match self.batches.next(self.fed, patience) {
                Ok((batch, profile)) => {
                    self.profiles.extend(profile.map(|p| (self.fed, p)));
                    self.commit_recut();
                    self.session.feed(self.fed, &batch)?;
                    self.fed += 1;
                    return self.checkpoint_if_due();
                }
                Err(Missing::Patience) => {}
                Err(Missing::Damaged(e)) => return Err(Fault::Problem(input(e))),
                Err(Missing::Ended) => {
                    *ending = Ending::DataEnded;
                    self.steps = self.fed;
                    return Ok(());
                }
            }
        }
        // Also with nothing under way: a worker may die while data is awaited.
        let under_way = self.fed > self.reported;
        match self.session.poll(if under_way || halted { TICK } else { Duration::ZERO })? {
            Some(notice) => self.take(notice),
            None => {
                self.check_workers()?;
                if under_way { self.look_for_hangs() } else { Ok(()) }
            }
        }
    }

    fn take(&mut self, notice: Notice) -> Result<(), Fault> {
        match notice {
            Notice::Step(report) => self.take_step(report),
            Notice::Progress { .. } => {
                if let Some(recut) = &mut self.recut {
                    recut.heard();
                }
                Ok(())
            }
            Notice::Begun => Ok(()),
            Notice::Ready(reports) => self.recut_ready(&reports),
            Notice::Refused { worker, message, .. } => {
                let why = format!("worker {worker} cannot prepare it: {message}");
                self.call_off_recut(&why);
                Ok(())
            }
            Notice::Saved { step, entries, seconds } => self.checkpoint_written(step, entries, seconds),
            Notice::NotSaved { step, message } => self.checkpoint_failed(step, &message),
        }
    }

    fn take_step(&mut self, report: StepReport) -> Result<(), Fault> {
        let elapsed = self.last_report.elapsed().as_secs_f64();
        self.last_report = Instant::now();
        self.last_sign = self.last_report;
        let record = &mut self.record;
        // The first step has no step before it to overlap with.
        let seconds = if report.step == self.first { report.seconds } else { elapsed };
        record.times.push(seconds);
        record.losses.push(report.loss);
        for worker in &report.workers {
            if let Some(seen) = record.workers.get_mut(&worker.worker) {
                seen.peak_rss = seen.peak_rss.max(worker.peak_rss);
            }
        }
        record.metrics.steps.inc();
        record.metrics.loss.set(report.loss.into());
        record.metrics.step_time.set(report.seconds);
        let profile = self.profiles.remove(&report.step);
        let traits = Traits {
            predicted: self.adapt.as_ref().and_then(|a| a.estimate(&report.variant, profile.as_ref())),
            interval: seconds,
            batch: profile,
            ahead: self.batches.ahead(),
        };
        self.dir.record(&report, self.session.incarnation(), &self.inputs.model.manifest, &traits)?;
        self.progress.step(&report);
        self.reported += 1;
        let now = self.now();
        // Steps beside the compiler say nothing about the devices.
        let disturbed = report.switch.is_some() || self.recut.as_ref().is_some_and(Recut::is_rehearsal);
        let learned = self.adapt.as_mut().filter(|_| !disturbed).map(|a| a.observe(&report, seconds, now));
        if let (Some(Ok(())), Some(adapt)) = (&learned, &self.adapt) {
            self.progress.learned(&self.inputs.digest, adapt.kinds());
        }
        if let Some(Err(e)) = learned {
            self.event("report not understood", json!({"why": e.to_string()}));
            self.progress.say(&format!("nothing is learned from step {}: {e}", report.step));
        }
        match report.switch {
            Some(switched) => self.recut_done(report.step, switched),
            None => Ok(()),
        }
    }

    /// Since the start.
    fn now(&self) -> Seconds {
        Seconds(self.began.elapsed().as_secs_f64())
    }

    /// Lets the loop beside the steps have its turn.
    fn adapt(&mut self) -> Result<(), Fault> {
        let now = self.now();
        self.look_at_workers(now);
        // A rehearsal makes way for anything.
        let in_flight = self.recut.as_ref().filter(|r| !r.is_rehearsal()).map(Recut::revision);
        let (step, left) = (self.reported, self.steps.saturating_sub(self.reported));
        let Some(adapt) = &mut self.adapt else { return Ok(()) };
        let next_revision = &mut self.next_revision;
        let mut revision = || {
            *next_revision += 1;
            *next_revision - 1
        };
        let advice = adapt.turn(self.inputs, step, left, now, in_flight, &mut revision)?;
        self.progress.recommend(adapt.recommended());
        match advice {
            Advice::Nothing => {}
            Advice::Say(text) => {
                self.progress.say(&text);
                self.event("decision", json!({"decision": text}));
            }
            Advice::Adopt(plan, why) => {
                self.progress.say(&why);
                self.event("decision", json!({"decision": why}));
                self.begin_recut(*plan, why, None);
            }
            Advice::Rehearse(plan) => self.begin_rehearsal(*plan),
        }
        Ok(())
    }

    /// Takes in, once in a while, what processes have used.
    fn look_at_workers(&mut self, now: Seconds) {
        let Some(adapt) = &mut self.adapt else { return };
        for worker in seats(&self.record.plan) {
            let before = self.used.get(&worker).copied();
            if before.is_some_and(|(at, _)| now < at + LOOK_EVERY) {
                continue;
            }
            let Some(used) = self.workers.used(worker) else { continue };
            self.used.insert(worker, (now, used));
            let baseline = self.record.workers.get(&worker).map_or(0, |seen| seen.ready.baseline_rss);
            if let Some((at, before)) = before.filter(|(_, before)| before.cpu <= used.cpu) {
                let memory = used.memory - Bytes(baseline);
                adapt.used(DeviceId(worker), now, now - at, &Used { cpu: used.cpu - before.cpu, memory });
            }
        }
    }

    fn remember(&mut self, reports: &[(WorkerId, ReadyReport)]) {
        for (rank, (worker, ready)) in reports.iter().enumerate() {
            let seen = self.record.workers.entry(*worker).or_default();
            *seen = Seen { rank, ready: ready.clone(), ..seen.clone() };
        }
    }

    /// Writes a plan that is in force or about to be to the run directory.
    fn show(&mut self, plan: &Plan, why: &str) {
        self.progress.plan(plan, why);
        let topology = self.topology(plan);
        let model = &self.inputs.model;
        for (rank, worker) in seats(plan).into_iter().enumerate() {
            let planned = plan.shards[rank % plan.shards.len()].memory;
            let seen = self.record.workers.entry(worker).or_default();
            *seen = Seen { rank, planned, ..seen.clone() };
        }
        let svg = picture::svg(plan, model, &topology);
        let json = serde_json::to_string(plan).expect("a plan is plain data");
        let revision = plan.revision;
        let written = self
            .dir
            .write("plan.json", &json)
            .and_then(|()| self.dir.write("plan.svg", &svg))
            .and_then(|()| self.dir.write_plan(revision, &json, &svg));
        if let Err(e) = written {
            // Training is worth more than its pictures.
            self.progress.say(&format!("{e:#}"));
        }
        self.explain(plan, topology);
    }

    /// Has a plan explained to whoever asks about the job. That takes a dozen other plans: nobody waits for it.
    fn explain(&self, plan: &Plan, topology: Topology) {
        let Some(board) = self.progress.board().cloned() else { return };
        let topology = match &self.adapt {
            Some(adapt) => adapt.at_present(topology),
            None => Calibration::starting_from(self.inputs.known.clone()).correct(topology),
        };
        let (model, prepared, plan) = (self.inputs.model.clone(), self.inputs.prepared.clone(), plan.clone());
        let explain = move || match explained(&prepared, &model, &topology, &plan) {
            Ok(explanation) => board.explained(plan.revision, explanation.in_short()),
            Err(e) => tracing::warn!(plan = plan.revision, why = e.to_string(), "a plan is not explained"),
        };
        if let Err(e) = background("explain", explain) {
            self.progress.say(&format!("the plan is not explained: {e:#}"));
        }
    }

    /// Appends to `events.jsonl`: seconds since the start, the step that was last fed, and what happened.
    fn event(&mut self, what: &str, facts: Value) {
        let mut event = json!({
            "event": what, "seconds": self.began.elapsed().as_secs_f64(), "step": self.fed,
            "revision": self.record.plan.revision,
        });
        if let (Some(event), Value::Object(facts)) = (event.as_object_mut(), facts) {
            event.extend(facts);
        }
        if let Err(e) = self.dir.event(&event) {
            self.progress.say(&format!("{e:#}"));
        }
    }

    fn take_revision(&mut self) -> u64 {
        let revision = self.next_revision;
        self.next_revision += 1;
        revision
    }
}

fn check_interrupts(interrupts: &AtomicU32, tolerated: u32) -> Result<(), RuntimeError> {
    match interrupts.load(Ordering::SeqCst) {
        n if n <= tolerated => Ok(()),
        _ => Err(RuntimeError::Stopped("stopped on request".to_owned())),
    }
}

/// The worker on every seat, by rank: worker N runs on device N.
fn seats(plan: &Plan) -> Vec<WorkerId> {
    let n_replicas = plan.n_replicas as usize;
    (0..n_replicas).flat_map(|r| plan.shards.iter().map(move |s| s.devices[r].0)).collect()
}

/// Work on a thread of its own, and where its result comes out.
fn background<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<std::sync::mpsc::Receiver<T>> {
    let (done, result) = std::sync::mpsc::channel();
    let run = move || {
        // On one machine workers compute on all cores.
        affinity::yield_to_others();
        drop(done.send(work()));
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).context("cannot start a thread")?;
    Ok(result)
}
