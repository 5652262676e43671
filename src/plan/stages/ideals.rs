//! Prefixes of a computation: sets of nodes that contain whatever their members need.

use std::collections::BTreeSet;

use super::dag::Dag;

/// Order ideals of a graph, by size; the first is empty, the last has all nodes.
#[derive(Clone, Debug)]
pub struct Ideals {
    n_words: usize,
    words: Vec<u64>,
    /// Where ideals of each size begin, and the end.
    sizes: Vec<usize>,
    /// Where the smaller ideals of each ideal begin, and the end.
    starts: Vec<usize>,
    smaller: Vec<u32>,
    /// Whether every ideal is here.
    pub complete: bool,
}

impl Ideals {
    /// All ideals, if there are no more than `most`.
    ///
    /// # Complexity
    /// O(ideals · n · n / 64) and a sort of each size.
    pub fn all(dag: &Dag, most: usize) -> Option<Self> {
        Self::grow(dag, most, &mut |_| {})
    }

    /// Those ideals that `rank` lowest, up to `width` of each size. Each of them grows from one of them.
    pub fn best(dag: &Dag, rank: &dyn Fn(&[u64]) -> f64, width: usize) -> Self {
        let mut complete = true;
        let mut keep = |next: &mut Vec<Grown>| {
            if next.len() > width.max(1) {
                complete = false;
                let mut ranked: Vec<(f64, Grown)> = next.drain(..).map(|g| (rank(&g.set), g)).collect();
                ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
                next.extend(ranked.into_iter().take(width.max(1)).map(|r| r.1));
                next.sort_unstable();
            }
        };
        // Without a limit nothing is given up.
        let ideals = Self::grow(dag, usize::MAX, &mut keep).unwrap_or_else(|| Self::empty(1));
        Self { complete, ..ideals }
    }

    /// Those with the lightest borders: the nodes inside that are needed outside, with their `weight`.
    pub fn lightest(dag: &Dag, weight: &[f64], width: usize) -> Self {
        Self::best(dag, &|set| border(dag, set, weight), width)
    }

    /// Those that differ in the fewest nodes from where stages begin, the lighter border first among equals.
    pub fn near(dag: &Dag, weight: &[f64], stages: &[&[usize]], width: usize) -> Self {
        let mut set = vec![0u64; dag.n_nodes().div_ceil(64).max(1)];
        let mut borders = Vec::new();
        for nodes in stages {
            for &v in *nodes {
                set[v / 64] |= 1 << (v % 64);
            }
            borders.push(set.clone());
        }
        let total: f64 = weight.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let rank = |set: &[u64]| {
            let differ = |other: &Vec<u64>| set.iter().zip(other).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>();
            f64::from(borders.iter().map(differ).min().unwrap_or(0)) + border(dag, set, weight) / total
        };
        Self::best(dag, &rank, width)
    }

    /// Those with the lightest borders, up to `most`, spread evenly over the work of the nodes.
    pub fn spread(&self, dag: &Dag, weight: &[f64], work: &[f64], most: usize) -> Self {
        let (done, borders) = (self.sums(work), self.borders(dag, weight));
        let total = done[self.len() - 1].max(f64::MIN_POSITIVE);
        let inner = most.max(3) - 2;
        let window = |i: usize| ((done[i] / total * inner as f64) as usize).min(inner - 1);
        let mut order: Vec<usize> = (1..self.len() - 1).collect();
        order.sort_by(|&a, &b| window(a).cmp(&window(b)).then(borders[a].total_cmp(&borders[b])));
        let mut chosen: BTreeSet<Vec<u64>> = [0, self.len() - 1].map(|i| self.set(i).to_vec()).into();
        // First the lightest of each window, then the second, until there are enough.
        let mut ranked = Vec::with_capacity(order.len());
        for group in order.chunk_by(|&a, &b| window(a) == window(b)) {
            ranked.extend(group.iter().enumerate().map(|(rank, &i)| (rank, i)));
        }
        ranked.sort_unstable();
        chosen.extend(ranked.iter().take(inner).map(|&(_, i)| self.set(i).to_vec()));
        Self::of(dag, chosen)
    }

