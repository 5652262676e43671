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
    /// PJRT plug-in in that image.
    #[arg(long, value_name = "FILE", default_value = "/usr/local/lib/foreshard/xla_cpu_pjrt.so")]
    image_plugin: String,
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

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    tracing_subscriber::EnvFilter::try_new(&args.log)
        .with_context(|| format!("--log {}", args.log))
        .map_err(super::bad_input)?;
    super::log_to_stderr(true, &args.log);
    let config = Config {
        site: Site {
            image: args.image,
            pull_policy: args.image_pull_policy,
            plugin: args.image_plugin,
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
