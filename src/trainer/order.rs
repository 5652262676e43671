//! The order of samples: fixed by a seed, resumable anywhere, in constant memory.

use crate::wire::Position;

/// Order of the samples of every pass.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    n: u64,
    /// `None`: as stored.
    seed: Option<u64>,
}

impl Order {
    pub fn new(n: u64, seed: Option<u64>) -> Self {
        Self { n, seed }
    }

    /// Index of the sample at a position.
    pub fn at(&self, position: Position) -> u64 {
        match self.seed {
            Some(seed) => permute(position.sample, self.n, mix(seed ^ mix(position.epoch))),
            None => position.sample,
        }
    }

    /// Where the next batch of `rows` begins, and where the one after it does. A pass that has fewer rows left than a
    /// batch needs ends there: they come up elsewhere in the next pass's order.
    pub fn batch(&self, position: Position, rows: u64) -> (Position, Position) {
        let begin =
            if position.sample + rows > self.n { Position { epoch: position.epoch + 1, sample: 0 } } else { position };
        (begin, Position { sample: begin.sample + rows, ..begin })
    }
}

/// A permutation of `0..n`: a Feistel network over the next even number of bits, walked until it lands inside.
///
/// # Source
/// Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (cycle walking).
fn permute(index: u64, n: u64, key: u64) -> u64 {
    let bits = (64 - n.saturating_sub(1).leading_zeros()).max(2).next_multiple_of(2);
    let half = bits / 2;
    let mask = (1u64 << half) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..6 {
            let f = mix(right ^ key.wrapping_add(round)) & mask;
            (left, right) = (right, left ^ f);
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

/// SplitMix64's finaliser.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn visits_every_sample_once_per_pass(n in 1u64..3000, seed: u64, epoch in 0u64..5) {
            let order = Order::new(n, Some(seed));
            let mut seen: Vec<u64> = (0..n).map(|sample| order.at(Position { epoch, sample })).collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..n));
        }
    }

    #[test]
    fn passes_differ_and_samples_are_spread() {
        let order = Order::new(1000, Some(7));
        let first: Vec<u64> = (0..1000).map(|sample| order.at(Position { epoch: 0, sample })).collect();
        let second: Vec<u64> = (0..1000).map(|sample| order.at(Position { epoch: 1, sample })).collect();
        assert_ne!(first, second);
        let neighbours = first.windows(2).filter(|w| w[0].abs_diff(w[1]) < 10).count();
        assert!(neighbours < 60, "{neighbours} of 999 neighbours stayed close; 20 are expected");
    }

    #[test]
    fn a_pass_ends_where_no_whole_batch_is_left() {
        let order = Order::new(10, None);
        let at = |epoch, sample| Position { epoch, sample };
        assert_eq!(order.batch(at(0, 4), 4), (at(0, 4), at(0, 8)));
        assert_eq!(order.batch(at(0, 8), 4), (at(1, 0), at(1, 4)));
    }
}
