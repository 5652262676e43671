use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::decide::{Desired, HeadSeen, PodSeen, Snapshot, decide};
use super::inventory::{Room, Taken, rooms, taken};
use super::observe;
use super::place::{Need, place, topology};
use super::render::{Site, parts, render, secret};
use crate::api::{ModelProfile, PartitionPlan, TrainingJob, TrainingJobSpec, TrainingJobStatus, condition, parse};
use crate::plan::explain::Short;
use crate::tls::{Certificate, FILES, Name};
use crate::topology::Measured;
use crate::wire::report::{JobReport, JobState, Learned, PlanReport, Recommended, ShardReport};

const JOB: &str = "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {name: a, namespace: ns, uid: u-1}\nspec:\n  bundle: models/m.bundle\n  steps: 30\n  results: work\n  data: {uri: work/x.txt}\n  parallelism: {shards: 2}\n  resources: {cores: 1, memory: 1Gi}\n  volumes:\n  - {name: models, configMap: {name: m, items: [{key: i, path: m.bundle/i}]}}\n  - {name: work, persistentVolumeClaim: {claimName: w}}\n";

fn job() -> TrainingJob {
    parse(JOB).unwrap()
}

fn site() -> Site {
    let plugins = [("cpu", "/p.so"), ("nvidia.com/gpu", "/cuda.so")].map(|(d, f)| (d.to_owned(), f.to_owned()));
    Site { image: "f:1".into(), pull_policy: "IfNotPresent".into(), plugins: plugins.into(), namespace: "sys".into() }
}

fn room(node: &str, cores: i64, gib: i64) -> Room {
    Room { node: node.to_owned(), cpu: cores * 1000, memory: gib << 30, pods: 110, ..Room::default() }
}

fn need(spec: &TrainingJobSpec) -> Vec<Need> {
    Need::of(spec, &site().plugins).unwrap()
}

/// The world of one job: what the cluster would hold.
struct World {
    job: TrainingJob,
    rooms: Vec<Room>,
    pods: Vec<PodSeen>,
    plans: Vec<PartitionPlan>,
    profiles: Vec<ModelProfile>,
    report: Option<JobReport>,
    deaf: Option<String>,
    now: i64,
}

impl World {
    fn new(rooms: &[Room]) -> Self {
        Self {
            job: job(),
            rooms: rooms.to_vec(),
            pods: Vec::new(),
            plans: Vec::new(),
            profiles: Vec::new(),
            report: None,
            deaf: None,
            now: 1_800_000_000,
        }
    }

    fn decide(&self) -> Desired {
        let mut rooms = self.rooms.clone();
        for pod in &self.pods {
            for room in rooms.iter_mut().filter(|r| r.node == pod.node) {
                (room.cpu, room.memory) = (room.cpu - 1000, room.memory - (1 << 30));
            }
        }
        decide(&Snapshot {
            job: &self.job,
            rooms: &rooms,
            pods: &self.pods,
            plans: &self.plans,
            profiles: &self.profiles,
            report: self.report.as_ref(),
            deaf: self.deaf.clone(),
            now: Timestamp::from_second(self.now).unwrap(),
            site: &site(),
        })
    }

    /// Does what was decided, as the API server would; pods that are deleted are gone.
    fn turn(&mut self) -> Desired {
        let d = self.decide();
        self.now += 1;
        self.job.status = Some(d.status.clone());
        if let Some(spec) = &d.plan {
            let name = super::decide::plan_name(&spec.job, spec.revision);
            self.plans.push(PartitionPlan::new(&name, spec.clone()));
        }
        if let Some((name, status, _)) = &d.plan_status {
            let plan = self.plans.iter_mut().find(|p| p.metadata.name.as_ref() == Some(name)).unwrap();
            plan.status = Some(status.clone());
        }
        if let Some(spec) = &d.profile {
            self.profiles.retain(|p| p.spec.bundle != spec.bundle);
            self.profiles.push(ModelProfile::new("p", spec.clone()));
        }
        self.pods.retain(|p| d.delete.iter().all(|(name, _)| *name != p.name));
        for object in d.apply.iter().filter(|o| o["kind"] == "Pod") {
            let pod: Pod = serde_json::from_value(object.clone()).unwrap();
            let seen = PodSeen { phase: "Pending".into(), ..observe::pod(&pod).unwrap() };
            assert!(self.pods.iter().all(|p| p.name != seen.name), "pods do not change");
            self.pods.push(seen);
        }
        self.pods.iter_mut().filter(|p| d.open.contains(&p.name)).for_each(|p| p.gated = false);
        self.pods.iter_mut().filter(|p| d.settle.contains(&p.name)).for_each(|p| p.settled = true);
        d
    }

    /// Turns until nothing is left to do, and all pods run.
    fn settle(&mut self) {
        for _ in 0..10 {
            let d = self.turn();
            if d.apply.is_empty() && d.open.is_empty() && d.delete.is_empty() && d.plan.is_none() {
                self.pods.iter_mut().filter(|p| !p.gated).for_each(|p| p.phase = "Running".into());
                return;
            }
        }
        panic!("the operator never comes to rest");
    }

