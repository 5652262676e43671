//! `foreshard head`: the parent of a job whose workers come from other machines.
//!
//! # Expected Flow
//! It listens, waits for a worker on every device it was given, trains like `foreshard local run`, and leaves its report
//! as its last words. Started again, it goes on from the newest checkpoint of its earlier runs; before there is one, it
//! begins as the manifest says.
//!
//! # Assumptions
//! Workers are started, and started anew, by somebody else. The directory of results is the same for all of them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};

use super::board::Board;
use super::run::{Ending, Options, Problem, Remote, input, run};
use crate::runtime::checkpoint::{Checkpoint, Depth, runs};
use crate::runtime::session::Listen;
use crate::telemetry::Health;
use crate::tls::Identity;
use crate::topology::{Measured, Topology};
use crate::wire::report::{JobReport, JobState};

/// Where a head listens and writes.
pub struct Head {
    /// A topology as JSON: worker N runs on its device N.
    pub devices: PathBuf,
    /// What earlier jobs have learned, as JSON: by bundle, then by kind of device.
    pub profiles: Option<PathBuf>,
    /// Where workers dial in.
    pub listen: SocketAddr,
    /// Where the operator asks.
    pub status: SocketAddr,
    /// Name of the job, for the log.
    pub job: String,
    /// Where probes are answered.
    pub health: Option<SocketAddr>,
    /// Secret of the job.
    pub token: String,
    /// Workers and the operator show certificates where there is one.
    pub identity: Option<Identity>,
    /// Directory of all runs of this job.
    pub results: PathBuf,
    pub last_words: Option<PathBuf>,
}

/// How long workers may take to come: their nodes may have to fetch an image first.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Runs a job to its end. `options` say everything but what is this run's own.
pub fn lead(head: &Head, options: Options) -> Result<Ending, Problem> {
    let health = Arc::new(Health::default());
    let board = Arc::new(Board::new(head.job.clone(), health.clone()));
    if let Some(at) = head.health {
        health.serve(at).with_context(|| format!("cannot listen on {at}"))?;
    }
    let outcome = prepared(head, options, &board).and_then(|options| match options {
        Some(options) => run(&options),
        // The run before has come to its end, and nobody has heard of it.
        None => Ok(Ending::Done),
    });
    board.write(|r| match &outcome {
        Ok(Ending::Done) => (r.state, r.message) = (JobState::Done, "all steps are taken".to_owned()),
        Ok(Ending::DataEnded) => (r.state, r.message) = (JobState::Done, "the data has come to an end".to_owned()),
        Ok(Ending::Interrupted) => {
            (r.state, r.message) = (JobState::Interrupted, "told to go".to_owned());
        }
        Err(Problem::Input(e)) => (r.state, r.message) = (JobState::Refused, format!("{e:#}")),
        Err(Problem::Failed(e)) => (r.state, r.message) = (JobState::Failed, format!("{e:#}")),
    });
    let JobReport { state, message, step, .. } = board.read();
    health.end();
    tracing::info!(job = head.job, step, state = ?state, why = message, "ends");
    if let Some(Err(e)) = head.last_words.as_deref().map(|path| board.last_words(path)) {
        tracing::warn!(job = head.job, "no last words: {e:#}");
    }
    outcome
}

/// The options of this run, or `None` if an earlier one has done all steps.
fn prepared(head: &Head, mut options: Options, board: &Arc<Board>) -> Result<Option<Options>, Problem> {
    board.serve(head.status, head.token.clone(), head.identity.clone())?;
    let shown = head.devices.display();
    let text = std::fs::read_to_string(&head.devices).with_context(|| format!("{shown}")).map_err(input)?;
    let devices: Topology = serde_json::from_str(&text).with_context(|| format!("{shown}")).map_err(input)?;
    std::fs::create_dir_all(&head.results)
        .with_context(|| format!("cannot make {}; may this user write to the volume?", head.results.display()))?;
    let runs = runs(&head.results)?;
    let newest = runs.iter().rev().find_map(|(_, run)| Checkpoint::open(run, Depth::Checksums).ok());
    let steps = steps(&options)?;
    if let Some(found) = newest {
        let (step, of) = (found.checkpoint.index().step, found.checkpoint.index().of);
        let steps = steps.or(of).unwrap_or(u64::MAX);
        let path = found.checkpoint.path().to_owned();
        let run = runs.iter().map(|(_, run)| run).find(|run| path.starts_with(run));
        if let Some(run) = run.filter(|_| step >= steps) {
            // It may have been lost between its last checkpoint and its weights.
            let weights = run.join(WEIGHTS);
            if !weights.is_file() {
                found.checkpoint.export(&weights, false).map_err(anyhow::Error::from)?;
            }
            board.write(|r| (r.step, r.steps, r.results) = (step, steps, run.display().to_string()));
            return Ok(None);
        }
        options.resume = Some(path);
    }
    let next = runs.last().map_or(1, |(n, _)| n + 1);
    options.run_dir = Some(head.results.join(format!("run-{next}")));
    let (token, identity) = (Some(head.token.clone()), head.identity.clone());
    let listen = Listen { address: head.listen, token, identity, patience: PATIENCE };
    options.remote = Some(Remote { devices, listen, profiles: profiles(head), board: board.clone() });
    Ok(Some(options))
}

/// What earlier jobs have learned. Without it a job begins with nominal figures, as the first one did.
fn profiles(head: &Head) -> BTreeMap<String, BTreeMap<String, Measured>> {
    let Some(path) = &head.profiles else { return BTreeMap::new() };
    let read = std::fs::read_to_string(path).map_err(anyhow::Error::from);
    read.and_then(|text| Ok(serde_json::from_str(&text)?)).unwrap_or_else(|e| {
        eprintln!("warning: {}: {e:#}; beginning with nominal figures", path.display());
        BTreeMap::new()
    })
}

const WEIGHTS: &str = "weights.safetensors";

/// Steps of the job, where its manifest says how many: those of epochs are in its checkpoints.
fn steps(options: &Options) -> Result<Option<u64>, Problem> {
    let path = options.job.display();
    let yaml = std::fs::read_to_string(&options.job).with_context(|| format!("{path}")).map_err(input)?;
    let spec = crate::api::parse(&yaml).map_err(|e| input(anyhow!("{path}: {e}")))?.spec;
    Ok(spec.epochs.is_none().then_some(spec.steps))
}
