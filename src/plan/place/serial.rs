//! Blocks one after the other.

use super::bits::{has, ones};
use super::contiguous::banded;
use super::lattice::{Downsets, Lattice};
use super::stages::{Effort, Unfinished};
use super::timeline::Timeline;

/// Downsets to choose from.
const CUTS: usize = 2000;
/// Clusters that hosts take over at once; longer stretches are made of several.
const STRETCH: u32 = 8;

/// The blocks with the shortest latency when a block and what hosts do between blocks wait for all before them.
///
/// What hosts do takes as long as all of it one after the other, or, with `beside`, as long as it makes the longest path
/// of host times longer: the truth is in between. Of graphs with many downsets only those near a line are considered.
///
/// # Shapes
/// Result: device of every cluster of the stream; the host is number `n_accelerators`. `None` when `stop` says so.
pub fn serial(timeline: &Timeline, beside: bool, stop: &mut dyn FnMut() -> bool) -> Option<Vec<u32>> {
    let stream = &timeline.stream;
    let n = stream.clusters.len();
    let mut width = n.max(1);
    let downsets = loop {
        let edges = banded(&stream.edges, n, width);
        let lattice = Lattice::new(&stream.clusters, &edges);
        let everything = [(f64::NEG_INFINITY, f64::INFINITY)];
        let mut effort = Effort { n_downsets: CUTS.max(n + 1), n_steps: u64::MAX };
        match lattice.downsets(&everything, |_| true, &mut effort, stop) {
            Ok(downsets) => break downsets,
            Err(Unfinished::TooMany) => width = (width / 2).max(1),
            Err(Unfinished::Stopped) => return None,
        }
    };
    Row::new(timeline, &downsets, beside, stop)?.device(timeline, &downsets)
}

/// Times at cuts, by cut and number of blocks.
struct Row {
    per_cut: usize,
    time: Vec<f64>,
    /// The cut before, and whether a block lies between.
    from: Vec<Option<(usize, bool)>>,
}

impl Row {
    fn new(timeline: &Timeline, downsets: &Downsets, beside: bool, stop: &mut dyn FnMut() -> bool) -> Option<Self> {
        let clusters = &timeline.stream.clusters;
        let per_cut = timeline.n_accelerators + 1;
        let mut depth = clusters.host.clone();
        for &(a, b) in &timeline.stream.edges {
            depth[b] = depth[b].max(depth[a] + clusters.host[b]);
        }
        let host: Vec<f64> = (0..downsets.len())
            .map(|i| match beside {
                true => ones(downsets.members(i)).map(|v| depth[v]).fold(0.0, f64::max),
                false => downsets.sums[i].host,
            })
            .collect();
        let mut row = Self {
            per_cut,
            time: vec![f64::INFINITY; downsets.len() * per_cut],
            from: vec![None; downsets.len() * per_cut],
        };
        for (i, up) in downsets.sums.iter().enumerate() {
            if stop() {
                return None;
            }
            if up.n == 0 {
                row.time[i * per_cut..(i + 1) * per_cut].fill(0.0);
            }
            for (j, down) in downsets.sums.iter().enumerate() {
                if down.accelerator > up.accelerator * (1.0 + 1e-12) {
                    break;
                }
                if down.n >= up.n || !downsets.within(j, i) {
                    continue;
                }
                if up.n - down.n <= STRETCH {
                    row.extend(j, i, host[i] - host[j], false);
                }
                if up.n_bound == down.n_bound && up.bytes - down.bytes <= timeline.memory {
                    row.extend(j, i, up.accelerator - down.accelerator + downsets.transfers(j, i), true);
                }
            }
        }
        Some(row)
    }

    fn extend(&mut self, small: usize, large: usize, time: f64, block: bool) {
        let step = usize::from(block);
        for a in step..self.per_cut {
            let after = self.time[small * self.per_cut + a - step] + time;
            if after < self.time[large * self.per_cut + a] {
                self.time[large * self.per_cut + a] = after;
                self.from[large * self.per_cut + a] = Some((small, block));
            }
        }
    }

    fn device(&self, timeline: &Timeline, downsets: &Downsets) -> Option<Vec<u32>> {
        let n = timeline.stream.clusters.len();
        let mut device = vec![timeline.n_accelerators as u32; n];
        let mut at = downsets.sums.iter().position(|up| up.n as usize == n)?;
        let mut a = self.per_cut - 1;
        while downsets.sums[at].n > 0 {
            let (before, block) = self.from[at * self.per_cut + a]?;
            if block {
                a -= 1;
                let (large, small) = (downsets.members(at), downsets.members(before));
                (0..n).filter(|&v| has(large, v) && !has(small, v)).for_each(|v| device[v] = a as u32);
            }
            at = before;
        }
        Some(device)
    }
}
