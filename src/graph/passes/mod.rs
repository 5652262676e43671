//! Passes: from a module as its exporter wrote it to the flat graph that planning works on.

mod literal;
mod normalise;
mod stack;

pub use stack::is_elementwise;

pub use normalise::{Limits, Normalised, is_zero, normalise, without_dead_ops};
