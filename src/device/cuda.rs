//! The CUDA driver and NCCL, loaded at run time through cudarc: one binary for machines with and without GPUs.
#![allow(unsafe_code)]

/// Whether the driver library can be loaded. cudarc panics on first use where it cannot.
pub fn driver_present() -> bool {
    // SAFETY: only looks for the library and loads it.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Version of the driver, such as `13.0`. Ask [`driver_present`] first.
pub fn driver_version() -> Result<String, String> {
    let mut version = 0;
    // SAFETY: the driver allows this call before it is initialised; `version` outlives it.
    let status = unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) };
    status.result().map_err(|e| format!("{e:?}"))?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// Whether NCCL can be loaded.
pub fn nccl_present() -> bool {
    // SAFETY: only looks for the library and loads it.
    unsafe { cudarc::nccl::sys::is_culib_present() }
}

/// Version of NCCL, such as `2.28.3`. Ask [`nccl_present`] first.
pub fn nccl_version() -> Result<String, String> {
    let n = cudarc::nccl::result::get_nccl_version().map_err(|e| format!("{e:?}"))?;
    Ok(format!("{}.{}.{}", n / 10000, n / 100 % 100, n % 100))
}
