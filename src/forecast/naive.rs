//! The forecasts to beat.

use super::smoothing::{Smoothing, State, Trend};
use super::{Fit, History, Method, Predict, robust};

/// The last value stays, if it is one to be believed: a wild one waits for the next one to confirm it.
pub struct Naive;

/// Changes beyond this many times the usual one are wild.
const WILD: f64 = 5.0;

impl Fit for Naive {
    fn method(&self) -> Method {
        Method::Naive
    }

    fn needs(&self) -> usize {
        1
    }

    /// All the noise of one value goes into it.
    fn margin(&self, _: &Method) -> f64 {
        0.1
    }

    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>> {
        let (&first, rest) = history.values.split_first()?;
        let mut last = Last { value: first, usual: WILD * robust::noise(history.values), wild: None };
        rest.iter().for_each(|&v| last.observe(v));
        Some(Box::new(last))
    }
}

struct Last {
    value: f64,
    /// The largest change that is believed at once.
    usual: f64,
    /// Whether the value after was a wild one, and above.
    wild: Option<bool>,
}

impl Predict for Last {
    fn predict(&self, out: &mut [f64]) {
        out.fill(self.value);
    }

    fn memory(&self) -> f64 {
        1.0
    }

    fn observe(&mut self, value: f64) {
        let above = value > self.value;
        if (value - self.value).abs() <= self.usual || self.wild == Some(above) {
            (self.value, self.wild) = (value, None);
        } else {
            self.wild = Some(above);
        }
    }
}

/// The mean of all values stays: the best guess about a load that comes and goes.
pub struct Mean;

impl Fit for Mean {
    fn method(&self) -> Method {
        Method::Mean
    }

    fn needs(&self) -> usize {
        3
    }

    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>> {
        let n = history.values.len();
        Some(Box::new(Average { mean: history.values.iter().sum::<f64>() / n as f64, n }))
    }
}

struct Average {
    mean: f64,
    n: usize,
}

impl Predict for Average {
    fn predict(&self, out: &mut [f64]) {
        out.fill(self.mean);
    }

    fn memory(&self) -> f64 {
        self.n as f64
    }

    fn observe(&mut self, value: f64) {
        self.n += 1;
        self.mean += (value - self.mean) / self.n as f64;
    }
}

/// What is away from the mean comes back to it, as fast as it did so far: load that stays for a while.
///
/// # Source
/// A first-order autoregression seen through noise: autocovariances at two lags tell how fast the load forgets, which
/// the one at lag 0, with the noise in it, would not (Box and Jenkins, Time Series Analysis, 1970, chapter 3).
pub struct Reverting;

/// Values whose median is the level that the load comes back from.
const LATEST: usize = 3;
/// The shorter lag, in values; the longer one is twice that.
const LAG: usize = 4;

impl Fit for Reverting {
    fn method(&self) -> Method {
        Method::Reverting
    }

    fn needs(&self) -> usize {
        6 * LAG
    }

    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>> {
        let values = history.values;
        let n = values.len();
        let mean = values.iter().sum::<f64>() / n as f64;
        let covariance = |lag: usize| -> f64 {
            values.iter().zip(&values[lag..]).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>() / n as f64
        };
        let (short, long) = (covariance(LAG), covariance(2 * LAG));
        if short <= 0.0 || long <= 0.0 {
            return None;
        }
        let keeps = (long / short).powf(1.0 / LAG as f64).min(0.999);
        let latest = values[n - LATEST..].to_vec();
        Some(Box::new(Decay { average: Average { mean, n }, keeps, latest }))
    }
}

struct Decay {
    average: Average,
    /// Share of the distance to the mean that is left after one value.
    keeps: f64,
    latest: Vec<f64>,
}

impl Predict for Decay {
    fn predict(&self, out: &mut [f64]) {
        let mean = self.average.mean;
        let mut away = robust::median(&self.latest) - mean;
        for value in out {
            away *= self.keeps;
            *value = mean + away;
        }
    }

    fn memory(&self) -> f64 {
        LATEST as f64
    }

    fn observe(&mut self, value: f64) {
        self.average.observe(value);
        self.latest.remove(0);
        self.latest.push(value);
    }
}

/// What was one season ago comes again.
pub struct SeasonalNaive {
    pub season: usize,
}

