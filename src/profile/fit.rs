//! Factors from measured segments: robust non-negative least squares with a prior.

use super::terms::{N, Terms};
use crate::topology::Measured;
use crate::units::Seconds;

/// Relative error of the analytic terms that no number of measurements removes: XLA fuses, caches and vectorises
/// segments of equal terms differently.
const MISFIT: f64 = 0.1;
/// Relative doubt in a single measurement, far above clock noise: one, perhaps of a cold cache, shall weigh less than the
/// nominal figures. It falls with their number: ten shall weigh more.
const DOUBT: f64 = 1.4;
/// A factor is not taken below this share of its prior: a class that the data cannot tell apart is not free.
const FLOOR: f64 = 0.05;
/// Beyond so many standard deviations an equation pulls linearly.
const HUBER: f64 = 2.0;
/// Prediction over measurement: beyond, something else was measured.
const ABSURD: std::ops::Range<f64> = 1e-6..1e6;
/// Rounds of reweighting; the weights of so few equations settle in three or four.
const ROUNDS: usize = 6;

/// One segment, by all its measurements.
#[derive(Clone, Copy, Debug)]
pub struct Equation {
    /// Of one run.
    pub terms: Terms,
    /// What one run takes.
    pub seconds: f64,
    /// Seconds that do not matter: a segment of a thousandth of the step need not be met to a tenth of itself.
    pub slack: f64,
    /// Measurements behind `seconds`.
    pub count: f64,
}

/// Expected factors, and how far they may be off.
#[derive(Clone, Copy, Debug)]
pub struct Prior {
    pub mean: Measured,
    /// Relative standard deviation: of the common scale first, then of each factor around it.
    pub spread: f64,
}

/// The most probable factors.
///
/// First the scale that all factors share (a device that is thrice as fast as its data sheet is so for what has not
/// been measured too), by the weighted median of ratios; then each factor around it.
///
/// # Shapes
/// Any number of equations; with none, or only useless ones (zero, not finite, off by a million), the prior's mean.
/// # Complexity
/// O(equations · log equations).
/// # Source
/// Ridge regression towards a prior mean (Hoerl & Kennard, Technometrics 1970); Huber's weights by iteratively
/// reweighted least squares (Holland & Welsch, 1977); bounds by the sequential coordinate-wise algorithm for
/// non-negative least squares (Franc, Hlaváč & Navara, CAIP 2005).
pub fn fit(equations: &[Equation], prior: &Prior) -> Measured {
    let usable = |e: &&Equation| {
        let positive = e.terms.to_array().iter().all(|t| t.0 >= 0.0);
        let ratio = e.terms.time(&prior.mean).0 / e.seconds;
        positive && ABSURD.contains(&ratio) && e.seconds > 0.0 && e.slack < f64::INFINITY && e.count > 0.0
    };
    let rows: Vec<Row> = equations.iter().filter(usable).map(|e| Row::new(e, prior)).collect();
    if rows.is_empty() {
        return prior.mean;
    }
    let mean = scaled(&prior.mean, common_scale(&rows, prior));
    let mut huber = vec![1.0; rows.len()];
    let mut factors = mean;
    for _ in 0..ROUNDS {
        factors = ridge(&rows, &huber, &mean, prior.spread);
        for (weight, row) in huber.iter_mut().zip(&rows) {
            let off = (row.residual(&factors) * row.weight.sqrt()).abs();
            *weight = if off > HUBER { HUBER / off } else { 1.0 };
        }
    }
    let [product, memory, other, launch] = factors;
    Measured { product, memory, other, launch }
}

/// An equation in relative units.
struct Row {
    x: [f64; N],
    y: f64,
    /// One over the variance of `y - x·factors`.
    weight: f64,
    /// Seconds by the prior.
    expected: f64,
}

impl Row {
    fn new(e: &Equation, prior: &Prior) -> Self {
        let unit = e.seconds + e.slack.max(0.0);
        let x = e.terms.to_array().map(|t: Seconds| t.0 / unit);
        let weight = 1.0 / (MISFIT * MISFIT + (DOUBT / e.count).powi(2));
        Self { x, y: e.seconds / unit, weight, expected: e.terms.time(&prior.mean).0 }
    }

    fn dot(&self, factors: &[f64; N]) -> f64 {
        self.x.iter().zip(factors).map(|(x, f)| x * f).sum()
    }

    fn residual(&self, factors: &[f64; N]) -> f64 {
        self.y - self.dot(factors)
    }
}

fn array(m: &Measured) -> [f64; N] {
    [m.product, m.memory, m.other, m.launch]
}

fn scaled(m: &Measured, scale: f64) -> [f64; N] {
    array(m).map(|f| f * scale)
}

/// Measured over expected, drawn towards 1 as far as the prior is better known than the measurements.
fn common_scale(rows: &[Row], prior: &Prior) -> f64 {
    let mean = array(&prior.mean);
    // By expected time: what took long by accident shall not weigh more for it.
    let mut logs: Vec<(f64, f64)> = rows
        .iter()
        .map(|r| ((r.y / r.dot(&mean)).ln(), r.weight * r.expected))
        .filter(|(l, _)| l.is_finite())
        .collect();
    let Some(median) = weighted_median(&mut logs) else { return 1.0 };
    let information: f64 = rows.iter().map(|r| r.weight).sum();
    let prior = 1.0 / (prior.spread * prior.spread);
    (median * information / (information + prior)).exp()
}