    fn state(&self) -> &str {
        let status = self.job.status.as_ref().unwrap();
        &status.condition(condition::TRAINING).unwrap().reason
    }

    fn nodes(&self) -> Vec<&str> {
        self.plans.last().unwrap().spec.shards.iter().map(|s| s.node.as_str()).collect()
    }
}

#[test]
fn a_job_gets_a_plan_then_gated_pods_then_the_gate_opens_then_nothing_is_left_to_do() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    let first = world.turn();
    assert_eq!(first.plan.unwrap().reason, "the first plan");
    assert_eq!(world.nodes(), ["n1", "n2"]);
    let gated: Vec<bool> = world.pods.iter().map(|p| p.gated).collect();
    assert_eq!(gated, [true, false], "with the last of them the gang is whole");
    assert_eq!(world.turn().open, ["a-0"]);
    assert!(world.pods.iter().all(|p| !p.gated));
    world.settle();
    let rest = world.decide();
    assert!(rest.apply.is_empty() && rest.open.is_empty() && rest.events.is_empty() && rest.plan.is_none(), "{rest:?}");
    world.turn();
    assert_eq!(world.decide().status, world.job.status.clone().unwrap(), "nothing is written at rest");
}

#[test]
fn a_pod_is_held_back_while_its_gang_is_not_whole() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8), room("n3", 1, 8)]);
    world.job.spec.parallelism.shards = Some(3);
    world.settle();
    let made = |world: &World| -> Vec<(String, bool)> {
        let pods = world.decide().apply.into_iter().filter(|o| o["kind"] == "Pod");
        let of =
            |p: Value| (p["metadata"]["name"].as_str().unwrap().to_owned(), p["spec"]["schedulingGates"].is_array());
        pods.map(of).collect()
    };
    let gone: Vec<PodSeen> = world.pods.drain(1..).collect();
    assert_eq!(made(&world), [("a-1".to_owned(), true), ("a-2".to_owned(), false)]);
    // One that is on its way out elsewhere has the name that another will have.
    world.pods.push(PodSeen { terminating: true, node: "n9".to_owned(), ..gone[1].clone() });
    assert_eq!(made(&world), [("a-1".to_owned(), true)]);
}

#[test]
fn a_shard_per_node_only_where_one_node_does_not_do() {
    let need = need(&job().spec);
    let nodes = |rooms: &[Room]| -> Vec<String> {
        place(&job().spec, &need, rooms, &[]).unwrap().into_iter().map(|s| s.node).collect()
    };
    assert_eq!(nodes(&[room("n1", 1, 8), room("n2", 8, 8), room("n3", 2, 8)]), ["n3", "n3"]);
    assert_eq!(nodes(&[room("n1", 1, 8), room("n2", 2, 1)]), ["n1", "n2"]);
    let mut spread = job().spec;
    spread.placement.max_per_node = Some(1);
    let seats = place(&spread, &need, &[room("n1", 4, 8), room("n2", 4, 8)], &[]).unwrap();
    assert_eq!(seats.iter().map(|s| s.node.as_str()).collect::<Vec<_>>(), ["n1", "n2"]);
    let topology = topology(&seats);
    assert_eq!(topology.devices[1].node, "n2");
}

#[test]
fn an_impossible_request_says_what_is_missing_and_starts_when_room_appears() {
    let mut world = World::new(&[room("n1", 1, 8)]);
    let d = world.turn();
    assert_eq!(world.state(), "Waiting");
    let said = d.status.condition(condition::PLACED).unwrap().message.clone();
    for part in ["2 workers of 1 cores", "room for 1", "n1: 1 cores", "as soon as there is room"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(d.events.len(), 1);
    assert_eq!(world.turn().events, [], "told once");
    world.rooms.push(room("n2", 4, 8));
    world.settle();
    assert_eq!(world.state(), "Starting");
}

#[test]
fn suspension_stops_the_head_first_and_resumes_with_a_new_plan_only_where_needed() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    world.job.spec.suspend = true;
    let d = world.decide();
    assert_eq!(d.delete, [("a-0".to_owned(), false)]);
    world.turn();
    assert_eq!(world.decide().delete, [("a-1".to_owned(), false)]);
    world.turn();
    world.turn();
    assert_eq!((world.state(), world.pods.len()), ("Suspended", 0));
    world.job.spec.suspend = false;
    world.settle();
    assert_eq!((world.pods.len(), world.plans.len()), (2, 1), "the same nodes: the same plan");
    world.job.spec.suspend = true;
    (0..4).for_each(|_| drop(world.turn()));
    world.rooms.push(room("n0", 2, 8));
    world.job.spec.suspend = false;
    world.settle();
    assert_eq!(world.plans.len(), 1, "a better place is no reason to move");
    world.rooms.pop();
    world.job.spec.suspend = true;
    (0..4).for_each(|_| drop(world.turn()));
    world.rooms[1] = room("n3", 1, 8);
    world.job.spec.suspend = false;
    world.settle();
    assert_eq!(world.nodes(), ["n1", "n3"]);
    assert!(world.plans[1].spec.reason.contains("last checkpoint"));
}

