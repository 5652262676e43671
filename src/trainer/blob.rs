//! Bytes that can be read at any place without being held in memory: a file, or a copy that moves to disk when it
//! grows too large for memory.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

/// Memory that all copies of one data set may take together; what has no room is on disk.
#[derive(Clone, Debug)]
pub struct Budget(Arc<AtomicU64>);

impl Budget {
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    fn take(&self, bytes: u64) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Bytes with positioned reads.
#[derive(Debug)]
pub struct Blob {
    place: Place,
    len: u64,
}

#[derive(Debug)]
enum Place {
    Memory {
        bytes: Vec<u8>,
        budget: Budget,
    },
    /// A file of the user's, or one without a name that vanishes with its handle.
    Disk(File),
}

impl Blob {
    /// A local file; nothing is read yet.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { place: Place::Disk(file), len })
    }

    /// An empty copy to write to.
    pub fn new(budget: &Budget) -> Self {
        Self { place: Place::Memory { bytes: Vec::new(), budget: budget.clone() }, len: 0 }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` with what stands at `at`.
    pub fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        match &self.place {
            Place::Memory { bytes, .. } => {
                let begin = usize::try_from(at).unwrap_or(usize::MAX);
                let found = bytes.get(begin..).and_then(|b| b.get(..out.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
                out.copy_from_slice(found);
                Ok(())
            }
            Place::Disk(file) => file.read_exact_at(out, at),
        }
    }

    /// The `length` bytes at `at`; memory is taken only for what is there.
    pub fn bytes(&self, at: u64, length: u64) -> io::Result<Bytes> {
        let there = at.checked_add(length).is_some_and(|end| end <= self.len);
        let mut out = vec![0; if there { length as usize } else { return Err(io::ErrorKind::UnexpectedEof.into()) }];
        self.read_at(at, &mut out)?;
        Ok(out.into())
    }

    /// Appends to a copy.
    pub fn append(&mut self, data: &[u8]) -> io::Result<()> {
        if let Place::Memory { bytes, budget } = &self.place
            && !budget.take(data.len() as u64)
        {
            let mut file = tempfile::tempfile()?;
            file.write_all(bytes)?;
            budget.give_back(self.len);
            self.place = Place::Disk(file);
        }
        match &mut self.place {
            Place::Memory { bytes, .. } => bytes.extend_from_slice(data),
            Place::Disk(file) => file.write_all_at(data, self.len)?,
        }
        self.len += data.len() as u64;
        Ok(())
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        if let Place::Memory { budget, .. } = &self.place {
            budget.give_back(self.len);
        }
    }
}

/// Reads a blob from one place on.
#[derive(Debug)]
pub struct Reading {
    blob: Arc<Blob>,
    at: u64,
}

impl Reading {
    pub fn new(blob: &Arc<Blob>, at: u64) -> Self {
        Self { blob: blob.clone(), at }
    }
}

impl Read for Reading {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.blob.len().saturating_sub(self.at).min(out.len() as u64) as usize;
        self.blob.read_at(self.at, &mut out[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}

/// A blob as the Parquet reader takes it.
#[derive(Clone, Debug)]
pub struct Chunks(pub Arc<Blob>);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Chunks {
    type T = io::BufReader<Reading>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(io::BufReader::new(Reading::new(&self.0, start)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        self.0.bytes(start, length as u64).map_err(|e| ParquetError::External(e.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_outgrows_the_budget_moves_to_disk_and_reads_the_same() {
        let budget = Budget::new(100);
        let mut small = Blob::new(&budget);
        let mut large = Blob::new(&budget);
        let data: Vec<u8> = (0..=255).collect();
        small.append(&data[..40]).unwrap();
        for part in data.chunks(25) {
            large.append(part).unwrap();
        }
        assert!(matches!(small.place, Place::Memory { .. }) && matches!(large.place, Place::Disk(_)));
        assert_eq!(large.bytes(20, 200).unwrap(), data[20..220]);
        assert_eq!(small.bytes(20, 20).unwrap(), data[20..40]);
        assert!(small.bytes(20, 21).is_err() && large.bytes(56, 201).is_err() && large.bytes(u64::MAX, 2).is_err());
        drop(small);
        assert!(budget.take(100), "what a copy took was given back");
    }
}
