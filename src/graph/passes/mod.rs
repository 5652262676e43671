//! Passes: from a module as its exporter wrote it to the flat graph that planning works on.

mod literal;
mod normalise;
mod stack;

pub use normalise::{Limits, Normalised, normalise};
