//! Answers to a kubelet's probes, from a thread that does nothing else: a process that compiles or waits still answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a process may stay when its work is over.
const LINGER: Duration = Duration::from_secs(60);

/// What probes are told.
#[derive(Debug, Default)]
pub struct Health {
    ready: AtomicBool,
    /// Since when there is nothing left to do here.
    over: Mutex<Option<Instant>>,
}

impl Health {
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// The process is about to end; one that hangs instead is not alive after a while.
    pub fn end(&self) {
        self.set_ready(false);
        self.over.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert_with(Instant::now);
    }

    fn is_alive(&self) -> bool {
        self.over.lock().unwrap_or_else(|p| p.into_inner()).is_none_or(|since| since.elapsed() < LINGER)
    }

    /// Answers `GET /livez` and `GET /readyz` until the process ends; everyone may ask.
    pub fn serve(self: &Arc<Self>, at: SocketAddr) -> std::io::Result<()> {
        let listener = TcpListener::bind(at)?;
        let health = self.clone();
        let serve = move || {
            // Whoever went away asks again.
            listener.incoming().flatten().for_each(|stream| drop(health.answer(&stream)));
        };
        std::thread::Builder::new().name("health".to_owned()).spawn(serve).map(drop)
    }

    fn answer(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(1);
        const MAX_REQUEST: u64 = 8 << 10;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut lines = BufReader::new(stream.take(MAX_REQUEST)).lines();
        let request = lines.next().transpose()?.unwrap_or_default();
        lines.map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
        let (status, body) = match request.split_whitespace().nth(1) {
            Some("/livez") if self.is_alive() => ("200 OK", "ok\n"),
            Some("/livez") => ("503 Service Unavailable", "its work is over and it does not end\n"),
            Some("/readyz") if self.ready.load(Ordering::Relaxed) => ("200 OK", "ok\n"),
            Some("/readyz") => ("503 Service Unavailable", "not yet\n"),
            _ => ("404 Not Found", ""),
        };
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(at: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(at).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer[9..12].to_owned()
    }

    #[test]
    fn one_that_hangs_when_its_work_is_over_is_not_alive() {
        let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let health = Arc::new(Health::default());
        health.serve(at).unwrap();
        assert_eq!((ask(at, "/livez"), ask(at, "/readyz")), ("200".into(), "503".into()));
        health.set_ready(true);
        assert_eq!(ask(at, "/readyz"), "200");
        health.end();
        assert_eq!((ask(at, "/livez"), ask(at, "/readyz")), ("200".into(), "503".into()), "it has a moment");
        *health.over.lock().unwrap() = Instant::now().checked_sub(LINGER);
        assert_eq!(ask(at, "/livez"), "503");
        assert_eq!(ask(at, "/"), "404");
    }
}
