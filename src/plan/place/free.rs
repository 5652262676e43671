//! Placement without contiguity: any cluster on any device.
//!
//! A population of assignments, each from annealing on ever finer clusters. A child is made of two parents: what both
//! keep together may become one cluster, so that annealing decides where the parents disagree and how the parts they
//! agree on are put together.
//!
//! # Source
//! Multilevel partitioning (Karypis, Kumar, "A fast and high quality multilevel scheme", SISC 1998), recombination as in
//! KaFFPaE (Sanders, Schulz, "Distributed evolutionary graph partitioning", ALENEX 2012), with the exact bottleneck load
//! in place of the cut and annealing in place of local search.

use super::anneal::{Heat, anneal};
use super::bound::Bound;
use super::clusters::Clusters;
use super::loads::{Loads, Shape};
use super::problem::{Device, Devices, Problem};
use super::{Infeasible, NEAR, Placement};
use crate::plan::random::Random;

/// Assignments kept.
const POPULATION: usize = 20;
/// The first look at the bound is after so many moves, the next ones each time that there were twice as many.
const PROOF: u64 = 1 << 20;
/// Effort for the bound over all moves so far: about a fifth of the time.
const SHARE: u64 = 5;
/// Temperature that forgets where it came from.
const HOT: f64 = 0.2;
const COLD: f64 = 3e-5;
/// Most moves of one child: an answer to `stop` and to the first second on large graphs.
const MOVES: f64 = 4e6;

/// How one child is made.
#[derive(Clone, Copy, Debug)]
struct Recipe {
    /// Clusters on the coarsest level.
    coarsest: f64,
    warm: f64,
    moves_per_cluster: f64,
    sharpness: f64,
    coarse_sharpness: f64,
    price: f64,
}

/// Where the clusters went.
#[derive(Clone, Debug, PartialEq)]
struct Found {
    /// Largest load; infinite when no assignment fits.
    load: f64,
    device: Vec<u32>,
}

/// Finds devices for the smallest largest load, contiguous or not.
///
/// Searches until `stop`, or until the load is at the bound. The result is no worse than the best of `seeds`: placements
/// to begin with, by op, such as that of [`super::contiguous`].
///
/// # Errors
/// [`Infeasible`]; with [`Infeasible::NotFound`] there may be a placement all the same.
pub fn free(problem: &Problem, seeds: &[&[Device]], stop: &mut dyn FnMut() -> bool) -> Result<Placement, Infeasible> {
    Infeasible::check(problem)?;
    let (clusters, of) = Clusters::of_problem(problem);
    let devices = problem.devices().at_most(clusters.len());
    let k = devices.n_accelerators;
    let number = |device: &Device| match *device {
        Device::Accelerator(d) => d as u32,
        Device::Host(d) => (k + d) as u32,
    };
    let seeds: Vec<Vec<u32>> = seeds
        .iter()
        .map(|seed| {
            let mut device = vec![0; clusters.len()];
            seed.iter().zip(&of).for_each(|(d, &c)| device[c] = number(d));
            device
        })
        .collect();
    let (found, bound) = Search::new(&clusters, devices).run(&seeds, stop);
    if found.load.is_infinite() {
        let Devices { n_accelerators, memory, .. } = problem.devices();
        return Err(Infeasible::NotFound { n_accelerators, memory });
    }
    let place = |d: usize| if d < k { Device::Accelerator(d) } else { Device::Host(d - k) };
    let device = of.iter().map(|&c| place(found.device[c] as usize)).collect();
    Ok(Placement { device, cost: found.load, bound: bound.min(found.load) })
}

/// A population and what is needed to make the next child.
struct Search<'a> {
    clusters: &'a Clusters,
    devices: Devices,
    shape: Shape,
    random: Random,
    population: Vec<Found>,
    /// Those of children that were kept.
    recipes: Vec<Recipe>,
    n_moves: u64,
}

impl<'a> Search<'a> {
    fn new(clusters: &'a Clusters, devices: Devices) -> Self {
        Self {
            clusters,
            devices,
            shape: Shape::new(clusters, devices),
            random: Random::new(clusters.len() as u64),
            population: Vec::new(),
            recipes: Vec::new(),
            n_moves: 0,
        }
    }

