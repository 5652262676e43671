//! Sets of small numbers, as many words as they need.

/// A set of numbers below a fixed limit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bits(Vec<u64>);

impl Bits {
    pub fn new(limit: usize) -> Self {
        Self(vec![0; words(limit)])
    }

    /// Just one number.
    pub fn of(limit: usize, i: usize) -> Self {
        let mut out = Self::new(limit);
        out.set(i);
        out
    }

    pub fn set(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }

    pub fn clear(&mut self, i: usize) {
        self.0[i / 64] &= !(1 << (i % 64));
    }

    pub fn has(&self, i: usize) -> bool {
        has(&self.0, i)
    }

    pub fn words(&self) -> &[u64] {
        &self.0
    }

    pub fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }

    pub fn common(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a & b).collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = usize> {
        ones(&self.0)
    }
}

/// Words for numbers below `limit`.
pub fn words(limit: usize) -> usize {
    limit.div_ceil(64)
}

pub fn has(set: &[u64], i: usize) -> bool {
    set[i / 64] >> (i % 64) & 1 == 1
}

/// Whether all of `a` is in `b`.
#[inline]
pub fn within(a: &[u64], b: &[u64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a & !b == 0)
}

pub fn ones(set: &[u64]) -> impl Iterator<Item = usize> {
    set.iter().enumerate().flat_map(|(w, &word)| {
        let mut rest = word;
        std::iter::from_fn(move || {
            (rest != 0).then(|| {
                let bit = rest.trailing_zeros() as usize;
                rest &= rest - 1;
                w * 64 + bit
            })
        })
    })
}
