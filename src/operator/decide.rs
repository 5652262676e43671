//! One picture of a job and the cluster goes in, what should be comes out.

mod report;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use sha2::{Digest, Sha256};

use self::report::{recommend, take_report};
use super::changes::changes;
use super::inventory::Room;
use super::place::{Need, Unfit, place, stands};
use super::pods::{Queued, held};
use super::profiles;
use super::render::{Site, n_shards, release, render};
use crate::api::{
    CONTROLLER, Condition, ConditionStatus, ModelProfile, ModelProfileSpec, PartitionPlan, PartitionPlanSpec,
    PartitionPlanStatus, Seat, TrainingJob, TrainingJobStatus, condition,
};
use crate::wire::report::{JobReport, JobState, PlanReport};

/// Everything the operator knows of a job at one moment.
pub struct Snapshot<'a> {
    pub job: &'a TrainingJob,
    /// What is free, this job's own pods counted as taken.
    pub rooms: &'a [Room],
    /// Pods of this job.
    pub pods: &'a [PodSeen],
    /// Plans of this job, by revision.
    pub plans: &'a [PartitionPlan],
    /// What jobs of this namespace have learned.
    pub profiles: &'a [ModelProfile],
    /// What the head has said last, while it can be heard.
    pub report: Option<&'a JobReport>,
    /// Why nothing will be heard of the head, although it is there.
    pub deaf: Option<String>,
    pub now: Timestamp,
    pub site: &'a Site,
}

/// A pod of a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodSeen {
    pub name: String,
    pub worker: u32,
    /// The node it is pinned to.
    pub node: String,
    pub phase: String,
    pub ip: Option<String>,
    pub terminating: bool,
    pub gated: bool,
    /// The gate of somebody else that holds it back.
    pub held: Option<String>,
    pub queued: Option<Queued>,
    /// Its group knows that it is not replaced.
    pub settled: bool,
    /// Labels that its node must have.
    pub selector: BTreeMap<String, String>,
    /// What the scheduler says against it.
    pub unschedulable: Option<String>,
    /// What keeps a container from running, such as an image that cannot be had.
    pub stuck: Option<String>,
    /// Why what its archives hold can never be used.
    pub useless: Option<String>,
    /// Why its worker cannot use its device.
    pub unable: Option<String>,
    /// The head in it, if there is one.
    pub head: Option<HeadSeen>,
}

/// The container of the head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadSeen {
    pub restarts: u32,
    /// It has ended and stays so, with this code.
    pub exit_code: Option<i32>,
    /// What its last run left: its report or plain text.
    pub last_words: Option<Result<JobReport, String>>,
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// To be created before any pod that follows from it.
    pub plan: Option<PartitionPlanSpec>,
    /// The head's number of a plan that a person has agreed to.
    pub approve: Option<u64>,
    /// New status of a plan, by name; and whether it tells more than new figures.
    pub plan_status: Option<(String, PartitionPlanStatus, bool)>,
    /// Workers whose pods are made: they get certificates before anything is applied.
    pub certify: Vec<u32>,
    /// What has been learned of the job's bundle.
    pub profile: Option<ModelProfileSpec>,
    /// To be applied, or created where it is a pod: pods do not change. A pod that nothing holds back comes last.
    pub apply: Vec<Value>,
    /// Pods whose gate is to be opened.
    pub open: Vec<String>,
    /// Pods whose group is to hear that they are not replaced.
    pub settle: Vec<String>,
    /// Pods to delete, and whether at once.
    pub delete: Vec<(String, bool)>,
    pub status: TrainingJobStatus,
    /// (reason, text, whether it is a warning): told once, when the decision is made.
    pub events: Vec<(&'static str, String, bool)>,
    /// The job itself is to be deleted.
    pub expire: bool,
    /// Seconds until the next look, if nothing happens before.
    pub again: u64,
}

/// The state in one word: reasons of the condition `Training`.
mod reason {
    pub const WAITING: &str = "Waiting";
    pub const STARTING: &str = "Starting";
    pub const RUNNING: &str = "Running";
    pub const SUSPENDING: &str = "Suspending";
    pub const SUSPENDED: &str = "Suspended";
    pub const COMPLETE: &str = "Complete";
    pub const FAILED: &str = "Failed";
}

/// How often a running job is looked at: nodes are lost, and deadlines pass, without a word of the head or of pods.
const LOOK: u64 = 5;
/// Seconds that pods have to end by themselves when their job is complete.
const LINGER: i64 = 30;
/// How often a job that waits for room looks again.
const WAIT: u64 = 10;
/// A job with nothing to do is looked at for safety's sake.
const REST: u64 = 600;

