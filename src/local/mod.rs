//! The whole loop on one machine: real worker processes, one parent that plans, feeds and reports.

pub mod bundle;
mod charts;
mod progress;
pub mod run;
mod run_dir;
mod timeline;
mod workers;