    /// The best assignment of clusters, accelerators numbered first, and a bound on the load of all.
    fn run(mut self, seeds: &[Vec<u32>], stop: &mut dyn FnMut() -> bool) -> (Found, f64) {
        let mut best = Found { load: f64::INFINITY, device: Vec::new() };
        let mut bound = Bound::new(self.clusters, self.devices);
        let mut proof = PROOF;
        // For which load the bound is as good as it gets.
        let mut proven = f64::INFINITY;
        for n_children in 0.. {
            let recipe = self.recipe();
            let child = match seeds.get(n_children) {
                Some(seed) => {
                    let mut device = seed.clone();
                    let heat = recipe.heat(&self.shape, COLD, 1.0);
                    let load = anneal(&self.shape, &mut device, None, &heat, &mut self.random, stop);
                    Found { load, device }
                }
                None => self.child(&recipe, stop),
            };
            if best.device.is_empty() || child.load < best.load * (1.0 - 1e-12) {
                best = child.clone();
            }
            if self.n_moves >= proof && best.load < proven {
                let sets =
                    (0..self.devices.n_accelerators).map(|d| best.device.iter().map(|&x| x as usize == d).collect());
                let sets: Vec<Vec<bool>> = sets.collect();
                let left = bound.raise(best.load, &sets, SHARE * self.n_moves, stop);
                proof = 2 * self.n_moves;
                if left > 0 {
                    proven = best.load;
                }
            }
            if stop() || best.load <= bound.value * (1.0 + NEAR) {
                break;
            }
            self.keep(child, recipe);
        }
        (best, bound.value)
    }

    fn recipe(&mut self) -> Recipe {
        let n = self.recipes.len();
        if n >= POPULATION / 2 && self.random.below(2) == 0 {
            self.recipes[self.random.below(n)].varied(&mut self.random)
        } else {
            Recipe::any(&mut self.random)
        }
    }

    /// From nothing while there are few; then of two parents, or of one: warmed up, taken apart and put together anew, or
    /// changed on some devices only.
    fn child(&mut self, recipe: &Recipe, stop: &mut dyn FnMut() -> bool) -> Found {
        let n = self.clusters.len();
        if self.population.len() < POPULATION {
            return self.cycle(vec![0; n], None, None, HOT, recipe, stop);
        }
        let mut pair = [self.random.below(POPULATION), self.random.below(POPULATION - 1)];
        pair[1] += usize::from(pair[1] >= pair[0]);
        pair.sort_by(|&a, &b| self.population[a].load.total_cmp(&self.population[b].load));
        let [one, other] = pair.map(|i| self.population[i].device.clone());
        let kind = self.random.below(4);
        let among = (kind == 3).then(|| some_devices(&self.shape, &one, &mut self.random));
        let label = |v: usize| u64::from(one[v]) << 32 | if kind == 0 { u64::from(other[v]) } else { 0 };
        let labels = (0..n).map(label).collect();
        let start = if kind == 2 { HOT } else { recipe.warm };
        self.cycle(labels, Some(one), among.as_deref(), start, recipe, stop)
    }

    /// Coarsens clusters of one label, anneals on the coarsest level, then on every finer one.
    fn cycle(
        &mut self,
        mut labels: Vec<u64>,
        mut device: Option<Vec<u32>>,
        among: Option<&[bool]>,
        start: f64,
        recipe: &Recipe,
        stop: &mut dyn FnMut() -> bool,
    ) -> Found {
        let coarsest = recipe.coarsest as usize;
        let mut levels: Vec<(Clusters, Vec<usize>)> = Vec::new();
        let mut current = self.clusters.clone();
        while current.len() > coarsest {
            let (map, n) = matched(&current, &labels, coarsest.max(current.len() / 2), &mut self.random);
            if n as f64 > 0.95 * current.len() as f64 {
                break;
            }
            labels = carried(&labels, &map, n);
            device = device.map(|d| carried(&d, &map, n));
            let next = current.merged(&map, n);
            levels.push((current, map));
            current = next;
        }
        let mut shape = Shape::new(&current, self.devices);
        let mut device = device.unwrap_or_else(|| anywhere(&shape, &mut self.random));
        let mut heat = Heat { sharpness: recipe.coarse_sharpness as u32, ..recipe.heat(&shape, start, 4.0) };
        loop {
            self.n_moves += heat.n_moves;
            let load = anneal(&shape, &mut device, among, &heat, &mut self.random, stop);
            let Some((finer, map)) = levels.pop() else { return Found { load, device } };
            device = map.iter().map(|&c| device[c]).collect();
            shape = Shape::new(&finer, self.devices);
            heat = recipe.heat(&shape, recipe.warm, 1.0);
        }
    }

    /// Takes a child in, in place of the worst, unless there is one as good.
    fn keep(&mut self, child: Found, recipe: Recipe) {
        if self.population.iter().any(|p| (p.load - child.load).abs() <= 1e-12 * child.load) {
            return;
        }
        if self.population.len() < POPULATION {
            self.population.push(child);
        } else if let Some(worst) = self.population.iter_mut().max_by(|a, b| a.load.total_cmp(&b.load))
            && child.load < worst.load
        {
            *worst = child;
            if self.recipes.len() == 2 * POPULATION {
                self.recipes.remove(0);
            }
            self.recipes.push(recipe);
        }
    }
}

