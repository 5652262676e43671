//! A worker process: connects to the parent, gets ready for plans, runs them, and goes from one to the next.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::RuntimeError;
use super::checkpoint::Checkpoint;
use super::control::Control;
use super::depart::Departure;
use super::doors::Doors;
use super::executor::{Executor, Half};
use super::fail::Fail;
use super::feed::{Revisions, listen};
use super::kept::Kept;
use super::link::{Shared, Stamp};
use super::prepare::{self, Prepared, Workshop};
use super::switch::{Outcome, Retired, Switch};
use crate::device::cache::{ExecutableCache, Origin};
use crate::device::{Device, affinity, heap};
use crate::graph::{Model, Split};
use crate::telemetry::{Health, chain};
use crate::tls::{Identity, Name, Reader, Stream, is_refusal};
use crate::units::Bytes;
use crate::wire::control::{FailureClass, Prepare, ReadyReport, StepDone, ToParent, ToWorker, WorkerId};
use crate::wire::frame::{FrameError, Kind};

/// What a worker is told on its command line.
#[derive(Clone)]
pub struct WorkerConfig {
    /// Name of the job, for the log.
    pub job: String,
    /// Where the parent listens: a name or an address, with a port.
    pub connect: String,
    /// How long the parent may take to listen there.
    pub patience: Duration,
    /// Where this worker listens for its peers, by an address that they can reach.
    pub listen: SocketAddr,
    pub worker: WorkerId,
    /// Secret of the job: presented to the parent and to peers.
    pub token: String,
    /// Certificates are shown and asked for where there is one.
    pub identity: Option<Identity>,
    /// Where executables are kept, if they are.
    pub cache: Option<CacheConfig>,
    /// For tests of survival.
    pub fail: Option<Fail>,
    /// How this worker is told to go.
    pub departure: Arc<Departure>,
    /// What probes are told.
    pub health: Arc<Health>,
}

/// Executables on disk.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    pub directory: PathBuf,
    pub limit: Bytes,
    /// sha256 of the plug-in's file.
    pub plugin: String,
    /// Flags of this process that the plug-in reads.
    pub flags: String,
}

/// Fails on purpose, if the worker was told to.
fn reach(fail: &Option<Fail>, point: &str) {
    if let Some(fail) = fail {
        fail.reach(point);
    }
}

/// A line of the log: what has happened to this worker's part of a plan.
fn log<D: Device>(config: &WorkerConfig, part: &Shared<D>, what: &str) {
    let (stage, rank) = (part.me.map(|me| me.shard.0), part.me.map(|me| me.replica));
    tracing::info!(job = config.job, worker = config.worker, plan = part.stamp.revision, stage, rank, "{what}");
}

/// Runs a worker to its end. `device` is called with the first plan, `load` with that and with each that is of another
/// split than the one before; the error returned has been reported to the parent where that was possible.
pub fn run<D: Device>(
    config: &WorkerConfig,
    device: impl FnOnce() -> Result<D, RuntimeError>,
    load: impl Fn(&Path, &[Split]) -> Result<Model, RuntimeError>,
) -> Result<(), RuntimeError> {
    let doors = Doors::open(config.listen, config.token.clone(), config.identity.clone())?;
    let Stream { reader, writer } = dial(config).map_err(|source| {
        let address = config.connect.clone();
        RuntimeError::Connect { whom: "the parent".to_owned(), address, source }
    })?;
    let control = Arc::new(Control::new(writer));
    control.send(&ToParent::Hello {
        worker: config.worker,
        token: config.token.clone(),
        pid: std::process::id(),
        listen: doors.address(),
    })?;
    config.departure.dialled(&control);
    config.health.set_ready(true);
    tracing::info!(job = config.job, worker = config.worker, parent = config.connect, "dialled in");
    let revisions = Arc::new(Revisions::new());
    let mut worker = Worker {
        config,
        control: control.clone(),
        doors,
        revisions,
        site: None,
        running: None,
        switch: None,
        retired: Vec::new(),
        cancelled: Arc::default(),
        broken: false,
        idle: Duration::ZERO,
    };
    let result = worker.serve(reader, device, load);
    if let Err(fault) = &result {
        let _ = control.send(&ToParent::Failed { message: chain(fault), class: class(fault) });
    }
    result
}

