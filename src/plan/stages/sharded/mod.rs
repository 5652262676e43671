//! Stages with data- and tensor-parallel degrees, and a way to compute for every node.

mod search;

use super::coarse::narrow;
use super::dag::{Dag, InvalidDag};
use super::ideals::Ideals;
use search::Search;

/// One way to compute a node on a number of devices.
#[derive(Clone, Debug, PartialEq)]
pub struct Way {
    /// Seconds per sample, forward and backward.
    pub time: f64,
    /// Bytes of parameters on each device.
    pub params: f64,
    /// Bytes in memory for each microbatch in flight, and besides.
    pub memory_each: f64,
    pub memory_fixed: f64,
    /// Extra bytes for each edge that comes in over a border, in the order of [`Problem::edges`]; then going out.
    pub sync_in: Vec<f64>,
    pub sync_out: Vec<f64>,
}

/// What to place, and on what.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// For each node: tensor-parallel degrees, ascending, with the ways to compute it so.
    pub nodes: Vec<Vec<(usize, Vec<Way>)>>,
    /// From, to, bytes per sample.
    pub edges: Vec<(usize, usize, f64)>,
    pub n_devices: usize,
    /// Bytes of each device.
    pub memory: f64,
    /// Bytes per second.
    pub bandwidth: f64,
    pub n_microbatches: usize,
}

/// Nodes on data · tensor devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    pub nodes: Vec<usize>,
    pub data: usize,
    pub tensor: usize,
    /// Way of each node, as in `nodes`.
    pub ways: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    pub stages: Vec<Stage>,
    /// Seconds per sample of the slowest stage.
    pub seconds: f64,
    /// No pipeline is faster.
    pub optimal: bool,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Graph(#[from] InvalidDag),
    #[error("{field} is {value}; it must be a finite number above 0")]
    Field { field: &'static str, value: f64 },
    #[error("{field} of node {node} is {value}; give a finite number, at least 0")]
    Cost { field: &'static str, node: usize, value: f64 },
    #[error("edge {from} -> {to}: {bytes} bytes; give a finite number, at least 0")]
    Edge { from: usize, to: usize, bytes: f64 },
    #[error("node {node} has no way to be computed; give one for tensor degree 1")]
    NoWay { node: usize },
    #[error("node {node}: sync has {found} values for {expected} edges")]
    Sync { node: usize, found: usize, expected: usize },
    #[error("{n_devices} devices are more than {MOST_DEVICES}; plan for a part of them and repeat it")]
    TooManyDevices { n_devices: usize },
    /// `all`: there is none; else none was found among some of the prefixes.
    #[error(
        "no pipeline on {n_devices} devices fits into {memory} B each; add devices, memory, or ways that take less"
    )]
    Memory { n_devices: usize, memory: f64, all: bool },
}

/// What comes later is listed for each number of devices.
const MOST_DEVICES: usize = 1 << 16;
/// So few prefixes are searched at once.
const FEW: usize = 300;
/// Pairs of prefixes, times nodes, that a search with a budget looks at in one trial.
const WORK: f64 = 4e7;
/// How often a search begins again around what it has found.
const MOST_ROUNDS: usize = 16;
/// How many of these may gain next to nothing in a row.
const MOST_IN_VAIN: usize = 3;
/// A pipeline is better if it is this much faster.
const STEP: f64 = 1e-12;

