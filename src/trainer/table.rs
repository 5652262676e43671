//! Rows of a data set in the types of the batch, read one by one from where they lie.

use std::sync::Arc;

use arrow::array::RecordBatch;

use super::DataError;
use super::arrays::{Part, parts};
use super::blob::{Blob, Budget};
use super::bucket::Buckets;
use super::shelf::copying;
use crate::graph::manifest::TensorSpec;
use crate::graph::{ArrayShape, DType};

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

/// One column of rows per batch tensor.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    /// By their first row.
    files: Vec<Origin>,
}

/// A file of the table.
#[derive(Debug)]
struct Origin {
    name: String,
    first: u64,
    /// Number of the first row, for messages.
    number: u64,
}

#[derive(Debug)]
struct Column {
    name: String,
    dtype: DType,
    n_rows: u64,
    /// By their first row.
    runs: Vec<Run>,
    /// Converted rows.
    copy: Blob,
}

/// Rows of one column that lie one after the other.
#[derive(Debug)]
struct Run {
    first: u64,
    /// `None`: in the column's own copy.
    file: Option<Arc<Blob>>,
    at: u64,
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    /// All have so many bytes.
    Even(u64),
    /// Where each ends, from the run's begin.
    Uneven(Vec<u64>),
}

impl Table {
    pub fn new(wanted: &[Wanted], budget: &Budget) -> Self {
        let column = |w: &Wanted| Column {
            name: w.tensor.name.clone(),
            dtype: w.tensor.dtype,
            n_rows: 0,
            runs: Vec::new(),
            copy: Blob::new(budget),
        };
        Self { columns: wanted.iter().map(column).collect(), files: Vec::new() }
    }

    pub fn n_rows(&self) -> u64 {
        self.columns.iter().map(|c| c.n_rows).max().unwrap_or(0)
    }

    /// The rows that follow belong to this file. `number`: what messages call the first.
    pub fn begin(&mut self, file: &str, number: u64) {
        self.files.push(Origin { name: file.to_owned(), first: self.n_rows(), number });
    }

    /// Takes an array of a file as rows of one tensor, without reading it. `shape`: its leading axis is rows.
    pub fn lay(&mut self, tensor: usize, blob: &Arc<Blob>, at: u64, shape: &ArrayShape) {
        let n_rows = shape.dims.first().copied().unwrap_or(0);
        let row = ArrayShape::new(shape.dtype, shape.dims.get(1..).unwrap_or_default()).bytes().0;
        let column = &mut self.columns[tensor];
        column.runs.push(Run { first: column.n_rows, file: Some(blob.clone()), at, rows: Rows::Even(row) });
        column.n_rows += n_rows;
    }

    /// All tensors of a file must have equally many rows.
    pub fn end(&self) -> Result<(), DataError> {
        let (file, expected) = self.origin(self.n_rows());
        match self.columns.iter().find(|c| c.n_rows != self.n_rows()) {
            Some(short) => {
                let (name, found) = (&short.name, self.origin(short.n_rows).1);
                Err(DataError::file(file, format!("{name:?} has {found} rows, another tensor has {expected}")))
            }
            None => Ok(()),
        }
    }

    /// Appends the rows of an Arrow batch.
    pub fn append(&mut self, batch: &RecordBatch, wanted: &[Wanted], buckets: &Buckets) -> Result<(), DataError> {
        let (file, first) = self.origin(self.n_rows());
        let file = &file.to_owned();
        for (column, w) in self.columns.iter_mut().zip(wanted) {
            let parts = parts(file, first, batch, w)?;
            let rows = batch.num_rows();
            let width = w.tensor.dtype.size();
            let values = |row: usize| parts.iter().map(|p| p.lengths.range(row).len() as u64).sum::<u64>();
            let per_row = w.row().n_elements();
            if !buckets.ragged()
                && let Some(row) = (0..rows).find(|&r| values(r) != per_row)
            {
                return Err(DataError::file(
                    file,
                    format!(
                        "batch tensor {:?} takes {per_row} values per row ({}), column {} gives {} in row {}; name \
                         its columns under spec.data.columns",
                        w.tensor.name,
                        w.row(),
                        parts.iter().map(|p| format!("{:?}", p.name)).collect::<Vec<_>>().join(", "),
                        values(row),
                        first + row as u64
                    ),
                ));
            }
            let at = column.copy.len();
            let joined;
            let data = match &parts[..] {
                [whole] => &whole.data,
                _ => {
                    joined = join(&parts, rows, width as usize);
                    &joined
                }
            };
            column.copy.append(data).map_err(|e| DataError::file(file, copying(&e)))?;
            let mut end = 0;
            let ends = (0..rows).map(|r| {
                end += values(r) * width;
                end
            });
            match column.runs.last_mut() {
                // Even rows all have the same size, so the copy is one run.
                Some(_) if !buckets.ragged() => {}
                _ => {
                    let rows =
                        if buckets.ragged() { Rows::Uneven(ends.collect()) } else { Rows::Even(per_row * width) };
                    column.runs.push(Run { first: column.n_rows, file: None, at, rows });
                }
            }
            column.n_rows += rows as u64;
        }
        Ok(())
    }

    /// Bytes of one row of one tensor.
    pub fn row_bytes(&self, tensor: usize, row: u64) -> u64 {
        let (_, begin, end) = self.columns[tensor].place(row);
        end - begin
    }

    /// Appends one row of one tensor to `out`.
    pub fn row(&self, tensor: usize, row: u64, out: &mut Vec<u8>) -> Result<(), DataError> {
        let column = &self.columns[tensor];
        let (run, begin, end) = column.place(row);
        let blob = run.file.as_deref().unwrap_or(&column.copy);
        let from = out.len();
        out.resize(from + (end - begin) as usize, 0);
        blob.read_at(begin, &mut out[from..]).map_err(|e| {
            let (file, row) = self.origin(row);
            DataError::file(file, format!("row {row} cannot be read: {e}; did the file change?"))
        })?;
        if column.dtype == DType::Bool {
            out[from..].iter_mut().for_each(|b| *b = u8::from(*b != 0));
        }
        Ok(())
    }

    /// The file of a row, and the row's number in it.
    pub fn origin(&self, row: u64) -> (&str, u64) {
        let file = self.files.partition_point(|f| f.first <= row);
        let file = self.files.get(file.saturating_sub(1));
        file.map_or(("", row), |f| (&f.name, f.number + row.saturating_sub(f.first)))
    }
}

impl Column {
    /// The run of a row, and the row's begin and end in the run's blob.
    fn place(&self, row: u64) -> (&Run, u64, u64) {
        let run = &self.runs[self.runs.partition_point(|r| r.first <= row) - 1];
        let i = row - run.first;
        let (begin, end) = match &run.rows {
            Rows::Even(bytes) => (i * bytes, (i + 1) * bytes),
            Rows::Uneven(ends) => (i.checked_sub(1).map_or(0, |b| ends[b as usize]), ends[i as usize]),
        };
        (run, run.at + begin, run.at + end)
    }
}

/// Rows of several parts, one after the other.
fn join(parts: &[Part], rows: usize, width: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(parts.iter().map(|p| p.data.len()).sum());
    for row in 0..rows {
        for part in parts {
            let range = part.lengths.range(row);
            out.extend_from_slice(&part.data[range.start * width..range.end * width]);
        }
    }
    out
}
