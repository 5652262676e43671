//! Decisions, moves and incidents, line by line.

use super::Run;
use super::decisions::Change;
use super::headline::clock;
use super::page::{Page, escape};
use crate::transition::Move;
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
        rows.push(vec![
            String::new(),
            String::new(),
            String::new(),
            String::new(),
            format!("{} lines left out", all.left_out),
        ]);
    }
    rows.extend(all.last.iter().map(row));
    page.table(&["time#", "step#", "decision", "in a row#", "reason"], &rows);
}

pub fn moves(page: &mut Page, run: &Run) {
    page.section("Moves");
    // By revision: what was expected (the record of decisions) and what happened (the events).
    let mut revisions: Vec<u64> = run.events.of("cutover").map(|e| e.revision).collect();
    revisions.extend(run.decisions.moves.iter().map(|m| m.revision));
    let mut seen = std::collections::BTreeSet::new();
    revisions.retain(|r| seen.insert(*r));
    if revisions.is_empty() {
        return page.missing("The plan did not change.");
    }
    page.text("What a move was expected to cost and bring, and what it did. The gain is a share of time, by the predictions for both plans under the speeds measured since.");
    let n = revisions.len();
    let rows = revisions.iter().skip(n.saturating_sub(MAX_ROWS)).map(|&revision| {
        let expected = run.decisions.moves.iter().find(|m| m.revision == revision);
        let event = run.events.of("cutover").find(|e| e.revision == revision);
        let time = event.map(|e| e.seconds).or(expected.map(|m| m.time.0)).unwrap_or(0.0);
        let step = event.and_then(|e| e.at).or(expected.map(|m| m.step)).unwrap_or(0);
        let both = |of: &dyn Fn(&Move) -> Option<f64>, measured: Option<f64>, show: &dyn Fn(f64) -> String| {
            let show = |n: Option<f64>| n.map_or_else(|| "–".to_owned(), show);
            (show(expected.and_then(of)), show(measured))
        };
        let seconds = |s: f64| Seconds(s).to_string();
        let percent = |s: f64| format!("{:.1} %", 100.0 * s);
        let pause_seen = event.and_then(|e| e.pause_seconds).or(expected.and_then(|m| m.pause.measured.map(|s| s.0)));
        let prepare_seen =
            event.and_then(|e| e.prepare_seconds).or(expected.and_then(|m| m.prepare.measured.map(|s| s.0)));
        let pause = both(&|m| Some(m.pause.expected.0), pause_seen, &seconds);
        let prepare = both(&|m| Some(m.prepare.expected.0), prepare_seen, &seconds);
        let gain = both(&|m| Some(m.gain.expected), expected.and_then(|m| m.gain.measured), &percent);
        let moved = event.and_then(|e| e.moved_bytes).map_or_else(|| "–".to_owned(), |b| Bytes(b).to_string());
        let predicted = event.and_then(|e| e.predicted_step_seconds).map_or_else(|| "–".to_owned(), seconds);
        let seen = run.log.under(revision).1.map_or_else(|| "–".to_owned(), seconds);
        let numbers = [pause.0, pause.1, prepare.0, prepare.1, gain.0, gain.1, predicted, seen, moved];
        [revision.to_string(), clock(time), step.to_string()].into_iter().chain(numbers).collect()
    });
    let rows: Vec<Vec<String>> = rows.collect();
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

pub fn incidents(page: &mut Page, run: &Run) {
    page.section("Incidents");
    let usual = ["checkpoint", "checkpoint written", "decision", "cutover"];
    let all: Vec<_> = run.events.0.iter().filter(|e| !usual.contains(&e.event.as_str())).collect();
    if all.is_empty() {
        return page.missing("None: no restart, no move called off, no checkpoint that failed.");
    }
    let rows = all.iter().skip(all.len().saturating_sub(MAX_ROWS)).map(|e| {
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
