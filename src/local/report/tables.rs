//! Decisions, moves and incidents, line by line.

use std::collections::BTreeSet;

use super::Run;
use super::decisions::Change;
use super::headline::clock;
use super::page::{Page, escape};
use crate::units::{Bytes, Seconds};

/// Rows of a table.
const MAX_ROWS: usize = 200;

pub fn decisions(page: &mut Page, run: &Run) {
    page.section("Decisions");
    let all = &run.decisions;
    if all.n == 0 {
        return page.missing("Nothing was decided: adaptation was off, or the run was too short.");
    }
    page.text(&format!("{} decisions; a line for every one that differs in kind from the one before.", all.n));
    let row = |change: &Change| {
        let label = change.decision.label();
        let kind = label.split('/').next().unwrap_or(label);
        let text = change.decision.to_string();
        let text = text.strip_prefix(&format!("{kind}: ")).unwrap_or(&text);
        vec![
            clock(change.time),
            change.step.to_string(),
            format!("<span class=\"label {kind}\">{label}</span>"),
            change.times.to_string(),
            escape(text),
        ]
    };
    let mut rows: Vec<Vec<String>> = all.first.iter().map(row).collect();
    if all.left_out > 0 {
        let mut row = vec![String::new(); 4];
        row.push(format!("{} lines left out", all.left_out));
        rows.push(row);
    }
    rows.extend(all.last.iter().map(row));
    page.table(&["time#", "step#", "decision", "in a row#", "reason"], &rows);
}

pub fn moves(page: &mut Page, run: &Run) {
    page.section("Moves");
    // By revision: what was expected (the record of decisions) and what happened (the events).
    let mut revisions: Vec<u64> = run.events.of("cutover").map(|e| e.revision).collect();
    revisions.extend(run.decisions.moves.iter().map(|m| m.revision));
    let mut seen = BTreeSet::new();
    revisions.retain(|r| seen.insert(*r));
    if revisions.is_empty() {
        return page.missing("The plan did not change.");
    }
    page.text("What a move was expected to cost and bring, and what it did. The gain is a share of time: what steps took, against what those of the plan before would have taken under the speeds measured since.");
    let rows: Vec<Vec<String>> = latest(page, &revisions).iter().map(|&revision| row_of_move(run, revision)).collect();
    let columns = [
        "revision#",
        "time#",
        "step#",
        "pause exp.#",
        "measured#",
        "prepare exp.#",
        "measured#",
        "gain exp.#",
        "measured#",
        "step exp.#",
        "measured#",
        "moved#",
    ];
    page.table(&columns, &rows);
}

/// What the loop knows of a move counts; events also tell of plans that were put into force by hand.
fn row_of_move(run: &Run, revision: u64) -> Vec<String> {
    let known = run.decisions.moves.iter().find(|m| m.revision == revision);
    let event = run.events.of("cutover").find(|e| e.revision == revision);
    let time = event.map(|e| e.seconds).or(known.map(|m| m.time.0)).unwrap_or(0.0);
    let step = event.and_then(|e| e.at).or(known.map(|m| m.step)).unwrap_or(0);
    let (pause, prepare, gain) = (known.map(|m| m.pause), known.map(|m| m.prepare), known.map(|m| m.gain));
    let pause_seen = pause.and_then(|p| p.measured).or(event.and_then(|e| e.pause_seconds).map(Seconds));
    let prepare_seen = prepare.and_then(|p| p.measured).or(event.and_then(|e| e.prepare_seconds).map(Seconds));
    let percent = |share: Option<f64>| or_dash(share.map(|s| format!("{:.1} %", 100.0 * s)));
    vec![
        revision.to_string(),
        clock(time),
        step.to_string(),
        or_dash(pause.map(|p| p.expected)),
        or_dash(pause_seen),
        or_dash(prepare.map(|p| p.expected)),
        or_dash(prepare_seen),
        percent(gain.map(|g| g.expected)),
        percent(gain.and_then(|g| g.measured)),
        or_dash(event.and_then(|e| e.predicted_step_seconds).map(Seconds)),
        or_dash(run.log.under(revision).1.map(Seconds)),
        or_dash(event.and_then(|e| e.moved_bytes).map(Bytes)),
    ]
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "–".to_owned(), |v| v.to_string())
}

/// The last rows of a long table.
fn latest<'a, T>(page: &mut Page, all: &'a [T]) -> &'a [T] {
    let left_out = all.len().saturating_sub(MAX_ROWS);
    if left_out > 0 {
        page.missing(&format!("{left_out} earlier ones are left out."));
    }
    &all[left_out..]
}

pub fn incidents(page: &mut Page, run: &Run) {
    page.section("Incidents");
    let usual = ["checkpoint", "checkpoint written", "decision", "cutover"];
    let all: Vec<_> = run.events.0.iter().filter(|e| !usual.contains(&e.event.as_str())).collect();
    if all.is_empty() {
        return page.missing("None: no restart, no move called off, no checkpoint that failed.");
    }
    let rows = latest(page, &all).iter().map(|e| {
        let mut text = e.why.clone().unwrap_or_default();
        if let (Some(from), Some(lost)) = (e.from, e.lost_steps) {
            text.push_str(&format!("; went on from step {from}, {lost} steps taken again"));
        }
        if let Some(lost) = e.seconds_lost {
            text.push_str(&format!(", {} lost", Seconds(lost)));
        }
        vec![clock(e.seconds), e.step.to_string(), escape(&e.event), escape(&text)]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    page.table(&["time#", "step#", "what", "why"], &rows);
}
