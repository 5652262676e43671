//! What the parent sends: batches go to the mailbox of the plan that will train on them, orders to the executor.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};

use super::RuntimeError;
use super::control::{Control, parse};
use super::link::Shared;
use super::mailbox::Source;
use super::prepare::Prepared;
use crate::device::Device;
use crate::tls::Reader;
use crate::wire::control::{MAX_CONTROL, ToParent, ToWorker};
use crate::wire::frame::{FrameError, Header, Kind, read_chunk, read_header};

/// Revisions this worker knows: prepared ones, and where batches go.
pub struct Revisions<D: Device> {
    inner: Mutex<Inner<D>>,
}

struct Inner<D: Device> {
    prepared: BTreeMap<u64, Prepared<D>>,
    known: BTreeMap<u64, Arc<Shared<D>>>,
    /// Trains on what comes in now.
    feeding: Option<Arc<Shared<D>>>,
    /// (revision, first step that it trains on).
    next: Option<(Arc<Shared<D>>, u64)>,
    incarnation: u32,
}

impl<D: Device> Revisions<D> {
    pub fn new() -> Self {
        let (prepared, known) = (BTreeMap::new(), BTreeMap::new());
        Self { inner: Mutex::new(Inner { prepared, known, feeding: None, next: None, incarnation: 0 }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<D>> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Keeps a prepared revision, unless it has been overtaken by a reset.
    pub fn insert(&self, prepared: Prepared<D>) -> bool {
        let mut inner = self.lock();
        let stamp = prepared.shared.stamp;
        if stamp.incarnation != inner.incarnation {
            return false;
        }
        inner.known.insert(stamp.revision, prepared.shared.clone());
        inner.prepared.insert(stamp.revision, prepared);
        true
    }

    pub fn take(&self, revision: u64) -> Result<Prepared<D>, RuntimeError> {
        self.lock().prepared.remove(&revision).ok_or_else(|| {
            let message = format!("revision {revision} has not been prepared");
            RuntimeError::Protocol { whom: "the parent".to_owned(), message }
        })
    }

    /// Forgets a revision.
    pub fn remove(&self, revision: u64) {
        let mut inner = self.lock();
        inner.prepared.remove(&revision);
        inner.known.remove(&revision);
    }

    /// Stops everything at once: whoever waits for a tensor gives up.
    fn reset(&self, incarnation: u32) {
        let mut inner = self.lock();
        inner.incarnation = incarnation;
        inner.prepared.clear();
        (inner.feeding, inner.next) = (None, None);
        for shared in std::mem::take(&mut inner.known).into_values() {
            shared.mailbox.fail(RuntimeError::Stopped("called back".to_owned()));
        }
    }

    /// Whether the executor waits for a tensor of a peer.
    fn is_waiting(&self) -> bool {
        self.lock().known.values().any(|shared| shared.mailbox.is_awaited())
    }

    /// Nobody will ever send again.
    fn fail(&self, fault: impl Fn() -> RuntimeError) {
        for shared in self.lock().known.values() {
            shared.mailbox.fail(fault());
        }
    }

    /// Follows the orders that change where batches go.
    fn note(&self, order: &ToWorker) {
        let mut inner = self.lock();
        match order {
            // A worker that replaces another one enters in a later incarnation.
            ToWorker::Prepare(order) => inner.incarnation = inner.incarnation.max(order.incarnation),
            ToWorker::Begin { revision, .. } => inner.feeding = inner.known.get(revision).cloned(),
            ToWorker::Commit { revision, step } => {
                inner.next = inner.known.get(revision).cloned().map(|shared| (shared, step + 1));
            }
            _ => {}
        }
    }

    /// Who trains on the batch of `step`.
    fn of_step(&self, step: u64) -> Option<Arc<Shared<D>>> {
        let mut inner = self.lock();
        if let Some((shared, _)) = inner.next.take_if(|(_, from)| step >= *from) {
            inner.feeding = Some(shared);
        }
        inner.feeding.clone()
    }
}

/// Reads until the parent says no more; the last order is why.
pub fn listen<D: Device>(
    stream: Reader,
    revisions: &Revisions<D>,
    control: &Control,
    idle: &AtomicBool,
    orders: &Sender<Result<ToWorker, RuntimeError>>,
) {
    if let Err(fault) = read(stream, revisions, control, idle, orders) {
        let message = fault.to_string();
        revisions.fail(|| RuntimeError::Protocol { whom: "the parent".to_owned(), message: message.clone() });
        let _ = orders.send(Err(fault));
    }
}

fn read<D: Device>(
    mut stream: Reader,
    revisions: &Revisions<D>,
    control: &Control,
    idle: &AtomicBool,
    orders: &Sender<Result<ToWorker, RuntimeError>>,
) -> Result<(), RuntimeError> {
    let link = |source| RuntimeError::Link { whom: "the parent".to_owned(), source };
    let mut variant = String::new();
    loop {
        let header = read_header(&mut stream).map_err(link)?;
        if header.kind == Kind::Batch {
            upload(&mut stream, header, revisions, &variant)?;
            continue;
        }
        if header.total > MAX_CONTROL {
            return Err(link(FrameError::MessageTooLong { found: header.total, limit: MAX_CONTROL }));
        }
        let message = read_rest(&mut stream, header).map_err(link)?;
        let order: ToWorker = parse(header.kind, &message, "the parent")?;
        revisions.note(&order);
        match &order {
            ToWorker::Step { variant: next, .. } => variant.clone_from(next),
            ToWorker::Reset { incarnation } => revisions.reset(*incarnation),
            ToWorker::Ping => {
                let waiting = idle.load(Ordering::SeqCst) || revisions.is_waiting();
                control.send(&ToParent::Pong { waiting })?;
                continue;
            }
            _ => {}
        }
        if orders.send(Ok(order)).is_err() {
            return Ok(());
        }
    }
}

/// Cuts the rows of a batch tensor into microbatches and uploads them ahead of the executor.
fn upload<D: Device>(
    stream: &mut Reader,
    header: Header,
    revisions: &Revisions<D>,
    variant: &str,
) -> Result<(), RuntimeError> {
    let link = |source| RuntimeError::Link { whom: "the parent".to_owned(), source };
    let protocol = |message: String| RuntimeError::Protocol { whom: "the parent".to_owned(), message };
    let shared = revisions.of_step(header.step).ok_or_else(|| protocol("a batch before its plan".to_owned()))?;
    let grad = shared.model.variant(variant).ok_or_else(|| protocol("a batch before its step".to_owned()))?;
    let spec = grad.batch.get(header.channel as usize);
    let spec = spec.ok_or_else(|| protocol(format!("batch tensor {} is unknown", header.channel)))?;
    let shape = spec.array();
    let slice = shape.bytes().0 as usize;
    let n_microbatches = shared.plan.n_microbatches;
    let total = slice as u64 * u64::from(n_microbatches);
    if header.total != total {
        return Err(link(FrameError::MessageTooLong { found: header.total, limit: total }));
    }
    let rows = read_rest(stream, header).map_err(link)?;
    for m in 0..n_microbatches as usize {
        let at = |source| RuntimeError::Device { at: format!("uploading batch tensor {}", spec.name), source };
        let buffer = shared.device.upload(&shape, &rows[m * slice..(m + 1) * slice]).map_err(at)?;
        shared.mailbox.put((header.step, Source::Batch(header.channel), m as u32), Arc::new(buffer));
    }
    Ok(())
}

/// The message whose first header has been read.
fn read_rest(stream: &mut Reader, first: Header) -> Result<Vec<u8>, FrameError> {
    let mut message = vec![0; first.total as usize];
    let mut header = first;
    let mut expected = 0;
    loop {
        let Header { offset, chunk, total, .. } = header;
        let same = (header.kind, header.channel, total) == (first.kind, first.channel, first.total);
        if offset != expected || !same || (chunk == 0 && total > 0) {
            return Err(FrameError::OutOfOrder { offset, chunk, total, expected });
        }
        expected += u64::from(chunk);
        read_chunk(stream, &header, &mut message[offset as usize..expected as usize])?;
        if expected == total {
            return Ok(message);
        }
        header = read_header(stream)?;
    }
}