/// # Guarantees
/// The same snapshot gives the same answer, and a snapshot in which everything is as it should be gives nothing to apply.
pub fn decide(s: &Snapshot<'_>) -> Desired {
    let mut d = Desired { status: s.job.status.clone().unwrap_or_default(), again: REST, ..Desired::default() };
    if s.job.spec.managed_by.as_ref().is_some_and(|by| by != CONTROLLER) {
        return d;
    }
    d.status.observed_generation = s.job.metadata.generation;
    // Of epochs, the head knows how many steps they are.
    d.status.steps = d.status.steps.or(Some(s.job.spec.steps).filter(|_| s.job.spec.epochs.is_none()));
    if d.status.has_ended() {
        return ended(s, d);
    }
    if let Some((reason, message)) = over(s) {
        return end(s, d, reason, message);
    }
    let checked = crate::api::check(&s.job.spec).map_err(Unfit::Spec);
    let needs = match checked.and_then(|()| Need::of(&s.job.spec, &s.site.plugins)) {
        Ok(needs) => needs,
        Err(Unfit::Spec(message)) => return end(s, d, "InvalidSpec", message),
        Err(Unfit::NoPlugin(message)) => return end(s, d, "NoPlugin", message),
    };
    if s.job.spec.suspend {
        return suspended(s, d);
    }
    take_report(s, &mut d);
    recommend(s, &mut d);
    let current = s.plans.last();
    let kept = current.map(|p| kept(s, p)).unwrap_or_default();
    if let Some(plan) = current.filter(|p| !s.pods.is_empty() && kept.len() == p.spec.shards.len()) {
        run(s, &mut d, &plan.spec);
        return d;
    }
    let why = why(s, current, &kept);
    // While pods are there, their number stays: the head has been told it.
    let exact =
        current.filter(|_| !s.pods.is_empty()).and_then(|p| needs.iter().find_map(|n| n.exactly(&p.spec.shards)));
    let rooms = open_rooms(s, &kept);
    match place(&s.job.spec, exact.as_ref().map_or(&needs[..], std::slice::from_ref), &rooms, &kept) {
        Ok(seats) => {
            let stays = |p: &&PartitionPlan| {
                let own = &p.spec.shards;
                *own == seats
                    || (s.pods.is_empty() && own.len() == seats.len() && stands(&s.job.spec, &needs, &rooms, own))
            };
            let plan = match current.filter(stays) {
                Some(plan) => plan.spec.clone(),
                None => {
                    let plan = adopt(s, seats, why, None);
                    d.events.push(("Planned", format!("revision {}: {}", plan.revision, plan.reason), false));
                    d.plan = Some(plan.clone());
                    plan
                }
            };
            run(s, &mut d, &plan);
        }
        Err(no_room) => {
            let text = no_room.to_string();
            if exact.is_some()
                && let Ok(seats) = place(&s.job.spec, &needs, &freed(s, rooms, &kept), &[])
            {
                return anew(s, d, seats.len(), &text);
            }
            if d.status.condition(condition::PLACED).is_none_or(|c| c.message != text) {
                d.events.push(("NoRoom", text.clone(), true));
            }
            set(s, &mut d.status, condition::PLACED, ConditionStatus::False, "NoRoom", &text);
            set(s, &mut d.status, condition::TRAINING, ConditionStatus::False, reason::WAITING, &text);
            d.again = WAIT;
        }
    }
    d
}

/// Why the job is over: (reason, text).
fn over(s: &Snapshot<'_>) -> Option<(&'static str, String)> {
    let spec = &s.job.spec;
    if let Some(why) = s.pods.iter().find_map(|p| p.useless.clone()) {
        return Some(("InvalidInput", why));
    }
    if let Some((pod, why)) = s.pods.iter().find_map(|p| Some((p, p.unable.as_ref()?))) {
        return Some(("NoDevice", format!("worker {} on node {} {why}", pod.worker, pod.node)));
    }
    let head = s.pods.iter().find_map(|p| p.head.as_ref());
    if let Some(head) = head {
        let words = head.last_words.as_ref();
        let report = words.and_then(|w| w.as_ref().ok());
        let said = match words {
            Some(Ok(report)) => report.message.clone(),
            Some(Err(text)) => text.clone(),
            None => "its head ended without a word".to_owned(),
        };
        match (head.exit_code, report.map(|r| r.state)) {
            (Some(0), _) => return Some((reason::COMPLETE, said)),
            (_, Some(JobState::Refused)) => return Some(("InvalidInput", said)),
            _ if words.is_some() && head.restarts > spec.failure_policy.max_restarts => {
                let n = head.restarts;
                return Some(("HeadFailed", format!("the job was started {n} times: {said}")));
            }
            _ => {}
        }
    }
    let started = s.job.status.as_ref()?.start_time.as_ref()?.parse::<Timestamp>().ok()?;
    let ran = s.now.as_second() - started.as_second();
    let limit = spec.active_deadline_seconds.filter(|&limit| ran > i64::from(limit))?;
    Some(("DeadlineExceeded", format!("the job has not ended after {limit} s (spec.activeDeadlineSeconds)")))
}

