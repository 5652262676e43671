//! What Kueue needs of pods that it lets in as a group.

use serde_json::{Value, json};

use super::*;
use crate::api::Devices;

/// A world whose job waits in a queue.
fn queued(rooms: &[Room]) -> World {
    let mut world = World::new(rooms);
    world.job.metadata.generation = Some(7);
    let labels = [("queue-name", "team"), ("priority-class", "high")];
    world.job.metadata.labels = Some(labels.map(|(k, v)| (format!("kueue.x-k8s.io/{k}"), v.to_owned())).into());
    world
}

/// (name, group) of all pods.
fn groups(world: &World) -> Vec<(&str, &str)> {
    world.pods.iter().map(|p| (p.name.as_str(), p.queued.as_ref().map_or("", |q| q.group.as_str()))).collect()
}

#[test]
fn pods_of_a_queue_are_one_group_of_two_roles_on_however_many_nodes() {
    let rooms: Vec<Room> = (0..12).map(|i| room(&format!("n{i:02}"), 1, 8)).collect();
    let mut world = queued(&rooms);
    world.job.spec.parallelism.shards = Some(12);
    world.job.spec.placement.node_selector = [("pool".to_owned(), "a".to_owned())].into();
    world.rooms.iter_mut().for_each(|r| drop(r.labels.insert("pool".into(), "a".into())));
    let made: Vec<Value> = world.turn().apply.into_iter().filter(|o| o["kind"] == "Pod").collect();
    assert_eq!(made.len(), 12);
    for pod in &made {
        let (labels, annotations) = (&pod["metadata"]["labels"], &pod["metadata"]["annotations"]);
        assert_eq!(labels["kueue.x-k8s.io/queue-name"], "team");
        assert_eq!(labels["kueue.x-k8s.io/priority-class"], "high");
        assert_eq!(labels["kueue.x-k8s.io/pod-group-name"], "a-u-1-1-7");
        assert_eq!(labels["kueue.x-k8s.io/managed"], "true");
        assert_eq!(annotations["kueue.x-k8s.io/pod-group-total-count"], "12");
        assert_eq!(annotations["kueue.x-k8s.io/pod-suspending-parent"], "foreshard.dev/trainingjob", "no finalizers");
        assert_eq!(pod["spec"]["nodeSelector"], json!({"pool": "a"}), "flavors are chosen by it");
    }
    let roles: BTreeSet<&str> =
        made.iter().map(|p| p["metadata"]["annotations"]["kueue.x-k8s.io/role-hash"].as_str().unwrap()).collect();
    // By Kueue's own hash, every node would be a role, and a group has eight at most.
    assert_eq!(roles, ["head", "worker"].into());
}

