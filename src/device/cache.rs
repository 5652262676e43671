//! Executables on disk: a module that this machine has compiled once is loaded instead of compiled again.
//!
//! An entry is found by a hash over everything that decides what a compiler yields: the module, the compile options,
//! the flags of the process, the plug-in's file, the kind of device, and on CPUs also the features of the host and the
//! cores this process may use at that time, for which XLA splits loops.
//!
//! # Guarantees
//! - A plug-in sees only bytes that it wrote itself: with a byte changed, the CPU plug-in loads it all the same or aborts.
//!   Each entry has a sha256, checked before.
//! - Nothing that goes wrong here fails a compilation; it is returned as [`Trouble`] for the log.
//! - Any number of processes may read and write at once; an entry is whole or not there.
//!
//! # Caveats
//! Whoever can write to the directory can run code in the processes that read it: it is made for its owner only, and
//! must not be shared with people who are not trusted.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::inventory::Cpu;
use super::{Device, DeviceError, affinity};
use crate::graph::export::Alias;
use crate::units::Bytes;

const MAGIC: &[u8; 8] = b"foreshex";
/// Counts when the file's format or the key's ingredients change.
const VERSION: u32 = 1;
/// Magic, version, key, length, checksum.
const HEAD: usize = 8 + 4 + 32 + 8 + 32;
const EXTENSION: &str = "executable";
const PART: &str = ".part-";
/// A file in the making that is older was left by a crash.
const STALE: Duration = Duration::from_secs(3600);

/// A directory of compiled executables, bounded in size.
pub struct ExecutableCache {
    directory: PathBuf,
    limit: Bytes,
    /// Hash of all that decides what a compiler yields, beside the module and the cores.
    origin: Sha256,
    /// XLA splits loops for the cores that the process may use when it compiles.
    for_cores: bool,
}

/// Where executables come from, beside what the device tells of itself.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// sha256 of the plug-in's file, or whatever else tells its builds apart; the platform's name may not.
    pub plugin: &'a str,
    /// Flags of the process that the plug-in reads (`XLA_FLAGS`).
    pub flags: &'a str,
}

/// An executable, compiled or loaded.
pub struct Cached<E> {
    pub executable: E,
    pub hit: bool,
    /// What is to be logged.
    pub trouble: Option<Trouble>,
}

/// What went wrong with an entry; the executable was compiled instead.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("removed {path} from the cache of executables: {problem}")]
    Damaged { path: PathBuf, problem: String },
    #[error("removed {path} from the cache of executables: the plug-in refuses it: {source}")]
    Refused { path: PathBuf, source: DeviceError },
    #[error("cannot keep {name} in the cache of executables: the plug-in cannot serialize it: {source}")]
    NotSerialized { name: String, source: DeviceError },
    #[error("cannot keep {path} in the cache of executables: {source}")]
    NotStored { path: PathBuf, source: io::Error },
}

impl ExecutableCache {
    /// Opens a directory, which is made when it is not there. Entries used longest ago go when all take more than
    /// `limit`.
    pub fn open<D: Device>(directory: &Path, limit: Bytes, device: &D, origin: Origin<'_>) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let for_cores = device.platform().starts_with("cpu");
        let mut hash = Sha256::new();
        let mut add = |part: &[u8]| {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        };
        add(&VERSION.to_le_bytes());
        add(device.platform().as_bytes());
        add(device.kind().as_bytes());
        add(device.options());
        add(origin.plugin.as_bytes());
        // White space between flags has no meaning; their order has.
        for flag in origin.flags.split_whitespace() {
            add(flag.as_bytes());
        }
        if for_cores {
            add(Cpu::features().as_bytes());
        }
        Ok(Self { directory: directory.to_owned(), limit, origin: hash, for_cores })
    }

