//! Orders of work per shard, found by simulation and checked before they run.
//!
//! A schedule is data: for every shard the list of (segment, microbatch) it executes, one after the other. The
//! simulation starts whatever is ready by the policy of its [`ScheduleKind`]; [`replay`] runs fixed orders and
//! tells a deadlock from a schedule.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use serde::{Deserialize, Serialize};

use super::ShardId;
use super::segment::{Dependency, Message, Segmentation, Task};
use super::traffic::{Shared, Traffic, Travel};
use crate::graph::Graph;
use crate::units::Seconds;

/// Order of microbatches through the pipeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScheduleKind {
    /// All forward work first, then all backward work: every microbatch's residuals are alive at once.
    GPipe,
    /// One forward, one backward: bounds the residuals in flight by the depth of the pipeline.
    #[default]
    #[serde(rename = "1F1B")]
    OneFOneB,
    /// 1F1B with several ranges of the model on each shard: the pipeline fills sooner, and more is sent.
    Interleaved,
    /// 1F1B where gradients that other shards wait for come first; those of params fill what would be waiting.
    ZeroBubble,
}

impl ScheduleKind {
    pub const ALL: [Self; 4] = [Self::OneFOneB, Self::ZeroBubble, Self::Interleaved, Self::GPipe];

    /// Whether products that no other shard waits for are segments of their own.
    pub fn sets_apart(self) -> bool {
        self == Self::ZeroBubble
    }

    /// Level of a segment in the pipeline, and whether it can wait.
    fn level(self, level: u32) -> (u32, bool) {
        if self.sets_apart() { (level / 2, level % 2 == 1) } else { (level, false) }
    }
}

impl std::fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ScheduleKind::GPipe => "GPipe",
            ScheduleKind::OneFOneB => "1F1B",
            ScheduleKind::Interleaved => "interleaved",
            ScheduleKind::ZeroBubble => "zero-bubble",
        })
    }
}

/// What a schedule orders: segments with their durations and what each must wait for.
#[derive(Clone, Debug)]
pub struct TaskGraph {
    n_shards: usize,
    nodes: Vec<Node>,
    /// By segment: what it sends to other nodes.
    flows: Vec<Vec<Flow>>,
}

#[derive(Clone, Debug)]
struct Node {
    shard: ShardId,
    level: u32,
    duration: Seconds,
    /// Segments that must finish first (for the same microbatch).
    needs: Vec<Need>,
}

#[derive(Clone, Copy, Debug)]
struct Need {
    segment: usize,
    /// Time its values travel, alone.
    transfer: Seconds,
    /// Position among the flows, of a message that shares NICs with others.
    flow: Option<usize>,
}

/// A message between nodes, and the segments that wait for it.
#[derive(Clone, Debug)]
struct Flow {
    message: usize,
    shared: Shared,
    latency: Seconds,
    users: Vec<usize>,
}

/// Static orders, with what the simulation says of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// By shard: tasks in the order they run.
    pub orders: Vec<Vec<Task>>,
    /// From the first task's start to the last one's end.
    pub makespan: Seconds,
    /// By shard: most microbatches begun and not finished at one time.
    pub in_flight: Vec<u32>,
}

/// One task on the simulated timeline.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    pub task: Task,
    pub start: Seconds,
    pub end: Seconds,
    /// The segment whose values it gets last, and how long they travel.
    pub last: Option<(u32, Seconds)>,
}

/// What lies between the gradients of one step and those of the next.
#[derive(Clone, Copy, Debug)]
pub struct Between<'a> {
    /// By shard: updating, reporting, taking the next order.
    pub shards: &'a [Seconds],
    /// Updates wait for each other.
    pub together: bool,
    /// From a step's end until the step after the next has been fed.
    pub answer: Seconds,
}

/// Orders that cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    #[error("the orders deadlock: {shard} waits at {task:?} for {waits_for:?}, which never runs before it")]
    Deadlock { shard: ShardId, task: Task, waits_for: Task },
    #[error("the orders of {shard} hold {found} tasks, expected {expected}: each segment once per microbatch")]
    WrongTasks { shard: ShardId, expected: usize, found: usize },
    #[error(
        "{shard} runs {task:?} out of turn: a segment takes microbatches in ascending order, so that sums do not depend on the plan"
    )]
    OutOfTurn { shard: ShardId, task: Task },
}

