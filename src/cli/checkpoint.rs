//! `foreshard checkpoint`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use super::bad_input;
use crate::runtime::checkpoint::{Checkpoint, CheckpointError, Depth, Fault, INDEX, list};
use crate::units::Bytes;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    Ls(LsArgs),
    Verify(VerifyArgs),
    Export(ExportArgs),
}

/// List checkpoints: step, age, size, model, and whether they can be used.
///
/// Looks at the index and at the length of every file; `verify` reads every byte.
///
/// Example: foreshard checkpoint ls runs/charlm-1
#[derive(Debug, clap::Args)]
pub struct LsArgs {
    /// Run directory, directory of checkpoints, or one checkpoint.
    directory: PathBuf,
}

/// Check every byte of a checkpoint, or of all checkpoints of a run, and name every fault.
///
/// Exit code 1 when a checkpoint is broken.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// Run directory, directory of checkpoints, or one checkpoint.
    directory: PathBuf,
}

/// Write the params of a checkpoint as one safetensors file, under the names of the bundle's manifest.
///
/// Takes the newest usable checkpoint of a run, or the one that is named. The file can be the start weights of another
/// job (`spec.weights`).
///
/// Example: foreshard checkpoint export runs/charlm-1 -o charlm.safetensors
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// Run directory, directory of checkpoints, or one checkpoint.
    directory: PathBuf,
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Also the optimizer's state.
    #[arg(long)]
    slots: bool,
}

pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ls(args) => ls(&args.directory),
        Command::Verify(args) => verify(&args.directory),
        Command::Export(args) => export(&args),
    }
}

fn ls(directory: &Path) -> anyhow::Result<ExitCode> {
    println!("{:>10}  {:>8}  {:>10}  {:<20}  STATE", "STEP", "AGE", "SIZE", "MODEL");
    for (step, path) in list(directory).map_err(bad_input)? {
        let written = std::fs::metadata(path.join(INDEX)).and_then(|m| m.modified());
        let age = written.ok().and_then(|at| SystemTime::now().duration_since(at).ok()).map_or("?".to_owned(), age);
        let (size, model, state) = match Checkpoint::load(&path) {
            Ok(checkpoint) => {
                let size = Bytes(checkpoint.index().files.iter().map(|f| f.bytes).sum());
                let faults = checkpoint.faults(Depth::Lengths);
                let state = if faults.is_empty() { "ok".to_owned() } else { format!("broken: {}", join(&faults)) };
                (size.to_string(), checkpoint.index().model.name.clone(), state)
            }
            Err(e @ CheckpointError::Format { .. }) => ("?".to_owned(), "?".to_owned(), format!("unknown: {e}")),
            Err(e) => ("?".to_owned(), "?".to_owned(), format!("broken: {:#}", anyhow::Error::from(e))),
        };
        println!("{step:>10}  {age:>8}  {size:>10}  {model:<20}  {state}");
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(directory: &Path) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for (_, path) in list(directory).map_err(bad_input)? {
        let faults: Vec<String> = match Checkpoint::load(&path) {
            Ok(checkpoint) => checkpoint.faults(Depth::Checksums).iter().map(ToString::to_string).collect(),
            Err(e) => vec![format!("{:#}", anyhow::Error::from(e))],
        };
        if faults.is_empty() {
            println!("{}: ok", path.display());
        } else {
            code = ExitCode::FAILURE;
        }
        for fault in faults {
            println!("{}: {fault}", path.display());
        }
    }
    Ok(code)
}

fn export(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let found = Checkpoint::open(&args.directory, Depth::Lengths).map_err(bad_input)?;
    for skipped in found.skipped {
        eprintln!("skipped: {:#}", anyhow::Error::from(skipped));
    }
    found.checkpoint.export(&args.output, args.slots)?;
    eprintln!(
        "step {} of {} is in {}",
        found.checkpoint.index().step,
        found.checkpoint.path().display(),
        args.output.display()
    );
    Ok(ExitCode::SUCCESS)
}

fn join(faults: &[Fault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// One number and its unit, rounded down.
fn age(age: Duration) -> String {
    match age.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min", s / 60),
        s @ 3600..86400 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86400),
    }
}
