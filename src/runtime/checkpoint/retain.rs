//! Which checkpoints are kept.

use std::path::{Path, PathBuf};

use super::CheckpointError;
use super::read::{Checkpoint, Depth, steps_in};
use super::write::Lock;

/// What is kept, beside the newest usable checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest.
    pub last: u32,
    /// Also every checkpoint whose step is a multiple of this.
    pub every: Option<u64>,
}

/// A checkpoint that may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub step: u64,
    pub usable: bool,
}

/// Steps of the checkpoints to remove. Broken ones count for nothing, and go once there is a newer usable one. Without
/// a usable one, nothing goes.
pub fn expired(candidates: &[Candidate], keep: &Keep) -> Vec<u64> {
    let mut sorted = candidates.to_vec();
    sorted.sort_by_key(|c| std::cmp::Reverse(c.step));
    let mut n_newer = 0;
    let mut gone = Vec::new();
    for Candidate { step, usable } in sorted {
        let kept = match usable {
            true => n_newer < keep.last.max(1) || keep.every.is_some_and(|k| step.is_multiple_of(k)),
            false => n_newer == 0,
        };
        n_newer += u32::from(usable);
        if !kept {
            gone.push(step);
        }
    }
    gone.reverse();
    gone
}

/// Removes what [`expired`] names from a directory of checkpoints, and returns what was removed. Checkpoints of other
/// models and of other formats are not ours to remove.
pub fn prune(directory: &Path, keep: &Keep, fingerprint: &str) -> Result<Vec<PathBuf>, CheckpointError> {
    let lock = Lock::take(directory)?;
    let mut candidates = Vec::new();
    let all = steps_in(directory)?;
    for (step, path) in &all {
        let usable = match Checkpoint::load(path) {
            Ok(c) if c.index().model.fingerprint != fingerprint => continue,
            Ok(c) => c.faults(Depth::Lengths).is_empty(),
            Err(CheckpointError::Format { .. }) => continue,
            Err(_) => false,
        };
        candidates.push(Candidate { step: *step, usable });
    }
    let gone = expired(&candidates, keep);
    let gone: Vec<PathBuf> = all.into_iter().filter(|(s, _)| gone.contains(s)).map(|(_, path)| path).collect();
    for path in &gone {
        lock.remove(path)?;
    }
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `candidates`: steps, with a minus sign for broken ones.
    fn check(candidates: &[i64], last: u32, every: Option<u64>, expected: &[u64]) {
        let candidates: Vec<Candidate> =
            candidates.iter().map(|&s| Candidate { step: s.unsigned_abs(), usable: s > 0 }).collect();
        assert_eq!(expired(&candidates, &Keep { last, every }), expected, "{candidates:?} {last} {every:?}");
    }

    #[test]
    fn keeps_the_last_ones_and_each_that_is_due() {
        check(&[], 3, None, &[]);
        check(&[10, 20], 3, None, &[]);
        check(&[10, 20, 30, 40], 2, None, &[10, 20]);
        check(&[40, 10, 30, 20], 2, None, &[10, 20]);
        check(&[10, 20, 30, 40, 50], 1, Some(20), &[10, 30]);
        check(&[10, 20, 30], 1, Some(7), &[10, 20]);
    }

    #[test]
    fn the_newest_usable_one_always_stays() {
        check(&[10, 20], 0, None, &[10]);
        check(&[10, 20], 0, Some(0), &[10]);
        check(&[10, -20, -30], 1, None, &[]);
        check(&[10, 20, -30], 1, None, &[10]);
    }

    #[test]
    fn broken_ones_count_for_nothing_and_go() {
        check(&[10, -20, 30, -40, 50], 2, None, &[10, 20, 40]);
        check(&[10, -20, 30], 2, Some(10), &[20]);
        check(&[-10, -20], 1, None, &[]);
    }
}
