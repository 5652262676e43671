//! Measures the planner on published inputs, against published results.

pub mod partition;