impl Fit for SeasonalNaive {
    fn method(&self) -> Method {
        Method::SeasonalNaive { season: self.season }
    }

    fn needs(&self) -> usize {
        self.season
    }

    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>> {
        Some(Box::new(Cycle::last_of(history.values, self.season)))
    }
}

/// The last season as a ring.
struct Cycle {
    values: Vec<f64>,
    /// Place of the oldest value: the next one is expected to be like it.
    next: usize,
}

impl Cycle {
    fn last_of(values: &[f64], season: usize) -> Self {
        Self { values: values[values.len() - season..].to_vec(), next: 0 }
    }
}

impl Predict for Cycle {
    fn predict(&self, out: &mut [f64]) {
        let n = self.values.len();
        out.iter_mut().enumerate().for_each(|(i, v)| *v = self.values[(self.next + i) % n]);
    }

    fn memory(&self) -> f64 {
        self.values.len() as f64
    }

    fn observe(&mut self, value: f64) {
        self.values[self.next] = value;
        self.next = (self.next + 1) % self.values.len();
    }
}

/// What was one season ago comes again, moved by how much the last season differs from the one before: exponential
/// smoothing over the changes from season to season. Follows a level that moves under a rhythm that stays.
pub struct SeasonalShift {
    pub season: usize,
}

impl Fit for SeasonalShift {
    fn method(&self) -> Method {
        Method::SeasonalShift { season: self.season }
    }

    fn needs(&self) -> usize {
        self.season + 4
    }

    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>> {
        let values = history.values;
        let changes: Vec<f64> = values[self.season..].iter().zip(values).map(|(b, a)| b - a).collect();
        let cycle = Cycle::last_of(values, self.season);
        let change = Smoothing { trend: Trend::None, season: None }.learn(&changes);
        Some(Box::new(Shifted { cycle, change }))
    }
}

struct Shifted {
    cycle: Cycle,
    change: State,
}

impl Predict for Shifted {
    fn predict(&self, out: &mut [f64]) {
        let mut change = [0.0];
        self.change.predict(&mut change);
        self.cycle.predict(out);
        out.iter_mut().for_each(|v| *v += change[0]);
    }

    fn memory(&self) -> f64 {
        self.cycle.memory().min(self.change.memory())
    }

    fn observe(&mut self, value: f64) {
        self.change.observe(value - self.cycle.values[self.cycle.next]);
        self.cycle.observe(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(method: &dyn Fit, values: &[f64]) -> [f64; 4] {
        let mut fitted = method.fit(History { values, first: 0 }).unwrap();
        fitted.observe(8.0);
        let mut out = [0.0; 4];
        fitted.predict(&mut out);
        out
    }

    #[test]
    fn the_last_value_or_the_last_season_comes_again() {
        assert_eq!(after(&Naive, &[1.0, 3.0, 2.0]), [8.0; 4]);
        assert_eq!(after(&Mean, &[1.0, 2.0, 1.0]), [3.0; 4]);
        assert_eq!(after(&SeasonalNaive { season: 3 }, &[0.0, 1.0, 2.0, 3.0]), [2.0, 3.0, 8.0, 2.0]);
    }

    #[test]
    fn a_wild_value_has_to_be_confirmed() {
        let calm = [1.0, 1.1, 1.0, 0.9, 1.0, 1.1, 1.0];
        assert_eq!(after(&Naive, &calm), [1.0; 4]);
        assert_eq!(after(&Naive, &[&calm[..], &[7.0]].concat()), [8.0; 4]);
        assert_eq!(after(&Naive, &[&calm[..], &[-7.0]].concat()), [1.0; 4]);
    }

    #[test]
    fn a_season_on_a_new_level_is_moved_there() {
        let values: Vec<f64> = (0..30).map(|i| f64::from(i % 3) + if i < 18 { 0.0 } else { 7.0 }).collect();
        let method = SeasonalShift { season: 3 };
        let mut fitted = method.fit(History { values: &values[..20], first: 0 }).unwrap();
        let mut out = [0.0; 3];
        fitted.predict(&mut out);
        assert!((out[0] - 9.0).abs() < 1.0, "{out:?}");
        values[20..].iter().for_each(|&v| fitted.observe(v));
        fitted.predict(&mut out);
        assert!((out[0] - 7.0).abs() < 1.0 && (out[2] - 9.0).abs() < 1.0, "{out:?}");
    }
}
