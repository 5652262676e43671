//! Getting ready for a plan while another one may be running: connections to all peers, executables for all segments.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::RuntimeError;
use super::doors::Doors;
use super::executor::{Links, peak_rss, reset_peak_rss};
use super::kept::Kept;
use super::link::{Link, Shared, Stamp, Traffic, whom};
use super::mailbox::Mailbox;
use super::program::{Compiler, Limits, Programs, mirrors_of};
use super::weights::StartWeights;
use super::wiring::{Rank, Wiring};
use crate::device::cache::ExecutableCache;
use crate::device::heap::Ceiling;
use crate::device::{Device, heap, inventory};
use crate::graph::Model;
use crate::plan::{Place, Plan};
use crate::tls::{Identity, Name, Stream};
use crate::wire::control::{Move, Peer, Prepare, ReadyReport, Seat, WorkerId};
use crate::wire::frame::{Kind, write_message};

/// A plan that can run here as soon as its state is there.
pub struct Prepared<D: Device> {
    pub shared: Arc<Shared<D>>,
    pub links: Links<D::Buffer>,
    /// `None` for a worker that leaves with the cutover to this plan.
    pub programs: Option<Programs<D>>,
    /// Of the process, while this plan runs.
    pub ceiling: Option<Ceiling>,
    pub seed: u32,
    pub weights: Option<StartWeights>,
    /// What this worker hands over at the cutover.
    pub outgoing: Vec<Move>,
    /// Microbatches that the plan before this one sums in a step.
    pub summed: u32,
}

/// What a process may grow by between two looks at the ceiling, by threads that do not look: 0.5 MiB was seen.
const BETWEEN_LOOKS: u64 = 4 << 20;

/// One part in so many of all memory stays free of executables that may be used again.
const ROOM: u64 = 4;

/// Who prepares, and with what.
pub struct Workshop<'a, D: Device> {
    pub worker: WorkerId,
    pub token: &'a str,
    pub identity: Option<&'a Identity>,
    pub device: &'a Arc<D>,
    pub model: &'a Arc<Model>,
    pub cache: Option<&'a ExecutableCache>,
    pub kept: &'a Kept<D>,
    pub doors: &'a Doors,
    /// Set when nobody wants the result any more.
    pub cancelled: &'a AtomicBool,
    pub progress: &'a mut dyn FnMut(u32, u32),
}

