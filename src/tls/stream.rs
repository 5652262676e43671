//! A connection whose two directions are used by two threads at the same time, encrypted or not.
//!
//! TLS keeps one state for both directions. It is locked only while bytes are encrypted or decrypted, never while a
//! socket is waited for: a reader that waits does not hold up the writer, nor the other way round. The reader writes nothing
//! to the socket, so records never mix.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustls::{ClientConnection, Connection, ServerConnection};

use super::{Identity, Name, Refusal, is_refusal, refusal, shows};

/// Bytes that are encrypted, and read from the socket, at once.
const BLOCK: usize = 256 << 10;

/// Both directions of a connection.
pub struct Stream {
    pub reader: Reader,
    pub writer: Writer,
}

/// The direction in which bytes come in.
pub struct Reader {
    socket: TcpStream,
    tls: Option<Decrypter>,
}

struct Decrypter {
    state: Shared,
    /// What came from the socket, and how much of it is still to be decrypted.
    block: Box<[u8]>,
    left: std::ops::Range<usize>,
}

/// The direction in which bytes go out.
pub struct Writer {
    socket: TcpStream,
    tls: Option<Encrypter>,
}

struct Encrypter {
    state: Shared,
    /// On its way to the socket.
    block: Vec<u8>,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Connection>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Stream {
    /// The dialling end; with an identity, `whom` has to answer.
    ///
    /// # Errors
    /// [`Refusal`] inside where this end does not trust the other. That the other does not trust this one may show
    /// only when something is read.
    pub fn dial(socket: TcpStream, identity: Option<&Identity>, whom: Name) -> io::Result<Self> {
        let connect = |identity: &Identity| ClientConnection::new(identity.client.clone(), whom.server());
        let tls = identity.map(connect).transpose().map_err(Refusal::from)?;
        Self::new(socket, tls.map(Connection::Client))
    }

    /// The listening end.
    pub fn accept(socket: TcpStream, identity: Option<&Identity>) -> io::Result<Self> {
        let accept = |identity: &Identity| ServerConnection::new(identity.server.clone());
        let tls = identity.map(accept).transpose().map_err(Refusal::from)?;
        Self::new(socket, tls.map(Connection::Server))
    }

    fn new(socket: TcpStream, tls: Option<Connection>) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let Some(mut tls) = tls else {
            let writer = Writer { socket: socket.try_clone()?, tls: None };
            return Ok(Self { reader: Reader { socket, tls: None }, writer });
        };
        tls.set_buffer_limit(None);
        while tls.is_handshaking() {
            match tls.complete_io(&mut &socket) {
                Ok(_) => {}
                Err(e) => {
                    let e = refusal(e);
                    if is_refusal(&e) {
                        part(&socket);
                    }
                    return Err(e);
                }
            }
        }
        let state = Shared(Arc::new(Mutex::new(tls)));
        let writer =
            Writer { socket: socket.try_clone()?, tls: Some(Encrypter { state: state.clone(), block: Vec::new() }) };
        let tls = Decrypter { state, block: vec![0; BLOCK].into(), left: 0..0 };
        Ok(Self { reader: Reader { socket, tls: Some(tls) }, writer })
    }

    /// Whether the peer's certificate is that of `name`; always so without an identity.
    pub fn is(&self, name: Name) -> io::Result<()> {
        let Some(tls) = &self.reader.tls else { return Ok(()) };
        Ok(shows(&tls.state.lock(), name)?)
    }

    /// The socket below: for timeouts and for ending both directions.
    pub fn socket(&self) -> &TcpStream {
        &self.reader.socket
    }
}

/// Takes leave of a peer that is not trusted: a connection that is closed with something unread is reset, and the reason
/// that was sent would be lost.
fn part(socket: &TcpStream) {
    const PATIENCE: Duration = Duration::from_millis(200);
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.set_read_timeout(Some(PATIENCE));
    let mut rest = [0; 4096];
    // A few hellos at most.
    for _ in 0..16 {
        if !matches!((&mut &*socket).read(&mut rest), Ok(1..)) {
            return;
        }
    }
}

impl Read for Reader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.socket.read(out) };
        loop {
            let mut state = tls.state.lock();
            match state.reader().read(out) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            if tls.left.is_empty() {
                drop(state);
                let n = self.socket.read(&mut tls.block)?;
                if n == 0 {
                    // A peer that was killed takes no leave; frames tell whether something is missing.
                    return Ok(0);
                }
                tls.left = 0..n;
                state = tls.state.lock();
            }
            let mut rest = &tls.block[tls.left.clone()];
            let n = state.read_tls(&mut rest)?;
            tls.left.start += n;
            state.process_new_packets().map_err(Refusal::from)?;
        }
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(Encrypter { state, block }) = &mut self.tls else { return self.socket.write(bytes) };
        let mut state = state.lock();
        let n = state.writer().write(&bytes[..bytes.len().min(BLOCK)])?;
        take(&mut state, block)?;
        drop(state);
        self.socket.write_all(block)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// What is encrypted and not yet on its way.
fn take(state: &mut Connection, block: &mut Vec<u8>) -> io::Result<()> {
    block.clear();
    while state.wants_write() {
        state.write_tls(block)?;
    }
    Ok(())
}

impl Writer {
    /// Nothing more will be written; what is on its way arrives.
    pub fn close(&mut self) -> io::Result<()> {
        if let Some(Encrypter { state, block }) = &mut self.tls {
            let mut state = state.lock();
            state.send_close_notify();
            take(&mut state, block)?;
            drop(state);
            self.socket.write_all(block)?;
        }
        self.socket.shutdown(Shutdown::Write)
    }
}
