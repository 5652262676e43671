//! Whether there is a pipeline within a limit of time.

use super::super::choice::{self, Cost};
use super::super::ideals::Ideals;
use super::{Pipeline, Problem, Stage, Way};

/// Sums that one knapsack may keep.
const SUMS: usize = 50_000;

/// A stage between two suffixes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    /// Ideals of what is before the stage, and of that with the stage; and the number of this pair.
    before: usize,
    upto: usize,
    pair: usize,
    degree: usize,
    data: usize,
    /// Data-parallel degrees of this stage and later ones.
    replicas: usize,
}

/// A way to run what comes after a prefix.
#[derive(Clone, Copy, Debug)]
struct Tail {
    devices: usize,
    replicas: usize,
    first: Option<Placed>,
    /// Devices of the tail after the first stage.
    rest: usize,
}

/// Sums for one tensor-parallel degree.
struct Degree {
    tensor: usize,
    /// Whether parameters and syncs of a node are the same for all of its ways: then less memory costs time for
    /// computing only, and the knapsack does not depend on the data-parallel degree.
    uniform: bool,
    /// By ideal: nodes without a way, and sums of the fastest ways.
    missing: Vec<u32>,
    time: Vec<f64>,
    params: Vec<f64>,
    memory_each: Vec<f64>,
    memory_fixed: Vec<f64>,
    /// Sums of the ways that take least for each microbatch in flight: time, and bytes as above.
    light: [Vec<f64>; 3],
    /// Sums of the least bytes, each and fixed, of any ways.
    least: [Vec<f64>; 2],
    /// By pair: seconds of transfers over the borders. Uniform degrees only.
    transfer: Vec<f64>,
}

/// What is known of a knapsack.
#[derive(Clone, Copy, Debug)]
struct Known {
    degree: u32,
    /// 0 where it makes no difference.
    data: u32,
    in_flight: u32,
    low: f64,
    high: f64,
}

pub(super) struct Search<'a> {
    problem: &'a Problem,
    ideals: &'a Ideals,
    degrees: Vec<Degree>,
    /// Least device-seconds of each prefix.
    pub work: Vec<f64>,
    /// Data-parallel degrees.
    data: Vec<usize>,
    /// For each ideal the pairs with larger ones: (larger, index of the pair).
    pairs: Vec<Vec<(u32, u32)>>,
    known: Vec<Vec<Known>>,
    /// Positions of a node's edges among its incoming, or outgoing, ones; as `edges`.
    slots: Vec<(usize, usize)>,
    /// Edges of each node.
    incoming: Vec<Vec<usize>>,
    outgoing: Vec<Vec<usize>>,
    pub exact: bool,
}

impl<'a> Search<'a> {
    pub fn new(problem: &'a Problem, ideals: &'a Ideals) -> Self {
        let n = problem.nodes.len();
        let (mut incoming, mut outgoing) = (vec![Vec::new(); n], vec![Vec::new(); n]);
        let mut slots = Vec::with_capacity(problem.edges.len());
        for (e, &(from, to, _)) in problem.edges.iter().enumerate() {
            slots.push((incoming[to].len(), outgoing[from].len()));
            outgoing[from].push(e);
            incoming[to].push(e);
        }
        let mut pairs = vec![Vec::new(); ideals.len()];
        let mut n_pairs = 0u32;
        for (inner, larger) in pairs.iter_mut().enumerate() {
            for outer in inner + 1..ideals.len() {
                if ideals.within(inner, outer) {
                    larger.push((outer as u32, n_pairs));
                    n_pairs += 1;
                }
            }
        }
        let work = ideals.sums(&super::least_work(problem));
        let most = problem.n_devices.min(problem.n_microbatches);
        let data = (1..=most).filter(|&d| problem.n_microbatches.is_multiple_of(d)).collect();
        let mut search = Self {
            problem,
            ideals,
            degrees: Vec::new(),
            work,
            data,
            pairs,
            known: vec![Vec::new(); n_pairs as usize],
            slots,
            incoming,
            outgoing,
            exact: true,
        };
        let mut tensor: Vec<usize> = problem.nodes.iter().flatten().map(|d| d.0).collect();
        tensor.sort_unstable();
        tensor.dedup();
        let crosses = |i: usize, e: u32| {
            let (from, to, _) = problem.edges[e as usize];
            ideals.has(i, from) && !ideals.has(i, to)
        };
        let n_edges = problem.edges.len() as u32;
        let crossing: Vec<Vec<u32>> =
            (0..ideals.len()).map(|i| (0..n_edges).filter(|&e| crosses(i, e)).collect()).collect();
        search.degrees = tensor
            .into_iter()
            .filter(|&t| t > 0 && t <= problem.n_devices)
            .map(|t| search.degree(t, n_pairs as usize, &crossing))
            .collect();
        search
    }

