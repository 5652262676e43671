//! Worker processes: started, watched, and never left behind.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::run_dir::write_beside;
use crate::device::pjrt::CPU_KERNELS;
use crate::device::{affinity, breadcrumb};
use crate::runtime::RuntimeError;
use crate::units::{Bytes, Seconds};
use crate::wire::control::WorkerId;

/// How workers of a job are started.
pub struct Launcher {
    pub connect: std::net::SocketAddr,
    pub token: String,
    pub token_variable: &'static str,
    /// Flags of the user's own for XLA.
    pub xla_flags: String,
    pub plugin: PathBuf,
    pub plugin_sha256: Option<String>,
    pub run_dir: PathBuf,
    /// Directory of compiled executables, and the sha256 of the plug-in's file.
    pub cache: Option<(PathBuf, String)>,
    /// Workers that fail on purpose, the first time they run.
    pub fail: BTreeMap<WorkerId, String>,
}

/// What a process has used since it started, or in some time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Used {
    /// Of all cores together.
    pub cpu: Seconds,
    /// Resident now.
    pub memory: Bytes,
}

impl Used {
    /// `None` where the kernel does not say.
    fn of(pid: u32) -> Option<Self> {
        // Linux counts in hundredths of a second for programs, whatever it does itself.
        const TICK: f64 = 0.01;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name of the program, in brackets, may hold anything.
        let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace().skip(11);
        let mut ticks = || fields.next()?.parse::<f64>().ok();
        let cpu = Seconds((ticks()? + ticks()?) * TICK);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        Some(Self { cpu, memory: Bytes(kib * 1024) })
    }
}

/// Worker processes; killed when dropped.
pub struct Workers {
    /// Absent: workers come by themselves, from other machines, and whoever sent them starts them anew.
    launcher: Option<Launcher>,
    children: BTreeMap<WorkerId, Child>,
}

impl Workers {
    pub fn new(launcher: Option<Launcher>) -> Self {
        Self { launcher, children: BTreeMap::new() }
    }

