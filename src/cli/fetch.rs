//! `foreshard fetch`: started by the operator, before the containers of a pod, never by people.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};

use super::local::{environment, on_signal};
use super::{TERMINATED, bad_input, log_to_stderr};
use crate::api;
use crate::fetch::{Settings, fill};

/// Fill the directories of archives.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Manifest of a TrainingJob.
    job: PathBuf,
    /// Where the reason of a failure is left.
    #[arg(long)]
    last_words: Option<PathBuf>,
    /// One JSON line per event on stderr.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    log_to_stderr(args.json, if args.json { "info" } else { "warn" });
    // The first process of a container hears of its end only if it listens.
    on_signal(|| std::process::exit(TERMINATED.into())).context("cannot listen for signals")?;
    let done = fetch(&args.job);
    if let (Err(e), Some(path)) = (&done, &args.last_words)
        && let Err(e) = std::fs::write(path, format!("{e:#}"))
    {
        tracing::warn!(why = e.to_string(), "no last words");
    }
    done.map(|()| ExitCode::SUCCESS)
}

fn fetch(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let yaml = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    let job = api::parse(&yaml).map_err(|e| bad_input(anyhow!("{shown}: {e}")))?;
    let name = job.metadata.name.unwrap_or_default();
    let variables = environment();
    // One container fetches all archives, and each has its own credentials.
    let settings = |volume: usize| -> Settings {
        let prefix = api::Archive::prefix(volume);
        let own = |(name, value): &(String, String)| Some((name.strip_prefix(&prefix)?.to_owned(), value.clone()));
        variables.iter().filter_map(own).collect()
    };
    let fetched = fill(&job.spec.volumes, Path::new("."), settings);
    let fetched = fetched.map_err(|e| if e.source.is_permanent() { bad_input(e) } else { e.into() })?;
    for got in fetched {
        tracing::info!(job = name, volume = got.volume, bytes = got.bytes, files = got.files, "fetched");
    }
    Ok(())
}
