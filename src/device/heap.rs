//! How the C library's allocator keeps memory that the plug-in frees and takes again in every step.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Keeps what is freed for the next step, in one arena. Call before the plug-in starts its threads.
///
/// By glibc's defaults large tensors are mapped and unmapped each time, and the kernel clears their pages anew; and every
/// thread keeps an arena, while tensors are made by one thread and freed by another. See docs/decisions/0010.
pub fn keep() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns plain numbers; a value that is refused changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        const NEVER: libc::c_int = -1;
        libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
    }
}

/// How often [`tidy`] was called.
static TIDIED: AtomicU64 = AtomicU64::new(0);

/// To be called after work that does not repeat, such as compiling: gives back to the system what is kept.
pub fn tidy() {
    trim();
    TIDIED.fetch_add(1, Ordering::Relaxed);
}

fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns plain numbers.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Keeps a process below a size, as far as free memory is what it grows by.
///
/// Tensors of many sizes leave holes in the heap that the next ones do not fit into: in a few steps it grows to two or
/// three times what is alive, and by how much differs from run to run.
pub struct Ceiling {
    statm: Option<File>,
    page: u64,
    /// As it was made.
    first_at: u64,
    at: u64,
    /// What the last time left; what is alive is not to be given back.
    left: u64,
    /// The fewest resident bytes with which it was settled.
    least: Option<u64>,
    /// [`TIDIED`] when it was last settled.
    tidied: Option<u64>,
}

impl Ceiling {
    /// Growth that is worth looking for free memory again.
    const LEAST: u64 = 4 << 20;

    /// `at`: the most resident bytes.
    pub fn new(at: u64) -> Self {
        // SAFETY: takes and returns plain numbers.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let (statm, page) = (File::open("/proc/self/statm").ok(), page.try_into().unwrap_or(4096));
        Self { statm, page, first_at: at, at, left: 0, least: None, tidied: None }
    }

    /// To be called at the start of every step, when only what lasts is alive.
    ///
    /// Work that does not repeat leaves something behind, such as the executables of a plan for later. It is nothing that
    /// steps grew by: the ceiling is raised by as much, or all they free would be given back and taken again for ever.
    pub fn settle(&mut self) {
        let tidied = Some(TIDIED.load(Ordering::Relaxed));
        if self.tidied == tidied {
            return;
        }
        trim();
        let resident = self.resident();
        let least = self.least.map_or(resident, |least| least.min(resident));
        self.at = self.first_at.saturating_add(resident - least);
        self.least = Some(least);
        (self.left, self.tidied) = (0, tidied);
    }

    /// To be called before work that takes up to `need` bytes.
    pub fn make_room(&mut self, need: u64) {
        let resident = self.resident();
        if resident.saturating_add(need) <= self.at {
            self.left = 0;
        } else if resident > self.left + Self::LEAST {
            trim();
            self.left = self.resident();
        }
    }

    /// Bytes; 0 where the system does not say.
    fn resident(&self) -> u64 {
        let mut text = [0; 64];
        let n = self.statm.as_ref().and_then(|f| f.read_at(&mut text, 0).ok()).unwrap_or(0);
        let pages = std::str::from_utf8(&text[..n]).ok().and_then(|t| t.split(' ').nth(1)?.parse::<u64>().ok());
        pages.unwrap_or(0).saturating_mul(self.page)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// Both tests look at the memory of the whole process.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn free_memory_is_given_back_before_the_ceiling_is_passed() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // 256 MiB, for other tests grow meanwhile: in pieces below the size that is mapped by itself, some of which stay.
        let full: Vec<Vec<u8>> = (0..16384).map(|_| vec![1; 16 << 10]).collect();
        let mut ceiling = Ceiling::new(0);
        let before = ceiling.resident();
        let stay: Vec<Vec<u8>> = full.into_iter().step_by(256).collect();
        ceiling.make_room(0);
        assert!(ceiling.left + (128 << 20) < before, "{} of {before} stayed", ceiling.left);
        assert_eq!(stay.len(), 64);
    }

    #[test]
    fn what_other_work_leaves_behind_raises_the_ceiling() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ceiling = Ceiling::new(1 << 40);
        ceiling.settle();
        assert_eq!(ceiling.at, 1 << 40);
        let behind = vec![1u8; 256 << 20];
        ceiling.settle();
        assert_eq!(ceiling.at, 1 << 40, "steps may not grow");
        tidy();
        ceiling.settle();
        // Other tests take and free a little meanwhile.
        let raised = ceiling.at - (1 << 40);
        assert!((128 << 20..512 << 20).contains(&raised), "raised by {raised}");
        drop(behind);
        tidy();
        ceiling.settle();
        assert!(ceiling.at < (1 << 40) + raised, "and falls when it is gone");
    }
}
