//! Quantities that must never be mixed, each printed with its unit.
//!
//! Every quantity is an `f64` or `u64` behind a newtype: adding seconds to bytes does not compile.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use serde::{Deserialize, Serialize};

/// An amount of memory or traffic, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Floating point operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Flops(pub f64);

/// A span of time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seconds(pub f64);

/// Throughput of memory or of a link, in bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BytesPerSec(pub f64);

/// Throughput of arithmetic, in floating point operations per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FlopsPerSec(pub f64);

macro_rules! float_quantity {
    ($($t:ident),*) => {$(
        impl Add for $t { type Output = Self; fn add(self, o: Self) -> Self { Self(self.0 + o.0) } }
        impl Sub for $t { type Output = Self; fn sub(self, o: Self) -> Self { Self(self.0 - o.0) } }
        impl AddAssign for $t { fn add_assign(&mut self, o: Self) { self.0 += o.0; } }
        impl Mul<f64> for $t { type Output = Self; fn mul(self, k: f64) -> Self { Self(self.0 * k) } }
        impl Div<f64> for $t { type Output = Self; fn div(self, k: f64) -> Self { Self(self.0 / k) } }
        impl Div for $t { type Output = f64; fn div(self, o: Self) -> f64 { self.0 / o.0 } }
        impl Sum for $t { fn sum<I: Iterator<Item = Self>>(i: I) -> Self { Self(i.map(|q| q.0).sum()) } }
        impl $t {
            pub fn max(self, o: Self) -> Self { Self(self.0.max(o.0)) }
            pub fn min(self, o: Self) -> Self { Self(self.0.min(o.0)) }
        }
    )*};
}
float_quantity!(Flops, Seconds, BytesPerSec, FlopsPerSec);

impl Add for Bytes {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self(self.0.saturating_add(o.0))
    }
}
impl AddAssign for Bytes {
    fn add_assign(&mut self, o: Self) {
        *self = *self + o;
    }
}
/// Saturates at zero: a negative amount of memory has no meaning.
impl Sub for Bytes {
    type Output = Self;
    fn sub(self, o: Self) -> Self {
        Self(self.0.saturating_sub(o.0))
    }
}
impl Mul<u64> for Bytes {
    type Output = Self;
    fn mul(self, k: u64) -> Self {
        Self(self.0.saturating_mul(k))
    }
}
impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(i: I) -> Self {
        i.fold(Self(0), Add::add)
    }
}
impl Div<BytesPerSec> for Bytes {
    type Output = Seconds;
    fn div(self, rate: BytesPerSec) -> Seconds {
        Seconds(self.0 as f64 / rate.0)
    }
}
impl Div<FlopsPerSec> for Flops {
    type Output = Seconds;
    fn div(self, rate: FlopsPerSec) -> Seconds {
        Seconds(self.0 / rate.0)
    }
}

/// `value` with at most one decimal under the largest prefix that keeps it at or above one.
fn scaled(f: &mut fmt::Formatter<'_>, value: f64, base: f64, units: &[&str]) -> fmt::Result {
    let mut v = value;
    let mut i = 0;
    while v.abs() >= base && i + 1 < units.len() {
        v /= base;
        i += 1;
    }
    let digits = if i == 0 && v.fract() == 0.0 {
        0
    } else if v.abs() < 10.0 {
        2
    } else {
        1
    };
    write!(f, "{v:.digits$} {}", units[i])
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0 as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
    }
}
impl fmt::Display for BytesPerSec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1000.0, &["B/s", "kB/s", "MB/s", "GB/s", "TB/s"])
    }
}
impl fmt::Display for Flops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1000.0, &["flop", "kflop", "Mflop", "Gflop", "Tflop", "Pflop"])
    }
}
impl fmt::Display for FlopsPerSec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1000.0, &["flop/s", "kflop/s", "Mflop/s", "Gflop/s", "Tflop/s", "Pflop/s"])
    }
}
impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (v, unit) = match self.0.abs() {
            s if s == 0.0 || s >= 1.0 => (self.0, "s"),
            s if s >= 1e-3 => (self.0 * 1e3, "ms"),
            s if s >= 1e-6 => (self.0 * 1e6, "µs"),
            _ => (self.0 * 1e9, "ns"),
        };
        let digits = if v.abs() < 10.0 { 2 } else { 1 };
        write!(f, "{v:.digits$} {unit}")
    }
}

/// A number with a suffix of Kubernetes quantities: decimal (`n u m k M G T P E`) or binary (`Ki Mi Gi Ti Pi Ei`).
/// `None` for what is none.
pub fn quantity(text: &str) -> Option<f64> {
    // An exponent is a number's own; the suffix `E` (exa) has no digits behind it.
    let split = text.find(|c: char| c.is_ascii_alphabetic()).filter(|_| text.parse::<f64>().is_err());
    let (number, suffix) = text.split_at(split.unwrap_or(text.len()));
    let scale = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        "Ei" => 1024f64.powi(6),
        _ => return None,
    };
    number.parse::<f64>().ok().map(|n| n * scale).filter(|n| n.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_every_quantity_with_its_unit() {
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(1536).to_string(), "1.50 KiB");
        assert_eq!(Seconds(0.0123).to_string(), "12.3 ms");
        assert_eq!(FlopsPerSec(2.5e12).to_string(), "2.50 Tflop/s");
        assert_eq!((Bytes(1000) / BytesPerSec(1e6)).to_string(), "1.00 ms");
    }

    #[test]
    fn quantities_are_read_with_their_suffixes() {
        for (text, value) in
            [("1.5", 1.5), ("250m", 0.25), ("4Gi", 4294967296.0), ("2E", 2e18), ("1e3", 1e3), ("-1k", -1e3)]
        {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for text in ["", "4GB", "four", "1..2", "inf", "nan", "1e999", "Gi"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn memory_saturates_instead_of_wrapping() {
        assert_eq!(Bytes(1) - Bytes(2), Bytes(0));
        assert_eq!(Bytes(u64::MAX) + Bytes(1), Bytes(u64::MAX));
    }
}
