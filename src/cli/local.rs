//! `foreshard local`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;

use super::bad_input;
use super::plugin::{PluginArgs, user_cache};
use super::worker::TOKEN;
use crate::local::control::{Request, ask};
use crate::local::run::{Ending, Options, Problem, run as train};
use crate::runtime::fail::Fail;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    Run(RunArgs),
    Recut(RecutArgs),
    Approve(ApproveArgs),
}

/// Agree to the plan that a running job recommends (spec.adaptation.mode: Recommend).
#[derive(Debug, clap::Args)]
pub struct ApproveArgs {
    /// Run directory of the job.
    run_dir: PathBuf,
}

/// Give a running job another plan, between two of its steps.
///
/// Workers that join are started, workers that are no longer needed leave. Training goes on while the plan is prepared;
/// the answer comes when it is in force, or says why it is not.
///
/// Example: foreshard local recut runs/charlm-1 --shards 3
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("shape").required(true).multiple(true).args(["plan", "shards", "microbatch"])))]
pub struct RecutArgs {
    /// Run directory of the job.
    run_dir: PathBuf,
    /// This plan, as `foreshard plan -o` or a run wrote it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shards", "microbatch"])]
    plan: Option<PathBuf>,
    /// The best plan with so many shards.
    #[arg(long)]
    shards: Option<u32>,
    /// The best plan with so many rows in a microbatch.
    #[arg(long)]
    microbatch: Option<u64>,
}

/// Train a job on this machine: one worker process per shard, pinned to its cores.
///
/// The run directory holds the log (log.jsonl), the plan (plan.json, plan.svg), the loss curve (loss.svg), a timeline
/// for ui.perfetto.dev (timeline.json), the trained weights (weights.safetensors) and summary.json. Ctrl-C writes the
/// weights and stops; a second one stops at once.
///
/// Example: foreshard local run manifests/charlm.yaml --steps 50
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Manifest of a TrainingJob.
    job: PathBuf,
    /// Where results go; runs/NAME-N when absent.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Steps to take, instead of the manifest's.
    #[arg(long)]
    steps: Option<u64>,
    /// Shards, instead of the manifest's.
    #[arg(long)]
    shards: Option<u32>,
    /// Go on from a checkpoint: its directory, or that of an earlier run for its newest one.
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Steps whose work the timeline shows.
    #[arg(long, default_value_t = 20)]
    traced_steps: u64,
    /// No progress, only errors.
    #[arg(short, long)]
    quiet: bool,
    /// Where compiled executables are kept for the next time; ~/.cache/foreshard/executables when absent.
    #[arg(long, value_name = "DIR", env = "FORESHARD_CACHE", hide_env_values = true)]
    cache: Option<PathBuf>,
    /// Compile everything anew, and keep nothing.
    #[arg(long)]
    no_cache: bool,
    /// Let a worker fail on purpose: WORKER=HOW@POINT, for tests of survival.
    #[arg(long, hide = true, value_parser = failure)]
    fail: Vec<(u32, String)>,
    #[command(flatten)]
    plugin: PluginArgs,
}

fn failure(text: &str) -> Result<(u32, String), String> {
    let (worker, fail) = text.split_once('=').ok_or("not WORKER=HOW@POINT")?;
    fail.parse::<Fail>()?;
    Ok((worker.parse().map_err(|e| format!("worker {worker:?}: {e}"))?, fail.to_owned()))
}

pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    let args = match command {
        Command::Run(args) => args,
        Command::Recut(args) => return recut(args),
        Command::Approve(args) => return tell(&args.run_dir, &Request::Approve { revision: None }),
    };
    let options = Options {
        job: args.job,
        run_dir: args.run_dir,
        steps: args.steps,
        shards: args.shards,
        resume: args.resume,
        traced_steps: args.traced_steps,
        quiet: args.quiet,
        plugin: args.plugin.spec(),
        storage: environment(),
        token_variable: TOKEN,
        xla_flags: std::env::var("XLA_FLAGS").unwrap_or_default(),
        cache: if args.no_cache { None } else { args.cache.or_else(|| Some(user_cache()?.join("executables"))) },
        fail: args.fail.into_iter().collect(),
        interrupts: interrupts()?,
        remote: None,
    };
    match train(&options) {
        Ok(Ending::Done | Ending::DataEnded) => Ok(ExitCode::SUCCESS),
        Ok(Ending::Interrupted) => Ok(ExitCode::from(130)),
        Err(Problem::Input(e)) => Err(bad_input(e)),
        Err(Problem::Failed(e)) => Err(e),
    }
}

fn recut(args: RecutArgs) -> anyhow::Result<ExitCode> {
    let plan = match &args.plan {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("--plan {}", path.display()));
            let plan = serde_json::from_str(&text.map_err(bad_input)?);
            Some(plan.with_context(|| format!("--plan {}: not a plan", path.display())).map_err(bad_input)?)
        }
        None => None,
    };
    let request = Request::Recut { plan, shards: args.shards, microbatch: args.microbatch };
    tell(&args.run_dir, &request)
}

/// Asks a running job, and prints its answer.
fn tell(run_dir: &Path, request: &Request) -> anyhow::Result<ExitCode> {
    match ask(run_dir, request).map_err(bad_input)? {
        Ok(done) => {
            println!("{done}");
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => Err(bad_input(anyhow::anyhow!(why))),
    }
}

/// The environment, as far as it is text.
pub fn environment() -> Vec<(String, String)> {
    std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect()
}

/// Counts Ctrl-C and SIGTERM.
pub fn interrupts() -> anyhow::Result<Arc<AtomicU32>> {
    let count = Arc::new(AtomicU32::new(0));
    let counted = count.clone();
    on_signal(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    })?;
    Ok(count)
}

/// Does something at every Ctrl-C and SIGTERM from now on. Without it the first process of a container hears neither.
pub fn on_signal(mut act: impl FnMut() + Send + 'static) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let guard = runtime.enter();
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    drop(guard);
    let listen = async move {
        loop {
            tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
            act();
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || runtime.block_on(listen)).map(drop)
}
