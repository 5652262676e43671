//! Downsets of a stream: the places where a pipeline can be cut.

use super::bits::{Bits, within, words};
use super::clusters::Clusters;
use super::problem::adjacency;
use super::stages::{Effort, Unfinished};

/// A stream prepared for enumeration: clusters numbered downstream.
#[derive(Clone, Debug)]
pub struct Lattice<'a> {
    clusters: &'a Clusters,
    after: Vec<Vec<usize>>,
    n_before: Vec<u32>,
    nets_of: Vec<Vec<usize>>,
    /// Every cluster with all that is downstream of it.
    downstream: Vec<Bits>,
}

/// Steps that a downset costs, in looks at a pair.
const WALK: u64 = 16;

/// What lies upstream of a cut, in sums.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Upstream {
    pub n: u32,
    /// Clusters that cannot run on an accelerator.
    pub n_bound: u32,
    /// Accelerator time of the others.
    pub accelerator: f64,
    pub host: f64,
    pub bytes: f64,
    /// Transfers of the nets with clusters on both sides.
    pub crossing: f64,
}

/// Downsets that were kept, by growing accelerator time.
#[derive(Clone, Debug, Default)]
pub struct Downsets {
    n_words: usize,
    members: Vec<u64>,
    pub sums: Vec<Upstream>,
    /// Nets on both sides, each with the number of its clusters upstream.
    nets: Vec<(u32, u32)>,
    nets_begin: Vec<usize>,
    transfer: Vec<f64>,
}

/// One level of the enumeration: a downset, and what its supersets can still reach.
struct Level {
    sums: Upstream,
    /// The cluster that was added last.
    added: usize,
    /// The next cluster to try.
    next: usize,
    /// Clusters that no superset found below this level holds, and the accelerator time of the others.
    barred: Bits,
    reach: f64,
}

impl<'a> Lattice<'a> {
    pub fn new(clusters: &'a Clusters, edges: &[(usize, usize)]) -> Self {
        let n = clusters.len();
        let after = adjacency(n, edges.iter().copied());
        let mut n_before = vec![0; n];
        edges.iter().for_each(|&(_, to)| n_before[to] += 1);
        let mut downstream = vec![Bits::new(n); n];
        for v in (0..n).rev() {
            let mut set = Bits::new(n);
            set.set(v);
            after[v].iter().for_each(|&w| set.merge(&downstream[w]));
            downstream[v] = set;
        }
        Self { clusters, after, n_before, nets_of: clusters.nets_of(), downstream }
    }

    /// Clusters.
    pub fn len(&self) -> usize {
        self.clusters.len()
    }

    pub fn is_empty(&self) -> bool {
        self.clusters.is_empty()
    }

    /// The sums over everything.
    pub fn total(&self) -> Upstream {
        let mut sums = Upstream { n: self.len() as u32, ..Upstream::default() };
        for v in 0..self.len() {
            let time = self.clusters.accelerator[v];
            sums.n_bound += u32::from(time.is_infinite());
            sums.accelerator += if time.is_finite() { time } else { 0.0 };
            sums.host += self.clusters.host[v];
            sums.bytes += self.clusters.bytes[v];
        }
        sums
    }

    /// All transfers.
    pub fn transfers(&self) -> f64 {
        self.clusters.nets.iter().map(|(cost, _)| cost).sum()
    }

    /// Most accelerator time that a host takes over per unit of its own time.
    pub fn advantage(&self) -> f64 {
        let of = |v: usize| match (self.clusters.accelerator[v], self.clusters.host[v]) {
            (a, _) if a == 0.0 || a.is_infinite() => 0.0,
            (a, h) => a / h,
        };
        (0..self.len()).map(of).fold(0.0, f64::max)
    }

