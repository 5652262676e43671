//! The batches that wait in the feed queue, as far as they have been profiled.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::batch::BatchProfile;
use crate::units::Bytes;

/// Profiles in the order their batches will be fed.
#[derive(Clone, Debug, Default)]
pub struct Window {
    waiting: VecDeque<BatchProfile>,
}

/// What comes next, in short.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ahead {
    pub batches: u32,
    pub bytes: Bytes,
    pub variants: BTreeMap<String, VariantAhead>,
}

/// The waiting batches of one variant.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VariantAhead {
    pub batches: u32,
    /// Batches of other variants before the first of this one.
    pub after: u32,
    pub bytes: Bytes,
    /// Mean length of a row, where rows vary.
    pub length: Option<f64>,
    /// Mean share of padding.
    pub padding: f64,
}

impl Window {
    /// A batch joins the queue.
    pub fn push(&mut self, profile: BatchProfile) {
        self.waiting.push_back(profile);
    }

    /// The first batch is being fed.
    pub fn pop(&mut self) -> Option<BatchProfile> {
        self.waiting.pop_front()
    }

    /// The data goes back to an earlier position: what waited will be read again.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// First to last.
    pub fn iter(&self) -> impl Iterator<Item = &BatchProfile> {
        self.waiting.iter()
    }

    /// # Complexity
    /// O(batches · tensors).
    pub fn ahead(&self) -> Ahead {
        let mut ahead = Ahead::default();
        for (after, profile) in self.waiting.iter().enumerate() {
            ahead.batches += 1;
            ahead.bytes += profile.bytes;
            let fresh = || VariantAhead { after: after as u32, ..VariantAhead::default() };
            let of = ahead.variants.entry(profile.variant.clone()).or_insert_with(fresh);
            // Running means.
            let before = f64::from(of.batches);
            of.batches += 1;
            of.bytes += profile.bytes;
            let mean = |old: f64, new: f64| (old * before + new) / (before + 1.0);
            of.padding = mean(of.padding, profile.padding());
            of.length = profile.lengths().map(|l| mean(of.length.unwrap_or(0.0), l.mean));
        }
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{ArrayShape, DType};
    use crate::profile::{TensorView, profile};

    fn batch(variant: &str, room: u64, length: u64) -> BatchProfile {
        let shape = ArrayShape::new(DType::Uint8, vec![1, room]);
        let data: Vec<u8> = (0..room).map(|i| u8::from(i < length)).collect();
        profile(variant, &[TensorView { name: "x", shape: &shape, data: &data, padded: true }]).unwrap()
    }

    #[test]
    fn tells_what_comes_next_by_variant() {
        let mut window = Window::default();
        assert_eq!((window.ahead(), window.is_empty()), (Ahead::default(), true));
        for (variant, room, length) in [("short", 10, 9), ("short", 10, 6), ("long", 40, 20), ("short", 10, 6)] {
            window.push(batch(variant, room, length));
        }
        let ahead = window.ahead();
        assert_eq!((ahead.batches, ahead.bytes), (4, Bytes(70)));
        let long = VariantAhead { batches: 1, after: 2, bytes: Bytes(40), length: Some(20.0), padding: 0.5 };
        assert_eq!(ahead.variants["long"], long);
        let short = &ahead.variants["short"];
        assert_eq!((short.batches, short.after, short.length), (3, 0, Some(7.0)));
        assert!((short.padding - 0.3).abs() < 1e-12);
        assert_eq!(window.pop().unwrap().lengths().unwrap().max, 9);
        assert_eq!(window.ahead().variants["long"].after, 1);
        window.clear();
        assert_eq!(window.len(), 0);
    }
}
