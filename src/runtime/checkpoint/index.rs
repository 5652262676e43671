//! `index.json`: where training stands, and where every tensor of the manifest lies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::graph::{ArrayShape, DType, Model, Region};
use crate::runtime::weights::described;
use crate::wire::Position;

/// The format of checkpoints whose pieces are rows: what this version writes wherever it can, so that older ones can
/// read it.
pub const FORMAT: &str = "foreshard.checkpoint/1";
/// The format of checkpoints some of whose pieces are parts of rows.
pub const FORMAT_PARTS: &str = "foreshard.checkpoint/2";
/// Name of the index, written last.
pub const INDEX: &str = "index.json";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// [`FORMAT`] or [`FORMAT_PARTS`].
    pub format: String,
    /// Version of Foreshard that wrote it.
    pub foreshard: String,
    pub model: ModelId,
    /// The next step to run.
    pub step: u64,
    /// Steps of the whole job, by its manifest and data then; absent in older checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<u64>,
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
    /// In the order of rows, then of parts; together they are the tensor.
    pub pieces: Vec<PieceEntry>,
}

/// Consecutive rows of a tensor, or all of it; or a part of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PieceEntry {
    /// Its name in the shard file.
    pub name: String,
    /// First row, and the row behind the last one; absent for the whole tensor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<(u64, u64)>,
    /// Absent for all of those rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<PartEntry>,
    /// Position in `files`.
    pub file: usize,
    /// First byte in the file.
    pub begin: u64,
    pub crc32: u32,
}

/// A range along one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartEntry {
    pub axis: usize,
    /// First position along it, and the one behind the last.
    pub from: u64,
    pub to: u64,
}

impl TensorEntry {
    /// Where a piece lies in the tensor.
    pub fn region(&self, piece: &PieceEntry) -> Region {
        let mut region = Region::whole(&self.shape);
        if let (Some((from, to)), Some(rows)) = (piece.rows, region.0.first_mut()) {
            *rows = from..to;
        }
        if let Some(part) = piece.part
            && let Some(axis) = region.0.get_mut(part.axis)
        {
            *axis = part.from..part.to;
        }
        region
    }

    /// Shape of a piece: it keeps all axes.
    pub fn piece_shape(&self, piece: &PieceEntry) -> ArrayShape {
        ArrayShape::new(self.dtype, self.region(piece).dims())
    }

    /// Whether the pieces are the tensor: each begins where the one before it ends.
    fn check_pieces(&self) -> Result<(), String> {
        let TensorEntry { name, shape, pieces, .. } = self;
        let n_rows = shape.first().copied().unwrap_or(0);
        // Rows that are done, and of the rows at hand where the next part begins.
        let (mut row, mut open): (u64, Option<((u64, u64), PartEntry)>) = (0, None);
        for piece in pieces {
            let rows = piece.rows.unwrap_or((0, n_rows));
            let complete = piece.rows.is_some() || pieces.len() == 1 || piece.part.is_some();
            if rows.0 != row || rows.1 <= rows.0 && piece.rows.is_some() || !complete {
                return Err(format!("tensor {name:?}: rows {:?} do not follow row {row}", piece.rows));
            }
            let Some(part) = piece.part else {
                if open.is_some() {
                    return Err(format!("tensor {name:?}: some parts of rows {rows:?} are not there"));
                }
                row = rows.1;
                continue;
            };
            let n = shape.get(part.axis).copied().unwrap_or(0);
            // Rows are parts of the leading axis already.
            let apart = part.axis > 0 || piece.rows.is_none();
            let (follows, begin) = match open {
                Some((same, last)) => (same == rows && last.axis == part.axis, last.to),
                None => (true, 0),
            };
            if !apart || !follows || part.from != begin || part.to <= part.from || part.to > n {
                let PartEntry { axis, from, to } = part;
                return Err(format!("tensor {name:?}: part {from}:{to} of axis {axis} does not follow {begin}"));
            }
            open = (part.to < n).then_some((rows, part));
            if open.is_none() {
                row = rows.1;
            }
        }
        if pieces.is_empty() || row != n_rows || open.is_some() {
            return Err(format!("tensor {name:?} of shape {shape:?} ends at row {row}"));
        }
        Ok(())
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
        if head.format != FORMAT && head.format != FORMAT_PARTS {
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
            let name = &tensor.name;
            if !names.insert((tensor.kind, name)) {
                return Err(format!("tensor {name:?} is there twice"));
            }
            tensor.check_pieces()?;
            for piece in &tensor.pieces {
                let file = self.files.get(piece.file);
                let file = file.ok_or_else(|| format!("tensor {name:?} is in file {}, which is not", piece.file))?;
                let end = piece.begin.checked_add(tensor.piece_shape(piece).bytes().0);
                match end {
                    Some(end) if end <= file.bytes => ranges.push((piece.file, piece.begin, end)),
                    _ => return Err(format!("tensor {name:?} ends behind the {} bytes of {}", file.bytes, file.name)),
                }
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

/// The name of every state tensor in shard files, by position in `Model::state`: the manifest's, with `[3:4]` or
/// `[3:4,:,0:64]` behind it for a piece. Unique over the model, also where a slot is named like a param.
pub fn piece_names(model: &Model) -> Vec<String> {
    // Safetensors keeps this name for itself.
    let mut taken = BTreeSet::from(["__metadata__".to_owned()]);
    let name = |tensor: &crate::graph::StateTensor| {
        let (base, ..) = described(&model.manifest, tensor.tensor);
        let rows = tensor.rows.iter().map(|rows| (0, rows));
        let ranges: BTreeMap<_, _> = rows.chain(tensor.part.iter().map(|part| (part.axis, &part.range))).collect();
        let Some((&last, _)) = ranges.last_key_value() else { return base.to_owned() };
        let range = |axis| ranges.get(&axis).map_or(":".to_owned(), |r| format!("{}:{}", r.start, r.end));
        format!("{base}[{}]", (0..=last).map(range).collect::<Vec<_>>().join(","))
    };
    let unique = |mut name: String| {
        while !taken.insert(name.clone()) {
            name.push('\'');
        }
        name
    };
    model.state.iter().map(name).map(unique).collect()
}
