//! `foreshard explain`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};

use super::bad_input;
use crate::api;
use crate::local::bundle;
use crate::local::inputs::Machine;
use crate::plan::Plan;
use crate::plan::check::check;
use crate::plan::explain::explain;
use crate::plan::verify::verify;
use crate::topology::{Topology, parse_devices};

/// Say in plain words what limits a plan, what else was possible, and what more devices, bandwidth or memory would bring.
///
/// All of it is planned anew, by the nominal figures of the devices. The plan is also checked, and a step of it simulated,
/// by code that shares nothing with the planner.
///
/// Examples:
///   foreshard explain plan.json --bundle bundles/char_gpt.bundle --devices 2xcpu
///   foreshard explain runs/charlm-1
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// A plan that `foreshard plan -o` wrote, or the directory of a run.
    path: PathBuf,
    /// Bundle directory; that of the run's job when absent.
    #[arg(long)]
    bundle: Option<PathBuf>,
    /// Devices, as for `foreshard plan`; when absent those that the run's job has on this machine, or `2xcpu` and so on, one
    /// for each shard.
    #[arg(long)]
    devices: Option<String>,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (plan, job) = read(&args.path).map_err(bad_input)?;
    let bundle = args.bundle.clone().or_else(|| Some(PathBuf::from(&job.as_ref()?.spec.bundle)));
    let bundle = bundle.ok_or_else(|| bad_input(anyhow!("--bundle: name the bundle that the plan was made for")))?;
    let model = bundle::load(&bundle).and_then(|model| model.split(&plan.split));
    let model = model.with_context(|| format!("bundle {}", bundle.display())).map_err(bad_input)?;
    check(&plan, &model).with_context(|| args.path.display().to_string()).map_err(bad_input)?;
    let topology = topology(&args, &plan, job.as_ref()).map_err(bad_input)?;
    let last = plan.shards.iter().flat_map(|s| &s.devices).map(|d| d.index()).max().unwrap_or(0);
    if last >= topology.devices.len() {
        let has = topology.devices.len();
        return Err(bad_input(anyhow!("--devices: {has}, the plan uses device {last}; name {} or more", last + 1)));
    }
    let explanation = explain(&model, &topology, &plan)?;
    if args.output == Output::Json {
        println!("{}", serde_json::to_string_pretty(&explanation)?);
        return Ok(ExitCode::SUCCESS);
    }
    print!("{explanation}");
    match verify(&model, &topology, &plan) {
        Ok(found) => println!("\nVerified: sound, and a simulation of its own takes {}.", found.step),
        Err(fault) => println!("\nNot verified: {:#}.", anyhow::Error::from(fault)),
    }
    Ok(ExitCode::SUCCESS)
}

/// The plan, and the job if it is that of a run.
fn read(path: &Path) -> anyhow::Result<(Plan, Option<api::TrainingJob>)> {
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    let parse = |path: &Path| -> anyhow::Result<Plan> {
        let text = read(path)?;
        serde_json::from_str(&text).with_context(|| format!("{}: not a plan", path.display()))
    };
    if !path.is_dir() {
        return Ok((parse(path)?, None));
    }
    let job = path.join("job.yaml");
    let job = api::parse(&read(&job)?).map_err(|e| anyhow!("{}: {e}", job.display()))?;
    Ok((parse(&path.join("plan.json"))?, Some(job)))
}

fn topology(args: &Args, plan: &Plan, job: Option<&api::TrainingJob>) -> anyhow::Result<Topology> {
    let n = plan.shards.len() * plan.n_replicas as usize;
    match (&args.devices, job) {
        (Some(devices), _) => parse_devices(devices).map_err(|e| anyhow!("--devices: {e}")),
        (None, Some(job)) => {
            let machine = Machine::of(&job.spec, None).map_err(|e| anyhow!(e))?;
            machine.topology(n, &|_| 1.0).map_err(|e| anyhow!(e))
        }
        (None, None) => parse_devices(&format!("{n}xcpu")).map_err(|e| anyhow!(e)),
    }
}