    /// Every downset that `keep` wants, each once.
    ///
    /// Only downsets whose accelerator time is in one of `ranges` (sorted, apart) are shown to `keep`, and parts of the
    /// lattice that cannot reach a range are not walked.
    ///
    /// A downset is reached from the one without its last cluster, so that none is met twice.
    ///
    /// # Errors
    /// [`Unfinished`] when the effort is spent, or when `stop` says so.
    pub fn downsets(
        &self,
        ranges: &[(f64, f64)],
        keep: impl Fn(&Upstream) -> bool,
        effort: &mut Effort,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<Downsets, Unfinished> {
        let n = self.clusters.len();
        let time = |v: usize| if self.clusters.accelerator[v].is_finite() { self.clusters.accelerator[v] } else { 0.0 };
        let mut out = Downsets {
            n_words: words(n),
            nets_begin: vec![0],
            transfer: self.clusters.nets.iter().map(|(cost, _)| *cost).collect(),
            ..Downsets::default()
        };
        let mut members = Bits::new(n);
        let mut waits = self.n_before.clone();
        let mut held = vec![0_u32; self.clusters.nets.len()];
        let mut open = Bits::new(self.clusters.nets.len());
        let in_range = |x: f64| ranges.iter().any(|&(low, high)| low <= x && x <= high);
        let reaches = |from: f64, to: f64| ranges.iter().any(|&(low, high)| low <= to && from <= high);
        let most = effort.n_downsets;
        let mut emit = |sums: &Upstream, members: &Bits, open: &Bits, held: &[u32]| {
            if in_range(sums.accelerator) && keep(sums) {
                out.members.extend_from_slice(members.words());
                out.nets.extend(open.iter().map(|net| (net as u32, held[net])));
                out.nets_begin.push(out.nets.len());
                out.sums.push(*sums);
            }
            out.sums.len() <= most
        };
        let all: f64 = (0..n).map(time).sum();
        let slack = 1e-9 * all;
        let mut levels = vec![Level { sums: Upstream::default(), added: 0, next: 0, barred: Bits::new(n), reach: all }];
        emit(&levels[0].sums, &members, &open, &held);
        while let Some(level) = levels.last_mut() {
            effort.spend(WALK, stop)?;
            // A cluster passed over is out for good, with everything downstream.
            while level.next < n && waits[level.next] > 0 {
                level.bar(&self.downstream[level.next], time);
            }
            if level.next == n || !reaches(level.sums.accelerator - slack, level.reach + slack) {
                let added = level.added;
                levels.pop();
                if levels.is_empty() {
                    break;
                }
                members.clear(added);
                self.after[added].iter().for_each(|&w| waits[w] += 1);
                for &net in &self.nets_of[added] {
                    held[net] -= 1;
                    if held[net] == 0 { open.clear(net) } else { open.set(net) }
                }
                continue;
            }
            let v = level.next;
            let mut sums = level.sums;
            sums.n += 1;
            sums.n_bound += u32::from(self.clusters.accelerator[v].is_infinite());
            sums.accelerator += time(v);
            sums.host += self.clusters.host[v];
            sums.bytes += self.clusters.bytes[v];
            members.set(v);
            self.after[v].iter().for_each(|&w| waits[w] -= 1);
            for &net in &self.nets_of[v] {
                held[net] += 1;
                let (cost, pins) = &self.clusters.nets[net];
                if held[net] as usize == pins.len() {
                    open.clear(net);
                    sums.crossing -= cost;
                } else if held[net] == 1 {
                    open.set(net);
                    sums.crossing += cost;
                }
            }
            let below = Level { sums, added: v, next: v + 1, barred: level.barred.clone(), reach: level.reach };
            level.bar(&self.downstream[v], time);
            if !emit(&below.sums, &members, &open, &held) {
                return Err(Unfinished::TooMany);
            }
            levels.push(below);
        }
        out.sort();
        Ok(out)
    }
}

impl Level {
    /// Leaves out the next cluster.
    fn bar(&mut self, downstream: &Bits, time: impl Fn(usize) -> f64) {
        if !self.barred.has(self.next) {
            for v in downstream.iter() {
                if !self.barred.has(v) {
                    self.barred.set(v);
                    self.reach -= time(v);
                }
            }
        }
        self.next += 1;
    }
}

impl Downsets {
    pub fn len(&self) -> usize {
        self.sums.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    pub fn members(&self, i: usize) -> &[u64] {
        &self.members[i * self.n_words..(i + 1) * self.n_words]
    }

    fn nets(&self, i: usize) -> &[(u32, u32)] {
        &self.nets[self.nets_begin[i]..self.nets_begin[i + 1]]
    }

    #[inline]
    pub fn within(&self, small: usize, large: usize) -> bool {
        within(self.members(small), self.members(large))
    }

    /// Transfers of an accelerator that holds what is in `large` and not in `small`, a downset within it.
    pub fn transfers(&self, small: usize, large: usize) -> f64 {
        // A net open at both cuts is counted twice here, but paid once if some of it lies between them, else not at all.
        let mut sum = self.sums[small].crossing + self.sums[large].crossing;
        let (mut a, mut b) = (self.nets(small).iter().peekable(), self.nets(large).iter().peekable());
        while let (Some(&&(x, n)), Some(&&(y, m))) = (a.peek(), b.peek()) {
            match x.cmp(&y) {
                std::cmp::Ordering::Less => drop(a.next()),
                std::cmp::Ordering::Greater => drop(b.next()),
                std::cmp::Ordering::Equal => {
                    sum -= self.transfer[x as usize] * if n == m { 2.0 } else { 1.0 };
                    a.next();
                    b.next();
                }
            }
        }
        sum
    }

    /// Smaller first, a downset after those within it.
    fn sort(&mut self) {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by(|&a, &b| {
            self.sums[a].accelerator.total_cmp(&self.sums[b].accelerator).then(self.sums[a].n.cmp(&self.sums[b].n))
        });
        let mut sorted = Self { n_words: self.n_words, nets_begin: vec![0], ..Self::default() };
        sorted.members.reserve(self.members.len());
        for &i in &order {
            sorted.members.extend_from_slice(self.members(i));
            sorted.sums.push(self.sums[i]);
            sorted.nets.extend_from_slice(self.nets(i));
            sorted.nets_begin.push(sorted.nets.len());
        }
        sorted.transfer = std::mem::take(&mut self.transfer);
        *self = sorted;
    }
}
