//! What pods take of nodes, kept up to date by every change of a pod: a look at one job costs nothing for the pods of
//! others.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::runtime::watcher::Event;

use super::decide::PodSeen;
use super::inventory::{Room, Taken, rooms, taken};
use super::observe;

/// (namespace, name).
type Key = (String, String);

/// All pods, as far as they matter.
#[derive(Debug, Default)]
pub struct Ledger {
    pods: BTreeMap<Key, Entry>,
    /// By job: names of its pods.
    jobs: BTreeMap<Key, BTreeSet<String>>,
    /// Pods that were not seen yet since the watch began anew.
    unseen: BTreeSet<Key>,
    ready: bool,
}

#[derive(Debug)]
struct Entry {
    taken: Option<Taken>,
    ours: Option<Ours>,
}

/// A pod of a job.
#[derive(Debug)]
struct Ours {
    job: Key,
    /// Of the objects that own it.
    owners: Vec<String>,
    seen: PodSeen,
}

impl Ledger {
    /// Follows the watch of pods.
    pub fn follow(&mut self, event: &Event<Pod>) {
        match event {
            Event::Apply(pod) => self.put(pod),
            Event::Delete(pod) => self.drop(&key(pod)),
            Event::Init => self.unseen = self.pods.keys().cloned().collect(),
            Event::InitApply(pod) => {
                self.unseen.remove(&key(pod));
                self.put(pod);
            }
            Event::InitDone => {
                for gone in std::mem::take(&mut self.unseen) {
                    self.drop(&gone);
                }
                self.ready = true;
            }
        }
    }

    /// Whether all pods have been seen. Without them every node looks empty.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    fn put(&mut self, pod: &Pod) {
        let key = key(pod);
        self.drop(&key);
        let taken = taken(pod);
        let ours = observe::job_of(pod).zip(observe::pod(pod)).map(|(job, seen)| Ours {
            job: (key.0.clone(), job.to_owned()),
            owners: pod.owner_references().iter().map(|o| o.uid.clone()).collect(),
            seen,
        });
        if let Some(ours) = &ours {
            self.jobs.entry(ours.job.clone()).or_default().insert(key.1.clone());
        }
        if taken.is_some() || ours.is_some() {
            self.pods.insert(key, Entry { taken, ours });
        }
    }

    fn drop(&mut self, key: &Key) {
        let Some(Ours { job, .. }) = self.pods.remove(key).and_then(|entry| entry.ours) else { return };
        if let Some(names) = self.jobs.get_mut(&job) {
            names.remove(&key.1);
            if names.is_empty() {
                self.jobs.remove(&job);
            }
        }
    }

    /// Pods here that say they are of a job.
    fn of(&self, job: &Key) -> impl Iterator<Item = &Ours> {
        let names = self.jobs.get(job).into_iter().flatten();
        names.filter_map(|name| self.pods.get(&(job.0.clone(), name.clone()))?.ours.as_ref())
    }

    /// Pods of a job that are owned by `uid`, by worker.
    pub fn pods(&self, job: &Key, uid: &str) -> Vec<PodSeen> {
        let ours = self.of(job).filter(|o| o.owners.iter().any(|owner| owner == uid));
        let mut pods: Vec<PodSeen> = ours.map(|o| o.seen.clone()).collect();
        pods.sort_by_key(|p| p.worker);
        pods
    }

    /// Whether a pod of a job stands here for this worker.
    pub fn shows(&self, job: &Key, worker: u32) -> bool {
        self.of(job).any(|o| o.seen.worker == worker)
    }

    /// What is free on nodes; `more` is taken as well.
    pub fn rooms<'a>(&self, nodes: impl IntoIterator<Item = &'a Node>, more: &[Taken]) -> Vec<Room> {
        rooms(nodes, self.pods.values().filter_map(|entry| entry.taken.as_ref()).chain(more))
    }
}

fn key(pod: &Pod) -> Key {
    (pod.namespace().unwrap_or_default(), pod.name_any())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, labels: serde_json::Value, phase: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": name, "namespace": "ns", "labels": labels,
                "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "o", "uid": "u-1"}],
            },
            "spec": {"nodeName": "n", "containers": [
                {"name": "c", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}}},
            ]},
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn free(ledger: &Ledger) -> i64 {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "n"}, "status": {"allocatable": {"cpu": "8", "memory": "8Gi", "pods": "9"}},
        }))
        .unwrap();
        ledger.rooms([&node], &[])[0].cpu
    }

    #[test]
    fn follows_pods_through_changes_and_a_watch_that_begins_anew() {
        let ours = json!({"foreshard.dev/job": "a", "foreshard.dev/worker": "0"});
        let mut ledger = Ledger::default();
        ledger.follow(&Event::Init);
        ledger.follow(&Event::InitApply(pod("a-0", ours.clone(), "Pending")));
        ledger.follow(&Event::InitApply(pod("other", json!({}), "Running")));
        assert!(!ledger.is_ready());
        ledger.follow(&Event::InitDone);
        assert!(ledger.is_ready());
        let job = ("ns".to_owned(), "a".to_owned());
        assert_eq!(
            (ledger.pods(&job, "u-1").len(), ledger.pods(&job, "u-2").len()),
            (1, 0),
            "an earlier job's is not ours"
        );
        assert!(ledger.shows(&job, 0) && !ledger.shows(&job, 1));
        assert_eq!(free(&ledger), 6000);
        ledger.follow(&Event::Apply(pod("a-0", ours.clone(), "Succeeded")));
        assert_eq!(free(&ledger), 7000, "what has ended takes nothing");
        assert_eq!(ledger.pods(&job, "u-1")[0].phase, "Succeeded");
        ledger.follow(&Event::Init);
        ledger.follow(&Event::InitApply(pod("a-0", ours.clone(), "Succeeded")));
        ledger.follow(&Event::InitDone);
        assert_eq!(free(&ledger), 8000, "what is gone meanwhile is gone");
        ledger.follow(&Event::Delete(pod("a-0", ours, "Succeeded")));
        assert!(ledger.pods.is_empty() && ledger.jobs.is_empty());
    }
}
