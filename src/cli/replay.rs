//! `foreshard replay`

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use serde_json::json;

use super::bad_input;
use crate::transition::{Ground, Record, Replayed, Settings, replay};

/// Decide again upon what a run saw, under other settings.
///
/// Every decision of a run is in RUN_DIR/decisions.jsonl with all that it was made from. Shown are the moments at which the
/// decision changes, or is not the one that was made. Where these settings would have acted otherwise than was done, the
/// job would have gone on differently; what follows is marked with `?`.
///
/// Examples:
///   foreshard replay runs/charlm-1
///   foreshard replay runs/charlm-1 --set adaptation.threshold=0.3 --set adaptation.dwell=20
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Directory of the run.
    run_dir: PathBuf,
    /// Change a setting: `adaptation.threshold=0.3`. Times are in seconds.
    #[arg(long = "set", value_name = "SETTING=VALUE")]
    settings: Vec<String>,
    /// Show every moment.
    #[arg(long)]
    all: bool,
    /// Print JSON lines.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let path = args.run_dir.join("decisions.jsonl");
    let shown = path.display().to_string();
    let file = File::open(&path).with_context(|| shown.clone()).map_err(bad_input)?;
    let changes = parse_settings(&args.settings).map_err(bad_input)?;
    apply(&changes, &mut Settings::default()).map_err(bad_input)?;
    // That they can be applied has just been shown.
    let change = |settings: &mut Settings| drop(apply(&changes, settings));

    let mut lines = BufReader::new(file).split(b'\n');
    let (mut n_good, mut damage) = (0, None);
    let records = std::iter::from_fn(|| match parse(lines.next()?) {
        Ok(record) => {
            n_good += 1;
            Some(record)
        }
        Err(problem) => {
            damage = Some(problem);
            None
        }
    });
    let mut last = String::new();
    let mut counts: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    for moment in replay(records, change) {
        let (recorded, decided) = (moment.recorded.label(), moment.decision.label());
        counts.entry(recorded).or_default().0 += 1;
        counts.entry(decided).or_default().1 += 1;
        let story = format!("{recorded} {decided}");
        if args.all || story != last {
            println!("{}", if args.json { as_json(&moment) } else { as_line(&moment) });
        }
        last = story;
    }
    if !args.json && n_good > 0 {
        println!("\n{:<24}{:>10}{:>10}", "decision", "recorded", "replayed");
        for (label, (recorded, replayed)) in counts {
            println!("{label:<24}{recorded:>10}{replayed:>10}");
        }
    }
    match (damage, n_good) {
        (Some(problem), 0) => Err(bad_input(anyhow!("{shown}, line 1: {problem:#}"))),
        (Some(problem), n) => {
            Err(bad_input(anyhow!("{shown}, line {}: {problem:#}; the last good line is {n}", n + 1)))
        }
        (None, 0) => Err(bad_input(anyhow!("{shown} holds no decisions; was spec.adaptation.mode off?"))),
        (None, _) => Ok(ExitCode::SUCCESS),
    }
}

fn parse(line: std::io::Result<Vec<u8>>) -> anyhow::Result<Record> {
    // A cut may go through the middle of a character.
    Ok(Record::parse(&String::from_utf8_lossy(&line?))?)
}

/// Pairs of field and value, named as in the manifest.
fn parse_settings(of: &[String]) -> anyhow::Result<Vec<(&str, &str)>> {
    of.iter()
        .map(|text| {
            let (name, value) = text.split_once('=').with_context(|| format!("--set {text}: write SETTING=VALUE"))?;
            let field = name.trim().strip_prefix("adaptation.");
            let field = field.with_context(|| format!("--set {text}: settings are named adaptation.threshold"))?;
            Ok((field, value.trim()))
        })
        .collect()
}

fn apply(changes: &[(&str, &str)], settings: &mut Settings) -> anyhow::Result<()> {
    for (field, value) in changes {
        settings.set(field, value).context("--set")?;
    }
    Ok(())
}

fn as_line(moment: &Replayed) -> String {
    let Replayed { step, time, recorded, decision, ground } = moment;
    let mark = if *ground == Ground::Seen { ' ' } else { '?' };
    let was = if decision.label() != recorded.label() { format!("   [recorded: {recorded}]") } else { String::new() };
    format!("{mark} step {step:>7} {:>9.1} s  {decision}{was}", time.0)
}

fn as_json(moment: &Replayed) -> String {
    let Replayed { step, time, recorded, decision, ground } = moment;
    let supposed_since = match ground {
        Ground::Seen => None,
        Ground::Supposed { since_step } => Some(since_step),
    };
    json!({
        "step": step, "time": time, "recorded": recorded, "decision": decision, "supposedSinceStep": supposed_since,
        "text": decision.to_string(),
    })
    .to_string()
}
