//! Orders of work per shard, found by simulation and checked before they run.
//!
//! A schedule is data: for every shard the list of (segment, microbatch) it executes, one after the other. The
//! simulation starts whatever is ready by the policy of its [`ScheduleKind`]; [`replay`] runs fixed orders and
//! tells a deadlock from a schedule.

mod simulation;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ShardId;
use super::segment::{Dependency, Message, Segmentation, Task};
use super::traffic::{Shared, Travel};
use crate::graph::Graph;
use crate::units::Seconds;
use simulation::{Policy, Simulation};

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
    /// That brings its values; `None` where they are at hand.
    message: Option<usize>,
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
                    return Need { segment: d.segment, message: None, transfer: Seconds(0.0), flow: None };
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
                Need { segment: d.segment, message: Some(message), transfer: time, flow }
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
            flow.latency += late;
        }
        tasks
    }

    /// The same tasks on links that carry more or less: how each message travels now, over as many nodes as before.
    pub(super) fn with_travel(&self, travel: impl Fn(usize) -> Travel) -> Self {
        let mut tasks = self.clone();
        for need in tasks.nodes.iter_mut().flat_map(|node| &mut node.needs) {
            if let Some(message) = need.message {
                need.transfer = travel(message).time;
            }
        }
        for flow in tasks.flows.iter_mut().flatten() {
            let Travel { time, shared } = travel(flow.message);
            if let Some(shared) = shared {
                (flow.shared, flow.latency) = (shared, time - shared.alone());
            }
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

#[cfg(test)]
mod tests;
