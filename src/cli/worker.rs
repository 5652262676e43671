//! `foreshard worker`: started by the parent of a job, never by people.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::device::pjrt::{Pjrt, PluginSpec};
use crate::device::{DeviceError, affinity, heap};
use crate::local::bundle;
use crate::runtime::RuntimeError;
use crate::runtime::fail::Fail;
use crate::runtime::worker::{CacheConfig, WorkerConfig, run as work};
use crate::units::Bytes;

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
}

/// Environment variable with the job's secret: command lines are visible to everyone on the machine.
pub const TOKEN: &str = "FORESHARD_TOKEN";

/// Most that executables may take on disk; those used longest ago go first.
const CACHE_LIMIT: Bytes = Bytes(10 << 30);

pub fn run(args: Args) -> ExitCode {
    let Ok(token) = std::env::var(TOKEN) else {
        eprintln!("error: {TOKEN} is not set; workers are started by `foreshard local run`");
        return ExitCode::from(2);
    };
    if let Err(e) = start(args, token) {
        eprintln!("error: {:#}", anyhow::Error::from(e));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn start(args: Args, token: String) -> Result<(), RuntimeError> {
    let at = |source: DeviceError| RuntimeError::Device { at: "starting the worker".to_owned(), source };
    if let Some(parent) = args.parent {
        affinity::die_with_parent(parent).map_err(at)?;
    }
    heap::keep();
    if !args.cores.is_empty() {
        affinity::pin(&args.cores).map_err(at)?;
    }
    let cache = args.cache.zip(args.plugin_id).map(|(directory, plugin)| CacheConfig {
        directory,
        limit: CACHE_LIMIT,
        plugin,
        flags: std::env::var("XLA_FLAGS").unwrap_or_default(),
    });
    let config = WorkerConfig {
        connect: args.connect,
        patience: Duration::from_secs(args.patience),
        listen: (args.listen, args.port).into(),
        worker: args.worker,
        token,
        cache,
        fail: args.fail,
    };
    let device = || {
        let at = |source| RuntimeError::Device { at: "starting the plug-in".to_owned(), source };
        let spec = PluginSpec { path: Some(args.plugin), sha256: args.plugin_sha256, search: Vec::new() };
        Pjrt::new(&spec.find().map_err(at)?, Some(args.breadcrumb)).map_err(at)
    };
    work(&config, device, |path| {
        bundle::load(path).map_err(|e| RuntimeError::Bundle { path: path.to_owned(), message: e.to_string() })
    })
}
