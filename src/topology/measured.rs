//! How far a device's nominal figures are off, by class of op.

use serde::{Deserialize, Serialize};

/// What bounds an op.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Matrix products and convolutions.
    Product,
    /// Elementwise ops, reductions, copies: they stream through memory.
    #[default]
    Memory,
    /// Gathers, scatters, sorts, loops, foreign calls: they do neither.
    Other,
}

/// How many times its nominal time each class of op takes on a device; 1 is nominal.
///
/// Factors rather than rates: a worker that gets another core has other nominal figures and the same factors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    pub product: f64,
    pub memory: f64,
    pub other: f64,
    /// Of the fixed cost of starting an op.
    pub launch: f64,
}

impl Measured {
    pub const NOMINAL: Self = Self { product: 1.0, memory: 1.0, other: 1.0, launch: 1.0 };

    pub fn of(&self, class: Class) -> f64 {
        match class {
            Class::Product => self.product,
            Class::Memory => self.memory,
            Class::Other => self.other,
        }
    }
}

impl Default for Measured {
    fn default() -> Self {
        Self::NOMINAL
    }
}
