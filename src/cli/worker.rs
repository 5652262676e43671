//! `foreshard worker`: started by the parent of a job, never by people.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::local::on_signal;
use super::{TERMINATED, log_to_stderr};
use crate::device::pjrt::{Pjrt, PluginSpec};
use crate::device::{DeviceError, affinity, cuda, heap};
use crate::local::bundle;
use crate::runtime::RuntimeError;
use crate::runtime::depart::Departure;
use crate::runtime::fail::Fail;
use crate::runtime::worker::{CacheConfig, WorkerConfig, run as work};
use crate::telemetry::Health;
use crate::tls::Identity;
use crate::units::Bytes;
use crate::wire::report::NO_DEVICE;

/// Execute one shard.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the parent listens: HOST:PORT.
    #[arg(long)]
    connect: String,
    /// Seconds the parent may take to listen there.
    #[arg(long, default_value_t = 10)]
    patience: u64,
    /// Address of this worker that its peers can reach.
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST.into())]
    listen: IpAddr,
    /// Port for peers; a free one when 0.
    #[arg(long, default_value_t = 0)]
    port: u16,
    #[arg(long)]
    worker: u32,
    /// Cores to run on, comma-separated.
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    /// Process that started this one; the worker ends with it.
    #[arg(long)]
    parent: Option<u32>,
    #[arg(long)]
    plugin: PathBuf,
    /// What the plug-in drives, as an extended resource of Kubernetes or cpu.
    #[arg(long)]
    device: Option<String>,
    #[arg(long)]
    plugin_sha256: Option<String>,
    /// Directory of compiled executables.
    #[arg(long, requires = "plugin_id")]
    cache: Option<PathBuf>,
    /// sha256 of the plug-in's file.
    #[arg(long)]
    plugin_id: Option<String>,
    /// Fail on purpose, such as kill@moving.
    #[arg(long)]
    fail: Option<Fail>,
    /// File that names the module being compiled.
    #[arg(long)]
    breadcrumb: PathBuf,
    /// Directory with the certificate of this worker.
    #[arg(long)]
    tls: Option<PathBuf>,
    /// Name of the job, for the log.
    #[arg(long, default_value = "")]
    job: String,
    /// Where probes are answered.
    #[arg(long)]
    health: Option<SocketAddr>,
    /// Where the reason of a failure is left.
    #[arg(long)]
    last_words: Option<PathBuf>,
    /// One JSON line per event on stderr.
    #[arg(long)]
    json: bool,
}

/// Environment variable with the job's secret: command lines are visible to everyone on the machine.
pub const TOKEN: &str = "FORESHARD_TOKEN";

/// Most that executables may take on disk; those used longest ago go first.
const CACHE_LIMIT: Bytes = Bytes(10 << 30);

/// How long a worker that is told to go waits for its state to be saved: less than Kubernetes waits for its end.
const MOMENT: Duration = Duration::from_secs(100);

pub fn run(args: Args) -> ExitCode {
    log_to_stderr(args.json, if args.json { "info" } else { "warn" });
    let Ok(token) = std::env::var(TOKEN) else {
        eprintln!("error: {TOKEN} is not set; workers are started by `foreshard local run`");
        return ExitCode::from(2);
    };
    let (json, job, worker, last_words) = (args.json, args.job.clone(), args.worker, args.last_words.clone());
    let departure = Arc::new(Departure::default());
    let told = match go_when_told(&departure, job.clone(), worker) {
        Ok(told) => told,
        Err(e) => {
            eprintln!("error: cannot listen for signals: {e}");
            return ExitCode::FAILURE;
        }
    };
    match start(args, token, departure) {
        Ok(()) => ExitCode::SUCCESS,
        // The parent has let it go.
        Err(_) if told.load(Ordering::SeqCst) => ExitCode::from(TERMINATED),
        Err(e) => {
            let code = if matches!(e, RuntimeError::NoDevice { .. }) { NO_DEVICE.into() } else { ExitCode::FAILURE };
            let why = format!("{:#}", anyhow::Error::from(e));
            if let Some(Err(e)) = last_words.map(|path| std::fs::write(path, &why)) {
                tracing::warn!(job, worker, why = e.to_string(), "no last words");
            }
            if json {
                tracing::error!(job, worker, why, "ends");
            } else {
                eprintln!("error: {why}");
            }
            code
        }
    }
}

/// Ends this process when it is told to: at once where nothing is lost with it, else when its state has been saved.
fn go_when_told(departure: &Arc<Departure>, job: String, worker: u32) -> std::io::Result<Arc<AtomicBool>> {
    let (told, departure) = (Arc::new(AtomicBool::new(false)), departure.clone());
    let first = told.clone();
    on_signal(move || {
        if first.swap(true, Ordering::SeqCst) {
            std::process::exit(TERMINATED.into());
        }
        // Counts also while a parent that reads nothing more is being told.
        let _ = std::thread::Builder::new().name("moment".to_owned()).spawn(|| {
            std::thread::sleep(MOMENT);
            std::process::exit(TERMINATED.into())
        });
        if !departure.announce() {
            std::process::exit(TERMINATED.into());
        }
        tracing::info!(job, worker, "told to go, waits for its state to be saved");
    })?;
    Ok(told)
}

