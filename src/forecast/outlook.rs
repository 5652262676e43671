//! A forecast, and the questions it answers.

use serde::{Deserialize, Serialize};

use super::{Method, Robust, change};
use crate::units::Seconds;

/// The next values of a series, with an interval around each.
///
/// # Guarantees
/// `lower`, `mean` and `upper` have one finite value per step; `lower <= mean <= upper`.
/// # Caveats
/// The interval holds `level` of the values of one step, not of whole paths, and as far as the future resembles the
/// backtest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Forecast {
    pub method: Method,
    /// When the first forecast value will be measured.
    pub start: Seconds,
    pub interval: Seconds,
    pub level: f64,
    /// Measured values it was made from.
    pub n_values: usize,
    /// Error of the method in the backtest, in units of the mean change from one value to the next; 0 for a series that
    /// never changes.
    pub mase: f64,
    /// All but a few of these values lay between.
    pub known: (f64, f64),
    /// By how much the level may be off for noise and for lack of values, should it stay as it is: a standard error.
    pub doubt: f64,
    #[serde(default)]
    pub held: Held,
    pub lower: Vec<f64>,
    pub mean: Vec<f64>,
    pub upper: Vec<f64>,
}

/// A level that the forecast does not expect to last, and for how many intervals it has lasted until the forecast was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Held {
    pub level: f64,
    pub intervals: usize,
}

/// One forecast value, or several summed up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Band {
    pub lower: f64,
    pub mean: f64,
    pub upper: f64,
}

/// The largest or smallest expected value, and how far ahead it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extreme {
    /// Steps ahead: 0 is the next value.
    pub step: usize,
    pub band: Band,
}

impl Forecast {
    /// Steps ahead.
    pub fn horizon(&self) -> usize {
        self.mean.len()
    }

    pub fn at(&self, step: usize) -> Band {
        Band { lower: self.lower[step], mean: self.mean[step], upper: self.upper[step] }
    }

    /// Time of a step.
    pub fn time(&self, step: usize) -> Seconds {
        self.start + self.interval * step as f64
    }

    /// The largest expected value over the horizon; the first of equals.
    pub fn max(&self) -> Extreme {
        self.extreme(|candidate, best| candidate > best)
    }

    /// The smallest expected value over the horizon; the first of equals.
    pub fn min(&self) -> Extreme {
        self.extreme(|candidate, best| candidate < best)
    }

    fn extreme(&self, better: impl Fn(f64, f64) -> bool) -> Extreme {
        let best = |best: usize, step: usize| if better(self.mean[step], self.mean[best]) { step } else { best };
        let step = (0..self.horizon()).fold(0, best);
        Extreme { step, band: self.at(step) }
    }

    /// Mean over the horizon, of the expected values and of both bounds.
    pub fn average(&self) -> Band {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        Band { lower: mean(&self.lower), mean: mean(&self.mean), upper: mean(&self.upper) }
    }

    /// The first step that may lie above `limit`.
    pub fn may_exceed(&self, limit: f64) -> Option<usize> {
        self.upper.iter().position(|&u| u > limit)
    }

    /// The first step that may lie below `limit`.
    pub fn may_undercut(&self, limit: f64) -> Option<usize> {
        self.lower.iter().position(|&l| l < limit)
    }

    /// Starts from where the quantity is now, should that be a level it has not known: the latest measurements are finer than
    /// the intervals of a series, and a forecast learns of a new level only after some of these.
    ///
    /// `now`: the level of late; `least`: what counts as another level, as a share of the expected one. A forecast with a season stays as it is: it knows when the quantity comes and goes.
    pub fn anchor(&mut self, now: &Robust, least: f64) {
        let Some(first) = (self.horizon() > 0).then(|| self.at(0)) else { return };
        let (low, high) = self.known;
        let known = (low..=high).contains(&now.centre);
        let expected = Robust { centre: first.mean, spread: 0.0, n: u64::MAX };
        let least = least * first.mean.abs();
        if known || self.method.has_season() || change::shift(&expected, now, least).is_none() {
            return;
        }
        let away = now.centre - first.mean;
        self.doubt += now.error();
        for values in [&mut self.lower, &mut self.mean, &mut self.upper] {
            values.iter_mut().for_each(|v| *v += away);
        }
        self.known = (low.min(now.centre), high.max(now.centre));
    }