impl TaskGraph {
    /// # Shapes
    /// `durations`: one per segment, for one microbatch. `transfer`: how a message travels, or how long where it is alone.
    pub fn new<T: Into<Travel>>(
        graph: &Graph,
        segmentation: &Segmentation,
        n_shards: usize,
        durations: &[Seconds],
        transfer: impl Fn(usize, &Message) -> T,
    ) -> Self {
        Self::of(segmentation, &segmentation.dependencies(graph), n_shards, durations, transfer)
    }

    /// The same with [`Segmentation::dependencies`] that are known already.
    pub(super) fn of<T: Into<Travel>>(
        segmentation: &Segmentation,
        dependencies: &[Vec<Dependency>],
        n_shards: usize,
        durations: &[Seconds],
        transfer: impl Fn(usize, &Message) -> T,
    ) -> Self {
        let mut flows: Vec<Vec<Flow>> = vec![Vec::new(); segmentation.segments.len()];
        let mut nodes = Vec::with_capacity(segmentation.segments.len());
        for (i, (s, &duration)) in segmentation.segments.iter().zip(durations).enumerate() {
            let mut need = |d: &Dependency| {
                let Some(message) = d.message else {
                    return Need { segment: d.segment, transfer: Seconds(0.0), flow: None };
                };
                let Travel { time, shared } = transfer(message, &segmentation.messages[message]).into();
                let flow = shared.map(|shared| {
                    let sent = &mut flows[d.segment];
                    let known = sent.iter().position(|flow| flow.message == message);
                    let at = known.unwrap_or(sent.len());
                    if at == sent.len() {
                        let latency = time - shared.alone();
                        sent.push(Flow { message, shared, latency, users: Vec::new() });
                    }
                    sent[at].users.push(i);
                    at
                });
                Need { segment: d.segment, transfer: time, flow }
            };
            let needs = dependencies[i].iter().map(&mut need).collect();
            nodes.push(Node { shard: s.shard, level: s.level, duration, needs });
        }
        Self { n_shards, nodes, flows }
    }

    /// The same tasks, taking other times: one duration per segment, and so much more for every message.
    pub fn with_times(&self, durations: impl Iterator<Item = Seconds>, late: Seconds) -> Self {
        let mut tasks = self.clone();
        for (node, duration) in tasks.nodes.iter_mut().zip(durations) {
            node.duration = duration;
            // Values that stay where they are take no time.
            let messages = node.needs.iter_mut().filter(|need| need.transfer.0 > 0.0);
            messages.for_each(|need| need.transfer = (need.transfer + late).max(Seconds(0.0)));
        }
        for flow in tasks.flows.iter_mut().flatten() {
            // It may be less than it takes alone: then it takes no time.
            flow.latency = flow.latency + late;
        }
        tasks
    }

    pub(super) fn shard_of(&self, segment: usize) -> ShardId {
        self.nodes[segment].shard
    }

    fn users(&self) -> Vec<Vec<(usize, Seconds)>> {
        let mut users = vec![Vec::new(); self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for need in node.needs.iter().filter(|need| need.flow.is_none()) {
                users[need.segment].push((i, need.transfer));
            }
        }
        users
    }

    /// Whether messages can disturb each other.
    fn is_shared(&self) -> bool {
        self.flows.iter().any(|flows| !flows.is_empty())
    }

    fn of_shard(&self) -> Vec<Vec<usize>> {
        let mut of = vec![Vec::new(); self.n_shards];
        for (i, node) in self.nodes.iter().enumerate() {
            of[node.shard.index()].push(i);
        }
        of
    }

    /// The fastest orders for `n_microbatches`, whatever memory they take.
    pub fn schedule(&self, kind: ScheduleKind, n_microbatches: u32) -> Schedule {
        self.schedules(kind, n_microbatches).pop().expect("there is always one")
    }

