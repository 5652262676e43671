//! Rows of a data set, in memory, in the types of the batch.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::DataType;
use arrow::util::display::FormatOptions;

use super::DataError;
use crate::graph::error::closest;
use crate::graph::manifest::TensorSpec;
use crate::graph::{ArrayShape, DType};

/// Most bytes a data set may take once it is in the batch's types.
const MAX_BYTES: u64 = 16 << 30;

/// One column of rows per batch tensor.
#[derive(Debug)]
pub struct Table {
    pub n_rows: u64,
    columns: Vec<Column>,
}

#[derive(Debug)]
struct Column {
    name: String,
    row_bytes: usize,
    data: Vec<u8>,
}

/// A batch tensor and the columns it is made of.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub tensor: TensorSpec,
    /// Names or `prefix*`; empty stands for the tensor's own name.
    pub columns: Vec<String>,
}

impl Wanted {
    /// Shape of one row: the batch tensor's without its leading axis.
    pub fn row(&self) -> ArrayShape {
        ArrayShape::new(self.tensor.dtype, self.tensor.shape[1..].to_vec())
    }
}

impl Table {
    pub fn new(wanted: &[Wanted]) -> Self {
        let column = |w: &Wanted| Column {
            name: w.tensor.name.clone(),
            row_bytes: w.row().bytes().0 as usize,
            data: Vec::new(),
        };
        Self { n_rows: 0, columns: wanted.iter().map(column).collect() }
    }

    /// Appends dense rows of one tensor; all tensors must end up equally long.
    pub fn extend(&mut self, tensor: usize, rows: &[u8]) {
        self.columns[tensor].data.extend_from_slice(rows);
    }

    /// Settles the number of rows.
    pub fn finish(mut self, file: &str) -> Result<Self, DataError> {
        let rows = |c: &Column| if c.row_bytes == 0 { 0 } else { (c.data.len() / c.row_bytes) as u64 };
        self.n_rows = self.columns.iter().map(rows).max().unwrap_or(0);
        if let Some(short) = self.columns.iter().find(|c| rows(c) != self.n_rows) {
            let (name, found, expected) = (&short.name, rows(short), self.n_rows);
            return Err(DataError::file(file, format!("{name:?} has {found} rows, another tensor has {expected}")));
        }
        Ok(self)
    }

    /// Copies one row of one tensor.
    pub fn row(&self, tensor: usize, row: u64) -> &[u8] {
        let column = &self.columns[tensor];
        &column.data[row as usize * column.row_bytes..][..column.row_bytes]
    }

    /// Appends the rows of an Arrow batch.
    pub fn append(&mut self, file: &str, batch: &RecordBatch, wanted: &[Wanted]) -> Result<(), DataError> {
        for (i, w) in wanted.iter().enumerate() {
            let names = resolve(file, batch, w)?;
            let parts: Vec<(String, Vec<u8>)> = names
                .into_iter()
                .map(|name| {
                    let array = batch.column_by_name(&name).expect("resolved");
                    Ok((name.clone(), dense(file, &name, array, w.tensor.dtype)?))
                })
                .collect::<Result<_, DataError>>()?;
            let per_row = w.row().bytes().0 as usize;
            let rows = batch.num_rows();
            let total: usize = parts.iter().map(|(_, p)| p.len()).sum();
            if total != rows * per_row {
                let size = w.tensor.dtype.size() as usize;
                let found = if rows == 0 { 0 } else { total / rows / size };
                return Err(DataError::file(
                    file,
                    format!(
                        "batch tensor {:?} takes {} values per row ({}), column {} gives {found}; name its columns under spec.data.columns",
                        w.tensor.name,
                        per_row / size,
                        w.row(),
                        parts.iter().map(|(n, _)| format!("{n:?}")).collect::<Vec<_>>().join(", ")
                    ),
                ));
            }
            let column = &mut self.columns[i];
            if column.data.len() as u64 + total as u64 > MAX_BYTES {
                return Err(DataError::file(
                    file,
                    format!("more than {} GiB of samples; split the data", MAX_BYTES >> 30),
                ));
            }
            if let [(_, whole)] = &parts[..] {
                column.data.extend_from_slice(whole);
                continue;
            }
            for row in 0..rows {
                for (_, part) in &parts {
                    let n = part.len() / rows;
                    column.data.extend_from_slice(&part[row * n..(row + 1) * n]);
                }
            }
        }
        Ok(())
    }
}

