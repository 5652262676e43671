//! `foreshard devices`

use std::process::ExitCode;

use super::plugin::PluginArgs;
use crate::device::inventory::Inventory;

/// List what this machine offers: cores, memory, GPUs, TPUs, plug-ins. What is absent is said to be absent.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// As JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    plugin: PluginArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let inventory = Inventory::probe(&args.plugin.spec());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&inventory)?);
    } else {
        print!("{inventory}");
    }
    Ok(ExitCode::SUCCESS)
}
