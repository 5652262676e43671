//! What a decision sees: plain values, which are written down and can be decided upon again.

use serde::{Deserialize, Serialize};

use super::decision::{Decision, Keep, Refusal, Trigger};
use super::settings::Settings;
use crate::forecast::{Forecast, Robust};
use crate::plan::{Infeasible, ShardId};
use crate::units::{Bytes, Seconds};

/// One moment of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// The last step that was finished.
    pub step: u64,
    /// Since the job started. All times of a snapshot count from there.
    pub time: Seconds,
    /// Steps to go, where the job has an end.
    pub steps_left: Option<u64>,
    pub settings: Settings,
    pub running: Running,
    /// By rank.
    pub workers: Vec<Worker>,
    /// What the planner offered since it was last asked.
    pub proposal: Option<Proposal>,
    /// Earlier moves, oldest first.
    pub moves: Vec<Move>,
    /// The revision that is being prepared, or whose cutover has been stamped.
    pub in_flight: Option<u64>,
    /// What was last looked at for the running plan, without moving.
    pub considered: Option<Considered>,
    /// The revision a person has approved.
    pub approved: Option<u64>,
}

/// The plan that runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Running {
    pub revision: u64,
    pub since_step: u64,
    pub since: Seconds,
    /// Step time that was predicted when it was adopted.
    pub predicted: Seconds,
    /// Step times since then.
    pub observed: Observed,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
}

/// A measured quantity, summed up over the last 9, 18, 36, ... measurements; see [`super::Tracker`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Observed {
    /// Shortest first.
    pub windows: Vec<Window>,
}

/// The latest measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// Time they took.
    pub span: Seconds,
    pub seen: Robust,
}

impl Observed {
    /// The latest level: the median of the shortest window.
    pub fn now(&self) -> Option<f64> {
        self.windows.first().map(|w| w.seen.centre)
    }

    /// Levels over at least `span`, shortest first.
    ///
    /// All with the usual spread of the windows: a few measurements may look calmer than they are, and those around a change
    /// look wilder.
    pub fn levels(&self, span: Seconds) -> impl Iterator<Item = Robust> {
        let mut spreads: Vec<f64> = self.windows.iter().map(|w| w.seen.spread).collect();
        spreads.sort_by(f64::total_cmp);
        let usual = spreads.get(spreads.len() / 2).copied().unwrap_or(0.0);
        let long_enough = self.windows.iter().filter(move |w| w.span >= span);
        long_enough.map(move |w| Robust { spread: usual, ..w.seen })
    }
}

/// One worker of the running plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    pub rank: u32,
    pub shard: ShardId,
    /// Computing time per step that was predicted when the plan was adopted.
    pub predicted_busy: Seconds,
    pub busy: Observed,
    /// Speed of its device now; 1 is nominal.
    pub speed: f64,
    pub speed_forecast: Option<Forecast>,
    pub memory: Memory,
    /// Cores' worth of time that its process gets.
    #[serde(default)]
    pub cpu: Watched,
    #[serde(default)]
    pub link: Link,
}

/// A measured quantity, and what is foreseen of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Watched {
    pub now: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
}

/// What a worker receives from others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Link {
    /// Of late.
    pub per_step: Bytes,
    /// Bytes per second while it receives.
    pub bandwidth: Watched,
}

/// Memory of one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// What the running plan needs of it.
    pub planned: Bytes,
    pub used: Bytes,
    pub limit: Bytes,
    /// Of `used`, in bytes.
    pub forecast: Option<Forecast>,
}

/// The planner's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Proposal {
    /// Plans for different futures (the present, the near one, the slowest moment foreseen, the mean), to be weighed.
    Plans(Vec<Candidate>),
    /// The running plan is the best.
    Same,
    Infeasible(Infeasible),
}

/// A plan that could be moved to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    pub revision: u64,
    /// When the predictions below were made.
    pub made: Seconds,
    /// Spacing of the predictions.
    pub interval: Seconds,
    /// Step times of the running plan: in the first interval from `made` under the speeds foreseen for it, in the
    /// second, and so on. At least the first one; without a forecast that is the present.
    pub running: Vec<Seconds>,
    /// Step times of this plan, in the same intervals.
    pub step_times: Vec<Seconds>,
    /// What it needs of each worker, by rank.
    pub memory: Vec<Bytes>,
    pub bytes_to_move: Bytes,
    /// Training stands still so long.
    pub pause: Seconds,
    /// Compiling and copying ahead, while training goes on.
    pub prepare: Seconds,
}

