//! Reading a data set: local files and object stores, six formats.

use std::io::{BufReader, Cursor};
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use url::Url;

use super::DataError;
use super::table::{Table, Wanted};
use crate::api::Format;
use crate::graph::error::closest;
use crate::graph::{ArrayShape, DType};

/// Largest single file.
const MAX_FILE: u64 = 16 << 30;
/// Rows converted at a time.
const ROWS: usize = 8192;

/// Samples that can be read in any order.
#[derive(Debug)]
pub enum Samples {
    Table(Table),
    Text(Text),
}

/// Text whose bytes are tokens; a sample is a window, windows do not overlap.
#[derive(Debug)]
pub struct Text {
    data: Bytes,
    window: usize,
}

/// A file's name and content.
type File = (String, Bytes);

impl Samples {
    /// Reads everything under `uri` that has the format.
    pub fn read(
        uri: &str,
        format: Option<Format>,
        wanted: &[Wanted],
        settings: &[(String, String)],
    ) -> Result<Self, DataError> {
        let files = fetch(uri, settings)?;
        let format = match format {
            Some(format) => format,
            None => files.iter().find_map(|(name, _)| by_extension(name)).ok_or_else(|| {
                DataError::file(uri, "the extension tells no format; set spec.data.format".to_owned())
            })?,
        };
        let files: Vec<File> = if files.len() == 1 {
            files
        } else {
            files.into_iter().filter(|(name, _)| by_extension(name) == Some(format)).collect()
        };
        if files.is_empty() {
            return Err(DataError::file(uri, format!("no {format:?} files there")));
        }
        if format == Format::Text {
            return text(&files, wanted).map(Samples::Text);
        }
        let mut table = Table::new(wanted);
        for (name, data) in files {
            match format {
                Format::Csv => csv(&name, data, wanted, &mut table)?,
                Format::Jsonl => jsonl(&name, data, wanted, &mut table)?,
                Format::Parquet => parquet(&name, data, wanted, &mut table)?,
                Format::Npy => npy(&name, &data, wanted, &mut table)?,
                Format::Safetensors => tensors(&name, &data, wanted, &mut table)?,
                Format::Text => {}
            }
        }
        table.finish(uri).map(Samples::Table)
    }

    pub fn len(&self) -> u64 {
        match self {
            Samples::Table(t) => t.n_rows,
            Samples::Text(t) => (t.data.len().saturating_sub(1) / t.window) as u64,
        }
    }

    /// Appends one row of one batch tensor.
    pub fn row(&self, tensor: usize, name: &str, row: u64, out: &mut Vec<u8>) {
        match self {
            Samples::Table(t) => out.extend_from_slice(t.row(tensor, row)),
            Samples::Text(t) => {
                let shift = usize::from(name == "targets");
                let window = &t.data[row as usize * t.window + shift..][..t.window];
                out.extend(window.iter().flat_map(|&b| i32::from(b).to_le_bytes()));
            }
        }
    }
}

fn by_extension(name: &str) -> Option<Format> {
    Some(match name.rsplit_once('.')?.1.to_ascii_lowercase().as_str() {
        "txt" | "text" => Format::Text,
        "csv" => Format::Csv,
        "jsonl" | "ndjson" => Format::Jsonl,
        "parquet" => Format::Parquet,
        "npy" => Format::Npy,
        "safetensors" => Format::Safetensors,
        _ => return None,
    })
}

/// All files under a path or URL, by name.
fn fetch(uri: &str, settings: &[(String, String)]) -> Result<Vec<File>, DataError> {
    let problem = |p: String| DataError::file(uri, p);
    let url = match Url::parse(uri) {
        Ok(url) if url.scheme().len() > 1 => url,
        _ => {
            let path = std::path::Path::new(uri).canonicalize().map_err(|e| problem(e.to_string()))?;
            Url::from_file_path(&path).map_err(|()| problem("not a path that can be read".to_owned()))?
        }
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| problem(e.to_string()))?;
    runtime.block_on(async {
        let options = settings.iter().map(|(k, v)| (k.to_ascii_lowercase(), v.clone()));
        let (store, path) = object_store::parse_url_opts(&url, options).map_err(|e| problem(e.to_string()))?;
        let store: Arc<dyn object_store::ObjectStore> = Arc::from(store);
        let mut found = Vec::new();
        match store.head(&path).await {
            Ok(meta) => found.push(meta),
            Err(object_store::Error::NotFound { .. }) => {
                found = store.list(Some(&path)).try_collect().await.map_err(|e| problem(e.to_string()))?;
            }
            Err(_) if url.scheme() == "file" => {
                found = store.list(Some(&path)).try_collect().await.map_err(|e| problem(e.to_string()))?;
            }
            Err(e) => return Err(problem(e.to_string())),
        }
        found.sort_by(|a, b| a.location.cmp(&b.location));
        if found.is_empty() {
            return Err(problem("nothing is there".to_owned()));
        }
        let mut files = Vec::with_capacity(found.len());
        for meta in found {
            let name = meta.location.to_string();
            if meta.size > MAX_FILE {
                return Err(DataError::file(&name, format!("{} bytes, the limit is {MAX_FILE}", meta.size)));
            }
            let get = store.get(&meta.location).await.map_err(|e| DataError::file(&name, e.to_string()))?;
            let data = get.bytes().await.map_err(|e| DataError::file(&name, e.to_string()))?;
            files.push((name, data));
        }
        Ok(files)
    })
}

