//! A run as one page: what it cost, how it went, what was foreseen and decided.
//!
//! ```text
//! log.jsonl, events.jsonl, decisions.jsonl, plans/ --Run::read--> Run --page--> HTML
//! ```
//!
//! A run that was killed leaves half a line here and no file there: whatever can be read is shown, the page says what is
//! missing. The page loads nothing and runs nothing.

mod chart;
mod curves;
mod decisions;
mod events;
mod headline;
mod log;
mod page;
mod plans;
mod tables;

use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use self::decisions::Decisions;
use self::events::Events;
use self::log::Log;
use self::page::{Page, escape};
use self::plans::Revision;
use crate::api::TrainingJob;

/// Files of which any makes a directory that of a run.
const SIGNS: [&str; 5] = ["log.jsonl", "events.jsonl", "decisions.jsonl", "summary.json", "plan.json"];

/// Faults that are listed.
const MAX_FAULTS: usize = 12;

/// All that the page shows.
struct Run {
    /// Of the directory.
    name: String,
    job: Option<TrainingJob>,
    summary: Value,
    log: Log,
    events: Events,
    decisions: Decisions,
    revisions: Vec<Revision>,
    /// What could not be read.
    faults: Vec<String>,
}

/// Renders the page of a run.
///
/// # Errors
/// The directory is not that of a run. Files that cannot be read are no error.
pub fn html(directory: &Path) -> anyhow::Result<String> {
    Ok(render(&Run::read(directory)?))
}

impl Run {
    fn read(directory: &Path) -> anyhow::Result<Self> {
        let shown = directory.display();
        std::fs::read_dir(directory).with_context(|| format!("{shown}: cannot be opened"))?;
        if !SIGNS.iter().any(|name| directory.join(name).exists()) {
            anyhow::bail!("{shown} is no run directory: it has no log.jsonl; `foreshard local run` makes one");
        }
        let mut faults = Vec::new();
        let (mut log, reading) = Log::read(&directory.join("log.jsonl"));
        faults.extend(reading.fault("log.jsonl"));
        let (events, reading) = Events::read(&directory.join("events.jsonl"));
        faults.extend(reading.fault("events.jsonl"));
        let (decisions, reading) = Decisions::read(&directory.join("decisions.jsonl"), &log);
        faults.extend(reading.fault("decisions.jsonl"));
        let restarts: Vec<(u32, f64)> =
            events.of("restart").filter_map(|e| Some((e.incarnation?, e.seconds))).collect();
        match decisions.moments.is_empty() {
            false => log.date(&decisions.moments, &restarts),
            // The last step that was fed is at most two ahead of the last one finished.
            true => log.date(&events.0.iter().map(|e| (e.step, e.seconds)).collect::<Vec<_>>(), &restarts),
        }
        let mut text = |name: &str| {
            let read = std::fs::read_to_string(directory.join(name));
            read.map_err(|e| faults.push(format!("{name}: {}", why(&e)))).ok()
        };
        let (summary, job) = (text("summary.json"), text("job.yaml"));
        let summary = match summary.map(|s| serde_json::from_str(&s)) {
            Some(Err(e)) => {
                faults.push(format!("summary.json: cannot be read ({e})"));
                Value::Null
            }
            Some(Ok(summary)) => summary,
            None => Value::Null,
        };
        let job = match job.map(|j| crate::api::parse(&j)) {
            Some(Err(e)) => {
                faults.push(format!("job.yaml: {e}"));
                None
            }
            job => job.and_then(Result::ok),
        };
        let revisions = plans::read(directory, &log, &events, &mut faults);
        let full = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
        let name = full.file_name().map_or_else(|| shown.to_string(), |n| n.to_string_lossy().into_owned());
        Ok(Self { name, job, summary, log, events, decisions, revisions, faults })
    }

    /// Until the last thing that is known of it.
    fn end(&self) -> f64 {
        let moments = self.decisions.moments.last().map_or(0.0, |m| m.1);
        let events = self.events.0.iter().map(|e| e.seconds).filter(|s| s.is_finite());
        events.fold(self.log.end().max(moments), f64::max)
    }
}

fn render(run: &Run) -> String {
    let title = run.job.as_ref().and_then(|j| j.metadata.name.clone()).unwrap_or_else(|| run.name.clone());
    let mut page = Page::new(&title, &headline::subtitle(run));
    headline::figures(&mut page, run);
    faults(&mut page, &run.faults);
    curves::loss(&mut page, run);
    curves::throughput(&mut page, run);
    curves::loads(&mut page, run);
    curves::speeds(&mut page, run);
    curves::others(&mut page, run);
    tables::moves(&mut page, run);
    plans::show(&mut page, run);
    tables::decisions(&mut page, run);
    tables::incidents(&mut page, run);
    page.finish(&format!("{title}: report"))
}

fn faults(page: &mut Page, faults: &[String]) {
    if faults.is_empty() {
        return;
    }
    let mut items: Vec<String> = faults.iter().take(MAX_FAULTS).map(|f| format!("<li>{}</li>", escape(f))).collect();
    if faults.len() > MAX_FAULTS {
        items.push(format!("<li>and {} more</li>", faults.len() - MAX_FAULTS));
    }
    let list = items.concat();
    page.raw(&format!("<div class=\"faults\">Not everything of this run could be read:<ul>{list}</ul></div>\n"));
}

fn why(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::NotFound => "there is none".to_owned(),
        _ => format!("cannot be read: {e}"),
    }
}
