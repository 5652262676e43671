//! A worker process: connects to the parent and to its peers, compiles its shard, and runs it until told to finish.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::RuntimeError;
use super::executor::{Executor, reset_peak_rss};
use super::link::{Link, Shared, Stamp, Traffic, whom};
use super::mailbox::{Mailbox, Source};
use super::program::{Compiler, Programs, mirrors_of};
use super::weights::StartWeights;
use super::wiring::{Rank, Wiring};
use crate::device::Device;
use crate::graph::Model;
use crate::plan::{Place, Plan};
use crate::wire::control::{FailureClass, Launch, MAX_CONTROL, MAX_HELLO, Peer, ReadyReport, ToParent, ToWorker};
use crate::wire::frame::{FrameError, Header, Kind, read_chunk, read_header, read_message, write_message};

/// How long a peer may take to dial in after the plan is out; it imports the same bundle first.
const PEER_PATIENCE: Duration = Duration::from_secs(120);

/// What a worker is told on its command line.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Where the parent listens.
    pub connect: SocketAddr,
    pub rank: u32,
    /// Secret of the job: presented to the parent and to peers.
    pub token: String,
}

/// Runs a worker to its end. `device` and `load` are called once the parent has answered; the error returned has been
/// reported to the parent where that was possible.
pub fn run<D: Device>(
    config: &WorkerConfig,
    device: impl FnOnce() -> Result<D, RuntimeError>,
    load: impl FnOnce(&Path) -> Result<Model, RuntimeError>,
) -> Result<(), RuntimeError> {
    let parent = "the parent".to_owned();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .map_err(|source| RuntimeError::Listen { address: "loopback".to_owned(), source })?;
    let listen =
        listener.local_addr().map_err(|source| RuntimeError::Listen { address: "loopback".to_owned(), source })?;
    let stream = TcpStream::connect_timeout(&config.connect, Duration::from_secs(10)).map_err(|source| {
        RuntimeError::Connect { whom: parent.clone(), address: config.connect.to_string(), source }
    })?;
    let control = Control::new(&stream)?;
    control.send(&ToParent::Hello {
        rank: config.rank,
        token: config.token.clone(),
        pid: std::process::id(),
        listen,
    })?;
    let result = serve(config, device, load, &listener, &stream, &control);
    if let Err(fault) = &result {
        let class = match fault {
            RuntimeError::Link { .. } | RuntimeError::Connect { .. } => FailureClass::Peer,
            _ => FailureClass::Own,
        };
        let _ = control.send(&ToParent::Failed { message: chain(fault), class });
    }
    result
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        if !text.contains(&e.to_string()) {
            text = format!("{text}: {e}");
        }
        cause = e.source();
    }
    text
}

/// The sending half of the connection to the parent.
struct Control {
    stream: Mutex<TcpStream>,
}

impl Control {
    fn new(stream: &TcpStream) -> Result<Self, RuntimeError> {
        let cloned = stream.set_nodelay(true).and_then(|()| stream.try_clone());
        let stream = cloned.map_err(|e| RuntimeError::Link { whom: "the parent".to_owned(), source: e.into() })?;
        Ok(Self { stream: Mutex::new(stream) })
    }

    fn send(&self, message: &ToParent) -> Result<(), RuntimeError> {
        let json = serde_json::to_vec(message).expect("control messages are plain data");
        self.write(Stamp { revision: 0, incarnation: 0 }.header(Kind::Control, 0, 0, 0), &json)
    }

    fn write(&self, header: Header, message: &[u8]) -> Result<(), RuntimeError> {
        let mut stream = self.stream.lock().unwrap_or_else(|p| p.into_inner());
        write_message(&mut *stream, header, message)
            .and_then(|()| stream.flush())
            .map_err(|e| RuntimeError::Link { whom: "the parent".to_owned(), source: e.into() })
    }
}

