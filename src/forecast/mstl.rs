//! Seasonal figures by MSTL, exponential smoothing of what they leave.

use super::smoothing::{Smoothing, State, Trend};
use super::{Fit, History, Method, Predict};

/// Several seasons at once, each taken off by loess over the values of one phase; figures are averaged over many cycles
/// and may change slowly.
///
/// # Source
/// Bandara, Hyndman, Bergmeir, MSTL: A Seasonal-Trend Decomposition Algorithm for Time Series with Multiple Seasonal
/// Patterns, arXiv:2107.13462 (2021).
pub struct Mstl {
    /// In values; each at least 2.
    pub seasons: Vec<usize>,
}

/// How often each season is found anew from what the others leave. Twice, as is usual, leaves sharp onsets of one season
/// in the figures of another.
const ITERATIONS: usize = 4;

impl Fit for Mstl {
    fn method(&self) -> Method {
        Method::Mstl { seasons: self.seasons.clone() }
    }

    fn needs(&self) -> usize {
        2 * self.seasons.iter().copied().max().unwrap_or(0).max(2)
    }

    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>> {
        let parts = stlrs::Mstl::params().iterations(ITERATIONS).fit(history.values, &self.seasons).ok()?;
        let left: Vec<f64> = parts.trend().iter().zip(parts.remainder()).map(|(t, r)| t + r).collect();
        if left.iter().any(|v| !v.is_finite()) {
            return None;
        }
        let cycles = self.seasons.iter().zip(parts.seasonal()).map(|(&p, s)| s[s.len() - p..].to_vec()).collect();
        let rest = Smoothing { trend: Trend::None, season: None }.learn(&left);
        Some(Box::new(Fitted { cycles, rest, n_since: 0 }))
    }
}

struct Fitted {
    /// The last cycle of each season.
    cycles: Vec<Vec<f64>>,
    rest: State,
    /// Values observed since the end of the cycles.
    n_since: usize,
}

impl Fitted {
    /// What all seasons add to the value so many steps ahead.
    fn figure(&self, ahead: usize) -> f64 {
        self.cycles.iter().map(|c| c[(self.n_since + ahead) % c.len()]).sum()
    }
}

impl Predict for Fitted {
    fn predict(&self, out: &mut [f64]) {
        self.rest.predict(out);
        out.iter_mut().enumerate().for_each(|(i, v)| *v += self.figure(i));
    }

    fn memory(&self) -> f64 {
        self.rest.memory()
    }

    fn observe(&mut self, value: f64) {
        self.rest.observe(value - self.figure(0));
        self.n_since += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separates_two_seasons() {
        let at = |i: usize| f64::from(u8::from(i % 12 < 4)) + 3.0 * f64::from(u8::from(i % 50 < 20));
        let values: Vec<f64> = (0..400).map(at).collect();
        let mut fitted = Mstl { seasons: vec![12, 50] }.fit(History { values: &values, first: 0 }).unwrap();
        (400..430).for_each(|i| fitted.observe(at(i)));
        let mut out = [0.0; 60];
        fitted.predict(&mut out);
        let wrong = out.iter().enumerate().map(|(i, v)| (v - at(430 + i)).abs()).sum::<f64>() / 60.0;
        assert!(wrong < 0.3, "wrong by {wrong} on average: {out:?}");
    }
}
