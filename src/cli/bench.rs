//! `foreshard bench`

use std::path::PathBuf;
use std::process::ExitCode;

use super::bad_input;
use crate::bench::growth;
use crate::bench::partition::{FAMILIES, Family, table};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    Partition(PartitionArgs),
    Growth(GrowthArgs),
}

/// Solve published planning problems and compare with published results.
///
/// Prints one table per family: our result, the best known, a proven lower bound, seconds and memory.
///
/// Example: foreshard bench partition data/partitioning --family dnn-max-load
#[derive(Debug, clap::Args)]
pub struct PartitionArgs {
    /// Directory with inputs; families look for their own below it.
    directory: PathBuf,
    /// Only this family.
    #[arg(long)]
    family: Option<String>,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

/// Measure how import, plan and cut grow with the number of ops.
///
/// The model is made up: a residual network of any depth with its derivatives, trained by Adam with clipping, for four
/// shards. "Against linear" is the time per op over that of the first size.
#[derive(Debug, clap::Args)]
pub struct GrowthArgs {
    /// Ops of the gradient function, for each model; ascending.
    #[arg(long, value_delimiter = ',', default_value = "5000,10000,20000,50000,100000")]
    ops: Vec<usize>,
    /// Plan for so many devices of three kinds instead, and again after one of them has become slow.
    #[arg(long)]
    devices: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Table,
    Json,
}

pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Partition(args) => partition(args),
        Command::Growth(args) => grow(&args),
    }
}

fn grow(args: &GrowthArgs) -> anyhow::Result<ExitCode> {
    const LARGEST: usize = 1_000_000;
    if let Some(n) = args.ops.iter().find(|&&n| n == 0 || n > LARGEST) {
        return Err(bad_input(anyhow::anyhow!("--ops {n}: give between 1 and {LARGEST}")));
    }
    if let Some(n_devices) = args.devices {
        const MOST: usize = 4096;
        if !(1..=MOST).contains(&n_devices) {
            return Err(bad_input(anyhow::anyhow!("--devices {n_devices}: give between 1 and {MOST}")));
        }
        println!(
            "{:>8} {:>9} {:>10} {:>10} {:>14} {:>7} {:>20}",
            "ops", "devices", "plan s", "hold s", "plan again s", "share", "step / planned cold"
        );
        for &n_ops in &args.ops {
            let taken = growth::replan(n_ops, n_devices)?;
            let [plan, hold, again] = [taken.plan, taken.hold, taken.again].map(|t| t.as_secs_f64());
            println!(
                "{:>8} {:>9} {plan:>10.3} {hold:>10.3} {again:>14.3} {:>7.3} {:>20.4}",
                taken.n_ops,
                taken.n_devices,
                again / plan,
                taken.against_cold
            );
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut all = Vec::new();
    for &n_ops in &args.ops {
        all.push(growth::measure(n_ops)?);
    }
    print!("{}", growth::table(&all));
    Ok(ExitCode::SUCCESS)
}

fn partition(args: PartitionArgs) -> anyhow::Result<ExitCode> {
    let chosen: Vec<&Family> =
        FAMILIES.iter().filter(|f| args.family.as_ref().is_none_or(|name| name == f.name)).collect();
    if chosen.is_empty() {
        let known: Vec<&str> = FAMILIES.iter().map(|f| f.name).collect();
        let name = args.family.unwrap_or_default();
        return Err(bad_input(anyhow::anyhow!("--family: {name:?} is not known; there are {}", known.join(", "))));
    }
    let mut all = serde_json::Map::new();
    let mut found = false;
    for family in chosen {
        let mut rows = Vec::new();
        let result = (family.run)(&args.directory, &mut |row| {
            eprintln!("{}: {} in {:.2} s", family.name, row.instance, row.seconds);
            rows.push(row);
        });
        match result {
            Ok(()) => found = true,
            // Asked for all, a directory need not have every family.
            Err(crate::bench::partition::InputError::Nothing { .. }) if args.family.is_none() => continue,
            Err(e) => return Err(bad_input(e)),
        }
        match args.output {
            Output::Table => println!("{}", table(family.name, &rows)),
            Output::Json => drop(all.insert(family.name.to_owned(), serde_json::to_value(&rows)?)),
        }
    }
    if !found {
        return Err(bad_input(anyhow::anyhow!("no input of any family below {}", args.directory.display())));
    }
    if args.output == Output::Json {
        println!("{}", serde_json::to_string_pretty(&all)?);
    }
    Ok(ExitCode::SUCCESS)
}