    /// Orders for `n_microbatches`, found by list scheduling: those with the fewest microbatches in flight, then such with more
    /// as far as each shortens the schedule by more than 0.5 %.
    ///
    /// GPipe takes the lowest level first, all others the highest. In flight on a shard are first as many microbatches as
    /// there are shards between it and the turning point of the pipeline, and itself; one more hides transfers. What can
    /// wait is taken when nothing else is ready; while it waits its microbatch is in flight, so all shards get as many of
    /// them as the first one, and up to twice as many. An interleaved pipeline may also take turns ([`Self::in_turns`]).
    ///
    /// # Complexity
    /// O(tasks · (segments per shard + log tasks)).
    /// # Source
    /// GPipe (Huang et al., NeurIPS 2019); 1F1B: PipeDream-flush (Narayanan et al., ICML 2021); interleaved: Narayanan et
    /// al., SC 2021; zero-bubble: Qi et al., ICLR 2024, with the memory of its ZB-H1 and then that of its ZB-H2.
    pub fn schedules(&self, kind: ScheduleKind, n_microbatches: u32) -> Vec<Schedule> {
        let depths: Vec<u32> = self.of_shard().iter().map(|of| self.depth(kind, of)).collect();
        let all = |limit: u32| vec![limit; depths.len()];
        let most = depths.iter().copied().max().unwrap_or(1);
        let slack = || depths.iter().map(|depth| depth + 1).collect();
        let limits = match kind {
            ScheduleKind::GPipe => vec![all(u32::MAX)],
            ScheduleKind::OneFOneB | ScheduleKind::Interleaved => vec![depths.clone(), slack()],
            ScheduleKind::ZeroBubble => vec![depths.clone(), all(most), all(most + 1), all(2 * most - 1)],
        };
        let in_turns = (kind == ScheduleKind::Interleaved).then(|| self.in_turns(n_microbatches)).flatten();
        let mut found: Vec<Schedule> = Vec::with_capacity(limits.len() + 1);
        let simulated = limits.into_iter().map(|limits| {
            let policy = Policy::Kind { kind, limits };
            Simulation::new(self, n_microbatches, policy, vec![0.0; self.n_shards]).run().schedule()
        });
        for schedule in in_turns.into_iter().chain(simulated) {
            if found.last().is_none_or(|last| schedule.makespan.0 < 0.995 * last.makespan.0) {
                found.push(schedule);
            }
        }
        found
    }

    /// Orders in which each shard takes its ranges in turn, as many microbatches of one as there are shards, then those of
    /// the next; once the pipeline is full, one forward and one backward. `None` for graphs that are no such pipeline, or
    /// where turns do not work out.
    ///
    /// # Source
    /// Narayanan et al., SC 2021, as in Megatron-LM.
    fn in_turns(&self, n_microbatches: u32) -> Option<Schedule> {
        let (n, m) = (self.n_shards, n_microbatches);
        let top = self.nodes.iter().map(|node| node.level).max()?;
        let turn = top / 2;
        let mut of_shard = self.of_shard();
        of_shard.iter_mut().for_each(|of| of.sort_by_key(|&s| self.nodes[s].level));
        let rounds = of_shard.first().map(|of| of.len() / 2).filter(|&rounds| rounds > 0)?;
        let mut orders = Vec::with_capacity(n);
        for (shard, of) in of_shard.iter().enumerate() {
            let level = |i: &usize| self.nodes[*i].level;
            let forward: Vec<usize> = of.iter().copied().filter(|s| level(s) <= turn).collect();
            // The last range of the last shard goes forward and back at once.
            let merged = forward.last().is_some_and(|s| level(s) == turn && top % 2 == 0);
            let backward: Vec<usize> = of.iter().copied().filter(|s| level(s) > turn).collect();
            if forward.len() != rounds || backward.len() + usize::from(merged) != rounds {
                return None;
            }
            let task = |segment: usize, microbatch: u32| Task { segment: segment as u32, microbatch };
            let (mut onward, mut back) = (Vec::new(), Vec::new());
            let per_turn = (n as u32).max(1);
            for first in (0..m).step_by(per_turn as usize) {
                let group = first..(first + per_turn).min(m);
                onward.extend(forward.iter().flat_map(|&s| group.clone().map(move |mb| Some(task(s, mb)))));
                let turning = merged.then_some(None);
                let ranges = turning.into_iter().chain(backward.iter().copied().map(Some));
                back.extend(ranges.flat_map(|s| group.clone().map(move |mb| s.map(|s| task(s, mb)))));
            }
            let warm = (2 * (n - shard - 1) + (rounds - 1) * n).min(onward.len());
            let mut order: Vec<Option<Task>> = onward[..warm].to_vec();
            for (onward, back) in onward[warm..].iter().zip(&back) {
                order.extend([*onward, *back]);
            }
            order.extend_from_slice(&back[back.len() - warm..]);
            orders.push(order.into_iter().flatten().collect::<Vec<Task>>());
        }
        let lanes = self.replay(&orders, m).ok()?;
        let makespan = lanes.iter().filter_map(|l| l.last()).map(|slot| slot.end).fold(Seconds(0.0), Seconds::max);
        let in_flight = orders.iter().zip(&of_shard).map(|(order, of)| in_flight(order, of.len(), m)).collect();
        Some(Schedule { orders, makespan, in_flight })
    }

