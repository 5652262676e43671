//! Worker processes: started, watched, and never left behind.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::device::breadcrumb;
use crate::runtime::RuntimeError;

/// XNNPACK packs the weights of a matrix product once per address and takes them to be the same for ever after. Ours
/// are updated in place, so matrix products go to YNNPACK, as in JAX: see docs/decisions/0005.
const CPU_KERNELS: &str = "--xla_cpu_use_xnnpack=false --xla_cpu_experimental_ynn_fusion_type=individual_dot,reduce";

/// How a worker is started.
pub struct Spawn<'a> {
    pub connect: std::net::SocketAddr,
    pub token: &'a str,
    pub token_variable: &'a str,
    /// Flags of the user's own for XLA.
    pub xla_flags: &'a str,
    pub plugin: &'a Path,
    pub plugin_sha256: Option<&'a str>,
    pub run_dir: &'a Path,
    /// By rank.
    pub cores: &'a [Vec<usize>],
}

/// Running workers; killed when dropped.
pub struct Workers {
    children: Vec<Child>,
    run_dir: PathBuf,
}

impl Workers {
    pub fn start(spawn: &Spawn<'_>) -> anyhow::Result<Self> {
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        let mut workers = Self { children: Vec::new(), run_dir: spawn.run_dir.to_owned() };
        for (rank, cores) in spawn.cores.iter().enumerate() {
            let path = log_path(spawn.run_dir, rank);
            let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
            let cores = cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
            let mut command = Command::new(&exe);
            command
                .arg("worker")
                .args(["--connect", &spawn.connect.to_string(), "--rank", &rank.to_string(), "--cores", &cores])
                .args(["--parent", &std::process::id().to_string()])
                .arg("--plugin")
                .arg(spawn.plugin)
                .arg("--breadcrumb")
                .arg(crumb_path(spawn.run_dir, rank))
                .env(spawn.token_variable, spawn.token)
                .env("XLA_FLAGS", format!("{} {CPU_KERNELS}", spawn.xla_flags).trim())
                .stdin(Stdio::null())
                .stdout(log.try_clone().context("cannot share the log file")?)
                .stderr(log)
                // Ctrl-C goes to the parent alone, which stops the workers in order.
                .process_group(0);
            if let Some(sha256) = spawn.plugin_sha256 {
                command.args(["--plugin-sha256", sha256]);
            }
            workers.children.push(command.spawn().with_context(|| format!("cannot start {}", exe.display()))?);
        }
        Ok(workers)
    }

    pub fn pids(&self) -> Vec<u32> {
        self.children.iter().map(Child::id).collect()
    }

    /// An error when a worker has ended by itself.
    pub fn check(&mut self) -> Result<(), RuntimeError> {
        for rank in 0..self.children.len() {
            if let Ok(Some(status)) = self.children[rank].try_wait()
                && !status.success()
            {
                let message = self.obituary(rank, status);
                return Err(RuntimeError::WorkerLost { rank: rank as u32, message });
            }
        }
        Ok(())
    }

    /// The best explanation of a failure: a dead worker's, if there is one.
    pub fn explain(&mut self, error: RuntimeError) -> RuntimeError {
        // What a worker says of itself is better than how it ended.
        if matches!(error, RuntimeError::WorkerFailed { .. }) {
            return error;
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            if let Err(dead) = self.check_signals() {
                return dead;
            }
            if Instant::now() > deadline {
                return self.check().err().unwrap_or(error);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// An error when a worker was ended by a signal.
    fn check_signals(&mut self) -> Result<(), RuntimeError> {
        for rank in 0..self.children.len() {
            if let Ok(Some(status)) = self.children[rank].try_wait()
                && status.signal().is_some()
            {
                let message = self.obituary(rank, status);
                return Err(RuntimeError::WorkerLost { rank: rank as u32, message });
            }
        }
        Ok(())
    }

    fn obituary(&self, rank: usize, status: ExitStatus) -> String {
        let path = log_path(&self.run_dir, rank);
        let how = match status.signal() {
            Some(libc::SIGKILL) => "was killed (SIGKILL; perhaps the machine ran out of memory)".to_owned(),
            Some(signal) => format!("ended by signal {signal}"),
            None => format!("ended with code {}", status.code().unwrap_or(-1)),
        };
        let module = breadcrumb::read(&crumb_path(&self.run_dir, rank));
        let module = module.map_or(String::new(), |m| format!(" while the plug-in compiled module {m:?}"));
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().filter(|l| !l.trim().is_empty()).take(3).collect();
        let last: String = last.iter().rev().map(|l| format!("\n  {l}")).collect();
        format!("{how}{module}; its log is {}{last}", path.display())
    }

    /// Waits for workers that were told to finish; those that do not are killed.
    pub fn join(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        for child in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.children {
            if matches!(child.try_wait(), Ok(None)) {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }
}

fn log_path(run_dir: &Path, rank: usize) -> PathBuf {
    run_dir.join(format!("worker-{rank}.log"))
}

fn crumb_path(run_dir: &Path, rank: usize) -> PathBuf {
    run_dir.join(format!(".worker-{rank}.compiling"))
}