fn end(s: &Snapshot<'_>, mut d: Desired, why: &'static str, message: String) -> Desired {
    take_report(s, &mut d);
    // Nobody looks at figures of this job again.
    if let Some((_, _, urgent)) = &mut d.plan_status {
        *urgent = true;
    }
    let complete = why == reason::COMPLETE;
    let message = if complete {
        let of = |text: &Option<String>| text.clone().unwrap_or_default();
        format!(
            "{} steps, loss {} -> {}, weights in {}",
            d.status.step.unwrap_or_default(),
            of(&d.status.first_loss),
            of(&d.status.loss),
            of(&d.status.results)
        )
    } else {
        message
    };
    let (kind, state) =
        if complete { (condition::COMPLETE, reason::COMPLETE) } else { (condition::FAILED, reason::FAILED) };
    set(s, &mut d.status, kind, ConditionStatus::True, why, &message);
    set(s, &mut d.status, condition::TRAINING, ConditionStatus::False, state, &message);
    d.events.push((why, message, !complete));
    d.status.eta = None;
    d.status.completion_time = Some(s.now.to_string());
    d.again = 1;
    d
}

/// A job that has ended keeps its plan, and pods that have come to their own end: what they logged can be read. What
/// still runs is stopped; after a good end it has a moment to end by itself.
fn ended(s: &Snapshot<'_>, mut d: Desired) -> Desired {
    let running = s.pods.iter().filter(|p| !p.terminating && p.phase != "Succeeded" && p.phase != "Failed");
    d.delete = running.map(|p| (p.name.clone(), false)).collect();
    // Kueue would keep their quota for others in their place.
    let unsettled = s.pods.iter().filter(|p| p.queued.is_some() && !p.settled && !p.terminating);
    d.settle = unsettled.map(|p| p.name.clone()).collect();
    let done = d.status.completion_time.as_ref().and_then(|t| t.parse::<Timestamp>().ok());
    let since = done.map_or(i64::MAX, |done| s.now.as_second().saturating_sub(done.as_second()));
    if since < LINGER && d.status.is_true(condition::COMPLETE) && !d.delete.is_empty() {
        d.delete.clear();
        d.again = LINGER as u64;
    }
    if let (Some(done), Some(ttl)) = (done, s.job.spec.ttl_seconds_after_finished) {
        let left = done.as_second() + i64::from(ttl) - s.now.as_second();
        d.expire = left <= 0;
        d.again = left.clamp(1, d.again as i64) as u64;
    }
    d
}

fn suspended(s: &Snapshot<'_>, mut d: Desired) -> Desired {
    take_report(s, &mut d);
    stop(s, &mut d);
    let (state, text) = if s.pods.is_empty() {
        (reason::SUSPENDED, "spec.suspend is true; set it to false and training goes on from the last checkpoint")
    } else {
        (reason::SUSPENDING, "the steps in flight are finished and a checkpoint is written")
    };
    if d.status.condition(condition::TRAINING).is_none_or(|c| c.reason != state) {
        d.events.push((state, text.to_owned(), false));
    }
    set(s, &mut d.status, condition::TRAINING, ConditionStatus::False, state, text);
    set(s, &mut d.status, condition::PLACED, ConditionStatus::False, state, text);
    d.status.eta = None;
    if !s.pods.is_empty() {
        d.again = LOOK;
    }
    d
}