#[test]
fn a_pod_that_is_gone_comes_back_and_one_whose_node_is_gone_comes_elsewhere() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8), room("n3", 1, 8)]);
    world.settle();
    world.pods.remove(1);
    world.settle();
    assert_eq!((world.pods.len(), world.plans.len()), (2, 1));
    world.rooms[1].closed = Some("is not ready".into());
    let d = world.decide();
    assert_eq!(d.delete, [("a-1".to_owned(), true)], "a node that is silent confirms no deletion");
    world.settle();
    assert_eq!(world.nodes(), ["n1", "n3"]);
    assert_eq!(world.plans[1].spec.reason, "node n2 is not ready");
    assert_eq!(world.plans[1].spec.changes, ["worker 1 on node n3 instead of n2"]);
    let mut nodes: Vec<&str> = world.pods.iter().map(|p| p.node.as_str()).collect();
    nodes.sort();
    assert_eq!(nodes, ["n1", "n3"]);
}

#[test]
fn a_pod_the_scheduler_refuses_is_planned_elsewhere_with_the_reason() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    world.rooms = vec![room("n1", 1, 8), room("n2", 8, 8), room("n3", 1, 8)];
    world.pods[1].phase = "Pending".into();
    world.pods[1].unschedulable = Some("a volume is not there".into());
    world.settle();
    assert_eq!(world.nodes(), ["n1", "n3"]);
    assert_eq!(world.plans[1].spec.reason, "node n2 does not take worker 1: a volume is not there");
}

#[test]
fn a_claim_that_is_not_bound_yet_is_no_fault_of_the_node() {
    let seen = |why: &str| {
        let pod = json!({
            "metadata": {"name": "a-0", "labels": {"foreshard.dev/worker": "0"}}, "spec": {"containers": []},
            "status": {"conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why},
            ]},
        });
        let seen = observe::pod(&serde_json::from_value(pod).unwrap()).unwrap();
        (seen.unschedulable.is_some(), seen.stuck.is_some())
    };
    assert_eq!(seen("0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims."), (false, true));
    assert_eq!(seen("0/3 nodes are available: persistentvolumeclaim \"w\" not found."), (false, true));
    assert_eq!(seen("0/3 nodes are available: 1 Insufficient cpu."), (true, false));
}

#[test]
fn the_heads_last_words_end_the_job() {
    let report = JobReport {
        state: JobState::Done,
        step: 30,
        steps: 30,
        first_loss: Some(4.2),
        loss: Some(2.5),
        results: "/job/results/a/run-1".into(),
        ..JobReport::default()
    };
    let end = |code: i32, restarts: u32, words: Result<JobReport, String>| {
        let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
        world.settle();
        world.pods[0].head = Some(HeadSeen { restarts, exit_code: Some(code), last_words: Some(words) });
        world.turn();
        world.job.status.clone().unwrap()
    };
    let done = end(0, 0, Ok(report.clone()));
    assert!(done.is_true(condition::COMPLETE));
    let said = &done.condition(condition::COMPLETE).unwrap().message;
    assert_eq!(said, "30 steps, loss 4.2000 -> 2.5000, weights in /job/results/a/run-1");

    let refused = JobReport { state: JobState::Refused, message: "no such file".into(), ..report.clone() };
    let failed = end(2, 0, Ok(refused));
    assert_eq!(failed.condition(condition::FAILED).unwrap().message, "no such file");
    assert!(!end(1, 1, Err("killed".into())).has_ended(), "it may be started again");
    let failed = end(1, 4, Err("killed".into()));
    assert!(failed.condition(condition::FAILED).unwrap().message.contains("4 times: killed"));
}

#[test]
fn an_ended_job_stops_what_runs_and_goes_when_its_time_has_come() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job.spec.active_deadline_seconds = Some(100);
    world.job.spec.ttl_seconds_after_finished = Some(50);
    world.settle();
    world.now += 101;
    world.turn();
    assert_eq!(world.job.status.as_ref().unwrap().condition(condition::FAILED).unwrap().reason, "DeadlineExceeded");
    assert_eq!(world.turn().delete.len(), 2);
    assert!(!world.decide().expire);
    world.now += 50;
    assert!(world.decide().expire);
}

#[test]
fn pods_of_a_complete_job_end_by_themselves_and_can_still_be_read_and_its_last_figures_are_written() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    let plan = PlanReport { revision: 1, step_seconds: 0.5, ..PlanReport::default() };
    let words = JobReport {
        state: JobState::Done,
        step: 30,
        plan: Some(plan),
        step_seconds: Some(0.6),
        ..JobReport::default()
    };
    world.pods[0].head = Some(HeadSeen { restarts: 0, exit_code: Some(0), last_words: Some(Ok(words)) });
    let (_, status, urgent) = world.turn().plan_status.unwrap();
    assert!(urgent && status.observed.is_some());
    let d = world.turn();
    assert_eq!((d.delete.len(), d.again), (0, 30), "the sidecar is about to go");
    world.pods[0].phase = "Succeeded".into();
    world.now += 30;
    assert_eq!(world.turn().delete, [("a-1".to_owned(), false)], "one that does not");
    assert_eq!(world.pods.len(), 1);
}

