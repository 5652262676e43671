//! `foreshard plan`

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;

use super::bad_input;
use crate::graph::{Model, Split};
use crate::local::bundle;
use crate::plan::check::check;
use crate::plan::count::{self, Wanted};
use crate::plan::moves::moved;
use crate::plan::split::choose;
use crate::plan::{
    Aim, Fixed, Granularity, Moving, Objective, Pin, Plan, Prepared, Problem, Recompute, ScheduleKind, picture, pinned,
    solve, table,
};
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
    /// Devices: `2xcpu`, or a list such as `cpu:flops=50G:bandwidth=10G:memory=4Gi:speed=0.5,2xgpu`. Those of one `node`
    /// share what its `nic` sends and receives, in bytes a second: `2xcpu:node=a:nic=1G,2xcpu:node=b`.
    #[arg(long, default_value = "2xcpu")]
    devices: String,
    /// Shards, or a range such as `1..4` of which as many are taken as make the plan best; one per device and replica when
    /// absent.
    #[arg(long, value_name = "N|MIN..MAX", value_parser = range)]
    shards: Option<RangeInclusive<u32>>,
    /// Of a range of shards, take those that make a step cheapest, by the `price` of devices, and still make so many steps a
    /// second.
    #[arg(long, value_name = "STEPS_PER_SECOND", num_args = 0..=1, require_equals = true, default_missing_value = "0", requires = "shards")]
    cheapest: Option<f64>,
    #[arg(long, default_value_t = 1)]
    replicas: u32,
    /// Rows of a microbatch; the fastest of the bundle's when absent.
    #[arg(long)]
    microbatch: Option<u64>,
    #[arg(long, value_enum, default_value = "1f1b")]
    schedule: ScheduleArg,
    /// Cut where blocks of the model begin only, between any two ops, or inside ops. What is split is said by `--split`, or
    /// with `op` found.
    #[arg(long, value_enum, default_value = "sublayer", conflicts_with = "cut")]
    granularity: GranularityArg,
    /// Short steps, or much room to spare on the fullest device.
    #[arg(long, value_enum, default_value = "throughput")]
    objective: ObjectiveArg,
    /// Compute forward values again for the backward half, instead of keeping them, on shards that have too little memory
    /// otherwise (where the objective is memory, on the fullest), on none, or on all.
    #[arg(long, value_enum, default_value = "auto")]
    recompute: RecomputeArg,
    /// Begin a shard at this block of the model, instead of where the planner would; once for each cut. The blocks are the
    /// columns of `foreshard graph --picture`.
    #[arg(long, value_name = "BLOCK", conflicts_with = "shards")]
    cut: Vec<String>,
    /// Run these ops on this shard or device, whatever that costs, as in `block3:1` or `embed:cpu0`; once for each. OPS is a
    /// named scope (a column of `foreshard graph --picture`), a param, or an op by name or path; `*` stands for any text.
    #[arg(long, value_name = "OPS:SHARD|DEVICE")]
    pin: Vec<Pin>,
    /// Keep these ops on one shard, as in `embed,unembed`; once for each set.
    #[arg(long, value_name = "OPS,OPS,...")]
    together: Vec<String>,
    /// Split params along an axis first, as in `blocks.*.mlp.up:1:2` for two parts of the columns; or let ops work on parts
    /// of the rows of a microbatch, as in `block3:rows:2` for a named scope (`*` is the whole model); once for each.
    #[arg(long, value_name = "TENSOR:AXIS:PARTS|OPS:rows:PARTS")]
    split: Vec<Split>,
    /// A plan in force: it is kept unless another is 1 % faster, and plans near to it come first. Says what would move.
    #[arg(long, value_name = "FILE", conflicts_with = "cut")]
    previous: Option<PathBuf>,
    /// Search for so many seconds at most, once there is a plan, and take the best until then. How far it can be from the
    /// best of all is printed as its ratio to the bound. The search ends by itself when absent, and always finds the same.
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["cut", "shards"], value_parser = seconds)]
    budget: Option<f64>,
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
    /// One forward, one backward: least memory.
    #[value(name = "1f1b", alias = "1F1B")]
    OneFOneB,
    /// All forward, then all backward.
    #[value(name = "gpipe", alias = "GPipe")]
    GPipe,
    /// 1F1B with several ranges of the model on each shard.
    Interleaved,
    /// 1F1B where gradients that other shards wait for come first.
    ZeroBubble,
    /// Whichever makes the plan best.
    Auto,
}

