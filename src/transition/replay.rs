//! The same moments, decided upon again under other settings.

use super::decide::decide;
use super::{Considered, Decision, Record, Settings, SettingsError, Snapshot, Wait};

/// Changes to settings: names as in a manifest, below `adaptation`, and values.
pub type Changes = Vec<(String, String)>;

/// What another decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// These settings would have seen this very snapshot.
    Seen,
    /// At `since_step` these settings would have acted otherwise than was done. What the job would have looked like
    /// afterwards nobody measured; this is what they would say about what was seen.
    Supposed { since_step: u64 },
}

/// A moment of a recording, decided upon again.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed {
    pub decision: Decision,
    /// A person would call it another decision than the recorded one.
    pub differs: bool,
    pub ground: Ground,
}

/// What a replay came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub decisions: u64,
    pub differ: u64,
    /// Decisions that rest on what was not seen.
    pub supposed: u64,
    /// Plans that were adopted.
    pub moves_recorded: u64,
    /// Plans that would have been; a plan that is adopted at several moments counts once.
    pub moves_made: u64,
}

/// Decides the moments of a recording again, one after another, with some settings changed.
///
/// # Guarantees
/// - Pure, and without changes the decisions are the recorded ones.
/// - What the settings themselves decide is decided again: thresholds, dwell, gain, cooldown, budget, mode; and what follows
///   from earlier decisions without touching the job: what was considered, and whether the planner was asked.
/// # Caveats
/// - A plan that nobody asked for was not solved. Where these settings would ask and the recording has no answer, the
///   decision is to wait for the planner, and what follows is [`Ground::Supposed`]. So is what follows a plan that was
///   adopted and would not have been, or the other way round.
/// - A longer horizon is credited only as far as forecasts and predictions were recorded.
/// - Whoever asks earlier or later than was done is shown the recorded answer, while it is fresh.
pub struct Replay {
    changes: Changes,
    /// Settings as recorded, and changed; a run has one of them.
    settings: Option<(Settings, Settings)>,
    state: Option<State>,
    pub counts: Counts,
    recorded: Vec<u64>,
    made: Vec<u64>,
}

impl Replay {
    /// # Errors
    /// A setting that is not known, or a value that is none for it.
    pub fn new(changes: Changes) -> Result<Self, SettingsError> {
        changed(&Settings::default(), &changes)?;
        let (recorded, made) = (Vec::new(), Vec::new());
        Ok(Self { changes, settings: None, state: None, counts: Counts::default(), recorded, made })
    }

    /// The next moment.
    ///
    /// # Errors
    /// A value that cannot be used together with the recorded settings.
    pub fn again(&mut self, record: &Record) -> Result<Replayed, SettingsError> {
        let recorded = &record.snapshot.settings;
        let settings = match &self.settings {
            Some((before, after)) if before == recorded => after.clone(),
            _ => {
                let after = changed(recorded, &self.changes)?;
                self.settings = Some((recorded.clone(), after.clone()));
                after
            }
        };
        let snapshot = Snapshot { settings, ..record.snapshot.clone() };
        let state = self.state.get_or_insert_with(|| State::of(&snapshot));
        let ground = state.supposed_since.map_or(Ground::Seen, |since_step| Ground::Supposed { since_step });
        let decision = state.decide(snapshot, &record.decision);
        let differs = decision.label() != record.decision.label() || adopts(&decision) != adopts(&record.decision);
        self.counts.decisions += 1;
        self.counts.differ += u64::from(differs);
        self.counts.supposed += u64::from(ground != Ground::Seen);
        self.counts.moves_recorded += u64::from(is_new(&mut self.recorded, &record.decision));
        self.counts.moves_made += u64::from(is_new(&mut self.made, &decision));
        Ok(Replayed { decision, differs, ground })
    }
}

fn changed(settings: &Settings, changes: &Changes) -> Result<Settings, SettingsError> {
    let mut settings = settings.clone();
    changes.iter().try_for_each(|(field, value)| settings.set(field, value))?;
    Ok(settings)
}

fn is_new(seen: &mut Vec<u64>, decision: &Decision) -> bool {
    let Some(revision) = adopts(decision).filter(|r| !seen.contains(r)) else { return false };
    seen.push(revision);
    true
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
