//! The driving side: seats workers in a plan, feeds batches, collects reports, and takes everyone to the next plan.
//!
//! `session` knows nothing of processes: whoever starts and ends them says so through [`Session::lose`].

mod crew;
mod hall;
mod pauses;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use self::crew::Crew;
use self::hall::{Event, Hall, Letter, Outbox, Tagged, converse};
use self::pauses::Pauses;
use self::report::combine;
use super::RuntimeError;
use super::weights::WeightsFile;
use crate::graph::Model;
use crate::plan::Plan;
use crate::tls::Stream;
use crate::wire::control::{FailureClass, Move, Prepare, ReadyReport, Seat, StepDone, ToParent, ToWorker, WorkerId};
use crate::wire::{Batch, Tensor};

pub use self::hall::Listen;
pub use self::report::{Answer, StepReport, WorkerReport};
pub use crate::wire::control::Span;

/// How long a worker that lost a peer is doubted: the peer's own story is better.
const DOUBT: Duration = Duration::from_secs(2);
/// How often `alive` is called while waiting.
const TICK: Duration = Duration::from_millis(50);

/// What is the same for every plan of a job.
#[derive(Clone, Debug)]
pub struct Job {
    /// Directory of the bundle; every worker reads it for itself.
    pub bundle: PathBuf,
    pub model: Arc<Model>,
    /// Only the low 32 bits are used, as by JAX without 64-bit mode.
    pub seed: u64,
    /// Start weights (safetensors, by the manifest's names) instead of `init`'s params.
    pub weights: Option<PathBuf>,
    /// Report spans of the first so many steps.
    pub traced_steps: u64,
}

/// What has happened.
#[derive(Debug)]
pub enum Notice {
    Step(StepReport),
    /// Executables of the plan being prepared, over all workers.
    Progress {
        compiled: u64,
        of: u64,
    },
    /// The plan being prepared can be committed.
    Ready(Vec<(WorkerId, ReadyReport)>),
    /// The plan cannot be prepared and has been called off; what runs goes on.
    Refused {
        worker: WorkerId,
        message: String,
        class: FailureClass,
    },
    /// All workers have their state.
    Begun,
    /// The step's checkpoint lies on disk, but for its index.
    Saved {
        step: u64,
        entries: Vec<Value>,
        seconds: f64,
    },
    /// A checkpoint could not be written.
    NotSaved {
        step: u64,
        message: String,
    },
}

/// A plan on its way in.
struct Coming {
    crew: Crew,
    phase: Phase,
    progress: BTreeMap<WorkerId, (u32, u32)>,
    reports: BTreeMap<WorkerId, ReadyReport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Preparing,
    Ready,
    /// Its first update is that of this step.
    Committed(u64),
}

/// A checkpoint on its way to the disk.
struct Saving {
    step: u64,
    missing: BTreeSet<WorkerId>,
    entries: Vec<Value>,
    seconds: f64,
}

/// A step that has been fed.
struct Fed {
    /// Revision that computes its gradients.
    revision: u64,
    /// By rank.
    seats: Vec<WorkerId>,
    microbatches: u32,
    variant: String,
    /// Who reports it.
    expected: BTreeSet<WorkerId>,
    reports: BTreeMap<WorkerId, StepDone>,
}

/// Workers of one job and the plan they run.
pub struct Session {
    job: Job,
    hall: Hall,
    patience: Duration,
    events: Receiver<Tagged>,
    to_session: Sender<Tagged>,
    workers: BTreeMap<WorkerId, Outbox>,
    n_connections: u64,
    incarnation: u32,
    current: Option<Crew>,
    coming: Option<Coming>,
    begun: BTreeSet<WorkerId>,
    fed: BTreeMap<u64, Fed>,
    pauses: Pauses,
    saving: Option<Saving>,
    /// Workers that have said they are done: their connections may close.
    done: BTreeSet<WorkerId>,
    /// Workers that have been told to go by somebody else, and stay for a moment: heard at any time, acted upon later.
    leaving: BTreeSet<WorkerId>,
    /// Nobody is admitted any more: a worker that has handed over its params may be started anew by whoever keeps it.
    finishing: bool,
}

