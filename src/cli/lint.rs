//! `foreshard lint`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};

use super::bad_input;
use crate::api::lint::{Linter, documents};

/// Check manifests as the API server would, without one.
///
/// Every document of a file that is a TrainingJob, a ModelProfile or a PartitionPlan is checked: types and bounds of its
/// fields, names of fields, and the rules that a cluster applies to it (CEL). Other kinds are passed over. Nothing is
/// sent anywhere. Each problem is one line: file, object, field, the value found, and what to write instead.
///
/// Exit codes: 0 nothing is wrong, 1 something is, 2 a file cannot be read or is no YAML.
///
/// Example: foreshard lint manifests/samples/*.yaml
///
/// Example: kubectl get trainingjob digits -o yaml | foreshard lint --was - digits.yaml
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files to check; - is the standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What the cluster holds now: changes that it would refuse are found as well. Objects are matched by kind and name.
    #[arg(long, value_name = "FILE")]
    was: Option<PathBuf>,
    /// Say nothing of what is right.
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let was = match &args.was {
        None => Vec::new(),
        Some(path) => documents(&read(path)?).map_err(|e| bad_input(anyhow!("{}: {e}", path.display())))?,
    };
    let linter = Linter::default();
    let mut n_wrong = 0;
    for path in &args.files {
        let shown = path.display();
        let checked = linter.file(&read(path)?, &was).map_err(|e| bad_input(anyhow!("{shown}: {e}")))?;
        for document in &checked {
            n_wrong += document.findings.len();
            for finding in &document.findings {
                println!("{shown}: {}: {finding}", document.what);
            }
            if document.findings.is_empty() && !args.quiet {
                println!("{shown}: {}: {}", document.what, if document.ours { "ok" } else { "not ours, passed over" });
            }
        }
    }
    Ok(if n_wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read(path: &Path) -> anyhow::Result<String> {
    let text = match path.to_str() {
        Some("-") => std::io::read_to_string(std::io::stdin()),
        _ => std::fs::read_to_string(path),
    };
    text.with_context(|| format!("cannot read {}", path.display())).map_err(bad_input)
}
