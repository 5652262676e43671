//! Whether anything has happened, or is foreseen, that a new plan could answer.

use super::decision::Trigger;
use super::settings::{Mode, Settings};
use super::snapshot::{Considered, Observed, Proposal, Snapshot, Worker};
use crate::forecast::{Robust, change};
use crate::units::{Bytes, Seconds};

/// A foreseen change of speed has to last so many steps of the forecast.
const LEAST_STEPS: usize = 2;
/// Share of a step that a worker may receive for: beyond it computing can hardly hide it.
pub const LINK_LIMIT: f64 = 0.5;
/// Share of a step below which a worker's computing counts as nothing: should it double, no step is longer.
const NOTHING: f64 = 0.05;
/// A forecast of memory counts from here: near the limit, its upper bound has to stay below.
const NEAR_LIMIT: f64 = 0.9;

/// The most urgent reason to look for another plan.
///
/// # Guarantees
/// Nothing is compared with single measurements. A level has moved when the median over at least the dwell time is away
/// from what was expected by the threshold and by more than noise explains, and the latest measurements agree. What was
/// considered before is no news until it changes, or has to be looked at again.
/// # Complexity
/// O(workers · horizon): cheap enough for every step.
pub fn trigger(s: &Snapshot) -> Option<Trigger> {
    if s.settings.mode == Mode::Off || s.in_flight.is_some() {
        return None;
    }
    approved(s)
        .or_else(|| s.workers.iter().find_map(|w| memory(s, w)))
        .or_else(|| step_time(s))
        .or_else(|| s.workers.iter().find_map(|w| link(s, w)))
        .or_else(|| s.workers.iter().enumerate().find_map(|(i, w)| busy(s, i, w)))
        .or_else(|| s.workers.iter().enumerate().find_map(|(i, w)| speed(s, i, w)))
}

fn approved(s: &Snapshot) -> Option<Trigger> {
    let revision = s.approved?;
    let Some(Proposal::Plans(plans)) = &s.proposal else { return None };
    plans.iter().any(|c| c.revision == revision).then_some(Trigger::Approved { revision })
}

fn memory(s: &Snapshot, w: &Worker) -> Option<Trigger> {
    let refused = considered(s).and_then(|c| c.refused.as_ref());
    if matches!(refused, Some((_, Trigger::Memory { rank, .. })) if *rank == w.rank) {
        return None;
    }
    let forecast = w.memory.forecast.as_ref().filter(|_| s.settings.forecast)?;
    let limit = w.memory.limit.0 as f64;
    let step = (0..forecast.horizon().min(steps_within(forecast.interval, s.settings.horizon))).find(|&i| {
        let band = forecast.at(i);
        band.upper > limit && band.mean > NEAR_LIMIT * limit
    })?;
    let needs = Bytes(forecast.at(step).upper as u64);
    Some(Trigger::Memory { rank: w.rank, at: forecast.time(step), needs, limit: w.memory.limit })
}

/// No link may become what a step waits for. What was considered is no news.
fn link(s: &Snapshot, w: &Worker) -> Option<Trigger> {
    let forecast = w.link.bandwidth.forecast.as_ref().filter(|_| s.settings.forecast && considered(s).is_none())?;
    let step = s.running.predicted;
    let takes = |i: usize| Seconds(w.link.per_step.0 as f64 / forecast.mean[i]);
    let n = forecast.horizon().min(steps_within(forecast.interval, s.settings.horizon));
    let i = (0..n).find(|&i| takes(i) > step * LINK_LIMIT)?;
    Some(Trigger::Link { rank: w.rank, at: forecast.time(i), takes: takes(i), step })
}

fn step_time(s: &Snapshot) -> Option<Trigger> {
    let reference = considered(s).map_or(exactly(s.running.predicted), |c| c.step_time);
    let observed = Seconds(departed(&s.running.observed, &reference, 0.0, &s.settings)?);
    let expected = Seconds(reference.centre);
    Some(match observed > expected {
        true => Trigger::Slower { expected, observed },
        false => Trigger::Faster { expected, observed },
    })
}

fn busy(s: &Snapshot, index: usize, w: &Worker) -> Option<Trigger> {
    let before = considered(s).and_then(|c| c.busy.get(index).copied());
    let reference = before.unwrap_or(exactly(w.predicted_busy));
    let observed = Seconds(departed(&w.busy, &reference, NOTHING * s.running.predicted.0, &s.settings)?);
    Some(Trigger::Worker { rank: w.rank, expected: Seconds(reference.centre), observed })
}

/// The forecast leaves its own beginning, or is no longer the one that was considered.
fn speed(s: &Snapshot, index: usize, w: &Worker) -> Option<Trigger> {
    let forecast = w.speed_forecast.as_ref().filter(|f| f.horizon() > 0 && s.settings.forecast)?;
    let threshold = s.settings.threshold;
    let foreseen = |step: usize, from: f64| {
        Some(Trigger::Foreseen { rank: w.rank, at: forecast.time(step), from, to: forecast.mean[step] })
    };
    if let Some((slow, fast)) = considered(s).and_then(|c| *c.foreseen.get(index)?) {
        let other = |new: f64, old: f64| (new - old).abs() > threshold * old.abs();
        let (slowest, fastest) = (forecast.min(), forecast.max());
        if other(slowest.band.mean, slow) {
            return foreseen(slowest.step, slow);
        }
        if other(fastest.band.mean, fast) {
            return foreseen(fastest.step, fast);
        }
        return None;
    }
    let first = forecast.mean[0];
    let n = forecast.horizon().min(steps_within(forecast.interval, s.settings.horizon));
    let away = |i: usize| {
        let band = forecast.at(i);
        let slower = band.mean < first * (1.0 - threshold) && band.upper < first;
        let faster = band.mean > first * (1.0 + threshold) && band.lower > first;
        slower || faster
    };
    let step = (0..n).find(|&i| (i..n.min(i + LEAST_STEPS)).all(away))?;
    foreseen(step, first)
}

/// What was considered for this plan, if it still stands.
pub(super) fn considered(s: &Snapshot) -> Option<&Considered> {
    s.considered.as_ref().filter(|c| c.holds(s))
}

fn steps_within(interval: Seconds, horizon: Seconds) -> usize {
    (horizon / interval).ceil().max(1.0) as usize
}

/// A prediction, as a level without noise.
fn exactly(predicted: Seconds) -> Robust {
    Robust { centre: predicted.0, spread: 0.0, n: u64::MAX }
}

/// The level that has been held for at least the dwell time, if that is not the level of `reference`; where that is below
/// `floor`, by the threshold's share of it.
fn departed(observed: &Observed, reference: &Robust, floor: f64, settings: &Settings) -> Option<f64> {
    let now = observed.now()?;
    let least = settings.threshold * reference.centre.max(floor);
    if least.is_nan() || least <= 0.0 {
        return None;
    }
    let level = observed.levels(settings.dwell).find_map(|level| change::shift(reference, &level, least))?.to;
    let still = (now - reference.centre) * (level - reference.centre).signum() >= 0.5 * least;
    still.then_some(level)
}
