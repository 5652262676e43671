//! Shapes that a batch may have: rows of variable length are padded with zeros to the smallest that holds them.

use std::collections::BTreeMap;

use super::table::Wanted;
use crate::graph::{ArrayShape, Manifest};

/// The shapes of a model's batch, smallest first.
#[derive(Clone, Debug)]
pub struct Buckets {
    pub all: Vec<Bucket>,
    /// By batch tensor: its shapes differ in the first axis of a row only, so that rows can be padded along it.
    padded: Vec<bool>,
}

/// One shape of the batch.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// The manifest's variant of this shape.
    pub variant: String,
    /// Shape of one row, by batch tensor.
    pub rows: Vec<ArrayShape>,
}

impl Bucket {
    /// Shape of one tensor of a batch.
    pub fn batch(&self, tensor: usize, rows: u64) -> ArrayShape {
        let row = &self.rows[tensor];
        ArrayShape::new(row.dtype, [&[rows], &row.dims[..]].concat())
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows: Vec<String> = self.rows.iter().map(ToString::to_string).collect();
        f.write_str(&rows.join(" and "))
    }
}

impl Buckets {
    /// The shapes of the variants with this microbatch size.
    pub fn new(manifest: &Manifest, microbatch: u64) -> Self {
        let mut by_shape = BTreeMap::new();
        for grad in manifest.grad.iter().filter(|g| g.microbatch == microbatch) {
            let row = |t: &crate::graph::manifest::TensorSpec| ArrayShape::new(t.dtype, t.shape[1..].to_vec());
            let rows: Vec<ArrayShape> = manifest.microbatch_tensors(grad).iter().map(row).collect();
            let size: u64 = rows.iter().map(ArrayShape::n_elements).fold(0, u64::saturating_add);
            let dims: Vec<Vec<u64>> = rows.iter().map(|r| r.dims.to_vec()).collect();
            by_shape.entry((size, dims)).or_insert_with(|| Bucket { variant: grad.name.clone(), rows });
        }
        let all: Vec<Bucket> = by_shape.into_values().collect();
        let padded = manifest.padded(microbatch);
        Self { all, padded }
    }

    /// Rows that all have the batch's shape.
    #[cfg(test)]
    pub fn of_rows(wanted: &[Wanted]) -> Self {
        let rows = wanted.iter().map(Wanted::row).collect();
        Self { all: vec![Bucket { variant: "only".to_owned(), rows }], padded: vec![false; wanted.len()] }
    }

    /// Whether rows may differ in length.
    pub fn ragged(&self) -> bool {
        self.all.len() > 1
    }

    /// The smallest bucket for a row with so many values of each tensor.
    pub fn smallest(&self, values: &[u64]) -> Option<usize> {
        (0..self.all.len()).find(|&b| (0..values.len()).all(|i| self.holds(b, i, values[i])))
    }

    /// Whether a bucket takes so many values of one tensor.
    pub fn holds(&self, bucket: usize, tensor: usize, values: u64) -> bool {
        let shape = &self.all[bucket].rows[tensor];
        let inner = shape.dims.iter().skip(1).fold(1u64, |n, &d| n.saturating_mul(d));
        let n = shape.n_elements();
        values == n || (self.padded[tensor] && values < n && inner > 0 && values.is_multiple_of(inner))
    }

    /// Whether a bucket takes all rows of another.
    fn covers(&self, larger: usize, smaller: usize) -> bool {
        let rows = &self.all[smaller].rows;
        rows.iter().enumerate().all(|(i, row)| self.holds(larger, i, row.n_elements()))
    }

    /// Rows by bucket, such that every bucket that has any fills a batch: too few rows join the next larger bucket;
    /// the largest is filled up from smaller ones. The error is a bucket that cannot be filled.
    pub fn group(&self, bucket_of: impl Iterator<Item = usize>, batch: u64) -> Result<Vec<Vec<u64>>, usize> {
        let mut groups = vec![Vec::new(); self.all.len()];
        bucket_of.zip(0u64..).for_each(|(bucket, row)| groups[bucket].push(row));
        let short = |group: &Vec<u64>| !group.is_empty() && (group.len() as u64) < batch;
        for bucket in 0..groups.len() {
            if short(&groups[bucket])
                && let Some(larger) = (bucket + 1..groups.len()).find(|&l| self.covers(l, bucket))
            {
                let rows = std::mem::take(&mut groups[bucket]);
                groups[larger].extend(rows);
                groups[larger].sort_unstable();
            }
        }
        for bucket in (0..groups.len()).rev() {
            for smaller in (0..bucket).rev() {
                if short(&groups[bucket]) && self.covers(bucket, smaller) {
                    let missing = batch as usize - groups[bucket].len();
                    let from = &mut groups[smaller];
                    // A rest that fills no batch of its own comes along.
                    let keep = Some(from.len().saturating_sub(missing)).filter(|&k| k as u64 >= batch).unwrap_or(0);
                    let rows = from.split_off(keep);
                    groups[bucket].extend(rows);
                    groups[bucket].sort_unstable();
                }
            }
            if short(&groups[bucket]) {
                return Err(bucket);
            }
        }
        Ok(groups)
    }

    /// Why no bucket takes a row.
    pub fn misfit(&self, wanted: &[Wanted], values: &[u64]) -> String {
        let tensor = (0..values.len()).find(|&i| !(0..self.all.len()).any(|b| self.holds(b, i, values[i])));
        match tensor {
            Some(i) => format!(
                "{} values for batch tensor {:?}; the bundle has batches of rows {}, export a larger bucket or cut the \
                 row",
                values[i],
                wanted[i].tensor.name,
                self.list(i)
            ),
            None => {
                let each: Vec<String> =
                    wanted.iter().zip(values).map(|(w, v)| format!("{v} for {:?}", w.tensor.name)).collect();
                format!("no bucket of the bundle takes {} values together", each.join(" and "))
            }
        }
    }

    /// What the buckets are, for messages.
    pub fn list(&self, tensor: usize) -> String {
        self.all.iter().map(|b| b.rows[tensor].to_string()).collect::<Vec<_>>().join(", ")
    }
}
