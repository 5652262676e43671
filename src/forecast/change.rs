//! Whether a level has moved and stayed, in spite of noise.

use serde::{Deserialize, Serialize};

use super::robust::{self, Robust};

/// Fewest values on each side of a change.
const LEAST_RUN: usize = 4;
/// Shortest stretch that is searched.
const LEAST_STRETCH: usize = 12;
/// Values further from the middle than this many spreads count as if they were no further.
const BOUND: f64 = 3.0;
/// The largest partial sum that noise reaches in one of 500 stretches (limit of Kolmogorov's distribution).
const BY_CHANCE: f64 = 1.86;
/// A level has moved when it is this many standard errors away.
const SURE: f64 = 5.0;

/// A new level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// The first value at the new level.
    pub at: usize,
    /// Median before, back to the change before this one or a little more.
    pub before: f64,
    /// Median from `at` on.
    pub after: f64,
}

/// The last change of level by at least `least`.
///
/// Stretches that end with the last value are searched from short to long, so that the last change is not masked by
/// earlier ones. A stretch has a change where the partial sums of its bounded deviations peak, if the peak is beyond
/// chance, both sides are long enough, their medians are far apart in relation to `least` and to the noise, and two
/// levels explain the stretch better than one straight line.
///
/// # Complexity
/// O(n).
/// # Source
/// CUSUM for a change at an unknown time (Page, Biometrika 42, 1955), with bounded scores as in Huber's M-estimates.
/// The floor on the size of a change is the lesson of FALCON (Wu et al., 2024): it removes most false alarms.
pub fn last(values: &[f64], least: f64) -> Option<Change> {
    let n = values.len();
    let noise = robust::noise(values);
    let mut length = LEAST_STRETCH;
    while length < 2 * n {
        let start = n.saturating_sub(length);
        if let Some(change) = within(&values[start..], least, noise) {
            return Some(Change { at: start + change.at, ..change });
        }
        length *= 2;
    }
    None
}

fn within(values: &[f64], least: f64, noise: f64) -> Option<Change> {
    let n = values.len();
    if n < 2 * LEAST_RUN {
        return None;
    }
    let centre = robust::median(values);
    // Never zero: among equal values any other one is a change, in proportion.
    let unit = noise.max(least / BOUND).max(f64::MIN_POSITIVE);
    let scores: Vec<f64> = values.iter().map(|v| ((v - centre) / unit).clamp(-BOUND, BOUND)).collect();
    let mean = scores.iter().sum::<f64>() / n as f64;
    let (mut sum, mut peak, mut at) = (0.0, 0.0f64, 0);
    for (i, score) in scores.iter().enumerate().take(n - LEAST_RUN) {
        sum += score - mean;
        if i + 1 >= LEAST_RUN && f64::abs(sum) > peak {
            (peak, at) = (f64::abs(sum), i + 1);
        }
    }
    if at == 0 || peak < BY_CHANCE * (n as f64).sqrt() {
        return None;
    }
    let at = nearest(values, robust::median(&values[..at]), robust::median(&values[at..]));
    // A few values may look calmer than the whole is.
    let side = |values: &[f64]| {
        let side = Robust::of(values);
        Robust { spread: side.spread.max(noise), ..side }
    };
    let (head, tail) = (side(&values[..at]), side(&values[at..]));
    let moved = shift(&head, &tail, least).is_some();
    (moved && steps_beat_line(values, at, &head, &tail)).then_some(Change {
        at,
        before: head.centre,
        after: tail.centre,
    })
}

/// Where to go over from one level to the other, so that the values are as near to their level as can be.
fn nearest(values: &[f64], before: f64, after: f64) -> usize {
    let (mut sum, mut least, mut at) = (0.0, f64::INFINITY, LEAST_RUN);
    for (i, v) in values.iter().enumerate().take(values.len() - LEAST_RUN) {
        sum += (v - before).abs() - (v - after).abs();
        if i + 1 >= LEAST_RUN && sum < least {
            (least, at) = (sum, i + 1);
        }
    }
    at
}