fn text(files: &[File], wanted: &[Wanted]) -> Result<Text, DataError> {
    let name = &files[0].0;
    let problem = |p: String| Err(DataError::file(name, p));
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
    let data =
        if files.len() == 1 { files[0].1.clone() } else { files.iter().flat_map(|(_, d)| d.iter().copied()).collect() };
    Ok(Text { data, window: window.unwrap_or(1).max(1) as usize })
}

fn csv(name: &str, data: Bytes, wanted: &[Wanted], table: &mut Table) -> Result<(), DataError> {
    let problem = |e: arrow::error::ArrowError| DataError::file(name, e.to_string());
    let format = arrow::csv::reader::Format::default().with_header(true);
    let (schema, _) = format.infer_schema(Cursor::new(&data), Some(1000)).map_err(problem)?;
    let reader = arrow::csv::ReaderBuilder::new(Arc::new(schema))
        .with_format(format)
        .with_batch_size(ROWS)
        .build(Cursor::new(&data))
        .map_err(problem)?;
    for batch in reader {
        table.append(name, &batch.map_err(problem)?, wanted)?;
    }
    Ok(())
}

fn jsonl(name: &str, data: Bytes, wanted: &[Wanted], table: &mut Table) -> Result<(), DataError> {
    let problem = |e: arrow::error::ArrowError| DataError::file(name, e.to_string());
    let (schema, _) =
        arrow::json::reader::infer_json_schema(BufReader::new(Cursor::new(&data)), Some(1000)).map_err(problem)?;
    let reader = arrow::json::ReaderBuilder::new(Arc::new(schema))
        .with_batch_size(ROWS)
        .build(BufReader::new(Cursor::new(&data)))
        .map_err(problem)?;
    for batch in reader {
        table.append(name, &batch.map_err(problem)?, wanted)?;
    }
    Ok(())
}

fn parquet(name: &str, data: Bytes, wanted: &[Wanted], table: &mut Table) -> Result<(), DataError> {
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    let problem = |e: String| DataError::file(name, e);
    let builder = ParquetRecordBatchReaderBuilder::try_new(data).map_err(|e| problem(e.to_string()))?;
    let reader = builder.with_batch_size(ROWS).build().map_err(|e| problem(e.to_string()))?;
    for batch in reader {
        table.append(name, &batch.map_err(|e| problem(e.to_string()))?, wanted)?;
    }
    Ok(())
}

/// One array; the model must take a single batch tensor.
///
/// # Source
/// NumPy's format description, versions 1 to 3.
fn npy(name: &str, data: &[u8], wanted: &[Wanted], table: &mut Table) -> Result<(), DataError> {
    let problem = |p: String| Err(DataError::file(name, p));
    let [only] = wanted else {
        return problem(format!("one array for {} batch tensors; use safetensors for several", wanted.len()));
    };
    let Some((header, body)) = npy_header(data) else { return problem("not an npy file, or cut short".to_owned()) };
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
    rows(name, "the array", &ArrayShape::new(dtype, shape), body, only, 0, table)
}

fn npy_header(data: &[u8]) -> Option<(&str, &[u8])> {
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
    Some((std::str::from_utf8(header).ok()?, body))
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
fn tensors(name: &str, data: &[u8], wanted: &[Wanted], table: &mut Table) -> Result<(), DataError> {
    let file = safetensors::SafeTensors::deserialize(data).map_err(|e| DataError::file(name, e.to_string()))?;
    for (i, w) in wanted.iter().enumerate() {
        let key = w.columns.first().unwrap_or(&w.tensor.name);
        let view = file.tensor(key).map_err(|_| {
            let hint = closest(key, file.names());
            DataError::file(name, format!("no tensor {key:?}; it has {:?}{hint}", file.names()))
        })?;
        let Some(dtype) = DType::from_safetensors(view.dtype()) else {
            return Err(DataError::file(name, format!("tensor {key:?} has unsupported type {:?}", view.dtype())));
        };
        let shape = ArrayShape::new(dtype, view.shape().iter().map(|&d| d as u64).collect::<Vec<_>>());
        rows(name, key, &shape, view.data(), w, i, table)?;
    }
    Ok(())
}

/// Appends a dense array whose leading axis is rows.
fn rows(
    file: &str,
    what: &str,
    shape: &ArrayShape,
    data: &[u8],
    wanted: &Wanted,
    tensor: usize,
    table: &mut Table,
) -> Result<(), DataError> {
    let row = wanted.row();
    if shape.dtype != row.dtype || shape.dims.get(1..) != Some(&row.dims[..]) {
        return Err(DataError::file(
            file,
            format!("{what} is {shape}; batch tensor {:?} takes rows of {row}", wanted.tensor.name),
        ));
    }
    if data.len() as u64 != shape.bytes().0 {
        return Err(DataError::file(
            file,
            format!("{what} has {} bytes, {shape} needs {}; is it cut short?", data.len(), shape.bytes().0),
        ));
    }
    table.extend(tensor, data);
    Ok(())
}
