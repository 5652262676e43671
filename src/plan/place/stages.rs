//! Contiguous stages: the exact optimum over downsets.

use super::lattice::{Downsets, Lattice, Upstream};
use super::problem::Devices;

/// Devices in use and left over at a cut, and what they can carry within a limit.
#[derive(Clone, Copy, Debug)]
struct Limits {
    limit: f64,
    devices: Devices,
    total: Upstream,
    /// Rounding of sums, in time and in bytes: nothing is ruled out for that.
    slack: (f64, f64),
    /// Most accelerator time per unit of host time.
    advantage: f64,
}

/// A chain of cuts.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    /// Load of the busiest device.
    pub load: f64,
    /// Stage of every cluster, numbered downstream, and whether it is on an accelerator.
    pub stage: Vec<usize>,
    pub accelerated: Vec<bool>,
}

impl Limits {
    /// Accelerator time that `n` hosts can take off the accelerators.
    fn relief(&self, n: usize) -> f64 {
        if n == 0 { 0.0 } else { (n as f64 * self.limit * self.advantage).min(self.total.accelerator) }
    }

    /// Accelerator time upstream of a cut that has `hosts` and `accelerators` behind it.
    fn range(&self, hosts: usize, accelerators: usize) -> (f64, f64) {
        let slack = self.slack.0;
        let rest = (self.devices.n_accelerators - accelerators) as f64 * self.limit
            + self.relief(self.devices.n_hosts - hosts);
        (self.total.accelerator - rest - slack, accelerators as f64 * self.limit + self.relief(hosts) + slack)
    }

    /// Whether some stages within the limit may end here.
    fn admits(&self, hosts: usize, accelerators: usize, up: &Upstream) -> bool {
        let (low, high) = self.range(hosts, accelerators);
        if !(low <= up.accelerator && up.accelerator <= high) {
            return false;
        }
        let slack = self.slack;
        let side = |hosts: usize, accelerators: usize, n_bound: u32, accelerator: f64, host: f64, bytes: f64| {
            let n = accelerators as f64;
            let only_accelerators = hosts > 0
                || n_bound == 0
                    && accelerator + up.crossing <= n * self.limit + slack.0
                    && bytes <= n * self.devices.memory + slack.1;
            let only_hosts = accelerators > 0 || host <= hosts as f64 * self.limit + slack.0;
            only_accelerators && only_hosts
        };
        let (all, left) = (&self.total, &self.devices);
        side(hosts, accelerators, up.n_bound, up.accelerator, up.host, up.bytes)
            && side(
                left.n_hosts - hosts,
                left.n_accelerators - accelerators,
                all.n_bound - up.n_bound,
                all.accelerator - up.accelerator,
                all.host - up.host,
                all.bytes - up.bytes,
            )
    }
}

impl Effort {
    /// Asks `stop` now and then.
    pub(super) fn spend(&mut self, n: u64, stop: &mut dyn FnMut() -> bool) -> Result<(), Unfinished> {
        const ASK: u64 = 1 << 20;
        if n > self.n_steps {
            return Err(Unfinished::TooMany);
        }
        let before = self.n_steps / ASK;
        self.n_steps -= n;
        if self.n_steps / ASK != before && stop() { Err(Unfinished::Stopped) } else { Ok(()) }
    }
}

/// How a cut was reached.
#[derive(Clone, Copy, Debug)]
enum From {
    Start,
    /// A device stays empty.
    Idle,
    /// Position of the cut before in the window of the state before.
    Stage(u32),
}

/// Cuts that may follow some number of devices.
struct Window {
    /// Numbers of downsets, ascending.
    cuts: Vec<u32>,
    /// Busiest device upstream.
    load: Vec<f64>,
    /// Whether the last device is an accelerator.
    from: Vec<(bool, From)>,
}

/// Why a search ended without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfinished {
    TooMany,
    Stopped,
}

/// What a search may spend.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub n_downsets: usize,
    /// Downsets walked past and pairs of downsets looked at.
    pub n_steps: u64,
}

