//! Decisions as they are written down: one JSON object per line.

use serde::{Deserialize, Serialize};

use super::{Decision, SettingsError, Snapshot, Worker};
use crate::forecast::Forecast;

/// What was seen, and what was decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Changes when older records can no longer be read.
    format: u32,
    pub snapshot: Snapshot,
    pub decision: Decision,
}

const FORMAT: u32 = 1;

/// A line that is no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The writer was stopped in the middle of a line, or the file was copied before it was whole.
    #[error("the record is cut short")]
    CutShort,
    #[error("record format {found}, this version reads {FORMAT}; use the version of Foreshard that wrote it")]
    Format { found: u32 },
    #[error("not a record of decisions: {0}")]
    Malformed(#[source] serde_json::Error),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("the forecast for worker {rank} is not whole")]
    Forecast { rank: u32 },
    #[error("the forecast of step times is not whole")]
    StepTimes,
    #[error("snapshot.time is no number")]
    Time,
}

impl Record {
    pub fn new(snapshot: Snapshot, decision: Decision) -> Self {
        Self { format: FORMAT, snapshot, decision }
    }

    /// The record as a line, without its end.
    ///
    /// # Errors
    /// None in practice: numbers that JSON does not have are written as null, and are refused when they are read.
    pub fn to_line(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// Reads one line.
    pub fn parse(line: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let whole = line.trim_ascii_end().ends_with(b"}");
        let problem = |e: serde_json::Error| match e.is_eof() || !whole {
            true => RecordError::CutShort,
            false => RecordError::Malformed(e),
        };
        let head: Head = serde_json::from_slice(line).map_err(problem)?;
        if head.format != FORMAT {
            return Err(RecordError::Format { found: head.format });
        }
        let record: Self = serde_json::from_slice(line).map_err(problem)?;
        record.check()?;
        Ok(record)
    }

    /// Refuses what no run has written.
    fn check(&self) -> Result<(), RecordError> {
        let s = &self.snapshot;
        s.settings.check()?;
        let all = |w: &Worker| {
            let of = [&w.speed_forecast, &w.memory.forecast, &w.cpu.forecast, &w.link.bandwidth.forecast];
            of.into_iter().flatten().all(is_whole)
        };
        if let Some(w) = s.workers.iter().find(|w| !all(w)) {
            return Err(RecordError::Forecast { rank: w.rank });
        }
        if !s.running.forecast.iter().all(is_whole) {
            return Err(RecordError::StepTimes);
        }
        if s.time.0.is_finite() { Ok(()) } else { Err(RecordError::Time) }
    }
}

fn is_whole(f: &Forecast) -> bool {
    f.mean.len() == f.lower.len()
        && f.mean.len() == f.upper.len()
        && f.interval.0 > 0.0
        && f.interval.0.is_finite()
        && f.start.0.is_finite()
}
