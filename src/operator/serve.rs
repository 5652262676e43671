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
    /// Looks that took at most so long, by [`BOUNDS`]; longer ones are last.
    took: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

/// Seconds.
const BOUNDS: [f64; 10] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

impl Counts {
    pub fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A look at a job has come to its end.
    pub fn took(&self, time: Duration) {
        let at = BOUNDS.iter().position(|b| time.as_secs_f64() <= *b).unwrap_or(BOUNDS.len());
        Self::add(&self.took[at]);
        self.micros.fetch_add(time.as_micros().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// As Prometheus reads histograms.
    fn latency(&self) -> String {
        const NAME: &str = "foreshard_operator_reconcile_seconds";
        let mut text = format!("# HELP {NAME} Time of a look at a job that did not fail\n# TYPE {NAME} histogram\n");
        let mut sum = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, n) in bounds.zip(&self.took) {
            sum += n.load(Ordering::Relaxed);
            text.push_str(&format!("{NAME}_bucket{{le=\"{bound}\"}} {sum}\n"));
        }
        let seconds = self.micros.load(Ordering::Relaxed) as f64 / 1e6;
        text + &format!("{NAME}_sum {seconds}\n{NAME}_count {sum}\n")
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
            self.latency(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_counted_by_how_long_they_took() {
        let counts = Counts::default();
        [2, 20, 20, 60_000].into_iter().for_each(|ms| counts.took(Duration::from_millis(ms)));
        let text = counts.render();
        for line in
            ["_bucket{le=\"0.003\"} 1", "_bucket{le=\"0.03\"} 3", "_bucket{le=\"+Inf\"} 4", "_sum 60.042", "_count 4"]
        {
            assert!(text.contains(&format!("foreshard_operator_reconcile_seconds{line}\n")), "{line}: {text}");
        }
    }
}
