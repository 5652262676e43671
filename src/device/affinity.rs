//! Cores: which ones this process may use, and pinning it to some of them.
#![allow(unsafe_code)]

use super::DeviceError;

/// Cores this process may run on, ascending; respects cpusets.
pub fn allowed() -> Vec<usize> {
    // SAFETY: an all-zero set is a value, and the kernel fills at most its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return vec![0];
        }
        (0..libc::CPU_SETSIZE as usize).filter(|&c| libc::CPU_ISSET(c, &set)).collect()
    }
}

/// Pins this process, and every thread it starts later, to `cores`.
pub fn pin(cores: &[usize]) -> Result<(), DeviceError> {
    pin_thread(0, cores).map_err(|source| DeviceError::Pin { cores: cores.to_vec(), source })
}

/// Pins every thread of a running process to `cores`, as far as it lets us: one that has ended needs no cores.
pub fn repin(pid: u32, cores: &[usize]) {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for thread in threads {
        if let Some(id) = thread.file_name().to_str().and_then(|t| t.parse().ok()) {
            let _ = pin_thread(id, cores);
        }
    }
}

/// Thread 0 is the calling one.
fn pin_thread(thread: libc::pid_t, cores: &[usize]) -> std::io::Result<()> {
    // SAFETY: an all-zero set is a value, the kernel reads its size; indices beyond the set are refused before they are
    // used.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for &core in cores {
            if core >= libc::CPU_SETSIZE as usize {
                return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput));
            }
            libc::CPU_SET(core, &mut set);
        }
        if libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &set) != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives other threads precedence over the calling one: it gets about a quarter of a core that they keep busy.
pub fn yield_to_others() {
    const NICE: libc::c_int = 5;
    // SAFETY: takes and returns plain numbers; on Linux 0 means the calling thread. Without the right to do so nothing
    // changes, and that is fine.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// Makes the kernel end this process when its parent does.
pub fn die_with_parent(parent: u32) -> Result<(), DeviceError> {
    // SAFETY: both calls take and return plain numbers.
    let (set, actual) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
    if set != 0 {
        return Err(DeviceError::Parent { source: std::io::Error::last_os_error() });
    }
    // The parent may have gone before the call.
    if actual as u32 != parent {
        return Err(DeviceError::Parent { source: std::io::Error::other("the parent is gone") });
    }
    Ok(())
}
