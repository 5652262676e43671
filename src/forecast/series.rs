//! Evenly spaced measurements, and how uneven ones become even.

use super::{MAX_VALUES, robust};
use crate::units::Seconds;

/// Measurements of one quantity at even intervals, oldest first; at least one, all finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    start: Seconds,
    interval: Seconds,
    values: Vec<f64>,
}

/// What to do about intervals in which nothing was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    Refuse,
    /// Repeat the value before over at most this many intervals in a row. No line is drawn to the value after: one slow step
    /// that spans three intervals would look like a slope, or like three slow ones.
    Hold(usize),
}

/// Why measurements are no series.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SeriesError {
    #[error("a series needs at least one value")]
    Empty,
    #[error("the interval of a series is {0}, must be above zero")]
    Interval(Seconds),
    #[error("value {index} of a series is {value}; leave out what could not be measured")]
    NotFinite { index: usize, value: f64 },
    #[error("sample {index} of a series, at {time}, comes after one at {before}; sort samples by time")]
    Unordered { index: usize, time: Seconds, before: Seconds },
    #[error("nothing was measured from {from} to {to}: {n} intervals, {at_most} may be filled")]
    Gap { from: Seconds, to: Seconds, n: usize, at_most: usize },
}

impl Series {
    /// Values measured at `start`, `start + interval`, and so on.
    pub fn new(start: Seconds, interval: Seconds, values: Vec<f64>) -> Result<Self, SeriesError> {
        if !(interval.0 > 0.0 && interval.0.is_finite()) {
            return Err(SeriesError::Interval(interval));
        }
        if values.is_empty() {
            return Err(SeriesError::Empty);
        }
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            return Err(SeriesError::NotFinite { index, value: values[index] });
        }
        Ok(Self { start, interval, values })
    }

    /// The median of the samples (time, value) in each interval: one pause among ten steps is no change of speed.
    ///
    /// Intervals begin at multiples of `interval`, so the values of old ones do not depend on when this is called. Of
    /// more than [`MAX_VALUES`] intervals the latest are kept.
    pub fn resample(samples: &[(Seconds, f64)], interval: Seconds, gap: Gap) -> Result<Self, SeriesError> {
        if !(interval.0 > 0.0 && interval.0.is_finite()) {
            return Err(SeriesError::Interval(interval));
        }
        let number = |time: Seconds| (time.0 / interval.0).floor();
        for (index, &(time, value)) in samples.iter().enumerate() {
            if !value.is_finite() || !number(time).is_finite() {
                return Err(SeriesError::NotFinite { index, value: if value.is_finite() { time.0 } else { value } });
            }
            if index > 0 && time < samples[index - 1].0 {
                return Err(SeriesError::Unordered { index, time, before: samples[index - 1].0 });
            }
        }
        let Some(&(end, _)) = samples.last() else { return Err(SeriesError::Empty) };
        let oldest = number(end) - (MAX_VALUES - 1) as f64;
        let kept = &samples[samples.partition_point(|&(time, _)| number(time) < oldest)..];
        let at_most = match gap {
            Gap::Refuse => 0,
            Gap::Hold(n) => n,
        };
        let mut values: Vec<f64> = Vec::new();
        let mut before = number(kept[0].0);
        let start = Seconds(before * interval.0);
        for bin in kept.chunk_by(|a, b| number(a.0) == number(b.0)) {
            let at = number(bin[0].0);
            let value = robust::median(&bin.iter().map(|s| s.1).collect::<Vec<_>>());
            if let Some(&last) = values.last() {
                let n = (at - before) as usize - 1;
                if n > at_most {
                    let (from, to) = (Seconds((before + 1.0) * interval.0), Seconds(at * interval.0));
                    return Err(SeriesError::Gap { from, to, n, at_most });
                }
                values.extend(std::iter::repeat_n(last, n));
            }
            values.push(value);
            before = at;
        }
        Self::new(start, interval, values)
    }

    pub fn values(&self) -> &[f64] {
        &self.values
    }

    pub fn interval(&self) -> Seconds {
        self.interval
    }

    /// When the first value that is not known yet will be measured.
    pub fn end(&self) -> Seconds {
        self.start + self.interval * self.values.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(of: &[(f64, f64)]) -> Vec<(Seconds, f64)> {
        of.iter().map(|&(t, v)| (Seconds(t), v)).collect()
    }

    #[test]
    fn takes_the_median_of_each_interval_and_fills_what_it_may() {
        let uneven = samples(&[(10.1, 1.0), (10.5, 9.0), (10.9, 2.0), (13.0, 8.0), (14.2, 4.0), (14.3, 6.0)]);
        let series = Series::resample(&uneven, Seconds(1.0), Gap::Hold(2)).unwrap();
        assert_eq!(series.values(), [2.0, 2.0, 2.0, 8.0, 5.0]);
        assert_eq!(series.end(), Seconds(15.0));
        let refused = Series::resample(&uneven, Seconds(1.0), Gap::Hold(1)).unwrap_err();
        assert_eq!(refused, SeriesError::Gap { from: Seconds(11.0), to: Seconds(13.0), n: 2, at_most: 1 });
    }

    #[test]
    fn says_what_is_wrong_with_a_measurement() {
        let of = |s: &[(f64, f64)]| Series::resample(&samples(s), Seconds(1.0), Gap::Refuse).unwrap_err().to_string();
        assert!(of(&[(0.0, 1.0), (1.0, f64::NAN)]).starts_with("value 1 of a series is NaN"));
        assert!(of(&[(0.0, 1.0), (f64::INFINITY, 1.0)]).starts_with("value 1 of a series is inf"));
        assert!(of(&[(2.0, 1.0), (1.0, 1.0)]).contains("sort samples"));
        assert_eq!(of(&[]), "a series needs at least one value");
        assert!(Series::new(Seconds(0.0), Seconds(0.0), vec![1.0]).is_err());
        assert!(Series::new(Seconds(0.0), Seconds(1.0), vec![]).is_err());
    }

    #[test]
    fn keeps_the_latest_intervals_however_far_apart_samples_are() {
        let far = samples(&[(0.0, 1.0), (1e12, 2.0), (1e12 + 1.0, 3.0)]);
        assert_eq!(Series::resample(&far, Seconds(1.0), Gap::Refuse).unwrap().values(), [2.0, 3.0]);
    }
}
