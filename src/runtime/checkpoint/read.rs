//! Reading: the newest usable checkpoint, one state tensor at a time.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::index::{INDEX, Index, Malformed, PieceEntry, TensorEntry};
use super::{CheckpointError, Fault, directory_name, step_of};
use crate::graph::Model;
use crate::graph::region::copy_overlap;
use crate::runtime::tensor_file::Header;

/// Longest index read.
const MAX_INDEX: u64 = 1 << 30;

/// A checkpoint whose index is in order.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    index: Index,
}

/// How much of a checkpoint is looked at before it counts as usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The index, and the length of every file.
    Lengths,
    /// Every byte.
    Checksums,
}

/// The newest usable checkpoint, and why newer ones are not.
#[derive(Debug)]
pub struct Found {
    pub checkpoint: Checkpoint,
    pub skipped: Vec<CheckpointError>,
}

impl Checkpoint {
    /// Opens a checkpoint, or the newest usable one of a directory of checkpoints, of a run or of all runs of a job.
    ///
    /// # Errors
    /// A checkpoint named by the user must be usable itself; `NoneUsable` says what is wrong with the newest one.
    pub fn open(path: &Path, depth: Depth) -> Result<Found, CheckpointError> {
        if is_checkpoint(path) {
            let checkpoint = Self::load(path)?;
            checkpoint.usable(depth)?;
            return Ok(Found { checkpoint, skipped: Vec::new() });
        }
        let mut skipped = Vec::new();
        for (_, path) in list(path)?.into_iter().rev() {
            match Self::load(&path).and_then(|c| c.usable(depth).map(|()| c)) {
                Ok(checkpoint) => return Ok(Found { checkpoint, skipped }),
                Err(e) => skipped.push(e),
            }
        }
        let newest = skipped.into_iter().next().map(Box::new);
        Err(match newest {
            Some(newest) => CheckpointError::NoneUsable { path: path.to_owned(), newest },
            None => CheckpointError::Nothing { path: path.to_owned() },
        })
    }

