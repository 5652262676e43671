//! The same moments, decided upon again under other settings.

use super::decide::decide;
use super::{Considered, Decision, Record, Settings, Snapshot, Wait};
use crate::units::Seconds;

/// What another decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// These settings would have seen this very snapshot.
    Seen,
    /// At `since_step` these settings would have acted otherwise than was done. What the job would have looked like
    /// afterwards nobody measured; this is what they would say about what was seen.
    Supposed { since_step: u64 },
}

/// A moment of a recording, decided upon twice.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed {
    pub step: u64,
    pub time: Seconds,
    pub recorded: Decision,
    pub decision: Decision,
    pub ground: Ground,
}

/// Decides again upon every recorded moment, with settings changed by `change`.
///
/// # Guarantees
/// - Pure, and without `change` the decisions are the recorded ones.
/// - What the settings themselves decide is decided again: thresholds, dwell, gain, cooldown, budget, mode; and what follows
///   from earlier decisions without touching the job: what was considered, and whether the planner was asked.
/// # Caveats
/// - A plan that nobody asked for was not solved. Where these settings would ask and the recording has no answer, the
///   decision is to wait for the planner, and what follows is [`Ground::Supposed`]. So is what follows a plan that was
///   adopted and would not have been, or the other way round.
/// - A longer horizon is credited only as far as forecasts and predictions were recorded.
/// - Whoever asks earlier or later than was done is shown the recorded answer, while it is fresh.
pub fn replay(
    records: impl IntoIterator<Item = Record>,
    change: impl Fn(&mut Settings),
) -> impl Iterator<Item = Replayed> {
    let mut state: Option<State> = None;
    records.into_iter().map(move |Record { mut snapshot, decision: recorded, .. }| {
        change(&mut snapshot.settings);
        let state = state.get_or_insert_with(|| State::of(&snapshot));
        let ground = state.supposed_since.map_or(Ground::Seen, |since_step| Ground::Supposed { since_step });
        let (step, time) = (snapshot.step, snapshot.time);
        let decision = state.decide(snapshot, &recorded);
        Replayed { step, time, recorded, decision, ground }
    })
}

/// What the loop would remember.
struct State {
    revision: u64,
    considered: Option<Considered>,
    /// The planner was asked, and its answer has not been settled.
    asked: bool,
    supposed_since: Option<u64>,
}

impl State {
    /// A recording may begin in the middle of a job.
    fn of(first: &Snapshot) -> Self {
        Self {
            revision: first.running.revision,
            considered: first.considered.clone(),
            asked: first.proposal.is_some(),
            supposed_since: None,
        }
    }

    fn decide(&mut self, mut s: Snapshot, recorded: &Decision) -> Decision {
        if s.running.revision != self.revision {
            (self.revision, self.considered, self.asked) = (s.running.revision, None, false);
        }
        s.considered = self.considered.clone();
        let answer = s.proposal.take();
        if self.asked {
            s.proposal = answer.clone();
        }
        let mut decision = decide(&s);
        if asks(&decision) && s.proposal.is_none() && answer.is_some() {
            s.proposal = answer;
            decision = decide(&s);
        }
        self.asked = asks(&decision) || (s.proposal.is_some() && matches!(decision, Decision::Wait { .. }));
        if let Some(considered) = s.settled(&decision) {
            (self.considered, self.asked) = (Some(considered), false);
        }
        let unanswered = asks(&decision) && s.proposal.is_none() && !asks(recorded);
        if adopts(&decision) != adopts(recorded) || unanswered {
            self.supposed_since.get_or_insert(s.step);
        }
        decision
    }
}

fn asks(decision: &Decision) -> bool {
    matches!(decision, Decision::Wait { reason: Wait::Unsolved, .. })
}

fn adopts(decision: &Decision) -> Option<u64> {
    match decision {
        Decision::Adopt { revision, .. } => Some(*revision),
        _ => None,
    }
}
