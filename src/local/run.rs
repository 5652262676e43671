//! `foreshard local run`: plan, start workers, feed, report, collect.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde_json::json;

use super::batches::Batches;
use super::board::Board;
use super::charts;
use super::control::{Control, ControlSocket};
use super::inputs::Inputs;
use super::progress::{Progress, thousands};
use super::run_dir::RunDir;
use super::train::{Record, Training};
use super::workers::{Launcher, Workers};
use crate::device::pjrt::{Plugin, PluginSpec};
use crate::graph::Model;
use crate::runtime::Session;
use crate::runtime::session::{Job, Listen};
use crate::topology::{Measured, Topology};
use crate::units::Seconds;
use crate::wire::control::WorkerId;

/// What a user asks for.
pub struct Options {
    pub job: PathBuf,
    pub run_dir: Option<PathBuf>,
    /// Instead of the manifest's.
    pub steps: Option<u64>,
    pub shards: Option<u32>,
    /// A checkpoint, or a directory that holds some, to go on from.
    pub resume: Option<PathBuf>,
    pub traced_steps: u64,
    pub quiet: bool,
    pub plugin: PluginSpec,
    /// Credentials and endpoints of object stores.
    pub storage: Vec<(String, String)>,
    /// Environment variable that carries the job's secret to workers.
    pub token_variable: &'static str,
    /// The user's own flags for XLA.
    pub xla_flags: String,
    /// Directory of compiled executables.
    pub cache: Option<PathBuf>,
    /// Workers that fail on purpose, and how: for tests of survival.
    pub fail: BTreeMap<WorkerId, String>,
    /// Counts requests to stop: one is orderly, two at once.
    pub interrupts: Arc<AtomicU32>,
    /// Workers come from other machines instead of being started here.
    pub remote: Option<Remote>,
}