#[test]
fn another_cut_while_training_is_another_revision_on_the_same_nodes() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    let plan = |revision: u64| {
        let shard = |worker, ops| ShardReport { workers: vec![worker], ops, ..ShardReport::default() };
        let shards = vec![shard(0, 70 + 10 * revision), shard(1, 40)];
        let (why, microbatch) = ("worker 1 is slow".to_owned(), 4);
        Some(PlanReport { revision, why, step_seconds: 0.5, microbatch, shards, ..PlanReport::default() })
    };
    let report = JobReport { state: JobState::Training, step: 3, loss: Some(4.0), ..JobReport::default() };
    world.report = Some(JobReport { plan: plan(1), step_seconds: Some(0.6), ..report.clone() });
    world.settle();
    assert_eq!(world.state(), "Running");
    assert_eq!(world.plans[0].status.as_ref().unwrap().predicted.as_ref().unwrap().cut, 1);
    world.report = Some(JobReport { plan: plan(2), ..report });
    world.settle();
    assert_eq!(world.plans.len(), 2);
    assert_eq!(world.plans[1].spec.reason, "recut while training: worker 1 is slow");
    assert_eq!(world.plans[0].spec.changes, [""; 0]);
    assert_eq!(world.plans[1].spec.changes, ["shard 0 of 90 ops instead of 80"]);
    assert_eq!(world.plans[1].spec.shards, world.plans[0].spec.shards);
    assert_eq!(world.plans[1].status.as_ref().unwrap().predicted.as_ref().unwrap().cut, 2);
    assert_eq!(world.pods.len(), 2);
}

#[test]
fn an_explanation_is_written_once_and_stays_while_a_new_head_works_on_its_own() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    let short = Short { limit: "x".repeat(2000), more: vec!["one more device".to_owned(); 20], ..Short::default() };
    let plan = |explanation| Some(PlanReport { revision: 1, explanation, ..PlanReport::default() });
    let report = JobReport { state: JobState::Training, step: 3, loss: Some(4.0), ..JobReport::default() };
    for (explanation, written) in [(None, false), (Some(short), true), (None, true)] {
        world.report = Some(JobReport { plan: plan(explanation), ..report.clone() });
        world.settle();
        let known = world.plans[0].status.as_ref().unwrap().explanation.as_ref();
        let sizes = known.map(|e| (e.limit.len(), e.more.len()));
        assert_eq!(sizes, written.then_some((1024, 8)), "the schema takes no more");
    }
    assert!(world.decide().plan_status.is_none());
}

#[test]
fn a_recommended_plan_is_told_once_and_taken_over_when_somebody_agrees() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    let recommended = |share: u32| Some(Recommended { revision: 3, why: format!("it saves {share}%") });
    let results = "/job/results/a/run-2".to_owned();
    let report = JobReport { state: JobState::Training, results, loss: Some(4.0), ..JobReport::default() };
    world.report = Some(JobReport { recommended: recommended(20), ..report.clone() });
    let d = world.turn();
    assert_eq!(d.approve, None);
    let said = world.job.status.as_ref().unwrap().condition(condition::RECOMMENDED).unwrap().message.clone();
    assert_eq!(
        said,
        "run-2.3: it saves 20%. To agree: kubectl annotate trainingjob a --overwrite foreshard.dev/approve=run-2.3"
    );
    world.report = Some(JobReport { recommended: recommended(21), ..report.clone() });
    assert_eq!(world.decide().status, world.job.status.clone().unwrap(), "figures alone are not news");

    for (id, approved) in [("run-1.3", None), ("run-2.3", Some(3))] {
        world.job.metadata.annotations = Some([("foreshard.dev/approve".to_owned(), id.to_owned())].into());
        assert_eq!(world.decide().approve, approved);
    }
    world.report = Some(report);
    world.turn();
    assert!(!world.job.status.as_ref().unwrap().is_true(condition::RECOMMENDED));
    assert_eq!(world.decide().approve, None);
}

#[test]
fn what_a_job_learns_is_kept_and_offered_to_later_jobs_and_noise_is_not_written() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    let factors = |product: f64| Measured { product, ..Measured::NOMINAL };
    let told = |kind: &str, product: f64| JobReport {
        state: JobState::Training,
        learned: Some(Learned { bundle: "ab".repeat(32), kinds: [(kind.to_owned(), factors(product))].into() }),
        ..JobReport::default()
    };
    world.report = Some(told("cpu", 2.5));
    assert!(world.turn().profile.is_some());
    world.report = Some(told("cpu", 2.6));
    assert_eq!(world.turn().profile, None, "a tenth is noise");
    world.report = Some(told("google.com/tpu", 0.5));
    let both = world.turn().profile.unwrap();
    assert_eq!(both.devices.iter().map(|c| c.kind.as_str()).collect::<Vec<_>>(), ["cpu", "google.com/tpu"]);
    let profiles = std::mem::take(&mut world.profiles);
    let later = World { profiles, ..World::new(&world.rooms) }.turn();
    let config = later.apply.iter().find(|o| o["kind"] == "ConfigMap").unwrap();
    let text = config["data"]["profiles.json"].as_str().unwrap();
    let read: BTreeMap<String, BTreeMap<String, Measured>> = serde_json::from_str(text).unwrap();
    assert_eq!(read[&"ab".repeat(32)]["cpu"], factors(2.5), "as the head reads it");
    world.report = Some(told("cpu", f64::NAN));
    assert!(world.turn().profile.unwrap().devices.iter().all(|c| c.measured().product.is_finite()));
}