    /// Starts a worker on its cores; its log is continued if it has run before.
    pub fn start(&mut self, worker: WorkerId, cores: &[usize]) -> anyhow::Result<()> {
        // One that left an earlier plan may still be on its way out.
        self.kill(worker);
        let Some(launcher) = &mut self.launcher else { return Ok(()) };
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        let Launcher { connect, token, token_variable, xla_flags, plugin, plugin_sha256, run_dir, .. } = &*launcher;
        let path = log_path(run_dir, worker);
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}", path.display()))?;
        let cores = cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let mut command = Command::new(&exe);
        command
            .arg("worker")
            .args(["--connect", &connect.to_string(), "--worker", &worker.to_string(), "--cores", &cores])
            .args(["--parent", &std::process::id().to_string()])
            .arg("--plugin")
            .arg(plugin)
            .arg("--breadcrumb")
            .arg(crumb_path(run_dir, worker))
            .env(token_variable, token)
            .env("XLA_FLAGS", format!("{CPU_KERNELS} {xla_flags}").trim_end())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the log file")?)
            .stderr(log)
            // Ctrl-C goes to the parent alone, which stops the workers in order.
            .process_group(0);
        if let Some(sha256) = plugin_sha256 {
            command.args(["--plugin-sha256", sha256]);
        }
        if let Some((directory, plugin)) = &launcher.cache {
            command.arg("--cache").arg(directory).args(["--plugin-id", plugin]);
        }
        if let Some(fail) = launcher.fail.remove(&worker) {
            command.args(["--fail", &fail]);
        }
        let child = command.spawn().with_context(|| format!("cannot start {}", exe.display()))?;
        self.children.insert(worker, child);
        // `pids.json`: the process of every worker, by worker.
        let pids: BTreeMap<WorkerId, u32> = self.children.iter().map(|(&w, c)| (w, c.id())).collect();
        write_beside(&launcher.run_dir, "pids.json", &serde_json::to_string(&pids)?)
    }

    /// Workers whose processes have ended by themselves and not well.
    pub fn dead(&mut self) -> Vec<WorkerId> {
        let ended = |c: &mut Child| matches!(c.try_wait(), Ok(Some(status)) if !status.success());
        self.children.iter_mut().filter_map(|(&w, c)| ended(c).then_some(w)).collect()
    }

    /// Ends a worker at once, if it is there.
    pub fn kill(&mut self, worker: WorkerId) {
        if let Some(mut child) = self.children.remove(&worker) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Workers that have a process.
    pub fn all(&self) -> Vec<WorkerId> {
        self.children.keys().copied().collect()
    }

    /// What a worker has used so far.
    pub fn used(&self, worker: WorkerId) -> Option<Used> {
        Used::of(self.children.get(&worker)?.id())
    }

    /// Gives a running worker other cores.
    pub fn repin(&self, worker: WorkerId, cores: &[usize]) {
        if let Some(child) = self.children.get(&worker) {
            affinity::repin(child.id(), cores);
        }
    }

    /// An error when a worker has ended by itself.
    pub fn check(&mut self) -> Result<(), RuntimeError> {
        self.check_of(&|_| true)
    }

    /// An error when one of such workers has ended by itself.
    pub fn check_of(&mut self, of: &dyn Fn(WorkerId) -> bool) -> Result<(), RuntimeError> {
        self.look(of, |status| !status.success())
    }

    /// The best explanation of a failure: a dead worker's, if there is one.
    pub fn explain(&mut self, error: RuntimeError) -> RuntimeError {
        // What a worker says of itself is better than how it ended.
        if matches!(error, RuntimeError::WorkerFailed { .. } | RuntimeError::Departed { .. }) {
            return error;
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            if let Err(dead) = self.look(&|_| true, |status| status.signal().is_some()) {
                return dead;
            }
            if Instant::now() > deadline {
                return self.check().err().unwrap_or(error);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// An error when one of such workers has ended in such a way.
    fn look(&mut self, of: &dyn Fn(WorkerId) -> bool, such: impl Fn(&ExitStatus) -> bool) -> Result<(), RuntimeError> {
        let Some(Launcher { run_dir, .. }) = &self.launcher else { return Ok(()) };
        for (&worker, child) in self.children.iter_mut().filter(|(w, _)| of(**w)) {
            if let Ok(Some(status)) = child.try_wait()
                && such(&status)
            {
                let message = obituary(run_dir, worker, status);
                return Err(RuntimeError::WorkerLost { rank: worker, message });
            }
        }
        Ok(())
    }

    /// Waits for workers that were told to finish; those that do not are killed.
    pub fn join(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        for child in self.children.values_mut() {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// How a worker ended, as far as can be told.
fn obituary(run_dir: &Path, worker: WorkerId, status: ExitStatus) -> String {
    let path = log_path(run_dir, worker);
    let how = match status.signal() {
        Some(libc::SIGKILL) => "was killed (SIGKILL; perhaps the machine ran out of memory)".to_owned(),
        Some(signal) => format!("ended by signal {signal}"),
        None => format!("ended with code {}", status.code().unwrap_or(-1)),
    };
    let module = breadcrumb::read(&crumb_path(run_dir, worker));
    let module = module.map_or(String::new(), |m| format!(" while the plug-in compiled module {m:?}"));
    let log = std::fs::read_to_string(&path).unwrap_or_default();
    let last: Vec<&str> = log.lines().rev().filter(|l| !l.trim().is_empty()).take(3).collect();
    let last: String = last.iter().rev().map(|l| format!("\n  {l}")).collect();
    format!("{how}{module}; its log is {}{last}", path.display())
}

impl Drop for Workers {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            if matches!(child.try_wait(), Ok(None)) {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }
}

fn log_path(run_dir: &Path, worker: WorkerId) -> PathBuf {
    run_dir.join(format!("worker-{worker}.log"))
}

fn crumb_path(run_dir: &Path, worker: WorkerId) -> PathBuf {
    run_dir.join(format!(".worker-{worker}.compiling"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_what_it_uses() {
        let before = Used::of(std::process::id()).unwrap();
        let mut block = vec![1u8; 64 << 20];
        while Used::of(std::process::id()).unwrap().cpu < before.cpu + Seconds(0.02) {
            block.iter_mut().for_each(|b| *b = b.wrapping_mul(3));
        }
        let after = Used::of(std::process::id()).unwrap();
        assert!(after.memory > Bytes(32 << 20) && block[7] > 0, "{after:?}");
        assert_eq!(Used::of(u32::MAX), None);
    }
}
