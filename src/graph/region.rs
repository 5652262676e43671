//! Boxes inside tensors: where a piece of one lies among the bytes of the whole.

use std::ops::Range;

/// A box inside a tensor: a half-open range along each axis. A scalar's has no axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region(pub Vec<Range<u64>>);

impl Region {
    /// All of a tensor.
    pub fn whole(dims: &[u64]) -> Self {
        Self(dims.iter().map(|&n| 0..n).collect())
    }

    pub fn dims(&self) -> Vec<u64> {
        self.0.iter().map(|r| r.end.saturating_sub(r.start)).collect()
    }

    /// What both hold; `None` when that is nothing.
    pub fn overlap(&self, other: &Self) -> Option<Self> {
        let both = |(a, b): (&Range<u64>, &Range<u64>)| a.start.max(b.start)..a.end.min(b.end);
        let ranges: Vec<_> = self.0.iter().zip(&other.0).map(both).collect();
        ranges.iter().all(|r| r.start < r.end).then_some(Self(ranges))
    }

    /// The same box, as seen from the first corner of `outer`, which holds it.
    fn inside(&self, outer: &Self) -> Self {
        Self(self.0.iter().zip(&outer.0).map(|(r, o)| r.start - o.start..r.end - o.start).collect())
    }

    /// The runs of elements that are the box in a row-major tensor of `dims`, ascending; elements of a box stand in the
    /// same order as in its own dense tensor.
    ///
    /// # Panics
    /// When the box does not lie in the tensor.
    pub fn runs(&self, dims: &[u64]) -> Runs {
        assert_eq!(self.0.len(), dims.len(), "a box has the axes of its tensor");
        assert!(self.0.iter().zip(dims).all(|(r, &n)| r.start <= r.end && r.end <= n), "{self:?} lies in {dims:?}");
        // Axes behind the last one that is cut are whole: one run goes through them.
        let cut = self.0.iter().zip(dims).rposition(|(r, &n)| *r != (0..n)).unwrap_or(0);
        let inner: u64 = dims.get(cut + 1..).unwrap_or_default().iter().product();
        let length = self.0.get(cut).map_or(1, |r| (r.end - r.start) * inner);
        let empty = self.0.iter().any(|r| r.is_empty());
        let mut stride = inner * dims.get(cut).copied().unwrap_or(1);
        let mut outer = Vec::with_capacity(cut);
        for (range, n) in self.0[..cut.min(self.0.len())].iter().zip(dims).rev() {
            outer.push((range.clone(), range.start, stride));
            stride *= n;
        }
        let offset = self.0.get(cut).map_or(0, |r| r.start * inner);
        Runs { outer, offset, length, done: empty }
    }
}

/// Runs of elements: see [`Region::runs`].
#[derive(Clone, Debug)]
pub struct Runs {
    /// Axes before the one that runs go along, innermost first: its range, where it stands, elements of one of its rows.
    outer: Vec<(Range<u64>, u64, u64)>,
    offset: u64,
    length: u64,
    done: bool,
}

impl Iterator for Runs {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let start = self.offset + self.outer.iter().map(|(_, at, stride)| at * stride).sum::<u64>();
        self.done = true;
        for (range, at, _) in &mut self.outer {
            *at += 1;
            if *at < range.end {
                self.done = false;
                break;
            }
            *at = range.start;
        }
        Some(start..start + self.length)
    }
}

/// Copies what two pieces of one tensor have in common, from the bytes of one to those of the other; returns how many
/// elements that are.
///
/// # Shapes
/// `from` and `to`: bytes of the boxes, dense and row-major; `element`: bytes of one element.
pub fn copy_overlap(from: &[u8], of: &Region, to: &mut [u8], into: &Region, element: usize) -> u64 {
    let Some(common) = of.overlap(into) else { return 0 };
    let from_runs = common.inside(of).runs(&of.dims());
    let to_runs = common.inside(into).runs(&into.dims());
    let bytes = |at: u64| at as usize * element;
    // The two cut the same box at different places: go by the shorter run.
    let (mut from_runs, mut to_runs) = (from_runs.peekable(), to_runs.peekable());
    let mut copied = 0;
    while let (Some(a), Some(b)) = (from_runs.peek_mut(), to_runs.peek_mut()) {
        let n = (a.end - a.start).min(b.end - b.start);
        to[bytes(b.start)..bytes(b.start + n)].copy_from_slice(&from[bytes(a.start)..bytes(a.start + n)]);
        copied += n;
        (a.start, b.start) = (a.start + n, b.start + n);
        if a.start == a.end {
            from_runs.next();
        }
        if to_runs.peek().is_some_and(|b| b.start == b.end) {
            to_runs.next();
        }
    }
    copied
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn runs_are_as_long_as_they_can_be() {
        let runs = |region: &[Range<u64>], dims: &[u64]| Region(region.to_vec()).runs(dims).collect::<Vec<_>>();
        assert_eq!(runs(&[], &[]), vec![0..1]);
        assert_eq!(runs(&[0..4, 0..3], &[4, 3]), vec![0..12]);
        assert_eq!(runs(&[1..3, 0..3], &[4, 3]), vec![3..9]);
        assert_eq!(runs(&[1..3, 1..2], &[4, 3]), vec![4..5, 7..8]);
        assert_eq!(runs(&[0..2, 1..2, 0..5], &[2, 3, 5]), vec![5..10, 20..25]);
        assert_eq!(runs(&[0..2, 1..1], &[2, 3]), Vec::<Range<u64>>::new());
    }

    fn region() -> impl Strategy<Value = (Vec<u64>, Region, Region)> {
        proptest::collection::vec(1u64..5, 0..4).prop_flat_map(|dims| {
            let range = |n: u64| (0..n).prop_flat_map(move |from| (Just(from), from + 1..=n)).prop_map(|(a, b)| a..b);
            let of = || dims.iter().map(|&n| range(n)).collect::<Vec<_>>().prop_map(Region);
            (Just(dims.clone()), of(), of())
        })
    }

    proptest! {
        /// A box read by its runs, and what two boxes share, hold the elements that counting one by one finds.
        #[test]
        fn pieces_hold_their_elements((dims, a, b) in region()) {
            let n: u64 = dims.iter().product();
            let all: Vec<u8> = (0..n as u8).collect();
            let read = |r: &Region| -> Vec<u8> { r.runs(&dims).flat_map(|r| r.map(|i| all[i as usize])).collect() };
            let holds = |r: &Region, i: u64| {
                let mut rest = i;
                dims.iter().zip(&r.0).rev().all(|(n, range)| {
                    let at = rest % n;
                    rest /= n;
                    range.contains(&at)
                })
            };
            let slow = |r: &Region| -> Vec<u8> { (0..n).filter(|&i| holds(r, i)).map(|i| i as u8).collect() };
            prop_assert_eq!(read(&a), slow(&a));
            let mut out = vec![255; read(&b).len()];
            let copied = copy_overlap(&read(&a), &a, &mut out, &b, 1);
            let common: Vec<u8> = slow(&b).into_iter().map(|i| if holds(&a, u64::from(i)) { i } else { 255 }).collect();
            prop_assert_eq!(copied as usize, common.iter().filter(|&&i| i != 255).count());
            prop_assert_eq!(out, common);
        }
    }
}