impl ScheduleArg {
    fn kind(self) -> Option<ScheduleKind> {
        match self {
            Self::OneFOneB => Some(ScheduleKind::OneFOneB),
            Self::GPipe => Some(ScheduleKind::GPipe),
            Self::Interleaved => Some(ScheduleKind::Interleaved),
            Self::ZeroBubble => Some(ScheduleKind::ZeroBubble),
            Self::Auto => None,
        }
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum GranularityArg {
    /// Where layers begin.
    Layer,
    /// Between any two ops.
    Sublayer,
    /// Inside ops as well, where that makes a plan possible or better by a twentieth: a few splits are tried.
    Op,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ObjectiveArg {
    Throughput,
    Memory,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum RecomputeArg {
    Auto,
    Never,
    Always,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let topology = parse_devices(&args.devices).map_err(|e| bad_input(anyhow::anyhow!("--devices: {e}")))?;
    let model = bundle::load(&args.bundle).and_then(|model| model.split(&args.split)).map_err(bad_input)?;
    let n_devices = topology.devices.len() as u32;
    let shards = args.shards.clone().unwrap_or_else(|| {
        let all = n_devices / args.replicas.max(1);
        all..=all
    });
    let together = args.together.iter().map(|set| set.split(',').map(|ops| ops.trim().to_owned()).collect());
    let fixed = Fixed { pins: args.pin.clone(), together: together.collect() };
    let problem = Problem {
        model: &model,
        topology: &topology,
        n_shards: match args.cut.len() as u32 {
            0 => *shards.end(),
            n_cuts => n_cuts + 1,
        },
        n_replicas: args.replicas,
        microbatch: args.microbatch,
        schedule: args.schedule.kind(),
        aim: Aim {
            granularity: match args.granularity {
                GranularityArg::Layer => Granularity::Layer,
                GranularityArg::Sublayer | GranularityArg::Op => Granularity::Sublayer,
            },
            objective: match args.objective {
                ObjectiveArg::Throughput => Objective::Throughput,
                ObjectiveArg::Memory => Objective::Memory,
            },
            recompute: match args.recompute {
                RecomputeArg::Auto => Recompute::Auto,
                RecomputeArg::Never => Recompute::Never,
                RecomputeArg::Always => Recompute::Always,
            },
        },
        fixed: &fixed,
    };
    let previous = args.previous.as_deref().map(|path| read(path, &model)).transpose().map_err(bad_input)?;
    let inside = matches!(args.granularity, GranularityArg::Op);
    if inside && (shards.start() < shards.end() || !args.split.is_empty() || args.budget.is_some()) {
        return Err(bad_input(anyhow::anyhow!(
            "--granularity op tries splits for one number of shards, to the end; give no --split, no --budget and one number as --shards"
        )));
    }
    let wanted = args.cheapest.map_or(Wanted::Best, |floor| Wanted::Cheapest { floor });
    let (mut why, mut split) = (None, None);
    let plan = match (args.budget, &previous) {
        (Some(budget), previous) => {
            let began = Instant::now();
            let go_on = || began.elapsed().as_secs_f64() < budget;
            Prepared::new(&model).solve_while(&problem, previous.as_ref(), &go_on)
        }
        (None, Some(_)) => solve(&problem, previous.as_ref()),
        (None, None) if !args.cut.is_empty() => pinned(&problem, &args.cut),
        (None, None) if inside => choose(&problem).map(|chosen| {
            why = chosen.why();
            split = chosen.model;
            chosen.plan
        }),
        (None, None) => count::choose(&Prepared::new(&model), &problem, shards, wanted).map(|counted| {
            why = counted.why();
            counted.found
        }),
    };
    let plan = plan.map_err(bad_input)?;
    let model = split.as_ref().unwrap_or(&model);
    let json = serde_json::to_string(&plan)?;
    if args.json {
        println!("{json}");
    } else {
        print!("{}", table::render(&plan, model, &topology));
        if let Some(why) = why {
            println!("{why}");
        }
        match &previous {
            Some(previous) if plan.revision == previous.revision => println!("the plan in force stays"),
            Some(previous) => match plan.moving {
                Some(Moving { bytes, seconds }) => println!("{bytes} of state and gradients move, in {seconds}"),
                None => println!("{} of state and gradients move", moved(model, previous, &plan)),
            },
            None => {}
        }
    }
    if let Some(path) = &args.output {
        std::fs::write(path, &json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.picture {
        let svg = picture::svg(&plan, model, &topology);
        std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Seconds that may be spent.
fn seconds(text: &str) -> Result<f64, String> {
    let found = text.parse::<f64>().ok().filter(|s| s.is_finite() && *s >= 0.0);
    found.ok_or_else(|| format!("{text:?} is not a number of seconds, at least 0"))
}

/// A number, or the first and the last of a range.
fn range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text:?} is not a number of shards"));
    let (least, most) = match text.split_once("..") {
        Some((least, most)) => (number(least)?, number(most.trim_start_matches('='))?),
        None => (number(text)?, number(text)?),
    };
    if least > most {
        Err(format!("from {least} to {most}: the first is more than the last"))
    } else {
        Ok(least..=most)
    }
}

/// A plan for this model from a file.
fn read(path: &Path, model: &Model) -> anyhow::Result<Plan> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("--previous {shown}"))?;
    let plan: Plan = serde_json::from_str(&text).with_context(|| format!("--previous {shown}: not a plan"))?;
    check(&plan, model).with_context(|| format!("--previous {shown}"))?;
    Ok(plan)
}
