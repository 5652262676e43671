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