    /// Microbatches a shard must have in flight to be busy in a pipeline of equal stages.
    fn depth(&self, kind: ScheduleKind, segments: &[usize]) -> u32 {
        let levels = segments.iter().map(|&s| kind.level(self.nodes[s].level).0);
        let (Some(first), Some(last)) = (levels.clone().min(), levels.max()) else { return 1 };
        (last - first).div_ceil(2) + 1
    }

    /// Runs fixed orders: the timeline per shard, or why they cannot run.
    pub fn replay(&self, orders: &[Vec<Task>], n_microbatches: u32) -> Result<Vec<Vec<Slot>>, ScheduleError> {
        self.check_tasks(orders, n_microbatches)?;
        self.replay_from(orders, &vec![0.0; orders.len()])
    }

    /// From the end of one step to the end of the next, when steps follow each other: a shard begins the next one as soon
    /// as it is through, while others still work on the one before.
    ///
    /// # Complexity
    /// O(tasks · log tasks).
    pub fn period(
        &self,
        orders: &[Vec<Task>],
        n_microbatches: u32,
        between: &Between<'_>,
    ) -> Result<Seconds, ScheduleError> {
        // Two, because of the steps that may be under way at once; as many before, to get into step.
        const STEPS: usize = 4;
        self.check_tasks(orders, n_microbatches)?;
        let mut free = vec![0.0; orders.len()];
        let mut ends = [0.0; STEPS];
        for k in 0..STEPS {
            let lanes = self.replay_from(orders, &free)?;
            for ((free, lane), between) in free.iter_mut().zip(&lanes).zip(between.shards) {
                *free = lane.last().map_or(*free, |slot| slot.end.0) + between.0;
            }
            ends[k] = free.iter().copied().fold(0.0, f64::max);
            if between.together {
                free.fill(ends[k]);
            }
            if let Some(before) = k.checked_sub(1) {
                // The step after the next is fed when this one has been reported.
                let fed = ends[before] + between.answer.0;
                free.iter_mut().for_each(|free| *free = free.max(fed));
            }
        }
        Ok(Seconds((ends[STEPS - 1] - ends[STEPS / 2 - 1]) / (STEPS / 2) as f64))
    }

    /// `free`: by shard, when it can begin.
    fn replay_from(&self, orders: &[Vec<Task>], free: &[f64]) -> Result<Vec<Vec<Slot>>, ScheduleError> {
        let lanes = if self.is_shared() {
            let n_microbatches = orders.iter().flatten().map(|t| t.microbatch + 1).max().unwrap_or(0);
            Simulation::new(self, n_microbatches, Policy::Orders(orders), free.to_vec()).run().lanes
        } else {
            self.replay_alone(orders, free)
        };
        for (shard, order) in orders.iter().enumerate() {
            if let Some(&task) = order.get(lanes[shard].len()) {
                let needs = self.nodes[task.segment as usize].needs.iter();
                let mut needs = needs.map(|n| Task { segment: n.segment as u32, microbatch: task.microbatch });
                let ran = |need: &Task| {
                    let shard = self.nodes[need.segment as usize].shard;
                    lanes[shard.index()].iter().any(|slot| slot.task == *need)
                };
                let waits_for = needs.find(|need| !ran(need)).unwrap_or(task);
                return Err(ScheduleError::Deadlock { shard: ShardId(shard as u32), task, waits_for });
            }
        }
        Ok(lanes)
    }

