//! What a measured quantity will do next: point forecasts with intervals, by the method that has been right so far.
//!
//! ```text
//! samples --Series::resample--> Series --forecast--> Forecast
//!                                        season::detect   which rhythms repeat, if any
//!                                        change::last     which levels belong to the past
//!                                        backtest         every method forecasts what is known already
//!                                        conformal        its errors there are the interval here
//! ```
//!
//! `forecast` knows nothing of workers, plans or where the measurements come from: it sees evenly spaced numbers.

pub mod backtest;
pub mod change;
pub mod conformal;
pub mod mstl;
pub mod naive;
pub mod outlook;
pub mod robust;
pub mod season;
pub mod series;
pub mod smoothing;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Seconds;

pub use outlook::{Band, Extreme, Forecast, Held};
pub use robust::Robust;
pub use series::{Gap, Series, SeriesError};

use backtest::Backtest;
use change::Change;

/// Older values than this are not looked at: cost is bounded, and what is older says little.
pub const MAX_VALUES: usize = 2048;
/// Longest horizon, in intervals of the series.
pub const MAX_HORIZON: usize = 512;

/// Part of a series that a method learns from.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    pub values: &'a [f64],
    /// Position of `values[0]` in the whole series: a method with covariates looks up its rows by it.
    pub first: usize,
}

/// A way to forecast that has not seen data yet.
///
/// A learned model with covariates (batch traits, model traits) enters here: it owns the covariates' rows for the whole
/// series and its horizon, and is offered to [`choose`] beside [`candidates`].
pub trait Fit {
    fn method(&self) -> Method;

    /// Values it needs at least.
    fn needs(&self) -> usize;

    /// By how much its loss in the backtest has to be below that of `simpler`, a method tried before it: chance alone shall
    /// not make a forecast complicated.
    fn margin(&self, simpler: &Method) -> f64 {
        // Somewhere any load has seemed to repeat; that is a season only if it explains much.
        if self.method().has_season() && !simpler.has_season() { 0.3 } else { 0.05 }
    }

    /// Learns from at least [`needs`](Fit::needs) values; `None` when they say nothing to this method.
    fn fit(&self, history: History<'_>) -> Option<Box<dyn Predict>>;
}

/// A method that has learned.
pub trait Predict {
    /// Writes the expected next values.
    fn predict(&self, out: &mut [f64]);

    /// Values over which noise is averaged in the level of the forecast.
    fn memory(&self) -> f64;

    /// Takes one more value in; what was learned (parameters, seasonal figures) stays. This is what makes a backtest
    /// over many origins cost about as much as one fit.
    fn observe(&mut self, value: f64);
}

/// How a forecast was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Method {
    /// The last value stays, unless it is a wild one.
    Naive,
    /// The mean of all values that still count.
    Mean,
    /// What is away from the mean comes back to it.
    Reverting,
    /// What was one season ago comes again.
    SeasonalNaive { season: usize },
    /// The same, moved to the level of today.
    SeasonalShift { season: usize },
    /// Exponential smoothing.
    Smoothing { trend: smoothing::Trend, season: Option<usize> },
    /// Seasonal figures by repeated loess, exponential smoothing of what they leave.
    Mstl { seasons: Vec<usize> },
}

impl Method {
    pub fn has_season(&self) -> bool {
        !matches!(self, Method::Naive | Method::Mean | Method::Reverting | Method::Smoothing { season: None, .. })
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use smoothing::Trend;
        match self {
            Method::Naive => write!(f, "the last value"),
            Method::Mean => write!(f, "the mean"),
            Method::Reverting => write!(f, "a return to the mean"),
            Method::SeasonalNaive { season } => write!(f, "the value {season} before"),
            Method::SeasonalShift { season } => write!(f, "the value {season} before, and its change since"),
            Method::Smoothing { trend, season } => {
                let trend = match trend {
                    Trend::None => "exponential smoothing",
                    Trend::Linear => "exponential smoothing with a trend",
                    Trend::Damped => "exponential smoothing with a damped trend",
                };
                write!(f, "{trend}")?;
                season.map_or(Ok(()), |s| write!(f, " and a season of {s}"))
            }
            Method::Mstl { seasons } => write!(f, "seasonal figures of {seasons:?}"),
        }
    }
}

/// How forecasts are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Settings {
    /// Share of future values that the interval shall hold, step by step.
    pub level: f64,
    /// A level that moved by this share of itself, and stayed, makes older values irrelevant.
    pub change: f64,
    /// The quantity is never below this.
    pub least: Option<f64>,
    /// The quantity is never above this.
    pub most: Option<f64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { level: 0.9, change: 0.1, least: None, most: None }
    }
}

/// Steps that a horizon is cut into.
const STEPS: f64 = 64.0;

/// A good interval for a series whose samples come every `spacing`: a 64th of the horizon, but two samples or more in
/// each, so that medians are medians and few gaps have to be filled.
pub fn interval(horizon: Seconds, spacing: Seconds) -> Seconds {
    (horizon / STEPS).max(spacing * 2.0)
}