/// What the Pod Security Standard `restricted` asks of a container.
fn is_restricted(pod: &Value) -> bool {
    let spec = &pod["spec"];
    let container = |c: &Value| {
        let context = &c["securityContext"];
        context["allowPrivilegeEscalation"] == json!(false) && context["capabilities"]["drop"] == json!(["ALL"])
    };
    let all = |list: &str| spec[list].as_array().into_iter().flatten().all(container);
    let context = &spec["securityContext"];
    let allowed = ["configMap", "emptyDir", "persistentVolumeClaim", "image", "secret", "name"];
    let volumes = spec["volumes"].as_array().unwrap();
    context["runAsNonRoot"] == json!(true)
        && context["seccompProfile"]["type"] == "RuntimeDefault"
        && all("containers")
        && all("initContainers")
        && volumes.iter().all(|v| v.as_object().unwrap().keys().all(|k| allowed.contains(&k.as_str())))
}

#[test]
fn pods_are_pinned_restricted_and_ask_for_what_the_plan_gave_them() {
    let world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    let plan = world.decide().plan.unwrap();
    let rendered = render(&world.job, &plan, &site());
    for ((worker, pod), seat) in rendered.pods.iter().zip(&plan.shards) {
        assert!(is_restricted(pod), "{pod:#}");
        assert_eq!(pod["spec"]["automountServiceAccountToken"], json!(false));
        let typed: Pod = serde_json::from_value(pod.clone()).unwrap();
        let seen = observe::pod(&typed).unwrap();
        assert_eq!((seen.worker, seen.node.as_str()), (*worker, seat.node.as_str()));
        let taken = taken(&typed).unwrap();
        let head = if *worker == 0 { 256 << 20 } else { 0 };
        let node = seat.node.clone();
        assert_eq!(taken, Taken { node, cpu: 1000, memory: (1 << 30) + head, ..Taken::default() });
    }
    let manifest = rendered.support[0]["data"]["job.yaml"].as_str().unwrap();
    assert_eq!(parse(manifest).unwrap().spec, world.job.spec, "the head reads what the user wrote");
}

#[test]
fn a_pod_has_one_secret_of_which_each_container_sees_only_its_own_part() {
    let world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    let plan = world.decide().plan.unwrap();
    let text = |s: &Value| s.as_str().unwrap().to_owned();
    let mut names = BTreeSet::new();
    for (worker, pod) in render(&world.job, &plan, &site()).pods {
        let certificate = || Certificate { authority: "ca".into(), certificate: "crt".into(), key: "key".into() };
        let certificates: Vec<(Name, Certificate)> = parts(worker).map(|part| (part, certificate())).collect();
        let secret = secret(&world.job, worker, "token", &certificates);
        let name = text(&secret["metadata"]["name"]);
        let data = secret["stringData"].as_object().unwrap();
        assert_eq!(data.len(), 1 + 3 * certificates.len());
        let containers = ["containers", "initContainers"].map(|list| pod["spec"][list].as_array().cloned());
        let mut seen = 0;
        for (container, part) in containers.into_iter().flatten().flatten().zip(parts(worker)) {
            let of = &container["env"][0]["valueFrom"]["secretKeyRef"];
            assert_eq!((text(&of["name"]), data.get(&text(&of["key"]))), (name.clone(), Some(&json!("token"))));
            let mounts = container["volumeMounts"].as_array().unwrap();
            let mounts = mounts.iter().filter(|m| m["mountPath"] == "/etc/foreshard-tls").collect::<Vec<_>>();
            assert_eq!(mounts.len(), 1);
            let volumes = pod["spec"]["volumes"].as_array().unwrap();
            let volume = volumes.iter().find(|v| v["name"] == mounts[0]["name"]).unwrap();
            assert_eq!(text(&volume["secret"]["secretName"]), name);
            let items = volume["secret"]["items"].as_array().unwrap();
            for (item, (file, content)) in items.iter().zip(FILES.iter().zip(["ca", "crt", "key"])) {
                assert_eq!((text(&item["key"]), text(&item["path"])), (format!("{part}.{file}"), (*file).to_owned()));
                assert_eq!(data[&text(&item["key"])], content);
            }
            seen += items.len();
        }
        assert_eq!(seen, 3 * certificates.len(), "each part has its container");
        names.insert(name);
    }
    assert_eq!(names.len(), 2, "no pod has the secret of another");
}

