//! The whole loop on one machine: real worker processes, one parent that plans, feeds and reports.

mod batches;
mod board;
pub mod bundle;
mod charts;
pub mod control;
mod desk;
pub mod head;
pub mod inputs;
pub mod json_lines;
mod progress;
pub mod report;
pub mod run;
mod run_dir;
mod timeline;
mod train;
mod workers;
