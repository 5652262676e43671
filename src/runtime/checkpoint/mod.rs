//! Checkpoints: the whole training state on disk, readable without Foreshard and by any number of shards.
//!
//! ```text
//! DIR/step-00000100/index.json             where training stands, and where every tensor lies
//!                   shard-0.safetensors    the state tensors one worker owns
//!                   shard-1.safetensors
//! DIR/.lock                                held while a checkpoint is written or removed
//! ```
//!
//! # Expected flow
//! The parent begins a [`Draft`], a hidden directory beside the checkpoints. Each worker writes the state it owns with
//! [`write_shard`] and hands the parent a [`ShardEntry`]. [`Draft::commit`] checks that every state tensor is there
//! exactly once, writes the index last, makes all of it durable and renames the directory. [`Checkpoint::open`] finds
//! the newest usable one; [`Checkpoint::read`] yields one state tensor at a time, so that any plan can resume from it,
//! also one that splits other tensors or splits them otherwise.
//!
//! # Guarantees
//! - A checkpoint has its name only when it is complete and on disk. A crash at any moment leaves the ones before it as
//!   they were; what it left half-done is ignored by readers and removed by the next writer.
//! - No byte reaches the training state unchecked: every piece has a checksum of its own, the index has one too.
//! - A checkpoint of another model is refused, whatever the shapes.
//!
//! # Caveats
//! Checksums are crc32: they are there for torn writes and bad disks, and run at the speed of the disk. They do not
//! stop someone who can write to the directory; a cryptographic hash beside the data would not either.

mod export;
mod index;
mod read;
mod retain;
mod write;

use std::path::PathBuf;

pub use index::{FORMAT, FORMAT_PARTS, FileEntry, INDEX, Index, Kind, ModelId, PartEntry, PieceEntry, TensorEntry};
pub use read::{Checkpoint, Depth, Found, list, runs};
pub use retain::{Candidate, Keep, expired, prune};
pub use write::{Draft, Milestone, ShardEntry, ShardPiece, states_of, write_shard};

/// What is wrong with a checkpoint's files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{file} is missing")]
    Missing { file: String },
    #[error("{file} cannot be read: {problem}")]
    Unreadable { file: String, problem: String },
    #[error("{file} has {found} bytes, expected {expected}; it was cut short or written to")]
    Length { file: String, expected: u64, found: u64 },
    #[error("{file} has crc32 {found:08x}, expected {expected:08x}; its content has changed")]
    Checksum { file: String, expected: u32, found: u32 },
    #[error("tensor {tensor:?} in {file} has crc32 {found:08x}, expected {expected:08x}; its content has changed")]
    Tensor { tensor: String, file: String, expected: u32, found: u32 },
    #[error("{file} is not what the index says: {problem}")]
    Header { file: String, problem: String },
}

/// Why a checkpoint cannot be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(
        "no checkpoint in {path}: it has neither {INDEX} nor step-*, nor checkpoints/ with some, nor run-* that have"
    )]
    Nothing { path: PathBuf },
    #[error("no usable checkpoint in {path}; the newest one")]
    NoneUsable {
        path: PathBuf,
        #[source]
        newest: Box<CheckpointError>,
    },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {problem}")]
    Index { path: PathBuf, problem: String },
    #[error(
        "{path} has format {found:?}, written by foreshard {foreshard}; this build reads {FORMAT:?} and {FORMAT_PARTS:?}, use that version"
    )]
    Format { path: PathBuf, found: String, foreshard: String },
    #[error("checkpoint {path} is broken: {fault}")]
    Broken { path: PathBuf, fault: Fault },
    #[error(
        "checkpoint {path} is of model {name:?} (fingerprint {found}), this model has fingerprint {expected}; to start another model from its weights, export them with `foreshard checkpoint export`"
    )]
    OtherModel { path: PathBuf, name: String, found: String, expected: String },
    #[error("cannot write {path}; is the disk full?")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("another process writes checkpoints to {directory}; give each run a directory of its own")]
    Busy { directory: PathBuf },
    #[error("{path} is there already, of another run: {difference}; give each run a directory of its own")]
    Taken { path: PathBuf, difference: String },
    #[error("no shard has written state tensor {tensor:?}{}", more(*n_more))]
    Incomplete { tensor: String, n_more: usize },
    #[error("state tensor {tensor:?} is in {first} and in {second}; exactly one shard owns it")]
    Twice { tensor: String, first: String, second: String },
    #[error("shard file {file}: {problem}")]
    Shard { file: String, problem: String },
    #[error("state tensor {tensor:?} has {expected} bytes, {found} were given")]
    Size { tensor: String, expected: u64, found: u64 },
    #[error("slot {name:?} has the name of a param; export without --slots")]
    SameName { name: String },
}

fn more(n: usize) -> String {
    if n == 0 { String::new() } else { format!(", and {n} more") }
}

/// Directory of the checkpoint before `step`.
fn directory_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The inverse of [`directory_name`]; `None` for what is no checkpoint.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (directory_name(step) == name).then_some(step)
}