    /// Reads the index of one checkpoint; its files may be broken.
    pub fn load(path: &Path) -> Result<Self, CheckpointError> {
        let file = path.join(INDEX);
        let unreadable = |source| CheckpointError::Read { path: file.clone(), source };
        let mut bytes = Vec::new();
        let opened = File::open(&file).map_err(unreadable)?;
        opened.take(MAX_INDEX).read_to_end(&mut bytes).map_err(unreadable)?;
        let index = Index::decode(&bytes).map_err(|e| match e {
            Malformed::Format { found, foreshard } => CheckpointError::Format { path: file.clone(), found, foreshard },
            Malformed::Problem(problem) => CheckpointError::Index { path: file.clone(), problem },
        })?;
        let named = path.file_name().and_then(|n| step_of(&n.to_string_lossy()));
        match named {
            Some(step) if step != index.step => {
                let problem = format!("is of step {}, its directory is called {}", index.step, directory_name(step));
                Err(CheckpointError::Index { path: file, problem })
            }
            _ => Ok(Self { path: path.to_owned(), index }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// All that is wrong with its files.
    pub fn faults(&self, depth: Depth) -> Vec<Fault> {
        let mut faults = Vec::new();
        for at in 0..self.index.files.len() {
            match self.file(at) {
                Err(fault) => faults.push(fault),
                Ok(file) if depth == Depth::Checksums => self.verify(at, &file, &mut faults),
                Ok(_) => {}
            }
        }
        faults
    }

    fn usable(&self, depth: Depth) -> Result<(), CheckpointError> {
        let fault = self.faults(depth).into_iter().next();
        fault.map_or(Ok(()), |fault| Err(CheckpointError::Broken { path: self.path.clone(), fault }))
    }

    /// A shard file, when it has its length.
    fn file(&self, at: usize) -> Result<File, Fault> {
        let entry = &self.index.files[at];
        let unreadable = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => Fault::Missing { file: entry.name.clone() },
            _ => Fault::Unreadable { file: entry.name.clone(), problem: e.to_string() },
        };
        let file = File::open(self.path.join(&entry.name)).map_err(unreadable)?;
        let found = file.metadata().map_err(unreadable)?.len();
        if found != entry.bytes {
            return Err(Fault::Length { file: entry.name.clone(), expected: entry.bytes, found });
        }
        Ok(file)
    }

    /// Reads a whole shard file once.
    fn verify(&self, at: usize, file: &File, faults: &mut Vec<Fault>) {
        let entry = &self.index.files[at];
        let in_file = |t: &TensorEntry| t.pieces.iter().filter(move |p| p.file == at).cloned().collect::<Vec<_>>();
        let mut pieces: Vec<(u64, u64, PieceEntry)> = Vec::new();
        let header = Header::read(file).map_err(|problem| Fault::Header { file: entry.name.clone(), problem });
        let header = header.map_err(|fault| faults.push(fault)).ok();
        for tensor in &self.index.tensors {
            for piece in in_file(tensor) {
                let shape = tensor.piece_shape(&piece);
                let found = header.as_ref().map(|h| h.find(&piece.name, shape.dtype, &shape.dims));
                let problem = match found {
                    None => None,
                    Some(Ok(Some(begin))) if begin == piece.begin => None,
                    Some(Ok(Some(begin))) => {
                        Some(format!("tensor {:?} begins at byte {begin}, not {}", piece.name, piece.begin))
                    }
                    Some(Ok(None)) => Some(format!("it has no tensor {:?}", piece.name)),
                    Some(Err(problem)) => Some(problem),
                };
                faults.extend(problem.map(|problem| Fault::Header { file: entry.name.clone(), problem }));
                pieces.push((piece.begin, piece.begin + shape.bytes().0, piece));
            }
        }
        pieces.sort_by_key(|p| (p.0, p.1));
        let mut whole = crc32fast::Hasher::new();
        let mut at = 0;
        let mut read = || -> io::Result<()> {
            for (begin, end, piece) in &pieces {
                whole.combine(&checksum(file, at, *begin)?);
                let own = checksum(file, *begin, *end)?;
                whole.combine(&own);
                let found = own.finalize();
                if found != piece.crc32 {
                    let (tensor, file) = (piece.name.clone(), entry.name.clone());
                    faults.push(Fault::Tensor { tensor, file, expected: piece.crc32, found });
                }
                at = *end;
            }
            whole.combine(&checksum(file, at, entry.bytes)?);
            Ok(())
        };
        if let Err(e) = read() {
            faults.push(Fault::Unreadable { file: entry.name.clone(), problem: e.to_string() });
            return;
        }
        let found = whole.finalize();
        if found != entry.crc32 {
            faults.push(Fault::Checksum { file: entry.name.clone(), expected: entry.crc32, found });
        }
    }

    /// An error when this is a checkpoint of another model.
    pub fn fits(&self, model: &Model) -> Result<(), CheckpointError> {
        let id = &self.index.model;
        if id.fingerprint == model.origin {
            return Ok(());
        }
        Err(CheckpointError::OtherModel {
            path: self.path.clone(),
            name: id.name.clone(),
            found: id.fingerprint.clone(),
            expected: model.origin.clone(),
        })
    }

    /// Bytes of one state tensor, checked. It may have been written in other pieces: those that hold some of it are read
    /// one after the other.
    pub fn read(&self, model: &Model, state: usize) -> Result<Vec<u8>, CheckpointError> {
        self.fits(model)?;
        let wanted = &model.state[state];
        let region = wanted.region(&model.manifest);
        let dims = model.manifest.dims(wanted.tensor);
        let tensor = self.index.tensors.get(wanted.tensor);
        let Some(tensor) = tensor.filter(|t| t.shape == dims && t.dtype == wanted.shape.dtype) else {
            let problem = format!("has no state tensor {:?} of shape {}", wanted.name, wanted.shape);
            return Err(CheckpointError::Index { path: self.path.join(INDEX), problem });
        };
        let piece = |piece: &PieceEntry| {
            let data = self.piece(tensor, piece);
            data.map_err(|fault| CheckpointError::Broken { path: self.path.clone(), fault })
        };
        if let Some(same) = tensor.pieces.iter().find(|p| tensor.region(p) == region) {
            return piece(same);
        }
        let mut data = vec![0; wanted.shape.bytes().0 as usize];
        for other in &tensor.pieces {
            let of = tensor.region(other);
            if of.overlap(&region).is_some() {
                copy_overlap(&piece(other)?, &of, &mut data, &region, tensor.dtype.size() as usize);
            }
        }
        Ok(data)
    }

    /// Bytes of one piece, checked.
    pub(super) fn piece(&self, tensor: &TensorEntry, piece: &PieceEntry) -> Result<Vec<u8>, Fault> {
        let file = self.file(piece.file)?;
        let name = || self.index.files[piece.file].name.clone();
        let mut data = vec![0; tensor.piece_shape(piece).bytes().0 as usize];
        file.read_exact_at(&mut data, piece.begin)
            .map_err(|e| Fault::Unreadable { file: name(), problem: e.to_string() })?;
        let found = crc32fast::hash(&data);
        if found != piece.crc32 {
            let (tensor, expected) = (piece.name.clone(), piece.crc32);
            return Err(Fault::Tensor { tensor, file: name(), expected, found });
        }
        Ok(data)
    }
}

/// Checksum of a range of bytes.
fn checksum(file: &File, from: u64, to: u64) -> io::Result<crc32fast::Hasher> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; (to.saturating_sub(from)).min(1 << 20) as usize];
    let mut at = from;
    while at < to {
        let n = (to - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..n], at)?;
        hasher.update(&buffer[..n]);
        at += n as u64;
    }
    Ok(hasher)
}

