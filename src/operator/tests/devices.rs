//! Ranges of devices, accelerators, and what a job says of its pods.

use serde_json::{Value, json};

use super::*;
use crate::api::Devices;

fn devices(name: &str, min: u32, max: u32) -> Devices {
    Devices { name: name.to_owned(), min, max }
}

/// A world whose job takes from `min` to `max` CPUs.
fn ranged(min: u32, max: u32, rooms: &[Room]) -> World {
    let mut world = World::new(rooms);
    world.job.spec.parallelism.shards = None;
    world.job.spec.resources.devices = vec![devices("cpu", min, max)];
    world
}

fn gpus(node: &str, n: i64, product: &str) -> Room {
    Room {
        devices: [("nvidia.com/gpu".to_owned(), n)].into(),
        labels: [("nvidia.com/gpu.product".to_owned(), product.to_owned())].into(),
        ..room(node, 64, 64)
    }
}

#[test]
fn as_many_shards_as_are_free_within_the_range() {
    let shards = |min, max, free: &[i64]| {
        let rooms: Vec<Room> = free.iter().enumerate().map(|(i, &n)| room(&format!("n{i}"), n, 64)).collect();
        let mut world = ranged(min, max, &rooms);
        world.turn();
        world.job.status.clone().unwrap().shards
    };
    assert_eq!(shards(1, 4, &[2, 1]), Some(3));
    assert_eq!(shards(1, 4, &[9]), Some(4));
    assert_eq!(shards(4, 4, &[2, 1]), None, "it waits for its least number");
    let mut world = ranged(2, 9, &[room("n", 5, 64)]);
    world.job.spec.parallelism.replicas = 2;
    let plan = world.turn().plan.unwrap();
    assert_eq!(plan.shards.len(), 4, "every replica has as many");
    assert_eq!(world.job.status.as_ref().unwrap().shards, Some(2));
    let manifest = render(&world.job, &plan, &site()).support[0]["data"]["job.yaml"].clone();
    assert_eq!(parse(manifest.as_str().unwrap()).unwrap().spec.parallelism.shards, Some(2), "the head is told");
}