/// Finds the pipeline with the least time per sample of its slowest stage.
///
/// A stage with degrees (d, t) takes [2 (bytes + sync) of all edges over its borders / bandwidth + time] / d + 4 (d - 1)
/// params / (d · microbatches · bandwidth), and y · memory_each + memory_fixed must fit, where y is the data-parallel
/// degrees of this and later stages over d, rounded up. d divides the number of microbatches; no more devices are used
/// than there are, nor more replicas than microbatches.
///
/// Exact where there are no more than `budget` prefixes of the graph: a pipeline between a few of them tells which of
/// the others can be part of a better one. Else prefixes with few bytes over the border stand for all, and the search
/// goes on around the borders of the best pipeline so far.
///
/// # Errors
/// [`Refusal`]; `Memory` where nothing fits.
/// # Complexity
/// For each of about 20 trial times O(pairs of prefixes · degrees · ways to spend devices on what comes later).
/// # Source
/// The dynamic program of Piper (Tarnawski, Narayanan and Phanishayee, NeurIPS 2021) turned into a search for the least
/// time for which it has a solution, with an exact knapsack.
pub fn solve(problem: &Problem, budget: usize) -> Result<Pipeline, Refusal> {
    let dag = check(problem)?;
    let all = Ideals::all(&dag, budget);
    if let Some(all) = all.as_ref().filter(|all| all.len() <= FEW) {
        return improve(problem, all, None);
    }
    let mut out = vec![0.0; dag.n_nodes()];
    for &(from, _, bytes) in &problem.edges {
        out[from] += bytes;
    }
    let work = least_work(problem);
    let n = dag.n_nodes();
    let light = |most: usize| Ideals::lightest(&dag, &out, (4 * most / n).max(1)).spread(&dag, &out, &work, most);
    // A stage of a large graph takes longer to look at.
    let most = budget.min((WORK / n as f64).sqrt() as usize);
    let few = (most / 2).clamp(4, FEW);
    let both = match narrow(&dag, &size(problem), few / 2) {
        Some(coarse) => coarse.union(&light(few / 2), &dag),
        None => light(few),
    };
    let begin = match improve(problem, &both, None) {
        Ok(found) => Some(found),
        Err(Refusal::Memory { .. }) => None,
        Err(e) => return Err(e),
    };
    let mut wide = all.unwrap_or_else(|| light(most));
    if let Some(found) = &begin {
        let useful = Search::new(problem, &wide).useful(found.seconds * (1.0 - STEP));
        wide = wide.only(&useful, &dag);
    }
    let mut found = improve(problem, &wide, begin)?;
    if wide.complete {
        return Ok(found);
    }
    let spine = light(few / 4);
    let n_rounds = (16.0 * WORK / (most * most * n) as f64).clamp(2.0, MOST_ROUNDS as f64) as usize;
    let mut in_vain = 0;
    for round in 0..n_rounds {
        let stages: Vec<&[usize]> = found.stages.iter().map(|s| &*s.nodes).collect();
        let before = found.seconds;
        // By turns the lightest and any.
        let mix = (round % 2 == 1).then_some(round as u64);
        found = improve(problem, &Ideals::around(&dag, &out, &stages, &spine, most / 2, mix), Some(found))?;
        in_vain = if found.seconds < before * (1.0 - 1e-4) { 0 } else { in_vain + 1 };
        if in_vain == MOST_IN_VAIN {
            break;
        }
    }
    Ok(found)
}

/// How much of all work, parameters and memory each node has.
fn size(problem: &Problem) -> Vec<f64> {
    let way = |v: usize| problem.nodes[v].iter().flat_map(|d| &d.1).next();
    let mut size = vec![0.0; problem.nodes.len()];
    let values: [&dyn Fn(&Way) -> f64; 3] = [&|w| w.time, &|w| w.params, &|w| w.memory_each + w.memory_fixed];
    for value in values {
        let each: Vec<f64> = (0..size.len()).map(|v| way(v).map_or(0.0, value)).collect();
        let total = each.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        size.iter_mut().zip(&each).for_each(|(s, x)| *s += x / total);
    }
    size
}

/// Least device-seconds of each node.
fn least_work(problem: &Problem) -> Vec<f64> {
    let least = |degrees: &Vec<(usize, Vec<Way>)>| {
        let each = degrees.iter().flat_map(|(t, ways)| ways.iter().map(move |w| *t as f64 * w.time));
        each.fold(f64::INFINITY, f64::min)
    };
    problem.nodes.iter().map(least).collect()
}

