//! Exponential smoothing: level, trend and season follow the errors of the forecast one step ahead.

use serde::{Deserialize, Serialize};

use super::{Fit, History, Method, Predict, robust};

/// Whether and how far the slope is carried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Trend {
    None,
    /// Holt's: for ever.
    Linear,
    /// Less from step to step.
    Damped,
}

/// ETS(A, N | A | Ad, N | A): additive errors, with or without a trend, with or without an additive season.
///
/// Two things keep wild values out. An error far outside the usual ones counts only as a usual one; after
/// [`RUN`] of them on the same side the level has moved, and jumps there.
///
/// # Source
/// Error-correction form: Hyndman, Koehler, Ord, Snyder, Forecasting with Exponential Smoothing (2008), chapter 2.
/// Bounded errors: Gelper, Fried, Croux, Robust Forecasting with Exponential and Holt-Winters Smoothing, Journal of
/// Forecasting 29 (2010).
#[derive(Clone, Copy, Debug)]
pub struct Smoothing {
    pub trend: Trend,
    pub season: Option<usize>,
}

/// Errors beyond this many times the usual one are bounded.
const WILD: f64 = 4.0;
/// So many wild errors in a row on one side are a new level.
const RUN: usize = 3;
/// Values that tell where to start, without a season.
const HEAD: usize = 8;
/// How fast the usual error follows.
const SCALE_RATE: f64 = 0.05;

impl Fit for Smoothing {
    fn method(&self) -> Method {
        Method::Smoothing { trend: self.trend, season: self.season }
    }

    fn needs(&self) -> usize {
        match (self.season, self.trend) {
            (Some(season), _) => season + season.div_ceil(4).max(4),
            (None, Trend::None) => 3,
            (None, _) => 12,
        }
    }

    /// Any noise has a slope somewhere, and a slope carried far is far off.
    fn margin(&self, simpler: &Method) -> f64 {
        match (self.trend, self.season) {
            (Trend::None, None) => 0.05,
            (Trend::None, Some(_)) if simpler.has_season() => 0.05,
            _ => 0.3,
        }
    }

    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>> {
        Some(Box::new(self.learn(history.values)))
    }
}

impl Smoothing {
    /// The state after `values`, with the rates that had the least absolute error one step ahead.
    ///
    /// # Complexity
    /// O(n) for each of at most 44 trials.
    pub(super) fn learn(&self, values: &[f64]) -> State {
        let start = State::new(values, self.season.unwrap_or(0), self.trend);
        let warm = self.season.unwrap_or(0).max(2).min(values.len());
        let run = |rates: Rates| {
            let mut state = start.clone();
            state.rates = rates;
            values[..warm].iter().for_each(|&v| state.observe(v));
            let error: f64 = values[warm..].iter().map(|&v| state.step(v).abs()).sum();
            (error, state)
        };
        let mut rates = Rates { level: 0.2, trend: 0.0, season: 0.0, damping: 1.0 };
        // What is tried, in turn: a handful of rates each, from sluggish to nervous.
        let mut dials: Vec<(Dial, &[f64])> =
            vec![(|r| &mut r.level, &[0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99])];
        if self.trend != Trend::None {
            rates.trend = 0.1;
            dials.push((|r| &mut r.trend, &[0.01, 0.03, 0.1, 0.3]));
        }
        if self.trend == Trend::Damped {
            rates.damping = 0.95;
            dials.push((|r| &mut r.damping, &[0.8, 0.9, 0.95, 0.98]));
        }
        if self.season.is_some() {
            rates.season = 0.1;
            dials.push((|r| &mut r.season, &[0.02, 0.1, 0.3, 0.6]));
        }
        let (mut least, mut best) = run(rates);
        for _ in 0..2 {
            let before = rates;
            for (dial, settings) in &dials {
                for &setting in *settings {
                    let mut trial = rates;
                    if std::mem::replace(dial(&mut trial), setting) == setting {
                        continue;
                    }
                    let (error, state) = run(trial);
                    if error < least {
                        (least, best) = (error, state);
                        rates = trial;
                    }
                }
            }
            if rates == before {
                break;
            }
        }
        best
    }
}

/// One of the rates.
type Dial = fn(&mut Rates) -> &mut f64;

/// How much of an error goes where.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rates {
    level: f64,
    /// Of what goes into the level.
    trend: f64,
    season: f64,
    /// What is left of the slope from one step to the next.
    damping: f64,
}

/// What smoothing remembers.
#[derive(Clone, Debug)]
pub(super) struct State {
    rates: Rates,
    level: f64,
    slope: f64,
    /// Seasonal figures as a ring; empty without a season.
    figures: Vec<f64>,
    /// Place of the figure of the next value.
    next: usize,
    /// The usual absolute error, as a standard deviation.
    scale: f64,
    /// Deseasonalised values whose error was wild, as long as they lie on one side.
    wild: [f64; RUN],
    n_wild: usize,
    above: bool,
}

