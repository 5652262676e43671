//! Placement of an op graph on accelerators and hosts, so that the busiest device has little to do, or so that one
//! sample is done soon.
//!
//! Three solvers share one [`Problem`]: [`contiguous`] finds pipeline stages, exactly where the graph allows it; [`free`]
//! puts any op on any device; [`blocks`] finds blocks that run as one. Each returns what it reached with a bound that
//! nothing can beat. They know nothing of clocks: the caller's `stop` ends what could go on for ever, and until it first
//! says so results do not depend on it.
//!
//! # Cost of a device
//! An accelerator is busy with the ops it runs, and with every tensor that it does not hold the whole net of, once: made
//! here and read elsewhere, or made elsewhere and read here. A host is busy with its ops only: tensors lie in its memory.
//!
//! # Source
//! Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020) for the problems
//! and for dynamic programming over downsets.

pub mod anneal;
pub mod bits;
pub mod blocks;
pub mod bound;
pub mod clusters;
pub mod contiguous;
pub mod flow;
pub mod free;
pub mod heavy;
pub mod lattice;
pub mod loads;
pub mod path;
pub mod problem;
pub mod reach;
pub mod serial;
pub mod stages;
pub mod stream;
pub mod timeline;

use clusters::Clusters;
pub use problem::{Device, Devices, Malformed, Op, Problem};

/// A cost this near to its bound, relatively, is as good as the best.
const NEAR: f64 = 1e-6;

/// Where every op runs, what that costs, and what it costs at least whatever one does.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// By op.
    pub device: Vec<Device>,
    /// Load of the busiest device, or latency.
    pub cost: f64,
    /// Equal to the cost where that is shown to be the best.
    pub bound: f64,
}

/// A problem without a placement.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Infeasible {
    #[error("op {op} does not run on an accelerator and there is no host; name a host")]
    NeedsHost { op: usize },
    #[error(
        "op {op}, with all of its colour, needs {bytes} bytes, an accelerator has {memory}, and there is no host; name a host"
    )]
    TooLarge { op: usize, bytes: f64, memory: f64 },
    #[error("there is no device")]
    NoDevice,
    #[error(
        "all ops together need {bytes} bytes, more than {n_accelerators} accelerators with {memory} bytes each, and there is \
         no host; name more accelerators or a host"
    )]
    TooMuch { bytes: f64, n_accelerators: usize, memory: f64 },
    #[error(
        "no contiguous stages fit the memory of {n_accelerators} accelerators with {memory} bytes each; let stages be of \
         several parts, or name more accelerators or a host"
    )]
    NoStages { n_accelerators: usize, memory: f64 },
    #[error(
        "nothing was found that fits the memory of {n_accelerators} accelerators with {memory} bytes each, which is no proof; \
         give it more time, or name more accelerators or a host"
    )]
    NotFound { n_accelerators: usize, memory: f64 },
}

impl Infeasible {
    /// What rules a problem out at first sight.
    fn check(problem: &Problem) -> Result<(), Self> {
        let Devices { n_accelerators, n_hosts, memory } = problem.devices();
        if n_hosts > 0 || problem.ops().is_empty() {
            return Ok(());
        }
        if n_accelerators == 0 {
            return Err(Self::NoDevice);
        }
        let (clusters, of) = Clusters::of_problem(problem);
        for (op, &c) in of.iter().enumerate() {
            if problem.ops()[op].accelerator.is_none() {
                return Err(Self::NeedsHost { op });
            }
            if clusters.bytes[c] > memory {
                return Err(Self::TooLarge { op, bytes: clusters.bytes[c], memory });
            }
        }
        let bytes = clusters.bytes.iter().sum::<f64>();
        // Rounding of the sum rules nothing out.
        if bytes > n_accelerators as f64 * memory * (1.0 + 1e-12) {
            return Err(Self::TooMuch { bytes, n_accelerators, memory });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
