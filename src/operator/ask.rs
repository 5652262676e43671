//! Asks the head of a job how far it is.

use std::net::IpAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::tls::{Identity, Name};
use crate::wire::report::{AUTHORIZATION, JobReport, MAX_REPORT};

const PATIENCE: Duration = Duration::from_secs(2);

/// The report of the head at an address; `None` where it has no time or nothing to say.
///
/// # Errors
/// There is no head yet, or who answers is not the head of this job.
pub async fn ask(at: IpAddr, port: u16, token: &str, identity: &Identity) -> std::io::Result<Option<JobReport>> {
    match tokio::time::timeout(PATIENCE, exchange(at, port, token, identity)).await {
        Ok(answer) => answer,
        Err(_) => Ok(None),
    }
}

async fn exchange(at: IpAddr, port: u16, token: &str, identity: &Identity) -> std::io::Result<Option<JobReport>> {
    let socket = TcpStream::connect((at, port)).await?;
    let mut stream = TlsConnector::from(identity.client()).connect(Name::Head.server(), socket).await?;
    let request =
        format!("GET /status HTTP/1.1\r\nhost: head\r\n{AUTHORIZATION}: Bearer {token}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_REPORT as u64).read_to_end(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer);
    let body = text.strip_prefix("HTTP/1.1 200 ").and_then(|t| t.split_once("\r\n\r\n"));
    Ok(body.and_then(|(_, json)| serde_json::from_str(json).ok()))
}
