//! Why a run did not begin, or did not end well.

use std::path::PathBuf;

use crate::device::DeviceError;
use crate::graph::GraphError;
use crate::plan::problem::Infeasible;
use crate::runtime::RuntimeError;
use crate::trainer::DataError;
use crate::units::Bytes;

/// What a caller should do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Something the user gave; trying again without a change is useless.
    Input,
    /// Something broke on the way.
    Failure,
    /// The user asked for it.
    Interrupt,
}

#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    #[error("spec.bundle: no directory {path} (looked in {from}); make it with foreshard-export")]
    NoBundle { path: PathBuf, from: PathBuf },
    #[error("spec.bundle: {path}")]
    Bundle { path: PathBuf, source: GraphError },
    #[error("spec.weights: no file {path} (looked in {from})")]
    NoWeights { path: PathBuf, from: PathBuf },
    #[error("spec.resources.cores: {asked} cores for each worker, this machine offers {has}")]
    TooFewCores { asked: u32, has: usize },
    #[error("spec.resources.memory: {0}")]
    Memory(String),
    #[error("spec.parallelism.{field}: {found} workers, one machine runs at most {limit}")]
    TooManyWorkers { field: &'static str, found: u64, limit: u64 },
    #[error(transparent)]
    Plugin(#[from] DeviceError),
    #[error("no plan for this job: {0}")]
    Infeasible(#[from] Infeasible),
    #[error("run directory {path} is not empty; name another with --run-dir, or leave that out")]
    NotEmpty { path: PathBuf },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("run directory {path}: the weights need {needs}, its file system has {has} left")]
    NoSpace { path: PathBuf, needs: Bytes, has: Bytes },
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("spec.data: the data ended after step {done} of {steps}; the weights of that step are in {weights}")]
    DataEnded { done: u64, steps: u64, weights: PathBuf },
    #[error("cannot start worker {rank} ({program}): {source}")]
    Spawn { rank: u32, program: PathBuf, source: std::io::Error },
    /// A process ended that should not have; `end` says how.
    #[error("worker {rank} {end}{}{}", while_compiling(.module), last_lines(.log, .tail))]
    WorkerDied { rank: u32, end: String, module: Option<String>, log: PathBuf, tail: Vec<String> },
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("interrupted before the first step; no weights were written")]
    Interrupted,
}

fn while_compiling(module: &Option<String>) -> String {
    module.as_ref().map_or(String::new(), |m| format!(" while the plug-in compiled module {m:?}"))
}

fn last_lines(log: &std::path::Path, tail: &[String]) -> String {
    match tail {
        [] => format!("; its log {} is empty", log.display()),
        _ => format!("; the end of its log {}:\n    {}", log.display(), tail.join("\n    ")),
    }
}

impl LocalError {
    pub fn class(&self) -> Class {
        match self {
            Self::Spawn { .. } | Self::WorkerDied { .. } => Class::Failure,
            Self::Runtime(e) => match e {
                RuntimeError::Weights { .. }
                | RuntimeError::Bundle { .. }
                | RuntimeError::BatchShape { .. }
                | RuntimeError::NotAScalar { .. }
                | RuntimeError::Listen { .. }
                | RuntimeError::Write { .. } => Class::Input,
                _ => Class::Failure,
            },
            Self::Interrupted => Class::Interrupt,
            _ => Class::Input,
        }
    }
}
