//! `foreshard plan`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::bad_input;
use crate::local::bundle;
use crate::plan::{Problem, ScheduleKind, picture, pinned, table};
use crate::topology::parse_devices;

/// Plan a model on devices and show what the plan will do, without running it.
///
/// Examples:
///   foreshard plan bundles/char_gpt.bundle --devices 2xcpu
///   foreshard plan my.bundle --devices cpu:flops=50G:memory=4Gi,cpu:speed=0.5 --picture plan.svg
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Bundle directory.
    bundle: PathBuf,
    /// Devices: `2xcpu`, or a list such as `cpu:flops=50G:bandwidth=10G:memory=4Gi:speed=0.5,2xgpu`.
    #[arg(long, default_value = "2xcpu")]
    devices: String,
    /// Shards; one per device and replica when absent.
    #[arg(long)]
    shards: Option<u32>,
    #[arg(long, default_value_t = 1)]
    replicas: u32,
    /// Rows of a microbatch; the fastest of the bundle's when absent.
    #[arg(long)]
    microbatch: Option<u64>,
    #[arg(long, value_enum, default_value = "1f1b")]
    schedule: ScheduleArg,
    /// Begin a shard at this block of the model, instead of where the planner would; once for each cut. The blocks are the
    /// columns of `foreshard graph --picture`.
    #[arg(long, value_name = "BLOCK", conflicts_with = "shards")]
    cut: Vec<String>,
    /// Write the plan as JSON.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write a picture of the plan.
    #[arg(long, value_name = "FILE.svg")]
    picture: Option<PathBuf>,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ScheduleArg {
    #[value(name = "1f1b", alias = "1F1B")]
    OneFOneB,
    #[value(name = "gpipe", alias = "GPipe")]
    GPipe,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let topology = parse_devices(&args.devices).map_err(|e| bad_input(anyhow::anyhow!("--devices: {e}")))?;
    let model = bundle::load(&args.bundle).map_err(bad_input)?;
    let n_devices = topology.devices.len() as u32;
    let problem = Problem {
        model: &model,
        topology: &topology,
        n_shards: match args.cut.len() as u32 {
            0 => args.shards.unwrap_or(n_devices / args.replicas.max(1)),
            n_cuts => n_cuts + 1,
        },
        n_replicas: args.replicas,
        microbatch: args.microbatch,
        schedule: match args.schedule {
            ScheduleArg::OneFOneB => ScheduleKind::OneFOneB,
            ScheduleArg::GPipe => ScheduleKind::GPipe,
        },
    };
    let plan = pinned(&problem, &args.cut).map_err(bad_input)?;
    let json = serde_json::to_string(&plan)?;
    if args.json {
        println!("{json}");
    } else {
        print!("{}", table::render(&plan, &model, &topology));
    }
    if let Some(path) = &args.output {
        std::fs::write(path, &json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.picture {
        let svg = picture::svg(&plan, &model, &topology);
        std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
