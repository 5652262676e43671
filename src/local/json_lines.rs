//! Files of one JSON value per line, as far as they can be read: a run that was cut off leaves half a line.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use serde::de::DeserializeOwned;

/// What was read of a file, and what not.
#[derive(Debug, Default)]
pub struct Reading {
    /// Lines that were taken.
    pub n_good: u64,
    /// Lines that say nothing.
    pub n_bad: u64,
    /// Position of the last good line, from 1.
    pub last_good: u64,
    /// Position of the first bad line, and what is wrong with it.
    first_bad: Option<(u64, String)>,
    /// The file ends with a bad line.
    cut_short: bool,
    /// Why the file could not be read, or not further.
    failed: Option<String>,
}

impl Reading {
    /// What is missing, in a sentence; `None` when all was read.
    pub fn fault(&self, name: &str) -> Option<String> {
        if let Some(why) = &self.failed {
            return Some(format!("{name}: {why}"));
        }
        let (line, why) = self.first_bad.as_ref()?;
        Some(match (self.n_bad, self.cut_short) {
            (1, true) => {
                format!("{name} is cut short in line {line} ({why}); the last good line is {}", self.last_good)
            }
            (1, false) => format!("{name}: line {line} cannot be read ({why})"),
            (n, _) => format!(
                "{name}: {n} lines cannot be read, the first is line {line} ({why}); the last good line is {}",
                self.last_good
            ),
        })
    }
}

/// Hands every line that can be read to `take`, which refuses what makes no sense.
pub fn each<T: DeserializeOwned>(path: &Path, mut take: impl FnMut(T) -> Result<(), String>) -> Reading {
    each_line(path, |line| {
        let value = serde_json::from_slice(line);
        take(value.map_err(|e| e.to_string().replace(" at line 1 column ", " at column "))?)
    })
}

/// The same, without reading anything into the lines.
pub fn each_line(path: &Path, mut take: impl FnMut(&[u8]) -> Result<(), String>) -> Reading {
    let mut reading = Reading::default();
    let mut file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            reading.failed = Some("there is none".to_owned());
            return reading;
        }
        Err(e) => {
            reading.failed = Some(format!("cannot be opened: {e}"));
            return reading;
        }
    };
    let (mut line, mut n) = (Vec::new(), 0);
    loop {
        line.clear();
        match file.read_until(b'\n', &mut line) {
            Ok(0) => return reading,
            Ok(_) => n += 1,
            Err(e) => {
                reading.failed = Some(format!("cannot be read beyond line {n}: {e}"));
                return reading;
            }
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        match take(&line) {
            Ok(()) => {
                reading.n_good += 1;
                (reading.last_good, reading.cut_short) = (n, false);
            }
            Err(why) => {
                reading.n_bad += 1;
                reading.cut_short = true;
                reading.first_bad.get_or_insert((n, why));
            }
        }
    }
}
