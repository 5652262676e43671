//! What was decided, and why: facts first, text at the end.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::plan::Infeasible;
use crate::units::{Bytes, Seconds};

/// Why a new plan may be worth looking for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Trigger {
    /// Steps take longer than expected, and it stays.
    Slower { expected: Seconds, observed: Seconds },
    /// Steps take less time than expected, and it stays: capacity has returned.
    Faster { expected: Seconds, observed: Seconds },
    /// A worker computes longer or shorter than expected, even if steps do not show it.
    Worker { rank: u32, expected: Seconds, observed: Seconds },
    /// The speed of a worker's device is foreseen to change.
    Foreseen { rank: u32, at: Seconds, from: f64, to: f64 },
    /// A worker may need more memory than it has.
    Memory { rank: u32, at: Seconds, needs: Bytes, limit: Bytes },
    /// Receiving what a step needs is foreseen to take `takes`, too much of a step.
    Link { rank: u32, at: Seconds, takes: Seconds, step: Seconds },
    /// A person approved this revision.
    Approved { revision: u64 },
}

/// What a move saves and costs, in time over the horizon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Balance {
    /// Time saved from `begin` to `end`, less what earlier moves teach not to believe.
    pub saved: Seconds,
    /// Training stands still so long: once, or twice when the plan is foreseen to be left again.
    pub cost: Seconds,
    /// Share of the time from `begin` to `end` that is saved, all expectations believed.
    pub share: f64,
    /// When the new plan could run: after it is prepared.
    pub begin: Seconds,
    /// The end of what is foreseen or of the job, or when the plan would be left again.
    pub end: Seconds,
}

impl Balance {
    pub fn net(&self) -> Seconds {
        self.saved - self.cost
    }
}

/// The running plan goes on because...
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Keep {
    /// Adaptation is off.
    Off,
    /// All is as expected, or as it was when it was last considered.
    Steady,
    /// No other plan is better.
    NothingBetter,
    /// The share saved is below the least one and the doubt in the forecasts.
    SmallGain {
        revision: u64,
        balance: Balance,
        min_gain: f64,
        doubt: f64,
    },
    CostsMore {
        revision: u64,
        balance: Balance,
        hysteresis: f64,
    },
    /// All moves that were allowed have been made.
    MovesSpent {
        moves: u32,
    },
}

/// A move is wanted, but not yet: ...
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Wait {
    /// Another one is being prepared.
    InFlight {
        revision: u64,
    },
    /// The planner has to answer first, or its answer is out of date.
    Unsolved,
    Cooldown {
        until: Seconds,
    },
    /// Too much time has gone into moves.
    Budget {
        spent: Seconds,
        cost: Seconds,
        until: Seconds,
    },
    /// It pays more when it begins later.
    BetterMoment {
        revision: u64,
        at: Seconds,
        balance: Balance,
    },
    /// A person has to agree.
    Approval {
        revision: u64,
        balance: Balance,
    },
}

/// A move is wanted, but cannot be: ...
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Refusal {
    Infeasible(Infeasible),
    /// The new plan would not fit.
    DoesNotFit {
        revision: u64,
        rank: u32,
        needs: Bytes,
        limit: Bytes,
    },
    /// The running plan will not fit, and no plan does better.
    OutOfMemory {
        rank: u32,
        at: Seconds,
        needs: Bytes,
        limit: Bytes,
    },
}

/// What to do at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Decision {
    Keep { reason: Keep },
    Adopt { revision: u64, trigger: Trigger, balance: Balance },
    Wait { reason: Wait, trigger: Option<Trigger> },
    Refuse { reason: Refusal, trigger: Trigger },
}

