//! Executables that stay loaded: plans that were left are returned to, and neighbours have pieces in common.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use crate::device::{Device, ExecutableMemory, affinity};

/// So many are kept: ten plans of a shard with six pieces.
const MOST: usize = 64;

/// An executable with what the compiler says of its memory.
pub type Compiled<D> = (Arc<<D as Device>::Executable>, ExecutableMemory);

/// The executables of a process that were used last.
pub struct Kept<D: Device> {
    latest: Mutex<Latest<D>>,
}

struct Latest<D: Device> {
    /// By key, with the time of its last use.
    of: BTreeMap<Key, (u64, Compiled<D>)>,
    /// Counts uses.
    clock: u64,
}

/// Tells modules apart as the compiler does.
pub type Key = [u8; 32];

/// Of a module that is compiled now: XLA splits loops for the cores that the process may use at that time.
pub fn key(hlo: &[u8]) -> Key {
    let n_cores = affinity::allowed().len() as u64;
    Sha256::new().chain_update(n_cores.to_le_bytes()).chain_update(hlo).finalize().into()
}

impl<D: Device> Default for Kept<D> {
    fn default() -> Self {
        Self { latest: Mutex::new(Latest { of: BTreeMap::new(), clock: 0 }) }
    }
}

impl<D: Device> Kept<D> {
    pub fn get(&self, key: &Key) -> Option<Compiled<D>> {
        let mut latest = self.lock();
        latest.clock += 1;
        let now = latest.clock;
        let (used, compiled) = latest.of.get_mut(key)?;
        *used = now;
        Some(compiled.clone())
    }

    /// Keeps one; the one used longest ago goes when there are too many.
    pub fn put(&self, key: Key, compiled: Compiled<D>) {
        let mut latest = self.lock();
        latest.clock += 1;
        let now = latest.clock;
        latest.of.insert(key, (now, compiled));
        if latest.of.len() > MOST {
            let oldest = latest.of.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| latest.of.remove(&key));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Latest<D>> {
        // Every change above is whole.
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
