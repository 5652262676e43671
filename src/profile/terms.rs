//! Analytic terms of a segment: what the cost model says, before anything is measured.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Div};

use serde::{Deserialize, Serialize};

use crate::topology::{Class, Measured};
use crate::units::Seconds;

/// Terms that a calibration tells apart.
pub(super) const N: usize = 4;

/// Nominal time of some ops on a device, by what bounds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    pub product: Seconds,
    pub memory: Seconds,
    pub other: Seconds,
    pub launch: Seconds,
}

impl Terms {
    /// Work of one op: its class and its start.
    pub fn new(class: Class, work: Seconds, launch: Seconds) -> Self {
        let mut terms = Self { launch, ..Self::default() };
        match class {
            Class::Product => terms.product = work,
            Class::Memory => terms.memory = work,
            Class::Other => terms.other = work,
        }
        terms
    }

    pub(super) fn to_array(self) -> [Seconds; N] {
        [self.product, self.memory, self.other, self.launch]
    }

    pub(super) fn from_array([product, memory, other, launch]: [Seconds; N]) -> Self {
        Self { product, memory, other, launch }
    }

    /// Time by corrected figures; [`Measured::NOMINAL`] for the analytic one.
    pub fn time(&self, measured: &Measured) -> Seconds {
        self.product * measured.product
            + self.memory * measured.memory
            + self.other * measured.other
            + self.launch * measured.launch
    }
}

impl Add for Terms {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self {
            product: self.product + o.product,
            memory: self.memory + o.memory,
            other: self.other + o.other,
            launch: self.launch + o.launch,
        }
    }
}
impl Div<f64> for Terms {
    type Output = Self;
    fn div(self, k: f64) -> Self {
        Self { product: self.product / k, memory: self.memory / k, other: self.other / k, launch: self.launch / k }
    }
}
impl AddAssign for Terms {
    fn add_assign(&mut self, o: Self) {
        *self = *self + o;
    }
}
impl Sum for Terms {
    fn sum<I: Iterator<Item = Self>>(i: I) -> Self {
        i.fold(Self::default(), Add::add)
    }
}

/// An executable of a worker, as often as it runs in a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timed {
    /// Of one run.
    pub terms: Terms,
    /// Runs per step: the microbatches for a gradient segment, one for an update.
    pub runs: u32,
}

impl Timed {
    /// Time per step.
    pub fn time(&self, measured: &Measured) -> Seconds {
        self.terms.time(measured) * f64::from(self.runs)
    }
}
