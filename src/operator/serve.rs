//! Health and metrics of the operator itself.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::OperatorError;

/// What the operator counts.
#[derive(Debug, Default)]
pub struct Counts {
    pub ready: AtomicBool,
    pub reconciles: AtomicU64,
    pub errors: AtomicU64,
    /// Requests that change something.
    pub writes: AtomicU64,
}

impl Counts {
    pub fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn render(&self) -> String {
        let line = |name: &str, help: &str, counter: &AtomicU64| {
            let name = format!("foreshard_operator_{name}_total");
            format!("# HELP {name} {help}\n# TYPE {name} counter\n{name} {}\n", counter.load(Ordering::Relaxed))
        };
        [
            line("reconciles", "Looks at a job", &self.reconciles),
            line("errors", "Looks at a job that failed", &self.errors),
            line("writes", "Requests to the API server that change something", &self.writes),
        ]
        .concat()
    }
}

/// Serves `/healthz`, `/readyz` and `/metrics` until the program ends.
pub async fn serve(address: SocketAddr, counts: Arc<Counts>) -> Result<(), OperatorError> {
    let listener = TcpListener::bind(address).await.map_err(|source| OperatorError::Listen { address, source })?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let counts = counts.clone();
            tokio::spawn(tokio::time::timeout(Duration::from_secs(5), async move {
                // Whoever went away asks again.
                let _ = answer(stream, &counts).await;
            }));
        }
    });
    Ok(())
}

async fn answer(mut stream: TcpStream, counts: &Counts) -> std::io::Result<()> {
    let (reading, mut writing) = stream.split();
    let mut request = String::new();
    let mut reading = BufReader::new(tokio::io::AsyncReadExt::take(reading, 8 << 10));
    reading.read_line(&mut request).await?;
    let mut header = String::new();
    while reading.read_line(&mut header).await? > 2 {
        header.clear();
    }
    let ready = counts.ready.load(Ordering::Relaxed);
    let (status, body) = match request.split_whitespace().nth(1) {
        Some("/healthz") => ("200 OK", "ok\n".to_owned()),
        Some("/readyz") if ready => ("200 OK", "ok\n".to_owned()),
        Some("/readyz") => ("503 Service Unavailable", "the caches are being filled\n".to_owned()),
        Some("/metrics") => ("200 OK", counts.render()),
        _ => ("404 Not Found", String::new()),
    };
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n", body.len());
    writing.write_all(format!("{head}connection: close\r\n\r\n{body}").as_bytes()).await
}
