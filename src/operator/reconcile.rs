//! Watches, and looks at every job: what is there, what should be, and what has to be done.

mod fulfil;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::channel::mpsc::unbounded;
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::controller::{Action, Controller, Error as ControllerError};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde_json::json;

use self::fulfil::api_error;
use super::decide::{Desired, PodSeen, Snapshot, decide};
use super::heads::{Head, Heads, Key, Which};
use super::inventory::Taken;
use super::lease::Leader;
use super::ledger::Ledger;
use super::observe::job_of;
use super::pods::RETRIABLE;
use super::recent::Recent;
use super::render::{STATUS_PORT, Site};
use super::serve::{Counts, serve};
use super::{Class, OperatorError, key, unreadable};
use crate::api::{
    CONTROLLER, CPU, Condition, ModelProfile, PartitionPlan, Seat, Stored, TrainingJob, TrainingJobStatus, condition,
};
use crate::rpc;
use crate::telemetry::chain;
use crate::tls::{Authority, Name, TlsError};

/// How an operator runs.
#[derive(Clone, Debug)]
pub struct Config {
    pub site: Site,
    /// Only jobs of this namespace; all when absent.
    pub watch: Option<String>,
    /// Health and metrics.
    pub listen: SocketAddr,
    /// Jobs looked at at once.
    pub concurrency: u16,
    /// Name of this operator among those of its cluster.
    pub identity: String,
}

/// No look at a job takes longer. What it has done by then counts: the next look goes on from there.
const LONGEST: Duration = Duration::from_secs(120);
/// When caches are looked at again that fill while the operator starts.
const SOON: Duration = Duration::from_millis(200);

struct Context {
    client: Client,
    config: Config,
    nodes: Store<Node>,
    pods: Arc<Mutex<Ledger>>,
    plans: Store<Stored<PartitionPlan>>,
    profiles: Store<Stored<ModelProfile>>,
    recorder: Recorder,
    heads: Arc<Heads>,
    /// Seats given away that the pods in the cache do not show yet, by job.
    promised: Mutex<BTreeMap<Key, Vec<Seat>>>,
    /// Of each job that is there.
    memory: Arc<Mutex<BTreeMap<String, Memory>>>,
    /// Fields of jobs that this version does not know, and that were told of.
    left_out: Mutex<BTreeSet<String>>,
    /// Tokens of jobs are made from it.
    key: Vec<u8>,
    counts: Arc<Counts>,
}

/// What is remembered of a job from look to look. All of it may be lost: then something is written once more.
#[derive(Default)]
struct Memory {
    /// When figures were last written.
    written: Option<Instant>,
    /// How often a look failed in a row.
    failures: u32,
    recent: Recent,
}

/// Runs until it is told to stop.
pub async fn run(config: Config) -> Result<(), OperatorError> {
    let client = Client::try_default().await.map_err(OperatorError::Connect)?;
    let counts = Arc::new(Counts::default());
    serve(config.listen, counts.clone()).await?;
    let leader = Leader::new(&client, &config.site.namespace, config.identity.clone());
    // Who stands by is as ready as can be.
    counts.ready.store(true, Ordering::Relaxed);
    leader.lead(work(client, config, counts)).await?
}

