//! `foreshard crd`

use std::process::ExitCode;

use crate::api;

/// Print the custom resource definitions for `kubectl apply -f -`.
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_: Args) -> anyhow::Result<ExitCode> {
    print!("{}", api::crd());
    Ok(ExitCode::SUCCESS)
}
