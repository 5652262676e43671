//! `foreshard operator`

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;

use crate::operator::reconcile::{Config, run as watch};
use crate::operator::render::Site;

/// Run the controller of TrainingJobs on a Kubernetes cluster.
///
/// It finds the API server as kubectl does, or by the service account of its pod. The Helm chart and manifests/ start it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image that heads and workers run.
    #[arg(long, env = "FORESHARD_IMAGE", hide_env_values = true)]
    image: String,
    /// When nodes fetch that image.
    #[arg(long, value_name = "POLICY", default_value = "IfNotPresent")]
    image_pull_policy: String,
    /// PJRT plug-ins in that image, by device: cpu, nvidia.com/gpu, google.com/tpu or another extended resource. May be
    /// given several times. Jobs on devices without one are refused.
    #[arg(
        long,
        value_name = "DEVICE=FILE",
        default_value = "cpu=/usr/local/lib/foreshard/xla_cpu_pjrt.so",
        value_parser = plugin
    )]
    image_plugin: Vec<(String, String)>,
    /// Namespace the operator runs in: it alone may ask heads how far they are.
    #[arg(long, env = "POD_NAMESPACE", hide_env_values = true, default_value = "foreshard-system")]
    namespace: String,
    /// Name of this operator among those of its cluster: one of them works, the others stand by.
    #[arg(long, value_name = "NAME", env = "POD_NAME", hide_env_values = true, default_value = "foreshard-operator")]
    identity: String,
    /// Only jobs of this namespace; all when absent.
    #[arg(long, value_name = "NAMESPACE")]
    watch_namespace: Option<String>,
    /// Where health and metrics are served.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Jobs looked at at once.
    #[arg(long, value_name = "N", default_value_t = 8)]
    concurrency: u16,
    /// What is logged, such as info or foreshard=debug.
    #[arg(long, value_name = "FILTER", env = "FORESHARD_LOG", hide_env_values = true, default_value = "info")]
    log: String,
}

fn plugin(text: &str) -> Result<(String, String), String> {
    let known = text.split_once('=').filter(|(device, file)| !device.is_empty() && !file.is_empty());
    let (device, file) = known.ok_or("write DEVICE=FILE, such as nvidia.com/gpu=/usr/local/lib/foreshard/cuda.so")?;
    Ok((device.to_owned(), file.to_owned()))
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    tracing_subscriber::EnvFilter::try_new(&args.log)
        .with_context(|| format!("--log {}", args.log))
        .map_err(super::bad_input)?;
    super::log_to_stderr(true, &args.log);
    let config = Config {
        site: Site {
            image: args.image,
            pull_policy: args.image_pull_policy,
            plugins: args.image_plugin.into_iter().collect(),
            namespace: args.namespace,
        },
        watch: args.watch_namespace,
        listen: args.listen,
        concurrency: args.concurrency,
        identity: args.identity,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(watch(config))?;
    Ok(ExitCode::SUCCESS)
}
