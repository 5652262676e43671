//! The command line: one file per subcommand. Only here is the environment read.

mod bench;
mod checkpoint;
mod crd;
mod devices;
mod explain;
mod fetch;
mod graph;
mod head;
mod lint;
mod local;
mod operator;
mod plan;
mod plugin;
mod replay;
mod report;
mod worker;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Foresee the load, then shard the model.
///
/// Foreshard cuts the computational graph of a training step over devices and runs the parts, each in a worker process
/// of its own. Start with `foreshard local run manifests/charlm.yaml`.
#[derive(Debug, Parser)]
#[command(name = "foreshard", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train on this machine, with real worker processes and no cluster.
    #[command(subcommand)]
    Local(local::Command),
    Plan(plan::Args),
    Explain(explain::Args),
    Report(report::Args),
    Replay(replay::Args),
    Devices(devices::Args),
    Graph(graph::Args),
    /// Measure the planner: against published results, and by size.
    #[command(subcommand)]
    Bench(bench::Command),
    /// List, verify and export checkpoints.
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    Lint(lint::Args),
    Crd(crd::Args),
    Operator(operator::Args),
    #[command(hide = true)]
    Worker(worker::Args),
    #[command(hide = true)]
    Head(head::Args),
    #[command(hide = true)]
    Fetch(fetch::Args),
}

/// Input that cannot be used: exit code 2, where a failure while running is 1.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct BadInput(pub anyhow::Error);

/// Exit code as a shell says it of a process that SIGTERM ended.
const TERMINATED: u8 = 128 + 15;

/// Sends events to stderr: one JSON line for each where a cluster collects them, plain lines else.
fn log_to_stderr(json: bool, filter: &str) {
    let to = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::new(filter));
    let to = to.with_writer(std::io::stderr);
    if json {
        to.json().flatten_event(true).init();
        // Also the last line of a process that ends by a bug.
        std::panic::set_hook(Box::new(|panic| {
            tracing::error!(panic = panic.to_string(), "this is a bug in Foreshard")
        }));
    } else {
        to.without_time().with_target(false).with_ansi(false).init();
    }
}

/// Marks an error as one of input.
pub fn bad_input(error: impl Into<anyhow::Error>) -> anyhow::Error {
    BadInput(error.into()).into()
}

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Local(c) => local::run(c),
        Command::Plan(a) => plan::run(a),
        Command::Explain(a) => explain::run(a),
        Command::Report(a) => report::run(a),
        Command::Replay(a) => replay::run(a),
        Command::Devices(a) => devices::run(a),
        Command::Graph(a) => graph::run(a),
        Command::Bench(c) => bench::run(c),
        Command::Checkpoint(c) => checkpoint::run(c),
        Command::Lint(a) => lint::run(a),
        Command::Crd(a) => crd::run(a),
        Command::Operator(a) => operator::run(a),
        Command::Head(a) => head::run(a),
        Command::Fetch(a) => fetch::run(a),
        Command::Worker(a) => return worker::run(a),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(if e.is::<BadInput>() { 2 } else { 1 })
        }
    }
}

/// The reference of all commands, as `docs/cli.md` holds it.
pub fn reference() -> String {
    fn page(command: &mut clap::Command, path: &str, out: &mut String) {
        let name = format!("{path}{}", command.get_name());
        let help = command.clone().bin_name(&name).term_width(100).render_long_help().to_string();
        out.push_str(&format!("## `{name}`\n\n```text\n{}\n```\n\n", help.trim_end()));
        let visible: Vec<String> = command
            .get_subcommands()
            .filter(|c| !c.is_hide_set() && c.get_name() != "help")
            .map(|c| c.get_name().to_owned())
            .collect();
        for sub in visible {
            if let Some(sub) = command.find_subcommand_mut(&sub) {
                page(sub, &format!("{name} "), out);
            }
        }
    }
    let mut out = String::from(
        "# Commands\n\nExit codes: 0 done, 1 failed while running, 2 input that cannot be used, 130 stopped by Ctrl-C (weights are written).\n\n",
    );
    page(&mut Cli::command(), "", &mut out);
    out.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim_end().to_owned() + "\n"
}
