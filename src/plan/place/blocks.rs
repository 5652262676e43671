//! Search for blocks with a short latency.

use super::lattice::{Downsets, Lattice};
use super::timeline::{Scratch, Timeline};
use super::loads::Loads;
use super::problem::adjacency;
use super::random::Random;
use super::stages::{Effort, Unfinished};

/// Downsets that a seed is built on.
const SEED_CUTS: usize = 3000;
/// Host stretches of this many clusters at once; longer ones are made of several.
const STRETCH: u32 = 8;

/// Blocks one after the other: the fewest time when nothing runs beside anything else.
///
/// Device of every cluster; the host is number `n_accelerators`.
pub fn serial(timeline: &Timeline, beside: bool, stop: &mut dyn FnMut() -> bool) -> Option<Vec<u32>> {
    let n = timeline.clusters().len();
    let mut width = n.max(1);
    loop {
        let mut edges = timeline.stream.edges.clone();
        edges.extend((width..n).map(|i| (i - width, i)));
        edges.sort_unstable();
        edges.dedup();
        let lattice = Lattice::new(timeline.clusters(), &edges);
        let all = [(f64::NEG_INFINITY, f64::INFINITY)];
        let mut effort = Effort { n_downsets: SEED_CUTS, n_steps: u64::MAX };
        match lattice.downsets(&all, |_| true, &mut effort, stop) {
            Ok(downsets) => return chain(timeline, &downsets, beside),
            Err(Unfinished::TooMany) if width > 1 => width /= 2,
            Err(_) => return None,
        }
    }
}

fn chain(timeline: &Timeline, downsets: &Downsets, beside: bool) -> Option<Vec<u32>> {
    let k = timeline.n_accelerators;
    let n = timeline.clusters().len();
    let mut depth = timeline.clusters().host.clone();
    for &(a, b) in &timeline.stream.edges {
        depth[b] = depth[b].max(depth[a] + timeline.clusters().host[b]);
    }
    let reach: Vec<f64> = (0..downsets.len())
        .map(|i| super::bits::ones(downsets.members(i)).map(|v| depth[v]).fold(0.0, f64::max))
        .collect();
    // Time by number of blocks; where from, and whether by a block.
    let mut time = vec![f64::INFINITY; downsets.len() * (k + 1)];
    let mut from = vec![(u32::MAX, false); time.len()];
    for (i, up) in downsets.sums.iter().enumerate() {
        if up.n == 0 {
            time[i * (k + 1)..(i + 1) * (k + 1)].fill(0.0);
        }
        for j in (0..downsets.len()).filter(|&j| j != i) {
            let down = &downsets.sums[j];
            if down.accelerator > up.accelerator * (1.0 + 1e-12) {
                break;
            }
            if down.n >= up.n || !downsets.within(j, i) {
                continue;
            }
            let host = if beside { reach[i] - reach[j] } else { up.host - down.host };
            if up.n - down.n <= STRETCH {
                for a in 0..=k {
                    let t = time[j * (k + 1) + a] + host;
                    if t < time[i * (k + 1) + a] {
                        time[i * (k + 1) + a] = t;
                        from[i * (k + 1) + a] = (j as u32, false);
                    }
                }
            }
            if up.n_bound == down.n_bound && up.bytes - down.bytes <= timeline.memory {
                let block = up.accelerator - down.accelerator + downsets.transfers(j, i);
                for a in 0..k {
                    let t = time[j * (k + 1) + a] + block;
                    if t < time[i * (k + 1) + a + 1] {
                        time[i * (k + 1) + a + 1] = t;
                        from[i * (k + 1) + a + 1] = (j as u32, true);
                    }
                }
            }
        }
    }
    let mut at = downsets.sums.iter().position(|up| up.n as usize == n)?;
    let mut blocks = (0..=k).min_by(|&a, &b| time[at * (k + 1) + a].total_cmp(&time[at * (k + 1) + b]))?;
    let mut device = vec![k as u32; n];
    while downsets.sums[at].n > 0 {
        let (before, block) = from[at * (k + 1) + blocks];
        if before == u32::MAX {
            return None;
        }
        if block {
            blocks -= 1;
            let (large, small) = (downsets.members(at), downsets.members(before as usize));
            for v in (0..n).filter(|&v| super::bits::has(large, v) && !super::bits::has(small, v)) {
                device[v] = blocks as u32;
            }
        }
        at = before as usize;
    }
    Some(device)
}

/// Where the clusters went, and when the last op ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Infinite when nothing fits.
    pub latency: f64,
    pub device: Vec<u32>,
}

