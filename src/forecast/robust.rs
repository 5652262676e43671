//! Centres and spreads that a few wild values do not move.

use serde::{Deserialize, Serialize};

/// Makes a median absolute deviation comparable with a standard deviation, for normal values.
const MAD_TO_SIGMA: f64 = 1.4826;

/// The middle of `values`; 0 when there are none.
pub fn median(values: &[f64]) -> f64 {
    median_in_place(&mut values.to_vec())
}

fn median_in_place(values: &mut [f64]) -> f64 {
    let n = values.len();
    if n == 0 {
        return 0.0;
    }
    let (below, &mut upper, _) = values.select_nth_unstable_by(n / 2, f64::total_cmp);
    if n % 2 == 1 {
        return upper;
    }
    let lower = below.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    lower + (upper - lower) / 2.0
}

/// The value that this share of `values` is below; 0 when there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let rank = (share * (values.len() - 1) as f64).round() as usize;
    *values.to_vec().select_nth_unstable_by(rank, f64::total_cmp).1
}

/// Standard deviation as the median absolute deviation tells it.
pub fn sigma(values: &[f64], centre: f64) -> f64 {
    let mut off: Vec<f64> = values.iter().map(|v| (v - centre).abs()).collect();
    MAD_TO_SIGMA * median_in_place(&mut off)
}

/// Standard deviation of the noise on top of whatever moves slowly: from differences between neighbours.
pub fn noise(values: &[f64]) -> f64 {
    let mut off: Vec<f64> = values.windows(2).map(|w| (w[1] - w[0]).abs()).collect();
    MAD_TO_SIGMA * median_in_place(&mut off) / std::f64::consts::SQRT_2
}

/// A sample in three numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Robust {
    /// Median.
    pub centre: f64,
    /// Scaled median absolute deviation: the standard deviation, for normal values.
    pub spread: f64,
    /// Values seen.
    pub n: u64,
}

impl Robust {
    pub fn of(values: &[f64]) -> Self {
        let centre = median(values);
        Self { centre, spread: sigma(values, centre), n: values.len() as u64 }
    }

    /// Standard error of the centre.
    ///
    /// # Source
    /// The median of n normal values has a standard error of sqrt(pi / 2) sigma / sqrt(n).
    pub fn error(&self) -> f64 {
        if self.n == 0 {
            return f64::INFINITY;
        }
        (std::f64::consts::FRAC_PI_2 / self.n as f64).sqrt() * self.spread
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_even_odd_and_no_values() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(&[f64::MAX, f64::MAX]), f64::MAX);
        assert_eq!([0.0, 0.1, 0.5, 1.0].map(|share| quantile(&[5.0, 3.0, 1.0, 2.0, 4.0], share)), [1.0, 1.0, 3.0, 5.0]);
    }

    #[test]
    fn a_few_wild_values_move_neither_centre_nor_spread() {
        let calm: Vec<f64> = (0..100).map(|i| 1.0 + 0.01 * f64::from(i % 7)).collect();
        let mut wild = calm.clone();
        (0..10).for_each(|i| wild[i * 9] = 1e6);
        let (calm, wild) = (Robust::of(&calm), Robust::of(&wild));
        assert!((calm.centre - wild.centre).abs() <= 0.01 && wild.spread < 2.0 * calm.spread, "{calm:?} {wild:?}");
    }
}
