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
pub struct Kept<D: Device>(Mutex<Latest<Compiled<D>>>);

struct Latest<V> {
    /// By key, with the time of its last use.
    of: BTreeMap<Key, (u64, V)>,
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

impl<V: Clone> Latest<V> {
    fn get(&mut self, key: &Key) -> Option<V> {
        self.clock += 1;
        let (used, value) = self.of.get_mut(key)?;
        *used = self.clock;
        Some(value.clone())
    }

    fn put(&mut self, key: Key, value: V) {
        self.clock += 1;
        self.of.insert(key, (self.clock, value));
        if self.of.len() > MOST {
            let oldest = self.of.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| self.of.remove(&key));
        }
    }
}

impl<D: Device> Default for Kept<D> {
    fn default() -> Self {
        Self(Mutex::new(Latest { of: BTreeMap::new(), clock: 0 }))
    }
}

impl<D: Device> Kept<D> {
    pub fn get(&self, key: &Key) -> Option<Compiled<D>> {
        self.lock().get(key)
    }

    /// Keeps one; the one used longest ago goes when there are too many.
    pub fn put(&self, key: Key, compiled: Compiled<D>) {
        self.lock().put(key, compiled);
    }

    /// Lets go of those that no plan uses: memory is short.
    pub fn let_go(&self) {
        self.lock().of.retain(|_, (_, (executable, _))| Arc::strong_count(executable) > 1);
    }

    fn lock(&self) -> MutexGuard<'_, Latest<Compiled<D>>> {
        // Every change above is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let mut latest = Latest { of: BTreeMap::new(), clock: 0 };
        let key = |i: usize| [i as u8; 32];
        (0..MOST).for_each(|i| latest.put(key(i), i));
        assert_eq!(latest.get(&key(0)), Some(0));
        latest.put(key(MOST), MOST);
        assert_eq!((latest.get(&key(0)), latest.get(&key(1))), (Some(0), None), "1 was used longest ago");
        // The same again takes no other's place.
        latest.put(key(2), 99);
        assert_eq!((latest.of.len(), latest.get(&key(2)), latest.get(&key(3))), (MOST, Some(99), Some(3)));
    }
}