/// Anneals moves of clusters and of what hangs on them, again and again, until `stop`.
pub fn search(
    timeline: &Timeline,
    seed: u64,
    stop: &mut dyn FnMut() -> bool,
    better: &mut dyn FnMut(&Blocks),
) -> Blocks {
    let k = timeline.n_accelerators as u32;
    let n = timeline.clusters().len();
    let mut random = Random::new(seed);
    let shape = timeline.shape();
    let mut scratch = Scratch::default();
    let hosts = vec![k; n];
    let latency = timeline.latency(&Loads::new(&shape, &hosts), &mut scratch).unwrap_or(f64::INFINITY);
    let mut best = Blocks { latency, device: hosts };
    better(&best);
    for beside in [false, true] {
        let Some(device) = serial(timeline, beside, stop) else { continue };
        let loads = Loads::new(&shape, &device);
        if let Some(latency) = timeline.latency(&loads, &mut scratch).filter(|&l| loads.fits() && l < best.latency) {
            best = Blocks { latency, device };
            better(&best);
        }
    }
    let edges = &timeline.stream.edges;
    let near = [adjacency(n, edges.iter().map(|&(a, b)| (b, a))), adjacency(n, edges.iter().copied())];
    let mut upstream = vec![super::bits::Bits::new(n); n];
    for v in 0..n {
        upstream[v].set(v);
        for &u in &near[0][v] { let x = upstream[u].clone(); upstream[v].merge(&x); }
    }
    let mut downstream = vec![super::bits::Bits::new(n); n];
    for v in (0..n).rev() {
        downstream[v].set(v);
        for &u in &near[1][v] { let x = downstream[u].clone(); downstream[v].merge(&x); }
    }
    let mut moving = Vec::new();
    let mut current = best.clone();
    let mut seen = vec![0_u32; n];
    let mut stamp = 0;
    while !stop() && n > 0 {
        let start = 0.002 * std::env::var("RT").map_or(25.0, |v| v.parse::<f64>().unwrap()).powf(random.unit());
        if random.below(4) > 0 {
            current = best.clone();
        }
        let n_moves = std::env::var("NM").map_or(20000, |v| v.parse::<i32>().unwrap());
        let mut loads = Loads::new(&shape, &current.device);
        let mut energy = current.latency;
        let mut temperature = start;
        let cooling = (1e-4_f64 / start).powf(1.0 / n_moves as f64);
        for step in 0..n_moves {
            temperature *= cooling;
            if step % 256 == 0 {
                loads.recount();
                if stop() {
                    break;
                }
            }
            let v = random.below(n);
            let from = loads.device(v) as u32;
            let side = random.below(2);
            let neighbours = &near[side];
            let to = match random.below(16) {
                0 => k,
                1 => random.below(k as usize + 1) as u32,
                _ if neighbours[v].is_empty() => k,
                _ => loads.device(neighbours[v][random.below(neighbours[v].len())]) as u32,
            };
            if random.below(3) == 0 {
                // A region between two clusters, to whichever device.
                let mut w = v;
                for _ in 0..1 << random.below(7) {
                    if near[1][w].is_empty() {
                        break;
                    }
                    w = near[1][w][random.below(near[1][w].len())];
                }
                moving.clear();
                for u in downstream[v].common(&upstream[w]).iter() {
                    moving.push(u);
                }
                let to = match random.below(4) {
                    0 => k,
                    1 => loads.device(w) as u32,
                    2 => loads.device(v) as u32,
                    _ => (0..k).find(|&d| loads.load(d as usize) < 1e-9 && loads.bytes(d as usize) < 1.0).unwrap_or(k),
                };
                if to < k && moving.iter().any(|&u| !shape.time(u, to as usize).is_finite()) {
                    continue;
                }
                let old: Vec<u32> = moving.iter().map(|&u| loads.device(u) as u32).collect();
                if old.iter().all(|&d| d == to) { continue; }
                for &u in &moving {
                    if loads.device(u) as u32 != to {
                        let change = loads.change(u, to as usize);
                        loads.apply(u, to as usize, change);
                    }
                }
                let after = timeline.latency(&loads, &mut scratch).map_or(f64::INFINITY, |l| {
                    let excess: f64 =
                        (0..k as usize).map(|d| (loads.bytes(d) - shape.memory).max(0.0) / shape.memory).sum();
                    l * (1.0 + 4.0 * excess)
                });
                let relative = (after / energy - 1.0) / temperature;
                if relative <= 0.0 || (relative < 20.0 && random.unit() < (-relative).exp()) {
                    energy = after;
                    if after < best.latency * (1.0 - 1e-12) && loads.fits() {
                        best = Blocks { latency: after, device: loads.assignment().to_vec() };
                        better(&best);
                    }
                } else {
                    for (&u, &d) in moving.iter().zip(&old) {
                        if d != to {
                            let change = loads.change(u, d as usize);
                            loads.apply(u, d as usize, change);
                        }
                    }
                }
                continue;
            }
            // What lies between v and the border on this side goes along.
            moving.clear();
            moving.push(v);
            stamp += 1;
            seen[v] = stamp;
            let alone = random.below(3) == 0;
            let mut at = 0;
            while at < moving.len() && !alone {
                for &u in &neighbours[moving[at]] {
                    if seen[u] != stamp && loads.device(u) as u32 == from {
                        seen[u] = stamp;
                        moving.push(u);
                    }
                }
                at += 1;
            }
            if to == from {
                continue;
            }
            if to < k && moving.iter().any(|&u| !shape.time(u, to as usize).is_finite()) {
                continue;
            }
            for &u in &moving {
                let change = loads.change(u, to as usize);
                loads.apply(u, to as usize, change);
            }
            let after = timeline.latency(&loads, &mut scratch).map_or(f64::INFINITY, |l| {
                let excess: f64 =
                    (0..k as usize).map(|d| (loads.bytes(d) - shape.memory).max(0.0) / shape.memory).sum();
                l * (1.0 + 4.0 * excess)
            });
            let relative = (after / energy - 1.0) / temperature;
            if relative <= 0.0 || (relative < 20.0 && random.unit() < (-relative).exp()) {
                energy = after;
                if after < best.latency * (1.0 - 1e-12) && loads.fits() {
                    best = Blocks { latency: after, device: loads.assignment().to_vec() };
                    better(&best);
                }
            } else {
                for &u in &moving {
                    let change = loads.change(u, from as usize);
                    loads.apply(u, from as usize, change);
                }
            }
        }
        current = Blocks { latency: energy, device: loads.assignment().to_vec() };
    }
    best
}
