//! What the loop keeps between steps, so that a snapshot can be taken at any of them.

use std::collections::VecDeque;

use super::snapshot::{Observed, Window};
use crate::forecast::Robust;
use crate::units::Seconds;

/// Measurements in the shortest window. Its median is wrong only when five of nine are.
const SHORTEST: usize = 9;
/// Windows, each twice as long as the one before.
const N_WINDOWS: u32 = 7;
/// First measurements after a cutover, which are not like those that follow.
const WARM_UP: usize = 2;

/// Remembers the last measurements of a quantity under the running plan.
#[derive(Clone, Debug, Default)]
pub struct Tracker {
    /// Durations and values, oldest first.
    latest: VecDeque<(Seconds, f64)>,
    n_seen: usize,
}

impl Tracker {
    /// Takes in what was measured in a step of this duration. A value that is no number is left out.
    pub fn push(&mut self, duration: Seconds, value: f64) {
        self.n_seen += 1;
        if self.n_seen <= WARM_UP || !value.is_finite() {
            return;
        }
        if self.latest.len() == SHORTEST << (N_WINDOWS - 1) {
            self.latest.pop_front();
        }
        self.latest.push_back((duration, value));
    }

    /// Forgets everything: another plan runs.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Summaries of the last 9, 18, 36, ... measurements, as far as there are so many, and of all.
    pub fn observed(&self) -> Observed {
        let n = self.latest.len();
        let window = |length: usize| {
            let latest = self.latest.iter().skip(n - length);
            let values: Vec<f64> = latest.clone().map(|l| l.1).collect();
            Window { span: latest.map(|l| l.0).sum(), seen: Robust::of(&values) }
        };
        let lengths = (0..N_WINDOWS).map(|i| SHORTEST << i).take_while(|&length| length <= n);
        Observed { windows: lengths.map(window).collect() }
    }
}

/// Keeps account of whether a move pays, as far as it was said to: what both plans would take, and do, under the speeds that
/// are measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ledger {
    /// The end of what was promised.
    until: Seconds,
    time: f64,
    saved: f64,
}

impl Ledger {
    /// For a move whose [`super::Balance`] ends at `until`.
    pub fn new(until: Seconds) -> Self {
        Self { until, ..Self::default() }
    }

    /// Notes a time span up to `now` in which steps of the left plan would have taken `before` and those of the new one are
    /// predicted to take `after`.
    pub fn note(&mut self, now: Seconds, span: Seconds, before: Seconds, after: Seconds) {
        let rate = 1.0 - after / before;
        if now <= self.until && rate.is_finite() && span.0 > 0.0 {
            self.time += span.0;
            self.saved += span.0 * rate;
        }
    }

    /// The share of time saved so far; `None` before anything was noted.
    pub fn gain(&self) -> Option<f64> {
        (self.time > 0.0).then(|| self.saved / self.time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_double_and_skip_the_first_steps_of_a_plan() {
        let mut tracker = Tracker::default();
        assert_eq!(tracker.observed().now(), None);
        tracker.push(Seconds(1.0), 99.0);
        tracker.push(Seconds(1.0), 99.0);
        (0..40).for_each(|i| tracker.push(Seconds(0.5), f64::from(i)));
        let windows = tracker.observed().windows;
        assert_eq!(windows.iter().map(|w| w.seen.n).collect::<Vec<_>>(), [9, 18, 36]);
        assert_eq!((windows[0].span, windows[0].seen.centre), (Seconds(4.5), 35.0));
        (0..9999).for_each(|_| tracker.push(Seconds(0.5), 1.0));
        assert_eq!(tracker.observed().windows.last().unwrap().seen.n, 576);
        tracker.reset();
        assert!(tracker.observed().windows.is_empty());
    }

    #[test]
    fn a_ledger_weighs_by_time_and_ends_with_the_promise() {
        let mut ledger = Ledger::new(Seconds(50.0));
        assert_eq!(ledger.gain(), None);
        ledger.note(Seconds(10.0), Seconds(10.0), Seconds(2.0), Seconds(1.0));
        ledger.note(Seconds(40.0), Seconds(30.0), Seconds(1.0), Seconds(1.5));
        ledger.note(Seconds(45.0), Seconds(5.0), Seconds(0.0), Seconds(0.0));
        assert_eq!(ledger.gain(), Some((10.0 * 0.5 - 30.0 * 0.5) / 40.0));
        ledger.note(Seconds(60.0), Seconds(15.0), Seconds(1.0), Seconds(9.0));
        assert_eq!(ledger.gain(), Some((10.0 * 0.5 - 30.0 * 0.5) / 40.0));
    }
}
