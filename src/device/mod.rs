//! Executing modules on accelerators: PJRT plug-ins, and what this machine offers.

pub mod affinity;
pub mod breadcrumb;
pub mod cache;
pub mod cuda;
pub mod heap;
pub mod inventory;
pub mod pjrt;

use std::path::PathBuf;

use crate::graph::ArrayShape;
use crate::graph::export::Alias;
use crate::units::Bytes;

/// What went wrong at the plug-in or the hardware.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(
        "no PJRT plug-in found (searched {}); get the CPU plug-in with scripts/get-pjrt-cpu.sh or name one with --plugin",
        list(searched)
    )]
    NoPlugin { searched: Vec<PathBuf> },
    #[error("cannot read plug-in {path}: {cause}")]
    UnreadablePlugin { path: PathBuf, cause: std::io::Error },
    #[error("plug-in {path} has sha256 {found}, expected {expected}; it is not the file that was meant")]
    WrongPlugin { path: PathBuf, expected: String, found: String },
    #[error("{path} is not a PJRT plug-in: {reason}")]
    NotAPlugin { path: PathBuf, reason: String },
    #[error("plug-in {path} speaks PJRT API {major}.{minor}, this build speaks 0.x; use a plug-in of that series")]
    ApiVersion { path: PathBuf, major: i32, minor: i32 },
    #[error("plug-in {path} (API {version}) lacks {entry}; use a newer plug-in")]
    MissingEntry { path: PathBuf, entry: &'static str, version: String },
    #[error("plug-in {path} sees no device")]
    NoDevice { path: PathBuf },
    #[error("{entry}: {message}")]
    Call { entry: &'static str, message: String },
    #[error("{shape} where {found} bytes were given")]
    Size { shape: String, found: u64 },
    #[error("cannot follow the parent process: {source}")]
    Parent { source: std::io::Error },
    #[error("cannot pin to cores {cores:?}: {source}")]
    Pin { cores: Vec<usize>, source: std::io::Error },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Memory the compiler reserves for one executable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExecutableMemory {
    pub arguments: Bytes,
    pub outputs: Bytes,
    /// Part of `outputs` that lies in donated arguments.
    pub aliased: Bytes,
    pub temporaries: Bytes,
    pub code: Bytes,
}

/// An argument of an execution.
pub enum Arg<'a, B> {
    /// Read; stays valid.
    Keep(&'a B),
    /// Consumed; its memory may become an output.
    Donate(B),
}

/// One device that compiles and runs HLO modules.
pub trait Device: Send + Sync + 'static {
    type Buffer: Send + Sync + 'static;
    type Executable: Send + Sync + 'static;

    /// Name and version of what executes, for logs and cache keys.
    fn platform(&self) -> &str;
    /// Kind of the hardware by the plug-in's word, for cache keys.
    fn kind(&self) -> &str;
    /// What the compiler is told beside the module, for cache keys.
    fn options(&self) -> &[u8];
    /// `hlo` is a verified `HloModuleProto` that carries `aliases`.
    fn compile(&self, name: &str, hlo: &[u8], aliases: &[Alias]) -> Result<Self::Executable, DeviceError>;
    /// The executable in the plug-in's own form, for [`Device::deserialize`] of the same plug-in on the same hardware.
    fn serialize(&self, executable: &Self::Executable) -> Result<Vec<u8>, DeviceError>;
    /// Loads what [`Device::serialize`] has returned. Plug-ins may abort the process on other bytes: check them first.
    fn deserialize(&self, name: &str, bytes: &[u8]) -> Result<Self::Executable, DeviceError>;
    fn memory(&self, executable: &Self::Executable) -> Result<ExecutableMemory, DeviceError>;
    /// Copies `data` (dense, row-major) to the device.
    fn upload(&self, shape: &ArrayShape, data: &[u8]) -> Result<Self::Buffer, DeviceError>;
    /// Starts an execution; the outputs may still be in the making when it returns.
    fn execute(
        &self,
        executable: &Self::Executable,
        args: Vec<Arg<'_, Self::Buffer>>,
    ) -> Result<Vec<Self::Buffer>, DeviceError>;
    /// Blocks until the buffer holds its value.
    fn wait(&self, buffer: &Self::Buffer) -> Result<(), DeviceError>;
    /// Blocks, then copies the value, dense and row-major, into `out`.
    fn download(&self, buffer: &Self::Buffer, out: &mut [u8]) -> Result<(), DeviceError>;
}
