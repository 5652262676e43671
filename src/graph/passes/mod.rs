//! Passes: from a module as its exporter wrote it to the flat graph that planning works on.

mod literal;
mod normalise;
mod stack;

pub use stack::is_elementwise;

pub use normalise::{Limits, Normalised, normalise};
