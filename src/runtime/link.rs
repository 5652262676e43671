//! Links: one TCP connection per pair of workers, with a thread for each direction.
//!
//! # Expected flow
//! The executor hands over device buffers and goes on computing; the sender downloads and writes them in order. The
//! receiver reads, checks, uploads, and puts the value in the mailbox.
//!
//! Every revision of the plan has connections of its own: what is left of an old one cannot be taken for the new one's.
//!
//! # Guarantees
//! A frame reaches the mailbox only if revision, incarnation, step, channel, size and checksum fit. At most
//! [`QUEUE`] messages wait per link; a receiver never waits for the executor, so two full queues cannot lock up.

use std::collections::BTreeMap;
use std::io::{BufReader, BufWriter, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::mailbox::{Mailbox, Source};
use super::wiring::{Rank, Wiring, gradient_shape};
use super::{Fenced, RuntimeError};
use crate::device::Device;
use crate::graph::{ArrayShape, Model};
use crate::plan::Plan;
use crate::tls::{Reader, Stream, Writer};
use crate::wire::control::{Span, WorkerId};
use crate::wire::frame::{FrameError, Header, Kind, read_chunk, read_header, write_message};

/// Messages that may wait for a sender: one on the wire, one behind it.
const QUEUE: usize = 2;
/// Steps a peer may be ahead: the parent feeds two, and what an update sends is stamped with the step after it.
const AHEAD: u64 = 3;

/// What every frame of this run carries.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    pub revision: u64,
    pub incarnation: u32,
}

impl Stamp {
    /// Between parent and worker, whatever the plan.
    pub const NONE: Self = Self { revision: 0, incarnation: 0 };

    /// A header for one message; [`write_message`] fills in the lengths.
    pub fn header(self, kind: Kind, step: u64, channel: u32, microbatch: u32) -> Header {
        Header {
            kind,
            step,
            revision: self.revision,
            incarnation: self.incarnation,
            microbatch,
            channel,
            total: 0,
            offset: 0,
            chunk: 0,
            checksum: 0,
        }
    }
}

/// Tensors that leave together.
pub struct Outgoing<B> {
    pub kind: Kind,
    pub name: Arc<str>,
    pub step: u64,
    pub microbatch: u32,
    /// (channel, length in bytes, buffer).
    pub tensors: Vec<(u32, usize, Arc<B>)>,
}

/// The sending end of a connection to one peer.
pub struct Link<B> {
    queue: Option<SyncSender<Outgoing<B>>>,
    sender: Option<std::thread::JoinHandle<()>>,
    stream: TcpStream,
}