#[test]
fn a_feeder_stands_beside_the_head_and_sees_nothing_of_the_job_but_its_directory() {
    let feeder = "data: {socket: f.sock, feeder: {image: 'u:1', command: [feed], args: [f.sock], env: {A: b}}}";
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job = parse(&JOB.replace("data: {uri: work/x.txt}", feeder)).unwrap();
    let plan = world.decide().plan.unwrap();
    let pods = render(&world.job, &plan, &site()).pods;
    let of = |pod: &Value| -> Option<Value> {
        pod["spec"]["initContainers"].as_array()?.iter().find(|c| c["name"] == "feeder").cloned()
    };
    let (first, second) = (&pods[0].1, &pods[1].1);
    assert!(of(second).is_none() && is_restricted(first), "{first:#}");
    let found = of(first).unwrap();
    assert_eq!(
        (&found["image"], &found["command"], &found["args"]),
        (&json!("u:1"), &json!(["feed"]), &json!(["f.sock"]))
    );
    assert_eq!(found["env"], json!([{"name": "A", "value": "b"}]));
    assert_eq!((&found["restartPolicy"], &found["workingDir"]), (&json!("Always"), &json!("/job")));
    let mounts: Vec<(&str, bool)> = found["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["mountPath"].as_str().unwrap(), m["readOnly"] == json!(true)))
        .collect();
    assert_eq!(mounts, [("/job", false), ("/tmp", false), ("/job/models", true), ("/job/work", true)]);
    // It is given a part of what the first worker has.
    let typed: Pod = serde_json::from_value(first.clone()).unwrap();
    assert_eq!(taken(&typed).unwrap().cpu, 1000);

    // One that cannot run is told.
    let mut pod = first.clone();
    let ended = json!({"exitCode": 1, "message": "no such file: work/rows"});
    let waiting = json!({"reason": "CrashLoopBackOff"});
    pod["status"] = json!({"phase": "Running", "initContainerStatuses": [{
        "name": "feeder", "image": "u:1", "imageID": "", "ready": false, "restartCount": 4,
        "state": {"waiting": waiting}, "lastState": {"terminated": ended},
    }]});
    let seen = observe::pod(&serde_json::from_value::<Pod>(pod).unwrap()).unwrap();
    assert_eq!(seen.stuck.as_deref(), Some("container feeder ends again and again: no such file: work/rows"));
}

/// `Running` used to become `Starting` for a second before `Complete`, when the head no longer listened.
#[test]
fn a_head_that_is_silent_for_a_moment_is_not_said_to_start() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    world.report = Some(JobReport { state: JobState::Training, step: 3, loss: Some(4.0), ..JobReport::default() });
    world.turn();
    let told = world.job.status.clone();
    world.report = None;
    let desired = world.turn();
    assert_eq!((world.state(), desired.events.len()), ("Running", 0));
    assert_eq!(world.job.status, told);
    world.pods[0].head = Some(HeadSeen { restarts: 1, last_words: Some(Err("killed".into())), ..HeadSeen::default() });
    world.turn();
    assert_eq!(world.state(), "Starting", "one that was started again is not where it was");
}

/// An operator that is newer than the head goes on with what the head has said before, and says why nothing comes.
#[test]
fn a_head_that_cannot_be_heard_is_told_and_its_job_stays_as_it_was() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    world.deaf = Some("it is too old".to_owned());
    world.turn();
    let message = |world: &World| {
        let status = world.job.status.as_ref().unwrap();
        status.condition(condition::TRAINING).unwrap().message.clone()
    };
    assert_eq!((world.state(), message(&world).as_str()), ("Starting", "it is too old"));
    world.deaf = None;
    world.report = Some(JobReport { state: JobState::Training, step: 3, ..JobReport::default() });
    world.turn();
    assert_eq!((world.state(), message(&world).as_str()), ("Running", "steps go on over 0 shards"));
    (world.deaf, world.report) = (Some("it is too old".to_owned()), None);
    let desired = world.turn();
    assert_eq!((world.state(), message(&world).as_str()), ("Running", "it is too old"));
    assert!(desired.apply.is_empty() && desired.delete.is_empty() && desired.events.is_empty());
}

#[test]
fn credentials_are_given_to_whoever_fetches_data_and_to_nobody_else() {
    let feeder = "data: {socket: f.sock, credentials: store, feeder: {image: 'u:1'}}";
    for (data, reader) in [("data: {uri: 's3://b/x', credentials: store}", "trainer"), (feeder, "feeder")] {
        let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
        world.job = parse(&JOB.replace("data: {uri: work/x.txt}", data)).unwrap();
        let plan = world.decide().plan.unwrap();
        let pods = render(&world.job, &plan, &site()).pods;
        let lists = pods.iter().flat_map(|(_, pod)| ["containers", "initContainers"].map(|list| &pod["spec"][list]));
        let all = lists.filter_map(Value::as_array).flatten();
        let given: Vec<&Value> = all.filter(|c| c["envFrom"] == json!([{"secretRef": {"name": "store"}}])).collect();
        assert_eq!(given.iter().map(|c| c["name"].as_str().unwrap()).collect::<Vec<_>>(), [reader]);
    }
}

