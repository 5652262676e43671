//! The end that asks: the operator's.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Status, Streaming};

use super::v1::head_client::HeadClient;
use super::v1::{ApproveRequest, Report, WatchRequest};
use super::{ALIVE, AUTHORIZATION, HTTP2, MAX_REPORT};
use crate::tls::{Identity, Name, refusal};
use crate::wire::report::JobReport;

/// How long anything may take but the wait for something to tell.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the head of a job is, and what it wants to see.
#[derive(Clone)]
pub struct Head {
    pub at: SocketAddr,
    pub token: String,
    /// Of the operator. Without one, nothing is encrypted.
    pub identity: Option<Identity>,
}

/// Why a head cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("cannot connect to it")]
    Connect(#[source] io::Error),
    /// Heads of earlier versions answered HTTP/1.1 alone.
    #[error("it is of an earlier version, which speaks no gRPC")]
    Old,
    #[error("the connection to it cannot be used")]
    Connection(#[source] hyper::Error),
    #[error("it does not answer as it should")]
    Call(#[source] Box<Status>),
    #[error("it has not answered within {} s", PATIENCE.as_secs())]
    Silent,
    #[error("its token is no text that can be sent")]
    Token,
}

impl AskError {
    /// Whether there is nobody yet, or no longer: a head that starts or ends is no news.
    pub fn is_absent(&self) -> bool {
        matches!(self, AskError::Connect(e) if e.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// A connection to a head, on which calls run side by side. It ends when neither it nor its [`Reports`] are there.
#[derive(Clone)]
pub struct Line {
    client: HeadClient<Wire>,
    bearer: MetadataValue<Ascii>,
}

/// What a head tells from now on.
pub struct Reports(Streaming<Report>);

impl Head {
    /// # Errors
    /// [`AskError`]; that the head does not trust this end may show only with the first call.
    pub async fn dial(&self) -> Result<Line, AskError> {
        within(async {
            let socket = TcpStream::connect(self.at).await.map_err(AskError::Connect)?;
            socket.set_nodelay(true).map_err(AskError::Connect)?;
            let Some(identity) = &self.identity else { return self.line(socket).await };
            let connector = TlsConnector::from(identity.client(&[HTTP2]));
            let stream = connector.connect(Name::Head.server(), socket).await;
            let stream = stream.map_err(|e| AskError::Connect(refusal(e)))?;
            if stream.get_ref().1.alpn_protocol() != Some(HTTP2) {
                return Err(AskError::Old);
            }
            self.line(stream).await
        })
        .await
    }

    async fn line(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Line, AskError> {
        let bearer = format!("Bearer {}", self.token).parse().map_err(|_| AskError::Token)?;
        let mut builder = Builder::new(TokioExecutor::new());
        builder.timer(TokioTimer::new()).keep_alive_interval(ALIVE).keep_alive_timeout(ALIVE);
        let (wire, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(AskError::Connection)?;
        // Whoever waits for an answer hears of its end.
        tokio::spawn(connection);
        let origin = http::Uri::from_static("http://head");
        let client = HeadClient::with_origin(Wire(wire), origin).max_decoding_message_size(MAX_REPORT);
        Ok(Line { client, bearer })
    }
}

impl Line {
    /// # Errors
    /// [`AskError`]: the head does not take this end's certificate or token, or cannot tell.
    pub async fn watch(&self) -> Result<Reports, AskError> {
        let reports = self.call(|mut client, request| async move { client.watch(request).await }, WatchRequest {});
        Ok(Reports(reports.await?))
    }

    /// Agrees to a plan of the head; what it says to that.
    ///
    /// # Errors
    /// [`AskError::Call`] with the head's reason, where that plan is not recommended.
    pub async fn approve(&self, revision: u64) -> Result<String, AskError> {
        let request = ApproveRequest { revision };
        let answer = self.call(|mut client, request| async move { client.approve(request).await }, request);
        Ok(answer.await?.message)
    }

    async fn call<Q, A, F>(
        &self,
        call: impl FnOnce(HeadClient<Wire>, Request<Q>) -> F,
        message: Q,
    ) -> Result<A, AskError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let mut request = Request::new(message);
        request.metadata_mut().insert(AUTHORIZATION, self.bearer.clone());
        let answer = async { call(self.client.clone(), request).await.map_err(|e| AskError::Call(e.into())) };
        Ok(within(answer).await?.into_inner())
    }
}

impl Reports {
    /// The next report, whenever it comes; `None` when the head has ended.
    ///
    /// # Errors
    /// [`AskError`]: the connection is lost, or what came is no report.
    pub async fn next(&mut self) -> Result<Option<JobReport>, AskError> {
        let next = self.0.message().await.map_err(|e| AskError::Call(e.into()))?;
        Ok(next.map(Into::into))
    }

    /// The first report, which is there already.
    pub async fn first(&mut self) -> Result<Option<JobReport>, AskError> {
        within(self.next()).await
    }
}

async fn within<T>(work: impl Future<Output = Result<T, AskError>>) -> Result<T, AskError> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or(Err(AskError::Silent))
}

/// Requests of tonic over a connection of hyper.
#[derive(Clone)]
struct Wire(SendRequest<Body>);

impl Service<http::Request<Body>> for Wire {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
