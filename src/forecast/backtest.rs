//! How wrong a method would have been: it forecasts values that are known already.

use super::{Fit, History};

/// Origins are spread evenly when there could be more of them.
const MAX_ORIGINS: usize = 96;

/// Errors of one method.
#[derive(Clone, Debug, Default)]
pub struct Backtest {
    /// Mean absolute error over all origins and steps.
    pub error: f64,
    /// The same over the later half of the origins.
    pub late: f64,
    /// Measured minus forecast, by step ahead: `residuals[0]` one step after the origin. Later steps have fewer.
    pub residuals: Vec<Vec<f64>>,
}

impl Backtest {
    /// Mean absolute error in units of the mean change from one value to the next.
    pub fn mase(&self, values: &[f64]) -> f64 {
        let change: f64 =
            values.windows(2).map(|w| (w[1] - w[0]).abs()).sum::<f64>() / (values.len() - 1).max(1) as f64;
        if change > 0.0 { self.error / change } else { 0.0 }
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
    // Sums and counts of the earlier and the later origins.
    let mut sums = [(0.0, 0usize); 2];
    let mut known = first;
    for (i, &origin) in origins.iter().enumerate() {
        let sum = &mut sums[usize::from(2 * i >= origins.len())];
        values[known..origin].iter().for_each(|&v| fitted.observe(v));
        known = origin;
        let actual = &values[origin..values.len().min(origin + expected.len())];
        let expected = &mut expected[..actual.len()];
        fitted.predict(expected);
        for ((a, e), residuals) in actual.iter().zip(expected.iter()).zip(&mut residuals) {
            residuals.push(a - e);
            *sum = (sum.0 + (a - e).abs(), sum.1 + 1);
        }
    }
    let [early, late] = sums;
    let error = (early.0 + late.0) / (early.1 + late.1) as f64;
    error.is_finite().then_some(Backtest { error, late: late.0 / late.1 as f64, residuals })
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
        assert_eq!(test.error, 10.0 / 3.0);
        assert!((test.mase(&values) - 10.0 / 3.0 / 2.0).abs() < 1e-12);
    }

    #[test]
    fn what_repeats_is_foreseen_without_error() {
        let values: Vec<f64> = (0..50).map(|i| f64::from(i % 7)).collect();
        let history = History { values: &values, first: 0 };
        assert_eq!(run(&SeasonalNaive { season: 7 }, history, &origins(50), 20).unwrap().error, 0.0);
        assert!(run(&SeasonalNaive { season: 26 }, history, &origins(50), 20).is_none());
    }
}
