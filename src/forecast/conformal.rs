//! Intervals from the errors of the backtest: no assumption about their distribution.

use super::backtest::Backtest;

/// Half the width, relative to the value, for a series of which only one value is known.
const DOUBT: f64 = 0.25;
/// 1 / 0.05 is not quite 20.
const ROUNDING: f64 = 1e-9;

/// Bounds around each expected value.
///
/// Residuals are kept apart by step and by sign: step times are skewed, and far steps are less certain. A step with too
/// few residuals for `level` borrows those of its neighbours, and is then at least as uncertain as every nearer step;
/// beyond the last step that was tested, uncertainty grows as that of a random walk does. Where the whole backtest has too few, the widest error seen is stretched, and doubt that fades with every residual
/// is added.
///
/// # Source
/// Split conformal prediction: Lei et al., Journal of the American Statistical Association 113 (2018); by step ahead as
/// in Stankevičiūtė et al., NeurIPS 2021. Residuals of one series are not exchangeable, so `level` is an aim and not a
/// guarantee.
pub fn intervals(mean: &[f64], backtest: &Backtest, level: f64) -> (Vec<f64>, Vec<f64>) {
    let tail = (1.0 - level) / 2.0;
    // With k residuals the outermost ones bound 1 / (k + 1) on each side.
    let enough = (1.0 / tail - ROUNDING).ceil() as usize - 1;
    let (mut lower, mut upper) = (Vec::with_capacity(mean.len()), Vec::with_capacity(mean.len()));
    let (mut widest_below, mut widest_above) = (0.0f64, 0.0f64);
    for (step, &expected) in mean.iter().enumerate() {
        let own = backtest.residuals.get(step).map_or(0, Vec::len);
        let pool = pool(&backtest.residuals, step, enough);
        let (mut below, mut above) = bounds(&pool, tail, enough, expected);
        if own < enough {
            (below, above) = (below.max(widest_below), above.max(widest_above));
        }
        (widest_below, widest_above) = (widest_below.max(below), widest_above.max(above));
        let untested = ((step + 1) as f64 / backtest.residuals.len().clamp(1, step + 1) as f64).sqrt();
        let (below, above) = (below * untested, above * untested);
        lower.push(expected - below);
        upper.push(expected + above);
    }
    (lower, upper)
}

/// Residuals of a step and, as long as they are too few, of the steps around it; sorted.
fn pool(residuals: &[Vec<f64>], step: usize, enough: usize) -> Vec<f64> {
    let Some(last) = residuals.len().checked_sub(1) else { return Vec::new() };
    let step = step.min(last);
    let (mut from, mut to) = (step, step);
    let mut n = residuals[step].len();
    while n < enough && (from > 0 || to < last) {
        if from > 0 {
            from -= 1;
            n += residuals[from].len();
        }
        if to < last {
            to += 1;
            n += residuals[to].len();
        }
    }
    let mut pool: Vec<f64> = residuals[from..=to].iter().flatten().copied().collect();
    pool.sort_unstable_by(f64::total_cmp);
    pool
}

/// How far below and above the expected value the interval reaches.
fn bounds(sorted: &[f64], tail: f64, enough: usize, expected: f64) -> (f64, f64) {
    let n = sorted.len();
    let (Some(&least), Some(&most)) = (sorted.first(), sorted.last()) else {
        return (DOUBT * expected.abs(), DOUBT * expected.abs());
    };
    if n < enough {
        let missing = (enough - n) as f64 / enough as f64;
        let width = (1.0 + missing) * most.abs().max(least.abs()) + DOUBT * expected.abs() / (1.0 + n as f64);
        return (width, width);
    }
    let rank = ((n + 1) as f64 * tail + ROUNDING).floor() as usize - 1;
    ((-sorted[rank]).max(0.0), sorted[n - 1 - rank].max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(residuals: Vec<Vec<f64>>) -> Backtest {
        Backtest { residuals }
    }

    #[test]
    fn takes_the_ranks_that_hold_the_level() {
        // 19 residuals at 90 %: the outermost on both sides.
        let skewed: Vec<f64> = (0..19).map(|i| f64::from(i * i) - 9.0).collect();
        let (lower, upper) = intervals(&[100.0], &of(vec![skewed]), 0.9);
        assert_eq!((lower[0], upper[0]), (91.0, 100.0 + 315.0));
    }

    #[test]
    fn a_step_of_few_residuals_borrows_and_is_never_surer_than_nearer_steps() {
        let near: Vec<f64> = (0..40).map(|i| f64::from(i) - 20.0).collect();
        let (lower, upper) = intervals(&[0.0; 3], &of(vec![near, vec![0.5]]), 0.9);
        assert!(upper[1] >= upper[0] && lower[1] <= lower[0] && upper[2] >= upper[1], "{lower:?} {upper:?}");
    }

    #[test]
    fn doubt_fades_with_what_was_seen() {
        let width = |residuals: Vec<Vec<f64>>| {
            let (lower, upper) = intervals(&[10.0], &of(residuals), 0.9);
            upper[0] - lower[0]
        };
        assert_eq!(width(vec![]), 5.0);
        assert!(width(vec![vec![0.1]]) < 5.0);
        assert!(width(vec![vec![0.1; 10]]) < width(vec![vec![0.1; 2]]));
        assert_eq!(width(vec![vec![0.0; 19]]), 0.0);
    }
}