impl<D: Device> Workshop<'_, D> {
    /// Connects, then compiles.
    ///
    /// # Errors
    /// [`RuntimeError::Unfinished`] after [`Prepare::spell_s`]. Whatever went wrong concerns this plan only: nothing that
    /// runs has been touched.
    pub fn prepare(mut self, order: Prepare) -> Result<(Prepared<D>, ReadyReport), RuntimeError> {
        let began = Instant::now();
        let wiring = Wiring::new(self.model, &order.plan)?;
        let seats: Vec<WorkerId> = order.seats.iter().map(|s| s.worker).collect();
        let me = seats.iter().position(|&w| w == self.worker).map(|rank| wiring.rank(rank as u32));
        let incoming = order.moves.iter().filter(|m| m.to == self.worker).map(|m| (m.state, m.from)).collect();
        let outgoing: Vec<Move> = order.moves.iter().copied().filter(|m| m.from == self.worker).collect();
        let shared = Arc::new(Shared {
            device: self.device.clone(),
            model: self.model.clone(),
            plan: order.plan.clone(),
            wiring,
            seats,
            me,
            stamp: Stamp { revision: order.plan.revision, incarnation: order.incarnation },
            incoming,
            mailbox: Arc::new(Mailbox::new()),
            traffic: Traffic::default(),
        });
        shared.traffic.traced_until.store(order.traced_steps, Ordering::Relaxed);
        let links = self.connect(&order, &shared)?;
        let weights = match (&order.weights, order.fresh) {
            (Some(path), true) => Some(StartWeights::open(path, self.model)?),
            _ => None,
        };
        let mut report = ReadyReport::default();
        let programs = match me {
            Some(me) => {
                let given = weights.as_ref().map(StartWeights::tensors).unwrap_or_default();
                let mut progress = |compiled, of| (self.progress)(compiled, of);
                let compiler =
                    Compiler::new(&**self.device, self.model, &shared.plan, &shared.wiring, me, &mut progress);
                let until =
                    order.spell_s.and_then(|s| Instant::now().checked_add(Duration::try_from_secs_f64(s).ok()?));
                let limits = Limits { cancelled: Some(self.cancelled), until };
                let compiler = compiler.with_cache(self.cache).with_kept(self.kept).with_limits(limits);
                let programs = compiler.compile(order.fresh.then_some(&given))?;
                for trouble in &programs.cache.troubles {
                    tracing::warn!("{trouble}");
                }
                report = memory(self.model, &shared.plan, &shared.wiring, me, &programs);
                (report.cached, report.compiled) = (programs.cache.hits, programs.cache.misses);
                Some(programs)
            }
            None => None,
        };
        report.compiling_rss = peak_rss();
        heap::tidy();
        report.baseline_rss = reset_peak_rss();
        // Elsewhere tensors do not lie in the heap.
        let on_heap = me.filter(|_| self.device.kind() == "cpu");
        let planned = on_heap.map(|me| shared.plan.shards[me.shard.index()].memory.0);
        let limit = inventory::memory().0;
        if planned.is_some_and(|planned| report.baseline_rss.saturating_add(planned) > limit - limit / ROOM) {
            self.kept.let_go();
            heap::tidy();
            report.baseline_rss = reset_peak_rss();
        }
        report.seconds = began.elapsed().as_secs_f64();
        let ceiling = planned.map(|planned| report.baseline_rss.saturating_add(planned.saturating_sub(BETWEEN_LOOKS)));
        let ceiling = ceiling.map(Ceiling::new);
        let (seed, summed) = (order.seed as u32, order.summed);
        Ok((Prepared { shared, links, programs, ceiling, seed, weights, outgoing, summed }, report))
    }

    /// One connection to everyone this worker exchanges tensors or state with: the higher worker dials the lower one.
    fn connect(&mut self, order: &Prepare, shared: &Arc<Shared<D>>) -> Result<Links<D::Buffer>, RuntimeError> {
        let address: BTreeMap<WorkerId, Seat> =
            order.seats.iter().chain(&order.leaving).map(|&s| (s.worker, s)).collect();
        let ranks = shared.me.map(|me| shared.wiring.peers(me)).unwrap_or_default();
        let mut peers: Vec<WorkerId> = ranks.into_iter().map(|r| shared.seats[r as usize]).collect();
        let moving = order.moves.iter().filter(|m| m.from == self.worker || m.to == self.worker);
        peers.extend(moving.map(|m| if m.from == self.worker { m.to } else { m.from }));
        peers.sort_unstable();
        peers.dedup();
        let mut links = BTreeMap::new();
        let (dialled, awaited): (Vec<WorkerId>, Vec<WorkerId>) = peers.into_iter().partition(|&p| p < self.worker);
        for peer in dialled {
            let Some(seat) = address.get(&peer) else {
                let message = format!("the plan exchanges tensors with worker {peer}, which has no seat in it");
                return Err(RuntimeError::Protocol { whom: "the parent".to_owned(), message });
            };
            let address = seat.address;
            let refused = |source| RuntimeError::Connect { whom: whom(peer), address: address.to_string(), source };
            let mut stream = dial(address, self.identity, Name::Worker(peer)).map_err(refused)?;
            let Stamp { revision, incarnation } = shared.stamp;
            let hello = Peer { worker: self.worker, token: self.token.to_owned(), revision, incarnation };
            let json = serde_json::to_vec(&hello).expect("plain data");
            write_message(&mut stream.writer, shared.stamp.header(Kind::Control, 0, 0, 0), &json).map_err(refused)?;
            links.insert(peer, Link::start(shared, peer, stream)?);
        }
        for peer in awaited {
            let purpose = (shared.stamp.incarnation, shared.stamp.revision);
            let stream = self.doors.take(purpose, peer, self.cancelled)?;
            links.insert(peer, Link::start(shared, peer, stream)?);
        }
        Ok(links)
    }
}

/// Connects to a part of the job that listens.
pub fn dial(address: SocketAddr, identity: Option<&Identity>, whom: Name) -> std::io::Result<Stream> {
    const CONNECT: Duration = Duration::from_secs(10);
    // It greets one after the other.
    const GREET: Duration = Duration::from_secs(30);
    let socket = TcpStream::connect_timeout(&address, CONNECT)?;
    socket.set_read_timeout(Some(GREET))?;
    let stream = Stream::dial(socket, identity, whom)?;
    stream.socket().set_read_timeout(None)?;
    Ok(stream)
}

/// Memory this rank will need, by the compiler's word and the static order.
fn memory<D: Device>(model: &Model, plan: &Plan, wiring: &Wiring, me: Rank, programs: &Programs<D>) -> ReadyReport {
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
        ..ReadyReport::default()
    }
}
