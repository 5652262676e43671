//! `foreshard local run`: plan, start workers, feed, report, collect.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde_json::json;

use super::bundle;
use super::charts;
use super::progress::{Progress, thousands};
use super::run_dir::RunDir;
use super::workers::{Spawn, Workers};
use crate::api;
use crate::device::inventory::Cpu;
use crate::device::pjrt::PluginSpec;
use crate::graph::Model;
use crate::plan::{self, Plan, picture, solve, table};
use crate::runtime::session::Launch;
use crate::runtime::{Rendezvous, RuntimeError, Session, StepReport};
use crate::telemetry::JobMetrics;
use crate::topology::{Device, LOOPBACK, Topology, nominal};
use crate::trainer::{DataError, Reader};
use crate::units::{Bytes, Seconds};
use crate::wire::{Batch, Position};

/// What a user asks for.
pub struct Options {
    pub job: PathBuf,
    pub run_dir: Option<PathBuf>,
    /// Instead of the manifest's.
    pub steps: Option<u64>,
    pub shards: Option<u32>,
    pub traced_steps: u64,
    pub quiet: bool,
    pub plugin: PluginSpec,
    /// Credentials and endpoints of object stores.
    pub storage: Vec<(String, String)>,
    /// Environment variable that carries the job's secret to workers.
    pub token_variable: &'static str,
    /// The user's own flags for XLA.
    pub xla_flags: String,
    /// Counts requests to stop: one is orderly, two at once.
    pub interrupts: Arc<AtomicU32>,
}

/// How a run ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Done,
    /// Stopped on request; weights are written unless it came before the first step.
    Interrupted,
    /// A feeder had less data than the job has steps; weights are written.
    DataEnded,
}

