//! The whole loop on one machine: real worker processes, one parent that plans, feeds and reports.
//!
//! ```text
//! job -> bundle -> cores, topology -> plan -> workers -> [ batch -> feed ... report -> log, progress ] -> weights
//! ```
//! Everything that can be refused is refused before the first worker starts. `local` knows nothing of Kubernetes and
//! never reads the environment.

pub mod bundle;
mod error;
pub mod interrupt;
pub mod machine;
pub mod rundir;
pub mod workers;

pub use error::{Class, LocalError};
