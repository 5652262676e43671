//! `foreshard replay`

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::anyhow;

use super::bad_input;
use crate::local::json_lines::each_line;
use crate::transition::{Ground, Record, Replay};
use crate::units::Seconds;

/// Decide every recorded moment of a run again, under other settings.
///
/// Prints what was decided and what would have been, where they differ in another way than the moment before; `--all`
/// prints every moment. Only settings change. After the first plan that would have been adopted and was not, or the other
/// way round, the job would have gone on differently: what follows is marked as supposed, for speeds, plans on offer,
/// cooldown and budget are still those of the recording. Plans the planner was not asked for then are not on offer now,
/// and forecasts keep their length.
///
/// Example: foreshard replay runs/charlm-1 --set threshold=0.3 --set cooldown=10
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run directory.
    run_dir: PathBuf,
    /// Another value for a setting of `spec.adaptation`: mode, threshold, horizon, minGain, dwell, cooldown, hysteresis,
    /// budget.share, budget.moves or forecast.
    #[arg(long, value_name = "SETTING=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
    /// Print every moment.
    #[arg(long)]
    all: bool,
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (field, value) = text.split_once('=').ok_or("not SETTING=VALUE")?;
    let field = field.trim();
    let field = field.strip_prefix("spec.").unwrap_or(field);
    let field = field.strip_prefix("adaptation.").unwrap_or(field);
    // Manifests write modes with a capital letter, records without.
    let value = if field == "mode" { value.trim().to_lowercase() } else { value.trim().to_owned() };
    Ok((field.to_owned(), value))
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let path = args.run_dir.join("decisions.jsonl");
    let mut replay = Replay::new(args.set).map_err(bad_input)?;
    let mut out = Out(Some(std::io::stdout().lock()));
    let (mut last_step, mut before) = (0, None);
    let reading = each_line(&path, |line| {
        let record = Record::parse(line).map_err(|e| e.to_string())?;
        let again = replay.again(&record).map_err(|e| e.to_string())?;
        let (decision, differs) = (again.decision, again.differs);
        last_step = record.snapshot.step;
        let labels = (record.decision.label(), decision.label(), differs);
        let news = differs && before != Some(labels);
        before = Some(labels);
        if args.all || news {
            let time = Seconds(record.snapshot.time.0).to_string();
            out.line(format_args!("step {last_step:<8} {time:>9}  was  {}", record.decision));
            let supposed = if again.ground == Ground::Seen { "" } else { "supposed, " };
            let differs = if differs { "differs" } else { "" };
            out.line(format_args!("{:>23}  now  {decision}", format!("{supposed}{differs}")));
        }
        Ok(())
    });
    if let Some(fault) = reading.fault(&path.display().to_string()) {
        if reading.n_good == 0 {
            return Err(bad_input(anyhow!("{fault}; nothing can be decided again")));
        }
        eprintln!("{fault}: step {last_step}");
    }
    let c = replay.counts;
    if c.supposed > 0 {
        out.line(format_args!("{} are supposed: the job had already gone another way than it would have", c.supposed));
    }
    out.line(format_args!(
        "{} decisions, {} differ, {} moves recorded, {} would have been made",
        c.decisions, c.differ, c.moves_recorded, c.moves_made
    ));
    Ok(ExitCode::SUCCESS)
}

/// Standard output, as long as someone reads it: `foreshard replay ... --all | head` is no failure.
struct Out<'a>(Option<std::io::StdoutLock<'a>>);

impl Out<'_> {
    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        if self.0.as_mut().is_some_and(|out| writeln!(out, "{text}").is_err()) {
            self.0 = None;
        }
    }
}
