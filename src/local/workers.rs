//! Worker processes: started, watched, buried.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::LocalError;
use crate::device::breadcrumb;
use crate::runtime::RuntimeError;

/// Lines of a dead worker's log that the error shows.
const TAIL: usize = 8;
/// How long a process may take to end once it is told to, or once its connection is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// What all workers of a job have in common.
#[derive(Clone, Debug)]
pub struct Start {
    /// This program.
    pub program: PathBuf,
    pub connect: SocketAddr,
    /// Goes through the environment: command lines can be read by every user.
    pub token: String,
    pub plugin: PathBuf,
    pub plugin_sha256: Option<String>,
}

/// Name of the variable that carries the token.
pub const TOKEN: &str = "FORESHARD_TOKEN";

struct Worker {
    child: Child,
    log: PathBuf,
    breadcrumb: PathBuf,
    ended: Option<ExitStatus>,
}

/// All workers of a job. Dropping it kills and buries what still lives.
pub struct Workers {
    workers: Vec<Worker>,
}

impl Workers {
    /// One process per entry of `cores`; rank is the position. Call it from a thread that outlives the job: the kernel
    /// kills workers when the thread that started them ends.
    pub fn start(start: &Start, cores: &[Vec<usize>], run: &Path) -> Result<Self, LocalError> {
        let mut all = Self { workers: Vec::new() };
        for (rank, cores) in cores.iter().enumerate() {
            let log = run.join(format!("worker-{rank}.log"));
            let breadcrumb = run.join(format!(".worker-{rank}.module"));
            let file = File::create(&log).map_err(|source| LocalError::Write { path: log.clone(), source })?;
            let again = file.try_clone().map_err(|source| LocalError::Write { path: log.clone(), source })?;
            let mut command = Command::new(&start.program);
            command
                .arg("worker")
                .args(["--connect", &start.connect.to_string()])
                .args(["--rank", &rank.to_string()])
                .args(["--cores", &list(cores)])
                .args(["--parent", &std::process::id().to_string()])
                .arg("--plugin")
                .arg(&start.plugin)
                .arg("--breadcrumb")
                .arg(&breadcrumb)
                .args(start.plugin_sha256.iter().flat_map(|hex| ["--plugin-sha256", hex]))
                .env(TOKEN, &start.token)
                .stdin(Stdio::null())
                .stdout(file)
                .stderr(again)
                // Ctrl-C in a terminal goes to a whole process group: it is the parent's to handle.
                .process_group(0);
            let child = command.spawn().map_err(|source| LocalError::Spawn {
                rank: rank as u32,
                program: start.program.clone(),
                source,
            })?;
            all.workers.push(Worker { child, log, breadcrumb, ended: None });
        }
        Ok(all)
    }

    pub fn pids(&self) -> Vec<u32> {
        self.workers.iter().map(|w| w.child.id()).collect()
    }

    /// An error if a worker has ended: to be called while none should.
    pub fn alive(&mut self) -> Result<(), RuntimeError> {
        match self.ended() {
            None => Ok(()),
            Some(rank) => Err(RuntimeError::Stopped(format!("worker {rank} has ended"))),
        }
    }

    fn ended(&mut self) -> Option<usize> {
        for w in &mut self.workers {
            if w.ended.is_none() {
                w.ended = w.child.try_wait().ok().flatten();
            }
        }
        self.workers.iter().position(|w| w.ended.is_some())
    }

    /// Finds the cause of a session's error: a worker that was killed explains more than its lost connection.
    pub fn explain(&mut self, error: RuntimeError) -> LocalError {
        let doubtful =
            matches!(error, RuntimeError::WorkerLost { .. } | RuntimeError::Stopped(_) | RuntimeError::Link { .. });
        if !doubtful {
            return error.into();
        }
        // The connection breaks a moment before the process can be buried.
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.ended().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Survivors end with an error when their peer is gone; a signal tells who was first.
        let violent = |w: &Worker| w.ended.is_some_and(|s| s.signal().is_some());
        let failed = |w: &Worker| w.ended.is_some_and(|s| !s.success());
        let culprit = self.workers.iter().position(violent).or_else(|| self.workers.iter().position(failed));
        let Some(rank) = culprit else { return error.into() };
        let w = &self.workers[rank];
        LocalError::WorkerDied {
            rank: rank as u32,
            end: end(w.ended.unwrap_or_default()),
            module: breadcrumb::read(&w.breadcrumb),
            log: w.log.clone(),
            tail: tail(&w.log, TAIL),
        }
    }

    /// Waits for workers that were told to finish.
    pub fn join(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.ended();
            if self.workers.iter().all(|w| w.ended.is_some()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for w in &mut self.workers {
            if w.ended.is_none() {
                let _ = w.child.kill();
                let _ = w.child.wait();
            }
            let _ = std::fs::remove_file(&w.breadcrumb);
        }
    }
}

fn list(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// How a process ended, in words.
fn end(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => {
            let name = match signal {
                libc::SIGABRT => " (SIGABRT: the plug-in gave up)",
                libc::SIGSEGV => " (SIGSEGV)",
                libc::SIGKILL => " (SIGKILL; by the kernel when memory runs out, or by somebody)",
                libc::SIGTERM => " (SIGTERM)",
                libc::SIGBUS => " (SIGBUS)",
                libc::SIGILL => " (SIGILL: the plug-in wants a newer processor)",
                _ => "",
            };
            format!("was killed by signal {signal}{name}")
        }
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The last `n` lines of a log, without reading more of it into memory than that.
fn tail(path: &Path, n: usize) -> Vec<String> {
    let Ok(file) = File::open(path) else { return Vec::new() };
    let mut last = VecDeque::new();
    for line in BufReader::new(file).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.is_empty() {
            continue;
        }
        last.push_back(line);
        if last.len() > n {
            last.pop_front();
        }
    }
    last.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_end_of_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, b"1\n2\n\n\xff3\n4").unwrap();
        assert_eq!(tail(&log, 2), ["\u{fffd}3", "4"]);
        assert_eq!(tail(&dir.path().join("none"), 2), Vec::<String>::new());
    }

    #[test]
    fn says_which_signal_ended_a_process() {
        assert_eq!(end(ExitStatus::from_raw(libc::SIGSEGV)), "was killed by signal 11 (SIGSEGV)");
        assert_eq!(end(ExitStatus::from_raw(3 << 8)), "ended with exit code 3");
    }

    #[test]
    fn an_error_names_module_and_log() {
        let e = LocalError::WorkerDied {
            rank: 1,
            end: "was killed by signal 6".to_owned(),
            module: Some("seg0".to_owned()),
            log: PathBuf::from("runs/a-1/worker-1.log"),
            tail: vec!["first".to_owned(), "second".to_owned()],
        };
        let text = e.to_string();
        assert!(text.starts_with("worker 1 was killed by signal 6 while the plug-in compiled module \"seg0\""), "{text}");
        assert!(text.ends_with("runs/a-1/worker-1.log:\n    first\n    second"), "{text}");
    }
}
