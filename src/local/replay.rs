//! Decisions of a run, made again under other settings.

use crate::forecast::Forecast;
use crate::transition::{Decision, Record, Settings, SettingsError, decide};

/// Changes to settings: names as in a manifest, below `adaptation`, and values.
pub type Changes = Vec<(String, String)>;

/// Decides recorded moments again. Only settings change: what was seen, foreseen and proposed stays as recorded.
pub struct Replay {
    changes: Changes,
    /// Settings as recorded, and changed; a run has one of them.
    settings: Option<(Settings, Settings)>,
    pub counts: Counts,
    recorded: Vec<u64>,
    made: Vec<u64>,
}

/// What a replay came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub decisions: u64,
    pub differ: u64,
    /// Plans that were adopted.
    pub moves_recorded: u64,
    /// Plans that would have been; a plan that is adopted at several moments counts once.
    pub moves_made: u64,
}

impl Replay {
    /// # Errors
    /// A setting that is not known, or a value that is none for it.
    pub fn new(changes: Changes) -> Result<Self, SettingsError> {
        changed(&Settings::default(), &changes)?;
        Ok(Self { changes, settings: None, counts: Counts::default(), recorded: Vec::new(), made: Vec::new() })
    }

    /// What would have been decided, and whether a person would call that another decision.
    ///
    /// # Errors
    /// A value that cannot be used together with the recorded settings.
    pub fn again(&mut self, record: &Record) -> Result<(Decision, bool), SettingsError> {
        let recorded = &record.snapshot.settings;
        let settings = match &self.settings {
            Some((before, after)) if before == recorded => after.clone(),
            _ => {
                let after = changed(recorded, &self.changes)?;
                self.settings = Some((recorded.clone(), after.clone()));
                after
            }
        };
        let mut snapshot = record.snapshot.clone();
        snapshot.settings = settings;
        let decision = decide(&snapshot);
        let differs = decision.label() != record.decision.label() || adopted(&decision) != adopted(&record.decision);
        self.counts.decisions += 1;
        self.counts.differ += u64::from(differs);
        self.counts.moves_recorded += u64::from(is_new(&mut self.recorded, &record.decision));
        self.counts.moves_made += u64::from(is_new(&mut self.made, &decision));
        Ok((decision, differs))
    }
}

fn changed(settings: &Settings, changes: &Changes) -> Result<Settings, SettingsError> {
    let mut settings = settings.clone();
    changes.iter().try_for_each(|(field, value)| settings.set(field, value))?;
    Ok(settings)
}

fn adopted(decision: &Decision) -> Option<u64> {
    match decision {
        Decision::Adopt { revision, .. } => Some(*revision),
        _ => None,
    }
}

fn is_new(seen: &mut Vec<u64>, decision: &Decision) -> bool {
    let Some(revision) = adopted(decision).filter(|r| !seen.contains(r)) else { return false };
    seen.push(revision);
    true
}

/// Refuses records that no run has written.
pub fn check(record: &Record) -> Result<(), String> {
    let s = &record.snapshot;
    s.settings.check().map_err(|e| e.to_string())?;
    let whole = |f: &Forecast| {
        f.mean.len() == f.lower.len()
            && f.mean.len() == f.upper.len()
            && f.interval.0 > 0.0
            && f.interval.0.is_finite()
            && f.start.0.is_finite()
    };
    for w in &s.workers {
        if !w.speed_forecast.iter().chain(&w.memory.forecast).all(whole) {
            return Err(format!("the forecast for worker {} is not whole", w.rank));
        }
    }
    if !s.time.0.is_finite() {
        return Err("snapshot.time is no number".to_owned());
    }
    Ok(())
}