/// Connects to the parent; until patience ends it may still be on its way, and so may its name.
fn dial(config: &WorkerConfig) -> std::io::Result<Stream> {
    const PAUSE: Duration = Duration::from_millis(250);
    let deadline = Instant::now() + config.patience;
    let once = || -> std::io::Result<Stream> {
        let address = config.connect.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
        prepare::dial(address, config.identity.as_ref(), Name::Head)
    };
    loop {
        match once() {
            Err(e) if !is_refusal(&e) && Instant::now() + PAUSE < deadline => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
}

/// Whether the cause lies with a peer, so that this worker can go on with another.
fn class(fault: &RuntimeError) -> FailureClass {
    match fault {
        RuntimeError::Link { .. }
        | RuntimeError::Connect { .. }
        | RuntimeError::Fenced(_)
        | RuntimeError::Stopped(_) => FailureClass::Peer,
        _ => FailureClass::Own,
    }
}

/// What a worker has from the first plan on.
struct Site<D: Device> {
    device: Arc<D>,
    model: Arc<Model>,
    cache: Option<Arc<ExecutableCache>>,
    kept: Arc<Kept<D>>,
}

/// A cache that cannot be had costs time, nothing else.
fn open_cache<D: Device>(config: &CacheConfig, device: &D) -> Option<ExecutableCache> {
    let origin = Origin { plugin: &config.plugin, flags: &config.flags };
    let opened = ExecutableCache::open(&config.directory, config.limit, device, origin);
    opened.map_err(|e| tracing::warn!("no cache of executables in {}: {e}", config.directory.display())).ok()
}

struct Worker<'a, D: Device> {
    config: &'a WorkerConfig,
    control: Arc<Control>,
    doors: Arc<Doors>,
    revisions: Arc<Revisions<D>>,
    site: Option<Site<D>>,
    running: Option<Executor<D>>,
    switch: Option<Switch<D>>,
    /// Plans that peers may still read from.
    retired: Vec<Retired<D>>,
    /// Set when the preparation under way is no longer wanted.
    cancelled: Arc<AtomicBool>,
    /// A peer was lost: steps mean nothing until the parent resets.
    broken: bool,
    /// Time spent waiting for orders since the last step.
    idle: Duration,
}

impl<D: Device> Worker<'_, D> {
    fn serve(
        &mut self,
        stream: Reader,
        device: impl FnOnce() -> Result<D, RuntimeError>,
        load: impl Fn(&Path, &[Split]) -> Result<Model, RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let (orders, inbox) = channel();
        let (revisions, control) = (self.revisions.clone(), self.control.clone());
        let idle = Arc::new(AtomicBool::new(false));
        let told = idle.clone();
        let health = self.config.health.clone();
        let read = move || {
            listen(stream, &revisions, &control, &told, &orders);
            health.end();
        };
        let broken = |e: std::io::Error| RuntimeError::Link { whom: "the parent".to_owned(), source: e.into() };
        std::thread::Builder::new().name("from-parent".to_owned()).spawn(read).map_err(broken)?;
        let mut device = Some(device);
        loop {
            idle.store(true, Ordering::SeqCst);
            let began = Instant::now();
            let order = inbox.recv();
            self.idle += began.elapsed();
            idle.store(false, Ordering::SeqCst);
            let closed = || RuntimeError::Link { whom: "the parent".to_owned(), source: FrameError::Closed };
            match order.unwrap_or_else(|_| Err(closed()))? {
                ToWorker::Prepare(order) => {
                    if let Some(device) = device.take() {
                        let device = Arc::new(device()?);
                        let cache = self.config.cache.as_ref().and_then(|c| open_cache(c, &*device)).map(Arc::new);
                        let model = Arc::new(load(&order.bundle, &order.plan.split)?);
                        self.site = Some(Site { device, model, cache, kept: Arc::default() });
                    }
                    // Before it trains in earnest a job may try the model in other parts.
                    if let Some(site) = self.site.as_mut().filter(|site| site.model.split != order.plan.split) {
                        site.model = Arc::new(load(&order.bundle, &order.plan.split)?);
                    }
                    self.prepare(*order)?;
                }
                ToWorker::Finish => return self.finish(),
                order => self.obey(order)?,
            }
        }
    }

    fn obey(&mut self, order: ToWorker) -> Result<(), RuntimeError> {
        match order {
            ToWorker::Begin { revision, step, checkpoint } => self.begin(revision, step, checkpoint),
            ToWorker::Step { step, variant } => self.step(step, &variant),
            ToWorker::Commit { revision, step } if !self.broken => {
                let next = self.revisions.take(revision)?;
                self.switch = Some(Switch::begin(next, self.running.as_ref(), step));
                reach(&self.config.fail, "commit");
                Ok(())
            }
            ToWorker::Release { revision } => {
                reach(&self.config.fail, "release");
                self.retired.retain_mut(|plan| {
                    if plan.shared.stamp.revision <= revision {
                        plan.links.values_mut().for_each(super::link::Link::close);
                        self.revisions.remove(plan.shared.stamp.revision);
                        return false;
                    }
                    true
                });
                heap::tidy();
                Ok(())
            }
            ToWorker::Abort { revision } => {
                self.cancelled.store(true, Ordering::SeqCst);
                self.revisions.remove(revision);
                Ok(())
            }
            ToWorker::Save { step, path } => self.save(step, path),
            ToWorker::Reset { incarnation } => {
                self.cancelled.store(true, Ordering::SeqCst);
                (self.running, self.switch) = (None, None);
                self.retired.clear();
                self.broken = false;
                self.config.departure.holds(false);
                tracing::info!(job = self.config.job, worker = self.config.worker, incarnation, "called back");
                if self.config.departure.is_told() {
                    // Nothing of it is left to be saved: it need not wait for the next plan to do without it.
                    return Err(RuntimeError::Stopped("told to go".to_owned()));
                }
                self.control.send(&ToParent::Idle { incarnation })
            }
            // Handled by the caller, or overtaken by a failure.
            ToWorker::Prepare(_) | ToWorker::Finish | ToWorker::Ping | ToWorker::Commit { .. } => Ok(()),
        }
    }

    /// Gets ready on a thread of its own, which training has precedence over.
    fn prepare(&mut self, order: Prepare) -> Result<(), RuntimeError> {
        let Some(Site { device, model, cache, kept }) = &self.site else { return Ok(()) };
        self.cancelled = Arc::default();
        let (device, model, cache, kept) = (device.clone(), model.clone(), cache.clone(), kept.clone());
        let cancelled = self.cancelled.clone();
        let (control, doors, revisions) = (self.control.clone(), self.doors.clone(), self.revisions.clone());
        let config = self.config.clone();
        let in_background = self.running.is_some();
        let work = move || {
            if in_background {
                affinity::yield_to_others();
            }
            reach(&config.fail, "prepare");
            let revision = order.plan.revision;
            let mut progress = |compiled, of| {
                // A parent that is gone shows at the next read.
                let _ = control.send(&ToParent::Progress { revision, compiled, of });
            };
            let shop = Workshop {
                worker: config.worker,
                token: &config.token,
                identity: config.identity.as_ref(),
                device: &device,
                model: &model,
                cache: cache.as_deref(),
                kept: &kept,
                doors: &doors,
                cancelled: &cancelled,
                progress: &mut progress,
            };
            let said = match shop.prepare(order) {
                // Called off: nobody waits for an answer.
                _ if cancelled.load(Ordering::SeqCst) => return,
                Ok((prepared, report)) => {
                    let shared = prepared.shared.clone();
                    if !revisions.insert(prepared) {
                        return;
                    }
                    log(&config, &shared, "prepared");
                    ToParent::Ready { revision, report }
                }
                Err(RuntimeError::Unfinished { compiled, left }) => {
                    ToParent::Ready { revision, report: ReadyReport { compiled, left, ..ReadyReport::default() } }
                }
                Err(fault) => {
                    let (job, worker, why) = (&config.job, config.worker, chain(&fault));
                    tracing::warn!(job, worker, plan = revision, why, "cannot prepare");
                    ToParent::Refused { revision, message: why, class: class(&fault) }
                }
            };
            let _ = control.send(&said);
            reach(&config.fail, "ready");
        };
        let failed = |e: std::io::Error| RuntimeError::Link { whom: "the parent".to_owned(), source: e.into() };
        std::thread::Builder::new().name("prepare".to_owned()).spawn(work).map_err(failed)?;
        Ok(())
    }

    fn begin(&mut self, revision: u64, step: u64, checkpoint: Option<PathBuf>) -> Result<(), RuntimeError> {
        let Prepared { shared, links, programs, ceiling, seed, mut weights, .. } = self.revisions.take(revision)?;
        let (Some(programs), Some(me)) = (programs, shared.me) else {
            let message = format!("revision {revision} has no seat for worker {}", self.config.worker);
            return Err(RuntimeError::Protocol { whom: "the parent".to_owned(), message });
        };
        let model = shared.model.clone();
        let mut executor = Executor::new(shared, me, programs, ceiling, links, seed);
        match checkpoint {
            Some(path) => {
                let checkpoint = Checkpoint::load(&path)?;
                executor.restore(step, &mut |i| Ok(checkpoint.read(&model, i)?))?;
            }
            None => executor.init(&mut |i| match &mut weights {
                Some(weights) => weights.piece(&model, i),
                None => Ok(Vec::new()),
            })?,
        }
        log(self.config, &executor.shared, "begins");
        self.running = Some(executor);
        self.config.departure.holds(true);
        reach(&self.config.fail, "begin");
        self.control.send(&ToParent::Begun { revision })
    }

    fn step(&mut self, step: u64, variant: &str) -> Result<(), RuntimeError> {
        if self.broken {
            return Ok(());
        }
        reach(&self.config.fail, "step");
        let idle_s = std::mem::take(&mut self.idle).as_secs_f64();
        match self.run_step(step, variant) {
            Ok(done) => self.control.send(&ToParent::Report(StepDone { idle_s, ..done })),
            Err(fault) if class(&fault) == FailureClass::Peer => {
                self.broken = true;
                (self.running, self.switch) = (None, None);
                self.control.send(&ToParent::Failed { message: chain(&fault), class: FailureClass::Peer })
            }
            Err(fault) => Err(fault),
        }
    }

    fn run_step(&mut self, step: u64, variant: &str) -> Result<StepDone, RuntimeError> {
        let Some(switch) = self.switch.take_if(|s| s.step == step) else {
            return match &mut self.running {
                Some(executor) => executor.step(step, variant),
                None => {
                    let message = format!("step {step} without a plan");
                    Err(RuntimeError::Protocol { whom: "the parent".to_owned(), message })
                }
            };
        };
        let half = match &mut self.running {
            Some(executor) => executor.first_half(step, variant)?,
            None => Half::entering(step, switch.summed()),
        };
        reach(&self.config.fail, "moving");
        let Outcome { executor, retired, done } = switch.complete(self.running.take(), half)?;
        self.running = executor;
        self.config.departure.holds(self.running.is_some());
        if let Some(executor) = &self.running {
            log(self.config, &executor.shared, "switched");
        }
        self.retired.extend(retired);
        reach(&self.config.fail, "switched");
        Ok(done)
    }

    /// Writes what this worker owns, as it is now, beside the training.
    fn save(&mut self, step: u64, path: PathBuf) -> Result<(), RuntimeError> {
        let Some(executor) = self.running.as_ref().filter(|_| !self.broken) else { return Ok(()) };
        let snapshot = executor.snapshot();
        let (control, fail) = (self.control.clone(), self.config.fail.clone());
        let began = Instant::now();
        let write = move || {
            reach(&fail, "save");
            let said = match snapshot.write(&path) {
                Ok(entry) => ToParent::Saved { step, entry, seconds: began.elapsed().as_secs_f64() },
                Err(fault) => ToParent::NotSaved { step, message: chain(&fault) },
            };
            let _ = control.send(&said);
        };
        let failed = |e: std::io::Error| RuntimeError::Link { whom: "the parent".to_owned(), source: e.into() };
        std::thread::Builder::new().name("save".to_owned()).spawn(write).map_err(failed)?;
        Ok(())
    }

    /// Hands over the params and ends.
    fn finish(&mut self) -> Result<(), RuntimeError> {
        self.config.departure.holds(false);
        if let Some(executor) = &mut self.running {
            log(self.config, &executor.shared, "finishes");
            executor.links.values_mut().for_each(super::link::Link::close);
            let control = &self.control;
            executor
                .weights(&mut |param, data| control.write(Stamp::NONE.header(Kind::State, 0, param as u32, 0), data))?;
        }
        self.control.send(&ToParent::Done)
    }
}