    /// As far as orders can be followed where no message disturbs another: no need to go by the clock.
    fn replay_alone(&self, orders: &[Vec<Task>], free: &[f64]) -> Vec<Vec<Slot>> {
        let mut end: BTreeMap<Task, f64> = BTreeMap::new();
        let mut lanes: Vec<Vec<Slot>> = orders.iter().map(|o| Vec::with_capacity(o.len())).collect();
        loop {
            let mut progress = false;
            for (shard, order) in orders.iter().enumerate() {
                while let Some(&task) = order.get(lanes[shard].len()) {
                    let node = &self.nodes[task.segment as usize];
                    let mut start = lanes[shard].last().map_or(free[shard], |slot: &Slot| slot.end.0);
                    let (mut ready, mut last): (bool, Option<(f64, u32, Seconds)>) = (true, None);
                    for need in &node.needs {
                        let segment = need.segment as u32;
                        match end.get(&Task { segment, microbatch: task.microbatch }) {
                            Some(e) => {
                                let arrives = e + need.transfer.0;
                                start = start.max(arrives);
                                if last.is_none_or(|(latest, ..)| arrives > latest) {
                                    last = Some((arrives, segment, need.transfer));
                                }
                            }
                            None => ready = false,
                        }
                    }
                    if !ready {
                        break;
                    }
                    let stop = start + node.duration.0;
                    end.insert(task, stop);
                    let last = last.map(|(_, segment, travel)| (segment, travel));
                    lanes[shard].push(Slot { task, start: Seconds(start), end: Seconds(stop), last });
                    progress = true;
                }
            }
            if !progress {
                return lanes;
            }
        }
    }

    fn check_tasks(&self, orders: &[Vec<Task>], n_microbatches: u32) -> Result<(), ScheduleError> {
        let of_shard = self.of_shard();
        for shard in 0..self.n_shards.max(orders.len()) {
            let order = orders.get(shard).map_or(&[][..], Vec::as_slice);
            let expected = of_shard.get(shard).map_or(0, Vec::len) * n_microbatches as usize;
            let id = ShardId(shard as u32);
            if order.len() != expected {
                return Err(ScheduleError::WrongTasks { shard: id, expected, found: order.len() });
            }
            let mut next: BTreeMap<u32, u32> = BTreeMap::new();
            for &task in order {
                let due = next.entry(task.segment).or_insert(0);
                let known = self.nodes.get(task.segment as usize).is_some_and(|n| n.shard == id);
                if !known || task.microbatch != *due {
                    return Err(ScheduleError::OutOfTurn { shard: id, task });
                }
                *due += 1;
            }
        }
        Ok(())
    }
}

/// Most microbatches begun and not finished at one time, of a shard with so many segments.
fn in_flight(order: &[Task], n_segments: usize, n_microbatches: u32) -> u32 {
    let mut left = vec![n_segments; n_microbatches as usize];
    let (mut now, mut most) = (0, 0);
    for task in order {
        let left = &mut left[task.microbatch as usize];
        now += u32::from(*left == n_segments);
        most = most.max(now);
        *left -= 1;
        now -= u32::from(*left == 0);
    }
    most
}

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
enum Policy<'a> {
    /// By a schedule. `limits`: by shard, most microbatches in flight.
    Kind { kind: ScheduleKind, limits: Vec<u32> },
    /// The next one, by shard.
    Orders(&'a [Vec<Task>]),
}

struct Simulation<'a> {
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
struct Ran {
    lanes: Vec<Vec<Slot>>,
    makespan: f64,
    in_flight: Vec<u32>,
}

impl Ran {
    fn schedule(self) -> Schedule {
        let orders = self.lanes.iter().map(|lane| lane.iter().map(|slot| slot.task).collect()).collect();
        Schedule { orders, makespan: Seconds(self.makespan), in_flight: self.in_flight }
    }
}