fn from_parent(stream: &mut TcpStream) -> Result<ToWorker, RuntimeError> {
    let link = |source| RuntimeError::Link { whom: "the parent".to_owned(), source };
    let (header, message) = read_message(stream, MAX_CONTROL).map_err(link)?;
    parse(header.kind, &message, "the parent")
}

/// A control message, or what is wrong with it.
pub(super) fn parse<T: serde::de::DeserializeOwned>(kind: Kind, message: &[u8], from: &str) -> Result<T, RuntimeError> {
    let protocol = |message: String| RuntimeError::Protocol { whom: from.to_owned(), message };
    if kind != Kind::Control {
        return Err(protocol(format!("expected a control message, found a frame of kind {kind:?}")));
    }
    serde_json::from_slice(message).map_err(|e| protocol(format!("not a control message of this version: {e}")))
}

fn serve<D: Device>(
    config: &WorkerConfig,
    device: impl FnOnce() -> Result<D, RuntimeError>,
    load: impl FnOnce(&Path) -> Result<Model, RuntimeError>,
    listener: &TcpListener,
    stream: &TcpStream,
    control: &Control,
) -> Result<(), RuntimeError> {
    let broken = |e: std::io::Error| RuntimeError::Link { whom: "the parent".to_owned(), source: e.into() };
    let mut reading = stream.try_clone().map_err(broken)?;
    let launch = match from_parent(&mut reading)? {
        ToWorker::Launch(launch) => *launch,
        // The parent gave up before it began.
        ToWorker::Finish => return Ok(()),
        ToWorker::Step { .. } => {
            let message = "a step before the launch".to_owned();
            return Err(RuntimeError::Protocol { whom: "the parent".to_owned(), message });
        }
    };
    let device = Arc::new(device()?);
    let model = Arc::new(load(&launch.bundle)?);
    let wiring = Arc::new(Wiring::new(&model, &launch.plan)?);
    let me = wiring.rank(config.rank);
    let stamp = Stamp { revision: launch.plan.revision, incarnation: launch.incarnation };
    let shared = Arc::new(Shared {
        device: device.clone(),
        wiring: wiring.clone(),
        me,
        stamp,
        mailbox: Arc::new(Mailbox::new()),
        traffic: Traffic::default(),
    });
    shared.traffic.traced_until.store(launch.traced_steps, Ordering::Relaxed);
    let mut weights = launch.weights.as_deref().map(|p| StartWeights::open(p, &model)).transpose()?;
    let given = weights.as_ref().map(StartWeights::tensors).unwrap_or_default();
    let programs = {
        let mut progress = |compiled, of| {
            // A parent that is gone shows at the next read.
            let _ = control.send(&ToParent::Progress { compiled, of });
        };
        Compiler::new(&*device, &model, &launch.plan, &wiring, me, &mut progress).compile(&given)?
    };
    let ready = ready(&model, &launch.plan, &wiring, me, &programs, reset_peak_rss());
    let links = connect(config, &launch, listener, &shared)?;
    let mut executor =
        Executor::new(shared.clone(), model.clone(), launch.plan.clone(), programs, links, launch.seed as u32);
    executor.init(&mut |i| match &mut weights {
        Some(weights) => weights.piece(&model, i),
        None => Ok(Vec::new()),
    })?;
    drop(weights);
    control.send(&ToParent::Ready(ready))?;

    let (orders, inbox) = channel();
    let listening = {
        let (shared, model, plan) = (shared.clone(), model.clone(), launch.plan.clone());
        move || {
            if let Err(fault) = listen_to_parent(reading, &shared, &model, &plan, &orders) {
                shared.mailbox.fail(fault);
            }
        }
    };
    std::thread::Builder::new().name("from-parent".to_owned()).spawn(listening).map_err(broken)?;
    loop {
        match inbox.recv() {
            Ok(ToWorker::Step { step, variant }) => {
                let done = executor.step(step, &variant)?;
                control.send(&ToParent::Report(done))?;
            }
            Ok(ToWorker::Finish) => {
                for link in executor.links.values_mut() {
                    link.close();
                }
                executor
                    .weights(&mut |param, data| control.write(stamp.header(Kind::State, 0, param as u32, 0), data))?;
                return control.send(&ToParent::Done);
            }
            Ok(ToWorker::Launch(_)) => {
                let message = "a second launch".to_owned();
                return Err(RuntimeError::Protocol { whom: "the parent".to_owned(), message });
            }
            Err(_) => {
                let closed = RuntimeError::Link { whom: "the parent".to_owned(), source: FrameError::Closed };
                return Err(shared.mailbox.fault().unwrap_or(closed));
            }
        }
    }
}