fn start(args: Args, token: String, departure: Arc<Departure>) -> Result<(), RuntimeError> {
    let at = |source: DeviceError| RuntimeError::Device { at: "starting the worker".to_owned(), source };
    if let Some(parent) = args.parent {
        affinity::die_with_parent(parent).map_err(at)?;
    }
    heap::keep();
    let health = Arc::new(Health::default());
    if let Some(at) = args.health {
        let listen = |source| RuntimeError::Listen { address: at.to_string(), source };
        health.serve(at).map_err(listen)?;
    }
    if !args.cores.is_empty() {
        affinity::pin(&args.cores).map_err(at)?;
    }
    let cache = args.cache.zip(args.plugin_id).map(|(directory, plugin)| CacheConfig {
        directory,
        limit: CACHE_LIMIT,
        plugin,
        flags: std::env::var("XLA_FLAGS").unwrap_or_default(),
    });
    let identity = args.tls.as_deref().map(Identity::read).transpose()?;
    let config = WorkerConfig {
        connect: args.connect,
        patience: Duration::from_secs(args.patience),
        listen: (args.listen, args.port).into(),
        worker: args.worker,
        token,
        identity,
        cache,
        fail: args.fail,
        job: args.job,
        departure,
        health,
    };
    // A plug-in that is not there is told of before anybody waits for it.
    let spec = PluginSpec { path: Some(args.plugin.clone()), sha256: args.plugin_sha256, search: Vec::new() };
    let unable = |e| unable(e, args.device.as_deref(), &args.plugin);
    let plugin = spec.find().map_err(unable)?;
    let device = || Pjrt::new(&plugin, Some(args.breadcrumb)).map_err(unable);
    work(&config, device, |path, splits| {
        bundle::load(path)
            .and_then(|model| model.split(splits))
            .map_err(|e| RuntimeError::Bundle { path: path.to_owned(), message: e.to_string() })
    })
}

/// Why the plug-in of a worker cannot be used: for good, where neither the file nor the node will be another one.
fn unable(source: DeviceError, device: Option<&str>, plugin: &Path) -> RuntimeError {
    let is_driverless = || device == Some(GPU) && !cuda::driver_present();
    let hint = match &source {
        DeviceError::UnreadablePlugin { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound => {
            ", its plug-in is not there (image.plugins of the chart names a file of the image)"
        }
        DeviceError::Call { .. } | DeviceError::NoDevice { .. } if is_driverless() => {
            ", no NVIDIA driver (libcuda.so.1) can be loaded"
        }
        DeviceError::Call { .. } => {
            return RuntimeError::Device { at: "starting the plug-in".to_owned(), source };
        }
        _ => "",
    };
    let device = device.map_or_else(|| format!("plug-in {}", plugin.display()), str::to_owned);
    RuntimeError::NoDevice { device, hint, source }
}

/// The devices whose driver we know.
const GPU: &str = "nvidia.com/gpu";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_cannot_use_its_device_says_in_one_sentence_what_is_missing() {
        let plugin = Path::new("/lib/cuda.so");
        let said = |source, device| format!("{:#}", anyhow::Error::from(unable(source, device, plugin)));
        let missing =
            || DeviceError::UnreadablePlugin { path: plugin.to_owned(), cause: std::io::Error::from_raw_os_error(2) };
        assert_eq!(
            said(missing(), Some(GPU)),
            "cannot use nvidia.com/gpu, its plug-in is not there (image.plugins of the chart names a file of the image): \
             cannot read plug-in /lib/cuda.so: No such file or directory (os error 2)"
        );
        assert!(said(missing(), None).starts_with("cannot use plug-in /lib/cuda.so, "), "of a job without a cluster");
        // As jax-cuda13-pjrt 0.12 says it where there is no driver, as on the machines that this test runs on.
        let failed =
            || DeviceError::Call { entry: "PJRT_Client_Create", message: "No visible GPU devices.".to_owned() };
        if !cuda::driver_present() {
            assert_eq!(
                said(failed(), Some(GPU)),
                "cannot use nvidia.com/gpu, no NVIDIA driver (libcuda.so.1) can be loaded: \
                 PJRT_Client_Create: No visible GPU devices."
            );
        }
        // Another try may go better.
        assert!(matches!(unable(failed(), Some("google.com/tpu"), plugin), RuntimeError::Device { .. }));
    }
}
