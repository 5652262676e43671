//! Decisions as they are written down, one per line.

use serde::{Deserialize, Serialize};

use super::{Decision, Snapshot};

/// What was seen, and what was decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub snapshot: Snapshot,
    pub decision: Decision,
}
