//! Archives that are fetched over HTTP(S) or from S3 before a job begins, such as a bundle in an object store.
//!
//! # Guarantees
//! Nothing is unpacked before the digest of the whole archive is right. What is written lies in its own directory, and is
//! no larger than its manifest allows. A directory that is marked as complete is complete.
//!
//! # Caveats
//! A fetch that was cut off begins anew; whoever called tries again.

mod get;
mod s3;
#[cfg(test)]
mod tests;
mod unpack;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::api::{Archive, Volume};

/// File with the digest of the archive that a directory was made from, written last.
const MARK: &str = ".sha256";

/// Why an archive is not there. No text holds a query: that of a presigned URL is a secret.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{0}")]
    Limit(String),
    #[error("url: {url:?} is no URL: {why}")]
    NotUrl { url: String, why: String },
    #[error("url: HTTP cannot be spoken here: {0}; an image needs the certificates of authorities (ca-certificates)")]
    NoClient(String),
    #[error(
        "url: {url}: no request can be signed: {why}; credentials has to give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )]
    NotSigned { url: String, why: String },
    #[error("url: {url}: {why}")]
    Unreachable { url: String, why: String },
    #[error("url: {url} answered {status}; {hint}")]
    Status { url: String, status: String, hint: &'static str },
    #[error("url: {url} ended after {found} of {expected} bytes; it is cut short there or on the way")]
    CutShort { url: String, found: u64, expected: u64 },
    #[error("url: {url} is larger than {limit} bytes; raise sizeLimit if that is meant")]
    TooLarge { url: String, limit: u64 },
    #[error(
        "sha256: {url} ({bytes} bytes) has {found}, the manifest says {expected}; what lies there is not what was meant, \
         or sha256 is not that of the archive as `sha256sum` prints it"
    )]
    OtherDigest { url: String, bytes: u64, found: String, expected: String },
    #[error("{url} is no tar archive, plain or packed by gzip: {why}")]
    NotTar { url: String, why: String },
    #[error("{url} holds {entry:?}, which {why}; archives hold files and directories below their own directory")]
    Entry { url: String, entry: String, why: String },
    #[error("{url} unpacks to more than {limit} bytes; raise sizeLimit if that is meant")]
    UnpacksTooLarge { url: String, limit: u64 },
    #[error("{url} holds more than {limit} entries; put them into fewer files")]
    TooMany { url: String, limit: u64 },
    #[error("{path} holds the archive {found}, the manifest says {expected}; remove it, and the other is fetched")]
    OtherThere { path: PathBuf, found: String, expected: String },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
}

impl FetchError {
    /// Whether another try cannot help: the manifest or the archive has to change.
    pub fn is_permanent(&self) -> bool {
        !matches!(
            self,
            FetchError::NoClient(_)
                // The secret may be corrected.
                | FetchError::NotSigned { .. }
                | FetchError::Unreachable { .. }
                // A URL may be renewed while a job waits, and what it names may yet come.
                | FetchError::Status { .. }
                | FetchError::CutShort { .. }
                | FetchError::Write { .. }
        )
    }
}

/// An error, and the field it came with.
#[derive(Debug, thiserror::Error)]
#[error("spec.volumes[{volume}].archive")]
pub struct Failed {
    pub volume: String,
    pub source: FetchError,
}

/// What was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub volume: String,
    /// Of the archive.
    pub bytes: u64,
    pub files: u64,
}

/// What an object store wants to see, under the names that cloud tools use (`AWS_ACCESS_KEY_ID`); others are ignored.
pub type Settings = Vec<(String, String)>;

/// Fetches every archive whose directory is not there. A directory without our mark is the user's own, and taken as it is.
pub fn missing(volumes: &[Volume], under: &Path, settings: &Settings) -> Result<Vec<Fetched>, Failed> {
    each(volumes, |_, volume, archive| {
        let to = under.join(&volume.name);
        if to.exists() {
            return match mark(&to) {
                Some(found) if found != archive.sha256 => {
                    Err(FetchError::OtherThere { path: to, found, expected: archive.sha256.clone() })
                }
                _ => Ok(None),
            };
        }
        let made = tempfile::Builder::new().prefix(".fetch-").tempdir_in(under);
        let made = made.map_err(|source| FetchError::Write { path: under.to_owned(), source })?;
        let fetched = one(archive, made.path(), settings)?;
        readable(made.path()).and_then(|()| fs::rename(made.path(), &to)).map_err(|source| write(&to, source))?;
        Ok(Some(fetched))
    })
}

/// Fills directories that stand ready, one for each archive; what an earlier try left there goes. `settings`: of a volume, by
/// its place among all.
pub fn fill(volumes: &[Volume], under: &Path, settings: impl Fn(usize) -> Settings) -> Result<Vec<Fetched>, Failed> {
    each(volumes, |i, volume, archive| {
        let to = under.join(&volume.name);
        if mark(&to).is_some_and(|found| found == archive.sha256) {
            return Ok(None);
        }
        clear(&to).map_err(|source| write(&to, source))?;
        one(archive, &to, &settings(i)).map(Some)
    })
}

/// `fetch` says how many bytes and files came, if any did.
fn each(
    volumes: &[Volume],
    fetch: impl Fn(usize, &Volume, &Archive) -> Result<Option<(u64, u64)>, FetchError>,
) -> Result<Vec<Fetched>, Failed> {
    let mut all = Vec::new();
    for (i, volume) in volumes.iter().enumerate() {
        let Some(archive) = &volume.archive else { continue };
        let name = volume.name.clone();
        let fetched = fetch(i, volume, archive).map_err(|source| Failed { volume: name.clone(), source })?;
        all.extend(fetched.map(|(bytes, files)| Fetched { volume: name, bytes, files }));
    }
    Ok(all)
}

/// Fetches one archive into an empty directory: (its bytes, files in it).
fn one(archive: &Archive, into: &Path, settings: &Settings) -> Result<(u64, u64), FetchError> {
    let limit = archive.limit().map_err(FetchError::Limit)?;
    // A file without a name, where there has to be room anyway.
    let mut file = tempfile::tempfile_in(into).map_err(|source| write(into, source))?;
    let shown = get::shown(&archive.url);
    let bytes = get::get(archive, settings, limit, &mut file)?;
    let files = unpack::unpack(&mut file, into, limit, &shown)?;
    let path = into.join(MARK);
    fs::write(&path, &archive.sha256).map_err(|source| write(&path, source))?;
    Ok((bytes, files))
}

fn write(path: &Path, source: io::Error) -> FetchError {
    FetchError::Write { path: path.to_owned(), source }
}

fn mark(directory: &Path) -> Option<String> {
    fs::read_to_string(directory.join(MARK)).ok().map(|text| text.trim().to_owned())
}

/// Directories for a moment are nobody else's; this one stays.
fn readable(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Empties a directory that is to stay, such as a mount.
fn clear(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