/// Whether a path is meant to be one checkpoint: it has an index, or the name of one.
fn is_checkpoint(path: &Path) -> bool {
    let named = || path.file_name().is_some_and(|n| step_of(&n.to_string_lossy()).is_some());
    path.join(INDEX).exists() || named()
}

/// Checkpoints below a directory, usable or not, by ascending step: (step, path). A run directory's are in
/// `checkpoints/`; those of the runs of a job come run by run; a checkpoint lists itself.
pub fn list(path: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    if is_checkpoint(path) {
        let step = path.file_name().and_then(|n| step_of(&n.to_string_lossy()));
        let step = step.or_else(|| Some(Checkpoint::load(path).ok()?.index.step)).unwrap_or(0);
        return Ok(vec![(step, path.to_owned())]);
    }
    let found = steps_in(path)?;
    if !found.is_empty() {
        return Ok(found);
    }
    let inner = path.join("checkpoints");
    if inner.is_dir() {
        return list(&inner);
    }
    let mut all = Vec::new();
    for (_, run) in runs(path)? {
        let checkpoints = run.join("checkpoints");
        if checkpoints.is_dir() {
            all.append(&mut steps_in(&checkpoints)?);
        }
    }
    if all.is_empty() { Err(CheckpointError::Nothing { path: path.to_owned() }) } else { Ok(all) }
}

/// Runs of a job, `run-1` and so on, by number.
pub fn runs(path: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut runs = Vec::new();
    for (name, path) in entries(path)? {
        let number = name.strip_prefix("run-").and_then(|n| n.parse().ok());
        runs.extend(number.map(|n: u64| (n, path)));
    }
    runs.sort();
    Ok(runs)
}

/// What a directory of checkpoints holds, by ascending step.
pub(super) fn steps_in(path: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let found = entries(path)?.into_iter().filter_map(|(name, path)| Some((step_of(&name)?, path)));
    let mut found: Vec<_> = found.collect();
    found.sort();
    Ok(found)
}

/// Name and path of everything in a directory.
fn entries(path: &Path) -> Result<Vec<(String, PathBuf)>, CheckpointError> {
    let unreadable = |source| CheckpointError::Read { path: path.to_owned(), source };
    let named = |entry: fs::DirEntry| (entry.file_name().to_string_lossy().into_owned(), entry.path());
    let all: io::Result<Vec<_>> = fs::read_dir(path).map_err(unreadable)?.map(|entry| entry.map(named)).collect();
    all.map_err(unreadable)
}