/// Workers on other machines.
pub struct Remote {
    /// Worker N runs on device N.
    pub devices: Topology,
    pub listen: Listen,
    /// What earlier jobs have learned: by bundle, then by kind of device.
    pub profiles: BTreeMap<String, BTreeMap<String, Measured>>,
    /// Where the job shows how far it is.
    pub board: Arc<Board>,
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

/// Marks an error as one of the user's input.
pub fn input<E: Into<anyhow::Error>>(e: E) -> Problem {
    Problem::Input(e.into())
}

/// Runs a job to its end.
pub fn run(options: &Options) -> Result<Ending, Problem> {
    // Only this machine's workers need its plug-in. A file that is none is refused here, before a run directory exists.
    let plugin = match &options.remote {
        Some(_) => None,
        None => {
            let plugin = options.plugin.find().map_err(input)?;
            plugin.version().map_err(input)?;
            Some(plugin)
        }
    };
    let mut inputs = Inputs::read(options)?;
    let name = inputs.job.metadata.name.clone().unwrap_or_else(|| "job".to_owned());
    let (step, position) = inputs.start();
    let batches = Batches::open(&inputs, step, position).map_err(input)?;
    inputs.settle(options.steps, batches.per_pass)?;
    let mut dir = RunDir::create(options.run_dir.as_deref(), &name).map_err(input)?;
    dir.write("job.yaml", &inputs.yaml)?;
    let board = options.remote.as_ref().map(|r| r.board.clone());
    if let Some(board) = &board {
        board.write(|r| r.results = dir.path().display().to_string());
    }
    let mut progress = Progress::new(options.quiet, inputs.steps, step, units_per_step(&inputs.model), board);

    let job = Job {
        bundle: inputs.bundle.clone(),
        model: inputs.model.clone(),
        seed: inputs.job.spec.seed.into(),
        weights: inputs.weights.clone(),
        traced_steps: options.traced_steps,
    };
    let listen = options.remote.as_ref().map(|r| r.listen.clone()).unwrap_or_default();
    let session = Session::open(job, &listen)?;
    let launcher = plugin.as_ref().map(|p| launcher(options, p, &session, dir.path())).transpose()?;
    let mut workers = Workers::new(launcher);
    if let Some(note) = &inputs.note {
        progress.say(note);
    }
    let control = Control::default();
    if let Some(remote) = &options.remote {
        remote.board.hand_on(control.asking());
    }
    let socket = ControlSocket::open(dir.path(), control.asking());
    if let Err(e) = &socket {
        progress.say(&format!("recuts by hand are not possible: {e:#}"));
    }
    let began = Instant::now();
    let mut training = Training::new(&mut inputs, &mut dir, &mut progress, &mut workers, session, batches, options);
    let outcome = training.run(&control);
    drop(socket);
    let (record, finished) = training.finish(outcome.is_ok());
    let outcome = match finished {
        Err(e) if outcome.is_ok() => Err(Problem::Failed(workers.explain(e).into())),
        _ => outcome,
    };
    let Record { losses, times, workers: seen, metrics, compiled, plan, counts } = record;
    progress.finish();
    // Whatever happened, what was seen so far stays.
    dir.write("loss.svg", &charts::loss(&name, &losses)?)?;
    dir.write_timeline()?;
    dir.write("metrics.prom", &metrics.render())?;
    let ending = match outcome {
        Ok(ending) => ending,
        Err(problem) => {
            let (Problem::Input(e) | Problem::Failed(e)) = &problem;
            dir.write("summary.json", &unfinished(&inputs.model, "failed", losses.len(), Some(e)))?;
            return Err(problem);
        }
    };
    if losses.is_empty() && ending == Ending::Interrupted {
        dir.write("summary.json", &unfinished(&inputs.model, "interrupted", 0, None))?;
        return Ok(ending);
    }
    workers.join(Duration::from_secs(10));

    let model = &inputs.model;
    let (unit, per_step) = units_per_step(model);
    let median = median(&times);
    let summary = json!({
        "model": model.manifest.name,
        "ending": match ending {
            Ending::Done => "done",
            Ending::Interrupted => "interrupted",
            Ending::DataEnded => "data ended",
        },
        "first_step": step,
        "steps": losses.len(),
        "loss": {"first": losses.first(), "last": losses.last()},
        "step_seconds": {"median": median, "predicted": plan.step_time.0, "bound": plan.bound.0},
        format!("{unit}_per_second"): per_step / median,
        "seconds": began.elapsed().as_secs_f64(),
        "compile_seconds": compiled.as_secs_f64(),
        "plan": {
            "revision": plan.revision, "shards": plan.shards.len(), "replicas": plan.n_replicas,
            "microbatch": plan.microbatch, "microbatches": plan.n_microbatches, "bytes_cut": plan.bytes_cut.0,
        },
        "cutovers": counts.cutovers, "restarts": counts.restarts, "checkpoints": counts.checkpoints,
        "workers": seen.iter().map(|(worker, w)| json!({
            "worker": worker, "rank": w.rank,
            "memory": {
                "planned": w.planned.0,
                "compiled": w.ready.state_bytes + w.ready.gradient_bytes + w.ready.residual_bytes
                    + w.ready.temporary_bytes,
                "peak_rss": w.peak_rss, "baseline_rss": w.ready.baseline_rss, "compiling_rss": w.ready.compiling_rss,
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
        let (weights, steps) = (weights.display(), inputs.steps);
        return Err(input(anyhow!(
            "spec.data: the data ended after {done} of {steps} steps; their weights are in {weights}"
        )));
    }
    Ok(ending)
}

/// How this machine starts workers.
fn launcher(options: &Options, plugin: &Plugin, session: &Session, run_dir: &Path) -> anyhow::Result<Launcher> {
    Ok(Launcher {
        connect: session.address(),
        token: session.token().to_owned(),
        token_variable: options.token_variable,
        xla_flags: options.xla_flags.clone(),
        plugin: plugin.path().to_owned(),
        plugin_sha256: options.plugin.sha256.clone(),
        run_dir: run_dir.to_owned(),
        cache: match &options.cache {
            Some(directory) => Some((directory.clone(), plugin.sha256().context("cannot read the plug-in")?)),
            None => None,
        },
        fail: options.fail.clone(),
    })
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
