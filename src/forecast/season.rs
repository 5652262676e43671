//! Rhythms in a series: after how many values it resembles itself.

use super::robust;

/// Longest season, in values.
pub const MAX_SEASON: usize = 768;
/// So many seasons are kept at most.
const MAX_SEASONS: usize = 3;
/// A season has to explain this correlation with the cycle before.
const LEAST_CORRELATION: f64 = 0.3;
/// How far the correlation rises from its lowest value at a shorter lag: slow drifts resemble themselves at every lag.
const LEAST_RISE: f64 = 0.25;
/// A longer season is one of its own, and no echo, when it explains this much more.
const OWN: f64 = 0.1;
/// Values further from the median than this many spreads are drawn in: one spike must not hide a rhythm.
const DRAWN_IN: f64 = 10.0;

/// Season lengths in values, the strongest first; empty when nothing repeats. Each was seen twice.
///
/// A season is a lag at which the series, with and without its linear trend, resembles itself: the correlation peaks
/// there, is strong, more than chance (short seasons have to be seen more often), and was lower before. Among peaks of about the same height the shortest is the season, the
/// others are its echoes. What its phase explains is taken off, and the search starts again.
///
/// # Complexity
/// O(n · min(n / 2, [`MAX_SEASON`])) for each season found.
pub fn detect(values: &[f64]) -> Vec<usize> {
    let mut seasons = Vec::new();
    let mut left = values.to_vec();
    while seasons.len() < MAX_SEASONS
        && let Some(season) = strongest(&left)
        && !seasons.contains(&season)
    {
        left = without(&left, season);
        seasons.push(season);
    }
    seasons
}

fn strongest(values: &[f64]) -> Option<usize> {
    let n = values.len();
    let longest = (n / 2).min(MAX_SEASON);
    if longest < 2 {
        return None;
    }
    let calm = drawn_in(values);
    let with_line = correlations(&calm, longest + 2);
    let without_line = correlations(&without_line(&calm)?, longest + 2);
    // One step minus a line looks like two teeth of a saw; it does not resemble itself with its line.
    let correlation: Vec<f64> = with_line.iter().zip(&without_line).map(|(a, b)| a.min(*b)).collect();
    let mut lowest = 1.0f64;
    let mut peaks: Vec<(usize, f64)> = Vec::new();
    for lag in 1..=longest {
        let r = correlation[lag];
        lowest = lowest.min(r);
        let after = correlation.get(lag + 1).copied().unwrap_or(-1.0);
        let peak = lag >= 2 && r > correlation[lag - 1] && r >= after;
        let chance = 3.0 / ((n - lag) as f64).sqrt();
        if peak && r >= LEAST_CORRELATION.max(chance) && r - lowest >= LEAST_RISE {
            peaks.push((lag, r));
        }
    }
    let best = peaks.iter().map(|p| p.1).fold(0.0, f64::max);
    let shortest = peaks.iter().find(|p| p.1 >= best - OWN)?.0;
    // Its top, should noise have made a peak on the way up.
    let top = |a: &&(usize, f64), b: &&(usize, f64)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
    peaks.iter().filter(|p| p.0 <= shortest + shortest.div_ceil(10)).max_by(top).map(|p| p.0)
}

/// The series without what its phase in the season explains.
pub fn without(values: &[f64], season: usize) -> Vec<f64> {
    let mut out = values.to_vec();
    let mut phase = Vec::new();
    for p in 0..season.min(values.len()) {
        phase.clear();
        phase.extend(values.iter().skip(p).step_by(season));
        let usual = robust::median(&phase);
        out.iter_mut().skip(p).step_by(season).for_each(|v| *v -= usual);
    }
    out
}

