//! What moves save and cost over the horizon.

use super::decision::Balance;
use super::snapshot::{Candidate, Measured, Move, Observed, Snapshot, Window};
use crate::forecast::robust;
use crate::units::Seconds;

/// Earlier moves that still teach something.
const REMEMBERED: usize = 5;
/// Steps that were begun before a plan was ready: it takes over behind them.
const UNDER_WAY: f64 = 2.0;

/// A candidate on the scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighed {
    /// What it brings until another plan follows.
    pub balance: Balance,
    /// When to begin preparing it for that, an interval early; the present, unless a later moment is clearly better.
    pub at: Seconds,
}

/// The move to make first, of those to these plans; `None` without any.
///
/// Of all courses over what is foreseen, each interval with the running plan or a candidate and each change for the price
/// of a move, the one that saves most time is looked for. Its first move is weighed: time saved until its next one, interval
/// by interval as foreseen, against time lost by moving. A plan that is good for a short while is so followed by the one
/// that is good then, and nobody waits for a better moment while another plan pays until it comes.
///
/// While the running plan trains for a time t, a candidate needs t · candidate / running for the same steps. Where steps
/// take longer than predicted for the running plan, something slows them that no plan is known to change: only the
/// predicted difference is credited. A candidate starts when it is prepared, or later, and stays for the cooldown at
/// least; going back to the running plan is paid for twice. Without a forecast the present is expected to last as long
/// again as it has lasted.
///
/// Expectations are corrected by what earlier moves cost and brought.
///
/// # Complexity
/// O(n · k²) for n intervals and k candidates.
pub fn weigh<'c>(s: &Snapshot, candidates: &[&'c Candidate]) -> Option<(&'c Candidate, Weighed)> {
    let sides: Vec<Side> = candidates.iter().map(|c| Side::new(s, c)).collect();
    let course = Course::new(s, &sides);
    let mut now: Option<Begun> = None;
    let mut best: Option<Begun> = None;
    for (plan, side) in sides.iter().enumerate() {
        let later = side.rates.starts().filter(|&t| t > side.lead && t < side.end);
        for begin in std::iter::once(side.lead.min(side.end)).chain(later) {
            let Some(begun) = course.begun(s, &sides, plan, begin) else { continue };
            let better = |than: &Option<Begun>| than.is_none_or(|b| begun.value > b.value);
            if begin <= side.lead && better(&now) {
                now = Some(begun);
            }
            if better(&best) {
                best = Some(begun);
            }
        }
    }
    let Some((now, best)) = now.zip(best) else {
        // Numbers that are none promise nothing.
        return candidates.first().map(|&c| (c, Weighed { balance: Balance::default(), at: s.time }));
    };
    // To start one interval too early is better than to start too late.
    let Side { rates: Rates { interval, .. }, lead, .. } = &sides[best.plan];
    let clearly =
        best.balance.begin > now.balance.begin + *interval * 2.0 && best.value > now.value + 0.1 * best.balance.cost.0;
    Some(match clearly {
        true => {
            let at = best.balance.begin - *lead - *interval;
            (candidates[best.plan], Weighed { balance: best.balance, at })
        }
        false => (candidates[now.plan], Weighed { balance: now.balance, at: s.time }),
    })
}

/// What is known of one candidate. Times count from now.
struct Side {
    rates: Rates,
    /// From the decision until the plan runs.
    lead: Seconds,
    pause: Seconds,
    /// What a move has to save.
    price: f64,
    /// To where savings are summed up.
    end: Seconds,
}

impl Side {
    fn new(s: &Snapshot, c: &Candidate) -> Self {
        let rates = Rates::new(s, c);
        let pause = corrected(c.pause, &s.moves, |m| m.pause);
        Self {
            lead: corrected(c.prepare, &s.moves, |m| m.prepare) + step_time(s) * UNDER_WAY,
            pause,
            price: pause.0 * (1.0 + s.settings.hysteresis),
            end: rates.end().min(s.settings.horizon).min(time_left(s)),
            rates,
        }
    }

