//! A choice that fits, and what of a proposal makes it cheaper.
//!
//! The variables that a proposal changes fall apart into groups that share no table: their costs add up, and each can be
//! taken over without the others.

use super::field::Field;
use crate::plan::random::Random;

/// A choice for every variable that fits, with what follows from it.
#[derive(Clone, Debug)]
pub struct State {
    pub values: Vec<usize>,
    pub cost: f64,
    /// Memory at each point.
    pub load: Vec<f64>,
}

/// Variables that change together.
#[derive(Debug)]
pub struct Group {
    members: Vec<usize>,
    /// Added cost.
    cost: f64,
    /// Added memory, from each point until before the next entry.
    steps: Vec<(usize, f64)>,
}

/// Whether memory suffices at every point.
pub fn fits(load: &[f64], room: &[f64]) -> bool {
    load.iter().zip(room).all(|(l, r)| l <= r)
}

impl State {
    /// Takes over those groups of `proposal` that save cost and fit; of those that change nothing, some.
    ///
    /// `changed`: where the proposal may differ. Tells whether cost was saved.
    pub fn improve(&mut self, field: &Field, proposal: &[usize], changed: &[usize], random: &mut Random) -> bool {
        let mut groups = self.groups(field, proposal, changed);
        groups.sort_by(|a, b| a.cost.total_cmp(&b.cost));
        let before = self.cost;
        let total: f64 = groups.iter().map(|g| g.cost).sum();
        let backward = if total < 0.0 { self.give_back(field, &groups, total) } else { None };
        let mut taken = Vec::new();
        let mut saved = 0.0;
        for (g, group) in groups.iter().enumerate() {
            let wanted = group.cost < 0.0 || (group.cost == 0.0 && random.below(2) == 0);
            if wanted && group.fits(&self.load, &field.room) {
                group.add_to(&mut self.load, 1.0);
                saved += group.cost;
                taken.push(g);
            }
        }
        if let Some((cost, load, kept)) = backward
            && cost < saved
        {
            (saved, self.load, taken) = (cost, load, kept);
        }
        self.cost += saved;
        for &x in taken.iter().flat_map(|&g| &groups[g].members) {
            self.values[x] = proposal[x];
        }
        self.cost < before
    }

    /// Takes the whole proposal and gives groups back, cheapest per memory at the worst point first, until it fits.
    fn give_back(&self, field: &Field, groups: &[Group], total: f64) -> Option<(f64, Vec<f64>, Vec<usize>)> {
        let mut cost = total;
        let mut load = self.load.clone();
        groups.iter().for_each(|g| g.add_to(&mut load, 1.0));
        let mut kept: Vec<usize> = (0..groups.len()).collect();
        while cost < 0.0 {
            let over = |t: usize| load[t] - field.room[t];
            let worst = (0..load.len()).max_by(|&s, &t| over(s).total_cmp(&over(t)));
            let Some(worst) = worst.filter(|&t| over(t) > 0.0) else {
                return Some((cost, load, kept));
            };
            let price = |g: usize| -groups[g].cost / groups[g].at(worst).min(over(worst));
            let frees = (0..kept.len()).filter(|&i| groups[kept[i]].at(worst) > 0.0);
            let back = kept.swap_remove(frees.min_by(|&a, &b| price(kept[a]).total_cmp(&price(kept[b])))?);
            cost -= groups[back].cost;
            groups[back].add_to(&mut load, -1.0);
        }
        None
    }

    /// Groups of the variables in `changed` whose values differ.
    fn groups(&self, field: &Field, proposal: &[usize], changed: &[usize]) -> Vec<Group> {
        let old = &self.values;
        let mut open = std::collections::BTreeSet::new();
        open.extend(changed.iter().copied().filter(|&x| old[x] != proposal[x]));
        let mut groups = Vec::new();
        while let Some(first) = open.pop_first() {
            let mut members = vec![first];
            let mut next = 0;
            let mut cost = 0.0;
            let mut steps = Vec::new();
            while let Some(&x) = members.get(next) {
                next += 1;
                cost += field.cost[field.first[x] + proposal[x]] - field.cost[field.first[x] + old[x]];
                for side in field.sides(x) {
                    let y = side.other;
                    // A pair that changes on both sides is counted once.
                    if old[y] == proposal[y] || x < y {
                        cost += field.pair_cost(side, proposal[x], proposal[y]) - field.pair_cost(side, old[x], old[y]);
                    }
                    if open.remove(&y) {
                        members.push(y);
                    }
                }
                for span in field.spans(x) {
                    let usage = field.usage(x, span);
                    let more = usage[proposal[x]] - usage[old[x]];
                    if more != 0.0 {
                        steps.extend([(span.from, more), (span.to, -more)]);
                    }
                }
            }
            groups.push(Group { members, cost, steps: levels(steps) });
        }
        groups
    }
}

/// Changes at points to the level from each point on.
fn levels(mut steps: Vec<(usize, f64)>) -> Vec<(usize, f64)> {
    steps.sort_unstable_by_key(|s| s.0);
    let mut out: Vec<(usize, f64)> = Vec::with_capacity(steps.len());
    let mut sum = 0.0;
    for (at, more) in steps {
        sum += more;
        match out.last_mut() {
            Some(last) if last.0 == at => last.1 = sum,
            _ => out.push((at, sum)),
        }
    }
    out
}

impl Group {
    /// Ranges of points with the memory added there.
    fn ranges(&self) -> impl Iterator<Item = (std::ops::Range<usize>, f64)> {
        self.steps.windows(2).map(|w| (w[0].0..w[1].0, w[0].1)).filter(|r| r.1 != 0.0)
    }

    /// Whether there is room for what is added.
    fn fits(&self, load: &[f64], room: &[f64]) -> bool {
        let mut added = self.ranges().filter(|r| r.1 > 0.0);
        added.all(|(at, more)| load[at.clone()].iter().zip(&room[at]).all(|(l, r)| l + more <= *r))
    }

    fn add_to(&self, load: &mut [f64], sign: f64) {
        for (at, more) in self.ranges() {
            load[at].iter_mut().for_each(|l| *l += sign * more);
        }
    }

    /// Memory added at a point.
    fn at(&self, point: usize) -> f64 {
        let after = self.steps.partition_point(|s| s.0 <= point);
        if after == 0 { 0.0 } else { self.steps[after - 1].1 }
    }
}
