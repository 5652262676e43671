//! Reading a data set: files of six formats as samples that can be read in any order.

use std::io::BufReader;
use std::sync::Arc;

use arrow::array::RecordBatch;
use safetensors::tensor::Metadata;

use super::arrays::widened;
use super::blob::{Blob, Budget, Reading};
use super::bucket::Buckets;
use super::groups::Groups;
use super::shelf::Shelf;
use super::table::{Table, Wanted};
use super::{DataError, guarded};
use crate::api::Format;
use crate::graph::error::closest;
use crate::graph::{ArrayShape, DType};

/// Rows converted at a time.
pub const ROWS: usize = 8192;
/// Rows whose types are taken for those of the whole file, where it does not tell.
const GUESSED_FROM: usize = 1000;
/// Parquet files of up to this size are converted and checked at once; of larger ones every row group when it is needed.
const AT_ONCE: u64 = 256 << 20;
/// Longest header of a safetensors or npy file.
const MAX_HEADER: u64 = 100_000_000;

/// Samples that can be read in any order.
#[derive(Debug)]
pub enum Samples {
    Table(Table),
    Parquet(Groups),
    Text(Text),
}

/// Text whose bytes are tokens; a sample is a window, windows do not overlap.
#[derive(Debug)]
pub struct Text {
    /// First byte, name and content of every file.
    files: Vec<(u64, String, Arc<Blob>)>,
    len: u64,
    window: u64,
}

impl Samples {
    /// Opens everything under `uri` that has the format.
    pub fn open(
        uri: &str,
        format: Option<Format>,
        wanted: &[Wanted],
        buckets: &Buckets,
        settings: &[(String, String)],
        budget: &Budget,
    ) -> Result<Self, DataError> {
        let mut shelf = Shelf::find(uri, settings, budget)?;
        let known = |file: &super::shelf::DataFile| file.extension().as_deref().and_then(by_extension);
        let format = match format {
            Some(format) => format,
            None => shelf.files.iter().find_map(known).ok_or_else(|| {
                DataError::file(uri, "the extension tells no format; set spec.data.format".to_owned())
            })?,
        };
        if shelf.files.len() > 1 {
            shelf.files.retain(|f| known(f) == Some(format));
        }
        if shelf.files.is_empty() {
            return Err(DataError::file(uri, format!("no {format:?} files there")));
        }
        if format == Format::Text {
            return Text::open(&shelf, wanted).map(Samples::Text);
        }
        if format == Format::Parquet {
            let mut groups = Groups::new(wanted, buckets, budget);
            for file in &shelf.files {
                groups.add(&file.name, shelf.open(file)?)?;
            }
            // The order of rows of several lengths depends on all lengths.
            let at_once = buckets.ragged() || groups.bytes() <= AT_ONCE;
            return if at_once { groups.whole().map(Samples::Table) } else { Ok(Samples::Parquet(groups)) };
        }
        let mut table = Table::new(wanted, budget);
        for file in &shelf.files {
            let (name, blob) = (&file.name, shelf.open(file)?);
            table.begin(name, 0);
            let decode = || {
                let mut append = |batch: &RecordBatch| table.append(batch, wanted, buckets);
                match format {
                    Format::Csv => csv(name, &blob, wanted, &mut append),
                    Format::Jsonl => jsonl(name, &blob, wanted, &mut append),
                    Format::Npy => npy(name, &blob, wanted, buckets, &mut table),
                    Format::Safetensors => tensors(name, &blob, wanted, buckets, &mut table),
                    Format::Text | Format::Parquet => Ok(()),
                }
            };
            guarded(decode, |p| DataError::file(name, p))?;
            table.end()?;
        }
        Ok(Samples::Table(table))
    }

    pub fn len(&self) -> u64 {
        match self {
            Samples::Table(t) => t.n_rows(),
            Samples::Parquet(g) => g.n_rows(),
            Samples::Text(t) => t.len.saturating_sub(1) / t.window,
        }
    }

    /// The smallest bucket for a row.
    pub fn bucket(&self, row: u64, wanted: &[Wanted], buckets: &Buckets) -> Result<usize, DataError> {
        let Samples::Table(table) = self else {
            // Windows have the batch's own shape.
            let full: Vec<u64> = wanted.iter().map(|w| w.row().n_elements()).collect();
            return buckets.smallest(&full).ok_or_else(|| {
                DataError::file("text", "the bundle has no variant for batches of full size".to_owned())
            });
        };
        let values: Vec<u64> =
            (0..wanted.len()).map(|i| table.row_bytes(i, row) / wanted[i].tensor.dtype.size()).collect();
        let (file, row) = table.origin(row);
        buckets.smallest(&values).ok_or_else(|| {
            let problem = buckets.misfit(wanted, &values);
            DataError::file(file, format!("row {row}: {problem}"))
        })
    }

