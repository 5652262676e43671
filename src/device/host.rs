//! This machine's own limits, as the kernel tells them.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::units::Bytes;

/// Space an unprivileged process may still fill on the file system that holds `path`.
pub fn free_space(path: &Path) -> io::Result<Bytes> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    // SAFETY: the path ends in a zero, the struct is plain data that the kernel fills.
    unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        if libc::statvfs(path.as_ptr(), &mut stat) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Bytes(stat.f_bavail.saturating_mul(stat.f_frsize)))
    }
}
