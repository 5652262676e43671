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

/// Keeps account of whether a move pays, as far as it was said to: what steps take, and what they would have taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ledger {
    /// The end of what was promised.
    until: Seconds,
    before: f64,
    after: f64,
}

/// A step that takes longer than so many of the left plan was held up by something that no plan is known to change.
const HELD_UP: f64 = 2.0;

impl Ledger {
    /// For a move whose [`super::Balance`] ends at `until`.
    pub fn new(until: Seconds) -> Self {
        Self { until, ..Self::default() }
    }

    /// Notes a step that ended `now` and took `after`; the left plan would have taken `before`.
    pub fn note(&mut self, now: Seconds, before: Seconds, after: Seconds) {
        if now <= self.until && before.0 > 0.0 && before.0.is_finite() && after.0.is_finite() {
            self.before += before.0;
            self.after += after.0.min(before.0 * HELD_UP);
        }
    }

    /// The share of time saved so far; `None` before anything was noted.
    pub fn gain(&self) -> Option<f64> {
        (self.before > 0.0).then(|| 1.0 - self.after / self.before)
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
    fn a_ledger_adds_up_steps_and_ends_with_the_promise() {
        let mut ledger = Ledger::new(Seconds(50.0));
        assert_eq!(ledger.gain(), None);
        let note = |ledger: &mut Ledger, now, before, after| ledger.note(Seconds(now), Seconds(before), Seconds(after));
        note(&mut ledger, 10.0, 2.0, 1.0);
        note(&mut ledger, 40.0, 1.0, 1.5);
        note(&mut ledger, 45.0, 0.0, 1.0);
        note(&mut ledger, 45.0, f64::NAN, 1.0);
        assert_eq!(ledger.gain(), Some(1.0 - 2.5 / 3.0));
        // Held up for a minute.
        note(&mut ledger, 49.0, 1.0, 60.0);
        assert_eq!(ledger.gain(), Some(1.0 - 4.5 / 4.0));
        note(&mut ledger, 60.0, 1.0, 9.0);
        assert_eq!(ledger.gain(), Some(1.0 - 4.5 / 4.0));
    }
}
