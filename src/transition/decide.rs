//! Keep, adopt, wait or refuse.

use super::decision::{Balance, Decision, Keep, Refusal, Trigger, Wait};
use super::settings::Mode;
use super::snapshot::{Candidate, Move, Proposal, STALE, Snapshot, Worker};
use super::trigger::{considered, trigger};
use super::weigh::{Weighed, weigh};
use crate::units::{Bytes, Seconds};

/// So many standard errors are doubted: one side of 93 % of cases.
const ERRORS: f64 = 1.5;
/// So many of the last moves are looked at: those that did not pay make the loop more careful.
const LAST_MOVES: usize = 3;

/// Decides what to do at one moment.
///
/// # Expected flow
/// The loop asks at every step. [`Wait::Unsolved`] is its cue to ask the planner; the answer goes into the snapshots that
/// follow as their proposal, until it is settled ([`Snapshot::settled`]), adopted, or no longer asked for. A plan that is
/// solved again and comes out the same keeps its revision, so that an approval holds.
///
/// # Guarantees
/// - Pure: the same snapshot, the same decision.
/// - No move without a trigger, so none on noise, and none while another is in flight.
/// - A move that is not about memory or approved by a person pays within the horizon, by a margin, after the cooldown,
///   within the budget.
/// - A plan that does not fit a worker's memory is never adopted.
pub fn decide(s: &Snapshot) -> Decision {
    // 1. Is anything to be done, and may it be?
    let keep = |reason| Decision::Keep { reason };
    if s.settings.mode == Mode::Off {
        return keep(Keep::Off);
    }
    if let Some(revision) = s.in_flight {
        return Decision::Wait { reason: Wait::InFlight { revision }, trigger: None };
    }
    if let Some(moves) = s.settings.budget.moves.filter(|&moves| s.moves.len() >= moves as usize) {
        return keep(Keep::MovesSpent { moves });
    }
    let Some(trigger) = trigger(s) else {
        let refused = considered(s).and_then(|c| c.refused.clone());
        return refused.map_or(keep(Keep::Steady), |(reason, trigger)| Decision::Refuse { reason, trigger });
    };
    let wait = |reason| Decision::Wait { reason, trigger: Some(trigger) };
    let refuse = |reason| Decision::Refuse { reason, trigger };
    let must = matches!(trigger, Trigger::Memory { .. });
    let approved = match trigger {
        Trigger::Approved { revision } => Some(revision),
        _ => None,
    };
    if let Some(until) = cooldown(s).filter(|&until| s.time < until && !must && approved.is_none()) {
        return wait(Wait::Cooldown { until });
    }

    // 2. What does the planner say?
    let fresh = |c: &&Candidate| s.time <= c.made + s.settings.horizon * STALE;
    let candidates: Vec<&Candidate> = match &s.proposal {
        None => return wait(Wait::Unsolved),
        Some(Proposal::Infeasible(problem)) => return refuse(Refusal::Infeasible(problem.clone())),
        Some(Proposal::Same) => Vec::new(),
        Some(Proposal::Plans(plans)) if plans.iter().all(|c| !fresh(&c)) => return wait(Wait::Unsolved),
        Some(Proposal::Plans(plans)) => plans.iter().filter(fresh).collect(),
    };

    // 3. Which is the move to make first, of those that fit?
    let fitting = candidates.iter().filter(|c| overflow(s, c).is_none());
    let useful = fitting.filter(|c| approved.is_none_or(|r| c.revision == r) && (!must || relieves(&trigger, s, c)));
    let useful: Vec<&Candidate> = useful.copied().collect();
    let Some((candidate, Weighed { balance, at })) = weigh(s, &useful) else {
        if let Trigger::Memory { rank, at, needs, limit } = trigger {
            return refuse(Refusal::OutOfMemory { rank, at, needs, limit });
        }
        return match candidates.iter().find_map(|c| overflow(s, c)) {
            Some(refusal) => refuse(refusal),
            None => keep(Keep::NothingBetter),
        };
    };

    // 4. Does it pay, and is this the moment?
    let revision = candidate.revision;
    if !must && approved.is_none() {
        if let Some(reason) = does_not_pay(s, revision, balance) {
            return keep(reason);
        }
        // The next look may come too late for it.
        if at > s.time + s.settings.interval {
            return wait(Wait::BetterMoment { revision, at, balance });
        }
        if let Some(reason) = over_budget(s, balance.cost) {
            return wait(reason);
        }
    }
    if s.settings.mode == Mode::Recommend && approved.is_none() {
        return wait(Wait::Approval { revision, balance });
    }
    Decision::Adopt { revision, trigger, balance }
}