/// A job whose bundle is fetched.
fn fetching(url: &str) -> TrainingJob {
    let archive = format!("archive: {{url: {url:?}, sha256: {}}}", "ab".repeat(32));
    let mut job = parse(&JOB.replace("configMap: {name: m, items: [{key: i, path: m.bundle/i}]}", &archive)).unwrap();
    job.metadata.generation = Some(1);
    job
}

#[test]
fn archives_are_fetched_by_a_container_that_sees_nothing_else_before_the_others_start() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job = fetching("https://store/m.tgz?signature=x");
    let plan = world.decide().plan.unwrap();
    for (_, pod) in render(&world.job, &plan, &site()).pods {
        assert!(is_restricted(&pod), "{pod:#}");
        let fetch = &pod["spec"]["initContainers"][0];
        assert_eq!(
            (&fetch["name"], &fetch["restartPolicy"], &fetch["env"]),
            (&json!("fetch"), &Value::Null, &Value::Null)
        );
        let mounts = |c: &Value| -> Vec<(String, bool)> {
            let of = |m: &Value| (m["mountPath"].as_str().unwrap().to_owned(), m["readOnly"] == true);
            c["volumeMounts"].as_array().unwrap().iter().map(of).collect()
        };
        assert_eq!(mounts(fetch), [("/job/models".to_owned(), false), ("/etc/foreshard".to_owned(), true)]);
        assert!(mounts(&pod["spec"]["containers"][0]).contains(&("/job/models".to_owned(), true)));
        let volumes = pod["spec"]["volumes"].as_array().unwrap();
        assert!(volumes.contains(&json!({"name": "v-models", "emptyDir": {}})));
        assert!(!pod.to_string().contains("signature"), "the URL stands in one place");
    }
    let policy = &render(&world.job, &plan, &site()).support[2];
    assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress"]), "nothing keeps it from going out");
}

#[test]
fn credentials_of_an_archive_are_given_to_the_container_that_fetches_it_and_to_nobody_else() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job = fetching("s3://store/m.tgz");
    let archive = world.job.spec.volumes.iter().position(|v| v.archive.is_some()).unwrap();
    world.job.spec.volumes[archive].archive.as_mut().unwrap().credentials = Some("store".to_owned());
    let plan = world.decide().plan.unwrap();
    for (_, pod) in render(&world.job, &plan, &site()).pods {
        assert!(is_restricted(&pod), "{pod:#}");
        let given = json!([{"prefix": format!("VOLUME_{archive}_"), "secretRef": {"name": "store"}}]);
        assert_eq!(pod["spec"]["initContainers"][0]["envFrom"], given);
        assert_eq!(pod.to_string().matches("envFrom").count(), 1);
    }
}

#[test]
fn what_could_not_be_fetched_is_told_and_fails_the_job_only_where_no_other_try_can_help() {
    let seen = |code: i32, words: &str| {
        let pod = json!({
            "metadata": {"name": "a-1", "labels": {"foreshard.dev/job": "a", "foreshard.dev/worker": "1"}},
            "spec": {"containers": [], "nodeName": "n2"},
            "status": {"phase": "Pending", "initContainerStatuses": [{
                "name": "fetch", "ready": false, "restartCount": 1, "image": "", "imageID": "",
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": code, "message": words}},
            }]},
        });
        observe::pod(&serde_json::from_value(pod).unwrap()).unwrap()
    };
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job = fetching("https://store/m.tgz");
    world.settle();
    world.pods[1] = PodSeen { node: world.pods[1].node.clone(), ..seen(1, "url: answered 404") };
    world.turn();
    let training = world.job.status.as_ref().unwrap().condition(condition::TRAINING).unwrap();
    assert_eq!((training.reason.as_str(), training.message.as_str()), ("Starting", "pod a-1: url: answered 404"));
    world.pods[1] = PodSeen { node: world.pods[1].node.clone(), ..seen(2, "sha256: other") };
    world.turn();
    let failed = world.job.status.as_ref().unwrap().condition(condition::FAILED).unwrap();
    assert_eq!((failed.reason.as_str(), failed.message.as_str()), ("InvalidInput", "sha256: other"));
}

#[test]
fn a_renewed_url_reaches_pods_that_are_there() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job = fetching("https://store/m.tgz?signature=old");
    world.settle();
    let status = world.job.status.clone();
    world.job = TrainingJob { status, ..fetching("https://store/m.tgz?signature=new") };
    world.job.metadata.generation = Some(2);
    let d = world.turn();
    let [config] = &d.apply[..] else { panic!("{:?}", d.apply) };
    assert!(config["data"]["job.yaml"].as_str().unwrap().contains("signature=new"));
    assert!(d.delete.is_empty() && world.decide().apply.is_empty());
}