/// The operator that leads.
async fn work(client: Client, config: Config, counts: Arc<Counts>) -> Result<(), OperatorError> {
    let namespace = config.watch.as_deref();
    let (nodes, node_writer) = reflector::store();
    let pods = Arc::<Mutex<Ledger>>::default();
    let (plans, plan_writer) = reflector::store();
    let (profiles, profile_writer) = reflector::store();
    let everywhere = watcher::Config::default();
    let node_stream = reflector::reflector(node_writer, watcher(Api::<Node>::all(client.clone()), everywhere.clone()))
        .default_backoff()
        .modify(strip)
        .touched_objects();
    // Pods of others take room too: all of them are seen, as far as the operator may look.
    let ledger = pods.clone();
    let memory = Arc::<Mutex<BTreeMap<String, Memory>>>::default();
    let remembered = memory.clone();
    let pod_stream = watcher(api_of::<Pod>(&client, namespace), everywhere.clone())
        .default_backoff()
        .modify(slim)
        .inspect(move |event| {
            if let Ok(event) = event {
                ledger.lock().unwrap_or_else(|p| p.into_inner()).follow(event);
                forget(&remembered, event);
            }
        })
        .touched_objects();
    let plan_stream = reflector::reflector(
        plan_writer,
        watcher(api_of::<Stored<PartitionPlan>>(&client, namespace), everywhere.clone())
            .modify(strip)
            .default_backoff(),
    )
    .touched_objects();
    let profile_stream = reflector::reflector(
        profile_writer,
        watcher(api_of::<Stored<ModelProfile>>(&client, namespace), everywhere.clone()).default_backoff().modify(strip),
    )
    .touched_objects();
    let (jobs, job_writer) = reflector::store();
    let job_stream = reflector::reflector(
        job_writer,
        watcher(api_of::<Stored<TrainingJob>>(&client, namespace), everywhere).modify(strip).default_backoff(),
    )
    .applied_objects();
    let recorder = Recorder::new(client.clone(), Reporter { controller: "foreshard".to_owned(), instance: None });
    let (news, told_of) = unbounded();
    let heads = Arc::new(Heads::new(news));
    let forgotten = heads.clone();
    let told_of = told_of.map(|(namespace, name): Key| ObjectRef::new(&name).within(&namespace));
    let context = Arc::new(Context {
        client: client.clone(),
        nodes,
        pods,
        plans,
        profiles,
        recorder: recorder.clone(),
        heads: heads.clone(),
        promised: Mutex::default(),
        memory: memory.clone(),
        left_out: Mutex::default(),
        counts,
        key: key::read_or_make(&client, &config.site.namespace).await?,
        config: config.clone(),
    });
    tokio::spawn(node_stream.for_each(|seen| heard("nodes", seen.err())));
    tokio::spawn(profile_stream.for_each(move |seen| profile_seen(seen, recorder.clone())));
    Controller::for_stream(job_stream, jobs)
        .with_config(kube::runtime::controller::Config::default().concurrency(config.concurrency))
        .owns_stream(pod_stream)
        .owns_stream(plan_stream)
        .reconcile_on(told_of)
        .shutdown_on_signal()
        .run(reconcile, requeue, context)
        .for_each(|result| {
            if let Err(ControllerError::ObjectNotFound(job)) = &result {
                let namespace = job.namespace.clone().unwrap_or_default();
                memory.lock().unwrap_or_else(|p| p.into_inner()).remove(&format!("{namespace}/{}", job.name));
                forgotten.forget(&(namespace, job.name.clone()));
            }
            match result {
                // Nothing is seen until this ends.
                Err(ControllerError::QueueError(e)) => {
                    tracing::warn!(error = %e, "jobs, pods or plans cannot be watched");
                }
                Err(e) => tracing::debug!(error = %e, "a look at a job failed"),
                Ok(_) => {}
            }
            std::future::ready(())
        })
        .await;
    Ok(())
}

async fn heard(what: &str, error: Option<watcher::Error>) {
    if let Some(e) = error {
        tracing::warn!(error = %e, "{what} cannot be watched");
    }
}

/// Jobs go on without a profile that cannot be read.
async fn profile_seen(seen: Result<Stored<ModelProfile>, watcher::Error>, recorder: Recorder) {
    match seen {
        Err(e) => heard("profiles", Some(e)).await,
        Ok(profile) => {
            if let Err(e) = &profile.object {
                unreadable::tell(&recorder, &profile, &unreadable::text(&e.why)).await;
            }
        }
    }
}

/// What was made for a pod that is gone is made again at once.
fn forget(memory: &Mutex<BTreeMap<String, Memory>>, event: &watcher::Event<Pod>) {
    let mut memory = memory.lock().unwrap_or_else(|p| p.into_inner());
    match event {
        watcher::Event::Delete(pod) => {
            let key = job_of(pod).map(|job| format!("{}/{job}", pod.namespace().unwrap_or_default()));
            if let Some(memory) = key.and_then(|key| memory.get_mut(&key)) {
                memory.recent.clear();
            }
        }
        watcher::Event::Init => memory.values_mut().for_each(|m| m.recent.clear()),
        _ => {}
    }
}