impl<B> Drop for Link<B> {
    fn drop(&mut self) {
        // Wakes both threads: the peer may be hung or gone.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// One revision at one worker: what the executor and the threads of all its links share.
pub struct Shared<D: Device> {
    pub device: Arc<D>,
    pub model: Arc<Model>,
    pub plan: Plan,
    pub wiring: Wiring,
    /// Workers by rank.
    pub seats: Vec<WorkerId>,
    /// `None` for a worker that serves the plan before this one and leaves at the cutover.
    pub me: Option<Rank>,
    pub stamp: Stamp,
    /// Owners, until the cutover to this revision, of what this worker gets then: by state tensor.
    pub incoming: BTreeMap<u32, WorkerId>,
    pub mailbox: Arc<Mailbox<D::Buffer>>,
    pub traffic: Traffic,
}

/// Counters since the last report.
#[derive(Default)]
pub struct Traffic {
    pub sent: AtomicU64,
    pub received: AtomicU64,
    /// Nanoseconds that receiving took.
    pub receiving: AtomicU64,
    /// Filled while the step is traced.
    pub spans: Mutex<Vec<Span>>,
    pub traced_until: AtomicU64,
}

impl Traffic {
    pub fn span(&self, step: u64, span: impl FnOnce() -> Span) {
        if step < self.traced_until.load(Ordering::Relaxed) {
            self.spans.lock().unwrap_or_else(|p| p.into_inner()).push(span());
        }
    }
}

impl<B: Send + Sync + 'static> Link<B> {
    /// Starts the two threads of a connection to `peer`.
    pub fn start<D: Device<Buffer = B>>(
        shared: &Arc<Shared<D>>,
        peer: WorkerId,
        stream: Stream,
    ) -> Result<Self, RuntimeError> {
        let failed = |source: std::io::Error| RuntimeError::Link { whom: whom(peer), source: source.into() };
        let (queue, outgoing) = sync_channel(QUEUE);
        let kept = stream.socket().try_clone().map_err(failed)?;
        let Stream { reader, writer } = stream;
        let spawn = |name: String, work: Box<dyn FnOnce() -> Result<(), RuntimeError> + Send>| {
            let mailbox = shared.mailbox.clone();
            std::thread::Builder::new()
                .name(name)
                .spawn(move || work().unwrap_or_else(|fault| mailbox.fail(fault)))
                .map_err(failed)
        };
        let (to_send, to_receive) = (shared.clone(), shared.clone());
        let sender = spawn(format!("to-{peer}"), Box::new(move || send(&to_send, peer, writer, &outgoing)))?;
        spawn(format!("from-{peer}"), Box::new(move || receive(&to_receive, peer, reader)))?;
        Ok(Self { queue: Some(queue), sender: Some(sender), stream: kept })
    }

    /// Queues a message; waits only while [`QUEUE`] others are ahead of it. After a fault of the sender the message is
    /// dropped: the mailbox knows.
    pub fn send(&self, message: Outgoing<B>) {
        if let Some(queue) = &self.queue {
            let _ = queue.send(message);
        }
    }

    /// Sends what is queued and closes the sending half.
    pub fn close(&mut self) {
        self.queue = None;
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
    }
}

pub fn whom(worker: WorkerId) -> String {
    format!("worker {worker}")
}

fn send<D: Device>(
    shared: &Shared<D>,
    peer: WorkerId,
    stream: Writer,
    outgoing: &Receiver<Outgoing<D::Buffer>>,
) -> Result<(), RuntimeError> {
    let broken = |source: std::io::Error| RuntimeError::Link { whom: whom(peer), source: source.into() };
    let mut out = BufWriter::with_capacity(256 << 10, stream);
    let mut host = Vec::new();
    while let Ok(message) = outgoing.recv() {
        let began = (now_us(), Instant::now());
        for (channel, len, buffer) in message.tensors {
            host.resize(len, 0);
            let at = |source| RuntimeError::Device { at: format!("downloading for worker {peer}"), source };
            shared.device.download(&buffer, &mut host).map_err(at)?;
            drop(buffer);
            let header = shared.stamp.header(message.kind, message.step, channel, message.microbatch);
            write_message(&mut out, header, &host).map_err(broken)?;
            shared.traffic.sent.fetch_add(len as u64, Ordering::Relaxed);
        }
        out.flush().map_err(broken)?;
        shared.traffic.span(message.step, || Span {
            kind: "send".to_owned(),
            name: format!("{} to {peer}", message.name),
            microbatch: Some(message.microbatch),
            start_us: began.0,
            duration_us: began.1.elapsed().as_micros() as u64,
        });
    }
    let mut stream = out.into_inner().map_err(|e| broken(e.into_error()))?;
    // The peer may have gone first.
    let _ = stream.close();
    Ok(())
}

fn receive<D: Device>(shared: &Shared<D>, peer: WorkerId, stream: Reader) -> Result<(), RuntimeError> {
    let mut input = BufReader::with_capacity(256 << 10, stream);
    let mut data = Vec::new();
    loop {
        let broken = |source| RuntimeError::Link { whom: whom(peer), source };
        let first = read_header(&mut input).map_err(broken)?;
        let began = (now_us(), Instant::now());
        let (source, shape) = fence(shared, peer, &first)?;
        data.resize(first.total as usize, 0);
        let mut header = first;
        loop {
            let Header { offset, chunk, total, .. } = header;
            let expected = offset + u64::from(chunk);
            read_chunk(&mut input, &header, &mut data[offset as usize..expected as usize]).map_err(broken)?;
            if expected == total {
                break;
            }
            header = read_header(&mut input).map_err(broken)?;
            let same = (header.channel, header.microbatch, header.step, header.total)
                == (first.channel, first.microbatch, first.step, first.total);
            if !same || header.offset != expected || header.chunk == 0 {
                let Header { offset, chunk, total, .. } = header;
                return Err(broken(FrameError::OutOfOrder { offset, chunk, total, expected }));
            }
        }
        shared.traffic.receiving.fetch_add(began.1.elapsed().as_nanos() as u64, Ordering::Relaxed);
        let at = |source| RuntimeError::Device { at: format!("uploading from worker {peer}"), source };
        let buffer = shared.device.upload(&shape, &data).map_err(at)?;
        shared.traffic.received.fetch_add(first.total, Ordering::Relaxed);
        let Header { step, channel, microbatch, .. } = first;
        shared.traffic.span(step, || Span {
            kind: "receive".to_owned(),
            name: format!("channel {channel} from {peer}"),
            microbatch: Some(microbatch),
            start_us: began.0,
            duration_us: began.1.elapsed().as_micros() as u64,
        });
        if !shared.mailbox.put((step, source, microbatch), Arc::new(buffer)) {
            return Err(Fenced::Twice { from: peer, channel, step, microbatch }.into());
        }
    }
}

/// Refuses what does not belong to this run of this plan; tells what a message is and its shape.
fn fence<D: Device>(shared: &Shared<D>, peer: WorkerId, header: &Header) -> Result<(Source, ArrayShape), RuntimeError> {
    let Header { kind, step, revision, incarnation, microbatch, channel, total, offset, .. } = *header;
    let Stamp { revision: expected, incarnation: present } = shared.stamp;
    if revision != expected {
        return Err(Fenced::Revision { from: peer, found: revision, expected }.into());
    }
    if incarnation != present {
        return Err(Fenced::Incarnation { from: peer, found: incarnation, expected: present }.into());
    }
    if let Some(at) = shared.mailbox.step()
        && !(at..at + AHEAD).contains(&step)
    {
        return Err(Fenced::Step { from: peer, found: step, at }.into());
    }
    let moving = || {
        let state = shared.model.state.get(channel as usize)?;
        (shared.incoming.get(&channel) == Some(&peer) && microbatch == 0).then_some(state)
    };
    let known = match kind {
        Kind::Tensor => {
            let from = shared.seats.iter().position(|&w| w == peer).map(|r| shared.wiring.rank(r as u32));
            let known = shared.wiring.channels.get(channel as usize).filter(|c| {
                from.zip(shared.me).is_some_and(|(from, me)| shared.wiring.permits(c, from, me, microbatch))
            });
            known.map(|c| (Source::Channel(channel), c.shape.clone()))
        }
        Kind::State => moving().map(|t| (Source::State(channel), t.shape.clone())),
        Kind::Gradient if (channel as usize) < shared.model.n_params => {
            moving().map(|_| (Source::Gradient(channel), gradient_shape(&shared.model, channel as usize)))
        }
        Kind::Gradient | Kind::Control | Kind::Batch => None,
    };
    let Some((source, shape)) = known else {
        return Err(Fenced::Channel { from: peer, channel, microbatch }.into());
    };
    let expected = shape.bytes().0;
    if total != expected || offset != 0 {
        return Err(Fenced::Size { from: peer, channel, found: total, expected }.into());
    }
    Ok((source, shape))
}

/// Microseconds since the Unix epoch: the common clock of all timelines of a machine.
pub fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_micros() as u64)
}
