//! The driving side: launches a plan on workers, feeds batches, collects reports and weights.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::RuntimeError;
use super::link::Stamp;
use super::weights::WeightsFile;
use super::wiring::Wiring;
use super::worker::{parse, same_token};
use crate::graph::Model;
use crate::plan::Plan;
use crate::wire::control::{self, FailureClass, MAX_CONTROL, MAX_HELLO, ReadyReport, StepDone, ToParent, ToWorker};
use crate::wire::frame::{FrameError, Kind, read_message, write_message};
use crate::wire::{Batch, Tensor};

pub use crate::wire::control::Span;

/// How long workers may take to dial in; loading a plug-in comes after.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a worker that lost a peer is doubted: the peer's own story is better.
const DOUBT: Duration = Duration::from_secs(2);
/// How often `alive` is called while waiting.
const TICK: Duration = Duration::from_millis(50);

/// Everything the workers must know to run a plan.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Directory of the bundle; every worker reads it for itself.
    pub bundle: PathBuf,
    pub model: Arc<Model>,
    pub plan: Plan,
    /// Only the low 32 bits are used, as by JAX without 64-bit mode.
    pub seed: u64,
    /// Start weights (safetensors, by the manifest's names) instead of `init`'s params.
    pub weights: Option<PathBuf>,
    /// Report spans of the first so many steps.
    pub traced_steps: u64,
}

/// A listening socket for workers that are about to start.
pub struct Rendezvous {
    listener: TcpListener,
    address: SocketAddr,
    token: String,
    n_workers: u32,
}

/// What a worker's connection says.
enum Event {
    Said(ToParent),
    /// A state tensor: (index, data).
    State(usize, Vec<u8>),
    Closed(FrameError),
}

