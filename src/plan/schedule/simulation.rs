//! A step by the clock: whatever is ready runs, by a policy, and messages between nodes share NICs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Schedule, ScheduleKind, Slot, TaskGraph};
use crate::plan::Task;
use crate::plan::traffic::Traffic;
use crate::units::Seconds;

/// Time with a total order, for the event queue.
#[derive(Clone, Copy, PartialEq)]
struct Instant(f64);
impl Eq for Instant {}
impl PartialOrd for Instant {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Instant {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&o.0)
    }
}

/// Which ready task a shard takes.
pub(super) enum Policy<'a> {
    /// By a schedule. `limits`: by shard, most microbatches in flight.
    Kind { kind: ScheduleKind, limits: Vec<u32> },
    /// The next one, by shard.
    Orders(&'a [Vec<Task>]),
}

pub(super) struct Simulation<'a> {
    tasks: &'a TaskGraph,
    policy: Policy<'a>,
    n_microbatches: u32,
    of_shard: Vec<Vec<usize>>,
    users: Vec<Vec<(usize, Seconds)>>,
    /// By (segment, microbatch): needs that have not finished; when the last one arrived, whose it is, and how long that
    /// travelled.
    missing: Vec<u32>,
    ready_at: Vec<f64>,
    last: Vec<Option<(u32, Seconds)>>,
    /// By segment: the microbatch whose turn it is.
    next: Vec<u32>,
    /// By (shard, microbatch): segments that have not finished.
    unfinished: Vec<u32>,
    begun: Vec<u32>,
    finished: Vec<u32>,
    free_at: Vec<f64>,
    in_flight: Vec<u32>,
    lanes: Vec<Vec<Slot>>,
    /// Messages between nodes: sending segment, position among its flows, microbatch.
    traffic: Traffic<(usize, usize, u32)>,
}

type Events = BinaryHeap<Reverse<(Instant, usize, Option<Task>)>>;

/// What a simulation did.
pub(super) struct Ran {
    pub lanes: Vec<Vec<Slot>>,
    makespan: f64,
    in_flight: Vec<u32>,
}

impl Ran {
    pub fn schedule(self) -> Schedule {
        let orders = self.lanes.iter().map(|lane| lane.iter().map(|slot| slot.task).collect()).collect();
        Schedule { orders, makespan: Seconds(self.makespan), in_flight: self.in_flight }
    }
}

impl<'a> Simulation<'a> {
    /// `free_at`: by shard, when it can begin.
    pub fn new(tasks: &'a TaskGraph, n_microbatches: u32, policy: Policy<'a>, free_at: Vec<f64>) -> Self {
        let m = n_microbatches as usize;
        let of_shard = tasks.of_shard();
        Self {
            missing: tasks.nodes.iter().flat_map(|n| vec![n.needs.len() as u32; m]).collect(),
            ready_at: vec![0.0; tasks.nodes.len() * m],
            last: vec![None; tasks.nodes.len() * m],
            next: vec![0; tasks.nodes.len()],
            unfinished: of_shard.iter().flat_map(|of| vec![of.len() as u32; m]).collect(),
            begun: vec![0; tasks.n_shards],
            finished: vec![0; tasks.n_shards],
            free_at,
            in_flight: vec![0; tasks.n_shards],
            lanes: vec![Vec::new(); tasks.n_shards],
            users: tasks.users(),
            of_shard,
            tasks,
            policy,
            n_microbatches,
            traffic: Traffic::default(),
        }
    }

    pub fn run(mut self) -> Ran {
        let mut events = Events::new();
        for shard in 0..self.tasks.n_shards {
            events.push(Reverse((Instant(self.free_at[shard]), shard, None)));
        }
        let mut makespan = 0.0f64;
        loop {
            let next = events.peek().map_or(f64::INFINITY, |Reverse((at, ..))| at.0);
            let through = self.traffic.next();
            if through <= next && through.is_finite() {
                self.arrive(through, &mut events);
                continue;
            }
            let Some(Reverse((Instant(now), shard, ended))) = events.pop() else { break };
            if let Some(task) = ended {
                self.end(task, now, &mut events);
                makespan = makespan.max(now);
            }
            if self.free_at[shard] > now {
                continue;
            }
            if let Some(task) = self.choose(shard, now) {
                let stop = self.begin(shard, task, now);
                events.push(Reverse((Instant(stop), shard, Some(task))));
            }
        }
        Ran { lanes: self.lanes, makespan, in_flight: self.in_flight }
    }

