//! `index.json`: where training stands, and where every tensor of the manifest lies.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::graph::{ArrayShape, DType, Model};
use crate::runtime::weights::described;
use crate::wire::Position;

/// The format this version reads and writes.
pub const FORMAT: &str = "foreshard.checkpoint/1";
/// Name of the index, written last.
pub const INDEX: &str = "index.json";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// Always [`FORMAT`].
    pub format: String,
    /// Version of Foreshard that wrote it.
    pub foreshard: String,
    pub model: ModelId,
    /// The next step to run.
    pub step: u64,
    /// Where its batch begins in the data.
    pub position: Position,
    pub seed: u64,
    /// Of the plan in force.
    pub revision: u64,
    /// Rows of its microbatches, which dropout depends on; absent in older checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub microbatch: Option<u64>,
    pub files: Vec<FileEntry>,
    /// In the manifest's order: params, then slots.
    pub tensors: Vec<TensorEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelId {
    pub name: String,
    pub fingerprint: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    pub name: String,
    pub bytes: u64,
    pub crc32: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Param,
    Slot,
}

/// A tensor of the manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    pub name: String,
    pub kind: Kind,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// In the order of rows; together they are the tensor.
    pub pieces: Vec<PieceEntry>,
}

/// Consecutive rows of a tensor, or all of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PieceEntry {
    /// Its name in the shard file.
    pub name: String,
    /// First row, and the row behind the last one; absent for the whole tensor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<(u64, u64)>,
    /// Position in `files`.
    pub file: usize,
    /// First byte in the file.
    pub begin: u64,
    pub crc32: u32,
}

impl TensorEntry {
    /// Shape of a piece: it keeps the leading axis.
    pub fn piece_shape(&self, piece: &PieceEntry) -> ArrayShape {
        let mut shape = ArrayShape::new(self.dtype, self.shape.clone());
        if let (Some((from, to)), Some(rows)) = (piece.rows, shape.dims.first_mut()) {
            *rows = to - from;
        }
        shape
    }
}

/// Stands before the checksum, which covers everything above it.
const SEAL: &str = ",\n  \"crc32\": ";

impl Index {
    /// The file's text. Its last entry is a checksum of all before it: a digit that flips is noticed too.
    pub fn encode(&self) -> String {
        let json = serde_json::to_string_pretty(self).expect("an index is plain data");
        let body = json.strip_suffix("\n}").expect("an index has fields");
        format!("{body}{SEAL}{}\n}}\n", crc32fast::hash(body.as_bytes()))
    }

    /// Reads and checks a file's text.
    ///
    /// # Errors
    /// What is wrong with it; never panics, whatever the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            #[serde(default)]
            foreshard: String,
        }
        let damaged = |e: &dyn std::fmt::Display| Malformed::Problem(format!("not an index of a checkpoint: {e}"));
        let head: Head = serde_json::from_slice(bytes).map_err(|e| damaged(&e))?;
        if head.format != FORMAT {
            return Err(Malformed::Format { found: head.format, foreshard: head.foreshard });
        }
        let text = std::str::from_utf8(bytes).map_err(|e| damaged(&e))?;
        let sealed = text.rsplit_once(SEAL).and_then(|(body, seal)| {
            let expected: u32 = seal.strip_suffix("\n}\n")?.parse().ok()?;
            Some((body, expected))
        });
        let (body, expected) = sealed.ok_or_else(|| damaged(&"it does not end in its checksum"))?;
        let found = crc32fast::hash(body.as_bytes());
        if found != expected {
            return Err(damaged(&format!(
                "it has crc32 {found}, its last line says {expected}; its content has changed"
            )));
        }
        let index: Self = serde_json::from_str(&format!("{body}\n}}")).map_err(|e| damaged(&e))?;
        index.check().map_err(Malformed::Problem)?;
        Ok(index)
    }

    /// Everything that readers rely on.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for FileEntry { name, .. } in &self.files {
            if !is_plain(name) || !names.insert(name) {
                return Err(format!("file {name:?} is not the name of one shard file"));
            }
        }
        let mut names = BTreeSet::new();
        // (file, first byte, byte behind the last one)
        let mut ranges = Vec::new();
        for tensor in &self.tensors {
            let TensorEntry { name, shape, .. } = tensor;
            if !names.insert((tensor.kind, name)) {
                return Err(format!("tensor {name:?} is there twice"));
            }
            let mut row = 0;
            for piece in &tensor.pieces {
                match piece.rows {
                    None if tensor.pieces.len() == 1 => row = shape.first().copied().unwrap_or(0),
                    Some((from, to)) if from == row && to > from => row = to,
                    rows => return Err(format!("tensor {name:?}: rows {rows:?} do not follow row {row}")),
                }
                let file = self.files.get(piece.file);
                let file = file.ok_or_else(|| format!("tensor {name:?} is in file {}, which is not", piece.file))?;
                let end = piece.begin.checked_add(tensor.piece_shape(piece).bytes().0);
                match end {
                    Some(end) if end <= file.bytes => ranges.push((piece.file, piece.begin, end)),
                    _ => return Err(format!("tensor {name:?} ends behind the {} bytes of {}", file.bytes, file.name)),
                }
            }
            if tensor.pieces.is_empty() || row != shape.first().copied().unwrap_or(0) {
                return Err(format!("tensor {name:?} of shape {shape:?} ends at row {row}"));
            }
        }
        ranges.sort_unstable();
        match ranges.windows(2).find(|w| w[0].0 == w[1].0 && w[0].2 > w[1].1) {
            Some(w) => Err(format!("two tensors share byte {} of {}", w[1].1, self.files[w[1].0].name)),
            None => Ok(()),
        }
    }
}

/// Why a text is no index.
#[derive(Debug, PartialEq)]
pub enum Malformed {
    /// Another version's.
    Format {
        found: String,
        foreshard: String,
    },
    Problem(String),
}

/// Whether a name is that of a file beside the index, and not the index.
pub fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(n)) if n == name) && components.next().is_none();
    plain && name != INDEX
}

/// The name of every state tensor in shard files, by position in `Model::state`: the manifest's, with `[3:4]` behind
/// it for a piece. Unique over the model, also where a slot is named like a param.
pub fn piece_names(model: &Model) -> Vec<String> {
    // Safetensors keeps this name for itself.
    let mut taken = BTreeSet::from(["__metadata__".to_owned()]);
    let name = |tensor: &crate::graph::StateTensor| {
        let (base, ..) = described(&model.manifest, tensor.tensor);
        match &tensor.rows {
            Some(rows) => format!("{base}[{}:{}]", rows.start, rows.end),
            None => base.to_owned(),
        }
    };
    let unique = |mut name: String| {
        while !taken.insert(name.clone()) {
            name.push('\'');
        }
        name
    };
    model.state.iter().map(name).map(unique).collect()
}