    fn gain(&self, from: usize, to: usize) -> f64 {
        let sum = |i: usize| self.rates.sums[i.min(self.rates.sums.len() - 1)];
        sum(to) - sum(from)
    }
}

/// The best that can be done from each interval on, by dynamic programming from the last one.
struct Course {
    n_intervals: usize,
    /// Seconds saved, by interval and by the plan in force there: a candidate, or the running plan as the last one.
    to_come: Vec<Vec<f64>>,
    /// The plan that the interval is trained with.
    next: Vec<Vec<usize>>,
}

/// A move to a candidate at some time.
#[derive(Clone, Copy)]
struct Begun {
    plan: usize,
    /// Seconds saved, with all moves that follow.
    value: f64,
    balance: Balance,
}

impl Course {
    fn new(s: &Snapshot, sides: &[Side]) -> Self {
        let running = sides.len();
        // Where nothing is foreseen, nothing follows.
        let foreseen = |side: &Side| match side.rates.constant {
            Some(_) => 0,
            None => ((side.end - side.rates.first) / side.rates.interval).ceil().max(0.0) as usize,
        };
        let n_intervals = sides.iter().map(|side| foreseen(side).min(side.rates.rates.len())).min().unwrap_or(0);
        let mut to_come = vec![vec![0.0; running + 1]; n_intervals + 1];
        let mut next: Vec<Vec<usize>> = vec![(0..=running).collect(); n_intervals];
        for i in (0..n_intervals).rev() {
            for from in 0..=running {
                let gain = |to: usize, until: usize| sides.get(to).map_or(0.0, |side| side.gain(i, until));
                to_come[i][from] = gain(from, i + 1) + to_come[i + 1][from];
                for to in (0..=running).filter(|&to| to != from) {
                    // The way back is as long as the way there.
                    let Some(moved) = sides.get(to).or(sides.get(from)) else { continue };
                    let stay = ((s.settings.cooldown / moved.rates.interval).ceil() as usize).max(1);
                    let until = i.saturating_add(stay).min(n_intervals);
                    let value = gain(to, until) - moved.price + to_come[until][to];
                    if value > to_come[i][from] {
                        (to_come[i][from], next[i][from]) = (value, to);
                    }
                }
            }
        }
        Self { n_intervals, to_come, next }
    }

    /// A move to a candidate that begins so long from now; `None` where numbers are none.
    fn begun(&self, s: &Snapshot, sides: &[Side], plan: usize, begin: Seconds) -> Option<Begun> {
        let Side { rates, end, pause, price, .. } = &sides[plan];
        let start = |i: usize| (rates.first + rates.interval * i as f64).min(*end);
        // From this interval on it may be left.
        let free = ((begin + s.settings.cooldown - rates.first) / rates.interval).ceil().max(0.0) as usize;
        let (mut until, mut n_moves, mut value) = (*end, 1.0, rates.between(begin, *end) - price);
        if free < self.n_intervals && start(free) < *end {
            value = rates.between(begin, start(free)) + self.to_come[free][plan] - price;
            if let Some(i) = (free..self.n_intervals).find(|&i| self.next[i][plan] != plan) {
                until = start(i);
                n_moves = if self.next[i][plan] == sides.len() { 2.0 } else { 1.0 };
            }
        }
        let all = rates.between(begin, until);
        let saved = Seconds(if all > 0.0 { all * trust(s) } else { all });
        let share = if until > begin { all / (until - begin).0 } else { 0.0 };
        let cost = *pause * n_moves;
        let balance = Balance { saved, cost, share, begin: s.time + begin, end: s.time + until };
        let sound = value.is_finite() && saved.0.is_finite() && cost.0.is_finite();
        sound.then_some(Begun { plan, value, balance })
    }
}

/// Seconds saved per second, by interval; times count from now.
struct Rates {
    interval: Seconds,
    /// Start of the first interval: not after now.
    first: Seconds,
    /// Saved from the start of the first interval to that of each other one.
    sums: Vec<f64>,
    rates: Vec<f64>,
    /// For how long a single prediction holds.
    constant: Option<Seconds>,
}

