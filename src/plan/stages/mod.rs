//! Splits a computation into pipeline stages: prefixes of its graph, one stage between each prefix and the next.

pub mod choice;
mod coarse;
pub mod dag;
pub mod ideals;
mod positions;
pub mod replicated;
pub mod sharded;

#[cfg(test)]
mod tests;
