//! First partitions of small graphs: bisection by growing, and bisection again for more blocks.

use super::blocks::Blocks;
use super::coarsen::coarsen;
use super::graph::Weighted;
use super::queue::Queues;
use super::refine::Search;
use crate::plan::random::Random;

/// Bisections start on graphs of about this many vertices.
const SMALL: usize = 60;
const TRIES: usize = 8;

/// Blocks of every vertex by recursive bisection.
///
/// `limit`: most weight of a block. Blocks may exceed it where vertices are heavy; none is empty where there are at
/// least `n_blocks` vertices.
pub(super) fn recursive(graph: &Weighted, n_blocks: usize, limit: i64, random: &mut Random) -> Vec<u32> {
    let mut of = vec![0; graph.n_vertices()];
    let vertices: Vec<u32> = (0..graph.n_vertices() as u32).collect();
    split(graph.clone(), &vertices, n_blocks, 0, limit, random, &mut of);
    of
}

fn split(graph: Weighted, names: &[u32], n_blocks: usize, first: u32, limit: i64, random: &mut Random, of: &mut [u32]) {
    if n_blocks == 1 {
        for &v in names {
            of[v as usize] = first;
        }
        return;
    }
    let n_left = n_blocks / 2;
    let sides = [n_left, n_blocks - n_left];
    let total = graph.total_weight();
    // Slack is shared by the levels of the recursion.
    let depth = f64::from(usize::BITS - (n_blocks - 1).leading_zeros());
    let slack = (limit as f64 * n_blocks as f64 / total.max(1) as f64).powf(1.0 / depth).max(1.0);
    let heaviest = (0..graph.n_vertices() as u32).map(|v| graph.vertex_weight(v)).max().unwrap_or(0);
    let limits = sides.map(|k| {
        let even = total as f64 * k as f64 / n_blocks as f64;
        let most = limit.saturating_mul(k as i64).min(total);
        ((even * slack) as i64).max(even as i64 + heaviest).min(most).max(even.ceil() as i64)
    });
    let mut side = bisect(&graph, limits, random);
    keep_enough(&graph, &mut side, sides);
    let mut number = vec![u32::MAX; graph.n_vertices()];
    for (s, k) in sides.into_iter().enumerate() {
        let mine: Vec<u32> = (0..graph.n_vertices() as u32).filter(|&v| side[v as usize] as usize == s).collect();
        let part = graph.induced(&mine, &mut number);
        let names: Vec<u32> = mine.iter().map(|&v| names[v as usize]).collect();
        split(part, &names, k, first + (s * n_left) as u32, limit, random, of);
    }
}

/// Each side has at least as many vertices as it will have blocks: the lightest change sides.
fn keep_enough(graph: &Weighted, side: &mut [u32], least: [usize; 2]) {
    for s in 0..2u32 {
        let have = side.iter().filter(|&&x| x == s).count();
        let other_has = side.len() - have;
        let lack = least[s as usize].saturating_sub(have).min(other_has.saturating_sub(least[1 - s as usize]));
        if lack > 0 {
            let mut others: Vec<u32> = (0..side.len() as u32).filter(|&v| side[v as usize] != s).collect();
            others.sort_by_key(|&v| graph.vertex_weight(v));
            for &v in &others[..lack] {
                side[v as usize] = s;
            }
        }
    }
}

/// Two sides within `limits`, where possible.
fn bisect(graph: &Weighted, limits: [i64; 2], random: &mut Random) -> Vec<u32> {
    let mut levels = Vec::new();
    let mut current = graph.clone();
    let cap = (graph.total_weight() / (SMALL as i64 / 2)).max(1);
    while current.n_vertices() > SMALL {
        let (coarse, map) = coarsen(&current, cap, random);
        if coarse.n_vertices() * 20 > current.n_vertices() * 19 {
            break;
        }
        levels.push((std::mem::replace(&mut current, coarse), map));
    }
    let mut best: Option<((i64, i64), Vec<u32>)> = None;
    for _ in 0..TRIES {
        let mut blocks = Blocks::new(&current, grow(&current, limits, random), limits.to_vec());
        let mut search = Search::new(&blocks);
        search.rebalance(&mut blocks);
        while search.along_border(&mut blocks, 40, random) > 0 {}
        let key = (blocks.excess(), blocks.cut());
        if best.as_ref().is_none_or(|(b, _)| key < *b) {
            best = Some((key, blocks.of));
        }
    }
    let mut of = best.map_or_else(|| vec![0; current.n_vertices()], |(_, of)| of);
    while let Some((finer, map)) = levels.pop() {
        let fine = map.iter().map(|&c| of[c as usize]).collect();
        let mut blocks = Blocks::new(&finer, fine, limits.to_vec());
        let mut search = Search::new(&blocks);
        search.rebalance(&mut blocks);
        while search.along_border(&mut blocks, 60, random) > 0 {}
        of = blocks.of;
    }
    of
}

/// Grows side 0 from a random vertex, always by the vertex that leaves the smallest cut, up to its share.
fn grow(graph: &Weighted, limits: [i64; 2], random: &mut Random) -> Vec<u32> {
    let n = graph.n_vertices();
    let total = graph.total_weight();
    let share = (total as f64 * limits[0] as f64 / (limits[0] + limits[1]).max(1) as f64) as i64;
    let mut side = vec![1u32; n];
    let mut queue = Queues::new(n, 1);
    let mut weight = 0;
    let mut unseen: Vec<u32> = (0..n as u32).collect();
    random.shuffle(&mut unseen);
    while weight < share {
        let v = match queue.best(|_, _| true) {
            Some((_, _, v)) => {
                queue.remove(v);
                v
            }
            None => match unseen.pop() {
                Some(v) if side[v as usize] == 1 => v,
                Some(_) => continue,
                None => break,
            },
        };
        if weight > 0 && weight + graph.vertex_weight(v) > limits[0] {
            continue;
        }
        side[v as usize] = 0;
        weight += graph.vertex_weight(v);
        for (u, _) in graph.neighbours(v) {
            if side[u as usize] == 1 {
                let gain = graph.neighbours(u).map(|(x, w)| if side[x as usize] == 0 { w } else { -w }).sum();
                queue.set(u, 0, gain);
            }
        }
    }
    side
}
