//! PJRT calls that return `Result`: one function makes every call.

use std::ffi::c_char;
use std::path::{Path, PathBuf};

use super::sys::{ApiHead, Args, Error, ErrorDestroy, ErrorMessage};
use crate::device::DeviceError;

/// Major version of the API this binding is written for.
pub const MAJOR: i32 = 0;

/// A loaded plug-in. It stays loaded for the life of the process: plug-ins start threads that never end.
pub struct Api {
    head: *const ApiHead,
    path: PathBuf,
    pub version: (i32, i32),
}

// SAFETY: `PJRT_Api` is an immutable table of function pointers, and the API allows calls from any thread.
unsafe impl Send for Api {}
// SAFETY: as above.
unsafe impl Sync for Api {}

impl Api {
    /// Loads a plug-in and checks its version.
    pub fn load(path: &Path) -> Result<Self, DeviceError> {
        let failed = |reason: String| DeviceError::NotAPlugin { path: path.to_owned(), reason };
        // SAFETY: loading runs the library's initialisers; the user has named this file as a plug-in, and its hash was
        // checked where one was given.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| {
            let cause = std::error::Error::source(&e).map_or(String::new(), |c| format!(": {c}"));
            failed(format!("{e}{cause}"))
        })?;
        let head = {
            // SAFETY: the symbol has this type in every PJRT plug-in.
            let symbol = unsafe { library.get::<unsafe extern "C" fn() -> *const ApiHead>(b"GetPjrtApi\0") };
            let get = symbol.map_err(|_| failed("it has no function GetPjrtApi".to_owned()))?;
            // SAFETY: takes nothing, returns a pointer to a static table.
            unsafe { get() }
        };
        std::mem::forget(library);
        if head.is_null() {
            return Err(failed("GetPjrtApi returned nothing".to_owned()));
        }
        // SAFETY: not null, and the head of the table has not changed since version 0.1.
        let version = unsafe { ((*head).version.major, (*head).version.minor) };
        if version.0 != MAJOR {
            return Err(DeviceError::ApiVersion { path: path.to_owned(), major: version.0, minor: version.1 });
        }
        Ok(Self { head, path: path.to_owned(), version })
    }

    fn entry<A: Args>(&self) -> Option<unsafe extern "C" fn(*mut A) -> *mut Error> {
        let offset = size_of::<ApiHead>() + A::INDEX * size_of::<usize>();
        // SAFETY: the table is `struct_size` bytes long; we read inside it, and a null pointer becomes `None`.
        unsafe {
            if offset + size_of::<usize>() > (*self.head).struct_size {
                return None;
            }
            self.head.cast::<u8>().add(offset).cast::<Option<unsafe extern "C" fn(*mut A) -> *mut Error>>().read()
        }
    }

    /// Makes a call; turns the error object into ours.
    ///
    /// # Safety
    /// The pointers in `args` must be valid for this entry.
    pub unsafe fn call<A: Args>(&self, args: &mut A) -> Result<(), DeviceError> {
        let entry = self.entry::<A>().ok_or_else(|| DeviceError::MissingEntry {
            path: self.path.clone(),
            entry: A::NAME,
            version: format!("{}.{}", self.version.0, self.version.1),
        })?;
        // SAFETY: the args struct is the one of this entry, zeroed behind its known fields; its pointers are the
        // caller's promise.
        let error = unsafe { entry(args) };
        if error.is_null() {
            return Ok(());
        }
        Err(DeviceError::Call { entry: A::NAME, message: self.take_message(error) })
    }

    fn take_message(&self, error: *mut Error) -> String {
        let mut ask = ErrorMessage { error, ..ErrorMessage::default() };
        let mut destroy = ErrorDestroy { error, ..ErrorDestroy::default() };
        let (Some(message), Some(free)) = (self.entry::<ErrorMessage>(), self.entry::<ErrorDestroy>()) else {
            return "unknown error".to_owned();
        };
        // SAFETY: the error object is alive until it is destroyed below; both entries take just it.
        unsafe {
            message(&mut ask);
            let text = text(ask.message, ask.message_size);
            free(&mut destroy);
            text
        }
    }
}

/// # Safety
/// `data` must be null or point to `size` readable bytes.
pub unsafe fn text(data: *const c_char, size: usize) -> String {
    if data.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(data.cast(), size) }).into_owned()
}