    /// Appends one row of one batch tensor.
    pub fn row(&mut self, tensor: usize, name: &str, row: u64, out: &mut Vec<u8>) -> Result<(), DataError> {
        match self {
            Samples::Table(table) => table.row(tensor, row, out),
            Samples::Parquet(groups) => groups.row(tensor, row, out),
            Samples::Text(text) => {
                let mut window = vec![0; text.window as usize];
                text.read(row * text.window + u64::from(name == "targets"), &mut window)?;
                out.extend(window.iter().flat_map(|&b| i32::from(b).to_le_bytes()));
                Ok(())
            }
        }
    }
}

fn by_extension(extension: &str) -> Option<Format> {
    Some(match extension {
        "txt" | "text" => Format::Text,
        "csv" => Format::Csv,
        "jsonl" | "ndjson" => Format::Jsonl,
        "parquet" => Format::Parquet,
        "npy" => Format::Npy,
        "safetensors" => Format::Safetensors,
        _ => return None,
    })
}

impl Text {
    fn open(shelf: &Shelf, wanted: &[Wanted]) -> Result<Self, DataError> {
        let problem = |p: String| Err(DataError::file(&shelf.files[0].name, p));
        let mut window = None;
        for w in wanted {
            let tensor = &w.tensor;
            let fits = tensor.dtype == DType::Int32 && tensor.shape.len() == 2;
            if !matches!(tensor.name.as_str(), "tokens" | "targets") || !fits {
                let shape = tensor.array();
                return problem(format!(
                    "text gives tokens and targets as s32[rows,length]; the model wants {:?} as {shape}",
                    tensor.name
                ));
            }
            if *window.get_or_insert(tensor.shape[1]) != tensor.shape[1] {
                return problem("tokens and targets have different lengths".to_owned());
            }
        }
        let mut text = Text { files: Vec::new(), len: 0, window: window.unwrap_or(1).max(1) };
        for file in &shelf.files {
            let blob = shelf.open(file)?;
            text.files.push((text.len, file.name.clone(), blob.clone()));
            text.len += blob.len();
        }
        Ok(text)
    }

    /// Reads across the borders of files.
    fn read(&self, mut at: u64, mut out: &mut [u8]) -> Result<(), DataError> {
        let mut file = self.files.partition_point(|(first, ..)| *first <= at).saturating_sub(1);
        while !out.is_empty()
            && let Some((first, name, blob)) = self.files.get(file)
        {
            let n = (first + blob.len() - at).min(out.len() as u64);
            let (now, later) = out.split_at_mut(n as usize);
            blob.read_at(at - first, now)
                .map_err(|e| DataError::file(name, format!("cannot be read at {at}: {e}; did the file change?")))?;
            (at, out, file) = (at + n, later, file + 1);
        }
        Ok(())
    }
}

/// Takes the rows of a file as they are read.
type Append<'a> = dyn FnMut(&RecordBatch) -> Result<(), DataError> + 'a;

fn csv(name: &str, blob: &Arc<Blob>, wanted: &[Wanted], append: &mut Append<'_>) -> Result<(), DataError> {
    let problem = |e: arrow::error::ArrowError| DataError::file(name, e.to_string());
    let format = arrow::csv::reader::Format::default().with_header(true);
    let start = || BufReader::new(Reading::new(blob, 0));
    let (schema, _) = format.infer_schema(start(), Some(GUESSED_FROM)).map_err(problem)?;
    let reader = arrow::csv::ReaderBuilder::new(Arc::new(widened(&schema, wanted)))
        .with_format(format)
        .with_batch_size(ROWS)
        .build_buffered(start())
        .map_err(problem)?;
    for batch in reader {
        append(&batch.map_err(problem)?)?;
    }
    Ok(())
}

fn jsonl(name: &str, blob: &Arc<Blob>, wanted: &[Wanted], append: &mut Append<'_>) -> Result<(), DataError> {
    let problem = |e: arrow::error::ArrowError| DataError::file(name, e.to_string());
    let start = || BufReader::new(Reading::new(blob, 0));
    let (schema, _) = arrow::json::reader::infer_json_schema(start(), Some(GUESSED_FROM)).map_err(problem)?;
    let reader = arrow::json::ReaderBuilder::new(Arc::new(widened(&schema, wanted)))
        .with_batch_size(ROWS)
        .build(start())
        .map_err(problem)?;
    for batch in reader {
        append(&batch.map_err(problem)?)?;
    }
    Ok(())
}

/// One array; the model must take a single batch tensor.
///
/// # Source
/// NumPy's format description, versions 1 to 3.
fn npy(name: &str, blob: &Arc<Blob>, wanted: &[Wanted], buckets: &Buckets, table: &mut Table) -> Result<(), DataError> {
    let problem = |p: String| Err(DataError::file(name, p));
    let [only] = wanted else {
        return problem(format!("one array for {} batch tensors; use safetensors for several", wanted.len()));
    };
    let start = blob.bytes(0, blob.len().min(1 << 20)).map_err(|e| DataError::file(name, e.to_string()))?;
    let Some((header, at)) = npy_header(&start) else { return problem("not an npy file, or cut short".to_owned()) };
    let field = |key: &str| {
        let rest = &header[header.find(&format!("'{key}'"))? + key.len() + 2..];
        Some(rest.trim_start_matches([':', ' ']).to_owned())
    };
    let descr = field("descr").unwrap_or_default();
    let descr = descr.trim_start_matches('\'').split('\'').next().unwrap_or_default();
    if field("fortran_order").is_some_and(|f| f.starts_with("True")) {
        return problem("column-major order; save it with numpy.ascontiguousarray".to_owned());
    }
    let shape: Option<Vec<u64>> = field("shape").and_then(|s| {
        let inner = s.strip_prefix('(')?.split(')').next()?.to_owned();
        inner.split(',').map(str::trim).filter(|d| !d.is_empty()).map(|d| d.parse().ok()).collect()
    });
    let (Some(dtype), Some(shape)) = (npy_dtype(descr), shape) else {
        return problem(format!("element type {descr:?} or its shape is not supported"));
    };
    let shape = ArrayShape::new(dtype, shape);
    check(name, "the array", &shape, blob.len() - at, only, 0, buckets)?;
    table.lay(0, blob, at, &shape);
    Ok(())
}

