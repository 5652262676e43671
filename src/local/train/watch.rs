//! Measured series of a job, and what is foreseen of each.
//!
//! Forecasts are made on a thread of their own, now and then: the training loop only hands out samples and takes in what
//! has come of them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, TryRecvError};

use super::background;
use crate::forecast::{self, Forecast, Gap, Series, forecast};
use crate::topology::DeviceId;
use crate::transition::{Settings, Tracker, Watched};
use crate::units::Seconds;

/// Horizons of measurements that forecasts are made from.
const MEMORY: f64 = 8.0;
/// Least speed that is believed.
const LEAST_SPEED: f64 = 0.01;
/// Intervals of speeds in one of any other series: plans are priced by speeds, the others only have to show where they go.
const COARSE: f64 = 4.0;
/// Least time from one round of forecasts to the next.
const EVERY: Seconds = Seconds(1.0);
/// Gaps that are filled, in intervals: pauses of training, at cutovers and restarts.
const GAPS: Gap = Gap::Hold(64);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// Of a device, relative to its first steps.
    Speed(DeviceId),
    /// Cores' worth of time that its process gets.
    Cpu(DeviceId),
    /// Bytes.
    Memory(DeviceId),
    /// Bytes per second while it receives.
    Link(DeviceId),
    StepTime,
}

impl What {
    fn device(self) -> Option<DeviceId> {
        match self {
            What::Speed(d) | What::Cpu(d) | What::Memory(d) | What::Link(d) => Some(d),
            What::StepTime => None,
        }
    }

    fn least(self) -> f64 {
        if let What::Speed(_) = self { LEAST_SPEED } else { 0.0 }
    }
}

#[derive(Default)]
struct Seen {
    samples: VecDeque<(Seconds, f64)>,
    tracker: Tracker,
    forecast: Option<Forecast>,
}

type Forecasts = Vec<(What, Forecast)>;

/// All series of a job.
#[derive(Default)]
pub struct Watch {
    series: BTreeMap<What, Seen>,
    forecasting: Option<Receiver<Forecasts>>,
    next: Seconds,
}

impl Watch {
    /// Takes in a measurement that took `duration` and ended `now`.
    pub fn push(&mut self, what: What, now: Seconds, duration: Seconds, value: f64, settings: &Settings) {
        if !value.is_finite() {
            return;
        }
        let seen = self.series.entry(what).or_default();
        seen.samples.push_back((now, value));
        seen.tracker.push(duration, value);
        let oldest = now - settings.horizon * MEMORY;
        while seen.samples.front().is_some_and(|(at, _)| *at < oldest) {
            seen.samples.pop_front();
        }
    }

    pub fn forecast(&self, what: What) -> Option<&Forecast> {
        self.series.get(&what)?.forecast.as_ref()
    }

    pub fn watched(&self, what: What) -> Watched {
        let seen = self.series.get(&what);
        Watched { now: seen.and_then(|s| s.tracker.observed().now()), forecast: self.forecast(what).cloned() }
    }

    /// What is foreseen of speeds.
    pub fn speeds(&self) -> BTreeMap<DeviceId, Forecast> {
        let speed = |(&what, seen): (&What, &Seen)| match what {
            What::Speed(device) => Some((device, seen.forecast.clone()?)),
            _ => None,
        };
        self.series.iter().filter_map(speed).collect()
    }

    /// Another process or other cores serve as this device: what was seen says nothing any more.
    pub fn forget(&mut self, device: DeviceId) {
        self.series.retain(|what, _| what.device() != Some(device));
    }

    /// Step times are those of a plan.
    pub fn forget_steps(&mut self) {
        self.series.remove(&What::StepTime);
    }

    /// Takes in forecasts that are ready, and has them made anew now and then. `step`: time of a step.
    pub fn turn(&mut self, now: Seconds, step: Option<f64>, settings: &Settings) -> anyhow::Result<()> {
        if !settings.forecast {
            return Ok(());
        }
        match self.forecasting.as_ref().map(Receiver::try_recv) {
            Some(Ok(forecasts)) => {
                for (what, found) in forecasts {
                    if let Some(seen) = self.series.get_mut(&what) {
                        seen.forecast = Some(found);
                    }
                }
                self.forecasting = None;
            }
            Some(Err(TryRecvError::Disconnected)) => self.forecasting = None,
            Some(Err(TryRecvError::Empty)) | None => {}
        }
        for seen in self.series.values_mut() {
            if let (Some(f), Some(level)) = (&mut seen.forecast, seen.tracker.observed().levels(settings.dwell).next())
            {
                f.anchor(&level, settings.threshold);
            }
        }
        let Some(step) = step.filter(|_| self.forecasting.is_none() && now >= self.next) else { return Ok(()) };
        let fine = forecast::interval(settings.horizon, Seconds(step));
        self.next = now + fine.max(EVERY);
        let horizon = settings.horizon;
        let samples: Vec<(What, Vec<(Seconds, f64)>)> =
            self.series.iter().map(|(&what, s)| (what, s.samples.iter().copied().collect())).collect();
        self.forecasting = Some(background("forecast", move || {
            let of = |what: What, samples: &[(Seconds, f64)]| {
                let interval = if let What::Speed(_) = what { fine } else { fine * COARSE };
                let series = Series::resample(samples, interval, GAPS).ok()?;
                let settings = forecast::Settings { least: Some(what.least()), ..Default::default() };
                forecast(&series, (horizon / interval).ceil() as usize, &settings).ok()
            };
            samples.iter().filter_map(|(what, s)| Some((*what, of(*what, s)?))).collect()
        })?);
        Ok(())
    }
}
