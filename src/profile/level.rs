//! What one segment takes on one worker when the worker is as fast as it was at first.

use super::fit::median;

/// First measurements of a segment that are not looked at: buffers are being allocated, threads started.
const COLD: u32 = 2;
/// Measurements whose median becomes the level.
const FIRST: usize = 5;
/// Share of the way to a new measurement that an established level goes; more at first, where it is a running mean.
const GAIN: f64 = 0.02;
/// Most that one measurement counts as, relative to the level: an outlier pulls no further.
const BITE: f64 = 0.2;
/// The same for a level that is to be near the mean: what happens now and then belongs to it. Steps of a millisecond take
/// five where another process has the core for one turn.
const LARGE_BITE: f64 = 4.0;
/// What a measurement counts after a step: 0.993 halves it in a hundred.
const KEEP: f64 = 0.993;

/// Robust level of a segment's seconds per run, at the worker's baseline speed.
#[derive(Clone, Debug)]
pub struct Level {
    seen: u32,
    first: Vec<f64>,
    seconds: f64,
    /// Measurements behind the level, older ones counting less.
    count: f64,
    /// Runs per step, when it was last measured.
    runs: f64,
    bite: f64,
}

impl Level {
    /// Near the median.
    pub fn new() -> Self {
        Self { seen: 0, first: Vec::with_capacity(FIRST), seconds: 0.0, count: 0.0, runs: 1.0, bite: BITE }
    }

    /// Nearer to the mean.
    pub fn mean() -> Self {
        Self { bite: LARGE_BITE, ..Self::new() }
    }

    /// Seconds per run; `None` before the first measurement that counts.
    pub fn seconds(&self) -> Option<f64> {
        (self.count > 0.0).then_some(self.seconds)
    }

    /// Whether changes can be told against it.
    pub fn is_established(&self) -> bool {
        self.first.len() == FIRST
    }

    pub fn count(&self) -> f64 {
        self.count
    }

    pub fn runs(&self) -> f64 {
        self.runs
    }

    /// A step has passed.
    pub fn age(&mut self) {
        self.count *= KEEP;
    }

    /// Takes a measurement, already brought to baseline speed: seconds per run, runs per step.
    pub fn take(&mut self, seconds: f64, runs: f64) {
        self.runs = runs;
        self.seen = self.seen.saturating_add(1);
        if self.seen <= COLD {
            return;
        }
        self.count += 1.0;
        if !self.is_established() {
            self.first.push(seconds);
            self.seconds = median(self.first.iter().copied()).unwrap_or(seconds);
            return;
        }
        let bite = self.bite * self.seconds;
        self.seconds += GAIN.max(1.0 / self.count) * (seconds - self.seconds).clamp(-bite, bite);
    }
}