/// Seats of a plan whose nodes can still be used, or whose pods run there nevertheless.
fn kept(s: &Snapshot<'_>, plan: &PartitionPlan) -> Vec<Seat> {
    if s.pods.is_empty() {
        return Vec::new();
    }
    let elsewhere = |seat: &Seat| elsewhere(s, s.rooms.iter().find(|r| r.node == seat.node)?);
    let usable = |seat: &&Seat| {
        let room = s.rooms.iter().find(|r| r.node == seat.node);
        let pod = s.pods.iter().find(|p| p.worker == seat.worker && p.node == seat.node);
        match (room.map(|r| r.shut(&s.job.spec.placement.tolerations, &seat.device)), pod) {
            (None, _) => false,
            (Some(None), Some(pod)) => {
                pod.unschedulable.is_none() && (pod.phase == "Running" || elsewhere(seat).is_none())
            }
            (Some(None), None) => elsewhere(seat).is_none(),
            // A node that is only closed to new pods lets the old ones run.
            (Some(Some(why)), Some(pod)) => why != "is not ready" && !pod.terminating && pod.phase == "Running",
            (Some(Some(_)), None) => false,
        }
    };
    plan.spec.shards.iter().filter(usable).cloned().collect()
}

/// Why pods of the job cannot be on a node: Kueue has let them in on those of another flavor.
fn elsewhere(s: &Snapshot<'_>, room: &Room) -> Option<String> {
    let mut labels = s.pods.iter().flat_map(|p| &p.selector);
    let (key, value) = labels.find(|(key, value)| room.labels.get(*key) != Some(*value))?;
    Some(format!("lacks the label {key}={value}, which pods of the job ask for"))
}

/// What is free for others than the seats that are kept. Nodes that have refused a pod of the job are not asked again
/// while it waits there.
fn open_rooms(s: &Snapshot<'_>, kept: &[Seat]) -> Vec<Room> {
    let refused = |r: &Room| s.pods.iter().find(|p| p.node == r.node)?.unschedulable.clone();
    let close =
        |r: &Room| Room { closed: r.closed.clone().or_else(|| elsewhere(s, r)).or_else(|| refused(r)), ..r.clone() };
    let mut rooms: Vec<Room> = s.rooms.iter().map(close).collect();
    // A seat whose pod is not there yet takes room all the same.
    for seat in kept.iter().filter(|seat| s.pods.iter().all(|p| p.worker != seat.worker)) {
        if let Some(room) = rooms.iter_mut().find(|r| r.node == seat.node) {
            room.count(&s.job.spec, seat, -1);
        }
    }
    rooms
}

/// Rooms as they would be if the job kept nothing.
fn freed(s: &Snapshot<'_>, mut rooms: Vec<Room>, kept: &[Seat]) -> Vec<Room> {
    for seat in kept {
        if let Some(room) = rooms.iter_mut().find(|r| r.node == seat.node) {
            room.count(&s.job.spec, seat, 1);
        }
    }
    rooms
}

/// Where a job can go on with another number of workers, all pods go: the head first, that it may write a checkpoint.
fn anew(s: &Snapshot<'_>, mut d: Desired, n: usize, no_room: &str) -> Desired {
    let text = format!("goes on with {n} workers from the last checkpoint: {no_room}");
    if d.status.condition(condition::TRAINING).is_none_or(|c| c.reason != reason::STARTING || c.message != text) {
        d.events.push(("Resized", text.clone(), true));
    }
    stop(s, &mut d);
    set(s, &mut d.status, condition::TRAINING, ConditionStatus::False, reason::STARTING, &text);
    d.again = LOOK;
    d
}

/// Pods go: first the head, which lets workers finish their steps and writes a checkpoint; then the others.
fn stop(s: &Snapshot<'_>, d: &mut Desired) {
    let head = s.pods.iter().find(|p| p.worker == 0);
    let last = head.into_iter().chain(s.pods.iter().filter(|_| head.is_none()));
    // A node that does not answer confirms nothing.
    let going = last.filter(|p| !p.terminating || lost(s, p));
    d.delete = going.map(|p| (p.name.clone(), lost(s, p))).collect();
}

/// Whether the node of a pod does not answer.
fn lost(s: &Snapshot<'_>, pod: &PodSeen) -> bool {
    let room = s.rooms.iter().find(|r| r.node == pod.node);
    room.is_none_or(|r| r.closed.as_deref() == Some("is not ready"))
}