impl Session {
    /// Listens for workers that are about to start.
    pub fn open(job: Job, listen: &Listen) -> Result<Self, RuntimeError> {
        let (to_session, events) = channel();
        Ok(Self {
            job,
            hall: Hall::open(listen, to_session.clone())?,
            patience: listen.patience,
            events,
            to_session,
            workers: BTreeMap::new(),
            n_connections: 0,
            incarnation: 0,
            current: None,
            coming: None,
            begun: BTreeSet::new(),
            fed: BTreeMap::new(),
            pauses: Pauses::default(),
            saving: None,
            done: BTreeSet::new(),
            leaving: BTreeSet::new(),
            finishing: false,
        })
    }

    /// Where workers dial: `foreshard worker --connect ADDRESS --worker N`, token in the environment.
    pub fn address(&self) -> SocketAddr {
        self.hall.address
    }

    /// Secret that a worker must present.
    pub fn token(&self) -> &str {
        &self.hall.token
    }

    pub fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// The plan that runs.
    pub fn plan(&self) -> Option<&Plan> {
        self.current.as_ref().map(|c| &c.plan)
    }

    /// Workers of the running plan, by rank.
    pub fn seats(&self) -> &[WorkerId] {
        self.current.as_ref().map(|c| &c.seats[..]).unwrap_or_default()
    }

