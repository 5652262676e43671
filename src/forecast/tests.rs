//! Forecasts as a whole: what a user of this room relies on.

use proptest::prelude::*;

use super::*;
use crate::units::Seconds;

fn series(values: Vec<f64>) -> Series {
    Series::new(Seconds(0.0), Seconds(1.0), values).unwrap()
}

fn of(values: Vec<f64>, horizon: usize) -> Forecast {
    forecast(&series(values), horizon, &Settings::default()).unwrap()
}

/// Repeatable noise of standard deviation 1 or so.
fn noise(i: usize) -> f64 {
    let mut x = (i as u64 + 11).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut sum = 0.0;
    for _ in 0..4 {
        x ^= x >> 27;
        x = x.wrapping_mul(0x3c79_ac49_2ba7_b653);
        sum += (x >> 40) as f64 / (1u64 << 24) as f64 - 0.5;
    }
    sum * 1.7
}

#[test]
fn short_series_have_forecasts_that_admit_doubt() {
    for values in [vec![2.0], vec![2.0, 2.0], vec![2.0, 2.1, 1.9]] {
        let f = of(values.clone(), 5);
        assert_eq!(f.method, Method::Naive, "{values:?}");
        assert_eq!(f.mean, [*values.last().unwrap(); 5]);
        assert!(f.upper[0] - f.lower[0] > 0.2, "{f:?}");
    }
}

#[test]
fn a_constant_stays_and_becomes_certain() {
    let f = of(vec![0.8; 100], 30);
    assert_eq!((f.mean.as_slice(), f.mase), ([0.8; 30].as_slice(), 0.0));
    assert_eq!((f.lower, f.upper), (vec![0.8; 30], vec![0.8; 30]));
}

#[test]
fn what_repeats_stays_within_what_was_seen() {
    // As a worker's speeds were: a fall seems to repeat an earlier one, from where the level has fallen to already.
    let fall = [0.9, 0.88, 0.7, 0.65, 0.62, 0.63, 0.64, 0.48, 0.48, 0.63, 0.66, 0.64, 0.67, 0.65, 0.7];
    let value = |i: usize| (fall[i % 15] - if i >= 15 { 0.2 * (i / 15) as f64 } else { 0.0 }) + 0.01 * noise(i);
    let f = of((0..38).map(value).collect(), 32);
    assert!(f.method.has_season(), "{:?}", f.method);
    let (low, high) = f.known;
    assert!(f.mean.iter().all(|v| (low..=high).contains(v)), "{low} to {high}: {:?}", f.mean);
}

/// A worker's device is slowed to 60 % for 20 of every 60 samples, from sample 40 on.
fn contention(i: usize) -> f64 {
    let slow = i >= 40 && (i - 40) % 60 < 20;
    (if slow { 0.6 } else { 1.0 }) * (1.0 + 0.03 * noise(i))
}

#[test]
fn a_contention_seen_twice_is_foreseen_with_its_onset() {
    // Seen at 40 and at 100; it comes again at 160.
    let f = of((0..135).map(contention).collect(), 60);
    let onset = f.mean.iter().position(|&v| v < 0.8).expect("the contention is foreseen");
    assert!(onset.abs_diff(25) <= 2, "onset in {onset} steps, it comes in 25: {:?}", f.method);
    assert!(f.may_undercut(0.8).unwrap() <= 27);
    assert!((f.min().band.mean - 0.6).abs() < 0.1 && f.max().band.mean > 0.9);
    let slow = f.mean.iter().filter(|&&v| v < 0.8).count();
    assert!(slow.abs_diff(20) <= 4, "{slow} slow samples, they are 20");
}

#[test]
fn a_contention_seen_once_is_not() {
    let f = of((0..95).map(contention).collect(), 60);
    assert!(f.mean.iter().all(|&v| (v - 1.0).abs() < 0.1), "{:?} {:?}", f.method, f.mean);
}

#[test]
fn a_contention_that_has_stopped_is_soon_forgotten() {
    let f = of((0..400).map(|i| if i < 280 { contention(i) } else { 1.0 + 0.03 * noise(i) }).collect(), 60);
    assert!(f.mean.iter().all(|&v| v > 0.85), "{:?} {:?}", f.method, f.mean);
}

#[test]
fn a_new_level_is_where_the_forecast_starts() {
    let f = of((0..200).map(|i| if i < 190 { 1.0 } else { 0.5 } + 0.02 * noise(i)).collect(), 20);
    assert!(f.mean.iter().all(|v| (v - 0.5).abs() < 0.05), "{:?} {:?}", f.method, f.mean);
    assert!(f.n_values <= 12, "{} values still count", f.n_values);
}