#[test]
fn a_job_that_loses_a_node_goes_on_with_fewer_devices_when_no_other_is_free() {
    let mut world = ranged(1, 2, &[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    assert_eq!(world.nodes(), ["n1", "n2"]);
    world.rooms[1].closed = Some("is not ready".into());
    let d = world.turn();
    assert_eq!(d.delete, [("a-0".to_owned(), false)], "the head goes first");
    assert!(d.events.iter().any(|(reason, text, _)| *reason == "Resized" && text.contains("1 workers")), "{d:?}");
    world.settle();
    assert_eq!(world.nodes(), ["n1"]);
    assert_eq!(world.pods.len(), 1);
    let mut world = ranged(2, 2, &[room("n1", 1, 8), room("n2", 1, 8)]);
    world.settle();
    world.rooms[1].closed = Some("is not ready".into());
    world.turn();
    assert_eq!(world.state(), "Waiting", "one device is less than its least number");
}

#[test]
fn the_first_kind_of_device_that_is_free_is_taken_and_pods_ask_for_it() {
    let mut world = World::new(&[room("c", 8, 64), gpus("g", 2, "NVIDIA-A100-SXM4-80GB")]);
    world.rooms[1].taints = serde_json::from_value(json!([{"key": "nvidia.com/gpu", "effect": "NoSchedule"}])).unwrap();
    world.job.spec.resources.rdma = Some("rdma/hca".into());
    world.rooms[1].devices.insert("rdma/hca".into(), 8);
    world.job.spec.resources.devices = vec![devices("nvidia.com/gpu", 1, 2), devices("cpu", 1, 2)];
    let plan = world.turn().plan.unwrap();
    assert!(plan.shards.iter().all(|s| s.node == "g" && s.device == "nvidia.com/gpu"));
    let topology = topology(&plan.shards);
    assert_eq!(topology.devices[0].kind, "nvidia.com/gpu/NVIDIA-A100-SXM4-80GB");
    assert_eq!(topology.devices[0].memory.0, 80 << 30, "the device's memory, not the pod's");
    for (_, pod) in render(&world.job, &plan, &site()).pods {
        let spec = &pod["spec"];
        assert_eq!(spec["tolerations"], json!([{"key": "nvidia.com/gpu", "operator": "Exists"}]));
        let all = spec["containers"]
            .as_array()
            .unwrap()
            .iter()
            .chain(spec["initContainers"].as_array().into_iter().flatten());
        let runtime = all.into_iter().find(|c| c["name"] == "runtime").unwrap();
        assert_eq!(runtime["resources"]["limits"]["nvidia.com/gpu"], "1");
        assert_eq!(runtime["resources"]["requests"]["rdma/hca"], "1");
        assert!(runtime["args"].as_array().unwrap().contains(&json!("/cuda.so")));
        let typed: Pod = serde_json::from_value(pod.clone()).unwrap();
        assert_eq!(taken(&typed).unwrap().devices["nvidia.com/gpu"], 1, "others see what it takes");
    }
    // Two GPUs are too few for three workers; CPUs are enough.
    world.job.spec.resources.rdma = None;
    world.job.spec.parallelism.shards = Some(3);
    world.job.spec.resources.devices = vec![devices("nvidia.com/gpu", 1, 4), devices("cpu", 1, 4)];
    let seats = place(&world.job.spec, &need(&world.job.spec), &world.rooms, &[]).unwrap();
    assert!(seats.iter().all(|s| s.device == "cpu"));
    world.job.spec.resources.devices.truncate(1);
    let no_room = place(&world.job.spec, &need(&world.job.spec), &world.rooms, &[]).unwrap_err().to_string();
    assert!(no_room.contains("one nvidia.com/gpu each: there is room for 2 on 1 nodes"), "{no_room}");
    assert!(no_room.contains("most is free on g: 64 cores and 64.0 GiB and 2 nvidia.com/gpu"), "{no_room}");
    // A node with more cores, but none of the devices, is not what is short.
    world.rooms[0].cpu = 99_000;
    world.rooms[1].devices.insert("nvidia.com/gpu".into(), 0);
    let said =
        |world: &World| place(&world.job.spec, &need(&world.job.spec), &world.rooms, &[]).unwrap_err().to_string();
    assert!(said(&world).contains("room for 0 on 1 nodes; most is free on g: 64 cores"), "{}", said(&world));
    world.rooms.truncate(1);
    assert!(said(&world).contains("there is room for 0; no node has nvidia.com/gpu"), "{}", said(&world));
}

#[test]
fn a_worker_that_cannot_use_its_device_fails_the_job_with_its_own_words() {
    let ended = |code: i32| {
        let pod = json!({
            "metadata": {"name": "a-0", "labels": {"foreshard.dev/worker": "0"}}, "spec": {"containers": []},
            "status": {"initContainerStatuses": [{
                "name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 1,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": code, "message": "cannot use nvidia.com/gpu"}},
            }]},
        });
        observe::pod(&serde_json::from_value(pod).unwrap()).unwrap().unable
    };
    assert_eq!(ended(1), None, "it is started again");
    let mut world = World::new(&[room("n1", 2, 8)]);
    world.settle();
    world.pods[0].unable = ended(3);
    world.turn();
    let failed = world.job.status.as_ref().unwrap().condition(condition::FAILED).unwrap();
    assert_eq!((&*failed.reason, &*failed.message), ("NoDevice", "worker 0 on node n1 cannot use nvidia.com/gpu"));
    assert_eq!(world.turn().delete.len(), 2, "the others wait for nothing");
}

#[test]
fn devices_that_the_image_cannot_drive_fail_the_job_with_the_way_out() {
    let mut world = World::new(&[room("n", 8, 8)]);
    world.job.spec.parallelism.shards = None;
    world.job.spec.resources.devices = vec![devices("google.com/tpu", 1, 4)];
    world.turn();
    let status = world.job.status.clone().unwrap();
    let failed = status.condition(condition::FAILED).unwrap();
    assert_eq!(failed.reason, "NoPlugin");
    assert!(failed.message.contains("no PJRT plug-in for google.com/tpu"), "{}", failed.message);
    assert!(failed.message.contains("--image-plugin"), "{}", failed.message);
}

