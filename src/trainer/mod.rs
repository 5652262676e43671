//! The I/O side of training: reads data ahead of the loop and hands it over batch by batch.
//!
//! `trainer` knows nothing of plans and workers.

mod arrays;
mod blob;
mod bucket;
mod feeder;
mod groups;
mod order;
mod profiled;
mod shelf;
mod source;
mod table;

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

pub use self::profiled::profiled;

use self::blob::Budget;
use self::bucket::Buckets;
use self::order::Order;
use self::source::Samples;
use self::table::Wanted;
use crate::api::{Data, Shuffle};
use crate::graph::Manifest;
use crate::graph::error::closest;
use crate::wire::{Batch, Position, Tensor};

/// What can be wrong with training data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("data {file}: {problem}")]
    File { file: String, problem: String },
    #[error(
        "data {uri}: {samples} samples, fewer than the {batch} of one batch; give more data or export a smaller batch"
    )]
    TooFew { uri: String, samples: u64, batch: u64 },
    #[error(
        "data {uri}: {samples} samples need rows of {bucket}, fewer than the {batch} of one batch, and smaller ones \
         cannot be padded to it; give more data or export a smaller batch"
    )]
    TooFewOfShape { uri: String, bucket: String, samples: u64, batch: u64 },
    #[error("spec.data.columns: {name:?} is not a batch tensor of this model{hint}")]
    UnknownTensor { name: String, hint: String },
    #[error("the bundle has no variant for microbatches of {microbatch} rows, only for {known:?}")]
    NoVariant { microbatch: u64, known: Vec<u64> },
    #[error("feeder on {socket}: {problem}")]
    Feeder { socket: String, problem: String },
}

impl DataError {
    fn file(file: &str, problem: String) -> Self {
        DataError::File { file: file.to_owned(), problem }
    }
}

/// Decoding foreign data. The Parquet and Arrow decoders check files carefully but not everywhere: a few flipped bits
/// still make them index out of bounds, and that must not take the training down.
fn guarded<T>(
    decode: impl FnOnce() -> Result<T, DataError>,
    failed: impl Fn(String) -> DataError,
) -> Result<T, DataError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(decode)).unwrap_or_else(|panic| {
        let why = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
        Err(failed(format!("damaged: the decoder gave up ({})", why.unwrap_or("no reason given"))))
    })
}

/// Memory for what is unpacked, fetched or converted; more of it is kept on disk.
const MEMORY: u64 = 1 << 30;

/// Batches, read ahead by a thread of its own into a bounded queue.
pub struct Reader {
    batches: Receiver<Result<Batch, DataError>>,
    /// Whole batches of one pass; `None` when a feeder decides.
    pub n_batches: Option<u64>,
}

impl Reader {
    /// Opens the data and starts to read at `position`. Batches have the shapes of the variants of one `microbatch`
    /// size. `settings`: credentials and endpoints of object stores, under the names that cloud tools use
    /// (`AWS_ACCESS_KEY_ID`); others are ignored.
    pub fn open(
        data: &Data,
        manifest: &Manifest,
        microbatch: u64,
        seed: u64,
        position: Position,
        settings: &[(String, String)],
    ) -> Result<Self, DataError> {
        if let Some(name) = data.columns.keys().find(|k| !manifest.batch.iter().any(|b| b.name == **k)) {
            let hint = closest(name, manifest.batch.iter().map(|b| b.name.as_str()));
            return Err(DataError::UnknownTensor { name: name.clone(), hint });
        }
        let wanted: Vec<Wanted> = manifest
            .batch
            .iter()
            .map(|b| Wanted { tensor: b.clone(), columns: data.columns.get(&b.name).cloned().unwrap_or_default() })
            .collect();
        let buckets = Buckets::new(manifest, microbatch);
        if buckets.all.is_empty() {
            let known = manifest.grad.iter().map(|g| g.microbatch).collect();
            return Err(DataError::NoVariant { microbatch, known });
        }
        let (queue, batches) = sync_channel(data.read_ahead.max(1) as usize);
        let budget = Budget::new(MEMORY);
        if let Some(socket) = &data.socket {
            feeder::listen(socket, wanted, buckets, manifest.batch_size, budget, queue)?;
            return Ok(Self { batches, n_batches: None });
        }
        let uri = data.uri.clone().unwrap_or_default();
        let samples = Samples::open(&uri, data.format, &wanted, &buckets, settings, &budget)?;
        let (n, batch) = (samples.len(), manifest.batch_size);
        if n < batch {
            return Err(DataError::TooFew { uri, samples: n, batch });
        }
        let seed = (data.shuffle == Shuffle::Epoch).then_some(seed);
        let order = if buckets.ragged() {
            let of = (0..n).map(|row| samples.bucket(row, &wanted, &buckets)).collect::<Result<Vec<_>, _>>()?;
            let groups = buckets.group(of.iter().copied(), batch).map_err(|bucket| {
                let samples = of.iter().filter(|&&b| b == bucket).count() as u64;
                DataError::TooFewOfShape { uri: uri.clone(), bucket: buckets.all[bucket].to_string(), samples, batch }
            })?;
            Order::of_buckets(groups, batch, seed)
        } else {
            Order::new(n, batch, seed)
        };
        let n_batches = Some(order.n_batches());
        let mut source = Source { samples, wanted, buckets, order, batch };
        let read = move || source.read(position, &queue);
        let spawned = std::thread::Builder::new().name("reader".to_owned()).spawn(read);
        spawned.map_err(|e| DataError::file(&uri, e.to_string()))?;
        Ok(Self { batches, n_batches })
    }
}

impl Iterator for Reader {
    type Item = Result<Batch, DataError>;

    /// The next batch; `None` when the data has ended (only a feeder's does).
    fn next(&mut self) -> Option<Self::Item> {
        self.batches.recv().ok()
    }
}

/// Everything that is needed to read a batch at any position.
struct Source {
    samples: Samples,
    wanted: Vec<Wanted>,
    buckets: Buckets,
    order: Order,
    batch: u64,
}

impl Source {
    /// Reads until the receiver is gone or the data cannot be read.
    fn read(&mut self, mut position: Position, queue: &SyncSender<Result<Batch, DataError>>) {
        loop {
            let batch = self.batch(position);
            let last = batch.is_err();
            position = batch.as_ref().map_or(position, |b| b.position);
            if queue.send(batch).is_err() || last {
                return;
            }
        }
    }

    fn batch(&mut self, position: Position) -> Result<Batch, DataError> {
        let take = self.order.take(position);
        let bucket = &self.buckets.all[take.bucket];
        let mut tensors = Vec::with_capacity(self.wanted.len());
        for (i, w) in self.wanted.iter().enumerate() {
            let shape = bucket.batch(i, self.batch);
            let row_bytes = bucket.rows[i].bytes().0 as usize;
            let mut data = Vec::with_capacity(shape.bytes().0 as usize);
            for (n, &row) in take.samples.iter().enumerate() {
                self.samples.row(i, &w.tensor.name, row, &mut data)?;
                data.resize((n + 1) * row_bytes, 0);
            }
            tensors.push(Tensor { shape, data: Bytes::from(data) });
        }
        Ok(Batch { position: take.after, variant: bucket.variant.clone(), tensors })
    }
}