impl Rendezvous {
    /// Listens on loopback, on a free port. Rank of a worker = replica · n_shards + shard.
    pub fn bind(n_workers: u32) -> Result<Self, RuntimeError> {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let failed = |source| RuntimeError::Listen { address: at.to_string(), source };
        let listener = TcpListener::bind(at).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, token: secret().map_err(failed)?, n_workers })
    }

    /// Where workers dial: `foreshard worker --connect ADDRESS --rank RANK`, token in the environment.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Secret that a worker must present.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Waits for all workers, hands out the plan, and returns when every one has compiled its segments. `alive` is
    /// called while waiting; its error ends the wait (a child has died). `progress(compiled, of)` counts modules.
    pub fn start(
        self,
        launch: Launch,
        alive: &mut dyn FnMut() -> Result<(), RuntimeError>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Session, RuntimeError> {
        let wiring = Wiring::new(&launch.model, &launch.plan)?;
        let workers = self.gather(alive)?;
        let (to_session, events) = channel();
        let mut outboxes = Vec::new();
        let peers: Vec<SocketAddr> = workers.values().map(|(_, listen)| *listen).collect();
        for (rank, (stream, _)) in workers {
            outboxes.push(converse(rank, stream, to_session.clone())?);
        }
        let stamp = Stamp { revision: launch.plan.revision, incarnation: 0 };
        let order = ToWorker::Launch(Box::new(control::Launch {
            bundle: launch.bundle.clone(),
            plan: launch.plan.clone(),
            seed: launch.seed,
            incarnation: stamp.incarnation,
            weights: launch.weights.clone(),
            traced_steps: launch.traced_steps,
            peers,
        }));
        let mut session = Session {
            model: launch.model,
            plan: launch.plan,
            wiring,
            stamp,
            outboxes,
            events,
            reports: BTreeMap::new(),
            next_report: 0,
            ready: vec![None; self.n_workers as usize],
            done: BTreeSet::new(),
        };
        session.broadcast(&order);
        session.wait_ready(alive, progress)?;
        Ok(session)
    }

    /// One authenticated connection per rank, with the address where it listens for its peers.
    fn gather(
        &self,
        alive: &mut dyn FnMut() -> Result<(), RuntimeError>,
    ) -> Result<BTreeMap<u32, (TcpStream, SocketAddr)>, RuntimeError> {
        let failed = |source| RuntimeError::Listen { address: self.address.to_string(), source };
        self.listener.set_nonblocking(true).map_err(failed)?;
        let deadline = Instant::now() + PATIENCE;
        let mut workers = BTreeMap::new();
        while workers.len() < self.n_workers as usize {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    // Strangers are turned away; the rightful worker is still to come.
                    if let Ok((rank, stream, listen)) = self.greet(stream)
                        && rank < self.n_workers
                    {
                        workers.entry(rank).or_insert((stream, listen));
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    alive()?;
                    if Instant::now() > deadline {
                        let rank = (0..self.n_workers).find(|r| !workers.contains_key(r)).unwrap_or(0);
                        return Err(RuntimeError::NoShow { rank, seconds: PATIENCE.as_secs() });
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(source) => return Err(failed(source)),
            }
        }
        Ok(workers)
    }

    fn greet(&self, mut stream: TcpStream) -> Result<(u32, TcpStream, SocketAddr), RuntimeError> {
        let whom = || "a stranger".to_owned();
        let broken = |e: std::io::Error| RuntimeError::Link { whom: whom(), source: e.into() };
        stream.set_nonblocking(false).map_err(broken)?;
        stream.set_nodelay(true).map_err(broken)?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(broken)?;
        let read = read_message(&mut stream, MAX_HELLO);
        let (header, message) = read.map_err(|source| RuntimeError::Link { whom: whom(), source })?;
        match parse(header.kind, &message, "a stranger")? {
            ToParent::Hello { rank, token, listen, .. } if same_token(&token, &self.token) => {
                stream.set_read_timeout(None).map_err(broken)?;
                Ok((rank, stream, listen))
            }
            _ => Err(RuntimeError::Protocol { whom: whom(), message: "no valid hello".to_owned() }),
        }
    }
}

/// 128 random bits from the kernel, in hex.
fn secret() -> std::io::Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// What waits to be written to a worker.
enum Letter {
    Order(Arc<Vec<u8>>),
    Rows { step: u64, tensor: u32, rows: bytes::Bytes },
}

struct Outbox {
    letters: Sender<Letter>,
}

/// Starts the two threads of a connection to a worker.
fn converse(rank: u32, stream: TcpStream, events: Sender<(u32, Event)>) -> Result<Outbox, RuntimeError> {
    let broken = |e: std::io::Error| RuntimeError::Link { whom: format!("worker {rank}"), source: e.into() };
    let mut writing = stream.try_clone().map_err(broken)?;
    let mut reading = stream;
    let (letters, queue) = channel::<Letter>();
    let write = move || {
        while let Ok(letter) = queue.recv() {
            let stamp = Stamp { revision: 0, incarnation: 0 };
            let written = match letter {
                Letter::Order(json) => write_message(&mut writing, stamp.header(Kind::Control, 0, 0, 0), &json),
                Letter::Rows { step, tensor, rows } => {
                    write_message(&mut writing, stamp.header(Kind::Batch, step, tensor, 0), &rows)
                }
            };
            // The reading thread tells of a broken connection.
            if written.is_err() {
                return;
            }
        }
    };
    let read = move || {
        loop {
            let event = match read_message(&mut reading, u64::MAX) {
                Ok((header, data)) if header.kind == Kind::State => Event::State(header.channel as usize, data),
                Ok((header, data)) if header.total <= MAX_CONTROL => match parse(header.kind, &data, "the worker") {
                    Ok(said) => Event::Said(said),
                    Err(e) => Event::Said(ToParent::Failed { message: e.to_string(), class: FailureClass::Own }),
                },
                Ok((header, _)) => {
                    Event::Closed(FrameError::MessageTooLong { found: header.total, limit: MAX_CONTROL })
                }
                Err(e) => Event::Closed(e),
            };
            let last = matches!(event, Event::Closed(_));
            if events.send((rank, event)).is_err() || last {
                return;
            }
        }
    };
    std::thread::Builder::new().name(format!("tell-{rank}")).spawn(write).map_err(broken)?;
    std::thread::Builder::new().name(format!("hear-{rank}")).spawn(read).map_err(broken)?;
    Ok(Outbox { letters })
}

/// Workers in training.
pub struct Session {
    model: Arc<Model>,
    plan: Plan,
    wiring: Wiring,
    stamp: Stamp,
    /// By rank.
    outboxes: Vec<Outbox>,
    events: Receiver<(u32, Event)>,
    /// By step and rank.
    reports: BTreeMap<u64, BTreeMap<u32, StepDone>>,
    next_report: u64,
    ready: Vec<Option<ReadyReport>>,
    /// Ranks that have said they are done: their connections may close.
    done: BTreeSet<u32>,
}

impl Session {
    /// Sends one step's batch and returns at once; at most two steps may be ahead of the reports.
    pub fn feed(&mut self, step: u64, variant: &str, batch: &Batch) -> Result<(), RuntimeError> {
        let Some(grad) = self.model.variant(variant).filter(|g| self.plan.grads.contains_key(&g.name)) else {
            let known = self.plan.grads.keys().cloned().collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::UnknownVariant { found: variant.to_owned(), known });
        };
        let per_replica = u64::from(self.plan.n_microbatches);
        for (i, spec) in grad.batch.iter().enumerate() {
            // The global batch: the microbatch's rows, once for each microbatch of each replica.
            let mut expected = spec.array();
            if let Some(rows) = expected.dims.first_mut() {
                *rows *= per_replica * u64::from(self.plan.n_replicas);
            }
            let found = batch.tensors.get(i).map(|t| &t.shape);
            if found != Some(&expected) {
                return Err(RuntimeError::BatchShape {
                    name: spec.name.clone(),
                    variant: variant.to_owned(),
                    found: found.map_or("nothing".to_owned(), ToString::to_string),
                    expected: expected.to_string(),
                });
            }
        }
        self.broadcast(&ToWorker::Step { step, variant: variant.to_owned() });
        for rank in 0..self.wiring.n_ranks() {
            let place = self.wiring.rank(rank);
            for tensor in self.wiring.batch_tensors(&self.model, variant, place.shard) {
                let Tensor { data, .. } = &batch.tensors[tensor];
                let share = data.len() / self.plan.n_replicas as usize;
                let begin = share * place.replica as usize;
                let rows = data.slice(begin..begin + share);
                self.post(rank, Letter::Rows { step, tensor: tensor as u32, rows });
            }
        }
        Ok(())
    }

    /// The next step that all shards have finished, or `None` after `timeout`.
    pub fn report(&mut self, timeout: Duration) -> Result<Option<StepReport>, RuntimeError> {
        let deadline = Instant::now() + timeout;
        loop {
            let step = self.next_report;
            if self.reports.get(&step).is_some_and(|r| r.len() == self.outboxes.len()) {
                let done = self.reports.remove(&step).unwrap_or_default();
                self.next_report += 1;
                return Ok(Some(self.combine(step, &done)));
            }
            match self.next_event(deadline.saturating_duration_since(Instant::now()))? {
                None => return Ok(None),
                Some((rank, Event::Said(ToParent::Report(done)))) => {
                    self.reports.entry(done.step).or_default().insert(rank, done);
                }
                Some((rank, _)) => return Err(unexpected(rank)),
            }
        }
    }

    /// Collects the params of all owners into one safetensors file (written beside, then renamed) and ends the
    /// workers.
    pub fn finish(mut self, weights: &Path) -> Result<(), RuntimeError> {
        self.broadcast(&ToWorker::Finish);
        let model = self.model.clone();
        let mut file = WeightsFile::create(weights, &model)?;
        let deadline = Instant::now() + Duration::from_secs(600);
        while self.done.len() < self.outboxes.len() {
            match self.next_event(deadline.saturating_duration_since(Instant::now()))? {
                Some((rank, Event::Said(ToParent::Done))) => drop(self.done.insert(rank)),
                // A worker that is done leaves, perhaps before the others are.
                Some((_, Event::Said(ToParent::Report(_)) | Event::Closed(_))) => {}
                Some((rank, Event::State(param, data))) => {
                    let expected = model.state.get(param).filter(|_| param < model.n_params).map(|t| t.shape.bytes().0);
                    if expected != Some(data.len() as u64) {
                        let message = format!("state tensor {param} of {} bytes does not exist", data.len());
                        return Err(RuntimeError::Protocol { whom: format!("worker {rank}"), message });
                    }
                    file.put(param, &data)?;
                }
                Some((rank, _)) => return Err(unexpected(rank)),
                None => {
                    let message = "does not answer the order to finish".to_owned();
                    return Err(RuntimeError::Protocol { whom: "a worker".to_owned(), message });
                }
            }
        }
        file.finish()
    }

    /// What each rank says it will need, by rank.
    pub fn memory(&self) -> impl Iterator<Item = &ReadyReport> {
        self.ready.iter().flatten()
    }

    fn wait_ready(
        &mut self,
        alive: &mut dyn FnMut() -> Result<(), RuntimeError>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), RuntimeError> {
        let mut compiled = vec![(0u64, 0u64); self.outboxes.len()];
        while self.ready.iter().any(Option::is_none) {
            match self.next_event(TICK)? {
                None => alive()?,
                Some((rank, Event::Said(ToParent::Progress { compiled: n, of }))) => {
                    compiled[rank as usize] = (n.into(), of.into());
                    let sum = compiled.iter().fold((0, 0), |s, c| (s.0 + c.0, s.1 + c.1));
                    progress(sum.0, sum.1);
                }
                Some((rank, Event::Said(ToParent::Ready(report)))) => self.ready[rank as usize] = Some(report),
                Some((rank, _)) => return Err(unexpected(rank)),
            }
        }
        Ok(())
    }

    /// The next thing a worker says, or `None` after `timeout`; failures and lost connections are errors.
    fn next_event(&mut self, timeout: Duration) -> Result<Option<(u32, Event)>, RuntimeError> {
        let (rank, event) = match self.events.recv_timeout(timeout) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => return Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(RuntimeError::Stopped("all connections to workers are closed".to_owned()));
            }
        };
        let suspicion = fault(rank, &event).filter(|_| !self.done.contains(&rank));
        let Some(mut suspicion) = suspicion else { return Ok(Some((rank, event))) };
        // A worker that merely lost a peer is not the cause; give the cause a moment to show.
        let deadline = Instant::now() + DOUBT;
        while !matches!(suspicion, RuntimeError::WorkerFailed { .. }) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok((rank, event)) => {
                    if self.done.contains(&rank) {
                        continue;
                    }
                    if let Some(better @ RuntimeError::WorkerFailed { .. }) = fault(rank, &event) {
                        suspicion = better;
                    } else if let (Event::Closed(_), RuntimeError::WorkerLost { rank: blamed, message }) =
                        (&event, &mut suspicion)
                        && message.starts_with(PEER_LOST)
                        && *blamed != rank
                    {
                        *blamed = rank;
                        *message = "its connection closed".to_owned();
                    }
                }
                Err(_) => break,
            }
        }
        Err(suspicion)
    }

    fn combine(&self, step: u64, done: &BTreeMap<u32, StepDone>) -> StepReport {
        let n_metrics = self.model.manifest.metrics.len();
        let n = (self.plan.n_microbatches * self.plan.n_replicas) as f32;
        let mut sums = vec![0f32; 1 + n_metrics];
        for report in done.values() {
            for &(output, value) in &report.scalars {
                if let Some(sum) = sums.get_mut(output as usize) {
                    *sum += value;
                }
            }
        }
        let mut means = sums.into_iter().map(|s| s / n);
        let start = done.values().map(|d| d.start_us).min().unwrap_or(0);
        let end = done.values().map(|d| d.end_us).max().unwrap_or(0);
        StepReport {
            step,
            revision: self.stamp.revision,
            loss: means.next().unwrap_or(f32::NAN),
            metrics: means.collect(),
            seconds: end.saturating_sub(start) as f64 / 1e6,
            workers: done
                .iter()
                .map(|(&rank, d)| WorkerReport {
                    rank,
                    busy_s: d.busy_s,
                    wait_s: d.wait_s,
                    sent_bytes: d.sent_bytes,
                    received_bytes: d.received_bytes,
                    peak_rss: d.peak_rss,
                    spans: d.spans.clone(),
                })
                .collect(),
        }
    }

    fn broadcast(&self, order: &ToWorker) {
        let json = Arc::new(serde_json::to_vec(order).expect("control messages are plain data"));
        for rank in 0..self.outboxes.len() as u32 {
            self.post(rank, Letter::Order(json.clone()));
        }
    }

    /// A worker whose connection is broken gets nothing; its reading thread reports it.
    fn post(&self, rank: u32, letter: Letter) {
        let _ = self.outboxes[rank as usize].letters.send(letter);
    }
}

const PEER_LOST: &str = "lost a peer";

/// The error in what a worker says, if there is one.
fn fault(rank: u32, event: &Event) -> Option<RuntimeError> {
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

fn unexpected(rank: u32) -> RuntimeError {
    let message = "said something out of turn".to_owned();
    RuntimeError::Protocol { whom: format!("worker {rank}"), message }
}

/// One step, as measured by the workers.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    pub step: u64,
    pub revision: u64,
    /// Mean over the step's microbatches and replicas.
    pub loss: f32,
    /// In the manifest's order, means like the loss.
    pub metrics: Vec<f32>,
    /// Wall time from this step's first work to its last.
    pub seconds: f64,
    /// By rank.
    pub workers: Vec<WorkerReport>,
}

/// One worker's part of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerReport {
    pub rank: u32,
    /// Executing segments.
    pub busy_s: f64,
    /// Waiting for tensors of others.
    pub wait_s: f64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Highest resident memory of the process so far.
    pub peak_rss: u64,
    pub spans: Vec<Span>,
}
