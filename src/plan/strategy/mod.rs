//! One strategy per op, as cheap as possible, within the memory at every moment.
//!
//! An op has strategies (how its tensors are sharded), each with a cost and a memory use while the op is live; pairs of
//! ops have costs for each pair of strategies (resharding), some of them forbidden. The limit holds at every moment.
//!
//! ```text
//! Problem --network--> Network --reduce--> Reduced --Field--> Relaxation --bound, prices--> Search --> Outcome
//!                                             ^                   |
//!                                             +---- values that cannot be part of a cheaper choice are removed
//! ```
//!
//! `strategy` knows nothing of graphs, devices or file formats: whoever asks makes a [`Problem`].

mod dominance;
mod elimination;
mod field;
mod network;
mod problem;
mod reduce;
mod relaxation;
mod search;
mod solve;
mod state;
#[cfg(test)]
mod tests;

pub use problem::{Coupling, FORBIDDEN, Malformed, Op, Problem};
pub use solve::{Outcome, Refusal, Turn, solve};