/// Least squares with the prior's pull, above the floor.
fn ridge(rows: &[Row], huber: &[f64], mean: &[f64; N], spread: f64) -> [f64; N] {
    let mut a = [[0.0; N]; N];
    let mut b = [0.0; N];
    for k in 0..N {
        let sd = (spread * mean[k]).max(f64::MIN_POSITIVE.sqrt());
        a[k][k] = 1.0 / (sd * sd);
        b[k] = mean[k] / (sd * sd);
    }
    for (row, huber) in rows.iter().zip(huber) {
        let w = row.weight * huber;
        for i in 0..N {
            b[i] += w * row.x[i] * row.y;
            for (a, x) in a[i].iter_mut().zip(&row.x) {
                *a += w * row.x[i] * x;
            }
        }
    }
    // Strictly convex: every sweep comes nearer, at the worst by the ratio of the prior to the data.
    const SWEEPS: usize = 1000;
    let mut x = *mean;
    for _ in 0..SWEEPS {
        let mut moved = 0.0f64;
        for k in 0..N {
            let rest: f64 = (0..N).filter(|&j| j != k).map(|j| a[k][j] * x[j]).sum();
            let next = ((b[k] - rest) / a[k][k]).max(FLOOR * mean[k]);
            moved = moved.max((next - x[k]).abs() / mean[k]);
            x[k] = next;
        }
        if moved < 1e-9 {
            break;
        }
    }
    x
}

/// The value at half the weight; `None` without weight. Values must not be NaN.
pub fn weighted_median(values: &mut [(f64, f64)]) -> Option<f64> {
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = values.iter().map(|v| v.1).sum();
    let mut sum = 0.0;
    values
        .iter()
        .find(|(_, weight)| {
            sum += weight;
            sum >= total / 2.0 && total > 0.0
        })
        .map(|v| v.0)
}

/// The middle value; the mean of the two middle ones of an even number.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (n > 0).then(|| (values[(n - 1) / 2] + values[n / 2]) / 2.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOMINAL: Prior = Prior { mean: Measured::NOMINAL, spread: 0.7 };

    /// Segments of unlike mixtures, as measured on a device with the given factors; `noise(i)` is relative.
    fn segments(truth: &Measured, count: f64, noise: impl Fn(usize) -> f64) -> Vec<Equation> {
        (0..12)
            .map(|i| {
                // Each class dominates some.
                let part =
                    |k: usize| Seconds(if i % N == k { 1e-3 } else { 2e-5 * ((3 * i + 5 * k + i / N) % 7) as f64 });
                let terms = Terms::from_array(std::array::from_fn(part));
                Equation { terms, seconds: terms.time(truth).0 * (1.0 + noise(i)), slack: 0.0, count }
            })
            .collect()
    }

    fn off(found: &Measured, truth: &Measured) -> f64 {
        array(found).iter().zip(array(truth)).map(|(f, t)| (f / t - 1.0).abs()).fold(0.0, f64::max)
    }

    const TRUTH: Measured = Measured { product: 0.4, memory: 1.6, other: 0.9, launch: 2.5 };

    #[test]
    fn recovers_the_factors_from_many_noisy_measurements() {
        let noise = |i: usize| 0.05 * [1.0, -1.0, 0.5, -0.2, 0.0][i % 5];
        let found = fit(&segments(&TRUTH, 100.0, noise), &NOMINAL);
        assert!(off(&found, &TRUTH) < 0.12, "{found:?}");
    }

    #[test]
    fn believes_nominal_figures_more_than_one_measurement() {
        let terms = Terms { product: Seconds(1e-3), ..Terms::default() };
        let factor = |count| fit(&[Equation { terms, seconds: 4e-3, slack: 0.0, count }], &NOMINAL).product;
        // Half way to 4 would be 2 by ratio.
        assert!(factor(1.0) > 1.1 && factor(1.0) < 2.0, "{}", factor(1.0));
        assert!(factor(40.0) > 3.5, "{}", factor(40.0));
    }

    #[test]
    fn one_odd_segment_does_not_spoil_the_others() {
        let odd = |i: usize| if i == 7 { 9.0 } else { 0.0 };
        let found = fit(&segments(&TRUTH, 100.0, odd), &NOMINAL);
        let clean = fit(&segments(&TRUTH, 100.0, |_| 0.0), &NOMINAL);
        assert!(off(&found, &clean) < 0.15, "{found:?} {clean:?}");
    }

    #[test]
    fn a_class_without_measurements_follows_the_device() {
        let terms = Terms { product: Seconds(1e-3), ..Terms::default() };
        let found = fit(&[Equation { terms, seconds: 3e-3, slack: 0.0, count: 100.0 }], &NOMINAL);
        assert!(found.memory > 2.5 && found.memory < 3.2, "{found:?}");
    }

    #[test]
    fn medians_are_those_of_the_sorted_values() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median([].into_iter()), None);
        assert_eq!(weighted_median(&mut [(5.0, 1.0), (1.0, 3.0), (2.0, 1.0)]), Some(1.0));
        assert_eq!(weighted_median(&mut [(5.0, 0.0)]), None);
    }

    proptest! {
        #[test]
        fn factors_are_positive_whatever_was_measured(
            rows in prop::collection::vec((any::<[f64; N]>(), any::<f64>(), any::<f64>(), any::<f64>()), 0..8),
        ) {
            let rows: Vec<Equation> = rows
                .into_iter()
                .map(|(terms, seconds, slack, count)| {
                    let terms = Terms::from_array(terms.map(Seconds));
                    Equation { terms, seconds, slack, count }
                })
                .collect();
            let found = fit(&rows, &NOMINAL);
            prop_assert!(array(&found).iter().all(|f| f.is_finite() && *f > 0.0), "{found:?}");
        }
    }
}