    /// Whether a worker has dialled in and is here to stay.
    pub fn has(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|o| !o.closed) && !self.done.contains(&worker)
    }

    /// The plan whose update made the state as it is before `step`.
    pub fn plan_before(&self, step: u64) -> Option<&Plan> {
        Some(&self.crew_before(step)?.plan)
    }

    fn crew_before(&self, step: u64) -> Option<&Crew> {
        let committed = self.coming.as_ref().filter(|c| matches!(c.phase, Phase::Committed(at) if step > at));
        committed.map(|c| &c.crew).or(self.current.as_ref())
    }

    /// Waits until all of `workers` have dialled in. `alive` is called while waiting; its error ends the wait (a child
    /// has died).
    pub fn gather(
        &mut self,
        workers: &[WorkerId],
        alive: &mut dyn FnMut() -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let deadline = Instant::now() + self.patience;
        while let Some(&worker) = workers.iter().find(|w| self.workers.get(w).is_none_or(|o| o.closed)) {
            if Instant::now() > deadline {
                return Err(RuntimeError::NoShow { rank: worker, seconds: self.patience.as_secs() });
            }
            match self.events.recv_timeout(TICK) {
                Ok((worker, _, Event::Joined { stream, listen })) => self.admit(worker, *stream, listen)?,
                Ok((worker, connection, event)) => {
                    if self.is_current(worker, connection) {
                        self.hear(worker, &event);
                        if let Some(fault) = fault(worker, &event) {
                            return Err(fault);
                        }
                    }
                }
                Err(_) => alive()?,
            }
        }
        Ok(())
    }

    fn admit(&mut self, worker: WorkerId, stream: Stream, listen: SocketAddr) -> Result<(), RuntimeError> {
        self.n_connections += 1;
        let outbox = converse(worker, self.n_connections, stream, listen, self.to_session.clone())?;
        self.done.remove(&worker);
        self.leaving.remove(&worker);
        self.workers.insert(worker, outbox);
        Ok(())
    }

    /// Remembers what must not be lost, whatever else is being waited for.
    fn hear(&mut self, worker: WorkerId, event: &Event) {
        if matches!(event, Event::Said(ToParent::Leaving)) {
            self.leaving.insert(worker);
        }
    }

    /// Workers that have been told to go and are still here.
    pub fn leaving(&self) -> &BTreeSet<WorkerId> {
        &self.leaving
    }

    fn is_current(&self, worker: WorkerId, connection: u64) -> bool {
        self.workers.get(&worker).is_some_and(|o| o.connection == connection)
    }

    /// Lets workers get ready for a plan, each on a seat (by rank), while what runs goes on. [`Notice::Ready`] or
    /// [`Notice::Refused`] follows. `fresh`: its state will be made from the seed.
    ///
    /// # Errors
    /// [`RuntimeError::Busy`] while another plan is on its way; nothing has been sent then.
    pub fn prepare(&mut self, plan: Plan, seats: Vec<WorkerId>, fresh: bool) -> Result<(), RuntimeError> {
        if let Some(coming) = &self.coming {
            return Err(RuntimeError::Busy { revision: coming.crew.plan.revision });
        }
        let crew = Crew::new(&self.job.model, plan, seats)?;
        let moves = self.current.as_ref().map(|now| now.moves(&crew)).unwrap_or_default();
        let summed = self.current.as_ref().map_or(0, Crew::summed);
        let everyone = union(self.current.as_ref(), &crew);
        let seat = |&worker: &WorkerId| -> Result<Seat, RuntimeError> {
            let outbox = self.workers.get(&worker).filter(|o| !o.closed);
            let address = outbox.ok_or(RuntimeError::NoShow { rank: worker, seconds: 0 })?.listen;
            Ok(Seat { worker, address })
        };
        let seats: Vec<Seat> = crew.seats.iter().map(seat).collect::<Result<_, _>>()?;
        let leaving: Vec<Seat> =
            everyone.iter().filter(|w| !crew.seats.contains(w)).map(seat).collect::<Result<_, _>>()?;
        for &worker in &everyone {
            let mine = |m: &&Move| m.from == worker || m.to == worker;
            self.tell(
                worker,
                &ToWorker::Prepare(Box::new(Prepare {
                    bundle: self.job.bundle.clone(),
                    plan: crew.plan.clone(),
                    seed: self.job.seed,
                    incarnation: self.incarnation,
                    weights: self.job.weights.clone(),
                    traced_steps: self.job.traced_steps,
                    seats: seats.clone(),
                    leaving: leaving.clone(),
                    moves: moves.iter().filter(mine).copied().collect(),
                    summed,
                    fresh,
                })),
            );
        }
        let (progress, reports) = (BTreeMap::new(), BTreeMap::new());
        self.coming = Some(Coming { crew, phase: Phase::Preparing, progress, reports });
        Ok(())
    }

    /// Makes the prepared plan the running one where none runs: its state comes from the seed or from a checkpoint, and
    /// the next step is `step`. [`Notice::Begun`] follows.
    pub fn begin(&mut self, step: u64, checkpoint: Option<&Path>) {
        let Some(Coming { crew, .. }) = self.coming.take() else { return };
        let revision = crew.plan.revision;
        self.begun = crew.seats.iter().copied().collect();
        self.current = Some(crew);
        let checkpoint = checkpoint.map(Path::to_owned);
        self.tell_all(&self.begun.clone(), &ToWorker::Begin { revision, step, checkpoint });
    }

    /// Lets the prepared plan take over in the step that is fed next.
    pub fn commit(&mut self, step: u64) {
        let Some(coming) = self.coming.as_mut().filter(|c| c.phase == Phase::Ready) else { return };
        coming.phase = Phase::Committed(step);
        let revision = coming.crew.plan.revision;
        let everyone = union(self.current.as_ref(), &coming.crew);
        self.tell_all(&everyone, &ToWorker::Commit { revision, step });
    }

    /// Calls a plan off that has not been committed. Returns whether there was one.
    pub fn abort(&mut self) -> bool {
        let Some(coming) = self.coming.take_if(|c| !matches!(c.phase, Phase::Committed(_))) else { return false };
        let everyone = union(self.current.as_ref(), &coming.crew);
        self.tell_all(&everyone, &ToWorker::Abort { revision: coming.crew.plan.revision });
        true
    }

    /// Sends one step's batch and returns at once; at most two steps may be ahead of the reports.
    pub fn feed(&mut self, step: u64, batch: &Batch) -> Result<(), RuntimeError> {
        let committed = self.coming.as_ref().and_then(|c| match c.phase {
            Phase::Committed(at) => Some((at, &c.crew)),
            _ => None,
        });
        // The step after the commit is the new plan's; the one at it is everybody's.
        let crew = match (committed, &self.current) {
            (Some((at, next)), _) if step > at => next,
            (_, Some(now)) => now,
            _ => return Err(RuntimeError::Stopped("no plan runs".to_owned())),
        };
        let Some(grad) = crew.variant(&self.job.model, batch) else {
            let known = crew.plan.grads.keys().cloned().collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::UnknownVariant { found: batch.variant.clone(), known });
        };
        let summed = u64::from(crew.summed());
        for (spec, tensor) in grad.batch.iter().zip(&batch.tensors) {
            // The global batch: the microbatch's rows, once for each microbatch of each replica.
            let mut expected = spec.array();
            if let Some(rows) = expected.dims.first_mut() {
                *rows *= summed;
            }
            if tensor.shape != expected {
                return Err(RuntimeError::BatchShape {
                    name: spec.name.clone(),
                    variant: grad.name.clone(),
                    found: tensor.shape.to_string(),
                    expected: expected.to_string(),
                });
            }
        }
        let expected = match committed {
            Some((at, next)) if step == at => union(self.current.as_ref(), next),
            _ => crew.seats.iter().copied().collect(),
        };
        self.tell_all(&expected, &ToWorker::Step { step, variant: grad.name.clone() });
        for (rank, &worker) in crew.seats.iter().enumerate() {
            let place = crew.wiring.rank(rank as u32);
            for tensor in crew.wiring.batch_tensors(&self.job.model, &grad.name, place.shard) {
                let Tensor { data, .. } = &batch.tensors[tensor];
                let share = data.len() / crew.plan.n_replicas as usize;
                let begin = share * place.replica as usize;
                let rows = data.slice(begin..begin + share);
                self.post(worker, Letter::Rows { step, tensor: tensor as u32, rows });
            }
        }
        let (revision, microbatches) = (crew.plan.revision, crew.summed());
        let (seats, variant) = (crew.seats.clone(), grad.name.clone());
        self.fed.insert(step, Fed { revision, seats, microbatches, variant, expected, reports: BTreeMap::new() });
        Ok(())
    }

    /// Lets workers write their parts of a checkpoint to `file(shard)`, as they are before `step`. [`Notice::Saved`] or
    /// [`Notice::NotSaved`] follows. False while an earlier one is still being written.
    pub fn save(&mut self, step: u64, file: &dyn Fn(u32) -> PathBuf) -> bool {
        if self.saving.is_some() {
            return false;
        }
        let Some(crew) = self.crew_before(step) else { return false };
        // Replicas hold the same.
        let writers: Vec<WorkerId> = crew.seats[..crew.plan.shards.len()].to_vec();
        for (shard, &worker) in writers.iter().enumerate() {
            self.tell(worker, &ToWorker::Save { step, path: file(shard as u32) });
        }
        let missing = writers.into_iter().collect();
        self.saving = Some(Saving { step, missing, entries: Vec::new(), seconds: 0.0 });
        true
    }

    /// Waits no longer for a checkpoint; what workers still say of it is ignored.
    pub fn give_up_save(&mut self) {
        self.saving = None;
    }

    /// The next thing that happens, or `None` after `timeout`.
    ///
    /// # Errors
    /// A worker that failed or was lost: nothing more will come of the steps under way until [`Session::reset`].
    pub fn poll(&mut self, timeout: Duration) -> Result<Option<Notice>, RuntimeError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(report) = self.finished_step() {
                return Ok(Some(Notice::Step(report)));
            }
            let Some((worker, event)) = self.next_event(deadline.saturating_duration_since(Instant::now()))? else {
                return Ok(None);
            };
            if let Some(notice) = self.take(worker, event)? {
                return Ok(Some(notice));
            }
        }
    }

    fn take(&mut self, worker: WorkerId, event: Event) -> Result<Option<Notice>, RuntimeError> {
        self.hear(worker, &event);
        let said = match event {
            Event::Said(said) => said,
            Event::Joined { .. } => return Err(unexpected(worker)),
            // A worker that is done leaves, perhaps before the others are; one that was to join is missed.
            Event::Closed(e) => return Ok(self.missed(worker, e.to_string())),
            Event::State(..) => return Err(unexpected(worker)),
        };
        let coming = self.coming.as_mut();
        Ok(match said {
            ToParent::Progress { revision, compiled, of } => {
                coming.filter(|c| c.crew.plan.revision == revision).map(|coming| {
                    coming.progress.insert(worker, (compiled, of));
                    let sum =
                        coming.progress.values().fold((0, 0), |s, c| (s.0 + u64::from(c.0), s.1 + u64::from(c.1)));
                    Notice::Progress { compiled: sum.0, of: sum.1 }
                })
            }
            ToParent::Ready { revision, report } => {
                let Some(coming) = coming.filter(|c| c.crew.plan.revision == revision) else { return Ok(None) };
                coming.reports.insert(worker, report);
                let everyone = union(self.current.as_ref(), &coming.crew);
                if coming.reports.len() < everyone.len() {
                    return Ok(None);
                }
                coming.phase = Phase::Ready;
                let report = |w: &WorkerId| (*w, coming.reports[w].clone());
                Some(Notice::Ready(coming.crew.seats.iter().map(report).collect()))
            }
            ToParent::Refused { revision, message, class } => {
                if coming.is_some_and(|c| c.crew.plan.revision == revision) && self.abort() {
                    return Ok(Some(Notice::Refused { worker, message, class }));
                }
                None
            }
            ToParent::Begun { .. } => (self.begun.remove(&worker) && self.begun.is_empty()).then_some(Notice::Begun),
            ToParent::Report(done) => {
                if let Some(fed) = self.fed.get_mut(&done.step) {
                    fed.reports.insert(worker, done);
                }
                None
            }
            ToParent::Saved { step, entry, seconds } => {
                let Some(saving) = self.saving.as_mut().filter(|s| s.step == step) else { return Ok(None) };
                saving.missing.remove(&worker);
                saving.entries.push(entry);
                saving.seconds = saving.seconds.max(seconds);
                if !saving.missing.is_empty() {
                    return Ok(None);
                }
                let Some(Saving { entries, seconds, .. }) = self.saving.take() else { return Ok(None) };
                Some(Notice::Saved { step, entries, seconds })
            }
            ToParent::NotSaved { step, message } => {
                self.saving.take_if(|s| s.step == step).map(|_| Notice::NotSaved { step, message })
            }
            // Already heard.
            ToParent::Leaving => None,
            // The answer to a reset that was given up.
            ToParent::Idle { .. } => None,
            ToParent::Done => {
                self.done.insert(worker);
                None
            }
            ToParent::Failed { message, .. } => self.missed(worker, message),
            // The answer to a question that was given up.
            ToParent::Pong { .. } => None,
            ToParent::Hello { .. } => return Err(unexpected(worker)),
        })
    }

    /// A worker that nothing that runs depends on has failed: the plan it was to join is called off.
    fn missed(&mut self, worker: WorkerId, message: String) -> Option<Notice> {
        let joins = self.coming.as_ref().is_some_and(|c| c.crew.seats.contains(&worker));
        (joins && self.abort()).then_some(Notice::Refused { worker, message, class: FailureClass::Peer })
    }

    /// Whether training stands or falls with a worker.
    fn is_needed(&self, worker: WorkerId) -> bool {
        let committed = self.coming.as_ref().is_some_and(|c| matches!(c.phase, Phase::Committed(_)));
        !self.done.contains(&worker) && (committed || self.current.is_none() || self.seats().contains(&worker))
    }

    /// The oldest step, if everyone has reported it; after a cutover, the plan that follows takes over here too.
    fn finished_step(&mut self) -> Option<StepReport> {
        let fed = self.fed.first_entry()?;
        if fed.get().reports.len() < fed.get().expected.len() {
            return None;
        }
        let (step, fed) = fed.remove_entry();
        let mut report = combine(step, &fed, 1 + self.job.model.manifest.metrics.len());
        self.pauses.add(&mut report, &fed.reports);
        if let Some(coming) = self.coming.take_if(|c| c.phase == Phase::Committed(step)) {
            let switches = fed.reports.values().filter_map(|r| r.switch);
            report.switch = switches.reduce(|a, b| crate::wire::control::Switched {
                revision: a.revision,
                moved_bytes: a.moved_bytes + b.moved_bytes,
                pause_s: a.pause_s.max(b.pause_s),
            });
            let everyone = union(self.current.as_ref(), &coming.crew);
            if let Some(old) = self.current.replace(coming.crew) {
                self.tell_all(&everyone, &ToWorker::Release { revision: old.plan.revision });
            }
            let seats = self.seats().to_vec();
            for worker in everyone.into_iter().filter(|w| !seats.contains(w)) {
                // It has nothing left: it goes when it likes.
                self.tell(worker, &ToWorker::Finish);
                self.done.insert(worker);
            }
        }
        Some(report)
    }

    /// A worker's process has ended or is about to be ended: nothing is expected of it any more.
    pub fn lose(&mut self, worker: WorkerId) {
        self.leaving.remove(&worker);
        self.workers.remove(&worker);
    }

    /// Workers whose connections have closed.
    pub fn lost(&self) -> Vec<WorkerId> {
        self.workers.iter().filter(|(w, o)| o.closed && !self.done.contains(w)).map(|(&w, _)| w).collect()
    }

    /// Takes all workers that are left back to the state before their first plan, in a new incarnation: what the old one
    /// still sends is refused. Returns those that did not answer in time.
    pub fn reset(&mut self, patience: Duration) -> Vec<WorkerId> {
        self.incarnation += 1;
        (self.current, self.coming, self.saving) = (None, None, None);
        self.fed.clear();
        self.pauses.clear();
        self.begun.clear();
        let incarnation = self.incarnation;
        let mut missing: BTreeSet<WorkerId> = self.workers.keys().copied().collect();
        self.tell_all(&missing, &ToWorker::Reset { incarnation });
        let deadline = Instant::now() + patience;
        while !missing.is_empty() {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((worker, connection, event)) => match event {
                    Event::Joined { stream, listen } => drop(self.admit(worker, *stream, listen)),
                    Event::Said(ToParent::Idle { incarnation: i }) if i == incarnation => {
                        missing.remove(&worker);
                    }
                    Event::Closed(_) if self.is_current(worker, connection) => self.mark_closed(worker),
                    event if self.is_current(worker, connection) => self.hear(worker, &event),
                    _ => {}
                },
                Err(_) => break,
            }
        }
        missing.into_iter().collect()
    }

    /// Workers that do not answer although they should, or compute without end: asked one by one.
    ///
    /// To be called when no step has finished for far longer than one takes. Empty when all wait for each other.
    pub fn hung(&mut self, patience: Duration) -> Vec<WorkerId> {
        let asked: BTreeSet<WorkerId> = self.workers.keys().copied().filter(|w| !self.done.contains(w)).collect();
        self.tell_all(&asked, &ToWorker::Ping);
        let mut suspects = asked;
        let deadline = Instant::now() + patience;
        while !suspects.is_empty() {
            let Ok((worker, connection, event)) =
                self.events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            else {
                break;
            };
            match event {
                Event::Said(ToParent::Pong { waiting: true }) => drop(suspects.remove(&worker)),
                Event::Closed(_) if self.is_current(worker, connection) => self.mark_closed(worker),
                Event::Said(said) => drop(self.take(worker, Event::Said(said))),
                _ => {}
            }
        }
        suspects.into_iter().collect()
    }

    /// Collects the params of all owners into one safetensors file (written beside, then renamed) and ends the
    /// workers.
    pub fn finish(mut self, weights: &Path) -> Result<(), RuntimeError> {
        self.abort();
        self.finishing = true;
        let seats: BTreeSet<WorkerId> = self.seats().iter().copied().collect();
        let everyone: BTreeSet<WorkerId> = self.workers.keys().copied().collect();
        self.tell_all(&everyone, &ToWorker::Finish);
        let model = self.job.model.clone();
        let mut file = WeightsFile::create(weights, &model)?;
        let deadline = Instant::now() + Duration::from_secs(600);
        while !seats.is_subset(&self.done) {
            match self.next_event(deadline.saturating_duration_since(Instant::now()))? {
                Some((worker, Event::State(param, data))) => {
                    let expected = model.state.get(param).filter(|_| param < model.n_params).map(|t| t.shape.bytes().0);
                    if expected != Some(data.len() as u64) {
                        let message = format!("state tensor {param} of {} bytes does not exist", data.len());
                        return Err(RuntimeError::Protocol { whom: format!("worker {worker}"), message });
                    }
                    file.put(param, &data)?;
                }
                Some((worker, event)) => drop(self.take(worker, event)?),
                None => {
                    let message = "does not answer the order to finish".to_owned();
                    return Err(RuntimeError::Protocol { whom: "a worker".to_owned(), message });
                }
            }
        }
        file.finish()
    }

    fn mark_closed(&mut self, worker: WorkerId) {
        if let Some(outbox) = self.workers.get_mut(&worker) {
            outbox.closed = true;
        }
    }

    /// The next event that counts, or `None` after `timeout`; failures and lost connections are errors.
    fn next_event(&mut self, timeout: Duration) -> Result<Option<(WorkerId, Event)>, RuntimeError> {
        let deadline = Instant::now() + timeout;
        let mut suspicion: Option<(RuntimeError, Instant)> = None;
        loop {
            let until = suspicion.as_ref().map_or(deadline, |(_, until)| *until);
            let (worker, connection, event) =
                match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => return suspicion.map_or(Ok(None), |(fault, _)| Err(fault)),
                    Err(RecvTimeoutError::Disconnected) => {
                        return Err(RuntimeError::Stopped("all connections to workers are closed".to_owned()));
                    }
                };
            if let Event::Joined { stream, listen } = event {
                if self.finishing {
                    continue;
                }
                // One that was there has lost all it knew, whether or not the end of its connection was noticed.
                let anew = self.workers.contains_key(&worker) && self.is_needed(worker);
                self.admit(worker, *stream, listen)?;
                if anew {
                    let message = "it was started anew".to_owned();
                    let fault = RuntimeError::WorkerLost { rank: worker, message };
                    return Err(suspicion.map_or(fault, |(fault, _)| fault));
                }
                continue;
            }
            if !self.is_current(worker, connection) {
                continue;
            }
            if matches!(event, Event::Closed(_)) {
                self.mark_closed(worker);
            }
            let fault = fault(worker, &event).filter(|_| self.is_needed(worker));
            match (fault, &mut suspicion) {
                (None, None) => return Ok(Some((worker, event))),
                // Reports of the others mean nothing any more.
                (None, Some(_)) => {}
                (Some(certain @ RuntimeError::WorkerFailed { .. }), _) => return Err(certain),
                // A worker that merely lost a peer is not the cause; give the cause a moment to show.
                (Some(fault), None) => suspicion = Some((fault, Instant::now() + DOUBT)),
                (Some(_), Some((RuntimeError::WorkerLost { rank, message }, _)))
                    if matches!(event, Event::Closed(_)) && message.starts_with(PEER_LOST) =>
                {
                    (*rank, *message) = (worker, "its connection closed".to_owned());
                }
                (Some(_), Some(_)) => {}
            }
        }
    }

    fn tell(&self, worker: WorkerId, order: &ToWorker) {
        self.tell_all(&BTreeSet::from([worker]), order);
    }

    fn tell_all(&self, workers: &BTreeSet<WorkerId>, order: &ToWorker) {
        let json = Arc::new(serde_json::to_vec(order).expect("control messages are plain data"));
        for &worker in workers {
            self.post(worker, Letter::Order(json.clone()));
        }
    }

    /// A worker whose connection is broken gets nothing; its reading thread reports it.
    fn post(&self, worker: WorkerId, letter: Letter) {
        if let Some(outbox) = self.workers.get(&worker) {
            let _ = outbox.letters.send(letter);
        }
    }
}

/// Workers of two plans.
fn union(now: Option<&Crew>, next: &Crew) -> BTreeSet<WorkerId> {
    now.iter().flat_map(|c| &c.seats).chain(&next.seats).copied().collect()
}

const PEER_LOST: &str = "lost a peer";

/// The error in what a worker says, if there is one.
fn fault(rank: WorkerId, event: &Event) -> Option<RuntimeError> {
    match event {
        Event::Said(ToParent::Failed { message, class: FailureClass::Own }) => {
            Some(RuntimeError::WorkerFailed { rank, message: message.clone() })
        }
        Event::Said(ToParent::Failed { message, class: FailureClass::Peer }) => {
            Some(RuntimeError::WorkerLost { rank, message: format!("{PEER_LOST}: {message}") })
        }
        Event::Closed(e) => Some(RuntimeError::WorkerLost { rank, message: e.to_string() }),
        _ => None,
    }
}

fn unexpected(worker: WorkerId) -> RuntimeError {
    let message = "said something out of turn".to_owned();
    RuntimeError::Protocol { whom: format!("worker {worker}"), message }
}