/// The fastest pipeline between these ideals, or the one given.
fn improve(problem: &Problem, ideals: &Ideals, given: Option<Pipeline>) -> Result<Pipeline, Refusal> {
    let mut search = Search::new(problem, ideals);
    let mut low = search.work[search.work.len() - 1] / problem.n_devices as f64;
    // Whatever is given may be the best already.
    let mut by_step = given.is_some();
    let mut best = match given {
        Some(given) => given,
        None => first(problem, &mut search, &mut low)?,
    };
    // Bisection; but whoever fails may have failed just below the best.
    while low < best.seconds * (1.0 - 1e-9) {
        let step = best.seconds * (1.0 - STEP);
        // The lower end may be 0.
        let middle = (low.max(best.seconds / 256.0) * best.seconds).sqrt();
        let trial = if by_step { step } else { middle.clamp(low, step) };
        match search.within(trial) {
            Some(stages) => {
                let found = search.finish(&stages);
                // Trial and plan add up in different orders: in the last digits they may differ.
                if found.seconds >= best.seconds {
                    break;
                }
                best = found;
                by_step = false;
            }
            None if by_step => break,
            None => {
                low = trial;
                by_step = true;
            }
        }
    }
    best.optimal = ideals.complete && search.exact;
    Ok(best)
}

/// A pipeline within a limit that rises, ever faster, from the lower bound; raises the bound to where there is none.
fn first(problem: &Problem, search: &mut Search<'_>, low: &mut f64) -> Result<Pipeline, Refusal> {
    let mut above = 1.0 / 64.0;
    loop {
        let limit = if *low > 0.0 && above < 4096.0 { *low * (1.0 + above) } else { f64::INFINITY };
        if let Some(stages) = search.within(limit) {
            return Ok(search.finish(&stages));
        }
        if limit == f64::INFINITY {
            let &Problem { n_devices, memory, .. } = problem;
            return Err(Refusal::Memory { n_devices, memory, all: search.complete() });
        }
        *low = limit;
        above *= 4.0;
    }
}

fn check(problem: &Problem) -> Result<Dag, Refusal> {
    let n_devices = problem.n_devices;
    if n_devices > MOST_DEVICES {
        return Err(Refusal::TooManyDevices { n_devices });
    }
    let positive = [
        ("n_devices", problem.n_devices as f64),
        ("memory", problem.memory),
        ("bandwidth", problem.bandwidth),
        ("n_microbatches", problem.n_microbatches as f64),
        ("n_nodes", problem.nodes.len() as f64),
    ];
    for (field, value) in positive {
        if !(value > 0.0 && value.is_finite()) {
            return Err(Refusal::Field { field, value });
        }
    }
    for &(from, to, bytes) in &problem.edges {
        if !usable(bytes) {
            return Err(Refusal::Edge { from, to, bytes });
        }
    }
    let pairs: Vec<(usize, usize)> = problem.edges.iter().map(|e| (e.0, e.1)).collect();
    let dag = Dag::new(problem.nodes.len(), &pairs)?;
    let (mut n_in, mut n_out) = (vec![0; problem.nodes.len()], vec![0; problem.nodes.len()]);
    for &(from, to) in &pairs {
        n_out[from] += 1;
        n_in[to] += 1;
    }
    for (node, degrees) in problem.nodes.iter().enumerate() {
        if degrees.iter().all(|(t, ways)| *t == 0 || ways.is_empty()) {
            return Err(Refusal::NoWay { node });
        }
        for way in degrees.iter().flat_map(|d| &d.1) {
            let values = [
                ("time", way.time),
                ("params", way.params),
                ("memory_each", way.memory_each),
                ("memory_fixed", way.memory_fixed),
            ];
            let syncs = way.sync_in.iter().chain(&way.sync_out).map(|&s| ("sync", s));
            if let Some((field, value)) = values.into_iter().chain(syncs).find(|&(_, v)| !usable(v)) {
                return Err(Refusal::Cost { field, node, value });
            }
            for (list, expected) in [(&way.sync_in, n_in[node]), (&way.sync_out, n_out[node])] {
                if list.len() != expected {
                    return Err(Refusal::Sync { node, found: list.len(), expected });
                }
            }
        }
    }
    Ok(dag)
}

/// Sums and products of a few such numbers stay finite.
fn usable(x: f64) -> bool {
    (0.0..1e100).contains(&x)
}
