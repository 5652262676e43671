//! One choice for each of many, within a capacity: the multiple-choice knapsack.

/// What one choice costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    pub time: f64,
    pub memory: f64,
}

/// Between what the least time lies: a relaxation below, choices that fit above; infinite where nothing fits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    pub low: f64,
    pub high: f64,
}

/// Bounds of the least total time with at most `capacity` memory, in O(n log n).
///
/// Each item begins with its fastest choice; then those steps to less memory are taken that cost the least time for
/// what they save. Half a step more gives the lower bound.
pub fn bounds(items: &[Vec<Cost>], capacity: f64) -> Range {
    relax(items, capacity).map_or(Range { low: f64::INFINITY, high: f64::INFINITY }, |r| r.range)
}

struct Relaxed {
    range: Range,
    /// Choices of the upper bound.
    chosen: Vec<usize>,
    /// Time per memory of the last step.
    rate: f64,
}

struct Step {
    rate: f64,
    item: usize,
    to: usize,
}

fn relax(items: &[Vec<Cost>], capacity: f64) -> Option<Relaxed> {
    let mut steps: Vec<Step> = Vec::new();
    let mut chosen = Vec::with_capacity(items.len());
    let (mut time, mut memory) = (0.0, 0.0);
    for (item, choices) in items.iter().enumerate() {
        let by = |a: &usize, b: &usize| {
            let (a, b) = (choices[*a], choices[*b]);
            a.time.total_cmp(&b.time).then(a.memory.total_cmp(&b.memory))
        };
        let mut at = (0..choices.len()).min_by(by)?;
        chosen.push(at);
        time += choices[at].time;
        memory += choices[at].memory;
        // Down the lower hull: always the step with the best rate.
        loop {
            let rate = |o: usize| (choices[o].time - choices[at].time) / (choices[at].memory - choices[o].memory);
            let lighter = (0..choices.len()).filter(|&o| choices[o].memory < choices[at].memory);
            let next = lighter
                .min_by(|&a, &b| rate(a).total_cmp(&rate(b)).then(choices[a].memory.total_cmp(&choices[b].memory)));
            let Some(to) = next else { break };
            steps.push(Step { rate: rate(to), item, to });
            at = to;
        }
    }
    if memory <= capacity {
        return Some(Relaxed { range: Range { low: time, high: time }, chosen, rate: 0.0 });
    }
    // Steps of one item have rising rates, so a stable sort keeps their order.
    steps.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    let mut low = f64::INFINITY;
    let mut taken: Vec<(usize, usize)> = Vec::new();
    let mut rate = 0.0;
    for step in &steps {
        let (from, to) = (items[step.item][chosen[step.item]], items[step.item][step.to]);
        low = time + step.rate * (memory - capacity);
        taken.push((step.item, chosen[step.item]));
        chosen[step.item] = step.to;
        time += to.time - from.time;
        memory += to.memory - from.memory;
        rate = step.rate;
        if memory <= capacity {
            break;
        }
    }
    if memory > capacity {
        return None;
    }
    // The last step may have made an earlier one needless.
    for &(item, before) in taken.iter().rev().skip(1) {
        let (now, back) = (items[item][chosen[item]], items[item][before]);
        if back.time < now.time && memory + back.memory - now.memory <= capacity {
            chosen[item] = before;
            time += back.time - now.time;
            memory += back.memory - now.memory;
        }
    }
    Some(Relaxed { range: Range { low: low.min(time), high: time }, chosen, rate })
}

/// The choices with the least total time, and whether that is proven; `None` where nothing fits.
///
/// Item by item all sums are kept that no other beats in both time and memory, and that may still lead below the best
/// known: the bound prices memory at the rate of the relaxation. More than `most` sums are given up.
///
/// # Source
/// Dynamic programming with bounds, as in Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
/// EJOR 1995.
pub fn best(items: &[Vec<Cost>], capacity: f64, most: usize) -> Option<(Vec<usize>, bool)> {
    let relaxed = relax(items, capacity)?;
    let rate = relaxed.rate;
    // Least priced cost of the items from each on.
    let mut rest = vec![0.0; items.len() + 1];
    for (i, choices) in items.iter().enumerate().rev() {
        let least = choices.iter().map(|c| c.time + rate * c.memory).fold(f64::INFINITY, f64::min);
        rest[i] = rest[i + 1] + least;
    }
    let mut exact = true;
    // Sums, and for each the one it came from and the choice.
    let mut sums = vec![Cost { time: 0.0, memory: 0.0 }];
    let mut ways: Vec<Vec<(u32, u32)>> = Vec::with_capacity(items.len());
    for (i, choices) in items.iter().enumerate() {
        let mut next: Vec<(Cost, u32, u32)> = Vec::with_capacity(sums.len() * choices.len());
        for (from, sum) in sums.iter().enumerate() {
            for (o, choice) in choices.iter().enumerate() {
                let (time, memory) = (sum.time + choice.time, sum.memory + choice.memory);
                let bound = time + rest[i + 1] - rate * (capacity - memory);
                if memory <= capacity && bound < relaxed.range.high {
                    next.push((Cost { time, memory }, from as u32, o as u32));
                }
            }
        }
        next.sort_by(|a, b| a.0.memory.total_cmp(&b.0.memory).then(a.0.time.total_cmp(&b.0.time)));
        let mut least = f64::INFINITY;
        next.retain(|(cost, _, _)| {
            let better = cost.time < least;
            least = least.min(cost.time);
            better
        });
        if next.len() > most {
            exact = false;
            next.sort_by(|a, b| (a.0.time + rate * a.0.memory).total_cmp(&(b.0.time + rate * b.0.memory)));
            next.truncate(most);
        }
        sums = next.iter().map(|n| n.0).collect();
        ways.push(next.iter().map(|n| (n.1, n.2)).collect());
    }
    let winner = (0..sums.len()).min_by(|&a, &b| sums[a].time.total_cmp(&sums[b].time));
    let Some(mut at) = winner.filter(|&w| sums[w].time < relaxed.range.high) else {
        return Some((relaxed.chosen, exact));
    };
    let mut chosen = vec![0; items.len()];
    for (i, way) in ways.iter().enumerate().rev() {
        let (from, o) = way[at];
        chosen[i] = o as usize;
        at = from as usize;
    }
    Some((chosen, exact))
}