    /// Those in the `spine`, those where stages begin and end, and those a few nodes away, up to `most`; of those
    /// equally far away the lightest borders first, or any with a number to mix them by.
    pub fn around(dag: &Dag, weight: &[f64], stages: &[&[usize]], spine: &Self, most: usize, mix: Option<u64>) -> Self {
        let rank = |set: &[u64]| match mix {
            None => border(dag, set, weight),
            Some(mix) => {
                let step = |hash: u64, word: &u64| (hash ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
                set.iter().fold(mix.wrapping_add(1).wrapping_mul(0xBF58_476D_1CE4_E5B9), step) as f64
            }
        };
        let mut set = vec![0u64; dag.n_nodes().div_ceil(64).max(1)];
        let mut chosen: BTreeSet<Vec<u64>> = (0..spine.len()).map(|i| spine.set(i).to_vec()).collect();
        let most = chosen.len() + most.saturating_sub(chosen.len()).max(stages.len());
        let mut layer = BTreeSet::new();
        for nodes in stages {
            nodes.iter().for_each(|&v| set[v / 64] |= 1 << (v % 64));
            layer.insert(set.clone());
        }
        chosen.extend(layer.iter().cloned());
        while chosen.len() < most && !layer.is_empty() {
            let mut next = BTreeSet::new();
            for set in &layer {
                let has = |v: usize| set[v / 64] >> (v % 64) & 1 == 1;
                for v in 0..dag.n_nodes() {
                    let movable = if has(v) {
                        dag.after(v).iter().all(|&u| !has(u as usize))
                    } else {
                        dag.before(v).iter().all(|&u| has(u as usize))
                    };
                    if movable {
                        let mut other = set.clone();
                        other[v / 64] ^= 1 << (v % 64);
                        next.insert(other);
                    }
                }
            }
            next.retain(|s| !chosen.contains(s));
            let mut ranked: Vec<(f64, &Vec<u64>)> = next.iter().map(|s| (rank(s), s)).collect();
            ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(b.1)));
            let room = most - chosen.len();
            chosen.extend(ranked.into_iter().take(room).map(|r| r.1.clone()));
            layer = next;
        }
        Self::of(dag, chosen)
    }

    /// Those that are wanted; they are as complete as before if nothing is lost with the others.
    pub fn only(&self, wanted: &[bool], dag: &Dag) -> Self {
        let sets = (0..self.len()).filter(|&i| wanted[i]).map(|i| self.set(i).to_vec());
        Self { complete: self.complete, ..Self::of(dag, sets.collect()) }
    }

    /// Those of both.
    pub fn union(&self, other: &Self, dag: &Dag) -> Self {
        let sets = |ideals: &Self| (0..ideals.len()).map(|i| ideals.set(i).to_vec()).collect::<Vec<_>>();
        Self::of(dag, sets(self).into_iter().chain(sets(other)).collect())
    }

    /// These alone, without what grows from what.
    pub fn of(dag: &Dag, sets: BTreeSet<Vec<u64>>) -> Self {
        let size = |s: &Vec<u64>| s.iter().map(|w| w.count_ones() as usize).sum::<usize>();
        let mut sets: Vec<Vec<u64>> = sets.into_iter().collect();
        sets.sort_by_key(size);
        let sizes = (0..=dag.n_nodes() + 1).map(|n| sets.partition_point(|s| size(s) < n)).collect();
        Self {
            n_words: dag.n_nodes().div_ceil(64).max(1),
            starts: vec![0; sets.len() + 1],
            words: sets.into_iter().flatten().collect(),
            sizes,
            smaller: Vec::new(),
            complete: false,
        }
    }

    fn empty(n_words: usize) -> Self {
        let (sizes, starts) = (vec![0, 1], vec![0, 0]);
        Self { n_words, words: vec![0; n_words], sizes, starts, smaller: Vec::new(), complete: true }
    }

    fn grow(dag: &Dag, most: usize, keep: &mut dyn FnMut(&mut Vec<Grown>)) -> Option<Self> {
        let n = dag.n_nodes();
        let mut ideals = Self::empty(n.div_ceil(64).max(1));
        for size in 0..n {
            // Each larger ideal with one it grows from.
            let mut grown: Vec<(Vec<u64>, u32)> = Vec::new();
            for i in ideals.of_size(size) {
                for v in (0..n).filter(|&v| !ideals.has(i, v)) {
                    if dag.before(v).iter().all(|&u| ideals.has(i, u as usize)) {
                        let mut set = ideals.set(i).to_vec();
                        set[v / 64] |= 1 << (v % 64);
                        grown.push((set, i as u32));
                    }
                }
            }
            grown.sort_unstable();
            let mut next: Vec<Grown> = Vec::new();
            for (set, from) in grown {
                match next.last_mut() {
                    Some(last) if last.set == set => last.from.push(from),
                    _ => next.push(Grown { set, from: vec![from] }),
                }
            }
            keep(&mut next);
            if ideals.len() + next.len() > most {
                return None;
            }
            for Grown { set, from } in next {
                ideals.words.extend_from_slice(&set);
                ideals.smaller.extend_from_slice(&from);
                ideals.starts.push(ideals.smaller.len());
            }
            ideals.sizes.push(ideals.starts.len() - 1);
        }
        Some(ideals)
    }

    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    pub fn of_size(&self, size: usize) -> std::ops::Range<usize> {
        self.sizes[size]..self.sizes[size + 1]
    }

    /// Ideals with one node less that are part of this one.
    pub fn smaller(&self, i: usize) -> &[u32] {
        &self.smaller[self.starts[i]..self.starts[i + 1]]
    }

    pub fn set(&self, i: usize) -> &[u64] {
        &self.words[i * self.n_words..(i + 1) * self.n_words]
    }

    pub fn has(&self, i: usize, node: usize) -> bool {
        self.set(i)[node / 64] >> (node % 64) & 1 == 1
    }

    /// Whether the first is part of the second.
    pub fn within(&self, inner: usize, outer: usize) -> bool {
        self.set(inner).iter().zip(self.set(outer)).all(|(a, b)| a & !b == 0)
    }

    /// Sum of a weight over the nodes of each ideal.
    pub fn sums(&self, weight: &[f64]) -> Vec<f64> {
        let sum = |i| weight.iter().enumerate().filter(|&(v, _)| self.has(i, v)).map(|(_, w)| w).sum();
        (0..self.len()).map(sum).collect()
    }

    /// Weight of the nodes of each ideal that are needed outside it.
    pub fn borders(&self, dag: &Dag, weight: &[f64]) -> Vec<f64> {
        (0..self.len()).map(|i| border(dag, self.set(i), weight)).collect()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Grown {
    set: Vec<u64>,
    from: Vec<u32>,
}

/// Weight of the nodes inside that are needed outside.
pub fn border(dag: &Dag, set: &[u64], weight: &[f64]) -> f64 {
    let inside = |v: usize| set[v / 64] >> (v % 64) & 1 == 1;
    let needed = |v: usize| dag.after(v).iter().any(|&u| !inside(u as usize));
    (0..dag.n_nodes()).filter(|&v| inside(v) && needed(v)).map(|v| weight[v]).sum()
}