/// Correlation of the first `n - lag` values with the last `n - lag`, for every lag below `n_lags`.
fn correlations(values: &[f64], n_lags: usize) -> Vec<f64> {
    let n = values.len();
    // Sums of the first i values, and of their squares.
    let mut sums = vec![(0.0, 0.0); n + 1];
    for (i, v) in values.iter().enumerate() {
        sums[i + 1] = (sums[i].0 + v, sums[i].1 + v * v);
    }
    let of = |lag: usize| {
        let m = (n - lag) as f64;
        let product: f64 = values[lag..].iter().zip(values).map(|(a, b)| a * b).sum();
        let (head, tail) = (sums[n - lag], (sums[n].0 - sums[lag].0, sums[n].1 - sums[lag].1));
        let covariance = product - head.0 * tail.0 / m;
        let variance = |(sum, squares): (f64, f64)| (squares - sum * sum / m).max(0.0);
        let scale = (variance(head) * variance(tail)).sqrt();
        // Relative to the whole: a stretch without any movement correlates with nothing.
        let whole = sums[n].1 / n as f64 * m;
        if scale > 1e-6 * whole { (covariance / scale).clamp(-1.0, 1.0) } else { 0.0 }
    };
    (0..n_lags.min(n)).map(of).collect()
}

/// Values minus the straight line through them, by least squares; `None` when nothing but rounding is left.
fn without_line(values: &[f64]) -> Option<Vec<f64>> {
    let middle = (values.len() - 1) as f64 / 2.0;
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let offset = |i: usize| i as f64 - middle;
    let squares: f64 = (0..values.len()).map(|i| offset(i) * offset(i)).sum();
    let slope = values.iter().enumerate().map(|(i, v)| offset(i) * (v - mean)).sum::<f64>() / squares.max(1.0);
    let left: Vec<f64> = values.iter().enumerate().map(|(i, v)| v - mean - slope * offset(i)).collect();
    let largest = |of: &[f64]| of.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    (largest(&left) > 1e-9 * largest(values)).then_some(left)
}

fn drawn_in(values: &[f64]) -> Vec<f64> {
    let centre = robust::median(values);
    let sigma = robust::sigma(values, centre);
    if sigma == 0.0 {
        return values.to_vec();
    }
    values.iter().map(|v| v.clamp(centre - DRAWN_IN * sigma, centre + DRAWN_IN * sigma)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Repeatable noise of standard deviation 1 or so.
    fn noise(i: usize) -> f64 {
        let mut x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..4)
            .map(|_| {
                x ^= x >> 27;
                x = x.wrapping_mul(0x3c79_ac49_2ba7_b653);
                (x >> 40) as f64 / (1u64 << 24) as f64 - 0.5
            })
            .sum::<f64>()
            * 1.7
    }

    #[test]
    fn finds_a_contention_after_its_second_time_whatever_its_length() {
        for season in [5, 12, 31, 60, 97, 200] {
            let at = |i: usize| if i % season < season / 3 { 0.6 } else { 1.0 } + 0.05 * noise(i);
            let values: Vec<f64> = (0..(2 * season + season / 4).max(season + 16)).map(at).collect();
            let found = detect(&values);
            assert!(found.iter().any(|&f| f.abs_diff(season) <= 1), "season {season}: found {found:?}");
        }
    }

    #[test]
    fn finds_no_rhythm_in_noise_lines_constants_and_one_step() {
        for n in [2, 3, 10, 50, 300, 1000] {
            assert_eq!(detect(&vec![1.0; n]), [] as [usize; 0]);
            let line: Vec<f64> = (0..n).map(|i| i as f64).collect();
            assert_eq!(detect(&line), [] as [usize; 0]);
            let step: Vec<f64> = (0..n).map(|i| if i < n / 2 { 1.0 } else { 2.0 }).collect();
            assert_eq!(detect(&step), [] as [usize; 0], "step of {n}");
        }
        let pure: Vec<f64> = (0..1000).map(noise).collect();
        assert_eq!(detect(&pure), [] as [usize; 0]);
    }

    #[test]
    fn finds_a_short_and_a_long_rhythm() {
        let at = |i: usize| (i % 12) as f64 + if i % 85 < 24 { 60.0 } else { 0.0 } + 0.2 * noise(i);
        let found = detect(&(0..600).map(at).collect::<Vec<_>>());
        assert_eq!(found, [85, 12]);
    }

    #[test]
    fn a_spike_hides_no_rhythm() {
        let mut values: Vec<f64> = (0..120).map(|i| f64::from(u8::from(i % 20 < 8)) + 0.05 * noise(i)).collect();
        values[50] = 1e4;
        assert_eq!(detect(&values).first(), Some(&20));
    }
}