/// Header and where the values begin.
fn npy_header(data: &[u8]) -> Option<(&str, u64)> {
    let rest = data.strip_prefix(b"\x93NUMPY")?;
    let (&major, rest) = rest.split_first()?;
    let (_, rest) = rest.split_first()?;
    let (length, rest) = if major == 1 {
        let (n, rest) = rest.split_at_checked(2)?;
        (u16::from_le_bytes(n.try_into().ok()?) as usize, rest)
    } else {
        let (n, rest) = rest.split_at_checked(4)?;
        (u32::from_le_bytes(n.try_into().ok()?) as usize, rest)
    };
    let (header, body) = rest.split_at_checked(length)?;
    Some((std::str::from_utf8(header).ok()?, (data.len() - body.len()) as u64))
}

fn npy_dtype(descr: &str) -> Option<DType> {
    Some(match descr {
        "|b1" => DType::Bool,
        "|i1" => DType::Int8,
        "|u1" => DType::Uint8,
        "<i2" => DType::Int16,
        "<u2" => DType::Uint16,
        "<i4" => DType::Int32,
        "<u4" => DType::Uint32,
        "<i8" => DType::Int64,
        "<u8" => DType::Uint64,
        "<f2" => DType::Float16,
        "<f4" => DType::Float32,
        "<f8" => DType::Float64,
        _ => return None,
    })
}

/// One tensor per batch tensor, by its name or the one mapped to it.
fn tensors(
    name: &str,
    blob: &Arc<Blob>,
    wanted: &[Wanted],
    buckets: &Buckets,
    table: &mut Table,
) -> Result<(), DataError> {
    let problem = |p: String| DataError::file(name, p);
    let short = |_| problem("not a safetensors file, or cut short".to_owned());
    let mut length = [0; 8];
    blob.read_at(0, &mut length).map_err(short)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(problem(format!("header of {length} bytes; not a safetensors file")));
    }
    let header = blob.bytes(8, length).map_err(short)?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| problem(format!("header: {e}")))?;
    for (i, w) in wanted.iter().enumerate() {
        let key = w.columns.first().unwrap_or(&w.tensor.name);
        let info = header.info(key).ok_or_else(|| {
            let mut names = header.offset_keys();
            names.sort_unstable();
            let hint = closest(key, names.iter().map(String::as_str));
            problem(format!("no tensor {key:?}; it has {names:?}{hint}"))
        })?;
        let Some(dtype) = DType::from_safetensors(info.dtype) else {
            return Err(problem(format!("tensor {key:?} has unsupported type {:?}", info.dtype)));
        };
        let shape = ArrayShape::new(dtype, info.shape.iter().map(|&d| d as u64).collect::<Vec<_>>());
        let (begin, end) = info.data_offsets;
        let there = blob.len().saturating_sub(8 + length).min(end as u64).saturating_sub(begin as u64);
        check(name, &format!("tensor {key:?}"), &shape, there, w, i, buckets)?;
        table.lay(i, blob, 8 + length + begin as u64, &shape);
    }
    Ok(())
}

/// Whether a dense array has rows for a batch tensor, and all its bytes are there.
fn check(
    file: &str,
    what: &str,
    shape: &ArrayShape,
    there: u64,
    wanted: &Wanted,
    tensor: usize,
    buckets: &Buckets,
) -> Result<(), DataError> {
    let row = wanted.row();
    let fits = match shape.dims.get(1..) {
        Some(dims) if buckets.ragged() => {
            let n = ArrayShape::new(shape.dtype, dims).n_elements();
            dims.len() == row.dims.len() && (0..buckets.all.len()).any(|b| buckets.holds(b, tensor, n))
        }
        Some(dims) => dims == row.dims,
        None => false,
    };
    if shape.dtype != row.dtype || !fits {
        return Err(DataError::file(
            file,
            format!("{what} is {shape}; batch tensor {:?} takes rows of {}", wanted.tensor.name, buckets.list(tensor)),
        ));
    }
    if there != shape.bytes().0 {
        return Err(DataError::file(
            file,
            format!("{what} has {there} bytes, {shape} needs {}; is it cut short?", shape.bytes().0),
        ));
    }
    Ok(())
}