    fn index(&self, task: Task) -> usize {
        task.segment as usize * self.n_microbatches as usize + task.microbatch as usize
    }

    /// The ready task that the policy prefers.
    fn choose(&self, shard: usize, now: f64) -> Option<Task> {
        let is_ready = |t: &Task| self.missing[self.index(*t)] == 0 && self.ready_at[self.index(*t)] <= now;
        let (kind, limits) = match &self.policy {
            Policy::Orders(orders) => return orders[shard].get(self.lanes[shard].len()).copied().filter(is_ready),
            Policy::Kind { kind, limits } => (*kind, limits),
        };
        self.of_shard[shard]
            .iter()
            .map(|&s| Task { segment: s as u32, microbatch: self.next[s] })
            .filter(|t| {
                t.microbatch < self.n_microbatches
                    && is_ready(t)
                    && (t.microbatch < self.begun[shard] || self.begun[shard] - self.finished[shard] < limits[shard])
            })
            .min_by_key(|t| {
                let (level, waits) = kind.level(self.tasks.nodes[t.segment as usize].level);
                let level = i64::from(level);
                let level = if kind == ScheduleKind::GPipe { level } else { -level };
                (waits, level, t.microbatch, t.segment)
            })
    }

    fn begin(&mut self, shard: usize, task: Task, now: f64) -> f64 {
        let stop = now + self.tasks.nodes[task.segment as usize].duration.0;
        self.free_at[shard] = stop;
        self.next[task.segment as usize] += 1;
        self.begun[shard] = self.begun[shard].max(task.microbatch + 1);
        self.in_flight[shard] = self.in_flight[shard].max(self.begun[shard].saturating_sub(self.finished[shard]));
        let last = self.last[self.index(task)];
        self.lanes[shard].push(Slot { task, start: Seconds(now), end: Seconds(stop), last });
        stop
    }

    fn end(&mut self, task: Task, now: f64, events: &mut Events) {
        let node = &self.tasks.nodes[task.segment as usize];
        let shard = node.shard.index();
        let left = &mut self.unfinished[shard * self.n_microbatches as usize + task.microbatch as usize];
        *left -= 1;
        if *left == 0 {
            self.finished[shard] += 1;
        }
        for i in 0..self.users[task.segment as usize].len() {
            let (user, transfer) = self.users[task.segment as usize][i];
            self.give(user, task, now + transfer.0, transfer, events);
        }
        let sent = &self.tasks.flows[task.segment as usize];
        for (i, flow) in sent.iter().enumerate() {
            self.traffic.begin(now, (task.segment as usize, i, task.microbatch), flow.shared);
        }
    }

    /// The message that is through first reaches those that wait for it.
    fn arrive(&mut self, now: f64, events: &mut Events) {
        let Some(((segment, flow, microbatch), began)) = self.traffic.end() else { return };
        let flow = &self.tasks.flows[segment][flow];
        let travel = (Seconds(now - began) + flow.latency).max(Seconds(0.0));
        let from = Task { segment: segment as u32, microbatch };
        for &user in &flow.users {
            // Never before now: that has been.
            self.give(user, from, (began + travel.0).max(now), travel, events);
        }
    }

    /// A segment gets what it needs of another one, at a time.
    fn give(&mut self, user: usize, from: Task, arrives: f64, travel: Seconds, events: &mut Events) {
        let at = self.index(Task { segment: user as u32, microbatch: from.microbatch });
        self.missing[at] -= 1;
        if self.last[at].is_none() || arrives > self.ready_at[at] {
            self.last[at] = Some((from.segment, travel));
        }
        self.ready_at[at] = self.ready_at[at].max(arrives);
        if self.missing[at] == 0 {
            events.push(Reverse((Instant(self.ready_at[at]), self.tasks.nodes[user].shard.index(), None)));
        }
    }
}
