//! Unpacking a tar archive that may have been made to do harm.
//!
//! # Guarantees
//! Only files and directories are made, all of them below the directory given, none of them over another. No more is
//! written than allowed, and no more than one long header is held in memory.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use tar::EntryType;

use super::{FetchError, write};

/// Entries of one archive: a bundle holds a few dozen files.
const ENTRIES: u64 = 100_000;
/// Bytes of what describes one entry: long names stand in headers of their own.
const HEADER: u64 = 1 << 20;
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Unpacks into a directory; `from` is named in errors. Returns the number of files.
pub fn unpack(archive: &mut File, into: &Path, limit: u64, from: &str) -> Result<u64, FetchError> {
    let not_tar = |e: io::Error| FetchError::NotTar { url: from.to_owned(), why: e.to_string() };
    let mut start = Vec::new();
    archive.by_ref().take(GZIP.len() as u64).read_to_end(&mut start).map_err(not_tar)?;
    archive.rewind().map_err(not_tar)?;
    let plain = BufReader::new(archive);
    let bytes: Box<dyn Read + '_> =
        if start == GZIP { Box::new(flate2::bufread::MultiGzDecoder::new(plain)) } else { Box::new(plain) };
    let allowed = Rc::new(Cell::new(HEADER));
    let mut archive = tar::Archive::new(Bounded { bytes, allowed: allowed.clone() });
    let mut entries = archive.entries().map_err(not_tar)?;
    let (mut n_entries, mut n_files, mut left) = (0, 0, limit);
    loop {
        allowed.set(HEADER);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(not_tar)?;
        n_entries += 1;
        if n_entries > ENTRIES {
            return Err(FetchError::TooMany { url: from.to_owned(), limit: ENTRIES });
        }
        left = left
            .checked_sub(entry.size())
            .ok_or_else(|| FetchError::UnpacksTooLarge { url: from.to_owned(), limit })?;
        allowed.set(entry.size());
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let refused = |why: &str| FetchError::Entry { url: from.to_owned(), entry: name.clone(), why: why.to_owned() };
        let kind = entry.header().entry_type();
        // Remarks on the archive as a whole, as `git archive` makes them.
        if kind == EntryType::XGlobalHeader {
            io::copy(&mut entry, &mut io::sink()).map_err(not_tar)?;
            continue;
        }
        let path = below(&entry.path().map_err(not_tar)?).ok_or_else(|| refused("leads out of its directory"))?;
        let to = into.join(path);
        // One entry in the place of another.
        let taken = |path: &Path, e: io::Error| match e.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => refused("stands in it more than once"),
            _ => write(path, e),
        };
        match kind {
            EntryType::Directory => fs::create_dir_all(&to).map_err(|e| taken(&to, e))?,
            EntryType::Regular | EntryType::Continuous => {
                let parent = to.parent().unwrap_or(into);
                fs::create_dir_all(parent).map_err(|e| taken(parent, e))?;
                let mut file = File::create_new(&to).map_err(|e| taken(&to, e))?;
                copy(&mut entry, &mut file, &to, not_tar)?;
                n_files += 1;
            }
            EntryType::Link | EntryType::Symlink => return Err(refused("is a link")),
            _ => return Err(refused("is neither a file nor a directory")),
        }
    }
    if n_files == 0 {
        let why = "there is no file in it".to_owned();
        return Err(FetchError::NotTar { url: from.to_owned(), why });
    }
    Ok(n_files)
}

/// The path without detours, or `None` where it could lead out of the directory it is joined to.
fn below(path: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(clean)
}

/// A full disk and a damaged archive are told apart.
fn copy(
    from: &mut impl Read,
    to: &mut impl io::Write,
    path: &Path,
    damaged: impl Fn(io::Error) -> FetchError,
) -> Result<(), FetchError> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer).map_err(&damaged)? {
            0 => return Ok(()),
            n => to.write_all(&buffer[..n]).map_err(|source| write(path, source))?,
        }
    }
}

/// Reads no further than is allowed: a header that claims to be long takes no memory.
struct Bounded<R> {
    bytes: R,
    allowed: Rc<Cell<u64>>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.allowed.get()).unwrap_or(usize::MAX).min(out.len());
        if most == 0 && !out.is_empty() {
            return Err(io::Error::other(format!("a header of more than {HEADER} bytes")));
        }
        let n = self.bytes.read(&mut out[..most])?;
        self.allowed.set(self.allowed.get() - n as u64);
        Ok(n)
    }
}
