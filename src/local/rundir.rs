//! The directory of a run: made before anything else, filled as training goes on.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::LocalError;
use crate::device::host;
use crate::units::Bytes;

/// Room for logs and pictures beside the weights.
const MARGIN: Bytes = Bytes(16 << 20);

#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Makes `asked`, or the next free `runs/<job>-<n>`.
    pub fn create(asked: Option<&Path>, job: &str) -> Result<Self, LocalError> {
        let path = match asked {
            Some(path) => {
                fs::create_dir_all(path).map_err(at(path))?;
                if fs::read_dir(path).map_err(at(path))?.next().is_some() {
                    return Err(LocalError::NotEmpty { path: path.to_owned() });
                }
                path.to_owned()
            }
            None => next_free(Path::new("runs"), job)?,
        };
        let path = path.canonicalize().map_err(at(&path))?;
        // Permissions and read-only file systems show at a write, and only there.
        let probe = path.join(".probe");
        fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe)).map_err(at(&path))?;
        Ok(Self { path })
    }

    /// Refuses a file system without room for `weights`. The file is written beside the old one before it takes its
    /// name, but there is no old one in a new directory.
    pub fn check_space(&self, weights: Bytes) -> Result<(), LocalError> {
        let needs = weights + MARGIN;
        // A file system that does not tell is given the benefit of the doubt.
        match host::free_space(&self.path) {
            Ok(has) if has < needs => Err(LocalError::NoSpace { path: self.path.clone(), needs, has }),
            _ => Ok(()),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a whole file: beside its place, then renamed, so that it is there in full or not at all.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<(), LocalError> {
        let path = self.file(name);
        let beside = self.file(&format!(".{name}.part"));
        let written = fs::write(&beside, content).and_then(|()| fs::rename(&beside, &path));
        written.map_err(|source| {
            let _ = fs::remove_file(&beside);
            LocalError::Write { path, source }
        })
    }

    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), LocalError> {
        let mut json = serde_json::to_vec_pretty(value).expect("records are plain data");
        json.push(b'\n');
        self.write(name, json)
    }

    /// A file of JSON lines.
    pub fn lines(&self, name: &str) -> Result<JsonLines, LocalError> {
        let path = self.file(name);
        let file = File::create_new(&path).map_err(at(&path))?;
        Ok(JsonLines { path, file: BufWriter::new(file) })
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> LocalError {
    let path = path.to_owned();
    move |source| LocalError::Write { path: path.clone(), source }
}

fn next_free(parent: &Path, job: &str) -> Result<PathBuf, LocalError> {
    fs::create_dir_all(parent).map_err(at(parent))?;
    let number = |name: &str| name.strip_prefix(job)?.strip_prefix('-')?.parse::<u64>().ok();
    let taken = fs::read_dir(parent).map_err(at(parent))?;
    let last = taken.flatten().filter_map(|e| number(e.file_name().to_str()?)).max();
    let mut n = last.unwrap_or(0).saturating_add(1);
    loop {
        let path = parent.join(format!("{job}-{n}"));
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            // Another run was faster.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => n += 1,
            Err(e) => return Err(at(&path)(e)),
        }
    }
}

/// JSON lines, each complete on disk before the next step's: `tail -f` and a killed parent see whole lines.
pub struct JsonLines {
    path: PathBuf,
    file: BufWriter<File>,
}

impl JsonLines {
    pub fn append(&mut self, value: &impl Serialize) -> Result<(), LocalError> {
        let mut line = serde_json::to_vec(value).expect("records are plain data");
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(at(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_runs_of_a_job() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["a-1", "a-7", "a-b-9", "b-20", "a-x"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        assert_eq!(next_free(parent.path(), "a").unwrap(), parent.path().join("a-8"));
        assert_eq!(next_free(parent.path(), "a").unwrap(), parent.path().join("a-9"));
        assert_eq!(next_free(parent.path(), "c").unwrap(), parent.path().join("c-1"));
    }

    #[test]
    fn refuses_directories_with_something_in_them() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("new");
        RunDir::create(Some(&path), "a").unwrap().write("job.yaml", "x").unwrap();
        let e = RunDir::create(Some(&path), "a").unwrap_err().to_string();
        assert!(e.contains("not empty"), "{e}");
    }

    #[test]
    fn refuses_weights_that_do_not_fit() {
        let parent = tempfile::tempdir().unwrap();
        let run = RunDir::create(Some(parent.path()), "a").unwrap();
        run.check_space(Bytes(1)).unwrap();
        let e = run.check_space(Bytes(1 << 60)).unwrap_err().to_string();
        assert!(e.contains("the weights need 1024.0 PiB"), "{e}");
    }
}
