//! The run in a few figures.

use super::Run;
use super::page::Page;
use crate::forecast::robust::median;
use crate::local::progress::thousands;
use crate::units::Seconds;

pub fn subtitle(run: &Run) -> String {
    let ending = match run.summary["ending"].as_str() {
        Some("done") => "trained to its end".to_owned(),
        Some("interrupted") => "stopped on request".to_owned(),
        Some("failed") => match run.summary["error"].as_str() {
            Some(error) => format!("failed: {error}"),
            None => "failed".to_owned(),
        },
        Some(other) => other.to_owned(),
        None => "still running, or cut off: there is no summary".to_owned(),
    };
    let model = run.summary["model"].as_str().map(|m| format!("{m} · ")).unwrap_or_default();
    format!("{model}{} · {ending}", run.name)
}

pub fn figures(page: &mut Page, run: &Run) {
    let mut figures = Vec::new();
    let mut add = |name: &str, value: String, remark: String| figures.push((name.to_owned(), value, remark));
    let (log, events) = (&run.log, &run.events);

    let n_steps = log.counted().count();
    let of = run.job.as_ref().map(|j| match j.spec.epochs {
        Some(epochs) => format!("{epochs} passes over the data in the manifest"),
        None => format!("of {} in the manifest", thousands(j.spec.steps as f64)),
    });
    add("steps", thousands(n_steps as f64), of.unwrap_or_default());
    let losses: Vec<f64> = log.counted().map(|s| s.loss).filter(|l| l.is_finite()).collect();
    if let (Some(first), Some(last)) = (losses.first(), losses.last()) {
        add("loss", format!("{last:.4}"), format!("{first:.4} at first"));
    }
    let seconds = run.summary["seconds"].as_f64().unwrap_or(run.end());
    let compiling = run.summary["compile_seconds"].as_f64();
    add(
        "time",
        clock(seconds),
        compiling.map(|c| format!("{} of it until the first step", Seconds(c))).unwrap_or_default(),
    );
    let times: Vec<f64> = log.counted().map(|s| s.seconds).filter(|s| s.is_finite()).collect();
    if !times.is_empty() {
        let predicted: Vec<f64> = log.counted().map(|s| s.predicted).filter(|p| p.is_finite()).collect();
        let remark = if predicted.is_empty() {
            String::new()
        } else {
            format!("{} predicted, in the median", Seconds(median(&predicted)))
        };
        add("step", Seconds(median(&times)).to_string(), remark);
    }
    if let Some((unit, rate)) = run.unit_rate() {
        add("throughput", thousands(rate), format!("{unit} per second, in the median"));
    }
    let pauses: f64 = events.of("cutover").filter_map(|e| e.pause_seconds).sum();
    let n = events.of("cutover").count();
    let remark = if n == 0 {
        "the first plan stayed".to_owned()
    } else {
        format!("training stood still for {}", Seconds(pauses))
    };
    add("changes of plan", n.to_string(), remark);
    let lost: u64 = events.of("restart").filter_map(|e| e.lost_steps).fold(0, u64::saturating_add);
    let lost_time: f64 = events.of("restart").filter_map(|e| e.seconds_lost).sum();
    let n = events.of("restart").count();
    let remark = if n == 0 {
        String::new()
    } else {
        format!("{lost} steps taken again, {} until training went on", Seconds(lost_time))
    };
    add("restarts", n.to_string(), remark);
    let n = events.of("checkpoint").count();
    let last = events.of("checkpoint").filter_map(|e| e.at).last();
    add("checkpoints", n.to_string(), last.map(|at| format!("the last after step {at}")).unwrap_or_default());
    let held: Vec<(usize, f64)> = run.decisions.devices.values().filter_map(|d| d.held()).collect();
    let all: usize = held.iter().map(|h| h.0).sum();
    if all > 0 {
        let inside: f64 = held.iter().map(|&(n, share)| n as f64 * share).sum();
        let level = run.decisions.devices.values().filter_map(|d| d.latest.as_ref()).map(|f| f.level).next();
        let meant = level.map(|l| format!(", {:.0} % were meant to", 100.0 * l)).unwrap_or_default();
        add(
            "forecasts",
            format!("{:.0} %", 100.0 * inside / all as f64),
            format!("of later speeds lay in the interval{meant}"),
        );
    }
    page.figures(&figures);
}

impl Run {
    /// What the run trains, and how much of it per second.
    pub(super) fn unit_rate(&self) -> Option<(&'static str, f64)> {
        let rate = |unit: &'static str| Some((unit, self.summary[format!("{unit}_per_second")].as_f64()?));
        rate("tokens").or_else(|| rate("rows")).filter(|r| r.1.is_finite())
    }

    /// What one step trains.
    pub(super) fn unit_per_step(&self) -> Option<(&'static str, f64)> {
        let (unit, rate) = self.unit_rate()?;
        let step = self.summary["step_seconds"]["median"].as_f64()?;
        Some((unit, (rate * step).round())).filter(|u| u.1 > 0.0)
    }
}

/// A moment of the run, or all of its time.
pub fn clock(seconds: f64) -> String {
    let seconds = if seconds > 0.0 { seconds } else { 0.0 };
    let whole = seconds as u64;
    let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
    match hours {
        0 if whole < 100 => format!("{seconds:.1} s"),
        0 => format!("{minutes}:{rest:02} min"),
        _ => format!("{hours}:{minutes:02}:{rest:02} h"),
    }
}
