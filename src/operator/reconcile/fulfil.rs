//! Makes the cluster as it was decided: what is written, and how often.

use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams, Preconditions,
};
use kube::runtime::events::{Event, EventType};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use super::Work;
use crate::api::{PartitionPlan, Stored, TrainingJob, TrainingJobStatus};
use crate::operator::OperatorError;
use crate::operator::decide::Desired;
use crate::operator::pods::RETRIABLE;
use crate::operator::profiles::object as profile_object;
use crate::operator::render::{GATE, parts, plan as plan_object, secret};
use crate::operator::serve::Counts;
use crate::tls::TlsError;

/// Name under which fields are owned.
const MANAGER: &str = "foreshard-operator";
/// Requests of one job at once.
const AT_ONCE: usize = 8;
/// Figures of training are written at most so often.
const THROTTLE: Duration = Duration::from_secs(10);
/// Other words for the same state are written at most so often.
const WORDS: Duration = Duration::from_secs(2);

impl Work<'_> {
    pub(super) async fn fulfil(&self, desired: Desired) -> Result<(), OperatorError> {
        if desired.expire {
            let uid = self.job.metadata.uid.clone();
            let only = DeleteParams {
                preconditions: Some(Preconditions { uid, resource_version: None }),
                ..DeleteParams::background()
            };
            let api: Api<Stored<TrainingJob>> = Api::namespaced(self.context.client.clone(), &self.namespace);
            let name = self.job.name_any();
            return gone(api.delete(&name, &only).await).map_err(|e| api_error("delete", format!("job {name}"), e));
        }
        // What pods follow from and what they need comes first; requests wait for nothing but what they rest on.
        let plan = desired.plan.as_ref().map(|spec| plan_object(self.job, spec));
        let (pods, support): (Vec<&Value>, Vec<&Value>) = desired.apply.iter().partition(|o| o["kind"] == "Pod");
        let secrets = self.secrets(&desired.certify)?;
        let made = plan.iter().chain(&secrets).map(|object| self.create(object).boxed());
        // Of the first plan, nothing is there yet, and to create costs the API server half of what to apply does.
        let is_first = desired.plan.as_ref().is_some_and(|plan| plan.revision == 1);
        let support = support.into_iter().map(|object| match is_first {
            true => self.begin(object).boxed(),
            false => self.apply(object).boxed(),
        });
        let needed = made.chain(support).collect();
        all_of(needed).await?;
        futures::try_join!(self.change_pods(&desired, pods), self.show(&desired)).map(|_| ())
    }

    async fn change_pods(&self, desired: &Desired, made: Vec<&Value>) -> Result<(), OperatorError> {
        // One that nothing holds back completes its gang: the others have to be there.
        let (held, free): (Vec<&Value>, Vec<&Value>) =
            made.into_iter().partition(|pod| pod["spec"].get("schedulingGates").is_some());
        for pods in [held, free] {
            all_of(pods.into_iter().map(|pod| self.create(pod).boxed()).collect()).await?;
        }
        all_of(desired.open.iter().map(|pod| self.open(pod).boxed()).collect()).await?;
        all_of(desired.settle.iter().map(|pod| self.settle(pod).boxed()).collect()).await?;
        for (name, at_once) in &desired.delete {
            Counts::add(&self.context.counts.writes);
            let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &self.namespace);
            let how = if *at_once { DeleteParams::default().grace_period(0) } else { DeleteParams::default() };
            gone(api.delete(name, &how).await).map_err(|e| api_error("delete", format!("pod {name}"), e))?;
        }
        Ok(())
    }

    /// What people see.
    async fn show(&self, desired: &Desired) -> Result<(), OperatorError> {
        if let Some((name, status, urgent)) = &desired.plan_status
            && self.may_write_figures(*urgent)
        {
            let object = json!({
                "apiVersion": "foreshard.dev/v1alpha1", "kind": "PartitionPlan",
                "metadata": {"name": name}, "status": status,
            });
            Counts::add(&self.context.counts.writes);
            let api: Api<Stored<PartitionPlan>> = Api::namespaced(self.context.client.clone(), &self.namespace);
            let written = api.patch_status(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object)).await;
            written.map_err(|e| api_error("write the status of", format!("plan {name}"), e))?;
        }
        if let Some(profile) = desired.profile.as_ref().filter(|_| self.may_write_figures(desired.status.has_ended())) {
            self.apply(&profile_object(&self.namespace, profile)).await?;
        }
        self.write_status(&desired.status, !desired.events.is_empty()).await?;
        for (reason, note, warning) in &desired.events {
            self.tell(reason, note, *warning).await;
        }
        Ok(())
    }

    /// Secrets of workers whose pods are made.
    fn secrets(&self, workers: &[u32]) -> Result<Vec<Value>, OperatorError> {
        let (authority, token) = (self.authority()?, self.token());
        let of = |&worker: &u32| {
            let issued = parts(worker).map(|part| Ok((part, authority.issue(part, self.valid())?)));
            Ok(secret(self.job, worker, &token, &issued.collect::<Result<Vec<_>, TlsError>>()?))
        };
        workers.iter().map(of).collect()
    }

    /// Creates what must not be there in another form; one that is there already stays.
    async fn create(&self, object: &Value) -> Result<(), OperatorError> {
        // Certificates are drawn anew each time: that there is one is what counts.
        if self.is_recent(object, &Value::Null) {
            return Ok(());
        }
        let is_new = self.post(object).await?;
        if is_new {
            self.remember(object, &Value::Null);
        } else if object["kind"] == "Pod" {
            // A pod of this name is somebody else's, or an earlier job's that has yet to go.
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            return Err(OperatorError::Taken(format!("pod {name}")));
        }
        Ok(())
    }

    /// Creates what will be applied later on.
    async fn begin(&self, object: &Value) -> Result<(), OperatorError> {
        if !self.is_recent(object, object) && self.post(object).await? {
            self.remember(object, object);
        }
        // One that is there already may have another form.
        self.apply(object).await
    }

    /// Whether an object of this name was not there yet.
    async fn post(&self, object: &Value) -> Result<bool, OperatorError> {
        Counts::add(&self.context.counts.writes);
        let (api, name, parsed) = self.dynamic(object)?;
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        match api.create(&params, &parsed).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(e)) if e.reason == "AlreadyExists" => Ok(false),
            Err(e) => Err(api_error("create", name, e)),
        }
    }

    async fn apply(&self, object: &Value) -> Result<(), OperatorError> {
        if self.is_recent(object, object) {
            return Ok(());
        }
        Counts::add(&self.context.counts.writes);
        let (api, name, parsed) = self.dynamic(object)?;
        let params = PatchParams::apply(MANAGER).force();
        let applied = api.patch(&parsed.name_any(), &params, &Patch::Apply(&parsed)).await;
        applied.map_err(|e| api_error("apply", name, e))?;
        self.remember(object, object);
        Ok(())
    }

    /// Takes our gate off a pod; those of others stay.
    async fn open(&self, pod: &str) -> Result<(), OperatorError> {
        let gates = json!([{"name": GATE, "$patch": "delete"}]);
        self.change("open the gate of", "gate", pod, json!({"spec": {"schedulingGates": gates}})).await
    }

    /// Tells the group of a pod that nobody comes in its place.
    async fn settle(&self, pod: &str) -> Result<(), OperatorError> {
        self.change("settle", "group", pod, json!({"metadata": {"annotations": {RETRIABLE: "false"}}})).await
    }

    /// Changes a pod, if it is still there. `what`: of the pod.
    async fn change(&self, verb: &'static str, what: &str, pod: &str, patch: Value) -> Result<(), OperatorError> {
        let object = json!({"kind": what, "metadata": {"name": pod}});
        if self.is_recent(&object, &patch) {
            return Ok(());
        }
        Counts::add(&self.context.counts.writes);
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &self.namespace);
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        gone(api.patch(pod, &params, &Patch::Strategic(&patch)).await)
            .map_err(|e| api_error(verb, format!("pod {pod}"), e))?;
        self.remember(&object, &patch);
        Ok(())
    }

    /// Whether `object` was written a moment ago with this content: the watch may not show it yet.
    fn is_recent(&self, object: &Value, content: &Value) -> bool {
        let memory = self.context.memory.lock().unwrap_or_else(|p| p.into_inner());
        let uid = self.job.metadata.uid.as_deref().unwrap_or_default();
        memory.get(&self.key()).is_some_and(|m| m.recent.holds(uid, object, content, Instant::now()))
    }

    fn remember(&self, object: &Value, content: &Value) {
        let mut memory = self.context.memory.lock().unwrap_or_else(|p| p.into_inner());
        let uid = self.job.metadata.uid.as_deref().unwrap_or_default();
        memory.entry(self.key()).or_default().recent.put(uid, object, content, Instant::now());
    }

    fn dynamic(&self, object: &Value) -> Result<(Api<DynamicObject>, String, DynamicObject), OperatorError> {
        let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
        let (version, kind) = (text("apiVersion"), text("kind"));
        let (group, version) = version.split_once('/').unwrap_or(("", &version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
        let name = format!("{kind} {}", object["metadata"]["name"].as_str().unwrap_or_default());
        let parsed = serde_json::from_value(object.clone());
        let object = parsed.map_err(|_| OperatorError::Incomplete(name.clone(), "proper metadata"))?;
        Ok((Api::namespaced_with(self.context.client.clone(), &self.namespace, &resource), name, object))
    }

    /// Whether figures may be written now. `urgent` writes are, and count.
    fn may_write_figures(&self, urgent: bool) -> bool {
        urgent || self.is_past(THROTTLE)
    }

    /// Whether nothing was written for so long.
    fn is_past(&self, pause: Duration) -> bool {
        let memory = self.context.memory.lock().unwrap_or_else(|p| p.into_inner());
        memory.get(&self.key()).and_then(|m| m.written).is_none_or(|w| w.elapsed() >= pause)
    }

    /// `told`: an event says so too; it would be told again if the status did not show it.
    async fn write_status(&self, status: &TrainingJobStatus, told: bool) -> Result<(), OperatorError> {
        let before = self.job.status.clone().unwrap_or_default();
        if *status == before {
            return Ok(());
        }
        // How many pods run changes several times within a second: state by state is told at once, word by word later.
        let words = |s: &TrainingJobStatus| s.conditions.iter().map(|c| c.message.clone()).collect::<Vec<_>>();
        let states = |s: &TrainingJobStatus| {
            s.conditions.iter().map(|c| (c.kind.clone(), c.status, c.reason.clone())).collect::<Vec<_>>()
        };
        let facts = |s: &TrainingJobStatus| (states(s), s.plan.clone(), s.restarts, s.observed_generation);
        let pause = match (told || facts(status) != facts(&before), words(status) != words(&before)) {
            (true, _) => Duration::ZERO,
            (false, true) => WORDS,
            (false, false) => THROTTLE,
        };
        if !self.is_past(pause) {
            return Ok(());
        }
        Counts::add(&self.context.counts.writes);
        let name = self.job.name_any();
        let object = json!({
            "apiVersion": "foreshard.dev/v1alpha1", "kind": "TrainingJob",
            "metadata": {"name": name}, "status": status,
        });
        let api: Api<Stored<TrainingJob>> = Api::namespaced(self.context.client.clone(), &self.namespace);
        let written = api.patch_status(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object)).await;
        written.map_err(|e| api_error("write the status of", format!("job {name}"), e))?;
        let mut memory = self.context.memory.lock().unwrap_or_else(|p| p.into_inner());
        memory.entry(self.key()).or_default().written = Some(Instant::now());
        Ok(())
    }

    /// An event of the job. Losing one costs nobody anything.
    async fn tell(&self, reason: &str, note: &str, warning: bool) {
        tracing::info!(job = self.job.name_any(), namespace = self.namespace, reason, note, "decided");
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.to_owned(),
            note: Some(note.chars().take(1000).collect()),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        let about: ObjectReference = self.job.object_ref(&());
        if let Err(e) = self.context.recorder.publish(&event, &about).await {
            tracing::debug!(error = %e, "an event was lost");
        }
    }
}

/// So many at once, until one fails.
async fn all_of(requests: Vec<BoxFuture<'_, Result<(), OperatorError>>>) -> Result<(), OperatorError> {
    futures::stream::iter(requests).buffer_unordered(AT_ONCE).try_for_each(|()| std::future::ready(Ok(()))).await
}

/// What is gone need not be deleted.
fn gone<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(e)) if e.code == 404 => Ok(()),
        Err(e) => Err(e),
    }
}

pub(super) fn api_error(verb: &'static str, what: String, source: kube::Error) -> OperatorError {
    OperatorError::Api { verb, what, source }
}
