//! The planner: on models nobody wrote, and on the samples.

mod properties;
mod random;
mod samples;
#[path = "../support/mod.rs"]
mod support;
