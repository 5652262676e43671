//! Reduces, bounds and searches in turns, each on what the others have left.

use super::field::Field;
use super::network::Network;
use super::problem::{Malformed, Problem};
use super::reduce::{Contradiction, Reduced};
use super::relaxation::Relaxation;
use super::search::Search;
use crate::plan::random::Random;

/// Sweeps of the first turn; later turns take longer.
const FIRST_SWEEPS: usize = 200;
const GROWTH: f64 = 1.5;
/// The network is reduced again when this share of its values is gone.
const WORTH_REDUCING: f64 = 0.002;

/// What was found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// A strategy for every op, without anything forbidden, within the limit; `None` when none was found.
    pub strategies: Option<Vec<u32>>,
    /// Of these strategies; infinite without.
    pub cost: f64,
    /// No choice that fits is cheaper.
    pub bound: f64,
    pub turns: Vec<Turn>,
}

/// What a turn began with and where it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn {
    pub n_variables: usize,
    pub n_values: usize,
    pub n_points: usize,
    pub bound: f64,
    pub cost: f64,
}

/// A problem without an answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("every strategy of op {op} is forbidden, by itself or by the ops it is coupled with")]
    Forbidden { op: usize },
    #[error("at moment {moment} the leanest strategies use {needs:.0}, the limit is {limit:.0}")]
    Memory { moment: i64, needs: f64, limit: f64 },
}

/// Looks for the cheapest strategies until `stop` says so or none are cheaper.
///
/// `stop` is asked after every few milliseconds of work. The same problem, seed and answers of `stop` give the same
/// outcome.
///
/// # Errors
/// [`Refusal`] when the problem makes no sense or no choice fits; that none fits may also stay open, in an outcome
/// without strategies.
pub fn solve(problem: &Problem, seed: u64, stop: &mut dyn FnMut() -> bool) -> Result<Outcome, Refusal> {
    problem.check()?;
    let (network, moments, limit) = problem.network();
    let mut turns = Turns {
        grid: grid(&network),
        forbidden: forbidden_price(&network),
        prices: vec![0.0; moments.len()],
        points: (0..moments.len()).collect(),
        reduced: Reduced::new(network, vec![limit; moments.len()]),
        level: None,
        random: Random::new(seed),
        outcome: Outcome { strategies: None, cost: f64::INFINITY, bound: f64::NEG_INFINITY, turns: Vec::new() },
    };
    turns.reduced.reduce(stop).map_err(|contradiction| match contradiction {
        Contradiction::NoStrategy { op } => Refusal::Forbidden { op },
        Contradiction::Memory { point, over } => Refusal::Memory { moment: moments[point], needs: limit + over, limit },
    })?;
    let mut n_sweeps = FIRST_SWEEPS;
    while !turns.take(n_sweeps, stop) && !stop() {
        n_sweeps = (n_sweeps as f64 * GROWTH) as usize;
    }
    Ok(turns.outcome)
}

/// What lasts from turn to turn.
struct Turns {
    reduced: Reduced,
    /// Of memory, by point; and which points these are.
    prices: Vec<f64>,
    points: Vec<usize>,
    level: Option<f64>,
    random: Random,
    outcome: Outcome,
    /// Messages are rounded to multiples of this.
    grid: f64,
    /// Price of a forbidden pair during searches.
    forbidden: f64,
}

