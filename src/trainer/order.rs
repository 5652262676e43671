//! The order of samples: fixed by a seed, resumable anywhere, in constant memory when all samples have one shape.

use crate::wire::Position;

/// Order of the samples of every pass.
#[derive(Clone, Debug)]
pub struct Order {
    /// Samples of a batch.
    batch: u64,
    /// `None`: as stored.
    seed: Option<u64>,
    groups: Groups,
}

#[derive(Clone, Debug)]
enum Groups {
    /// All samples have one shape: only their number counts.
    One(u64),
    Several {
        /// Samples by bucket.
        samples: Vec<Vec<u64>>,
        /// Every batch of a pass as bucket and number among the bucket's batches, in the order in which a reader of
        /// the stored samples would have filled them.
        batches: Vec<(usize, u64)>,
    },
}

/// One batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Take {
    pub bucket: usize,
    pub samples: Vec<u64>,
    /// Where the next batch is.
    pub after: Position,
}

impl Order {
    /// Of `n` samples of one shape.
    pub fn new(n: u64, batch: u64, seed: Option<u64>) -> Self {
        Self { batch, seed, groups: Groups::One(n) }
    }

    /// Of samples that come in several shapes; a batch has samples of one. `samples`: ascending, by bucket.
    pub fn of_buckets(samples: Vec<Vec<u64>>, batch: u64, seed: Option<u64>) -> Self {
        let whole = |bucket: usize| (0..samples[bucket].len() as u64 / batch).map(move |i| (bucket, i));
        let mut batches: Vec<(usize, u64)> = (0..samples.len()).flat_map(whole).collect();
        batches.sort_unstable_by_key(|&(bucket, i)| samples[bucket][((i + 1) * batch - 1) as usize]);
        Self { batch, seed, groups: Groups::Several { samples, batches } }
    }

    /// Whole batches of a pass.
    pub fn n_batches(&self) -> u64 {
        match &self.groups {
            Groups::One(n) => n / self.batch,
            Groups::Several { batches, .. } => batches.len() as u64,
        }
    }

    /// The next batch. A pass that has no whole batch left ends there: its last samples come up elsewhere in the next
    /// pass's order.
    pub fn take(&self, position: Position) -> Take {
        let per_pass = self.n_batches() * self.batch;
        let fits = position.sample.checked_add(self.batch).is_some_and(|end| end <= per_pass);
        let begin = if fits { position } else { Position { epoch: position.epoch.wrapping_add(1), sample: 0 } };
        let key = self.seed.map(|seed| mix(seed ^ mix(begin.epoch)));
        let shuffled = |i: u64, n: u64, group: u64| key.map_or(i, |key| permute(i, n, key.wrapping_add(group)));
        let (bucket, samples) = match &self.groups {
            Groups::One(n) => (0, (0..self.batch).map(|i| shuffled(begin.sample + i, *n, 0)).collect()),
            Groups::Several { samples, batches } => {
                let n = batches.len() as u64;
                let (bucket, nth) = batches[shuffled(begin.sample / self.batch, n, 0) as usize];
                let of = &samples[bucket];
                // A permutation of its own for each bucket, far from the batches' and from each other.
                let group = mix(bucket as u64 + 1);
                let sample = |i| of[shuffled(nth * self.batch + i, of.len() as u64, group) as usize];
                (bucket, (0..self.batch).map(sample).collect())
            }
        };
        Take { bucket, samples, after: Position { sample: begin.sample + self.batch, ..begin } }
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

    /// All samples of one pass, and where it ended.
    fn pass(order: &Order, epoch: u64) -> Vec<Take> {
        let mut position = Position { epoch, sample: 0 };
        let mut takes = Vec::new();
        loop {
            let take = order.take(position);
            if take.after.epoch != epoch {
                return takes;
            }
            position = take.after;
            takes.push(take);
        }
    }

    fn seen(takes: &[Take]) -> Vec<u64> {
        takes.iter().flat_map(|t| t.samples.iter().copied()).collect()
    }

    proptest! {
        #[test]
        fn visits_every_sample_once_per_pass(n in 1u64..3000, seed: u64, epoch in 0u64..5) {
            let mut seen = seen(&pass(&Order::new(n, 1, Some(seed)), epoch));
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..n));
        }

        #[test]
        fn batches_of_buckets_take_every_sample_at_most_once(
            of in proptest::collection::vec(0usize..3, 1..200),
            batch in 1u64..5,
            seed: Option<u64>,
            epoch in 0u64..3,
        ) {
            let groups: Vec<Vec<u64>> =
                (0..3).map(|b| (0..of.len() as u64).filter(|&i| of[i as usize] == b).collect()).collect();
            let whole: u64 = groups.iter().map(|g| g.len() as u64 / batch).sum();
            prop_assume!(whole > 0);
            let takes = pass(&Order::of_buckets(groups.clone(), batch, seed), epoch);
            prop_assert_eq!(takes.len() as u64, whole);
            prop_assert_eq!(Order::of_buckets(groups.clone(), batch, seed).n_batches(), whole);
            prop_assert!(takes.iter().all(|t| t.samples.iter().all(|&s| of[s as usize] == t.bucket)));
            let mut seen = seen(&takes);
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len() as u64, whole * batch);
        }
    }

    #[test]
    fn passes_differ_and_samples_are_spread() {
        let order = Order::new(1000, 1, Some(7));
        let first = seen(&pass(&order, 0));
        assert_ne!(first, seen(&pass(&order, 1)));
        let neighbours = first.windows(2).filter(|w| w[0].abs_diff(w[1]) < 10).count();
        assert!(neighbours < 60, "{neighbours} of 999 neighbours stayed close; 20 are expected");
    }

    #[test]
    fn a_pass_ends_where_no_whole_batch_is_left() {
        let order = Order::new(10, 4, None);
        let at = |epoch, sample| Position { epoch, sample };
        let take = order.take(at(0, 4));
        assert_eq!((take.samples, take.after), (vec![4, 5, 6, 7], at(0, 8)));
        let take = order.take(at(0, 8));
        assert_eq!((take.samples, take.after), (vec![0, 1, 2, 3], at(1, 4)));
        assert_eq!(order.take(at(3, u64::MAX)).after, at(4, 4));
    }

    #[test]
    fn batches_of_stored_order_come_as_their_buckets_fill() {
        let order = Order::of_buckets(vec![vec![0, 3, 5, 6], vec![1, 2, 4]], 2, None);
        let takes: Vec<_> = pass(&order, 0).into_iter().map(|t| (t.bucket, t.samples)).collect();
        assert_eq!(takes, [(1, vec![1, 2]), (0, vec![0, 3]), (0, vec![5, 6])]);
    }
}
