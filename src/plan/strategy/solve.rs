//! Reduces, bounds and searches in turns, each on what the others have left.

use super::field::Field;
use super::network::Network;
use super::problem::Problem;
use super::random::Random;
use super::reduce::{Contradiction, Reduced};
use super::relaxation::Relaxation;
use super::search::Search;

/// Sweeps of the first turn; later turns take longer.
const FIRST_SWEEPS: usize = 200;
const GROWTH: f64 = 1.5;

/// What was found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// A strategy for every op: the cheapest choice found that fits and has nothing forbidden.
    pub strategies: Option<Vec<u32>>,
    pub cost: f64,
    /// No choice that fits is cheaper.
    pub bound: f64,
    pub turns: Vec<Turn>,
}

/// What a turn began with and reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn {
    pub n_variables: usize,
    pub n_values: usize,
    pub n_points: usize,
    pub bound: f64,
    pub cost: f64,
}

pub fn solve(problem: &Problem, seed: u64, stop: &mut dyn FnMut() -> bool) -> Result<Outcome, Contradiction> {
    let (network, limit) = problem.network();
    let grid = grid(&network);
    let price = forbidden_price(&network);
    let mut reduced = Reduced::new(network, limit);
    reduced.reduce(stop)?;
    let mut outcome = Outcome { strategies: None, cost: f64::INFINITY, bound: f64::NEG_INFINITY, turns: Vec::new() };
    let mut prices = vec![0.0; reduced.room.len()];
    let mut points = reduced.points.clone();
    let mut level = None;
    let mut random = Random(seed);
    let mut sweeps = FIRST_SWEEPS;
    loop {
        let field = Field::new(&reduced);
        // Points that are gone take their prices along.
        prices = reduced.points.iter().map(|p| points.binary_search(p).map_or(0.0, |i| prices[i])).collect();
        points.clone_from(&reduced.points);
        let mut relaxation = Relaxation::new(&field, prices, level);
        relaxation.ascend(sweeps, stop);
        level = relaxation.level();
        prices = relaxation.prices().to_vec();
        let start = relaxation.choice();
        let soft = field.softened(price);
        let reached = soft.cost_of(&start);
        let grain = (outcome.cost.min(reached) - relaxation.bound()).abs().max(1.0) / (field.n().max(1)) as f64;
        let mut search = Search::new(&soft, &prices, start, grain, random);
        search.run(relaxation.work() * sweeps as u64, stop);
        if let Some(best) = search.best() && best.cost < outcome.cost {
            let exact = field.cost_of(&best.values);
            if exact < outcome.cost {
                let mut value = vec![0; reduced.network.variables.len()];
                field.origin.iter().zip(&best.values).for_each(|(&x, &a)| value[x] = a);
                outcome.cost = exact;
                outcome.strategies = Some(reduced.expand(|x| value[x]));
            }
        }
        random = search.into_random();
        let (bound, excess) = relaxation.excess();
        outcome.bound = outcome.bound.max(bound);
        let excess = excess.to_vec();
        outcome.turns.push(Turn { n_variables: field.n(), n_values: field.cost.len(), n_points: field.room.len(), bound: outcome.bound, cost: outcome.cost });
        let margin = 1e-9 * outcome.cost.abs() + 1e-6;
        if outcome.bound > outcome.cost - 1.0 + margin {
            outcome.bound = outcome.cost;
        }
        if stop() || outcome.bound >= outcome.cost || field.n() == 0 {
            return Ok(outcome);
        }
        bake(&mut reduced.network, &field, relaxation.messages(), grid);
        for (x, &variable) in field.origin.iter().enumerate() {
            let worse = |a: &usize| bound + excess[field.first[x] + a] > outcome.cost + margin;
            let v = &mut reduced.network.variables[variable];
            (0..v.n_values()).filter(worse).for_each(|a| v.cost[a] = f64::INFINITY);
        }
        if reduced.reduce(stop).is_err() {
            // Nothing as cheap is left but what is known.
            outcome.bound = outcome.cost;
            return Ok(outcome);
        }
        sweeps = (sweeps as f64 * GROWTH) as usize;
    }
}

/// Messages are rounded to multiples of this, so that sums of whole costs and messages stay exact.
fn grid(network: &Network) -> f64 {
    let finite = |costs: &[f64]| costs.iter().filter(|c| c.is_finite()).fold(0.0, |m: f64, c| m.max(c.abs()));
    let values: f64 = network.variables.iter().map(|v| finite(&v.cost)).sum();
    let tables: f64 = network.tables.iter().map(|t| finite(&t.cost)).sum();
    let bits = (51.0 - (values + tables).max(1.0).log2()).floor();
    f64::exp2(-bits.clamp(0.0, 10.0))
}

/// More than any choice without forbidden pairs can save.
fn forbidden_price(network: &Network) -> f64 {
    let spread = |costs: &[f64]| {
        let finite = || costs.iter().copied().filter(|c| c.is_finite());
        (finite().fold(f64::NEG_INFINITY, f64::max) - finite().fold(f64::INFINITY, f64::min)).max(0.0)
    };
    let values: f64 = network.variables.iter().map(|v| spread(&v.cost)).sum();
    let tables: f64 = network.tables.iter().map(|t| spread(&t.cost)).sum();
    1.0 + values + tables
}

/// Moves costs between tables and values as the messages say: no choice costs more or less afterwards.
fn bake(network: &mut Network, field: &Field, messages: &[f64], grid: f64) {
    let rounded = |m: &f64| (m / grid).round() * grid;
    for (x, &variable) in field.origin.iter().enumerate() {
        for side in field.sides(x) {
            let neighbour = field.origin[side.other];
            let inward = messages[side.inward..][..field.n_values(x)].iter().map(rounded);
            let inward: Vec<f64> = inward.collect();
            network.variables[variable].cost.iter_mut().zip(&inward).for_each(|(c, m)| *c += m);
            let table = network.variables[variable].near[&neighbour];
            let mut rows = network.rows(table, variable);
            let width = field.n_values(side.other);
            for (row, m) in rows.chunks_mut(width).zip(&inward) {
                row.iter_mut().for_each(|c| *c -= m);
            }
            network.set_rows(table, variable, rows);
        }
    }
}
