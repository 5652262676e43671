//! `foreshard head`: started by the operator, in the pod of the first worker, never by people.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use super::bad_input;
use super::local::{environment, interrupts};
use super::worker::TOKEN;
use crate::device::pjrt::PluginSpec;
use crate::local::head::{Head, lead};
use crate::local::run::{Ending, Options, Problem};
use crate::tls::Identity;

/// Lead the workers of a job that run elsewhere.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Manifest of a TrainingJob.
    job: PathBuf,
    /// Topology of the devices, as JSON.
    #[arg(long)]
    devices: PathBuf,
    /// What earlier jobs have learned of their bundles, as JSON.
    #[arg(long)]
    profiles: Option<PathBuf>,
    /// Where workers dial in.
    #[arg(long)]
    listen: SocketAddr,
    /// Where the operator asks how far the job is.
    #[arg(long)]
    status: SocketAddr,
    /// Directory of all runs of this job.
    #[arg(long)]
    results: PathBuf,
    /// Where the report is left at the end.
    #[arg(long)]
    last_words: Option<PathBuf>,
    /// Directory with the certificate of the head.
    #[arg(long)]
    tls: Option<PathBuf>,
    /// Name of the job, for the log.
    #[arg(long, default_value = "")]
    job_name: String,
    /// Where probes are answered.
    #[arg(long)]
    health: Option<SocketAddr>,
    /// One JSON line per event on stderr.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    super::log_to_stderr(args.json, if args.json { "info" } else { "warn" });
    let Ok(token) = std::env::var(TOKEN) else {
        return Err(bad_input(anyhow::anyhow!("{TOKEN} is not set; heads are started by `foreshard operator`")));
    };
    let options = Options {
        job: args.job,
        run_dir: None,
        steps: None,
        shards: None,
        resume: None,
        traced_steps: 20,
        quiet: args.json,
        plugin: PluginSpec::default(),
        storage: environment(),
        token_variable: TOKEN,
        xla_flags: String::new(),
        cache: None,
        fail: BTreeMap::new(),
        interrupts: interrupts()?,
        remote: None,
    };
    let identity = args.tls.as_deref().map(Identity::read).transpose().map_err(bad_input)?;
    let head = Head {
        devices: args.devices,
        profiles: args.profiles,
        listen: args.listen,
        status: args.status,
        token,
        identity,
        results: args.results,
        job: args.job_name,
        health: args.health,
        last_words: args.last_words,
    };
    match lead(&head, options) {
        Ok(Ending::Done | Ending::DataEnded) => Ok(ExitCode::SUCCESS),
        Ok(Ending::Interrupted) => Ok(ExitCode::from(130)),
        // The log has it already.
        Err(Problem::Input(_)) if args.json => Ok(ExitCode::from(2)),
        Err(Problem::Failed(_)) if args.json => Ok(ExitCode::FAILURE),
        Err(Problem::Input(e)) => Err(bad_input(e)),
        Err(Problem::Failed(e)) => Err(e),
    }
}
