//! Arrow columns as dense values of the batch's types.

use std::ops::Range;

use arrow::array::{Array, ArrayRef, AsArray, GenericListArray, OffsetSizeTrait, RecordBatch};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use arrow::util::display::FormatOptions;

use super::DataError;
use super::table::Wanted;
use crate::graph::DType;
use crate::graph::error::closest;

/// One column's share of a batch tensor.
pub struct Part {
    pub name: String,
    /// Little-endian values, nested lists flattened.
    pub data: Vec<u8>,
    pub lengths: Lengths,
}

/// Which values belong to a row.
pub enum Lengths {
    Each(usize),
    Ends(Vec<usize>),
}

impl Lengths {
    pub fn range(&self, row: usize) -> Range<usize> {
        self.begin(row)..self.begin(row + 1)
    }

    fn begin(&self, row: usize) -> usize {
        match self {
            Lengths::Each(n) => row * n,
            Lengths::Ends(ends) => row.checked_sub(1).map_or(0, |r| ends[r]),
        }
    }
}

/// The columns that a tensor is made of. `first`: number of the batch's first row in its file.
pub fn parts(file: &str, first: u64, batch: &RecordBatch, wanted: &Wanted) -> Result<Vec<Part>, DataError> {
    let schema = batch.schema();
    let columns = resolve(&schema, wanted).map_err(|p| DataError::file(file, p))?;
    let part = |column: usize| {
        let name = schema.field(column).name();
        let array = batch.column(column);
        let dense = match (0..array.len()).find(|&row| array.is_null(row)) {
            Some(row) => Err(format!("row {} is empty; training data has no missing values", first + row as u64)),
            None => dense(array, wanted.tensor.dtype),
        };
        let (data, lengths) = dense.map_err(|p| DataError::file(file, format!("column {name:?}: {p}")))?;
        Ok(Part { name: name.clone(), data, lengths })
    };
    columns.into_iter().map(part).collect()
}

/// Columns that a tensor is made of, by their place.
pub fn resolve(schema: &Schema, wanted: &Wanted) -> Result<Vec<usize>, String> {
    let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    let own = vec![wanted.tensor.name.clone()];
    let asked = if wanted.columns.is_empty() { &own } else { &wanted.columns };
    let mut columns = Vec::new();
    for name in asked {
        let before = columns.len();
        columns.extend((0..known.len()).filter(|&k| match name.strip_suffix('*') {
            Some(prefix) => known[k].starts_with(prefix),
            None => known[k] == name,
        }));
        if columns.len() == before {
            let hint = closest(name, known.iter().copied());
            return Err(format!(
                "no column {name:?} for batch tensor {:?}; the columns are {}{hint}",
                wanted.tensor.name,
                known.iter().take(20).map(|k| format!("{k:?}")).collect::<Vec<_>>().join(", ")
            ));
        }
    }
    Ok(columns)
}

/// A schema guessed from the first rows, made wide enough for what may follow: a column that begins with whole numbers
/// is read as real numbers where the model wants those.
pub fn widened(schema: &Schema, wanted: &[Wanted]) -> Schema {
    let mut fields: Vec<Field> = schema.fields().iter().map(|f| f.as_ref().clone()).collect();
    let real = wanted.iter().filter(|w| arrow_type(w.tensor.dtype).is_some_and(|t| t.is_floating()));
    for column in real.flat_map(|w| resolve(schema, w).unwrap_or_default()) {
        fields[column] = fields[column].clone().with_data_type(real_numbers(fields[column].data_type()));
    }
    Schema::new(Fields::from(fields))
}

fn real_numbers(of: &DataType) -> DataType {
    match of {
        DataType::Int64 => DataType::Float64,
        DataType::List(item) => {
            let real = real_numbers(item.data_type());
            DataType::List(item.as_ref().clone().with_data_type(real).into())
        }
        other => other.clone(),
    }
}

/// Values as little-endian bytes of `dtype`, and how many there are for each of the array's entries.
fn dense(array: &ArrayRef, dtype: DType) -> Result<(Vec<u8>, Lengths), String> {
    if array.null_count() > 0 {
        return Err("a list has an empty entry; training data has no missing values".to_owned());
    }
    match array.data_type() {
        DataType::List(_) => return list(array.as_list::<i32>(), dtype),
        DataType::LargeList(_) => return list(array.as_list::<i64>(), dtype),
        DataType::FixedSizeList(_, _) => {
            let list = array.as_fixed_size_list();
            let size = list.value_length() as usize;
            // The array's own offset is already in its values.
            let values = list.values().slice(0, list.len() * size);
            let (data, inner) = dense(&values, dtype)?;
            let lengths = match inner {
                Lengths::Each(n) => Lengths::Each(n * size),
                inner => Lengths::Ends((1..=list.len()).map(|i| inner.begin(i * size)).collect()),
            };
            return Ok((data, lengths));
        }
        _ => {}
    }
    Ok((numbers(array, dtype)?, Lengths::Each(1)))
}

fn list<O: OffsetSizeTrait>(list: &GenericListArray<O>, dtype: DType) -> Result<(Vec<u8>, Lengths), String> {
    let offsets = list.value_offsets();
    let (first, last) = (offsets[0].as_usize(), offsets[offsets.len() - 1].as_usize());
    let (data, inner) = dense(&list.values().slice(first, last - first), dtype)?;
    let ends = offsets[1..].iter().map(|o| inner.begin(o.as_usize() - first)).collect();
    Ok((data, Lengths::Ends(ends)))
}

fn numbers(array: &ArrayRef, dtype: DType) -> Result<Vec<u8>, String> {
    if array.is_empty() {
        return Ok(Vec::new());
    }
    let target = arrow_type(dtype).ok_or_else(|| format!("cannot become {}", dtype.hlo_name()))?;
    check_lossless(array.data_type(), &target)?;
    let options = CastOptions { safe: false, format_options: FormatOptions::default() };
    let cast =
        cast_with_options(array, &target, &options).map_err(|e| format!("cannot become {}: {e}", dtype.hlo_name()))?;
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
