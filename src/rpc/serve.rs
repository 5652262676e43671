//! The end that answers: the head's.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tonic::codegen::{Service, http};
use tonic::{Code, Status};

use super::v1::head_server::{Head, HeadServer};
use super::{ALIVE, AUTHORIZATION, HTTP2, MAX_REPORT, MAX_REQUEST};
use crate::telemetry::chain;
use crate::tls::{Identity, Name, refusal, same_token, shows};

/// How long a stranger may take to become a guest, and a call to be answered.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that have shown no token yet, and such that have. For one more, the oldest of its kind has to go: a crowd of
/// silent ones keeps nobody out.
const STRANGERS: usize = 64;
const GUESTS: usize = 8;
/// Calls of one connection at once.
const CALLS: u32 = 16;

/// A connection.
struct Visit {
    task: JoinHandle<()>,
    /// A guest: it has shown the token.
    known: Arc<AtomicBool>,
}

/// Answers calls for `head` from those who know the token, with an identity from the operator alone, until it is dropped.
///
/// # Errors
/// The runtime cannot wait for `listener`. No connection ends it, whatever comes in.
pub async fn serve<H: Head>(
    listener: TcpListener,
    token: String,
    identity: Option<Identity>,
    head: H,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let acceptor = identity.map(|identity| TlsAcceptor::from(identity.server(&[HTTP2])));
    let head = HeadServer::new(head).max_decoding_message_size(MAX_REQUEST).max_encoding_message_size(MAX_REPORT);
    let token = Arc::<str>::from(token);
    let mut visits = Visits::default();
    loop {
        let Ok((socket, from)) = listener.accept().await else {
            // Out of file descriptors, say.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        visits.make_room();
        let known = Arc::<AtomicBool>::default();
        let desk = Desk { head: head.clone(), token: token.clone(), known: known.clone() };
        let acceptor = acceptor.clone();
        let visit = async move {
            if let Err(why) = attend(socket, acceptor.as_ref(), desk).await {
                tracing::warn!(from = from.to_string(), why, "whoever asks for the status is turned away");
            }
        };
        visits.0.push_back(Visit { task: tokio::spawn(visit), known });
    }
}

/// All connections, the oldest first. They end with it.
#[derive(Default)]
struct Visits(VecDeque<Visit>);

impl Visits {
    /// For one more stranger, and for a stranger that becomes a guest.
    fn make_room(&mut self) {
        self.0.retain(|visit| !visit.task.is_finished());
        for (known, most) in [(false, STRANGERS), (true, GUESTS)] {
            let alike = |v: &Visit| v.known.load(Ordering::Relaxed) == known;
            if self.0.iter().filter(|v| alike(v)).count() >= most
                && let Some(oldest) = self.0.iter().position(alike).and_then(|at| self.0.remove(at))
            {
                oldest.task.abort();
            }
        }
    }
}

impl Drop for Visits {
    fn drop(&mut self) {
        self.0.iter().for_each(|visit| visit.task.abort());
    }
}

/// What a connection asks.
struct Desk<H> {
    head: HeadServer<H>,
    token: Arc<str>,
    known: Arc<AtomicBool>,
}

/// Sees a connection to its end; why it was turned away, if it was.
async fn attend<H: Head>(socket: TcpStream, acceptor: Option<&TlsAcceptor>, desk: Desk<H>) -> Result<(), String> {
    let known = desk.known.clone();
    let converse = async {
        socket.set_nodelay(true).map_err(|e| chain(&e))?;
        let Some(acceptor) = acceptor else { return answer(socket, desk).await };
        let stream = acceptor.accept(socket).await.map_err(|e| chain(&refusal(e)))?;
        let (_, tls) = stream.get_ref();
        shows(tls, Name::Operator).map_err(|e| chain(&e))?;
        if tls.alpn_protocol() != Some(HTTP2) {
            return Err("it is of an earlier version, which speaks no gRPC".to_owned());
        }
        answer(stream, desk).await
    };
    let impatience = async {
        tokio::time::sleep(PATIENCE).await;
        if known.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        done = converse => done,
        () = impatience => Err(format!("it has not shown the token of the job within {} s", PATIENCE.as_secs())),
    }
}

async fn answer<H: Head>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    desk: Desk<H>,
) -> Result<(), String> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).keep_alive_interval(ALIVE).keep_alive_timeout(ALIVE);
    builder.max_concurrent_streams(CALLS).max_header_list_size(MAX_REQUEST as u32);
    let (known, desk) = (desk.known.clone(), Arc::new(desk));
    let call = service_fn(move |request| called(request, desk.clone()));
    match builder.serve_connection(TokioIo::new(stream), call).await {
        Ok(()) => Ok(()),
        // A guest that is gone is no news.
        Err(_) if known.load(Ordering::Relaxed) => Ok(()),
        Err(e) => Err(chain(&e)),
    }
}

async fn called<H: Head>(
    request: http::Request<hyper::body::Incoming>,
    desk: Arc<Desk<H>>,
) -> Result<http::Response<tonic::body::Body>, Infallible> {
    let shown = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    if !shown.is_some_and(|shown| same_token(shown, &desk.token)) {
        return Ok(Status::unauthenticated("the token is not that of the job").into_http());
    }
    desk.known.store(true, Ordering::Relaxed);
    // Of a stream, this is the time to its beginning.
    let answered = tokio::time::timeout(PATIENCE, desk.head.clone().call(request)).await;
    answered.unwrap_or_else(|_| {
        let why = format!("the call has not come in and been answered within {} s", PATIENCE.as_secs());
        Ok(Status::new(Code::DeadlineExceeded, why).into_http())
    })
}
