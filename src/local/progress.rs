//! What the terminal shows while a job trains.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::board::Board;
use crate::plan::Plan;
use crate::runtime::StepReport;
use crate::topology::Measured;
use crate::units::Seconds;
use crate::wire::report::Learned;

/// A bar on a terminal, a line now and then elsewhere, nothing when quiet.
pub struct Progress {
    bar: Option<ProgressBar>,
    plain: bool,
    unit: &'static str,
    per_step: f64,
    steps: u64,
    /// When the first step was reported, and the steps done by then: what came before was no training, and the first
    /// step is slower than others.
    first: Option<(Instant, u64)>,
    last_line: Option<Instant>,
    /// Moving average of units per second.
    rate: Option<f64>,
    /// Shows the same to others.
    board: Option<Arc<Board>>,
}

const EVERY: Duration = Duration::from_secs(5);

impl Progress {
    /// `per_step` units (`tokens`, `rows`) are trained in each step from `first` to `steps`.
    pub fn new(
        quiet: bool,
        steps: u64,
        first: u64,
        (unit, per_step): (&'static str, f64),
        board: Option<Arc<Board>>,
    ) -> Self {
        if let Some(board) = &board {
            board.write(|r| (r.step, r.steps) = (first, steps));
        }

        let terminal = std::io::stderr().is_terminal();
        let bar = (!quiet && terminal).then(|| {
            let bar = ProgressBar::new(steps);
            let template = "{bar:28.cyan/dim} {pos}/{len} {msg} eta {eta}";
            bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
            bar.set_position(first);
            bar
        });
        Self { bar, plain: !quiet && !terminal, unit, per_step, steps, first: None, last_line: None, rate: None, board }
    }

    pub fn say(&self, line: &str) {
        if let Some(board) = &self.board {
            board.say(line);
        }
        match &self.bar {
            Some(bar) => bar.println(line),
            None if self.plain => eprintln!("{line}"),
            None => {}
        }
    }

    pub fn compiling(&self, done: u64, of: u64) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("compiling {done}/{of}"));
        }
    }

    /// A plan has come into force.
    pub fn plan(&self, plan: &Plan, why: &str) {
        if let Some(board) = &self.board {
            board.plan(plan, why);
        }
    }

    /// Where somebody may ask about the job.
    pub fn board(&self) -> Option<&Arc<Board>> {
        self.board.as_ref()
    }

    /// A plan waits for approval, or none does.
    pub fn recommend(&self, plan: Option<&(u64, String)>) {
        if let Some(board) = &self.board {
            board.recommend(plan);
        }
    }

    /// Training has gone back to a checkpoint so many times.
    pub fn restarts(&self, n: u32) {
        if let Some(board) = &self.board {
            board.write(|r| r.restarts = n);
        }
    }

    /// What steps have taught of kinds of devices.
    pub fn learned(&self, bundle: &str, kinds: &BTreeMap<String, Measured>) {
        if let Some(board) = &self.board {
            board.write(|r| r.learned = Some(Learned { bundle: bundle.to_owned(), kinds: kinds.clone() }));
        }
    }

    pub fn step(&mut self, report: &StepReport) {
        let done = report.step + 1;
        let (since, first) = *self.first.get_or_insert((Instant::now(), done));
        let eta =
            eta(Seconds(since.elapsed().as_secs_f64()), done.saturating_sub(first), self.steps.saturating_sub(done));
        let now = self.per_step / report.seconds.max(1e-9);
        let rate = self.rate.map_or(now, |r| r + 0.1 * (now - r));
        self.rate = Some(rate);
        if let Some(board) = &self.board {
            board.step(report, eta, (rate, self.unit));
        }
        let load: Vec<String> = report.workers.iter().map(|w| load(w.busy_s / report.seconds.max(1e-9))).collect();
        let text = format!("loss {:.4} {} {}/s load {}", report.loss, thousands(rate), self.unit, load.join(" "));
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(text);
        } else if self.plain && (done == self.steps || self.last_line.is_none_or(|l| l.elapsed() > EVERY)) {
            self.last_line = Some(Instant::now());
            let eta = eta.map(|eta| format!(" eta {:.0} s", eta.0)).unwrap_or_default();
            eprintln!("step {done}/{} {text}{eta}", self.steps);
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Time to the end when `done` steps took `elapsed`; `None` before there is one.
fn eta(elapsed: Seconds, done: u64, left: u64) -> Option<Seconds> {
    (done > 0).then(|| elapsed * (left as f64 / done as f64))
}

/// A small bar and a percentage.
fn load(share: f64) -> String {
    let share = share.clamp(0.0, 1.0);
    let eighths = ["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
    format!("{}{:.0}%", eighths[((share * 8.0) as usize).min(7)], share * 100.0)
}

pub fn thousands(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_told_from_the_second_step_on() {
        assert_eq!(eta(Seconds(0.0), 0, 199), None);
        assert_eq!(eta(Seconds(3.0), 2, 10), Some(Seconds(15.0)));
    }
}
