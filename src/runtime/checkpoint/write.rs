//! Writing: each worker its shard file, the parent the index.

use std::borrow::Cow;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::index::{
    FORMAT, FORMAT_PARTS, FileEntry, INDEX, Index, Kind, ModelId, PartEntry, PieceEntry, TensorEntry, is_plain,
    piece_names,
};
use super::read::{Checkpoint, Depth};
use super::{CheckpointError, directory_name};
use crate::graph::Model;
use crate::plan::{Place, ShardId};
use crate::runtime::tensor_file::{Layout, parent, sync_directory};
use crate::runtime::weights::described;
use crate::wire::Position;

/// Where training stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Milestone {
    /// The next step to run.
    pub step: u64,
    /// Steps of the whole job.
    pub of: u64,
    /// Where its batch begins in the data.
    pub position: Position,
    pub seed: u64,
    /// Of the plan in force.
    pub revision: u64,
    /// Rows of its microbatches.
    pub microbatch: u64,
}

/// A shard file, as its writer describes it to the writer of the index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Name inside the checkpoint.
    pub file: String,
    pub bytes: u64,
    pub crc32: u32,
    pub pieces: Vec<ShardPiece>,
}

/// One state tensor of a shard file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardPiece {
    /// Index in `Model::state`.
    pub state: usize,
    /// First byte in the file.
    pub begin: u64,
    pub crc32: u32,
}

/// State tensors that a shard writes: those it owns, and on the first shard those that every shard keeps. All replicas
/// hold the same; only the first one writes.
pub fn states_of(owners: &[Place], shard: ShardId) -> Vec<usize> {
    let writer = |place: Place| match place {
        Place::Shard(owner) => owner,
        Place::Everywhere => ShardId(0),
    };
    (0..owners.len()).filter(|&i| writer(owners[i]) == shard).collect()
}

/// Writes a worker's state tensors to a new file and makes it durable. `bytes` is called once per state tensor, in the
/// order of the file; only one tensor is in memory at a time when it yields owned bytes.
///
/// # Errors
/// What `bytes` fails with, or a [`CheckpointError`]; nothing is left of the file then.
pub fn write_shard<'a, E: From<CheckpointError>>(
    model: &Model,
    path: &Path,
    states: &[usize],
    bytes: &mut dyn FnMut(usize) -> Result<Cow<'a, [u8]>, E>,
) -> Result<ShardEntry, E> {
    let written = write_file(model, path, states, bytes);
    if written.is_err() {
        // A full disk needs the room; the draft goes as a whole anyway.
        let _ = fs::remove_file(path);
    }
    written
}

fn write_file<'a, E: From<CheckpointError>>(
    model: &Model,
    path: &Path,
    states: &[usize],
    bytes: &mut dyn FnMut(usize) -> Result<Cow<'a, [u8]>, E>,
) -> Result<ShardEntry, E> {
    let failed = |source| E::from(CheckpointError::Write { path: path.to_owned(), source });
    let names = piece_names(model);
    let tensors: Vec<_> = states
        .iter()
        .map(|&i| {
            let shape = &model.state[i].shape;
            (names[i].clone(), shape.dtype, shape.dims.clone())
        })
        .collect();
    let layout = Layout::new(&tensors).map_err(failed)?;
    let file = File::options().write(true).create_new(true).open(path).map_err(failed)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut whole = crc32fast::Hasher::new();
    whole.update(&layout.head);
    file.write_all(&layout.head).map_err(failed)?;
    let mut checksums = vec![0; states.len()];
    for &i in &layout.order {
        let (tensor, expected) = (&model.state[states[i]].name, model.state[states[i]].shape.bytes().0);
        let data = bytes(states[i])?;
        if data.len() as u64 != expected {
            let found = data.len() as u64;
            return Err(CheckpointError::Size { tensor: tensor.clone(), expected, found }.into());
        }
        let mut own = crc32fast::Hasher::new();
        own.update(&data);
        whole.combine(&own);
        checksums[i] = own.finalize();
        file.write_all(&data).map_err(failed)?;
    }
    let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    let pieces = states
        .iter()
        .zip(layout.begins)
        .zip(checksums)
        .map(|((&state, begin), crc32)| ShardPiece { state, begin, crc32 })
        .collect();
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(ShardEntry { file: name, bytes: layout.bytes, crc32: whole.finalize(), pieces })
}