fn api_of<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

fn strip<K: Resource>(object: &mut K) {
    object.managed_fields_mut().clear();
}

/// Keeps of a pod what is looked at.
fn slim(pod: &mut Pod) {
    strip(pod);
    pod.annotations_mut().retain(|key, _| key == RETRIABLE);
}

/// A job that is being looked at is not looked at again before that has ended: whatever happens, it ends.
async fn reconcile(job: Arc<Stored<TrainingJob>>, context: Arc<Context>) -> Result<Action, OperatorError> {
    let looked = tokio::time::timeout(LONGEST, look(job, context)).await;
    looked.unwrap_or(Err(OperatorError::NoAnswer(LONGEST.as_secs())))
}

async fn look(stored: Arc<Stored<TrainingJob>>, context: Arc<Context>) -> Result<Action, OperatorError> {
    Counts::add(&context.counts.reconciles);
    let began = Instant::now();
    let key = (stored.namespace().unwrap_or_default(), stored.name_any());
    if stored.meta().deletion_timestamp.is_some() {
        context.heads.forget(&key);
        // Everything of a job is owned by it: the garbage collector takes it away.
        return Ok(Action::await_change());
    }
    let namespace = stored.namespace().ok_or_else(|| OperatorError::Incomplete(stored.name_any(), "namespace"))?;
    let job = match &stored.object {
        Ok(job) => job,
        Err(e) if e.managed_by.as_ref().is_some_and(|by| by != CONTROLLER) => {
            context.heads.forget(&key);
            return Ok(Action::await_change());
        }
        Err(e) => return not_understood(&context, &stored, &namespace, e.training.as_ref(), &e.why).await,
    };
    context.tell_left_out(&stored);
    // Without full caches every node looks empty.
    let pods_are_known = context.pods.lock().unwrap_or_else(|p| p.into_inner()).is_ready();
    if !pods_are_known || !is_ready(&context.nodes) || !is_ready(&context.plans) {
        return Ok(Action::requeue(SOON));
    }
    let work = Work { context: &context, job, namespace };
    // A plan is the operator's own: without knowing the last one, it would make another of the same name.
    if let Some(why) = work.unreadable_plan() {
        let said = job.status.as_ref().and_then(|s| s.condition(condition::TRAINING));
        return not_understood(&context, &stored, &work.namespace, said, &why).await;
    }
    let pods = work.pods();
    let head = work.head(&key, &pods);
    let desired = work.decide(&pods, head.as_deref());
    let again = desired.again;
    if let (Some(head), Some(revision)) = (&head, desired.approve)
        && let Some(answer) = head.approve(revision).await
    {
        let answer = answer.unwrap_or_else(|e| chain(&e));
        tracing::info!(job = work.key(), plan = revision, answer, "told of an approval");
    }
    work.fulfil(desired).await?;
    context.counts.took(began.elapsed());
    if let Some(memory) = context.memory.lock().unwrap_or_else(|p| p.into_inner()).get_mut(&work.key()) {
        memory.failures = 0;
    }
    Ok(Action::requeue(Duration::from_secs(again)))
}

/// A job of which this version does not understand enough is left as it is, and told so in its condition `Training`.
async fn not_understood(
    context: &Context,
    job: &Stored<TrainingJob>,
    namespace: &str,
    said: Option<&Condition>,
    why: &str,
) -> Result<Action, OperatorError> {
    context.heads.forget(&(namespace.to_owned(), job.name_any()));
    let text = unreadable::text(why);
    let Some(status) = unreadable::status(job.meta().generation, said, &text, Timestamp::now()) else {
        return Ok(Action::await_change());
    };
    Counts::add(&context.counts.writes);
    let name = job.name_any();
    let object = json!({
        "apiVersion": "foreshard.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": name}, "status": status,
    });
    let api: Api<Stored<TrainingJob>> = Api::namespaced(context.client.clone(), namespace);
    let params = PatchParams::apply(unreadable::MANAGER).force();
    let written = api.patch_status(&name, &params, &Patch::Apply(&object)).await;
    written.map_err(|e| api_error("write the status of", format!("job {name}"), e))?;
    unreadable::tell(&context.recorder, job, &text).await;
    Ok(Action::await_change())
}