/// Why there is no forecast.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ForecastError {
    #[error(transparent)]
    Series(#[from] SeriesError),
    #[error("a horizon of {horizon} intervals, must be 1 to {MAX_HORIZON}; choose a longer interval")]
    Horizon { horizon: usize },
    #[error("forecast.{field}: {value}, must be {range}")]
    Setting { field: &'static str, value: f64, range: &'static str },
}

impl Settings {
    fn check(&self) -> Result<(), ForecastError> {
        let outside = |field, value, range| Err(ForecastError::Setting { field, value, range });
        if !(0.5..=0.99).contains(&self.level) {
            return outside("level", self.level, "0.5 to 0.99");
        }
        if !(0.01..=10.0).contains(&self.change) {
            return outside("change", self.change, "0.01 to 10");
        }
        if self.least.is_some_and(|least| !least.is_finite()) {
            return outside("least", self.least.unwrap_or(f64::NAN), "a number");
        }
        if let Some(most) = self.most.filter(|&most| !most.is_finite() || self.least.is_some_and(|least| least > most))
        {
            return outside("most", most, "a number, and not below forecast.least");
        }
        Ok(())
    }
}

/// Forecasts the next `horizon` values of a series.
///
/// Any series of at least one value has a forecast. A short one is forecast by its last value, with an interval that
/// admits how little was seen; seasons enter once they have been seen twice.
///
/// # Errors
/// [`ForecastError::Horizon`], [`ForecastError::Setting`].
/// # Complexity
/// Seasons are sought in O(n²) multiplications with n at most [`MAX_VALUES`]; every method is fitted twice in O(n).
pub fn forecast(series: &Series, horizon: usize, settings: &Settings) -> Result<Forecast, ForecastError> {
    settings.check()?;
    if horizon == 0 || horizon > MAX_HORIZON {
        return Err(ForecastError::Horizon { horizon });
    }
    let all = series.values();
    let recent = &all[all.len().saturating_sub(MAX_VALUES)..];
    let (values, seasons) = relevant(recent, settings.change);
    let first = all.len() - values.len();
    let known = (robust::quantile(&values, 0.02), robust::quantile(&values, 0.98));
    let mut chosen = choose(History { values: &values, first }, &candidates(&seasons), horizon);
    if chosen.method.has_season() {
        // A season that chance has made, moved to the level of today, is not to reach where the quantity has never been.
        chosen.mean.iter_mut().for_each(|v| *v = v.clamp(known.0, known.1));
    }
    let (lower, upper) = conformal::intervals(&chosen.mean, &chosen.backtest, settings.level);
    let mut forecast = Forecast {
        start: series.end(),
        interval: series.interval(),
        level: settings.level,
        n_values: values.len(),
        mase: chosen.backtest.mase(&values),
        known,
        doubt: doubt(&chosen, recent),
        held: held(&chosen, recent),
        method: chosen.method,
        lower,
        mean: chosen.mean,
        upper,
    };
    forecast.clamp(settings.least, settings.most);
    Ok(forecast)
}

/// The values that still count, and their seasons.
///
/// Without seasons, what lies before the last change of level is dropped, if the level is a new one: one that was there
/// before may go again as it went, after as long. With a season that explains most of the values it would be a pity to lose the cycles
/// seen before: they are kept, moved to the new level.
fn relevant(values: &[f64], change: f64) -> (Vec<f64>, Vec<usize>) {
    let least = change * robust::median(values).abs();
    let seasons = season::detect(values);
    let Some(&season) = seasons.first() else {
        let start = change::last(values, least).filter(|c| is_new(values, c)).map_or(0, |c| c.at);
        let values = values[start..].to_vec();
        let seasons = if start == 0 { Vec::new() } else { season::detect(&values) };
        return (values, seasons);
    };
    let flat = season::without(values, season);
    let mut values = values.to_vec();
    let repeats = mean_distance(&values[season..], &values) < 0.5 * mean_distance(&values, &[robust::median(&values)]);
    if let Some(c) = change::last(&flat, least).filter(|c| repeats && is_new(&flat, c)) {
        values[..c.at].iter_mut().for_each(|v| *v += c.after - c.before);
    }
    (values, seasons)
}

/// Mean distance of each value from that of `others`; the last of these counts for all that follow.
fn mean_distance(values: &[f64], others: &[f64]) -> f64 {
    let last = others.last().copied().unwrap_or(0.0);
    let others = others.iter().copied().chain(std::iter::repeat(last));
    values.iter().zip(others).map(|(a, b)| (a - b).abs()).sum::<f64>() / values.len().max(1) as f64
}

/// Whether the level since a change has stayed longer than ever before.
fn is_new(values: &[f64], change: &Change) -> bool {
    let near = (change.after - change.before).abs() / 2.0;
    let visits = values[..change.at].split(|v| (v - change.after).abs() > near);
    let longest = visits.map(<[f64]>::len).max().unwrap_or(0);
    values.len() - change.at > longest
}

