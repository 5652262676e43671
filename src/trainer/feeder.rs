//! A feeder: any program that connects to a Unix socket and writes batches as an Arrow IPC stream.
//!
//! # Expected flow
//! The trainer listens; one feeder connects and writes record batches whose rows are samples. Rows are put together to
//! global batches in the order they come. The end of the stream is the end of the data.
//!
//! # Caveats
//! A rest of rows smaller than a batch at the end is dropped. Position counts rows; going on from one is the feeder's
//! own business.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;

use arrow::ipc::reader::StreamReader;
use bytes::Bytes;

use super::blob::Budget;
use super::bucket::Buckets;
use super::source::Samples;
use super::table::{Table, Wanted};
use super::{DataError, guarded};
use crate::wire::{Batch, Position, Tensor};

/// Listens on `socket` and reads the first program that connects, on a thread of its own.
pub fn listen(
    socket: &str,
    wanted: Vec<Wanted>,
    buckets: Buckets,
    batch_size: u64,
    budget: Budget,
    queue: SyncSender<Result<Batch, DataError>>,
) -> Result<(), DataError> {
    let problem = |p: String| DataError::Feeder { socket: socket.to_owned(), problem: p };
    let path = PathBuf::from(socket);
    // A socket file without a listener is left from an earlier run.
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        return Err(problem("another process listens there".to_owned()));
    }
    let stale =
        std::fs::symlink_metadata(&path).is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_socket(&m.file_type()));
    if stale {
        std::fs::remove_file(&path).map_err(|e| problem(e.to_string()))?;
    }
    let listener = UnixListener::bind(&path).map_err(|e| problem(e.to_string()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(|e| problem(e.to_string()))?;
    let socket = socket.to_owned();
    let work = move || {
        let result = guarded(
            || feed(&listener, &socket, &wanted, &buckets, batch_size, &budget, &queue),
            |p| DataError::Feeder { socket: socket.clone(), problem: p },
        );
        let _ = std::fs::remove_file(&path);
        if let Err(e) = result {
            let _ = queue.send(Err(e));
        }
    };
    std::thread::Builder::new().name("feeder".to_owned()).spawn(work).map(drop).map_err(|e| problem(e.to_string()))
}

fn feed(
    listener: &UnixListener,
    socket: &str,
    wanted: &[Wanted],
    buckets: &Buckets,
    batch_size: u64,
    budget: &Budget,
    queue: &SyncSender<Result<Batch, DataError>>,
) -> Result<(), DataError> {
    let problem = |p: String| DataError::Feeder { socket: socket.to_owned(), problem: p };
    let (stream, _) = listener.accept().map_err(|e| problem(e.to_string()))?;
    let mut stream = BufReader::new(stream);
    if stream.fill_buf().map_err(|e| problem(e.to_string()))?.is_empty() {
        return Err(problem("the connection was closed before anything was written".to_owned()));
    }
    let stream = StreamReader::try_new(stream, None).map_err(|e| problem(format!("not an Arrow IPC stream: {e}")))?;
    // By bucket and tensor.
    let mut waiting: Vec<Vec<Vec<u8>>> = vec![vec![Vec::new(); wanted.len()]; buckets.all.len()];
    let mut rows_waiting = vec![0; buckets.all.len()];
    let mut position = Position::default();
    for batch in stream {
        let batch = batch.map_err(|e| problem(format!("the stream broke after {} rows: {e}", position.sample)))?;
        let mut table = Table::new(wanted, budget);
        table.begin(socket, position.sample);
        table.append(&batch, wanted, buckets)?;
        let mut rows = Samples::Table(table);
        for row in 0..rows.len() {
            let b = if buckets.ragged() { rows.bucket(row, wanted, buckets)? } else { 0 };
            let bucket = &buckets.all[b];
            position.sample += 1;
            rows_waiting[b] += 1;
            for (i, w) in wanted.iter().enumerate() {
                let data = &mut waiting[b][i];
                rows.row(i, &w.tensor.name, row, data)?;
                data.resize(rows_waiting[b] * bucket.rows[i].bytes().0 as usize, 0);
            }
            if (rows_waiting[b] as u64) < batch_size {
                continue;
            }
            rows_waiting[b] = 0;
            let tensor =
                |(i, data)| Tensor { shape: bucket.batch(i, batch_size), data: Bytes::from(std::mem::take(data)) };
            let tensors = waiting[b].iter_mut().enumerate().map(tensor).collect();
            if queue.send(Ok(Batch { position, variant: bucket.variant.clone(), tensors })).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}