/// Whether a cache has been filled. Nobody waits for it: of several that do, `Store::wait_until_ready` wakes only the last
/// (kube-runtime 5.0, one waker for all), and the jobs of the others were looked at no more.
fn is_ready<K>(store: &Store<K>) -> bool
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    matches!(store.wait_until_ready().now_or_never(), Some(Ok(())))
}

/// Per job, longer each time: 1 s, 2 s, 4 s, up to a minute.
fn requeue(job: Arc<Stored<TrainingJob>>, error: &OperatorError, context: Arc<Context>) -> Action {
    Counts::add(&context.counts.errors);
    let key = format!("{}/{}", job.namespace().unwrap_or_default(), job.name_any());
    let mut memory = context.memory.lock().unwrap_or_else(|p| p.into_inner());
    let failures = &mut memory.entry(key.clone()).or_default().failures;
    *failures = (*failures + 1).min(7);
    let least = if error.class() == Class::Wait { 10 } else { 1 };
    let pause = (1u64 << (*failures - 1)).clamp(least, 60);
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::warn!(job = key, error = %error, cause, again_s = pause, "cannot make the cluster as it should be");
    Action::requeue(Duration::from_secs(pause))
}

impl Context {
    /// Says once of each field of jobs that this version does not know.
    fn tell_left_out(&self, job: &Stored<TrainingJob>) {
        let mut told = self.left_out.lock().unwrap_or_else(|p| p.into_inner());
        for field in &job.left_out {
            if told.insert(field.clone()) {
                let name = job.name_any();
                tracing::warn!(job = name, field, "a field is passed over: the operator is older than its CRDs");
            }
        }
    }
}

/// One look at one job.
struct Work<'a> {
    context: &'a Context,
    job: &'a TrainingJob,
    namespace: String,
}

