//! Bundles on disk.

use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::graph::{GraphError, Model};

/// Longest file of a bundle that is read into memory.
const MAX_FILE: u64 = 4 << 30;

/// Reads a bundle directory.
pub fn load(directory: &Path) -> Result<Model, GraphError> {
    load_named(directory).map(|(model, _)| model)
}

/// The same, and the SHA-256 of its manifest and graphs: equal digests mean equal ops.
pub fn load_named(directory: &Path) -> Result<(Model, String), GraphError> {
    let mut digest = Sha256::new();
    let model = Model::import(&mut |file| {
        let path = directory.join(file);
        let size = std::fs::metadata(&path)?.len();
        if size > MAX_FILE {
            return Err(io::Error::other(format!("{size} bytes, the limit is {MAX_FILE}")));
        }
        let bytes = std::fs::read(&path)?;
        digest.update(format!("{file} {}\n", bytes.len()));
        digest.update(&bytes);
        Ok(bytes)
    })?;
    Ok((model, hex(&digest.finalize())))
}

/// The name of a split bundle's ops, from that of the bundle: equal digests mean equal ops.
pub fn digest_of_split(bundle: &str, model: &Model) -> String {
    hex(&Sha256::digest(format!("{bundle} {}", model.fingerprint)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