    /// Loads an executable, or compiles and keeps it. The arguments are those of [`Device::compile`].
    pub fn compile<D: Device>(
        &self,
        device: &D,
        name: &str,
        hlo: &[u8],
        aliases: &[Alias],
    ) -> Result<Cached<D::Executable>, DeviceError> {
        let key = self.key(hlo);
        let path = self.path(&key);
        let mut trouble = match load(&path, &key) {
            Ok(None) => None,
            Ok(Some(bytes)) => match device.deserialize(name, &bytes) {
                Ok(executable) => {
                    touch(&path);
                    return Ok(Cached { executable, hit: true, trouble: None });
                }
                Err(source) => Some(Trouble::Refused { path: path.clone(), source }),
            },
            Err(problem) => Some(Trouble::Damaged { path: path.clone(), problem }),
        };
        if trouble.is_some() {
            let _ = fs::remove_file(&path);
        }
        let executable = device.compile(name, hlo, aliases)?;
        match device.serialize(&executable) {
            Ok(bytes) => {
                let stored = self.store(&path, &key, &bytes).err();
                trouble = trouble.or(stored.map(|source| Trouble::NotStored { path, source }));
            }
            Err(source) => trouble = trouble.or(Some(Trouble::NotSerialized { name: name.to_owned(), source })),
        }
        Ok(Cached { executable, hit: false, trouble })
    }

    fn key(&self, hlo: &[u8]) -> [u8; 32] {
        // A running process may be given other cores.
        let n_cores = if self.for_cores { affinity::allowed().len() as u64 } else { 0 };
        self.origin.clone().chain_update(n_cores.to_le_bytes()).chain_update(hlo).finalize().into()
    }

    fn path(&self, key: &[u8; 32]) -> PathBuf {
        let hex: String = key.iter().map(|b| format!("{b:02x}")).collect();
        self.directory.join(hex).with_extension(EXTENSION)
    }

    /// Writes an entry beside its place and moves it there. Not synced: what a power cut leaves has a wrong checksum.
    fn store(&self, path: &Path, key: &[u8; 32], bytes: &[u8]) -> io::Result<()> {
        let size = (HEAD + bytes.len()) as u64;
        if size > self.limit.0 {
            return Err(io::Error::other(format!("{}, the limit of the cache is {}", Bytes(size), self.limit)));
        }
        let mut file = tempfile::Builder::new().prefix(PART).tempfile_in(&self.directory)?;
        file.write_all(MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(key)?;
        file.write_all(&(bytes.len() as u64).to_le_bytes())?;
        file.write_all(&Sha256::digest(bytes))?;
        file.write_all(bytes)?;
        file.persist(path).map_err(|e| e.error)?;
        self.evict()
    }

    /// Removes what was used longest ago until the rest fits, and what crashed writers left. Entries that others
    /// remove at the same time are gone either way.
    fn evict(&self) -> io::Result<()> {
        let now = SystemTime::now();
        let mut entries = Vec::new();
        let mut total = 0;
        for entry in fs::read_dir(&self.directory)?.flatten() {
            let (path, Ok(about)) = (entry.path(), entry.metadata()) else { continue };
            let used = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            if path.extension().is_some_and(|e| e == EXTENSION) {
                total += about.len();
                entries.push((used, about.len(), path));
            } else if entry.file_name().to_string_lossy().starts_with(PART)
                && now.duration_since(used).is_ok_and(|age| age > STALE)
            {
                let _ = fs::remove_file(path);
            }
        }
        entries.sort();
        for (_, size, path) in entries {
            if total <= self.limit.0 {
                break;
            }
            let _ = fs::remove_file(path);
            total -= size;
        }
        Ok(())
    }
}

/// The bytes of an entry; `None` when there is none, an error when it is not what was written.
fn load(path: &Path, key: &[u8; 32]) -> Result<Option<Vec<u8>>, String> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let mut head = [0; HEAD];
    file.read_exact(&mut head).map_err(|e| format!("cut short: {e}"))?;
    let (magic, rest) = head.split_at(MAGIC.len());
    let (version, rest) = rest.split_at(4);
    let (of, rest) = rest.split_at(32);
    let (length, checksum) = rest.split_at(8);
    if magic != MAGIC || version != VERSION.to_le_bytes() {
        return Err("not an entry of this version".to_owned());
    }
    if of != key {
        return Err("the entry of another module".to_owned());
    }
    let expected = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let found = file.metadata().map_err(|e| e.to_string())?.len().saturating_sub(HEAD as u64);
    if found != expected {
        return Err(format!("has {found} bytes, expected {expected}"));
    }
    let mut bytes = vec![0; expected as usize];
    file.read_exact(&mut bytes).map_err(|e| format!("cut short: {e}"))?;
    if Sha256::digest(&bytes)[..] != *checksum {
        return Err("its content has changed".to_owned());
    }
    Ok(Some(bytes))
}

/// Marks an entry as used now. One that stays old goes earlier, nothing else.
fn touch(path: &Path) {
    let _ = File::options().append(true).open(path).and_then(|f| f.set_modified(SystemTime::now()));
}