    /// Whether every prefix is looked at.
    pub fn complete(&self) -> bool {
        self.ideals.complete
    }

    fn ways(&self, node: usize, tensor: usize) -> &'a [Way] {
        self.problem.nodes[node].iter().find(|d| d.0 == tensor).map_or(&[], |d| &d.1)
    }

    fn degree(&self, tensor: usize, n_pairs: usize, crossing: &[Vec<u32>]) -> Degree {
        let n = self.problem.nodes.len();
        let fastest: Vec<Option<&Way>> =
            (0..n).map(|v| self.ways(v, tensor).iter().min_by(|a, b| a.time.total_cmp(&b.time))).collect();
        let sums_of = |ways: &[Option<&Way>], value: &dyn Fn(&Way) -> f64| {
            let values: Vec<f64> = ways.iter().map(|w| w.map_or(0.0, value)).collect();
            self.ideals.sums(&values)
        };
        let sums = |value: &dyn Fn(&Way) -> f64| sums_of(&fastest, value);
        let lightest = |value: &dyn Fn(&Way) -> f64| -> Vec<Option<&Way>> {
            let by = |a: &&Way, b: &&Way| value(a).total_cmp(&value(b)).then(a.memory_fixed.total_cmp(&b.memory_fixed));
            (0..n).map(|v| self.ways(v, tensor).iter().min_by(by)).collect()
        };
        let (light, fixed) = (lightest(&|w| w.memory_each), lightest(&|w| w.memory_fixed));
        let uniform = (0..n).all(|v| {
            let ways = self.ways(v, tensor);
            let same = |a: &Way, b: &Way| a.params == b.params && a.sync_in == b.sync_in && a.sync_out == b.sync_out;
            ways.windows(2).all(|w| same(&w[0], &w[1]))
        });
        let lacking: Vec<f64> = fastest.iter().map(|w| if w.is_none() { 1.0 } else { 0.0 }).collect();
        let missing: Vec<u32> = self.ideals.sums(&lacking).into_iter().map(|m| m as u32).collect();
        let mut transfer = Vec::new();
        if uniform {
            transfer.resize(n_pairs, 0.0);
            for (inner, larger) in self.pairs.iter().enumerate() {
                for &(outer, pair) in larger {
                    if missing[inner] == missing[outer as usize] {
                        transfer[pair as usize] = self.transfer(inner, outer as usize, crossing, &fastest);
                    }
                }
            }
        }
        Degree {
            tensor,
            uniform,
            missing,
            time: sums(&|w| w.time),
            params: sums(&|w| w.params),
            memory_each: sums(&|w| w.memory_each),
            memory_fixed: sums(&|w| w.memory_fixed),
            light: [
                sums_of(&light, &|w| w.time),
                sums_of(&light, &|w| w.memory_each),
                sums_of(&light, &|w| w.memory_fixed),
            ],
            least: [sums_of(&light, &|w| w.memory_each), sums_of(&fixed, &|w| w.memory_fixed)],
            transfer,
        }
    }

    /// Seconds of the transfers over the borders of a stage. `crossing`: edges out of each of the two ideals.
    fn transfer(&self, before: usize, upto: usize, crossing: &[Vec<u32>], way: &[Option<&Way>]) -> f64 {
        let mut bytes = 0.0;
        for &e in &crossing[before] {
            let (_, to, c) = self.problem.edges[e as usize];
            if self.ideals.has(upto, to) {
                bytes += c + way[to].map_or(0.0, |w| w.sync_in[self.slots[e as usize].0]);
            }
        }
        for &e in &crossing[upto] {
            let (from, _, c) = self.problem.edges[e as usize];
            if !self.ideals.has(before, from) {
                bytes += c + way[from].map_or(0.0, |w| w.sync_out[self.slots[e as usize].1]);
            }
        }
        2.0 * bytes / self.problem.bandwidth
    }

    /// Costs of every way of a stage's nodes.
    fn items(
        &self,
        nodes: &[usize],
        before: usize,
        upto: usize,
        tensor: usize,
        data: usize,
        in_flight: usize,
    ) -> Vec<Vec<Cost>> {
        let inside = |v: usize| self.ideals.has(upto, v) && !self.ideals.has(before, v);
        let d = data as f64;
        let sync = 4.0 * (d - 1.0) / (d * self.problem.n_microbatches as f64 * self.problem.bandwidth);
        let item = |&v: &usize| {
            let cost = |way: &Way| {
                let mut bytes = 0.0;
                for (&e, sync) in self.incoming[v].iter().zip(&way.sync_in) {
                    let (from, _, c) = self.problem.edges[e];
                    bytes += if inside(from) { 0.0 } else { c + sync };
                }
                for (&e, sync) in self.outgoing[v].iter().zip(&way.sync_out) {
                    let (_, to, c) = self.problem.edges[e];
                    bytes += if inside(to) { 0.0 } else { c + sync };
                }
                Cost {
                    time: (2.0 * bytes / self.problem.bandwidth + way.time) / d + sync * way.params,
                    memory: way.memory_each * in_flight as f64 + way.memory_fixed,
                }
            };
            self.ways(v, tensor).iter().map(cost).collect()
        };
        nodes.iter().map(item).collect()
    }

    fn nodes(&self, before: usize, upto: usize) -> Vec<usize> {
        (0..self.problem.nodes.len()).filter(|&v| self.ideals.has(upto, v) && !self.ideals.has(before, v)).collect()
    }

    /// Whether a stage can have so many microbatches in flight within a limit of time.
    fn fits(&mut self, stage: &Placed, in_flight: usize, limit: f64) -> bool {
        let degree = &self.degrees[stage.degree];
        let d = stage.data as f64;
        let sum = |sums: &[f64]| sums[stage.upto] - sums[stage.before];
        let bytes = |each: &[f64], fixed: &[f64]| sum(each) * in_flight as f64 + sum(fixed);
        let capacity = self.problem.memory;
        if bytes(&degree.least[0], &degree.least[1]) > capacity * (1.0 + 1e-9) {
            return false;
        }
        // With a uniform degree the knapsack is about seconds of computing.
        let (key, allowed) = if degree.uniform {
            if bytes(&degree.memory_each, &degree.memory_fixed) <= capacity * (1.0 - 1e-12) {
                return true;
            }
            let allowed = (limit - self.fastest(stage)) * d + sum(&degree.time);
            let [time, each, fixed] = &degree.light;
            if bytes(each, fixed) <= capacity * (1.0 - 1e-12) && sum(time) <= allowed {
                return true;
            }
            (0, allowed)
        } else {
            (stage.data, limit)
        };
        let same =
            |k: &&mut Known| (k.degree, k.data, k.in_flight) == (stage.degree as u32, key as u32, in_flight as u32);
        let known = match self.known[stage.pair].iter_mut().find(same) {
            Some(known) => *known,
            None => {
                let range = choice::bounds(&self.knapsack(stage, key, in_flight), self.problem.memory);
                let (degree, data) = (stage.degree as u32, key as u32);
                let known = Known { degree, data, in_flight: in_flight as u32, low: range.low, high: range.high };
                self.known[stage.pair].push(known);
                known
            }
        };
        // Where sums differ in the last digits only, the plan itself will tell.
        let allowed = allowed + 1e-14 * allowed.abs();
        if known.low == f64::INFINITY || known.low > allowed {
            return false;
        }
        if known.high <= allowed {
            return true;
        }
        let items = self.knapsack(stage, key, in_flight);
        let Some((chosen, exact)) = choice::best(&items, self.problem.memory, SUMS) else { return false };
        let time: f64 = items.iter().zip(&chosen).map(|(item, &c)| item[c].time).sum();
        self.exact &= exact;
        if let Some(known) = self.known[stage.pair].iter_mut().find(same) {
            (known.low, known.high) = (time, time);
        }
        time <= allowed
    }

    /// The knapsack of a stage; without a data-parallel degree, seconds of computing alone.
    fn knapsack(&self, stage: &Placed, data: usize, in_flight: usize) -> Vec<Vec<Cost>> {
        let nodes = self.nodes(stage.before, stage.upto);
        let tensor = self.degrees[stage.degree].tensor;
        if data > 0 {
            return self.items(&nodes, stage.before, stage.upto, tensor, data, in_flight);
        }
        let cost = |w: &Way| Cost { time: w.time, memory: w.memory_each * in_flight as f64 + w.memory_fixed };
        nodes.iter().map(|&v| self.ways(v, tensor).iter().map(cost).collect()).collect()
    }

    /// Seconds of a stage with the fastest ways, whatever memory they take.
    fn fastest(&self, stage: &Placed) -> f64 {
        let degree = &self.degrees[stage.degree];
        let d = stage.data as f64;
        if degree.uniform {
            let sum = |sums: &[f64]| sums[stage.upto] - sums[stage.before];
            let sync = 4.0 * (d - 1.0) / (d * self.problem.n_microbatches as f64 * self.problem.bandwidth);
            return (degree.transfer[stage.pair] + sum(&degree.time)) / d + sync * sum(&degree.params);
        }
        let items = self.knapsack(stage, stage.data, 0);
        items.iter().map(|item| item.iter().map(|c| c.time).fold(f64::INFINITY, f64::min)).sum()
    }

    /// Stages without any above a limit of time; `None` where there are none.
    ///
    /// Goes from the last stage to the first: what a stage needs depends on the stages after it. For each prefix and
    /// number of devices, what comes later has as few replicas as possible.
    pub fn within(&mut self, limit: f64) -> Option<Vec<Placed>> {
        let (n_ideals, n_devices) = (self.ideals.len(), self.problem.n_devices);
        let total = self.work[n_ideals - 1];
        let slack = 1.0 + 1e-9;
        // Device-seconds that may be wasted in all.
        let waste = n_devices as f64 * limit * slack - total;
        if waste < 0.0 {
            return None;
        }
        let (needed, least) = self.least_devices(limit, waste);
        if least[n_ideals - 1] > n_devices {
            return None;
        }
        let mut tails: Vec<Vec<Tail>> = vec![Vec::new(); n_ideals];
        tails[n_ideals - 1].push(Tail { devices: 0, replicas: 0, first: None, rest: 0 });
        for before in (0..n_ideals - 1).rev() {
            // Whatever comes before needs devices too.
            let Some(most) = n_devices.checked_sub(least[before]) else { continue };
            let mut found: Vec<Option<Tail>> = vec![None; most + 1];
            for at in 0..self.pairs[before].len() {
                let (upto, pair) = self.pairs[before][at];
                let stage =
                    Placed { before, upto: upto as usize, pair: pair as usize, degree: 0, data: 1, replicas: 0 };
                let after = &tails[stage.upto];
                if after.first().is_some_and(|t| t.devices.saturating_add(needed[stage.pair]) <= most) {
                    self.extend(after, stage, limit, waste, &mut found);
                }
            }
            let mut fewest = usize::MAX;
            for tail in found.into_iter().flatten() {
                if tail.replicas < fewest {
                    fewest = tail.replicas;
                    tails[before].push(tail);
                }
            }
        }
        let mut stages = Vec::new();
        let mut tail = *tails[0].first()?;
        while let Some(first) = tail.first {
            stages.push(first);
            tail = *tails[first.upto].iter().find(|t| t.devices == tail.rest)?;
        }
        Some(stages)
    }

    /// Devices that each pair takes at least, and each prefix, if there were memory without end.
    fn least_devices(&self, limit: f64, waste: f64) -> (Vec<usize>, Vec<usize>) {
        let n_devices = self.problem.n_devices;
        let mut needed = vec![usize::MAX; self.known.len()];
        let mut least = vec![usize::MAX; self.ideals.len()];
        least[0] = 0;
        for before in 0..self.ideals.len() {
            if least[before] >= n_devices {
                continue;
            }
            for &(upto, pair) in &self.pairs[before] {
                let (upto, pair) = (upto as usize, pair as usize);
                let work = self.work[upto] - self.work[before];
                let stage = Placed { before, upto, pair, degree: 0, data: 1, replicas: 0 };
                for degree in 0..self.degrees.len() {
                    let Degree { tensor, missing, .. } = &self.degrees[degree];
                    let seconds = self.computing(&Placed { degree, ..stage });
                    if missing[before] != missing[upto] {
                        continue;
                    }
                    let first = self.data.partition_point(|&d| (d as f64) * limit * (1.0 + 1e-9) < seconds);
                    for &data in &self.data[first..] {
                        let devices = data * tensor;
                        if devices >= needed[pair]
                            || devices + least[before] > n_devices
                            || devices as f64 * limit - work > waste
                        {
                            break;
                        }
                        if self.fastest(&Placed { degree, data, ..stage }) <= limit * (1.0 + 1e-14) {
                            needed[pair] = devices;
                        }
                    }
                }
                least[upto] = least[upto].min(needed[pair].saturating_add(least[before]));
            }
        }
        (needed, least)
    }

    /// Which prefixes can be part of a pipeline within a limit of time, or of a faster one, as far as devices tell.
    pub fn useful(&self, limit: f64) -> Vec<bool> {
        let (n_ideals, n_devices) = (self.ideals.len(), self.problem.n_devices);
        let waste = n_devices as f64 * limit * (1.0 + 1e-9) - self.work[n_ideals - 1];
        let (needed, least) = self.least_devices(limit, waste);
        let mut after = vec![usize::MAX; n_ideals];
        after[n_ideals - 1] = 0;
        for before in (0..n_ideals - 1).rev() {
            let through = self.pairs[before]
                .iter()
                .map(|&(upto, pair)| needed[pair as usize].saturating_add(after[upto as usize]));
            after[before] = through.min().unwrap_or(usize::MAX);
        }
        let ends = |i: usize| i == 0 || i == n_ideals - 1;
        (0..n_ideals).map(|i| ends(i) || least[i].saturating_add(after[i]) <= n_devices).collect()
    }

    /// Puts every stage that is possible between two prefixes before every tail. `waste`: device-seconds that may be
    /// wasted.
    fn extend(&mut self, tails: &[Tail], stage: Placed, limit: f64, waste: f64, found: &mut [Option<Tail>]) {
        let most_replicas = self.problem.n_devices.min(self.problem.n_microbatches);
        let work = self.work[stage.upto] - self.work[stage.before];
        // Degrees so far with as few devices and replicas as any: (devices, data, first tail they can precede).
        let mut before: Vec<(usize, usize, usize)> = Vec::new();
        for degree in 0..self.degrees.len() {
            let Degree { tensor, missing, .. } = &self.degrees[degree];
            let tensor = *tensor;
            if missing[stage.before] != missing[stage.upto] {
                continue;
            }
            let least = self.computing(&Placed { degree, ..stage }) / (limit * (1.0 + 1e-9));
            let first = self.data.partition_point(|&d| (d as f64) < least);
            for i in first..self.data.len() {
                let data = self.data[i];
                let devices = data * tensor;
                if devices as f64 * limit - work > waste {
                    break;
                }
                // What can be had with fewer devices and replicas is had already.
                let mut fit = tails.partition_point(|t| t.devices + devices < found.len());
                for &(n, d, tail) in &before {
                    if n <= devices && d <= data {
                        fit = fit.min(tail);
                    }
                }
                // Later tails have fewer replicas, and fewer microbatches in flight.
                let mut low = tails[..fit].partition_point(|t| t.replicas + data > most_replicas);
                let stage = Placed { degree, data, ..stage };
                if low >= fit || self.fastest(&stage) > limit * (1.0 + 1e-14) {
                    continue;
                }
                let in_flight = |t: &Tail| (t.replicas + data).div_ceil(data);
                let mut high = fit;
                if self.fits(&stage, in_flight(&tails[low]), limit) {
                    high = low;
                } else {
                    low += 1;
                }
                while low < high {
                    let middle = (low + high) / 2;
                    if self.fits(&stage, in_flight(&tails[middle]), limit) {
                        high = middle;
                    } else {
                        low = middle + 1;
                    }
                }
                for tail in &tails[low..fit] {
                    let replicas = tail.replicas + data;
                    let place = &mut found[tail.devices + devices];
                    if place.is_none_or(|p| replicas < p.replicas) {
                        let first = Some(Placed { replicas, ..stage });
                        *place = Some(Tail { devices: tail.devices + devices, replicas, first, rest: tail.devices });
                    }
                }
                before.push((devices, data, low));
            }
        }
    }

    /// Seconds of computing, and of transfers where all ways have the same.
    fn computing(&self, stage: &Placed) -> f64 {
        let degree = &self.degrees[stage.degree];
        let transfer = if degree.uniform { degree.transfer[stage.pair] } else { 0.0 };
        transfer + degree.time[stage.upto] - degree.time[stage.before]
    }

    /// Chooses the ways of all nodes.
    pub fn finish(&self, stages: &[Placed]) -> Pipeline {
        let mut seconds: f64 = 0.0;
        let stages = stages.iter().map(|placed| {
            let nodes = self.nodes(placed.before, placed.upto);
            let tensor = self.degrees[placed.degree].tensor;
            let in_flight = placed.replicas.div_ceil(placed.data);
            let items = self.items(&nodes, placed.before, placed.upto, tensor, placed.data, in_flight);
            let chosen = choice::best(&items, self.problem.memory, SUMS);
            let ways = chosen.map_or_else(|| vec![0; nodes.len()], |c| c.0);
            seconds = seconds.max(items.iter().zip(&ways).map(|(item, &c)| item[c].time).sum());
            Stage { nodes, data: placed.data, tensor, ways }
        });
        let stages = stages.collect();
        Pipeline { stages, seconds, optimal: false }
    }
}