impl Work<'_> {
    fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.job.name_any())
    }

    fn pods(&self) -> Vec<PodSeen> {
        let uid = self.job.metadata.uid.as_deref().unwrap_or_default();
        let ledger = self.context.pods.lock().unwrap_or_else(|p| p.into_inner());
        ledger.pods(&(self.namespace.clone(), self.job.name_any()), uid)
    }

    /// The head, where its pod runs.
    fn head(&self, key: &Key, pods: &[PodSeen]) -> Option<Arc<Head>> {
        let Some(which) = self.which(pods) else {
            self.context.heads.forget(key);
            return None;
        };
        let at = which.at;
        let find = || {
            let identity = self.authority().and_then(|a| a.identity(Name::Operator, self.valid()))?;
            Ok::<_, TlsError>(rpc::Head { at, token: self.token(), identity: Some(identity) })
        };
        let head = self.context.heads.follow(key, which, find);
        head.map_err(|e| tracing::warn!(job = self.key(), error = chain(&e), "cannot ask a head")).ok()
    }

    fn which(&self, pods: &[PodSeen]) -> Option<Which> {
        let pod = pods.iter().find(|p| p.worker == 0 && p.phase == "Running")?;
        let ip: IpAddr = pod.ip.as_ref()?.parse().ok()?;
        let restarts = pod.head.as_ref().map_or(0, |h| h.restarts);
        let uid = self.job.metadata.uid.clone().unwrap_or_default();
        Some(Which { uid, at: (ip, STATUS_PORT).into(), restarts })
    }

    /// The certificate authority of the job.
    fn authority(&self) -> Result<Authority, TlsError> {
        let uid = self.job.metadata.uid.as_deref().unwrap_or_default();
        Authority::new(&key::authority(&self.context.key, uid), uid, self.valid())
    }

    /// When certificates of the job hold: for longer than any job lasts. They go with it.
    fn valid(&self) -> Range<i64> {
        const DAY: i64 = 86_400;
        let made = self.job.metadata.creation_timestamp.as_ref().map_or_else(Timestamp::now, |t| t.0).as_second();
        // Clocks of nodes may be behind.
        made.saturating_sub(DAY)..made.saturating_add(3650 * DAY)
    }

    fn token(&self) -> String {
        key::token(&self.context.key, self.job.metadata.uid.as_deref().unwrap_or_default())
    }

    /// Looks and decides with nobody else deciding meanwhile: what is promised to one job is not there for another.
    fn decide(&self, pods: &[PodSeen], head: Option<&Head>) -> Desired {
        let context = self.context;
        let mut promised = context.promised.lock().unwrap_or_else(|p| p.into_inner());
        let key = (self.namespace.clone(), self.job.name_any());
        let ledger = context.pods.lock().unwrap_or_else(|p| p.into_inner());
        promised.retain(|key, seats| {
            seats.retain(|s| !ledger.shows(key, s.worker));
            !seats.is_empty()
        });
        let others = promised.iter().filter(|(k, _)| **k != key).flat_map(|(_, seats)| seats);
        let others = others.map(|s| Taken {
            node: s.node.clone(),
            cpu: i64::from(s.cores) * 1000,
            memory: i64::try_from(s.memory).unwrap_or(i64::MAX),
            devices: Some(&s.device).filter(|d| *d != CPU).map(|d| (d.clone(), 1)).into_iter().collect(),
        });
        let nodes = context.nodes.state();
        let rooms = ledger.rooms(nodes.iter().map(|n| &**n), &others.collect::<Vec<_>>());
        drop(ledger);
        let mut plans: Vec<PartitionPlan> =
            self.plans().iter().filter_map(|p| p.object.as_ref().ok().cloned()).collect();
        plans.sort_by_key(|p| p.spec.revision);
        let profiles = context.profiles.state_filter(|p| p.meta().namespace.as_ref() == Some(&self.namespace));
        let profiles: Vec<ModelProfile> = profiles.iter().filter_map(|p| p.object.as_ref().ok().cloned()).collect();
        let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default();
        let site = &context.config.site;
        let report = head.and_then(Head::report);
        let snapshot = Snapshot {
            job: self.job,
            rooms: &rooms,
            pods,
            plans: &plans,
            profiles: &profiles,
            report: report.as_deref(),
            deaf: head.and_then(Head::deaf),
            now,
            site,
        };
        let desired = decide(&snapshot);
        if let Some(plan) = &desired.plan {
            promised.insert(key, plan.shards.clone());
        }
        desired
    }

    fn plans(&self) -> Vec<Arc<Stored<PartitionPlan>>> {
        let owned = |p: &Stored<PartitionPlan>| {
            p.owner_references().iter().any(|o| Some(&o.uid) == self.job.metadata.uid.as_ref())
        };
        self.context.plans.state_filter(|p| p.meta().namespace.as_ref() == Some(&self.namespace) && owned(p))
    }

    /// A plan of a job that has not ended which cannot be read, and why.
    fn unreadable_plan(&self) -> Option<String> {
        if self.job.status.as_ref().is_some_and(TrainingJobStatus::has_ended) {
            return None;
        }
        self.plans().iter().find_map(|p| Some(format!("{}: {}", p.name_any(), p.object.as_ref().err()?.why)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With several jobs at the start of an operator, all but one used to wait for ever.
    #[test]
    fn a_cache_that_has_been_filled_is_ready_for_everybody_who_asked_before() {
        let (store, mut writer) = reflector::store::<Node>();
        assert!(!is_ready(&store) && !is_ready(&store.clone()));
        writer.apply_watcher_event(&watcher::Event::Init);
        writer.apply_watcher_event(&watcher::Event::InitDone);
        assert!(is_ready(&store) && is_ready(&store.clone()));
    }
}