/// Whether two levels leave less than one straight line does, in absolute values.
fn steps_beat_line(values: &[f64], at: usize, head: &Robust, tail: &Robust) -> bool {
    let left = |values: &[f64], level: f64| values.iter().map(|v| (v - level).abs()).sum::<f64>();
    let steps = left(&values[..at], head.centre) + left(&values[at..], tail.centre);
    // A line through the middles of both sides.
    let (n, head_at) = (values.len() as f64, at as f64 / 2.0);
    let slope = (tail.centre - head.centre) / (n / 2.0);
    let on_line = |i: usize| head.centre + slope * (i as f64 - head_at);
    let line: f64 = values.iter().enumerate().map(|(i, v)| (v - on_line(i)).abs()).sum();
    steps < line
}

/// How far a level has moved.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shift {
    pub from: f64,
    pub to: f64,
}

impl Shift {
    /// Relative to where it came from.
    pub fn relative(&self) -> f64 {
        self.to / self.from - 1.0
    }
}

/// Whether the centre of `recent` is away from that of `reference` by at least `least`, and by more than the noise of
/// both allows.
pub fn shift(reference: &Robust, recent: &Robust, least: f64) -> Option<Shift> {
    let (from, to) = (reference.centre, recent.centre);
    let away = (to - from).abs();
    let error = reference.error().hypot(recent.error());
    (away >= least && away > SURE * error).then_some(Shift { from, to })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(i: usize) -> f64 {
        let x = (i as u64 + 7).wrapping_mul(0xd134_2543_de82_ef95);
        let x = (x ^ (x >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x >> 11) as f64 / (1u64 << 53) as f64 - 0.5) * 3.4
    }

    #[test]
    fn finds_where_the_level_moved_for_good() {
        for at in [20, 100, 180] {
            let values: Vec<f64> = (0..200).map(|i| if i < at { 1.0 } else { 1.3 } + 0.03 * noise(i)).collect();
            let change = last(&values, 0.1).unwrap();
            assert!(change.at.abs_diff(at) <= 1, "moved at {at}, found {change:?}");
            assert!((change.before - 1.0).abs() < 0.05 && (change.after - 1.3).abs() < 0.05, "{change:?}");
        }
    }

    #[test]
    fn finds_the_last_of_several_changes() {
        let values: Vec<f64> = (0..400).map(|i| [1.0, 2.0, 1.0, 2.0, 1.0][i * 5 / 400] + 0.05 * noise(i)).collect();
        assert!(last(&values, 0.1).unwrap().at.abs_diff(320) <= 1);
    }

    #[test]
    fn noise_spikes_and_lines_are_no_change() {
        for seed in 0..200 {
            let mut values: Vec<f64> = (0..100).map(|i| 1.0 + 0.1 * noise(seed * 100 + i)).collect();
            values[97] = 4.0;
            values[40] = 5.0;
            assert_eq!(last(&values, 0.1), None, "seed {seed}");
        }
        assert_eq!(last(&(0..300).map(|i| 1.0 + 0.01 * f64::from(i)).collect::<Vec<_>>(), 0.1), None);
        assert_eq!(last(&[1.0; 100], 0.1), None);
        assert_eq!(last(&[0.0; 100], 0.0), None);
        assert_eq!(last(&[], 0.1), None);
    }

    #[test]
    fn a_small_sample_has_to_be_further_away() {
        let before = Robust { centre: 1.0, spread: 0.2, n: 100 };
        assert!(shift(&before, &Robust { centre: 1.3, spread: 0.2, n: 2 }, 0.1).is_none());
        assert!(shift(&before, &Robust { centre: 1.3, spread: 0.2, n: 30 }, 0.1).is_some());
        assert!(shift(&before, &Robust { centre: 1.05, spread: 0.0, n: 1000 }, 0.1).is_none());
        assert!(shift(&before, &Robust::default(), 0.1).is_none());
    }
}