/// Hidden names of what is not yet or no longer a checkpoint.
const DRAFT: &str = ".draft-";
const REMOVED: &str = ".removed-";

/// Held by whoever writes or removes checkpoints of a directory.
pub(super) struct Lock {
    directory: PathBuf,
    /// `None` where the file system knows no locks.
    file: Option<File>,
}

impl Lock {
    pub(super) fn take(directory: &Path) -> Result<Self, CheckpointError> {
        let path = directory.join(".lock");
        let failed = |source| CheckpointError::Write { path: path.clone(), source };
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        let file = match file.try_lock() {
            Ok(()) => Some(file),
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::Busy { directory: directory.to_owned() }),
            Err(TryLockError::Error(_)) => None,
        };
        Ok(Self { directory: directory.to_owned(), file })
    }

    /// Removes what crashed writers left. Without a lock nobody can tell whose it is, and it stays.
    fn sweep(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries.filter(|_| self.file.is_some()) {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(DRAFT) || name.starts_with(REMOVED) {
                // What cannot be removed costs room, nothing else.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Takes a checkpoint away: out of sight at once, then off the disk.
    pub(super) fn remove(&self, path: &Path) -> Result<(), CheckpointError> {
        let failed = |source| CheckpointError::Write { path: path.to_owned(), source };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let hidden = self.directory.join(format!("{REMOVED}{name}"));
        // Left by a crash in the middle of this.
        if hidden.exists() {
            fs::remove_dir_all(&hidden).map_err(failed)?;
        }
        fs::rename(path, &hidden).map_err(failed)?;
        fs::remove_dir_all(&hidden).map_err(failed)
    }
}

/// A checkpoint in the making; removed when dropped.
pub struct Draft {
    hidden: TempDir,
    lock: Lock,
}

impl Draft {
    /// Makes a hidden directory for shard files in a directory of checkpoints, which is made when it is not there, and
    /// removes what crashed writers have left.
    ///
    /// # Errors
    /// `Busy` while another draft in this directory is alive, in whatever process.
    pub fn begin(directory: &Path) -> Result<Self, CheckpointError> {
        let failed = |source| CheckpointError::Write { path: directory.to_owned(), source };
        fs::create_dir_all(directory).and_then(|()| sync_directory(parent(directory))).map_err(failed)?;
        let lock = Lock::take(directory)?;
        lock.sweep();
        let hidden = tempfile::Builder::new()
            .prefix(DRAFT)
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(directory)
            .map_err(failed)?;
        Ok(Self { hidden, lock })
    }

    /// The file that worker `rank` writes.
    pub fn shard(&self, rank: u32) -> PathBuf {
        self.hidden.path().join(format!("shard-{rank}.safetensors"))
    }

    /// Makes the checkpoint visible as `step-…` and durable, and returns its path.
    ///
    /// A usable checkpoint of this step that is there already, of the same model, seed and position, stays instead: a
    /// run that repeats a step comes to the same state, and replacing it would leave a moment without either. A broken
    /// one is replaced.
    ///
    /// # Errors
    /// `Incomplete`, `Twice` or `Shard` when the entries are not the model's whole state; `Taken` when the step's name
    /// belongs to another run. Nothing is visible then.
    pub fn commit(
        self,
        model: &Model,
        milestone: &Milestone,
        shards: &[ShardEntry],
    ) -> Result<PathBuf, CheckpointError> {
        let index = make_index(model, milestone, shards)?;
        for FileEntry { name, bytes, .. } in &index.files {
            let problem = |problem: String| CheckpointError::Shard { file: name.clone(), problem };
            let found = fs::metadata(self.hidden.path().join(name)).map_err(|e| problem(e.to_string()))?.len();
            if found != *bytes {
                return Err(problem(format!("has {found} bytes, its worker wrote {bytes}")));
            }
        }
        let path = self.hidden.path().join(INDEX);
        index.check().map_err(|problem| CheckpointError::Index { path: path.clone(), problem })?;
        let write = || -> io::Result<()> {
            let mut file = File::create_new(&path)?;
            file.write_all(index.encode().as_bytes())?;
            file.sync_all()?;
            sync_directory(self.hidden.path())
        };
        write().map_err(|source| CheckpointError::Write { path: path.clone(), source })?;

        let directory = self.lock.directory.clone();
        let target = directory.join(directory_name(milestone.step));
        let failed = |source| CheckpointError::Write { path: target.clone(), source };
        if target.symlink_metadata().is_ok() {
            match Checkpoint::open(&target, Depth::Checksums) {
                Ok(found) => {
                    return match difference(found.checkpoint.index(), &index) {
                        None => Ok(target),
                        Some(difference) => Err(CheckpointError::Taken { path: target, difference }),
                    };
                }
                Err(CheckpointError::Format { found, .. }) => {
                    return Err(CheckpointError::Taken { path: target, difference: format!("format {found:?}") });
                }
                Err(_) => self.lock.remove(&target)?,
            }
        }
        fs::rename(self.hidden.path(), &target).map_err(failed)?;
        // There is nothing left under the hidden name.
        let _ = self.hidden.keep();
        sync_directory(&directory).map_err(failed)?;
        Ok(target)
    }
}

/// What tells two checkpoints of one step apart.
fn difference(there: &Index, here: &Index) -> Option<String> {
    if there.model != here.model {
        return Some(format!("model {:?} (fingerprint {})", there.model.name, there.model.fingerprint));
    }
    if there.seed != here.seed {
        return Some(format!("seed {}", there.seed));
    }
    let Position { epoch, sample } = there.position;
    (there.position != here.position).then(|| format!("at sample {sample} of epoch {epoch}"))
}

fn make_index(model: &Model, milestone: &Milestone, shards: &[ShardEntry]) -> Result<Index, CheckpointError> {
    // By state tensor: file, position of its first byte, checksum.
    let mut places: Vec<Option<(usize, &ShardPiece)>> = vec![None; model.state.len()];
    for (file, shard) in shards.iter().enumerate() {
        let problem = |problem: &str| CheckpointError::Shard { file: shard.file.clone(), problem: problem.to_owned() };
        if !is_plain(&shard.file) || shards[..file].iter().any(|s| s.file == shard.file) {
            return Err(problem("is not the name of one shard file"));
        }
        for piece in &shard.pieces {
            let place = places.get_mut(piece.state).ok_or_else(|| problem("has a tensor that is not in the model"))?;
            let bytes = model.state[piece.state].shape.bytes().0;
            if piece.begin.checked_add(bytes).is_none_or(|end| end > shard.bytes) {
                return Err(problem("has a tensor that ends behind it"));
            }
            if let Some((first, _)) = place.replace((file, piece)) {
                let tensor = model.state[piece.state].name.clone();
                let first = shards[first].file.clone();
                return Err(CheckpointError::Twice { tensor, first, second: shard.file.clone() });
            }
        }
    }
    let mut missing = places.iter().enumerate().filter(|(_, p)| p.is_none()).map(|(i, _)| i);
    if let Some(first) = missing.next() {
        return Err(CheckpointError::Incomplete { tensor: model.state[first].name.clone(), n_more: missing.count() });
    }
    let n_params = model.manifest.params.len();
    let mut tensors: Vec<TensorEntry> = (0..n_params + model.manifest.slots.len())
        .map(|i| {
            let (name, dtype, shape) = described(&model.manifest, i);
            let kind = if i < n_params { Kind::Param } else { Kind::Slot };
            TensorEntry { name: name.to_owned(), kind, dtype, shape: shape.to_vec(), pieces: Vec::new() }
        })
        .collect();
    let names = piece_names(model);
    for ((state, name), place) in model.state.iter().zip(names).zip(places) {
        let (file, &ShardPiece { begin, crc32, .. }) = place.expect("none is missing");
        let rows = state.rows.as_ref().map(|r| (r.start, r.end));
        let part = state.part.as_ref();
        let part = part.map(|p| PartEntry { axis: p.axis, from: p.range.start, to: p.range.end });
        tensors[state.tensor].pieces.push(PieceEntry { name, rows, part, file, begin, crc32 });
    }
    let files = shards.iter().map(|s| FileEntry { name: s.file.clone(), bytes: s.bytes, crc32: s.crc32 }).collect();
    Ok(Index {
        format: if model.state.iter().any(|t| t.part.is_some()) { FORMAT_PARTS } else { FORMAT }.to_owned(),
        foreshard: env!("CARGO_PKG_VERSION").to_owned(),
        model: ModelId { name: model.manifest.name.clone(), fingerprint: model.origin.clone() },
        step: milestone.step,
        of: Some(milestone.of),
        position: milestone.position,
        seed: milestone.seed,
        revision: milestone.revision,
        microbatch: Some(milestone.microbatch),
        files,
        tensors,
    })
}
