//! Where workers dial in, and the conversation with each of them.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use crate::runtime::RuntimeError;
use crate::runtime::control::parse;
use crate::runtime::link::Stamp;
use crate::telemetry::chain;
use crate::tls::{Identity, Name, Stream, same_token};
use crate::wire::control::{FailureClass, MAX_CONTROL, MAX_HELLO, ToParent, WorkerId};
use crate::wire::frame::{FrameError, Header, Kind, read_message, write_message};

/// What a worker's connection says.
pub enum Event {
    /// It has dialled in, and listens for its peers there.
    Joined {
        stream: Box<Stream>,
        listen: SocketAddr,
    },
    Said(ToParent),
    /// A state tensor: (index, data).
    State(usize, Vec<u8>),
    Closed(FrameError),
}

/// An event, of which worker, on which of its connections.
pub type Tagged = (WorkerId, u64, Event);

/// What waits to be written to a worker.
pub enum Letter {
    Order(Arc<Vec<u8>>),
    Rows { step: u64, tensor: u32, rows: bytes::Bytes },
}

/// The parent's end of a connection to a worker.
pub struct Outbox {
    pub letters: Sender<Letter>,
    /// Where the worker listens for its peers.
    pub listen: SocketAddr,
    /// Tells this connection from earlier ones of the same worker.
    pub connection: u64,
    /// The worker is gone or about to go.
    pub closed: bool,
}

/// Where a session listens for its workers, and how it knows them.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Port 0 stands for a free one.
    pub address: SocketAddr,
    /// Secret that workers must show; made anew when absent.
    pub token: Option<String>,
    /// Workers show certificates, and connections are encrypted, where there is one.
    pub identity: Option<Identity>,
    /// How long workers may take to dial in; loading a plug-in comes after.
    pub patience: Duration,
}

impl Default for Listen {
    /// For workers of this machine: loopback, a free port and a minute.
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            token: None,
            identity: None,
            patience: Duration::from_secs(60),
        }
    }
}

/// A listening socket, and the secret that workers must show.
pub struct Hall {
    pub address: SocketAddr,
    pub token: String,
}

impl Hall {
    /// Admits workers from now on; `events` gets one `Joined` for each.
    pub fn open(listen: &Listen, events: Sender<Tagged>) -> Result<Self, RuntimeError> {
        let at = listen.address;
        let failed = move |source| RuntimeError::Listen { address: at.to_string(), source };
        let listener = TcpListener::bind(at).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let token = listen.token.clone().map_or_else(secret, Ok).map_err(failed)?;
        let (expected, identity) = (token.clone(), listen.identity.clone());
        let admit = move || {
            for stream in listener.incoming() {
                let greeted = stream.map_err(failed).and_then(|s| greet(s, &expected, identity.as_ref()));
                let (worker, stream, listen) = match greeted {
                    Ok(greeted) => greeted,
                    // Strangers are turned away; the rightful worker is still to come.
                    Err(e) => {
                        tracing::warn!(why = chain(&e), "turned away");
                        continue;
                    }
                };
                if events.send((worker, 0, Event::Joined { stream: Box::new(stream), listen })).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("hall".to_owned()).spawn(admit).map_err(failed)?;
        Ok(Self { address, token })
    }
}

fn greet(
    socket: TcpStream,
    token: &str,
    identity: Option<&Identity>,
) -> Result<(WorkerId, Stream, SocketAddr), RuntimeError> {
    let from = socket.peer_addr().map_or_else(|_| "a stranger".to_owned(), |a| format!("a stranger at {a}"));
    let whom = || from.clone();
    let broken = |e: std::io::Error| RuntimeError::Link { whom: whom(), source: e.into() };
    socket.set_read_timeout(Some(Duration::from_secs(5))).map_err(broken)?;
    let mut stream = Stream::accept(socket, identity).map_err(broken)?;
    let read = read_message(&mut stream.reader, MAX_HELLO);
    let (header, message) = read.map_err(|source| RuntimeError::Link { whom: whom(), source })?;
    match parse(header.kind, &message, "a stranger")? {
        ToParent::Hello { worker, token: shown, listen, .. } if same_token(&shown, token) => {
            stream.is(Name::Worker(worker)).map_err(broken)?;
            stream.socket().set_read_timeout(None).map_err(broken)?;
            Ok((worker, stream, listen))
        }
        _ => Err(RuntimeError::Protocol { whom: whom(), message: "no valid hello".to_owned() }),
    }
}

/// 128 random bits from the kernel, in hex.
fn secret() -> std::io::Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Starts the two threads of a connection to a worker.
pub fn converse(
    worker: WorkerId,
    connection: u64,
    stream: Stream,
    listen: SocketAddr,
    events: Sender<Tagged>,
) -> Result<Outbox, RuntimeError> {
    let broken = |e: std::io::Error| RuntimeError::Link { whom: format!("worker {worker}"), source: e.into() };
    let Stream { reader: mut reading, writer: mut writing } = stream;
    let (letters, queue) = channel::<Letter>();
    let write = move || {
        let header = |kind, step, channel| -> Header { Stamp::NONE.header(kind, step, channel, 0) };
        for letter in queue {
            let written = match letter {
                Letter::Order(json) => write_message(&mut writing, header(Kind::Control, 0, 0), &json),
                Letter::Rows { step, tensor, rows } => {
                    write_message(&mut writing, header(Kind::Batch, step, tensor), &rows)
                }
            };
            // The reading thread tells of a broken connection.
            if written.is_err() {
                return;
            }
        }
        // Nobody writes to this worker any more: one on another machine learns it here, and dials in anew.
        let _ = writing.close();
    };
    let read = move || {
        loop {
            let event = match read_message(&mut reading, u64::MAX) {
                Ok((header, data)) if header.kind == Kind::State => Event::State(header.channel as usize, data),
                Ok((header, data)) if header.total <= MAX_CONTROL => match parse(header.kind, &data, "the worker") {
                    Ok(said) => Event::Said(said),
                    Err(e) => Event::Said(ToParent::Failed { message: e.to_string(), class: FailureClass::Own }),
                },
                Ok((header, _)) => {
                    Event::Closed(FrameError::MessageTooLong { found: header.total, limit: MAX_CONTROL })
                }
                Err(e) => Event::Closed(e),
            };
            let last = matches!(event, Event::Closed(_));
            if events.send((worker, connection, event)).is_err() || last {
                return;
            }
        }
    };
    std::thread::Builder::new().name(format!("tell-{worker}")).spawn(write).map_err(broken)?;
    std::thread::Builder::new().name(format!("hear-{worker}")).spawn(read).map_err(broken)?;
    Ok(Outbox { letters, listen, connection, closed: false })
}