impl State {
    fn new(values: &[f64], season: usize, trend: Trend) -> Self {
        // Changes from one value to the next, or over one season where there is one.
        let lag = season.max(1);
        let changes: Vec<f64> = values[lag..].iter().zip(values).map(|(b, a)| b - a).collect();
        let head = &changes[..changes.len().min(lag.max(HEAD))];
        let slope = if trend == Trend::None { 0.0 } else { robust::median(head) / lag as f64 };
        let level = robust::median(&values[..lag.max(HEAD.min(values.len()))]) - slope * lag as f64 / 2.0;
        let figures: Vec<f64> =
            values[..season].iter().enumerate().map(|(i, v)| v - level - slope * (i + 1) as f64).collect();
        let scale = robust::sigma(&changes, robust::median(&changes)) / std::f64::consts::SQRT_2;
        let rates = Rates { level: 0.0, trend: 0.0, season: 0.0, damping: 1.0 };
        Self { rates, level, slope, figures, next: 0, scale, wild: [0.0; RUN], n_wild: 0, above: false }
    }

    /// Takes in a value and returns the error of its forecast.
    fn step(&mut self, value: f64) -> f64 {
        let slope = self.slope * self.rates.damping;
        let figure = self.figures.get(self.next).copied().unwrap_or(0.0);
        let error = value - (self.level + slope + figure);
        let usual = error.abs() <= WILD * self.scale || self.scale == 0.0;
        let bounded = if usual { error } else { (WILD * self.scale).copysign(error) };
        let into_level = self.rates.level * bounded;
        self.level += slope + into_level;
        self.slope = slope + self.rates.trend * into_level;
        if let Some(figure) = self.figures.get_mut(self.next) {
            *figure += self.rates.season * (1.0 - self.rates.level) * bounded;
            self.next = (self.next + 1) % self.figures.len();
        }
        // The mean absolute error of normal values is sqrt(2 / pi) of their standard deviation.
        self.scale += SCALE_RATE * (bounded.abs() * (std::f64::consts::FRAC_PI_2).sqrt() - self.scale);
        if usual {
            self.n_wild = 0;
        } else {
            self.note_wild(value - figure, error > 0.0);
        }
        error
    }

    fn note_wild(&mut self, value: f64, above: bool) {
        if above != self.above {
            self.n_wild = 0;
        }
        self.above = above;
        self.wild[self.n_wild] = value;
        self.n_wild += 1;
        if self.n_wild == RUN {
            self.level = robust::median(&self.wild);
            self.n_wild = 0;
        }
    }
}

impl Predict for State {
    fn predict(&self, out: &mut [f64]) {
        let (mut level, mut slope) = (self.level, self.slope);
        for (i, v) in out.iter_mut().enumerate() {
            slope *= self.rates.damping;
            level += slope;
            *v = level;
            if !self.figures.is_empty() {
                *v += self.figures[(self.next + i) % self.figures.len()];
            }
        }
    }

    /// The weights of exponential smoothing spread noise as so many equal ones do.
    fn memory(&self) -> f64 {
        (2.0 - self.rates.level) / self.rates.level
    }

    fn observe(&mut self, value: f64) {
        self.step(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(smoothing: Smoothing, values: &[f64], n: usize) -> Vec<f64> {
        let mut out = vec![0.0; n];
        smoothing.learn(values).predict(&mut out);
        out
    }

    #[test]
    fn carries_a_line_on_and_damps_it_if_asked() {
        let line: Vec<f64> = (0..60).map(|i| 5.0 + 2.0 * f64::from(i)).collect();
        let linear = after(Smoothing { trend: Trend::Linear, season: None }, &line, 10);
        assert!((linear[9] - (5.0 + 2.0 * 69.0)).abs() < 0.5, "{linear:?}");
        let damped = after(Smoothing { trend: Trend::Damped, season: None }, &line, 200);
        assert!(damped[199] < 5.0 + 2.0 * 150.0, "{damped:?}");
        assert!(damped[199] - damped[198] < 0.1, "{damped:?}");
    }

    #[test]
    fn a_spike_at_the_end_is_not_believed_and_a_new_level_is() {
        let smoothing = Smoothing { trend: Trend::None, season: None };
        let mut values: Vec<f64> = (0..50).map(|i| 1.0 + 0.01 * f64::from(i * 7 % 5)).collect();
        values.push(9.0);
        assert!(after(smoothing, &values, 1)[0] < 1.1);
        values.extend([9.0, 9.02]);
        assert!(after(smoothing, &values, 1)[0] > 8.9);
    }

    #[test]
    fn seasonal_figures_follow_a_pattern_on_a_moving_level() {
        let values: Vec<f64> = (0..80).map(|i| f64::from(i % 8) + 0.1 * f64::from(i)).collect();
        let out = after(Smoothing { trend: Trend::Linear, season: Some(8) }, &values, 16);
        for (i, v) in out.iter().enumerate() {
            let at = 80 + i as u32;
            assert!((v - (f64::from(at % 8) + 0.1 * f64::from(at))).abs() < 1.0, "step {i}: {v}");
        }
    }
}
