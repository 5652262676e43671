//! Fiduccia-Mattheyses search for k blocks.

use super::blocks::Blocks;
use super::queue::Queues;
use crate::plan::random::Random;

/// Scratch space of a search.
pub(super) struct Search {
    queues: Queues,
    /// Round in which a vertex was moved last.
    moved_in: Vec<u32>,
    round: u32,
    log: Vec<(u32, u32)>,
    /// Ends of edges looked at.
    work: usize,
}

impl Search {
    pub fn new(blocks: &Blocks<'_>) -> Self {
        let n = blocks.of.len();
        Self { queues: Queues::new(n, blocks.limit.len()), moved_in: vec![0; n], round: 0, log: Vec::new(), work: 0 }
    }

    /// Every vertex at a border starts a search of its own, until `budget` ends of edges have been looked at.
    ///
    /// # Source
    /// Multi-try k-way FM of Sanders and Schulz, "Engineering multilevel graph partitioning algorithms", ESA 2011.
    pub fn multi_try(&mut self, blocks: &mut Blocks<'_>, patience: usize, budget: usize, random: &mut Random) {
        let mut seeds: Vec<u32> = (0..blocks.of.len() as u32).filter(|&v| blocks.at_border(v)).collect();
        random.shuffle(&mut seeds);
        self.round += 1;
        self.work = 0;
        for &v in &seeds {
            if self.work > budget {
                return;
            }
            if self.moved_in[v as usize] != self.round {
                self.search(blocks, &[v], patience, -1);
            }
        }
    }

    /// One search from all border vertices together, and from vertices that little holds anywhere. Answers the cut
    /// saved.
    ///
    /// The latter matter in power-law graphs: a full block can give up a leaf in its middle for a better vertex.
    pub fn along_border(&mut self, blocks: &mut Blocks<'_>, patience: usize, random: &mut Random) -> i64 {
        let n = blocks.of.len() as u32;
        let all: i64 = (0..n).map(|v| blocks.inside(v) + blocks.near(v).iter().map(|x| x.1).sum::<i64>()).sum();
        let loose = all / i64::from(n.max(1)) / 3;
        let mut seeds: Vec<u32> = (0..n).filter(|&v| blocks.at_border(v) || blocks.inside(v) <= loose).collect();
        random.shuffle(&mut seeds);
        self.round += 1;
        self.search(blocks, &seeds, patience, loose)
    }

    /// Moves the most profitable vertex, profit or not, and goes on from its neighbours; at the end the moves after the
    /// best moment are taken back. Gives up after `patience` moves without a new best. Answers the cut saved.
    ///
    /// `loose`: vertices held by no more than this may move to a block they do not touch.
    fn search(&mut self, blocks: &mut Blocks<'_>, seeds: &[u32], patience: usize, loose: i64) -> i64 {
        self.queues.clear();
        self.log.clear();
        let best_move = |blocks: &Blocks<'_>, v: u32| {
            if blocks.at_border(v) || blocks.inside(v) > loose {
                return blocks.best_move(v);
            }
            (blocks.size[blocks.of[v as usize] as usize] > 1).then(|| way_out(blocks, v))
        };
        for &v in seeds {
            if let Some((gain, to)) = best_move(blocks, v) {
                self.queues.set(v, to, gain);
            }
        }
        let graph = blocks.graph;
        let (mut saved, mut best, mut best_len) = (0, 0, 0);
        while let Some((gain, planned, v)) = self.queues.best(|v, to| blocks.fits(v, to)) {
            let Some((now, to)) = best_move(blocks, v) else {
                self.queues.remove(v);
                continue;
            };
            // The gain is up to date; whether there is room may have changed since.
            if to != planned {
                self.queues.set(v, to, now);
                if now < gain || !blocks.fits(v, to) {
                    continue;
                }
            }
            self.queues.remove(v);
            let from = blocks.of[v as usize];
            blocks.put(v, to);
            self.work += graph.degree(v);
            self.moved_in[v as usize] = self.round;
            self.log.push((v, from));
            saved += now;
            if saved > best {
                (best, best_len) = (saved, self.log.len());
            } else if self.log.len() - best_len > patience {
                break;
            }
            for (u, _) in graph.neighbours(v) {
                if self.moved_in[u as usize] == self.round {
                    continue;
                }
                match best_move(blocks, u) {
                    Some((gain, to)) => self.queues.set(u, to, gain),
                    None => self.queues.remove(u),
                }
            }
        }
        while self.log.len() > best_len {
            let Some((v, from)) = self.log.pop() else { break };
            blocks.put(v, from);
            self.work += graph.degree(v);
        }
        best
    }

    /// Moves vertices out of blocks above their limits, at the least harm to the cut.
    ///
    /// Where nothing fits anywhere (heavy vertices), a vertex still moves if the worse of both blocks gets better.
    pub fn rebalance(&mut self, blocks: &mut Blocks<'_>) {
        loop {
            let before = blocks.excess();
            if before == 0 {
                return;
            }
            for from in 0..blocks.n_blocks() {
                if blocks.room(from) < 0 {
                    self.relieve(blocks, from);
                }
            }
            if blocks.excess() >= before {
                return;
            }
        }
    }

    fn relieve(&mut self, blocks: &mut Blocks<'_>, from: u32) {
        let graph = blocks.graph;
        self.queues.clear();
        for v in 0..blocks.of.len() as u32 {
            if blocks.of[v as usize] == from && graph.vertex_weight(v) > 0 {
                self.queues.set(v, from, way_out(blocks, v).0);
            }
        }
        while blocks.room(from) < 0 && blocks.size[from as usize] > 1 {
            let Some((gain, _, v)) = self.queues.best(|_, _| true) else { return };
            let (now, to) = way_out(blocks, v);
            if now < gain {
                self.queues.set(v, from, now);
                continue;
            }
            self.queues.remove(v);
            // Into a block with room, or at least into a better one than this.
            if !blocks.fits(v, to) && blocks.room(to) - graph.vertex_weight(v) <= blocks.room(from) {
                continue;
            }
            blocks.put(v, to);
            for (u, _) in graph.neighbours(v) {
                if self.queues.contains(u) {
                    self.queues.set(u, from, way_out(blocks, u).0);
                }
            }
        }
    }
}

/// Where a vertex can go at the least harm, near or far, with the cut saved.
fn way_out(blocks: &Blocks<'_>, v: u32) -> (i64, u32) {
    if let Some((gain, to)) = blocks.best_move(v)
        && blocks.fits(v, to)
    {
        return (gain, to);
    }
    let own = blocks.of[v as usize];
    let others = (0..blocks.n_blocks()).filter(|&b| b != own);
    let to = others.max_by_key(|&b| (blocks.room(b), std::cmp::Reverse(b))).unwrap_or(own);
    (-blocks.inside(v), to)
}
