//! The cheapest set of clusters around some of them, by maximum flow.

use super::clusters::Clusters;

/// Arcs of a network, in pairs: arc `i ^ 1` is the reverse of `i`.
#[derive(Clone, Debug)]
pub struct Network {
    clusters: Clusters,
    source: usize,
    sink: usize,
    to: Vec<u32>,
    capacity: Vec<f64>,
    arcs: Vec<Vec<u32>>,
    /// Residual capacity that counts as none.
    tiny: f64,
    /// What is added to the cost of every cut so that no capacity is negative.
    pub offset: f64,
    /// Kept between calls.
    residual: Vec<f64>,
    level: Vec<u32>,
    next: Vec<u32>,
    /// Arcs that may still be looked at before callers should give up.
    pub left: u64,
}

/// Set on an accelerator, and its load.
#[derive(Clone, Debug, PartialEq)]
pub struct Cheapest {
    pub load: f64,
    pub members: Vec<bool>,
}

impl Network {
    /// Cutting the network puts clusters on the source's side; the cut costs what an accelerator with these would carry.
    ///
    /// Clusters that cannot run on an accelerator cost more than all others together.
    ///
    /// # Source
    /// A net's two vertices let it pay once however many clusters lie on either side (Lawler, "Cutsets and partitions of
    /// hypergraphs", Networks 1973).
    pub fn new(clusters: &Clusters) -> Self {
        let n = clusters.len();
        let (source, sink) = (n, n + 1);
        let n_vertices = n + 2 + 2 * clusters.nets.len();
        let mut network = Self {
            clusters: clusters.clone(),
            source,
            sink,
            to: Vec::new(),
            capacity: Vec::new(),
            arcs: vec![Vec::new(); n_vertices],
            tiny: 1e-13 * clusters.accelerator.iter().filter(|t| t.is_finite()).sum::<f64>(),
            offset: 0.0,
            residual: Vec::new(),
            level: Vec::new(),
            next: Vec::new(),
            left: u64::MAX,
        };
        for v in 0..n {
            network.arc(v, sink, clusters.accelerator[v], 0.0);
            network.arc(source, v, 0.0, 0.0);
        }
        for (i, (cost, pins)) in clusters.nets.iter().enumerate() {
            if let [a, b] = pins[..] {
                network.arc(a, b, *cost, *cost);
                continue;
            }
            let (enter, leave) = (n + 2 + 2 * i, n + 3 + 2 * i);
            network.arc(enter, leave, *cost, 0.0);
            for &p in pins {
                network.arc(p, enter, f64::INFINITY, 0.0);
                network.arc(leave, p, f64::INFINITY, 0.0);
            }
        }
        network
    }

    fn arc(&mut self, from: usize, to: usize, capacity: f64, back: f64) {
        let i = self.to.len() as u32;
        self.to.extend([to as u32, from as u32]);
        self.capacity.extend([capacity, back]);
        self.arcs[from].push(i);
        self.arcs[to].push(i + 1);
    }

    /// From now on the cut costs what nets cost, less `rate` times the accelerator time of the clusters on the source's
    /// side, plus a constant: [`Self::offset`]. At first the rate is -1.
    pub fn rate(&mut self, rate: f64) {
        self.offset = 0.0;
        for (v, &time) in self.clusters.accelerator.iter().enumerate() {
            if time.is_finite() {
                self.capacity[4 * v] = time * (-rate).max(0.0);
                self.capacity[4 * v + 2] = time * rate.max(0.0);
                self.offset += time * rate.max(0.0);
            }
        }
    }

    /// Accelerator time of a set, and what its nets cost.
    pub fn sums(&self, set: &[bool]) -> (f64, f64) {
        let clusters = &self.clusters;
        let time = (0..set.len()).filter(|&v| set[v]).map(|v| clusters.accelerator[v]).sum();
        let cut = |pins: &[usize]| pins.iter().any(|&p| set[p] != set[pins[0]]);
        (time, clusters.nets.iter().filter(|(_, pins)| cut(pins)).map(|(cost, _)| cost).sum())
    }