#[test]
fn workers_are_neighbours_where_a_neighbourhood_has_room_for_all() {
    let at = |node: &str, cores: i64, rack: &str, zone: &str| {
        let label = |key: &str, value: &str| (format!("topology.kubernetes.io/{key}"), value.to_owned());
        Room { labels: [label("rack", rack), label("zone", zone)].into(), ..room(node, cores, 64) }
    };
    let rooms = [at("a", 3, "r1", "z1"), at("b", 2, "r2", "z2"), at("c", 2, "r2", "z2"), at("d", 1, "r3", "z2")];
    let nodes = |n: u32| {
        let mut spec = job().spec;
        spec.parallelism.shards = Some(n);
        let seats = place(&spec, &need(&spec), &rooms, &[]).unwrap();
        seats.into_iter().map(|s| s.node).collect::<Vec<_>>()
    };
    assert_eq!(nodes(4), ["b", "b", "c", "c"], "one rack");
    assert_eq!(nodes(5), ["b", "b", "c", "c", "d"], "one zone");
    assert_eq!(nodes(6), ["a", "a", "a", "b", "b", "d"], "none has enough: as few nodes as possible");
}

#[test]
fn a_job_of_another_controller_is_left_alone() {
    let mut world = World::new(&[room("n1", 1, 8), room("n2", 1, 8)]);
    world.job.spec.managed_by = Some("kueue.x-k8s.io/multikueue".into());
    let d = world.decide();
    assert_eq!(d, Desired { again: d.again, ..Desired::default() });
    world.job.spec.managed_by = Some(crate::api::CONTROLLER.into());
    assert!(world.decide().plan.is_some());
}

#[test]
fn what_a_job_says_of_its_pods_stands_in_them() {
    let mut world = World::new(&[room("n1", 4, 8)]);
    world.rooms[0].taints =
        serde_json::from_value(json!([{"key": "team", "value": "a", "effect": "NoSchedule"}])).unwrap();
    world.turn();
    assert_eq!(world.state(), "Waiting");
    let more: Value = json!({
        "placement": {"tolerations": [{"key": "team", "value": "a"}]},
        "pods": {
            "labels": {"team": "a"}, "annotations": {"note": "of ours"}, "priorityClassName": "low",
            "env": {"NCCL_DEBUG": "INFO"}, "runtimeClassName": "gvisor", "schedulerName": "other", "imagePullSecrets": ["pull"],
        },
    });
    let spec = &mut world.job.spec;
    spec.placement = serde_json::from_value(more["placement"].clone()).unwrap();
    spec.pods = serde_json::from_value(more["pods"].clone()).unwrap();
    let plan = world.turn().plan.unwrap();
    let pod = &render(&world.job, &plan, &site()).pods[0].1;
    assert!(is_restricted(pod));
    assert_eq!(
        (&pod["metadata"]["labels"]["team"], &pod["metadata"]["annotations"]["note"]),
        (&json!("a"), &json!("of ours"))
    );
    assert_eq!(pod["metadata"]["labels"]["foreshard.dev/job"], "a");
    let named = ["priorityClassName", "runtimeClassName", "schedulerName"].map(|f| pod["spec"][f].as_str().unwrap());
    assert_eq!(named, ["low", "gvisor", "other"]);
    assert_eq!(pod["spec"]["imagePullSecrets"], json!([{"name": "pull"}]));
    for container in [&pod["spec"]["containers"][0], &pod["spec"]["initContainers"][0]] {
        let env = container["env"].as_array().unwrap();
        assert!(env.contains(&json!({"name": "NCCL_DEBUG", "value": "INFO"})), "{container:#}");
    }
    assert_eq!(pod["spec"]["tolerations"], json!([{"key": "team", "value": "a"}]));
    for (key, says) in [("foreshard.dev/job", "set by the operator"), ("a b", "is no key"), ("/x", "is no key")] {
        world.job.spec.pods.labels = [(key.to_owned(), "x".to_owned())].into();
        assert!(crate::api::check(&world.job.spec).unwrap_err().contains(says));
    }
    world.job.spec.pods.labels.clear();
    for (name, says) in
        [("XLA_FLAGS", "set by the operator"), ("FORESHARD_X", "set by the operator"), ("1A", "no name")]
    {
        world.job.spec.pods.env = [(name.to_owned(), "x".to_owned())].into();
        assert!(crate::api::check(&world.job.spec).unwrap_err().contains(says));
    }
}