/// Why a run did not end well.
pub enum Problem {
    /// The user's input: nothing has been started.
    Input(anyhow::Error),
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Problem {
    fn from(e: E) -> Self {
        Problem::Failed(e.into())
    }
}

fn input<E: Into<anyhow::Error>>(e: E) -> Problem {
    Problem::Input(e.into())
}

/// How often the loop looks at signals and workers while it waits.
const TICK: Duration = Duration::from_millis(50);
/// Steps that may be fed before the first is reported.
const AHEAD: u64 = 2;

/// Everything that is known before anything is started.
struct Prepared {
    job: api::TrainingJob,
    yaml: String,
    bundle: PathBuf,
    weights: Option<PathBuf>,
    model: Arc<Model>,
    topology: Topology,
    plan: Plan,
    /// By rank.
    cores: Vec<Vec<usize>>,
    steps: u64,
    reader: Reader,
}

/// Runs a job to its end.
pub fn run(options: &Options) -> Result<Ending, Problem> {
    let plugin = options.plugin.find().map_err(input)?;
    // A file that is no plug-in is refused here, before a run directory and workers exist.
    plugin.version().map_err(input)?;
    let prepared = prepare(options)?;
    let steps = prepared.steps;
    let name = prepared.job.metadata.name.clone().unwrap_or_else(|| "job".to_owned());
    let mut dir = RunDir::create(options.run_dir.as_deref(), &name).map_err(input)?;
    let (plan, model) = (prepared.plan.clone(), prepared.model.clone());
    dir.write("job.yaml", &prepared.yaml)?;
    dir.write("plan.json", &serde_json::to_string(&plan)?)?;
    dir.write("plan.svg", &picture::svg(&plan, &model, &prepared.topology))?;
    if !options.quiet {
        eprint!("{}", table::render(&plan, &model, &prepared.topology));
    }
    let (unit, per_step) = units_per_step(&model);
    let mut progress = Progress::new(options.quiet, prepared.steps, unit, per_step);

    let rendezvous = Rendezvous::bind(prepared.cores.len() as u32)?;
    let mut workers = Workers::start(&Spawn {
        connect: rendezvous.address(),
        token: rendezvous.token(),
        token_variable: options.token_variable,
        xla_flags: &options.xla_flags,
        plugin: plugin.path(),
        plugin_sha256: options.plugin.sha256.as_deref(),
        run_dir: dir.path(),
        cores: &prepared.cores,
    })?;
    dir.write("pids.json", &json!(workers.pids()).to_string())?;
    let began = Instant::now();
    let launch = Launch {
        bundle: prepared.bundle.clone(),
        model: model.clone(),
        plan: plan.clone(),
        seed: prepared.job.spec.seed.into(),
        weights: prepared.weights.clone(),
        traced_steps: options.traced_steps,
    };
    let interrupted = || options.interrupts.load(Ordering::SeqCst) > 0;
    let started = rendezvous.start(
        launch,
        &mut || {
            if interrupted() {
                return Err(RuntimeError::Stopped("stopped before the first step".to_owned()));
            }
            workers.check()
        },
        &mut |done, of| progress.compiling(done, of),
    );
    let session = match started {
        Ok(session) => session,
        Err(_) if interrupted() => {
            dir.write("summary.json", &unfinished(&model, "interrupted", 0, None))?;
            return Ok(Ending::Interrupted);
        }
        Err(e) => {
            let e = workers.explain(e).into();
            dir.write("summary.json", &unfinished(&model, "failed", 0, Some(&e)))?;
            return Err(Problem::Failed(e));
        }
    };
    let compiled = began.elapsed();
    progress.say(&format!("compiled in {:.1} s, training", compiled.as_secs_f64()));

    let mut training = Training {
        dir: &mut dir,
        progress: &mut progress,
        workers: &mut workers,
        losses: Vec::new(),
        times: Vec::new(),
        peak_rss: vec![0; prepared.cores.len()],
        metrics: JobMetrics::default(),
    };
    let memory: Vec<_> = session.memory().cloned().collect();
    let outcome = training.train(session, prepared, &options.interrupts);
    let Training { losses, times, peak_rss, metrics, .. } = training;
    progress.finish();
    // Whatever happened, what was seen so far stays.
    dir.write("loss.svg", &charts::loss(&name, &losses)?)?;
    dir.write_timeline()?;
    dir.write("metrics.prom", &metrics.render())?;
    let ending = match outcome {
        Ok(ending) => ending,
        Err(problem) => {
            let (Problem::Input(e) | Problem::Failed(e)) = &problem;
            dir.write("summary.json", &unfinished(&model, "failed", losses.len(), Some(e)))?;
            return Err(problem);
        }
    };
    workers.join(Duration::from_secs(10));

    let median = median(&times);
    let summary = json!({
        "model": model.manifest.name,
        "ending": match ending {
            Ending::Done => "done",
            Ending::Interrupted => "interrupted",
            Ending::DataEnded => "data ended",
        },
        "steps": losses.len(),
        "loss": {"first": losses.first(), "last": losses.last()},
        "step_seconds": {"median": median, "predicted": plan.step_time.0, "bound": plan.bound.0},
        format!("{unit}_per_second"): per_step / median,
        "compile_seconds": compiled.as_secs_f64(),
        "plan": {
            "revision": plan.revision, "shards": plan.shards.len(), "replicas": plan.n_replicas,
            "microbatch": plan.microbatch, "microbatches": plan.n_microbatches, "bytes_cut": plan.bytes_cut.0,
        },
        "workers": memory.iter().zip(&peak_rss).enumerate().map(|(rank, (m, peak))| json!({
            "rank": rank,
            "memory": {
                "planned": plan.shards[rank % plan.shards.len()].memory.0,
                "compiled": m.state_bytes + m.gradient_bytes + m.residual_bytes + m.temporary_bytes,
                "peak_rss": peak, "baseline_rss": m.baseline_rss,
            },
        })).collect::<Vec<_>>(),
        "foreshard": env!("CARGO_PKG_VERSION"),
        "exporter": model.manifest.provenance,
    });
    dir.write("summary.json", &serde_json::to_string_pretty(&summary)?)?;
    if !options.quiet {
        eprintln!(
            "{} steps, loss {:.4} -> {:.4}, {} per step (predicted {}), {} {unit}/s; results in {}",
            losses.len(),
            losses.first().copied().unwrap_or(f32::NAN),
            losses.last().copied().unwrap_or(f32::NAN),
            Seconds(median),
            plan.step_time,
            thousands(per_step / median),
            dir.path().display()
        );
    }
    if ending == Ending::DataEnded {
        let (done, weights) = (losses.len(), dir.weights());
        let weights = weights.display();
        return Err(input(anyhow!(
            "spec.data: the data ended after {done} of {steps} steps; their weights are in {weights}"
        )));
    }
    Ok(ending)
}

/// `summary.json` of a run that did not come to its end.
fn unfinished(model: &Model, ending: &str, steps: usize, error: Option<&anyhow::Error>) -> String {
    let error = error.map(|e| format!("{e:#}"));
    let summary = json!({
        "model": model.manifest.name, "ending": ending, "steps": steps, "error": error,
        "foreshard": env!("CARGO_PKG_VERSION"), "exporter": model.manifest.provenance,
    });
    format!("{summary:#}\n")
}

fn prepare(options: &Options) -> Result<Prepared, Problem> {
    let path = options.job.display();
    let yaml = std::fs::read_to_string(&options.job).with_context(|| format!("{path}")).map_err(input)?;
    let job = api::parse(&yaml).map_err(|e| input(anyhow!("{path}: {e}")))?;
    let spec = &job.spec;
    let bundle = PathBuf::from(&spec.bundle);
    let model = Arc::new(bundle::load(&bundle).with_context(|| format!("bundle {}", spec.bundle)).map_err(input)?);
    let weights = match &spec.weights {
        Some(path) => Some(PathBuf::from(path)),
        // A bundle may bring its own start.
        None => model.manifest.weights.as_ref().map(|w| bundle.join(&w.file)),
    };
    if let Some(path) = weights.as_deref().filter(|p| !p.is_file()) {
        return Err(input(anyhow!("spec.weights: {} does not exist", path.display())));
    }
    let n_shards = options.shards.unwrap_or(spec.parallelism.shards);
    let n_ranks = n_shards.saturating_mul(spec.parallelism.replicas) as usize;
    let cpu = Cpu::probe();
    let cores = share_cores(&cpu.cores, n_ranks, spec.resources.cores).map_err(|e| input(anyhow!(e)))?;
    let memory = spec.resources.memory_bytes().map_err(|e| input(anyhow!(e)))?;
    let topology = topology(&cpu, &cores, memory);
    let problem = plan::Problem {
        model: &model,
        topology: &topology,
        n_shards,
        n_replicas: spec.parallelism.replicas,
        microbatch: spec.parallelism.microbatch,
        schedule: spec.parallelism.schedule.into(),
    };
    let plan = solve(&problem, None).map_err(input)?;
    let (data, seed) = (&spec.data, spec.seed.into());
    let start = Position::default();
    let reader = Reader::open(data, &model.manifest, plan.microbatch, seed, start, &options.storage).map_err(input)?;
    let steps = options.steps.unwrap_or(spec.steps);
    Ok(Prepared { yaml, bundle, weights, model, topology, plan, cores, steps, reader, job })
}

/// Cores of each worker: disjoint as long as there are enough, else shared in turn.
fn share_cores(all: &[usize], n_ranks: usize, asked: Option<u32>) -> Result<Vec<Vec<usize>>, String> {
    const MAX_WORKERS: usize = 4096;
    if n_ranks > MAX_WORKERS {
        return Err(format!("spec.parallelism: {n_ranks} workers on one machine, the limit is {MAX_WORKERS}"));
    }
    let each = asked.map_or((all.len() / n_ranks.max(1)).max(1), |c| c as usize);
    if each > all.len() {
        return Err(format!("spec.resources.cores: {each}, this machine has {}", all.len()));
    }
    Ok((0..n_ranks).map(|r| (0..each).map(|i| all[(r * each + i) % all.len()]).collect()).collect())
}

/// One device per worker, with nominal figures scaled by its cores.
fn topology(cpu: &Cpu, cores: &[Vec<usize>], memory: Option<u64>) -> Topology {
    let one = nominal("cpu").expect("CPUs are known");
    let share = Bytes(cpu.memory.0 / cores.len().max(1) as u64);
    // Workers that share cores share their speed.
    let used: usize = cores.iter().map(Vec::len).sum();
    let speed = (cpu.cores.len() as f64 / used.max(1) as f64).min(1.0);
    let devices = cores
        .iter()
        .enumerate()
        .map(|(i, c)| Device {
            name: format!("cpu{i}"),
            flops: one.flops * c.len() as f64,
            bandwidth: one.bandwidth * c.len() as f64,
            memory: memory.map_or(share, Bytes),
            speed,
            ..one.clone()
        })
        .collect();
    Topology { devices, local: LOOPBACK, remote: LOOPBACK }
}

/// What a step trains: tokens where the batch has them, else rows.
fn units_per_step(model: &Model) -> (&'static str, f64) {
    let tokens = model.manifest.batch.iter().find(|b| b.name == "tokens");
    match tokens {
        Some(t) => ("tokens", t.array().n_elements() as f64),
        None => ("rows", model.manifest.batch_size as f64),
    }
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Training<'a> {
    dir: &'a mut RunDir,
    progress: &'a mut Progress,
    workers: &'a mut Workers,
    losses: Vec<f32>,
    /// Seconds per step, from one report to the next.
    times: Vec<f64>,
    peak_rss: Vec<u64>,
    metrics: JobMetrics,
}

impl Training<'_> {
    fn train(&mut self, mut session: Session, prepared: Prepared, interrupts: &AtomicU32) -> Result<Ending, Problem> {
        let batches = in_background(prepared.reader)?;
        let (mut fed, mut reported) = (0u64, 0u64);
        let mut last = Instant::now();
        let mut steps = prepared.steps;
        let mut ending = Ending::Done;
        while reported < steps {
            match interrupts.load(Ordering::SeqCst) {
                0 => {}
                1 if ending != Ending::Interrupted => {
                    ending = Ending::Interrupted;
                    steps = fed;
                    self.progress.say("stopping: finishing the steps in flight, then writing the weights");
                    continue;
                }
                1 => {}
                _ => return Err(Problem::Failed(anyhow!("stopped at once; weights are not written"))),
            }
            // With steps under way, their reports come first.
            if fed < steps && fed < reported + AHEAD {
                let patience = if fed == reported { TICK } else { Duration::ZERO };
                match batches.recv_timeout(patience) {
                    Ok(batch) => {
                        let batch = batch.map_err(input)?;
                        self.explained(session.feed(fed, &batch.variant, &batch))?;
                        fed += 1;
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => {
                        ending = Ending::DataEnded;
                        steps = fed;
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
            // Also with nothing under way: a worker may die while data is awaited.
            let report = session.report(if fed > reported { TICK } else { Duration::ZERO });
            if let Some(report) = self.explained(report)? {
                let seconds = last.elapsed().as_secs_f64();
                last = Instant::now();
                self.take(&report, seconds, &prepared.model)?;
                reported += 1;
            } else {
                let alive = self.workers.check();
                self.explained(alive)?;
            }
        }
        let finished = session.finish(&self.dir.weights());
        self.explained(finished)?;
        Ok(ending)
    }

    fn take(&mut self, report: &StepReport, seconds: f64, model: &Model) -> anyhow::Result<()> {
        // The first step has no step before it to overlap with.
        self.times.push(if report.step == 0 { report.seconds } else { seconds });
        self.losses.push(report.loss);
        for worker in &report.workers {
            if let Some(peak) = self.peak_rss.get_mut(worker.rank as usize) {
                *peak = (*peak).max(worker.peak_rss);
            }
        }
        self.metrics.steps.inc();
        self.metrics.loss.set(report.loss.into());
        self.metrics.step_time.set(report.seconds);
        self.dir.record(report, &model.manifest)?;
        self.progress.step(report);
        Ok(())
    }

    fn explained<T>(&mut self, result: Result<T, RuntimeError>) -> Result<T, Problem> {
        result.map_err(|e| Problem::Failed(self.workers.explain(e).into()))
    }
}

/// Reads batches on a thread of its own: waiting for data must hide neither Ctrl-C nor a dead worker.
fn in_background(reader: Reader) -> anyhow::Result<Receiver<Result<Batch, DataError>>> {
    let (queue, batches) = sync_channel(1);
    let pump = move || {
        for batch in reader {
            if queue.send(batch).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("batches".to_owned()).spawn(pump).context("cannot start a thread")?;
    Ok(batches)
}
