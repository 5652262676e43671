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
    let failed = |source| DeviceError::Pin { cores: cores.to_vec(), source };
    // SAFETY: as above; indices beyond the set are refused before they are used.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for &core in cores {
            if core >= libc::CPU_SETSIZE as usize {
                return Err(failed(std::io::Error::from(std::io::ErrorKind::InvalidInput)));
            }
            libc::CPU_SET(core, &mut set);
        }
        if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) != 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
    }
    Ok(())
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