    /// Two clusters are on one side from now on.
    pub fn join(&mut self, a: usize, b: usize) {
        self.arc(a, b, f64::INFINITY, f64::INFINITY);
    }

    /// The cheapest set with all of `inside` and none of `outside`; infinite load where there is none.
    ///
    /// The search ends early when the load is above `enough`, and then tells no members.
    ///
    /// # Source
    /// Dinitz' algorithm, with a depth-first search that keeps no recursion.
    pub fn cheapest(&mut self, inside: &[usize], outside: &[usize], enough: f64) -> Cheapest {
        let n_arcs = self.to.len();
        for &v in inside {
            self.arc(self.source, v, f64::INFINITY, 0.0);
        }
        for &v in outside {
            self.arc(v, self.sink, f64::INFINITY, 0.0);
        }
        self.residual.clone_from(&self.capacity);
        let mut load = 0.0;
        while load <= enough && load.is_finite() && self.levels() {
            self.next.clear();
            self.next.resize(self.arcs.len(), 0);
            while load <= enough {
                let pushed = self.augment();
                load += pushed;
                if pushed == 0.0 || pushed.is_infinite() {
                    break;
                }
            }
        }
        let members = if load <= enough {
            self.level[..self.clusters.len()].iter().map(|&l| l != 0).collect()
        } else {
            Vec::new()
        };
        // Terminals are for one call.
        for v in inside.iter().chain(outside).copied().chain([self.source, self.sink]) {
            while self.arcs[v].last().is_some_and(|&i| i as usize >= n_arcs) {
                self.arcs[v].pop();
            }
        }
        self.to.truncate(n_arcs);
        self.capacity.truncate(n_arcs);
        Cheapest { load, members }
    }

    /// Breadth-first distance from the source plus one; 0 where nothing gets. True when the sink is reached.
    fn levels(&mut self) -> bool {
        self.level.clear();
        self.level.resize(self.arcs.len(), 0);
        self.level[self.source] = 1;
        let mut queue = vec![self.source];
        let mut at = 0;
        while let Some(&v) = queue.get(at) {
            at += 1;
            self.left = self.left.saturating_sub(self.arcs[v].len() as u64);
            for &i in &self.arcs[v] {
                let w = self.to[i as usize] as usize;
                if self.level[w] == 0 && self.residual[i as usize] > self.tiny {
                    self.level[w] = self.level[v] + 1;
                    queue.push(w);
                }
            }
        }
        self.level[self.sink] != 0
    }

    /// Pushes along one shortest path; 0 when there is none left, infinite when nothing limits it.
    fn augment(&mut self) -> f64 {
        let mut path: Vec<u32> = Vec::new();
        let mut v = self.source;
        while v != self.sink {
            let forward = loop {
                let Some(&i) = self.arcs[v].get(self.next[v] as usize) else { break None };
                let w = self.to[i as usize] as usize;
                if self.residual[i as usize] > self.tiny && self.level[w] == self.level[v] + 1 {
                    break Some((i, w));
                }
                self.next[v] += 1;
            };
            match (forward, path.last()) {
                (Some((i, w)), _) => {
                    path.push(i);
                    v = w;
                }
                (None, None) => return 0.0,
                (None, Some(&i)) => {
                    path.pop();
                    v = self.to[i as usize ^ 1] as usize;
                    self.next[v] += 1;
                }
            }
        }
        let least = path.iter().map(|&i| self.residual[i as usize]).fold(f64::INFINITY, f64::min);
        if least.is_infinite() {
            return least;
        }
        self.left = self.left.saturating_sub(path.len() as u64);
        for &i in &path {
            self.residual[i as usize] -= least;
            self.residual[i as usize ^ 1] += least;
        }
        least
    }
}
