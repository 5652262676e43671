//! What travels between processes: data only.
//!
//! `wire` knows nothing of sockets, threads or devices.

pub mod control;
pub mod frame;
pub mod report;
pub mod tensor;

pub use tensor::{Batch, Position, Tensor};
