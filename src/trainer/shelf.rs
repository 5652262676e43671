//! The files of a data set: local or in an object store, packed or not.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, ObjectStoreExt};
use url::Url;

use super::DataError;
use super::blob::{Blob, Budget, Reading};

/// A packed file may become so much larger; text and numbers pack ten or a hundred times smaller, a decompression bomb
/// a thousand times.
const MAX_UNPACKED: u64 = 256;
/// Small files may unpack to this much whatever their ratio.
const UNPACKED_ANYWAY: u64 = 64 << 20;
const PACKED: &str = ".gz";

/// All files under one path or URL.
pub struct Shelf {
    /// By name.
    pub files: Vec<DataFile>,
    store: Arc<dyn ObjectStore>,
    runtime: tokio::runtime::Runtime,
    budget: Budget,
}

#[derive(Clone, Debug)]
pub struct DataFile {
    pub name: String,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Local(PathBuf),
    Remote(object_store::path::Path),
}

impl DataFile {
    /// Lower case, without `.gz`.
    pub fn extension(&self) -> Option<String> {
        let name = self.name.to_ascii_lowercase();
        let name = name.strip_suffix(PACKED).unwrap_or(&name);
        Path::new(name).extension().map(|e| e.to_string_lossy().into_owned())
    }
}

impl Shelf {
    /// Lists a file, a directory, or whatever an object store has under a prefix.
    pub fn find(uri: &str, settings: &[(String, String)], budget: &Budget) -> Result<Self, DataError> {
        let problem = |p: String| DataError::file(uri, p);
        let url = match Url::parse(uri) {
            Ok(url) if url.scheme().len() > 1 => url,
            _ => {
                let path = Path::new(uri).canonicalize().map_err(|e| problem(e.to_string()))?;
                Url::from_file_path(&path).map_err(|()| problem("not a path that can be read".to_owned()))?
            }
        };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| problem(e.to_string()))?;
        let options = settings.iter().map(|(k, v)| (k.to_ascii_lowercase(), v.clone()));
        let (store, path) = object_store::parse_url_opts(&url, options).map_err(|e| problem(e.to_string()))?;
        let store: Arc<dyn ObjectStore> = Arc::from(store);
        let local = (url.scheme() == "file").then(LocalFileSystem::new);
        let mut found = runtime.block_on(async {
            match store.head(&path).await {
                Ok(meta) => Ok(vec![meta]),
                Err(e) if local.is_some() || matches!(e, object_store::Error::NotFound { .. }) => {
                    store.list(Some(&path)).try_collect().await.map_err(|e| problem(e.to_string()))
                }
                Err(e) => Err(problem(e.to_string())),
            }
        })?;
        found.sort_by(|a, b| a.location.cmp(&b.location));
        if found.is_empty() {
            return Err(problem("nothing is there".to_owned()));
        }
        let file = |meta: object_store::ObjectMeta| match &local {
            Some(disk) => {
                let path = disk.path_to_filesystem(&meta.location).map_err(|e| problem(e.to_string()))?;
                Ok(DataFile { name: path.display().to_string(), place: Place::Local(path) })
            }
            None => Ok(DataFile { name: meta.location.to_string(), place: Place::Remote(meta.location) }),
        };
        let files = found.into_iter().map(file).collect::<Result<_, _>>()?;
        Ok(Self { files, store, runtime, budget: budget.clone() })
    }

    /// Opens a local file, fetches a remote one, unpacks what is packed.
    pub fn open(&self, file: &DataFile) -> Result<Arc<Blob>, DataError> {
        let problem = |e: io::Error| DataError::file(&file.name, copying(&e));
        let blob = match &file.place {
            Place::Local(path) => Blob::open(path).map_err(problem)?,
            Place::Remote(location) => self.runtime.block_on(async {
                let remote = |e: object_store::Error| DataError::file(&file.name, e.to_string());
                let mut parts = self.store.get(location).await.map_err(remote)?.into_stream();
                let mut copy = Blob::new(&self.budget);
                while let Some(part) = parts.try_next().await.map_err(remote)? {
                    copy.append(&part).map_err(problem)?;
                }
                Ok(copy)
            })?,
        };
        let blob = Arc::new(blob);
        if !file.name.to_ascii_lowercase().ends_with(PACKED) {
            return Ok(blob);
        }
        unpack(&blob, &self.budget).map(Arc::new).map_err(|p| DataError::file(&file.name, p))
    }
}

/// What to do about an error while a copy is written.
pub fn copying(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("no room for a working copy: {e}; set TMPDIR to a larger disk")
        }
        _ => e.to_string(),
    }
}

fn unpack(packed: &Arc<Blob>, budget: &Budget) -> Result<Blob, String> {
    let limit = packed.len().saturating_mul(MAX_UNPACKED).max(UNPACKED_ANYWAY);
    let mut reader = flate2::read::MultiGzDecoder::new(io::BufReader::new(Reading::new(packed, 0)));
    let mut copy = Blob::new(budget);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(0) => return Ok(copy),
            Ok(n) => n,
            Err(e) => return Err(format!("cannot be unpacked after {} bytes: {e}", copy.len())),
        };
        if copy.len() + n as u64 > limit {
            return Err(format!(
                "{} bytes unpack to more than {limit}, as a decompression bomb does; if that is meant, unpack it \
                 yourself",
                packed.len()
            ));
        }
        copy.append(&buffer[..n]).map_err(|e| copying(&e))?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gz(data: &[u8]) -> Arc<Blob> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        packed.write_all(data).unwrap();
        let mut blob = Blob::new(&Budget::new(1 << 20));
        blob.append(&packed.finish().unwrap()).unwrap();
        Arc::new(blob)
    }

    #[test]
    fn a_decompression_bomb_is_refused_and_what_it_unpacked_is_given_back() {
        let budget = Budget::new(1 << 20);
        let bomb = gz(&vec![0; 80 << 20]);
        let e = unpack(&bomb, &budget).unwrap_err();
        assert!(e.contains("decompression bomb"), "{e}");
        let text = b"all the world's a stage".repeat(1000);
        let unpacked = unpack(&gz(&text), &budget).unwrap();
        assert_eq!(unpacked.bytes(0, unpacked.len()).unwrap(), text);
    }
}
