//! Finding a plug-in file and making sure it is the one that was meant.

use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::result::Api;
use crate::device::DeviceError;

/// Flags with which the CPU plug-in computes right: `XLA_FLAGS` of every process that loads it.
///
/// XNNPACK packs the weights of a matrix product once per address and takes them to be the same for ever after. Ours
/// are updated in place, so matrix products go to YNNPACK, as in JAX: see docs/decisions/0005.
/// Loops over 512 bits where there are registers for that made a step of a GPT 5 % faster than the default of 256.
pub const CPU_KERNELS: &str = "--xla_cpu_use_xnnpack=false --xla_cpu_experimental_ynn_fusion_type=individual_dot,reduce \
    --xla_cpu_prefer_vector_width=512";

/// Which plug-in to load.
#[derive(Clone, Debug, Default)]
pub struct PluginSpec {
    /// The file; searched for when absent.
    pub path: Option<PathBuf>,
    /// Lower-case hex; the file must have it before any of its code runs.
    pub sha256: Option<String>,
    /// Directories to search, in order.
    pub search: Vec<PathBuf>,
}

/// A plug-in file that exists and is the one that was meant.
#[derive(Clone, Debug)]
pub struct Plugin {
    path: PathBuf,
}

/// File names of the CPU plug-in, as its wheel and our script lay it down.
const CPU_NAMES: [&str; 2] = ["xla_cpu_pjrt.so", "xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so"];

impl PluginSpec {
    pub fn find(&self) -> Result<Plugin, DeviceError> {
        let path = match &self.path {
            Some(path) => path.clone(),
            None => self
                .search
                .iter()
                .flat_map(|d| CPU_NAMES.iter().map(move |n| d.join(n)))
                .find(|p| p.is_file())
                .ok_or_else(|| DeviceError::NoPlugin { searched: self.search.clone() })?,
        };
        let unreadable = |cause: std::io::Error| DeviceError::UnreadablePlugin { path: path.clone(), cause };
        let path = path.canonicalize().map_err(unreadable)?;
        if let Some(expected) = &self.sha256 {
            let found = sha256(&path).map_err(unreadable)?;
            if !found.eq_ignore_ascii_case(expected) {
                return Err(DeviceError::WrongPlugin { path, expected: expected.clone(), found });
            }
        }
        Ok(Plugin { path })
    }
}

impl Plugin {
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Loads the file and asks for its API version, without starting anything.
    pub fn version(&self) -> Result<(i32, i32), DeviceError> {
        Api::load(&self.path).map(|api| api.version)
    }
    /// Lower-case hex of the file.
    pub fn sha256(&self) -> std::io::Result<String> {
        sha256(&self.path)
    }
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
