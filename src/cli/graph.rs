//! `foreshard graph`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::bad_input;
use crate::local::bundle;
use crate::plan::graph_picture;
use crate::topology::nominal;

/// Show a bundle: its params, and the ops of one of its graphs after import.
///
/// Examples:
///   foreshard graph bundles/char_gpt.bundle --ops grad
///   foreshard graph bundles/char_gpt.bundle --picture graph.svg
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Bundle directory.
    bundle: PathBuf,
    /// Print the ops of this graph.
    #[arg(long, value_name = "GRAPH", conflicts_with = "picture")]
    ops: Option<Which>,
    /// Variant of the grad graph; the first one when absent.
    #[arg(long)]
    variant: Option<String>,
    /// Draw the training step: its blocks, every op by its cost, and the tensors between them.
    #[arg(long, value_name = "FILE.svg")]
    picture: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Which {
    Init,
    Grad,
    Update,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let model = bundle::load(&args.bundle).map_err(bad_input)?;
    let variant = match &args.variant {
        None => &model.grads[0],
        Some(name) => model.variant(name).ok_or_else(|| {
            let known: Vec<_> = model.grads.iter().map(|g| g.name.as_str()).collect();
            let hint = crate::graph::error::closest(name, known.iter().copied());
            bad_input(anyhow::anyhow!("no variant {name:?}; the bundle has {}{hint}", known.join(", ")))
        })?,
    };
    if let Some(path) = &args.picture {
        let device = nominal("cpu").expect("CPUs are known");
        let svg = graph_picture::svg(&model, variant, &device);
        std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    match args.ops {
        Some(Which::Init) => print!("{}", crate::graph::text::render(&model.init)),
        Some(Which::Grad) => print!("{}", crate::graph::text::render(&variant.graph)),
        Some(Which::Update) => print!("{}", crate::graph::text::render(&model.update)),
        None => {
            println!("{} ({} rows per batch)", model.manifest.name, model.manifest.batch_size);
            for grad in &model.grads {
                println!("  variant {:<12} {:>6} ops, microbatch {}", grad.name, grad.graph.n_ops(), grad.microbatch);
            }
            println!("  update  {:>19} ops, init {} ops", model.update.n_ops(), model.init.n_ops());
            for tensor in &model.state[..model.n_params] {
                println!("  {:<40} {:<16} {}", tensor.name, tensor.shape.to_string(), tensor.shape.bytes());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