/// A cutover that took place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Move {
    pub revision: u64,
    pub step: u64,
    pub time: Seconds,
    /// As the candidate said, and as measured: all time that training lost by it.
    pub pause: Measured,
    pub prepare: Measured,
    /// Share of time it should save, and did: what steps take, against what those of the plan before would have taken
    /// under the speeds measured since.
    pub gain: Measured<f64>,
}

/// Foresight older than this share of the horizon counts no more.
pub(super) const STALE: f64 = 0.125;

impl Move {
    /// Whether a preparation that took so long was so much longer than expected that what the move was for may be over.
    pub fn comes_late(&self, prepared: Seconds, settings: &Settings) -> bool {
        prepared - self.prepare.expected > settings.horizon * STALE
    }
}

/// Horizons after which what a move brought says nothing about those to come: an hour of the usual ones.
const FORGOTTEN: f64 = 12.0;

/// An expectation and what came of it, once that is known.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Measured<T = Seconds> {
    pub expected: T,
    pub measured: Option<T>,
}

/// What the world looked like when a plan was last weighed and not adopted. Until it looks different there is nothing
/// new to decide.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Considered {
    pub step: u64,
    pub time: Seconds,
    /// How often in a row, with nothing new in between.
    pub times: u32,
    pub step_time: Robust,
    /// Computing time per step, by rank.
    pub busy: Vec<Robust>,
    /// Slowest and fastest speed that was foreseen, by rank.
    pub foreseen: Vec<Option<(f64, f64)>>,
    /// Why a move that was wanted could not be; stands as long as nothing changes.
    pub refused: Option<(Refusal, Trigger)>,
}

impl Snapshot {
    /// Moves whose gain still says something about the next, the latest first. Without an end to it two bad ones would keep
    /// a job from small gains for good: who does not move makes no better ones.
    pub(super) fn telling_moves(&self) -> impl Iterator<Item = &Move> {
        let since = self.time - self.settings.horizon * FORGOTTEN;
        self.moves.iter().rev().take_while(move |m| m.time >= since)
    }

    /// What the loop remembers when a proposal was weighed and the running plan stays; it then drops the proposal. `None`
    /// when nothing is settled yet.
    pub fn settled(&self, decision: &Decision) -> Option<Considered> {
        let refused = match decision {
            Decision::Keep { reason } if !matches!(reason, Keep::Off | Keep::Steady) => None,
            Decision::Refuse { reason, trigger } => Some((reason.clone(), *trigger)),
            _ => return None,
        };
        self.proposal.as_ref()?;
        let before = self.considered.as_ref().filter(|c| !c.holds(self));
        let latest = |o: &Observed| o.windows.first().map(|w| w.seen).unwrap_or_default();
        Some(Considered {
            step: self.step,
            time: self.time,
            times: before.map_or(1, |c| c.times.saturating_add(1)),
            step_time: latest(&self.running.observed),
            busy: self.workers.iter().map(|w| latest(&w.busy)).collect(),
            foreseen: self.workers.iter().map(Worker::foreseen).collect(),
            refused,
        })
    }
}

/// What was considered is looked at again after the dwell time, but not before this share of the horizon, ...
const LOOK_AGAIN: f64 = 1.0 / 64.0;
/// ... then after twice the time, and at last after this share of the horizon each time.
const LOOK_AGAIN_AT_LAST: f64 = 0.25;

impl Considered {
    /// Whether it still stands. Forecasts become surer and more of the future comes into view, so it does not for ever.
    pub(super) fn holds(&self, s: &Snapshot) -> bool {
        let Settings { horizon, dwell, .. } = s.settings;
        let first = dwell.max(horizon * LOOK_AGAIN);
        let stands = first * f64::from(1u32 << self.times.saturating_sub(1).min(16));
        s.time < self.time + stands.min(first.max(horizon * LOOK_AGAIN_AT_LAST))
    }
}

impl Worker {
    /// Slowest and fastest expected speed over its forecast.
    pub(super) fn foreseen(&self) -> Option<(f64, f64)> {
        let forecast = self.speed_forecast.as_ref().filter(|f| f.horizon() > 0)?;
        Some((forecast.min().band.mean, forecast.max().band.mean))
    }
}