/// Columns of the file that a tensor is made of.
fn resolve(file: &str, batch: &RecordBatch, wanted: &Wanted) -> Result<Vec<String>, DataError> {
    let schema = batch.schema();
    let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    let own = vec![wanted.tensor.name.clone()];
    let asked = if wanted.columns.is_empty() { &own } else { &wanted.columns };
    let mut names = Vec::new();
    for name in asked {
        let matching: Vec<&str> = match name.strip_suffix('*') {
            Some(prefix) => known.iter().copied().filter(|k| k.starts_with(prefix)).collect(),
            None => known.iter().copied().filter(|k| k == name).collect(),
        };
        if matching.is_empty() {
            let hint = closest(name, known.iter().copied());
            return Err(DataError::file(
                file,
                format!(
                    "no column {name:?} for batch tensor {:?}; the columns are {}{hint}",
                    wanted.tensor.name,
                    known.iter().take(20).map(|k| format!("{k:?}")).collect::<Vec<_>>().join(", ")
                ),
            ));
        }
        names.extend(matching.into_iter().map(str::to_owned));
    }
    Ok(names)
}

/// Values of a column, nested lists flattened, as little-endian bytes of `dtype`.
fn dense(file: &str, name: &str, array: &ArrayRef, dtype: DType) -> Result<Vec<u8>, DataError> {
    let problem = |p: String| DataError::file(file, format!("column {name:?}: {p}"));
    if array.null_count() > 0 {
        let row = (0..array.len()).find(|&i| array.is_null(i)).unwrap_or(0);
        return Err(problem(format!("row {row} is empty; training data has no missing values")));
    }
    match array.data_type() {
        DataType::List(_) => return dense(file, name, &array.as_list::<i32>().flattened(), dtype),
        DataType::LargeList(_) => return dense(file, name, &array.as_list::<i64>().flattened(), dtype),
        DataType::FixedSizeList(_, _) => {
            let list = array.as_fixed_size_list();
            let size = list.value_length() as usize;
            let values = list.values().slice(list.offset() * size, list.len() * size);
            return dense(file, name, &values, dtype);
        }
        _ => {}
    }
    let target = arrow_type(dtype).ok_or_else(|| problem(format!("cannot become {}", dtype.hlo_name())))?;
    check_lossless(array.data_type(), &target).map_err(problem)?;
    let options = CastOptions { safe: false, format_options: FormatOptions::default() };
    let cast = cast_with_options(array, &target, &options)
        .map_err(|e| problem(format!("cannot become {}: {e}", dtype.hlo_name())))?;
    if dtype == DType::Bool {
        let bools = cast.as_boolean();
        return Ok((0..bools.len()).map(|i| u8::from(bools.value(i))).collect());
    }
    let width = dtype.size() as usize;
    let data = cast.to_data();
    let bytes = data.buffers()[0].as_slice();
    Ok(bytes[data.offset() * width..(data.offset() + data.len()) * width].to_vec())
}

/// Numbers may widen or change sign type (checked value by value); real numbers do not silently become whole ones.
fn check_lossless(from: &DataType, to: &DataType) -> Result<(), String> {
    if from.is_floating() && to.is_integer() {
        return Err(format!(
            "{from} would be rounded to {to}; export the model for float data, or store whole numbers"
        ));
    }
    if !(from.is_numeric() || *from == DataType::Boolean) {
        return Err(format!("{from} is not numeric; tokenise or encode it first"));
    }
    Ok(())
}

fn arrow_type(dtype: DType) -> Option<DataType> {
    Some(match dtype {
        DType::Bool => DataType::Boolean,
        DType::Int8 => DataType::Int8,
        DType::Int16 => DataType::Int16,
        DType::Int32 => DataType::Int32,
        DType::Int64 => DataType::Int64,
        DType::Uint8 => DataType::UInt8,
        DType::Uint16 => DataType::UInt16,
        DType::Uint32 => DataType::UInt32,
        DType::Uint64 => DataType::UInt64,
        DType::Float16 => DataType::Float16,
        DType::Float32 => DataType::Float32,
        DType::Float64 => DataType::Float64,
        _ => return None,
    })
}

/// A flattened list, respecting its offsets.
trait Flattened {
    fn flattened(&self) -> ArrayRef;
}
impl<O: arrow::array::OffsetSizeTrait> Flattened for arrow::array::GenericListArray<O> {
    fn flattened(&self) -> ArrayRef {
        let offsets = self.value_offsets();
        let (first, last) = (offsets[0].as_usize(), offsets[offsets.len() - 1].as_usize());
        self.values().slice(first, last - first)
    }
}