/// The methods worth trying on a series with these seasons, simplest first.
pub fn candidates(seasons: &[usize]) -> Vec<Box<dyn Fit>> {
    use smoothing::{Smoothing, Trend};
    let mut out: Vec<Box<dyn Fit>> = vec![
        Box::new(naive::Mean),
        Box::new(naive::Naive),
        Box::new(naive::Reverting),
        Box::new(Smoothing { trend: Trend::None, season: None }),
    ];
    for &season in seasons {
        out.push(Box::new(naive::SeasonalNaive { season }));
        out.push(Box::new(naive::SeasonalShift { season }));
    }
    out.push(Box::new(Smoothing { trend: Trend::Damped, season: None }));
    out.push(Box::new(Smoothing { trend: Trend::Linear, season: None }));
    for &season in seasons {
        out.push(Box::new(Smoothing { trend: Trend::None, season: Some(season) }));
    }
    if !seasons.is_empty() {
        out.push(Box::new(mstl::Mstl { seasons: seasons.to_vec() }));
    }
    out
}

/// The method of least error in the backtest, and what it expects.
pub struct Choice {
    pub method: Method,
    pub mean: Vec<f64>,
    /// See [`Predict::memory`].
    pub memory: f64,
    pub backtest: Backtest,
}

/// Lets every method forecast the second half of the history and takes the best.
///
/// # Guarantees
/// A method that comes later in `methods` has to be better than the best earlier one by its [`margin`](Fit::margin), and
/// no worse over the later half of the origins: a rhythm that has stopped is soon forgotten. A trend is
/// carried on no further than twice as far as it was tested.
/// # Source
/// Rolling-origin evaluation: Tashman, International Journal of Forecasting 16 (2000). The score is the mean squared
/// error over all origins and steps, which the mean of the future minimises (Gneiting, Journal of the American
/// Statistical Association 106, 2011): forecasts are summed up over a horizon, and a load that comes and goes has to
/// count by its share. Errors that the first method makes in one case of twenty are capped.
pub fn choose(history: History<'_>, methods: &[Box<dyn Fit>], horizon: usize) -> Choice {
    let values = history.values;
    let origins = backtest::origins(values.len());
    let mut cap = None;
    let mut best: Option<(&dyn Fit, Backtest, (f64, f64))> = None;
    for method in methods.iter().map(Box::as_ref) {
        let Some(test) = backtest::run(method, history, &origins, horizon) else { continue };
        let cap = *cap.get_or_insert_with(|| test.usual());
        let (all, late) = test.loss(cap);
        if best
            .as_ref()
            .is_none_or(|(simpler, _, b)| all < b.0 * (1.0 - method.margin(&simpler.method())) && late <= b.1)
        {
            best = Some((method, test, (all, late)));
        }
    }
    let last = values.last().copied().unwrap_or(0.0);
    let mut choice =
        Choice { method: Method::Naive, mean: vec![last; horizon], memory: 1.0, backtest: Backtest::default() };
    if let Some((method, test, _)) = best
        && let Some(fitted) = method.fit(history)
    {
        (choice.method, choice.backtest) = (method.method(), test);
        choice.memory = fitted.memory();
        fitted.predict(&mut choice.mean);
        if let Method::Smoothing { trend: smoothing::Trend::Linear, .. } = choice.method {
            let far = horizon.min(2 * choice.backtest.residuals.len());
            let reached = choice.mean[far - 1];
            choice.mean[far..].fill(reached);
        }
    }
    choice
}

/// Standard error of the level of a forecast: noise, as the values show it, and how well so many can show it.
fn doubt(choice: &Choice, values: &[f64]) -> f64 {
    let level = robust::median(&choice.mean).abs();
    robust::noise(values) / choice.memory.sqrt() + DOUBT * level / (values.len() as f64).sqrt()
}

/// How long the values have been nearer to the latest ones than to what is expected next.
///
/// None where that may be noise, or where a season tells how long such times last.
fn held(choice: &Choice, values: &[f64]) -> Held {
    const LATEST: usize = 3;
    const BEYOND_NOISE: f64 = 2.0;
    let level = robust::median(&values[values.len().saturating_sub(LATEST)..]);
    let expected = choice.mean[0];
    let near = |v: &&f64| (*v - level).abs() < (*v - expected).abs();
    let n = values.iter().rev().take_while(near).count();
    let noise = robust::noise(values) / (n as f64).sqrt();
    let told = choice.method.has_season() || (level - expected).abs() < BEYOND_NOISE * noise;
    Held { level, intervals: if told { 0 } else { n } }
}

/// By how much, relative to it, a level may be off of which one value is known; it fades with the root of their number.
const DOUBT: f64 = 0.1;

#[cfg(test)]
mod tests;