/// The chain of stages with the smallest load below `limit`; `None` when there is none.
///
/// # Errors
/// [`Unfinished`] when the effort is spent, or when `stop` says so.
/// # Complexity
/// O(pairs of downsets that may bound a stage · (crossing nets + devices of a state)). The closer `limit` is to what all
/// devices can carry together, the fewer cuts leave enough room on both sides.
pub fn best_chain(
    lattice: &Lattice<'_>,
    devices: Devices,
    limit: f64,
    effort: &mut Effort,
    stop: &mut dyn FnMut() -> bool,
) -> Result<Option<Chain>, Unfinished> {
    let total = lattice.total();
    let devices = Devices { memory: devices.memory.min(total.bytes), ..devices };
    let slack = (1e-9 * (total.accelerator + total.host + lattice.transfers()), 1e-9 * total.bytes);
    let limits = Limits { limit, devices, total, slack, advantage: lattice.advantage() };
    let states: Vec<(usize, usize)> =
        (0..=devices.n_hosts).flat_map(|h| (0..=devices.n_accelerators).map(move |a| (h, a))).collect();
    let mut ranges: Vec<(f64, f64)> = states.iter().map(|&(h, a)| limits.range(h, a)).collect();
    ranges.sort_by(|a, b| a.0.total_cmp(&b.0));
    ranges.dedup_by(|next, before| {
        let joined = next.0 <= before.1;
        if joined {
            before.1 = before.1.max(next.1);
        }
        joined
    });
    let keep = |up: &Upstream| states.iter().any(|&(h, a)| limits.admits(h, a, up));
    let downsets = lattice.downsets(&ranges, keep, effort, stop)?;

    let mut windows: Vec<Window> = Vec::with_capacity(states.len());
    let per_host = devices.n_accelerators + 1;
    for (state, &(h, a)) in states.iter().enumerate() {
        let cuts: Vec<u32> =
            (0..downsets.len()).filter(|&i| limits.admits(h, a, &downsets.sums[i])).map(|i| i as u32).collect();
        let mut window = Window { load: vec![limit; cuts.len()], from: vec![(true, From::Start); cuts.len()], cuts };
        if state == 0
            && let Some(start) = window.cuts.iter().position(|&c| downsets.sums[c as usize].n == 0)
        {
            window.load[start] = 0.0;
        }
        let before = [(a > 0, true, 1), (h > 0, false, per_host)];
        for (_, accelerated, back) in before.into_iter().filter(|b| b.0) {
            let previous = &windows[state - back];
            extend(&downsets, &limits, previous, &mut window, accelerated, effort, stop)?;
        }
        windows.push(window);
    }
    Ok(trace(&downsets, &windows, lattice.len(), per_host))
}

/// Adds one device after `previous`.
fn extend(
    downsets: &Downsets,
    limits: &Limits,
    previous: &Window,
    window: &mut Window,
    accelerated: bool,
    effort: &mut Effort,
    stop: &mut dyn FnMut() -> bool,
) -> Result<(), Unfinished> {
    let slack = limits.slack.0;
    let widest = |load: f64| if accelerated { load + slack } else { load * limits.advantage + slack };
    // Cuts of the previous window up to the present one.
    let mut end = 0;
    for (at, &cut) in window.cuts.iter().enumerate() {
        let up = &downsets.sums[cut as usize];
        while previous.cuts.get(end).is_some_and(|&c| downsets.sums[c as usize].accelerator <= up.accelerator + slack) {
            end += 1;
        }
        let (mut best, mut from) = (window.load[at], window.from[at]);
        let mut n_seen = 0;
        for i in (0..end).rev() {
            n_seen += 1;
            let start = previous.cuts[i] as usize;
            let down = &downsets.sums[start];
            if up.accelerator - down.accelerator >= widest(best) {
                break;
            }
            if previous.load[i] >= best {
                continue;
            }
            if start == cut as usize {
                (best, from) = (previous.load[i], (accelerated, From::Idle));
                continue;
            }
            let mut load = if accelerated { up.accelerator - down.accelerator } else { up.host - down.host };
            if load >= best || down.n >= up.n || !downsets.within(start, cut as usize) {
                continue;
            }
            if accelerated {
                if down.n_bound != up.n_bound || up.bytes - down.bytes > limits.devices.memory {
                    continue;
                }
                load += downsets.transfers(start, cut as usize);
            }
            if load < best {
                (best, from) = (load.max(previous.load[i]), (accelerated, From::Stage(i as u32)));
            }
        }
        (window.load[at], window.from[at]) = (best, from);
        effort.spend(n_seen, stop)?;
    }
    Ok(())
}

/// The stages of the best chain that ends with everything upstream.
fn trace(downsets: &Downsets, windows: &[Window], n: usize, per_host: usize) -> Option<Chain> {
    let mut state = windows.len() - 1;
    let mut at = windows[state].cuts.iter().position(|&c| downsets.sums[c as usize].n as usize == n)?;
    let load = windows[state].load[at];
    let mut stages = Vec::new();
    loop {
        let window = &windows[state];
        let (accelerated, from) = window.from[at];
        let cut = window.cuts[at];
        match from {
            From::Start => break,
            From::Idle => {}
            From::Stage(_) => stages.push((cut as usize, accelerated)),
        }
        state -= if accelerated { 1 } else { per_host };
        at = match from {
            From::Stage(i) => i as usize,
            _ => windows[state].cuts.binary_search(&cut).ok()?,
        };
    }
    if state != 0 || downsets.sums[windows[0].cuts[at] as usize].n != 0 {
        return None;
    }
    stages.reverse();
    let mut stage = vec![0; n];
    for (s, &(cut, _)) in stages.iter().enumerate().rev() {
        super::bits::ones(downsets.members(cut)).for_each(|v| stage[v] = s);
    }
    Some(Chain { load, stage, accelerated: stages.into_iter().map(|(_, a)| a).collect() })
}