impl Decision {
    /// A fixed word for logs and metrics; changes exactly when a person would say that the decision has changed.
    pub fn label(&self) -> &'static str {
        match self {
            Decision::Keep { reason } => match reason {
                Keep::Off => "keep/off",
                Keep::Steady => "keep/steady",
                Keep::NothingBetter => "keep/nothing-better",
                Keep::SmallGain { .. } => "keep/small-gain",
                Keep::CostsMore { .. } => "keep/costs-more",
                Keep::MovesSpent { .. } => "keep/moves-spent",
            },
            Decision::Adopt { .. } => "adopt",
            Decision::Wait { reason, .. } => match reason {
                Wait::InFlight { .. } => "wait/in-flight",
                Wait::Unsolved => "wait/unsolved",
                Wait::Cooldown { .. } => "wait/cooldown",
                Wait::Budget { .. } => "wait/budget",
                Wait::BetterMoment { .. } => "wait/better-moment",
                Wait::Approval { .. } => "wait/approval",
            },
            Decision::Refuse { reason, .. } => match reason {
                Refusal::Infeasible(_) => "refuse/infeasible",
                Refusal::DoesNotFit { .. } => "refuse/does-not-fit",
                Refusal::OutOfMemory { .. } => "refuse/out-of-memory",
            },
        }
    }
}

/// `12.3 %`
struct Percent(f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} %", 100.0 * self.0)
    }
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Trigger::Slower { expected, observed } => {
                write!(f, "steps take {observed}, {expected} was expected")
            }
            Trigger::Faster { expected, observed } => {
                write!(f, "steps take only {observed}, {expected} was expected")
            }
            Trigger::Worker { rank, expected, observed } => {
                write!(f, "worker {rank} computes {observed} per step, {expected} was expected")
            }
            Trigger::Foreseen { rank, at, from, to } => {
                write!(f, "worker {rank} is foreseen to run at {to:.2} of its speed at {at}, now {from:.2}")
            }
            Trigger::Memory { rank, at, needs, limit } => {
                write!(f, "worker {rank} may need {needs} at {at}, it has {limit}")
            }
            Trigger::Link { rank, at, takes, step } => {
                write!(f, "worker {rank} is foreseen to receive for {takes} of each step of {step} at {at}")
            }
            Trigger::Approved { revision } => write!(f, "revision {revision} was approved"),
        }
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Balance { saved, cost, share, .. }, time) = (self, self.end - self.begin);
        write!(f, "saves {saved} ({}) in {time}, costs {cost}", Percent(*share))
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Keep::Off => write!(f, "adaptation is off"),
            Keep::Steady => write!(f, "nothing new"),
            Keep::NothingBetter => write!(f, "no plan is better"),
            Keep::SmallGain { revision, balance, min_gain, doubt } => {
                let (least, doubt) = (Percent(*min_gain), Percent(*doubt));
                write!(f, "revision {revision} {balance}; the least gain is {least}, and speeds are known to {doubt}")
            }
            Keep::CostsMore { revision, balance, hysteresis } => {
                let times = 1.0 + hysteresis;
                write!(f, "revision {revision} {balance}; it has to save {times:.1} times what it costs")
            }
            Keep::MovesSpent { moves } => write!(f, "all {moves} moves of the budget have been made"),
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wait::InFlight { revision } => write!(f, "revision {revision} is being prepared"),
            Wait::Unsolved => write!(f, "the planner is at work"),
            Wait::Cooldown { until } => write!(f, "the last move was not long ago; not before {until}"),
            Wait::Budget { spent, cost, until } => {
                write!(f, "moves have taken {spent} and this one takes {cost}, more than the budget before {until}")
            }
            Wait::BetterMoment { revision, at, balance } => {
                write!(f, "revision {revision} {balance} when it is begun at {at}")
            }
            Wait::Approval { revision, balance } => write!(f, "revision {revision} {balance}; approve it to move"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Infeasible(problem) => write!(f, "{problem}"),
            Refusal::DoesNotFit { revision, rank, needs, limit } => write!(
                f,
                "revision {revision} needs {needs} on worker {rank}, it has {limit}; give workers more memory or use more shards"
            ),
            Refusal::OutOfMemory { rank, at, needs, limit } => write!(
                f,
                "worker {rank} may need {needs} at {at}, it has {limit}, and no plan relieves it; give it more memory, use more shards or a smaller microbatch"
            ),
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::Keep { reason } => write!(f, "keep: {reason}"),
            Decision::Adopt { revision, trigger, balance } => {
                write!(f, "adopt revision {revision}, which {balance}: {trigger}")
            }
            Decision::Wait { reason, trigger: Some(trigger) } => write!(f, "wait: {reason} ({trigger})"),
            Decision::Wait { reason, trigger: None } => write!(f, "wait: {reason}"),
            Decision::Refuse { reason, trigger } => write!(f, "refuse: {reason} ({trigger})"),
        }
    }
}
