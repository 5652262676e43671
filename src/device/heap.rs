//! How the C library's allocator keeps memory that the plug-in frees and takes again in every step.
#![allow(unsafe_code)]

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

/// Gives back to the system what is kept: after work that does not repeat, such as compiling.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns plain numbers.
    unsafe {
        libc::malloc_trim(0);
    }
}