/// Why there is to be another plan.
fn why(s: &Snapshot<'_>, current: Option<&PartitionPlan>, kept: &[Seat]) -> String {
    let Some(current) = current else { return "the first plan".to_owned() };
    if s.pods.is_empty() {
        return "no pod of the job is left: it begins anew from its last checkpoint".to_owned();
    }
    let lost = current.spec.shards.iter().find(|seat| !kept.contains(seat));
    let Some(seat) = lost else { return "another plan".to_owned() };
    let said = s.pods.iter().find(|p| p.worker == seat.worker).and_then(|p| p.unschedulable.clone());
    let room = s.rooms.iter().find(|r| r.node == seat.node);
    let cause = match (room.map(|r| (r, elsewhere(s, r))), said) {
        (None, _) => "is gone".to_owned(),
        (Some((_, Some(why))), _) => why,
        (Some((room, None)), None) => {
            let shut = room.shut(&s.job.spec.placement.tolerations, &seat.device);
            shut.unwrap_or_else(|| "cannot be used".to_owned())
        }
        (Some(_), Some(said)) => format!("does not take worker {}: {said}", seat.worker),
    };
    format!("node {} {cause}", seat.node)
}

/// `cut`: how the graph is cut anew, where the head has said so.
fn adopt(s: &Snapshot<'_>, shards: Vec<Seat>, reason: String, cut: Option<&PlanReport>) -> PartitionPlanSpec {
    let job = s.job.metadata.name.clone().unwrap_or_default();
    let revision = s.plans.last().map_or(1, |p| p.spec.revision.saturating_add(1));
    let of = serde_json::json!({"spec": s.job.spec, "shards": shards});
    let inputs = Sha256::digest(of.to_string().as_bytes()).iter().take(8).map(|b| format!("{b:02x}")).collect();
    let nodes: BTreeSet<String> = shards.iter().map(|s| s.node.clone()).collect();
    PartitionPlanSpec {
        job,
        revision,
        nodes: nodes.into_iter().collect(),
        reason: reason.chars().take(1000).collect(),
        changes: s.plans.last().map(|before| changes(before, &shards, cut)).unwrap_or_default(),
        inputs,
        shards,
    }
}

/// Name of a job's plan.
pub fn plan_name(job: &str, revision: u64) -> String {
    format!("{job}-plan-{revision}")
}

/// Pods for every seat of a plan, and what is known of them.
fn run(s: &Snapshot<'_>, d: &mut Desired, plan: &PartitionPlanSpec) {
    let wanted = |p: &&PodSeen| plan.shards.iter().any(|seat| seat.worker == p.worker && seat.node == p.node);
    let there: BTreeSet<u32> = s.pods.iter().filter(wanted).map(|p| p.worker).collect();
    // Where a pod of the same name is on its way out, another comes later. A node that does not answer confirms nothing.
    let unwanted = s.pods.iter().filter(|p| !wanted(p) && (!p.terminating || lost(s, p)));
    d.delete.extend(unwanted.map(|p| (p.name.clone(), lost(s, p))));
    // Those that have failed, as an evicted pod has, make room for others.
    let failed = s.pods.iter().filter(wanted).filter(|p| p.phase == "Failed" && !p.terminating);
    d.delete.extend(failed.map(|p| (p.name.clone(), false)));

    let whole = there.len() == plan.shards.len();
    let names: BTreeSet<u32> = s.pods.iter().map(|p| p.worker).collect();
    // Who takes the place of another is of the group that the others are in.
    let queued = match s.pods.iter().filter(wanted).find(|p| !p.terminating) {
        Some(other) => other.queued.clone(),
        None => Queued::first(s.job, plan),
    };
    if !whole {
        let mut rendered = render(s.job, plan, s.site);
        profiles::offer(&mut rendered.support[0], s.profiles);
        d.apply.extend(rendered.support);
        let mut missing: Vec<(u32, Value)> = rendered.pods;
        missing.retain(|(worker, _)| !names.contains(worker));
        let completes = there.len() + missing.len() == plan.shards.len();
        if let Some((_, last)) = missing.last_mut().filter(|_| completes) {
            release(last);
        }
        for (worker, mut pod) in missing {
            if let Some(queued) = &queued {
                queued.join(&mut pod, s.job, plan.shards.len());
            }
            d.certify.push(worker);
            d.apply.push(pod);
        }
        d.again = 2;
    } else {
        // Pods that still fetch read where from a config map: a URL that was renewed reaches them there.
        let seen = s.job.status.as_ref().and_then(|status| status.observed_generation);
        if seen != s.job.metadata.generation && s.job.spec.volumes.iter().any(|v| v.archive.is_some()) {
            let mut support = render(s.job, plan, s.site).support;
            profiles::offer(&mut support[0], s.profiles);
            d.apply.push(support.swap_remove(0));
        }
        d.open = s.pods.iter().filter(|p| p.gated).map(|p| p.name.clone()).collect();
        d.again = LOOK;
    }
    // Time in a queue does not count.
    let waits = if whole { s.pods.iter().any(|p| p.held.is_some()) } else { queued.is_some() };
    if !waits {
        d.status.start_time.get_or_insert_with(|| s.now.to_string());
    }
    d.status.shards = u32::try_from(n_shards(s.job, plan)).ok();
    d.status.plan = Some(plan_name(&plan.job, plan.revision));
    let nodes: BTreeSet<&str> = plan.shards.iter().map(|s| s.node.as_str()).collect();
    let text = format!("{} workers on {}", plan.shards.len(), nodes.into_iter().collect::<Vec<_>>().join(", "));
    set(s, &mut d.status, condition::PLACED, ConditionStatus::True, "Planned", &text);
    let known = d.status.condition(condition::TRAINING).filter(|c| c.reason == reason::RUNNING && unheard(s, plan));
    let (status, state, text) = match known {
        Some(known) => (known.status, reason::RUNNING, s.deaf.clone().unwrap_or_else(|| known.message.clone())),
        None => progress(s, plan),
    };
    let known = d.status.condition(condition::TRAINING).is_some_and(|c| c.reason == state);
    if !known && state == reason::RUNNING {
        d.events.push(("Running", text.clone(), false));
    }
    set(s, &mut d.status, condition::TRAINING, status, state, &text);
}

