//! From objects of the API server to what `decide` looks at.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::ResourceExt;

use super::decide::{HeadSeen, PodSeen};
use super::inventory::pinned;
use super::pods::{Queued, RETRIABLE};
use super::render::{FEEDER, FETCH, GATE, JOB, RUNTIME, TRAINER, WORKER};
use crate::wire::report::{JobReport, NO_DEVICE};

/// Reasons for which a container waits that do not pass by themselves in a moment.
const STUCK: [&str; 6] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
];

/// Name of the job a pod belongs to.
pub fn job_of(pod: &Pod) -> Option<&str> {
    pod.metadata.labels.as_ref()?.get(JOB).map(String::as_str)
}

/// A pod of a job, or `None` where it is none of ours.
pub fn pod(pod: &Pod) -> Option<PodSeen> {
    let worker = pod.metadata.labels.as_ref()?.get(WORKER)?.parse().ok()?;
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref());
    let gates = || spec.scheduling_gates.iter().flatten();
    let conditions = status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
    let mut unscheduled = conditions.filter(|c| c.type_ == "PodScheduled" && c.status == "False");
    let statuses = || {
        let of = |list: Option<&'_ Vec<ContainerStatus>>| list.cloned().unwrap_or_default();
        let inits = of(status.and_then(|s| s.init_container_statuses.as_ref()));
        inits.into_iter().chain(of(status.and_then(|s| s.container_statuses.as_ref())))
    };
    let stuck = statuses().find_map(|c| {
        let waiting = c.state?.waiting?;
        let reason = waiting.reason.filter(|r| STUCK.contains(&r.as_str()))?;
        Some(format!("container {} waits: {reason}: {}", c.name, waiting.message.unwrap_or_default()))
    });
    let fetch = statuses().find(|c| c.name == FETCH).and_then(|c| failure(&c));
    let (useless, unfetched) = match fetch {
        Some((BAD_INPUT, why)) => (Some(why), None),
        other => (None, other.map(|(_, why)| why)),
    };
    // One that ends is started again; one that is started again and again has something to say.
    let loops = |c: &ContainerStatus| {
        let waiting = c.state.as_ref().and_then(|s| s.waiting.as_ref());
        waiting.is_some_and(|w| w.reason.as_deref() == Some("CrashLoopBackOff"))
    };
    let unfed = statuses().find(|c| c.name == FEEDER && loops(c)).and_then(|c| failure(&c));
    let unfed = unfed.map(|(_, why)| format!("container {FEEDER} ends again and again: {why}"));
    let unable = statuses()
        .find(|c| c.name == RUNTIME)
        .and_then(|c| failure(&c))
        .filter(|(code, _)| *code == i32::from(NO_DEVICE));
    let refused = unscheduled
        .find(|c| c.reason.as_deref() == Some("Unschedulable"))
        .map(|c| c.message.clone().unwrap_or_default());
    Some(PodSeen {
        name: pod.metadata.name.clone()?,
        worker,
        node: pinned(pod).or_else(|| spec.node_name.clone()).unwrap_or_default(),
        phase: status.and_then(|s| s.phase.clone()).unwrap_or_default(),
        ip: status.and_then(|s| s.pod_ip.clone()),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        gated: gates().any(|g| g.name == GATE),
        // Others hold pods back as well: Kueue does until there is quota.
        held: gates().find(|g| g.name != GATE).map(|g| g.name.clone()),
        queued: Queued::of(pod),
        settled: pod.annotations().get(RETRIABLE).is_some_and(|retriable| retriable == "false"),
        selector: spec.node_selector.clone().unwrap_or_default(),
        useless,
        unable: unable.map(|(_, why)| why),
        stuck: stuck.or(unfetched).or(unfed).or_else(|| refused.clone().filter(|why| is_everywhere(why))),
        unschedulable: refused.filter(|why| !is_everywhere(why)),
        head: statuses().find(|c| c.name == TRAINER).map(|c| head(&c)),
    })
}

/// Whether what the scheduler says holds for every node: no other plan would help.
fn is_everywhere(why: &str) -> bool {
    ["unbound immediate PersistentVolumeClaims", "persistentvolumeclaim \""].iter().any(|part| why.contains(part))
}

/// Exit code of a program that cannot use its input.
const BAD_INPUT: i32 = 2;

/// Code and last words of a container that has failed and not come to its end since.
fn failure(status: &ContainerStatus) -> Option<(i32, String)> {
    let now = status.state.as_ref().and_then(|s| s.terminated.as_ref());
    let before = status.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    let ended = now.or(before).filter(|t| t.exit_code != 0)?;
    let words = ended.message.clone().filter(|m| !m.is_empty());
    let how = || format!("container {} ended with code {}", status.name, ended.exit_code);
    Some((ended.exit_code, words.unwrap_or_else(how)))
}

fn head(status: &ContainerStatus) -> HeadSeen {
    let ended = status.state.as_ref().and_then(|s| s.terminated.as_ref());
    let before = status.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    let words = ended.or(before).and_then(|t| t.message.clone());
    HeadSeen {
        restarts: status.restart_count.max(0) as u32,
        exit_code: ended.map(|t| t.exit_code),
        last_words: words.map(|text| serde_json::from_str::<JobReport>(&text).map_err(|_| text)),
    }
}