impl Turns {
    /// One turn; tells whether nothing is left to do.
    fn take(&mut self, n_sweeps: usize, stop: &mut dyn FnMut() -> bool) -> bool {
        let field = Field::new(&self.reduced);
        let known = self.known(&field);
        // Points that are gone take their prices along.
        let price = |p: &usize| self.points.binary_search(p).map_or(0.0, |i| self.prices[i]);
        self.prices = self.reduced.points.iter().map(price).collect();
        self.points.clone_from(&self.reduced.points);

        let mut relaxation = Relaxation::new(&field, self.prices.clone(), self.level);
        let enough = if self.outcome.cost.is_finite() { 1e-4 * (self.outcome.cost - self.outcome.bound) } else { 0.0 };
        relaxation.ascend(n_sweeps, enough, stop);
        self.prices.copy_from_slice(relaxation.prices());
        self.level = relaxation.level();
        let (bound, excess) = relaxation.excess();
        let excess = excess.to_vec();
        self.outcome.bound = self.outcome.bound.max(bound - margin(bound));

        let soft = field.softened(self.forbidden);
        let gap = if self.outcome.cost.is_finite() { self.outcome.cost - bound } else { 0.05 * bound.abs() };
        let mut search = Search::new(&soft, &relaxation, &excess, gap.max(1.0), self.random.clone());
        search.begin(known, stop);
        if field.n() > 0 {
            search.run(relaxation.work() * n_sweeps as u64, stop);
        }
        if let Some(best) = search.best() {
            self.offer(&field, &best.values);
        }
        self.random = search.into_random();

        let outcome = &mut self.outcome;
        // Costs are whole: what is not cheaper by 1 is not cheaper. Without variables nothing else is left.
        let settled = field.n() == 0 && outcome.cost.is_finite();
        if settled || outcome.bound > outcome.cost - 1.0 {
            outcome.bound = outcome.cost;
        }
        outcome.turns.push(Turn {
            n_variables: field.n(),
            n_values: field.cost.len(),
            n_points: field.room.len(),
            bound: outcome.bound,
            cost: outcome.cost,
        });
        if outcome.bound >= outcome.cost || field.n() == 0 {
            return true;
        }
        if outcome.cost.is_finite() && self.narrow(&field, &relaxation, &excess, bound, stop).is_err() {
            // Nothing is left that could be cheaper.
            self.outcome.bound = self.outcome.cost;
            return true;
        }
        false
    }

    /// The strategies known so far as values of a field's variables; those that are gone as the first value.
    fn known(&self, field: &Field) -> Option<Vec<usize>> {
        let strategies = self.outcome.strategies.as_ref()?;
        let variables = &self.reduced.network.variables;
        let value = |&x: &usize| variables[x].strategy.iter().position(|&s| s == strategies[x]).unwrap_or(0);
        Some(field.origin.iter().map(value).collect())
    }

    /// Keeps a choice that fits if it is the cheapest and has nothing forbidden.
    fn offer(&mut self, field: &Field, values: &[usize]) {
        let cost = field.cost_of(values);
        if cost < self.outcome.cost {
            let mut value = vec![0; self.reduced.network.variables.len()];
            field.origin.iter().zip(values).for_each(|(&x, &a)| value[x] = a);
            self.outcome.cost = cost;
            self.outcome.strategies = Some(self.reduced.expand(|x| value[x]));
        }
    }

    /// Removes values that cost too much, and reduces what is left.
    fn narrow(
        &mut self,
        field: &Field,
        relaxation: &Relaxation<'_>,
        excess: &[f64],
        bound: f64,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<(), Contradiction> {
        let limit = self.outcome.cost + margin(self.outcome.cost);
        let too_much: Vec<bool> = excess.iter().map(|e| bound + e > limit).collect();
        let n_too_much = too_much.iter().filter(|t| **t).count();
        if (n_too_much as f64) < WORTH_REDUCING * excess.len() as f64 {
            return Ok(());
        }
        bake(&mut self.reduced.network, field, relaxation.messages(), self.grid);
        for (x, &variable) in field.origin.iter().enumerate() {
            let cost = &mut self.reduced.network.variables[variable].cost;
            for (c, _) in cost.iter_mut().zip(&too_much[field.first[x]..]).filter(|(_, t)| **t) {
                *c = f64::INFINITY;
            }
        }
        self.reduced.reduce(stop)
    }
}

/// More than sums of doubles are off.
fn margin(cost: f64) -> f64 {
    1e-11 * cost.abs() + 1e-6
}

/// A step small enough for messages and large enough that sums of whole costs and messages stay exact.
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

/// Moves costs between tables and values as the messages say: every choice costs what it did.
///
/// The next relaxation then starts where this one is.
fn bake(network: &mut Network, field: &Field, messages: &[f64], grid: f64) {
    for (x, &variable) in field.origin.iter().enumerate() {
        for side in field.sides(x) {
            let inward = &messages[side.inward..][..field.n_values(x)];
            let inward: Vec<f64> = inward.iter().map(|m| (m / grid).round() * grid).collect();
            network.variables[variable].cost.iter_mut().zip(&inward).for_each(|(c, m)| *c += m);
            let table = network.variables[variable].near[&field.origin[side.other]];
            let mut rows = network.rows(table, variable);
            for (row, m) in rows.chunks_mut(field.n_values(side.other)).zip(&inward) {
                row.iter_mut().for_each(|c| *c -= m);
            }
            network.set_rows(table, variable, rows);
        }
    }
}
