//! Where stages can lie, and what that means for their speed.

use super::replicated::Network;

/// A place for one stage after what is already placed.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub from: usize,
    pub to: usize,
    pub replicas: u32,
    /// Seconds per second of computing, and per byte of parameters.
    pub per_compute: f64,
    pub per_param: f64,
    /// The stage before, if it is near, can send inside machines.
    pub near_before: bool,
    /// So can this stage to one after it.
    pub near_after: bool,
    pub devices: Vec<usize>,
}

/// Devices used so far. Positions 0..=n are the first so many devices; the others are in the midst of machines in a row
/// that share their work, the same number of devices on each.
pub(super) struct Positions {
    pub moves: Vec<Move>,
    /// Moves from each position: a range of `moves`.
    pub from: Vec<std::ops::Range<usize>>,
    /// Devices used.
    pub used: Vec<usize>,
    /// Next position if the rest of the machine stays idle.
    pub skip: Vec<Option<usize>>,
}

impl Positions {
    pub fn new(network: &Network) -> Self {
        let &Network { n_machines, per_machine: per, within, .. } = network;
        let n = n_machines * per;
        let between = if n_machines > 1 { network.between } else { within };
        let slow = |m: f64| 4.0 * (m - 1.0) / (between * m * m);
        let fast = |m: f64| 4.0 * (m - 1.0) / (within * m * m);
        // q devices on each of g machines: within machines, then between them.
        let both = |q: f64, g: f64| (fast(q) / g + 4.0 * (g - 1.0) / (between * g * g * q)).min(slow(q * g));
        let mut used: Vec<usize> = (0..=n).collect();
        let mut skip: Vec<Option<usize>> = (0..=n).map(|p| (p % per > 0).then(|| p.div_ceil(per) * per)).collect();
        let mut shared = Vec::new();
        for g in 2..=n_machines {
            for u in 0..=n_machines - g {
                let first = used.len();
                for o in 1..per {
                    used.push(u * per + g * o);
                    skip.push(Some((u + g) * per));
                }
                shared.push((g, u, first));
            }
        }
        let mut moves = Vec::new();
        for from in 0..n {
            for m in 1..=n - from {
                let to = from + m;
                let inside = from / per == (to - 1) / per;
                let (head, tail) = (per - from % per, (to - 1) % per + 1);
                let crossed = (to - 1) / per - from / per + 1;
                let even = head == tail && (crossed == 2 || head == per);
                let per_param = if inside {
                    fast(m as f64)
                } else if even {
                    both(head as f64, crossed as f64)
                } else {
                    slow(m as f64)
                };
                let near_before = inside && from % per > 0;
                let near_after = inside && to % per > 0;
                let devices = (from..to).collect();
                let per_compute = 1.0 / m as f64;
                moves.push(Move {
                    from,
                    to,
                    replicas: m as u32,
                    per_compute,
                    per_param,
                    near_before,
                    near_after,
                    devices,
                });
            }
        }
        for &(g, u, first) in &shared {
            let at = |o: usize| match o {
                0 => u * per,
                o if o == per => (u + g) * per,
                o => first + o - 1,
            };
            for o in 0..per {
                // All devices of all machines are a place among the first kind.
                for q in (1..=per - o).filter(|&q| q < per) {
                    moves.push(Move {
                        from: at(o),
                        to: at(o + q),
                        replicas: (g * q) as u32,
                        per_compute: 1.0 / (g * q) as f64,
                        per_param: both(q as f64, g as f64),
                        near_before: o > 0,
                        near_after: o + q < per,
                        devices: (u..u + g).flat_map(|k| k * per + o..k * per + o + q).collect(),
                    });
                }
            }
        }
        // Those that are of use at the same time stand together.
        moves.sort_by_key(|m| (used[m.from], m.from));
        let begins = |p: usize| moves.partition_point(|m| (used[m.from], m.from) < (used[p], p));
        let ends = |p: usize| moves.partition_point(|m| (used[m.from], m.from) <= (used[p], p));
        let from = (0..used.len()).map(|p| begins(p)..ends(p)).collect();
        Self { moves, from, used, skip }
    }
}