#[test]
fn a_job_in_a_queue_says_who_holds_it_back_and_its_time_has_not_begun() {
    let mut world = queued(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job.spec.active_deadline_seconds = Some(10);
    world.turn();
    world.pods.iter_mut().for_each(|p| p.held = Some("kueue.x-k8s.io/admission".into()));
    world.turn();
    assert_eq!(world.state(), "Waiting");
    let said =
        |world: &World| world.job.status.as_ref().unwrap().condition(condition::TRAINING).unwrap().message.clone();
    assert_eq!(
        said(&world),
        "Kueue holds the pods back until queue team has quota for 2 workers of 1 cores and 1.00 GiB each; \
         kubectl describe workload a-u-1-1-7 says what is missing"
    );
    world.now += 100;
    world.turn();
    assert!(!world.job.status.as_ref().unwrap().has_ended(), "the deadline is for training, not for waiting");
    world.pods[0].held = Some("example.com/other".into());
    world.turn();
    assert!(said(&world).contains("pod a-0 is held back by the scheduling gate example.com/other"), "{}", said(&world));
    world.pods.iter_mut().for_each(|p| p.held = None);
    world.turn();
    assert_eq!(world.state(), "Starting");
    world.now += 11;
    world.turn();
    assert!(world.job.status.as_ref().unwrap().has_ended());
}

#[test]
fn a_gate_of_somebody_else_is_seen_beside_ours_and_no_reason_for_another_node() {
    let mut world = queued(&[room("n1", 1, 8), room("n2", 1, 8)]);
    let mut pod = world.turn().apply.into_iter().find(|o| o["kind"] == "Pod").unwrap();
    pod["spec"]["schedulingGates"].as_array_mut().unwrap().push(json!({"name": "kueue.x-k8s.io/admission"}));
    let seen = observe::pod(&serde_json::from_value(pod.clone()).unwrap()).unwrap();
    assert_eq!((seen.gated, seen.held.as_deref()), (true, Some("kueue.x-k8s.io/admission")));
    assert_eq!((&seen.unschedulable, seen.settled), (&None, false));
    pod["metadata"]["annotations"]["kueue.x-k8s.io/retriable-in-group"] = json!("false");
    assert!(observe::pod(&serde_json::from_value(pod).unwrap()).unwrap().settled);
}

#[test]
fn who_takes_the_place_of_a_worker_is_of_the_same_group() {
    // It was of a group named after the new plan, of which it was the only one: Kueue waited for the others for ever.
    let mut world = queued(&[room("n1", 1, 8), room("n2", 1, 8), room("n3", 1, 8)]);
    world.settle();
    world.rooms[1].closed = Some("is not ready".into());
    world.settle();
    assert_eq!((world.nodes(), world.plans.len()), (vec!["n1", "n3"], 2));
    assert_eq!(groups(&world), [("a-0", "a-u-1-1-7"), ("a-1", "a-u-1-1-7")]);
    // All of them at once are another gang, of the plan of then, and of the spec of then: it was suspended meanwhile.
    world.pods.clear();
    world.job.metadata.generation = Some(9);
    world.settle();
    assert_eq!(groups(&world), [("a-0", "a-u-1-2-9"), ("a-1", "a-u-1-2-9")]);
    // A label that comes or goes is for the next gang: half of one would wait for nothing.
    world.job.metadata.labels = None;
    world.pods.pop();
    world.settle();
    assert_eq!(groups(&world)[1], ("a-1", "a-u-1-2-9"));
    let mut world = World::new(&[room("n1", 2, 8)]);
    world.settle();
    world.job.metadata.labels = queued(&[]).job.metadata.labels;
    world.pods.pop();
    world.settle();
    assert_eq!(groups(&world)[1], ("a-1", ""));
}

#[test]
fn a_group_has_a_name_that_a_label_can_have() {
    let mut world = queued(&[room("n1", 2, 8)]);
    world.job.metadata.name = Some(format!("{}-b", "a".repeat(48)));
    world.job.metadata.uid = Some("0123456789".into());
    world.turn();
    world.plans[0].spec.revision = 12_345_678;
    world.job.metadata.generation = Some(87_654_321);
    world.pods.clear();
    world.turn();
    let group = &world.pods[0].queued.as_ref().unwrap().group;
    assert_eq!((group.len(), &group[32..]), (63, "aa-b-01234567-12345678-87654321"), "{group}");
}

#[test]
fn a_gang_of_another_size_is_another_group() {
    let mut world = queued(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job.spec.parallelism.shards = None;
    world.job.spec.resources.devices = vec![Devices { name: "cpu".into(), min: 1, max: 2 }];
    world.settle();
    world.rooms[1].closed = Some("is not ready".into());
    (0..4).for_each(|_| drop(world.turn()));
    world.settle();
    assert_eq!(groups(&world), [("a-0", "a-u-1-2-7")]);
}

#[test]
fn pods_follow_the_flavor_that_kueue_has_let_them_in_with() {
    let pool = |node: &str, pool: &str| Room { labels: [("pool".into(), pool.into())].into(), ..room(node, 2, 8) };
    let mut world = queued(&[pool("n1", "a"), pool("n2", "a"), pool("n3", "b")]);
    world.settle();
    assert_eq!(world.nodes(), ["n1", "n1"]);
    world.pods.iter_mut().for_each(|p| p.phase = "Pending".into());
    // All of them move at once: of a group whose pods were all replaced one by one, Kueue's record goes with the first pods.
    world.pods[1].selector = [("pool".to_owned(), "b".to_owned())].into();
    world.settle();
    assert_eq!((world.nodes(), world.plans.len()), (vec!["n3", "n3"], 2), "nodes of pool a would be tried in turn");
    assert_eq!(world.plans[1].spec.reason, "node n1 lacks the label pool=b, which pods of the job ask for");
    assert_eq!(groups(&world), [("a-0", "a-u-1-2-7"), ("a-1", "a-u-1-2-7")]);
    // Pods that run stay where they are.
    world.pods[1].selector = [("pool".to_owned(), "a".to_owned())].into();
    world.settle();
    assert_eq!(world.plans.len(), 2);
    world.pods.iter_mut().for_each(|p| p.phase = "Pending".into());
    world.rooms.truncate(2);
    world.pods[1].selector = [("pool".to_owned(), "b".to_owned())].into();
    world.turn();
    let said = &world.job.status.as_ref().unwrap().condition(condition::PLACED).unwrap().message;
    assert!(said.contains("node n1 lacks the label pool=b, which pods of the job ask for"), "{said}");
}

#[test]
fn a_job_that_has_ended_gives_its_quota_back_while_its_pods_can_still_be_read() {
    let mut world = queued(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    let words = JobReport { state: JobState::Done, ..JobReport::default() };
    world.pods[0].head = Some(HeadSeen { restarts: 0, exit_code: Some(0), last_words: Some(Ok(words)) });
    world.turn();
    assert_eq!(world.turn().settle, ["a-0", "a-1"]);
    assert_eq!(world.turn().settle, [""; 0], "told once");
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    world.job.spec.active_deadline_seconds = Some(0);
    world.now += 9;
    world.turn();
    assert_eq!(world.turn().settle, [""; 0], "nobody asks");
}
