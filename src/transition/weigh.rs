//! What a move saves and costs over the horizon.

use super::decision::Balance;
use super::snapshot::{Candidate, Measured, Move, Observed, Snapshot, Window};
use crate::forecast::robust;
use crate::units::Seconds;

/// Earlier moves that still teach something.
const REMEMBERED: usize = 5;

/// A candidate on the scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighed {
    /// The best that can be had from it.
    pub balance: Balance,
    /// When to begin preparing it for that, an interval early; the present, unless a later moment is clearly better.
    pub at: Seconds,
}

/// Weighs a candidate: time saved over the horizon, interval by interval as foreseen, against time lost by moving.
///
/// While the running plan trains for a time t, the candidate needs t · candidate / running for the same steps. Where steps
/// take longer than predicted for the running plan, something slows them that no plan is known to change: only the
/// predicted difference is credited. The candidate starts when it is prepared, or later; it stays to the end of the
/// horizon, of the forecast or of the job, or is left again after the cooldown, for the price of a second move. Without a
/// forecast the present is expected to last as long again as it has lasted.
///
/// Expectations are corrected by what earlier moves cost and brought.
///
/// # Complexity
/// O(n²) for n intervals.
pub fn weigh(s: &Snapshot, c: &Candidate) -> Weighed {
    weigh_until(s, c, Seconds(f64::INFINITY))
}

/// The same where another plan will be moved to at a `latest` time of the job, which is all that is foreseen of this one.
pub fn weigh_until(s: &Snapshot, c: &Candidate, latest: Seconds) -> Weighed {
    let prepare = corrected(c.prepare, &s.moves, |m| m.prepare);
    let pause = corrected(c.pause, &s.moves, |m| m.pause);
    let rates = Rates::new(s, c);
    let end = rates.end().min(s.settings.horizon).min(time_left(s)).min(latest - s.time);
    let later = rates.starts().filter(|&t| t > prepare && t < end);
    let mut now: Option<Balance> = None;
    let mut best: Option<Balance> = None;
    for begin in std::iter::once(prepare.min(end)).chain(later) {
        let ends = rates.ends().filter(|&t| t >= begin + s.settings.cooldown && t < end);
        for until in std::iter::once(end).chain(ends) {
            let all = rates.between(begin, until);
            let saved = if all > 0.0 { all * trust(&s.moves) } else { all };
            let n_moves = if until < end { 2.0 } else { 1.0 };
            let share = if until > begin { all / (until - begin).0 } else { 0.0 };
            let balance = Balance {
                saved: Seconds(saved),
                cost: pause * n_moves,
                share,
                begin: s.time + begin,
                end: s.time + until,
            };
            let better = |than: &Option<Balance>| than.is_none_or(|b| balance.net() > b.net());
            if begin <= prepare && better(&now) {
                now = Some(balance);
            }
            if better(&best) {
                best = Some(balance);
            }
        }
    }
    // Numbers that are none promise nothing.
    let sound = |b: &Balance| b.saved.0.is_finite() && b.cost.0.is_finite();
    let (now, best) = (now.filter(sound).unwrap_or_default(), best.filter(sound).unwrap_or_default());
    // To start one interval too early is better than to start too late.
    let clearly = best.begin > now.begin + rates.interval * 2.0 && best.net().0 > now.net().0 + 0.1 * best.cost.0;
    match clearly {
        true => Weighed { balance: best, at: best.begin - prepare - rates.interval },
        false => Weighed { balance: now, at: s.time },
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

    fn ends(&self) -> impl Iterator<Item = Seconds> {
        self.starts().map(|t| t + self.interval)
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
    let step = s.running.observed.now().unwrap_or(s.running.predicted.0);
    s.steps_left.map_or(Seconds(f64::INFINITY), |n| Seconds(n as f64 * step))
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
fn trust(moves: &[Move]) -> f64 {
    let measured = moves.iter().rev().take(REMEMBERED).filter_map(|m| Some(m.gain.measured? / m.gain.expected));
    let kept: Vec<f64> = measured.filter(|r| r.is_finite()).map(|r| r.clamp(0.0, 1.0)).collect();
    (1.0 + kept.iter().sum::<f64>()) / (1.0 + kept.len() as f64)
}