    /// What is expected in so many intervals from `now`, when the quantity is at `level`.
    ///
    /// The latest measurements are finer and younger than the values a forecast is made of. By what they are away from it
    /// now, it will be off for a while: for as long again as that level has [held](Held) already, then by half as much from
    /// each interval to the next.
    ///
    /// # Source
    /// As long again: the ski rental problem (Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988).
    pub fn expect(&self, now: Seconds, level: f64, ahead: usize) -> f64 {
        const KEPT: f64 = 0.5;
        let past = ((now - self.start) / self.interval).max(0.0) as usize;
        let mean = |i: usize| self.mean.get(i.min(self.horizon().saturating_sub(1))).copied().unwrap_or(level);
        let away = level - mean(past);
        let same = (level - self.held.level).abs() < away.abs();
        let until = if same { past.max(self.held.intervals) } else { past };
        mean(past + ahead) + away * KEPT.powi((past + ahead).saturating_sub(until).min(64) as i32)
    }

    /// Forgets steps beyond `horizon`.
    pub fn truncate(&mut self, horizon: usize) {
        self.lower.truncate(horizon);
        self.mean.truncate(horizon);
        self.upper.truncate(horizon);
    }

    pub(super) fn clamp(&mut self, least: Option<f64>, most: Option<f64>) {
        let (least, most) = (least.unwrap_or(f64::MIN), most.unwrap_or(f64::MAX));
        for values in [&mut self.lower, &mut self.mean, &mut self.upper] {
            values.iter_mut().for_each(|v| *v = v.clamp(least, most));
        }
    }
}

#[cfg(test)]
impl Forecast {
    /// Of these values, for tests: nothing else is in doubt.
    pub fn of(start: Seconds, interval: Seconds, [lower, mean, upper]: [Vec<f64>; 3]) -> Self {
        let least = mean.iter().copied().fold(f64::INFINITY, f64::min);
        let most = mean.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (method, level, n_values, mase) = (Method::Naive, 0.9, 100, 1.0);
        let (known, doubt, held) = ((least, most), 0.0, Held::default());
        Self { method, start, interval, level, n_values, mase, known, doubt, held, lower, mean, upper }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat() -> Forecast {
        Forecast::of(Seconds(100.0), Seconds(10.0), [vec![0.0; 3], vec![1.0; 3], vec![4.0; 3]])
    }

    #[test]
    fn what_the_present_is_away_from_a_forecast_fades() {
        let forecast = Forecast { mean: vec![1.0, 2.0, 3.0], ..flat() };
        let expect = |now: f64, level: f64| [0, 1, 2].map(|ahead| forecast.expect(Seconds(now), level, ahead));
        assert_eq!(expect(95.0, 1.0), [1.0, 2.0, 3.0]);
        assert_eq!(expect(105.0, 1.5), [1.5, 2.25, 3.125]);
        // Later, it is the second value that is to be compared with; beyond the last one it stays.
        assert_eq!(expect(111.0, 1.5), [1.5, 2.75, 2.875]);
        assert_eq!(expect(1000.0, 3.0), [3.0; 3]);
    }

    #[test]
    fn a_level_that_has_held_is_expected_to_last_as_long_again() {
        let held = Held { level: 1.5, intervals: 2 };
        let forecast = Forecast { held, lower: vec![0.0; 4], mean: vec![1.0; 4], upper: vec![4.0; 4], ..flat() };
        let expect = |now: f64, level: f64| [0, 1, 2, 3].map(|ahead| forecast.expect(Seconds(now), level, ahead));
        assert_eq!(expect(100.0, 1.5), [1.5, 1.5, 1.5, 1.25]);
        // One interval later there is one less to come; another level has not held.
        assert_eq!(expect(110.0, 1.5), [1.5, 1.5, 1.25, 1.125]);
        assert_eq!(expect(100.0, 1.2), [1.2, 1.1, 1.05, 1.025]);
    }
}
