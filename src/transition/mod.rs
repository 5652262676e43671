//! From plan to plan: whether to move, what a move changes.
//!
//! ```text
//! Tracker, Forecast --> Snapshot --decide--> keep | adopt | wait | refuse
//!                          |                  trigger   has anything happened that a plan could answer?
//!                          |                  weigh     does the answer pay, and when?
//!                          +--replay--------> the same moments under other settings
//! ```
//!
//! A [`Snapshot`] and the [`Decision`] made from it are plain values, written one pair per line to a run's record.
//! `transition` knows nothing of processes, clocks or files, and neither solves nor simulates: plans and predictions come
//! in with the snapshot.

mod decide;
mod decision;
mod record;
mod replay;
mod settings;
mod snapshot;
mod track;
mod trigger;
mod weigh;

pub use decide::decide;
pub use decision::{Balance, Decision, Keep, Refusal, Trigger, Wait};
pub use record::{Record, RecordError};
pub use replay::{Changes, Counts, Ground, Replay, Replayed};
pub use settings::{Budget, Mode, Settings, SettingsError};
pub use snapshot::{
    Candidate, Considered, Link, Measured, Memory, Move, Observed, Proposal, Running, Snapshot, Watched, Window, Worker,
};
pub use track::{Ledger, Tracker};
pub use trigger::{LINK_LIMIT, trigger};
pub use weigh::{Weighed, weigh};

#[cfg(test)]
mod tests;