/// Memory this rank will need, by the compiler's word and the static order.
fn ready<D: Device>(
    model: &Model,
    plan: &Plan,
    wiring: &Wiring,
    me: Rank,
    programs: &Programs<D>,
    baseline_rss: u64,
) -> ReadyReport {
    let state: u64 = model
        .state
        .iter()
        .zip(&plan.owners)
        .filter(|(_, o)| **o == Place::Everywhere || **o == Place::Shard(me.shard))
        .map(|(t, _)| t.shape.bytes().0)
        .sum();
    let mirrored: u64 = mirrors_of(wiring, me.shard).map(|m| model.state[m.state].shape.bytes().0).sum();
    let graph = |variant: &str| &model.variant(variant).expect("a compiled variant").graph;
    let gradients = programs.grads.iter().map(|(v, g)| {
        let graph = graph(v);
        g.results.iter().map(|&r| graph.op(graph.outputs()[r]).shape.bytes().0).sum::<u64>()
    });
    let residuals = programs.grads.iter().map(|(v, g)| g.residual_peak(graph(v)).0);
    let pieces = programs.grads.values().flat_map(|g| &g.program.pieces).chain(&programs.update.pieces);
    ReadyReport {
        state_bytes: state + mirrored,
        gradient_bytes: gradients.max().unwrap_or(0),
        residual_bytes: residuals.max().unwrap_or(0),
        temporary_bytes: pieces.map(|p| p.memory.temporaries.0).max().unwrap_or(0),
        baseline_rss,
    }
}