#[test]
fn nodes_offer_what_others_left_and_closed_ones_say_why() {
    let node = |name: &str, ready: &str, spec: Value| -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name}, "spec": spec,
            "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "110"},
                       "conditions": [{"type": "Ready", "status": ready}]},
        }))
        .unwrap()
    };
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p"},
        "spec": {"nodeName": "a", "containers": [{"name": "c", "resources": {"requests": {"cpu": "1500m", "memory": "1Gi"}}}]},
        "status": {"phase": "Running"},
    }))
    .unwrap();
    let nodes = [
        node("a", "True", json!({})),
        node("b", "Unknown", json!({})),
        node("c", "True", json!({"unschedulable": true})),
        node("d", "True", json!({"taints": [{"key": "gpu", "effect": "NoSchedule"}]})),
    ];
    let rooms = rooms(&nodes, taken(&pod));
    assert_eq!((rooms[0].cpu, rooms[0].memory, rooms[0].pods), (500, 3 << 30, 109));
    let closed: Vec<Option<&str>> = rooms.iter().map(|r| r.closed.as_deref()).collect();
    assert_eq!(closed, [None, Some("is not ready"), Some("is cordoned"), None]);
    assert_eq!(rooms[3].shut(&[], "gpu"), None, "taints named after a device keep others away from it");
    assert!(rooms[3].shut(&[], "cpu").unwrap().starts_with("has the taint gpu"));
}

#[test]
fn quantities_beyond_all_numbers_saturate() {
    let node = |name: &str| -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "status": {
                "allocatable": {"cpu": "9E", "memory": "9E", "pods": "9E"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }))
        .unwrap()
    };
    let container = json!({"name": "c", "resources": {"requests": {"cpu": "9E", "memory": "9E"}}});
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p"}, "spec": {"nodeName": "a", "containers": [container, container]},
    }))
    .unwrap();
    let all = rooms(&[node("a"), node("b")], [taken(&pod), taken(&pod), taken(&pod)].into_iter().flatten());
    assert!(all[0].memory < 0, "{all:?}");
    let mut world = World::new(&all);
    world.job.spec.parallelism.shards = Some(3);
    world.job.spec.placement.max_per_node = Some(1);
    assert!(world.decide().plan.is_none());
    world.job.spec.placement.max_per_node = None;
    assert!(world.decide().plan.is_some());
}

mod devices;
mod queue;

proptest! {
    /// No object that the API server can hold makes the operator panic, and no placement promises what is not there.
    #[test]
    fn places_within_what_is_free(
        shards in 1u32..20, cores in 1u32..5, gib in 1u64..5, max in proptest::option::of(1u32..4),
        free in proptest::collection::vec((0i64..9000, 0i64..12), 0..6),
    ) {
        let mut spec = job().spec;
        spec.parallelism.shards = Some(shards);
        spec.resources.cores = Some(cores);
        spec.resources.memory = Some(format!("{gib}Gi"));
        spec.placement.max_per_node = max;
        let rooms: Vec<Room> = free.iter().enumerate()
            .map(|(i, &(cpu, gib))| Room { cpu, ..room(&format!("n{i}"), 0, gib) }).collect();
        let need = need(&spec);
        let fit: i64 = rooms.iter().map(|r| {
            (r.cpu / (i64::from(cores) * 1000)).min((r.memory >> 30) / gib as i64).min(max.map_or(i64::MAX, i64::from))
        }).sum();
        match place(&spec, &need, &rooms, &[]) {
            Ok(seats) => {
                prop_assert!(fit >= i64::from(shards));
                prop_assert_eq!(seats.iter().map(|s| s.worker).collect::<Vec<_>>(), (0..shards).collect::<Vec<_>>());
                for r in &rooms {
                    let n = seats.iter().filter(|s| s.node == r.node).count() as i64;
                    prop_assert!(n * i64::from(cores) * 1000 <= r.cpu && n * gib as i64 <= r.memory >> 30);
                    prop_assert!(max.is_none_or(|m| n <= i64::from(m)));
                }
            }
            Err(e) => {
                prop_assert!(fit < i64::from(shards));
                prop_assert!(!e.to_string().is_empty());
            }
        }
    }

    #[test]
    fn survives_any_status_and_any_quantity(cpu in "\\PC{0,8}", start in "\\PC{0,24}", restarts in any::<u32>()) {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "n"}, "status": {"allocatable": {"cpu": cpu, "memory": cpu, "pods": cpu}},
        })).unwrap();
        let mut world = World::new(&rooms([&node], [] as [Taken; 0]));
        world.job.status = Some(TrainingJobStatus { start_time: Some(start), restarts, ..TrainingJobStatus::default() });
        world.turn();
        world.turn();
    }

    #[test]
    fn survives_any_plan(cores in any::<u32>(), memory in any::<u64>(), revision in any::<u64>()) {
        let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
        world.turn();
        for plan in &mut world.plans {
            plan.spec.revision = revision;
            plan.spec.shards.iter_mut().for_each(|seat| (seat.cores, seat.memory) = (cores, memory));
        }
        render(&world.job, &world.plans[0].spec, &site());
        world.turn();
        world.pods.clear();
        world.turn();
    }
}