/// The busiest device and some others.
fn some_devices(shape: &Shape, device: &[u32], random: &mut Random) -> Vec<bool> {
    let n = shape.n_devices;
    let loads = Loads::new(shape, device);
    let mut among = vec![false; n];
    let worst = (0..n).max_by(|&a, &b| loads.load(a).total_cmp(&loads.load(b))).unwrap_or(0);
    among[worst] = true;
    for _ in 0..1 + random.below(3) {
        among[random.below(n)] = true;
    }
    among
}

/// Values of merged items: all members have the same.
fn carried<T: Copy + Default>(values: &[T], map: &[usize], n: usize) -> Vec<T> {
    let mut out = vec![T::default(); n];
    values.iter().zip(map).for_each(|(&v, &c)| out[c] = v);
    out
}

/// Pairs clusters of one label that share the dearest nets, down to `target` clusters.
fn matched(clusters: &Clusters, labels: &[u64], target: usize, random: &mut Random) -> (Vec<usize>, usize) {
    let n = clusters.len();
    let weight = |v: usize| {
        let time = clusters.accelerator[v];
        if time.is_finite() { time } else { clusters.host[v] }
    };
    let total: f64 = (0..n).map(weight).sum();
    let heaviest = 2.0 * total / target as f64;
    let nets_of = clusters.nets_of();
    let mut order: Vec<usize> = (0..n).collect();
    random.shuffle(&mut order);
    let mut mate: Vec<usize> = (0..n).collect();
    let mut taken = vec![false; n];
    let mut tie = vec![0.0; n];
    let mut near = Vec::new();
    let mut left = n;
    for v in order {
        if left <= target {
            break;
        }
        if taken[v] {
            continue;
        }
        for &net in &nets_of[v] {
            let (cost, pins) = &clusters.nets[net];
            for &u in pins.iter().filter(|&&u| u != v && !taken[u] && labels[u] == labels[v]) {
                if tie[u] == 0.0 {
                    near.push(u);
                }
                tie[u] += cost / (pins.len() - 1) as f64;
            }
        }
        let mut best = (0.0, v);
        for u in near.drain(..) {
            let both = weight(u) + weight(v);
            let score = tie[u] / (both + 1e-3 * total).sqrt() * (0.5 + random.unit());
            tie[u] = 0.0;
            let alike = clusters.accelerator[u].is_finite() == clusters.accelerator[v].is_finite();
            if score > best.0 && both <= heaviest && alike {
                best = (score, u);
            }
        }
        if best.1 != v {
            (taken[v], taken[best.1]) = (true, true);
            mate[best.1] = v;
            left -= 1;
        }
    }
    let mut number = vec![0; n];
    let mut next = 0;
    for v in 0..n {
        if mate[v] == v {
            number[v] = next;
            next += 1;
        }
    }
    (mate.into_iter().map(|v| number[v]).collect(), next)
}

/// Any accelerator for what runs there, any host for the rest.
fn anywhere(shape: &Shape, random: &mut Random) -> Vec<u32> {
    let (k, all) = (shape.n_accelerators, shape.n_devices);
    (0..shape.len())
        .map(|v| {
            let accelerated = k > 0 && shape.time(v, 0).is_finite();
            (if accelerated { random.below(k) } else { k + random.below(all - k) }) as u32
        })
        .collect()
}

impl Recipe {
    fn any(random: &mut Random) -> Self {
        let mut between = |low: f64, high: f64| low * (high / low).powf(random.unit());
        Self {
            coarsest: between(10.0, 80.0),
            warm: between(2e-4, 2e-2),
            moves_per_cluster: between(30.0, 600.0),
            sharpness: between(32.0, 256.0).log2().round(),
            coarse_sharpness: between(4.0, 32.0).log2().round(),
            price: between(3.0, 100.0),
        }
    }

    /// A recipe near one that worked.
    fn varied(mut self, random: &mut Random) -> Self {
        for value in [&mut self.coarsest, &mut self.warm, &mut self.moves_per_cluster] {
            *value *= 4.0_f64.powf(random.unit() - 0.5);
        }
        self
    }

    fn heat(&self, shape: &Shape, start: f64, effort: f64) -> Heat {
        let n_moves = (self.moves_per_cluster * effort * shape.len() as f64).min(MOVES) as u64;
        Heat { start, end: COLD, n_moves, sharpness: self.sharpness as u32, price: self.price }
    }
}