/// One connection to every peer: the higher rank dials the lower one.
fn connect<D: Device>(
    config: &WorkerConfig,
    launch: &Launch,
    listener: &TcpListener,
    shared: &Arc<Shared<D>>,
) -> Result<BTreeMap<u32, Link<D::Buffer>>, RuntimeError> {
    let mut links = BTreeMap::new();
    let peers = shared.wiring.peers(shared.me);
    for &peer in peers.iter().filter(|&&p| p < config.rank) {
        let Some(&address) = launch.peers.get(peer as usize) else {
            let message = format!("the launch lists {} workers, the plan has a worker {peer}", launch.peers.len());
            return Err(RuntimeError::Protocol { whom: "the parent".to_owned(), message });
        };
        let refused = |source| RuntimeError::Connect { whom: whom(peer), address: address.to_string(), source };
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10)).map_err(refused)?;
        let hello = Peer { rank: config.rank, token: config.token.clone() };
        let json = serde_json::to_vec(&hello).expect("plain data");
        write_message(&mut stream, shared.stamp.header(Kind::Control, 0, 0, 0), &json).map_err(refused)?;
        links.insert(peer, Link::start(shared, peer, stream)?);
    }
    let failed = |source| RuntimeError::Listen { address: "loopback".to_owned(), source };
    listener.set_nonblocking(true).map_err(failed)?;
    let deadline = Instant::now() + PEER_PATIENCE;
    while let Some(missing) = peers.iter().find(|&&p| p > config.rank && !links.contains_key(&p)) {
        match listener.accept() {
            Ok((stream, _)) => {
                // Strangers are turned away; the rightful peer is still to come.
                let Ok((peer, stream)) = greet(stream, &config.token) else { continue };
                if peers.contains(&peer) && peer > config.rank && !links.contains_key(&peer) {
                    links.insert(peer, Link::start(shared, peer, stream)?);
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                if let Some(fault) = shared.mailbox.fault() {
                    return Err(fault);
                }
                if Instant::now() > deadline {
                    let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
                    let address = "its data port".to_owned();
                    return Err(RuntimeError::Connect { whom: whom(*missing), address, source });
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(source) => return Err(failed(source)),
        }
    }
    Ok(links)
}

/// Reads the first message of a connection and checks its token.
fn greet(stream: TcpStream, token: &str) -> Result<(u32, TcpStream), RuntimeError> {
    let broken = |e: std::io::Error| RuntimeError::Link { whom: "a stranger".to_owned(), source: e.into() };
    stream.set_nonblocking(false).map_err(broken)?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(broken)?;
    let mut stream = stream;
    let read = read_message(&mut stream, MAX_HELLO);
    let (header, message) = read.map_err(|source| RuntimeError::Link { whom: "a stranger".to_owned(), source })?;
    let peer: Peer = parse(header.kind, &message, "a stranger")?;
    if !same_token(&peer.token, token) {
        let message = "wrong token".to_owned();
        return Err(RuntimeError::Protocol { whom: "a stranger".to_owned(), message });
    }
    stream.set_read_timeout(None).map_err(broken)?;
    Ok((peer.rank, stream))
}

/// Compares without telling by its duration how much was right.
pub(super) fn same_token(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Reads steps and batches; uploads each microbatch's rows ahead of the executor.
fn listen_to_parent<D: Device>(
    mut stream: TcpStream,
    shared: &Shared<D>,
    model: &Model,
    plan: &Plan,
    orders: &Sender<ToWorker>,
) -> Result<(), RuntimeError> {
    let link = |source| RuntimeError::Link { whom: "the parent".to_owned(), source };
    let protocol = |message: String| RuntimeError::Protocol { whom: "the parent".to_owned(), message };
    let mut variant = String::new();
    loop {
        let header = read_header(&mut stream).map_err(link)?;
        if header.kind == Kind::Batch {
            let grad = model.variant(&variant).ok_or_else(|| protocol("a batch before its step".to_owned()))?;
            let spec = grad.batch.get(header.channel as usize);
            let spec = spec.ok_or_else(|| protocol(format!("batch tensor {} is unknown", header.channel)))?;
            let shape = spec.array();
            let slice = shape.bytes().0 as usize;
            let total = slice as u64 * u64::from(plan.n_microbatches);
            if header.total != total {
                return Err(link(FrameError::MessageTooLong { found: header.total, limit: total }));
            }
            let rows = read_rest(&mut stream, header).map_err(link)?;
            for m in 0..plan.n_microbatches as usize {
                let at = |source| RuntimeError::Device { at: format!("uploading batch tensor {}", spec.name), source };
                let buffer = shared.device.upload(&shape, &rows[m * slice..(m + 1) * slice]).map_err(at)?;
                shared.mailbox.put((header.step, Source::Batch(header.channel), m as u32), Arc::new(buffer));
            }
            continue;
        }
        if header.total > MAX_CONTROL {
            return Err(link(FrameError::MessageTooLong { found: header.total, limit: MAX_CONTROL }));
        }
        let message = read_rest(&mut stream, header).map_err(link)?;
        let order: ToWorker = parse(header.kind, &message, "the parent")?;
        let last = order == ToWorker::Finish;
        if let ToWorker::Step { variant: next, .. } = &order {
            variant.clone_from(next);
        }
        if orders.send(order).is_err() || last {
            // Nothing but the end of the connection may follow.
            let mut rest = [0u8; 1];
            let _ = stream.read(&mut rest);
            return Ok(());
        }
    }
}

/// The message whose first header has been read.
fn read_rest(stream: &mut TcpStream, first: Header) -> Result<Vec<u8>, FrameError> {
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
