//! One strategy per op, as cheap as possible, within the memory at every moment.

mod dominance;
mod elimination;
pub mod field;
pub mod network;
pub mod problem;
pub mod random;
pub mod reduce;
pub mod relaxation;
mod search;
pub mod solve;
mod state;

pub use problem::{Coupling, Op, Problem};
pub use solve::{Outcome, solve};
