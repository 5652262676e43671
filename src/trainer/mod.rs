//! The I/O side of training: reads data ahead of the loop and hands it over batch by batch.
//!
//! `trainer` knows nothing of plans and workers.

mod feeder;
mod order;
mod source;
mod table;

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

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
    #[error("spec.data.columns: {name:?} is not a batch tensor of this model{hint}")]
    UnknownTensor { name: String, hint: String },
    #[error("feeder on {socket}: {problem}")]
    Feeder { socket: String, problem: String },
}

impl DataError {
    fn file(file: &str, problem: String) -> Self {
        DataError::File { file: file.to_owned(), problem }
    }
}

/// Batches, read ahead by a thread of its own into a bounded queue.
pub struct Reader {
    batches: Receiver<Result<Batch, DataError>>,
    /// Samples of one pass; `None` when a feeder decides.
    pub n_samples: Option<u64>,
}

impl Reader {
    /// Opens the data and starts to read at `position`. `settings`: credentials and endpoints of object stores, under
    /// the names that cloud tools use (`AWS_ACCESS_KEY_ID`); others are ignored.
    pub fn open(
        data: &Data,
        manifest: &Manifest,
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
        let (queue, batches) = sync_channel(data.read_ahead.max(1) as usize);
        if let Some(socket) = &data.socket {
            feeder::listen(socket, wanted, manifest.batch_size, queue)?;
            return Ok(Self { batches, n_samples: None });
        }
        let uri = data.uri.clone().unwrap_or_default();
        let samples = Samples::read(&uri, data.format, &wanted, settings)?;
        let (n, batch) = (samples.len(), manifest.batch_size);
        if n < batch {
            return Err(DataError::TooFew { uri, samples: n, batch });
        }
        let order = Order::new(n, (data.shuffle == Shuffle::Epoch).then_some(seed));
        let read = move || read(&samples, &wanted, order, batch, position, &queue);
        let spawned = std::thread::Builder::new().name("reader".to_owned()).spawn(read);
        spawned.map_err(|e| DataError::file(&uri, e.to_string()))?;
        Ok(Self { batches, n_samples: Some(n) })
    }
}

impl Iterator for Reader {
    type Item = Result<Batch, DataError>;

    /// The next batch; `None` when the data has ended (only a feeder's does).
    fn next(&mut self) -> Option<Self::Item> {
        self.batches.recv().ok()
    }
}

/// Reads until the receiver is gone.
fn read(
    samples: &Samples,
    wanted: &[Wanted],
    order: Order,
    rows: u64,
    mut position: Position,
    queue: &SyncSender<Result<Batch, DataError>>,
) {
    loop {
        let (begin, end) = order.batch(position, rows);
        let indices: Vec<u64> =
            (begin.sample..end.sample).map(|sample| order.at(Position { sample, ..begin })).collect();
        let tensors = wanted
            .iter()
            .enumerate()
            .map(|(i, w)| {
                let shape = w.tensor.array();
                let mut data = Vec::with_capacity(shape.bytes().0 as usize);
                indices.iter().for_each(|&row| samples.row(i, &w.tensor.name, row, &mut data));
                Tensor { shape, data: Bytes::from(data) }
            })
            .collect();
        position = end;
        if queue.send(Ok(Batch { position, tensors })).is_err() {
            return;
        }
    }
}
