//! Asks the head of a job how far it is, and tells it what people have agreed to.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::tls::{Identity, Name};
use crate::wire::report::{AUTHORIZATION, JobReport, MAX_REPORT};

const PATIENCE: Duration = Duration::from_secs(2);

/// The head of a job, as the operator reaches it.
pub struct Head {
    pub at: SocketAddr,
    pub token: String,
    pub identity: Identity,
}

impl Head {
    /// How far it is; `None` where it has no time or nothing to say.
    ///
    /// # Errors
    /// There is no head yet, or who answers is not the head of this job.
    pub async fn report(&self) -> std::io::Result<Option<JobReport>> {
        let answer = self.exchange("GET /status").await?;
        Ok(answer.and_then(|json| serde_json::from_str(&json).ok()))
    }

    /// Tells it that a plan of its own is agreed to; whether it takes it over.
    pub async fn approve(&self, revision: u64) -> std::io::Result<bool> {
        Ok(self.exchange(&format!("POST /approve/{revision}")).await?.is_some())
    }

    /// The body of a good answer.
    async fn exchange(&self, what: &str) -> std::io::Result<Option<String>> {
        tokio::time::timeout(PATIENCE, self.converse(what)).await.unwrap_or(Ok(None))
    }

    async fn converse(&self, what: &str) -> std::io::Result<Option<String>> {
        let socket = TcpStream::connect(self.at).await?;
        let mut stream = TlsConnector::from(self.identity.client()).connect(Name::Head.server(), socket).await?;
        let token = &self.token;
        let request =
            format!("{what} HTTP/1.1\r\nhost: head\r\n{AUTHORIZATION}: Bearer {token}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(MAX_REPORT as u64).read_to_end(&mut answer).await?;
        let text = String::from_utf8_lossy(&answer);
        let body = text.strip_prefix("HTTP/1.1 200 ").and_then(|t| t.split_once("\r\n\r\n"));
        Ok(body.map(|(_, body)| body.to_owned()))
    }
}