/// Whether all pods run and their head says nothing. It is busy, or it has ended and its pod will say so in a moment: that is
/// no reason to take it for one that starts.
fn unheard(s: &Snapshot<'_>, plan: &PartitionPlanSpec) -> bool {
    let runs = |seat: &Seat| {
        let pod = s.pods.iter().find(|p| p.worker == seat.worker && p.node == seat.node);
        pod.is_some_and(|p| p.phase == "Running" && !p.terminating && p.stuck.is_none())
    };
    let has_ended = |h: &HeadSeen| h.exit_code.is_some() || h.last_words.is_some();
    let ended = s.pods.iter().filter_map(|p| p.head.as_ref()).any(has_ended);
    s.report.is_none() && !ended && plan.shards.iter().all(runs)
}

/// (status, reason, message) of the condition `Training`.
fn progress(s: &Snapshot<'_>, plan: &PartitionPlanSpec) -> (ConditionStatus, &'static str, String) {
    if let Some(report) = s.report.filter(|r| r.state == JobState::Training) {
        let shards = report.plan.as_ref().map_or(0, |p| p.shards.len());
        return (ConditionStatus::True, reason::RUNNING, format!("steps go on over {shards} shards"));
    }
    if let Some((pod, gate)) = s.pods.iter().find_map(|p| Some((p, p.held.as_ref()?))) {
        let text = held(&pod.name, gate, pod.queued.as_ref(), &plan.shards);
        return (ConditionStatus::False, reason::WAITING, text);
    }
    let stuck = s.pods.iter().find_map(|p| Some((&p.name, p.unschedulable.as_ref().or(p.stuck.as_ref())?)));
    let running = s.pods.iter().filter(|p| p.phase == "Running").count();
    let text = match (stuck, s.report) {
        (Some((pod, why)), _) => format!("pod {pod}: {why}"),
        (None, Some(report)) if !report.message.is_empty() => report.message.clone(),
        (None, Some(_)) => "the head waits for workers, which then compile".to_owned(),
        (None, None) => s.deaf.clone().unwrap_or_else(|| format!("{running} of {} pods run", plan.shards.len())),
    };
    (ConditionStatus::False, reason::STARTING, text)
}

/// Sets a condition; its time is that of the last change of its status.
fn set(s: &Snapshot<'_>, to: &mut TrainingJobStatus, kind: &str, status: ConditionStatus, reason: &str, message: &str) {
    let before = to.condition(kind).filter(|c| c.status == status).map(|c| c.last_transition_time.clone());
    let condition = Condition {
        kind: kind.to_owned(),
        status,
        reason: reason.to_owned(),
        message: message.chars().take(8000).collect(),
        last_transition_time: before.unwrap_or_else(|| s.now.to_string()),
        observed_generation: s.job.metadata.generation,
    };
    match to.conditions.iter_mut().find(|c| c.kind == kind) {
        Some(place) => *place = condition,
        None => to.conditions.push(condition),
    }
}