fn does_not_pay(s: &Snapshot, revision: u64, balance: Balance) -> Option<Keep> {
    let min_gain = s.settings.min_gain * (1.0 + 0.5 * n_disappointing(s) as f64);
    let hysteresis = s.settings.hysteresis;
    if balance.saved.0 <= 0.0 {
        return Some(Keep::NothingBetter);
    }
    let doubt = doubt(s);
    if balance.share < min_gain.max(doubt) {
        return Some(Keep::SmallGain { revision, balance, min_gain, doubt });
    }
    (balance.saved < balance.cost * (1.0 + hysteresis)).then_some(Keep::CostsMore { revision, balance, hysteresis })
}

/// By how much the speed of a worker may be off, for the worst of them: as much of a gain may be noise. What its forecast
/// says of that or what its latest computing times do, whichever knows better.
fn doubt(s: &Snapshot) -> f64 {
    let relative = |w: &Worker| {
        let forecast = w.speed_forecast.as_ref().filter(|_| s.settings.forecast)?;
        let foreseen = forecast.doubt / forecast.average().mean.abs();
        let seen = w.busy.levels(s.settings.dwell).next().map_or(f64::INFINITY, |l| l.error() / l.centre);
        Some(ERRORS * foreseen.min(seen)).filter(|d| d.is_finite())
    };
    s.workers.iter().filter_map(relative).fold(0.0, f64::max)
}

/// Why a candidate does not fit. What a worker uses beyond its plan (the process itself, buffers) it will use again.
fn overflow(s: &Snapshot, c: &Candidate) -> Option<Refusal> {
    s.workers.iter().zip(&c.memory).find_map(|(w, &planned)| {
        let needs = planned + (w.memory.used - w.memory.planned);
        let limit = w.memory.limit;
        (needs > limit).then_some(Refusal::DoesNotFit { revision: c.revision, rank: w.rank, needs, limit })
    })
}

/// Whether the worker that runs out of memory would not, with this plan.
fn relieves(trigger: &Trigger, s: &Snapshot, c: &Candidate) -> bool {
    let &Trigger::Memory { rank, needs, limit, .. } = trigger else { return false };
    let Some(i) = s.workers.iter().position(|w| w.rank == rank) else { return false };
    let planned: Bytes = c.memory.get(i).copied().unwrap_or_default();
    needs - s.workers[i].memory.planned + planned <= limit
}

/// When the next move may be, at the earliest.
fn cooldown(s: &Snapshot) -> Option<Seconds> {
    let last = s.moves.last()?;
    let doubled = if n_disappointing(s) > 0 { 2.0 } else { 1.0 };
    Some(last.time + s.settings.cooldown * doubled)
}

/// Of the last few moves.
fn n_disappointing(s: &Snapshot) -> usize {
    let latest = s.telling_moves().take(LAST_MOVES).enumerate();
    latest.filter(|&(i, m)| disappointed(m, i == 0)).count()
}

/// Whether a move brought less than half of what it should; one that was undone before anything could be measured did.
fn disappointed(m: &Move, is_last: bool) -> bool {
    m.gain.measured.map_or(!is_last, |gain| gain < 0.5 * m.gain.expected)
}

fn over_budget(s: &Snapshot, cost: Seconds) -> Option<Wait> {
    let spent: Seconds = s.moves.iter().map(|m| m.pause.measured.unwrap_or(m.pause.expected)).sum();
    let until = (spent + cost) / s.settings.budget.share;
    (until > s.time.max(s.settings.horizon)).then_some(Wait::Budget { spent, cost, until })
}
