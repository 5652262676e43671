//! Reads an instance: JSON, plain or gzipped.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde::Deserialize;

use super::super::InputError;
use crate::plan::strategy::{Coupling, Op, Problem};

/// Files larger than this, unpacked, are not read: the largest of the contest have some 100 MB.
const LARGEST: u64 = 4 << 30;

#[derive(Debug, Deserialize)]
struct Whole {
    problem: Instance,
}

/// An instance as in the file: lists of equal length.
#[derive(Debug, Deserialize)]
pub struct Instance {
    pub name: String,
    pub nodes: Nodes,
    pub edges: Edges,
    pub usage_limit: i64,
}

#[derive(Debug, Deserialize)]
pub struct Nodes {
    /// Half-open.
    pub intervals: Vec<[i64; 2]>,
    pub costs: Vec<Vec<i64>>,
    pub usages: Vec<Vec<i64>>,
}

#[derive(Debug, Deserialize)]
pub struct Edges {
    pub nodes: Vec<[usize; 2]>,
    /// Row-major by the strategies of the two nodes.
    pub costs: Vec<Vec<i64>>,
}

/// Whether a file begins like an instance: an object whose first key is `problem`. A packed file that is damaged from
/// its first byte is taken for one.
///
/// Only then are faults in it ours to report.
pub fn looks_like_one(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut head = Vec::new();
    // What can be read of a damaged file is enough.
    let _ = match is_packed(path) {
        true => GzDecoder::new(file).take(256).read_to_end(&mut head),
        false => file.take(256).read_to_end(&mut head),
    };
    let text = String::from_utf8_lossy(&head);
    let key = text.trim_start().strip_prefix('{').map(str::trim_start);
    key.is_some_and(|k| k.starts_with("\"problem\"")) || (head.is_empty() && is_packed(path))
}

fn is_packed(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "gz")
}

impl Instance {
    /// Reads a file.
    ///
    /// # Errors
    /// Names the file and what is wrong: damaged or truncated, not of this format, lists of different lengths. What
    /// the numbers mean is checked by [`Problem::check`].
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let malformed = |message: String| InputError::Malformed { path: path.to_owned(), message };
        let failed = |source| InputError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mut text = String::new();
        let size = if is_packed(path) {
            let mut unpacked = GzDecoder::new(file).take(LARGEST);
            unpacked.read_to_string(&mut text).map_err(|e| malformed(format!("cannot be unpacked: {e}")))?
        } else {
            file.take(LARGEST).read_to_string(&mut text).map_err(failed)?
        };
        if size as u64 >= LARGEST {
            return Err(malformed(format!("larger than {LARGEST} bytes")));
        }
        Self::parse(&text).map_err(malformed)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let Whole { problem } = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let (nodes, edges) = (&problem.nodes, &problem.edges);
        let n = nodes.intervals.len();
        for (list, len, expected) in [
            ("nodes.costs", nodes.costs.len(), n),
            ("nodes.usages", nodes.usages.len(), n),
            ("edges.costs", edges.costs.len(), edges.nodes.len()),
        ] {
            if len != expected {
                let other = if list == "edges.costs" { "edges.nodes" } else { "nodes.intervals" };
                return Err(format!("{list} has {len} entries, {other} has {expected}"));
            }
        }
        Ok(problem)
    }

    pub fn n_ops(&self) -> usize {
        self.nodes.intervals.len()
    }

    pub fn problem(&self) -> Problem {
        let nodes = self.nodes.intervals.iter().zip(&self.nodes.costs).zip(&self.nodes.usages);
        let edges = self.edges.nodes.iter().zip(&self.edges.costs);
        Problem {
            ops: nodes
                .map(|((&[from, to], cost), usage)| Op { cost: cost.clone(), usage: usage.clone(), live: from..to })
                .collect(),
            couplings: edges.map(|(&ops, cost)| Coupling { ops, cost: cost.clone() }).collect(),
            limit: self.usage_limit,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::super::tests::EXAMPLE;
    use super::*;

    #[test]
    fn packed_and_plain_read_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let packed = directory.path().join("example.json.gz");
        let mut encoder = GzEncoder::new(File::create(&packed).unwrap(), Compression::fast());
        encoder.write_all(EXAMPLE.as_bytes()).unwrap();
        encoder.finish().unwrap();
        assert!(looks_like_one(&packed));
        assert_eq!(Instance::read(&packed).unwrap().problem(), Instance::parse(EXAMPLE).unwrap().problem());

        // Cut anywhere, even in the checksum at its end, it is an error and never a panic.
        let whole = std::fs::read(&packed).unwrap();
        for len in [0, 5, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&packed, &whole[..len]).unwrap();
            assert!(looks_like_one(&packed));
            let error = Instance::read(&packed).unwrap_err();
            assert!(matches!(error, InputError::Malformed { .. }), "{len}: {error}");
        }
    }

    #[test]
    fn faults_are_named() {
        let check = |from: &str, to: &str, expected: &str| {
            let message = match Instance::parse(&EXAMPLE.replacen(from, to, 1)) {
                Ok(instance) => instance.problem().check().unwrap_err().to_string(),
                Err(message) => message,
            };
            assert!(message.contains(expected), "{from:?} -> {to:?}: {message}");
        };
        check("[55, 65]", "[55]", "op 1 has 1 costs and 2 usages");
        check("[30, 40]", "[30]", "coupling 0 has 1 costs, its ops have 2 pairs");
        check("[3, 4]]", "[3, 5]]", "coupling 4 names op 5, there are 5 ops");
        check("[3, 4]]", "[3, -1]]", "invalid value: integer `-1`");
        check("[30, 70]", "[70, 30]", "op 0 is live from 70 to 30");
        check("[30, 70]", "[-1, 30]", "op 0 is live from -1 to 30");
        check("[30, 70], ", "", "nodes.costs has 5 entries, nodes.intervals has 4");
        check("[[0, 1], ", "[", "edges.costs has 5 entries, edges.nodes has 4");
        check("[15], [55", "[1e30], [55", "invalid type: floating point");
        check("[10]", "[-10]", "op 0 uses -10 with strategy 0");
        check("\"usage_limit\": 50", "\"limit\": 50", "missing field `usage_limit`");
        check("}}", "", "EOF while parsing");
    }
}