impl<'a> Simulation<'a> {
    /// `free_at`: by shard, when it can begin.
    fn new(tasks: &'a TaskGraph, n_microbatches: u32, policy: Policy<'a>, free_at: Vec<f64>) -> Self {
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

    fn run(mut self) -> Ran {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipeline of `n` shards, backward work twice the forward work, last stage's halves in one segment.
    fn pipeline(n: usize, transfer: f64) -> TaskGraph {
        let mut nodes: Vec<Node> = Vec::new();
        for level in 0..2 * n - 1 {
            let (shard, duration) = match level {
                l if l < n - 1 => (l, 1.0),
                l if l == n - 1 => (l, 3.0),
                l => (2 * (n - 1) - l, 2.0),
            };
            let mut needs = Vec::new();
            let need = |segment, transfer| Need { segment, transfer: Seconds(transfer), flow: None };
            if level > 0 {
                needs.push(need(level - 1, transfer));
            }
            if level >= n {
                needs.push(need(2 * (n - 1) - level, 0.0));
            }
            nodes.push(Node { shard: ShardId(shard as u32), level: level as u32, duration: Seconds(duration), needs });
        }
        TaskGraph { n_shards: n, flows: vec![Vec::new(); nodes.len()], nodes }
    }

    #[test]
    fn takes_the_textbook_time_on_an_even_pipeline() {
        for (n, m) in [(1, 1), (1, 4), (2, 8), (4, 8), (4, 4)] {
            for kind in [ScheduleKind::GPipe, ScheduleKind::OneFOneB] {
                let tasks = pipeline(n, 0.0);
                let schedule = tasks.schedule(kind, m);
                // (m + n - 1) · (forward + backward)
                assert_eq!(schedule.makespan.0, 3.0 * (m as f64 + n as f64 - 1.0), "{kind:?} {n} {m}");
                let lanes = tasks.replay(&schedule.orders, m).unwrap();
                let end = lanes.iter().flatten().map(|s| s.end.0).fold(0.0, f64::max);
                assert_eq!(end, schedule.makespan.0);
            }
        }
    }

    /// A pipeline of `n` shards that the model goes through in so many rounds; forward, gradients of inputs and gradients of
    /// params take one unit each on a shard.
    fn finer(n: usize, rounds: usize, apart: bool) -> TaskGraph {
        let (stages, unit) = (n * rounds, 1.0 / rounds as f64);
        let mut nodes: Vec<Node> = Vec::new();
        let mut push = |stage: usize, level: usize, late: bool, duration: f64, needs: &[usize]| {
            let level = if apart { 2 * level + usize::from(late) } else { level } as u32;
            let need = |&segment| Need { segment, transfer: Seconds(0.0), flow: None };
            let needs = needs.iter().map(need).collect();
            nodes.push(Node { shard: ShardId((stage % n) as u32), level, duration: Seconds(duration * unit), needs });
            nodes.len() - 1
        };
        let mut before: Vec<usize> = Vec::new();
        let mut forward = vec![0; stages];
        for (stage, at) in forward.iter_mut().enumerate().take(stages - 1) {
            *at = push(stage, stage, false, 1.0, &before);
            before = vec![*at];
        }
        for level in stages - 1..2 * stages - 1 {
            let stage = 2 * (stages - 1) - level;
            let mut needs = before.clone();
            let turns = stage == stages - 1;
            if !turns {
                needs.push(forward[stage]);
            }
            let own = if turns { 2.0 } else { 1.0 };
            let at = push(stage, level, false, if apart { own } else { own + 1.0 }, &needs);
            if apart {
                push(stage, level, true, 1.0, &[at]);
            }
            before = vec![at];
        }
        TaskGraph { n_shards: n, flows: vec![Vec::new(); nodes.len()], nodes }
    }

    #[test]
    fn fills_the_pipeline_sooner_in_rounds_and_with_what_can_wait() {
        for (n, m) in [(2usize, 8u32), (4, 8), (4, 16), (8, 16)] {
            let makespan = |kind: ScheduleKind, rounds| {
                let tasks = finer(n, rounds, kind.sets_apart());
                let schedule = tasks.schedule(kind, m);
                tasks.replay(&schedule.orders, m).unwrap();
                schedule.makespan.0
            };
            let (work, bubble) = (3.0 * f64::from(m), n as f64 - 1.0);
            // What Narayanan et al. and Qi et al. give for them: (n - 1) times 3, 3 / rounds, 1.
            assert_eq!(makespan(ScheduleKind::OneFOneB, 1), work + 3.0 * bubble, "{n} {m}");
            for rounds in [2, 4] {
                let interleaved = makespan(ScheduleKind::Interleaved, rounds);
                let expected = work + 3.0 * bubble / rounds as f64;
                assert!((interleaved - expected).abs() < 1e-9, "{n} {m} {rounds}: {interleaved}");
            }
            let zero_bubble = makespan(ScheduleKind::ZeroBubble, 1);
            assert!((zero_bubble - work - bubble).abs() < 1e-9, "{n} {m}: {zero_bubble}");
        }
    }

    #[test]
    fn bounds_the_microbatches_in_flight_by_the_depth() {
        let tasks = pipeline(4, 0.0);
        assert_eq!(tasks.schedule(ScheduleKind::OneFOneB, 16).in_flight, [4, 3, 2, 1]);
        assert_eq!(tasks.schedule(ScheduleKind::GPipe, 16).in_flight[0], 16);
    }

    #[test]
    fn hides_transfers_behind_one_more_microbatch() {
        let (near, far) = (pipeline(2, 0.0), pipeline(2, 0.4));
        let (near, far) = (near.schedule(ScheduleKind::OneFOneB, 16), far.schedule(ScheduleKind::OneFOneB, 16));
        assert!(far.makespan.0 < near.makespan.0 + 4.0, "{:?}", far.makespan);
    }

    #[test]
    fn steps_that_follow_each_other_overlap_where_they_can() {
        let check = |n: usize, shards: &[f64], together: bool, answer: f64, expected: f64| {
            let tasks = pipeline(n, 0.0);
            let orders = tasks.schedule(ScheduleKind::OneFOneB, 4).orders;
            let shards: Vec<Seconds> = shards.iter().map(|&s| Seconds(s)).collect();
            let between = Between { shards: &shards, together, answer: Seconds(answer) };
            let period = tasks.period(&orders, 4, &between).unwrap().0;
            assert!((period - expected).abs() < 1e-9, "{n} {shards:?} {together} {answer}: {period}");
        };
        // Alone a step of two shards takes 3 · (4 + 1).
        check(2, &[0.0, 0.0], false, 0.0, 15.0);
        // The second shard has updated its params while the first one ends the step.
        check(2, &[0.0, 2.0], false, 0.0, 15.0);
        check(2, &[1.0, 2.0], false, 0.0, 16.0);
        check(2, &[0.0, 4.0], false, 0.0, 16.0);
        // Updates that wait for each other end together.
        check(2, &[1.0, 4.0], true, 0.0, 17.0);
        // Two steps are under way: an answer counts where it takes longer than one of them.
        check(1, &[0.0], false, 11.0, 12.0);
        check(1, &[0.0], false, 20.0, 16.0);
    }

    #[test]
    fn messages_may_be_later_than_their_links_say() {
        let makespan = |late: f64| {
            let tasks = pipeline(2, 0.5);
            let durations = tasks.nodes.iter().map(|n| n.duration).collect::<Vec<_>>();
            tasks.with_times(durations.into_iter(), Seconds(late)).schedule(ScheduleKind::GPipe, 1).makespan.0
        };
        // There and back; what stays on the shard comes at once.
        assert_eq!([makespan(0.0), makespan(0.25), makespan(-9.0)], [7.0, 7.5, 6.0]);
    }

    #[test]
    fn tells_a_deadlock_from_a_schedule() {
        let tasks = pipeline(2, 0.0);
        let t = |segment, microbatch| Task { segment, microbatch };
        let backward_first = vec![vec![t(2, 0), t(0, 0)], vec![t(1, 0)]];
        assert!(matches!(tasks.replay(&backward_first, 1), Err(ScheduleError::Deadlock { .. })));
        let missing = vec![vec![t(0, 0)], vec![t(1, 0)]];
        assert!(matches!(tasks.replay(&missing, 1), Err(ScheduleError::WrongTasks { .. })));
        let swapped = vec![vec![t(0, 1), t(0, 0), t(2, 0), t(2, 1)], vec![t(1, 0), t(1, 1)]];
        assert!(matches!(tasks.replay(&swapped, 2), Err(ScheduleError::OutOfTurn { .. })));
    }
}
