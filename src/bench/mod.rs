//! Measures the planner: on published inputs against published results, and by size.

pub mod growth;
pub mod partition;
