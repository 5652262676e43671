//! How wrong a method would have been: it forecasts values that are known already.

use super::{Fit, History};

/// Origins are spread evenly when there could be more of them.
const MAX_ORIGINS: usize = 96;

/// Errors of one method.
#[derive(Clone, Debug, Default)]
pub struct Backtest {
    /// Measured minus forecast, by step ahead: `residuals[0]` one step after each origin. Later steps have fewer:
    /// the last origins have no values so far ahead to compare with.
    pub residuals: Vec<Vec<f64>>,
}

impl Backtest {
    /// Mean squared error over all origins and steps, and over those of the later half of the origins. Errors beyond
    /// `cap` count as `cap`.
    pub fn loss(&self, cap: f64) -> (f64, f64) {
        let n_origins = self.residuals.first().map_or(0, Vec::len);
        let (mut all, mut late) = (Sum::default(), Sum::default());
        for residuals in &self.residuals {
            for (origin, residual) in residuals.iter().enumerate() {
                let square = residual.abs().min(cap).powi(2);
                all.add(square);
                if 2 * origin >= n_origins {
                    late.add(square);
                }
            }
        }
        (all.mean(), late.mean())
    }

    /// An absolute error that all but a few are below: larger ones are accidents.
    pub fn usual(&self) -> f64 {
        const FEW: f64 = 0.05;
        let mut errors: Vec<f64> = self.residuals.iter().flatten().map(|r| r.abs()).collect();
        errors.sort_unstable_by(f64::total_cmp);
        errors.get(((1.0 - FEW) * errors.len() as f64) as usize).copied().unwrap_or(0.0)
    }

    /// Mean absolute error in units of the mean change from one value to the next.
    pub fn mase(&self, values: &[f64]) -> f64 {
        let (mut error, mut change) = (Sum::default(), Sum::default());
        self.residuals.iter().flatten().for_each(|r| error.add(r.abs()));
        values.windows(2).for_each(|w| change.add((w[1] - w[0]).abs()));
        if change.mean() > 0.0 { error.mean() / change.mean() } else { 0.0 }
    }
}

#[derive(Default)]
struct Sum {
    sum: f64,
    n: usize,
}

impl Sum {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.n += 1;
    }

    /// 0 of nothing.
    fn mean(&self) -> f64 {
        self.sum / self.n.max(1) as f64
    }
}

/// Where forecasts start: an origin `o` knows `values[..o]`. All lie in the second half, so that whatever has been
/// seen twice was seen once before the first origin.
pub fn origins(n: usize) -> Vec<usize> {
    let first = n.div_ceil(2);
    let count = (n - first).min(MAX_ORIGINS);
    (0..count).map(|i| first + i * (n - first) / count).collect()
}

/// Forecasts from every origin; `None` when the method cannot learn from what the first origin knows.
///
/// The method is fitted once, at the first origin, and then takes the values in as time goes on: parameters are never
/// better informed than they could have been.
pub fn run(method: &dyn Fit, history: History<'_>, origins: &[usize], horizon: usize) -> Option<Backtest> {
    let values = history.values;
    let &first = origins.first()?;
    if method.needs() > first {
        return None;
    }
    let mut fitted = method.fit(History { values: &values[..first], ..history })?;
    let mut residuals = vec![Vec::new(); horizon.min(values.len() - first)];
    let mut expected = vec![0.0; residuals.len()];
    let mut known = first;
    for &origin in origins {
        values[known..origin].iter().for_each(|&v| fitted.observe(v));
        known = origin;
        let actual = &values[origin..values.len().min(origin + expected.len())];
        let expected = &mut expected[..actual.len()];
        fitted.predict(expected);
        for ((a, e), residuals) in actual.iter().zip(expected.iter()).zip(&mut residuals) {
            residuals.push(a - e);
        }
    }
    residuals.iter().flatten().all(|r| r.is_finite()).then_some(Backtest { residuals })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::naive::{Naive, SeasonalNaive};

    #[test]
    fn origins_lie_in_the_second_half_and_are_bounded() {
        assert!(origins(0).is_empty() && origins(1).is_empty());
        assert_eq!(origins(2), [1]);
        assert_eq!(origins(7), [4, 5, 6]);
        let many = origins(2000);
        assert!(many.len() == MAX_ORIGINS && many[0] == 1000 && *many.last().unwrap() < 2000);
    }

    #[test]
    fn residuals_are_those_of_a_forecast_made_at_the_origin() {
        let values = [0.0, 1.0, 3.0, 6.0];
        let history = History { values: &values, first: 0 };
        let test = run(&Naive, history, &origins(4), 3).unwrap();
        // From 2: knows 0, 1 and says 1, 1; from 3: knows 3 and says 3.
        assert_eq!(test.residuals, [vec![2.0, 3.0], vec![5.0]]);
        assert_eq!(test.loss(f64::INFINITY), ((4.0 + 9.0 + 25.0) / 3.0, 9.0));
        assert_eq!(test.loss(2.0), (4.0, 4.0));
        assert_eq!(test.usual(), 5.0);
        assert!((test.mase(&values) - 10.0 / 3.0 / 2.0).abs() < 1e-12);
    }

    #[test]
    fn what_repeats_is_foreseen_without_error() {
        let values: Vec<f64> = (0..50).map(|i| f64::from(i % 7)).collect();
        let history = History { values: &values, first: 0 };
        assert_eq!(run(&SeasonalNaive { season: 7 }, history, &origins(50), 20).unwrap().usual(), 0.0);
        assert!(run(&SeasonalNaive { season: 26 }, history, &origins(50), 20).is_none());
    }
}