impl Rates {
    fn new(s: &Snapshot, c: &Candidate) -> Self {
        let observed = s.running.observed.now().unwrap_or(0.0);
        let predicted = c.running.first().map_or(0.0, |t| t.0);
        let unexplained = if predicted > 0.0 && observed > predicted { observed / predicted } else { 1.0 };
        let rate = |(running, candidate): (&Seconds, &Seconds)| {
            let rate = (1.0 - *candidate / *running) / unexplained;
            if rate.is_finite() { rate } else { 0.0 }
        };
        let rates: Vec<f64> = c.running.iter().zip(&c.step_times).map(rate).collect();
        let interval = if c.interval.0 > 0.0 && c.interval.0.is_finite() { c.interval } else { s.settings.horizon };
        let mut sums = vec![0.0];
        rates.iter().for_each(|r| sums.push(sums[sums.len() - 1] + r * interval.0));
        let constant = (rates.len() == 1).then(|| lasting(s));
        Self { interval, first: c.made - s.time, sums, constant, rates }
    }

    fn end(&self) -> Seconds {
        self.constant.unwrap_or(self.first + self.interval * self.rates.len() as f64)
    }

    fn starts(&self) -> impl Iterator<Item = Seconds> {
        (0..self.rates.len()).map(|i| self.first + self.interval * i as f64)
    }

    fn between(&self, from: Seconds, to: Seconds) -> f64 {
        match self.rates.as_slice() {
            _ if to <= from => 0.0,
            [] => 0.0,
            [rate] => rate * (to - from).0,
            _ => self.until(to) - self.until(from),
        }
    }

    /// Saved from the start of the first interval.
    fn until(&self, time: Seconds) -> f64 {
        let at = ((time - self.first) / self.interval).clamp(0.0, self.rates.len() as f64);
        let whole = (at as usize).min(self.rates.len() - 1);
        self.sums[whole] + (at - whole as f64) * self.rates[whole] * self.interval.0
    }
}

/// How long steps have taken what they take now.
///
/// As much is expected of the future: whoever moves only when staying has cost as much as a move loses at most twice what
/// hindsight would (the ski rental problem: Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988).
fn lasting(s: &Snapshot) -> Seconds {
    let Observed { windows } = &s.running.observed;
    let now = s.running.observed.now().unwrap_or(f64::NAN);
    let other = |w: &Window| (w.seen.centre - now).abs() > (w.seen.centre - s.running.predicted.0).abs();
    match windows.iter().position(other) {
        Some(n) if n > 0 => windows[n - 1].span,
        _ => s.time - s.running.since,
    }
}

fn time_left(s: &Snapshot) -> Seconds {
    s.steps_left.map_or(Seconds(f64::INFINITY), |n| step_time(s) * n as f64)
}

/// What steps take now.
fn step_time(s: &Snapshot) -> Seconds {
    s.running.observed.now().map_or(s.running.predicted, Seconds)
}

/// A prediction times how wrong the last ones were: the median of measured over expected.
fn corrected(expected: Seconds, moves: &[Move], of: impl Fn(&Move) -> Measured) -> Seconds {
    let measured = moves.iter().rev().take(REMEMBERED).map(of).filter_map(|m| Some((m.expected, m.measured?)));
    let ratios: Vec<f64> = measured.map(|(e, m)| m / e).filter(|r| r.is_finite() && *r > 0.0).collect();
    let expected = expected.max(Seconds(0.0));
    if ratios.is_empty() { expected } else { expected * robust::median(&ratios) }
}

/// How much of an expected gain to believe: the mean of what earlier moves brought of theirs, with one imagined move that
/// brought all of it.
fn trust(s: &Snapshot) -> f64 {
    let measured = s.telling_moves().take(REMEMBERED).filter_map(|m| Some(m.gain.measured? / m.gain.expected));
    let kept: Vec<f64> = measured.filter(|r| r.is_finite()).map(|r| r.clamp(0.0, 1.0)).collect();
    (1.0 + kept.iter().sum::<f64>()) / (1.0 + kept.len() as f64)
}
