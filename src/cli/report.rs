//! `foreshard report`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::bad_input;
use crate::local::report;

/// Show a run as one HTML page: loss, throughput, load, forecasts, plans, decisions and moves.
///
/// Works on a run that goes on, has ended or was cut off: the page says what is missing. It needs nothing beside it, and
/// no JavaScript.
///
/// Example: foreshard report runs/charlm-1
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run directory.
    run_dir: PathBuf,
    /// The page; report.html in the run directory when absent.
    #[arg(short, long, value_name = "FILE.html")]
    output: Option<PathBuf>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let html = report::html(&args.run_dir).map_err(bad_input)?;
    let output = args.output.unwrap_or_else(|| args.run_dir.join("report.html"));
    std::fs::write(&output, html).with_context(|| format!("cannot write {}", output.display()))?;
    println!("{}", output.display());
    Ok(ExitCode::SUCCESS)
}
