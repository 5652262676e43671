//! Parquet files: a row group is converted when the first of its rows is needed, and kept.

use std::sync::Arc;

use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};

use super::arrays::resolve;
use super::blob::{Blob, Budget, Chunks};
use super::bucket::Buckets;
use super::source::ROWS;
use super::table::{Table, Wanted};
use super::{DataError, guarded};

/// Rows of Parquet files.
#[derive(Debug)]
pub struct Groups {
    wanted: Vec<Wanted>,
    buckets: Buckets,
    files: Vec<ParquetFile>,
    /// By their first row.
    groups: Vec<Group>,
    n_rows: u64,
    /// Uncompressed, as the files say.
    bytes: u64,
    /// In the order in which they were needed.
    converted: Table,
}

#[derive(Debug)]
struct ParquetFile {
    name: String,
    blob: Arc<Blob>,
    metadata: ArrowReaderMetadata,
    mask: ProjectionMask,
    first: u64,
}

#[derive(Debug)]
struct Group {
    file: usize,
    /// Its number in the file.
    index: usize,
    first: u64,
    rows: u64,
    /// Its first row among the converted.
    at: Option<u64>,
}

impl Groups {
    pub fn new(wanted: &[Wanted], buckets: &Buckets, budget: &Budget) -> Self {
        Self {
            wanted: wanted.to_vec(),
            buckets: buckets.clone(),
            files: Vec::new(),
            groups: Vec::new(),
            n_rows: 0,
            bytes: 0,
            converted: Table::new(wanted, budget),
        }
    }

    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes the rows of a file, which follow those of the files before.
    pub fn add(&mut self, name: &str, blob: Arc<Blob>) -> Result<(), DataError> {
        let problem = |p: String| DataError::file(name, p);
        let load =
            || ArrowReaderMetadata::load(&Chunks(blob.clone()), Default::default()).map_err(|e| problem(e.to_string()));
        let metadata = guarded(load, problem)?;
        let mut columns = Vec::new();
        for w in &self.wanted {
            columns.extend(resolve(metadata.schema(), w).map_err(problem)?);
        }
        let mask = ProjectionMask::roots(metadata.parquet_schema(), columns);
        let first = self.n_rows;
        for (index, group) in metadata.metadata().row_groups().iter().enumerate() {
            let rows = u64::try_from(group.num_rows()).ok().filter(|n| self.n_rows.checked_add(*n).is_some());
            let rows =
                rows.ok_or_else(|| problem(format!("damaged: row group {index} has {} rows", group.num_rows())))?;
            self.groups.push(Group { file: self.files.len(), index, first: self.n_rows, rows, at: None });
            self.n_rows += rows;
            self.bytes = self.bytes.saturating_add(group.total_byte_size().max(0) as u64);
        }
        self.files.push(ParquetFile { name: name.to_owned(), blob, metadata, mask, first });
        Ok(())
    }

    /// Converts everything now.
    pub fn whole(mut self) -> Result<Table, DataError> {
        for group in 0..self.groups.len() {
            self.convert(group)?;
        }
        Ok(self.converted)
    }

    /// Appends one row of one tensor to `out`.
    pub fn row(&mut self, tensor: usize, row: u64, out: &mut Vec<u8>) -> Result<(), DataError> {
        let group = self.groups.partition_point(|g| g.first <= row) - 1;
        let at = match self.groups[group].at {
            Some(at) => at,
            None => self.convert(group)?,
        };
        self.converted.row(tensor, at + row - self.groups[group].first, out)
    }

    /// Where the rows of a group are, now that they are converted.
    fn convert(&mut self, group: usize) -> Result<u64, DataError> {
        let group = &mut self.groups[group];
        let file = &self.files[group.file];
        let table = &mut self.converted;
        let at = table.n_rows();
        let problem = |p: String| DataError::file(&file.name, p);
        let failed = |e: parquet::errors::ParquetError| problem(format!("row group {}: {e}", group.index));
        table.begin(&file.name, group.first - file.first);
        let decode = || {
            let chunks = Chunks(file.blob.clone());
            let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(chunks, file.metadata.clone())
                .with_row_groups(vec![group.index])
                .with_projection(file.mask.clone())
                .with_batch_size(ROWS)
                .build()
                .map_err(failed)?;
            for batch in reader {
                let batch = batch.map_err(|e| problem(format!("row group {}: {e}", group.index)))?;
                table.append(&batch, &self.wanted, &self.buckets)?;
            }
            Ok(())
        };
        guarded(decode, problem)?;
        let found = table.n_rows() - at;
        if found != group.rows {
            return Err(problem(format!("row group {} has {found} rows, the file says {}", group.index, group.rows)));
        }
        group.at = Some(at);
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int32Array, RecordBatch};

    use super::*;
    use crate::graph::DType;
    use crate::graph::manifest::TensorSpec;

    #[test]
    fn groups_are_converted_when_needed_and_only_then() {
        let y: ArrayRef = Arc::new(Int32Array::from_iter_values(0..1000));
        let batch = RecordBatch::try_from_iter([("unused", y.clone()), ("y", y)]).unwrap();
        let properties =
            parquet::file::properties::WriterProperties::builder().set_max_row_group_row_count(Some(100)).build();
        let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        // Too little memory for what is converted.
        let budget = Budget::new(600);
        let mut blob = Blob::new(&budget);
        blob.append(&writer.into_inner().unwrap()).unwrap();
        let blob = Arc::new(blob);
        let tensor = TensorSpec { name: "y".to_owned(), dtype: DType::Int32, shape: vec![4] };
        let wanted = [Wanted { tensor, columns: Vec::new() }];
        let mut groups = Groups::new(&wanted, &Buckets::of_rows(&wanted), &budget);
        groups.add("a.parquet", blob.clone()).unwrap();
        groups.add("b.parquet", blob).unwrap();
        assert_eq!(groups.n_rows(), 2000);
        for row in [250u64, 1999, 299, 1250, 200, 1, 1000] {
            let mut found = Vec::new();
            groups.row(0, row, &mut found).unwrap();
            assert_eq!(found, (row as i32 % 1000).to_le_bytes());
        }
        let converted: Vec<usize> = (0..20).filter(|&g| groups.groups[g].at.is_some()).collect();
        assert_eq!(converted, [0, 2, 10, 12, 19]);
    }
}
