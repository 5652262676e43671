//! Bundles on disk.

use std::io;
use std::path::Path;

use crate::graph::{GraphError, Model};

/// Longest file of a bundle that is read into memory.
const MAX_FILE: u64 = 4 << 30;

/// Reads a bundle directory.
pub fn load(directory: &Path) -> Result<Model, GraphError> {
    Model::import(&mut |file| {
        let path = directory.join(file);
        let size = std::fs::metadata(&path)?.len();
        if size > MAX_FILE {
            return Err(io::Error::other(format!("{size} bytes, the limit is {MAX_FILE}")));
        }
        std::fs::read(&path)
    })
}
