//! Stages with data-parallel replicas, on machines with fast links inside and slow links between them.

use super::dag::{Chains, Dag};
use super::ideals::Ideals;
use super::positions::{Move, Positions};

/// Ideals of each size in a first, quick search.
const FEW: usize = 8;
/// Places grow with the square of the devices, and each prefix keeps a number for each place.
const MOST_DEVICES: usize = 64;
/// A pipeline is better if it is this much faster.
const STEP: f64 = 1e-12;

/// Equal machines with equal devices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    pub n_machines: usize,
    pub per_machine: usize,
    /// Bytes per second between devices of one machine.
    pub within: f64,
    /// Bytes per second of each device between machines; not used where there is one machine.
    pub between: f64,
}

/// What each node costs.
#[derive(Clone, Copy, Debug)]
pub struct Costs<'a> {
    /// Seconds per minibatch on one device, forward and backward.
    pub compute: &'a [f64],
    /// Bytes of parameters.
    pub params: &'a [f64],
    /// Bytes of the output of one minibatch.
    pub output: &'a [f64],
}

/// Nodes that run on the same devices, one replica each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    pub nodes: Vec<usize>,
    /// Device d is on machine `d / per_machine`.
    pub devices: Vec<usize>,
}

/// Stages in order, with the seconds per minibatch of the slowest stage or transfer.
#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    pub stages: Vec<Stage>,
    pub seconds: f64,
    /// Nothing of the kind described at [`solve`] is faster.
    pub optimal: bool,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BadProblem {
    #[error("there are no nodes")]
    NoNodes,
    #[error("{n_machines} machines with {per_machine} devices are no devices; give at least one")]
    NoDevices { n_machines: usize, per_machine: usize },
    #[error("{n_devices} devices are more than {MOST_DEVICES}, for which places are listed one by one")]
    TooManyDevices { n_devices: usize },
    #[error("bandwidth {bandwidth} B/s is not positive")]
    Bandwidth { bandwidth: f64 },
    #[error("{field} of node {node} is {value}; give a finite number, at least 0")]
    Cost { field: &'static str, node: usize, value: f64 },
    #[error("{field} has {found} values for {expected} nodes")]
    Length { field: &'static str, found: usize, expected: usize },
}

/// Finds the stages with the least bottleneck; exactly, where there are no more than `budget` prefixes of the graph.
///
/// A stage on m devices takes (compute + all-reduce) / m, where all-reduce is 4 (m - 1) params / (m · bandwidth): at
/// the slow bandwidth in a ring over machines, or, where each machine has the same number of devices, first within
/// machines and then between them. A border with A bytes takes 2 A / (bandwidth · min(m, m')): the slow bandwidth, unless
/// both stages lie on the same machines, evenly, so that every microbatch can stay in its machine.
///
/// # Shapes
/// Stages lie on consecutive devices; or several machines in a row share the work of a chain of stages that looks the
/// same on each of them. Devices may stay idle.
/// Beyond the budget, chains are joined and the prefixes with the lightest borders are searched, then prefixes near the
/// borders found.
/// # Errors
/// [`BadProblem`] for no nodes, no devices, costs and bandwidths that are no numbers.
/// # Complexity
/// For each of up to 60 trial bottlenecks O(ideals · nodes that may come last · devices²).
/// # Source
/// Objective of PipeDream (Narayanan et al., SOSP 2019), which solves machines first and the network of machines on top;
/// here both are placed at once.
pub fn solve(dag: &Dag, costs: &Costs<'_>, network: &Network, budget: usize) -> Result<Pipeline, BadProblem> {
    check(dag, costs, network)?;
    // Few ideals first: they give a bottleneck that all of them need not better by much.
    let few = Ideals::lightest(dag, costs.output, FEW);
    let mut pipeline = improve(dag, costs, network, &few, None);
    if few.complete {
        return Ok(pipeline);
    }
    if let Some(all) = Ideals::all(dag, budget) {
        return Ok(improve(dag, costs, network, &all, Some(pipeline)));
    }
    let width = |dag: &Dag| budget / 2 / dag.n_nodes();
    let chains = Chains::of(dag);
    let coarse = &chains.dag;
    let sum = |values: &[f64]| chains.sum(values);
    let output: Vec<f64> = chains.nodes.iter().map(|c| c.last().map_or(0.0, |&v| costs.output[v])).collect();
    let (compute, params) = (sum(costs.compute), sum(costs.params));
    let coarse_costs = Costs { compute: &compute, params: &params, output: &output };
    let light = Ideals::lightest(coarse, &output, width(coarse));
    let mut found = improve(coarse, &coarse_costs, network, &light, None);
    if found.seconds < pipeline.seconds {
        for stage in &mut found.stages {
            stage.nodes = stage.nodes.iter().flat_map(|&c| chains.nodes[c].iter().copied()).collect();
            stage.nodes.sort_unstable();
        }
        pipeline = found;
    }
    let stages: Vec<&[usize]> = pipeline.stages.iter().map(|s| &*s.nodes).collect();
    let near = Ideals::near(dag, costs.output, &stages, width(dag));
    Ok(improve(dag, costs, network, &near, Some(pipeline)))
}

/// The fastest pipeline between these ideals, or the one given.
fn improve(dag: &Dag, costs: &Costs<'_>, network: &Network, ideals: &Ideals, given: Option<Pipeline>) -> Pipeline {
    let search = Search::new(dag, costs, network, ideals);
    // One device can always do it.
    let total = costs.compute.iter().sum::<f64>();
    let mut best = given.unwrap_or_else(|| {
        let all = Stage { nodes: (0..dag.n_nodes()).collect(), devices: vec![0] };
        Pipeline { stages: vec![all], seconds: total, optimal: false }
    });
    let mut low = total / (network.n_machines * network.per_machine) as f64;
    // Bisection; but whatever is new, or given, may be the best already.
    let mut by_step = true;
    while low < best.seconds * (1.0 - 1e-9) {
        let step = best.seconds * (1.0 - STEP);
        let trial = if by_step { step } else { (low * best.seconds).sqrt().clamp(low, step) };
        match search.within(trial) {
            Some(steps) => {
                best.seconds = search.bottleneck(&steps).min(trial);
                best.stages = search.stages(&steps);
                by_step = !by_step;
            }
            None if by_step => break,
            None => low = trial,
        }
    }
    best.optimal = ideals.complete;
    best
}

fn check(dag: &Dag, costs: &Costs<'_>, network: &Network) -> Result<(), BadProblem> {
    let &Network { n_machines, per_machine, within, between } = network;
    if n_machines == 0 || per_machine == 0 {
        return Err(BadProblem::NoDevices { n_machines, per_machine });
    }
    let n_devices = n_machines.saturating_mul(per_machine);
    if n_devices > MOST_DEVICES {
        return Err(BadProblem::TooManyDevices { n_devices });
    }
    for bandwidth in [within, if n_machines > 1 { between } else { within }] {
        if !(bandwidth > 0.0 && bandwidth.is_finite()) {
            return Err(BadProblem::Bandwidth { bandwidth });
        }
    }
    if dag.n_nodes() == 0 {
        return Err(BadProblem::NoNodes);
    }
    for (field, values) in [("compute", costs.compute), ("params", costs.params), ("output", costs.output)] {
        if values.len() != dag.n_nodes() {
            return Err(BadProblem::Length { field, found: values.len(), expected: dag.n_nodes() });
        }
        if let Some(node) = values.iter().position(|&x| !(0.0..1e300).contains(&x)) {
            return Err(BadProblem::Cost { field, node, value: values[node] });
        }
    }
    Ok(())
}

/// How a prefix got to a position.
#[derive(Clone, Copy, Debug)]
struct Reached {
    position: u32,
    /// Most replicas of the last stage, and the way there.
    any: Way,
    /// The same among last stages that the next can be near to.
    near: Option<Way>,
}

/// Small, as there may be millions.
#[derive(Clone, Copy, Debug)]
struct Way {
    replicas: u32,
    ideal: u32,
    /// The move, or [`IDLE`].
    by: u32,
    /// Position before, where devices stayed idle.
    idle_from: u32,
}

const IDLE: u32 = u32::MAX;

/// One stage of a solution: up to which ideal, and where.
struct Step {
    ideal: usize,
    devices: Vec<usize>,
}

/// For each ideal of one size and each move, the best prefix to make the move from.
struct Best {
    n_moves: usize,
    value: Vec<f64>,
    ideal: Vec<u32>,
    /// Moves with a value, all of them, for each ideal.
    active: Vec<(u32, u32)>,
}

impl Best {
    fn new(n_ideals: usize, n_moves: usize) -> Self {
        let n = n_ideals * n_moves;
        Self { n_moves, value: vec![f64::NEG_INFINITY; n], ideal: vec![0; n], active: vec![(u32::MAX, 0); n_ideals] }
    }

    fn active(&self, i: usize) -> std::ops::Range<usize> {
        let (begin, end) = self.active[i];
        (begin.min(end) as usize)..end as usize
    }

    fn merge(&mut self, i: usize, other: &Self, j: usize) {
        let active = other.active(j);
        let (to, from) = (i * self.n_moves, j * self.n_moves);
        let mine = to + active.start..to + active.end;
        let theirs = from + active.start..from + active.end;
        let mine = self.value[mine.clone()].iter_mut().zip(&mut self.ideal[mine]);
        let theirs = other.value[theirs.clone()].iter().zip(&other.ideal[theirs]);
        for ((value, ideal), (&v, &k)) in mine.zip(theirs) {
            let better = v > *value;
            *value = if better { v } else { *value };
            *ideal = if better { k } else { *ideal };
        }
        let (begin, end) = &mut self.active[i];
        (*begin, *end) = ((*begin).min(active.start as u32), (*end).max(active.end as u32));
    }

    fn offer(&mut self, i: usize, m: usize, value: f64, ideal: u32) {
        let at = i * self.n_moves + m;
        if value > self.value[at] {
            (self.value[at], self.ideal[at]) = (value, ideal);
            let (begin, end) = &mut self.active[i];
            (*begin, *end) = ((*begin).min(m as u32), (*end).max(m as u32 + 1));
        }
    }

    /// Forgets the first and last active moves that are of no use any more.
    fn trim(&mut self, i: usize, useless: impl Fn(usize) -> bool) {
        let mut active = self.active(i);
        let dead = |m: usize| useless(m) || self.value[i * self.n_moves + m] == f64::NEG_INFINITY;
        while active.start < active.end && dead(active.start) {
            active.start += 1;
        }
        while active.start < active.end && dead(active.end - 1) {
            active.end -= 1;
        }
        self.active[i] = (active.start as u32, active.end as u32);
    }
}

struct Search<'a> {
    n_nodes: usize,
    network: &'a Network,
    ideals: &'a Ideals,
    compute: Vec<f64>,
    params: Vec<f64>,
    border: Vec<f64>,
    positions: Positions,
}

impl<'a> Search<'a> {
    fn new(dag: &Dag, costs: &Costs<'_>, network: &'a Network, ideals: &'a Ideals) -> Self {
        Self {
            n_nodes: dag.n_nodes(),
            network,
            ideals,
            compute: ideals.sums(costs.compute),
            params: ideals.sums(costs.params),
            border: ideals.borders(dag, costs.output),
            positions: Positions::new(network),
        }
    }

    /// Seconds a border takes between stages.
    fn transfer(&self, ideal: usize, near: bool, replicas: u32) -> f64 {
        let slow = if self.network.n_machines > 1 { self.network.between } else { self.network.within };
        let bandwidth = if near { self.network.within } else { slow };
        2.0 * self.border[ideal] / (bandwidth * f64::from(replicas))
    }

    /// The way a stage can follow, within a bottleneck: near if it must not be far.
    fn follows(&self, reached: &Reached, ideal: usize, to: &Move, limit: f64) -> Option<Way> {
        if self.transfer(ideal, false, reached.any.replicas.min(to.replicas)) <= limit {
            return Some(reached.any);
        }
        let near = reached.near.filter(|_| to.near_before)?;
        (self.transfer(ideal, true, near.replicas.min(to.replicas)) <= limit).then_some(near)
    }

    /// A pipeline without any stage or transfer above a limit.
    ///
    /// A stage's time is linear in what its prefix has and what the prefix before has, so of all prefixes inside a
    /// prefix that can make a move, one is best. These are handed on from each ideal to the next larger ones.
    fn within(&self, limit: f64) -> Option<Vec<Step>> {
        let positions = &self.positions;
        let moves = &positions.moves;
        let last = self.ideals.len() - 1;
        let n_devices = (self.network.n_machines * self.network.per_machine) as f64;
        let total = self.compute[last];
        let start = Way { replicas: u32::MAX, ideal: 0, by: IDLE, idle_from: 0 };
        let mut reached: Vec<Vec<Reached>> = vec![Vec::new(); self.ideals.len()];
        let mut before = Best::new(0, moves.len());
        for size in 0..=self.n_nodes {
            let row = self.ideals.of_size(size);
            let first = row.start;
            let smaller = if size == 0 { 0 } else { self.ideals.of_size(size - 1).start };
            let mut best = Best::new(row.len(), moves.len());
            for target in row {
                let mut ways: Vec<Reached> = Vec::new();
                if target == 0 {
                    ways.push(Reached { position: 0, any: start, near: None });
                }
                for &from in self.ideals.smaller(target) {
                    best.merge(target - first, &before, from as usize - smaller);
                }
                let (compute, params) = (self.compute[target], self.params[target]);
                // With fewer devices it would have taken longer, and as many must be left for the rest.
                let slack = limit * (1.0 + 1e-9);
                let (least, most) = (compute / slack, n_devices - (total - compute) / slack);
                best.trim(target - first, |m| (positions.used[moves[m].to] as f64) < least);
                let offset = (target - first) * moves.len();
                for m in best.active(target - first) {
                    let value = best.value[offset + m];
                    let to = &moves[m];
                    let used = positions.used[to.to] as f64;
                    let seconds = to.per_compute * compute + to.per_param * params - value;
                    if seconds <= limit && used >= least && used <= most {
                        arrive(&mut ways, to, m, best.ideal[offset + m]);
                    }
                }
                self.idle(target, &mut ways);
                for way in &ways {
                    for m in positions.from[way.position as usize].clone() {
                        if self.follows(way, target, &moves[m], limit).is_some() {
                            let value = moves[m].per_compute * compute + moves[m].per_param * params;
                            best.offer(target - first, m, value, target as u32);
                        }
                    }
                }
                ways.shrink_to_fit();
                reached[target] = ways;
            }
            before = best;
        }
        let end = reached[last].first()?;
        Some(self.trace(&reached, last, end.any, limit))
    }

    fn stages(&self, steps: &[Step]) -> Vec<Stage> {
        let mut before = 0;
        let mut stages = Vec::new();
        for step in steps {
            let new = |&v: &usize| self.ideals.has(step.ideal, v) && !self.ideals.has(before, v);
            stages.push(Stage { nodes: (0..self.n_nodes).filter(new).collect(), devices: step.devices.clone() });
            before = step.ideal;
        }
        stages
    }

    /// Adds what is reached if the rest of a machine stays idle.
    fn idle(&self, target: usize, ways: &mut Vec<Reached>) {
        ways.sort_by_key(|w| w.position);
        for i in 0..ways.len() {
            let way = ways[i];
            if let Some(to) = self.positions.skip[way.position as usize] {
                let any = Way { ideal: target as u32, by: IDLE, idle_from: way.position, ..way.any };
                let to = to as u32;
                match ways.iter_mut().find(|w| w.position == to) {
                    Some(there) if there.any.replicas < any.replicas => there.any = any,
                    Some(_) => {}
                    None => ways.push(Reached { position: to, any, near: None }),
                }
            }
        }
    }

    fn trace(&self, reached: &[Vec<Reached>], last: usize, end: Way, limit: f64) -> Vec<Step> {
        let mut steps = Vec::new();
        let (mut ideal, mut way) = (last, end);
        while ideal > 0 {
            if way.by == IDLE {
                // The same prefix at the position before.
                let Some(there) = reached[ideal].iter().find(|r| r.position == way.idle_from) else { break };
                way = there.any;
                continue;
            }
            let step = &self.positions.moves[way.by as usize];
            steps.push(Step { ideal, devices: step.devices.clone() });
            ideal = way.ideal as usize;
            let there = reached[ideal].iter().find(|r| r.position as usize == step.from);
            let Some(before) = there.and_then(|r| self.follows(r, ideal, step, limit)) else { break };
            way = before;
        }
        steps.reverse();
        steps
    }

    /// Slowest stage or transfer of a solution.
    fn bottleneck(&self, steps: &[Step]) -> f64 {
        let place = |step: &Step| self.positions.moves.iter().find(|m| m.devices == step.devices);
        let mut worst: f64 = 0.0;
        let mut before = 0;
        for (i, step) in steps.iter().enumerate() {
            let Some(to) = place(step) else { return f64::INFINITY };
            let compute = self.compute[step.ideal] - self.compute[before];
            let params = self.params[step.ideal] - self.params[before];
            worst = worst.max(to.per_compute * compute + to.per_param * params);
            if i > 0 {
                let replicas = to.replicas.min(steps[i - 1].devices.len() as u32);
                let near = self.same_machines(&steps[i - 1].devices, &step.devices);
                worst = worst.max(self.transfer(before, near, replicas));
            }
            before = step.ideal;
        }
        worst
    }

    /// Whether two stages lie on the same machines, each with as many devices on every one of them.
    fn same_machines(&self, a: &[usize], b: &[usize]) -> bool {
        let spread = |devices: &[usize]| {
            let mut counts = vec![0; self.network.n_machines];
            for d in devices {
                counts[d / self.network.per_machine] += 1;
            }
            counts
        };
        let (a, b) = (spread(a), spread(b));
        let even = |counts: &[usize]| {
            let used: Vec<usize> = counts.iter().copied().filter(|&c| c > 0).collect();
            used.iter().all(|&c| c == used[0])
        };
        a.iter().zip(&b).all(|(x, y)| (*x > 0) == (*y > 0)) && even(&a) && even(&b)
    }
}

/// Keeps the way with most replicas.
fn arrive(ways: &mut Vec<Reached>, by: &Move, index: usize, ideal: u32) {
    let way = Way { replicas: by.replicas, ideal, by: index as u32, idle_from: 0 };
    let at = match ways.iter().position(|w| w.position as usize == by.to) {
        Some(at) => at,
        None => {
            ways.push(Reached { position: by.to as u32, any: way, near: None });
            ways.len() - 1
        }
    };
    let there = &mut ways[at];
    if there.any.replicas < way.replicas {
        there.any = way;
    }
    if by.near_after && there.near.is_none_or(|n| n.replicas < way.replicas) {
        there.near = Some(way);
    }
}
