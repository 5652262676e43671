//! The driving side: seats workers in a plan, feeds batches, collects reports, and takes everyone to the next plan.
//!
//! `session` knows nothing of processes: whoever starts and ends them says so through [`Session::lose`].

mod crew;
mod events;
mod hall;
mod losses;
mod pauses;
mod plans;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use self::crew::Crew;
use self::events::fault;
use self::hall::{Event, Hall, Letter, Outbox, Tagged, converse};
use self::pauses::Pauses;
use super::RuntimeError;
use super::weights::WeightsFile;
use crate::graph::Model;
use crate::plan::Plan;
use crate::tls::Stream;
use crate::wire::control::{FailureClass, ReadyReport, StepDone, ToParent, ToWorker, WorkerId};
use crate::wire::{Batch, Tensor};

pub use self::hall::Listen;
pub use self::report::{Answer, StepReport, WorkerReport};
pub use crate::wire::control::Span;

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

    /// Goes on with the bundle's model in other parts. Nothing runs: see [`Self::reset`].
    pub fn set_model(&mut self, model: Arc<Model>) {
        debug_assert!(self.current.is_none() && self.coming.is_none(), "a plan of the model before is in force");
        self.job.model = model;
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