#[test]
fn a_rhythm_survives_a_new_level() {
    let at = |i: usize| if i % 25 < 10 { 4.0 } else { 2.0 } + if i < 150 { 0.0 } else { 3.0 } + 0.1 * noise(i);
    let f = of((0..180).map(at).collect(), 25);
    for (i, v) in f.mean.iter().enumerate() {
        assert!((v - at(180 + i)).abs() < 0.8, "step {i}: {v}, comes {}; {:?}", at(180 + i), f.method);
    }
}

#[test]
fn memory_that_grows_is_foreseen_to_cross_its_limit() {
    let f = of((0..120).map(|i| 1e9 + 1e7 * i as f64 + 2e6 * noise(i)).collect(), 100);
    let crossing = f.may_exceed(2.9e9).expect("a crossing");
    // The line crosses 70 steps ahead.
    assert!((50..=75).contains(&crossing), "{crossing}: {:?}", f.method);
}

#[test]
fn one_spike_changes_little_even_when_it_is_the_last_value() {
    let mut values: Vec<f64> = (0..150).map(|i| 0.1 * (1.0 + 0.05 * noise(i))).collect();
    for i in (10..150).step_by(23) {
        values[i] *= 6.0;
    }
    values.push(0.9);
    let f = of(values, 20);
    assert!(f.mean.iter().all(|v| (v - 0.1).abs() < 0.02), "{:?} {:?}", f.method, f.mean);
}

#[test]
fn values_stay_within_the_bounds_of_the_quantity() {
    let settings = Settings { least: Some(0.0), most: Some(1.0), ..Settings::default() };
    let f = forecast(&series((0..50).map(|i| 0.9 - 0.018 * f64::from(i)).collect()), 40, &settings).unwrap();
    assert!(f.lower.iter().all(|&v| v >= 0.0) && f.upper.iter().all(|&v| v <= 1.0));
    assert!(f.mean[39] < 0.02, "{:?}", f.mean);
}

#[test]
fn settings_and_horizons_out_of_range_are_refused_by_name() {
    let s = series(vec![1.0; 10]);
    let of = |settings: Settings| forecast(&s, 5, &settings).unwrap_err().to_string();
    assert_eq!(of(Settings { level: 1.5, ..Settings::default() }), "forecast.level: 1.5, must be 0.5 to 0.99");
    assert!(of(Settings { change: f64::NAN, ..Settings::default() }).starts_with("forecast.change: NaN"));
    let crossed = Settings { least: Some(2.0), most: Some(1.0), ..Settings::default() };
    assert!(of(crossed).contains("not below forecast.least"));
    assert_eq!(forecast(&s, 0, &Settings::default()), Err(ForecastError::Horizon { horizon: 0 }));
}

#[test]
fn intervals_hold_about_as_much_as_they_say() {
    let (mut held, mut n) = (0, 0);
    for start in 0..60 {
        let at = |i: usize| 1.0 + 0.1 * noise(1000 * start + i) + if i % 18 < 6 { 0.5 } else { 0.0 };
        let f = of((0..160).map(at).collect(), 12);
        for step in 0..12 {
            let band = f.at(step);
            held += usize::from((band.lower..=band.upper).contains(&at(160 + step)));
            n += 1;
        }
    }
    let share = held as f64 / n as f64;
    assert!((0.84..=0.97).contains(&share), "{share} of the values lie inside, 0.9 was asked for");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_finite_series_has_a_sound_forecast(
        values in prop::collection::vec(prop_oneof![
            -1e3..1e3f64, Just(0.0), Just(1e15), Just(-1e-300), -1e200..1e200f64,
        ], 1..90),
        horizon in 1usize..40,
    ) {
        let f = of(values, horizon);
        prop_assert_eq!(f.horizon(), horizon);
        for step in 0..horizon {
            let band = f.at(step);
            prop_assert!(band.lower <= band.mean && band.mean <= band.upper, "{:?}", band);
            prop_assert!(band.lower.is_finite() && band.upper.is_finite(), "{:?}", band);
        }
    }

    #[test]
    fn the_unit_does_not_matter(scale in 1e-6..1e9f64, values in prop::collection::vec(0.5..1.5f64, 2..120)) {
        let scaled = of(values.iter().map(|v| v * scale).collect(), 10);
        let plain = of(values, 10);
        for (s, p) in scaled.mean.iter().zip(&plain.mean) {
            prop_assert!((s / scale - p).abs() < 1e-6, "{} {}", s / scale, p);
        }
    }
}
