//! Who comes before and after whom.

use super::bits::Bits;
use super::stream::Stream;

/// Clusters for which this is worked out: it takes the square of their number in bits, twice.
const MOST: usize = 10_000;

/// Every cluster of a stream with all before it, and with all after it; itself included.
#[derive(Clone, Debug)]
pub struct Reach {
    upstream: Vec<Bits>,
    downstream: Vec<Bits>,
}

impl Reach {
    /// `None` for a stream that is too large.
    pub fn new(stream: &Stream) -> Option<Self> {
        let n = stream.clusters.len();
        if n > MOST {
            return None;
        }
        let mut upstream: Vec<Bits> = (0..n).map(|v| Bits::of(n, v)).collect();
        let mut downstream = upstream.clone();
        // Edges go to larger numbers.
        let mut edges = stream.edges.clone();
        edges.sort_unstable();
        for &(a, b) in edges.iter().rev() {
            let (head, tail) = downstream.split_at_mut(b);
            head[a].merge(&tail[0]);
        }
        edges.sort_unstable_by_key(|&(a, b)| (b, a));
        for &(a, b) in &edges {
            let (head, tail) = upstream.split_at_mut(b);
            tail[0].merge(&head[a]);
        }
        Some(Self { upstream, downstream })
    }

    pub fn upstream(&self, cluster: usize) -> &Bits {
        &self.upstream[cluster]
    }

    pub fn downstream(&self, cluster: usize) -> &Bits {
        &self.downstream[cluster]
    }

    /// What comes after one and before the other, with both.
    pub fn between(&self, first: usize, last: usize) -> Bits {
        self.downstream[first].common(&self.upstream[last])
    }
}
