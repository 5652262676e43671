//! Where peers come in: one listening socket per worker, for all revisions and incarnations.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::RuntimeError;
use super::control::parse;
use super::link::whom;
use crate::telemetry::chain;
use crate::tls::{Identity, Name, Stream, same_token};
use crate::wire::control::{MAX_HELLO, Peer, WorkerId};
use crate::wire::frame::read_message;

/// How long a peer may take to dial in once it knows the plan.
const PATIENCE: Duration = Duration::from_secs(120);
/// Connections that may wait to be asked for: more are turned away.
const MAX_WAITING: usize = 8192;

/// Which revision a connection is for: (incarnation, revision).
type Purpose = (u32, u64);

/// Connections of peers that wait to be asked for.
pub struct Doors {
    address: SocketAddr,
    waiting: Mutex<BTreeMap<(Purpose, WorkerId), Stream>>,
    changed: Condvar,
}

impl Doors {
    /// Listens where peers can reach it, port 0 for a free one. `token` is what they must show, and certificates where there
    /// is an identity.
    pub fn open(at: SocketAddr, token: String, identity: Option<Identity>) -> Result<Arc<Self>, RuntimeError> {
        let failed = move |source| RuntimeError::Listen { address: at.to_string(), source };
        let listener = TcpListener::bind(at).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let doors = Arc::new(Self { address, waiting: Mutex::default(), changed: Condvar::new() });
        let keeper = doors.clone();
        let admit = move || {
            for stream in listener.incoming() {
                let (peer, stream) = match stream.map_err(failed).and_then(|s| greet(s, &token, identity.as_ref())) {
                    Ok(greeted) => greeted,
                    // Strangers and half-open connections are turned away; the rightful peer is still to come.
                    Err(e) => {
                        tracing::warn!(why = chain(&e), "turned away");
                        continue;
                    }
                };
                let mut waiting = keeper.lock();
                if waiting.len() < MAX_WAITING {
                    waiting.insert(((peer.incarnation, peer.revision), peer.worker), stream);
                    keeper.changed.notify_all();
                }
            }
        };
        std::thread::Builder::new().name("doors".to_owned()).spawn(admit).map_err(failed)?;
        Ok(doors)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Purpose, WorkerId), Stream>> {
        self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for `peer` to dial in for a revision; `cancelled` ends the wait.
    pub fn take(&self, purpose: Purpose, peer: WorkerId, cancelled: &AtomicBool) -> Result<Stream, RuntimeError> {
        const LOOK: Duration = Duration::from_millis(20);
        let deadline = Instant::now() + PATIENCE;
        let mut waiting = self.lock();
        loop {
            // Nobody will ask for connections of earlier incarnations.
            waiting.retain(|(p, _), _| p.0 >= purpose.0);
            if let Some(stream) = waiting.remove(&(purpose, peer)) {
                return Ok(stream);
            }
            if cancelled.load(Ordering::SeqCst) {
                return Err(RuntimeError::Stopped("called off".to_owned()));
            }
            if Instant::now() > deadline {
                let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
                let address = "its data port".to_owned();
                return Err(RuntimeError::Connect { whom: whom(peer), address, source });
            }
            let woken = self.changed.wait_timeout(waiting, LOOK);
            waiting = woken.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

/// Reads the first message of a connection, and checks its token and its certificate.
fn greet(socket: TcpStream, token: &str, identity: Option<&Identity>) -> Result<(Peer, Stream), RuntimeError> {
    let from = socket.peer_addr().map_or_else(|_| "a stranger".to_owned(), |a| format!("a stranger at {a}"));
    let broken = |e: std::io::Error| RuntimeError::Link { whom: from.clone(), source: e.into() };
    socket.set_read_timeout(Some(Duration::from_secs(5))).map_err(broken)?;
    let mut stream = Stream::accept(socket, identity).map_err(broken)?;
    let read = read_message(&mut stream.reader, MAX_HELLO);
    let (header, message) = read.map_err(|source| RuntimeError::Link { whom: from.clone(), source })?;
    let peer: Peer = parse(header.kind, &message, "a stranger")?;
    if !same_token(&peer.token, token) {
        let message = "wrong token".to_owned();
        return Err(RuntimeError::Protocol { whom: from, message });
    }
    stream.is(Name::Worker(peer.worker)).map_err(broken)?;
    stream.socket().set_read_timeout(None).map_err(broken)?;
    Ok((peer, stream))
}
