//! Simulated annealing of single moves and exchanges.

use super::loads::{Loads, Shape};
use crate::plan::random::Random;

/// One run of annealing.
///
/// # Units
/// Temperatures are relative: at temperature 0.01 a move that makes the norm of the loads 1 % larger passes with
/// probability 1/e.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heat {
    pub start: f64,
    pub end: f64,
    pub n_moves: u64,
    /// The norm's exponent is 2 to this power: what counts is the norm of all loads, which is smoother than the largest.
    pub sharpness: u32,
    /// Load that takes an accelerator's whole memory, for what exceeds it, in multiples of the busiest device's.
    pub price: f64,
}

/// Moves between looks at the temperature and the caller's `stop`.
const STRIDE: u64 = 1024;
/// Strides between sums from scratch.
const RECOUNT: u64 = 64;
/// Temperatures are above this.
const COLD: f64 = 1e-9;

/// Moves clusters one by one, exchanges two now and then, keeps the best assignment met that fits, and returns its largest load.
///
/// Only devices of `among` give or get clusters.
/// Infinite, with the last assignment, when none fits.
pub fn anneal(
    shape: &Shape,
    device: &mut Vec<u32>,
    among: Option<&[bool]>,
    heat: &Heat,
    random: &mut Random,
    stop: &mut dyn FnMut() -> bool,
) -> f64 {
    let n_devices = shape.n_devices;
    let open = |d: usize| among.is_none_or(|among| among[d]);
    let movable: Vec<u32> = (0..shape.len() as u32).filter(|&v| open(device[v as usize] as usize)).collect();
    let n = movable.len();
    let mut loads = Loads::new(shape, device);
    let mut best = if loads.fits() { loads.worst() } else { f64::INFINITY };
    if n == 0 || n_devices < 2 {
        return best;
    }
    let mut best_device = device.clone();
    let scarce = shape.memory_binds();
    let exponent = f64::from(1_u32 << heat.sharpness);
    let mut price = 0.0;
    let mut terms = vec![0.0; n_devices];
    let mut temperature = heat.start.max(COLD);
    let n_strides = heat.n_moves.div_ceil(STRIDE).max(1);
    let cooling = (heat.end.max(COLD) / temperature).powf(1.0 / n_strides as f64);
    for stride in 0..n_strides {
        if stride % RECOUNT == 0 {
            loads.recount();
            price = heat.price * loads.worst() / shape.memory.max(1.0);
        }
        let excess = |device: usize, bytes: f64| {
            if scarce && shape.accelerated(device) { (bytes - shape.memory).max(0.0) * price } else { 0.0 }
        };
        // Terms of a large power stay finite when they are about one or less.
        let carried = |d: usize| loads.load(d) + excess(d, loads.bytes(d));
        let reference = (0..n_devices).map(carried).fold(f64::MIN_POSITIVE, f64::max);
        let term = |load: f64, excess: f64| {
            let mut x = (load + excess) / reference;
            for _ in 0..heat.sharpness {
                x *= x;
            }
            x
        };
        for (d, slot) in terms.iter_mut().enumerate() {
            *slot = term(loads.load(d), excess(d, loads.bytes(d)));
        }
        let mut norm: f64 = terms.iter().sum();
        temperature *= cooling;
        if stop() {
            break;
        }
        for _ in 0..STRIDE {
            let bits = random.bits();
            let cluster = movable[below(bits as u32, n)] as usize;
            let from = loads.device(cluster);
            // Where clusters are heavy, no single move keeps the balance.
            let exchange = bits >> 35 & 3 == 0;
            let (to, other) = if exchange {
                let other = movable[random.below(n)] as usize;
                (loads.device(other), Some(other))
            } else {
                (destination(shape, &loads, cluster, (bits >> 32) as u32, random), None)
            };
            let runs = |cluster: usize, d: usize| shape.time(cluster, d).is_finite();
            if to == from || !open(to) || !runs(cluster, to) || other.is_some_and(|o| !runs(o, from)) {
                continue;
            }
            let change = loads.change(cluster, to);
            let mut sums =
                [(loads.load(from) + change.0, loads.bytes(from)), (loads.load(to) + change.1, loads.bytes(to))];
            let bytes = shape.bytes(cluster) - other.map_or(0.0, |o| shape.bytes(o));
            sums[0].1 -= bytes;
            sums[1].1 += bytes;
            let mut back = (0.0, 0.0);
            if let Some(other) = other {
                loads.apply(cluster, to, change);
                back = loads.change(other, from);
                sums[0].0 += back.1;
                sums[1].0 += back.0;
            }
            let left = term(sums[0].0, excess(from, sums[0].1));
            let entered = term(sums[1].0, excess(to, sums[1].1));
            let rise = left + entered - terms[from] - terms[to];
            let relative = rise / (exponent * norm * temperature);
            if relative > 0.0 && (relative > 20.0 || random.unit() >= (-relative).exp()) {
                if other.is_some() {
                    loads.apply(cluster, from, (-change.1, -change.0));
                }
                continue;
            }
            match other {
                Some(other) => loads.apply(other, from, back),
                None => loads.apply(cluster, to, change),
            }
            (terms[from], terms[to]) = (left, entered);
            norm += rise;
            if rise < 0.0 && loads.worst() < best * (1.0 - 1e-12) && loads.fits() {
                best = loads.worst();
                best_device.copy_from_slice(loads.assignment());
            }
        }
    }
    if best.is_finite() {
        *device = best_device;
    } else {
        device.copy_from_slice(loads.assignment());
    }
    best
}

/// A device that shares a net with the cluster, now and then any.
#[inline]
fn destination(shape: &Shape, loads: &Loads<'_>, cluster: usize, bits: u32, random: &mut Random) -> usize {
    let nets = shape.nets_of(cluster);
    if nets.is_empty() || bits & 7 == 0 {
        return below(bits, shape.n_devices);
    }
    let pins = shape.pins_of(nets[below(bits, nets.len())] as usize);
    loads.device(pins[random.below(pins.len())] as usize)
}

/// One of `0..n`.
#[inline]
fn below(bits: u32, n: usize) -> usize {
    ((u64::from(bits) * n as u64) >> 32) as usize
}
